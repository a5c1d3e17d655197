/*
 * Process 1 of the default guest.
 *
 * Mounts the kernel's file systems, loads the modules that /etc/modules lists, then either keeps a shell on the
 * console, or (doppel.run=1) runs the one command that the host sends, with its standard streams carried over ports of
 * the virtio console (protocol.h). It reaps orphans, obeys the power button and the signals of busybox's poweroff, halt
 * and reboot, and ends the machine in order: processes stopped, disks synced and unmounted.
 *
 * With root=DEVICE it only loads the modules, and hands over to the system on that disk (root.h).
 *
 * One thread, one poll() loop, nothing that blocks: every descriptor of a port or a pipe is non-blocking, so that a
 * stalled stream stalls only itself. Left out: services, users, getty. The network is left to a script (/etc/network).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <linux/netlink.h>
#include <mntent.h>
#include <net/if.h>
#include <poll.h>
#include <pty.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"
#include "root.h"

#define CHUNK 65536
#define STOP_MS 2000                                               /* between SIGTERM and SIGKILL at shutdown */
#define OWN_END_MS 200                                          /* the command called poweroff: until it gets SIGTERM */
#define COMMAND_STOP_MS 5000                            /* the same for the command, when the power button is pressed */
#define PORT_RETRY_MS 20
#define PIPE_BYTES (256 << 10)
#define BUTTONS_MAX 8
#define AGENT "/sbin/doppel-agent"
#define ROOT_TAG "doppel-root"
#define ROOT_PLACE "/run/doppel"
#define ROOT ROOT_PLACE "/root"
#define AGENT_AGAIN_MS 1000
#define NEVER INT64_MAX

/* One direction of a stream: what came from src waits in buf until dst takes it. */
struct pump {
    int src, dst;                                                  /* -1: closed */
    bool port_src;                                      /* a port gives 0 while the host has not connected it: no end */
    bool until_empty;                                              /* src ends where nothing is left in it */
    bool eof;                                                     /* src has ended; buf may still hold its last bytes */
    bool broken;                                                   /* nobody reads dst: discard */
    uint64_t limit;                                                /* src ends after so many bytes */
    uint64_t taken, given;                                         /* bytes from src, to dst */
    size_t have, done;                                             /* buf[done, have) waits */
    uint8_t buf[CHUNK];
};

struct ctl {
    int fd;                                                        /* port doppel.ctl, -1: none (yet) */
    uint8_t *in, *out;
    size_t in_len, in_cap, out_len, out_cap;
};

enum command_state { CMD_NONE, CMD_WAITING, CMD_RUNNING, CMD_DRAINING, CMD_SENT };
enum { OUT, ERR };

struct command {
    enum command_state state;
    pid_t pid;
    bool told_ready;                                               /* READY is sent */
    int port[3];                                                   /* stdin, stdout, stderr */
    int master, slave;                                             /* of the terminal, with RUN_TTY; else -1 */
    struct pump in, out[2];
    bool stdin_ended;                                              /* the command was given the end of its input */
    bool stdin_told, eof_told[2];                                  /* STDIN_CLOSED, STDOUT_EOF, STDERR_EOF are sent */
    struct msg_exited exited;
};

struct init {
    int signals, uevents;
    int button[BUTTONS_MAX];
    char button_name[BUTTONS_MAX][32];
    unsigned buttons;
    char console[64];                                              /* "/dev/ttyS0" */
    pid_t network;                                                 /* brings network cards up; 0: has done so */
    bool wait_network;                                             /* the command is not run before */
    pid_t shell;                                                   /* 0: none */
    int64_t shell_at;                                              /* not before, in now_ms() */
    pid_t agent;                                                   /* 0: none */
    int64_t agent_at;                                              /* as shell_at */
    int how;                                                       /* RB_*: the machine is to end so; 0: not */
    int64_t kill_at;                                               /* what still runs then is killed; 0: no haste */
    int kill_with;                                                 /* the command, by this signal */
    bool stopping;                                                 /* all processes were told to end */
    bool other_root;                                               /* shell and command run below ROOT */
    int root_error;                                                /* why they cannot, an errno */
    bool port_down;                                             /* the host has not connected a port: look again soon */
    struct ctl ctl;
    struct command cmd;
};

static void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "init: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    va_end(ap);
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- start of the system ---- */

static void mount_one(const char *type, const char *dir, unsigned long flags, const char *data)
{
    mkdir(dir, 0755);
    if (mount(type, dir, type, flags, data) && errno != EBUSY)
        say("cannot mount %s: %s", dir, strerror(errno));
}

static void mount_all(void)
{
    mount_one("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
    mount_one("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_one("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_one("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
    mount_one("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_one("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
    mount_one("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
    if (symlink("/proc/self/fd", "/dev/fd") || symlink("fd/0", "/dev/stdin") || symlink("fd/1", "/dev/stdout") ||
        symlink("fd/2", "/dev/stderr"))
        say("/dev/fd: %s", strerror(errno));
}

/* The kernel had no /dev/console to give us if its own initramfs was replaced: open it again in any case. */
static void open_stdio(void)
{
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0)
        fd = open("/dev/null", O_RDWR);
    for (int i = 0; i < 3; i++)
        if (fd >= 0 && fd != i)
            dup2(fd, i);
    if (fd > 2)
        close(fd);
}

/* The first line of a small file, without its newline; "" if there is none. */
static void read_line(const char *path, char *buf, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, buf, size - 1);
    if (fd >= 0)
        close(fd);
    buf[n > 0 ? n : 0] = 0;
    buf[strcspn(buf, "\n")] = 0;
}

/* The value of NAME=VALUE on the kernel's command line. */
static bool parameter(const char *name, char *value, size_t size)
{
    char line[65536], *save, *word;
    size_t len = strlen(name);

    read_line("/proc/cmdline", line, sizeof line);
    for (word = strtok_r(line, " ", &save); word; word = strtok_r(NULL, " ", &save))
        if (!strncmp(word, name, len) && word[len] == '=') {
            snprintf(value, size, "%s", word + len + 1);
            return true;
        }
    return false;
}

static bool has_word(const char *wanted)
{
    char line[65536], *save, *word;

    read_line("/proc/cmdline", line, sizeof line);
    for (word = strtok_r(line, " ", &save); word && strcmp(word, wanted);)
        word = strtok_r(NULL, " ", &save);
    return word;
}

static void load_modules(const char *list)
{
    char path[512];
    FILE *f = fopen(list, "re");

    while (f && fgets(path, sizeof path, f)) {
        path[strcspn(path, "\n")] = 0;
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST && errno != ENODEV))
            say("module %s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
    if (f)
        fclose(f);
}

/* ---- the host's root ---- */

static void bind_below_root(const char *what)
{
    char at[256];

    snprintf(at, sizeof at, ROOT "%s", what);
    if (mount(what, at, NULL, MS_BIND | MS_REC, NULL))
        say("%s: %s", at, strerror(errno));
}

/* The modules of the kernel that runs, which the host's root need not have; and names found as the guest's network has them. */
static void bind_own_files(void)
{
    struct utsname u;
    char dir[256], at[300];
    int fd = open("/etc/resolv.conf", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);

    if (fd >= 0)
        close(fd);
    if (!access(ROOT "/etc/resolv.conf", F_OK))
        bind_below_root("/etc/resolv.conf");
    uname(&u);
    snprintf(dir, sizeof dir, "/lib/modules/%s", u.release);
    snprintf(at, sizeof at, ROOT "%s", dir);
    mkdir(ROOT "/lib/modules", 0755);
    if (!mkdir(at, 0755) || errno == EEXIST)
        bind_below_root(dir);
}

/* The host's folder below a tmpfs, by overlayfs. Returns 0 or an errno. */
static int mount_root(const char *type)
{
    static const char *const dirs[] = { ROOT_PLACE, ROOT_PLACE "/lower", ROOT_PLACE "/rw", ROOT, NULL };
    const char *data = !strcmp(type, "9p") ? "trans=virtio,version=9p2000.L,msize=262144,cache=loose" : NULL;

    for (const char *const *d = dirs; *d; d++)
        mkdir(*d, 0755);
    if (mount(ROOT_TAG, ROOT_PLACE "/lower", type, MS_RDONLY, data) || mount("tmpfs", ROOT_PLACE "/rw", "tmpfs", 0, "mode=0755") ||
        mkdir(ROOT_PLACE "/rw/upper", 0755) || mkdir(ROOT_PLACE "/rw/work", 0755) ||
        mount("overlay", ROOT, "overlay", 0,
              "lowerdir=" ROOT_PLACE "/lower,upperdir=" ROOT_PLACE "/rw/upper,workdir=" ROOT_PLACE "/rw/work"))
        return errno;
    for (const char *const *d = (const char *const[]){ "/dev", "/proc", "/sys", NULL }; *d; d++) {
        char at[64];
        snprintf(at, sizeof at, ROOT "%s", *d);
        mkdir(at, 0755);
        bind_below_root(*d);
    }
    mkdir(ROOT "/run", 0755);
    mount("tmpfs", ROOT "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
    bind_own_files();
    return 0;
}

static void find_root(struct init *s)
{
    char type[16];

    if (!parameter("doppel.root", type, sizeof type))
        return;
    load_modules("/etc/modules.root");
    s->other_root = true;
    s->root_error = mount_root(type);
    if (s->root_error)
        say("cannot mount the host's root by %s: %s", type, strerror(s->root_error));
}

/* In a child. Returns 0 or -1 with errno. */
static int enter_root(const struct init *s)
{
    if (!s->other_root)
        return 0;
    errno = s->root_error;
    return s->root_error || chroot(ROOT) || chdir("/") ? -1 : 0;
}

static void name_host(void)
{
    char name[65];
    read_line("/etc/hostname", name, sizeof name);
    if (sethostname(name, strlen(name)))
        say("hostname: %s", strerror(errno));

    struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP };
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s >= 0) {
        if (ioctl(s, SIOCSIFFLAGS, &lo))
            say("lo: %s", strerror(errno));
        close(s);
    }
}

/* The terminal that the kernel uses as console; /dev/console itself cannot be a controlling terminal. */
static void find_console(struct init *s)
{
    char active[256], *last;

    read_line("/sys/class/tty/console/active", active, sizeof active);
    last = strrchr(active, ' ');
    last = last ? last + 1 : active;
    snprintf(s->console, sizeof s->console, "/dev/%.50s", *last ? last : "console");
}

static int open_events(struct init *s)
{
    struct sockaddr_nl nl = { .nl_family = AF_NETLINK, .nl_groups = 1 };
    sigset_t set;

    sigfillset(&set);                                              /* what is not expected stays blocked and harmless */
    sigprocmask(SIG_SETMASK, &set, NULL);
    sigemptyset(&set);
    for (const int *p = (const int[]){ SIGCHLD, SIGTERM, SIGUSR1, SIGUSR2, SIGINT, SIGPWR, 0 }; *p; p++)
        sigaddset(&set, *p);
    s->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    s->uevents = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    if (s->uevents < 0 || bind(s->uevents, (struct sockaddr *)&nl, sizeof nl)) {
        say("uevents: %s", strerror(errno));
        return -1;
    }
    return 0;
}

/* ---- devices that come ---- */

static bool has_power_key(int fd)
{
    uint8_t keys[KEY_MAX / 8 + 1] = { 0 };
    return ioctl(fd, EVIOCGBIT(EV_KEY, sizeof keys), keys) >= 0 && (keys[KEY_POWER / 8] >> (KEY_POWER % 8) & 1);
}

static void find_buttons(struct init *s)
{
    DIR *d = opendir("/dev/input");
    struct dirent *e;

    while (d && (e = readdir(d))) {
        bool known = strncmp(e->d_name, "event", 5) || strlen(e->d_name) >= sizeof s->button_name[0];
        for (unsigned i = 0; i < s->buttons; i++)
            known |= !strcmp(s->button_name[i], e->d_name);
        if (known || s->buttons == BUTTONS_MAX)
            continue;
        int fd = openat(dirfd(d), e->d_name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0)
            continue;
        if (!has_power_key(fd)) {
            close(fd);
            continue;
        }
        strcpy(s->button_name[s->buttons], e->d_name);
        s->button[s->buttons++] = fd;
    }
    if (d)
        closedir(d);
}

/* Opens the port of that name if the host offers it. */
static int open_port(const char *name)
{
    char path[300], found[64];
    DIR *d = opendir("/sys/class/virtio-ports");
    struct dirent *e;
    int fd = -1;

    while (d && fd < 0 && (e = readdir(d))) {
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", e->d_name);
        read_line(path, found, sizeof found);
        if (strcmp(found, name))
            continue;
        snprintf(path, sizeof path, "/dev/%s", e->d_name);
        fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    if (d)
        closedir(d);
    return fd;
}

/* ---- streams ---- */

static bool pump_idle(const struct pump *p)
{
    return p->done == p->have;
}

static void pump_init(struct pump *p, int src, int dst)
{
    p->src = src;
    p->dst = dst;
    p->limit = UINT64_MAX;
    p->eof = src < 0;
    p->broken = dst < 0;
}

static bool pump_fill(struct pump *p)
{
    uint64_t left = p->limit - p->taken;
    ssize_t n = left ? read(p->src, p->buf, left < CHUNK ? left : CHUNK) : 0;

    if (n > 0) {
        p->done = 0;
        p->have = n;
        p->taken += n;
        p->eof = p->taken == p->limit;                       /* now: nothing that still comes would wake us up for it */
        return true;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        p->eof = p->until_empty;
    else
        p->eof = !left || n < 0 || !p->port_src;
    return false;
}

static bool pump_drain(struct pump *p)
{
    ssize_t n = p->broken ? -1 : write(p->dst, p->buf + p->done, p->have - p->done);

    if (n >= 0) {
        p->done += n;
        p->given += n;
        return n > 0;
    }
    if (!p->broken && (errno == EAGAIN || errno == EINTR))
        return false;
    p->broken = true;
    p->done = p->have;
    return true;
}

/* Moves what can be moved now; not for ever, others want their turn. */
static void pump_run(struct pump *p)
{
    for (int round = 0; round < 32; round++) {
        bool moved = false;
        if (pump_idle(p) && !p->eof)
            moved |= pump_fill(p);
        if (!pump_idle(p))
            moved |= pump_drain(p);
        if (!moved)
            return;
    }
}

/* ---- messages ---- */

static bool grow(uint8_t **buf, size_t *cap, size_t need)
{
    if (need <= *cap)
        return true;
    uint8_t *p = realloc(*buf, need);
    if (!p)
        return false;
    *buf = p;
    *cap = need;
    return true;
}

static void ctl_send(struct ctl *c, uint32_t type, const void *payload, uint32_t len)
{
    struct msg_head head = { type, len };

    if (c->fd < 0 || !grow(&c->out, &c->out_cap, c->out_len + sizeof head + len))
        return;
    memcpy(c->out + c->out_len, &head, sizeof head);
    if (len)
        memcpy(c->out + c->out_len + sizeof head, payload, len);
    c->out_len += sizeof head + len;
}

static void ctl_flush(struct ctl *c)
{
    while (c->fd >= 0 && c->out_len) {
        ssize_t n = write(c->fd, c->out, c->out_len);
        if (n <= 0)
            return;
        c->out_len -= n;
        memmove(c->out, c->out + n, c->out_len);
    }
}

/* ---- the end of the system ---- */

/* Block devices are left clean: mounts are undone in the opposite order; what is still in use becomes read-only. */
static void unmount_all(void)
{
    struct mount_point { struct mount_point *next; char dir[]; } *list = NULL, *m;
    static const char *const keep[] = { "rootfs", "proc", "sysfs", "devtmpfs", "devpts", "tmpfs", "cgroup",
                                        "cgroup2", NULL };
    FILE *f = setmntent("/proc/self/mounts", "re");
    struct mntent *e;

    while (f && (e = getmntent(f))) {
        const char *const *k = keep;
        while (*k && strcmp(*k, e->mnt_type))
            k++;
        if (*k || !(m = malloc(sizeof *m + strlen(e->mnt_dir) + 1)))
            continue;
        strcpy(m->dir, e->mnt_dir);
        m->next = list;
        list = m;
    }
    if (f)
        endmntent(f);
    for (m = list; m; m = m->next)
        if (umount2(m->dir, 0) && mount(NULL, m->dir, NULL, MS_REMOUNT | MS_RDONLY, NULL))
            say("cannot unmount %s: %s", m->dir, strerror(errno));
}

static void finish(struct init *s)
{
    sync();
    unmount_all();
    sync();
    if (reboot(s->how))
        say("reboot: %s", strerror(errno));
    for (;;)
        pause();                                                   /* halted */
}

/* Tells every process to end; finish() follows when none is left, or when they had their time. */
static void stop_all(struct init *s)
{
    s->stopping = true;
    kill(-1, SIGTERM);
    kill(-1, SIGHUP);                                              /* interactive shells ignore SIGTERM */
    kill(-1, SIGCONT);
    s->kill_at = now_ms() + STOP_MS;
}

/* The power button, or (own) poweroff, reboot, halt. A command is asked to end first, so that its status still reaches
 * the host. */
static void end_request(struct init *s, int how, bool own)
{
    bool again = s->how;

    s->how = how;
    if (s->stopping || (again && s->kill_at))
        return;
    if (s->cmd.state < CMD_RUNNING) {
        stop_all(s);
        return;
    }
    s->kill_with = SIGTERM;
    s->kill_at = now_ms() + (own ? OWN_END_MS : 0);                /* "poweroff" itself has a status too */
}

/* Time is up for what still runs. */
static void kill_rest(struct init *s)
{
    if (s->stopping) {
        kill(-1, SIGKILL);
        for (int i = 0; i < 100 && waitpid(-1, NULL, WNOHANG) >= 0; i++)
            usleep(i * 200);                                      /* one that hangs in the kernel does not hold us up */
        finish(s);
    } else if (s->cmd.state == CMD_RUNNING) {
        kill(-s->cmd.pid, s->kill_with);
        kill(-s->cmd.pid, SIGCONT);
        s->kill_with = SIGKILL;
        s->kill_at = now_ms() + COMMAND_STOP_MS;
    } else if (s->kill_with == SIGTERM) {
        s->kill_with = SIGKILL;
        s->kill_at = now_ms() + COMMAND_STOP_MS;                   /* it has ended; this is for what it has written */
    } else {
        stop_all(s);
    }
}

/* ---- the shell ---- */

static void set_winsize(const char *tty, int fd, unsigned rows, unsigned cols)
{
    struct winsize w = { .ws_row = rows, .ws_col = cols };
    int own = fd < 0 ? open(tty, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC) : -1;

    ioctl(fd < 0 ? own : fd, TIOCSWINSZ, &w);
    close_fd(&own);
}

static void child_defaults(void)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
}

static bool has_network_card(void)
{
    char path[300], class[16];
    DIR *d = opendir("/sys/bus/pci/devices");
    struct dirent *e;
    bool found = false;

    while (d && !found && (e = readdir(d))) {
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/class", e->d_name);
        read_line(path, class, sizeof class);
        found = !strcmp(class, "0x020000");
    }
    if (d)
        closedir(d);
    return found;
}

/* Drivers and addresses take a while, which nobody waits for who did not say so; what a person sees first comes first. */
static void network_start(struct init *s)
{
    char mode[16];

    if (!has_network_card())
        return;
    s->network = fork();
    if (s->network)
        return;
    child_defaults();
    if (!s->wait_network && nice(5) < 0)
        say("nice: %s", strerror(errno));
    load_modules("/etc/modules.net");
    if (parameter("doppel.net", mode, sizeof mode) && !strcmp(mode, "off"))
        _exit(0);
    execl("/etc/network", "network", NULL);
    say("/etc/network: %s", strerror(errno));
    _exit(127);
}

static void shell_start(struct init *s)
{
    s->shell_at = now_ms() + 1000;                              /* one that ends at once is not started again at once */
    s->shell = fork();
    if (s->shell)
        return;
    child_defaults();
    int fd = open(s->console, O_RDWR);
    if (fd >= 0) {
        ioctl(fd, TIOCSCTTY, 1);
        for (int i = 0; i < 3; i++)
            dup2(fd, i);
        if (fd > 2)
            close(fd);
    }
    if (enter_root(s) || chdir("/root"))
        say("/root: %s", strerror(errno));
    execl("/bin/sh", "-sh", NULL);
    say("/bin/sh: %s", strerror(errno));
    _exit(127);
}

/* ---- the agent ---- */

/* For doppel exec and cp. It and its modules come when nothing else has work to do, so that the shell or the command does not wait for them. */
static void agent_start(struct init *s)
{
    s->agent_at = now_ms() + AGENT_AGAIN_MS;
    s->agent = fork();
    if (s->agent)
        return;
    child_defaults();
    sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){ 0 });
    int fd = open("/dev/null", O_RDWR);
    for (int i = 0; i < 3; i++)
        dup2(fd, i);
    load_modules("/etc/modules.late");
    sched_setscheduler(0, SCHED_OTHER, &(struct sched_param){ 0 });
    execl(AGENT, AGENT, NULL);
    _exit(1);
}

static bool agent_wanted(const struct init *s)
{
    return !s->agent && !s->stopping && (s->cmd.state == CMD_NONE ? s->shell != 0 : s->cmd.state == CMD_RUNNING);
}

/* ---- the command ---- */

static void command_ended(struct init *s, enum exit_how how, uint32_t code)
{
    struct command *c = &s->cmd;

    if (c->state != CMD_WAITING && c->state != CMD_RUNNING)
        return;
    c->exited = (struct msg_exited){ .how = how, .code = code };
    c->state = CMD_DRAINING;
    c->in.eof = c->in.broken = true;
    /* What the command wrote is in the pipes now. Others may hold them open and write on: that is not waited for. */
    for (int i = OUT; i <= ERR; i++) {
        struct pump *p = &c->out[i];
        int left = 0;
        if (p->eof)
            continue;
        p->until_empty = true;
        if (c->master >= 0)
            p->limit = p->taken + (1 << 20);                       /* a terminal does not tell how much it holds */
        else if (ioctl(p->src, FIONREAD, &left) == 0)
            p->limit = p->taken + left;
    }
}

static void output_closed(struct init *s, int which)
{
    struct command *c = &s->cmd;
    struct pump *p = &c->out[which];

    p->eof = p->broken = true;
    p->done = p->have;
    if (c->master < 0)
        close_fd(&p->src);                                         /* SIGPIPE for who writes */
    else if (c->state == CMD_RUNNING)
        kill(-c->pid, SIGHUP);                                     /* the terminal is gone */
}

/* The command's side of its streams. fd[i] -1: none. Returns false with errno. */
static bool open_streams(struct command *c, const struct msg_run *run, int fd[3])
{
    int p[2];

    if (run->flags & RUN_TTY) {
        struct winsize w = { .ws_row = run->rows, .ws_col = run->cols };
        if (openpty(&c->master, &c->slave, NULL, NULL, run->rows && run->cols ? &w : NULL))
            return false;
        fcntl(c->master, F_SETFD, FD_CLOEXEC);
        fcntl(c->slave, F_SETFD, FD_CLOEXEC);                  /* kept open: no hang-up while nobody else has it open */
        fcntl(c->master, F_SETFL, O_RDWR | O_NONBLOCK);
        fd[0] = fd[1] = fd[2] = c->slave;
        pump_init(&c->in, c->port[0], fcntl(c->master, F_DUPFD_CLOEXEC, 3));
        c->in.port_src = true;
        pump_init(&c->out[OUT], c->master, c->port[1]);
        pump_init(&c->out[ERR], -1, c->port[2]);
        return true;
    }
    if (pipe2(p, O_CLOEXEC))
        return false;
    fcntl(p[1], F_SETFL, O_WRONLY | O_NONBLOCK);
    fd[0] = p[0];
    pump_init(&c->in, c->port[0], p[1]);
    c->in.port_src = true;
    if (run->flags & RUN_STDIN_CLOSED)
        c->in.limit = 0;
    for (int i = OUT; i <= ERR; i++) {
        if (pipe2(p, O_CLOEXEC))
            return false;
        fcntl(p[0], F_SETFL, O_RDONLY | O_NONBLOCK);
        fcntl(p[0], F_SETPIPE_SZ, PIPE_BYTES);
        fd[1 + i] = p[1];
        if (run->flags & (i == OUT ? RUN_STDOUT_CLOSED : RUN_STDERR_CLOSED))
            close_fd(&p[0]);
        pump_init(&c->out[i], p[0], c->port[1 + i]);
    }
    return true;
}

static void command_exec(const struct init *s, const int fd[3], bool tty, const char *dir, char **argv, char **env, int report)
{
    child_defaults();
    for (int i = 0; i < 3; i++)
        dup2(fd[i], i);
    if (tty)
        ioctl(0, TIOCSCTTY, 1);
    clearenv();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", "/root", 1);
    setenv("USER", "root", 1);
    setenv("SHELL", "/bin/sh", 1);
    for (; *env; env++)
        putenv(*env);
    if (!enter_root(s) && !chdir(*dir ? dir : "/root"))
        execvp(argv[0], argv);
    int error = errno;
    (void)!write(report, &error, sizeof error);
    _exit(126);
}

/* Starts the command; returns 0 or an errno. */
static int command_spawn(struct init *s, const struct msg_run *run, const char *dir, char **argv, char **env)
{
    struct command *c = &s->cmd;
    int fd[3] = { -1, -1, -1 }, report[2] = { -1, -1 }, error = 0;

    if (!open_streams(c, run, fd) || pipe2(report, O_CLOEXEC) || (c->pid = fork()) < 0)
        error = errno;
    else if (c->pid == 0)
        command_exec(s, fd, run->flags & RUN_TTY, dir, argv, env, report[1]);
    if (c->slave < 0)
        for (int i = 0; i < 3; i++)
            close_fd(&fd[i]);
    close_fd(&report[1]);
    if (!error && read(report[0], &error, sizeof error) <= 0)      /* closed by a successful exec */
        error = 0;
    close_fd(&report[0]);
    if (!error)
        c->state = CMD_RUNNING;
    return error;
}

static void command_run(struct init *s, const char *payload, uint32_t len)
{
    struct msg_run run;
    int error = EPROTO;

    if (s->cmd.state != CMD_WAITING)
        return;
    if (len < sizeof run)
        return command_ended(s, EXIT_PROTOCOL, EPROTO);
    memcpy(&run, payload, sizeof run);
    const char *p = payload + sizeof run, *end = payload + len;
    uint64_t strings = 1ull + run.argc + run.envc, n;

    if (!run.argc || strings > len - sizeof run)
        return command_ended(s, EXIT_PROTOCOL, EPROTO);
    char **list = calloc(strings + 2, sizeof *list), **slot = list;
    for (n = 0; list && n < strings && p < end; n++) {
        size_t max = end - p, size = strnlen(p, max) + 1;
        if (size > max)
            break;
        *slot++ = (char *)p;
        if (n == run.argc)
            slot++;                                                /* the NULL that ends argv */
        p += size;
    }
    if (list && n == strings && p == end) {
        error = command_spawn(s, &run, list[0], list + 1, list + run.argc + 2);
        if (error)
            command_ended(s, EXIT_EXEC, error);
    } else {
        command_ended(s, EXIT_PROTOCOL, list ? EPROTO : ENOMEM);
    }
    free(list);
}

/* Never back: what is a little late on its way here is not worth a clock that jumps. */
static void clock_forward(uint64_t ns)
{
    struct timespec now, t = { .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };

    clock_gettime(CLOCK_REALTIME, &now);
    if (t.tv_sec > now.tv_sec || (t.tv_sec == now.tv_sec && t.tv_nsec > now.tv_nsec))
        clock_settime(CLOCK_REALTIME, &t);
}

static void ctl_message(struct init *s, uint32_t type, const uint8_t *payload, uint32_t len)
{
    struct command *c = &s->cmd;
    struct msg_count count;
    struct msg_winsize w;
    struct msg_signal sig;
    struct msg_time now;

    switch (type) {
    case MSG_RUN:
        command_run(s, (const char *)payload, len);
        break;
    case MSG_STDIN_EOF:
        if (len >= sizeof count) {
            memcpy(&count, payload, sizeof count);
            c->in.limit = count.bytes > c->in.taken ? count.bytes : c->in.taken;
        }
        break;
    case MSG_STDOUT_CLOSED:
        output_closed(s, OUT);
        break;
    case MSG_STDERR_CLOSED:
        output_closed(s, ERR);
        break;
    case MSG_WINSIZE:
        if (len >= sizeof w) {
            memcpy(&w, payload, sizeof w);
            if (c->state == CMD_NONE || c->master >= 0)
                set_winsize(s->console, c->master, w.rows, w.cols);
        }
        break;
    case MSG_SIGNAL:
        if (len >= sizeof sig && c->state == CMD_RUNNING) {
            memcpy(&sig, payload, sizeof sig);
            if (sig.signal >= 1 && sig.signal <= 64)
                kill(-c->pid, sig.signal);
        }
        break;
    case MSG_TIME:
        if (len >= sizeof now) {
            memcpy(&now, payload, sizeof now);
            clock_forward(now.ns);
        }
        break;
    case MSG_DONE:
        if (c->state == CMD_SENT && !s->stopping) {
            s->how = s->how ? s->how : RB_POWER_OFF;
            stop_all(s);
        }
        break;
    }
}

static void ctl_read(struct init *s)
{
    struct ctl *c = &s->ctl;
    struct msg_head head;

    for (;;) {
        if (!grow(&c->in, &c->in_cap, c->in_len + 4096))
            return;
        ssize_t n = read(c->fd, c->in + c->in_len, c->in_cap - c->in_len);
        if (n <= 0)
            return;
        c->in_len += n;

        size_t used = 0;
        while (c->in_len - used >= sizeof head) {
            memcpy(&head, c->in + used, sizeof head);
            if (head.len > MSG_MAX) {
                command_ended(s, EXIT_PROTOCOL, EMSGSIZE);
                c->in_len = 0;
                return;
            }
            if (c->in_len - used - sizeof head < head.len)
                break;
            ctl_message(s, head.type, c->in + used + sizeof head, head.len);
            used += sizeof head + head.len;
        }
        memmove(c->in, c->in + used, c->in_len - used);
        c->in_len -= used;
    }
}

static void command_input(struct init *s)
{
    struct command *c = &s->cmd;
    struct pump *p = &c->in;

    pump_run(p);
    if (p->broken && !c->stdin_told) {
        c->stdin_told = c->stdin_ended = true;
        close_fd(&p->dst);
        ctl_send(&s->ctl, MSG_STDIN_CLOSED, NULL, 0);
    }
    if (!p->eof || !pump_idle(p) || c->stdin_ended)
        return;
    c->stdin_ended = true;
    if (c->master >= 0) {                                          /* a terminal's end of file is a character */
        p->buf[0] = CEOF;
        p->done = 0;
        p->have = 1;
    } else {
        close_fd(&p->dst);
    }
}

/* Moves the command's streams, and tells the host where they end. */
static void command_step(struct init *s)
{
    static const uint32_t eof_type[] = { MSG_STDOUT_EOF, MSG_STDERR_EOF };
    struct command *c = &s->cmd;
    bool drained = true;

    if (c->state != CMD_RUNNING && c->state != CMD_DRAINING)
        return;
    if (c->state == CMD_RUNNING)
        command_input(s);
    for (int i = OUT; i <= ERR; i++) {
        struct pump *p = &c->out[i];
        if (p->src >= 0)
            pump_run(p);
        bool ended = p->eof && pump_idle(p);
        drained &= ended;
        if (ended && c->state == CMD_RUNNING && !c->eof_told[i] && !p->broken && c->master < 0) {
            c->eof_told[i] = true;
            ctl_send(&s->ctl, eof_type[i], &(struct msg_count){ p->given }, sizeof(struct msg_count));
        }
        if (ended && c->master < 0)
            close_fd(&p->src);
    }
    if (c->state == CMD_DRAINING && drained) {
        c->exited.stdout_bytes = c->out[OUT].given;
        c->exited.stderr_bytes = c->out[ERR].given;
        ctl_send(&s->ctl, MSG_EXITED, &c->exited, sizeof c->exited);
        c->state = CMD_SENT;
    }
}

/* Opens the ports that are there by now; READY goes out with the last one. */
/* The host says then what to run. */
static void tell_ready(struct init *s)
{
    struct command *c = &s->cmd;

    if (c->state != CMD_WAITING || c->told_ready || s->ctl.fd < 0 || c->port[0] < 0 || c->port[1] < 0 || c->port[2] < 0 ||
        (s->wait_network && s->network))
        return;
    c->told_ready = true;
    ctl_send(&s->ctl, MSG_READY, &(struct msg_ready){ PROTOCOL_VERSION }, sizeof(struct msg_ready));
}

static void find_ports(struct init *s)
{
    static const char *const name[] = { PORT_STDIN, PORT_STDOUT, PORT_STDERR };
    struct command *c = &s->cmd;

    if (s->ctl.fd < 0)
        s->ctl.fd = open_port(PORT_CTL);
    if (c->state != CMD_WAITING || c->port[2] >= 0)
        return;
    for (int i = 0; i < 3; i++)
        if (c->port[i] < 0)
            c->port[i] = open_port(name[i]);
    tell_ready(s);
}

/* ---- the loop ---- */

static void reap(struct init *s)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == s->shell)
            s->shell = 0;
        if (pid == s->network) {
            s->network = 0;
            tell_ready(s);
        }
        if (pid == s->agent) {
            s->agent = 0;
            if (WIFEXITED(status))
                s->agent_at = NEVER;                               /* it cannot work here */
        }
        if (pid == s->cmd.pid && s->cmd.state == CMD_RUNNING)
            command_ended(s, WIFSIGNALED(status) ? EXIT_SIGNAL : EXIT_STATUS,
                          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    }
    if (s->stopping && pid < 0 && errno == ECHILD)
        finish(s);
}

static void on_signals(struct init *s)
{
    struct signalfd_siginfo info;

    while (read(s->signals, &info, sizeof info) == sizeof info)
        switch (info.ssi_signo) {
        case SIGUSR1:
            end_request(s, RB_HALT_SYSTEM, true);
            break;
        case SIGUSR2:
        case SIGPWR:
            end_request(s, RB_POWER_OFF, true);
            break;
        case SIGTERM:
        case SIGINT:                                               /* Ctrl-Alt-Del */
            end_request(s, RB_AUTOBOOT, true);
            break;
        }
    reap(s);
}

static void on_uevents(struct init *s)
{
    char buf[4096];
    bool input = false, port = false;
    ssize_t n;

    while ((n = recv(s->uevents, buf, sizeof buf, 0)) > 0 || (n < 0 && errno == ENOBUFS)) {
        input |= n < 0 || memmem(buf, n, "SUBSYSTEM=input", 15);
        port |= n < 0 || memmem(buf, n, "SUBSYSTEM=virtio-ports", 22);
    }
    if (input)
        find_buttons(s);
    if (port)
        find_ports(s);
}

static void on_buttons(struct init *s)
{
    struct input_event e;

    for (unsigned i = 0; i < s->buttons; i++)
        while (read(s->button[i], &e, sizeof e) == sizeof e)
            if (e.type == EV_KEY && e.code == KEY_POWER && e.value == 1)
                end_request(s, RB_POWER_OFF, false);
}

struct watch {
    struct pollfd fd[8 + BUTTONS_MAX + 2 * 3];
    nfds_t n;
};

static void watch(struct watch *w, int fd, short events)
{
    if (fd >= 0)
        w->fd[w->n++] = (struct pollfd){ .fd = fd, .events = events };
}

static void watch_pump(struct watch *w, const struct pump *p, bool ports)
{
    if (pump_idle(p)) {
        if (!p->eof && (ports || !p->port_src))
            watch(w, p->src, POLLIN);
        if (p->port_src && !p->broken)
            watch(w, p->dst, 0);                                   /* the command closes its input: POLLERR */
    } else if (ports || p->port_src) {
        watch(w, p->dst, POLLOUT);
    }
}

/* Waits for the next event, the next deadline, or for ports that were down a moment ago. */
static void wait_events(struct init *s)
{
    struct command *c = &s->cmd;
    struct watch w = { .n = 0 };
    int64_t timeout = s->kill_at ? s->kill_at - now_ms() : -1;
    bool ports = !s->port_down;

    if (s->cmd.state == CMD_NONE && !s->shell && !s->stopping)
        timeout = s->shell_at - now_ms();
    if (timeout < 0 && (s->kill_at || (s->cmd.state == CMD_NONE && !s->shell && !s->stopping)))
        timeout = 0;
    if (agent_wanted(s) && s->agent_at != NEVER) {
        int64_t left = s->agent_at - now_ms();
        if (left < 0)
            left = 0;
        if (timeout < 0 || timeout > left)
            timeout = left;
    }
    watch(&w, s->signals, POLLIN);
    watch(&w, s->uevents, POLLIN);
    for (unsigned i = 0; i < s->buttons; i++)
        watch(&w, s->button[i], POLLIN);
    if (ports)
        watch(&w, s->ctl.fd, POLLIN | (s->ctl.out_len ? POLLOUT : 0));
    else if (timeout < 0 || timeout > PORT_RETRY_MS)
        timeout = PORT_RETRY_MS;
    if (c->state == CMD_RUNNING)
        watch_pump(&w, &c->in, ports);
    if (c->state == CMD_RUNNING || c->state == CMD_DRAINING)
        for (int i = OUT; i <= ERR; i++)
            watch_pump(&w, &c->out[i], ports);

    s->port_down = false;
    if (poll(w.fd, w.n, timeout) <= 0)
        return;
    for (nfds_t i = 0; i < w.n; i++) {
        int fd = w.fd[i].fd;
        bool port = fd == s->ctl.fd || fd == c->port[0] || fd == c->port[1] || fd == c->port[2];
        s->port_down |= port && w.fd[i].revents & (POLLHUP | POLLERR);
        c->in.broken |= fd == c->in.dst && w.fd[i].revents & POLLERR;
    }
}

static void run(struct init *s)
{
    for (;;) {
        on_signals(s);
        on_uevents(s);
        on_buttons(s);
        if (s->ctl.fd >= 0)
            ctl_read(s);
        command_step(s);
        ctl_flush(&s->ctl);
        if (s->kill_at && now_ms() >= s->kill_at)
            kill_rest(s);
        if (s->cmd.state == CMD_NONE && !s->shell && !s->stopping && now_ms() >= s->shell_at)
            shell_start(s);
        if (agent_wanted(s) && now_ms() >= s->agent_at)
            agent_start(s);
        if (s->stopping)
            reap(s);                                               /* nobody may be left to wait for */
        wait_events(s);
    }
}

int main(void)
{
    struct init *s = calloc(1, sizeof *s);
    char rows[16] = "0", cols[16] = "0", mode[16] = "0", root[256], program[256];

    if (getpid() != 1 || !s) {
        fprintf(stderr, "init: this is the first process of doppel's guest; not to be run otherwise\n");
        return 1;
    }
    mount_all();
    open_stdio();
    reboot(RB_DISABLE_CAD);
    s->ctl.fd = s->cmd.port[0] = s->cmd.port[1] = s->cmd.port[2] = s->cmd.master = s->cmd.slave = -1;
    pump_init(&s->cmd.in, -1, -1);
    pump_init(&s->cmd.out[OUT], -1, -1);
    pump_init(&s->cmd.out[ERR], -1, -1);
    open_events(s);
    load_modules("/etc/modules");
    if (parameter("root", root, sizeof root)) {
        if (!parameter("init", program, sizeof program))
            strcpy(program, "/sbin/init");
        root_boot(root, has_word("rw"), program);
        return 1;                                                  /* the kernel panics */
    }
    name_host();
    find_root(s);
    find_console(s);
    if (parameter("doppel.rows", rows, sizeof rows) && parameter("doppel.cols", cols, sizeof cols))
        set_winsize(s->console, -1, atoi(rows), atoi(cols));
    if (parameter("doppel.run", mode, sizeof mode) && !strcmp(mode, "1"))
        s->cmd.state = CMD_WAITING;
    s->wait_network = s->cmd.state == CMD_WAITING && parameter("doppel.net", mode, sizeof mode) && !strcmp(mode, "wait");
    network_start(s);
    find_buttons(s);                                               /* first: the host may press once a port is open */
    find_ports(s);
    run(s);
}
