/*
 * Segment registers: descriptors, the checks of loading one, and the instructions that move them (SDM vol. 3A chapters
 * 3 and 5; vol. 2 MOV, POP, LDS).
 *
 * In 64-bit mode the same checks apply; only the use of base and limit differs. A null selector clears base, limit and
 * attributes.
 */
#include "cpu/interp/sys.h"

/* ---- descriptors ---- */

int segment_fault(struct icpu *c, unsigned vector, u16 sel, u32 ext)
{
    return fault_raise_error(c, vector, (sel & ~3u) | ext);
}

u32 desc_limit(const struct desc *d)
{
    u32 limit = (u32)((d->lo & 0xffff) | (d->lo >> 32 & 0xf0000));
    return d->lo >> 55 & 1 ? limit << 12 | 0xfff : limit;
}

void desc_to_seg(const struct desc *d, u16 sel, struct x86_seg *s)
{
    *s = (struct x86_seg){.base = desc_base(d), .limit = desc_limit(d), .sel = sel, .attr = desc_attr(d)};
}

bool desc_in_table(const struct icpu *c, u16 sel, unsigned n, u64 *la)
{
    const struct x86_seg *ldt = &c->x->ldtr;
    bool local = sel & 4;
    if (local && !(ldt->attr & SEG_P))
        return false;
    u64 base = local ? ldt->base : c->x->gdtr.base;
    u32 limit = local ? ldt->limit : c->x->gdtr.limit;
    u32 off = sel & ~7u;
    if (!range_in(off, n, (u64)limit + 1))
        return false;
    *la = base + off;
    if (!in_long_mode(c))
        *la = (u32)*la;
    return true;
}

int desc_read(struct icpu *c, u16 sel, unsigned vector, u32 ext, struct desc *d)
{
    *d = (struct desc){.sel = sel};
    if (!desc_in_table(c, sel, 8, &d->la))
        return segment_fault(c, vector, sel, ext);
    return sys_load(c, d->la, 8, &d->lo);
}

int desc_read_hi(struct icpu *c, unsigned vector, u32 ext, struct desc *d)
{
    u64 la;
    if (!desc_in_table(c, d->sel, 16, &la))
        return segment_fault(c, vector, d->sel, ext);
    if (sys_load(c, la + 8, 8, &d->hi))
        return OP_FAULT;
    if (d->hi >> 40 & 0x1f)                /* the type field of what could be a descriptor of its own */
        return segment_fault(c, vector, d->sel, ext);
    return 0;
}

int desc_set_type(struct icpu *c, struct desc *d, unsigned type)
{
    u64 access = (d->lo >> 40 & 0xf0) | type;
    if (sys_store(c, d->la + 5, 1, access))
        return OP_FAULT;
    d->lo = (d->lo & ~(15ull << 40)) | (u64)type << 40;
    return 0;
}

int desc_set_accessed(struct icpu *c, struct desc *d)
{
    return desc_type(d) & TYPE_ACCESSED ? 0 : desc_set_type(c, d, desc_type(d) | TYPE_ACCESSED);
}

bool seg_in_limit(const struct x86_seg *s, u32 off, unsigned n)
{
    if (!(s->attr & SEG_P))
        return false;
    u32 last = off + (n - 1);
    if (last < off)
        return false;
    bool down = (s->attr & (SEG_S | TYPE_CODE | TYPE_EC)) == (SEG_S | TYPE_EC);
    if (down)
        return off > s->limit && last <= (s->attr & SEG_DB ? 0xffffffff : 0xffff);
    return last <= s->limit;
}

bool code_bits_ok(const struct icpu *c, const struct desc *d)
{
    return !in_long_mode(c) || (desc_attr(d) & (SEG_L | SEG_DB)) != (SEG_L | SEG_DB);
}

int code_check(struct icpu *c, const struct desc *d, u16 sel)
{
    bool allowed = desc_is_conforming(d) ? desc_dpl(d) <= c->cpl : (sel & 3) <= c->cpl && desc_dpl(d) == c->cpl;
    if (!allowed || !code_bits_ok(c, d))
        return segment_fault(c, VEC_GP, sel, 0);
    return desc_p(d) ? 0 : segment_fault(c, VEC_NP, sel, 0);
}

bool code_rip_ok(const struct icpu *c, const struct x86_seg *cs, u64 rip)
{
    if (in_long_mode(c) && cs->attr & SEG_L)
        return is_canonical(rip);
    return rip <= cs->limit;
}

u64 next_rip(const struct icpu *c, const struct op *op)
{
    return op_next_rip(c, op) & c->rip_mask;
}

/* ---- loading ---- */

void seg_set_null(struct x86_seg *s, u16 sel)
{
    *s = (struct x86_seg){.sel = sel};
}

void seg_null_ss(struct x86_seg *s, unsigned cpl)
{
    *s = (struct x86_seg){.sel = (u16)cpl, .attr = (u16)(cpl << 5)};    /* DPL is the CPL, also of an unusable SS */
}

void seg_load_real(struct icpu *c, unsigned seg, u16 sel)
{
    struct x86_seg *s = &c->x->seg[seg];
    s->sel = sel;
    s->base = (u64)sel << 4;
    if (c->flags & FLAG_VM) {
        s->limit = 0xffff;
        s->attr = 0xf3;
    } else if (seg != SEG_CS && !(s->attr & SEG_P)) {
        s->attr = 0x93;                    /* came null out of protected mode: usable again; the limit stays */
    } else if (seg == SEG_CS) {
        s->attr = (s->attr & ~0x6fu) | 0x0b;    /* writable as CS is in real mode, DPL 0 */
    }
}

int stack_seg_read(struct icpu *c, u16 sel, unsigned cpl, unsigned vector, u32 ext, struct x86_seg *out)
{
    struct desc d;
    if (sel_null(sel))
        return segment_fault(c, vector, 0, ext);
    if (desc_read(c, sel, vector, ext, &d))
        return OP_FAULT;
    bool writable = desc_s(&d) && (desc_type(&d) & (TYPE_CODE | TYPE_RW)) == TYPE_RW;
    if ((sel & 3) != cpl || desc_dpl(&d) != cpl || !writable)
        return segment_fault(c, vector, sel, ext);
    if (!desc_p(&d))
        return segment_fault(c, VEC_SS, sel, ext);
    if (desc_set_accessed(c, &d))
        return OP_FAULT;
    desc_to_seg(&d, sel, out);
    return 0;
}

static int load_ss(struct icpu *c, u16 sel)
{
    if (sel_null(sel) && in_64bit(c) && c->cpl < 3 && (sel & 3) == c->cpl)
        seg_null_ss(&c->x->seg[SEG_SS], c->cpl);
    else if (stack_seg_read(c, sel, c->cpl, VEC_GP, 0, &c->x->seg[SEG_SS]))
        return OP_FAULT;
    icpu_mode(c);                          /* the stack's width */
    return 0;
}

int data_seg_load(struct icpu *c, unsigned seg, u16 sel, unsigned vector, u32 ext)
{
    struct desc d;
    if (sel_null(sel)) {
        seg_set_null(&c->x->seg[seg], sel);
        return 0;
    }
    if (desc_read(c, sel, vector, ext, &d))
        return OP_FAULT;
    bool readable = desc_s(&d) && (desc_type(&d) & (TYPE_CODE | TYPE_RW)) != TYPE_CODE;
    bool allowed = desc_is_conforming(&d) || (desc_dpl(&d) >= c->cpl && desc_dpl(&d) >= (sel & 3));
    if (!readable || !allowed)
        return segment_fault(c, vector, sel, ext);
    if (!desc_p(&d))
        return segment_fault(c, VEC_NP, sel, ext);
    if (desc_set_accessed(c, &d))
        return OP_FAULT;
    desc_to_seg(&d, sel, &c->x->seg[seg]);
    return 0;
}

int seg_load(struct icpu *c, unsigned seg, u16 sel)
{
    if (in_real(c) || in_v86(c)) {
        seg_load_real(c, seg, sel);
        return 0;
    }
    return seg == SEG_SS ? load_ss(c, sel) : data_seg_load(c, seg, sel, VEC_GP, 0);
}

void seg_drop_inner(struct icpu *c, unsigned cpl)
{
    static const u8 data[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    for (unsigned i = 0; i < ARRAY_SIZE(data); i++) {
        struct x86_seg *s = &c->x->seg[data[i]];
        bool conforming = (s->attr & (TYPE_CODE | TYPE_EC)) == (TYPE_CODE | TYPE_EC);
        if (s->attr & SEG_P && !conforming && SEG_DPL(s->attr) < cpl)
            seg_set_null(s, 0);
    }
}

/* ---- operands ---- */

int load_u16(struct icpu *c, const struct op *op, u16 *val)
{
    u64 v = c->r[op->rm];
    if (op->flags & OPF_MEM && mem_load(c, op, 2, &v))
        return OP_FAULT;
    *val = (u16)v;
    return 0;
}

int store_system(struct icpu *c, const struct op *op, u64 val)
{
    if (op->flags & OPF_MEM)
        return mem_store(c, op, 2, (u16)val);
    gpr_write(c, op->rm, op->size, val);
    return 0;
}

u64 linear_unchecked(const struct icpu *c, const struct op *op)
{
    u64 ea = c->r[op->base] + (c->r[op->index] << op->scale) + (u64)op->disp;
    if (op->asize < 8)
        ea &= op->asize == 4 ? 0xffffffff : 0xffff;
    if (in_64bit(c))
        return op->seg >= SEG_FS ? c->x->seg[op->seg].base + ea : ea;
    return (u32)(c->x->seg[op->seg].base + ea);
}

/* ---- MOV, PUSH, POP of segment registers ---- */

/* After a load of SS, interrupts, traps and breakpoints wait until the next instruction has run (SDM vol. 3A 6.8.3). */
static int loaded(struct icpu *c, unsigned seg)
{
    if (seg != SEG_SS)
        return OP_NEXT;
    c->x->shadow = true;
    return OP_END;
}

static int op_mov_to_seg(struct icpu *c, const struct op *op)
{
    u16 sel;
    if (load_u16(c, op, &sel) || seg_load(c, op->aux, sel))
        return OP_FAULT;
    return loaded(c, op->aux);
}

static int op_mov_from_seg(struct icpu *c, const struct op *op)
{
    return store_system(c, op, c->x->seg[op->aux].sel);
}

static int op_push_seg(struct icpu *c, const struct op *op)
{
    return stack_push(c, op->size, c->x->seg[op->aux].sel);
}

static int op_pop_seg(struct icpu *c, const struct op *op)
{
    u64 sel;
    u8 width = c->stack_size;              /* POP SS: the old stack's width counts */
    u64 mask = width == 8 ? ~0ull : width == 4 ? 0xffffffff : 0xffff;
    if (stack_peek(c, 0, op->size, &sel) || seg_load(c, op->aux, (u16)sel))
        return OP_FAULT;
    u64 rsp = (c->r[RSP] + op->size) & mask;
    c->r[RSP] = width == 2 ? (c->r[RSP] & ~mask) | rsp : rsp;
    return loaded(c, op->aux);
}

static int bind_mov_seg(const struct decoded *d, struct op *op)
{
    bool to = d->opnd[0].type == ZYDIS_OPERAND_TYPE_REGISTER &&
              ZydisRegisterGetClass(d->opnd[0].reg.value) == ZYDIS_REGCLASS_SEGMENT;
    unsigned seg = to ? 0 : 1, other = to ? 1 : 0;
    op->aux = reg_id(d, seg);
    op->size = (u8)insn_size(d);
    if (!is_mem(d, other))
        op->rm = reg_id(d, other);
    op->fn = to ? op_mov_to_seg : op_mov_from_seg;
    return BIND_OK;
}

static int bind_stack_seg(const struct decoded *d, struct op *op)
{
    op->aux = reg_id(d, 0);
    op->size = (u8)insn_size(d);
    op->fn = d->insn.mnemonic == ZYDIS_MNEMONIC_PUSH ? op_push_seg : op_pop_seg;
    return BIND_OK;
}

/* ---- LDS, LES, LFS, LGS, LSS ---- */

static int op_lxs(struct icpu *c, const struct op *op)
{
    u64 la, off, sel;
    if (mem_linear(c, op, op->size + 2u, MMU_READ, &la) || lin_load(c, la, op->size, &off))
        return OP_FAULT;
    if (lin_load(c, in_64bit(c) ? la + op->size : (u32)(la + op->size), 2, &sel) || seg_load(c, op->aux, (u16)sel))
        return OP_FAULT;
    gpr_write(c, op->reg, op->size, off);
    return op->aux == SEG_SS ? OP_END : OP_NEXT;
}

int bind_lxs(struct icpu *c, const struct decoded *d, struct op *op, unsigned seg)
{
    (void)c;
    op->aux = seg;
    op->size = (u8)insn_size(d);
    op->reg = reg_id(d, 0);
    op->fn = op_lxs;
    return BIND_OK;
}

/* ---- which forms are ours ---- */

static ZydisRegisterClass operand_class(const struct decoded *d, unsigned operand)
{
    const ZydisDecodedOperand *o = &d->opnd[operand];
    return o->type == ZYDIS_OPERAND_TYPE_REGISTER ? ZydisRegisterGetClass(o->reg.value) : ZYDIS_REGCLASS_INVALID;
}

static bool has_class(const struct decoded *d, ZydisRegisterClass class)
{
    return operand_class(d, 0) == class || operand_class(d, 1) == class;
}

bool sys_form(const struct decoded *d)
{
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_CALL: case ZYDIS_MNEMONIC_JMP: case ZYDIS_MNEMONIC_RET:
        return d->insn.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR;
    case ZYDIS_MNEMONIC_PUSH: case ZYDIS_MNEMONIC_POP:
        return operand_class(d, 0) == ZYDIS_REGCLASS_SEGMENT;
    case ZYDIS_MNEMONIC_MOV:
        return has_class(d, ZYDIS_REGCLASS_SEGMENT) || has_class(d, ZYDIS_REGCLASS_CONTROL) ||
               has_class(d, ZYDIS_REGCLASS_DEBUG);
    default:
        return false;
    }
}

int bind_sys_form(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_CALL: case ZYDIS_MNEMONIC_JMP: case ZYDIS_MNEMONIC_RET:
        return bind_far(c, d, op, arg);
    case ZYDIS_MNEMONIC_MOV:
        if (has_class(d, ZYDIS_REGCLASS_CONTROL))
            return bind_mov_cr(c, d, op, arg);
        if (has_class(d, ZYDIS_REGCLASS_DEBUG))
            return bind_mov_dr(c, d, op, arg);
        return bind_mov_seg(d, op);
    default:
        return bind_stack_seg(d, op);
    }
}
