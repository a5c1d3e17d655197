/* The legacy interface of transitional virtio devices by register accesses, as drivers before virtio 1.0 make them: entropy, disk, console. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_console.h>

#include "dev/virtio_blk.h"
#include "dev/virtio_console.h"
#include "dev/virtio_rng.h"
#include "virtio_guest.h"

#define RNG 2
#define DISK 3
#define CONSOLE 4
#define BUF 0x200000ull
#define HEAD 0x210000ull
#define STATUS 0x220000ull
#define ACK (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER)
#define DRIVER_OK (ACK | VIRTIO_CONFIG_S_DRIVER_OK)

static struct guest g;
static struct loop *loop;
static struct device *rng, *disk, *console;
static struct vport *port;
static char image[] = "/tmp/doppel-legacy-XXXXXX";
static char got[64];
static size_t got_len;

static size_t guest_data(void *arg UNUSED, const void *data, size_t len)
{
    assert_true(len <= sizeof(got) - got_len);
    memcpy(got + got_len, data, len);
    got_len += len;
    return len;
}

static void stop(void *arg)
{
    loop_stop(arg);
}

static void turn(void)
{
    for (int i = 0; i < 4; i++) {
        loop_post(loop, stop, loop);
        assert_int_equal(loop_run(loop), 0);
    }
}

static int setup(void **state UNUSED)
{
    static const struct vport_ops ops = { .guest_data = guest_data };
    struct vport_config cfg = { .ops = &ops, .console = true };
    struct virtio_console *con;
    struct virtio_blk *blk;
    struct virtio_rng *r;
    struct block *b;

    guest_new(&g);
    got_len = 0;
    assert_int_equal(truncate(image, 1 * MiB), 0);
    assert_int_equal(loop_new(&loop), 0);
    assert_int_equal(block_open(&(struct block_config){ .path = image, .readonly = false }, &b), 0);
    assert_int_equal(virtio_rng_new(&g.ram, NULL, &r), 0);
    assert_int_equal(virtio_blk_new(&g.ram, NULL, b, "disk", 1, &blk), 0);
    assert_int_equal(virtio_console_new(&g.ram, NULL, loop, &cfg, 1, &con), 0);
    port = virtio_console_port(con, 0);
    rng = (struct device *)r;
    disk = (struct device *)blk;
    console = (struct device *)con;
    assert_int_equal(virtio_pci_attach(g.pci, RNG, guest_line(&g), 20, true, (struct virtio *)rng), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DISK, guest_line(&g), 20, true, (struct virtio *)disk), 0);
    assert_int_equal(virtio_pci_attach(g.pci, CONSOLE, guest_line(&g), 20, true, (struct virtio *)console), 0);
    for (unsigned dev = RNG; dev <= CONSOLE; dev++)
        ecam_write(&g, dev, PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    return 0;
}

static int teardown(void **state UNUSED)
{
    device_free(console);
    device_free(disk);
    device_free(rng);
    turn();
    loop_free(loop);
    guest_free(&g);
    return 0;
}

static u64 reg(unsigned dev, unsigned off)
{
    return (ecam_read(&g, dev, PCI_BASE_ADDRESS_0, 4) & ~3u) + off;
}

static u32 in(unsigned dev, unsigned off, unsigned size)
{
    return (u32)bus_read(g.pio, reg(dev, off), size);
}

static void out(unsigned dev, unsigned off, unsigned size, u32 val)
{
    bus_write(g.pio, reg(dev, off), val, size);
}

static void set_status(unsigned dev, u8 val)
{
    out(dev, VIRTIO_PCI_STATUS, 1, val);
}

/* The layout of 2.7.2: the used ring begins on the next page. */
static void queue(unsigned dev, unsigned n, struct gq *q)
{
    static const u8 zero[4096];
    u16 size;

    out(dev, VIRTIO_PCI_QUEUE_SEL, 2, n);
    size = (u16)in(dev, VIRTIO_PCI_QUEUE_NUM, 2);
    assert_true(size && in(dev, VIRTIO_PCI_QUEUE_PFN, 4) == 0);
    *q = (struct gq){ .g = &g, .size = size, .desc = guest_alloc(&g, 4 * 4096) };
    q->avail = q->desc + 16ull * size;
    q->used = ALIGN_UP(q->avail + 2ull * size + 6, 4096);
    for (u64 p = q->desc; p < g.heap; p += sizeof(zero))
        put(&g, p, zero, MIN(sizeof(zero), g.heap - p));
    out(dev, VIRTIO_PCI_QUEUE_PFN, 4, (u32)(q->desc >> 12));
    assert_int_equal(in(dev, VIRTIO_PCI_QUEUE_PFN, 4), q->desc >> 12);
}

static void kick(unsigned dev, unsigned n)
{
    out(dev, VIRTIO_PCI_QUEUE_NOTIFY, 2, n);
}

static bool wait_used(struct gq *q, u32 *len)
{
    u32 id;

    for (unsigned i = 0; i < 20000; i++) {
        if (gq_used(q, &id, len))
            return true;
        usleep(100);
    }
    return false;
}

static void test_identity(void **state UNUSED)
{
    struct vdev d;

    assert_int_equal(ecam_read(&g, RNG, PCI_VENDOR_ID, 4), 0x10051af4);
    assert_int_equal(ecam_read(&g, DISK, PCI_VENDOR_ID, 4), 0x10011af4);
    assert_int_equal(ecam_read(&g, CONSOLE, PCI_VENDOR_ID, 4), 0x10031af4);
    for (unsigned dev = RNG; dev <= CONSOLE; dev++) {
        assert_int_equal(ecam_read(&g, dev, PCI_REVISION_ID, 1), 0);
        assert_int_equal(ecam_read(&g, dev, PCI_BASE_ADDRESS_0, 1) & 3, PCI_BASE_ADDRESS_SPACE_IO);
        vdev_find(&d, &g, dev);                                    /* and the modern capabilities */
        assert_true(d.common && d.notify && d.isr && d.window && d.msix);
        assert_true(vdev_features(&d) & BIT(VIRTIO_F_VERSION_1));
    }
    assert_int_equal(ecam_read(&g, RNG, PCI_SUBSYSTEM_ID, 2), VIRTIO_ID_RNG);
    assert_int_equal(ecam_read(&g, DISK, PCI_SUBSYSTEM_ID, 2), VIRTIO_ID_BLOCK);
    assert_int_equal(ecam_read(&g, CONSOLE, PCI_SUBSYSTEM_ID, 2), VIRTIO_ID_CONSOLE);
    assert_int_equal(in(RNG, VIRTIO_PCI_HOST_FEATURES, 4),
                     BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC) | BIT(VIRTIO_F_ANY_LAYOUT));
}

/* The configuration of the device moves when MSI-X is switched on, and vectors appear where it was (4.1.4.10). */
static void test_configuration_moves(void **state UNUSED)
{
    struct vdev d;

    assert_int_equal(in(DISK, 20, 4), 2048);                       /* capacity */
    assert_int_equal(in(DISK, 20 + offsetof(struct virtio_blk_config, blk_size), 4), 512);
    vdev_find(&d, &g, DISK);
    vdev_msix(&d, 2);
    assert_int_equal(in(DISK, 24, 4), 2048);
    assert_int_equal(in(DISK, VIRTIO_MSI_CONFIG_VECTOR, 4), 0xffffffff);
    out(DISK, VIRTIO_MSI_CONFIG_VECTOR, 2, 0);
    out(DISK, VIRTIO_MSI_QUEUE_VECTOR, 2, 1);
    assert_int_equal(in(DISK, VIRTIO_MSI_CONFIG_VECTOR, 4), 0x00010000);
    out(DISK, VIRTIO_MSI_QUEUE_VECTOR, 2, 2);                      /* there are vectors 0 and 1 */
    assert_int_equal(in(DISK, VIRTIO_MSI_QUEUE_VECTOR, 2), VIRTIO_NO_VECTOR);
}

static void test_random_bytes(void **state UNUSED)
{
    u8 a[64], zero[64] = { 0 };
    struct gq q;
    u32 len;

    set_status(RNG, 0);
    set_status(RNG, ACK);
    out(RNG, VIRTIO_PCI_GUEST_FEATURES, 4, 0);
    queue(RNG, 0, &q);
    set_status(RNG, DRIVER_OK);
    assert_int_equal(in(RNG, VIRTIO_PCI_STATUS, 1), DRIVER_OK);
    gq_add(&q, (struct buf[]){ { BUF, 64, true } }, 1);
    kick(RNG, 0);
    assert_true(wait_used(&q, &len));
    assert_int_equal(len, 64);
    get(&g, BUF, a, 64);
    assert_memory_not_equal(a, zero, 64);
    assert_int_equal(g.intx, 1);
    assert_int_equal(in(RNG, VIRTIO_PCI_ISR, 1), 1);               /* reading acknowledges */
    assert_int_equal(g.intx, 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_ISR, 1), 0);
    set_status(RNG, 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_STATUS, 1), 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_QUEUE_PFN, 4), 0);
}

static void test_msix(void **state UNUSED)
{
    struct vdev d;
    struct gq q;
    u32 len;

    vdev_find(&d, &g, RNG);
    vdev_msix(&d, 2);
    set_status(RNG, ACK);
    queue(RNG, 0, &q);
    out(RNG, VIRTIO_MSI_QUEUE_VECTOR, 2, 1);
    set_status(RNG, DRIVER_OK);
    gq_add(&q, (struct buf[]){ { BUF, 64, true } }, 1);
    kick(RNG, 0);
    assert_true(wait_used(&q, &len));
    assert_int_equal(g.msi[1], 1);
    assert_int_equal(g.intx, 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_ISR, 1), 0);
}

/* 3.1.2: before DRIVER_OK, even before the features. The modern interface stays as strict as it is. */
static void test_early_use(void **state UNUSED)
{
    struct vdev d;
    struct gq q;
    u32 len;

    queue(RNG, 0, &q);
    gq_add(&q, (struct buf[]){ { BUF, 64, true } }, 1);
    kick(RNG, 0);
    assert_true(wait_used(&q, &len));
    set_status(RNG, 0);
    vdev_find(&d, &g, RNG);
    vdev_set_status(&d, DRIVER_OK);
    assert_int_equal(vdev_status(&d), ACK);
}

static void test_features(void **state UNUSED)
{
    set_status(RNG, ACK);
    out(RNG, VIRTIO_PCI_GUEST_FEATURES, 4, ~0u);                   /* only what is offered is taken */
    assert_int_equal(in(RNG, VIRTIO_PCI_GUEST_FEATURES, 4), in(RNG, VIRTIO_PCI_HOST_FEATURES, 4));
    assert_true(((struct virtio *)rng)->queue[0].event_idx);
    set_status(RNG, ACK | VIRTIO_CONFIG_S_FEATURES_OK);            /* no such bit here */
    assert_int_equal(in(RNG, VIRTIO_PCI_STATUS, 1), ACK);
    set_status(RNG, DRIVER_OK);
    out(RNG, VIRTIO_PCI_GUEST_FEATURES, 4, 0);                     /* too late */
    assert_int_not_equal(in(RNG, VIRTIO_PCI_GUEST_FEATURES, 4), 0);
}

/* A modern driver that has negotiated is not made a legacy one; but a reset is one by either interface. */
static void test_both_interfaces(void **state UNUSED)
{
    struct vdev d;

    vdev_find(&d, &g, RNG);
    assert_true(vdev_negotiate(&d, BIT(VIRTIO_F_VERSION_1)));
    out(RNG, VIRTIO_PCI_GUEST_FEATURES, 4, ~0u);
    out(RNG, VIRTIO_PCI_QUEUE_PFN, 4, 0x100);
    assert_false(((struct virtio *)rng)->legacy || ((struct virtio *)rng)->queue[0].enabled);
    assert_int_equal(((struct virtio *)rng)->accepted, BIT(VIRTIO_F_VERSION_1));
    set_status(RNG, 0);
    assert_int_equal(vdev_status(&d), 0);
    set_status(RNG, ACK);
    assert_false(vdev_negotiate(&d, BIT(VIRTIO_F_VERSION_1)));
    vdev_set_status(&d, 0);
    assert_true(vdev_negotiate(&d, BIT(VIRTIO_F_VERSION_1)));
}

/* Given back before DRIVER_OK it can be given again, and features stay; afterwards the whole device is reset. */
static void test_queue_given_back(void **state UNUSED)
{
    struct gq q;
    u32 len;

    set_status(RNG, ACK);
    out(RNG, VIRTIO_PCI_GUEST_FEATURES, 4, BIT(VIRTIO_RING_F_INDIRECT_DESC));
    queue(RNG, 0, &q);
    out(RNG, VIRTIO_PCI_QUEUE_PFN, 4, 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_QUEUE_PFN, 4), 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_STATUS, 1), ACK);
    assert_int_equal(in(RNG, VIRTIO_PCI_GUEST_FEATURES, 4), BIT(VIRTIO_RING_F_INDIRECT_DESC));
    queue(RNG, 0, &q);
    set_status(RNG, DRIVER_OK);
    gq_add(&q, (struct buf[]){ { BUF, 64, true } }, 1);
    kick(RNG, 0);
    assert_true(wait_used(&q, &len));
    out(RNG, VIRTIO_PCI_QUEUE_PFN, 4, 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_STATUS, 1), 0);
}

static void test_bad_queue(void **state UNUSED)
{
    out(RNG, VIRTIO_PCI_QUEUE_PFN, 4, 0xffffffff);
    assert_true(in(RNG, VIRTIO_PCI_STATUS, 1) & VIRTIO_CONFIG_S_NEEDS_RESET);
    set_status(RNG, 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_STATUS, 1), 0);
    out(RNG, VIRTIO_PCI_QUEUE_SEL, 2, 1);                          /* no such queue */
    assert_int_equal(in(RNG, VIRTIO_PCI_QUEUE_NUM, 2), 0);
    out(RNG, VIRTIO_PCI_QUEUE_PFN, 4, 0x100);
    assert_int_equal(in(RNG, VIRTIO_PCI_QUEUE_PFN, 4), 0);
    kick(RNG, 0xffff);
}

static void test_odd_accesses(void **state UNUSED)
{
    out(RNG, VIRTIO_PCI_GUEST_FEATURES, 2, 0xffff);                /* not the field's width */
    assert_int_equal(in(RNG, VIRTIO_PCI_GUEST_FEATURES, 4), 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_QUEUE_NUM, 4), 64);        /* reads of any: size and selected queue */
    set_status(RNG, 3);
    assert_int_equal(in(RNG, VIRTIO_PCI_QUEUE_NOTIFY, 4), 3 << 16);
    for (unsigned off = 0; off < 32; off++)
        for (unsigned size = 1; size <= 8; size *= 2)
            in(RNG, off, size);
}

static void put_head(u32 type, u64 sector)
{
    struct virtio_blk_outhdr h = { .type = type, .sector = sector };

    put(&g, HEAD, &h, sizeof(h));
}

static void test_disk(void **state UNUSED)
{
    u8 data[512], back[512], status = 0xee;
    struct gq q;
    u32 len;
    int fd;

    memset(data, 0x5a, sizeof(data));
    put(&g, BUF, data, sizeof(data));
    put(&g, STATUS, &status, 1);
    set_status(DISK, ACK);
    queue(DISK, 0, &q);
    set_status(DISK, DRIVER_OK);
    put_head(VIRTIO_BLK_T_OUT, 7);
    gq_add(&q, (struct buf[]){ { HEAD, 16, false }, { BUF, 512, false }, { STATUS, 1, true } }, 3);
    kick(DISK, 0);
    assert_true(wait_used(&q, &len));
    get(&g, STATUS, &status, 1);
    assert_int_equal(status, VIRTIO_BLK_S_OK);
    fd = open(image, O_RDONLY);
    assert_int_equal(pread(fd, back, 512, 7 * 512), 512);
    close(fd);
    assert_memory_equal(data, back, 512);
}

/* A legacy driver does not wait: with requests in flight, the store that resets takes until none is, and the driver goes on at once. */
static void test_disk_reset_in_flight(void **state UNUSED)
{
    struct gq q;
    u32 len;

    for (unsigned i = 0; i < 50; i++) {
        g.heap = GUEST_HEAP;
        set_status(DISK, ACK);
        queue(DISK, 0, &q);
        set_status(DISK, DRIVER_OK);
        put_head(VIRTIO_BLK_T_IN, i);
        for (unsigned n = 0; n < 16; n++)
            gq_add(&q, (struct buf[]){ { HEAD, 16, false }, { BUF + n * 0x8000, 0x8000, true }, { STATUS + n, 1, true } }, 3);
        kick(DISK, 0);
        set_status(DISK, 0);
        assert_int_equal(in(DISK, VIRTIO_PCI_STATUS, 1), 0);
        assert_int_equal(in(DISK, VIRTIO_PCI_QUEUE_PFN, 4), 0);
    }
    set_status(DISK, ACK);
    queue(DISK, 0, &q);
    set_status(DISK, DRIVER_OK);
    gq_add(&q, (struct buf[]){ { HEAD, 16, false }, { BUF, 512, true }, { STATUS, 1, true } }, 3);
    kick(DISK, 0);
    assert_true(wait_used(&q, &len));
    assert_int_equal(len, 513);
}

static void test_console(void **state UNUSED)
{
    struct gq q[2];
    char text[5] = "";
    u32 len;

    set_status(CONSOLE, ACK);
    out(CONSOLE, VIRTIO_PCI_GUEST_FEATURES, 4, 0);                 /* one port, always open */
    queue(CONSOLE, 0, &q[0]);
    queue(CONSOLE, 1, &q[1]);
    set_status(CONSOLE, DRIVER_OK);
    turn();
    assert_true(vport_guest_open(port));
    put(&g, BUF, "hello", 5);
    gq_add(&q[1], (struct buf[]){ { BUF, 5, false } }, 1);
    kick(CONSOLE, 1);
    turn();
    assert_true(wait_used(&q[1], &len));
    assert_int_equal(got_len, 5);
    assert_memory_equal(got, "hello", 5);
    gq_add(&q[0], (struct buf[]){ { BUF + 4096, 64, true } }, 1);
    assert_int_equal(vport_send(port, "world", 5), 5);
    get(&g, BUF + 4096, text, 5);
    assert_memory_equal(text, "world", 5);
    set_status(CONSOLE, 0);                                        /* ends at once, without the loop */
    assert_int_equal(in(CONSOLE, VIRTIO_PCI_STATUS, 1), 0);
    turn();
    assert_false(vport_guest_open(port));
}

static void test_state(void **state UNUSED)
{
    struct stream s, l;
    struct gq q;
    u32 len;

    set_status(RNG, ACK);
    out(RNG, VIRTIO_PCI_GUEST_FEATURES, 4, BIT(VIRTIO_F_ANY_LAYOUT));
    queue(RNG, 0, &q);
    stream_save_init(&s);
    rng->ops->state(rng, &s);
    assert_int_equal(s.error, 0);
    rng->ops->reset(rng);
    assert_int_equal(in(RNG, VIRTIO_PCI_STATUS, 1), 0);
    stream_load_init(&l, s.buf, s.len);
    rng->ops->state(rng, &l);
    assert_int_equal(l.error, 0);
    assert_int_equal(in(RNG, VIRTIO_PCI_STATUS, 1), ACK);
    assert_int_equal(in(RNG, VIRTIO_PCI_GUEST_FEATURES, 4), BIT(VIRTIO_F_ANY_LAYOUT));
    gq_add(&q, (struct buf[]){ { BUF, 64, true } }, 1);
    kick(RNG, 0);                                                  /* before DRIVER_OK: it is a legacy driver still */
    assert_true(wait_used(&q, &len));
    stream_free(&s);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_identity), T(test_configuration_moves), T(test_random_bytes), T(test_msix), T(test_early_use), T(test_features),
        T(test_both_interfaces), T(test_queue_given_back), T(test_bad_queue), T(test_odd_accesses), T(test_disk),
        T(test_disk_reset_in_flight), T(test_console), T(test_state),
    };
    int fd = mkstemp(image), r;

    if (fd < 0)
        return 1;
    close(fd);
    r = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(image);
    return r;
}
