// Reading and writing whole files: reading unpacks gzip and xz, and after a crash during writing there is either the
// old file or the new one.
#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/error.h"

namespace baton {

// Throws InputError: `who`, a file say, and what is wrong with it.
[[noreturn]] inline void refuse(const std::string& who, const std::string& what) { throw InputError(who + " " + what); }

// The content of the file, unpacked when it starts with the magic bytes of gzip or xz (the name does not matter).
// Throws InputError, naming the file, when it is missing, is not readable, has more than `most_bytes` (unpacked), or
// its packed content is truncated, corrupt, followed by something else or needs more than 256 MB to be unpacked.
std::vector<uint8_t> read_file(const std::filesystem::path& path, uint64_t most_bytes = uint64_t(1) << 36);

// Writes `path.tmp-<pid>` beside the file, flushes it to the disk and renames it, so that a reader sees the old content
// or the new one and never a part. A link is followed; an existing file keeps its permissions. A path that exists and
// is not a regular file (a pipe, /dev/stdout) cannot be replaced and is written directly.
// On any failure the temporary file is removed and RunError names the path and the system's reason.
void write_file_atomically(const std::filesystem::path& path, std::span<const uint8_t> bytes);
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

// Removes the temporary files that write_file_atomically(path) left in processes that were killed. Errors are ignored.
void remove_leftovers(const std::filesystem::path& path);

// Makes the folder and those above it, where they do not exist. Throws InputError when a file is in the way, RunError
// when the system refuses (permissions, a full disk).
void make_directories(const std::filesystem::path& path);

// The path of a file in the build folder, such as "tools/plot". Programs are built into subfolders of the build folder,
// so it is found from the path of the running program, and it may have been moved. The file need not exist.
std::filesystem::path in_build_folder(const std::filesystem::path& name);

}  // namespace baton
