/* Preloaded into the jobs of a node: a file system that errs, names that are seen late, a clock
 * that is wrong. It acts on paths that contain FAULTY_UNDER:
 *   FAULTY_EVERY=n   each n-th call fails, with EIO and ESTALE by turns
 *   FAULTY_LATE=s    what others made is not there for the first s seconds
 *   FAULTY_CLOCK=s   the wall clock is s seconds ahead, everywhere
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define OWN 4096
static const char *under;
static long every, late, ahead;
static atomic_long calls, made;
static ino_t own[OWN]; /* inodes that this process made: a client sees its own at once */

static long number(const char *name) {
  const char *value = getenv(name);
  return value ? atol(value) : 0;
}

__attribute__((constructor)) static void begin(void) {
  under = getenv("FAULTY_UNDER");
  every = number("FAULTY_EVERY");
  late = number("FAULTY_LATE");
  ahead = number("FAULTY_CLOCK");
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int meant(const char *path) { return under && path && strstr(path, under); }

static int errs(const char *path) {
  if (!every || !meant(path)) return 0;
  long call = ++calls;
  if (call % every) return 0;
  errno = (call / every) % 2 ? EIO : ESTALE;
  return 1;
}

static int errs_at(int descriptor) {
  char name[64], path[4096];
  if (!every || !under) return 0;
  snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(name, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return errs(path);
}

static void remember(int descriptor) {
  struct stat found;
  if (late && !syscall(SYS_fstat, descriptor, &found)) own[made++ % OWN] = found.st_ino;
}

static int hidden(int folder, const char *path) {
  struct stat found;
  if (!late || syscall(SYS_newfstatat, folder, path, &found, AT_SYMLINK_NOFOLLOW)) return 0;
  if (!S_ISREG(found.st_mode) || time(NULL) - found.st_ctime >= late) return 0;
  for (int n = 0; n < OWN && n < made; n++)
    if (own[n] == found.st_ino) return 0;
  errno = ENOENT;
  return 1;
}

static mode_t mode_of(int flags, va_list rest) {
  return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = mode_of(flags, rest); \
    va_end(rest); \
    if (errs(path) || (!(flags & O_CREAT) && meant(path) && hidden(AT_FDCWD, path))) return -1; \
    int descriptor = real(path, flags, mode); \
    if (descriptor >= 0 && flags & O_CREAT) remember(descriptor); \
    return descriptor; \
  }
OPEN(open)
OPEN(open64)

ssize_t write(int descriptor, const void *data, size_t size) {
  REAL(write);
  return errs_at(descriptor) ? -1 : real(descriptor, data, size);
}

ssize_t read(int descriptor, void *data, size_t size) {
  REAL(read);
  return errs_at(descriptor) ? -1 : real(descriptor, data, size);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
  REAL(pwrite64);
  return errs_at(descriptor) ? -1 : real(descriptor, data, size, offset);
}

int fsync(int descriptor) {
  REAL(fsync);
  return errs_at(descriptor) ? -1 : real(descriptor);
}

int link(const char *from, const char *to) {
  REAL(link);
  return errs(to) ? -1 : real(from, to);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  return errs(to) ? -1 : real(from, to);
}

#define STAT(name, kind) \
  int name(const char *path, struct kind *found) { \
    REAL(name); \
    if (errs(path) || (meant(path) && hidden(AT_FDCWD, path))) return -1; \
    return real(path, found); \
  }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

static int meant_folder(DIR *folder) {
  char name[64], path[4096];
  snprintf(name, sizeof name, "/proc/self/fd/%d", dirfd(folder));
  ssize_t size = readlink(name, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return meant(path);
}

#define READDIR(name, kind) \
  struct kind *name(DIR *folder) { \
    REAL(name); \
    int before = errno; \
    struct kind *entry = real(folder); \
    if (!late || !entry || !meant_folder(folder)) return entry; \
    while (entry && hidden(dirfd(folder), entry->d_name)) { \
      errno = before; \
      entry = real(folder); \
    } \
    return entry; \
  }
READDIR(readdir, dirent)
READDIR(readdir64, dirent64)

int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime);
  int failed = real(clock, now);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead;
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  REAL(gettimeofday);
  int failed = real(now, zone);
  if (!failed) now->tv_sec += ahead;
  return failed;
}

time_t time(time_t *stored) {
  struct timespec now;
  syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
  if (stored) *stored = now.tv_sec + ahead;
  return now.tv_sec + ahead;
}
