// A library for LD_PRELOAD that makes one system call fail, to see what a program leaves behind.
//
//   IO_FAULT=CALL:N:HOW    the N-th CALL (from 1) on a path with IO_FAULT_PATH in it
//     CALL  open read write fsync rename close
//     HOW   an errno (ENOSPC, EIO, EACCES, EINTR, EDQUOT, EMFILE), "short" (read and write: half of the bytes, which is
//           no error), or "kill" (the process is killed there)
//   IO_FAULT_LOG=FILE      where "hit" is written when it happened
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>

namespace {

template <class F>
F real(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

struct Plan {
  char call[16] = "", how[16] = "";
  int at = 0;
  const char* path = nullptr;
  std::atomic<int> seen{0};

  Plan() {
    const char* text = getenv("IO_FAULT");
    if (text) sscanf(text, "%15[a-z]:%d:%15[A-Za-z]", call, &at, how);
    path = getenv("IO_FAULT_PATH");
  }
  // Whether this call, on this path, is the one.
  bool hit(const char* name, const char* of) {
    if (strcmp(name, call) != 0 || !of || (path && !strstr(of, path))) return false;
    if (++seen != at) return false;
    if (const char* log = getenv("IO_FAULT_LOG")) {
      const int fd = real<int (*)(const char*, int, ...)>("open")(log, O_WRONLY | O_CREAT | O_APPEND, 0666);
      (void)!real<ssize_t (*)(int, const void*, size_t)>("write")(fd, "hit\n", 4);
      real<int (*)(int)>("close")(fd);
    }
    if (!strcmp(how, "kill")) kill(getpid(), SIGKILL);
    return true;
  }
  bool hit_fd(const char* name, int fd) {
    if (strcmp(name, call) != 0) return false;
    char link[64], of[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, of, sizeof of - 1);
    if (n < 0 || of[0] != '/') return false;
    of[n] = 0;
    return hit(name, of);
  }
  bool is_short() const { return !strcmp(how, "short"); }
  int error() const {
    const struct {
      const char* name;
      int value;
    } known[] = {{"ENOSPC", ENOSPC}, {"EIO", EIO},       {"EACCES", EACCES},
                 {"EINTR", EINTR},   {"EDQUOT", EDQUOT}, {"EMFILE", EMFILE}};
    for (const auto& k : known)
      if (!strcmp(how, k.name)) return k.value;
    return EIO;
  }
};

Plan& plan() {
  static Plan the;
  return the;
}

int fail() {
  errno = plan().error();
  return -1;
}

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if (flags & (O_CREAT | O_TMPFILE)) {
    va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
  }
  if (plan().hit("open", path)) return fail();
  return real<int (*)(const char*, int, ...)>("open")(path, flags, mode);
}

ssize_t read(int fd, void* to, size_t n) {
  if (plan().hit_fd("read", fd)) {
    if (!plan().is_short()) return fail();
    n = n > 1 ? n / 2 : n;
  }
  return real<ssize_t (*)(int, void*, size_t)>("read")(fd, to, n);
}

ssize_t write(int fd, const void* from, size_t n) {
  if (plan().hit_fd("write", fd)) {
    if (!plan().is_short()) return fail();
    n = n > 1 ? n / 2 : n;
  }
  return real<ssize_t (*)(int, const void*, size_t)>("write")(fd, from, n);
}

int fsync(int fd) {
  if (plan().hit_fd("fsync", fd)) return fail();
  return real<int (*)(int)>("fsync")(fd);
}

int close(int fd) {
  if (plan().hit_fd("close", fd)) {
    real<int (*)(int)>("close")(fd);
    return fail();
  }
  return real<int (*)(int)>("close")(fd);
}

int rename(const char* from, const char* to) {
  if (plan().hit("rename", to)) return fail();
  return real<int (*)(const char*, const char*)>("rename")(from, to);
}

}  // extern "C"
