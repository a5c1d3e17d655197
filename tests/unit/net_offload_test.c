/* Checksums, segments and fragments in software, against a second, simple computation; and headers that lie. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <string.h>

#include "back/net_offload.h"
#include "net_bytes.h"

static u8 frame[NET_FRAME_MAX], out[NET_FRAME_MAX], back[NET_FRAME_MAX];

static unsigned get16(const u8 *p)
{
    return (unsigned)(p[0] << 8 | p[1]);
}

/* RFC 1071 as it stands there, two bytes at a time. */
static unsigned simple_sum(const u8 *p, size_t len, unsigned sum)
{
    for (size_t i = 0; i < len; i++)
        sum += i & 1 ? p[i] : (unsigned)p[i] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

static unsigned l4_sum(const u8 *f, size_t ip, bool v6, unsigned protocol)
{
    size_t l4 = v6 ? ip + 40 : ip + (f[ip] & 15) * 4u, end = v6 ? ip + 40 + get16(f + ip + 4) : ip + get16(f + ip + 2);
    unsigned sum = simple_sum(f + ip + (v6 ? 8 : 12), v6 ? 32 : 8, protocol);

    sum = simple_sum((u8[]){ (u8)((end - l4) >> 8), (u8)(end - l4) }, 2, sum);
    return simple_sum(f + l4, end - l4, sum);
}

/* An Ethernet frame with data bytes in TCP (options: bytes of them) or UDP. Returns its length. */
static size_t make(bool v6, bool vlan, bool udp, unsigned options, size_t data)
{
    size_t ip = vlan ? 18 : 14, l4 = ip + (v6 ? 40 : 20), head = udp ? 8 : 20 + options, len = l4 + head + data;

    for (size_t i = 0; i < len; i++)
        frame[i] = (u8)random_u32();
    if (vlan)
        be16(frame + 12, 0x8100);
    be16(frame + ip - 2, v6 ? 0x86dd : 0x0800);
    if (v6) {
        frame[ip] = 0x60;
        be16(frame + ip + 4, (unsigned)(len - l4));
        frame[ip + 6] = udp ? 17 : 6;
    } else {
        frame[ip] = 0x45;
        be16(frame + ip + 2, (unsigned)(len - ip));
        be16(frame + ip + 6, 0);
        frame[ip + 9] = udp ? 17 : 6;
        be16(frame + ip + 10, 0);
        be16(frame + ip + 10, ~simple_sum(frame + ip, 20, 0) & 0xffff);
    }
    if (udp)
        be16(frame + l4 + 4, (unsigned)(head + data));
    else
        frame[l4 + 12] = (u8)(head / 4 << 4);
    return len;
}

static void checksums(void **state UNUSED)
{
    for (unsigned i = 0; i < 2000; i++) {
        bool v6 = i & 1, vlan = i & 2, udp = i & 4;
        size_t len = make(v6, vlan, udp, i & 8 ? 12 : 0, random_u32() % (i < 1900 ? 1500 : 65000));
        size_t l4 = (vlan ? 18 : 14) + (v6 ? 40 : 20), at = l4 + (udp ? 6 : 16);
        struct virtio_net_hdr h = { .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = (u16)l4, .csum_offset = udp ? 6 : 16 };
        struct net_packet p;
        u16 c;

        assert_true(net_parse(frame, len, &p));
        assert_int_equal(p.protocol, udp ? 17 : 6);
        assert_int_equal(p.l4, l4);
        assert_int_equal(p.end, len);
        c = net_l4_checksum(frame, &p);
        memcpy(frame + at, &c, 2);
        assert_int_equal(l4_sum(frame, l4 - (v6 ? 40 : 20), v6, p.protocol), 0xffff);
        /* As a driver leaves it: the pseudo-header's sum in the field. */
        c = net_pseudo_checksum(frame, &p);
        memcpy(frame + at, &c, 2);
        assert_true(net_header_valid(&h, len));
        net_finish_checksum(frame, len, &h);
        assert_int_equal(l4_sum(frame, l4 - (v6 ? 40 : 20), v6, p.protocol), 0xffff);
    }
}

/* --- segments --- */

struct pieces {
    unsigned n, max, mss, flags;
    size_t data, head, l4, ip;
    bool v6;
};

static void one_segment(void *arg, const u8 *f, size_t len)
{
    struct pieces *s = arg;
    u32 seq = get16(f + s->l4 + 4) << 16 | get16(f + s->l4 + 6), first = get16(frame + s->l4 + 4) << 16 | get16(frame + s->l4 + 6);

    assert_true(len > s->head || s->n == 0);
    assert_true(len - s->head <= s->mss);
    assert_int_equal(seq, (u32)(first + s->data));
    assert_int_equal(l4_sum(f, s->ip, s->v6, 6), 0xffff);
    if (!s->v6)
        assert_int_equal(simple_sum(f + s->ip, 20, 0), 0xffff);
    s->flags |= f[s->l4 + 13] & 9;
    assert_memory_equal(f, frame, 12);
    memcpy(back + s->data, f + s->head, len - s->head);
    s->data += len - s->head;
    s->n++;
}

static void segments(void **state UNUSED)
{
    for (unsigned i = 0; i < 200; i++) {
        bool v6 = i & 1, vlan = i & 2;
        size_t data = random_u32() % 60000, len = make(v6, vlan, false, i & 4 ? 12 : 0, data);
        struct pieces s = { .mss = 1 + random_u32() % 9000, .v6 = v6, .ip = vlan ? 18 : 14 };

        s.l4 = s.ip + (v6 ? 40 : 20);
        s.head = len - data;
        assert_true(net_segment(frame, len, s.mss, out, one_segment, &s));
        assert_int_equal(s.data, data);
        assert_int_equal(s.n, data ? (data + s.mss - 1) / s.mss : 1);
        assert_memory_equal(back, frame + s.head, data);
        assert_int_equal(s.flags, frame[s.l4 + 13] & 9);           /* FIN and PSH: of the last one */
    }
}

static void never(void *arg UNUSED, const u8 *f UNUSED, size_t len UNUSED)
{
    fail();
}

static void no_segments(void **state UNUSED)
{
    size_t len = make(false, false, true, 0, 3000);

    assert_false(net_segment(frame, len, 1000, out, never, NULL)); /* UDP */
    len = make(false, false, false, 0, 3000);
    assert_false(net_segment(frame, len, 0, out, never, NULL));
    frame[14 + 20 + 12] = 0x40;                                    /* a header of 16 bytes */
    assert_false(net_segment(frame, len, 1000, out, never, NULL));
    len = make(false, false, false, 0, 30);
    frame[14 + 20 + 12] = 0xf0;                                    /* one that is longer than the packet */
    assert_false(net_segment(frame, len, 1000, out, never, NULL));
    len = make(false, false, false, 0, 3000);
    be16(frame + 14 + 6, 0x2000);                                  /* a fragment */
    assert_false(net_segment(frame, len, 1000, out, never, NULL));
}

/* --- fragments --- */

static void one_fragment(void *arg, const u8 *f, size_t len)
{
    struct pieces *s = arg;
    size_t head = s->v6 ? s->l4 + 8 : s->l4, at = s->v6 ? get16(f + s->l4 + 2) & ~7u : (get16(f + s->ip + 6) & 0x1fff) * 8;
    bool more = s->v6 ? f[s->l4 + 3] & 1 : get16(f + s->ip + 6) & 0x2000;

    assert_true(len - 14 <= s->max);
    assert_int_equal(at, s->data);
    if (!s->v6)
        assert_int_equal(simple_sum(f + s->ip, 20, 0), 0xffff);
    else
        assert_int_equal(f[s->ip + 6], 44);
    assert_int_equal(len - s->ip, s->v6 ? 40 + get16(f + s->ip + 4) : get16(f + s->ip + 2));
    memcpy(back + at, f + head, len - head);
    s->data += len - head;
    s->n = !more;
}

static void fragments(void **state UNUSED)
{
    for (unsigned i = 0; i < 200; i++) {
        bool v6 = i & 1;
        size_t data = 1 + random_u32() % 60000, len = make(v6, false, true, 0, data);
        struct pieces s = { .max = 576 + random_u32() % 9000, .v6 = v6, .ip = 14, .l4 = v6 ? 54 : 34 };

        assert_true(net_fragment(frame, len, s.max, 7, out, one_fragment, &s));
        assert_int_equal(s.data, data + 8);
        assert_true(s.n);                                          /* the last one says so */
        assert_memory_equal(back, frame + s.l4, data + 8);
    }
    size_t len = make(false, false, true, 0, 3000);
    be16(frame + 14 + 6, 0x4000);                                  /* may not be cut */
    assert_false(net_fragment(frame, len, 1500, 0, out, never, NULL));
    assert_false(net_fragment(frame, len, 20, 0, out, never, NULL));
}

/* --- lies --- */

static void headers(void **state UNUSED)
{
    static const struct { u8 flags, type; u16 size, start, offset; size_t len; bool valid; } h[] = {
        { 0, 0, 0, 0, 0, 60, true }, { 1, 0, 0, 34, 16, 60, true }, { 1, 0, 0, 34, 24, 60, true }, { 1, 0, 0, 34, 25, 60, false },
        { 1, 0, 0, 59, 0, 60, false }, { 1, 0, 0, 65535, 65535, 60, false }, { 1, 0, 0, 0, 16, 60, false }, { 1, 1, 1448, 34, 16, 3000, true },
        { 1, 4, 1428, 54, 16, 3000, true }, { 1, 1, 0, 34, 16, 3000, false }, { 0, 1, 1448, 34, 16, 3000, false }, { 1, 3, 1448, 34, 6, 3000, false },
        { 1, 5, 1448, 34, 6, 3000, false }, { 1, 0x81, 1448, 34, 16, 3000, true }, { 0, 0x80, 0, 0, 0, 60, false }, { 1, 0xff, 1, 34, 16, 3000, false },
        { 0xff, 0, 0, 14, 0, 14, false },
    };

    for (unsigned i = 0; i < ARRAY_SIZE(h); i++)
        assert_int_equal(net_header_valid(&(struct virtio_net_hdr){ h[i].flags, h[i].type, 0, h[i].size, h[i].start, h[i].offset }, h[i].len), h[i].valid);
}

static void count(void *arg, const u8 *f, size_t len)
{
    assert_ptr_equal(f, out);
    assert_true(len >= NET_HEADER && len <= NET_FRAME_MAX);
    ++*(unsigned *)arg;
}

/* Under a sanitizer: nothing beyond the frame is looked at, whatever its bytes say. */
static void damaged(void **state UNUSED)
{
    for (unsigned i = 0; i < 20000; i++) {
        size_t len = make(i & 1, i & 2, i & 4, 12, random_u32() % 200), keep = random_u32() % (len + 1);
        u8 *p = malloc(keep + !keep);
        struct net_packet k;
        unsigned n = 0;

        memcpy(p, frame, keep);
        for (unsigned d = random_u32() % 4; d && keep; d--)
            p[random_u32() % MIN(keep, (size_t)70)] ^= (u8)(1 << random_u32() % 8);
        if (net_parse(p, keep, &k) && (k.protocol == 6 || k.protocol == 17))
            net_l4_checksum(p, &k);
        net_segment(p, keep, 1 + random_u32() % 100, out, count, &n);
        net_fragment(p, keep, random_u32() % 200, 1, out, count, &n);
        free(p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(checksums), cmocka_unit_test(segments), cmocka_unit_test(no_segments), cmocka_unit_test(fragments),
        cmocka_unit_test(headers), cmocka_unit_test(damaged),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
