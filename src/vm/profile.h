/*
 * --profile: what the sampler (cpu/sample.h) has met, with names: where the time went, the guest's code, the monitor's own.
 *
 * On the loop's thread, while the vCPUs are held.
 */
#pragma once

#include "cpu/sample.h"

/* map: the guest's kernel, an ELF file, or a list of its symbols like System.map; or NULL: its symbols are looked for in its memory. 0, or -EIO with err() when map cannot be read. */
int profile_print(struct machine *m, const struct sampler *s, const char *map, FILE *f);
