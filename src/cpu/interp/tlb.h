/*
 * The interpreter's software TLB, one per vCPU: direct-mapped, from page to host address.
 *
 * There is one view per kind of privilege, because the same page may be open in one and closed in another: supervisor with SMAP in force,
 * supervisor with SMAP open (RFLAGS.AC, or no SMAP at all), user. An entry has a tag per kind of access; it matches only when the
 * walk allowed that access, and the host address is la + addend. A tag whose low bits are not zero never matches in the inline path: the translation
 * is known, but the access must be looked at (code in the page, a watchpoint, a device).
 *
 * Contexts stand for PCIDs (SDM vol. 3A 4.10.1): each has its own view of user code and of open supervisor code; MOV CR3 chooses one and drops nothing when it need
 * not. There are fewer than PCIDs: the one not used for longest is emptied for a new one. Without CR4.PCIDE there is PCID 0 only. Where MOV CR3 flushes its
 * PCID anyway, the context is the one that had this root of page tables last, if one had: what the shadow holds of it is compared rather than filled anew. Its
 * former PCID, and the PCID's former context, have none then (PCID_NONE); such a context is flushed before it is chosen. The view of closed supervisor code is common to all contexts, since kernels map themselves by global pages; entries that are not global leave it when the context changes.
 * A kernel that makes much of such entries (one that hides itself from user code) gets a view per context instead (local).
 *
 * A view is large and costs only what is filled: untouched memory is zero, and zero matches nothing, but for the first and the last entry, which are
 * set when it is made. A flush goes through the list of filled entries.
 *
 * The TLB never holds more than the processor's may: entries appear only after a walk that set the accessed bit, write tags only when the dirty bit is
 * set, and every flush drops at least what the architecture says (SDM vol. 3A 4.10.4). Owned by the vCPU's thread; no locks.
 */
#pragma once

#include "cpu/interp/interp.h"

#define TLB_BITS 13
#define TLB_SIZE (1u << TLB_BITS)
#define TLB_INVALID (~0ull)
#define TLB_CONTEXTS 12u
#define TLB_EVERY (~0u)                /* for a context: all of them */

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

/* What the fast path does not need: guest-physical address of the page, and in its low bits */
enum tlb_page {
    TLB_LISTED = 1,                    /* among the filled ones; in an entry that has been cleared as well */
    TLB_GLOBAL = 2,
    TLB_LARGE = 4,                     /* a piece of a large page */
    TLB_HUGE = 8,                      /* and that one is of 1 GiB */
    TLB_USER = 16,                     /* U = 1 */
};

struct tlb_view {
    struct tlb_entry e[TLB_SIZE];
    u64 page[TLB_SIZE];                /* enum tlb_page */
    u16 filled[TLB_SIZE];              /* the first n; so a flush costs what was filled */
    unsigned n;
    bool global[2];                    /* lower and upper half of the address space: there may be global entries */
};

#define PCID_NONE 0xffffu
struct tlb_context {
    bool used;
    u16 pcid;                          /* or PCID_NONE */
    u64 root;                          /* CR3 without its low bits */
    u64 last;                          /* tlb.switches when it was chosen last */
    u64 generation;                    /* of its translations; part of icpu.code_tag */
};

/* What the rights of cached entries were computed from; a change drops everything. */
struct tlb_key {
    u32 cr0, cr4, efer, pkru;
};

#define TLB_LOOSE 64u
#define TLB_LARGE_BITS 4096u
#define TLB_CODE_BITS 65536u
#define TLB_WRITER_SETS 16384u
#define TLB_WRITER_WAYS 4u

struct tlb {
    struct tlb_view *view[VIEWS];      /* of the current context */
    enum tlb_view_id cur;              /* that data accesses at the current privilege use */
    unsigned context;                  /* the current one */
    struct tlb_context ctx[TLB_CONTEXTS];
    u64 switches;                      /* changes of context so far */
    u64 generations;                   /* given so far: none is ever given twice */
    u64 super_generation;              /* of supervisor code's translations; part of icpu.code_tag */
    bool local;                        /* the supervisor's view is the context's */
    bool local_code;                   /* supervisor code was found by an entry that is not global */
    bool keyed;                        /* there may be pages with a protection key other than 0 */
    unsigned dropped;                  /* how often a change of context dropped many supervisor entries */
    unsigned loose;                    /* entries of the common view that are not global; beyond TLB_LOOSE nobody counts */
    u16 loose_slot[TLB_LOOSE];
    bool watch;                        /* DR7 enables a data breakpoint */
    struct tlb_key key;
    u64 epoch, clean_epoch;            /* of the RAM table (ram.h) */
    u64 large[TLB_LARGE_BITS / 64], huge[TLB_LARGE_BITS / 64];     /* where pieces of large pages may be, by hash of 2 MiB and 1 GiB: INVLPG drops whole pages */
    u64 code[TLB_CODE_BITS / 64];      /* pages that code was found in, by hash: INVLPG elsewhere leaves generations alone */
    u32 writer[TLB_WRITER_SETS][TLB_WRITER_WAYS];                  /* from frame to the entries with a plain write tag: tlb_code_page() */
    struct tlb_view none;              /* never matches: makes every access take the slow path (#AC armed) */
    struct tlb_view slow;              /* likewise, while stores are noted (store_log.h) */
    struct tlb_view views[1 + TLB_CONTEXTS * VIEWS];               /* the common supervisor view, and the contexts' */
};

int tlb_open(struct icpu *c);
void tlb_close(struct icpu *c);
/* The entry for la in a view, filled by a walk if need be; its tag for the access is then not TLB_INVALID. NULL: page fault, code in *error. */
struct tlb_entry *tlb_lookup(struct icpu *c, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error);
/* The guest-physical address behind la, which tlb_lookup() has just found in this view. */
u64 tlb_gpa(const struct icpu *c, enum tlb_view_id view, u64 la);
/* Code was found at la, which tlb_lookup() has just found in this view, and is cached by icpu.code_tag. */
void tlb_note_code(struct icpu *c, enum tlb_view_id view, u64 la);
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
