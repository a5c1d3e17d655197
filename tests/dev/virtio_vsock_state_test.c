/*
 * virtio vsock: what breaks the rules, answers that wait, resets, save and load.
 */
#include "vsock_guest.h"

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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        VSOCK_TEST(test_bad_packets),
        VSOCK_TEST(test_answers_wait),
        VSOCK_TEST(test_small_buffer),
        VSOCK_TEST(test_reset),
        VSOCK_TEST(test_save_and_load),
    };
    return VSOCK_ROUNDS(tests);
}
