/*
 * RFLAGS as a whole and the interrupt flag: PUSHF, POPF, CLI, STI, CLAC, STAC, and INT n, INT3, INTO, INT1 (SDM vol. 2;
 * vol. 3A 6.8.1, 21.3, 21.4).
 *
 * With CR4.VME or CR4.PVI, code at CPL 3 below IOPL works on the virtual interrupt flag VIF, and VIP makes enabling it
 * fault.
 */
#include "cpu/interp/sys.h"

void flags_write(struct icpu *c, u64 val, u64 mask)
{
    u64 old = icpu_rflags(c), new = (old & ~mask) | (val & mask);
    icpu_set_rflags(c, new);
    if ((old ^ new) & FLAG_AC)
        tlb_views(c);
}

/* ---- PUSHF, POPF ---- */

static int op_pushf(struct icpu *c, const struct op *op)
{
    u64 image = icpu_rflags(c) & ~(u64)(FLAG_RF | FLAG_VM);
    if (in_v86(c) && cpu_iopl(c) < 3) {
        if (op->size != 2 || !(c->x->cr4 & CR4_VME))
            return fault_gp(c, 0);
        image = (image & ~(u64)FLAG_IF) | FLAG_IOPL | (image & FLAG_VIF ? FLAG_IF : 0);
    }
    return stack_push(c, op->size, image);
}

static int popf_vme(struct icpu *c, const struct op *op)
{
    u64 val;
    if (op->size != 2 || !(c->x->cr4 & CR4_VME))
        return fault_gp(c, 0);
    if (stack_peek(c, 0, 2, &val))
        return OP_FAULT;
    if (val & FLAG_TF || (val & FLAG_IF && c->flags & FLAG_VIP))
        return fault_gp(c, 0);
    stack_move(c, 2);
    val = (val & ~(u64)FLAG_VIF) | (val & FLAG_IF ? FLAG_VIF : 0);
    flags_write(c, val, FLAGS_ARITH | FLAG_TF | FLAG_DF | FLAG_NT | FLAG_VIF | FLAG_RF);
    return OP_END;
}

static int op_popf(struct icpu *c, const struct op *op)
{
    u64 val, mask = FLAGS_ARITH | FLAG_TF | FLAG_DF | FLAG_NT;
    if (in_v86(c) && cpu_iopl(c) < 3)
        return popf_vme(c, op);
    if (stack_pop(c, op->size, &val))
        return OP_FAULT;
    if (op->size > 2)
        mask |= FLAG_AC | FLAG_ID;
    if (c->cpl <= cpu_iopl(c))
        mask |= FLAG_IF;
    if (c->cpl == 0)
        mask |= FLAG_IOPL;
    flags_write(c, val & ~(u64)FLAG_RF, mask | FLAG_RF);
    return OP_END;
}

int bind_pushf(struct icpu *c, const struct decoded *d, struct op *op, unsigned size)
{
    (void)c;
    (void)d;
    op->size = (u8)size;
    op->fn = op_pushf;
    return BIND_OK;
}

int bind_popf(struct icpu *c, const struct decoded *d, struct op *op, unsigned size)
{
    (void)c;
    (void)d;
    op->size = (u8)size;
    op->fn = op_popf;
    return BIND_OK;
}

/* ---- CLI, STI ---- */

/* Which flag CLI and STI work on: IF, VIF, or none (#GP). */
static u32 interrupt_flag(const struct icpu *c)
{
    if (c->cpl <= cpu_iopl(c))
        return FLAG_IF;
    if (in_v86(c))
        return c->x->cr4 & CR4_VME ? FLAG_VIF : 0;
    return c->cpl == 3 && c->x->cr4 & CR4_PVI ? FLAG_VIF : 0;
}

static int op_cli(struct icpu *c, const struct op *op)
{
    (void)op;
    u32 flag = interrupt_flag(c);
    if (!flag)
        return fault_gp(c, 0);
    c->flags &= ~flag;
    return OP_NEXT;
}

static int op_sti(struct icpu *c, const struct op *op)
{
    (void)op;
    u32 flag = interrupt_flag(c);
    if (!flag || (flag == FLAG_VIF && c->flags & FLAG_VIP))
        return fault_gp(c, 0);
    if (flag == FLAG_IF && !(c->flags & FLAG_IF))
        c->x->shadow = true;               /* interrupts wait until after the next instruction */
    c->flags |= flag;
    return OP_END;
}

int bind_cli(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)d;
    (void)arg;
    op->fn = op_cli;
    return BIND_OK;
}

int bind_sti(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)d;
    (void)arg;
    op->fn = op_sti;
    return BIND_OK;
}

static int op_clac(struct icpu *c, const struct op *op)
{
    if (c->cpl > 0)
        return fault_ud(c);
    flags_write(c, op->aux ? FLAG_AC : 0, FLAG_AC);
    return OP_NEXT;
}

int bind_clac(struct icpu *c, const struct decoded *d, struct op *op, unsigned set)
{
    (void)d;
    if (!cpuid_has(c->v->m->cpuid, CPU_SMAP))
        return BIND_UD;
    op->aux = set;
    op->fn = op_clac;
    return BIND_OK;
}

/* ---- software interrupts ---- */

/* The address to save is the next instruction's; a fault on the way is this instruction's. */
static int finish(struct icpu *c, const struct op *op, int r)
{
    if (r == OP_FAULT)
        c->rip = op_rip(c, op);
    return r;
}

static int op_int_n(struct icpu *c, const struct op *op)
{
    c->rip = next_rip(c, op);
    return finish(c, op, deliver_software(c, op->aux));
}

static int op_int3(struct icpu *c, const struct op *op)
{
    c->rip = next_rip(c, op);
    return finish(c, op, deliver_exception_insn(c, VEC_BP, true));
}

static int op_into(struct icpu *c, const struct op *op)
{
    if (!(c->fl & FL_OF))
        return OP_NEXT;
    c->rip = next_rip(c, op);
    return finish(c, op, deliver_exception_insn(c, VEC_OF, true));
}

static int op_int1(struct icpu *c, const struct op *op)
{
    c->rip = next_rip(c, op);
    return finish(c, op, deliver_exception_insn(c, VEC_DB, false));
}

int bind_int(struct icpu *c, const struct decoded *d, struct op *op, unsigned kind)
{
    static const op_fn fn[] = {[INT_N] = op_int_n, [INT_3] = op_int3, [INT_O] = op_into, [INT_1] = op_int1};
    (void)c;
    if (kind == INT_N)
        op->aux = (u8)d->opnd[0].imm.value.u;
    op->fn = fn[kind];
    return kind == INT_O ? BIND_OK : BIND_LAST;
}
