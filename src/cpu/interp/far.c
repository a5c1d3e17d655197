/*
 * Far JMP, CALL and RET in all modes: direct, through call gates, to task gates and TSSs (SDM vol. 2 JMP, CALL, RET;
 * vol. 3A 5.8).
 *
 * The order of checks is that of the manual's pseudo-code. Frames are written before CS, SS and RSP change, so a fault
 * leaves only bytes below the stack pointer behind. A 64-bit operand size of memory operands is as on Intel, also where
 * the guest is told that it runs on AMD (which ignores REX.W there).
 */
#include "cpu/interp/sys.h"

static u64 cut(u64 v, unsigned size)
{
    return size == 8 ? v : v & (BIT(size * 8) - 1);
}

/* Loads CS:RIP at the current privilege: the end of every transfer that keeps it. */
static int enter_code(struct icpu *c, struct desc *d, const struct x86_seg *cs, u64 rip)
{
    if (desc_set_accessed(c, d))
        return OP_FAULT;
    c->x->seg[SEG_CS] = *cs;
    c->x->seg[SEG_CS].attr |= TYPE_ACCESSED;
    c->rip = rip;
    icpu_mode(c);
    return OP_JUMP;
}

/* ---- real and virtual-8086 mode ---- */

static int far_real(struct icpu *c, const struct op *op, u16 sel, u64 off, bool call)
{
    struct stack s;
    if (off > c->x->seg[SEG_CS].limit)
        return fault_gp(c, 0);
    if (call) {
        stack_current(c, &s);
        if (stack_room(c, &s, op->size * 2) || stack_put(c, &s, op->size, c->x->seg[SEG_CS].sel) ||
            stack_put(c, &s, op->size, next_rip(c, op)))
            return OP_FAULT;
        stack_commit(c, &s);
    }
    seg_load_real(c, SEG_CS, sel);
    c->rip = off;
    icpu_mode(c);
    return OP_JUMP;
}

/* ---- direct, protected ---- */

static int far_direct(struct icpu *c, const struct op *op, struct desc *d, u16 sel, u64 off, bool call)
{
    struct x86_seg cs;
    struct stack s;
    if (code_check(c, d, sel))
        return OP_FAULT;
    desc_to_seg(d, (u16)((sel & ~3) | c->cpl), &cs);
    if (call) {
        stack_current(c, &s);
        if (stack_room(c, &s, op->size * 2))
            return OP_FAULT;
    }
    if (!code_rip_ok(c, &cs, off))
        return fault_gp(c, 0);
    if (call && (stack_put(c, &s, op->size, c->x->seg[SEG_CS].sel) || stack_put(c, &s, op->size, next_rip(c, op))))
        return OP_FAULT;
    int r = enter_code(c, d, &cs, off);
    if (call && r == OP_JUMP)
        stack_commit(c, &s);
    return r;
}

/* ---- call gates ---- */

struct gate {
    unsigned size;         /* of what is pushed: 2, 4, 8 */
    unsigned params;
    u64 rip;
    struct desc code;
    struct x86_seg cs;
    unsigned cpl;          /* of the code that it leads to */
};

/* Checks the gate and reads what it leads to; *g is complete except for privilege. */
static int gate_read(struct icpu *c, struct desc *d, u16 sel, bool call, struct gate *g)
{
    bool lma = in_long_mode(c);
    if (lma && desc_read_hi(c, VEC_GP, 0, d))
        return OP_FAULT;
    if (desc_dpl(d) < c->cpl || (sel & 3u) > desc_dpl(d))
        return segment_fault(c, VEC_GP, sel, 0);
    if (!desc_p(d))
        return segment_fault(c, VEC_NP, sel, 0);
    bool narrow = desc_type(d) == DESC_CALL16;
    g->size = lma ? 8 : narrow ? 2 : 4;
    g->params = lma ? 0 : d->lo >> 32 & 31;
    g->rip = cut(gate_offset(d), g->size);
    u16 code_sel = gate_sel(d);
    if (sel_null(code_sel))
        return fault_gp(c, 0);
    if (desc_read(c, code_sel, VEC_GP, 0, &g->code))
        return OP_FAULT;
    bool inner = call && !desc_is_conforming(&g->code) && desc_dpl(&g->code) < c->cpl;
    bool allowed = desc_is_conforming(&g->code) || call ? desc_dpl(&g->code) <= c->cpl : desc_dpl(&g->code) == c->cpl;
    bool long_code = (desc_attr(&g->code) & (SEG_L | SEG_DB)) == SEG_L;
    if (!desc_is_code(&g->code) || !allowed || (lma && !long_code))
        return segment_fault(c, VEC_GP, code_sel, 0);
    if (!desc_p(&g->code))
        return segment_fault(c, VEC_NP, code_sel, 0);
    g->cpl = inner ? desc_dpl(&g->code) : c->cpl;
    desc_to_seg(&g->code, (u16)((code_sel & ~3) | g->cpl), &g->cs);
    return 0;
}

static int gate_same_privilege(struct icpu *c, const struct op *op, struct gate *g)
{
    struct stack s;
    stack_current(c, &s);
    if (g->size == 8) {                    /* also from compatibility mode: the frame is pushed as 64-bit code would */
        s.flat = true;
        s.mask = ~0ull;
    }
    if (stack_room(c, &s, g->size * 2))
        return OP_FAULT;
    if (!code_rip_ok(c, &g->cs, g->rip))
        return fault_gp(c, 0);
    if (stack_put(c, &s, g->size, c->x->seg[SEG_CS].sel) || stack_put(c, &s, g->size, next_rip(c, op)))
        return OP_FAULT;
    int r = enter_code(c, &g->code, &g->cs, g->rip);
    if (r == OP_JUMP)
        stack_commit(c, &s);
    return r;
}

static int gate_new_stack(struct icpu *c, const struct gate *g, struct stack *s)
{
    struct x86_seg ss;
    u64 rsp;
    u16 sel = 0;
    if (g->size == 8) {
        if (tss_stack64(c, g->cpl, 0, 0, &rsp))
            return OP_FAULT;
        if (!is_canonical(rsp))
            return fault_raise_error(c, VEC_SS, 0);
        seg_null_ss(&ss, g->cpl);
    } else if (tss_stack(c, g->cpl, 0, &sel, &rsp) || stack_seg_read(c, sel, g->cpl, VEC_TS, 0, &ss)) {
        return OP_FAULT;
    }
    stack_init(c, s, &ss, rsp, g->cpl, g->size == 8, sel & ~3u);
    return 0;
}

static int gate_copy_params(struct icpu *c, const struct gate *g, struct stack *s)
{
    u64 param[31];
    struct stack old;
    stack_current(c, &old);
    for (unsigned i = 0; i < g->params; i++)
        if (stack_get(c, &old, g->size, &param[i]))
            return OP_FAULT;
    for (unsigned i = g->params; i-- > 0;)
        if (stack_put(c, s, g->size, param[i]))
            return OP_FAULT;
    return 0;
}

static int gate_more_privilege(struct icpu *c, const struct op *op, struct gate *g)
{
    struct stack s;
    if (gate_new_stack(c, g, &s) || stack_room(c, &s, g->size * (4 + g->params)))
        return OP_FAULT;
    if (!code_rip_ok(c, &g->cs, g->rip))
        return fault_gp(c, 0);
    if (stack_put(c, &s, g->size, c->x->seg[SEG_SS].sel) || stack_put(c, &s, g->size, c->r[RSP]))
        return OP_FAULT;
    if (gate_copy_params(c, g, &s) || stack_put(c, &s, g->size, c->x->seg[SEG_CS].sel) ||
        stack_put(c, &s, g->size, next_rip(c, op)))
        return OP_FAULT;
    if (desc_set_accessed(c, &g->code))
        return OP_FAULT;
    c->x->seg[SEG_SS] = s.ss;
    stack_commit(c, &s);
    return enter_code(c, &g->code, &g->cs, g->rip);
}

static int far_gate(struct icpu *c, const struct op *op, struct desc *d, u16 sel, bool call)
{
    struct gate g;
    if (gate_read(c, d, sel, call, &g))
        return OP_FAULT;
    if (call)
        return g.cpl < c->cpl ? gate_more_privilege(c, op, &g) : gate_same_privilege(c, op, &g);
    if (!code_rip_ok(c, &g.cs, g.rip))
        return fault_gp(c, 0);
    return enter_code(c, &g.code, &g.cs, g.rip);
}

/* ---- tasks ---- */

int task_gate(struct icpu *c, u16 tss_sel, int source, bool has_error, u32 error, u32 ext)
{
    struct desc d;
    if (tss_sel & 4)
        return segment_fault(c, VEC_GP, tss_sel, ext);
    if (desc_read(c, tss_sel, VEC_GP, ext, &d))
        return OP_FAULT;
    if (desc_s(&d) || (desc_type(&d) != DESC_TSS && desc_type(&d) != DESC_TSS16))
        return segment_fault(c, VEC_GP, tss_sel, ext);
    if (!desc_p(&d))
        return segment_fault(c, VEC_NP, tss_sel, ext);
    return task_switch(c, tss_sel, source, has_error, error, ext);
}

static int far_task(struct icpu *c, const struct op *op, struct desc *d, u16 sel, bool call)
{
    bool gate = desc_type(d) == DESC_TASK;
    if (desc_dpl(d) < c->cpl || (sel & 3u) > desc_dpl(d))
        return segment_fault(c, VEC_GP, sel, 0);
    if (gate && !desc_p(d))
        return segment_fault(c, VEC_NP, sel, 0);
    c->rip = next_rip(c, op);
    int r = task_gate(c, gate ? gate_sel(d) : sel, call ? TASK_CALL : TASK_JMP, false, 0, 0);
    if (r == OP_FAULT)
        c->rip = op_rip(c, op);
    return r == OP_TRAP ? deliver_fault(c) : r;
}

static int far_protected(struct icpu *c, const struct op *op, u16 sel, u64 off, bool call)
{
    struct desc d;
    if (sel_null(sel))
        return fault_gp(c, 0);
    if (desc_read(c, sel, VEC_GP, 0, &d))
        return OP_FAULT;
    if (desc_is_code(&d))
        return far_direct(c, op, &d, sel, off, call);
    if (!desc_s(&d)) {
        bool lma = in_long_mode(c);
        switch (desc_type(&d)) {
        case DESC_CALL:
            return far_gate(c, op, &d, sel, call);
        case DESC_CALL16:
            if (!lma)
                return far_gate(c, op, &d, sel, call);
            break;
        case DESC_TASK: case DESC_TSS: case DESC_TSS16:
            if (!lma)
                return far_task(c, op, &d, sel, call);
            break;
        }
    }
    return segment_fault(c, VEC_GP, sel, 0);
}

static int far_go(struct icpu *c, const struct op *op, u16 sel, u64 off, bool call)
{
    if (in_real(c) || in_v86(c))
        return far_real(c, op, sel, off, call);
    return far_protected(c, op, sel, off, call);
}

static int op_far_ptr(struct icpu *c, const struct op *op)
{
    return far_go(c, op, (u16)op->aux, op->imm, op->reg);
}

static int op_far_mem(struct icpu *c, const struct op *op)
{
    u64 la, off, sel;
    if (mem_linear(c, op, op->size + 2u, MMU_READ, &la) || lin_load(c, la, op->size, &off))
        return OP_FAULT;
    if (lin_load(c, in_64bit(c) ? la + op->size : (u32)(la + op->size), 2, &sel))
        return OP_FAULT;
    return far_go(c, op, (u16)sel, off, op->reg);
}

/* ---- RET ---- */

static int ret_real(struct icpu *c, const struct op *op)
{
    struct stack s;
    u64 rip, sel;
    stack_current(c, &s);
    if (stack_get(c, &s, op->size, &rip) || stack_get(c, &s, op->size, &sel))
        return OP_FAULT;
    if (rip > c->x->seg[SEG_CS].limit)
        return fault_gp(c, 0);
    stack_skip(&s, (s64)op->imm);
    stack_commit(c, &s);
    seg_load_real(c, SEG_CS, (u16)sel);
    c->rip = rip;
    icpu_mode(c);
    return OP_JUMP;
}

int return_code_check(struct icpu *c, u16 sel, struct desc *d)
{
    unsigned rpl = sel & 3;
    if (sel_null(sel))
        return fault_gp(c, 0);
    if (desc_read(c, sel, VEC_GP, 0, d))
        return OP_FAULT;
    bool match = desc_is_conforming(d) ? desc_dpl(d) <= rpl : desc_dpl(d) == rpl;
    if (!desc_is_code(d) || rpl < c->cpl || !match || !code_bits_ok(c, d))
        return segment_fault(c, VEC_GP, sel, 0);
    return desc_p(d) ? 0 : segment_fault(c, VEC_NP, sel, 0);
}

int return_stack_check(struct icpu *c, u16 sel, unsigned cpl, const struct x86_seg *cs, struct x86_seg *ss)
{
    bool to_64bit = in_long_mode(c) && cs->attr & SEG_L;
    if (sel_null(sel) && to_64bit && cpl < 3 && (sel & 3u) == cpl) {
        seg_null_ss(ss, cpl);
        return 0;
    }
    return stack_seg_read(c, sel, cpl, VEC_GP, 0, ss);
}

void return_commit(struct icpu *c, const struct x86_seg *cs, const struct x86_seg *ss, u64 rip, u64 rsp)
{
    unsigned old = c->cpl, cpl = cs->sel & 3;
    c->x->seg[SEG_CS] = *cs;
    c->x->seg[SEG_CS].attr |= TYPE_ACCESSED;
    c->x->seg[SEG_SS] = *ss;
    c->rip = rip;
    icpu_mode(c);
    if (c->stack_size == 2)
        c->r[RSP] = (c->r[RSP] & ~0xffffull) | (u16)rsp;
    else
        c->r[RSP] = c->stack_size == 4 ? (u32)rsp : rsp;
    if (cpl > old)
        seg_drop_inner(c, cpl);
}

static int ret_outer(struct icpu *c, const struct op *op, struct stack *s, struct desc *d, const struct x86_seg *cs,
                     u64 rip)
{
    struct x86_seg ss;
    u64 rsp, sel;
    stack_skip(s, (s64)op->imm);
    if (stack_get(c, s, op->size, &rsp) || stack_get(c, s, op->size, &sel))
        return OP_FAULT;
    if (return_stack_check(c, (u16)sel, cs->sel & 3, cs, &ss))
        return OP_FAULT;
    if (!code_rip_ok(c, cs, rip))
        return fault_gp(c, 0);
    if (desc_set_accessed(c, d))
        return OP_FAULT;
    return_commit(c, cs, &ss, rip, rsp);
    stack_move(c, (s64)op->imm);
    return OP_JUMP;
}

static int op_far_ret(struct icpu *c, const struct op *op)
{
    struct stack s;
    struct desc d;
    struct x86_seg cs;
    u64 rip, sel;
    if (in_real(c) || in_v86(c))
        return ret_real(c, op);
    stack_current(c, &s);
    if (stack_get(c, &s, op->size, &rip) || stack_get(c, &s, op->size, &sel) || return_code_check(c, (u16)sel, &d))
        return OP_FAULT;
    desc_to_seg(&d, (u16)sel, &cs);
    if ((sel & 3) > c->cpl)
        return ret_outer(c, op, &s, &d, &cs, rip);
    if (!code_rip_ok(c, &cs, rip))
        return fault_gp(c, 0);
    int r = enter_code(c, &d, &cs, rip);
    if (r == OP_JUMP) {
        stack_skip(&s, (s64)op->imm);
        stack_commit(c, &s);
    }
    return r;
}

/* op->reg says CALL, op->aux holds the selector of a direct form. */
int bind_far(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op->size = (u8)insn_size(d);
    if (d->insn.mnemonic == ZYDIS_MNEMONIC_RET) {
        op->imm = d->opnd[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (u16)d->opnd[0].imm.value.u : 0;
        op->fn = op_far_ret;
        return BIND_LAST;
    }
    op->reg = d->insn.mnemonic == ZYDIS_MNEMONIC_CALL;
    if (is_mem(d, 0)) {
        op->fn = op_far_mem;
    } else {
        op->imm = cut(d->opnd[0].ptr.offset, op->size);
        op->aux = d->opnd[0].ptr.segment;
        op->fn = op_far_ptr;
    }
    return BIND_LAST;
}
