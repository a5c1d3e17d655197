/*
 * Intel 8254 programmable interval timer (data sheet 231164), and port 0x61 of the PC/AT around counter 2.
 *
 * Nothing ticks: a counter is the tick at which its count was loaded, and what it shows is computed from the time when
 * somebody looks. Time is counted in ticks of I8254_HZ. Only counter 0 has a wire (IRQ0), so only counter 0 has a
 * timer, for the rising edges of its OUT.
 *
 * OUT of counter 0 in modes 2, 3, 4 is shown to the interrupt controllers as a short low pulse before each rising edge,
 * not for its true length: an interrupt controller that is served late then loses no request. Reads (status, port 0x61)
 * give the true level. Edges that were missed because the host was late coalesce into one; edges come no closer than
 * EDGE_MIN_NS however small the count.
 *
 * Gates 0 and 1 are tied high; gate 2 is bit 0 of port 0x61. Left out: bits 6 and 7 of port 0x61 (parity and channel
 * checks: never).
 *
 * Locking: device.lock; the interrupt controllers' and the clock's are taken under it.
 */
#include "dev/i8254.h"

#include <errno.h>

#include "base/err.h"

#define EDGE_MIN_NS 50000u
/* 18 ticks: bit 4 of port 0x61 changes with every refresh */
#define REFRESH_NS 15085u
#define NS_PER_S 1000000000u

enum { RW_LATCH, RW_LSB, RW_MSB, RW_BOTH };

struct counter {
    u8 mode, rw;
    bool bcd, gate;
    bool have_count;                                               /* a count was written since the control word */
    bool triggered;                                                /* modes 1 and 5: the gate has risen since */
    bool null_count;                                               /* the count written last is not in force yet */
    bool write_high, read_high;                                    /* RW_BOTH: the high byte is next */
    u8 write_low;

    u32 written, n;                                                /* counts 1..65536: written, and in force */
    s64 start;                                                     /* tick at which CE was (or will be) loaded with n */
    /* gate low in modes 0 and 4: ticks that had passed */
    s64 held;
    /* modes 2 and 3: `written` takes over at tick switch_at */
    bool pending;
    s64 switch_at;

    u16 latch;
    u8 latch_bytes;                                                /* of the latch still to be read; 0: not latched */
    bool status_latched;
    u8 status;
};

struct i8254 {
    struct device device;
    struct clock *clock;
    struct irq_line irq0;
    struct timer timer;
    struct counter counter[3];
    /* counter 0: tick of the next thing to do; -1: none */
    s64 event;
    bool event_is_edge;
    u8 port61;                                                     /* bits 3..0 as written */
    struct irqchip elsewhere;                                      /* ops: the real chip; nothing counts here then */
};

/* ---- time ---- */

static s64 tick_now(const struct i8254 *p)
{
    return (s64)((u128)clock_ns(p->clock) * I8254_HZ / NS_PER_S);
}

static u64 tick_ns(s64 tick)                                       /* the first nanosecond that belongs to it */
{
    return (u64)(((u128)(u64)tick * NS_PER_S + I8254_HZ - 1) / I8254_HZ);
}

/* ---- one counter at tick t ---- */

static bool gate_stops(const struct counter *c)                    /* modes whose counting the gate's level enables */
{
    return !c->gate && c->mode != 1 && c->mode != 5;
}

static s64 elapsed(const struct counter *c, s64 t)
{
    return gate_stops(c) ? c->held : t - c->start;
}

static bool running(const struct counter *c)
{
    return c->have_count && ((c->mode != 1 && c->mode != 5) || c->triggered);
}

static u32 high_half(u32 n)                                        /* mode 3: ticks for which OUT is high */
{
    return (n + 1) / 2;
}

static bool out_level(const struct counter *c, s64 t)
{
    s64 e = elapsed(c, t);

    if (c->mode == 0)
        return running(c) && e >= c->n;
    if (!running(c) || e < 0)
        return true;
    switch (c->mode) {
    case 1: return e >= c->n;
    case 2: return gate_stops(c) || e % c->n != c->n - 1;
    case 3: return gate_stops(c) || e % c->n < high_half(c->n);
    default: return e != c->n; /* 4, 5: one tick low */
    }
}

static u16 to_bcd(u32 v)
{
    return (u16)(v / 1000 % 10 << 12 | v / 100 % 10 << 8 | v / 10 % 10 << 4 | v % 10);
}

static u32 from_bcd(u16 v)
{
    return (v >> 12) * 1000u + (v >> 8 & 15) * 100u + (v >> 4 & 15) * 10u + (v & 15);
}

/* What the counting element shows. Mode 3 counts each half down from n (n - 1 when odd) in steps of two. */
static u16 count_now(const struct counter *c, s64 t)
{
    u32 modulus = c->bcd ? 10000 : 65536, v = c->n;
    s64 e = elapsed(c, t);

    if (running(c) && e > 0) {
        if (c->mode == 2) {
            v = c->n - (u32)(e % c->n);
        } else if (c->mode == 3) {
            u32 k = (u32)(e % c->n);

            v = (c->n & ~1u) - 2 * (k < high_half(c->n) ? k : k - high_half(c->n));
        } else {
            v = (u32)((c->n + modulus - (u64)e % modulus) % modulus); /* goes on after 0 with the highest count */
        }
    }
    v %= modulus;
    return c->bcd ? to_bcd(v) : (u16)v;
}

/* Lets a count that was written in mode 2 or 3 take over when its time has come. */
static void settle(struct counter *c, s64 t)
{
    bool low_half;

    if (!c->pending || t < c->switch_at)
        return;
    /* mode 3 changes at a half's end, which may be the high half's */
    low_half = c->mode == 3 && (c->switch_at - c->start) % c->n;
    c->n = c->written;
    c->start = low_half ? c->switch_at - high_half(c->n) : c->switch_at;
    c->pending = false;
    c->null_count = false;
}

static void load(struct counter *c, s64 t)
{
    c->n = c->written;
    c->start = t + 1; /* on the next clock */
    c->held = 0;
    c->pending = false;
    c->null_count = false;
}

static void count_written(struct counter *c, u16 raw, s64 t)
{
    u32 n = c->bcd ? from_bcd(raw) : raw;
    bool first = !c->have_count;
    s64 k;

    c->written = n ? n : c->bcd ? 10000 : 65536;
    c->have_count = true;
    c->null_count = true;
    if (c->mode == 1 || c->mode == 5) {
        if (!c->triggered)
            c->n = c->written; /* in force from the trigger on; shown meanwhile */
    } else if (first || c->mode == 0 || c->mode == 4 || gate_stops(c)) {
        load(c, t);
    } else { /* modes 2 and 3 while counting: at the end of the period, or of the half */
        k = t < c->start ? 0 : (t - c->start) / c->n;
        c->switch_at = c->start + k * c->n;
        if (c->mode == 3 && t < c->switch_at + high_half(c->n))
            c->switch_at += high_half(c->n);
        else
            c->switch_at += c->n;
        c->pending = true;
    }
}

static void set_gate(struct counter *c, bool gate, s64 t)
{
    if (gate == c->gate)
        return;
    if (!gate)
        c->held = MAX(t - c->start, 0);
    c->gate = gate;
    if (!gate)
        return;
    switch (c->mode) {
    case 0:
    case 4:
        c->start = t - c->held;
        break;
    default: /* the rising edge triggers: (re)load */
        if (c->have_count) {
            load(c, t);
            c->triggered = true;
        }
        break;
    }
}

/* ---- counter 0's wire ---- */

/* The next rising edge of OUT after tick t, or -1. Gate 0 is always high. */
static s64 next_edge(const struct counter *c, s64 t)
{
    s64 e = t - c->start, at = -1;

    if (!running(c))
        return -1;
    switch (c->mode) {
    case 0: at = c->start + c->n; break;
    case 2:
    case 3: return c->start + (e < 0 ? 1 : e / c->n + 1) * c->n;
    case 4: at = c->start + c->n + 1; break;
    }
    return at > t ? at : -1;
}

static void arm(struct i8254 *p, s64 t, u64 not_before_ns)
{
    const struct counter *c = &p->counter[0];

    p->event = next_edge(c, t);
    p->event_is_edge = true;
    if (c->pending && (p->event < 0 || c->switch_at < p->event)) {
        p->event = c->switch_at; /* the next edge depends on what takes over then */
        p->event_is_edge = false;
    }
    if (p->event < 0 || p->elsewhere.ops)
        timer_disarm(&p->timer);
    else
        timer_arm(&p->timer, MAX(tick_ns(p->event), not_before_ns));
}

/* Does what is due on counter 0 at tick t. */
static void serve(struct i8254 *p, s64 t)
{
    u64 not_before_ns = 0;

    if (p->event < 0 || t < p->event)
        return;
    if (p->event_is_edge) {
        irq_set(&p->irq0, 0);
        irq_set(&p->irq0, 1);
        not_before_ns = clock_ns(p->clock) + EDGE_MIN_NS;
    }
    settle(&p->counter[0], t);
    arm(p, t, not_before_ns);
}

static void timer_fired(void *arg)
{
    struct i8254 *p = arg;
    s64 t;

    pthread_mutex_lock(&p->device.lock);
    t = tick_now(p);
    if (p->event >= 0 && t < p->event)
        arm(p, t, 0);
    else
        serve(p, t);
    pthread_mutex_unlock(&p->device.lock);
}

/* After a write to counter 0: OUT may have changed at once (a new mode, a new count in mode 0). */
static void rewire(struct i8254 *p, s64 t)
{
    irq_set(&p->irq0, out_level(&p->counter[0], t));
    arm(p, t, 0);
}

/* ---- registers ---- */

static void latch_count(struct counter *c, s64 t)
{
    if (c->latch_bytes)
        return;
    c->latch = count_now(c, t);
    c->latch_bytes = c->rw == RW_BOTH ? 2 : 1;
}

static void latch_status(struct counter *c, s64 t)
{
    if (c->status_latched)
        return;
    c->status = (u8)(out_level(c, t) << 7 | c->null_count << 6 | c->rw << 4 | c->mode << 1 | c->bcd);
    c->status_latched = true;
}

static void control_write(struct i8254 *p, u8 val, s64 t)
{
    struct counter *c = &p->counter[val >> 6 & 3];
    u8 mode = val >> 1 & 7;

    /* read-back: bit 5 clear latches counts, bit 4 clear the status, of the counters in bits 3..1 */
    if (val >> 6 == 3) {
        for (int i = 0; i < 3; i++) {
            if (!(val >> (i + 1) & 1))
                continue;
            if (!(val & 0x10))
                latch_status(&p->counter[i], t);
            if (!(val & 0x20))
                latch_count(&p->counter[i], t);
        }
        return;
    }
    if ((val >> 4 & 3) == RW_LATCH) {
        latch_count(c, t);
        return;
    }
    *c = (struct counter){
        .mode = mode > 5 ? mode - 4 : mode, /* bit 2 is "don't care" for modes 2 and 3 */
        .rw = val >> 4 & 3,
        .bcd = val & 1,
        .gate = c->gate,
        .null_count = true,
        .n = c->n,
        .written = c->n,
    };
}

static void counter_write(struct counter *c, u8 val, s64 t)
{
    switch (c->rw) {
    case RW_LSB: count_written(c, val, t); break;
    case RW_MSB: count_written(c, (u16)(val << 8), t); break;
    default:
        if (!c->write_high) {
            c->write_low = val;
            if (c->mode == 0)
                c->have_count = false; /* the first byte stops the counting and takes OUT low */
        } else {
            count_written(c, (u16)(val << 8 | c->write_low), t);
        }
        c->write_high = !c->write_high;
        break;
    }
}

static u8 counter_read(struct counter *c, s64 t)
{
    u16 v;
    bool high;

    if (c->status_latched) {
        c->status_latched = false;
        return c->status;
    }
    v = c->latch_bytes ? c->latch : count_now(c, t);
    if (c->latch_bytes)
        c->latch_bytes--;
    high = c->rw == RW_MSB || (c->rw == RW_BOTH && c->read_high);
    if (c->rw == RW_BOTH)
        c->read_high = !c->read_high;
    return (u8)(high ? v >> 8 : v);
}

static u64 pit_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct i8254 *p = dev;
    s64 t = tick_now(p);

    if (off == 3)
        return 0xff; /* the control word cannot be read */
    serve(p, t);
    settle(&p->counter[off], t);
    return counter_read(&p->counter[off], t);
}

static void pit_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct i8254 *p = dev;
    s64 t = tick_now(p);
    bool latch_only = off == 3 && (val >> 6 == 3 || (val >> 4 & 3) == RW_LATCH);

    serve(p, t);
    for (int i = 0; i < 3; i++)
        settle(&p->counter[i], t);
    if (off == 3)
        control_write(p, (u8)val, t);
    else
        counter_write(&p->counter[off], (u8)val, t);
    if (!latch_only && (off == 0 || (off == 3 && val >> 6 == 0)))
        rewire(p, t);
}

static u64 port61_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    struct i8254 *p = dev;
    s64 t = tick_now(p);

    settle(&p->counter[2], t);
    return (u64)(p->port61 | (clock_ns(p->clock) / REFRESH_NS & 1) << 4 | (u64)out_level(&p->counter[2], t) << 5);
}

static void port61_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct i8254 *p = dev;
    s64 t = tick_now(p);

    settle(&p->counter[2], t);
    p->port61 = val & 0x0f;
    set_gate(&p->counter[2], val & 1, t);
}

/* ---- the real chip elsewhere ---- */

static int give(struct i8254 *p)
{
    struct i8254_regs r = { .speaker = p->port61 & 2 };
    s64 t = tick_now(p);

    for (int i = 0; i < 3; i++) {
        struct counter *c = &p->counter[i];

        settle(c, t);
        r.counter[i] = (struct i8254_counter_regs){
            .count = c->written, .elapsed_ns = tick_ns(MAX(elapsed(c, t), 0)), .mode = c->mode, .rw = c->rw,
            .bcd = c->bcd, .gate = c->gate,
            .loaded = c->have_count, .write_high = c->write_high, .read_high = c->read_high,
            .status_latched = c->status_latched,
            .write_low = c->write_low, .status = c->status, .latch_bytes = c->latch_bytes, .latch = c->latch,
        };
    }
    return p->elsewhere.ops->i8254_set(p->elsewhere.arg, &r);
}

static int take(struct i8254 *p)
{
    struct i8254_regs r;
    s64 t = tick_now(p);
    int e = p->elsewhere.ops->i8254_get(p->elsewhere.arg, &r);

    if (e < 0)
        return e;
    for (int i = 0; i < 3; i++) {
        const struct i8254_counter_regs *c = &r.counter[i];
        s64 passed = (s64)((u128)c->elapsed_ns * I8254_HZ / NS_PER_S);

        p->counter[i] = (struct counter){
            .mode = c->mode, .rw = c->rw, .bcd = c->bcd, .gate = c->gate, .have_count = c->loaded,
            .triggered = c->loaded, .null_count = !c->loaded,
            .write_high = c->write_high, .read_high = c->read_high, .write_low = c->write_low, .written = c->count,
            .n = c->count, .start = t - passed,
            .held = passed, .latch = c->latch, .latch_bytes = c->latch_bytes, .status_latched = c->status_latched,
            .status = c->status,
        };
    }
    p->port61 = (u8)(r.counter[2].gate | r.speaker << 1);
    return 0;
}

void i8254_attach(struct i8254 *p, struct irqchip elsewhere)
{
    pthread_mutex_lock(&p->device.lock);
    p->elsewhere = elsewhere;
    pthread_mutex_unlock(&p->device.lock);
}

/* ---- device ---- */

static void i8254_reset(struct device *d)
{
    struct i8254 *p = (struct i8254 *)d;

    pthread_mutex_lock(&d->lock);
    for (int i = 0; i < 3; i++)
        p->counter[i] = (struct counter){ .rw = RW_BOTH, .gate = i < 2, .n = 65536, .written = 65536,
            .null_count = true };
    p->port61 = 0;
    rewire(p, tick_now(p));
    if (p->elsewhere.ops)
        give(p);
    pthread_mutex_unlock(&d->lock);
}

static void stream_s64(struct stream *s, s64 *v)
{
    u64 u = (u64)*v;

    stream_u64(s, &u);
    *v = (s64)u;
}

static void counter_state(struct counter *c, struct stream *s)
{
    stream_u8(s, &c->mode);
    stream_u8(s, &c->rw);
    stream_bool(s, &c->bcd);
    stream_bool(s, &c->gate);
    stream_bool(s, &c->have_count);
    stream_bool(s, &c->triggered);
    stream_bool(s, &c->null_count);
    stream_bool(s, &c->write_high);
    stream_bool(s, &c->read_high);
    stream_u8(s, &c->write_low);
    stream_u32(s, &c->written);
    stream_u32(s, &c->n);
    stream_s64(s, &c->start);
    stream_s64(s, &c->held);
    stream_bool(s, &c->pending);
    stream_s64(s, &c->switch_at);
    stream_u16(s, &c->latch);
    stream_u8(s, &c->latch_bytes);
    stream_bool(s, &c->status_latched);
    stream_u8(s, &c->status);
}

/* Ticks far from the clock's would overflow in sums. */
static bool tick_ok(s64 t)
{
    return t > -(s64)BIT(60) && t < (s64)BIT(60);
}

static bool counter_ok(const struct counter *c, int i)
{
    return c->mode <= 5 && c->rw >= RW_LSB && c->rw <= RW_BOTH && c->n >= 1 && c->n <= 65536 && c->written >= 1 &&
        c->written <= 65536 &&
           c->latch_bytes <= 2 && (i == 2 || c->gate) && tick_ok(c->start) && tick_ok(c->held) && tick_ok(c->switch_at);
}

static void i8254_state(struct device *d, struct stream *s)
{
    struct i8254 *p = (struct i8254 *)d;

    if (p->elsewhere.ops && !s->load && !s->error)
        s->error = take(p);
    struct counter counter[3] = { p->counter[0], p->counter[1], p->counter[2] };

    stream_section(s, "i8254", 1);
    for (int i = 0; i < 3; i++) {
        counter_state(&counter[i], s);
        if (s->load && !s->error && !counter_ok(&counter[i], i))
            stream_bad(s, "i8254: impossible counter");
    }
    stream_u8(s, &p->port61);
    if (!s->load || s->error)
        return;
    for (int i = 0; i < 3; i++)
        p->counter[i] = counter[i];
    p->port61 &= 0x0f;
    arm(p, tick_now(p), 0); /* the interrupt controllers restore the wire's level themselves */
    if (p->elsewhere.ops)
        s->error = give(p);
}

static void i8254_free(struct device *d)
{
    struct i8254 *p = (struct i8254 *)d;

    timer_disarm(&p->timer);
    pthread_mutex_destroy(&d->lock);
    free(p);
}

static const struct device_ops i8254_ops = {
    .name = "i8254",
    .reset = i8254_reset,
    .state = i8254_state,
    .free = i8254_free,
};

int i8254_new(struct bus *pio, struct clock *clock, struct irq_line irq0, struct i8254 **out)
{
    struct i8254 *p = calloc(1, sizeof(*p));

    if (!p)
        return err(-ENOMEM, "i8254: out of memory");
    device_init(&p->device, &i8254_ops);
    p->clock = clock;
    p->irq0 = irq0;
    timer_init(&p->timer, clock, timer_fired, p);

    struct region regions[] = {
        { .base = 0x40, .size = 4, .read = pit_read, .write = pit_write, .name = "i8254" },
        { .base = 0x61, .size = 1, .read = port61_read, .write = port61_write, .name = "port 0x61" },
    };
    for (size_t i = 0; i < ARRAY_SIZE(regions); i++) {
        regions[i].min = regions[i].max = 1;
        regions[i].dev = p;
        regions[i].lock = &p->device.lock;
        int r = bus_add(pio, &regions[i]);
        if (r < 0) {
            i8254_free(&p->device);
            return r;
        }
    }
    for (int i = 0; i < 3; i++)
        p->counter[i] = (struct counter){ .rw = RW_BOTH, .gate = i < 2, .n = 65536, .written = 65536,
            .null_count = true };
    p->event = -1;
    *out = p;
    return 0;
}
