/*
 * The network card as its driver sees it, in front of a back end of the test's: frames both ways in buffers of all shapes, offloads, the control queue, several queues, flow
 * control, resets in the middle, malformed headers, save and load.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "dev/virtio_net.h"
#include "net_fake.h"
#include "virtio_guest.h"

#define DEV 4
#define N 16                                                       /* size of the queues */
#define TX 0x200000ull
#define RX 0x300000ull
#define CTRL 0x280000ull
#define H sizeof(struct virtio_net_hdr_mrg_rxbuf)
#define BASE (BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC) | BIT(VIRTIO_NET_F_MAC) | BIT(VIRTIO_NET_F_STATUS))
#define CTRLS (BASE | BIT(VIRTIO_NET_F_CTRL_VQ) | BIT(VIRTIO_NET_F_CTRL_RX) | BIT(VIRTIO_NET_F_CTRL_VLAN) | BIT(VIRTIO_NET_F_CTRL_MAC_ADDR) | \
               BIT(VIRTIO_NET_F_CTRL_RX_EXTRA))
#define MERGE (BASE | BIT(VIRTIO_NET_F_MRG_RXBUF))
#define OFFLOADS (BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4) | BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4))

static struct guest g;
static struct loop *loop;
static struct clock *host_clock;
static struct virtio_net *nic;
static struct net_fake *fake;
static struct vdev d;
static u64 packed;                                                  /* the feature, for the second round */
static u8 mac[NET_MAC] = { 0x52, 0x54, 0, 1, 2, 3 };

static void build(unsigned pairs, unsigned takes)
{
    struct virtio_net_settings s = { .mtu = 1500, .pairs = pairs };

    memcpy(s.mac, mac, NET_MAC);
    guest_new(&g);
    assert_int_equal(loop_new(&loop), 0);
    assert_int_equal(clock_new(loop, &host_clock), 0);
    fake = fake_new(takes);
    assert_int_equal(virtio_net_new(&g.ram, NULL, host_clock, &fake->net, &s, &nic), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 20, false, (struct virtio *)nic), 0);
    vdev_find(&d, &g, DEV);
}

static int setup(void **state UNUSED)
{
    build(1, 1);
    return 0;
}

static int setup_plain(void **state UNUSED)
{
    build(1, 0);
    return 0;
}

static int setup_pairs(void **state UNUSED)
{
    build(4, 1);
    return 0;
}

static int teardown(void **state UNUSED)
{
    device_free(nic);
    guest_free(&g);
    clock_free(host_clock);
    loop_free(loop);
    return 0;
}

static void start(u64 features)
{
    assert_true(vdev_start(&d, &g, DEV, features | packed, N));
}

/* --- helpers --- */

static u8 pattern(size_t i)
{
    return (u8)(i * 7 + i / 256);
}

/* An Ethernet frame to the given address. */
static size_t frame_to(u8 *f, const u8 *to, size_t len)
{
    for (size_t i = 0; i < len; i++)
        f[i] = pattern(i);
    memcpy(f, to, NET_MAC);
    f[12] = 0x88;
    f[13] = 0xb5;                                                  /* a type for experiments */
    return len;
}

static u16 transmit(unsigned queue, const struct virtio_net_hdr *h, const void *data, u32 len)
{
    u64 at = TX + d.q[queue].next_desc % N * 0x4000ull;
    struct virtio_net_hdr_mrg_rxbuf zero = { 0 };
    u16 head;

    if (h)
        zero.hdr = *h;
    put(&g, at, &zero, H);
    put(&g, at + H, data, len);
    head = gq_add(&d.q[queue], (struct buf[]){ { at, H, false }, { at + H, len, false } }, 2);
    vdev_kick(&d, queue);
    return head;
}

static void give(unsigned queue, unsigned n, u32 len)
{
    for (unsigned i = 0; i < n; i++)
        gq_add(&d.q[queue], (struct buf[]){ { RX + (d.q[queue].next_desc % N) * 0x2000ull + queue * 0x40000ull, len, true } }, 1);
    vdev_kick(&d, queue);
}

/* The next frame that came to that queue, out of as many buffers as its header says. Its length. */
static size_t take(unsigned queue, struct virtio_net_hdr_mrg_rxbuf *h, u8 *data)
{
    size_t len = 0;
    u32 id, used;

    assert_true(vdev_wait(&d, queue, &id, &used));
    assert_true(used >= H);
    get(&g, RX + id * 0x2000ull + queue * 0x40000ull, h, H);
    get(&g, RX + id * 0x2000ull + queue * 0x40000ull + H, data, used - H);
    len = used - H;
    for (unsigned i = 1; i < h->num_buffers; i++) {
        assert_true(gq_used(&d.q[queue], &id, &used));             /* all at once */
        get(&g, RX + id * 0x2000ull + queue * 0x40000ull, data + len, used);
        len += used;
    }
    return len;
}

static u8 control(u8 class, u8 cmd, const void *data, u32 len)
{
    unsigned queue = common_get(&d, COMMON(num_queues), 2) - 1;
    struct virtio_net_ctrl_hdr h = { class, cmd };
    u32 id, used;
    u8 ack = 0xee;

    if (!(vdev_features(&d) & BIT(VIRTIO_NET_F_MQ)))
        queue = 2;
    put(&g, CTRL, &h, sizeof(h));
    put(&g, CTRL + 16, data, len);
    put(&g, CTRL + 0x8000, &ack, 1);
    gq_add(&d.q[queue], (struct buf[]){ { CTRL, 2, false }, { CTRL + 16, len, false }, { CTRL + 0x8000, 1, true } }, 3);
    vdev_kick(&d, queue);
    assert_true(vdev_wait(&d, queue, &id, &used));
    get(&g, CTRL + 0x8000, &ack, 1);
    return ack;
}

static u8 control_byte(u8 class, u8 cmd, u8 val)
{
    return control(class, cmd, &val, 1);
}

/* Does a frame to that address, with that VLAN if it is not 0, come through? A frame to our own address is the marker that follows it. */
static bool comes(const u8 *to, unsigned vlan)
{
    struct virtio_net_hdr_mrg_rxbuf h;
    u8 f[100], got[2048];
    bool came = false;

    frame_to(f, to, 100);
    if (vlan) {
        f[12] = 0x81;
        f[13] = 0;
        f[14] = (u8)(vlan >> 8);
        f[15] = (u8)vlan;
    }
    give(0, 2, 2048);
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, 100);
    frame_to(f, mac, 60);
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, 60);
    while (take(0, &h, got) == 100)
        came = true;
    return came;
}

/* --- tests --- */

static void test_config(void **state UNUSED)
{
    assert_int_equal(ecam_read(&g, DEV, PCI_DEVICE_ID, 2), 0x1041);
    for (unsigned i = 0; i < NET_MAC; i++)
        assert_int_equal(bus_read(g.mmio, d.config + i, 1), mac[i]);
    assert_int_equal(bus_read(g.mmio, d.config + offsetof(struct virtio_net_config, status), 2), VIRTIO_NET_S_LINK_UP);
    assert_int_equal(bus_read(g.mmio, d.config + offsetof(struct virtio_net_config, mtu), 2), 1500);
    assert_int_equal(vdev_features(&d) & BIT(VIRTIO_NET_F_MQ), 0);
    assert_int_equal(common_get(&d, COMMON(num_queues), 2), 3);
}

static void test_transmit(void **state UNUSED)
{
    u8 f[1514];
    u32 id, len;

    start(BASE);
    for (unsigned i = 0; i < 200; i++) {
        size_t size = 14 + i * 7;
        u16 head = transmit(1, NULL, f, (u32)frame_to(f, mac, size));

        assert_true(vdev_wait(&d, 1, &id, &len));
        assert_int_equal(id, head);
        assert_int_equal(len, 0);
        assert_true(fake_wait(fake, i + 1));
        assert_int_equal(fake->sent[i % FAKE_FRAMES].len, size);
        assert_memory_equal(fake->sent[i % FAKE_FRAMES].data, f, size);
        if (!packed)
            gq_set_used_event(&d.q[1], (u16)(d.q[1].used_seen));
    }
    assert_true(g.msi[2] > 0);
}

/* A header that says nothing of sense drops the frame; one that is not there breaks the device. */
static void test_transmit_malformed(void **state UNUSED)
{
    static const struct virtio_net_hdr bad[] = {
        { .flags = 1, .csum_start = 60, .csum_offset = 0 }, { .flags = 1, .csum_start = 65535, .csum_offset = 65535 }, { .flags = 1, .csum_start = 59, .csum_offset = 0 },
        { .flags = 1, .gso_type = 1, .gso_size = 0, .csum_start = 34, .csum_offset = 16 }, { .gso_type = 1, .gso_size = 100 },
        { .flags = 1, .gso_type = 3, .gso_size = 100, .csum_start = 34, .csum_offset = 6 }, { .gso_type = 0x80 }, { .flags = 0xff, .gso_type = 0xff, .gso_size = 0xffff },
    };
    static const struct buf wrong[][2] = {
        { { TX, H - 1, false }, { 0 } }, { { TX, H, false }, { RX, 60, true } }, { { RX, 100, true }, { 0 } }, { { TX, H, false }, { GUEST_RAM, 60, false } },
    };
    u8 f[2000];
    u32 id, len;

    start(BASE | OFFLOADS);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        transmit(1, &bad[i], f, (u32)frame_to(f, mac, 60));
        assert_true(vdev_wait(&d, 1, &id, &len));
    }
    transmit(1, NULL, f, 13);                                      /* no whole Ethernet header */
    assert_true(vdev_wait(&d, 1, &id, &len));
    put(&g, TX, (u8[H]){ 0 }, H);
    gq_add(&d.q[1], (struct buf[]){ { TX, H, false }, { RX, NET_FRAME_MAX + 1, false } }, 2);
    vdev_kick(&d, 1);
    assert_true(vdev_wait(&d, 1, &id, &len));
    assert_int_equal(fake_sents(fake), 0);
    assert_int_equal(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++) {
        vdev_set_status(&d, 0);
        start(BASE);
        gq_add(&d.q[1], wrong[i], wrong[i][1].len ? 2 : 1);
        vdev_kick(&d, 1);
        for (unsigned k = 0; k < 100000 && !(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET); k++)
            usleep(100);
        assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
        assert_false(gq_used(&d.q[1], &id, &len));
    }
    vdev_set_status(&d, 0);
    start(BASE);
    transmit(1, NULL, f, (u32)frame_to(f, mac, 60));
    assert_true(fake_wait(fake, 1));
}

static void test_offload_passes(void **state UNUSED)
{
    struct virtio_net_hdr h = { .flags = 1, .gso_type = 1, .hdr_len = 54, .gso_size = 1448, .csum_start = 34, .csum_offset = 16 };
    u8 f[8000];

    start(BASE | OFFLOADS);
    transmit(1, &h, f, (u32)frame_to(f, mac, sizeof(f)));
    assert_true(fake_wait(fake, 1));
    assert_memory_equal(&fake->sent[0].hdr, &h, sizeof(h));
    assert_memory_equal(fake->sent[0].data, f, sizeof(f));
    assert_int_equal(fake->offloads, NET_CSUM | NET_TSO4);
}

/* The same before a back end that cannot: finished frames. */
static void test_offload_done(void **state UNUSED)
{
    struct virtio_net_hdr h = { .flags = 1, .gso_type = 1, .hdr_len = 54, .gso_size = 1000, .csum_start = 34, .csum_offset = 16 };
    u8 f[54 + 3500] = { 0 };
    u32 sum = 0;

    start(BASE | OFFLOADS);
    frame_to(f, mac, sizeof(f));
    memcpy(f + 12, (u8[]){ 8, 0, 0x45, 0, (sizeof(f) - 14) >> 8, (sizeof(f) - 14) & 255, 0, 0, 0, 0, 64, 6, 0, 0 }, 14);
    f[34 + 12] = 0x50;
    transmit(1, &h, f, sizeof(f));
    assert_true(fake_wait(fake, 4));
    for (unsigned i = 0; i < 4; i++) {
        assert_int_equal(fake->sent[i].len, 54 + (i < 3 ? 1000 : 500));
        assert_memory_equal(fake->sent[i].data + 54, f + 54 + i * 1000, i < 3 ? 1000 : 500);
        assert_int_equal(fake->sent[i].hdr.flags, 0);
    }
    h = (struct virtio_net_hdr){ .flags = 1, .csum_start = 34, .csum_offset = 16 };
    frame_to(f, mac, 100);
    f[50] = f[51] = 0;
    transmit(1, &h, f, 100);
    assert_true(fake_wait(fake, 5));
    for (unsigned i = 34; i < 100; i += 2)
        sum += (u32)(fake->sent[4].data[i] << 8 | fake->sent[4].data[i + 1]);
    assert_int_equal((sum & 0xffff) + (sum >> 16), 0xffff);
}

static void test_receive(void **state UNUSED)
{
    struct virtio_net_hdr_mrg_rxbuf h;
    u8 f[1514], got[2048];

    start(BASE);
    give(0, 8, 2048);
    for (unsigned i = 0; i < 8; i++)
        fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 60 + i * 200));
    for (unsigned i = 0; i < 8; i++) {
        assert_int_equal(take(0, &h, got), 60 + i * 200);
        assert_int_equal(h.num_buffers, 1);
        assert_memory_equal(got, f, 6);
        for (size_t k = 14; k < 60 + i * 200; k++)
            assert_int_equal(got[k], pattern(k));
    }
    assert_true(g.msi[1] > 0);
}

/* Large frames in small buffers; the driver never sees a part of one. */
static void test_merge(void **state UNUSED)
{
    static u8 f[5000], got[0x10000];
    struct virtio_net_hdr_mrg_rxbuf h;

    start(MERGE);
    for (unsigned i = 0; i < 100; i++) {
        size_t len = 60 + i * 49;

        give(0, (unsigned)(len + H + 399) / 400, 400);
        fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, len));
        assert_int_equal(take(0, &h, got), len);
        assert_int_equal(h.num_buffers, (len + H + 399) / 400);
        assert_memory_equal(got, f, len);
    }
}

/* No buffers, then too few, then enough: the frame waits, and the driver's notification of the missing one is asked for. */
static void test_wait_for_buffers(void **state UNUSED)
{
    static u8 f[1500], got[4096];
    struct virtio_net_hdr_mrg_rxbuf h;

    start(MERGE);
    for (unsigned round = 0; round < 20; round++) {
        for (unsigned i = 0; i < 3; i++)
            fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 1000 + i));
        for (unsigned i = 0; i < 5; i++) {
            usleep(round < 3 ? 2000 : 0);
            if (i < 3)
                assert_false(gq_any_used(&d.q[0]));
            give(0, 1, 500);
        }
        give(0, 4, 500);
        for (unsigned i = 0; i < 3; i++) {
            assert_int_equal(take(0, &h, got), 1000 + i);
            assert_int_equal(h.num_buffers, 3);
            assert_memory_equal(got, f, 1000);
        }
    }
}

/* Without merging a frame that does not fit its buffer is dropped, and the buffer is there for the next one. */
static void test_too_large(void **state UNUSED)
{
    struct virtio_net_hdr_mrg_rxbuf h;
    u8 f[3000], got[2048];

    start(BASE);
    give(0, 1, 1000);
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 3000));
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 100));
    assert_int_equal(take(0, &h, got), 100);
    give(0, 1, 4);                                                 /* not even the header */
    give(0, 1, 1000);
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 100));
    for (unsigned i = 0; i < 100000 && virtio_net_counts(nic).frames.received < 3; i++)
        usleep(100);
    vdev_set_status(&d, 0);
    start(MERGE);
    give(0, N, 100);
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 3000)); /* more than the whole ring */
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 150));
    assert_int_equal(take(0, &h, got), 150);
    assert_int_equal(h.num_buffers, 2);
}

/* What the driver has not asked for it does not get; checksums that are known to be right are told to who asked. */
static void test_guest_offloads(void **state UNUSED)
{
    struct virtio_net_hdr gso = { .flags = 1, .gso_type = 1, .gso_size = 500, .csum_start = 34, .csum_offset = 16 }, valid = { .flags = 2 };
    struct virtio_net_hdr_mrg_rxbuf h;
    u8 f[1500], got[2048];

    start(BASE);
    give(0, 4, 2048);
    fake_inject(fake, &gso, NET_ANY_QUEUE, f, frame_to(f, mac, 1000));
    fake_inject(fake, &valid, NET_ANY_QUEUE, f, frame_to(f, mac, 100));
    assert_int_equal(take(0, &h, got), 100);
    assert_int_equal(h.hdr.flags, 0);
    vdev_set_status(&d, 0);
    start(CTRLS | OFFLOADS | BIT(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS));
    give(0, 4, 2048);
    fake_inject(fake, &gso, NET_ANY_QUEUE, f, frame_to(f, mac, 1000));
    fake_inject(fake, &valid, NET_ANY_QUEUE, f, frame_to(f, mac, 100));
    assert_int_equal(take(0, &h, got), 1000);
    assert_memory_equal(&h.hdr, &gso, sizeof(gso));
    assert_int_equal(take(0, &h, got), 100);
    assert_int_equal(h.hdr.flags, 2);
    assert_int_equal(control(VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, &(u64){ BIT(VIRTIO_NET_F_GUEST_CSUM) }, 8), VIRTIO_NET_OK);
    fake_inject(fake, &gso, NET_ANY_QUEUE, f, frame_to(f, mac, 1000));
    fake_inject(fake, &valid, NET_ANY_QUEUE, f, frame_to(f, mac, 100));
    assert_int_equal(take(0, &h, got), 100);
    assert_int_equal(control(VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, &(u64){ BIT(VIRTIO_NET_F_GUEST_TSO6) }, 8), VIRTIO_NET_ERR);
    assert_int_equal(control(VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, &(u64){ 0 }, 7), VIRTIO_NET_ERR);
}

static void test_filters(void **state UNUSED)
{
    static const u8 other[] = { 2, 9, 9, 9, 9, 9 }, group[] = { 1, 0, 0x5e, 0, 0, 9 }, all[] = { 255, 255, 255, 255, 255, 255 };
    u8 table[4 + 6 + 4 + 6] = { 1 }, big[4 + 6 * 65 + 4] = { 65 };

    start(CTRLS);
    control(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &(u16){ 0 }, 2);
    assert_true(comes(other, 0));                                  /* promiscuous to begin with */
    assert_int_equal(control_byte(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, 0), VIRTIO_NET_OK);
    assert_false(comes(other, 0));
    assert_false(comes(group, 0));
    assert_true(comes(all, 0));
    control_byte(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, 1);
    assert_true(comes(group, 0));
    control_byte(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_NOMULTI, 1);
    assert_false(comes(group, 0));
    control_byte(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_NOBCAST, 1);
    assert_false(comes(all, 0));
    control_byte(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLUNI, 1);
    assert_true(comes(other, 0));
    for (u8 cmd = 1; cmd <= 5; cmd++)
        control_byte(VIRTIO_NET_CTRL_RX, cmd, 0);
    memcpy(table + 4, other, 6);
    table[10] = 1;
    memcpy(table + 14, group, 6);
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, table, sizeof(table)), VIRTIO_NET_OK);
    assert_true(comes(other, 0));
    assert_true(comes(group, 0));
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, (u8[8]){ 0 }, 8), VIRTIO_NET_OK);
    assert_false(comes(other, 0));
    assert_false(comes(group, 0));
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, big, sizeof(big)), VIRTIO_NET_OK);
    assert_true(comes(other, 0));                                  /* more than there is room for */
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, (u8[8]){ 0 }, 8), VIRTIO_NET_OK);
    assert_false(comes(other, 5));
    control_byte(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, 1);
    assert_false(comes(other, 5));
    assert_int_equal(control(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &(u16){ 5 }, 2), VIRTIO_NET_OK);
    assert_true(comes(other, 5));
    assert_int_equal(control(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL, &(u16){ 5 }, 2), VIRTIO_NET_OK);
    assert_false(comes(other, 5));
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, other, 6), VIRTIO_NET_OK);
    assert_int_equal(bus_read(g.mmio, d.config, 1), 2);
}

static void test_control_malformed(void **state UNUSED)
{
    u32 huge[3] = { 0xffffffff, 0, 0 }, wrap[3] = { 0x2aaaaaab, 0, 0 }; /* times 6: 2 in 32 bits */
    u32 id, len;

    start(CTRLS);
    assert_int_equal(control_byte(0x77, 0, 0), VIRTIO_NET_ERR);
    assert_int_equal(control_byte(VIRTIO_NET_CTRL_RX, 6, 0), VIRTIO_NET_ERR);
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, huge, 12), VIRTIO_NET_ERR);
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, wrap, 12), VIRTIO_NET_ERR);
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, &(u32){ 0 }, 4), VIRTIO_NET_ERR);
    assert_int_equal(control(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, mac, 5), VIRTIO_NET_ERR);
    assert_int_equal(control(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &(u16){ 4096 }, 2), VIRTIO_NET_ERR);
    assert_int_equal(control(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &(u16){ 1 }, 2), VIRTIO_NET_ERR);
    gq_add(&d.q[2], (struct buf[]){ { CTRL, 1, false }, { CTRL + 8, 1, true } }, 2);
    vdev_kick(&d, 2);
    assert_true(vdev_wait(&d, 2, &id, &len));                      /* half a header: an error, no more */
    gq_add(&d.q[2], (struct buf[]){ { CTRL, 2, false } }, 1);
    vdev_kick(&d, 2);
    assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
}

/* A TCP segment of the guest's from port 0x9000 + i on a pair, and what is answered. */
static void send_on(unsigned pair, unsigned i, u8 in[60])
{
    unsigned sent = fake_sents(fake);
    u8 out[60];

    frame_to(out, mac, 60);
    memcpy(out + 12, (u8[]){ 8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2, 0x90, (u8)i, 0, 80 }, 26);
    transmit(2 * pair + 1, NULL, out, 60);
    assert_true(fake_wait(fake, sent + 1));
    assert_int_equal(fake->sent[sent].queue, pair);
    memcpy(in, out, 60);
    memcpy(in + 26, out + 30, 4);
    memcpy(in + 30, out + 26, 4);
    memcpy(in + 34, out + 36, 2);
    memcpy(in + 36, out + 34, 2);
}

/* Four of them are in use, with buffers. */
static void use_pairs(void)
{
    u16 pairs = 4;

    assert_int_equal(control(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &pairs, 2), VIRTIO_NET_OK);
    control(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &(u16){ 0 }, 2);
    for (unsigned i = 0; i < 4; i++)
        give(2 * i, 8, 2048);
}

/* Answers go where the flow was seen to be sent. */
static void test_pairs(void **state UNUSED)
{
    struct virtio_net_hdr_mrg_rxbuf h;
    u8 in[60], got[2048];

    start(CTRLS | BIT(VIRTIO_NET_F_MQ));
    assert_int_equal(bus_read(g.mmio, d.config + offsetof(struct virtio_net_config, max_virtqueue_pairs), 2), 4);
    for (u16 bad = 0; bad < 7; bad += 5)
        assert_int_equal(control(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &bad, 2), VIRTIO_NET_ERR);
    use_pairs();
    for (unsigned i = 0; i < 20; i++) {
        unsigned pair = i * 3 % 4;

        send_on(pair, i, in);
        fake_inject(fake, NULL, NET_ANY_QUEUE, in, 60);
        assert_int_equal(take(2 * pair, &h, got), 60);
        assert_memory_equal(got, in, 60);
    }
    fake_inject(fake, NULL, 2, in, 60);                            /* a back end with queues says which */
    assert_int_equal(take(4, &h, got), 60);
    fake_inject(fake, NULL, 7, in, 60);                            /* more than are in use */
    assert_int_equal(take(6, &h, got), 60);
}

/* A connection stays on its pair while frames come there: on another they would overtake those that the driver has not taken yet. */
static void test_pairs_in_order(void **state UNUSED)
{
    struct virtio_net_hdr_mrg_rxbuf h;
    u8 in[60], got[2048];

    start(CTRLS | BIT(VIRTIO_NET_F_MQ));
    use_pairs();
    send_on(0, 1, in);
    send_on(1, 1, in);                                             /* nothing has come yet */
    clock_pause(host_clock);
    for (unsigned i = 0; i < 2; i++) {
        fake_inject(fake, NULL, NET_ANY_QUEUE, in, 60);
        assert_int_equal(take(2, &h, got), 60);
        send_on(2, 1, in);
    }
    clock_resume(host_clock);
    for (u64 then = clock_ns(host_clock) + 200000000; clock_ns(host_clock) < then;)
        usleep(10000);
    send_on(2, 1, in);
    fake_inject(fake, NULL, NET_ANY_QUEUE, in, 60);
    assert_int_equal(take(4, &h, got), 60);
}

/* Without VIRTIO_NET_F_MQ the control queue is the third. */
static void test_pairs_not_wanted(void **state UNUSED)
{
    u32 id, len;
    u8 ack = 0xee;

    start(CTRLS);
    put(&g, CTRL, (u8[]){ VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, 1 }, 3);
    gq_add(&d.q[2], (struct buf[]){ { CTRL, 3, false }, { CTRL + 0x8000, 1, true } }, 2);
    vdev_kick(&d, 2);
    assert_true(vdev_wait(&d, 2, &id, &len));
    get(&g, CTRL + 0x8000, &ack, 1);
    assert_int_equal(ack, VIRTIO_NET_OK);
}

static void set_fake(bool refuse, bool hold)
{
    pthread_mutex_lock(&fake->lock);
    fake->refuse = refuse;
    fake->hold = hold;
    pthread_mutex_unlock(&fake->lock);
}

static void wait_holding(void)
{
    for (unsigned i = 0; i < 100000; i++) {
        bool h;

        pthread_mutex_lock(&fake->lock);
        h = fake->holding;
        pthread_mutex_unlock(&fake->lock);
        if (h)
            return;
        usleep(100);
    }
    fail();
}

/* A back end that takes nothing now: frames stay in the ring, in their order. */
static void test_flow_control(void **state UNUSED)
{
    u8 f[100];
    u32 id, len;

    start(BASE);
    set_fake(true, false);
    for (unsigned i = 0; i < 6; i++)
        transmit(1, NULL, f, (u32)frame_to(f, mac, 60 + i));
    usleep(20000);
    assert_int_equal(fake_sents(fake), 0);
    assert_false(gq_used(&d.q[1], &id, &len));
    set_fake(false, false);
    net_kick(&fake->net);
    assert_true(fake_wait(fake, 6));
    for (unsigned i = 0; i < 6; i++) {
        assert_int_equal(fake->sent[i].len, 60 + i);
        assert_true(vdev_wait(&d, 1, &id, &len));
    }
}

/* A reset while frames are read from guest memory: status keeps its value until they are. */
static void test_reset_in_flight(void **state UNUSED)
{
    u8 f[100];
    u32 id, len;

    start(BASE);
    set_fake(false, true);
    transmit(1, NULL, f, (u32)frame_to(f, mac, 60));
    wait_holding();
    vdev_set_status(&d, 0);
    assert_int_not_equal(vdev_status(&d), 0);
    set_fake(false, false);
    for (unsigned i = 0; i < 100000 && vdev_status(&d); i++)
        usleep(100);
    assert_int_equal(vdev_status(&d), 0);
    assert_false(gq_used(&d.q[1], &id, &len));
    set_fake(false, true);
    start(BASE);
    transmit(1, NULL, f, 60);
    wait_holding();
    set_fake(false, false);
    ((struct device *)nic)->ops->reset((struct device *)nic);
    assert_int_equal(vdev_status(&d), 0);
}

/* Resets at all moments of large frames' way to the guest: afterwards its memory is its own. */
static void test_reset_receiving(void **state UNUSED)
{
    static u8 f[60000], none[N * 0x2000], now[sizeof(none)];
    unsigned taken;
    u32 id, used;

    memset(none, 0x5a, sizeof(none));
    frame_to(f, mac, sizeof(f));
    for (unsigned i = 0; i < 150; i++) {
        g.heap = GUEST_HEAP;                                       /* else the rings would come to lie in the buffers */
        start(MERGE);
        for (unsigned k = 0; k < N; k++)
            gq_add(&d.q[0], (struct buf[]){ { RX + k * 0x2000ull, 0x2000, true } }, 1);
        vdev_kick(&d, 0);
        for (unsigned k = 0; k < 3; k++)
            fake_inject(fake, NULL, NET_ANY_QUEUE, f, sizeof(f));
        for (unsigned k = 0; k < 100000 && !gq_used(&d.q[0], &id, &used); k++)
            ;                                                      /* the first is there: the next is on its way */
        for (volatile unsigned k = 0; k < i * 20; k++)
            ;
        vdev_set_status(&d, 0);
        for (unsigned k = 0; k < 100000 && vdev_status(&d); k++)
            usleep(100);
        assert_int_equal(vdev_status(&d), 0);
        put(&g, RX, none, sizeof(none));
        do {
            usleep(100);
            pthread_mutex_lock(&fake->lock);
            taken = fake->taken;
            pthread_mutex_unlock(&fake->lock);
        } while (taken != 3 * (i + 1));
        get(&g, RX, now, sizeof(now));
        assert_memory_equal(now, none, sizeof(none));
    }
}

static void test_link(void **state UNUSED)
{
    struct virtio_net_hdr_mrg_rxbuf h;
    u8 f[100], got[2048];
    u32 id, len;

    start(BASE);
    give(0, 4, 2048);
    virtio_net_set_link(nic, false);
    assert_int_equal(g.msi[0], 1);                                 /* change of configuration */
    assert_int_equal(bus_read(g.mmio, d.config + 6, 2), 0);
    transmit(1, NULL, f, (u32)frame_to(f, mac, 60));
    assert_true(vdev_wait(&d, 1, &id, &len));
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, 60);
    for (unsigned i = 0; i < 100000 && !virtio_net_counts(nic).frames.received_dropped; i++)
        usleep(100);
    assert_int_equal(virtio_net_counts(nic).frames.received_dropped, 1);
    assert_int_equal(fake_sents(fake), 0);
    virtio_net_set_link(nic, true);
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 70));
    assert_int_equal(take(0, &h, got), 70);
}

static void stop(void *arg)
{
    loop_stop(arg);
}

/* Between quiesce() and the moment that guest time goes on nothing moves; a saved state goes on where it was. */
static void test_save_and_load(void **state UNUSED)
{
    struct device *dev = (struct device *)nic;
    struct virtio_net_hdr_mrg_rxbuf h;
    struct stream s, l;
    u8 f[100], got[2048];
    u32 id, len;

    start(CTRLS);
    control_byte(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, 0);
    give(0, 4, 2048);
    clock_pause(host_clock);
    dev->ops->quiesce(dev);
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, frame_to(f, mac, 60));
    transmit(1, NULL, f, 60);
    usleep(10000);
    assert_false(gq_used(&d.q[0], &id, &len));
    assert_int_equal(fake_sents(fake), 0);
    pthread_mutex_lock(&dev->lock);
    stream_save_init(&s);
    dev->ops->state(dev, &s);
    pthread_mutex_unlock(&dev->lock);
    assert_int_equal(s.error, 0);
    for (size_t cut = 0; cut < s.len; cut += 1 + s.len / 50) {
        device_load(dev, &l, s.buf, cut);
        assert_int_not_equal(l.error, 0);
    }
    device_load(dev, &l, s.buf, s.len);
    assert_int_equal(l.error, 0);
    stream_free(&s);
    clock_resume(host_clock);
    for (unsigned i = 0; i < 1000 && !fake_sents(fake); i++) {
        loop_post(loop, stop, loop);
        assert_int_equal(loop_run(loop), 0);
        usleep(1000);
    }
    assert_true(fake_wait(fake, 1));
    assert_int_equal(take(0, &h, got), 60);
    assert_false(comes((u8[]){ 2, 9, 9, 9, 9, 9 }, 0));            /* its filter is as it was */
}

/* A legacy driver that does not merge has a header of 10 bytes, and may write its address. */
static void test_legacy(void **state UNUSED)
{
    static const u8 own[NET_MAC] = { 2, 1, 1, 1, 1, 1 };
    u64 ports;
    u8 f[100], got[100];
    u32 id, len;

    device_free(nic);
    fake = fake_new(1);
    struct virtio_net_settings s = { .mtu = 1500, .pairs = 1 };
    assert_int_equal(virtio_net_new(&g.ram, NULL, host_clock, &fake->net, &s, &nic), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 20, true, (struct virtio *)nic), 0);
    ports = ecam_read(&g, DEV, PCI_BASE_ADDRESS_0, 4) & ~3u;
    ecam_write(&g, DEV, PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MASTER, 2);
    bus_write(g.pio, ports + VIRTIO_PCI_STATUS, 3, 1);
    bus_write(g.pio, ports + VIRTIO_PCI_GUEST_FEATURES, BIT(VIRTIO_NET_F_MAC), 4);
    for (unsigned n = 0; n < 2; n++) {
        struct gq *q = &d.q[n];

        bus_write(g.pio, ports + VIRTIO_PCI_QUEUE_SEL, n, 2);
        *q = (struct gq){ .g = &g, .size = (u16)bus_read(g.pio, ports + VIRTIO_PCI_QUEUE_NUM, 2) };
        q->desc = guest_alloc(&g, 16384);
        q->avail = q->desc + 16ull * q->size;
        q->used = ALIGN_UP(q->avail + 2ull * q->size + 6, 4096);
        bus_write(g.pio, ports + VIRTIO_PCI_QUEUE_PFN, q->desc >> 12, 4);
    }
    for (unsigned i = 0; i < NET_MAC; i++)
        bus_write(g.pio, ports + VIRTIO_PCI_CONFIG_OFF(0) + i, own[i], 1);
    bus_write(g.pio, ports + VIRTIO_PCI_STATUS, 7, 1);
    put(&g, TX, (u8[10]){ 0 }, 10);
    put(&g, TX + 10, f, frame_to(f, own, 60));
    gq_add(&d.q[1], (struct buf[]){ { TX, 70, false } }, 1);
    bus_write(g.pio, ports + VIRTIO_PCI_QUEUE_NOTIFY, 1, 2);
    assert_true(fake_wait(fake, 1));
    assert_int_equal(fake->sent[0].len, 60);
    assert_memory_equal(fake->sent[0].data, f, 60);
    gq_add(&d.q[0], (struct buf[]){ { RX, 10, true }, { RX + 0x1000, 1514, true } }, 2);
    bus_write(g.pio, ports + VIRTIO_PCI_QUEUE_NOTIFY, 0, 2);
    fake_inject(fake, NULL, NET_ANY_QUEUE, f, 60);
    assert_true(vdev_wait(&d, 0, &id, &len));
    assert_int_equal(len, 70);
    get(&g, RX + 0x1000, got, 60);
    assert_memory_equal(got, f, 60);
}

/* Notifications are asked for only when the rings are at rest: a burst costs few. */
static void test_suppression(void **state UNUSED)
{
    u8 f[60];
    u64 notified;
    u32 id, len;

    start(BASE);
    notified = virtio_net_counts(nic).notifications;
    set_fake(false, true);
    transmit(1, NULL, f, (u32)frame_to(f, mac, 60));
    wait_holding();
    for (unsigned i = 0; i < 5; i++) {
        u16 old = d.q[1].avail_idx;

        put(&g, TX + 0x80000, (u8[H]){ 0 }, H);
        gq_add(&d.q[1], (struct buf[]){ { TX + 0x80000, H + 60, false } }, 1);
        assert_false(gq_wants_kick(&d.q[1], old));
    }
    set_fake(false, false);
    assert_true(fake_wait(fake, 6));
    for (unsigned i = 0; i < 6; i++)
        assert_true(vdev_wait(&d, 1, &id, &len));
    assert_int_equal(virtio_net_counts(nic).notifications, notified + 1);
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_config), T(test_transmit), T(test_transmit_malformed), T(test_offload_passes),
        cmocka_unit_test_setup_teardown(test_offload_done, setup_plain, teardown), T(test_receive), T(test_merge), T(test_wait_for_buffers), T(test_too_large),
        T(test_guest_offloads), T(test_filters), T(test_control_malformed), cmocka_unit_test_setup_teardown(test_pairs, setup_pairs, teardown),
        cmocka_unit_test_setup_teardown(test_pairs_in_order, setup_pairs, teardown),
        cmocka_unit_test_setup_teardown(test_pairs_not_wanted, setup_pairs, teardown), T(test_flow_control), T(test_reset_in_flight), T(test_reset_receiving), T(test_link),
        T(test_save_and_load), T(test_legacy), T(test_suppression),
    };

    /* All of it with split rings, and with packed ones. */
    int r = cmocka_run_group_tests_name("split", tests, NULL, NULL);

    packed = BIT(VIRTIO_F_RING_PACKED);
    return r + cmocka_run_group_tests_name("packed", tests, NULL, NULL);
}
