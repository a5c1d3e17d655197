/*
 * The guest's extended state in the host's registers (cpu/bt/fpstate.c), gates to heavy code, and light code's memory functions. Registers are dumped and
 * filled right behind the call that is tested: nothing of the compiler's comes in between.
 */
#include "one_vcpu.h"
#include "cpu/bt/fpstate.h"
#include "cpu/interp/fp.h"

size_t heavy_strlen(const char *s);
size_t heavy_strcspn(const char *s, const char *reject);
int heavy_snprintf(char *buf, size_t n, const char *format, ...);
void *light_memcpy(void *to, const void *from, size_t n);
void *light_memmove(void *to, const void *from, size_t n);
void *light_memset(void *to, int v, size_t n);
int light_memcmp(const void *a, const void *b, size_t n);

#define ALL (XSTATE_X87 | XSTATE_SSE | XSTATE_AVX | XSTATE_AVX512)
#define MXCSR_GUEST 0x9fc0u                                        /* FZ and DAZ: nothing that the host would have */

struct image {
    u8 v[32][64] __attribute__((aligned(64)));
    u64 k[8];
    u32 mxcsr;
};

struct fixture {
    struct machine m;
    struct vcpu v;
    struct ram ram;
    struct icpu *c;
    struct fp *f;
    u64 can;                                                       /* components that this host's guests may have */
};

static u64 seed = 1;
static u64 rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static int setup(void **state)
{
    struct fixture *t = fixture_new(sizeof *t);
    ram_make(&t->ram, 1 * MiB);
    t->c = one_vcpu_open(&t->m, &t->v, &t->ram);
    t->f = t->c->fp;
    t->can = cpuid_xcr0_mask(t->m.cpuid) & ALL;
    x86_reset(&t->v.x, true);
    t->v.x.cr0 = CR0_PE | CR0_PG | CR0_NE | CR0_MP;
    t->v.x.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    t->v.x.xcr0 = t->can;
    bt_fp_open(t->c);
    *state = t;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *t = *state;
    one_vcpu_close(&t->m, &t->v, &t->ram);
    free(t);
    return 0;
}

#define ROWS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
#define HIGH_ROWS(M) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23) M(24) M(25) M(26) M(27) M(28) M(29) M(30) M(31)
#define MASKS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define OUT(kind, n) "vmovups %%" kind #n ", 64*" #n "(%0)\n\t"
#define IN(kind, n) "vmovups 64*" #n "(%0), %%" kind #n "\n\t"
#define X_OUT(n) "movups %%xmm" #n ", 64*" #n "(%0)\n\t"
#define X_IN(n) "movups 64*" #n "(%0), %%xmm" #n "\n\t"
#define Y_OUT(n) OUT("ymm", n)
#define Y_IN(n) IN("ymm", n)
#define Z_OUT(n) OUT("zmm", n)
#define Z_IN(n) IN("zmm", n)
#define K_OUT(n) "kmovq %%k" #n ", 2048+8*" #n "(%0)\n\t"
#define K_IN(n) "kmovq 2048+8*" #n "(%0), %%k" #n "\n\t"

/* What this processor has, whoever enabled it for the guest. */
static void dump(struct image *i, u64 can)
{
    if (can & XSTATE_AVX512)
        asm volatile(ROWS(Z_OUT) HIGH_ROWS(Z_OUT) MASKS(K_OUT) : : "r"(i) : "memory");
    else if (can & XSTATE_AVX)
        asm volatile(ROWS(Y_OUT) : : "r"(i) : "memory");
    else
        asm volatile(ROWS(X_OUT) : : "r"(i) : "memory");
    asm volatile("stmxcsr %0" : "=m"(i->mxcsr));
}

static void fill(const struct image *i, u64 can)
{
    asm volatile("ldmxcsr %0" : : "m"(i->mxcsr));
    if (can & XSTATE_AVX512)
        asm volatile(ROWS(Z_IN) HIGH_ROWS(Z_IN) MASKS(K_IN) : : "r"(i));
    else if (can & XSTATE_AVX)
        asm volatile(ROWS(Y_IN) : : "r"(i));
    else
        asm volatile(ROWS(X_IN) : : "r"(i));
}

/* Random contents of the components in use, zeroes in all others. */
static void make(struct image *i, u64 use)
{
    memset(i, 0, sizeof *i);
    for (unsigned r = 0; r < 32; r++) {
        for (unsigned b = 0; b < 64; b++) {
            u64 part = r >= 16 ? BIT(XS_HI16_ZMM) : b < 16 ? XSTATE_SSE : b < 32 ? XSTATE_AVX : BIT(XS_ZMM_HI256);
            i->v[r][b] = use & part ? (u8)rnd() : 0;
        }
    }
    for (unsigned r = 0; r < 8; r++)
        i->k[r] = use & BIT(XS_OPMASK) ? rnd() : 0;
    i->mxcsr = MXCSR_GUEST;
}

static void put(struct fixture *t, const struct image *i, u64 use)
{
    memcpy(t->f->v, i->v, sizeof i->v);
    memcpy(t->f->k, i->k, sizeof i->k);
    t->f->mxcsr = i->mxcsr;
    t->f->in_use = use & FP_TRACKED;
}

static u64 processor_in_use(const struct fixture *t)
{
    u32 lo, hi;
    if (!t->f->xinuse)
        return 0;
    asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(1));
    return lo;
}

static u32 host_mxcsr(void)
{
    u32 v;
    asm volatile("stmxcsr %0" : "=m"(v));
    return v;
}

static void assert_state(const struct fixture *t, const struct image *i)
{
    for (unsigned r = 0; r < (t->can & XSTATE_AVX512 ? 32u : 16u); r++)
        assert_memory_equal(t->f->v[r], i->v[r], t->can & XSTATE_AVX512 ? 64 : t->can & XSTATE_AVX ? 32 : 16);
    if (t->can & XSTATE_AVX512)
        assert_memory_equal(t->f->k, i->k, sizeof i->k);
    assert_int_equal(t->f->mxcsr, i->mxcsr);
}

/* Every combination of components before, and another one after. */
static void test_round_trip(void **state)
{
    static const u64 parts[] = { XSTATE_AVX, BIT(XS_OPMASK), BIT(XS_ZMM_HI256), BIT(XS_HI16_ZMM) };
    struct fixture *t = *state;
    static struct image first, second, seen;
    for (unsigned n = 0; n < 256; n++) {
        u64 before = XSTATE_SSE, after = XSTATE_SSE;
        for (unsigned i = 0; i < 4; i++) {
            before |= n >> i & 1 ? parts[i] & t->can : 0;
            after |= n >> (4 + i) & 1 ? parts[i] & t->can : 0;
        }
        make(&first, before);
        make(&second, after);
        put(t, &first, before);
        memset(&seen, 0, sizeof seen);
        bt_fp_load(t->c);
        dump(&seen, t->can);
        u64 used = processor_in_use(t);
        fill(&second, t->can);
        bt_fp_save(t->c);
        assert_memory_equal(&seen, &first, sizeof seen);
        if (!(before & (XSTATE_AVX | BIT(XS_ZMM_HI256))))
            assert_int_equal(used & (XSTATE_AVX | BIT(XS_ZMM_HI256)), 0);
        assert_state(t, &second);
        assert_int_equal(host_mxcsr(), MXCSR_RESET);
        assert_int_equal(processor_in_use(t) & (XSTATE_AVX | BIT(XS_ZMM_HI256)), 0);
        assert_false(t->c->live.on);
        assert_null(bt_fp_here);
    }
}

/* What a part is not enabled for stays as it was; what the guest has zeroed is forgotten. */
static void test_disabled(void **state)
{
    struct fixture *t = *state;
    static struct image all, other;
    make(&all, t->can);
    make(&other, t->can);
    put(t, &all, t->can);
    t->v.x.xcr0 = XSTATE_X87 | XSTATE_SSE;
    bt_fp_load(t->c);
    asm volatile(ROWS(X_IN) : : "r"(&other));
    bt_fp_save(t->c);
    for (unsigned r = 0; r < 32; r++)
        memcpy(r < 16 ? all.v[r] : all.v[0], r < 16 ? other.v[r] : all.v[0], 16);
    assert_state(t, &all);
    assert_int_equal(t->f->in_use, t->can & FP_TRACKED);
    if (!(t->can & XSTATE_AVX))
        return;
    t->v.x.xcr0 = t->can;
    bt_fp_load(t->c);
    asm volatile("vzeroall");
    bt_fp_save(t->c);
    for (unsigned r = 0; r < 16; r++)
        memset(all.v[r], 0, 64);
    assert_state(t, &all);
}

static bool open_gate(const struct fixture *t, unsigned gate)
{
    return t->c->live.gate[gate] != FP_GATE_CLOSED;
}

static void test_gates(void **state)
{
    struct fixture *t = *state;
    struct x86 *x = &t->v.x;
    const struct {
        u64 cr0, cr4, xcr0;                                        /* bits that are turned over */
        bool sse, avx, avx512;
    } row[] = {
        { 0, 0, 0, true, true, true },
        { CR0_TS, 0, 0, false, false, false },
        { CR0_EM, 0, 0, false, true, true },
        { 0, CR4_OSFXSR, 0, false, true, true },
        { 0, CR4_OSXSAVE, 0, true, false, false },
        { 0, 0, XSTATE_AVX | XSTATE_AVX512, true, false, false },
        { 0, 0, XSTATE_AVX512, true, true, false },
    };
    for (unsigned i = 0; i < ARRAY_SIZE(row); i++) {
        struct x86 was = *x;
        x->cr0 ^= row[i].cr0;
        x->cr4 ^= row[i].cr4;
        x->xcr0 ^= row[i].xcr0 & t->can;
        bt_fp_load(t->c);
        bool sse = open_gate(t, FP_GATE_SSE), avx = open_gate(t, FP_GATE_AVX), avx512 = open_gate(t, FP_GATE_AVX512);
        bt_fp_save(t->c);
        assert_int_equal(sse, row[i].sse);
        assert_int_equal(avx, row[i].avx && t->can & XSTATE_AVX);
        assert_int_equal(avx512, row[i].avx512 && (t->can & XSTATE_AVX512) == XSTATE_AVX512);
        for (unsigned gate = 0; gate < FP_GATES; gate++)
            assert_false(open_gate(t, gate));
        *x = was;
    }
}

/* A heavy function finds its arguments, and the guest's state is out of the registers before it runs. */
static void test_heavy(void **state)
{
    struct fixture *t = *state;
    static struct image all;
    char buf[64];
    assert_int_equal(heavy_strlen("three"), 5);
    make(&all, t->can);
    put(t, &all, t->can);
    bt_fp_load(t->c);
    size_t n = heavy_strcspn("abcdef", "xd");
    assert_int_equal(n, 3);
    assert_false(t->c->live.on);
    assert_int_equal(host_mxcsr(), MXCSR_RESET);
    assert_state(t, &all);
    bt_fp_load(t->c);
    heavy_snprintf(buf, sizeof buf, "%d %d %d %d %d %d %s", 1, 2, 3, 4, 5, 6, "seven");
    assert_string_equal(buf, "1 2 3 4 5 6 seven");
    assert_false(t->c->live.on);
    assert_state(t, &all);
    /* In a signal handler the registers are not the guest's. */
    bt_fp_load(t->c);
    struct icpu *was = bt_fp_signal();
    n = heavy_strlen("four");
    bool on = t->c->live.on;
    bt_fp_signal_end(was);
    bt_fp_save(t->c);
    assert_int_equal(n, 4);
    assert_true(on);
}

/* interp's own access to its state brings it home. */
static void test_claim(void **state)
{
    struct fixture *t = *state;
    static struct image all;
    make(&all, t->can);
    put(t, &all, t->can);
    bt_fp_enter(t->c);
    assert_true(t->c->live.on);
    assert_ptr_equal(icpu_fp(t->c), t->f);
    assert_false(t->c->live.on);
    assert_state(t, &all);
}

static u16 host_fcw(void)
{
    u16 v;
    asm volatile("fnstcw %0" : "=m"(v));
    return v;
}

/* x87's part comes along for a while after interp has used it, if no exception can be raised; its pointers are the guest's. */
static void test_x87(void **state)
{
    struct fixture *t = *state;
    struct fp_legacy *l = &t->f->x87;
    static struct fp_legacy seen;
    bt_fp_begin(t->c);
    assert_false(t->c->live.x87);
    assert_false(open_gate(t, FP_GATE_X87));
    bt_fp_save(t->c);
    l->fcw = 0xc7f;                                                /* all masked, truncating */
    l->fsw = 0x4122 | 6 << 11;
    l->ftw = 0xc1;
    l->fip = 0x123456789a;
    l->fdp = 0xffff800000001234;
    l->fop = 0x5d8;
    for (unsigned i = 0; i < 8; i++) {
        l->st[i].mant = BIT(63) | rnd();
        l->st[i].exp = (u16)rnd() & 0xbfff;
    }
    struct fp_legacy was = *l;
    t->f->x87_uses++;
    bt_fp_begin(t->c);
    asm volatile("fxsave64 %0" : "=m"(seen));
    assert_true(t->c->live.x87);
    assert_true(open_gate(t, FP_GATE_X87));
    assert_int_equal(seen.fcw, was.fcw);
    assert_int_equal(seen.fsw, was.fsw);
    assert_int_equal(seen.ftw, was.ftw);
    for (unsigned i = 0; i < 8; i++)
        assert_memory_equal(&seen.st[i], &was.st[i], 10);
    asm volatile("fld1");
    t->c->live.fip = 0x777;
    bt_fp_save(t->c);
    assert_int_equal(FSW_TOP(l->fsw), 5);
    assert_int_equal(l->ftw, 0xe1);
    assert_int_equal(l->fip, 0x777);
    assert_int_equal(l->fdp, was.fdp);
    assert_int_equal(l->fop, was.fop);
    assert_int_equal(l->st[0].exp, 0x3fff);
    assert_memory_equal(&l->st[1], &was.st[0], 10);
    assert_int_equal(host_fcw(), 0x37f);
    bt_fp_enter(t->c);
    assert_true(t->c->live.x87);                                   /* the block has looked at the gate already */
    bt_fp_save(t->c);
    unsigned loads = 0;
    for (; loads < 1000; loads++) {
        bt_fp_begin(t->c);
        bool with = t->c->live.x87;
        bt_fp_save(t->c);
        if (!with)
            break;
    }
    assert_in_range(loads, 1, 999);
    l->fcw = 0xc7e;
    t->f->x87_uses++;
    bt_fp_begin(t->c);
    assert_false(t->c->live.x87);
    bt_fp_save(t->c);
}

static void test_memory_functions(void **state)
{
    static u8 a[700], b[700], from[700];
    (void)state;
    for (unsigned i = 0; i < 20000; i++) {
        size_t n = rnd() % (i & 1 ? 40 : 300), at = rnd() % 320, to = rnd() % 320;
        for (unsigned j = 0; j < sizeof a; j++)
            from[j] = (u8)(i & 2 ? rnd() : rnd() % 2);
        memcpy(a, from, sizeof a);
        memcpy(b, from, sizeof b);
        assert_ptr_equal(light_memmove(a + to, a + at, n), a + to);
        memmove(b + to, b + at, n);
        assert_memory_equal(a, b, sizeof a);
        light_memcpy(a + at, from + to, n);
        memcpy(b + at, from + to, n);
        assert_memory_equal(a, b, sizeof a);
        light_memset(a + to, (int)n, n);
        memset(b + to, (int)n, n);
        assert_memory_equal(a, b, sizeof a);
        int x = light_memcmp(a + at, from + to, n), y = memcmp(a + at, from + to, n);
        assert_int_equal(x < 0, y < 0);
        assert_int_equal(x > 0, y > 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_round_trip, setup, teardown),
        cmocka_unit_test_setup_teardown(test_disabled, setup, teardown),
        cmocka_unit_test_setup_teardown(test_gates, setup, teardown),
        cmocka_unit_test_setup_teardown(test_heavy, setup, teardown),
        cmocka_unit_test_setup_teardown(test_claim, setup, teardown),
        cmocka_unit_test_setup_teardown(test_x87, setup, teardown),
        cmocka_unit_test(test_memory_functions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
