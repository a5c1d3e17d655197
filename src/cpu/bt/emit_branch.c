/*
 * Branches, calls, returns and the stack instructions.
 *
 * What is pushed is the guest's return address; nothing of the host's ever gets on the guest's stack. An indirect branch jumps through icpu.bt.jump, by some bits of
 * its target, to a translation that looks whether it is the one that is meant (bt.h). A return does so through icpu.bt.ret, where its call has put what is to follow.
 *
 * A target that is not canonical is a #GP of the branch itself (interp/branch.c). Direct ones are looked at when they are translated; an indirect one is found
 * out when no translation is found for it, and RSP is put back then: icpu.bt.site says which branch it was (bt.c). Only the 8 bytes that a call has pushed stay.
 */
#include "cpu/bt/tr.h"
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"

static const struct ea below_rsp = { RSP, REG_ZERO, 0, SEG_SS, -8 }, at_rsp = { RSP, REG_ZERO, 0, SEG_SS, 0 };

/* ---- ways out ---- */
static u32 site(const struct tr *t)
{
    return (u32)(t->tb - t->t->tb) << 8 | t->i;
}

static void exit_by_table(struct tr *t, size_t mask, size_t table)
{
    struct emit *e = &t->e;
    tr_count(t);
    op_gs(e, false, 0xc7, 0, OFF(bt.site));                        /* mov dword [], imm */
    put32(e, site(t));
    tr_reloc(t, e->p - 4, RELOC_SITE);
    tr_mark(t, t->i, MARK_TARGET);
    put_pext_gs(e, S0, S1, mask);
    op_gs_index(e, false, 0xff, 4, S0, table);
}

void tr_exit_indirect(struct tr *t)
{
    exit_by_table(t, OFF(bt.mask_jump), OFF(bt.jump[0][0]) + tr_key(t) * sizeof t->c->bt.jump[0]);
}

static void exit_indirect_plain(struct tr *t)                      /* without PEXT: by C */
{
    struct emit *e = &t->e;
    tr_count(t);
    op_gs(e, false, 0xc7, 0, OFF(bt.site));
    put32(e, site(t));
    tr_reloc(t, e->p - 4, RELOC_SITE);
    tr_mark(t, t->i, MARK_TARGET);
    jump_to(e, t->t->rw + t->t->miss);
    tr_reloc(t, e->p - 4, RELOC_JUMP);
}

static void exit_indirect(struct tr *t)
{
    if (t->t->bmi2)
        tr_exit_indirect(t);
    else
        exit_indirect_plain(t);
}

static void exit_return(struct tr *t)
{
    if (t->t->bmi2)
        exit_by_table(t, OFF(bt.mask_return), OFF(bt.ret[0][0]) + t->tb->key * sizeof t->c->bt.ret[0]);
    else
        exit_indirect_plain(t);
}

/* ---- push and pop: the host's own where the windows are ---- */
static void push_host(struct tr *t, unsigned reg)                  /* host register */
{
    if (reg & 8)
        put8(&t->e, 0x41);
    put8(&t->e, 0x50 | (reg & 7));
}

static void pop_host(struct tr *t, unsigned reg)
{
    if (reg & 8)
        put8(&t->e, 0x41);
    put8(&t->e, 0x58 | (reg & 7));
}

static bool push_value(struct tr *t, bool immediate, s32 imm, unsigned guest)
{
    struct emit *e = &t->e;
    struct place p;
    unsigned s;
    if (t->shadow) {
        if (immediate) {
            put8(e, 0x68);
            put32(e, (u32)imm);
        } else {
            push_host(t, tr_read(t, guest, S0));
        }
        return true;
    }
    if (!tr_mem(t, &below_rsp, 8, MMU_WRITE, TR_SCRATCH, &p, &s))
        return false;
    if (immediate) {
        op_mem(e, true, 0xc7, 0, p.base, p.index, p.scale, p.disp);
        put32(e, (u32)imm);
    } else {
        op_mem(e, true, X_STORE, tr_read(t, guest, s), p.base, p.index, p.scale, p.disp);
    }
    tr_rsp_move(t, -8);
    return true;
}

bool tr_push(struct tr *t, unsigned value)
{
    struct emit *e = &t->e;
    struct place p;
    unsigned s;
    if (t->shadow) {
        push_host(t, value);
        return true;
    }
    op_gs(e, true, X_STORE, value, OFF(bt.tmp[3]));
    if (!tr_mem(t, &below_rsp, 8, MMU_WRITE, TR_SCRATCH, &p, &s))
        return false;
    op_gs(e, true, X_LOAD, s, OFF(bt.tmp[3]));
    op_mem(e, true, X_STORE, s, p.base, p.index, p.scale, p.disp);
    tr_rsp_move(t, -8);
    return true;
}

static bool load_top(struct tr *t, const struct ea *m, unsigned dst)
{
    struct place p;
    unsigned s;
    if (!tr_mem(t, m, 8, MMU_READ, TR_NO_SCRATCH, &p, &s))
        return false;
    op_mem(&t->e, true, X_LOAD, dst, p.base, p.index, p.scale, p.disp);
    return true;
}

static bool emit_push(struct tr *t, const struct op *op)
{
    const ZydisDecodedOperand *o = &tr_item(t)->d.opnd[0];
    if (op->size != 8)
        return false;
    if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
        struct ea m;
        struct place p;
        unsigned s;
        if (!tr_ea(t, op, &m) || !tr_mem(t, &m, 8, MMU_READ, TR_NO_SCRATCH, &p, &s))
            return false;
        op_mem(&t->e, true, X_LOAD, S1, p.base, p.index, p.scale, p.disp);
        return tr_push(t, S1);
    }
    return push_value(t, o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE, (s32)op->imm, o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? 0 : tr_gpr(o));
}

static bool emit_pop(struct tr *t, const struct op *op)
{
    const ZydisDecodedOperand *o = &tr_item(t)->d.opnd[0];
    if (op->size != 8 || o->type != ZYDIS_OPERAND_TYPE_REGISTER)
        return false;
    unsigned g = tr_gpr(o), host = tr_resident(g) ? g : S1;
    if (t->shadow && g != RSP) {
        pop_host(t, host);
    } else {
        if (!load_top(t, &at_rsp, host))
            return false;
        if (g != RSP)
            tr_rsp_move(t, 8);
    }
    if (host == S1)
        tr_write(t, g, S1);
    return true;
}

static bool emit_leave(struct tr *t, const struct op *op)
{
    static const struct ea at_rbp = { RBP, REG_ZERO, 0, SEG_SS, 0 };
    struct emit *e = &t->e;
    struct place p;
    unsigned s;
    if (op->size != 8 || !tr_mem(t, &at_rbp, 8, MMU_READ, TR_SCRATCH, &p, &s))
        return false;
    if (!t->shadow) {
        lea(e, RSP, RBP, 8);
        op_mem(e, true, X_LOAD, RBP, p.base, p.index, p.scale, p.disp);
        return true;
    }
    op_mem(e, true, X_LOAD, s, p.base, p.index, p.scale, p.disp);
    op_gs(e, true, X_STORE, s, OFF(bt.tmp[3]));
    lea(e, S1, RBP, 8);
    tr_rsp_set(t, S1);
    op_gs(e, true, X_LOAD, RBP, OFF(bt.tmp[3]));
    return true;
}

bool tr_stack(struct tr *t, const struct op *op)
{
    switch (tr_item(t)->d.insn.mnemonic) {
    case ZYDIS_MNEMONIC_PUSH: return emit_push(t, op);
    case ZYDIS_MNEMONIC_POP: return emit_pop(t, op);
    case ZYDIS_MNEMONIC_LEAVE: return emit_leave(t, op);
    default: return false;
    }
}

/* ---- runs: the software TLB is asked once for several pushes or pops in a row, and a RET behind the latter ---- */
static bool in_run(const struct tr *t, unsigned i, ZydisMnemonic mnemonic)
{
    const struct decoded *d = &t->item[i].d;
    const ZydisDecodedOperand *o = &d->opnd[0];
    if (t->item[i].kind != t->item[t->i].kind || d->insn.mnemonic != mnemonic || t->b->op[i].size != 8 || t->b->slow & BIT(i) || sys_form(d))
        return false;
    if (mnemonic == ZYDIS_MNEMONIC_PUSH && o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
        return true;
    return o->type == ZYDIS_OPERAND_TYPE_REGISTER && tr_gpr(o) != RSP;
}

unsigned tr_run(const struct tr *t, struct ea *m, enum mmu_access *access)
{
    ZydisMnemonic mnemonic = tr_item(t)->d.insn.mnemonic;
    bool push = mnemonic == ZYDIS_MNEMONIC_PUSH;
    unsigned n = 0;
    if (t->shadow || !t->t->bmi2 || (!push && mnemonic != ZYDIS_MNEMONIC_POP))
        return 0;
    while (t->i + n < t->b->n && in_run(t, t->i + n, mnemonic) && (!n || t->shadowed != t->i + n))
        n++;
    if (!push && n && t->i + n < t->b->n && t->item[t->i + n].d.insn.mnemonic == ZYDIS_MNEMONIC_RET && !sys_form(&t->item[t->i + n].d) && t->shadowed != t->i + n)
        n++;
    *access = push ? MMU_WRITE : MMU_READ;
    *m = (struct ea){ RSP, REG_ZERO, 0, SEG_SS, push ? -8 * (s64)n : 0 };
    return n;
}

/* S0 holds the addend of RSP's page, and keeps it. */
void tr_run_op(struct tr *t, const struct op *op, bool *last)
{
    struct emit *e = &t->e;
    const struct decoded *d = &tr_item(t)->d;
    const ZydisDecodedOperand *o = &d->opnd[0];
    unsigned g;
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_PUSH:
        if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
            op_mem(e, true, 0xc7, 0, RSP, S0, 0, -8);
            put32(e, (u32)op->imm);
        } else {
            op_mem(e, true, X_STORE, tr_read(t, tr_gpr(o), S1), RSP, S0, 0, -8);
        }
        tr_rsp_move(t, -8);
        break;
    case ZYDIS_MNEMONIC_POP:
        g = tr_gpr(o);
        op_mem(e, true, X_LOAD, tr_resident(g) ? g : S1, RSP, S0, 0, 0);
        tr_rsp_move(t, 8);
        if (!tr_resident(g))
            tr_write(t, g, S1);
        break;
    default:                                                       /* RET */
        op_mem(e, true, X_LOAD, S1, RSP, S0, 0, 0);
        tr_rsp_move(t, 8 + (s32)op->imm);
        exit_return(t);
        *last = true;
        break;
    }
}

/*
 * ADD and SUB of RSP and an immediate: flags from the guest's value, RSP itself by a small step. Small steps alone could lead through a guard gap without an
 * access, so a step is taken only if an access by RSP follows in this block; else RSP's slot is looked up again.
 */
bool tr_rsp_step(struct tr *t, const struct op *op)
{
    struct emit *e = &t->e;
    const struct decoded *d = &tr_item(t)->d;
    bool sub = d->insn.mnemonic == ZYDIS_MNEMONIC_SUB;
    s64 imm = (s64)op->imm;
    if ((!sub && d->insn.mnemonic != ZYDIS_MNEMONIC_ADD) || op->size != 8 || d->opnd[0].type != ZYDIS_OPERAND_TYPE_REGISTER || d->opnd[0].reg.value != ZYDIS_REGISTER_RSP ||
        d->opnd[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || imm < -32768 || imm > 32768)
        return false;
    tr_rsp_get(t, S1);
    alu_imm(e, true, sub ? 5 : 0, S1, (s32)imm);
    if (!t->shadow || tr_rsp_used(t))
        tr_rsp_move(t, (s32)(sub ? -imm : imm));
    else
        tr_rsp_set(t, S1);
    return true;
}

/* ---- branches ---- */
static u64 target_of(const struct tr *t, const struct op *op)
{
    return t->tb->la + (u64)op->disp;
}

static bool relative(const struct tr *t)
{
    return tr_item(t)->d.opnd[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
}

/* The target of an indirect branch to S1. */
static bool load_target(struct tr *t, const struct op *op)
{
    const ZydisDecodedOperand *o = &tr_item(t)->d.opnd[0];
    struct ea m;
    struct place p;
    unsigned s;
    if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
        tr_load(t, tr_gpr(o), S1);
        return true;
    }
    if (o->type != ZYDIS_OPERAND_TYPE_MEMORY || o->size != 64 || !tr_ea(t, op, &m) || !tr_mem(t, &m, 8, MMU_READ, TR_NO_SCRATCH, &p, &s))
        return false;
    op_mem(&t->e, true, X_LOAD, S1, p.base, p.index, p.scale, p.disp);
    return true;
}

/*
 * Backwards: perhaps a loop. Two loads, whose result is not used, look whether there are events: icpu.bt.poll is an address that does not exist then, and the
 * fault leads out at this instruction's beginning (fault.c). No flags, no branch; a signal from another processor takes several times as long as
 * this fault, in a virtual machine above all. Not where S1 is a loop's second delta, whichever branch of it this is: from there a signal leads out.
 */
static void poll(struct tr *t, const struct op *op)
{
    if ((s64)op->disp > (s64)op->off || (t->shadowed && t->i == t->shadowed) || (tr_in_loop(t) && t->loop.bases == 2))
        return;
    op_gs(&t->e, true, X_LOAD, S1, OFF(bt.poll));
    tr_mark(t, t->i, 0);                                           /* up to the branch itself a kick may leave */
    op_mem(&t->e, false, X_LOAD, S1, S1, NO_REG, 0, 0);
    tr_mark(t, t->i, 0);
}

static bool emit_jmp(struct tr *t, const struct op *op)
{
    if (relative(t)) {
        if (!tlb_canonical(target_of(t, op)))
            return false;
        poll(t, op);
        tr_exit(t, target_of(t, op));
        return true;
    }
    if (!load_target(t, op))
        return false;
    exit_indirect(t);
    return true;
}

static bool emit_call(struct tr *t, const struct op *op)
{
    struct emit *e = &t->e;
    u64 next = t->tb->la + op->off + op->len;
    if (relative(t)) {
        if (!tlb_canonical(target_of(t, op)))
            return false;
        if (next == (u64)(s32)next) {
            if (!push_value(t, true, (s32)next, 0))
                return false;
        } else {
            tr_linear(t, S1, next);
            if (!tr_push(t, S1))
                return false;
        }
        tr_mark(t, t->i, MARK_COLD);
        tr_return(t, next);
        tr_exit(t, target_of(t, op));
        return true;
    }
    if (!load_target(t, op))
        return false;
    if (!t->shadow)
        op_gs(e, true, X_STORE, S1, OFF(bt.tmp[4]));
    if (next == (u64)(s32)next) {
        if (!push_value(t, true, (s32)next, 0))
            return false;
    } else {
        tr_linear(t, S0, next);
        if (!tr_push(t, S0))
            return false;
    }
    tr_mark(t, t->i, MARK_COLD);
    tr_return(t, next);
    if (!t->shadow)
        op_gs(e, true, X_LOAD, S1, OFF(bt.tmp[4]));
    exit_indirect(t);
    return true;
}

static bool emit_ret(struct tr *t, const struct op *op)
{
    if (t->shadow) {
        pop_host(t, S1);
        if (op->imm)
            tr_rsp_move(t, (s32)op->imm);
    } else {
        if (!load_top(t, &at_rsp, S1))
            return false;
        tr_rsp_move(t, 8 + (s32)op->imm);
    }
    exit_return(t);
    return true;
}

static bool emit_jcc(struct tr *t, const struct op *op, bool *last)
{
    if (!tlb_canonical(target_of(t, op)))
        return false;
    if (t->loop.on && t->i == t->loop.branch) {
        poll(t, op);
        jump_if_to(&t->e, tr_item(t)->d.insn.opcode & 15, t->loop.label);
        tr_exit(t, t->tb->la + op->off + op->len);
        *last = true;
        return true;
    }
    poll(t, op);
    tr_exit_if(t, tr_item(t)->d.insn.opcode & 15, target_of(t, op));
    return true;
}

bool tr_conditional(const struct decoded *d)
{
    return d->insn.mnemonic != ZYDIS_MNEMONIC_JMP && d->insn.mnemonic != ZYDIS_MNEMONIC_CALL && d->insn.mnemonic != ZYDIS_MNEMONIC_RET;
}

bool tr_branch(struct tr *t, const struct op *op, bool *last)
{
    const struct decoded *d = &tr_item(t)->d;
    if (sys_form(d))
        return false;
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_JMP: *last = true; return emit_jmp(t, op);
    case ZYDIS_MNEMONIC_CALL: *last = true; return emit_call(t, op);
    case ZYDIS_MNEMONIC_RET: *last = true; return emit_ret(t, op);
    default: return emit_jcc(t, op, last);
    }
}
