/*
 * Many address spaces with a PCID each, switched without flushing: more than any TLB here has contexts. Data and code, of the supervisor and of CPL 3, large pages,
 * global ones. SDM vol. 3A 4.10.
 *
 * What a TLB may keep is not asked for; what is asked: that no address space ever sees another's pages, and that nothing stale is left after what must
 * remove it.
 */
#include "sys.h"

#define SPACES 24u
#define MANY 100u                            /* supervisor pages of each that are not global */
#define KEEP BIT(63)
#define VA_SUPER VA_TEST                     /* a page of the space's own */
#define VA_USER (VA_TEST + 0x1000)           /* the same one, for CPL 3 */
#define VA_GLOBAL (VA_TEST + 0x2000)
#define VA_MANY (VA_TEST + 0x100000)
#define VA_LARGE (VA_TEST + 0x40000000ul)    /* 2 MiB; by another PDPTE */
#define LARGE0 0x1000000ul
#define LARGE1 0x1200000ul
#define CODE 0x100                           /* offset in the page: mov eax, imm32; ret */

static u64 old_cr3, root[SPACES], page[SPACES], common;
static u32 seed = 12345;
static volatile u32 user_value;
static struct {
    u64 pcid, address;
} pair __attribute__((aligned(16)));

static u32 rnd(u32 n)
{
    seed = seed * 1103515245 + 12345;
    return (seed >> 8) % n;
}

static u32 id_of(unsigned n) { return 0x5000 + n; }

static void stamp(u64 pa, u32 id)
{
    *(volatile u32 *)pa = id;
    *(volatile u8 *)(pa + CODE) = 0xb8;
    *(volatile u32 *)(pa + CODE + 1) = id;
    *(volatile u8 *)(pa + CODE + 5) = 0xc3;
}

static void make(unsigned n)
{
    u64 pdpt = page_new();

    page[n] = page_new();
    stamp(page[n], id_of(n));
    root[n] = page_new();
    memcpy((void *)root[n], (void *)old_cr3, 4096);
    memcpy((void *)pdpt, (void *)(*(u64 *)old_cr3 & PTE_ADDR), 4096);
    *(u64 *)root[n] = pdpt | 7;
    ((u64 *)pdpt)[VA_TEST >> 30 & 511] = ((u64 *)pdpt)[VA_LARGE >> 30 & 511] = 0;
    *pte_at(root[n], VA_SUPER, 1) = page[n] | 3;
    *pte_at(root[n], VA_USER, 1) = page[n] | 7;
    *pte_at(root[n], VA_GLOBAL, 1) = common | 7 | PTE_G;
    for (unsigned i = 0; i < MANY; i++)
        *pte_at(root[n], VA_MANY + i * 4096, 1) = page[n] | 3;
    *pte_at(root[n], VA_LARGE, 2) = (n & 1 ? LARGE1 : LARGE0) | 7 | PTE_PS;
}

static u64 cr3_of(unsigned n) { return root[n] | (n + 1); }
static void enter(unsigned n, bool keep) { write_cr3(cr3_of(n) | (keep ? KEEP : 0)); }

static void invpcid(unsigned type, u64 pcid, u64 address)
{
    pair.pcid = pcid;
    pair.address = address;
    asm volatile("invpcid (%0), %1" ::"r"(&pair), "r"((ulong)type) : "memory");
}

static u32 load(ulong va) { return *(volatile u32 *)va; }

static u32 call(ulong va)
{
    u32 v;
    asm volatile("call *%1" : "=a"(v) : "r"(va + CODE) : "memory", "cc");
    return v;
}

static u32 user_load(ulong va)
{
    user_value = 0;
    asm volatile(USER("movl (%%rbx), %%eax; movl %%eax, (%%rcx)")::"b"(va), "c"(UPTR(&user_value)) : "rax", "memory");
    return user_value;
}

static u32 user_call(ulong va)
{
    user_value = 0;
    asm volatile(USER("call *%%rbx; movl %%eax, (%%rcx)")::"b"(va + CODE), "c"(UPTR(&user_value)) : "rax", "memory");
    return user_value;
}

static u32 open_load(ulong va)               /* with SMAP open */
{
    u32 v;
    asm volatile("stac; movl (%1), %0; clac" : "=r"(v) : "r"(va) : "memory");
    return v;
}

/* Everything that the space has of its own; a wrong one is told by name. */
static void look(unsigned n, bool smap)
{
    u32 id = id_of(n), large = n & 1 ? 0x2222 : 0x1111, i = rnd(MANY);

    if (load(VA_SUPER) != id || call(VA_SUPER) != id)
        eq("supervisor's page", load(VA_SUPER), id);
    if (user_load(VA_USER) != id || user_call(VA_USER) != id)
        eq("user's page", user_load(VA_USER), id);
    if ((smap ? open_load(VA_USER) : load(VA_USER)) != id)
        eq("user's page, read by the supervisor", 0, id);
    if (load(VA_MANY + i * 4096) != id)
        eq("one of many", load(VA_MANY + i * 4096), id);
    if ((smap ? open_load(VA_LARGE + 0x3000) : load(VA_LARGE + 0x3000)) != large)
        eq("large page", 0, large);
}

static void switching(bool smap)
{
    test("pcid: %d address spaces in any order, nothing flushed%s", (int)SPACES, smap ? ", with SMAP" : "");
    for (unsigned n = 0; n < SPACES; n++) {
        enter(n, false);
        look(n, smap);
    }
    for (unsigned k = 0; k < 400; k++) {
        unsigned n = rnd(k & 64 ? 3 : SPACES);
        enter(n, true);
        look(n, smap);
    }
}

static void all_of_many(void)
{
    bool good = true;

    test("pcid: many supervisor pages that are not global, in each of them");
    for (unsigned k = 0; k < 60; k++) {
        unsigned n = rnd(SPACES);
        enter(n, true);
        for (unsigned i = 0; i < MANY; i++)
            good = good && load(VA_MANY + i * 4096) == id_of(n);
    }
    must("values", good);
}

/* The space's own page becomes another one; what has to be done about it is done, and looked at. */
static void changes(void)
{
    u64 other = page_new();

    stamp(other, 0x7777);
    for (unsigned how = 0; how < 6; how++) {
        static const char *const name[] = {"INVLPG in it", "MOV CR3 without bit 63", "INVPCID 0 from another", "INVPCID 1 from another",
                                           "INVPCID 2 from another", "INVPCID 3 from another"};
        test("pcid: a page is another one: %s", name[how]);
        for (unsigned k = 0; k < 12; k++) {
            unsigned n = rnd(SPACES), m = (n + 1 + rnd(SPACES - 1)) % SPACES;
            for (unsigned i = 0; i < 3; i++) {
                enter(n, true);
                look(n, false);
                enter(m, true);
                look(m, false);
            }
            *pte_at(root[n], VA_SUPER, 1) = other | 3;
            *pte_at(root[n], VA_USER, 1) = other | 7;
            if (how == 2) {
                invpcid(0, n + 1, VA_SUPER + 5);
                invpcid(0, n + 1, VA_USER);
            } else if (how > 2) {
                invpcid(how - 2, how == 3 ? n + 1 : 0, 0);
            }
            enter(n, how != 1);
            if (how == 0) {
                invlpg((void *)VA_SUPER);
                invlpg((void *)(VA_USER + 0xfff));
            }
            eq("supervisor's page", load(VA_SUPER), 0x7777);
            eq("its code", call(VA_SUPER), 0x7777);
            eq("user's page", user_load(VA_USER), 0x7777);
            eq("its code", user_call(VA_USER), 0x7777);
            eq("user's page, read by the supervisor", load(VA_USER), 0x7777);
            *pte_at(root[n], VA_SUPER, 1) = page[n] | 3;
            *pte_at(root[n], VA_USER, 1) = page[n] | 7;
            enter(n, false);
        }
    }
}

static void large(void)
{
    test("pcid: a large page of another space: INVPCID 0 by any address in it");
    for (unsigned k = 0; k < 8; k++) {
        unsigned n = rnd(SPACES) & ~1u, m = (n + 1) % SPACES;
        enter(n, true);
        for (u32 off = 0x1000; off < 0x200000; off += 0x1f000)
            load(VA_LARGE + off);
        eq("before", load(VA_LARGE + 0x3000), 0x1111);
        eq("before, CPL 3", user_load(VA_LARGE + 0x3000), 0x1111);
        enter(m, true);
        *pte_at(root[n], VA_LARGE, 2) = LARGE1 | 7 | PTE_PS;
        invpcid(0, n + 1, VA_LARGE + 0x123456);
        enter(n, true);
        eq("after", load(VA_LARGE + 0x3000), 0x2222);
        eq("after, CPL 3", user_load(VA_LARGE + 0x3000), 0x2222);
        *pte_at(root[n], VA_LARGE, 2) = LARGE0 | 7 | PTE_PS;
        invlpg((void *)(VA_LARGE + 0x1ff000));
        eq("back", load(VA_LARGE + 0x3000), 0x1111);
    }
}

static void global(void)
{
    u64 other = page_new();

    stamp(other, 0x8888);
    test("pcid: a global page that all spaces have read and run: INVLPG in one of them is for all");
    write_cr4(read_cr4() | CR4_PGE);
    for (unsigned k = 0; k < 4; k++) {
        u64 now = k & 1 ? common : other;
        u32 before = k & 1 ? 0x8888 : 0x9999, after = k & 1 ? 0x9999 : 0x8888;
        for (unsigned n = 0; n < SPACES; n++) {
            enter(n, true);
            eq("before", load(VA_GLOBAL), before);
            eq("before, CPL 3", user_call(VA_GLOBAL), before);
        }
        for (unsigned n = 0; n < SPACES; n++)
            *pte_at(root[n], VA_GLOBAL, 1) = now | 7 | PTE_G;
        invlpg((void *)VA_GLOBAL);
        for (unsigned n = SPACES; n-- > 0;) {
            enter(n, true);
            eq("after", load(VA_GLOBAL), after);
            eq("after, CPL 3", user_load(VA_GLOBAL), after);
            eq("its code, CPL 3", user_call(VA_GLOBAL), after);
        }
    }
    write_cr4(read_cr4() & ~(ulong)CR4_PGE);
}

static void faults(void)
{
    u64 other = page_new();

    stamp(other, 0x6666);
    test("pcid: a page fault removes what the TLB has for the page (SDM 3A 4.10.4.1)");
    write_cr0(read_cr0() | CR0_WP);
    for (unsigned k = 0; k < 8; k++) {
        unsigned n = rnd(SPACES);
        enter(n, true);
        *pte_at(root[n], VA_SUPER, 1) = page[n] | 1;
        invlpg((void *)VA_SUPER);
        eq("before", load(VA_SUPER), id_of(n));
        eq("before, code", call(VA_SUPER), id_of(n));
        asm volatile(TRY("movb $0, 0x800(%0)")::"r"(VA_SUPER) : "memory");
        eq_trap(PF, PF_P | PF_W);
        *pte_at(root[n], VA_SUPER, 1) = other | 3;
        eq("after", load(VA_SUPER), 0x6666);
        eq("after, code", call(VA_SUPER), 0x6666);
        *pte_at(root[n], VA_SUPER, 1) = page[n] | 3;
        invlpg((void *)VA_SUPER);
    }
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
}

int main(void)
{
    bool smap = cpuid(7, 0).b & BIT(20);

    if (!(cpuid(1, 0).c & BIT(17)) || !(cpuid(7, 0).b & BIT(10))) {
        test("pcid: many address spaces");
        skip("no PCID, or no INVPCID");
        done();
    }
    old_cr3 = read_cr3() & PTE_ADDR;
    common = page_new();
    stamp(common, 0x9999);
    *(volatile u32 *)(LARGE0 + 0x3000) = 0x1111;
    *(volatile u32 *)(LARGE1 + 0x3000) = 0x2222;
    for (unsigned n = 0; n < SPACES; n++)
        make(n);
    write_cr4(read_cr4() | CR4_PCIDE);
    switching(false);
    all_of_many();
    if (smap) {
        write_cr4(read_cr4() | CR4_SMAP);
        switching(true);
        write_cr4(read_cr4() & ~(ulong)CR4_SMAP);
    }
    changes();
    large();
    global();
    faults();
    write_cr3(old_cr3);
    write_cr4(read_cr4() & ~(ulong)CR4_PCIDE);
    done();
}
