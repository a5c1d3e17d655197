/*
 * Integer instructions that are copied, with other registers where theirs are not resident and another address where they have a memory operand; LEA.
 */
#include "cpu/bt/tr.h"
#include "cpu/interp/ops.h"

struct copy {
    const ZydisDecodedOperand *reg, *rm, *mem;                     /* ModRM.reg; ModRM.rm or the opcode's low bits; memory */
};

static struct copy copy_of(const struct decoded *d)
{
    struct copy k = { 0 };
    for (unsigned i = 0; i < d->insn.operand_count; i++) {
        const ZydisDecodedOperand *o = &d->opnd[i];
        if (o->type == ZYDIS_OPERAND_TYPE_MEMORY)
            k.mem = o;
        else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
            k.reg = o;
        else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM || o->encoding == ZYDIS_OPERAND_ENCODING_OPCODE))
            k.rm = o;
    }
    return k;
}

unsigned tr_gpr(const ZydisDecodedOperand *o)
{
    bool high;
    unsigned n = decode_gpr(o->reg.value, &high);
    return high ? n + 4 : n;
}

bool tr_is_high(const ZydisDecodedOperand *o)
{
    return o && o->reg.value >= ZYDIS_REGISTER_AH && o->reg.value <= ZYDIS_REGISTER_BH;
}

bool tr_needs_rex(const ZydisDecodedOperand *o)
{
    return o && o->reg.value >= ZYDIS_REGISTER_SPL && o->reg.value <= ZYDIS_REGISTER_DIL;
}

void tr_copy(struct tr *t, const struct decoded *d, unsigned reg, unsigned rm, const struct place *m, bool rex_wanted)
{
    struct emit *e = &t->e;
    const ZydisDecodedInstruction *z = &d->insn;
    unsigned op = z->raw.prefix_count, modrm = z->raw.modrm.offset, imm = z->length, rex;
    for (unsigned i = 0; i < z->raw.prefix_count; i++) {
        u8 v = z->raw.prefixes[i].value;
        bool used = v == 0x66 ? z->raw.prefixes[i].type != ZYDIS_PREFIX_TYPE_IGNORED : z->raw.prefixes[i].type == ZYDIS_PREFIX_TYPE_MANDATORY;
        if ((v == 0x66 || v == 0xf2 || v == 0xf3) && used)
            put8(e, v);
    }
    if (z->attributes & ZYDIS_ATTRIB_HAS_LOCK)
        put8(e, 0xf0);
    for (unsigned i = 0; i < 2; i++)
        if (z->raw.imm[i].size && z->raw.imm[i].offset < imm)
            imm = z->raw.imm[i].offset;
    rex = z->raw.rex.W ? 8u : 0u;
    rex |= m ? rex_bits(reg, m->base, m->index) : rex_bits(reg, rm, NO_REG);
    if (rex || rex_wanted)
        put8(e, 0x40 | rex);
    if (!modrm) {
        for (; op < imm - 1u; op++)
            put8(e, d->bytes[op]);
        put8(e, (d->bytes[op] & ~7u) | (rm & 7));                  /* the register is in the opcode's low bits */
    } else {
        put_bytes(e, d->bytes + op, modrm - op);
        if (m)
            put_mem(e, reg, m->base, m->index, m->scale, m->disp);
        else
            put8(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
    }
    put_bytes(e, d->bytes + imm, z->length - imm);
}

/* Instructions without ModRM and without a register in the opcode, whose registers are implied: CBW and its like, the accumulator with an immediate. */
static void put_implied(struct emit *e, const struct decoded *d)
{
    for (unsigned i = 0; i < d->insn.raw.prefix_count; i++)
        if (d->insn.raw.prefixes[i].value == 0x66 && d->insn.raw.prefixes[i].type != ZYDIS_PREFIX_TYPE_IGNORED) {
            put8(e, 0x66);
            break;
        }
    if (d->insn.raw.rex.W)
        put8(e, 0x48);
    put_bytes(e, d->bytes + d->insn.raw.prefix_count, d->insn.length - d->insn.raw.prefix_count);
}

/* A register operand on its way: guest number, host number, and whether the two differ. */
struct regop {
    const ZydisDecodedOperand *o;
    unsigned guest, host;
    bool moved;
};

static struct regop regop_of(const ZydisDecodedOperand *o, unsigned scratch)
{
    struct regop r = { o, 0, 0, false };
    if (!o)
        return r;
    r.guest = r.host = tr_gpr(o);
    if (!tr_is_high(o) && !tr_resident(r.guest)) {
        r.host = scratch;
        r.moved = true;
    }
    return r;
}

static bool written(const ZydisDecodedOperand *o)
{
    return o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
}

bool tr_plain(struct tr *t, const struct op *op)
{
    const struct decoded *d = &tr_item(t)->d;
    struct copy k = copy_of(d);
    struct place place;
    struct ea ea;
    unsigned free_reg = S0;
    if (k.mem) {
        enum mmu_access access = written(k.mem) ? MMU_WRITE : MMU_READ;
        unsigned want = regop_of(k.reg, S0).moved ? TR_SCRATCH : TR_NO_SCRATCH;
        if (!tr_ea(t, op, &ea) || !tr_mem(t, &ea, k.mem->size / 8, access, want, &place, &free_reg))
            return false;
    }
    struct regop reg = regop_of(k.reg, free_reg), rm = regop_of(k.rm, S1);
    bool rex = tr_needs_rex(k.reg) || tr_needs_rex(k.rm), high = tr_is_high(k.reg) || tr_is_high(k.rm);
    if (reg.moved && rm.moved && reg.guest == rm.guest)
        rm.host = reg.host;
    if (!k.reg)
        reg.host = d->insn.raw.modrm.reg;
    if (high && ((k.mem && (place.base >= 8 || place.index >= 8)) || rex || reg.host >= 8 || rm.host >= 8 || d->insn.raw.rex.W))
        return false;
    if (reg.moved && rm.moved && written(k.reg) && written(k.rm) && (reg.guest == RSP || rm.guest == RSP))
        return false;
    if (reg.moved)
        tr_load(t, reg.guest, reg.host);
    if (rm.moved && rm.host != reg.host)
        tr_load(t, rm.guest, rm.host);
    if (!d->insn.raw.modrm.offset && !k.rm)
        put_implied(&t->e, d);
    else
        tr_copy(t, d, reg.host, rm.host, k.mem ? &place : NULL, rex);
    if (reg.moved && written(k.reg))
        tr_write(t, reg.guest, reg.host);
    if (rm.moved && written(k.rm) && !(reg.moved && written(k.reg) && reg.host == rm.host))
        tr_write(t, rm.guest, rm.host);
    return true;
}
