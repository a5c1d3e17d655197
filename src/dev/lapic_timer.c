/*
 * The local APIC's timer (Intel SDM vol. 3A 11.5.4): one-shot, periodic, TSC-deadline.
 *
 * It counts a clock of LAPIC_BUS_HZ. A periodic timer keeps to its grid of deadlines however late it is served;
 * periods that were missed coalesce into one interrupt, as they would in the IRR. Periods below PERIOD_MIN_NS are
 * served no more often than that.
 *
 * Locking: everything here is called under the local APIC's lock (device.lock), but lapic_timer_fired(), which takes
 * it; timer_arm() takes a leaf lock.
 */
#include "dev/lapic_int.h"

#define PERIOD_MIN_NS 50000u

static unsigned divisor(const struct lapic *l)
{
    unsigned code = (l->divide & 3) | (l->divide & 8) >> 1;

    return code == 7 ? 1 : 2u << code;
}

static u64 period_ns(const struct lapic *l)
{
    return (u64)l->initial * divisor(l) * (1000000000 / LAPIC_BUS_HZ);
}

void lapic_timer_stop(struct lapic *l)
{
    l->armed = false;
    l->deadline_tsc = 0;
    timer_disarm(&l->timer);
}

/* The guest's deadline in guest time. "Never" (all ones) must not wrap round into the past, whatever TSC_ADJUST is. */
static u64 deadline_ns(const struct lapic *l)
{
    __int128 tsc = (__int128)l->deadline_tsc - l->tsc_adjust;

    if (tsc < 0)
        return 0;
    return tsc > UINT64_MAX ? UINT64_MAX : clock_tsc_to_ns(l->bus->cfg.clock, (u64)tsc);
}

/* When the host is to look again: deadlines of the guest, but no more often than PERIOD_MIN_NS when it repeats. */
void lapic_timer_start_host(struct lapic *l)
{
    struct clock *c = l->bus->cfg.clock;
    u64 at = l->deadline_ns;

    if (l->bus->elsewhere.ops)
        return;
    if (TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_DEADLINE)
        at = deadline_ns(l);
    else if (TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_PERIODIC && period_ns(l) < PERIOD_MIN_NS)
        at = MAX(at, clock_ns(c) + PERIOD_MIN_NS);
    timer_arm(&l->timer, at);
}

void lapic_timer_start_count(struct lapic *l)
{
    l->armed = l->initial != 0;
    if (!l->armed) {
        lapic_timer_stop(l);
        return;
    }
    l->deadline_ns = clock_ns(l->bus->cfg.clock) + period_ns(l);
    lapic_timer_start_host(l);
}

void lapic_timer_deadline_check(struct lapic *l)
{
    if (!l->armed)
        return;
    /* by the guest's own reading: never early */
    if (clock_tsc(l->bus->cfg.clock) + (u64)l->tsc_adjust < l->deadline_tsc) {
        lapic_timer_start_host(l);
        return;
    }
    lapic_timer_stop(l); /* the MSR reads 0 from here on */
    lapic_lvt_fire(l, LVT_TIMER);
}

void lapic_timer_set_deadline(struct lapic *l, u64 tsc)
{
    lapic_timer_stop(l);
    l->deadline_tsc = tsc;
    l->armed = tsc != 0;
    lapic_timer_deadline_check(l);
}

static void timer_count_check(struct lapic *l)
{
    u64 ns = clock_ns(l->bus->cfg.clock);

    if (!l->armed)
        return;
    if (ns < l->deadline_ns) {
        lapic_timer_start_host(l);
        return;
    }
    if (TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_PERIODIC) {
        l->deadline_ns += ((ns - l->deadline_ns) / period_ns(l) + 1) * period_ns(l);
        lapic_timer_start_host(l);
    } else {
        l->armed = false;
    }
    lapic_lvt_fire(l, LVT_TIMER);
}

void lapic_timer_fired(void *arg)
{
    struct lapic *l = arg;

    pthread_mutex_lock(&l->device.lock);
    if (TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_DEADLINE)
        lapic_timer_deadline_check(l);
    else
        timer_count_check(l);
    pthread_mutex_unlock(&l->device.lock);
}

u32 lapic_timer_current(const struct lapic *l)
{
    u64 ns = clock_ns(l->bus->cfg.clock), left;

    if (!l->armed || TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_DEADLINE)
        return 0;
    if (ns < l->deadline_ns)
        left = l->deadline_ns - ns;
    else if (TIMER_MODE(l->lvt[LVT_TIMER]) == TIMER_PERIODIC)
        left = period_ns(l) - (ns - l->deadline_ns) % period_ns(l);
    else
        return 0;
    left = (left + divisor(l) - 1) / divisor(l);
    return (u32)MIN(left, l->initial);
}

/* The count goes on from where it is, at the new rate. */
void lapic_timer_set_divide(struct lapic *l, u8 val)
{
    u32 left = lapic_timer_current(l);

    l->divide = val & 0xb;
    if (!left)
        return;
    l->deadline_ns = clock_ns(l->bus->cfg.clock) + (u64)left * divisor(l);
    lapic_timer_start_host(l);
}

void lapic_timer_take(struct lapic *l, const struct lapic_regs *r)
{
    unsigned mode = TIMER_MODE(l->lvt[LVT_TIMER]);

    l->tsc_adjust = r->tsc_adjust;
    l->initial = r->initial;
    l->divide = r->divide & 0xb;
    l->deadline_tsc = mode == TIMER_DEADLINE ? r->tsc_deadline : 0;
    if (mode == TIMER_DEADLINE) {
        l->armed = l->deadline_tsc != 0;
    } else {
        l->armed = l->initial && (r->current || mode == TIMER_PERIODIC);
        l->deadline_ns = clock_ns(l->bus->cfg.clock) + (r->current
            ? (u64)r->current * divisor(l) * (1000000000 / LAPIC_BUS_HZ) : period_ns(l));
    }
}
