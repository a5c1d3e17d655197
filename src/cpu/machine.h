/* What the processors of one guest share, and the processor as the rest of doppel sees it. Owned by struct vm. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "base/clock.h"
#include "base/err.h"
#include "base/trace.h"
#include "cpu/debug.h"
#include "cpu/x86.h"
#include "io/bus.h"
#include "io/irq.h"
#include "mem/ram.h"

struct engine;
struct vcpu;
struct cpuid_policy;

struct check_gate;

/* How translated code reaches guest memory (cpu/bt). */
enum machine_mmu { MACHINE_MMU_AUTO, MACHINE_MMU_SHADOW, MACHINE_MMU_SOFTTLB };

/* What is to be observed, and how engines are to work; fixed before they are opened. */
struct machine_tools {
    bool insns;                    /* retired instructions are counted, by engines that do so at a cost, too */
    bool handlers;                 /* which instructions of the guest need a handler */
    bool profile;                  /* vCPUs' threads take the sampler's signal (cpu/sample.h) */
    bool translate_at_once;        /* nothing is interpreted first: tests */
    bool signals;                  /* events reach translated code by signals only: tests */
    enum machine_mmu mmu;
    bool check;                    /* engines are compared (cpu/bt/check.h) */
    struct check_gate *gate;       /* its own */
};

struct machine {
    struct ram *ram;
    struct bus *pio, *mmio;
    struct clock *clock;
    struct trace *trace;
    const struct log *log;
    const struct engine *engine;
    struct cpuid_policy *cpuid;
    unsigned vcpus;
    struct vcpu **vcpu;
    pthread_mutex_t split_lock;                                    /* LOCK operations that cross a page or reach a device */
    struct debug debug;                                            /* a debugger's wishes */
    struct machine_tools tools;
    void *engine_data;                                             /* the engine's, per machine */
};

/* Why something else wants a vCPU's attention: bits of vcpu.events, set by any thread, seen by the engine at the next block boundary. */
enum vcpu_event {
    VCPU_EV_INTR = 1 << 0,    /* ask intc_ops.peek */
    VCPU_EV_NMI = 1 << 1,
    VCPU_EV_INIT = 1 << 2,    /* handled outside the engine: run() returns */
    VCPU_EV_SIPI = 1 << 3,    /* likewise */
    VCPU_EV_KICK = 1 << 4,    /* likewise: pause, reset, quit, get/set of state */
    VCPU_EV_CLOCK = 1 << 5,   /* refresh the paravirtual clock page */
    VCPU_EV_UNHALT = 1 << 6,  /* another vCPU ends this one's HLT, or its next one (KVM_HC_KICK_CPU) */
    VCPU_EV_CODE = 1 << 7,    /* pages have become code or are being written: cpu/bt/codepage.h */
};
#define VCPU_EV_OUTSIDE (VCPU_EV_INIT | VCPU_EV_SIPI | VCPU_EV_KICK)

/* What is counted of a vCPU (count.def), in groups. */
enum vcpu_counted {
#define COUNT(id, group, name) COUNT_##id,
#include "cpu/count.def"
#undef COUNT
    COUNTS
};
enum count_group { GROUP_HANDLED, GROUP_TRAPS, GROUP_MEMORY, GROUP_CODE, GROUP_EXITS, GROUP_CHECK, GROUPS };

/*
 * Where a vCPU's time goes: published by its thread, one store at each change, for whoever samples it (cpu/sample.h). Whoever enters a part puts back
 * what was there before when it leaves.
 */
enum vcpu_where {
    WHERE_HELD,               /* stands still, or has not begun */
    WHERE_HALTED,
    WHERE_BOUNDARY,           /* between blocks: events, interrupts */
    WHERE_INTERP,
    WHERE_TRANSLATED,
    WHERE_GUEST,              /* on hardware */
    WHERE_HANDLER,            /* interp's, called by translated code */
    WHERE_FIND,               /* look-up of blocks and translations */
    WHERE_DECODE,
    WHERE_TRANSLATE,
    WHERE_WALK,               /* guest page tables */
    WHERE_SHADOW,
    WHERE_DELIVER,            /* exceptions and interrupts on their way to the guest */
    WHERE_DEVICE,
    WHERE_CHECK,
    WHERES
};

/* Steal time that is not in the guest's record yet (pv.c). */
struct vcpu_pv {
    u64 since_ns;                                                  /* ran_ns is up to here */
    /* it ran that long since the thread's own clock stood at cpu_ns; 0: not looked at yet */
    u64 ran_ns, cpu_ns;
};

struct vcpu {
    struct machine *m;
    unsigned id;                                                   /* also the APIC ID */
    struct x86 x;                                                  /* valid while the engine does not run, or after engine->get() */
    struct bus *mmio;                                              /* own bus: the local APIC's page; parent m->mmio */
    struct intc intc;
    _Atomic u32 events;
    _Atomic u8 sipi_vector;
    u64 insns;                                                     /* retired, for statistics; written by the vCPU's thread only */
    u64 count[COUNTS];                                             /* likewise */
    _Atomic u8 where;                                              /* enum vcpu_where; likewise */
    _Atomic u8 left;                                               /* why translated code was left last: of GROUP_EXITS; likewise */
    struct vcpu_pv pv;
    struct vcpu_debug debug;
    void *engine_data;                                             /* the engine's, per vCPU */
    void *thread;                                                  /* vcpu.c's */
};

/* Sets event bits and makes the vCPU notice soon: wakes it from HLT, kicks the engine. Any thread, never blocks. Defined in vcpu.c. */
void vcpu_raise(struct vcpu *v, u32 events);

/* On the vCPU's thread. */
static inline void vcpu_count(struct vcpu *v, enum vcpu_counted what)
{
    v->count[what]++;
}
static inline void vcpu_count_add(struct vcpu *v, enum vcpu_counted what, u64 n)
{
    v->count[what] += n;
}
/* Translated code is left: counts it, and what comes now is because of that. */
static inline void vcpu_left(struct vcpu *v, enum vcpu_counted why)
{
    _Static_assert(COUNTS <= 256, "vcpu.left is a byte");
    v->count[why]++;
    atomic_store_explicit(&v->left, (u8)why, memory_order_relaxed);
}
const char *vcpu_count_name(enum vcpu_counted what);
enum count_group vcpu_count_group(enum vcpu_counted what);
const char *vcpu_where_name(enum vcpu_where w);
void vcpu_count_apic(struct vcpu *v, unsigned reg);                /* reg: offset / 16 = MSR - 0x800 */

/* Enters a part; returns the one that was left, to be put back. */
static inline enum vcpu_where vcpu_where(struct vcpu *v, enum vcpu_where w)
{
    enum vcpu_where old = atomic_load_explicit(&v->where, memory_order_relaxed);

    atomic_store_explicit(&v->where, w, memory_order_relaxed);
    return old;
}

/* Port and MMIO accesses of a vCPU, traced and counted; all engines use these. Size 1..8. */
void vcpu_pio(struct vcpu *v, u16 port, unsigned size, bool write, u64 *val);
void vcpu_mmio(struct vcpu *v, u64 gpa, unsigned size, bool write, u64 *val);
