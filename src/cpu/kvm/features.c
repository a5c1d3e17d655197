/*
 * CPUID and MSR policy under KVM: the same as every engine's (cpuid.h, msr.h), less what this host's KVM cannot carry.
 *
 * MSRs with state live in the kernel. Those that it does not know, and those of which it knows more than our machine
 * has (machine-check banks), come to run() as exits and are answered by msr.c.
 */
#include "cpu/kvm/kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/err.h"
#include "cpu/msr.h"

#define ENTRIES_MAX 256

struct cpuid_list {                                      /* struct kvm_cpuid2, with room for its entries */
    u32 nent, padding;
    struct kvm_cpuid_entry2 entry[ENTRIES_MAX];
};

/* What KVM can show to a guest on this host; an empty list when it cannot be asked (machine_open will say why). */
static void supported(struct cpuid_list *list)
{
    int sys = open("/dev/kvm", O_RDWR | O_CLOEXEC);

    memset(list, 0, sizeof *list);
    list->nent = ENTRIES_MAX;
    if (sys < 0 || ioctl(sys, KVM_GET_SUPPORTED_CPUID, list) < 0)
        list->nent = 0;
    if (sys >= 0)
        close(sys);
}

static struct cpuid_regs find(const struct cpuid_list *list, u32 leaf, u32 subleaf)
{
    for (u32 i = 0; i < list->nent && i < ENTRIES_MAX; i++) {
        const struct kvm_cpuid_entry2 *e = &list->entry[i];

        if (e->function == leaf && (e->index == subleaf || !(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX)))
            return (struct cpuid_regs){ e->eax, e->ebx, e->ecx, e->edx };
    }
    return (struct cpuid_regs){ 0 };
}

void kvm_cpuid_limit(struct cpuid_policy *p)
{
    static const u32 leaf[][2] = {
        {1, 0}, {7, 0}, {7, 1}, {0xd, 1}, {0x80000001, 0}, {0x80000007, 0}, {0x80000008, 0}, {0x80000021, 0},
        {0x40000001, 0},
    };
    struct cpuid_list *list = malloc(sizeof *list);

    if (!list)
        return;                                                    /* machine_open will not get far either */
    supported(list);
    for (unsigned i = 0; list->nent && i < ARRAY_SIZE(leaf); i++) {
        struct cpuid_regs r = find(list, leaf[i][0], leaf[i][1]);

        cpuid_keep(p, leaf[i][0], leaf[i][1], &r);
    }
    free(list);
}

static void add(struct vcpu *v, struct cpuid_list *list, u32 leaf, u32 subleaf, bool indexed)
{
    struct kvm_cpuid_entry2 *e = &list->entry[list->nent];
    struct cpuid_regs r;

    bug_on(list->nent == ENTRIES_MAX);
    cpuid_get(v->m->cpuid, v->id, &v->x, true, leaf, subleaf, &r);
    *e = (struct kvm_cpuid_entry2){
        .function = leaf, .index = subleaf, .flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0, .eax = r.eax,
        .ebx = r.ebx, .ecx = r.ecx, .edx = r.edx,
    };
    list->nent++;
}

static unsigned subleaves(u32 leaf)                                /* 0: the leaf has no index */
{
    switch (leaf) {
    case 4: case 0x8000001d: return 6;
    case 7: return 2;
    case 0xb: return 3;
    case 0xd: return 20;
    default: return 0;
    }
}

static void add_range(struct vcpu *v, struct cpuid_list *list, u32 first)
{
    struct cpuid_regs r;

    cpuid_get(v->m->cpuid, v->id, &v->x, true, first, 0, &r);
    for (u32 leaf = first; leaf <= r.eax && leaf - first < 64; leaf++) {
        unsigned n = subleaves(leaf);

        for (unsigned i = 0; i < n; i++)
            add(v, list, leaf, i, true);
        if (!n)
            add(v, list, leaf, 0, false);
    }
}

/* The bits that follow CR4, XCR0 and the APIC's mode are the kernel's to keep. */
int kvm_cpuid_set(struct vcpu *v)
{
    struct cpuid_list *list = calloc(1, sizeof *list);
    int r = 0;

    if (!list)
        return err(-ENOMEM, "kvm: out of memory");
    add_range(v, list, 0);
    add_range(v, list, 0x40000000);
    add_range(v, list, 0x80000000);
    if (ioctl(kvcpu_of(v)->fd, KVM_SET_CPUID2, list) < 0)
        r = err(-errno, "kvm: vCPU %u: KVM does not take the processor's features: %s; choose another engine", v->id,
                strerror(errno));
    free(list);
    return r;
}

/* ---- MSRs ---- */

/* MCG_CAP and MCG_CTL, and the banks that our MCG_CAP does not announce: to us, reads and writes. A clear bit denies
   the kernel the access. */
void kvm_msr_policy(struct kvm_machine *k)
{
    static u8 none[16];                                            /* constant: 128 clear bits */
    struct kvm_enable_cap cap = {
        .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER },
    };
    struct kvm_msr_filter filter = {
        .flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
        .ranges = {
            { .flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, .base = 0x179, .nmsrs = 1, .bitmap = none },
            { .flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, .base = 0x17b, .nmsrs = 1, .bitmap = none },
            { .flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, .base = 0x400, .nmsrs = 128, .bitmap = none },
        },
    };
    if (ioctl(k->vm, KVM_ENABLE_CAP, &cap) == 0)
        /* kernels before 5.10 have neither: their own answers stand */
        ioctl(k->vm, KVM_X86_SET_MSR_FILTER, &filter);
}

void kvm_msr_exit(struct vcpu *v)
{
    struct kvm_run *run = kvcpu_of(v)->run;
    u64 val = run->msr.data;

    if (run->exit_reason == KVM_EXIT_X86_WRMSR) {
        run->msr.error = msr_write(v, &v->x, run->msr.index, val) != 0;
    } else {
        run->msr.error = msr_read(v, &v->x, run->msr.index, &val) != 0;
        run->msr.data = val;
    }
}
