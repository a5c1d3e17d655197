/*
 * The interpreter's TLB: filling, flushing, choosing the view. Model: tlb.h; SDM vol. 3A 4.10 says what may stay and what must go.
 *
 * PCIDs: entries carry none; every MOV CR3 drops all that is not global, INVPCID is a flush by its caller. Locking: none, one vCPU's thread.
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

static void entry_clear(struct tlb_entry *e)
{
    e->tag[MMU_READ] = e->tag[MMU_WRITE] = e->tag[MMU_EXEC] = TLB_INVALID;
}

static void view_clear(struct tlb_view *v)
{
    for (unsigned i = 0; i < v->n; i++) {
        entry_clear(&v->e[v->used[i]]);
        v->page[v->used[i]].gpa = TLB_INVALID;
    }
    v->n = 0;
    for (unsigned half = 0; half < 2; half++) {
        v->large_lo[half] = ~0ull;
        v->large_hi[half] = 0;
    }
}

static void view_init(struct tlb_view *v)
{
    for (unsigned i = 0; i < TLB_SIZE; i++)
        v->used[i] = (u16)i;
    v->n = TLB_SIZE;
    view_clear(v);
}

int tlb_open(struct icpu *c)
{
    struct tlb *t = mmap(NULL, sizeof *t, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (t == MAP_FAILED)
        return err(-ENOMEM, "vCPU %u: no memory for its TLB", c->v->id);
    for (unsigned i = 0; i < VIEWS; i++)
        view_init(&t->view[i]);
    for (unsigned i = 0; i < TLB_SIZE; i++)
        entry_clear(&t->none[i]);
    t->epoch = c->v->m->ram->epoch;
    c->tlb = t;
    c->view = t->none;
    return 0;
}

void tlb_close(struct icpu *c)
{
    if (c->tlb)
        munmap(c->tlb, sizeof *c->tlb);
    c->tlb = NULL;
}

static void flushed(struct icpu *c, enum tlb_flush what, u64 la)
{
    vcpu_count(c->v, what == FLUSH_ALL ? COUNT_TLB_FLUSH_ALL : what == FLUSH_PAGE ? COUNT_TLB_FLUSH_PAGE : COUNT_TLB_FLUSH_NONGLOBAL);
    c->tlb->generation++;
    if (c->bt.flushed)
        c->bt.flushed(c, what, la);
    code_retag(c);
}

void tlb_flush_all(struct icpu *c)
{
    for (unsigned i = 0; i < VIEWS; i++)
        view_clear(&c->tlb->view[i]);
    flushed(c, FLUSH_ALL, 0);
}

void tlb_flush_nonglobal(struct icpu *c)
{
    for (unsigned i = 0; i < VIEWS; i++) {
        struct tlb_view *v = &c->tlb->view[i];
        unsigned kept = 0;
        for (unsigned j = 0; j < v->n; j++) {
            unsigned slot = v->used[j];
            if (v->page[slot].global) {
                v->used[kept++] = (u16)slot;
            } else {
                entry_clear(&v->e[slot]);
                v->page[slot].gpa = TLB_INVALID;
            }
        }
        v->n = kept;
    }
    flushed(c, FLUSH_NONGLOBAL, 0);
}

void tlb_flush_page(struct icpu *c, u64 la)
{
    unsigned half = la >> 63;
    bool large = false;
    for (unsigned i = 0; i < VIEWS; i++) {
        struct tlb_view *v = &c->tlb->view[i];
        entry_clear(tlb_slot(v->e, la));
        if (la < v->large_lo[half] || la > v->large_hi[half])
            continue;
        large = true;
        for (unsigned j = 0; j < v->n; j++)                        /* pieces of large pages: all of them, sizes are not kept */
            if (v->page[v->used[j]].large)
                entry_clear(&v->e[v->used[j]]);
    }
    flushed(c, large ? FLUSH_ALL : FLUSH_PAGE, la);
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
        .phys_bits = (u8)cpuid_phys_bits(c->v->m->cpuid),
        .user = view == VIEW_USER, .ac = view == VIEW_SUPER_OPEN,
    };
    memcpy(ctx->pdpte, x->pdpte, sizeof ctx->pdpte);
}

static void note_large(struct tlb_view *v, u64 la, u64 size)
{
    unsigned half = la >> 63;
    v->large_lo[half] = MIN(v->large_lo[half], la & ~(size - 1));
    v->large_hi[half] = MAX(v->large_hi[half], la | (size - 1));
}

/* While RAM is tracked, only a write opens a page for writing; that notes it once for all. */
static bool opens_for_writing(struct icpu *c, u64 gpa, enum mmu_access access)
{
    if (unlikely(c->v->m->ram->tracked) && access == MMU_WRITE)
        ram_mark(c->v->m->ram, gpa, 1);
    return likely(!c->v->m->ram->tracked) || access == MMU_WRITE;
}

static void entry_fill(struct icpu *c, struct tlb_view *v, const struct mmu_ctx *ctx, u64 la, const struct mmu_map *map, enum mmu_access access)
{
    u64 page = la & PAGE_MASK, gpa = map->gpa & PAGE_MASK;
    unsigned slot = la >> PAGE_SHIFT & (TLB_SIZE - 1);
    struct tlb_entry *e = &v->e[slot];
    u8 *host = ram_hva(c->v->m->ram, gpa);
    u64 slow = c->tlb->watch && page_watched(c, page) ? TLB_WATCH : 0;
    if (!host)
        slow |= TLB_MMIO;
    if (v->page[slot].gpa == TLB_INVALID)
        v->used[v->n++] = (u16)slot;
    v->page[slot] = (struct tlb_page){ .gpa = gpa, .global = map->global, .large = map->page_size > PAGE_SIZE };
    if (map->page_size > PAGE_SIZE)
        note_large(v, la, map->page_size);
    entry_clear(e);
    if (!mmu_allows(ctx, map, MMU_READ))
        e->tag[MMU_READ] = page | slow;
    if (map->dirty && !mmu_allows(ctx, map, MMU_WRITE) && opens_for_writing(c, gpa, access))
        e->tag[MMU_WRITE] = page | slow | (code_in_page(c->code, gpa) || codepage_is_code(c, gpa) ? TLB_CODE : 0);
    if (!mmu_allows(ctx, map, MMU_EXEC))
        e->tag[MMU_EXEC] = page | (slow & TLB_MMIO);
    e->addend = host ? (u64)(uintptr_t)host - page : gpa - page;
}

struct tlb_entry *tlb_lookup(struct icpu *c, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error)
{
    struct tlb_view *v = &c->tlb->view[view];
    struct tlb_entry *e = tlb_slot(v->e, la);
    u64 tag = e->tag[access];
    if (likely((tag & PAGE_MASK) == (la & PAGE_MASK) && tag != TLB_INVALID))
        return e;
    struct mmu_ctx ctx;
    struct mmu_map map;
    walk_context(c, view, &ctx);
    enum vcpu_where was = vcpu_where(c->v, WHERE_WALK);
    vcpu_count(c->v, COUNT_TLB_WALK_READ + access);
    u32 fault = mmu_walk(c->v->m->ram, &ctx, la, access, &map);
    vcpu_where(c->v, was);
    if (fault) {
        entry_clear(e);                                            /* SDM vol. 3A 4.10.4.1: a page fault invalidates what the TLB held for the page */
        *error = fault & ~MMU_FAULT;
        return NULL;
    }
    entry_fill(c, v, &ctx, la, &map, access);
    return e;
}

u64 tlb_gpa(const struct icpu *c, enum tlb_view_id view, u64 la)
{
    return c->tlb->view[view].page[la >> PAGE_SHIFT & (TLB_SIZE - 1)].gpa | (la & ~PAGE_MASK);
}

void tlb_code_page(struct icpu *c, u64 gpa)
{
    bool all = gpa == PROTECT_ALL;
    gpa &= PAGE_MASK;
    for (unsigned i = 0; i < VIEWS; i++) {
        struct tlb_view *v = &c->tlb->view[i];
        for (unsigned j = 0; j < v->n; j++) {
            unsigned slot = v->used[j];
            if ((all || v->page[slot].gpa == gpa) && v->e[slot].tag[MMU_WRITE] != TLB_INVALID)
                v->e[slot].tag[MMU_WRITE] |= TLB_CODE;
        }
    }
}

void tlb_views(struct icpu *c)
{
    const struct x86 *x = c->x;
    struct tlb *t = c->tlb;
    struct tlb_key key = { (u32)x->cr0 & KEY_CR0, (u32)x->cr4 & KEY_CR4, (u32)x->efer & KEY_EFER, x->cr4 & CR4_PKE ? c->pkru : 0 };
    if (memcmp(&key, &t->key, sizeof key)) {
        t->key = key;
        tlb_flush_all(c);
    }
    bool ac = c->flags & FLAG_AC;
    if (c->cpl == 3)
        t->cur = VIEW_USER;
    else
        t->cur = x->cr4 & CR4_SMAP && !ac ? VIEW_SUPER : VIEW_SUPER_OPEN;
    c->view = c->cpl == 3 && ac && x->cr0 & CR0_AM ? t->none : t->view[t->cur].e;
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
