/*
 * From the initramfs to a system on a disk (root.h), as every initramfs does: the root is mounted, the mounts that init made move there, the
 * files of the initramfs are removed (they are memory), and the system's own init becomes process 1.
 *
 * A system that has no modules for this kernel gets those of the initramfs, by a tmpfs: enough for disks, network and vsock.
 */
#define _GNU_SOURCE
#include "root.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define NEW "/newroot"
#define WAIT_MS 10000                                              /* for a disk that is slow to appear */
#define STEP_MS 20
#define KEPT "/run/doppel/modules"

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

/* Each kind of file system that lives on a disk, in the kernel's order. */
static int mount_root(const char *device, unsigned long flags)
{
    char line[128], *type;
    FILE *f = fopen("/proc/filesystems", "re");
    int r = -1, error = ENODEV;

    while (f && r && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        if (line[0] != '\t')
            continue;                                              /* nodev */
        type = line + 1;
        r = mount(device, NEW, type, flags, NULL);
        if (r && errno == EROFS && !(flags & MS_RDONLY))
            r = mount(device, NEW, type, flags | MS_RDONLY, NULL);
        if (r && errno != EINVAL)
            error = errno;
    }
    if (f)
        fclose(f);
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

int root_boot(const char *device, bool writable, const char *program)
{
    char *argv[] = { (char *)program, NULL };

    if (strncmp(device, "/dev/", 5)) {
        fprintf(stderr, "init: root=%s: only device files are known here, as in root=/dev/vda\n", device);
        return -1;
    }
    for (int waited = 0; access(device, F_OK) && waited < WAIT_MS; waited += STEP_MS)
        sleep_ms(STEP_MS);
    mkdir(NEW, 0755);
    if (mount_root(device, writable ? 0 : MS_RDONLY))
        return failed("cannot mount the root", device);
    keep_modules();
    if (enter())
        return -1;
    lend_modules();
    execv(program, argv);
    return failed("cannot run", program);
}
