/*
 * virtio over PCI (see virtio_pci.h; virtio 1.2, 4.1 "Virtio Over PCI Bus").
 *
 *   BAR 0, ports:   legacy registers, of transitional devices (4.1.4.10): common ones, and behind them the device configuration
 *   BAR 1,  4 KiB:  MSI-X table and pending bits; one vector for each queue and one for changes of configuration
 *   BAR 4, 16 KiB:  0x0000 common configuration   0x1000 ISR status   0x2000 device configuration   0x3000 notification, 4 bytes a queue
 *
 * Fields of the common configuration are written with their natural width (4.1.3.1); other writes are ignored, reads of any width work.
 * The guest is little-endian, as the host is, so legacy fields need no other treatment.
 *
 * A legacy driver that does not make the device a bus master is not served (Linux before 2.6.34 relied on firmware for it).
 *
 * Locking: all under the device's lock. A request that is in flight while the driver takes bus mastership away still completes.
 */
#include "io/virtio_pci.h"

#include <errno.h>
#include <linux/pci_regs.h>
#include <linux/virtio_pci.h>
#include <string.h>

#include "base/err.h"

#define BAR_LEGACY 0
#define BAR_MSIX 1
#define BAR_REGISTERS 4
#define PAGE_COMMON 0
#define PAGE_ISR 1
#define PAGE_DEVICE 2
#define PAGE_NOTIFY 3
#define PAGES 4
#define NOTIFY_MULTIPLIER 4

#define ISR_QUEUE 1
#define ISR_CONFIG 2

/* 4.1.4.3, with the fields that follow those of struct virtio_pci_common_cfg; these read as zero. */
union common {
    struct virtio_pci_common_cfg reg;
    u8 byte[64];
};

/* 4.1.4.10. The vectors are there only while MSI-X is enabled; the device configuration follows. */
union legacy {
    struct {
        u32 device_features, driver_features, queue_pfn;
        u16 queue_size, queue_select, queue_notify;
        u8 device_status, isr;
        u16 config_vector, queue_vector;
    } reg;
    u8 byte[32];
};
_Static_assert(offsetof(union legacy, reg.isr) == VIRTIO_PCI_ISR &&
               offsetof(union legacy, reg.queue_vector) == VIRTIO_MSI_QUEUE_VECTOR, "as in 4.1.4.10");

struct virtio_pci {
    struct pci_fn fn;
    struct virtio *v;
    bool master;
    u8 isr;
    u16 config_vector, queue_select;
    u32 device_feature_select, driver_feature_select;
    unsigned window;                                               /* offset of the configuration access capability, 4.1.4.9 */
};

static struct virtq *selected(struct virtio_pci *t)
{
    return t->queue_select < t->v->queues ? &t->v->queue[t->queue_select] : NULL;
}

static u32 feature_word(u64 features, u32 select)
{
    return select > 1 ? 0 : (u32)(features >> select * 32);
}

static u64 common_read(struct virtio_pci *t, u64 off, unsigned size)
{
    const struct virtio *v = t->v;
    const struct virtq *q = selected(t);
    union common c = { 0 };
    u64 val = 0;

    c.reg.device_feature_select = t->device_feature_select;
    c.reg.device_feature = feature_word(v->offered, t->device_feature_select);
    c.reg.guest_feature_select = t->driver_feature_select;
    c.reg.guest_feature = feature_word(v->accepted, t->driver_feature_select);
    c.reg.msix_config = t->config_vector;
    c.reg.num_queues = (u16)v->queues;
    c.reg.device_status = virtio_status(v);
    c.reg.config_generation = v->config_generation;
    c.reg.queue_select = t->queue_select;
    if (q) {
        c.reg.queue_size = q->size;
        c.reg.queue_msix_vector = q->vector;
        c.reg.queue_enable = q->enabled;
        c.reg.queue_notify_off = t->queue_select;
        c.reg.queue_desc_lo = (u32)q->desc;
        c.reg.queue_desc_hi = (u32)(q->desc >> 32);
        c.reg.queue_avail_lo = (u32)q->avail;
        c.reg.queue_avail_hi = (u32)(q->avail >> 32);
        c.reg.queue_used_lo = (u32)q->used;
        c.reg.queue_used_hi = (u32)(q->used >> 32);
    }
    if (range_in(off, size, sizeof(c)))
        memcpy(&val, c.byte + off, size);
    return val;
}

static void set_half(u64 *addr, bool high, u32 val)
{
    if (high)
        *addr = (u32)*addr | (u64)val << 32;
    else
        *addr = (*addr & ~0xffffffffull) | val;
}

static u16 valid_vector(const struct virtio_pci *t, u64 val)
{
    return val < t->fn.msix_vectors ? (u16)val : VIRTIO_NO_VECTOR;
}

#define FIELD(name) offsetof(struct virtio_pci_common_cfg, name)
#define WIDTH(name) sizeof(((struct virtio_pci_common_cfg *)0)->name)
#define IS(name) (off == FIELD(name) && size == WIDTH(name))

/* An enabled queue does not change any more (4.1.4.3.2); it is disabled by a reset only. */
static void queue_write(struct virtio_pci *t, u64 off, u64 val, unsigned size)
{
    struct virtq *q = selected(t);

    if (!q)
        return;
    if (IS(queue_msix_vector))
        q->vector = valid_vector(t, val);
    if (q->enabled)
        return;
    if (IS(queue_size)) {
        if (val && val <= q->size_max && (q->packed || !(val & (val - 1))))
            q->size = (u16)val;
    } else if (IS(queue_enable)) {
        if (val != 1)
            return;
        virtq_enable(q);
        if (q->broken)
            virtio_break(t->v, "a virtqueue lies outside of memory");
    } else if (off >= FIELD(queue_desc_lo) && off <= FIELD(queue_used_hi) && size == 4 && !(off & 3)) {
        unsigned n = (unsigned)(off - FIELD(queue_desc_lo)) / 4;

        set_half(n < 2 ? &q->desc : n < 4 ? &q->avail : &q->used, n & 1, (u32)val);
    }
}

static void common_write(struct virtio_pci *t, u64 off, u64 val, unsigned size)
{
    if (IS(device_status))
        virtio_set_status(t->v, (u8)val);
    if (t->v->resetting)
        return;
    if (IS(device_feature_select))
        t->device_feature_select = (u32)val;
    else if (IS(guest_feature_select))
        t->driver_feature_select = (u32)val;
    else if (IS(guest_feature))
        virtio_accept(t->v, t->driver_feature_select, (u32)val);
    else if (IS(msix_config))
        t->config_vector = valid_vector(t, val);
    else if (IS(queue_select))
        t->queue_select = (u16)val;
    else
        queue_write(t, off, val, size);
}

/* Reading acknowledges (4.1.4.5). */
static u8 take_isr(struct virtio_pci *t)
{
    u8 isr = t->isr;

    t->isr = 0;
    pci_intx(&t->fn, false);
    return isr;
}

/* --- legacy registers (4.1.4.10) --- */

static unsigned legacy_end(const struct virtio_pci *t)
{
    return VIRTIO_PCI_CONFIG_OFF(pci_msix_enabled(&t->fn));
}

static u64 legacy_read(struct virtio_pci *t, u64 off, unsigned size)
{
    const struct virtio *v = t->v;
    const struct virtq *q = selected(t);
    unsigned end = legacy_end(t);
    union legacy r = { 0 };
    u64 val = 0;

    if (off >= end) {
        virtio_config_read(t->v, off - end, &val, size);
        return val;
    }
    r.reg.device_features = virtio_legacy_features(v);
    r.reg.driver_features = (u32)v->accepted;
    r.reg.queue_select = t->queue_select;
    r.reg.device_status = virtio_status(v);
    r.reg.config_vector = t->config_vector;
    r.reg.queue_vector = VIRTIO_NO_VECTOR;
    if (q) {
        r.reg.queue_pfn = q->enabled ? (u32)(q->desc >> VIRTIO_PCI_QUEUE_ADDR_SHIFT) : 0;
        r.reg.queue_size = q->size;
        r.reg.queue_vector = q->vector;
    }
    if (off <= VIRTIO_PCI_ISR && off + size > VIRTIO_PCI_ISR)
        r.reg.isr = take_isr(t);
    if (range_in(off, size, sizeof(r)))
        memcpy(&val, r.byte + off, size);
    return val;
}

#define LEGACY(name) (off == offsetof(union legacy, reg.name) && size == sizeof(((union legacy *)0)->reg.name))

static void legacy_write(struct virtio_pci *t, u64 off, u64 val, unsigned size)
{
    struct virtq *q = selected(t);
    unsigned end = legacy_end(t);

    if (off >= end)
        virtio_config_write(t->v, off - end, &val, size);
    else if (LEGACY(device_status))
        virtio_legacy_set_status(t->v, (u8)val);
    else if (t->v->resetting)
        return;
    else if (LEGACY(driver_features))
        virtio_legacy_accept(t->v, (u32)val);
    else if (LEGACY(queue_pfn) && q)
        virtio_legacy_queue(t->v, q, (u64)(u32)val << VIRTIO_PCI_QUEUE_ADDR_SHIFT);
    else if (LEGACY(queue_select))
        t->queue_select = (u16)val;
    else if (LEGACY(queue_notify))
        virtio_kick(t->v, (u16)val);
    else if (LEGACY(config_vector))
        t->config_vector = valid_vector(t, val);
    else if (LEGACY(queue_vector) && q)
        q->vector = valid_vector(t, val);
}

/* --- BARs --- */

static u64 vp_bar_read(struct pci_fn *f, unsigned bar, u64 off, unsigned size)
{
    struct virtio_pci *t = container_of(f, struct virtio_pci, fn);
    u64 in_page = off & ~PAGE_MASK, val = 0;

    if (bar == BAR_LEGACY)
        return legacy_read(t, off, size);
    switch (off >> PAGE_SHIFT) {
    case PAGE_COMMON: return common_read(t, in_page, size);
    case PAGE_ISR: return in_page ? 0 : take_isr(t);
    case PAGE_DEVICE: virtio_config_read(t->v, in_page, &val, size); return val;
    default: return 0;
    }
}

static void vp_bar_write(struct pci_fn *f, unsigned bar, u64 off, u64 val, unsigned size)
{
    struct virtio_pci *t = container_of(f, struct virtio_pci, fn);
    u64 in_page = off & ~PAGE_MASK;

    if (bar == BAR_LEGACY) {
        legacy_write(t, off, val, size);
        return;
    }
    switch (off >> PAGE_SHIFT) {
    case PAGE_COMMON: common_write(t, in_page, val, size); break;
    case PAGE_DEVICE: virtio_config_write(t->v, in_page, &val, size); break;
    case PAGE_NOTIFY: virtio_kick(t->v, (unsigned)in_page / NOTIFY_MULTIPLIER); break;
    }
}

/* --- the window in configuration space (4.1.4.9): for whoever cannot map BARs --- */

static bool window_access(struct virtio_pci *t, unsigned off, unsigned size, struct virtio_pci_cap *cap)
{
    unsigned data = t->window + offsetof(struct virtio_pci_cfg_cap, pci_cfg_data);

    if (off >= data + 4 || off + size <= data)
        return false;
    memcpy(cap, t->fn.cfg + t->window, sizeof(*cap));
    return (cap->length == 1 || cap->length == 2 || cap->length == 4) && !(cap->offset % cap->length);
}

static void vp_config_read(struct pci_fn *f, unsigned off, unsigned size)
{
    struct virtio_pci *t = container_of(f, struct virtio_pci, fn);
    struct virtio_pci_cap cap;
    u32 val;

    if (!window_access(t, off, size, &cap))
        return;
    val = (u32)pci_bar_read(f, cap.bar, cap.offset, cap.length);
    memcpy(f->cfg + t->window + offsetof(struct virtio_pci_cfg_cap, pci_cfg_data), &val, cap.length);
}

static void vp_config_write(struct pci_fn *f, unsigned off, unsigned size)
{
    struct virtio_pci *t = container_of(f, struct virtio_pci, fn);
    bool was_master = t->master;
    struct virtio_pci_cap cap;
    u32 val = 0;

    t->master = pci_bus_master(f);
    if (t->master && !was_master)
        virtio_kick_all(t->v);                                     /* what came while the queues could not be read */
    if (!window_access(t, off, size, &cap))
        return;
    memcpy(&val, f->cfg + t->window + offsetof(struct virtio_pci_cfg_cap, pci_cfg_data), cap.length);
    pci_bar_write(f, cap.bar, cap.offset, val, cap.length);
}

static const struct pci_fn_ops fn_ops = {
    .bar_read = vp_bar_read, .bar_write = vp_bar_write, .config_read = vp_config_read, .config_write = vp_config_write
};

/* --- transport --- */

static void signal_driver(struct virtio_pci *t, u16 vector, u8 isr)
{
    if (pci_msix_enabled(&t->fn)) {
        pci_msix_signal(&t->fn, vector);                           /* VIRTIO_NO_VECTOR is none of its vectors */
        return;
    }
    t->isr |= isr;
    pci_intx(&t->fn, true);
}

static void vp_interrupt(void *transport, struct virtq *q)
{
    signal_driver(transport, q->vector, ISR_QUEUE);
}

static void vp_config_changed(void *transport)
{
    struct virtio_pci *t = transport;

    signal_driver(t, t->config_vector, ISR_CONFIG);
}

static bool vp_may_dma(void *transport)
{
    struct virtio_pci *t = transport;

    return pci_bus_master(&t->fn);
}

static void vp_reset_done(void *transport)
{
    struct virtio_pci *t = transport;

    t->isr = 0;
    t->queue_select = 0;
    t->device_feature_select = t->driver_feature_select = 0;
    t->config_vector = VIRTIO_NO_VECTOR;
    for (unsigned n = 0; n < t->v->queues; n++)
        t->v->queue[n].vector = VIRTIO_NO_VECTOR;
    pci_intx(&t->fn, false);
}

static void vp_power_on(void *transport)
{
    struct virtio_pci *t = transport;

    vp_reset_done(t);
    pci_fn_reset(&t->fn);
    t->master = false;
}

static void vp_state(void *transport, struct stream *s)
{
    struct virtio_pci *t = transport;

    if (!stream_section(s, "virtio_pci", 1))
        return;
    stream_u8(s, &t->isr);
    stream_u16(s, &t->config_vector);
    stream_u16(s, &t->queue_select);
    stream_u32(s, &t->device_feature_select);
    stream_u32(s, &t->driver_feature_select);
    pci_fn_state(&t->fn, s);
    t->master = pci_bus_master(&t->fn);
}

static void vp_free(void *transport)
{
    struct virtio_pci *t = transport;

    pci_remove(&t->fn);
    free(t);
}

static const struct virtio_transport_ops transport_ops = {
    .interrupt = vp_interrupt, .config_changed = vp_config_changed, .may_dma = vp_may_dma, .reset_done = vp_reset_done,
    .power_on = vp_power_on, .state = vp_state, .free = vp_free,
};

/* --- building --- */

static u32 class_code(u16 type)
{
    switch (type) {
    case VIRTIO_ID_NET: return 0x020000;                           /* Ethernet controller */
    case VIRTIO_ID_BLOCK: return 0x018000;                         /* other mass storage */
    case VIRTIO_ID_CONSOLE: return 0x078000;                       /* other communication device */
    default: return 0xff0000;                                      /* none of the defined classes */
    }
}

/* 4.1.2.1; 0: there is no transitional device of this type. */
static u16 transitional_id(u16 type)
{
    switch (type) {
    case VIRTIO_ID_NET: return VIRTIO_TRANS_ID_NET;
    case VIRTIO_ID_BLOCK: return VIRTIO_TRANS_ID_BLOCK;
    case VIRTIO_ID_BALLOON: return VIRTIO_TRANS_ID_BALLOON;
    case VIRTIO_ID_CONSOLE: return VIRTIO_TRANS_ID_CONSOLE;
    case VIRTIO_ID_SCSI: return VIRTIO_TRANS_ID_SCSI;
    case VIRTIO_ID_RNG: return VIRTIO_TRANS_ID_RNG;
    case VIRTIO_ID_9P: return VIRTIO_TRANS_ID_9P;
    default: return 0;
    }
}

static int add_bars(struct virtio_pci *t, bool legacy, const char *name)
{
    u64 ports = 32;
    int r = 0;

    while (ports < VIRTIO_PCI_CONFIG_OFF(1) + t->v->config_len)
        ports *= 2;
    if (legacy)
        r = pci_bar(&t->fn, BAR_LEGACY, PCI_BAR_IO, ports, name);
    if (r == 0)
        r = pci_bar(&t->fn, BAR_REGISTERS, PCI_BAR_MEM32, PAGES << PAGE_SHIFT, name);
    return r < 0 ? r : pci_msix(&t->fn, BAR_MSIX, t->v->queues + 1, name);
}

static void add_capability(struct virtio_pci *t, u8 type, unsigned page, u32 length)
{
    struct virtio_pci_cap cap = {
        .cap_len = sizeof(cap), .cfg_type = type, .bar = BAR_REGISTERS, .offset = (u32)(page << PAGE_SHIFT), .length = length
    };

    pci_capability(&t->fn, PCI_CAP_ID_VNDR, &cap.cap_len, NULL, sizeof(cap));
}

static void add_capabilities(struct virtio_pci *t)
{
    struct virtio_pci_notify_cap notify = {
        .cap = { .cap_len = sizeof(notify), .cfg_type = VIRTIO_PCI_CAP_NOTIFY_CFG, .bar = BAR_REGISTERS, .offset = PAGE_NOTIFY << PAGE_SHIFT,
                 .length = NOTIFY_MULTIPLIER * t->v->queues },
        .notify_off_multiplier = NOTIFY_MULTIPLIER,
    };
    struct virtio_pci_cfg_cap window = { .cap = { .cap_len = sizeof(window), .cfg_type = VIRTIO_PCI_CAP_PCI_CFG } };
    struct virtio_pci_cfg_cap writable = { .cap = { .bar = 0xff, .offset = ~0u, .length = ~0u }, .pci_cfg_data = { 0xff, 0xff, 0xff, 0xff } };

    add_capability(t, VIRTIO_PCI_CAP_COMMON_CFG, PAGE_COMMON, sizeof(union common));
    add_capability(t, VIRTIO_PCI_CAP_ISR_CFG, PAGE_ISR, 1);
    if (t->v->config_len)
        add_capability(t, VIRTIO_PCI_CAP_DEVICE_CFG, PAGE_DEVICE, t->v->config_len);
    pci_capability(&t->fn, PCI_CAP_ID_VNDR, &notify.cap.cap_len, NULL, sizeof(notify));
    t->window = pci_capability(&t->fn, PCI_CAP_ID_VNDR, &window.cap.cap_len, &writable.cap.cap_len, sizeof(window));
}

int virtio_pci_attach(struct pci_bus *pci, unsigned device, struct irq_line intx, u8 gsi, bool transitional, struct virtio *v)
{
    u16 old_id = transitional ? transitional_id(v->type) : 0;
    struct pci_id id = { .vendor = 0x1af4, .device = (u16)(0x1040 + v->type), .subsystem_vendor = 0x1af4, .subsystem = 0x1100,
                         .class_code = class_code(v->type), .revision = 1 };
    struct virtio_pci *t = calloc(1, sizeof(*t));
    const char *name = v->device.ops->name;
    int r;

    if (!t)
        return err(-ENOMEM, "%s: out of memory", name);
    if (old_id) {                                                  /* 4.1.2.3: the driver goes by the subsystem */
        id.device = old_id;
        id.subsystem = v->type;
        id.revision = 0;
    }
    t->v = v;
    r = pci_add(pci, &t->fn, device, &id, &fn_ops, &v->device.lock);
    if (r < 0) {
        free(t);
        return r;
    }
    pci_wire_intx(&t->fn, intx, gsi);
    r = add_bars(t, old_id, name);
    if (r < 0) {
        vp_free(t);
        return r;
    }
    add_capabilities(t);
    vp_reset_done(t);
    v->transport = t;
    v->transport_ops = &transport_ops;
    return 0;
}
