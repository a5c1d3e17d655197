/*
 * What the firmware configuration device tells about this machine: processors, memory map, kernel, initrd, command
 * line.
 */
#pragma once

#include "dev/fw_cfg.h"
#include "vm/e820.h"
#include "vm/vm.h"

/*
 * map: of the machine; ranges below 1 MiB and firmware itself are left to the firmware. 0, or a negative errno with
 * err().
 */
int fw_items_add(struct fw_cfg *f, const struct vm_config *c, const struct e820 *map);
