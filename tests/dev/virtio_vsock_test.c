/*
 * virtio vsock from both sides: the guest's driver by hand, the host's programs by Unix sockets. Calls both ways and between guests, credit
 * both ways, each kind of end, what breaks the rules, resets, save and load; messages (SEQPACKET) besides streams.
 */
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

static void turn(void)
{
    turns(loop, 8);
}

static void open_device(void)
{
    struct vsock_host_config cfg = { .path = path, .peers = dir, .cid = CID };

    assert_int_equal(vsock_host_new(loop, &cfg, &host), 0);
    assert_int_equal(virtio_vsock_new(&g.ram, NULL, loop, host, &vsock), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 20, true, (struct virtio *)vsock), 0);
}

static int setup(void **state UNUSED)
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

static int teardown(void **state UNUSED)
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

static void buffers(unsigned n, u32 len)
{
    for (unsigned i = 0; i < n; i++) {
        u64 at = BUFFERS + (d.q[RX].next_desc % QUEUE) * (u64)BUFFER;

        gq_add(&d.q[RX], (struct buf[]){ { at, len, true } }, 1);
    }
    vdev_kick(&d, RX);
    turn();
}

static void start_with(unsigned n)
{
    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    buffers(n, BUFFER);
}

/* The next packet for the guest, whose buffer is offered again at once. */
static bool got_packet(void)
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

static void expect(u16 op, u32 src_port)
{
    assert_true(got_packet());
    assert_int_equal(hdr.op, op);
    assert_int_equal(hdr.src_port, src_port);
    assert_int_equal(hdr.dst_port, GUEST_PORT);
}

static struct virtio_vsock_hdr to(u64 cid, u32 port, u16 op)
{
    return (struct virtio_vsock_hdr){ .src_cid = CID, .dst_cid = cid, .src_port = GUEST_PORT, .dst_port = port,
                                      .type = type, .op = op, .buf_alloc = 1 << 20 };
}

/* Without a turn of the loop's. */
static void offer(struct virtio_vsock_hdr h, const void *bytes, u32 len)
{
    u64 at = OUT + (d.q[TX].next_desc % QUEUE) * 0x4000ull;

    put(&g, at, &h, sizeof(h));
    if (len)
        put(&g, at + sizeof(h), bytes, len);
    gq_add(&d.q[TX], (struct buf[]){ { at, sizeof(h) + len, false } }, 1);
    vdev_kick(&d, TX);
}

static void packet(struct virtio_vsock_hdr h, const void *bytes, u32 len)
{
    u32 id, used;

    offer(h, bytes, len);
    turn();
    assert_true(gq_used(&d.q[TX], &id, &used));
}

static void rw_flags(u32 port, const void *bytes, u32 len, u32 flags)
{
    struct virtio_vsock_hdr h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RW);

    h.len = len;
    h.flags = flags;
    packet(h, bytes, len);
}

static void rw(u32 port, const void *bytes, u32 len)
{
    rw_flags(port, bytes, len, 0);
}

/* --- the host --- */

static int socket_type(void)
{
    return type == VIRTIO_VSOCK_TYPE_STREAM ? SOCK_STREAM : SOCK_SEQPACKET;
}

static int listen_at(const char *where)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, socket_type() | SOCK_NONBLOCK, 0);

    snprintf(a.sun_path, sizeof(a.sun_path), "%s", where);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(fd, 8), 0);
    return fd;
}

static int client(const char *words)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, socket_type() | SOCK_NONBLOCK, 0);

    snprintf(a.sun_path, sizeof(a.sun_path), "%s%s", path, type == VIRTIO_VSOCK_TYPE_STREAM ? "" : ".seq");
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(send(fd, words, strlen(words), 0), strlen(words));
    turn();
    return fd;
}

static void expect_text(int fd, const char *want)
{
    char buf[256] = "";

    turn();
    assert_int_equal(recv(fd, buf, sizeof(buf) - 1, MSG_DONTWAIT), strlen(want));
    assert_string_equal(buf, want);
}

static bool hung_up(int fd)
{
    char c;

    turn();
    ssize_t n = recv(fd, &c, 1, MSG_DONTWAIT | MSG_PEEK);
    return n == 0 || (n < 0 && errno == ECONNRESET);               /* the latter: words of ours were not read */
}

/* A connection to the guest; its port on the host's side. */
static int connected(u32 *port)
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

/* --- tests --- */

static void test_identity(void **state UNUSED)
{
    u64 cid;

    start_with(8);
    assert_int_equal(ecam_read(&g, DEV, PCI_DEVICE_ID, 2), 0x1053);
    cid = bus_read(g.mmio, d.config, 4) | bus_read(g.mmio, d.config + 4, 4) << 32;
    assert_int_equal(cid, CID);
    assert_true(vdev_features(&d) & 1);
}

static void test_host_calls(void **state UNUSED)
{
    u32 port;
    int fd;

    start_with(8);
    fd = connected(&port);
    assert_int_equal(send(fd, "hello", 5, 0), 5);
    expect(VIRTIO_VSOCK_OP_RW, port);
    assert_int_equal(hdr.len, 5);
    assert_memory_equal(data, "hello", 5);
    rw(port, "world", 5);
    expect_text(fd, "world");
    assert_int_equal(virtio_vsock_conns(vsock), 1);
    close(fd);
    expect(VIRTIO_VSOCK_OP_SHUTDOWN, port);
    if (hdr.flags != 3)                                            /* the end may be seen before the hang-up */
        expect(VIRTIO_VSOCK_OP_SHUTDOWN, port);
    assert_int_equal(hdr.flags, 3);
    packet(to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RST), NULL, 0);
    assert_int_equal(virtio_vsock_conns(vsock), 0);
    assert_false(got_packet());
}

static void test_refused(void **state UNUSED)
{
    int fd;

    fd = client("CONNECT 1234\n");                                 /* there is no driver */
    assert_true(hung_up(fd));
    close(fd);
    start_with(8);
    fd = client("CONNECT 1234\n");
    assert_true(got_packet());
    packet(to(VSOCK_CID_HOST, hdr.src_port, VIRTIO_VSOCK_OP_RST), NULL, 0);
    assert_true(hung_up(fd));
    close(fd);
    fd = client("CONNECT 1234\n");                                 /* a client that does not wait */
    assert_true(got_packet());
    close(fd);
    expect(VIRTIO_VSOCK_OP_RST, hdr.src_port);
    assert_int_equal(virtio_vsock_conns(vsock), 0);
}

static void test_nonsense(void **state UNUSED)
{
    static const char *const words[] = {
        "\n", "GET / HTTP/1.0\r\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT 99999999999\n", "CONNECT 1 2\n",
        "CONNECT 1 FROM 2:1\n", "CONNECT 1 FROM 3\n", "CONNECT 1 FROM 3:\n", "CONNECT -1\n", "CONNECT 1 MARKED\n",
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    };
    int fd;

    start_with(8);
    for (unsigned i = 0; i < ARRAY_SIZE(words); i++) {
        fd = client(words[i]);
        turn();
        assert_true(hung_up(fd));
        close(fd);
    }
    assert_false(got_packet());
    fd = client("CONN");                                           /* in pieces, and with what follows at once */
    assert_int_equal(send(fd, "ECT 5\r\nmore", 10, 0), 10);
    turn();
    assert_true(got_packet());
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_REQUEST);
    assert_int_equal(hdr.dst_port, 5);
    close(fd);
    turn();
}

/* Clients that connect and say nothing: the eldest go, others are served. */
static void test_silent_clients(void **state UNUSED)
{
    int silent[100], fd;
    u32 port;

    start_with(8);
    for (unsigned i = 0; i < ARRAY_SIZE(silent); i++)
        silent[i] = client("");
    assert_true(hung_up(silent[0]));
    fd = connected(&port);
    close(fd);
    for (unsigned i = 0; i < ARRAY_SIZE(silent); i++)
        close(silent[i]);
    turn();
}

static void test_guest_calls(void **state UNUSED)
{
    char where[96];
    int l, fd;

    start_with(8);
    packet(to(VSOCK_CID_HOST, 52, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    expect(VIRTIO_VSOCK_OP_RST, 52);                               /* nobody listens */
    snprintf(where, sizeof(where), "%s_52", path);
    l = listen_at(where);
    packet(to(VSOCK_CID_HOST, 52, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    fd = accept(l, NULL, NULL);
    assert_true(fd >= 0);
    send(fd, "early", 5, 0);
    expect(VIRTIO_VSOCK_OP_RESPONSE, 52);
    expect(VIRTIO_VSOCK_OP_RW, 52);
    assert_memory_equal(data, "early", 5);
    rw(52, "x", 1);
    expect_text(fd, "x");
    packet(to(VSOCK_CID_HOST, 52, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);   /* the same once more: nonsense */
    expect(VIRTIO_VSOCK_OP_RST, 52);
    assert_true(hung_up(fd));
    close(fd);
    close(l);
}

static void test_half_closed(void **state UNUSED)
{
    struct virtio_vsock_hdr h;
    u32 port;
    int fd;

    start_with(8);
    fd = connected(&port);
    shutdown(fd, SHUT_WR);
    expect(VIRTIO_VSOCK_OP_SHUTDOWN, port);
    assert_int_equal(hdr.flags, VIRTIO_VSOCK_SHUTDOWN_SEND);
    rw(port, "still", 5);
    expect_text(fd, "still");
    h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_SHUTDOWN);
    h.flags = VIRTIO_VSOCK_SHUTDOWN_SEND;
    packet(h, NULL, 0);
    assert_true(hung_up(fd));
    h.flags = VIRTIO_VSOCK_SHUTDOWN_RCV;                           /* now both */
    expect(VIRTIO_VSOCK_OP_SHUTDOWN, port);                        /* a socket that is shut both ways is gone */
    packet(h, NULL, 0);
    expect(VIRTIO_VSOCK_OP_RST, port);
    assert_int_equal(virtio_vsock_conns(vsock), 0);
    close(fd);

    fd = connected(&port);                                         /* the host's program goes while the guest still sends */
    h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_SHUTDOWN);
    h.flags = VIRTIO_VSOCK_SHUTDOWN_RCV;
    packet(h, NULL, 0);
    close(fd);
    expect(VIRTIO_VSOCK_OP_SHUTDOWN, port);
    assert_int_equal(hdr.flags, 3);
    rw(port, "lost", 4);                                           /* into the void: no error, until the guest resets */
    packet(to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RST), NULL, 0);
    assert_int_equal(virtio_vsock_conns(vsock), 0);
}

/* The host sends more than the guest has room for; then more than there are buffers. */
static void test_credit_of_guest(void **state UNUSED)
{
    struct virtio_vsock_hdr h;
    static u8 block[20000];
    u32 port, sum = 0;
    int fd;

    start_with(4);
    fd = client("CONNECT 1234\n");
    assert_true(got_packet());
    port = hdr.src_port;
    h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RESPONSE);
    h.buf_alloc = 1000;
    packet(h, NULL, 0);
    assert_int_equal(recv(fd, block, 32, 0) > 3, 1);
    for (unsigned i = 0; i < sizeof(block); i++)
        block[i] = (u8)(i * 7);
    assert_int_equal(send(fd, block, sizeof(block), 0), sizeof(block));
    expect(VIRTIO_VSOCK_OP_RW, port);
    assert_int_equal(hdr.len, 1000);
    sum = 1000;
    expect(VIRTIO_VSOCK_OP_CREDIT_REQUEST, port);
    assert_false(got_packet());
    h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    h.buf_alloc = 1000;
    h.fwd_cnt = 300;
    packet(h, NULL, 0);
    expect(VIRTIO_VSOCK_OP_RW, port);
    assert_int_equal(hdr.len, 300);
    assert_memory_equal(data, block + sum, 300);
    sum += 300;
    h.fwd_cnt = 5000;                                              /* more than it was sent: no credit comes of nonsense */
    h.buf_alloc = 100;
    packet(h, NULL, 0);
    while (got_packet())
        assert_int_not_equal(hdr.op, VIRTIO_VSOCK_OP_RW);
    h.fwd_cnt = sum;
    h.buf_alloc = 1 << 20;
    packet(h, NULL, 0);
    while (sum < sizeof(block)) {
        assert_true(got_packet());
        if (hdr.op != VIRTIO_VSOCK_OP_RW)
            continue;
        assert_memory_equal(data, block + sum, hdr.len);
        sum += hdr.len;
    }
    assert_int_equal(sum, sizeof(block));
    close(fd);
    turn();
}

/* The guest sends while nobody reads: it may fill what was announced, and is told when there is room again. */
static void test_credit_of_host(void **state UNUSED)
{
    static u8 block[8192], back[8192];
    u32 port, alloc, sent = 0, got = 0, freed = 0;
    int fd, small = 4096;

    start_with(8);
    fd = connected(&port);
    alloc = hdr.buf_alloc;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    for (; sent - freed + sizeof(block) <= alloc; sent += sizeof(block)) {
        for (unsigned i = 0; i < sizeof(block); i++)
            block[i] = (u8)((sent + i) * 13 >> 4);
        rw(port, block, sizeof(block));
        while (got_packet())
            freed = hdr.fwd_cnt;
    }
    assert_true(sent > alloc);                                     /* the socket took some */
    while (got < sent) {
        ssize_t n = recv(fd, back, MIN(sizeof(back), sent - got), MSG_DONTWAIT);

        assert_true(n > 0);
        for (ssize_t i = 0; i < n; i++)
            assert_int_equal(back[i], (u8)((got + (u32)i) * 13 >> 4));
        got += (u32)n;
        while (got_packet())
            freed = hdr.fwd_cnt;
    }
    assert_true(sent - freed < 64 * KiB);
    assert_int_equal(virtio_vsock_conns(vsock), 1);
    for (unsigned i = 0; i < 2 * alloc / sizeof(block) + 64 && virtio_vsock_conns(vsock); i++)
        rw(port, block, sizeof(block));                            /* regardless of credit */
    while (got_packet() && hdr.op != VIRTIO_VSOCK_OP_RST)
        ;
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RST);
    close(fd);
}

/* In a dialogue the guest's part goes out without the loop, credit included; what is more than that by the loop; and if the host's socket is full, what is left of it. */
static void test_at_once(void **state UNUSED)
{
    static u8 block[4096], back[4096];
    struct virtio_vsock_hdr h;
    u32 port, id, used, got = 0, n = 0;
    int fd, waits = -1, waited;

    start_with(16);
    fd = connected(&port);
    h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RW);
    h.len = 1;
    for (u32 i = 0; i < 300; i++) {
        send(fd, "?", 1, 0);
        expect(VIRTIO_VSOCK_OP_RW, port);
        offer(to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_CREDIT_UPDATE), NULL, 0);
        assert_true(gq_used(&d.q[TX], &id, &used));
        offer(h, "1", 1);
        assert_true(gq_used(&d.q[TX], &id, &used));
        assert_int_equal(recv(fd, back, sizeof(back), MSG_DONTWAIT), 1);
        offer(h, "2", 1);
        assert_false(gq_used(&d.q[TX], &id, &used));
        expect_text(fd, "2");
        assert_true(gq_used(&d.q[TX], &id, &used));
    }
    h.len = sizeof(block);
    do {
        waited = waits;
        send(fd, "?", 1, 0);
        while (assert_true(got_packet()), hdr.op != VIRTIO_VSOCK_OP_RW)
            ;
        memset(block, (int)n++, sizeof(block));
        offer(h, block, sizeof(block));
        assert_true(gq_used(&d.q[TX], &id, &used));
        assert_int_equal(ioctl(fd, FIONREAD, &waits), 0);
    } while (waits != waited);                                     /* the last one waits in the device */
    while (got < n * sizeof(block)) {
        ssize_t r = recv(fd, back, sizeof(back), MSG_DONTWAIT);

        assert_true(r > 0);
        for (ssize_t i = 0; i < r; i++)
            assert_int_equal(back[i], (got + (u32)i) / sizeof(block));
        got += (u32)r;
        while (got_packet())
            assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    }
    close(fd);
    turn();
}

/* It closes at once after its last byte: the host still gets them all, though the guest does not wait. */
static void last_bytes(bool messages)
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

static void test_last_bytes(void **state UNUSED)
{
    start_with(16);
    last_bytes(false);
}

static void test_other_guests(void **state UNUSED)
{
    char where[160];
    int l, fd;

    start_with(8);
    packet(to(9, 80, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    expect(VIRTIO_VSOCK_OP_RST, 80);
    snprintf(where, sizeof(where), "%s/.cid-9", dir);
    assert_int_equal(mkdir(where, 0700), 0);
    snprintf(where, sizeof(where), "%s/.cid-9/vsock", dir);
    l = listen_at(where);
    packet(to(9, 80, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    fd = accept(l, NULL, NULL);
    expect_text(fd, "CONNECT 80 FROM 7:1234\n");
    assert_false(got_packet());
    send(fd, "OK", 2, 0);
    assert_false(got_packet());
    send(fd, " 80\nhi", 6, 0);
    expect(VIRTIO_VSOCK_OP_RESPONSE, 80);
    assert_int_equal(hdr.src_cid, 9);
    expect(VIRTIO_VSOCK_OP_RW, 80);
    assert_int_equal(hdr.len, 2);
    close(fd);
    turn();
    packet(to(9, 81, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);           /* the other one refuses, or speaks nonsense */
    fd = accept(l, NULL, NULL);
    close(fd);
    while (got_packet() && hdr.src_port != 81)
        ;
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RST);
    packet(to(9, 82, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    fd = accept(l, NULL, NULL);
    send(fd, "NO\n", 3, 0);
    while (got_packet() && hdr.src_port != 82)
        ;
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RST);
    close(fd);
    close(l);

    fd = client("CONNECT 1234 FROM 9:555\n");                      /* and it calls us */
    expect(VIRTIO_VSOCK_OP_REQUEST, 555);
    assert_int_equal(hdr.src_cid, 9);
    packet(to(9, 555, VIRTIO_VSOCK_OP_RESPONSE), NULL, 0);
    expect_text(fd, "OK 555\n");
    close(fd);
    turn();
}

static void test_bad_packets(void **state UNUSED)
{
    struct virtio_vsock_hdr h;
    u32 id, len;

    start_with(8);
    rw(77, "x", 1);                                                /* no such connection */
    expect(VIRTIO_VSOCK_OP_RST, 77);
    packet(to(VSOCK_CID_HOST, 78, VIRTIO_VSOCK_OP_RST), NULL, 0);
    assert_false(got_packet());                                    /* RST is never answered */
    h = to(VSOCK_CID_HOST, 79, VIRTIO_VSOCK_OP_REQUEST);
    h.type = VIRTIO_VSOCK_TYPE_SEQPACKET;
    packet(h, NULL, 0);
    expect(VIRTIO_VSOCK_OP_RST, 79);
    h = to(VSOCK_CID_HOST, 80, VIRTIO_VSOCK_OP_REQUEST);
    h.src_cid = 99;
    packet(h, NULL, 0);
    assert_false(got_packet());
    for (u32 cid = 0; cid < 2; cid++) {
        packet(to(cid, 80, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
        expect(VIRTIO_VSOCK_OP_RST, 80);
    }
    packet(to(CID, 80, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    expect(VIRTIO_VSOCK_OP_RST, 80);
    packet(to(1ull << 32 | 2, 80, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    assert_false(got_packet());
    packet(to(VSOCK_CID_HOST, 81, 200), NULL, 0);
    expect(VIRTIO_VSOCK_OP_RST, 81);
    h = to(VSOCK_CID_HOST, 82, VIRTIO_VSOCK_OP_RW);
    h.len = 1 << 30;                                               /* longer than its buffer */
    put(&g, OUT, &h, sizeof(h));
    gq_add(&d.q[TX], (struct buf[]){ { OUT, sizeof(h), false } }, 1);
    vdev_kick(&d, TX);
    turn();
    gq_used(&d.q[TX], &id, &len);
    assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
}

/* Many packets to nowhere, and no buffer for the answers: the device waits with the rest, and loses none. */
static void test_answers_wait(void **state UNUSED)
{
    unsigned answers = 0, taken = 0;
    u32 id, len;

    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    for (u32 i = 0; i < 200; i++) {
        struct virtio_vsock_hdr h = to(VSOCK_CID_HOST, i, VIRTIO_VSOCK_OP_RW);

        put(&g, OUT + i % QUEUE * 64, &h, sizeof(h));
        gq_add(&d.q[TX], (struct buf[]){ { OUT + i % QUEUE * 64, sizeof(h), false } }, 1);
        vdev_kick(&d, TX);
        turn();
        while (gq_used(&d.q[TX], &id, &len))
            taken++;
        if (i + 1 - taken >= QUEUE - 1)
            break;
    }
    assert_int_equal(taken, 64);
    buffers(QUEUE / 2, BUFFER);
    while (got_packet()) {
        assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RST);
        assert_int_equal(hdr.src_port, answers);
        answers++;
    }
    while (gq_used(&d.q[TX], &id, &len))
        taken++;
    assert_int_equal(answers, taken);
    assert_int_equal(taken, 64 + QUEUE - 1);
}

static void test_small_buffer(void **state UNUSED)
{
    int fd;

    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    buffers(1, 40);
    fd = client("CONNECT 1\n");
    turn();
    assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
    close(fd);
}

static void test_reset(void **state UNUSED)
{
    u32 port;
    int fd, i;

    start_with(8);
    fd = connected(&port);
    vdev_set_status(&d, 0);
    for (i = 0; i < 50 && vdev_status(&d); i++)
        turn();
    assert_int_equal(vdev_status(&d), 0);
    assert_true(hung_up(fd));
    close(fd);
    memset(&d, 0, sizeof(d));
    start_with(8);
    fd = connected(&port);
    ((struct device *)vsock)->ops->reset((struct device *)vsock);
    assert_true(hung_up(fd));
    close(fd);
}

static void save(struct stream *s)
{
    struct device *dev = (struct device *)vsock;

    pthread_mutex_lock(&dev->lock);
    stream_save_init(s);
    dev->ops->state(dev, s);
    pthread_mutex_unlock(&dev->lock);
}

static int load(const struct stream *saved)
{
    struct device *dev = (struct device *)vsock;
    struct stream s;

    stream_load_init(&s, saved->buf, saved->len);
    pthread_mutex_lock(&dev->lock);
    dev->ops->state(dev, &s);
    pthread_mutex_unlock(&dev->lock);
    turn();
    return s.error;
}

static void test_save_and_load(void **state UNUSED)
{
    struct virtio_vsock_event e = { .id = 99 };
    struct stream s;
    u32 port, id, len;
    int fd;

    start_with(8);
    gq_add(&d.q[EVENTS], (struct buf[]){ { OUT + 0x100000, sizeof(e), true } }, 1);
    vdev_kick(&d, EVENTS);
    fd = connected(&port);
    save(&s);
    assert_int_equal(load(&s), 0);                                 /* nothing has happened since: connections stay */
    assert_int_equal(virtio_vsock_conns(vsock), 1);
    rw(port, "on", 2);
    expect_text(fd, "on");
    stream_free(&s);
    save(&s);
    rw(port, "x", 1);
    assert_int_equal(load(&s), 0);                                 /* back in time */
    assert_int_equal(virtio_vsock_conns(vsock), 0);
    assert_true(gq_used(&d.q[EVENTS], &id, &len));
    assert_int_equal(len, sizeof(e));
    get(&g, OUT + 0x100000, &e, sizeof(e));
    assert_int_equal(e.id, VIRTIO_VSOCK_EVENT_TRANSPORT_RESET);
    for (size_t cut = 0; cut < s.len; cut++) {                     /* what is short is refused */
        struct stream part = { .buf = s.buf, .len = cut };

        assert_true(load(&part) < 0);
    }
    stream_free(&s);
    close(fd);
}

static void test_many(void **state UNUSED)
{
    enum { N = 60 };
    int fd[N];
    u32 port[N];

    start_with(16);
    for (unsigned i = 0; i < N; i++)
        fd[i] = connected(&port[i]);
    assert_int_equal(virtio_vsock_conns(vsock), N);
    for (unsigned i = 0; i < N; i++)
        assert_int_equal(send(fd[i], &port[i], 4, 0), 4);
    for (unsigned i = 0; i < N; i++) {
        u32 p;

        assert_true(got_packet());
        assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RW);
        memcpy(&p, data, 4);
        assert_int_equal(p, hdr.src_port);
        rw(p, &p, 4);
    }
    for (unsigned i = 0; i < N; i++) {
        u32 p;

        assert_int_equal(recv(fd[i], &p, 4, MSG_DONTWAIT), 4);
        assert_int_equal(p, port[i]);
        close(fd[i]);
    }
    turn();
}

/* --- messages --- */

static void start_messages(void)
{
    assert_true(vdev_start(&d, &g, DEV, BASE | packed | BIT(VIRTIO_VSOCK_F_SEQPACKET), QUEUE));
    buffers(16, BUFFER);
    type = VIRTIO_VSOCK_TYPE_SEQPACKET;
}

static void expect_end(u32 port, u32 len, bool end)
{
    expect(VIRTIO_VSOCK_OP_RW, port);
    assert_int_equal(hdr.len, len);
    assert_int_equal(hdr.flags, end ? VIRTIO_VSOCK_SEQ_EOM : 0);
}

static void test_messages_from_host(void **state UNUSED)
{
    static u8 large[3 * (BUFFER - sizeof(struct virtio_vsock_hdr)) + 7];
    const u32 room = BUFFER - sizeof(hdr);
    u32 port, sum = 0;
    int fd;

    start_messages();
    assert_true(vdev_features(&d) & BIT(VIRTIO_VSOCK_F_SEQPACKET));
    fd = connected(&port);
    for (u32 i = 0; i < sizeof(large); i++)
        large[i] = (u8)(i * 11 >> 3);
    send(fd, "first", 5, 0);
    send(fd, "", 0, 0);                                            /* is no end */
    send(fd, large, sizeof(large), 0);
    send(fd, large, room, 0);                                      /* just one buffer */
    send(fd, "x", 1, 0);
    expect_end(port, 5, true);
    expect_end(port, 0, true);
    for (u32 n = 0; n < 4; n++) {
        expect_end(port, n < 3 ? room : 7, n == 3);
        assert_memory_equal(data, large + sum, hdr.len);
        sum += hdr.len;
    }
    expect_end(port, room, true);
    expect_end(port, 1, true);
    for (u32 n = 0; n < 2 * QUEUE; n++) {                          /* of each message no more than one buffer */
        send(fd, &(u8){ (u8)n }, 1, 0);
        expect_end(port, 1, true);
        assert_int_equal(data[0], (u8)n);
    }
    send(fd, "last", 4, 0);
    send(fd, "", 0, 0);
    send(fd, "", 0, 0);
    close(fd);                                                     /* this is */
    expect_end(port, 4, true);
    expect_end(port, 0, true);
    expect_end(port, 0, true);
    expect(VIRTIO_VSOCK_OP_SHUTDOWN, port);
    packet(to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RST), NULL, 0);
    assert_int_equal(virtio_vsock_conns(vsock), 0);
}

/* A message waits for credit and goes on where it was; one that the guest never has room for ends the connection. */
static void test_messages_credit(void **state UNUSED)
{
    struct virtio_vsock_hdr h;
    u8 text[] = "0123456789abcdefghij";
    u32 port;
    int fd;

    start_messages();
    fd = client("CONNECT 1234\n");
    assert_true(got_packet());
    port = hdr.src_port;
    h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RESPONSE);
    h.buf_alloc = 20;
    packet(h, NULL, 0);
    assert_true(recv(fd, data, sizeof(data), 0) > 3);
    send(fd, text, 15, 0);
    send(fd, text, 20, 0);
    expect_end(port, 15, true);
    expect_end(port, 5, false);
    expect(VIRTIO_VSOCK_OP_CREDIT_REQUEST, port);
    assert_false(got_packet());
    h = to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    h.buf_alloc = 20;
    h.fwd_cnt = 15;
    packet(h, NULL, 0);
    expect_end(port, 15, true);
    assert_memory_equal(data, text + 5, 15);
    h.fwd_cnt = 35;
    packet(h, NULL, 0);
    send(fd, text, 20, 0);
    send(fd, "", 0, 0);
    expect_end(port, 20, true);
    expect_end(port, 0, true);                                     /* needs no credit */
    h.fwd_cnt = 55;
    packet(h, NULL, 0);
    send(fd, text, 21, 0);
    expect(VIRTIO_VSOCK_OP_RST, port);
    assert_true(hung_up(fd));
    close(fd);
}

static void test_messages_from_guest(void **state UNUSED)
{
    struct virtio_vsock_hdr h;
    char where[96], got[64];
    int l, fd;

    start_messages();
    snprintf(where, sizeof(where), "%s_52", path);
    type = VIRTIO_VSOCK_TYPE_STREAM;                               /* a stream's listener takes no messages */
    l = listen_at(where);
    type = VIRTIO_VSOCK_TYPE_SEQPACKET;
    packet(to(VSOCK_CID_HOST, 52, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    expect(VIRTIO_VSOCK_OP_RST, 52);
    close(l);
    unlink(where);
    l = listen_at(where);
    packet(to(VSOCK_CID_HOST, 52, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    fd = accept(l, NULL, NULL);
    assert_true(fd >= 0);
    expect(VIRTIO_VSOCK_OP_RESPONSE, 52);
    rw_flags(52, "ab", 2, 0);
    assert_int_equal(recv(fd, got, sizeof(got), MSG_DONTWAIT), -1); /* not whole */
    rw_flags(52, "cd", 2, VIRTIO_VSOCK_SEQ_EOM | VIRTIO_VSOCK_SEQ_EOR);
    rw_flags(52, "", 0, VIRTIO_VSOCK_SEQ_EOM);
    rw_flags(52, "ef", 2, 0);
    rw_flags(52, "", 0, VIRTIO_VSOCK_SEQ_EOM);                     /* ends the one before it */
    rw_flags(52, "g", 1, VIRTIO_VSOCK_SEQ_EOM);
    rw_flags(52, "never", 5, 0);
    expect_text(fd, "abcd");
    expect_text(fd, "");
    expect_text(fd, "ef");
    expect_text(fd, "g");
    h = to(VSOCK_CID_HOST, 52, VIRTIO_VSOCK_OP_SHUTDOWN);
    h.flags = VIRTIO_VSOCK_SHUTDOWN_SEND;
    packet(h, NULL, 0);
    assert_true(hung_up(fd));                                      /* half a message is none */
    h.type = VIRTIO_VSOCK_TYPE_STREAM;                             /* of another type than the connection */
    packet(h, NULL, 0);
    while (got_packet() && hdr.op != VIRTIO_VSOCK_OP_RST)
        ;
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RST);
    close(fd);
    close(l);
}

/* While the host reads nothing: the smallest messages, as many as there is room for, and the largest; all come, each by itself. */
static void test_messages_wait(void **state UNUSED)
{
    static u8 block[8192], back[400000];
    u32 port, alloc, n = 0, got = 0, freed;
    ssize_t r;
    int fd;

    start_messages();
    fd = connected(&port);
    alloc = hdr.buf_alloc;
    for (; n < 3000; n++)
        rw_flags(port, &(u8){ (u8)n }, 1, VIRTIO_VSOCK_SEQ_EOM);
    for (; turn(), (r = recv(fd, back, sizeof(back), MSG_DONTWAIT)) > 0; got++) {
        assert_int_equal(r, 1);
        assert_int_equal(back[0], (u8)got);
    }
    assert_int_equal(got, n);
    freed = n;
    for (u32 sent = 0; sent < alloc; sent += sizeof(block)) {      /* one of all the room there is, though the guest knows of less at first */
        memset(block, (int)(sent / sizeof(block)), sizeof(block));
        rw_flags(port, block, sizeof(block), sent + sizeof(block) == alloc ? VIRTIO_VSOCK_SEQ_EOM : 0);
        while (got_packet())
            freed = hdr.fwd_cnt;
        if (sent >= 64 * KiB && sent + sizeof(block) < alloc)
            assert_int_equal(freed, n);
    }
    turn();
    assert_int_equal(recv(fd, back, sizeof(back), MSG_DONTWAIT), alloc);
    for (u32 i = 0; i < alloc; i++)
        assert_int_equal(back[i], i / sizeof(block));
    for (u32 sent = 0; sent < alloc; sent += sizeof(block))        /* and one that never ends */
        rw_flags(port, block, sizeof(block), 0);
    while (got_packet() && hdr.op != VIRTIO_VSOCK_OP_RST)
        ;
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RST);
    assert_true(hung_up(fd));
    close(fd);
}

/* Each with a byte before it on the host's side: MSG_EOR passes. What has no mark, or none that there is, ends the connection. */
static void test_messages_marked(void **state UNUSED)
{
    static const struct { const char *bytes; u32 len; } bad[] = { { "\2x", 2 }, { "", 0 }, { "\xff", 1 } };
    char where[96], got[16];
    u32 port;
    int l, fd;

    start_messages();
    fd = client("CONNECT 1234 MARKED\n");
    assert_true(got_packet());
    port = hdr.src_port;
    packet(to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RESPONSE), NULL, 0);
    assert_true(recv(fd, got, sizeof(got), MSG_DONTWAIT) > 3);
    send(fd, "\0ab", 3, 0);
    send(fd, "\1cd", 3, 0);
    send(fd, "\0", 1, 0);
    send(fd, "\1", 1, 0);
    for (u32 i = 0; i < 4; i++) {
        expect(VIRTIO_VSOCK_OP_RW, port);
        assert_int_equal(hdr.len, i < 2 ? 2 : 0);
        assert_memory_equal(data, i ? "cd" : "ab", hdr.len);
        assert_int_equal(hdr.flags, i & 1 ? VIRTIO_VSOCK_SEQ_EOM | VIRTIO_VSOCK_SEQ_EOR : VIRTIO_VSOCK_SEQ_EOM);
    }
    close(fd);
    turn();
    packet(to(VSOCK_CID_HOST, port, VIRTIO_VSOCK_OP_RST), NULL, 0);
    while (got_packet())
        ;
    for (u32 i = 0; i < ARRAY_SIZE(bad); i++) {
        fd = client("CONNECT 1234 MARKED\n");
        assert_true(got_packet());
        packet(to(VSOCK_CID_HOST, hdr.src_port, VIRTIO_VSOCK_OP_RESPONSE), NULL, 0);
        assert_true(recv(fd, got, sizeof(got), MSG_DONTWAIT) > 3);
        send(fd, bad[i].bytes, bad[i].len, 0);
        expect(VIRTIO_VSOCK_OP_RST, hdr.src_port);
        assert_true(hung_up(fd));
        close(fd);
    }

    snprintf(where, sizeof(where), "%s_52.marked", path);
    l = listen_at(where);
    packet(to(VSOCK_CID_HOST, 52, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    fd = accept(l, NULL, NULL);
    assert_true(fd >= 0);
    expect(VIRTIO_VSOCK_OP_RESPONSE, 52);
    rw_flags(52, "a", 1, VIRTIO_VSOCK_SEQ_EOR);                    /* says nothing before the end */
    rw_flags(52, "b", 1, VIRTIO_VSOCK_SEQ_EOM);
    rw_flags(52, "c", 1, VIRTIO_VSOCK_SEQ_EOM | VIRTIO_VSOCK_SEQ_EOR);
    rw_flags(52, "", 0, VIRTIO_VSOCK_SEQ_EOM | VIRTIO_VSOCK_SEQ_EOR);
    rw_flags(52, "", 0, VIRTIO_VSOCK_SEQ_EOM);
    rw_flags(52, "d", 1, VIRTIO_VSOCK_SEQ_EOM);
    for (u32 i = 0; i < 5; i++) {
        static const struct { const char *bytes; u32 len; } want[] = { { "\0ab", 3 }, { "\1c", 2 }, { "\1", 1 }, { "\0", 1 }, { "\0d", 2 } };

        assert_int_equal(recv(fd, got, sizeof(got), MSG_DONTWAIT), want[i].len);
        assert_memory_equal(got, want[i].bytes, want[i].len);
    }
    close(fd);
    close(l);
}

/* Empty messages cost no credit: they wait in their order while the host does not read, but not for ever. */
static void test_messages_empty(void **state UNUSED)
{
    u32 port, n = 0, got = 0;
    char back[16];
    ssize_t r;
    int fd;

    start_messages();
    fd = connected(&port);
    for (; n < 3000; n++)
        rw_flags(port, "x", n % 3 == 0, VIRTIO_VSOCK_SEQ_EOM);
    for (; got < n && (turn(), r = recv(fd, back, sizeof(back), MSG_DONTWAIT)) >= 0; got++)
        assert_int_equal(r, got % 3 == 0);
    assert_int_equal(got, n);
    for (n = 0; n < 20000 && virtio_vsock_conns(vsock); n++) {
        rw_flags(port, "", 0, VIRTIO_VSOCK_SEQ_EOM);
        while (got_packet() && hdr.op != VIRTIO_VSOCK_OP_RST)
            ;
    }
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RST);
    assert_in_range(n, 4097, 19999);
    close(fd);
}

static void test_messages_last(void **state UNUSED)
{
    start_messages();
    last_bytes(true);
}

static void test_messages_other_guests(void **state UNUSED)
{
    char where[160];
    u32 len = sizeof("CONNECT 1234\n") - 1;
    char more[] = "CONNECT 1234\nmore";
    int l, fd;

    start_messages();
    snprintf(where, sizeof(where), "%s/.cid-9", dir);
    assert_int_equal(mkdir(where, 0700), 0);
    snprintf(where, sizeof(where), "%s/.cid-9/vsock.seq", dir);
    l = listen_at(where);
    packet(to(9, 80, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);
    fd = accept(l, NULL, NULL);
    expect_text(fd, "CONNECT 80 FROM 7:1234 MARKED\n");
    send(fd, "OK 80\n", 6, 0);
    send(fd, "\0hi", 3, 0);
    expect(VIRTIO_VSOCK_OP_RESPONSE, 80);
    expect_end(80, 2, true);
    close(fd);
    turn();
    packet(to(9, 81, VIRTIO_VSOCK_OP_REQUEST), NULL, 0);           /* what is no line is no answer */
    fd = accept(l, NULL, NULL);
    send(fd, "OK 80\nhi", 8, 0);
    while (got_packet() && hdr.src_port != 81)
        ;
    assert_int_equal(hdr.op, VIRTIO_VSOCK_OP_RST);
    close(fd);
    close(l);
    fd = client("CONNECT 1234 FROM 9:555\n");
    expect(VIRTIO_VSOCK_OP_REQUEST, 555);
    packet(to(9, 555, VIRTIO_VSOCK_OP_RESPONSE), NULL, 0);
    expect_text(fd, "OK 555\n");
    close(fd);
    turn();
    while (got_packet())
        ;
    fd = client(more);                                             /* nor a request */
    assert_true(hung_up(fd));
    close(fd);
    more[len - 1] = 0;
    fd = client(more);
    assert_true(hung_up(fd));
    close(fd);
    assert_false(got_packet());
}

/* A driver that knows streams only. */
static void test_messages_not_wanted(void **state UNUSED)
{
    int fd;

    start_with(8);
    type = VIRTIO_VSOCK_TYPE_SEQPACKET;
    fd = client("CONNECT 1234\n");
    assert_true(hung_up(fd));
    close(fd);
    assert_false(got_packet());
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_identity, setup, teardown),
        cmocka_unit_test_setup_teardown(test_host_calls, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nonsense, setup, teardown),
        cmocka_unit_test_setup_teardown(test_silent_clients, setup, teardown),
        cmocka_unit_test_setup_teardown(test_guest_calls, setup, teardown),
        cmocka_unit_test_setup_teardown(test_half_closed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_credit_of_guest, setup, teardown),
        cmocka_unit_test_setup_teardown(test_credit_of_host, setup, teardown),
        cmocka_unit_test_setup_teardown(test_at_once, setup, teardown),
        cmocka_unit_test_setup_teardown(test_last_bytes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_guests, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bad_packets, setup, teardown),
        cmocka_unit_test_setup_teardown(test_answers_wait, setup, teardown),
        cmocka_unit_test_setup_teardown(test_small_buffer, setup, teardown),
        cmocka_unit_test_setup_teardown(test_reset, setup, teardown),
        cmocka_unit_test_setup_teardown(test_save_and_load, setup, teardown),
        cmocka_unit_test_setup_teardown(test_many, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_from_host, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_credit, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_from_guest, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_wait, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_marked, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_empty, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_last, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_other_guests, setup, teardown),
        cmocka_unit_test_setup_teardown(test_messages_not_wanted, setup, teardown),
    };
    /* All of it with split rings, and with packed ones. */
    int r = cmocka_run_group_tests_name("split", tests, NULL, NULL);

    packed = BIT(VIRTIO_F_RING_PACKED);
    return r + cmocka_run_group_tests_name("packed", tests, NULL, NULL);
}
