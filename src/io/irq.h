/*
 * Interrupt wiring: lines, messages, and the two sides of a local APIC.
 *
 * Lock order: a device's lock, then i8259/ioapic, then lapic, then the clock's. Lines may be set with the device's lock held; chips never
 * call back into devices.
 */
#pragma once

#include "base/stream.h"
#include "base/types.h"

/* A wire into input n of a chip. level is 0 or 1; setting it to what it is does nothing. Any thread. */
struct irq_line {
    void (*set)(void *chip, int n, int level);
    void *chip;
    int n;
};
static inline void irq_set(const struct irq_line *l, int level)
{
    if (l->set)
        l->set(l->chip, l->n, level);
}

/* Message-signalled interrupts: a write of data to addr (0xfeexxxxx; Intel SDM vol. 3A 11.11). Any thread. */
struct msi_sink {
    void (*send)(void *arg, u64 addr, u32 data);
    void *arg;
};

/* What a local APIC does to its vCPU. Any thread, also with chip locks held: the receiver only sets a bit and wakes the vCPU. */
enum cpu_signal { CPU_INTR, CPU_NMI, CPU_SMI, CPU_INIT, CPU_SIPI };
struct cpu_port {
    void (*signal)(void *vcpu, enum cpu_signal what, u8 vector);   /* vector: of SIPI */
    void *vcpu;
};

/* What a vCPU asks of its local APIC (and, through it, of the i8259 for ExtINT). On the vCPU's thread. */
struct intc_ops {
    int (*peek)(void *intc);                                       /* the vector that ack() would give now, or -1; IF is the caller's affair */
    int (*ack)(void *intc);                                        /* takes it into service; -1 when there is none any more */
    int (*msr_read)(void *intc, u32 msr, u64 *val);                /* IA32_APIC_BASE, IA32_TSC_DEADLINE, 0x800..0x8ff; 0, or -1 for #GP */
    int (*msr_write)(void *intc, u32 msr, u64 val);
    u8 (*tpr_get)(void *intc);                                     /* CR8: TPR bits 7..4 */
    void (*tpr_set)(void *intc, u8 cr8);
    void (*tsc_adjust)(void *intc, s64 adjust);                    /* the vCPU's TSC moved against clock_tsc(): a TSC deadline moves with it; may be NULL */
    void (*init)(void *intc);                                      /* INIT: all but the ID is reset (SDM vol. 3A 11.4.7.3) */
};
struct intc {
    const struct intc_ops *ops;
    void *chip;
};
