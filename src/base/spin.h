/*
 * Whether a thread that has to wait looks for what it waits for before it sleeps. To be woken up costs 20 us and more on an idle processor, on both sides; an answer
 * that comes within that time is cheaper to look out for. It is learnt from how the last waits went: a thread whose waits are long never looks.
 *
 * Each struct spin is one thread's.
 */
#pragma once

#include <stdbool.h>

#include "base/types.h"

#define SPIN_NS 200000u                                            /* so long at most; what takes longer is worth a sleep (KVM's halt_poll_ns is as much) */

struct spin {
    unsigned credit;                                               /* short waits, less those that looking did not shorten */
    u64 not_before;                                                /* spin_clock(); 0: no matter */
};

u64 spin_clock(void);                                              /* ns; CLOCK_MONOTONIC */
bool spin_pays(const struct spin *s);
/* Looks until come(arg), or for SPIN_NS, or until another thread wants the processor. True: it has come. */
bool spin_look(struct spin *s, bool (*come)(void *arg), void *arg);
/* It slept for so many ns until what it waited for had come. */
void spin_slept(struct spin *s, u64 ns);
