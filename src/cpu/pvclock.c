/*
 * KVM's paravirtual clock (Linux' Documentation/virt/kvm/x86/msr.rst): a page per vCPU from which the guest computes
 * nanoseconds out of its TSC.
 *
 *     ns = system_time + (((tsc - tsc_timestamp) << or >> tsc_shift) * tsc_to_system_mul >> 32)
 *
 * All vCPUs are given the same line for good: clock_tsc() in nanoseconds, from zero on. So the clock never goes back
 * between two of them (PVCLOCK_TSC_STABLE), nor when the host slews its own clock; the guest's NTP client, if any,
 * steers it. A reader retries while `version` is odd or has changed. On the vCPU's thread.
 */
#include "cpu/msr.h"

#include <asm/kvm_para.h>
#include <string.h>

#define PVCLOCK_TSC_STABLE 1
#define NS_PER_S 1000000000ull

struct pvclock_time {
    u32 version, pad0;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    s8 tsc_shift;
    u8 flags, pad[2];
};
_Static_assert(sizeof(struct pvclock_time) == 32, "ABI");

struct pvclock_wall {
    u32 version, sec, nsec;
};
_Static_assert(sizeof(struct pvclock_wall) == 12, "ABI");

/* The largest multiplier below 2^32 whose shift keeps ns = (tsc << shift) * mul >> 32. */
static void tsc_scale(u64 tsc_khz, u32 *mul, s8 *shift)
{
    u64 hz = tsc_khz * 1000;
    *shift = 0;
    while (hz > 2 * NS_PER_S) {
        hz >>= 1;
        --*shift;
    }
    while (hz <= NS_PER_S) {
        hz <<= 1;
        ++*shift;
    }
    /* Now 1 < hz / 1e9 <= 2. Compute from the unshifted rate, so that no bit is lost. */
    u128 scaled = (u128)NS_PER_S << 32;
    u128 rate = (u128)tsc_khz * 1000;
    *mul = (u32)(*shift < 0 ? (scaled << -*shift) / rate : scaled / (rate << *shift));
}

/* Writes the record, odd version first, where the guest has put it; an address outside RAM is the guest's loss. */
static void publish(struct ram *ram, u64 gpa, void *record, size_t size)
{
    u32 version;
    if (ram_read(ram, gpa, &version, sizeof(version)))
        return;
    version = (version | 1) + (version & 1 ? 2 : 0);
    ram_write(ram, gpa, &version, sizeof(version));
    atomic_thread_fence(memory_order_seq_cst);
    ram_write(ram, gpa + sizeof(version), (char *)record + sizeof(version), size - sizeof(version));
    atomic_thread_fence(memory_order_seq_cst);
    version++;
    ram_write(ram, gpa, &version, sizeof(version));
}

void pvclock_update(struct vcpu *v, struct x86 *x)
{
    if (!(x->kvm_system_time & KVM_MSR_ENABLED))
        return;
    struct pvclock_time t = {
        .tsc_timestamp = (u64)x->tsc_adjust,
        .flags = PVCLOCK_TSC_STABLE,
    };
    tsc_scale(clock_tsc_khz(v->m->clock), &t.tsc_to_system_mul, &t.tsc_shift);
    publish(v->m->ram, x->kvm_system_time & ~(u64)KVM_MSR_ENABLED, &t, sizeof(t));
}

void pvclock_write_wall(struct vcpu *v, struct x86 *x)
{
    u64 now = (u64)((u128)clock_tsc(v->m->clock) * 1000000 / clock_tsc_khz(v->m->clock));
    u64 zero = clock_wall_ns() - now;
    struct pvclock_wall w = {.sec = (u32)(zero / NS_PER_S), .nsec = (u32)(zero % NS_PER_S)};
    publish(v->m->ram, x->kvm_wall_clock, &w, sizeof(w));
}
