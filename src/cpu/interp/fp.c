/*
 * MMX, SSE, AVX and AVX-512 instructions: which exist for this guest, when they are #UD, #NM, #MF or #XM, and their memory operands
 * (Intel SDM vol. 2 tables 2-17 to 2-32 "exception classes", vol. 3A table 2-2, chapters 13 and 14).
 *
 * A memory operand in plain RAM inside one page is used in place, so alignment faults are the processor's own. Any other passes through a bounce buffer with the
 * same address modulo 64; a store is probed before the instruction runs, so that its fault finds everything unchanged.
 *
 * Not modelled: CR0.NE = 0 sends x87 errors to a FERR# pin that nobody watches (fp_x87.c).
 */
#include <errno.h>
#include <string.h>

#include "cpu/cpuid.h"
#include "cpu/interp/access.h"
#include "cpu/interp/fp.h"

/* ---- which instruction sets the guest has ---- */

enum { EAX, EBX, ECX, EDX };
struct isa_feature {
    u16 isa;
    u8 sub, reg, bit;
    u32 leaf;
};
#define F1(isa, reg, bit) {ZYDIS_ISA_SET_##isa, 0, reg, bit, 1}
#define F7(isa, reg, bit) {ZYDIS_ISA_SET_##isa, 0, reg, bit, 7}
#define F71(isa, reg, bit) {ZYDIS_ISA_SET_##isa, 1, reg, bit, 7}
#define FVL(isa) F7(isa##_128, EBX, 31), F7(isa##_256, EBX, 31)
#define F512(isa, reg, bit) F7(isa##_128, reg, bit), F7(isa##_256, reg, bit), F7(isa##_512, reg, bit), FVL(isa), F7(isa##_512, EBX, 16)

/* Several rows for one set: all are needed. Sets without a row do not exist here. */
static const struct isa_feature isa_features[] = {
    F1(X87, EDX, 0), F1(FCMOV, EDX, 15), F1(FCMOV, EDX, 0), F1(PPRO, EDX, 15), F1(PENTIUMMMX, EDX, 23), F1(FXSAVE, EDX, 24), F1(FXSAVE64, EDX, 24),
    F1(SSE, EDX, 25), F1(SSEMXCSR, EDX, 25), F1(SSE2, EDX, 26), F1(SSE2MMX, EDX, 26), F1(SSE3, ECX, 0), F1(SSE3X87, ECX, 0),
    F1(SSSE3, ECX, 9), F1(SSSE3MMX, ECX, 9), F1(SSE4, ECX, 19), F1(SSE42, ECX, 20), {ZYDIS_ISA_SET_SSE4A, 0, ECX, 6, 0x80000001},
    F1(AES, ECX, 25), F1(PCLMULQDQ, ECX, 1), F7(SHA, EBX, 29), F7(GFNI, ECX, 8),
    F1(XSAVE, ECX, 26), {ZYDIS_ISA_SET_XSAVEOPT, 1, EAX, 0, 13}, {ZYDIS_ISA_SET_XSAVEC, 1, EAX, 1, 13}, {ZYDIS_ISA_SET_XSAVES, 1, EAX, 3, 13},
    F7(PKU, ECX, 3),

    F1(AVX, ECX, 28), F1(AVXAES, ECX, 28), F1(AVXAES, ECX, 25), F1(F16C, ECX, 29), F1(FMA, ECX, 12), F7(AVX2, EBX, 5), F7(AVX2GATHER, EBX, 5),
    F7(VAES, ECX, 9), F7(VPCLMULQDQ, ECX, 10), F7(AVX_GFNI, ECX, 8), F1(AVX_GFNI, ECX, 28), F71(AVX_VNNI, EAX, 4),

    F512(AVX512F, EBX, 16), F7(AVX512F_128N, EBX, 16), F7(AVX512F_KOP, EBX, 16), F7(AVX512F_SCALAR, EBX, 16),
    F512(AVX512BW, EBX, 30), F7(AVX512BW_128N, EBX, 30), F7(AVX512BW_KOP, EBX, 30),
    F512(AVX512DQ, EBX, 17), F7(AVX512DQ_128N, EBX, 17), F7(AVX512DQ_KOP, EBX, 17), F7(AVX512DQ_SCALAR, EBX, 17),
    F512(AVX512CD, EBX, 28), F512(AVX512_IFMA, EBX, 21), F512(AVX512_VBMI, ECX, 1), F512(AVX512_VBMI2, ECX, 6), F512(AVX512_VNNI, ECX, 11),
    F512(AVX512_BITALG, ECX, 12), F512(AVX512_VPOPCNTDQ, ECX, 14), F512(AVX512_VP2INTERSECT, EDX, 8),
    F512(AVX512_GFNI, ECX, 8), F512(AVX512_VAES, ECX, 9), F512(AVX512_VPCLMULQDQ, ECX, 10),
    F71(AVX512_BF16_128, EAX, 5), F71(AVX512_BF16_256, EAX, 5), F71(AVX512_BF16_512, EAX, 5), FVL(AVX512_BF16),
    F512(AVX512_FP16, EDX, 23), F7(AVX512_FP16_128N, EDX, 23), F7(AVX512_FP16_SCALAR, EDX, 23),
};

static void isa_open(struct icpu *c, struct fp *f)
{
    struct cpuid_regs r;
    u32 leaf = ~0u, sub = 0, *reg[] = {&r.eax, &r.ebx, &r.ecx, &r.edx};

    for (unsigned n = 0; n < ARRAY_SIZE(isa_features); n++)
        f->isa[isa_features[n].isa] = true;
    for (unsigned n = 0; n < ARRAY_SIZE(isa_features); n++) {
        const struct isa_feature *i = &isa_features[n];

        if (i->leaf != leaf || i->sub != sub)
            cpuid_get(c->v->m->cpuid, c->v->id, c->x, true, leaf = i->leaf, sub = i->sub, &r);
        if (!(*reg[i->reg] >> i->bit & 1))
            f->isa[i->isa] = false;
    }
}

/* Where processors differ in what the x87 pointers show. */
static void pointers_open(struct icpu *c, struct fp *f)
{
    struct cpuid_regs r;

    cpuid_get(c->v->m->cpuid, c->v->id, c->x, true, 7, 0, &r);
    f->fdp_on_error = r.ebx >> 6 & 1;
    f->no_selectors = r.ebx >> 13 & 1;
    cpuid_get(c->v->m->cpuid, c->v->id, c->x, true, 0, 0, &r);
    f->fop_on_error = r.ebx == 0x756e6547;                         /* "Genu"ineIntel */
    f->save_on_error = r.ebx == 0x68747541 || r.ebx == 0x6f677948; /* "Auth"enticAMD, "Hygo"nGenuine */
}

int fp_open(struct icpu *c)
{
    struct fp *f = NULL;
    int rc;

    if (posix_memalign((void **)&f, 64, sizeof *f))
        return err(-ENOMEM, "out of memory for the interpreter's floating-point state");
    memset(f, 0, sizeof *f);
    f->host_mxcsr = f->mxcsr = MXCSR_RESET;
    f->x87.mxcsr = MXCSR_RESET;
    f->avx = cpuid_host_has(CPU_AVX);
    f->avx512 = cpuid_host_has(CPU_AVX512F);
    f->avx512bw = cpuid_host_has(CPU_AVX512BW);
    f->xinuse = cpuid_host_has(CPU_XGETBV1);
    isa_open(c, f);
    pointers_open(c, f);
    fp_xsave_open(c, f);
    rc = fp_stub_open(f);
    if (rc < 0) {
        free(f);
        return rc;
    }
    c->fp = f;
    return 0;
}

void fp_close(struct icpu *c)
{
    struct fp *f = icpu_fp(c);

    if (!f)
        return;
    fp_stub_close(f);
    free(f);
    c->fp = NULL;
}

void fp_flush_stubs(struct icpu *c)
{
    fp_stub_reset(icpu_fp(c));
}

bool fp_full(const struct icpu *c)
{
    const struct fp *f = c->fp;

    return f->insns > FP_INSNS - 128 || f->arena_used > FP_ARENA_BYTES - 64 * KiB;
}

/* ---- when they may run ---- */

int fp_deny(struct icpu *c, enum fp_class cls)
{
    const struct x86 *x = c->x;
    const struct fp *f = icpu_fp(c);
    u64 need = cls == FP_AVX512 ? XCR0_AVX512 : XCR0_AVX;
    bool ud = cls == FP_SSE ? (x->cr0 & CR0_EM) || !(x->cr4 & CR4_OSFXSR)
              : cls == FP_MMX ? (x->cr0 & CR0_EM) != 0
              : cls == FP_X87 ? false : !(x->cr4 & CR4_OSXSAVE) || (x->xcr0 & need) != need;

    if (ud)
        return fault_ud(c);
    if ((x->cr0 & CR0_TS) || (cls == FP_X87 && (x->cr0 & CR0_EM)))
        return fault_raise(c, VEC_NM);
    if ((cls == FP_MMX || cls == FP_X87) && (f->x87.fsw & FSW_ES) && (x->cr0 & CR0_NE))
        return fault_raise(c, VEC_MF);
    return 0;
}

int fp_stub_fault(struct icpu *c, u64 result)
{
    unsigned vector = (u32)result;

    if (vector != VEC_XM)
        return vector == VEC_GP ? fault_gp(c, 0) : fault_raise(c, vector);
    icpu_fp(c)->mxcsr = (u32)(result >> 32);                       /* the flags say which exception it was */
    return fault_raise(c, c->x->cr4 & CR4_OSXMMEXCPT ? VEC_XM : VEC_UD);
}

/* ---- handlers ---- */

/* Runs the stub. MMX instructions change TOP and the tags even before they execute; #GP takes that back, #XM does not. */
static inline __attribute__((always_inline)) int execute(struct icpu *c, const struct fp_insn *i, void *mem, bool mmx)
{
    struct fp *f = icpu_fp(c);
    u16 fsw = f->x87.fsw;
    u8 ftw = f->x87.ftw;
    u64 r;

    if (mmx) {
        f->x87_uses++;
        fp_mmx_enter(f);
    }
    r = i->code(f, c, mem);
    if (likely(!r))
        return OP_NEXT;
    if (mmx && (u32)r != VEC_XM)
        fp_mmx_undo(f, fsw, ftw);
    return fp_stub_fault(c, r);
}

/* The memory operand is not one piece of RAM that may be touched directly. */
static int bounce(struct icpu *c, const struct fp_insn *i, u64 la)
{
    struct fp *f = icpu_fp(c);
    u8 *p = f->bounce + (la & 63);

    if ((la & (i->align - 1u)) && !(f->mxcsr & MXCSR_MM))
        return fault_gp(c, 0);
    if (i->writes && lin_probe(c, la, i->bytes, MMU_WRITE))
        return OP_FAULT;
    if ((!i->writes || i->merges) && lin_load_bytes(c, la, p, i->bytes))
        return OP_FAULT;
    if (execute(c, i, p, i->cls == FP_MMX))
        return OP_FAULT;
    return i->writes ? lin_store_bytes(c, la, p, i->bytes) : OP_NEXT;
}

static inline __attribute__((always_inline)) int check(struct icpu *c, const struct fp_insn *i, enum fp_class cls)
{
    int rc = fp_check(c, cls);

    return cls == FP_MMX && !rc && i->xmm ? fp_check_sse(c) : rc;
}

static inline __attribute__((always_inline)) int run_reg(struct icpu *c, const struct op *op, enum fp_class cls)
{
    const struct fp_insn *i = op->ptr;

    return unlikely(check(c, i, cls)) ? OP_FAULT : execute(c, i, NULL, cls == FP_MMX);
}

/* Not in the TLB's fast view. Misalignment of operands that must be aligned comes before a bad address. */
static int slow_mem(struct icpu *c, const struct op *op, const struct fp_insn *i, enum mmu_access access)
{
    void *p;
    u64 la;

    if (mem_linear(c, op, i->bytes, access, &la)) {
        bool misaligned = fp_offset_in_line(c, op) & (i->align - 1u);

        return misaligned && !(icpu_fp(c)->mxcsr & MXCSR_MM) ? fault_gp(c, 0) : OP_FAULT;
    }
    if (fp_ac_armed(c) && i->align == 1 && (la & (i->unit - 1u)))
        return fault_raise_error(c, VEC_AC, 0);
    p = lin_host(c, la, i->bytes, access);
    return p ? execute(c, i, p, i->cls == FP_MMX) : bounce(c, i, la);
}

static inline __attribute__((always_inline)) int run_mem(struct icpu *c, const struct op *op, enum fp_class cls, enum mmu_access access)
{
    const struct fp_insn *i = op->ptr;
    void *p;

    if (unlikely(check(c, i, cls)))
        return OP_FAULT;
    p = op_hit(c, op, i->bytes, access);
    return likely(p) ? execute(c, i, p, cls == FP_MMX) : slow_mem(c, op, i, access);
}

#define HANDLERS(name, cls)                                                                           \
    static int op_##name##_reg(struct icpu *c, const struct op *op)                                   \
    {                                                                                                 \
        return run_reg(c, op, cls);                                                                   \
    }                                                                                                 \
    static int op_##name##_load(struct icpu *c, const struct op *op)                                  \
    {                                                                                                 \
        return run_mem(c, op, cls, MMU_READ);                                                         \
    }                                                                                                 \
    static int op_##name##_store(struct icpu *c, const struct op *op)                                 \
    {                                                                                                 \
        return run_mem(c, op, cls, MMU_WRITE);                                                        \
    }
HANDLERS(sse, FP_SSE)
HANDLERS(avx, FP_AVX)
HANDLERS(avx512, FP_AVX512)
HANDLERS(mmx, FP_MMX)

static const op_fn handler[][3] = {
    [FP_SSE] = {op_sse_reg, op_sse_load, op_sse_store},
    [FP_AVX] = {op_avx_reg, op_avx_load, op_avx_store},
    [FP_AVX512] = {op_avx512_reg, op_avx512_load, op_avx512_store},
    [FP_MMX] = {op_mmx_reg, op_mmx_load, op_mmx_store},
};

/* VZEROUPPER and VZEROALL reach the registers that the mode can name: 0..15 or 0..7 (SDM vol. 2). */
static inline __attribute__((always_inline)) int vzero(struct icpu *c, unsigned keep)
{
    struct fp *f = icpu_fp(c);
    unsigned n = c->mode == IMODE_LONG64 ? 16 : 8;

    if (fp_check_avx(c, XCR0_AVX))
        return OP_FAULT;
    for (unsigned r = 0; r < n; r++)
        memset(f->v[r] + keep, 0, sizeof f->v[r] - keep);
    if (n == 16)
        f->in_use &= ~(XSTATE_AVX | BIT(XS_ZMM_HI256));
    return OP_NEXT;
}

static int op_vzeroupper(struct icpu *c, const struct op *op UNUSED)
{
    return vzero(c, 16);
}

static int op_vzeroall(struct icpu *c, const struct op *op UNUSED)
{
    return vzero(c, 0);
}

/* ---- binding ---- */

static bool vex_mode(const struct decoded *d)
{
    return d->mode != IMODE_REAL16 && d->mode != IMODE_V86;
}

int fp_bind_vzero(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    if (!icpu_fp(c)->isa[d->insn.meta.isa_set] || !vex_mode(d))
        return BIND_UD;
    op->fn = arg ? op_vzeroall : op_vzeroupper;
    op->flags |= OPF_FP;
    return BIND_OK;
}

static bool unaligned_sse(ZydisMnemonic m)
{
    switch (m) {
    case ZYDIS_MNEMONIC_MOVUPS: case ZYDIS_MNEMONIC_MOVUPD: case ZYDIS_MNEMONIC_MOVDQU: case ZYDIS_MNEMONIC_LDDQU:
    case ZYDIS_MNEMONIC_PCMPESTRI: case ZYDIS_MNEMONIC_PCMPESTRM: case ZYDIS_MNEMONIC_PCMPISTRI: case ZYDIS_MNEMONIC_PCMPISTRM:
        return true;
    case ZYDIS_MNEMONIC_SHA1MSG1: case ZYDIS_MNEMONIC_SHA1MSG2: case ZYDIS_MNEMONIC_SHA1NEXTE: case ZYDIS_MNEMONIC_SHA1RNDS4:
    case ZYDIS_MNEMONIC_SHA256MSG1: case ZYDIS_MNEMONIC_SHA256MSG2: case ZYDIS_MNEMONIC_SHA256RNDS2:
        return true;                                               /* AMD's take any address, so the processor is asked */
    default:
        return false;
    }
}

static u8 alignment(const ZydisDecodedInstruction *i, unsigned bytes)
{
    switch (i->meta.exception_class) {
    case ZYDIS_EXCEPTION_CLASS_AVX1: case ZYDIS_EXCEPTION_CLASS_E1: case ZYDIS_EXCEPTION_CLASS_E1NF:
        return (u8)bytes;
    default:
        return i->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && bytes == 16 && !unaligned_sse(i->mnemonic) ? 16 : 1;
    }
}

static bool is_packed(ZydisMnemonic m)
{
    switch (m) {
    case ZYDIS_MNEMONIC_VCOMPRESSPD: case ZYDIS_MNEMONIC_VCOMPRESSPS: case ZYDIS_MNEMONIC_VEXPANDPD: case ZYDIS_MNEMONIC_VEXPANDPS:
    case ZYDIS_MNEMONIC_VPCOMPRESSB: case ZYDIS_MNEMONIC_VPCOMPRESSW: case ZYDIS_MNEMONIC_VPCOMPRESSD: case ZYDIS_MNEMONIC_VPCOMPRESSQ:
    case ZYDIS_MNEMONIC_VPEXPANDB: case ZYDIS_MNEMONIC_VPEXPANDW: case ZYDIS_MNEMONIC_VPEXPANDD: case ZYDIS_MNEMONIC_VPEXPANDQ:
        return true;
    default:
        return false;
    }
}

static bool is_maskmov(ZydisMnemonic m)
{
    return m == ZYDIS_MNEMONIC_VMASKMOVPS || m == ZYDIS_MNEMONIC_VMASKMOVPD || m == ZYDIS_MNEMONIC_VPMASKMOVD || m == ZYDIS_MNEMONIC_VPMASKMOVQ;
}

/* Exception classes without fault suppression; some more that Zydis 4.0 puts elsewhere. */
static bool no_suppression(const ZydisDecodedInstruction *z)
{
    switch (z->meta.exception_class) {
    case ZYDIS_EXCEPTION_CLASS_E1NF: case ZYDIS_EXCEPTION_CLASS_E2NF: case ZYDIS_EXCEPTION_CLASS_E3NF: case ZYDIS_EXCEPTION_CLASS_E4NF:
    case ZYDIS_EXCEPTION_CLASS_E5NF: case ZYDIS_EXCEPTION_CLASS_E6NF: case ZYDIS_EXCEPTION_CLASS_E9NF: case ZYDIS_EXCEPTION_CLASS_E10NF:
    case ZYDIS_EXCEPTION_CLASS_E11NF:
        return true;
    default:
        return z->mnemonic == ZYDIS_MNEMONIC_VDBPSADBW || z->mnemonic == ZYDIS_MNEMONIC_VCVTNE2PS2BF16 ||
               z->mnemonic == ZYDIS_MNEMONIC_VGF2P8AFFINEQB || z->mnemonic == ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB;
    }
}

/* How many elements an embedded broadcast makes of one; 0: there is none. Static ones (VBROADCASTxx) fill the destination. */
static unsigned broadcast(const ZydisDecodedInstruction *z, const ZydisDecodedOperand *dst)
{
    if (z->avx.broadcast.is_static)
        return dst->element_count;
    switch (z->avx.broadcast.mode) {
    case ZYDIS_BROADCAST_MODE_1_TO_2: return 2;
    case ZYDIS_BROADCAST_MODE_1_TO_4: return 4;
    case ZYDIS_BROADCAST_MODE_1_TO_8: return 8;
    case ZYDIS_BROADCAST_MODE_1_TO_16: return 16;
    case ZYDIS_BROADCAST_MODE_1_TO_32: return 32;
    default: return 0;
    }
}

/* How a mask governs the memory operand (SDM vol. 2 2.7.6 "fault suppression"). */
static void bind_mask(struct fp_insn *i, const struct decoded *d, const ZydisDecodedOperand *mem)
{
    const ZydisDecodedInstruction *z = &d->insn;
    unsigned copies = broadcast(z, &d->opnd[0]);

    i->esize = (u8)(mem->element_size / 8);
    i->elements = (u8)(i->bytes / i->esize);
    if (is_maskmov(z->mnemonic)) {
        i->kind = FP_MASK_V;
        i->mask = (u8)ZydisRegisterGetId(d->opnd[1].reg.value);
        return;
    }
    if (z->encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX || z->avx.mask.reg == ZYDIS_REGISTER_K0)
        return;
    if (no_suppression(z)) {
        i->merges = i->writes;
        return;
    }
    i->kind = is_packed(z->mnemonic) ? FP_MASK_PACKED : FP_MASK_K;
    i->mask = (u8)ZydisRegisterGetId(z->avx.mask.reg);
    if (copies)
        i->elements = (u8)copies;
}

static bool bind_memory(struct fp_insn *i, const struct decoded *d, const ZydisDecodedOperand *mem)
{
    i->bytes = mem->size / 8;
    if (i->bytes == 0 || i->bytes > 64)
        return false;
    i->writes = mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    i->align = alignment(&d->insn, i->bytes);
    i->unit = i->bytes & (i->bytes - 1) ? 1 : (u8)MIN(i->bytes, 16u);
    bind_mask(i, d, mem);
    return true;
}

/* The class, or -1 for encodings that no supported processor has. */
static int classify(const struct decoded *d)
{
    const ZydisDecodedInstruction *z = &d->insn;

    switch (z->encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_EVEX:
        return vex_mode(d) ? FP_AVX512 : -1;
    case ZYDIS_INSTRUCTION_ENCODING_VEX:
        return !vex_mode(d) ? -1 : z->meta.isa_ext == ZYDIS_ISA_EXT_AVX512VEX ? FP_AVX512 : FP_AVX;
    case ZYDIS_INSTRUCTION_ENCODING_LEGACY:
        break;
    default:
        return -1;
    }
    for (unsigned n = 0; n < z->operand_count; n++) {
        if (d->opnd[n].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(d->opnd[n].reg.value) == ZYDIS_REGCLASS_MMX)
            return FP_MMX;
    }
    return FP_SSE;
}

static bool has_xmm(const struct decoded *d)
{
    for (unsigned n = 0; n < d->insn.operand_count; n++) {
        if (d->opnd[n].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(d->opnd[n].reg.value) == ZYDIS_REGCLASS_XMM)
            return true;
    }
    return false;
}

int fp_bind(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg UNUSED)
{
    struct fp *f = icpu_fp(c);
    const ZydisDecodedInstruction *z = &d->insn;
    const ZydisDecodedOperand *mem = NULL;
    struct fp_insn *i;
    int cls;

    if (!f->isa[z->meta.isa_set] || (z->attributes & ZYDIS_ATTRIB_HAS_LOCK))
        return BIND_UD;
    op->flags |= OPF_FP;
    if (z->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && z->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (z->opcode & 0xf8) == 0xd8)
        return fp_bind_x87(c, d, op);
    cls = classify(d);
    if (cls < 0 || z->operand_count == 0)
        return BIND_UD;
    for (unsigned n = 0; n < z->operand_count; n++) {
        if (d->opnd[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
            mem = &d->opnd[n];
    }
    if (mem && mem->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
        return fp_bind_vsib(c, d, op);
    i = fp_stub_make(f, d, (enum fp_class)cls);
    i->xmm = cls == FP_MMX && has_xmm(d);
    if (mem && !bind_memory(i, d, mem))
        return BIND_UD;
    op->ptr = i;
    op->fn = i->kind != FP_PLAIN ? fp_op_masked : handler[cls][!mem ? 0 : i->writes ? 2 : 1];
    return BIND_OK;
}
