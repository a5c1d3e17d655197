/*
 * virtio vsock, streams, from both sides: calls both ways and between guests, credit both ways, each kind of end.
 */
#include "vsock_guest.h"

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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        VSOCK_TEST(test_identity),
        VSOCK_TEST(test_host_calls),
        VSOCK_TEST(test_refused),
        VSOCK_TEST(test_nonsense),
        VSOCK_TEST(test_silent_clients),
        VSOCK_TEST(test_guest_calls),
        VSOCK_TEST(test_half_closed),
        VSOCK_TEST(test_credit_of_guest),
        VSOCK_TEST(test_credit_of_host),
        VSOCK_TEST(test_at_once),
        VSOCK_TEST(test_last_bytes),
        VSOCK_TEST(test_other_guests),
        VSOCK_TEST(test_many),
    };
    return VSOCK_ROUNDS(tests);
}
