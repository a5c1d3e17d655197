/*
 * The 9P server's operations on names and attributes (see 9p.h, 9p_host.h).
 *
 * A file is looked at through its O_PATH descriptor only, which neither opens it nor follows it if it is a link; what needs a name (chmod, link,
 * extended attributes) gets "/proc/self/fd/N". So there is no moment between a check and a use in which a name could come to mean something else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "back/9p_host.h"

#define WALK_MAX 16                                                /* names in one message */
#define DEPTH_MAX 4096
#define V9FS_MAGIC_TYPE 0x01021997u
#define GETATTR_BASIC 0x7ffull                                     /* mode to blocks */
#define REMOVEDIR 0x200u                                           /* AT_REMOVEDIR on the wire */

enum {
    SET_MODE = 1, SET_UID = 2, SET_GID = 4, SET_SIZE = 8, SET_ATIME = 16, SET_MTIME = 32, SET_CTIME = 64, SET_ATIME_TO = 128, SET_MTIME_TO = 256
};

const char *p9_proc(struct p9_proc *p, int fd)
{
    snprintf(p->name, sizeof(p->name), "/proc/self/fd/%d", fd);
    return p->name;
}

/* --- whose files --- */

u32 p9_to_guest_uid(const struct p9 *s, u32 uid)
{
    return !s->owners && uid == s->uid ? 0 : uid;
}

u32 p9_to_guest_gid(const struct p9 *s, u32 gid)
{
    return !s->owners && gid == s->gid ? 0 : gid;
}

u32 p9_to_host_uid(const struct p9 *s, u32 uid)
{
    return !s->owners && uid == 0 ? s->uid : uid;
}

u32 p9_to_host_gid(const struct p9 *s, u32 gid)
{
    return !s->owners && gid == 0 ? s->gid : gid;
}

/* --- files --- */

/* Inode numbers of several file systems below the folder are kept apart as far as 64 bits allow. */
void p9_fid_qid(const struct p9 *s, const struct stat *st, struct p9_qid *q)
{
    u64 other = st->st_dev == s->dev ? 0 : (u64)(st->st_dev ^ s->dev) * 0x9e3779b97f4a7c15ull;

    q->type = S_ISDIR(st->st_mode) ? P9_QID_DIR : S_ISLNK(st->st_mode) ? P9_QID_SYMLINK : P9_QID_FILE;
    q->version = (u32)(st->st_mtim.tv_sec ^ st->st_mtim.tv_nsec ^ (st->st_size << 8));
    q->path = st->st_ino ^ other;
}

/* What the host's kernel shows of itself: /proc/PID/mem of doppel is no file to give away. */
static bool kernel_view(int fd)
{
    static const u32 kinds[] = {
        PROC_SUPER_MAGIC, SYSFS_MAGIC, DEBUGFS_MAGIC, TRACEFS_MAGIC, SECURITYFS_MAGIC, SELINUX_MAGIC, SMACK_MAGIC, CGROUP_SUPER_MAGIC,
        CGROUP2_SUPER_MAGIC, BPF_FS_MAGIC, PSTOREFS_MAGIC, EFIVARFS_MAGIC, NSFS_MAGIC, DEVPTS_SUPER_MAGIC, BINFMTFS_MAGIC,
        0x07655821u /* resctrl */, 0x62656570u /* configfs */, 0x65735543u /* fusectl */, 0x19800202u /* mqueue */,
    };
    struct statfs st;

    if (fstatfs(fd, &st) < 0)
        return true;
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++)
        if ((u32)st.f_type == kinds[i])
            return true;
    return false;
}

/* Is the folder fd the root, or below it? */
static bool below_root(const struct p9 *s, int fd)
{
    struct stat st, up;
    int at = dup(fd);
    bool found = false;

    if (at < 0 || fstat(at, &st) < 0)
        st = (struct stat){ .st_ino = 0 };
    for (unsigned depth = 0; at >= 0 && depth < DEPTH_MAX; depth++) {
        int next;

        found = st.st_dev == s->dev && st.st_ino == s->ino;
        if (found)
            break;
        next = openat(at, "..", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        close(at);
        at = next;
        if (at < 0 || fstat(at, &up) < 0 || (up.st_dev == st.st_dev && up.st_ino == st.st_ino))
            break;
        st = up;
    }
    if (at >= 0)
        close(at);
    return found;
}

/* The folder above; the host may have moved fd out of the shared folder meanwhile. */
static int walk_up(const struct p9 *s, int fd, const struct stat *st)
{
    int up;

    if (st->st_dev == s->dev && st->st_ino == s->ino)
        up = openat(s->root, ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    else
        up = openat(fd, "..", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (up >= 0 && !below_root(s, up)) {
        close(up);
        errno = ENOENT;
        return -1;
    }
    return up;
}

/* A state of a walk. */
struct place {
    int fd;                                                        /* O_PATH */
    struct stat st;
    bool sealed;
};

/* One step on; the old descriptor is closed unless it is keep. A negative errno: p is as it was. */
static int step(const struct p9 *s, struct place *p, const char *name, int keep)
{
    struct place next;

    if (!S_ISDIR(p->st.st_mode))
        return -ENOTDIR;
    if (p->sealed && strcmp(name, ".."))
        return -ENOENT;
    if (!strcmp(name, ".."))
        next.fd = walk_up(s, p->fd, &p->st);
    else
        next.fd = openat(p->fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (next.fd < 0)
        return -errno;
    if (fstat(next.fd, &next.st) < 0) {
        close(next.fd);
        return -EIO;
    }
    next.sealed = next.st.st_dev == p->st.st_dev ? p->sealed : kernel_view(next.fd);
    if (p->fd != keep)
        close(p->fd);
    *p = next;
    return 0;
}

static void place_fid(struct p9_fid *f, const struct place *p)
{
    f->type = p->st.st_mode & S_IFMT;
    f->dev = p->st.st_dev;
    f->sealed = p->sealed;
}

/* aname: a folder below the shared one, or nothing. */
int p9_op_attach(struct p9_call *c)
{
    struct p9 *s = c->s;
    u32 id = p9_get32(c), uid;
    struct place p = { .fd = -1 };
    struct p9_fid like = { .id = 0 };
    struct p9_qid q;
    char name[PATH_MAX], *save = NULL;
    int r;

    p9_get32(c);                                                   /* afid */
    r = p9_get_string(c, name, sizeof(name));
    if (r == 0)
        r = p9_get_string(c, name, sizeof(name));
    uid = p9_get32(c);
    if (r < 0 || c->bad)
        return r < 0 ? r : -EINVAL;
    p.fd = openat(s->root, ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (p.fd < 0 || fstat(p.fd, &p.st) < 0)
        r = -errno;
    for (char *w = strtok_r(name, "/", &save); r == 0 && w; w = strtok_r(NULL, "/", &save))
        if (strcmp(w, "."))
            r = step(s, &p, w, -1);
    if (r < 0) {
        if (p.fd >= 0)
            close(p.fd);
        return r;
    }
    place_fid(&like, &p);
    like.uid = uid;
    p9_fid_qid(s, &p.st, &q);
    p9_put_qid(c, &q);
    return p9_fid_new(s, id, p.fd, &like, NULL);
}

static int walk(struct p9_call *c, const struct p9_fid *from, struct place *p, u16 names)
{
    char name[P9_NAME_MAX + 1];
    struct p9_qid q[WALK_MAX];
    u16 n = 0;
    int r = 0;

    for (; n < names; n++) {
        r = p9_get_string(c, name, sizeof(name));
        if (r == 0 && strcmp(name, "..") && (strchr(name, '/') || !*name || !strcmp(name, ".")))
            r = -EINVAL;
        if (r == 0)
            r = step(c->s, p, name, from->path);
        if (r < 0)
            break;
        p9_fid_qid(c->s, &p->st, &q[n]);
    }
    if (names && !n)
        return r;
    p9_put16(c, n);
    for (u16 i = 0; i < n; i++)
        p9_put_qid(c, &q[i]);
    return n < names;                                              /* a part of the way: no new fid, and no error */
}

int p9_op_walk(struct p9_call *c)
{
    u32 id = p9_get32(c), new = p9_get32(c);
    u16 names = p9_get16(c);
    struct p9_fid *f;
    struct place p;
    int r = names > WALK_MAX ? -EINVAL : p9_fid_get(c, id, new == id, &f);

    if (r < 0)
        return r;
    p = (struct place){ .fd = f->path, .sealed = f->sealed };
    if (f->kind != P9_FID_PATH && names)
        r = -EINVAL;
    else
        r = fstat(f->path, &p.st) < 0 ? -errno : walk(c, f, &p, names);
    if (r == 0 && new == id) {
        if (p.fd != f->path) {
            close(f->path);
            f->path = p.fd;
            place_fid(f, &p);
        }
    } else if (r == 0) {
        struct p9_fid like = { .uid = f->uid };
        int fd = p.fd != f->path ? p.fd : fcntl(f->path, F_DUPFD_CLOEXEC, 0);

        place_fid(&like, &p);
        r = fd < 0 ? -errno : p9_fid_new(c->s, new, fd, &like, NULL);
    } else if (p.fd != f->path) {
        close(p.fd);
    }
    p9_fid_put(c->s, f);
    return r > 0 ? 0 : r;
}

/* --- attributes --- */

int p9_op_statfs(struct p9_call *c)
{
    struct p9_fid *f;
    struct statfs st;
    int r = p9_fid_get(c, p9_get32(c), false, &f);

    if (r < 0)
        return r;
    if (fstatfs(f->path, &st) < 0)
        r = -errno;
    p9_fid_put(c->s, f);
    if (r < 0)
        return r;
    p9_put32(c, V9FS_MAGIC_TYPE);
    p9_put32(c, (u32)st.f_bsize);
    p9_put64(c, st.f_blocks);
    p9_put64(c, st.f_bfree);
    p9_put64(c, st.f_bavail);
    p9_put64(c, st.f_files);
    p9_put64(c, st.f_ffree);
    p9_put64(c, (u32)st.f_fsid.__val[0] | (u64)(u32)st.f_fsid.__val[1] << 32);
    p9_put32(c, MIN((u32)st.f_namelen, (u32)P9_NAME_MAX));
    return 0;
}

static void put_time(struct p9_call *c, const struct timespec *t)
{
    p9_put64(c, (u64)t->tv_sec);
    p9_put64(c, (u64)t->tv_nsec);
}

int p9_op_getattr(struct p9_call *c)
{
    struct p9_fid *f;
    struct p9_qid q;
    struct stat st;
    int r = p9_fid_get(c, p9_get32(c), false, &f);

    if (r < 0)
        return r;
    if (fstat(f->path, &st) < 0)
        r = -errno;
    p9_fid_put(c->s, f);
    if (r < 0)
        return r;
    p9_fid_qid(c->s, &st, &q);
    p9_put64(c, GETATTR_BASIC);
    p9_put_qid(c, &q);
    p9_put32(c, st.st_mode);
    p9_put32(c, p9_to_guest_uid(c->s, st.st_uid));
    p9_put32(c, p9_to_guest_gid(c->s, st.st_gid));
    p9_put64(c, st.st_nlink);
    p9_put64(c, st.st_rdev);
    p9_put64(c, (u64)st.st_size);
    p9_put64(c, (u64)st.st_blksize);
    p9_put64(c, (u64)st.st_blocks);
    put_time(c, &st.st_atim);
    put_time(c, &st.st_mtim);
    put_time(c, &st.st_ctim);
    put_time(c, &(struct timespec){ 0 });                          /* birth */
    p9_put64(c, 0);                                                /* generation, data version: not known */
    p9_put64(c, 0);
    return 0;
}

struct change {
    u32 valid, mode, uid, gid;
    u64 size;
    struct timespec time[2];
};

static int set_size(struct p9_fid *f, u64 size)
{
    struct p9_proc name;

    if (!S_ISREG(f->type))
        return S_ISDIR(f->type) ? -EISDIR : -EINVAL;
    if (size > INT64_MAX)
        return -EFBIG;
    if (f->kind == P9_FID_OPEN && ftruncate(f->io, (off_t)size) == 0)
        return 0;
    return truncate(p9_proc(&name, f->path), (off_t)size) < 0 ? -errno : 0;
}

static struct timespec new_time(u32 valid, u32 now, u32 to, struct timespec t)
{
    if (!(valid & now))
        t.tv_nsec = UTIME_OMIT;
    else if (!(valid & to))
        t.tv_nsec = UTIME_NOW;
    return t;
}

static int set_times(struct p9_fid *f, const struct change *a)
{
    struct timespec t[2] = { new_time(a->valid, SET_ATIME, SET_ATIME_TO, a->time[0]), new_time(a->valid, SET_MTIME, SET_MTIME_TO, a->time[1]) };
    struct p9_proc name;

    if (utimensat(f->path, "", t, AT_EMPTY_PATH) == 0)
        return 0;
    if (errno != EINVAL || S_ISLNK(f->type))
        return -errno;
    return utimensat(AT_FDCWD, p9_proc(&name, f->path), t, 0) < 0 ? -errno : 0; /* before Linux 5.8 */
}

/* An owner first, since that takes set-user-ID away; times last, since a size changes them. */
static int change(struct p9 *s, struct p9_fid *f, const struct change *a)
{
    u32 uid = a->valid & SET_UID ? p9_to_host_uid(s, a->uid) : (u32)-1, gid = a->valid & SET_GID ? p9_to_host_gid(s, a->gid) : (u32)-1;
    struct p9_proc name;
    int r = 0;

    if (f->sealed)
        return -EACCES;
    if (a->valid & (SET_UID | SET_GID) && fchownat(f->path, "", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) < 0)
        r = -errno;
    if (r == 0 && (a->valid & SET_MODE))
        r = S_ISLNK(f->type) ? -EOPNOTSUPP : chmod(p9_proc(&name, f->path), a->mode & 07777) < 0 ? -errno : 0;
    if (r == 0 && (a->valid & SET_SIZE))
        r = set_size(f, a->size);
    if (r == 0 && (a->valid & (SET_ATIME | SET_MTIME)))
        r = set_times(f, a);
    return r;
}

int p9_op_setattr(struct p9_call *c)
{
    u32 id = p9_get32(c);
    struct change a = { .valid = p9_get32(c) };
    struct p9_fid *f;
    int r;

    a.mode = p9_get32(c);
    a.uid = p9_get32(c);
    a.gid = p9_get32(c);
    a.size = p9_get64(c);
    for (unsigned i = 0; i < 2; i++) {
        a.time[i].tv_sec = (time_t)p9_get64(c);
        a.time[i].tv_nsec = (long)p9_get64(c);
        if (a.time[i].tv_nsec < 0 || a.time[i].tv_nsec >= 1000000000)
            a.time[i].tv_nsec = 0;
    }
    r = p9_fid_get(c, id, false, &f);
    if (r < 0)
        return r;
    r = change(c->s, f, &a);
    p9_fid_put(c->s, f);
    return r;
}

/* --- making --- */

int p9_made(struct p9_call *c, const struct p9_fid *dir, const char *name, u32 gid, struct stat *st)
{
    int fd = openat(dir->path, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);

    if (fd < 0)
        return -errno;
    /* Who may give files away does so; for everybody else they are doppel's user's. */
    if (c->s->privileged && (dir->uid || gid) && fchownat(fd, "", dir->uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) < 0 && errno != EPERM) {
        int e = errno;

        close(fd);
        return -e;
    }
    if (fstat(fd, st) < 0) {
        close(fd);
        return -EIO;
    }
    return fd;
}

/* A folder of the guest's in which something is to be made, changed or removed. */
static int get_dir(struct p9_call *c, u32 id, struct p9_fid **f)
{
    int r = p9_fid_get(c, id, false, f);

    if (r < 0)
        return r;
    r = !S_ISDIR((*f)->type) ? -ENOTDIR : (*f)->sealed ? -EACCES : 0;
    if (r < 0) {
        p9_fid_put(c->s, *f);
        *f = NULL;
    }
    return r;
}

static int tell_made(struct p9_call *c, const struct p9_fid *dir, const char *name, u32 gid)
{
    struct p9_qid q;
    struct stat st;
    int fd = p9_made(c, dir, name, gid, &st);

    if (fd < 0)
        return fd;
    close(fd);
    p9_fid_qid(c->s, &st, &q);
    p9_put_qid(c, &q);
    return 0;
}

int p9_op_symlink(struct p9_call *c)
{
    u32 id = p9_get32(c), gid;
    char name[P9_NAME_MAX + 1], target[PATH_MAX];
    struct p9_fid *dir;
    int r = p9_get_name(c, name);

    if (r == 0)
        r = p9_get_string(c, target, sizeof(target));
    gid = p9_get32(c);
    if (r == 0)
        r = get_dir(c, id, &dir);
    if (r < 0)
        return r;
    r = symlinkat(target, dir->path, name) < 0 ? -errno : tell_made(c, dir, name, gid);
    p9_fid_put(c->s, dir);
    return r;
}

/* Device nodes are nothing that a guest may make on the host; FIFOs and sockets are names only, whose other side is in the guest. */
static int make_node(int dir, const char *name, u32 mode)
{
    switch (mode & S_IFMT) {
    case 0:
    case S_IFREG:
    case S_IFIFO:
    case S_IFSOCK:
        return mknodat(dir, name, mode & (S_IFMT | 07777), 0) < 0 ? -errno : 0;
    default:
        return -EPERM;
    }
}

int p9_op_mknod(struct p9_call *c)
{
    u32 id = p9_get32(c), mode, gid;
    char name[P9_NAME_MAX + 1];
    struct p9_fid *dir;
    int r = p9_get_name(c, name);

    mode = p9_get32(c);
    p9_get32(c);
    p9_get32(c);
    gid = p9_get32(c);
    if (r == 0)
        r = get_dir(c, id, &dir);
    if (r < 0)
        return r;
    r = make_node(dir->path, name, mode);
    if (r == 0)
        r = tell_made(c, dir, name, gid);
    p9_fid_put(c->s, dir);
    return r;
}

int p9_op_mkdir(struct p9_call *c)
{
    u32 id = p9_get32(c), mode, gid;
    char name[P9_NAME_MAX + 1];
    struct p9_fid *dir;
    int r = p9_get_name(c, name);

    mode = p9_get32(c);
    gid = p9_get32(c);
    if (r == 0)
        r = get_dir(c, id, &dir);
    if (r < 0)
        return r;
    r = mkdirat(dir->path, name, mode & 07777) < 0 ? -errno : tell_made(c, dir, name, gid);
    p9_fid_put(c->s, dir);
    return r;
}

int p9_op_link(struct p9_call *c)
{
    u32 dir_id = p9_get32(c), id = p9_get32(c);
    char name[P9_NAME_MAX + 1];
    struct p9_fid *dir, *f;
    struct p9_proc from;
    int r = p9_get_name(c, name);

    if (r == 0)
        r = get_dir(c, dir_id, &dir);
    if (r < 0)
        return r;
    r = p9_fid_get(c, id, false, &f);
    if (r == 0 && linkat(AT_FDCWD, p9_proc(&from, f->path), dir->path, name, AT_SYMLINK_FOLLOW) < 0)
        r = -errno;
    p9_fid_put(c->s, f);
    p9_fid_put(c->s, dir);
    return r;
}

int p9_op_readlink(struct p9_call *c)
{
    struct p9_fid *f;
    ssize_t n = 0;
    int r = p9_fid_get(c, p9_get32(c), false, &f);

    if (r < 0)
        return r;
    if (!S_ISLNK(f->type) || (n = readlinkat(f->path, "", (char *)c->spare, PATH_MAX)) < 0)
        r = S_ISLNK(f->type) ? -errno : -EINVAL;
    p9_fid_put(c->s, f);
    if (r == 0)
        p9_put_string(c, (char *)c->spare, (size_t)n);
    return r;
}

/* --- moving and removing --- */

int p9_op_renameat(struct p9_call *c)
{
    u32 old_id = p9_get32(c), new_id;
    char old[P9_NAME_MAX + 1], new[P9_NAME_MAX + 1];
    struct p9_fid *from, *to;
    int r = p9_get_name(c, old);

    new_id = p9_get32(c);
    if (r == 0)
        r = p9_get_name(c, new);
    if (r == 0)
        r = get_dir(c, old_id, &from);
    if (r < 0)
        return r;
    r = get_dir(c, new_id, &to);
    if (r == 0) {
        r = renameat(from->path, old, to->path, new) < 0 ? -errno : 0;
        p9_fid_put(c->s, to);
    }
    p9_fid_put(c->s, from);
    return r;
}

int p9_op_unlinkat(struct p9_call *c)
{
    u32 id = p9_get32(c), flags;
    char name[P9_NAME_MAX + 1];
    struct p9_fid *dir;
    int r = p9_get_name(c, name);

    flags = p9_get32(c);
    if (r == 0)
        r = get_dir(c, id, &dir);
    if (r < 0)
        return r;
    r = unlinkat(dir->path, name, flags & REMOVEDIR ? AT_REMOVEDIR : 0) < 0 ? -errno : 0;
    p9_fid_put(c->s, dir);
    return r;
}

/* The path from the root on by which the host knows fd now, "" for the root itself. -ENOENT: none. path has PATH_MAX bytes. */
static int path_of(const struct p9 *s, int fd, char *path)
{
    char root[PATH_MAX];
    struct p9_proc proc;
    ssize_t len = readlink(p9_proc(&proc, s->root), root, sizeof(root) - 1), n = readlink(p9_proc(&proc, fd), path, PATH_MAX - 1);

    if (len <= 0 || n <= 0)
        return -ENOENT;
    root[len] = path[n] = 0;
    if (len == 1)
        len = 0;                                                   /* "/" */
    if (strncmp(path, root, (size_t)len) || (path[len] && path[len] != '/'))
        return -ENOENT;
    memmove(path, path + len, (size_t)(n - len) + 1);
    return 0;
}

/* Walks such a path. p->fd is -1 after an error. */
static int walk_path(const struct p9 *s, char *path, struct place *p)
{
    char *save = NULL;
    int r = 0;

    *p = (struct place){ .fd = openat(s->root, ".", O_PATH | O_DIRECTORY | O_CLOEXEC) };
    if (p->fd < 0 || fstat(p->fd, &p->st) < 0)
        r = -ENOENT;
    for (char *w = strtok_r(path, "/", &save); r == 0 && w; w = strtok_r(NULL, "/", &save))
        r = step(s, p, w, -1);
    if (r < 0 && p->fd >= 0) {
        close(p->fd);
        p->fd = -1;
    }
    return r;
}

int p9_park(struct p9 *s, struct p9_fid *f)
{
    char path[PATH_MAX];
    struct stat st;
    int r = fstat(f->path, &st) < 0 || !st.st_nlink ? -ENOENT : path_of(s, f->path, path);

    if (r < 0)
        return r;
    f->parked = strdup(path);
    if (!f->parked)
        return -ENOMEM;
    f->ino = st.st_ino;
    close(f->path);
    f->path = -1;
    return 0;
}

int p9_unpark(struct p9 *s, struct p9_fid *f)
{
    char path[PATH_MAX];
    struct place p;
    int r;

    snprintf(path, sizeof(path), "%s", f->parked);
    r = walk_path(s, path, &p);
    if (r == 0 && (p.st.st_dev != f->dev || p.st.st_ino != f->ino)) {
        close(p.fd);
        r = -ESTALE;
    }
    if (r < 0)
        return r == -EMFILE || r == -ENFILE ? r : -ESTALE;
    free(f->parked);
    f->parked = NULL;
    f->path = p.fd;
    return 0;
}

/*
 * Where f is now, by the host's word: its folder (O_PATH) and its name there, for calls that name a file by its fid alone. The path is walked from
 * the root as any other, and the name has to mean the same file. -ENOENT: it is nowhere any more.
 */
static int find_name(const struct p9 *s, const struct p9_fid *f, char name[P9_NAME_MAX + 1])
{
    char path[PATH_MAX], *last;
    struct place p;
    struct stat st, now;
    int r = fstat(f->path, &st) < 0 ? -ENOENT : path_of(s, f->path, path);

    last = r == 0 ? strrchr(path, '/') : NULL;
    if (!last || strlen(last + 1) > P9_NAME_MAX)
        return -ENOENT;                                            /* or the root, which cannot go */
    strcpy(name, last + 1);
    *last = 0;
    r = walk_path(s, path, &p);
    if (r == 0 && (p.sealed || fstatat(p.fd, name, &now, AT_SYMLINK_NOFOLLOW) < 0 || now.st_dev != st.st_dev || now.st_ino != st.st_ino)) {
        close(p.fd);
        r = -ENOENT;
    }
    return r < 0 ? r : p.fd;
}

int p9_op_rename(struct p9_call *c)
{
    u32 id = p9_get32(c), dir_id = p9_get32(c);
    char old[P9_NAME_MAX + 1], new[P9_NAME_MAX + 1];
    struct p9_fid *f, *to;
    int r = p9_get_name(c, new), from;

    if (r == 0)
        r = get_dir(c, dir_id, &to);
    if (r < 0)
        return r;
    r = p9_fid_get(c, id, false, &f);
    if (r == 0) {
        r = from = find_name(c->s, f, old);
        if (from >= 0) {
            r = renameat(from, old, to->path, new) < 0 ? -errno : 0;
            close(from);
        }
        p9_fid_put(c->s, f);
    }
    p9_fid_put(c->s, to);
    return r;
}

/* The fid is gone afterwards, also after an error. */
int p9_op_remove(struct p9_call *c)
{
    u32 id = p9_get32(c);
    char name[P9_NAME_MAX + 1];
    struct p9_fid *f;
    int r = p9_fid_get(c, id, false, &f), dir;

    if (r < 0)
        return r;
    r = dir = find_name(c->s, f, name);
    if (dir >= 0) {
        r = unlinkat(dir, name, S_ISDIR(f->type) ? AT_REMOVEDIR : 0) < 0 ? -errno : 0;
        close(dir);
    }
    p9_fid_put(c->s, f);
    p9_fid_clunk(c->s, id);
    return r;
}
