/*
 * mem/mmu: the page walk. Tables are built by hand in each paging mode; rights are checked against a table written from SDM vol. 3A 4.6.1 and
 * 4.6.2, not from the code.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

#include "mem/mmu.h"

#define CR0_PE 1u
#define CR0_WP (1u << 16)
#define CR0_PG (1u << 31)
#define CR4_PSE (1u << 4)
#define CR4_PAE (1u << 5)
#define CR4_PGE (1u << 7)
#define CR4_SMEP (1u << 20)
#define CR4_SMAP (1u << 21)
#define CR4_PKE (1u << 22)
#define LMA (1u << 10)
#define NXE (1u << 11)
enum { P = 1, W = 2, U = 4, A = 32, D = 64, PS = 128, G = 256 };
#define NX BIT(63)

#define ROOT 0x1000u
#define L3 0x2000u
#define L2 0x3000u
#define L1 0x4000u
#define GVA 0x00007f8040203123ull      /* indices 255, 1, 1, 3; offset 0x123 */

static struct ram ram;
static struct mmu_ctx ctx;
static struct mmu_map map;

static int setup(void **state UNUSED)
{
    memset(&ctx, 0, sizeof ctx);
    return ram_init(&ram) || ram_add(&ram, 0, 1 * MiB);
}

static int teardown(void **state UNUSED)
{
    ram_close(&ram);
    return 0;
}

static void put(u64 gpa, u64 v)
{
    memcpy(ram_hva(&ram, gpa), &v, 8);
}

static u64 peek(u64 gpa)
{
    u64 v;
    memcpy(&v, ram_hva(&ram, gpa), 8);
    return v;
}

static void put32(u64 gpa, u32 v)
{
    memcpy(ram_hva(&ram, gpa), &v, 4);
}

#define PML4E (ROOT + 255 * 8)
#define PDPTE (L3 + 8)
#define PDE (L2 + 8)
#define PTE (L1 + 3 * 8)

static void four_level(u64 leaf)
{
    ctx = (struct mmu_ctx){ .cr0 = CR0_PE | CR0_PG | CR0_WP, .cr3 = ROOT, .cr4 = CR4_PAE | CR4_PGE, .efer = LMA | NXE, .phys_bits = 46 };
    put(PML4E, L3 | P | W | U);
    put(PDPTE, L2 | P | W | U);
    put(PDE, L1 | P | W | U);
    put(PTE, leaf);
}

static u32 walk(enum mmu_access access)
{
    return mmu_walk(&ram, &ctx, GVA, access, &map);
}

static void test_off(void **state UNUSED)
{
    ctx = (struct mmu_ctx){ .cr0 = CR0_PE, .phys_bits = 46 };
    assert_int_equal(mmu_walk(&ram, &ctx, 0x12345, MMU_WRITE, &map), 0);
    assert_true(map.gpa == 0x12345 && map.page_size == PAGE_SIZE && map.writable && map.executable && map.user && map.dirty);
}

static void test_page(void **state UNUSED)
{
    four_level(0x5000 | P | W | U | G);
    assert_int_equal(walk(MMU_READ), 0);
    assert_true(map.gpa == 0x5123 && map.page_size == PAGE_SIZE && map.user && map.writable && map.executable && map.global && !map.dirty);
    assert_int_equal(peek(PTE), 0x5000 | P | W | U | G | A);
    assert_int_equal(peek(PDE), L1 | P | W | U | A);
    assert_int_equal(peek(PML4E), L3 | P | W | U | A);
    assert_int_equal(walk(MMU_WRITE), 0);
    assert_true(map.dirty);
    assert_int_equal(peek(PTE), 0x5000 | P | W | U | G | A | D);
    assert_int_equal(peek(PDE), L1 | P | W | U | A);               /* D only in the leaf */
    ctx.cr4 &= ~(u64)CR4_PGE;
    assert_int_equal(walk(MMU_READ), 0);
    assert_false(map.global);
}

static void test_large(void **state UNUSED)
{
    four_level(0);
    put(PDE, 0x40000000 | P | W | PS);
    assert_int_equal(walk(MMU_WRITE), 0);
    assert_true(map.gpa == 0x40000000 + (GVA & 0x1fffff) && map.page_size == 2 * MiB && !map.user);
    assert_int_equal(peek(PDE), 0x40000000 | P | W | PS | A | D);
    put(PDPTE, 0x80000000 | P | W | PS);
    assert_int_equal(walk(MMU_READ), 0);
    assert_true(map.gpa == 0x80000000 + (GVA & 0x3fffffff) && map.page_size == GiB);
    ctx.no_1g_pages = true;
    assert_int_equal(walk(MMU_READ), MMU_FAULT | PF_P | PF_RSVD);
}

/* Not-present entries at each level; the error code tells the kind of access. */
static void test_absent(void **state UNUSED)
{
    const u64 entry[] = { PML4E, PDPTE, PDE, PTE };
    for (unsigned i = 0; i < 4; i++) {
        four_level(0x5000 | P | W | U);
        put(entry[i], peek(entry[i]) & ~(u64)P);
        assert_int_equal(walk(MMU_READ), MMU_FAULT);
        assert_int_equal(walk(MMU_WRITE), MMU_FAULT | PF_W);
        assert_int_equal(walk(MMU_EXEC), MMU_FAULT | PF_I);
        ctx.user = true;
        assert_int_equal(walk(MMU_WRITE), MMU_FAULT | PF_W | PF_U);
        assert_int_equal(peek(PML4E) & A, 0);                      /* a faulting walk leaves no marks */
    }
    ctx.efer = LMA;
    assert_int_equal(walk(MMU_EXEC), MMU_FAULT | PF_U);            /* the I bit exists with NXE or SMEP only */
    ctx.cr4 |= CR4_SMEP;
    assert_int_equal(walk(MMU_EXEC), MMU_FAULT | PF_U | PF_I);
}

static void test_reserved(void **state UNUSED)
{
    const u64 entry[] = { PML4E, PDPTE, PDE, PTE };
    for (unsigned i = 0; i < 4; i++) {
        four_level(0x5000 | P | W | U);
        put(entry[i], peek(entry[i]) | BIT(46));                   /* beyond MAXPHYADDR */
        assert_int_equal(walk(MMU_READ), MMU_FAULT | PF_P | PF_RSVD);
        four_level(0x5000 | P | W | U);
        put(entry[i], peek(entry[i]) | NX);
        ctx.efer = LMA;                                            /* NX is reserved without NXE */
        assert_int_equal(walk(MMU_WRITE), MMU_FAULT | PF_P | PF_RSVD | PF_W);
        four_level(0x5000 | P | W | U);
        put(entry[i], peek(entry[i]) | 0x7full << 52);             /* ignored, or a protection key that is not enabled */
        assert_int_equal(walk(MMU_READ), 0);
    }
    four_level(0x5000 | P | W | U);
    put(PML4E, peek(PML4E) | PS);
    assert_int_equal(walk(MMU_READ), MMU_FAULT | PF_P | PF_RSVD);
    four_level(0);
    put(PDE, 0x40000000 | P | W | PS | BIT(13));
    assert_int_equal(walk(MMU_READ), MMU_FAULT | PF_P | PF_RSVD);
    put(PDE, 0x40000000 | P | W | PS | BIT(12));                   /* PAT is not reserved */
    assert_int_equal(walk(MMU_READ), 0);
}

/* What SDM vol. 3A 4.6.1 allows, as prose turned into code once more. */
static bool allowed(bool us, bool rw, bool nx, bool user, enum mmu_access access, bool wp, bool smep, bool smap, bool ac)
{
    if (user)
        return us && (access != MMU_WRITE || rw) && (access != MMU_EXEC || !nx);
    switch (access) {
    case MMU_READ: return !us || !smap || ac;
    case MMU_WRITE: return (!us || !smap || ac) && (rw || !wp);
    default: return !nx && (!us || !smep);
    }
}

static void test_rights(void **state UNUSED)
{
    for (unsigned i = 0; i < 3 * 256; i++) {
        bool us = i & 1, rw = i & 2, nx = i & 4, user = i & 8, wp = i & 16, smep = i & 32, smap = i & 64, ac = i & 128;
        enum mmu_access access = i >> 8;
        for (unsigned level = 0; level < 2; level++) {             /* the restriction stands in the leaf, or above it */
            four_level(0x5000 | P | W | U);
            u64 e = level ? PDPTE : PTE;
            put(e, (peek(e) & ~(u64)(W | U)) | (us ? U : 0) | (rw ? W : 0) | (nx ? NX : 0));
            ctx.user = user;
            ctx.ac = ac;
            ctx.cr0 = CR0_PE | CR0_PG | (wp ? CR0_WP : 0);
            ctx.cr4 = CR4_PAE | (smep ? CR4_SMEP : 0) | (smap ? CR4_SMAP : 0);
            u32 code = MMU_FAULT | PF_P | (access == MMU_WRITE ? PF_W : 0) | (user ? PF_U : 0) | (access == MMU_EXEC ? PF_I : 0);
            assert_int_equal(walk(access), allowed(us, rw, nx, user, access, wp, smep, smap, ac) ? 0 : code);
        }
    }
}

/* PKRU's pairs of bits, user pages only; supervisor writes obey WD with CR0.WP only; fetches never care. */
static void test_keys(void **state UNUSED)
{
    four_level(0x5000 | P | W | U | 3ull << 59);
    ctx.cr4 |= CR4_PKE;
    ctx.pkru = 1u << 6;                                            /* AD of key 3 */
    assert_int_equal(walk(MMU_READ), MMU_FAULT | PF_P | PF_PK);
    assert_int_equal(walk(MMU_EXEC), 0);
    assert_int_equal(map.pkey, 3);
    ctx.pkru = 2u << 6;                                            /* WD */
    assert_int_equal(walk(MMU_READ), 0);
    assert_int_equal(walk(MMU_WRITE), MMU_FAULT | PF_P | PF_W | PF_PK);
    ctx.cr0 &= ~(u64)CR0_WP;
    assert_int_equal(walk(MMU_WRITE), 0);
    ctx.user = true;
    assert_int_equal(walk(MMU_WRITE), MMU_FAULT | PF_P | PF_W | PF_U | PF_PK);
    ctx.cr4 &= ~(u64)CR4_PKE;
    assert_int_equal(walk(MMU_WRITE), 0);
    ctx.cr4 |= CR4_PKE;
    put(PTE, 0x5000 | P | W | 3ull << 59);                         /* a supervisor page has no key */
    ctx.user = false;
    ctx.pkru = ~0u;
    assert_int_equal(walk(MMU_WRITE), 0);
}

static void test_32(void **state UNUSED)
{
    u64 gva = 0x00403123;                                          /* PDE 1, PTE 3 */
    ctx = (struct mmu_ctx){ .cr0 = CR0_PE | CR0_PG | CR0_WP, .cr3 = ROOT | 0x18, .phys_bits = 36 };
    put32(ROOT + 4, L1 | P | W | U);
    put32(L1 + 12, 0xabcd5000u | P | W);
    assert_int_equal(mmu_walk(&ram, &ctx, gva, MMU_WRITE, &map), 0);
    assert_true(map.gpa == 0xabcd5123 && !map.user && map.writable && map.executable && map.page_size == PAGE_SIZE);
    assert_int_equal((u32)peek(L1 + 12), 0xabcd5000u | P | W | A | D);
    assert_int_equal((u32)peek(ROOT + 4), L1 | P | W | U | A);
    ctx.user = true;
    assert_int_equal(mmu_walk(&ram, &ctx, gva, MMU_EXEC, &map), MMU_FAULT | PF_P | PF_U); /* no I bit without PAE and SMEP */
    ctx.user = false;
    put32(ROOT + 4, 0x0fc00000u | 0x5u << 13 | P | W | PS);        /* PSE-36: 4 MiB at 0x5'0fc00000 */
    ctx.cr4 = CR4_PSE;
    assert_int_equal(mmu_walk(&ram, &ctx, gva, MMU_READ, &map), 0);
    assert_true(map.gpa == 0x50fc03123 && map.page_size == 4 * MiB);
    put32(ROOT + 4, 0x0fc00000u | 0x15u << 13 | P | W | PS);       /* address bit 36 is beyond MAXPHYADDR */
    assert_int_equal(mmu_walk(&ram, &ctx, gva, MMU_READ, &map), MMU_FAULT | PF_P | PF_RSVD);
    put32(ROOT + 4, 0x0fc00000u | BIT(21) | P | W | PS);
    assert_int_equal(mmu_walk(&ram, &ctx, gva, MMU_READ, &map), MMU_FAULT | PF_P | PF_RSVD);
}

static void test_pae(void **state UNUSED)
{
    u64 gva = 0xc0203123;                                          /* PDPTE 3, PDE 1, PTE 3 */
    ctx = (struct mmu_ctx){ .cr0 = CR0_PE | CR0_PG, .cr4 = CR4_PAE, .efer = NXE, .phys_bits = 40 };
    put(0x6020, 0);
    put(0x6028, 0);
    put(0x6030, 0);
    put(0x6038, L2 | P);
    assert_true(mmu_load_pdptes(&ram, 0x6020, 40, ctx.pdpte));
    assert_int_equal(ctx.pdpte[3], L2 | P);
    put(PDE, L1 | P | W | U);
    put(PTE, 0x5000 | P | W | U | NX);
    assert_int_equal(mmu_walk(&ram, &ctx, gva, MMU_WRITE, &map), 0);
    assert_true(map.gpa == 0x5123 && map.user && !map.executable);
    assert_int_equal(mmu_walk(&ram, &ctx, gva, MMU_EXEC, &map), MMU_FAULT | PF_P | PF_I);
    assert_int_equal(mmu_walk(&ram, &ctx, gva & 0x3fffffff, MMU_READ, &map), MMU_FAULT);
    put(PTE, 0x5000 | P | W | U | BIT(52));                        /* 62..52 are reserved in PAE paging */
    assert_int_equal(mmu_walk(&ram, &ctx, gva, MMU_READ, &map), MMU_FAULT | PF_P | PF_RSVD);
}

static void test_pdptes(void **state UNUSED)
{
    u64 keep[4] = { 1, 2, 3, 4 }, v[4];
    memcpy(v, keep, sizeof v);
    for (unsigned bit = 0; bit < 64; bit++) {
        bool reserved = (bit >= 1 && bit <= 2) || (bit >= 5 && bit <= 8) || bit >= 40;
        put(0x6000, P | BIT(bit));
        put(0x6008, BIT(bit) & ~(u64)P);                           /* not present: anything goes */
        assert_int_equal(mmu_load_pdptes(&ram, 0x6000, 40, v), !reserved);
        if (reserved)
            assert_memory_equal(v, keep, sizeof v);
        memcpy(v, keep, sizeof v);
    }
}

static void test_peek(void **state UNUSED)
{
    u64 gpa;
    four_level(0x5000 | P | NX);
    ctx.user = true;
    assert_int_equal(mmu_peek(&ram, &ctx, GVA, &gpa), 0);
    assert_int_equal(gpa, 0x5123);
    assert_int_equal(peek(PTE), 0x5000 | P | NX);
    assert_int_equal(mmu_peek(&ram, &ctx, GVA + PAGE_SIZE, &gpa), -EFAULT);
}

/* Tables outside RAM: reads float to all ones, which is a reserved-bit fault, and nothing is written. */
static void test_tables_outside(void **state UNUSED)
{
    four_level(0x5000 | P | W | U);
    put(PDPTE, 0x10000000 | P | W | U);
    assert_int_equal(walk(MMU_READ), MMU_FAULT | PF_P | PF_RSVD);
    ctx.cr3 = 0x10000000;
    assert_int_equal(walk(MMU_READ), MMU_FAULT | PF_P | PF_RSVD);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_off), T(test_page), T(test_large), T(test_absent), T(test_reserved), T(test_rights), T(test_keys), T(test_32), T(test_pae),
        T(test_pdptes), T(test_peek), T(test_tables_outside),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
