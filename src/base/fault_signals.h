/*
 * Signals of faults (SIGSEGV, SIGFPE ...), shared with whoever had them before: one set per user of them, a file-scope object, since signal disposition is per
 * process. install and remove under the owner's lock; chain in the handler.
 */
#pragma once

#include <signal.h>

#include "base/types.h"

struct fault_signals {
    const int *sig;
    unsigned n;                                                    /* up to 8 */
    struct sigaction before[8];
};

/* sa: with SA_SIGINFO. */
void fault_signals_install(struct fault_signals *f, const struct sigaction *sa);
/* Whoever came after this handler keeps his. */
void fault_signals_remove(struct fault_signals *f, const struct sigaction *sa);
/* What is not the handler's goes to whoever was there before; where nobody was, the instruction faults again, and ends the process as it would have. */
void fault_signals_chain(const struct fault_signals *f, int sig, siginfo_t *si, void *ucontext);
