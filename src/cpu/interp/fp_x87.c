/*
 * x87 (Intel SDM vol. 1 chapter 8) and what MMX does to its state (vol. 1 9.5, vol. 3A 12.2).
 *
 * Arithmetic and data movement run natively; control instructions, which see instruction and operand pointers, tags or the environment, are C on the
 * image. Register rows are relative to TOP, as FXSAVE stores them, so whatever changes TOP without moving data rotates them.
 *
 * FIP, FDP, FOP and their selectors hold the last non-control instruction's own guest values. As the guest's CPUID says, selectors may be zero
 * (leaf 7 EBX bit 13), FDP may follow only unmasked exceptions (bit 6), and on Intel FOP does.
 *
 * Left out: with CR0.NE = 0 a pending error should raise FERR# and IRQ 13; here the next instruction runs as if IGNNE# were asserted.
 */
#include <string.h>

#include "cpu/interp/fp.h"

#define FSW_NO_RESULT 0x19u                                        /* IE, OE, UE */
#define FCW_INIT 0x37fu

/* ---- the image ---- */

/* Changes TOP; each physical register keeps its contents. */
static void set_top(struct fp_legacy *l, unsigned top)
{
    unsigned by = (top - FSW_TOP(l->fsw)) & 7;
    __typeof__(l->st[0]) old[8];

    if (!by)
        return;
    memcpy(old, l->st, sizeof old);
    for (unsigned n = 0; n < 8; n++)
        l->st[n] = old[(n + by) & 7];
    l->fsw = (u16)((l->fsw & ~0x3800u) | top << 11);
}

void fp_mmx_enter(struct fp *f)
{
    set_top(&f->x87, 0);
    f->x87.ftw = 0xff;
}

void fp_mmx_undo(struct fp *f, u16 fsw, u8 ftw)
{
    set_top(&f->x87, FSW_TOP(fsw));
    f->x87.ftw = ftw;
}

void fp_x87_init(struct fp *f)
{
    struct fp_legacy *l = &f->x87;

    set_top(l, 0);
    l->fcw = FCW_INIT;
    l->fsw = 0;
    l->ftw = 0;
    l->fop = 0;
    l->fip = l->fdp = 0;
    f->fcs = f->fds = 0;
}

/* The full tag word: two bits for each physical register (SDM vol. 1 8.1.7). */
static u16 full_tags(const struct fp_legacy *l)
{
    u16 tags = 0;

    for (unsigned phys = 0; phys < 8; phys++) {
        __typeof__(&l->st[0]) r = &l->st[(phys - FSW_TOP(l->fsw)) & 7];
        unsigned exp = r->exp & 0x7fff, tag = 2;                   /* special: NaN, infinity, denormal, unnormal */

        if (!(l->ftw >> phys & 1))
            tag = 3;
        else if (exp == 0 && r->mant == 0)
            tag = 1;
        else if (exp != 0 && exp != 0x7fff && r->mant >> 63)
            tag = 0;
        tags |= (u16)(tag << 2 * phys);
    }
    return tags;
}

static u8 abridged_tags(u16 tags)
{
    u8 ftw = 0;

    for (unsigned phys = 0; phys < 8; phys++)
        ftw |= (u8)(((tags >> 2 * phys & 3) != 3) << phys);
    return ftw;
}

/* ---- native instructions ---- */

static void set_pointers(struct icpu *c, const struct op *op)
{
    struct fp *f = icpu_fp(c);
    struct fp_legacy *l = &f->x87;
    bool unmasked = l->fsw & FSW_ES;

    if (!f->fop_on_error || unmasked)
        l->fop = (u16)op->aux;
    l->fip = c->mode == IMODE_LONG64 ? op_rip(c, op) : (u32)op_rip(c, op);
    f->fcs = f->no_selectors ? 0 : c->x->seg[SEG_CS].sel;
    if (!(op->flags & OPF_MEM) || (f->fdp_on_error && !unmasked))
        return;
    l->fdp = fp_ea(c, op);
    f->fds = f->no_selectors ? 0 : c->x->seg[op->seg].sel;
}

/* Runs the stub; errors that CR0.NE = 0 lets pass are kept from the processor, which would report them. */
static int run(struct icpu *c, const struct op *op, void *mem)
{
    const struct fp_insn *i = op->ptr;
    struct fp *f = icpu_fp(c);
    u16 ignored = 0, fop = f->x87.fop;
    u64 fdp = f->x87.fdp, r;

    f->x87_uses++;
    if (unlikely(f->x87.fsw & FSW_ES)) {
        ignored = f->x87.fsw & FSW_EXCEPTIONS;
        f->x87.fsw &= (u16) ~(FSW_ES | FSW_B | FSW_EXCEPTIONS);
    }
    r = i->code(f, c, mem);
    f->x87.fop = fop;                                              /* the stub's own were saved */
    f->x87.fdp = fdp;
    if (unlikely(ignored)) {
        f->x87.fsw |= ignored;
        fp_x87_summary(&f->x87);
    }
    if (unlikely(r))
        return fp_stub_fault(c, r);
    set_pointers(c, op);
    return OP_NEXT;
}

static int op_x87_reg(struct icpu *c, const struct op *op)
{
    return fp_deny(c, FP_X87) ? OP_FAULT : run(c, op, NULL);
}

static int op_x87_mem(struct icpu *c, const struct op *op)
{
    const struct fp_insn *i = op->ptr;
    enum mmu_access access = i->writes ? MMU_WRITE : MMU_READ;
    struct fp *f = icpu_fp(c);
    void *p;
    u64 la;

    if (fp_deny(c, FP_X87) || mem_linear(c, op, i->bytes, access, &la))
        return OP_FAULT;
    if (fp_ac_armed(c) && (la & (i->unit - 1u)))
        return fault_raise_error(c, VEC_AC, 0);
    p = lin_host(c, la, i->bytes, access);
    if (p)
        return run(c, op, p);
    if (i->writes ? lin_probe(c, la, i->bytes, MMU_WRITE) : lin_load_bytes(c, la, f->bounce, i->bytes))
        return OP_FAULT;
    if (run(c, op, f->bounce))
        return OP_FAULT;
    /* An unmasked invalid operation, overflow or underflow has left the destination as it was. */
    if (!i->writes || (f->x87.fsw & ~f->x87.fcw & FSW_NO_RESULT))
        return OP_NEXT;
    return lin_store_bytes(c, la, f->bounce, i->bytes);
}

int fp_bind_x87(struct icpu *c, const struct decoded *d, struct op *op)
{
    const ZydisDecodedInstruction *z = &d->insn;
    const ZydisDecodedOperand *mem = NULL;
    struct fp_insn *i = fp_stub_make(icpu_fp(c), d, FP_X87);

    for (unsigned n = 0; n < z->operand_count; n++) {
        if (d->opnd[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
            mem = &d->opnd[n];
    }
    if (mem) {
        i->bytes = mem->size / 8;
        i->writes = mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
        i->unit = (u8)(i->bytes == 10 ? 8 : i->bytes);
        if (i->bytes == 0 || i->bytes > 10)
            return BIND_UD;
    }
    op->aux = (z->opcode & 7u) << 8 | d->bytes[z->raw.modrm.offset];
    op->ptr = i;
    op->fn = mem ? op_x87_mem : op_x87_reg;
    return BIND_OK;
}

/* ---- control instructions ---- */

/* No exception is looked for, only whether the processor may use its FPU at all. */
static int deny_control(struct icpu *c)
{
    icpu_fp(c)->x87_uses++;
    return c->x->cr0 & (CR0_EM | CR0_TS) ? fault_raise(c, VEC_NM) : 0;
}

static int op_ninit(struct icpu *c, const struct op *op UNUSED)
{
    if (deny_control(c))
        return OP_FAULT;
    fp_x87_init(icpu_fp(c));
    return OP_NEXT;
}

static int op_nclex(struct icpu *c, const struct op *op UNUSED)
{
    if (deny_control(c))
        return OP_FAULT;
    icpu_fp(c)->x87.fsw &= 0x7f00;
    return OP_NEXT;
}

static int op_nstcw(struct icpu *c, const struct op *op)
{
    return deny_control(c) ? OP_FAULT : mem_store(c, op, 2, icpu_fp(c)->x87.fcw);
}

static int op_nstsw(struct icpu *c, const struct op *op)
{
    u16 fsw = icpu_fp(c)->x87.fsw;

    if (deny_control(c))
        return OP_FAULT;
    if (op->flags & OPF_MEM)
        return mem_store(c, op, 2, fsw);
    c->r[RAX] = (c->r[RAX] & ~0xffffull) | fsw;
    return OP_NEXT;
}

/* Bit 6 always reads as one, bits 7 and 13 to 15 as zero. */
static void load_fcw(struct fp_legacy *l, u16 fcw)
{
    l->fcw = (fcw & 0x1f3f) | 0x40;
}

static int op_ldcw(struct icpu *c, const struct op *op)
{
    struct fp_legacy *l = &icpu_fp(c)->x87;
    u64 fcw;

    if (fp_deny(c, FP_X87) || mem_load(c, op, 2, &fcw))
        return OP_FAULT;
    icpu_fp(c)->x87_uses++;
    load_fcw(l, (u16)fcw);
    fp_x87_summary(l);
    return OP_NEXT;
}

static int op_wait(struct icpu *c, const struct op *op UNUSED)
{
    const struct x86 *x = c->x;

    if ((x->cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS))
        return fault_raise(c, VEC_NM);
    if ((icpu_fp(c)->x87.fsw & FSW_ES) && (x->cr0 & CR0_NE))
        return fault_raise(c, VEC_MF);
    icpu_fp(c)->x87_uses++;
    return OP_NEXT;
}

static int op_none(struct icpu *c, const struct op *op UNUSED)
{
    return deny_control(c);
}

static int op_emms(struct icpu *c, const struct op *op UNUSED)
{
    struct fp *f = icpu_fp(c);

    if (fp_deny(c, FP_MMX))
        return OP_FAULT;
    set_top(&f->x87, 0);
    f->x87.ftw = 0;
    return OP_NEXT;
}

/* ---- the environment in memory: 14 or 28 bytes (SDM vol. 1 8.1.10), by operand size and mode ---- */

static bool real_format(const struct icpu *c)
{
    return c->mode == IMODE_REAL16 || c->mode == IMODE_V86;
}

static void put16(u8 *p, u64 v)
{
    memcpy(p, &(u16){(u16)v}, 2);
}

static void put32(u8 *p, u64 v)
{
    memcpy(p, &(u32){(u32)v}, 4);
}

static u16 get16(const u8 *p)
{
    u16 v;

    memcpy(&v, p, 2);
    return v;
}

static u32 get32(const u8 *p)
{
    u32 v;

    memcpy(&v, p, 4);
    return v;
}

static unsigned store_env(const struct icpu *c, unsigned size, u8 *p)
{
    const struct fp *f = icpu_fp(c);
    const struct fp_legacy *l = &f->x87;
    u64 fip = l->fip, fdp = l->fdp;

    if (real_format(c)) {                                          /* 20- or 32-bit linear addresses */
        fip = (u32)(fip + ((u32)f->fcs << 4));
        fdp = (u32)(fdp + ((u32)f->fds << 4));
    }
    if (size == 2) {
        const u16 w[] = {l->fcw, l->fsw, full_tags(l), (u16)fip, f->fcs, (u16)fdp, f->fds};

        memcpy(p, w, sizeof w);
        if (real_format(c)) {
            put16(p + 8, (fip >> 4 & 0xf000) | l->fop);
            put16(p + 12, fdp >> 4 & 0xf000);
        }
        return sizeof w;
    }
    put32(p, 0xffff0000 | l->fcw);
    put32(p + 4, 0xffff0000 | l->fsw);
    put32(p + 8, 0xffff0000 | full_tags(l));
    if (real_format(c)) {
        put32(p + 12, 0xffff0000 | (u16)fip);
        put32(p + 16, (fip >> 4 & 0xffff000) | l->fop);
        put32(p + 20, 0xffff0000 | (u16)fdp);
        put32(p + 24, fdp >> 4 & 0xffff000);
    } else {
        put32(p + 12, fip);
        put32(p + 16, (u32)l->fop << 16 | f->fcs);
        put32(p + 20, fdp);
        put32(p + 24, 0xffff0000 | f->fds);
    }
    return 28;
}

static void load_env(struct icpu *c, unsigned size, const u8 *p)
{
    struct fp *f = icpu_fp(c);
    struct fp_legacy *l = &f->x87;
    unsigned w = size == 2 ? 2 : 4;
    u16 fsw = get16(p + w);

    load_fcw(l, get16(p));
    set_top(l, FSW_TOP(fsw));
    l->fsw = fsw;
    l->ftw = abridged_tags(get16(p + 2 * w));
    f->fcs = f->fds = 0;
    if (size == 2) {
        l->fip = get16(p + 6);
        l->fdp = get16(p + 10);
        if (real_format(c)) {
            l->fop = get16(p + 8) & 0x7ff;
            l->fip |= (get16(p + 8) & 0xf000u) << 4;
            l->fdp |= (get16(p + 12) & 0xf000u) << 4;
        } else {
            l->fop = 0;
            f->fcs = get16(p + 8);
            f->fds = get16(p + 12);
        }
    } else if (real_format(c)) {
        l->fop = get16(p + 16) & 0x7ff;
        l->fip = get16(p + 12) | (get32(p + 16) & 0xffff000) << 4;
        l->fdp = get16(p + 20) | (get32(p + 24) & 0xffff000) << 4;
    } else {
        l->fip = get32(p + 12);
        l->fop = get16(p + 18) & 0x7ff;
        f->fcs = get16(p + 16);
        l->fdp = get32(p + 20);
        f->fds = get16(p + 24);
    }
    fp_x87_summary(l);
}

#define ENV_MAX (28 + 80)

static unsigned env_bytes(const struct op *op)
{
    return op->size == 2 ? 14 : 28;
}

/* Where an environment or state of n bytes lies. */
static int env_linear(struct icpu *c, const struct op *op, unsigned n, enum mmu_access access, u64 *la)
{
    if (mem_linear(c, op, n, access, la))
        return OP_FAULT;
    return fp_ac_armed(c) && (*la & (op->size - 1u)) ? fault_raise_error(c, VEC_AC, 0) : 0;
}

static int op_nstenv(struct icpu *c, const struct op *op)
{
    struct fp_legacy *l = &icpu_fp(c)->x87;
    u8 buf[ENV_MAX];
    u64 la;

    if (deny_control(c) || env_linear(c, op, env_bytes(op), MMU_WRITE, &la))
        return OP_FAULT;
    if (lin_store_bytes(c, la, buf, store_env(c, op->size, buf)))
        return OP_FAULT;
    l->fcw |= FSW_EXCEPTIONS;
    fp_x87_summary(l);
    return OP_NEXT;
}

static int op_ldenv(struct icpu *c, const struct op *op)
{
    u8 buf[ENV_MAX];
    u64 la;

    if (fp_deny(c, FP_X87) || env_linear(c, op, env_bytes(op), MMU_READ, &la) || lin_load_bytes(c, la, buf, env_bytes(op)))
        return OP_FAULT;
    load_env(c, op->size, buf);
    return OP_NEXT;
}

static int op_nsave(struct icpu *c, const struct op *op)
{
    struct fp *f = icpu_fp(c);
    unsigned n = env_bytes(op);
    u8 buf[ENV_MAX];
    u64 la;

    if (deny_control(c) || env_linear(c, op, n + 80, MMU_WRITE, &la))
        return OP_FAULT;
    store_env(c, op->size, buf);
    for (unsigned r = 0; r < 8; r++)
        memcpy(buf + n + 10 * r, &f->x87.st[r], 10);
    if (lin_store_bytes(c, la, buf, n + 80))
        return OP_FAULT;
    fp_x87_init(f);
    return OP_NEXT;
}

static int op_rstor(struct icpu *c, const struct op *op)
{
    struct fp *f = icpu_fp(c);
    unsigned n = env_bytes(op);
    u8 buf[ENV_MAX];
    u64 la;

    if (fp_deny(c, FP_X87) || env_linear(c, op, n + 80, MMU_READ, &la) || lin_load_bytes(c, la, buf, n + 80))
        return OP_FAULT;
    load_env(c, op->size, buf);
    for (unsigned r = 0; r < 8; r++)
        memcpy(&f->x87.st[r], buf + n + 10 * r, 10);
    return OP_NEXT;
}

int fp_bind_x87_control(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn fn[] = {
        [X87_NINIT] = op_ninit, [X87_NCLEX] = op_nclex, [X87_NSTCW] = op_nstcw, [X87_LDCW] = op_ldcw, [X87_NSTSW] = op_nstsw,
        [X87_NSTENV] = op_nstenv, [X87_LDENV] = op_ldenv, [X87_NSAVE] = op_nsave, [X87_RSTOR] = op_rstor, [X87_WAIT] = op_wait,
        [X87_NONE] = op_none, [X87_EMMS] = op_emms,
    };

    if (!icpu_fp(c)->isa[d->insn.meta.isa_set] || (d->insn.attributes & ZYDIS_ATTRIB_HAS_LOCK))
        return BIND_UD;
    op->fn = fn[arg];
    op->flags |= OPF_FP;
    op->size = d->insn.operand_width == 16 ? 2 : 4;                /* of the environment; 64-bit mode has the 32-bit format */
    return BIND_OK;
}
