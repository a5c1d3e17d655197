/*
 * Intel 82093AA I/O APIC with 24 inputs, as version 0x20 (with the EOI register of ICH and later).
 *
 * A struct ioapic begins with its struct device.
 */
#pragma once

#include "dev/lapic.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

#define IOAPIC_PINS 24
#define IOAPIC_BASE 0xfec00000u

struct ioapic;

/* Registers itself with the local APICs as the receiver of EOI messages. id: after reset; guests may write it. */
int ioapic_new(struct bus *mmio, u64 base, u8 id, struct lapic_bus *lapics, struct ioapic **out);
void ioapic_attach(struct ioapic *io, struct irqchip elsewhere);   /* as i8259_attach() */
struct irq_line ioapic_irq(struct ioapic *io, int n);              /* pin n: 0..23 */
