/* A disk that fails: preloaded into a process and its children, this fails writes below one folder with ENOSPC.
 *
 * The state beside the library is a file that all those processes map: it counts their writes, and says which fail.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* As tests/faults.py reads and writes it. full: from the first on everything fails that needs room. spared: files of
 * SQLite databases are neither counted nor failed. */
struct state {
    _Atomic unsigned long counted;
    unsigned long first;
    unsigned long full;
    unsigned long spared;
    char root[1024];
    char failed[1024];
};

static struct state *state;

static int system_open(const char *path, int flags) {
    static int (*next)(const char *, int, ...);
    if (!next) next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    return next(path, flags);
}

__attribute__((constructor)) static void begin(void) {
    Dl_info info;
    char path[PATH_MAX];
    if (!dladdr((void *)begin, &info)) return;
    snprintf(path, sizeof path, "%s.state", info.dli_fname);
    int file = system_open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return;
    void *there = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (there != MAP_FAILED) state = there;
}

/* Whether this write fails. needs_room: on a full disk; an open of a file that is there needs none. */
static int fails(const char *what, const char *path, int needs_room) {
    size_t length = strlen(state->root);
    if (strncmp(path, state->root, length) || (path[length] != '/' && path[length])) return 0;
    if (state->spared && strstr(path, ".db")) return 0;
    unsigned long number = atomic_fetch_add(&state->counted, 1) + 1;
    unsigned long first = state->first;
    if (!first || (state->full ? number < first || !needs_room : number != first)) return 0;
    if (!state->failed[0]) snprintf(state->failed, sizeof state->failed, "%s %s", what, path);
    errno = ENOSPC;
    return 1;
}

static int fails_at(const char *what, int folder, const char *path, int needs_room) {
    char whole[2 * PATH_MAX + 2], link[64];
    if (!state || !path) return 0;
    if (path[0] == '/') return fails(what, path, needs_room);
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, whole, PATH_MAX);
    if (length < 0) return 0;
    snprintf(whole + length, PATH_MAX, "/%s", path);
    return fails(what, whole, needs_room);
}

static int fails_on(const char *what, int file) {
    char path[PATH_MAX + 1], link[64];
    if (!state) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return fails(what, path, 1);
}

static int writes(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
}

static int makes(int folder, const char *path, int flags) {
    int before = errno, there = !faccessat(folder, path, F_OK, 0);
    errno = before;
    return !there || flags & O_TRUNC;
}

#define NEXT(result, name, ...)                                        \
    static result (*next)(__VA_ARGS__);                                \
    if (!next) next = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);

#define MODE                                                                                \
    mode_t mode = 0;                                                                        \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                              \
        va_list more;                                                                       \
        va_start(more, flags);                                                              \
        mode = va_arg(more, mode_t);                                                        \
        va_end(more);                                                                       \
    }

#define OPEN(name)                                                                                              \
    int name(const char *path, int flags, ...) {                                                                \
        NEXT(int, name, const char *, int, ...)                                                                 \
        MODE                                                                                                    \
        if (writes(flags) && fails_at("open", AT_FDCWD, path, makes(AT_FDCWD, path, flags))) return -1;         \
        return next(path, flags, mode);                                                                         \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                            \
    int name(int folder, const char *path, int flags, ...) {                                                    \
        NEXT(int, name, int, const char *, int, ...)                                                            \
        MODE                                                                                                    \
        if (writes(flags) && fails_at("open", folder, path, makes(folder, path, flags))) return -1;             \
        return next(folder, path, flags, mode);                                                                 \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name)                                                        \
    int name(const char *path, mode_t mode) {                              \
        NEXT(int, name, const char *, mode_t)                              \
        return fails_at("open", AT_FDCWD, path, 1) ? -1 : next(path, mode); \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name)                                                                                          \
    FILE *name(const char *path, const char *mode) {                                                         \
        NEXT(FILE *, name, const char *, const char *)                                                       \
        int flags = mode[0] == 'w' ? O_TRUNC : 0;                                                            \
        if (strpbrk(mode, "wa+") && fails_at("open", AT_FDCWD, path, makes(AT_FDCWD, path, flags))) return NULL; \
        return next(path, mode);                                                                             \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define ON_FILE(result, name, what, parameters, types, ...) \
    result name parameters {                                \
        NEXT(result, name, types)                           \
        return fails_on(what, file) ? -1 : next(__VA_ARGS__); \
    }
#define TYPES(...) __VA_ARGS__
ON_FILE(ssize_t, write, "write", (int file, const void *data, size_t size), TYPES(int, const void *, size_t), file, data, size)
ON_FILE(ssize_t, pwrite, "write", (int file, const void *data, size_t size, off_t at),
        TYPES(int, const void *, size_t, off_t), file, data, size, at)
ON_FILE(ssize_t, pwrite64, "write", (int file, const void *data, size_t size, off64_t at),
        TYPES(int, const void *, size_t, off64_t), file, data, size, at)
ON_FILE(ssize_t, writev, "write", (int file, const struct iovec *parts, int count),
        TYPES(int, const struct iovec *, int), file, parts, count)
ON_FILE(ssize_t, pwritev, "write", (int file, const struct iovec *parts, int count, off_t at),
        TYPES(int, const struct iovec *, int, off_t), file, parts, count, at)
ON_FILE(ssize_t, pwritev64, "write", (int file, const struct iovec *parts, int count, off64_t at),
        TYPES(int, const struct iovec *, int, off64_t), file, parts, count, at)
ON_FILE(ssize_t, sendfile, "write", (int file, int from, off_t *at, size_t size), TYPES(int, int, off_t *, size_t), file,
        from, at, size)
ON_FILE(ssize_t, sendfile64, "write", (int file, int from, off64_t *at, size_t size), TYPES(int, int, off64_t *, size_t),
        file, from, at, size)
ON_FILE(ssize_t, copy_file_range, "write",
        (int from, off64_t *start, int file, off64_t *at, size_t size, unsigned flags),
        TYPES(int, off64_t *, int, off64_t *, size_t, unsigned), from, start, file, at, size, flags)
ON_FILE(int, fsync, "fsync", (int file), TYPES(int), file)
ON_FILE(int, fdatasync, "fsync", (int file), TYPES(int), file)
ON_FILE(int, ftruncate, "write", (int file, off_t size), TYPES(int, off_t), file, size)
ON_FILE(int, ftruncate64, "write", (int file, off64_t size), TYPES(int, off64_t), file, size)
ON_FILE(int, fallocate, "write", (int file, int mode, off_t at, off_t size), TYPES(int, int, off_t, off_t), file, mode, at,
        size)
ON_FILE(int, fallocate64, "write", (int file, int mode, off64_t at, off64_t size), TYPES(int, int, off64_t, off64_t),
        file, mode, at, size)

#define PREALLOCATE(name, type)                                      \
    int name(int file, type at, type size) {                         \
        NEXT(int, name, int, type, type)                             \
        return fails_on("write", file) ? ENOSPC : next(file, at, size); \
    }
PREALLOCATE(posix_fallocate, off_t)
PREALLOCATE(posix_fallocate64, off64_t)

int mkdir(const char *path, mode_t mode) {
    NEXT(int, mkdir, const char *, mode_t)
    return fails_at("mkdir", AT_FDCWD, path, makes(AT_FDCWD, path, 0)) ? -1 : next(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    NEXT(int, mkdirat, int, const char *, mode_t)
    return fails_at("mkdir", folder, path, makes(folder, path, 0)) ? -1 : next(folder, path, mode);
}

#define TWO_PATHS(name, what)                                              \
    int name(const char *old, const char *new) {                           \
        NEXT(int, name, const char *, const char *)                        \
        return fails_at(what, AT_FDCWD, new, 1) ? -1 : next(old, new);     \
    }
TWO_PATHS(rename, "rename")
TWO_PATHS(link, "link")
TWO_PATHS(symlink, "link")

int renameat(int from, const char *old, int to, const char *new) {
    NEXT(int, renameat, int, const char *, int, const char *)
    return fails_at("rename", to, new, 1) ? -1 : next(from, old, to, new);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    NEXT(int, renameat2, int, const char *, int, const char *, unsigned)
    return fails_at("rename", to, new, 1) ? -1 : next(from, old, to, new, flags);
}
int linkat(int from, const char *old, int to, const char *new, int flags) {
    NEXT(int, linkat, int, const char *, int, const char *, int)
    return fails_at("link", to, new, 1) ? -1 : next(from, old, to, new, flags);
}
int symlinkat(const char *old, int to, const char *new) {
    NEXT(int, symlinkat, const char *, int, const char *)
    return fails_at("link", to, new, 1) ? -1 : next(old, to, new);
}
