/*
 * The other system instructions: HLT, cache and TLB control, MSRs, time, CPUID, hypercalls (SDM vol. 2).
 *
 * Caches are coherent and not modelled: INVD and WBINVD only check privilege. Hypercalls are pv.c's; VMCALL and VMMCALL
 * are the same.
 */
#include "cpu/interp/sys.h"

#include <errno.h>

#include "cpu/bt/codepage.h"
#include "cpu/msr.h"
#include "cpu/pv.h"

#define MSR_APIC_BASE 0x1bu
#define APIC_BASE_ENABLE BIT(11)
#define MSR_EFER 0xc0000080u

static int op_clts(struct icpu *c, const struct op *op)
{
    (void)op;
    if (c->cpl)
        return fault_gp(c, 0);
    icpu_claim(c);
    c->x->cr0 &= ~(u64)CR0_TS;
    return OP_NEXT;
}

static int op_hlt(struct icpu *c, const struct op *op)
{
    (void)op;
    return c->cpl ? fault_gp(c, 0) : OP_HALT;
}

static int op_wbinvd(struct icpu *c, const struct op *op)
{
    (void)op;
    return c->cpl ? fault_gp(c, 0) : OP_NEXT;
}

/* ---- TLB ---- */

static int op_invlpg(struct icpu *c, const struct op *op)
{
    if (c->cpl)
        return fault_gp(c, 0);
    u64 la = linear_unchecked(c, op);
    if (is_canonical(la))                  /* else it does nothing */
        tlb_flush_page(c, la);
    return OP_END;
}

enum { INVPCID_ADDRESS, INVPCID_CONTEXT, INVPCID_ALL_GLOBAL, INVPCID_ALL };

static int op_invpcid(struct icpu *c, const struct op *op)
{
    u64 la, pcid, addr, type = in_64bit(c) ? c->r[op->reg] : (u32)c->r[op->reg];
    if (c->cpl)
        return fault_gp(c, 0);
    if (mem_linear(c, op, 16, MMU_READ, &la) || lin_load(c, la, 8, &pcid))
        return OP_FAULT;
    if (lin_load(c, in_64bit(c) ? la + 8 : (u32)(la + 8), 8, &addr))
        return OP_FAULT;
    if (type > INVPCID_ALL || pcid >> 12)
        return fault_gp(c, 0);
    if (type <= INVPCID_CONTEXT && pcid && !(c->x->cr4 & CR4_PCIDE))
        return fault_gp(c, 0);
    if (type == INVPCID_ADDRESS && !is_canonical(addr))
        return fault_gp(c, 0);
    switch (type) {
    case INVPCID_ADDRESS:
        tlb_flush_pcid_page(c, pcid, addr);
        break;
    case INVPCID_CONTEXT:
        tlb_flush_pcid(c, pcid);
        break;
    case INVPCID_ALL_GLOBAL:
        tlb_flush_all(c);
        break;
    case INVPCID_ALL:
        tlb_flush_pcids(c);
        break;
    }
    return OP_END;
}

int bind_invpcid(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)arg;
    if (!cpuid_has(c->v->m->cpuid, CPU_INVPCID))
        return BIND_UD;
    op->reg = reg_id(d, 0);
    op->fn = op_invpcid;
    return BIND_OK;
}

/* ---- model-specific registers ---- */

static int op_rdmsr(struct icpu *c, const struct op *op)
{
    u64 val;
    (void)op;
    if (c->cpl)
        return fault_gp(c, 0);
    codepage_leave(c);                     /* the local APIC's */
    int r = msr_read(c->v, c->x, (u32)c->r[RCX], &val);
    codepage_enter(c);
    if (r)
        return fault_gp(c, 0);
    c->r[RAX] = (u32)val;
    c->r[RDX] = val >> 32;
    return OP_NEXT;
}

static int op_wrmsr(struct icpu *c, const struct op *op)
{
    u32 msr = (u32)c->r[RCX];
    (void)op;
    if (c->cpl)
        return fault_gp(c, 0);
    codepage_leave(c);
    int r = msr_write(c->v, c->x, msr, c->r[RDX] << 32 | (u32)c->r[RAX]);
    codepage_enter(c);
    if (r)
        return fault_gp(c, 0);
    if (msr == MSR_EFER)
        icpu_mode(c);                      /* NXE changes what the TLB may hold */
    return OP_END;
}

/* ---- time ---- */

static u64 tsc(const struct icpu *c)
{
    return clock_tsc(c->v->m->clock) + (u64)c->x->tsc_adjust;
}

static int op_rdtsc(struct icpu *c, const struct op *op)
{
    (void)op;
    if (c->x->cr4 & CR4_TSD && c->cpl)
        return fault_gp(c, 0);
    u64 now = tsc(c);
    c->r[RAX] = (u32)now;
    c->r[RDX] = now >> 32;
    return OP_NEXT;
}

static int op_rdtscp(struct icpu *c, const struct op *op)
{
    if (!cpuid_has(c->v->m->cpuid, CPU_RDTSCP))
        return fault_ud(c);
    if (op_rdtsc(c, op))
        return OP_FAULT;
    c->r[RCX] = (u32)c->x->tsc_aux;
    return OP_NEXT;
}

/* AMD's four legacy counters exist and stand at zero; Intel's leaf 0xa says that there is none. */
static int op_rdpmc(struct icpu *c, const struct op *op)
{
    (void)op;
    if (c->cpl && !(c->x->cr4 & CR4_PCE))
        return fault_gp(c, 0);
    if (!guest_is_amd(c) || (u32)c->r[RCX] > 3)
        return fault_gp(c, 0);
    c->r[RAX] = c->r[RDX] = 0;
    return OP_NEXT;
}

static int op_rdpid(struct icpu *c, const struct op *op)
{
    c->r[op->rm] = (u32)c->x->tsc_aux;
    return OP_NEXT;
}

int bind_rdpid(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)arg;
    if (!cpuid_has(c->v->m->cpuid, CPU_RDPID))
        return BIND_UD;
    op->rm = reg_id(d, 0);
    op->fn = op_rdpid;
    return BIND_OK;
}

/* ---- CPUID, hypercalls ---- */

static int op_cpuid(struct icpu *c, const struct op *op)
{
    const struct intc *intc = &c->v->intc;
    struct cpuid_regs r;
    u64 base = APIC_BASE_ENABLE;
    u32 leaf = (u32)c->r[RAX];
    (void)op;
    vcpu_count(c->v, COUNT_CPUID);
    if (leaf == 1)
        icpu_claim(c);
    codepage_leave(c);
    if (leaf == 1 && intc->ops && intc->ops->msr_read(intc->chip, MSR_APIC_BASE, &base))
        base = APIC_BASE_ENABLE;
    codepage_enter(c);
    cpuid_get(c->v->m->cpuid, c->v->id, c->x, base & APIC_BASE_ENABLE, leaf, (u32)c->r[RCX], &r);
    c->r[RAX] = r.eax;
    c->r[RBX] = r.ebx;
    c->r[RCX] = r.ecx;
    c->r[RDX] = r.edx;
    return OP_NEXT;
}

static int op_vmcall(struct icpu *c, const struct op *op)
{
    bool wide = in_64bit(c);
    u64 mask = wide ? ~0ull : 0xffffffff;
    const u64 arg[4] = {c->r[RBX] & mask, c->r[RCX] & mask, c->r[RDX] & mask, c->r[RSI] & mask};
    (void)op;
    codepage_leave(c);
    c->r[RAX] = (u64)pv_hypercall(c->v, c->x, c->r[RAX] & mask, arg, wide) & mask;
    codepage_enter(c);
    return OP_NEXT;
}

int bind_plain(struct icpu *c, const struct decoded *d, struct op *op, unsigned which)
{
    static const struct {
        op_fn fn;
        int bound;
    } plain[SYS_PLAINS] = {
        [SYS_CLTS] = {op_clts, BIND_OK},           [SYS_HLT] = {op_hlt, BIND_LAST},
        [SYS_INVD] = {op_wbinvd, BIND_OK},         [SYS_WBINVD] = {op_wbinvd, BIND_OK},
        [SYS_INVLPG] = {op_invlpg, BIND_OK},       [SYS_RDMSR] = {op_rdmsr, BIND_OK},
        [SYS_WRMSR] = {op_wrmsr, BIND_OK},         [SYS_RDTSC] = {op_rdtsc, BIND_OK},
        [SYS_RDTSCP] = {op_rdtscp, BIND_OK},       [SYS_RDPMC] = {op_rdpmc, BIND_OK},
        [SYS_CPUID] = {op_cpuid, BIND_OK},         [SYS_SYSCALL] = {op_syscall, BIND_LAST},
        [SYS_SYSENTER] = {op_sysenter, BIND_LAST}, [SYS_SYSEXIT] = {op_sysexit, BIND_LAST},
        [SYS_SWAPGS] = {op_swapgs, BIND_OK},       [SYS_VMCALL] = {op_vmcall, BIND_OK},
    };
    (void)c;
    op->size = (u8)insn_size(d);
    op->fn = plain[which].fn;
    return plain[which].bound;
}
