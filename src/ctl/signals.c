/*
 * A pipe from the signal handler to the loop (signals.h). The handler may run on any thread; a write of one byte is
 * atomic and safe there.
 */
#define _GNU_SOURCE
#include "ctl/signals.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "base/err.h"
#include "ctl/terminal.h"

#define LAST_RESORT_SECONDS 3
/* timeout(1) signals its process and then its group, which is the same process again: one sender, at once, is one SIGTERM. */
#define SAME_TERM_NS 100000000ll

static const int watched[] = {SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGTSTP, SIGCONT, SIGWINCH, SIGALRM};

static struct {
    int pipe[2];
    struct loop_fd watch;
    void (*fn)(void *arg, int signo);
    void *arg;
    atomic_uint terms;                                             /* SIGTERMs so far */
    _Atomic long long term_ns;                                     /* the last one: when, by CLOCK_MONOTONIC */
    atomic_int term_sender;                                        /* and from which process */
    atomic_bool overdue;                                           /* the next alarm ends the process */
} signals = {.pipe = {-1, -1}};

/* Async-signal-safe. */
static bool same_term(const siginfo_t *info)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long ns = now.tv_sec * 1000000000ll + now.tv_nsec, last = atomic_exchange(&signals.term_ns, ns);
    int sender = atomic_exchange(&signals.term_sender, info->si_pid);
    return last && sender == info->si_pid && ns - last < SAME_TERM_NS;
}

static void on_signal(int signo, siginfo_t *info, void *context UNUSED)
{
    int saved_errno = errno;
    u8 byte = (u8)signo;
    if (signo == SIGTERM && same_term(info)) {
        errno = saved_errno;
        return;
    }
    /* The loop is to end us now. Should it hang, the next alarm does. */
    if (signo == SIGALRM && atomic_load(&signals.overdue))
        terminal_die(128 + SIGTERM);
    if (signo == SIGALRM || (signo == SIGTERM && atomic_fetch_add(&signals.terms, 1) >= 1)) {
        atomic_store(&signals.overdue, true);
        alarm(LAST_RESORT_SECONDS);
    }
    /* A full pipe holds thousands of signals that nobody has looked at: one more says nothing new. */
    ssize_t written UNUSED = write(signals.pipe[1], &byte, 1);
    errno = saved_errno;
}

static void on_pipe(void *arg UNUSED, u32 events UNUSED)
{
    u8 signo[64];
    ssize_t n = read(signals.pipe[0], signo, sizeof(signo));
    for (ssize_t i = 0; i < n; i++)
        signals.fn(signals.arg, signo[i]);
}

/* nohup ignores SIGHUP for us, a shell without job control SIGINT and SIGQUIT for its background jobs: it stays so. */
static bool ignored_by_parent(int signo)
{
    struct sigaction now;
    bool respected = signo == SIGHUP || signo == SIGINT || signo == SIGQUIT || signo == SIGTSTP;
    return respected && sigaction(signo, NULL, &now) == 0 && now.sa_handler == SIG_IGN;
}

int signals_open(struct loop *loop, void (*fn)(void *arg, int signo), void *arg)
{
    if (pipe2(signals.pipe, O_CLOEXEC | O_NONBLOCK) < 0)
        return err(-errno, "cannot make a pipe: %s; raise the limit of open files (ulimit -n)", strerror(errno));
    signals.fn = fn;
    signals.arg = arg;
    int r = loop_fd_add(loop, &signals.watch, signals.pipe[0], EPOLLIN, on_pipe, NULL);
    if (r < 0) {
        signals_close();
        return r;
    }
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_RESTART | SA_SIGINFO};
    sigfillset(&action.sa_mask);
    for (size_t i = 0; i < ARRAY_SIZE(watched); i++)
        if (!ignored_by_parent(watched[i]))
            sigaction(watched[i], &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    return 0;
}

void signals_close(void)
{
    for (size_t i = 0; i < ARRAY_SIZE(watched) && signals.watch.loop; i++)
        if (!ignored_by_parent(watched[i]))
            signal(watched[i], watched[i] == SIGALRM ? SIG_IGN : SIG_DFL);
    loop_fd_del(&signals.watch);
    for (size_t i = 0; i < ARRAY_SIZE(signals.pipe); i++)
        if (signals.pipe[i] >= 0)
            close(signals.pipe[i]);
    signals.pipe[0] = signals.pipe[1] = -1;
}

void signals_deadline(unsigned seconds)
{
    alarm(seconds);
}

void signals_stop_self(void)
{
    raise(SIGSTOP);
}
