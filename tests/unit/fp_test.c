/*
 * Extended state where privilege or control registers matter: what CR0, CR4 and XCR0 forbid, pending and unmasked exceptions, XSETBV, XSAVES and XRSTORS,
 * reset state, many stubs. What the instructions compute is tests/insn's subject.
 */
#include "one_vcpu.h"
#include "cpu/interp/fp.h"

#define RAM_SIZE (4 * MiB)
#define CODE 0x100000ull
#define DATA 0x200000ull
#define STACK 0x300000ull
#define PML4 0x1000u
#define PDPT 0x2000u
#define PD   0x3000u
#define GDT  0x8000u
#define IDT  0x9000u
#define STUBS 0xa000u
#define NO_FAULT 0xffu

struct fixture {
    struct machine m;
    struct vcpu v;
    struct ram ram;
    struct x86 *x;
};

static void put64(struct fixture *f, u64 gpa, u64 v)
{
    assert_int_equal(ram_write(&f->ram, gpa, &v, 8), 0);
}

static struct x86_seg segment(u16 sel, u16 attr)
{
    return (struct x86_seg){.limit = 0xffffffff, .sel = sel, .attr = attr};
}

static void make_tables(struct fixture *f)
{
    put64(f, PML4, PDPT | 3);
    put64(f, PDPT, PD | 3);
    for (unsigned i = 0; i < 2; i++)
        put64(f, PD + 8 * i, i * 2 * MiB | 0x83);
    put64(f, GDT + 8, 0x00af9b000000ffff);
    put64(f, GDT + 16, 0x00cf93000000ffff);
    for (unsigned i = 0; i < 32; i++) {
        u64 h = STUBS + 16 * i;

        put64(f, IDT + 16 * i, (h & 0xffff) | 0x08 << 16 | 0x8e00ull << 32 | (h >> 16) << 48);
        put64(f, IDT + 16 * i + 8, 0);
        put64(f, h, 0xf4);
    }
}

/* 64-bit code at CPL 0 with everything enabled that the policy shows. */
static void long_mode(struct fixture *f)
{
    struct x86 *x = f->x;

    x86_reset(x, true);
    x->cr0 = CR0_PE | CR0_PG | CR0_WP | CR0_NE | CR0_ET | CR0_MP;
    x->cr3 = PML4;
    x->cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | (cpuid_has(f->m.cpuid, CPU_XSAVE) ? CR4_OSXSAVE : 0);
    x->xcr0 = cpuid_xcr0_mask(f->m.cpuid);
    x->efer = EFER_LME | EFER_LMA | EFER_NXE;
    for (unsigned i = 0; i < SEGS; i++)
        x->seg[i] = segment(0x10, 0xc93);
    x->seg[SEG_CS] = segment(0x08, 0xa9b);
    x->gdtr = (struct x86_table){GDT, 0xff};
    x->idtr = (struct x86_table){IDT, 16 * 32 - 1};
    x->rip = CODE;
    x->gpr[RSP] = STACK;
    x->rflags = FLAG_1;
    x->activity = X86_RUNNING;
}

static void real_mode(struct fixture *f)
{
    x86_reset(f->x, true);
    f->x->cr4 = CR4_OSFXSR | CR4_OSXSAVE;
    f->x->xcr0 = cpuid_xcr0_mask(f->m.cpuid);
    f->x->seg[SEG_CS] = (struct x86_seg){.base = 0x10000, .limit = 0xffff, .sel = 0x1000, .attr = 0x9b};
    f->x->seg[SEG_SS] = (struct x86_seg){.base = 0x20000, .limit = 0xffff, .sel = 0x2000, .attr = 0x93};
    f->x->idtr = (struct x86_table){0x30000, 0x3ff};
    f->x->rip = 0;
    f->x->gpr[RSP] = 0x8000;
    for (unsigned i = 0; i < 32; i++) {
        assert_int_equal(ram_write(&f->ram, 0x30000 + 4 * i, &(u32){(STUBS / 16 + i) << 16}, 4), 0);
    }
}

static int setup(void **state)
{
    struct fixture *f = fixture_new(sizeof *f);
    ram_make(&f->ram, RAM_SIZE);
    one_vcpu_open(&f->m, &f->v, &f->ram);
    f->x = &f->v.x;
    make_tables(f);
    long_mode(f);
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

/* Runs code and a HLT from the present state; the vector of the exception that ended it, or NO_FAULT. The state stays as it is at the end. */
static unsigned run_code(struct fixture *f, const u8 *code, unsigned n)
{
    u64 at = f->x->seg[SEG_CS].base + f->x->rip, end;
    struct x86 x;

    assert_int_equal(ram_write(&f->ram, at, code, n), 0);
    assert_int_equal(ram_write(&f->ram, at + n, "\xf4", 1), 0);
    f->x->activity = X86_RUNNING;
    assert_int_equal(interp_engine.get(&f->v, &x), 0);
    assert_int_equal(interp_engine.set(&f->v, &x), 0);
    assert_int_equal(interp_engine.run(&f->v), RUN_HALTED);
    end = f->x->seg[SEG_CS].base + f->x->rip - 1;
    return end == at + n ? NO_FAULT : (unsigned)((end - STUBS) / 16);
}
#define RUN(f, ...) run_code(f, (const u8[]){__VA_ARGS__}, sizeof((u8[]){__VA_ARGS__}))

#define ADDPS 0x0f, 0x58, 0xc1                                     /* addps xmm0, xmm1 */
#define VADDPS 0xc5, 0xf0, 0x58, 0xc2                              /* vaddps xmm0, xmm1, xmm2 */
#define PADDB_MM 0x0f, 0xfc, 0xc1                                  /* paddb mm0, mm1 */
#define FLD1 0xd9, 0xe8

static unsigned with(struct fixture *f, u64 cr0_set, u64 cr4_clear, const u8 *code, unsigned n)
{
    long_mode(f);
    f->x->cr0 |= cr0_set;
    f->x->cr4 &= ~cr4_clear;
    return run_code(f, code, n);
}
#define WITH(f, set, clear, ...) with(f, set, clear, (const u8[]){__VA_ARGS__}, sizeof((u8[]){__VA_ARGS__}))

/* SDM vol. 3A tables 2-2, 13-1, 14.1; vol. 2 2.4.10, 2.5 */
static void control_registers(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(WITH(f, 0, 0, ADDPS), NO_FAULT);
    assert_int_equal(WITH(f, CR0_EM, 0, ADDPS), VEC_UD);
    assert_int_equal(WITH(f, CR0_TS, 0, ADDPS), VEC_NM);
    assert_int_equal(WITH(f, CR0_TS, CR4_OSFXSR, ADDPS), VEC_UD);
    assert_int_equal(WITH(f, CR0_EM, 0, PADDB_MM), VEC_UD);
    assert_int_equal(WITH(f, CR0_TS, 0, PADDB_MM), VEC_NM);
    assert_int_equal(WITH(f, 0, CR4_OSFXSR, PADDB_MM), NO_FAULT);
    assert_int_equal(WITH(f, 0, CR4_OSFXSR, 0xf2, 0x0f, 0xd6, 0xc0), VEC_UD); /* movdq2q mm0, xmm0 */
    assert_int_equal(WITH(f, CR0_EM, 0, FLD1), VEC_NM);
    assert_int_equal(WITH(f, CR0_TS, 0, FLD1), VEC_NM);
    assert_int_equal(WITH(f, CR0_EM, 0, 0xdb, 0xe3), VEC_NM);      /* fninit */
    assert_int_equal(WITH(f, CR0_EM, 0, 0x9b), NO_FAULT);          /* fwait looks at MP and TS only */
    assert_int_equal(WITH(f, CR0_TS, 0, 0x9b), VEC_NM);
    f->x->cr0 = 0;
    assert_int_equal(WITH(f, 0, CR4_OSFXSR, 0x0f, 0xae, 0x14, 0x25, 0, 0, 0x20, 0), VEC_UD); /* ldmxcsr */
    long_mode(f);
    f->x->cr0 = (f->x->cr0 | CR0_TS) & ~(u64)CR0_MP;
    assert_int_equal(RUN(f, 0x9b), NO_FAULT);
}

static void avx_enabling(void **state)
{
    struct fixture *f = *state;

    if (!cpuid_has(f->m.cpuid, CPU_AVX)) {
        print_message("# skip: the host has no AVX\n");
        skip();
    }
    assert_int_equal(WITH(f, 0, 0, VADDPS), NO_FAULT);
    assert_int_equal(WITH(f, CR0_EM, 0, VADDPS), NO_FAULT);
    assert_int_equal(WITH(f, CR0_TS, 0, VADDPS), VEC_NM);
    assert_int_equal(WITH(f, CR0_TS, CR4_OSXSAVE, VADDPS), VEC_UD);
    assert_int_equal(WITH(f, 0, CR4_OSFXSR, VADDPS), NO_FAULT);
    long_mode(f);
    f->x->xcr0 = XSTATE_X87 | XSTATE_SSE;
    assert_int_equal(RUN(f, VADDPS), VEC_UD);
    real_mode(f);
    assert_int_equal(RUN(f, ADDPS), NO_FAULT);
    real_mode(f);
    assert_int_equal(RUN(f, VADDPS), VEC_UD);
}

static void avx512_enabling(void **state)
{
    static const u8 vaddps_zmm[] = {0x62, 0xf1, 0x74, 0x48, 0x58, 0xc2}, kmovw[] = {0xc5, 0xf8, 0x92, 0xc8};
    struct fixture *f = *state;

    if (!cpuid_has(f->m.cpuid, CPU_AVX512F)) {
        print_message("# skip: the host has no AVX-512\n");
        skip();
    }
    assert_int_equal(run_code(f, vaddps_zmm, sizeof vaddps_zmm), NO_FAULT);
    long_mode(f);
    f->x->xcr0 = XSTATE_X87 | XSTATE_SSE | XSTATE_AVX;
    assert_int_equal(run_code(f, vaddps_zmm, sizeof vaddps_zmm), VEC_UD);
    long_mode(f);
    f->x->xcr0 = XSTATE_X87 | XSTATE_SSE | XSTATE_AVX;
    assert_int_equal(run_code(f, kmovw, sizeof kmovw), VEC_UD);
}

/* An unmasked SIMD exception: #XM, or #UD without CR4.OSXMMEXCPT; MXCSR tells which; the destination keeps its value. */
static void simd_exception(void **state)
{
    static const float values[] = {1, 1, 1, 1, 0, 0, 0, 0};
    struct fixture *f = *state;
    u32 mxcsr;

    for (unsigned enabled = 0; enabled < 2; enabled++) {
        long_mode(f);
        if (!enabled)
            f->x->cr4 &= ~(u64)CR4_OSXMMEXCPT;
        mxcsr = MXCSR_RESET & ~0x200u;                             /* divide by zero unmasked */
        memcpy(f->x->xsave + 24, &mxcsr, 4);
        memcpy(f->x->xsave + 160, values, sizeof values);
        f->x->xsave[512] = XSTATE_X87 | XSTATE_SSE;
        assert_int_equal(RUN(f, 0x0f, 0x5e, 0xc1), enabled ? VEC_XM : VEC_UD); /* divps xmm0, xmm1 */
        memcpy(&mxcsr, f->x->xsave + 24, 4);
        assert_int_equal(mxcsr, (MXCSR_RESET & ~0x200u) | 4);
        assert_memory_equal(f->x->xsave + 160, values, 16);
        f->x->rip = CODE;
        assert_int_equal(RUN(f, ADDPS), NO_FAULT);                 /* the host is unharmed */
    }
}

/* The error waits for the next waiting instruction; CR0.NE says how it is reported. */
static void x87_pending(void **state)
{
    static const u8 fdiv_by_zero[] = {0xdb, 0xe3, /* fninit */ 0xd9, 0x2c, 0x25, 0, 0, 0x20, 0, /* fldcw [DATA] */ FLD1, 0xd9, 0xee, /* fldz */ 0xde, 0xf9 /* fdivp */};
    struct fixture *f = *state;
    u8 code[sizeof fdiv_by_zero + 2];

    put64(f, DATA, 0x37b);                                         /* divide by zero unmasked */
    assert_int_equal(run_code(f, fdiv_by_zero, sizeof fdiv_by_zero), NO_FAULT);
    memcpy(code, fdiv_by_zero, sizeof fdiv_by_zero);
    for (unsigned n = 0; n < 4; n++) {
        static const u8 next[][2] = {{FLD1}, {0x9b, 0x90}, {0x0f, 0x77}, {0xdb, 0xe2}}; /* fld1; fwait; emms; fnclex */

        memcpy(code + sizeof fdiv_by_zero, next[n], 2);
        long_mode(f);
        assert_int_equal(run_code(f, code, sizeof code), n == 3 ? NO_FAULT : VEC_MF);
        long_mode(f);
        f->x->cr0 &= ~(u64)CR0_NE;
        assert_int_equal(run_code(f, code, sizeof code), NO_FAULT);
    }
}

static unsigned xsetbv(struct fixture *f, u64 value, u32 index)
{
    static const u8 code[] = {0x0f, 0x01, 0xd1};

    long_mode(f);
    f->x->gpr[RAX] = (u32)value;
    f->x->gpr[RDX] = value >> 32;
    f->x->gpr[RCX] = index;
    return run_code(f, code, sizeof code);
}

static void xcr0_rules(void **state)
{
    struct fixture *f = *state;
    u64 mask = cpuid_xcr0_mask(f->m.cpuid);

    if (!cpuid_has(f->m.cpuid, CPU_AVX)) {
        print_message("# skip: the host has no AVX\n");
        skip();
    }
    assert_int_equal(xsetbv(f, mask, 0), NO_FAULT);
    assert_int_equal(f->x->xcr0, mask);
    assert_int_equal(xsetbv(f, 7, 0), NO_FAULT);
    assert_int_equal(f->x->xcr0, 7);
    assert_int_equal(xsetbv(f, 6, 0), VEC_GP);                     /* x87 off */
    assert_int_equal(xsetbv(f, 5, 0), VEC_GP);                     /* AVX without SSE */
    assert_int_equal(xsetbv(f, 1ull << 63 | 7, 0), VEC_GP);
    assert_int_equal(xsetbv(f, 7, 1), VEC_GP);
    assert_int_equal(xsetbv(f, 7 | 0x20, 0), VEC_GP);              /* a part of AVX-512 */
    assert_int_equal(WITH(f, 0, CR4_OSXSAVE, 0x0f, 0x01, 0xd0), VEC_UD); /* xgetbv */
    long_mode(f);
    f->x->gpr[RCX] = 0;
    assert_int_equal(RUN(f, 0x0f, 0x01, 0xd0), NO_FAULT);
    assert_int_equal(f->x->gpr[RAX] | f->x->gpr[RDX] << 32, mask);
}

/* What XSAVES stores, XRSTORS brings back, and components that XRSTORS is not given stay as they are. XSAVE's standard format is not for XRSTORS. */
static void supervisor_saves(void **state)
{
    static const u8 xsaves[] = {0x48, 0x0f, 0xc7, 0x2c, 0x25, 0, 0, 0x20, 0}, xrstors[] = {0x48, 0x0f, 0xc7, 0x1c, 0x25, 0, 0, 0x20, 0};
    static const u8 xsave[] = {0x48, 0x0f, 0xae, 0x24, 0x25, 0, 0, 0x20, 0};
    struct fixture *f = *state;
    u64 bv, xcomp, mask = cpuid_xcr0_mask(f->m.cpuid);
    u8 before[512];

    if (!cpuid_has(f->m.cpuid, CPU_XSAVES)) {
        print_message("# skip: the host has no XSAVES\n");
        skip();
    }
    for (unsigned n = 32; n < 416; n++)
        f->x->xsave[n] = (n & 15) < 10 || n >= 160 ? (u8)(n * 7) : 0;
    f->x->xsave[512] = XSTATE_X87 | XSTATE_SSE;
    f->x->gpr[RAX] = f->x->gpr[RDX] = 0xffffffff;
    assert_int_equal(run_code(f, xsaves, sizeof xsaves), NO_FAULT);
    memcpy(before, f->x->xsave, sizeof before);
    assert_int_equal(ram_read(&f->ram, DATA + 512, &bv, 8), 0);
    assert_int_equal(ram_read(&f->ram, DATA + 520, &xcomp, 8), 0);
    assert_int_equal(bv, XSTATE_X87 | XSTATE_SSE);
    assert_int_equal(xcomp, mask | BIT(63));
    f->x->rip = CODE;
    assert_int_equal(RUN(f, 0x0f, 0x57, 0xc0, 0x0f, 0x57, 0xe4, 0xdb, 0xe3), NO_FAULT); /* xorps xmm0, xmm0; xorps xmm4, xmm4; fninit */
    assert_memory_not_equal(f->x->xsave, before, 416);
    f->x->rip = CODE;
    assert_int_equal(run_code(f, xrstors, sizeof xrstors), NO_FAULT);
    assert_memory_equal(f->x->xsave, before, 416);

    put64(f, DATA + 520, 0);
    f->x->rip = CODE;
    assert_int_equal(run_code(f, xsave, sizeof xsave), NO_FAULT);
    f->x->rip = CODE;
    assert_int_equal(run_code(f, xrstors, sizeof xrstors), VEC_GP);
}

/* After reset: FCW 40h, all registers zero and valid, MXCSR 1f80h (SDM vol. 3A table 10-1). */
static void reset_state(void **state)
{
    struct fixture *f = *state;
    u8 image[512];

    f->x->gpr[RAX] = f->x->gpr[RDX] = 0;
    assert_int_equal(RUN(f, 0x48, 0x0f, 0xae, 0x04, 0x25, 0, 0, 0x20, 0), NO_FAULT); /* fxsave64 [DATA] */
    assert_int_equal(ram_read(&f->ram, DATA, image, sizeof image), 0);
    assert_int_equal(image[0] | image[1] << 8, 0x40);
    assert_int_equal(image[4], 0xff);
    assert_int_equal(image[24] | image[25] << 8, 0x1f80);
}

/* More distinct instructions than stubs fit: what was generated before the arena was emptied must not be run after. */
static void many_stubs(void **state)
{
    struct fixture *f = *state;

    for (unsigned n = 0; n < 24000; n += 8) {
        u8 code[8 * 6 + 5], *p = code;
        u32 lane;

        /* xmm0 = shuffle(xmm0, imm) with all immediates, registers and opcodes; the last one moves a known value. */
        for (unsigned k = n; k < n + 7; k++) {
            *p++ = (u8[]){0x66, 0xf2, 0xf3}[k / 8192 % 3];
            if (k & 0x100)
                *p++ = 0x45;
            *p++ = 0x0f;
            *p++ = 0x70;                                           /* pshufd, pshuflw, pshufhw */
            *p++ = (u8)(0xc0 | (k >> 9 & 7) << 3 | (k >> 12 & 7));
            *p++ = (u8)k;
        }
        memcpy(p, (u8[]){0x66, 0x0f, 0x6e, 0xf8}, 4);              /* movd xmm7, eax */
        long_mode(f);
        f->x->gpr[RAX] = n;
        assert_int_equal(run_code(f, code, (unsigned)(p + 4 - code)), NO_FAULT);
        memcpy(&lane, f->x->xsave + 160 + 7 * 16, 4);
        assert_int_equal(lane, n);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
        TEST(control_registers), TEST(avx_enabling), TEST(avx512_enabling), TEST(simd_exception), TEST(x87_pending), TEST(xcr0_rules),
        TEST(supervisor_saves), TEST(reset_state), TEST(many_stubs),
    };

    return cmocka_run_group_tests_name("fp", tests, NULL, NULL);
}
