/*
 * The formats of XSAVE's areas (Intel SDM vol. 1 13.4): what xsave.c, which composes them from struct fp, and cpu/bt/xstate.c, which has the processor do it, have in
 * common. Light code (cpu/bt/fpstate.h) includes it too: nothing here uses icpu_fp().
 */
#pragma once

#include <string.h>

#include "cpu/interp/fp.h"

#define XS_LEGACY 416u                                             /* of the legacy region's 512 bytes those that are ever written */
#define XS_HEADER 512u
#define XS_EXTENDED 576u
#define XS_MAX X86_XSAVE_MAX                                      /* any component of either format ends below it */
#define XCOMP_COMPACT BIT(63)

/* n: a multiple of 8. Inlined, so that it becomes a few vector instructions. */
static inline __attribute__((always_inline)) bool zero(const void *p, size_t n)
{
    u64 all = 0, v;

    for (size_t at = 0; at < n; at += 8) {
        memcpy(&v, (const u8 *)p + at, 8);
        all |= v;
    }
    return !all;
}

static inline bool x87_in_use(const struct fp *f)
{
    const struct fp_legacy *l = &f->x87;

    if (l->fcw != 0x37f || l->fsw || l->ftw || l->fop || l->fip || l->fdp || f->fcs || f->fds)
        return true;
    for (unsigned n = 0; n < 8; n++) {
        if (l->st[n].mant || l->st[n].exp)
            return true;
    }
    return false;
}

/* The x87 part of the legacy region: bytes 0..23 and 32..159. wide: 64-bit pointers instead of 32-bit ones with selectors. */
static inline void put_x87_state(const struct fp *f, u8 *p, bool wide)
{
    const struct fp_legacy *l = &f->x87;

    memcpy(p, &l->fcw, 2);
    memcpy(p + 2, &l->fsw, 2);
    p[4] = l->ftw;
    p[5] = 0;
    memcpy(p + 6, &l->fop, 2);
    if (wide) {
        memcpy(p + 8, &l->fip, 8);
        memcpy(p + 16, &l->fdp, 8);
    } else {
        const u32 w[] = {(u32)l->fip, f->fcs, (u32)l->fdp, f->fds};

        memcpy(p + 8, w, sizeof w);
    }
    for (unsigned n = 0; n < 8; n++) {
        memset(p + 32 + 16 * n, 0, 16);
        memcpy(p + 32 + 16 * n, &l->st[n], 10);
    }
}

/* The same as the guest's instructions store it. */
static inline void put_x87(const struct fp *f, u8 *p, bool wide)
{
    put_x87_state(f, p, wide);
    if (f->save_on_error && !(f->x87.fsw & FSW_ES))
        memset(p + 6, 0, 18);
}

static inline void get_x87(struct fp *f, const u8 *p, bool wide)
{
    struct fp_legacy *l = &f->x87;

    memcpy(&l->fcw, p, 2);
    l->fcw = (l->fcw & 0x1f3f) | 0x40;
    memcpy(&l->fsw, p + 2, 2);
    l->ftw = p[4];
    memcpy(&l->fop, p + 6, 2);
    l->fop &= 0x7ff;
    if (wide) {
        memcpy(&l->fip, p + 8, 8);
        memcpy(&l->fdp, p + 16, 8);
        f->fcs = f->fds = 0;
    } else {
        u32 w[4];

        memcpy(w, p + 8, sizeof w);
        l->fip = w[0];
        f->fcs = (u16)w[1];
        l->fdp = w[2];
        f->fds = (u16)w[3];
    }
    for (unsigned n = 0; n < 8; n++)
        memcpy(&l->st[n], p + 32 + 16 * n, 10);
    fp_x87_summary(l);
}

static inline void init_x87(struct fp *f)
{
    struct fp_legacy *l = &f->x87;

    l->fcw = 0x37f;
    l->fsw = l->ftw = 0;
    l->fop = 0;
    l->fip = l->fdp = 0;
    f->fcs = f->fds = 0;
    for (unsigned n = 0; n < 8; n++)
        l->st[n].mant = l->st[n].exp = 0;
}

/* Offset of each component in an area; standard, or compacted for the components in xcomp. Returns the area's size. */
static inline u32 layout(const struct fp *f, u64 xcomp, u64 which, u32 off[XS_COMPONENTS])
{
    u32 at = XS_EXTENDED, end = XS_EXTENDED;

    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        off[n] = f->xs_off[n];
        if (xcomp & XCOMP_COMPACT) {
            if (!(xcomp & BIT(n)))
                continue;
            off[n] = f->xs_align64 & 1u << n ? (u32)ALIGN_UP(at, 64) : at;
            at = off[n] + f->xs_size[n];
        }
        if (which & BIT(n))
            end = MAX(end, off[n] + f->xs_size[n]);
    }
    return end;
}

static inline u64 rfbm(const struct icpu *c)
{
    return c->x->xcr0 & ((u32)c->r[RAX] | c->r[RDX] << 32);
}

struct xheader {
    u64 bv, xcomp, rsvd[6];
};

/* SDM vol. 1 13.8.1, 13.8.2, 13.12 */
static inline bool header_valid(const struct icpu *c, const struct fp *f, const struct xheader *h, bool compact_only)
{
    u64 xcr0 = c->x->xcr0;

    if (!(h->xcomp & XCOMP_COMPACT))
        return !compact_only && !(h->bv & ~xcr0) && !h->xcomp && !h->rsvd[0];
    if (!f->xsavec)
        return false;
    return !(h->xcomp & ~(xcr0 | XCOMP_COMPACT)) && !(h->bv & ~h->xcomp) && zero(h->rsvd, sizeof h->rsvd);
}
