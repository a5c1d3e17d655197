/* cpu/stats, cpu/sample: the two forms of output, counters by group, and that a sampler sees where a vCPU is. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "cpu/engine.h"
#include "cpu/sample.h"
#include "cpu/stats.h"
#include "cpu/vcpu.h"

static char text[16384];

static FILE *begin(void)
{
    memset(text, 0, sizeof text);
    return fmemopen(text, sizeof text, "w");
}

static void extra(const struct vcpu *v UNUSED, struct stats *s)
{
    stats_group(s, "cache");
    stats_u64(s, "bytes", 7);
    stats_real(s, "full", 12.34, "%");
    stats_group_end(s);
}

static const struct engine engine = {.name = "test", .counts_insns = true, .stats = extra};

static struct vcpu *vcpu_make(struct machine *m, unsigned id)
{
    struct vcpu *v = aligned_alloc(64, ALIGN_UP(sizeof *v, 64));
    memset(v, 0, sizeof *v);
    v->m = m;
    v->id = id;
    v->insns = 100 + id;
    return v;
}

static void groups_as_text(void **state UNUSED)
{
    struct stats s;
    FILE *f = begin();
    stats_open(&s, f, false);
    stats_group(&s, "one");
    stats_u64(&s, "a", 1);
    stats_u64(&s, "zero", 0);
    stats_u64(&s, "b", 22);
    stats_group_end(&s);
    stats_group(&s, "two");
    stats_real(&s, "part", 33.33, "%");
    stats_group_end(&s);
    stats_group(&s, "none");
    stats_group_end(&s);
    stats_close(&s);
    fclose(f);
    assert_string_equal(text, "  one        a 1, b 22\n  two        part 33.3 %\n  none       -\n");
}

static void long_groups_are_broken(void **state UNUSED)
{
    struct stats s;
    char name[32];
    FILE *f = begin();
    stats_open(&s, f, false);
    stats_group(&s, "many");
    for (unsigned i = 0; i < 100; i++) {
        snprintf(name, sizeof name, "counter-%u", i);
        stats_u64(&s, name, 123456789);
    }
    stats_group_end(&s);
    fclose(f);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        if (strlen(line) > 120)
            fail_msg("%zu columns: %s", strlen(line), line);
}

static void json_of_two_vcpus(void **state UNUSED)
{
    struct machine m = {.engine = &engine};
    struct vcpu *v[2] = {vcpu_make(&m, 0), vcpu_make(&m, 1)};
    struct stats s;
    FILE *f = begin();
    unsigned depth = 0, deepest = 0;
    vcpu_count(v[0], COUNT_PIO);
    vcpu_count_add(v[0], COUNT_CODE_BYTES, 4711);
    stats_open(&s, f, true);
    stats_vcpus(&s);
    stats_vcpu(&s, v[0], NULL);
    stats_vcpu(&s, v[1], NULL);
    stats_vcpus_end(&s);
    stats_close(&s);
    fclose(f);
    assert_memory_equal(text, "{\"vcpus\":[{\"id\":0,\"instructions\":100,\"handled\":{\"apic-eoi\":0,", 61);
    assert_non_null(strstr(text, "\"pio\":1,"));
    assert_non_null(strstr(text, "\"bytes-generated\":4711,"));
    assert_non_null(strstr(text, "\"cache\":{\"bytes\":7,\"full-percent\":12.340}},{\"id\":1,\"instructions\":101,"));
    assert_non_null(strstr(text, "}}]}\n"));
    assert_null(strstr(text, ",}"));
    assert_null(strstr(text, "{,"));
    assert_null(strstr(text, ",,"));
    for (char *p = text; *p; p++) {
        depth += *p == '{' || *p == '[';
        depth -= *p == '}' || *p == ']';
        deepest = MAX(deepest, depth);
    }
    assert_int_equal(depth, 0);
    assert_int_equal(deepest, 4);
    free(v[0]);
    free(v[1]);
}

static void each_counter_has_a_name_of_its_own_and_groups_are_contiguous(void **state UNUSED)
{
    for (unsigned i = 0; i < COUNTS; i++) {
        assert_non_null(vcpu_count_name(i));
        assert_true(i == 0 || vcpu_count_group(i) == vcpu_count_group(i - 1) || vcpu_count_group(i) == vcpu_count_group(i - 1) + 1);
        for (unsigned j = 0; j < i; j++)
            assert_true(vcpu_count_group(i) != vcpu_count_group(j) || strcmp(vcpu_count_name(i), vcpu_count_name(j)));
    }
    for (unsigned i = 0; i < WHERES; i++)
        assert_non_null(vcpu_where_name(i));
}

static void wait_ms(unsigned ms)
{
    nanosleep(&(struct timespec){.tv_nsec = (long)ms * 1000000}, NULL);
}

static void the_sampler_sees_where_it_is(void **state UNUSED)
{
    struct machine m = {.engine = &engine, .vcpus = 1};
    struct vcpu *v = vcpu_make(&m, 0);
    struct sampler *s;
    m.vcpu = &v;
    vcpu_where(v, WHERE_DEVICE);
    assert_int_equal(sampler_new(&m, false, &s), 0);
    for (unsigned i = 0; i < 500 && sampler_hits(s, 0, WHERE_DEVICE) < 10; i++)
        wait_ms(10);
    assert_true(sampler_hits(s, 0, WHERE_DEVICE) >= 10);
    assert_int_equal(sampler_hits(s, 0, WHERE_WALK), 0);
    assert_int_equal(vcpu_where(v, WHERE_WALK), WHERE_DEVICE);
    for (unsigned i = 0; i < 500 && sampler_hits(s, 0, WHERE_WALK) < 10; i++)
        wait_ms(10);
    assert_true(sampler_hits(s, 0, WHERE_WALK) >= 10);
    sampler_free(s);
    free(v);
}

static void the_sampler_tells_time_by_the_cause_of_an_exit(void **state UNUSED)
{
    struct machine m = {.engine = &engine, .vcpus = 1};
    struct vcpu *v = vcpu_make(&m, 0);
    struct sampler *s;
    struct stats out;
    m.vcpu = &v;
    vcpu_left(v, COUNT_EXIT_STALE);
    assert_int_equal(v->count[COUNT_EXIT_STALE], 1);
    vcpu_where(v, WHERE_TRANSLATED);
    assert_int_equal(sampler_new(&m, false, &s), 0);
    for (unsigned i = 0; i < 500 && sampler_hits(s, 0, WHERE_TRANSLATED) < 10; i++)
        wait_ms(10);
    assert_int_equal(sampler_left(s, 0, COUNT_EXIT_STALE), 0);     /* it runs */
    vcpu_where(v, WHERE_TRANSLATE);
    for (unsigned i = 0; i < 500 && sampler_left(s, 0, COUNT_EXIT_STALE) < 10; i++)
        wait_ms(10);
    assert_true(sampler_left(s, 0, COUNT_EXIT_STALE) >= 10);
    assert_int_equal(sampler_left(s, 0, COUNT_EXIT_DIRECT), 0);
    FILE *f = begin();
    stats_open(&out, f, false);
    stats_vcpu(&out, v, s);
    stats_close(&out);
    fclose(f);
    assert_non_null(strstr(text, "  exit-time  stale "));
    sampler_free(s);
    free(v);
}

/* An engine whose guest is at one address, and whose thread is in one function. */
#define GUEST_RIP 0xffffffff81234567ull
static __attribute__((noinline)) enum run_exit spin(struct vcpu *v)
{
    vcpu_where(v, WHERE_INTERP);
    while (!(atomic_load(&v->events) & VCPU_EV_OUTSIDE))
        ;
    return RUN_OUTSIDE;
}
static int spin_open(struct vcpu *v UNUSED) { return 0; }
static void spin_close(struct vcpu *v UNUSED) {}
static u64 spin_sample(const struct vcpu *v UNUSED, u64 pc UNUSED, bool *direct)
{
    *direct = false;
    return GUEST_RIP;
}
static const struct engine spinning = {.name = "spin", .vcpu_open = spin_open, .vcpu_close = spin_close, .run = spin, .sample = spin_sample};

static u64 met(const struct sampler *s, enum sampled what, u64 from, u64 to)
{
    const struct sampled_address *e;
    u64 sum = 0;
    for (unsigned n = 0; (e = sampler_address(s, 0, what, n)); n++)
        sum += e->addr >= from && e->addr < to ? e->n : 0;
    return sum;
}

static void a_profile_has_addresses_of_guest_and_monitor(void **state UNUSED)
{
    struct machine m = {.engine = &spinning, .tools.profile = true};
    struct vcpu_hooks hooks = {0};
    struct vcpu *v;
    struct sampler *s;
    u64 begins = (u64)(uintptr_t)spin;
    assert_int_equal(bus_new(NULL, &m.mmio), 0);
    assert_int_equal(vcpu_new(&m, 0, &hooks, &v), 0);
    m.vcpu = &v;
    m.vcpus = 1;
    assert_int_equal(vcpu_start(v), 0);
    assert_int_equal(sampler_new(&m, true, &s), 0);
    vcpus_release(&m);
    for (unsigned i = 0; i < 3000 && sampler_ran(s, 0, WHERE_INTERP, true) < 20; i++)
        wait_ms(10);
    vcpus_hold(&m);
    assert_true(sampler_ran(s, 0, WHERE_INTERP, true) >= 20);
    assert_true(met(s, SAMPLED_GUEST, GUEST_RIP, GUEST_RIP + 1) >= 20);
    assert_int_equal(met(s, SAMPLED_GUEST, 0, GUEST_RIP), 0);
    assert_true(met(s, SAMPLED_MONITOR, begins, begins + 512) >= 10);
    assert_int_equal(sampler_lost(s), 0);
    sampler_free(s);
    vcpu_free(v);
    bus_free(m.mmio);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(groups_as_text),
        cmocka_unit_test(long_groups_are_broken),
        cmocka_unit_test(json_of_two_vcpus),
        cmocka_unit_test(each_counter_has_a_name_of_its_own_and_groups_are_contiguous),
        cmocka_unit_test(the_sampler_sees_where_it_is),
        cmocka_unit_test(the_sampler_tells_time_by_the_cause_of_an_exit),
        cmocka_unit_test(a_profile_has_addresses_of_guest_and_monitor),
    };

    return cmocka_run_group_tests_name("stats", tests, NULL, NULL);
}
