/* dev/acpi_pm: register scripts after ACPI 6.4, section 4.8. */
#include "dev/acpi_pm.h"
#include "dev/chip.h"

#define BASE 0x600
#define STS (BASE + ACPI_PM_EVT)
#define EN (BASE + ACPI_PM_EVT + 2)
#define CNT (BASE + ACPI_PM_CNT)
#define TIMER (BASE + ACPI_PM_TMR)
#define GPE_STS (BASE + ACPI_PM_GPE0)
#define GPE_EN (BASE + ACPI_PM_GPE0 + 8)

static struct bench bench;
static struct acpi_pm *pm;
static struct wire sci;
static int told;

static void tell(void *arg, enum machine_event what)
{
    assert_int_equal(what, MACHINE_POWEROFF);
    ++*(int *)arg;
}

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    sci = (struct wire){ 0 };
    told = 0;
    return acpi_pm_new(bench.pio, BASE, bench.clock, wire_line(&sci), (struct machine_hook){ .fn = tell, .arg = &told }, &pm);
}

static int teardown(void **state UNUSED)
{
    chip_free(pm);
    bench_close(&bench);
    return 0;
}

static u16 rd(u16 port)
{
    return (u16)bus_read(bench.pio, port, 2);
}

static void wr(u16 port, u16 val)
{
    bus_write(bench.pio, port, val, 2);
}

/* 4.8.2.2: the status bit comes up with the button, the SCI if it is enabled; writing ones clears. */
static void the_power_button(void **state UNUSED)
{
    acpi_pm_power_button(pm);
    assert_int_equal(rd(STS), 0x0100);
    assert_int_equal(sci.level, 0);
    wr(EN, 0x0100);
    assert_int_equal(sci.level, 1);
    wr(STS, 0x0001); /* another bit */
    assert_int_equal(sci.level, 1);
    out8(&bench, STS, 0xff); /* the other byte */
    assert_int_equal(rd(STS), 0x0100);
    wr(STS, 0x0100);
    assert_int_equal(rd(STS), 0);
    assert_int_equal(sci.level, 0);
    wr(EN, 0xffff);
    assert_int_equal(rd(EN), 0x0721);
}

/* 4.8.3.2: SCI_EN is always there; SLP_EN with the type of S5 powers off; other types and SLP_TYP alone do nothing. */
static void sleep_and_power_off(void **state UNUSED)
{
    assert_int_equal(rd(CNT), 0x0001);
    wr(CNT, 0);
    assert_int_equal(rd(CNT), 0x0001);
    wr(CNT, ACPI_SLP_TYP_S5 << 10);
    assert_int_equal(told, 0);
    assert_int_equal(rd(CNT), ACPI_SLP_TYP_S5 << 10 | 1);
    wr(CNT, 1 << 10 | 0x2000);
    assert_int_equal(told, 0);
    assert_int_equal(rd(CNT), 1 << 10 | 1); /* SLP_EN is write-only */
    wr(CNT, ACPI_SLP_TYP_S5 << 10 | 0x2000);
    assert_int_equal(told, 1);
}

static void sleep_by_a_byte(void **state UNUSED)
{
    out8(&bench, CNT + 1, ACPI_SLP_TYP_S5 << 2 | 0x20);
    assert_int_equal(told, 1);
}

/* 4.8.3.3: 3.579545 MHz, 32 bits. */
static void the_timer(void **state UNUSED)
{
    u32 a;

    bench_at(&bench, 1000 * SEC);
    a = (u32)bus_read(bench.pio, TIMER, 4);
    assert_int_equal(a, 3579545000u);
    bench_pass(&bench, SEC);
    assert_int_equal(bus_read(bench.pio, TIMER, 4), a + 3579545);
    bus_write(bench.pio, TIMER, 0, 4);
    assert_int_equal(bus_read(bench.pio, TIMER, 4), a + 3579545);
    assert_int_equal(bus_read(bench.pio, TIMER + 2, 2), (a + 3579545) >> 16);
}

/* 4.8.2.1: TMR_STS whenever the highest bit changes. */
static void the_timers_carry(void **state UNUSED)
{
    u64 half = (BIT(31) * SEC + ACPI_PM_TIMER_HZ - 1) / ACPI_PM_TIMER_HZ;

    bench_at(&bench, half - MS);
    assert_int_equal(rd(STS), 0);
    wr(EN, 1);
    bench_run(&bench, MS / 2);
    assert_int_equal(sci.level, 0);
    bench_run(&bench, MS);
    assert_int_equal(sci.level, 1);
    assert_int_equal(rd(STS), 1);
    wr(STS, 1);
    assert_int_equal(sci.level, 0);
    bench_at(&bench, 2 * half - MS);
    bench_run(&bench, 2 * MS);
    assert_int_equal(sci.level, 1);
    wr(EN, 0);
    wr(STS, 1);
    bench_at(&bench, 3 * half + MS);
    assert_int_equal(rd(STS), 1); /* also without a timer running for it */
}

/* 4.8.4.1 */
static void general_purpose_events(void **state UNUSED)
{
    acpi_pm_gpe(pm, 3);
    acpi_pm_gpe(pm, 63);
    assert_int_equal(in8(&bench, GPE_STS), 0x08);
    assert_int_equal(in8(&bench, GPE_STS + 7), 0x80);
    assert_int_equal(sci.level, 0);
    out8(&bench, GPE_EN + 7, 0x80);
    assert_int_equal(sci.level, 1);
    out8(&bench, GPE_STS + 7, 0x80);
    assert_int_equal(sci.level, 0);
    assert_int_equal(in8(&bench, GPE_STS), 0x08);
    out8(&bench, GPE_STS, 0xf7);
    assert_int_equal(in8(&bench, GPE_STS), 0x08);
}

static void a_reset_lets_go(void **state UNUSED)
{
    wr(EN, 0x0100);
    acpi_pm_power_button(pm);
    chip_reset(pm);
    assert_int_equal(sci.level, 0);
    assert_int_equal(rd(STS) | rd(EN), 0);
}

static void its_state_can_be_moved(void **state UNUSED)
{
    struct acpi_pm *copy;
    struct wire w = { 0 };

    wr(EN, 0x0101);
    acpi_pm_power_button(pm);
    acpi_pm_gpe(pm, 9);
    wr(CNT, 3 << 10);
    assert_int_equal(acpi_pm_new(bench.mmio, BASE, bench.clock, wire_line(&w), (struct machine_hook){ 0 }, &copy), 0);
    chip_transplant(pm, copy);
    assert_int_equal(bus_read(bench.mmio, STS, 4), 0x01010100);
    assert_int_equal(bus_read(bench.mmio, CNT, 2), 3 << 10 | 1);
    assert_int_equal(bus_read(bench.mmio, GPE_STS + 1, 1), 2);
    chip_free(copy);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(the_power_button), T(sleep_and_power_off), T(sleep_by_a_byte), T(the_timer), T(the_timers_carry), T(general_purpose_events), T(a_reset_lets_go),
        T(its_state_can_be_moved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
