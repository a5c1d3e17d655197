/*
 * Local APICs: xAPIC and x2APIC with TSC-deadline timer (Intel SDM vol. 3A chapter 11), and the bus that joins them.
 *
 * One struct lapic per vCPU, one struct lapic_bus per machine: it delivers IPIs, MSIs and I/O APIC messages to the
 * right ones, carries EOI messages to the I/O APIC, and the i8259's INTR to every LINT0. A struct lapic begins with its
 * struct device.
 *
 * Building a machine: lapic_bus_new(); lapic_new() per vCPU; i8259_new(..., lapic_bus_pic_line(lb));
 * lapic_bus_set_pic(); ioapic_new(..., lb); after each reset, as there is no firmware, lapic_virtual_wire() of the
 * bootstrap processor's.
 */
#pragma once

#include "base/clock.h"
#include "dev/i8259.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

#define LAPIC_BASE 0xfee00000u
/* the timer's clock before the divider: CPUID leaf 0x15 ECX must say so, if it is given */
#define LAPIC_BUS_HZ 1000000000u

struct lapic;
struct lapic_bus;

struct lapic_config {
    struct clock *clock;
    unsigned phys_bits;                                            /* MAXPHYADDR: IA32_APIC_BASE's reserved bits */
    bool x2apic, tsc_deadline;                                     /* CPUID announces them */
};

int lapic_bus_new(const struct lapic_config *cfg, struct lapic_bus **out);
void lapic_bus_free(struct lapic_bus *lb);                         /* after all its lapics */
struct irq_line lapic_bus_pic_line(struct lapic_bus *lb);          /* for i8259_new() */
void lapic_bus_set_pic(struct lapic_bus *lb, struct i8259 *pic);   /* who is acknowledged for ExtINT; NULL: nobody */
void lapic_bus_attach(struct lapic_bus *lb, struct irqchip elsewhere); /* of all its local APICs: as i8259_attach() */
struct msi_sink lapic_bus_msi(struct lapic_bus *lb);

/* cpu_bus: the vCPU's own bus, on which the register page is mapped. id: the APIC ID, below 255 for xAPIC use. bsp: bit
   8 of IA32_APIC_BASE. */
int lapic_new(struct lapic_bus *lb, struct bus *cpu_bus, u32 id, bool bsp, struct cpu_port cpu, struct lapic **out);
struct intc lapic_intc(struct lapic *l);                           /* the vCPU's view: registers, pending vectors */
/* the vCPU wrote IA32_TSC_ADJUST or its TSC: a deadline moves with it */
void lapic_set_tsc_adjust(struct lapic *l, s64 adjust);
/* IA32_APIC_BASE bit 11, which CPUID.1:EDX.APIC follows */
bool lapic_enabled(const struct lapic *l);

/*
 * What firmware leaves behind in virtual-wire mode (MP specification 1.4, 3.6.2.2): enabled, LINT0 = ExtINT, LINT1 =
 * NMI. For the bootstrap processor after reset, so that kernels that use the i8259 alone get their interrupts.
 */
void lapic_virtual_wire(struct lapic *l);

/* A message on the bus, from an I/O APIC, an MSI or an IPI. */
enum apic_mode { APIC_FIXED, APIC_LOWEST, APIC_SMI, APIC_RESERVED, APIC_NMI, APIC_INIT, APIC_SIPI, APIC_EXTINT };
struct apic_msg {
    /* physical: APIC ID; logical: MDA. 0xff (0xffffffff from x2APIC) is all */
    u32 dest;
    u8 vector;
    u8 mode;                                                       /* enum apic_mode */
    bool logical, level;                                           /* level: trigger mode, for the TMR */
    bool wide;                                                     /* dest has 32 bits (ICR in x2APIC mode) */
};
void lapic_bus_send(struct lapic_bus *lb, const struct apic_msg *m); /* any thread; no local APIC's lock held */

/* Who hears of EOIs of level-triggered interrupts (the I/O APIC). Called with no local APIC's lock held. */
struct apic_eoi_sink {
    void (*eoi)(void *chip, u8 vector);
    void *chip;
};
void lapic_bus_set_eoi_sink(struct lapic_bus *lb, struct apic_eoi_sink sink);
