/*
 * PUSH POP PUSHA POPA ENTER LEAVE (SDM vol. 2); segment registers and flags are with the system instructions.
 *
 * The stack pointer's width is c->stack_size, the operand's op->size. RSP changes only when every access has succeeded.
 */
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"

static inline int push64(struct icpu *c, u64 v)
{
    u64 la = c->r[RSP] - 8;
    u8 *p = tlb_hit(c, la, 8, MMU_WRITE);
    if (unlikely(!p))
        return stack_push(c, 8, v);
    host_store_u64(p, v);
    c->r[RSP] = la;
    return OP_NEXT;
}

static int push64_reg(struct icpu *c, const struct op *op)
{
    return push64(c, c->r[op->rm]);
}

static int push64_imm(struct icpu *c, const struct op *op)
{
    return push64(c, op->imm);
}

BODY push64_mem_body(struct icpu *c, const struct op *op, bool slow)
{
    u64 v;
    int r = op_load_u64(c, op, &v, slow);
    return unlikely(r) ? r : push64(c, v);
}
MEM_HANDLER(push64_mem)

static int push_any(struct icpu *c, const struct op *op)
{
    u64 v = op->rm == REG_ZERO ? op->imm : c->r[op->rm];
    if (op->flags & OPF_MEM && mem_load(c, op, op->size, &v))
        return OP_FAULT;
    return stack_push(c, op->size, v);
}

int bind_push(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    if (sys_form(d))
        return bind_sys_form(c, d, op, arg);
    bool mem = d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY, reg = d->opnd[0].type == ZYDIS_OPERAND_TYPE_REGISTER;
    op->size = (u8)(d->insn.operand_width / 8);
    op->rm = reg ? op_gpr(d->opnd[0].reg.value) : REG_ZERO;
    op->fn = op->size != 8 ? push_any : mem ? push64_mem : reg ? push64_reg : push64_imm;
    return BIND_OK;
}

static int pop_reg(struct icpu *c, const struct op *op)
{
    u64 v;
    if (stack_pop(c, op->size, &v))
        return OP_FAULT;
    set_reg(c, op->rm, op->size, v);
    return OP_NEXT;
}

static int pop64_reg(struct icpu *c, const struct op *op)
{
    u64 rsp = c->r[RSP];
    const u8 *p = tlb_hit(c, rsp, 8, MMU_READ);
    if (unlikely(!p))
        return pop_reg(c, op);
    c->r[RSP] = rsp + 8;
    c->r[op->rm] = host_load_u64(p);                               /* POP RSP: the value wins */
    return OP_NEXT;
}

/* The address of the destination is computed with RSP already incremented. */
static int pop_mem(struct icpu *c, const struct op *op)
{
    u64 v, rsp = c->r[RSP];
    if (stack_pop(c, op->size, &v))
        return OP_FAULT;
    int r = mem_store(c, op, op->size, v);
    if (r)
        c->r[RSP] = rsp;
    return r;
}

int bind_pop(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    if (sys_form(d))
        return bind_sys_form(c, d, op, arg);
    bool mem = d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
    op->size = (u8)(d->insn.operand_width / 8);
    if (!mem)
        op->rm = op_gpr(d->opnd[0].reg.value);
    op->fn = mem ? pop_mem : op->size == 8 ? pop64_reg : pop_reg;
    return BIND_OK;
}

/* ---- PUSHA, POPA: all or nothing ---- */
static int op_pusha(struct icpu *c, const struct op *op)
{
    u64 rsp = c->r[RSP];
    for (unsigned i = RAX; i <= RDI; i++)
        if (stack_push(c, op->size, i == RSP ? rsp : c->r[i])) {
            c->r[RSP] = rsp;
            return OP_FAULT;
        }
    return OP_NEXT;
}

static int op_popa(struct icpu *c, const struct op *op)
{
    u64 v[8];
    for (unsigned i = 0; i < 8; i++)
        if (stack_peek(c, i * op->size, op->size, &v[7 - i]))
            return OP_FAULT;
    stack_move(c, 8 * op->size);
    for (unsigned i = RAX; i <= RDI; i++)
        if (i != RSP)
            set_reg(c, i, op->size, v[i]);
    return OP_NEXT;
}

int bind_pusha(struct icpu *c, const struct decoded *d, struct op *op, unsigned size)
{
    (void)c;
    (void)d;
    op->size = (u8)size;
    op->fn = op_pusha;
    return BIND_OK;
}

int bind_popa(struct icpu *c, const struct decoded *d, struct op *op, unsigned size)
{
    (void)c;
    (void)d;
    op->size = (u8)size;
    op->fn = op_popa;
    return BIND_OK;
}

/* ---- LEAVE, ENTER ---- */
static int op_leave(struct icpu *c, const struct op *op)
{
    u64 rsp = c->r[RSP], v;
    set_reg(c, RSP, c->stack_size, c->r[RBP]);
    if (stack_pop(c, op->size, &v)) {
        c->r[RSP] = rsp;
        return OP_FAULT;
    }
    set_reg(c, RBP, op->size, v);
    return OP_NEXT;
}

static int leave64(struct icpu *c, const struct op *op)
{
    u64 rbp = c->r[RBP];
    const u8 *p = tlb_hit(c, rbp, 8, MMU_READ);
    if (unlikely(!p))
        return op_leave(c, op);
    c->r[RBP] = host_load_u64(p);
    c->r[RSP] = rbp + 8;
    return OP_NEXT;
}

int bind_leave(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op->size = (u8)(d->insn.operand_width / 8);
    op->fn = op->size == 8 ? leave64 : op_leave;
    return BIND_OK;
}

/* The frame pointers of the enclosing procedures: level - 1 of them, copied from the frame that RBP points to. */
static int enter_nested(struct icpu *c, const struct op *op, unsigned level, u64 frame)
{
    u64 rbp = c->r[RBP], mask = c->stack_size == 8 ? ~0ull : BIT(8 * c->stack_size) - 1;
    for (unsigned i = 1; i < level; i++) {
        u64 la, v;
        rbp = (rbp - op->size) & mask;
        if (seg_linear(c, SEG_SS, rbp, op->size, MMU_READ, &la) || lin_load(c, la, op->size, &v) || stack_push(c, op->size, v))
            return OP_FAULT;
    }
    return stack_push(c, op->size, frame);
}

static int op_enter(struct icpu *c, const struct op *op)           /* op->imm: bytes of locals; aux: nesting level */
{
    u64 saved = c->r[RSP], la, frame;
    if (stack_push(c, op->size, c->r[RBP]))
        return OP_FAULT;
    frame = c->r[RSP];
    if (op->aux && enter_nested(c, op, op->aux, frame))
        goto undo;
    stack_move(c, -(s64)op->imm);
    /* A write to the new top of the stack must be possible (SDM: #SS, #PF). */
    if (seg_linear(c, SEG_SS, c->r[RSP] & (c->stack_size == 8 ? ~0ull : BIT(8 * c->stack_size) - 1), op->size, MMU_WRITE, &la) ||
        lin_probe(c, la, op->size, MMU_WRITE))
        goto undo;
    set_reg(c, RBP, c->stack_size == 2 && op->size > 2 ? 2 : op->size, frame);
    return OP_NEXT;
undo:
    c->r[RSP] = saved;
    return OP_FAULT;
}

int bind_enter(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op->size = (u8)(d->insn.operand_width / 8);
    op->imm = d->opnd[0].imm.value.u & 0xffff;
    op->aux = d->opnd[1].imm.value.u & 31;
    op->fn = op_enter;
    return BIND_OK;
}
