/* Fails the k-th system call that changes files under $FAULT_ROOT: open for writing, write, fsync, rename.

   Preloaded (LD_PRELOAD); armed by fault_arm(k, error, again).  error 0 kills the process there (SIGKILL).  again: all
   later calls fail, too, as on a disk that stays full. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_DESCRIPTORS = 4096 };
static char watched[MAX_DESCRIPTORS];
static int calls, fail_at, fail_error, fail_again;

void fault_arm(int k, int error, int again) { calls = 0; fail_at = k; fail_error = error; fail_again = again; }
int fault_calls(void) { return calls; }

static int under_root(const char *path) {
  static const char *root;
  if (!root) root = getenv("FAULT_ROOT");
  return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int fails(void) {
  calls++;
  if (!fail_at || !(calls == fail_at || (fail_again && calls > fail_at))) return 0;
  if (!fail_error) kill(getpid(), SIGKILL);
  errno = fail_error;
  return 1;
}

static int is_watched(int fd) { return fd >= 0 && fd < MAX_DESCRIPTORS && watched[fd]; }

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

#define OPEN(name, parameters, call)                                                     \
  int name parameters {                                                                  \
    int mode = 0;                                                                        \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                 \
      va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest);       \
    }                                                                                    \
    int writes = under_root(path) && (flags & (O_WRONLY | O_RDWR | O_CREAT));            \
    if (writes && fails()) return -1;                                                    \
    int fd = REAL(name) call;                                                            \
    if (fd >= 0 && fd < MAX_DESCRIPTORS)                                                 \
      watched[fd] = writes || (under_root(path) && (flags & O_ACCMODE) == O_RDONLY ? 2 : 0) || writes; \
    return fd;                                                                           \
  }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))

#define WRITE(type, name, parameters, call) \
  type name parameters { return is_watched(fd) && fails() ? -1 : REAL(name) call; }
WRITE(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
WRITE(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRITE(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
WRITE(int, fsync, (int fd), (fd))
WRITE(int, fdatasync, (int fd), (fd))

#define RENAME(name, parameters, call) \
  int name parameters { return under_root(to) && fails() ? -1 : REAL(name) call; }
RENAME(rename, (const char *from, const char *to), (from, to))
RENAME(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to))
RENAME(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags))
RENAME(link, (const char *from, const char *to), (from, to))
