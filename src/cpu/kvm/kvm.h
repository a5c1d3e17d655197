/*
 * What the files of the KVM engine know of each other (Linux' Documentation/virt/kvm/api.rst). Nobody else includes
 * this.
 *
 * kvm.c: machine, memory, the run loop. features.c: CPUID and MSR policy. state.c: struct x86 in and out. chips.c: the
 * kernel's interrupt chips, and time. debug.c: a debugger's wishes.
 */
#pragma once

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>

#include "cpu/cpuid.h"
#include "cpu/engine.h"

#define KVM_MSRS_MAX 64

/* How a debugger's wishes are heeded while the guest runs (debug.c). */
struct kvm_plan_register {
    u64 la;
    u8 len, type;                                                  /* type: DR7's R/W */
    int watch;                                                     /* which watchpoint it is a part of; -1: a breakpoint */
};

struct kvm_plan_soft {
    u64 la, gpa;
    u8 old;
    bool in;                                                       /* INT3 stands there, and `old` belongs there */
};

struct kvm_plan {
    struct kvm_plan_register reg[4];
    struct kvm_plan_soft soft[DEBUG_POINTS_MAX];
    unsigned registers, softs;
};

enum kvm_step_kind { KVM_STEP_OTHER, KVM_STEP_PUSHF, KVM_STEP_SYSCALL };

struct kvm_step {
    bool active;
    bool own_tf;                                                   /* the guest has set TF itself */
    bool over;                                                     /* it passes the breakpoint in memory at over_la */
    enum kvm_step_kind kind;
    u64 over_la, target;                                           /* target: KVM_STEP_SYSCALL */
};

struct kvm_machine {
    int sys, vm;                                                   /* /dev/kvm; the machine */
    size_t run_size;                                               /* of the page that a vCPU shares with the kernel */
    bool sregs2, tsc_offset, deadline;                             /* capabilities */
    pthread_mutex_t lock;                                          /* the table of slots */
    /* of the table of runs that the slots show; 0: none */
    u64 epoch;
    unsigned slots;
    bool logging;                                                  /* the kernel notes what the guest writes */
    bool time_stopped;
    u32 guest_debug;                                               /* KVM_GUESTDBG_* that this kernel knows; 0: none */
    struct kvm_plan plan;
};

struct kvm_vcpu {
    int fd;
    struct kvm_run *run;
    pthread_t thread;                                              /* the one that runs it, once `known` */
    atomic_bool known;
    /* the last exit was an access that the next KVM_RUN completes */
    bool unfinished;
    bool shut_down;
    struct kvm_guest_debug debug;                                  /* as the kernel knows it */
    struct kvm_step step;
    u64 msr_there;                                                 /* which rows of state.c's table this kernel has */
    /* While guest time stands still: the local APIC's timer, which the kernel would let go on. */
    u32 held_initial, held_current;
    u64 held_deadline;
};

static inline struct kvm_machine *kvm_of(const struct machine *m)
{
    return m->engine_data;
}

static inline struct kvm_vcpu *kvcpu_of(const struct vcpu *v)
{
    return v->engine_data;
}

/* kvm.c. The signal that interrupts KVM_RUN: caught for the process, let through for this thread. */
#define KVM_KICK_SIGNAL (SIGRTMIN + 4)
void kvm_catch_kicks(void);
void kvm_take_kicks(void);

/* features.c */
void kvm_cpuid_limit(struct cpuid_policy *p);
int kvm_cpuid_set(struct vcpu *v);
void kvm_msr_policy(struct kvm_machine *k);                        /* which MSRs come to run() as exits */
void kvm_msr_exit(struct vcpu *v);                                 /* KVM_EXIT_X86_RDMSR and WRMSR */

/* state.c */
int kvm_look(struct vcpu *v, struct x86 *x);                       /* general, segment and control registers only */
void kvm_find_msrs(struct vcpu *v);
int kvm_get(struct vcpu *v, struct x86 *x);
int kvm_set(struct vcpu *v, const struct x86 *x);
/* an event half delivered goes back to where it came from */
int kvm_settle(struct vcpu *v);
int kvm_msr_get_one(struct vcpu *v, u32 msr, u64 *val);            /* 0, or -1 when this kernel has no such register */
int kvm_msr_set_one(struct vcpu *v, u32 msr, u64 val);
/* the guest's TSC is clock_tsc() + adjust from now on */
int kvm_tsc_set(struct vcpu *v, s64 adjust);

/* chips.c */
extern const struct irqchip_ops kvm_irqchip;
int kvm_chips_create(struct machine *m);
void kvm_time_stop(struct machine *m);
void kvm_time_start(struct machine *m);
void kvm_kick_ahead(struct vcpu *v);                               /* its next HLT ends at once */
/* takes an interrupt that was not delivered after all back from service */
int kvm_unack(struct vcpu *v, u8 vector);

/* debug.c */
int kvm_debug_check(const struct machine *m);                      /* engine.h: debug_check */
void kvm_debug_start(struct machine *m);                           /* before the vCPUs run */
void kvm_debug_stop(struct machine *m);                            /* they stand still */
int kvm_debug_enter(struct vcpu *v);
int kvm_debug_leave(struct vcpu *v);
int kvm_debug_exit(struct vcpu *v);
