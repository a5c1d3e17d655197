/*
 * The host's side of guest/protocol.h (command.h).
 *
 *   standard input  -> in_buf -> port doppel.stdin          an end of file becomes STDIN_EOF with the count of bytes
 *   port doppel.stdout, .stderr -> standard output, error   what they do not take stays in the guest's ring; a reader
 *   that has gone becomes *_CLOSED port doppel.ctl <-> messages                            READY > RUN > ... > EXITED >
 *   DONE
 *
 * No locks: one thread.
 */
#include "ctl/command.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>

#include "../../guest/protocol.h"
#include "back/chardev_host.h"
#include "base/clock.h"
#include "dev/virtio_console.h"

#define IN_BUFFER (64 * KiB)
#define PAYLOAD_MAX 64                                             /* of a message of the guest's that we know */

enum { CTL, STDIN, STDOUT, STDERR, PORTS };
static const char *const port_names[PORTS] = {PORT_CTL, PORT_STDIN, PORT_STDOUT, PORT_STDERR};

enum command_state { WAITING, RUNNING, EXITED, FAILED };

struct output {
    struct command *c;
    struct chardev *to;                                            /* NULL: closed from the start */
    struct vport *port;
    /* bytes that came; how many will, UINT64_MAX while that is not known */
    u64 taken, end;
    bool stalled;                                                  /* the guest has more than `to` took */
    bool broken, broken_told;
};

struct command {
    struct command_config config;
    struct vm_port ports[PORTS];
    struct vport *ctl, *in;
    enum command_state state;
    bool done_sent;
    int status;
    char reason[256], failure[256];

    /* messages to the guest that its port has not taken yet */
    u8 *send;
    size_t send_len, send_cap;
    u8 message[sizeof(struct msg_head) + PAYLOAD_MAX];             /* one that is coming in */
    /* bytes of it that have come; those beyond message[] are not kept */
    u64 message_got;

    u8 in_buf[IN_BUFFER];
    size_t in_head, in_len;
    u64 in_total;                                                  /* bytes that have come from standard input */
    bool in_eof, in_eof_told, in_closed;
    struct output out, err;
};

static void fail(struct command *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void fail(struct command *c, const char *fmt, ...)
{
    va_list ap;
    if (c->state == FAILED)
        return;
    c->state = FAILED;
    va_start(ap, fmt);
    vsnprintf(c->failure, sizeof(c->failure), fmt, ap);
    va_end(ap);
    c->config.failed(c->config.arg);
}

/* --- messages to the guest --- */

static void send_flush(struct command *c)
{
    if (!c->ctl || !c->send_len)
        return;
    size_t n = vport_send(c->ctl, c->send, c->send_len);
    memmove(c->send, c->send + n, c->send_len - n);
    c->send_len -= n;
}

static bool send_bytes(struct command *c, const void *p, size_t len)
{
    if (!len)
        return true;
    if (c->send_len + len > c->send_cap) {
        size_t cap = MAX(2 * c->send_cap, c->send_len + len);
        u8 *buf = realloc(c->send, cap);
        if (!buf)
            return false;
        c->send = buf;
        c->send_cap = cap;
    }
    memcpy(c->send + c->send_len, p, len);
    c->send_len += len;
    return true;
}

static void send_message(struct command *c, enum msg_type type, const void *payload, size_t len)
{
    struct msg_head head = {.type = type, .len = (u32)len};
    if (!send_bytes(c, &head, sizeof(head)) || !send_bytes(c, payload, len)) {
        fail(c, "no memory for a message to the guest");
        return;
    }
    send_flush(c);
}

/* What happened to the caller's streams is told once the command runs: RUN is the first message. */
static void tell_streams(struct command *c)
{
    struct msg_count count = {.bytes = c->in_total};
    if (c->state != RUNNING)
        return;
    if (c->in_eof && !c->in_eof_told) {
        c->in_eof_told = true;
        send_message(c, MSG_STDIN_EOF, &count, sizeof(count));
    }
    if (c->out.broken && !c->out.broken_told) {
        c->out.broken_told = true;
        send_message(c, MSG_STDOUT_CLOSED, NULL, 0);
    }
    if (c->err.broken && !c->err.broken_told) {
        c->err.broken_told = true;
        send_message(c, MSG_STDERR_CLOSED, NULL, 0);
    }
}

/* RUN's payload is gathered here, header first. The words' total was checked by command_new(). */
static void send_run(struct command *c)
{
    const struct command_config *g = &c->config;
    char term[128] = "";
    struct msg_run run = {.rows = g->rows, .cols = g->cols};
    if (g->tty && g->term)
        snprintf(term, sizeof(term), "TERM=%s", g->term);
    const char *dir = g->dir ? g->dir : "";
    size_t len = sizeof(run) + strlen(dir) + 1 + (*term ? strlen(term) + 1 : 0);
    for (; g->argv[run.argc]; run.argc++)
        len += strlen(g->argv[run.argc]) + 1;
    run.envc = *term != '\0';
    run.flags = (g->in ? 0 : RUN_STDIN_CLOSED) | (g->out ? 0 : RUN_STDOUT_CLOSED) | (g->err ? 0 : RUN_STDERR_CLOSED);
    if (g->tty)
        run.flags = RUN_TTY;
    struct msg_head head = {.type = MSG_RUN, .len = (u32)len};
    bool ok = send_bytes(c, &head, sizeof(head)) && send_bytes(c, &run, sizeof(run)) && send_bytes(c, dir, strlen(dir) + 1);
    for (u32 i = 0; ok && i < run.argc; i++)
        ok = send_bytes(c, g->argv[i], strlen(g->argv[i]) + 1);
    if (!ok || (*term && !send_bytes(c, term, strlen(term) + 1))) {
        fail(c, "no memory for the command's words");
        return;
    }
    send_flush(c);
}

/* --- messages from the guest --- */

/* All that EXITED counted has come: the guest may go. */
static void check_done(struct command *c)
{
    if (c->state != EXITED || c->done_sent || c->out.taken < c->out.end || c->err.taken < c->err.end)
        return;
    c->done_sent = true;
    send_message(c, MSG_DONE, NULL, 0);
    c->config.done(c->config.arg);
}

/* A second READY is another kernel's init (kexec): the command has gone with the old one, and is not run twice. */
static void on_ready(struct command *c, const struct msg_ready *m)
{
    if (!c->config.argv)
        return;
    if (c->state != WAITING) {
        fail(c, "the guest started another kernel before %s", c->state == EXITED ? "it had shut down" : "the command had ended");
        return;
    }
    if (m->version != PROTOCOL_VERSION) {
        fail(c, "the guest's init speaks version %u of the protocol, doppel speaks %u; build the guest again",
             m->version, PROTOCOL_VERSION);
        return;
    }
    send_run(c);
    if (c->state == FAILED)
        return;
    c->state = RUNNING;
    tell_streams(c);
    c->config.started(c->config.arg);
}

static void output_ends(struct command *c, struct output *o, u64 bytes)
{
    o->end = bytes;
    if (o == &c->out && o->taken >= o->end && c->config.stdout_ends)
        chardev_end_output(o->to);
}

static void on_exited(struct command *c, const struct msg_exited *m)
{
    const char *name = c->config.argv ? c->config.argv[0] : "";
    if (c->state != RUNNING)
        return;
    if (m->how == EXIT_STATUS && m->code <= 255) {
        c->status = (int)m->code;
        snprintf(c->reason, sizeof(c->reason), "the command ended with status %d", c->status);
    } else if (m->how == EXIT_SIGNAL && m->code >= 1 && m->code <= 64) {
        c->status = 128 + (int)m->code;
        snprintf(c->reason, sizeof(c->reason), "the command was ended by signal %u (%s)", m->code,
                 strsignal((int)m->code));
    } else if (m->how == EXIT_EXEC && m->code <= 4096) {
        c->status = m->code == ENOENT ? 127 : 126;
        snprintf(c->reason, sizeof(c->reason), "%.100s: cannot be run in the guest: %s", name, strerror((int)m->code));
        log_msg(c->config.log, LOG_ERROR, "%s", c->reason);
    } else {
        fail(c, "the guest's init did not start the command (how %u, code %u); build the guest again", m->how, m->code);
        return;
    }
    c->state = EXITED;
    c->out.end = m->stdout_bytes;
    c->err.end = m->stderr_bytes;
    check_done(c);
}

/* Whoever writes to us shall learn that nobody reads; a terminal stays ours for Ctrl-A. */
static void in_close(struct command *c)
{
    c->in_closed = true;
    c->in_len = 0;
    if (c->config.tty)
        chardev_rx_ready(c->config.in);
    else if (c->config.in)
        chardev_fd_end_input(c->config.in);
}

static void on_message(struct command *c, const struct msg_head *head, const u8 *payload)
{
    struct msg_count count = {.bytes = 0};
    struct msg_ready ready;
    struct msg_exited exited;
    if (head->type == MSG_READY && head->len >= sizeof(ready)) {
        memcpy(&ready, payload, sizeof(ready));
        on_ready(c, &ready);
    } else if (head->type == MSG_EXITED && head->len >= sizeof(exited)) {
        memcpy(&exited, payload, sizeof(exited));
        on_exited(c, &exited);
    } else if ((head->type == MSG_STDOUT_EOF || head->type == MSG_STDERR_EOF) && head->len >= sizeof(count)) {
        memcpy(&count, payload, sizeof(count));
        output_ends(c, head->type == MSG_STDOUT_EOF ? &c->out : &c->err, count.bytes);
    } else if (head->type == MSG_STDIN_CLOSED) {
        in_close(c);
    }
}

/* Gathers messages from the stream; what is beyond the longest that we know is counted and dropped. */
static size_t ctl_data(struct command *c, const u8 *data, size_t len)
{
    for (size_t i = 0; i < len && c->state != FAILED;) {
        struct msg_head head = {.len = 0};
        u64 want = sizeof(head);
        if (c->message_got >= sizeof(head)) {
            memcpy(&head, c->message, sizeof(head));
            want += head.len;
        }
        size_t n = (size_t)MIN(want - c->message_got, (u64)(len - i));
        if (c->message_got < sizeof(c->message))
            memcpy(c->message + c->message_got, data + i, MIN(n, sizeof(c->message) - (size_t)c->message_got));
        c->message_got += n;
        i += n;
        if (c->message_got < sizeof(head))
            continue;
        memcpy(&head, c->message, sizeof(head));
        if (head.len > MSG_MAX) {
            fail(c, "the guest's init sent nonsense on port " PORT_CTL);
        } else if (c->message_got == sizeof(head) + head.len) {
            c->message_got = 0;
            on_message(c, &head, c->message + sizeof(head));
        }
    }
    return len;
}

static void ctl_open(struct command *c, bool open)
{
    if (!open) {
        c->send_len = 0;
        c->message_got = 0;
        return;
    }
    if (!c->config.argv && c->config.cols)
        command_resize(c, c->config.cols, c->config.rows);
    else
        send_flush(c);
    c->config.ready(c->config.arg);
}

/* --- standard input --- */

static void in_flush(struct command *c)
{
    while (c->in_len && c->in) {
        size_t n = vport_send(c->in, c->in_buf + c->in_head, c->in_len);
        if (!n)
            return;
        c->in_head += n;
        c->in_len -= n;
    }
    c->in_head = 0;
}

static size_t in_can_receive(void *front)
{
    struct command *c = front;
    return c->in_closed ? IN_BUFFER : IN_BUFFER - c->in_len;
}

static void in_receive(void *front, const u8 *buf, size_t len)
{
    struct command *c = front;
    if (c->in_closed)
        return;                                                    /* nobody will read it */
    if (c->in_head + c->in_len + len > IN_BUFFER) {
        memmove(c->in_buf, c->in_buf + c->in_head, c->in_len);
        c->in_head = 0;
    }
    memcpy(c->in_buf + c->in_head + c->in_len, buf, len);
    c->in_len += len;
    c->in_total += len;
    in_flush(c);
}

static void in_event(void *front, enum chardev_event what)
{
    struct command *c = front;
    if (what != CHARDEV_EOF)
        return;
    c->in_eof = true;
    tell_streams(c);
}

static const struct chardev_front_ops in_front_ops = {
    .can_receive = in_can_receive, .receive = in_receive, .event = in_event,
};

/* --- standard output and error --- */

static size_t out_data(struct output *o, const u8 *data, size_t len)
{
    size_t n = chardev_write(o->to, data, len);
    o->taken += n;
    o->stalled = n < len;
    if (o->end != UINT64_MAX && o->taken >= o->end) {
        if (o->c->state == RUNNING)
            output_ends(o->c, o, o->end);
        check_done(o->c);
    }
    return n;
}

static void out_writable(void *front)
{
    struct output *o = front;
    if (o->stalled && o->port) {
        o->stalled = false;
        vport_resume(o->port);
    }
}

static void out_event(void *front, enum chardev_event what)
{
    struct output *o = front;
    if (what != CHARDEV_BROKEN)
        return;
    o->broken = true;
    tell_streams(o->c);
}

static const struct chardev_front_ops out_front_ops = {.writable = out_writable, .event = out_event};

/* A terminal is input and output in one. */
static void tty_writable(void *front)
{
    out_writable(&((struct command *)front)->out);
}

static void tty_event(void *front, enum chardev_event what)
{
    struct command *c = front;
    in_event(c, what);
    out_event(&c->out, what);
}

static const struct chardev_front_ops tty_front_ops = {
    .can_receive = in_can_receive, .receive = in_receive, .writable = tty_writable, .event = tty_event,
};

/* --- the ports --- */

static size_t ctl_port_data(void *arg, const void *data, size_t len)
{
    return ctl_data(arg, data, len);
}

static void ctl_port_open(void *arg, bool open)
{
    ctl_open(arg, open);
}

static void ctl_port_room(void *arg)
{
    send_flush(arg);
}

static void in_port_room(void *arg)
{
    struct command *c = arg;
    in_flush(c);
    chardev_rx_ready(c->config.in);
}

static void in_port_open(void *arg, bool open)
{
    if (open)
        in_port_room(arg);
}

/* Nothing is expected from the guest here. */
static size_t in_port_data(void *arg UNUSED, const void *data UNUSED, size_t len)
{
    return len;
}

static size_t out_port_data(void *arg, const void *data, size_t len)
{
    return out_data(arg, data, len);
}

static const struct vport_ops ctl_port_ops = {
    .guest_data = ctl_port_data, .guest_open = ctl_port_open, .room = ctl_port_room,
};
static const struct vport_ops in_port_ops = {
    .guest_data = in_port_data, .guest_open = in_port_open, .room = in_port_room,
};
static const struct vport_ops out_port_ops = {.guest_data = out_port_data};

/* --- from run.c --- */

static int check_words(char **argv)
{
    u64 len = sizeof(struct msg_run) + 256 + PATH_MAX;
    for (; *argv; argv++)
        len += strlen(*argv) + 1;
    if (len <= MSG_MAX)
        return 0;
    return err(-E2BIG, "the command's words have %llu bytes; they must stay below %u", (unsigned long long)len,
               MSG_MAX);
}

int command_new(const struct command_config *config, struct command **out)
{
    int r = config->argv ? check_words(config->argv) : 0;
    if (r < 0)
        return r;
    struct command *c = calloc(1, sizeof(*c));
    if (!c)
        return err(-ENOMEM, "no memory for the command's streams");
    c->config = *config;
    c->out = (struct output){.c = c, .to = config->out, .end = UINT64_MAX};
    c->err = (struct output){.c = c, .to = config->err, .end = UINT64_MAX};
    c->ports[CTL] = (struct vm_port){port_names[CTL], &ctl_port_ops, c};
    c->ports[STDIN] = (struct vm_port){port_names[STDIN], &in_port_ops, c};
    c->ports[STDOUT] = (struct vm_port){port_names[STDOUT], &out_port_ops, &c->out};
    c->ports[STDERR] = (struct vm_port){port_names[STDERR], &out_port_ops, &c->err};
    if (config->tty) {
        chardev_connect(config->in, &tty_front_ops, c);
    } else {
        chardev_connect(config->in, &in_front_ops, c);
        chardev_connect(config->out, &out_front_ops, &c->out);
        chardev_connect(config->err, &out_front_ops, &c->err);
    }
    *out = c;
    return 0;
}

void command_free(struct command *c)
{
    if (!c)
        return;
    free(c->send);
    free(c);
}

const struct vm_port *command_ports(struct command *c, unsigned *n)
{
    *n = c->config.argv ? PORTS : 1;
    return c->ports;
}

void command_attach(struct command *c, struct vm *vm)
{
    c->ctl = vm_port(vm, CTL);
    if (!c->config.argv)
        return;
    c->in = vm_port(vm, STDIN);
    c->out.port = vm_port(vm, STDOUT);
    c->err.port = vm_port(vm, STDERR);
}

void command_resize(struct command *c, u16 cols, u16 rows)
{
    struct msg_winsize w = {.rows = rows, .cols = cols};
    c->config.cols = cols;
    c->config.rows = rows;
    bool listening = c->config.argv ? c->state == RUNNING && c->config.tty : c->ctl && vport_guest_open(c->ctl);
    if (listening)
        send_message(c, MSG_WINSIZE, &w, sizeof(w));
}

/* Not while an older one waits for the guest: it would come late as well. */
void command_time(struct command *c)
{
    struct msg_time m = {.ns = clock_wall_ns()};
    if (c->ctl && vport_guest_open(c->ctl) && !c->send_len)
        send_message(c, MSG_TIME, &m, sizeof(m));
}

bool command_signal(struct command *c, int signo)
{
    struct msg_signal m = {.signal = (u32)signo};
    if (!c->config.argv || c->state != RUNNING)
        return false;
    send_message(c, MSG_SIGNAL, &m, sizeof(m));
    return true;
}

void command_vm_ended(struct command *c)
{
    for (unsigned i = 0; i < 2; i++) {
        struct output *o = i ? &c->err : &c->out;
        if (o->port)
            vport_resume(o->port);
    }
}

bool command_drained(const struct command *c)
{
    return !c->out.stalled && !c->err.stalled;
}

bool command_has_status(const struct command *c, int *status)
{
    if (c->state == EXITED)
        *status = c->status;
    return c->state == EXITED;
}

const char *command_reason(const struct command *c)
{
    return c->reason;
}

const char *command_failure(const struct command *c)
{
    return c->state == FAILED ? c->failure : NULL;
}
