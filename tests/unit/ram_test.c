/* mem/ram: the table of runs, its holes and ends, pieces, copies that do all or nothing, hooks around device writes. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

#include "mem/ram.h"

/* Three runs: 0..16K, adjacent 16K..24K, and 1 GiB..+8K. */
#define HIGH GiB
static struct ram ram;

static int setup(void **state UNUSED)
{
    if (ram_init(&ram) || ram_add(&ram, HIGH, 2 * PAGE_SIZE) || ram_add(&ram, 0, 4 * PAGE_SIZE))
        return -1;
    return ram_add(&ram, 4 * PAGE_SIZE, 2 * PAGE_SIZE);
}

static int teardown(void **state UNUSED)
{
    ram_close(&ram);
    return 0;
}

static void test_table(void **state UNUSED)
{
    assert_int_equal(ram.runs, 3);
    assert_int_equal(ram.size, 8 * PAGE_SIZE);
    assert_int_equal(ram.epoch, 3);
    assert_true(ram.run[0].gpa == 0 && ram.run[1].gpa == 4 * PAGE_SIZE && ram.run[2].gpa == HIGH);
}

static void test_bad_runs(void **state UNUSED)
{
    assert_int_equal(ram_add(&ram, PAGE_SIZE, PAGE_SIZE), -EINVAL);
    assert_int_equal(ram_add(&ram, HIGH - PAGE_SIZE, 2 * PAGE_SIZE), -EINVAL);
    assert_int_equal(ram_add(&ram, HIGH + PAGE_SIZE, 2 * PAGE_SIZE), -EINVAL);
    assert_int_equal(ram_add(&ram, 2 * HIGH, 100), -EINVAL);
    assert_int_equal(ram_add(&ram, 2 * HIGH + 1, PAGE_SIZE), -EINVAL);
    assert_int_equal(ram_add(&ram, 2 * HIGH, 0), -EINVAL);
    assert_int_equal(ram_add(&ram, PAGE_MASK, 2 * PAGE_SIZE), -EINVAL);
    assert_int_equal(ram.runs, 3);
    assert_int_equal(ram_add(&ram, HIGH - PAGE_SIZE, PAGE_SIZE), 0);
}

static void test_lookup(void **state UNUSED)
{
    assert_null(ram_hva(&ram, 6 * PAGE_SIZE));
    assert_null(ram_hva(&ram, HIGH - 1));
    assert_null(ram_hva(&ram, HIGH + 2 * PAGE_SIZE));
    assert_null(ram_hva(&ram, ~0ull));
    assert_non_null(ram_hva(&ram, 6 * PAGE_SIZE - 1));
    assert_ptr_equal(ram_hva(&ram, HIGH + 5), ram_hva(&ram, HIGH) + 5);
    assert_true(ram_has(&ram, 0, 6 * PAGE_SIZE));
    assert_false(ram_has(&ram, 0, 6 * PAGE_SIZE + 1));
    assert_true(ram_has(&ram, 12345678, 0));
    assert_false(ram_has(&ram, ~0ull - 1, 4));
    assert_false(ram_has(&ram, 0, ~0ull));
}

static void test_range(void **state UNUSED)
{
    assert_ptr_equal(ram_range(&ram, 100, 3 * PAGE_SIZE), ram_hva(&ram, 100));
    assert_null(ram_range(&ram, HIGH, 3 * PAGE_SIZE));
    u8 *second = ram_hva(&ram, 4 * PAGE_SIZE), *first = ram_hva(&ram, 0);
    u8 *both = ram_range(&ram, 4 * PAGE_SIZE - 8, 16);             /* two runs: only if the host happens to have them side by side */
    assert_ptr_equal(both, second == first + 4 * PAGE_SIZE ? second - 8 : NULL);
}

static void test_copy(void **state UNUSED)
{
    u8 in[PAGE_SIZE], out[PAGE_SIZE];
    for (unsigned i = 0; i < sizeof in; i++)
        in[i] = (u8)(i * 7);
    assert_int_equal(ram_write(&ram, 4 * PAGE_SIZE - 1000, in, sizeof in), 0); /* across two runs */
    assert_int_equal(ram_read(&ram, 4 * PAGE_SIZE - 1000, out, sizeof out), 0);
    assert_memory_equal(in, out, sizeof in);
    assert_int_equal(*ram_hva(&ram, 4 * PAGE_SIZE), in[1000]);
    memset(out, 0xee, sizeof out);
    assert_int_equal(ram_write(&ram, 6 * PAGE_SIZE - 10, out, 20), -EFAULT);
    assert_int_equal(*ram_hva(&ram, 6 * PAGE_SIZE - 10), 0);       /* nothing was copied */
    assert_int_equal(ram_read(&ram, 6 * PAGE_SIZE - 10, out, 20), -EFAULT);
    assert_int_equal(out[0], 0xee);
}

static void test_iov(void **state UNUSED)
{
    struct iovec v[3];
    unsigned n = 1;
    assert_int_equal(ram_iov(&ram, 4 * PAGE_SIZE - 8, 16, v, &n, 3), 0);
    assert_int_equal(n, 3);
    assert_ptr_equal(v[1].iov_base, ram_hva(&ram, 4 * PAGE_SIZE - 8));
    assert_int_equal(v[1].iov_len, 8);
    assert_ptr_equal(v[2].iov_base, ram_hva(&ram, 4 * PAGE_SIZE));
    assert_int_equal(v[2].iov_len, 8);
    n = 2;
    assert_int_equal(ram_iov(&ram, 4 * PAGE_SIZE - 8, 16, v, &n, 3), -E2BIG);
    assert_int_equal(n, 2);
    assert_int_equal(ram_iov(&ram, 6 * PAGE_SIZE - 8, 16, v, &n, 3), -EFAULT);
    assert_int_equal(n, 2);
    assert_int_equal(ram_iov(&ram, ~0ull - 3, 16, v, &n, 3), -EFAULT);
}

static void test_clear(void **state UNUSED)
{
    u64 epoch = ram.epoch;
    u8 *p = ram_hva(&ram, HIGH + 17);
    *p = 99;
    ram_clear(&ram);
    assert_ptr_equal(ram_hva(&ram, HIGH + 17), p);
    assert_int_equal(*p, 0);
    assert_int_equal(ram.epoch, epoch + 1);                        /* what was known of the bytes is wrong */
}

struct seen {
    u64 begin, end, len;
    u8 at_begin, at_end;
};

static void on_begin(void *arg, u64 gpa, u64 len)
{
    struct seen *s = arg;
    s->begin = gpa;
    s->len = len;
    s->at_begin = *ram_hva(&ram, gpa);
}

static void on_end(void *arg, u64 gpa, u64 len UNUSED)
{
    struct seen *s = arg;
    s->end = gpa;
    s->at_end = *ram_hva(&ram, gpa);
}

static void test_hooks(void **state UNUSED)
{
    struct seen s = { 0 };
    ram.on_begin_write = on_begin;
    ram.on_end_write = on_end;
    ram.on_write_arg = &s;
    assert_int_equal(ram_write(&ram, HIGH + 8, "x", 1), 0);
    assert_true(s.begin == HIGH + 8 && s.end == HIGH + 8 && s.len == 1 && s.at_begin == 0 && s.at_end == 'x');
    s = (struct seen){ 0 };
    assert_int_equal(ram_write(&ram, 2 * HIGH, "x", 1), -EFAULT);
    assert_int_equal(s.begin, 0);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_table), T(test_bad_runs), T(test_lookup), T(test_range), T(test_copy), T(test_iov), T(test_clear), T(test_hooks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
