/* Console ports from both sides: the handshake, streams with back-pressure in both directions, opening and closing, resets, save and load. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <linux/virtio_console.h>

#include "dev/virtio_console.h"
#include "virtio_guest.h"
#include "turns.h"

#define DEV 5
#define PORTS 3
#define QUEUE 64
#define CONTROL_RX 2
#define CONTROL_TX 3
#define BASE (BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC))
#define ALL (BASE | BIT(VIRTIO_CONSOLE_F_MULTIPORT) | BIT(VIRTIO_CONSOLE_F_SIZE))
#define BUFFERS 0x400000ull                                        /* RX buffers: 4 KiB each */
#define OUT 0x600000ull

/* The host's end of a port. */
struct end {
    struct vport *port;
    u8 *got;
    size_t len, cap;
    size_t room;                                                   /* how much guest_data() takes before it says stop */
    unsigned opens, closes, rooms;
    bool reset_inside, resume_inside;
};

static struct guest g;
static struct loop *loop;
static struct virtio_console *con;
static struct vdev d;
static struct end end[PORTS];

static size_t guest_data(void *arg, const void *data, size_t len)
{
    struct end *e = arg;
    size_t n = MIN(len, e->room);

    assert_true(len > 0);
    if (e->reset_inside) {
        e->reset_inside = false;
        ((struct device *)con)->ops->reset((struct device *)con);
    }
    if (e->resume_inside) {
        e->resume_inside = false;
        e->room = SIZE_MAX;
        vport_resume(e->port);
    }
    if (e->len + n > e->cap) {
        e->cap = (e->len + n) * 2;
        e->got = realloc(e->got, e->cap);
        assert_non_null(e->got);
    }
    if (n)
        memcpy(e->got + e->len, data, n);
    e->len += n;
    e->room -= e->room == SIZE_MAX ? 0 : n;
    return n;
}

static void guest_open(void *arg, bool open)
{
    struct end *e = arg;

    if (open)
        e->opens++;
    else
        e->closes++;
}

static void room(void *arg)
{
    ((struct end *)arg)->rooms++;
}

static const struct vport_ops ops = { .guest_data = guest_data, .guest_open = guest_open, .room = room };

static void turn(void)
{
    turns(loop, 8);
}

static int setup(void **state UNUSED)
{
    struct vport_config cfg[PORTS] = {
        { .name = "org.example.0", .ops = &ops, .arg = &end[0] },
        { .name = "org.example.1", .ops = &ops, .arg = &end[1], .console = true },
        { .name = "closed" },
    };

    guest_new(&g);
    memset(end, 0, sizeof(end));
    assert_int_equal(loop_new(&loop), 0);
    assert_int_equal(virtio_console_new(&g.ram, NULL, loop, cfg, PORTS, &con), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 20, false, (struct virtio *)con), 0);
    for (unsigned n = 0; n < PORTS; n++) {
        end[n].port = virtio_console_port(con, n);
        end[n].room = SIZE_MAX;
    }
    return 0;
}

static int teardown(void **state UNUSED)
{
    vdev_kick(&d, 0);                                              /* something is posted still when the device goes */
    device_free(con);
    turn();
    loop_free(loop);
    guest_free(&g);
    for (unsigned n = 0; n < PORTS; n++)
        free(end[n].got);
    return 0;
}

static void control(u32 id, u16 event, u16 value)
{
    struct virtio_console_control msg = { .id = id, .event = event, .value = value };

    put(&g, OUT, &msg, sizeof(msg));
    gq_add(&d.q[CONTROL_TX], (struct buf[]){ { OUT, sizeof(msg), false } }, 1);
    vdev_kick(&d, CONTROL_TX);
    turn();
}

static unsigned rxq(unsigned port)
{
    return port ? 2 + 2 * port : 0;
}

/* The buffer of queue n that descriptor i stands for. */
static u64 buffer(unsigned n, unsigned i)
{
    return BUFFERS + (n == CONTROL_RX ? 0 : 1 + (u64)rxq(n) / 2) * QUEUE * 4096 + i * 4096ull;
}

static void fill_rx(unsigned n, unsigned port, unsigned count)
{
    while (count--)
        gq_add(&d.q[n], (struct buf[]){ { n == CONTROL_RX ? BUFFERS + d.q[n].next_desc % QUEUE * 256 : buffer(port, d.q[n].next_desc % QUEUE),
                                          n == CONTROL_RX ? 256 : 4096, true } }, 1);
    vdev_kick(&d, n);
}

static void start(u64 features)
{
    assert_true(vdev_start(&d, &g, DEV, features, QUEUE));
    if (features & BIT(VIRTIO_CONSOLE_F_MULTIPORT))
        fill_rx(CONTROL_RX, 0, 32);
    turn();
}

/* The next control message: event << 16 | id, its value and what follows. -1: none. */
static int heard(u16 *value, char *more, size_t size)
{
    struct virtio_console_control msg;
    u32 id, len;

    if (!gq_used(&d.q[CONTROL_RX], &id, &len))
        return -1;
    get(&g, BUFFERS + id * 256, &msg, sizeof(msg));
    if (value)
        *value = msg.value;
    if (more) {
        memset(more, 0, size);
        get(&g, BUFFERS + id * 256 + sizeof(msg), more, MIN(len - sizeof(msg), size - 1));
    }
    return msg.event << 16 | (int)msg.id;
}

#define HEARD(event, id) ((event) << 16 | (id))

static void open_ports(void)
{
    start(ALL);
    control(~0u, VIRTIO_CONSOLE_DEVICE_READY, 1);
    for (unsigned n = 0; n < PORTS; n++) {
        control(n, VIRTIO_CONSOLE_PORT_READY, 1);
        control(n, VIRTIO_CONSOLE_PORT_OPEN, 1);
    }
    while (heard(NULL, NULL, 0) >= 0)
        ;
}

static void test_handshake(void **state UNUSED)
{
    u16 value;
    char text[64];

    start(ALL);
    assert_int_equal(bus_read(g.mmio, d.config + 4, 4), PORTS);
    assert_int_equal(common_get(&d, COMMON(num_queues), 2), 2 * PORTS + 2);
    assert_int_equal(heard(NULL, NULL, 0), -1);
    control(~0u, VIRTIO_CONSOLE_DEVICE_READY, 1);
    for (unsigned n = 0; n < PORTS; n++)
        assert_int_equal(heard(NULL, NULL, 0), HEARD(VIRTIO_CONSOLE_PORT_ADD, (int)n));
    assert_int_equal(heard(NULL, NULL, 0), -1);
    control(0, VIRTIO_CONSOLE_PORT_READY, 1);
    assert_int_equal(heard(NULL, text, sizeof(text)), HEARD(VIRTIO_CONSOLE_PORT_NAME, 0));
    assert_string_equal(text, "org.example.0");
    assert_int_equal(heard(&value, NULL, 0), HEARD(VIRTIO_CONSOLE_PORT_OPEN, 0));
    assert_int_equal(value, 1);
    vport_resize(end[1].port, 132, 43);
    control(1, VIRTIO_CONSOLE_PORT_READY, 1);
    assert_int_equal(heard(NULL, NULL, 0), HEARD(VIRTIO_CONSOLE_PORT_NAME, 1));
    assert_int_equal(heard(NULL, NULL, 0), HEARD(VIRTIO_CONSOLE_CONSOLE_PORT, 1));
    assert_int_equal(heard(NULL, NULL, 0), HEARD(VIRTIO_CONSOLE_PORT_OPEN, 1));
    assert_int_equal(heard(NULL, text, sizeof(text)), HEARD(VIRTIO_CONSOLE_RESIZE, 1));
    assert_memory_equal(text, ((u16[]){ 43, 132 }), 4);
    control(2, VIRTIO_CONSOLE_PORT_READY, 1);
    assert_int_equal(heard(NULL, text, sizeof(text)), HEARD(VIRTIO_CONSOLE_PORT_NAME, 2));
    assert_int_equal(heard(NULL, NULL, 0), -1);                    /* nobody on the host's side: not open */
    assert_int_equal(end[0].opens, 0);
    control(0, VIRTIO_CONSOLE_PORT_OPEN, 1);
    assert_int_equal(end[0].opens, 1);
    assert_true(vport_guest_open(end[0].port));
    control(0, VIRTIO_CONSOLE_PORT_OPEN, 0);
    assert_int_equal(end[0].closes, 1);
}

static void test_bad_control(void **state UNUSED)
{
    start(ALL);
    control(PORTS, VIRTIO_CONSOLE_PORT_READY, 1);
    control(~0u, VIRTIO_CONSOLE_PORT_OPEN, 1);
    control(0, 999, 1);
    put(&g, OUT, "abc", 3);
    gq_add(&d.q[CONTROL_TX], (struct buf[]){ { OUT, 3, false } }, 1);
    vdev_kick(&d, CONTROL_TX);
    turn();
    assert_int_equal(heard(NULL, NULL, 0), -1);
    assert_int_equal(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    assert_int_equal(gq_used_idx(&d.q[CONTROL_TX]), 4);
}

/* Control messages wait for buffers, and come in order. */
static void test_control_without_buffers(void **state UNUSED)
{
    assert_true(vdev_start(&d, &g, DEV, ALL, QUEUE));
    control(~0u, VIRTIO_CONSOLE_DEVICE_READY, 1);
    assert_int_equal(heard(NULL, NULL, 0), -1);
    for (int n = 0; n < PORTS; n++) {
        fill_rx(CONTROL_RX, 0, 1);
        turn();
        assert_int_equal(heard(NULL, NULL, 0), HEARD(VIRTIO_CONSOLE_PORT_ADD, n));
        assert_int_equal(heard(NULL, NULL, 0), -1);
    }
}

static void write_port(unsigned port, const void *data, u32 len)
{
    put(&g, OUT + 4096 * (port + 1), data, len);
    gq_add(&d.q[rxq(port) + 1], (struct buf[]){ { OUT + 4096 * (port + 1), len, false } }, 1);
    vdev_kick(&d, rxq(port) + 1);
    turn();
}

static void test_from_guest(void **state UNUSED)
{
    u32 id, len;

    open_ports();
    write_port(0, "zero\0\xff", 6);
    write_port(1, "one", 3);
    assert_int_equal(end[0].len, 6);
    assert_memory_equal(end[0].got, "zero\0\xff", 6);
    assert_int_equal(end[1].len, 3);
    assert_true(gq_used(&d.q[1], &id, &len));
    assert_int_equal(len, 0);
    assert_true(g.msi[2] > 0);
    write_port(2, "nobody", 6);                                    /* no host's side: consumed all the same */
    assert_true(gq_used(&d.q[rxq(2) + 1], &id, &len));
}

/* A consumer that takes little: the chain stays with the device, whole bytes in order, and the guest sees it used only at the end. */
static void test_slow_consumer(void **state UNUSED)
{
    u32 id, len;

    open_ports();
    end[0].room = 4;
    gq_add(&d.q[1], (struct buf[]){ { OUT + 4096, 3, false }, { OUT + 4099, 7, false } }, 2);
    put(&g, OUT + 4096, "abcdefghij", 10);
    vdev_kick(&d, 1);
    turn();
    assert_int_equal(end[0].len, 4);
    assert_false(gq_used(&d.q[1], &id, &len));
    write_port(1, "other", 5);                                     /* other ports go on */
    assert_int_equal(end[1].len, 5);
    end[0].room = 5;
    turn();
    assert_int_equal(end[0].len, 4);                               /* not before it says so */
    vport_resume(end[0].port);
    turn();
    assert_int_equal(end[0].len, 9);
    end[0].room = SIZE_MAX;
    vport_resume(end[0].port);
    turn();
    assert_memory_equal(end[0].got, "abcdefghij", 10);
    assert_true(gq_used(&d.q[1], &id, &len));
    end[0].room = 1;
    end[0].resume_inside = true;                                   /* resumed from inside the callback */
    write_port(0, "klm", 3);
    assert_int_equal(end[0].len, 13);
}

static void test_to_guest(void **state UNUSED)
{
    u32 id, len;
    char back[8] = "";

    start(ALL);
    control(~0u, VIRTIO_CONSOLE_DEVICE_READY, 1);
    control(0, VIRTIO_CONSOLE_PORT_READY, 1);
    fill_rx(0, 0, 2);
    turn();
    assert_int_equal(vport_send(end[0].port, "early", 5), 0);      /* the guest would discard it */
    assert_int_equal(end[0].rooms, 0);
    control(0, VIRTIO_CONSOLE_PORT_OPEN, 1);
    assert_int_equal(end[0].rooms, 1);
    assert_int_equal(vport_send(end[0].port, "early", 5), 5);
    assert_true(gq_used(&d.q[0], &id, &len));
    assert_int_equal(len, 5);
    get(&g, buffer(0, id), back, 5);
    assert_string_equal(back, "early");
    assert_true(g.msi[1] > 0);
    control(0, VIRTIO_CONSOLE_PORT_OPEN, 0);
    assert_int_equal(vport_send(end[0].port, "late", 4), 0);
}

/* The guest gives few buffers: what does not fit stays with the host, and it hears of new buffers once. */
static void test_slow_guest(void **state UNUSED)
{
    static u8 data[10000];
    u32 id, len;

    open_ports();
    fill_rx(0, 0, 2);
    turn();
    memset(data, 'x', sizeof(data));
    assert_int_equal(vport_send(end[0].port, data, sizeof(data)), 8192);
    turn();
    assert_int_equal(end[0].rooms, 0);
    assert_true(gq_used(&d.q[0], &id, &len) && len == 4096 && gq_used(&d.q[0], &id, &len) && len == 4096);
    fill_rx(0, 0, 1);
    turn();
    assert_int_equal(end[0].rooms, 1);
    assert_int_equal(vport_send(end[0].port, data + 8192, sizeof(data) - 8192), sizeof(data) - 8192);
    fill_rx(0, 0, 1);
    turn();
    assert_int_equal(end[0].rooms, 1);                             /* nobody waits for this one */
}

/* Nobody kicks for buffers that the device did not ask for: while the host waits for room, the device asks (avail_event). */
static void test_asks_for_room(void **state UNUSED)
{
    u16 event;

    open_ports();
    fill_rx(0, 0, 3);
    turn();
    assert_int_equal(vport_send(end[0].port, "abc", 3), 3);        /* takes one; nobody waits */
    control(0, VIRTIO_CONSOLE_PORT_OPEN, 0);
    assert_int_equal(vport_send(end[0].port, "abc", 3), 0);        /* waits from here on */
    control(0, VIRTIO_CONSOLE_PORT_OPEN, 1);
    assert_int_equal(end[0].rooms, 1);
    get(&g, d.q[0].used + 4 + 8 * QUEUE, &event, 2);
    assert_int_equal(event, 1);
}

static void test_host_closes(void **state UNUSED)
{
    u16 value;
    u32 id, len;

    open_ports();
    end[0].room = 0;
    write_port(0, "stuck", 5);
    vport_set_open(end[0].port, false);
    turn();
    assert_int_equal(heard(&value, NULL, 0), HEARD(VIRTIO_CONSOLE_PORT_OPEN, 0));
    assert_int_equal(value, 0);
    assert_true(gq_used(&d.q[1], &id, &len));                      /* nobody will take it: given back */
    assert_int_equal(end[0].len, 0);
    vport_set_open(end[0].port, false);
    turn();
    assert_int_equal(heard(NULL, NULL, 0), -1);
    vport_set_open(end[0].port, true);
    turn();
    assert_int_equal(heard(&value, NULL, 0), HEARD(VIRTIO_CONSOLE_PORT_OPEN, 0));
    assert_int_equal(value, 1);
}

static void test_without_multiport(void **state UNUSED)
{
    start(BASE | BIT(VIRTIO_CONSOLE_F_SIZE));
    assert_int_equal(end[0].opens, 1);
    write_port(0, "hi", 2);
    assert_int_equal(end[0].len, 2);
    fill_rx(0, 0, 1);
    assert_int_equal(vport_send(end[0].port, "yo", 2), 2);
    assert_int_equal(vport_send(end[1].port, "yo", 2), 0);
    vport_resize(end[0].port, 80, 25);
    assert_int_equal(bus_read(g.mmio, d.config, 4), 80 | 25 << 16);
    assert_int_equal(g.msi[0], 1);
}

/* What the guest sent before it reset the device still arrives; the reset ends on the loop. */
static void test_reset_drains(void **state UNUSED)
{
    open_ports();
    put(&g, OUT + 4096, "last words", 10);
    gq_add(&d.q[1], (struct buf[]){ { OUT + 4096, 10, false } }, 1);
    vdev_kick(&d, 1);
    vdev_set_status(&d, 0);
    assert_int_not_equal(vdev_status(&d), 0);
    turn();
    assert_int_equal(vdev_status(&d), 0);
    assert_int_equal(end[0].len, 10);
    assert_int_equal(end[0].closes, 1);
    assert_int_equal(vport_send(end[0].port, "x", 1), 0);
    g.heap = GUEST_HEAP;
    open_ports();
    assert_int_equal(end[0].opens, 2);
    write_port(0, "again", 5);
    assert_int_equal(end[0].len, 15);
}

/* A stalled chain does not hold up a reset. */
static void test_reset_while_stalled(void **state UNUSED)
{
    open_ports();
    end[0].room = 3;
    write_port(0, "abcdef", 6);
    vdev_set_status(&d, 0);
    turn();
    assert_int_equal(vdev_status(&d), 0);
    assert_int_equal(end[0].len, 3);
    g.heap = GUEST_HEAP;
    open_ports();
    end[0].room = SIZE_MAX;
    vport_resume(end[0].port);
    write_port(0, "ghi", 3);
    assert_memory_equal(end[0].got, "abcghi", 6);
}

/* The whole device is reset from within a callback, as a monitor's reset could be. */
static void test_reset_inside_callback(void **state UNUSED)
{
    open_ports();
    end[0].reset_inside = true;
    write_port(0, "boom", 4);
    assert_int_equal(vdev_status(&d), 0);
    assert_int_equal(end[0].closes, 1);
    g.heap = GUEST_HEAP;
    open_ports();
    write_port(0, "on", 2);
    assert_int_equal(end[0].len, 6);
}

static void test_broken_ring(void **state UNUSED)
{
    open_ports();
    gq_offer(&d.q[1], 1000);
    vdev_kick(&d, 1);
    turn();
    assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
    write_port(1, "ignored", 7);
    assert_int_equal(end[1].len, 0);
    vdev_set_status(&d, 0);
    turn();
    assert_int_equal(vdev_status(&d), 0);
}

static void test_small_control_buffer(void **state UNUSED)
{
    assert_true(vdev_start(&d, &g, DEV, ALL, QUEUE));
    gq_add(&d.q[CONTROL_RX], (struct buf[]){ { BUFFERS, 4, true } }, 1);
    control(~0u, VIRTIO_CONSOLE_DEVICE_READY, 1);
    assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
}

static void test_state(void **state UNUSED)
{
    struct device *dev = (struct device *)con;
    struct stream s, l;
    u32 id, len;

    open_ports();
    fill_rx(0, 0, 1);
    end[0].room = 4;
    write_port(0, "abcdefghij", 10);
    stream_save_init(&s);
    dev->ops->state(dev, &s);
    assert_int_equal(s.error, 0);
    dev->ops->reset(dev);
    turn();
    assert_int_equal(end[0].closes, 1);
    device_load(dev, &l, s.buf, s.len);
    assert_int_equal(l.error, 0);
    assert_int_equal(l.pos, l.len);
    turn();
    assert_int_equal(end[0].opens, 2);
    end[0].room = SIZE_MAX;
    vport_resume(end[0].port);
    turn();
    assert_int_equal(end[0].len, 10);
    assert_memory_equal(end[0].got, "abcdefghij", 10);
    assert_true(gq_used(&d.q[1], &id, &len));
    assert_int_equal(vport_send(end[0].port, "x", 1), 1);
    for (size_t cut = 0; cut < s.len; cut += 37) {                 /* cut short anywhere: an error, and no harm */
        dev->ops->reset(dev);
        device_load(dev, &l, s.buf, cut);
        assert_int_not_equal(l.error, 0);
        turn();
    }
    dev->ops->reset(dev);
    stream_free(&s);
}

/* 32 MiB in each direction, by odd sizes, every byte checked. The time is printed. */
static void test_throughput(void **state UNUSED)
{
    enum { TOTAL = 32 * 1024 * 1024, CHUNK = 32000 };
    static u8 data[CHUNK];
    struct timespec a, b;
    u64 sent = 0, back = 0, given = 0;
    u32 x = 1, y = 1;
    u32 id, len;

    open_ports();
    clock_gettime(CLOCK_MONOTONIC, &a);
    while (sent < TOTAL) {
        for (unsigned i = 0; i < 32; i++) {
            u32 n = (u32)MIN(CHUNK - i, TOTAL - sent);

            for (u32 k = 0; k < n; k++)
                data[k] = (u8)((x = x * 1664525 + 1013904223) >> 24);
            put(&g, OUT + i * CHUNK, data, n);
            if (n)
                gq_add(&d.q[1], (struct buf[]){ { OUT + i * CHUNK, n, false } }, 1);
            sent += n;
        }
        vdev_kick(&d, 1);
        turn();
    }
    assert_int_equal(end[0].len, TOTAL);
    for (u64 i = 0; i < TOTAL; i++)
        if (end[0].got[i] != (u8)((y = y * 1664525 + 1013904223) >> 24))
            fail_msg("byte %llu is wrong", (unsigned long long)i);
    fill_rx(0, 0, QUEUE);
    turn();
    while (back < TOTAL) {
        given += vport_send(end[0].port, end[0].got + given, TOTAL - given);
        while (gq_used(&d.q[0], &id, &len)) {
            get(&g, buffer(0, id), data, len);
            if (memcmp(data, end[0].got + back, len))
                fail_msg("bytes from %llu on are wrong", (unsigned long long)back);
            back += len;
            fill_rx(0, 0, 1);
        }
        turn();
    }
    assert_int_equal(given, TOTAL);
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("# %.0f MiB/s with the test's own checks\n", 64 / ((b.tv_sec - a.tv_sec) + (b.tv_nsec - a.tv_nsec) / 1e9));
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_handshake), T(test_bad_control), T(test_control_without_buffers), T(test_from_guest), T(test_slow_consumer), T(test_to_guest),
        T(test_slow_guest), T(test_asks_for_room), T(test_host_closes), T(test_without_multiport), T(test_reset_drains), T(test_reset_while_stalled),
        T(test_reset_inside_callback), T(test_broken_ring), T(test_small_control_buffer), T(test_state), T(test_throughput),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
