/*
 * Intel 8259A, two of them cascaded as in the PC/AT: ports 0x20/0x21 and 0xa0/0xa1, and the ELCRs at 0x4d0/0x4d1.
 *
 * A struct i8259 begins with its struct device.
 */
#pragma once

#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

struct i8259;

/* intr: the master's INTR output (to the local APICs' LINT0). */
int i8259_new(struct bus *pio, struct irq_line intr, struct i8259 **out);
/* input n: 0..7 master, 8..15 slave; 2 is the cascade and does nothing */
struct irq_line i8259_irq(struct i8259 *p, int n);

/* as firmware does: bit n: IRQ n is level-triggered */
void i8259_set_elcr(struct i8259 *p, u16 elcr);
/* The real chip is elsewhere from now on (irq.h), or here again (ops NULL). vCPUs stand still; a reset or a load of the
   state follows. */
void i8259_attach(struct i8259 *p, struct irqchip elsewhere);

/* The processor's side. Any thread; not with a local APIC's lock held. */
bool i8259_pending(const struct i8259 *p);                         /* INTR is up: one load */
/* the vector that i8259_ack() would give, or -1 when INTR is down */
int i8259_peek(struct i8259 *p);
/* INTA cycle: takes the request into service; IR7's vector when it has gone (spurious) */
int i8259_ack(struct i8259 *p);
