/*
 * 4-level paging: rights, error codes and CR2, reserved bits, accessed and dirty bits, protection keys. SDM vol. 3A
 * chapter 4.
 */
#include "sys.h"

enum { READ, WRITE, EXEC };
static const char *const access_name[] = {"read", "write", "fetch"};
#define VA_OTHER 0x0000008000000000ul /* another PML4 entry than the program's own */

static u64 pg; /* a page whose first byte is RET */

static void access(ulong va, int kind, bool user, bool ac)
{
    ulong flags = ac ? F_AC | F_1 : F_1;

    if (user) {
        user_flags = flags;
        if (kind == READ)
            asm volatile(USER("movb (%0), %%al")::"r"(va) : "rax", "memory");
        else if (kind == WRITE)
            asm volatile(USER("movb $0xc3, (%0)")::"r"(va) : "memory");
        else
            asm volatile(USER("call *%0")::"r"(va) : "memory");
        user_flags = F_1;
        if (trap.vector == VEC_DONE)
            trap.vector = NONE;
        return;
    }
    if (kind == READ)
        asm volatile(TRY("push %1; popf; movb (%0), %%al; push $2; popf")::"r"(va), "r"(flags) : "rax", "memory", "cc");
    else if (kind == WRITE)
        asm volatile(TRY("push %1; popf; movb $0xc3, (%0); push $2; popf")::"r"(va), "r"(flags) : "memory", "cc");
    else
        asm volatile(TRY("push %1; popf; call *%0; push $2; popf")::"r"(va), "r"(flags) : "memory", "cc");
}

struct mode {
    bool wp, smep, smap, ac, nxe;
};

/* The error code of a fault, or NONE: SDM 3A 4.6.1 and 4.7. bits: of all levels together. */
static u32 model(const struct mode *m, u64 bits, int kind, bool user)
{
    u32 e = (kind == WRITE ? PF_W : 0) | (user ? PF_U : 0) | (kind == EXEC && (m->nxe || m->smep) ? PF_I : 0);

    if (!(bits & PTE_P))
        return e;
    e |= PF_P;
    if (user && !(bits & PTE_U))
        return e;
    if (kind == WRITE && !(bits & PTE_W) && (user || m->wp))
        return e;
    if (kind == EXEC && (bits & PTE_NX))
        return e;
    if (!user && (bits & PTE_U) && ((kind == EXEC && m->smep) || (kind != EXEC && m->smap && !m->ac)))
        return e;
    return NONE;
}

/* Makes the access; on a mismatch adds what, expected and got to the open check. */
static bool agree(ulong va, u32 want, int kind, bool user, bool ac)
{
    access(va, kind, user, ac);
    if (trap.vector == (want == NONE ? NONE : PF) && (want == NONE || (trap.error == want && trap.cr2 == va)))
        return true;
    must(user            ? access_name[kind]
         : kind == READ  ? "supervisor's read"
         : kind == WRITE ? "supervisor's write"
                         : "supervisor's fetch",
         false);
    eq("error code", trap.vector == NONE ? NONE : trap.error, want);
    if (trap.vector != NONE)
        eq("CR2", trap.cr2, va);
    return false;
}

static u64 leaf_base(int level) { return level == 1 ? pg : level == 2 ? (pg & ~0x1ffffful) | PTE_PS : PTE_PS; }

static void set_mode(const struct mode *m)
{
    write_cr0((read_cr0() & ~(ulong)CR0_WP) | (m->wp ? CR0_WP : 0));
    write_cr4((read_cr4() & ~(ulong)(CR4_SMEP | CR4_SMAP)) | (m->smep ? CR4_SMEP : 0) | (m->smap ? CR4_SMAP : 0));
    wrmsr(MSR_EFER, (rdmsr(MSR_EFER) & ~(u64)EFER_NXE) | (m->nxe ? EFER_NXE : 0));
}

static const struct mode plain = {.nxe = true};

static void rights_of_leaf(int level, const struct mode *m)
{
    static const char *const size[] = {"", "4 KiB", "2 MiB", "1 GiB"};
    ulong va = VA_TEST + (level == 1 ? 0 : pg);

    test("paging: rights of a %s page, WP=%d SMEP=%d SMAP=%d AC=%d NXE=%d", size[level], m->wp, m->smep, m->smap, m->ac,
         m->nxe);
    if (((m->smep && !(cpuid(7, 0).b & BIT(7)))) || (m->smap && !(cpuid(7, 0).b & BIT(20)))) {
        skip("no SMEP or no SMAP");
        return;
    }
    if (level == 3 && !(cpuid(0x80000001, 0).d & BIT(26))) {
        skip("no 1 GiB pages");
        return;
    }
    set_mode(m);
    *pte(VA_TEST, 3) = 0;
    for (unsigned c = 0; c < 16; c++) {
        u64 bits = (c & 7) | (c & 8 ? PTE_NX : 0);
        if ((bits & PTE_NX) && !m->nxe)
            continue;
        *pte(va, level) = leaf_base(level) | bits;
        invlpg((void *)va);
        for (int kind = READ; kind <= EXEC; kind++)
            for (int user = 0; user < 2; user++)
                if (!agree(va, model(m, bits, kind, user), kind, user, m->ac)) {
                    eq("(with these leaf bits)", 0, bits & ~PTE_NX);
                    eq("(and NX)", 0, bits >> 63);
                    set_mode(&plain);
                    return;
                }
    }
    set_mode(&plain);
}

static void rights(void)
{
    for (int level = 1; level <= 3; level++)
        for (unsigned c = 0; c < 32; c++) {
            struct mode m = {.wp = c & 1, .smep = c & 2, .smap = c & 4, .ac = c & 8, .nxe = !(c & 16)};
            if ((m.ac && !m.smap) || (level > 1 && c & 16))
                continue;
            rights_of_leaf(level, &m);
        }
    *pte(VA_TEST, 3) = 0;
    write_cr3(read_cr3());
}

/* Rights are those of all levels together: W and U are and-ed, NX or-ed (SDM 3A 4.6). */
static void rights_of_tables(void)
{
    static const struct mode m = {.wp = true, .nxe = true};

    for (int level = 2; level <= 4; level++)
        for (unsigned c = 0; c < 16; c++) {
            u64 bits = (c & 7) | (c & 8 ? PTE_NX : 0), keep;
            test("paging: rights in a level %d table entry: P=%d W=%d U=%d NX=%d", level, c & 1, c >> 1 & 1, c >> 2 & 1,
                 c >> 3);
            set_mode(&m);
            *pte(VA_OTHER, 1) = pg | PTE_P | PTE_W | PTE_U;
            keep = *pte(VA_OTHER, level);
            *pte(VA_OTHER, level) = (keep & PTE_ADDR) | bits;
            invlpg((void *)VA_OTHER);
            for (int kind = READ; kind <= EXEC; kind++)
                for (int user = 0; user < 2; user++)
                    agree(VA_OTHER, model(&m, bits, kind, user), kind, user, false);
            *pte(VA_OTHER, level) = keep;
            invlpg((void *)VA_OTHER);
        }
    set_mode(&plain);
}

static void reserved_entry(const char *name, int leaf, int level, u64 bit, u32 want_extra)
{
    ulong va = VA_OTHER + pg;
    u64 keep;

    test("paging: reserved: %s", name);
    *pte(VA_OTHER, 4) = 0;
    *pte(va, leaf) = leaf_base(leaf) | 7;
    keep = *pte(va, level);
    *pte(va, level) = keep | bit;
    invlpg((void *)va);
    for (int kind = READ; kind <= EXEC; kind++)
        for (int user = 0; user < 2; user++)
            agree(va,
                  (kind == WRITE ? PF_W : 0) | (user ? PF_U : 0) |
                      (kind == EXEC && rdmsr(MSR_EFER) & EFER_NXE ? PF_I : 0) | want_extra,
                  kind, user, false);
    *pte(va, level) = (keep & ~1ull) | bit; /* P = 0: nothing else counts (SDM 3A 4.7) */
    invlpg((void *)va);
    agree(va, 0, READ, false, false);
    *pte(va, level) = keep;
    invlpg((void *)va);
}

/* SDM 3A table 4-14 and 4.4.2: bits that must be zero in a present entry give error code bits 0 and 3. */
static void reserved(void)
{
    bool has_1g = cpuid(0x80000001, 0).d & BIT(26);

    if (phys_bits() < 52) {
        reserved_entry("address bit MAXPHYADDR of a PTE", 1, 1, BIT(phys_bits()), PF_RSVD | PF_P);
        reserved_entry("address bit 51 of a PTE", 1, 1, BIT(51), PF_RSVD | PF_P);
        reserved_entry("address bit MAXPHYADDR of a PDE", 1, 2, BIT(phys_bits()), PF_RSVD | PF_P);
        reserved_entry("address bit MAXPHYADDR of a PDPTE", 1, 3, BIT(phys_bits()), PF_RSVD | PF_P);
        reserved_entry("address bit MAXPHYADDR of a PML4E", 1, 4, BIT(phys_bits()), PF_RSVD | PF_P);
        reserved_entry("address bit MAXPHYADDR of a 2 MiB page", 2, 2, BIT(phys_bits()), PF_RSVD | PF_P);
    }
    reserved_entry("PS in a PML4E", 1, 4, PTE_PS, PF_RSVD | PF_P);
    reserved_entry("bit 13 of a 2 MiB page", 2, 2, BIT(13), PF_RSVD | PF_P);
    reserved_entry("bit 20 of a 2 MiB page", 2, 2, BIT(20), PF_RSVD | PF_P);
    if (has_1g) {
        reserved_entry("bit 13 of a 1 GiB page", 3, 3, BIT(13), PF_RSVD | PF_P);
        reserved_entry("bit 29 of a 1 GiB page", 3, 3, BIT(29), PF_RSVD | PF_P);
    } else {
        reserved_entry("PS in a PDPTE without 1 GiB pages", 3, 3, PTE_PS, PF_RSVD | PF_P);
    }
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~(u64)EFER_NXE);
    reserved_entry("NX of a PTE while EFER.NXE = 0", 1, 1, PTE_NX, PF_RSVD | PF_P);
    reserved_entry("NX of a PDE while EFER.NXE = 0", 1, 2, PTE_NX, PF_RSVD | PF_P);
    reserved_entry("NX of a PML4E while EFER.NXE = 0", 1, 4, PTE_NX, PF_RSVD | PF_P);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
    /* PAT of a large page (bit 12) and the ignored bits 52..58 are not reserved */
    test("paging: not reserved: PAT of a 2 MiB page, bits 52 to 58, bits 9 to 11");
    *pte(VA_OTHER, 4) = 0;
    *pte(VA_OTHER + pg, 2) = leaf_base(2) | 7 | BIT(12) | 0x07f0000000000e00;
    agree(VA_OTHER + pg, NONE, READ, true, false);
    agree(VA_OTHER + pg, NONE, WRITE, false, false);
    *pte(VA_OTHER, 4) = 0;
    write_cr3(read_cr3());
}

/* SDM 3A 4.8 */
static void accessed_dirty(int level, int kind, bool user, bool faults)
{
    ulong va = VA_OTHER + pg;
    u64 leaf, upper_a = PTE_A, upper_d = 0;

    *pte(VA_OTHER, 4) = 0;
    *pte(va, level) = leaf_base(level) | PTE_P | (faults ? 0 : PTE_W | PTE_U);
    write_cr3(read_cr3());
    if (kind == EXEC && faults)
        *pte(va, level) |= PTE_NX;
    write_cr0(read_cr0() | CR0_WP);
    access(va, kind, user, false);
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
    eq("faulted", trap.vector == PF, faults);
    leaf = *pte(va, level);
    eq("leaf's A", leaf & PTE_A, faults ? 0 : PTE_A);
    eq("leaf's D", leaf & PTE_D, faults || kind != WRITE ? 0 : PTE_D);
    for (int l = level + 1; l <= 4; l++) {
        upper_a &= *pte(va, l);
        upper_d |= *pte(va, l) & PTE_D;
    }
    if (!faults)
        eq("A of the tables", upper_a, PTE_A);
    eq("D of the tables", upper_d, 0);
}

static void accessed_dirty_bits(void)
{
    for (int level = 1; level <= (cpuid(0x80000001, 0).d & BIT(26) ? 3 : 2); level++)
        for (int kind = READ; kind <= EXEC; kind++)
            for (int user = 0; user < 2; user++) {
                test("paging: A and D after a %s at CPL %d, level %d", access_name[kind], user * 3, level);
                accessed_dirty(level, kind, user, false);
                if (kind == READ && !user)
                    continue;
                test("paging: no A, no D after a faulting %s at CPL %d, level %d", access_name[kind], user * 3, level);
                accessed_dirty(level, kind, user, true);
            }

    test("paging: D appears with the first write, also when A is set already by a read");
    map(VA_TEST, pg, 7);
    access(VA_TEST, READ, false, false);
    eq("after the read", *pte(VA_TEST, 1) & (PTE_A | PTE_D), PTE_A);
    access(VA_TEST, WRITE, false, false);
    eq("after the write", *pte(VA_TEST, 1) & (PTE_A | PTE_D), PTE_A | PTE_D);

    test("paging: D is set again after it was cleared and the page invalidated");
    *pte(VA_TEST, 1) &= ~PTE_D;
    invlpg((void *)VA_TEST);
    access(VA_TEST, WRITE, false, false);
    eq("D", *pte(VA_TEST, 1) & PTE_D, PTE_D);

    test("paging: a locked read-modify-write that does not store a new value sets D (CMPXCHG, SDM 3A 4.8)");
    *pte(VA_TEST, 1) &= ~PTE_D;
    invlpg((void *)VA_TEST);
    asm volatile("lock cmpxchgl %1, (%0)" ::"r"(VA_TEST), "r"(1), "a"(0x12345678) : "memory", "cc");
    eq("D", *pte(VA_TEST, 1) & PTE_D, PTE_D);

    test("paging: the entries of the tables themselves are read by physical address: no A for their own mapping");
    u64 t = *pte(VA_TEST, 2) & PTE_ADDR;
    map(VA_TEST + 0x1000, t, 3); /* the page table that maps VA_TEST, mapped in itself */
    access(VA_TEST, READ, false, false);
    eq("A", *pte(VA_TEST + 0x1000, 1) & PTE_A, 0);
}

static void crossing(void)
{
    u64 a = page_new(), b = page_new(), v = 0;
    u8 *p = (u8 *)VA_TEST + 0x1000;

    memset((void *)a, 0x11, 4096);
    memset((void *)b, 0x22, 4096);
    map(VA_TEST, a, 3);
    map(VA_TEST + 0x1000, b, 3);
    test("paging: an access over a page boundary takes its halves from both pages");
    asm volatile(TRY("movq -3(%1), %0") : "=r"(v) : "r"(p));
    eq("value", v, 0x2222222222111111);

    test("paging: a read over the boundary into an absent page: CR2 is the second page's first byte");
    map(VA_TEST + 0x1000, 0, 0);
    asm volatile(TRY("movq -3(%1), %0") : "=r"(v) : "r"(p));
    eq_trap(PF, 0);
    eq("CR2", trap.cr2, (ulong)p);

    test("paging: a write over the boundary into an absent page writes nothing");
    asm volatile(TRY("movq %0, -3(%1)")::"r"(0ul), "r"(p) : "memory");
    eq_trap(PF, PF_W);
    eq("CR2", trap.cr2, (ulong)p);
    eq("first page", *(u32 *)(a + 4092), 0x11111111);

    test("paging: a write over the boundary into a read-only page writes nothing (WP)");
    map(VA_TEST + 0x1000, b, 1);
    write_cr0(read_cr0() | CR0_WP);
    asm volatile(TRY("movq %0, -3(%1)")::"r"(0ul), "r"(p) : "memory");
    eq_trap(PF, PF_W | PF_P);
    eq("first page", *(u32 *)(a + 4092), 0x11111111);
    write_cr0(read_cr0() & ~(ulong)CR0_WP);

    test("paging: the first page's fault is reported when both halves fault");
    map(VA_TEST, a, 0);
    map(VA_TEST + 0x1000, b, 0);
    asm volatile(TRY("movq %0, -3(%1)")::"r"(0ul), "r"(p) : "memory");
    eq("CR2", trap.cr2, (ulong)p - 3);

    test("paging: read-modify-write of an absent page reports a write");
    asm volatile(TRY("addl $1, (%0)")::"r"(VA_TEST) : "memory", "cc");
    eq_trap(PF, PF_W);
    test("paging: read-modify-write of a read-only page changes neither memory nor flags");
    map(VA_TEST, a, 1);
    write_cr0(read_cr0() | CR0_WP);
    asm volatile(TRY("xorl %%eax, %%eax; addl $-1, (%0)")::"r"(VA_TEST) : "memory", "cc", "rax");
    eq_trap(PF, PF_W | PF_P);
    eq("memory", *(u32 *)a, 0x11111111);
    eq("flags", trap.flags & (F_CF | F_ZF | F_SF | F_PF), F_ZF | F_PF);
    test("paging: XCHG, CMPXCHG of a read-only page fault as writes and leave the register");
    asm volatile(TRY("xchgq %0, (%1)") : "+r"(v) : "r"(VA_TEST) : "memory");
    eq_trap(PF, PF_W | PF_P);
    u32 eax = 5;
    asm volatile(TRY("lock cmpxchgl %1, (%2)") : "+a"(eax) : "r"(7), "r"(VA_TEST) : "memory", "cc");
    eq_trap(PF, PF_W | PF_P);
    eq("EAX", eax, 5);
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
}

/* SDM 3A 4.6.1: accesses to GDT, LDT, IDT, TSS are implicit supervisor accesses, whatever the CPL; SMAP applies to them
 * regardless of AC. */
static void implicit(void)
{
    u64 g = page_new();
    struct table_reg r = {0xfff, VA_TEST};
    bool smap = cpuid(7, 0).b & BIT(20);

    memcpy((void *)g, gdt, sizeof(gdt));
    map(VA_TEST, g, 3);
    lgdt(&r);
    test("paging: at CPL 3 a descriptor is read from a supervisor page");
    asm volatile(USER("mov %0, %%ds")::"r"(UDS));
    eq_trap(VEC_DONE, NONE);
    lgdt(&gdt_reg);

    test("paging: SMAP: a descriptor in a user page cannot be read, AC or not");
    if (!smap) {
        skip("no SMAP");
    } else {
        /* the upper half of the table lies in another page, so that the catcher's selectors still load */
        u64 *t = pages_new(2);
        memcpy(t, gdt, sizeof(gdt));
        t[512] = gdt[UDS / 8];
        map(VA_TEST, (u64)t, 3);
        map(VA_TEST + 0x1000, (u64)t + 4096, 7);
        r.limit = 0x1fff;
        lgdt(&r);
        asm volatile(TRY("mov %0, %%ds")::"r"(0x1000));
        eq_trap(NONE, NONE);
        write_cr4(read_cr4() | CR4_SMAP);
        asm volatile(TRY("mov %0, %%ds")::"r"(0x1000));
        eq_trap(PF, PF_P);
        eq("CR2", trap.cr2, VA_TEST + 0x1000);
        asm volatile(TRY("stac; mov %0, %%ds; clac")::"r"(0x1000));
        eq_trap(PF, PF_P);
        asm volatile(USER("mov %0, %%ds")::"r"(0x1003));
        eq_trap(PF, PF_P);
        write_cr4(read_cr4() & ~(ulong)CR4_SMAP);
        lgdt(&gdt_reg);
    }
    asm volatile("mov %0, %%ds" ::"r"(KDS));
}

static void protection_keys(void)
{
    bool pku = cpuid(7, 0).c & BIT(3);

    for (unsigned c = 0; c < 4; c++) {
        test("paging: protection key with PKRU AD=%d WD=%d", c & 1, c >> 1);
        if (!pku) {
            skip("no protection keys");
            continue;
        }
        write_cr4(read_cr4() | CR4_PKE);
        map(VA_TEST, pg, 7 | PTE_PKEY(5));
        asm volatile("wrpkru" ::"a"(c << 10), "c"(0), "d"(0));
        /* SDM 3A 4.6.2: AD stops all data accesses to user pages, WD writes at CPL 3 and, with WP, at CPL 0; never
         * fetches */
        for (int wp = 0; wp < 2; wp++) {
            write_cr0((read_cr0() & ~(ulong)CR0_WP) | (wp ? CR0_WP : 0));
            for (int user = 0; user < 2; user++) {
                u32 u = user ? PF_U : 0;
                agree(VA_TEST, c & 1 ? PF_PK | PF_P | u : NONE, READ, user, false);
                agree(VA_TEST, c & 1 || (c & 2 && (user || wp)) ? PF_PK | PF_P | PF_W | u : NONE, WRITE, user, false);
                agree(VA_TEST, NONE, EXEC, user, false);
            }
        }
        write_cr0(read_cr0() & ~(ulong)CR0_WP);
        map(VA_TEST, pg, 7 | PTE_PKEY(4));
        agree(VA_TEST, NONE, WRITE, true, false);
        map(VA_TEST, pg, 3 | PTE_PKEY(5)); /* keys are for user pages only */
        agree(VA_TEST, NONE, WRITE, false, false);
        map(VA_TEST, pg, 5 | PTE_PKEY(5)); /* both reasons at once: the PK bit is set as well */
        asm volatile("wrpkru" ::"a"(3 << 10), "c"(0), "d"(0));
        agree(VA_TEST, PF_PK | PF_P | PF_W | PF_U, WRITE, true, false);
        asm volatile("wrpkru" ::"a"(0), "c"(0), "d"(0));
        write_cr4(read_cr4() & ~(ulong)CR4_PKE);
        agree(VA_TEST, NONE, READ, true, false);
    }
    test("paging: PKU instructions: #UD while CR4.PKE = 0, #GP for ECX or EDX not 0");
    if (!pku) {
        skip("no protection keys");
        return;
    }
    asm volatile(TRY("rdpkru")::"c"(0) : "rax", "rdx");
    eq_trap(UD, NONE);
    asm volatile(TRY("wrpkru")::"a"(0), "c"(0), "d"(0));
    eq_trap(UD, NONE);
    eq("OSPKE", cpuid(7, 0).c & BIT(4), 0);
    write_cr4(read_cr4() | CR4_PKE);
    eq("OSPKE", cpuid(7, 0).c & BIT(4), BIT(4));
    asm volatile(TRY("rdpkru")::"c"(1) : "rax", "rdx");
    eq_trap(GP, 0);
    asm volatile(TRY("wrpkru")::"a"(0), "c"(1), "d"(0));
    eq_trap(GP, 0);
    asm volatile(TRY("wrpkru")::"a"(0), "c"(0), "d"(1));
    eq_trap(GP, 0);
    u32 a = 1, d = 1;
    asm volatile("wrpkru" ::"a"(0x55), "c"(0), "d"(0));
    asm volatile(TRY("rdpkru") : "=a"(a), "=d"(d) : "c"(0));
    eq("PKRU", a, 0x55);
    eq("EDX", d, 0);
    asm volatile("wrpkru" ::"a"(0), "c"(0), "d"(0));
    write_cr4(read_cr4() & ~(ulong)CR4_PKE);
}

static void stac_clac(void)
{
    test("SMAP: STAC and CLAC change AC at CPL 0, #UD at CPL 3");
    if (!(cpuid(7, 0).b & BIT(20))) {
        skip("no SMAP");
        return;
    }
    ulong f;
    asm volatile(TRY("stac; pushf; pop %0; clac") : "=r"(f)::"cc");
    eq("AC", f & F_AC, F_AC);
    asm volatile(TRY("stac; clac; pushf; pop %0") : "=r"(f)::"cc");
    eq("AC", f & F_AC, 0);
    asm volatile(USER("stac")::);
    eq_trap(UD, NONE);
    asm volatile(USER("clac")::);
    eq_trap(UD, NONE);
}

int main(void)
{
    pg = page_new();
    *(u8 *)pg = 0xc3;
    rights();
    rights_of_tables();
    reserved();
    accessed_dirty_bits();
    crossing();
    stac_clac();
    protection_keys();
    implicit();
    done();
}
