/*
 * Legacy video memory (0xa0000..0xbffff) that reads back what was written, and VGA registers (0x3b0..0x3df) readable enough that nobody who
 * probes for a display hangs. There is no picture. A struct vga_mem begins with its struct device.
 */
#pragma once

#include "base/clock.h"
#include "io/bus.h"
#include "io/device.h"

struct vga_mem;

int vga_mem_new(struct bus *pio, struct bus *mmio, struct clock *clock, struct vga_mem **out);
