/*
 * ELF files as kernels: what PVH and multiboot share. Nothing in the file is trusted: each number is checked before it
 * is an address, a length or a count.
 */
#pragma once

#include <elf.h>

#include "vm/boot.h"

struct boot_elf {
    struct boot_load *l;
    bool is64;
    u64 phoff, shoff;
    unsigned phnum, shnum, shentsize, shstrndx;
    u64 entry;                                                     /* the header's: a virtual address */
    /* boot_elf_range() */
    u64 start, end;                                                /* of all segments, by their physical addresses */
    u64 entry_gpa;                                                 /* the entry in its segment */
    /* added to every physical address (modulo 2^64): relocation */
    u64 shift;
};

/* reads the header; BOOT_OTHER when this is no ELF file */
int boot_elf_open(struct boot_load *l, struct boot_elf *e);
int boot_elf_phdr(const struct boot_elf *e, unsigned i, Elf64_Phdr *p); /* i < phnum; also of 32-bit files */
int boot_elf_range(struct boot_elf *e);
int boot_elf_segments(struct boot_elf *e);                         /* loads them */
/* -EINVAL with err() that names the file and the remedy */
int boot_elf_bad(const struct boot_elf *e, const char *what);

/* Is [gpa, gpa + len) memory that a kernel may have? 0, or an error for the user. */
int boot_room(const struct boot_load *l, u64 gpa, u64 len);
int boot_zero(struct boot_load *l, u64 gpa, u64 len);
