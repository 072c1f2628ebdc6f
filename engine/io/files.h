// Whole files in and out: reading through gzip and xz, and writing so that a crash leaves the old file or the new one.
#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

namespace baton {

// The content of the file, unpacked when it starts with the magic bytes of gzip or xz (the name does not matter).
// Throws InputError, naming the file, when it is missing, is not readable, has more than `most_bytes` (unpacked), or
// its packed content is truncated, corrupt, followed by something else or needs more than 256 MB to be unpacked.
std::vector<uint8_t> read_file(const std::filesystem::path& path, uint64_t most_bytes = uint64_t(1) << 36);

// Writes `path.tmp-<pid>` beside the file, flushes it to the disk and renames it, so that a reader sees the old content
// or the new one and never a part. A link is followed; an existing file keeps its permissions. A path that exists and
// is not a regular file (a pipe, /dev/stdout) cannot be replaced and is written straight.
// On any failure the temporary file is removed and RunError names the path and the system's reason.
void write_file_atomically(const std::filesystem::path& path, std::span<const uint8_t> bytes);
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

// Removes what write_file_atomically(path) left beside the file in processes that were killed and are no more. Errors
// are ignored.
void remove_leftovers(const std::filesystem::path& path);

// Makes the folder and those above it; one that exists is fine. Throws InputError when a file is in the way,
// RunError when the system refuses (permissions, a full disk).
void make_directories(const std::filesystem::path& path);

// A file by its place in the build folder, such as "tools/plot", found from where the running program lies: programs
// are built into folders of that folder, which may have been moved. The file need not be there.
std::filesystem::path in_build_folder(const std::filesystem::path& name);

}  // namespace baton
