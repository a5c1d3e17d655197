/*
 * virtio vsock, messages (SEQPACKET): where they end, credit, marks, empty ones, between guests, and a driver that does not know of them.
 */
#include "vsock_guest.h"

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
        VSOCK_TEST(test_messages_from_host),
        VSOCK_TEST(test_messages_credit),
        VSOCK_TEST(test_messages_from_guest),
        VSOCK_TEST(test_messages_wait),
        VSOCK_TEST(test_messages_marked),
        VSOCK_TEST(test_messages_empty),
        VSOCK_TEST(test_messages_last),
        VSOCK_TEST(test_messages_other_guests),
        VSOCK_TEST(test_messages_not_wanted),
    };
    return VSOCK_ROUNDS(tests);
}
