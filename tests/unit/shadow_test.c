/*
 * cpu/bt/shadow: guest memory through the host's MMU. The oracle of the random test is a walk written here, from SDM vol. 3A chapter 4, not
 * the monitor's. What `--mmu auto` makes of it: mmu_auto_test.c.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#include "shadow_fixture.h"

/* ---- arithmetic ---- */
static bool host_canonical(u64 a)                                  /* with 4-level paging; what else is canonical with 5 levels is the host kernel's, or empty */
{
    return tlb_canonical(a);
}

static void test_closed(void **state)
{
    struct fixture *f = *state;
    static const u64 in_slot[] = { 0, 1, 0x1234567890, BIT(39) - 1 };
    static const s64 around[] = { 0, -(s64)(2 * GiB), 2 * GiB - 1 };
    for (unsigned view = 0; view < VIEWS; view++)
        for (unsigned slot = 0; slot < 512; slot++)
            for (unsigned i = 0; i < 12; i++) {
                u64 base = shadow_slot_base(slot) + in_slot[i / 3], disp = (u64)around[i % 3];
                assert_true(tlb_canonical(base));
                assert_int_equal(f->c->bt.delta[view][slot], shadow_closed(slot));
                assert_false(host_canonical(base + shadow_closed(slot) + disp));
                for (u64 k = 1; k < 0x10000; k += 0x111) {         /* non-canonical ones of the same slot: never the host's lower half */
                    u64 host = base + (k << 48) + shadow_closed(slot) + disp;
                    assert_true(!host_canonical(host) || (host > 0xffff800000000000 + GiB * 1024 && host < 0xfffffffffff00000 - 1024 * GiB));
                }
            }
}

static void test_open_slot(void **state)
{
    struct fixture *f = *state;
    put(f, USER, 1, DATA | P | U | W | A);
    assert_int_equal(reads(f, VIEW_USER, USER), stamp(DATA));
    u64 delta = f->c->bt.delta[VIEW_USER][170], base = shadow_slot_base(170);
    assert_true(base + delta > 4 * GiB && base + delta + BIT(39) + 4 * GiB < BIT(47));
    for (u64 k = 1; k < 0x10000; k++)                              /* an address with wrong upper bits is no address of the host's either */
        assert_false(host_canonical(USER + (k << 48) + delta));
    assert_int_equal(probe_at(f, VIEW_USER, USER + BIT(48) + 8, false), KEEP_OUT);
    assert_int_equal(probe_at(f, VIEW_USER, USER + 8 - 0xffffull * BIT(48), false), KEEP_OUT);
    /* By a translated base and a displacement out of the slot: the guard. */
    asm volatile("" : "+r"(base));
    if (!sigsetjmp(landing, 1)) {
        asm volatile("movb (%0), %%al" : : "r"(base + delta - 2 * GiB) : "rax");
        fail();
    }
    if (!sigsetjmp(landing, 1)) {
        asm volatile("movb (%0), %%al" : : "r"(base + delta + BIT(39) + 2 * GiB - 1) : "rax");
        fail();
    }
    u64 la;
    assert_true(shadow_guest(f->c, VIEW_USER, USER + delta + 17, &la));
    assert_int_equal(la, USER + 17);
    assert_true(shadow_guest(f->c, VIEW_SUPER_OPEN, base + delta - 2 * GiB, &la));
    assert_int_equal(la, base - 2 * GiB);
    assert_false(shadow_guest(f->c, VIEW_SUPER, USER + delta, &la));
    assert_false(shadow_guest(f->c, VIEW_USER, base + delta - 5 * GiB, &la));
}

/* ---- fills ---- */
static void test_rights(void **state)
{
    struct fixture *f = *state;
    u32 error = 0;
    put(f, USER, 1, DATA | P | U | A);
    put(f, USER + PAGE_SIZE, 1, (DATA + 8 * PAGE_SIZE) | P | U | W);
    put(f, USER + 2 * PAGE_SIZE, 1, (DATA + 2 * PAGE_SIZE) | P | W | A | D);
    put(f, KERNEL, 1, (DATA + 3 * PAGE_SIZE) | P | W);
    put(f, KERNEL + PAGE_SIZE, 1, (DATA + 5 * PAGE_SIZE) | P | U | W);
    assert_int_equal(reads(f, VIEW_USER, USER), stamp(DATA));
    assert_int_equal(reach(f, VIEW_USER, USER, MMU_WRITE, &error), FAULTED);
    assert_int_equal(error, PF_P | PF_W | PF_U);
    assert_int_equal(probe(f, VIEW_USER, USER, false), stamp(DATA)); /* still there */
    /* Not dirty: readable first, writable by a fill that sets D. */
    assert_int_equal(reads(f, VIEW_USER, USER + PAGE_SIZE), stamp(DATA + 8 * PAGE_SIZE));
    assert_int_equal(get(f, USER + PAGE_SIZE, 1) & (A | D), A);
    assert_int_equal(probe(f, VIEW_USER, USER + PAGE_SIZE, true), KEEP_OUT);
    assert_int_equal(writes(f, VIEW_USER, USER + PAGE_SIZE), stamp(DATA + 8 * PAGE_SIZE));
    assert_int_equal(get(f, USER + PAGE_SIZE, 1) & (A | D), A | D);
    assert_int_equal(stats(f).upgrades, 1);
    /* User code and a supervisor's page; the supervisor makes its own way to it. */
    assert_int_equal(reach(f, VIEW_USER, USER + 2 * PAGE_SIZE, MMU_READ, &error), FAULTED);
    assert_int_equal(error, PF_P | PF_U);
    assert_int_equal(reads(f, VIEW_SUPER_OPEN, USER + 2 * PAGE_SIZE), SLOW);
    assert_int_equal(probe(f, VIEW_USER, USER + 2 * PAGE_SIZE, false), KEEP_OUT);
    assert_int_equal(reads(f, VIEW_SUPER, USER + 2 * PAGE_SIZE), stamp(DATA + 2 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_USER, USER + 2 * PAGE_SIZE, false), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_SUPER_OPEN, USER, false), stamp(DATA)); /* the user's window stays the one that is open */
    /* User pages as the supervisor sees them. */
    assert_int_equal(probe(f, VIEW_SUPER_OPEN, USER, false), stamp(DATA));
    assert_int_equal(probe(f, VIEW_SUPER, USER, false), KEEP_OUT);
    assert_int_equal(reach(f, VIEW_SUPER, USER, MMU_READ, &error), FAULTED);
    assert_int_equal(error, PF_P);
    /* The supervisor's. */
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL), stamp(DATA + 3 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_SUPER_OPEN, KERNEL, true), stamp(DATA + 3 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_USER, KERNEL, false), KEEP_OUT);
    assert_int_equal(reach(f, VIEW_USER, KERNEL, MMU_READ, &error), FAULTED);
    assert_int_equal(error, PF_P | PF_U);
    assert_int_equal(reads(f, VIEW_SUPER_OPEN, KERNEL + PAGE_SIZE), SLOW);
    assert_int_equal(reads(f, VIEW_USER, KERNEL + PAGE_SIZE), SLOW);
    /* Nothing mapped, devices, no canonical address. */
    assert_int_equal(reach(f, VIEW_SUPER, KERNEL + 2 * PAGE_SIZE, MMU_READ, &error), FAULTED);
    assert_int_equal(error, 0);
    put(f, KERNEL + 3 * PAGE_SIZE, 1, HOLE | P | W);
    assert_int_equal(reads(f, VIEW_SUPER, KERNEL + 3 * PAGE_SIZE), SLOW);
    assert_int_equal(shadow_fill(f->c, VIEW_SUPER, KERNEL - BIT(52), MMU_READ, &error), SHADOW_SLOW);
}

static void test_around(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < 512; i++)
        put(f, USER + i * PAGE_SIZE, 1, (HIGH + i * PAGE_SIZE) | P | U | W | A | D);
    put(f, USER + 300 * PAGE_SIZE, 1, (HIGH + 300 * PAGE_SIZE) | P | U | W | D);  /* not accessed */
    put(f, USER + 100 * PAGE_SIZE, 1, (HIGH + 100 * PAGE_SIZE) | P | U | A);      /* other rights */
    put(f, USER + 400 * PAGE_SIZE, 1, (HIGH + 401 * PAGE_SIZE) | P | U | W | A | D); /* another frame */
    assert_int_equal(writes(f, VIEW_USER, USER + 200 * PAGE_SIZE), stamp(HIGH + 200 * PAGE_SIZE));
    for (unsigned i = 0; i < 512; i++)
        assert_int_equal(probe(f, VIEW_USER, USER + i * PAGE_SIZE, true), i > 100 && i < 300 ? stamp(HIGH + i * PAGE_SIZE) : KEEP_OUT);
    assert_int_equal(stats(f).pages, 199);
    assert_int_equal(reads(f, VIEW_USER, USER + 100 * PAGE_SIZE), stamp(HIGH + 100 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_USER, USER + 100 * PAGE_SIZE, true), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_USER, USER + 99 * PAGE_SIZE, false), KEEP_OUT);
    assert_int_equal(reads(f, VIEW_USER, USER + 500 * PAGE_SIZE), stamp(HIGH + 500 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_USER, USER + 401 * PAGE_SIZE, false), stamp(HIGH + 401 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_USER, USER + 400 * PAGE_SIZE, false), KEEP_OUT);
}

/* A run of frames that ends with RAM. */
static void test_end_of_ram(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < 8; i++)
        put(f, KERNEL + i * PAGE_SIZE, 1, (RAM_SIZE - 4 * PAGE_SIZE + i * PAGE_SIZE) | P | W | A | D);
    assert_int_equal(reads(f, VIEW_SUPER, KERNEL + PAGE_SIZE), stamp(RAM_SIZE - 3 * PAGE_SIZE));
    assert_int_equal(stats(f).pages, 4);
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 4 * PAGE_SIZE, false), KEEP_OUT);
    assert_int_equal(reads(f, VIEW_SUPER, KERNEL + 4 * PAGE_SIZE), SLOW);
}

static void test_large(void **state)
{
    struct fixture *f = *state;
    put(f, KERNEL, 2, 4 * MiB | P | W | PS | A | D | G);
    f->code[(4 * MiB >> PAGE_SHIFT) + 7] = f->code[(4 * MiB >> PAGE_SHIFT) + 8] = 1;
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 5 * PAGE_SIZE), stamp(4 * MiB + 5 * PAGE_SIZE));
    for (unsigned i = 0; i < 512; i++) {
        assert_int_equal(probe(f, VIEW_SUPER, KERNEL + i * PAGE_SIZE, false), stamp(4 * MiB + i * PAGE_SIZE));
        assert_int_equal(probe(f, VIEW_SUPER, KERNEL + i * PAGE_SIZE, true), i == 7 || i == 8 ? KEEP_OUT : stamp(4 * MiB + i * PAGE_SIZE));
    }
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 7 * PAGE_SIZE), SLOW);
    f->code[(4 * MiB >> PAGE_SHIFT) + 7] = 0;
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 7 * PAGE_SIZE), stamp(4 * MiB + 7 * PAGE_SIZE));
    /* One that reaches beyond RAM is mapped by pieces. */
    put(f, KERNEL + 2 * MiB, 2, (HIGH + 4 * MiB) | P | W | PS | A | D);
    put(f, KERNEL + 4 * MiB, 2, (HIGH + 6 * MiB) | P | W | PS | A | D);
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 2 * MiB), stamp(HIGH + 4 * MiB));
    assert_int_equal(reads(f, VIEW_SUPER, KERNEL + 4 * MiB), SLOW);
    /* Not dirty: read-only as a whole, until a write. */
    put(f, KERNEL + 6 * MiB, 2, (HIGH + 2 * MiB) | P | W | PS | A);
    assert_int_equal(reads(f, VIEW_SUPER, KERNEL + 6 * MiB), stamp(HIGH + 2 * MiB));
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 6 * MiB, true), KEEP_OUT);
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 7 * MiB), stamp(HIGH + 3 * MiB));
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 6 * MiB, true), stamp(HIGH + 2 * MiB));
    /* INVLPG anywhere in it drops all of it. */
    put(f, KERNEL + 6 * MiB, 2, 0);
    shadow_flush(f->c, FLUSH_PAGE, KERNEL + 7 * MiB + 123, 0);
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 6 * MiB, false), KEEP_OUT);
    /* Split into pages: what was a block comes back as cells. */
    u64 table = new_table(f);
    for (unsigned i = 0; i < 512; i++)
        *entry_at(f, table + 8 * i) = (4 * MiB + i * PAGE_SIZE) | P | A | D | (i == 9 ? 0 : W);
    put(f, KERNEL, 2, table | P | W | A);
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 9 * PAGE_SIZE), FAULTED);
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 10 * PAGE_SIZE), stamp(4 * MiB + 10 * PAGE_SIZE));
}

static void test_huge(void **state)
{
    struct fixture *f = *state;
    put(f, KERNEL, 3, 0 | P | W | PS | A | D);                     /* 1 GiB from 0: RAM, hole, RAM, nothing */
    u64 base = KERNEL & ~(GiB - 1);
    assert_int_equal(reads(f, VIEW_SUPER, base + DATA), stamp(DATA));
    assert_int_equal(reads(f, VIEW_SUPER, base + HIGH + 2 * MiB), stamp(HIGH + 2 * MiB));
    assert_int_equal(reads(f, VIEW_SUPER, base + HOLE), SLOW);
    put(f, KERNEL, 3, 0);
    shadow_flush(f->c, FLUSH_PAGE, base + 500 * MiB, 0);
    assert_int_equal(probe(f, VIEW_SUPER, base + DATA, false), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_SUPER, base + HIGH + 2 * MiB, false), KEEP_OUT);
}

/* ---- flushes ---- */
static void test_revalidate(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < 64; i++)
        put(f, USER + i * PAGE_SIZE, 1, (DATA + i * PAGE_SIZE) | P | U | W | A | D);
    for (unsigned i = 0; i < 64; i++)
        assert_int_equal(writes(f, VIEW_USER, USER + i * PAGE_SIZE), stamp(DATA + i * PAGE_SIZE));
    struct shadow_stats before = stats(f);
    put(f, USER + 3 * PAGE_SIZE, 1, 0);
    put(f, USER + 4 * PAGE_SIZE, 1, (DATA + 99 * PAGE_SIZE) | P | U | W | A | D);
    put(f, USER + 10 * PAGE_SIZE, 1, (DATA + 10 * PAGE_SIZE) | P | U | A | D); /* copy on write */
    put(f, USER + 11 * PAGE_SIZE, 1, (DATA + 11 * PAGE_SIZE) | P | U | W | A); /* clean again */
    put(f, USER + 12 * PAGE_SIZE, 1, (DATA + 12 * PAGE_SIZE) | P | U | W | D); /* not accessed */
    put(f, USER + 13 * PAGE_SIZE, 1, (DATA + 13 * PAGE_SIZE) | P | W | A | D); /* the supervisor's */
    put(f, USER + 14 * PAGE_SIZE, 1, (DATA + 14 * PAGE_SIZE) | P | U | W | A | D | BIT(51)); /* reserved */
    put(f, USER + 15 * PAGE_SIZE, 1, (DATA + 15 * PAGE_SIZE) | P | U | W | A | D | 0xe00 | BIT(55)); /* software's bits */
    assert_int_equal(probe(f, VIEW_USER, USER + 3 * PAGE_SIZE, false), stamp(DATA + 3 * PAGE_SIZE)); /* as a TLB would */
    shadow_flush(f->c, FLUSH_NONGLOBAL, 0, 0);
    for (unsigned i = 0; i < 64; i++) {
        bool gone = i == 3 || i == 4 || (i >= 12 && i <= 14), ro = i == 10 || i == 11;
        assert_int_equal(probe(f, VIEW_USER, USER + i * PAGE_SIZE, false), gone ? KEEP_OUT : stamp(DATA + i * PAGE_SIZE));
        assert_int_equal(probe(f, VIEW_USER, USER + i * PAGE_SIZE, true), gone || ro ? KEEP_OUT : stamp(DATA + i * PAGE_SIZE));
    }
    struct shadow_stats after = stats(f);
    assert_int_equal(after.compared - before.compared, 64);
    assert_int_equal(after.dropped - before.dropped, 5);
    assert_int_equal(after.downgraded - before.downgraded, 2);
    assert_int_equal(after.mapped, 59);
    assert_int_equal(reads(f, VIEW_USER, USER + 4 * PAGE_SIZE), stamp(DATA + 99 * PAGE_SIZE));
    /* Rights of the levels above count as well. */
    put(f, USER, 2, get(f, USER, 2) & ~(u64)W);
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, true), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_USER, USER, false), stamp(DATA));
    put(f, USER, 3, get(f, USER, 3) & ~(u64)U);
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, false), KEEP_OUT);
    assert_int_equal(stats(f).mapped, 0);
    assert_int_equal(stats(f).regions, 0);
}

static void test_invlpg(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < 4; i++) {
        put(f, USER + i * PAGE_SIZE, 1, (DATA + i * PAGE_SIZE) | P | U | W | A | D);
        put(f, KERNEL + i * PAGE_SIZE, 1, (DATA + i * PAGE_SIZE) | P | W | A | D | G);
    }
    reads(f, VIEW_USER, USER);
    reads(f, VIEW_SUPER, KERNEL);
    for (unsigned i = 1; i < 3; i++) {
        put(f, USER + i * PAGE_SIZE, 1, 0);
        put(f, KERNEL + i * PAGE_SIZE, 1, 0);
    }
    shadow_flush(f->c, FLUSH_PAGE, USER + PAGE_SIZE + 5, 0);
    shadow_flush(f->c, FLUSH_PAGE, KERNEL + PAGE_SIZE + 5, 0);
    assert_int_equal(probe(f, VIEW_USER, USER + PAGE_SIZE, false), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + PAGE_SIZE, false), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_USER, USER + 2 * PAGE_SIZE, false), stamp(DATA + 2 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 2 * PAGE_SIZE, false), stamp(DATA + 2 * PAGE_SIZE));
    shadow_flush(f->c, FLUSH_NONGLOBAL, 0, 0);                     /* global ones outlive it */
    assert_int_equal(probe(f, VIEW_USER, USER + 2 * PAGE_SIZE, false), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 2 * PAGE_SIZE, false), stamp(DATA + 2 * PAGE_SIZE));
    f->v.x.cr4 &= ~(u64)CR4_PGE;                                   /* ... where there are global pages at all */
    shadow_flush(f->c, FLUSH_NONGLOBAL, 0, 0);
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 2 * PAGE_SIZE, false), KEEP_OUT);
    /* A page fault drops what was held, without any flush. */
    put(f, USER, 1, (DATA + 9 * PAGE_SIZE) | P | W | A | D);
    assert_int_equal(shadow_fill(f->c, VIEW_USER, USER, MMU_WRITE, &(u32){ 0 }), SHADOW_FAULT);
    assert_int_equal(probe(f, VIEW_USER, USER, false), KEEP_OUT);
}

/* What the guest's page fault handler has put right is there when it returns. */
static void test_expected(void **state)
{
    struct fixture *f = *state;
    struct icpu *c = f->c;
    u64 entry[] = { 0, P | U | W, P | U | W | A, P | U | A | D, P | W | A | D, P | U | W | A | D };
    put(f, USER + PAGE_SIZE, 1, (DATA + 5 * PAGE_SIZE) | P | U | W | A | D);
    reads(f, VIEW_USER, USER + PAGE_SIZE);
    assert_int_equal(c->bt.expected, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(entry); i++) {
        put(f, USER, 1, 0);
        assert_int_equal(writes(f, VIEW_USER, USER + 8), FAULTED);
        assert_true(c->bt.expected);
        shadow_flush(c, FLUSH_PAGE, USER, 0);
        put(f, USER, 1, DATA | entry[i]);
        shadow_expected(c);
        assert_int_equal(c->bt.expected, 0);
        assert_int_equal(get(f, USER, 1), DATA | entry[i]);        /* nothing is marked on suspicion */
        assert_int_equal(probe(f, VIEW_USER, USER, true), i == 5 ? stamp(DATA) : KEEP_OUT);
    }
    assert_int_equal(stats(f).expected, 1);
    assert_int_equal(reads(f, VIEW_USER, USER + 2 * PAGE_SIZE), FAULTED);
    u64 two = new_table(f);
    context(f, two, 1);                                            /* somebody else runs now */
    put(f, USER + 2 * PAGE_SIZE, 1, DATA | P | U | A);
    shadow_expected(c);
    assert_int_equal(probe(f, VIEW_USER, USER + 2 * PAGE_SIZE, false), KEEP_OUT);
}

/* Pages that are used once are not made good at once after a while; pages that are used again are. */
static void test_reuse(void **state)
{
    struct fixture *f = *state;
    unsigned expected[2] = { 0 };
    for (unsigned again = 0; again < 2; again++)
        for (unsigned i = 0; i < 2000; i++) {
            u64 la = USER + i % 512 * PAGE_SIZE;
            put(f, la, 1, 0);
            shadow_flush(f->c, FLUSH_PAGE, la, 0);
            assert_int_equal(writes(f, VIEW_USER, la), FAULTED);
            put(f, la, 1, (DATA + i % 512 * PAGE_SIZE) | P | U | W | A | D);
            expected[again] += i >= 1000 && f->c->bt.expected;
            if (f->c->bt.expected)
                shadow_expected(f->c);
            if (again)
                assert_int_equal(writes(f, VIEW_USER, la), stamp(DATA + i % 512 * PAGE_SIZE));
        }
    assert_true(expected[0] == 0 && expected[1] > 800 && expected[1] < 1000);
}

/* INVLPG of a page that has been copied: the copy is mapped at once. */
static void test_moved(void **state)
{
    struct fixture *f = *state;
    put(f, USER, 1, DATA | P | U | A);
    put(f, USER + PAGE_SIZE, 1, (DATA + PAGE_SIZE) | P | U | A);
    reads(f, VIEW_USER, USER);
    put(f, USER, 1, (DATA + 7 * PAGE_SIZE) | P | U | W | A | D);
    put(f, USER + PAGE_SIZE, 1, (DATA + 8 * PAGE_SIZE) | P | U | W | D);
    shadow_flush(f->c, FLUSH_PAGE, USER, 0);
    shadow_flush(f->c, FLUSH_PAGE, USER + PAGE_SIZE, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, true), stamp(DATA + 7 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_USER, USER + PAGE_SIZE, false), KEEP_OUT); /* not accessed */
    assert_int_equal(stats(f).moved, 1);
    f->code[DATA >> PAGE_SHIFT] = 1;
    put(f, USER, 1, DATA | P | U | W | A | D);
    shadow_flush(f->c, FLUSH_PAGE, USER, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, true), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_USER, USER, false), stamp(DATA));
}

/* A fill finds another frame, or another kind of table, than the last one did, and nobody has flushed. */
static void test_changed_without_flush(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < 4; i++)
        put(f, USER + i * PAGE_SIZE, 1, (DATA + i * PAGE_SIZE) | P | U | A);
    reads(f, VIEW_USER, USER);
    put(f, USER, 1, (DATA + 5 * PAGE_SIZE) | P | U | W);
    assert_int_equal(writes(f, VIEW_USER, USER), stamp(DATA + 5 * PAGE_SIZE));
    put(f, USER, 2, (HIGH + 2 * MiB) | P | U | W | PS);
    assert_int_equal(writes(f, VIEW_USER, USER + 9 * PAGE_SIZE), stamp(HIGH + 2 * MiB + 9 * PAGE_SIZE));
    assert_int_equal(reads(f, VIEW_USER, USER + PAGE_SIZE), stamp(HIGH + 2 * MiB + PAGE_SIZE));
}

/* ---- contexts ---- */
static void test_contexts(void **state)
{
    struct fixture *f = *state;
    u64 one = f->v.x.cr3, two = new_table(f);
    put(f, KERNEL, 1, (DATA + 100 * PAGE_SIZE) | P | W | A | D | G);
    put(f, TEXT, 1, (DATA + 101 * PAGE_SIZE) | P | A);             /* not global */
    for (unsigned slot = 256; slot < 512; slot++)
        *entry_at(f, two + 8 * slot) = *entry_at(f, one + 8 * slot);
    put(f, USER, 1, DATA | P | U | W | A | D);
    assert_int_equal(reads(f, VIEW_USER, USER), stamp(DATA));
    assert_int_equal(reads(f, VIEW_SUPER, KERNEL), stamp(DATA + 100 * PAGE_SIZE));
    assert_int_equal(reads(f, VIEW_SUPER, TEXT), stamp(DATA + 101 * PAGE_SIZE));
    u64 changes = f->c->bt.delta_changes;
    context(f, two, 1);
    assert_true(f->c->bt.delta_changes > changes);
    assert_int_equal(f->c->bt.delta[VIEW_USER][170], shadow_closed(170));
    assert_int_equal(f->c->bt.delta[VIEW_SUPER_OPEN][170], shadow_closed(170));
    assert_int_equal(reads(f, VIEW_USER, USER), FAULTED);
    put(f, USER, 1, (DATA + PAGE_SIZE) | P | U | W | A | D);
    assert_int_equal(reads(f, VIEW_USER, USER), stamp(DATA + PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL, true), stamp(DATA + 100 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_SUPER, TEXT, false), stamp(DATA + 101 * PAGE_SIZE)); /* the same in both */
    context(f, one, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, true), stamp(DATA)); /* survived */
    assert_int_equal(probe(f, VIEW_SUPER_OPEN, USER, true), stamp(DATA));
    /* Flushed while it was away: compared with its own tables when it is back. */
    context(f, two, 1);
    *entry_at(f, slot_of(f, one, USER, 1)) = 0;
    shadow_flush(f->c, FLUSH_NONGLOBAL, 0, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, false), stamp(DATA + PAGE_SIZE));
    context(f, one, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, false), KEEP_OUT);
    /* One page of a context that is away. */
    *entry_at(f, slot_of(f, two, USER, 1)) = 0;
    shadow_flush_in(f->c, USER, 1);
    context(f, two, 1);
    assert_int_equal(probe(f, VIEW_USER, USER, false), KEEP_OUT);
    /* Supervisor pages that are not global belong to one address space. */
    u64 three = new_table(f);
    context(f, three, 2);
    assert_int_equal(probe(f, VIEW_SUPER, TEXT, false), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL, false), stamp(DATA + 100 * PAGE_SIZE)); /* global, as a TLB would */
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL, false), KEEP_OUT);
}

/* A supervisor in the lower half (boot loaders, firmware, a decompressor): its own windows, open to it until user pages appear in their slot. */
static void test_low_supervisor(void **state)
{
    struct fixture *f = *state;
    u64 one = f->v.x.cr3, two = new_table(f), low = 0x200000;
    put(f, low, 1, DATA | P | W);
    put(f, low + PAGE_SIZE, 1, (DATA + 9 * PAGE_SIZE) | P | W | U);
    assert_int_equal(writes(f, VIEW_SUPER_OPEN, low), stamp(DATA));
    assert_int_equal(probe(f, VIEW_SUPER, low, true), stamp(DATA));
    assert_int_equal(reads(f, VIEW_USER, low), FAULTED);
    assert_int_equal(f->c->bt.delta[VIEW_USER][0], shadow_closed(0));
    context(f, two, 1);
    assert_int_equal(probe(f, VIEW_SUPER_OPEN, low, false), KEEP_OUT);
    assert_int_equal(reads(f, VIEW_SUPER, low), FAULTED);
    context(f, one, 0);
    assert_int_equal(probe(f, VIEW_SUPER_OPEN, low, true), stamp(DATA));
    assert_int_equal(reads(f, VIEW_SUPER_OPEN, low + PAGE_SIZE), stamp(DATA + 9 * PAGE_SIZE));
    assert_int_equal(probe(f, VIEW_USER, low + PAGE_SIZE, false), stamp(DATA + 9 * PAGE_SIZE));
    assert_int_equal(reads(f, VIEW_SUPER_OPEN, low), SLOW);
    assert_int_equal(probe(f, VIEW_SUPER, low, true), stamp(DATA));
    assert_int_equal(probe(f, VIEW_SUPER, low + PAGE_SIZE, false), KEEP_OUT);
    put(f, low, 1, 0);
    shadow_flush(f->c, FLUSH_PAGE, low, 0);
    assert_int_equal(probe(f, VIEW_SUPER, low, false), KEEP_OUT);
}

/* User pages that are global: INVLPG in one context drops them in all. */
static void test_user_global(void **state)
{
    struct fixture *f = *state;
    u64 one = f->v.x.cr3, two = new_table(f);
    put(f, USER, 1, DATA | P | U | W | A | D | G);
    reads(f, VIEW_USER, USER);
    context(f, two, 1);
    *entry_at(f, slot_of(f, one, USER, 1)) = 0;
    shadow_flush(f->c, FLUSH_PAGE, USER, 1);
    context(f, one, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, false), KEEP_OUT);
}

static void test_odd_states(void **state)
{
    struct fixture *f = *state;
    struct x86 *x = &f->v.x;
    put(f, KERNEL, 1, DATA | P | A);
    put(f, USER, 1, (DATA + PAGE_SIZE) | P | U | W | A | D);
    put(f, USER + PAGE_SIZE, 1, (DATA + PAGE_SIZE) | P | U | W | A | D | 5ull << 59);
    assert_true(shadow_possible(f->c));
    assert_int_equal(reads(f, VIEW_SUPER, KERNEL), stamp(DATA));
    x->cr0 &= ~(u64)CR0_WP;                                        /* the supervisor may write what is read-only: not by a window */
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL), SLOW);
    x->cr0 |= CR0_WP | CR0_AM;
    f->c->flags |= FLAG_AC;
    f->c->cpl = 3;
    assert_false(shadow_possible(f->c));
    f->c->flags &= ~FLAG_AC;
    assert_true(shadow_possible(f->c));
    x->cr4 |= CR4_PKE;
    assert_int_equal(reads(f, VIEW_USER, USER + PAGE_SIZE), SLOW);
    assert_int_equal(reads(f, VIEW_USER, USER), stamp(DATA + PAGE_SIZE));
    f->c->pkru = 2;
    assert_false(shadow_possible(f->c));
    f->c->pkru = 0;
    f->c->tlb->watch = true;
    assert_false(shadow_possible(f->c));
    assert_int_equal(reads(f, VIEW_USER, USER + 2 * PAGE_SIZE), SLOW);
    f->c->tlb->watch = false;
    x->cr0 &= ~(u64)CR0_PG;
    assert_false(shadow_possible(f->c));
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    x->cr0 |= CR0_PG;
    assert_int_equal(probe(f, VIEW_USER, USER, false), KEEP_OUT);
    assert_int_equal(reads(f, VIEW_USER, USER), stamp(DATA + PAGE_SIZE));
    f->ram.epoch++;                                                /* what was mapped may be no RAM any more */
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    assert_int_equal(probe(f, VIEW_USER, USER, false), KEEP_OUT);
}

/* ---- code ---- */
static void test_protect(void **state)
{
    struct fixture *f = *state;
    u64 frame = 4 * MiB + 21 * PAGE_SIZE;
    put(f, KERNEL, 2, 4 * MiB | P | W | PS | A | D | G);
    put(f, KERNEL + 2 * MiB, 2, 4 * MiB | P | W | PS | A | D | G);
    for (unsigned i = 0; i < 40; i++)                              /* one frame at many addresses, others between them */
        put(f, USER + i * PAGE_SIZE, 1, (i & 1 ? frame : DATA + i * PAGE_SIZE) | P | U | W | A | D);
    writes(f, VIEW_SUPER, KERNEL);
    writes(f, VIEW_SUPER, KERNEL + 2 * MiB);
    for (unsigned i = 0; i < 40; i++)
        writes(f, VIEW_USER, USER + i * PAGE_SIZE);
    f->code[frame >> PAGE_SHIFT] = 1;
    shadow_protect(f->c, frame + 77);
    for (unsigned i = 0; i < 40; i++) {
        assert_int_equal(probe(f, VIEW_USER, USER + i * PAGE_SIZE, false), i & 1 ? stamp(frame) : stamp(DATA + i * PAGE_SIZE));
        assert_int_equal(probe(f, VIEW_USER, USER + i * PAGE_SIZE, true), i & 1 ? KEEP_OUT : stamp(DATA + i * PAGE_SIZE));
    }
    for (unsigned i = 0; i < 1024; i++)
        assert_int_equal(probe(f, VIEW_SUPER, KERNEL + i * PAGE_SIZE, true) == KEEP_OUT, i % 512 == 21);
    assert_int_equal(stats(f).protects, 22);
    shadow_protect(f->c, frame);
    assert_int_equal(stats(f).protects, 22);
    assert_int_equal(writes(f, VIEW_USER, USER + PAGE_SIZE), SLOW);
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 21 * PAGE_SIZE), SLOW);
    shadow_flush(f->c, FLUSH_ALL, 0, 0);                           /* gives nothing back */
    assert_int_equal(probe(f, VIEW_USER, USER + PAGE_SIZE, true), KEEP_OUT);
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 21 * PAGE_SIZE, true), KEEP_OUT);
    f->code[frame >> PAGE_SHIFT] = 0;
    assert_int_equal(writes(f, VIEW_USER, USER + PAGE_SIZE), stamp(frame));
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 21 * PAGE_SIZE), stamp(frame));
    f->code[frame >> PAGE_SHIFT] = 1;
    shadow_protect(f->c, frame);
    assert_int_equal(stats(f).protects, 24);
    shadow_protect(f->c, PROTECT_ALL);
    assert_int_equal(probe(f, VIEW_USER, USER, true), KEEP_OUT);
    assert_int_equal(writes(f, VIEW_USER, USER), stamp(DATA));
}

/* A tracked RAM: what was clean is written by way of a fill, and that one page only. */
static bool was_written(struct fixture *f, u64 gpa)
{
    u64 bits[RAM_SIZE / PAGE_SIZE / 64] = { 0 };
    ram_take_dirty(&f->ram, 0, bits);
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    return bits[gpa / PAGE_SIZE / 64] >> (gpa / PAGE_SIZE % 64) & 1;
}

static void test_tracked(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < 8; i++)
        put(f, USER + i * PAGE_SIZE, 1, (DATA + i * PAGE_SIZE) | P | U | W | A | D);
    put(f, KERNEL, 2, 4 * MiB | P | W | PS | A | D);
    writes(f, VIEW_USER, USER);
    writes(f, VIEW_SUPER, KERNEL);
    assert_int_equal(ram_track(&f->ram, true), 0);
    shadow_flush(f->c, FLUSH_ALL, 0, 0);                           /* (as tlb_check_epoch() has it done) */
    for (unsigned round = 0; round < 2; round++) {
        assert_int_equal(probe(f, VIEW_USER, USER, true), KEEP_OUT);
        assert_int_equal(probe(f, VIEW_SUPER, KERNEL, true), KEEP_OUT);
        assert_int_equal(reads(f, VIEW_SUPER, KERNEL + 3 * PAGE_SIZE), stamp(4 * MiB + 3 * PAGE_SIZE));
        assert_int_equal(writes(f, VIEW_USER, USER + 2 * PAGE_SIZE), stamp(DATA + 2 * PAGE_SIZE));
        assert_int_equal(writes(f, VIEW_SUPER, KERNEL + 6 * PAGE_SIZE), stamp(4 * MiB + 6 * PAGE_SIZE));
        for (unsigned i = 0; i < 8; i++) {
            assert_int_equal(probe(f, VIEW_USER, USER + i * PAGE_SIZE, true) != KEEP_OUT, i == 2);
            assert_int_equal(probe(f, VIEW_SUPER, KERNEL + i * PAGE_SIZE, true) != KEEP_OUT, i == 6);
        }
        assert_true(was_written(f, DATA + (round ? 2 : 6) * PAGE_SIZE));
    }
    ram_track(&f->ram, false);
    shadow_flush(f->c, FLUSH_ALL, 0, 0);
    assert_int_equal(writes(f, VIEW_SUPER, KERNEL), stamp(4 * MiB));
    assert_int_equal(probe(f, VIEW_SUPER, KERNEL + 7 * PAGE_SIZE, true), stamp(4 * MiB + 7 * PAGE_SIZE));
}

/* ---- bounds ---- */
static void test_mappings(void **state)
{
    struct fixture *f = *state;
    put(f, USER, 2, 0);
    for (unsigned i = 0; i < 512; i++)                             /* every second frame: a mapping each */
        put(f, USER + i * PAGE_SIZE, 1, (DATA + (i ^ 1) * PAGE_SIZE) | P | U | W | A | D);
    for (unsigned i = 0; i < 512; i++)
        writes(f, VIEW_USER, USER + i * PAGE_SIZE);
    assert_int_equal(stats(f).mapped, 512);
    assert_int_equal(host_mappings(f), 512);
    assert_in_range(stats(f).mappings, 513, 520);
    put(f, KERNEL, 2, 4 * MiB | P | W | PS | A | D);
    put(f, KERNEL + 2 * MiB, 2, 6 * MiB | P | W | PS | A | D);
    writes(f, VIEW_SUPER, KERNEL);
    writes(f, VIEW_SUPER, KERNEL + 2 * MiB);
    assert_int_equal(host_mappings(f), 513);                       /* neighbours are one */
    shadow_protect(f->c, 5 * MiB);
    assert_int_equal(host_mappings(f), 512 + 3);
    u32 counted = stats(f).mappings - stats(f).windows;
    assert_in_range(counted, 512 + 3, 512 + 8);
    f->c->bt.shadow->limit = 300;
    put(f, USER + 2 * MiB, 1, DATA | P | U | W | A | D);
    assert_int_equal(writes(f, VIEW_USER, USER + 2 * MiB), stamp(DATA));
    assert_true(host_mappings(f) < 300);
    for (unsigned i = 0; i < 512; i++)
        assert_int_equal(writes(f, VIEW_USER, USER + i * PAGE_SIZE), stamp(DATA + (i ^ 1) * PAGE_SIZE));
    assert_true(host_mappings(f) <= 300);
    assert_true(stats(f).evictions > 0);
}

/* More slots than windows: the oldest give way, and never the wrong memory shows. */
static void test_windows(void **state)
{
    struct fixture *f = *state;
    for (unsigned round = 0; round < 2; round++)
        for (unsigned i = 0; i < 100; i++) {
            u64 la = (u64)i << 39 | 0x3000;
            if (!round)
                put(f, la, 1, (DATA + i * PAGE_SIZE) | P | U | W | A | D);
            assert_int_equal(reads(f, VIEW_USER, la), stamp(DATA + i * PAGE_SIZE));
        }
    assert_true(stats(f).windows <= SHADOW_WINDOWS);
    assert_true(stats(f).evictions >= 100);
    for (unsigned i = 0; i < 100; i++) {
        u64 la = (u64)i << 39 | 0x3000, val = probe(f, VIEW_USER, la, false);
        assert_true(val == KEEP_OUT || val == stamp(DATA + i * PAGE_SIZE));
    }
}

static void test_regions_run_out(void **state)
{
    struct fixture *f = *state;
    u64 table = new_table(f), dir = new_table(f), base = USER & ~(GiB - 1);
    *entry_at(f, table) = DATA | P | U | W | A | D;
    for (unsigned i = 0; i < 512; i++)
        *entry_at(f, dir + 8 * i) = table | P | U | W | A;
    for (unsigned i = 0; i < 6; i++)                               /* 3,072 regions with a page each */
        put(f, base + i * GiB, 3, dir | P | U | W | A);
    for (unsigned i = 0; i < 6 * 512; i++)
        assert_int_equal(writes(f, VIEW_USER, base + i * 2 * MiB), stamp(DATA));
    assert_true(stats(f).regions < CELLS);
    shadow_protect(f->c, DATA);
    f->code[DATA >> PAGE_SHIFT] = 1;
    for (unsigned i = 0; i < 6 * 512; i++)
        assert_int_equal(probe(f, VIEW_USER, base + i * 2 * MiB, true), KEEP_OUT);
}

static void test_no_address_space(void **state)
{
    struct fixture *f = *state;
    shadow_close(f->c);
    pid_t child = fork();
    if (!child) {
        struct rlimit lim = { 64 * GiB, 64 * GiB };
        setrlimit(RLIMIT_AS, &lim);
        int e = shadow_open(f->c, NULL);
        _exit(e == -12 && strstr(err_last(), "address space") && !f->c->bt.shadow && !shadow_possible(f->c) ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    assert_int_equal(status, 0);
}

/* ---- random: edits of page tables, flushes, switches and accesses, against a walk of our own ---- */
#define SPACES 3u
#define PLACES 10u                   /* regions of 2 MiB in which pages are */
#define TRIED 12u                    /* pages of each */

struct truth {                       /* what the tables say now */
    u64 gpa;
    bool present, accessed, user, writable, dirty;
};

static struct truth oracle(struct fixture *f, u64 cr3, u64 la)
{
    struct truth t = { .accessed = true, .user = true, .writable = true };
    u64 table = cr3;
    for (unsigned level = 4; level; level--) {
        u64 e = *entry_at(f, table + (la >> (12 + 9 * (level - 1)) & 511) * 8), size = BIT(12 + 9 * (level - 1));
        if (!(e & P))
            return t;
        t.accessed = t.accessed && e & A;
        t.user = t.user && e & U;
        t.writable = t.writable && e & W;
        if (level == 1 || e & PS) {
            t.present = true;
            t.dirty = e & D;
            t.gpa = (e & PTE_ADDR & ~(size - 1)) | (la & (size - 1));
            return t;
        }
        table = e & PTE_ADDR;
    }
    return t;
}

struct world {
    struct fixture *f;
    u64 cr3[SPACES], place[PLACES];
    unsigned cur;
    /* Edited since the last flush that covered it: then the TLB may still know the old one. [SPACES] is the supervisor's. global: by a flush of all, or of the page. */
    bool edited[SPACES + 1][PLACES][TRIED], global[PLACES][TRIED];
    u64 seed, reached, faulted, slow;
};

static unsigned rnd(struct world *w, unsigned n)
{
    w->seed = w->seed * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((w->seed >> 33) % n);
}

static const u64 places[PLACES] = {
    0, USER, USER + 2 * MiB, 0x00007ffffffff000 & ~(2 * MiB - 1), 0x0000400000000000,
    0xffff800000000000, KERNEL, KERNEL + 2 * MiB, TEXT, 0xffffffffffe00000,
};

static bool is_upper(unsigned place)
{
    return places[place] >> 63;
}

static u64 page_of(unsigned place, unsigned i)                     /* some next to each other, some not */
{
    return places[place] + (i < 8 ? i : 500 + i) * PAGE_SIZE;
}

static u64 random_leaf(struct world *w, unsigned place, unsigned i)
{
    static const u64 flags[] = { 0, A, A, A | D, A | D, A | D, D };
    u64 gpa = rnd(w, 4) ? (rnd(w, 2) ? DATA : HIGH) + (16 * place + i) * PAGE_SIZE : DATA + rnd(w, 64) * PAGE_SIZE;
    if (!rnd(w, 20))
        gpa = HOLE;
    u64 e = gpa | flags[rnd(w, 7)] | (rnd(w, 4) ? W : 0) | (rnd(w, 12) ? P : 0) | (rnd(w, 3) ? 0 : NX) | (rnd(w, 4) ? 0 : 0x600);
    e |= rnd(w, 16) ? (is_upper(place) ? 0 : U) : (is_upper(place) ? U : 0);
    return e | (is_upper(place) && rnd(w, 2) ? G : 0);
}

static void edited(struct world *w, unsigned owner, unsigned place, unsigned i, u64 old, u64 new)
{
    w->edited[owner][place][i] = true;
    if (owner == SPACES)
        w->global[place][i] |= (old | new) & G;
}

/* A leaf, or now and then something above it. */
static void edit(struct world *w)
{
    struct fixture *f = w->f;
    unsigned place = rnd(w, PLACES), i = rnd(w, TRIED), space = rnd(w, SPACES), owner = is_upper(place) ? SPACES : space;
    u64 *pde = entry_at(f, slot_of(f, w->cr3[space], places[place], 2));
    if (rnd(w, 8) && !(*pde & PS)) {
        u64 *e = entry_at(f, slot_of(f, w->cr3[space], page_of(place, i), 1)), new = random_leaf(w, place, i);
        edited(w, owner, place, i, *e, new);
        *e = new;
        return;
    }
    static u64 table[SPACES + 1][PLACES];                          /* what large pages stand in for */
    u64 new, old = *pde;
    if (!(old & PS))
        table[owner][place] = old & PTE_ADDR;
    if (rnd(w, 3))
        new = table[owner][place] | P | (rnd(w, 8) ? W : 0) | (is_upper(place) && rnd(w, 8) ? 0 : U) | (rnd(w, 8) ? A : 0);
    else
        new = (rnd(w, 2) ? 4 * MiB : HIGH + 4 * MiB) | P | PS | A | (rnd(w, 2) ? D : 0) | (rnd(w, 4) ? W : 0) | (is_upper(place) ? (rnd(w, 2) ? G : 0) : U);
    for (unsigned j = 0; j < TRIED; j++) {
        edited(w, owner, place, j, old & PS ? old : G, new & PS ? new : G);
    }
    *pde = new;
}

static void forget(struct world *w, unsigned owner, bool globals)
{
    for (unsigned p = 0; p < PLACES; p++)
        for (unsigned i = 0; i < TRIED; i++)
            if (globals || owner != SPACES || !w->global[p][i]) {
                w->edited[owner][p][i] = false;
                if (owner == SPACES)
                    w->global[p][i] = false;
            }
}

static void flush(struct world *w)
{
    unsigned what = rnd(w, 8), space = rnd(w, SPACES), place = rnd(w, PLACES), i = rnd(w, TRIED);
    struct icpu *c = w->f->c;
    if (what < 3) {
        unsigned owner = is_upper(place) ? SPACES : w->cur;
        shadow_flush(c, FLUSH_PAGE, page_of(place, i) + rnd(w, 4096), w->cur);
        w->edited[owner][place][i] = w->global[place][i] = false;
    } else if (what < 5) {
        shadow_flush(c, FLUSH_NONGLOBAL, 0, space);
        forget(w, space, false);
        if (space == w->cur)
            forget(w, SPACES, false);
    } else if (what < 6) {
        shadow_flush(c, FLUSH_ALL, 0, 0);
        for (unsigned s = 0; s <= SPACES; s++)
            forget(w, s, true);
    } else {
        w->cur = space;
        context(w->f, w->cr3[space], space);
        forget(w, SPACES, false);
    }
}

/* What is reachable without a fill must be allowed by the tables. */
static void check_probe(struct world *w, enum tlb_view_id view, unsigned place, unsigned i, bool write)
{
    u64 la = page_of(place, i), val = probe(w->f, view, la, write);
    bool upper = is_upper(place);
    if (val == KEEP_OUT)
        return;
    assert_true(!upper || view != VIEW_USER);
    if (w->edited[upper ? SPACES : w->cur][place][i])
        return;
    struct truth t = oracle(w->f, w->cr3[w->cur], la);
    assert_true(t.present && t.accessed && (!upper || !t.user) && (view == VIEW_SUPER_OPEN || t.user == (view == VIEW_USER)));
    assert_int_equal(val, stamp(t.gpa));
    if (write)
        assert_true(t.writable && t.dirty && !w->f->code[t.gpa >> PAGE_SHIFT]);
}

/* What a fill says must be what the tables say. */
static void check_reach(struct world *w, enum tlb_view_id view, unsigned place, unsigned i, bool write)
{
    u64 la = page_of(place, i);
    bool upper = is_upper(place);
    if (w->edited[upper ? SPACES : w->cur][place][i])
        return;
    struct truth t = oracle(w->f, w->cr3[w->cur], la);
    bool allowed = t.present && (view == VIEW_USER ? t.user : !t.user || view == VIEW_SUPER_OPEN) && (!write || t.writable);
    u64 val = write ? writes(w->f, view, la) : reads(w->f, view, la);
    if (!allowed) {
        assert_int_equal(val, FAULTED);
        w->faulted++;
    } else if (!upper && !t.user && view == VIEW_SUPER_OPEN && val == SLOW) {
        w->slow++;                                                 /* the user's window is open there */
    } else if ((upper && t.user) || !ram_hva(&w->f->ram, t.gpa) || (write && w->f->code[t.gpa >> PAGE_SHIFT])) {
        assert_int_equal(val, SLOW);
        w->slow++;
    } else {
        assert_int_equal(val, stamp(t.gpa));
        w->reached++;
    }
}

static void new_code(struct world *w)
{
    u64 gpa = (rnd(w, 2) ? DATA : HIGH) + rnd(w, 192) * PAGE_SIZE;
    u8 *code = &w->f->code[gpa >> PAGE_SHIFT];
    *code = !*code;
    if (*code)
        shadow_protect(w->f->c, gpa);
}

static void make_world(struct world *w)
{
    struct fixture *f = w->f;
    for (unsigned s = 0; s < SPACES; s++) {
        w->cr3[s] = s ? new_table(f) : f->v.x.cr3;
        for (unsigned p = 0; p < PLACES; p++) {
            if (s && is_upper(p))
                *entry_at(f, w->cr3[s] + (places[p] >> 39 & 511) * 8) = *entry_at(f, w->cr3[0] + (places[p] >> 39 & 511) * 8);
            for (unsigned i = 0; i < TRIED && (!s || !is_upper(p)); i++)
                *entry_at(f, slot_of(f, w->cr3[s], page_of(p, i), 1)) = random_leaf(w, p, i);
        }
    }
}

static void test_random(void **state)
{
    struct world *w = calloc(1, sizeof *w);
    const char *seed = getenv("SHADOW_SEED"), *steps = getenv("SHADOW_STEPS");
    w->f = *state;
    w->seed = seed ? strtoull(seed, NULL, 0) : (u64)time(NULL);
    print_message("# SHADOW_SEED=%llu\n", (unsigned long long)w->seed);
    make_world(w);
    for (unsigned long n = steps ? strtoul(steps, NULL, 0) : 120000; n; n--) {
        unsigned what = rnd(w, 100), place = rnd(w, PLACES), i = rnd(w, TRIED);
        enum tlb_view_id view = (enum tlb_view_id)rnd(w, VIEWS);
        bool write = rnd(w, 2);
        if (what < 8)
            edit(w);
        else if (what < 15)
            flush(w);
        else if (what < 16)
            new_code(w);
        else if (what < 18)
            shadow_expected(w->f->c);
        else if (what < 55)
            check_probe(w, view, place, i, write);
        else
            check_reach(w, view, place, i, write);
    }
    print_message("# %llu reached, %llu faulted, %llu slow\n", (unsigned long long)w->reached, (unsigned long long)w->faulted, (unsigned long long)w->slow);
    assert_true(w->reached > 1000 && w->faulted > 100 && w->slow > 100);
    struct shadow_stats st = stats(w->f);
    assert_true(st.dropped > 100 && st.downgraded > 10 && !st.refused);
    u32 counted = st.mappings - st.windows, real = host_mappings(w->f);
    assert_in_range(counted + 1, real, 2 * real + 1);
    free(w);
}

/* ---- what it costs: figures for DESIGN.md; only their order of magnitude is a test ---- */
static struct fixture *filling;
static volatile bool probe_write;

static void fill_handler(int sig UNUSED, siginfo_t *info, void *context UNUSED)
{
    u64 la;
    u32 error;
    enum tlb_view_id view = VIEW_USER;
    bool ours = shadow_guest(filling->c, view, (u64)(uintptr_t)info->si_addr, &la);
    if (!ours)
        ours = shadow_guest(filling->c, view = VIEW_SUPER, (u64)(uintptr_t)info->si_addr, &la);
    if (!ours || shadow_fill(filling->c, view, la, probe_write ? MMU_WRITE : MMU_READ, &error) != SHADOW_FILLED)
        abort();
}

static double cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

static double touch(struct fixture *f, enum tlb_view_id view, u64 la, unsigned n, unsigned step, bool write)
{
    double start = cpu_ns();
    probe_write = write;
    for (unsigned i = 0; i < n; i++, la += step * PAGE_SIZE) {
        volatile u64 *p = (u64 *)(uintptr_t)(la + f->c->bt.delta[view][la >> 39 & 511]);
        if (write)
            *p = 1;
        else
            (void)*p;
    }
    return (cpu_ns() - start) / n;
}

static void map_pages(struct fixture *f, u64 la, unsigned n, unsigned group, u64 flags) /* runs of group frames */
{
    for (unsigned i = 0; i < n; i++)
        put(f, la + i * PAGE_SIZE, 1, (DATA + (i / group ^ (group < n)) * group * PAGE_SIZE + i % group * PAGE_SIZE) | flags);
}

static double flush_cost(struct fixture *f, unsigned pages)
{
    double start = cpu_ns();
    shadow_flush(f->c, FLUSH_NONGLOBAL, 0, 0);
    return (cpu_ns() - start) / pages;
}

static void test_costs(void **state)
{
    enum { N = 2048 };
    struct fixture *f = filling = *state;
    struct sigaction sa = { .sa_sigaction = fill_handler, .sa_flags = SA_SIGINFO };
    double single[2] = { 0 }, compare = 0, drop = 0;
    put(f, USER, 1, DATA | P | U | W | A | D);
    put(f, KERNEL, 1, DATA | P | W | A | D | G);
    reads(f, VIEW_USER, USER);
    reads(f, VIEW_SUPER, KERNEL);
    sigaction(SIGSEGV, &sa, NULL);
    for (unsigned write = 0; write < 2; write++)
        for (unsigned group = 1; group <= 512; group *= group == 1 ? 16 : 32) {
            u64 flags = P | U | W | A | D;
            map_pages(f, USER, N, group, flags);
            double each = touch(f, VIEW_USER, USER, N, 1, write), all = flush_cost(f, N), gone;
            map_pages(f, USER, N, group, 0);
            gone = flush_cost(f, N);
            map_pages(f, USER, N, group, flags);
            double one = touch(f, VIEW_USER, USER, N / group, group, write);
            print_message("# %s, runs of %3u: %4.0f ns per page if all are touched, %5.0f for one of each run; flush: %.1f ns per page kept, %.0f per page dropped\n",
                          write ? "write" : "read ", group, each, one, all, gone);
            map_pages(f, USER, N, group, 0);
            flush_cost(f, N);
            if (group == 1) {
                single[write] = each;
                compare = all;
                drop = gone;
            }
        }
    map_pages(f, USER, N, 1, P | U | W | A);
    touch(f, VIEW_USER, USER, N, 1, false);
    print_message("# read-only, then written: %.0f ns per page\n", touch(f, VIEW_USER, USER, N, 1, true));
    map_pages(f, USER, N, 1, P | U | A);
    print_message("# flush that makes it read-only: %.0f ns per page\n", flush_cost(f, N));
    for (unsigned i = 0; i < 3; i++)
        put(f, KERNEL + i * 2 * MiB, 2, (4 * MiB + i * 2 * MiB) | P | W | PS | A | D | G);
    print_message("# large page: %.0f ns", touch(f, VIEW_SUPER, KERNEL, 3, 512, true));
    print_message(", then %.0f for each page written first", touch(f, VIEW_SUPER, KERNEL + PAGE_SIZE, 511, 1, true));
    double start = cpu_ns();
    for (unsigned i = 0; i < 200; i++)
        shadow_protect(f->c, 4 * MiB + 5 * i * PAGE_SIZE);
    print_message(", a page of it protected %.0f", (cpu_ns() - start) / 200);
    start = cpu_ns();
    for (unsigned i = 0; i < 200; i++)
        shadow_protect(f->c, 8 * MiB + i * PAGE_SIZE);
    print_message(", next to each other %.0f\n", (cpu_ns() - start) / 200);
    start = cpu_ns();
    for (unsigned i = 0; i < 1000; i++)
        shadow_context(f->c, i & 1);
    print_message("# switch: %.0f ns", (cpu_ns() - start) / 1000);
    shadow_context(f->c, 0);
    start = cpu_ns();
    for (unsigned i = 0; i < 1000; i++)
        shadow_flush(f->c, FLUSH_PAGE, USER + i * PAGE_SIZE, 0);
    print_message(", INVLPG of what has not changed: %.0f ns\n", (cpu_ns() - start) / 1000);
    assert_true(single[0] > 20 * compare && single[1] > 20 * compare && drop > compare);
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_closed), TEST(test_open_slot), TEST(test_rights), TEST(test_around), TEST(test_end_of_ram), TEST(test_large), TEST(test_huge),
        TEST(test_revalidate), TEST(test_invlpg), TEST(test_expected), TEST(test_reuse), TEST(test_moved),
        TEST(test_changed_without_flush), TEST(test_contexts), TEST(test_low_supervisor), TEST(test_user_global), TEST(test_odd_states),
        TEST(test_protect), TEST(test_tracked), TEST(test_mappings), TEST(test_windows), TEST(test_regions_run_out), TEST(test_no_address_space),
        TEST(test_random), TEST(test_costs),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
