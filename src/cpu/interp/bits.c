/*
 * Bits: BT BTS BTR BTC, BSF BSR TZCNT LZCNT POPCNT, BMI1 and BMI2 without shifts, CRC32 (SDM vol. 2). The host's own instructions compute results and
 * flags. The bit tests leave the flags that the manual calls undefined as they are, as processors do.
 */
#include "cpu/interp/ops.h"

static bool vex_mode(const struct decoded *d)                      /* VEX encodings are #UD in real and virtual-8086 mode */
{
    return d->mode != IMODE_REAL16 && d->mode != IMODE_V86;
}

/* ---- BT, BTS, BTR, BTC ---- */
enum { BT_TEST, BT_SET, BT_RESET, BT_COMPLEMENT };

static u64 bt_apply(unsigned kind, u64 v, u64 bit)
{
    switch (kind) {
    case BT_SET: return v | bit;
    case BT_RESET: return v & ~bit;
    case BT_COMPLEMENT: return v ^ bit;
    default: return v;
    }
}

static void bt_flags(struct icpu *c, bool bit)
{
    c->fl = bit ? c->fl | FL_CF : c->fl & ~FL_CF;
}

static int bt_reg(struct icpu *c, const struct op *op)             /* bit number in op->reg or, if that is REG_ZERO, in imm */
{
    unsigned n = (unsigned)(op->reg == REG_ZERO ? op->imm : c->r[op->reg]) & (op->size * 8u - 1);
    u64 v = get_reg(c, op->rm, op->size);
    bt_flags(c, v >> n & 1);
    if (op->aux != BT_TEST)
        set_reg(c, op->rm, op->size, bt_apply(op->aux, v, BIT(n)));
    return OP_NEXT;
}

#define LOCKED_BT(insn, S, T)                                                                         \
    asm volatile("lock " insn S " %[n], %[m]\n\tsetc %[bit]" : [m] "+m"(*(any_##T *)m), [bit] "=q"(bit) : [n] "r"((T)n) : "cc", "memory")

static bool bt_locked(void *m, unsigned kind, unsigned size, unsigned n)
{
    u8 bit;
    switch (kind << 4 | size) {
    case BT_SET << 4 | 2: LOCKED_BT("bts", "w", u16); break;
    case BT_SET << 4 | 4: LOCKED_BT("bts", "l", u32); break;
    case BT_SET << 4 | 8: LOCKED_BT("bts", "q", u64); break;
    case BT_RESET << 4 | 2: LOCKED_BT("btr", "w", u16); break;
    case BT_RESET << 4 | 4: LOCKED_BT("btr", "l", u32); break;
    case BT_RESET << 4 | 8: LOCKED_BT("btr", "q", u64); break;
    case BT_COMPLEMENT << 4 | 2: LOCKED_BT("btc", "w", u16); break;
    case BT_COMPLEMENT << 4 | 4: LOCKED_BT("btc", "l", u32); break;
    default: LOCKED_BT("btc", "q", u64); break;
    }
    return bit;
}

static int bt_rmw(struct icpu *c, const struct op *op, unsigned n)
{
    struct rmw w;
    u64 v;
    if (rmw_begin_slow(c, op, op->size, &w, &v) || lin_store(c, w.la, op->size, bt_apply(op->aux, v, BIT(n))))
        return OP_FAULT;
    bt_flags(c, v >> n & 1);
    return OP_NEXT;
}

static int bt_mem(struct icpu *c, const struct op *op)
{
    unsigned bits = op->size * 8u, n;
    struct op at = *op;
    u64 v, la;
    if (op->reg == REG_ZERO) {
        n = (unsigned)op->imm & (bits - 1);
    } else {                                                       /* a bit string: the signed bit number selects the word, too */
        s64 i = (s64)(c->r[op->reg] << (64 - bits)) >> (64 - bits);
        n = (unsigned)i & (bits - 1);
        at.disp += (i >> (size_index(op->size) + 3)) * op->size;
    }
    if (op->aux == BT_TEST) {
        if (mem_load(c, &at, op->size, &v))
            return OP_FAULT;
        bt_flags(c, v >> n & 1);
        return OP_NEXT;
    }
    if (!(op->flags & OPF_LOCK))
        return bt_rmw(c, &at, n);
    if (mem_linear(c, &at, op->size, MMU_WRITE, &la))
        return OP_FAULT;
    void *m = lock_host(c, la, op->size);
    if (likely(m)) {
        bt_flags(c, bt_locked(m, op->aux, op->size, n));
        lock_done(c);
        return OP_NEXT;
    }
    split_lock(c);
    int r = bt_rmw(c, &at, n);
    split_unlock(c);
    return r;
}

int bind_bt(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    enum form form = op_form(d, op);
    bool mem = form == FORM_MR || form == FORM_MI;
    if (form == FORM_RI || form == FORM_MI)
        op->reg = REG_ZERO;
    if (op->flags & OPF_LOCK && (!mem || arg == BT_TEST))
        return BIND_UD;
    op->aux = arg;
    op->fn = mem ? bt_mem : bt_reg;
    return BIND_OK;
}

/* ---- BSF, BSR, TZCNT, LZCNT, POPCNT: the whole destination goes through the host, so that what a zero source leaves is as on the processor ---- */
#define SCAN(T, name)                                                                                 \
    static inline u64 name##_##T(u64 dst, u64 src, u32 *flags)                                        \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        asm(ASM_FLAGS_IN #name ASM_##T " %" REG_##T "[src], %" REG_##T "[dst]\n\t" ASM_FLAGS_OUT : [dst] "+r"(dst), "+&a"(f) : [src] "r"(src) : "cc"); \
        *flags = f;                                                                                   \
        return dst;                                                                                   \
    }                                                                                                 \
    static int name##_rr_##T(struct icpu *c, const struct op *op)                                     \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        c->r[op->rm] = name##_##T(c->r[op->rm], c->r[op->reg], &fl);                                  \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_rm_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        T src;                                                                                        \
        int r = op_load_##T(c, op, &src, slow);                                                       \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        c->r[op->reg] = name##_##T(c->r[op->reg], src, &fl);                                          \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(name##_rm_##T)
#define REG_u16 "w"
#define REG_u32 "k"
#define REG_u64 "q"
FOR_WIDE_SIZES(SCAN, bsf)
FOR_WIDE_SIZES(SCAN, bsr)
FOR_WIDE_SIZES(SCAN, tzcnt)
FOR_WIDE_SIZES(SCAN, lzcnt)
FOR_WIDE_SIZES(SCAN, popcnt)

int bind_scan(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
#define SCAN_ROW(name) { { name##_rr_u16, name##_rr_u32, name##_rr_u64 }, { name##_rm_u16, name##_rm_u32, name##_rm_u64 } }
    static const op_fn table[SCAN_OPS][2][3] = {
        [SCAN_BSF] = SCAN_ROW(bsf), [SCAN_BSR] = SCAN_ROW(bsr), [SCAN_TZCNT] = SCAN_ROW(tzcnt),
        [SCAN_LZCNT] = SCAN_ROW(lzcnt), [SCAN_POPCNT] = SCAN_ROW(popcnt),
    };
    (void)c;
    if (d->insn.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)     /* VEX forms belong to a processor that is no more */
        return BIND_UD;
    enum form form = op_form(d, op);
    op->fn = table[arg][form == FORM_RM][size_index(op->size) - 1];
    return BIND_OK;
}

/* ---- three-operand BMI: dst = OP(a, b) in the manual's operand order ---- */
#define HOST3(name, insn, T, M)                                                                       \
    static inline T name##_##T(T a, T b, u32 *flags)                                                  \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        T r;                                                                                          \
        asm(ASM_FLAGS_IN insn " %" M "[b], %" M "[a], %" M "[r]\n\t" ASM_FLAGS_OUT : [r] "=r"(r), "+&a"(f) : [a] "r"(a), [b] "r"(b) : "cc"); \
        *flags = f;                                                                                   \
        return r;                                                                                     \
    }
#define HOST3_SIZES(name, insn) HOST3(name, insn, u32, "k") HOST3(name, insn, u64, "q")
HOST3_SIZES(andn, "andn")
HOST3_SIZES(bextr, "bextr")
HOST3_SIZES(bzhi, "bzhi")
HOST3_SIZES(pdep, "pdep")
HOST3_SIZES(pext, "pext")

struct bmi_args {
    u64 a, b;
};

/* The register operands of op_bmi3: op->reg destination, op->rm and low byte of aux sources; one of them may be memory. */
static int bmi_load(struct icpu *c, const struct op *op, struct bmi_args *s)
{
    u64 v = c->r[op->rm];
    if (op->flags & OPF_MEM && mem_load(c, op, op->size, &v))
        return OP_FAULT;
    s->a = v;
    s->b = c->r[op->aux & 0xff];
    return 0;
}

static u64 bmi3_compute(unsigned kind, unsigned size, u64 rm, u64 v, u32 *fl)
{
    bool wide = size == 8;
    switch (kind) {
    case BMI_ANDN: return wide ? andn_u64(v, rm, fl) : andn_u32((u32)v, (u32)rm, fl);
    case BMI_PDEP: return wide ? pdep_u64(v, rm, fl) : pdep_u32((u32)v, (u32)rm, fl);
    case BMI_PEXT: return wide ? pext_u64(v, rm, fl) : pext_u32((u32)v, (u32)rm, fl);
    /* AT&T order of these is reversed: the control comes first */
    case BMI_BEXTR: return wide ? bextr_u64(rm, v, fl) : bextr_u32((u32)rm, (u32)v, fl);
    default: return wide ? bzhi_u64(rm, v, fl) : bzhi_u32((u32)rm, (u32)v, fl);
    }
}

static int op_bmi3(struct icpu *c, const struct op *op)
{
    struct bmi_args s;
    u32 fl = c->fl;
    if (bmi_load(c, op, &s))
        return OP_FAULT;
    c->r[op->reg] = bmi3_compute(op->aux >> 8, op->size, s.a, s.b, &fl);
    c->fl = fl;
    return OP_NEXT;
}

static bool bmi_allowed(const struct icpu *c, const struct decoded *d, enum cpu_feature f)
{
    return vex_mode(d) && cpuid_has(c->v->m->cpuid, f);
}

int bind_bmi3(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    bool rm_last = arg == BMI_ANDN || arg == BMI_PDEP || arg == BMI_PEXT;
    const ZydisDecodedOperand *rm = &d->opnd[rm_last ? 2 : 1], *v = &d->opnd[rm_last ? 1 : 2];
    if (!bmi_allowed(c, d, arg == BMI_ANDN || arg == BMI_BEXTR ? CPU_BMI1 : CPU_BMI2))
        return BIND_UD;
    op->size = (u8)(d->opnd[0].size / 8);
    op->reg = op_gpr(d->opnd[0].reg.value);
    op->rm = rm->type == ZYDIS_OPERAND_TYPE_REGISTER ? op_gpr(rm->reg.value) : REG_ZERO;
    op->aux = arg << 8 | op_gpr(v->reg.value);
    op->fn = op_bmi3;
    return BIND_OK;
}

/* ---- BLSI, BLSMSK, BLSR ---- */
#define HOST2(name, T, M)                                                                             \
    static inline T name##_##T(T a, u32 *flags)                                                       \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        T r;                                                                                          \
        asm(ASM_FLAGS_IN #name " %" M "[a], %" M "[r]\n\t" ASM_FLAGS_OUT : [r] "=r"(r), "+&a"(f) : [a] "r"(a) : "cc"); \
        *flags = f;                                                                                   \
        return r;                                                                                     \
    }
HOST2(blsi, u32, "k")
HOST2(blsi, u64, "q")
HOST2(blsmsk, u32, "k")
HOST2(blsmsk, u64, "q")
HOST2(blsr, u32, "k")
HOST2(blsr, u64, "q")

static int op_bls(struct icpu *c, const struct op *op)
{
    u64 v = c->r[op->rm];
    u32 fl = c->fl;
    bool wide = op->size == 8;
    if (op->flags & OPF_MEM && mem_load(c, op, op->size, &v))
        return OP_FAULT;
    switch (op->aux) {
    case BMI_BLSI: v = wide ? blsi_u64(v, &fl) : blsi_u32((u32)v, &fl); break;
    case BMI_BLSMSK: v = wide ? blsmsk_u64(v, &fl) : blsmsk_u32((u32)v, &fl); break;
    default: v = wide ? blsr_u64(v, &fl) : blsr_u32((u32)v, &fl); break;
    }
    c->r[op->reg] = v;
    c->fl = fl;
    return OP_NEXT;
}

int bind_bls(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    if (!bmi_allowed(c, d, CPU_BMI1))
        return BIND_UD;
    op->size = (u8)(d->opnd[0].size / 8);
    op->reg = op_gpr(d->opnd[0].reg.value);
    op->rm = d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER ? op_gpr(d->opnd[1].reg.value) : REG_ZERO;
    op->aux = arg;
    op->fn = op_bls;
    return BIND_OK;
}

/* ---- CRC32 ---- */
static int op_crc32(struct icpu *c, const struct op *op)           /* op->size: of the source */
{
    u64 crc = (u32)c->r[op->reg], v;
    if (op->flags & OPF_MEM) {
        if (mem_load(c, op, op->size, &v))
            return OP_FAULT;
    } else {
        v = op->size == 1 ? get_u8(c, op->rm) : c->r[op->rm];
    }
    switch (op->size) {
    case 1: asm("crc32b %b[v], %k[crc]" : [crc] "+r"(crc) : [v] "q"(v)); break;
    case 2: asm("crc32w %w[v], %k[crc]" : [crc] "+r"(crc) : [v] "r"(v)); break;
    case 4: asm("crc32l %k[v], %k[crc]" : [crc] "+r"(crc) : [v] "r"(v)); break;
    default: asm("crc32q %q[v], %q[crc]" : [crc] "+r"(crc) : [v] "r"(v)); break;
    }
    c->r[op->reg] = crc;
    return OP_NEXT;
}

int bind_crc32(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op->size = (u8)(d->opnd[1].size / 8);
    op->reg = op_gpr(d->opnd[0].reg.value);
    if (d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER)
        op->rm = op_gpr(d->opnd[1].reg.value);
    op->fn = op_crc32;
    return BIND_OK;
}
