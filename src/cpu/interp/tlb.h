/*
 * The interpreter's software TLB, one per vCPU: direct-mapped, from page to host address.
 *
 * There is one view per kind of privilege, because the same page may be open in one and closed in another: supervisor with SMAP in force,
 * supervisor with SMAP open (RFLAGS.AC, or no SMAP at all), user. An entry has a tag per kind of access; it matches only when the
 * walk allowed that access, and the host address is la + addend. A tag whose low bits are not zero never matches in the inline path: the translation
 * is known, but the access must be looked at (code in the page, a watchpoint, a device).
 *
 * The TLB never holds more than the processor's may: entries appear only after a walk that set the accessed bit, write tags only when the dirty bit is
 * set, and every flush drops at least what the architecture says (SDM vol. 3A 4.10.4). Owned by the vCPU's thread; no locks.
 */
#pragma once

#include "cpu/interp/interp.h"

#define TLB_BITS 10
#define TLB_SIZE (1u << TLB_BITS)
#define TLB_INVALID (~0ull)

enum tlb_slow {                        /* low bits of a tag */
    TLB_CODE = 1,                      /* a write here must be told to the code cache */
    TLB_WATCH = 2,                     /* a data breakpoint may be in this page */
    TLB_MMIO = 4,                      /* no RAM: addend leads to the guest-physical address */
};

enum tlb_view_id { VIEW_SUPER, VIEW_SUPER_OPEN, VIEW_USER, VIEWS };

struct tlb_entry {
    u64 tag[3];                        /* by enum mmu_access: page address | tlb_slow, or TLB_INVALID */
    u64 addend;
};

struct tlb_page {                      /* what the fast path does not need */
    u64 gpa;                           /* of the page */
    bool global, large;
};

struct tlb_view {
    struct tlb_entry e[TLB_SIZE];
    struct tlb_page page[TLB_SIZE];
    u16 used[TLB_SIZE];                /* slots filled since the last flush, so that a flush costs what was filled */
    unsigned n;
    u64 large_lo[2], large_hi[2];      /* bounds of large pages seen, lower and upper half of the address space: INVLPG drops whole pages */
};

/* What the rights of cached entries were computed from; a change drops everything. */
struct tlb_key {
    u32 cr0, cr4, efer, pkru;
};

struct tlb {
    struct tlb_view view[VIEWS];
    struct tlb_entry none[TLB_SIZE];   /* never matches: makes every access take the slow path (#AC armed) */
    enum tlb_view_id cur;              /* that data accesses at the current privilege use */
    struct tlb_key key;
    u64 generation;                    /* counts flushes; part of icpu.code_tag */
    u64 epoch, clean_epoch;            /* of the RAM table (ram.h) */
    bool watch;                        /* DR7 enables a data breakpoint */
};

int tlb_open(struct icpu *c);
void tlb_close(struct icpu *c);
/* The entry for la in a view, filled by a walk if need be; its tag for the access is then not TLB_INVALID. NULL: page fault, code in *error. */
struct tlb_entry *tlb_lookup(struct icpu *c, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error);
/* The guest-physical address behind la, which tlb_lookup() has just found in this view. */
u64 tlb_gpa(const struct icpu *c, enum tlb_view_id view, u64 la);
/* Notes in c->db_pending which data breakpoints an access of n bytes meets. */
void tlb_watch_check(struct icpu *c, u64 la, unsigned n, bool write);
/* The page at gpa holds code from now on, PROTECT_ALL: any page may: writes to it are slow. */
void tlb_code_page(struct icpu *c, u64 gpa);
/* Recomputes what depends on DR0..DR3 and DR7, and what depends on the RAM table. */
void tlb_watchpoints(struct icpu *c);
void tlb_check_epoch(struct icpu *c);

static inline struct tlb_entry *tlb_slot(struct tlb_entry *view, u64 la)
{
    return &view[la >> PAGE_SHIFT & (TLB_SIZE - 1)];
}

/* The view of implicit supervisor accesses (descriptor tables, TSS): SMAP applies, whatever RFLAGS.AC says (SDM vol. 3A 4.6.1). */
static inline enum tlb_view_id tlb_system_view(const struct icpu *c)
{
    return c->x->cr4 & CR4_SMAP ? VIEW_SUPER : VIEW_SUPER_OPEN;
}

static inline bool tlb_canonical(u64 la)
{
    return (u64)((s64)(la << 16) >> 16) == la;
}
