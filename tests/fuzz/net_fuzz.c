/*
 * Fuzzing of the network card: the input is a hostile driver's program (as in virtio_fuzz.c), which also has frames come from outside; and of what is done to frames in software.
 *
 *   byte 0: bit 0: the rest is a frame for net_offload; else bits say what is negotiated at the start; then steps of 8 bytes: what, queue, n (2), value (4)
 */
#include "../dev/net_fake.h"
#include "../dev/virtio_guest.h"
#include "back/net_large.h"
#include "back/net_offload.h"
#include "dev/virtio_net.h"
#include "state.h"

#define PAIRS 2
#define QUEUES (2 * PAIRS + 1)
#define STARTS 6

static struct guest g;
static struct loop *loop;
static struct clock *host_clock;
static struct virtio_net *nic;
static struct net_fake *fake;
static struct vdev d;
static unsigned starts;

static void build(void)
{
    struct virtio_net_settings s = { .mac = { 2, 0, 0, 0, 0, 1 }, .mtu = 1500, .pairs = PAIRS };

    guest_new(&g);
    fake = fake_new(0);
    bug_on(loop_new(&loop) < 0 || clock_new(loop, &host_clock) < 0 || virtio_net_new(&g.ram, NULL, host_clock, &fake->net, &s, &nic) < 0);
    bug_on(virtio_pci_attach(g.pci, 1, guest_line(&g), 10, true, (struct virtio *)nic) < 0);
}

static void start(u32 val)
{
    if (starts++ >= STARTS)
        return;
    vdev_find(&d, &g, 1);
    if (common_get(&d, COMMON(num_queues), 2) > VIRTIO_QUEUES_MAX)
        return;                                                    /* its BAR does not decode */
    vdev_start(&d, &g, 1, BIT(VIRTIO_F_VERSION_1) | (vdev_features(&d) & ~((u64)(val & 0x3f) << 17 | (u64)(val >> 6 & 0xff) << 7 | (u64)(val >> 14 & 3) << VIRTIO_RING_F_INDIRECT_DESC)), 16);
}

/* A nearly right frame, of a nearly right TCP segment. */
static void send(unsigned queue, unsigned n, u32 val)
{
    struct virtio_net_hdr_mrg_rxbuf h = { .hdr = { .flags = (u8)(n & 3), .gso_type = (u8)(n >> 2 & 7), .gso_size = (u16)val, .csum_start = 34, .csum_offset = 16 } };
    u8 head[54] = { [12] = 8, [14] = 0x45, [23] = 6, [46] = 0x50 };
    u32 len = val >> 15;
    u64 at = GUEST_RAM / 2 + n % 8 * 0x40000ull;

    if (!d.q[queue].size)
        return;
    if (n & 0x4000)
        h.hdr.csum_start = (u16)(val >> 3);
    head[16] = (u8)((len + 40) >> 8);
    head[17] = (u8)(len + 40);
    put(&g, at, &h, sizeof(h));
    put(&g, at + sizeof(h), head, sizeof(head));
    gq_add(&d.q[queue], (struct buf[]){ { at, sizeof(h) + sizeof(head) + (n >> 12 & 1), false }, { at + 1000, 1 + len, n >> 15 } }, 2);
    vdev_kick(&d, queue);
}

static void control(unsigned n, u32 val)
{
    u64 at = GUEST_RAM / 2 + 0x300000ull;
    unsigned queue = val & 1 ? 2 : 2 * PAIRS;

    if (!d.q[queue].size)
        return;
    put(&g, at, (u8[]){ (u8)(n % 6), (u8)(n >> 3 & 7) }, 2);
    put(&g, at + 2, &val, 4);
    gq_add(&d.q[queue], (struct buf[]){ { at, 2 + (n >> 6 & 15), false }, { at + 64, 1 + (n >> 10 & 1), n >> 11 & 1 } }, 2);
    vdev_kick(&d, queue);
}

static void inject(unsigned n, u32 val)
{
    static u8 frame[NET_FRAME_MAX];
    struct virtio_net_hdr h = { .flags = (u8)(n >> 8 & 3), .gso_type = (u8)(n >> 10 & 5), .gso_size = 500, .csum_start = 34, .csum_offset = 16 };

    memcpy(frame, &val, 4);
    frame[12] = (u8)(val & 8 ? 0x81 : 8);
    frame[14] = (u8)n;
    if (fake->ins - fake->taken < FAKE_FRAMES / 2)
        fake_inject(fake, &h, n & 1 ? NET_ANY_QUEUE : n >> 1 & 7, frame, NET_HEADER + (n & 0x2000 ? val >> 16 : val >> 22));
}

static void save_and_load(u32 val)
{
    struct device *dev = (struct device *)nic;

    dev->ops->quiesce(dev);
    state_save_and_load(dev, val, true);
}

static void stop(void *arg)
{
    loop_stop(arg);
}

static void turn(void)
{
    loop_post(loop, stop, loop);
    bug_on(loop_run(loop) < 0);
}

static void step(const u8 *a)
{
    unsigned queue = a[1] % QUEUES, n = a[2] | a[3] << 8;
    u64 val;
    u32 v;

    memcpy(&v, a + 4, 4);
    val = v;
    switch (a[0] % 14) {
    case 0: bus_access(g.mmio, bar_address(&g, 1, 4) + n % 0x4000, 1u << (a[0] >> 6), true, &val); break;
    case 1: bus_access(g.mmio, bar_address(&g, 1, n >> 15 ? 1 : 4) + n % 0x4000, 1u << (a[0] >> 6), a[0] & 32, &val); break;
    case 2: ecam_write(&g, 1, n % 256, v, 1u << (a[0] >> 6) % 3); break;
    case 3: put(&g, n * 4, &v, 4); break;
    case 4:
        if (d.notify)
            vdev_kick(&d, queue);
        break;
    case 5: turn(); break;
    case 6: start(v); break;
    case 7:
        if (d.q[queue].size)
            gq_add(&d.q[queue], (struct buf[]){ { (u64)(v >> 8) * 64 % GUEST_RAM, (u32)1 << (v & 15), true }, { (u64)(v >> 4) * 64 % GUEST_RAM, n, n & 1 } }, 1 + (n >> 3 & 1));
        break;
    case 8: case 9: send(queue | (queue < 4), n, v); break;
    case 10: control(n, v); break;
    case 11: inject(n, v); break;
    case 12: n & 7 ? virtio_net_set_link(nic, v & 1) : save_and_load(v); break;
    case 13:
        pthread_mutex_lock(&fake->lock);
        fake->refuse = v & 1;
        pthread_mutex_unlock(&fake->lock);
        net_kick(&fake->net);
        break;
    }
}

static void ignore(void *arg UNUSED, const u8 *frame UNUSED, size_t len)
{
    bug_on(len > NET_FRAME_MAX);
}

static void offload(const u8 *data, size_t len)
{
    static u8 out[NET_FRAME_MAX];
    struct virtio_net_hdr h;
    struct net_packet p;
    struct net n = { 0 };                                          /* a back end that has not begun: what it delivers is lost */
    u8 *frame;

    if (len < sizeof(h) || len - sizeof(h) > NET_FRAME_MAX)
        return;
    memcpy(&h, data, sizeof(h));
    len -= sizeof(h);
    frame = malloc(len + !len);
    memcpy(frame, data + sizeof(h), len);
    if (net_parse(frame, len, &p) && (p.protocol == 6 || p.protocol == 17))
        net_l4_checksum(frame, &p);
    net_segment(frame, len, h.gso_size, out, ignore, NULL);
    net_fragment(frame, len, h.hdr_len, 1, out, ignore, NULL);
    n.mtu = MAX(h.hdr_len, NET_MTU_MIN);
    atomic_init(&n.guest, h.csum_offset);
    net_deliver_large(&n, frame, len, 1, out);
    net_raise_mss(&n, frame, len, h.csum_start);
    if (net_header_valid(&h, len))
        net_finish_checksum(frame, len, &h);
    free(frame);
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    struct device *dev;

    if (!nic)
        build();
    if (!len || (data[0] & 1)) {
        offload(data + !!len, len - !!len);
        return 0;
    }
    dev = (struct device *)nic;
    g.heap = GUEST_HEAP;
    starts = 0;
    memset(&d, 0, sizeof(d));
    virtio_net_set_link(nic, true);
    if (data[0] & 2)
        start((u32)data[0] << 12);
    for (; len > 8; data += 8, len -= 8)
        step(data + 1);
    pthread_mutex_lock(&fake->lock);
    fake->refuse = false;
    pthread_mutex_unlock(&fake->lock);
    dev->ops->quiesce(dev);
    dev->ops->reset(dev);
    turn();
    memset(g.ram.run[0].hva, 0, 768 * KiB);
    bug_on(((struct virtio *)nic)->status);
    return 0;
}
