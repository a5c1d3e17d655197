/*
 * For the integer instruction families: registers by operand size, host flags, operand forms, binders.
 *
 * Handlers are generated per operation, size and form by macros over the types u8, u16, u32, u64. Byte registers are named by their offset in icpu.r
 * (number * 8, AH..BH one more): op_form() renames them, so that AH costs nothing extra.
 */
#pragma once

#include <string.h>

#include "cpu/interp/access.h"

/* ---- registers ---- */
static inline u8 get_u8(const struct icpu *c, unsigned off)
{
    return ((const u8 *)c->r)[off];
}
static inline u16 get_u16(const struct icpu *c, unsigned n)
{
    return (u16)c->r[n];
}
static inline u32 get_u32(const struct icpu *c, unsigned n)
{
    return (u32)c->r[n];
}
static inline u64 get_u64(const struct icpu *c, unsigned n)
{
    return c->r[n];
}
/* Small writes merge into the whole register: a later 64-bit read then finds one store to take its value from. */
static inline void set_u8(struct icpu *c, unsigned off, u8 v)
{
    u64 *r = &c->r[off >> 3];
    unsigned shift = (off & 1) * 8;
    *r = (*r & ~(0xffull << shift)) | (u64)v << shift;
}
static inline void set_u16(struct icpu *c, unsigned n, u16 v)
{
    c->r[n] = (c->r[n] & ~0xffffull) | v;
}
static inline void set_u32(struct icpu *c, unsigned n, u32 v)
{
    c->r[n] = v;
}
static inline void set_u64(struct icpu *c, unsigned n, u64 v)
{
    c->r[n] = v;
}
/* By size in bytes, for families where speed does not matter. Byte registers by number: low bytes only. */
static inline u64 get_reg(const struct icpu *c, unsigned n, unsigned size)
{
    return size == 8 ? c->r[n] : c->r[n] & (BIT(8 * size) - 1);
}
static inline void set_reg(struct icpu *c, unsigned n, unsigned size, u64 v)
{
    switch (size) {
    case 1: set_u8(c, n * 8, (u8)v); break;
    case 2: set_u16(c, n, (u16)v); break;
    default: c->r[n] = size == 4 ? (u32)v : v; break;
    }
}

/* ---- host flags, for inline assembly with icpu.fl in EAX ---- */
#define ASM_FLAGS_OUT "lahf\n\tseto %%al"
#define ASM_CARRY_IN "btl $8, %%eax\n\t"
#define ASM_FLAGS_IN "addb $0x7f, %%al\n\tsahf\n\t"

/* The letter of an instruction's operand size. */
#define ASM_u8 "b"
#define ASM_u16 "w"
#define ASM_u32 "l"
#define ASM_u64 "q"

#define FOR_SIZES(M, ...) M(u8, __VA_ARGS__) M(u16, __VA_ARGS__) M(u32, __VA_ARGS__) M(u64, __VA_ARGS__)
#define FOR_WIDE_SIZES(M, ...) M(u16, __VA_ARGS__) M(u32, __VA_ARGS__) M(u64, __VA_ARGS__)

/* ---- conditions: 0..15 as encoded in Jcc, SETcc, CMOVcc ---- */
static inline bool fl_less(u32 fl)                                 /* SF != OF */
{
    return (fl >> 15 ^ fl) & 1;
}
#define CC_0(fl) ((fl) & FL_OF)
#define CC_1(fl) (!((fl) & FL_OF))
#define CC_2(fl) ((fl) & FL_CF)
#define CC_3(fl) (!((fl) & FL_CF))
#define CC_4(fl) ((fl) & FL_ZF)
#define CC_5(fl) (!((fl) & FL_ZF))
#define CC_6(fl) ((fl) & (FL_CF | FL_ZF))
#define CC_7(fl) (!((fl) & (FL_CF | FL_ZF)))
#define CC_8(fl) ((fl) & FL_SF)
#define CC_9(fl) (!((fl) & FL_SF))
#define CC_10(fl) ((fl) & FL_PF)
#define CC_11(fl) (!((fl) & FL_PF))
#define CC_12(fl) fl_less(fl)
#define CC_13(fl) (!fl_less(fl))
#define CC_14(fl) ((fl) & FL_ZF || fl_less(fl))
#define CC_15(fl) (!((fl) & FL_ZF) && !fl_less(fl))
#define FOR_CONDITIONS(M) \
    M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)

/* ---- operand forms ---- */
enum form {
    FORM_RR,           /* first operand op->rm, second op->reg */
    FORM_RI,           /* op->rm, op->imm */
    FORM_RM,           /* op->reg, memory */
    FORM_MR,           /* memory, op->reg */
    FORM_MI,           /* memory, op->imm */
    FORM_R,            /* op->rm */
    FORM_M,            /* memory */
    FORMS,
    FORM_NONE = -1,
};
/* The form of the first two (explicit or implied, not hidden) operands. Sets op->reg, op->rm, op->size from the first operand. */
enum form op_form(const struct decoded *d, struct op *op);
/* 1, 2, 4, 8 to 0, 1, 2, 3 */
static inline unsigned size_index(unsigned size)
{
    return (unsigned)__builtin_ctz(size);
}
/* How a register of size bytes is named in op->reg and op->rm: op_form()'s rule for other operands. */
u8 op_gpr(ZydisRegister reg);

static inline u64 next_ip(const struct icpu *c, const struct op *op)
{
    return op_next_rip(c, op) & c->rip_mask;
}

/* ---- binders; rows in insn_int.def ---- */
#define BINDER(name) int name(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
enum { ALU_ADD, ALU_OR, ALU_ADC, ALU_SBB, ALU_AND, ALU_SUB, ALU_XOR, ALU_CMP, ALU_TEST, ALU_OPS };
BINDER(bind_alu);
enum { UNARY_INC, UNARY_DEC, UNARY_NEG, UNARY_NOT, UNARY_OPS };
BINDER(bind_unary);
BINDER(bind_adx);
enum { SHIFT_ROL, SHIFT_ROR, SHIFT_RCL, SHIFT_RCR, SHIFT_SHL, SHIFT_SHR, SHIFT_SAR, SHIFT_OPS };
BINDER(bind_shift);
BINDER(bind_shift_double);
BINDER(bind_shift_x);
enum { MULDIV_MUL, MULDIV_IMUL, MULDIV_DIV, MULDIV_IDIV, MULDIV_OPS };
BINDER(bind_muldiv);
BINDER(bind_mulx);
BINDER(bind_mov);
BINDER(bind_movx);
BINDER(bind_lea);
BINDER(bind_cmov);
BINDER(bind_setcc);
BINDER(bind_movbe);
BINDER(bind_bswap);
BINDER(bind_movnti);
BINDER(bind_convert);
BINDER(bind_flagop);
BINDER(bind_xlat);
BINDER(bind_bt);
enum { SCAN_BSF, SCAN_BSR, SCAN_TZCNT, SCAN_LZCNT, SCAN_POPCNT, SCAN_OPS };
BINDER(bind_scan);
enum { BMI_ANDN, BMI_BEXTR, BMI_BZHI, BMI_PDEP, BMI_PEXT, BMI_OPS };
BINDER(bind_bmi3);
enum { BMI_BLSI, BMI_BLSMSK, BMI_BLSR, BMI_BLS_OPS };
BINDER(bind_bls);
BINDER(bind_rorx);
BINDER(bind_crc32);
BINDER(bind_bcd);
BINDER(bind_bound);
BINDER(bind_random);
BINDER(bind_nop);
BINDER(bind_clflush);
BINDER(bind_fence);
BINDER(bind_ud);
BINDER(bind_jcc);
BINDER(bind_jmp);
BINDER(bind_call);
BINDER(bind_ret);
BINDER(bind_loop);
BINDER(bind_push);
BINDER(bind_pop);
BINDER(bind_pusha);
BINDER(bind_popa);
BINDER(bind_enter);
BINDER(bind_leave);
BINDER(bind_string);
BINDER(bind_xchg);
BINDER(bind_xchg_acc);                                             /* R8 with the accumulator */
BINDER(bind_xadd);
BINDER(bind_cmpxchg);
BINDER(bind_cmpxchg_pair);
