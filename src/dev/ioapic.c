/*
 * Intel 82093AA I/O APIC (data sheet 290566), 24 pins, with the later version number 0x20 and its EOI register (ICH
 * data sheets, offset 0x40), which guests need when they have local APICs suppress EOI broadcasts.
 *
 * Wires carry "asserted" or not, as the boards' tables (MADT, _PRT) describe them: the polarity bit is kept and changes
 * nothing. Edges on a masked pin are lost; an asserted level counts as soon as it is unmasked. Switching an entry to
 * edge clears its remote IRR, which is how guests of older versions do an EOI. The delivery status always reads idle.
 * The arbitration ID follows the ID.
 *
 * Locking: device.lock; the local APICs' locks are taken under it.
 */
#include "dev/ioapic.h"

#include <errno.h>

#include "base/err.h"

#define VERSION (0x20 | (IOAPIC_PINS - 1) << 16)

#define RTE_LOGICAL BIT(11)
#define RTE_REMOTE_IRR BIT(14)
#define RTE_LEVEL BIT(15)
#define RTE_MASKED BIT(16)
#define RTE_WRITABLE 0xff0000000001afffull                         /* all but delivery status and remote IRR */

struct ioapic {
    struct device device;
    struct lapic_bus *lapics;
    u8 initial_id;

    u8 select;
    u32 id;                                                        /* bits 27..24 */
    u64 rte[IOAPIC_PINS];
    u32 lines;                                                     /* levels of the pins */
    /* ops: the real chip; then `lines` is all that is live here */
    struct irqchip elsewhere;
};
_Static_assert(IOAPIC_PINS == IRQCHIP_IOAPIC_PINS, "struct ioapic_regs");

static unsigned rte_mode(u64 rte)
{
    return (rte >> 8) & 7;
}

/* Only fixed and lowest priority can be level-triggered; the other modes are edges whatever the bit says. */
static bool rte_level(u64 rte)
{
    return (rte & RTE_LEVEL) && rte_mode(rte) <= APIC_LOWEST;
}

static void send(struct ioapic *io, int pin)
{
    u64 rte = io->rte[pin];
    struct apic_msg m = {
        .dest = (u32)(rte >> 56), .vector = (u8)rte, .mode = rte_mode(rte), .logical = rte & RTE_LOGICAL,
        .level = rte_level(rte),
    };

    lapic_bus_send(io->lapics, &m);
}

/* A level that is up, unmasked, and not waiting for an EOI already. */
static void send_level(struct ioapic *io, int pin)
{
    u64 *rte = &io->rte[pin];

    if (!rte_level(*rte) || (*rte & (RTE_MASKED | RTE_REMOTE_IRR)) || !(io->lines >> pin & 1))
        return;
    *rte |= RTE_REMOTE_IRR;
    send(io, pin);
}

static void line_set(void *chip, int n, int level)
{
    struct ioapic *io = chip;
    u32 bit = 1u << n;
    bool was;

    pthread_mutex_lock(&io->device.lock);
    was = io->lines & bit;
    io->lines = level ? io->lines | bit : io->lines & ~bit;
    if (io->elsewhere.ops) {
        if (was != (level != 0))
            io->elsewhere.ops->ioapic_line(io->elsewhere.arg, n, level);
    } else if (level && rte_level(io->rte[n])) {
        send_level(io, n);
    } else if (level && !was && !(io->rte[n] & RTE_MASKED)) {
        send(io, n);
    }
    pthread_mutex_unlock(&io->device.lock);
}

struct irq_line ioapic_irq(struct ioapic *io, int n)
{
    bug_on(n < 0 || n >= IOAPIC_PINS);
    return (struct irq_line){ line_set, io, n };
}

/* Under the lock: from the EOI register, and from a local APIC's broadcast. */
static void eoi(struct ioapic *io, u8 vector)
{
    for (int pin = 0; pin < IOAPIC_PINS; pin++) {
        if ((u8)io->rte[pin] != vector || !rte_level(io->rte[pin]))
            continue;
        io->rte[pin] &= ~RTE_REMOTE_IRR;
        send_level(io, pin);
    }
}

static void eoi_message(void *chip, u8 vector)
{
    struct ioapic *io = chip;

    pthread_mutex_lock(&io->device.lock);
    eoi(io, vector);
    pthread_mutex_unlock(&io->device.lock);
}

/* ---- registers ---- */

static void rte_write(struct ioapic *io, int pin, bool high, u32 val)
{
    u64 *rte = &io->rte[pin];
    u64 half = high ? 0xffffffff00000000 : 0xffffffff, written = high ? (u64)val << 32 : val;

    *rte = (*rte & ~(half & RTE_WRITABLE)) | (written & half & RTE_WRITABLE);
    if (!rte_level(*rte))
        *rte &= ~RTE_REMOTE_IRR;
    send_level(io, pin);
}

static u32 window_read(const struct ioapic *io)
{
    unsigned pin = (io->select - 0x10u) / 2;

    switch (io->select) {
    case 0:
    case 2: return io->id;
    case 1: return VERSION;
    }
    if (io->select < 0x10 || pin >= IOAPIC_PINS)
        return 0;
    return io->select & 1 ? (u32)(io->rte[pin] >> 32) : (u32)io->rte[pin];
}

static void window_write(struct ioapic *io, u32 val)
{
    unsigned pin = (io->select - 0x10u) / 2;

    if (io->select == 0)
        io->id = val & 0x0f000000;
    else if (io->select >= 0x10 && pin < IOAPIC_PINS)
        rte_write(io, (int)pin, io->select & 1, val);
}

static u64 mmio_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct ioapic *io = dev;

    switch (off) {
    case 0x00: return io->select;
    case 0x10: return window_read(io);
    }
    return 0;
}

static void mmio_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct ioapic *io = dev;

    switch (off) {
    case 0x00: io->select = (u8)val; break;
    case 0x10: window_write(io, (u32)val); break;
    case 0x40: eoi(io, (u8)val); break;
    }
}

/* ---- the real chip elsewhere ---- */

static int give(struct ioapic *io)
{
    struct ioapic_regs r = { .select = io->select, .id = io->id, .lines = io->lines };

    for (int i = 0; i < IOAPIC_PINS; i++)
        r.rte[i] = io->rte[i];
    return io->elsewhere.ops->ioapic_set(io->elsewhere.arg, &r);
}

static int take(struct ioapic *io)
{
    struct ioapic_regs r;
    int e = io->elsewhere.ops->ioapic_get(io->elsewhere.arg, &r);

    if (e < 0)
        return e;
    io->select = (u8)r.select;
    io->id = r.id & 0x0f000000;
    for (int i = 0; i < IOAPIC_PINS; i++)
        io->rte[i] = r.rte[i] & (RTE_WRITABLE | (rte_level(r.rte[i]) ? RTE_REMOTE_IRR : 0));
    return 0;
}

void ioapic_attach(struct ioapic *io, struct irqchip elsewhere)
{
    pthread_mutex_lock(&io->device.lock);
    io->elsewhere = elsewhere;
    pthread_mutex_unlock(&io->device.lock);
}

/* ---- device ---- */

static void ioapic_reset(struct device *d)
{
    struct ioapic *io = (struct ioapic *)d;

    pthread_mutex_lock(&d->lock);
    io->select = 0;
    io->id = (u32)io->initial_id << 24;
    for (int i = 0; i < IOAPIC_PINS; i++)
        io->rte[i] = RTE_MASKED;
    if (io->elsewhere.ops)
        give(io);
    pthread_mutex_unlock(&d->lock);
}

static void ioapic_state(struct device *d, struct stream *s)
{
    struct ioapic *io = (struct ioapic *)d;

    if (io->elsewhere.ops && !s->load && !s->error)
        s->error = take(io);
    stream_section(s, "ioapic", 1);
    stream_u8(s, &io->select);
    stream_u32(s, &io->id);
    for (int i = 0; i < IOAPIC_PINS; i++)
        stream_u64(s, &io->rte[i]);
    stream_u32(s, &io->lines);
    if (!s->load)
        return;
    io->id &= 0x0f000000;
    io->lines &= (1u << IOAPIC_PINS) - 1;
    for (int i = 0; i < IOAPIC_PINS; i++)
        io->rte[i] &= RTE_WRITABLE | (rte_level(io->rte[i]) ? RTE_REMOTE_IRR : 0);
    if (io->elsewhere.ops && !s->error)
        s->error = give(io);
}

static void ioapic_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops ioapic_ops = {
    .name = "ioapic",
    .reset = ioapic_reset,
    .state = ioapic_state,
    .free = ioapic_free,
};

int ioapic_new(struct bus *mmio, u64 base, u8 id, struct lapic_bus *lapics, struct ioapic **out)
{
    struct ioapic *io = calloc(1, sizeof(*io));
    int r;

    if (!io)
        return err(-ENOMEM, "ioapic: out of memory");
    device_init(&io->device, &ioapic_ops);
    io->lapics = lapics;
    io->initial_id = id & 15;
    ioapic_reset(&io->device);

    struct region region = {
        .base = base, .size = PAGE_SIZE, .min = 4, .max = 4, .read = mmio_read, .write = mmio_write, .dev = io,
        .lock = &io->device.lock, .name = "ioapic",
    };
    r = bus_add(mmio, &region);
    if (r < 0) {
        ioapic_free(&io->device);
        return r;
    }
    lapic_bus_set_eoi_sink(lapics, (struct apic_eoi_sink){ eoi_message, io });
    *out = io;
    return 0;
}
