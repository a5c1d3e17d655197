/* Signals of a vCPU's thread, as plain values: signal.c delivers, fault.c decides. */
#pragma once

#include "base/types.h"

struct icpu;

struct bt_trap {
    u64 r[16];                                                     /* as numbered in cpu/x86.h */
    u64 pc, flags;
    u64 address, error;                                            /* of a memory fault: host address; error code as pushed by the processor */
    enum { TRAP_MEMORY, TRAP_ARITHMETIC, TRAP_STEP, TRAP_KICK, TRAP_AGAIN } what;
    bool has_address;
};

int bt_signal_open(void);                                          /* once for each vCPU; 0 or negative errno with err() */
void bt_signal_close(void);
int bt_signal_here(struct icpu *c);                                /* this thread runs c from now on, NULL: nothing any more */
bool bt_signal_is_here(const struct icpu *c);                       /* does this thread run c? */
int bt_signal_thread(void);                                        /* this thread's number for bt_signal_kick() */
const volatile u32 *bt_signal_cpu(void);                           /* where the kernel tells on which processor this thread was last; NULL: nowhere */
bool bt_signal_same_cpu(const volatile u32 *cpu);                  /* this thread is on the processor that another's bt_signal_cpu() tells */
void bt_signal_again(bool on);                                     /* this thread gets its kick once more when it has run for a millisecond; off: it need not */
void bt_signal_kick(int thread);                                   /* any thread */

/* fault.c: false: not translated code's. What it changes in *s becomes the thread's state. */
bool bt_trap(struct icpu *c, struct bt_trap *s);
