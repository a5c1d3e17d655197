/*
 * National PC16550D UART (16550A): eight ports from base.
 *
 * A struct ns16550 begins with its struct device.
 */
#pragma once

#include "back/chardev.h"
#include "base/clock.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

struct ns16550;

/* back: the host end, borrowed; NULL: nothing is connected, output vanishes. name: "com1", for region and trace. */
int ns16550_new(struct bus *pio, u16 base, const char *name, struct clock *clock, struct irq_line irq, struct chardev *back, struct ns16550 **out);
