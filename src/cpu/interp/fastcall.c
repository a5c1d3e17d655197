/*
 * SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS/GS base instructions (SDM vol. 2; AMD APM vol. 3).
 *
 * The two vendors differ, and the guest's vendor is the host's: on AMD, SYSCALL and SYSRET also work outside 64-bit
 * mode, SYSENTER and SYSEXIT do not exist in long mode, and SYSRET does not check RCX (the fetch faults, at CPL 3).
 */
#include "cpu/interp/sys.h"

#define FLAT_CODE32 0xc9bu

static void flat_seg(struct icpu *c, unsigned seg, u16 sel, unsigned attr)
{
    c->x->seg[seg] = (struct x86_seg){.sel = sel, .limit = 0xffffffff, .attr = (u16)attr};
}

/* ---- SYSCALL, SYSRET ---- */

int op_syscall(struct icpu *c, const struct op *op)
{
    struct x86 *x = c->x;
    bool lma = in_long_mode(c);
    if (!(x->efer & EFER_SCE) || in_real(c) || in_v86(c) || (!in_64bit(c) && !guest_is_amd(c)))
        return fault_ud(c);
    u16 cs = x->star >> 32 & 0xfffc;
    u64 flags = icpu_rflags(c) & ~(u64)FLAG_RF;
    if (lma) {
        c->r[RCX] = next_rip(c, op);
        c->r[R11] = flags;
        c->rip = in_64bit(c) ? x->lstar : x->cstar;
        flags_write(c, flags & ~x->sfmask, ~0ull);
    } else {
        c->r[RCX] = (u32)next_rip(c, op);
        c->rip = (u32)x->star;
        flags_write(c, 0, FLAG_IF | FLAG_RF | FLAG_VM);
    }
    flat_seg(c, SEG_CS, cs, lma ? SEG_FLAT_CODE64 : FLAT_CODE32);
    flat_seg(c, SEG_SS, cs + 8, SEG_FLAT_DATA);
    icpu_mode(c);
    return OP_JUMP;
}

static int op_sysret(struct icpu *c, const struct op *op)
{
    struct x86 *x = c->x;
    bool amd = guest_is_amd(c), wide = op->size == 8;
    if (!(x->efer & EFER_SCE) || in_real(c) || in_v86(c) || (!in_64bit(c) && !amd))
        return fault_ud(c);
    if (c->cpl || (wide && !amd && !is_canonical(c->r[RCX])))
        return fault_gp(c, 0);
    u16 base = (u16)(x->star >> 48);
    flat_seg(c, SEG_CS, (u16)(base + (wide ? 16 : 0)) | 3, (wide ? SEG_FLAT_CODE64 : FLAT_CODE32) | SEG_FLAT_DPL3);
    flat_seg(c, SEG_SS, amd ? (u16)(base + 8) : (u16)(base + 8) | 3, SEG_FLAT_DATA | SEG_FLAT_DPL3);
    c->rip = wide ? c->r[RCX] : (u32)c->r[RCX];
    if (in_long_mode(c))
        flags_write(c, c->r[R11] & SYSRET_FLAGS, SYSRET_FLAGS | FLAG_RF | FLAG_VM);
    else
        flags_write(c, FLAG_IF, FLAG_IF | FLAG_RF | FLAG_VM);
    icpu_mode(c);
    return OP_JUMP;
}

int bind_sysret(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op->size = (u8)insn_size(d);
    op->fn = op_sysret;
    return BIND_LAST;
}

/* ---- SYSENTER, SYSEXIT ---- */

int op_sysenter(struct icpu *c, const struct op *op)
{
    struct x86 *x = c->x;
    bool lma = in_long_mode(c);
    (void)op;
    if (lma && guest_is_amd(c))
        return fault_ud(c);
    if (in_real(c) || !(x->sysenter_cs & 0xfffc))
        return fault_gp(c, 0);
    u16 cs = x->sysenter_cs & 0xfffc;
    flags_write(c, 0, FLAG_VM | FLAG_IF | FLAG_RF);
    flat_seg(c, SEG_CS, cs, lma ? SEG_FLAT_CODE64 : FLAT_CODE32);
    flat_seg(c, SEG_SS, cs + 8, SEG_FLAT_DATA);
    c->rip = lma ? x->sysenter_eip : (u32)x->sysenter_eip;
    c->r[RSP] = lma ? x->sysenter_esp : (u32)x->sysenter_esp;
    icpu_mode(c);
    return OP_JUMP;
}

int op_sysexit(struct icpu *c, const struct op *op)
{
    struct x86 *x = c->x;
    bool wide = op->size == 8;
    if (in_long_mode(c) && guest_is_amd(c))
        return fault_ud(c);
    if (in_real(c) || c->cpl || !(x->sysenter_cs & 0xfffc))
        return fault_gp(c, 0);
    if (wide && !(is_canonical(c->r[RCX]) && is_canonical(c->r[RDX])))
        return fault_gp(c, 0);
    u16 cs = (u16)((x->sysenter_cs & 0xfffc) + (wide ? 32 : 16));
    flat_seg(c, SEG_CS, cs | 3, (wide ? SEG_FLAT_CODE64 : FLAT_CODE32) | SEG_FLAT_DPL3);
    flat_seg(c, SEG_SS, (u16)(cs + 8) | 3, SEG_FLAT_DATA | SEG_FLAT_DPL3);
    c->rip = wide ? c->r[RDX] : (u32)c->r[RDX];
    c->r[RSP] = wide ? c->r[RCX] : (u32)c->r[RCX];
    icpu_mode(c);
    return OP_JUMP;
}

/* ---- SWAPGS, FS and GS bases ---- */

int op_swapgs(struct icpu *c, const struct op *op)
{
    (void)op;
    if (!in_64bit(c))
        return fault_ud(c);
    if (c->cpl)
        return fault_gp(c, 0);
    u64 base = c->x->seg[SEG_GS].base;
    c->x->seg[SEG_GS].base = c->x->kernel_gs_base;
    c->x->kernel_gs_base = base;
    return OP_NEXT;
}

static int op_rdbase(struct icpu *c, const struct op *op)
{
    if (!(c->x->cr4 & CR4_FSGSBASE))
        return fault_ud(c);
    gpr_write(c, op->rm, op->size, c->x->seg[op->aux].base);
    return OP_NEXT;
}

static int op_wrbase(struct icpu *c, const struct op *op)
{
    u64 val = op->size == 8 ? c->r[op->rm] : (u32)c->r[op->rm];
    if (!(c->x->cr4 & CR4_FSGSBASE))
        return fault_ud(c);
    if (!is_canonical(val))
        return fault_gp(c, 0);
    c->x->seg[op->aux].base = val;
    return OP_NEXT;
}

int bind_fsgsbase(struct icpu *c, const struct decoded *d, struct op *op, unsigned what)
{
    (void)c;
    if (d->mode != IMODE_LONG64)
        return BIND_UD;
    op->aux = what & BASE_GS ? SEG_GS : SEG_FS;
    op->size = d->insn.operand_width == 64 ? 8 : 4;
    op->rm = reg_id(d, 0);
    op->fn = what & BASE_WRITE ? op_wrbase : op_rdbase;
    return BIND_OK;
}
