/*
 * cpu/interp/tlb: what the TLB may still hold, and what it must have dropped (Intel SDM vol. 3A 4.10; 4.10.4 "Invalidation of TLBs"). Page tables are built by hand
 * in a small RAM whose frames carry their number. A test changes an entry without a flush and looks which frame it gets: the old one has stayed.
 *
 * The last test does all of it at random, against a model that notes for each page of each address space which translations a processor could still have.
 */
#include "one_vcpu.h"
#include "cpu/interp/code.h"
#include "cpu/interp/tlb.h"

#define RAM_SIZE (24 * MiB)
#define HOLE (64 * MiB)              /* no RAM: a device's */
#define DATA (8 * MiB)               /* frames that tests map; tables are below */
#define LARGE (12 * MiB)             /* and those of 2 MiB */
enum { P = 1, W = 2, U = 4, A = 32, D = 64, PS = 128, G = 256 };
#define NX BIT(63)
#define KEY(n) ((u64)(n) << 59)
#define USER 0x0000555540000000ull   /* at a boundary of 1 GiB */
#define KERNEL 0xffff888040400000ull /* in other places of the table than USER's */
#define GIANT 0xffff888080000000ull
#define SAME_SLOT (TLB_SIZE * PAGE_SIZE)
#define FRAME(n) (DATA + (u64)(n) * PAGE_SIZE)
#define FAULT (1ull << 32)           /* | error code */

struct fixture {
    struct machine m;
    struct vcpu v;
    struct ram ram;
    struct icpu *c;
    u64 next;                        /* free frame for tables */
};

/* ---- page tables ---- */
static u64 *entry_at(struct fixture *f, u64 gpa)
{
    return (u64 *)(void *)ram_hva(&f->ram, gpa);
}

static u64 new_table(struct fixture *f)
{
    u64 t = f->next;
    f->next += PAGE_SIZE;
    assert_true(f->next <= DATA);
    memset(entry_at(f, t), 0, PAGE_SIZE);
    return t;
}

/* The entry for la at a level, below root; tables in between are made with all rights. */
static u64 *entry(struct fixture *f, u64 root, u64 la, unsigned level)
{
    u64 table = root;
    for (unsigned l = 4; l > level; l--) {
        u64 *e = entry_at(f, table + (la >> (12 + 9 * (l - 1)) & 511) * 8);
        if (!(*e & P))
            *e = new_table(f) | P | W | U | A;
        table = *e & PTE_ADDR;
    }
    return entry_at(f, table + (la >> (12 + 9 * (level - 1)) & 511) * 8);
}

/* In the current address space. */
static void put(struct fixture *f, u64 la, u64 e)
{
    *entry(f, f->v.x.cr3 & PAGE_MASK, la, 1) = e;
}

/* ---- what the TLB says ---- */
static u64 stamp(u64 gpa)
{
    return 0x57a3000000000000ull | gpa >> PAGE_SHIFT;
}

/* The frame behind la, or FAULT; looked up as an instruction does it. Where there is RAM, the host address leads to that frame. */
static u64 look(struct fixture *f, enum tlb_view_id view, u64 la, enum mmu_access access)
{
    u32 error;
    struct tlb_entry *e = tlb_lookup(f->c, view, la, access, &error);
    if (!e)
        return FAULT | error;
    assert_int_equal(e->tag[access] & PAGE_MASK, la & PAGE_MASK);
    u64 gpa = tlb_gpa(f->c, view, la);
    if (e->tag[access] & TLB_MMIO)
        assert_int_equal((la & PAGE_MASK) + e->addend, gpa & PAGE_MASK);
    else
        assert_int_equal(*(u64 *)(uintptr_t)((la & PAGE_MASK) + 8 + e->addend), stamp(gpa));
    return gpa & PAGE_MASK;
}

static u64 user(struct fixture *f, u64 la)
{
    return look(f, VIEW_USER, la, MMU_READ);
}

static u64 kernel(struct fixture *f, u64 la)
{
    return look(f, VIEW_SUPER, la, MMU_READ);
}

/* Would the inline path of this view find it? */
static u64 tag(struct fixture *f, enum tlb_view_id view, u64 la, enum mmu_access access)
{
    u64 t = tlb_slot(f->c->tlb->view[view]->e, la)->tag[access];
    return (t & PAGE_MASK) == (la & PAGE_MASK) ? t & (PAGE_SIZE - 1) : TLB_INVALID;
}

/* ---- fixture ---- */
static void cr3(struct fixture *f, u64 val, bool keep)
{
    f->v.x.cr3 = val;
    tlb_cr3(f->c, keep);
}

static void views(struct fixture *f, unsigned cpl, bool ac)
{
    f->c->cpl = (u8)cpl;
    f->c->flags = ac ? f->c->flags | FLAG_AC : f->c->flags & ~(u64)FLAG_AC;
    tlb_views(f->c);
}

static int setup(void **state)
{
    struct fixture *f = fixture_new(sizeof *f);
    ram_make(&f->ram, RAM_SIZE);
    f->c = one_vcpu_open(&f->m, &f->v, &f->ram);
    for (u64 gpa = 0; gpa < RAM_SIZE; gpa += PAGE_SIZE)
        *entry_at(f, gpa + 8) = stamp(gpa);
    f->next = 0x1000;
    struct x86 *x = &f->v.x;
    x86_reset(x, true);
    x->cr0 = CR0_PE | CR0_PG | CR0_WP;
    x->cr4 = CR4_PAE | CR4_PGE | CR4_SMAP | CR4_SMEP | CR4_PCIDE;
    x->efer = EFER_LME | EFER_LMA | EFER_NXE;
    cr3(f, new_table(f), false);
    views(f, 0, false);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    one_vcpu_close(&f->m, &f->v, &f->ram);
    free(f);
    return 0;
}

/* ---- filling ---- */
static void test_rights(void **state)
{
    struct fixture *f = *state;
    put(f, USER, FRAME(1) | P | U | A);
    put(f, USER + PAGE_SIZE, FRAME(2) | P | U | W | NX);
    put(f, KERNEL, FRAME(3) | P | W);
    put(f, KERNEL + PAGE_SIZE, HOLE | P | W);
    assert_int_equal(user(f, USER), FRAME(1));
    assert_int_equal(look(f, VIEW_USER, USER, MMU_EXEC), FRAME(1));
    assert_int_equal(look(f, VIEW_USER, USER, MMU_WRITE), FAULT | PF_P | PF_W | PF_U);
    assert_int_equal(look(f, VIEW_USER, USER + PAGE_SIZE, MMU_EXEC), FAULT | PF_P | PF_U | PF_I);
    assert_int_equal(look(f, VIEW_USER, KERNEL, MMU_READ), FAULT | PF_P | PF_U);
    assert_int_equal(look(f, VIEW_USER, USER + 2 * PAGE_SIZE, MMU_READ), FAULT | PF_U);
    /* SMAP and SMEP: closed, open, never executed. */
    assert_int_equal(kernel(f, USER), FAULT | PF_P);
    assert_int_equal(look(f, VIEW_SUPER_OPEN, USER, MMU_READ), FRAME(1));
    assert_int_equal(look(f, VIEW_SUPER_OPEN, USER, MMU_EXEC), FAULT | PF_P | PF_I);
    assert_int_equal(look(f, VIEW_SUPER_OPEN, USER, MMU_READ), FRAME(1));
    assert_int_equal(kernel(f, USER), FAULT | PF_P);               /* also behind the open view's */
    assert_int_equal(look(f, VIEW_SUPER, KERNEL, MMU_WRITE), FRAME(3));
    assert_int_equal(look(f, VIEW_SUPER_OPEN, KERNEL, MMU_WRITE), FRAME(3));
    /* No RAM: the tag never matches inline. */
    assert_int_equal(kernel(f, KERNEL + PAGE_SIZE), HOLE);
    assert_int_equal(tag(f, VIEW_SUPER, KERNEL + PAGE_SIZE, MMU_READ), TLB_MMIO);
    /* Page 0 and the last one are not found in an empty TLB. */
    tlb_flush_all(f->c);
    assert_int_equal(user(f, 0), FAULT | PF_U);
    assert_int_equal(kernel(f, ~0ull & PAGE_MASK), FAULT);
}

/* 4.8: A with any access, D with the first store; no store goes by an entry that was made before D was set. */
static void test_accessed_and_dirty(void **state)
{
    struct fixture *f = *state;
    u64 *e = entry(f, f->v.x.cr3, USER, 1);
    put(f, USER, FRAME(1) | P | U | W);
    user(f, USER);
    assert_int_equal(*e & (A | D), A);
    assert_int_equal(tag(f, VIEW_USER, USER, MMU_WRITE), TLB_INVALID);
    assert_int_equal(look(f, VIEW_USER, USER, MMU_WRITE), FRAME(1));
    assert_int_equal(*e & (A | D), A | D);
    assert_int_equal(tag(f, VIEW_USER, USER, MMU_WRITE), 0);
    *e &= ~(u64)(A | D);
    tlb_flush_page(f->c, USER);
    user(f, USER);
    assert_int_equal(*e & (A | D), A);
    assert_int_equal(tag(f, VIEW_USER, USER, MMU_WRITE), TLB_INVALID);
}

/* 4.10.4.1: a page fault drops what was held for the page. */
static void test_fault_drops(void **state)
{
    struct fixture *f = *state;
    put(f, USER, FRAME(1) | P | U);
    assert_int_equal(user(f, USER), FRAME(1));
    put(f, USER, FRAME(2) | P | U);
    assert_int_equal(user(f, USER), FRAME(1));
    assert_int_equal(look(f, VIEW_USER, USER, MMU_WRITE), FAULT | PF_P | PF_W | PF_U);
    assert_int_equal(user(f, USER), FRAME(2));
}

/* Code in a page makes stores to its frame slow, by whatever address, in whatever view and context. */
static void test_code_pages(void **state)
{
    struct fixture *f = *state;
    u64 root = f->v.x.cr3;
    put(f, USER, FRAME(1) | P | U | W);
    put(f, KERNEL, FRAME(1) | P | W | G);
    put(f, KERNEL + PAGE_SIZE, FRAME(2) | P | W);
    look(f, VIEW_USER, USER, MMU_WRITE);
    look(f, VIEW_SUPER_OPEN, USER, MMU_WRITE);
    look(f, VIEW_SUPER, KERNEL, MMU_WRITE);
    look(f, VIEW_SUPER, KERNEL + PAGE_SIZE, MMU_WRITE);
    cr3(f, root | 5, true);
    look(f, VIEW_USER, USER, MMU_WRITE);
    tlb_code_page(f->c, FRAME(1));
    assert_int_equal(tag(f, VIEW_USER, USER, MMU_WRITE), TLB_CODE);
    assert_int_equal(tag(f, VIEW_SUPER, KERNEL, MMU_WRITE), TLB_CODE);
    cr3(f, root, true);
    assert_int_equal(tag(f, VIEW_USER, USER, MMU_WRITE), TLB_CODE);
    assert_int_equal(tag(f, VIEW_SUPER_OPEN, USER, MMU_WRITE), TLB_CODE);
    look(f, VIEW_SUPER, KERNEL + PAGE_SIZE, MMU_WRITE);
    assert_int_equal(tag(f, VIEW_SUPER, KERNEL + PAGE_SIZE, MMU_WRITE), 0);
    tlb_code_page(f->c, PROTECT_ALL);
    assert_int_equal(tag(f, VIEW_SUPER, KERNEL + PAGE_SIZE, MMU_WRITE), TLB_CODE);
}

/* More addresses of one frame than there are places to note them: none may stay writable unnoted. */
static void test_many_writers(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < 40; i++)
        put(f, USER + i * PAGE_SIZE, FRAME(1) | P | U | W);
    for (unsigned i = 0; i < 40; i++)
        assert_int_equal(look(f, VIEW_USER, USER + i * PAGE_SIZE, MMU_WRITE), FRAME(1));
    tlb_code_page(f->c, FRAME(1));
    for (unsigned i = 0; i < 40; i++)
        assert_int_not_equal(tag(f, VIEW_USER, USER + i * PAGE_SIZE, MMU_WRITE), 0);
}

/* ---- flushes, 4.10.4.1 ---- */
/* Two pages of each kind have been looked at and then mapped elsewhere: FRAME(n) became FRAME(n + 8). */
enum { USER_0, USER_1, KERNEL_0, KERNEL_1, GLOBAL_0, GLOBAL_1, PAGES };
static const struct { u64 la; enum tlb_view_id view; u64 bits; } page[PAGES] = {
    { USER, VIEW_USER, U }, { USER + PAGE_SIZE, VIEW_USER, U }, { KERNEL, VIEW_SUPER, 0 }, { KERNEL + PAGE_SIZE, VIEW_SUPER, 0 },
    { KERNEL + 0x10000, VIEW_SUPER, G }, { KERNEL + 0x11000, VIEW_SUPER_OPEN, G },
};

static void fill_and_change(struct fixture *f)
{
    for (unsigned i = 0; i < PAGES; i++) {
        put(f, page[i].la, FRAME(i) | P | W | page[i].bits);
        tlb_flush_page(f->c, page[i].la);
        assert_int_equal(look(f, page[i].view, page[i].la, MMU_READ), FRAME(i));
        put(f, page[i].la, FRAME(i + 8) | P | W | page[i].bits);
        assert_int_equal(look(f, page[i].view, page[i].la, MMU_READ), FRAME(i));
    }
}

/* Of which pages the old frame is still seen, as bits. */
static unsigned stayed(struct fixture *f)
{
    unsigned old = 0;
    for (unsigned i = 0; i < PAGES; i++) {
        u64 frame = look(f, page[i].view, page[i].la, MMU_READ);
        assert_true(frame == FRAME(i) || frame == FRAME(i + 8));
        old |= (frame == FRAME(i)) << i;
    }
    return old;
}
#define BITS(a, b) (1u << (a) | 1u << (b))
#define ALL ((1u << PAGES) - 1)
#define GLOBALS BITS(GLOBAL_0, GLOBAL_1)

static void test_invlpg(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < PAGES; i++) {
        fill_and_change(f);
        tlb_flush_page(f->c, page[i].la + 0x123);
        assert_int_equal(stayed(f), ALL & ~(1u << i));
    }
    fill_and_change(f);
    tlb_flush_page(f->c, USER + SAME_SLOT);                        /* another page that would stand in the same place */
    assert_int_equal(stayed(f) | 1u << USER_0, ALL);
}

static void test_mov_cr3(void **state)
{
    struct fixture *f = *state;
    u64 root = f->v.x.cr3;
    fill_and_change(f);
    cr3(f, root, true);
    assert_int_equal(stayed(f), ALL);
    cr3(f, root, false);
    assert_int_equal(stayed(f), GLOBALS);
    fill_and_change(f);
    cr3(f, root, false);                                           /* and once more: nothing is forgotten by being dropped before */
    assert_int_equal(stayed(f), GLOBALS);
    /* Without PCIDs (a change of CR4.PCIDE drops all): the same. */
    f->v.x.cr4 &= ~(u64)CR4_PCIDE;
    fill_and_change(f);
    tlb_views(f->c);
    assert_int_equal(stayed(f), 0);
    fill_and_change(f);
    cr3(f, root, false);
    assert_int_equal(stayed(f), GLOBALS);
}

/* Two PCIDs: each keeps its own; global entries are both's. */
static void test_pcids(void **state)
{
    struct fixture *f = *state;
    u64 a = f->v.x.cr3 | 1, b = new_table(f) | 2;
    memcpy(entry_at(f, (b & PAGE_MASK) + 2048), entry_at(f, (a & PAGE_MASK) + 2048), 2048);
    cr3(f, a, false);
    fill_and_change(f);
    memcpy(entry_at(f, (b & PAGE_MASK) + 2048), entry_at(f, (a & PAGE_MASK) + 2048), 2048); /* the kernel's tables */
    cr3(f, b, true);
    put(f, USER, FRAME(20) | P | U);
    assert_int_equal(user(f, USER), FRAME(20));
    assert_int_equal(user(f, USER + PAGE_SIZE), FAULT | PF_U);
    assert_int_equal(kernel(f, KERNEL), FRAME(KERNEL_0 + 8));      /* not a's */
    assert_int_equal(look(f, VIEW_SUPER, KERNEL + 0x10000, MMU_READ), FRAME(GLOBAL_0));
    cr3(f, a, true);
    assert_int_equal(stayed(f) & ~BITS(KERNEL_0, KERNEL_1), BITS(USER_0, USER_1) | GLOBALS); /* the kernel's own may go early */
    cr3(f, b, true);
    put(f, USER, FRAME(21) | P | U);
    assert_int_equal(user(f, USER), FRAME(20));
    cr3(f, a, false);                                              /* drops a's, not b's */
    assert_int_equal(stayed(f), GLOBALS);
    cr3(f, b, true);
    assert_int_equal(user(f, USER), FRAME(20));
    cr3(f, b, false);
    assert_int_equal(user(f, USER), FRAME(21));
    /* A PCID comes back with another root. */
    u64 other = new_table(f) | 2;
    *entry(f, other & PAGE_MASK, USER, 1) = FRAME(22) | P | U;
    cr3(f, other, true);
    assert_int_equal(user(f, USER), FRAME(22));
}

/* More PCIDs than contexts: whoever is pushed out begins anew, nobody sees another's. */
static void test_many_pcids(void **state)
{
    struct fixture *f = *state;
    u64 root[4 * TLB_CONTEXTS];
    for (unsigned i = 0; i < ARRAY_SIZE(root); i++) {
        root[i] = new_table(f) | (i + 1);
        *entry(f, root[i] & PAGE_MASK, USER, 1) = FRAME(i) | P | U;
    }
    for (unsigned round = 0; round < 300; round++) {
        unsigned i = round * 7 % ARRAY_SIZE(root);
        cr3(f, root[i], true);
        assert_int_equal(user(f, USER), FRAME(i));
    }
    /* The ones used last are still there. */
    for (unsigned i = 0; i < TLB_CONTEXTS; i++) {
        cr3(f, root[i], true);
        user(f, USER);
        put(f, USER, FRAME(100 + i) | P | U);
    }
    for (unsigned i = 0; i < TLB_CONTEXTS; i++) {
        cr3(f, root[i], true);
        assert_int_equal(user(f, USER), FRAME(i));
    }
}

static void test_invpcid(void **state)
{
    struct fixture *f = *state;
    u64 a = f->v.x.cr3 | 1, b = new_table(f) | 2;
    for (unsigned type = 0; type < 4; type++) {
        cr3(f, a, false);
        fill_and_change(f);
        memcpy(entry_at(f, (b & PAGE_MASK) + 2048), entry_at(f, (a & PAGE_MASK) + 2048), 2048);
        cr3(f, b, false);
        put(f, USER, FRAME(20) | P | U);
        assert_int_equal(user(f, USER), FRAME(20));
        put(f, USER, FRAME(21) | P | U);
        /* Of a's, from b. */
        switch (type) {
        case 0: tlb_flush_pcid_page(f->c, 1, USER); break;
        case 1: tlb_flush_pcid(f->c, 1); break;
        case 2: tlb_flush_all(f->c); break;
        default: tlb_flush_pcids(f->c);
        }
        assert_int_equal(user(f, USER), FRAME(type < 2 ? 20 : 21));
        assert_int_equal(look(f, VIEW_SUPER, KERNEL + 0x10000, MMU_READ), FRAME(type == 2 ? GLOBAL_0 + 8 : GLOBAL_0));
        cr3(f, a, true);
        unsigned now = stayed(f), maybe = BITS(KERNEL_0, KERNEL_1);
        assert_int_equal(now & ~maybe, type == 0 ? GLOBALS | 1u << USER_1 : type == 2 ? 0 : GLOBALS);
        assert_true(type == 0 || !(now & maybe));
    }
    /* One that nobody has: nothing happens. */
    fill_and_change(f);
    tlb_flush_pcid(f->c, 77);
    tlb_flush_pcid_page(f->c, 77, USER);
    tlb_flush_pcid_page(f->c, 1, USER + PAGE_SIZE);
    assert_int_equal(stayed(f), ALL & ~(1u << USER_1));
    /* Individual-address invalidation in the current PCID leaves global entries alone or not: either is allowed. */
}

/* A bit of CR0, CR4, EFER or PKRU that rights hang on changes. */
static void test_rights_change(void **state)
{
    struct fixture *f = *state;
    put(f, KERNEL, FRAME(1) | P);
    assert_int_equal(look(f, VIEW_SUPER, KERNEL, MMU_WRITE), FAULT | PF_P | PF_W);
    f->v.x.cr0 &= ~(u64)CR0_WP;
    tlb_views(f->c);
    assert_int_equal(look(f, VIEW_SUPER, KERNEL, MMU_WRITE), FRAME(1));
    f->v.x.cr0 |= CR0_WP;
    tlb_views(f->c);
    assert_int_equal(look(f, VIEW_SUPER, KERNEL, MMU_WRITE), FAULT | PF_P | PF_W);
    fill_and_change(f);
    f->v.x.cr4 &= ~(u64)CR4_PGE;
    tlb_views(f->c);
    assert_int_equal(stayed(f), 0);
    /* Protection keys of user pages, also through what the supervisor may. */
    f->v.x.cr4 |= CR4_PKE | CR4_PGE;
    tlb_views(f->c);
    put(f, USER + 9 * PAGE_SIZE, FRAME(3) | P | U | W | KEY(5));
    assert_int_equal(look(f, VIEW_USER, USER + 9 * PAGE_SIZE, MMU_WRITE), FRAME(3));
    f->c->pkru = 2u << 10;                                         /* key 5: no writes */
    tlb_views(f->c);
    assert_int_equal(look(f, VIEW_USER, USER + 9 * PAGE_SIZE, MMU_WRITE), FAULT | PF_P | PF_W | PF_U | PF_PK);
    assert_int_equal(user(f, USER + 9 * PAGE_SIZE), FRAME(3));
    f->c->pkru = 1u << 10;                                         /* and no reads */
    tlb_views(f->c);
    assert_int_equal(user(f, USER + 9 * PAGE_SIZE), FAULT | PF_P | PF_U | PF_PK);
    assert_int_equal(look(f, VIEW_SUPER_OPEN, USER + 9 * PAGE_SIZE, MMU_READ), FAULT | PF_P | PF_PK);
}

/* Which view data accesses use. */
static void test_view_in_force(void **state)
{
    struct fixture *f = *state;
    views(f, 0, false);
    assert_int_equal(f->c->tlb->cur, VIEW_SUPER);
    assert_int_equal(tlb_system_view(f->c), VIEW_SUPER);
    views(f, 0, true);
    assert_int_equal(f->c->tlb->cur, VIEW_SUPER_OPEN);
    assert_int_equal(tlb_system_view(f->c), VIEW_SUPER);
    views(f, 3, false);
    assert_int_equal(f->c->tlb->cur, VIEW_USER);
    f->v.x.cr4 &= ~(u64)CR4_SMAP;
    views(f, 0, false);
    assert_int_equal(f->c->tlb->cur, VIEW_SUPER_OPEN);
    assert_int_equal(tlb_system_view(f->c), VIEW_SUPER_OPEN);
    assert_ptr_equal(f->c->view, f->c->tlb->view[VIEW_SUPER_OPEN]->e);
}

/* 4.10.4.1: INVLPG of any address in a large page drops all of it. */
static void test_large_pages(void **state)
{
    struct fixture *f = *state;
    static const u64 in_page[] = { 0, 0x5000, 0x123000, 2 * MiB - PAGE_SIZE };
    u64 root = f->v.x.cr3, *two = entry(f, root, USER, 2), *one = entry(f, root, GIANT, 3);
    for (unsigned i = 0; i < ARRAY_SIZE(in_page); i++) {
        *two = LARGE | P | U | W | PS;
        tlb_flush_all(f->c);
        for (unsigned j = 0; j < ARRAY_SIZE(in_page); j++)
            assert_int_equal(user(f, USER + in_page[j]), LARGE + in_page[j]);
        *two = (LARGE + 2 * MiB) | P | U | W | PS;
        for (unsigned j = 0; j < ARRAY_SIZE(in_page); j++)
            assert_int_equal(user(f, USER + in_page[j]), LARGE + in_page[j]);
        tlb_flush_page(f->c, USER + in_page[i]);
        for (unsigned j = 0; j < ARRAY_SIZE(in_page); j++)
            assert_int_equal(user(f, USER + in_page[j]), LARGE + 2 * MiB + in_page[j]);
    }
    /* 1 GiB at address 0: what lies behind RAM is a device's. A piece in another PCID goes as well if it is global. */
    *one = 0 | P | W | PS | G;
    assert_int_equal(kernel(f, GIANT + 3 * MiB), 3 * MiB);
    assert_int_equal(kernel(f, GIANT + 70 * MiB), 70 * MiB);
    assert_int_equal(tag(f, VIEW_SUPER, GIANT + 70 * MiB, MMU_READ), TLB_MMIO);
    cr3(f, root | 9, true);
    assert_int_equal(look(f, VIEW_SUPER_OPEN, GIANT + 8 * MiB, MMU_READ), 8 * MiB);
    cr3(f, root, true);
    *one = 0;
    tlb_flush_page(f->c, GIANT + 900 * MiB);
    assert_int_equal(kernel(f, GIANT + 3 * MiB), FAULT);
    assert_int_equal(kernel(f, GIANT + 70 * MiB), FAULT);
    cr3(f, root | 9, true);
    assert_int_equal(look(f, VIEW_SUPER_OPEN, GIANT + 8 * MiB, MMU_READ), FAULT);
}

/* Two pages that share a place push each other out, and are not taken for each other; a flush of one that was pushed out is none of the other. */
static void test_same_slot(void **state)
{
    struct fixture *f = *state;
    put(f, USER, FRAME(1) | P | U);
    put(f, USER + SAME_SLOT, FRAME(2) | P | U);
    for (unsigned i = 0; i < 4; i++) {
        assert_int_equal(user(f, USER), FRAME(1));
        assert_int_equal(user(f, USER + SAME_SLOT), FRAME(2));
    }
    put(f, USER, FRAME(3) | P | U);
    assert_int_equal(user(f, USER), FRAME(3));                     /* it had to be looked up anew */
}

/* A kernel whose entries are not global and many: each context gets a view of its own, and nothing else changes. */
static void test_views_per_context(void **state)
{
    struct fixture *f = *state;
    u64 a = f->v.x.cr3 | 1, b = new_table(f) | 2;
    unsigned n = TLB_LOOSE + 40;
    for (unsigned i = 0; i < n; i++) {
        *entry(f, a & PAGE_MASK, KERNEL + i * PAGE_SIZE, 1) = FRAME(i) | P;
        *entry(f, b & PAGE_MASK, KERNEL + i * PAGE_SIZE, 1) = FRAME(i + 512) | P;
    }
    for (unsigned round = 0; round < 60; round++) {
        cr3(f, round & 1 ? b : a, true);
        for (unsigned i = 0; i < n; i++)
            assert_int_equal(kernel(f, KERNEL + i * PAGE_SIZE), FRAME(i + (round & 1 ? 512 : 0)));
    }
    assert_true(f->c->tlb->local);
    cr3(f, a, true);
    put(f, KERNEL, FRAME(700) | P);
    cr3(f, b, true);
    cr3(f, a, true);
    assert_int_equal(kernel(f, KERNEL), FRAME(0));                 /* so it had stayed */
    cr3(f, b, true);
    tlb_flush_pcid_page(f->c, 1, KERNEL);
    cr3(f, a, true);
    assert_int_equal(kernel(f, KERNEL), FRAME(700));
}

/* A data breakpoint makes its page slow, and leaves the others alone. */
static void test_watch(void **state)
{
    struct fixture *f = *state;
    put(f, USER, FRAME(1) | P | U | W);
    put(f, USER + PAGE_SIZE, FRAME(2) | P | U | W);
    look(f, VIEW_USER, USER, MMU_WRITE);
    f->v.x.dr[0] = USER + 0x10;
    f->v.x.dr7 = 1 | 1 << 16 | 3 << 18;                            /* L0, writes, 4 bytes */
    tlb_watchpoints(f->c);
    look(f, VIEW_USER, USER, MMU_WRITE);
    look(f, VIEW_USER, USER + PAGE_SIZE, MMU_WRITE);
    assert_int_equal(tag(f, VIEW_USER, USER, MMU_WRITE), TLB_WATCH);
    assert_int_equal(tag(f, VIEW_USER, USER + PAGE_SIZE, MMU_WRITE), 0);
    f->c->db_pending = 0;
    tlb_watch_check(f->c, USER + 0x14, 4, true);
    tlb_watch_check(f->c, USER + 0x10, 4, false);
    assert_int_equal(f->c->db_pending, 0);
    tlb_watch_check(f->c, USER + 0xf, 2, true);
    assert_int_equal(f->c->db_pending, 1);
    f->v.x.dr7 = 0;
    tlb_watchpoints(f->c);
    look(f, VIEW_USER, USER, MMU_WRITE);
    assert_int_equal(tag(f, VIEW_USER, USER, MMU_WRITE), 0);
}

/* ---- at random ---- */
#define SPACES 11u                   /* more than contexts */
#define KINDS 3u                     /* of pages: user, kernel, kernel global */
#define EACH 6u
#define OFFSET(i) ((i) * 0x3000ull + ((i) & 1) * SAME_SLOT)
#define NONE 0u
#define VALUES 32u                   /* 0: not present; else frame (n >> 1), writable (n & 1) */

struct model {
    struct fixture *f;
    u64 root[SPACES];
    unsigned space;                  /* current */
    u32 may[SPACES][KINDS][EACH];    /* bits: translations that a processor could hold or find; of global pages [0] counts */
    u8 is[SPACES][KINDS][EACH];      /* what the tables say */
    u64 seed;
};

static unsigned any(struct model *m, unsigned n)
{
    m->seed ^= m->seed << 13;
    m->seed ^= m->seed >> 7;
    m->seed ^= m->seed << 17;
    return (unsigned)(m->seed >> 20) % n;
}

static u64 la_of(unsigned kind, unsigned i)
{
    return (kind ? KERNEL : USER) + (kind == 2 ? MiB : 0) + OFFSET(i);
}

/* The space whose row counts: global pages are everybody's. */
static unsigned row(unsigned space, unsigned kind)
{
    return kind == 2 ? 0 : space;
}

static void map(struct model *m, unsigned space, unsigned kind, unsigned i, unsigned value)
{
    u64 bits = kind == 0 ? U : kind == 2 ? G : 0, e = value ? FRAME(value >> 1) | P | (value & 1 ? W : 0) | bits : 0;
    for (unsigned s = 0; s < SPACES; s++)
        if (kind == 2 || s == space)
            *entry(m->f, m->root[s] & PAGE_MASK, la_of(kind, i), 1) = e;
    m->is[row(space, kind)][kind][i] = (u8)value;
    m->may[row(space, kind)][kind][i] |= 1u << value;
}

static void dropped(struct model *m, unsigned space, unsigned kind, unsigned i)
{
    m->may[row(space, kind)][kind][i] = 1u << m->is[row(space, kind)][kind][i];
}

static void dropped_space(struct model *m, unsigned space)
{
    for (unsigned kind = 0; kind < 2; kind++)
        for (unsigned i = 0; i < EACH; i++)
            dropped(m, space, kind, i);
}

static void dropped_all(struct model *m)
{
    for (unsigned s = 0; s < SPACES; s++)
        dropped_space(m, s);
    for (unsigned i = 0; i < EACH; i++)
        dropped(m, 0, 2, i);
}

static void check_access(struct model *m)
{
    unsigned kind = any(m, KINDS), i = any(m, EACH), s = row(m->space, kind), is = m->is[s][kind][i];
    enum mmu_access access = any(m, 3) ? MMU_READ : MMU_WRITE;
    enum tlb_view_id view = kind ? (any(m, 2) ? VIEW_SUPER : VIEW_SUPER_OPEN) : any(m, 2) ? VIEW_USER : VIEW_SUPER_OPEN;
    u64 got = look(m->f, view, la_of(kind, i), access);
    if (got & FAULT) {                                             /* raised by the tables, not by an old entry */
        assert_true(is == NONE || (access == MMU_WRITE && !(is & 1)));
        if (kind < 2)                                              /* a global one may still be there for another PCID */
            dropped(m, m->space, kind, i);
        return;
    }
    unsigned frame = (unsigned)((got - DATA) >> PAGE_SHIFT);
    u32 allowed = m->may[s][kind][i] & (access == MMU_WRITE ? 2u << 2 * frame : 3u << 2 * frame);
    if (!allowed)
        fail_msg("space %u kind %u page %u: frame %u, tables say %u, allowed %x", m->space, kind, i, frame, is, m->may[s][kind][i]);
}

static void check_flush(struct model *m)
{
    struct icpu *c = m->f->c;
    unsigned kind = any(m, KINDS), i = any(m, EACH), s = any(m, SPACES);
    switch (any(m, 12)) {
    case 0: case 1: case 2:
        tlb_flush_page(c, la_of(kind, i));
        dropped(m, m->space, kind, i);
        break;
    case 3:
        tlb_flush_pcid_page(c, s + 1, la_of(kind, i));
        if (kind < 2)
            dropped(m, s, kind, i);
        break;
    case 4:
        tlb_flush_pcid(c, s + 1);
        dropped_space(m, s);
        break;
    case 5:
        tlb_flush_pcids(c);
        for (s = 0; s < SPACES; s++)
            dropped_space(m, s);
        break;
    case 6:
        if (any(m, 4))
            break;
        tlb_flush_all(c);
        dropped_all(m);
        break;
    default:
        m->space = any(m, 3) ? any(m, 4) : s;                      /* a few of them often */
        bool keep = any(m, 4);
        cr3(m->f, m->root[m->space], keep);
        if (!keep)
            dropped_space(m, m->space);
    }
}

static void test_random(void **state)
{
    static struct model m;
    for (unsigned seed = 1; seed <= 6; seed++) {
        m = (struct model){ .f = *state, .seed = seed * 0x9e3779b97f4a7c15ull };
        for (unsigned s = 0; s < SPACES; s++)
            m.root[s] = new_table(m.f) | (s + 1);
        for (unsigned s = 0; s < SPACES; s++)
            for (unsigned kind = 0; kind < KINDS; kind++)
                for (unsigned i = 0; i < EACH; i++)
                    if (kind < 2 || !s)
                        map(&m, s, kind, i, any(&m, VALUES));
        tlb_flush_all(m.f->c);
        dropped_all(&m);
        cr3(m.f, m.root[0], false);
        for (unsigned n = 0; n < 60000; n++) {
            unsigned what = any(&m, 10);
            if (what == 0)
                check_flush(&m);
            else if (what == 1)
                map(&m, any(&m, SPACES), any(&m, KINDS), any(&m, EACH), any(&m, VALUES));
            else
                check_access(&m);
        }
        m.f->next = 0x1000 + PAGE_SIZE;                            /* tables anew */
    }
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_rights), T(test_accessed_and_dirty), T(test_fault_drops), T(test_code_pages), T(test_many_writers), T(test_invlpg), T(test_mov_cr3), T(test_pcids),
        T(test_many_pcids), T(test_invpcid), T(test_rights_change), T(test_view_in_force), T(test_large_pages), T(test_same_slot), T(test_views_per_context),
        T(test_watch), T(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
