/*
 * The guest's page tables: the walk that the processor would make (Intel SDM vol. 3A chapter 4, AMD APM vol. 2 chapter 5).
 *
 * 32-bit, PAE and 4-level paging; NX, WP, SMEP, SMAP, protection keys (user), global and large pages; accessed and dirty bits are set with locked
 * compare-and-exchange on the guest's entry. No CPU state is seen here: the context is a plain value. Any thread.
 */
#pragma once

#include "mem/ram.h"

/* Paging-structure entries */
#define PTE_P   BIT(0)
#define PTE_W   BIT(1)
#define PTE_U   BIT(2)
#define PTE_A   BIT(5)
#define PTE_D   BIT(6)
#define PTE_PS  BIT(7)
#define PTE_G   BIT(8)
#define PTE_NX  BIT(63)
#define PTE_ADDR 0x000ffffffffff000ull

struct mmu_ctx {
    u64 cr0, cr3, cr4, efer;
    u64 pdpte[4];                                                  /* PAE: loaded by MOV CR3 (SDM vol. 3A 4.4.1) */
    u32 pkru;
    u8 phys_bits;                                                  /* MAXPHYADDR */
    bool no_1g_pages;                                              /* the processor has none: PS is reserved where they would be */
    bool user;                                                     /* the access is made with CPL 3 and is not an implicit supervisor access */
    bool ac;                                                       /* RFLAGS.AC, and not an implicit supervisor access: SMAP is open */
};

enum mmu_access { MMU_READ = 0, MMU_WRITE = 1, MMU_EXEC = 2 };

/* Page-fault error code, SDM vol. 3A 4.7 */
enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_RSVD = 8, PF_I = 16, PF_PK = 32 };

struct mmu_map {
    u64 gpa;                                                       /* of the byte asked for */
    u64 page_size;                                                 /* PAGE_SIZE, 2 MiB, 4 MiB, 1 GiB; without paging PAGE_SIZE */
    bool user, writable, executable, global, dirty;                /* rights and state of the leaf, all levels combined (dirty: the D bit is set) */
    u8 pkey;
};

/* Translates gva. Sets A bits, and D for a write. Returns 0 and fills *out, or the page-fault error code | MMU_FAULT. */
#define MMU_FAULT 0x80000000u
u32 mmu_walk(struct ram *ram, const struct mmu_ctx *ctx, u64 gva, enum mmu_access access, struct mmu_map *out);

/* May ctx make this access by the translation that a walk found? 0, or the page-fault error code | MMU_FAULT. Does not look at the dirty bit. */
u32 mmu_allows(const struct mmu_ctx *ctx, const struct mmu_map *map, enum mmu_access access);

/* A walk for looking only (debugger, monitor): sets no bits, ignores rights. 0 or -EFAULT. */
int mmu_peek(const struct ram *ram, const struct mmu_ctx *ctx, u64 gva, u64 *gpa);

/*
 * For who keeps translations of whole tables (4-level paging only): the leaf entries for the 2 MiB around gva. Nothing is set; a table that the processor
 * would have to mark as accessed first counts as absent. false: nothing there that a TLB could hold.
 */
struct mmu_leaves {
    const u64 *entry;                                              /* level 1: the 512 of the page table, in guest memory, which others write */
    u64 large;                                                     /* level 2 and 3: the one that maps the large page */
    u64 above;                                                     /* rights of the levels above: PTE_W, PTE_U of all, PTE_NX of any */
    unsigned level;
};
bool mmu_leaves(const struct ram *ram, const struct mmu_ctx *ctx, u64 gva, struct mmu_leaves *out);
/* What e, read from there, says about gva; false if it is not present, not accessed, or malformed: a TLB may not hold it. */
bool mmu_leaf(const struct mmu_ctx *ctx, const struct mmu_leaves *t, u64 gva, u64 e, struct mmu_map *out);

/* Loads the four PAE page-directory-pointer entries that cr3 points to; false if a reserved bit is set in a present one (#GP). */
bool mmu_load_pdptes(const struct ram *ram, u64 cr3, u8 phys_bits, u64 pdpte[4]);
