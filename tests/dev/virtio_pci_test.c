/* The virtio transport and its status machine by register accesses, with the entropy device behind it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "dev/virtio_rng.h"
#include "virtio_guest.h"

#define DEV 2
#define BUF 0x200000ull
#define V1 BIT(VIRTIO_F_VERSION_1)
#define ALL (V1 | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC))

static struct guest g;
static struct virtio_rng *rng;
static struct vdev d;
static unsigned warnings;

static void sink(void *arg UNUSED, enum log_level level UNUSED, const char *msg UNUSED)
{
    warnings++;
}

static const struct log log_to_sink = { .sink = sink };

static int setup(void **state UNUSED)
{
    guest_new(&g);
    warnings = 0;
    assert_int_equal(virtio_rng_new(&g.ram, &log_to_sink, &rng), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 20, false, (struct virtio *)rng), 0);
    vdev_find(&d, &g, DEV);
    return 0;
}

static int teardown(void **state UNUSED)
{
    device_free(rng);
    guest_free(&g);
    return 0;
}

/* Asks for len random bytes and kicks. */
static void ask(u32 len)
{
    gq_add(&d.q[0], (struct buf[]){ { BUF, len, true } }, 1);
    vdev_kick(&d, 0);
}

static void test_identity(void **state UNUSED)
{
    assert_int_equal(ecam_read(&g, DEV, PCI_VENDOR_ID, 4), 0x10441af4);
    assert_int_equal(ecam_read(&g, DEV, PCI_REVISION_ID, 1), 1);
    assert_true(d.common && d.notify && d.isr && d.window && d.msix);
    assert_int_equal(d.config_len, 0);
    assert_int_equal(common_get(&d, COMMON(num_queues), 2), 1);
    assert_int_equal(vdev_features(&d), ALL | BIT(VIRTIO_F_RING_PACKED));
    common_set(&d, COMMON(device_feature_select), 4, 2);
    assert_int_equal(common_get(&d, COMMON(device_feature), 4), 0);
}

static void test_random_bytes(void **state UNUSED)
{
    u8 a[64] = { 0 }, b[64] = { 0 };
    u32 id, len;

    assert_true(vdev_start(&d, &g, DEV, ALL, 8));
    ask(64);
    assert_true(gq_used(&d.q[0], &id, &len));
    assert_int_equal(len, 64);
    assert_int_equal(g.msi[1], 1);
    get(&g, BUF, a, 64);
    assert_memory_not_equal(a, b, 64);
    ask(64);
    get(&g, BUF, b, 64);
    assert_memory_not_equal(a, b, 64);
    ask(1 * MiB);                                                  /* bounded, and nothing behind the bound is touched */
    gq_used(&d.q[0], &id, &len);
    assert_true(gq_used(&d.q[0], &id, &len));
    assert_int_equal(len, 64 * KiB);
    get(&g, BUF + 64 * KiB, a, 64);
    memset(b, 0, 64);
    assert_memory_equal(a, b, 64);
}

static void test_feature_refusal(void **state UNUSED)
{
    assert_false(vdev_negotiate(&d, BIT(VIRTIO_RING_F_EVENT_IDX))); /* not modern */
    vdev_set_status(&d, 0);
    assert_false(vdev_negotiate(&d, V1 | BIT(VIRTIO_F_IN_ORDER)));
    vdev_set_status(&d, 0);
    assert_false(vdev_negotiate(&d, V1 | 1));
    vdev_go(&d);                                                   /* DRIVER_OK without FEATURES_OK is not taken */
    vdev_set_status(&d, 0);
    assert_int_equal(vdev_status(&d), 0);
    vdev_set_status(&d, VIRTIO_CONFIG_S_DRIVER_OK);
    assert_int_equal(vdev_status(&d) & VIRTIO_CONFIG_S_DRIVER_OK, 0);
    vdev_set_status(&d, 0);
    assert_true(vdev_negotiate(&d, V1));
    common_set(&d, COMMON(guest_feature_select), 4, 0);
    common_set(&d, COMMON(guest_feature), 4, ~0u);                 /* too late */
    assert_int_equal(common_get(&d, COMMON(guest_feature), 4), 0);
}

static void test_status_bits_stay(void **state UNUSED)
{
    vdev_set_status(&d, 0xff);                                     /* NEEDS_RESET is not the driver's */
    assert_int_equal(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    vdev_set_status(&d, 0);
    vdev_set_status(&d, 3);
    vdev_set_status(&d, 1);
    assert_int_equal(vdev_status(&d), 3);
}

static void test_nothing_before_driver_ok(void **state UNUSED)
{
    u32 id, len;

    vdev_master(&d, true);
    assert_true(vdev_negotiate(&d, ALL));
    vdev_queue(&d, 0, 8);
    ask(16);
    assert_false(gq_used(&d.q[0], &id, &len));
    vdev_go(&d);                                                   /* what is in the ring is done now, without another kick */
    assert_true(gq_used(&d.q[0], &id, &len));
}

static void test_needs_bus_master(void **state UNUSED)
{
    u32 id, len;

    assert_true(vdev_start(&d, &g, DEV, ALL, 8));
    vdev_master(&d, false);
    ask(16);
    assert_false(gq_used(&d.q[0], &id, &len));
    vdev_master(&d, true);
    assert_true(gq_used(&d.q[0], &id, &len));
}

static void test_intx(void **state UNUSED)
{
    vdev_master(&d, true);
    assert_true(vdev_negotiate(&d, V1));
    vdev_queue(&d, 0, 8);
    vdev_go(&d);
    ask(16);
    assert_int_equal(g.intx, 1);
    assert_int_equal(bus_read(g.mmio, d.isr, 1), 1);
    assert_int_equal(g.intx, 0);
    assert_int_equal(bus_read(g.mmio, d.isr, 1), 0);
    assert_int_equal(g.msi_total, 0);
    ask(16);
    assert_int_equal(g.intx, 1);
    vdev_set_status(&d, 0);
    assert_int_equal(g.intx, 0);
}

static void test_queue_registers(void **state UNUSED)
{
    assert_int_equal(common_get(&d, COMMON(queue_size), 2), 64);
    common_set(&d, COMMON(queue_size), 2, 128);                    /* too large, no power of two, zero: not taken */
    common_set(&d, COMMON(queue_size), 2, 3);
    common_set(&d, COMMON(queue_size), 2, 0);
    assert_int_equal(common_get(&d, COMMON(queue_size), 2), 64);
    common_set(&d, COMMON(queue_size), 2, 16);
    assert_int_equal(common_get(&d, COMMON(queue_size), 2), 16);
    bus_write(g.mmio, d.common + COMMON(queue_desc_lo), 0x123456789abcdef0, 8);
    assert_int_equal(bus_read(g.mmio, d.common + COMMON(queue_desc_lo), 8), 0x123456789abcdef0);
    common_set(&d, COMMON(queue_msix_vector), 2, 2);               /* there are vectors 0 and 1 */
    assert_int_equal(common_get(&d, COMMON(queue_msix_vector), 2), VIRTIO_NO_VECTOR);
    common_set(&d, COMMON(queue_msix_vector), 2, 1);
    assert_int_equal(common_get(&d, COMMON(queue_msix_vector), 2), 1);
    common_set(&d, COMMON(queue_select), 2, 1);                    /* no such queue */
    assert_int_equal(common_get(&d, COMMON(queue_size), 2), 0);
    common_set(&d, COMMON(queue_enable), 2, 1);
    common_set(&d, COMMON(queue_desc_lo), 4, 1);
    common_set(&d, COMMON(queue_select), 2, 0xffff);
    assert_int_equal(common_get(&d, COMMON(queue_enable), 2), 0);
    common_set(&d, COMMON(queue_select), 2, 0);
    vdev_queue(&d, 0, 8);
    common_set(&d, COMMON(queue_size), 2, 16);                     /* enabled: nothing changes any more */
    common_set(&d, COMMON(queue_used_lo), 4, 0);
    common_set(&d, COMMON(queue_enable), 2, 0);
    assert_int_equal(common_get(&d, COMMON(queue_size), 2), 8);
    assert_int_equal(common_get(&d, COMMON(queue_used_lo), 4), d.q[0].used);
    assert_int_equal(common_get(&d, COMMON(queue_enable), 2), 1);
    vdev_set_status(&d, 0);
    assert_int_equal(common_get(&d, COMMON(queue_enable), 2), 0);
    assert_int_equal(common_get(&d, COMMON(queue_size), 2), 64);
}

/* A broken ring: NEEDS_RESET, a configuration interrupt, and silence until the reset; one line in the log, however often. */
static void test_needs_reset(void **state UNUSED)
{
    u32 id, len;

    for (unsigned i = 0; i < 3; i++) {
        u16 head = 99;

        assert_true(vdev_start(&d, &g, DEV, ALL, 8));
        gq_offer(&d.q[0], head);
        vdev_kick(&d, 0);
        assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
        assert_int_equal(g.msi[0], i + 1);
        d.q[0].avail_idx = 0;
        ask(16);
        assert_false(gq_used(&d.q[0], &id, &len));
        vdev_set_status(&d, 0);
        assert_int_equal(vdev_status(&d), 0);
    }
    assert_int_equal(warnings, 1);
    assert_true(vdev_start(&d, &g, DEV, ALL, 8));
    ask(16);
    assert_true(gq_used(&d.q[0], &id, &len));
}

static void test_queue_outside_memory(void **state UNUSED)
{
    assert_true(vdev_negotiate(&d, V1));
    common_set(&d, COMMON(queue_desc_lo), 4, 0xf0000000);
    common_set(&d, COMMON(queue_enable), 2, 1);
    assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
}

static void test_failed_driver(void **state UNUSED)
{
    u32 id, len;

    assert_true(vdev_start(&d, &g, DEV, ALL, 8));
    vdev_set_status(&d, VIRTIO_CONFIG_S_FAILED | 15);
    ask(16);
    assert_false(gq_used(&d.q[0], &id, &len));
}

static void test_odd_accesses(void **state UNUSED)
{
    common_set(&d, COMMON(device_feature_select), 4, 1);
    bus_write(g.mmio, d.common + COMMON(device_feature_select), 0, 1); /* not the field's width */
    bus_write(g.mmio, d.common + COMMON(device_feature_select) + 2, 0, 2);
    assert_int_equal(common_get(&d, COMMON(device_feature_select), 4), 1);
    assert_int_equal(common_get(&d, COMMON(device_feature), 1), 5); /* reads of any width */
    assert_int_equal(bus_read(g.mmio, d.common + 60, 8) >> 32, 0);
    for (unsigned off = 0; off < 0x4000; off += 2)
        bus_read(g.mmio, d.common + off, 2);
    bus_write(g.mmio, d.notify + 0xffc, 0, 4);
    bus_write(g.mmio, d.notify + 4, 0, 2);
}

/* The same registers through configuration space, for whoever cannot map a BAR. */
static void test_config_window(void **state UNUSED)
{
    unsigned w = d.window;

    ecam_write(&g, DEV, w + 4, 4, 1);
    ecam_write(&g, DEV, w + 8, COMMON(num_queues), 4);
    ecam_write(&g, DEV, w + 12, 2, 4);
    assert_int_equal(ecam_read(&g, DEV, w + 16, 2), 1);
    ecam_write(&g, DEV, w + 8, COMMON(device_status), 4);
    ecam_write(&g, DEV, w + 12, 1, 4);
    ecam_write(&g, DEV, w + 16, 3, 1);
    assert_int_equal(vdev_status(&d), 3);
    assert_int_equal(ecam_read(&g, DEV, w + 16, 1), 3);
    ecam_write(&g, DEV, w + 12, 3, 4);                             /* no such width */
    ecam_write(&g, DEV, w + 16, 0, 4);
    assert_int_equal(vdev_status(&d), 3);
    ecam_write(&g, DEV, w + 12, 4, 4);
    ecam_write(&g, DEV, w + 8, 0xfffffffc, 4);                     /* outside of the BAR */
    assert_int_equal(ecam_read(&g, DEV, w + 16, 4), 0xffffffff);
    ecam_write(&g, DEV, w + 16, 0, 4);
    ecam_write(&g, DEV, w + 4, 5, 1);                              /* no such BAR */
    ecam_write(&g, DEV, w + 8, 0, 4);
    assert_int_equal(ecam_read(&g, DEV, w + 16, 4), 0xffffffff);
}

static void test_state(void **state UNUSED)
{
    struct device *dev = (struct device *)rng;
    struct stream s, l;
    u32 id, len;

    assert_true(vdev_start(&d, &g, DEV, ALL, 8));
    ask(16);
    stream_save_init(&s);
    dev->ops->state(dev, &s);
    assert_int_equal(s.error, 0);
    dev->ops->reset(dev);
    assert_int_equal(vdev_status(&d), 0);
    assert_int_equal(ecam_read(&g, DEV, PCI_COMMAND, 2) & PCI_COMMAND_MASTER, 0);
    stream_load_init(&l, s.buf, s.len);
    dev->ops->state(dev, &l);
    assert_int_equal(l.error, 0);
    assert_int_equal(l.pos, l.len);
    gq_set_used_event(&d.q[0], 1);
    ask(16);
    assert_true(gq_used(&d.q[0], &id, &len) && gq_used(&d.q[0], &id, &len));
    assert_int_equal(g.msi[1], 2);
    stream_free(&s);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_identity), T(test_random_bytes), T(test_feature_refusal), T(test_status_bits_stay), T(test_nothing_before_driver_ok),
        T(test_needs_bus_master), T(test_intx), T(test_queue_registers), T(test_needs_reset), T(test_queue_outside_memory),
        T(test_failed_driver), T(test_odd_accesses), T(test_config_window), T(test_state),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
