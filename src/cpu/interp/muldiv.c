/*
 * MUL IMUL DIV IDIV MULX, and the decimal adjustments AAA AAS AAM AAD DAA DAS (SDM vol. 2).
 *
 * The host multiplies and divides, with the guest's flags before it: what is undefined comes out as on the processor. Divisions are checked first, so
 * that the host never takes #DE. The decimal instructions do not exist in 64-bit mode: these follow the manual's pseudo-code.
 */
#include "cpu/interp/ops.h"

/* ---- one-operand forms: the double-width operand is in hi:lo (AX for bytes) ---- */
#define WIDE(T, S, name)                                                                              \
    static inline void name##_##T(T *lo, T *hi, T b, u32 *flags)                                      \
    {                                                                                                 \
        u64 f = *flags, l = *lo, h = *hi;                                                             \
        asm(ASM_FLAGS_IN "movq %[l], %%rax\n\t" #name ASM_##T " %[b]\n\t" S                           \
            : [l] "+r"(l), "+&a"(f), "+&d"(h) : [b] "r"(b) : "cc");                                   \
        *lo = (T)l;                                                                                   \
        *hi = (T)h;                                                                                   \
        *flags = (u32)f & 0xffff;                                                                     \
    }
#define WIDE_OUT "movq %%rax, %[l]\n\t" ASM_FLAGS_OUT
FOR_WIDE_SIZES(WIDE, WIDE_OUT, mul)
FOR_WIDE_SIZES(WIDE, WIDE_OUT, imul)
FOR_WIDE_SIZES(WIDE, WIDE_OUT, div)
FOR_WIDE_SIZES(WIDE, WIDE_OUT, idiv)

#define NARROW(name)                                                                                  \
    static inline u16 name##_u8(u16 ax, u8 b, u32 *flags)                                             \
    {                                                                                                 \
        u64 f = *flags, l = ax;                                                                       \
        asm(ASM_FLAGS_IN "movq %[l], %%rax\n\t" #name "b %[b]\n\t" WIDE_OUT : [l] "+r"(l), "+&a"(f) : [b] "r"(b) : "cc"); \
        *flags = (u32)f & 0xffff;                                                                     \
        return (u16)l;                                                                                \
    }
NARROW(mul)
NARROW(imul)
NARROW(div)
NARROW(idiv)

/* Would the quotient of hi:lo / b not fit (or b be 0)? size is the divisor's. */
static bool div_overflows(u64 lo, u64 hi, u64 b, unsigned size)
{
    if (size == 1)
        return !(u8)b || (u16)lo >> 8 >= (u8)b;
    return !b || hi >= b;
}

static bool idiv_overflows(u64 lo, u64 hi, u64 b, unsigned size)
{
    unsigned bits = size * 8;
    __int128 n = size == 8 ? (__int128)((u128)hi << 64 | lo) : size == 1 ? (s16)lo : (s64)((hi << bits | lo) << (64 - 2 * bits)) >> (64 - 2 * bits);
    s64 d = (s64)(b << (64 - bits)) >> (64 - bits);
    if (!d)
        return true;
    u128 un = n < 0 ? -(u128)n : (u128)n;
    u64 ud = d < 0 ? -(u64)d : (u64)d;
    if ((un >> bits) >= ud)
        return true;
    u64 q = (u64)(un / ud), most = BIT(bits - 1);
    return q > (((n < 0) != (d < 0)) ? most : most - 1);
}

static int muldiv8(struct icpu *c, const struct op *op, u8 b)
{
    u16 ax = (u16)c->r[RAX];
    u32 fl = c->fl;
    switch (op->aux) {
    case MULDIV_MUL: ax = mul_u8(ax, b, &fl); break;
    case MULDIV_IMUL: ax = imul_u8(ax, b, &fl); break;
    case MULDIV_DIV:
        if (div_overflows(ax, 0, b, 1))
            return fault_raise(c, VEC_DE);
        ax = div_u8(ax, b, &fl);
        break;
    default:
        if (idiv_overflows(ax, 0, b, 1))
            return fault_raise(c, VEC_DE);
        ax = idiv_u8(ax, b, &fl);
        break;
    }
    set_u16(c, RAX, ax);
    c->fl = fl;
    return OP_NEXT;
}

#define MULDIV(T, unused)                                                                             \
    static inline int muldiv_##T(struct icpu *c, const struct op *op, T b)                            \
    {                                                                                                 \
        T lo = get_##T(c, RAX), hi = get_##T(c, RDX);                                                 \
        u32 fl = c->fl;                                                                               \
        switch (op->aux) {                                                                            \
        case MULDIV_MUL: mul_##T(&lo, &hi, b, &fl); break;                                            \
        case MULDIV_IMUL: imul_##T(&lo, &hi, b, &fl); break;                                          \
        case MULDIV_DIV:                                                                              \
            if (div_overflows(lo, hi, b, sizeof(T)))                                                  \
                return fault_raise(c, VEC_DE);                                                        \
            div_##T(&lo, &hi, b, &fl);                                                                \
            break;                                                                                    \
        default:                                                                                      \
            if (idiv_overflows(lo, hi, b, sizeof(T)))                                                 \
                return fault_raise(c, VEC_DE);                                                        \
            idiv_##T(&lo, &hi, b, &fl);                                                               \
            break;                                                                                    \
        }                                                                                             \
        set_##T(c, RAX, lo);                                                                          \
        set_##T(c, RDX, hi);                                                                          \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }
FOR_WIDE_SIZES(MULDIV, 0)
#define muldiv_u8 muldiv8

#define MULDIV_FORMS(T, unused)                                                                       \
    static int muldiv_r_##T(struct icpu *c, const struct op *op)                                      \
    {                                                                                                 \
        return muldiv_##T(c, op, get_##T(c, op->rm));                                                 \
    }                                                                                                 \
    BODY muldiv_m_##T##_body(struct icpu *c, const struct op *op, bool slow)                          \
    {                                                                                                 \
        T b;                                                                                          \
        int r = op_load_##T(c, op, &b, slow);                                                         \
        return unlikely(r) ? r : muldiv_##T(c, op, b);                                                \
    }                                                                                                 \
    MEM_HANDLER(muldiv_m_##T)
FOR_SIZES(MULDIV_FORMS, 0)

/* ---- IMUL with two or three operands ---- */
#define IMUL(T, unused)                                                                               \
    static inline T imul2_##T(T a, T b, u32 *flags)                                                   \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        asm(ASM_FLAGS_IN "imul" ASM_##T " %[b], %[a]\n\t" ASM_FLAGS_OUT : [a] "+r"(a), "+&a"(f) : [b] "r"(b) : "cc"); \
        *flags = f;                                                                                   \
        return a;                                                                                     \
    }                                                                                                 \
    static int imul2_rr_##T(struct icpu *c, const struct op *op)                                      \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        set_##T(c, op->rm, imul2_##T(get_##T(c, op->rm), get_##T(c, op->reg), &fl));                  \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY imul2_rm_##T##_body(struct icpu *c, const struct op *op, bool slow)                          \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        T b;                                                                                          \
        int r = op_load_##T(c, op, &b, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        set_##T(c, op->reg, imul2_##T(get_##T(c, op->reg), b, &fl));                                  \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(imul2_rm_##T)                                                                         \
    static int imul3_rr_##T(struct icpu *c, const struct op *op)                                      \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        set_##T(c, op->rm, imul2_##T(get_##T(c, op->reg), (T)op->imm, &fl));                          \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY imul3_rm_##T##_body(struct icpu *c, const struct op *op, bool slow)                          \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        T b;                                                                                          \
        int r = op_load_##T(c, op, &b, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        set_##T(c, op->reg, imul2_##T(b, (T)op->imm, &fl));                                           \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(imul3_rm_##T)
FOR_WIDE_SIZES(IMUL, 0)

#define WIDE_ROW(name) { NULL, name##_u16, name##_u32, name##_u64 }

int bind_muldiv(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn one[2][4] = {
        { muldiv_r_u8, muldiv_r_u16, muldiv_r_u32, muldiv_r_u64 },
        { muldiv_m_u8, muldiv_m_u16, muldiv_m_u32, muldiv_m_u64 },
    };
    static const op_fn more[2][2][4] = {
        { WIDE_ROW(imul2_rr), WIDE_ROW(imul2_rm) },
        { WIDE_ROW(imul3_rr), WIDE_ROW(imul3_rm) },
    };
    (void)c;
    if (d->insn.operand_count_visible == 1) {
        bool mem = d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
        op->size = (u8)(d->opnd[0].size / 8);
        if (!mem)
            op->rm = op_gpr(d->opnd[0].reg.value);
        op->aux = arg;
        op->fn = one[mem][size_index(op->size)];
        return BIND_OK;
    }
    enum form form = op_form(d, op);
    op->fn = more[d->insn.operand_count_visible - 2][form == FORM_RM][size_index(op->size)];
    return op->fn ? BIND_OK : BIND_UD;
}

/* ---- MULX ---- */
static int op_mulx(struct icpu *c, const struct op *op)            /* op->reg: high half; aux: low half; when they are the same, high wins */
{
    u64 b = c->r[op->rm];
    if (op->flags & OPF_MEM && mem_load(c, op, op->size, &b))
        return OP_FAULT;
    if (op->size == 4) {
        u64 p = (u64)(u32)c->r[RDX] * (u32)b;
        c->r[op->aux] = (u32)p;
        c->r[op->reg] = p >> 32;
    } else {
        u128 p = (u128)c->r[RDX] * b;
        c->r[op->aux] = (u64)p;
        c->r[op->reg] = (u64)(p >> 64);
    }
    return OP_NEXT;
}

int bind_mulx(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)arg;
    if (!cpuid_has(c->v->m->cpuid, CPU_BMI2))
        return BIND_UD;
    op->size = (u8)(d->opnd[0].size / 8);
    op->reg = op_gpr(d->opnd[0].reg.value);
    op->aux = op_gpr(d->opnd[1].reg.value);
    op->rm = d->opnd[2].type == ZYDIS_OPERAND_TYPE_REGISTER ? op_gpr(d->opnd[2].reg.value) : REG_ZERO;
    op->fn = op_mulx;
    return BIND_OK;
}

/* ---- decimal ---- */
/* SF, ZF, PF as of a byte; the undefined OF becomes 0. */
static u32 flags_of_byte(u8 v)
{
    u32 fl = 0;
    asm("testb %[v], %[v]\n\tlahf" : "+&a"(fl) : [v] "r"(v) : "cc");
    return fl & (FL_SF | FL_ZF | FL_PF);
}

static void ascii_adjust(struct icpu *c, s16 six)                  /* AAA: six 6; AAS: -6 */
{
    u16 ax = (u16)c->r[RAX];
    bool carry = (ax & 15) > 9 || c->fl & FL_AF;
    if (carry)
        ax = (u16)(ax + six + (six > 0 ? 0x100 : -0x100));
    set_u16(c, RAX, ax & 0xff0f);
    c->fl = flags_of_byte((u8)(ax & 15)) | (carry ? FL_AF | FL_CF : 0);
}

static void decimal_adjust(struct icpu *c, bool subtract)
{
    u8 old = (u8)c->r[RAX], al = old;
    bool cf = c->fl & FL_CF, low = (old & 15) > 9 || c->fl & FL_AF, high = old > 0x99 || cf;
    bool out = false;
    if (low) {
        out = cf || (subtract ? old < 6 : old > 0xff - 6);
        al = (u8)(subtract ? al - 6 : al + 6);
    }
    if (high) {
        al = (u8)(subtract ? al - 0x60 : al + 0x60);
        out = true;
    } else if (!subtract) {
        out = false;
    }
    set_u8(c, RAX * 8, al);
    c->fl = flags_of_byte(al) | (low ? FL_AF : 0) | (out ? FL_CF : 0);
}

static int op_bcd(struct icpu *c, const struct op *op)
{
    u8 al = (u8)c->r[RAX], ah = (u8)(c->r[RAX] >> 8), base = (u8)op->imm;
    switch (op->aux) {
    case ZYDIS_MNEMONIC_AAA: ascii_adjust(c, 6); break;
    case ZYDIS_MNEMONIC_AAS: ascii_adjust(c, -6); break;
    case ZYDIS_MNEMONIC_DAA: decimal_adjust(c, false); break;
    case ZYDIS_MNEMONIC_DAS: decimal_adjust(c, true); break;
    case ZYDIS_MNEMONIC_AAM:
        if (!base)
            return fault_raise(c, VEC_DE);
        set_u16(c, RAX, (u16)(al / base << 8 | al % base));
        c->fl = flags_of_byte(al % base);
        break;
    default:                                                       /* AAD */
        al = (u8)(al + ah * base);
        set_u16(c, RAX, al);
        c->fl = flags_of_byte(al);
        break;
    }
    return OP_NEXT;
}

int bind_bcd(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)d;
    op->aux = arg;
    op->fn = op_bcd;
    return BIND_OK;
}
