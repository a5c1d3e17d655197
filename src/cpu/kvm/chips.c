/*
 * The kernel's interrupt chips and PIT (Linux' Documentation/virt/kvm/api.rst: KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2),
 * and guest time.
 *
 * Routing: each input of each chip has a number (GSI) of its own, so that our two wires, to the i8259 and to the I/O
 * APIC, stay two. GSI 0 is the kernel's PIT, which pulls IR0 and pin 2; our own lines to these two are not connected.
 *
 * What KVM's chips do not keep is lost on the way through them, and no guest can tell but by its timing: the PIT's
 * counter 0 starts its period anew; a count that is not in force yet; a one-shot count of a local APIC that has run out
 * reads as 0.
 *
 * While guest time stands still the local APICs' timers are taken out and kept; the kernel would let them go on. A tick
 * of the PIT in that time is one tick.
 *
 * Threads: wires and messages from any; the rest only while the vCPUs stand still.
 */
#include "cpu/kvm/kvm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#include "base/err.h"

#define MSR_APIC_BASE 0x1b
#define MSR_TSC_ADJUST 0x3b
#define MSR_TSC_DEADLINE 0x6e0
/* inputs of the i8259 pair: 24..39; of the I/O APIC: 1..23 */
#define GSI_PIC 24
#define PIT_PIN 2
#define CASCADE 2
#define PIT_NO_MODE 0xff                                           /* KVM: no count was ever written */

/* Offsets in the local APIC's page, SDM vol. 3A table 11-1 */
enum {
    REG_ID = 0x20, REG_TPR = 0x80, REG_LDR = 0xd0, REG_DFR = 0xe0, REG_SVR = 0xf0, REG_ISR = 0x100, REG_TMR = 0x180,
        REG_IRR = 0x200, REG_ESR = 0x280,
    REG_ICR = 0x300, REG_ICR_HIGH = 0x310, REG_LVT = 0x320, REG_INITIAL = 0x380, REG_CURRENT = 0x390,
        REG_DIVIDE = 0x3e0,
};
#define BASE_X2APIC 0x400u

/* ---- creation ---- */

static void route(struct kvm_irq_routing *table, u32 gsi, u32 chip, u32 pin)
{
    table->entries[table->nr++] = (struct kvm_irq_routing_entry){
        .gsi = gsi, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = { .irqchip = chip, .pin = pin },
    };
}

static int set_routing(struct kvm_machine *k)
{
    struct kvm_irq_routing *table = calloc(1, sizeof *table + 64 * sizeof table->entries[0]);
    int r = 0;

    if (!table)
        return err(-ENOMEM, "kvm: out of memory");
    route(table, 0, KVM_IRQCHIP_PIC_MASTER, 0);
    route(table, 0, KVM_IRQCHIP_IOAPIC, PIT_PIN);
    for (u32 n = 1; n < KVM_IOAPIC_NUM_PINS; n++)
        if (n != PIT_PIN)
            route(table, n, KVM_IRQCHIP_IOAPIC, n);
    for (u32 n = 1; n < 16; n++)
        if (n != CASCADE)
            route(table, GSI_PIC + n, n < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, n & 7);
    if (ioctl(k->vm, KVM_SET_GSI_ROUTING, table) < 0)
        r = err(-errno, "kvm: cannot wire the interrupt chips: %s", strerror(errno));
    free(table);
    return r;
}

int kvm_chips_create(struct machine *m)
{
    struct kvm_machine *k = kvm_of(m);
    struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
    struct kvm_reinject_control no_reinject = { 0 };
    struct kvm_enable_cap x2apic = { .cap = KVM_CAP_X2APIC_API,
        .args = { KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK } };

    if (ioctl(k->vm, KVM_CREATE_IRQCHIP, 0) < 0 || ioctl(k->vm, KVM_CREATE_PIT2, &pit) < 0)
        return err(-errno, "kvm: cannot make the interrupt chips: %s", strerror(errno));
    if (ioctl(k->vm, KVM_ENABLE_CAP, &x2apic) < 0)
        return err(-errno, "kvm: this host's KVM is too old, it has no 32-bit APIC IDs: %s; choose another engine",
                   strerror(errno));
    /* missed ticks coalesce, as our PIT's do; without this they come late */
    ioctl(k->vm, KVM_REINJECT_CONTROL, &no_reinject);
    return set_routing(k);
}

/* ---- wires and messages ---- */

static void line(struct machine *m, u32 gsi, int level)
{
    struct kvm_irq_level l = { .irq = gsi, .level = (u32)level };

    ioctl(kvm_of(m)->vm, KVM_IRQ_LINE, &l);
}

static void pic_line(void *arg, int n, int level)
{
    if (n != 0 && n != CASCADE)
        line(arg, GSI_PIC + (u32)n, level);
}

static void ioapic_line(void *arg, int n, int level)
{
    if (n != 0 && n != PIT_PIN)
        line(arg, (u32)n, level);
}

static void msi(void *arg, u64 addr, u32 data)
{
    struct machine *m = arg;
    struct kvm_msi message = { .address_lo = (u32)addr, .address_hi = (u32)(addr >> 32), .data = data };

    ioctl(kvm_of(m)->vm, KVM_SIGNAL_MSI, &message);
}

/* ---- local APIC ---- */

static u32 reg(const struct kvm_lapic_state *s, unsigned off)
{
    u32 v;

    memcpy(&v, s->regs + off, sizeof v);
    return v;
}

static void reg_put(struct kvm_lapic_state *s, unsigned off, u32 v)
{
    memcpy(s->regs + off, &v, sizeof v);
}

static int page_get(struct vcpu *v, struct kvm_lapic_state *s)
{
    if (ioctl(kvcpu_of(v)->fd, KVM_GET_LAPIC, s) < 0)
        return err(-errno, "kvm: vCPU %u: cannot read the local APIC: %s", v->id, strerror(errno));
    return 0;
}

static bool one_shot(const struct kvm_lapic_state *s)
{
    return (reg(s, REG_LVT) >> 17 & 3) == 0;
}

/* KVM starts the timer from the current count; a one-shot count that has run out would fire at once. */
static int page_set(struct vcpu *v, struct kvm_lapic_state *s)
{
    if (one_shot(s) && !reg(s, REG_CURRENT))
        reg_put(s, REG_INITIAL, 0);
    if (ioctl(kvcpu_of(v)->fd, KVM_SET_LAPIC, s) < 0)
        return err(-errno, "kvm: vCPU %u: cannot set the local APIC: %s", v->id, strerror(errno));
    return 0;
}

static u64 deadline_get(struct vcpu *v)
{
    u64 val = 0;

    if (kvm_of(v->m)->deadline && kvm_msr_get_one(v, MSR_TSC_DEADLINE, &val) < 0)
        val = 0;
    return val;
}

static void vectors_get(const struct kvm_lapic_state *s, unsigned off, u32 set[8])
{
    for (unsigned i = 0; i < 8; i++)
        set[i] = reg(s, off + 16 * i);
}

static void vectors_put(struct kvm_lapic_state *s, unsigned off, const u32 set[8])
{
    for (unsigned i = 0; i < 8; i++)
        reg_put(s, off + 16 * i, set[i]);
}

static int lapic_get(void *arg, u32 id, struct lapic_regs *r)
{
    struct machine *m = arg;
    struct vcpu *v = m->vcpu[id];
    struct kvm_vcpu *c = kvcpu_of(v);
    struct kvm_lapic_state s;
    u64 adjust;
    int e = page_get(v, &s);

    memset(r, 0, sizeof *r);
    if (e == 0 && kvm_msr_get_one(v, MSR_APIC_BASE, &r->base) < 0)
        e = err(-EIO, "kvm: vCPU %u: cannot read IA32_APIC_BASE", v->id);
    if (e < 0)
        return e;
    if (kvm_msr_get_one(v, MSR_TSC_ADJUST, &adjust) == 0)
        r->tsc_adjust = (s64)adjust;
    r->tpr = reg(&s, REG_TPR);
    r->ldr = reg(&s, REG_LDR);
    r->dfr = reg(&s, REG_DFR);
    r->svr = reg(&s, REG_SVR);
    r->esr = reg(&s, REG_ESR);
    r->icr = (u64)reg(&s, REG_ICR_HIGH) << 32 | reg(&s, REG_ICR);
    for (unsigned i = 0; i < 6; i++)
        r->lvt[i] = reg(&s, REG_LVT + 16 * i);
    vectors_get(&s, REG_IRR, r->irr);
    vectors_get(&s, REG_ISR, r->isr);
    vectors_get(&s, REG_TMR, r->tmr);
    r->divide = reg(&s, REG_DIVIDE);
    r->initial = kvm_of(m)->time_stopped ? c->held_initial : reg(&s, REG_INITIAL);
    r->current = kvm_of(m)->time_stopped ? c->held_current : reg(&s, REG_CURRENT);
    r->tsc_deadline = kvm_of(m)->time_stopped ? c->held_deadline : deadline_get(v);
    return 0;
}

static int timer_put(struct vcpu *v, struct kvm_lapic_state *s, u32 initial, u32 current, u64 deadline)
{
    int r;

    reg_put(s, REG_INITIAL, initial);
    reg_put(s, REG_CURRENT, current);
    r = page_set(v, s);
    if (r == 0 && kvm_of(v->m)->deadline && kvm_msr_set_one(v, MSR_TSC_DEADLINE, deadline) < 0 && deadline)
        r = err(-EIO, "kvm: vCPU %u: cannot set the TSC deadline", v->id);
    return r;
}

static int lapic_set(void *arg, u32 id, const struct lapic_regs *r)
{
    struct machine *m = arg;
    struct vcpu *v = m->vcpu[id];
    struct kvm_vcpu *c = kvcpu_of(v);
    struct kvm_lapic_state s = { 0 };

    if (kvm_msr_set_one(v, MSR_APIC_BASE, r->base) < 0)
        return err(-EIO, "kvm: vCPU %u: this host's KVM does not take 0x%llx for IA32_APIC_BASE", v->id,
                   (unsigned long long)r->base);
    reg_put(&s, REG_ID, r->base & BASE_X2APIC ? id : id << 24);
    reg_put(&s, REG_TPR, r->tpr);
    reg_put(&s, REG_LDR, r->ldr);
    reg_put(&s, REG_DFR, r->dfr);
    reg_put(&s, REG_SVR, r->svr);
    reg_put(&s, REG_ESR, r->esr);
    reg_put(&s, REG_ICR, (u32)r->icr);
    reg_put(&s, REG_ICR_HIGH, (u32)(r->icr >> 32));
    for (unsigned i = 0; i < 6; i++)
        reg_put(&s, REG_LVT + 16 * i, r->lvt[i]);
    vectors_put(&s, REG_IRR, r->irr);
    vectors_put(&s, REG_ISR, r->isr);
    vectors_put(&s, REG_TMR, r->tmr);
    reg_put(&s, REG_DIVIDE, r->divide);
    if (!kvm_of(m)->time_stopped)
        return timer_put(v, &s, r->initial, r->current, r->tsc_deadline);
    c->held_initial = r->initial;
    c->held_current = r->current;
    c->held_deadline = r->tsc_deadline;
    return timer_put(v, &s, 0, 0, 0);
}

/* ---- I/O APIC, i8259 ---- */

static int chip_get(struct machine *m, u32 id, struct kvm_irqchip *chip)
{
    *chip = (struct kvm_irqchip){ .chip_id = id };
    if (ioctl(kvm_of(m)->vm, KVM_GET_IRQCHIP, chip) < 0)
        return err(-errno, "kvm: cannot read an interrupt chip: %s", strerror(errno));
    return 0;
}

static int chip_set(struct machine *m, struct kvm_irqchip *chip)
{
    if (ioctl(kvm_of(m)->vm, KVM_SET_IRQCHIP, chip) < 0)
        return err(-errno, "kvm: cannot set an interrupt chip: %s", strerror(errno));
    return 0;
}

#define RTE_STATUS BIT(12)
#define RTE_LEVEL BIT(15)
#define RTE_MASKED BIT(16)

static int ioapic_get(void *arg, struct ioapic_regs *r)
{
    struct kvm_irqchip chip;
    int e = chip_get(arg, KVM_IRQCHIP_IOAPIC, &chip);

    if (e < 0)
        return e;
    r->select = chip.chip.ioapic.ioregsel;
    r->id = (chip.chip.ioapic.id & 15) << 24;
    for (unsigned i = 0; i < IRQCHIP_IOAPIC_PINS; i++)
        r->rte[i] = chip.chip.ioapic.redirtbl[i].bits & ~RTE_STATUS;
    return 0;
}

/* All pins are masked while their lines are brought to their levels: what that would send has been sent before. */
static int ioapic_set(void *arg, const struct ioapic_regs *r)
{
    struct machine *m = arg;
    struct kvm_irqchip chip;
    int e = chip_get(m, KVM_IRQCHIP_IOAPIC, &chip);

    if (e < 0)
        return e;
    chip.chip.ioapic.irr = 0;
    for (unsigned i = 0; i < IRQCHIP_IOAPIC_PINS; i++)
        chip.chip.ioapic.redirtbl[i].bits = RTE_MASKED;
    e = chip_set(m, &chip);
    for (int i = 0; i < IRQCHIP_IOAPIC_PINS; i++)
        ioapic_line(m, i, r->lines >> i & 1);
    chip.chip.ioapic.ioregsel = r->select;
    chip.chip.ioapic.id = r->id >> 24;
    for (unsigned i = 0; i < IRQCHIP_IOAPIC_PINS; i++) {
        chip.chip.ioapic.redirtbl[i].bits = r->rte[i];
        /* an edge has been sent; a level is looked at again at each EOI */
        if ((r->rte[i] & RTE_LEVEL) && i != PIT_PIN)
            chip.chip.ioapic.irr |= r->lines & 1u << i;
    }
    return e < 0 ? e : chip_set(m, &chip);
}

static void pic_in(struct i8259_chip_regs *r, const struct kvm_pic_state *s)
{
    *r = (struct i8259_chip_regs){
        .irr = s->irr, .isr = s->isr, .imr = s->imr, .elcr = s->elcr, .base = s->irq_base & 0xf8,
        .lowest = (s->priority_add + 7) & 7,
        .step = s->init_state & 3, .want_icw4 = s->init4, .aeoi = s->auto_eoi, .sfnm = s->special_fully_nested_mode,
        .rotate_aeoi = s->rotate_on_auto_eoi,
        .special_mask = s->special_mask, .read_isr = s->read_reg_select, .poll = s->poll,
    };
}

/* The PIT's line is KVM's own; between its ticks it is low. */
static void pic_out(struct kvm_pic_state *s, const struct i8259_chip_regs *r, bool master)
{
    u8 elcr_mask = s->elcr_mask;

    *s = (struct kvm_pic_state){
        .last_irr = master ? r->lines & ~1 : r->lines, .irr = r->irr, .imr = r->imr, .isr = r->isr,
        .priority_add = (r->lowest + 1) & 7, .irq_base = r->base,
        .read_reg_select = r->read_isr, .poll = r->poll, .special_mask = r->special_mask, .init_state = r->step,
        .auto_eoi = r->aeoi,
        .rotate_on_auto_eoi = r->rotate_aeoi, .special_fully_nested_mode = r->sfnm, .init4 = r->want_icw4,
        .elcr = r->elcr, .elcr_mask = elcr_mask,
    };
}

static int pics_get(void *arg, struct i8259_regs *r)
{
    struct kvm_irqchip chip;

    for (u32 i = 0; i < 2; i++) {
        int e = chip_get(arg, KVM_IRQCHIP_PIC_MASTER + i, &chip);

        if (e < 0)
            return e;
        pic_in(&r->chip[i], &chip.chip.pic);
    }
    return 0;
}

static int pics_set(void *arg, const struct i8259_regs *r)
{
    struct machine *m = arg;
    struct kvm_irqchip chip;

    for (int n = 0; n < 16; n++)
        pic_line(m, n, r->chip[n >> 3].lines >> (n & 7) & 1);
    for (u32 i = 2; i-- > 0;) {                                    /* the master last: it is who pulls INTR */
        int e = chip_get(m, KVM_IRQCHIP_PIC_MASTER + i, &chip);

        if (e < 0)
            return e;
        pic_out(&chip.chip.pic, &r->chip[i], i == 0);
        e = chip_set(m, &chip);
        if (e < 0)
            return e;
    }
    return 0;
}

/* ---- PIT ---- */

/* KVM: 1 low, 2 high, 3 low of both, 4 high of both */
enum { RW_BOTH = 3, STATE_WORD1 = 4 };

static u64 host_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000u + (u64)t.tv_nsec;
}

static int pit_get(void *arg, struct i8254_regs *r)
{
    struct machine *m = arg;
    struct kvm_pit_state2 s;

    if (ioctl(kvm_of(m)->vm, KVM_GET_PIT2, &s) < 0)
        return err(-errno, "kvm: cannot read the PIT: %s", strerror(errno));
    for (unsigned i = 0; i < 3; i++) {
        const struct kvm_pit_channel_state *c = &s.channels[i];
        u64 now = host_ns(), from = (u64)MAX(c->count_load_time, 0);

        r->counter[i] = (struct i8254_counter_regs){
            .count = c->count >= 1 && c->count <= 65536 ? c->count : 65536, .elapsed_ns = now > from ? now - from : 0,
            .mode = c->mode > 5 ? 0 : c->mode,
            .rw = c->rw_mode >= 1 && c->rw_mode <= RW_BOTH ? c->rw_mode : RW_BOTH, .bcd = c->bcd, .gate = i < 2 ||
            c->gate, .loaded = c->mode <= 5,
            .write_high = c->write_state == STATE_WORD1, .read_high = c->read_state == STATE_WORD1,
            .status_latched = c->status_latched,
            .write_low = c->write_latch, .status = c->status, .latch_bytes = !c->count_latched
            ? 0 : c->count_latched == RW_BOTH ? 2 : 1,
            .latch = c->latched_count,
        };
    }
    r->speaker = s.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    return 0;
}

static int pit_set(void *arg, const struct i8254_regs *r)
{
    struct machine *m = arg;
    struct kvm_pit_state2 s = { .flags = r->speaker ? KVM_PIT_FLAGS_SPEAKER_DATA_ON : 0 };

    for (unsigned i = 0; i < 3; i++) {
        const struct i8254_counter_regs *c = &r->counter[i];

        s.channels[i] = (struct kvm_pit_channel_state){
            .count = c->count, .latched_count = c->latch, .count_latched = !c->latch_bytes ? 0 : c->rw != RW_BOTH
            ? c->rw : c->latch_bytes == 2 ? RW_BOTH : 2,
            .status_latched = c->status_latched, .status = c->status, .read_state = c->rw == RW_BOTH &&
            c->read_high ? STATE_WORD1 : c->rw,
            .write_state = c->rw == RW_BOTH && c->write_high ? STATE_WORD1 : c->rw, .write_latch = c->write_low,
            .rw_mode = c->rw,
            .mode = c->loaded ? c->mode : PIT_NO_MODE, .bcd = c->bcd, .gate = c->gate,
            .count_load_time = (s64)(host_ns() - c->elapsed_ns),
        };
    }
    if (ioctl(kvm_of(m)->vm, KVM_SET_PIT2, &s) < 0)
        return err(-errno, "kvm: cannot set the PIT: %s", strerror(errno));
    return 0;
}

const struct irqchip_ops kvm_irqchip = {
    .pic_line = pic_line,
    .ioapic_line = ioapic_line,
    .msi = msi,
    .lapic_get = lapic_get,
    .lapic_set = lapic_set,
    .ioapic_get = ioapic_get,
    .ioapic_set = ioapic_set,
    .i8259_get = pics_get,
    .i8259_set = pics_set,
    .i8254_get = pit_get,
    .i8254_set = pit_set,
};

/* KVM sends the kick of one vCPU to another through the local APICs with delivery mode 3, which was "remote read" once;
   a message of ours may have it as well. Kernels that refuse lose a kick, as they would have without us. */
void kvm_kick_ahead(struct vcpu *v)
{
    msi(v->m, 0xfee00000u | (u64)(v->id & 0xff) << 12 | (u64)(v->id >> 8) << 40, 3 << 8);
}

/* ---- an interrupt that was acknowledged and not delivered ---- */

static int pic_unack(struct machine *m, u8 vector)
{
    struct i8259_regs r;
    struct kvm_irqchip chip;
    int e = pics_get(m, &r);

    for (u32 i = 0; e == 0 && i < 2; i++) {
        if (vector < r.chip[i].base || vector - r.chip[i].base > 7)
            continue;
        u8 bit = (u8)(1 << (vector - r.chip[i].base));

        e = chip_get(m, KVM_IRQCHIP_PIC_MASTER + i, &chip);
        chip.chip.pic.isr &= ~bit;
        chip.chip.pic.irr |= bit;
        if (e == 0)
            e = chip_set(m, &chip);
        if (e == 0 && i == 1 && (e = chip_get(m, KVM_IRQCHIP_PIC_MASTER, &chip)) == 0) {
            chip.chip.pic.isr &= ~(1 << CASCADE);
            chip.chip.pic.irr |= 1 << CASCADE;
            e = chip_set(m, &chip);
        }
        break;
    }
    return e;
}

int kvm_unack(struct vcpu *v, u8 vector)
{
    unsigned off = vector / 32 * 16;
    u32 bit = 1u << vector % 32;
    struct kvm_lapic_state s;
    int r = page_get(v, &s);

    if (r < 0)
        return r;
    if (!(reg(&s, REG_ISR + off) & bit))
        return pic_unack(v->m, vector);
    reg_put(&s, REG_ISR + off, reg(&s, REG_ISR + off) & ~bit);
    reg_put(&s, REG_IRR + off, reg(&s, REG_IRR + off) | bit);
    return page_set(v, &s);
}

/* ---- time ---- */

void kvm_time_stop(struct machine *m)
{
    struct kvm_lapic_state s;

    kvm_debug_stop(m);
    if (kvm_of(m)->time_stopped)
        return;
    for (unsigned i = 0; i < m->vcpus; i++) {
        struct vcpu *v = m->vcpu[i];
        struct kvm_vcpu *c = kvcpu_of(v);

        if (page_get(v, &s) < 0)
            continue;
        c->held_initial = reg(&s, REG_INITIAL);
        c->held_current = reg(&s, REG_CURRENT);
        c->held_deadline = deadline_get(v);
        timer_put(v, &s, 0, 0, 0);
    }
    kvm_of(m)->time_stopped = true;
}

/* The TSCs and the paravirtual clock go on from where they stood: both are clock_tsc(), as on every engine. */
void kvm_time_start(struct machine *m)
{
    struct kvm_machine *k = kvm_of(m);
    struct kvm_clock_data clock = { .clock = (u64)((u128)clock_tsc(m->clock) * 1000000 / clock_tsc_khz(m->clock)) };
    struct kvm_lapic_state s;

    for (unsigned i = 0; i < m->vcpus; i++) {
        struct vcpu *v = m->vcpu[i];
        struct kvm_vcpu *c = kvcpu_of(v);
        u64 adjust = 0;

        kvm_msr_get_one(v, MSR_TSC_ADJUST, &adjust);
        kvm_tsc_set(v, (s64)adjust);
        if (k->time_stopped && page_get(v, &s) == 0)
            timer_put(v, &s, c->held_initial, c->held_current, c->held_deadline);
    }
    ioctl(k->vm, KVM_SET_CLOCK, &clock);
    k->time_stopped = false;
    kvm_debug_start(m);
}
