/*
 * What must not be found in a TLB: INVLPG, MOV CR3, CR4.PGE, PCID, INVPCID, changes of control bits and of privilege.
 * SDM vol. 3A 4.10.
 *
 * A TLB may hold less than it is allowed to, so only what must be gone is tested, and that contexts never mix.
 */
#include "sys.h"

static u64 pa, pb; /* two pages; their first doubleword is 0xa..., 0xb... */
#define A 0xaaaa0001u
#define B 0xbbbb0002u
#define VA (VA_TEST + 0x400000)

static u32 get(ulong va)
{
    u32 v = 0;
    asm volatile(TRY("movl (%1), %0") : "+r"(v) : "r"(va) : "memory");
    return v;
}

static void warm(ulong va)
{
    for (int i = 0; i < 3; i++)
        get(va);
}

static void invalidation(void)
{
    test("tlb: INVLPG: a remapped page");
    map(VA, pa, 3);
    eq("before", get(VA), A);
    *pte(VA, 1) = pb | 3;
    invlpg((void *)VA);
    eq("after", get(VA), B);
    test("tlb: INVLPG of any byte of the page");
    warm(VA);
    *pte(VA, 1) = pa | 3;
    invlpg((void *)(VA + 0xfff));
    eq("after", get(VA), A);
    test("tlb: INVLPG removes global entries as well");
    write_cr4(read_cr4() | CR4_PGE);
    map(VA, pa, 3 | PTE_G);
    warm(VA);
    *pte(VA, 1) = pb | 3 | PTE_G;
    invlpg((void *)VA);
    eq("after", get(VA), B);
    test("tlb: MOV CR3 removes what is not global");
    map(VA, pa, 3);
    warm(VA);
    *pte(VA, 1) = pb | 3;
    write_cr3(read_cr3());
    eq("after", get(VA), B);
    test("tlb: a change of CR4.PGE removes global entries");
    map(VA, pa, 3 | PTE_G);
    warm(VA);
    *pte(VA, 1) = pb | 3 | PTE_G;
    write_cr4(read_cr4() & ~(ulong)CR4_PGE);
    eq("PGE cleared", get(VA), B);
    write_cr4(read_cr4() | CR4_PGE);
    warm(VA);
    *pte(VA, 1) = pa | 3 | PTE_G;
    write_cr4(read_cr4() & ~(ulong)CR4_PGE);
    write_cr4(read_cr4() | CR4_PGE);
    eq("toggled", get(VA), A);
    test("tlb: G of an entry counts only while CR4.PGE = 1");
    write_cr4(read_cr4() & ~(ulong)CR4_PGE);
    map(VA, pa, 3 | PTE_G);
    warm(VA);
    *pte(VA, 1) = pb | 3 | PTE_G;
    write_cr3(read_cr3());
    eq("after MOV CR3", get(VA), B);
    test("tlb: INVLPG of a large page, by any address in it; a large page split into small ones");
    *pte(VA, 2) = (pa & ~0x1ffffful) | 3 | PTE_PS;
    invlpg((void *)VA);
    ulong va = VA + (pa & 0x1fffff);
    eq("2 MiB", get(va), A);
    warm(VA + (pb & 0x1fffff));
    *pte(VA, 2) = (page_new() & PTE_ADDR) | 3;
    *pte(va, 1) = pb | 3;
    invlpg((void *)(VA + 0x1000));
    eq("split", get(va), B);
    test("tlb: a page-table entry higher up: INVLPG removes the caches of the structures (SDM 3A 4.10.4.1)");
    u64 t = page_new();
    *pte(VA, 2) = 0;
    map(VA, pa, 3);
    warm(VA);
    ((u64 *)t)[VA >> 12 & 511] = pb | 3;
    *pte(VA, 2) = t | 3;
    invlpg((void *)VA);
    eq("after", get(VA), B);
    *pte(VA, 2) = 0;
    invlpg((void *)VA);
    test("tlb: an entry that becomes present needs no invalidation (SDM 3A 4.10.4.3)");
    map(VA, 0, 0);
    get(VA);
    eq_trap(PF, 0);
    *pte(VA, 1) = pa | 3;
    eq("value", get(VA), A);
    eq_trap(NONE, NONE);
    test("tlb: a right that is added: at the latest after one fault");
    map(VA, pa, PTE_P);
    write_cr0(read_cr0() | CR0_WP);
    warm(VA);
    *pte(VA, 1) = pa | 3;
    asm volatile(TRY("movl %0, (%1)")::"r"(A), "r"(VA) : "memory");
    if (trap.vector == PF)
        asm volatile(TRY("movl %0, (%1)")::"r"(A), "r"(VA) : "memory");
    eq_trap(NONE, NONE);
    test("tlb: a right that is taken away: at once after INVLPG");
    *pte(VA, 1) = pa | 1;
    invlpg((void *)VA);
    asm volatile(TRY("movl %0, (%1)")::"r"(A), "r"(VA) : "memory");
    eq_trap(PF, PF_P | PF_W);
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
    test("tlb: INVLPG of an address that is not canonical does nothing; with FS its base counts");
    asm volatile(TRY("invlpg (%0)")::"r"(0x0000800000000000ul) : "memory");
    eq_trap(NONE, NONE);
    map(VA, pa, 3);
    warm(VA);
    *pte(VA, 1) = pb | 3;
    wrmsr(MSR_FS_BASE, VA);
    asm volatile("invlpg %%fs:0" ::: "memory");
    wrmsr(MSR_FS_BASE, 0);
    eq("value", get(VA), B);
}

static void immediate(void)
{
    bool smap = cpuid(7, 0).b & BIT(20), pku = cpuid(7, 0).c & BIT(3);

    test("tlb: CPL: a supervisor page just read at CPL 0 is closed to CPL 3, and the other way round");
    map(VA, pa, 3);
    for (int i = 0; i < 4; i++) {
        eq("CPL 0", get(VA), A);
        asm volatile(USER("movl (%0), %%eax")::"r"(VA) : "rax", "memory");
        eq_trap(PF, PF_P | PF_U);
    }
    test("tlb: CR0.WP takes effect at once");
    map(VA, pa, 1);
    for (int i = 0; i < 4; i++) {
        write_cr0(read_cr0() & ~(ulong)CR0_WP);
        asm volatile(TRY("movl %0, (%1)")::"r"(A), "r"(VA) : "memory");
        eq_trap(NONE, NONE);
        write_cr0(read_cr0() | CR0_WP);
        asm volatile(TRY("movl %0, (%1)")::"r"(A), "r"(VA) : "memory");
        eq_trap(PF, PF_P | PF_W);
    }
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
    test("tlb: CR4.SMAP and AC take effect at once");
    if (!smap) {
        skip("no SMAP");
    } else {
        map(VA, pa, 7);
        for (int i = 0; i < 4; i++) {
            eq("open", get(VA), A);
            write_cr4(read_cr4() | CR4_SMAP);
            get(VA);
            eq_trap(PF, PF_P);
            asm volatile(TRY("stac; movl (%0), %%eax; clac; movl (%0), %%eax")::"r"(VA) : "rax", "memory");
            eq_trap(PF, PF_P);
            asm volatile(TRY("stac; movl (%0), %%eax; clac")::"r"(VA) : "rax", "memory");
            eq_trap(NONE, NONE);
            asm volatile(TRY("pushfq; orl $0x40000, (%%rsp); popfq; movl (%0), %%eax; pushq $2; popfq")::"r"(VA)
                         : "rax", "memory", "cc");
            eq_trap(NONE, NONE);
            write_cr4(read_cr4() & ~(ulong)CR4_SMAP);
        }
    }
    test("tlb: CR4.SMEP and EFER.NXE take effect at once");
    *(u8 *)(pa + 16) = 0xc3;
    if (cpuid(7, 0).b & BIT(7)) {
        map(VA, pa, 7);
        for (int i = 0; i < 3; i++) {
            asm volatile(TRY("call *%0")::"r"(VA + 16) : "memory");
            eq_trap(NONE, NONE);
            write_cr4(read_cr4() | CR4_SMEP);
            asm volatile(TRY("call *%0")::"r"(VA + 16) : "memory");
            eq_trap(PF, PF_P | PF_I);
            write_cr4(read_cr4() & ~(ulong)CR4_SMEP);
        }
    }
    map(VA, pa, 3 | PTE_NX);
    get(VA);
    asm volatile(TRY("call *%0")::"r"(VA + 16) : "memory");
    eq_trap(PF, PF_P | PF_I);
    test("tlb: PKRU takes effect at once");
    if (!pku) {
        skip("no protection keys");
        return;
    }
    write_cr4(read_cr4() | CR4_PKE);
    map(VA, pa, 7 | PTE_PKEY(3));
    for (int i = 0; i < 4; i++) {
        asm volatile("wrpkru" ::"a"(0), "c"(0), "d"(0));
        eq("open", get(VA), A);
        asm volatile("wrpkru" ::"a"(1 << 6), "c"(0), "d"(0));
        get(VA);
        eq_trap(PF, PF_P | PF_PK);
        asm volatile(USER("wrpkru; movl (%%rbx), %%eax")::"a"(0), "c"(0), "d"(0), "b"(VA) : "memory");
        eq_trap(VEC_DONE, NONE);
    }
    asm volatile("wrpkru" ::"a"(0), "c"(0), "d"(0));
    write_cr4(read_cr4() & ~(ulong)CR4_PKE);
}

/* A copy of the program's tables in which VA is another page. */
static u64 root_with(u64 page)
{
    u64 root = page_new(), pdpt = page_new();

    memcpy((void *)root, (void *)(read_cr3() & PTE_ADDR), 4096);
    memcpy((void *)pdpt, (void *)(*(u64 *)root & PTE_ADDR), 4096);
    *(u64 *)root = pdpt | 7;
    ((u64 *)pdpt)[VA >> 30 & 511] = 0;
    *pte_at(root, VA, 1) = page | 3;
    return root;
}

static void contexts(void)
{
    u64 old = read_cr3(), r1 = root_with(pa), r2 = root_with(pb);
    ulong cr4 = read_cr4();

    test("pcid: CR4.PCIDE: #GP(0) while CR3 bits 0 to 11 are not 0; MOV CR3 then takes any PCID (SDM 3A 4.10.1)");
    if (!(cpuid(1, 0).c & BIT(17))) {
        skip("no PCID");
        return;
    }
    write_cr3(old | 0x18);
    asm volatile(TRY("movq %0, %%cr4")::"r"(cr4 | CR4_PCIDE));
    eq_trap(GP, 0);
    write_cr3(old);
    asm volatile(TRY("movq %0, %%cr4")::"r"(cr4 | CR4_PCIDE));
    eq_trap(NONE, NONE);
    write_cr3(old | 0xfff);
    eq("CR3", read_cr3(), old | 0xfff);
    test("pcid: bit 63 is not stored; contexts do not mix");
    for (int i = 0; i < 8; i++) {
        u64 keep = i < 2 ? 0 : BIT(63);
        write_cr3(r1 | 1 | keep);
        eq("CR3", read_cr3(), r1 | 1);
        eq("1", get(VA), A);
        write_cr3(r2 | 2 | keep);
        eq("2", get(VA), B);
    }
    test("pcid: MOV CR3 without bit 63 drops that PCID's entries");
    write_cr3(r1 | 1 | BIT(63));
    warm(VA);
    write_cr3(r2 | 2 | BIT(63));
    *pte_at(r1, VA, 1) = pb | 3;
    write_cr3(r1 | 1);
    eq("after", get(VA), B);
    test("pcid: INVLPG is for the current PCID (and what is global)");
    *pte_at(r1, VA, 1) = pa | 3;
    invlpg((void *)VA);
    eq("after", get(VA), A);
    test("pcid: the same PCID with another root, with bit 63: INVPCID in between makes it right");
    static struct {
        u64 pcid, address;
    } d __attribute__((aligned(16)));
    bool has = cpuid(7, 0).b & BIT(10);
#define INVPCID(type, p, a)                                                                                            \
    (d.pcid = (p), d.address = (a), ({                                                                                 \
         asm volatile(TRY("invpcid (%0), %1")::"r"(&d), "r"((ulong)(type)) : "memory");                                \
     }))
    if (!has) {
        skip("no INVPCID");
    } else {
        write_cr3(r1 | 1 | BIT(63));
        warm(VA);
        INVPCID(1, 1, 0);
        eq_trap(NONE, NONE);
        write_cr3(r2 | 1 | BIT(63));
        eq("after", get(VA), B);
        for (unsigned type = 0; type < 4; type++) {
            test("pcid: INVPCID type %d, for another PCID", type);
            write_cr4(read_cr4() | CR4_PGE);
            *pte_at(r1, VA, 1) = pa | 3;
            write_cr3(r1 | 1);
            eq("before", get(VA), A);
            write_cr3(r2 | 2 | BIT(63));
            *pte_at(r1, VA, 1) = pb | 3;
            INVPCID(type, type < 2 ? 1 : 0, type == 0 ? VA : 0);
            eq_trap(NONE, NONE);
            write_cr3(r1 | 1 | BIT(63));
            eq("after", get(VA), B);
            *pte_at(r1, VA, 1) = pa | 3;
            write_cr3(r1 | 1);
            if (type == 2) { /* 2: global entries too */
                *pte_at(r1, VA, 1) = pa | 3 | PTE_G;
                invlpg((void *)VA);
                warm(VA);
                *pte_at(r1, VA, 1) = pb | 3 | PTE_G;
                INVPCID(2, 0, 0);
                eq("global", get(VA), B);
                *pte_at(r1, VA, 1) = pa | 3;
                INVPCID(2, 0, 0);
            }
            write_cr4(read_cr4() & ~(ulong)CR4_PGE);
        }
        test("pcid: INVPCID: type above 3, PCID above 4095, address not canonical (type 0): #GP(0); CPL 3 #GP(0)");
        INVPCID(4, 1, 0);
        eq_trap(GP, 0);
        INVPCID(1, 0x1000, 0);
        eq_trap(GP, 0);
        INVPCID(0, 1, 0x0000800000000000);
        eq_trap(GP, 0);
        asm volatile(USER("invpcid (%0), %1")::"r"(UPTR(&d)), "r"(1ul) : "memory");
        eq_trap(GP, 0);
    }
    write_cr3(old);
    write_cr4(cr4);
    test("pcid: clearing PCIDE drops all PCIDs; INVPCID with PCIDE = 0 takes PCID 0 only");
    eq("CR4", read_cr4() & CR4_PCIDE, 0);
    if (has) {
        INVPCID(1, 0, 0);
        eq_trap(NONE, NONE);
        INVPCID(1, 1, 0);
        eq_trap(GP, 0);
        INVPCID(0, 1, VA);
        eq_trap(GP, 0);
    }
    write_cr3(old | 0);
    write_cr4(cr4 | CR4_PCIDE);
    write_cr3(r1 | 1);
    warm(VA);
    write_cr3(old);
    write_cr4(cr4);
    *pte_at(r1, VA, 1) = pb | 3;
    write_cr4(cr4 | CR4_PCIDE);
    write_cr3(r1 | 1 | BIT(63));
    eq("after", get(VA), B);
    write_cr3(old);
    write_cr4(cr4);
    test("pcid: without PCIDE bit 63 of CR3 is reserved: #GP(0)");
    asm volatile(TRY("movq %0, %%cr3")::"r"(old | BIT(63)));
    eq_trap(GP, 0);
}

int main(void)
{
    pa = page_new(), pb = page_new();
    *(u32 *)pa = A;
    *(u32 *)pb = B;
    invalidation();
    immediate();
    contexts();
    done();
}
