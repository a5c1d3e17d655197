/*
 * Interrupt wiring: lines, messages, and the two sides of a local APIC.
 *
 * Lock order: a device's lock, then i8259/ioapic, then lapic, then the clock's. Lines may be set with the device's lock
 * held; chips never call back into devices.
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

/* What a local APIC does to its vCPU. Any thread, also with chip locks held: the receiver only sets a bit and wakes the
   vCPU. */
enum cpu_signal { CPU_INTR, CPU_NMI, CPU_SMI, CPU_INIT, CPU_SIPI };
struct cpu_port {
    void (*signal)(void *vcpu, enum cpu_signal what, u8 vector);   /* vector: of SIPI */
    void *vcpu;
    /*
     * PV EOI, on the vCPU's thread; both NULL: there is none. offer: the guest may end the interrupt that it is given
     * now in a word of its own memory; false if it has no such word. done: the offer ends; true if the guest took it.
     */
    bool (*eoi_offer)(void *vcpu);
    bool (*eoi_done)(void *vcpu);
};

/* What a vCPU asks of its local APIC (and, through it, of the i8259 for ExtINT). On the vCPU's thread. */
struct intc_ops {
    /* the vector that ack() would give now, or -1; IF is the caller's affair */
    int (*peek)(void *intc);
    /* takes it into service; -1 when there is none any more */
    int (*ack)(void *intc);
    /* IA32_APIC_BASE, IA32_TSC_DEADLINE, 0x800..0x8ff; 0, or -1 for #GP */
    int (*msr_read)(void *intc, u32 msr, u64 *val);
    int (*msr_write)(void *intc, u32 msr, u64 val);
    u8 (*tpr_get)(void *intc);                                     /* CR8: TPR bits 7..4 */
    void (*tpr_set)(void *intc, u8 cr8);
    /* the vCPU's TSC moved against clock_tsc(): a TSC deadline moves with it; may be NULL */
    void (*tsc_adjust)(void *intc, s64 adjust);
    /* before the vCPU stands still: what the guest has done in memory is carried out (PV EOI); may be NULL */
    void (*settle)(void *intc);
    /* a message for this local APIC alone, from any thread: whether it was taken; may be NULL */
    bool (*accept)(void *intc, u8 mode, u8 vector);
    /* INIT: all but the ID is reset (SDM vol. 3A 11.4.7.3) */
    void (*init)(void *intc);
};
struct intc {
    const struct intc_ops *ops;
    void *chip;
};

/*
 * Interrupt chips that live elsewhere: an engine may bring its own (KVM's are the kernel's). Our chip objects then only
 * hold the wires' levels, and their registers while nothing runs: each takes them from the engine before it is saved,
 * and gives them to the engine after a reset or a load.
 */
#define IRQCHIP_IOAPIC_PINS 24

struct lapic_regs {
    u64 base, icr, tsc_deadline;                                   /* tsc_deadline: the guest's TSC, 0 when not armed */
    s64 tsc_adjust;                                                /* get only: of the vCPU's TSC against clock_tsc() */
    u32 tpr, ldr, dfr, svr, esr;
    /* timer, thermal, performance, LINT0, LINT1, error */
    u32 lvt[6];
    u32 irr[8], isr[8], tmr[8];
    u32 initial, current, divide;                                  /* current: 0 when the timer does not count */
};
struct ioapic_regs {
    u32 select, id;                                                /* id: bits 27..24 */
    u64 rte[IRQCHIP_IOAPIC_PINS];
    u32 lines;
};
struct i8259_regs {
    struct i8259_chip_regs {
        u8 lines, irr, isr, imr, elcr, base;
        u8 lowest;                                                 /* the level of lowest priority */
        u8 step;                                                   /* 0: ready; 1..3: ICW2..4 is awaited */
        bool want_icw4, aeoi, sfnm, rotate_aeoi, special_mask, read_isr, poll;
    } chip[2];                                                     /* master, slave */
};
struct i8254_regs {
    struct i8254_counter_regs {
        u32 count;                                                 /* as written: 1..65536 */
        u64 elapsed_ns;                                            /* since it was loaded */
        u8 mode, rw;                                               /* rw: 1 low byte, 2 high byte, 3 both */
        /* loaded: a count was written since the control word */
        bool bcd, gate, loaded;
        bool write_high, read_high, status_latched;
        /* latch_bytes: of the latched count still to be read */
        u8 write_low, status, latch_bytes;
        u16 latch;
    } counter[3];
    bool speaker;                                                  /* port 0x61 bit 1 */
};

/* get: 0, or a negative errno with err(). Both ways only while all vCPUs stand still; the wires and messages from any
   thread. */
struct irqchip_ops {
    void (*pic_line)(void *arg, int n, int level);                 /* i8259 input n */
    void (*ioapic_line)(void *arg, int n, int level);
    void (*msi)(void *arg, u64 addr, u32 data);
    int (*lapic_get)(void *arg, u32 id, struct lapic_regs *r);
    int (*lapic_set)(void *arg, u32 id, const struct lapic_regs *r);
    int (*ioapic_get)(void *arg, struct ioapic_regs *r);
    int (*ioapic_set)(void *arg, const struct ioapic_regs *r);
    int (*i8259_get)(void *arg, struct i8259_regs *r);
    int (*i8259_set)(void *arg, const struct i8259_regs *r);
    int (*i8254_get)(void *arg, struct i8254_regs *r);
    int (*i8254_set)(void *arg, const struct i8254_regs *r);
};
struct irqchip {
    const struct irqchip_ops *ops;                                 /* NULL: the chips are ours */
    void *arg;
};
