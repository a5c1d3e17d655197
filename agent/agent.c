/*
 * The agent: a small program in the guest that runs commands and moves files for doppel exec and doppel cp (protocol.h).
 *
 * The first process listens on vsock and makes a child for each connection, which serves it to its end; nothing is shared, so one that fails or
 * hangs is alone. It speaks with the host only: another guest, or a user of this one by way of the loopback, is turned away.
 *
 * A session that runs a command is one poll() loop; only the vsock's descriptor and the command's are in it, none blocks. Output is read when what was read before
 * is with the host; input is bounded by the window.
 *
 * It is linked statically and reads /etc/passwd and /etc/group itself: it runs in guests without a libc, or with another one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pty.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "../src/back/tree.h"
#include "protocol.h"

#define GROUPS_MAX 64
#define SESSIONS_MAX 256

/* ---- messages, while nothing else goes on ---- */

static bool put_message(int fd, uint32_t type, const void *payload, uint32_t len)
{
    struct msg_head h = { type, len };
    return tree_put(fd, &h, sizeof h) && tree_put(fd, payload, len);
}

static _Noreturn void refuse(int fd, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static _Noreturn void refuse(int fd, const char *fmt, ...)
{
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    put_message(fd, AGENT_ERROR, text, strlen(text));
    shutdown(fd, SHUT_WR);
    while (recv(fd, text, sizeof text, 0) > 0)                     /* so that it is read before the connection is gone */
        ;
    exit(0);
}

/* ---- users ---- */

struct user {
    char name[64], home[256], shell[256];
    uid_t uid;
    gid_t gid, group[GROUPS_MAX];
    size_t groups;
};

/* By name or number. */
static bool find_user(const char *who, struct user *u)
{
    char *end;
    unsigned long number = strtoul(who, &end, 10);
    bool is_number = *who && !*end, found = false;
    FILE *f = fopen("/etc/passwd", "re");
    struct passwd *p;

    while (f && !found && (p = fgetpwent(f))) {
        found = is_number ? p->pw_uid == number : !strcmp(p->pw_name, who);
        if (!found)
            continue;
        u->uid = p->pw_uid;
        u->gid = p->pw_gid;
        snprintf(u->name, sizeof u->name, "%s", p->pw_name);
        snprintf(u->home, sizeof u->home, "%s", p->pw_dir);
        snprintf(u->shell, sizeof u->shell, "%s", *p->pw_shell ? p->pw_shell : "/bin/sh");
    }
    if (f)
        fclose(f);
    return found;
}

static void find_groups(struct user *u)
{
    FILE *f = fopen("/etc/group", "re");
    struct group *g;

    u->group[u->groups++] = u->gid;
    while (f && u->groups < GROUPS_MAX && (g = fgetgrent(f)))
        for (char **m = g->gr_mem; *m; m++)
            if (!strcmp(*m, u->name) && g->gr_gid != u->gid && u->groups < GROUPS_MAX)
                u->group[u->groups++] = g->gr_gid;
    if (f)
        fclose(f);
}

static bool become(const struct user *u)
{
    return (u->uid == 0 && u->gid == 0) || (!setgroups(u->groups, u->group) && !setgid(u->gid) && !setuid(u->uid));
}

/* ---- a session with a command ---- */

enum { IN, OUT, ERR };

struct session {
    int conn, signals;
    int fd[3];                                                     /* our ends of its streams; -1: closed; with a terminal [IN] == [OUT] */
    bool tty;
    pid_t pid;
    bool ended;                                                    /* the command has; what it wrote may still be on its way */
    struct msg_exited exited;
    /* from the host: a message that is coming in, then input for the command */
    uint8_t in[sizeof(struct msg_head) + AGENT_DATA_MAX];
    size_t in_len;
    uint8_t *input;                                                /* a ring of AGENT_WINDOW bytes */
    uint32_t input_head, input_len, taken;
    bool input_ends, closed_told;
    /* to the host: messages on their way */
    uint8_t out[3 * (sizeof(struct msg_head) + sizeof(struct msg_exited)) + sizeof(struct msg_head) + AGENT_DATA_MAX];
    size_t out_len, out_done;
};

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static _Noreturn void host_gone(struct session *s)
{
    if (!s->ended) {
        kill(-s->pid, SIGHUP);
        kill(-s->pid, SIGCONT);
    }
    exit(0);
}

/* Small messages always have room: each kind is sent only while no data waits, or once. */
static void queue(struct session *s, uint32_t type, const void *payload, uint32_t len)
{
    struct msg_head h = { type, len };
    memcpy(s->out + s->out_len, &h, sizeof h);
    if (len)
        memcpy(s->out + s->out_len + sizeof h, payload, len);
    s->out_len += sizeof h + len;
}

static void flush_out(struct session *s)
{
    while (s->out_done < s->out_len) {
        ssize_t n = send(s->conn, s->out + s->out_done, s->out_len - s->out_done, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n < 0)
            host_gone(s);
        s->out_done += n;
    }
    s->out_len = s->out_done = 0;
}

static void end_input(struct session *s)
{
    if (s->tty)
        return;                                                    /* the end of file was a character */
    close_fd(&s->fd[IN]);
}

/* What the host has sent goes to the command. */
static void feed(struct session *s)
{
    while (s->input_len && s->fd[IN] >= 0) {
        uint32_t n = AGENT_WINDOW - s->input_head;
        ssize_t r = write(s->fd[IN], s->input + s->input_head, n < s->input_len ? n : s->input_len);
        if (r < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (r < 0) {
            s->taken += s->input_len;                              /* nobody reads it */
            s->input_len = 0;
            if (!s->tty)
                close_fd(&s->fd[IN]);
            break;
        }
        s->input_head = (s->input_head + r) % AGENT_WINDOW;
        s->input_len -= r;
        s->taken += r;
    }
    if (s->input_ends && !s->input_len && s->fd[IN] >= 0) {
        if (s->tty) {
            char eof = CEOF;
            s->input_ends = write(s->fd[IN], &eof, 1) < 0 && errno == EAGAIN;
        }
        end_input(s);
    }
}

static void take_input(struct session *s, const uint8_t *p, uint32_t len)
{
    if (s->fd[IN] < 0) {
        s->taken += len;
        return;
    }
    if (len > AGENT_WINDOW - s->input_len)
        host_gone(s);                                              /* more than the window */
    for (uint32_t i = 0; i < len; i++)
        s->input[(s->input_head + s->input_len + i) % AGENT_WINDOW] = p[i];
    s->input_len += len;
    feed(s);
}

static void message(struct session *s, uint32_t type, const uint8_t *p, uint32_t len)
{
    struct msg_winsize w;
    struct msg_signal sig;

    switch (type) {
    case AGENT_STDIN: take_input(s, p, len); break;
    case AGENT_STDIN_EOF:
        s->input_ends = true;
        feed(s);
        break;
    case MSG_STDOUT_CLOSED: case MSG_STDERR_CLOSED:
        if (!s->tty)
            close_fd(&s->fd[type == MSG_STDOUT_CLOSED ? OUT : ERR]);
        else if (!s->ended)
            kill(-s->pid, SIGHUP);
        break;
    case MSG_WINSIZE:
        if (len < sizeof w || !s->tty)
            break;
        memcpy(&w, p, sizeof w);
        ioctl(s->fd[OUT], TIOCSWINSZ, &(struct winsize){ .ws_row = w.rows, .ws_col = w.cols });
        break;
    case MSG_SIGNAL:
        if (len < sizeof sig || s->ended)
            break;
        memcpy(&sig, p, sizeof sig);
        if (sig.signal >= 1 && sig.signal <= 64)
            kill(-s->pid, sig.signal);
        break;
    }
}

static void from_host(struct session *s)
{
    for (int i = 0; i < 32; i++) {
        struct msg_head h = { .len = 0 };
        size_t want = sizeof h;
        if (s->in_len >= sizeof h) {
            memcpy(&h, s->in, sizeof h);
            if (h.len > AGENT_DATA_MAX)
                host_gone(s);
            want += h.len;
        }
        if (s->in_len < want) {
            ssize_t n = recv(s->conn, s->in + s->in_len, want - s->in_len, MSG_DONTWAIT);
            if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
            if (n <= 0)
                host_gone(s);
            s->in_len += n;
            continue;
        }
        s->in_len = 0;
        message(s, h.type, s->in + sizeof h, h.len);
    }
}

/* One piece of output. The end of a stream is found when nothing is there and the command has ended, too: others may hold it open and write on. */
static void from_command(struct session *s, int which)
{
    uint8_t buf[AGENT_DATA_MAX];
    ssize_t n;

    if (s->fd[which] < 0 || s->out_len)
        return;
    n = read(s->fd[which], buf, sizeof buf);
    if (n > 0) {
        queue(s, which == OUT ? AGENT_STDOUT : AGENT_STDERR, buf, n);
        flush_out(s);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR) || s->ended) {
        if (s->tty)
            s->fd[IN] = -1;
        close_fd(&s->fd[which]);
    }
}

static void reap(struct session *s)
{
    struct signalfd_siginfo info;
    int status;

    while (read(s->signals, &info, sizeof info) == sizeof info)
        ;
    if (s->ended || waitpid(s->pid, &status, WNOHANG) != s->pid)
        return;
    s->ended = true;
    s->exited.how = WIFSIGNALED(status) ? EXIT_SIGNAL : EXIT_STATUS;
    s->exited.code = WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}

/* A hang-up of a stream that nobody waits for would be reported again and again: those with no events are left out. */
static void wait_events(struct session *s)
{
    struct pollfd p[5] = {
        { .fd = s->conn, .events = POLLIN | (s->out_len ? POLLOUT : 0) }, { .fd = s->signals, .events = POLLIN },
        { .fd = -1 }, { .fd = -1 }, { .fd = -1 },
    };

    if (s->input_len || (s->tty && s->input_ends))
        p[2] = (struct pollfd){ .fd = s->fd[IN], .events = POLLOUT };
    else if (!s->tty)
        p[2] = (struct pollfd){ .fd = s->fd[IN], .events = 0 };    /* the command closes its input: POLLERR */
    if (!s->out_len) {
        p[3] = (struct pollfd){ .fd = s->fd[OUT], .events = POLLIN };
        p[4] = (struct pollfd){ .fd = s->fd[ERR], .events = POLLIN };
    }
    if (poll(p, 5, s->ended && !s->out_len ? 0 : -1) < 0)
        return;
    if (!s->tty && p[2].revents & POLLERR) {
        s->taken += s->input_len;
        s->input_len = 0;
        close_fd(&s->fd[IN]);
    }
}

static void serve(struct session *s)
{
    for (;;) {
        wait_events(s);
        reap(s);
        from_host(s);
        feed(s);
        flush_out(s);
        if (!s->out_len && s->fd[IN] < 0 && !s->tty && !s->closed_told) {
            s->closed_told = true;
            queue(s, MSG_STDIN_CLOSED, NULL, 0);
        }
        if (!s->out_len && s->taken) {
            queue(s, AGENT_STDIN_TAKEN, &(struct msg_count){ s->taken }, sizeof(struct msg_count));
            s->taken = 0;
        }
        flush_out(s);
        from_command(s, OUT);
        from_command(s, ERR);
        if (s->ended && s->fd[OUT] < 0 && s->fd[ERR] < 0 && !s->out_len)
            break;
    }
    fcntl(s->conn, F_SETFL, fcntl(s->conn, F_GETFL) & ~O_NONBLOCK);
    put_message(s->conn, MSG_EXITED, &s->exited, sizeof s->exited);
    shutdown(s->conn, SHUT_WR);
    while (recv(s->conn, s->in, sizeof s->in, 0) > 0)              /* until the host has it */
        ;
}

/* The command's ends of its streams, and ours. */
static bool open_streams(struct session *s, const struct msg_run *run, int theirs[3])
{
    int p[2];

    s->fd[IN] = s->fd[OUT] = s->fd[ERR] = -1;
    if (s->tty) {
        struct winsize w = { .ws_row = run->rows, .ws_col = run->cols };
        if (openpty(&s->fd[OUT], &theirs[IN], NULL, NULL, run->rows && run->cols ? &w : NULL))
            return false;
        s->fd[IN] = s->fd[OUT];
        theirs[OUT] = theirs[ERR] = theirs[IN];
        fcntl(s->fd[OUT], F_SETFD, FD_CLOEXEC);
        fcntl(s->fd[OUT], F_SETFL, O_RDWR | O_NONBLOCK);
        return true;
    }
    for (int i = IN; i <= ERR; i++) {
        if (pipe2(p, O_CLOEXEC))
            return false;
        theirs[i] = p[i == IN ? 0 : 1];
        s->fd[i] = p[i == IN ? 1 : 0];
        fcntl(s->fd[i], F_SETFL, (i == IN ? O_WRONLY : O_RDONLY) | O_NONBLOCK);
        fcntl(s->fd[i], F_SETPIPE_SZ, 262144);
    }
    if (run->flags & RUN_STDIN_CLOSED)
        close_fd(&s->fd[IN]);
    if (run->flags & RUN_STDOUT_CLOSED)
        close_fd(&s->fd[OUT]);
    if (run->flags & RUN_STDERR_CLOSED)
        close_fd(&s->fd[ERR]);
    return true;
}

static _Noreturn void run_command(const struct session *s, const int theirs[3], const struct user *u, const char *dir, char **argv, char **env,
                                  int report)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (int i = 1; i < NSIG; i++)
        signal(i, SIG_DFL);
    setsid();
    for (int i = IN; i <= ERR; i++)
        dup2(theirs[i], i);
    if (s->tty) {
        ioctl(0, TIOCSCTTY, 1);
        if (theirs[IN] > 2)
            close(theirs[IN]);
        (void)!fchown(0, u->uid, -1);
    }
    clearenv();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", u->home, 1);
    setenv("USER", u->name, 1);
    setenv("LOGNAME", u->name, 1);
    setenv("SHELL", u->shell, 1);
    for (; *env; env++)
        putenv(*env);
    if (become(u) && (!chdir(*dir ? dir : u->home) || (!*dir && !chdir("/"))))
        execvp(argv[0], argv);
    int error = errno;
    (void)!write(report, &error, sizeof error);
    _exit(126);
}

static int start(struct session *s, const struct msg_run *run, const struct user *u, const char *dir, char **argv, char **env)
{
    int theirs[3] = { -1, -1, -1 }, report[2], error = 0;
    sigset_t child;

    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    signal(SIGCHLD, SIG_DFL);
    s->signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    if (s->signals < 0 || !open_streams(s, run, theirs) || pipe2(report, O_CLOEXEC))
        return errno;
    s->pid = fork();
    if (s->pid == 0)
        run_command(s, theirs, u, dir, argv, env, report[1]);
    if (s->pid < 0)
        error = errno;
    close(report[1]);
    if (!error && read(report[0], &error, sizeof error) <= 0)      /* closed by a successful exec */
        error = 0;
    close(report[0]);
    for (int i = IN; i <= ERR; i++)
        if (!s->tty || i == IN)
            close_fd(&theirs[i]);
    return error;
}

/* Cuts the payload into strings; list gets a NULL behind the arguments and one at the end. */
static bool cut(char *p, char *end, uint64_t strings, uint64_t null_after, char **list)
{
    uint64_t n;

    for (n = 0; n < strings && p < end; n++) {
        size_t max = end - p, size = strnlen(p, max) + 1;
        if (size > max)
            return false;
        *list++ = p;
        if (n == null_after)
            *list++ = NULL;
        p += size;
    }
    return n == strings && p == end;
}

static _Noreturn void exec_session(int conn, char *payload, uint32_t len)
{
    struct session *s = calloc(1, sizeof *s);
    struct user user = { .name = "root", .home = "/root", .shell = "/bin/sh" };
    struct msg_run run;
    uint64_t strings;
    char **list = NULL;
    int error;

    if (len < sizeof run)
        refuse(conn, "the agent does not understand the request");
    memcpy(&run, payload, sizeof run);
    strings = 2ull + run.argc + run.envc;
    if (run.argc && strings <= len - sizeof run)
        list = calloc(strings + 2, sizeof *list);
    if (!list || !cut(payload + sizeof run, payload + len, strings, 1ull + run.argc, list))
        refuse(conn, "the agent does not understand the request");
    if (s)
        s->input = malloc(AGENT_WINDOW);
    if (!s || !s->input)
        refuse(conn, "the guest has no memory left");
    if (!find_user(*list[1] ? list[1] : "0", &user) && *list[1])
        refuse(conn, "%.100s: the guest has no such user", list[1]);
    find_groups(&user);
    s->conn = conn;
    s->tty = run.flags & RUN_TTY;
    error = start(s, &run, &user, list[0], list + 2, list + run.argc + 3);
    if (error) {
        put_message(conn, MSG_EXITED, &(struct msg_exited){ .how = EXIT_EXEC, .code = error }, sizeof(struct msg_exited));
        shutdown(conn, SHUT_WR);
        while (recv(conn, s->in, sizeof s->in, 0) > 0)
            ;
        exit(0);
    }
    serve(s);
    exit(0);
}

/* ---- a session with files ---- */

static _Noreturn void put_session(int conn, const char *path)
{
    struct tree_result result;
    put_message(conn, AGENT_OK, NULL, 0);
    tree_receive(conn, path, NULL, 07777, &result);
    shutdown(conn, SHUT_WR);
    while (recv(conn, &result, sizeof result, 0) > 0)
        ;
    exit(0);
}

/* What could not be read here is told behind the other side's result. */
static _Noreturn void get_session(int conn, const char *path, bool recursive)
{
    struct tree_result own, result;
    put_message(conn, AGENT_OK, NULL, 0);
    if (!tree_send(conn, path, recursive, &own, &result))
        tree_put(conn, &own, sizeof own);
    shutdown(conn, SHUT_WR);
    while (recv(conn, &result, sizeof result, 0) > 0)
        ;
    exit(0);
}

/* ---- connections ---- */

static _Noreturn void session(int conn)
{
    struct msg_ready hello = { AGENT_VERSION };
    struct agent_get what;
    struct msg_head h;
    char *payload;

    signal(SIGPIPE, SIG_IGN);
    if (!put_message(conn, AGENT_HELLO, &hello, sizeof hello) || !tree_get(conn, &h, sizeof h))
        exit(0);
    if (h.len > MSG_MAX || !(payload = malloc(h.len + 1ul)))
        refuse(conn, "the agent does not understand the request");
    if (!tree_get(conn, payload, h.len))
        exit(0);
    payload[h.len] = 0;
    if (h.type == AGENT_EXEC)
        exec_session(conn, payload, h.len);
    if (h.type == AGENT_PUT && h.len && strlen(payload) == h.len)
        put_session(conn, payload);
    if (h.type == AGENT_GET && h.len > sizeof what && strlen(payload + sizeof what) == h.len - sizeof what) {
        memcpy(&what, payload, sizeof what);
        get_session(conn, payload + sizeof what, what.recursive);
    }
    refuse(conn, "the agent does not understand the request; build it anew from the same doppel");
}

static int open_listener(void)
{
    struct sockaddr_vm a = { .svm_family = AF_VSOCK, .svm_port = AGENT_PORT, .svm_cid = VMADDR_CID_ANY };
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd >= 0 && !bind(fd, (struct sockaddr *)&a, sizeof a) && !listen(fd, 64))
        return fd;
    fprintf(stderr, "doppel-agent: cannot listen on vsock: %s\n", strerror(errno));
    return -1;
}

int main(void)
{
    int listener = open_listener(), sessions = 0;

    if (listener < 0)
        return 1;
    if (chdir("/"))
        return 1;
    for (;;) {
        struct sockaddr_vm peer = { 0 };
        socklen_t len = sizeof peer;
        int conn = accept4(listener, (struct sockaddr *)&peer, &len, SOCK_CLOEXEC);

        while (waitpid(-1, NULL, WNOHANG) > 0)
            sessions--;
        if (conn < 0) {
            if (errno != EINTR && errno != ECONNABORTED)
                usleep(100000);                                    /* no descriptors, no memory: sessions will end */
            continue;
        }
        pid_t pid = peer.svm_cid == VMADDR_CID_HOST && sessions < SESSIONS_MAX ? fork() : -1;
        if (pid == 0) {
            close(listener);
            session(conn);
        }
        sessions += pid > 0;
        close(conn);
    }
}
