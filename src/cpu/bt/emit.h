/*
 * Host instructions (Intel SDM vol. 2): the few forms that translated code is made of. Memory operands are [gs:offset], an address within struct icpu, or base + index + displacement.
 */
#pragma once

#include <string.h>

#include "base/types.h"
#include "cpu/x86.h"

struct emit {
    u8 *p, *end;
    bool overflow;
};

#define NO_REG 0xffu
enum { CC_NZ = 5, CC_Z = 4 };

static inline void put8(struct emit *e, unsigned v)
{
    if (likely(e->p < e->end))
        *e->p++ = (u8)v;
    else
        e->overflow = true;
}
static inline void put_bytes(struct emit *e, const void *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        put8(e, ((const u8 *)b)[i]);
}
static inline void put32(struct emit *e, u32 v)
{
    put_bytes(e, &v, 4);
}
static inline void put64(struct emit *e, u64 v)
{
    put_bytes(e, &v, 8);
}
#define PUT(e, ...) put_bytes(e, (const u8[]){__VA_ARGS__}, sizeof((u8[]){__VA_ARGS__}))

/* ModRM, SIB and displacement for [base + index << scale + disp]; base and index may be NO_REG, index is never RSP. */
static inline void put_mem(struct emit *e, unsigned reg, unsigned base, unsigned index, unsigned scale, s32 disp)
{
    unsigned r = (reg & 7) << 3;
    if (base == NO_REG) {
        PUT(e, r | 4, scale << 6 | (index == NO_REG ? 4 : index & 7) << 3 | 5);
        put32(e, (u32)disp);
        return;
    }
    unsigned mod = disp == 0 && (base & 7) != 5 ? 0 : disp == (s8)disp ? 1 : 2;
    if (index == NO_REG && (base & 7) != 4)
        put8(e, mod << 6 | r | (base & 7));
    else
        PUT(e, mod << 6 | r | 4, scale << 6 | (index == NO_REG ? 4 : index & 7) << 3 | (base & 7));
    if (mod == 1)
        put8(e, (u8)disp);
    else if (mod == 2)
        put32(e, (u32)disp);
}
static inline unsigned rex_bits(unsigned reg, unsigned base, unsigned index)
{
    return (reg >> 3 & 1) << 2 | (index != NO_REG ? (index >> 3 & 1) << 1 : 0) | (base != NO_REG ? base >> 3 & 1 : 0);
}

/* 64-bit (w) or 32-bit instructions with a one-byte opcode: register forms, memory forms, [gs:off]. */
static inline void op_rr(struct emit *e, bool w, unsigned opcode, unsigned reg, unsigned rm)
{
    unsigned rex = (w ? 8u : 0u) | rex_bits(reg, rm, NO_REG);
    if (rex)
        put8(e, 0x40 | rex);
    PUT(e, opcode, 0xc0 | (reg & 7) << 3 | (rm & 7));
}
static inline void op_mem(struct emit *e, bool w, unsigned opcode, unsigned reg, unsigned base, unsigned index, unsigned scale, s32 disp)
{
    unsigned rex = (w ? 8u : 0u) | rex_bits(reg, base, index);
    if (rex)
        put8(e, 0x40 | rex);
    put8(e, opcode);
    put_mem(e, reg, base, index, scale, disp);
}
static inline void op_gs(struct emit *e, bool w, unsigned opcode, unsigned reg, size_t off)
{
    unsigned rex = (w ? 8u : 0u) | (reg >> 3 & 1) << 2;
    put8(e, 0x65);
    if (rex)
        put8(e, 0x40 | rex);
    PUT(e, opcode, (reg & 7) << 3 | 4, 0x25);
    put32(e, (u32)off);
}
/* [gs:index * 8 + off] */
static inline void op_gs_index(struct emit *e, bool w, unsigned opcode, unsigned reg, unsigned index, size_t off)
{
    unsigned rex = (w ? 8u : 0u) | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1;
    put8(e, 0x65);
    if (rex)
        put8(e, 0x40 | rex);
    PUT(e, opcode, (reg & 7) << 3 | 4, 0xc5 | (index & 7) << 3);
    put32(e, (u32)off);
}
/* BMI2's PEXT and PDEP (VEX.LZ.F3 and .F2.0F38.W1 F5 /r): dst = src by the mask in [gs:off]; they leave flags alone. */
static inline void put_pext_gs(struct emit *e, unsigned dst, unsigned src, size_t off)
{
    PUT(e, 0x65, 0xc4, (dst >> 3 & 1 ? 0 : 0x80) | 0x62, 0x80 | (~src & 15) << 3 | 2, 0xf5, (dst & 7) << 3 | 4, 0x25);
    put32(e, (u32)off);
}
static inline void put_pdep_gs(struct emit *e, unsigned dst, unsigned src, size_t off)
{
    PUT(e, 0x65, 0xc4, (dst >> 3 & 1 ? 0 : 0x80) | 0x62, 0x80 | (~src & 15) << 3 | 3, 0xf5, (dst & 7) << 3 | 4, 0x25);
    put32(e, (u32)off);
}
/* SHLX and SARX (VEX.LZ.66 and .F3.0F38.W1 F7 /r), RORX (VEX.LZ.F2.0F3A.W1 F0 /r ib): likewise. */
enum { SHLX = 1, SARX = 2 };
static inline void put_shift_x(struct emit *e, unsigned which, unsigned dst, unsigned src, unsigned count)
{
    PUT(e, 0xc4, (dst & 8 ? 0 : 0x80) | 0x40 | (src & 8 ? 0 : 0x20) | 2, 0x80 | (~count & 15) << 3 | which, 0xf7, 0xc0 | (dst & 7) << 3 | (src & 7));
}
static inline void put_rorx64(struct emit *e, unsigned dst, unsigned src, unsigned count)
{
    PUT(e, 0xc4, (dst & 8 ? 0 : 0x80) | 0x40 | (src & 8 ? 0 : 0x20) | 3, 0xfb, 0xf0, 0xc0 | (dst & 7) << 3 | (src & 7), count);
}
#define X_ADD 0x03
#define X_CMP 0x3b
#define X_STORE 0x89
#define X_LOAD 0x8b
#define X_LEA 0x8d
static inline void mov_imm64(struct emit *e, unsigned reg, u64 v)
{
    if (v == (u32)v) {
        if (reg & 8)
            put8(e, 0x41);
        put8(e, 0xb8 | (reg & 7));
        put32(e, (u32)v);
        return;
    }
    if ((s64)v == (s32)v) {
        PUT(e, 0x48 | (reg >> 3 & 1), 0xc7, 0xc0 | (reg & 7));
        put32(e, (u32)v);
        return;
    }
    PUT(e, 0x48 | (reg >> 3 & 1), 0xb8 | (reg & 7));
    put64(e, v);
}
static inline void mov_rr(struct emit *e, unsigned dst, unsigned src)
{
    op_rr(e, true, X_STORE, src, dst);
}
static inline void lea(struct emit *e, unsigned dst, unsigned base, s32 disp)
{
    op_mem(e, true, X_LEA, dst, base, NO_REG, 0, disp);
}
/* ADD OR AND CMP (/n) with a sign-extended immediate. */
static inline void alu_imm(struct emit *e, bool w, unsigned n, unsigned reg, s32 imm)
{
    unsigned rex = (w ? 8u : 0u) | (reg >> 3 & 1);
    if (rex)
        put8(e, 0x40 | rex);
    PUT(e, imm == (s8)imm ? 0x83 : 0x81, 0xc0 | n << 3 | (reg & 7));
    if (imm == (s8)imm)
        put8(e, (u8)imm);
    else
        put32(e, (u32)imm);
}
/* Jumps: the address of the displacement, for aim(). */
static inline u8 *jump(struct emit *e)
{
    put8(e, 0xe9);
    put32(e, 0);
    return e->p - 4;
}
static inline u8 *jump_if(struct emit *e, unsigned cc)
{
    PUT(e, 0x0f, 0x80 | cc);
    put32(e, 0);
    return e->p - 4;
}
static inline void aim(u8 *place, const u8 *target)
{
    s32 d = (s32)(target - (place + 4));
    memcpy(place, &d, 4);
}
static inline void jump_to(struct emit *e, const u8 *target)
{
    u8 *p = jump(e);
    if (!e->overflow)
        aim(p, target);
}
/*
 * Goes on if reg is 0, else jumps, both without touching flags: the address of the displacement. RCX and reg are exchanged where it leads to (put_swap_rcx).
 */
static inline void put_swap_rcx(struct emit *e, unsigned reg)
{
    op_rr(e, true, 0x87, RCX, reg);
}
static inline u8 *jump_unless_zero(struct emit *e, unsigned reg)
{
    put_swap_rcx(e, reg);
    PUT(e, 0xe3, 5);                                               /* jrcxz */
    u8 *place = jump(e);
    put_swap_rcx(e, reg);
    return place;
}
static inline void jump_if_to(struct emit *e, unsigned cc, const u8 *target)
{
    u8 *p = jump_if(e, cc);
    if (!e->overflow)
        aim(p, target);
}
static inline void call_to(struct emit *e, const u8 *target)
{
    put8(e, 0xe8);
    put32(e, 0);
    if (!e->overflow)
        aim(e->p - 4, target);
}
