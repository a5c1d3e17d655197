/*
 * Names of running VMs (instance.h). Paths below BASE are taken from its descriptor, and no link is followed but the two that are ours to make.
 *
 * Whether a VM lives is asked of the kernel, by its lock. Nothing here waits but for BASE's own lock, which is held for moments.
 */
#define _GNU_SOURCE
#include "ctl/instance.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "back/vsock_host.h"
#include "base/err.h"

#define LOCK_NAME "lock"
#define CIDS_MAX 65536                                             /* far more than a user has VMs */

bool instance_name_valid(const char *name)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-";
    size_t len = strlen(name);

    return len && len <= INSTANCE_NAME_MAX && strspn(name, plain) == len && !strchr("_.-", name[0]);
}

static int bad_name(const char *name)
{
    return err(-EINVAL, "\"%.100s\": not a name for a VM; take 1 to %d letters, digits, \"_\", \".\" or \"-\", the first a letter or digit", name,
               INSTANCE_NAME_MAX);
}

/* --- the private directory --- */

static bool is_own_folder(const char *path)
{
    struct stat st;

    return path && path[0] == '/' && stat(path, &st) == 0 && S_ISDIR(st.st_mode) && st.st_uid == geteuid();
}

static int check_base(const struct instance *i)
{
    struct stat st;

    if (fstat(i->base_fd, &st) < 0)
        return err(-errno, "%s: %s", i->base, strerror(errno));
    if (st.st_uid != geteuid())
        return err(-EACCES, "%s: belongs to user %u, not to you; set XDG_RUNTIME_DIR to a directory of yours", i->base, (unsigned)st.st_uid);
    if (st.st_mode & 077)
        return err(-EACCES, "%s: others may enter it (mode %04o); say chmod 700 %s, if you know all that is in it", i->base,
                   (unsigned)st.st_mode & 07777, i->base);
    return 0;
}

static void forget(struct instance *i)
{
    i->base_fd = i->dir_fd = i->lock_fd = -1;
}

void instance_close(struct instance *i)
{
    if (!i->base[0])
        return;
    if (i->lock_fd >= 0)
        close(i->lock_fd);
    if (i->dir_fd >= 0)
        close(i->dir_fd);
    if (i->base_fd >= 0)
        close(i->base_fd);
    forget(i);
    i->base[0] = '\0';
}

/* Opens BASE, made if need be, and locks it. */
static int base_enter(struct instance *i)
{
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    int n, r = 0;

    memset(i, 0, sizeof(*i));
    forget(i);
    n = is_own_folder(runtime) ? snprintf(i->base, sizeof(i->base), "%s/doppel", runtime)
                               : snprintf(i->base, sizeof(i->base), "/tmp/doppel-%u", (unsigned)geteuid());
    if ((size_t)n >= sizeof(i->base))
        r = err(-ENAMETOOLONG, "XDG_RUNTIME_DIR is too long");
    else if (mkdir(i->base, 0700) < 0 && errno != EEXIST)
        r = err(-errno, "%s: cannot make it: %s; set XDG_RUNTIME_DIR to a directory that you may write", i->base, strerror(errno));
    else if ((i->base_fd = open(i->base, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0)
        r = err(-errno, "%s: cannot enter it: %s; set XDG_RUNTIME_DIR to a directory of yours", i->base, strerror(errno));
    if (r == 0)
        r = check_base(i);
    if (r == 0 && flock(i->base_fd, LOCK_EX) < 0)
        r = err(-errno, "%s: cannot lock it: %s", i->base, strerror(errno));
    if (r < 0)
        instance_close(i);
    return r;
}

static void base_leave(struct instance *i)
{
    flock(i->base_fd, LOCK_UN);
}

/* --- one folder; with BASE locked --- */

/* Does somebody hold NAME's lock? */
static bool lives(int base_fd, const char *name)
{
    int dir = openat(base_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int fd = dir < 0 ? -1 : openat(dir, LOCK_NAME, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    bool held = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) < 0 && errno == EWOULDBLOCK;

    if (fd >= 0)
        close(fd);
    if (dir >= 0)
        close(dir);
    return held;
}

/* Sockets and links in there, and the lock; nothing else is ours. */
static void empty_folder(int dir_fd, bool lock_too)
{
    int fd = openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *e;
    struct stat st;

    while (d && (e = readdir(d)))
        if (fstatat(dir_fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            (S_ISSOCK(st.st_mode) || S_ISLNK(st.st_mode) || (lock_too && !strcmp(e->d_name, LOCK_NAME) && S_ISREG(st.st_mode))))
            unlinkat(dir_fd, e->d_name, 0);
    if (d)
        closedir(d);
}

static void remove_folder(int base_fd, const char *name)
{
    int dir = openat(base_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

    if (dir < 0)
        return;
    empty_folder(dir, true);
    close(dir);
    unlinkat(base_fd, name, AT_REMOVEDIR);                         /* not if something else is in it */
}

static int take_name(struct instance *i, const char *name)
{
    snprintf(i->name, sizeof(i->name), "%s", name);
    if (snprintf(i->dir, sizeof(i->dir), "%s/%s", i->base, name) >= (int)sizeof(i->dir))
        return err(-ENAMETOOLONG, "%.100s: the path is too long", name);
    if (mkdirat(i->base_fd, name, 0700) < 0 && errno != EEXIST)
        return err(-errno, "%s: cannot make it: %s", i->dir, strerror(errno));
    i->dir_fd = openat(i->base_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (i->dir_fd >= 0)
        i->lock_fd = openat(i->dir_fd, LOCK_NAME, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    if (i->lock_fd < 0)
        return err(-errno, "%s: cannot use it for a VM: %s; remove it or choose another name", i->dir, strerror(errno));
    if (flock(i->lock_fd, LOCK_EX | LOCK_NB) < 0)
        return errno == EWOULDBLOCK ? err(-EEXIST, "%s: a VM of that name runs already; \"doppel ps\" lists them", name)
                                    : err(-errno, "%s: cannot lock it: %s", i->dir, strerror(errno));
    empty_folder(i->dir_fd, false);
    return 0;
}

static void drop_name(struct instance *i)
{
    if (i->lock_fd >= 0)
        close(i->lock_fd);
    if (i->dir_fd >= 0)
        close(i->dir_fd);
    i->lock_fd = i->dir_fd = -1;
}

/* The first of vm1, vm2, ... that nobody has. */
static int take_any_name(struct instance *i)
{
    char name[16];
    int r = -EEXIST;

    for (unsigned n = 1; r == -EEXIST && n < CIDS_MAX; n++) {
        snprintf(name, sizeof(name), "vm%u", n);
        drop_name(i);
        r = take_name(i, name);
    }
    return r;
}

/* Whose CID that is: false when it is nobody's who lives. */
static bool cid_taken(const struct instance *i, const char *link_name)
{
    char owner[INSTANCE_NAME_MAX + 2];
    ssize_t n = readlinkat(i->base_fd, link_name, owner, sizeof(owner) - 1);

    if (n <= 0)
        return false;
    owner[n] = '\0';
    return strcmp(owner, i->name) && instance_name_valid(owner) && lives(i->base_fd, owner);
}

static int take_cid(struct instance *i)
{
    char link_name[32];

    for (u32 cid = VSOCK_CID_FIRST; cid < VSOCK_CID_FIRST + CIDS_MAX; cid++) {
        snprintf(link_name, sizeof(link_name), VSOCK_PEER_NAME, cid);
        if (cid_taken(i, link_name))
            continue;
        unlinkat(i->base_fd, link_name, 0);
        if (symlinkat(i->name, i->base_fd, link_name) < 0)
            return err(-errno, "%s/%s: cannot make it: %s", i->base, link_name, strerror(errno));
        i->cid = cid;
        return 0;
    }
    return err(-ENOSPC, "%s: all vsock addresses are taken", i->base);
}

/* Also links whose VM lives no more, under the names of others that do. */
static void drop_cids(struct instance *i)
{
    int fd = openat(i->base_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    struct instance nobody = { .base_fd = i->base_fd };
    struct dirent *e;

    while (d && (e = readdir(d)))
        if (!strncmp(e->d_name, ".cid-", 5) && !cid_taken(&nobody, e->d_name))
            unlinkat(i->base_fd, e->d_name, 0);
    if (d)
        closedir(d);
}

int instance_claim(struct instance *i, const char *name)
{
    int r;

    if (name && !instance_name_valid(name)) {
        memset(i, 0, sizeof(*i));
        return bad_name(name);
    }
    r = base_enter(i);
    if (r < 0)
        return r;
    r = name ? take_name(i, name) : take_any_name(i);
    if (r == 0)
        r = take_cid(i);
    base_leave(i);
    if (r < 0)
        instance_close(i);
    return r;
}

void instance_release(struct instance *i)
{
    char link_name[32];

    if (!i->base[0])
        return;
    flock(i->base_fd, LOCK_EX);
    if (i->cid) {
        snprintf(link_name, sizeof(link_name), VSOCK_PEER_NAME, i->cid);
        unlinkat(i->base_fd, link_name, 0);
    }
    remove_folder(i->base_fd, i->name);
    instance_close(i);
}

/* --- looking --- */

int instance_open(struct instance *i, const char *name)
{
    int r;

    memset(i, 0, sizeof(*i));
    if (!instance_name_valid(name))
        return bad_name(name);
    r = base_enter(i);
    if (r < 0)
        return r;
    snprintf(i->name, sizeof(i->name), "%s", name);
    if (lives(i->base_fd, name))
        i->dir_fd = openat(i->base_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    base_leave(i);
    if (i->dir_fd < 0) {
        instance_close(i);
        return err(-ENOENT, "%s: no VM of that name runs; \"doppel ps\" lists them", name);
    }
    if (snprintf(i->dir, sizeof(i->dir), "%s/%s", i->base, name) >= (int)sizeof(i->dir)) {
        instance_close(i);
        return err(-ENAMETOOLONG, "%s: the path is too long", name);
    }
    return 0;
}

bool instance_lives(const struct instance *i)
{
    flock(i->base_fd, LOCK_EX);
    bool alive = lives(i->base_fd, i->name);
    flock(i->base_fd, LOCK_UN);
    return alive;
}

bool instance_left(const char *name)
{
    struct instance i;
    struct stat st;
    bool left = false;

    if (!instance_name_valid(name) || base_enter(&i) < 0)
        return false;
    left = fstatat(i.base_fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(st.st_mode);
    instance_close(&i);
    return left;
}

static int compare(const void *a, const void *b)
{
    return strverscmp(*(char *const *)a, *(char *const *)b);
}

int instance_list(char ***names)
{
    struct instance i;
    struct dirent *e;
    size_t n = 0, cap = 16;
    char **list = malloc(cap * sizeof(*list));
    int r = base_enter(&i), fd = r < 0 ? -1 : openat(i.base_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);

    while (d && list && (e = readdir(d))) {
        if (!instance_name_valid(e->d_name))
            continue;
        if (!lives(i.base_fd, e->d_name)) {
            remove_folder(i.base_fd, e->d_name);
            continue;
        }
        if (n + 1 == cap) {
            char **more = realloc(list, 2 * cap * sizeof(*list));

            if (!more)
                break;
            list = more;
            cap *= 2;
        }
        list[n] = strdup(e->d_name);
        n += list[n] != NULL;
    }
    if (d) {
        drop_cids(&i);
        closedir(d);
        base_leave(&i);
    }
    instance_close(&i);
    if (r < 0 || !list) {
        free(list);
        return r < 0 ? r : err(-ENOMEM, "no memory");
    }
    qsort(list, n, sizeof(*list), compare);
    list[n] = NULL;
    *names = list;
    return 0;
}

void instance_list_free(char **names)
{
    for (char **n = names; n && *n; n++)
        free(*n);
    free(names);
}

/* By the folder's descriptor: a long path does not matter, and nobody can put another folder in its place. */
int instance_connect(const struct instance *i, const char *socket_name)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), e;

    if (fd < 0)
        return -errno;
    snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d/%s", i->dir_fd, socket_name);
    if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
        return fd;
    e = -errno;
    close(fd);
    return e;
}
