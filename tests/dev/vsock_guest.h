/*
 * The guest's driver of virtio vsock by hand, and the host's programs by Unix sockets: for the tests of streams (virtio_vsock_test.c), of messages
 * (virtio_vsock_messages_test.c) and of what is no connection's (virtio_vsock_state_test.c).
 */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <fcntl.h>
#include <linux/virtio_vsock.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "dev/virtio_vsock.h"
#include "virtio_guest.h"
#include "turns.h"

#define DEV 5
#define QUEUE 64
#define RX 0
#define TX 1
#define EVENTS 2
#define BASE (BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC))
#define BUFFERS 0x400000ull                                        /* RX buffers: 4 KiB each */
#define BUFFER 4096u
#define OUT 0x600000ull
#define CID 7u
#define GUEST_PORT 1234u

static struct guest g;
static struct loop *loop;
static struct vsock_host *host;
static struct virtio_vsock *vsock;
static struct vdev d;
static char dir[64], path[80];
static u16 type;                                                   /* of the test's connections */
static u64 packed;                                                 /* the feature, for the second round */

/* A packet that the guest got. */
static struct virtio_vsock_hdr hdr;
static u8 data[BUFFER];

static inline void turn(void)
{
    turns(loop, 8);
}

static inline void open_device(void)
{
    struct vsock_host_config cfg = { .path = path, .peers = dir, .cid = CID };

    assert_int_equal(vsock_host_new(loop, &cfg, &host), 0);
    assert_int_equal(virtio_vsock_new(&g.ram, NULL, loop, host, &vsock), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 20, true, (struct virtio *)vsock), 0);
}

static inline int setup(void **state UNUSED)
{
    type = VIRTIO_VSOCK_TYPE_STREAM;
    strcpy(dir, "/tmp/doppel-vsock-XXXXXX");
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/s", dir);
    guest_new(&g);
    assert_int_equal(loop_new(&loop), 0);
    open_device();
    return 0;
}

static inline int teardown(void **state UNUSED)
{
    char command[128];

    device_free(vsock);
    vsock_host_free(host);
    turn();
    loop_free(loop);
    guest_free(&g);
    snprintf(command, sizeof(command), "rm -rf %s", dir);
    assert_int_equal(system(command), 0);
    return 0;
}

/* --- the guest --- */

static inline void buffers(unsigned n, u32 len)
{
    for (unsigned i = 0; i < n; i++) {
        u64 at = BUFFERS + (d.q[RX].next_desc % QUEUE) * (u64)BUFFER;

        gq_add(&d.q[RX], (struct buf[]){ { at, len, true } }, 1);
    }
    vdev_kick(&d, RX);
    turn();
}

static inline void start_with(unsigned n)
{
    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    buffers(n, BUFFER);
}

/* The next packet for the guest, whose buffer is offered again at once. */
static inline bool got_packet(void)
{
    u32 id, len;
    u64 at;

    turn();
    if (!gq_used(&d.q[RX], &id, &len))
        return false;
    assert_in_range(len, sizeof(hdr), BUFFER);
    at = BUFFERS + id * (u64)BUFFER;
    get(&g, at, &hdr, sizeof(hdr));
    assert_int_equal(hdr.len, len - sizeof(hdr));
    get(&g, at + sizeof(hdr), data, hdr.len);
    assert_int_equal(hdr.dst_cid, CID);
    assert_int_equal(hdr.type, type);
    if (packed) {
        gq_add(&d.q[RX], (struct buf[]){ { BUFFERS + (d.q[RX].next_desc % QUEUE) * (u64)BUFFER, BUFFER, true } }, 1);
    } else {
        gq_desc(&d.q[RX], (u16)id, at, BUFFER, VRING_DESC_F_WRITE, 0);
        gq_offer(&d.q[RX], (u16)id);
    }
    vdev_kick(&d, RX);
    return true;
}

static inline void expect(u16 op, u32 src_port)
{
    assert_true(got_packet());
    assert_int_equal(hdr.op, op);
    assert_int_equal(hdr.src_port, src_port);
    assert_int_equal(hdr.dst_port, GUEST_PORT);
}

static inline struct virtio_vsock_hdr to(u64 cid, u32 port, u16 op)
{
    return (struct virtio_vsock_hdr){ .src_cid = CID, .dst_cid = cid, .src_port = GUEST_PORT, .dst_port = port,
                                      .type = type, .op = op, .buf_alloc = 1 << 20 };
}

/* Without a turn of the loop's. */
static inline void offer(struct virtio_vsock_hdr h, const void *bytes, u32 len)
{
    u64 at = OUT + (d.q[TX].next_desc % QUEUE) * 0x4000ull;

    put(&g, at, &h, sizeof(h));
    if (len)
        put(&g, at + sizeof(h), bytes, len);
    gq_add(&d.q[TX], (struct buf[]){ { at, sizeof(h) + len, false } }, 1);
    vdev_kick(&d, TX);
}

static inline void packet(struct virtio_vsock_hdr h, const void *bytes, u32 len)
{
    u32 id, used;

    offer(h, bytes, len);
    turn();
    assert_true(gq_used(&d.q[TX], &id, &used));
}

static inline void rw_flags(u32 port, const void *bytes, u32 len, u32 flags)
{
    struct virtio_vsock_hdr h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RW);

    h.len = len;
    h.flags = flags;
    packet(h, bytes, len);
}

static inline void rw(u32 port, const void *bytes, u32 len)
{
    rw_flags(port, bytes, len, 0);
}

/* --- the host --- */

static inline int socket_type(void)
{
    return type == VIRTIO_VSOCK_TYPE_STREAM ? SOCK_STREAM : SOCK_SEQPACKET;
}

static inline int listen_at(const char *where)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, socket_type() | SOCK_NONBLOCK, 0);

    snprintf(a.sun_path, sizeof(a.sun_path), "%.107s", where);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(fd, 8), 0);
    return fd;
}

static inline int client(const char *words)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, socket_type() | SOCK_NONBLOCK, 0);

    snprintf(a.sun_path, sizeof(a.sun_path), "%s%s", path, type == VIRTIO_VSOCK_TYPE_STREAM ? "" : ".seq");
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(send(fd, words, strlen(words), 0), strlen(words));
    turn();
    return fd;
}

static inline void expect_text(int fd, const char *want)
{
    char buf[256] = "";

    turn();
    assert_int_equal(recv(fd, buf, sizeof(buf) - 1, MSG_DONTWAIT), strlen(want));
    assert_string_equal(buf, want);
}

static inline bool hung_up(int fd)
{
    char c;

    turn();
    ssize_t n = recv(fd, &c, 1, MSG_DONTWAIT | MSG_PEEK);
    return n == 0 || (n < 0 && errno == ECONNRESET);               /* the latter: words of ours were not read */
}

/* A connection to the guest; its port on the host's side. */
static inline int connected(u32 *port)
{
    int fd = client("CONNECT 1234\n");
    char ok[32];

    assert_true(got_packet());
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_REQUEST);
    assert_int_equal(hdr.src_cid, VSOCK_CID_HOST);
    assert_int_equal(hdr.dst_port, GUEST_PORT);
    *port = hdr.src_port;
    assert_true(hdr.buf_alloc >= 64 * KiB);
    packet(to(VSOCK_CID_HOST, *port, VIRTIO_VSOCK_OP_RESPONSE), NULL, 0);
    snprintf(ok, sizeof(ok), "OK %u\n", *port);
    expect_text(fd, ok);
    return fd;
}

/* It closes at once after its last byte: the host still gets them all, though the guest does not wait. */
static inline void last_bytes(bool messages)
{
    struct virtio_vsock_hdr h;
    static u8 block[8192], back[65536];
    u32 port, sent = 0, got = 0;
    ssize_t n;
    int fd;

    fd = connected(&port);
    for (; sent < 240 * KiB; sent += sizeof(block))
        rw_flags(port, block, sizeof(block), messages ? VIRTIO_VSOCK_SEQ_EOM : 0);
    if (messages)
        rw_flags(port, block, sizeof(block), 0);                   /* half a message is none */
    h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_SHUTDOWN);
    h.flags = 3;
    packet(h, NULL, 0);
    packet(to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RST), NULL, 0);
    for (; turn(), (n = recv(fd, back, sizeof(back), MSG_DONTWAIT)) > 0; got += (u32)n)
        assert_true(!messages || n == sizeof(block));
    assert_int_equal(n, 0);
    assert_int_equal(got, sent);
    assert_int_equal(virtio_vsock_conns(vsock), 0);
    close(fd);
}

#define VSOCK_TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

/* All of it with split rings, and with packed ones. */
#define VSOCK_ROUNDS(tests)                                                     \
    ({                                                                          \
        int failed = cmocka_run_group_tests_name("split", tests, NULL, NULL);   \
        packed = BIT(VIRTIO_F_RING_PACKED);                                     \
        failed + cmocka_run_group_tests_name("packed", tests, NULL, NULL);      \
    })
