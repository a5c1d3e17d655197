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

static void standard(u64 all)
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
}

static void bad_headers(u64 all)
{
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
}

static void bad_areas(void)
{
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
}

static void optimized(u32 d1)
{
    test("xsave: XSAVEOPT writes what has changed");
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
}

static void compacted(u64 all, u32 d1)
{
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
}

static void in_use(u64 all, u32 d1)
{
    test("xsave: XGETBV(1): the components in use");
    if (!(d1 & 4)) {
        skip("no XGETBV(1)");
    } else {
        SET_XMM(1);
        eq("SSE", xgetbv(1) & 2, 2);
        eq("no more than XCR0", xgetbv(1) & ~all, 0);
    }
}

/* ---- 64-bit forms, as kernels use them: many times, so that a translator does them its own way ---- */
enum form { XSAVE64, XSAVEOPT64, XSAVEC64, XSAVES64, XRSTOR64, XRSTORS64 };
#define TIMES 12
#define FILL 0xee

static __attribute__((noinline)) void run(enum form form, void *p, u64 mask)
{
    u32 a = (u32)mask, d = (u32)(mask >> 32);
    switch (form) {
    case XSAVE64: asm volatile(TRY("xsave64 (%0)")::"r"(p), "a"(a), "d"(d) : "memory"); break;
    case XSAVEOPT64: asm volatile(TRY("xsaveopt64 (%0)")::"r"(p), "a"(a), "d"(d) : "memory"); break;
    case XSAVEC64: asm volatile(TRY("xsavec64 (%0)")::"r"(p), "a"(a), "d"(d) : "memory"); break;
    case XSAVES64: asm volatile(TRY("xsaves64 (%0)")::"r"(p), "a"(a), "d"(d) : "memory"); break;
    case XRSTOR64: asm volatile(TRY("xrstor64 (%0)")::"r"(p), "a"(a), "d"(d) : "memory"); break;
    case XRSTORS64: asm volatile(TRY("xrstors64 (%0)")::"r"(p), "a"(a), "d"(d) : "memory"); break;
    }
}

static void initial(void)
{
    memset(area + 512, 0, 64);
    *(u32 *)(area + 24) = 0x1f80;
    asm volatile("xrstor64 (%0)" ::"r"(area), "a"(-1), "d"(-1) : "memory");
}

static bool filled(const u8 *p, u32 from, u32 to)
{
    for (u32 i = from; i < to; i++)
        if (p[i] != FILL)
            return false;
    return true;
}

static u32 mxcsr(void)
{
    u32 v;
    asm volatile("stmxcsr %0" : "=m"(v));
    return v;
}

/* What is written where: SDM 1 13.7, 13.9, 13.10, 13.11. */
static void written(u64 all, u32 d1)
{
    const u32 legacy_end = 416;
    test("xsave64: XSAVE64 of the initial state writes all that is asked for, and no bits");
    for (u32 i = 0; i < TIMES; i++) {
        initial();
        memset(area, FILL, sizeof area);
        *xstate_bv = BIT(1) | BIT(62); /* a bit that is not asked for stays */
        run(XSAVE64, area, 3);
        eq_trap(NONE, NONE);
        eq("XSTATE_BV", *xstate_bv, BIT(62));
        eq("FCW", *(u16 *)area, 0x37f);
        eq("MXCSR", *(u32 *)(area + 24), 0x1f80);
        eq("XMM15", *(u64 *)(area + 400), 0);
        must("nothing between the legacy region and the header, and behind its first 8 bytes", filled(area, legacy_end, 512) && filled(area, 520, sizeof area));
    }
    test("xsave64: XSAVE64 of SSE alone leaves x87's part");
    for (u32 i = 0; i < TIMES; i++) {
        memset(area, FILL, sizeof area);
        *xstate_bv = 0;
        SET_XMM(i + 1);
        run(XSAVE64, area, 2);
        eq("XSTATE_BV", *xstate_bv, 2);
        eq("XMM5", *(u64 *)(area + 240), i + 1);
        must("x87's bytes", filled(area, 0, 24) && filled(area, 32, 160));
    }
    if (!(d1 & 2)) {
        skip("no XSAVEC");
        return;
    }
    test("xsave64: XSAVEC64: the initial state is a header; with a changed MXCSR, SSE as well");
    for (u32 i = 0; i < TIMES; i++) {
        const u32 csr = 0x1f80 | 0x8000;
        initial();
        memset(area, FILL, sizeof area);
        run(XSAVEC64, area, ~0ull);
        eq_trap(NONE, NONE);
        eq("XSTATE_BV", *xstate_bv, 0);
        eq("XCOMP_BV", *xcomp_bv, BIT(63) | all);
        must("16 bytes are written", filled(area, 0, 512) && filled(area, 528, sizeof area));
        asm volatile("ldmxcsr %0" ::"m"(csr));
        run(XSAVEC64, area, ~0ull);
        eq("XSTATE_BV", *xstate_bv, 2);
        eq("MXCSR", *(u32 *)(area + 24), csr);
        must("x87's bytes are not", filled(area, 0, 24) && filled(area, 32, 160));
        memset(area + 528, 0, 48); /* reserved */
        run(XRSTOR64, area, 1);
        eq("MXCSR, SSE not asked for", mxcsr(), csr);
        *xstate_bv = 0;
        run(XRSTOR64, area, 3);
        eq("MXCSR of a compacted area without SSE", mxcsr(), 0x1f80);
    }
    if (!(all & 4))
        return;
    test("xsave64: AVX's upper halves by themselves");
    for (u32 i = 0; i < TIMES; i++) {
        u64 back;
        initial();
        asm volatile("movq %0, %%xmm1; vinsertf128 $1, %%xmm1, %%ymm5, %%ymm5" ::"r"((u64)i + 0x5000));
        asm volatile("pxor %xmm1, %xmm1; pxor %xmm5, %xmm5");
        memset(area, FILL, sizeof area);
        run(XSAVEC64, area, ~0ull);
        eq("XSTATE_BV", *xstate_bv, 4);
        eq("YMM5", *(u64 *)(area + 576 + 80), i + 0x5000);
        must("nothing in the legacy region", filled(area, 0, 512));
        memset(area + 528, 0, 48);
        asm volatile("vzeroupper");
        run(XRSTOR64, area, ~0ull);
        eq_trap(NONE, NONE);
        asm volatile("vextractf128 $1, %%ymm5, %%xmm1; movq %%xmm1, %0" : "=r"(back));
        eq("YMM5", back, i + 0x5000);
    }
}

/* The area at every multiple of 64 around the end of a page. */
static void crossing(u64 all, u32 d1)
{
    u8 *const edge = (u8 *)VA_TEST + 4096;
    const enum form save = d1 & 8 ? XSAVES64 : d1 & 2 ? XSAVEC64 : XSAVE64, load = d1 & 8 ? XRSTORS64 : XRSTOR64;
    test("xsave64: areas across two pages are as in one");
    map(VA_TEST, page_new(), 3);
    map(VA_TEST + 4096, page_new(), 3);
    for (u32 before = 0; before <= 640; before += 64) {
        u8 *p = edge - before;
        initial();
        SET_XMM(0x1000 + before);
        if (all & 4)
            asm volatile("movq %0, %%xmm1; vinsertf128 $1, %%xmm1, %%ymm5, %%ymm5" ::"r"(0x4000ul + before));
        memset(area, 0, sizeof area);
        memset(p, 0, 1024);
        run(save, area, 7);
        run(save, p, 7);
        eq_trap(NONE, NONE);
        must("the same image", !memcmp(p, area, 1024));
        SET_XMM(0);
        run(load, p, 7);
        eq_trap(NONE, NONE);
        eq("XMM5", get_xmm(), 0x1000 + before);
    }
    test("xsave64: where the second page is absent, #PF with its address, and nothing is changed");
    map(VA_TEST + 4096, 0, 0);
    for (u32 i = 0; i < TIMES; i++) {
        u8 *p = edge - 128;
        initial();
        SET_XMM(0x77);
        memset(p, FILL, 128);
        run(save, p, 3);
        eq_trap(PF, PF_W);
        eq("CR2's page", trap.cr2 >> 12, (u64)(ulong)edge >> 12);
        must("nothing is written", filled(p, 0, 128));
        SET_XMM(0x78);
        run(load, p, 3);
        eq_trap(PF, 0);
        eq("XMM5", get_xmm(), 0x78);
    }
    test("xsave64: a read-only page: #PF for saving, good for loading");
    map(VA_TEST, page_new(), 1);
    write_cr0(read_cr0() | CR0_WP);
    for (u32 i = 0; i < TIMES; i++) {
        run(save, (void *)VA_TEST, 3);
        eq_trap(PF, PF_P | PF_W);
        SET_XMM(0x79);
        run(XRSTOR64, (void *)VA_TEST, 3); /* all zero: the initial state, but for MXCSR */
        eq_trap(NONE, NONE);
        eq("XMM5", get_xmm(), 0);
        eq("MXCSR", mxcsr(), 0);
    }
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
    map(VA_TEST, 0, 0);
    initial();
}

static void privileged_forms(u32 d1)
{
    test("xsave64: XSAVES, XRSTORS: #GP(0) at CPL 3, and for an area that is not compacted");
    if (!(d1 & 8)) {
        skip("no XSAVES");
        return;
    }
    initial();
    for (u32 i = 0; i < TIMES; i++) {
        asm volatile(USER("mov %0, %%rbx; mov $3, %%eax; xor %%edx, %%edx; xsaves64 (%%rbx)")::"r"(area) : "rax", "rbx", "rdx", "memory");
        eq_trap(GP, 0);
        memset(area + 512, 0, 64);
        run(XRSTORS64, area, 3);
        eq_trap(GP, 0);
        *xcomp_bv = BIT(63) | 3;
        run(XRSTORS64, area, 3);
        eq_trap(NONE, NONE);
    }
    test("xsave64: CR0.TS: #NM; CR4.OSXSAVE = 0: #UD; back again: as before");
    for (u32 i = 0; i < TIMES; i++) {
        write_cr0(read_cr0() | CR0_TS);
        run(XSAVES64, area, 3);
        eq_trap(NM, NONE);
        run(XRSTORS64, area, 3);
        eq_trap(NM, NONE);
        asm volatile("clts");
        write_cr4(read_cr4() & ~(ulong)CR4_OSXSAVE);
        run(XSAVES64, area, 3);
        eq_trap(UD, NONE);
        xgetbv(0);
        eq_trap(UD, NONE);
        write_cr4(read_cr4() | CR4_OSXSAVE);
        run(XSAVES64, area, 3);
        eq_trap(NONE, NONE);
    }
}

/* What a translator does not keep with the vectors. */
static void x87_and_pkru(u64 all)
{
    test("xsave64: x87's part goes with it");
    for (u32 i = 0; i < TIMES; i++) {
        u64 back = 0;
        initial();
        memset(area, FILL, sizeof area);
        memset(area + 512, 0, 64);
        asm volatile("fldpi");
        run(XSAVE64, area, 3);
        eq("XSTATE_BV", *xstate_bv & 1, 1);
        eq("ST0", *(u64 *)(area + 32), 0xc90fdaa22168c235);
        eq("ST0's upper bytes", *(u64 *)(area + 40), 0x4000);
        asm volatile("fninit");
        run(XRSTOR64, area, 3);
        asm volatile("fstpl %0" : "=m"(back));
        eq("ST0", back, 0x400921fb54442d18);
        *xstate_bv = 0;
        asm volatile("fld1");
        run(XRSTOR64, area, 1);
        run(XSAVE64, area, 1);
        eq("initialised", *xstate_bv & 1, 0);
        asm volatile(TRY("fwait")::: "memory");
        eq_trap(NONE, NONE);
    }
    test("xsave64: PKRU");
    if (!(all & BIT(9))) {
        skip("no PKU");
        return;
    }
    u32 off = cpuid(0xd, 9).b;
    write_cr4(read_cr4() | CR4_PKE);
    for (u32 i = 0; i < TIMES; i++) {
        u32 pkru, d;
        memset(area, 0, sizeof area);
        asm volatile("wrpkru" ::"a"(0x30 << (i & 7)), "c"(0), "d"(0));
        run(XSAVE64, area, ~0ull);
        eq("XSTATE_BV", *xstate_bv & BIT(9), BIT(9));
        eq("PKRU", *(u64 *)(area + off), 0x30ull << (i & 7));
        asm volatile("wrpkru" ::"a"(0), "c"(0), "d"(0));
        run(XRSTOR64, area, BIT(9));
        asm volatile("rdpkru" : "=a"(pkru), "=d"(d) : "c"(0));
        eq("PKRU is back", pkru, 0x30u << (i & 7));
        *xstate_bv = 0;
        run(XRSTOR64, area, ~0ull);
        asm volatile("rdpkru" : "=a"(pkru), "=d"(d) : "c"(0));
        eq("initialised", pkru, 0);
    }
    write_cr4(read_cr4() & ~(ulong)CR4_PKE);
}

/* XSAVE64 (RDI); MOV EAX, imm; RET: what XMM0 is stored as is the MOV. */
static void over_itself(void)
{
    static const u8 code[] = {0x48, 0x0f, 0xae, 0x27, 0xb8, 1, 0, 0, 0, 0xc3};
    u8 *p = area + 160 - 4;
    test("xsave64: XSAVE64 over the code behind it: that runs as it was stored");
    for (u32 i = 0; i < 3 * TIMES; i++) {
        u64 v = 0xb8 | (u64)(i + 2) << 8 | 0xc3ull << 40, a = 2;
        initial();
        memset(area, 0, 1024);
        memcpy(p, code, sizeof code);
        asm volatile("movq %1, %%xmm0; call *%2" : "+a"(a) : "r"(v), "r"(p), "D"(area), "d"(0) : "memory");
        eq("EAX", a, i + 2);
    }
    initial();
}

static void saving(u64 all)
{
    u32 d1 = cpuid(0xd, 1).a;
    standard(all);
    bad_headers(all);
    bad_areas();
    optimized(d1);
    compacted(all, d1);
    in_use(all, d1);
    written(all, d1);
    crossing(all, d1);
    privileged_forms(d1);
    x87_and_pkru(all);
    over_itself();
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
