/*
 * CPUID: one policy for all engines (SDM vol. 2A CPUID; AMD APM vol. 3 appendix E; KVM's paravirtual leaves 0x40000000).
 *
 * The policy starts from the host's leaves, keeps the features on doppel's list, takes away what the engine cannot carry, and fills in topology,
 * APIC ID, XSAVE sizes, TSC frequency and the KVM leaves. Feature look-ups by the engines (may the guest use SMAP?) ask the same policy.
 */
#pragma once

#include "cpu/x86.h"

struct cpuid_regs {
    u32 eax, ebx, ecx, edx;
};
struct cpuid_policy;

/* vcpus: for topology. tsc_khz: the guest's. Returns 0 or -ENOMEM. Not shared between machines. */
int cpuid_policy_new(unsigned vcpus, u64 tsc_khz, struct cpuid_policy **out);
void cpuid_policy_free(struct cpuid_policy *p);

/* What the guest sees. vcpu: for the APIC ID. x: for the dynamic bits (OSXSAVE, OSPKE, XSAVE size of XCR0, APIC enabled). Any thread. */
void cpuid_get(const struct cpuid_policy *p, unsigned vcpu, const struct x86 *x, bool apic_enabled, u32 leaf, u32 subleaf, struct cpuid_regs *out);

/* Features that other code asks for; the list grows as needed. */
enum cpu_feature {
    CPU_PSE, CPU_PAE, CPU_PGE, CPU_PCID, CPU_INVPCID, CPU_SMEP, CPU_SMAP, CPU_UMIP, CPU_FSGSBASE, CPU_PKU, CPU_NX, CPU_GBPAGES,
    CPU_XSAVE, CPU_XSAVEOPT, CPU_XSAVEC, CPU_XGETBV1, CPU_XSAVES, CPU_AVX, CPU_AVX2, CPU_AVX512F, CPU_AVX512BW, CPU_AVX512VL, CPU_RDTSCP, CPU_RDPID, CPU_MONITOR,
    CPU_X2APIC, CPU_TSC_DEADLINE, CPU_VME, CPU_DE, CPU_SEP, CPU_CX16, CPU_MOVBE, CPU_RDRAND, CPU_RDSEED, CPU_ADX, CPU_BMI1, CPU_BMI2, CPU_CLFLUSHOPT,
    CPU_CLWB, CPU_WAITPKG, CPU_SYSCALL, CPU_LM,
    /* AMD's, which only engines on the bare processor show (cpuid_keep) */
    CPU_AMD_IBPB, CPU_AMD_IBRS, CPU_AMD_STIBP, CPU_AMD_SSBD,
    CPU_FEATURES
};
bool cpuid_has(const struct cpuid_policy *p, enum cpu_feature f);
bool cpuid_pv(const struct cpuid_policy *p, unsigned bit);         /* KVM_FEATURE_*: is it offered? */
/*
 * "-NAME,-NAME": takes features away that the user names, before the machine is open. p NULL: only checks. 0, or
 * -EINVAL with err().
 */
int cpuid_change(struct cpuid_policy *p, const char *list);
void cpuid_clear(struct cpuid_policy *p, enum cpu_feature f);       /* for engine->cpuid_limit */
/*
 * For engine->cpuid_limit of one that runs the guest on the bare processor: of this leaf's features only those in *r are kept, and what the guest is told
 * about speculation is what *r says.
 */
void cpuid_keep(struct cpuid_policy *p, u32 leaf, u32 subleaf, const struct cpuid_regs *r);
u64 cpuid_xcr0_mask(const struct cpuid_policy *p);                  /* bits that XSETBV may set */
unsigned cpuid_phys_bits(const struct cpuid_policy *p);
u64 cpuid_cr4_mask(const struct cpuid_policy *p);                   /* bits that CR4 may have */
u64 cpuid_efer_mask(const struct cpuid_policy *p);
bool cpuid_is_amd(const struct cpuid_policy *p);                    /* the guest's vendor is the host's; where AMD and Intel differ, the guest gets its vendor's */

/* The host's own CPUID (cached: the instruction traps on cloud hosts). */
const struct cpuid_regs *cpuid_host(u32 leaf, u32 subleaf);
/* May the monitor itself use it? Of the features on doppel's list that pass from the host, with what they need. Nothing else asks the host. */
bool cpuid_host_has(enum cpu_feature f);
/*
 * "NAME,NAME": from now on the host is taken for one that lacks these features, by the monitor's own code and for guests. For tests, before any
 * machine is made and any thread. 0, or -EINVAL with err().
 */
int cpuid_host_mask(const char *list);
