/*
 * The command of `doppel run -- COMMAND` in the guest (protocol.h): the host's messages, the command's process, and its streams between pipes (or a
 * pseudo-terminal) and ports of the virtio console. Every descriptor is non-blocking: a stalled stream stalls only itself.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "init.h"
#include "root.h"

#define PIPE_BYTES (256 << 10)

/* ---- streams ---- */

bool pump_idle(const struct pump *p)
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

void ctl_flush(struct ctl *c)
{
    while (c->fd >= 0 && c->out_len) {
        ssize_t n = write(c->fd, c->out, c->out_len);
        if (n <= 0)
            return;
        c->out_len -= n;
        memmove(c->out, c->out + n, c->out_len);
    }
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

/* ---- the command ---- */

void command_ended(struct init *s, enum exit_how how, uint32_t code)
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
    if (!root_enter(s) && (!chdir(*dir ? dir : "/root") || (!*dir && !chdir("/"))))
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

void command_read(struct init *s)
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

void command_step(struct init *s)
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

/* The host says then what to run. */
void command_ready(struct init *s)
{
    struct command *c = &s->cmd;

    if (c->state != CMD_WAITING || c->told_ready || s->ctl.fd < 0 || c->port[0] < 0 || c->port[1] < 0 || c->port[2] < 0 ||
        (s->wait_network && s->network))
        return;
    c->told_ready = true;
    ctl_send(&s->ctl, MSG_READY, &(struct msg_ready){ PROTOCOL_VERSION }, sizeof(struct msg_ready));
}

void command_find_ports(struct init *s)
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
    command_ready(s);
}

void command_init(struct init *s)
{
    struct command *c = &s->cmd;

    s->ctl.fd = c->port[0] = c->port[1] = c->port[2] = c->master = c->slave = -1;
    pump_init(&c->in, -1, -1);
    pump_init(&c->out[OUT], -1, -1);
    pump_init(&c->out[ERR], -1, -1);
}
