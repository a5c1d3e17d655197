/*
 * Model-specific registers: one policy for all engines. State lives in struct x86; the local APIC's registers are asked of v->intc.
 *
 * On the vCPU's thread. Return 0, or -1 when the access must raise #GP(0) (unknown MSR, reserved bits, non-canonical address). Traced.
 */
#pragma once

#include "cpu/machine.h"

#define MSR_FS_BASE 0xc0000100u
#define MSR_GS_BASE 0xc0000101u
#define MSR_KERNEL_GS_BASE 0xc0000102u

int msr_read(struct vcpu *v, struct x86 *x, u32 msr, u64 *val);
int msr_write(struct vcpu *v, struct x86 *x, u32 msr, u64 val);

/* pvclock.c. Writes KVM's paravirtual clock page for this vCPU, if the guest has enabled it (on MSR write, VCPU_EV_CLOCK, resume). */
void pvclock_update(struct vcpu *v, struct x86 *x);
/* The wall-clock time at which the paravirtual clock stood at zero, to where the guest has asked for it. */
void pvclock_write_wall(struct vcpu *v, struct x86 *x);
