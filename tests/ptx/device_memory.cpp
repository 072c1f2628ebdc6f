#include "tests/ptx/device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

namespace ptx {

namespace {

constexpr uint64_t page_bytes = uint64_t(1) << DeviceMemory::page_bits;
constexpr uint64_t guard_bytes = 4096;  // between allocations: an overrun of less is seen
constexpr uint64_t preferred_window = 0x500000000000;

std::map<uint64_t, size_t> allocations;  // by the offset of their first byte; kept apart from the header's class

char* reserve(uint64_t at, size_t bytes, int protection) {
  void* p = mmap(reinterpret_cast<void*>(at), bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("ptx: cannot reserve address space for device memory");
    std::_Exit(1);
  }
  return static_cast<char*>(p);
}

std::string hexadecimal(uint64_t address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

}  // namespace

DeviceMemory& DeviceMemory::instance() {
  static DeviceMemory* memory = new DeviceMemory;  // never destroyed: programs free at their very end
  return *memory;
}

DeviceMemory::DeviceMemory() {
  window_ = reinterpret_cast<uint64_t>(reserve(preferred_window, window_bytes, PROT_NONE));
  storage_ = reserve(0, window_bytes, PROT_READ | PROT_WRITE);
  bytes_ = reinterpret_cast<uint8_t*>(reserve(0, window_bytes, PROT_READ | PROT_WRITE));
  pages_ = reinterpret_cast<uint8_t*>(reserve(0, window_bytes >> page_bits, PROT_READ | PROT_WRITE));
}

uint64_t DeviceMemory::allocate(size_t bytes) {
  if (in_use_ + bytes > capacity || next_ + bytes + 2 * guard_bytes > window_bytes) return 0;
  const uint64_t offset = next_;
  next_ += (bytes + guard_bytes + 511) / 512 * 512;
  allocations[offset] = bytes;
  in_use_ += bytes;
  const uint64_t end = offset + bytes;
  const uint64_t first_page = (offset + page_bytes - 1) >> page_bits, end_page = end >> page_bits;
  if (first_page >= end_page) {
    std::memset(bytes_ + offset, unwritten_byte, bytes);
  } else {  // whole pages in the middle cost a byte each
    std::memset(bytes_ + offset, unwritten_byte, (first_page << page_bits) - offset);
    std::memset(pages_ + first_page, none_written, end_page - first_page);
    std::memset(bytes_ + (end_page << page_bits), unwritten_byte, end - (end_page << page_bits));
  }
  return window_ + offset;
}

bool DeviceMemory::release(uint64_t address) {
  const auto found = contains(address) ? allocations.find(offset_of(address)) : allocations.end();
  if (found == allocations.end()) return false;
  const uint64_t offset = found->first, end = offset + found->second;
  in_use_ -= found->second;
  allocations.erase(found);
  const uint64_t first_page = (offset + page_bytes - 1) >> page_bits, end_page = end >> page_bits;
  if (first_page >= end_page) {
    std::memset(bytes_ + offset, free_byte, end - offset);
    return true;
  }
  std::memset(bytes_ + offset, free_byte, (first_page << page_bits) - offset);
  std::memset(bytes_ + (end_page << page_bits), free_byte, end - (end_page << page_bits));
  std::memset(pages_ + first_page, see_bytes, end_page - first_page);
  // Zero again, which is free_byte, and the host's memory is given back.
  const size_t whole = (end_page - first_page) << page_bits;
  madvise(bytes_ + (first_page << page_bits), whole, MADV_DONTNEED);
  madvise(storage_ + (first_page << page_bits), whole, MADV_DONTNEED);
  return true;
}

char* DeviceMemory::storage(uint64_t address, size_t bytes, const char* what) const {
  const std::string name = std::string(what) + " (" + hexadecimal(address) + ")";
  if (address == 0) throw Fault(FaultKind::access, std::string(what) + " is a null pointer");
  if (!contains(address)) throw Fault(FaultKind::access, name + " is not an address of the device");
  const uint64_t offset = offset_of(address);
  auto found = allocations.upper_bound(offset);
  if (found == allocations.begin()) throw Fault(FaultKind::access, name + " lies outside any allocation");
  --found;
  const uint64_t end = found->first + found->second;
  if (offset >= end && !(offset == end && bytes == 0))
    throw Fault(FaultKind::access, name + " lies outside any allocation");
  if (offset + bytes > end)
    throw Fault(FaultKind::access, name + ": " + std::to_string(bytes) + " bytes, but its allocation ends after " +
                                       std::to_string(end - offset));
  return storage_ + offset;
}

char* DeviceMemory::typed_storage(uint64_t address, size_t size, size_t count, const char* what) const {
  if (address % size != 0)
    throw Fault(FaultKind::alignment, std::string(what) + " (" + hexadecimal(address) + ") is not aligned to " +
                                          std::to_string(size) + " bytes");
  return storage(address, size * count, what);
}

void DeviceMemory::fill(uint64_t address, int value, size_t bytes, const char* what) {
  char* to = storage(address, bytes, what);
  for (uint64_t at = offset_of(address), end = at + bytes; at < end;) {
    const size_t here = std::min(end, (at / page_bytes + 1) * page_bytes) - at;
    if (value != 0 || pages_[at >> page_bits] != none_written) std::memset(to, value, here);  // untouched pages are 0
    at += here;
    to += here;
  }
  mark_written(address, bytes);
}

void DeviceMemory::mark_written(uint64_t address, size_t bytes) {
  for (uint64_t at = offset_of(address), end = at + bytes; at < end;) {
    const size_t here = std::min(end, (at / page_bytes + 1) * page_bytes) - at;
    uint8_t& page = pages_[at >> page_bits];
    if (page == none_written && here == page_bytes) {
      page = all_written;
    } else if (page != all_written) {
      if (page == none_written) {  // from now on byte by byte
        std::memset(bytes_ + at / page_bytes * page_bytes, unwritten_byte, page_bytes);
        page = see_bytes;
      }
      std::memset(bytes_ + at, written_byte, here);
      if (here == page_bytes) page = all_written;
    }
    at += here;
  }
}

bool DeviceMemory::all_bytes(uint64_t offset, size_t bytes, Byte least) const {
  for (uint64_t at = offset, end = offset + bytes; at < end;) {
    const size_t here = std::min(end, (at / page_bytes + 1) * page_bytes) - at;
    const uint8_t page = pages_[at >> page_bits];
    if (page == none_written && least == written_byte) return false;
    if (page == see_bytes)
      for (size_t i = 0; i < here; i++)
        if (bytes_[at + i] < least) return false;
    at += here;
  }
  return true;
}

bool DeviceMemory::allocated(uint64_t address, size_t bytes) const {
  return all_bytes(offset_of(address), bytes, unwritten_byte);
}

bool DeviceMemory::written(uint64_t address, size_t bytes) const {
  return all_bytes(offset_of(address), bytes, written_byte);
}

void DeviceMemory::check_written(uint64_t address, size_t bytes, const char* what) const {
  if (bytes == 0 || written(address, bytes)) return;
  size_t first = 0;
  while (written(address + first, 1)) first++;
  throw Fault(FaultKind::launch, std::string(what) + " (" + hexadecimal(address) + "): byte " + std::to_string(first) +
                                     " of " + std::to_string(bytes) + " is read but was never written");
}

}  // namespace ptx
