/* dev/mc146818: register scripts after Motorola's data sheet. The chip runs on the host's time of day, so tests set it first or compare with it. */
#include <time.h>

#include "dev/chip.h"
#include "dev/mc146818.h"

static struct bench bench;
static struct mc146818 *rtc;
static struct wire irq8;

enum { A = 0x0a, B = 0x0b, C = 0x0c, D = 0x0d };

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    irq8 = (struct wire){ 0 };
    return mc146818_new(bench.pio, bench.clock, wire_line(&irq8), 3 * GiB, 5 * GiB, &rtc);
}

static int teardown(void **state UNUSED)
{
    chip_free(rtc);
    bench_close(&bench);
    return 0;
}

static u8 rd(u8 reg)
{
    out8(&bench, 0x70, reg);
    return in8(&bench, 0x71);
}

static void wr(u8 reg, u8 val)
{
    out8(&bench, 0x70, reg);
    out8(&bench, 0x71, val);
}

/* Lets the host's time go by: timers fire on the loop, the RTC sees it. */
static void live(u64 ns)
{
    timer_arm(&bench.stopper, clock_ns(bench.clock) + ns);
    clock_resume(bench.clock);
    loop_run(bench.loop);
    clock_pause(bench.clock);
}

static u64 set_at;

/* Sets time as operating systems do: SET, divider reset, registers, divider on, SET off. The first update then is half a second away. */
static void set_time(const u8 r[10], u8 century, u8 format)
{
    wr(B, 0x80 | format);
    wr(A, 0x76);
    for (u8 i = 0; i < 10; i++)
        if (i != 1 && i != 3 && i != 5)
            wr(i, r[i]);
    wr(RTC_CENTURY, century);
    wr(B, format);
    wr(A, 0x26);
    set_at = clock_wall_ns();
}

/* Is it still so early after set_time()? Tests of "not yet" ask after they have looked: a busy host may be late. */
static bool early(u64 ns)
{
    return clock_wall_ns() - set_at < ns;
}

static void defaults(void **state UNUSED)
{
    assert_int_equal(rd(A) & 0x7f, 0x26);
    assert_int_equal(rd(B), 0x02);
    assert_int_equal(rd(C), 0);
    assert_int_equal(rd(D), 0x80);
    wr(D, 0);
    assert_int_equal(rd(D), 0x80);
    assert_int_equal(in8(&bench, 0x70), 0xff);
    out8(&bench, 0x70, 0x8d); /* with the NMI mask */
    assert_int_equal(in8(&bench, 0x71), 0x80);
}

/* It shows the host's UTC. */
static void it_shows_the_hosts_time(void **state UNUSED)
{
    struct tm tm = { 0 };
    time_t before = time(NULL), shown;

    wr(B, 0x06); /* binary, 24 hours */
    do {
        tm.tm_sec = rd(0);
        tm.tm_min = rd(2);
        tm.tm_hour = rd(4);
        tm.tm_mday = rd(7);
        tm.tm_mon = rd(8) - 1;
        tm.tm_year = rd(RTC_CENTURY) * 100 + rd(9) - 1900;
    } while (tm.tm_sec != rd(0));
    shown = timegm(&tm);
    assert_in_range(shown, before, time(NULL));
    assert_int_equal(rd(6), tm.tm_wday + 1);
}

static void formats(void **state UNUSED)
{
    static const u8 t[10] = { 0x30, 0, 0x59, 0, 0x23, 0, 0x05, 0x29, 0x02, 0x24 }; /* 2024-02-29 23:59:30 */

    set_time(t, 0x20, 0x02);
    assert_int_equal(rd(4), 0x23);
    assert_int_equal(rd(7), 0x29);
    wr(B, 0x00); /* 12 hours */
    assert_int_equal(rd(4), 0x91);
    wr(B, 0x04); /* binary, 12 hours */
    assert_int_equal(rd(4), 0x80 | 11);
    assert_int_equal(rd(2), 59);
    wr(B, 0x06);
    assert_int_equal(rd(4), 23);
    assert_int_equal(rd(9), 24);
    assert_int_equal(rd(RTC_CENTURY), 20);
    assert_int_equal(rd(6), 5); /* a Thursday */
}

static void noon_and_midnight_in_12_hours(void **state UNUSED)
{
    static const u8 midnight[10] = { 0, 0, 0, 0, 0x12, 0, 1, 1, 1, 0x30 }, noon[10] = { 0, 0, 0, 0, 0x92, 0, 1, 1, 1, 0x30 };

    set_time(midnight, 0x20, 0x00);
    assert_int_equal(rd(4), 0x12);
    wr(B, 0x02);
    assert_int_equal(rd(4), 0x00);
    set_time(noon, 0x20, 0x00);
    assert_int_equal(rd(4), 0x92);
    wr(B, 0x02);
    assert_int_equal(rd(4), 0x12);
}

/* "SET": the time stands still in the registers. "Divider control": the first update comes half a second after the reset. */
static void setting_freezes(void **state UNUSED)
{
    static const u8 t[10] = { 0x58, 0, 0x59, 0, 0x23, 0, 0, 0x31, 0x12, 0x99 };

    wr(B, 0x82);
    for (u8 i = 0; i < 10; i++)
        wr(i, t[i]);
    wr(RTC_CENTURY, 0x20);
    assert_int_equal(rd(A) & 0x80, 0);
    live(20 * MS);
    for (u8 i = 0; i < 10; i++)
        assert_int_equal(rd(i), t[i]);
    set_time(t, 0x20, 0x02);
    assert_int_equal(rd(0), 0x58);
    live(600 * MS);
    assert_true(rd(0) == 0x59 || !early(1500 * MS));
    live(1000 * MS); /* a year and a century go by */
    assert_int_equal(rd(0), 0x00);
    assert_int_equal(rd(4), 0x00);
    assert_int_equal(rd(7), 0x01);
    assert_int_equal(rd(8), 0x01);
    assert_int_equal(rd(9), 0x00);
    assert_int_equal(rd(RTC_CENTURY), 0x21);
}

/* "Update cycle": UIP is up for 2.2 ms before the seconds change, and not while SET is on. */
static void uip_announces_updates(void **state UNUSED)
{
    static const u8 t[10] = { 0x10, 0, 0, 0, 0, 0, 1, 1, 1, 0x20 };
    bool seen = false;
    u8 second;

    for (int tries = 0; tries < 5 && !seen; tries++) { /* the host may sleep through it */
        set_time(t, 0x20, 0x02);
        if (rd(A) & 0x80)
            assert_false(early(490 * MS));
        while (early(600 * MS) && !seen) {
            seen = rd(A) & 0x80;
            second = rd(0);
            if (seen && early(499 * MS)) {
                assert_false(early(490 * MS));
                assert_int_equal(second, 0x10);
            }
        }
    }
    assert_true(seen);
    live(10 * MS);
    assert_int_equal(rd(A) & 0x80, 0);
    assert_int_equal(rd(0), 0x11);
    wr(B, 0x82);
    for (int i = 0; i < 11; i++) {
        assert_int_equal(rd(A) & 0x80, 0);
        live(100 * MS);
    }
}

/* Register C: flags come up whether they interrupt or not, and a read clears all of them. */
static void flags_without_interrupts(void **state UNUSED)
{
    rd(C);
    live(1050 * MS);
    assert_int_equal(rd(C), 0x70 & 0x50); /* PF and UF; no alarm matches (00:00:00 is what the alarm registers hold), but at midnight */
    assert_int_equal(rd(C) & 0x10, 0);
    assert_int_equal(irq8.rises, 0);
}

static void update_interrupt(void **state UNUSED)
{
    static const u8 t[10] = { 0x10, 0, 0, 0, 0x01, 0, 1, 1, 1, 0x20 };

    set_time(t, 0x20, 0x02);
    rd(C);
    wr(B, 0x12);
    live(300 * MS);
    assert_true(irq8.level == 0 || !early(500 * MS));
    live(250 * MS);
    assert_int_equal(irq8.level, 1);
    assert_int_equal(rd(C) & 0x90, 0x90);
    assert_int_equal(irq8.level, 0);
    live(1000 * MS);
    assert_int_equal(irq8.rises, 2);
    live(1000 * MS); /* nobody reads register C: it stays up, and nothing more comes */
    assert_int_equal(irq8.rises, 2);
    wr(B, 0x92); /* SET clears UIE */
    assert_int_equal(rd(B), 0x82);
    assert_int_equal(irq8.level, 0);
}

/* "Rate selection": rate 6 is 1024 Hz, 1 and 2 are 256 and 128 Hz, 15 is 2 Hz. */
static void periodic_interrupt(void **state UNUSED)
{
    static const struct { u8 rate; unsigned hz; } r[] = { { 0x6, 1024 }, { 0x1, 256 }, { 0x2, 128 }, { 0x8, 256 }, { 0xc, 16 } };

    for (size_t i = 0; i < ARRAY_SIZE(r); i++) {
        unsigned n = 0;
        u64 start;

        wr(A, 0x20 | r[i].rate);
        wr(B, 0x42);
        rd(C);
        start = clock_wall_ns();
        while (clock_wall_ns() - start < 500 * MS) {
            live(100 * US);
            n += irq8.level && (rd(C) & 0xc0) == 0xc0;
        }
        assert_in_range(n, r[i].hz / 4, r[i].hz / 2 + 1); /* half of them may be missed on a busy host, none may be invented */
        wr(B, 0x02);
    }
    wr(A, 0x20); /* rate 0: none */
    wr(B, 0x42);
    rd(C);
    live(50 * MS);
    assert_int_equal(rd(C) & 0x40, 0);
}

static void alarms(void **state UNUSED)
{
    static const u8 t[10] = { 0x10, 0, 0x20, 0, 0x05, 0, 1, 1, 1, 0x20 };

    set_time(t, 0x20, 0x02);
    wr(1, 0x11);
    wr(3, 0x20);
    wr(5, 0x05);
    rd(C);
    wr(B, 0x22);
    live(300 * MS);
    assert_true(irq8.level == 0 || !early(500 * MS));
    live(250 * MS);
    assert_int_equal(irq8.level, 1);
    assert_int_equal(rd(C) & 0xa0, 0xa0);
    live(1000 * MS);
    assert_int_equal(irq8.level, 0);
    wr(1, 0xc0); /* "don't care": every second of 05:20 */
    wr(3, 0xff);
    live(1000 * MS);
    assert_int_equal(irq8.level, 1);
    rd(C);
    wr(1, 0x61); /* no such second */
    live(1100 * MS);
    assert_int_equal(irq8.level, 0);
}

/* An alarm hours away, or never, costs nothing: looking for it must not take long either. */
static void far_alarms_are_found_fast(void **state UNUSED)
{
    u64 start = clock_ns(bench.clock);

    wr(5, 0x99);
    wr(B, 0x22);
    for (int i = 0; i < 10000; i++)
        wr(1, (u8)i);
    clock_resume(bench.clock);
    clock_pause(bench.clock);
    assert_true(clock_ns(bench.clock) - start < 2 * SEC);
}

/* Any rubbish is a time. */
static void wrong_times_do_no_harm(void **state UNUSED)
{
    for (unsigned v = 0; v < 256; v++) {
        u8 t[10];

        memset(t, (int)v, sizeof(t));
        set_time(t, (u8)v, v & 6);
        for (u8 i = 0; i < 10; i++)
            rd(i);
        wr(4, (u8)v); /* without SET */
        assert_true(rd(RTC_CENTURY) != 0);
    }
}

static u16 word(u8 reg)
{
    u8 low = rd(reg);

    return (u16)(low | rd((u8)(reg + 1)) << 8);
}

static void memory_sizes(void **state UNUSED)
{
    unsigned sum = 0;

    assert_int_equal(word(0x15), 640);
    assert_int_equal(word(0x17), 0xffff);
    assert_int_equal(word(0x34), (3 * GiB - 16 * MiB) / (64 * KiB));
    assert_int_equal(word(0x5b) | rd(0x5d) << 16, 5 * GiB / (64 * KiB));
    for (u8 i = 0x10; i <= 0x2d; i++)
        sum += rd(i);
    assert_int_equal(rd(0x2e) << 8 | rd(0x2f), sum & 0xffff);
}

static void ram_is_kept_over_a_reset(void **state UNUSED)
{
    static const u8 t[10] = { 0x10, 0, 0x20, 0, 0x05, 0, 1, 1, 1, 0x33 };

    set_time(t, 0x20, 0x02);
    wr(0x0f, 0x0a);
    wr(0x7f, 0x55);
    wr(B, 0x72);
    chip_reset(rtc);
    assert_int_equal(rd(B), 0x02);
    assert_int_equal(rd(0x0f), 0x0a);
    assert_int_equal(rd(0x7f), 0x55);
    assert_int_equal(rd(9), 0x33);
}

static void its_state_can_be_moved(void **state UNUSED)
{
    static const u8 t[10] = { 0x10, 0, 0x20, 0, 0x05, 0, 1, 1, 1, 0x33 };
    struct bench other;
    struct mc146818 *copy;
    struct wire w = { 0 };

    set_time(t, 0x20, 0x02);
    rd(C);
    wr(B, 0x12);
    bench_open(&other);
    assert_int_equal(mc146818_new(other.pio, other.clock, wire_line(&w), GiB, 0, &copy), 0);
    chip_transplant(rtc, copy);
    chip_free(rtc);
    bench_close(&bench);
    bench = other;
    timer_init(&bench.stopper, bench.clock, bench_stop, bench.loop);
    rtc = copy;
    assert_int_equal(rd(9), 0x33);
    live(600 * MS);
    assert_int_equal(w.level, 1);
    assert_int_equal(rd(0), 0x11);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(defaults), T(it_shows_the_hosts_time), T(formats), T(noon_and_midnight_in_12_hours), T(setting_freezes), T(uip_announces_updates),
        T(flags_without_interrupts), T(update_interrupt), T(periodic_interrupt), T(alarms), T(far_alarms_are_found_fast), T(wrong_times_do_no_harm),
        T(memory_sizes), T(ram_is_kept_over_a_reset), T(its_state_can_be_moved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
