/*
 * Faults inside stubs: unmasked SIMD floating-point exceptions arrive as SIGFPE, misaligned operands as SIGSEGV without an address (SI_KERNEL), instructions
 * that the host lacks as SIGILL. Each thread announces the arena that it runs; a fault elsewhere goes to whoever was there before.
 *
 * Signal disposition is per process: hence the mutable file-scope state, under its own lock (a leaf in the lock order), and the thread-local range.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <ucontext.h>

#include "base/fault_signals.h"
#include "cpu/interp/fp_signal.h"
#include "cpu/trap.h"
#include "cpu/vcpu.h"

static _Thread_local struct {
    const u8 *start, *end;
} here;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned users;
static atomic_bool installed;
static const int caught[] = {SIGFPE, SIGSEGV, SIGILL};
static struct fault_signals faults = {.sig = caught, .n = ARRAY_SIZE(caught)};

static void handler(int sig, siginfo_t *si, void *ucontext)
{
    ucontext_t *uc = ucontext;
    const u8 *pc = (const u8 *)uc->uc_mcontext.gregs[REG_RIP];
    bool ours = pc >= here.start && pc < here.end && si->si_code > 0;

    /* A page fault has an address and is no fault of the guest's: its memory operand has been translated already. */
    if (!ours || (sig == SIGSEGV && si->si_code != SI_KERNEL)) {
        fault_signals_chain(&faults, sig, si, ucontext);
        return;
    }
    uc->uc_mcontext.gregs[REG_RAX] = sig == SIGFPE ? VEC_XM : sig == SIGILL ? VEC_UD : VEC_GP;
    uc->uc_mcontext.gregs[REG_RIP] = (greg_t)here.start;
}

void fp_signal_open(void)
{
    pthread_mutex_lock(&lock);
    users++;
    pthread_mutex_unlock(&lock);
}

static struct sigaction action(void)
{
    struct sigaction sa = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};

    /* As bt's, which it may stand before: a kick that came while that one looks at a fault would be taken for one in C code, and be lost. */
    sigfillset(&sa.sa_mask);
    sigdelset(&sa.sa_mask, SAMPLE_SIGNAL);
    return sa;
}

static void install(void)
{
    struct sigaction sa = action();

    pthread_mutex_lock(&lock);
    if (!atomic_load(&installed)) {
        fault_signals_install(&faults, &sa);
        atomic_store(&installed, true);
    }
    pthread_mutex_unlock(&lock);
}

static void uninstall(void)
{
    struct sigaction sa = action();

    fault_signals_remove(&faults, &sa);
    atomic_store(&installed, false);
}

void fp_signal_close(const u8 *start)
{
    pthread_mutex_lock(&lock);
    if (--users == 0 && atomic_load(&installed))
        uninstall();
    pthread_mutex_unlock(&lock);
    if (here.start == start)
        here.start = here.end = NULL;
}

void fp_signal_here(const u8 *start, const u8 *end)
{
    here.start = start;
    here.end = end;
    if (unlikely(!atomic_load_explicit(&installed, memory_order_acquire)))
        install();
}
