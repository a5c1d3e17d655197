/*
 * Boot images: whatever a kernel file and an initrd hold, loading gives a guest or an error, and touches nothing else.
 *
 * The first four bytes choose: memory size, where the initrd begins, and whether the rest gets valid magic
 * numbers (so that the fuzzer need not find them).
 */
#include <string.h>

#include "base/err.h"
#include "vm/boot.h"

static const struct e820_entry reserved[] = { { 0x9f000, 0x1000, E820_RESERVED }, { 0xe0000, 0x20000, E820_RESERVED } };

int LLVMFuzzerTestOneInput(const u8 *data, size_t size);
int LLVMFuzzerTestOneInput(const u8 *data, size_t size)
{
    static const u8 sizes[] = { 4, 5, 16, 64 };
    struct ram ram;
    struct e820 map;
    struct x86 *bsp;
    u8 *file;

    if (size < 4)
        return 0;
    u64 kernel_size = size - 4, memory = sizes[data[0] % sizeof sizes] * MiB;
    u64 initrd_size = data[1] ? kernel_size * data[1] / 512 : 0;
    kernel_size -= initrd_size;
    file = malloc(kernel_size + 1);
    bsp = calloc(1, sizeof *bsp);
    if (!file || !bsp)
        abort();
    memcpy(file, data + 4, kernel_size);
    if (data[2] & 1 && kernel_size > 0x210) {
        memcpy(file + 0x1fe, "\x55\xaa", 2);
        memcpy(file + 0x202, "HdrS", 4);
    }
    if (data[2] & 2 && kernel_size > 0x240) {
        memcpy(file + 0x206, "\x0f\x02", 2);
        file[0x211] |= 1;
    }
    if (data[2] & 4 && kernel_size > 20) {
        memcpy(file, data[2] & 8 ? "\x7f" "ELF\x01\x01" : "\x7f" "ELF\x02\x01", 6);
        memcpy(file + 16, data[2] & 8 ? "\x02\0\x03" : "\x02\0\x3e", 4);
    }
    u8 how = data[2] >> 4;
    if (how & 1 && kernel_size > 64) {                             /* multiboot 1, with addresses or without */
        u32 h[3] = { 0x1badb002, how & 2 ? 0x10003 : 3 };
        h[2] = -(h[0] + h[1]);
        memcpy(file + (kernel_size > 1024 ? 512 : 32), h, sizeof h);
    }
    if (how & 4 && kernel_size > 128) {
        u32 h[4] = { 0xe85250d6, 0, how & 2 ? (u32)kernel_size - 64 : 64 };
        h[3] = -(h[0] + h[2]);
        memcpy(file + 64, h, sizeof h);
    }
    if (how & 8 && kernel_size > 0x200)
        memcpy(file + 0x1fe, "\x55\xaa", 2);
    if (ram_init(&ram) || ram_add(&ram, 0, 0xa0000) || ram_add(&ram, 0xc0000, memory - 0xc0000) || e820_build(&map, &ram, reserved, ARRAY_SIZE(reserved)))
        abort();
    struct boot_config config = {
        .kernel = "kernel", .cmdline = "quiet", .map = &map, .rsdp_gpa = 0xe0000, .phys_bits = data[3]
    };
    struct boot_load l = {
        .ram = &ram, .config = &config, .bsp = bsp, .kernel = { "kernel", "kernel", -1, file, kernel_size }
    };
    if (initrd_size)
        l.initrd = (struct boot_file){ "initrd", "initrd", -1, data + 4 + kernel_size, initrd_size };
    int rc = boot_place(&l);
    if (rc > 0 || (rc < 0 && !*err_last()))
        abort();                                                   /* an error that says nothing */
    ram_close(&ram);
    free(bsp);
    free(file);
    return 0;
}
