/*
 * Near branches: Jcc, JMP, CALL, RET, LOOPcc, JrCXZ (SDM vol. 2). In 64-bit mode operands are 64 bits wide whatever the prefixes say, as Intel has it.
 *
 * A target that is not canonical, or beyond CS's limit, is a #GP(0) of the branch itself: nothing has been pushed or popped then. A
 * conditional branch does not end its block: not taken, the next op follows.
 */
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"

/* op->disp of relative branches: from the block's start to the target. */
static void bind_target(struct op *op)
{
    op->disp = (s64)op->imm + op->off + op->len;
}

static int jump64(struct icpu *c, u64 target)
{
    if (unlikely(!tlb_canonical(target)))
        return fault_gp(c, 0);
    c->rip = target;
    return OP_NEAR;
}

static u64 cut_target(const struct op *op, u64 target)             /* to the operand size, outside 64-bit mode */
{
    return op->size == 2 ? (u16)target : (u32)target;
}

static int jump32(struct icpu *c, const struct op *op, u64 target)
{
    target = cut_target(op, target);
    if (unlikely(target > c->rip_limit))
        return fault_gp(c, 0);
    c->rip = target;
    return OP_NEAR;
}

#define JCC(cc)                                                                                       \
    static int jcc64_##cc(struct icpu *c, const struct op *op)                                        \
    {                                                                                                 \
        if (CC_##cc(c->fl))                                                                           \
            return jump64(c, c->r[REG_RIP] + (u64)op->disp);                                          \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int jcc32_##cc(struct icpu *c, const struct op *op)                                        \
    {                                                                                                 \
        if (CC_##cc(c->fl))                                                                           \
            return jump32(c, op, c->r[REG_RIP] + (u64)op->disp);                                      \
        return OP_NEXT;                                                                               \
    }
FOR_CONDITIONS(JCC)

int bind_jcc(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
#define JCC_ROW(cc) [cc] = { jcc32_##cc, jcc64_##cc },
    static const op_fn table[16][2] = { FOR_CONDITIONS(JCC_ROW) };
    (void)c;
    bind_target(op);
    op->fn = table[arg][d->mode == IMODE_LONG64];
    return BIND_OK;
}

/* ---- JMP ---- */
static int jmp64_rel(struct icpu *c, const struct op *op)
{
    return jump64(c, c->r[REG_RIP] + (u64)op->disp);
}

static int jmp32_rel(struct icpu *c, const struct op *op)
{
    return jump32(c, op, c->r[REG_RIP] + (u64)op->disp);
}

static int jmp64_reg(struct icpu *c, const struct op *op)
{
    return jump64(c, c->r[op->rm]);
}

BODY jmp64_mem_body(struct icpu *c, const struct op *op, bool slow)
{
    u64 target;
    int r = op_load_u64(c, op, &target, slow);
    return unlikely(r) ? r : jump64(c, target);
}
MEM_HANDLER(jmp64_mem)

static int target32(struct icpu *c, const struct op *op, u64 *target) /* of an indirect branch */
{
    *target = c->r[op->rm];
    return op->flags & OPF_MEM ? mem_load(c, op, op->size, target) : 0;
}

static int jmp32_indirect(struct icpu *c, const struct op *op)
{
    u64 target;
    return target32(c, op, &target) ? OP_FAULT : jump32(c, op, target);
}

/* relative, register, memory */
static unsigned branch_kind(const struct decoded *d, struct op *op)
{
    if (d->opnd[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        bind_target(op);
        return 0;
    }
    return d->opnd[0].type == ZYDIS_OPERAND_TYPE_REGISTER ? 1 : 2;
}

int bind_jmp(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn table[2][3] = { { jmp32_rel, jmp32_indirect, jmp32_indirect }, { jmp64_rel, jmp64_reg, jmp64_mem } };
    if (sys_form(d))
        return bind_sys_form(c, d, op, arg);
    op->fn = table[d->mode == IMODE_LONG64][branch_kind(d, op)];
    return BIND_LAST;
}

/* ---- CALL ---- */
/* A target that is not canonical: the faults of the push come first. */
static int call64_refused(struct icpu *c)
{
    u64 la;
    if (seg_linear(c, SEG_SS, c->r[RSP] - 8, 8, MMU_WRITE, &la) || lin_probe(c, la, 8, MMU_WRITE))
        return OP_FAULT;
    return fault_gp(c, 0);
}

BODY call64(struct icpu *c, const struct op *op, u64 target, bool slow)
{
    u64 ret = op_next_rip(c, op), la = c->r[RSP] - 8;
    if (unlikely(!tlb_canonical(target)))
        return call64_refused(c);
    if (slow) {
        if (stack_push(c, 8, ret))
            return OP_FAULT;
    } else {
        u8 *p = tlb_hit(c, la, 8, MMU_WRITE);
        if (unlikely(!p))
            return OP_MISS;
        host_store_u64(p, ret);
        c->r[RSP] = la;
    }
    c->rip = target;
    return OP_NEAR;
}

BODY call64_rel_body(struct icpu *c, const struct op *op, bool slow)
{
    return call64(c, op, c->r[REG_RIP] + (u64)op->disp, slow);
}
MEM_HANDLER(call64_rel)

BODY call64_reg_body(struct icpu *c, const struct op *op, bool slow)
{
    return call64(c, op, c->r[op->rm], slow);
}
MEM_HANDLER(call64_reg)

static int call64_mem(struct icpu *c, const struct op *op)
{
    u64 target;
    return mem_load(c, op, 8, &target) ? OP_FAULT : call64(c, op, target, true);
}

static int call32(struct icpu *c, const struct op *op, u64 target)
{
    target = cut_target(op, target);
    if (target > c->rip_limit)
        return fault_gp(c, 0);
    if (stack_push(c, op->size, next_ip(c, op)))
        return OP_FAULT;
    c->rip = target;
    return OP_NEAR;
}

static int call32_rel(struct icpu *c, const struct op *op)
{
    return call32(c, op, c->r[REG_RIP] + (u64)op->disp);
}

static int call32_indirect(struct icpu *c, const struct op *op)
{
    u64 target;
    return target32(c, op, &target) ? OP_FAULT : call32(c, op, target);
}

int bind_call(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn table[2][3] = { { call32_rel, call32_indirect, call32_indirect }, { call64_rel, call64_reg, call64_mem } };
    if (sys_form(d))
        return bind_sys_form(c, d, op, arg);
    op->fn = table[d->mode == IMODE_LONG64][branch_kind(d, op)];
    return BIND_LAST;
}

/* ---- RET ---- */
BODY ret64_body(struct icpu *c, const struct op *op, bool slow)    /* op->imm: bytes of arguments to drop */
{
    u64 target, rsp = c->r[RSP];
    if (slow) {
        if (stack_peek(c, 0, 8, &target))
            return OP_FAULT;
    } else {
        const u8 *p = tlb_hit(c, rsp, 8, MMU_READ);
        if (unlikely(!p))
            return OP_MISS;
        target = host_load_u64(p);
    }
    if (unlikely(!tlb_canonical(target)))
        return fault_gp(c, 0);
    c->r[RSP] = rsp + 8 + op->imm;
    c->rip = target;
    return OP_NEAR;
}
MEM_HANDLER(ret64)

static int ret32(struct icpu *c, const struct op *op)
{
    u64 target;
    if (stack_peek(c, 0, op->size, &target))
        return OP_FAULT;
    target = cut_target(op, target);
    if (target > c->rip_limit)
        return fault_gp(c, 0);
    stack_move(c, op->size + (s64)op->imm);
    c->rip = target;
    return OP_NEAR;
}

int bind_ret(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    if (sys_form(d))
        return bind_sys_form(c, d, op, arg);
    op->imm &= 0xffff;
    op->fn = d->mode == IMODE_LONG64 ? ret64 : ret32;
    return BIND_LAST;
}

/* ---- LOOP, JCXZ: the counter has the address size ---- */
static int op_loop(struct icpu *c, const struct op *op)
{
    u64 count = get_reg(c, RCX, op->asize);
    bool taken, zf = c->fl & FL_ZF;
    switch (op->aux) {
    case ZYDIS_MNEMONIC_LOOP: taken = --count; break;
    case ZYDIS_MNEMONIC_LOOPE: taken = --count && zf; break;
    case ZYDIS_MNEMONIC_LOOPNE: taken = --count && !zf; break;
    default: taken = !count; break;
    }
    u64 target = c->r[REG_RIP] + (u64)op->disp;
    int r = !taken ? OP_NEXT : c->mode == IMODE_LONG64 ? jump64(c, target) : jump32(c, op, target);
    if (r != OP_FAULT && (op->aux == ZYDIS_MNEMONIC_LOOP || op->aux == ZYDIS_MNEMONIC_LOOPE || op->aux == ZYDIS_MNEMONIC_LOOPNE))
        set_reg(c, RCX, op->asize, count);
    return r;
}

/* REP prefixes before LOOPE and LOOPNE decide what ZF has to be (undocumented; processors do it). */
static unsigned loop_kind(const struct decoded *d, unsigned kind)
{
    if (kind != ZYDIS_MNEMONIC_LOOPE && kind != ZYDIS_MNEMONIC_LOOPNE)
        return kind;
    for (unsigned i = 0; i < d->insn.raw.prefix_count; i++) {
        if (d->insn.raw.prefixes[i].value == 0xf3)
            kind = ZYDIS_MNEMONIC_LOOPE;
        else if (d->insn.raw.prefixes[i].value == 0xf2)
            kind = ZYDIS_MNEMONIC_LOOPNE;
    }
    return kind;
}

int bind_loop(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    bind_target(op);
    op->aux = loop_kind(d, arg);
    op->fn = op_loop;
    return BIND_OK;
}
