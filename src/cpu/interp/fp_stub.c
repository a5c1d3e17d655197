/*
 * Stubs: the guest's own x87, MMX, SSE or AVX instruction between loads and stores of the registers that it uses (encodings: Intel SDM vol. 2 chapter 2).
 *
 * A stub is a C function: rdi = struct fp, rsi = struct icpu, rdx = host address of the memory operand. Only caller-saved registers are touched and nothing is
 * pushed, so that a fault anywhere in it can be turned into a return. Vector registers keep their numbers; general registers that the instruction names are
 * renamed to rax, rcx, ... because RSP and callee-saved ones must not be; implicit ones (PCMPESTRI) keep theirs. The guest's MXCSR is live only
 * around the instruction itself, and upper vector halves are clean outside.
 *
 * Faults inside a stub arrive as signals (fp_signal.c), whose handler resumes at the arena's first code, the common exit: it returns the vector and the MXCSR.
 *
 * The arena is a memfd mapped twice, so that no page is both writable and executable. A new stub lies where this processor has fetched nothing
 * since the arena was reset, thousands of instructions ago, so no serializing instruction is needed (SDM vol. 3A 9.1.3).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "base/codemem.h"
#include "cpu/interp/fp.h"
#include "cpu/interp/fp_signal.h"

/* ---- bytes ---- */

struct emit {
    u8 *p, *end;
};

static void emit_u8(struct emit *e, unsigned b)
{
    bug_on(e->p == e->end);
    *e->p++ = (u8)b;
}

static void emit_bytes(struct emit *e, const void *b, size_t n)
{
    bug_on((size_t)(e->end - e->p) < n);
    memcpy(e->p, b, n);
    e->p += n;
}
#define EMIT(e, ...) emit_bytes(e, (const u8[]){__VA_ARGS__}, sizeof((u8[]){__VA_ARGS__}))

/* ModRM with a 32-bit displacement from a base that needs no SIB byte. */
static void emit_modrm_disp(struct emit *e, unsigned reg, unsigned base, size_t disp)
{
    u32 d = (u32)disp;

    emit_u8(e, 0x80 | (reg & 7) << 3 | (base & 7));
    emit_bytes(e, &d, 4);
}

/* mov between a 64-bit register and [base + disp]; opcode 8b loads, 89 stores */
static void emit_mov(struct emit *e, unsigned opcode, unsigned reg, unsigned base, size_t disp)
{
    EMIT(e, 0x48 | (reg >> 3) << 2 | base >> 3, opcode);
    emit_modrm_disp(e, reg, base, disp);
}

static void emit_mov_reg(struct emit *e, unsigned dst, unsigned src)
{
    if (dst != src)
        EMIT(e, 0x48 | (src >> 3) << 2 | dst >> 3, 0x89, 0xc0 | (src & 7) << 3 | (dst & 7));
}

/* A two-byte opcode (0F xx) with reg and [base + disp], optional mandatory prefix and REX.W */
static void emit_0f(struct emit *e, unsigned w, unsigned opcode, unsigned reg, unsigned base, size_t disp)
{
    unsigned rex = w << 3 | (reg >> 3) << 2 | base >> 3;

    if (rex)
        emit_u8(e, 0x40 | rex);
    EMIT(e, 0x0f, opcode);
    emit_modrm_disp(e, reg, base, disp);
}

/* movups/vmovups of 16, 32 or 64 bytes; opcode 10 loads, 11 stores */
static void emit_vmov(struct emit *e, bool vex, unsigned width, unsigned opcode, unsigned reg, unsigned base, size_t disp)
{
    unsigned r = !(reg & 8), b = !(base & 8);

    if (reg >= 16 || width == 64) {
        unsigned ll = width == 64 ? 2 : width == 32 ? 1 : 0;

        EMIT(e, 0x62, r << 7 | 0x40 | b << 5 | (unsigned)!(reg & 16) << 4 | 1, 0x7c, ll << 5 | 8, opcode);
    } else if (vex) {
        EMIT(e, 0xc4, r << 7 | 0x40 | b << 5 | 1, 0x78 | (width == 32) << 2, opcode);
    } else {
        emit_0f(e, 0, opcode, reg, base, disp);
        return;
    }
    emit_modrm_disp(e, reg, base, disp);
}

/* kmovq (kmovw without AVX512BW); opcode 90 loads, 91 stores */
static void emit_kmov(struct emit *e, const struct fp *f, unsigned opcode, unsigned k, unsigned base, size_t disp)
{
    EMIT(e, 0xc4, 0xc1 | (unsigned)!(base & 8) << 5, f->avx512bw ? 0xf8 : 0x78, opcode);
    emit_modrm_disp(e, k, base, disp);
}

/* ---- what an instruction uses ---- */

struct plan {
    bool vex;                                                      /* VEX or EVEX encoded */
    bool mxcsr, flags_in, flags_out;
    u8 vload[32], vstore[32];                                      /* bytes, 0: not */
    u8 kload, kstore, mmload, mmstore;                             /* bits by register number */
    u16 gload, gstore;                                             /* bits by guest register */
    u16 named;                                                     /* guest registers that the encoding names: these can be renamed */
    u8 host[16];                                                   /* where each guest register lives in the stub */
    u8 f, c, m;                                                    /* host registers: struct fp, struct icpu, memory operand */
    const ZydisDecodedOperand *mem;
    const ZydisDecodedOperand *gpr_reg, *gpr_rm, *gpr_vvvv;        /* operands that are general registers, by their place in the encoding */
};

static bool uses_mxcsr(const ZydisDecodedInstruction *i)
{
    switch (i->meta.exception_class) {
    case ZYDIS_EXCEPTION_CLASS_SSE2: case ZYDIS_EXCEPTION_CLASS_SSE3:
    case ZYDIS_EXCEPTION_CLASS_AVX2: case ZYDIS_EXCEPTION_CLASS_AVX3: case ZYDIS_EXCEPTION_CLASS_AVX11:
    case ZYDIS_EXCEPTION_CLASS_E2: case ZYDIS_EXCEPTION_CLASS_E2NF: case ZYDIS_EXCEPTION_CLASS_E3: case ZYDIS_EXCEPTION_CLASS_E3NF:
    case ZYDIS_EXCEPTION_CLASS_E11: case ZYDIS_EXCEPTION_CLASS_E11NF:
        return true;
    default:
        break;
    }
    switch (i->mnemonic) {                                         /* no exceptions, but denormals by MXCSR.DAZ */
    case ZYDIS_MNEMONIC_VRCP14PD: case ZYDIS_MNEMONIC_VRCP14PS: case ZYDIS_MNEMONIC_VRCP14SD: case ZYDIS_MNEMONIC_VRCP14SS:
    case ZYDIS_MNEMONIC_VFPCLASSPD: case ZYDIS_MNEMONIC_VFPCLASSPS: case ZYDIS_MNEMONIC_VFPCLASSSD: case ZYDIS_MNEMONIC_VFPCLASSSS:
    case ZYDIS_MNEMONIC_VRSQRT14PD: case ZYDIS_MNEMONIC_VRSQRT14PS: case ZYDIS_MNEMONIC_VRSQRT14SD: case ZYDIS_MNEMONIC_VRSQRT14SS:
        return true;
    default:
        return i->meta.category == ZYDIS_CATEGORY_CONVERT;         /* of which CVTPS2PI and its kin have no class */
    }
}

static unsigned reg_width(ZydisRegisterClass cls)
{
    return cls == ZYDIS_REGCLASS_XMM ? 16 : cls == ZYDIS_REGCLASS_YMM ? 32 : cls == ZYDIS_REGCLASS_ZMM ? 64 : 0;
}

static void plan_gpr(struct plan *p, const ZydisDecodedOperand *o, unsigned id, bool write)
{
    p->gload |= (u16)(1u << id);
    if (write)
        p->gstore |= (u16)(1u << id);
    if (o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN)
        return;
    p->named |= (u16)(1u << id);
    if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
        p->gpr_reg = o;
    else if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM)
        p->gpr_rm = o;
    else if (o->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD)
        p->gpr_vvvv = o;
}

static void plan_register(struct plan *p, const struct fp *f, const struct decoded *d, const ZydisDecodedOperand *o)
{
    ZydisRegisterClass cls = ZydisRegisterGetClass(o->reg.value);
    unsigned id = (unsigned)(u8)ZydisRegisterGetId(o->reg.value);
    bool write = o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    bool masked = d->insn.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX && d->insn.avx.mask.reg != ZYDIS_REGISTER_K0;
    /* A legacy SSE instruction leaves what it does not write, and a merging mask too: then the old value comes along. */
    bool read = (o->actions & (ZYDIS_OPERAND_ACTION_MASK_READ | ZYDIS_OPERAND_ACTION_CONDWRITE)) || !p->vex || masked;

    switch (cls) {
    case ZYDIS_REGCLASS_XMM: case ZYDIS_REGCLASS_YMM: case ZYDIS_REGCLASS_ZMM:
        if (read)
            p->vload[id & 31] = (u8)MAX(p->vload[id & 31], reg_width(cls));
        if (write)
            p->vstore[id & 31] = !p->vex ? 16 : f->avx512 ? 64 : 32; /* VEX and EVEX clear up to the full width */
        break;
    case ZYDIS_REGCLASS_MASK:
        if (o->encoding == ZYDIS_OPERAND_ENCODING_MASK && id == 0)
            break;                                                 /* EVEX.aaa = 0: no mask */
        if (read)
            p->kload |= (u8)(1u << (id & 7));
        if (write)
            p->kstore |= (u8)(1u << (id & 7));
        if (write && d->insn.meta.category == ZYDIS_CATEGORY_AVX512_VP2INTERSECT)
            p->kstore |= (u8)(3u << (id & 6));                     /* a pair of mask registers */
        break;
    case ZYDIS_REGCLASS_MMX:
        p->mmload |= (u8)(1u << (id & 7));
        if (write)
            p->mmstore |= (u8)(1u << (id & 7));
        break;
    case ZYDIS_REGCLASS_GPR8: case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64:
        plan_gpr(p, o, id & 15, write);
        break;
    default:
        break;
    }
}

/* Chooses host registers: first the implicit ones, which cannot move, then named ones, the memory pointer (low, so that it needs no REX), the two structs. */
static void plan_hosts(struct plan *p)
{
    static const u8 low[] = {RAX, RCX, RDX, RSI, RDI}, structs[] = {RDI, RSI, R8, R9, R10, R11};
    u32 used = 0, todo = p->named;

    for (unsigned r = 0; r < 16; r++) {
        if ((p->gload & ~p->named) & 1u << r) {
            p->host[r] = (u8)r;
            used |= 1u << r;
            bug_on(!(BIT(r) & (BIT(RAX) | BIT(RCX) | BIT(RDX))));
        }
    }
    for (unsigned r = 0; r < 16; r++) {
        for (unsigned i = 0; (todo & 1u << r) && i < ARRAY_SIZE(low); i++) {
            if (used & 1u << low[i])
                continue;
            p->host[r] = low[i];
            used |= 1u << low[i];
            todo &= ~(1u << r);
        }
    }
    bug_on(todo);
    if (p->mem) {
        p->m = used & 1u << RDX ? RCX : RDX;
        for (unsigned i = 0; (used & 1u << p->m) && i < ARRAY_SIZE(low); i++)
            p->m = low[i];
        bug_on(used & 1u << p->m);
        used |= 1u << p->m;
    }
    p->f = used & 1u << RDI ? R8 : RDI;
    used |= 1u << p->f;
    for (unsigned i = 1; i < ARRAY_SIZE(structs); i++) {
        p->c = structs[i];
        if (!(used & 1u << p->c))
            break;
    }
}

static void plan_make(struct plan *p, const struct fp *f, const struct decoded *d, enum fp_class cls)
{
    const ZydisDecodedInstruction *i = &d->insn;

    *p = (struct plan){.vex = i->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX || i->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX};
    p->mxcsr = cls != FP_X87 && uses_mxcsr(i);
    if (i->cpu_flags) {
        const ZydisAccessedFlags *a = i->cpu_flags;

        p->flags_out = (a->modified | a->set_0 | a->set_1 | a->undefined) & FLAGS_ARITH;
        p->flags_in = a->tested & FLAGS_ARITH;
    }
    for (unsigned n = 0; n < i->operand_count; n++) {
        const ZydisDecodedOperand *o = &d->opnd[n];

        if (o->type == ZYDIS_OPERAND_TYPE_MEMORY)
            p->mem = o;
        else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER)
            plan_register(p, f, d, o);
    }
    plan_hosts(p);
    if (cls == FP_X87) {                                           /* the arguments stay where they are */
        p->f = RDI;
        p->c = RSI;
        p->m = RDX;
    }
}

/* ---- the instruction itself, for a host in 64-bit mode ---- */

static void put_legacy(struct emit *e, const struct plan *p, const struct decoded *d)
{
    const ZydisDecodedInstruction *i = &d->insn;
    unsigned rex = 0, seen = 0, body = i->raw.prefix_count, end = i->raw.modrm.offset ? i->raw.modrm.offset : i->length;

    for (unsigned n = 0; n < i->raw.prefix_count; n++) {
        u8 v = i->raw.prefixes[n].value;
        unsigned bit = v == 0x66 ? 1 : v == 0xf2 ? 2 : v == 0xf3 ? 4 : 0;

        if (bit & ~seen)
            emit_u8(e, v);
        seen |= bit;
    }
    if (i->attributes & ZYDIS_ATTRIB_HAS_REX) {
        rex = 0x40u | i->raw.rex.W << 3;
        if (!p->gpr_reg)
            rex |= (unsigned)i->raw.rex.R << 2;
        if (!p->mem && !p->gpr_rm)
            rex |= i->raw.rex.B;
    }
    if (rex)
        emit_u8(e, rex);
    emit_bytes(e, d->bytes + body, end - body);
}

/* Always the three-byte form. Outside 64-bit mode the high register bits are ignored or fixed, and W where it would choose a 64-bit general register. */
static void put_vex(struct emit *e, const struct plan *p, const struct decoded *d)
{
    const u8 *b = d->bytes + d->insn.raw.vex.offset;
    bool two = b[0] == 0xc5, wide = d->mode == IMODE_LONG64;
    unsigned rxbm = two ? (b[1] & 0x80) | 0x61 : b[1];
    unsigned wvlp = two ? b[1] & 0x7f : b[2];

    if (!wide) {
        rxbm |= 0xe0;
        wvlp |= 0x40;
        if (p->named)
            wvlp &= 0x7f;
    }
    if (p->mem || p->gpr_rm)
        rxbm |= 0x60;
    if (p->gpr_reg)
        rxbm |= 0x80;
    if (p->gpr_vvvv)
        wvlp = (wvlp & ~0x78u) | (~(unsigned)p->host[(u8)ZydisRegisterGetId(p->gpr_vvvv->reg.value) & 15] & 15) << 3;
    EMIT(e, 0xc4, rxbm, wvlp, d->insn.opcode);
}

static void put_evex(struct emit *e, const struct plan *p, const struct decoded *d)
{
    const u8 *b = d->bytes + d->insn.raw.evex.offset;
    unsigned p0 = b[1], p1 = b[2], p2 = b[3];

    if (d->mode != IMODE_LONG64) {
        p0 |= 0xf0;
        p1 |= 0x40;
        p2 |= 0x08;
        if (p->named)
            p1 &= 0x7f;
    }
    if (p->mem || p->gpr_rm)
        p0 |= 0x60;
    if (p->gpr_reg)
        p0 |= 0x90;
    EMIT(e, 0x62, p0, p1, p2, d->insn.opcode);
}

static void put_insn(struct emit *e, const struct plan *p, const struct decoded *d)
{
    const ZydisDecodedInstruction *i = &d->insn;
    unsigned reg = i->raw.modrm.reg, rm = i->raw.modrm.rm, tail;

    if (i->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX)
        put_evex(e, p, d);
    else if (i->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
        put_vex(e, p, d);
    else
        put_legacy(e, p, d);
    if (!i->raw.modrm.offset)
        return;
    if (p->gpr_reg)
        reg = p->host[(u8)ZydisRegisterGetId(p->gpr_reg->reg.value) & 15];
    if (p->gpr_rm)
        rm = p->host[(u8)ZydisRegisterGetId(p->gpr_rm->reg.value) & 15];
    emit_u8(e, p->mem ? reg << 3 | p->m : 0xc0 | reg << 3 | rm);
    tail = i->raw.modrm.offset + 1u + (i->raw.sib.offset != 0) + i->raw.disp.size / 8u;
    emit_bytes(e, d->bytes + tail, i->length - tail);
    for (unsigned n = 0; n < i->operand_count; n++) {              /* a register in the last immediate's high bits: 3 bits outside 64-bit mode */
        if (d->opnd[n].encoding == ZYDIS_OPERAND_ENCODING_IS4 && d->mode != IMODE_LONG64)
            e->p[-1] &= 0x7f;
    }
}

/* ---- stubs ---- */

#define OFF_V(r)  (offsetof(struct fp, v) + 64u * (r))
#define OFF_K(r)  (offsetof(struct fp, k) + 8u * (r))
#define OFF_MM(r) (offsetof(struct fp, x87.st) + 16u * (r))
#define OFF_R(r)  (offsetof(struct icpu, r) + 8u * (r))

static void stub_loads(struct emit *e, const struct fp *f, const struct plan *p)
{
    for (unsigned r = 0; r < 32; r++) {
        if (p->vload[r])
            emit_vmov(e, p->vex, p->vload[r], 0x10, r, p->f, OFF_V(r));
    }
    for (unsigned r = 0; r < 8; r++) {
        if (p->kload & 1u << r)
            emit_kmov(e, f, 0x90, r, p->f, OFF_K(r));
        if (p->mmload & 1u << r)
            emit_0f(e, 0, 0x6f, r, p->f, OFF_MM(r));
    }
    for (unsigned r = 0; r < 16; r++) {
        if (p->gload & 1u << r)
            emit_mov(e, 0x8b, p->host[r], p->c, OFF_R(r));
    }
}

static void stub_flags_out(struct emit *e, const struct plan *p)
{
    EMIT(e, 0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb7, 0xc0);             /* lahf; seto al; movzx eax, ax */
    if (p->c >= 8)
        emit_u8(e, 0x41);
    emit_u8(e, 0x89);                                              /* mov [c + fl], eax */
    emit_modrm_disp(e, RAX, p->c, offsetof(struct icpu, fl));
}

static void stub_stores(struct emit *e, const struct fp *f, const struct plan *p)
{
    for (unsigned r = 0; r < 32; r++) {
        if (p->vstore[r])
            emit_vmov(e, p->vex, p->vstore[r], 0x11, r, p->f, OFF_V(r));
    }
    for (unsigned r = 0; r < 8; r++) {
        if (p->kstore & 1u << r)
            emit_kmov(e, f, 0x91, r, p->f, OFF_K(r));
        if (p->mmstore & 1u << r) {
            emit_0f(e, 0, 0x7f, r, p->f, OFF_MM(r));
            if (p->f >= 8)
                EMIT(e, 0x66, 0x41, 0xc7);
            else
                EMIT(e, 0x66, 0xc7);                               /* mov word [f + exponent], 0xffff */
            emit_modrm_disp(e, 0, p->f, OFF_MM(r) + 8);
            EMIT(e, 0xff, 0xff);
        }
    }
    for (unsigned r = 0; r < 16; r++) {
        if (p->gstore & 1u << r)
            emit_mov(e, 0x89, p->host[r], p->c, OFF_R(r));
    }
    if (p->flags_out)
        stub_flags_out(e, p);
}

static void stub_vector(struct emit *e, const struct fp *f, const struct plan *p, const u8 *insn, unsigned len)
{
    emit_mov_reg(e, p->f, RDI);
    emit_mov_reg(e, p->c, RSI);
    if (p->mem)
        emit_mov_reg(e, p->m, RDX);
    stub_loads(e, f, p);
    if (p->mxcsr)
        emit_0f(e, 0, 0xae, 2, p->f, offsetof(struct fp, mxcsr));  /* ldmxcsr */
    emit_bytes(e, insn, len);
    if (p->mxcsr) {
        emit_0f(e, 0, 0xae, 3, p->f, offsetof(struct fp, mxcsr));  /* stmxcsr */
        emit_0f(e, 0, 0xae, 2, p->f, offsetof(struct fp, host_mxcsr));
    }
    stub_stores(e, f, p);
    if (p->vex)
        EMIT(e, 0xc5, 0xf8, 0x77);                                 /* vzeroupper */
    if (p->mmload | p->mmstore)
        EMIT(e, 0x0f, 0x77);                                       /* emms: the ABI wants an empty x87 stack */
    EMIT(e, 0x31, 0xc0, 0xc3);                                     /* xor eax, eax; ret */
}

/* The whole x87 state comes and goes: its registers are a stack. FXSAVE and FXRSTOR take two thirds of XSAVE's and XRSTOR's time. */
static void stub_x87(struct emit *e, const struct plan *p, const u8 *insn, unsigned len)
{
    size_t image = offsetof(struct fp, x87);

    emit_0f(e, 1, 0xae, 1, RDI, image);                            /* fxrstor64 */
    if (p->flags_in) {
        emit_u8(e, 0x8b);                                          /* mov eax, [c + fl] */
        emit_modrm_disp(e, RAX, RSI, offsetof(struct icpu, fl));
        EMIT(e, 0x04, 0x7f, 0x9e);                                 /* add al, 0x7f (overflows if bit 0 is set); sahf */
    }
    emit_bytes(e, insn, len);
    if (p->flags_out)
        stub_flags_out(e, p);
    emit_0f(e, 1, 0xae, 0, RDI, image);                            /* fxsave64 */
    EMIT(e, 0xdb, 0xe3, 0x31, 0xc0, 0xc3);                         /* fninit; xor eax, eax; ret */
}

/* Where a fault inside a stub continues, with the vector in rax: the MXCSR of that moment goes into the upper half. */
static void stub_fault_exit(struct emit *e, const struct fp *f)
{
    EMIT(e, 0x0f, 0xae, 0x5c, 0x24, 0xf8);                         /* stmxcsr [rsp - 8] */
    EMIT(e, 0x8b, 0x4c, 0x24, 0xf8);                               /* mov ecx, [rsp - 8] */
    EMIT(e, 0x48, 0xc1, 0xe1, 0x20, 0x48, 0x09, 0xc8);             /* shl rcx, 32; or rax, rcx */
    EMIT(e, 0xc7, 0x44, 0x24, 0xf8, MXCSR_RESET & 0xff, MXCSR_RESET >> 8, 0, 0); /* mov dword [rsp - 8], reset value */
    EMIT(e, 0x0f, 0xae, 0x54, 0x24, 0xf8);                         /* ldmxcsr [rsp - 8] */
    if (f->avx)
        EMIT(e, 0xc5, 0xf8, 0x77);
    EMIT(e, 0xdb, 0xe3, 0xc3);                                     /* fninit; ret */
}

static u32 key_hash(const u8 *key, unsigned len)
{
    u32 h = 2166136261u;

    for (unsigned n = 0; n < len; n++)
        h = (h ^ key[n]) * 16777619u;
    return (h ^ h >> 15) % FP_BUCKETS;
}

struct fp_insn *fp_stub_make(struct fp *f, const struct decoded *d, enum fp_class cls)
{
    struct plan p;
    u8 key[FP_KEY_MAX];
    struct emit k = {key, key + sizeof key}, e;
    unsigned head, len;
    struct fp_insn **bucket, *i;

    plan_make(&p, f, d, cls);
    EMIT(&k, cls, p.gpr_reg ? ZydisRegisterGetId(p.gpr_reg->reg.value) : 0xff, p.gpr_rm ? ZydisRegisterGetId(p.gpr_rm->reg.value) : 0xff);
    head = (unsigned)(k.p - key);
    put_insn(&k, &p, d);
    len = (unsigned)(k.p - key);

    bucket = &f->hash[key_hash(key, len)];
    for (i = *bucket; i; i = i->next) {
        if (i->key_len == len && !memcmp(i->key, key, len))
            return i;
    }
    bug_on(f->insns == FP_INSNS);                                  /* the core asks fp_full() before each block */
    i = &f->insn[f->insns++];
    *i = (struct fp_insn){.next = *bucket, .cls = (u8)cls, .align = 1, .key_len = (u8)len};
    memcpy(i->key, key, len);
    e = (struct emit){f->arena_rw + f->arena_used, f->arena_rw + FP_ARENA_BYTES};
    i->code = (u64(*)(struct fp *, struct icpu *, void *))(void *)(f->arena_rx + f->arena_used);
    if (cls == FP_X87)
        stub_x87(&e, &p, key + head, len - head);
    else
        stub_vector(&e, f, &p, key + head, len - head);
    f->arena_used = ALIGN_UP((size_t)(e.p - f->arena_rw), 16);
    *bucket = i;
    return i;
}

/* ---- the arena ---- */

void fp_stub_here(const struct fp *f)
{
    fp_signal_here(f->arena_rx, f->arena_rx + FP_ARENA_BYTES);
}

int fp_stub_open(struct fp *f)
{
    struct emit e;

    if (codemem_map("doppel-stubs", FP_ARENA_BYTES, &f->arena_rw, &f->arena_rx) < 0)
        return err(-ENOMEM, "no executable memory for the interpreter (%llu KiB); check the memory limit, or SELinux's execmem", FP_ARENA_BYTES / KiB);
    f->insn = calloc(FP_INSNS, sizeof *f->insn);
    if (!f->insn) {
        codemem_unmap(f->arena_rw, f->arena_rx, FP_ARENA_BYTES);
        return err(-ENOMEM, "out of memory for the interpreter's tables");
    }
    e = (struct emit){f->arena_rw, f->arena_rw + FP_ARENA_BYTES};
    stub_fault_exit(&e, f);
    f->arena_first = ALIGN_UP((size_t)(e.p - f->arena_rw), 64);
    fp_stub_reset(f);
    fp_signal_open();
    return 0;
}

void fp_stub_reset(struct fp *f)
{
    f->arena_used = f->arena_first;
    f->insns = 0;
    memset(f->hash, 0, sizeof f->hash);
}

void fp_stub_close(struct fp *f)
{
    fp_signal_close(f->arena_rx);
    codemem_unmap(f->arena_rw, f->arena_rx, FP_ARENA_BYTES);
    free(f->insn);
}
