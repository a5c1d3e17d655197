/*
 * CPUID policy (SDM vol. 2A CPUID; AMD APM vol. 3 appendix E; KVM's leaves as in Linux' asm/kvm_para.h).
 *
 * The guest's leaves are computed once into feature words and a few constants; cpuid_get() fills in what depends on the
 * vCPU and its state. After the machine is open the policy is constant: any thread reads it without a lock.
 *
 * Speculation: a software engine never runs guest code in a way that the guest's own mitigations would protect, so the
 * guest is told that it needs none (no retpolines, no return thunks, no buffer clearing). An engine that runs the
 * guest's kernel on the bare processor must take the host's answers instead.
 *
 * Not modelled: leaves for AMX, SGX, PT, RDT, performance monitoring, SVM, SEV.
 */
#include "cpu/cpuid.h"

#include <asm/kvm_para.h>
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "base/err.h"

#define KVM_CPUID_TIMING 0x40000010u
#define APIC_BUS_KHZ 1000000u              /* the local APIC's timer counts at 1 GHz */
#define MAX_BASIC 0x16u
#define MAX_EXTENDED 0x80000021u

/* ---- the host ---- */

/* Facts about the host that never change, read once per process. */
#define HOST_LEAVES 160
static struct {
    pthread_once_t once;
    unsigned n;
    struct {
        u32 leaf, subleaf;
        struct cpuid_regs r;
    } entry[HOST_LEAVES];
    u64 xcr0;
    bool amd;
} host = {.once = PTHREAD_ONCE_INIT};

static struct cpuid_regs host_read(u32 leaf, u32 subleaf)
{
    struct cpuid_regs r;
    __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
    if (host.n < HOST_LEAVES) {
        host.entry[host.n].leaf = leaf;
        host.entry[host.n].subleaf = subleaf;
        host.entry[host.n++].r = r;
    }
    return r;
}

static unsigned host_subleaves(u32 leaf)
{
    switch (leaf) {
    case 4: case 0x8000001d:
        return 6;
    case 7:
        return 3;
    case 0xb: case 0x1f:
        return 4;
    case 0xd:
        return 20;
    default:
        return 1;
    }
}

static void host_read_range(u32 first, u32 most)
{
    u32 last = MIN(host_read(first, 0).eax, most);
    for (u32 leaf = first + 1; leaf <= last && leaf > first; leaf++)
        for (unsigned sub = 0; sub < host_subleaves(leaf); sub++)
            host_read(leaf, sub);
}

static void host_init(void)
{
    host_read_range(0, 0x1f);
    host_read_range(0x80000000, 0x80000022);
    struct cpuid_regs r0, r1;
    __cpuid(0, r0.eax, r0.ebx, r0.ecx, r0.edx);
    __cpuid(1, r1.eax, r1.ebx, r1.ecx, r1.edx);
    host.amd = r0.ebx == signature_AMD_ebx || r0.ebx == 0x6f677948;    /* "Auth", "Hygo" */
    if (r1.ecx & 1u << 31) {
        host_read(KVM_CPUID_SIGNATURE, 0);
        host_read(KVM_CPUID_FEATURES, 0);
        host_read(KVM_CPUID_TIMING, 0);
    }
    host.xcr0 = XSTATE_X87 | XSTATE_SSE;
    if (r1.ecx & 1u << 27) {
        u32 lo, hi;
        __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
        host.xcr0 = (u64)hi << 32 | lo;
    }
}

const struct cpuid_regs *cpuid_host(u32 leaf, u32 subleaf)
{
    static const struct cpuid_regs none;
    pthread_once(&host.once, host_init);
    for (unsigned i = 0; i < host.n; i++)
        if (host.entry[i].leaf == leaf && host.entry[i].subleaf == subleaf)
            return &host.entry[i].r;
    return &none;
}

/* ---- feature words ---- */

enum word { W_1C, W_1D, W_7B, W_7C, W_7D, W_71A, W_D1A, W_E1C, W_E1D, W_E7D, W_E8B, W_E21A, W_E21C, WORDS };
enum { EAX, EBX, ECX, EDX };
#define F(n) (1u << (n))

/*
 * Which bits may pass from the host, and which are shown on any host because doppel itself carries them. amd, intel:
 * shown only to that vendor's guests. bare: with an engine that runs the guest on the bare processor, what it may know
 * about speculation; the host's answers then replace those of amd and intel.
 */
static const struct {
    u32 leaf;
    u8 subleaf, reg;
    u32 pass, always, amd, intel, bare;
} word[WORDS] = {
    /* SSE3 PCLMUL SSSE3 FMA CX16 PCID SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX F16C RDRAND; always X2APIC TSC_DEADLINE
       HYPERVISOR */
    [W_1C] = {1, 0, ECX,
              .pass = F(0) | F(1) | F(9) | F(12) | F(13) | F(17) | F(19) | F(20) | F(22) | F(23) | F(25) | F(26) |
                      F(28) | F(29) | F(30),
              .always = F(21) | F(24) | F(31)},
    /* FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2 */
    [W_1D] = {1, 0, EDX,
              .pass = F(0) | F(1) | F(2) | F(3) | F(4) | F(5) | F(6) | F(8) | F(11) | F(13) | F(15) | F(17) | F(19) |
                      F(23) | F(24) | F(25) | F(26),
              .always = F(7) | F(9) | F(12) | F(14) | F(16)},
    /* FSGSBASE BMI1 AVX2 SMEP BMI2 ERMS INVPCID ZERO_FCS_FDS AVX512F DQ RDSEED ADX SMAP IFMA CLFLUSHOPT CLWB AVX512CD
       SHA BW VL; always TSC_ADJUST */
    [W_7B] = {7, 0, EBX,
              .pass = F(0) | F(3) | F(5) | F(7) | F(8) | F(9) | F(10) | F(13) | F(16) | F(17) | F(18) | F(19) | F(20) |
                      F(21) | F(23) | F(24) | F(28) | F(29) | F(30) | F(31),
              .always = F(1)},
    /* AVX512_VBMI PKU VBMI2 GFNI VAES VPCLMUL VNNI BITALG VPOPCNTDQ RDPID; always UMIP */
    [W_7C] = {7, 0, ECX, .pass = F(1) | F(3) | F(6) | F(8) | F(9) | F(10) | F(11) | F(12) | F(14) | F(22),
              .always = F(2)},
    /* FSRM VP2INTERSECT AVX512_FP16; Intel: MD_CLEAR no, IBRS/IBPB and ARCH_CAPABILITIES yes: "enhanced IBRS" replaces
       retpolines */
    [W_7D] = {7, 0, EDX, .pass = F(4) | F(8) | F(23), .intel = F(26) | F(29),
              .bare = F(10) | F(26) | F(27) | F(28) | F(29) | F(31)},
    /* AVX_VNNI AVX512_BF16 FZRM FSRS FSRC */
    [W_71A] = {7, 1, EAX, .pass = F(4) | F(5) | F(10) | F(11) | F(12)},
    /* XSAVEOPT XSAVEC XGETBV1 XSAVES */
    [W_D1A] = {0xd, 1, EAX, .pass = F(0) | F(1) | F(2) | F(3)},
    /* LAHF ABM SSE4A MISALIGNSSE 3DNOWPREFETCH; CMP_LEGACY and TOPOEXT follow the topology */
    [W_E1C] = {0x80000001, 0, ECX, .pass = F(0) | F(5) | F(6) | F(7) | F(8) | F(22)},
    /* SYSCALL NX MMXEXT 1G-pages RDTSCP LM; the copies of leaf 1 on AMD are added later */
    [W_E1D] = {0x80000001, 0, EDX, .pass = F(20) | F(22) | F(26) | F(27) | F(29), .always = F(11)},
    [W_E7D] = {0x80000007, 0, EDX, .always = F(8)}, /* invariant TSC */
    /* XSAVEERPTR; AMD: SSB_NO BTC_NO */
    [W_E8B] = {0x80000008, 0, EBX, .pass = F(2), .amd = F(26) | F(29),
               .bare = F(12) | F(14) | F(15) | F(17) | F(18) | F(24) | F(25) | F(26) | F(28) | F(29)},
    /* AMD: LFENCE always serializing, null selectors clear bases, automatic IBRS, SRSO_NO */
    [W_E21A] = {0x80000021, 0, EAX, .amd = F(2) | F(6) | F(8) | F(29), .bare = F(2) | F(6) | F(8) | F(29)},
    [W_E21C] = {0x80000021, 0, ECX, .amd = F(1) | F(2), .bare = F(1) | F(2)}, /* TSA_SQ_NO TSA_L1_NO */
};
#define AMD_COPIES 0x0183f3ffu             /* bits of 80000001.EDX that repeat those of 1.EDX on AMD */

static const struct {
    u8 word, bit;
    const char *name;                      /* of --cpuid; as in Linux' /proc/cpuinfo */
} feature[CPU_FEATURES] = {
    [CPU_PSE] = {W_1D, 3, "pse"},                          [CPU_PAE] = {W_1D, 6, "pae"},
    [CPU_PGE] = {W_1D, 13, "pge"},                         [CPU_PCID] = {W_1C, 17, "pcid"},
    [CPU_INVPCID] = {W_7B, 10, "invpcid"},                 [CPU_SMEP] = {W_7B, 7, "smep"},
    [CPU_SMAP] = {W_7B, 20, "smap"},                       [CPU_UMIP] = {W_7C, 2, "umip"},
    [CPU_FSGSBASE] = {W_7B, 0, "fsgsbase"},                [CPU_PKU] = {W_7C, 3, "pku"},
    [CPU_NX] = {W_E1D, 20, "nx"},                          [CPU_GBPAGES] = {W_E1D, 26, "pdpe1gb"},
    [CPU_XSAVE] = {W_1C, 26, "xsave"},                     [CPU_XSAVEOPT] = {W_D1A, 0, "xsaveopt"},
    [CPU_XSAVEC] = {W_D1A, 1, "xsavec"},                   [CPU_XGETBV1] = {W_D1A, 2, "xgetbv1"},
    [CPU_XSAVES] = {W_D1A, 3, "xsaves"},                   [CPU_AVX] = {W_1C, 28, "avx"},
    [CPU_AVX2] = {W_7B, 5, "avx2"},                        [CPU_AVX512F] = {W_7B, 16, "avx512f"},
    [CPU_AVX512BW] = {W_7B, 30, "avx512bw"},               [CPU_AVX512VL] = {W_7B, 31, "avx512vl"},
    [CPU_RDTSCP] = {W_E1D, 27, "rdtscp"},                  [CPU_RDPID] = {W_7C, 22, "rdpid"},
    [CPU_MONITOR] = {W_1C, 3, "monitor"},                  [CPU_X2APIC] = {W_1C, 21, "x2apic"},
    [CPU_TSC_DEADLINE] = {W_1C, 24, "tsc_deadline_timer"}, [CPU_VME] = {W_1D, 1, "vme"},
    [CPU_DE] = {W_1D, 2, "de"},                            [CPU_SEP] = {W_1D, 11, "sep"},
    [CPU_CX16] = {W_1C, 13, "cx16"},                       [CPU_MOVBE] = {W_1C, 22, "movbe"},
    [CPU_RDRAND] = {W_1C, 30, "rdrand"},                   [CPU_RDSEED] = {W_7B, 18, "rdseed"},
    [CPU_ADX] = {W_7B, 19, "adx"},                         [CPU_BMI1] = {W_7B, 3, "bmi1"},
    [CPU_BMI2] = {W_7B, 8, "bmi2"},                        [CPU_CLFLUSHOPT] = {W_7B, 23, "clflushopt"},
    [CPU_CLWB] = {W_7B, 24, "clwb"},                       [CPU_WAITPKG] = {W_7C, 5, "waitpkg"},
    [CPU_SYSCALL] = {W_E1D, 11, "syscall"},                [CPU_LM] = {W_E1D, 29, "lm"},
    [CPU_AMD_IBPB] = {W_E8B, 12, "amd_ibpb"},              [CPU_AMD_IBRS] = {W_E8B, 14, "amd_ibrs"},
    [CPU_AMD_STIBP] = {W_E8B, 15, "amd_stibp"},            [CPU_AMD_SSBD] = {W_E8B, 24, "amd_ssbd"},
};

/* KVM's paravirtual features that a guest is offered, where the engine has them (pv.h). */
static const struct {
    u8 bit;
    const char *name;
} pv_feature[] = {
    {KVM_FEATURE_NOP_IO_DELAY, "nop-io-delay"},
    {KVM_FEATURE_CLOCKSOURCE2, "kvmclock"},
    {KVM_FEATURE_CLOCKSOURCE_STABLE_BIT, "kvmclock-stable"},
    {KVM_FEATURE_STEAL_TIME, "steal-time"},
    {KVM_FEATURE_PV_EOI, "pv-eoi"},
    {KVM_FEATURE_PV_UNHALT, "pv-unhalt"},
    {KVM_FEATURE_PV_TLB_FLUSH, "pv-tlb-flush"},
    {KVM_FEATURE_PV_SEND_IPI, "pv-ipi"},
};

/* Without the first bit, the others make no sense. In an order in which one pass is enough. */
static const struct {
    u8 word, bit, then;
    u32 gone;
} dependency[] = {
    {W_1C, 26, W_1C, F(28) | F(12) | F(29)},                            /* XSAVE: AVX FMA F16C */
    {W_1C, 26, W_D1A, ~0u},
    {W_1C, 26, W_7C, F(3)},                                             /* PKU: its state lives there */
    {W_1C, 28, W_1C, F(12) | F(29)},                                    /* AVX: FMA F16C */
    {W_1C, 28, W_7B, F(5) | F(16)},                                     /* AVX2 AVX512F */
    {W_1C, 28, W_7C, F(9) | F(10)},                                     /* VAES VPCLMUL */
    {W_1C, 28, W_71A, F(4)},                                            /* AVX_VNNI */
    {W_7B, 5, W_7B, F(16)},                                             /* AVX2: AVX512F */
    {W_7B, 5, W_71A, F(4)},
    {W_7B, 31, W_7B, F(16)},                                            /* AVX512F without VL (Knights Landing): interp's stubs need both */
    {W_7B, 16, W_7B, F(17) | F(21) | F(28) | F(30) | F(31)},            /* AVX512F: DQ IFMA CD BW VL */
    {W_7B, 16, W_7C, F(1) | F(6) | F(11) | F(12) | F(14)},              /* VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
    {W_7B, 16, W_7D, F(8) | F(23)},                                     /* VP2INTERSECT FP16 */
    {W_7B, 16, W_71A, F(5)},                                            /* BF16 */
    {W_E1D, 29, W_1C, F(13) | F(17)},                                   /* long mode: CX16 PCID */
    {W_1C, 17, W_7B, F(10)},                                            /* PCID: INVPCID */
};

struct cpuid_policy {
    unsigned vcpus, id_bits;               /* id_bits: of the APIC ID that number cores */
    u64 tsc_khz;
    bool amd;
    u32 w[WORDS];
    u32 pv;                                /* KVM_CPUID_FEATURES */
    u64 xcr0_mask;
    unsigned phys_bits;
    u32 crystal_num, crystal_den;          /* TSC / 1 GHz crystal, leaf 0x15 */
    u32 max_basic;
};

static u32 reg_of(const struct cpuid_regs *r, unsigned reg)
{
    return reg == EAX ? r->eax : reg == EBX ? r->ebx : reg == ECX ? r->ecx : r->edx;
}

static u32 *reg_in(struct cpuid_regs *r, unsigned reg)
{
    return reg == EAX ? &r->eax : reg == EBX ? &r->ebx : reg == ECX ? &r->ecx : &r->edx;
}

static void follow_dependencies(struct cpuid_policy *p)
{
    for (unsigned i = 0; i < ARRAY_SIZE(dependency); i++)
        if (!(p->w[dependency[i].word] & F(dependency[i].bit)))
            p->w[dependency[i].then] &= ~dependency[i].gone;
    p->w[W_E1D] &= ~AMD_COPIES;
    if (p->amd)
        p->w[W_E1D] |= p->w[W_1D] & AMD_COPIES;

    p->xcr0_mask = XSTATE_X87 | XSTATE_SSE;
    if (p->w[W_1C] & F(28))
        p->xcr0_mask |= XSTATE_AVX;
    if (p->w[W_7B] & F(16))
        p->xcr0_mask |= XSTATE_AVX512;
    if (p->w[W_7C] & F(3))
        p->xcr0_mask |= XSTATE_PKRU;
}

static void topology_features(struct cpuid_policy *p)
{
    if (p->vcpus > 1)
        p->w[W_1D] |= F(28);                                            /* HTT: leaf 1 counts logical processors */
    if (p->amd && p->vcpus > 1)
        p->w[W_E1C] |= F(1);                                            /* CMP_LEGACY: they are cores, not threads */
    if (!p->amd)
        p->w[W_E1C] &= ~F(22);
}

/*
 * Best fraction num/den near tsc_khz / crystal_khz with num small enough that crystal_khz * num fits 32 bits, as guests
 * compute it (continued fractions).
 */
static void crystal_ratio(struct cpuid_policy *p)
{
    const u64 most = 0xffffffffu / APIC_BUS_KHZ;
    u64 a = p->tsc_khz, b = APIC_BUS_KHZ;
    u64 n0 = 0, d0 = 1, n1 = 1, d1 = 0;
    while (b) {
        u64 q = a / b, n2 = q * n1 + n0, d2 = q * d1 + d0;
        if (n2 > most)
            break;
        n0 = n1, d0 = d1, n1 = n2, d1 = d2;
        u64 rest = a % b;
        a = b;
        b = rest;
    }
    p->crystal_num = d1 ? (u32)n1 : 0;     /* a TSC of 4.3 GHz or more has no such fraction: the leaf stays empty */
    p->crystal_den = d1 ? (u32)d1 : 0;
}

/* What may pass from the host, and what hangs on it. */
static void features_of_host(struct cpuid_policy *p)
{
    for (unsigned i = 0; i < WORDS; i++)
        p->w[i] = reg_of(cpuid_host(word[i].leaf, word[i].subleaf), word[i].reg) & word[i].pass;
    if (!(host.xcr0 & XSTATE_AVX))
        p->w[W_1C] &= ~F(28);
    if ((host.xcr0 & XSTATE_AVX512) != XSTATE_AVX512)
        p->w[W_7B] &= ~F(16);
    if (!(cpuid_host(1, 0)->ecx & F(27)))                              /* OSXSAVE: else XGETBV is #UD */
        p->w[W_D1A] &= ~F(2);
    if (!cpuid_host(0xd, 9)->eax)
        p->w[W_7C] &= ~F(3);
    follow_dependencies(p);
}

bool cpuid_host_has(enum cpu_feature f)
{
    struct cpuid_policy p = {0};
    features_of_host(&p);
    return cpuid_has(&p, f);
}

int cpuid_host_mask(const char *list)
{
    for (const char *name = list; *name;) {
        size_t len = strcspn(name, ",");
        unsigned i = 0;
        while (i < CPU_FEATURES && (strlen(feature[i].name) != len || memcmp(feature[i].name, name, len)))
            i++;
        if (i == CPU_FEATURES)
            return err(-EINVAL, "\"%.*s\": no feature; names are those of /proc/cpuinfo, with commas between", (int)MIN(len, 100u), name);
        cpuid_host(0, 0);                                              /* reads the host */
        for (unsigned n = 0; n < host.n; n++)
            if (host.entry[n].leaf == word[feature[i].word].leaf && host.entry[n].subleaf == word[feature[i].word].subleaf)
                *reg_in(&host.entry[n].r, word[feature[i].word].reg) &= ~F(feature[i].bit);
        name += len + (name[len] == ',');
    }
    return 0;
}

int cpuid_policy_new(unsigned vcpus, u64 tsc_khz, struct cpuid_policy **out)
{
    struct cpuid_policy *p = calloc(1, sizeof(*p));
    if (!p)
        return err(-ENOMEM, "no memory for the CPUID policy");
    p->vcpus = vcpus;
    while (1u << p->id_bits < vcpus)
        p->id_bits++;
    p->tsc_khz = tsc_khz;
    u32 basic = cpuid_host(0, 0)->eax;     /* first: reads the host */
    p->amd = host.amd;
    features_of_host(p);
    for (unsigned i = 0; i < WORDS; i++)
        p->w[i] |= word[i].always | (p->amd ? word[i].amd : word[i].intel);
    for (unsigned i = 0; i < ARRAY_SIZE(pv_feature); i++)
        p->pv |= F(pv_feature[i].bit);
    topology_features(p);
    follow_dependencies(p);
    unsigned phys = cpuid_host(0x80000008, 0)->eax & 0xff;
    p->phys_bits = phys >= 36 && phys <= 52 ? phys : 36;
    p->max_basic = MIN(MAX(basic, 0xdu), MAX_BASIC);
    crystal_ratio(p);
    if (p->crystal_num)
        p->max_basic = MAX_BASIC;
    *out = p;
    return 0;
}

void cpuid_policy_free(struct cpuid_policy *p)
{
    free(p);
}

bool cpuid_has(const struct cpuid_policy *p, enum cpu_feature f)
{
    return p->w[feature[f].word] & F(feature[f].bit);
}

void cpuid_clear(struct cpuid_policy *p, enum cpu_feature f)
{
    p->w[feature[f].word] &= ~F(feature[f].bit);
    follow_dependencies(p);
}

bool cpuid_pv(const struct cpuid_policy *p, unsigned bit)
{
    return p->pv & F(bit);
}

/* Takes the feature with this name of len characters away; false if there is none. p NULL: only looks. */
static bool take_away(struct cpuid_policy *p, const char *name, size_t len)
{
    for (unsigned i = 0; i < ARRAY_SIZE(pv_feature); i++)
        if (strlen(pv_feature[i].name) == len && !memcmp(pv_feature[i].name, name, len)) {
            if (p)
                p->pv &= ~F(pv_feature[i].bit);
            return true;
        }
    for (unsigned i = 0; i < CPU_FEATURES; i++)
        if (strlen(feature[i].name) == len && !memcmp(feature[i].name, name, len)) {
            if (p)
                cpuid_clear(p, (enum cpu_feature)i);
            return true;
        }
    return false;
}

int cpuid_change(struct cpuid_policy *p, const char *list)
{
    for (const char *word = list;; word++) {
        size_t len = strcspn(word, ",");
        if (len < 2 || *word != '-')
            return err(-EINVAL, "\"%.*s\": write -NAME for each feature that the guest is not to have, with commas "
                                "between", (int)MIN(len, 100u), word);
        if (!take_away(p, word + 1, len - 1))
            return err(-EINVAL, "\"%.*s\": no feature that can be taken away; names are those of /proc/cpuinfo",
                       (int)MIN(len - 1, 100u), word + 1);
        word += len;
        if (!*word)
            return 0;
    }
}

void cpuid_keep(struct cpuid_policy *p, u32 leaf, u32 subleaf, const struct cpuid_regs *r)
{
    const u32 ours[WORDS] = {[W_1C] = F(24) | F(31), [W_1D] = F(28), [W_E1C] = F(1)}; /* TSC deadline, hypervisor, topology */
    for (unsigned i = 0; i < WORDS; i++) {
        u32 have = reg_of(r, word[i].reg), bare = word[i].bare;
        if (word[i].leaf == leaf && word[i].subleaf == subleaf)
            p->w[i] = (p->w[i] & ~bare & (have | ours[i])) | (have & bare);
    }
    if (leaf == KVM_CPUID_FEATURES)
        p->pv &= r->eax;
    follow_dependencies(p);
}

u64 cpuid_xcr0_mask(const struct cpuid_policy *p)
{
    return p->xcr0_mask;
}

unsigned cpuid_phys_bits(const struct cpuid_policy *p)
{
    return p->phys_bits;
}

bool cpuid_is_amd(const struct cpuid_policy *p)
{
    return p->amd;
}

u64 cpuid_cr4_mask(const struct cpuid_policy *p)
{
    static const struct {
        enum cpu_feature f;
        u32 bits;
    } by_feature[] = {
        {CPU_VME, CR4_VME | CR4_PVI}, {CPU_DE, CR4_DE},     {CPU_PSE, CR4_PSE},           {CPU_PAE, CR4_PAE},
        {CPU_PGE, CR4_PGE},           {CPU_UMIP, CR4_UMIP}, {CPU_FSGSBASE, CR4_FSGSBASE}, {CPU_PCID, CR4_PCIDE},
        {CPU_XSAVE, CR4_OSXSAVE},     {CPU_SMEP, CR4_SMEP}, {CPU_SMAP, CR4_SMAP},         {CPU_PKU, CR4_PKE},
    };
    u64 mask = CR4_TSD | CR4_MCE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    for (unsigned i = 0; i < ARRAY_SIZE(by_feature); i++)
        if (cpuid_has(p, by_feature[i].f))
            mask |= by_feature[i].bits;
    return mask;
}

u64 cpuid_efer_mask(const struct cpuid_policy *p)
{
    u64 mask = EFER_SCE;
    if (cpuid_has(p, CPU_LM))
        mask |= EFER_LME | EFER_LMA;
    if (cpuid_has(p, CPU_NX))
        mask |= EFER_NXE;
    if (p->w[W_E21A] & F(8))
        mask |= EFER_AUTOIBRS;
    return mask;
}

/* ---- leaves ---- */

static void leaf_1(const struct cpuid_policy *p, unsigned vcpu, const struct x86 *x, bool apic_enabled,
                   struct cpuid_regs *r)
{
    u32 count = p->amd ? p->vcpus : 1u << p->id_bits;
    r->eax = cpuid_host(1, 0)->eax;
    r->ebx = (vcpu & 0xff) << 24 | MIN(count, 255u) << 16 | (cpuid_host(1, 0)->ebx & 0xff00);
    r->ecx = p->w[W_1C] | (x->cr4 & CR4_OSXSAVE ? F(27) : 0);
    r->edx = p->w[W_1D] & (apic_enabled ? ~0u : ~F(9));
}

/* Deterministic cache parameters, Intel's leaf 4 and AMD's 0x8000001d: the host's caches, the last level shared by all
 * cores. */
static void leaf_caches(const struct cpuid_policy *p, const struct cpuid_regs *h, struct cpuid_regs *r)
{
    *r = *h;
    if (!(h->eax & 31))
        return;
    u32 sharing = (h->eax >> 5 & 7) < 3 ? 0 : (1u << p->id_bits) - 1;
    u32 cores = p->amd ? 0 : MIN((1u << p->id_bits) - 1, 63u);
    r->eax = (h->eax & 0x3fff) | MIN(sharing, 0xfffu) << 14 | cores << 26;
}

static void leaf_7(const struct cpuid_policy *p, const struct x86 *x, u32 subleaf, struct cpuid_regs *r)
{
    if (subleaf == 0) {
        r->eax = 1;
        r->ebx = p->w[W_7B];
        r->ecx = p->w[W_7C] | (x->cr4 & CR4_PKE ? F(4) : 0);
        r->edx = p->w[W_7D];
    } else if (subleaf == 1) {
        r->eax = p->w[W_71A];
    }
}

/* Single-threaded cores in one package. */
static void leaf_b(const struct cpuid_policy *p, unsigned vcpu, u32 subleaf, struct cpuid_regs *r)
{
    r->ecx = subleaf & 0xff;
    r->edx = vcpu;
    if (subleaf == 0) {
        r->ebx = 1;
        r->ecx |= 1 << 8;                                               /* level type SMT */
    } else if (subleaf == 1) {
        r->eax = p->id_bits;
        r->ebx = p->vcpus;
        r->ecx |= 2 << 8;                                               /* core */
    }
}

/* Size of an XSAVE area for these components, SDM vol. 1 13.4.3. */
static u32 xsave_size(u64 components, bool compact)
{
    u32 size = 576;
    for (unsigned i = 2; i < 20; i++) {
        if (!(components & BIT(i)))
            continue;
        const struct cpuid_regs *h = cpuid_host(0xd, i);
        if (compact)
            size = (h->ecx & 2 ? (u32)ALIGN_UP(size, 64) : size) + h->eax;
        else
            size = MAX(size, h->ebx + h->eax);
    }
    return size;
}

static void leaf_d(const struct cpuid_policy *p, const struct x86 *x, u32 subleaf, struct cpuid_regs *r)
{
    if (!(p->w[W_1C] & F(26)))
        return;
    if (subleaf == 0) {
        r->eax = (u32)p->xcr0_mask;
        r->ebx = xsave_size(x->xcr0, false);
        r->ecx = xsave_size(p->xcr0_mask, false);
        r->edx = (u32)(p->xcr0_mask >> 32);
    } else if (subleaf == 1) {
        r->eax = p->w[W_D1A];
        if (r->eax & (F(1) | F(3)))
            r->ebx = xsave_size(x->xcr0 | x->xss, true);
    } else if (subleaf < 20 && p->xcr0_mask & BIT(subleaf)) {
        *r = *cpuid_host(0xd, subleaf);
        r->ecx &= 2;
    }
}

static bool leaf_basic(const struct cpuid_policy *p, unsigned vcpu, const struct x86 *x, bool apic, u32 leaf,
                       u32 subleaf, struct cpuid_regs *r)
{
    switch (leaf) {
    case 0:
        *r = *cpuid_host(0, 0);
        r->eax = p->max_basic;
        break;
    case 1:
        leaf_1(p, vcpu, x, apic, r);
        break;
    case 2:
        *r = *cpuid_host(2, 0);
        break;
    case 4:
        if (!p->amd)
            leaf_caches(p, cpuid_host(4, subleaf), r);
        break;
    case 6:
        r->eax = F(2);                                                  /* ARAT: the APIC timer never stops */
        break;
    case 7:
        leaf_7(p, x, subleaf, r);
        break;
    case 0xb:
        leaf_b(p, vcpu, subleaf, r);
        break;
    case 0xd:
        leaf_d(p, x, subleaf, r);
        break;
    case 0x15:
        r->eax = p->crystal_den;
        r->ebx = p->crystal_num;
        r->ecx = p->crystal_num ? APIC_BUS_KHZ * 1000 : 0;
        break;
    case 0x16:
        if (!p->amd) {
            r->eax = r->ebx = (u32)MIN(p->tsc_khz / 1000, 0xffffu);
            r->ecx = 100;
        }
        break;
    default:
        return leaf <= p->max_basic;
    }
    return true;
}

static void leaf_kvm(const struct cpuid_policy *p, u32 leaf, struct cpuid_regs *r)
{
    switch (leaf) {
    case KVM_CPUID_SIGNATURE:
        r->eax = KVM_CPUID_TIMING;
        memcpy(&r->ebx, &KVM_SIGNATURE[0], 4);
        memcpy(&r->ecx, &KVM_SIGNATURE[4], 4);
        memcpy(&r->edx, &KVM_SIGNATURE[8], 4);
        break;
    case KVM_CPUID_FEATURES:
        r->eax = p->pv;
        break;
    case KVM_CPUID_TIMING:
        r->eax = (u32)p->tsc_khz;
        r->ebx = APIC_BUS_KHZ;
        break;
    }
}

static void leaf_extended(const struct cpuid_policy *p, unsigned vcpu, u32 leaf, u32 subleaf, struct cpuid_regs *r)
{
    const struct cpuid_regs *h = cpuid_host(leaf, subleaf);
    switch (leaf) {
    case 0x80000000:
        *r = *h;
        r->eax = p->amd ? MAX_EXTENDED : 0x80000008;
        break;
    case 0x80000001:
        *r = (struct cpuid_regs){.eax = h->eax, .ebx = h->ebx, .ecx = p->w[W_E1C], .edx = p->w[W_E1D]};
        break;
    case 0x80000002: case 0x80000003: case 0x80000004:                  /* brand */
    case 0x80000005: case 0x80000006:                                   /* caches and TLBs */
        *r = *h;
        break;
    case 0x80000007:
        r->edx = p->w[W_E7D];
        break;
    case 0x80000008:
        r->eax = p->phys_bits | 48 << 8;
        r->ebx = p->w[W_E8B];
        if (p->amd)
            r->ecx = MIN(p->vcpus - 1, 255u) | p->id_bits << 12;
        break;
    case 0x8000001d:
        if (p->amd && p->w[W_E1C] & F(22))
            leaf_caches(p, h, r);
        break;
    case 0x8000001e:
        if (p->amd && p->w[W_E1C] & F(22)) {
            r->eax = vcpu;
            r->ebx = vcpu & 0xff;                                       /* core ID; one thread per core */
        }
        break;
    case 0x80000021:
        r->eax = p->w[W_E21A];
        r->ecx = p->w[W_E21C];
        break;
    }
}

void cpuid_get(const struct cpuid_policy *p, unsigned vcpu, const struct x86 *x, bool apic_enabled, u32 leaf,
               u32 subleaf, struct cpuid_regs *out)
{
    *out = (struct cpuid_regs){0};
    u32 last = p->amd ? MAX_EXTENDED : 0x80000008;
    if (leaf >> 16 == 0x4000)
        leaf_kvm(p, leaf, out);
    else if (leaf >> 16 == 0x8000 && leaf <= last)
        leaf_extended(p, vcpu, leaf, subleaf, out);
    else if (!leaf_basic(p, vcpu, x, apic_enabled, leaf, subleaf, out) && !p->amd)
        /* Beyond the highest basic leaf Intel's processors repeat it; AMD's give zeros. */
        leaf_basic(p, vcpu, x, apic_enabled, p->max_basic, subleaf, out);
}
