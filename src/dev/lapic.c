/*
 * Local APIC (Intel SDM vol. 3A chapter 11; section numbers below are of that volume). The bus between them is
 * lapic_bus.c, the timer lapic_timer.c.
 *
 * Modelled: xAPIC registers, x2APIC MSRs and the transitions between the modes,
 * fixed/lowest-priority/NMI/SMI/INIT/start-up/ExtINT messages, physical and logical destinations, shorthands, six LVT
 * entries, error status, one-shot/periodic/TSC-deadline timer, directed EOI (SVR bit 12). Left out: arbitration
 * (messages are delivered at once), remote read, focus processor checking, the CMCI entry. Delivery status always reads
 * idle.
 *
 * Locking: device.lock guards one local APIC's registers; the region has no lock, since EOI and ICR writes call into
 * the I/O APIC and other local APICs (their locks come earlier, or are equals), and so must let go of their own first.
 * What the vCPU asks all the time is mirrored in atomics: `deliverable`, `extint_open`, `tpr`, `base`. bus_move() and
 * timer_arm() take leaf locks.
 */
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "dev/lapic_int.h"

#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0
#define MSR_X2APIC 0x800

/* Registers: MMIO offset / 16 = MSR - 0x800 (table 11-6) */
enum {
    REG_ID = 0x02, REG_VERSION = 0x03, REG_TPR = 0x08, REG_APR = 0x09, REG_PPR = 0x0a, REG_EOI = 0x0b, REG_RRD = 0x0c,
        REG_LDR = 0x0d, REG_DFR = 0x0e,
    REG_SVR = 0x0f, REG_ISR = 0x10, REG_TMR = 0x18, REG_IRR = 0x20, REG_ESR = 0x28, REG_ICR = 0x30,
        REG_ICR_HIGH = 0x31, REG_LVT = 0x32,
    REG_INITIAL = 0x38, REG_CURRENT = 0x39, REG_DIVIDE = 0x3e, REG_SELF_IPI = 0x3f,
};

#define LVT_MASKED 0x10000u
#define LVT_LEVEL 0x8000u
#define LVT_REMOTE_IRR 0x4000u
#define LVT_MODE(v) (((v) >> 8) & 7)

/* Bits that software can write, per LVT entry (figure 11-8). */
static const u32 lvt_mask[LVTS] = {
    [LVT_TIMER] = 0x700ff, [LVT_THERMAL] = 0x107ff, [LVT_PERF] = 0x107ff, [LVT_LINT0] = 0x1a7ff, [LVT_LINT1] = 0x1a7ff,
    [LVT_ERROR] = 0x100ff,
};
/* delivery status, remote IRR: software writes back what it read */
#define LVT_READ_ONLY 0x5000u

/* integrated APIC, 6 LVT entries, EOI broadcasts can be suppressed */
#define VERSION (0x15 | (LVTS - 1) << 16 | 1 << 24)
#define SVR_NO_BROADCAST 0x1000u
#define SVR_MASK 0x11ffu

#define ESR_SEND_ILLEGAL 0x20u
#define ESR_RECEIVE_ILLEGAL 0x40u
#define ESR_REGISTER 0x80u

/* low half, without the delivery status (always idle) */
#define ICR_MASK 0xccfffu
/* writes of it are ignored, also in x2APIC mode, where it is gone */
#define ICR_STATUS 0x1000u
#define ICR_LOGICAL 0x800u
#define ICR_ASSERT 0x4000u
#define ICR_LEVEL 0x8000u

/* ---- vectors ---- */

static int highest(const u32 set[8])
{
    for (int i = 7; i >= 0; i--)
        if (set[i])
            return 32 * i + 31 - __builtin_clz(set[i]);
    return -1;
}

static void vector_set(u32 set[8], u8 v, bool on)
{
    if (on)
        set[v / 32] |= 1u << (v % 32);
    else
        set[v / 32] &= ~(1u << (v % 32));
}

static bool vector_get(const u32 set[8], u8 v)
{
    return set[v / 32] >> (v % 32) & 1;
}

u8 lapic_ppr(const struct lapic *l)                               /* 11.8.3.1 */
{
    int serving = highest(l->isr);
    u8 tpr = atomic_load(&l->tpr);

    return serving < 0 || tpr >> 4 >= serving >> 4 ? tpr : serving & 0xf0;
}

/* Recomputes the mirrors after any change of registers; tells the vCPU when there is something new for it. */
static void refresh(struct lapic *l)
{
    int v = lapic_hw_enabled(l) ? highest(l->irr) : -1;
    u32 lint0 = l->lvt[LVT_LINT0];
    bool open;

    if (l->bus->elsewhere.ops)
        return;
    if (v >= 0 && v >> 4 <= lapic_ppr(l) >> 4)
        v = -1;
    if (atomic_exchange(&l->deliverable, v) != v && v >= 0)
        l->cpu.signal(l->cpu.vcpu, CPU_INTR, 0);
    else if (l->eoi_offered && highest(l->irr) >= 0)
        l->cpu.signal(l->cpu.vcpu, CPU_INTR, 0); /* what holds it back may have ended already */

    if (lapic_hw_enabled(l))
        open = (!(lint0 & LVT_MASKED) && LVT_MODE(lint0) == APIC_EXTINT) || l->extint_message;
    else
        open = l->bsp; /* 11.4.3: LINT0 is the processor's INTR pin; the board wires the boot processor's */
    if (atomic_exchange(&l->extint_open, open) != open && open && l->bus->pic && i8259_pending(l->bus->pic))
        l->cpu.signal(l->cpu.vcpu, CPU_INTR, 0);
}

static void error(struct lapic *l, u32 bit)
{
    bool fresh = !(l->errors & bit);

    l->errors |= bit;
    if (fresh)
        lapic_lvt_fire(l, LVT_ERROR);
}

static void accept_fixed(struct lapic *l, u8 vector, bool level)
{
    if (!lapic_hw_enabled(l) || !(l->svr & SVR_ENABLE))
        return;
    if (vector < 16) {
        error(l, ESR_RECEIVE_ILLEGAL);
        return;
    }
    vector_set(l->irr, vector, true);
    vector_set(l->tmr, vector, level);
    refresh(l);
}

/* Any delivery mode, from a message or from the LVT. */
void lapic_accept(struct lapic *l, u8 mode, u8 vector, bool level)
{
    if (!lapic_hw_enabled(l))
        return;
    switch (mode) {
    case APIC_FIXED:
    case APIC_LOWEST:
        accept_fixed(l, vector, level);
        break;
    case APIC_SMI: l->cpu.signal(l->cpu.vcpu, CPU_SMI, 0); break;
    case APIC_NMI: l->cpu.signal(l->cpu.vcpu, CPU_NMI, 0); break;
    case APIC_INIT: l->cpu.signal(l->cpu.vcpu, CPU_INIT, 0); break;
    case APIC_SIPI: l->cpu.signal(l->cpu.vcpu, CPU_SIPI, vector); break;
    case APIC_EXTINT:
        l->extint_message = true;
        refresh(l);
        break;
    }
}

/* ---- local vector table, 11.5.1 ---- */

void lapic_lvt_fire(struct lapic *l, int entry)
{
    u32 v = l->lvt[entry];
    bool fixed_only = entry == LVT_TIMER || entry == LVT_ERROR;

    if (!(v & LVT_MASKED))
        lapic_accept(l, fixed_only ? APIC_FIXED : LVT_MODE(v), (u8)v, false);
}

/* LINT pins: ExtINT follows the i8259 itself (extint_open); fixed may be level-triggered; the rest is edge-triggered.
   */
static void lint_fire(struct lapic *l, int entry)
{
    u32 v = l->lvt[entry];

    if ((v & LVT_MASKED) || !lapic_hw_enabled(l))
        return;
    if (LVT_MODE(v) == APIC_EXTINT) {
        l->cpu.signal(l->cpu.vcpu, CPU_INTR, 0);
    /* LINT1 is always edge-triggered */
    } else if (LVT_MODE(v) == APIC_FIXED && (v & LVT_LEVEL) && entry == LVT_LINT0) {
        if (!(v & LVT_REMOTE_IRR)) {
            l->lvt[entry] |= LVT_REMOTE_IRR;
            accept_fixed(l, (u8)v, true);
        }
    } else {
        lapic_lvt_fire(l, entry);
    }
}

void lapic_lint_set(struct lapic *l, int pin, int level)
{
    bool was = l->lint >> pin & 1;

    l->lint = (u8)((l->lint & ~(1 << pin)) | level << pin);
    if (!level || was)
        return;
    if (!lapic_hw_enabled(l) && pin == 0 && l->bsp)
        l->cpu.signal(l->cpu.vcpu, CPU_INTR, 0);
    else
        lint_fire(l, LVT_LINT0 + pin);
}

/* The EOI of a level-triggered LINT0: with the pin still up it comes again. */
static void lint_eoi(struct lapic *l, u8 vector)
{
    u32 *v = &l->lvt[LVT_LINT0];

    if (!(*v & LVT_REMOTE_IRR) || (u8)*v != vector)
        return;
    *v &= ~LVT_REMOTE_IRR;
    if (l->lint & 1)
        lint_fire(l, LVT_LINT0);
}

/* ---- local vector table, 11.5.1 ---- */

static void lvt_write(struct lapic *l, int entry, u32 val)
{
    u32 old = l->lvt[entry];

    val = (val & lvt_mask[entry]) | (old & LVT_REMOTE_IRR);
    if (!(l->svr & SVR_ENABLE))
        val |= LVT_MASKED; /* 11.4.7.2 */
    if (entry == LVT_TIMER && (TIMER_MODE(val) == 3 || (TIMER_MODE(val) == TIMER_DEADLINE &&
        !l->bus->cfg.tsc_deadline)))
        val = (val & ~0x60000u) | (old & 0x60000u); /* reserved: the mode stays */
    if (!(val & LVT_LEVEL))
        val &= ~LVT_REMOTE_IRR;
    l->lvt[entry] = val;
    if (entry == LVT_TIMER && (TIMER_MODE(old) == TIMER_DEADLINE) != (TIMER_MODE(val) == TIMER_DEADLINE)) {
        l->initial = 0;
        lapic_timer_stop(l); /* 11.5.4.1: changing to or from TSC-deadline mode disarms */
    }
    /* A level-triggered pin that is up already counts as soon as the entry is open. */
    if (entry == LVT_LINT0 && (val & LVT_LEVEL) && (l->lint & 1))
        lint_fire(l, entry);
}

/* ---- messages ---- */

/* 11.6.1. Takes locks itself. Level-triggered IPIs do not exist any more: all are sent as edges, and a de-assert is no
   message. */
static void send_ipi(struct lapic *l, u64 icr, bool wide)
{
    struct lapic_bus *lb = l->bus;
    u32 low = (u32)icr;
    struct apic_msg m = {
        .dest = wide ? (u32)(icr >> 32) : (u32)(icr >> 56), .vector = (u8)low, .mode = (low >> 8) & 7,
        .logical = low & ICR_LOGICAL, .wide = wide,
    };
    unsigned shorthand = (low >> 18) & 3;
    struct apic_msg all = { .dest = UINT32_MAX, .vector = m.vector, .mode = m.mode, .wide = true };

    if (m.mode == APIC_INIT && (low & ICR_LEVEL) && !(low & ICR_ASSERT))
        return;
    if ((m.mode == APIC_FIXED || m.mode == APIC_LOWEST) && m.vector < 16) {
        pthread_mutex_lock(&l->device.lock);
        error(l, ESR_SEND_ILLEGAL);
        pthread_mutex_unlock(&l->device.lock);
        return;
    }
    switch (shorthand) {
    case 0:
        lapic_bus_send_except(lb, &m, NULL);
        break;
    case 1: /* table 11-3: self and all-including-self are valid for fixed only */
        if (m.mode != APIC_FIXED)
            break;
        pthread_mutex_lock(&l->device.lock);
        lapic_accept(l, APIC_FIXED, m.vector, false);
        pthread_mutex_unlock(&l->device.lock);
        break;
    case 2:
        if (m.mode == APIC_FIXED)
            lapic_bus_send_except(lb, &all, NULL);
        break;
    case 3:
        lapic_bus_send_except(lb, &all, l);
        break;
    }
}

/* 11.8.5. Takes locks itself. */
static void eoi(struct lapic *l)
{
    bool broadcast = false;
    int v;

    pthread_mutex_lock(&l->device.lock);
    v = highest(l->isr);
    if (v >= 0) {
        vector_set(l->isr, (u8)v, false);
        if (vector_get(l->tmr, (u8)v)) {
            broadcast = !(l->svr & SVR_NO_BROADCAST);
            lint_eoi(l, (u8)v);
        }
        refresh(l);
    }
    pthread_mutex_unlock(&l->device.lock);
    if (broadcast && l->bus->eoi_sink.eoi)
        l->bus->eoi_sink.eoi(l->bus->eoi_sink.chip, (u8)v);
}

/* ---- PV EOI ---- */

/*
 * While the offer stands, nothing is requested (IRR is empty), and the in-service register may show a vector that the
 * guest has ended in its own memory. Whatever arrives makes the vCPU look (refresh()), and its own accesses end the
 * offer first, so that nobody acts upon that bit. Other processors see it in the priority that lowest-priority messages
 * go by, where it is a hint. On the vCPU's thread.
 */
static void settle(struct lapic *l)
{
    int v;

    if (likely(!l->eoi_offered))
        return;
    pthread_mutex_lock(&l->device.lock);
    l->eoi_offered = false;
    if (l->cpu.eoi_done(l->cpu.vcpu) && (v = highest(l->isr)) >= 0)
        vector_set(l->isr, (u8)v, false);
    refresh(l);
    pthread_mutex_unlock(&l->device.lock);
}

/* The vector has just gone into service. The I/O APIC must hear of the end of level-triggered ones. Under the lock. */
static void offer_eoi(struct lapic *l, u8 vector)
{
    if (l->cpu.eoi_offer && !vector_get(l->tmr, vector) && highest(l->irr) < 0)
        l->eoi_offered = l->cpu.eoi_offer(l->cpu.vcpu);
}

/* ---- registers, table 11-1 and 11-6; under the lock ---- */

static bool reg_read(struct lapic *l, unsigned reg, u64 *val)
{
    bool x2 = lapic_x2apic(l);

    switch (reg) {
    case REG_ID: *val = x2 ? l->id : l->id << 24; return true;
    case REG_VERSION: *val = VERSION; return true;
    case REG_TPR: *val = atomic_load(&l->tpr); return true;
    case REG_PPR: *val = lapic_ppr(l); return true;
    case REG_LDR: *val = x2 ? lapic_x2apic_ldr(l) : l->ldr; return true;
    case REG_SVR: *val = l->svr; return true;
    case REG_ISR ... REG_ISR + 7: *val = l->isr[reg - REG_ISR]; return true;
    case REG_TMR ... REG_TMR + 7: *val = l->tmr[reg - REG_TMR]; return true;
    case REG_IRR ... REG_IRR + 7: *val = l->irr[reg - REG_IRR]; return true;
    case REG_ESR: *val = l->esr; return true;
    case REG_ICR: *val = x2 ? l->icr : (u32)l->icr; return true;
    case REG_LVT ... REG_LVT + LVTS - 1: *val = l->lvt[reg - REG_LVT]; return true;
    case REG_INITIAL: *val = l->initial; return true;
    case REG_CURRENT: *val = lapic_timer_current(l); return true;
    case REG_DIVIDE: *val = l->divide; return true;
    /* These exist in xAPIC mode only. */
    case REG_APR: *val = lapic_ppr(l); return !x2;
    case REG_EOI:
    case REG_RRD: *val = 0; return !x2;
    case REG_DFR: *val = l->dfr; return !x2;
    case REG_ICR_HIGH: *val = l->icr >> 32; return !x2;
    }
    return false;
}

/* The registers whose writes stay inside this local APIC. */
static bool reg_write(struct lapic *l, unsigned reg, u32 val)
{
    switch (reg) {
    case REG_TPR:
        atomic_store(&l->tpr, (u8)val);
        break;
    case REG_SVR:
        l->svr = val & SVR_MASK;
        if (!(val & SVR_ENABLE))
            for (int i = 0; i < LVTS; i++)
                l->lvt[i] |= LVT_MASKED;
        break;
    case REG_ESR:
        l->esr = l->errors;
        l->errors = 0;
        break;
    case REG_LVT ... REG_LVT + LVTS - 1:
        lvt_write(l, (int)reg - REG_LVT, val);
        break;
    case REG_INITIAL:
        if (TIMER_MODE(l->lvt[LVT_TIMER]) != TIMER_DEADLINE) {
            l->initial = val;
            lapic_timer_start_count(l);
        }
        break;
    case REG_DIVIDE:
        lapic_timer_set_divide(l, (u8)val);
        break;
    case REG_LDR:
        l->ldr = val & 0xff000000;
        break;
    case REG_DFR:
        l->dfr = val | 0x0fffffff;
        break;
    case REG_ICR_HIGH:
        l->icr = (u32)l->icr | (u64)(val & 0xff000000) << 32;
        break;
    case REG_ID: /* read-only from the Nehalem on */
    case REG_VERSION:
    case REG_APR:
    case REG_PPR:
    case REG_RRD:
    case REG_ISR ... REG_ISR + 7:
    case REG_TMR ... REG_TMR + 7:
    case REG_IRR ... REG_IRR + 7:
    case REG_CURRENT:
        return true;
    default:
        return false;
    }
    refresh(l);
    return true;
}

static u64 mmio_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct lapic *l = dev;
    u64 val = 0;

    if (off & 15) /* registers are 16 bytes apart; what is between them is undefined */
        return 0;
    settle(l);
    pthread_mutex_lock(&l->device.lock);
    if (!reg_read(l, (unsigned)(off >> 4), &val)) {
        error(l, ESR_REGISTER);
        val = 0;
    }
    pthread_mutex_unlock(&l->device.lock);
    return val;
}

static void mmio_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct lapic *l = dev;
    u64 icr;

    if (off & 15)
        return;
    settle(l);
    switch (off >> 4) {
    case REG_EOI:
        eoi(l);
        return;
    case REG_ICR:
        pthread_mutex_lock(&l->device.lock);
        icr = l->icr = (l->icr & 0xff00000000000000) | (val & ICR_MASK);
        pthread_mutex_unlock(&l->device.lock);
        send_ipi(l, icr, false);
        return;
    }
    pthread_mutex_lock(&l->device.lock);
    if (!reg_write(l, (unsigned)(off >> 4), (u32)val))
        error(l, ESR_REGISTER);
    pthread_mutex_unlock(&l->device.lock);
}

/* ---- x2APIC MSRs, 11.12.1.2 and table 11-6: reserved bits, reading write-only and writing read-only registers raise
   #GP ---- */

/* Bits that may be set in a write; 0 also for registers that must be written with 0 (EOI, ESR). -1: not writable. */
static s64 x2apic_writable(unsigned reg)
{
    switch (reg) {
    case REG_TPR: return 0xff;
    case REG_EOI:
    case REG_ESR: return 0;
    case REG_SVR: return SVR_MASK | 0x200; /* focus checking may be written and is ignored */
    case REG_LVT ... REG_LVT + LVTS - 1: return lvt_mask[reg - REG_LVT] | LVT_READ_ONLY;
    case REG_INITIAL: return UINT32_MAX;
    case REG_DIVIDE: return 0xb;
    case REG_SELF_IPI: return 0xff;
    }
    return -1;
}

static int x2apic_read(struct lapic *l, unsigned reg, u64 *val)
{
    bool there;

    pthread_mutex_lock(&l->device.lock);
    there = lapic_x2apic(l) && reg_read(l, reg, val);
    pthread_mutex_unlock(&l->device.lock);
    return there ? 0 : -1;
}

static int x2apic_write(struct lapic *l, unsigned reg, u64 val)
{
    s64 writable = x2apic_writable(reg);

    if (!lapic_x2apic(l))
        return -1;
    if (reg == REG_ICR) {
        if ((u32)val & ~(ICR_MASK | ICR_STATUS))
            return -1;
        pthread_mutex_lock(&l->device.lock);
        l->icr = val & ~(u64)ICR_STATUS;
        pthread_mutex_unlock(&l->device.lock);
        send_ipi(l, val, true);
        return 0;
    }
    if (writable < 0 || (val & ~(u64)writable))
        return -1;
    if (reg == REG_EOI) {
        eoi(l);
        return 0;
    }
    if (reg == REG_SELF_IPI) {
        send_ipi(l, val | 1 << 18, true);
        return 0;
    }
    pthread_mutex_lock(&l->device.lock);
    reg_write(l, reg, (u32)val);
    pthread_mutex_unlock(&l->device.lock);
    return 0;
}

/* ---- reset, modes ---- */

/* 11.4.7.1 and 11.4.7.3: the state after power-up and INIT, IA32_APIC_BASE and the pins aside. Under the lock. */
static void init_registers(struct lapic *l)
{
    lapic_timer_stop(l);
    atomic_store(&l->tpr, 0);
    l->ldr = 0;
    l->dfr = UINT32_MAX;
    l->svr = 0xff;
    l->esr = l->errors = 0;
    l->icr = 0;
    for (int i = 0; i < LVTS; i++)
        l->lvt[i] = LVT_MASKED;
    memset(l->irr, 0, sizeof(l->irr));
    memset(l->isr, 0, sizeof(l->isr));
    memset(l->tmr, 0, sizeof(l->tmr));
    l->extint_message = false;
    l->eoi_offered = false;
    l->initial = 0;
    l->divide = 0;
    refresh(l);
}

static void map_registers(struct lapic *l)
{
    u64 base = atomic_load(&l->base);

    bus_move(l->cpu_bus, l->region, base & PAGE_MASK, (base & BASE_MODE) == BASE_EN ? PAGE_SIZE : 0);
}

/* Figure 11-27: disabled -> xAPIC -> x2APIC, and back to disabled from both; all else raises #GP. */
static int base_write(struct lapic *l, u64 val)
{
    u64 allowed = BASE_BSP | BASE_EN | (BIT(l->bus->cfg.phys_bits) - PAGE_SIZE), old, mode = val & BASE_MODE;

    if (l->bus->cfg.x2apic)
        allowed |= BASE_EXTD;
    if (val & ~allowed)
        return -1;
    pthread_mutex_lock(&l->device.lock);
    old = atomic_load(&l->base) & BASE_MODE;
    if (mode == BASE_EXTD || (mode == BASE_MODE && old == 0) || (mode == BASE_EN && old == BASE_MODE)) {
        pthread_mutex_unlock(&l->device.lock);
        return -1;
    }
    atomic_store(&l->base, val);
    map_registers(l);
    if (!(mode & BASE_EN) && old)
        init_registers(l); /* 11.4.3, 11.12.5.1: nothing survives */
    if (mode == BASE_MODE && old == BASE_EN)
        l->icr = (u32)l->icr; /* 11.12.5.1: the destination is not carried over */
    refresh(l);
    pthread_mutex_unlock(&l->device.lock);
    return 0;
}

bool lapic_enabled(const struct lapic *l)
{
    return lapic_hw_enabled(l);
}

/* ---- the real chip elsewhere; under the lock ---- */

static int give(struct lapic *l)
{
    struct lapic_regs r = {
        .base = atomic_load(&l->base), .icr = l->icr, .tpr = atomic_load(&l->tpr), .ldr = lapic_x2apic(l)
        ? lapic_x2apic_ldr(l) : l->ldr, .dfr = l->dfr,
        .svr = l->svr, .esr = l->esr, .initial = l->initial, .current = lapic_timer_current(l), .divide = l->divide,
        .tsc_deadline = l->deadline_tsc,
    };

    memcpy(r.lvt, l->lvt, sizeof(r.lvt));
    memcpy(r.irr, l->irr, sizeof(r.irr));
    memcpy(r.isr, l->isr, sizeof(r.isr));
    memcpy(r.tmr, l->tmr, sizeof(r.tmr));
    return l->bus->elsewhere.ops->lapic_set(l->bus->elsewhere.arg, l->id, &r);
}

static int take(struct lapic *l)
{
    struct lapic_regs r;
    int e = l->bus->elsewhere.ops->lapic_get(l->bus->elsewhere.arg, l->id, &r);

    if (e < 0)
        return e;
    atomic_store(&l->base, r.base);
    atomic_store(&l->tpr, (u8)r.tpr);
    if (!lapic_x2apic(l))
        l->ldr = r.ldr & 0xff000000;
    l->dfr = r.dfr | 0x0fffffff;
    l->svr = r.svr & SVR_MASK;
    l->esr = r.esr;
    l->errors = 0;
    l->icr = r.icr & ~(u64)ICR_STATUS;
    for (int i = 0; i < LVTS; i++)
        l->lvt[i] = r.lvt[i] & (lvt_mask[i] | (i == LVT_LINT0 ? LVT_REMOTE_IRR : 0));
    memcpy(l->irr, r.irr, sizeof(l->irr));
    memcpy(l->isr, r.isr, sizeof(l->isr));
    memcpy(l->tmr, r.tmr, sizeof(l->tmr));
    l->lint = l->bus->pic && i8259_pending(l->bus->pic);           /* INTR is LINT0; nothing pulls LINT1 */
    l->extint_message = false;
    lapic_timer_take(l, &r);
    return 0;
}

void lapic_virtual_wire(struct lapic *l)
{
    pthread_mutex_lock(&l->device.lock);
    l->svr = SVR_ENABLE | 0xff;
    l->lvt[LVT_LINT0] = APIC_EXTINT << 8;
    l->lvt[LVT_LINT1] = APIC_NMI << 8;
    refresh(l);
    if (l->bus->elsewhere.ops)
        give(l);
    pthread_mutex_unlock(&l->device.lock);
}

void lapic_set_tsc_adjust(struct lapic *l, s64 adjust)
{
    pthread_mutex_lock(&l->device.lock);
    l->tsc_adjust = adjust;
    if (TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_DEADLINE)
        lapic_timer_deadline_check(l);
    pthread_mutex_unlock(&l->device.lock);
}

/* ---- the vCPU's side ---- */

static bool extint_ready(const struct lapic *l)
{
    return atomic_load_explicit(&l->extint_open, memory_order_acquire) && l->bus->pic && i8259_pending(l->bus->pic);
}

static int intc_peek(void *intc)
{
    struct lapic *l = intc;
    int v;

    settle(l);
    if (unlikely(extint_ready(l)) && (v = i8259_peek(l->bus->pic)) >= 0)
        return v;
    return atomic_load_explicit(&l->deliverable, memory_order_acquire);
}

static int intc_ack(void *intc)
{
    struct lapic *l = intc;
    bool extint = extint_ready(l);
    int v;

    settle(l);
    pthread_mutex_lock(&l->device.lock);
    if (extint) {
        l->extint_message = false;
        refresh(l);
        pthread_mutex_unlock(&l->device.lock);
        return i8259_ack(l->bus->pic);
    }
    v = atomic_load(&l->deliverable);
    if (v >= 0) {
        vector_set(l->irr, (u8)v, false);
        vector_set(l->isr, (u8)v, true);
        refresh(l);
        offer_eoi(l, (u8)v);
    }
    pthread_mutex_unlock(&l->device.lock);
    return v;
}

static int intc_msr_read(void *intc, u32 msr, u64 *val)
{
    struct lapic *l = intc;

    if (msr == MSR_APIC_BASE) {
        *val = atomic_load(&l->base);
        return 0;
    }
    if (msr == MSR_TSC_DEADLINE && l->bus->cfg.tsc_deadline) {
        pthread_mutex_lock(&l->device.lock);
        *val = l->deadline_tsc;
        pthread_mutex_unlock(&l->device.lock);
        return 0;
    }
    settle(l);
    if (msr >= MSR_X2APIC && msr < MSR_X2APIC + 0x100)
        return x2apic_read(l, msr - MSR_X2APIC, val);
    return -1;
}

static int intc_msr_write(void *intc, u32 msr, u64 val)
{
    struct lapic *l = intc;

    settle(l);
    if (msr == MSR_APIC_BASE)
        return base_write(l, val);
    if (msr == MSR_TSC_DEADLINE && l->bus->cfg.tsc_deadline) {
        pthread_mutex_lock(&l->device.lock);
        if (TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_DEADLINE) /* else ignored, 11.5.4.1 */
            lapic_timer_set_deadline(l, val);
        pthread_mutex_unlock(&l->device.lock);
        return 0;
    }
    if (msr >= MSR_X2APIC && msr < MSR_X2APIC + 0x100)
        return x2apic_write(l, msr - MSR_X2APIC, val);
    return -1;
}

static u8 intc_tpr_get(void *intc)
{
    const struct lapic *l = intc;

    return atomic_load(&l->tpr) >> 4;
}

static void intc_tpr_set(void *intc, u8 cr8)
{
    struct lapic *l = intc;

    settle(l);
    pthread_mutex_lock(&l->device.lock);
    atomic_store(&l->tpr, (u8)(cr8 << 4)); /* 11.8.6: the sub-class becomes 0 */
    refresh(l);
    pthread_mutex_unlock(&l->device.lock);
}

static void intc_tsc_adjust(void *intc, s64 adjust)
{
    lapic_set_tsc_adjust(intc, adjust);
}

static void intc_settle(void *intc)
{
    settle(intc);
}

static bool intc_accept(void *intc, u8 mode, u8 vector)
{
    struct lapic *l = intc;
    bool taken;

    pthread_mutex_lock(&l->device.lock);
    taken = lapic_hw_enabled(l) && (mode != APIC_FIXED || l->svr & SVR_ENABLE);
    lapic_accept(l, mode, vector, false);
    pthread_mutex_unlock(&l->device.lock);
    return taken;
}

static void intc_init(void *intc)
{
    struct lapic *l = intc;

    settle(l);
    pthread_mutex_lock(&l->device.lock);
    init_registers(l);
    pthread_mutex_unlock(&l->device.lock);
}

static const struct intc_ops lapic_intc_ops = {
    .peek = intc_peek,
    .ack = intc_ack,
    .msr_read = intc_msr_read,
    .msr_write = intc_msr_write,
    .tpr_get = intc_tpr_get,
    .tpr_set = intc_tpr_set,
    .tsc_adjust = intc_tsc_adjust,
    .settle = intc_settle,
    .accept = intc_accept,
    .init = intc_init,
};

struct intc lapic_intc(struct lapic *l)
{
    return (struct intc){ &lapic_intc_ops, l };
}

/* ---- device ---- */

static void lapic_reset(struct device *d)
{
    struct lapic *l = (struct lapic *)d;

    pthread_mutex_lock(&d->lock);
    atomic_store(&l->base, LAPIC_BASE | BASE_EN | (l->bsp ? BASE_BSP : 0));
    l->tsc_adjust = 0;
    map_registers(l);
    init_registers(l);
    if (l->bus->elsewhere.ops)
        give(l);
    pthread_mutex_unlock(&d->lock);
}

static void vectors_state(u32 set[8], struct stream *s)
{
    for (int i = 0; i < 8; i++)
        stream_u32(s, &set[i]);
}

/* Loaded registers are put into the form that writes would have given them; what could not be written at all is
   refused. */
static void state_check(struct lapic *l, struct stream *s, u64 base)
{
    u64 mode = base & BASE_MODE, allowed = BASE_BSP | BASE_MODE | (BIT(l->bus->cfg.phys_bits) - PAGE_SIZE);
    bool idle = !l->armed || TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_DEADLINE;

    if (mode == BASE_EXTD || (base & ~allowed) || (mode == BASE_MODE && !l->bus->cfg.x2apic))
        stream_bad(s, "lapic: impossible IA32_APIC_BASE");
    if (TIMER_MODE(l->lvt[LVT_TIMER]) == 3 || (!idle && !l->initial))
        stream_bad(s, "lapic: impossible timer");
    for (int i = 0; i < LVTS; i++)
        l->lvt[i] &= lvt_mask[i] | (i == LVT_LINT0 ? LVT_REMOTE_IRR : 0);
    l->svr &= SVR_MASK;
    l->divide &= 0xb;
    l->lint &= 3;
    l->irr[0] &= 0xffff0000;
    l->isr[0] &= 0xffff0000;
}

static void lapic_state(struct device *d, struct stream *s)
{
    struct lapic *l = (struct lapic *)d;

    if (l->bus->elsewhere.ops && !s->load && !s->error)
        s->error = take(l);
    u64 base = atomic_load(&l->base);
    u64 adjust = (u64)l->tsc_adjust;
    u8 tpr = atomic_load(&l->tpr);

    stream_section(s, "lapic", 1);
    stream_u64(s, &base);
    stream_u8(s, &tpr);
    stream_u32(s, &l->ldr);
    stream_u32(s, &l->dfr);
    stream_u32(s, &l->svr);
    stream_u32(s, &l->esr);
    stream_u32(s, &l->errors);
    stream_u64(s, &l->icr);
    for (int i = 0; i < LVTS; i++)
        stream_u32(s, &l->lvt[i]);
    vectors_state(l->irr, s);
    vectors_state(l->isr, s);
    vectors_state(l->tmr, s);
    stream_u8(s, &l->lint);
    stream_bool(s, &l->extint_message);
    stream_bool(s, &l->armed);
    stream_u32(s, &l->initial);
    stream_u8(s, &l->divide);
    stream_u64(s, &l->deadline_ns);
    stream_u64(s, &l->deadline_tsc);
    stream_u64(s, &adjust);
    if (!s->load)
        return;
    if (!s->error)
        state_check(l, s, base);
    if (s->error) { /* a mixture of old and new: leave nothing that could fire */
        init_registers(l);
        return;
    }
    atomic_store(&l->base, base);
    atomic_store(&l->tpr, tpr);
    l->tsc_adjust = (s64)adjust;
    l->eoi_offered = false;
    map_registers(l);
    timer_disarm(&l->timer);
    if (l->armed)
        lapic_timer_start_host(l);
    atomic_store(&l->deliverable, -1);
    atomic_store(&l->extint_open, false);
    refresh(l);
    if (l->bus->elsewhere.ops)
        s->error = give(l);
}

static void lapic_free(struct device *d)
{
    struct lapic *l = (struct lapic *)d;

    timer_disarm(&l->timer);
    lapic_bus_remove(l->bus, l);
    pthread_mutex_destroy(&d->lock);
    free(l);
}

static const struct device_ops lapic_ops = {
    .name = "lapic",
    .reset = lapic_reset,
    .state = lapic_state,
    .free = lapic_free,
};

int lapic_new(struct lapic_bus *lb, struct bus *cpu_bus, u32 id, bool bsp, struct cpu_port cpu, struct lapic **out)
{
    struct lapic *l = calloc(1, sizeof(*l));
    int r;

    if (!l)
        return err(-ENOMEM, "lapic: out of memory");
    device_init(&l->device, &lapic_ops);
    l->bus = lb;
    l->cpu_bus = cpu_bus;
    l->cpu = cpu;
    l->id = id;
    l->bsp = bsp;
    timer_init(&l->timer, lb->cfg.clock, lapic_timer_fired, l);
    atomic_init(&l->deliverable, -1);

    struct region region = { .base = LAPIC_BASE, .min = 4, .max = 4, .read = mmio_read, .write = mmio_write, .dev = l,
        .name = "lapic" };
    r = l->region = bus_add(cpu_bus, &region); /* mapped by the reset */
    if (r >= 0)
        r = lapic_bus_add(lb, l);
    if (r < 0) {
        lapic_free(&l->device);
        return r;
    }
    lapic_reset(&l->device);
    *out = l;
    return 0;
}
