/* Makes one system call on files under a directory fail; preloaded by faults.py (LD_PRELOAD), for tests only.
 *
 * Wrappers of libc's functions count the calls on files under the watched directory, by kind of operation. The n-th
 * call of one kind fails with an error, transfers half of its bytes, or kills the process. Linux with glibc only. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* in the order of OPERATIONS in faults.py */
enum { OPEN, READ, WRITE, SYNC, RENAME, MAP, MKDIR, UNLINK, TRUNCATE, COPY, LOCK, CLOSE, LIST, STAT, OPERATIONS };

/* Faults that are no errno. SHORT transfers half; FULL fails this and every later call that needs room on the disk. */
enum { NONE = 0, SHORT = -1, KILL = -2, FULL = -3 };

static char directory[PATH_MAX];
static size_t length; /* of directory; 0: nothing is watched */
static atomic_long seen[OPERATIONS];
static int armed_operation = -1, armed_fault;
static long armed_call;
static atomic_int fired;

__attribute__((visibility("default"))) void faults_watch(const char *path);
__attribute__((visibility("default"))) void faults_arm(int operation, long call, int fault);
__attribute__((visibility("default"))) long faults_seen(int operation);
__attribute__((visibility("default"))) int faults_fired(void);

/* Counts calls on files under this directory, an absolute path, from 0 on; NULL: no longer counts. */
void faults_watch(const char *path)
{
    length = 0;
    if (path == NULL) {
        return;
    }
    for (int i = 0; i < OPERATIONS; i++) {
        atomic_store(&seen[i], 0);
    }
    atomic_store(&fired, 0);
    const size_t size = strlen(path);
    if (size < sizeof directory) {
        memcpy(directory, path, size + 1);
        length = size;
    }
}

void faults_arm(int operation, long call, int fault)
{
    armed_operation = operation;
    armed_call = call;
    armed_fault = fault;
}

long faults_seen(int operation) { return atomic_load(&seen[operation]); }

int faults_fired(void) { return atomic_load(&fired); }

static _Thread_local char met[PATH_MAX]; /* the last watched path, for the log */

static int is_under(const char *path)
{
    snprintf(met, sizeof met, "%s", path);
    return strncmp(path, directory, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

/* The path of a descriptor; "" if it has none */
static void path_of(int file, char *path, size_t room)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    const ssize_t n = readlink(link, path, room - 1);
    path[n > 0 ? n : 0] = '\0';
}

static int watched_file(int file)
{
    const int before = errno;
    char path[PATH_MAX];
    if (length == 0 || file < 0) {
        return 0;
    }
    path_of(file, path, sizeof path);
    errno = before;
    return is_under(path);
}

static int watched_path(int base, const char *path)
{
    if (length == 0 || path == NULL) {
        return 0;
    }
    if (path[0] == '/') {
        return is_under(path);
    }
    const int before = errno;
    char whole[2 * PATH_MAX];
    if (base != AT_FDCWD) {
        path_of(base, whole, PATH_MAX);
    } else if (getcwd(whole, PATH_MAX) == NULL) {
        whole[0] = '\0';
    }
    const size_t n = strlen(whole);
    snprintf(whole + n, sizeof whole - n, "/%s", path);
    errno = before;
    return is_under(whole);
}

static int watched_path_or_file(int base, const char *path)
{
    return path != NULL && path[0] == '\0' ? watched_file(base) : watched_path(base, path);
}

static int needs_room(int operation)
{
    return operation == WRITE || operation == MKDIR || operation == TRUNCATE || operation == COPY;
}

/* Counts a call; returns the fault that it has. An errno is also set. */
static int fault_of(int operation, int watched)
{
    if (!watched) {
        return NONE;
    }
    const long call = atomic_fetch_add(&seen[operation], 1) + 1;
    if (armed_fault == FULL && atomic_load(&fired) && needs_room(operation)) {
        errno = ENOSPC;
        return ENOSPC;
    }
    if (operation != armed_operation || call != armed_call) {
        return NONE;
    }
    atomic_store(&fired, 1);
    fprintf(stderr, "the fault meets %s\n", met);
    if (armed_fault == KILL) {
        kill(getpid(), SIGKILL);
        pause();
    }
    if (armed_fault == FULL) {
        errno = ENOSPC;
        return ENOSPC;
    }
    if (armed_fault > 0) {
        errno = armed_fault;
    }
    return armed_fault;
}

/* The function that a wrapper hides. ISO C has no conversion of dlsym's result, POSIX does. */
#define HIDDEN(type, name)                           \
    static type (*hidden)();                         \
    if (hidden == NULL) {                            \
        *(void **)&hidden = dlsym(RTLD_NEXT, #name); \
    }

#define FAILS(operation, watched) (fault_of(operation, watched) > 0)

static size_t half(size_t n) { return n > 1 ? n / 2 : n; }

/* -- opening and closing ------------------------------------------------------------------------- */

#define MODE_OF(flags)                       \
    mode_t mode = 0;                         \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { \
        va_list rest;                        \
        va_start(rest, flags);               \
        mode = va_arg(rest, mode_t);         \
        va_end(rest);                        \
    }

#define OPENING(name)                                                                      \
    int name(const char *path, int flags, ...)                                             \
    {                                                                                      \
        MODE_OF(flags)                                                                     \
        HIDDEN(int, name)                                                                  \
        return FAILS(OPEN, watched_path(AT_FDCWD, path)) ? -1 : hidden(path, flags, mode); \
    }
#define OPENING_AT(name)                                                                     \
    int name(int base, const char *path, int flags, ...)                                     \
    {                                                                                        \
        MODE_OF(flags)                                                                       \
        HIDDEN(int, name)                                                                    \
        return FAILS(OPEN, watched_path(base, path)) ? -1 : hidden(base, path, flags, mode); \
    }
OPENING(open)
OPENING(open64)
OPENING_AT(openat)
OPENING_AT(openat64)

/* what fortified programs call instead */
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int base, const char *path, int flags);
int __openat64_2(int base, const char *path, int flags);
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int base, const char *path, int flags) { return openat(base, path, flags); }
int __openat64_2(int base, const char *path, int flags) { return openat64(base, path, flags); }

#define OPENING_STREAM(name)                                                          \
    FILE *name(const char *path, const char *mode)                                    \
    {                                                                                 \
        HIDDEN(FILE *, name)                                                          \
        return FAILS(OPEN, watched_path(AT_FDCWD, path)) ? NULL : hidden(path, mode); \
    }
OPENING_STREAM(fopen)
OPENING_STREAM(fopen64)

/* Of files that may have been written: closing others cannot fail. The descriptor is closed in any case, as Linux
 * does. */
int close(int file)
{
    HIDDEN(int, close)
    const int before = errno, written = length > 0 && (fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY;
    errno = before;
    const int fault = fault_of(CLOSE, written && watched_file(file)), failed = hidden(file);
    if (fault > 0) {
        errno = fault;
        return -1;
    }
    return failed;
}

DIR *opendir(const char *path)
{
    HIDDEN(DIR *, opendir)
    return FAILS(LIST, watched_path(AT_FDCWD, path)) ? NULL : hidden(path);
}

DIR *fdopendir(int file)
{
    HIDDEN(DIR *, fdopendir)
    return FAILS(LIST, watched_file(file)) ? NULL : hidden(file);
}

/* -- reading and writing ------------------------------------------------------------------------- */

/* PARAMETERS after the file and a buffer of n bytes, and the ARGUMENTS that pass them on */
#define TRANSFER(name, operation, parameters, arguments)           \
    ssize_t name parameters                                        \
    {                                                              \
        HIDDEN(ssize_t, name)                                      \
        const int fault = fault_of(operation, watched_file(file)); \
        if (fault > 0) {                                           \
            return -1;                                             \
        }                                                          \
        if (fault == SHORT) {                                      \
            n = half(n);                                           \
        }                                                          \
        return hidden arguments;                                   \
    }
TRANSFER(read, READ, (int file, void *data, size_t n), (file, data, n))
TRANSFER(pread, READ, (int file, void *data, size_t n, off_t at), (file, data, n, at))
TRANSFER(pread64, READ, (int file, void *data, size_t n, off64_t at), (file, data, n, at))
TRANSFER(write, WRITE, (int file, const void *data, size_t n), (file, data, n))
TRANSFER(pwrite, WRITE, (int file, const void *data, size_t n, off_t at), (file, data, n, at))
TRANSFER(pwrite64, WRITE, (int file, const void *data, size_t n, off64_t at), (file, data, n, at))
TRANSFER(sendfile, COPY, (int file, int from, off_t *at, size_t n), (file, from, at, n))
TRANSFER(sendfile64, COPY, (int file, int from, off64_t *at, size_t n), (file, from, at, n))

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t n, unsigned flags)
{
    HIDDEN(ssize_t, copy_file_range)
    const int fault = fault_of(COPY, watched_file(to));
    return fault > 0 ? -1 : hidden(from, from_at, to, to_at, fault == SHORT ? half(n) : n, flags);
}

ssize_t __read_chk(int file, void *data, size_t n, size_t room);
ssize_t __read_chk(int file, void *data, size_t n, size_t room)
{
    (void)room;
    return read(file, data, n);
}

/* A short transfer is half of the first part. */
#define VECTORED(name, operation, parameters, arguments, cut_arguments)       \
    ssize_t name parameters                                                   \
    {                                                                         \
        HIDDEN(ssize_t, name)                                                 \
        const int fault = fault_of(operation, watched_file(file));            \
        if (fault > 0) {                                                      \
            return -1;                                                        \
        }                                                                     \
        if (fault == SHORT && count > 0) {                                    \
            const struct iovec cut = {parts->iov_base, half(parts->iov_len)}; \
            return hidden cut_arguments;                                      \
        }                                                                     \
        return hidden arguments;                                              \
    }
#define VECTORED_KINDS(kind, operation)                                                                          \
    VECTORED(kind##v, operation, (int file, const struct iovec *parts, int count), (file, parts, count),         \
             (file, &cut, 1))                                                                                    \
    VECTORED(p##kind##v, operation, (int file, const struct iovec *parts, int count, off_t at),                  \
             (file, parts, count, at), (file, &cut, 1, at))                                                      \
    VECTORED(p##kind##v64, operation, (int file, const struct iovec *parts, int count, off64_t at),              \
             (file, parts, count, at), (file, &cut, 1, at))                                                      \
    VECTORED(p##kind##v2, operation, (int file, const struct iovec *parts, int count, off_t at, int flags),      \
             (file, parts, count, at, flags), (file, &cut, 1, at, flags))                                        \
    VECTORED(p##kind##v64v2, operation, (int file, const struct iovec *parts, int count, off64_t at, int flags), \
             (file, parts, count, at, flags), (file, &cut, 1, at, flags))
VECTORED_KINDS(read, READ)
VECTORED_KINDS(write, WRITE)

/* -- everything else ----------------------------------------------------------------------------- */

#define ON_FILE(name, operation, parameters, arguments)                      \
    int name parameters                                                      \
    {                                                                        \
        HIDDEN(int, name)                                                    \
        return FAILS(operation, watched_file(file)) ? -1 : hidden arguments; \
    }
#define ON_PATH(name, operation, base, parameters, arguments)                      \
    int name parameters                                                            \
    {                                                                              \
        HIDDEN(int, name)                                                          \
        return FAILS(operation, watched_path(base, path)) ? -1 : hidden arguments; \
    }

/* Watched files are not really synced: that takes long, and a killed process loses nothing without it. */
#define SYNCING(name)                                                  \
    int name(int file)                                                 \
    {                                                                  \
        HIDDEN(int, name)                                              \
        const int watched = watched_file(file);                        \
        return FAILS(SYNC, watched) ? -1 : watched ? 0 : hidden(file); \
    }
SYNCING(fsync)
SYNCING(fdatasync)

ON_FILE(flock, LOCK, (int file, int how), (file, how))
ON_FILE(ftruncate, TRUNCATE, (int file, off_t n), (file, n))
ON_FILE(ftruncate64, TRUNCATE, (int file, off64_t n), (file, n))
ON_PATH(truncate, TRUNCATE, AT_FDCWD, (const char *path, off_t n), (path, n))
ON_PATH(truncate64, TRUNCATE, AT_FDCWD, (const char *path, off64_t n), (path, n))
ON_PATH(mkdir, MKDIR, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, MKDIR, base, (int base, const char *path, mode_t mode), (base, path, mode))
ON_PATH(unlink, UNLINK, AT_FDCWD, (const char *path), (path))
ON_PATH(rmdir, UNLINK, AT_FDCWD, (const char *path), (path))
ON_PATH(unlinkat, UNLINK, base, (int base, const char *path, int flags), (base, path, flags))
ON_PATH(rename, RENAME, AT_FDCWD, (const char *path, const char *to), (path, to))
ON_PATH(renameat, RENAME, base, (int base, const char *path, int to_base, const char *to), (base, path, to_base, to))
ON_PATH(renameat2, RENAME, base, (int base, const char *path, int to_base, const char *to, unsigned flags),
        (base, path, to_base, to, flags))
ON_PATH(stat, STAT, AT_FDCWD, (const char *path, struct stat *told), (path, told))
ON_PATH(stat64, STAT, AT_FDCWD, (const char *path, struct stat64 *told), (path, told))
ON_PATH(lstat, STAT, AT_FDCWD, (const char *path, struct stat *told), (path, told))
ON_PATH(lstat64, STAT, AT_FDCWD, (const char *path, struct stat64 *told), (path, told))
ON_FILE(fstat, STAT, (int file, struct stat *told), (file, told))
ON_FILE(fstat64, STAT, (int file, struct stat64 *told), (file, told))

#define ON_PATH_OR_FILE(name, parameters, arguments)                                  \
    int name parameters                                                               \
    {                                                                                 \
        HIDDEN(int, name)                                                             \
        return FAILS(STAT, watched_path_or_file(base, path)) ? -1 : hidden arguments; \
    }
ON_PATH_OR_FILE(fstatat, (int base, const char *path, struct stat *told, int flags), (base, path, told, flags))
ON_PATH_OR_FILE(fstatat64, (int base, const char *path, struct stat64 *told, int flags), (base, path, told, flags))
ON_PATH_OR_FILE(statx, (int base, const char *path, int flags, unsigned mask, struct statx *told),
                (base, path, flags, mask, told))

#define MAPPING(name, offset)                                                                      \
    void *name(void *address, size_t n, int protection, int flags, int file, offset at)            \
    {                                                                                              \
        HIDDEN(void *, name)                                                                       \
        const int watched = !(flags & MAP_ANONYMOUS) && watched_file(file);                        \
        return FAILS(MAP, watched) ? MAP_FAILED : hidden(address, n, protection, flags, file, at); \
    }
MAPPING(mmap, off_t)
MAPPING(mmap64, off64_t)
