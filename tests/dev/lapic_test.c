/* dev/lapic and dev/ioapic: register scripts after Intel's SDM vol. 3A chapter 11 (section numbers) and the 82093AA data sheet. */
#include "dev/chip.h"
#include "dev/ioapic.h"
#include "dev/lapic_int.h"

#define CPUS 4
#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0
#define X2(reg) (0x800 + (reg) / 16)

enum { ID = 0x20, VERSION = 0x30, TPR = 0x80, PPR = 0xa0, EOI = 0xb0, LDR = 0xd0, DFR = 0xe0, SVR = 0xf0, ISR = 0x100, TMR = 0x180, IRR = 0x200,
       ESR = 0x280, ICR = 0x300, ICR_HIGH = 0x310, R_TIMER = 0x320, R_LINT0 = 0x350, R_ERROR = 0x370, INITIAL = 0x380, CURRENT = 0x390, DIVIDE = 0x3e0 };

struct cpu {
    struct bus *bus;
    struct lapic *lapic;
    struct intc intc;
    unsigned signals[CPU_SIPI + 1];
    u8 sipi;
};

static struct bench bench;
static struct lapic_bus *lb;
static struct i8259 *pic;
static struct ioapic *ioapic;
static struct cpu cpu[CPUS];

static void signal_cpu(void *vcpu, enum cpu_signal what, u8 vector)
{
    struct cpu *c = vcpu;

    c->signals[what]++;
    if (what == CPU_SIPI)
        c->sipi = vector;
}

static u32 rd(int n, u32 reg)
{
    return (u32)bus_read(cpu[n].bus, LAPIC_BASE + reg, 4);
}

static void wr(int n, u32 reg, u32 val)
{
    bus_write(cpu[n].bus, LAPIC_BASE + reg, val, 4);
}

static int peek(int n)
{
    return cpu[n].intc.ops->peek(cpu[n].intc.chip);
}

static int ack(int n)
{
    return cpu[n].intc.ops->ack(cpu[n].intc.chip);
}

static int wrmsr(int n, u32 msr, u64 val)
{
    return cpu[n].intc.ops->msr_write(cpu[n].intc.chip, msr, val);
}

static u64 rdmsr(int n, u32 msr)
{
    u64 val = 0;

    assert_int_equal(cpu[n].intc.ops->msr_read(cpu[n].intc.chip, msr, &val), 0);
    return val;
}

static bool rdmsr_faults(int n, u32 msr)
{
    u64 val;

    return cpu[n].intc.ops->msr_read(cpu[n].intc.chip, msr, &val) != 0;
}

static void make_lapics(struct bench *b)
{
    struct lapic_config cfg = { .clock = b->clock, .phys_bits = 40, .x2apic = true, .tsc_deadline = true };

    assert_int_equal(lapic_bus_new(&cfg, &lb), 0);
    memset(cpu, 0, sizeof(cpu));
    for (int i = 0; i < CPUS; i++) {
        assert_int_equal(bus_new(b->mmio, &cpu[i].bus), 0);
        assert_int_equal(lapic_new(lb, cpu[i].bus, (u32)i, i == 0, (struct cpu_port){ .signal = signal_cpu, .vcpu = &cpu[i] }, &cpu[i].lapic), 0);
        cpu[i].intc = lapic_intc(cpu[i].lapic);
    }
}

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    make_lapics(&bench);
    assert_int_equal(i8259_new(bench.pio, lapic_bus_pic_line(lb), &pic), 0);
    lapic_bus_set_pic(lb, pic);
    assert_int_equal(ioapic_new(bench.mmio, IOAPIC_BASE, 5, lb, &ioapic), 0);
    for (int i = 0; i < CPUS; i++) {
        wr(i, SVR, 0x1ff);
        wr(i, LDR, 1u << (24 + i));
    }
    return 0;
}

static int teardown(void **state UNUSED)
{
    chip_free(ioapic);
    chip_free(pic);
    for (int i = 0; i < CPUS; i++) {
        chip_free(cpu[i].lapic);
        bus_free(cpu[i].bus);
    }
    lapic_bus_free(lb);
    bench_close(&bench);
    return 0;
}

static void fixed(u32 dest, u8 vector)
{
    lapic_bus_send(lb, &(struct apic_msg){ .dest = dest, .vector = vector });
}

/* Who has this vector in the IRR, as bits; and takes it out of there and ends it. */
static unsigned receivers(u8 vector)
{
    unsigned set = 0;

    for (int i = 0; i < CPUS; i++)
        if (rd(i, IRR + vector / 32 * 16) >> (vector % 32) & 1) {
            set |= 1u << i;
            assert_int_equal(ack(i), vector);
            wr(i, EOI, 0);
        }
    return set;
}

/* 11.4.7.1 */
static void state_after_reset(void **state UNUSED)
{
    chip_reset(cpu[1].lapic);
    assert_int_equal(rd(1, ID), 1 << 24);
    assert_int_equal(rd(1, VERSION) & 0xff00ff, 0x050015);
    assert_int_equal(rd(1, SVR), 0xff);
    assert_int_equal(rd(1, DFR), 0xffffffff);
    assert_int_equal(rd(1, LDR), 0);
    for (u32 r = R_TIMER; r <= R_ERROR; r += 16)
        assert_int_equal(rd(1, r), 0x10000);
    assert_int_equal(rdmsr(1, MSR_APIC_BASE), 0xfee00800);
    assert_int_equal(rdmsr(0, MSR_APIC_BASE), 0xfee00900);
}

static void a_vector_goes_through_irr_and_isr(void **state UNUSED)
{
    unsigned before = cpu[1].signals[CPU_INTR];

    fixed(1, 0x51);
    assert_int_equal(cpu[1].signals[CPU_INTR], before + 1);
    assert_int_equal(cpu[0].signals[CPU_INTR], 0);
    assert_int_equal(rd(1, IRR + 0x20), 1 << 17);
    assert_int_equal(peek(1), 0x51);
    assert_int_equal(ack(1), 0x51);
    assert_int_equal(rd(1, IRR + 0x20), 0);
    assert_int_equal(rd(1, ISR + 0x20), 1 << 17);
    assert_int_equal(peek(1), -1);
    assert_int_equal(ack(1), -1);
    wr(1, EOI, 0);
    assert_int_equal(rd(1, ISR + 0x20), 0);
}

/* 11.8.3: classes of sixteen; same class waits, higher class interrupts. PPR 11.8.3.1. */
static void priorities_are_classes(void **state UNUSED)
{
    fixed(0, 0x51);
    assert_int_equal(ack(0), 0x51);
    assert_int_equal(rd(0, PPR), 0x50);
    fixed(0, 0x5f);
    fixed(0, 0x41);
    assert_int_equal(peek(0), -1);
    fixed(0, 0x61);
    assert_int_equal(ack(0), 0x61);
    wr(0, EOI, 0);
    assert_int_equal(peek(0), -1);
    cpu[0].signals[CPU_INTR] = 0;
    wr(0, EOI, 0);
    assert_int_equal(cpu[0].signals[CPU_INTR], 1); /* something has become deliverable */
    assert_int_equal(ack(0), 0x5f);
    wr(0, EOI, 0);
    assert_int_equal(ack(0), 0x41);
}

static void the_tpr_holds_back(void **state UNUSED)
{
    wr(0, TPR, 0x53);
    fixed(0, 0x5f);
    assert_int_equal(peek(0), -1);
    assert_int_equal(rd(0, PPR), 0x53);
    cpu[0].signals[CPU_INTR] = 0;
    wr(0, TPR, 0x4f);
    assert_int_equal(peek(0), 0x5f);
    assert_int_equal(cpu[0].signals[CPU_INTR], 1);
    cpu[0].intc.ops->tpr_set(cpu[0].intc.chip, 6); /* CR8, 11.8.6 */
    assert_int_equal(rd(0, TPR), 0x60);
    assert_int_equal(cpu[0].intc.ops->tpr_get(cpu[0].intc.chip), 6);
    assert_int_equal(peek(0), -1);
}

/* 11.4.7.2: software-disabled: LVT entries masked for good, no new vectors; NMI, INIT and SIPI as ever. */
static void software_disable(void **state UNUSED)
{
    wr(1, R_LINT0, 0x30);
    wr(1, SVR, 0xff);
    assert_int_equal(rd(1, R_LINT0), 0x10030);
    wr(1, R_LINT0, 0x30);
    assert_int_equal(rd(1, R_LINT0), 0x10030);
    fixed(1, 0x51);
    assert_int_equal(rd(1, IRR + 0x20), 0);
    lapic_bus_send(lb, &(struct apic_msg){ .dest = 1, .mode = APIC_NMI });
    lapic_bus_send(lb, &(struct apic_msg){ .dest = 1, .mode = APIC_INIT });
    lapic_bus_send(lb, &(struct apic_msg){ .dest = 1, .mode = APIC_SIPI, .vector = 0x9a });
    assert_int_equal(cpu[1].signals[CPU_NMI], 1);
    assert_int_equal(cpu[1].signals[CPU_INIT], 1);
    assert_int_equal(cpu[1].signals[CPU_SIPI], 1);
    assert_int_equal(cpu[1].sipi, 0x9a);
}

/* 11.6.2 */
static void destinations(void **state UNUSED)
{
    static const struct { struct apic_msg m; unsigned to; } flat[] = {
        { { .dest = 2 }, 0x4 },
        { { .dest = 9 }, 0x0 },
        { { .dest = 0xff }, 0xf },
        { { .dest = 0x05, .logical = true }, 0x5 },
        { { .dest = 0xff, .logical = true }, 0xf },
        { { .dest = 0x10, .logical = true }, 0x0 },
    };
    static const struct { struct apic_msg m; unsigned to; } cluster[] = {
        { { .dest = 0x13, .logical = true }, 0x3 }, /* cluster 1, members 0 and 1 */
        { { .dest = 0x22, .logical = true }, 0x8 },
        { { .dest = 0x2f, .logical = true }, 0xc },
        { { .dest = 0x33, .logical = true }, 0x0 },
        { { .dest = 0xff, .logical = true }, 0xf },
    };
    static const u32 ldr[CPUS] = { 0x11000000, 0x12000000, 0x21000000, 0x22000000 };

    for (size_t i = 0; i < ARRAY_SIZE(flat); i++) {
        struct apic_msg m = flat[i].m;

        m.vector = 0x61;
        lapic_bus_send(lb, &m);
        assert_int_equal(receivers(0x61), flat[i].to);
    }
    for (int i = 0; i < CPUS; i++) {
        wr(i, DFR, 0);
        assert_int_equal(rd(i, DFR), 0x0fffffff);
        wr(i, LDR, ldr[i] | 0xffff);
        assert_int_equal(rd(i, LDR), ldr[i]);
    }
    for (size_t i = 0; i < ARRAY_SIZE(cluster); i++) {
        struct apic_msg m = cluster[i].m;

        m.vector = 0x62;
        lapic_bus_send(lb, &m);
        assert_int_equal(receivers(0x62), cluster[i].to);
    }
}

/* 11.6.2.4: exactly one receiver, the one that is least busy. */
static void lowest_priority_goes_to_one(void **state UNUSED)
{
    struct apic_msg m = { .dest = 0xff, .logical = true, .mode = APIC_LOWEST, .vector = 0x61 };

    for (int i = 0; i < CPUS; i++)
        wr(i, TPR, i == 2 ? 0x20 : 0x30);
    lapic_bus_send(lb, &m);
    assert_int_equal(receivers(0x61), 1 << 2);
    wr(2, SVR, 0xff); /* who is software-disabled is not asked */
    m.dest = 0x06;
    lapic_bus_send(lb, &m);
    assert_int_equal(receivers(0x61), 1 << 1);
    wr(1, TPR, 0);
    wr(1, ICR, 0xc4161); /* to all but itself: also when it is the least busy one */
    assert_int_equal(receivers(0x61) & 0x2, 0);
}

/* 11.6.1 and table 11-3 */
static void ipis_and_shorthands(void **state UNUSED)
{
    wr(0, ICR_HIGH, 3 << 24);
    wr(0, ICR, 0x4061);
    assert_int_equal(receivers(0x61), 0x8);
    wr(0, ICR_HIGH, 0x06000000);
    wr(0, ICR, 0x4862); /* logical */
    assert_int_equal(receivers(0x62), 0x6);
    wr(1, ICR, 0x44063);
    assert_int_equal(receivers(0x63), 0x2);
    wr(1, ICR, 0x84064);
    assert_int_equal(receivers(0x64), 0xf);
    wr(1, ICR, 0xc4065);
    assert_int_equal(receivers(0x65), 0xd);
    assert_int_equal(rd(1, ICR), 0xc4065); /* reads back; delivery status idle */
    wr(0, ICR, 0xc4500); /* INIT to all others */
    wr(0, ICR, 0xc8500); /* the de-assert that follows is no message */
    wr(0, ICR, 0xc4608);
    for (int i = 0; i < CPUS; i++) {
        assert_int_equal(cpu[i].signals[CPU_INIT], i != 0);
        assert_int_equal(cpu[i].signals[CPU_SIPI], i != 0);
    }
    assert_int_equal(cpu[3].sipi, 8);
}

/* 11.5.3 */
static void errors_are_reported(void **state UNUSED)
{
    wr(0, R_ERROR, 0xe1);
    wr(0, ICR, 0x4000f); /* vectors below 16 are illegal */
    assert_int_equal(rd(0, ESR), 0);
    wr(0, ESR, 0);
    assert_int_equal(rd(0, ESR), 0x20);
    assert_int_equal(ack(0), 0xe1);
    wr(0, EOI, 0);
    fixed(0, 0x0f);
    assert_int_equal(ack(0), 0xe1);
    wr(0, EOI, 0);
    assert_int_equal(rd(0, 0x40), 0); /* a reserved register */
    wr(0, ESR, 0);
    assert_int_equal(rd(0, ESR), 0x40 | 0x80);
    wr(0, ESR, 0);
    assert_int_equal(rd(0, ESR), 0);
    wr(0, R_ERROR, 0x0f); /* the error interrupt itself is illegal: no endless loop */
    wr(0, ICR, 0x4000f);
}

/* 11.11 */
static void msis_are_messages(void **state UNUSED)
{
    struct msi_sink msi = lapic_bus_msi(lb);

    msi.send(msi.arg, 0xfee02000, 0x0071);
    assert_int_equal(receivers(0x71), 0x4);
    msi.send(msi.arg, 0xfee0a004, 0x0072); /* logical */
    assert_int_equal(receivers(0x72), 0xa);
    msi.send(msi.arg, 0xfee01000, 0x0400); /* NMI */
    assert_int_equal(cpu[1].signals[CPU_NMI], 1);
    msi.send(msi.arg, 0xfed01000, 0x0073); /* not in the window */
    msi.send(msi.arg, 0x1fee01000, 0x0073);
    msi.send(msi.arg, 0xfee01000, 0x8073); /* level de-assert */
    assert_int_equal(receivers(0x73), 0);
}

/* ---- i8259 and LINT0 ---- */

static void extint_comes_from_the_i8259(void **state UNUSED)
{
    static const u8 icw[][2] = { { 0x20, 0x11 }, { 0x21, 0x30 }, { 0x21, 4 }, { 0x21, 1 }, { 0xa0, 0x11 }, { 0xa1, 0x38 }, { 0xa1, 2 }, { 0xa1, 1 } };
    struct irq_line irq1 = i8259_irq(pic, 1);

    for (size_t i = 0; i < ARRAY_SIZE(icw); i++)
        out8(&bench, icw[i][0], icw[i][1]);
    irq_set(&irq1, 1);
    assert_int_equal(peek(0), -1); /* LINT0 is masked */
    lapic_virtual_wire(cpu[0].lapic);
    assert_int_equal(cpu[0].signals[CPU_INTR], 1);
    assert_int_equal(peek(0), 0x31);
    assert_int_equal(peek(1), -1);
    assert_int_equal(ack(0), 0x31);
    assert_int_equal(rd(0, ISR + 0x10), 0); /* the i8259 has it in service, not the local APIC */
    assert_int_equal(peek(0), -1);
    out8(&bench, 0x20, 0x20);
    irq_set(&irq1, 0);
    cpu[0].signals[CPU_INTR] = 0;
    irq_set(&irq1, 1);
    assert_int_equal(cpu[0].signals[CPU_INTR], 1);
    ack(0);
    out8(&bench, 0x20, 0x20);

    /* 11.4.3: globally disabled, LINT0 is the INTR pin of the boot processor. */
    wrmsr(0, MSR_APIC_BASE, 0xfee00100);
    irq_set(&irq1, 0);
    irq_set(&irq1, 1);
    assert_int_equal(ack(0), 0x31);
    fixed(0, 0x51);
    assert_int_equal(peek(0), -1);
}

static void lint0_may_be_nmi_or_a_level(void **state UNUSED)
{
    struct irq_line intr = lapic_bus_pic_line(lb);

    wr(0, R_LINT0, 0x400);
    irq_set(&intr, 1);
    irq_set(&intr, 1);
    assert_int_equal(cpu[0].signals[CPU_NMI], 1); /* one per edge */
    irq_set(&intr, 0);
    wr(0, R_LINT0, 0x8045); /* fixed, level-triggered */
    irq_set(&intr, 1);
    assert_int_equal(rd(0, R_LINT0), 0xc045); /* remote IRR */
    assert_int_equal(ack(0), 0x45);
    wr(0, EOI, 0);
    assert_int_equal(ack(0), 0x45); /* the pin is still up */
    irq_set(&intr, 0);
    wr(0, EOI, 0);
    assert_int_equal(peek(0), -1);
    assert_int_equal(rd(0, R_LINT0), 0x8045);
}

/* ---- modes: 11.12.5, figure 11-27 ---- */

#define BASE(mode) (0xfee00000ull | (mode))
enum { OFF = 0, INVALID = 0x400, XAPIC = 0x800, X2APIC = 0xc00 };

static void mode_transitions(void **state UNUSED)
{
    static const struct { u64 from, to; bool good; } t[] = {
        { XAPIC, XAPIC, true },   { XAPIC, OFF, true },   { XAPIC, X2APIC, true },   { XAPIC, INVALID, false },
        { OFF, XAPIC, true },     { OFF, OFF, true },     { OFF, X2APIC, false },    { OFF, INVALID, false },
        { X2APIC, XAPIC, false }, { X2APIC, OFF, true },  { X2APIC, X2APIC, true },  { X2APIC, INVALID, false },
    };

    for (size_t i = 0; i < ARRAY_SIZE(t); i++) {
        chip_reset(cpu[1].lapic);
        if (t[i].from != XAPIC)
            assert_int_equal(wrmsr(1, MSR_APIC_BASE, BASE(t[i].from)), 0);
        assert_int_equal(wrmsr(1, MSR_APIC_BASE, BASE(t[i].to)) == 0, t[i].good);
        assert_int_equal(rdmsr(1, MSR_APIC_BASE), BASE(t[i].good ? t[i].to : t[i].from));
    }
    chip_reset(cpu[1].lapic);
    assert_int_equal(wrmsr(1, MSR_APIC_BASE, BASE(XAPIC) | 1), -1);           /* reserved bits */
    assert_int_equal(wrmsr(1, MSR_APIC_BASE, BASE(XAPIC) | 1ull << 40), -1);  /* beyond MAXPHYADDR */
    assert_true(lapic_enabled(cpu[1].lapic));
    wrmsr(1, MSR_APIC_BASE, BASE(OFF));
    assert_false(lapic_enabled(cpu[1].lapic));
}

static void the_register_page_moves(void **state UNUSED)
{
    assert_int_equal(wrmsr(1, MSR_APIC_BASE, 0x12345000 | XAPIC), 0);
    assert_int_equal(bus_read(cpu[1].bus, 0x12345000 + ID, 4), 1 << 24);
    assert_int_equal(rd(1, ID), 0xffffffff);
    assert_int_equal(rd(0, ID), 0);
    wrmsr(1, MSR_APIC_BASE, 0x12345000 | X2APIC);
    assert_int_equal(bus_read(cpu[1].bus, 0x12345000 + ID, 4), 0xffffffff); /* no page in x2APIC mode */
}

static void disabling_forgets_registers(void **state UNUSED)
{
    wr(1, TPR, 0x33);
    wrmsr(1, MSR_APIC_BASE, BASE(OFF));
    wrmsr(1, MSR_APIC_BASE, BASE(XAPIC));
    assert_int_equal(rd(1, TPR), 0);
    assert_int_equal(rd(1, SVR), 0xff);
    wr(1, TPR, 0x33);
    wrmsr(1, MSR_APIC_BASE, BASE(X2APIC)); /* 11.12.5.1: kept on the way to x2APIC mode */
    assert_int_equal(rdmsr(1, X2(TPR)), 0x33);
    cpu[1].intc.ops->init(cpu[1].intc.chip); /* INIT resets registers, not the mode */
    assert_int_equal(rdmsr(1, X2(TPR)), 0);
    assert_int_equal(rdmsr(1, X2(ID)), 1);
}

static void x2apic_registers(void **state UNUSED)
{
    assert_true(rdmsr_faults(2, X2(ID))); /* in xAPIC mode the MSRs are not there */
    assert_int_equal(wrmsr(2, X2(TPR), 0), -1);
    wrmsr(2, MSR_APIC_BASE, BASE(X2APIC));
    assert_int_equal(rdmsr(2, X2(ID)), 2);
    assert_int_equal(rdmsr(2, X2(LDR)), 1 << 2); /* 11.12.10.2 */

    /* Table 11-6: what does not exist, cannot be read, cannot be written; reserved bits. */
    assert_true(rdmsr_faults(2, X2(DFR)));
    assert_true(rdmsr_faults(2, X2(ICR_HIGH)));
    assert_true(rdmsr_faults(2, X2(EOI)));
    assert_true(rdmsr_faults(2, X2(0x90)));
    assert_true(rdmsr_faults(2, X2(0xc0)));
    assert_true(rdmsr_faults(2, 0x83f));
    assert_true(rdmsr_faults(2, 0x8ff));
    assert_int_equal(wrmsr(2, X2(ID), 2), -1);
    assert_int_equal(wrmsr(2, X2(LDR), 2), -1);
    assert_int_equal(wrmsr(2, X2(DFR), 0), -1);
    assert_int_equal(wrmsr(2, X2(CURRENT), 0), -1);
    assert_int_equal(wrmsr(2, X2(EOI), 1), -1);
    assert_int_equal(wrmsr(2, X2(ESR), 1), -1);
    assert_int_equal(wrmsr(2, X2(TPR), 0x100), -1);
    assert_int_equal(wrmsr(2, X2(TPR), 1ull << 32), -1);
    assert_int_equal(wrmsr(2, X2(R_TIMER), 0x80000), -1);
    assert_int_equal(wrmsr(2, X2(ICR), 1 << 16), -1);
    assert_int_equal(wrmsr(2, X2(EOI), 0), 0);
    assert_int_equal(wrmsr(2, X2(ESR), 0), 0);

    assert_int_equal(wrmsr(2, 0x83f, 0x77), 0); /* self IPI */
    assert_int_equal(ack(2), 0x77);
    assert_int_equal(wrmsr(2, X2(EOI), 0), 0);
    assert_int_equal(peek(2), -1);
}

static void x2apic_messages(void **state UNUSED)
{
    for (int i = 0; i < CPUS; i++)
        wrmsr(i, MSR_APIC_BASE, (i == 0 ? 0x100 : 0) | BASE(X2APIC));
    wrmsr(0, X2(ICR), 3ull << 32 | 0x61);
    assert_int_equal(ack(3), 0x61);
    assert_int_equal(rdmsr(0, X2(ICR)), 3ull << 32 | 0x61);
    wrmsr(0, X2(ICR), 0x6ull << 32 | 0x862); /* logical: cluster 0, members 1 and 2 */
    assert_int_equal(peek(1), 0x62);
    assert_int_equal(peek(2), 0x62);
    assert_int_equal(peek(0), -1);
    wrmsr(0, X2(ICR), 0x10001ull << 32 | 0x863); /* another cluster */
    assert_int_equal(peek(0), -1);
    wrmsr(0, X2(ICR), 0xffull << 32 | 0x64); /* 0xff is an ID like others here */
    assert_int_equal(peek(0), -1);
    wrmsr(0, X2(ICR), 0xffffffffull << 32 | 0x65);
    assert_int_equal(peek(0), 0x65);
    fixed(0xff, 0x66); /* from the I/O APIC and MSIs it is still all */
    assert_int_equal(peek(0), 0x66);
}

/* ---- timer: 11.5.4 ---- */

static void one_shot(void **state UNUSED)
{
    wr(0, R_TIMER, 0x41);
    wr(0, DIVIDE, 0xb); /* by 1: nanoseconds */
    wr(0, INITIAL, 5000000);
    assert_int_equal(rd(0, CURRENT), 5000000);
    bench_pass(&bench, 2 * MS);
    assert_int_equal(rd(0, CURRENT), 3000000);
    bench_run(&bench, 2 * MS);
    assert_int_equal(peek(0), -1);
    bench_run(&bench, MS);
    assert_int_equal(ack(0), 0x41);
    wr(0, EOI, 0);
    assert_int_equal(rd(0, CURRENT), 0);
    bench_run(&bench, 10 * MS);
    assert_int_equal(peek(0), -1);
}

static void divide_by(void **state UNUSED)
{
    static const u8 code[8] = { 0x0, 0x1, 0x2, 0x3, 0x8, 0x9, 0xa, 0xb };

    wr(0, R_TIMER, 0x10041);
    for (int i = 0; i < 8; i++) {
        wr(0, DIVIDE, code[i]);
        wr(0, INITIAL, 1000000);
        bench_pass(&bench, 1280);
        assert_int_equal(1000000 - rd(0, CURRENT), 1280 / (i == 7 ? 1 : 2 << i));
    }
    wr(0, INITIAL, 0); /* stops */
    assert_int_equal(rd(0, CURRENT), 0);
}

/* It keeps to its grid: served late, the next one is at the same place as ever. */
static void periodic_does_not_drift(void **state UNUSED)
{
    u64 start = clock_ns(bench.clock);

    wr(0, R_TIMER, 0x20042);
    wr(0, DIVIDE, 0xb);
    wr(0, INITIAL, 10000000);
    for (u64 i = 1; i <= 5; i++) {
        bench_at(&bench, start + i * 10 * MS + 3 * MS); /* three milliseconds late */
        bench_run(&bench, 0);
        assert_int_equal(ack(0), 0x42);
        wr(0, EOI, 0);
        assert_int_equal(peek(0), -1);
    }
    bench_at(&bench, start + 57 * MS);
    assert_int_equal(rd(0, CURRENT), 3000000);
    bench_at(&bench, start + 1005 * MS); /* a hundred are due: they coalesce */
    bench_run(&bench, 0);
    assert_int_equal(ack(0), 0x42);
    wr(0, EOI, 0);
    assert_int_equal(peek(0), -1);
    bench_at(&bench, start + 1006 * MS);
    assert_int_equal(rd(0, CURRENT), 4000000);
}

/* A period of one nanosecond: the host looks again no sooner than 50 us later. */
static void tiny_periods_do_not_flood(void **state UNUSED)
{
    wr(0, R_TIMER, 0x20042);
    wr(0, DIVIDE, 0xb);
    wr(0, INITIAL, 1);
    for (int i = 0; i < 5; i++) {
        bench_run(&bench, 60 * US);
        assert_int_equal(ack(0), 0x42);
        wr(0, EOI, 0);
        assert_true(cpu[0].lapic->timer.deadline_ns > cpu[0].lapic->deadline_ns + 49 * US);
    }
}

static void masked_timers_run_silently(void **state UNUSED)
{
    wr(0, R_TIMER, 0x10041);
    wr(0, DIVIDE, 0xb);
    wr(0, INITIAL, 1000000);
    bench_run(&bench, 2 * MS);
    assert_int_equal(peek(0), -1);
    wr(0, R_TIMER, 0x41); /* what expired while masked is gone */
    assert_int_equal(peek(0), -1);
}

static void tsc_deadline(void **state UNUSED)
{
    u64 khz = clock_tsc_khz(bench.clock), tsc;

    assert_int_equal(wrmsr(0, MSR_TSC_DEADLINE, 1), 0); /* ignored in other modes */
    assert_int_equal(rdmsr(0, MSR_TSC_DEADLINE), 0);
    wr(0, R_TIMER, 0x40043);
    wr(0, INITIAL, 1000); /* ignored in this one */
    assert_int_equal(rd(0, CURRENT), 0);
    tsc = clock_tsc(bench.clock) + 2 * khz;
    wrmsr(0, MSR_TSC_DEADLINE, tsc);
    assert_int_equal(rdmsr(0, MSR_TSC_DEADLINE), tsc);
    bench_run(&bench, MS);
    assert_int_equal(peek(0), -1);
    bench_run(&bench, MS + 1000);
    assert_int_equal(ack(0), 0x43);
    wr(0, EOI, 0);
    assert_int_equal(rdmsr(0, MSR_TSC_DEADLINE), 0);

    wrmsr(0, MSR_TSC_DEADLINE, 1); /* in the past: at once */
    assert_int_equal(ack(0), 0x43);
    wr(0, EOI, 0);
    wrmsr(0, MSR_TSC_DEADLINE, clock_tsc(bench.clock) + khz);
    wrmsr(0, MSR_TSC_DEADLINE, 0); /* disarms */
    bench_run(&bench, 2 * MS);
    assert_int_equal(peek(0), -1);
    wrmsr(0, MSR_TSC_DEADLINE, clock_tsc(bench.clock) + khz);
    wr(0, R_TIMER, 0x00043); /* so does leaving the mode */
    bench_run(&bench, 2 * MS);
    assert_int_equal(peek(0), -1);
}

static void tsc_deadline_follows_tsc_adjust(void **state UNUSED)
{
    u64 khz = clock_tsc_khz(bench.clock);

    wr(0, R_TIMER, 0x40043);
    wrmsr(0, MSR_TSC_DEADLINE, clock_tsc(bench.clock) + 1000 * khz);
    lapic_set_tsc_adjust(cpu[0].lapic, (s64)(999 * khz)); /* now it is a millisecond away */
    bench_run(&bench, MS + 1000);
    assert_int_equal(ack(0), 0x43);
    wr(0, EOI, 0);
    lapic_set_tsc_adjust(cpu[0].lapic, -(s64)(5 * khz));
    wrmsr(0, MSR_TSC_DEADLINE, UINT64_MAX); /* never, and not at once by a wrap */
    bench_run(&bench, MS);
    assert_int_equal(peek(0), -1);
    assert_true(rdmsr(0, MSR_TSC_DEADLINE) == UINT64_MAX);
}

/* ---- I/O APIC ---- */

static u32 io_rd(u32 index)
{
    bus_write(bench.mmio, IOAPIC_BASE, index, 4);
    return (u32)bus_read(bench.mmio, IOAPIC_BASE + 0x10, 4);
}

static void io_wr(u32 index, u32 val)
{
    bus_write(bench.mmio, IOAPIC_BASE, index, 4);
    bus_write(bench.mmio, IOAPIC_BASE + 0x10, val, 4);
}

static void rte(unsigned pin, u32 low, u8 dest)
{
    io_wr(0x11 + 2 * pin, (u32)dest << 24);
    io_wr(0x10 + 2 * pin, low);
}

static void pin(int n, int level)
{
    struct irq_line l = ioapic_irq(ioapic, n);

    irq_set(&l, level);
}

static void ioapic_registers(void **state UNUSED)
{
    assert_int_equal(io_rd(1), 0x170020);
    assert_int_equal(io_rd(0), 5 << 24);
    io_wr(0, 0xffffffff);
    assert_int_equal(io_rd(0), 0x0f000000);
    assert_int_equal(io_rd(2), 0x0f000000);
    io_wr(1, 0);
    assert_int_equal(io_rd(1), 0x170020);
    for (u32 i = 0; i < IOAPIC_PINS; i++) {
        assert_int_equal(io_rd(0x10 + 2 * i), 0x10000);
        io_wr(0x10 + 2 * i, 0xffffffff);
        io_wr(0x11 + 2 * i, 0xffffffff);
        assert_int_equal(io_rd(0x10 + 2 * i), 0x1afff); /* delivery status and remote IRR are read-only */
        assert_int_equal(io_rd(0x11 + 2 * i), 0xff000000);
    }
    assert_int_equal(io_rd(0x40), 0);
    io_wr(0xff, 1);
}

static void edges_are_sent_once(void **state UNUSED)
{
    rte(4, 0x51, 1);
    pin(4, 1);
    assert_int_equal(receivers(0x51), 0x2);
    pin(4, 1);
    assert_int_equal(receivers(0x51), 0);
    pin(4, 0);
    pin(4, 1);
    assert_int_equal(receivers(0x51), 0x2);
    rte(4, 0x10051, 1); /* an edge on a masked pin is lost */
    pin(4, 0);
    pin(4, 1);
    rte(4, 0x51, 1);
    assert_int_equal(receivers(0x51), 0);
}

static void levels_wait_for_the_eoi(void **state UNUSED)
{
    rte(9, 0x8052, 2);
    pin(9, 1);
    assert_int_equal(io_rd(0x10 + 18), 0xc052); /* remote IRR */
    assert_int_equal(ack(2), 0x52);
    assert_int_equal(rd(2, TMR + 0x20), 1 << 18);
    assert_int_equal(rd(2, IRR + 0x20), 0);
    wr(2, EOI, 0);
    assert_int_equal(ack(2), 0x52); /* still asserted: sent again */
    pin(9, 0);
    wr(2, EOI, 0);
    assert_int_equal(io_rd(0x10 + 18), 0x8052);
    assert_int_equal(peek(2), -1);
    rte(9, 0x18052, 2);
    pin(9, 1);
    assert_int_equal(peek(2), -1);
    rte(9, 0x8052, 2); /* a level counts when it is unmasked */
    assert_int_equal(peek(2), 0x52);
}

static void an_edge_of_the_same_vector_clears_the_tmr(void **state UNUSED)
{
    rte(9, 0x8052, 2);
    pin(9, 1);
    ack(2);
    pin(9, 0);
    wr(2, EOI, 0);
    fixed(2, 0x52);
    assert_int_equal(rd(2, TMR + 0x20), 0);
}

/* Directed EOI: SVR bit 12 stops the broadcast, the guest writes the I/O APIC's EOI register (11.8.5). */
static void eoi_can_be_directed(void **state UNUSED)
{
    wr(2, SVR, 0x11ff);
    rte(9, 0x8052, 2);
    pin(9, 1);
    ack(2);
    pin(9, 0);
    wr(2, EOI, 0);
    assert_int_equal(io_rd(0x10 + 18), 0xc052);
    bus_write(bench.mmio, IOAPIC_BASE + 0x40, 0x51, 4);
    assert_int_equal(io_rd(0x10 + 18), 0xc052);
    bus_write(bench.mmio, IOAPIC_BASE + 0x40, 0x52, 4);
    assert_int_equal(io_rd(0x10 + 18), 0x8052);
}

static void switching_to_edge_clears_remote_irr(void **state UNUSED)
{
    rte(9, 0x8052, 2);
    pin(9, 1);
    pin(9, 0);
    rte(9, 0x10052, 2);
    rte(9, 0x8052, 2);
    assert_int_equal(io_rd(0x10 + 18), 0x8052);
}

static void other_delivery_modes(void **state UNUSED)
{
    rte(5, 0x8400, 1); /* NMI: an edge, whatever the trigger bit says */
    pin(5, 1);
    pin(5, 0);
    pin(5, 1);
    assert_int_equal(cpu[1].signals[CPU_NMI], 2);
    rte(6, 0x500, 3);
    pin(6, 1);
    assert_int_equal(cpu[3].signals[CPU_INIT], 1);
    rte(7, 0x0953, 0x0c); /* lowest priority, logical */
    pin(7, 1);
    unsigned got = receivers(0x53);
    assert_true(got == 0x4 || got == 0x8);
}

/* ---- state ---- */

static void their_state_can_be_moved(void **state UNUSED)
{
    struct bench second;
    struct cpu from[CPUS];
    struct lapic_bus *from_lb = lb;
    struct ioapic *io2;

    wrmsr(1, MSR_APIC_BASE, 0x12345000 | XAPIC);
    fixed(1, 0x61);
    fixed(1, 0x71);
    ack(1);
    bus_write(cpu[1].bus, 0x12345000 + R_TIMER, 0x20042, 4);
    bus_write(cpu[1].bus, 0x12345000 + DIVIDE, 0xb, 4);
    bus_write(cpu[1].bus, 0x12345000 + INITIAL, 10000000, 4);
    rte(9, 0x8052, 2);
    pin(9, 1);

    memcpy(from, cpu, sizeof(cpu));
    bench_open(&second);
    bench_at(&second, clock_ns(bench.clock));
    make_lapics(&second);
    assert_int_equal(ioapic_new(second.mmio, IOAPIC_BASE, 0, lb, &io2), 0);
    for (int i = 0; i < CPUS; i++)
        chip_transplant(from[i].lapic, cpu[i].lapic);
    chip_transplant(ioapic, io2);
    assert_int_equal(peek(1), -1); /* 0x71 is in service */
    bus_write(cpu[1].bus, 0x12345000 + EOI, 0, 4);
    assert_int_equal(ack(1), 0x61);
    bus_write(cpu[1].bus, 0x12345000 + EOI, 0, 4);
    bench_run(&second, 10 * MS);
    assert_int_equal(ack(1), 0x42);
    assert_int_equal(ack(2), 0x52);
    wr(2, EOI, 0);
    assert_int_equal(ack(2), 0x52); /* the pin's level came along */

    chip_free(io2);
    for (int i = 0; i < CPUS; i++) {
        chip_free(cpu[i].lapic);
        bus_free(cpu[i].bus);
    }
    lapic_bus_free(lb);
    bench_close(&second);
    memcpy(cpu, from, sizeof(cpu));
    lb = from_lb;
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(state_after_reset), T(a_vector_goes_through_irr_and_isr), T(priorities_are_classes), T(the_tpr_holds_back), T(software_disable),
        T(destinations), T(lowest_priority_goes_to_one), T(ipis_and_shorthands), T(errors_are_reported), T(msis_are_messages),
        T(extint_comes_from_the_i8259), T(lint0_may_be_nmi_or_a_level), T(mode_transitions), T(the_register_page_moves),
        T(disabling_forgets_registers), T(x2apic_registers), T(x2apic_messages), T(one_shot), T(divide_by), T(periodic_does_not_drift),
        T(tiny_periods_do_not_flood), T(masked_timers_run_silently), T(tsc_deadline), T(tsc_deadline_follows_tsc_adjust), T(ioapic_registers),
        T(edges_are_sent_once), T(levels_wait_for_the_eoi), T(an_edge_of_the_same_vector_clears_the_tmr), T(eoi_can_be_directed),
        T(switching_to_edge_clears_remote_irr), T(other_delivery_modes), T(their_state_can_be_moved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
