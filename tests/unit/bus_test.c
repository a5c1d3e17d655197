/* io/bus: who answers where; widths split and widened; moves, overlaps, overlays, parents, the ends of the address space. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "io/bus.h"

/* A region of bytes that notes each access: "r4@8 " is a read of 4 bytes at offset 8. */
struct mem {
    u8 byte[64];
    char log[256];
};

static void note(struct mem *m, char what, u64 off, unsigned size)
{
    size_t n = strlen(m->log);

    snprintf(m->log + n, sizeof(m->log) - n, "%c%u@%u ", what, size, (unsigned)off);
}

static u64 mem_read(void *dev, u64 off, unsigned size)
{
    struct mem *m = dev;
    u64 v = 0;

    note(m, 'r', off, size);
    assert_true(range_in(off, size, sizeof(m->byte)));
    memcpy(&v, m->byte + off, size);
    return v;
}

static void mem_write(void *dev, u64 off, u64 val, unsigned size)
{
    struct mem *m = dev;

    note(m, 'w', off, size);
    assert_true(range_in(off, size, sizeof(m->byte)));
    assert_true(size == 8 || val >> (8 * size) == 0);
    memcpy(m->byte + off, &val, size);
}

static struct bus *bus;
static struct mem a, b;

static int setup(void **state UNUSED)
{
    for (int i = 0; i < 64; i++) {
        a.byte[i] = (u8)i;
        b.byte[i] = (u8)(0x80 + i);
    }
    a.log[0] = b.log[0] = 0;
    return bus_new(NULL, &bus);
}

static int teardown(void **state UNUSED)
{
    bus_free(bus);
    return 0;
}

static int add(struct mem *m, u64 base, u64 size, u8 min, u8 max)
{
    struct region r = { .base = base, .size = size, .min = min, .max = max, .read = mem_read, .write = mem_write, .dev = m, .name = "mem" };

    return bus_add(bus, &r);
}

static void nobody_reads_as_ones(void **state UNUSED)
{
    assert_int_equal(bus_read(bus, 0x70, 1), 0xff);
    assert_int_equal(bus_read(bus, 0x70, 4), 0xffffffff);
    assert_true(bus_read(bus, 0x70, 8) == UINT64_MAX);
    bus_write(bus, 0x70, 1, 4);
}

static void accesses_reach_their_region(void **state UNUSED)
{
    add(&a, 0x1000, 16, 1, 8);
    add(&b, 0x1010, 16, 1, 8);
    assert_int_equal(bus_read(bus, 0x1004, 4), 0x07060504);
    assert_int_equal(bus_read(bus, 0x1010, 2), 0x8180);
    bus_write(bus, 0x1012, 0xffffaabbccdd, 4);
    assert_int_equal(bus_read(bus, 0x1012, 4), 0xaabbccdd);
    assert_int_equal(bus_read(bus, 0x1016, 1), 0x86); /* nothing beyond four bytes was written */
}

static void wide_accesses_are_split(void **state UNUSED)
{
    add(&a, 0x60, 8, 1, 1);
    assert_int_equal(bus_read(bus, 0x60, 4), 0x03020100);
    assert_string_equal(a.log, "r1@0 r1@1 r1@2 r1@3 ");
    a.log[0] = 0;
    bus_write(bus, 0x61, 0xbbaa, 2);
    assert_string_equal(a.log, "w1@1 w1@2 ");
    assert_int_equal(a.byte[2], 0xbb);
}

static void odd_accesses_are_split_into_aligned_ones(void **state UNUSED)
{
    add(&a, 0x1000, 16, 1, 4);
    assert_int_equal(bus_read(bus, 0x1003, 4), 0x06050403);
    assert_string_equal(a.log, "r1@3 r2@4 r1@6 ");
    a.log[0] = 0;
    assert_true(bus_read(bus, 0x1000, 8) == 0x0706050403020100);
    assert_string_equal(a.log, "r4@0 r4@4 ");
}

static void narrow_accesses_are_widened(void **state UNUSED)
{
    add(&a, 0x1000, 16, 4, 4);
    assert_int_equal(bus_read(bus, 0x1005, 1), 5);
    assert_string_equal(a.log, "r4@4 ");
    a.log[0] = 0;
    bus_write(bus, 0x1006, 0xeeff, 2); /* the other half stays */
    assert_string_equal(a.log, "r4@4 w4@4 ");
    assert_int_equal(bus_read(bus, 0x1004, 4), 0xeeff0504);
    a.log[0] = 0;
    assert_int_equal(bus_read(bus, 0x1002, 4), 0x05040302); /* across two words */
    assert_string_equal(a.log, "r4@0 r4@4 ");
}

static void an_access_may_cross_regions_and_holes(void **state UNUSED)
{
    add(&a, 0x1000, 4, 1, 4);
    add(&b, 0x1006, 4, 1, 4);
    assert_true(bus_read(bus, 0x1002, 8) == 0x83828180ffff0302);
    bus_write(bus, 0x1002, 0x1122334455667788, 8);
    assert_int_equal(a.byte[2], 0x88);
    assert_int_equal(a.byte[3], 0x77);
    assert_int_equal(b.byte[0], 0x44);
    assert_int_equal(b.byte[3], 0x11);
}

static void the_ends_of_the_address_space(void **state UNUSED)
{
    assert_true(add(&a, UINT64_MAX - 3, 4, 1, 4) >= 0);
    assert_true(add(&b, 0, 4, 1, 4) >= 0);
    assert_int_equal(bus_read(bus, UINT64_MAX - 3, 4), 0x03020100);
    assert_int_equal(bus_read(bus, UINT64_MAX, 1), 3);
    assert_int_equal(bus_read(bus, UINT64_MAX - 1, 4), 0x81800302); /* wraps, as addresses do */
    assert_true(add(&a, UINT64_MAX - 2, 8, 1, 4) < 0);
}

static void overlaps_are_refused(void **state UNUSED)
{
    assert_true(add(&a, 0x1000, 16, 1, 4) >= 0);
    assert_int_equal(add(&b, 0x100f, 4, 1, 4), -17);
    assert_int_equal(add(&b, 0xffd, 4, 1, 4), -17);
    assert_int_equal(add(&b, 0x1004, 1, 1, 1), -17);
    assert_true(add(&b, 0x1010, 4, 1, 4) >= 0);
    assert_true(add(&b, 0xffc, 4, 1, 4) >= 0);
}

static void malformed_regions_are_refused(void **state UNUSED)
{
    assert_int_equal(add(&a, 0, 16, 3, 4), -22);
    assert_int_equal(add(&a, 0, 16, 4, 1), -22);
    assert_int_equal(add(&a, 0, 6, 4, 4), -22);
}

static void regions_move_and_vanish(void **state UNUSED)
{
    int h = add(&a, 0x1000, 0, 1, 4);

    assert_int_equal(bus_read(bus, 0x1000, 4), 0xffffffff);
    bus_move(bus, h, 0x2000, 16);
    assert_int_equal(bus_read(bus, 0x2000, 4), 0x03020100);
    bus_move(bus, h, 0x3000, 16);
    assert_int_equal(bus_read(bus, 0x2000, 4), 0xffffffff);
    assert_int_equal(bus_read(bus, 0x3000, 4), 0x03020100);
    bus_move(bus, h, 0x3000, 0);
    assert_int_equal(bus_read(bus, 0x3000, 4), 0xffffffff);
    bus_move(bus, h, UINT64_MAX - 1, 16); /* a guest's nonsense: cut at the end */
    assert_int_equal(bus_read(bus, UINT64_MAX - 1, 2), 0x0100);
    assert_int_equal(bus_read(bus, 0, 1), 0xff);
}

static void of_moved_regions_the_older_answers(void **state UNUSED)
{
    int ha = add(&a, 0x1000, 16, 1, 4), hb = add(&b, 0x2000, 16, 1, 4);

    bus_move(bus, hb, 0x0ff8, 32); /* around a: before and behind it b answers */
    assert_int_equal(bus_read(bus, 0x1000, 1), 0);
    assert_int_equal(bus_read(bus, 0x0fff, 1), 0x87);
    assert_int_equal(bus_read(bus, 0x1010, 1), 0x98);
    bus_move(bus, ha, 0x8000, 16);
    assert_int_equal(bus_read(bus, 0x1000, 1), 0x88);
}

/* As 0xcf9 inside 0xcf8..0xcfb: bytes there are the overlay's, a dword from 0xcf8 on is the register's below, whole. */
static void an_overlay_takes_what_begins_in_it(void **state UNUSED)
{
    struct region over = { .base = 0xcf9, .size = 1, .min = 1, .max = 1, .read = mem_read, .write = mem_write, .dev = &b, .name = "over", .overlay = true };

    assert_true(add(&a, 0xcf8, 4, 1, 4) >= 0);
    assert_true(bus_add(bus, &over) >= 0);
    assert_int_equal(bus_read(bus, 0xcf8, 4), 0x03020100);
    assert_string_equal(a.log, "r4@0 ");
    assert_int_equal(bus_read(bus, 0xcf9, 1), 0x80);
    assert_int_equal(bus_read(bus, 0xcfa, 1), 2);
    assert_int_equal(bus_read(bus, 0xcf9, 2), 0x0280);
    assert_true(bus_add(bus, &over) < 0); /* two overlays at one place are a mistake */
}

static void holes_are_the_parents(void **state UNUSED)
{
    struct bus *child;
    struct region r = { .base = 0x1004, .size = 4, .min = 1, .max = 4, .read = mem_read, .write = mem_write, .dev = &b, .name = "child" };

    add(&a, 0x1000, 16, 1, 4);
    assert_int_equal(bus_new(bus, &child), 0);
    assert_true(bus_add(child, &r) >= 0);
    assert_int_equal(bus_read(child, 0x1000, 4), 0x03020100);
    assert_int_equal(bus_read(child, 0x1004, 4), 0x83828180);
    assert_true(bus_read(child, 0x1002, 8) == 0x0908838281800302);
    assert_int_equal(bus_read(bus, 0x1004, 4), 0x07060504); /* the parent does not see the child */
    assert_int_equal(bus_read(child, 0x5000, 2), 0xffff);
    bus_free(child);
}

/* ---- locks and threads ---- */

static pthread_mutex_t device_lock = PTHREAD_MUTEX_INITIALIZER;
static int mover;

static u64 locked_read(void *dev UNUSED, u64 off UNUSED, unsigned size UNUSED)
{
    return (u64)(pthread_mutex_trylock(&device_lock) != 0);
}

/* As a write to a PCI base address register: the handler moves a region of the bus that it is called by. */
static void moving_write(void *dev UNUSED, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    bus_move(bus, mover, val, 16);
}

static void handlers_run_under_the_lock_and_may_move_regions(void **state UNUSED)
{
    struct region r = { .base = 0x10, .size = 8, .min = 1, .max = 8, .read = locked_read, .write = moving_write, .lock = &device_lock, .name = "l" };

    assert_true(bus_add(bus, &r) >= 0);
    mover = add(&a, 0x1000, 16, 1, 4);
    assert_int_equal(bus_read(bus, 0x10, 1), 1);
    bus_write(bus, 0x10, 0x4000, 8);
    assert_int_equal(bus_read(bus, 0x4004, 1), 4);
    assert_int_equal(pthread_mutex_trylock(&device_lock), 0); /* and it was released */
    pthread_mutex_unlock(&device_lock);
}

static u64 constant(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    return (u64)(uintptr_t)dev;
}

static void ignore(void *dev UNUSED, u64 off UNUSED, u64 val UNUSED, unsigned size UNUSED)
{
}

static void *move_about(void *arg UNUSED)
{
    for (int i = 0; i < 20000; i++)
        bus_move(bus, mover, i & 1 ? 0x1000 : 0x8000, i & 2 ? 16 : 0);
    return NULL;
}

static void reads_during_moves_see_old_or_new(void **state UNUSED)
{
    struct region fixed = { .base = 0x4000, .size = 16, .min = 1, .max = 8, .read = constant, .write = ignore, .dev = (void *)0x55, .name = "fixed" };
    struct region moving = { .base = 0x1000, .size = 16, .min = 1, .max = 8, .read = constant, .write = ignore, .dev = (void *)0x66, .name = "moving" };
    pthread_t t;
    bool good = true;

    assert_true(bus_add(bus, &fixed) >= 0);
    mover = bus_add(bus, &moving);
    pthread_create(&t, NULL, move_about, NULL);
    for (int i = 0; i < 50000; i++) {
        u64 v = bus_read(bus, 0x1000, 1);

        good = good && bus_read(bus, 0x4000, 1) == 0x55 && (v == 0x66 || v == 0xff);
    }
    pthread_join(t, NULL);
    assert_true(good);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(nobody_reads_as_ones), T(accesses_reach_their_region), T(wide_accesses_are_split), T(odd_accesses_are_split_into_aligned_ones),
        T(narrow_accesses_are_widened), T(an_access_may_cross_regions_and_holes), T(the_ends_of_the_address_space), T(overlaps_are_refused),
        T(malformed_regions_are_refused), T(regions_move_and_vanish), T(of_moved_regions_the_older_answers), T(an_overlay_takes_what_begins_in_it),
        T(holes_are_the_parents), T(handlers_run_under_the_lock_and_may_move_regions), T(reads_during_moves_see_old_or_new),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
