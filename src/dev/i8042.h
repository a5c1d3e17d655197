/*
 * Intel 8042 keyboard controller at ports 0x60 and 0x64, with a keyboard and a PS/2 mouse that answer commands and are never touched.
 *
 * A struct i8042 begins with its struct device.
 */
#pragma once

#include "dev/hook.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

struct i8042;

int i8042_new(struct bus *pio, struct irq_line irq1, struct irq_line irq12, struct machine_hook hook, struct i8042 **out);
