/*
 * --trace: one line per event, with guest time and vCPU. Free when off: one load and a branch that is predicted.
 *
 * trace(t, TRACE_PIO, vcpu, "out 0x%x <- 0x%x", ...) from any thread; lines of one call are never mixed. vcpu -1 is the event loop.
 */
#pragma once

#include "base/clock.h"
#include "base/types.h"

enum trace_kind {
    TRACE_EXITS = 1 << 0,   /* why a vCPU left its engine's fast path */
    TRACE_FAULTS = 1 << 1,  /* exceptions delivered to the guest */
    TRACE_IRQ = 1 << 2,     /* "interrupts" */
    TRACE_MSR = 1 << 3,
    TRACE_PIO = 1 << 4,
    TRACE_MMIO = 1 << 5,
    TRACE_CR3 = 1 << 6,
    TRACE_INSN = 1 << 7,
};

struct trace {
    u32 mask;                                                      /* may be changed at run time by the monitor prompt */
    FILE *file;
    const struct clock *clock;
};

/* Parses "exits,faults,interrupts,msr,pio,mmio,cr3,insn" or "all" or "" into a mask. Returns 0 or -EINVAL with err() naming the bad word. */
int trace_parse(const char *list, u32 *mask);
void trace_line(const struct trace *t, enum trace_kind kind, int vcpu, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
static inline bool trace_on(const struct trace *t, u32 kinds)
{
    return unlikely(t && (t->mask & kinds));
}
#define trace(t, kind, vcpu, ...)                                                                     \
    do {                                                                                              \
        if (trace_on(t, kind))                                                                        \
            trace_line(t, kind, vcpu, __VA_ARGS__);                                                   \
    } while (0)
