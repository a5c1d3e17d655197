/* Looking before sleeping: who looks, and who has learnt not to. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <time.h>

#include <cmocka.h>

#include "base/spin.h"

static bool when_zero(void *arg)
{
    unsigned *left = arg;

    return *left ? (--*left, false) : true;
}

static bool never(void *arg)
{
    (void)arg;
    return false;
}

static void waits(struct spin *s, unsigned n, u64 ns)
{
    while (n--)
        spin_slept(s, ns);
}

static void test_long_waits_never_look(void **state)
{
    struct spin s = { 0 };

    (void)state;
    assert_false(spin_pays(&s));
    waits(&s, 100, SPIN_NS);
    assert_false(spin_pays(&s));
    for (unsigned i = 0; i < 100; i++) {                           /* every other one is short: it is no better than chance */
        waits(&s, 1, SPIN_NS / 2);
        waits(&s, 1, SPIN_NS);
    }
    assert_false(spin_pays(&s));
}

static void test_short_waits_look(void **state)
{
    struct spin s = { 0 };
    unsigned left = 10;                                            /* found before it offers its processor: a busy host may take that */

    (void)state;
    waits(&s, 100, SPIN_NS - 1);
    assert_true(spin_pays(&s));
    assert_true(spin_look(&s, when_zero, &left));
    assert_int_equal(left, 0);
    assert_true(spin_pays(&s));
    waits(&s, 100, SPIN_NS);
    assert_false(spin_pays(&s));
}

/* On a busy host what is waited for may need the processor that looks: waits are short once it sleeps, and looking is in vain. */
static void test_looking_in_vain(void **state)
{
    struct spin s = { 0 };
    unsigned looked = 0;

    (void)state;
    waits(&s, 100, SPIN_NS / 2);
    for (unsigned i = 0; i < 400; i++) {
        if (spin_pays(&s)) {
            looked++;
            assert_false(spin_look(&s, never, NULL));
        }
        spin_slept(&s, SPIN_NS / 2);
    }
    assert_in_range(looked, 1, 400 / 8 + 5);
}

static bool others_run(void *arg)
{
    (void)arg;
    nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
    return false;
}

/* Who loses the processor does not look for a while, whatever its waits are; then it does again. */
static void test_lost_processor(void **state)
{
    struct spin s = { 0 };
    u64 since = spin_clock();

    (void)state;
    waits(&s, 100, SPIN_NS / 2);
    assert_true(spin_pays(&s));
    assert_false(spin_look(&s, others_run, NULL));
    waits(&s, 100, SPIN_NS / 2);
    while (!spin_pays(&s))
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    assert_true(spin_clock() - since > 64 * 2000000u);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_long_waits_never_look), cmocka_unit_test(test_short_waits_look), cmocka_unit_test(test_looking_in_vain),
        cmocka_unit_test(test_lost_processor),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
