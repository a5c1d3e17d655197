/*
 * The windows of the shadow and what is mapped in them; shadow.c decides what is to be mapped. Model and limits: shadow.h.
 *
 * A window covers one PML4 slot of the guest, 512 GiB, for one owner. In it, regions of 2 MiB
 * that have something mapped; a region is either one block, all of it from one large page of the guest, or has cells, one per page of 4 KiB. A cell
 * holds the guest's leaf entry as it was when it was mapped, so that a later look at the guest's table is one comparison.
 *
 * Invariant: what the host has mapped is exactly what regions say, and never more than that. Whoever takes a right away has the host do it before he returns;
 * where the host refuses, the window is emptied as a whole, or closed for good.
 */
#pragma once

#include "cpu/bt/shadow.h"
#include "mem/mmu.h"

#define SHADOW_WINDOWS 64u
/* Owners: a context's user pages (its own number), the supervisor's upper half, a context's supervisor pages in the lower half. */
#define SHADOW_SUPER SHADOW_CONTEXTS
#define SHADOW_LOW(ctx) (SHADOW_CONTEXTS + 1 + (ctx))
#define SHADOW_OWNERS (2 * SHADOW_CONTEXTS + 1)
#define WINDOW_SIZE BIT(39)
#define WINDOW_GUARD (4 * GiB)                                     /* at each side */
#define REGION_SIZE (2 * MiB)
#define REGION_PAGES 512u
#define REGIONS 16384u
#define CELLS 2048u                                                /* regions with cells */

/* Of an entry, as far as it matters to us; CELL_W is ours, in a bit that the guest may use as it likes. */
#define CELL_IMAGE (PTE_ADDR | PTE_P | PTE_W | PTE_U | PTE_A | PTE_D | PTE_G | PTE_NX | 0xfull << 59)
#define CELL_W BIT(9)                                              /* the host lets it be written */

struct shadow_link {
    u32 next, prev;                                                /* cells: number * 512 + index; blocks: region. 0: none */
};

struct shadow_cells {
    u64 e[REGION_PAGES];                                           /* 0: not mapped */
    struct shadow_link alias[REGION_PAGES];                        /* writable ones, by frame */
};

struct shadow_region {
    u64 la;                                                        /* guest address of its first byte; its window knows the rest */
    u64 above;                                                     /* rights of the levels above the leaf (mmu_leaves) */
    u64 block;                                                     /* entry | CELL_W, its address that of this region; 0: cells */
    u64 ro[REGION_PAGES / 64];                                     /* pages of a writable block that are read-only: they hold code */
    struct shadow_link alias;                                      /* writable block, by frame */
    u32 hash_next, next, prev;                                     /* prev, next: of the same window */
    u32 cells;
    u16 window;
    u16 pages, nonglobal;                                          /* mapped ones, in units of 4 KiB */
    u8 level;                                                      /* of the leaf: 1, or 2 and 3 for parts of large pages */
};

struct shadow_window {
    u64 base;                                                      /* host address of its first byte; 0: not reserved */
    u64 reserved;                                                  /* of its lower guard's */
    u64 canon;                                                     /* guest address of its first byte */
    u64 used;                                                      /* when last, in ticks of shadow.tick */
    u32 regions, pages, nonglobal, cells;                          /* regions: list; cells: of how many regions */
    u32 borders;                                                   /* places where the host's mapping ends and another begins */
    u16 slot;
    u8 owner;
    bool taken;                                                    /* it has an owner */
    bool huge;                                                     /* it has had parts of 1 GiB pages */
};

struct shadow_space {                                              /* what an owner has */
    u64 windows;                                                   /* bit mask */
    bool stale;                                                    /* to be compared before it is used again */
};

struct shadow {
    struct icpu *c;
    bool (*is_code)(const struct icpu *c, u64 gpa);
    struct shadow_window window[SHADOW_WINDOWS];
    struct shadow_space space[SHADOW_OWNERS];
    struct shadow_score score[SHADOW_CONTEXTS + 1];                /* by context; the last one is the supervisor's */
    unsigned current, windows;                                     /* context; most windows that there may be */
    u64 tick, epoch, clean_epoch, cost_seen;
    u64 noted;                                                     /* page that is being written, of a tracked RAM */
    u32 borders, limit;                                            /* of all windows; most of them */
    u32 pages, context_globals;                                    /* mapped now; global ones in contexts' windows: INVLPG has to find them */
    struct shadow_region *region;
    struct shadow_cells *cells;
    u32 *cells_region;
    u32 regions;                                                   /* in use */
    u32 region_list, region_top, cells_list, cells_top;            /* free lists (by next, cells_region); first number never used */
    u32 hash[4096], alias[16384], block_alias[1024];
    enum tlb_view_id expected_view;                                /* of icpu.bt.expected */
    enum mmu_access expected_access;
    unsigned expected_context;
    u64 sample, sample_fault;                                      /* page that is watched for its reuse, since which fault; 0: none */
    int reuse;
    const struct shadow_window *rest;                              /* where mapping ahead was broken off, */
    u64 rest_la, rest_end;                                         /* and what was left */
    u64 run[REGION_PAGES];                                         /* entries of the fill that is going on */
    struct shadow_stats stats;
};

/* ---- windows ---- */
struct shadow_window *window_find(struct shadow *s, unsigned owner, unsigned slot);
/* A new one, perhaps another's that has not been used for long. NULL: the host has no room. */
struct shadow_window *window_take(struct shadow *s, unsigned owner, unsigned slot);
void window_empty(struct shadow *s, struct shadow_window *w);
void window_release(struct shadow *s, struct shadow_window *w);    /* empties it, closes it, takes it from its owner; its address space is kept */
void shadow_map_close(struct shadow *s);
void window_deltas(struct shadow *s, unsigned slot);               /* as the windows of the current context have it */
/* Before something is added to w (NULL: no particular one): other windows, or at last w itself, are emptied if tables or the host's mappings run out. */
void shadow_make_room(struct shadow *s, struct shadow_window *w);
static inline unsigned window_index(const struct shadow *s, const struct shadow_window *w)
{
    return (unsigned)(w - s->window);
}

/* ---- regions ---- */
static inline u64 *cell(struct shadow *s, const struct shadow_region *r, u64 la)
{
    return &s->cells[r->cells].e[la >> PAGE_SHIFT & (REGION_PAGES - 1)];
}
struct shadow_region *region_find(struct shadow *s, const struct shadow_window *w, u64 la); /* NULL: nothing is mapped there */
struct shadow_region *region_new(struct shadow *s, struct shadow_window *w, u64 la, bool cells); /* NULL: none is left */
void region_free(struct shadow *s, struct shadow_region *r);       /* of which nothing is mapped */
/* The page at la: 0, or its frame | 1 (mapped) | 2 (writable). */
u64 page_state(struct shadow *s, const struct shadow_window *w, u64 la);

/* ---- changes; la and n (pages) lie in one region. The host first, then the books, or the reverse where rights are taken. ---- */
/* Maps cells that are not mapped, from frames that follow each other and with the same right to write. false: the host refused, nothing has changed. */
bool cells_map(struct shadow *s, struct shadow_region *r, u64 la, unsigned n, const u64 *e, const struct ram_run *run);
bool cell_replace(struct shadow *s, struct shadow_region *r, u64 la, u64 e, const struct ram_run *run); /* mapped or not */
bool block_map(struct shadow *s, struct shadow_region *r, u64 e, const struct ram_run *run);
bool pages_writable(struct shadow *s, struct shadow_region *r, u64 la, unsigned n); /* mapped ones; of a block: clears ro */
void pages_read_only(struct shadow *s, struct shadow_region *r, u64 la, unsigned n);
void pages_unmap(struct shadow *s, struct shadow_region *r, u64 la, unsigned n); /* cells or all of a block; the region may be gone afterwards */

void cell_refresh(struct shadow *s, struct shadow_region *r, u64 la, u64 e); /* the guest's entry looks otherwise, but what is mapped stays */
/* The two halves of pages_unmap(), for who collects ranges of a window: the books, and the host. false: the whole window has been emptied. */
void pages_forget(struct shadow *s, struct shadow_region *r, u64 la, unsigned n);
bool host_forget(struct shadow *s, struct shadow_window *w, u64 la, u64 len);

/* ---- aliases: calls fn for every writable mapping of the frame ---- */
void shadow_aliases(struct shadow *s, u64 gpa, void (*fn)(struct shadow *s, struct shadow_region *r, u64 la));
