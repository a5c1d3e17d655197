/*
 * The shadow's windows: address space, regions, cells, the chains by frame, and the calls to the host. Model: shadow_map.h.
 *
 * May run in the handler of a signal that translated code raised, and with the guest's vector registers live: system calls are made here directly, memory is not
 * allocated but taken from tables of fixed size, and nothing of libc is called. Locking: none, everything is the vCPU's own. Tables are mapped whole and
 * touched as they are used.
 */
#define _GNU_SOURCE
#include "cpu/bt/shadow_map.h"

#include <sys/mman.h>
#include <sys/syscall.h>

#include "cpu/interp/tlb.h"

/* ---- the host ---- */
static long host_call(long nr, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
    register u64 r10 asm("r10") = d;
    register u64 r8 asm("r8") = e;
    register u64 r9 asm("r9") = f;
    long r;
    asm volatile("syscall" : "=a"(r) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return r;
}

static bool host_failed(long r)
{
    return r < 0 && r >= -4095;
}

static bool host_closed(u64 hva, u64 len)                          /* nothing there, but nobody else may come there either */
{
    return !host_failed(host_call(SYS_mmap, hva, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, ~0ull, 0));
}

static bool host_file(u64 hva, u64 len, bool writable, const struct ram_run *run, u64 gpa)
{
    int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    return !host_failed(host_call(SYS_mmap, hva, len, (u64)prot, MAP_SHARED | MAP_FIXED, (u64)run->fd, run->offset + (gpa - run->gpa)));
}

static bool host_protect(u64 hva, u64 len, bool writable)
{
    return !host_failed(host_call(SYS_mprotect, hva, len, writable ? PROT_READ | PROT_WRITE : PROT_READ, 0, 0, 0));
}

static u64 host_at(const struct shadow_window *w, u64 la)
{
    return w->base + (la - w->canon);
}

/* ---- deltas ---- */
static u64 window_delta(struct shadow *s, unsigned owner, unsigned slot)
{
    const struct shadow_window *w = window_find(s, owner, slot);
    return w ? w->base - w->canon : shadow_closed(slot);
}

/* In VIEW_SUPER_OPEN, where one slot may have pages of both kinds, the user's window is the one that is open. */
void window_deltas(struct shadow *s, unsigned slot)
{
    struct icpu_bt *bt = &s->c->bt;
    u64 *user = &bt->delta[VIEW_USER][slot], *super = &bt->delta[VIEW_SUPER][slot], *open = &bt->delta[VIEW_SUPER_OPEN][slot];
    if (slot >= SHADOW_SLOTS / 2) {
        *super = *open = window_delta(s, SHADOW_SUPER, slot);
    } else {
        *user = window_delta(s, s->current, slot);
        *super = window_delta(s, SHADOW_LOW(s->current), slot);
        *open = *user == shadow_closed(slot) ? *super : *user;
    }
    bt->delta_changes++;
}

/* ---- chains by frame ---- */
static u32 alias_hash(u64 gpa)
{
    return (u32)(gpa >> PAGE_SHIFT ^ gpa >> 26) & 16383;
}

static u32 block_hash(u64 gpa)
{
    return (u32)(gpa >> 21 ^ gpa >> 31) & 1023;
}

static struct shadow_link *cell_link(struct shadow *s, u32 id)
{
    return &s->cells[id / REGION_PAGES].alias[id % REGION_PAGES];
}

static void alias_add(struct shadow *s, u32 id, u64 gpa)
{
    u32 *head = &s->alias[alias_hash(gpa)];
    *cell_link(s, id) = (struct shadow_link){ .next = *head };
    if (*head)
        cell_link(s, *head)->prev = id;
    *head = id;
}

static void alias_remove(struct shadow *s, u32 id, u64 gpa)
{
    struct shadow_link *l = cell_link(s, id);
    if (l->next)
        cell_link(s, l->next)->prev = l->prev;
    if (l->prev)
        cell_link(s, l->prev)->next = l->next;
    else
        s->alias[alias_hash(gpa)] = l->next;
}

static void block_alias_add(struct shadow *s, struct shadow_region *r)
{
    u32 id = (u32)(r - s->region), *head = &s->block_alias[block_hash(r->block & PTE_ADDR)];
    r->alias = (struct shadow_link){ .next = *head };
    if (*head)
        s->region[*head].alias.prev = id;
    *head = id;
}

static void block_alias_remove(struct shadow *s, struct shadow_region *r)
{
    if (r->alias.next)
        s->region[r->alias.next].alias.prev = r->alias.prev;
    if (r->alias.prev)
        s->region[r->alias.prev].alias.next = r->alias.next;
    else
        s->block_alias[block_hash(r->block & PTE_ADDR)] = r->alias.next;
}

/* A refusal of the host may have emptied a window meanwhile, and changed the chain: begin again. What has been done is not found again. */
void shadow_aliases(struct shadow *s, u64 gpa, void (*fn)(struct shadow *s, struct shadow_region *r, u64 la))
{
    u64 refused;
    do {
        refused = s->stats.refused;
        for (u32 id = s->alias[alias_hash(gpa)], next; id && refused == s->stats.refused; id = next) {
            u32 number = id / REGION_PAGES, i = id % REGION_PAGES;
            struct shadow_region *r = &s->region[s->cells_region[number]];
            next = cell_link(s, id)->next;
            if ((s->cells[number].e[i] & PTE_ADDR) == gpa)
                fn(s, r, r->la + i * PAGE_SIZE);
        }
        for (u32 id = s->block_alias[block_hash(gpa)], next; id && refused == s->stats.refused; id = next) {
            struct shadow_region *r = &s->region[id];
            next = r->alias.next;
            if ((r->block & PTE_ADDR) == ALIGN_DOWN(gpa, REGION_SIZE))
                fn(s, r, r->la + (gpa & (REGION_SIZE - 1)));
        }
    } while (refused != s->stats.refused);
}

/* ---- regions ---- */
static u32 region_hash(unsigned window, u64 la)
{
    return (u32)(la >> 21 ^ la >> 33 ^ window * 0x9e5) & 4095;
}

struct shadow_region *region_find(struct shadow *s, const struct shadow_window *w, u64 la)
{
    unsigned window = window_index(s, w);
    la = ALIGN_DOWN(la, REGION_SIZE);
    for (u32 i = s->hash[region_hash(window, la)]; i; i = s->region[i].hash_next)
        if (s->region[i].la == la && s->region[i].window == window)
            return &s->region[i];
    return NULL;
}

static void clear(void *p, size_t bytes)                           /* not libc's: it may use vector registers */
{
    size_t n = bytes / 8;
    asm volatile("rep stosq" : "+D"(p), "+c"(n) : "a"(0ull) : "memory");
}

static u32 cells_new(struct shadow *s, u32 region)
{
    u32 n = s->cells_list;
    if (n)
        s->cells_list = s->cells_region[n];
    else if (s->cells_top < CELLS)
        n = s->cells_top++;
    else
        return 0;
    clear(s->cells[n].e, sizeof s->cells[n].e);
    s->cells_region[n] = region;
    return n;
}

struct shadow_region *region_new(struct shadow *s, struct shadow_window *w, u64 la, bool cells)
{
    u32 n = s->region_list ? s->region_list : s->region_top, number = 0;
    if (n == REGIONS || (cells && !(number = cells_new(s, n))))
        return NULL;
    struct shadow_region *r = &s->region[n];
    if (n == s->region_list)
        s->region_list = r->next;
    else
        s->region_top++;
    clear(r, sizeof *r);
    r->la = ALIGN_DOWN(la, REGION_SIZE);
    r->window = (u16)window_index(s, w);
    r->cells = number;
    s->regions++;
    w->cells += number != 0;
    u32 *head = &s->hash[region_hash(r->window, r->la)];
    r->hash_next = *head;
    *head = n;
    r->next = w->regions;
    if (r->next)
        s->region[r->next].prev = n;
    w->regions = n;
    return r;
}

void region_free(struct shadow *s, struct shadow_region *r)
{
    u32 n = (u32)(r - s->region), *p = &s->hash[region_hash(r->window, r->la)];
    while (*p != n)
        p = &s->region[*p].hash_next;
    *p = r->hash_next;
    if (r->next)
        s->region[r->next].prev = r->prev;
    if (r->prev)
        s->region[r->prev].next = r->next;
    else
        s->window[r->window].regions = r->next;
    if (r->cells) {
        s->window[r->window].cells--;
        s->cells_region[r->cells] = s->cells_list;
        s->cells_list = r->cells;
    }
    s->regions--;
    r->next = s->region_list;
    s->region_list = n;
}

/* ---- how many mappings the host has ---- */
/* Cells number 0 belong to nobody and are empty: those of a region that has no block any more. */
static u64 state_in(struct shadow *s, const struct shadow_region *r, u64 la)
{
    unsigned i = la >> PAGE_SHIFT & (REGION_PAGES - 1);
    if (!r)
        return 0;
    if (!r->block) {
        u64 e = s->cells[r->cells].e[i];
        return e ? (e & PTE_ADDR) | 1 | (e & CELL_W ? 2 : 0) : 0;
    }
    bool writable = r->block & CELL_W && !(r->ro[i / 64] >> (i & 63) & 1);
    return ((r->block & PTE_ADDR) + i * PAGE_SIZE) | 1 | (writable ? 2 : 0);
}

u64 page_state(struct shadow *s, const struct shadow_window *w, u64 la)
{
    return state_in(s, region_find(s, w, la), la);
}

/*
 * Borders at la, la + 1 page ... la + n pages, as the host sees them: it joins neighbours that are alike and contiguous in the file. (Runs of RAM that touch
 * each other are different files; there are too few of them to matter.)
 */
static unsigned borders(struct shadow *s, const struct shadow_region *r, u64 la, unsigned n)
{
    const struct shadow_window *w = &s->window[r->window];
    unsigned count = 0;
    u64 before = la == r->la ? page_state(s, w, la - PAGE_SIZE) : state_in(s, r, la - PAGE_SIZE);
    for (unsigned i = 0; i <= n; i++, la += PAGE_SIZE) {
        u64 state = la - r->la == REGION_SIZE ? page_state(s, w, la) : state_in(s, r, la);
        count += state ? state != before + PAGE_SIZE : before != 0;
        before = state;
    }
    return count;
}

/* Around a change of the books. */
static void recount(struct shadow *s, struct shadow_region *r, u64 la, unsigned n, unsigned before)
{
    unsigned change = borders(s, r, la, n) - before;               /* may be negative: modulo 2^32 */
    s->window[r->window].borders += change;
    s->borders += change;
}

/* ---- the books ---- */
static void count_pages(struct shadow *s, struct shadow_region *r, u64 e, unsigned n, bool more)
{
    struct shadow_window *w = &s->window[r->window];
    unsigned change = more ? n : -n, nonglobal = e & PTE_G ? 0 : change;
    r->pages = (u16)(r->pages + change);
    w->pages += change;
    s->pages += change;
    r->nonglobal = (u16)(r->nonglobal + nonglobal);
    w->nonglobal += nonglobal;
    if (w->owner != SHADOW_SUPER)
        s->context_globals += change - nonglobal;
}

static void cell_set(struct shadow *s, struct shadow_region *r, unsigned i, u64 e)
{
    u64 *p = &s->cells[r->cells].e[i];
    u32 id = r->cells * REGION_PAGES + i;
    if (*p) {
        count_pages(s, r, *p, 1, false);
        if (*p & CELL_W)
            alias_remove(s, id, *p & PTE_ADDR);
    }
    *p = e;
    if (e) {
        count_pages(s, r, e, 1, true);
        if (e & CELL_W)
            alias_add(s, id, e & PTE_ADDR);
    }
}

static void block_set(struct shadow *s, struct shadow_region *r, u64 e)
{
    if (r->block) {
        count_pages(s, r, r->block, REGION_PAGES, false);
        if (r->block & CELL_W)
            block_alias_remove(s, r);
    }
    r->block = e;
    if (e) {
        count_pages(s, r, e, REGION_PAGES, true);
        if (e & CELL_W)
            block_alias_add(s, r);
    }
}

static void ro_set(struct shadow_region *r, u64 la, unsigned n, bool ro)
{
    for (unsigned i = la >> PAGE_SHIFT & (REGION_PAGES - 1), end = i + n; i < end; i++) {
        u64 bit = BIT(i & 63), *p = &r->ro[i / 64];
        *p = ro ? *p | bit : *p & ~bit;
    }
}

/* Cells get this entry (0: none), or their own with other rights; of all pages in a block. */
static void books_writable(struct shadow *s, struct shadow_region *r, u64 la, unsigned n, bool writable)
{
    unsigned before = borders(s, r, la, n), first = la >> PAGE_SHIFT & (REGION_PAGES - 1);
    if (r->block && n == REGION_PAGES) {
        block_set(s, r, writable ? r->block | CELL_W : r->block & ~CELL_W);
        clear(r->ro, sizeof r->ro);
    } else if (r->block) {
        ro_set(r, la, n, !writable);
    } else {
        for (unsigned i = first; i < first + n; i++) {
            u64 e = s->cells[r->cells].e[i];
            cell_set(s, r, i, writable ? e | CELL_W : e & ~CELL_W);
        }
    }
    recount(s, r, la, n, before);
}

/* The same frame with the same rights, by an entry that looks otherwise now. */
void cell_refresh(struct shadow *s, struct shadow_region *r, u64 la, u64 e)
{
    if (r->block)
        block_set(s, r, e);
    else
        cell_set(s, r, la >> PAGE_SHIFT & (REGION_PAGES - 1), e);
}

void pages_forget(struct shadow *s, struct shadow_region *r, u64 la, unsigned n)
{
    unsigned before = borders(s, r, la, n), first = la >> PAGE_SHIFT & (REGION_PAGES - 1);
    if (r->block)
        block_set(s, r, 0);
    else
        for (unsigned i = first; i < first + n; i++)
            cell_set(s, r, i, 0);
    clear(r->ro, sizeof r->ro);
    recount(s, r, la, n, before);
    if (!r->pages)
        region_free(s, r);
}

/* ---- changes ---- */
/* The host would not take rights away in parts (it has no memory for more mappings): then everything goes. */
static void window_clear(struct shadow *s, struct shadow_window *w);

static void refused(struct shadow *s, struct shadow_window *w)
{
    s->stats.refused++;
    window_clear(s, w);
}

/* Borders at the ends of n pages from la on whose first and last have these states. */
static unsigned ends(struct shadow *s, const struct shadow_region *r, u64 la, unsigned n, u64 first, u64 last)
{
    const struct shadow_window *w = &s->window[r->window];
    u64 end = la + n * PAGE_SIZE;
    u64 before = la == r->la ? page_state(s, w, la - PAGE_SIZE) : state_in(s, r, la - PAGE_SIZE);
    u64 behind = end - r->la == REGION_SIZE ? page_state(s, w, end) : state_in(s, r, end);
    return (first ? first != before + PAGE_SIZE : before != 0) + (behind ? behind != last + PAGE_SIZE : last != 0);
}

static void border_change(struct shadow *s, const struct shadow_region *r, unsigned change)
{
    s->window[r->window].borders += change;
    s->borders += change;
}

bool cells_map(struct shadow *s, struct shadow_region *r, u64 la, unsigned n, const u64 *e, const struct ram_run *run)
{
    unsigned first = la >> PAGE_SHIFT & (REGION_PAGES - 1), nonglobal = 0;
    struct shadow_window *w = &s->window[r->window];
    u64 *cells = s->cells[r->cells].e;
    if (!host_file(host_at(w, la), n * PAGE_SIZE, e[0] & CELL_W, run, e[0] & PTE_ADDR))
        return false;
    unsigned before = ends(s, r, la, n, 0, 0);
    for (unsigned i = 0; i < n; i++) {
        cells[first + i] = e[i];
        nonglobal += !(e[i] & PTE_G);
    }
    if (e[0] & CELL_W)
        for (unsigned i = 0; i < n; i++)
            alias_add(s, r->cells * REGION_PAGES + first + i, e[i] & PTE_ADDR);
    count_pages(s, r, 0, nonglobal, true);
    count_pages(s, r, PTE_G, n - nonglobal, true);
    border_change(s, r, ends(s, r, la, n, state_in(s, r, la), state_in(s, r, la + (n - 1) * PAGE_SIZE)) - before);
    return true;
}

bool cell_replace(struct shadow *s, struct shadow_region *r, u64 la, u64 e, const struct ram_run *run)
{
    if (!host_file(host_at(&s->window[r->window], la), PAGE_SIZE, e & CELL_W, run, e & PTE_ADDR))
        return false;
    unsigned before = borders(s, r, la, 1);
    cell_set(s, r, la >> PAGE_SHIFT & (REGION_PAGES - 1), e);
    recount(s, r, la, 1, before);
    return true;
}

bool block_map(struct shadow *s, struct shadow_region *r, u64 e, const struct ram_run *run)
{
    struct shadow_window *w = &s->window[r->window];
    if (!host_file(host_at(w, r->la), REGION_SIZE, e & CELL_W, run, e & PTE_ADDR))
        return false;
    unsigned before = r->block ? borders(s, r, r->la, REGION_PAGES) : ends(s, r, r->la, REGION_PAGES, 0, 0);
    block_set(s, r, e);
    clear(r->ro, sizeof r->ro);
    border_change(s, r, ends(s, r, r->la, REGION_PAGES, state_in(s, r, r->la), state_in(s, r, r->la + REGION_SIZE - PAGE_SIZE)) - before);
    return true;
}

bool pages_writable(struct shadow *s, struct shadow_region *r, u64 la, unsigned n)
{
    if (!host_protect(host_at(&s->window[r->window], la), n * PAGE_SIZE, true))
        return false;
    books_writable(s, r, la, n, true);
    return true;
}

void pages_read_only(struct shadow *s, struct shadow_region *r, u64 la, unsigned n)
{
    struct shadow_window *w = &s->window[r->window];
    if (host_protect(host_at(w, la), n * PAGE_SIZE, false))
        books_writable(s, r, la, n, false);
    else
        refused(s, w);
}

bool host_forget(struct shadow *s, struct shadow_window *w, u64 la, u64 len)
{
    if (host_closed(host_at(w, la), len))
        return true;
    refused(s, w);
    return false;
}

void pages_unmap(struct shadow *s, struct shadow_region *r, u64 la, unsigned n)
{
    struct shadow_window *w = &s->window[r->window];
    if (host_forget(s, w, la, n * PAGE_SIZE))
        pages_forget(s, r, la, n);
}

/* ---- windows ---- */
struct shadow_window *window_find(struct shadow *s, unsigned owner, unsigned slot)
{
    for (u64 m = s->space[owner].windows; m; m &= m - 1) {
        struct shadow_window *w = &s->window[__builtin_ctzll(m)];
        if (w->slot == slot)
            return w;
    }
    return NULL;
}

/* Also where the books know of nothing: they may be ahead of the host. */
static void window_clear(struct shadow *s, struct shadow_window *w)
{
    bool gone = host_closed(w->base, WINDOW_SIZE);
    while (w->regions) {
        struct shadow_region *r = &s->region[w->regions];
        if (r->block)
            block_set(s, r, 0);
        else
            for (unsigned i = 0; i < REGION_PAGES; i++)
                cell_set(s, r, i, 0);
        region_free(s, r);
    }
    s->borders -= w->borders;
    w->borders = 0;
    if (!gone) {                                                   /* not even that: nobody comes here any more */
        window_release(s, w);
        w->base = 0;
        s->windows--;
    }
}

void window_empty(struct shadow *s, struct shadow_window *w)
{
    if (w->regions)
        window_clear(s, w);
}

void window_release(struct shadow *s, struct shadow_window *w)
{
    if (!w->taken)
        return;
    s->space[w->owner].windows &= ~BIT(window_index(s, w));
    w->taken = false;
    window_deltas(s, w->slot);
    window_empty(s, w);
}

static bool window_reserve(struct shadow_window *w)
{
    u64 len = WINDOW_SIZE + 2 * WINDOW_GUARD;
    long p = host_call(SYS_mmap, 0, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, ~0ull, 0);
    if (host_failed(p))
        return false;
    w->reserved = (u64)p;
    w->base = ALIGN_DOWN((u64)p + WINDOW_GUARD, REGION_SIZE);
    return true;
}

/* The one that has not been used for longest, but not this one. */
static struct shadow_window *window_oldest(struct shadow *s, const struct shadow_window *except, unsigned borders_min)
{
    struct shadow_window *old = NULL;
    for (unsigned i = 0; i < SHADOW_WINDOWS; i++) {
        struct shadow_window *w = &s->window[i];
        if (w->taken && w != except && w->borders >= borders_min && (!old || w->used < old->used))
            old = w;
    }
    return old;
}

static bool room(const struct shadow *s)
{
    return s->borders + 2 * s->windows < s->limit && (s->region_list || s->region_top < REGIONS) && (s->cells_list || s->cells_top < CELLS);
}

/* The quarter of a window's regions that is oldest goes: what is used comes back soon. */
static void window_trim(struct shadow *s, struct shadow_window *w)
{
    u64 refused = s->stats.refused;
    unsigned n = 0, keep = 0;
    s->stats.trims++;
    for (u32 i = w->regions; i; i = s->region[i].next)
        n++;
    if (n < 4) {
        window_empty(s, w);
        return;
    }
    for (u32 i = w->regions, next; i && refused == s->stats.refused; i = next) {
        next = s->region[i].next;                                  /* new ones are at the list's head */
        if (++keep > n - n / 4)
            pages_unmap(s, &s->region[i], s->region[i].la, REGION_PAGES);
    }
}

/* Windows that were not used for long go, unless this one has most of everything itself. */
void shadow_make_room(struct shadow *s, struct shadow_window *w)
{
    while (unlikely(!room(s))) {
        bool greedy = w && (w->borders > s->limit / 2 || w->cells > CELLS / 2);
        struct shadow_window *old = greedy ? NULL : window_oldest(s, w, 1);
        s->stats.evictions++;
        if (old)
            window_release(s, old);
        else if (w && w->regions)
            window_trim(s, w);
        else
            return;
    }
}

struct shadow_window *window_take(struct shadow *s, unsigned owner, unsigned slot)
{
    struct shadow_window *w = NULL, *unreserved = NULL;
    unsigned reserved = 0;
    for (unsigned i = 0; i < SHADOW_WINDOWS; i++) {
        struct shadow_window *x = &s->window[i];
        reserved += x->base != 0;
        if (x->base && !x->taken)
            w = x;
        if (!x->base)
            unreserved = x;
    }
    if (!w && unreserved && reserved < s->windows && window_reserve(unreserved))
        w = unreserved;
    if (!w && (w = window_oldest(s, NULL, 0))) {
        s->stats.evictions++;
        window_release(s, w);
    }
    if (!w || !w->base)
        return NULL;
    w->taken = true;
    w->huge = false;
    w->owner = (u8)owner;
    w->slot = (u16)slot;
    w->canon = shadow_slot_base(slot);
    w->used = ++s->tick;
    s->space[owner].windows |= BIT(window_index(s, w));
    window_deltas(s, slot);
    return w;
}

void shadow_map_close(struct shadow *s)
{
    for (unsigned i = 0; i < SHADOW_WINDOWS; i++)
        if (s->window[i].base)
            host_call(SYS_munmap, s->window[i].reserved, WINDOW_SIZE + 2 * WINDOW_GUARD, 0, 0, 0, 0);
}
