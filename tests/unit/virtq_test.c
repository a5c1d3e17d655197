/* The ring reader: honest chains in all shapes, and every way in which a driver can break the rules. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "../dev/virtio_guest.h"

#define BUF 0x200000ull
#define TABLE 0x300000ull
#define N 8

static struct guest g;
static struct gq r;
static struct virtq q;
static struct virtq_chain c;

static void fresh(bool event_idx, bool indirect)
{
    gq_init(&r, &g, N);
    virtq_chain_free(&c);
    virtq_init(&q, &g.ram, 256);
    q.size = N;
    q.desc = r.desc;
    q.avail = r.avail;
    q.used = r.used;
    q.event_idx = event_idx;
    q.indirect = indirect;
    virtq_enable(&q);
    assert_false(q.broken);
}

static int setup(void **state UNUSED)
{
    guest_new(&g);
    return 0;
}

static int teardown(void **state UNUSED)
{
    virtq_chain_free(&c);
    guest_free(&g);
    return 0;
}

static void table_entry(unsigned n, u64 gpa, u32 len, u16 flags, u16 next)
{
    struct vring_desc d = { .addr = gpa, .len = len, .flags = flags, .next = next };

    put(&g, TABLE + 16 * n, &d, sizeof(d));
}

static void expect_broken(void)
{
    assert_int_equal(virtq_pop(&q, &c), -EPROTO);
    assert_true(q.broken);
    assert_int_equal(virtq_pop(&q, &c), -EPROTO);
    assert_int_equal(gq_used_idx(&r), 0);
}

/* Reads one half, writes the other, and finds the used element. */
static void test_round_trip(void **state UNUSED)
{
    char out[10] = "", in[4];
    u32 id, len;

    fresh(false, false);
    assert_int_equal(virtq_pop(&q, &c), 0);
    put(&g, BUF, "hello", 5);
    put(&g, BUF + 100, "world", 5);
    gq_add(&r, (struct buf[]){ { BUF, 5, false }, { BUF + 100, 5, false }, { BUF + 200, 2, true }, { BUF + 300, 3, true } }, 4);
    assert_int_equal(virtq_pop(&q, &c), 1);
    assert_int_equal(c.out_total, 10);
    assert_int_equal(c.in_total, 5);
    assert_int_equal(virtq_read(&c, out, 7), 7);
    assert_int_equal(c.out_len, 3);
    assert_int_equal(virtq_read(&c, out + 7, 99), 3);
    assert_memory_equal(out, "helloworld", 10);
    assert_int_equal(virtq_write(&c, "abcdefgh", 8), 5);
    virtq_push(&q, &c, 5);
    assert_true(gq_used(&r, &id, &len));
    assert_int_equal(id, 0);
    assert_int_equal(len, 5);
    get(&g, BUF + 200, in, 2);
    assert_memory_equal(in, "ab", 2);
    get(&g, BUF + 300, in, 3);
    assert_memory_equal(in, "cde", 3);
    assert_int_equal(virtq_pop(&q, &c), 0);
}

static void test_last_byte(void **state UNUSED)
{
    u8 *last;
    u8 b;

    fresh(false, false);
    gq_add(&r, (struct buf[]){ { BUF, 4, true }, { BUF + 100, 1, true } }, 2);
    assert_int_equal(virtq_pop(&q, &c), 1);
    last = virtq_take_last_in(&c);
    assert_int_equal(c.in_len, 4);
    assert_int_equal(c.ins, 1);
    *last = 0x5a;
    get(&g, BUF + 100, &b, 1);
    assert_int_equal(b, 0x5a);
    for (int i = 0; i < 4; i++)
        assert_non_null(virtq_take_last_in(&c));
    assert_null(virtq_take_last_in(&c));
}

/* A buffer across two runs of memory has two pieces. */
static void test_seam(void **state UNUSED)
{
    char back[8];

    fresh(false, false);
    put(&g, GUEST_SEAM - 4, "seamless", 8);
    gq_add(&r, (struct buf[]){ { GUEST_SEAM - 4, 8, false } }, 1);
    assert_int_equal(virtq_pop(&q, &c), 1);
    assert_int_equal(virtq_read(&c, back, 8), 8);
    assert_memory_equal(back, "seamless", 8);
}

/* 200,000 chains: the indices wrap three times, entries come back in any order. */
static void test_wrap(void **state UNUSED)
{
    static struct virtq_chain a, b;
    u32 id, len;

    fresh(true, false);
    for (unsigned i = 0; i < 100000; i++) {
        u16 first = gq_add(&r, (struct buf[]){ { BUF, 1, false } }, 1), second = gq_add(&r, (struct buf[]){ { BUF, 1, true } }, 1);

        assert_int_equal(virtq_pop(&q, &a), 1);
        assert_int_equal(virtq_pop(&q, &b), 1);
        virtq_push(&q, &b, 1);
        virtq_push(&q, &a, 0);
        assert_true(gq_used(&r, &id, &len) && id == second && len == 1);
        assert_true(gq_used(&r, &id, &len) && id == first && len == 0);
    }
    virtq_chain_free(&a);
    virtq_chain_free(&b);
}

/* A frame in several buffers: none of them is given back before all are. */
static void test_push_all(void **state UNUSED)
{
    struct virtq_chain all[3] = { 0 };
    u32 id, len;

    fresh(true, true);
    gq_set_used_event(&r, 2);
    for (unsigned round = 0; round < 5; round++) {                 /* over the ring's end, too */
        for (unsigned i = 0; i < 3; i++)
            gq_add(&r, (struct buf[]){ { BUF + 100 * i, 100, true } }, 1);
        for (unsigned i = 0; i < 3; i++)
            assert_int_equal(virtq_pop(&q, &all[i]), 1);
        assert_int_equal(gq_used_idx(&r), 3 * round);
        virtq_push_all(&q, all, (u32[]){ 100, 99, 98 }, 3);
        for (unsigned i = 0; i < 3; i++) {
            assert_true(gq_used(&r, &id, &len));
            assert_int_equal(id, (3 * round + i) % N);
            assert_int_equal(len, 100 - i);
        }
        assert_false(gq_used(&r, &id, &len));
        assert_int_equal(virtq_wants_interrupt(&q), round == 0);
    }
    for (unsigned i = 0; i < 3; i++)
        virtq_chain_free(&all[i]);
}

/* Saves the chain, loads it into nothing. */
static void save_and_load(struct virtq_chain *chain)
{
    struct stream out, in;

    stream_save_init(&out);
    virtq_chain_state(&q, chain, &out);
    assert_int_equal(out.error, 0);
    virtq_drop(&q, chain);
    virtq_chain_free(chain);
    stream_load_init(&in, out.buf, out.len);
    virtq_chain_state(&q, chain, &in);
    assert_int_equal(in.error, 0);
    assert_int_equal(in.pos, in.len);
    for (size_t i = 0; i < out.len; i++) {                         /* cut short, or with a byte changed: an error, or a chain */
        struct virtq_chain other = { 0 };

        stream_load_init(&in, out.buf, i);
        virtq_chain_state(&q, &other, &in);
        assert_int_not_equal(in.error, 0);
        out.buf[i] ^= 0xff;
        stream_load_init(&in, out.buf, out.len);
        virtq_chain_state(&q, &other, &in);
        out.buf[i] ^= 0xff;
        virtq_drop(&q, &other);
        virtq_chain_free(&other);
    }
    stream_free(&out);
}

static void test_unpop_and_state(void **state UNUSED)
{
    char buf[4];
    u16 head;

    fresh(false, false);
    put(&g, BUF, "abcd", 4);
    head = gq_add(&r, (struct buf[]){ { BUF, 4, false }, { BUF + 64, 9, true } }, 2);
    assert_int_equal(virtq_pop(&q, &c), 1);
    virtq_unpop(&q, &c);
    assert_int_equal(virtq_pop(&q, &c), 1);
    assert_int_equal(virtq_read(&c, buf, 1), 1);
    save_and_load(&c);
    assert_int_equal(c.head, head);
    assert_int_equal(c.out_len, 4);
    assert_int_equal(c.in_len, 9);
    assert_int_equal(virtq_read(&c, buf, 4), 4);
    assert_memory_equal(buf, "abcd", 4);
    virtq_push(&q, &c, 0);
}

/* --- packed rings --- */

static void fresh_packed(bool event_idx, u16 size)
{
    fresh(event_idx, true);
    virtq_reset(&q);
    r.packed = true;
    r.size = size;
    q.size = size;
    q.desc = r.desc;
    q.avail = r.avail;
    q.used = r.used;
    q.packed = true;
    q.event_idx = event_idx;
    q.indirect = true;
    virtq_enable(&q);
    assert_false(q.broken);
}

/* Chains of all lengths, over the ring's end again and again, answered out of order; sizes need not be powers of two. */
static void test_packed_round_trips(void **state UNUSED)
{
    struct virtq_chain a = { 0 }, b = { 0 };
    char buf[8];
    u32 id, len;

    fresh_packed(false, 7);
    assert_int_equal(virtq_pop(&q, &a), 0);
    for (unsigned i = 0; i < 100; i++) {
        u16 first, second;

        put(&g, BUF, "packed", 6);
        first = gq_add(&r, (struct buf[]){ { BUF, 2, false }, { BUF + 2, 4, false }, { BUF + 100, 3, true } }, 1 + i % 3);
        assert_int_equal(virtq_pop(&q, &a), 1);
        assert_int_equal(virtq_pop(&q, &b), 0);
        second = gq_add(&r, (struct buf[]){ { BUF, 6, false }, { BUF + 200, 5, true } }, 2);
        assert_int_equal(virtq_pop(&q, &b), 1);
        virtq_unpop(&q, &b);
        assert_int_equal(virtq_pop(&q, &b), 1);
        assert_int_equal(virtq_pop(&q, &c), 0);
        assert_true(a.head == first && b.head == second && a.entries == 1 + i % 3 && b.entries == 2);
        if (i % 5 == 0)
            save_and_load(&b);
        assert_int_equal(virtq_read(&b, buf, 6), 6);
        assert_memory_equal(buf, "packed", 6);
        assert_int_equal(virtq_write(&b, "12345", 5), 5);
        assert_false(gq_used(&r, &id, &len));
        virtq_push(&q, &b, 5);
        assert_true(gq_used(&r, &id, &len));
        assert_true(id == second && len == 5);
        virtq_push(&q, &a, 0);
        assert_true(gq_used(&r, &id, &len));
        assert_true(id == first && len == 0);
        assert_false(gq_used(&r, &id, &len));
    }
    virtq_chain_free(&a);
    virtq_chain_free(&b);
}

static void test_packed_push_all(void **state UNUSED)
{
    struct virtq_chain all[3] = { 0 };
    u32 id, len;

    fresh_packed(false, 8);
    for (unsigned round = 0; round < 20; round++) {
        for (unsigned i = 0; i < 3; i++) {
            gq_add(&r, (struct buf[]){ { BUF, 10, true }, { BUF + 16, 10, true } }, 1 + (round + i) % 2);
            assert_int_equal(virtq_pop(&q, &all[i]), 1);
        }
        virtq_push_all(&q, all, (u32[]){ 7, 8, 9 }, 3);
        for (unsigned i = 0; i < 3; i++) {
            assert_true(gq_used(&r, &id, &len));
            assert_int_equal(len, 7 + i);
        }
        assert_false(gq_used(&r, &id, &len));
    }
    for (unsigned i = 0; i < 3; i++)
        virtq_chain_free(&all[i]);
}

static void test_packed_indirect(void **state UNUSED)
{
    struct gq_packed p = { TABLE, 32, 5, VRING_DESC_F_INDIRECT };

    fresh_packed(false, 8);
    table_entry(0, BUF, 3, 0, 0);
    table_entry(1, BUF + 64, 9, 0, VRING_DESC_F_WRITE);            /* where the split format has `next` are the flags here */
    gq_put_packed(&r, &p, 1);
    assert_int_equal(virtq_pop(&q, &c), 1);
    assert_true(c.head == 5 && c.entries == 1 && c.out_total == 3 && c.in_total == 9);
    virtq_push(&q, &c, 9);
}

static void expect_packed_broken(const struct gq_packed *p, unsigned n)
{
    fresh_packed(false, 8);
    gq_put_packed(&r, p, n);
    assert_int_equal(virtq_pop(&q, &c), -EPROTO);
    assert_true(q.broken);
    assert_int_equal(virtq_pop(&q, &c), -EPROTO);
}

static void test_packed_malformed(void **state UNUSED)
{
    struct gq_packed loop[8];

    for (unsigned i = 0; i < 8; i++)
        loop[i] = (struct gq_packed){ BUF, 1, 0, VRING_DESC_F_NEXT };
    expect_packed_broken(loop, 8);                                 /* no end */
    expect_packed_broken((struct gq_packed[]){ { BUF, 0, 0, 0 } }, 1);
    expect_packed_broken((struct gq_packed[]){ { GUEST_RAM, 1, 0, 0 } }, 1);
    expect_packed_broken((struct gq_packed[]){ { BUF, ~0u, 0, 0 } }, 1);
    expect_packed_broken((struct gq_packed[]){ { BUF, 1, 0, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT }, { BUF, 1, 0, 0 } }, 2);
    table_entry(0, BUF, 3, 0, VRING_DESC_F_INDIRECT);
    expect_packed_broken((struct gq_packed[]){ { TABLE, 16, 0, VRING_DESC_F_INDIRECT } }, 1);
    expect_packed_broken((struct gq_packed[]){ { TABLE, 15, 0, VRING_DESC_F_INDIRECT } }, 1);
    expect_packed_broken((struct gq_packed[]){ { TABLE, 0, 0, VRING_DESC_F_INDIRECT } }, 1);
    expect_packed_broken((struct gq_packed[]){ { TABLE, 16, 0, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT } }, 1);
    expect_packed_broken((struct gq_packed[]){ { TABLE, 16 * 1025, 0, VRING_DESC_F_INDIRECT } }, 1);
    fresh_packed(false, 8);
    q.desc = GUEST_RAM;
    virtq_enable(&q);
    assert_true(q.broken);
}

static void give_and_take(unsigned n)
{
    for (; n; n--) {
        gq_add(&r, (struct buf[]){ { BUF, 10, true } }, 1);
        assert_int_equal(virtq_pop(&q, &c), 1);
        virtq_push(&q, &c, 10);
    }
}

static void packed_event(u16 flags, u16 off, bool wrap)
{
    put(&g, r.avail, (u16[]){ (u16)(off | wrap << 15), flags }, 4);
}

static void test_packed_events(void **state UNUSED)
{
    u16 area[2];

    fresh_packed(true, 8);
    give_and_take(1);
    assert_true(virtq_wants_interrupt(&q));                        /* zero is: always */
    assert_false(virtq_wants_interrupt(&q));
    packed_event(VRING_PACKED_EVENT_FLAG_DISABLE, 0, true);
    give_and_take(1);
    assert_false(virtq_wants_interrupt(&q));
    packed_event(VRING_PACKED_EVENT_FLAG_DESC, 4, true);           /* when entry 4 is used */
    give_and_take(2);
    assert_false(virtq_wants_interrupt(&q));
    give_and_take(1);
    assert_true(virtq_wants_interrupt(&q));
    packed_event(VRING_PACKED_EVENT_FLAG_DESC, 1, false);          /* in the next round */
    give_and_take(4);
    assert_false(virtq_wants_interrupt(&q));
    give_and_take(1);
    assert_true(virtq_wants_interrupt(&q));
    packed_event(VRING_PACKED_EVENT_FLAG_DESC, 7, false);
    give_and_take(8);                                              /* past it, over the end */
    assert_true(virtq_wants_interrupt(&q));
    virtq_ignore(&q);
    get(&g, r.used, area, 4);
    assert_int_equal(area[1], VRING_PACKED_EVENT_FLAG_DISABLE);
    assert_false(virtq_listen(&q));
    get(&g, r.used, area, 4);
    assert_int_equal(area[1], VRING_PACKED_EVENT_FLAG_DESC);
    assert_int_equal(area[0], q.avail_idx | q.avail_wrap << 15);
    gq_add(&r, (struct buf[]){ { BUF, 10, true } }, 1);
    assert_true(virtq_listen(&q));
    assert_false(virtq_empty(&q));
}

static void test_indirect(void **state UNUSED)
{
    fresh(false, true);
    for (unsigned i = 0; i < 100; i++)
        table_entry(i, BUF + i, 1, (i >= 50 ? VRING_DESC_F_WRITE : 0) | (i < 99 ? VRING_DESC_F_NEXT : 0), (u16)(i + 1));
    gq_desc(&r, 0, BUF, 1, VRING_DESC_F_NEXT, 5);
    gq_desc(&r, 5, TABLE, 100 * 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE, 0); /* WRITE is ignored here, 2.7.5.3.2 */
    gq_offer(&r, 0);
    assert_int_equal(virtq_pop(&q, &c), 1);
    assert_int_equal(c.out_total, 51);
    assert_int_equal(c.in_total, 50);
    assert_int_equal(c.outs, 51);
    assert_int_equal(c.ins, 50);
}

/* --- rings that break the rules --- */

static void test_loop(void **state UNUSED)
{
    fresh(false, false);
    gq_desc(&r, 0, BUF, 1, VRING_DESC_F_NEXT, 1);
    gq_desc(&r, 1, BUF, 1, VRING_DESC_F_NEXT, 0);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_loop_in_table(void **state UNUSED)
{
    fresh(false, true);
    table_entry(0, BUF, 1, VRING_DESC_F_NEXT, 0);
    table_entry(1, BUF, 1, 0, 0);
    gq_desc(&r, 0, TABLE, 32, VRING_DESC_F_INDIRECT, 0);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_head_out_of_range(void **state UNUSED)
{
    fresh(false, false);
    gq_offer(&r, N);
    expect_broken();
}

static void test_next_out_of_range(void **state UNUSED)
{
    fresh(false, false);
    gq_desc(&r, 0, BUF, 1, VRING_DESC_F_NEXT, N);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_next_out_of_table(void **state UNUSED)
{
    fresh(false, true);
    table_entry(0, BUF, 1, VRING_DESC_F_NEXT, 2);
    table_entry(2, BUF, 1, 0, 0);
    gq_desc(&r, 0, TABLE, 32, VRING_DESC_F_INDIRECT, 0);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_zero_length(void **state UNUSED)
{
    fresh(false, false);
    gq_add(&r, (struct buf[]){ { BUF, 0, false } }, 1);
    expect_broken();
}

static void test_huge_lengths(void **state UNUSED)
{
    fresh(false, false);
    gq_add(&r, (struct buf[]){ { BUF, ~0u, false } }, 1);
    expect_broken();
    fresh(false, false);
    gq_add(&r, (struct buf[]){ { ~0ull - 10, 100, true } }, 1);
    expect_broken();
}

/* Each buffer lies in memory, but all together they are 4 GiB and more (2.7.5.2). */
static void test_huge_sum(void **state UNUSED)
{
    fresh(false, true);
    for (unsigned i = 0; i < 1024; i++)
        table_entry(i, 0, GUEST_RAM - PAGE_SIZE, i < 1023 ? VRING_DESC_F_NEXT : 0, (u16)(i + 1));
    gq_desc(&r, 0, TABLE, 1024 * 16, VRING_DESC_F_INDIRECT, 0);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_outside_memory(void **state UNUSED)
{
    fresh(false, false);
    gq_add(&r, (struct buf[]){ { GUEST_RAM - 1, 2, true } }, 1);
    expect_broken();
    fresh(false, false);
    gq_add(&r, (struct buf[]){ { GUEST_MEM, 4, false } }, 1);
    expect_broken();
}

static void test_readable_after_writable(void **state UNUSED)
{
    fresh(false, false);
    gq_add(&r, (struct buf[]){ { BUF, 1, true }, { BUF, 1, false } }, 2);
    expect_broken();
}

static void test_indirect_in_indirect(void **state UNUSED)
{
    fresh(false, true);
    table_entry(0, TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    gq_desc(&r, 0, TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_indirect_with_next(void **state UNUSED)
{
    fresh(false, true);
    table_entry(0, BUF, 1, 0, 0);
    gq_desc(&r, 0, TABLE, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 1);
    gq_desc(&r, 1, BUF, 1, 0, 0);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_indirect_not_negotiated(void **state UNUSED)
{
    fresh(false, false);
    table_entry(0, BUF, 1, 0, 0);
    gq_desc(&r, 0, TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_bad_tables(void **state UNUSED)
{
    static const struct { u64 gpa; u32 len; } bad[] = {
        { TABLE, 0 }, { TABLE, 15 }, { TABLE, 24 }, { TABLE, (VIRTQ_DESCS_MAX + 1) * 16 }, { GUEST_RAM - 16, 32 }, { GUEST_MEM, 16 }, { ~0ull - 15, 32 }
    };

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        fresh(false, true);
        table_entry(0, BUF, 1, 0, 0);
        gq_desc(&r, 0, bad[i].gpa, bad[i].len, VRING_DESC_F_INDIRECT, 0);
        gq_offer(&r, 0);
        expect_broken();
    }
}

/* More available entries than the ring has. */
static void test_avail_runs_away(void **state UNUSED)
{
    fresh(false, false);
    r.avail_idx = N;
    gq_desc(&r, 0, BUF, 1, 0, 0);
    gq_offer(&r, 0);
    expect_broken();
}

static void test_bad_areas(void **state UNUSED)
{
    struct { u64 *field; u64 val; } bad[] = {
        { &q.desc, 0x1008 }, { &q.desc, GUEST_RAM - 16 }, { &q.desc, ~0xfull }, { &q.avail, 0x1001 }, { &q.avail, GUEST_RAM - 4 },
        { &q.used, 0x1002 }, { &q.used, GUEST_RAM - 8 }, { &q.used, GUEST_MEM }
    };

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        fresh(false, false);
        *bad[i].field = bad[i].val;
        virtq_enable(&q);
        assert_true(q.broken);
        assert_int_equal(virtq_pop(&q, &c), -EPROTO);
    }
    fresh(false, false);
    q.size = 6;
    virtq_enable(&q);
    assert_true(q.broken);
}

/* A broken queue is not written to, and a reset mends it. */
static void test_reset_mends(void **state UNUSED)
{
    fresh(false, false);
    gq_offer(&r, N);
    expect_broken();
    virtq_push(&q, &c, 0);
    assert_int_equal(gq_used_idx(&r), 0);
    virtq_reset(&q);
    assert_false(q.broken || q.enabled);
    assert_int_equal(q.size, 256);
    assert_int_equal(virtq_pop(&q, &c), 0);
}

/* --- notifications --- */

static void push_one(void)
{
    gq_add(&r, (struct buf[]){ { BUF, 1, false } }, 1);
    assert_int_equal(virtq_pop(&q, &c), 1);
    virtq_push(&q, &c, 0);
}

static void test_interrupt_flag(void **state UNUSED)
{
    u16 flag = VRING_AVAIL_F_NO_INTERRUPT;

    fresh(false, false);
    assert_false(virtq_wants_interrupt(&q));                       /* nothing was pushed */
    push_one();
    assert_true(virtq_wants_interrupt(&q));
    assert_false(virtq_wants_interrupt(&q));
    put(&g, r.avail, &flag, 2);
    push_one();
    assert_false(virtq_wants_interrupt(&q));
}

static void test_interrupt_event(void **state UNUSED)
{
    fresh(true, false);
    push_one();
    assert_true(virtq_wants_interrupt(&q));                        /* used_event 0: the first one */
    push_one();
    assert_false(virtq_wants_interrupt(&q));
    gq_set_used_event(&r, 4);                                      /* when entry 4, the fifth, is used */
    push_one();
    push_one();
    assert_false(virtq_wants_interrupt(&q));
    push_one();
    push_one();
    assert_true(virtq_wants_interrupt(&q));                        /* a batch that goes past it */
    gq_set_used_event(&r, (u16)(q.used_idx - 1));
    assert_false(virtq_wants_interrupt(&q));
}

static void test_listen_flag(void **state UNUSED)
{
    u16 flags;

    fresh(false, false);
    virtq_ignore(&q);
    get(&g, r.used, &flags, 2);
    assert_int_equal(flags, VRING_USED_F_NO_NOTIFY);
    assert_false(virtq_listen(&q));
    get(&g, r.used, &flags, 2);
    assert_int_equal(flags, 0);
    virtq_ignore(&q);
    gq_add(&r, (struct buf[]){ { BUF, 1, false } }, 1);
    assert_true(virtq_listen(&q));
}

static void test_listen_event(void **state UNUSED)
{
    u16 event;

    fresh(true, false);
    push_one();
    push_one();
    virtq_ignore(&q);
    assert_false(virtq_listen(&q));
    get(&g, r.used + 4 + 8 * N, &event, 2);
    assert_int_equal(event, 2);
}

/* --- memory is announced before it is written --- */

static struct { unsigned begun, ended; u64 len; } dma;

static void on_begin(void *arg UNUSED, u64 gpa, u64 len)
{
    if (gpa < BUF || gpa >= TABLE)
        return;
    dma.begun++;
    dma.len += len;
}

static void on_end(void *arg UNUSED, u64 gpa, u64 len UNUSED)
{
    dma.ended += gpa >= BUF && gpa < TABLE;
}

static void test_dma_is_announced(void **state UNUSED)
{
    fresh(false, false);
    g.ram.on_begin_write = on_begin;
    g.ram.on_end_write = on_end;
    memset(&dma, 0, sizeof(dma));
    gq_add(&r, (struct buf[]){ { BUF, 5, false }, { BUF + 10, 6, true }, { BUF + 20, 7, true } }, 3);
    memset(&dma, 0, sizeof(dma));
    assert_int_equal(virtq_pop(&q, &c), 1);
    assert_int_equal(dma.begun, 2);
    assert_int_equal(dma.len, 13);
    assert_int_equal(dma.ended, 0);
    virtq_push(&q, &c, 13);
    assert_int_equal(dma.ended, 2);
    gq_add(&r, (struct buf[]){ { BUF, 4, true } }, 1);
    assert_int_equal(virtq_pop(&q, &c), 1);
    virtq_drop(&q, &c);
    assert_int_equal(dma.begun, 3);
    assert_int_equal(dma.ended, 3);
    g.ram.on_begin_write = g.ram.on_end_write = NULL;
}

static void test_state(void **state UNUSED)
{
    struct stream s;
    struct virtq copy;

    fresh(true, false);
    push_one();
    push_one();
    stream_save_init(&s);
    virtq_state(&q, &s);
    assert_int_equal(s.error, 0);
    struct stream l;
    stream_load_init(&l, s.buf, s.len);
    virtq_init(&copy, &g.ram, 256);
    virtq_state(&copy, &l);
    assert_int_equal(l.error, 0);
    assert_int_equal(copy.avail_idx, 2);
    assert_int_equal(copy.used_idx, 2);
    gq_add(&r, (struct buf[]){ { BUF, 3, false } }, 1);
    assert_int_equal(virtq_pop(&copy, &c), 1);
    assert_int_equal(c.out_total, 3);
    /* A saved state with a ring outside of memory is refused. */
    s.buf[2 + 7] = 0x7f;                                           /* the top byte of desc, after size */
    stream_load_init(&l, s.buf, s.len);
    virtq_init(&copy, &g.ram, 256);
    virtq_state(&copy, &l);
    assert_int_not_equal(l.error, 0);
    stream_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_last_byte), cmocka_unit_test(test_seam), cmocka_unit_test(test_wrap),
        cmocka_unit_test(test_push_all), cmocka_unit_test(test_unpop_and_state),
        cmocka_unit_test(test_packed_round_trips), cmocka_unit_test(test_packed_push_all), cmocka_unit_test(test_packed_indirect),
        cmocka_unit_test(test_packed_malformed), cmocka_unit_test(test_packed_events), cmocka_unit_test(test_indirect), cmocka_unit_test(test_loop),
        cmocka_unit_test(test_loop_in_table), cmocka_unit_test(test_head_out_of_range), cmocka_unit_test(test_next_out_of_range),
        cmocka_unit_test(test_next_out_of_table), cmocka_unit_test(test_zero_length), cmocka_unit_test(test_huge_lengths),
        cmocka_unit_test(test_huge_sum), cmocka_unit_test(test_outside_memory), cmocka_unit_test(test_readable_after_writable),
        cmocka_unit_test(test_indirect_in_indirect), cmocka_unit_test(test_indirect_with_next),
        cmocka_unit_test(test_indirect_not_negotiated), cmocka_unit_test(test_bad_tables), cmocka_unit_test(test_avail_runs_away),
        cmocka_unit_test(test_bad_areas), cmocka_unit_test(test_reset_mends), cmocka_unit_test(test_interrupt_flag),
        cmocka_unit_test(test_interrupt_event), cmocka_unit_test(test_listen_flag), cmocka_unit_test(test_listen_event),
        cmocka_unit_test(test_dma_is_announced), cmocka_unit_test(test_state),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
