/*
 * pvpanic (QEMU docs/specs/pvpanic): one port on which the guest reports its own panic. ACPI announces it as QEMU0001 with this port in _CRS.
 * A struct pvpanic begins with its struct device.
 */
#pragma once

#include "dev/hook.h"
#include "io/bus.h"
#include "io/device.h"

#define PVPANIC_PORT 0x505

struct pvpanic;

int pvpanic_new(struct bus *pio, u16 port, struct machine_hook hook, struct pvpanic **out);
