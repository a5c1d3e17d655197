/*
 * Memory operands that are reached by elements: AVX-512 masks with fault suppression, compress and expand, VMASKMOV, gathers and scatters, MASKMOVDQU
 * (Intel SDM vol. 2 2.7.6, VMASKMOV, VPGATHERDD, VPSCATTERDD, MASKMOVDQU).
 *
 * When the whole operand lies in one page of plain RAM that may be accessed, a masked instruction runs natively in place. Otherwise its active
 * elements are loaded or probed one by one, lowest first, and the instruction runs on the bounce buffer. Gathers and scatters are C throughout: elements in
 * order, each completed one clearing its mask, so that a fault shows the progress that the SDM promises.
 */
#include <string.h>

#include "cpu/interp/access.h"
#include "cpu/interp/fp.h"

/* The linear address of n bytes at offset off of op's segment. */
static int element_linear(struct icpu *c, const struct op *op, u64 off, unsigned n, enum mmu_access access, u64 *la)
{
    u64 ea = op->asize == 8 ? off : op->asize == 4 ? (u32)off : (u16)off;

    return seg_linear(c, op->seg, ea, n, access, la);
}

/* Bit n: element n of the memory operand is accessed. */
static u64 active_elements(const struct fp *f, const struct fp_insn *i)
{
    unsigned in_memory = i->bytes / i->esize;
    u64 k = 0, active = 0;

    if (i->kind == FP_MASK_V) {
        for (unsigned n = 0; n < i->elements; n++)
            active |= (u64)(f->v[i->mask][(n + 1) * i->esize - 1] >> 7) << n;
        return active;
    }
    k = f->k[i->mask] & (i->elements < 64 ? BIT(i->elements) - 1 : ~0ull);
    if (i->kind == FP_MASK_PACKED) {
        unsigned n = (unsigned)__builtin_popcountll(k);

        return n < 64 ? BIT(n) - 1 : ~0ull;
    }
    for (unsigned n = 0; n < i->elements; n++)
        active |= (k >> n & 1) << n % in_memory;
    return active;
}

static int transfer(struct icpu *c, const struct op *op, u8 *p, u64 active, bool writes, bool probe)
{
    const struct fp_insn *i = op->ptr;
    enum mmu_access access = writes ? MMU_WRITE : MMU_READ;
    u64 ea = fp_ea(c, op), la;

    for (unsigned n = 0; active; n++, active >>= 1) {
        if (!(active & 1))
            continue;
        if (element_linear(c, op, ea + n * i->esize, i->esize, access, &la))
            return OP_FAULT;
        if (probe ? lin_probe(c, la, i->esize, access)
                  : writes ? lin_store_bytes(c, la, p + n * i->esize, i->esize) : lin_load_bytes(c, la, p + n * i->esize, i->esize))
            return OP_FAULT;
    }
    return 0;
}

unsigned fp_offset_in_line(const struct icpu *c, const struct op *op)
{
    bool based = c->mode != IMODE_LONG64 || op->seg >= SEG_FS;

    return (unsigned)((fp_ea(c, op) + (based ? c->x->seg[op->seg].base : 0)) & 63);
}

static int masked_bounce(struct icpu *c, const struct op *op)
{
    const struct fp_insn *i = op->ptr;
    struct fp *f = icpu_fp(c);
    u64 active = active_elements(f, i), r;
    u8 *p = f->bounce + fp_offset_in_line(c, op);

    if (active && (fp_offset_in_line(c, op) & (i->align - 1u)))
        return fault_gp(c, 0);
    if (active && fp_ac_armed(c) && (fp_offset_in_line(c, op) & (i->esize - 1u)))
        return fault_raise_error(c, VEC_AC, 0);
    memset(p, 0, i->bytes);
    if (transfer(c, op, p, active, i->writes, i->writes))
        return OP_FAULT;
    r = i->code(f, c, p);
    if (unlikely(r))
        return fp_stub_fault(c, r);
    return i->writes ? transfer(c, op, p, active, true, false) : OP_NEXT;
}

int fp_op_masked(struct icpu *c, const struct op *op)
{
    const struct fp_insn *i = op->ptr;
    enum mmu_access access = i->writes ? MMU_WRITE : MMU_READ;
    struct fault before = c->fault;
    void *p;
    u64 la, r;

    if (fp_check(c, i->cls))
        return OP_FAULT;
    p = op_hit(c, op, i->bytes, access);
    if (!p) {
        if (mem_linear(c, op, i->bytes, access, &la)) {
            c->fault = before;                                     /* perhaps of an element that the mask excludes */
            return masked_bounce(c, op);
        }
        if (!fp_ac_armed(c))
            p = lin_host(c, la, i->bytes, access);
    }
    if (!p)
        return masked_bounce(c, op);
    r = i->code(icpu_fp(c), c, p);
    return likely(!r) ? OP_NEXT : fp_stub_fault(c, r);
}

/* ---- gather and scatter ---- */

enum vsib_flag { VSIB_SCATTER = 1, VSIB_K = 2, VSIB_INDEX8 = 4, VSIB_ELEMENT8 = 8 };

/* op.reg: data; op.rm: index vector; op.aux: mask register, elements, flags, each a byte. */
#define VSIB_MASK(aux) ((aux) & 0xff)
#define VSIB_ELEMENTS(aux) ((aux) >> 8 & 0xff)
#define VSIB_FLAGS(aux) ((aux) >> 16)

static bool vsib_mask(const struct fp *f, const struct op *op, unsigned n)
{
    unsigned m = VSIB_MASK(op->aux), size = VSIB_FLAGS(op->aux) & VSIB_ELEMENT8 ? 8 : 4;

    return VSIB_FLAGS(op->aux) & VSIB_K ? f->k[m] >> n & 1 : f->v[m][(n + 1) * size - 1] >> 7;
}

static void vsib_done(struct fp *f, const struct op *op, unsigned n)
{
    unsigned m = VSIB_MASK(op->aux), size = VSIB_FLAGS(op->aux) & VSIB_ELEMENT8 ? 8 : 4;

    if (VSIB_FLAGS(op->aux) & VSIB_K)
        f->k[m] &= ~BIT(n);
    else
        memset(f->v[m] + n * size, 0, size);
}

static u64 vsib_offset(const struct icpu *c, const struct op *op, unsigned n)
{
    const u8 *index = icpu_fp(c)->v[op->rm];
    s64 i;

    if (VSIB_FLAGS(op->aux) & VSIB_INDEX8) {
        memcpy(&i, index + 8 * n, 8);
    } else {
        s32 i32;

        memcpy(&i32, index + 4 * n, 4);
        i = i32;
    }
    return c->r[op->base] + ((u64)i << op->scale) + (u64)op->disp;
}

static int op_vsib(struct icpu *c, const struct op *op)
{
    struct fp *f = icpu_fp(c);
    unsigned flags = VSIB_FLAGS(op->aux), size = flags & VSIB_ELEMENT8 ? 8 : 4, elements = VSIB_ELEMENTS(op->aux), width;
    bool scatter = flags & VSIB_SCATTER;
    u64 la;

    if (fp_check_avx(c, flags & VSIB_K ? XCR0_AVX512 : XCR0_AVX))
        return OP_FAULT;
    for (unsigned n = 0; n < elements; n++) {
        u8 *row = f->v[op->reg] + n * size;

        if (!vsib_mask(f, op, n)) {
            vsib_done(f, op, n);
            continue;
        }
        if (element_linear(c, op, vsib_offset(c, op, n), size, scatter ? MMU_WRITE : MMU_READ, &la))
            return OP_FAULT;
        if (scatter ? lin_store_bytes(c, la, row, size) : lin_load_bytes(c, la, row, size))
            return OP_FAULT;
        vsib_done(f, op, n);
    }
    /* Everything above the elements is zero, of the mask too. */
    width = elements * size;
    if (!scatter)
        memset(f->v[op->reg] + width, 0, 64 - width);
    if (flags & VSIB_K)
        f->k[VSIB_MASK(op->aux)] = 0;
    else
        memset(f->v[VSIB_MASK(op->aux)], 0, 64);
    return OP_NEXT;
}

/* Index registers: an index that is also the destination or the mask is #UD; in EVEX, the mask may not be k0 (both checked by Zydis). */
int fp_bind_vsib(struct icpu *c UNUSED, const struct decoded *d, struct op *op)
{
    const ZydisDecodedInstruction *z = &d->insn;
    const ZydisDecodedOperand *mem = NULL, *data = NULL;
    unsigned mask = 0, flags = 0, esize, isize, elements;

    for (unsigned n = 0; n < z->operand_count; n++) {
        const ZydisDecodedOperand *o = &d->opnd[n];

        if (o->type == ZYDIS_OPERAND_TYPE_MEMORY)
            mem = o;
        else if (o->type != ZYDIS_OPERAND_TYPE_REGISTER)
            continue;
        else if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
            data = o;
        else
            mask = (u8)ZydisRegisterGetId(o->reg.value);
    }
    if (!mem || !data || mem->element_size < 32)
        return BIND_UD;
    esize = mem->element_size / 8;
    /* The D or Q before the data type in the mnemonic is the index size: opcodes 90, 92, A0, A2 have dword indices, 91, 93, A1, A3 qwords. */
    isize = z->opcode & 1 ? 8 : 4;
    elements = z->avx.vector_length / 8u / MAX(esize, isize);
    if (mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
        flags |= VSIB_SCATTER;
    if (z->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX)
        flags |= VSIB_K;
    if (isize == 8)
        flags |= VSIB_INDEX8;
    if (esize == 8)
        flags |= VSIB_ELEMENT8;
    op->reg = (u8)ZydisRegisterGetId(data->reg.value);
    op->rm = (u8)ZydisRegisterGetId(mem->mem.index);
    op->index = REG_ZERO;
    op->aux = flags << 16 | elements << 8 | mask;
    op->fn = op_vsib;
    return BIND_OK;
}

/* ---- MASKMOVDQU, MASKMOVQ ---- */

/* op.reg: data, op.rm: mask. Selected bytes go to DS:rDI; all are probed first. Without any, nothing is accessed. */
static int op_maskmov(struct icpu *c, const struct op *op)
{
    struct fp *f = icpu_fp(c);
    bool mmx = op->aux == FP_MMX;
    const u8 *data, *mask;
    u64 la;

    if (fp_check(c, (enum fp_class)op->aux))
        return OP_FAULT;
    if (mmx)
        fp_mmx_enter(f);
    data = mmx ? (const u8 *)&f->x87.st[op->reg & 7] : f->v[op->reg];
    mask = mmx ? (const u8 *)&f->x87.st[op->rm & 7] : f->v[op->rm];
    for (unsigned pass = 0; pass < 2; pass++) {
        for (unsigned n = 0; n < (mmx ? 8u : 16u); n++) {
            if (!(mask[n] & 0x80))
                continue;
            if (element_linear(c, op, c->r[RDI] + n, 1, MMU_WRITE, &la))
                return OP_FAULT;
            if (pass == 0 ? lin_probe(c, la, 1, MMU_WRITE) : lin_store(c, la, 1, data[n]))
                return OP_FAULT;
        }
    }
    return OP_NEXT;
}

int fp_bind_maskmov(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    const ZydisDecodedInstruction *z = &d->insn;

    if (!icpu_fp(c)->isa[z->meta.isa_set] || (arg == FP_AVX && (d->mode == IMODE_REAL16 || d->mode == IMODE_V86)))
        return BIND_UD;
    op->reg = (u8)ZydisRegisterGetId(d->opnd[0].reg.value);
    op->rm = (u8)ZydisRegisterGetId(d->opnd[1].reg.value);
    op->aux = arg;
    op->flags |= OPF_FP;
    for (unsigned n = 0; n < z->operand_count; n++) {
        if (d->opnd[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
            op->seg = (u8)(ZydisRegisterGetId(d->opnd[n].mem.segment) % SEGS);
    }
    op->asize = z->address_width / 8;
    op->fn = op_maskmov;
    return BIND_OK;
}
