/*
 * The physical memory map that a guest is told at boot: the PC BIOS call INT 15h, AX=E820h (ACPI specification 6.4,
 * chapter 15), in the form that both Linux's boot_params and PVH's start info want it. A plain value.
 */
#pragma once

#include "base/types.h"
#include "mem/ram.h"

enum e820_type { E820_RAM = 1, E820_RESERVED = 2, E820_ACPI = 3, E820_NVS = 4 };

struct e820_entry {
    u64 base, size;
    u32 type;
};
#define E820_MAX 128                                               /* boot_params' e820_table holds as many */
struct e820 {
    struct e820_entry entry[E820_MAX];                             /* sorted, disjoint, no empty ones */
    unsigned n;
};

/* The map of a machine: its RAM, less what is reserved (which wins, and is listed also where there is no RAM: ECAM,
 * tables). 0, or -E2BIG with err(). */
int e820_build(struct e820 *map, const struct ram *ram, const struct e820_entry *reserved, unsigned n);

/* The highest or lowest place for size bytes, aligned (a power of two), in usable memory of [floor, limit); floor is
 * above 0. 0 when there is none. */
u64 e820_place(const struct e820 *map, u64 floor, u64 limit, u64 size, u64 align, bool highest);
/* Is [base, base + size) all usable RAM? */
bool e820_usable(const struct e820 *map, u64 base, u64 size);
