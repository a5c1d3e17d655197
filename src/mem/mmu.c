/*
 * The guest's page tables: SDM vol. 3A chapter 4 (4.3 32-bit, 4.4 PAE, 4.5 4-level, 4.6 rights, 4.7 error codes, 4.8 A and D bits).
 *
 * Accessed bits are set on a successful walk only, which the architecture allows. Left out: 5-level paging, supervisor protection keys.
 * Locking: none needed; entries are read whole and changed by compare-and-exchange. When that fails the walk starts again.
 */
#include "mem/mmu.h"

#include <errno.h>
#include <string.h>

/* Control register bits that matter here; mem sees no CPU state, so they are spelled again. */
#define CR0_WP   BIT(16)
#define CR0_PG   BIT(31)
#define CR4_PSE  BIT(4)
#define CR4_PAE  BIT(5)
#define CR4_PGE  BIT(7)
#define CR4_SMEP BIT(20)
#define CR4_SMAP BIT(21)
#define CR4_PKE  BIT(22)
#define EFER_LMA BIT(10)
#define EFER_NXE BIT(11)

#define LEVELS 4

struct step {                                                      /* one entry that a walk went through */
    u64 gpa;
    u8 *hva;
    u64 val;
};

struct walk {
    struct step step[LEVELS];
    unsigned steps;                                                /* the last one is the leaf */
    unsigned width;                                                /* bytes per entry */
    u64 page_size, base;                                           /* of the page found */
    u64 rights;                                                    /* PTE_W, PTE_U: of all levels; PTE_NX: of any */
};

static bool paging(const struct mmu_ctx *ctx)
{
    return ctx->cr0 & CR0_PG;
}

static bool nx_enabled(const struct mmu_ctx *ctx)
{
    return ctx->efer & EFER_NXE && ctx->cr4 & CR4_PAE;
}

static u64 entry_read(const struct ram *ram, u64 gpa, unsigned width, u8 **hva)
{
    *hva = ram_hva(ram, gpa);
    if (!*hva)
        return ~0ull >> (64 - 8 * width);                          /* nothing is there: the bus floats */
    return width == 8 ? __atomic_load_n((u64 *)*hva, __ATOMIC_RELAXED) : __atomic_load_n((u32 *)*hva, __ATOMIC_RELAXED);
}

/* Reserved bits of an 8-byte entry (tables 4-8 to 4-20). level: 4 PML4E, 3 PDPTE, 2 PDE, 1 PTE. */
static u64 reserved_bits(const struct mmu_ctx *ctx, unsigned level, u64 e)
{
    u64 rsvd = PTE_ADDR & ~(BIT(ctx->phys_bits) - 1);
    if (!(ctx->efer & EFER_NXE))
        rsvd |= PTE_NX;
    if (!(ctx->efer & EFER_LMA))
        rsvd |= 0x7ff0000000000000ull;                             /* PAE: 62..52; 4-level: ignored or a protection key */
    if (level == 4 || (level == 3 && ctx->no_1g_pages))
        rsvd |= PTE_PS;
    else if (level > 1 && e & PTE_PS)
        rsvd |= (level == 3 ? BIT(30) : BIT(21)) - BIT(13);
    return rsvd;
}

enum { WALK_OK = 0, WALK_ABSENT, WALK_RESERVED };

/* 4-level paging, or PAE below its four page-directory pointers. */
static int walk_wide(const struct ram *ram, const struct mmu_ctx *ctx, u64 gva, struct walk *w)
{
    unsigned level = 4;
    u64 table = ctx->cr3 & PTE_ADDR;
    if (!(ctx->efer & EFER_LMA)) {
        u64 pdpte = ctx->pdpte[gva >> 30 & 3];
        if (!(pdpte & PTE_P))
            return WALK_ABSENT;
        table = pdpte & PTE_ADDR;
        level = 2;
    }
    w->width = 8;
    w->rights = PTE_W | PTE_U;
    for (;; level--) {
        unsigned shift = 12 + 9 * (level - 1);
        struct step *s = &w->step[w->steps++];
        s->gpa = table + (gva >> shift & 511) * 8;
        u64 e = s->val = entry_read(ram, s->gpa, 8, &s->hva);
        if (!(e & PTE_P))
            return WALK_ABSENT;
        if (e & reserved_bits(ctx, level, e))
            return WALK_RESERVED;
        w->rights = (w->rights & (e | PTE_NX)) | (e & PTE_NX);
        if (level == 1 || e & PTE_PS) {
            w->page_size = BIT(shift);
            w->base = e & PTE_ADDR & ~(BIT(shift) - 1);
            return WALK_OK;
        }
        table = e & PTE_ADDR;
    }
}

static int walk_32(const struct ram *ram, const struct mmu_ctx *ctx, u64 gva, struct walk *w)
{
    struct step *s = &w->step[w->steps++];
    w->width = 4;
    s->gpa = (ctx->cr3 & 0xfffff000) + (gva >> 22 & 1023) * 4;
    u64 e = s->val = entry_read(ram, s->gpa, 4, &s->hva);
    if (!(e & PTE_P))
        return WALK_ABSENT;
    w->rights = e & (PTE_W | PTE_U);
    if (e & PTE_PS && ctx->cr4 & CR4_PSE) {                        /* PSE-36: address bits 39..32 in 20..13 */
        unsigned high = MIN(ctx->phys_bits, 40) - 32;
        if (e & (BIT(22) - BIT(13 + high)))
            return WALK_RESERVED;
        w->page_size = BIT(22);
        w->base = (e & 0xffc00000) | (e >> 13 & (BIT(high) - 1)) << 32;
        return WALK_OK;
    }
    s = &w->step[w->steps++];
    s->gpa = (e & 0xfffff000) + (gva >> 12 & 1023) * 4;
    e = s->val = entry_read(ram, s->gpa, 4, &s->hva);
    if (!(e & PTE_P))
        return WALK_ABSENT;
    w->rights &= e;
    w->page_size = PAGE_SIZE;
    w->base = e & 0xfffff000;
    return WALK_OK;
}

static int walk_tables(const struct ram *ram, const struct mmu_ctx *ctx, u64 gva, struct walk *w)
{
    w->steps = 0;
    return ctx->cr4 & CR4_PAE ? walk_wide(ram, ctx, gva, w) : walk_32(ram, ctx, gva, w);
}

static u32 fault_code(const struct mmu_ctx *ctx, enum mmu_access access, u32 why)
{
    u32 code = MMU_FAULT | why;
    if (access == MMU_WRITE)
        code |= PF_W;
    if (ctx->user)
        code |= PF_U;
    if (access == MMU_EXEC && (ctx->cr4 & CR4_SMEP || nx_enabled(ctx)))
        code |= PF_I;
    return code;
}

/* Protection keys (SDM vol. 3A 4.6.2): data accesses to user pages, by PKRU's access-disable and write-disable bits. */
static bool pkey_denies(const struct mmu_ctx *ctx, const struct mmu_map *map, enum mmu_access access)
{
    if (!(ctx->cr4 & CR4_PKE) || !(ctx->efer & EFER_LMA) || !map->user || access == MMU_EXEC)
        return false;
    u32 bits = ctx->pkru >> (2 * map->pkey);
    return bits & 1 || (access == MMU_WRITE && bits & 2 && (ctx->user || ctx->cr0 & CR0_WP));
}

u32 mmu_allows(const struct mmu_ctx *ctx, const struct mmu_map *map, enum mmu_access access)
{
    if (!paging(ctx))
        return 0;
    bool ok;
    if (ctx->user)
        ok = map->user;
    else
        ok = !map->user || (access == MMU_EXEC ? !(ctx->cr4 & CR4_SMEP) : !(ctx->cr4 & CR4_SMAP) || ctx->ac);
    if (access == MMU_WRITE)
        ok = ok && (map->writable || (!ctx->user && !(ctx->cr0 & CR0_WP)));
    if (access == MMU_EXEC)
        ok = ok && map->executable;
    if (!ok)
        return fault_code(ctx, access, PF_P);
    return pkey_denies(ctx, map, access) ? fault_code(ctx, access, PF_P | PF_PK) : 0;
}

static bool entry_replace(const struct walk *w, const struct step *s, u64 val)
{
    u64 old = s->val;
    u32 old32 = (u32)old;
    if (w->width == 8)
        return __atomic_compare_exchange_n((u64 *)s->hva, &old, val, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    return __atomic_compare_exchange_n((u32 *)s->hva, &old32, (u32)val, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

/* Sets bits in the entry if it is still what was read. */
static bool entry_set(struct ram *ram, const struct walk *w, const struct step *s, u64 bits)
{
    if ((s->val & bits) == bits || !s->hva)
        return true;
    ram_begin_write(ram, s->gpa, w->width);                        /* a page of tables may be code as well */
    bool done = entry_replace(w, s, s->val | bits);
    ram_end_write(ram, s->gpa, w->width);
    return done;
}

static bool set_accessed(struct ram *ram, const struct walk *w, bool dirty)
{
    for (unsigned i = 0; i + 1 < w->steps; i++)
        if (!entry_set(ram, w, &w->step[i], PTE_A))
            return false;
    return entry_set(ram, w, &w->step[w->steps - 1], dirty ? PTE_A | PTE_D : PTE_A);
}

static void map_identity(u64 gva, struct mmu_map *out)
{
    *out = (struct mmu_map){ .gpa = gva, .page_size = PAGE_SIZE, .user = true, .writable = true, .executable = true, .dirty = true };
}

static void map_fill(const struct mmu_ctx *ctx, const struct walk *w, u64 gva, bool write, struct mmu_map *out)
{
    u64 leaf = w->step[w->steps - 1].val;
    *out = (struct mmu_map){
        .gpa = w->base | (gva & (w->page_size - 1)),
        .page_size = w->page_size,
        .user = w->rights & PTE_U,
        .writable = w->rights & PTE_W,
        .executable = !(w->rights & PTE_NX) || !nx_enabled(ctx),
        .global = leaf & PTE_G && ctx->cr4 & CR4_PGE,
        .dirty = leaf & PTE_D || write,
        .pkey = w->width == 8 ? leaf >> 59 & 15 : 0,
    };
}

u32 mmu_walk(struct ram *ram, const struct mmu_ctx *ctx, u64 gva, enum mmu_access access, struct mmu_map *out)
{
    if (!paging(ctx)) {
        map_identity(gva, out);
        return 0;
    }
    for (;;) {
        struct walk w;
        int r = walk_tables(ram, ctx, gva, &w);
        if (r != WALK_OK)
            return fault_code(ctx, access, r == WALK_RESERVED ? PF_P | PF_RSVD : 0);
        map_fill(ctx, &w, gva, access == MMU_WRITE, out);
        u32 denied = mmu_allows(ctx, out, access);
        if (denied)
            return denied;
        if (set_accessed(ram, &w, access == MMU_WRITE))
            return 0;
    }
}

int mmu_peek(const struct ram *ram, const struct mmu_ctx *ctx, u64 gva, u64 *gpa)
{
    struct walk w;
    if (!paging(ctx)) {
        *gpa = gva;
        return 0;
    }
    if (walk_tables(ram, ctx, gva, &w) != WALK_OK)
        return -EFAULT;
    *gpa = w.base | (gva & (w.page_size - 1));
    return 0;
}

bool mmu_leaves(const struct ram *ram, const struct mmu_ctx *ctx, u64 gva, struct mmu_leaves *out)
{
    u64 table = ctx->cr3 & PTE_ADDR, above = PTE_W | PTE_U;
    for (unsigned level = 4; level > 1; level--) {
        u8 *hva;
        u64 e = entry_read(ram, table + (gva >> (12 + 9 * (level - 1)) & 511) * 8, 8, &hva);
        if (!(e & PTE_P) || e & reserved_bits(ctx, level, e))
            return false;
        if (e & PTE_PS) {
            *out = (struct mmu_leaves){ .level = level, .above = above, .large = e };
            return true;
        }
        if (!(e & PTE_A))
            return false;
        above = (above & (e | PTE_NX)) | (e & PTE_NX);
        table = e & PTE_ADDR;
    }
    out->entry = (const u64 *)(const void *)ram_hva(ram, table);
    out->level = 1;
    out->above = above;
    return out->entry;
}

bool mmu_leaf(const struct mmu_ctx *ctx, const struct mmu_leaves *t, u64 gva, u64 e, struct mmu_map *out)
{
    u64 size = BIT(12 + 9 * (t->level - 1));
    if (!(e & PTE_P) || !(e & PTE_A) || e & reserved_bits(ctx, t->level, e))
        return false;
    *out = (struct mmu_map){
        .gpa = (e & PTE_ADDR & ~(size - 1)) | (gva & (size - 1)),
        .page_size = size,
        .user = t->above & e & PTE_U,
        .writable = t->above & e & PTE_W,
        .executable = !((t->above | e) & PTE_NX) || !nx_enabled(ctx),
        .global = e & PTE_G && ctx->cr4 & CR4_PGE,
        .dirty = e & PTE_D,
        .pkey = e >> 59 & 15,
    };
    return true;
}

bool mmu_load_pdptes(const struct ram *ram, u64 cr3, u8 phys_bits, u64 pdpte[4])
{
    u64 val[4];
    for (unsigned i = 0; i < 4; i++) {
        u8 *hva;
        val[i] = entry_read(ram, (cr3 & 0xffffffe0) + i * 8, 8, &hva);
        if (val[i] & PTE_P && val[i] & (~(BIT(phys_bits) - 1) | 0x1e6))
            return false;
    }
    memcpy(pdpte, val, sizeof val);
    return true;
}
