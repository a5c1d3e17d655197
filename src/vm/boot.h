/*
 * Boot: puts a kernel into guest memory and the bootstrap processor at its entry, as a boot loader would have left
 * them.
 *
 *   Linux bzImage           64-bit boot protocol, else 32-bit (Documentation/arch/x86/boot.rst)           boot_linux.c
 *   ELF and others          multiboot 1 and 2, by the header in the file's first 8 or 32 KiB             boot_multiboot.c
 *   ELF, 64 or 32 bit       PVH: XEN_ELFNOTE_PHYS32_ENTRY (Xen's docs/misc/pvh.pandoc)                    boot_elf.c
 *   boot sector             real mode at 0x7c00, without a BIOS                                           boot_raw.c
 *   firmware image          at the reset vector; then the kernel, if any, is the firmware's affair         boot_raw.c
 *
 * Files are untrusted: whatever they hold, the outcome is a booted guest (that may crash) or an error for the user;
 * nothing outside guest memory changes. vCPUs stand still meanwhile. A reset of the machine loads again.
 *
 * Low memory as the kernel finds it (all usable RAM by the e820 map, the kernel takes it back when it has its own):
 *   0x00001000  GDT                                  BOOT_GDT
 *   0x00002000  PML4, PDPT, four page directories: the lowest 4 GiB identity-mapped by 2 MiB pages
 *   0x00008000  boot_params, hvm_start_info, or multiboot's information, which may go up to BOOT_LOW_END       BOOT_INFO
 *   0x00009000  PVH: module list, memory map
 *   0x00010000  command line                         BOOT_CMDLINE, up to BOOT_CMDLINE_MAX bytes with its NUL
 *   0x00020000  stack top (the entry code of a kernel needs none; a debugger is glad of it)
 */
#pragma once

#include "cpu/x86.h"
#include "mem/ram.h"
#include "vm/e820.h"

#define BOOT_GDT         0x1000u
#define BOOT_PAGE_TABLES 0x2000u
#define BOOT_INFO        0x8000u
#define BOOT_INFO2       0x9000u
#define BOOT_CMDLINE     0x10000u
#define BOOT_CMDLINE_MAX 0x10000u
#define BOOT_STACK       0x20000u
#define BOOT_LOW_END     0x20000u
#define BOOT_FIRMWARE_STEP (64 * KiB)
#define BOOT_FIRMWARE_MAX  (16 * MiB)    /* below 4 GiB, above the interrupt controllers */
#define BOOT_RAM_TOP     0xc0000000u /* kernels and initrds stay below it: 32-bit entry code reaches all of it */

struct boot_config {
    /* NULL: none; else it runs, and nothing else is loaded */
    const char *firmware;
    const char *kernel;
    const char *initrd;                                            /* NULL: none */
    const char *cmdline;                                           /* NULL: "" */
    const struct e820 *map;
    u64 rsdp_gpa;                                                  /* ACPI tables; 0: none */
    u8 phys_bits;                /* MAXPHYADDR, for the MTRR that makes the hole below 4 GiB uncacheable; 0: leave it */
};

/* Loads, and sets *bsp to the state at the entry: from reset plus what the protocol asks. 0, or a negative errno with
 * err(). */
int boot_load(struct ram *ram, const struct boot_config *config, struct x86 *bsp);

/* Without firmware, what firmware leaves in the memory type registers of every processor: write-back by default, the video
 * memory and the PCI hole below 4 GiB uncacheable. Linux gives up on PAT without it, and complains where processors
 * differ. boot_load() has done it for *bsp. */
void boot_mtrrs(const struct boot_config *config, struct x86 *x);

/* How large a firmware image is, for which there must be RAM below 4 GiB. -EINVAL with err() for what cannot be one. */
int boot_firmware_size(const char *path, u64 *size);

/* ---- between the files of this module, and for tests ---- */

/* A file to be loaded: open, regular, of known size; or bytes in memory (fd -1). */
struct boot_file {
    const char *path;                                              /* for messages */
    const char *what;                                              /* "kernel", "initrd" */
    int fd;
    const u8 *bytes;
    u64 size;
};

int boot_file_open(struct boot_file *f, const char *what, const char *path);
void boot_file_close(struct boot_file *f);
/* Exactly len bytes from offset; -EIO with err() when the file has no more. */
int boot_file_read(const struct boot_file *f, u64 offset, void *buf, u64 len);
/* The same into guest memory; -ENOMEM with err() when that is no RAM. */
int boot_file_copy(const struct boot_file *f, u64 offset, struct ram *ram, u64 gpa, u64 len);

struct boot_load {
    struct ram *ram;
    const struct boot_config *config;
    struct boot_file kernel, initrd, firmware;                     /* path NULL: none */
    struct x86 *bsp;
};

enum { BOOT_OTHER = 1 };                                           /* not this kind of file: another way may take it */

/* boot_load() with files that are open already. */
int boot_place(struct boot_load *l);
int boot_linux(struct boot_load *l);                               /* BOOT_OTHER when the file is no bzImage */
/* BOOT_OTHER when the file has no multiboot header */
int boot_multiboot(struct boot_load *l);
int boot_elf(struct boot_load *l);                                 /* BOOT_OTHER when it is no ELF file */
/* BOOT_OTHER when the file does not begin with a boot sector */
int boot_sector(struct boot_load *l);
int boot_firmware(struct boot_load *l);

/* Puts the initrd as high as may be below limit (exclusive) and above floor; 0 where there is none to load. */
int boot_initrd(struct boot_load *l, u64 floor, u64 limit, u64 *gpa);
int boot_write(struct boot_load *l, u64 gpa, const void *p, u64 len);
int boot_cmdline(struct boot_load *l, u64 max);     /* to BOOT_CMDLINE; max: bytes with the NUL that the kernel takes */
int boot_enter32(struct boot_load *l, u64 rip);                   /* flat 32-bit protected mode, paging off */
int boot_enter64(struct boot_load *l, u64 rip);                    /* long mode on the identity map */
