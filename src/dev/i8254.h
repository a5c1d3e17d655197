/*
 * Intel 8254 programmable interval timer at ports 0x40..0x43, with the PC/AT's port 0x61 (gate of counter 2, speaker,
 * refresh bit).
 *
 * A struct i8254 begins with its struct device.
 */
#pragma once

#include "base/clock.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

#define I8254_HZ 1193182u                                          /* 14.31818 MHz / 12 */

struct i8254;

void i8254_attach(struct i8254 *p, struct irqchip elsewhere);      /* as i8259_attach() */
int i8254_new(struct bus *pio, struct clock *clock, struct irq_line irq0, struct i8254 **out);
