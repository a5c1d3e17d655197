/*
 * The POST code port 0x80 with its companion page registers 0x81..0x8f, and 0xed: written for the delay; reads give the last value.
 * A struct port80 begins with its struct device.
 */
#pragma once

#include "io/bus.h"
#include "io/device.h"

struct port80;

int port80_new(struct bus *pio, struct port80 **out);
