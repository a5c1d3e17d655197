/*
 * The interpreter's TLB: filling, flushing, choosing the view. Model: tlb.h; SDM vol. 3A 4.10 says what may stay and what must go.
 *
 * Locking: none, one vCPU's thread.
 */
#include "cpu/interp/tlb.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "base/err.h"
#include "cpu/bt/codepage.h"
#include "cpu/interp/code.h"

#define KEY_CR0 (CR0_PG | CR0_WP | CR0_PE)
#define KEY_CR4 (CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_PCIDE)
#define KEY_EFER (EFER_LMA | EFER_NXE)

#define COMMON 0                                                   /* in tlb.views */
#define MANY_DROPS 16                                              /* changes of context at the cost of many supervisor entries, until each context gets its own */
#define LARGE_PAGES 512u                                           /* of 4 KiB in 2 MiB */

static unsigned slot_of(u64 la)
{
    return la >> PAGE_SHIFT & (TLB_SIZE - 1);
}

static unsigned upper_half(u64 la)
{
    return la >> 63;
}

static void entry_clear(struct tlb_entry *e)
{
    e->tag[MMU_READ] = e->tag[MMU_WRITE] = e->tag[MMU_EXEC] = TLB_INVALID;
}

/* Takes slot off the list too; the caller puts the list in order. */
static void slot_drop(struct tlb_view *v, unsigned slot)
{
    entry_clear(&v->e[slot]);
    v->page[slot] = 0;
}

static void view_clear(struct tlb_view *v)
{
    for (unsigned i = 0; i < v->n; i++)
        slot_drop(v, v->filled[i]);
    v->n = 0;
    v->global[0] = v->global[1] = false;
}

static void view_clear_nonglobal(struct tlb_view *v)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < v->n; i++) {
        unsigned slot = v->filled[i];
        if (v->page[slot] & TLB_GLOBAL)
            v->filled[kept++] = (u16)slot;
        else
            slot_drop(v, slot);
    }
    v->n = kept;
}

/* The only two entries that zero would match: page 0, and what begins in the last page and ends in page 0. */
static void view_init(struct tlb_view *v)
{
    entry_clear(&v->e[0]);
    entry_clear(&v->e[TLB_SIZE - 1]);
}

/* ---- contexts ---- */
static struct tlb_view *view_of(struct tlb *t, unsigned context, enum tlb_view_id view)
{
    return view == VIEW_SUPER && !t->local ? &t->views[COMMON] : &t->views[1 + context * VIEWS + view];
}

static void fast_view(struct icpu *c)
{
    struct tlb *t = c->tlb;
    c->view = c->cpl == 3 && c->flags & FLAG_AC && c->x->cr0 & CR0_AM ? t->none.e : unlikely(c->log) ? t->slow.e : t->view[t->cur]->e;
}

static void context_choose(struct icpu *c, unsigned context)
{
    struct tlb *t = c->tlb;
    t->context = context;
    t->ctx[context].last = ++t->switches;
    for (unsigned i = 0; i < VIEWS; i++)
        t->view[i] = view_of(t, context, i);
    fast_view(c);
}

static u16 current_pcid(const struct icpu *c)
{
    return c->x->cr4 & CR4_PCIDE ? c->x->cr3 & 0xfff : 0;
}

static unsigned context_find(const struct tlb *t, u64 pcid)
{
    for (unsigned i = 0; i < TLB_CONTEXTS; i++)
        if (t->ctx[i].used && t->ctx[i].pcid == pcid)
            return i;
    return TLB_EVERY;
}

static void context_take(struct icpu *c, unsigned context)
{
    struct tlb *t = c->tlb;
    t->ctx[context] = (struct tlb_context){ .used = true, .pcid = current_pcid(c), .root = c->x->cr3 & PAGE_MASK, .generation = ++t->generations };
}

static void context_clear(struct tlb *t, unsigned context)
{
    for (unsigned i = 0; i < VIEWS; i++)
        view_clear(&t->views[1 + context * VIEWS + i]);
    t->ctx[context].used = false;
}

static unsigned context_oldest(const struct tlb *t)
{
    unsigned oldest = t->context ? 0 : 1;
    for (unsigned i = 0; i < TLB_CONTEXTS; i++) {
        if (!t->ctx[i].used)
            return i;
        if (i != t->context && t->ctx[i].last < t->ctx[oldest].last)
            oldest = i;
    }
    return oldest;
}

/* ---- generations: what is cached of code under a generation is right as long as nothing else is translated by it ---- */
static void renew_all(struct tlb *t)
{
    t->super_generation = ++t->generations;
    for (unsigned i = 0; i < TLB_CONTEXTS; i++)
        t->ctx[i].generation = ++t->generations;
    t->local_code = false;
    memset(t->code, 0, sizeof t->code);
}

/* Supervisor code that was not found by a global entry is not to be found by what was noted of it. */
static void renew_local_code(struct tlb *t)
{
    if (t->local_code)
        t->super_generation = ++t->generations;
    t->local_code = false;
}

static u64 *hash_word(u64 *map, unsigned bits, u64 number, u64 *bit)
{
    u64 h = (number ^ number >> 16) & (bits - 1);
    *bit = BIT(h & 63);
    return &map[h >> 6];
}

static void hash_set(u64 *map, unsigned bits, u64 number)
{
    u64 bit, *w = hash_word(map, bits, number, &bit);
    *w |= bit;
}

static bool hash_has(u64 *map, unsigned bits, u64 number)
{
    u64 bit, *w = hash_word(map, bits, number, &bit);
    return *w & bit;
}

void tlb_note_code(struct icpu *c, enum tlb_view_id view, u64 la)
{
    struct tlb *t = c->tlb;
    hash_set(t->code, TLB_CODE_BITS, la >> PAGE_SHIFT);
    if (view != VIEW_USER && !t->local && !(t->view[view]->page[slot_of(la)] & TLB_GLOBAL))
        t->local_code = true;
}

/* ---- open and close ---- */
int tlb_open(struct icpu *c)
{
    struct tlb *t = mmap(NULL, sizeof *t, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (t == MAP_FAILED)
        return err(-ENOMEM, "vCPU %u: no memory for its TLB", c->v->id);
    for (unsigned i = 0; i < ARRAY_SIZE(t->views); i++)
        view_init(&t->views[i]);
    view_init(&t->none);
    view_init(&t->slow);
    t->epoch = c->v->m->ram->epoch;
    c->tlb = t;
    context_take(c, 0);
    renew_all(t);
    context_choose(c, 0);
    c->view = t->none.e;
    return 0;
}

void tlb_close(struct icpu *c)
{
    if (c->tlb)
        munmap(c->tlb, sizeof *c->tlb);
    c->tlb = NULL;
}

/* ---- flushes ---- */
static void flushed(struct icpu *c, enum tlb_flush what, u64 la, unsigned context)
{
    vcpu_count(c->v, what == FLUSH_ALL ? COUNT_TLB_FLUSH_ALL : what == FLUSH_NONGLOBAL ? COUNT_TLB_FLUSH_NONGLOBAL : COUNT_TLB_FLUSH_PAGE);
    if (c->bt.flushed)
        c->bt.flushed(c, what, la, context);
    code_retag(c);
}

void tlb_flush_all(struct icpu *c)
{
    struct tlb *t = c->tlb;
    view_clear(&t->views[COMMON]);
    t->loose = 0;
    for (unsigned i = 0; i < TLB_CONTEXTS; i++)
        if (t->ctx[i].used)
            context_clear(t, i);
    memset(t->large, 0, sizeof t->large);
    memset(t->huge, 0, sizeof t->huge);
    t->keyed = false;
    t->local = t->local && c->x->cr4 & CR4_PCIDE;
    context_take(c, t->context);
    renew_all(t);
    context_choose(c, t->context);
    flushed(c, FLUSH_ALL, 0, TLB_EVERY);
}

/* Entries of the common supervisor view that are not global belong to the current context. */
static void loose_drop(struct tlb *t)
{
    struct tlb_view *v = &t->views[COMMON];
    if (t->loose > TLB_LOOSE) {
        view_clear_nonglobal(v);
    } else {
        for (unsigned i = 0; i < t->loose; i++)
            if (!(v->page[t->loose_slot[i]] & TLB_GLOBAL))
                entry_clear(&v->e[t->loose_slot[i]]);              /* it stays listed: the list is not gone through for a few */
    }
    t->loose = 0;
    renew_local_code(t);
}

/* Open supervisor views refill quickly from the common one, where SMAP makes that the usual one: so they are not gone through for what may stay. */
static void context_flush(struct icpu *c, unsigned context)
{
    struct tlb *t = c->tlb;
    view_clear_nonglobal(view_of(t, context, VIEW_USER));
    if (c->x->cr4 & CR4_SMAP)
        view_clear(view_of(t, context, VIEW_SUPER_OPEN));
    else
        view_clear_nonglobal(view_of(t, context, VIEW_SUPER_OPEN));
    if (t->local)
        view_clear_nonglobal(view_of(t, context, VIEW_SUPER));
    else if (context == t->context)
        loose_drop(t);
    t->ctx[context].generation = ++t->generations;
}

void tlb_flush_nonglobal(struct icpu *c)
{
    context_flush(c, c->tlb->context);
    flushed(c, FLUSH_NONGLOBAL, 0, c->tlb->context);
}

/* The supervisor's entries of each context for itself, if changes of context keep costing many. */
static void context_leave(struct icpu *c)
{
    struct tlb *t = c->tlb;
    if (t->local)
        return;
    if (t->loose > TLB_LOOSE && ++t->dropped > MANY_DROPS) {
        t->dropped = 0;
        t->local = true;
        tlb_flush_all(c);
        return;
    }
    loose_drop(t);
}

static unsigned context_of_root(const struct tlb *t, u64 root, bool free)
{
    for (unsigned i = 0; i < TLB_CONTEXTS; i++)
        if (t->ctx[i].used && t->ctx[i].root == root && (!free || t->ctx[i].pcid == PCID_NONE))
            return i;
    return TLB_EVERY;
}

/*
 * The context for CR3. *keep: and nothing is to be flushed in it. A PCID that comes with another root than it had begins anew, whatever bit 63 says: nobody can
 * want what the old one left; but another PCID keeps what it has of this root, unless flushing was asked for.
 */
static unsigned context_for(const struct tlb *t, u16 pcid, u64 root, bool *keep)
{
    unsigned i = context_find(t, pcid);
    if (i != TLB_EVERY && t->ctx[i].root == root)
        return i;
    i = context_of_root(t, root, *keep);
    *keep = false;
    return i;
}

static void context_rename(struct tlb *t, unsigned context, u16 pcid)
{
    unsigned was = context_find(t, pcid);
    if (was != TLB_EVERY)
        t->ctx[was].pcid = PCID_NONE;
    if (context != TLB_EVERY)
        t->ctx[context].pcid = pcid;
}

void tlb_cr3(struct icpu *c, bool keep)
{
    struct tlb *t = c->tlb;
    u16 pcid = current_pcid(c);
    u64 root = c->x->cr3 & PAGE_MASK;
    unsigned next = context_for(t, pcid, root, &keep);
    context_rename(t, next, pcid);
    if (next == t->context) {
        if (!keep)
            tlb_flush_nonglobal(c);
        return;
    }
    context_leave(c);                                              /* which may drop all of them: the current one is CR3's then */
    next = context_find(t, pcid);
    if (next == TLB_EVERY) {
        next = context_oldest(t);
        if (t->ctx[next].used) {
            context_clear(t, next);
            vcpu_count(c->v, COUNT_TLB_EVICTED);
            flushed(c, FLUSH_NONGLOBAL, 0, next);
        }
        context_take(c, next);
    } else if (!keep) {
        context_flush(c, next);
        flushed(c, FLUSH_NONGLOBAL, 0, next);
    }
    context_choose(c, next);
    vcpu_count(c->v, COUNT_TLB_CONTEXT);
    if (c->bt.context_changed)
        c->bt.context_changed(c, next);
    code_retag(c);
}

/* All pieces of the large page around la, and perhaps more. */
static void large_clear(struct tlb_view *v, u64 la, bool huge)
{
    unsigned first = slot_of(la) & ~(LARGE_PAGES - 1);
    if (huge) {
        for (unsigned i = 0; i < v->n; i++)
            if (v->page[v->filled[i]] & TLB_HUGE)
                entry_clear(&v->e[v->filled[i]]);
        return;
    }
    for (unsigned i = first; v->n && i < first + LARGE_PAGES; i++)
        if (v->page[i] & TLB_LARGE)
            entry_clear(&v->e[i]);
}

static void view_clear_page(struct tlb_view *v, u64 la, bool large, bool huge)
{
    if (v->page[slot_of(la)] & TLB_LISTED)
        entry_clear(&v->e[slot_of(la)]);
    if (unlikely(large))
        large_clear(v, la, false);
    if (unlikely(huge))
        large_clear(v, la, true);
}

/* la in one context; others only where global entries are meant as well and may be. */
static void page_flush(struct icpu *c, u64 la, unsigned context, bool global)
{
    struct tlb *t = c->tlb;
    bool large = hash_has(t->large, TLB_LARGE_BITS, la >> 21), huge = hash_has(t->huge, TLB_LARGE_BITS, la >> 30);
    for (unsigned i = 0; i < TLB_CONTEXTS; i++) {
        if (!t->ctx[i].used || (i != context && !global))
            continue;
        for (unsigned view = 0; view < VIEWS; view++) {
            struct tlb_view *v = &t->views[1 + i * VIEWS + view];
            if (i == context || v->global[upper_half(la)])
                view_clear_page(v, la, large, huge);
        }
    }
    if (context == t->context || global)
        view_clear_page(&t->views[COMMON], la, large, huge);
    if (large || huge || hash_has(t->code, TLB_CODE_BITS, la >> PAGE_SHIFT))
        renew_all(t);
    flushed(c, large || huge ? FLUSH_LARGE : FLUSH_PAGE, la, context);
}

void tlb_flush_page(struct icpu *c, u64 la)
{
    page_flush(c, la, c->tlb->context, true);
}

void tlb_flush_pcid_page(struct icpu *c, u64 pcid, u64 la)
{
    unsigned context = context_find(c->tlb, pcid);
    if (context != TLB_EVERY)
        page_flush(c, la, context, false);
}

void tlb_flush_pcid(struct icpu *c, u64 pcid)
{
    unsigned context = context_find(c->tlb, pcid);
    if (context == TLB_EVERY)
        return;
    context_flush(c, context);
    flushed(c, FLUSH_NONGLOBAL, 0, context);
}

void tlb_flush_pcids(struct icpu *c)
{
    for (unsigned i = 0; i < TLB_CONTEXTS; i++)
        if (c->tlb->ctx[i].used)
            context_flush(c, i);
    flushed(c, FLUSH_NONGLOBAL, 0, TLB_EVERY);
}

/* ---- data breakpoints: DR7 (SDM vol. 3B 17.2.4) ---- */
static bool watch_enabled(const struct x86 *x, unsigned i)
{
    return x->dr7 >> (2 * i) & 3 && x->dr7 >> (16 + 4 * i) & 1;    /* L or G; R/W 01 or 11 */
}

static u64 watch_len(const struct x86 *x, unsigned i)
{
    static const u8 len[4] = { 1, 2, 8, 4 };
    return len[x->dr7 >> (18 + 4 * i) & 3];
}

static bool page_watched(const struct icpu *c, u64 page)
{
    const struct x86 *x = c->x;
    for (unsigned i = 0; i < 4; i++)
        if (watch_enabled(x, i) && (x->dr[i] & ~(watch_len(x, i) - 1) & PAGE_MASK) == page)
            return true;
    return debug_watch_at(&c->v->m->debug, page, PAGE_SIZE, DEBUG_READ | DEBUG_WRITE);
}

void tlb_watchpoints(struct icpu *c)
{
    bool watch = c->v->m->debug.watches;
    for (unsigned i = 0; i < 4; i++)
        watch = watch || watch_enabled(c->x, i);
    if (watch || c->tlb->watch)
        tlb_flush_all(c);
    c->tlb->watch = watch;
}

/* The first hit of an instruction counts; the running block ends behind it. */
static void watch_debugger(struct icpu *c, u64 la, unsigned n, enum debug_access access)
{
    struct vcpu_debug *d = &c->v->debug;
    const struct debug_watch *w = debug_watch_at(&c->v->m->debug, la, n, access);
    if (!w || d->stop)
        return;
    d->stop = DEBUG_WATCHED;
    d->stop_la = w->la;
    d->stop_access = w->access;
    code_leave(c);
    atomic_fetch_or(&c->v->events, VCPU_EV_KICK);                  /* ends run_blocks() even if this was the block's last */
}

void tlb_watch_check(struct icpu *c, u64 la, unsigned n, bool write)
{
    const struct x86 *x = c->x;
    for (unsigned i = 0; i < 4; i++) {
        if (!watch_enabled(x, i) || (!write && (x->dr7 >> (16 + 4 * i) & 3) == 1))
            continue;
        u64 len = watch_len(x, i), start = x->dr[i] & ~(len - 1);
        if (la < start + len && start < la + n)
            c->db_pending |= BIT(i);
    }
    watch_debugger(c, la, n, write ? DEBUG_WRITE : DEBUG_READ);
}

/* ---- filling ---- */
static void walk_context(const struct icpu *c, enum tlb_view_id view, struct mmu_ctx *ctx)
{
    const struct x86 *x = c->x;
    *ctx = (struct mmu_ctx){
        .cr0 = x->cr0, .cr3 = x->cr3, .cr4 = x->cr4, .efer = x->efer, .pkru = c->pkru,
        .phys_bits = (u8)cpuid_phys_bits(c->v->m->cpuid), .no_1g_pages = !cpuid_has(c->v->m->cpuid, CPU_GBPAGES),
        .user = view == VIEW_USER, .ac = view == VIEW_SUPER_OPEN,
    };
    memcpy(ctx->pdpte, x->pdpte, sizeof ctx->pdpte);
}

static void note_large(struct tlb *t, u64 la, u64 size)
{
    if (size == GiB) {
        hash_set(t->huge, TLB_LARGE_BITS, la >> 30);
        return;
    }
    la &= ~(size - 1);
    for (u64 part = 0; part < size; part += 2 * MiB)
        hash_set(t->large, TLB_LARGE_BITS, (la + part) >> 21);
}

/* While RAM is tracked, only a write opens a page for writing; that notes it once for all. */
static bool opens_for_writing(struct icpu *c, u64 gpa, enum mmu_access access)
{
    if (unlikely(c->v->m->ram->tracked) && access == MMU_WRITE)
        ram_mark(c->v->m->ram, gpa, 1);
    return likely(!c->v->m->ram->tracked) || access == MMU_WRITE;
}

/*
 * From frame to entries that write to it: a set per frame number holds their places. A place counts as long as the entry there has a write tag and a frame of this
 * set; when all do, one of the others loses its write tag, so that none is ever missed.
 */
static unsigned writer_set(u64 gpa)
{
    return (gpa >> PAGE_SHIFT ^ gpa >> 26) & (TLB_WRITER_SETS - 1);
}

static bool writes_in_set(const struct tlb *t, u32 place, unsigned set)
{
    if (!place)
        return false;
    const struct tlb_view *v = &t->views[(place - 1) >> TLB_BITS];
    unsigned slot = (place - 1) & (TLB_SIZE - 1);
    return v->page[slot] & TLB_LISTED && v->e[slot].tag[MMU_WRITE] != TLB_INVALID &&
           writer_set(v->page[slot]) == set;
}

static void note_writer(struct tlb *t, const struct tlb_view *v, unsigned slot)
{
    unsigned set = writer_set(v->page[slot]), free_way = TLB_WRITER_WAYS;
    u32 *way = t->writer[set], me = ((u32)(v - t->views) << TLB_BITS | slot) + 1;
    for (unsigned i = 0; i < TLB_WRITER_WAYS; i++) {
        if (way[i] == me)
            return;
        if (free_way == TLB_WRITER_WAYS && !writes_in_set(t, way[i], set))
            free_way = i;
    }
    if (free_way == TLB_WRITER_WAYS) {
        u32 place = way[free_way = slot % TLB_WRITER_WAYS] - 1;
        t->views[place >> TLB_BITS].e[place & (TLB_SIZE - 1)].tag[MMU_WRITE] = TLB_INVALID;
    }
    way[free_way] = me;
}

static void entry_put(struct tlb *t, struct tlb_view *v, u64 la, const struct tlb_entry *e, u64 page)
{
    unsigned slot = slot_of(la);
    if (!(v->page[slot] & TLB_LISTED))
        v->filled[v->n++] = (u16)slot;
    v->e[slot] = *e;
    v->page[slot] = page | TLB_LISTED;
    v->global[upper_half(la)] |= (page & TLB_GLOBAL) != 0;
    if (v == &t->views[COMMON] && !(page & TLB_GLOBAL)) {
        if (t->loose < TLB_LOOSE)
            t->loose_slot[t->loose] = (u16)slot;
        t->loose += t->loose <= TLB_LOOSE;
    }
    if (e->tag[MMU_WRITE] != TLB_INVALID)
        note_writer(t, v, slot);
}

static void entry_make(struct icpu *c, const struct mmu_ctx *ctx, u64 la, const struct mmu_map *map, enum mmu_access access, struct tlb_entry *e,
                       u64 *page)
{
    u64 la_page = la & PAGE_MASK, gpa = map->gpa & PAGE_MASK;
    u8 *host = ram_hva(c->v->m->ram, gpa);
    u64 slow = c->tlb->watch && page_watched(c, la_page) ? TLB_WATCH : 0;
    if (!host)
        slow |= TLB_MMIO;
    *page = gpa | (map->global ? TLB_GLOBAL : 0) | (map->user ? TLB_USER : 0) | (map->page_size == GiB ? TLB_HUGE : map->page_size > PAGE_SIZE ? TLB_LARGE : 0);
    entry_clear(e);
    if (!mmu_allows(ctx, map, MMU_READ))
        e->tag[MMU_READ] = la_page | slow;
    if (map->dirty && !mmu_allows(ctx, map, MMU_WRITE) && opens_for_writing(c, gpa, access))
        e->tag[MMU_WRITE] = la_page | slow | (code_in_page(c->code, gpa) || codepage_is_code(c, gpa) ? TLB_CODE : 0);
    if (!mmu_allows(ctx, map, MMU_EXEC))
        e->tag[MMU_EXEC] = la_page | (slow & TLB_MMIO);
    e->addend = host ? (u64)(uintptr_t)host - la_page : gpa - la_page;
}

static bool tag_is(const struct tlb_entry *e, u64 la, enum mmu_access access)
{
    u64 tag = e->tag[access];
    return (tag & PAGE_MASK) == (la & PAGE_MASK) && tag != TLB_INVALID;
}

/*
 * What another view of this context knows may do for this one: pages of the supervisor have the same rights whether SMAP is open or not, and what user code may
 * read or write, a supervisor may where SMAP is open.
 */
static bool borrow_from(struct tlb *t, enum tlb_view_id view, enum tlb_view_id from, u64 la, enum mmu_access access)
{
    const struct tlb_view *f = t->view[from];
    struct tlb_entry e = f->e[slot_of(la)];
    u64 page = f->page[slot_of(la)];
    if (from == VIEW_USER)
        e.tag[MMU_EXEC] = TLB_INVALID;                             /* SMEP */
    if (!tag_is(&e, la, access) || !(page & TLB_USER) == (from == VIEW_USER))
        return false;
    entry_put(t, t->view[view], la, &e, page);
    return true;
}

static bool borrow(struct tlb *t, enum tlb_view_id view, u64 la, enum mmu_access access)
{
    switch (view) {
    case VIEW_SUPER:
        return borrow_from(t, view, VIEW_SUPER_OPEN, la, access);
    case VIEW_SUPER_OPEN:
        return borrow_from(t, view, VIEW_SUPER, la, access) || borrow_from(t, view, VIEW_USER, la, access);
    default:
        return false;
    }
}

/* SDM vol. 3A 4.10.4.1: a page fault invalidates what the TLB held for the page. */
static void fault_clear(struct icpu *c, u64 la)
{
    struct tlb *t = c->tlb;
    for (unsigned i = 0; i < VIEWS; i++)
        if (t->view[i]->page[slot_of(la)] & TLB_LISTED)
            entry_clear(&t->view[i]->e[slot_of(la)]);
    if (unlikely(hash_has(t->code, TLB_CODE_BITS, la >> PAGE_SHIFT)))
        renew_all(t);
    if (c->bt.flushed)
        c->bt.flushed(c, FLUSH_PAGE, la, t->context);
    code_retag(c);
}

static struct tlb_entry *entry_walk(struct icpu *c, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error)
{
    struct tlb *t = c->tlb;
    struct mmu_ctx ctx;
    struct mmu_map map;
    struct tlb_entry e;
    u64 page;
    walk_context(c, view, &ctx);
    enum vcpu_where was = vcpu_where(c->v, WHERE_WALK);
    vcpu_count(c->v, COUNT_TLB_WALK_READ + access);
    u32 fault = mmu_walk(c->v->m->ram, &ctx, la, access, &map);
    vcpu_where(c->v, was);
    if (fault) {
        fault_clear(c, la);
        *error = fault & ~MMU_FAULT;
        return NULL;
    }
    entry_make(c, &ctx, la, &map, access, &e, &page);
    if (map.page_size > PAGE_SIZE)
        note_large(t, la, map.page_size);
    t->keyed |= map.pkey != 0;
    if (view == VIEW_SUPER_OPEN && map.global && !map.user)        /* for other contexts to borrow */
        entry_put(t, t->view[VIEW_SUPER], la, &e, page);
    entry_put(t, t->view[view], la, &e, page);                     /* last: the other may cost it its write tag */
    return tlb_slot(t->view[view]->e, la);
}

struct tlb_entry *tlb_lookup(struct icpu *c, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error)
{
    struct tlb_entry *e = tlb_slot(c->tlb->view[view]->e, la);
    if (likely(tag_is(e, la, access)))
        return e;
    if (borrow(c->tlb, view, la, access)) {
        vcpu_count(c->v, COUNT_TLB_BORROWED);
        return e;
    }
    return entry_walk(c, view, la, access, error);
}

u64 tlb_gpa(const struct icpu *c, enum tlb_view_id view, u64 la)
{
    return (c->tlb->view[view]->page[slot_of(la)] & PAGE_MASK) | (la & ~PAGE_MASK);
}

static void protect_all(struct tlb *t)
{
    for (unsigned i = 0; i < ARRAY_SIZE(t->views); i++) {
        struct tlb_view *v = &t->views[i];
        for (unsigned j = 0; j < v->n; j++) {
            struct tlb_entry *e = &v->e[v->filled[j]];
            if (e->tag[MMU_WRITE] != TLB_INVALID)
                e->tag[MMU_WRITE] |= TLB_CODE;
        }
    }
}

void tlb_code_page(struct icpu *c, u64 gpa)
{
    if (gpa == PROTECT_ALL) {
        protect_all(c->tlb);
        return;
    }
    struct tlb *t = c->tlb;
    unsigned set = writer_set(gpa);
    for (unsigned i = 0; i < TLB_WRITER_WAYS; i++) {
        if (!writes_in_set(t, t->writer[set][i], set))
            continue;
        u32 place = t->writer[set][i] - 1;
        struct tlb_view *v = &t->views[place >> TLB_BITS];
        if (((v->page[place & (TLB_SIZE - 1)] ^ gpa) & PAGE_MASK) == 0)
            v->e[place & (TLB_SIZE - 1)].tag[MMU_WRITE] |= TLB_CODE;
    }
}

/* ---- privilege ---- */
/* Protection keys: most changes of PKRU concern nobody. */
static bool key_changed(const struct tlb *t, const struct tlb_key *key)
{
    struct tlb_key k = t->key;
    if (!t->keyed && !((k.pkru ^ key->pkru) & 3))
        k.pkru = key->pkru;
    return memcmp(&k, key, sizeof k);
}

void tlb_views(struct icpu *c)
{
    const struct x86 *x = c->x;
    struct tlb *t = c->tlb;
    struct tlb_key key = { (u32)x->cr0 & KEY_CR0, (u32)x->cr4 & KEY_CR4, (u32)x->efer & KEY_EFER, x->cr4 & CR4_PKE ? c->pkru : 0 };
    bool changed = key_changed(t, &key);
    t->key = key;
    if (unlikely(changed))
        tlb_flush_all(c);
    if (c->cpl == 3)
        t->cur = VIEW_USER;
    else
        t->cur = x->cr4 & CR4_SMAP && !(c->flags & FLAG_AC) ? VIEW_SUPER : VIEW_SUPER_OPEN;
    fast_view(c);
    code_retag(c);
}

void tlb_check_epoch(struct icpu *c)
{
    u64 epoch = c->v->m->ram->epoch;
    if (unlikely(c->tlb->clean_epoch != c->v->m->ram->clean_epoch)) {
        c->tlb->clean_epoch = c->v->m->ram->clean_epoch;
        tlb_flush_all(c);
    }
    if (likely(c->tlb->epoch == epoch))
        return;
    c->tlb->epoch = epoch;
    tlb_flush_all(c);
    codepage_ram_changed(c);
    code_ram_changed(c);
}
