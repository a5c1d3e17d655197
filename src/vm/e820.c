/* The memory map: RAM less what is reserved, sorted; and places in it. See e820.h. No locking: a plain value. */
#include "vm/e820.h"

#include <errno.h>
#include <string.h>

#include "base/err.h"

static int add(struct e820 *map, u64 base, u64 size, u32 type)
{
    if (!size)
        return 0;
    if (map->n == E820_MAX)
        return err(-E2BIG, "the guest's memory has more pieces than a memory map can list (%d)", E820_MAX);
    map->entry[map->n++] = (struct e820_entry){ base, size, type };
    return 0;
}

static int by_base(const void *a, const void *b)
{
    const struct e820_entry *x = a, *y = b;
    return x->base < y->base ? -1 : x->base > y->base;
}

/* What of [base, end) is not reserved. hole: sorted by base. */
static int add_ram(struct e820 *map, u64 base, u64 end, const struct e820_entry *hole, unsigned holes)
{
    int rc = 0;

    for (unsigned i = 0; i < holes && !rc; i++) {
        u64 hole_end = hole[i].base + hole[i].size;
        if (hole_end <= base || hole[i].base >= end)
            continue;
        if (hole[i].base > base)
            rc = add(map, base, hole[i].base - base, E820_RAM);
        base = MIN(hole_end, end);
    }
    return rc ? rc : add(map, base, end - base, E820_RAM);
}

static void merge(struct e820 *map)
{
    unsigned n = 0;

    for (unsigned i = 0; i < map->n; i++) {
        struct e820_entry *last = n ? &map->entry[n - 1] : NULL;
        if (last && last->type == map->entry[i].type && last->base + last->size == map->entry[i].base)
            last->size += map->entry[i].size;
        else
            map->entry[n++] = map->entry[i];
    }
    map->n = n;
}

int e820_build(struct e820 *map, const struct ram *ram, const struct e820_entry *reserved, unsigned n)
{
    struct e820_entry hole[E820_MAX];
    int rc = 0;

    map->n = 0;
    if (n > E820_MAX)
        return err(-E2BIG, "too many reserved ranges of memory: %u", n);
    memcpy(hole, reserved, n * sizeof *hole);
    qsort(hole, n, sizeof *hole, by_base);
    for (unsigned i = 0; i < ram->runs && !rc; i++)
        rc = add_ram(map, ram->run[i].gpa, ram->run[i].gpa + ram->run[i].size, hole, n);
    for (unsigned i = 0; i < n && !rc; i++)
        rc = add(map, hole[i].base, hole[i].size, hole[i].type);
    if (rc)
        return rc;
    qsort(map->entry, map->n, sizeof *map->entry, by_base);
    merge(map);
    return 0;
}

u64 e820_place(const struct e820 *map, u64 floor, u64 limit, u64 size, u64 align, bool highest)
{
    u64 found = 0;

    for (unsigned i = 0; i < map->n; i++) {
        const struct e820_entry *e = &map->entry[i];
        u64 base = MAX(e->base, floor), end = MIN(e->base + e->size, limit);
        if (e->type != E820_RAM || base >= end || base > ~0ull - align)
            continue;
        u64 low = ALIGN_UP(base, align);
        if (low >= end || end - low < size)
            continue;
        if (!highest)
            return low;
        found = ALIGN_DOWN(end - size, align);
    }
    return found;
}

bool e820_usable(const struct e820 *map, u64 base, u64 size)
{
    for (unsigned i = 0; i < map->n; i++) {
        const struct e820_entry *e = &map->entry[i];
        if (e->type == E820_RAM && base >= e->base && range_in(base - e->base, size, e->size))
            return true;
    }
    return false;
}
