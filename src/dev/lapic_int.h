/*
 * What lapic.c (one local APIC), lapic_timer.c (its timer) and lapic_bus.c (the bus between them) know of each other.
 * Nobody else includes this.
 */
#pragma once

#include <stdatomic.h>

#include "dev/lapic.h"

#define BASE_BSP BIT(8)
#define BASE_EXTD BIT(10)
#define BASE_EN BIT(11)
#define BASE_MODE (BASE_EN | BASE_EXTD)
#define SVR_ENABLE 0x100u

enum { LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR, LVTS };

/* of the LVT's timer entry (figure 11-8) */
#define TIMER_MODE(v) (((v) >> 17) & 3)
enum { TIMER_ONESHOT, TIMER_PERIODIC, TIMER_DEADLINE };

struct lapic_bus {
    struct lapic_config cfg;
    struct lapic **lapic;
    unsigned n;
    struct i8259 *pic;
    struct apic_eoi_sink eoi_sink;
    /* ops: the real local APICs; nothing is delivered or counts here then */
    struct irqchip elsewhere;
};

struct lapic {
    struct device device;
    struct lapic_bus *bus;
    struct bus *cpu_bus;
    int region;
    struct cpu_port cpu;
    u32 id;
    bool bsp;

    _Atomic u64 base;                                              /* IA32_APIC_BASE */
    _Atomic u8 tpr;
    u32 ldr, dfr, svr;
    u32 esr, errors;                                               /* as last latched; since then */
    u64 icr;
    u32 lvt[LVTS];
    u32 irr[8], isr[8], tmr[8];
    u8 lint;                                                       /* levels of LINT0 and LINT1, bits 0 and 1 */
    bool eoi_offered;                                              /* PV EOI: what is in service may have ended */
    bool extint_message;                                           /* an ExtINT message waits for its INTA cycle */

    struct timer timer;
    bool armed;
    u32 initial;
    u8 divide;                                                     /* the register: bits 3, 1, 0 */
    u64 deadline_ns;                                               /* count modes, while armed */
    u64 deadline_tsc;                                              /* TSC-deadline mode: 0 when not armed */
    s64 tsc_adjust;

    _Atomic int deliverable;                                       /* vector, or -1 */
    /* the i8259's INTR reaches the processor through here */
    _Atomic bool extint_open;
};

static inline bool lapic_hw_enabled(const struct lapic *l)
{
    return atomic_load_explicit(&l->base, memory_order_relaxed) & BASE_EN;
}

static inline bool lapic_x2apic(const struct lapic *l)
{
    return (atomic_load_explicit(&l->base, memory_order_relaxed) & BASE_MODE) == BASE_MODE;
}

/* 11.12.10.2: cluster in the high half, one member bit in the low half */
static inline u32 lapic_x2apic_ldr(const struct lapic *l)
{
    return (l->id >> 4) << 16 | 1u << (l->id & 15);
}

/* lapic.c; under the local APIC's lock */
u8 lapic_ppr(const struct lapic *l);
void lapic_accept(struct lapic *l, u8 mode, u8 vector, bool level); /* a message of any delivery mode */
void lapic_lint_set(struct lapic *l, int pin, int level);
void lapic_lvt_fire(struct lapic *l, int entry);                   /* an event of that LVT entry */

/* lapic_timer.c; under the local APIC's lock. Times are the machine's clock's. */
void lapic_timer_stop(struct lapic *l);
void lapic_timer_start_host(struct lapic *l);                      /* arm the host's timer for the guest's deadline */
void lapic_timer_start_count(struct lapic *l);                     /* the initial count was written */
void lapic_timer_set_deadline(struct lapic *l, u64 tsc);           /* IA32_TSC_DEADLINE was written; 0: disarm */
void lapic_timer_deadline_check(struct lapic *l);                  /* has the deadline passed? */
u32 lapic_timer_current(const struct lapic *l);                    /* the current-count register */
void lapic_timer_set_divide(struct lapic *l, u8 val);
void lapic_timer_take(struct lapic *l, const struct lapic_regs *r); /* the state of the real chip's */
void lapic_timer_fired(void *lapic);                               /* for timer_init(); takes the lock */

/* lapic_bus.c; takes locks itself */
void lapic_bus_send_except(struct lapic_bus *lb, const struct apic_msg *m, const struct lapic *except);
int lapic_bus_add(struct lapic_bus *lb, struct lapic *l);          /* 0 or -ENOMEM with err() */
void lapic_bus_remove(struct lapic_bus *lb, struct lapic *l);
