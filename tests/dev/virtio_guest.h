/*
 * The guest's side of PCI and virtio, for tests: memory, a bus, and a driver that builds rings by hand.
 *
 * Memory is two runs that adjoin at GUEST_SEAM, so that buffers laid across it have two host pieces. Nothing here is clever: a test wants to
 * write every byte of a ring itself.
 */
#pragma once

#include <errno.h>
#include <linux/pci_regs.h>
#include <linux/virtio_config.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/err.h"
#include "base/loop.h"
#include "dev/pci_host.h"
#include "io/virtio_pci.h"

#define GUEST_RAM (8 * MiB)
#define GUEST_SEAM (4 * MiB)
#define GUEST_HEAP (64 * KiB)
#define GUEST_ECAM 0xb0000000ull
#define GUEST_MEM 0xc0000000ull
#define GUEST_MEM64 0x800000000ull

struct guest {
    struct ram ram;
    struct bus *pio, *mmio;
    struct pci_bus *pci;
    struct pci_host *host;
    u64 heap;
    atomic_uint msi[256];                                          /* messages received, by the low byte of data */
    atomic_uint msi_total;
    atomic_int intx;
};

static inline void guest_msi(void *arg, u64 addr UNUSED, u32 data)
{
    struct guest *g = arg;

    g->msi[data & 255]++;
    g->msi_total++;
}

static inline void guest_intx(void *arg, int n UNUSED, int level)
{
    ((struct guest *)arg)->intx = level;
}

static inline struct irq_line guest_line(struct guest *g)
{
    return (struct irq_line){ .set = guest_intx, .chip = g };
}

static inline void guest_new(struct guest *g)
{
    struct pci_config cfg = { .io = { .base = 0xc000, .size = 0x1000 }, .mem = { .base = GUEST_MEM, .size = 1 * MiB },
                              .mem64 = { .base = GUEST_MEM64, .size = 16 * MiB } };

    memset(g, 0, sizeof(*g));
    bug_on(ram_init(&g->ram) < 0 || ram_add(&g->ram, 0, GUEST_SEAM) < 0 || ram_add(&g->ram, GUEST_SEAM, GUEST_RAM - GUEST_SEAM) < 0);
    bug_on(bus_new(NULL, &g->pio) < 0 || bus_new(NULL, &g->mmio) < 0);
    cfg.pio = g->pio;
    cfg.mmio = g->mmio;
    cfg.msi = (struct msi_sink){ .send = guest_msi, .arg = g };
    bug_on(pci_bus_new(&cfg, &g->pci) < 0 || pci_host_new(g->pci, g->pio, g->mmio, GUEST_ECAM, 1, &g->host) < 0);
    g->heap = GUEST_HEAP;
}

static inline void guest_free(struct guest *g)
{
    struct device *host = (struct device *)g->host;

    host->ops->free(host);
    pci_bus_free(g->pci);
    bus_free(g->pio);
    bus_free(g->mmio);
    ram_close(&g->ram);
}

static inline void device_free(void *dev)
{
    ((struct device *)dev)->ops->free(dev);
}

/* Of a state that was saved; l tells what became of it. */
static inline void device_load(struct device *dev, struct stream *l, const u8 *state, size_t len)
{
    stream_load_init(l, state, len);
    pthread_mutex_lock(&dev->lock);
    dev->ops->state(dev, l);
    pthread_mutex_unlock(&dev->lock);
}

static inline u64 guest_alloc(struct guest *g, u64 size)
{
    u64 at = ALIGN_UP(g->heap, 4096);

    g->heap = at + size;
    bug_on(g->heap > GUEST_SEAM);
    return at;
}

static inline void put(struct guest *g, u64 gpa, const void *buf, u64 len)
{
    bug_on(ram_write(&g->ram, gpa, buf, len) < 0);
}

static inline void get(struct guest *g, u64 gpa, void *buf, u64 len)
{
    bug_on(ram_read(&g->ram, gpa, buf, len) < 0);
}

static inline u32 ecam_read(struct guest *g, unsigned device, unsigned off, unsigned size)
{
    return (u32)bus_read(g->mmio, GUEST_ECAM + (device << 15) + off, size);
}

static inline void ecam_write(struct guest *g, unsigned device, unsigned off, u32 val, unsigned size)
{
    bus_write(g->mmio, GUEST_ECAM + (device << 15) + off, val, size);
}

/* --- rings --- */

struct gq {
    struct guest *g;
    u16 size;
    u64 desc, avail, used;
    u16 next_desc, avail_idx, used_seen;
    bool packed;                                                   /* then desc is the ring, avail and used are event suppression areas */
    bool avail_wrap, used_wrap;
    u16 entries[1024];                                             /* packed: of the chain with that ID */
};

/* As in 2.8.13. */
struct gq_packed {
    u64 addr;
    u32 len;
    u16 id, flags;
};

struct buf {
    u64 gpa;
    u32 len;
    bool write;
};

static inline void gq_init(struct gq *q, struct guest *g, u16 size)
{
    static const u8 zero[4096];
    u64 area = guest_alloc(g, 16 * size + 2 * size + 8 + 8 * size + 4096);

    *q = (struct gq){ .g = g, .size = size, .desc = area, .avail = area + 16 * size, .avail_wrap = true, .used_wrap = true };
    q->used = ALIGN_UP(q->avail + 2 * size + 8, 4);
    for (u64 p = area; p < g->heap; p += sizeof(zero))
        put(g, p, zero, MIN(sizeof(zero), g->heap - p));
}

static inline void gq_desc(struct gq *q, u16 n, u64 gpa, u32 len, u16 flags, u16 next)
{
    struct vring_desc d = { .addr = gpa, .len = len, .flags = flags, .next = next };

    put(q->g, q->desc + 16ull * n, &d, sizeof(d));
}

/* Makes head available, entry first, index after it. */
static inline void gq_offer(struct gq *q, u16 head)
{
    put(q->g, q->avail + 4 + 2ull * (q->avail_idx % q->size), &head, 2);
    q->avail_idx++;
    __atomic_store_n((u16 *)(void *)ram_hva(&q->g->ram, q->avail + 2), q->avail_idx, __ATOMIC_RELEASE);
}

static inline void gq_step(struct gq *q, u16 *idx, bool *wrap, unsigned n)
{
    for (; n; n--)
        if (++*idx == q->size) {
            *idx = 0;
            *wrap = !*wrap;
        }
}

static inline u16 gq_packed_flags(bool wrap, u16 more)
{
    return (u16)(more | 1u << (wrap ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED));
}

/* n descriptors as they are, flags of the first last. */
static inline void gq_put_packed(struct gq *q, const struct gq_packed *p, unsigned n)
{
    u16 at = q->avail_idx, first = at;
    bool wrap = q->avail_wrap, first_wrap = wrap;

    for (unsigned i = 0; i < n; i++) {
        struct gq_packed d = p[i];

        d.flags = i ? gq_packed_flags(wrap, d.flags) : 0;
        put(q->g, q->desc + 16ull * at, &d, i ? 16 : 14);
        gq_step(q, &at, &wrap, 1);
    }
    q->avail_idx = at;
    q->avail_wrap = wrap;
    __atomic_store_n((u16 *)(void *)ram_hva(&q->g->ram, q->desc + 16ull * first + 14), gq_packed_flags(first_wrap, p[0].flags), __ATOMIC_RELEASE);
}

static inline u16 gq_add_packed(struct gq *q, const struct buf *b, unsigned n)
{
    u16 id = q->next_desc++ % q->size;
    struct gq_packed p[16];

    bug_on(n > ARRAY_SIZE(p));
    for (unsigned i = 0; i < n; i++)
        p[i] = (struct gq_packed){ b[i].gpa, b[i].len, id, (u16)((b[i].write ? VRING_DESC_F_WRITE : 0) | (i + 1 < n ? VRING_DESC_F_NEXT : 0)) };
    q->entries[id % ARRAY_SIZE(q->entries)] = (u16)n;
    gq_put_packed(q, p, n);
    return id;
}

/* A chain of n buffers in the next n descriptors; returns its head. */
static inline u16 gq_add(struct gq *q, const struct buf *b, unsigned n)
{
    u16 head = q->next_desc % q->size;

    if (q->packed)
        return gq_add_packed(q, b, n);
    for (unsigned i = 0; i < n; i++) {
        u16 at = q->next_desc++ % q->size;

        gq_desc(q, at, b[i].gpa, b[i].len, (u16)((b[i].write ? VRING_DESC_F_WRITE : 0) | (i + 1 < n ? VRING_DESC_F_NEXT : 0)), (at + 1) % q->size);
    }
    gq_offer(q, head);
    return head;
}

static inline u16 gq_used_idx(struct gq *q)
{
    return __atomic_load_n((u16 *)(void *)ram_hva(&q->g->ram, q->used + 2), __ATOMIC_ACQUIRE);
}

/* Is there a used element? */
static inline bool gq_any_used(struct gq *q)
{
    u16 flags;

    if (!q->packed)
        return q->used_seen != gq_used_idx(q);
    flags = __atomic_load_n((u16 *)(void *)ram_hva(&q->g->ram, q->desc + 16ull * q->used_seen + 14), __ATOMIC_ACQUIRE);
    return !(flags >> VRING_PACKED_DESC_F_AVAIL & 1) == !q->used_wrap && !(flags >> VRING_PACKED_DESC_F_USED & 1) == !q->used_wrap;
}

/* The next used element, or false. */
static inline bool gq_used(struct gq *q, u32 *id, u32 *len)
{
    struct vring_used_elem e;
    struct gq_packed p;

    if (!gq_any_used(q))
        return false;
    if (q->packed) {
        get(q->g, q->desc + 16ull * q->used_seen, &p, sizeof(p));
        *id = p.id;
        *len = p.len;
        gq_step(q, &q->used_seen, &q->used_wrap, q->entries[p.id % ARRAY_SIZE(q->entries)]);
        return true;
    }
    get(q->g, q->used + 4 + 8ull * (q->used_seen % q->size), &e, sizeof(e));
    q->used_seen++;
    *id = e.id;
    *len = e.len;
    return true;
}

/* Does the device want to be told of what was added since avail_idx was old? With event index; packed: as long as it asks for none, or for all. */
static inline bool gq_wants_kick(struct gq *q, u16 old)
{
    u16 event[2];

    get(q->g, q->packed ? q->used : q->used + 4 + 8ull * q->size, event, q->packed ? 4 : 2);
    return q->packed ? event[1] != VRING_PACKED_EVENT_FLAG_DISABLE : vring_need_event(event[0], q->avail_idx, old);
}

static inline void gq_set_used_event(struct gq *q, u16 event)
{
    __atomic_store_n((u16 *)(void *)ram_hva(&q->g->ram, q->avail + 4 + 2ull * q->size), event, __ATOMIC_RELAXED);
}

/* --- a virtio device behind its BARs --- */

struct vdev {
    struct guest *g;
    unsigned device;
    u64 common, notify, isr, config, msix;
    u32 notify_multiplier, config_len;
    unsigned window;                                               /* capability for access through configuration space */
    bool packed;                                                   /* was negotiated */
    struct gq q[VIRTIO_QUEUES_MAX];
};

#define COMMON(field) offsetof(struct virtio_pci_common_cfg, field)

static inline u32 common_get(struct vdev *d, unsigned off, unsigned size)
{
    return (u32)bus_read(d->g->mmio, d->common + off, size);
}

static inline void common_set(struct vdev *d, unsigned off, unsigned size, u32 val)
{
    bus_write(d->g->mmio, d->common + off, val, size);
}

static inline u64 bar_address(struct guest *g, unsigned device, unsigned bar)
{
    return ecam_read(g, device, PCI_BASE_ADDRESS_0 + 4 * bar, 4) & ~15u;
}

/* Walks the capability list as a driver does. */
static inline void vdev_find(struct vdev *d, struct guest *g, unsigned device)
{
    memset(d, 0, sizeof(*d));
    d->g = g;
    d->device = device;
    for (unsigned cap = ecam_read(g, device, PCI_CAPABILITY_LIST, 1); cap; cap = ecam_read(g, device, cap + 1, 1)) {
        unsigned id = ecam_read(g, device, cap, 1), type = ecam_read(g, device, cap + 3, 1);
        u64 at = bar_address(g, device, ecam_read(g, device, cap + 4, 1)) + ecam_read(g, device, cap + 8, 4);

        if (id == PCI_CAP_ID_MSIX)
            d->msix = bar_address(g, device, ecam_read(g, device, cap + PCI_MSIX_TABLE, 4) & 7);
        if (id != PCI_CAP_ID_VNDR)
            continue;
        switch (type) {
        case VIRTIO_PCI_CAP_COMMON_CFG: d->common = at; break;
        case VIRTIO_PCI_CAP_ISR_CFG: d->isr = at; break;
        case VIRTIO_PCI_CAP_NOTIFY_CFG:
            d->notify = at;
            d->notify_multiplier = ecam_read(g, device, cap + 16, 4);
            break;
        case VIRTIO_PCI_CAP_DEVICE_CFG:
            d->config = at;
            d->config_len = ecam_read(g, device, cap + 12, 4);
            break;
        case VIRTIO_PCI_CAP_PCI_CFG: d->window = cap; break;
        }
    }
}

static inline u8 vdev_status(struct vdev *d)
{
    return (u8)common_get(d, COMMON(device_status), 1);
}

static inline void vdev_set_status(struct vdev *d, u8 status)
{
    common_set(d, COMMON(device_status), 1, status);
}

static inline u64 vdev_features(struct vdev *d)
{
    u64 f = 0;

    for (u32 word = 0; word < 2; word++) {
        common_set(d, COMMON(device_feature_select), 4, word);
        f |= (u64)common_get(d, COMMON(device_feature), 4) << 32 * word;
    }
    return f;
}

/* ACKNOWLEDGE to FEATURES_OK; false when the device refuses. */
static inline bool vdev_negotiate(struct vdev *d, u64 features)
{
    vdev_set_status(d, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    vdev_set_status(d, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
    for (u32 word = 0; word < 2; word++) {
        common_set(d, COMMON(guest_feature_select), 4, word);
        common_set(d, COMMON(guest_feature), 4, (u32)(features >> 32 * word));
    }
    vdev_set_status(d, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK);
    d->packed = features >> VIRTIO_F_RING_PACKED & 1;
    return vdev_status(d) & VIRTIO_CONFIG_S_FEATURES_OK;
}

/* Queue n with MSI-X vector n + 1 and message n + 1. */
static inline void vdev_queue(struct vdev *d, unsigned n, u16 size)
{
    struct gq *q = &d->q[n];

    gq_init(q, d->g, size);
    q->packed = d->packed;
    common_set(d, COMMON(queue_select), 2, n);
    common_set(d, COMMON(queue_size), 2, size);
    common_set(d, COMMON(queue_msix_vector), 2, n + 1);
    common_set(d, COMMON(queue_desc_lo), 4, (u32)q->desc);
    common_set(d, COMMON(queue_desc_hi), 4, (u32)(q->desc >> 32));
    common_set(d, COMMON(queue_avail_lo), 4, (u32)q->avail);
    common_set(d, COMMON(queue_avail_hi), 4, (u32)(q->avail >> 32));
    common_set(d, COMMON(queue_used_lo), 4, (u32)q->used);
    common_set(d, COMMON(queue_used_hi), 4, (u32)(q->used >> 32));
    common_set(d, COMMON(queue_enable), 2, 1);
}

static inline void vdev_msix(struct vdev *d, unsigned vectors)
{
    unsigned cap;

    for (unsigned v = 0; v < vectors; v++) {
        bus_write(d->g->mmio, d->msix + 16 * v, 0xfee00000, 4);
        bus_write(d->g->mmio, d->msix + 16 * v + 4, 0, 4);
        bus_write(d->g->mmio, d->msix + 16 * v + 8, v, 4);
        bus_write(d->g->mmio, d->msix + 16 * v + 12, 0, 4);
    }
    for (cap = ecam_read(d->g, d->device, PCI_CAPABILITY_LIST, 1); ecam_read(d->g, d->device, cap, 1) != PCI_CAP_ID_MSIX;)
        cap = ecam_read(d->g, d->device, cap + 1, 1);
    ecam_write(d->g, d->device, cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE, 2);
}

static inline void vdev_master(struct vdev *d, bool on)
{
    ecam_write(d->g, d->device, PCI_COMMAND, PCI_COMMAND_MEMORY | (on ? PCI_COMMAND_MASTER : 0), 2);
}

static inline void vdev_go(struct vdev *d)
{
    vdev_set_status(d, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
}

static inline void vdev_kick(struct vdev *d, unsigned n)
{
    bus_write(d->g->mmio, d->notify + n * d->notify_multiplier, n, 2);
}

/* All of it: bus master, MSI-X, features, queues of the given size, DRIVER_OK. */
static inline bool vdev_start(struct vdev *d, struct guest *g, unsigned device, u64 features, u16 queue_size)
{
    unsigned queues;

    vdev_find(d, g, device);
    vdev_master(d, true);
    queues = common_get(d, COMMON(num_queues), 2);
    vdev_msix(d, queues + 1);
    common_set(d, COMMON(msix_config), 2, 0);
    if (!vdev_negotiate(d, features))
        return false;
    for (unsigned n = 0; n < queues; n++)
        vdev_queue(d, n, queue_size);
    vdev_go(d);
    return true;
}

/* Waits for the next used element of queue n, which a worker thread may bring, and for the interrupt that goes with it; false after two seconds. */
static inline bool vdev_wait(struct vdev *d, unsigned n, u32 *id, u32 *len)
{
    for (unsigned i = 0; i < 20000; i++) {
        if (gq_used(&d->q[n], id, len)) {
            vdev_status(d);                                        /* under the device's lock, which whoever interrupts holds until then */
            return true;
        }
        usleep(100);
    }
    return false;
}
