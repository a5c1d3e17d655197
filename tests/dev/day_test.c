/*
 * A day of a guest's clocks and timers, simulated: each device that tells time runs for 24 hours (and the 32-bit counters wrap) without a lost or an early
 * interrupt, and without an error that adds up. Then a host that stands still for ten minutes: no storm of interrupts behind it, and the grid is kept.
 *
 * This file is base/clock, too: it defines what clock.h declares, so the linker does not take the real one from the library. Time goes on only here, from one
 * timer to the next; a timer is served a little late, as on a host, and now and then very late.
 */
#include <linux/kvm_para.h>

#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/msr.h"
#include "cpu/pv.h"
#include "cpu/vcpu.h"
#include "dev/acpi_pm.h"
#include "dev/chip.h"
#include "dev/hpet.h"
#include "dev/i8254.h"
#include "dev/lapic.h"
#include "dev/mc146818.h"

#define DAY (86400 * SEC)
#define TSC_KHZ 2596122ull
#define LATE_MOST (3 * MS)
#define WALL_0 1767225600ull                                       /* 2026-01-01 00:00:00 */
#define TIMERS 16

/* ---- the clock ---- */
struct clock {
    u64 ns;
    struct timer *armed[TIMERS];
    u64 random, late_most;
};
static struct clock sim;

int clock_new(struct loop *l UNUSED, struct clock **out)
{
    sim = (struct clock){ .random = 88172645463325252ull, .late_most = LATE_MOST };
    *out = &sim;
    return 0;
}

void clock_free(struct clock *c UNUSED)
{
}

u64 clock_ns(const struct clock *c)
{
    return c->ns;
}

static u64 tsc_at(u64 ns)
{
    return (u64)((u128)ns * TSC_KHZ / 1000000);
}

u64 clock_tsc(const struct clock *c)
{
    return tsc_at(c->ns);
}

u64 clock_tsc_bias(const struct clock *c UNUSED)
{
    return 0;
}

u64 clock_tsc_khz(const struct clock *c UNUSED)
{
    return TSC_KHZ;
}

u64 clock_tsc_to_ns(const struct clock *c UNUSED, u64 tsc)
{
    u128 ns = (u128)tsc * 1000000 / TSC_KHZ;

    return ns > UINT64_MAX ? UINT64_MAX : (u64)ns;
}

u64 clock_ns_to_tsc(const struct clock *c UNUSED, u64 ns)
{
    return tsc_at(ns);
}

void clock_pause(struct clock *c UNUSED)
{
}

void clock_resume(struct clock *c UNUSED)
{
}

void clock_state(struct clock *c UNUSED, struct stream *s UNUSED)
{
}

u64 clock_wall_ns(void)
{
    return WALL_0 * SEC + sim.ns;
}

void timer_init(struct timer *t, struct clock *c, void (*fn)(void *arg), void *arg)
{
    *t = (struct timer){ .clock = c, .fn = fn, .arg = arg, .slot = -1 };
}

void timer_arm(struct timer *t, u64 deadline_ns)
{
    t->deadline_ns = deadline_ns;
    for (int i = 0; i < TIMERS && t->slot < 0; i++)
        if (!t->clock->armed[i])
            t->slot = i;
    assert_true(t->slot >= 0);
    t->clock->armed[t->slot] = t;
}

void timer_disarm(struct timer *t)
{
    if (t->slot >= 0)
        t->clock->armed[t->slot] = NULL;
    t->slot = -1;
}

static struct timer *earliest(void)
{
    struct timer *t = NULL;

    for (int i = 0; i < TIMERS; i++)
        if (sim.armed[i] && (!t || sim.armed[i]->deadline_ns < t->deadline_ns))
            t = sim.armed[i];
    return t;
}

/* How late the host is: mostly some microseconds, one time in 64 anything up to late_most. */
static u64 lateness(void)
{
    sim.random ^= sim.random << 13;
    sim.random ^= sim.random >> 7;
    sim.random ^= sim.random << 17;
    return 100 + (sim.random & 63 ? sim.random >> 8 & 0xffff : (sim.random >> 8) % sim.late_most);
}

/* Until `end`; guest() runs after each timer. Fewer than `most` timers fire in that time. */
static void run_until(u64 end, u64 most, void (*guest)(void))
{
    struct timer *t;

    while ((t = earliest()) && t->deadline_ns <= end) {
        sim.ns = MAX(sim.ns, t->deadline_ns) + lateness();
        assert_true(most-- > 0);
        timer_disarm(t);
        t->fn(t->arg);
        if (guest)
            guest();
    }
    sim.ns = MAX(sim.ns, end);
}

/* ---- the bench ---- */
static struct bench bench;
static struct wire wire;
static u64 count, rises;                                           /* interrupts that the guest took; rises it has seen */

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    wire = (struct wire){ 0 };
    count = rises = 0;
    return 0;
}

static int teardown(void **state UNUSED)
{
    bench_close(&bench);
    return 0;
}

/* It is not early, and not later than the host; the i8254 begins to count with the tick behind the store. */
static void in_time(u64 due)
{
    if (sim.ns < due || sim.ns > due + LATE_MOST + 2 * US)
        fail_msg("interrupt %llu, due at %llu ns, comes at %llu", (unsigned long long)count, (unsigned long long)due, (unsigned long long)sim.ns);
}

/* ---- i8254: 65536 ticks, 18.2 Hz, as DOS and the BIOS have it ---- */
static u64 pit_due(u64 n)
{
    return (u64)((u128)n * 65536 * SEC / I8254_HZ);
}

static void pit_guest(void)
{
    for (; rises < wire.rises; rises++)
        in_time(pit_due(++count));
}

static void the_i8254(void **state UNUSED)
{
    struct i8254 *pit;

    assert_int_equal(i8254_new(bench.pio, bench.clock, wire_line(&wire), &pit), 0);
    out8(&bench, 0x43, 0x34);                                      /* mode 2 */
    out8(&bench, 0x40, 0);
    out8(&bench, 0x40, 0);
    wire.rises = 0;
    run_until(DAY + LATE_MOST, 3 * DAY / SEC * 19, pit_guest);
    assert_int_equal(count, DAY / 1000 * I8254_HZ / (SEC / 1000) / 65536);
    rises = wire.rises;
    sim.ns += 600 * SEC;
    run_until(sim.ns + 1, 4, NULL);
    assert_true(wire.rises - rises <= 1);
    /* and on with the grid */
    rises = wire.rises;
    count = sim.ns / (pit_due(1 << 20) >> 20);
    while (pit_due(count + 1) <= sim.ns)
        count++;
    u64 before = count;
    run_until(pit_due(before + 100) + LATE_MOST, 400, pit_guest);
    assert_int_equal(count, before + 100);
    chip_free(pit);
}

/* ---- local APIC: periodic, and TSC deadline ---- */
enum { EOI = 0xb0, SVR = 0xf0, LVT_TIMER = 0x320, INITIAL = 0x380, DIVIDE = 0x3e0 };
#define MSR_TSC_DEADLINE 0x6e0
#define APIC_PERIOD (50 * MS)
#define TSC_PERIOD (TSC_KHZ * 37 + 11)

static struct lapic_bus *lb;
static struct lapic *lapic;
static struct bus *cpu_bus;
static struct intc intc;
static u64 first_ns, deadline;

static void signal_none(void *vcpu UNUSED, enum cpu_signal what UNUSED, u8 vector UNUSED)
{
}

static void wr(u32 reg, u32 val)
{
    bus_write(cpu_bus, LAPIC_BASE + reg, val, 4);
}

static void lapic_open(void)
{
    struct lapic_config cfg = { .clock = bench.clock, .phys_bits = 40, .x2apic = true, .tsc_deadline = true };

    assert_int_equal(lapic_bus_new(&cfg, &lb), 0);
    assert_int_equal(bus_new(bench.mmio, &cpu_bus), 0);
    assert_int_equal(lapic_new(lb, cpu_bus, 0, true, (struct cpu_port){ .signal = signal_none }, &lapic), 0);
    intc = lapic_intc(lapic);
    wr(SVR, 0x1ff);
}

static void lapic_close(void)
{
    chip_free(lapic);
    bus_free(cpu_bus);
    lapic_bus_free(lb);
}

static bool taken(void)
{
    if (intc.ops->ack(intc.chip) < 0)
        return false;
    wr(EOI, 0);
    count++;
    return true;
}

static void periodic_guest(void)
{
    while (taken())
        in_time(first_ns + (count - 1) * APIC_PERIOD);
}

static void the_local_apics_timer(void **state UNUSED)
{
    lapic_open();
    wr(DIVIDE, 0xb);                                               /* by 1 */
    wr(LVT_TIMER, 1u << 17 | 0x40);
    wr(INITIAL, (u32)(APIC_PERIOD / (SEC / LAPIC_BUS_HZ)));
    first_ns = sim.ns + APIC_PERIOD;
    run_until(DAY + LATE_MOST, 3 * DAY / APIC_PERIOD, periodic_guest);
    assert_int_equal(count, DAY / APIC_PERIOD);
    sim.ns += 600 * SEC;
    u64 was = count;
    run_until(sim.ns + 1, 4, NULL);
    while (taken())
        ;
    assert_true(count - was <= 1);                                 /* the IRR has one bit for all that was missed */
    count = (sim.ns - first_ns) / APIC_PERIOD + 1;
    was = count;
    run_until(first_ns + (was + 99) * APIC_PERIOD + LATE_MOST, 400, periodic_guest);
    assert_int_equal(count, was + 100);
    lapic_close();
}

/* As Linux does it: each interrupt sets the next deadline, from the last one. Not before the TSC says so. */
static void deadline_guest(void)
{
    if (!taken())
        return;
    assert_true(clock_tsc(bench.clock) >= deadline);
    in_time(clock_tsc_to_ns(bench.clock, deadline));
    deadline += TSC_PERIOD;
    assert_int_equal(intc.ops->msr_write(intc.chip, MSR_TSC_DEADLINE, deadline), 0);
}

static void the_tsc_deadline(void **state UNUSED)
{
    lapic_open();
    wr(LVT_TIMER, 2u << 17 | 0x41);
    deadline = TSC_PERIOD;
    assert_int_equal(intc.ops->msr_write(intc.chip, MSR_TSC_DEADLINE, deadline), 0);
    run_until(DAY + LATE_MOST, 3 * tsc_at(DAY) / TSC_PERIOD, deadline_guest);
    assert_int_equal(count, tsc_at(DAY) / TSC_PERIOD);
    /* One that is a day away comes after a day, and nothing before. */
    count = 0;
    deadline = clock_tsc(bench.clock) + tsc_at(DAY);
    assert_int_equal(intc.ops->msr_write(intc.chip, MSR_TSC_DEADLINE, deadline), 0);
    u64 end = clock_tsc_to_ns(bench.clock, deadline);
    run_until(end - SEC, 1, deadline_guest);
    assert_int_equal(count, 0);
    run_until(end + MS, 4, deadline_guest);
    assert_int_equal(count, 1);
    lapic_close();
}

/* ---- HPET: a periodic comparator of 64 bits; one of 32 bits whose counter wraps 2011 times ---- */
#define HPET_CONFIG (HPET_BASE + 0x10)
#define HPET_COUNTER (HPET_BASE + 0xf0)
#define TN(n) (HPET_BASE + 0x100 + 0x20 * (n))
#define HPET_PERIOD 5000009ull                                     /* of 10 ns */
#define SHOT 90000000ull

static struct hpet *hpet;

static void hpet_open(void)
{
    struct hpet_config c = { .clock = bench.clock, .legacy = true };

    c.pin[0] = wire_line(&wire);
    assert_int_equal(hpet_new(bench.mmio, &c, &hpet), 0);
}

static void hpet_guest(void)
{
    for (; rises < wire.rises; rises++)
        in_time(++count * HPET_PERIOD * 10);
}

static void the_hpets_periodic_timer(void **state UNUSED)
{
    hpet_open();
    bus_write(bench.mmio, TN(0), 1 << 2 | 1 << 3 | 1 << 6 | 20 << 9, 8);
    bus_write(bench.mmio, TN(0) + 8, HPET_PERIOD, 8);
    bus_write(bench.mmio, TN(0) + 8, HPET_PERIOD, 8);
    bus_write(bench.mmio, HPET_CONFIG, 1, 8);
    run_until(DAY + LATE_MOST, 3 * DAY / (HPET_PERIOD * 10), hpet_guest);
    assert_int_equal(count, DAY / (HPET_PERIOD * 10));
    assert_int_equal(bus_read(bench.mmio, HPET_COUNTER, 8), sim.ns / 10);
    sim.ns += 600 * SEC;
    run_until(sim.ns + 1, 4, NULL);
    assert_true(wire.rises - rises <= 1);
    rises = wire.rises;
    u64 was = count = sim.ns / (HPET_PERIOD * 10);
    run_until((was + 100) * HPET_PERIOD * 10 + LATE_MOST, 400, hpet_guest);
    assert_int_equal(count, was + 100);
    chip_free(hpet);
}

/* One-shot, as an operating system with a 32-bit counter does it: comparator = last comparator + distance, modulo 2^32. */
static void shot_guest(void)
{
    for (; rises < wire.rises; rises++) {
        in_time(++count * SHOT * 10);
        bus_write(bench.mmio, TN(0) + 8, (u32)((count + 1) * SHOT), 4);
    }
}

static void the_hpets_counter_of_32_bits(void **state UNUSED)
{
    hpet_open();
    bus_write(bench.mmio, TN(0), 1 << 2 | 1 << 8 | 20 << 9, 8);
    bus_write(bench.mmio, TN(0) + 8, SHOT, 4);
    bus_write(bench.mmio, HPET_CONFIG, 1, 8);
    run_until(DAY + LATE_MOST, 4 * DAY / (SHOT * 10), shot_guest);
    assert_int_equal(count, DAY / (SHOT * 10));
    chip_free(hpet);
}

/* ---- RTC: every update, an alarm a day, a periodic interrupt of 8 Hz ---- */
enum { A = 0x0a, B = 0x0b, C = 0x0c };
static u64 updates, alarms, periods;

static u8 cmos(u8 reg)
{
    out8(&bench, 0x70, reg);
    return in8(&bench, 0x71);
}

static void cmos_set(u8 reg, u8 val)
{
    out8(&bench, 0x70, reg);
    out8(&bench, 0x71, val);
}

static void rtc_guest(void)
{
    if (rises == wire.rises)
        return;
    rises = wire.rises;
    u8 c = cmos(C);
    periods += c >> 6 & 1;
    alarms += c >> 5 & 1;
    updates += c >> 4 & 1;
    assert_true(updates <= sim.ns / SEC && periods <= sim.ns / (SEC / 8));
    if (c & 0x20)
        assert_int_equal(sim.ns / SEC, 12 * 3600 + 34 * 60 + 56);
}

static void the_rtc(void **state UNUSED)
{
    struct mc146818 *rtc;

    updates = alarms = periods = 0;
    assert_int_equal(mc146818_new(bench.pio, bench.clock, wire_line(&wire), 3 * GiB, 0, &rtc), 0);
    cmos_set(1, 0x56);
    cmos_set(3, 0x34);
    cmos_set(5, 0x12);
    cmos_set(A, 0x2d);                                             /* 8 Hz */
    cmos(C);
    cmos_set(B, 0x72);
    run_until(DAY + LATE_MOST, 3 * DAY / (SEC / 8), rtc_guest);
    assert_int_equal(alarms, 1);
    assert_int_equal(updates, DAY / SEC);
    assert_int_equal(periods, DAY / (SEC / 8));
    assert_int_equal(cmos(4) | cmos(2) | cmos(0), 0);              /* midnight */
    assert_int_equal(cmos(7) << 8 | cmos(8), 0x0201);              /* of 2 January */
    chip_free(rtc);
}

/* ---- ACPI's timer: read each second, 32 bits that wrap 72 times; its carry, 144 times ---- */
#define PM_BASE 0x600

static struct acpi_pm *pm;
static u64 ticks;
static u32 last;

static void pm_read(void)
{
    u32 now = (u32)bus_read(bench.pio, PM_BASE + ACPI_PM_TMR, 4);

    ticks += (u32)(now - last);
    last = now;
}

static void pm_guest(void)
{
    pm_read();
    for (; rises < wire.rises; rises++) {
        count++;
        in_time((u64)(((u128)count << 31) * SEC / ACPI_PM_TIMER_HZ));
        bus_write(bench.pio, PM_BASE, 1, 2);                       /* TMR_STS */
    }
}

static void acpis_timer(void **state UNUSED)
{
    assert_int_equal(acpi_pm_new(bench.pio, PM_BASE, bench.clock, wire_line(&wire), (struct machine_hook){ 0 }, &pm), 0);
    bus_write(bench.pio, PM_BASE + 2, 1, 2);                       /* TMR_EN */
    ticks = last = 0;
    for (u64 s = 1; s <= DAY / SEC; s++) {
        run_until(s * SEC, 3, pm_guest);
        pm_read();
    }
    assert_int_equal(ticks, (u128)sim.ns * ACPI_PM_TIMER_HZ / SEC);
    assert_int_equal(count, ticks >> 31);
    chip_free(pm);
}

/* ---- the paravirtual clock: what the guest computes from its TSC, by the page it was given at the start ---- */
struct page {                                                      /* Linux, Documentation/virt/kvm/x86/msr.rst */
    u32 version, pad0;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    s8 tsc_shift;
    u8 flags, pad[2];
};

static u64 guest_clock(const struct page *t)
{
    u64 d = clock_tsc(bench.clock) - t->tsc_timestamp;

    d = t->tsc_shift < 0 ? d >> -t->tsc_shift : d << t->tsc_shift;
    return t->system_time + (u64)((u128)d * t->tsc_to_system_mul >> 32);
}

static void the_paravirtual_clock(void **state UNUSED)
{
    static const struct vcpu_hooks hooks;
    static struct machine m;
    static struct ram ram;
    struct page *t;
    struct vcpu *v;
    u64 before = 0;

    assert_int_equal(ram_init(&ram), 0);
    assert_int_equal(ram_add(&ram, 0, MiB), 0);
    assert_int_equal(cpuid_policy_new(1, TSC_KHZ, &m.cpuid), 0);
    m.clock = bench.clock;
    m.ram = &ram;
    m.mmio = bench.mmio;
    m.engine = engine_find("interp");
    m.vcpus = 1;
    m.vcpu = &v;
    assert_int_equal(m.engine->machine_open(&m), 0);
    assert_int_equal(vcpu_new(&m, 0, &hooks, &v), 0);
    assert_int_equal(msr_write(v, &v->x, MSR_KVM_SYSTEM_TIME_NEW, 0x1000 | KVM_MSR_ENABLED), 0);
    t = (struct page *)ram_hva(&ram, 0x1000);
    assert_non_null(t);
    for (u64 s = 0; s <= DAY / SEC; s++) {
        sim.ns = s * SEC;
        u64 ns = guest_clock(t), off = ns > sim.ns ? ns - sim.ns : sim.ns - ns;
        assert_true(ns >= before);
        /* the multiplier has 32 bits, and each second a nanosecond is cut off the TSC: 1 in 2^31, that is 40 us a day */
        assert_true(off <= 2 + (sim.ns >> 31));
        before = ns;
    }
    vcpu_free(v);
    m.engine->machine_close(&m);
    cpuid_policy_free(m.cpuid);
    ram_close(&ram);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(the_i8254), T(the_local_apics_timer), T(the_tsc_deadline), T(the_hpets_periodic_timer), T(the_hpets_counter_of_32_bits), T(the_rtc), T(acpis_timer),
        T(the_paravirtual_clock),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
