/*
 * Data movement without arithmetic: MOV MOVZX MOVSX MOVSXD LEA CMOVcc SETcc MOVBE MOVNTI BSWAP XLAT, the sign extensions of the accumulator,
 * and the instructions on single flags (SDM vol. 2).
 */
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"

/* ---- MOV ---- */
#define MOV(T, unused)                                                                                \
    static int mov_rr_##T(struct icpu *c, const struct op *op)                                        \
    {                                                                                                 \
        set_##T(c, op->rm, get_##T(c, op->reg));                                                      \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int mov_ri_##T(struct icpu *c, const struct op *op)                                        \
    {                                                                                                 \
        set_##T(c, op->rm, (T)op->imm);                                                               \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY mov_rm_##T##_body(struct icpu *c, const struct op *op, bool slow)                            \
    {                                                                                                 \
        T v;                                                                                          \
        int r = op_load_##T(c, op, &v, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        set_##T(c, op->reg, v);                                                                       \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(mov_rm_##T)                                                                           \
    static int mov_mr_##T(struct icpu *c, const struct op *op)                                        \
    {                                                                                                 \
        return op_store_##T(c, op, get_##T(c, op->reg));                                              \
    }                                                                                                 \
    static int mov_mi_##T(struct icpu *c, const struct op *op)                                        \
    {                                                                                                 \
        return op_store_##T(c, op, (T)op->imm);                                                       \
    }
FOR_SIZES(MOV, 0)

#define ROW(name) { name##_u8, name##_u16, name##_u32, name##_u64 }

int bind_mov(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn table[FORMS][4] = {
        [FORM_RR] = ROW(mov_rr), [FORM_RI] = ROW(mov_ri), [FORM_RM] = ROW(mov_rm), [FORM_MR] = ROW(mov_mr), [FORM_MI] = ROW(mov_mi),
    };
    if (sys_form(d))
        return bind_sys_form(c, d, op, arg);
    enum form form = op_form(d, op);
    if (form == FORM_NONE)
        return BIND_UD;
    op->fn = table[form][size_index(op->size)];
    return op->fn ? BIND_OK : BIND_UD;
}

int bind_movnti(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    if (op_form(d, op) != FORM_MR)
        return BIND_UD;
    op->fn = op->size == 8 ? mov_mr_u64 : mov_mr_u32;
    return BIND_OK;
}

/* ---- MOVZX, MOVSX, MOVSXD: D from S ---- */
#define MOVX(D, S, name, CAST)                                                                        \
    static int name##_rr_##D##_##S(struct icpu *c, const struct op *op)                               \
    {                                                                                                 \
        set_##D(c, op->rm, (D)(CAST)get_##S(c, op->reg));                                             \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_rm_##D##_##S##_body(struct icpu *c, const struct op *op, bool slow)                   \
    {                                                                                                 \
        S v;                                                                                          \
        int r = op_load_##S(c, op, &v, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        set_##D(c, op->reg, (D)(CAST)v);                                                              \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(name##_rm_##D##_##S)
#define MOVX_TO(D, unused)                                                                            \
    MOVX(D, u8, movzx, u8)                                                                            \
    MOVX(D, u8, movsx, s8)                                                                            \
    MOVX(D, u16, movzx, u16)                                                                          \
    MOVX(D, u16, movsx, s16)                                                                          \
    MOVX(D, u32, movsx, s32)
FOR_WIDE_SIZES(MOVX_TO, 0)

int bind_movx(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
#define MOVX_ROW(name, form, S) { name##_##form##_u16_##S, name##_##form##_u32_##S, name##_##form##_u64_##S }
    static const op_fn table[2][2][3][3] = {                       /* [signed][memory][source size][destination size] */
        { { MOVX_ROW(movzx, rr, u8), MOVX_ROW(movzx, rr, u16), { NULL } }, { MOVX_ROW(movzx, rm, u8), MOVX_ROW(movzx, rm, u16), { NULL } } },
        { { MOVX_ROW(movsx, rr, u8), MOVX_ROW(movsx, rr, u16), MOVX_ROW(movsx, rr, u32) },
          { MOVX_ROW(movsx, rm, u8), MOVX_ROW(movsx, rm, u16), MOVX_ROW(movsx, rm, u32) } },
    };
    (void)c;
    enum form form = op_form(d, op);
    unsigned source = d->opnd[1].size / 8u;
    if (form != FORM_RR && form != FORM_RM)
        return BIND_UD;
    op->fn = table[arg][form == FORM_RM][size_index(source)][size_index(op->size) - 1];
    return op->fn ? BIND_OK : BIND_UD;
}

/* ---- LEA ---- */
static int lea_64(struct icpu *c, const struct op *op)
{
    c->r[op->reg] = op_ea(c, op);
    return OP_NEXT;
}

static int lea_32(struct icpu *c, const struct op *op)             /* address or operand of 32 bits, and neither of 16 */
{
    c->r[op->reg] = (u32)op_ea(c, op);
    return OP_NEXT;
}

static int lea_any(struct icpu *c, const struct op *op)
{
    u64 ea = op_ea(c, op);
    if (op->asize < 8)
        ea &= BIT(8 * op->asize) - 1;
    set_reg(c, op->reg, op->size, ea);
    return OP_NEXT;
}

int bind_lea(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    if (op_form(d, op) != FORM_RM)
        return BIND_UD;
    op->fn = op->size == 8 && op->asize == 8 ? lea_64 : op->size > 2 && op->asize > 2 ? lea_32 : lea_any;
    return BIND_OK;
}

/* ---- CMOVcc, SETcc ---- */
#define CMOV(cc, T)                                                                                   \
    static int cmov_rr_##cc##_##T(struct icpu *c, const struct op *op)                                \
    {                                                                                                 \
        set_##T(c, op->rm, CC_##cc(c->fl) ? get_##T(c, op->reg) : get_##T(c, op->rm));                \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY cmov_rm_##cc##_##T##_body(struct icpu *c, const struct op *op, bool slow)                    \
    {                                                                                                 \
        T v;                                                                                          \
        int r = op_load_##T(c, op, &v, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        set_##T(c, op->reg, CC_##cc(c->fl) ? v : get_##T(c, op->reg));                                \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(cmov_rm_##cc##_##T)
#define CONDITIONAL(cc)                                                                               \
    CMOV(cc, u16)                                                                                     \
    CMOV(cc, u32)                                                                                     \
    CMOV(cc, u64)                                                                                     \
    static int set_r_##cc(struct icpu *c, const struct op *op)                                        \
    {                                                                                                 \
        set_u8(c, op->rm, CC_##cc(c->fl) ? 1 : 0);                                                    \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int set_m_##cc(struct icpu *c, const struct op *op)                                        \
    {                                                                                                 \
        return op_store_u8(c, op, CC_##cc(c->fl) ? 1 : 0);                                            \
    }
FOR_CONDITIONS(CONDITIONAL)

int bind_cmov(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
#define CMOV_ROW(cc) [cc] = { { cmov_rr_##cc##_u16, cmov_rr_##cc##_u32, cmov_rr_##cc##_u64 }, { cmov_rm_##cc##_u16, cmov_rm_##cc##_u32, cmov_rm_##cc##_u64 } },
    static const op_fn table[16][2][3] = { FOR_CONDITIONS(CMOV_ROW) };
    (void)c;
    op->fn = table[arg][op_form(d, op) == FORM_RM][size_index(op->size) - 1];
    return BIND_OK;
}

int bind_setcc(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
#define SET_ROW(cc) [cc] = { set_r_##cc, set_m_##cc },
    static const op_fn table[16][2] = { FOR_CONDITIONS(SET_ROW) };
    (void)c;
    op->fn = table[arg][op_form(d, op) == FORM_M];
    return BIND_OK;
}

/* ---- byte order ---- */
static u64 swap_bytes(u64 v, unsigned size)
{
    return __builtin_bswap64(v) >> (64 - 8 * size);
}

static int op_bswap(struct icpu *c, const struct op *op)
{
    /* 16 bits: undefined; the processors that have been looked at clear the register's low half. */
    set_reg(c, op->rm, op->size, op->size == 2 ? 0 : swap_bytes(c->r[op->rm], op->size));
    return OP_NEXT;
}

int bind_bswap(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op_form(d, op);
    op->fn = op_bswap;
    return BIND_OK;
}

static int movbe_load(struct icpu *c, const struct op *op)
{
    u64 v;
    if (mem_load(c, op, op->size, &v))
        return OP_FAULT;
    set_reg(c, op->reg, op->size, swap_bytes(v, op->size));
    return OP_NEXT;
}

static int movbe_store(struct icpu *c, const struct op *op)
{
    return mem_store(c, op, op->size, swap_bytes(c->r[op->reg], op->size));
}

int bind_movbe(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)arg;
    enum form form = op_form(d, op);
    if (!cpuid_has(c->v->m->cpuid, CPU_MOVBE) || (form != FORM_RM && form != FORM_MR))
        return BIND_UD;
    op->fn = form == FORM_RM ? movbe_load : movbe_store;
    return BIND_OK;
}

/* ---- XLAT: AL = [rBX + AL] ---- */
static int op_xlat(struct icpu *c, const struct op *op)
{
    u64 off = c->r[RBX] + (u8)c->r[RAX], la, v;
    if (op->asize < 8)
        off &= BIT(8 * op->asize) - 1;
    if (seg_linear(c, op->seg, off, 1, MMU_READ, &la) || lin_load(c, la, 1, &v))
        return OP_FAULT;
    set_u8(c, RAX * 8, (u8)v);
    return OP_NEXT;
}

int bind_xlat(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)d;
    (void)arg;
    op->fn = op_xlat;
    return BIND_OK;
}

/* ---- sign extension of the accumulator ---- */
static int op_cbw(struct icpu *c, const struct op *op)
{
    (void)op;
    set_u16(c, RAX, (u16)(s8)c->r[RAX]);
    return OP_NEXT;
}
static int op_cwde(struct icpu *c, const struct op *op)
{
    (void)op;
    set_u32(c, RAX, (u32)(s16)c->r[RAX]);
    return OP_NEXT;
}
static int op_cdqe(struct icpu *c, const struct op *op)
{
    (void)op;
    c->r[RAX] = (u64)(s64)(s32)c->r[RAX];
    return OP_NEXT;
}
static int op_cwd(struct icpu *c, const struct op *op)
{
    (void)op;
    set_u16(c, RDX, (s16)c->r[RAX] < 0 ? 0xffff : 0);
    return OP_NEXT;
}
static int op_cdq(struct icpu *c, const struct op *op)
{
    (void)op;
    set_u32(c, RDX, (s32)c->r[RAX] < 0 ? ~0u : 0);
    return OP_NEXT;
}
static int op_cqo(struct icpu *c, const struct op *op)
{
    (void)op;
    c->r[RDX] = (s64)c->r[RAX] < 0 ? ~0ull : 0;
    return OP_NEXT;
}

int bind_convert(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)d;
    switch (arg) {
    case ZYDIS_MNEMONIC_CBW: op->fn = op_cbw; break;
    case ZYDIS_MNEMONIC_CWDE: op->fn = op_cwde; break;
    case ZYDIS_MNEMONIC_CDQE: op->fn = op_cdqe; break;
    case ZYDIS_MNEMONIC_CWD: op->fn = op_cwd; break;
    case ZYDIS_MNEMONIC_CDQ: op->fn = op_cdq; break;
    default: op->fn = op_cqo; break;
    }
    return BIND_OK;
}

/* ---- single flags ---- */
static int op_flag(struct icpu *c, const struct op *op)
{
    u8 ah = (u8)(c->r[RAX] >> 8);
    switch (op->aux) {
    case ZYDIS_MNEMONIC_CLC: c->fl &= ~FL_CF; break;
    case ZYDIS_MNEMONIC_STC: c->fl |= FL_CF; break;
    case ZYDIS_MNEMONIC_CMC: c->fl ^= FL_CF; break;
    case ZYDIS_MNEMONIC_CLD: c->flags &= ~FLAG_DF; break;
    case ZYDIS_MNEMONIC_STD: c->flags |= FLAG_DF; break;
    case ZYDIS_MNEMONIC_LAHF: set_u8(c, RAX * 8 + 1, (u8)((c->fl >> 8 & 0xd5) | 2)); break;
    case ZYDIS_MNEMONIC_SAHF: c->fl = (c->fl & FL_OF) | (ah & 0xd5u) << 8; break;
    default: set_u8(c, RAX * 8, c->fl & FL_CF ? 0xff : 0); break;  /* SALC */
    }
    return OP_NEXT;
}

int bind_flagop(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)d;
    op->aux = arg;
    op->fn = op_flag;
    return BIND_OK;
}
