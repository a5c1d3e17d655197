/*
 * Firmware configuration device (QEMU's docs/specs/fw_cfg): how the monitor tells firmware and small kernels what the
 * machine is, and hands over files. A struct fw_cfg begins with its struct device.
 */
#pragma once

#include "io/bus.h"
#include "io/device.h"
#include "mem/ram.h"

#define FW_CFG_PORT 0x510                                          /* 12 ports: selector, data, and DMA from 0x514 on */
#define FW_CFG_PORTS 12

enum fw_cfg_key {
    FW_CFG_RAM_SIZE = 0x03, FW_CFG_NOGRAPHIC = 0x04, FW_CFG_NB_CPUS = 0x05, FW_CFG_KERNEL_SIZE = 0x08, FW_CFG_INITRD_SIZE = 0x0b,
    FW_CFG_MAX_CPUS = 0x0f, FW_CFG_KERNEL_DATA = 0x11, FW_CFG_INITRD_DATA = 0x12, FW_CFG_CMDLINE_SIZE = 0x14,
    FW_CFG_CMDLINE_DATA = 0x15, FW_CFG_SETUP_SIZE = 0x17, FW_CFG_SETUP_DATA = 0x18,
};

struct fw_cfg;

int fw_cfg_new(struct bus *pio, struct ram *ram, struct fw_cfg **out);

/* While the board is built. -ENOMEM, -ENOSPC with err(). Bytes are copied; integers are little endian. */
int fw_cfg_bytes(struct fw_cfg *f, enum fw_cfg_key key, const void *p, u32 len);
int fw_cfg_int(struct fw_cfg *f, enum fw_cfg_key key, u64 value, unsigned len);
int fw_cfg_file(struct fw_cfg *f, const char *name, const void *p, u32 len); /* name: up to 55 characters */
/*
 * Bytes [offset, offset + len) of a file of the host, read when the guest reads them; fd is borrowed no longer than
 * the call.
 */
int fw_cfg_host_file(struct fw_cfg *f, enum fw_cfg_key key, int fd, u64 offset, u32 len);
