/* High precision event timers (dev/hpet) after the IA-PC HPET Specification 1.0a. */
#include "dev/chip.h"

#include "dev/hpet.h"

#define CONFIG  (HPET_BASE + 0x10)
#define STATUS  (HPET_BASE + 0x20)
#define COUNTER (HPET_BASE + 0xf0)
#define TN(n)   (HPET_BASE + 0x100 + 0x20 * (n))
#define TICK    10u

static struct bench bench;
static struct hpet *hpet;
static struct wire irq0, irq8, pin[4];

static struct hpet_config config_of(void)
{
    struct hpet_config c = { .clock = bench.clock, .legacy = true, .irq0 = wire_line(&irq0), .irq8 = wire_line(&irq8) };

    for (unsigned i = 0; i < 4; i++)
        c.pin[i] = wire_line(&pin[i]);
    return c;
}

static int setup(void **state UNUSED)
{
    struct hpet_config c;

    bench_open(&bench);
    irq0 = irq8 = (struct wire){ 0 };
    memset(pin, 0, sizeof(pin));
    c = config_of();
    return hpet_new(bench.mmio, &c, &hpet);
}

static int teardown(void **state UNUSED)
{
    chip_free(hpet);
    bench_close(&bench);
    return 0;
}

static u64 get(u64 reg)
{
    return bus_read(bench.mmio, reg, 8);
}

static void set(u64 reg, u64 val)
{
    bus_write(bench.mmio, reg, val, 8);
}

static void capabilities(void **state UNUSED)
{
    assert_int_equal(get(HPET_BASE), 10000000ull << 32 | 0x8086a201);
    assert_int_equal(bus_read(bench.mmio, HPET_BASE + 4, 4), 10000000);
    assert_int_equal(get(TN(0)) & 0x30, 0x30);                     /* periodic, 64 bits */
    assert_int_equal(get(TN(2)) >> 32, 0xf00000);
    assert_int_equal(get(TN(3)), 0);
    assert_int_equal(get(TN(0) + 8), ~0ull);
    set(CONFIG, ~0ull & ~1ull);
    assert_int_equal(get(CONFIG), 2);
}

static void the_counter_counts(void **state UNUSED)
{
    bench_at(&bench, SEC);
    assert_int_equal(get(COUNTER), 0);
    set(COUNTER, 0x1ffffffff);
    set(CONFIG, 1);
    bench_pass(&bench, 100 * TICK);
    assert_int_equal(get(COUNTER), 0x1ffffffffull + 100);
    assert_int_equal(bus_read(bench.mmio, COUNTER + 4, 4), 2);
    set(COUNTER, 0);                                               /* not while it runs */
    assert_int_equal(get(COUNTER), 0x1ffffffffull + 100);
    set(CONFIG, 0);
    bench_pass(&bench, SEC);
    assert_int_equal(get(COUNTER), 0x1ffffffffull + 100);
    bus_write(bench.mmio, COUNTER + 4, 7, 4);
    assert_int_equal(get(COUNTER), 0x700000063);
    chip_reset(hpet);
    assert_int_equal(get(COUNTER), 0);
}

static void one_shot(void **state UNUSED)
{
    set(TN(2), 1 << 2 | 21 << 9);
    set(TN(2) + 8, 1000000);                                       /* 10 ms */
    set(CONFIG, 1);
    bench_run(&bench, 9 * MS);
    assert_int_equal(pin[1].rises, 0);
    bench_run(&bench, 2 * MS);
    assert_int_equal(pin[1].rises, 1);
    assert_int_equal(pin[1].level, 0);
    bench_run(&bench, SEC);
    assert_int_equal(pin[1].rises, 1);
    assert_int_equal(get(STATUS), 0);
    /* in the past: only when the counter comes round */
    set(TN(2) + 8, 5);
    bench_run(&bench, SEC);
    assert_int_equal(pin[1].rises, 1);
}

static void periodic(void **state UNUSED)
{
    set(TN(1), 1 << 2 | 1 << 3 | 1 << 6 | 20 << 9);
    set(TN(1) + 8, 500000);                                        /* first after 5 ms, */
    set(TN(1) + 8, 200000);                                        /* then every 2 */
    assert_int_equal(get(TN(1) + 8), 500000);
    assert_int_equal(get(TN(1)) & 1 << 6, 0);
    set(CONFIG, 1);
    bench_run(&bench, 4900 * US);
    assert_int_equal(pin[0].rises, 0);
    bench_run(&bench, 200 * US);
    assert_int_equal(pin[0].rises, 1);
    bench_steps(&bench, 10, 2 * MS);
    assert_int_equal(pin[0].rises, 11);
    bench_run(&bench, 100 * MS);                                   /* nobody looked for long: they come together */
    assert_int_equal(pin[0].rises, 12);
    assert_true(get(TN(1) + 8) > get(COUNTER));
    assert_true(get(TN(1) + 8) - get(COUNTER) <= 200000);
    set(TN(1), 0);
    bench_run(&bench, SEC);
    assert_int_equal(pin[0].rises, 12);
    /* a period of nothing does no harm */
    set(TN(1), 1 << 2 | 1 << 3 | 1 << 6 | 20 << 9);
    set(TN(1) + 8, get(COUNTER) + 10);
    set(TN(1) + 8, 0);
    bench_run(&bench, MS);
}

static void level(void **state UNUSED)
{
    set(TN(0), 1 << 1 | 1 << 2 | 23 << 9);
    set(TN(0) + 8, 1000);
    set(CONFIG, 1);
    bench_run(&bench, MS);
    assert_int_equal(pin[3].level, 1);
    assert_int_equal(get(STATUS), 1);
    set(STATUS, 6);
    assert_int_equal(pin[3].level, 1);
    set(STATUS, 1);
    assert_int_equal(pin[3].level, 0);
    assert_int_equal(get(STATUS), 0);
}

static void legacy_replacement(void **state UNUSED)
{
    struct irq_line pit = hpet_i8254_line(hpet), rtc = hpet_rtc_line(hpet);

    irq_set(&pit, 1);
    assert_int_equal(irq0.level, 1);
    irq_set(&rtc, 1);
    assert_int_equal(irq8.level, 1);
    set(CONFIG, 3);
    assert_int_equal(irq0.level, 0);
    assert_int_equal(irq8.level, 0);
    irq_set(&pit, 0);
    irq_set(&pit, 1);
    assert_int_equal(irq0.rises, 1);
    set(TN(0), 1 << 2 | 22 << 9);
    set(TN(0) + 8, get(COUNTER) + 1000);
    set(TN(1), 1 << 2);
    set(TN(1) + 8, get(COUNTER) + 1000);
    bench_run(&bench, MS);
    assert_int_equal(irq0.rises, 2);
    assert_int_equal(irq8.rises, 2);
    assert_int_equal(pin[2].rises, 0);
    set(CONFIG, 1);
    assert_int_equal(irq0.level, 1);                               /* the i8254's again */
}

static void thirty_two_bits(void **state UNUSED)
{
    set(TN(0), 1 << 2 | 1 << 8 | 20 << 9);
    set(COUNTER, 0x4fffff000);
    bus_write(bench.mmio, TN(0) + 8, 0x100, 4);
    set(CONFIG, 1);
    bench_run(&bench, 0x1200 * TICK);
    assert_int_equal(pin[0].rises, 1);
}

static void state_moves(void **state UNUSED)
{
    struct hpet_config c = config_of();
    struct hpet *to;

    set(TN(1), 1 << 2 | 1 << 3 | 1 << 6 | 20 << 9);
    set(TN(1) + 8, 500000);
    set(CONFIG, 3);
    bench_pass(&bench, MS);
    assert_int_equal(hpet_new(bench.pio, &c, &to), 0);
    chip_transplant(hpet, to);
    assert_int_equal(bus_read(bench.pio, COUNTER, 8), get(COUNTER));
    chip_free(to);
}

/* Where the i8254 is an engine's own, there is nothing to replace, and the guest is told. */
static void no_legacy_replacement(void **state UNUSED)
{
    struct hpet_config c = config_of();
    struct hpet *other;

    c.legacy = false;
    assert_int_equal(hpet_new(bench.pio, &c, &other), 0);
    assert_int_equal((u32)bus_read(bench.pio, HPET_BASE, 8), 0x80862201);
    bus_write(bench.pio, CONFIG, 3, 4);
    assert_int_equal(bus_read(bench.pio, CONFIG, 4), 1);
    chip_free(other);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(capabilities), T(the_counter_counts), T(one_shot), T(periodic), T(level), T(legacy_replacement), T(thirty_two_bits),
        T(state_moves), T(no_legacy_replacement),
    };
    return cmocka_run_group_tests_name("hpet", tests, NULL, NULL);
}
