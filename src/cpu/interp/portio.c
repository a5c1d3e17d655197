/*
 * IN, OUT, INS, OUTS and the I/O permission bitmap (SDM vol. 1 19.5; vol. 2).
 *
 * An access to a port has effects that cannot be taken back, so everything that can fault is tried first: the
 * permission, then the memory operand's rights. A repeated instruction stops between iterations when an event is
 * pending, with the registers showing the progress.
 */
#include "cpu/bt/codepage.h"
#include "cpu/interp/sys.h"

#define TSS_IOPB 0x66

int port_allowed(struct icpu *c, u16 port, unsigned size)
{
    const struct x86_seg *tr = &c->x->tr;
    u64 base, bits;
    bool free = in_real(c) || (!in_v86(c) && c->cpl <= cpu_iopl(c));
    if (free)
        return 0;
    bool wide = SEG_TYPE(tr->attr) & 8;    /* a 16-bit TSS has no bitmap */
    if (!wide || !(tr->attr & SEG_P) || !range_in(TSS_IOPB, 2, (u64)tr->limit + 1))
        return fault_gp(c, 0);
    u64 mask = in_long_mode(c) ? ~0ull : 0xffffffff;
    if (sys_load(c, (tr->base + TSS_IOPB) & mask, 2, &base))
        return OP_FAULT;
    u64 off = base + port / 8;             /* two bytes are always read: the access may straddle */
    if (!range_in(off, 2, (u64)tr->limit + 1))
        return fault_gp(c, 0);
    if (sys_load(c, (tr->base + off) & mask, 2, &bits))
        return OP_FAULT;
    unsigned want = (1u << size) - 1;
    return bits >> (port & 7) & want ? fault_gp(c, 0) : 0;
}

static void port_access(struct icpu *c, u16 port, unsigned size, bool write, u64 *val)
{
    debug_port(c, port, size);
    codepage_leave(c);
    vcpu_pio(c->v, port, size, write, val);
    codepage_enter(c);
}

/* ---- IN, OUT ---- */

#define PORT_DX 0x10000u                   /* op->aux: the port is in DX; else its number */

static u16 port_of(const struct icpu *c, const struct op *op)
{
    return (u16)(op->aux & PORT_DX ? c->r[RDX] : op->aux);
}

static int op_in(struct icpu *c, const struct op *op)
{
    u16 port = port_of(c, op);
    u64 val = 0;
    if (port_allowed(c, port, op->size))
        return OP_FAULT;
    port_access(c, port, op->size, false, &val);
    if (op->size == 1)
        c->r[RAX] = (c->r[RAX] & ~0xffull) | (u8)val;
    else
        gpr_write(c, RAX, op->size, val);
    return OP_END;
}

static int op_out(struct icpu *c, const struct op *op)
{
    u16 port = port_of(c, op);
    u64 val = op->size == 1 ? (u8)c->r[RAX] : op->size == 2 ? (u16)c->r[RAX] : (u32)c->r[RAX];
    if (port_allowed(c, port, op->size))
        return OP_FAULT;
    port_access(c, port, op->size, true, &val);
    return OP_END;
}

static void take_port(const struct decoded *d, struct op *op, unsigned port)
{
    const ZydisDecodedOperand *data = &d->opnd[1 - port];
    op->size = (u8)(data->size / 8);
    op->aux = d->opnd[port].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (u8)d->opnd[port].imm.value.u : PORT_DX;
}

int bind_in(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    take_port(d, op, 1);
    op->fn = op_in;
    return BIND_OK;
}

int bind_out(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    take_port(d, op, 0);
    op->fn = op_out;
    return BIND_OK;
}

/* ---- INS, OUTS ---- */

static u64 address_mask(const struct op *op)
{
    return op->asize == 8 ? ~0ull : op->asize == 4 ? 0xffffffff : 0xffff;
}

static void step_index(struct icpu *c, const struct op *op, unsigned reg)
{
    u64 delta = c->flags & FLAG_DF ? -(u64)op->size : op->size;
    gpr_write(c, reg, op->asize, c->r[reg] + delta);
}

static int one_ins(struct icpu *c, const struct op *op, u16 port)
{
    u64 la, val = 0;
    if (seg_linear(c, SEG_ES, c->r[RDI] & address_mask(op), op->size, MMU_WRITE, &la) ||
        lin_probe(c, la, op->size, MMU_WRITE))
        return OP_FAULT;
    port_access(c, port, op->size, false, &val);
    if (lin_store(c, la, op->size, val))
        return OP_FAULT;
    step_index(c, op, RDI);
    return 0;
}

static int one_outs(struct icpu *c, const struct op *op, u16 port)
{
    u64 la, val;
    if (seg_linear(c, op->seg, c->r[RSI] & address_mask(op), op->size, MMU_READ, &la) ||
        lin_load(c, la, op->size, &val))
        return OP_FAULT;
    port_access(c, port, op->size, true, &val);
    step_index(c, op, RSI);
    return 0;
}

static int string_io(struct icpu *c, const struct op *op, int (*one)(struct icpu *, const struct op *, u16))
{
    u16 port = (u16)c->r[RDX];
    u64 mask = address_mask(op);
    bool rep = op->flags & (OPF_REP | OPF_REPNE);
    bool nothing = rep && !(c->r[RCX] & mask);
    if (nothing && !guest_is_amd(c))
        return OP_NEXT;
    if (port_allowed(c, port, op->size))                           /* AMD looks also where there is nothing to do */
        return OP_FAULT;
    if (nothing)
        return OP_NEXT;
    for (;;) {
        if (one(c, op, port))
            return OP_FAULT;
        if (!rep)
            return OP_END;
        gpr_write(c, RCX, op->asize, c->r[RCX] - 1);
        if (!(c->r[RCX] & mask))
            return OP_END;
        if (c->step || c->db_pending || atomic_load_explicit(&c->v->events, memory_order_relaxed))
            return OP_RESTART;
    }
}

static int op_ins(struct icpu *c, const struct op *op)
{
    return string_io(c, op, one_ins);
}

static int op_outs(struct icpu *c, const struct op *op)
{
    return string_io(c, op, one_outs);
}

int bind_ins(struct icpu *c, const struct decoded *d, struct op *op, unsigned size)
{
    (void)c;
    op->size = (u8)size;
    op->asize = d->insn.address_width / 8;
    op->fn = op_ins;
    return BIND_OK;
}

int bind_outs(struct icpu *c, const struct decoded *d, struct op *op, unsigned size)
{
    (void)c;
    op->size = (u8)size;
    op->asize = d->insn.address_width / 8;
    op->seg = SEG_DS;
    for (unsigned i = 0; i < d->insn.operand_count; i++)
        if (is_mem(d, i))
            op->seg = (u8)ZydisRegisterGetId(d->opnd[i].mem.segment);
    op->fn = op_outs;
    return BIND_OK;
}
