/* The choice of --engine auto, with measurements of our own in the place of the real one; and that the real one ends in
   time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "ctl/engine_choice.h"

static void fast(struct probe *p)
{
    *p = (struct probe){ .verdict = PROBE_REAL, .times = 2 };
}

static void slow(struct probe *p)
{
    *p = (struct probe){ .verdict = PROBE_EMULATED, .times = 1234 };
}

static void stuck(struct probe *p)
{
    *p = (struct probe){ .verdict = PROBE_STUCK };
}

static void broken(struct probe *p)
{
    *p = (struct probe){ .verdict = PROBE_UNUSABLE, .error = "vCPU: No space left on device" };
}

static void forbidden(struct probe *p)
{
    *p = (struct probe){ .verdict = PROBE_FORBIDDEN };
}

static void absent(struct probe *p)
{
    *p = (struct probe){ .verdict = PROBE_ABSENT };
}

static void chooses(void **state)
{
    static const struct {
        void (*probe)(struct probe *);
        const struct engine *engine;
        const char *word;
    } row[] = {
        { fast, &kvm_engine, "real" }, { slow, &bt_engine, "1234 times slower" }, { stuck, &bt_engine,
        "does not end" },
        { broken, &bt_engine, "No space left" }, { forbidden, &bt_engine, "permission" }, { absent,
        &bt_engine, "no /dev/kvm" },
    };
    char reason[128];

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(row); i++) {
        assert_ptr_equal(engine_choose_by(row[i].probe, reason, sizeof(reason)), row[i].engine);
        assert_non_null(strstr(reason, row[i].word));
    }
}

/* Whatever this host has: an answer, in bounded time, that agrees with the limit. */
static void measures_in_time(void **state)
{
    struct timespec a, b;
    struct probe p;

    (void)state;
    clock_gettime(CLOCK_MONOTONIC, &a);
    kvm_probe(&p);
    clock_gettime(CLOCK_MONOTONIC, &b);
    assert_true(b.tv_sec - a.tv_sec < 5);                          /* 0.3 s; this machine may be busy */
    if (p.verdict == PROBE_REAL)
        assert_in_range(p.times, 1, PROBE_TIMES_MAX);
    if (p.verdict == PROBE_EMULATED)
        assert_true(p.times > PROBE_TIMES_MAX);
    if (p.verdict == PROBE_UNUSABLE)
        assert_true(p.error[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(chooses), cmocka_unit_test(measures_in_time) };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
