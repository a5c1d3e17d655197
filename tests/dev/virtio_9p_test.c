/*
 * The 9P device: its tag, a session through its queue, messages that make no sense, and a reset, after which nothing is open. What messages do is
 * tests/unit/p9_test's affair.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <sys/stat.h>

#include "dev/virtio_9p.h"
#include "virtio_guest.h"

#define DEV 4
#define QUEUE 64
#define BASE (BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC))
#define OUT 0x400000ull
#define IN 0x500000ull

static struct guest g;
static struct p9 *server;
static struct virtio_9p *dev;
static struct vdev d;
static char folder[64];
static u64 packed;                                                 /* the feature, for the second round */

static int setup(void **state UNUSED)
{
    struct p9_config c = { .path = folder };

    strcpy(folder, "/tmp/doppel-9p-XXXXXX");
    assert_non_null(mkdtemp(folder));
    guest_new(&g);
    assert_int_equal(p9_open(&c, &server), 0);
    assert_int_equal(virtio_9p_new(&g.ram, NULL, server, "a tag", &dev), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 10, true, (struct virtio *)dev), 0);
    return 0;
}

static int teardown(void **state UNUSED)
{
    device_free(dev);
    guest_free(&g);
    assert_int_equal(rmdir(folder), 0);
    return 0;
}

/* i: which pages; several are under way at once. */
static void offer(unsigned i, const void *message, u32 len, u32 room)
{
    u64 out = OUT + i * PAGE_SIZE, in = IN + i * PAGE_SIZE;

    put(&g, out, message, len);
    gq_add(&d.q[0], (struct buf[]){ { out, 3, false }, { out + 3, len - 3, false }, { in, room, true } }, room ? 3 : 2);
    vdev_kick(&d, 0);
}

/* Sends it and returns the type of the answer. */
static u8 ask(const void *message, u32 len)
{
    u32 id, used;
    u8 answer[8];
    bool came = false;

    offer(0, message, len, 4096);
    for (unsigned i = 0; i < 30 && !came; i++)                     /* a minute: machines are busy */
        came = vdev_wait(&d, 0, &id, &used);
    assert_true(came);
    assert_in_range(used, 7, 4096);
    get(&g, IN, answer, 7);
    return answer[4];
}

static const char version[] = "\x15\0\0\0\x64\xff\xff\0\x20\0\0\x08\0" "9P2000.L";
static const char attach[] = "\x18\0\0\0\x68\1\0\1\0\0\0\xff\xff\xff\xff\1\0u\0\0\0\0\0\0";

static void session(void)
{
    assert_int_equal(ask(version, sizeof(version) - 1), 101);
    assert_int_equal(ask(attach, sizeof(attach) - 1), 105);
    assert_int_equal(p9_fids(server), 1);
}

static void test_identity(void **state UNUSED)
{
    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    assert_int_equal(ecam_read(&g, DEV, PCI_DEVICE_ID, 2), 0x1009);
    assert_true(vdev_features(&d) & 1);
    assert_int_equal(bus_read(g.mmio, d.config, 2), 5);
    assert_int_equal(bus_read(g.mmio, d.config + 2, 1), 'a');
    assert_int_equal(bus_read(g.mmio, d.config + 6, 1), 'g');
}

static void test_session(void **state UNUSED)
{
    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    session();
    assert_true(g.msi_total > 0);
    assert_int_equal(ask("\x0b\0\0\0\x78\1\0\7\0\0\0", 11), 7);    /* clunk of what is not there */
}

static void test_reset(void **state UNUSED)
{
    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    session();
    for (unsigned i = 0; i < 10; i++)
        offer(i, attach, sizeof(attach) - 1, 4096);
    vdev_set_status(&d, 0);
    for (unsigned i = 0; vdev_status(&d) && i < 60000; i++)
        usleep(1000);
    assert_int_equal(vdev_status(&d), 0);
    assert_int_equal(p9_fids(server), 0);
    g.heap = GUEST_HEAP;
    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    session();
}

static void broken(void)
{
    for (unsigned i = 0; !(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET) && i < 60000; i++)
        usleep(1000);
    assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
}

static void test_no_room(void **state UNUSED)
{
    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    offer(0, version, sizeof(version) - 1, 0);
    broken();
}

static void test_no_head(void **state UNUSED)
{
    assert_true(vdev_start(&d, &g, DEV, BASE | packed, QUEUE));
    offer(0, version, 5, 4096);
    broken();
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
    static const struct CMUnitTest tests[] = {
        TEST(test_identity), TEST(test_session), TEST(test_reset), TEST(test_no_room), TEST(test_no_head),
    };

    /* All of it with split rings, and with packed ones. */
    int r = cmocka_run_group_tests_name("split", tests, NULL, NULL);

    packed = BIT(VIRTIO_F_RING_PACKED);
    return r + cmocka_run_group_tests_name("packed", tests, NULL, NULL);
}
