/*
 * Interrupt chips that live elsewhere (io/irq.h): a state loaded goes there, a state saved comes from there, and is the
 * same; wires and messages are passed on and do nothing here.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "dev/i8254.h"
#include "dev/i8259.h"
#include "dev/ioapic.h"
#include "dev/lapic.h"

struct elsewhere {
    struct lapic_regs lapic;
    struct ioapic_regs ioapic;
    struct i8259_regs i8259;
    struct i8254_regs i8254;
    unsigned sets, pic_lines, io_lines, msis, signals;
    int last_line;
};

#define STORE(name)                                                                                                    \
    static int name##_get(void *arg, struct name##_regs *r)                                                            \
    {                                                                                                                  \
        *r = ((struct elsewhere *)arg)->name;                                                                          \
        return 0;                                                                                                      \
    }                                                                                                                  \
    static int name##_set(void *arg, const struct name##_regs *r)                                                      \
    {                                                                                                                  \
        ((struct elsewhere *)arg)->name = *r;                                                                          \
        ((struct elsewhere *)arg)->sets++;                                                                             \
        return 0;                                                                                                      \
    }
STORE(ioapic)
STORE(i8259)
STORE(i8254)

static int lapic_get(void *arg, u32 id, struct lapic_regs *r)
{
    assert_int_equal(id, 0);
    *r = ((struct elsewhere *)arg)->lapic;
    return 0;
}

static int lapic_set(void *arg, u32 id, const struct lapic_regs *r)
{
    assert_int_equal(id, 0);
    ((struct elsewhere *)arg)->lapic = *r;
    ((struct elsewhere *)arg)->sets++;
    return 0;
}

static void pic_line(void *arg, int n, int level)
{
    ((struct elsewhere *)arg)->pic_lines++;
    ((struct elsewhere *)arg)->last_line = 2 * n + level;
}

static void ioapic_line(void *arg, int n, int level)
{
    ((struct elsewhere *)arg)->io_lines++;
    ((struct elsewhere *)arg)->last_line = 2 * n + level;
}

static void msi(void *arg, u64 addr UNUSED, u32 data UNUSED)
{
    ((struct elsewhere *)arg)->msis++;
}

static const struct irqchip_ops ops = {
    .pic_line = pic_line, .ioapic_line = ioapic_line, .msi = msi, .lapic_get = lapic_get, .lapic_set = lapic_set,
    .ioapic_get = ioapic_get, .ioapic_set = ioapic_set, .i8259_get = i8259_get, .i8259_set = i8259_set,
    .i8254_get = i8254_get, .i8254_set = i8254_set,
};

struct fixture {
    struct elsewhere e;
    struct loop *loop;
    struct clock *clock;
    struct bus *pio, *mmio, *cpu;
    struct lapic_bus *lapics;
    struct lapic *lapic;
    struct i8259 *pic;
    struct ioapic *ioapic;
    struct i8254 *pit;
};

static void cpu_signal(void *vcpu, enum cpu_signal what UNUSED, u8 vector UNUSED)
{
    ((struct elsewhere *)vcpu)->signals++;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct lapic_config cfg = { .phys_bits = 40, .x2apic = true, .tsc_deadline = true };

    assert_int_equal(loop_new(&f->loop), 0);
    assert_int_equal(clock_new(f->loop, &f->clock), 0);
    clock_pause(f->clock);                                         /* times are exact then */
    cfg.clock = f->clock;
    assert_int_equal(bus_new(NULL, &f->pio) | bus_new(NULL, &f->mmio) | bus_new(f->mmio, &f->cpu), 0);
    assert_int_equal(lapic_bus_new(&cfg, &f->lapics), 0);
    assert_int_equal(i8259_new(f->pio, lapic_bus_pic_line(f->lapics), &f->pic), 0);
    lapic_bus_set_pic(f->lapics, f->pic);
    assert_int_equal(ioapic_new(f->mmio, IOAPIC_BASE, 1, f->lapics, &f->ioapic), 0);
    assert_int_equal(lapic_new(f->lapics, f->cpu, 0, true, (struct cpu_port){ .signal = cpu_signal, .vcpu = &f->e }, &f->lapic), 0);
    assert_int_equal(i8254_new(f->pio, f->clock, i8259_irq(f->pic, 0), &f->pit), 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    struct device *d[] = { (void *)f->pit, (void *)f->lapic, (void *)f->ioapic, (void *)f->pic };

    for (size_t i = 0; i < ARRAY_SIZE(d); i++)
        d[i]->ops->free(d[i]);
    lapic_bus_free(f->lapics);
    bus_free(f->cpu);
    bus_free(f->mmio);
    bus_free(f->pio);
    clock_free(f->clock);
    loop_free(f->loop);
    free(f);
    return 0;
}

static void attach(struct fixture *f)
{
    struct irqchip there = { &ops, &f->e };

    i8259_attach(f->pic, there);
    ioapic_attach(f->ioapic, there);
    i8254_attach(f->pit, there);
    lapic_bus_attach(f->lapics, there);
}

static void program(struct fixture *f)
{
    static const u8 port[][2] = {
        { 0x20, 0x11 }, { 0x21, 0x30 }, { 0x21, 4 }, { 0x21, 1 }, { 0xa0, 0x11 }, { 0xa1, 0x38 }, { 0xa1, 2 }, { 0xa1,
        1 }, { 0x21, 0xf0 },
        { 0xa1, 0x5f }, { 0x43, 0x34 }, { 0x40, 0x9c }, { 0x40, 0x2e }, { 0x43, 0xb6 }, { 0x42, 0x00 }, { 0x42, 0x10 },
        { 0x61, 3 },
    };
    static const u32 apic[][2] = {
        { 0x80, 0x20 }, { 0xd0, 0x01000000 }, { 0xf0, 0x1ff }, { 0x320, 0x200ef }, { 0x350, 0x700 }, { 0x3e0, 3 },
        { 0x380, 1000000 },
    };

    for (size_t i = 0; i < ARRAY_SIZE(port); i++)
        bus_write(f->pio, port[i][0], port[i][1], 1);
    for (size_t i = 0; i < ARRAY_SIZE(apic); i++)
        bus_write(f->cpu, LAPIC_BASE + apic[i][0], apic[i][1], 4);
    for (u32 pin = 0; pin < 24; pin++) {
        bus_write(f->mmio, IOAPIC_BASE, 0x10 + 2 * pin, 4);
        bus_write(f->mmio, IOAPIC_BASE + 0x10, 0x30 + pin + (pin & 1 ? 0x8000u : 0) + (pin % 3 ? 0 : 0x10000u), 4);
    }
}

static void all_states(struct fixture *f, struct stream *s)
{
    struct device *d[] = { (void *)f->pic, (void *)f->ioapic, (void *)f->pit, (void *)f->lapic };

    for (size_t i = 0; i < ARRAY_SIZE(d); i++)
        d[i]->ops->state(d[i], s);
    assert_int_equal(s->error, 0);
}

static void there_and_back(void **state)
{
    struct fixture *f = *state;
    struct stream ours, load, theirs;

    program(f);
    stream_save_init(&ours);
    all_states(f, &ours);
    attach(f);
    stream_load_init(&load, ours.buf, ours.len);
    all_states(f, &load);
    assert_int_equal(f->e.sets, 4);
    assert_int_equal(f->e.i8259.chip[0].base, 0x30);
    assert_int_equal(f->e.i8259.chip[1].imr, 0x5f);
    assert_int_equal(f->e.i8254.counter[0].count, 0x2e9c);
    assert_int_equal(f->e.lapic.current, 1000000);
    assert_int_equal(f->e.ioapic.rte[5] & 0x1ffff, 0x8035);

    /* What the objects hold themselves is not what is saved. */
    f->e.lapic.tpr = 0x40;
    f->e.i8259.chip[0].imr = 0xaa;
    f->e.ioapic.rte[7] = 0x10077;
    f->e.i8254.counter[2].count = 77;
    stream_save_init(&theirs);
    all_states(f, &theirs);
    assert_int_equal(theirs.len, ours.len);
    assert_true(stream_digest(&theirs) != stream_digest(&ours));

    struct fixture *g;
    assert_int_equal(setup((void **)&g), 0);
    stream_load_init(&load, theirs.buf, theirs.len);
    all_states(g, &load);
    assert_int_equal(bus_read(g->pio, 0x21, 1), 0xaa);
    assert_int_equal(bus_read(g->cpu, LAPIC_BASE + 0x80, 4), 0x40);
    bus_write(g->mmio, IOAPIC_BASE, 0x10 + 2 * 7, 4);
    assert_int_equal(bus_read(g->mmio, IOAPIC_BASE + 0x10, 4), 0x10077);
    teardown((void **)&g);
    stream_free(&ours);
    stream_free(&theirs);
}

static void wires_and_messages(void **state)
{
    struct fixture *f = *state;
    struct irq_line pic = i8259_irq(f->pic, 4), io = ioapic_irq(f->ioapic, 5);
    struct msi_sink sink = lapic_bus_msi(f->lapics);
    unsigned before;

    program(f);
    attach(f);
    before = f->e.signals;
    irq_set(&pic, 1);
    irq_set(&pic, 1);
    assert_int_equal(f->e.pic_lines, 1);
    assert_int_equal(f->e.last_line, 2 * 4 + 1);
    irq_set(&io, 1);
    irq_set(&io, 0);
    assert_int_equal(f->e.io_lines, 2);
    assert_int_equal(f->e.last_line, 2 * 5);
    sink.send(sink.arg, 0xfee00000, 0x41);
    sink.send(sink.arg, 0x12345678, 0x41);                         /* no message */
    assert_int_equal(f->e.msis, 1);
    assert_int_equal(f->e.signals, before);
    i8259_set_elcr(f->pic, 0x0e00);
    assert_int_equal(f->e.i8259.chip[1].elcr, 0x0e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(there_and_back, setup, teardown),
        cmocka_unit_test_setup_teardown(wires_and_messages, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
