/*
 * IRET in all modes (SDM vol. 2 IRET; vol. 3A 6.12.1.2, 6.14.3, 21.2, 21.3).
 *
 * It also ends the blocking of NMIs, whether it completes or faults (SDM vol. 3A 6.7.1).
 */
#include "cpu/interp/access.h"
#include "cpu/interp/sys.h"

#define FLAGS_ALWAYS (FLAGS_ARITH | FLAG_TF | FLAG_DF | FLAG_NT)
#define FLAGS_WIDE (FLAG_RF | FLAG_AC | FLAG_ID)           /* only operand sizes of 32 and 64 bits reach these */

static int iret_real(struct icpu *c, const struct op *op)
{
    struct stack s;
    u64 rip, sel, flags;
    stack_current(c, &s);
    if (stack_get(c, &s, op->size, &rip) || stack_get(c, &s, op->size, &sel) || stack_get(c, &s, op->size, &flags))
        return OP_FAULT;
    if (rip > c->x->seg[SEG_CS].limit)
        return fault_gp(c, 0);
    stack_commit(c, &s);
    seg_load_real(c, SEG_CS, (u16)sel);
    c->rip = rip;
    flags_write(c, flags, FLAGS_ALWAYS | FLAG_IF | FLAG_IOPL | (op->size > 2 ? FLAGS_WIDE : 0));
    icpu_mode(c);
    return OP_JUMP;
}

/* In virtual-8086 mode with IOPL below 3 and without the mode's extensions the monitor must do it. */
static int iret_v86(struct icpu *c, const struct op *op)
{
    struct stack s;
    u64 rip, sel, flags;
    bool full = cpu_iopl(c) == 3;
    if (!full && (op->size != 2 || !(c->x->cr4 & CR4_VME)))
        return fault_gp(c, 0);
    stack_current(c, &s);
    if (stack_get(c, &s, op->size, &rip) || stack_get(c, &s, op->size, &sel) || stack_get(c, &s, op->size, &flags))
        return OP_FAULT;
    if (!full && (flags & FLAG_TF || (flags & FLAG_IF && c->flags & FLAG_VIP)))
        return fault_gp(c, 0);
    if (rip > c->x->seg[SEG_CS].limit)
        return fault_gp(c, 0);
    stack_commit(c, &s);
    seg_load_real(c, SEG_CS, (u16)sel);
    c->rip = rip;
    if (full) {
        flags_write(c, flags, FLAGS_ALWAYS | FLAG_IF | (op->size > 2 ? FLAGS_WIDE : 0));
    } else {
        u64 vif = flags & FLAG_IF ? FLAG_VIF : 0;
        flags_write(c, (flags & ~(u64)FLAG_VIF) | vif, FLAGS_ALWAYS | FLAG_VIF);
    }
    icpu_mode(c);
    return OP_JUMP;
}

/* Which flags a return from protected mode at privilege cpl may change. */
static u64 return_mask(const struct icpu *c, unsigned size)
{
    u64 mask = FLAGS_ALWAYS;
    if (size > 2)
        mask |= FLAGS_WIDE;
    if (c->cpl <= cpu_iopl(c))
        mask |= FLAG_IF;
    if (c->cpl == 0)
        mask |= FLAG_IOPL | (size > 2 ? FLAG_VIF | FLAG_VIP : 0);
    return mask;
}

static int iret_to_v86(struct icpu *c, struct stack *s, u64 rip, u16 cs, u64 flags)
{
    static const u8 order[] = {SEG_SS, SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    u64 rsp, sel[ARRAY_SIZE(order)];
    if (stack_get(c, s, 4, &rsp))
        return OP_FAULT;
    for (unsigned i = 0; i < ARRAY_SIZE(order); i++)
        if (stack_get(c, s, 4, &sel[i]))
            return OP_FAULT;
    if (rip > 0xffff)
        return fault_gp(c, 0);
    flags_write(c, flags, return_mask(c, 4) | FLAG_VM);
    seg_load_real(c, SEG_CS, cs);
    for (unsigned i = 0; i < ARRAY_SIZE(order); i++)
        seg_load_real(c, order[i], (u16)sel[i]);
    c->rip = rip;
    c->r[RSP] = (u32)rsp;
    icpu_mode(c);
    return OP_JUMP;
}

static int iret_nested_task(struct icpu *c, const struct op *op)
{
    u64 link, la = c->x->tr.base;
    if (sys_load(c, la, 2, &link))
        return OP_FAULT;
    c->rip = next_rip(c, op);
    int r = task_switch(c, (u16)link, TASK_IRET, false, 0, 0);
    if (r == OP_FAULT)
        c->rip = op_rip(c, op);
    return r == OP_TRAP ? deliver_fault(c) : r;
}

/* Pops n values. In 64-bit mode they are mostly in one page of plain RAM. */
static int frame_get(struct icpu *c, struct stack *s, unsigned size, u64 *val, unsigned n)
{
    const u8 *p = s->flat && size == 8 ? tlb_hit(c, s->rsp, 8 * n, MMU_READ) : NULL;
    for (unsigned i = 0; i < n; i++) {
        if (likely(p))
            val[i] = host_load_u64(p + 8 * i);
        else if (stack_get(c, s, size, &val[i]))
            return OP_FAULT;
    }
    if (likely(p))
        s->rsp += 8 * n;
    return 0;
}

static int iret_protected(struct icpu *c, const struct op *op)
{
    struct stack s;
    struct desc d;
    struct x86_seg cs, ss = c->x->seg[SEG_SS];
    u64 frame[3], outer_frame[2], rip, sel, flags, rsp;
    stack_current(c, &s);
    if (frame_get(c, &s, op->size, frame, 3))
        return OP_FAULT;
    rip = frame[0];
    sel = frame[1];
    flags = frame[2];
    if (op->size == 4 && flags & FLAG_VM && c->cpl == 0 && !in_long_mode(c))
        return iret_to_v86(c, &s, rip, (u16)sel, flags);
    if (return_code_check(c, (u16)sel, &d))
        return OP_FAULT;
    desc_to_seg(&d, (u16)sel, &cs);
    bool outer = (sel & 3) > c->cpl;
    if (outer || in_64bit(c)) {            /* 64-bit mode always pops SS:RSP */
        if (frame_get(c, &s, op->size, outer_frame, 2) || return_stack_check(c, (u16)outer_frame[1], sel & 3, &cs, &ss))
            return OP_FAULT;
        rsp = outer_frame[0];
    } else {
        rsp = s.rsp;
    }
    if (!code_rip_ok(c, &cs, rip))
        return fault_gp(c, 0);
    if (desc_set_accessed(c, &d))
        return OP_FAULT;
    u64 mask = return_mask(c, op->size);
    return_commit(c, &cs, &ss, rip, rsp);
    flags_write(c, flags, mask);
    return OP_JUMP;
}

static int op_iret(struct icpu *c, const struct op *op)
{
    c->x->nmi_blocked = false;
    if (in_real(c))
        return iret_real(c, op);
    if (in_v86(c))
        return iret_v86(c, op);
    if (c->flags & FLAG_NT)
        return in_long_mode(c) ? fault_gp(c, 0) : iret_nested_task(c, op);
    return iret_protected(c, op);
}

int bind_iret(struct icpu *c, const struct decoded *d, struct op *op, unsigned size)
{
    (void)c;
    (void)d;
    op->size = (u8)size;
    op->fn = op_iret;
    return BIND_LAST;
}
