/*
 * Descriptor tables and selectors: LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR, LAR, LSL, VERR, VERW, ARPL (SDM vol.
 * 2; vol. 3A 2.4, 5.10).
 *
 * With CR4.UMIP, SGDT, SIDT, SLDT, STR (and SMSW, control.c) raise #GP at CPL > 0. The instructions that look at
 * descriptors do not exist in real and virtual-8086 mode.
 */
#include "cpu/interp/sys.h"

#include <string.h>

static bool no_descriptors(const struct decoded *d)
{
    return d->mode == IMODE_REAL16 || d->mode == IMODE_V86;
}

static bool umip(const struct icpu *c)
{
    return c->x->cr4 & CR4_UMIP && c->cpl > 0;
}

/* ---- GDTR, IDTR ---- */

static int op_lgdt(struct icpu *c, const struct op *op)
{
    u8 image[10] = {0};
    struct x86_table t = {0};
    unsigned width = in_64bit(c) ? 8 : 4;
    u64 la;
    if (c->cpl)
        return fault_gp(c, 0);
    if (mem_linear(c, op, width + 2, MMU_READ, &la) || lin_load_bytes(c, la, image, width + 2))
        return OP_FAULT;
    memcpy(&t.limit, image, 2);
    memcpy(&t.base, image + 2, width);
    if (op->size == 2)
        t.base &= 0xffffff;
    if (!is_canonical(t.base))
        return fault_gp(c, 0);
    *(op->aux == TABLE_GDT ? &c->x->gdtr : &c->x->idtr) = t;
    return OP_NEXT;
}

static int op_sgdt(struct icpu *c, const struct op *op)
{
    u8 image[10];
    const struct x86_table *t = op->aux == TABLE_GDT ? &c->x->gdtr : &c->x->idtr;
    unsigned width = in_64bit(c) ? 8 : 4;
    u64 la;
    if (umip(c))
        return fault_gp(c, 0);
    memcpy(image, &t->limit, 2);
    memcpy(image + 2, &t->base, 8);
    if (mem_linear(c, op, width + 2, MMU_WRITE, &la))
        return OP_FAULT;
    return lin_store_bytes(c, la, image, width + 2);
}

int bind_lgdt(struct icpu *c, const struct decoded *d, struct op *op, unsigned table)
{
    (void)c;
    op->aux = table;
    op->size = (u8)insn_size(d);
    op->fn = op_lgdt;
    return BIND_OK;
}

int bind_sgdt(struct icpu *c, const struct decoded *d, struct op *op, unsigned table)
{
    (void)c;
    (void)d;
    op->aux = table;
    op->fn = op_sgdt;
    return BIND_OK;
}

/* ---- LDTR, TR ---- */

/* A system descriptor of the GDT whose type is want, present; TR: it becomes busy. */
static int load_system(struct icpu *c, u16 sel, bool tr, struct x86_seg *out)
{
    struct desc d;
    if (sel & 4)
        return segment_fault(c, VEC_GP, sel, 0);
    if (desc_read(c, sel, VEC_GP, 0, &d))
        return OP_FAULT;
    unsigned type = desc_type(&d);
    bool right = tr ? type == DESC_TSS || (type == DESC_TSS16 && !in_long_mode(c)) : type == DESC_LDT;
    if (desc_s(&d) || !right)
        return segment_fault(c, VEC_GP, sel, 0);
    if (!desc_p(&d))
        return segment_fault(c, VEC_NP, sel, 0);
    if (in_long_mode(c)) {
        if (desc_read_hi(c, VEC_GP, 0, &d))
            return OP_FAULT;
        if (!is_canonical(desc_base(&d)))
            return segment_fault(c, VEC_GP, sel, 0);
    }
    if (tr && desc_set_type(c, &d, type | 2))
        return OP_FAULT;
    desc_to_seg(&d, sel, out);
    return 0;
}

static int op_lldt(struct icpu *c, const struct op *op)
{
    u16 sel;
    bool tr = op->aux == SEL_TR;
    if (c->cpl)
        return fault_gp(c, 0);
    if (load_u16(c, op, &sel))
        return OP_FAULT;
    if (sel_null(sel)) {
        if (tr)
            return fault_gp(c, 0);
        seg_set_null(&c->x->ldtr, sel);
        return OP_NEXT;
    }
    return load_system(c, sel, tr, tr ? &c->x->tr : &c->x->ldtr);
}

static int op_sldt(struct icpu *c, const struct op *op)
{
    if (umip(c))
        return fault_gp(c, 0);
    return store_system(c, op, op->aux == SEL_TR ? c->x->tr.sel : c->x->ldtr.sel);
}

static void take_rm(const struct decoded *d, struct op *op, unsigned operand)
{
    op->size = (u8)insn_size(d);
    if (!is_mem(d, operand))
        op->rm = reg_id(d, operand);
}

int bind_lldt(struct icpu *c, const struct decoded *d, struct op *op, unsigned which)
{
    (void)c;
    if (no_descriptors(d))
        return BIND_UD;
    take_rm(d, op, 0);
    op->aux = which;
    op->fn = op_lldt;
    return BIND_OK;
}

int bind_sldt(struct icpu *c, const struct decoded *d, struct op *op, unsigned which)
{
    (void)c;
    if (no_descriptors(d))
        return BIND_UD;
    take_rm(d, op, 0);
    op->aux = which;
    op->fn = op_sldt;
    return BIND_OK;
}

/* ---- LAR, LSL, VERR, VERW ---- */

static void set_zf(struct icpu *c, bool zf)
{
    c->fl = zf ? c->fl | FL_ZF : c->fl & ~FL_ZF;
}

/* Reads the descriptor that LAR and its kin look at. *found: it exists and the current privilege may see it. OP_FAULT:
 * only for the access itself. */
static int look(struct icpu *c, u16 sel, struct desc *d, bool *found)
{
    *found = false;
    *d = (struct desc){.sel = sel};
    if (sel_null(sel) || !desc_in_table(c, sel, 8, &d->la))
        return 0;
    if (sys_load(c, d->la, 8, &d->lo))
        return OP_FAULT;
    bool conforming = desc_s(d) && desc_is_conforming(d);
    *found = conforming || (c->cpl <= desc_dpl(d) && (sel & 3u) <= desc_dpl(d));
    return 0;
}

/* System types that LAR and LSL know, SDM vol. 2 tables 3-53 and 3-55. */
static bool type_known(const struct icpu *c, const struct desc *d, bool lsl)
{
    const u32 legacy = 1u << DESC_TSS16 | 1u << DESC_LDT | 1u << DESC_TSS16_BUSY | 1u << DESC_TSS | 1u << DESC_TSS_BUSY;
    const u32 wide = 1u << DESC_LDT | 1u << DESC_TSS | 1u << DESC_TSS_BUSY;
    const u32 gates = 1u << DESC_CALL16 | 1u << DESC_TASK | 1u << DESC_CALL, wide_gates = 1u << DESC_CALL;
    if (desc_s(d))
        return true;
    u32 known = in_long_mode(c) ? wide | (lsl ? 0 : wide_gates) : legacy | (lsl ? 0 : gates);
    return known >> desc_type(d) & 1;
}

static int op_lar(struct icpu *c, const struct op *op)
{
    struct desc d;
    bool found;
    u16 sel;
    if (load_u16(c, op, &sel) || look(c, sel, &d, &found))
        return OP_FAULT;
    found = found && type_known(c, &d, false);
    set_zf(c, found);
    if (found)
        gpr_write(c, op->reg, op->size, d.lo >> 32 & 0xf0ff00);
    return OP_NEXT;
}

static int op_lsl(struct icpu *c, const struct op *op)
{
    struct desc d;
    bool found;
    u16 sel;
    if (load_u16(c, op, &sel) || look(c, sel, &d, &found))
        return OP_FAULT;
    found = found && type_known(c, &d, true);
    set_zf(c, found);
    if (found)
        gpr_write(c, op->reg, op->size, desc_limit(&d));
    return OP_NEXT;
}

static int op_verr(struct icpu *c, const struct op *op)
{
    struct desc d;
    bool found;
    u16 sel;
    if (load_u16(c, op, &sel) || look(c, sel, &d, &found))
        return OP_FAULT;
    unsigned type = desc_type(&d);
    bool right = op->aux ? (type & (TYPE_CODE | TYPE_RW)) == TYPE_RW : (type & (TYPE_CODE | TYPE_RW)) != TYPE_CODE;
    set_zf(c, found && desc_s(&d) && right);
    return OP_NEXT;
}

static int bind_look(const struct decoded *d, struct op *op, op_fn fn)
{
    if (no_descriptors(d))
        return BIND_UD;
    take_rm(d, op, 1);
    op->reg = reg_id(d, 0);
    op->fn = fn;
    return BIND_OK;
}

int bind_lar(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    return bind_look(d, op, op_lar);
}

int bind_lsl(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    return bind_look(d, op, op_lsl);
}

int bind_verr(struct icpu *c, const struct decoded *d, struct op *op, unsigned write)
{
    (void)c;
    if (no_descriptors(d))
        return BIND_UD;
    take_rm(d, op, 0);
    op->aux = write;
    op->fn = op_verr;
    return BIND_OK;
}

/* ---- ARPL ---- */

static int op_arpl(struct icpu *c, const struct op *op)
{
    u64 dst = c->r[op->rm];
    unsigned rpl = c->r[op->reg] & 3;
    if (op->flags & OPF_MEM && mem_load(c, op, 2, &dst))
        return OP_FAULT;
    bool raise = (dst & 3) < rpl;
    if (raise) {
        dst = (dst & ~3ull) | rpl;
        if (op->flags & OPF_MEM) {
            if (mem_store(c, op, 2, (u16)dst))
                return OP_FAULT;
        } else {
            gpr_write(c, op->rm, 2, dst);
        }
    }
    set_zf(c, raise);
    return OP_NEXT;
}

int bind_arpl(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    if (no_descriptors(d))
        return BIND_UD;
    take_rm(d, op, 0);
    op->reg = reg_id(d, 1);
    op->fn = op_arpl;
    return BIND_OK;
}
