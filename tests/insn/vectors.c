/* XSAVE images in standard format (SDM vol. 1 13.4) and struct vectors. */
#include <cpuid.h>
#include <string.h>

#include "insn.h"

static u32 component(unsigned n)
{
    u32 a, b, c, d;

    __cpuid_count(0xd, n, a, b, c, d);
    return a ? b : 0;
}

void xlayout_host(struct xlayout *l)
{
    u8 fx[512] __attribute__((aligned(16)));
    u32 lo = 1, hi = 0;

    memset(l, 0, sizeof *l);
    if (__builtin_cpu_supports("avx"))
        __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    l->xcr0 = lo | (u64)hi << 32;
    if (l->xcr0 & XSTATE_AVX)
        l->avx = component(2);
    if ((l->xcr0 & XSTATE_AVX512) == XSTATE_AVX512) {
        l->opmask = component(5);
        l->zmm_hi = component(6);
        l->hi16 = component(7);
    }
    __asm__ volatile("fxsave64 %0" : "=m"(fx));
    memcpy(&l->mxcsr_mask, fx + 28, 4);
}

void vectors_put(const struct vectors *v, const struct xlayout *l, u8 *p)
{
    u64 bv = XSTATE_X87 | XSTATE_SSE | (l->avx ? XSTATE_AVX : 0) | (l->opmask ? XSTATE_AVX512 : 0);

    memcpy(p, &v->fcw, 2);
    memcpy(p + 2, &v->fsw, 2);
    p[4] = v->ftw;
    p[5] = 0;
    memcpy(p + 6, &v->fop, 2);
    memcpy(p + 8, &v->fip, 8);
    memcpy(p + 16, &v->fdp, 8);
    memcpy(p + 24, &v->mxcsr, 4);
    memcpy(p + 28, &l->mxcsr_mask, 4);
    for (unsigned r = 0; r < 8; r++) {
        memset(p + 32 + 16 * r, 0, 16);
        memcpy(p + 32 + 16 * r, v->st[r], 10);
    }
    for (unsigned r = 0; r < 16; r++) {
        memcpy(p + 160 + 16 * r, v->zmm[r], 16);
        if (l->avx)
            memcpy(p + l->avx + 16 * r, v->zmm[r] + 16, 16);
        if (l->zmm_hi)
            memcpy(p + l->zmm_hi + 32 * r, v->zmm[r] + 32, 32);
        if (l->hi16)
            memcpy(p + l->hi16 + 64 * r, v->zmm[16 + r], 64);
    }
    if (l->opmask)
        memcpy(p + l->opmask, v->k, sizeof v->k);
    memcpy(p + 512, &bv, 8);
}

void vectors_get(struct vectors *v, const struct xlayout *l, const u8 *p)
{
    u64 bv;

    memset(v, 0, sizeof *v);
    memcpy(&bv, p + 512, 8);
    v->fcw = 0x37f;
    if (bv & XSTATE_X87) {
        memcpy(&v->fcw, p, 2);
        memcpy(&v->fsw, p + 2, 2);
        v->ftw = p[4];
        memcpy(&v->fop, p + 6, 2);
        memcpy(&v->fip, p + 8, 8);
        memcpy(&v->fdp, p + 16, 8);
        for (unsigned r = 0; r < 8; r++)
            memcpy(v->st[r], p + 32 + 16 * r, 10);
    }
    memcpy(&v->mxcsr, p + 24, 4);
    for (unsigned r = 0; r < 16; r++) {
        if (bv & XSTATE_SSE)
            memcpy(v->zmm[r], p + 160 + 16 * r, 16);
        if (l->avx && (bv & XSTATE_AVX))
            memcpy(v->zmm[r] + 16, p + l->avx + 16 * r, 16);
        if (l->zmm_hi && (bv & BIT(6)))
            memcpy(v->zmm[r] + 32, p + l->zmm_hi + 32 * r, 32);
        if (l->hi16 && (bv & BIT(7)))
            memcpy(v->zmm[16 + r], p + l->hi16 + 64 * r, 64);
    }
    if (l->opmask && (bv & BIT(5)))
        memcpy(v->k, p + l->opmask, sizeof v->k);
}
