/*
 * All classic chips on one board, under a guest that means harm: random values to every port, register and MSR, from several threads, with all
 * timers running; and state that somebody has tampered with. What is checked: nothing crashes, hangs or floods (the sanitizers look on), and the
 * chips work again after a reset.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "dev/acpi_pm.h"
#include "dev/chip.h"
#include "dev/i8042.h"
#include "dev/i8254.h"
#include "dev/ioapic.h"
#include "dev/lapic.h"
#include "dev/mc146818.h"
#include "dev/ns16550.h"
#include "dev/port80.h"
#include "dev/port92.h"
#include "dev/pvpanic.h"
#include "dev/rst_cnt.h"
#include "dev/vga_mem.h"

#define CPUS 3

static struct bench bench;
static struct lapic_bus *lb;
static struct i8259 *pic;
static struct ioapic *ioapic;
static struct bus *cpu_bus[CPUS];
static struct lapic *lapic[CPUS];
static void *chip[32];
static unsigned chips;
static atomic_uint signals, output;

static void signal_cpu(void *vcpu UNUSED, enum cpu_signal what UNUSED, u8 vector UNUSED)
{
    atomic_fetch_add(&signals, 1);
}

static void tell(void *arg UNUSED, enum machine_event what UNUSED)
{
}

/* A back end that takes every other byte. */
static size_t moody_write(struct chardev *c UNUSED, const u8 *buf UNUSED, size_t len)
{
    return atomic_fetch_add(&output, 1) & 1 ? len : 0;
}

static void moody_ready(struct chardev *c UNUSED)
{
}

static const struct chardev_ops moody_ops = { .write = moody_write, .rx_ready = moody_ready };
static struct chardev moody;

/* To both interrupt controllers, as the board does it. */
static void isa_set(void *arg UNUSED, int n, int level)
{
    struct irq_line a = i8259_irq(pic, n), b = ioapic_irq(ioapic, n ? n : 2);

    irq_set(&a, level);
    irq_set(&b, level);
}

static struct irq_line isa(int n)
{
    return (struct irq_line){ isa_set, NULL, n };
}

#define ADD(var, call)                       \
    do {                                     \
        assert_int_equal(call, 0);           \
        chip[chips++] = var;                 \
    } while (0)

static int setup(void **state UNUSED)
{
    struct machine_hook hook = { .fn = tell };
    struct i8254 *pit;
    struct mc146818 *rtc;
    struct ns16550 *com;
    struct i8042 *kbc;
    struct acpi_pm *pm;
    struct rst_cnt *rst;
    struct port92 *p92;
    struct port80 *p80;
    struct pvpanic *panic;
    struct vga_mem *vga;

    bench_open(&bench);
    struct lapic_config cfg = { .clock = bench.clock, .phys_bits = 46, .x2apic = true, .tsc_deadline = true };
    chips = 0;
    moody = (struct chardev){ .ops = &moody_ops, .opened = true };
    assert_int_equal(lapic_bus_new(&cfg, &lb), 0);
    for (int i = 0; i < CPUS; i++) {
        assert_int_equal(bus_new(bench.mmio, &cpu_bus[i]), 0);
        ADD(lapic[i], lapic_new(lb, cpu_bus[i], (u32)i, i == 0, (struct cpu_port){ .signal = signal_cpu }, &lapic[i]));
    }
    ADD(pic, i8259_new(bench.pio, lapic_bus_pic_line(lb), &pic));
    lapic_bus_set_pic(lb, pic);
    ADD(ioapic, ioapic_new(bench.mmio, IOAPIC_BASE, 0, lb, &ioapic));
    ADD(pit, i8254_new(bench.pio, bench.clock, isa(0), &pit));
    ADD(rtc, mc146818_new(bench.pio, bench.clock, isa(8), GiB, 0, &rtc));
    ADD(com, ns16550_new(bench.pio, 0x3f8, "com1", bench.clock, isa(4), &moody, &com));
    ADD(kbc, i8042_new(bench.pio, isa(1), isa(12), hook, &kbc));
    ADD(pm, acpi_pm_new(bench.pio, 0x600, bench.clock, isa(9), hook, &pm));
    ADD(rst, rst_cnt_new(bench.pio, hook, &rst));
    ADD(p92, port92_new(bench.pio, hook, &p92));
    ADD(p80, port80_new(bench.pio, &p80));
    ADD(panic, pvpanic_new(bench.pio, PVPANIC_PORT, hook, &panic));
    ADD(vga, vga_mem_new(bench.pio, bench.mmio, bench.clock, &vga));
    return 0;
}

static int teardown(void **state UNUSED)
{
    while (chips)
        chip_free(chip[--chips]);
    for (int i = 0; i < CPUS; i++)
        bus_free(cpu_bus[i]);
    lapic_bus_free(lb);
    bench_close(&bench);
    return 0;
}

static u64 next(u64 *seed) /* xorshift64 */
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    return *seed ^= *seed << 17;
}

static const u16 ports[] = { 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x40, 0x40, 0x42, 0x43, 0x43, 0x61, 0x60, 0x64, 0x70, 0x71, 0x71, 0x80, 0x92, 0xed, 0x3b0, 0x3c0, 0x3c8,
                             0x3d4, 0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fe, 0x505, 0x600, 0x602, 0x604, 0x608, 0x620, 0x628, 0xcf9 };

/* One thing that a guest, a device or another vCPU might do. */
static void poke(u64 *seed)
{
    u64 r = next(seed), val = next(seed);
    unsigned size = 1u << (r >> 60 & 3), cpu = (r >> 8) % CPUS;
    struct intc intc = lapic_intc(lapic[cpu]);

    if (r & BIT(56))
        val &= 0xff;
    switch (r % 8) {
    case 0:
    case 1:
        bus_access(bench.pio, ports[(r >> 16) % ARRAY_SIZE(ports)] + (r >> 32 & 1), size, r & BIT(40), &val);
        break;
    case 2:
        bus_access(cpu_bus[cpu], LAPIC_BASE + (r >> 16 & 0xfff), size, r & BIT(40), &val);
        break;
    case 3:
        bus_access(cpu_bus[cpu], LAPIC_BASE + (r >> 16 & 0x3f) * 16, 4, r & BIT(40), &val);
        break;
    case 4:
        bus_access(cpu_bus[cpu], IOAPIC_BASE + (r >> 16 & 0x40) + (r >> 24 & 0x10), 4, r & BIT(40), &val);
        break;
    case 5: {
        static const u32 base[4] = { 0x800, 0x800, 0x6e0, 0x1b };
        u32 msr = base[r >> 16 & 3] + (r & BIT(40) ? 0 : r >> 24 & 0x3f);

        if (msr == 0x1b)
            val = LAPIC_BASE | (val & 0xc00);
        if (r & BIT(41))
            intc.ops->msr_write(intc.chip, msr, val);
        else
            intc.ops->msr_read(intc.chip, msr, &val);
        break;
    }
    case 6: {
        struct irq_line l = isa((int)(r >> 16 & 15));

        irq_set(&l, r >> 24 & 1);
        lapic_bus_msi(lb).send(lb, 0xfee00000 | (val & 0xfffff), (u32)(val >> 32));
        break;
    }
    case 7:
        intc.ops->peek(intc.chip);
        if (intc.ops->ack(intc.chip) >= 0 && (r & BIT(41)))
            bus_write(cpu_bus[cpu], LAPIC_BASE + 0xb0, 0, 4);
        intc.ops->tpr_set(intc.chip, val & 15);
        if (r % 100000 == 7)
            intc.ops->init(intc.chip);
        break;
    }
}

static void *poker(void *arg)
{
    u64 seed = (u64)(uintptr_t)arg;

    for (int i = 0; i < 150000; i++)
        poke(&seed);
    return NULL;
}

static void *pokers(void *arg UNUSED)
{
    pthread_t t[3];

    for (uintptr_t i = 0; i < 3; i++)
        pthread_create(&t[i], NULL, poker, (void *)(i * 77 + 0x9e3779b9));
    for (int i = 0; i < 3; i++)
        pthread_join(t[i], NULL);
    loop_stop(bench.loop);
    return NULL;
}

/* The interrupt path from end to end: the timer's edge through the I/O APIC to a vector. */
static void assert_alive(void)
{
    struct intc intc = lapic_intc(lapic[0]);

    for (unsigned i = 0; i < chips; i++)
        chip_reset(chip[i]);
    while (intc.ops->ack(intc.chip) >= 0)
        ;
    bus_write(cpu_bus[0], LAPIC_BASE + 0xf0, 0x1ff, 4);
    bus_write(bench.mmio, IOAPIC_BASE, 0x14, 4);
    bus_write(bench.mmio, IOAPIC_BASE + 0x10, 0x55, 4);
    out8(&bench, 0x43, 0x34);
    out8(&bench, 0x40, 0x00);
    out8(&bench, 0x40, 0x10);
    bench_run(&bench, 10 * MS);
    assert_int_equal(intc.ops->ack(intc.chip), 0x55);
}

static void random_accesses_do_no_harm(void **state UNUSED)
{
    pthread_t t;

    clock_resume(bench.clock);
    pthread_create(&t, NULL, pokers, NULL);
    loop_run(bench.loop);
    pthread_join(t, NULL);
    clock_pause(bench.clock);
    assert_alive();
}

/* Every chip's saved state with bytes changed, cut off, or all random: an error or not, but never harm; then accesses and timers on what has become of it. */
static void tampered_state_does_no_harm(void **state UNUSED)
{
    u64 seed = 12345;

    for (int round = 0; round < 60; round++) {
        for (unsigned i = 0; i < chips; i++) {
            struct stream s;
            u64 head;

            chip_save(chip[i], &s);
            head = MIN(s.len, strlen(((struct device *)chip[i])->ops->name) + 5);
            for (u64 n = next(&seed) % 20; n; n--)
                if (s.len > head)
                    s.buf[head + next(&seed) % MIN(s.len - head, 600)] = (u8)next(&seed);
            if (round % 10 == 9)
                for (u64 k = head; k < s.len; k++)
                    s.buf[k] = (u8)next(&seed);
            chip_load(chip[i], s.buf, round % 3 ? s.len : next(&seed) % (s.len + 1));
            stream_free(&s);
        }
        for (int i = 0; i < 300; i++)
            poke(&seed);
        bench_run(&bench, next(&seed) % (100 * MS));
    }
    assert_alive();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(random_accesses_do_no_harm, setup, teardown),
        cmocka_unit_test_setup_teardown(tampered_state_does_no_harm, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
