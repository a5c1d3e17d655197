/*
 * Trees of files as streams (tree.h). Descriptors of folders are the only way down and up: paths are never put together.
 *
 * Nothing here knows doppel: it is compiled into the agent as well.
 */
#define _GNU_SOURCE
#include "back/tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define HOLE_MIN 4096                                              /* what file systems leave out is that large at least */

/* The first thing that goes wrong is what is told. */
static void failed(struct tree_result *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void failed(struct tree_result *r, const char *fmt, ...)
{
    va_list ap;

    if (r->failed++)
        return;
    va_start(ap, fmt);
    vsnprintf(r->text, sizeof(r->text), fmt, ap);
    va_end(ap);
}

bool tree_put(int fd, const void *buf, size_t len)
{
    const char *p = buf;

    while (len) {
        ssize_t n = send(fd, p, len, MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

bool tree_get(int fd, void *buf, size_t len)
{
    char *p = buf;

    while (len) {
        ssize_t n = recv(fd, p, len, 0);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

/* ---- sending ---- */

struct sender {
    int fd;
    bool stop;                                                     /* the connection broke, or the other side has said its last word */
    struct tree_result *own;
    char buf[TREE_PIECE_MAX];
};

static void send_bytes(struct sender *s, const void *buf, size_t len)
{
    if (!s->stop && !tree_put(s->fd, buf, len))
        s->stop = true;
}

static bool answered(struct sender *s)
{
    struct pollfd p = { .fd = s->fd, .events = POLLIN };

    if (!s->stop && poll(&p, 1, 0) > 0)
        s->stop = true;
    return s->stop;
}

static void send_record(struct sender *s, enum tree_kind kind, uint32_t mode, const char *name)
{
    struct tree_record r = { .kind = kind, .mode = mode & 07777, .name_len = (uint32_t)strlen(name) };

    send_bytes(s, &r, sizeof(r));
    send_bytes(s, name, r.name_len);
}

static void send_piece(struct sender *s, const void *buf, uint32_t len)
{
    send_bytes(s, &len, sizeof(len));
    if (len != TREE_LOST)
        send_bytes(s, buf, len);
}

static void send_file(struct sender *s, int fd, const char *name, uint32_t mode)
{
    ssize_t n = 0;

    send_record(s, TREE_FILE, mode, name);
    while (!answered(s) && (n = read(fd, s->buf, sizeof(s->buf))) > 0)
        send_piece(s, s->buf, (uint32_t)n);
    if (n < 0)
        failed(s->own, "%s: cannot be read: %s", name, strerror(errno));
    send_piece(s, NULL, n < 0 ? TREE_LOST : 0);
}

static void send_entry(struct sender *s, int dir, const char *from, const char *name, bool recursive, unsigned depth);

static void send_folder(struct sender *s, int fd, const char *name, uint32_t mode, unsigned depth)
{
    DIR *d = fdopendir(fd);
    struct dirent *e;

    if (!d) {
        close(fd);
        failed(s->own, "%s: %s", name, strerror(errno));
        return;
    }
    send_record(s, TREE_DIR, mode, name);
    errno = 0;
    while (!answered(s) && (e = readdir(d))) {
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            send_entry(s, dirfd(d), e->d_name, e->d_name, true, depth + 1);
        errno = 0;
    }
    if (errno && !s->stop)
        failed(s->own, "%s: cannot be read: %s", name, strerror(errno));
    send_record(s, TREE_UP, 0, "");
    closedir(d);
}

static void send_link(struct sender *s, int dir, const char *from, const char *name)
{
    ssize_t n = readlinkat(dir, from, s->buf, TREE_LINK_MAX + 1);

    if (n <= 0 || n > TREE_LINK_MAX) {
        failed(s->own, "%s: a link that cannot be read", name);
        return;
    }
    send_record(s, TREE_LINK, 0777, name);
    send_piece(s, s->buf, (uint32_t)n);
}

/* What lies at `from` in the folder, called `name` over there. */
static void send_entry(struct sender *s, int dir, const char *from, const char *name, bool recursive, unsigned depth)
{
    struct stat st;
    int fd, flags = recursive ? O_NOFOLLOW : 0;

    if (fstatat(dir, from, &st, recursive ? AT_SYMLINK_NOFOLLOW : 0) < 0) {
        failed(s->own, "%s: %s", from, strerror(errno));
        return;
    }
    if (S_ISLNK(st.st_mode)) {
        send_link(s, dir, from, name);
        return;
    }
    if (!S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) {
        failed(s->own, "%s: neither a file, a folder nor a link; left out", from);
        return;
    }
    if (S_ISDIR(st.st_mode) && (!recursive || depth >= TREE_DEPTH_MAX)) {
        failed(s->own, recursive ? "%s: too deep; left out" : "%s: a folder; give -r", from);
        return;
    }
    fd = openat(dir, from, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | flags);
    if (fd < 0 || fstat(fd, &st) < 0) {
        failed(s->own, "%s: %s", from, strerror(errno));
    } else if (S_ISDIR(st.st_mode)) {
        send_folder(s, fd, name, st.st_mode, depth);
        return;
    } else if (S_ISREG(st.st_mode)) {                              /* it may have been replaced since */
        send_file(s, fd, name, st.st_mode);
    }
    if (fd >= 0)
        close(fd);
}

bool tree_last_name(const char *path, char name[TREE_NAME_MAX + 1])
{
    size_t len = strlen(path);

    while (len && path[len - 1] == '/')
        len--;
    size_t start = len;
    while (start && path[start - 1] != '/')
        start--;
    if (len - start > TREE_NAME_MAX)
        return false;
    memcpy(name, path + start, len - start);
    name[len - start] = '\0';
    return *name && strcmp(name, ".") && strcmp(name, "..");
}

/* However the path is written. */
static bool real_name(const char *path, char name[TREE_NAME_MAX + 1])
{
    char whole[PATH_MAX];

    return tree_last_name(path, name) || (realpath(path, whole) && tree_last_name(whole, name));
}

int tree_send(int fd, const char *path, bool recursive, struct tree_result *own, struct tree_result *result)
{
    struct sender *s = malloc(sizeof(*s));
    char name[TREE_NAME_MAX + 1];

    memset(own, 0, sizeof(*own));
    memset(result, 0, sizeof(*result));
    if (!s || !real_name(path, name)) {
        failed(own, s ? "%s: has no name to be copied under" : "%s: no memory", path);
        free(s);
        return 0;
    }
    s->fd = fd;
    s->stop = false;
    s->own = own;
    send_entry(s, AT_FDCWD, path, name, recursive, 0);
    send_record(s, TREE_END, 0, "");
    free(s);
    if (!tree_get(fd, result, sizeof(*result)))
        return -1;
    result->text[sizeof(result->text) - 1] = '\0';
    return 0;
}

/* ---- receiving ---- */

#define KEEP_MODE UINT32_MAX                                       /* of a folder that was there */

struct receiver {
    int fd;
    uint32_t mask;
    struct tree_result *r;
    bool told;                                                     /* the result was sent */
    bool begun;                                                    /* the outermost level has its one record */
    unsigned depth, serial;
    int dir[TREE_DEPTH_MAX + 1];                                   /* -1: what is in there is dropped */
    uint32_t mode[TREE_DEPTH_MAX + 1];
    char first[TREE_NAME_MAX + 1];                                 /* the name of the outermost, if it is not the sender's to say; else "" */
    char buf[TREE_PIECE_MAX];
};

/* Told at once, so that the sender need not send the rest. */
static void tell(struct receiver *v)
{
    if (v->told)
        return;
    v->told = true;
    tree_put(v->fd, v->r, sizeof(*v->r));
}

static bool good_name(const char *name, size_t len)
{
    return len && len <= TREE_NAME_MAX && !memchr(name, '/', len) && !memchr(name, '\0', len) && strcmp(name, ".") && strcmp(name, "..");
}

static void temporary(struct receiver *v, char name[64])
{
    snprintf(name, 64, ".doppel-cp-%d-%u", (int)getpid(), v->serial++);
}

/* Gives what was made under the temporary name its own. Folders are not replaced. */
static void settle(struct receiver *v, int dir, const char *from, const char *name)
{
    if (renameat(dir, from, dir, name) == 0)
        return;
    failed(v->r, "%s: cannot be made: %s", name, strerror(errno));
    unlinkat(dir, from, 0);
}

static bool write_all(int fd, const char *p, size_t len)
{
    while (len) {
        ssize_t n = write(fd, p, len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

static bool zeroes(const char *p, size_t len)
{
    return !*p && !memcmp(p, p + 1, len - 1);
}

/* The length of the blocks that p begins with and that are zeroes, or that are not. */
static size_t alike(const char *p, size_t len, off_t at, bool *hole)
{
    size_t n = 0;

    while (n < len) {
        size_t block = HOLE_MIN - (size_t)(at + (off_t)n) % HOLE_MIN;
        bool zero;

        if (block > len - n)
            block = len - n;
        zero = zeroes(p + n, block);
        if (n && zero != *hole)
            break;
        *hole = zero;
        n += block;
    }
    return n;
}

/* A piece at *at: blocks of zeroes are left out, so that holes (which are sent as zeroes) take no room here either. */
static bool write_piece(int out, const char *p, size_t len, off_t *at)
{
    while (len) {
        bool hole = false;
        size_t n = alike(p, len, *at, &hole);

        if (hole ? lseek(out, (off_t)n, SEEK_CUR) < 0 : !write_all(out, p, n))
            return false;
        p += n;
        len -= n;
        *at += (off_t)n;
    }
    return true;
}

/* The pieces of a file; out -1: they are dropped. 1: whole; 0: not; -1: the connection broke. */
static int take_pieces(struct receiver *v, int out, const char *name)
{
    uint32_t len;
    off_t at = 0;
    bool good = out >= 0;

    for (;;) {
        if (!tree_get(v->fd, &len, sizeof(len)))
            return -1;
        if (len == 0 && good && ftruncate(out, at) < 0) {          /* it may end in a hole */
            failed(v->r, "%s: cannot be written: %s", name, strerror(errno));
            good = false;
        }
        if (len == 0 || len == TREE_LOST)
            return good && len == 0;
        if (len > TREE_PIECE_MAX || !tree_get(v->fd, v->buf, len))
            return -1;
        if (good && !write_piece(out, v->buf, len, &at)) {
            failed(v->r, "%s: cannot be written: %s", name, strerror(errno));
            tell(v);
            good = false;
        }
    }
}

static int take_file(struct receiver *v, const char *name, uint32_t mode)
{
    int dir = v->dir[v->depth], out = -1, r;
    char temp[64];

    temporary(v, temp);
    if (dir != -1)
        out = openat(dir, temp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (dir != -1 && out < 0) {
        failed(v->r, "%s: cannot be made: %s", name, strerror(errno));
        tell(v);
    }
    r = take_pieces(v, out, name);
    if (out < 0)
        return r < 0 ? -1 : 0;
    if (r > 0 && fchmod(out, mode & v->mask) < 0) {
        failed(v->r, "%s: %s", name, strerror(errno));
        r = 0;
    }
    if (close(out) < 0 && r > 0) {
        failed(v->r, "%s: cannot be written: %s", name, strerror(errno));
        r = 0;
    }
    if (r > 0)
        settle(v, dir, temp, name);
    else
        unlinkat(dir, temp, 0);
    return r < 0 ? -1 : 0;
}

static int take_link(struct receiver *v, const char *name)
{
    int dir = v->dir[v->depth];
    char temp[64];
    uint32_t len;

    if (!tree_get(v->fd, &len, sizeof(len)) || !len || len > TREE_LINK_MAX || !tree_get(v->fd, v->buf, len) || memchr(v->buf, '\0', len))
        return -1;
    v->buf[len] = '\0';
    if (dir == -1)
        return 0;
    temporary(v, temp);
    if (symlinkat(v->buf, dir, temp) < 0)
        failed(v->r, "%s: cannot be made: %s", name, strerror(errno));
    else
        settle(v, dir, temp, name);
    return 0;
}

static int enter(struct receiver *v, const char *name, uint32_t mode)
{
    int dir = v->dir[v->depth], fd = -1;

    if (v->depth == TREE_DEPTH_MAX)
        return -1;
    if (dir != -1) {
        int made = mkdirat(dir, name, 0700);

        if (made < 0)
            mode = KEEP_MODE;
        if (made == 0 || errno == EEXIST)
            fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (fd < 0)
            failed(v->r, "%s: cannot be made: %s", name, strerror(errno));
    }
    v->depth++;
    v->dir[v->depth] = fd;
    v->mode[v->depth] = mode;
    return 0;
}

static int leave(struct receiver *v)
{
    int fd;

    if (!v->depth)
        return -1;
    fd = v->dir[v->depth];
    if (fd >= 0) {
        if (v->mode[v->depth] != KEEP_MODE && fchmod(fd, v->mode[v->depth] & v->mask) < 0)
            failed(v->r, "a folder's mode: %s", strerror(errno));
        close(fd);
    }
    v->depth--;
    return 0;
}

/* 1: that was the end; 0; -1: the connection broke, or brings nonsense. */
static int take_record(struct receiver *v)
{
    struct tree_record h;
    char name[TREE_NAME_MAX + 1];

    if (!tree_get(v->fd, &h, sizeof(h)) || h.name_len > TREE_NAME_MAX || !tree_get(v->fd, name, h.name_len))
        return -1;
    name[h.name_len] = '\0';
    if (h.kind == TREE_END)
        return v->depth ? -1 : 1;
    if (h.kind == TREE_UP)
        return leave(v);
    if (!good_name(name, h.name_len) || (!v->depth && v->begun))
        return -1;
    v->begun = true;
    if (!v->depth && v->first[0])
        snprintf(name, sizeof(name), "%s", v->first);
    switch (h.kind) {
    case TREE_FILE: return take_file(v, name, h.mode);
    case TREE_LINK: return take_link(v, name);
    case TREE_DIR: return enter(v, name, h.mode);
    default: return -1;
    }
}

/* Into a folder, or beside others under its own name. */
static int open_place(struct receiver *v, const char *path, const char *name)
{
    char parent[PATH_MAX];
    size_t len = strlen(path), start;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (fd >= 0 && name)
        snprintf(v->first, sizeof(v->first), "%s", name);
    if (fd >= 0 || (errno != ENOENT && errno != ENOTDIR) || !len || len >= sizeof(parent) || path[len - 1] == '/')
        return fd;
    for (start = len; start && path[start - 1] != '/'; start--)
        ;
    if (!good_name(path + start, len - start)) {
        errno = len - start > TREE_NAME_MAX ? ENAMETOOLONG : ENOENT;
        return -1;
    }
    memcpy(v->first, path + start, len - start + 1);
    snprintf(parent, sizeof(parent), "%.*s", start ? (int)start : 1, start ? path : ".");
    return open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

int tree_receive(int fd, const char *path, const char *name, uint32_t mode_mask, struct tree_result *result)
{
    struct receiver *v = calloc(1, sizeof(*v));
    int r = 0;

    memset(result, 0, sizeof(*result));
    if (!v)
        return -1;
    v->fd = fd;
    v->mask = mode_mask;
    v->r = result;
    v->dir[0] = open_place(v, path, name);
    if (v->dir[0] < 0) {
        failed(result, "%s: %s", path, strerror(errno));
        tell(v);
    }
    while (r == 0)
        r = take_record(v);
    while (v->depth)
        leave(v);
    if (v->dir[0] >= 0)
        close(v->dir[0]);
    if (r > 0)
        tell(v);
    free(v);
    return r < 0 ? -1 : 0;
}
