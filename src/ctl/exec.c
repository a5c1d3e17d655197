/*
 * doppel exec (exec.h): standard streams, signals and the window's size of this process, for a command that the guest's agent runs
 * (agent/protocol.h). Exit statuses are those of doppel run -- COMMAND.
 *
 * One poll() loop. Standard input is read as far as the window lets it; standard output and error are written in pieces that do not block once
 * poll() has said so, and while a piece waits no more is taken from the agent.
 */
#define _GNU_SOURCE
#include "ctl/exec.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/err.h"
#include "ctl/agent.h"
#include "ctl/message.h"
#include "ctl/run.h"
#include "ctl/run_state.h"
#include "ctl/terminal.h"

#define WAIT_SECONDS 30                                            /* for the agent of a guest that boots */
#define INTERRUPTS_MAX 3

struct exec_options {
    bool tty;
    const char *user;
    u64 wait_seconds;
    char **command;
};

struct exec {
    struct exec_options options;
    const char *name;
    u32 closed_streams;                                            /* as run_reserve_streams() */
    int conn, signals;
    bool in_ended, in_closed;                                      /* we have read all; the command reads no more */
    u32 window;                                                    /* bytes of input that the agent will take */
    struct msg_head head;                                          /* a message that comes in, head_len bytes of it so far */
    u32 head_len, payload_len;
    u8 payload[AGENT_DATA_MAX];
    u32 written;                                                   /* of payload, while `out` is a descriptor */
    int out;                                                       /* where payload goes; -1: nothing waits */
    bool closed[3];                                                /* nobody reads our standard output (error) */
    bool lost;                                                     /* output could not be written */
    unsigned interrupts;
    int status;                                                    /* -1: not known */
    bool broken;
    bool background;                                               /* the terminal is not ours to read or set */
};

static int set_tty(void *target, const char *value UNUSED)
{
    ((struct exec_options *)target)->tty = true;
    return 0;
}

static int set_user(void *target, const char *value)
{
    ((struct exec_options *)target)->user = value;
    return 0;
}

static int set_wait(void *target, const char *value)
{
    u64 *n = &((struct exec_options *)target)->wait_seconds;
    if (parse_unsigned(value, n) < 0 || *n > 86400)
        return err(-EINVAL, "--wait %.100s: not a number of seconds, 0 to 86400", value);
    return 0;
}

const struct option exec_option_table[] = {
    {"tty", NULL, "Also -t: the command gets a terminal, which this one is joined to.", false, set_tty},
    {"user", "USER", "Also -u USER: as this user of the guest, by name or number, with his groups and in his home. Default: root.", false, set_user},
    {"wait", "SECONDS", "How long the guest's agent is waited for, while the guest boots. Default: 30.", false, set_wait},
};
const unsigned exec_option_rows = ARRAY_SIZE(exec_option_table);

/* --- to the agent --- */

static void tell(struct exec *e, u32 type, const void *payload, u32 len)
{
    if (!e->broken && !agent_send(e->conn, type, payload, len))
        e->broken = true;
}

static void tell_size(struct exec *e)
{
    struct msg_winsize w;
    u16 cols, rows;
    if (!e->options.tty || !terminal_size(STDOUT_FILENO, &cols, &rows))
        return;
    w = (struct msg_winsize){.rows = rows, .cols = cols};
    tell(e, MSG_WINSIZE, &w, sizeof(w));
}

static size_t add_string(char *buf, size_t at, size_t size, const char *s)
{
    size_t len = strlen(s) + 1;
    if (at + len <= size)
        memcpy(buf + at, s, len);
    return at + len;
}

/* The request: twice the same walk, for its length and for its bytes. */
static size_t compose(const struct exec *e, const struct msg_run *run, const char *term, char *buf, size_t size)
{
    size_t at = sizeof(*run);
    if (size >= at)
        memcpy(buf, run, at);
    at = add_string(buf, at, size, "");
    at = add_string(buf, at, size, e->options.user ? e->options.user : "");
    for (char **w = e->options.command; *w; w++)
        at = add_string(buf, at, size, *w);
    return *term ? add_string(buf, at, size, term) : at;
}

static bool is_open(const struct exec *e, int fd)
{
    return !(e->closed_streams & 1u << fd);
}

static int request(struct exec *e)
{
    struct msg_run run = {.flags = e->options.tty ? RUN_TTY : 0};
    char term[128] = "", *buf;
    const char *kind = getenv("TERM");
    if (e->options.tty) {
        if (terminal_size(STDOUT_FILENO, &run.cols, &run.rows) && kind && strlen(kind) < 64)
            snprintf(term, sizeof(term), "TERM=%s", kind);
    } else {
        run.flags |= (is_open(e, STDIN_FILENO) ? 0 : RUN_STDIN_CLOSED) | (is_open(e, STDOUT_FILENO) ? 0 : RUN_STDOUT_CLOSED) |
                     (is_open(e, STDERR_FILENO) ? 0 : RUN_STDERR_CLOSED);
    }
    while (e->options.command[run.argc])
        run.argc++;
    run.envc = *term != '\0';
    size_t len = compose(e, &run, term, NULL, 0);
    if (len > MSG_MAX)
        return err(-E2BIG, "the command's words have %zu bytes; they must stay below %u", len, MSG_MAX);
    buf = malloc(len);
    if (!buf)
        return err(-ENOMEM, "no memory for the command's words");
    compose(e, &run, term, buf, len);
    tell(e, AGENT_EXEC, buf, (u32)len);
    free(buf);
    return 0;
}

/* --- from the agent --- */

static void exited(struct exec *e)
{
    struct msg_exited m;
    memcpy(&m, e->payload, sizeof(m));
    if (m.how == EXIT_STATUS && m.code <= 255) {
        e->status = (int)m.code;
    } else if (m.how == EXIT_SIGNAL && m.code >= 1 && m.code <= 64) {
        e->status = 128 + (int)m.code;
    } else if (m.how == EXIT_EXEC && m.code <= 4096) {
        e->status = m.code == ENOENT ? 127 : 126;
        message_error("%.100s: cannot be run in the guest: %s", e->options.command[0], strerror((int)m.code));
    } else {
        e->broken = true;
    }
}

static void on_message(struct exec *e)
{
    struct msg_count count;
    u32 type = e->head.type, len = e->payload_len;
    int to = type == AGENT_STDOUT ? STDOUT_FILENO : STDERR_FILENO;
    if (type == AGENT_STDOUT || type == AGENT_STDERR) {
        e->out = len && !e->closed[to] ? to : -1;
        e->written = 0;
    } else if (type == AGENT_STDIN_TAKEN && len >= sizeof(count)) {
        memcpy(&count, e->payload, sizeof(count));
        e->window = (u32)MIN(e->window + count.bytes, (u64)AGENT_WINDOW);
    } else if (type == MSG_STDIN_CLOSED) {
        e->in_closed = true;
    } else if (type == MSG_EXITED && len >= sizeof(struct msg_exited)) {
        exited(e);
    } else if (type == AGENT_ERROR) {
        message_error("%.*s", (int)MIN(len, 500u), (const char *)e->payload);
        e->status = 126;
    }
}

/* What has come of a message; more of it may be on its way. */
static void from_agent(struct exec *e)
{
    bool head = e->head_len < sizeof(e->head);
    u8 *at = head ? (u8 *)&e->head + e->head_len : e->payload + e->payload_len;
    size_t want = head ? sizeof(e->head) - e->head_len : e->head.len - e->payload_len;
    ssize_t n = want ? recv(e->conn, at, want, MSG_DONTWAIT) : 0;
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (want && n <= 0) {
        e->broken = true;
        return;
    }
    *(head ? &e->head_len : &e->payload_len) += (u32)n;
    if (e->head_len == sizeof(e->head) && e->head.len > AGENT_DATA_MAX)
        e->broken = true;
    else if (e->head_len == sizeof(e->head) && e->payload_len == e->head.len) {
        on_message(e);
        e->head_len = 0;
        if (e->out < 0)
            e->payload_len = 0;
    }
}

/* A reader that has gone is told to the guest, and everything else that hinders is an error in the end. */
static void write_out(struct exec *e)
{
    u32 left = e->payload_len - e->written;
    ssize_t n = write(e->out, e->payload + e->written, MIN(left, (u32)PIPE_BUF));
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n < 0) {
        if (errno != EPIPE) {
            message_error("standard %s: cannot write: %s", e->out == STDOUT_FILENO ? "output" : "error", strerror(errno));
            e->lost = true;
        }
        e->closed[e->out] = true;
        tell(e, e->out == STDOUT_FILENO ? MSG_STDOUT_CLOSED : MSG_STDERR_CLOSED, NULL, 0);
        n = left;
    }
    e->written += (u32)n;
    if (e->written < e->payload_len)
        return;
    e->out = -1;
    e->payload_len = 0;
}

/* --- from here --- */

static void read_in(struct exec *e)
{
    u8 buf[16384];
    ssize_t n = read(STDIN_FILENO, buf, MIN(sizeof(buf), (size_t)e->window));
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        e->in_ended = true;
        tell(e, AGENT_STDIN_EOF, NULL, 0);
        return;
    }
    e->window -= (u32)n;
    tell(e, AGENT_STDIN, buf, (u32)n);
}

static void on_signal(struct exec *e)
{
    struct signalfd_siginfo info;
    struct msg_signal m;
    if (read(e->signals, &info, sizeof(info)) != sizeof(info))
        return;
    m.signal = info.ssi_signo;
    if (m.signal == SIGWINCH) {
        tell_size(e);
        return;
    }
    if (m.signal == SIGCONT) {
        if (terminal_is_raw())
            terminal_raw();
        tell_size(e);
        return;
    }
    e->interrupts += m.signal == SIGINT || m.signal == SIGTERM;
    if (e->interrupts > INTERRUPTS_MAX) {                          /* it does not heed them */
        e->status = 128 + (int)m.signal;
        return;
    }
    tell(e, MSG_SIGNAL, &m, sizeof(m));
}

static int open_signals(struct exec *e)
{
    static const int forwarded[] = {SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT};
    sigset_t set;
    sigemptyset(&set);
    for (unsigned i = 0; i < ARRAY_SIZE(forwarded); i++)
        sigaddset(&set, forwarded[i]);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    e->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return e->signals < 0 ? err(-errno, "cannot watch signals: %s", strerror(errno)) : 0;
}

static void join(struct exec *e)
{
    while (e->status < 0 && !e->broken) {
        bool in = !e->in_ended && !e->in_closed && e->window && !e->background;
        struct pollfd p[] = {
            {.fd = e->signals, .events = POLLIN},
            {.fd = e->out < 0 ? e->conn : -1, .events = POLLIN},
            {.fd = in ? STDIN_FILENO : -1, .events = POLLIN},
            {.fd = e->out, .events = POLLOUT},
        };
        if (poll(p, ARRAY_SIZE(p), -1) < 0 && errno != EINTR)
            break;
        if (p[0].revents)
            on_signal(e);
        if (p[3].revents)
            write_out(e);
        if (p[1].revents)
            from_agent(e);
        if (p[2].revents)
            read_in(e);
    }
}

static int connect_by_name(const char *name, u64 wait_seconds)
{
    struct instance i;
    int r = instance_open(&i, name);
    if (r == 0)
        r = agent_connect(&i, (unsigned)wait_seconds * 1000);
    instance_close(&i);
    return r;
}

static int run_exec(struct exec *e)
{
    int r = connect_by_name(e->name, e->options.wait_seconds);
    if (r < 0)
        return r;
    e->conn = r;
    r = open_signals(e);
    if (r == 0)
        r = request(e);
    if (r < 0)
        return r;
    pid_t foreground = isatty(STDIN_FILENO) ? tcgetpgrp(STDIN_FILENO) : -1;
    e->background = foreground >= 0 && foreground != getpgrp();
    if (e->background || !is_open(e, STDIN_FILENO)) {
        e->in_ended = true;
        tell(e, AGENT_STDIN_EOF, NULL, 0);
    }
    if (e->options.tty && !e->background && terminal_open(STDIN_FILENO) == 0)
        terminal_raw();
    join(e);
    terminal_restore();
    if (e->status < 0)
        return err(-ECONNRESET, "%s: the connection to the guest broke before the command had ended", e->name);
    return 0;
}

static int parse_exec(struct exec *e, int argc, char **argv)
{
    int words, r = options_parse_words(exec_option_table, exec_option_rows, &e->options, argc, argv, &words, &e->options.command);
    if (r < 0)
        return r;
    if (words != 1)
        return err(-EINVAL, words ? "\"%.100s\": more than the VM's name; the command stands behind \"--\"" : "the VM's name is missing",
                   words ? argv[1] : "");
    if (!e->options.command || !*e->options.command)
        return err(-EINVAL, "no command; write doppel exec %.100s -- COMMAND", argv[0]);
    e->name = argv[0];
    return 0;
}

int exec_main(int argc, char **argv)
{
    u32 closed = run_reserve_streams();
    struct exec *e = calloc(1, sizeof(*e));
    int status = EXIT_HOST_ERROR;
    if (!e) {
        message_error("no memory");
        return status;
    }
    *e = (struct exec){.closed_streams = closed, .conn = -1, .signals = -1, .window = AGENT_WINDOW, .out = -1, .status = -1, .options = {.wait_seconds = WAIT_SECONDS}};
    if (parse_exec(e, argc, argv) < 0) {
        message_error("exec: %s; \"doppel help exec\" explains", err_last());
        status = EXIT_USAGE;
    } else if (run_exec(e) < 0) {
        message_error("%s", err_last());
    } else {
        status = e->status == 0 && e->lost ? EXIT_HOST_ERROR : e->status;
    }
    if (e->conn >= 0)
        close(e->conn);
    if (e->signals >= 0)
        close(e->signals);
    free(e);
    return status;
}
