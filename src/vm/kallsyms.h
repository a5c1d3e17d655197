/*
 * The symbols of a Linux guest's kernel, found in its own memory: the tables behind /proc/kallsyms (Linux scripts/kallsyms.c writes them, kernel/kallsyms.c reads
 * them). They hold final addresses, so a kernel at a random place needs no more than one at its own. Needs CONFIG_KALLSYMS_BASE_RELATIVE, which x86-64 has.
 *
 * The guest's memory is not trusted: what does not fit together gives no symbols.
 */
#pragma once

#include "base/symbols.h"

/* buf: a copy of the guest's linear memory from base on, 8-aligned, pages that are not there zeroed. How many functions were added to s; 0: there is no table. */
long kallsyms_find(struct symbols *s, const u8 *buf, size_t len);
