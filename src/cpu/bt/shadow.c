/*
 * The windowed shadow: contexts, fills, flushes. Model and rules: shadow.h; what is mapped where: shadow_map.c.
 *
 * Left out: 32-bit and PAE paging, 5-level paging, protection keys other than 0, user pages in the upper half (all of them go the interpreter's
 * way).
 * Locking: none. Other vCPUs change page tables while they are read here, as they do under a processor's walk: entries are read once and whole.
 */
#define _GNU_SOURCE
#include "cpu/bt/shadow.h"

#include <errno.h>
#include <sys/mman.h>

#include "base/err.h"
#include "cpu/bt/shadow_map.h"
#include "cpu/stats.h"

#define MAPPINGS_MIN 512u
#define MAPPINGS_MAX 32768u                                        /* per vCPU, also where the host would allow more */
#define WINDOWS_TOTAL 192u                                         /* of all vCPUs, of 255 for which a process has addresses */
#define WINDOWS_MIN 8u

static u64 cycles(void)
{
    return __builtin_ia32_rdtsc();
}

/* ---- what the guest's tables say ---- */
struct look {                                                      /* at 2 MiB */
    struct mmu_ctx ctx;
    struct mmu_leaves t;
    bool user;                                                     /* for a window of user pages */
};

static void look_begin(const struct icpu *c, struct look *k, bool user, bool open)
{
    const struct x86 *x = c->x;
    k->ctx.cr0 = x->cr0;
    k->ctx.cr3 = x->cr3;
    k->ctx.cr4 = x->cr4;
    k->ctx.efer = x->efer;
    k->ctx.pkru = c->pkru;
    k->ctx.phys_bits = (u8)cpuid_phys_bits(c->v->m->cpuid);
    k->ctx.no_1g_pages = !cpuid_has(c->v->m->cpuid, CPU_GBPAGES);
    k->ctx.user = user && !open;
    k->ctx.ac = open;
    k->user = user;
}

static u64 look_raw(const struct look *k, u64 la)
{
    return k->t.level == 1 ? __atomic_load_n(&k->t.entry[la >> PAGE_SHIFT & (REGION_PAGES - 1)], __ATOMIC_RELAXED) : k->t.large;
}

/* The entry that a cell may hold for la: the frame's address, with CELL_W if the guest may write there and has done so before; 0: none. */
static u64 look_entry(const struct look *k, u64 la, u64 raw)
{
    struct mmu_map map;
    if (!mmu_leaf(&k->ctx, &k->t, la, raw, &map) || map.user != k->user || (map.user && map.pkey && k->ctx.cr4 & CR4_PKE))
        return 0;
    return (raw & CELL_IMAGE & ~PTE_ADDR) | (map.gpa & PAGE_MASK) | (map.writable && map.dirty ? CELL_W : 0);
}

/* ---- what may be mapped of it ---- */
static bool is_code(const struct shadow *s, u64 gpa)
{
    return s->is_code && s->is_code(s->c, gpa);
}

/* While RAM is tracked (ram.h), a page is opened for writing by a write to it only, which is noted then. */
static bool may_write(const struct shadow *s, u64 la, u64 gpa)
{
    return !is_code(s, gpa) && (likely(!s->c->v->m->ram->tracked) || la == s->noted);
}

/* An entry with the rights that may be mapped now. */
static u64 permitted(const struct shadow *s, u64 la, u64 e)
{
    return e & CELL_W && !may_write(s, la, e & PTE_ADDR) ? e & ~CELL_W : e;
}

/* ---- comparing what is mapped with what the guest's tables say now ---- */
/*
 * What is dropped of a window: the books have forgotten it already, the host does so at the end, in few calls. Ranges may be joined over what is not mapped
 * in between.
 */
#define RANGES 32u
struct drops {                                                     /* in bytes from the window's beginning */
    u64 first, end;                                                /* all of them lie in here */
    unsigned n;
    struct { u64 first, end; } range[RANGES];
};

/* false: the host refused, so the window is empty now and its regions are gone. */
static bool drops_flush(struct shadow *s, struct shadow_window *w, struct drops *d)
{
    bool ok = true;
    if (d->n > 1 && !w->pages)                                     /* nothing else is in the window */
        ok = host_forget(s, w, w->canon + d->first, d->end - d->first);
    else
        for (unsigned i = 0; ok && i < d->n; i++)
            ok = host_forget(s, w, w->canon + d->range[i].first, d->range[i].end - d->range[i].first);
    d->n = 0;
    return ok;
}

static bool drops_add(struct shadow *s, struct shadow_window *w, struct drops *d, struct shadow_region *r, u64 la, unsigned n)
{
    u64 first = la - w->canon, end = first + n * PAGE_SIZE;
    u32 before = s->pages;
    pages_forget(s, r, la, n);
    s->stats.dropped += before - s->pages;
    if (d->n == RANGES && !drops_flush(s, w, d))
        return false;
    d->first = d->n ? MIN(d->first, first) : first;
    d->end = d->n ? MAX(d->end, end) : end;
    if (d->n && d->range[d->n - 1].end == first) {
        d->range[d->n - 1].end = end;
    } else if (d->n && d->range[d->n - 1].first == end) {
        d->range[d->n - 1].first = first;
    } else {
        d->range[d->n].first = first;
        d->range[d->n++].end = end;
    }
    return true;
}

static bool pages_downgrade(struct shadow *s, struct shadow_region *r, u64 la, unsigned n)
{
    u64 refused = s->stats.refused;
    s->stats.downgraded += n;
    pages_read_only(s, r, la, n);
    return refused == s->stats.refused;
}

enum verdict { KEEP, READ_ONLY, DROP };

/* What remains of a mapping made from an entry, now that the guest's says otherwise. */
static enum verdict judge(u64 old, u64 now)
{
    if (!now || (now ^ old) & PTE_ADDR)
        return DROP;
    return old & CELL_W && !(now & CELL_W) ? READ_ONLY : KEEP;
}

static bool block_compare(struct shadow *s, struct shadow_window *w, struct shadow_region *r, const struct look *k, struct drops *d)
{
    u64 now = k->t.level > 1 ? look_entry(k, r->la, k->t.large) : 0, old = r->block;
    s->stats.compared++;
    if (now == old && r->above == k->t.above)
        return true;
    enum verdict v = judge(old, now);
    if (v == DROP)
        return drops_add(s, w, d, r, r->la, REGION_PAGES);
    r->above = k->t.above;
    r->level = (u8)k->t.level;
    cell_refresh(s, r, r->la, (now & ~CELL_W) | (old & CELL_W));
    return v == KEEP || pages_downgrade(s, r, r->la, REGION_PAGES);
}

static bool cells_apply(struct shadow *s, struct shadow_window *w, struct shadow_region *r, enum verdict v, u64 la, u64 end, struct drops *d)
{
    unsigned n = (unsigned)((end - la) >> PAGE_SHIFT);
    if (!n || v == KEEP)
        return true;
    return v == DROP ? drops_add(s, w, d, r, la, n) : pages_downgrade(s, r, la, n);
}

static enum verdict cell_compare(struct shadow *s, struct shadow_region *r, const struct look *k, u64 la, bool same_above)
{
    u64 raw = look_raw(k, la), old = *cell(s, r, la);
    if (likely(same_above && !((raw ^ old) & CELL_IMAGE)))
        return KEEP;
    u64 now = look_entry(k, la, raw);
    enum verdict v = judge(old, now);
    if (v != DROP)
        cell_refresh(s, r, la, (now & ~CELL_W) | (old & CELL_W));
    return v;
}

/* Runs of pages with the same fate are one call of the host. Behind each the region may be gone, with the last page in it. */
static bool cells_compare(struct shadow *s, struct shadow_window *w, struct shadow_region *r, const struct look *k, u64 la, unsigned n, struct drops *d)
{
    bool same_above = k->t.level == 1 && r->above == k->t.above;
    enum verdict run = KEEP;
    u64 from = la, end = la + n * PAGE_SIZE;
    for (; la != end; la += PAGE_SIZE) {
        enum verdict v = run == DROP ? DROP : KEEP;                /* of what is not mapped: as it comes */
        if (*cell(s, r, la)) {
            s->stats.compared++;
            v = cell_compare(s, r, k, la, same_above);
        }
        if (v == run)
            continue;
        if (!cells_apply(s, w, r, run, from, la, d))
            return false;
        run = v;
        from = la;
    }
    return cells_apply(s, w, r, run, from, end, d);
}

/* Compares n pages from la on, or the whole region where more than single entries has changed. false: the window is empty now. */
static bool region_compare(struct shadow *s, struct shadow_window *w, struct shadow_region *r, struct look *k, u64 la, unsigned n, struct drops *d)
{
    if (!mmu_leaves(s->c->v->m->ram, &k->ctx, r->la, &k->t))
        return drops_add(s, w, d, r, r->la, REGION_PAGES);
    if (r->block)
        return block_compare(s, w, r, k, d);
    bool same = r->above == k->t.above && r->level == k->t.level;
    if (same)
        return cells_compare(s, w, r, k, la, n, d);
    bool ok = cells_compare(s, w, r, k, r->la, REGION_PAGES, d);
    r->above = k->t.above;                                         /* (of a free one, perhaps: no harm) */
    r->level = (u8)k->t.level;
    return ok;
}

static void window_compare(struct shadow *s, struct shadow_window *w, bool all)
{
    struct look k;
    struct drops d;
    d.n = 0;
    bool ok = true;
    look_begin(s->c, &k, w->owner < SHADOW_CONTEXTS, false);
    for (u32 i = w->regions, next; ok && i; i = next) {
        struct shadow_region *r = &s->region[i];
        next = r->next;
        if (all || r->nonglobal)
            ok = region_compare(s, w, r, &k, r->la, REGION_PAGES, &d);
    }
    if (ok)
        drops_flush(s, w, &d);
}

static void space_compare(struct shadow *s, unsigned owner, bool all)
{
    for (u64 m = s->space[owner].windows; m; m &= m - 1) {
        struct shadow_window *w = &s->window[__builtin_ctzll(m)];
        if (all || w->nonglobal)
            window_compare(s, w, all);
    }
    s->space[owner].stale = false;
}

/*
 * A page that has moved to another frame (copy on write) and may be mapped there at once: what the guest invalidates it has just prepared for use. False: not
 * the case.
 */
static bool page_moved(struct shadow *s, struct shadow_region *r, struct look *k, u64 la)
{
    if (r->block || !*cell(s, r, la) || !mmu_leaves(s->c->v->m->ram, &k->ctx, la, &k->t) || r->above != k->t.above || k->t.level != 1)
        return false;
    u64 e = permitted(s, la, look_entry(k, la, look_raw(k, la)));
    const struct ram_run *run = e ? ram_run_at(s->c->v->m->ram, e & PTE_ADDR) : NULL;
    if (!run || !((e ^ *cell(s, r, la)) & PTE_ADDR) || !cell_replace(s, r, la, e, run))
        return false;
    s->stats.moved++;
    return true;
}

/* One page, or all of a large one that it lies in. */
static void page_compare(struct shadow *s, struct shadow_window *w, u64 la)
{
    struct look k;
    struct drops d;
    d.n = 0;
    bool ok = true;
    la &= PAGE_MASK;
    look_begin(s->c, &k, w->owner < SHADOW_CONTEXTS, false);
    struct shadow_region *r = region_find(s, w, la);
    if (r && r->level < 3 && !(r->level == 1 && page_moved(s, r, &k, la)))
        ok = r->level == 1 ? region_compare(s, w, r, &k, la, 1, &d) : region_compare(s, w, r, &k, r->la, REGION_PAGES, &d);
    for (u32 i = w->huge ? w->regions : 0, next; ok && i; i = next) {
        r = &s->region[i];
        next = r->next;
        if (r->level == 3 && !((r->la ^ la) >> 30))
            ok = region_compare(s, w, r, &k, r->la, REGION_PAGES, &d);
    }
    if (ok)
        drops_flush(s, w, &d);
}

/* ---- what pays: constants, in cycles ---- */
#define SIGNAL_CYCLES 8000u                                        /* the host's part of a fill that is not measured here */
#define FILL_LONGEST 300000u                                       /* one that takes longer has lost its processor to somebody meanwhile */
#define MISS_CYCLES 25000u                                         /* so long has to run on the software TLB, for each miss of it, what a fill would have paid for */
#define RUN_MIN BIT(22)                                            /* nothing is decided on less */
#define RUN_LONG BIT(27)                                           /* what is longer ago counts half */
#define WAIT_FIRST BIT(21)                                         /* shorter lives are not worth a fill */
#define WAIT_MAX BIT(32)
#define FILLS_MAX 8192u
#define TROUBLE_FILLS 2u                                           /* what a page fault or flush of the guest costs the shadow */
#define WAIT_THRASHING BIT(28)
#define TROUBLE_MISSES 32u                                         /* misses that a page fault or flush of the guest excuses: they may be its doing */
#define AGAIN_MAX 512u                                             /* so many others are what the shadow would have had to fill once at most: its turn */
#define AHEAD_SHARE 16u                                            /* mapping ahead takes so much of an address space's time at most, should it all be in vain */
#define AHEAD_PIECE (64 * KiB)                                     /* what Linux maps of a file around a fault */
#define AHEAD_PAGES 64u                                            /* shorter runs are left to the host's own faults, */
#define AHEAD_RUNS 4u                                              /* and so are the first ones, unless it came by its misses */
#define REPLACED_PAGES 8u                                          /* whoever loses so many pages and all, or nearly all, is another address space at the same root */

static void score_leave(struct shadow_score *p, u64 wait)
{
    *p = (struct shadow_score){ .wait = MIN(wait, WAIT_MAX), .spare = p->spare };
}

/* It uses more than the host's mappings can hold: for a while it is better off with the software TLB, whatever else may be. */
static void score_thrashing(struct shadow_score *p)
{
    if (p->pays)
        score_leave(p, MAX(2 * p->wait, WAIT_THRASHING));
}

/* ---- contexts ---- */
static bool four_level(const struct x86 *x)
{
    return x->cr0 & CR0_PG && x->efer & EFER_LMA;
}

static bool use_global(const struct icpu *c)
{
    return c->x->cr4 & CR4_PGE;
}

void shadow_reset(struct icpu *c)
{
    struct shadow *s = c->bt.shadow;
    for (unsigned i = 0; i < SHADOW_WINDOWS; i++)
        window_release(s, &s->window[i]);
    for (unsigned i = 0; i < SHADOW_OWNERS; i++)
        s->space[i].stale = false;
    s->epoch = c->v->m->ram->epoch;
    s->clean_epoch = c->v->m->ram->clean_epoch;
    s->stats.resets++;
}

/* false: everything has been dropped, since nothing that was held can be compared with anything. */
static bool comparable(struct icpu *c, struct shadow *s)
{
    const struct ram *ram = c->v->m->ram;
    if (likely(four_level(c->x) && s->epoch == ram->epoch && s->clean_epoch == ram->clean_epoch))
        return true;
    shadow_reset(c);
    return false;
}

static void context_stale(struct shadow *s, unsigned ctx)
{
    s->space[ctx].stale = s->space[ctx].windows;
    s->space[SHADOW_LOW(ctx)].stale = s->space[SHADOW_LOW(ctx)].windows;
}

static void context_compare(struct shadow *s, unsigned ctx)
{
    space_compare(s, ctx, true);
    space_compare(s, SHADOW_LOW(ctx), true);
}

static void slots_update(struct shadow *s, u64 windows)
{
    for (u64 m = windows; m; m &= m - 1) {
        struct shadow_window *w = &s->window[__builtin_ctzll(m)];
        w->used = s->tick;
        window_deltas(s, w->slot);
    }
}

static unsigned user_pages(const struct shadow *s, unsigned ctx)
{
    unsigned n = 0;
    for (u64 m = s->space[ctx].windows; m; m &= m - 1)
        n += s->window[__builtin_ctzll(m)].pages;
    return n;
}

/* A root that has been freed is soon that of a new process: what it held before is gone then. */
static void stale_compare(struct icpu *c, struct shadow *s, unsigned ctx)
{
    unsigned before = user_pages(s, ctx);
    context_compare(s, ctx);
    if (before >= REPLACED_PAGES && user_pages(s, ctx) <= before / 8)
        shadow_started(c, ctx);
}

void shadow_context(struct icpu *c, unsigned ctx)
{
    struct shadow *s = c->bt.shadow;
    u64 start = cycles();
    bug_on(ctx >= SHADOW_CONTEXTS);
    s->stats.switches++;
    if (comparable(c, s)) {
        space_compare(s, SHADOW_SUPER, !use_global(c));
        if (s->space[ctx].stale || s->space[SHADOW_LOW(ctx)].stale)
            stale_compare(c, s, ctx);
    }
    if (ctx != s->current) {
        u64 before = s->space[s->current].windows | s->space[SHADOW_LOW(s->current)].windows;
        s->current = ctx;
        slots_update(s, before);
        s->tick++;
        slots_update(s, s->space[ctx].windows | s->space[SHADOW_LOW(ctx)].windows);
    }
    s->stats.flush_cycles += cycles() - start;
}

/* ---- flushes ---- */
static void others_stale(struct shadow *s)
{
    for (unsigned i = 0; i < SHADOW_CONTEXTS; i++)
        if (i != s->current)
            context_stale(s, i);
}

static void owner_flush_page(struct shadow *s, unsigned owner, u64 la)
{
    struct shadow_window *w = window_find(s, owner, la >> 39 & (SHADOW_SLOTS - 1));
    if (w)
        page_compare(s, w, la);
}

/* In all windows where la may be found now. */
static void flush_address(struct shadow *s, u64 la)
{
    if (la >> 63) {
        owner_flush_page(s, SHADOW_SUPER, la);
    } else {
        owner_flush_page(s, s->current, la);
        owner_flush_page(s, SHADOW_LOW(s->current), la);
    }
}

static void flush_page(struct shadow *s, u64 la)
{
    s->stats.page_flushes++;
    if (!tlb_canonical(la))
        return;
    flush_address(s, la);
    if (!(la >> 63) && s->context_globals)
        others_stale(s);
}

static void flush_context(struct icpu *c, struct shadow *s, unsigned ctx)
{
    s->stats.flushes++;
    if (ctx != s->current) {
        context_stale(s, ctx);
        return;
    }
    context_compare(s, ctx);
    space_compare(s, SHADOW_SUPER, !use_global(c));
}

void shadow_flush(struct icpu *c, enum tlb_flush what, u64 la, unsigned ctx)
{
    struct shadow *s = c->bt.shadow;
    u64 start = cycles();
    bug_on(ctx >= SHADOW_CONTEXTS);
    if (comparable(c, s)) {
        if (what == FLUSH_PAGE) {
            flush_page(s, la);
        } else if (what == FLUSH_NONGLOBAL) {
            flush_context(c, s, ctx);
        } else {
            s->stats.flushes++;
            others_stale(s);
            context_compare(s, s->current);
            space_compare(s, SHADOW_SUPER, true);
        }
    }
    s->stats.flush_cycles += cycles() - start;
}

void shadow_flush_in(struct icpu *c, u64 la, unsigned ctx)
{
    struct shadow *s = c->bt.shadow;
    bug_on(ctx >= SHADOW_CONTEXTS);
    if (ctx == s->current)
        shadow_flush(c, FLUSH_PAGE, la, ctx);
    else
        context_stale(s, ctx);
}

/* ---- fills ---- */
static void note_write(struct shadow *s, u64 la, u64 gpa, bool write)
{
    s->noted = write ? la & PAGE_MASK : ~0ull;
    if (write)
        ram_mark(s->c->v->m->ram, gpa, 1);
}

/* The entry that is to be mapped so many bytes from la, where raw and e are the guest's entry and what is made of it. Mostly it says the same of the next frame. */
static u64 next_entry(const struct shadow *s, const struct look *k, u64 la, u64 raw, u64 e, u64 distance)
{
    u64 next = look_raw(k, la + distance);
    if (likely(k->t.level == 1 && (next & CELL_IMAGE) == (raw & CELL_IMAGE) + distance))
        return permitted(s, la + distance, e + distance);
    return permitted(s, la + distance, look_entry(k, la + distance, next));
}

/* How far it came; what is not mapped (any more) is left out. */
static u64 touch(struct shadow *s, const struct shadow_window *w, u64 la, u64 end, u64 until)
{
    for (; la < end && cycles() < until && !atomic_load_explicit(&s->c->v->events, memory_order_relaxed); la = ALIGN_DOWN(la, AHEAD_PIECE) + AHEAD_PIECE)
        if (page_state(s, w, la)) {
            (void)*(const volatile u8 *)(uintptr_t)(w->base + (la - w->canon));
            s->stats.ahead++;
        }
    return la;
}

/*
 * The host maps the file of the guest's RAM a piece at a time, as it is used, and a program that has filled much memory by way of the software TLB meets
 * such a fault in every piece, wherever it reads next. So where it uses many long runs, all of each is touched at once, while the time
 * lasts that may be spent on it and until an event comes; the next one begins with what was left. These faults of the host are no sign that the
 * shadow does not pay: they are not in fill_cycles.
 */
static void map_ahead(struct shadow *s, const struct shadow_window *w, u64 la, unsigned n)
{
    struct shadow_score *p = &s->score[w->owner < SHADOW_CONTEXTS ? w->owner : SHADOW_SUPER];
    if (n < AHEAD_PAGES || w->owner >= SHADOW_CONTEXTS || p->runs++ < AHEAD_RUNS)
        return;
    u64 start = cycles(), until = start + p->spare, end = la + n * PAGE_SIZE;
    p->runs = AHEAD_RUNS;
    if (s->rest == w)
        touch(s, w, s->rest_la, s->rest_end, until);
    s->rest_la = touch(s, w, la, end, until);
    s->rest_end = end;
    s->rest = w;
    u64 spent = cycles() - start;
    p->spare -= MIN(spent, p->spare);
    s->stats.ahead_cycles += spent;
}

/* la is not mapped: with as many neighbours as have contiguous frames and the same rights. */
static enum shadow_result map_run(struct shadow *s, const struct look *k, struct shadow_region *r, u64 la, u64 raw, u64 e)
{
    const u64 *cells = cell(s, r, r->la), like = permitted(s, la, e) & (PTE_ADDR | CELL_W), gpa = e & PTE_ADDR;
    const struct ram_run *run = ram_run_at(s->c->v->m->ram, gpa);
    unsigned at = la >> PAGE_SHIFT & (REGION_PAGES - 1), lo = at, hi = at + 1;
    u64 back = MIN((gpa - run->gpa) >> PAGE_SHIFT, at), ahead = MIN((run->size - (gpa - run->gpa)) >> PAGE_SHIFT, REGION_PAGES - at);
    s->run[at] = permitted(s, la, e);
    for (u64 d = -PAGE_SIZE; at - lo < back && !cells[lo - 1]; lo--, d -= PAGE_SIZE)
        if (((s->run[lo - 1] = next_entry(s, k, la, raw, e, d)) & (PTE_ADDR | CELL_W)) != like + d)
            break;
    for (u64 d = PAGE_SIZE; hi - at < ahead && !cells[hi]; hi++, d += PAGE_SIZE)
        if (((s->run[hi] = next_entry(s, k, la, raw, e, d)) & (PTE_ADDR | CELL_W)) != like + d)
            break;
    if (!cells_map(s, r, r->la + lo * PAGE_SIZE, hi - lo, &s->run[lo], run))
        return SHADOW_SLOW;
    s->stats.pages += hi - lo;
    map_ahead(s, &s->window[r->window], r->la + lo * PAGE_SIZE, hi - lo);
    return SHADOW_FILLED;
}

/* What is mapped at la already has the same frame and can be read. */
static enum shadow_result upgrade(struct shadow *s, struct shadow_region *r, u64 la, u64 e)
{
    if (!pages_writable(s, r, la, 1))
        return SHADOW_SLOW;
    cell_refresh(s, r, la, e);
    s->stats.upgrades++;
    return SHADOW_FILLED;
}

static enum shadow_result fill_cells(struct shadow *s, struct shadow_window *w, const struct look *k, u64 la, bool write)
{
    struct shadow_region *r = region_find(s, w, la);
    u64 raw = look_raw(k, la), full = look_entry(k, la, raw), e = permitted(s, la, full);
    const struct ram_run *run = e ? ram_run_at(s->c->v->m->ram, e & PTE_ADDR) : NULL;
    if (!run || (write && !(e & CELL_W)))
        return SHADOW_SLOW;
    if (!r && !(r = region_new(s, w, la, true)))
        return SHADOW_SLOW;
    r->above = k->t.above;
    r->level = (u8)k->t.level;
    w->huge |= r->level == 3;
    u64 old = *cell(s, r, la);
    if (!old) {
        enum shadow_result result = map_run(s, k, r, la, raw, full);
        if (!r->pages)
            region_free(s, r);
        return result;
    }
    if ((old ^ e) & PTE_ADDR) {                                    /* another frame, and the guest has not told: it need not */
        s->stats.pages++;
        return cell_replace(s, r, la, e, run) ? SHADOW_FILLED : SHADOW_SLOW;
    }
    return write && !(old & CELL_W) ? upgrade(s, r, la, e) : SHADOW_SLOW;
}

/* The pages of a block that became writable which hold code, by the run. */
static void block_code(struct shadow *s, struct shadow_region *r, u64 gpa)
{
    u64 refused = s->stats.refused;
    for (unsigned i = 0, n; s->is_code && i < REGION_PAGES && refused == s->stats.refused; i += n) {
        bool code = is_code(s, gpa + i * PAGE_SIZE);
        for (n = 1; i + n < REGION_PAGES && is_code(s, gpa + (i + n) * PAGE_SIZE) == code; n++)
            continue;
        if (code)
            pages_read_only(s, r, r->la + i * PAGE_SIZE, n);
    }
}

/* A region that one large page of the guest fills, and one run of RAM. */
static enum shadow_result fill_block(struct shadow *s, struct shadow_window *w, const struct look *k, const struct ram_run *run, u64 la, u64 e, bool write)
{
    struct shadow_region *r = region_find(s, w, la);
    if (write && (!(e & CELL_W) || is_code(s, (e & PTE_ADDR) + (la & (REGION_SIZE - 1) & PAGE_MASK))))
        return SHADOW_SLOW;
    if (r && r->block & CELL_W)
        return write && pages_writable(s, r, la, 1) ? s->stats.upgrades++, SHADOW_FILLED : SHADOW_SLOW;
    if (r && !write)
        return SHADOW_SLOW;
    if (!r && !(r = region_new(s, w, la, false)))
        return SHADOW_SLOW;
    r->above = k->t.above;
    r->level = (u8)k->t.level;
    w->huge |= r->level == 3;
    s->stats.pages += REGION_PAGES;
    bool ok = block_map(s, r, e, run);
    if (ok && e & CELL_W)
        block_code(s, r, e & PTE_ADDR);
    else if (!ok && !r->pages)
        region_free(s, r);
    if (ok)
        map_ahead(s, w, ALIGN_DOWN(la, REGION_SIZE), REGION_PAGES);
    return ok ? SHADOW_FILLED : SHADOW_SLOW;
}

/* What was mapped in this region from another kind of table is compared before something is added. */
static void region_settle(struct shadow *s, struct shadow_window *w, struct look *k, u64 la)
{
    struct drops d;
    d.n = 0;
    struct shadow_region *r = region_find(s, w, la);
    if (!r || (r->above == k->t.above && r->level == k->t.level))
        return;
    if (region_compare(s, w, r, k, r->la, REGION_PAGES, &d))
        drops_flush(s, w, &d);
}

static bool block_fits(const struct look *k, const struct ram_run *run, u64 gpa)
{
    return k->t.level > 1 && run && gpa >= run->gpa && gpa - run->gpa <= run->size - REGION_SIZE && run->size >= REGION_SIZE;
}

static enum shadow_result fill_window(struct shadow *s, struct shadow_window *w, struct look *k, u64 la, bool write)
{
    w->used = s->tick;
    shadow_make_room(s, w);
    region_settle(s, w, k, la);
    if (!w->taken || !mmu_leaves(s->c->v->m->ram, &k->ctx, la, &k->t))
        return SHADOW_SLOW;
    if (k->t.level == 1)
        return fill_cells(s, w, k, la & PAGE_MASK, write);
    u64 e = look_entry(k, ALIGN_DOWN(la, REGION_SIZE), k->t.large);
    const struct ram_run *run = e ? ram_run_at(s->c->v->m->ram, e & PTE_ADDR) : NULL;
    struct shadow_region *r = region_find(s, w, la);
    if (block_fits(k, run, e & PTE_ADDR) && (!r || r->block) && likely(!s->c->v->m->ram->tracked))
        return fill_block(s, w, k, run, la, e, write);
    return r && r->block ? SHADOW_SLOW : fill_cells(s, w, k, la & PAGE_MASK, write);
}

/* Whose window a page belongs into that this view has walked to; SHADOW_OWNERS: none. */
static unsigned fill_owner(struct shadow *s, enum tlb_view_id view, u64 la, bool user)
{
    if (la >> 63)
        return user || view == VIEW_USER ? SHADOW_OWNERS : SHADOW_SUPER;
    if (user)
        return view == VIEW_SUPER ? SHADOW_OWNERS : s->current;
    if (view == VIEW_SUPER_OPEN && window_find(s, s->current, la >> 39))
        return SHADOW_OWNERS;                                      /* the user's window is open there */
    return SHADOW_LOW(s->current);
}

/* la is mapped as map says, and k knows its table. */
static enum shadow_result fill_page(struct shadow *s, struct look *k, enum tlb_view_id view, u64 la, bool write, const struct mmu_map *map)
{
    unsigned slot = la >> 39 & (SHADOW_SLOTS - 1), owner = fill_owner(s, view, la, map->user);
    if (owner == SHADOW_OWNERS)
        return SHADOW_SLOW;
    struct shadow_window *w = window_find(s, owner, slot);
    if (!w && !(w = window_take(s, owner, slot)))
        return SHADOW_SLOW;
    k->user = map->user;
    note_write(s, la, map->gpa, write);
    u64 trims = s->stats.trims;
    enum shadow_result r = fill_window(s, w, k, la, write);
    if (unlikely(s->stats.trims != trims))
        score_thrashing(&s->score[la >> 63 ? SHADOW_SUPER : s->current]);
    return r;
}

/* ---- pages that the guest has just made accessible ---- */
/*
 * Is a page used again after the access that faulted? (That one is made by the interpreter, since RF is set.) One fault in eight is not made good at once, to see
 * whether a fill follows. reuse is the share that did, of 256.
 */
#define SAMPLE_EVERY 8u
#define SAMPLE_AGE 24u                                             /* so many faults later it is given up */
#define REUSE_WORTH 160

static void sample_end(struct shadow *s, bool used)
{
    s->reuse += ((used ? 256 : 0) - s->reuse) / 8;
    s->sample = 0;
}

static void sample_filled(struct shadow *s, u64 la)
{
    if (unlikely(s->sample && !((s->sample ^ la) & PAGE_MASK)))
        sample_end(s, true);
}

static void expect(struct shadow *s, enum tlb_view_id view, u64 la, enum mmu_access access)
{
    u64 mark = (la & PAGE_MASK) | 1;                               /* not 0 */
    s->expected_view = view;
    s->expected_access = access;
    s->expected_context = s->current;
    s->c->bt.expected = s->reuse > REUSE_WORTH ? mark : 0;
    if (s->sample && s->sample_fault + SAMPLE_AGE < s->stats.faults)
        sample_end(s, false);
    if (!s->sample && s->stats.faults % SAMPLE_EVERY == 0) {
        s->sample = mark;
        s->sample_fault = s->stats.faults;
        s->c->bt.expected = 0;
    }
}

static enum shadow_result fill(struct icpu *c, struct shadow *s, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error)
{
    struct mmu_map map;
    struct look k;
    if (!tlb_canonical(la) || !comparable(c, s) || !shadow_possible(c))
        return SHADOW_SLOW;
    look_begin(c, &k, view == VIEW_USER, view == VIEW_SUPER_OPEN);
    u32 fault = mmu_walk(c->v->m->ram, &k.ctx, la, access, &map);
    if (fault) {                                                   /* SDM vol. 3A 4.10.4.1: it invalidates what was held for the address */
        *error = fault & ~MMU_FAULT;
        s->stats.faults++;
        flush_address(s, la);
        expect(s, view, la, access);
        return SHADOW_FAULT;
    }
    if (!mmu_leaves(c->v->m->ram, &k.ctx, la, &k.t))
        return SHADOW_SLOW;
    return fill_page(s, &k, view, la, access == MMU_WRITE, &map);
}

static u64 fill_clock(const struct shadow *s)                       /* stands still while something is mapped ahead */
{
    return cycles() - s->stats.ahead_cycles;
}

enum shadow_result shadow_fill(struct icpu *c, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error)
{
    struct shadow *s = c->bt.shadow;
    u64 start = fill_clock(s);
    enum shadow_result r = fill(c, s, view, la, access, error);
    if (r == SHADOW_FILLED)
        sample_filled(s, la);
    s->stats.fills += r == SHADOW_FILLED;
    s->stats.slow += r == SHADOW_SLOW;
    s->stats.fill_cycles += MIN(fill_clock(s) - start, FILL_LONGEST);
    return r;
}

void shadow_expected(struct icpu *c)
{
    struct shadow *s = c->bt.shadow;
    u64 start = fill_clock(s), la = c->bt.expected & PAGE_MASK;
    bool write = s->expected_access == MMU_WRITE;
    struct mmu_map map;
    struct look k;
    c->bt.expected = 0;
    if (s->expected_context != s->current || !comparable(c, s) || !shadow_possible(c) || c->v->m->ram->tracked)
        return;
    look_begin(c, &k, s->expected_view == VIEW_USER, s->expected_view == VIEW_SUPER_OPEN);
    if (!mmu_leaves(c->v->m->ram, &k.ctx, la, &k.t) || !mmu_leaf(&k.ctx, &k.t, la, look_raw(&k, la), &map))
        return;
    if (!mmu_allows(&k.ctx, &map, s->expected_access) && (!write || map.dirty) && fill_page(s, &k, s->expected_view, la, write, &map) == SHADOW_FILLED)
        s->stats.expected++;
    s->stats.fill_cycles += MIN(fill_clock(s) - start, FILL_LONGEST);
}

/* ---- code ---- */
static void protect_page(struct shadow *s, struct shadow_region *r, u64 la)
{
    if (!(page_state(s, &s->window[r->window], la) & 2))
        return;
    s->stats.protects++;
    pages_read_only(s, r, la, 1);
}

void shadow_protect(struct icpu *c, u64 gpa)
{
    struct shadow *s = c->bt.shadow;
    if (gpa == PROTECT_ALL) {
        shadow_reset(c);
        return;
    }
    shadow_aliases(s, gpa & PAGE_MASK, protect_page);
    shadow_make_room(s, NULL);
}

/* ---- what pays ---- */
void shadow_started(struct icpu *c, unsigned ctx)
{
    c->bt.shadow->score[ctx] = (struct shadow_score){ .pays = ctx == SHADOW_SUPER, .wait = ctx == SHADOW_SUPER ? 0 : WAIT_FIRST };
}

static void score_return(struct shadow_score *p, unsigned runs)
{
    *p = (struct shadow_score){ .pays = true, .wait = p->wait / 2, .spare = p->spare, .runs = runs };
}

/* On the shadow for now: more than a quarter of the time spent on it is too much, and what failed once has to wait twice as long. */
static void score_shadow(struct shadow_score *p, u64 cost)
{
    p->cost += cost;
    if (p->run < RUN_MIN)
        return;
    if (p->cost > p->run / 4) {
        score_leave(p, MAX(2 * p->wait, RUN_MIN));
    } else if (p->run > RUN_LONG) {
        p->run /= 2;
        p->cost /= 2;
        p->wait /= 2;
    }
}

static void score_software(struct shadow_score *p, u64 misses, u64 troubles)
{
    p->again += misses;
    p->again -= MIN(p->again, troubles * TROUBLE_MISSES);
    if (p->again >= AGAIN_MAX) {
        score_return(p, AHEAD_RUNS);
        return;
    }
    p->fills = MIN(p->fills + misses + troubles * TROUBLE_FILLS, FILLS_MAX); /* what thrashes the software TLB would be filled once */
    if (p->run < RUN_MIN / 4)
        return;
    if (p->run > p->wait + p->fills * MISS_CYCLES) {
        p->pays = true;
        p->run = p->fills = p->cost = 0;
    } else if (p->run > RUN_LONG) {
        p->run /= 2;
        p->fills /= 2;
        p->wait /= 2;
    }
}

void shadow_ran(struct icpu *c, unsigned ctx, u64 run, u64 misses, u64 troubles)
{
    struct shadow *s = c->bt.shadow;
    struct shadow_score *p = &s->score[ctx];
    bool paid = p->pays;
    u64 cost = s->stats.fill_cycles + s->stats.flush_cycles + (s->stats.fills + s->stats.faults + s->stats.slow) * SIGNAL_CYCLES;
    p->run += run;
    p->spare = MIN(p->spare + run / AHEAD_SHARE, WAIT_MAX);
    if (p->pays)
        score_shadow(p, cost - s->cost_seen);
    else
        score_software(p, misses, troubles);
    s->cost_seen = cost;
    s->stats.left += paid && !p->pays;
    s->stats.returns += !paid && p->pays;
}

void shadow_calm(struct icpu *c, unsigned ctx)
{
    struct shadow_score *p = &c->bt.shadow->score[ctx];
    if (p->pays)
        return;
    score_return(p, 0);
    c->bt.shadow->stats.returns++;
}

bool shadow_pays(const struct icpu *c, unsigned ctx)
{
    return c->bt.shadow && c->bt.shadow->score[ctx].pays;
}

/* ---- the rest ---- */
/* #AC is armed at CPL 3 only; key 0 is every page's but those that ask for another one. */
bool shadow_possible(const struct icpu *c)
{
    const struct x86 *x = c->x;
    if (!c->bt.shadow || !four_level(x) || c->tlb->watch)
        return false;
    if (c->cpl == 3 && x->cr0 & CR0_AM && c->flags & FLAG_AC)
        return false;
    return !(x->cr4 & CR4_PKE) || !(c->pkru & 3);
}

bool shadow_guest(const struct icpu *c, enum tlb_view_id view, u64 host, u64 *la)
{
    const struct shadow *s = c->bt.shadow;
    for (unsigned i = 0; i < SHADOW_WINDOWS; i++) {
        const struct shadow_window *w = &s->window[i];
        u64 off = host - w->base;
        if (!w->taken || off + WINDOW_GUARD - REGION_SIZE >= WINDOW_SIZE + 2 * (WINDOW_GUARD - REGION_SIZE) ||
            c->bt.delta[view][w->slot] != w->base - w->canon)
            continue;
        *la = w->canon + off;
        return true;
    }
    return false;
}

void shadow_stats(const struct icpu *c, struct shadow_stats *out)
{
    const struct shadow *s = c->bt.shadow;
    *out = s->stats;
    out->windows = 0;
    for (unsigned i = 0; i < SHADOW_WINDOWS; i++)
        out->windows += s->window[i].taken;
    out->regions = s->regions;
    out->mapped = s->pages;
    out->mappings = s->borders + out->windows;
}

void shadow_report(const struct icpu *c, struct stats *out)
{
    struct shadow_stats st;
    u64 khz = clock_tsc_khz(c->v->m->clock);
    if (!c->bt.shadow)
        return;
    shadow_stats(c, &st);
    stats_group(out, "shadow");
#define ROW(field, name) stats_u64(out, name, st.field);
    ROW(fills, "fills") ROW(expected, "fills-expected") ROW(pages, "pages") ROW(upgrades, "made-writable") ROW(slow, "slow") ROW(faults, "guest-faults")
    ROW(flushes, "flushes") ROW(page_flushes, "flushes-page") ROW(switches, "switches") ROW(compared, "compared") ROW(dropped, "dropped")
    ROW(downgraded, "made-read-only") ROW(moved, "moved") ROW(protects, "protected") ROW(evictions, "evictions") ROW(trims, "trimmed") ROW(refused, "refused")
    ROW(resets, "resets") ROW(left, "spaces-left") ROW(returns, "spaces-returned") ROW(ahead, "mapped-ahead") ROW(windows, "windows") ROW(regions, "regions") ROW(mapped, "mapped") ROW(mappings, "mappings")
#undef ROW
    stats_u64(out, "ahead-us", st.ahead_cycles * 1000 / khz);
    stats_u64(out, "fill-us", st.fill_cycles * 1000 / khz);        /* without the host's part of the fault */
    stats_u64(out, "flush-us", st.flush_cycles * 1000 / khz);
    stats_group_end(out);
}

static void *table(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static void table_close(void *p, size_t bytes)
{
    if (p)
        munmap(p, bytes);
}

static unsigned max_map_count(void)
{
    unsigned n = 65530;
    FILE *f = fopen("/proc/sys/vm/max_map_count", "re");
    if (f) {
        if (fscanf(f, "%u", &n) != 1)
            n = 65530;
        fclose(f);
    }
    return n;
}

static int tables_open(struct shadow *s)
{
    s->region = table(REGIONS * sizeof *s->region);
    s->cells = table(CELLS * sizeof *s->cells);
    s->cells_region = table(CELLS * sizeof *s->cells_region);
    s->region_top = s->cells_top = 1;
    return s->region && s->cells && s->cells_region && window_take(s, SHADOW_SUPER, SHADOW_SLOTS - 1) ? 0 : -ENOMEM;
}

static int no_room(const struct icpu *c)
{
    return err(-ENOMEM, "vCPU %u: the host gives no address space for a shadow of the guest's memory (ulimit -v?)", c->v->id);
}

int shadow_open(struct icpu *c, bool (*code)(const struct icpu *c, u64 gpa))
{
    struct shadow *s = table(sizeof *s);
    unsigned vcpus = MAX(c->v->m->vcpus, 1u);
    c->bt.shadow = s;
    if (!s)
        return no_room(c);
    for (unsigned view = 0; view < VIEWS; view++)
        for (unsigned slot = 0; slot < SHADOW_SLOTS; slot++)
            c->bt.delta[view][slot] = shadow_closed(slot);
    s->c = c;
    s->is_code = code;
    s->windows = MIN(MAX(WINDOWS_TOTAL / vcpus, WINDOWS_MIN), SHADOW_WINDOWS);
    s->limit = MIN(max_map_count() / 4 * 3 / vcpus, MAPPINGS_MAX);
    s->epoch = c->v->m->ram->epoch;
    s->reuse = 256;
    shadow_started(c, SHADOW_SUPER);
    if (s->limit >= MAPPINGS_MIN && !tables_open(s)) {
        shadow_reset(c);
        return 0;
    }
    shadow_close(c);
    return no_room(c);
}

void shadow_close(struct icpu *c)
{
    struct shadow *s = c->bt.shadow;
    if (!s)
        return;
    shadow_map_close(s);
    table_close(s->region, REGIONS * sizeof *s->region);
    table_close(s->cells, CELLS * sizeof *s->cells);
    table_close(s->cells_region, CELLS * sizeof *s->cells_region);
    table_close(s, sizeof *s);
    c->bt.shadow = NULL;
}
