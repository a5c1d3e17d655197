/*
 * A vCPU's thread: run loop, sleep in HLT, pause, INIT and SIPI.
 *
 *   held --vcpu_release--> running --(event OUTSIDE)--> between runs --hold wanted--> held
 *                             |  ^
 *                        HLT  v  | event
 *                           asleep (futex on vcpu.events)
 */
#pragma once

#include <signal.h>

#include "cpu/machine.h"

struct vcpu_hooks {
    /* The engine gave RUN_SHUTDOWN or RUN_FAILED. On the vCPU's thread, which is held afterwards. */
    void (*stopped)(void *arg, struct vcpu *v, int run_exit, const char *message);
    void *arg;
};

/* Makes vCPU id of m (its struct, its bus, not its thread) in the power-on state. */
int vcpu_new(struct machine *m, unsigned id, const struct vcpu_hooks *hooks, struct vcpu **out);
int vcpu_start(struct vcpu *v);                                    /* creates the thread, held */
void vcpu_free(struct vcpu *v);                                    /* ends the thread; NULL is fine */

/* Tell all vCPUs to stand still, without waiting. Any thread, a vCPU's own included. */
void vcpus_freeze(struct machine *m);
/* The same and wait until they do. Not on a vCPU's thread, and with no device lock held. */
void vcpus_hold(struct machine *m);
void vcpus_release(struct machine *m);                             /* caller has held them */

/* Replaces the state of a held vCPU. */
int vcpu_set(struct vcpu *v, const struct x86 *x);
/* The same, for a machine that begins anew: what the engine has cached of the old guest is dropped. */
int vcpu_reset(struct vcpu *v, const struct x86 *x);
int vcpu_get(struct vcpu *v, struct x86 *x);
/* INIT, start-up IPIs and kicks that a held vCPU has not looked at yet become part of its state: before it is saved. */
void vcpu_settle(struct vcpu *v);

/* Sends the vCPU's thread a signal with a value, for cpu/sample.c; any thread. Nonzero: it has no thread. With machine_tools.profile vCPU threads do not block it. */
#define SAMPLE_SIGNAL (SIGRTMIN + 2)
int vcpu_interrupt(struct vcpu *v, int signo, void *value);

/* What a local APIC calls; vcpu is the struct vcpu. */
void vcpu_signal(void *vcpu, enum cpu_signal what, u8 vector);
struct cpu_port vcpu_port(struct vcpu *v);
