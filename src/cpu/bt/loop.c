/*
 * Loops of one block: code that ends with a conditional branch to its own beginning, and whose memory operands go through one or two base registers that change
 * by small steps only. The slots of the bases are looked up in front of the loop, once; in it every instruction is what the guest has, and no more. The deltas are in
 * S0 and S1, which nothing else in the loop may use.
 *
 * That is as safe as a delta that is kept from one operand to the next (emit_mem.c): a base moves by less than 2 MiB until it is used for the next time, and every
 * use is an access that faults where nothing is mapped; so it cannot come past the guards of its window, 4 GiB, but by way of a fault, which looks again (fault.c). What
 * may not access at all, though it has an operand (masked vectors, prefetches, NOPs), is therefore not taken for a use.
 *
 * A handler that is called for an instruction in it (fault.c: BT_EXIT_OP) is not followed by the rest of the loop if S1 is in use, but by another translation.
 */
#include "cpu/bt/tr.h"
#include "cpu/interp/fp.h"

#define SMALL_STEP 32768
#define SMALL_DISP (1 << 20)

static bool resident(const ZydisDecodedOperand *o)
{
    bool high;
    switch (ZydisRegisterGetClass(o->reg.value)) {
    case ZYDIS_REGCLASS_GPR8: case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64: {
        unsigned g = decode_gpr(o->reg.value, &high);
        return tr_resident(g) && !high;
    }
    case ZYDIS_REGCLASS_FLAGS: case ZYDIS_REGCLASS_IP: case ZYDIS_REGCLASS_XMM: case ZYDIS_REGCLASS_YMM: case ZYDIS_REGCLASS_ZMM: case ZYDIS_REGCLASS_MASK:
        return true;
    default:
        return o->reg.value == ZYDIS_REGISTER_MXCSR;
    }
}

static bool registers_resident(const struct decoded *d)
{
    for (unsigned i = 0; i < d->insn.operand_count; i++)
        if (d->opnd[i].type == ZYDIS_OPERAND_TYPE_REGISTER && !resident(&d->opnd[i]))
            return false;
    return true;
}

static bool in_host(unsigned g)                                    /* part of an address that LEA takes as it is */
{
    return g == REG_ZERO || (g < 16 && tr_resident(g));
}

/* An operand by a base register alone. */
static bool by_base(const struct op *op)
{
    return op->asize == 8 && op->index == REG_ZERO && op->seg < SEG_FS && op->base < 16 && tr_resident(op->base) && op->disp > -SMALL_DISP && op->disp < SMALL_DISP;
}

static bool add_base(struct tr_loop *l, unsigned base)
{
    for (unsigned i = 0; i < l->bases; i++)
        if (l->base[i] == base)
            return true;
    if (l->bases == ARRAY_SIZE(l->base))
        return false;
    l->base[l->bases++] = (u8)base;
    return true;
}

static bool vector_fits(const struct tr *t, const struct op *op)
{
    const struct fp_insn *i = op->ptr;
    const struct decoded *d = &t->item[op - t->b->op].d;
    return op->flags & OPF_FP && i && i->cls != FP_X87 && i->cls != FP_MMX && !i->kind && d->insn.address_width == 64;
}

static bool fits(struct tr *t, struct tr_loop *l, unsigned n)
{
    const struct item *it = &t->item[n];
    const struct op *op = &t->b->op[n];
    if (!registers_resident(&it->d))
        return false;
    switch (it->kind) {
    case K_NOTHING: return true;
    case K_BRANCH: return tr_conditional(&it->d);
    case K_LEA: return it->d.insn.operand_width >= 32 && op->asize == 8 && in_host(op->base) && in_host(op->index);
    case K_VECTOR:
        if (!vector_fits(t, op))
            return false;
        break;
    case K_PLAIN: break;
    default: return false;
    }
    return !(op->flags & OPF_MEM) || (by_base(op) && add_base(l, op->base));
}

/* All changes of the bases are small steps. */
static bool bases_step(const struct tr *t, const struct tr_loop *l)
{
    for (unsigned n = 0; n <= l->branch; n++)
        for (unsigned i = 0; i < l->bases; i++)
            if (tr_writes(&t->item[n], l->base[i]) && !tr_small_step(&t->item[n], l->base[i]))
                return false;
    return true;
}

/* With S1 in use gates are looked at in front of the loop only: by its first instruction, whose handler a closed one calls. */
static bool one_gate(const struct tr *t, const struct tr_loop *l)
{
    const struct op *op = t->b->op;
    for (unsigned n = 0; n <= l->branch; n++)
        if (t->item[n].kind == K_VECTOR &&
            (t->item[0].kind != K_VECTOR || ((const struct fp_insn *)op[n].ptr)->cls != ((const struct fp_insn *)op[0].ptr)->cls))
            return false;
    return true;
}

void loop_plan(struct tr *t, bool compare)
{
    const struct block *b = t->b;
    struct tr_loop l = { .on = true };
    t->loop.on = false;
    if (!t->shadow || compare || b->slow || t->c->bt.count)
        return;
    for (unsigned n = 0; n < b->n; n++) {
        if (!fits(t, &l, n))
            return;
        if (t->item[n].kind == K_BRANCH && b->op[n].disp == 0) {
            l.branch = (u8)n;
            if (l.bases && bases_step(t, &l) && (l.bases == 1 || one_gate(t, &l)))
                t->loop = l;
            return;
        }
    }
}

void loop_begin(struct tr *t)
{
    struct tr_loop *l = &t->loop;
    if (t->item[0].kind == K_VECTOR)
        tr_gates(t, &t->b->op[0]);
    for (unsigned i = 0; i < l->bases; i++) {
        unsigned s = i ? S1 : S0;
        put_pext_gs(&t->e, s, l->base[i], OFF(bt.mask_slot));
        op_gs_index(&t->e, true, X_LOAD, s, s, OFF(bt.delta[0][0]) + t->view * 4096u);
    }
    t->kept = l->base[0];
    t->tb->second = l->bases == 2 ? (u8)(l->base[1] + 1) : 0;
    l->label = t->e.p;
}
