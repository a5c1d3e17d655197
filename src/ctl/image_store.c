/*
 * The store of images (image_store.h).
 *
 * STORE itself is locked while names change, for moments; nobody waits for an image's lock.
 */
#define _GNU_SOURCE
#include "ctl/image_store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/err.h"
#include "ctl/instance.h"

#define INFO_NAME "image.json"
#define INFO_MAX 65536
#define DISK_NAME "root.img"
#define KEPT_NAME "kept"
#define NEW_PREFIX ".new-"
#define OLD_PREFIX ".old-"

static int bad_name(const char *what, const char *name)
{
    return err(-EINVAL, "\"%.100s\": not a name for %s; take 1 to %d letters, digits, \"_\", \".\" or \"-\", the first a letter or digit", name, what,
               INSTANCE_NAME_MAX);
}

/* --- folders --- */

/* All below at/name, and that; folders of a build may forbid it to us, who own them. */
static int remove_tree(int at, const char *name)
{
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), r = 0;
    if (fd < 0 && errno == EACCES && fchmodat(at, name, 0700, 0) == 0)
        fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *e;
    if (!d) {
        if (fd >= 0)
            close(fd);
        return unlinkat(at, name, 0) == 0 || errno == ENOENT ? 0 : -errno;
    }
    fchmod(fd, 0700);
    while ((e = readdir(d)))
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) {
            int one = unlinkat(fd, e->d_name, 0) == 0 ? 0 : remove_tree(fd, e->d_name);
            r = r < 0 ? r : one;
        }
    closedir(d);
    if (unlinkat(at, name, AT_REMOVEDIR) < 0 && r == 0)
        r = -errno;
    return r;
}

/* Makes path with the folders above it. */
static int make_folders(const char *path)
{
    char part[PATH_MAX];
    snprintf(part, sizeof(part), "%s", path);
    for (char *p = part + 1;; p++)
        if (*p == '/' || !*p) {
            char c = *p;
            *p = '\0';
            if (mkdir(part, 0755) < 0 && errno != EEXIST && !(errno == EROFS || errno == EACCES))
                return -errno;
            *p = c;
            if (!c)
                return 0;
        }
}

static int store_path(char out[PATH_MAX])
{
    const char *chosen = getenv("DOPPEL_IMAGES"), *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    int n;
    if (chosen && *chosen)
        n = *chosen == '/' ? snprintf(out, PATH_MAX, "%s", chosen) : -1;
    else if (data && *data == '/')
        n = snprintf(out, PATH_MAX, "%s/doppel/images", data);
    else
        n = home && *home == '/' ? snprintf(out, PATH_MAX, "%s/.local/share/doppel/images", home) : -1;
    if (n < 0)
        return err(-EINVAL, "there is no place for images; set HOME, XDG_DATA_HOME or DOPPEL_IMAGES to an absolute path");
    if (n >= PATH_MAX - 2 * NAME_MAX)
        return err(-ENAMETOOLONG, "the path of the store of images is too long; set DOPPEL_IMAGES to a shorter one");
    return 0;
}

/* Nobody holds its lock: what a doppel left that was killed. */
static void remove_stale(int store, const char *name)
{
    int fd = openat(store, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0)
        remove_tree(store, name);
    if (fd >= 0)
        close(fd);
}

static void clean(int store)
{
    int fd = openat(store, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *e;
    while (d && (e = readdir(d)))
        if (!strncmp(e->d_name, NEW_PREFIX, strlen(NEW_PREFIX)) || !strncmp(e->d_name, OLD_PREFIX, strlen(OLD_PREFIX)))
            remove_stale(store, e->d_name);
    if (d)
        closedir(d);
}

/* Opens STORE, locked, and cleans it. A descriptor, -ENOENT if it is not to be made, or a negative errno, all with err(). */
static int store_enter(char path[PATH_MAX], bool make)
{
    int r = store_path(path);
    if (r == 0 && make && (r = make_folders(path)) < 0)
        r = err(r, "%s: cannot make it: %s; set DOPPEL_IMAGES to a directory that you may write", path, strerror(-r));
    int fd = r < 0 ? r : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (r < 0)
        return r;
    if (fd < 0)
        return err(-errno, "%s: the store of images: %s", path, strerror(errno));
    if (flock(fd, LOCK_EX) < 0) {
        r = err(-errno, "%s: cannot lock it: %s", path, strerror(errno));
        close(fd);
        return r;
    }
    clean(fd);
    return fd;
}

/* --- what is known of it --- */

static void put_string(json_t *o, const char *key, const char *value)
{
    if (*value)
        json_object_set_new(o, key, json_string(value));
}

static int write_info(const struct image *i)
{
    const struct image_info *n = &i->info;
    json_t *o = json_pack("{s:i, s:s, s:s, s:b, s:I, s:I, s:I}", "version", 1, "name", i->name, "boot", n->firmware ? "firmware" : "kernel", "commands", n->commands,
                          "size", (json_int_t)n->size, "changed_ns", (json_int_t)n->changed_ns, "packages", (json_int_t)n->packages);
    if (!o)
        return err(-ENOMEM, "no memory");
    put_string(o, "suite", n->suite);
    put_string(o, "kernel", n->kernel);
    put_string(o, "created", n->created);
    put_string(o, "digest", n->digest);
    put_string(o, "from", n->from);
    put_string(o, "wanted", n->wanted);
    int fd = openat(i->fd, INFO_NAME, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    bool ok = fd >= 0 && json_dumpfd(o, fd, JSON_INDENT(4)) == 0 && write(fd, "\n", 1) == 1;
    int error = errno;
    if (fd >= 0 && close(fd) < 0)
        ok = false;
    json_decref(o);
    return ok ? 0 : err(-EIO, "%s/" INFO_NAME ": cannot write: %s", i->dir, strerror(error));
}

static void get_string(const json_t *o, const char *key, char *out, size_t size)
{
    const char *s = json_string_value(json_object_get(o, key));
    snprintf(out, size, "%s", s ? s : "");
}

static json_int_t get_integer(const json_t *o, const char *key)
{
    return json_integer_value(json_object_get(o, key));
}

static int damaged(const struct image *i, const char *what)
{
    return err(-EBADMSG, "image %s: %s; remove it (doppel image rm %s) and build or import it again", i->name, what, i->name);
}

static int read_info(struct image *i)
{
    struct image_info *n = &i->info;
    json_error_t error;
    struct stat st;
    int fd = openat(i->fd, INFO_NAME, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size > INFO_MAX) {
        if (fd >= 0)
            close(fd);
        return damaged(i, "its " INFO_NAME " is missing or no plain small file");
    }
    json_t *o = json_loadfd(fd, JSON_REJECT_DUPLICATES, &error);
    close(fd);
    if (get_integer(o, "version") != 1 || get_integer(o, "size") <= 0) {
        json_decref(o);
        return damaged(i, "its " INFO_NAME " is damaged, or of another version of doppel");
    }
    get_string(o, "suite", n->suite, sizeof(n->suite));
    get_string(o, "kernel", n->kernel, sizeof(n->kernel));
    get_string(o, "created", n->created, sizeof(n->created));
    get_string(o, "digest", n->digest, sizeof(n->digest));
    get_string(o, "from", n->from, sizeof(n->from));
    get_string(o, "wanted", n->wanted, sizeof(n->wanted));
    const char *boot = json_string_value(json_object_get(o, "boot"));
    n->firmware = boot && !strcmp(boot, "firmware");
    n->commands = json_is_true(json_object_get(o, "commands"));
    n->size = (u64)get_integer(o, "size");
    n->changed_ns = get_integer(o, "changed_ns");
    n->packages = (u64)MAX(get_integer(o, "packages"), 0);
    json_decref(o);
    return 0;
}

static s64 changed_ns(const struct stat *st)
{
    return (s64)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

/* The disk is the one that was put there. (Its digest tells whether the host's disk has changed it: doppel image info --check.) */
static int check_disk(const struct image *i)
{
    char what[128];
    struct stat st;
    if (fstatat(i->fd, DISK_NAME, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(st.st_mode))
        return damaged(i, "its " DISK_NAME " is missing");
    if ((u64)st.st_size != i->info.size) {
        snprintf(what, sizeof(what), "its disk has %llu bytes instead of %llu", (unsigned long long)st.st_size, (unsigned long long)i->info.size);
        return damaged(i, what);
    }
    return changed_ns(&st) == i->info.changed_ns ? 0 : damaged(i, "its disk was changed by another program");
}

/* --- one image --- */

int image_path(const struct image *i, const char *name, char out[PATH_MAX])
{
    int n = snprintf(out, PATH_MAX, "%s/%s", i->dir, name);
    return n > 0 && n < PATH_MAX ? 0 : err(-ENAMETOOLONG, "image %s: the path of its files is too long; set DOPPEL_IMAGES to a shorter one", i->name);
}

static void set_name(struct image *i, const char *prefix, const char *name)
{
    int n = snprintf(i->dir, sizeof(i->dir), "%s/%s%s", i->store, prefix, name);
    bug_on(n < 0 || (size_t)n >= sizeof(i->dir));                  /* store_path() left room */
    snprintf(i->name, sizeof(i->name), "%s", name);
}

void image_close(struct image *i)
{
    if (i->dir[0] && i->fd >= 0)
        close(i->fd);
    i->fd = -1;
    i->dir[0] = '\0';
}

static int open_locked(struct image *i, int store, const char *name, int how)
{
    set_name(i, "", name);
    i->fd = openat(store, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (i->fd < 0)
        return err(errno == ENOENT ? -ENOENT : -errno, errno == ENOENT ? "there is no image \"%s\"; \"doppel image list\" lists yours"
                                                                        : "image %s: cannot be opened: %m", name);
    if (flock(i->fd, how | LOCK_NB) < 0)
        return err(-EBUSY, "image %s: %s", name, how == LOCK_EX ? "a VM uses it; end that first" : "it is being removed");
    return 0;
}

int image_open(struct image *i, const char *name)
{
    *i = (struct image){.fd = -1};
    if (!instance_name_valid(name))
        return bad_name("an image", name);
    int store = store_enter(i->store, false);
    if (store == -ENOENT)
        return err(-ENOENT, "there is no image \"%s\"; \"doppel image build debian %s\" makes one", name, name);
    if (store < 0)
        return store;
    int r = open_locked(i, store, name, LOCK_SH);
    close(store);
    if (r == 0)
        r = read_info(i);
    if (r == 0)
        r = check_disk(i);
    if (r < 0)
        image_close(i);
    return r;
}

static int begin(struct image *i, int store, const char *name)
{
    char new[NAME_MAX];
    snprintf(new, sizeof(new), NEW_PREFIX "%s", name);
    if (faccessat(store, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        return err(-EEXIST, "there is an image \"%s\" already; remove it (doppel image rm %s), or take another name", name, name);
    if (mkdirat(store, new, 0755) < 0)
        return errno == EEXIST ? err(-EBUSY, "image %s: another doppel makes it just now; wait for that, or take another name", name)
                               : err(-errno, "%s: cannot make a folder there: %s", i->store, strerror(errno));
    set_name(i, NEW_PREFIX, name);
    i->fd = openat(store, new, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (i->fd < 0 || flock(i->fd, LOCK_EX | LOCK_NB) < 0)
        return err(-errno, "%s: %s", i->dir, strerror(errno));
    return 0;
}

int image_begin(struct image *i, const char *name)
{
    *i = (struct image){.fd = -1};
    if (!instance_name_valid(name))
        return bad_name("an image", name);
    int store = store_enter(i->store, true);
    if (store < 0)
        return store;
    int r = begin(i, store, name);
    close(store);
    if (r < 0)
        image_close(i);
    return r;
}

void image_abandon(struct image *i)
{
    char path[PATH_MAX];
    if (!i->dir[0])
        return;
    snprintf(path, sizeof(path), "%s", i->dir);
    remove_tree(AT_FDCWD, path);
    image_close(i);
}

/* The disk is as it stays: read-only, with its digest. */
static int settle_disk(struct image *i)
{
    struct stat st;
    time_t now = time(NULL);
    struct tm tm;
    if (fchmodat(i->fd, DISK_NAME, 0444, 0) < 0 || fstatat(i->fd, DISK_NAME, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(st.st_mode))
        return err(-EIO, "image %s: its disk is missing", i->name);
    i->info.size = (u64)st.st_size;
    i->info.changed_ns = changed_ns(&st);
    if (!gmtime_r(&now, &tm) || !strftime(i->info.created, sizeof(i->info.created), "%Y-%m-%dT%H:%M:%SZ", &tm))
        i->info.created[0] = '\0';
    return image_digest(i, i->info.digest);
}

int image_commit(struct image *i)
{
    int r = settle_disk(i);
    if (r == 0)
        r = write_info(i);
    if (r == 0 && syncfs(i->fd) < 0)
        r = err(-errno, "image %s: cannot be written to the disk: %s", i->name, strerror(errno));
    char store_dir[PATH_MAX];
    int store = r < 0 ? r : store_enter(store_dir, true);
    if (store < 0)
        return store;
    r = renameat2(AT_FDCWD, i->dir, store, i->name, RENAME_NOREPLACE);
    if (r < 0)
        r = err(-errno, "image %s: cannot be given its name: %s", i->name, strerror(errno));
    else
        fsync(store);
    close(store);
    if (r == 0)
        image_close(i);
    return r;
}

int image_remove(const char *name)
{
    struct image i = {.fd = -1};
    char old[NAME_MAX];
    if (!instance_name_valid(name))
        return bad_name("an image", name);
    int store = store_enter(i.store, false);
    if (store < 0)
        return store == -ENOENT ? err(-ENOENT, "there is no image \"%s\"", name) : store;
    int r = open_locked(&i, store, name, LOCK_EX);
    snprintf(old, sizeof(old), OLD_PREFIX "%s-%d", name, (int)getpid());
    if (r == 0 && renameat(store, name, store, old) < 0)
        r = err(-errno, "image %s: cannot be removed: %s", name, strerror(errno));
    flock(store, LOCK_UN);                                         /* the rest has its own lock, and may take its time */
    if (r == 0 && (r = remove_tree(store, old)) < 0)
        r = err(r, "image %s: not all of it could be removed: %s", name, strerror(-r));
    image_close(&i);
    close(store);
    return r;
}

/* --- kept overlays --- */

int image_kept_path(const struct image *i, const char *kept, char out[PATH_MAX])
{
    char name[NAME_MAX];
    if (!instance_name_valid(kept))
        return bad_name("a kept disk", kept);
    if (mkdirat(i->fd, KEPT_NAME, 0700) < 0 && errno != EEXIST)
        return err(-errno, "image %s: cannot keep a disk there: %s", i->name, strerror(errno));
    snprintf(name, sizeof(name), KEPT_NAME "/%s", kept);
    return image_path(i, name, out);
}

int image_remove_kept(const char *name, const char *kept)
{
    char path[PATH_MAX];
    struct image i;
    int r = image_open(&i, name);
    if (r < 0)
        return r;
    r = image_kept_path(&i, kept, path);
    int fd = r < 0 ? -1 : open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (r == 0 && fd < 0)
        r = err(-errno, "image %s keeps no disk \"%s\": %s", name, kept, strerror(errno));
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (r == 0 && (flock(fd, LOCK_EX | LOCK_NB) < 0 || fcntl(fd, F_OFD_SETLK, &whole) < 0))
        r = err(-EBUSY, "image %s: a VM uses its disk \"%s\"; end that first", name, kept);
    if (r == 0 && unlink(path) < 0)
        r = err(-errno, "%s: cannot be removed: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    image_close(&i);
    return r;
}

/* --- lists --- */

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* What has a valid name in the folder dir, which is closed. */
static int list(int dir, char ***names)
{
    DIR *d = dir < 0 ? NULL : fdopendir(dir);
    struct dirent *e;
    size_t n = 0, room = 16;
    char **v = calloc(room, sizeof(*v));
    while (v && d && (e = readdir(d))) {
        if (!instance_name_valid(e->d_name))
            continue;
        if (n + 1 == room) {
            char **more = reallocarray(v, room *= 2, sizeof(*v));
            if (!more)
                break;
            v = more;
        }
        v[n] = strdup(e->d_name);
        n += v[n] != NULL;
        v[n] = NULL;
    }
    if (d)
        closedir(d);
    else if (dir >= 0)
        close(dir);
    if (!v)
        return err(-ENOMEM, "no memory");
    qsort(v, n, sizeof(*v), by_name);
    *names = v;
    return 0;
}

int image_list(char ***names)
{
    char path[PATH_MAX];
    int store = store_enter(path, false);
    return store < 0 && store != -ENOENT ? store : list(store, names);
}

int image_kept_list(const struct image *i, char ***names)
{
    return list(openat(i->fd, KEPT_NAME, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), names);
}

void image_list_free(char **names)
{
    for (char **n = names; n && *n; n++)
        free(*n);
    free(names);
}
