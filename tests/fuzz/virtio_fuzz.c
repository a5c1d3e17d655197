/*
 * Fuzzing of whole virtio devices (disk, console, entropy) behind PCI: the input is a hostile driver's program. It may do everything by single register accesses, or
 * take a step that a driver takes (start the device, add a chain, a disk request, a control message, kick) with parameters of its own, so that the deep places
 * are reached. The devices are transitional: the driver may be a legacy one as well, or both.
 *
 *   byte 0: which devices are started before the program runs; then steps of 8 bytes: what, device, n (2), value (4)
 */
#include "../dev/virtio_guest.h"
#include "dev/virtio_blk.h"
#include "dev/virtio_console.h"
#include "dev/virtio_rng.h"
#include "state.h"

#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_console.h>

#define DEVICES 3
#define PORTS 2
#define STARTS 6

static struct guest g;
static struct loop *loop;
static struct device *dev[DEVICES];
static struct virtio_console *con;
static struct vdev drv[DEVICES];
static unsigned starts, taken;

static size_t guest_data(void *arg UNUSED, const void *data UNUSED, size_t len)
{
    return taken++ % 3 ? len : len / 2;
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

static struct block *open_image(void)
{
    char image[] = "/tmp/doppel-fuzz-XXXXXX";
    int fd = mkstemp(image);
    struct block *b;

    bug_on(fd < 0 || ftruncate(fd, 1 * MiB) < 0);
    close(fd);
    bug_on(block_open(&(struct block_config){ .path = image, .readonly = false }, &b) < 0);
    unlink(image);
    return b;
}

static void build(void)
{
    static const struct vport_ops ops = { .guest_data = guest_data };
    static const struct vport_config port[PORTS] = { { .name = "a", .ops = &ops }, { .name = "b", .ops = &ops, .console = true } };
    struct virtio_blk *blk;
    struct virtio_rng *rng;

    guest_new(&g);
    bug_on(loop_new(&loop) < 0 || virtio_blk_new(&g.ram, NULL, open_image(), "fuzz", 2, &blk) < 0 ||
           virtio_console_new(&g.ram, NULL, loop, port, PORTS, &con) < 0 || virtio_rng_new(&g.ram, NULL, &rng) < 0);
    dev[0] = (struct device *)blk;
    dev[1] = (struct device *)con;
    dev[2] = (struct device *)rng;
    for (unsigned i = 0; i < DEVICES; i++)
        bug_on(virtio_pci_attach(g.pci, i + 1, guest_line(&g), 10, true, (struct virtio *)dev[i]) < 0);
}

static void start(struct vdev *d, unsigned device, u32 val)
{
    if (starts++ >= STARTS)
        return;
    vdev_find(d, &g, device + 1);
    if (common_get(d, COMMON(num_queues), 2) > VIRTIO_QUEUES_MAX)
        return;                                                    /* its BAR does not decode */
    vdev_start(d, &g, device + 1, BIT(VIRTIO_F_VERSION_1) | (vdev_features(d) & ~((val & 3) | (u64)(val >> 2 & 3) << VIRTIO_RING_F_INDIRECT_DESC | (u64)(val >> 4 & 1) << VIRTIO_F_RING_PACKED)), 16);
}

static u64 ports(unsigned device)
{
    return ecam_read(&g, device + 1, PCI_BASE_ADDRESS_0, 4) & ~3u;
}

/* The same as a legacy driver; steps that come between make what drivers never do. */
static void legacy_start(struct vdev *d, unsigned device, u32 val)
{
    u64 at = ports(device);

    if (starts++ >= STARTS)
        return;
    vdev_find(d, &g, device + 1);
    ecam_write(&g, device + 1, PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    bus_write(g.pio, at + VIRTIO_PCI_STATUS, val & 1 ? 0 : 3, 1);
    bus_write(g.pio, at + VIRTIO_PCI_GUEST_FEATURES, val >> 2, 4);
    for (unsigned n = 0; n < 8; n++) {
        u16 size;

        bus_write(g.pio, at + VIRTIO_PCI_QUEUE_SEL, n, 2);
        size = (u16)bus_read(g.pio, at + VIRTIO_PCI_QUEUE_NUM, 2);
        if (!size || size > VIRTQ_SIZE_MAX)
            break;
        d->q[n] = (struct gq){ .g = &g, .size = size, .desc = guest_alloc(&g, 8192 + 16ull * size) };
        d->q[n].avail = d->q[n].desc + 16ull * size;
        d->q[n].used = ALIGN_UP(d->q[n].avail + 2ull * size + 6, 4096);
        bus_write(g.pio, at + VIRTIO_PCI_QUEUE_PFN, d->q[n].desc >> 12, 4);
    }
    if (val & 2)
        bus_write(g.pio, at + VIRTIO_PCI_STATUS, 7, 1);
}

static void add(struct vdev *d, unsigned n, u32 val)
{
    struct gq *q = &d->q[n % 8];
    struct buf b[3];

    if (!q->size)
        return;
    for (unsigned i = 0; i < 3; i++) {
        b[i] = (struct buf){ (u64)(val >> 8) * 64 % GUEST_RAM + i * 8192, i == 0 ? 16 : (u32)1 << (val & 15), val >> (i + 4) & 1 };
        val = val * 5 + 1;
    }
    gq_add(q, b, 1 + n / 8 % 3);
    if (n & 64)
        gq_desc(q, q->next_desc % 16, (u64)val * 16 % GUEST_RAM, 16 * (n >> 8), VRING_DESC_F_INDIRECT, 0);
}

/* Nearly right requests: header, data, status. */
static void disk_request(struct vdev *d, unsigned n, u32 val)
{
    struct virtio_blk_outhdr h = { .type = n % 12, .sector = val % 2100 };
    u64 at = GUEST_RAM / 2 + n % 16 * 0x10000ull;
    bool write = h.type != VIRTIO_BLK_T_OUT;

    if (!d->q[0].size)
        return;
    put(&g, at, &h, sizeof(h));
    gq_add(&d->q[0], (struct buf[]){ { at, n & 0x1000 ? 15 : 16, false }, { at + 64, val >> 16 & 0x7e00, write }, { at + 32, 1, true } }, 3);
    vdev_kick(d, 0);
}

static void control_message(struct vdev *d, unsigned n, u32 val)
{
    struct virtio_console_control msg = { .id = n % (PORTS + 1), .event = n >> 4 & 7, .value = (u16)val };

    if (!d->q[3].size)
        return;
    put(&g, GUEST_RAM / 2, &msg, sizeof(msg));
    gq_add(&d->q[3], (struct buf[]){ { GUEST_RAM / 2, sizeof(msg) - (n >> 12 & 1), n >> 13 & 1 } }, 1);
    gq_add(&d->q[2], (struct buf[]){ { GUEST_RAM / 2 + 4096, 4 + n % 64, true } }, 1);
    vdev_kick(d, 3);
}

static void step(const u8 *a)
{
    unsigned device = a[1] % DEVICES, n = a[2] | a[3] << 8;
    struct vdev *d = &drv[device];
    struct vport *port = virtio_console_port(con, n % PORTS);
    u64 val;
    u32 v;

    memcpy(&v, a + 4, 4);
    val = v;
    switch (a[0] % 17) {
    case 0: bus_access(g.mmio, bar_address(&g, device + 1, 4) + n % 0x4000, 1u << (a[0] >> 6), true, &val); break;
    case 1: bus_access(g.mmio, bar_address(&g, device + 1, n >> 15 ? 1 : 4) + n % 0x4000, 1u << (a[0] >> 6), a[0] & 32, &val); break;
    case 2: ecam_write(&g, device + 1, n % 256, v, 1u << (a[0] >> 6) % 3); break;
    case 3: put(&g, n * 4, &v, 4); break;
    case 4:
        if (d->notify)
            vdev_kick(d, n % 8);
        break;
    case 5: turn(); break;
    case 6: start(d, device, v); break;
    case 7: add(d, n, v); break;
    case 8: vport_send(port, dev, v % sizeof(dev)); break;
    case 9: vport_resume(port); break;
    case 10: n & 2 ? vport_set_open(port, v & 1) : vport_resize(port, (u16)v, (u16)n); break;
    case 11: state_save_and_load(dev[device], v, true); break;
    case 12: disk_request(&drv[0], n, v); break;
    case 14: bus_access(g.pio, ports(device) + n % 64, 1u << (a[0] >> 6), a[0] & 32, &val); break;
    case 15: legacy_start(d, device, v); break;
    case 16: bus_write(g.pio, ports(device) + VIRTIO_PCI_QUEUE_NOTIFY, n % 8, 2); break;
    case 13: control_message(&drv[1], n, v); break;
    }
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    if (!con)
        build();
    g.heap = GUEST_HEAP;
    starts = taken = 0;
    memset(drv, 0, sizeof(drv));
    for (unsigned i = 0; i < DEVICES && len; i++)
        if (data[0] >> i & 1)
            start(&drv[i], i, data[0] >> 4);
    for (; len > 8; data += 8, len -= 8)
        step(data + 1);
    for (unsigned i = 0; i < DEVICES; i++) {
        if (dev[i]->ops->quiesce)
            dev[i]->ops->quiesce(dev[i]);
        dev[i]->ops->reset(dev[i]);
    }
    turn();
    memset(g.ram.run[0].hva, 0, 768 * KiB);
    for (unsigned i = 0; i < DEVICES; i++)
        bug_on(((struct virtio *)dev[i])->status);
    return 0;
}
