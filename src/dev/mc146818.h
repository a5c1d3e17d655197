/*
 * Motorola MC146818A real-time clock and 128 bytes of CMOS RAM, at ports 0x70/0x71.
 *
 * A struct mc146818 begins with its struct device.
 */
#pragma once

#include "base/clock.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

#define RTC_CENTURY 0x32                                           /* where the century is: FADT.CENTURY */

struct mc146818;

/* below_4g, above_4g: bytes of RAM, for the memory size bytes of CMOS. The clock shows the host's UTC. */
int mc146818_new(struct bus *pio, struct clock *clock, struct irq_line irq8, u64 below_4g, u64 above_4g, struct mc146818 **out);
