/*
 * Look-up and delivery of port and MMIO accesses.
 *
 * Regions are kept by handle, as they were added. From them a map is made: disjoint spans in order of address, each with the region that answers
 * there. An access searches the map, copies the region and lets go of the lock before the handlers run: a handler may move regions (a write to
 * a PCI base address register does).
 *
 * Locking: `lock` guards regions and map; it is held for the look-up and for changes only, never around a handler, and nothing is taken under it.
 */
#include "io/bus.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "base/err.h"

struct span {
    u64 first, last;                                               /* inclusive, so that the last byte of the address space can be in it */
    int h;
};

struct bus {
    struct bus *parent;
    pthread_rwlock_t lock;
    struct region *region;                                         /* by handle */
    int regions;
    struct span *map;                                              /* room for 2 * regions */
    int spans;
    atomic_int hint;                                               /* span of the last hit */
};

int bus_new(struct bus *parent, struct bus **out)
{
    struct bus *b = calloc(1, sizeof(*b));

    if (!b)
        return err(-ENOMEM, "bus: out of memory");
    b->parent = parent;
    pthread_rwlock_init(&b->lock, NULL);
    *out = b;
    return 0;
}

void bus_free(struct bus *b)
{
    if (!b)
        return;
    pthread_rwlock_destroy(&b->lock);
    free(b->region);
    free(b->map);
    free(b);
}

/* ---- the map; under the lock, for writing ---- */

static u64 region_last(const struct region *r)
{
    return r->size - 1 > UINT64_MAX - r->base ? UINT64_MAX : r->base + (r->size - 1);
}

static bool region_holds(const struct region *r, u64 addr)
{
    return r->size && addr >= r->base && addr <= region_last(r);
}

/* Who answers at addr: an overlay before others, then the lower handle. -1: nobody. */
static int owner(const struct bus *b, u64 addr)
{
    int found = -1;

    for (int h = 0; h < b->regions; h++) {
        if (!region_holds(&b->region[h], addr))
            continue;
        if (b->region[h].overlay)
            return h;
        if (found < 0)
            found = h;
    }
    return found;
}

/* The last address up to which the answer of owner(addr) cannot change: just before the next region's begin or at the next region's end. */
static u64 same_until(const struct bus *b, u64 addr)
{
    u64 until = UINT64_MAX;

    for (int h = 0; h < b->regions; h++) {
        const struct region *r = &b->region[h];

        if (!r->size)
            continue;
        if (r->base > addr)
            until = MIN(until, r->base - 1);
        if (region_last(r) >= addr)
            until = MIN(until, region_last(r));
    }
    return until;
}

/* Sweeps from address 0 upwards. n regions have 2n edges, so at most 2n - 1 spans inside them. */
static void remap(struct bus *b)
{
    u64 addr = 0, last;

    b->spans = 0;
    for (;; addr = last + 1) {
        int h = owner(b, addr);
        struct span *prev = b->spans ? &b->map[b->spans - 1] : NULL;

        last = same_until(b, addr);
        if (h >= 0) {
            if (prev && prev->h == h && prev->last == addr - 1)
                prev->last = last;
            else
                b->map[b->spans++] = (struct span){ addr, last, h };
        }
        if (last == UINT64_MAX)
            break;
    }
    atomic_store_explicit(&b->hint, 0, memory_order_relaxed);
}

static bool overlap(const struct region *a, const struct region *b)
{
    return a->size && b->size && a->base <= region_last(b) && b->base <= region_last(a);
}

static bool width_ok(unsigned w)
{
    return w == 1 || w == 2 || w == 4 || w == 8;
}

int bus_add(struct bus *b, const struct region *r)
{
    struct region *region;
    struct span *map;
    int h;

    if (!width_ok(r->min) || !width_ok(r->max) || r->min > r->max || r->size % r->min || !r->read || !r->write ||
        (r->size && r->size - 1 > UINT64_MAX - r->base))
        return err(-EINVAL, "bus: region %s is malformed", r->name);

    pthread_rwlock_wrlock(&b->lock);
    for (int i = 0; i < b->regions; i++)
        if (overlap(&b->region[i], r) && b->region[i].overlay == r->overlay) {
            h = err(-EEXIST, "bus: %s at 0x%llx overlaps %s at 0x%llx", r->name, (unsigned long long)r->base, b->region[i].name,
                    (unsigned long long)b->region[i].base);
            goto out;
        }
    region = realloc(b->region, (size_t)(b->regions + 1) * sizeof(*region));
    if (region)
        b->region = region;
    map = realloc(b->map, 2 * (size_t)(b->regions + 1) * sizeof(*map));
    if (map)
        b->map = map;
    if (!region || !map) {
        h = err(-ENOMEM, "bus: out of memory");
        goto out;
    }
    h = b->regions++;
    b->region[h] = *r;
    remap(b);
out:
    pthread_rwlock_unlock(&b->lock);
    return h;
}

void bus_move(struct bus *b, int h, u64 base, u64 size)
{
    pthread_rwlock_wrlock(&b->lock);
    bug_on(h < 0 || h >= b->regions);
    b->region[h].base = base;
    b->region[h].size = size;
    remap(b);
    pthread_rwlock_unlock(&b->lock);
}

/* ---- accesses ---- */

static u64 width_mask(unsigned size)
{
    return size >= 8 ? UINT64_MAX : (1ull << (8 * size)) - 1;
}

/*
 * Finds who answers at addr: true and a copy of the region, or false for nobody. *room is how many bytes from addr on, less one, this
 * holds for: to the end of the region, or to the next span.
 */
static bool lookup(struct bus *b, u64 addr, struct region *r, u64 *room)
{
    int lo = 0, hi, hint = atomic_load_explicit(&b->hint, memory_order_relaxed);
    bool found = false;

    pthread_rwlock_rdlock(&b->lock);
    hi = b->spans;
    if (hint < hi && b->map[hint].first <= addr && addr <= b->map[hint].last) {
        lo = hint;
        found = true;
    } else {
        while (lo < hi) { /* ends with lo = number of the first span that ends at or after addr */
            int mid = lo + (hi - lo) / 2;

            if (b->map[mid].last < addr)
                lo = mid + 1;
            else
                hi = mid;
        }
        found = lo < b->spans && b->map[lo].first <= addr;
    }
    if (found) {
        *r = b->region[b->map[lo].h];
        *room = region_last(r) - addr;
        if (lo != hint)
            atomic_store_explicit(&b->hint, lo, memory_order_relaxed);
    } else {
        *room = lo < b->spans ? b->map[lo].first - addr - 1 : UINT64_MAX;
    }
    pthread_rwlock_unlock(&b->lock);
    return found;
}

/* One aligned piece of 1, 2, 4 or 8 bytes; if the region takes only wider ones, by way of the word around it. */
static void access_piece(const struct region *r, u64 off, unsigned size, bool write, u64 *val)
{
    u64 word_off = ALIGN_DOWN(off, MAX(size, r->min)), word;
    unsigned wide = MAX(size, r->min), shift = 8 * (unsigned)(off - word_off);

    if (!range_in(word_off, wide, r->size)) { /* a region that was moved to an odd size */
        *val = UINT64_MAX;
        return;
    }
    if (write && wide == size) {
        r->write(r->dev, off, *val & width_mask(size), size);
        return;
    }
    word = r->read(r->dev, word_off, wide);
    if (write) {
        word = (word & ~(width_mask(size) << shift)) | ((*val & width_mask(size)) << shift);
        r->write(r->dev, word_off, word & width_mask(wide), wide);
    } else {
        *val = word >> shift;
    }
}

static u64 access_region(const struct region *r, u64 off, unsigned size, bool write, u64 val)
{
    u64 result = 0;

    if (r->lock)
        pthread_mutex_lock(r->lock);
    for (unsigned done = 0, n; done < size; done += n, off += n) {
        u64 piece = val >> (8 * done);

        for (n = r->max; n > size - done || off % n; n /= 2)
            ;
        access_piece(r, off, n, write, &piece);
        result |= (piece & width_mask(n)) << (8 * done);
    }
    if (r->lock)
        pthread_mutex_unlock(r->lock);
    return result;
}

void bus_access(struct bus *b, u64 addr, unsigned size, bool write, u64 *val)
{
    u64 result = 0;

    for (unsigned done = 0, n; done < size; done += n) {
        u64 room, at = addr + done, piece = write ? *val >> (8 * done) : 0;
        struct region r;
        bool found = lookup(b, at, &r, &room);

        n = room >= size - done ? size - done : (unsigned)room + 1;
        if (found)
            piece = access_region(&r, at - r.base, n, write, piece);
        else if (b->parent)
            bus_access(b->parent, at, n, write, &piece);
        else
            piece = UINT64_MAX;
        result |= (piece & width_mask(n)) << (8 * done);
    }
    if (!write)
        *val = result;
}
