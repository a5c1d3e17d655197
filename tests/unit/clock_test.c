/* base/clock: time goes on, stands still while paused, agrees with the TSC; timers fire in order, once, not early, and can be taken back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "base/clock.h"

#define MS 1000000ull

static struct loop *loop;
static struct clock *clk;
static char order[64];

static int setup(void **state UNUSED)
{
    order[0] = 0;
    return loop_new(&loop) || clock_new(loop, &clk);
}

static int teardown(void **state UNUSED)
{
    clock_free(clk);
    loop_free(loop);
    return 0;
}

static void nap(u64 ns)
{
    struct timespec ts = { (time_t)(ns / 1000000000), (long)(ns % 1000000000) };

    nanosleep(&ts, NULL);
}

static void time_begins_near_zero_and_goes_on(void **state UNUSED)
{
    u64 a = clock_ns(clk), b;

    assert_true(a < 1000 * MS);
    nap(2 * MS);
    b = clock_ns(clk);
    assert_true(b - a >= 2 * MS && b - a < 1000 * MS);
}

static void a_pause_stops_both_clocks(void **state UNUSED)
{
    u64 ns, tsc;

    clock_pause(clk);
    ns = clock_ns(clk);
    tsc = clock_tsc(clk);
    nap(30 * MS);
    assert_int_equal(clock_ns(clk), ns);
    assert_int_equal(clock_tsc(clk), tsc);
    clock_resume(clk);
    assert_true(clock_ns(clk) >= ns && clock_ns(clk) < ns + 20 * MS); /* the 30 ms are hidden */
    assert_true(clock_tsc(clk) >= tsc && clock_tsc(clk) < tsc + 20 * clock_tsc_khz(clk));
}

/* The frequency, however it was found, fits what the clock itself does, to 200 ppm even on a busy host. */
static void the_tsc_runs_at_tsc_khz(void **state UNUSED)
{
    s64 best = INT64_MAX;

    for (int i = 0; i < 5; i++) { /* a reading may be torn apart by the scheduler: the best of some counts */
        u64 ns = clock_ns(clk), tsc = clock_tsc(clk), dns, dtsc;
        s64 off;

        nap(20 * MS);
        dns = clock_ns(clk) - ns;
        dtsc = clock_tsc(clk) - tsc;
        off = (s64)(dtsc * 1000000 / clock_tsc_khz(clk)) - (s64)dns;
        off = off < 0 ? -off : off;
        best = MIN(best, off * 1000000 / (s64)dns);
    }
    assert_true(best < 200);
}

static void conversions_are_inverse_and_saturate(void **state UNUSED)
{
    u64 ns, khz = clock_tsc_khz(clk), tsc;

    clock_pause(clk);
    ns = clock_ns(clk);
    tsc = clock_tsc(clk);
    assert_int_equal(clock_tsc_to_ns(clk, tsc), ns);
    assert_int_equal(clock_tsc_to_ns(clk, tsc + khz * 1000), ns + 1000 * MS);
    assert_int_equal(clock_ns_to_tsc(clk, ns + 1000 * MS), tsc + khz * 1000);
    assert_true(clock_tsc_to_ns(clk, 0) < 1000); /* both begin at 0, but for the time between two readings */
    assert_true(clock_ns_to_tsc(clk, 0) < 100000);
    if (khz < 1000000)
        assert_int_equal(clock_tsc_to_ns(clk, UINT64_MAX), UINT64_MAX);
    else
        assert_int_equal(clock_ns_to_tsc(clk, UINT64_MAX), UINT64_MAX);
}

/* ---- timers ---- */

struct noted {
    struct timer timer;
    const char *name;
    u64 fired_ns;
};

static void note(void *arg)
{
    struct noted *n = arg;

    n->fired_ns = clock_ns(clk);
    strcat(order, n->name);
}

static void note_and_stop(void *arg)
{
    note(arg);
    loop_stop(loop);
}

static void timers_fire_in_order_and_not_early(void **state UNUSED)
{
    struct noted n[5] = { { .name = "a" }, { .name = "b" }, { .name = "c" }, { .name = "d" }, { .name = "e" } };
    static const int delay_ms[5] = { 4, 1, 8, 0, 6 };
    u64 now = clock_ns(clk);

    for (int i = 0; i < 5; i++) {
        timer_init(&n[i].timer, clk, i == 2 ? note_and_stop : note, &n[i]);
        timer_arm(&n[i].timer, now + (u64)delay_ms[i] * MS);
    }
    loop_run(loop);
    assert_string_equal(order, "dbaec");
    for (int i = 0; i < 5; i++)
        assert_true(n[i].fired_ns >= now + (u64)delay_ms[i] * MS);
}

static void a_disarmed_timer_does_not_fire(void **state UNUSED)
{
    struct noted a = { .name = "a" }, b = { .name = "b" };

    timer_init(&a.timer, clk, note, &a);
    timer_init(&b.timer, clk, note_and_stop, &b);
    timer_arm(&a.timer, clock_ns(clk) + MS);
    timer_arm(&b.timer, clock_ns(clk) + 3 * MS);
    timer_disarm(&a.timer);
    timer_disarm(&a.timer);
    loop_run(loop);
    assert_string_equal(order, "b");
}

static void arming_again_moves_it(void **state UNUSED)
{
    struct noted a = { .name = "a" }, b = { .name = "b" }, c = { .name = "c" };

    timer_init(&a.timer, clk, note, &a);
    timer_init(&b.timer, clk, note, &b);
    timer_init(&c.timer, clk, note_and_stop, &c);
    timer_arm(&a.timer, clock_ns(clk) + MS);        /* later, past the others */
    timer_arm(&b.timer, clock_ns(clk) + 5000 * MS); /* earlier */
    timer_arm(&c.timer, clock_ns(clk) + 9 * MS);
    timer_arm(&a.timer, clock_ns(clk) + 6 * MS);
    timer_arm(&b.timer, clock_ns(clk) + 3 * MS);
    loop_run(loop);
    assert_string_equal(order, "bac");
}

/* Heap order against a plain sort: many timers, armed, moved and removed at random. */
static unsigned fired;
static u64 last_deadline;
static bool sorted;

static void check_order(void *arg)
{
    struct timer *t = arg;

    sorted = sorted && t->deadline_ns >= last_deadline;
    last_deadline = t->deadline_ns;
    fired++;
}

static void stop(void *arg UNUSED)
{
    loop_stop(loop);
}

static void many_timers_stay_sorted(void **state UNUSED)
{
    static struct timer t[500];
    struct timer end;
    unsigned left = 500, seed = 1;
    u64 at;

    fired = 0;
    last_deadline = 0;
    sorted = true;
    clock_pause(clk); /* nothing fires while they are shuffled */
    at = clock_ns(clk);
    for (int i = 0; i < 500; i++) {
        timer_init(&t[i], clk, check_order, &t[i]);
        timer_arm(&t[i], at + (seed = seed * 1103515245 + 12345) % (5 * MS));
    }
    for (int i = 0; i < 500; i += 3)
        timer_arm(&t[i], at + (seed = seed * 1103515245 + 12345) % (5 * MS));
    for (int i = 0; i < 500; i += 7, left--)
        timer_disarm(&t[i]);
    timer_init(&end, clk, stop, NULL);
    timer_arm(&end, at + 6 * MS);
    clock_resume(clk);
    loop_run(loop);
    assert_int_equal(fired, left);
    assert_true(sorted);
}

static void paused_timers_wait(void **state UNUSED)
{
    struct noted a = { .name = "a" };
    u64 at = clock_ns(clk) + MS;

    timer_init(&a.timer, clk, note_and_stop, &a);
    clock_pause(clk);
    timer_arm(&a.timer, at);
    loop_post(loop, stop, NULL);
    nap(3 * MS);
    loop_run(loop);
    assert_string_equal(order, "");
    clock_resume(clk);
    loop_run(loop);
    assert_string_equal(order, "a");
}

static unsigned again_left;

static void fire_again_in_the_past(void *arg)
{
    again_left--;
    timer_arm(arg, 0);
}

/* A timer that is always due does not shut out the loop's other work. */
static void an_eager_timer_starves_nobody(void **state UNUSED)
{
    struct timer t;

    again_left = 1000000;
    timer_init(&t, clk, fire_again_in_the_past, &t);
    timer_arm(&t, 0);
    loop_post(loop, stop, NULL);
    loop_run(loop);
    assert_true(again_left > 900000);
    timer_disarm(&t);
}

static void never_is_never(void **state UNUSED)
{
    struct noted a = { .name = "a" }, b = { .name = "b" };

    timer_init(&a.timer, clk, note, &a);
    timer_init(&b.timer, clk, note_and_stop, &b);
    timer_arm(&a.timer, UINT64_MAX);
    timer_arm(&b.timer, clock_ns(clk) + MS);
    loop_run(loop);
    assert_string_equal(order, "b");
    timer_arm(&a.timer, UINT64_MAX - 1); /* past what the host can be told */
    timer_disarm(&a.timer);
}

static void its_time_is_saved_and_loaded(void **state UNUSED)
{
    struct stream s, l;
    struct clock *other;

    clock_pause(clk);
    stream_save_init(&s);
    clock_state(clk, &s);
    assert_int_equal(s.error, 0);
    assert_int_equal(clock_new(loop, &other), 0);
    clock_pause(other);
    stream_load_init(&l, s.buf, s.len);
    clock_state(other, &l);
    assert_int_equal(l.error, 0);
    assert_int_equal(clock_ns(other), clock_ns(clk));
    assert_int_equal(clock_tsc(other), clock_tsc(clk));
    clock_resume(other);
    assert_true(clock_ns(other) >= clock_ns(clk));
    clock_free(other);
    stream_free(&s);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(time_begins_near_zero_and_goes_on), T(a_pause_stops_both_clocks), T(the_tsc_runs_at_tsc_khz), T(conversions_are_inverse_and_saturate),
        T(timers_fire_in_order_and_not_early), T(a_disarmed_timer_does_not_fire), T(arming_again_moves_it), T(many_timers_stay_sorted),
        T(paused_timers_wait), T(an_eager_timer_starves_nobody), T(never_is_never), T(its_time_is_saved_and_loaded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
