/*
 * Extended state as memory images: FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS (Intel SDM vol. 1 10.5 and chapter 13, vol. 2), the
 * registers that govern it (MXCSR, XCR0, PKRU), and fp_load/fp_store, which convert from and to struct x86.
 *
 * An image is composed as a list of pieces, so that exactly the bytes are written that the processor writes: all pieces are probed before the first is
 * stored. Layout and sizes are what the guest's CPUID leaf 0xD says. IA32_XSS is zero: there are no supervisor components.
 *
 * "In use" (XINUSE) is computed from the contents: a component in its initial configuration is not in use. The modified optimization of XSAVEOPT and XSAVES is not
 * made; both may always write. Outside 64-bit mode registers 8 and up are neither stored nor loaded. Without CR4.OSFXSR, FXSAVE leaves SSE state alone.
 */
#include <string.h>

#include "cpu/interp/fp.h"
#include "cpu/interp/xsave.h"

/* ---- the guest's layout ---- */

/* Has the host all that the guest's XCR0 may enable, laid out in the same way? PKRU is never the guest's there. */
static bool native(const struct fp *f)
{
    u32 lo = 0, hi;

    if (!f->xsavec || !cpuid_host_has(CPU_XSAVE) || !cpuid_host_has(CPU_XSAVEC))
        return false;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    if (f->xcr0_mask & ~(u64)lo & FP_NATIVE)
        return false;
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        const struct cpuid_regs *r = cpuid_host(0xd, n);

        if (f->xs_size[n] && BIT(n) & FP_NATIVE && (r->eax != f->xs_size[n] || r->ebx != f->xs_off[n] || (r->ecx >> 1 & 1) != (f->xs_align64 >> n & 1)))
            return false;
    }
    return true;
}

void fp_xsave_open(struct icpu *c, struct fp *f)
{
    const struct cpuid_policy *p = c->v->m->cpuid;
    struct {
        u8 bytes[512];
    } __attribute__((aligned(16))) host;

    __asm__ volatile("fxsave64 %0" : "=m"(host));
    memcpy(&f->mxcsr_mask, host.bytes + 28, 4);
    if (!f->mxcsr_mask)
        f->mxcsr_mask = 0xffbf;                                    /* what a zero means: SDM vol. 1 11.6.6 */
    f->xcr0_mask = cpuid_xcr0_mask(p);
    f->xsavec = cpuid_has(p, CPU_XSAVEC);
    f->xgetbv1 = cpuid_has(p, CPU_XGETBV1);
    f->xsaves = cpuid_has(p, CPU_XSAVES);
    f->pku = cpuid_has(p, CPU_PKU);
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        static const u32 size[XS_COMPONENTS] = {[XS_AVX] = 256, [XS_OPMASK] = 64, [XS_ZMM_HI256] = 512, [XS_HI16_ZMM] = 1024, [XS_PKRU] = 8};
        struct cpuid_regs r;

        cpuid_get(p, c->v->id, c->x, true, 0xd, n, &r);
        /* A component that is not laid out as the SDM says cannot be carried: XCR0 must not enable it. */
        if (!(f->xcr0_mask & BIT(n)) || r.eax != size[n] || r.ebx < XS_EXTENDED || r.ebx > XS_MAX - size[n]) {
            f->xcr0_mask &= ~BIT(n);
            continue;
        }
        f->xs_size[n] = r.eax;
        f->xs_off[n] = r.ebx;
        if (r.ecx & 2)
            f->xs_align64 |= 1u << n;
    }
    f->native = native(f);
}

/* MXCSR is no part of it: the instructions differ in how they count it. */
static u64 in_use(const struct icpu *c)
{
    const struct fp *f = icpu_fp(c);
    u64 use = x87_in_use(f) ? XSTATE_X87 : 0;

    for (unsigned r = 0; r < 16; r++)
        use |= zero(f->v[r], 16) ? 0 : XSTATE_SSE;
    for (unsigned r = 0; r < 16 && f->in_use; r++) {
        use |= zero(f->v[r] + 16, 16) ? 0 : XSTATE_AVX;
        use |= zero(f->v[r] + 32, 32) ? 0 : BIT(XS_ZMM_HI256);
        use |= zero(f->v[r + 16], 64) ? 0 : BIT(XS_HI16_ZMM);
    }
    if (f->in_use)
        use |= zero(f->k, sizeof f->k) ? 0 : BIT(XS_OPMASK);
    use |= c->pkru ? XSTATE_PKRU : 0;
    return use & f->xcr0_mask;
}

/* ---- components to and from memory ---- */

static void put_mxcsr(const struct fp *f, u8 *p)
{
    memcpy(p, &f->mxcsr, 4);
    memcpy(p + 4, &f->mxcsr_mask, 4);
}

/* Rows of an extended component: where they are in a register row, how long, and which registers. Returns the number of rows. */
struct rows {
    u8 first, count, at, bytes;
};
static struct rows component_rows(unsigned n, bool mode64)
{
    switch (n) {
    case XS_SSE:
        return (struct rows){0, mode64 ? 16 : 8, 0, 16};
    case XS_AVX:
        return (struct rows){0, mode64 ? 16 : 8, 16, 16};
    case XS_ZMM_HI256:
        return (struct rows){0, mode64 ? 16 : 8, 32, 32};
    case XS_HI16_ZMM:
        return (struct rows){16, mode64 ? 16 : 0, 0, 64};
    default:
        return (struct rows){0, 0, 0, 0};
    }
}

/* Constant sizes, so that a row's copy is an instruction or two. src NULL: zeroes. */
static inline __attribute__((always_inline)) void copy_rows(u8 *dst, unsigned dst_step, const u8 *src, unsigned src_step, unsigned count, unsigned bytes)
{
    for (unsigned r = 0; r < count; r++) {
        if (src)
            memcpy(dst + r * dst_step, src + r * src_step, bytes);
        else
            memset(dst + r * dst_step, 0, bytes);
    }
}

static void rows_out(u8 *p, const struct fp *f, struct rows w)
{
    const u8 *v = f->v[w.first] + w.at;

    if (w.bytes == 16)
        copy_rows(p, 16, v, 64, w.count, 16);
    else if (w.bytes == 32)
        copy_rows(p, 32, v, 64, w.count, 32);
    else
        copy_rows(p, 64, v, 64, w.count, 64);
}

/* p NULL: zeroes. */
static void rows_in(struct fp *f, const u8 *p, struct rows w)
{
    u8 *v = f->v[w.first] + w.at;

    if (w.bytes == 16)
        copy_rows(v, 64, p, 16, w.count, 16);
    else if (w.bytes == 32)
        copy_rows(v, 64, p, 32, w.count, 32);
    else
        copy_rows(v, 64, p, 64, w.count, 64);
}

/* A component at p; returns how many bytes of it are written or read. */
static unsigned put_component(const struct icpu *c, unsigned n, u8 *p, bool mode64)
{
    const struct fp *f = icpu_fp(c);
    struct rows w = component_rows(n, mode64);

    if (n == XS_OPMASK) {
        memcpy(p, f->k, sizeof f->k);
        return sizeof f->k;
    }
    if (n == XS_PKRU) {
        memset(p, 0, 8);
        memcpy(p, &c->pkru, 4);
        return 8;
    }
    rows_out(p, f, w);
    return (unsigned)w.count * w.bytes;
}

/* p NULL: the initial configuration, all zero. */
static void get_component(struct icpu *c, unsigned n, const u8 *p, bool mode64)
{
    struct fp *f = icpu_fp(c);
    struct rows w = component_rows(n, mode64);

    if (n == XS_OPMASK) {
        memset(f->k, 0, sizeof f->k);
        if (p)
            memcpy(f->k, p, sizeof f->k);
    } else if (n == XS_PKRU) {
        c->pkru = 0;
        if (p)
            memcpy(&c->pkru, p, 4);
    }
    if (p)
        f->in_use |= BIT(n) & FP_TRACKED;
    else if (mode64)
        f->in_use &= ~BIT(n);
    rows_in(f, p, w);
}

/* ---- struct x86 ---- */

/* Whether its image holds 64-bit x87 pointers: as the code that runs would have stored them. */
static bool wide_pointers(const struct x86 *x)
{
    return (x->efer & EFER_LMA) && (x->seg[SEG_CS].attr & SEG_L);
}

void fp_load(struct icpu *c)
{
    struct fp *f = icpu_fp(c);
    const u8 *img = c->x->xsave;
    u64 bv;

    memcpy(&bv, img + XS_HEADER, 8);
    memcpy(&f->mxcsr, img + 24, 4);
    f->mxcsr &= f->mxcsr_mask;
    if (bv & XSTATE_X87)
        get_x87(f, img, wide_pointers(c->x));
    else
        init_x87(f);
    get_component(c, XS_SSE, bv & XSTATE_SSE ? img + 160 : NULL, true);
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        if (f->xs_size[n])
            get_component(c, n, bv & BIT(n) ? img + f->xs_off[n] : NULL, true);
    }
    fp_stub_here(f);
}

void fp_store(struct icpu *c)
{
    struct fp *f = icpu_fp(c);
    u8 *img = c->x->xsave;
    u64 bv = in_use(c);

    put_x87_state(f, img, wide_pointers(c->x));
    put_mxcsr(f, img + 24);
    put_component(c, XS_SSE, img + 160, true);
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        if (f->xs_size[n])
            put_component(c, n, img + f->xs_off[n], true);
    }
    memcpy(img + XS_HEADER, &bv, 8);
}

size_t fp_xsave_bytes(const struct icpu *c)
{
    const struct fp *f = icpu_fp(c);
    size_t end = XS_HEADER + 64;

    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        if (f->xs_size[n])
            end = MAX(end, (size_t)f->xs_off[n] + f->xs_size[n]);
    }
    return end;
}

/* ---- pieces ---- */

struct piece {
    u32 off, len;                                                  /* in the guest's area, and in image[] */
};
struct pieces {
    unsigned n;
    struct piece p[XS_COMPONENTS + 4];
    u8 image[XS_MAX];
};

/* In ascending order mostly: what follows the piece before is joined to it. */
static void add(struct pieces *s, u32 off, u32 len)
{
    struct piece *last = s->n ? &s->p[s->n - 1] : NULL;

    if (last && last->off + last->len == off)
        last->len += len;
    else if (len)
        s->p[s->n++] = (struct piece){off, len};
}

static int store_pieces(struct icpu *c, u64 la, const struct pieces *s)
{
    for (unsigned n = 0; n < s->n; n++) {
        if (lin_probe(c, la + s->p[n].off, s->p[n].len, MMU_WRITE))
            return OP_FAULT;
    }
    for (unsigned n = 0; n < s->n; n++) {
        if (lin_store_bytes(c, la + s->p[n].off, s->image + s->p[n].off, s->p[n].len))
            return OP_FAULT;
    }
    return OP_NEXT;
}

static bool mode64(const struct icpu *c)
{
    return c->mode == IMODE_LONG64;
}

/* What CR0 and CR4 forbid: FXSAVE and FXRSTOR; the XSAVE family. */
static int deny_fx(struct icpu *c)
{
    return c->x->cr0 & (CR0_EM | CR0_TS) ? fault_raise(c, VEC_NM) : 0;
}

static int deny_xsave(struct icpu *c)
{
    if (!(c->x->cr4 & CR4_OSXSAVE))
        return fault_ud(c);
    return c->x->cr0 & CR0_TS ? fault_raise(c, VEC_NM) : 0;
}

static int area(struct icpu *c, const struct op *op, unsigned size, unsigned align, enum mmu_access access, u64 *la)
{
    if (mem_linear(c, op, size, access, la))                       /* misalignment comes before a bad address */
        return fp_offset_in_line(c, op) & (align - 1) ? fault_gp(c, 0) : OP_FAULT;
    if (align == 16 && *la & 15 && fp_ac_armed(c))
        return fault_raise_error(c, VEC_AC, 0);
    return *la & (align - 1) ? fault_gp(c, 0) : 0;
}

/* ---- FXSAVE, FXRSTOR ---- */

static int op_fxsave(struct icpu *c, const struct op *op)
{
    struct fp *f = icpu_fp(c);
    bool sse = c->x->cr4 & CR4_OSFXSR;
    struct pieces s;
    u64 la;

    if (deny_fx(c) || area(c, op, 512, 16, MMU_WRITE, &la))
        return OP_FAULT;
    s.n = 0;
    put_x87(f, s.image, op->aux);
    put_mxcsr(f, s.image + 24);
    add(&s, 0, 160 + (sse ? put_component(c, XS_SSE, s.image + 160, mode64(c)) : 0));
    return store_pieces(c, la, &s);
}

static int op_fxrstor(struct icpu *c, const struct op *op)
{
    struct fp *f = icpu_fp(c);
    u8 img[XS_LEGACY];
    u32 mxcsr;
    u64 la;

    if (deny_fx(c) || area(c, op, 512, 16, MMU_READ, &la) || lin_load_bytes(c, la, img, sizeof img))
        return OP_FAULT;
    memcpy(&mxcsr, img + 24, 4);
    if (c->x->cr4 & CR4_OSFXSR) {
        if (mxcsr & ~f->mxcsr_mask)
            return fault_gp(c, 0);
        f->mxcsr = mxcsr;
        get_component(c, XS_SSE, img + 160, mode64(c));
    }
    get_x87(f, img, op->aux);
    return OP_NEXT;
}

/* ---- XSAVE ---- */

/* Fills the legacy region for the components in save; mxcsr: bytes 24..31 too. */
static void put_legacy(struct icpu *c, struct pieces *s, u64 save, bool mxcsr, bool wide)
{
    const struct fp *f = icpu_fp(c);

    if (save & XSTATE_X87) {
        put_x87(f, s->image, wide);
        add(s, 0, 24);
    }
    if (mxcsr) {
        put_mxcsr(f, s->image + 24);
        add(s, 24, 8);
    }
    if (save & XSTATE_X87)
        add(s, 32, 128);
    if (save & XSTATE_SSE)
        add(s, 160, put_component(c, XS_SSE, s->image + 160, mode64(c)));
}

static void put_extended(struct icpu *c, struct pieces *s, u64 save, const u32 off[XS_COMPONENTS])
{
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        if (save & BIT(n))
            add(s, off[n], put_component(c, n, s->image + off[n], mode64(c)));
    }
}

/* Standard format: XSAVE writes every requested component, XSAVEOPT only those in use. */
static int xsave_standard(struct icpu *c, const struct op *op, bool optimize)
{
    const struct fp *f = icpu_fp(c);
    u64 want = rfbm(c), use = in_use(c), save = optimize ? want & use : want, bv, la;
    u32 off[XS_COMPONENTS], size;
    struct pieces s;

    if (deny_xsave(c))
        return OP_FAULT;
    size = layout(f, 0, want, off);
    if (area(c, op, size, 64, MMU_WRITE, &la) || lin_probe(c, la + XS_HEADER, 8, MMU_WRITE) || lin_load(c, la + XS_HEADER, 8, &bv))
        return OP_FAULT;
    s.n = 0;
    put_legacy(c, &s, save, want & (XSTATE_SSE | XSTATE_AVX), op->aux);
    bv = (bv & ~want) | (use & want);
    memcpy(s.image + XS_HEADER, &bv, 8);
    add(&s, XS_HEADER, 8);
    put_extended(c, &s, save, off);
    return store_pieces(c, la, &s);
}

static int op_xsave(struct icpu *c, const struct op *op)
{
    return xsave_standard(c, op, false);
}

static int op_xsaveopt(struct icpu *c, const struct op *op)
{
    return xsave_standard(c, op, true);
}

/* Compacted format. An MXCSR that is not the initial one counts as SSE state in use. */
static int op_xsavec(struct icpu *c, const struct op *op)
{
    const struct fp *f = icpu_fp(c);
    u64 want = rfbm(c), save = want & (in_use(c) | (f->mxcsr != MXCSR_RESET ? XSTATE_SSE : 0)), xcomp = want | XCOMP_COMPACT, la;
    u32 off[XS_COMPONENTS], size;
    struct pieces s;

    if (deny_xsave(c))
        return OP_FAULT;
    size = layout(f, xcomp, want, off);
    if (area(c, op, size, 64, MMU_WRITE, &la))
        return OP_FAULT;
    s.n = 0;
    put_legacy(c, &s, save, save & XSTATE_SSE, op->aux);
    memcpy(s.image + XS_HEADER, &save, 8);
    memcpy(s.image + XS_HEADER + 8, &xcomp, 8);
    add(&s, XS_HEADER, 16);
    put_extended(c, &s, save, off);
    return store_pieces(c, la, &s);
}

static int op_xsaves(struct icpu *c, const struct op *op)
{
    if (deny_xsave(c))
        return OP_FAULT;
    return c->cpl ? fault_gp(c, 0) : op_xsavec(c, op);
}

/* ---- XRSTOR ---- */

/* Everything is loaded and checked before the first register changes. */
static int xrstor(struct icpu *c, const struct op *op, bool compact_only)
{
    struct fp *f = icpu_fp(c);
    u64 want = rfbm(c), load, la;
    u32 off[XS_COMPONENTS], mxcsr = MXCSR_RESET;
    u8 img[XS_MAX];
    struct xheader h;
    bool compact, mxcsr_too;

    if (area(c, op, layout(f, 0, 0, off), 64, MMU_READ, &la) || lin_probe(c, la, XS_EXTENDED, MMU_READ) || lin_load_bytes(c, la + XS_HEADER, &h, sizeof h))
        return OP_FAULT;
    if (!header_valid(c, f, &h, compact_only))
        return fault_gp(c, 0);
    compact = h.xcomp & XCOMP_COMPACT;
    load = want & h.bv;
    mxcsr_too = compact ? load & XSTATE_SSE : want & (XSTATE_SSE | XSTATE_AVX);
    if (area(c, op, layout(f, h.xcomp, load, off), 64, MMU_READ, &la))
        return OP_FAULT;
    if (((load & (XSTATE_X87 | XSTATE_SSE)) || mxcsr_too) && lin_load_bytes(c, la, img, mode64(c) ? XS_LEGACY : XS_LEGACY - 128))
        return OP_FAULT;
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        if ((load & BIT(n)) && lin_load_bytes(c, la + off[n], img + off[n], f->xs_size[n]))
            return OP_FAULT;
    }
    if (mxcsr_too) {
        memcpy(&mxcsr, img + 24, 4);
        if (mxcsr & ~f->mxcsr_mask)
            return fault_gp(c, 0);
    }
    if (mxcsr_too || (want & XSTATE_SSE))
        f->mxcsr = mxcsr;
    if (load & XSTATE_X87)
        get_x87(f, img, op->aux);
    else if (want & XSTATE_X87)
        init_x87(f);
    if (want & XSTATE_SSE)
        get_component(c, XS_SSE, load & XSTATE_SSE ? img + 160 : NULL, mode64(c));
    for (unsigned n = XS_AVX; n < XS_COMPONENTS; n++) {
        if (want & BIT(n))
            get_component(c, n, load & BIT(n) ? img + off[n] : NULL, mode64(c));
    }
    if (want & XSTATE_PKRU)
        tlb_views(c);
    return OP_NEXT;
}

static int op_xrstor(struct icpu *c, const struct op *op)
{
    return deny_xsave(c) ? OP_FAULT : xrstor(c, op, false);
}

static int op_xrstors(struct icpu *c, const struct op *op)
{
    if (deny_xsave(c))
        return OP_FAULT;
    return c->cpl ? fault_gp(c, 0) : xrstor(c, op, true);
}

/* ---- registers ---- */

static int ldmxcsr(struct icpu *c, const struct op *op)
{
    struct fp *f = icpu_fp(c);
    u64 v;

    if (mem_load(c, op, 4, &v))
        return OP_FAULT;
    if (v & ~(u64)f->mxcsr_mask)
        return fault_gp(c, 0);
    f->mxcsr = (u32)v;
    return OP_NEXT;
}

static int op_ldmxcsr(struct icpu *c, const struct op *op)
{
    return fp_check_sse(c) ? OP_FAULT : ldmxcsr(c, op);
}

static int op_vldmxcsr(struct icpu *c, const struct op *op)
{
    return fp_check_avx(c, XCR0_AVX) ? OP_FAULT : ldmxcsr(c, op);
}

static int op_stmxcsr(struct icpu *c, const struct op *op)
{
    return fp_check_sse(c) ? OP_FAULT : mem_store(c, op, 4, icpu_fp(c)->mxcsr);
}

static int op_vstmxcsr(struct icpu *c, const struct op *op)
{
    return fp_check_avx(c, XCR0_AVX) ? OP_FAULT : mem_store(c, op, 4, icpu_fp(c)->mxcsr);
}

static int op_xgetbv(struct icpu *c, const struct op *op UNUSED)
{
    u64 v = c->x->xcr0;
    u32 n = (u32)c->r[RCX];

    if (!(c->x->cr4 & CR4_OSXSAVE))
        return fault_ud(c);
    if (n > 1 || (n == 1 && !icpu_fp(c)->xgetbv1))
        return fault_gp(c, 0);
    if (n == 1)
        v &= in_use(c) | (icpu_fp(c)->mxcsr != MXCSR_RESET ? XSTATE_SSE : 0);
    c->r[RAX] = (u32)v;
    c->r[RDX] = v >> 32;
    return OP_NEXT;
}

/* SDM vol. 2 XSETBV: SSE is needed for AVX, AVX for the three parts of AVX-512. */
static bool xcr0_valid(const struct fp *f, u64 v)
{
    u64 avx512 = v & XSTATE_AVX512;

    return !(v & ~f->xcr0_mask) && (v & XSTATE_X87) && (!(v & XSTATE_AVX) || (v & XSTATE_SSE)) &&
           (!avx512 || (avx512 == XSTATE_AVX512 && (v & XSTATE_AVX)));
}

static int op_xsetbv(struct icpu *c, const struct op *op UNUSED)
{
    u64 v = (u32)c->r[RAX] | c->r[RDX] << 32;

    if (!(c->x->cr4 & CR4_OSXSAVE))
        return fault_ud(c);
    if (c->cpl || (u32)c->r[RCX] || !xcr0_valid(icpu_fp(c), v))
        return fault_gp(c, 0);
    c->x->xcr0 = v;
    return OP_NEXT;
}

static int op_rdpkru(struct icpu *c, const struct op *op UNUSED)
{
    if (!(c->x->cr4 & CR4_PKE))
        return fault_ud(c);
    if ((u32)c->r[RCX])
        return fault_gp(c, 0);
    c->r[RAX] = c->pkru;
    c->r[RDX] = 0;
    return OP_NEXT;
}

static int op_wrpkru(struct icpu *c, const struct op *op UNUSED)
{
    if (!(c->x->cr4 & CR4_PKE))
        return fault_ud(c);
    if ((u32)c->r[RCX] || (u32)c->r[RDX])
        return fault_gp(c, 0);
    c->pkru = (u32)c->r[RAX];
    tlb_views(c);
    return OP_NEXT;
}

/* ---- binding ---- */

int fp_bind_xsave(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const struct {
        op_fn fn;
        bool wide;                                                 /* x87 pointers of 64 bits */
    } row[] = {
        [XS_FXSAVE] = {op_fxsave, false}, [XS_FXSAVE64] = {op_fxsave, true},
        [XS_FXRSTOR] = {op_fxrstor, false}, [XS_FXRSTOR64] = {op_fxrstor, true},
        [XS_XSAVE] = {op_xsave, false}, [XS_XSAVE64] = {op_xsave, true},
        [XS_XSAVEOPT] = {op_xsaveopt, false}, [XS_XSAVEOPT64] = {op_xsaveopt, true},
        [XS_XSAVEC] = {op_xsavec, false}, [XS_XSAVEC64] = {op_xsavec, true},
        [XS_XSAVES] = {op_xsaves, false}, [XS_XSAVES64] = {op_xsaves, true},
        [XS_XRSTOR] = {op_xrstor, false}, [XS_XRSTOR64] = {op_xrstor, true},
        [XS_XRSTORS] = {op_xrstors, false}, [XS_XRSTORS64] = {op_xrstors, true},
        [XS_LDMXCSR] = {op_ldmxcsr, false}, [XS_VLDMXCSR] = {op_vldmxcsr, false},
        [XS_STMXCSR] = {op_stmxcsr, false}, [XS_VSTMXCSR] = {op_vstmxcsr, false},
        [XS_XGETBV] = {op_xgetbv, false}, [XS_XSETBV] = {op_xsetbv, false},
        [XS_RDPKRU] = {op_rdpkru, false}, [XS_WRPKRU] = {op_wrpkru, false},
    };
    bool vex = d->insn.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;

    if (!icpu_fp(c)->isa[d->insn.meta.isa_set] || (d->insn.attributes & ZYDIS_ATTRIB_HAS_LOCK))
        return BIND_UD;
    if (vex && (d->mode == IMODE_REAL16 || d->mode == IMODE_V86))
        return BIND_UD;
    op->fn = row[arg].fn;
    op->flags |= OPF_FP;
    op->aux = row[arg].wide;
    return BIND_OK;
}
