/*
 * Process 1 of the default guest.
 *
 * Mounts the kernel's file systems, loads the modules that /etc/modules lists, then either keeps a shell on the
 * console, or (doppel.run=1) runs the one command that the host sends, with its standard streams carried over ports of
 * the virtio console (protocol.h). It reaps orphans, obeys the power button and the signals of busybox's poweroff, halt
 * and reboot, and ends the machine in order: processes stopped, disks synced and unmounted.
 *
 * With root=DEVICE it only loads the modules, and hands over to the system on that disk (root.h); or, when there is a command, runs it there.
 *
 * One thread, one poll() loop, nothing that blocks. Left out: services, users, getty. The network is left to a script (/etc/network).
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
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "init.h"
#include "root.h"

#define STOP_MS 2000                                               /* between SIGTERM and SIGKILL at shutdown */
#define OWN_END_MS 200                                          /* the command called poweroff: until it gets SIGTERM */
#define COMMAND_STOP_MS 5000                            /* the same for the command, when the power button is pressed */
#define PORT_RETRY_MS 20
#define AGENT "/sbin/doppel-agent"
#define AGENT_AGAIN_MS 1000
#define NEVER INT64_MAX

void say(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "init: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    va_end(ap);
}

int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

void close_fd(int *fd)
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
void read_line(const char *path, char *buf, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, buf, size - 1);
    if (fd >= 0)
        close(fd);
    buf[n > 0 ? n : 0] = 0;
    buf[strcspn(buf, "\n")] = 0;
}

bool parameter(const char *name, char *value, size_t size)
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

bool has_word(const char *wanted)
{
    char line[65536], *save, *word;

    read_line("/proc/cmdline", line, sizeof line);
    for (word = strtok_r(line, " ", &save); word && strcmp(word, wanted);)
        word = strtok_r(NULL, " ", &save);
    return word;
}

void load_modules(const char *list)
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
void stop_all(struct init *s)
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

void set_winsize(const char *tty, int fd, unsigned rows, unsigned cols)
{
    struct winsize w = { .ws_row = rows, .ws_col = cols };
    int own = fd < 0 ? open(tty, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC) : -1;

    ioctl(fd < 0 ? own : fd, TIOCSWINSZ, &w);
    close_fd(&own);
}

void child_defaults(void)
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
    if (root_enter(s) || chdir("/root"))
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
    fd = open(AGENT, O_RDONLY | O_CLOEXEC);                        /* linked statically: it runs in any root */
    if (fd >= 0 && !root_enter(s))
        fexecve(fd, (char *[]){ AGENT, NULL }, environ);
    _exit(1);
}

static bool agent_wanted(const struct init *s)
{
    return !s->agent && !s->stopping && (s->cmd.state == CMD_NONE ? s->shell != 0 : s->cmd.state == CMD_RUNNING);
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
            command_ready(s);
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
        command_find_ports(s);
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
            command_read(s);
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
    command_init(s);
    open_events(s);
    load_modules("/etc/modules");
    if (parameter("doppel.run", mode, sizeof mode) && !strcmp(mode, "1"))
        s->cmd.state = CMD_WAITING;
    if (parameter("root", root, sizeof root) && s->cmd.state == CMD_NONE) {
        if (!parameter("init", program, sizeof program))
            strcpy(program, "/sbin/init");
        root_boot(root, has_word("rw"), program);
        return 1;                                                  /* the kernel panics */
    }
    name_host();
    root_find(s);
    find_console(s);
    if (parameter("doppel.rows", rows, sizeof rows) && parameter("doppel.cols", cols, sizeof cols))
        set_winsize(s->console, -1, atoi(rows), atoi(cols));
    s->wait_network = s->cmd.state == CMD_WAITING && parameter("doppel.net", mode, sizeof mode) && !strcmp(mode, "wait");
    network_start(s);
    find_buttons(s);                                               /* first: the host may press once a port is open */
    command_find_ports(s);
    run(s);
}
