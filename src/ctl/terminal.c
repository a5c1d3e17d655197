/*
 * Raw mode and its undoing (terminal.h; termios(3)). Raw mode leaves nothing to the line discipline: the guest has one
 * of its own.
 */
#define _GNU_SOURCE
#include "ctl/terminal.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#define CRASH_STACK (64 * KiB)

static const int crash_signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP, SIGSYS};

static struct {
    int fd;
    struct termios cooked;
    atomic_bool raw;
    struct sigaction previous[ARRAY_SIZE(crash_signals)];
    /* the main thread's normal one may be what has overflowed */
    u8 crash_stack[CRASH_STACK];
} terminal = {.fd = -1};

bool terminal_is_raw(void)
{
    return atomic_load(&terminal.raw);
}

/* In the background tcsetattr() would stop us by SIGTTOU, in the middle of ending; blocked, it goes ahead. */
void terminal_restore(void)
{
    sigset_t ttou, before;
    int saved_errno = errno;
    if (!atomic_exchange(&terminal.raw, false))
        return;
    sigemptyset(&ttou);
    sigaddset(&ttou, SIGTTOU);
    pthread_sigmask(SIG_BLOCK, &ttou, &before);
    tcsetattr(terminal.fd, TCSANOW, &terminal.cooked);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = saved_errno;
}

void terminal_raw(void)
{
    if (terminal.fd < 0)
        return;
    struct termios t = terminal.cooked;
    cfmakeraw(&t);
    t.c_cc[VMIN] = 1;
    t.c_cc[VTIME] = 0;
    atomic_store(&terminal.raw, true);
    while (tcsetattr(terminal.fd, TCSANOW, &t) < 0 && errno == EINTR)
        ;
}

_Noreturn void terminal_die(int status)
{
    terminal_restore();
    _exit(status);
}

/*
 * A crash: the terminal first, then what would have happened without us (a core dump, a sanitizer's report). A fault
 * comes again when its instruction does; a signal that somebody sent is sent again.
 */
static void crashed(int signo, siginfo_t *info, void *context UNUSED)
{
    terminal_restore();
    for (size_t i = 0; i < ARRAY_SIZE(crash_signals); i++)
        if (crash_signals[i] == signo)
            sigaction(signo, &terminal.previous[i], NULL);
    if (info->si_code <= 0)
        raise(signo);
}

static void install_crash_handlers(void)
{
    stack_t stack = {.ss_sp = terminal.crash_stack, .ss_size = sizeof(terminal.crash_stack)};
    sigaltstack(&stack, NULL);
    struct sigaction action = {.sa_sigaction = crashed, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < ARRAY_SIZE(crash_signals); i++)
        sigaction(crash_signals[i], &action, &terminal.previous[i]);
}

int terminal_open(int fd)
{
    if (tcgetattr(fd, &terminal.cooked) < 0)
        return -ENOTTY;
    terminal.fd = fd;
    install_crash_handlers();
    atexit(terminal_restore);
    return 0;
}

bool terminal_size(int fd, u16 *cols, u16 *rows)
{
    struct winsize w;
    if (ioctl(fd, TIOCGWINSZ, &w) < 0 || !w.ws_col || !w.ws_row)
        return false;
    *cols = w.ws_col;
    *rows = w.ws_row;
    return true;
}
