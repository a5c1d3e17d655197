/*
 * 32-bit paging and PAE paging: rights and error codes, 4 MiB and 2 MiB pages, PDPTEs, A and D, going from one mode to
 * another. SDM vol. 3A 4.3, 4.4, 4.6 to 4.8.
 *
 * The program itself is mapped one to one for everybody by large pages; VA is a page for tests.
 */
#include "sys.h"

#define P 1u
#define W 2u
#define U 4u
#define A 32u
#define D 64u
#define PS 128u
#define VA 0x40123000ul
enum { READ, WRITE, EXEC };
static const char *const access_name[] = {"read", "write", "fetch"};

static u32 *pd, *pt;               /* 32-bit paging */
static u64 *pdpt, *pd64[4], *pt64; /* PAE */
static u32 page;                   /* its first byte is RET */
static bool pae;

static void flush(void) { write_cr3(read_cr3()); }

static void build(void)
{
    pd = pages_new(1), pt = pages_new(1);
    for (u32 i = 0; i < 8; i++)
        pd[i] = i << 22 | PS | P | W | U;
    pd[VA >> 22] = (u32)pt | P | W | U;
    pdpt = pages_new(1), pt64 = pages_new(1);
    for (u32 i = 0; i < 4; i++) {
        pd64[i] = pages_new(1);
        pdpt[i] = (u32)pd64[i] | P;
    }
    for (u32 i = 0; i < 16; i++)
        pd64[0][i] = i << 21 | PS | P | W | U;
    pd64[1][VA >> 21 & 511] = (u32)pt64 | P | W | U;
    page = page_new();
    *(u8 *)page = 0xc3;
}

static void mode(bool to_pae)
{
    write_cr0(read_cr0() & ~(ulong)CR0_PG);
    pae = to_pae;
    write_cr4((read_cr4() & ~(ulong)CR4_PAE) | CR4_PSE | (pae ? CR4_PAE : 0));
    write_cr3(pae ? (ulong)pdpt : (ulong)pd);
    write_cr0(read_cr0() | CR0_PG);
}

/* level 1: 4 KiB; 2: a large page */
static void set(int level, u64 bits)
{
    if (level == 1) {
        if (pae) {
            pd64[1][VA >> 21 & 511] = (u32)pt64 | P | W | U;
            pt64[VA >> 12 & 511] = page | bits;
        } else {
            pd[VA >> 22] = (u32)pt | P | W | U;
            pt[VA >> 12 & 1023] = page | (u32)bits;
        }
    } else if (pae) {
        pd64[1][VA >> 21 & 511] = (page & ~0x1ffffful) | PS | bits;
    } else {
        pd[VA >> 22] = (page & ~0x3ffffful) | PS | (u32)bits;
    }
    flush();
}

static ulong va(int level)
{
    return level == 1 ? VA : pae ? (VA & ~0x1ffffful) | (page & 0x1fffff) : (VA & ~0x3ffffful) | (page & 0x3fffff);
}

static u64 leaf(int level)
{
    if (level == 1)
        return pae ? pt64[VA >> 12 & 511] : pt[VA >> 12 & 1023];
    return pae ? pd64[1][VA >> 21 & 511] : pd[VA >> 22];
}

static void access(ulong at, int kind, bool user)
{
#define DO(insn)                                                                                                       \
    do {                                                                                                               \
        if (user)                                                                                                      \
            asm volatile(USER(insn)::"r"(at) : "eax", "memory");                                                       \
        else                                                                                                           \
            asm volatile(TRY(insn)::"r"(at) : "eax", "memory");                                                        \
    } while (0)
    if (kind == READ)
        DO("movb (%0), %%al");
    else if (kind == WRITE)
        DO("movb $0xc3, (%0)");
    else
        DO("call *%0");
    if (trap.vector == VEC_DONE)
        trap.vector = NONE;
}

static u32 model(u64 bits, int kind, bool user, bool wp, bool nxe)
{
    u32 e = (kind == WRITE ? PF_W : 0) | (user ? PF_U : 0) | (kind == EXEC && nxe && pae ? PF_I : 0);

    if (!(bits & P))
        return e;
    e |= PF_P;
    if ((user && !(bits & U)) || (kind == WRITE && !(bits & W) && (user || wp)) || (kind == EXEC && bits >> 63))
        return e;
    return NONE;
}

static void agree(ulong at, u32 want, int kind, bool user)
{
    access(at, kind, user);
    if (trap.vector == (want == NONE ? NONE : PF) && (want == NONE || (trap.error == want && trap.cr2 == at)))
        return;
    must(access_name[kind], false);
    eq("CPL", user * 3, 9);
    eq("error code", trap.vector == NONE ? NONE : trap.error, want);
    eq("CR2", trap.cr2, at);
}

static void rights(void)
{
    bool nx = cpuid(0x80000001, 0).d & BIT(20);

    for (int level = 1; level <= 2; level++)
        for (int wp = 0; wp < 2; wp++)
            for (int nxe = 0; nxe < (pae && nx ? 2 : 1); nxe++) {
                test("paging: %s: rights of a %s page, WP=%d NXE=%d", pae ? "PAE" : "32-bit",
                     level == 1 ? "4 KiB"
                     : pae      ? "2 MiB"
                                : "4 MiB",
                     wp, nxe);
                write_cr0((read_cr0() & ~(ulong)CR0_WP) | (wp ? CR0_WP : 0));
                if (nx)
                    wrmsr(MSR_EFER, nxe ? EFER_NXE : 0);
                for (u32 c = 0; c < (nxe ? 16u : 8u); c++) {
                    u64 bits = (c & 7) | (c & 8 ? BIT(63) : 0);
                    set(level, bits);
                    for (int kind = READ; kind <= EXEC; kind++)
                        for (int user = 0; user < 2; user++)
                            agree(va(level), model(bits, kind, user, wp, nxe), kind, user);
                }
            }
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
    if (nx)
        wrmsr(MSR_EFER, 0);
    test("paging: %s: rights of the directory's entry count with the page's", pae ? "PAE" : "32-bit");
    for (u32 c = 0; c < 8; c++) {
        set(1, P | W | U);
        if (pae)
            pd64[1][VA >> 21 & 511] = (u32)pt64 | c;
        else
            pd[VA >> 22] = (u32)pt | c;
        flush();
        for (int kind = READ; kind <= EXEC; kind++)
            for (int user = 0; user < 2; user++)
                agree(VA, model(c, kind, user, false, false), kind, user);
    }
}

static void accessed_dirty(void)
{
    for (int level = 1; level <= 2; level++)
        for (int kind = READ; kind <= EXEC; kind++) {
            test("paging: %s: A and D after a %s, level %d", pae ? "PAE" : "32-bit", access_name[kind], level);
            set(level, P | W | U);
            access(va(level), kind, false);
            eq_trap(NONE, NONE);
            eq("leaf", leaf(level) & (A | D), kind == WRITE ? A | D : A);
            if (level == 1)
                eq("directory", (pae ? pd64[1][VA >> 21 & 511] : pd[VA >> 22]) & (A | D), A);
            set(level, P);
            access(va(level), WRITE, true);
            eq_trap(PF, PF_P | PF_W | PF_U);
            eq("after a fault", leaf(level) & (A | D), 0);
        }
}

static void reserved_32(void)
{
    test("paging: 32-bit: bit 21 of a 4 MiB page is reserved: error code with RSVD (SDM 3A 4.3)");
    set(2, P | W | U | BIT(21));
    agree(va(2), PF_P | PF_RSVD, READ, false);
    agree(va(2), PF_P | PF_RSVD | PF_W | PF_U, WRITE, true);
    test("paging: 32-bit: without CR4.PSE the PS bit means nothing");
    pd[VA >> 22] = (u32)pt | P | W | U | PS;
    pt[VA >> 12 & 1023] = page | P | W;
    write_cr0(read_cr0() & ~(ulong)CR0_PG);
    u32 *low = pages_new(4), *dir = pages_new(1);
    for (u32 i = 0; i < 4 * 1024; i++)
        low[i] = i << 12 | P | W | U;
    for (u32 i = 0; i < 4; i++)
        dir[i] = ((u32)low + i * 4096) | P | W | U;
    dir[VA >> 22] = pd[VA >> 22];
    write_cr4(read_cr4() & ~(ulong)CR4_PSE);
    write_cr3((u32)dir);
    write_cr0(read_cr0() | CR0_PG);
    agree(VA, NONE, READ, false);
    agree(VA, PF_P | PF_U, READ, true);
    mode(false);
    test("paging: 32-bit: PSE-36: bits 13 to 20 of a 4 MiB page are address bits 32 to 39");
    if (!(cpuid(1, 0).d & BIT(17))) {
        skip("no PSE-36");
        return;
    }
    /* 4 GiB plus the page: nothing is there; reads as ones */
    pd[VA >> 22] = (page & ~0x3ffffful) | PS | P | W | U | BIT(13);
    flush();
    u32 v;
    asm volatile(TRY("movl (%1), %0") : "=r"(v) : "r"(va(2)) : "memory");
    eq_trap(NONE, NONE);
    must("not the page below 4 GiB", v != *(u32 *)page);
}

static void pdptes(void)
{
    test("paging: PAE: a PDPTE that is absent; it has no rights of its own");
    pdpt[1] = (u32)pd64[1];
    flush();
    access(VA, READ, false);
    eq_trap(PF, 0);
    pdpt[1] = (u32)pd64[1] | P;
    flush();
    set(1, P | W | U);
    agree(VA, NONE, WRITE, true);
    test("paging: PAE: PDPTEs are loaded by MOV CR3, not read for each access (SDM 3A 4.4.1)");
    pdpt[1] = 0;
    invlpg((void *)VA);
    agree(VA, NONE, READ, false);
    pdpt[1] = (u32)pd64[1] | P;
    flush();
    test("paging: PAE: and by MOV CR0 or CR4 that changes PG, PAE, PGE, PSE");
    pdpt[1] = 0;
    write_cr4(read_cr4() ^ CR4_PGE);
    access(VA, READ, false);
    eq_trap(PF, 0);
    pdpt[1] = (u32)pd64[1] | P;
    write_cr4(read_cr4() ^ CR4_PGE);
    agree(VA, NONE, READ, false);
    test("paging: PAE: reserved bits in a present PDPTE: MOV CR3 is #GP(0), CR3 stays");
    static const u8 bad[] = {1, 2, 5, 6, 7, 8, 63};
    ulong cr3 = read_cr3();
    u64 *other = pages_new(1);
    for (u32 i = 0; i < 4; i++)
        other[i] = pdpt[i];
    for (u32 i = 0; i < ARRAY_SIZE(bad); i++) {
        other[2] = pdpt[2] | BIT(bad[i]);
        asm volatile(TRY("movl %0, %%cr3")::"r"(other) : "memory");
        eq_trap(GP, 0);
        eq("CR3", read_cr3(), cr3);
    }
    if (phys_bits() < 52) {
        other[2] = pdpt[2] | BIT(phys_bits());
        asm volatile(TRY("movl %0, %%cr3")::"r"(other) : "memory");
        eq_trap(GP, 0);
    }
    other[2] = BIT(1) | BIT(63); /* not present: nothing counts */
    asm volatile(TRY("movl %0, %%cr3")::"r"(other) : "memory");
    eq_trap(NONE, NONE);
    write_cr3(cr3);
    test("paging: PAE: the table of PDPTEs is 32 bytes, aligned to 32, anywhere in a page");
    memcpy((u8 *)other + 0x520, pdpt, 32);
    asm volatile(TRY("movl %0, %%cr3")::"r"((u8 *)other + 0x520) : "memory");
    eq_trap(NONE, NONE);
    agree(VA, NONE, READ, false);
    write_cr3(cr3);
    test("paging: PAE: pages above 4 GiB; reserved bits of PTE and PDE");
    set(1, P | W | U | BIT(32));
    u32 v;
    asm volatile(TRY("movl (%1), %0") : "=r"(v) : "r"(VA) : "memory");
    eq_trap(NONE, NONE);
    must("not the page below 4 GiB", v != *(u32 *)page);
    set(1, P | W | U | BIT(52));
    agree(VA, PF_P | PF_RSVD, READ, false);
    set(1, P | W | U | BIT(62));
    agree(VA, PF_P | PF_RSVD, READ, false);
    set(1, P | W | U | BIT(63)); /* NXE = 0 */
    agree(VA, PF_P | PF_RSVD, READ, false);
    set(2, P | W | U | BIT(13));
    agree(va(2), PF_P | PF_RSVD, READ, false);
}

static void switching(void)
{
    u32 v;

    test("paging: off, 32-bit, PAE, off: each at once");
    for (int i = 0; i < 4; i++) {
        mode(false);
        set(1, P | W | U);
        *(u32 *)(page + 4) = 0x1000 + i;
        asm volatile(TRY("movl 4(%1), %0") : "=r"(v) : "r"(VA) : "memory");
        eq("32-bit", v, 0x1000 + i);
        mode(true);
        set(1, P | W | U);
        asm volatile(TRY("movl 4(%1), %0") : "=r"(v) : "r"(VA) : "memory");
        eq("PAE", v, 0x1000 + i);
        write_cr0(read_cr0() & ~(ulong)CR0_PG);
        asm volatile(TRY("movl 4(%1), %0") : "=r"(v) : "r"(page) : "memory");
        eq("off", v, 0x1000 + i);
    }
    test("paging: long mode: LME with PG and without PAE: #GP(0) at MOV CR0 (SDM 2B MOV CR)");
    write_cr0(read_cr0() & ~(ulong)CR0_PG);
    write_cr4(read_cr4() & ~(ulong)CR4_PAE);
    wrmsr(MSR_EFER, EFER_LME);
    asm volatile(TRY("movl %%cr0, %%eax; orl $0x80000000, %%eax; movl %%eax, %%cr0")::: "eax", "memory");
    eq_trap(GP, 0);
    eq("LMA", rdmsr(MSR_EFER) & EFER_LMA, 0);
    wrmsr(MSR_EFER, 0);
    test("paging: PCIDE outside of long mode: #GP(0)");
    asm volatile(TRY("movl %%cr4, %%eax; orl $0x20000, %%eax; movl %%eax, %%cr4")::: "eax", "memory");
    eq_trap(GP, 0);
}

int main(void)
{
    build();
    mode(false);
    rights();
    accessed_dirty();
    reserved_32();
    mode(true);
    rights();
    accessed_dirty();
    pdptes();
    switching();
    done();
}
