/*
 * What a debugger outside the guest wants of the processors: where to stop, which accesses to report, who takes single
 * steps. Engines look at it; vm/debug.c fills it in. The guest sees nothing of it: neither its memory nor its debug
 * registers change.
 *
 * Addresses are linear, in every address space. A breakpoint stops a vCPU before the instruction there, once it could
 * be fetched; a watchpoint after the instruction that made the access (a repeated string instruction may finish first).
 * While a vCPU takes a single step, or goes on from the breakpoint at which it stands, no interrupt is delivered, so
 * that a step in the guest's kernel does not end in an interrupt's handler.
 *
 * Locking: changed only while all vCPUs stand still; vcpu_debug.stop and stop_* are written by the vCPU's thread.
 */
#pragma once

#include "base/types.h"

#define DEBUG_POINTS_MAX 256                                       /* breakpoints; and as many watchpoints */

enum debug_access { DEBUG_READ = 1, DEBUG_WRITE = 2 };

struct debug_watch {
    u64 la, len;
    u8 access;                                                     /* enum debug_access, or both */
};

struct vcpu;

struct debug {
    u64 point[DEBUG_POINTS_MAX];                                   /* breakpoints, sorted */
    unsigned points;
    struct debug_watch watch[DEBUG_POINTS_MAX];
    unsigned watches;
    u64 generation;                                                /* counts changes: what engines derived is made anew */
    bool attached;                                                 /* somebody takes stops */
    /* On the vCPU's thread, which stands still afterwards: it has left the engine with RUN_DEBUG. */
    void (*stopped)(void *arg, struct vcpu *v);
    void *arg;
};

enum debug_stop { DEBUG_NONE, DEBUG_STEPPED, DEBUG_POINT, DEBUG_WATCHED, DEBUG_SHUTDOWN };

struct vcpu_debug {
    bool parked;                                                   /* stands still while others run */
    bool step;                                                     /* one instruction, then DEBUG_STEPPED */
    bool pass;                                                     /* one instruction even if there is a breakpoint */
    u64 range_start, range_end;                                    /* steps that end in here are not reported */
    enum debug_stop stop;                                          /* why it stopped last */
    u64 stop_la;                                                   /* DEBUG_WATCHED: the watchpoint's address */
    u8 stop_access;                                                /* and its access */
};

bool debug_point_at(const struct debug *d, u64 la);
/* The watchpoint that an access of n bytes meets, or NULL. */
const struct debug_watch *debug_watch_at(const struct debug *d, u64 la, u64 n, enum debug_access access);

/* 0, or -ENOSPC; the same one twice counts once. Taking away what is not there is harmless. */
int debug_add_point(struct debug *d, u64 la);
void debug_del_point(struct debug *d, u64 la);
int debug_add_watch(struct debug *d, const struct debug_watch *w);
void debug_del_watch(struct debug *d, const struct debug_watch *w);
