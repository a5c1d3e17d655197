/*
 * One instruction: Zydis decodes it, this file turns the result into a struct op, and the table's row binds the handler.
 *
 * Zydis is told of the features that reuse opcodes of others (LZCNT, TZCNT) as the guest sees them; MPX and CET are off, so their opcodes in the NOP space
 * are NOPs. In 64-bit mode an operand-size prefix on a near branch is ignored, as Intel does (AMD does not; compilers never emit it).
 */
#include <string.h>

#include "cpu/interp/code.h"
#include "cpu/interp/fp.h"
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"
#include "cpu/interp/tlb.h"

void decode_init(struct icpu *c)
{
    static const struct {
        u8 machine, stack;
    } mode[] = {
        [IMODE_REAL16] = { ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16 },
        [IMODE_V86] = { ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16 },
        [IMODE_PROT16] = { ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16 },
        [IMODE_PROT32] = { ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32 },
        [IMODE_COMPAT16] = { ZYDIS_MACHINE_MODE_LONG_COMPAT_16, ZYDIS_STACK_WIDTH_16 },
        [IMODE_COMPAT32] = { ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32 },
        [IMODE_LONG64] = { ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64 },
    };
    const struct cpuid_policy *p = c->v->m->cpuid;
    for (unsigned i = 0; i < ARRAY_SIZE(mode); i++) {
        ZydisDecoder *d = &c->code->decoder[i];
        bug_on(ZYAN_FAILED(ZydisDecoderInit(d, mode[i].machine, mode[i].stack)));
        ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_MPX, false);
        ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_CET, false);
        ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_CLDEMOTE, false);
        ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_TZCNT, cpuid_has(p, CPU_BMI1));
        ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_LZCNT, cpuid_host(0x80000001, 0)->ecx & BIT(5));
    }
}

unsigned decode_gpr(ZydisRegister reg, bool *high)
{
    *high = false;
    if (reg >= ZYDIS_REGISTER_AL && reg <= ZYDIS_REGISTER_R15B) {  /* AL..BL, AH..BH, SPL..DIL, R8B..R15B */
        unsigned n = reg - ZYDIS_REGISTER_AL;
        *high = n >= 4 && n < 8;
        return n < 8 ? n & 3 : n - 4;
    }
    if (reg >= ZYDIS_REGISTER_AX && reg <= ZYDIS_REGISTER_R15W)
        return reg - ZYDIS_REGISTER_AX;
    if (reg >= ZYDIS_REGISTER_EAX && reg <= ZYDIS_REGISTER_R15D)
        return reg - ZYDIS_REGISTER_EAX;
    if (reg >= ZYDIS_REGISTER_RAX && reg <= ZYDIS_REGISTER_R15)
        return reg - ZYDIS_REGISTER_RAX;
    return REG_ZERO;
}

u8 op_gpr(ZydisRegister reg)
{
    bool high;
    unsigned n = decode_gpr(reg, &high);
    return (u8)(reg <= ZYDIS_REGISTER_R15B ? n * 8 + high : n);
}

static unsigned decode_seg(ZydisRegister reg)
{
    switch (reg) {
    case ZYDIS_REGISTER_ES: return SEG_ES;
    case ZYDIS_REGISTER_CS: return SEG_CS;
    case ZYDIS_REGISTER_SS: return SEG_SS;
    case ZYDIS_REGISTER_FS: return SEG_FS;
    case ZYDIS_REGISTER_GS: return SEG_GS;
    default: return SEG_DS;
    }
}

/* Vector index registers (VSIB) count as none: their handler adds them. */
static u8 decode_base(ZydisRegister reg)
{
    bool high;
    if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP)
        return REG_RIP;
    return (u8)decode_gpr(reg, &high);
}

static bool is_memory_operand(const ZydisDecodedOperand *o)
{
    return o->type == ZYDIS_OPERAND_TYPE_MEMORY &&
           (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM || o->encoding == ZYDIS_OPERAND_ENCODING_DISP16_32_64);
}

static void fill_memory(const struct decoded *d, const ZydisDecodedOperand *o, struct op *op)
{
    op->seg = (u8)decode_seg(o->mem.segment);
    op->base = decode_base(o->mem.base);
    op->index = decode_base(o->mem.index);
    op->scale = o->mem.scale ? (u8)__builtin_ctz(o->mem.scale) : 0;
    op->disp = o->mem.disp.value;
    /* SIB without base: Zydis 4.0 takes r13d for one when there are both an address-size prefix and REX.B. */
    if (op->asize == 4 && d->insn.raw.modrm.mod == 0 && d->insn.raw.modrm.rm == 4 && d->insn.raw.sib.base == 5) {
        op->base = REG_ZERO;
        op->disp = d->insn.raw.disp.value;
    }
    if (op->base == REG_RIP)
        op->disp += op->off + op->len;
    op->flags |= OPF_MEM;
    if (d->mode == IMODE_LONG64 && op->asize == 8 && op->seg < SEG_FS)
        op->flags |= OPF_FLAT;
}

static void fill_operands(const struct decoded *d, struct op *op)
{
    bool high, imm = false, implied = false;
    for (unsigned i = 0; i < d->insn.operand_count; i++) {
        const ZydisDecodedOperand *o = &d->opnd[i];
        if (is_memory_operand(o)) {
            fill_memory(d, o, op);
        } else if (o->type == ZYDIS_OPERAND_TYPE_MEMORY && !(op->flags & OPF_MEM)) {
            unsigned base = decode_base(o->mem.base);
            if (base == RSI || (!implied && base != RSP))
                op->seg = (u8)decode_seg(o->mem.segment);          /* string instructions: the operand that a prefix may override */
            implied = true;
        } else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG) {
            op->reg = (u8)decode_gpr(o->reg.value, &high);
            if (op->reg == REG_ZERO)
                op->reg = (u8)ZydisRegisterGetId(o->reg.value);
            op->flags |= high ? OPF_HIGH_REG : 0;
        } else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER &&
                   (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM || o->encoding == ZYDIS_OPERAND_ENCODING_OPCODE)) {
            op->rm = (u8)decode_gpr(o->reg.value, &high);
            if (op->rm == REG_ZERO)
                op->rm = (u8)ZydisRegisterGetId(o->reg.value);
            op->flags |= high ? OPF_HIGH_RM : 0;
        } else if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE && !imm) {
            op->imm = o->imm.value.u;
            imm = true;
        } else if (o->type == ZYDIS_OPERAND_TYPE_POINTER) {
            op->imm = o->ptr.offset;
            op->aux = o->ptr.segment;
        }
    }
}

enum form op_form(const struct decoded *d, struct op *op)
{
    const ZydisDecodedOperand *a = &d->opnd[0], *b = &d->opnd[1];
    bool second = d->insn.operand_count > 1 && b->visibility != ZYDIS_OPERAND_VISIBILITY_HIDDEN;
    op->size = (u8)(a->size / 8);
    if (a->type == ZYDIS_OPERAND_TYPE_MEMORY) {
        if (!second)
            return FORM_M;
        if (b->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
            return FORM_MI;
        op->reg = op_gpr(b->reg.value);
        return FORM_MR;
    }
    if (a->type != ZYDIS_OPERAND_TYPE_REGISTER)
        return FORM_NONE;
    op->rm = op_gpr(a->reg.value);
    if (!second)
        return FORM_R;
    if (b->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
        return FORM_RI;
    if (b->type == ZYDIS_OPERAND_TYPE_REGISTER) {
        op->reg = op_gpr(b->reg.value);
        return FORM_RR;
    }
    op->reg = op->rm;
    return FORM_RM;
}

static void fill_prefixes(const struct decoded *d, struct op *op)
{
    if (d->insn.attributes & ZYDIS_ATTRIB_HAS_LOCK)
        op->flags |= OPF_LOCK;
    if (d->insn.attributes & ZYDIS_ATTRIB_HAS_REX)
        op->flags |= OPF_REX;
    if (d->insn.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE))
        op->flags |= OPF_REP;
    if (d->insn.attributes & ZYDIS_ATTRIB_HAS_REPNE)
        op->flags |= OPF_REPNE;
}

static bool stores(const struct decoded *d)
{
    for (unsigned i = 0; i < d->insn.operand_count; i++)
        if (d->opnd[i].type == ZYDIS_OPERAND_TYPE_MEMORY && d->opnd[i].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
            return true;
    return false;
}

static int bind(struct icpu *c, const struct decoded *d, struct op *op)
{
    const struct insn *row = insn_row(d->insn.mnemonic);
    int r = row->bind ? row->bind(c, d, op, row->arg) : fp_bind(c, d, op, 0);
    if (r != BIND_UD)
        return r;
    op->fn = op_ud;
    return BIND_LAST;
}

/* What Zydis 4.0 knows and this processor does not: Knights Corner's VEX-coded POPCNT and its like; AMD has no register form of the prefetches. */
static bool foreign(const ZydisDecodedInstruction *z)
{
    if (z->meta.isa_ext == ZYDIS_ISA_EXT_KNC || z->meta.isa_ext == ZYDIS_ISA_EXT_KNCE || z->meta.isa_ext == ZYDIS_ISA_EXT_KNCV)
        return true;
    return z->meta.isa_set == ZYDIS_ISA_SET_PREFETCH_NOP && z->opcode == 0x0d && z->raw.modrm.mod == 3 && cpuid_host(0, 0)->ecx == 0x444d4163;
}

/* F3 90 with REX.B, which Zydis 4.0 calls PAUSE, is XCHG r8, rax: decoded without the F3. */
static int decode_xchg_r8(struct icpu *c, const ZydisDecodedInstruction *z, const u8 *bytes, unsigned off, struct op *op)
{
    u8 plain[ZYDIS_MAX_INSTRUCTION_LENGTH];
    unsigned n = 0;
    for (unsigned i = 0; i < z->length; i++)
        if (bytes[i] != 0xf3)
            plain[n++] = bytes[i];
    int r = decode_one(c, plain, n, off, op);
    op->len = z->length;
    return r;
}

/*
 * Opcodes that AMD's decoder rejects before it reads on, where Intel's would fetch a ModRM byte first: UD0, UD1, and two of VIA's that are not in use.
 * It matters when the instruction lies at the end of a page and the next one is absent.
 */
static bool rejected_early(const struct icpu *c, const u8 *bytes, unsigned n)
{
    unsigned i = 0;
    if (!guest_is_amd(c))
        return false;
    for (; i < n; i++) {
        bool prefix = bytes[i] == 0x66 || bytes[i] == 0x67 || bytes[i] == 0xf2 || bytes[i] == 0xf3 || (bytes[i] & 0xe7) == 0x26 ||
                      (bytes[i] & 0xfe) == 0x64 || (c->mode == IMODE_LONG64 && (bytes[i] & 0xf0) == 0x40);
        if (!prefix)
            break;
    }
    return n - i >= 2 && bytes[i] == 0x0f && (bytes[i + 1] == 0xff || bytes[i + 1] == 0xb9 || (bytes[i + 1] & 0xfe) == 0xa6);
}

int decode_one(struct icpu *c, const u8 *bytes, unsigned n, unsigned off, struct op *op)
{
    struct decoded d = { .bytes = bytes, .mode = c->mode };
    *op = (struct op){ .off = (u8)off, .base = REG_ZERO, .index = REG_ZERO, .seg = SEG_DS };
    ZyanStatus s = ZydisDecoderDecodeFull(&c->code->decoder[c->mode], bytes, n, &d.insn, d.opnd);
    if (s == ZYDIS_STATUS_NO_MORE_DATA && !rejected_early(c, bytes, n))
        return DECODE_MORE;
    if (ZYAN_FAILED(s)) {
        op->fn = s == ZYDIS_STATUS_INSTRUCTION_TOO_LONG ? op_too_long : op_ud;
        op->len = (u8)MIN(n, ZYDIS_MAX_INSTRUCTION_LENGTH);        /* all that may have led to this: a change of it is a change of the block */
        return BIND_LAST;
    }
    if (d.insn.mnemonic == ZYDIS_MNEMONIC_PAUSE && d.insn.attributes & ZYDIS_ATTRIB_HAS_REX && d.insn.raw.rex.B)
        return decode_xchg_r8(c, &d.insn, bytes, off, op);
    op->len = d.insn.length;
    if (foreign(&d.insn)) {
        op->fn = op_ud;
        return BIND_LAST;
    }
    op->size = (u8)(d.insn.operand_width / 8);
    op->asize = (u8)(d.insn.address_width / 8);
    fill_prefixes(&d, op);
    fill_operands(&d, op);
    if (stores(&d))
        op->flags |= OPF_STORES;
    return bind(c, &d, op);
}
