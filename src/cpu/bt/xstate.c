/*
 * The XSAVE family where the guest's extended state is in the processor's registers (fpstate.h): the host's own XSAVE, XSAVEC and XRSTOR, to and from an image in
 * struct fp (Intel SDM vol. 1 13.7 to 13.13). What is to be read or written in the guest's area is then copied, so that it is exactly what interp's handlers
 * (interp/xsave.c) read and write, and no instruction of the host's can fault halfway.
 *
 * x87 and PKRU are not the processor's: they are taken from struct fp and struct icpu. "In use" is what interp means by it, other than all zero, since the
 * processor's own XINUSE knows what the monitor has had in the registers.
 *
 * All that is not usual is interp's: a closed gate, x87's registers in the processor, an area that is not plain RAM on one or two pages, whatever faults, another value
 * of PKRU. Owned by the vCPU's thread.
 */
#include "cpu/bt/fpstate.h"
#include "cpu/bt/tr.h"
#include "cpu/interp/xsave.h"

enum format { STANDARD, OPTIMIZED, COMPACT };

/* interp's handler: as bt_run_op() calls it. */
static int by_handler(struct icpu *c, const struct op *op)
{
    icpu_claim(c);
    return op->fn(c, op);
}

static bool usual(const struct icpu *c, const struct op *op)
{
    const struct fp *f = c->fp;
    return c->live.on && !c->live.x87 && f->native && op->aux && c->x->cr4 & CR4_OSXSAVE && !(c->x->cr0 & CR0_TS);
}

/* ---- the guest's area ---- */
struct span {
    u8 *page[2];                                                   /* host addresses of its two parts */
    u32 room;                                                      /* bytes in the first one */
    u32 from, to;                                                  /* of the image: what is to be written and has not been */
};

/* The first n bytes of it, if they are plain RAM that may be accessed in this way, and aligned. */
static bool span_open(struct icpu *c, const struct op *op, u32 n, enum mmu_access access, struct span *s)
{
    u64 la;
    if (mem_linear(c, op, n, access, &la) || la & 63)
        return false;
    *s = (struct span){ .room = (u32)(PAGE_SIZE - (la & ~PAGE_MASK)) };
    s->page[0] = lin_host(c, la, MIN(n, s->room), access);
    if (!s->page[0] || n <= s->room)
        return s->page[0];
    s->page[1] = n - s->room <= PAGE_SIZE ? lin_host(c, la + s->room, n - s->room, access) : NULL;
    return s->page[1];
}

static u8 *span_at(const struct span *s, u32 off, u32 n, u32 *here)
{
    *here = off < s->room ? MIN(n, s->room - off) : n;
    return off < s->room ? s->page[0] + off : s->page[1] + (off - s->room);
}

static void span_read(const struct span *s, u8 *image, u32 off, u32 n)
{
    for (u32 here; n; off += here, n -= here) {
        const u8 *p = span_at(s, off, n, &here);
        memcpy(image + off, p, here);
    }
}

static void span_flush(struct span *s, const u8 *image)
{
    for (u32 here; s->from < s->to; s->from += here) {
        u8 *p = span_at(s, s->from, s->to - s->from, &here);
        memcpy(p, image + s->from, here);
    }
}

/* In ascending order: what follows the part before is written together with it. */
static void span_write(struct span *s, const u8 *image, u32 off, u32 n)
{
    if (s->to != off) {
        span_flush(s, image);
        s->from = off;
    }
    s->to = off + n;
}

/* ---- saving ---- */
/* Stores hw, components of FP_NATIVE, to the image, and MXCSR. XSAVEOPT might leave out what has not changed since the last XRSTOR, which was of another area. */
static void store_native(struct fp *f, u64 hw, bool compact)
{
    memset(f->image + XS_HEADER, 0, 64);
    if (compact)
        asm volatile("xsavec64 %0" : "+m"(f->image) : "a"((u32)hw), "d"(0));
    else
        asm volatile("xsave64 %0" : "+m"(f->image) : "a"((u32)hw), "d"(0));
    asm volatile("stmxcsr %0" : "=m"(*(u32 *)(void *)(f->image + 24)));
}

static bool all_zero(const u8 *p, u32 n)
{
    u64 v = 0;
    for (u32 at = 0; at < n && !v; at += 8)
        memcpy(&v, p + at, 8);
    return !v;
}

static u64 in_use(const struct icpu *c, const u32 off[XS_COMPONENTS])
{
    const struct fp *f = c->fp;
    u64 use;
    memcpy(&use, f->image + XS_HEADER, 8);                         /* XINUSE, at most */
    if (use & XSTATE_SSE && all_zero(f->image + 160, 256))
        use &= ~(u64)XSTATE_SSE;
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++)
        if (use & BIT(n) && all_zero(f->image + off[n], f->xs_size[n]))
            use &= ~BIT(n);
    return use | (x87_in_use(f) ? XSTATE_X87 : 0) | (c->pkru ? XSTATE_PKRU : 0);
}

/* The image's parts that hold the components in save, and the first bytes of the header; mxcsr: bytes 24..31 too. */
static void write_parts(struct span *s, const struct fp *f, u64 save, bool mxcsr, u32 header, const u32 off[XS_COMPONENTS])
{
    if (save & XSTATE_X87)
        span_write(s, f->image, 0, 24);
    if (mxcsr)
        span_write(s, f->image, 24, 8);
    if (save & XSTATE_X87)
        span_write(s, f->image, 32, 128);
    if (save & XSTATE_SSE)
        span_write(s, f->image, 160, 256);
    span_write(s, f->image, XS_HEADER, header);
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++)
        if (save & BIT(n))
            span_write(s, f->image, off[n], f->xs_size[n]);
    span_flush(s, f->image);
}

static int save(struct icpu *c, const struct op *op, enum format how)
{
    struct fp *f = c->fp;
    u64 want = rfbm(c), xcomp = how == COMPACT ? want | XCOMP_COMPACT : 0, pkru = c->pkru, bv, parts;
    u32 off[XS_COMPONENTS], mask = f->mxcsr_mask, mxcsr;
    struct span s;
    bool mxcsr_too;
    if (!usual(c, op))
        return by_handler(c, op);
    store_native(f, want & FP_NATIVE, how == COMPACT);
    layout(f, xcomp, 0, off);
    memcpy(&mxcsr, f->image + 24, 4);
    bv = want & in_use(c, off);
    if (how == COMPACT && mxcsr != MXCSR_RESET)
        bv |= want & XSTATE_SSE;
    parts = how == STANDARD ? want : bv;
    mxcsr_too = how == COMPACT ? bv & XSTATE_SSE : want & (XSTATE_SSE | XSTATE_AVX);
    if (!span_open(c, op, layout(f, xcomp, parts, off), MMU_WRITE, &s) || !c->live.on) /* the walk there may take the state out of the registers */
        return by_handler(c, op);
    if (s.room <= XS_HEADER && !mxcsr_too && !(parts & (XSTATE_X87 | XSTATE_SSE)))
        return by_handler(c, op);                                  /* nothing is written to the first page */
    if (how != COMPACT) {
        u64 old;
        span_read(&s, f->image, XS_HEADER, 8);
        memcpy(&old, f->image + XS_HEADER, 8);
        bv |= old & ~want;
    }
    if (parts & XSTATE_X87)
        put_x87(f, f->image, true);
    memcpy(f->image + 28, &mask, 4);
    memcpy(f->image + XS_HEADER, &bv, 8);
    memcpy(f->image + XS_HEADER + 8, &xcomp, 8);
    if (parts & XSTATE_PKRU)
        memcpy(f->image + off[XS_PKRU], &pkru, 8);
    write_parts(&s, f, parts, mxcsr_too, how == COMPACT ? 16 : 8, off);
    return OP_NEXT;
}

int bt_xsave(struct icpu *c, const struct op *op)
{
    return save(c, op, STANDARD);
}

int bt_xsaveopt(struct icpu *c, const struct op *op)
{
    return save(c, op, OPTIMIZED);
}

int bt_xsavec(struct icpu *c, const struct op *op)
{
    return save(c, op, COMPACT);
}

int bt_xsaves(struct icpu *c, const struct op *op)
{
    return c->cpl ? by_handler(c, op) : save(c, op, COMPACT);
}

/* ---- restoring ---- */
/* Loads hw, components of FP_NATIVE, from the image. */
static void load_native(const struct fp *f, u64 hw)
{
    asm volatile("xrstor64 %0" : : "m"(f->image), "a"((u32)hw), "d"(0));
}

/* A change of PKRU changes views: interp's. */
static bool pkru_stays(const struct icpu *c, const struct span *s, u64 load, const u32 off[XS_COMPONENTS])
{
    struct fp *f = c->fp;
    u32 pkru = 0;
    if (load & XSTATE_PKRU) {
        span_read(s, f->image, off[XS_PKRU], 4);
        memcpy(&pkru, f->image + off[XS_PKRU], 4);
    }
    return pkru == c->pkru;
}

/* x87's registers are in struct fp. */
static void restore_x87(struct fp *f, const struct span *s, bool load)
{
    if (load) {
        span_read(s, f->image, 0, 24);
        span_read(s, f->image, 32, 128);
        get_x87(f, f->image, true);
    } else if (x87_in_use(f)) {
        init_x87(f);
    }
}

static int restore(struct icpu *c, const struct op *op, bool compact_only)
{
    struct fp *f = c->fp;
    u64 want = rfbm(c), load;
    u32 off[XS_COMPONENTS], end, mxcsr;
    struct xheader h;
    struct span s;
    bool mxcsr_too;
    if (!usual(c, op) || !span_open(c, op, XS_EXTENDED, MMU_READ, &s))
        return by_handler(c, op);
    span_read(&s, f->image, XS_HEADER, sizeof h);
    memcpy(&h, f->image + XS_HEADER, sizeof h);
    if (!header_valid(c, f, &h, compact_only))
        return by_handler(c, op);
    load = want & h.bv;
    mxcsr_too = h.xcomp & XCOMP_COMPACT ? load & XSTATE_SSE : want & (XSTATE_SSE | XSTATE_AVX);
    end = layout(f, h.xcomp, load, off);
    if ((end > XS_EXTENDED && !span_open(c, op, end, MMU_READ, &s)) || (want & XSTATE_PKRU && !pkru_stays(c, &s, load, off)))
        return by_handler(c, op);
    if (mxcsr_too) {
        span_read(&s, f->image, 24, 4);
        memcpy(&mxcsr, f->image + 24, 4);
        if (mxcsr & ~f->mxcsr_mask)
            return by_handler(c, op);
    }
    if (!c->live.on)                                               /* as above */
        return by_handler(c, op);
    if (want & XSTATE_X87)
        restore_x87(f, &s, load & XSTATE_X87);
    if (load & XSTATE_SSE)
        span_read(&s, f->image, 160, 256);
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++)
        if (load & FP_NATIVE & BIT(n))
            span_read(&s, f->image, off[n], f->xs_size[n]);
    h = (struct xheader){ .bv = load & FP_NATIVE, .xcomp = h.xcomp & (FP_NATIVE | XCOMP_COMPACT) };
    memcpy(f->image + XS_HEADER, &h, sizeof h);
    load_native(f, want & FP_NATIVE);
    return OP_NEXT;
}

int bt_xrstor(struct icpu *c, const struct op *op)
{
    return restore(c, op, false);
}

int bt_xrstors(struct icpu *c, const struct op *op)
{
    return c->cpl ? by_handler(c, op) : restore(c, op, true);
}

/* ---- what else does not need the registers ---- */
int bt_xgetbv(struct icpu *c, const struct op *op)
{
    if (!(c->x->cr4 & CR4_OSXSAVE) || (u32)c->r[RCX])
        return by_handler(c, op);
    c->r[RAX] = (u32)c->x->xcr0;
    c->r[RDX] = c->x->xcr0 >> 32;
    return OP_NEXT;
}

/* While x87's registers are in struct fp, so is the error that FWAIT would report. */
int bt_fwait(struct icpu *c, const struct op *op)
{
    const struct fp *f = c->fp;
    if (c->live.x87 || c->x->cr0 & CR0_TS || f->x87.fsw & FSW_ES)
        return by_handler(c, op);
    return OP_NEXT;
}
