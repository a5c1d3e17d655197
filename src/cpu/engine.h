/* An engine advances struct x86. One table entry per engine; everything else of doppel is the same for all of them. */
#pragma once

#include "cpu/machine.h"

struct stats;

enum run_exit {
    RUN_OUTSIDE,      /* an event of VCPU_EV_OUTSIDE is set */
    RUN_HALTED,       /* HLT with nothing deliverable: vcpu.x.activity is X86_HALTED; wait for an event */
    RUN_SHUTDOWN,     /* triple fault: vcpu.x holds the state before it */
    RUN_FAILED,       /* host error, err() is set */
    RUN_DEBUG,        /* the debugger is to look: vcpu.debug.stop says why */
};

struct engine {
    const char *name;
    int (*machine_open)(struct machine *m);                        /* 0 or negative errno with err() */
    void (*machine_close)(struct machine *m);
    int (*vcpu_open)(struct vcpu *v);                              /* on the vCPU's thread or before it starts */
    void (*vcpu_close)(struct vcpu *v);
    enum run_exit (*run)(struct vcpu *v);                          /* vCPU's thread; v->x is live inside the engine until it returns */
    void (*kick)(struct vcpu *v);                                  /* any thread; v->events is set already. NULL: polling suffices */
    int (*get)(struct vcpu *v, struct x86 *x);                     /* vCPU's thread, or while it stands still */
    int (*set)(struct vcpu *v, const struct x86 *x);
    void (*reset)(struct vcpu *v);                                 /* while it stands still: another guest begins, what is cached of the old one's code and memory is given back. NULL: it has nothing */
    void (*cpuid_limit)(struct cpuid_policy *p);                   /* takes away the features that this engine cannot carry */
    void (*time_stop)(struct machine *m);                          /* before guest time stands still, and after it goes on; vCPUs are held. NULL: */
    void (*time_start)(struct machine *m);                         /* the engine has no clock of its own */
    /* The guest's RIP, as exactly as it is known, for a profile; on the vCPU's thread, in a signal handler that interrupted it at pc. *direct: that is the
     * guest's own code. NULL: the engine cannot tell. */
    u64 (*sample)(const struct vcpu *v, u64 pc, bool *direct);
    bool counts_insns;                                             /* vcpu.insns is right without machine_tools.insns, too */
    int (*dirty)(struct machine *m, unsigned run);                 /* vCPUs are held: notes (ram_mark_bits) the pages of that run that the guest wrote since the last call, while RAM is tracked. NULL: they are noted as they are written */
    unsigned debug_points;                                         /* how many breakpoints and watchpoints of a debugger it can heed at once */
    void (*stats)(const struct vcpu *v, struct stats *s);          /* what it knows besides counters, in groups of its own; any thread. NULL: nothing */
    int (*debug_check)(const struct machine *m);                   /* vCPUs are held: may m->debug be heeded as it is? 0, -ENOSPC, -EOPNOTSUPP. NULL: always */
    const struct irqchip_ops *irqchip;                             /* its interrupt chips (their arg: the machine), or NULL: ours are used */
};

extern const struct engine interp_engine, bt_engine, kvm_engine;

/* By name; NULL if there is none. engine_names() is for messages: "interp, kvm". */
const struct engine *engine_find(const char *name);
const char *engine_names(void);

/*
 * Which pages of RAM the guest, its devices and the monitor write, for snapshots and migration. vCPUs are held, devices
 * are quiescent or write by ram_begin_write().
 *
 *   untracked --machine_track(true): all pages are clean--> tracked --machine_track(false)--> untracked
 *
 * machine_dirty() adds run number i's written pages to bits (ram_run_words() of them) and makes them clean. A change of
 * engine loses none. 0 or a negative errno with err().
 */
int machine_track(struct machine *m, bool on);
int machine_dirty(struct machine *m, unsigned run, u64 *bits);
