/*
 * PCI configuration space, BARs and interrupts of functions (PCI Local Bus Specification 3.0, chapter 6; MSI and MSI-X 6.8).
 *
 * Left out: bridges and other buses, functions 1..7, expansion ROMs, power management, the error bits of the status register (nothing here can
 * fail as a bus can). A function that is no bus master does not get its messages out; they stay pending until it is one.
 *
 * Locking: see pci.h. pci.c has no lock of its own; lock order is the owner's device lock, then what msi_sink and irq_line lead to.
 */
#include "io/pci.h"

#include <errno.h>
#include <linux/pci_regs.h>
#include <string.h>

#include "base/err.h"

#define MSIX_PBA_OFFSET (PCI_MSIX_BAR_SIZE / 2)
#define MSIX_ENTRY_SIZE 16
#define MSI_CAP_SIZE 24                                            /* 64-bit addresses and per-vector masks, 6.8.1 */

struct pci_bus {
    struct pci_config cfg;
    u64 io_used, mem_used, mem64_used;                             /* bytes of the windows given out, from their bases on */
    struct pci_fn *fn[PCI_DEVICES];
};

static u16 get16(const u8 *p)
{
    return (u16)(p[0] | p[1] << 8);
}

static u32 get32(const u8 *p)
{
    return get16(p) | (u32)get16(p + 2) << 16;
}

static void put16(u8 *p, u16 v)
{
    p[0] = (u8)v;
    p[1] = (u8)(v >> 8);
}

static void put32(u8 *p, u32 v)
{
    put16(p, (u16)v);
    put16(p + 2, (u16)(v >> 16));
}

int pci_bus_new(const struct pci_config *cfg, struct pci_bus **out)
{
    struct pci_bus *b = calloc(1, sizeof(*b));

    if (!b)
        return err(-ENOMEM, "PCI bus: out of memory");
    b->cfg = *cfg;
    *out = b;
    return 0;
}

void pci_bus_free(struct pci_bus *b)
{
    free(b);
}

/* --- interrupts --- */

static u16 command(const struct pci_fn *f)
{
    return get16(f->cfg + PCI_COMMAND);
}

bool pci_bus_master(const struct pci_fn *f)
{
    return command(f) & PCI_COMMAND_MASTER;
}

bool pci_msix_enabled(const struct pci_fn *f)
{
    return f->msix_cap && (get16(f->cfg + f->msix_cap + PCI_MSIX_FLAGS) & PCI_MSIX_FLAGS_ENABLE);
}

bool pci_msi_enabled(const struct pci_fn *f)
{
    return f->msi_cap && (get16(f->cfg + f->msi_cap + PCI_MSI_FLAGS) & PCI_MSI_FLAGS_ENABLE);
}

static void send(struct pci_fn *f, u64 addr, u32 data)
{
    const struct msi_sink *sink = &f->bus->cfg.msi;

    if (sink->send)
        sink->send(sink->arg, addr, data);
}

static void update_intx(struct pci_fn *f)
{
    bool silent = (command(f) & PCI_COMMAND_INTX_DISABLE) || pci_msix_enabled(f) || pci_msi_enabled(f);

    if (f->intx_level)
        f->cfg[PCI_STATUS] |= PCI_STATUS_INTERRUPT;
    else
        f->cfg[PCI_STATUS] &= (u8)~PCI_STATUS_INTERRUPT;
    irq_set(&f->intx, f->intx_level && !silent);
}

void pci_intx(struct pci_fn *f, bool level)
{
    if (f->intx_level == level)
        return;
    f->intx_level = level;
    update_intx(f);
}

static bool msix_open(const struct pci_fn *f, unsigned vector)
{
    u16 flags = get16(f->cfg + f->msix_cap + PCI_MSIX_FLAGS);

    return (flags & PCI_MSIX_FLAGS_ENABLE) && !(flags & PCI_MSIX_FLAGS_MASKALL) &&
           !(f->msix[vector].control & PCI_MSIX_ENTRY_CTRL_MASKBIT) && pci_bus_master(f);
}

void pci_msix_signal(struct pci_fn *f, unsigned vector)
{
    if (!pci_msix_enabled(f) || vector >= f->msix_vectors)
        return;
    if (msix_open(f, vector))
        send(f, f->msix[vector].addr, f->msix[vector].data);
    else
        f->msix_pending[vector / 64] |= BIT(vector % 64);
}

static void msix_flush(struct pci_fn *f)
{
    for (unsigned v = 0; f->msix_cap && v < f->msix_vectors; v++) {
        if (!(f->msix_pending[v / 64] & BIT(v % 64)) || !msix_open(f, v))
            continue;
        f->msix_pending[v / 64] &= ~BIT(v % 64);
        send(f, f->msix[v].addr, f->msix[v].data);
    }
}

static u64 msix_read(const struct pci_fn *f, u64 off, unsigned size)
{
    u64 dword_at = off & ~3ull, val = 0;

    if (dword_at < f->msix_vectors * MSIX_ENTRY_SIZE) {
        const struct pci_msix_entry *e = &f->msix[dword_at / MSIX_ENTRY_SIZE];

        switch (dword_at % MSIX_ENTRY_SIZE) {
        case PCI_MSIX_ENTRY_LOWER_ADDR: val = (u32)e->addr; break;
        case PCI_MSIX_ENTRY_UPPER_ADDR: val = e->addr >> 32; break;
        case PCI_MSIX_ENTRY_DATA: val = e->data; break;
        case PCI_MSIX_ENTRY_VECTOR_CTRL: val = e->control; break;
        }
    } else if (dword_at >= MSIX_PBA_OFFSET && dword_at < MSIX_PBA_OFFSET + sizeof(f->msix_pending)) {
        val = f->msix_pending[(dword_at - MSIX_PBA_OFFSET) / 8] >> (dword_at & 4 ? 32 : 0);
    }
    val = (u32)val >> (off & 3) * 8;
    return size < 4 ? val & (BIT(size * 8) - 1) : val;
}

/* Only whole dwords are written (6.8.2); the pending bits are read-only. */
static void msix_write(struct pci_fn *f, u64 off, u64 val, unsigned size)
{
    struct pci_msix_entry *e;

    if (size != 4 || off % 4 || off >= f->msix_vectors * MSIX_ENTRY_SIZE)
        return;
    e = &f->msix[off / MSIX_ENTRY_SIZE];
    switch (off % MSIX_ENTRY_SIZE) {
    case PCI_MSIX_ENTRY_LOWER_ADDR: e->addr = (e->addr & ~0xffffffffull) | ((u32)val & ~3u); break;
    case PCI_MSIX_ENTRY_UPPER_ADDR: e->addr = (u32)e->addr | val << 32; break;
    case PCI_MSIX_ENTRY_DATA: e->data = (u32)val; break;
    case PCI_MSIX_ENTRY_VECTOR_CTRL:
        e->control = (u32)val & PCI_MSIX_ENTRY_CTRL_MASKBIT;
        msix_flush(f);
        break;
    }
}

static u32 msi_mask(const struct pci_fn *f)
{
    return get32(f->cfg + f->msi_cap + PCI_MSI_MASK_64);
}

static void msi_send(struct pci_fn *f, unsigned vector)
{
    const u8 *cap = f->cfg + f->msi_cap;
    unsigned enabled = 1u << ((get16(cap + PCI_MSI_FLAGS) & PCI_MSI_FLAGS_QSIZE) >> 4);
    u64 addr = get32(cap + PCI_MSI_ADDRESS_LO) | (u64)get32(cap + PCI_MSI_ADDRESS_HI) << 32;
    u32 data = get16(cap + PCI_MSI_DATA_64);

    /* With fewer messages than vectors, vectors share them (6.8.1.6). */
    enabled = MIN(enabled, f->msi_vectors);
    send(f, addr, (data & ~(enabled - 1)) | (vector & (enabled - 1)));
}

static void msi_flush(struct pci_fn *f)
{
    if (!pci_msi_enabled(f) || !pci_bus_master(f))
        return;
    for (unsigned v = 0; v < f->msi_vectors; v++) {
        if (!(f->msi_pending & ~msi_mask(f) & BIT(v)))
            continue;
        f->msi_pending &= (u32)~BIT(v);
        msi_send(f, v);
    }
    put32(f->cfg + f->msi_cap + PCI_MSI_PENDING_64, f->msi_pending);
}

void pci_msi_signal(struct pci_fn *f, unsigned vector)
{
    if (!pci_msi_enabled(f) || vector >= f->msi_vectors)
        return;
    f->msi_pending |= (u32)BIT(vector);
    put32(f->cfg + f->msi_cap + PCI_MSI_PENDING_64, f->msi_pending);
    msi_flush(f);
}

/* --- BARs --- */

static struct bus *bar_bus(const struct pci_bar *bar)
{
    return bar->kind == PCI_BAR_IO ? bar->fn->bus->cfg.pio : bar->fn->bus->cfg.mmio;
}

static bool in_window(const struct pci_window *w, u64 addr, u64 size)
{
    return addr >= w->base && range_in(addr - w->base, size, w->size);
}

static bool bar_decodes(const struct pci_bar *bar, u64 addr)
{
    const struct pci_config *c = &bar->fn->bus->cfg;

    if (bar->kind == PCI_BAR_IO)
        return (command(bar->fn) & PCI_COMMAND_IO) && in_window(&c->io, addr, bar->size);
    return (command(bar->fn) & PCI_COMMAND_MEMORY) && (in_window(&c->mem, addr, bar->size) || in_window(&c->mem64, addr, bar->size));
}

static void map_bars(struct pci_fn *f)
{
    for (struct pci_bar *bar = f->bar; bar < f->bar + PCI_BARS; bar++) {
        const u8 *reg = f->cfg + PCI_BASE_ADDRESS_0 + bar->n * 4;
        u64 addr;
        bool decodes;

        if (bar->kind == PCI_BAR_NONE)
            continue;
        addr = get32(reg);
        if (bar->kind == PCI_BAR_MEM64)
            addr |= (u64)get32(reg + 4) << 32;
        addr &= ~(bar->size - 1);
        decodes = bar_decodes(bar, addr);
        if (decodes == bar->mapped && (!decodes || addr == bar->mapped_at))
            continue;
        bar->mapped = decodes;
        bar->mapped_at = addr;
        bus_move(bar_bus(bar), bar->region, addr, decodes ? bar->size : 0);
    }
}

static u64 bar_read(struct pci_bar *bar, u64 off, unsigned size)
{
    struct pci_fn *f = bar->fn;

    if (f->msix_cap && bar->n == f->msix_bar)
        return msix_read(f, off, size);
    return f->ops->bar_read(f, bar->n, off, size);
}

static void bar_write(struct pci_bar *bar, u64 off, u64 val, unsigned size)
{
    struct pci_fn *f = bar->fn;

    if (f->msix_cap && bar->n == f->msix_bar)
        msix_write(f, off, val, size);
    else
        f->ops->bar_write(f, bar->n, off, val, size);
}

static u64 region_read(void *dev, u64 off, unsigned size)
{
    return bar_read(dev, off, size);
}

static void region_write(void *dev, u64 off, u64 val, unsigned size)
{
    bar_write(dev, off, val, size);
}

static struct pci_bar *bar_at(struct pci_fn *f, unsigned bar, u64 off, unsigned size)
{
    if (bar >= PCI_BARS || f->bar[bar].kind == PCI_BAR_NONE || !range_in(off, size, f->bar[bar].size))
        return NULL;
    return &f->bar[bar];
}

u64 pci_bar_read(struct pci_fn *f, unsigned bar, u64 off, unsigned size)
{
    struct pci_bar *b = bar_at(f, bar, off, size);

    return b ? bar_read(b, off, size) : ~0ull;
}

void pci_bar_write(struct pci_fn *f, unsigned bar, u64 off, u64 val, unsigned size)
{
    struct pci_bar *b = bar_at(f, bar, off, size);

    if (b)
        bar_write(b, off, val, size);
}

/* --- configuration space --- */

static struct pci_fn *find(struct pci_bus *b, unsigned bdf)
{
    return bdf < PCI_DEVICES * 8 && !(bdf & 7) ? b->fn[bdf >> 3] : NULL;
}

u32 pci_config_read(struct pci_bus *b, unsigned bdf, unsigned off, unsigned size)
{
    struct pci_fn *f = find(b, bdf);
    u32 val = 0;

    if (!f || size > 4 || !range_in(off, size, PCI_CONFIG_SIZE))
        return size < 4 ? (u32)BIT(size * 8) - 1 : ~0u;
    pthread_mutex_lock(f->lock);
    if (f->ops && f->ops->config_read)
        f->ops->config_read(f, off, size);
    for (unsigned i = 0; i < size; i++)
        val |= (u32)f->cfg[off + i] << i * 8;
    pthread_mutex_unlock(f->lock);
    return val;
}

void pci_config_write(struct pci_bus *b, unsigned bdf, unsigned off, u32 val, unsigned size)
{
    struct pci_fn *f = find(b, bdf);

    if (!f || size > 4 || !range_in(off, size, PCI_CONFIG_SIZE))
        return;
    pthread_mutex_lock(f->lock);
    for (unsigned i = 0; i < size; i++) {
        u8 *byte = f->cfg + off + i, mask = f->wmask[off + i];

        *byte = (u8)((*byte & ~mask) | (val >> i * 8 & mask));
    }
    map_bars(f);
    update_intx(f);
    msix_flush(f);
    msi_flush(f);
    if (f->ops && f->ops->config_write)
        f->ops->config_write(f, off, size);
    pthread_mutex_unlock(f->lock);
}

void pci_fn_reset(struct pci_fn *f)
{
    memcpy(f->cfg, f->initial, sizeof(f->cfg));
    memset(f->msix, 0, sizeof(f->msix));
    memset(f->msix_pending, 0, sizeof(f->msix_pending));
    for (unsigned v = 0; v < f->msix_vectors; v++)
        f->msix[v].control = PCI_MSIX_ENTRY_CTRL_MASKBIT;          /* 6.8.2.9 */
    f->msi_pending = 0;
    f->intx_level = false;
    update_intx(f);
    map_bars(f);
}

void pci_fn_state(struct pci_fn *f, struct stream *s)
{
    u8 cfg[PCI_CONFIG_SIZE];

    if (!stream_section(s, "pci", 1))
        return;
    memcpy(cfg, f->cfg, sizeof(cfg));
    stream_bytes(s, cfg, sizeof(cfg));
    stream_bool(s, &f->intx_level);
    stream_u32(s, &f->msi_pending);
    for (unsigned v = 0; v < f->msix_vectors; v++) {
        stream_u64(s, &f->msix[v].addr);
        stream_u32(s, &f->msix[v].data);
        stream_u32(s, &f->msix[v].control);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(f->msix_pending); i++)
        stream_u64(s, &f->msix_pending[i]);
    if (!s->load || s->error)
        return;
    /* Loaded bytes are no more trusted than the guest's writes: the same mask applies. */
    for (unsigned i = 0; i < PCI_CONFIG_SIZE; i++)
        f->cfg[i] = (u8)((f->initial[i] & ~f->wmask[i]) | (cfg[i] & f->wmask[i]));
    for (unsigned v = 0; v < f->msix_vectors; v++)
        f->msix[v].control &= PCI_MSIX_ENTRY_CTRL_MASKBIT;
    if (f->msi_cap)
        put32(f->cfg + f->msi_cap + PCI_MSI_PENDING_64, f->msi_pending);
    map_bars(f);
    update_intx(f);
}

/* --- building --- */

/* Fixed bytes: what the function is, and what it is again after a reset. */
static void fix(struct pci_fn *f, unsigned off, u32 val, unsigned size)
{
    for (unsigned i = 0; i < size; i++)
        f->cfg[off + i] = f->initial[off + i] = (u8)(val >> i * 8);
}

int pci_add(struct pci_bus *b, struct pci_fn *f, unsigned device, const struct pci_id *id, const struct pci_fn_ops *ops, pthread_mutex_t *lock)
{
    if (device >= PCI_DEVICES)
        return err(-EINVAL, "PCI: there is no device %u on the bus; it has %u", device, PCI_DEVICES);
    if (b->fn[device])
        return err(-EEXIST, "PCI: device %u is there already", device);
    *f = (struct pci_fn){ .bus = b, .device = device, .ops = ops, .lock = lock, .cap_end = PCI_STD_HEADER_SIZEOF };
    for (unsigned n = 0; n < PCI_BARS; n++)
        f->bar[n] = (struct pci_bar){ .fn = f, .n = n };
    fix(f, PCI_VENDOR_ID, id->vendor, 2);
    fix(f, PCI_DEVICE_ID, id->device, 2);
    fix(f, PCI_CLASS_REVISION, id->class_code << 8 | id->revision, 4);
    fix(f, PCI_SUBSYSTEM_VENDOR_ID, id->subsystem_vendor, 2);
    fix(f, PCI_SUBSYSTEM_ID, id->subsystem, 2);
    put16(f->wmask + PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY | PCI_COMMAND_SERR |
                                      PCI_COMMAND_INTX_DISABLE);
    f->wmask[PCI_CACHE_LINE_SIZE] = 0xff;
    f->wmask[PCI_LATENCY_TIMER] = 0xff;
    f->wmask[PCI_INTERRUPT_LINE] = 0xff;
    b->fn[device] = f;
    return 0;
}

void pci_wire_intx(struct pci_fn *f, struct irq_line intx, u8 gsi)
{
    f->intx = intx;
    fix(f, PCI_INTERRUPT_PIN, 1, 1);
    fix(f, PCI_INTERRUPT_LINE, gsi, 1);
}

static bool allocate(const struct pci_window *w, u64 *used, u64 size, u64 *addr)
{
    u64 at = ALIGN_UP(w->base + *used, size);

    if (!in_window(w, at, size))
        return false;
    *used = at + size - w->base;
    *addr = at;
    return true;
}

int pci_bar(struct pci_fn *f, unsigned n, enum pci_bar_kind kind, u64 size, const char *name)
{
    struct pci_bar *bar = &f->bar[n];
    struct pci_bus *b = f->bus;
    bool io = kind == PCI_BAR_IO, mem64 = kind == PCI_BAR_MEM64, fits;
    struct region region = { .min = 1, .max = 4, .read = region_read, .write = region_write, .dev = bar, .lock = f->lock, .name = name };
    unsigned reg = PCI_BASE_ADDRESS_0 + n * 4, flags = io ? PCI_BASE_ADDRESS_SPACE_IO : mem64 ? PCI_BASE_ADDRESS_MEM_TYPE_64 : 0;
    u64 addr;

    bug_on(n >= PCI_BARS || bar->kind != PCI_BAR_NONE || (mem64 && n == PCI_BARS - 1) || !size || (size & (size - 1)) || size < (io ? 4 : 16));
    if (io)
        fits = allocate(&b->cfg.io, &b->io_used, size, &addr);
    else
        fits = allocate(&b->cfg.mem, &b->mem_used, size, &addr) || (mem64 && allocate(&b->cfg.mem64, &b->mem64_used, size, &addr));
    if (!fits)
        return err(-ENOSPC, "PCI: no room for %s (%llu bytes) in the window for BARs", name, (unsigned long long)size);
    bar->kind = kind;
    bar->size = size;
    bar->region = bus_add(bar_bus(bar), &region);
    if (bar->region < 0) {
        bar->kind = PCI_BAR_NONE;
        return bar->region;
    }
    fix(f, reg, (u32)addr | flags, 4);
    put32(f->wmask + reg, (u32)~(size - 1) & (io ? (u32)PCI_BASE_ADDRESS_IO_MASK : (u32)PCI_BASE_ADDRESS_MEM_MASK));
    if (mem64) {
        fix(f, reg + 4, (u32)(addr >> 32), 4);
        put32(f->wmask + reg + 4, (u32)(~(size - 1) >> 32));
    }
    fix(f, PCI_COMMAND, command(f) | (io ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY), 2);
    map_bars(f);
    return 0;
}

unsigned pci_capability(struct pci_fn *f, u8 id, const void *body, const void *wmask, unsigned len)
{
    unsigned off = f->cap_end;

    bug_on(len < 2 || ALIGN_UP(off + len, 4) >= PCI_CONFIG_SIZE);
    fix(f, PCI_STATUS, get16(f->cfg + PCI_STATUS) | PCI_STATUS_CAP_LIST, 2);
    fix(f, f->cap_last ? f->cap_last + PCI_CAP_LIST_NEXT : PCI_CAPABILITY_LIST, off, 1);
    fix(f, off + PCI_CAP_LIST_ID, id, 1);
    fix(f, off + PCI_CAP_LIST_NEXT, 0, 1);
    memcpy(f->cfg + off + 2, body, len - 2);
    memcpy(f->initial + off + 2, body, len - 2);
    if (wmask)
        memcpy(f->wmask + off + 2, wmask, len - 2);
    f->cap_last = (u8)off;
    f->cap_end = (u8)ALIGN_UP(off + len, 4);
    return off;
}

int pci_msix(struct pci_fn *f, unsigned bar, unsigned vectors, const char *name)
{
    u8 body[PCI_CAP_MSIX_SIZEOF - 2] = { 0 }, wmask[sizeof(body)] = { 0 };
    int r;

    bug_on(!vectors || vectors > PCI_MSIX_VECTORS_MAX || f->msix_cap);
    r = pci_bar(f, bar, PCI_BAR_MEM32, PCI_MSIX_BAR_SIZE, name);
    if (r < 0)
        return r;
    put16(body + PCI_MSIX_FLAGS - 2, (u16)(vectors - 1));
    put16(wmask + PCI_MSIX_FLAGS - 2, PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL);
    put32(body + PCI_MSIX_TABLE - 2, bar);
    put32(body + PCI_MSIX_PBA - 2, MSIX_PBA_OFFSET | bar);
    f->msix_cap = (u8)pci_capability(f, PCI_CAP_ID_MSIX, body, wmask, sizeof(body) + 2);
    f->msix_bar = bar;
    f->msix_vectors = vectors;
    for (unsigned v = 0; v < vectors; v++)
        f->msix[v].control = PCI_MSIX_ENTRY_CTRL_MASKBIT;
    return 0;
}

void pci_msi(struct pci_fn *f, unsigned vectors)
{
    u8 body[MSI_CAP_SIZE - 2] = { 0 }, wmask[sizeof(body)] = { 0 };

    bug_on(!vectors || vectors > PCI_MSI_VECTORS_MAX || (vectors & (vectors - 1)) || f->msi_cap);
    put16(body + PCI_MSI_FLAGS - 2, (u16)(PCI_MSI_FLAGS_64BIT | PCI_MSI_FLAGS_MASKBIT | __builtin_ctz(vectors) << 1));
    put16(wmask + PCI_MSI_FLAGS - 2, PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE);
    put32(wmask + PCI_MSI_ADDRESS_LO - 2, ~3u);
    put32(wmask + PCI_MSI_ADDRESS_HI - 2, ~0u);
    put16(wmask + PCI_MSI_DATA_64 - 2, 0xffff);
    put32(wmask + PCI_MSI_MASK_64 - 2, vectors == 32 ? ~0u : (u32)BIT(vectors) - 1);
    f->msi_cap = (u8)pci_capability(f, PCI_CAP_ID_MSI, body, wmask, sizeof(body) + 2);
    f->msi_vectors = vectors;
}

void pci_remove(struct pci_fn *f)
{
    if (!f->bus)
        return;
    for (struct pci_bar *bar = f->bar; bar < f->bar + PCI_BARS; bar++)
        if (bar->kind != PCI_BAR_NONE)
            bus_move(bar_bus(bar), bar->region, 0, 0);
    f->bus->fn[f->device] = NULL;
    f->bus = NULL;
}
