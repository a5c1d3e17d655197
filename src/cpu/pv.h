/*
 * KVM's paravirtual interface on engines of our own (Linux' Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst,
 * asm/kvm_para.h): what a stock guest's drivers use where it spares work. The clock is pvclock.c's; under KVM the kernel
 * does all of this.
 *
 *     PV EOI          a word of the guest's in which it ends an edge-triggered interrupt, without the local APIC
 *     steal time      a record per vCPU: time that it could have run but did not; whether it stands still now
 *     PV TLB flush    of a vCPU that stands still: a bit in that record, looked at before it runs again
 *     PV IPI          one hypercall for many destinations
 *     PV unhalt       a hypercall ends another vCPU's HLT, whatever its IF is
 *
 * Which of them are offered is cpuid.c's table. On the vCPU's thread, or while it is held.
 */
#pragma once

#include "cpu/machine.h"

/* Before the guest runs: true if all its translations are to be dropped. */
bool pv_enter(struct vcpu *v, struct x86 *x);
/* After it ran: it stands still from now on, asleep in HLT or held. An EOI that the guest has made in its word is carried out. */
void pv_leave(struct vcpu *v, struct x86 *x);
/* Now and then while it runs: accounts for stolen time, if it is time for that. */
void pv_tick(struct vcpu *v, struct x86 *x);

/* A write of one of the registers of struct x86 below; reads give what was written. 0, or -1 for #GP. */
u64 *pv_register(const struct vcpu *v, struct x86 *x, u32 msr);    /* NULL: none of ours, or not offered */
int pv_write(struct vcpu *v, struct x86 *x, u32 msr, u64 val);

/* VMCALL, VMMCALL: number and four arguments, cut to the mode's width. The result goes to RAX. */
s64 pv_hypercall(struct vcpu *v, struct x86 *x, u64 number, const u64 arg[4], bool long_mode);

/* For struct cpu_port: the guest may end the interrupt that it is given now in its word, if it has one; has it? */
bool pv_eoi_offer(void *vcpu);
bool pv_eoi_done(void *vcpu);
