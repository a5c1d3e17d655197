/*
 * Memory for generated code: mapped twice, so that no page is both writable and executable, where the host allows that. Else (a host that forbids executable
 * memfds) one mapping is both.
 */
#pragma once

#include "base/types.h"

/*
 * name: what /proc/PID/maps shows. bytes: whole pages; they cost memory when they are first written. The code at rw + n runs at rx + n. 0, or -ENOMEM without
 * err(): the caller knows what the code was for.
 */
int codemem_map(const char *name, size_t bytes, u8 **rw, u8 **rx);
void codemem_unmap(u8 *rw, u8 *rx, size_t bytes);
/* What stands in [from, from + bytes), whole pages, is not needed any more: its memory is the host's again, and reads as zeros. */
void codemem_forget(u8 *rw, u8 *rx, size_t from, size_t bytes);
