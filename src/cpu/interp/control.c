/*
 * Control registers: MOV CRn, LMSW, SMSW, CLTS (SDM vol. 2 MOV to control registers; vol.
 * 3A 2.5, 4.1, 4.4.1, 4.10, 10.8.5).
 *
 * All checks come before any change. A change of paging or rights drops what the TLB must not keep; leaving the block
 * re-reads the mode.
 */
#include "cpu/bt/codepage.h"
#include "cpu/interp/sys.h"

#define CR0_DEFINED (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG)
#define CR3_NO_FLUSH BIT(63)

static bool pae_paging(u64 cr0, u64 cr4, u64 efer)
{
    return cr0 & CR0_PG && cr4 & CR4_PAE && !(efer & EFER_LME);
}

static bool load_pdptes(struct icpu *c, u64 cr3, u64 pdpte[4])
{
    return mmu_load_pdptes(c->v->m->ram, cr3, (u8)cpuid_phys_bits(c->v->m->cpuid), pdpte);
}

static void keep_pdptes(struct icpu *c, const u64 pdpte[4])
{
    for (unsigned i = 0; i < 4; i++)
        c->x->pdpte[i] = pdpte[i];
}

/* ---- CR0 ---- */

/* Consistency of long mode: may paging be switched on or off now? */
static bool paging_change_ok(const struct icpu *c, bool on)
{
    const struct x86 *x = c->x;
    if (!on)
        return !(x->cr4 & CR4_PCIDE) && !in_64bit(c);
    if (!(x->efer & EFER_LME))
        return true;
    unsigned tss = SEG_TYPE(x->tr.attr);
    bool tss16 = tss == DESC_TSS16 || tss == DESC_TSS16_BUSY;
    return x->cr4 & CR4_PAE && !(x->seg[SEG_CS].attr & SEG_L) && !tss16;
}

int cr0_write(struct icpu *c, u64 val)
{
    struct x86 *x = c->x;
    u64 pdpte[4], old = x->cr0;
    if (val >> 32 || (val & CR0_PG && !(val & CR0_PE)) || (val & CR0_NW && !(val & CR0_CD)))
        return fault_gp(c, 0);
    val = (val & CR0_DEFINED) | CR0_ET;
    u64 changed = val ^ old;
    if (changed & CR0_PG && !paging_change_ok(c, val & CR0_PG))
        return fault_gp(c, 0);
    bool reload = changed & (CR0_CD | CR0_NW | CR0_PG) && pae_paging(val, x->cr4, x->efer);
    if (reload) {
        if (!load_pdptes(c, x->cr3, pdpte))
            return fault_gp(c, 0);
        keep_pdptes(c, pdpte);
    }
    icpu_claim(c);
    x->cr0 = val;
    if (changed & CR0_PG) {
        if (val & CR0_PG && x->efer & EFER_LME)
            x->efer |= EFER_LMA;
        else
            x->efer &= ~(u64)EFER_LMA;
    }
    if (changed & (CR0_PG | CR0_PE | CR0_WP))
        tlb_flush_all(c);
    icpu_mode(c);
    return OP_END;
}

/* ---- CR3 ---- */

int cr3_write(struct icpu *c, u64 val)
{
    struct x86 *x = c->x;
    u64 pdpte[4];
    bool keep = false;
    if (in_long_mode(c)) {
        if (x->cr4 & CR4_PCIDE) {
            keep = val & CR3_NO_FLUSH;
            val &= ~CR3_NO_FLUSH;
        }
        if (val >> cpuid_phys_bits(c->v->m->cpuid))
            return fault_gp(c, 0);
    } else if (pae_paging(x->cr0, x->cr4, x->efer)) {
        if (!load_pdptes(c, val, pdpte))
            return fault_gp(c, 0);
        keep_pdptes(c, pdpte);
    }
    trace(c->v->m->trace, TRACE_CR3, (int)c->v->id, "cr3 0x%llx -> 0x%llx", (unsigned long long)x->cr3,
          (unsigned long long)val);
    x->cr3 = val;
    tlb_cr3(c, keep);
    return OP_END;
}

/* ---- CR4 ---- */

static int cr4_write(struct icpu *c, u64 val)
{
    const u64 translation = CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_PKE;
    struct x86 *x = c->x;
    u64 pdpte[4], changed = val ^ x->cr4;
    if (val & ~cpuid_cr4_mask(c->v->m->cpuid))
        return fault_gp(c, 0);
    if (in_long_mode(c) && !(val & CR4_PAE))
        return fault_gp(c, 0);
    if (changed & val & CR4_PCIDE && (!in_long_mode(c) || x->cr3 & 0xfff))
        return fault_gp(c, 0);
    bool reload = changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) && pae_paging(x->cr0, val, x->efer);
    if (reload) {
        if (!load_pdptes(c, x->cr3, pdpte))
            return fault_gp(c, 0);
        keep_pdptes(c, pdpte);
    }
    icpu_claim(c);
    x->cr4 = val;
    if (changed & translation)
        tlb_flush_all(c);
    icpu_mode(c);
    return OP_END;
}

/* ---- MOV ---- */

static int cr8_write(struct icpu *c, u64 val)
{
    if (val > 15)
        return fault_gp(c, 0);
    codepage_leave(c);
    icpu_claim(c);
    if (c->v->intc.ops)
        c->v->intc.ops->tpr_set(c->v->intc.chip, (u8)val);
    codepage_enter(c);
    return OP_END;
}

static int op_mov_to_cr(struct icpu *c, const struct op *op)
{
    u64 val = in_64bit(c) ? c->r[op->rm] : (u32)c->r[op->rm];
    if (c->cpl)
        return fault_gp(c, 0);
    switch (op->reg) {
    case 0:
        return cr0_write(c, val);
    case 2:
        c->x->cr2 = val;
        return OP_NEXT;
    case 3:
        return cr3_write(c, val);
    case 4:
        return cr4_write(c, val);
    default:
        return cr8_write(c, val);
    }
}

static int op_mov_from_cr(struct icpu *c, const struct op *op)
{
    u64 val = 0;
    if (c->cpl)
        return fault_gp(c, 0);
    switch (op->reg) {
    case 0:
        val = c->x->cr0;
        break;
    case 2:
        val = c->x->cr2;
        break;
    case 3:
        val = c->x->cr3;
        break;
    case 4:
        val = c->x->cr4;
        break;
    default:
        icpu_claim(c);
        codepage_leave(c);
        if (c->v->intc.ops)
            val = c->v->intc.ops->tpr_get(c->v->intc.chip);
        codepage_enter(c);
    }
    c->r[op->rm] = in_64bit(c) ? val : (u32)val;
    return OP_NEXT;
}

int bind_mov_cr(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    bool to = ZydisRegisterGetClass(d->opnd[0].reg.value) == ZYDIS_REGCLASS_CONTROL;
    (void)c;
    (void)arg;
    op->reg = reg_id(d, to ? 0 : 1);
    op->rm = reg_id(d, to ? 1 : 0);
    if (op->reg != 0 && op->reg != 2 && op->reg != 3 && op->reg != 4 && op->reg != 8)
        return BIND_UD;
    op->fn = to ? op_mov_to_cr : op_mov_from_cr;
    return to && op->reg != 2 ? BIND_LAST : BIND_OK;
}

/* ---- the machine status word ---- */

static int op_smsw(struct icpu *c, const struct op *op)
{
    if (c->x->cr4 & CR4_UMIP && c->cpl > 0)
        return fault_gp(c, 0);
    return store_system(c, op, c->x->cr0);
}

/* Sets PE, MP, EM, TS; PE cannot be cleared this way. */
static int op_lmsw(struct icpu *c, const struct op *op)
{
    const u64 word = CR0_PE | CR0_MP | CR0_EM | CR0_TS;
    u16 val;
    if (c->cpl)
        return fault_gp(c, 0);
    if (load_u16(c, op, &val))
        return OP_FAULT;
    return cr0_write(c, (c->x->cr0 & ~(word & ~(u64)CR0_PE)) | (val & word));
}

int bind_smsw(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op->size = (u8)insn_size(d);
    if (!is_mem(d, 0))
        op->rm = reg_id(d, 0);
    op->fn = op_smsw;
    return BIND_OK;
}

int bind_lmsw(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    if (!is_mem(d, 0))
        op->rm = reg_id(d, 0);
    op->fn = op_lmsw;
    return BIND_LAST;
}
