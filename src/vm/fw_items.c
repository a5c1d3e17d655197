/*
 * The items of the firmware configuration device (fw_items.h; QEMU's docs/specs/fw_cfg). A kernel, which the firmware is
 * to start, is cut into setup and payload as Linux's boot protocol has them; other files are all payload. Kernel and
 * initrd are told of only if there is firmware: else they are in memory already.
 */
#include "vm/fw_items.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "vm/boot.h"

#define SETUP_SECTS 0x1f1
#define HEADER      0x202
#define SECTOR      512u

static int add_map(struct fw_cfg *f, const struct e820 *map)
{
    struct { u64 base, size; u32 type; } __attribute__((packed)) entry[E820_MAX];
    unsigned n = 0;

    for (unsigned i = 0; i < map->n; i++) {
        const struct e820_entry *e = &map->entry[i];
        u64 end = e->base + e->size;

        if (end <= MiB)
            continue;
        /* What lies below 1 MiB is the firmware's: RAM from 0 on, as far as it is concerned. */
        u64 base = e->type == E820_RAM && e->base <= MiB ? 0 : e->base;
        entry[n].base = htole64(base);
        entry[n].size = htole64(end - base);
        entry[n++].type = htole32(e->type);
    }
    return fw_cfg_file(f, "etc/e820", entry, (u32)(n * sizeof *entry));
}

static int add_file(struct fw_cfg *f, const char *what, const char *path, enum fw_cfg_key size_key, enum fw_cfg_key data_key,
                    u64 skip)
{
    struct boot_file file;
    int r = boot_file_open(&file, what, path);

    if (r < 0)
        return r;
    if (file.size > UINT32_MAX || skip > file.size)
        r = err(-EFBIG, "%s %s: firmware takes files of up to 4 GiB", what, path);
    if (r == 0)
        r = fw_cfg_int(f, size_key, file.size - skip, 4);
    if (r == 0)
        r = fw_cfg_host_file(f, data_key, file.fd, skip, (u32)(file.size - skip));
    boot_file_close(&file);
    return r;
}

/* How much of the kernel is real-mode setup code; 0 when it is no bzImage. */
static int setup_size(const char *path, u64 *size)
{
    struct boot_file file;
    u8 sects = 0;
    char magic[4] = "";
    int r = boot_file_open(&file, "kernel", path);

    *size = 0;
    if (r == 0 && file.size >= HEADER + sizeof magic)
        r = boot_file_read(&file, HEADER, magic, sizeof magic);
    if (r == 0 && !memcmp(magic, "HdrS", sizeof magic)) {
        r = boot_file_read(&file, SETUP_SECTS, &sects, 1);
        *size = MIN(((sects ? sects : 4u) + 1) * SECTOR, file.size);
    }
    if (file.fd >= 0)
        boot_file_close(&file);
    return r;
}

static int add_kernel(struct fw_cfg *f, const char *path)
{
    struct boot_file file;
    u64 setup;
    int r = setup_size(path, &setup);

    if (r == 0)
        r = fw_cfg_int(f, FW_CFG_SETUP_SIZE, setup, 4);
    if (r == 0)
        r = boot_file_open(&file, "kernel", path);
    if (r < 0)
        return r;
    r = fw_cfg_host_file(f, FW_CFG_SETUP_DATA, file.fd, 0, (u32)setup);
    boot_file_close(&file);
    return r < 0 ? r : add_file(f, "kernel", path, FW_CFG_KERNEL_SIZE, FW_CFG_KERNEL_DATA, setup);
}

int fw_items_add(struct fw_cfg *f, const struct vm_config *c, const struct e820 *map)
{
    u32 cmdline_len = c->cmdline ? (u32)strlen(c->cmdline) + 1 : 0;
    int r = fw_cfg_int(f, FW_CFG_RAM_SIZE, c->memory_bytes, 8);

    if (r == 0)
        r = fw_cfg_int(f, FW_CFG_NOGRAPHIC, 1, 2);
    if (r == 0)
        r = fw_cfg_int(f, FW_CFG_NB_CPUS, c->vcpus, 2);
    if (r == 0)
        r = fw_cfg_int(f, FW_CFG_MAX_CPUS, c->vcpus, 2);
    if (r == 0)
        r = add_map(f, map);
    if (r == 0 && c->firmware)                                     /* SeaBIOS: there is no screen, the first serial line is it */
        r = fw_cfg_file(f, "etc/sercon-port", (u8[]){ 0xf8, 0x03 }, 2);
    if (r == 0 && c->firmware && c->kernel)
        r = add_kernel(f, c->kernel);
    if (r == 0 && c->firmware && c->initrd)
        r = add_file(f, "initrd", c->initrd, FW_CFG_INITRD_SIZE, FW_CFG_INITRD_DATA, 0);
    if (r == 0 && cmdline_len)
        r = fw_cfg_int(f, FW_CFG_CMDLINE_SIZE, cmdline_len, 4);
    return r < 0 || !cmdline_len ? r : fw_cfg_bytes(f, FW_CFG_CMDLINE_DATA, c->cmdline, cmdline_len);
}
