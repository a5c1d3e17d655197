/*
 * Debug exit port (QEMU's "isa-debug-exit"): a test program inside the guest ends the machine with a status of its own.
 *
 * A struct debug_exit begins with its struct device.
 */
#pragma once

#include "dev/hook.h"
#include "io/bus.h"
#include "io/device.h"

#define DEBUG_EXIT_PORT 0xf4

struct debug_exit;

int debug_exit_new(struct bus *pio, u16 port, struct machine_hook hook, struct debug_exit **out);
