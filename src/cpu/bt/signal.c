/*
 * Signals on a vCPU's thread while it runs translated code: taken off the host's frame, decided about in fault.c, put back.
 *
 * Handlers run on a stack of their own, for RSP is the guest's. Signal disposition is per process: hence the mutable file-scope state, under its own lock (a
 * leaf in the lock order), and the thread-local pointer. What is not ours goes to whoever was there before.
 */
#define _GNU_SOURCE
#include "cpu/bt/signal.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#if __has_include(<sys/rseq.h>)
#include <sys/rseq.h>
#endif
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "base/err.h"
#include "base/fault_signals.h"
#include "cpu/vcpu.h"

#define STACK_BYTES (128 * KiB)
/*
 * Not a real-time signal: those are lost where RLIMIT_SIGPENDING has been reached, and queue up where one is enough. By default this one is ignored, and debuggers let it
 * pass.
 */
#define KICK_SIGNAL SIGURG
#define AGAIN_NS 1000000

static _Thread_local struct {
    struct icpu *vcpu;
    bool ready, timed;
    int thread;
    void *stack;                                                   /* NULL: the thread's own */
    timer_t timer;                                                 /* if timed: sends this thread its kick again */
} here;
static pthread_key_t end_key;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned users;
static const int caught[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP };
static struct fault_signals faults = { .sig = caught, .n = ARRAY_SIZE(caught) };

static const u8 greg[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };

static void handler(int sig, siginfo_t *si, void *ucontext)
{
    greg_t *g = ((ucontext_t *)ucontext)->uc_mcontext.gregs;
    struct bt_trap s = { .pc = (u64)g[REG_RIP], .flags = (u64)g[REG_EFL], .error = (u64)g[REG_ERR], .address = (u64)(uintptr_t)si->si_addr };
    int saved = errno;
    s.what = sig == SIGFPE || sig == SIGILL ? TRAP_ARITHMETIC : sig == SIGTRAP ? TRAP_STEP : sig == SIGSEGV || sig == SIGBUS ? TRAP_MEMORY
             : si->si_code == SI_TIMER ? TRAP_AGAIN : TRAP_KICK;
    s.has_address = sig == SIGSEGV && (si->si_code == SEGV_MAPERR || si->si_code == SEGV_ACCERR);
    for (unsigned i = 0; i < 16; i++)
        s.r[i] = (u64)g[greg[i]];

    if (!here.vcpu || !bt_trap(here.vcpu, &s)) {
        if (s.what != TRAP_KICK && s.what != TRAP_AGAIN)
            fault_signals_chain(&faults, sig, si, ucontext);
        errno = saved;
        return;
    }
    for (unsigned i = 0; i < 16; i++)
        g[greg[i]] = (greg_t)s.r[i];
    g[REG_RIP] = (greg_t)s.pc;
    g[REG_EFL] = (greg_t)s.flags;
    errno = saved;
}

static struct sigaction action(void)
{
    struct sigaction sa = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
    sigfillset(&sa.sa_mask);
    sigdelset(&sa.sa_mask, SAMPLE_SIGNAL);                         /* what handlers do takes time, too */
    return sa;
}

int bt_signal_open(void)
{
    struct sigaction sa = action();
    pthread_mutex_lock(&lock);
    if (users++ == 0) {
        fault_signals_install(&faults, &sa);
        sigaction(KICK_SIGNAL, &sa, NULL);
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

void bt_signal_close(void)
{
    struct sigaction sa = action();
    pthread_mutex_lock(&lock);
    if (--users == 0)
        fault_signals_remove(&faults, &sa);
    pthread_mutex_unlock(&lock);
}

static void thread_end(void *arg UNUSED)
{
    if (here.timed)
        timer_delete(here.timer);
    here.timed = false;
    if (!here.stack)
        return;
    stack_t ss = { .ss_flags = SS_DISABLE };
    sigaltstack(&ss, NULL);
    munmap(here.stack, STACK_BYTES);
    here.stack = NULL;
}

static void make_key(void)
{
    pthread_key_create(&end_key, thread_end);
}

/* The thread's own alternate stack will do, if it has one. */
static int stack_make(void)
{
    stack_t ss;
    if (!sigaltstack(NULL, &ss) && !(ss.ss_flags & SS_DISABLE) && ss.ss_size >= STACK_BYTES / 4)
        return 0;
    void *p = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (p == MAP_FAILED)
        return err(-ENOMEM, "no memory for a signal stack");
    ss = (stack_t){ .ss_sp = p, .ss_size = STACK_BYTES };
    if (sigaltstack(&ss, NULL)) {
        int e = errno;
        munmap(p, STACK_BYTES);
        return err(-e, "no signal stack (sigaltstack): %s", strerror(e));
    }
    here.stack = p;
    return 0;
}

/* Of the time that the thread runs: it is not late while others have the processor. Where there are no timers any more it has to do without. */
static void timer_make(void)
{
    struct sigevent e = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = KICK_SIGNAL };
    e._sigev_un._tid = here.thread;
    here.timed = timer_create(CLOCK_THREAD_CPUTIME_ID, &e, &here.timer) == 0;
}

void bt_signal_again(bool on)
{
    struct itimerspec t = { .it_value.tv_nsec = on ? AGAIN_NS : 0 };
    if (here.timed)
        timer_settime(here.timer, 0, &t, NULL);
}

int bt_signal_here(struct icpu *c)
{
    sigset_t ours;
    if (c && !here.ready) {
        int e = stack_make();
        if (e < 0)
            return e;
        sigemptyset(&ours);
        sigaddset(&ours, KICK_SIGNAL);
        for (unsigned n = 0; n < ARRAY_SIZE(caught); n++)
            sigaddset(&ours, caught[n]);
        pthread_sigmask(SIG_UNBLOCK, &ours, NULL);
        here.ready = true;
        here.thread = (int)syscall(SYS_gettid);
        pthread_once(&key_once, make_key);
        pthread_setspecific(end_key, &here);
        timer_make();
    }
    here.vcpu = c;
    return 0;
}

bool bt_signal_is_here(const struct icpu *c)
{
    return here.vcpu == c;
}

int bt_signal_thread(void)
{
    return here.thread;
}

const volatile u32 *bt_signal_cpu(void)
{
#if __has_include(<sys/rseq.h>)
    if (__rseq_size)
        return &((const volatile struct rseq *)((const u8 *)__builtin_thread_pointer() + __rseq_offset))->cpu_id;
#endif
    return NULL;
}

bool bt_signal_same_cpu(const volatile u32 *cpu)
{
    return cpu && (int)*cpu == sched_getcpu();
}

void bt_signal_kick(int thread)
{
    if (thread)
        syscall(SYS_tgkill, getpid(), thread, KICK_SIGNAL);
}
