/* The lists of a debugger's breakpoints and watchpoints (debug.h). */
#include "cpu/debug.h"

#include <errno.h>
#include <string.h>

/* The first breakpoint at or behind la. */
static unsigned lower_bound(const struct debug *d, u64 la)
{
    unsigned low = 0, high = d->points;
    while (low < high) {
        unsigned mid = (low + high) / 2;
        if (d->point[mid] < la)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

bool debug_point_at(const struct debug *d, u64 la)
{
    unsigned i = lower_bound(d, la);
    return i < d->points && d->point[i] == la;
}

/* By distances, so that ranges at the end of the address space do not wrap. */
static bool overlaps(const struct debug_watch *w, u64 la, u64 n)
{
    return la >= w->la ? la - w->la < w->len : w->la - la < n;
}

const struct debug_watch *debug_watch_at(const struct debug *d, u64 la, u64 n, enum debug_access access)
{
    for (unsigned i = 0; i < d->watches; i++)
        if (d->watch[i].access & access && overlaps(&d->watch[i], la, n))
            return &d->watch[i];
    return NULL;
}

int debug_add_point(struct debug *d, u64 la)
{
    unsigned i = lower_bound(d, la);
    if (i < d->points && d->point[i] == la)
        return 0;
    if (d->points == DEBUG_POINTS_MAX)
        return -ENOSPC;
    memmove(&d->point[i + 1], &d->point[i], (d->points - i) * sizeof(d->point[0]));
    d->point[i] = la;
    d->points++;
    d->generation++;
    return 0;
}

void debug_del_point(struct debug *d, u64 la)
{
    unsigned i = lower_bound(d, la);
    if (i == d->points || d->point[i] != la)
        return;
    d->points--;
    memmove(&d->point[i], &d->point[i + 1], (d->points - i) * sizeof(d->point[0]));
    d->generation++;
}

static unsigned find_watch(const struct debug *d, const struct debug_watch *w)
{
    unsigned i = 0;
    while (i < d->watches && (d->watch[i].la != w->la || d->watch[i].len != w->len || d->watch[i].access != w->access))
        i++;
    return i;
}

int debug_add_watch(struct debug *d, const struct debug_watch *w)
{
    unsigned i = find_watch(d, w);
    if (i < d->watches)
        return 0;
    if (i == DEBUG_POINTS_MAX)
        return -ENOSPC;
    d->watch[d->watches++] = *w;
    d->generation++;
    return 0;
}

void debug_del_watch(struct debug *d, const struct debug_watch *w)
{
    unsigned i = find_watch(d, w);
    if (i == d->watches)
        return;
    d->watch[i] = d->watch[--d->watches];
    d->generation++;
}
