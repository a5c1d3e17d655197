/*
 * The 9P server's operations on contents (see 9p.h, 9p_host.h): reading and writing, folders, locks, extended attributes.
 *
 * Only regular files and folders are ever opened, through the O_PATH descriptor that was looked at, so the kind cannot change in between. The data of
 * reads and writes goes straight between the host's file and the guest's memory.
 *
 * Locks. The guest's kernel has looked already whether its own programs agree; here it is about everybody else: the host's programs, other guests.
 * A program of the guest is known by its number, and has one descriptor per file, with an open-file-description lock (fcntl(2)), however often it has
 * opened the file: so it never waits for itself. Nothing here waits for a lock; the client asks again.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "back/9p_host.h"

#define READ_HEAD (P9_HEAD + 4)
#define DIRENT_HEAD (13 + 8 + 1 + 2)
#define OPEN_FLAGS (O_ACCMODE | O_TRUNC | O_APPEND | O_DSYNC | O_SYNC) /* that mean something here; their values are the protocol's */

/* --- opening --- */

static int open_again(const struct p9_fid *f, int flags)
{
    struct p9_proc name;
    int fd = open(p9_proc(&name, f->path), flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);

    if (fd < 0)
        return -errno;
    fcntl(fd, F_SETFL, flags & O_APPEND);                          /* O_NONBLOCK was for what is no file, and cannot be here */
    return fd;
}

static int may_open(const struct p9 *s, const struct p9_fid *f, u32 flags)
{
    if (f->kind != P9_FID_PATH)
        return -EINVAL;
    if (!S_ISREG(f->type) && !S_ISDIR(f->type))
        return S_ISLNK(f->type) ? -ELOOP : -ENXIO;
    if (s->readonly && ((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC)))
        return -EROFS;
    return 0;
}

int p9_op_lopen(struct p9_call *c)
{
    u32 id = p9_get32(c), flags = p9_get32(c);
    struct p9_fid *f;
    struct p9_qid q;
    struct stat st;
    int r = p9_fid_get(c, id, true, &f), fd;

    if (r < 0)
        return r;
    r = may_open(c->s, f, flags);
    if (r == 0)
        r = fd = open_again(f, S_ISDIR(f->type) ? O_RDONLY | O_DIRECTORY : (int)flags & OPEN_FLAGS);
    if (r >= 0 && fstat(fd, &st) < 0) {
        close(fd);
        r = -EIO;
    }
    if (r >= 0) {
        f->io = fd;
        f->kind = P9_FID_OPEN;
        p9_fid_qid(c->s, &st, &q);
        p9_put_qid(c, &q);
        p9_put32(c, 0);
        r = 0;
    }
    p9_fid_put(c->s, f);
    return r;
}

/* The fid was the folder's and is the new file's. */
static int create(struct p9_call *c, struct p9_fid *f, const char *name, u32 flags, u32 mode, u32 gid)
{
    int fd = openat(f->path, name, ((int)flags & (OPEN_FLAGS | O_EXCL)) | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, mode & 07777);
    struct stat made, opened;
    struct p9_qid q;
    int path;

    if (fd < 0)
        return -errno;
    path = p9_made(c, f, name, gid, &made);
    if (path < 0 || fstat(fd, &opened) < 0 || opened.st_ino != made.st_ino || opened.st_dev != made.st_dev || !S_ISREG(opened.st_mode)) {
        if (path >= 0)
            close(path);
        close(fd);
        return path < 0 ? path : -EEXIST;                          /* somebody else has put another one there meanwhile */
    }
    fcntl(fd, F_SETFL, (int)flags & O_APPEND);
    close(f->path);
    f->path = path;
    f->io = fd;
    f->type = S_IFREG;
    f->dev = made.st_dev;
    f->kind = P9_FID_OPEN;
    p9_fid_qid(c->s, &made, &q);
    p9_put_qid(c, &q);
    p9_put32(c, 0);
    return 0;
}

int p9_op_lcreate(struct p9_call *c)
{
    u32 id = p9_get32(c), flags, mode, gid;
    char name[P9_NAME_MAX + 1];
    struct p9_fid *f;
    struct stat st;
    int r = p9_get_name(c, name);

    flags = p9_get32(c);
    mode = p9_get32(c);
    gid = p9_get32(c);
    if (r == 0)
        r = p9_fid_get(c, id, true, &f);
    if (r < 0)
        return r;
    if (f->kind != P9_FID_PATH || !S_ISDIR(f->type))
        r = -ENOTDIR;
    else if (f->sealed)
        r = -EACCES;
    else if (!(flags & O_EXCL) && fstatat(f->path, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && !S_ISREG(st.st_mode))
        r = S_ISDIR(st.st_mode) ? -EISDIR : -EEXIST;               /* a FIFO is not to be opened */
    else
        r = create(c, f, name, flags, mode, gid);
    p9_fid_put(c->s, f);
    return r;
}

/* --- reading and writing --- */

static int read_value(struct p9_call *c, const struct p9_fid *f, u64 offset, u32 count)
{
    u32 n = offset >= f->value_len ? 0 : (u32)MIN((u64)count, f->value_len - offset);

    n = MIN(n, (u32)P9_REPLY_MAX - READ_HEAD);
    p9_put32(c, n);
    for (u32 i = 0; i < n; i++)
        p9_put8(c, f->value[offset + i]);
    return 0;
}

static int read_file(struct p9_call *c, const struct p9_fid *f, u64 offset, u32 count)
{
    struct iovec *iov = (struct iovec *)c->spare;
    u32 done = 0;

    while (done < count) {
        u64 len = count - done;
        unsigned n = p9_cut(c->req->in, c->req->ins, READ_HEAD + done, iov, IOV_MAX, &len);
        ssize_t got = n ? preadv(f->io, iov, (int)n, (off_t)(offset + done)) : 0;

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && !done)
            return -errno;
        if (got <= 0)
            break;
        done += (u32)got;
        if ((u64)got < len)
            break;
    }
    p9_put32(c, done);
    c->data = done;
    return 0;
}

int p9_op_read(struct p9_call *c)
{
    u32 id = p9_get32(c), count;
    u64 offset = p9_get64(c);
    struct p9_fid *f;
    int r;

    count = p9_get32(c);
    r = p9_fid_get(c, id, false, &f);
    if (r < 0)
        return r;
    count = MIN(count, c->room - READ_HEAD);
    if (f->kind == P9_FID_XATTR_GET)
        r = read_value(c, f, offset, count);
    else if (f->kind != P9_FID_OPEN)
        r = -EBADF;
    else if (!S_ISREG(f->type))
        r = -EISDIR;
    else if (offset > (u64)INT64_MAX - count)
        r = -EINVAL;
    else
        r = read_file(c, f, offset, count);
    p9_fid_put(c->s, f);
    return r;
}

static int write_value(struct p9_call *c, struct p9_fid *f, u64 offset, u32 count)
{
    if (offset > f->value_len || count > f->value_len - offset || offset > f->value_have)
        return -ENOSPC;
    if (!p9_take(&c->req->out, &c->req->outs, f->value + offset, count))
        return -EINVAL;
    f->value_have = MAX(f->value_have, (u32)offset + count);
    p9_put32(c, count);
    return 0;
}

static int write_file(struct p9_call *c, const struct p9_fid *f, u64 offset, u32 count)
{
    struct iovec *iov = (struct iovec *)c->spare;
    u32 done = 0;

    while (done < count) {
        u64 len = count - done;
        unsigned n = p9_cut(c->req->out, c->req->outs, done, iov, IOV_MAX, &len);
        ssize_t put = n ? pwritev(f->io, iov, (int)n, (off_t)(offset + done)) : 0;

        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && !done)
            return -errno;
        if (put <= 0)
            break;
        done += (u32)put;
    }
    if (done < count && !c->req->outs)
        return -EINVAL;
    p9_put32(c, done);
    return 0;
}

int p9_op_write(struct p9_call *c)
{
    u32 id = p9_get32(c), count;
    u64 offset = p9_get64(c), there = 0;
    struct p9_fid *f;
    int r;

    count = p9_get32(c);
    for (unsigned i = 0; i < c->req->outs; i++)
        there += c->req->out[i].iov_len;
    if (count > there)
        return -EINVAL;
    r = p9_fid_get(c, id, false, &f);
    if (r == 0 && f->kind == P9_FID_XATTR_SET) {                   /* which it stays */
        p9_fid_put(c->s, f);
        r = p9_fid_get(c, id, true, &f);
    }
    if (r < 0)
        return r;
    if (f->kind == P9_FID_XATTR_SET)
        r = write_value(c, f, offset, count);
    else if (f->kind != P9_FID_OPEN || !S_ISREG(f->type))
        r = -EBADF;
    else if (offset > (u64)INT64_MAX - count)
        r = -EFBIG;
    else
        r = write_file(c, f, offset, count);
    p9_fid_put(c->s, f);
    return r;
}

int p9_op_fsync(struct p9_call *c)
{
    u32 id = p9_get32(c), datasync = c->left >= 4 ? p9_get32(c) : 0;
    struct p9_fid *f;
    int r = p9_fid_get(c, id, false, &f);

    if (r < 0)
        return r;
    if (f->kind != P9_FID_OPEN)
        r = -EBADF;
    else if ((datasync ? fdatasync(f->io) : fsync(f->io)) < 0)
        r = -errno;
    p9_fid_put(c->s, f);
    return r;
}

/* --- folders --- */

/* One entry as the host's kernel tells it, into the reply. False: it does not fit. */
static bool put_entry(struct p9_call *c, const struct p9_fid *f, const struct dirent64 *d, u32 room)
{
    size_t len = strlen(d->d_name);
    struct stat st = { .st_dev = f->dev, .st_ino = d->d_ino, .st_mode = DTTOIF(d->d_type) };
    struct p9_qid q;

    if (c->len + DIRENT_HEAD + len > room || len > P9_NAME_MAX)
        return len > P9_NAME_MAX;
    p9_fid_qid(c->s, &st, &q);
    p9_put_qid(c, &q);
    p9_put64(c, (u64)d->d_off);
    p9_put8(c, d->d_type);
    p9_put_string(c, d->d_name, len);
    return true;
}

static int list(struct p9_call *c, struct p9_fid *f, u64 offset, u32 room)
{
    long n, at;
    bool fits = true;

    if (lseek(f->io, (off_t)offset, SEEK_SET) < 0)
        return -errno;
    while (fits && (n = syscall(SYS_getdents64, f->io, c->spare, MIN((u32)P9_REPLY_MAX, room))) != 0) {
        u32 before = c->len;

        if (n < 0 && before > READ_HEAD)
            break;
        if (n < 0)
            return errno == EINVAL ? -ENOBUFS : -errno;
        for (at = 0; at < n && fits;) {
            const struct dirent64 *d = (const struct dirent64 *)(c->spare + at);

            fits = put_entry(c, f, d, room);
            at += d->d_reclen;
        }
        if (!fits && c->len == READ_HEAD)
            return -ENOBUFS;
        if (room - c->len < DIRENT_HEAD + P9_NAME_MAX + 8)
            break;
    }
    return 0;
}

/* Entries from offset on, as many as fit: what does not is read again the next time, from the offset that the last one told. */
int p9_op_readdir(struct p9_call *c)
{
    u32 id = p9_get32(c), count;
    u64 offset = p9_get64(c);
    struct p9_fid *f;
    int r;

    count = p9_get32(c);
    r = p9_fid_get(c, id, true, &f);
    if (r < 0)
        return r;
    p9_put32(c, 0);
    if (f->kind != P9_FID_OPEN || !S_ISDIR(f->type))
        r = -EBADF;
    else if (!f->sealed)
        r = list(c, f, offset, READ_HEAD + MIN(count, MIN(c->room, (u32)P9_REPLY_MAX) - READ_HEAD));
    p9_fid_put(c->s, f);
    count = c->len - READ_HEAD;
    memcpy(c->reply + P9_HEAD, &count, sizeof(count));
    return r;
}

/* --- locks --- */

enum { WIRE_READ = 0, WIRE_WRITE = 1, WIRE_NONE = 2 };             /* types on the wire */
enum { WIRE_LOCKED = 0, WIRE_BLOCKED = 1 };

/* A program of the guest's and a file in which it has locks. */
struct p9_owner {
    struct p9_owner *next;
    dev_t dev;
    ino_t ino;
    u32 proc;
    int fd;
    unsigned refs;                                                 /* fids that have named it */
};

struct p9_locks {
    struct p9_locks *next;
    struct p9_owner *owner;
};

struct lock {
    u8 type;
    u64 start, length;
    u32 proc;
};

/* The fid's owner of locks of that number, or a new one. Under the server's lock. NULL: no memory, or fd (*e says). */
static struct p9_owner *owner_of(struct p9 *s, struct p9_fid *f, u32 proc, int *e)
{
    struct p9_locks *l = f->locks;
    struct p9_owner *o;
    struct stat st;

    while (l && l->owner->proc != proc)
        l = l->next;
    if (l)
        return l->owner;
    *e = fstat(f->path, &st) < 0 ? -errno : 0;
    for (o = *e ? NULL : s->owner; o && (o->proc != proc || o->dev != st.st_dev || o->ino != st.st_ino);)
        o = o->next;
    l = *e ? NULL : calloc(1, sizeof(*l));
    if (l && !o && (o = calloc(1, sizeof(*o)))) {
        *o = (struct p9_owner){ .next = s->owner, .dev = st.st_dev, .ino = st.st_ino, .proc = proc };
        o->fd = open_again(f, O_RDWR);
        if (o->fd < 0)
            o->fd = open_again(f, fcntl(f->io, F_GETFL) & O_ACCMODE);
        if (o->fd < 0) {
            *e = o->fd;
            free(o);
            o = NULL;
        } else {
            s->owner = o;
        }
    }
    if (!l || !o) {
        free(l);
        *e = *e ? *e : -ENOMEM;
        return NULL;
    }
    *l = (struct p9_locks){ .next = f->locks, .owner = o };
    f->locks = l;
    o->refs++;
    return o;
}

void p9_locks_drop(struct p9 *s, struct p9_fid *f)
{
    struct p9_locks *l, *next;

    for (l = f->locks; l; l = next) {
        struct p9_owner *o = l->owner, **p = &s->owner;

        next = l->next;
        free(l);
        if (--o->refs)
            continue;
        while (*p != o)
            p = &(*p)->next;
        *p = o->next;
        close(o->fd);                                              /* and its locks are gone */
        free(o);
    }
    f->locks = NULL;
}

static int to_flock(const struct lock *l, struct flock *fl)
{
    static const short type[] = { [WIRE_READ] = F_RDLCK, [WIRE_WRITE] = F_WRLCK, [WIRE_NONE] = F_UNLCK };

    if (l->type >= ARRAY_SIZE(type) || l->start > INT64_MAX || l->length > INT64_MAX - l->start)
        return -EINVAL;
    *fl = (struct flock){ .l_type = type[l->type], .l_whence = SEEK_SET, .l_start = (off_t)l->start, .l_len = (off_t)l->length };
    return 0;
}

/* -EAGAIN: somebody else has it. */
static int lock_call(struct p9 *s, struct p9_fid *f, const struct lock *l, int call, struct flock *fl)
{
    struct p9_owner *o;
    int r = to_flock(l, fl);

    if (r < 0)
        return r;
    if (f->kind != P9_FID_OPEN || !S_ISREG(f->type))
        return -EBADF;
    if (s->readonly && l->type == WIRE_WRITE)
        return -EROFS;
    pthread_mutex_lock(&s->lock);
    o = owner_of(s, f, l->proc, &r);
    if (o && fcntl(o->fd, call, fl) < 0)
        r = errno == EACCES ? -EAGAIN : -errno;
    pthread_mutex_unlock(&s->lock);
    return r;
}

int p9_op_lock(struct p9_call *c)
{
    u32 id = p9_get32(c);
    struct lock l = { .type = p9_get8(c) };
    struct flock fl;
    struct p9_fid *f;
    int r;

    p9_get32(c);                                                   /* to wait for it, or as it is recovered: the client's affair */
    l.start = p9_get64(c);
    l.length = p9_get64(c);
    l.proc = p9_get32(c);
    r = p9_fid_get(c, id, true, &f);
    if (r < 0)
        return r;
    r = lock_call(c->s, f, &l, F_OFD_SETLK, &fl);
    p9_fid_put(c->s, f);
    if (r < 0 && r != -EAGAIN)
        return r;
    p9_put8(c, r == 0 ? WIRE_LOCKED : WIRE_BLOCKED);
    return 0;
}

int p9_op_getlock(struct p9_call *c)
{
    u32 id = p9_get32(c);
    struct lock l = { .type = p9_get8(c) };
    struct flock fl;
    char client[P9_NAME_MAX + 1];
    struct p9_fid *f;
    int r;

    l.start = p9_get64(c);
    l.length = p9_get64(c);
    l.proc = p9_get32(c);
    r = p9_get_string(c, client, sizeof(client));
    if (r == 0)
        r = l.type == WIRE_NONE ? -EINVAL : p9_fid_get(c, id, true, &f);
    if (r < 0)
        return r;
    r = lock_call(c->s, f, &l, F_OFD_GETLK, &fl);
    p9_fid_put(c->s, f);
    if (r < 0)
        return r;
    if (fl.l_type != F_UNLCK) {
        l.start = (u64)fl.l_start;
        l.length = (u64)fl.l_len;
        l.proc = fl.l_pid > 0 ? (u32)fl.l_pid : 0;
    }
    p9_put8(c, fl.l_type == F_RDLCK ? WIRE_READ : fl.l_type == F_WRLCK ? WIRE_WRITE : WIRE_NONE);
    p9_put64(c, l.start);
    p9_put64(c, l.length);
    p9_put32(c, l.proc);
    p9_put_string(c, client, strlen(client));
    return 0;
}

/* --- extended attributes --- */

/* What the guest's programs have to do with; the rest (trusted, security) is the host's kernel's and its own affair. */
static bool xattr_known(const char *name)
{
    return !strncmp(name, "user.", 5) || !strcmp(name, "system.posix_acl_access") || !strcmp(name, "system.posix_acl_default");
}

/* Of a list of names (each with its NUL) those that are known; the length that is left. */
static u32 filter_names(char *names, u32 len)
{
    u32 kept = 0;

    for (u32 at = 0; at < len;) {
        u32 n = (u32)strnlen(names + at, len - at) + 1;

        if (at + n <= len && xattr_known(names + at)) {
            memmove(names + kept, names + at, n);
            kept += n;
        }
        at += n;
    }
    return kept;
}

/* The value of name, or the list of names, into the spare buffer; its length or a negative errno. */
static int fetch_xattr(struct p9_call *c, const struct p9_fid *f, const char *name)
{
    struct p9_proc path;
    ssize_t n;

    if (f->sealed)
        return -EOPNOTSUPP;
    if (*name && !xattr_known(name))
        return -EOPNOTSUPP;
    p9_proc(&path, f->path);
    n = *name ? getxattr(path.name, name, c->spare, P9_XATTR_MAX) : listxattr(path.name, (char *)c->spare, P9_XATTR_MAX);
    if (n < 0)
        return -errno;
    return *name ? (int)n : (int)filter_names((char *)c->spare, (u32)n);
}

int p9_op_xattrwalk(struct p9_call *c)
{
    u32 id = p9_get32(c), new_id = p9_get32(c);
    char name[P9_NAME_MAX + 1];
    struct p9_fid *f, *new;
    int r = p9_get_string(c, name, sizeof(name)), len, fd;

    if (r == 0)
        r = p9_fid_get(c, id, false, &f);
    if (r < 0)
        return r;
    r = len = fetch_xattr(c, f, name);
    if (r >= 0)
        r = fd = fcntl(f->path, F_DUPFD_CLOEXEC, 0);
    if (r >= 0)
        r = p9_fid_new(c->s, new_id, fd, f, &new);
    p9_fid_put(c->s, f);
    if (r < 0)
        return r;
    new->kind = P9_FID_XATTR_GET;
    new->value = malloc((size_t)len + 1);
    if (new->value) {
        memcpy(new->value, c->spare, (size_t)len);
        new->value_len = (u32)len;
        p9_put64(c, (u64)len);
    }
    r = new->value ? 0 : -ENOMEM;
    p9_fid_put(c->s, new);
    if (r < 0)
        p9_fid_clunk(c->s, new_id);
    return r;
}

int p9_op_xattrcreate(struct p9_call *c)
{
    u32 id = p9_get32(c), flags;
    char name[P9_NAME_MAX + 1];
    struct p9_fid *f;
    u64 size;
    int r = p9_get_string(c, name, sizeof(name));

    size = p9_get64(c);
    flags = p9_get32(c);
    if (r == 0 && !xattr_known(name))
        r = -EOPNOTSUPP;
    if (r == 0 && (size > P9_XATTR_MAX || (flags & ~(u32)(XATTR_CREATE | XATTR_REPLACE))))
        r = size > P9_XATTR_MAX ? -E2BIG : -EINVAL;
    if (r == 0)
        r = p9_fid_get(c, id, true, &f);
    if (r < 0)
        return r;
    if (f->kind != P9_FID_PATH) {
        r = -EINVAL;
    } else if (f->sealed) {
        r = -EACCES;
    } else {
        f->xattr = strdup(name);
        f->value = malloc(size + 1);
        f->value_len = (u32)size;
        f->xattr_flags = flags;
        f->kind = P9_FID_XATTR_SET;
        r = f->xattr && f->value ? 0 : -ENOMEM;
    }
    p9_fid_put(c->s, f);
    return r;
}

/* Linux's client removes an attribute by replacing it with nothing. A value of which not all has come is dropped. */
int p9_xattr_commit(struct p9 *s UNUSED, struct p9_fid *f)
{
    struct p9_proc path;
    int r;

    if (!f->xattr || !f->value || f->value_have < f->value_len)
        return -EINVAL;
    p9_proc(&path, f->path);
    if (!f->value_len && f->xattr_flags == XATTR_REPLACE)
        r = removexattr(path.name, f->xattr);
    else
        r = setxattr(path.name, f->xattr, f->value, f->value_len, (int)f->xattr_flags);
    return r < 0 ? -errno : 0;
}
