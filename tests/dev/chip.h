/*
 * A test bench for chips: buses, a loop, a clock that stands still and is set by the test, and wires that count their edges.
 *
 * Between calls time stands still, so what a chip computes from the clock can be compared exactly. bench_at() goes to a moment without letting timers fire;
 * bench_run() goes there and fires what has become due (and then some microseconds have passed in reality, too).
 */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/clock.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

#define US 1000ull
#define MS 1000000ull
#define SEC 1000000000ull

struct wire {
    int level;
    unsigned rises, falls;
};

struct bench {
    struct loop *loop;
    struct clock *clock;
    struct bus *pio, *mmio;
    struct timer stopper;
};

static inline void wire_set(void *chip, int n, int level)
{
    struct wire *w = (struct wire *)chip + n;

    if (level && !w->level)
        w->rises++;
    if (!level && w->level)
        w->falls++;
    w->level = level;
}

static inline struct irq_line wire_line(struct wire *w)
{
    return (struct irq_line){ wire_set, w, 0 };
}

static inline void bench_stop(void *loop)
{
    loop_stop(loop);
}

static inline void bench_open(struct bench *b)
{
    assert_int_equal(loop_new(&b->loop), 0);
    assert_int_equal(clock_new(b->loop, &b->clock), 0);
    assert_int_equal(bus_new(NULL, &b->pio), 0);
    assert_int_equal(bus_new(NULL, &b->mmio), 0);
    timer_init(&b->stopper, b->clock, bench_stop, b->loop);
    clock_pause(b->clock);
}

static inline void bench_close(struct bench *b)
{
    bus_free(b->pio);
    bus_free(b->mmio);
    clock_free(b->clock);
    loop_free(b->loop);
}

/* Sets the clock to ns; timers do not fire. */
static inline void bench_at(struct bench *b, u64 ns)
{
    struct stream s, l;
    u64 tsc = (u64)((u128)ns * clock_tsc_khz(b->clock) / 1000000);

    stream_save_init(&s);
    stream_section(&s, "clock", 1);
    stream_u64(&s, &ns);
    stream_u64(&s, &tsc);
    stream_load_init(&l, s.buf, s.len);
    clock_state(b->clock, &l);
    assert_int_equal(l.error, 0);
    stream_free(&s);
}

static inline void bench_pass(struct bench *b, u64 ns)
{
    bench_at(b, clock_ns(b->clock) + ns);
}

/* Goes forward by ns, and fires the timers that are due then. */
static inline void bench_run(struct bench *b, u64 ns)
{
    bench_pass(b, ns);
    timer_arm(&b->stopper, clock_ns(b->clock) + 1000);
    clock_resume(b->clock);
    loop_run(b->loop);
    clock_pause(b->clock);
}

/* Goes forward by ns in steps, so that repeating timers fire each time. */
static inline void bench_steps(struct bench *b, unsigned steps, u64 ns)
{
    while (steps--)
        bench_run(b, ns);
}

static inline void out8(struct bench *b, u16 port, u8 val)
{
    bus_write(b->pio, port, val, 1);
}

static inline u8 in8(struct bench *b, u16 port)
{
    return (u8)bus_read(b->pio, port, 1);
}

/* ---- state ---- */

static inline void chip_save(void *chip, struct stream *s)
{
    struct device *d = chip;

    stream_save_init(s);
    pthread_mutex_lock(&d->lock);
    d->ops->state(d, s);
    pthread_mutex_unlock(&d->lock);
    assert_int_equal(s->error, 0);
}

static inline int chip_load(void *chip, const u8 *buf, size_t len)
{
    struct device *d = chip;
    struct stream l;

    stream_load_init(&l, buf, len);
    pthread_mutex_lock(&d->lock);
    d->ops->state(d, &l);
    pthread_mutex_unlock(&d->lock);
    return l.error;
}

/* Carries the state of one chip over to a second one, which must then save the same. */
static inline void chip_transplant(void *from, void *to)
{
    struct stream a, b;

    chip_save(from, &a);
    assert_int_equal(chip_load(to, a.buf, a.len), 0);
    chip_save(to, &b);
    assert_int_equal(a.len, b.len);
    assert_memory_equal(a.buf, b.buf, a.len);
    stream_free(&a);
    stream_free(&b);
}

static inline void chip_reset(void *chip)
{
    struct device *d = chip;

    d->ops->reset(d);
}

static inline void chip_free(void *chip)
{
    struct device *d = chip;

    d->ops->free(d);
}
