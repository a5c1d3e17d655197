/*
 * cpu/bt/shadow under `--mmu auto`: when an address space goes to the shadow and when to the software TLB. What the
 * shadow itself does: shadow_test.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include "shadow_fixture.h"

/* ---- what pays ---- */
/* More scattered pages than there may be mappings: `auto` is told at once. */
static void test_thrashing(void **state)
{
    struct fixture *f = *state;
    f->c->bt.shadow->limit = 300;
    f->c->bt.shadow->score[0].pays = true;
    for (unsigned i = 0; i < 2048; i++)
        put(f, USER + i * PAGE_SIZE, 1, (DATA + (i ^ 1) * PAGE_SIZE) | P | U | W | A | D);
    for (unsigned i = 0; i < 150; i++)
        writes(f, VIEW_USER, USER + i * PAGE_SIZE);
    assert_true(shadow_pays(f->c, 0));
    for (unsigned i = 0; i < 2048; i++)
        assert_int_equal(writes(f, VIEW_USER, USER + i * PAGE_SIZE), stamp(DATA + (i ^ 1) * PAGE_SIZE));
    assert_false(shadow_pays(f->c, 0));
    assert_true(host_mappings(f) < 300);
    shadow_ran(f->c, 0, 10000000, 0, 0);                           /* not so soon again */
    assert_false(shadow_pays(f->c, 0));
    shadow_ran(f->c, 0, 1000000000, 0, 0);
    assert_true(shadow_pays(f->c, 0));
}

static void test_pays(void **state)
{
    struct fixture *f = *state;
    shadow_started(f->c, 3);
    assert_false(shadow_pays(f->c, 3));
    assert_true(shadow_pays(f->c, SHADOW_CONTEXTS));
    shadow_ran(f->c, 3, 1000000, 300, 0);                          /* a short life, many misses */
    assert_false(shadow_pays(f->c, 3));
    shadow_ran(f->c, 3, 20000000, 10, 0);
    assert_true(shadow_pays(f->c, 3));
    f->c->bt.shadow->stats.fill_cycles += 3000000;
    shadow_ran(f->c, 3, 5000000, 0, 0);                            /* most of its time goes into fills */
    assert_false(shadow_pays(f->c, 3));
    shadow_ran(f->c, 3, 3000000, 0, 0);                            /* it has to wait */
    assert_false(shadow_pays(f->c, 3));
    shadow_ran(f->c, 3, 3000000, 0, 0);
    assert_true(shadow_pays(f->c, 3));
}

/* Misses without page faults or flushes are what the shadow would have been spared: it is back before the time that it has to wait is over. */
static void test_returns(void **state)
{
    struct fixture *f = *state;
    f->c->bt.shadow->score[3] = (struct shadow_score){ .wait = BIT(32) };
    for (unsigned i = 0; i < 100; i++)                             /* a program that maps and touches: each fault costs some misses more */
        shadow_ran(f->c, 3, 1000000, 500, 60);
    assert_false(shadow_pays(f->c, 3));
    for (unsigned i = 0; i < 3; i++)
        shadow_ran(f->c, 3, 100000, 150, 0);
    assert_false(shadow_pays(f->c, 3));
    shadow_ran(f->c, 3, 100000, 100, 1);
    assert_true(shadow_pays(f->c, 3));
    f->c->bt.shadow->stats.fill_cycles += 3000000;                 /* it was wrong: the former wait counts, halved and doubled */
    shadow_ran(f->c, 3, 5000000, 0, 100);
    assert_false(shadow_pays(f->c, 3));
    assert_int_equal(f->c->bt.shadow->score[3].wait, BIT(32));
}

/* Short processes one after the other at the same root: time that adds up is no reason while faults do. */
static void test_short_lives(void **state)
{
    struct fixture *f = *state;
    shadow_started(f->c, 3);
    for (unsigned i = 0; i < 1000; i++) {
        shadow_ran(f->c, 3, 1200000, 50, 30);
        assert_false(shadow_pays(f->c, 3));
    }
    for (unsigned i = 0; i < 100; i++)
        shadow_ran(f->c, 3, 12000000, 50, 30);
    assert_true(shadow_pays(f->c, 3));
}

/* The root of page tables that a process left is the next one's: that one begins anew. Not so where only some pages are gone. */
static void test_replaced(void **state)
{
    struct fixture *f = *state;
    u64 one = f->v.x.cr3, two = new_table(f);
    for (unsigned gone = 8; gone <= 16; gone += 8) {
        for (unsigned i = 0; i < 16; i++) {
            put(f, USER + i * PAGE_SIZE, 1, (DATA + (i ^ 1) * PAGE_SIZE) | P | U | W | A | D);
            assert_int_equal(reads(f, VIEW_USER, USER + i * PAGE_SIZE), stamp(DATA + (i ^ 1) * PAGE_SIZE));
        }
        f->c->bt.shadow->score[0].pays = true;
        context(f, two, 1);
        shadow_flush(f->c, FLUSH_NONGLOBAL, 0, 0);
        for (unsigned i = 0; i < gone; i++)
            *entry_at(f, slot_of(f, one, USER + i * PAGE_SIZE, 1)) = 0;
        context(f, one, 0);
        assert_int_equal(shadow_pays(f->c, 0), gone == 8);
    }
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_thrashing), TEST(test_pays), TEST(test_returns), TEST(test_short_lives), TEST(test_replaced),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
