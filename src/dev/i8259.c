/*
 * Intel 8259A programmable interrupt controllers, master and slave (data sheet 231468), and the edge/level control
 * registers of the 82371 (PIIX).
 *
 * Modelled: ICW1..4, OCW1..3, fully nested, special fully nested and special mask mode, rotation, automatic EOI, poll,
 * spurious IR7, ELCR. Left out: MCS-80 mode, buffered mode, the LTIM bit (the ELCR replaces it), single mode (the slave
 * is always there).
 *
 * Edge-triggered requests follow the data sheet: the latch falls with the line, and an INTA cycle that finds no request
 * any more is answered with IR7 and sets no in-service bit.
 *
 * The slave's INT drives the master's IR2 by level. `pending` mirrors the master's INT for the processors' quick look;
 * whenever another request waits after an INTA cycle, INT falls and rises again, so that nobody has to ask twice.
 *
 * Locking: device.lock for all state; the local APICs' locks are taken under it (by intr).
 */
#include "dev/i8259.h"

#include <errno.h>
#include <stdatomic.h>

#include "base/err.h"

#define CASCADE 2
#define ELCR_MASTER 0xf8   /* IR0, 1, 2 are always edge-triggered */
#define ELCR_SLAVE 0xde    /* and so are IRQ8 and IRQ13 */

#define ICW1_IC4 0x01
#define ICW1 0x10
#define ICW4_AEOI 0x02
#define ICW4_SFNM 0x10
#define OCW3 0x08

enum init_step { READY, WANT_ICW2, WANT_ICW3, WANT_ICW4 };

struct pic {
    u8 lines;                                                      /* input levels */
    u8 irr, isr, imr, elcr;
    u8 base;                                                       /* ICW2: vector of IR0 */
    u8 lowest;                                                     /* the level of lowest priority; 7 unless rotated */
    u8 step;                                                       /* enum init_step */
    bool want_icw4, aeoi, sfnm, rotate_aeoi, special_mask, read_isr, poll;
};

struct i8259 {
    struct device device;
    struct pic pic[2];                                             /* master, slave */
    struct irq_line intr;
    atomic_bool pending;
    /* ops: the real chip; then `lines` is all that is live here */
    struct irqchip elsewhere;
};

/* ---- one chip ---- */

/* The level of highest priority in set, or -1. */
static int highest(const struct pic *p, u8 set)
{
    for (int i = 1; set && i <= 8; i++) {
        int level = (p->lowest + i) & 7;

        if (set & (1 << level))
            return level;
    }
    return -1;
}

static int rank(const struct pic *p, int level)                    /* 0 is the highest priority */
{
    return (level - p->lowest - 1) & 7;
}

/* The request that INT stands for, or -1. */
static int request(const struct pic *p)
{
    u8 in_service = p->isr;
    int irq = highest(p, p->irr & ~p->imr), serving;

    if (irq < 0)
        return -1;
    if (p->special_mask)
        in_service &= ~p->imr; /* a masked level that is in service holds nobody up */
    serving = highest(p, in_service);
    if (serving < 0 || rank(p, irq) < rank(p, serving))
        return irq;
    /* Special fully nested: a slave in service does not lock out further requests of higher priority from the same
       slave. */
    return p->sfnm && irq == CASCADE && serving == CASCADE ? irq : -1;
}

static void eoi(struct pic *p, int level, bool rotate)
{
    p->isr &= ~(1 << level);
    if (rotate)
        p->lowest = level;
}

/* INTA cycle or poll: the request goes into service. Returns the level, or -1 when the request has gone. */
static int accept(struct pic *p)
{
    int irq = request(p);

    if (irq < 0)
        return -1;
    if (!(p->elcr & (1 << irq)))
        p->irr &= ~(1 << irq);
    p->isr |= 1 << irq;
    if (p->aeoi)
        eoi(p, irq, p->rotate_aeoi);
    return irq;
}

static void set_line(struct pic *p, int n, int level)
{
    u8 bit = (u8)(1 << n);

    if (level && (!(p->lines & bit) || (p->elcr & bit)))
        p->irr |= bit;
    if (!level)
        p->irr &= ~bit;
    p->lines = level ? p->lines | bit : p->lines & ~bit;
}

/* ---- both ---- */

/* Carries the slave's INT to IR2, and the master's to the processors. reassert: an INTA cycle has ended, INT was low in
   between. */
static void update(struct i8259 *x, bool reassert)
{
    struct pic *m = &x->pic[0];
    bool intr;

    m->irr &= ~(1 << CASCADE);
    if (request(&x->pic[1]) >= 0)
        m->irr |= 1 << CASCADE;
    intr = request(m) >= 0;
    if (atomic_load(&x->pending) && (!intr || reassert)) {
        atomic_store(&x->pending, false);
        irq_set(&x->intr, 0);
    }
    if (intr && !atomic_load(&x->pending)) {
        atomic_store(&x->pending, true);
        irq_set(&x->intr, 1);
    }
}

static void line_set(void *chip, int n, int level)
{
    struct i8259 *x = chip;
    int was;

    if (n == CASCADE)
        return;
    pthread_mutex_lock(&x->device.lock);
    was = x->pic[n >> 3].lines >> (n & 7) & 1;
    set_line(&x->pic[n >> 3], n & 7, level);
    if (!x->elsewhere.ops)
        update(x, false);
    else if (was != level)
        x->elsewhere.ops->pic_line(x->elsewhere.arg, n, level);
    pthread_mutex_unlock(&x->device.lock);
}

struct irq_line i8259_irq(struct i8259 *p, int n)
{
    bug_on(n < 0 || n > 15);
    return (struct irq_line){ line_set, p, n };
}

bool i8259_pending(const struct i8259 *p)
{
    return atomic_load_explicit(&p->pending, memory_order_acquire);
}

int i8259_peek(struct i8259 *x)
{
    int irq, vector = -1;

    pthread_mutex_lock(&x->device.lock);
    irq = request(&x->pic[0]);
    if (irq >= 0 && irq != CASCADE)
        vector = x->pic[0].base + irq;
    else if (irq == CASCADE)
        vector = x->pic[1].base + request(&x->pic[1]);
    pthread_mutex_unlock(&x->device.lock);
    return vector;
}

int i8259_ack(struct i8259 *x)
{
    int irq, vector;

    pthread_mutex_lock(&x->device.lock);
    irq = accept(&x->pic[0]);
    if (irq == CASCADE) {
        irq = accept(&x->pic[1]);
        vector = x->pic[1].base + (irq < 0 ? 7 : irq);
    } else {
        vector = x->pic[0].base + (irq < 0 ? 7 : irq);
    }
    update(x, true);
    pthread_mutex_unlock(&x->device.lock);
    return vector;
}

/* ---- registers ---- */

/* ICW1 (data sheet, "Initialization command words"): edges are forgotten, the mask is clear, IR7 is lowest, status read
   is the IRR. */
static void write_icw1(struct pic *p, u8 val)
{
    p->imr = 0;
    p->isr = 0;
    p->irr = p->lines & p->elcr;
    p->lowest = 7;
    p->special_mask = false;
    p->read_isr = false;
    p->poll = false;
    p->rotate_aeoi = false;
    p->want_icw4 = val & ICW1_IC4;
    if (!p->want_icw4) {
        p->aeoi = false;
        p->sfnm = false;
    }
    p->step = WANT_ICW2;
}

static void write_ocw2(struct pic *p, u8 val)
{
    int level = val & 7;

    switch (val >> 5) {
    case 0: /* clear: no rotation in automatic EOI */
    case 4:
        p->rotate_aeoi = val & 0x80;
        break;
    case 1: /* non-specific EOI; in special mask mode masked levels are passed over */
    case 5: /* the same with rotation */
        level = highest(p, p->special_mask ? p->isr & ~p->imr : p->isr);
        if (level >= 0)
            eoi(p, level, val & 0x80);
        break;
    case 3: /* specific EOI */
    case 7: /* the same with rotation */
        eoi(p, level, val & 0x80);
        break;
    case 6: /* set priority */
        p->lowest = (u8)level;
        break;
    }
}

static void write_ocw3(struct pic *p, u8 val)
{
    if (val & 0x40)
        p->special_mask = val & 0x20;
    p->poll = val & 0x04;
    if (val & 0x02)
        p->read_isr = val & 0x01;
}

static void write_data(struct pic *p, u8 val)
{
    switch (p->step) {
    case READY:
        p->imr = val;
        break;
    case WANT_ICW2:
        p->base = val & 0xf8;
        p->step = WANT_ICW3;
        break;
    case WANT_ICW3: /* who is where in the cascade: wired */
        p->step = p->want_icw4 ? WANT_ICW4 : READY;
        break;
    case WANT_ICW4:
        p->aeoi = val & ICW4_AEOI;
        p->sfnm = val & ICW4_SFNM;
        p->step = READY;
        break;
    }
}

static void pic_write(struct i8259 *x, int chip, u64 off, u64 val)
{
    struct pic *p = &x->pic[chip];

    if (off == 1)
        write_data(p, (u8)val);
    else if (val & ICW1)
        write_icw1(p, (u8)val);
    else if (val & OCW3)
        write_ocw3(p, (u8)val);
    else
        write_ocw2(p, (u8)val);
    update(x, false);
}

static u64 pic_read(struct i8259 *x, int chip, u64 off)
{
    struct pic *p = &x->pic[chip];
    int irq;

    if (p->poll) { /* the next read, whichever, is the poll's INTA */
        p->poll = false;
        irq = accept(p);
        update(x, true);
        return irq < 0 ? 7 : 0x80 | (u8)irq; /* bit 7 clear: no request */
    }
    if (off == 1)
        return p->imr;
    return p->read_isr ? p->isr : p->irr;
}

static u64 master_read(void *dev, u64 off, unsigned size UNUSED)
{
    return pic_read(dev, 0, off);
}

static void master_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    pic_write(dev, 0, off, val);
}

static u64 slave_read(void *dev, u64 off, unsigned size UNUSED)
{
    return pic_read(dev, 1, off);
}

static void slave_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    pic_write(dev, 1, off, val);
}

static u64 elcr_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct i8259 *x = dev;

    return x->pic[off].elcr;
}

static void elcr_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct i8259 *x = dev;
    struct pic *p = &x->pic[off];

    p->elcr = (u8)val & (off ? ELCR_SLAVE : ELCR_MASTER);
    p->irr = (p->irr & ~p->elcr) | (p->lines & p->elcr);
    update(x, false);
}

/* ---- the real chip elsewhere ---- */

static int give(struct i8259 *x)
{
    struct i8259_regs r;

    for (int i = 0; i < 2; i++) {
        const struct pic *p = &x->pic[i];

        r.chip[i] = (struct i8259_chip_regs){
            .lines = p->lines, .irr = p->irr, .isr = p->isr, .imr = p->imr, .elcr = p->elcr, .base = p->base,
            .lowest = p->lowest, .step = p->step,
            .want_icw4 = p->want_icw4, .aeoi = p->aeoi, .sfnm = p->sfnm, .rotate_aeoi = p->rotate_aeoi,
            .special_mask = p->special_mask,
            .read_isr = p->read_isr, .poll = p->poll,
        };
    }
    return x->elsewhere.ops->i8259_set(x->elsewhere.arg, &r);
}

static int take(struct i8259 *x)
{
    struct i8259_regs r;
    int e = x->elsewhere.ops->i8259_get(x->elsewhere.arg, &r);

    for (int i = 0; e == 0 && i < 2; i++) {
        const struct i8259_chip_regs *c = &r.chip[i];

        x->pic[i] = (struct pic){
            .lines = x->pic[i].lines, .irr = c->irr, .isr = c->isr, .imr = c->imr, .elcr = c->elcr, .base = c->base,
            .lowest = c->lowest & 7,
            .step = c->step & 3, .want_icw4 = c->want_icw4, .aeoi = c->aeoi, .sfnm = c->sfnm,
            .rotate_aeoi = c->rotate_aeoi,
            .special_mask = c->special_mask, .read_isr = c->read_isr, .poll = c->poll,
        };
    }
    atomic_store(&x->pending, request(&x->pic[0]) >= 0);
    return e;
}

void i8259_attach(struct i8259 *x, struct irqchip elsewhere)
{
    pthread_mutex_lock(&x->device.lock);
    x->elsewhere = elsewhere;
    pthread_mutex_unlock(&x->device.lock);
}

void i8259_set_elcr(struct i8259 *x, u16 elcr)
{
    pthread_mutex_lock(&x->device.lock);
    elcr_write(x, 0, (u8)elcr, 1);
    elcr_write(x, 1, elcr >> 8, 1);
    if (x->elsewhere.ops)
        give(x);
    pthread_mutex_unlock(&x->device.lock);
}

/* ---- device ---- */

static void i8259_reset(struct device *d)
{
    struct i8259 *x = (struct i8259 *)d;

    pthread_mutex_lock(&d->lock);
    for (int i = 0; i < 2; i++) /* the wires are not the chip's: levels stay */
        x->pic[i] = (struct pic){ .lines = x->pic[i].lines, .lowest = 7 };
    update(x, false);
    if (x->elsewhere.ops)
        give(x);
    pthread_mutex_unlock(&d->lock);
}

static void pic_state(struct pic *p, struct stream *s)
{
    stream_u8(s, &p->lines);
    stream_u8(s, &p->irr);
    stream_u8(s, &p->isr);
    stream_u8(s, &p->imr);
    stream_u8(s, &p->elcr);
    stream_u8(s, &p->base);
    stream_u8(s, &p->lowest);
    stream_u8(s, &p->step);
    stream_bool(s, &p->want_icw4);
    stream_bool(s, &p->aeoi);
    stream_bool(s, &p->sfnm);
    stream_bool(s, &p->rotate_aeoi);
    stream_bool(s, &p->special_mask);
    stream_bool(s, &p->read_isr);
    stream_bool(s, &p->poll);
    if (s->load && (p->lowest > 7 || p->step > WANT_ICW4 || (p->base & 7)))
        stream_bad(s, "i8259: impossible priority, step or vector");
}

static void i8259_state(struct device *d, struct stream *s)
{
    struct i8259 *x = (struct i8259 *)d;

    if (x->elsewhere.ops && !s->load && !s->error)
        s->error = take(x);
    struct pic pic[2] = { x->pic[0], x->pic[1] };

    stream_section(s, "i8259", 1);
    pic_state(&pic[0], s);
    pic_state(&pic[1], s);
    if (!s->load || s->error)
        return;
    pic[0].elcr &= ELCR_MASTER;
    pic[1].elcr &= ELCR_SLAVE;
    x->pic[0] = pic[0];
    x->pic[1] = pic[1];
    /* The local APICs restore their own idea of INTR; only the mirror is ours. */
    atomic_store(&x->pending, request(&x->pic[0]) >= 0);
    if (x->elsewhere.ops)
        s->error = give(x);
}

static void i8259_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops i8259_ops = {
    .name = "i8259",
    .reset = i8259_reset,
    .state = i8259_state,
    .free = i8259_free,
};

int i8259_new(struct bus *pio, struct irq_line intr, struct i8259 **out)
{
    struct i8259 *x = calloc(1, sizeof(*x));
    int r;

    if (!x)
        return err(-ENOMEM, "i8259: out of memory");
    device_init(&x->device, &i8259_ops);
    x->intr = intr;
    x->pic[0].lowest = x->pic[1].lowest = 7;

    struct region regions[] = {
        { .base = 0x20, .size = 2, .read = master_read, .write = master_write, .name = "i8259 master" },
        { .base = 0xa0, .size = 2, .read = slave_read, .write = slave_write, .name = "i8259 slave" },
        { .base = 0x4d0, .size = 2, .read = elcr_read, .write = elcr_write, .name = "elcr" },
    };
    for (size_t i = 0; i < ARRAY_SIZE(regions); i++) {
        regions[i].min = regions[i].max = 1;
        regions[i].dev = x;
        regions[i].lock = &x->device.lock;
        r = bus_add(pio, &regions[i]);
        if (r < 0) {
            i8259_free(&x->device);
            return r;
        }
    }
    *out = x;
    return 0;
}
