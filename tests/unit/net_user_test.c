/*
 * The user network against a guest that sends nonsense: requests for addresses, of ARP, ICMP, TCP, UDP, DNS, TFTP, IPv6, with bytes changed, cut short, made long, in fragments that
 * overlap, with offloads that do not fit them. It goes on: a right request for an address is answered all the while. Restricted, so that nothing leaves this process.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "back/net_user.h"
#include "net_bytes.h"

#define PATIENCE 60000                                             /* ms: machines are busy */
#define FRAMES 30000                                               /* SOAK_LONG: so many times 100 */
#define EVERY 1000                                                 /* frames, then one that is right */

static const u8 mac[NET_MAC] = { 0x52, 0x54, 0, 0x12, 0x34, 0x56 };
static struct net *net;

static struct {
    pthread_mutex_t lock;
    bool waits;
    unsigned offers, frames;
    struct virtio_net_hdr hdr;
    size_t len;
    u8 frame[NET_FRAME_MAX];
} card = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* The frame is left alone as long as it waits. What it brings about comes to receive() at once. */
static void transmit(void *front UNUSED)
{
    struct iovec iov[2] = { { card.frame, 0 }, { 0 } };
    bool waits, sent;

    pthread_mutex_lock(&card.lock);
    waits = card.waits;
    pthread_mutex_unlock(&card.lock);
    if (!waits)
        return;
    iov[0].iov_len = MIN(card.len, (size_t)33);
    iov[1] = (struct iovec){ card.frame + iov[0].iov_len, card.len - iov[0].iov_len };
    sent = net_send(net, &(struct net_frame){ .hdr = card.hdr, .iov = iov, .iovs = 2, .len = card.len });
    pthread_mutex_lock(&card.lock);
    card.waits = !sent;
    pthread_mutex_unlock(&card.lock);
}

/* An offer: UDP from port 67 to 68, DHCP's message type 2 as its first option (RFC 2131, 3; RFC 2132, 9.6). */
static bool receive(void *front UNUSED, const struct net_frame *f)
{
    u8 b[400];
    size_t n = net_copy(f, 0, b, sizeof(b));

    pthread_mutex_lock(&card.lock);
    card.frames++;
    if (n > 14 + 28 + 243 && b[12] == 8 && b[23] == 17 && b[34] == 0 && b[35] == 67 && b[42] == 2)
        card.offers++;
    pthread_mutex_unlock(&card.lock);
    return true;
}

static void received(void *front UNUSED)
{
}

static void present(void *front UNUSED, bool there UNUSED)
{
}

static const struct net_front_ops front_ops = { .transmit = transmit, .receive = receive, .received = received, .present = present };

static int setup(void **state UNUSED)
{
    struct net_config c = { 0 };

    memcpy(c.mac, mac, NET_MAC);
    card.offers = card.frames = 0;
    assert_int_equal(net_user_new(&c, true, NULL, 0, &net), 0);
    assert_int_equal(net_start(net, &front_ops, NULL, NULL, 0), 0);
    return 0;
}

static int teardown(void **state UNUSED)
{
    net_close(net);
    return 0;
}

/* --- frames --- */

static void ip_checksum(u8 *f)
{
    u32 sum = 0;

    f[24] = f[25] = 0;
    for (unsigned i = 14; i < 34; i += 2)
        sum += (u32)(f[i] << 8 | f[i + 1]);
    sum = (sum & 0xffff) + (sum >> 16);
    be16(f + 24, ~(sum + (sum >> 16)) & 0xffff);
}

static size_t ethernet(u8 *f, unsigned type)
{
    memset(f, 0xff, NET_MAC);
    memcpy(f + NET_MAC, mac, NET_MAC);
    be16(f + 12, type);
    return NET_HEADER;
}

static size_t ipv4(u8 *f, u8 protocol, u8 to, size_t len)
{
    ethernet(f, 0x0800);
    memcpy(f + 14, (u8[20]){ 0x45, [8] = 64, [9] = protocol, [12] = 10, 0, 2, 15, 10, 0, 2, to }, 20);
    be16(f + 16, 20 + len);
    ip_checksum(f);
    return 34 + len;
}

static size_t udp(u8 *f, u8 to, unsigned from_port, unsigned to_port, size_t len)
{
    memset(f + 34, 0, 8);
    be16(f + 34, from_port);
    be16(f + 36, to_port);
    be16(f + 38, 8 + len);
    return ipv4(f, 17, to, 8 + len);
}

static size_t dhcp(u8 *f)
{
    memset(f + 42, 0, 300);
    memcpy(f + 42, (u8[]){ 1, 1, 6, 0, 1, 2, 3, 4 }, 8);
    memcpy(f + 42 + 28, mac, NET_MAC);
    memcpy(f + 42 + 236, (u8[]){ 99, 130, 83, 99, 53, 1, 1, 55, 4, 1, 3, 6, 51, 255 }, 14);
    udp(f, 255, 68, 67, 300);
    memset(f + 26, 0, 4);
    memset(f + 30, 255, 4);
    ip_checksum(f);
    return 342;
}

static size_t ipv6(u8 *f, u8 protocol, const u8 *to, size_t len)
{
    ethernet(f, 0x86dd);
    memset(f + 14, 0, 40);
    f[14] = 0x60;
    be16(f + 18, len);
    f[20] = protocol;
    f[21] = 255;
    memcpy(f + 22, (u8[16]){ 0xfe, 0xc0, [8] = 0x50, 0x54, 0, 0xff, 0xfe, 0x12, 0x34, 0x56 }, 16);
    memcpy(f + 38, to, 16);
    return 54 + len;
}

/* One of the kinds, as it should be. */
static size_t make(u8 *f, unsigned kind)
{
    static const u8 router[16] = { 0xfe, 0xc0, [15] = 2 }, all_routers[16] = { 0xff, 2, [15] = 2 }, servers[16] = { 0xff, 2, [13] = 1, [15] = 2 };
    static const u8 question[] = { 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 'a', 0, 0, 1, 0, 1 };

    for (unsigned i = 34; i < 1600; i++)
        f[i] = (u8)random_u32();
    switch (kind) {
    case 0: return dhcp(f);
    case 1:
        memcpy(f + 14, (u8[28]){ 0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 10, 0, 2, 15, [24] = 10, 0, 2, 2 }, 28);
        return ethernet(f, 0x0806) + 28;
    case 2: memcpy(f + 34, (u8[8]){ 8 }, 8); return ipv4(f, 1, 2, 64);
    case 3: memcpy(f + 46, (u8[]){ 0x60, 2, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4 }, 12); return ipv4(f, 6, 2, 24);
    case 4: memcpy(f + 42, question, sizeof(question)); return udp(f, 3, 5000, 53, sizeof(question));
    case 5: memcpy(f + 42, "\0\1file\0octet\0blksize\0" "9000", 25); return udp(f, 2, 5001, 69, 25);
    case 6: be16(f + 18, random_u32()); return ipv4(f, 17, 2, 40);
    case 7: memcpy(f + 54, (u8[8]){ 133 }, 8); return ipv6(f, 58, all_routers, 8);
    case 8: memcpy(f + 54, (u8[24]){ 135, [8] = 0xfe, 0xc0, [23] = 2 }, 24); return ipv6(f, 58, router, 24);
    case 9: memcpy(f + 54, (u8[]){ 2, 34, 2, 35, 0, 24, 0, 0, 11, 1, 2, 3, 0, 6, 0, 2, 0, 23 }, 18); return ipv6(f, 17, servers, 24);
    case 10: return udp(f, 2, 5002, 7, 1400);
    default: return ethernet(f, random_u32()) + 60;
    }
}

/* What is wrong with it: bytes, its length, its place in a packet; the checksum that a receiver looks at first is right half of the time. */
static size_t spoil(u8 *f, size_t len)
{
    for (unsigned n = random_u32() % 6; n; n--)
        f[random_u32() % 3 ? 12 + random_u32() % 60 : random_u32() % len] = (u8)(random_u32() % 3 ? random_u32() : random_u32() % 2 - 1);
    if (random_u32() % 4 == 0)
        len = NET_HEADER + random_u32() % len;
    else if (random_u32() % 16 == 0)
        len = NET_HEADER + random_u32() % (NET_FRAME_MAX - NET_HEADER);
    if (random_u32() % 8 == 0)
        be16(f + 20, random_u32() & (random_u32() % 2 ? 0x2003 : 0x3fff));   /* fragments, near each other and anywhere */
    if (random_u32() % 8 == 0)
        be16(f + 16, len - NET_HEADER);
    if (random_u32() % 2)
        ip_checksum(f);
    return len;
}

static void send_frame(size_t len, const struct virtio_net_hdr *h)
{
    bool waits = true;

    pthread_mutex_lock(&card.lock);
    card.hdr = *h;
    card.len = len;
    card.waits = true;
    pthread_mutex_unlock(&card.lock);
    net_kick(net);
    for (unsigned i = 0; i < 20 * PATIENCE && waits; i++) {
        pthread_mutex_lock(&card.lock);
        waits = card.waits;
        pthread_mutex_unlock(&card.lock);
        if (waits)
            usleep(50);
    }
    assert_false(waits);
}

static unsigned offers(void)
{
    unsigned n;

    pthread_mutex_lock(&card.lock);
    n = card.offers;
    pthread_mutex_unlock(&card.lock);
    return n;
}

static void answers(void)
{
    static u8 f[NET_FRAME_MAX];
    unsigned before = offers();

    pthread_mutex_lock(&card.lock);
    memcpy(card.frame, f, make(f, 0));
    pthread_mutex_unlock(&card.lock);
    send_frame(342, &(struct virtio_net_hdr){ 0 });
    for (unsigned i = 0; i < PATIENCE && offers() == before; i++)
        usleep(1000);
    assert_true(offers() > before);
}

static void test_answers(void **state UNUSED)
{
    for (unsigned i = 0; i < 20; i++)
        answers();
}

static void test_nonsense(void **state UNUSED)
{
    static u8 f[NET_FRAME_MAX];
    unsigned frames = getenv("SOAK_LONG") ? 100 * FRAMES : FRAMES;

    for (unsigned i = 0; i < frames; i++) {
        size_t len = make(f, random_u32() % 12);
        struct virtio_net_hdr h = { 0 };

        if (random_u32() % 8)
            len = spoil(f, len);
        if (random_u32() % 16 == 0)
            h = (struct virtio_net_hdr){ .flags = 1, .gso_type = random_u32() % 5, .gso_size = random_u32() % 2000, .csum_start = random_u32() % 100, .csum_offset = random_u32() % 20 };
        pthread_mutex_lock(&card.lock);
        memcpy(card.frame, f, len);
        pthread_mutex_unlock(&card.lock);
        send_frame(len, &h);
        if (i % EVERY == EVERY - 1)
            answers();
    }
}

/* Every length of each kind, and every length that a packet may claim to have. */
static void test_lengths(void **state UNUSED)
{
    static u8 f[NET_FRAME_MAX];

    for (unsigned kind = 0; kind < 11; kind++) {
        size_t whole = make(f, kind);

        for (size_t len = 0; len <= MIN(whole, (size_t)350); len++) {
            pthread_mutex_lock(&card.lock);
            memcpy(card.frame, f, whole);
            pthread_mutex_unlock(&card.lock);
            send_frame(len, &(struct virtio_net_hdr){ 0 });
            if (f[12] != 8 || f[13])
                continue;
            pthread_mutex_lock(&card.lock);
            be16(card.frame + 16, len * 2);
            ip_checksum(card.frame);
            pthread_mutex_unlock(&card.lock);
            send_frame(whole, &(struct virtio_net_hdr){ 0 });
        }
        answers();
    }
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    static const struct CMUnitTest tests[] = { T(test_answers), T(test_nonsense), T(test_lengths) };

    return cmocka_run_group_tests_name("net_user", tests, NULL, NULL);
}
