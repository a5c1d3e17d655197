/*
 * The back end for passt against a passt of the test's: frames both ways, whole and in pieces; one that goes away, says nonsense, is not there for a while: the card has no link
 * then, and gets it back. Segments beyond the MTU, in both directions.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "back/net_offload.h"
#include "back/net_passt.h"

#define PATIENCE 60000                                             /* ms: machines are busy */

static char path[64];
static struct net *net;
static int listener = -1, peer = -1;

/* The card: what it was given and told, and what it has to send. */
static struct {
    pthread_mutex_t lock;
    unsigned frames, losses, finds;
    size_t len;
    u8 last[NET_FRAME_MAX];
    struct virtio_net_hdr hdr;                                     /* of the last */
    size_t to_send;
    u8 out[NET_FRAME_MAX];
} card = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void transmit(void *front UNUSED)
{
    struct iovec iov = { card.out, 0 };

    pthread_mutex_lock(&card.lock);
    iov.iov_len = card.to_send;
    if (card.to_send && net_send(net, &(struct net_frame){ .iov = &iov, .iovs = 1, .len = card.to_send }))
        card.to_send = 0;
    pthread_mutex_unlock(&card.lock);
}

static bool receive(void *front UNUSED, const struct net_frame *f)
{
    pthread_mutex_lock(&card.lock);
    card.len = net_copy(f, 0, card.last, sizeof(card.last));
    card.hdr = f->hdr;
    card.frames++;
    pthread_mutex_unlock(&card.lock);
    return true;
}

static void received(void *front UNUSED)
{
}

static void present(void *front UNUSED, bool there)
{
    pthread_mutex_lock(&card.lock);
    *(there ? &card.finds : &card.losses) += 1;
    pthread_mutex_unlock(&card.lock);
}

static const struct net_front_ops front_ops = { .transmit = transmit, .receive = receive, .received = received, .present = present };

static unsigned count(const unsigned *counter)
{
    pthread_mutex_lock(&card.lock);
    unsigned have = *counter;
    pthread_mutex_unlock(&card.lock);
    return have;
}

/* Waits until the counter has that value. */
static bool reaches(const unsigned *counter, unsigned n)
{
    unsigned have = 0;

    for (unsigned i = 0; i < PATIENCE && have < n; i++) {
        have = count(counter);
        usleep(1000);
    }
    return have == n;
}

static void listen_there(void)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };

    snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
    unlink(path);
    listener = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(listener, 1), 0);
}

static void take_call(void)
{
    struct pollfd p = { .fd = listener, .events = POLLIN };

    assert_int_equal(poll(&p, 1, PATIENCE), 1);
    peer = accept(listener, NULL, NULL);
    assert_true(peer >= 0);
}

static void hang_up(void)
{
    close(peer);
    peer = -1;
}

static int setup(void **state UNUSED)
{
    struct net_config c = { 0 };

    strcpy(path, "/tmp/doppel-passt-XXXXXX");
    assert_non_null(mkdtemp(path));
    strcat(path, "/s");
    card.frames = card.losses = card.finds = 0;
    card.to_send = 0;
    listen_there();
    assert_int_equal(net_passt_new(&c, path, &net), 0);
    assert_int_equal(net_start(net, &front_ops, NULL, NULL, 0), 0);
    take_call();
    return 0;
}

static int teardown(void **state UNUSED)
{
    net_close(net);
    if (peer >= 0)
        close(peer);
    peer = -1;
    close(listener);
    unlink(path);
    *strrchr(path, '/') = '\0';
    return rmdir(path);
}

static void say(const void *bytes, size_t len)
{
    assert_int_equal(send(peer, bytes, len, MSG_NOSIGNAL), len);
}

/* A frame from passt, cut into two writes at that place. */
static void say_bytes(const u8 *frame, size_t len, size_t cut)
{
    static u8 buf[4 + NET_FRAME_MAX];
    u32 head = htonl((u32)len);

    memcpy(buf, &head, 4);
    memcpy(buf + 4, frame, len);
    say(buf, cut);
    usleep(1000);
    say(buf + cut, 4 + len - cut);
}

static void say_frame(size_t len, size_t cut, u8 fill)
{
    static u8 frame[NET_FRAME_MAX];

    memset(frame, fill, len);
    say_bytes(frame, len, cut);
}

/* One frame each way. */
static void passes(unsigned n)
{
    u8 got[4 + 60];

    say_frame(100 + n, 4, (u8)n);
    assert_true(reaches(&card.frames, n));
    assert_int_equal(card.len, 100 + n);
    pthread_mutex_lock(&card.lock);
    memset(card.out, (int)n, 60);
    card.to_send = 60;
    pthread_mutex_unlock(&card.lock);
    net_kick(net);
    assert_int_equal(recv(peer, got, sizeof(got), MSG_WAITALL), sizeof(got));
    assert_memory_equal(got, ((u8[]){ 0, 0, 0, 60 }), 4);
    assert_int_equal(got[4 + 59], n);
}

static void test_frames(void **state UNUSED)
{
    for (unsigned i = 1; i <= 110; i++) {
        say_frame(500 + i, i, (u8)i);
        assert_true(reaches(&card.frames, i));
        assert_int_equal(card.len, 500 + i);
        assert_int_equal(card.last[499], i);
    }
    assert_int_equal(count(&card.losses), 0);
}

enum { TCP = 6, UDP = 17, SYN = 2, TCP_DATA = NET_HEADER + 40, UDP_DATA = NET_HEADER + 28 };

/* An IPv4 packet in a frame of that length (with a VLAN's tag: tag 4), its data all 0x5a. */
static u8 *packet(u8 protocol, size_t len, unsigned tag)
{
    static u8 frame[NET_FRAME_MAX];
    u8 *ip = frame + NET_HEADER + tag;
    u16 total = htons((u16)(len - NET_HEADER - tag));

    memset(frame, 0x5a, sizeof(frame));
    if (tag)
        memcpy(frame + 12, (u8[]){ 0x81, 0, 0, 5 }, 4);
    memcpy(ip - 2, (u8[]){ 8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0x90, 0, 0, 80 }, 26);
    memcpy(ip + 2, &total, 2);
    if (protocol == TCP)
        memcpy(ip + 24, (u8[]){ 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0 }, 16);
    return frame;
}

/* What passt has for the guest beyond its MTU: a segment goes whole to a driver that takes such, and in its pieces to one that does not. */
static void test_large(void **state UNUSED)
{
    struct net_packet p;
    u16 sum;

    net_guest_takes(net, NET_CSUM | NET_TSO4);
    say_bytes(packet(TCP, 65535, 0), 65535, 30000);
    assert_true(reaches(&card.frames, 1));
    assert_int_equal(card.len, 65535);
    assert_int_equal(card.hdr.gso_type, VIRTIO_NET_HDR_GSO_TCPV4);
    assert_int_equal(card.hdr.gso_size, 1460);
    assert_int_equal(card.hdr.hdr_len, TCP_DATA);
    assert_int_equal(card.hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
    assert_true(card.hdr.csum_start == NET_HEADER + 20 && card.hdr.csum_offset == 16);
    assert_true(net_parse(card.last, card.len, &p));
    sum = net_pseudo_checksum(card.last, &p);
    assert_memory_equal(card.last + NET_HEADER + 36, &sum, 2);
    assert_memory_equal(card.last + TCP_DATA, packet(TCP, 65535, 0) + TCP_DATA, 65535 - TCP_DATA);
    net_guest_takes(net, NET_CSUM);
    say_bytes(packet(TCP, TCP_DATA + 3 * 1460 + 1, 0), TCP_DATA + 3 * 1460 + 1, 1000);
    assert_true(reaches(&card.frames, 1 + 4));
    assert_int_equal(card.len, TCP_DATA + 1);
    assert_int_equal(card.hdr.gso_type, VIRTIO_NET_HDR_GSO_NONE);
}

/* Other packets become fragments; what is no packet is dropped; a tag makes a frame longer, but no packet. */
static void test_large_others(void **state UNUSED)
{
    u8 *f;

    say_bytes(packet(UDP, UDP_DATA + 4000, 0), UDP_DATA + 4000, 4);
    assert_true(reaches(&card.frames, 3));
    assert_int_equal(card.len, NET_HEADER + 20 + 4008 - 2 * 1480);
    say_frame(5000, 4, 1);
    f = packet(UDP, NET_HEADER + NET_VLAN + 1500, NET_VLAN);
    f[NET_HEADER + NET_VLAN + 6] = 0x40;                           /* not to be cut */
    say_bytes(f, NET_HEADER + NET_VLAN + 1500, 4);
    assert_true(reaches(&card.frames, 4));
    assert_int_equal(card.len, NET_HEADER + NET_VLAN + 1500);
    assert_memory_equal(card.last, f, card.len);
}

/* The MSS that passt sees in a SYN with that one. */
static unsigned mss_seen(unsigned mss)
{
    static u8 got[4 + TCP_DATA + 4];
    u8 *f = packet(TCP, TCP_DATA + 4, 0);
    struct net_packet p;
    u16 sum;

    f[NET_HEADER + 32] = 0x60;
    f[NET_HEADER + 33] = SYN;
    memcpy(f + TCP_DATA, (u8[]){ 2, 4, (u8)(mss >> 8), (u8)mss }, 4);
    assert_true(net_parse(f, TCP_DATA + 4, &p));
    sum = net_l4_checksum(f, &p);
    memcpy(f + p.l4 + 16, &sum, 2);
    pthread_mutex_lock(&card.lock);
    memcpy(card.out, f, TCP_DATA + 4);
    card.to_send = TCP_DATA + 4;
    pthread_mutex_unlock(&card.lock);
    net_kick(net);
    assert_int_equal(recv(peer, got, sizeof(got), MSG_WAITALL), sizeof(got));
    f = got + 4;
    sum = net_l4_checksum(f, &p);
    assert_memory_equal(f + p.l4 + 16, &sum, 2);
    return (unsigned)(f[TCP_DATA + 2] << 8 | f[TCP_DATA + 3]);
}

/* It is raised for a driver that takes large segments, if it is that of the MTU. */
static void test_mss(void **state UNUSED)
{
    net_guest_takes(net, NET_CSUM | NET_TSO6);
    assert_int_equal(mss_seen(1460), 1460);
    net_guest_takes(net, NET_CSUM | NET_TSO4);
    assert_in_range(mss_seen(1460), 60000, 65535 - TCP_DATA - 40);
    assert_int_equal(mss_seen(1400), 1400);
}

/* It hangs up, and takes the next call: as before, though a frame was half there. */
static void test_hangs_up(void **state UNUSED)
{
    passes(1);
    say("\0\0\1\0half", 8);
    hang_up();
    assert_true(reaches(&card.losses, 1));
    take_call();
    assert_true(reaches(&card.finds, 1));
    passes(2);
}

/* It dies; what comes in its place is another socket of that name, after a while in which calls are refused, and one in which there is none. */
static void test_dies(void **state UNUSED)
{
    close(listener);
    hang_up();
    assert_true(reaches(&card.losses, 1));
    usleep(300000);
    unlink(path);
    usleep(300000);
    assert_int_equal(count(&card.finds), 0);
    listen_there();
    take_call();
    assert_true(reaches(&card.finds, 1));
    passes(1);
    assert_int_equal(count(&card.losses), 1);
}

static void test_nonsense(void **state UNUSED)
{
    static const char *const nonsense[] = { "\0\0\0\0", "\0\0\0\x0d", "\xff\xff\xff\xff", "\0\1\0\x12" };
    char c;

    for (unsigned i = 0; i < ARRAY_SIZE(nonsense); i++) {
        say(nonsense[i], 4);
        assert_true(reaches(&card.losses, i + 1));
        assert_int_equal(recv(peer, &c, 1, 0), 0);                 /* we hung up */
        hang_up();
        take_call();
        assert_true(reaches(&card.finds, i + 1));
    }
    passes(1);
}

/* It takes calls, but reads nothing: the card's thread does not stand still over that, and ends when it is to. */
static void test_mute(void **state UNUSED)
{
    for (unsigned i = 0; i < 100; i++) {
        pthread_mutex_lock(&card.lock);
        card.to_send = 60000;
        pthread_mutex_unlock(&card.lock);
        net_kick(net);
        usleep(100);
    }
    say_frame(100, 4, 1);
    assert_true(reaches(&card.frames, 1));
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    static const struct CMUnitTest tests[] = { T(test_frames), T(test_large), T(test_large_others), T(test_mss), T(test_hangs_up), T(test_dies), T(test_nonsense), T(test_mute) };

    return cmocka_run_group_tests_name("net_passt", tests, NULL, NULL);
}
