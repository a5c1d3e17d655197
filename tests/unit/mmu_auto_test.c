/*
 * cpu/bt/shadow under `--mmu auto`: when an address space goes to the shadow and when to the software TLB, and what is mapped ahead for one that has come
 * (back) to the shadow. What the shadow itself does: shadow_test.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>
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

static bool slow_is_code(const struct icpu *c UNUSED, u64 gpa UNUSED)
{
    nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
    return false;
}

/* A host that is busy takes the processor away in the midst of a fill: no reason to leave the shadow. */
static void test_interrupted(void **state)
{
    struct fixture *f = *state;
    u64 before = stats(f).fill_cycles;
    f->c->bt.shadow->is_code = slow_is_code;
    put(f, USER, 1, DATA | P | U | W | A | D);
    assert_int_equal(writes(f, VIEW_USER, USER), stamp(DATA));
    assert_in_range(stats(f).fill_cycles - before, 1, 300000);
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

/* ---- mapping ahead ---- */
/* So many of the pages from la on are in the host's page tables. */
static unsigned present(struct fixture *f, enum tlb_view_id view, u64 la, unsigned pages)
{
    u64 entry[512], host = la + f->c->bt.delta[view][la >> 39 & 511];
    unsigned n = 0;
    FILE *map = fopen("/proc/self/pagemap", "re");
    assert_non_null(map);
    assert_true(pages <= 512);
    assert_int_equal(fseeko(map, (off_t)(host / PAGE_SIZE * 8), SEEK_SET), 0);
    assert_int_equal(fread(entry, 8, pages, map), pages);
    fclose(map);
    for (unsigned i = 0; i < pages; i++)
        n += entry[i] >> 63;
    return n;
}

/* What a space is that has just come back by its misses, after much time. */
static void make_wide(struct fixture *f, unsigned ctx)
{
    f->c->bt.shadow->score[ctx] = (struct shadow_score){ .pays = true, .runs = 4, .spare = BIT(40) };
}

static void map_user(struct fixture *f, u64 la, u64 gpa, unsigned pages)
{
    for (unsigned i = 0; i < pages; i++)
        put(f, la + i * PAGE_SIZE, 1, (gpa + i * PAGE_SIZE) | P | U | W | A | D);
}

/* One fill, and nothing of what it maps costs a fault of the host any more; the time is taken from what may be spent. */
static void test_ahead(void **state)
{
    struct fixture *f = *state;
    struct shadow_score *p = &f->c->bt.shadow->score[0];
    make_wide(f, 0);
    map_user(f, USER + 3 * PAGE_SIZE, DATA, 500);
    assert_int_equal(reads(f, VIEW_USER, USER + 200 * PAGE_SIZE), stamp(DATA + 197 * PAGE_SIZE));
    assert_int_equal(stats(f).fills, 1);
    assert_int_equal(stats(f).ahead, 32);                          /* the pieces that the 500 pages lie in */
    for (unsigned i = 16; i < 500; i += 16)
        assert_int_equal(present(f, VIEW_USER, USER + i * PAGE_SIZE, 1), 1);
    assert_int_equal(present(f, VIEW_USER, USER, 3), 0);
    assert_true(stats(f).ahead_cycles);
    assert_int_equal(p->spare, BIT(40) - stats(f).ahead_cycles);
    put(f, USER + 2 * MiB, 2, (6 * MiB) | P | U | W | PS | A | D); /* a large page of the guest */
    assert_int_equal(writes(f, VIEW_USER, USER + 2 * MiB + 7 * PAGE_SIZE), stamp(6 * MiB + 7 * PAGE_SIZE));
    assert_int_equal(stats(f).ahead, 64);
    for (unsigned i = 0; i < 512; i += 16)
        assert_int_equal(present(f, VIEW_USER, USER + 2 * MiB + i * PAGE_SIZE, 1), 1);
}

static unsigned ahead_by(struct fixture *f, u64 la)
{
    u64 before = stats(f).ahead;
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    reads(f, la >> 63 ? VIEW_SUPER : VIEW_USER, la);
    return (unsigned)(stats(f).ahead - before);
}

static void test_not_ahead(void **state)
{
    struct fixture *f = *state;
    struct shadow_score *p = &f->c->bt.shadow->score[0];
    map_user(f, USER, DATA, 128);
    map_user(f, USER + 2 * MiB, DATA, 128);
    map_user(f, USER + 4 * MiB, DATA, 128);
    map_user(f, USER + 6 * MiB, DATA, 128);
    map_user(f, USER + 8 * MiB, DATA, 63);
    map_user(f, USER + 10 * MiB, DATA, 128);
    map_user(f, USER + 12 * MiB, DATA, 128);
    map_user(f, USER + 14 * MiB, DATA, 128);
    map_user(f, USER + 16 * MiB, DATA, 128);
    map_user(f, USER + 18 * MiB, DATA, 128);
    put(f, KERNEL, 2, 4 * MiB | P | W | PS | A | D | G);
    make_wide(f, 0);
    assert_int_equal(ahead_by(f, USER), 8);
    p->runs = 3;                                                   /* how much it uses is not known before the next one */
    assert_int_equal(ahead_by(f, USER + 2 * MiB), 0);
    assert_int_equal(ahead_by(f, USER + 12 * MiB), 8);
    make_wide(f, 0);
    p->spare = 0;                                                  /* the time is spent */
    assert_int_equal(ahead_by(f, USER + 4 * MiB), 0);
    make_wide(f, 0);
    atomic_store(&f->v.events, 1);                                 /* an interrupt waits: later */
    assert_int_equal(ahead_by(f, USER + 6 * MiB), 0);
    atomic_store(&f->v.events, 0);
    assert_int_equal(ahead_by(f, USER + 8 * MiB), 0);              /* few pages */
    make_wide(f, SHADOW_SUPER);
    assert_int_equal(ahead_by(f, KERNEL), 0);                      /* the supervisor's map of all memory */
    assert_int_equal(ahead_by(f, USER + 10 * MiB), 16);            /* with what had to wait */
    assert_int_equal(ahead_by(f, USER + 14 * MiB), 8);
    atomic_store(&f->v.events, 1);
    assert_int_equal(ahead_by(f, USER + 16 * MiB), 0);
    atomic_store(&f->v.events, 0);
    for (unsigned i = 0; i < 64; i++)                              /* half of what had to wait goes meanwhile */
        put(f, USER + 16 * MiB + i * PAGE_SIZE, 1, 0);
    assert_int_equal(ahead_by(f, USER + 18 * MiB), 12);
}

/* The time for it is a share of what the space has run, wherever that was; misses bring it, calm does not. */
static void test_ahead_share(void **state)
{
    struct fixture *f = *state;
    struct shadow_score *p = &f->c->bt.shadow->score[3];
    shadow_started(f->c, 3);
    assert_int_equal(p->spare, 0);
    shadow_ran(f->c, 3, 8000000, 8000, 250);
    assert_int_equal(p->spare, 500000);
    assert_false(shadow_pays(f->c, 3));
    shadow_ran(f->c, 3, 80000, 600, 0);
    assert_true(shadow_pays(f->c, 3));
    assert_int_equal(p->runs, 4);
    assert_int_equal(p->spare, 505000);
    shadow_ran(f->c, 3, 800000, 0, 0);
    assert_int_equal(p->spare, 555000);
    f->c->bt.shadow->stats.fill_cycles += 8000000;                 /* it does not pay: the share remains */
    shadow_ran(f->c, 3, 8000000, 0, 0);
    assert_false(shadow_pays(f->c, 3));
    assert_int_equal(p->runs, 0);
    assert_int_equal(p->spare, 1055000);
    shadow_calm(f->c, 3);
    assert_true(shadow_pays(f->c, 3));
    assert_int_equal(p->runs, 0);
    assert_int_equal(p->spare, 1055000);
    f->c->bt.shadow->stats.ahead_cycles += 7000000;                /* what was mapped ahead is no fault of the shadow's */
    shadow_ran(f->c, 3, 8000000, 0, 0);
    assert_true(shadow_pays(f->c, 3));
    shadow_started(f->c, 3);                                       /* another process */
    assert_int_equal(p->spare, 0);
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_thrashing), TEST(test_pays), TEST(test_returns), TEST(test_interrupted), TEST(test_short_lives), TEST(test_replaced),
        TEST(test_ahead), TEST(test_not_ahead), TEST(test_ahead_share),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
