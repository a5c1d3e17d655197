/*
 * Debug registers and #DB (SDM vol. 3B 18.2, 18.3).
 *
 * The loop finds instruction breakpoints and single steps, the memory path data breakpoints, port accesses I/O
 * breakpoints; here is what they do to DR6. DR6's bits stick until the guest clears them. BTF and LBR are not modelled.
 */
#include "cpu/interp/sys.h"
#include "cpu/interp/tlb.h"

#define DR6_FIXED 0xffff0ff0u
#define DR6_WRITABLE 0xe00fu               /* B0..B3 BD BS BT */
#define DR6_BD 0x2000u
#define DR7_FIXED 0x400u
#define DR7_WRITABLE 0xffff23ffu
#define DR7_GD 0x2000u

int debug_raise(struct icpu *c, u64 dr6_bits)
{
    /* B0..B3 of earlier exceptions are cleared, the others stay (18.2.3). */
    c->x->dr6 = (c->x->dr6 & ~0xfull) | DR6_FIXED | (dr6_bits & DR6_WRITABLE);
    return fault_raise(c, VEC_DB);
}

void debug_port(struct icpu *c, u16 port, unsigned size)
{
    static const u8 length[] = {1, 2, 8, 4};
    u64 dr7 = c->x->dr7;
    if (likely(!(dr7 & 0xff)) || !(c->x->cr4 & CR4_DE))
        return;
    for (unsigned i = 0; i < 4; i++) {
        unsigned len = length[dr7 >> (18 + i * 4) & 3];
        u64 first = c->x->dr[i] & ~(u64)(len - 1);
        bool enabled = dr7 >> i * 2 & 3, io = (dr7 >> (16 + i * 4) & 3) == 2;
        if (enabled && io && port < first + len && port + size > first)
            c->db_pending |= BIT(i);
    }
}

/* The register that a number means now; #UD for DR4 and DR5 with CR4.DE. General detect comes after the privilege
 * check. */
static int check(struct icpu *c, const struct op *op, unsigned *n)
{
    *n = op->reg;
    if (op->reg == 4 || op->reg == 5) {
        if (c->x->cr4 & CR4_DE)
            return fault_ud(c);
        *n = op->reg + 2u;
    }
    if (c->cpl)
        return fault_gp(c, 0);
    if (c->x->dr7 & DR7_GD) {
        c->flags |= FLAG_RF;               /* a fault: the saved image has RF set */
        return debug_raise(c, DR6_BD);
    }
    return 0;
}

static int op_mov_from_dr(struct icpu *c, const struct op *op)
{
    unsigned n;
    if (check(c, op, &n))
        return OP_FAULT;
    u64 val = n < 4 ? c->x->dr[n] : n == 6 ? c->x->dr6 : c->x->dr7;
    c->r[op->rm] = in_64bit(c) ? val : (u32)val;
    return OP_NEXT;
}

static int op_mov_to_dr(struct icpu *c, const struct op *op)
{
    unsigned n;
    u64 val = in_64bit(c) ? c->r[op->rm] : (u32)c->r[op->rm];
    if (check(c, op, &n))
        return OP_FAULT;
    if (n < 4) {
        c->x->dr[n] = val;
    } else if (val >> 32) {
        return fault_gp(c, 0);
    } else if (n == 6) {
        c->x->dr6 = (val & DR6_WRITABLE) | DR6_FIXED;
    } else {
        c->x->dr7 = (val & DR7_WRITABLE) | DR7_FIXED;
    }
    tlb_watchpoints(c);
    return OP_END;
}

int bind_mov_dr(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    bool to = ZydisRegisterGetClass(d->opnd[0].reg.value) == ZYDIS_REGCLASS_DEBUG;
    (void)c;
    (void)arg;
    op->reg = reg_id(d, to ? 0 : 1);
    op->rm = reg_id(d, to ? 1 : 0);
    if (op->reg > 7)
        return BIND_UD;
    op->fn = to ? op_mov_to_dr : op_mov_from_dr;
    return BIND_LAST;
}
