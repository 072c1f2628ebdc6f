// NumPy's array files: .npy, and .npz, which is a zip of them.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "engine/io/safetensors.h"

namespace baton {

// One array as a Tensor (dtype F64 F32 F16 I64 I32 U64 U32 U8; NumPy's |b1 and i1 become U8 and I32, i2 and u2 I32),
// C order: an array in Fortran order is reordered. Versions 1 to 3 of the format, little-endian.
// Limits: the header has at most 64 KB, there are at most 8 axes, and the bytes of the shape must be exactly those that
// the file has left, so that no memory is allocated on the claim of a header alone. Throws InputError, which names the
// file (and the array), where the file does not exist, is cut short, has trailing bytes, or is of another format, byte
// order or dtype (objects, strings, structures).
Tensor load_npy(const std::filesystem::path& path);

// All arrays of an .npz (stored or deflated members, zip64 too). Beside the limits of load_npy: at most
// 65,536 members; a member inflates to exactly the size that its directory entry names, at most `most_bytes`.
// Throws InputError as load_npy, and for a bad zip structure, a bad CRC or an encrypted member.
std::map<std::string, Tensor> load_npz(const std::filesystem::path& path, uint64_t most_bytes = uint64_t(1) << 36);

// Version 1.0, little-endian, C order; the file is replaced atomically. dtype F64 F32 I64 I32 U64 U32 U8. Throws
// InputError for another dtype or a tensor that does not check(), RunError if the file cannot be written.
void save_npy(const std::filesystem::path& path, const Tensor& tensor);

// All arrays, each as save_npy() writes it, under its name; the file is replaced atomically. The same arrays give the
// same bytes. Throws InputError as save_npy, and for a name that is not visible ASCII without '/', or for 4 GB and
// more.
void save_npz(const std::filesystem::path& path, const std::map<std::string, Tensor>& arrays);

}  // namespace baton
