/*
 * The one access path: every port and MMIO access, from any engine, is bus_access().
 *
 * A bus is a sorted list of regions and, optionally, a parent that is asked for addresses that no region here holds (a vCPU's own bus holds
 * its local APIC page; its parent is the system's). Accesses of widths that a region does not take are split or widened: parts that are unmapped
 * read as all ones, writes to them vanish. A region's handlers run under the region's lock, so device code reads single-threaded.
 *
 * An access belongs to the region that holds its first byte, as far as that region reaches; the rest is an access of its own. Handlers see
 * powers of two between min and max, aligned to their size within the region, and inside it. What is narrower than min is cut out of a read of min bytes, or
 * merged into it for a write.
 *
 * Threads: bus_access from any. Adding, moving, removing regions from any; an access that began before a move may still reach the old place.
 */
#pragma once

#include <pthread.h>

#include "base/types.h"

struct region {
    u64 base, size;
    u8 min, max;                                                   /* widths in bytes that the handlers take: 1, 2, 4, 8 */
    u64 (*read)(void *dev, u64 off, unsigned size);
    void (*write)(void *dev, u64 off, u64 val, unsigned size);
    void *dev;
    pthread_mutex_t *lock;                                         /* the device's; NULL: the handlers lock themselves */
    const char *name;
    bool overlay;                                                  /* lies over part of another region, and answers accesses that begin in it */
};

struct bus;
int bus_new(struct bus *parent, struct bus **out);
void bus_free(struct bus *b);

/* Adds a copy of *r; returns its handle (>= 0), or -EEXIST (overlap), -EINVAL, -ENOMEM with err(). A region of size 0 is registered but not mapped. */
int bus_add(struct bus *b, const struct region *r);
/* Moves or resizes region h; size 0 unmaps it. Where regions come to overlap, the one with the lower handle answers. */
void bus_move(struct bus *b, int h, u64 base, u64 size);

/* Size 1..8. A read fills *val (zero-extended). */
void bus_access(struct bus *b, u64 addr, unsigned size, bool write, u64 *val);
static inline u64 bus_read(struct bus *b, u64 addr, unsigned size)
{
    u64 v = 0;
    bus_access(b, addr, size, false, &v);
    return v;
}
static inline void bus_write(struct bus *b, u64 addr, u64 val, unsigned size)
{
    bus_access(b, addr, size, true, &val);
}
