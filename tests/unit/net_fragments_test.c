/* Fragments of IPv4 put together: in each order, several packets at a time; and those that overlap, contradict each other, are too many, or never end. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "back/net_fragments.h"

#define PIECES_MAX 64

static struct net_fragments *r;
static u8 frame[NET_FRAME_MAX], out[NET_FRAME_MAX];
static struct { u8 bytes[1600]; size_t len; } piece[PIECES_MAX];
static unsigned pieces;

static int setup(void **state UNUSED)
{
    r = net_fragments_new();
    return r ? 0 : -1;
}

static int teardown(void **state UNUSED)
{
    net_fragments_free(r);
    return 0;
}

/* An IPv4 packet with that many bytes behind its header, which has options. */
static size_t make(u16 id, size_t data)
{
    size_t len = 24 + data;
    u16 sum;

    memset(frame, 0, NET_HEADER + 24);
    frame[12] = 8;
    memcpy(frame + 14, (u8[24]){ 0x46, 0, (u8)(len >> 8), (u8)len, (u8)(id >> 8), (u8)id, 0, 0, 64, 17, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2, 1, 1, 1, 0 }, 24);
    sum = net_fold(net_sum(frame + 14, 24, 0));
    memcpy(frame + 24, &sum, 2);
    for (size_t i = 0; i < data; i++)
        frame[NET_HEADER + 24 + i] = (u8)(i * 7 + i / 256 + id);
    return NET_HEADER + len;
}

static void take_piece(void *arg UNUSED, const u8 *f, size_t len)
{
    assert_true(pieces < PIECES_MAX && len <= sizeof(piece[0].bytes));
    memcpy(piece[pieces].bytes, f, len);
    piece[pieces++].len = len;
}

static size_t cut(u16 id, size_t data, unsigned mtu)
{
    size_t len = make(id, data);

    pieces = 0;
    assert_true(net_fragment(frame, len, mtu, 0, out, take_piece, NULL));
    return len;
}

static size_t add(u64 now, const u8 *f, size_t len, u8 **whole)
{
    struct net_packet p;

    return net_parse(f, len, &p) ? net_fragments_add(r, now, f, &p, whole) : 0;
}

static void test_orders(void **state UNUSED)
{
    u8 *whole = NULL;

    for (unsigned round = 0; round < 200; round++) {
        size_t len = cut((u16)round, 3000 + round * 37, 600 + round % 900), got = 0;
        u32 x = round * 2654435761u;

        for (unsigned i = pieces; i > 1 && round; i--) {           /* shuffled, but for the first time */
            unsigned k = (x = x * 1664525u + 1013904223u) % 65521 % i;

            memcpy(out, &piece[k], sizeof(piece[0]));
            memcpy(&piece[k], &piece[i - 1], sizeof(piece[0]));
            memcpy(&piece[i - 1], out, sizeof(piece[0]));
        }
        for (unsigned i = 0; i < pieces; i++) {
            assert_int_equal(got, 0);
            got = add(round, piece[i].bytes, piece[i].len, &whole);
        }
        assert_int_equal(got, len);
        assert_memory_equal(whole, frame, len);
    }
}

static void test_largest(void **state UNUSED)
{
    size_t len = cut(1, 65535 - 24, 1500), got = 0;
    u8 *whole = NULL;

    for (unsigned i = 0; i < pieces; i++)
        got = add(0, piece[i].bytes, piece[i].len, &whole);
    assert_int_equal(got, len);
    assert_memory_equal(whole, frame, len);
}

/* One by hand: off and len in bytes. */
static size_t one(u64 now, u16 id, u32 off, u32 len, bool more, u8 **whole)
{
    size_t n = make(id, len);
    u16 sum;

    frame[20] = (u8)(off >> 11 | (more ? 0x20 : 0));
    frame[21] = (u8)(off >> 3);
    frame[24] = frame[25] = 0;
    sum = net_fold(net_sum(frame + 14, 24, 0));
    memcpy(frame + 24, &sum, 2);
    return add(now, frame, n, whole);
}

static void test_bad(void **state UNUSED)
{
    u8 *w;

    assert_int_equal(one(0, 1, 0, 16, true, &w), 0);
    assert_int_equal(one(0, 1, 8, 16, true, &w), 0);               /* overlaps: the packet ends there */
    assert_int_equal(one(0, 1, 16, 8, false, &w), 0);
    assert_int_equal(one(0, 2, 0, 16, true, &w), 0);
    assert_int_equal(one(0, 2, 0, 16, true, &w), 0);               /* the same once more */
    assert_int_equal(one(0, 2, 16, 8, false, &w), 0);
    assert_int_equal(one(0, 3, 32, 8, false, &w), 0);
    assert_int_equal(one(0, 3, 16, 8, false, &w), 0);              /* another end */
    assert_int_equal(one(0, 4, 32, 8, true, &w), 0);
    assert_int_equal(one(0, 4, 0, 16, false, &w), 0);              /* it ends before what is there */
    assert_int_equal(one(0, 5, 0, 12, true, &w), 0);               /* no multiple of 8 */
    assert_int_equal(one(0, 5, 12, 4, false, &w), 0);
    assert_int_equal(one(0, 6, 0, 0, true, &w), 0);                /* nothing in it */
    assert_int_equal(one(0, 7, 65528, 8, false, &w), 0);           /* beyond what a packet can be */
    assert_int_equal(one(0, 7, 65520, 1400, true, &w), 0);
    assert_int_equal(one(0, 8, 65504, 8, false, &w), 0);           /* larger than that with its header */
    for (u32 off = 0; off < 65504; off += 1456)
        assert_int_equal(one(0, 8, off, MIN(1456u, 65504 - off), true, &w), 0);
    one(0, 9, 0, 16, true, &w);
    frame[22]++;                                                   /* a header that is not as it was sent */
    assert_int_equal(add(0, frame, NET_HEADER + 40, &w), 0);
    assert_int_equal(one(0, 9, 16, 8, false, &w), NET_HEADER + 24 + 24);
    assert_int_equal(one(0, 10, 0, 24, false, &w), NET_HEADER + 24 + 24);   /* whole already: a flag that means nothing */
}

/* More packets that never end than there is room for: a new one is put together all the same. And what is old is not part of it. */
static void test_many(void **state UNUSED)
{
    u8 *w;

    for (u16 id = 0; id < 1000; id++)
        assert_int_equal(one(id, id, 8, 8, true, &w), 0);
    assert_int_equal(one(1000, 2000, 0, 8, true, &w), 0);
    assert_int_equal(one(1001, 2000, 8, 8, false, &w), NET_HEADER + 24 + 16);
    assert_int_equal(one(2000, 2001, 0, 8, true, &w), 0);
    assert_int_equal(one(2000 + 31000, 2001, 8, 8, false, &w), 0);
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    static const struct CMUnitTest tests[] = { T(test_orders), T(test_largest), T(test_bad), T(test_many) };

    return cmocka_run_group_tests_name("net_fragments", tests, NULL, NULL);
}
