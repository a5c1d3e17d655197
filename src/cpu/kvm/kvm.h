/*
 * What the files of the KVM engine know of each other (Linux' Documentation/virt/kvm/api.rst). Nobody else includes
 * this.
 *
 * kvm.c: machine, memory, the run loop. features.c: CPUID and MSR policy. state.c: struct x86 in and out. chips.c: the
 * kernel's interrupt chips, and time.
 */
#pragma once

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>

#include "cpu/cpuid.h"
#include "cpu/engine.h"

#define KVM_MSRS_MAX 64

struct kvm_machine {
    int sys, vm;                                                   /* /dev/kvm; the machine */
    size_t run_size;                                               /* of the page that a vCPU shares with the kernel */
    bool sregs2, tsc_offset, deadline;                             /* capabilities */
    pthread_mutex_t lock;                                          /* the table of slots */
    /* of the table of runs that the slots show; 0: none */
    u64 epoch;
    unsigned slots;
    bool time_stopped;
};

struct kvm_vcpu {
    int fd;
    struct kvm_run *run;
    pthread_t thread;                                              /* the one that runs it, once `known` */
    atomic_bool known;
    /* the last exit was an access that the next KVM_RUN completes */
    bool unfinished;
    bool shut_down;
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
/* takes an interrupt that was not delivered after all back from service */
int kvm_unack(struct vcpu *v, u8 vector);
