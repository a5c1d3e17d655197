/*
 * What an interpreted block stores, so that it can be taken back and compared with what another engine stores (cpu/bt/check.c).
 *
 * While icpu.log is set no access of data takes the short way (tlb_views() selects the view that never matches), so all of them come through access.c, which
 * notes here each store to RAM before it is made. An access of a device sets `stop` and faults instead: whoever has set the log takes everything back
 * and does it again without one. Accessed and dirty bits of page tables are not noted. Belongs to the vCPU's thread.
 */
#pragma once

#include "base/types.h"

#define STORE_LOG_ENTRIES 8192u
#define STORE_LOG_BYTES (128 * KiB)
#define STORE_LOG_PAGES 96u

struct stored {
    u8 *host;
    u32 n, at;                                                     /* bytes; where their old contents are in old[] */
};

struct store_log {
    bool stop;                                                     /* a device was accessed, or the log is full */
    u32 entries, bytes, pages;
    u8 *page[STORE_LOG_PAGES];                                     /* host addresses of pages that were stored to */
    struct stored entry[STORE_LOG_ENTRIES];
    u8 old[STORE_LOG_BYTES];
};

void store_log_begin(struct store_log *l);
/* False: there is no room; stop is set. Within one page. */
bool store_log_note(struct store_log *l, u8 *host, unsigned n);
void store_log_undo(struct store_log *l);                          /* memory is as before the first store */
