/*
 * Moving the guest's extended state between struct fp and the processor's registers (Intel SDM vol. 1 chapter 13).
 *
 * Single moves instead of XSAVE and XRSTOR: on Zen 5, in cycles of the TSC, 16 XMM stores take 12 and XGETBV 32, XSAVE 110 to 165 and XRSTOR 240 to 360. Parts that
 * are not in use are not touched: writing zeroes into upper halves would make them dirty, which costs every SSE instruction behind it (on some
 * processors several times its time). XGETBV tells on the way out what is in use; struct fp remembers it for the way in.
 *
 * Components that the guest's XCR0 does not enable keep what they held, in struct fp; in the registers they hold anything.
 */
#include "cpu/bt/fpstate.h"

#include "cpu/interp/fp.h"

_Thread_local struct icpu *bt_fp_here;

#define ROWS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
#define HIGH_ROWS(M) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23) M(24) M(25) M(26) M(27) M(28) M(29) M(30) M(31)
#define MASKS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)

#define XMM_OUT(n) "movaps %%xmm" #n ", 64*" #n "(%0)\n\t"
#define XMM_IN(n) "movaps 64*" #n "(%0), %%xmm" #n "\n\t"
#define YMM_OUT(n) "vmovaps %%ymm" #n ", 64*" #n "(%0)\n\t"
#define YMM_IN(n) "vmovaps 64*" #n "(%0), %%ymm" #n "\n\t"
#define ZMM_OUT(n) "vmovaps %%zmm" #n ", 64*" #n "(%0)\n\t"
#define ZMM_IN(n) "vmovaps 64*" #n "(%0), %%zmm" #n "\n\t"
#define ZMM_ZERO(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define MASK_OUT(n) "kmovq %%k" #n ", 8*" #n "(%0)\n\t"
#define MASK_IN(n) "kmovq 8*" #n "(%0), %%k" #n "\n\t"
#define MASK_OUT_16(n) "kmovw %%k" #n ", 8*" #n "(%0)\n\t"
#define MASK_IN_16(n) "kmovw 8*" #n "(%0), %%k" #n "\n\t"
#define MASK_ZERO(n) "kxorw %%k" #n ", %%k" #n ", %%k" #n "\n\t"

#define X87_LOADS 32
#define FCW_MASKS 0x3fu
#define BIT_ZMM BIT(XS_ZMM_HI256)
#define BIT_HIGH BIT(XS_HI16_ZMM)
#define BIT_MASKS BIT(XS_OPMASK)

static u64 hardware_in_use(const struct fp *f)
{
    u32 lo, hi;
    if (!f->xinuse)
        return ~0ull;
    asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(1));
    return lo;
}

static u64 tracked(const struct icpu *c)
{
    return c->x->xcr0 & FP_TRACKED;
}

/* Without the state no gate is open, so code that is entered without it does not go far. */
static void close_gates(struct icpu *c)
{
    for (unsigned i = 0; i < FP_GATES; i++)
        c->live.gate[i] = FP_GATE_CLOSED;
}

/* Volatile, so that no compiler makes a call of memset() of it. */
static void zero_words(u64 *p, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        *(volatile u64 *)(p + i) = 0;
}

/* These parts were in use, and are no more. */
static void forget(struct fp *f, u64 gone)
{
    for (unsigned r = 0; r < 16; r++) {
        if (gone & XSTATE_AVX)
            zero_words((u64 *)(f->v[r] + 16), 2);
        if (gone & BIT_ZMM)
            zero_words((u64 *)(f->v[r] + 32), 4);
        if (gone & BIT_HIGH)
            zero_words((u64 *)f->v[r + 16], 8);
    }
    if (gone & BIT_MASKS)
        zero_words(f->k, 8);
}

/* x87, MMX: an image of FXSAVE's. The pointers in it are the monitor's own, and are not looked at. */
static void x87_save(struct icpu *c, struct fp *f)
{
    asm volatile("fxsave64 %0\n\tfninit" : "+m"(f->x87));
    f->x87.fip = c->live.fip;
    f->x87.fdp = c->live.fdp;
    f->x87.fop = c->live.fop;
    f->fcs = c->live.fcs;
    f->fds = c->live.fds;
    c->live.x87 = false;
}

/*
 * Loading x87's registers costs more than all the vectors, and few guests use them: it is done when interp has used them since the last load, and then for a
 * while. All exceptions must be masked: others are reported by an instruction behind the one that raised them, with the pointers of that one.
 */
static void x87_load(struct icpu *c, struct fp *f)
{
    if (f->x87_uses != c->live.x87_uses)
        c->live.x87_loads = X87_LOADS;
    c->live.x87_uses = f->x87_uses;
    if (!c->live.x87_loads || (f->x87.fcw & FCW_MASKS) != FCW_MASKS)
        return;
    c->live.fip = f->x87.fip;
    c->live.fdp = f->x87.fdp;
    c->live.fop = f->x87.fop;
    c->live.fcs = f->fcs;
    c->live.fds = f->fds;
    asm volatile("fxrstor64 %0" : : "m"(f->x87));
    c->live.x87 = true;
}

void bt_fp_begin(struct icpu *c)
{
    if (likely(c->live.on))
        return;
    if (c->live.x87_loads)
        c->live.x87_loads--;
    bt_fp_load(c);
}

void bt_fp_save(struct icpu *c)
{
    struct fp *f = c->fp;
    u64 hard = hardware_in_use(f), mine = tracked(c), use = hard & mine;
    c->live.on = false;
    bt_fp_here = NULL;
    close_gates(c);
    if (use & BIT_ZMM)
        asm volatile(ROWS(ZMM_OUT) : : "r"(f->v) : "memory");
    else if (use & XSTATE_AVX)
        asm volatile(ROWS(YMM_OUT) : : "r"(f->v) : "memory");
    else
        asm volatile(ROWS(XMM_OUT) : : "r"(f->v) : "memory");
    if (use & BIT_HIGH)
        asm volatile(HIGH_ROWS(ZMM_OUT) : : "r"(f->v) : "memory");
    if (use & BIT_MASKS && f->avx512bw)
        asm volatile(MASKS(MASK_OUT) : : "r"(f->k) : "memory");
    else if (use & BIT_MASKS)
        asm volatile(MASKS(MASK_OUT_16) : : "r"(f->k) : "memory");
    asm volatile("stmxcsr %0\n\tldmxcsr %1" : "=m"(f->mxcsr) : "m"(f->host_mxcsr));
    if (f->avx && hard & (XSTATE_AVX | BIT_ZMM))
        asm volatile("vzeroupper");
    if (c->live.x87)
        x87_save(c, f);
    if (unlikely(f->in_use & mine & ~use))
        forget(f, f->in_use & mine & ~use);
    f->in_use = (f->in_use & ~mine) | use;
}

static void gates(struct icpu *c)
{
    const struct x86 *x = c->x;
    bool ts = x->cr0 & CR0_TS, xsave = x->cr4 & CR4_OSXSAVE && !ts;
    const bool open[FP_GATES] = {
        [FP_GATE_SSE] = !ts && !(x->cr0 & CR0_EM) && x->cr4 & CR4_OSFXSR,
        [FP_GATE_AVX] = xsave && (x->xcr0 & XCR0_AVX) == XCR0_AVX,
        [FP_GATE_AVX512] = xsave && (x->xcr0 & XCR0_AVX512) == XCR0_AVX512,
        [FP_GATE_X87] = c->live.x87 && !ts && !(x->cr0 & CR0_EM),
    };
    for (unsigned i = 0; i < FP_GATES; i++)
        c->live.gate[i] = open[i] ? (u64)(uintptr_t)c : FP_GATE_CLOSED;
}

void bt_fp_load(struct icpu *c)
{
    struct fp *f = c->fp;
    u64 mine = tracked(c), use = f->in_use & mine, leftover;
    x87_load(c, f);
    if (f->avx)
        asm volatile("vzeroupper");
    if (use & BIT_ZMM)
        asm volatile(ROWS(ZMM_IN) : : "r"(f->v));
    else if (use & XSTATE_AVX)
        asm volatile(ROWS(YMM_IN) : : "r"(f->v));
    else
        asm volatile(ROWS(XMM_IN) : : "r"(f->v));
    if (mine & XSTATE_AVX512) {
        leftover = mine & ~use & hardware_in_use(f);               /* of the monitor's: libc uses the upper 16 */
        if (use & BIT_HIGH)
            asm volatile(HIGH_ROWS(ZMM_IN) : : "r"(f->v));
        else if (leftover & BIT_HIGH)
            asm volatile(HIGH_ROWS(ZMM_ZERO) : :);
        if (use & BIT_MASKS && f->avx512bw)
            asm volatile(MASKS(MASK_IN) : : "r"(f->k));
        else if (use & BIT_MASKS)
            asm volatile(MASKS(MASK_IN_16) : : "r"(f->k));
        else if (leftover & BIT_MASKS)
            asm volatile(MASKS(MASK_ZERO) : :);
    }
    asm volatile("ldmxcsr %0" : : "m"(f->mxcsr));
    gates(c);
    c->live.on = true;
    bt_fp_here = c;
}

/* heavy.c's. */
void bt_fp_claim_here(void);
void bt_fp_claim_here(void)
{
    icpu_claim(bt_fp_here);
}

void bt_fp_open(struct icpu *c)
{
    c->live.claim = bt_fp_save;
    close_gates(c);
}
