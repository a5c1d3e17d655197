/*
 * Extended state: XCR0, XGETBV, XSETBV, the XSAVE family's headers and faults, x87 and SIMD exceptions, AVX's enabling.
 * SDM vol. 1 chapter 13; vol. 3A chapter 13.
 */
#include "sys.h"

static u8 area[8192] __attribute__((aligned(64)));
static u64 *const xstate_bv = (u64 *)(area + 512), *const xcomp_bv = (u64 *)(area + 520);

static u64 xgetbv(u32 n)
{
    u32 a = 0, d = 0;
    asm volatile(TRY("xgetbv") : "+a"(a), "+d"(d) : "c"(n));
    return (u64)d << 32 | a;
}

static void xsetbv(u32 n, u64 v) { asm volatile(TRY("xsetbv")::"c"(n), "a"((u32)v), "d"((u32)(v >> 32)) : "memory"); }

static void enabling(u64 all)
{
    test("xsave: XGETBV, XSETBV, XSAVE, XRSTOR are #UD while CR4.OSXSAVE = 0");
    write_cr4(read_cr4() & ~(ulong)CR4_OSXSAVE);
    xgetbv(0);
    eq_trap(UD, NONE);
    xsetbv(0, 1);
    eq_trap(UD, NONE);
    asm volatile(TRY("xsave (%0)")::"r"(area), "a"(7), "d"(0) : "memory");
    eq_trap(UD, NONE);
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(7), "d"(0) : "memory");
    eq_trap(UD, NONE);
    asm volatile(TRY(".byte 0xc5, 0xf8, 0x77")::: "memory"); /* VZEROUPPER */
    eq_trap(UD, NONE);
    write_cr4(read_cr4() | CR4_OSXSAVE | CR4_OSFXSR);
    test("xsave: XCR0 is 1 at reset; XGETBV works at CPL 3");
    eq("XCR0", xgetbv(0), 1);
    asm volatile(USER("xgetbv")::"c"(0) : "rax", "rdx");
    eq_trap(VEC_DONE, NONE);
    test("xsave: XGETBV of another register: #GP(0)");
    asm volatile(TRY("xgetbv")::"c"(2) : "rax", "rdx");
    eq_trap(GP, 0);
    test("xsave: XSETBV: CPL 3, another register, x87 clear, AVX without SSE, unknown bits, part of AVX-512: #GP(0)");
    asm volatile(USER("xsetbv")::"c"(0), "a"(1), "d"(0));
    eq_trap(GP, 0);
    xsetbv(1, 1);
    eq_trap(GP, 0);
    xsetbv(0, 2);
    eq_trap(GP, 0);
    xsetbv(0, 5);
    eq_trap(GP, 0);
    xsetbv(0, 3 | BIT(62));
    eq_trap(GP, 0);
    xsetbv(0, 3 | BIT(63));
    eq_trap(GP, 0);
    if (all & 0xe0) {
        xsetbv(0, 7 | 0x20);
        eq_trap(GP, 0);
        xsetbv(0, 3 | 0xe0);
        eq_trap(GP, 0);
    }
    eq("XCR0", xgetbv(0), 1);
    test("xsave: XCR0 takes what CPUID leaf Dh offers, and its sizes follow");
    xsetbv(0, all);
    eq_trap(NONE, NONE);
    eq("XCR0", xgetbv(0), all);
    eq("size", cpuid(0xd, 0).b, cpuid(0xd, 0).c);
    xsetbv(0, 3);
    eq("size of x87 and SSE", cpuid(0xd, 0).b, 576);
    test("AVX: #UD while XCR0 lacks SSE or AVX, #NM with TS");
    if (!(all & 4)) {
        skip("no AVX");
        return;
    }
    asm volatile(TRY(".byte 0xc5, 0xf8, 0x77")::: "memory");
    eq_trap(UD, NONE);
    asm volatile(TRY(".byte 0xc5, 0xfc, 0x57, 0xc0")::: "memory"); /* VXORPS ymm */
    eq_trap(UD, NONE);
    xsetbv(0, all);
    asm volatile(TRY(".byte 0xc5, 0xfc, 0x57, 0xc0")::: "memory");
    eq_trap(NONE, NONE);
    write_cr0(read_cr0() | CR0_TS);
    asm volatile(TRY(".byte 0xc5, 0xfc, 0x57, 0xc0")::: "memory");
    eq_trap(NM, NONE);
    asm volatile(TRY("xsave (%0)")::"r"(area), "a"(7), "d"(0) : "memory");
    eq_trap(NM, NONE);
    asm volatile("clts");
    test("AVX: XORPS with CR0.EM is #UD");
    write_cr0(read_cr0() | CR0_EM);
    asm volatile(TRY(".byte 0x0f, 0x57, 0xc0")::: "memory");
    write_cr0(read_cr0() & ~(ulong)CR0_EM);
    eq_trap(UD, NONE);
    test("AVX: MOVAPS not aligned: #GP(0), MOVUPS good");
    asm volatile(TRY("movaps 8(%0), %%xmm0")::"r"(area) : "memory");
    eq_trap(GP, 0);
    asm volatile(TRY("movups 8(%0), %%xmm0")::"r"(area) : "memory");
    eq_trap(NONE, NONE);
    test("AVX: VMOVAPS not aligned: #GP(0); an arithmetic operand need not be aligned");
    asm volatile(TRY("vmovaps 8(%0), %%ymm0")::"r"(area) : "memory");
    eq_trap(GP, 0);
    asm volatile(TRY("vaddps 8(%0), %%ymm1, %%ymm0")::"r"(area) : "memory");
    eq_trap(NONE, NONE);
    asm volatile(TRY("addps 8(%0), %%xmm0")::"r"(area) : "memory");
    eq_trap(GP, 0);
}

#define SET_XMM(v) asm volatile("movq %0, %%xmm5; punpcklqdq %%xmm5, %%xmm5" ::"r"((u64)(v)))
static u64 get_xmm(void)
{
    u64 v;
    asm volatile("movq %%xmm5, %0" : "=r"(v));
    return v;
}

static void saving(u64 all)
{
    test("xsave: XSAVE writes the components asked for, in their places, and their bits in XSTATE_BV (SDM 1 13.7)");
    xsetbv(0, all);
    memset(area, 0xee, sizeof(area));
    memset(area + 512, 0, 64);
    SET_XMM(0x1122334455667788);
    asm volatile("fninit");
    asm volatile(TRY("xsave (%0)")::"r"(area), "a"(2), "d"(0) : "memory");
    eq_trap(NONE, NONE);
    eq("XSTATE_BV", *xstate_bv & 3, 2);
    eq("XMM5", *(u64 *)(area + 160 + 5 * 16), 0x1122334455667788);
    eq("x87's place is not written", *(u16 *)area, 0xeeee);
    eq("bytes 8..23 of the header are not written by XSAVE", *xcomp_bv, 0);
    test("xsave: XRSTOR loads what XSTATE_BV has and initialises the rest");
    SET_XMM(0);
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(3), "d"(0) : "memory");
    eq_trap(NONE, NONE);
    eq("XMM5", get_xmm(), 0x1122334455667788);
    *xstate_bv = 0;
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(2), "d"(0) : "memory");
    eq("initialised", get_xmm(), 0);
    SET_XMM(5);
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(1), "d"(0) : "memory");
    eq("not asked for", get_xmm(), 5);
    test("xsave: XRSTOR: header bits that are reserved, components beyond XCR0, MXCSR's reserved bits: #GP(0)");
    *xstate_bv = BIT(62);
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(3), "d"(0) : "memory");
    eq_trap(GP, 0);
    *xstate_bv = 3;
    *xcomp_bv = 1;
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(3), "d"(0) : "memory");
    eq_trap(GP, 0);
    *xcomp_bv = 0;
    *(u64 *)(area + 528) = 1;
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(3), "d"(0) : "memory");
    eq_trap(GP, 0);
    *(u64 *)(area + 528) = 0;
    *(u32 *)(area + 24) = 0xffff0000;
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(3), "d"(0) : "memory");
    eq_trap(GP, 0);
    *(u32 *)(area + 24) = 0x1f80;
    xsetbv(0, 3);
    *xstate_bv = 7;
    asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(3), "d"(0) : "memory");
    eq_trap(GP, 0);
    xsetbv(0, all);
    test("xsave: an area that is not aligned to 64: #GP(0); a register operand: #UD");
    asm volatile(TRY("xsave 8(%0)")::"r"(area), "a"(3), "d"(0) : "memory");
    eq_trap(GP, 0);
    asm volatile(TRY("xrstor 32(%0)")::"r"(area), "a"(3), "d"(0) : "memory");
    eq_trap(GP, 0);
    test("xsave: FXSAVE, FXRSTOR: aligned to 16 or #GP(0); MXCSR's reserved bits #GP(0)");
    asm volatile(TRY("fxsave 8(%0)")::"r"(area) : "memory");
    eq_trap(GP, 0);
    SET_XMM(0x55);
    asm volatile(TRY("fxsave 16(%0)")::"r"(area) : "memory");
    eq_trap(NONE, NONE);
    SET_XMM(0);
    asm volatile(TRY("fxrstor 16(%0)")::"r"(area) : "memory");
    eq_trap(NONE, NONE);
    eq("XMM5", get_xmm(), 0x55);
    *(u32 *)(area + 16 + 24) = 0x80000000;
    asm volatile(TRY("fxrstor 16(%0)")::"r"(area) : "memory");
    eq_trap(GP, 0);
    asm volatile(TRY("ldmxcsr (%0)")::"r"(area + 16 + 24) : "memory");
    eq_trap(GP, 0);
    test("xsave: XSAVE into a read-only or absent page: #PF with W");
    map(VA_TEST, page_new(), 1);
    write_cr0(read_cr0() | CR0_WP);
    asm volatile(TRY("xsave (%0)")::"r"(VA_TEST), "a"(3), "d"(0) : "memory");
    eq_trap(PF, PF_P | PF_W);
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
    map(VA_TEST, 0, 0);
    asm volatile(TRY("xrstor (%0)")::"r"(VA_TEST), "a"(3), "d"(0) : "memory");
    eq_trap(PF, 0);
    test("xsave: XSAVEOPT writes what has changed");
    u32 d1 = cpuid(0xd, 1).a;
    if (!(d1 & 1)) {
        skip("no XSAVEOPT");
    } else {
        memset(area, 0, 1024);
        *(u32 *)(area + 24) = 0x1f80;
        asm volatile("xrstor (%0)" ::"r"(area), "a"(-1), "d"(-1) : "memory"); /* everything initial */
        memset(area + 160, 0, 256);
        asm volatile(TRY("xsaveopt (%0)")::"r"(area), "a"(2), "d"(0) : "memory");
        eq_trap(NONE, NONE);
        eq("XMM5", *(u64 *)(area + 160 + 5 * 16), 0);
        SET_XMM(0x77);
        asm volatile(TRY("xsaveopt (%0)")::"r"(area), "a"(2), "d"(0) : "memory");
        eq("SSE", *xstate_bv & 2, 2);
        eq("XMM5", *(u64 *)(area + 160 + 5 * 16), 0x77);
    }
    test("xsave: XSAVEC is compacted: XCOMP_BV, and XRSTOR takes it back (SDM 1 13.4.3)");
    if (!(d1 & 2)) {
        skip("no XSAVEC");
    } else {
        memset(area, 0xee, 2048);
        memset(area + 512, 0, 64); /* XSAVEC writes the first 16 bytes of the header only */
        SET_XMM(0x99);
        if (all & 4)
            asm volatile("movq %0, %%xmm1; vinsertf128 $1, %%xmm1, %%ymm5, %%ymm5" ::"r"(0x4242ul));
        asm volatile(TRY("xsavec (%0)")::"r"(area), "a"(7), "d"(0) : "memory");
        eq_trap(NONE, NONE);
        eq("XCOMP_BV", *xcomp_bv, BIT(63) | (7 & all));
        if (all & 4)
            eq("upper half of YMM5 directly behind the header", *(u64 *)(area + 576 + 5 * 16), 0x4242);
        SET_XMM(0);
        asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(7), "d"(0) : "memory");
        eq_trap(NONE, NONE);
        eq("XMM5", get_xmm(), 0x99);
        test("xsave: XRSTOR of a compacted area with bits outside XCOMP_BV: #GP(0)");
        *xcomp_bv = BIT(63) | 1;
        asm volatile(TRY("xrstor (%0)")::"r"(area), "a"(7), "d"(0) : "memory");
        eq_trap(GP, 0);
    }
    test("xsave: XGETBV(1): the components in use");
    if (!(d1 & 4)) {
        skip("no XGETBV(1)");
    } else {
        SET_XMM(1);
        eq("SSE", xgetbv(1) & 2, 2);
        eq("no more than XCR0", xgetbv(1) & ~all, 0);
    }
}

/* SDM 3A 6.15, interrupts 16 and 19; vol. 1 8.7, 11.5 */
static void exceptions(void)
{
    u16 cw = 0x37f & ~4; /* division by zero unmasked */
    u32 csr = 0x1f80 & ~0x200;

    write_cr0(read_cr0() | CR0_NE | CR0_MP);
    test("#MF: an unmasked x87 exception appears at the next waiting instruction, RIP there");
    asm volatile("fninit; fldcw %0" ::"m"(cw));
    asm volatile(TRY("fldz; fld1; fdivp; nop; fnstsw %%ax; fwait")::: "rax");
    eq_trap(MF, NONE);
    eq("at FWAIT", *(u8 *)trap.ip, 0x9b);
    test("#MF: instructions that do not wait: FNINIT, FNCLEX, FNSTSW, FNSTCW, FNSAVE");
    asm volatile(TRY("fnstsw %%ax; fnclex; fwait")::: "rax");
    eq_trap(NONE, NONE);
    asm volatile("fninit; fldcw %0" ::"m"(cw));
    asm volatile(TRY("fldz; fld1; fdivp; fld1")::: "memory");
    eq_trap(MF, NONE);
    asm volatile("fninit");
    test("#MF: masked exceptions give the default result");
    asm volatile(TRY("fldz; fld1; fdivp; fwait; fstp %%st(0)")::: "memory");
    eq_trap(NONE, NONE);
    asm volatile("fninit");

    test("#XM: an unmasked SIMD exception: fault with CR4.OSXMMEXCPT = 1, #UD with 0; MXCSR has the flag");
    static const float one[4] __attribute__((aligned(16))) = {1, 1, 1, 1};
    u32 now;
    write_cr4(read_cr4() | CR4_OSXMMEXCPT);
    asm volatile("ldmxcsr %0" ::"m"(csr));
    asm volatile(TRY("movaps (%0), %%xmm0; xorps %%xmm1, %%xmm1; divps %%xmm1, %%xmm0")::"r"(one) : "memory");
    eq_trap(XM, NONE);
    asm volatile("stmxcsr %0" : "=m"(now));
    eq("ZE", now & 4, 4);
    eq("destination unchanged: low half", ({
           u64 v;
           asm volatile("movq %%xmm0, %0" : "=r"(v));
           v;
       }),
       0x3f8000003f800000);
    write_cr4(read_cr4() & ~(ulong)CR4_OSXMMEXCPT);
    asm volatile("ldmxcsr %0" ::"m"(csr));
    asm volatile(TRY("movaps (%0), %%xmm0; xorps %%xmm1, %%xmm1; divps %%xmm1, %%xmm0")::"r"(one) : "memory");
    eq_trap(UD, NONE);
    csr = 0x1f80;
    asm volatile("ldmxcsr %0" ::"m"(csr));
    asm volatile(TRY("movaps (%0), %%xmm0; xorps %%xmm1, %%xmm1; divps %%xmm1, %%xmm0")::"r"(one) : "memory");
    eq_trap(NONE, NONE);
}

int main(void)
{
    u64 all;

    test("xsave: CPUID leaf Dh");
    if (!(cpuid(1, 0).c & BIT(26))) {
        skip("no XSAVE");
        done();
    }
    all = cpuid(0xd, 0).a | (u64)cpuid(0xd, 0).d << 32;
    eq("x87 and SSE", all & 3, 3);
    must("the size of all is at least 576", cpuid(0xd, 0).c >= 576);
    if (all & 4) {
        eq("AVX: size", cpuid(0xd, 2).a, 256);
        eq("AVX: offset", cpuid(0xd, 2).b, 576);
    }
    enabling(all);
    saving(all);
    exceptions();
    done();
}
