/*
 * KVM's paravirtual interface (pv.h) for engines whose local APICs are ours.
 *
 * Steal time is measured by two clocks: what the host's clock says that the guest ran, less the processor time that this
 * thread was given. So it holds all that kept a runnable vCPU from running: other threads of the host, a page that had
 * to be read, a lock in the monitor. The record in guest memory is the only total; here is what is not yet in it.
 *
 * Not offered: asynchronous page faults (guest memory is never absent), yielding, halt polling control, and what belongs
 * to encrypted memory or migration.
 *
 * The record's `preempted` byte is shared with other vCPUs and so is only changed atomically; all else in guest memory
 * is written by this vCPU's thread alone. An address outside RAM is refused when it is enabled; should the RAM go away
 * later, it is the guest's loss.
 */
#include "cpu/pv.h"

#include <errno.h>
#include <linux/kvm_para.h>
#include <stddef.h>
#include <time.h>

#include "cpu/cpuid.h"

#define STEAL_LOOK_NS 1000000u                                     /* of running, between two looks at the thread's clock */
#define ICR_VECTOR 0xffu
#define ICR_MODE(icr) (((icr) >> 8) & 7)
#define ICR_DEST 0xc0800u                                          /* shorthand, logical destination */
#define MODE_FIXED 0
#define MODE_NMI 4

/* ---- registers ---- */

u64 *pv_register(const struct vcpu *v, struct x86 *x, u32 msr)
{
    const struct cpuid_policy *p = v->m->cpuid;

    if (msr == MSR_KVM_PV_EOI_EN && cpuid_pv(p, KVM_FEATURE_PV_EOI))
        return &x->kvm_pv_eoi;
    if (msr == MSR_KVM_STEAL_TIME && cpuid_pv(p, KVM_FEATURE_STEAL_TIME))
        return &x->kvm_steal_time;
    return NULL;
}

static void steal_begin(struct vcpu *v, const struct x86 *x);
static u8 preempted_set(struct vcpu *v, const struct x86 *x, u8 val);

int pv_write(struct vcpu *v, struct x86 *x, u32 msr, u64 val)
{
    bool eoi = msr == MSR_KVM_PV_EOI_EN, on = val & KVM_MSR_ENABLED;
    u64 reserved = eoi ? 2 : KVM_STEAL_RESERVED_MASK;
    u64 gpa = val & ~(u64)KVM_MSR_ENABLED, size = eoi ? sizeof(u32) : sizeof(struct kvm_steal_time);

    if (val & reserved || (on && !ram_has(v->m->ram, gpa, size)))
        return -1;
    if (eoi) {
        if (v->intc.ops && v->intc.ops->settle)
            v->intc.ops->settle(v->intc.chip);                     /* with the word that it was offered in */
        x->kvm_pv_eoi = val;
    } else {
        x->kvm_steal_time = val;
        v->pv = (struct vcpu_pv){ 0 };
        steal_begin(v, x);
        if (on)
            preempted_set(v, x, 0);
    }
    return 0;
}

/* ---- PV EOI ---- */

bool pv_eoi_offer(void *vcpu)
{
    struct vcpu *v = vcpu;
    u64 gpa = v->x.kvm_pv_eoi & ~(u64)KVM_MSR_ENABLED;
    u32 word;

    if (!(v->x.kvm_pv_eoi & KVM_MSR_ENABLED) || ram_read(v->m->ram, gpa, &word, sizeof word))
        return false;
    word |= KVM_PV_EOI_ENABLED;
    return ram_write(v->m->ram, gpa, &word, sizeof word) == 0;
}

bool pv_eoi_done(void *vcpu)
{
    struct vcpu *v = vcpu;
    u64 gpa = v->x.kvm_pv_eoi & ~(u64)KVM_MSR_ENABLED;
    u32 word;

    if (ram_read(v->m->ram, gpa, &word, sizeof word))
        return false;
    if (!(word & KVM_PV_EOI_MASK))
        return true;
    word &= ~(u32)KVM_PV_EOI_MASK;
    ram_write(v->m->ram, gpa, &word, sizeof word);
    return false;
}

/* ---- steal time ---- */

static u64 thread_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

static u64 record_gpa(const struct x86 *x)
{
    return x->kvm_steal_time & KVM_STEAL_VALID_BITS;
}

static bool steal_on(const struct x86 *x)
{
    return x->kvm_steal_time & KVM_MSR_ENABLED;
}

/* A reader retries while `version` is odd or has changed. */
static void steal_add(struct vcpu *v, const struct x86 *x, u64 ns)
{
    u64 gpa = record_gpa(x);
    struct kvm_steal_time *r = (struct kvm_steal_time *)ram_range(v->m->ram, gpa, sizeof *r);

    if (!r)
        return;
    ram_begin_write(v->m->ram, gpa, sizeof *r);
    u32 version = (__atomic_load_n(&r->version, __ATOMIC_RELAXED) + 1) | 1;
    __atomic_store_n(&r->version, version, __ATOMIC_SEQ_CST);
    __atomic_store_n(&r->steal, __atomic_load_n(&r->steal, __ATOMIC_RELAXED) + ns, __ATOMIC_SEQ_CST);
    __atomic_store_n(&r->version, version + 1, __ATOMIC_SEQ_CST);
    ram_end_write(v->m->ram, gpa, sizeof *r);
}

/* What was not running although it could is what the thread's own clock does not show. */
static void steal_look(struct vcpu *v, const struct x86 *x)
{
    struct vcpu_pv *p = &v->pv;
    u64 now = clock_ns(v->m->clock);

    p->ran_ns += now - p->since_ns;
    p->since_ns = now;
    if (p->ran_ns < STEAL_LOOK_NS)
        return;
    u64 cpu = thread_ns(), used = cpu - p->cpu_ns;
    if (p->ran_ns > used)
        steal_add(v, x, p->ran_ns - used);
    p->cpu_ns = cpu;
    p->ran_ns = 0;
}

/* Replaces the byte that says whether the vCPU stands still; what it was. */
static u8 preempted_set(struct vcpu *v, const struct x86 *x, u8 val)
{
    u64 gpa = record_gpa(x) + offsetof(struct kvm_steal_time, preempted);
    u8 *byte = ram_hva(v->m->ram, gpa), was;

    if (!byte)
        return 0;
    ram_begin_write(v->m->ram, gpa, 1);
    was = __atomic_exchange_n(byte, val, __ATOMIC_SEQ_CST);
    ram_end_write(v->m->ram, gpa, 1);
    return was;
}

/* The guest runs from here on. */
static void steal_begin(struct vcpu *v, const struct x86 *x)
{
    if (!steal_on(x))
        return;
    v->pv.since_ns = clock_ns(v->m->clock);
    if (!v->pv.cpu_ns)
        v->pv.cpu_ns = thread_ns();
}

bool pv_enter(struct vcpu *v, struct x86 *x)
{
    if (!steal_on(x))
        return false;
    steal_begin(v, x);
    return preempted_set(v, x, 0) & KVM_VCPU_FLUSH_TLB && cpuid_pv(v->m->cpuid, KVM_FEATURE_PV_TLB_FLUSH);
}

void pv_leave(struct vcpu *v, struct x86 *x)
{
    if (v->intc.ops && v->intc.ops->settle)
        v->intc.ops->settle(v->intc.chip);
    if (!steal_on(x))
        return;
    steal_look(v, x);
    preempted_set(v, x, KVM_VCPU_PREEMPTED);
}

void pv_tick(struct vcpu *v, struct x86 *x)
{
    if (steal_on(x))
        steal_look(v, x);
}

/* ---- hypercalls ---- */

/* Up to 128 destinations, or 64 for a 32-bit caller: bit 0 is the APIC ID in the third argument. */
static s64 send_ipi(struct vcpu *v, const u64 arg[4], bool long_mode)
{
    u32 icr = (u32)arg[3];
    u8 mode = ICR_MODE(icr);
    s64 reached = 0;

    if (icr & ICR_DEST || (mode != MODE_FIXED && mode != MODE_NMI))
        return -KVM_EINVAL;
    for (unsigned word = 0; word < 2; word++)
        for (u64 left = arg[word]; left; left &= left - 1) {
            u64 id = (u64)(u32)arg[2] + word * (long_mode ? 64 : 32) + (unsigned)__builtin_ctzll(left);
            struct vcpu *to = id < v->m->vcpus ? v->m->vcpu[id] : NULL;

            if (to && to->intc.ops && to->intc.ops->accept)
                reached += to->intc.ops->accept(to->intc.chip, mode, (u8)(icr & ICR_VECTOR));
        }
    return reached;
}

static s64 kick(struct vcpu *v, const u64 arg[4])
{
    if (arg[1] < v->m->vcpus)
        vcpu_raise(v->m->vcpu[arg[1]], VCPU_EV_UNHALT);
    return 0;
}

/* The host's wall clock and the guest's TSC at one moment. */
static s64 clock_pairing(struct vcpu *v, const struct x86 *x, const u64 arg[4])
{
    if (arg[1] != KVM_CLOCK_PAIRING_WALLCLOCK)
        return -KVM_EOPNOTSUPP;
    u64 wall = clock_wall_ns();
    struct kvm_clock_pairing pair = {
        .sec = (s64)(wall / 1000000000), .nsec = (s64)(wall % 1000000000),
        .tsc = clock_tsc(v->m->clock) + (u64)x->tsc_adjust,
    };
    return ram_write(v->m->ram, arg[0], &pair, sizeof pair) ? -KVM_EFAULT : 0;
}

s64 pv_hypercall(struct vcpu *v, struct x86 *x, u64 number, const u64 arg[4], bool long_mode)
{
    const struct cpuid_policy *p = v->m->cpuid;

    vcpu_count(v, COUNT_HYPERCALL);
    trace(v->m->trace, TRACE_EXITS, (int)v->id, "hypercall %llu (0x%llx, 0x%llx, 0x%llx, 0x%llx)",
          (unsigned long long)number, (unsigned long long)arg[0], (unsigned long long)arg[1],
          (unsigned long long)arg[2], (unsigned long long)arg[3]);
    if (x86_cpl(x))
        return -KVM_EPERM;
    if (number == KVM_HC_SEND_IPI && cpuid_pv(p, KVM_FEATURE_PV_SEND_IPI))
        return send_ipi(v, arg, long_mode);
    if (number == KVM_HC_KICK_CPU && cpuid_pv(p, KVM_FEATURE_PV_UNHALT))
        return kick(v, arg);
    if (number == KVM_HC_CLOCK_PAIRING)
        return clock_pairing(v, x, arg);
    return -KVM_ENOSYS;
}
