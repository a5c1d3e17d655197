/*
 * Vector, mask and x87 instructions: copied as they are, with another memory operand and other general registers (encodings: Intel SDM vol. 2 chapter 2; how the state comes
 * into the registers: fpstate.h). And what other emitters need of that: instructions of any encoding with other operands (tr_recode, tr_recoded).
 *
 * Each block looks at the gate of a class before its first instruction of the class. What raises an exception, or is masked and not all in plain RAM, faults or
 * misses, and interp's handler does it over again: so alignment, denormals, #XM, suppression of faults are right without a thought here.
 *
 * x87's last instruction and operand pointers would be the host's: they are kept beside it, in icpu.live, by stores behind each instruction. What changes them
 * otherwise, or the control word so that exceptions may be raised, is interp's.
 */
#include "cpu/bt/fpstate.h"
#include "cpu/bt/tr.h"
#include "cpu/interp/fp.h"

/* ---- encoding ---- */
static unsigned legacy_rex(const struct decoded *d, const struct recode *r)
{
    const ZydisDecodedInstruction *z = &d->insn;
    bool rex = z->attributes & ZYDIS_ATTRIB_HAS_REX;
    unsigned v = !rex ? 0 : z->raw.rex.W ? 0x48 : 0x40;            /* even an empty one: SPL to DIL */
    v |= r->reg < RECODE_KEEP ? (r->reg >> 3 & 1) << 2 : rex && z->raw.rex.R ? 4 : 0;
    if (r->m)
        return v | rex_bits(0, r->m->base, r->m->index);
    return v | (r->rm < RECODE_KEEP ? r->rm >> 3 & 1 : rex && z->raw.rex.B ? 1 : 0);
}

static void recode_legacy(struct emit *e, const struct decoded *d, const struct recode *r)
{
    const ZydisDecodedInstruction *z = &d->insn;
    unsigned rex = legacy_rex(d, r), seen = 0, end = z->raw.modrm.offset ? z->raw.modrm.offset : z->length;
    for (unsigned n = 0; n < z->raw.prefix_count; n++) {
        u8 v = z->raw.prefixes[n].value;
        unsigned bit = v == 0x66 ? 1 : v == 0xf2 ? 2 : v == 0xf3 ? 4 : 0;
        if (bit & ~seen)
            put8(e, v);
        seen |= bit;
    }
    if (z->attributes & ZYDIS_ATTRIB_HAS_LOCK)
        put8(e, 0xf0);
    if (rex)
        put8(e, 0x40 | rex);
    put_bytes(e, d->bytes + z->raw.prefix_count, end - z->raw.prefix_count);
}

/* The inverted bits X and B of a VEX or EVEX prefix, in the places that they have there. */
static unsigned mem_xb(const struct place *m)
{
    return (m->index != NO_REG && m->index & 8 ? 0 : 0x40) | (m->base != NO_REG && m->base & 8 ? 0 : 0x20);
}

static void recode_vex(struct emit *e, const struct decoded *d, const struct recode *r)
{
    const u8 *b = d->bytes + d->insn.raw.vex.offset;
    bool two = b[0] == 0xc5;
    unsigned rxbm = two ? (b[1] & 0x80) | 0x61 : b[1], wvlp = two ? b[1] & 0x7f : b[2];
    if (r->reg < RECODE_KEEP)
        rxbm = (rxbm & 0x7f) | (r->reg & 8 ? 0 : 0x80);
    if (r->m)
        rxbm = (rxbm & ~0x60u) | mem_xb(r->m);
    else if (r->rm < RECODE_KEEP)
        rxbm = (rxbm & ~0x60u) | 0x40 | (r->rm & 8 ? 0 : 0x20);
    if (r->vvvv < RECODE_KEEP)
        wvlp = (wvlp & ~0x78u) | (~r->vvvv & 15) << 3;
    if ((rxbm & 0x7f) == 0x61 && !(wvlp & 0x80))
        PUT(e, 0xc5, (rxbm & 0x80) | wvlp, d->insn.opcode);
    else
        PUT(e, 0xc4, rxbm, wvlp, d->insn.opcode);
}

static void recode_evex(struct emit *e, const struct decoded *d, const struct recode *r)
{
    const u8 *b = d->bytes + d->insn.raw.evex.offset;
    unsigned p0 = b[1], p1 = b[2];
    if (r->reg < RECODE_KEEP)
        p0 = (p0 & ~0x90u) | 0x10 | (r->reg & 8 ? 0 : 0x80);
    if (r->m)
        p0 = (p0 & ~0x60u) | mem_xb(r->m);
    else if (r->rm < RECODE_KEEP)
        p0 = (p0 & ~0x60u) | 0x40 | (r->rm & 8 ? 0 : 0x20);
    if (r->vvvv < RECODE_KEEP)
        p1 = (p1 & ~0x78u) | (~r->vvvv & 15) << 3;
    PUT(e, 0x62, p0, p1, b[3], d->insn.opcode);
}

/* EVEX scales 8-bit displacements: none of those, then. */
static void put_mem_evex(struct emit *e, unsigned reg, const struct place *m)
{
    if (m->base == NO_REG || (m->disp == 0 && (m->base & 7) != 5)) {
        put_mem(e, reg, m->base, m->index, m->scale, m->disp);
        return;
    }
    unsigned r = 0x80 | (reg & 7) << 3;
    if (m->index == NO_REG && (m->base & 7) != 4)
        put8(e, r | (m->base & 7));
    else
        PUT(e, r | 4, m->scale << 6 | (m->index == NO_REG ? 4 : m->index & 7) << 3 | (m->base & 7));
    put32(e, (u32)m->disp);
}

void tr_recode(struct emit *e, const struct decoded *d, const struct recode *r)
{
    const ZydisDecodedInstruction *z = &d->insn;
    unsigned reg = r->reg < RECODE_KEEP ? r->reg : z->raw.modrm.reg, rm = r->rm < RECODE_KEEP ? r->rm : z->raw.modrm.rm, tail;
    if (z->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX)
        recode_evex(e, d, r);
    else if (z->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
        recode_vex(e, d, r);
    else
        recode_legacy(e, d, r);
    if (!z->raw.modrm.offset)
        return;
    if (!r->m)
        put8(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
    else if (z->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX)
        put_mem_evex(e, reg, r->m);
    else
        put_mem(e, reg, r->m->base, r->m->index, r->m->scale, r->m->disp);
    tail = z->raw.modrm.offset + 1u + (z->raw.sib.offset != 0) + z->raw.disp.size / 8u;
    put_bytes(e, d->bytes + tail, z->length - tail);
}

/* ---- general registers among the operands ---- */
struct gprs {
    const ZydisDecodedOperand *reg, *rm, *vvvv;
};

static bool is_gpr(const ZydisDecodedOperand *o)
{
    if (o->type != ZYDIS_OPERAND_TYPE_REGISTER)
        return false;
    switch (ZydisRegisterGetClass(o->reg.value)) {
    case ZYDIS_REGCLASS_GPR8: case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64:
        return true;
    default:
        return false;
    }
}

/* False: AH to BH, or a register that is implied and is not in the host's of the same number. */
static bool find_gprs(const struct decoded *d, struct gprs *g)
{
    *g = (struct gprs){ 0 };
    for (unsigned n = 0; n < d->insn.operand_count; n++) {
        const ZydisDecodedOperand *o = &d->opnd[n];
        if (!is_gpr(o))
            continue;
        if (tr_is_high(o))
            return false;
        if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
            g->reg = o;
        else if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM)
            g->rm = o;
        else if (o->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD)
            g->vvvv = o;
        else if (!tr_resident(tr_gpr(o)))
            return false;
    }
    return true;
}

static bool reads(const ZydisDecodedOperand *o)
{
    return o && o->actions & ZYDIS_OPERAND_ACTION_MASK_READ;
}
static bool writes(const ZydisDecodedOperand *o)
{
    return o && o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
}
static bool elsewhere(const ZydisDecodedOperand *o)                /* not in a host register */
{
    return o && !tr_resident(tr_gpr(o));
}

static const ZydisDecodedOperand *memory_of(const struct decoded *d)
{
    for (unsigned n = 0; n < d->insn.operand_count; n++) {
        if (d->opnd[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
            return &d->opnd[n];
    }
    return NULL;
}

/* The place of a general register operand: its own host register, or one of the scratch registers, loaded if it is read. */
static unsigned gpr_place(struct tr *t, const ZydisDecodedOperand *o, unsigned scratch)
{
    if (!o)
        return RECODE_KEEP;
    if (!elsewhere(o))
        return tr_gpr(o);
    if (reads(o) || o->size < 32)                                  /* a small result leaves the rest as it is */
        tr_load(t, tr_gpr(o), scratch);
    return scratch;
}

/*
 * The current instruction, with a memory operand of n bytes if n is not 0. Of general registers that are elsewhere at most two are read and one written; a
 * destination may share its scratch register with a source, as the instruction reads before it writes.
 */
bool tr_recoded(struct tr *t, const struct op *op, unsigned n, enum mmu_access access)
{
    const struct decoded *d = &tr_item(t)->d;
    struct recode r = { RECODE_KEEP, RECODE_KEEP, RECODE_KEEP, NULL };
    struct place place;
    struct gprs g;
    struct ea ea;
    unsigned free = S0;
    if (!find_gprs(d, &g))
        return false;
    if (elsewhere(g.reg) && elsewhere(g.vvvv) && writes(g.reg) && writes(g.vvvv)) /* MULX */
        return false;
    if (n) {
        if (!tr_ea(t, op, &ea))
            return false;
        bool want = elsewhere(g.reg) || elsewhere(g.vvvv);
        if (reads(g.reg) && reads(g.vvvv) && elsewhere(g.reg) && elsewhere(g.vvvv))
            return false;
        if (!tr_mem(t, &ea, n, access, want ? TR_SCRATCH : TR_NO_SCRATCH, &place, &free))
            return false;
        r.m = &place;
        if (want && free == S0)
            t->kept = NO_REG;
        r.reg = gpr_place(t, g.reg, free);
        r.vvvv = gpr_place(t, g.vvvv, free);
    } else {
        if (elsewhere(g.reg) || elsewhere(g.rm) || elsewhere(g.vvvv))
            t->kept = NO_REG;
        r.rm = gpr_place(t, g.rm, S0);
        r.vvvv = gpr_place(t, g.vvvv, S1);
        r.reg = gpr_place(t, g.reg, reads(g.reg) && elsewhere(g.rm) ? S1 : S0);
        if (reads(g.reg) && elsewhere(g.reg) && elsewhere(g.rm) && elsewhere(g.vvvv))
            return false;
    }
    tr_recode(&t->e, d, &r);
    if (writes(g.reg) && elsewhere(g.reg))
        tr_write(t, tr_gpr(g.reg), r.reg);
    if (writes(g.vvvv) && elsewhere(g.vvvv))
        tr_write(t, tr_gpr(g.vvvv), r.vvvv);
    if (writes(g.rm) && elsewhere(g.rm))
        tr_write(t, tr_gpr(g.rm), r.rm);
    return true;
}

/* ---- gates ---- */
/* x87's is looked at each time: it may be closed for reasons that interp's handler knows no fault for, and then the block goes on behind it. */
static void put_gate(struct tr *t, unsigned gate)
{
    struct emit *e = &t->e;
    if (t->gates & BIT(gate) && gate != FP_GATE_X87)
        return;
    t->gates |= (u8)BIT(gate);
    op_gs(e, true, X_LOAD, S1, OFF(live.gate[0]) + 8 * gate);
    op_mem(e, false, X_LOAD, S1, S1, NO_REG, 0, 0);
}

static unsigned gate_of(enum fp_class cls)
{
    static const u8 gate[] = {
        [FP_SSE] = FP_GATE_SSE, [FP_AVX] = FP_GATE_AVX, [FP_AVX512] = FP_GATE_AVX512, [FP_MMX] = FP_GATE_X87, [FP_X87] = FP_GATE_X87,
    };
    return gate[cls];
}

/* ---- x87 ---- */
static void put_selector(struct tr *t, unsigned seg, size_t off)
{
    struct emit *e = &t->e;
    op_gs(e, true, X_LOAD, S1, OFF(x));
    op_mem(e, false, X_LOAD, S1, S1, NO_REG, 0, (s32)(offsetof(struct x86, seg) + seg * sizeof(struct x86_seg) + offsetof(struct x86_seg, sel)));
    put8(e, 0x66);
    op_gs(e, false, X_STORE, S1, off);
}

static void put_rip(struct tr *t, u64 rip)
{
    struct emit *e = &t->e;
    if ((s64)rip == (s32)rip) {
        op_gs(e, true, 0xc7, 0, OFF(live.fip));
        put32(e, (u32)rip);
        return;
    }
    tr_linear(t, S1, rip);
    op_gs(e, true, X_STORE, S1, OFF(live.fip));
}

/* As fp_x87.c's set_pointers(): no exception is unmasked here. */
static void put_pointers(struct tr *t, const struct op *op)
{
    const struct fp *f = t->c->fp;
    struct emit *e = &t->e;
    struct ea ea;
    put_rip(t, t->tb->la + op->off);
    if (!f->fop_on_error) {
        put8(e, 0x66);
        op_gs(e, false, 0xc7, 0, OFF(live.fop));
        PUT(e, op->aux & 0xff, op->aux >> 8);
    }
    if (!f->no_selectors)
        put_selector(t, SEG_CS, OFF(live.fcs));
    if (!(op->flags & OPF_MEM) || f->fdp_on_error)
        return;
    tr_ea(t, op, &ea);
    tr_address(t, &ea, S1, false);
    op_gs(e, true, X_STORE, S1, OFF(live.fdp));
    if (!f->no_selectors)
        put_selector(t, op->seg, OFF(live.fds));
}

static bool put_x87(struct tr *t, const struct op *op)
{
    const struct fp_insn *i = op->ptr;
    put_gate(t, FP_GATE_X87);
    if (!tr_recoded(t, op, i->bytes, i->writes ? MMU_WRITE : MMU_READ))
        return false;
    put_pointers(t, op);
    return true;
}

/* ---- all of them ---- */
void tr_gates(struct tr *t, const struct op *op)
{
    const struct fp_insn *i = op->ptr;
    put_gate(t, gate_of(i->cls));
    if (i->cls == FP_MMX && i->xmm)
        put_gate(t, FP_GATE_SSE);
}

static bool put_vector(struct tr *t, const struct op *op)
{
    const struct fp_insn *i = op->ptr;
    tr_gates(t, op);
    return tr_recoded(t, op, i->bytes, i->writes ? MMU_WRITE : MMU_READ);
}

/* By light functions: whole states, and what is known without the registers. */
static bool put_state(struct tr *t)
{
    static const struct {
        ZydisMnemonic mnemonic;
        int (*fn)(struct icpu *c, const struct op *op);
    } row[] = {
        { ZYDIS_MNEMONIC_XSAVE64, bt_xsave }, { ZYDIS_MNEMONIC_XSAVEOPT64, bt_xsaveopt }, { ZYDIS_MNEMONIC_XSAVEC64, bt_xsavec },
        { ZYDIS_MNEMONIC_XSAVES64, bt_xsaves }, { ZYDIS_MNEMONIC_XRSTOR64, bt_xrstor }, { ZYDIS_MNEMONIC_XRSTORS64, bt_xrstors },
        { ZYDIS_MNEMONIC_XGETBV, bt_xgetbv }, { ZYDIS_MNEMONIC_FWAIT, bt_fwait },
    };
    for (unsigned i = 0; i < ARRAY_SIZE(row); i++)
        if (tr_item(t)->d.insn.mnemonic == row[i].mnemonic) {
            t->kept = NO_REG;
            tr_call_light(t, row[i].fn);
            return true;
        }
    return false;
}

/* Instructions that have a row in insn_fp.def, or come to another binder than fp_bind()'s usual ways: no fp_insn. */
static bool put_control(struct tr *t, const struct op *op)
{
    switch (tr_item(t)->d.insn.mnemonic) {
    case ZYDIS_MNEMONIC_VZEROUPPER: case ZYDIS_MNEMONIC_VZEROALL:
        put_gate(t, FP_GATE_AVX);
        return tr_recoded(t, op, 0, MMU_READ);
    case ZYDIS_MNEMONIC_LDMXCSR:
        put_gate(t, FP_GATE_SSE);
        return tr_recoded(t, op, 4, MMU_READ);
    case ZYDIS_MNEMONIC_STMXCSR:
        put_gate(t, FP_GATE_SSE);
        return tr_recoded(t, op, 4, MMU_WRITE);
    case ZYDIS_MNEMONIC_VLDMXCSR:
        put_gate(t, FP_GATE_AVX);
        return tr_recoded(t, op, 4, MMU_READ);
    case ZYDIS_MNEMONIC_VSTMXCSR:
        put_gate(t, FP_GATE_AVX);
        return tr_recoded(t, op, 4, MMU_WRITE);
    case ZYDIS_MNEMONIC_FNSTCW:
        put_gate(t, FP_GATE_X87);
        return tr_recoded(t, op, 2, MMU_WRITE);
    case ZYDIS_MNEMONIC_FNSTSW:
        put_gate(t, FP_GATE_X87);
        return tr_recoded(t, op, op->flags & OPF_MEM ? 2 : 0, MMU_WRITE);
    case ZYDIS_MNEMONIC_FNCLEX: case ZYDIS_MNEMONIC_EMMS:
        put_gate(t, FP_GATE_X87);
        return tr_recoded(t, op, 0, MMU_READ);
    default:
        return put_state(t);
    }
}

bool tr_vector(struct tr *t, const struct op *op)
{
    const struct decoded *d = &tr_item(t)->d;
    const ZydisDecodedOperand *mem = memory_of(d);
    if (d->insn.address_width != 64 || (mem && mem->mem.type == ZYDIS_MEMOP_TYPE_VSIB))
        return false;
    if (!op->ptr)
        return put_control(t, op);
    return ((const struct fp_insn *)op->ptr)->cls == FP_X87 ? put_x87(t, op) : put_vector(t, op);
}
