/*
 * High precision event timers (see hpet.h; IA-PC HPET Specification 1.0a, chapter 2). The counter is computed from the
 * clock; host timers run only for comparators whose interrupt is enabled. A period shorter than EVENT_MIN_NS is carried
 * out, but its interrupts come together: nobody could take them one by one.
 *
 * Left out: interrupts as messages (FSB, optional). Locking: device.lock; the wires have a lock of their own behind it,
 * which is all that the i8254's and the RTC's lines take.
 */
#include "dev/hpet.h"

#include <errno.h>

#include "base/err.h"

#define TIMERS       3u
#define TICK_NS      10u                                           /* 100 MHz */
#define PERIOD_FS    (TICK_NS * 1000000u)
#define EVENT_MIN_NS 20000u
#define FAR_TICKS    (3600ull * 1000000000 / TICK_NS)              /* looks again after an hour */

/* 2.3.1: offsets */
enum { REG_ID = 0x00, REG_CONFIG = 0x10, REG_STATUS = 0x20, REG_COUNTER = 0xf0, REG_TIMER = 0x100 };
enum { TN_CONFIG = 0x00, TN_COMPARE = 0x08, TN_SIZE = 0x20 };
enum { CONFIG_ENABLE = 1, CONFIG_LEGACY = 2 };
/* 2.3.8 */
enum { TN_LEVEL = 1 << 1, TN_ENABLE = 1 << 2, TN_PERIODIC = 1 << 3, TN_PERIODIC_CAP = 1 << 4, TN_SIZE_CAP = 1 << 5, TN_SET = 1 << 6,
       TN_32BIT = 1 << 8, TN_ROUTE = 0x1f << 9 };
#define TN_WRITABLE  (TN_LEVEL | TN_ENABLE | TN_PERIODIC | TN_SET | TN_32BIT | TN_ROUTE)
#define TN_CAPS      (0xfull << (32 + HPET_FIRST_PIN) | TN_PERIODIC_CAP | TN_SIZE_CAP)

enum { WIRE_IRQ0, WIRE_IRQ8, WIRES };

struct comparator {
    struct hpet *hpet;
    struct timer timer;
    u64 config, compare, period;
};

struct hpet {
    struct device device;
    struct hpet_config c;
    u64 config, status;
    /* the counter at start_ns; it stands while not enabled */
    u64 counter, start_ns;
    u64 seen;                                                      /* the counter at the last look */
    struct comparator comparator[TIMERS];

    pthread_mutex_t wire_lock;
    bool legacy;
    int theirs[WIRES], ours[WIRES];
};

/* ---- wires ---- */

static void drive(struct hpet *h, unsigned wire)
{
    irq_set(wire == WIRE_IRQ0 ? &h->c.irq0 : &h->c.irq8, h->legacy ? h->ours[wire] : h->theirs[wire]);
}

static void their_line(void *chip, int n, int level)
{
    struct hpet *h = chip;

    pthread_mutex_lock(&h->wire_lock);
    h->theirs[n] = level;
    drive(h, (unsigned)n);
    pthread_mutex_unlock(&h->wire_lock);
}

static void our_line(struct hpet *h, unsigned wire, int level)
{
    pthread_mutex_lock(&h->wire_lock);
    h->ours[wire] = level;
    drive(h, wire);
    pthread_mutex_unlock(&h->wire_lock);
}

static void set_legacy(struct hpet *h, bool legacy)
{
    pthread_mutex_lock(&h->wire_lock);
    h->legacy = legacy;
    for (unsigned w = 0; w < WIRES; w++)
        drive(h, w);
    pthread_mutex_unlock(&h->wire_lock);
}

/* 2.3.8: with legacy replacement timers 0 and 1 go to IRQ 0 and 8, whatever their routes say. */
static void line(struct hpet *h, unsigned n, int level)
{
    unsigned pin = (unsigned)(h->comparator[n].config & TN_ROUTE) >> 9;

    if ((h->config & CONFIG_LEGACY) && n < WIRES)
        our_line(h, n, level);
    else if (pin >= HPET_FIRST_PIN && pin < HPET_FIRST_PIN + ARRAY_SIZE(h->c.pin))
        irq_set(&h->c.pin[pin - HPET_FIRST_PIN], level);
}

/* ---- time ---- */

static u64 counter(const struct hpet *h)
{
    return h->config & CONFIG_ENABLE ? h->counter + (clock_ns(h->c.clock) - h->start_ns) / TICK_NS : h->counter;
}

static u64 mask(const struct comparator *t)
{
    return t->config & TN_32BIT ? UINT32_MAX : UINT64_MAX;
}

static void fire(struct hpet *h, unsigned n)
{
    const struct comparator *t = &h->comparator[n];

    if (!(t->config & TN_ENABLE))
        return;
    if (t->config & TN_LEVEL) {
        h->status |= 1u << n;
        line(h, n, 1);
    } else {
        line(h, n, 1);
        line(h, n, 0);
    }
}

/* What has happened since the last look: the comparator lies in (seen, now]. */
static void catch_up(struct hpet *h)
{
    u64 now = counter(h);

    for (unsigned n = 0; n < TIMERS; n++) {
        struct comparator *t = &h->comparator[n];
        u64 m = mask(t), passed = now - h->seen, late = (now - t->compare) & m;

        if (!passed || (passed <= m && late >= passed))
            continue;
        if ((t->config & TN_PERIODIC) && t->period & m)
            t->compare = (t->compare + (late / (t->period & m) + 1) * (t->period & m)) & m;
        fire(h, n);
    }
    h->seen = now;
}

static void arm(struct hpet *h)
{
    for (unsigned n = 0; n < TIMERS; n++) {
        struct comparator *t = &h->comparator[n];
        u64 ticks = MIN((t->compare - h->seen - 1) & mask(t), FAR_TICKS) + 1;

        if ((h->config & CONFIG_ENABLE) && (t->config & TN_ENABLE))
            timer_arm(&t->timer, clock_ns(h->c.clock) + MAX(ticks * TICK_NS, EVENT_MIN_NS));
        else
            timer_disarm(&t->timer);
    }
}

static void timer_fired(void *arg)
{
    struct hpet *h = ((struct comparator *)arg)->hpet;

    pthread_mutex_lock(&h->device.lock);
    catch_up(h);
    arm(h);
    pthread_mutex_unlock(&h->device.lock);
}

/* ---- registers ---- */

static u64 register_read(const struct hpet *h, u64 reg)
{
    const struct comparator *t = &h->comparator[(reg - REG_TIMER) / TN_SIZE % TIMERS];

    switch (reg) {
    case REG_ID: return (u64)PERIOD_FS << 32 | HPET_ID(h->c.legacy);
    case REG_CONFIG: return h->config;
    case REG_STATUS: return h->status;
    case REG_COUNTER: return counter(h);
    }
    if (reg < REG_TIMER || reg >= REG_TIMER + TIMERS * TN_SIZE)
        return 0;
    switch (reg % TN_SIZE) {
    case TN_CONFIG: return t->config | TN_CAPS;
    case TN_COMPARE: return t->compare;
    default: return 0;
    }
}

static u64 config_bits(const struct hpet *h)
{
    return CONFIG_ENABLE | (h->c.legacy ? CONFIG_LEGACY : 0);
}

static void config_write(struct hpet *h, u64 val)
{
    u64 now = counter(h), old = h->config;

    h->config = val & config_bits(h);
    h->counter = now;
    h->start_ns = clock_ns(h->c.clock);
    if ((old ^ h->config) & CONFIG_LEGACY)
        set_legacy(h, h->config & CONFIG_LEGACY);
}

/* 2.3.5: writing 1 clears, and lets go of the line. */
static void status_write(struct hpet *h, u64 val)
{
    for (unsigned n = 0; n < TIMERS; n++)
        if (h->status & val & 1u << n)
            line(h, n, 0);
    h->status &= ~val;
}

static void timer_write(struct hpet *h, unsigned n, u64 reg, u64 val)
{
    struct comparator *t = &h->comparator[n];

    if (reg == TN_CONFIG) {
        if (h->status & 1u << n)
            line(h, n, 0);                                         /* by the old route */
        t->config = val & TN_WRITABLE;
        if (!(t->config & TN_LEVEL))
            h->status &= ~(u64)(1u << n);
        else if (h->status & 1u << n)
            line(h, n, (t->config & TN_ENABLE) != 0);
        t->compare &= mask(t);
    } else if (reg == TN_COMPARE) {
        /* 2.3.9.2: a periodic timer's comparator is set only with TN_SET; every write sets the period. */
        if (!(t->config & TN_PERIODIC) || (t->config & TN_SET))
            t->compare = val & mask(t);
        t->period = val & mask(t);
        t->config &= ~(u64)TN_SET;
    }
}

static u64 mmio_read(void *dev, u64 off, unsigned size)
{
    u64 val = register_read(dev, off & ~7ull);

    return size == 4 && (off & 4) ? val >> 32 : size == 4 ? (u32)val : val;
}

static void mmio_write(void *dev, u64 off, u64 val, unsigned size)
{
    struct hpet *h = dev;
    u64 reg = off & ~7ull, old = register_read(h, reg);

    catch_up(h);
    if (size == 4)
        val = off & 4 ? (reg == REG_STATUS ? 0 : (u32)old) | val << 32 : (old & ~0xffffffffull) | (u32)val;
    if (reg == REG_CONFIG) {
        config_write(h, val);
    } else if (reg == REG_STATUS) {
        status_write(h, val);
    } else if (reg == REG_COUNTER) {
        if (!(h->config & CONFIG_ENABLE))                          /* 2.3.7: only while it is halted */
            h->counter = h->seen = val;
    } else if (reg >= REG_TIMER && reg < REG_TIMER + TIMERS * TN_SIZE) {
        timer_write(h, (unsigned)(reg - REG_TIMER) / TN_SIZE, reg % TN_SIZE, val);
    }
    arm(h);
}

/* ---- device ---- */

static void hpet_reset(struct device *d)
{
    struct hpet *h = (struct hpet *)d;

    pthread_mutex_lock(&d->lock);
    status_write(h, h->status);
    config_write(h, 0);
    h->counter = h->seen = 0;
    for (unsigned n = 0; n < TIMERS; n++) {
        struct comparator *t = &h->comparator[n];

        t->config = t->period = 0;
        t->compare = UINT64_MAX;
    }
    arm(h);
    pthread_mutex_unlock(&d->lock);
}

static void hpet_state(struct device *d, struct stream *s)
{
    struct hpet *h = (struct hpet *)d;

    if (!stream_section(s, "hpet", 1))
        return;
    stream_u64(s, &h->config);
    stream_u64(s, &h->status);
    stream_u64(s, &h->counter);
    stream_u64(s, &h->start_ns);
    stream_u64(s, &h->seen);
    for (unsigned n = 0; n < TIMERS; n++) {
        stream_u64(s, &h->comparator[n].config);
        stream_u64(s, &h->comparator[n].compare);
        stream_u64(s, &h->comparator[n].period);
    }
    if (!s->load || s->error)
        return;
    h->config &= config_bits(h);
    h->status &= BIT(TIMERS) - 1;
    for (unsigned n = 0; n < TIMERS; n++)
        h->comparator[n].config &= TN_WRITABLE;
    set_legacy(h, h->config & CONFIG_LEGACY);
    arm(h);
}

static void hpet_free(struct device *d)
{
    struct hpet *h = (struct hpet *)d;

    for (unsigned n = 0; n < TIMERS; n++)
        timer_disarm(&h->comparator[n].timer);
    pthread_mutex_destroy(&h->wire_lock);
    pthread_mutex_destroy(&d->lock);
    free(h);
}

static const struct device_ops hpet_ops = {
    .name = "hpet",
    .reset = hpet_reset,
    .state = hpet_state,
    .free = hpet_free,
};

struct irq_line hpet_i8254_line(struct hpet *h)
{
    return (struct irq_line){ their_line, h, WIRE_IRQ0 };
}

struct irq_line hpet_rtc_line(struct hpet *h)
{
    return (struct irq_line){ their_line, h, WIRE_IRQ8 };
}

int hpet_new(struct bus *mmio, const struct hpet_config *config, struct hpet **out)
{
    struct hpet *h = calloc(1, sizeof(*h));
    int r;

    if (!h)
        return err(-ENOMEM, "hpet: out of memory");
    device_init(&h->device, &hpet_ops);
    pthread_mutex_init(&h->wire_lock, NULL);
    h->c = *config;
    for (unsigned n = 0; n < TIMERS; n++) {
        h->comparator[n].hpet = h;
        h->comparator[n].compare = UINT64_MAX;
        timer_init(&h->comparator[n].timer, config->clock, timer_fired, &h->comparator[n]);
    }

    struct region region = {
        .base = HPET_BASE, .size = HPET_SIZE, .min = 4, .max = 8, .read = mmio_read, .write = mmio_write, .dev = h,
        .lock = &h->device.lock, .name = "hpet",
    };
    r = bus_add(mmio, &region);
    if (r < 0) {
        hpet_free(&h->device);
        return r;
    }
    *out = h;
    return 0;
}
