/* dev/i8254: register scripts after the data sheet (Intel 231164); names in quotes are its sections. Counter 2 shows its OUT and has a gate (port 0x61). */
#include "dev/chip.h"
#include "dev/i8254.h"

static struct bench bench;
static struct i8254 *pit;
static struct wire irq0;
static s64 tick0;

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    irq0 = (struct wire){ 0 };
    tick0 = 1000000;
    if (i8254_new(bench.pio, bench.clock, wire_line(&irq0), &pit))
        return -1;
    return 0;
}

static int teardown(void **state UNUSED)
{
    chip_free(pit);
    bench_close(&bench);
    return 0;
}

/* Goes to tick n after tick0, without letting timers fire. */
static void at(s64 n)
{
    bench_at(&bench, (u64)(((u128)(u64)(tick0 + n) * SEC + I8254_HZ - 1) / I8254_HZ));
}

static void control(u8 val)
{
    out8(&bench, 0x43, val);
}

static void count(int counter, u16 n)
{
    out8(&bench, (u16)(0x40 + counter), (u8)n);
    out8(&bench, (u16)(0x40 + counter), (u8)(n >> 8));
}

static u16 read_bytes(int counter)
{
    u8 low = in8(&bench, (u16)(0x40 + counter));

    return (u16)(low | in8(&bench, (u16)(0x40 + counter)) << 8);
}

static u16 read_count(int counter)
{
    control((u8)(counter << 6)); /* latch */
    return read_bytes(counter);
}

static void gate(bool on)
{
    out8(&bench, 0x61, on);
}

static int out2(void)
{
    return in8(&bench, 0x61) >> 5 & 1;
}

/* What OUT2 does from tick `from` on, as a string of levels. */
static void assert_wave(s64 from, const char *wave)
{
    for (s64 i = 0; wave[i]; i++) {
        at(from + i);
        if (out2() != wave[i] - '0')
            fail_msg("OUT is %d at tick %d of %s", out2(), (int)i, wave);
    }
}

/* "Mode 0: interrupt on terminal count": low from the control word on, high N + 1 clocks after the count. */
static void mode_0(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb0);
    assert_int_equal(out2(), 0);
    count(2, 4);
    assert_wave(0, "000001111");
    at(3);
    assert_int_equal(read_count(2), 2);
    at(6);
    assert_int_equal(read_count(2), 65535); /* goes on counting */
    at(10);
    out8(&bench, 0x42, 3); /* the first byte stops it, OUT falls */
    assert_int_equal(out2(), 0);
    at(20);
    assert_int_equal(out2(), 0);
    out8(&bench, 0x42, 0);
    assert_wave(20, "00001");
}

static void mode_0_gate(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb0);
    count(2, 10);
    at(5);
    gate(false);
    at(1000);
    assert_int_equal(read_count(2), 6);
    assert_int_equal(out2(), 0);
    gate(true);
    assert_wave(1000, "0000001");
}

/* "Mode 1: hardware retriggerable one-shot" */
static void mode_1(void **state UNUSED)
{
    at(0);
    gate(false);
    control(0xb2);
    count(2, 3);
    assert_wave(0, "1111");
    at(10);
    gate(true);
    assert_wave(10, "10001");
    at(20);
    gate(false);
    gate(true);
    at(22);
    gate(false);
    gate(true); /* retriggered: three clocks from here */
    assert_wave(23, "0001");
    at(40);
    count(2, 5); /* counts at the next trigger only */
    assert_int_equal(out2(), 1);
    gate(false);
    gate(true);
    assert_wave(41, "000001");
}

/* "Mode 2: rate generator": low for one clock in N. */
static void mode_2(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb4);
    assert_int_equal(out2(), 1);
    count(2, 3);
    assert_wave(1, "110110110");
    at(1);
    assert_int_equal(read_count(2), 3);
    at(3);
    assert_int_equal(read_count(2), 1);
    at(4);
    assert_int_equal(read_count(2), 3);
    at(8); /* in the middle of a period: the new count takes over at its end */
    count(2, 4);
    assert_wave(8, "1011101110");
    at(20);
    gate(false); /* OUT is high at once, and counting begins anew with the gate */
    assert_wave(20, "111111");
    at(30);
    gate(true);
    assert_wave(31, "11101110");
}

/* "Mode 3: square wave mode": high for (N+1)/2, low for N/2, counting by two. */
static void mode_3(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb6);
    count(2, 4);
    assert_wave(1, "11001100");
    at(1);
    assert_int_equal(read_count(2), 4);
    at(2);
    assert_int_equal(read_count(2), 2);
    at(3);
    assert_int_equal(read_count(2), 4);
    at(9); /* first clock of a high half: the new count takes over when that half ends */
    count(2, 5);
    assert_wave(9, "1100111001110011100");
    at(100);
    control(0xb6);
    count(2, 5);
    assert_wave(101, "1110011100");
}

/* "Mode 4: software triggered strobe": one clock low, N + 1 clocks after the count. */
static void mode_4(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb8);
    count(2, 3);
    assert_wave(0, "1111011111");
    at(20);
    count(2, 2);
    assert_wave(20, "1110111");
}

/* "Mode 5: hardware triggered strobe" */
static void mode_5(void **state UNUSED)
{
    at(0);
    gate(false);
    control(0xba);
    count(2, 3);
    assert_wave(0, "111111");
    at(10);
    gate(true);
    assert_wave(10, "111101111");
}

static void modes_6_and_7_are_2_and_3(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xbc);
    count(2, 3);
    assert_wave(1, "110110");
    at(50);
    control(0xbe);
    count(2, 4);
    assert_wave(51, "11001100");
}

static void bcd_counts(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb1);
    count(2, 0x1000);
    at(2);
    assert_int_equal(read_count(2), 0x0999);
    at(1000 + 2);
    assert_int_equal(read_count(2), 0x9999);
    control(0xb5);
    count(2, 0); /* 0 is 10000 */
    at(1003 + 1);
    assert_int_equal(read_count(2), 0x9999);
}

static void zero_is_65536(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb0);
    count(2, 0);
    at(1);
    assert_int_equal(read_count(2), 0);
    at(65536);
    assert_int_equal(out2(), 0);
    at(65537);
    assert_int_equal(out2(), 1);
}

/* "Write operations": one byte only, the other half is zero. */
static void single_byte_access(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0x90);
    out8(&bench, 0x42, 0x20);
    at(1);
    assert_int_equal(in8(&bench, 0x42), 0x20);
    assert_int_equal(in8(&bench, 0x42), 0x20);
    control(0xa0);
    out8(&bench, 0x42, 0x20);
    at(3);
    assert_int_equal(in8(&bench, 0x42), 0x1f);
}

/* "Counter latch command": the value stands still until it is read; a second latch changes nothing. */
static void latched_counts_stand_still(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb0);
    count(2, 1000);
    at(11);
    control(0x80);
    at(50);
    control(0x80);
    at(100);
    assert_int_equal(read_bytes(2), 990);
    assert_int_equal(read_bytes(2), 901); /* live again */
}

/* "Read-back command" */
static void read_back(void **state UNUSED)
{
    at(0);
    gate(true);
    control(0xb4);
    control(0xe8); /* status of counter 2 */
    assert_int_equal(in8(&bench, 0x42), 0xf4); /* OUT high, null count, both bytes, mode 2 */
    count(2, 100);
    at(11);
    control(0xc8); /* status and count */
    at(20);
    assert_int_equal(in8(&bench, 0x42), 0xb4);
    assert_int_equal(read_bytes(2), 90);
    count(2, 50);
    control(0xe8);
    assert_int_equal(in8(&bench, 0x42), 0xf4); /* the new count is not in force yet */
    at(101);
    control(0xe8);
    assert_int_equal(in8(&bench, 0x42), 0xb4);
    control(0xd8); /* count only */
    assert_int_equal(read_bytes(2), 50);
}

/* Port 0x61: bits 3..0 are kept, bit 4 toggles with the refresh, 6 and 7 are 0. */
static void port_61(void **state UNUSED)
{
    unsigned changes = 0;
    u8 last;

    at(0);
    out8(&bench, 0x61, 0xff);
    assert_int_equal(in8(&bench, 0x61) & 0xcf, 0x0f);
    last = in8(&bench, 0x61) & 0x10;
    for (int i = 1; i <= 1000; i++) {
        at(i);
        changes += last != (in8(&bench, 0x61) & 0x10);
        last = in8(&bench, 0x61) & 0x10;
    }
    assert_in_range(changes, 54, 57); /* every 18 ticks */
}

/* ---- counter 0's interrupt ---- */

static void periodic_interrupts(void **state UNUSED)
{
    for (int mode = 2; mode <= 3; mode++) {
        unsigned before;

        at(0);
        control((u8)(0x30 | mode << 1));
        count(0, 11932); /* 10 ms */
        before = irq0.rises;
        bench_steps(&bench, 20, 5 * MS);
        assert_in_range(irq0.rises - before, 9, 11);
        assert_int_equal(irq0.level, 1);
        tick0 += 1000000;
    }
}

static void one_interrupt_in_modes_0_and_4(void **state UNUSED)
{
    at(0);
    control(0x30);
    assert_int_equal(irq0.level, 0);
    count(0, 11932);
    bench_run(&bench, 9 * MS);
    assert_int_equal(irq0.rises, 0);
    bench_run(&bench, 2 * MS);
    assert_int_equal(irq0.rises, 1);
    bench_steps(&bench, 5, 100 * MS);
    assert_int_equal(irq0.rises, 1);
    control(0x38);
    assert_int_equal(irq0.rises, 1); /* OUT was high and stays so */
    count(0, 11932);
    bench_run(&bench, 11 * MS);
    assert_int_equal(irq0.rises, 2);
}

/* A guest stops the timer by a mode that waits for ever. */
static void a_new_mode_stops_the_interrupts(void **state UNUSED)
{
    unsigned before;

    at(0);
    control(0x34);
    count(0, 11932);
    bench_steps(&bench, 2, 11 * MS);
    control(0x30);
    before = irq0.rises;
    bench_steps(&bench, 4, 11 * MS);
    assert_int_equal(irq0.rises, before);
}

static void late_edges_coalesce_and_keep_their_grid(void **state UNUSED)
{
    unsigned before;

    at(0);
    control(0x34);
    count(0, 11932);
    before = irq0.rises;
    at(11932 * 50 + 6000); /* fifty are due */
    bench_run(&bench, 0);
    assert_int_equal(irq0.rises, before + 1);
    at(11932 * 51 - 2000);
    bench_run(&bench, 0);
    assert_int_equal(irq0.rises, before + 1);
    at(11932 * 51 + 2);
    bench_run(&bench, 0);
    assert_int_equal(irq0.rises, before + 2);
}

static void tiny_counts_do_not_flood(void **state UNUSED)
{
    u64 start = clock_ns(bench.clock);

    control(0x34);
    count(0, 2);
    for (int i = 0; i < 50; i++)
        bench_run(&bench, 0);
    assert_true(irq0.rises <= (clock_ns(bench.clock) - start) / 50000 + 2);
}

static void its_state_can_be_moved(void **state UNUSED)
{
    struct bench other;
    struct i8254 *copy;
    struct wire w = { 0 };

    at(0);
    gate(true);
    control(0xb6);
    count(2, 1000);
    control(0x34);
    count(0, 11932);
    at(100);
    count(2, 500); /* pending */
    bench_open(&other);
    bench_at(&other, clock_ns(bench.clock));
    assert_int_equal(i8254_new(other.pio, other.clock, wire_line(&w), &copy), 0);
    chip_transplant(pit, copy);
    out8(&other, 0x43, 0x80);
    at(100);
    control(0x80);
    assert_int_equal(in8(&other, 0x42), in8(&bench, 0x42));
    assert_int_equal(in8(&other, 0x42), in8(&bench, 0x42));
    bench_run(&other, 11 * MS);
    assert_int_equal(w.rises, 1);
    chip_free(copy);
    bench_close(&other);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(mode_0), T(mode_0_gate), T(mode_1), T(mode_2), T(mode_3), T(mode_4), T(mode_5), T(modes_6_and_7_are_2_and_3), T(bcd_counts), T(zero_is_65536),
        T(single_byte_access), T(latched_counts_stand_still), T(read_back), T(port_61), T(periodic_interrupts), T(one_interrupt_in_modes_0_and_4),
        T(a_new_mode_stops_the_interrupts), T(late_edges_coalesce_and_keep_their_grid), T(tiny_counts_do_not_flood), T(its_state_can_be_moved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
