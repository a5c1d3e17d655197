/*
 * Debug console at port 0xe9 (Bochs, QEMU's "isa-debugcon"): a byte written is a byte of output. For kernels that
 * have no driver for a serial line yet.
 *
 * A struct debugcon begins with its struct device.
 */
#pragma once

#include "back/chardev.h"
#include "base/err.h"
#include "io/bus.h"
#include "io/device.h"

#define DEBUGCON_PORT 0xe9

struct debugcon;

/* out is shared with its real front end: only written to, never connected; NULL: output vanishes. */
int debugcon_new(struct bus *pio, u16 port, struct chardev *out, const struct log *log, struct debugcon **con);
