/*
 * Guest time: a clock that can be paused, and timers on it.
 *
 * clock_ns() is nanoseconds of guest time since the clock was made: CLOCK_MONOTONIC less the time spent paused. The guest's TSC is the
 * host's TSC plus an offset that also hides pauses, so clock_ns and clock_tsc stay in step (tsc_khz is measured once per host at start).
 *
 * Timers fire on the loop's thread, with no lock held: the callback takes its device's lock and looks again whether it is due, since
 * a timer that was re-armed or disarmed may still be on its way. Arm and disarm: any thread, O(log n), under the clock's own lock,
 * which is the last in the lock order.
 */
#pragma once

#include "base/loop.h"
#include "base/stream.h"
#include "base/types.h"

struct clock;

struct timer {
    struct clock *clock;
    void (*fn)(void *arg);
    void *arg;
    u64 deadline_ns;
    int slot;                                                      /* index in the clock's heap, -1 when not armed */
};

int clock_new(struct loop *l, struct clock **out);                 /* starts running */
void clock_free(struct clock *c);
u64 clock_ns(const struct clock *c);                               /* any thread */
u64 clock_tsc(const struct clock *c);                              /* any thread; guest TSC before a vCPU's own TSC_ADJUST/offset */
u64 clock_tsc_bias(const struct clock *c);                         /* clock_tsc() less the host's TSC, while it runs (modulo 2^64) */
u64 clock_tsc_khz(const struct clock *c);
u64 clock_tsc_to_ns(const struct clock *c, u64 guest_tsc);         /* the clock_ns() at which clock_tsc() has/had that value; saturates */
u64 clock_ns_to_tsc(const struct clock *c, u64 ns);
void clock_pause(struct clock *c);                                 /* nests not; timers stand still */
void clock_resume(struct clock *c);
void clock_state(struct clock *c, struct stream *s);                /* while paused: what devices' saved times refer to; before the devices' own */
u64 clock_wall_ns(void);                                           /* CLOCK_REALTIME of the host, ns since 1970 */

void timer_init(struct timer *t, struct clock *c, void (*fn)(void *arg), void *arg);
void timer_arm(struct timer *t, u64 deadline_ns);                  /* in clock_ns() time; in the past: fires at once */
void timer_disarm(struct timer *t);
