/*
 * System control port A of the PS/2, port 0x92: fast A20 gate and fast reset. A struct port92 begins with its struct device.
 */
#pragma once

#include "dev/hook.h"
#include "io/bus.h"
#include "io/device.h"

struct port92;

int port92_new(struct bus *pio, struct machine_hook hook, struct port92 **out);
