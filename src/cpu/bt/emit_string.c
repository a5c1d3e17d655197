/*
 * String instructions, and bit strings: BT, BTS, BTR, BTC of memory with the bit's number in a register (SDM vol. 2, vol. 1 3.5.2.4 and 7.3.9).
 *
 * By the shadow a string instruction runs as it is, repeated or not, on host addresses: RSI and RDI are led there and back again. What stops it on its way, a
 * fault or an event, finds the progress in its registers (MARK_STRING, fault.c), so it begins anew with what is left. One that goes backwards is the
 * interpreter's, as are all of them with the software TLB: its handler does a page at a time with the host's own instruction.
 */
#include "cpu/bt/tr.h"

/* ---- string instructions ---- */
static void to_host(struct tr *t, unsigned reg, unsigned delta)
{
    struct emit *e = &t->e;
    put_pext_gs(e, delta, reg, OFF(bt.mask_slot));
    op_gs_index(e, true, X_LOAD, delta, delta, OFF(bt.delta[0][0]) + t->view * 4096u);
    op_mem(e, true, X_LEA, reg, reg, delta, 0, 0);
}

static void from_host(struct tr *t, unsigned reg, unsigned delta)
{
    struct emit *e = &t->e;
    PUT(e, 0x49, 0xf7, 0xd0 | (delta & 7));                        /* not: -delta - 1 */
    op_mem(e, true, X_LEA, reg, reg, delta, 0, 1);
}

/* Ends in the handler if DF is set. */
static void put_forwards(struct tr *t)
{
    struct emit *e = &t->e;
    op_gs(e, false, X_LOAD, S0, OFF(flags));
    put_pext_gs(e, S0, S0, OFF(bt.mask_df));
    struct cold *k = tr_cold(t, jump_unless_zero(e, S0), COLD_HANDLER);
    k->swapped = true;
    k->reg = S0;
}

static void put_string(struct emit *e, const struct decoded *d)
{
    const ZydisDecodedInstruction *z = &d->insn;
    for (unsigned n = 0; n < z->raw.prefix_count; n++) {
        u8 v = z->raw.prefixes[n].value;
        if (v == 0x66 || v == 0xf2 || v == 0xf3)
            put8(e, v);
    }
    if (z->attributes & ZYDIS_ATTRIB_HAS_REX && z->raw.rex.W)
        put8(e, 0x48);
    put8(e, z->opcode);
}

static bool string(struct tr *t, const struct op *op, bool source, bool dest)
{
    if (!t->shadow || op->asize != 8 || (source && op->seg >= SEG_FS))
        return false;
    t->kept = NO_REG;
    put_forwards(t);
    if (dest)
        to_host(t, RDI, S0);
    if (source)
        to_host(t, RSI, S1);
    else
        mov_imm64(&t->e, S1, 0);
    if (!dest)
        mov_imm64(&t->e, S0, 0);
    tr_mark(t, t->i, MARK_STRING | (t->shadowed && t->i == t->shadowed ? MARK_SHADOW : 0));
    put_string(&t->e, &tr_item(t)->d);
    if (dest)
        from_host(t, RDI, S0);
    if (source)
        from_host(t, RSI, S1);
    return true;
}

/* ---- bit strings ---- */
/* SARX (VEX.LZ.F3.0F38.W1 F7 /r): dst = src >> by, arithmetically. Host registers. */
static void put_sarx(struct emit *e, unsigned dst, unsigned src, unsigned by)
{
    PUT(e, 0xc4, (dst & 8 ? 0 : 0x80) | 0x40 | (src & 8 ? 0 : 0x20) | 2, 0x80 | (~by & 15) << 3 | 2, 0xf7, 0xc0 | (dst & 7) << 3 | (src & 7));
}

/* S1 = the guest's register, of this operand size, as a signed number. */
static void put_signed(struct tr *t, unsigned g, unsigned size)
{
    struct emit *e = &t->e;
    unsigned r = tr_read(t, g, S1);
    if (size == 8)
        mov_rr(e, S1, r);
    else if (size == 4)
        op_rr(e, true, 0x63, S1, r);                               /* movsxd */
    else
        PUT(e, 0x48 | 4 | (r >> 3), 0x0f, 0xbf, 0xc0 | (S1 & 7) << 3 | (r & 7)); /* movsx r15, r16 */
}

static bool bit_string(struct tr *t, const struct op *op)
{
    static const struct ea there = { REG_TMP, REG_ZERO, 0, SEG_DS, 0 };
    const struct decoded *d = &tr_item(t)->d;
    struct emit *e = &t->e;
    unsigned size = op->size, shift = size == 8 ? 3 : size == 4 ? 2 : 1, g = tr_gpr(&d->opnd[1]), scratch;
    struct place p;
    struct ea m;
    if (!t->t->bmi2 || !tr_ea(t, op, &m))
        return false;
    t->kept = NO_REG;
    put_signed(t, g, size);
    mov_imm64(e, S0, shift + 3);
    put_sarx(e, S1, S1, S0);
    op_gs(e, true, X_STORE, S1, OFF(bt.tmp[TMP_ADDRESS]));
    tr_address(t, &m, S1, true);
    op_gs(e, true, X_LOAD, S0, OFF(bt.tmp[TMP_ADDRESS]));
    op_mem(e, true, X_LEA, S1, S1, S0, shift, 0);
    op_gs(e, true, X_STORE, S1, OFF(bt.tmp[TMP_ADDRESS]));
    if (!tr_mem(t, &there, size, d->insn.mnemonic == ZYDIS_MNEMONIC_BT ? MMU_READ : MMU_WRITE, TR_SCRATCH, &p, &scratch))
        return false;
    put_pext_gs(e, scratch, tr_read(t, g, scratch), OFF(bt.mask_bit[shift - 1]));
    tr_copy(t, d, scratch, 0, &p, false);
    return true;
}

bool tr_string(struct tr *t, const struct op *op)
{
    switch (tr_item(t)->d.insn.mnemonic) {
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        return bit_string(t, op);
    case ZYDIS_MNEMONIC_MOVSB: case ZYDIS_MNEMONIC_MOVSW: case ZYDIS_MNEMONIC_MOVSD: case ZYDIS_MNEMONIC_MOVSQ:
    case ZYDIS_MNEMONIC_CMPSB: case ZYDIS_MNEMONIC_CMPSW: case ZYDIS_MNEMONIC_CMPSD: case ZYDIS_MNEMONIC_CMPSQ:
        return string(t, op, true, true);
    case ZYDIS_MNEMONIC_LODSB: case ZYDIS_MNEMONIC_LODSW: case ZYDIS_MNEMONIC_LODSD: case ZYDIS_MNEMONIC_LODSQ:
        return string(t, op, true, false);
    default:                                                       /* STOS, SCAS */
        return string(t, op, false, true);
    }
}
