/*
 * A machine without processors in place of vm/debug.c, for tests of the gdb stub: 4 pages of memory at 0x10000 (linear)
 * and at 0 (physical), two processors whose state is only looked at, and lists of what was asked for. Include it once
 * in a test program: it defines the vm_debug_* functions.
 */
#pragma once

#include <errno.h>
#include <string.h>

#include "vm/debug.h"

#define FAKE_CPUS 2
#define FAKE_BASE 0x10000
#define FAKE_BYTES 0x4000

struct vm_debug {
    struct x86 x[FAKE_CPUS];
    u8 memory[FAKE_BYTES];
    bool attached, running, full, have_stop, no_steps;
    unsigned pauses, goes, points, watches, sets;
    u64 last_point;
    struct debug_watch last_watch;
    struct vm_debug_stop stop;
    struct {
        enum vm_debug_action action;
        u64 start, end;
    } cpu[FAKE_CPUS];
};

void vm_debug_attach(struct vm_debug *d)
{
    d->attached = true;
    d->running = false;
}

void vm_debug_detach(struct vm_debug *d)
{
    d->attached = false;
    d->running = true;
    d->points = d->watches = 0;
}

bool vm_debug_running(const struct vm_debug *d)
{
    return d->running;
}

void vm_debug_pause(struct vm_debug *d)
{
    d->pauses += d->running;
    d->running = false;
}

void vm_debug_set_action(struct vm_debug *d, unsigned cpu, enum vm_debug_action a, u64 start, u64 end)
{
    bug_on(cpu >= FAKE_CPUS);
    d->cpu[cpu].action = a;
    d->cpu[cpu].start = start;
    d->cpu[cpu].end = end;
}

int vm_debug_go(struct vm_debug *d)
{
    bug_on(d->running || !d->attached);
    for (unsigned i = 0; i < FAKE_CPUS; i++)
        if (d->no_steps && d->cpu[i].action == VM_DEBUG_STEP)
            return -EOPNOTSUPP;
    d->running = true;
    d->goes++;
    return 0;
}

bool vm_debug_next_stop(struct vm_debug *d, struct vm_debug_stop *stop)
{
    if (!d->have_stop)
        return false;
    d->have_stop = false;
    *stop = d->stop;
    return true;
}

unsigned vm_debug_cpus(const struct vm_debug *d UNUSED)
{
    return FAKE_CPUS;
}

/* As an Intel processor with AVX-512 has them. */
u32 vm_debug_component(const struct vm_debug *d UNUSED, unsigned n)
{
    static const u16 at[] = {[2] = 576, [5] = 1088, [6] = 1152, [7] = 1664, [9] = 2688};
    return n < ARRAY_SIZE(at) ? at[n] : 0;
}

int vm_debug_get(struct vm_debug *d, unsigned cpu, struct x86 *x)
{
    bug_on(cpu >= FAKE_CPUS || d->running);
    *x = d->x[cpu];
    return 0;
}

int vm_debug_set(struct vm_debug *d, unsigned cpu, const struct x86 *x)
{
    bug_on(cpu >= FAKE_CPUS || d->running);
    d->x[cpu] = *x;
    d->sets++;
    return 0;
}

u8 vm_debug_cr8(struct vm_debug *d UNUSED, unsigned cpu UNUSED)
{
    return 5;
}

static size_t fake_piece(enum vm_debug_space space, u64 *addr, size_t n)
{
    if (space == VM_DEBUG_LINEAR)
        *addr -= FAKE_BASE;
    return *addr < FAKE_BYTES ? (size_t)MIN(n, FAKE_BYTES - *addr) : 0;
}

size_t vm_debug_read(struct vm_debug *d, unsigned cpu, enum vm_debug_space space, u64 addr, u8 *buf, size_t n)
{
    bug_on(cpu >= FAKE_CPUS || d->running);
    n = fake_piece(space, &addr, n);
    if (n)
        memcpy(buf, d->memory + addr, n);
    return n;
}

size_t vm_debug_write(struct vm_debug *d, unsigned cpu, enum vm_debug_space space, u64 addr, const u8 *buf, size_t n)
{
    bug_on(cpu >= FAKE_CPUS || d->running);
    n = fake_piece(space, &addr, n);
    if (n)
        memcpy(d->memory + addr, buf, n);
    return n;
}

int vm_debug_add_point(struct vm_debug *d, u64 la)
{
    if (d->full)
        return -ENOSPC;
    d->points++;
    d->last_point = la;
    return 0;
}

void vm_debug_del_point(struct vm_debug *d, u64 la)
{
    d->points--;
    d->last_point = la;
}

int vm_debug_add_watch(struct vm_debug *d, const struct debug_watch *w)
{
    if (d->full)
        return -ENOSPC;
    d->watches++;
    d->last_watch = *w;
    return 0;
}

void vm_debug_del_watch(struct vm_debug *d, const struct debug_watch *w)
{
    d->watches -= d->watches > 0;
    d->last_watch = *w;
}
