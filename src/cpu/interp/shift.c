/*
 * Shifts and rotates: ROL ROR RCL RCR SHL SHR SAR, SHLD SHRD, SHLX SHRX SARX RORX (SDM vol. 2).
 *
 * The host's instruction runs with the guest's flags before it, so counts of zero and flags that a count leaves alone (or undefined) come out as
 * the processor has them. Counts are masked by the instruction itself.
 */
#include "cpu/interp/ops.h"

#define SHIFT(T, name)                                                                                \
    static inline T name##_##T(T a, u8 n, u32 *flags)                                                 \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        asm(ASM_FLAGS_IN #name ASM_##T " %%cl, %[a]\n\t" ASM_FLAGS_OUT : [a] "+r"(a), "+&a"(f) : "c"(n) : "cc"); \
        *flags = f;                                                                                   \
        return a;                                                                                     \
    }                                                                                                 \
    static inline int name##_reg_##T(struct icpu *c, const struct op *op, u8 n)                       \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        set_##T(c, op->rm, name##_##T(get_##T(c, op->rm), n, &fl));                                   \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_mem_##T(struct icpu *c, const struct op *op, u8 n, bool slow)                         \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        struct rmw w;                                                                                 \
        T a;                                                                                          \
        int r = rmw_begin_##T(c, op, &w, &a, slow);                                                   \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        a = name##_##T(a, n, &fl);                                                                    \
        if (unlikely(rmw_end_##T(c, &w, a, slow)))                                                    \
            return OP_FAULT;                                                                          \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int name##_ri_##T(struct icpu *c, const struct op *op)                                     \
    {                                                                                                 \
        return name##_reg_##T(c, op, (u8)op->imm);                                                    \
    }                                                                                                 \
    static int name##_rc_##T(struct icpu *c, const struct op *op)                                     \
    {                                                                                                 \
        return name##_reg_##T(c, op, (u8)c->r[RCX]);                                                  \
    }                                                                                                 \
    BODY name##_mi_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        return name##_mem_##T(c, op, (u8)op->imm, slow);                                              \
    }                                                                                                 \
    BODY name##_mc_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        return name##_mem_##T(c, op, (u8)c->r[RCX], slow);                                            \
    }                                                                                                 \
    MEM_HANDLER(name##_mi_##T)                                                                        \
    MEM_HANDLER(name##_mc_##T)
#define SHIFT_OF(T, name) SHIFT(T, name)
FOR_SIZES(SHIFT_OF, rol)
FOR_SIZES(SHIFT_OF, ror)
FOR_SIZES(SHIFT_OF, rcl)
FOR_SIZES(SHIFT_OF, rcr)
FOR_SIZES(SHIFT_OF, shl)
FOR_SIZES(SHIFT_OF, shr)
FOR_SIZES(SHIFT_OF, sar)

int bind_shift(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
#define ROW(name, form) { name##_##form##_u8, name##_##form##_u16, name##_##form##_u32, name##_##form##_u64 }
#define ROWS(name) { ROW(name, ri), ROW(name, rc), ROW(name, mi), ROW(name, mc) }
    static const op_fn table[SHIFT_OPS][4][4] = {
        [SHIFT_ROL] = ROWS(rol), [SHIFT_ROR] = ROWS(ror), [SHIFT_RCL] = ROWS(rcl), [SHIFT_RCR] = ROWS(rcr),
        [SHIFT_SHL] = ROWS(shl), [SHIFT_SHR] = ROWS(shr), [SHIFT_SAR] = ROWS(sar),
    };
    (void)c;
    enum form form = op_form(d, op);
    bool mem = form == FORM_MR || form == FORM_MI, by_cl = form == FORM_RR || form == FORM_MR;
    op->fn = table[arg][mem * 2 + by_cl][size_index(op->size)];
    return BIND_OK;
}

/* ---- SHLD, SHRD ---- */
#define DOUBLE(T, name)                                                                               \
    static inline T name##_##T(T a, T b, u8 n, u32 *flags)                                            \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        asm(ASM_FLAGS_IN #name ASM_##T " %%cl, %[b], %[a]\n\t" ASM_FLAGS_OUT : [a] "+r"(a), "+&a"(f) : [b] "r"(b), "c"(n) : "cc"); \
        *flags = f;                                                                                   \
        return a;                                                                                     \
    }                                                                                                 \
    static int name##_r_##T(struct icpu *c, const struct op *op)                                      \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        u8 n = (u8)(op->aux ? c->r[RCX] : op->imm);                                                   \
        set_##T(c, op->rm, name##_##T(get_##T(c, op->rm), get_##T(c, op->reg), n, &fl));              \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_m_##T##_body(struct icpu *c, const struct op *op, bool slow)                          \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        struct rmw w;                                                                                 \
        T a;                                                                                          \
        int r = rmw_begin_##T(c, op, &w, &a, slow);                                                   \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        a = name##_##T(a, get_##T(c, op->reg), (u8)(op->aux ? c->r[RCX] : op->imm), &fl);             \
        if (unlikely(rmw_end_##T(c, &w, a, slow)))                                                    \
            return OP_FAULT;                                                                          \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(name##_m_##T)
FOR_WIDE_SIZES(DOUBLE, shld)
FOR_WIDE_SIZES(DOUBLE, shrd)

int bind_shift_double(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn table[2][2][4] = {
        { { NULL, shld_r_u16, shld_r_u32, shld_r_u64 }, { NULL, shld_m_u16, shld_m_u32, shld_m_u64 } },
        { { NULL, shrd_r_u16, shrd_r_u32, shrd_r_u64 }, { NULL, shrd_m_u16, shrd_m_u32, shrd_m_u64 } },
    };
    (void)c;
    bool mem = op_form(d, op) == FORM_MR;
    op->aux = d->opnd[2].type == ZYDIS_OPERAND_TYPE_REGISTER;      /* count in CL */
    op->fn = table[arg][mem][size_index(op->size)];
    return BIND_OK;
}

/* ---- BMI2: no flags ---- */
static u64 shift_x(unsigned kind, u64 a, unsigned n, unsigned size)
{
    n &= size * 8 - 1;
    if (size == 4)
        return kind == SHIFT_SHL ? (u32)a << n : kind == SHIFT_SHR ? (u32)a >> n : (u32)((s32)a >> n);
    return kind == SHIFT_SHL ? a << n : kind == SHIFT_SHR ? a >> n : (u64)((s64)a >> n);
}

static int op_shift_x(struct icpu *c, const struct op *op)         /* reg = r/m shifted by the register in aux's low byte */
{
    u64 a = c->r[op->rm];
    if (op->flags & OPF_MEM && mem_load(c, op, op->size, &a))
        return OP_FAULT;
    c->r[op->reg] = shift_x(op->aux >> 8, a, (unsigned)c->r[op->aux & 0xff], op->size);
    return OP_NEXT;
}

int bind_shift_x(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    if (!cpuid_has(c->v->m->cpuid, CPU_BMI2))
        return BIND_UD;
    op->size = (u8)(d->opnd[0].size / 8);
    op->reg = op_gpr(d->opnd[0].reg.value);
    op->rm = d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER ? op_gpr(d->opnd[1].reg.value) : REG_ZERO;
    op->aux = arg << 8 | op_gpr(d->opnd[2].reg.value);
    op->fn = op_shift_x;
    return BIND_OK;
}

static int op_rorx(struct icpu *c, const struct op *op)
{
    u64 a = c->r[op->rm];
    if (op->flags & OPF_MEM && mem_load(c, op, op->size, &a))
        return OP_FAULT;
    unsigned n = (unsigned)op->imm & (op->size * 8u - 1);
    if (op->size == 4)
        c->r[op->reg] = n ? (u32)a >> n | (u32)((u32)a << (32 - n)) : (u32)a;
    else
        c->r[op->reg] = n ? a >> n | a << (64 - n) : a;
    return OP_NEXT;
}

int bind_rorx(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)arg;
    if (!cpuid_has(c->v->m->cpuid, CPU_BMI2))
        return BIND_UD;
    op->size = (u8)(d->opnd[0].size / 8);
    op->reg = op_gpr(d->opnd[0].reg.value);
    op->rm = d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER ? op_gpr(d->opnd[1].reg.value) : REG_ZERO;
    op->fn = op_rorx;
    return BIND_OK;
}
