/* Values: boundaries of integers, the special numbers of floating point, and random bits between them. */
#include <string.h>

#include "insn.h"

u64 value_integer(struct rng *r)
{
    static const u64 edge[] = {0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000,
                               0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff, 0xfffffffffffffffe};
    u64 v = rnd(r);

    switch (rnd_below(r, 6)) {
    case 0: return edge[rnd_below(r, ARRAY_SIZE(edge))];
    case 1: return edge[rnd_below(r, ARRAY_SIZE(edge))] + (v & 7) - 3;
    case 2: return v >> rnd_below(r, 64);
    case 3: return v & 0xff;
    default: return v;
    }
}

static u32 single(struct rng *r)
{
    static const u32 special[] = {0, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xffc12345, 1, 0x807fffff,
                                  0x00800000, 0x7f7fffff, 0x4f000000, 0xcf000000, 0x4b800001, 0x3f000000};
    u32 v = (u32)rnd(r);

    switch (rnd_below(r, 4)) {
    case 0: return special[rnd_below(r, ARRAY_SIZE(special))];
    case 1: return v;
    default: return (v & 0x807fffff) | (u32)(100 + rnd_below(r, 55)) << 23;
    }
}

static u64 dbl(struct rng *r)
{
    static const u64 special[] = {0, 1ull << 63, 0x3ff0000000000000, 0xbff0000000000000, 0x7ff0000000000000, 0xfff0000000000000, 0x7ff8000000000000,
                                  0x7ff0000000000001, 1, 0x800fffffffffffff, 0x0010000000000000, 0x7fefffffffffffff, 0x41e0000000000000,
                                  0xc3e0000000000000, 0x43e0000000000000, 0x3fe0000000000000};
    u64 v = rnd(r);

    switch (rnd_below(r, 4)) {
    case 0: return special[rnd_below(r, ARRAY_SIZE(special))];
    case 1: return v;
    default: return (v & 0x800fffffffffffff) | (u64)(990 + rnd_below(r, 70)) << 52;
    }
}

void value_fill(struct rng *r, u8 *p, size_t n)
{
    unsigned kind = rnd_below(r, 6);

    for (size_t at = 0; at + 8 <= n; at += 8) {
        u64 v = rnd(r);

        if (kind == 0)
            v = single(r) | (u64)single(r) << 32;
        else if (kind == 1)
            v = dbl(r);
        else if (kind == 2)
            v &= 0x0f0f0f0f0f0f0f0f;
        else if (kind == 3)
            v = value_integer(r);
        memcpy(p + at, &v, 8);
    }
}

static void x87_register(struct rng *r, u8 *st)
{
    u64 mant = rnd(r) | 1ull << 63;
    u16 exp = (u16)(16383 - 40 + (int)rnd_below(r, 80)) | (u16)(rnd(r) & 0x8000);

    switch (rnd_below(r, 8)) {
    case 0: exp &= 0x8000, mant = 0; break;
    case 1: exp |= 0x7fff, mant = 1ull << 63; break;               /* infinity */
    case 2: exp |= 0x7fff, mant = rnd(r); break;                   /* NaNs of all kinds */
    case 3: exp &= 0x8000, mant = rnd(r) >> 1; break;              /* denormal */
    case 4: mant = rnd(r), exp = (u16)rnd(r); break;               /* unnormals too */
    case 5: mant = (rnd(r) & 0xffff) << 48 | 1ull << 63; break;
    default: break;
    }
    memcpy(st, &mant, 8);
    memcpy(st + 8, &exp, 2);
}

void value_vectors(struct rng *r, const struct xlayout *l, struct vectors *v)
{
    static const u16 fcw[] = {0x37f, 0x27f, 0x07f, 0x77f, 0xb7f, 0xf7f, 0x37e, 0x340};
    static const u32 mxcsr[] = {0x1f80, 0x1f80, 0x3f80, 0x5f80, 0x7f80, 0x9fc0, 0x1fbf, 0x1f00, 0x0000, 0x1d80, 0x9f80};

    memset(v, 0, sizeof *v);
    for (unsigned n = 0; n < (l->hi16 ? 32 : 16); n++)
        value_fill(r, v->zmm[n], l->zmm_hi ? 64 : l->avx ? 32 : 16);
    for (unsigned n = 0; n < 8 && l->opmask; n++)
        v->k[n] = one_in(r, 4) ? value_integer(r) : rnd(r);
    v->mxcsr = one_in(r, 3) ? mxcsr[rnd_below(r, ARRAY_SIZE(mxcsr))] : 0x1f80;
    v->fcw = one_in(r, 3) ? fcw[rnd_below(r, ARRAY_SIZE(fcw))] : 0x37f;
    v->fsw = (u16)((rnd(r) & 0x7f3f) & ~(one_in(r, 8) ? 0 : 0x3f));
    if (v->fsw & ~v->fcw & 0x3f)
        v->fsw |= 0x8080;
    v->ftw = one_in(r, 3) ? (u8)rnd(r) : one_in(r, 2) ? 0xff : 0;
    v->fop = (u16)(rnd(r) & 0x7ff);
    v->fip = rnd(r) & 0x7fffffff;
    v->fdp = rnd(r) & 0x7fffffff;
    for (unsigned n = 0; n < 8; n++)
        x87_register(r, v->st[n]);
}
