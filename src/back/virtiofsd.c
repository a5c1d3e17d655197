/*
 * Starting virtiofsd (see virtiofsd.h). In the child, between fork and exec:
 *
 *   1. a mount namespace; for who may not have one, a user namespace first, in which the user is root
 *   2. the folder, with all that is mounted below it, is taken (open_tree), put on an empty file system that covers /tmp for this process, and made
 *      read-only as a whole if it is to be (mount_setattr)
 *   3. file systems of the host's kernel below it are covered
 *   4. where there is a user namespace, the user's groups stay: nobody may leave them there, but virtiofsd wants to, and ends if it cannot
 *   5. exec; virtiofsd makes its own sandbox in turn (pid, mount, net namespaces, pivot_root, seccomp)
 *
 * What fails is told through a pipe. All that is needed is prepared before the fork: the parent may have threads.
 */
#define _GNU_SOURCE
#include "back/virtiofsd.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <mntent.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PLACE "/tmp"
#define SHARED PLACE "/shared"
#define COVERED_MAX 64
#define STOP_MS 1000
#define MANY_DESCRIPTORS 500000
#define STOP_STEP_MS 5

enum step { STEP_USER, STEP_MOUNTS, STEP_FOLDER, STEP_READONLY, STEP_COVER, STEP_EXEC };
struct failure {
    int step, error;
};

struct plan {
    const char *program;
    char folder[PATH_MAX];                                         /* real path */
    bool readonly, probe;                                          /* probe: all but the program */
    char covered[COVERED_MAX][PATH_MAX];                           /* below SHARED */
    unsigned covereds;
    char uid_map[64], gid_map[64], fd_option[32];
    int listener, log, report;
};

static const char *find_program(void)
{
    static const char *const places[] = { "/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd" };
    const char *given = getenv("DOPPEL_VIRTIOFSD");

    if (given)
        return access(given, X_OK) == 0 ? given : NULL;
    for (unsigned i = 0; i < ARRAY_SIZE(places); i++)
        if (access(places[i], X_OK) == 0)
            return places[i];
    return NULL;
}

static bool kernel_view(const char *type)
{
    static const char *const kinds[] = { "proc", "sysfs", "debugfs", "tracefs", "securityfs", "selinuxfs", "smackfs", "cgroup", "cgroup2", "bpf", "pstore",
                                         "efivarfs", "nsfs", "devpts", "binfmt_misc", "configfs", "fusectl", "mqueue", "resctrl" };

    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++)
        if (!strcmp(type, kinds[i]))
            return true;
    return false;
}

static bool below(const char *path, const char *top)
{
    size_t len = strlen(top);

    return !strcmp(top, "/") || (!strncmp(path, top, len) && (path[len] == '/' || !path[len]));
}

/* Outer ones alone: what lies below one that is covered is out of reach. */
static void find_covered(struct plan *p)
{
    FILE *f = setmntent("/proc/self/mounts", "re");
    struct mntent *m;

    while (f && p->covereds < COVERED_MAX && (m = getmntent(f))) {
        char path[PATH_MAX];
        bool inner = false;

        if (!kernel_view(m->mnt_type) || !below(m->mnt_dir, p->folder))
            continue;
        if (snprintf(path, sizeof(path), "%s%s", SHARED, m->mnt_dir + (strcmp(p->folder, "/") ? strlen(p->folder) : 0)) >= (int)sizeof(path))
            continue;
        for (unsigned i = 0; i < p->covereds; i++)
            inner |= below(path, p->covered[i]);
        if (!inner)
            strcpy(p->covered[p->covereds++], path);
    }
    if (f)
        endmntent(f);
}

/* --- in the child --- */

static void fail(const struct plan *p, enum step step)
{
    struct failure f = { step, errno };

    if (write(p->report, &f, sizeof(f)) < 0)
        _exit(2);
    _exit(1);
}

static void write_file(const struct plan *p, const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        fail(p, STEP_USER);
    close(fd);
}

/*
 * setgroups(2) does nothing and succeeds from here on: a user namespace that was made without privileges denies it (user_namespaces(7)). So virtiofsd has
 * its user's groups, as doppel itself has for 9p. Where filters are not permitted it says itself what it cannot do.
 */
static void keep_groups(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_setgroups, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = { ARRAY_SIZE(code), code };

    if (getgroups(0, NULL) > 0)
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
}

/* True: in a user namespace. */
static bool enter_namespaces(const struct plan *p)
{
    if (geteuid() == 0 && unshare(CLONE_NEWNS) == 0)
        return false;
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
        fail(p, STEP_USER);
    write_file(p, "/proc/self/setgroups", "deny");
    write_file(p, "/proc/self/uid_map", p->uid_map);
    write_file(p, "/proc/self/gid_map", p->gid_map);
    return true;
}

static void prepare_folder(const struct plan *p)
{
    struct mount_attr attr = { .attr_set = MOUNT_ATTR_RDONLY };
    int tree;

    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        fail(p, STEP_MOUNTS);
    tree = open_tree(AT_FDCWD, p->folder, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
    if (tree < 0)
        fail(p, STEP_FOLDER);
    if (mount("none", PLACE, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=0755") < 0 || mkdir(SHARED, 0755) < 0)
        fail(p, STEP_MOUNTS);
    if (move_mount(tree, "", AT_FDCWD, SHARED, MOVE_MOUNT_F_EMPTY_PATH) < 0)
        fail(p, STEP_FOLDER);
    if (p->readonly && mount_setattr(AT_FDCWD, SHARED, AT_RECURSIVE, &attr, sizeof(attr)) < 0)
        fail(p, STEP_READONLY);
    for (unsigned i = 0; i < p->covereds; i++)
        if (mount("none", p->covered[i], "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,mode=0555") < 0 && errno != ENOENT)
            fail(p, STEP_COVER);
}

/*
 * Each file that the guest knows costs virtiofsd a descriptor, and listing a folder makes all in it known unless it is told otherwise. What it has no
 * descriptor for it leaves out of the list.
 */
static bool many_descriptors(void)
{
    struct rlimit l;

    if (getrlimit(RLIMIT_NOFILE, &l) < 0)
        return false;
    l.rlim_cur = l.rlim_max;
    setrlimit(RLIMIT_NOFILE, &l);
    if (l.rlim_max < MANY_DESCRIPTORS) {                           /* root's process may have more */
        struct rlimit more = { MANY_DESCRIPTORS, MANY_DESCRIPTORS };

        if (setrlimit(RLIMIT_NOFILE, &more) == 0)
            l = more;
    }
    return l.rlim_max >= MANY_DESCRIPTORS;
}

static void child(const struct plan *p)
{
    static const char source[] = "source=" SHARED ",xattr,cache=auto,log_level=err";
    const char *argv[] = { "virtiofsd", p->fd_option, "-f", "-o", source, "-o", many_descriptors() ? "readdirplus" : "no_readdirplus",
                           "--rlimit-nofile=0", NULL };
    sigset_t none;
    bool in_user_namespace;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    in_user_namespace = enter_namespaces(p);
    prepare_folder(p);
    if (p->probe)
        _exit(0);
    if (in_user_namespace)
        keep_groups();
    prctl(PR_SET_PDEATHSIG, SIGKILL);                              /* behind what changes credentials, which would take it back */
    dup2(null, 0);
    dup2(p->log, 1);
    dup2(p->log, 2);
    fcntl(p->listener, F_SETFD, 0);
    execv(p->program, (char **)argv);
    fail(p, STEP_EXEC);
}

/* --- in the parent --- */

static int explain(const struct failure *f, const char *folder)
{
    const char *why = strerror(f->error);

    switch (f->step) {
    case STEP_USER:
        return err(-f->error, "--share %s: virtiofsd needs a user namespace, which this host does not permit (%s); an administrator can (sysctl "
                              "user.max_user_namespaces, kernel.unprivileged_userns_clone), or share it by 9p: leave fs=virtiofs out", folder, why);
    case STEP_READONLY:
        return err(-f->error, "--share %s: cannot make it read-only for virtiofsd (%s); share it by 9p: leave fs=virtiofs out", folder, why);
    case STEP_FOLDER:
        return err(-f->error, "--share %s: cannot use it: %s; name a folder of this host", folder, why);
    case STEP_EXEC:
        return err(-f->error, "--share %s: cannot start virtiofsd: %s; install it again", folder, why);
    default:
        return err(-f->error, "--share %s: virtiofsd needs mounts in a namespace of its own, which this host does not permit (%s); share it by 9p: leave "
                              "fs=virtiofs out", folder, why);
    }
}

static int explain_probe(const struct failure *f)
{
    static const char *const steps[] = {
        [STEP_USER] = "virtiofsd needs a user namespace, which this host does not permit", [STEP_MOUNTS] = "virtiofsd needs mounts of its own, which this host does not permit",
        [STEP_FOLDER] = "virtiofsd cannot have the folder", [STEP_READONLY] = "virtiofsd cannot have the folder read-only",
        [STEP_COVER] = "virtiofsd needs mounts of its own, which this host does not permit", [STEP_EXEC] = "virtiofsd cannot be started",
    };

    return err(-f->error, "%s (%s)", steps[f->step], strerror(f->error));
}

/* A socket that listens at an address nobody knows, and one that is connected to it already: whoever comes later is not accepted. */
static int make_sockets(int *listener)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    socklen_t len = sizeof(a);
    int s = -1, fd = -1;

    s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s < 0 || fd < 0 || bind(s, (struct sockaddr *)&a, sizeof(a.sun_family)) < 0 || listen(s, 1) < 0 ||
        getsockname(s, (struct sockaddr *)&a, &len) < 0 || connect(fd, (struct sockaddr *)&a, len) < 0) {
        int e = errno;

        if (s >= 0)
            close(s);
        if (fd >= 0)
            close(fd);
        return err(-e, "virtiofsd: cannot make a socket: %s", strerror(e));
    }
    *listener = s;
    return fd;
}

static void identify(struct plan *p)
{
    snprintf(p->uid_map, sizeof(p->uid_map), "0 %u 1", geteuid());
    snprintf(p->gid_map, sizeof(p->gid_map), "0 %u 1", getegid());
}

/* Until the program runs, or has failed: then *f says how. */
static int launch(struct virtiofsd *d, struct plan *p, struct failure *f)
{
    int report[2];
    ssize_t n;

    if (pipe2(report, O_CLOEXEC) < 0)
        return err(-errno, "virtiofsd: %s", strerror(errno));
    p->report = report[1];
    p->log = d->log;
    d->pid = fork();
    if (d->pid == 0)
        child(p);
    close(report[1]);
    if (d->pid < 0) {
        close(report[0]);
        d->pid = 0;
        return err(-errno, "virtiofsd: cannot start a process: %s; raise the limit on processes (ulimit -u)", strerror(errno));
    }
    do
        n = read(report[0], f, sizeof(*f));
    while (n < 0 && errno == EINTR);
    close(report[0]);
    if (n == sizeof(*f) || p->probe) {
        waitpid(d->pid, NULL, 0);
        d->pid = 0;
    }
    return n == sizeof(*f) ? 1 : 0;
}

static int run(struct virtiofsd *d, struct plan *p)
{
    struct failure f = { 0 };
    int r = launch(d, p, &f);

    return r > 0 ? explain(&f, p->folder) : r;
}

int virtiofsd_usable(const char *folder, bool readonly)
{
    struct plan *p = calloc(1, sizeof(*p));
    struct virtiofsd d = { .log = -1 };
    struct failure f = { 0 };
    int r;

    if (!p)
        return err(-ENOMEM, "no memory");
    p->program = find_program();
    p->readonly = readonly;
    p->probe = true;
    if (!p->program)
        r = err(-ENOENT, "virtiofsd is not installed");
    else if (!realpath(folder, p->folder))
        r = err(-errno, "%s: %s", folder, strerror(errno));
    else {
        identify(p);
        find_covered(p);
        r = launch(&d, p, &f);
    }
    free(p);
    return r > 0 ? explain_probe(&f) : r;
}

int virtiofsd_start(struct virtiofsd *d, const char *folder, bool readonly)
{
    struct plan *p = calloc(1, sizeof(*p));
    int r, sock = -1;

    *d = (struct virtiofsd){ .log = -1 };
    if (!p)
        return err(-ENOMEM, "--share %s: out of memory", folder);
    p->readonly = readonly;
    p->program = find_program();
    p->listener = -1;
    if (!p->program)
        r = err(-ENOENT, "--share %s: virtiofsd is not installed; install it (Debian: qemu-system-common), or share the folder by 9p: leave fs=virtiofs out",
                folder);
    else if (!realpath(folder, p->folder))
        r = err(-errno, "--share %s: cannot use it: %s; name a folder of this host", folder, strerror(errno));
    else
        r = sock = make_sockets(&p->listener);
    if (r >= 0) {
        identify(p);
        snprintf(p->fd_option, sizeof(p->fd_option), "--fd=%d", p->listener);
        find_covered(p);
        d->log = memfd_create("virtiofsd-log", MFD_CLOEXEC);
        r = d->log < 0 ? err(-errno, "virtiofsd: %s", strerror(errno)) : run(d, p);
    }
    if (p->listener >= 0)
        close(p->listener);
    free(p);
    if (r < 0) {
        if (sock >= 0)
            close(sock);
        virtiofsd_stop(d);
        return r;
    }
    return sock;
}

void virtiofsd_words(const struct virtiofsd *d, char *buf, size_t size)
{
    char text[4096], *line;
    struct stat st;
    ssize_t n = 0;

    *buf = 0;
    if (d->log >= 0 && fstat(d->log, &st) == 0)
        n = pread(d->log, text, sizeof(text) - 1, st.st_size > (off_t)sizeof(text) - 1 ? st.st_size - (off_t)sizeof(text) + 1 : 0);
    while (n > 0 && text[n - 1] == '\n')
        n--;
    if (n <= 0)
        return;
    text[n] = 0;
    line = strrchr(text, '\n');
    snprintf(buf, size, "%s", line ? line + 1 : text);
}

u64 virtiofsd_descriptors(const struct virtiofsd *d)
{
    struct rlimit l;

    return prlimit(d->pid, RLIMIT_NOFILE, NULL, &l) < 0 ? 0 : MIN((u64)l.rlim_cur, (u64)MANY_DESCRIPTORS);
}

/* Its sandbox has a pid namespace: the process that serves is the child of the one that was started, which waits for it. */
static pid_t find_server(pid_t parent)
{
    char path[64];
    int pid = 0;
    FILE *f;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", parent, parent);
    f = fopen(path, "re");
    if (!f)
        return 0;
    if (fscanf(f, "%d", &pid) != 1)
        pid = 0;
    fclose(f);
    return pid;
}

static u64 count_entries(const char *path)
{
    DIR *dir = opendir(path);
    u64 n = 0;

    if (!dir)
        return 0;
    while (readdir(dir))
        n++;
    closedir(dir);
    return n > 2 ? n - 2 : 0;                                      /* "." and ".." */
}

u64 virtiofsd_open_descriptors(struct virtiofsd *d)
{
    char path[64];
    struct stat st;

    if (!d->server)
        d->server = find_server(d->pid);
    if (!d->server)
        return 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", d->server);
    if (stat(path, &st) < 0)
        return 0;
    return st.st_size > 0 ? (u64)st.st_size : count_entries(path);  /* Linux 6.2 and later say it at once */
}

/* Its socket is closed: it ends by itself, and its children with it, or is ended. */
void virtiofsd_stop(struct virtiofsd *d)
{
    for (int i = 0; d->pid > 0 && i < STOP_MS; i += STOP_STEP_MS) {
        if (waitpid(d->pid, NULL, WNOHANG) != 0)
            d->pid = 0;
        else
            poll(NULL, 0, STOP_STEP_MS);
    }
    if (d->pid > 0) {
        kill(d->pid, SIGKILL);
        waitpid(d->pid, NULL, 0);
    }
    if (d->log > 0)
        close(d->log);
    *d = (struct virtiofsd){ .log = -1 };
}
