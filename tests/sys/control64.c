/*
 * Control registers, model-specific registers, CPUID, time-stamp counter, UMIP, FSGSBASE, and the privileged
 * instructions. SDM vol. 3A 2.5, 2.8; vol. 2; vol. 4.
 */
#include "sys.h"

static u32 feat7b, feat7c;

#define WRITE_CR(n, v) ({ asm volatile(TRY("movq %0, %%cr" #n)::"r"((ulong)(v)) : "memory"); })
static bool wrmsr_gp(u32 msr, u64 v)
{
    asm volatile(TRY("wrmsr")::"c"(msr), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
    return trap.vector == GP && trap.error == 0;
}
static bool rdmsr_gp(u32 msr)
{
    asm volatile(TRY("rdmsr")::"c"(msr) : "rax", "rdx");
    return trap.vector == GP && trap.error == 0;
}

static void control_registers(void)
{
    ulong cr0 = read_cr0(), cr4 = read_cr4(), cr3 = read_cr3(), v;

    test("CR0: PG without PE, NW without CD, bits 32 to 63: #GP(0) (SDM 2B MOV CR)");
    WRITE_CR(0, cr0 & ~(ulong)CR0_PE);
    eq_trap(GP, 0);
    WRITE_CR(0, (cr0 | CR0_NW) & ~(ulong)CR0_CD);
    eq_trap(GP, 0);
    WRITE_CR(0, cr0 | BIT(32));
    eq_trap(GP, 0);
    WRITE_CR(0, cr0 | BIT(63));
    eq_trap(GP, 0);
    eq("CR0", read_cr0(), cr0);
    test("CR0: PG cannot be cleared in 64-bit code: #GP(0)");
    WRITE_CR(0, cr0 & ~(ulong)CR0_PG);
    eq_trap(GP, 0);
    test("CR0: ET is always 1, the reserved bits below 32 stay 0");
    WRITE_CR(0, (cr0 & ~0x10ul) | 0x1ffaffc0);
    eq_trap(NONE, NONE);
    eq("CR0", read_cr0(), cr0 | 0x10);
    write_cr0(cr0);
    test("CR0: CD with NW, CD alone are good");
    WRITE_CR(0, cr0 | CR0_CD | CR0_NW);
    eq_trap(NONE, NONE);
    WRITE_CR(0, cr0 | CR0_CD);
    eq_trap(NONE, NONE);
    write_cr0(cr0);
    test("CR4: PAE cannot be cleared in long mode: #GP(0)");
    WRITE_CR(4, cr4 & ~(ulong)CR4_PAE);
    eq_trap(GP, 0);
    test("CR4: bits of features that are not there: #GP(0)");
    static const u8 never[] = {15, 19, 26, 28, 29, 30, 31, 33, 40, 63};
    for (unsigned i = 0; i < ARRAY_SIZE(never); i++) {
        WRITE_CR(4, cr4 | BIT(never[i]));
        eq_trap(GP, 0);
    }
    WRITE_CR(4, cr4 | BIT(13)); /* VMXE */
    eq_trap(cpuid(1, 0).c & BIT(5) ? NONE : GP, cpuid(1, 0).c & BIT(5) ? NONE : 0);
    write_cr4(cr4);
    test("CR4: bits of features that are there");
    struct {
        u32 bit;
        bool has;
    } f[] = {
        {CR4_VME, cpuid(1, 0).d & 2},
        {CR4_PVI, cpuid(1, 0).d & 2},
        {CR4_TSD, cpuid(1, 0).d & 16},
        {CR4_DE, cpuid(1, 0).d & 4},
        {CR4_PSE, cpuid(1, 0).d & 8},
        {CR4_PGE, cpuid(1, 0).d & BIT(13)},
        {CR4_PCE, true},
        {CR4_OSFXSR, cpuid(1, 0).d & BIT(24)},
        {CR4_OSXMMEXCPT, cpuid(1, 0).d & BIT(25)},
        {CR4_UMIP, feat7c & BIT(2)},
        {CR4_FSGSBASE, feat7b & 1},
        {CR4_OSXSAVE, cpuid(1, 0).c & BIT(26)},
        {CR4_SMEP, feat7b & BIT(7)},
        {CR4_SMAP, feat7b & BIT(20)},
        {CR4_PKE, feat7c & BIT(3)},
        {CR4_PCIDE, cpuid(1, 0).c & BIT(17)},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(f); i++) {
        WRITE_CR(4, cr4 | f[i].bit);
        eq("vector", trap.vector, f[i].has ? NONE : GP);
        if (f[i].has)
            eq("bit", read_cr4() & f[i].bit, f[i].bit);
        write_cr4(cr4);
    }
    test("CR3: bits above MAXPHYADDR: #GP(0); bits 3 and 4 are kept");
    if (phys_bits() < 52) {
        WRITE_CR(3, cr3 | BIT(phys_bits()));
        eq_trap(GP, 0);
        WRITE_CR(3, cr3 | BIT(51));
        eq_trap(GP, 0);
    }
    WRITE_CR(3, cr3 | BIT(62));
    eq_trap(GP, 0);
    WRITE_CR(3, cr3 | 0x18);
    eq_trap(NONE, NONE);
    eq("CR3", read_cr3(), cr3 | 0x18);
    write_cr3(cr3);
    test("CR3: bit 63 without PCIDE: #GP(0)");
    WRITE_CR(3, cr3 | BIT(63));
    eq_trap(GP, 0);
    test("CR2 keeps 64 bits");
    asm volatile(TRY("movq %1, %%cr2; movq %%cr2, %0") : "=r"(v) : "r"(0xfedcba9876543210));
    eq_trap(NONE, NONE);
    eq("CR2", v, 0xfedcba9876543210);
    test("CR8: 0 to 15; more is #GP(0); #GP(0) at CPL 3");
    asm volatile(TRY("movq %1, %%cr8; movq %%cr8, %0; movq %2, %%cr8") : "=&r"(v) : "r"(9ul), "r"(0ul));
    eq_trap(NONE, NONE);
    eq("CR8", v, 9);
    asm volatile(TRY("movq %0, %%cr8")::"r"(16ul));
    eq_trap(GP, 0);
    asm volatile(USER("movq %%cr8, %0") : "=r"(v));
    eq_trap(GP, 0);
    test("MOV CR: the mod field is not looked at");
    EXEC(false, 0x0f, 0x20, 0x00);
    eq_trap(NONE, NONE);
    EXEC(false, 0x0f, 0x20, 0x40);
    eq_trap(NONE, NONE);
    test("MOV CR: operand size is 64 bits with 66h too");
    asm volatile("movq %0, %%cr2" ::"r"(0x1234567890abcdef));
    asm volatile(TRY(".byte 0x66, 0x0f, 0x20, 0xd0") : "=a"(v));
    eq_trap(NONE, NONE);
    eq("CR2", v, 0x1234567890abcdef);
    test("LMSW sets and clears MP, EM, TS; sets PE, never clears it; SMSW reads");
    asm volatile(TRY("lmsw %w0")::"r"(0xe));
    eq_trap(NONE, NONE);
    eq("CR0", read_cr0(), (cr0 & ~0xful) | 0xf);
    asm volatile(TRY("lmsw %w0")::"r"(0xfff0));
    eq("CR0", read_cr0(), (cr0 & ~0xful) | 1);
    asm volatile(TRY("smsw %0") : "=r"(v));
    eq("SMSW of 64 bits", v, read_cr0());
    asm volatile(TRY("smsw %k0") : "=r"(v) : "0"(~0ul));
    eq("SMSW of 32 bits", v, (u32)read_cr0());
    asm volatile(TRY("smsw %w0") : "=r"(v) : "0"(~0ul));
    eq("SMSW of 16 bits", v, ~0xfffful | (read_cr0() & 0xffff));
    write_cr0(cr0);
    test("CLTS clears TS");
    write_cr0(cr0 | CR0_TS);
    asm volatile(TRY("clts")::: "memory");
    eq("TS", read_cr0() & CR0_TS, 0);
}

/* SDM 3A 2.5 (CR0.EM, MP, TS), 13.1, 14.1 */
static void fpu_bits(void)
{
    static const struct {
        const char *name;
        u8 n, b[8];
        u8 em, ts, mp_ts,
            no_osfxsr; /* the vector with CR0.EM; with TS; with TS and MP; with CR4.OSFXSR = 0. 0xff: none */
    } op[] = {
        {"x87 FNOP", 2, {0xd9, 0xd0}, NM, NM, NM, 0xff},
        {"WAIT", 1, {0x9b}, 0xff, 0xff, NM, 0xff},
        {"MMX PXOR", 3, {0x0f, 0xef, 0xc0}, UD, NM, NM, 0xff},
        {"EMMS", 2, {0x0f, 0x77}, UD, NM, NM, 0xff},
        {"SSE XORPS", 3, {0x0f, 0x57, 0xc0}, UD, NM, NM, UD},
        {"SSE2 PXOR", 4, {0x66, 0x0f, 0xef, 0xc0}, UD, NM, NM, UD},
        {"LDMXCSR", 3, {0x0f, 0xae, 0x17}, UD, NM, NM, UD},
        {"FXSAVE", 3, {0x0f, 0xae, 0x07}, NM, NM, NM, 0xff},
        {"SFENCE", 3, {0x0f, 0xae, 0xf8}, 0xff, 0xff, 0xff, 0xff},
        {"MOVNTI", 3, {0x0f, 0xc3, 0x07}, 0xff, 0xff, 0xff, 0xff},
        {"PREFETCHT0", 3, {0x0f, 0x18, 0x0f}, 0xff, 0xff, 0xff, 0xff},
        {"CRC32", 5, {0xf2, 0x0f, 0x38, 0xf1, 0xc0}, 0xff, 0xff, 0xff, 0xff},
        {"POPCNT", 4, {0xf3, 0x0f, 0xb8, 0xc0}, 0xff, 0xff, 0xff, 0xff},
    };
    ulong cr0 = read_cr0() & ~(ulong)(CR0_EM | CR0_TS | CR0_MP), cr4 = read_cr4();
    u32 *mxcsr = (u32 *)exec_data;

    write_cr4(cr4 | CR4_OSFXSR);
    for (unsigned i = 0; i < ARRAY_SIZE(op); i++) {
        test("CR0.EM, TS, MP, CR4.OSFXSR: %s", op[i].name);
#define RUN(c0, c4, want)                                                                                              \
    do {                                                                                                               \
        *mxcsr = 0x1f80;                                                                                               \
        write_cr4(c4);                                                                                                 \
        write_cr0(c0);                                                                                                 \
        exec(op[i].b, op[i].n, false);                                                                                 \
        write_cr0(cr0);                                                                                                \
        eq_trap((want) == 0xff ? NONE : (want), NONE);                                                                 \
    } while (0)
        RUN(cr0, cr4 | CR4_OSFXSR, 0xff);
        RUN(cr0 | CR0_EM, cr4 | CR4_OSFXSR, op[i].em);
        RUN(cr0 | CR0_TS, cr4 | CR4_OSFXSR, op[i].ts);
        RUN(cr0 | CR0_MP, cr4 | CR4_OSFXSR, 0xff);
        RUN(cr0 | CR0_TS | CR0_MP, cr4 | CR4_OSFXSR, op[i].mp_ts);
        RUN(cr0, cr4 & ~(ulong)CR4_OSFXSR, op[i].no_osfxsr);
    }
    write_cr0(cr0 | CR0_MP);
    write_cr4(cr4);
}

static void model_specific(void)
{
    u64 efer = rdmsr(MSR_EFER);

    test("EFER: reserved bits: #GP(0)");
    must("bit 1", wrmsr_gp(MSR_EFER, efer | 2));
    must("bit 9", wrmsr_gp(MSR_EFER, efer | BIT(9)));
    must("bit 63", wrmsr_gp(MSR_EFER, efer | BIT(63)));
    test("EFER: LME cannot change while paging is on: #GP(0)");
    must("vector", wrmsr_gp(MSR_EFER, efer & ~(u64)EFER_LME));
    eq("EFER", rdmsr(MSR_EFER), efer);
    test("EFER: SCE and NXE change");
    must("good", !wrmsr_gp(MSR_EFER, (efer | EFER_SCE) & ~(u64)EFER_NXE));
    eq("EFER", rdmsr(MSR_EFER), (efer | EFER_SCE) & ~(u64)EFER_NXE);
    wrmsr(MSR_EFER, efer);
    test("MSR: unknown numbers: #GP(0), read and written");
    static const u32 none[] = {0x2fffffff, 0x40001234, 0xc0001234, 0xdead0000, 0xffffffff};
    for (unsigned i = 0; i < ARRAY_SIZE(none); i++) {
        must("RDMSR", rdmsr_gp(none[i]));
        must("WRMSR", wrmsr_gp(none[i], 0));
    }
    test("MSR: RDMSR, WRMSR at CPL 3: #GP(0)");
    asm volatile(USER("rdmsr")::"c"(MSR_EFER) : "rax", "rdx");
    eq_trap(GP, 0);
    asm volatile(USER("wrmsr")::"c"(MSR_EFER), "a"((u32)efer), "d"(0));
    eq_trap(GP, 0);
    test("MSR: RDMSR clears the upper halves of RAX and RDX, and looks at ECX only");
    ulong a = ~0ul, d = ~0ul;
    asm volatile(TRY("rdmsr") : "+a"(a), "+d"(d) : "c"(0xffffffff00000000 | MSR_EFER));
    eq_trap(NONE, NONE);
    eq("RAX", a, (u32)efer);
    eq("RDX", d, 0);
    test("MSR: bases that are not canonical: #GP(0)");
    static const u32 base[] = {MSR_LSTAR, MSR_CSTAR, MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE};
    for (unsigned i = 0; i < ARRAY_SIZE(base); i++) {
        u64 keep = rdmsr(base[i]);
        must("bad", wrmsr_gp(base[i], 0x0000800000000000));
        must("bad", wrmsr_gp(base[i], 0x8000000000000000));
        must("good", !wrmsr_gp(base[i], 0xffff800000000000));
        eq("value", rdmsr(base[i]), 0xffff800000000000);
        must("good", !wrmsr_gp(base[i], 0x00007fffffffffff));
        wrmsr(base[i], keep);
    }
    test("MSR: PAT: types 2, 3, 8 and more: #GP(0)");
    u64 pat = rdmsr(0x277);
    eq("at reset", pat, 0x0007040600070406);
    must("2", wrmsr_gp(0x277, (pat & ~0xffull) | 2));
    must("3", wrmsr_gp(0x277, (pat & ~0xffull) | 3));
    must("8", wrmsr_gp(0x277, (pat & ~0xffull) | 8));
    must("high", wrmsr_gp(0x277, (pat & ~BIT(63)) | BIT(63)));
    must("good", !wrmsr_gp(0x277, 0x0001040500070406));
    eq("value", rdmsr(0x277), 0x0001040500070406);
    wrmsr(0x277, pat);
    test("MSR: MTRRs: default type: invalid types and reserved bits are #GP(0)");
    if (!(cpuid(1, 0).d & BIT(12))) {
        skip("no MTRRs");
    } else {
        must("type 2", wrmsr_gp(0x2ff, 2));
        must("type 7", wrmsr_gp(0x2ff, 7));
        must("bit 12", wrmsr_gp(0x2ff, BIT(12) | 6));
        must("good", !wrmsr_gp(0x2ff, BIT(11) | 6));
        eq("value", rdmsr(0x2ff), BIT(11) | 6);
        must("base of type 3", wrmsr_gp(0x200, 3));
        must("MTRRcap is read-only", wrmsr_gp(0xfe, 0));
    }
    test("MSR: TSC_AUX by RDTSCP and RDPID");
    if (!(cpuid(0x80000001, 0).d & BIT(27))) {
        skip("no RDTSCP");
    } else {
        u32 c;
        wrmsr(MSR_TSC_AUX, 0x12345678);
        asm volatile(TRY("rdtscp") : "=c"(c)::"rax", "rdx");
        eq("RDTSCP", c, 0x12345678);
        if (feat7c & BIT(22)) {
            asm volatile(TRY(".byte 0xf3, 0x0f, 0xc7, 0xf8") : "=a"(a));
            eq("RDPID", a, 0x12345678);
        }
        wrmsr(MSR_TSC_AUX, 0);
    }
    test("MSR: IA32_APIC_BASE of this processor: enabled, bootstrap");
    eq("bits", rdmsr(0x1b) & 0x900, 0x900);
}

static u64 rdtsc(void)
{
    u32 a, d;
    asm volatile("rdtsc" : "=a"(a), "=d"(d));
    return (u64)d << 32 | a;
}

static void time_stamp(void)
{
    ulong cr4 = read_cr4();

    test("TSC: grows");
    u64 t0 = rdtsc(), t1;
    for (volatile int i = 0; i < 10000; i++)
        ;
    t1 = rdtsc();
    must("later is more", t1 > t0);
    test("TSC: CR4.TSD: RDTSC and RDTSCP are #GP(0) at CPL 3, good at CPL 0 (SDM 3A 2.5)");
    asm volatile(USER("rdtsc")::: "rax", "rdx");
    eq_trap(VEC_DONE, NONE);
    write_cr4(cr4 | CR4_TSD);
    asm volatile(USER("rdtsc")::: "rax", "rdx");
    eq_trap(GP, 0);
    if (cpuid(0x80000001, 0).d & BIT(27)) {
        asm volatile(USER("rdtscp")::: "rax", "rdx", "rcx");
        eq_trap(GP, 0);
    }
    asm volatile(TRY("rdtsc")::: "rax", "rdx");
    eq_trap(NONE, NONE);
    write_cr4(cr4);
    test("TSC: RDPMC at CPL 3 without CR4.PCE: #GP(0)");
    asm volatile(USER("rdpmc")::"c"(0) : "rax", "rdx");
    eq_trap(GP, 0);
    test("TSC: a write of IA32_TSC moves it, and IA32_TSC_ADJUST with it (SDM 3B 17.17.3)");
    if (!(feat7b & 2)) {
        skip("no TSC_ADJUST");
        return;
    }
    u64 adjust = rdmsr(0x3b);
    wrmsr(0x10, 0x1000000000000);
    t0 = rdtsc();
    must("moved", t0 >= 0x1000000000000 && t0 < 0x1010000000000);
    must("adjust changed", rdmsr(0x3b) != adjust);
    wrmsr(0x3b, rdmsr(0x3b) + 0x2000000000000);
    t1 = rdtsc();
    must("moved by the adjustment", t1 >= 0x3000000000000 && t1 < 0x3010000000000);
    wrmsr(0x3b, adjust);
    must("back", rdtsc() < 0x1000000000000);
}

static void identification(void)
{
    ulong cr4 = read_cr4();

    test("CPUID: clears the upper halves; looks at EAX and ECX only");
    ulong a = 0xffffffff00000000, b, c = 0xffffffff00000000, d;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    eq("upper halves", (a | b | c | d) >> 32, 0);
    must("maximum", a >= 0xd);
    test("CPUID: OSXSAVE follows CR4.OSXSAVE (SDM 2A CPUID)");
    write_cr4(cr4 | CR4_OSXSAVE);
    eq("set", cpuid(1, 0).c & BIT(27), BIT(27));
    write_cr4(cr4 & ~(ulong)CR4_OSXSAVE);
    eq("clear", cpuid(1, 0).c & BIT(27), 0);
    write_cr4(cr4);
    test("CPUID: the APIC ID is the same in leaves 1 and Bh");
    if (cpuid(0, 0).a >= 0xb && cpuid(0xb, 0).b)
        eq("ID", cpuid(0xb, 0).d, cpuid(1, 0).b >> 24);
    test("CPUID: RFLAGS.ID can be changed; CPUID works at CPL 3");
    asm volatile(USER("pushfq; xorq $0x200000, (%%rsp); popfq; xorl %%eax, %%eax; cpuid")::
                     : "rax", "rbx", "rcx", "rdx", "memory", "cc");
    eq_trap(VEC_DONE, NONE);
    eq("ID", trap.flags & F_ID, F_ID);
    test("CPUID: leaves beyond the maximum: AMD zero, Intel as the highest basic leaf");
    struct cpuid last = cpuid(cpuid(0, 0).a, 0), r = cpuid(cpuid(0, 0).a + 1, 0);
    if (cpu_amd())
        eq("EAX..EDX", r.a | r.b | r.c | r.d, 0);
    else
        eq("EAX", r.a, last.a);
    test("CPUID: physical and linear address bits");
    must("36..52", phys_bits() >= 36 && phys_bits() <= 52);
    eq("linear", cpuid(0x80000008, 0).a >> 8 & 0xff, 48);
    test("CPUID: long mode, PAE, CMOV, SSE2, FXSR, NX are there");
    eq("leaf 1", cpuid(1, 0).d & (BIT(6) | BIT(15) | BIT(24) | BIT(26)), BIT(6) | BIT(15) | BIT(24) | BIT(26));
    eq("leaf 80000001h", cpuid(0x80000001, 0).d & (BIT(20) | BIT(29)), BIT(20) | BIT(29));
    test("CPUID: no feature that a guest must not see: VMX, SVM, MONITOR, RTM");
    eq("VMX, MONITOR", cpuid(1, 0).c & (BIT(5) | BIT(3)), 0);
    eq("SVM", cpuid(0x80000001, 0).c & BIT(2), 0);
    eq("HLE, RTM", feat7b & (BIT(4) | BIT(11)), 0);
}

static void umip_fsgsbase(void)
{
    ulong cr4 = read_cr4(), v = 0;

    test("UMIP: SGDT SIDT SLDT STR SMSW are #GP(0) at CPL 3, good at CPL 0");
    if (!(feat7c & BIT(2))) {
        skip("no UMIP");
    } else {
        static const u8 op[][3] = {{0x0f, 0x01, 0x07}, {0x0f, 0x01, 0x0f}, {0x0f, 0x00, 0x07}, {0x0f, 0x00, 0x0f},
                                   {0x0f, 0x01, 0x27}, {0x0f, 0x00, 0xc0}, {0x0f, 0x00, 0xc8}, {0x0f, 0x01, 0xe0}};
        for (unsigned i = 0; i < ARRAY_SIZE(op); i++) {
            exec(op[i], 3, true);
            eq_trap(NONE, NONE);
            write_cr4(cr4 | CR4_UMIP);
            exec(op[i], 3, true);
            eq_trap(GP, 0);
            exec(op[i], 3, false);
            eq_trap(NONE, NONE);
            write_cr4(cr4);
        }
    }
    test("FSGSBASE: #UD while CR4.FSGSBASE = 0, and in compatibility mode");
    if (!(feat7b & 1)) {
        skip("no FSGSBASE");
        return;
    }
    write_cr4(cr4 & ~(ulong)CR4_FSGSBASE);
    asm volatile(TRY("rdfsbase %0") : "=r"(v));
    eq_trap(UD, NONE);
    asm volatile(USER("wrgsbase %0")::"r"(v));
    eq_trap(UD, NONE);
    write_cr4(cr4 | CR4_FSGSBASE);
    asm volatile(COMPAT0(".byte 0xf3, 0x0f, 0xae, 0xc0")::: "rax");
    eq_trap(UD, NONE);
    test("FSGSBASE: at CPL 3; 32-bit forms; not canonical is #GP(0)");
    asm volatile(USER("wrfsbase %1; rdfsbase %0") : "=r"(v) : "r"(0x00007ffffffff000));
    eq_trap(VEC_DONE, NONE);
    eq("FS", v, 0x00007ffffffff000);
    eq("by MSR", rdmsr(MSR_FS_BASE), 0x00007ffffffff000);
    asm volatile(USER("wrgsbase %k1; rdgsbase %0") : "=r"(v) : "r"(0xffff800087654321));
    eq("GS", v, 0x87654321);
    asm volatile(TRY("wrfsbase %0; rdfsbase %k1") : "+r"(v) : "r"(0ul));
    asm volatile(USER("wrfsbase %0")::"r"(0x0000800000000000));
    eq_trap(GP, 0);
    static u64 word = 0x1122334455667788;
    asm volatile(TRY("wrgsbase %1; movq %%gs:0, %0") : "=r"(v) : "r"(&word));
    eq("by GS", v, word);
    wrmsr(MSR_FS_BASE, 0);
    wrmsr(MSR_GS_BASE, 0);
    write_cr4(cr4);
}

static void privileged(void)
{
    static const struct {
        const char *name;
        u8 n, b[8];
    } op[] = {
        {"LGDT", 3, {0x0f, 0x01, 0x17}},
        {"LIDT", 3, {0x0f, 0x01, 0x1f}},
        {"LLDT", 3, {0x0f, 0x00, 0xd0}},
        {"LTR", 3, {0x0f, 0x00, 0xd8}},
        {"LMSW", 3, {0x0f, 0x01, 0xf0}},
        {"CLTS", 2, {0x0f, 0x06}},
        {"HLT", 1, {0xf4}},
        {"INVD", 2, {0x0f, 0x08}},
        {"WBINVD", 2, {0x0f, 0x09}},
        {"INVLPG", 3, {0x0f, 0x01, 0x3f}},
        {"MOV from CR0", 3, {0x0f, 0x20, 0xc0}},
        {"MOV from CR2", 3, {0x0f, 0x20, 0xd0}},
        {"MOV from CR3", 3, {0x0f, 0x20, 0xd8}},
        {"MOV from CR4", 3, {0x0f, 0x20, 0xe0}},
        {"MOV to CR0", 3, {0x0f, 0x22, 0xc0}},
        {"MOV to CR3", 3, {0x0f, 0x22, 0xd8}},
        {"MOV to CR4", 3, {0x0f, 0x22, 0xe0}},
        {"MOV from DR0", 3, {0x0f, 0x21, 0xc0}},
        {"MOV to DR7", 3, {0x0f, 0x23, 0xf8}},
        {"CLI", 1, {0xfa}},
        {"STI", 1, {0xfb}},
        {"IN", 1, {0xec}},
        {"OUT", 1, {0xee}},
        {"INS", 1, {0x6c}},
        {"OUTS", 1, {0x6e}},
        {"SWAPGS", 3, {0x0f, 0x01, 0xf8}},
        {"SYSRET", 3, {0x48, 0x0f, 0x07}},
    };
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    for (unsigned i = 0; i < ARRAY_SIZE(op); i++) {
        test("privileged: %s at CPL 3: #GP(0)", op[i].name);
        exec(op[i].b, op[i].n, true);
        eq_trap(GP, 0);
        eq("RIP", trap.ip, exec_ip(true));
    }
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~(u64)EFER_SCE);
    test("privileged: WBINVD, INVD, WBNOINVD at CPL 0 are good");
    EXEC(false, 0x0f, 0x09);
    eq_trap(NONE, NONE);
    test("privileged: LGDT, LIDT with a base that is not canonical: #GP(0); the old one stays");
    static struct table_reg bad = {0xffff, 0x0000800000000000}, now;
    asm volatile(TRY("lgdt %0")::"m"(bad));
    eq_trap(GP, 0);
    asm volatile(TRY("lidt %0")::"m"(bad));
    eq_trap(GP, 0);
    sgdt(&now);
    eq("GDT", now.base, gdt_reg.base);
    sidt(&now);
    eq("IDT", now.base, idt_reg.base);
    eq("IDT's limit", now.limit, idt_reg.limit);
    test("privileged: SGDT, SIDT store ten bytes, LGDT with 66h still takes 64 bits");
    memset(exec_data, 0xaa, 32);
    EXEC(false, 0x66, 0x0f, 0x01, 0x07);
    eq("base", *(u64 *)(exec_data + 2), gdt_reg.base);
    eq("the byte behind", exec_data[10], 0xaa);
    EXEC(false, 0x66, 0x0f, 0x01, 0x17);
    eq_trap(NONE, NONE);
    sgdt(&now);
    eq("GDT", now.base, gdt_reg.base);
}

int main(void)
{
    feat7b = cpuid(7, 0).b;
    feat7c = cpuid(7, 0).c;
    control_registers();
    fpu_bits();
    model_specific();
    time_stamp();
    identification();
    umip_fsgsbase();
    privileged();
    done();
}
