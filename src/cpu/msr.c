/*
 * Model-specific registers (SDM vol. 4; AMD APM vol. 2 appendix A; KVM's clock as in Linux'
 * Documentation/virt/kvm/x86/msr.rst).
 *
 * What operating systems touch without asking CPUID first is here, also where it does nothing: a constant, or a write
 * that is ignored. The machine-check architecture has no banks, the performance counters do not count. Everything else
 * raises #GP. On the vCPU's thread; the local APIC locks itself.
 */
#include "cpu/msr.h"

#include <asm/kvm_para.h>

#include "cpu/cpuid.h"
#include "cpu/pv.h"

enum {
    MSR_P5_MC_ADDR = 0x0,
    MSR_P5_MC_TYPE = 0x1,
    MSR_TSC = 0x10,
    MSR_PLATFORM_ID = 0x17,
    MSR_APIC_BASE = 0x1b,
    MSR_EBL_CR_POWERON = 0x2a,
    MSR_SMI_COUNT = 0x34,
    MSR_FEATURE_CONTROL = 0x3a,
    MSR_TSC_ADJUST = 0x3b,
    MSR_SPEC_CTRL = 0x48,
    MSR_PRED_CMD = 0x49,
    MSR_BIOS_UPDT_TRIG = 0x79,
    MSR_BIOS_SIGN_ID = 0x8b,
    MSR_PERFCTR0 = 0xc1,
    MSR_PERFCTR1 = 0xc2,
    MSR_PLATFORM_INFO = 0xce,
    MSR_MTRRCAP = 0xfe,
    MSR_ARCH_CAPABILITIES = 0x10a,
    MSR_MISC_FEATURE_ENABLES = 0x140,
    MSR_SYSENTER_CS = 0x174,
    MSR_SYSENTER_ESP = 0x175,
    MSR_SYSENTER_EIP = 0x176,
    MSR_MCG_CAP = 0x179,
    MSR_MCG_STATUS = 0x17a,
    MSR_EVNTSEL0 = 0x186,
    MSR_EVNTSEL1 = 0x187,
    MSR_PERF_STATUS = 0x198,
    MSR_PERF_CTL = 0x199,
    MSR_THERM_STATUS = 0x19c,
    MSR_MISC_ENABLE = 0x1a0,
    MSR_DEBUGCTL = 0x1d9,
    MSR_LASTBRANCHFROMIP = 0x1db,
    MSR_LASTINTTOIP = 0x1de,
    MSR_MTRR_PHYS_FIRST = 0x200,
    MSR_MTRR_PHYS_LAST = 0x20f,
    MSR_MTRR_FIX64K = 0x250,
    MSR_MTRR_FIX16K_80000 = 0x258,
    MSR_MTRR_FIX16K_A0000 = 0x259,
    MSR_MTRR_FIX4K_FIRST = 0x268,
    MSR_MTRR_FIX4K_LAST = 0x26f,
    MSR_PAT = 0x277,
    MSR_MTRR_DEF_TYPE = 0x2ff,
    MSR_TSC_DEADLINE = 0x6e0,
    MSR_X2APIC_FIRST = 0x800,
    MSR_X2APIC_LAST = 0x8ff,
    MSR_XSS = 0xda0,
};
#define MSR_EFER 0xc0000080u
#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u
#define MSR_SFMASK 0xc0000084u
#define MSR_TSC_AUX 0xc0000103u
#define MSR_K7_EVNTSEL0 0xc0010000u
#define MSR_K7_PERFCTR3 0xc0010007u
#define MSR_SYSCFG 0xc0010010u
#define MSR_HWCR 0xc0010015u
#define MSR_NB_CFG 0xc001001fu
#define MSR_INT_PENDING 0xc0010055u
#define MSR_MMIO_CONF_BASE 0xc0010058u
#define MSR_TSEG_ADDR 0xc0010112u
#define MSR_TSEG_MASK 0xc0010113u
#define MSR_VM_CR 0xc0010114u
#define MSR_LS_CFG 0xc0011020u
#define MSR_DC_CFG 0xc0011022u
#define MSR_TW_CFG 0xc0011023u
#define MSR_DE_CFG 0xc0011029u
#define MSR_BU_CFG2 0xc001102au
#define MSR_EX_CFG 0xc001102cu

#define MTRRCAP 0x508u                     /* 8 variable ranges, fixed ranges, write combining */
#define HWCR_TSC_FREQ_SEL BIT(24)          /* the TSC counts at the P0 frequency */
#define DE_CFG_LFENCE_SERIALIZE BIT(1)
#define VM_CR_SVMDIS BIT(4)
#define FEATURE_CONTROL_LOCKED 1u
#define DEBUGCTL_VALID 3u                  /* LBR, BTF; neither has an effect */
#define SPEC_CTRL_VALID 7u                 /* IBRS STIBP SSBD */
#define MISC_ENABLE_READ_ONLY 0x1880u      /* performance monitoring, no branch trace, no PEBS */

/*
 * RDCL_NO IBRS_ALL SKIP_L1DFL_VMENTRY SSB_NO MDS_NO PSCHANGE_MC_NO TAA_NO SBDR_SSDP_NO FBSDP_NO PSDP_NO BHI_NO PBRSB_NO
 * GDS_NO RFDS_NO ITS_NO: see cpuid.c on speculation.
 */
#define ARCH_CAPABILITIES                                                                                              \
    (BIT(0) | BIT(1) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(8) | BIT(13) | BIT(14) | BIT(15) | BIT(20) | BIT(24) |  \
     BIT(26) | BIT(27) | BIT(62))

static bool canonical(u64 a)
{
    return (u64)((s64)(a << 16) >> 16) == a;
}

/* ---- registers that hold no state ---- */

enum { ANY, AMD, INTEL };                  /* whose processors have it */
enum { READ_ONLY, IGNORED, WRITE_ONLY }; /* what a write does; WRITE_ONLY: it is ignored, too, but a read raises #GP */

static const struct fixed_msr {
    u32 first, last;
    u64 value;
    u8 vendor, access;
} fixed_msr[] = {
    {MSR_P5_MC_ADDR, MSR_P5_MC_TYPE, 0, ANY, IGNORED},
    {MSR_PLATFORM_ID, MSR_PLATFORM_ID, 0, INTEL, READ_ONLY},
    {MSR_EBL_CR_POWERON, MSR_EBL_CR_POWERON, 0, INTEL, IGNORED},
    {MSR_SMI_COUNT, MSR_SMI_COUNT, 0, INTEL, READ_ONLY},
    {MSR_FEATURE_CONTROL, MSR_FEATURE_CONTROL, FEATURE_CONTROL_LOCKED, INTEL, READ_ONLY},
    {MSR_BIOS_UPDT_TRIG, MSR_BIOS_UPDT_TRIG, 0, ANY, WRITE_ONLY},
    {MSR_PERFCTR0, MSR_PERFCTR1, 0, INTEL, IGNORED},
    {MSR_PLATFORM_INFO, MSR_PLATFORM_INFO, 0, INTEL, READ_ONLY},
    {MSR_MTRRCAP, MSR_MTRRCAP, MTRRCAP, ANY, READ_ONLY},
    {MSR_ARCH_CAPABILITIES, MSR_ARCH_CAPABILITIES, ARCH_CAPABILITIES, INTEL, READ_ONLY},
    {MSR_MISC_FEATURE_ENABLES, MSR_MISC_FEATURE_ENABLES, 0, INTEL, IGNORED},
    {MSR_MCG_CAP, MSR_MCG_CAP, 0, ANY, READ_ONLY},
    {MSR_EVNTSEL0, MSR_EVNTSEL1, 0, INTEL, IGNORED},
    {MSR_PERF_STATUS, MSR_PERF_STATUS, 0, INTEL, READ_ONLY},
    {MSR_PERF_CTL, MSR_PERF_CTL, 0, INTEL, IGNORED},
    {MSR_THERM_STATUS, MSR_THERM_STATUS, 0, INTEL, IGNORED},
    {MSR_LASTBRANCHFROMIP, MSR_LASTINTTOIP, 0, ANY, READ_ONLY},
    {MSR_K7_EVNTSEL0, MSR_K7_PERFCTR3, 0, AMD, IGNORED},
    {MSR_SYSCFG, MSR_SYSCFG, 0, AMD, IGNORED},
    {MSR_HWCR, MSR_HWCR, HWCR_TSC_FREQ_SEL, AMD, IGNORED},
    {MSR_NB_CFG, MSR_NB_CFG, 0, AMD, IGNORED},
    {MSR_INT_PENDING, MSR_INT_PENDING, 0, AMD, IGNORED},
    {MSR_MMIO_CONF_BASE, MSR_MMIO_CONF_BASE, 0, AMD, IGNORED},
    {MSR_TSEG_ADDR, MSR_TSEG_MASK, 0, AMD, IGNORED},
    {MSR_VM_CR, MSR_VM_CR, VM_CR_SVMDIS, AMD, IGNORED},
    {MSR_LS_CFG, MSR_LS_CFG, 0, AMD, IGNORED},
    {MSR_DC_CFG, MSR_TW_CFG, 0, AMD, IGNORED},
    {MSR_DE_CFG, MSR_DE_CFG, DE_CFG_LFENCE_SERIALIZE, AMD, IGNORED},
    {MSR_BU_CFG2, MSR_BU_CFG2, 0, AMD, IGNORED},
    {MSR_EX_CFG, MSR_EX_CFG, 0, AMD, IGNORED},
};

static const struct fixed_msr *find_fixed(const struct vcpu *v, u32 msr)
{
    for (unsigned i = 0; i < ARRAY_SIZE(fixed_msr); i++)
        if (msr >= fixed_msr[i].first && msr <= fixed_msr[i].last)
            return fixed_msr[i].vendor == ANY || (fixed_msr[i].vendor == AMD) == cpuid_is_amd(v->m->cpuid)
                       ? &fixed_msr[i]
                       : NULL;
    return NULL;
}

/* ---- memory types ---- */

static bool mtrr_type_valid(u8 type)
{
    return type == 0 || type == 1 || (type >= 4 && type <= 6);
}

static bool types_valid(u64 val, bool pat)
{
    for (unsigned i = 0; i < 8; i++) {
        u8 type = (u8)(val >> i * 8);
        if (!mtrr_type_valid(type) && !(pat && type == 7))
            return false;
    }
    return true;
}

/* SDM vol. 3A 12.11. The memory types have no effect: all of guest memory is coherent. */
static u64 *mtrr_register(const struct vcpu *v, struct x86 *x, u32 msr, u64 *valid)
{
    u64 phys = BIT(cpuid_phys_bits(v->m->cpuid)) - 1;
    *valid = ~0ull;
    if (msr >= MSR_MTRR_PHYS_FIRST && msr <= MSR_MTRR_PHYS_LAST) {
        unsigned n = (msr - MSR_MTRR_PHYS_FIRST) / 2;
        *valid = msr & 1 ? phys & ~0x7ffull : (phys & ~0xfffull) | 0xff;
        return msr & 1 ? &x->mtrr_mask[n] : &x->mtrr_base[n];
    }
    if (msr >= MSR_MTRR_FIX4K_FIRST && msr <= MSR_MTRR_FIX4K_LAST)
        return &x->mtrr_fixed[3 + msr - MSR_MTRR_FIX4K_FIRST];
    switch (msr) {
    case MSR_MTRR_FIX64K:
        return &x->mtrr_fixed[0];
    case MSR_MTRR_FIX16K_80000:
        return &x->mtrr_fixed[1];
    case MSR_MTRR_FIX16K_A0000:
        return &x->mtrr_fixed[2];
    case MSR_MTRR_DEF_TYPE:
        *valid = 0xcff;
        return &x->mtrr_def_type;
    }
    return NULL;
}

static int mtrr_write(const struct vcpu *v, struct x86 *x, u32 msr, u64 val)
{
    u64 valid;
    u64 *reg = mtrr_register(v, x, msr, &valid);
    bool is_mask = msr <= MSR_MTRR_PHYS_LAST && msr & 1;
    bool is_fixed = msr >= MSR_MTRR_FIX64K && msr <= MSR_MTRR_FIX4K_LAST;
    if (!reg || val & ~valid)
        return -1;
    if (is_fixed ? !types_valid(val, false) : !is_mask && !mtrr_type_valid((u8)val))
        return -1;
    *reg = val;
    return 0;
}

/* ---- registers with state ---- */

static u64 guest_tsc(const struct vcpu *v, const struct x86 *x)
{
    return clock_tsc(v->m->clock) + (u64)x->tsc_adjust;
}

static void set_tsc_adjust(struct vcpu *v, struct x86 *x, s64 adjust)
{
    x->tsc_adjust = adjust;
    if (v->intc.ops && v->intc.ops->tsc_adjust)
        v->intc.ops->tsc_adjust(v->intc.chip, adjust);
    pvclock_update(v, x);
}

static bool is_apic_msr(u32 msr)
{
    return msr == MSR_APIC_BASE || msr == MSR_TSC_DEADLINE || (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST);
}

static bool has_tsc_aux(const struct vcpu *v)
{
    return cpuid_has(v->m->cpuid, CPU_RDTSCP) || cpuid_has(v->m->cpuid, CPU_RDPID);
}

/* A guest that comes from another engine may have been told of AMD's speculation control; here it does nothing. */
static bool has_spec_ctrl(const struct vcpu *v)
{
    const struct cpuid_policy *p = v->m->cpuid;
    return !cpuid_is_amd(p) || cpuid_has(p, CPU_AMD_IBRS) || cpuid_has(p, CPU_AMD_STIBP) || cpuid_has(p, CPU_AMD_SSBD);
}

/* Registers that a read gives as they are: where they live in struct x86, or NULL. */
static u64 *plain_register(const struct vcpu *v, struct x86 *x, u32 msr)
{
    bool amd = cpuid_is_amd(v->m->cpuid), lm = cpuid_has(v->m->cpuid, CPU_LM);
    u64 valid;
    switch (msr) {
    case MSR_SYSENTER_CS:
        return &x->sysenter_cs;
    case MSR_SYSENTER_ESP:
        return &x->sysenter_esp;
    case MSR_SYSENTER_EIP:
        return &x->sysenter_eip;
    case MSR_BIOS_SIGN_ID:
        return &x->bios_sign_id;
    case MSR_MCG_STATUS:
        return &x->mcg_status;
    case MSR_MISC_ENABLE:
        return amd ? NULL : &x->misc_enable;
    case MSR_SPEC_CTRL:
        return has_spec_ctrl(v) ? &x->spec_ctrl : NULL;
    case MSR_DEBUGCTL:
        return &x->debugctl;
    case MSR_PAT:
        return &x->pat;
    case MSR_XSS:
        return cpuid_has(v->m->cpuid, CPU_XSAVES) ? &x->xss : NULL;
    case MSR_EFER:
        return &x->efer;
    case MSR_STAR:
        return &x->star;
    case MSR_LSTAR:
        return lm ? &x->lstar : NULL;
    case MSR_CSTAR:
        return lm ? &x->cstar : NULL;
    case MSR_SFMASK:
        return lm ? &x->sfmask : NULL;
    case MSR_FS_BASE:
        return lm ? &x->seg[SEG_FS].base : NULL;
    case MSR_GS_BASE:
        return lm ? &x->seg[SEG_GS].base : NULL;
    case MSR_KERNEL_GS_BASE:
        return lm ? &x->kernel_gs_base : NULL;
    case MSR_TSC_AUX:
        return has_tsc_aux(v) ? &x->tsc_aux : NULL;
    case MSR_KVM_WALL_CLOCK: case MSR_KVM_WALL_CLOCK_NEW:
        return &x->kvm_wall_clock;
    case MSR_KVM_SYSTEM_TIME: case MSR_KVM_SYSTEM_TIME_NEW:
        return &x->kvm_system_time;
    case MSR_KVM_PV_EOI_EN: case MSR_KVM_STEAL_TIME:
        return pv_register(v, x, msr);
    }
    return mtrr_register(v, x, msr, &valid);
}

static int read_msr(struct vcpu *v, struct x86 *x, u32 msr, u64 *val)
{
    if (is_apic_msr(msr))
        return v->intc.ops ? v->intc.ops->msr_read(v->intc.chip, msr, val) : -1;
    if (msr == MSR_TSC) {
        *val = guest_tsc(v, x);
        return 0;
    }
    if (msr == MSR_TSC_ADJUST) {
        *val = (u64)x->tsc_adjust;
        return 0;
    }
    const u64 *reg = plain_register(v, x, msr);
    if (reg) {
        *val = *reg;
        return 0;
    }
    const struct fixed_msr *f = find_fixed(v, msr);
    if (!f || f->access == WRITE_ONLY)
        return -1;
    *val = f->value;
    return 0;
}

/* SDM vol. 3A 2.2.1, 10.8.5: LME may not change while paging is on; LMA follows CR0.PG and is not written. */
static int write_efer(const struct vcpu *v, struct x86 *x, u64 val)
{
    if (val & ~cpuid_efer_mask(v->m->cpuid))
        return -1;
    if (x->cr0 & CR0_PG && (val ^ x->efer) & EFER_LME)
        return -1;
    x->efer = (val & ~(u64)EFER_LMA) | (x->efer & EFER_LMA);
    return 0;
}

/* Which bits of a plain register may be set. Canonical addresses are checked apart. */
static u64 writable_bits(u32 msr)
{
    switch (msr) {
    case MSR_MCG_STATUS:
        return 7;
    case MSR_SPEC_CTRL:
        return SPEC_CTRL_VALID;
    case MSR_DEBUGCTL:
        return DEBUGCTL_VALID;
    case MSR_XSS:
        return 0;
    case MSR_TSC_AUX: case MSR_SYSENTER_CS:
        return 0xffffffff;
    default:
        return ~0ull;
    }
}

static bool holds_address(u32 msr)
{
    return msr == MSR_SYSENTER_ESP || msr == MSR_SYSENTER_EIP || msr == MSR_LSTAR || msr == MSR_CSTAR ||
           msr == MSR_FS_BASE || msr == MSR_GS_BASE || msr == MSR_KERNEL_GS_BASE;
}

static int write_plain(struct vcpu *v, struct x86 *x, u32 msr, u64 val)
{
    u64 valid;
    if (mtrr_register(v, x, msr, &valid))
        return mtrr_write(v, x, msr, val);
    if (val & ~writable_bits(msr) || (holds_address(msr) && !canonical(val)) ||
        (msr == MSR_PAT && !types_valid(val, true)))
        return -1;
    if (msr == MSR_EFER)
        return write_efer(v, x, val);
    if (msr == MSR_KVM_PV_EOI_EN || msr == MSR_KVM_STEAL_TIME)
        return pv_write(v, x, msr, val);
    if (msr == MSR_MISC_ENABLE)
        val = (val & ~(u64)MISC_ENABLE_READ_ONLY) | (x->misc_enable & MISC_ENABLE_READ_ONLY);
    if (msr == MSR_SFMASK)
        val = (u32)val;                    /* the upper half is reserved and reads as zero */
    *plain_register(v, x, msr) = val;
    if (msr == MSR_KVM_SYSTEM_TIME || msr == MSR_KVM_SYSTEM_TIME_NEW)
        pvclock_update(v, x);
    if (msr == MSR_KVM_WALL_CLOCK || msr == MSR_KVM_WALL_CLOCK_NEW)
        pvclock_write_wall(v, x);
    return 0;
}

static int write_msr(struct vcpu *v, struct x86 *x, u32 msr, u64 val)
{
    if (is_apic_msr(msr))
        return v->intc.ops ? v->intc.ops->msr_write(v->intc.chip, msr, val) : -1;
    switch (msr) {
    case MSR_TSC:
        set_tsc_adjust(v, x, (s64)(val - clock_tsc(v->m->clock)));
        return 0;
    case MSR_TSC_ADJUST:
        set_tsc_adjust(v, x, (s64)val);
        return 0;
    case MSR_BIOS_SIGN_ID:
        return 0;                          /* Intel: cleared before CPUID gives the revision; it stays */
    case MSR_PRED_CMD:
        return (cpuid_is_amd(v->m->cpuid) && !cpuid_has(v->m->cpuid, CPU_AMD_IBPB)) || val & ~1ull ? -1 : 0;
    }
    if (plain_register(v, x, msr))
        return write_plain(v, x, msr, val);
    const struct fixed_msr *f = find_fixed(v, msr);
    return f && f->access != READ_ONLY ? 0 : -1;
}

static void count(struct vcpu *v, u32 msr)
{
    if (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST)
        vcpu_count_apic(v, msr - MSR_X2APIC_FIRST);
    else
        vcpu_count(v, msr == MSR_TSC_DEADLINE ? COUNT_APIC_TIMER : COUNT_MSR);
}

int msr_read(struct vcpu *v, struct x86 *x, u32 msr, u64 *val)
{
    count(v, msr);
    int r = read_msr(v, x, msr, val);
    if (r)
        trace(v->m->trace, TRACE_MSR, (int)v->id, "rdmsr 0x%x: #GP", msr);
    else
        trace(v->m->trace, TRACE_MSR, (int)v->id, "rdmsr 0x%x -> 0x%llx", msr, (unsigned long long)*val);
    return r;
}

int msr_write(struct vcpu *v, struct x86 *x, u32 msr, u64 val)
{
    count(v, msr);
    int r = write_msr(v, x, msr, val);
    trace(v->m->trace, TRACE_MSR, (int)v->id, "wrmsr 0x%x <- 0x%llx%s", msr, (unsigned long long)val, r ? ": #GP" : "");
    return r;
}
