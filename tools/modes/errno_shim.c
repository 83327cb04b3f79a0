/* Fails the N-th call of one kind on files below one folder, inside a real process: preloaded before the C library.
 *
 * What is not here: which calls fail and what must follow (syscalls.py, which compiles this and sets the control page).
 *
 * The idea needed to read it: a page of memory that is shared with the process that judges says what fails, and counts. Calls
 * on other files pass. The kind of a call is its place in `enum kind`, which is in the order of KINDS in syscalls.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, READ, WRITE, FDATASYNC, FSYNC, RENAME, UNLINK, TRUNCATE, ALLOCATE, MKDIR, LOCK, LISTDIR, STAT, KINDS };

struct control {
  _Atomic int32_t armed;      /* 0: count only */
  _Atomic int32_t kind;       /* which call fails */
  _Atomic int32_t number;     /* the first one that does, from 1 */
  _Atomic int32_t forever;    /* and all after it */
  _Atomic int32_t error;      /* errno; 0: a short read or write instead */
  _Atomic int32_t hits;       /* how often it struck */
  _Atomic int32_t wal_syncs;  /* hits that were failed syncs of a segment; after EINTR they are called again */
  _Atomic int32_t unused;
  _Atomic int32_t calls[KINDS];
  char place[512];            /* of the hit: path */
  char folder[512];           /* below which calls count */
};

static struct control *control;

__attribute__((constructor)) static void set_up(void) {
  const char *path = getenv("WALBATCH_SHIM_CONTROL");
  if (path == NULL) return;
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
  int fd = real(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) abort();
  void *page = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (page == MAP_FAILED) abort();
  close(fd);
  control = page;
}

static int is_ours(const char *path) {
  return strncmp(path, control->folder, strlen(control->folder)) == 0;
}

/* Count the call; -1: it passes, else the errno (0: short). */
static int strike(enum kind kind, const char *path) {
  int seen = atomic_fetch_add(&control->calls[kind], 1) + 1;
  if (!control->armed || control->kind != (int32_t)kind) return -1;
  if (seen != control->number && !(control->forever && seen > control->number)) return -1;
  if (atomic_fetch_add(&control->hits, 1) == 0) snprintf(control->place, sizeof control->place, "%s", path);
  if ((kind == FDATASYNC || kind == FSYNC) && control->error != 0 && control->error != EINTR && strstr(path, "/wal/") != NULL)
    atomic_fetch_add(&control->wal_syncs, 1);
  return control->error;
}

static int on_path(enum kind kind, int directory, const char *path) {
  if (control == NULL || path == NULL || control->folder[0] == 0) return -1;
  char whole[PATH_MAX];
  if (path[0] != '/' && directory != AT_FDCWD) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, whole, sizeof whole - 2);
    if (length < 0) return -1;
    snprintf(whole + length, sizeof whole - (size_t)length, "/%s", path);
    path = whole;
  }
  return is_ours(path) ? strike(kind, path) : -1;
}

static int on_file(enum kind kind, int fd) {
  if (control == NULL || control->folder[0] == 0) return -1;
  int saved = errno;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (length < 0) return -1;
  path[length] = 0;
  return is_ours(path) ? strike(kind, path) : -1;
}

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (real == NULL) real = dlsym(RTLD_NEXT, name)

/* Calls that fail with -1 and errno. */
#define FAIL_IF(struck) \
  do { \
    int error_ = (struck); \
    if (error_ > 0) { \
      errno = error_; \
      return -1; \
    } \
  } while (0)

#define MODE_OF(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { \
    va_list list; \
    va_start(list, flags); \
    mode = va_arg(list, mode_t); \
    va_end(list); \
  }

#define OPEN_CALL(name) \
  int name(const char *path, int flags, ...) { \
    MODE_OF(flags) \
    REAL(int, #name, const char *, int, ...); \
    FAIL_IF(on_path(OPEN, AT_FDCWD, path)); \
    return real(path, flags, mode); \
  }
OPEN_CALL(open)
OPEN_CALL(open64)

#define OPENAT_CALL(name) \
  int name(int directory, const char *path, int flags, ...) { \
    MODE_OF(flags) \
    REAL(int, #name, int, const char *, int, ...); \
    FAIL_IF(on_path(OPEN, directory, path)); \
    return real(directory, path, flags, mode); \
  }
OPENAT_CALL(openat)
OPENAT_CALL(openat64)

#define FOPEN_CALL(name) \
  FILE *name(const char *path, const char *how) { \
    REAL(FILE *, #name, const char *, const char *); \
    int struck = on_path(OPEN, AT_FDCWD, path); \
    if (struck > 0) { \
      errno = struck; \
      return NULL; \
    } \
    return real(path, how); \
  }
FOPEN_CALL(fopen)
FOPEN_CALL(fopen64)

/* Half of what was asked for; a single byte cannot be shorter. */
#define SHORTER(struck, size) ((struck) == 0 && (size) > 1 ? (size) / 2 : (size))

ssize_t read(int fd, void *data, size_t size) {
  REAL(ssize_t, "read", int, void *, size_t);
  int struck = on_file(READ, fd);
  FAIL_IF(struck);
  return real(fd, data, SHORTER(struck, size));
}

#define PREAD_CALL(name) \
  ssize_t name(int fd, void *data, size_t size, off_t offset) { \
    REAL(ssize_t, #name, int, void *, size_t, off_t); \
    int struck = on_file(READ, fd); \
    FAIL_IF(struck); \
    return real(fd, data, SHORTER(struck, size), offset); \
  }
PREAD_CALL(pread)
PREAD_CALL(pread64)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t);
  int struck = on_file(WRITE, fd);
  FAIL_IF(struck);
  return real(fd, data, SHORTER(struck, size));
}

#define PWRITE_CALL(name) \
  ssize_t name(int fd, const void *data, size_t size, off_t offset) { \
    REAL(ssize_t, #name, int, const void *, size_t, off_t); \
    int struck = on_file(WRITE, fd); \
    FAIL_IF(struck); \
    return real(fd, data, SHORTER(struck, size), offset); \
  }
PWRITE_CALL(pwrite)
PWRITE_CALL(pwrite64)

/* A short vector is its first part, or half of it. */
static int shorter(const struct iovec *parts, int count, struct iovec *one) {
  *one = parts[0];
  if (count == 1) one->iov_len = SHORTER(0, one->iov_len);
  return 1;
}

#define VECTOR_CALL(name, kind_) \
  ssize_t name(int fd, const struct iovec *parts, int count, off_t offset) { \
    REAL(ssize_t, #name, int, const struct iovec *, int, off_t); \
    int struck = on_file(kind_, fd); \
    FAIL_IF(struck); \
    struct iovec one; \
    if (struck == 0 && count > 0) return real(fd, &one, shorter(parts, count, &one), offset); \
    return real(fd, parts, count, offset); \
  }
VECTOR_CALL(pwritev, WRITE)
VECTOR_CALL(pwritev64, WRITE)
VECTOR_CALL(preadv, READ)
VECTOR_CALL(preadv64, READ)

#define VECTOR2_CALL(name, kind_) \
  ssize_t name(int fd, const struct iovec *parts, int count, off_t offset, int flags) { \
    REAL(ssize_t, #name, int, const struct iovec *, int, off_t, int); \
    int struck = on_file(kind_, fd); \
    FAIL_IF(struck); \
    struct iovec one; \
    if (struck == 0 && count > 0) return real(fd, &one, shorter(parts, count, &one), offset, flags); \
    return real(fd, parts, count, offset, flags); \
  }
VECTOR2_CALL(pwritev2, WRITE)
VECTOR2_CALL(pwritev64v2, WRITE)
VECTOR2_CALL(preadv2, READ)
VECTOR2_CALL(preadv64v2, READ)

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  int struck = on_file(WRITE, fd);
  FAIL_IF(struck);
  struct iovec one;
  if (struck == 0 && count > 0) return real(fd, &one, shorter(parts, count, &one));
  return real(fd, parts, count);
}

int fdatasync(int fd) {
  REAL(int, "fdatasync", int);
  FAIL_IF(on_file(FDATASYNC, fd));
  return real(fd);
}

int fsync(int fd) {
  REAL(int, "fsync", int);
  FAIL_IF(on_file(FSYNC, fd));
  return real(fd);
}

int rename(const char *source, const char *target) {
  REAL(int, "rename", const char *, const char *);
  FAIL_IF(on_path(RENAME, AT_FDCWD, target));
  return real(source, target);
}

int renameat(int from, const char *source, int to, const char *target) {
  REAL(int, "renameat", int, const char *, int, const char *);
  FAIL_IF(on_path(RENAME, to, target));
  return real(from, source, to, target);
}

int unlink(const char *path) {
  REAL(int, "unlink", const char *);
  FAIL_IF(on_path(UNLINK, AT_FDCWD, path));
  return real(path);
}

int unlinkat(int directory, const char *path, int flags) {
  REAL(int, "unlinkat", int, const char *, int);
  FAIL_IF(on_path(UNLINK, directory, path));
  return real(directory, path, flags);
}

#define FTRUNCATE_CALL(name) \
  int name(int fd, off_t size) { \
    REAL(int, #name, int, off_t); \
    FAIL_IF(on_file(TRUNCATE, fd)); \
    return real(fd, size); \
  }
FTRUNCATE_CALL(ftruncate)
FTRUNCATE_CALL(ftruncate64)

#define TRUNCATE_CALL(name) \
  int name(const char *path, off_t size) { \
    REAL(int, #name, const char *, off_t); \
    FAIL_IF(on_path(TRUNCATE, AT_FDCWD, path)); \
    return real(path, size); \
  }
TRUNCATE_CALL(truncate)
TRUNCATE_CALL(truncate64)

#define FALLOCATE_CALL(name) \
  int name(int fd, int how, off_t offset, off_t size) { \
    REAL(int, #name, int, int, off_t, off_t); \
    FAIL_IF(on_file(ALLOCATE, fd)); \
    return real(fd, how, offset, size); \
  }
FALLOCATE_CALL(fallocate)
FALLOCATE_CALL(fallocate64)

/* These return the error instead of setting errno. */
#define POSIX_FALLOCATE_CALL(name) \
  int name(int fd, off_t offset, off_t size) { \
    REAL(int, #name, int, off_t, off_t); \
    int struck = on_file(ALLOCATE, fd); \
    return struck > 0 ? struck : real(fd, offset, size); \
  }
POSIX_FALLOCATE_CALL(posix_fallocate)
POSIX_FALLOCATE_CALL(posix_fallocate64)

int mkdir(const char *path, mode_t mode) {
  REAL(int, "mkdir", const char *, mode_t);
  FAIL_IF(on_path(MKDIR, AT_FDCWD, path));
  return real(path, mode);
}

int mkdirat(int directory, const char *path, mode_t mode) {
  REAL(int, "mkdirat", int, const char *, mode_t);
  FAIL_IF(on_path(MKDIR, directory, path));
  return real(directory, path, mode);
}

int flock(int fd, int how) {
  REAL(int, "flock", int, int);
  FAIL_IF(on_file(LOCK, fd));
  return real(fd, how);
}

#define FCNTL_CALL(name) \
  int name(int fd, int command, ...) { \
    va_list list; \
    va_start(list, command); \
    void *argument = va_arg(list, void *); \
    va_end(list); \
    REAL(int, #name, int, int, ...); \
    if (command == F_SETLK || command == F_SETLKW || command == F_GETLK) FAIL_IF(on_file(LOCK, fd)); \
    return real(fd, command, argument); \
  }
FCNTL_CALL(fcntl)
FCNTL_CALL(fcntl64)

struct dirent;
void *opendir(const char *path) {
  REAL(void *, "opendir", const char *);
  int struck = on_path(LISTDIR, AT_FDCWD, path);
  if (struck > 0) {
    errno = struck;
    return NULL;
  }
  return real(path);
}

#define STAT_CALL(name, type) \
  int name(const char *path, struct type *found) { \
    REAL(int, #name, const char *, struct type *); \
    FAIL_IF(on_path(STAT, AT_FDCWD, path)); \
    return real(path, found); \
  }
STAT_CALL(stat, stat)
STAT_CALL(stat64, stat64)
STAT_CALL(lstat, stat)
STAT_CALL(lstat64, stat64)

#define FSTAT_CALL(name, type) \
  int name(int fd, struct type *found) { \
    REAL(int, #name, int, struct type *); \
    FAIL_IF(on_file(STAT, fd)); \
    return real(fd, found); \
  }
FSTAT_CALL(fstat, stat)
FSTAT_CALL(fstat64, stat64)
