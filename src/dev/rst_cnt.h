/*
 * Reset control register at port 0xcf9 (Intel PCH data sheets, RST_CNT): FADT.RESET_REG with RESET_VALUE RST_CNT_FULL.
 *
 * It lies inside the PCI configuration address register (dwords at 0xcf8), as an overlay region. A struct rst_cnt begins with its struct device.
 */
#pragma once

#include "dev/hook.h"
#include "io/bus.h"
#include "io/device.h"

#define RST_CNT_PORT 0xcf9
#define RST_CNT_FULL 0x06                                          /* SYS_RST | RST_CPU; written after 0x02, or alone */

struct rst_cnt;

int rst_cnt_new(struct bus *pio, struct machine_hook hook, struct rst_cnt **out);
