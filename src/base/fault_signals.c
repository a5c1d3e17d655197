/* Signals of faults (see fault_signals.h). */
#define _GNU_SOURCE
#include "base/fault_signals.h"

void fault_signals_install(struct fault_signals *f, const struct sigaction *sa)
{
    for (unsigned n = 0; n < f->n; n++)
        sigaction(f->sig[n], sa, &f->before[n]);
}

void fault_signals_remove(struct fault_signals *f, const struct sigaction *sa)
{
    for (unsigned n = 0; n < f->n; n++) {
        struct sigaction now;

        if (!sigaction(f->sig[n], NULL, &now) && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == sa->sa_sigaction)
            sigaction(f->sig[n], &f->before[n], NULL);
    }
}

void fault_signals_chain(const struct fault_signals *f, int sig, siginfo_t *si, void *ucontext)
{
    for (unsigned n = 0; n < f->n; n++) {
        const struct sigaction *old = &f->before[n];

        if (f->sig[n] != sig)
            continue;
        if (old->sa_flags & SA_SIGINFO)
            old->sa_sigaction(sig, si, ucontext);
        else if (old->sa_handler == SIG_DFL || old->sa_handler == SIG_IGN)
            signal(sig, SIG_DFL);
        else
            old->sa_handler(sig);
    }
}
