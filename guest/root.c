/*
 * Roots that are not the initramfs (root.h).
 *
 * A system on a disk takes over as from every initramfs: the root is mounted, the mounts that init made move there, the files of the initramfs are
 * removed (they are memory), and the system's own init becomes process 1. One that has no modules for this kernel gets those of the initramfs, by a
 * tmpfs: enough for disks, network and vsock.
 *
 * Shell and command, and the agent, can run below another root while init stays where it is: below the host's folder, which a tmpfs covers by overlayfs
 * and so keeps as it is; or below the disk, which is written to. /dev, /proc and /sys are the guest's, /run is empty.
 */
#define _GNU_SOURCE
#include "root.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "init.h"

#define NEW "/newroot"
#define WAIT_MS 10000                                              /* for a disk that is slow to appear */
#define STEP_MS 20
#define KEPT "/run/doppel/modules"
#define ROOT_TAG "doppel-root"
#define ROOT_PLACE "/run/doppel"
#define ROOT ROOT_PLACE "/root"

static int failed(const char *what, const char *name)
{
    fprintf(stderr, "init: %s %s: %s\n", what, name, strerror(errno));
    return -1;
}

static void sleep_ms(long ms)
{
    struct timespec t = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 };
    nanosleep(&t, NULL);
}

static int mount_as(const char *type, const char *device, const char *place, unsigned long flags)
{
    int r = mount(device, place, type, flags, NULL);

    if (r && errno == EROFS && !(flags & MS_RDONLY))
        r = mount(device, place, type, flags | MS_RDONLY, NULL);
    return r;
}

/* Each kind of file system that lives on a disk, in the kernel's order; then those whose modules a mount loads. */
static int mount_disk(const char *device, const char *place, unsigned long flags)
{
    static const char *const modules[] = { "ext4", "xfs" };
    char line[128], *type;
    FILE *f = fopen("/proc/filesystems", "re");
    int r = -1, error = ENODEV;

    for (int waited = 0; access(device, F_OK) && waited < WAIT_MS; waited += STEP_MS)
        sleep_ms(STEP_MS);
    mkdir(place, 0755);
    while (f && r && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        if (line[0] != '\t')
            continue;                                              /* nodev */
        type = line + 1;
        r = mount_as(type, device, place, flags);
        if (r && errno != EINVAL)
            error = errno;
    }
    if (f)
        fclose(f);
    for (unsigned i = 0; r && i < sizeof modules / sizeof *modules; i++) {
        r = mount_as(modules[i], device, place, flags);
        if (r && errno != EINVAL && errno != ENODEV)
            error = errno;
    }
    errno = error;
    return r;
}

static int copy_file(int from, int to, const char *name)
{
    char buf[65536];
    ssize_t n = -1;
    int in = openat(from, name, O_RDONLY | O_CLOEXEC), out = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);

    while (in >= 0 && out >= 0 && (n = read(in, buf, sizeof buf)) > 0)
        if (write(out, buf, (size_t)n) != n)
            break;
    if (in >= 0)
        close(in);
    if (out >= 0)
        close(out);
    return n == 0 ? 0 : -1;
}

static DIR *open_folder(int at, const char *name)
{
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);

    if (fd >= 0 && !d)
        close(fd);
    return d;
}

static bool is_dot(const char *name)
{
    return !strcmp(name, ".") || !strcmp(name, "..");
}

/* Folders and plain files: modules are nothing else. */
static int copy_tree(int from, int to, const char *name)
{
    DIR *d = open_folder(from, name);
    struct dirent *e;
    int fd = -1, r = 0;

    if (!d)
        return copy_file(from, to, name);
    if (mkdirat(to, name, 0755) == 0)
        fd = openat(to, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (fd >= 0 && (e = readdir(d)))
        if (!is_dot(e->d_name))
            r |= copy_tree(dirfd(d), fd, e->d_name);
    if (fd >= 0)
        close(fd);
    closedir(d);
    return fd < 0 ? -1 : r;
}

/* Into /run, while the initramfs is there. */
static void keep_modules(void)
{
    int from = open("/lib", O_RDONLY | O_DIRECTORY | O_CLOEXEC), to;

    mkdir("/run/doppel", 0755);
    to = open("/run/doppel", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (from < 0 || to < 0 || copy_tree(from, to, "modules"))
        failed("cannot keep modules in", KEPT);
    if (from >= 0)
        close(from);
    if (to >= 0)
        close(to);
}

/* Below NEW, which is / by now. */
static bool has_modules(void)
{
    struct utsname u;
    char path[256];

    uname(&u);
    snprintf(path, sizeof path, "/lib/modules/%s", u.release);
    return access(path, F_OK) == 0;
}

static void lend_modules(void)
{
    if (has_modules())
        return;
    mkdir("/lib/modules", 0755);
    if (mount(KEPT, "/lib/modules", NULL, MS_BIND, NULL))
        failed("cannot lend modules at", "/lib/modules");
}

/* All that is on device: the initramfs, not what is mounted in it. */
static void empty(int at, const char *name, dev_t device)
{
    DIR *d = open_folder(at, name);
    struct dirent *e;
    struct stat st;

    while (d && (e = readdir(d))) {
        if (is_dot(e->d_name) || fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) || st.st_dev != device)
            continue;
        if (S_ISDIR(st.st_mode))
            empty(dirfd(d), e->d_name, device);
        unlinkat(dirfd(d), e->d_name, S_ISDIR(st.st_mode) ? AT_REMOVEDIR : 0);
    }
    if (d)
        closedir(d);
}

static int enter(void)
{
    static const char *const moved[] = { "/dev", "/proc", "/sys", "/run" };
    struct stat old;
    char to[64];

    if (stat("/", &old))
        return failed("cannot look at", "/");
    for (unsigned i = 0; i < sizeof moved / sizeof *moved; i++) {
        snprintf(to, sizeof to, NEW "%s", moved[i]);
        mkdir(to, 0755);
        if (mount(moved[i], to, NULL, MS_MOVE, NULL))
            return failed("cannot move to the root", moved[i]);
    }
    umount2("/tmp", MNT_DETACH);
    empty(AT_FDCWD, "/", old.st_dev);
    if (chdir(NEW) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        return failed("cannot enter", NEW);
    return 0;
}

static bool is_device(const char *device)
{
    bool is = !strncmp(device, "/dev/", 5);

    if (!is)
        say("root=%s: only device files are known here, as in root=/dev/vda", device);
    errno = EINVAL;
    return is;
}

int root_boot(const char *device, bool writable, const char *program)
{
    char *argv[] = { (char *)program, NULL };

    if (!is_device(device) || mount_disk(device, NEW, writable ? 0 : MS_RDONLY))
        return failed("cannot mount the root", device);
    keep_modules();
    if (enter())
        return -1;
    lend_modules();
    execv(program, argv);
    return failed("cannot run", program);
}

/* ---- a root for shell, command and agent ---- */

static void bind(const char *what, const char *at)
{
    if (mount(what, at, NULL, MS_BIND | MS_REC, NULL))
        say("%s: %s", at, strerror(errno));
}

static void make_folders(char *path)
{
    for (char *p = strchr(path + 1, '/'); p; p = strchr(p + 1, '/')) {
        *p = 0;
        mkdir(path, 0755);
        *p = '/';
    }
}

/*
 * Names are found as the guest's network has them. Where resolv.conf leads to a file of a service's in /run (systemd-resolved), which does not run here, that is
 * made; whatever else it leads to is looked up below the root.
 */
static void bind_resolv_conf(void)
{
    static const char own[] = "/etc/resolv.conf";
    struct open_how how = { .flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT };
    char to[PATH_MAX], place[PATH_MAX + 64];
    ssize_t n = readlink(ROOT "/etc/resolv.conf", to, sizeof to - 1);
    char *run = NULL;
    int fd = open(own, O_WRONLY | O_CREAT | O_CLOEXEC, 0644), root;

    close_fd(&fd);
    if (n > 0) {
        to[n] = 0;
        run = !strncmp(to, "../run/", 7) ? to + 2 : !strncmp(to, "/run/", 5) ? to : NULL;
    }
    if (run && !strstr(run, "..")) {
        snprintf(place, sizeof place, ROOT "%s", run);
        make_folders(place);
        fd = open(place, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
        close_fd(&fd);
    }
    root = open(ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC);
    fd = (int)syscall(SYS_openat2, root, "etc/resolv.conf", &how, sizeof how);
    if (fd >= 0) {
        snprintf(place, sizeof place, "/proc/self/fd/%d", fd);
        bind(own, place);
    }
    close_fd(&fd);
    close_fd(&root);
}

/* Modules of the kernel that runs, which the root need not have. */
static void bind_modules(void)
{
    struct utsname u;
    char dir[256], at[300];

    uname(&u);
    snprintf(dir, sizeof dir, "/lib/modules/%s", u.release);
    snprintf(at, sizeof at, ROOT "%s", dir);
    make_folders(at);
    if (!mkdir(at, 0755))
        bind(dir, at);
}

static void bind_own(void)
{
    static const char *const views[] = { "/dev", "/proc", "/sys" };

    for (unsigned i = 0; i < sizeof views / sizeof *views; i++) {
        char at[64];

        snprintf(at, sizeof at, ROOT "%s", views[i]);
        mkdir(at, 0755);
        bind(views[i], at);
    }
    mkdir(ROOT "/run", 0755);
    if (mount("tmpfs", ROOT "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755") || mkdir(ROOT "/run/lock", 01777) || chmod(ROOT "/run/lock", 01777))
        say(ROOT "/run: %s", strerror(errno));
    bind_resolv_conf();
    bind_modules();
}

/* The host's folder below a tmpfs, by overlayfs. Returns 0 or an errno. */
static int mount_folder(const char *type)
{
    static const char *const dirs[] = { ROOT_PLACE "/lower", ROOT_PLACE "/rw" };
    const char *data = !strcmp(type, "9p") ? "trans=virtio,version=9p2000.L,msize=262144,cache=loose" : NULL;

    load_modules("/etc/modules.root");
    for (unsigned i = 0; i < sizeof dirs / sizeof *dirs; i++)
        mkdir(dirs[i], 0755);
    if (mount(ROOT_TAG, ROOT_PLACE "/lower", type, MS_RDONLY, data) || mount("tmpfs", ROOT_PLACE "/rw", "tmpfs", 0, "mode=0755") ||
        mkdir(ROOT_PLACE "/rw/upper", 0755) || mkdir(ROOT_PLACE "/rw/work", 0755) ||
        mount("overlay", ROOT, "overlay", 0,
              "lowerdir=" ROOT_PLACE "/lower,upperdir=" ROOT_PLACE "/rw/upper,workdir=" ROOT_PLACE "/rw/work"))
        return errno;
    return 0;
}

void root_find(struct init *s)
{
    char what[256], name[65];
    bool folder = parameter("doppel.root", what, sizeof what);

    if (!folder && !parameter("root", what, sizeof what))
        return;
    s->other_root = true;
    mkdir(ROOT_PLACE, 0755);
    mkdir(ROOT, 0755);
    if (folder)
        s->root_error = mount_folder(what);
    else
        s->root_error = is_device(what) && !mount_disk(what, ROOT, has_word("rw") ? 0 : MS_RDONLY) ? 0 : errno;
    if (s->root_error) {
        say("cannot mount the %s %s: %s", folder ? "host's root by" : "root", what, strerror(s->root_error));
        return;
    }
    bind_own();
    read_line(ROOT "/etc/hostname", name, sizeof name);
    if (!folder && *name && sethostname(name, strlen(name)))
        say("hostname: %s", strerror(errno));
}

int root_enter(const struct init *s)
{
    if (!s->other_root)
        return 0;
    errno = s->root_error;
    return s->root_error || chroot(ROOT) || chdir("/") ? -1 : 0;
}
