/*
 * Guest-physical memory: a table of runs (guest-physical address, file, offset, state).
 *
 * Nothing assumes that RAM is one mapping: callers ask for the host address of one page, or for a list of pieces. Host addresses stay
 * valid until the table changes (ram_epoch); software TLBs drop what they hold then. Device models write guest memory only
 * between ram_begin_write() and ram_end_write(), or by ram_write(), so that engines see DMA.
 *
 * While it is *tracked*, each run has a bitmap of the pages that were written: the monitor's own writes are noted here, the guest's by its
 * engine (engine.h: machine_track(), machine_dirty()).
 *
 * Threads: look-ups, accesses and notes from any; changes of the table, and of what is tracked, only while all vCPUs stand still.
 */
#pragma once

#include <stdatomic.h>
#include <sys/uio.h>

#include "base/types.h"

enum ram_state { RAM_ABSENT, RAM_SHARED, RAM_PRIVATE };

struct ram_run {
    u64 gpa, size;                                                 /* bytes, multiples of PAGE_SIZE */
    int fd;                                                        /* memfd, or a file that others share */
    u64 offset;                                                    /* in fd */
    enum ram_state state;
    u8 *hva;                                                       /* where it is mapped now; NULL when absent */
    _Atomic u64 *dirty;                                            /* a bit for each page; NULL when not tracked */
};

struct ram {
    struct ram_run *run;                                           /* sorted by gpa, disjoint */
    unsigned runs;
    u64 epoch;                                                     /* counts changes of the table, and of all that it holds (ram_clear) */
    u64 size;                                                      /* bytes in all runs */
    bool pinned;                                                   /* somebody who cannot be stopped may write to it: never unmapped */
    bool tracked;
    u64 clean_epoch;                                               /* counts when pages became clean: a right to write without a note is over then */
    /* Engines that cache or protect guest memory: called around every device write. Set before the VM runs. */
    void (*on_begin_write)(void *arg, u64 gpa, u64 len);
    void (*on_end_write)(void *arg, u64 gpa, u64 len);
    void *on_write_arg;
};

int ram_init(struct ram *r);
void ram_close(struct ram *r);
/* Adds size bytes of zeroed memory at gpa. -ENOMEM, -EINVAL (overlap, alignment) with err(). */
int ram_add(struct ram *r, u64 gpa, u64 size);
void ram_clear(struct ram *r);                                     /* all zero again, host memory given back; vCPUs stand still */

/* The run that holds gpa, for who maps its file himself; NULL where there is no RAM. Any thread. */
const struct ram_run *ram_run_at(const struct ram *r, u64 gpa);
/* The host address of gpa, valid to the end of its page; NULL where there is no RAM. Any thread. */
u8 *ram_hva(const struct ram *r, u64 gpa);
/* The host address of [gpa, gpa + len) if it is contiguous in the host, else NULL. */
u8 *ram_range(const struct ram *r, u64 gpa, u64 len);
bool ram_has(const struct ram *r, u64 gpa, u64 len);

/* Copies; 0, or -EFAULT (nothing copied) when part of the range is no RAM. No err(): callers decide whose fault it is. */
int ram_read(const struct ram *r, u64 gpa, void *buf, u64 len);
int ram_write(struct ram *r, u64 gpa, const void *buf, u64 len);

/* Appends the host pieces of [gpa, gpa + len) to iov[*n .. max). 0, -EFAULT (no RAM) or -E2BIG. For a device that will write into them,
 * ram_begin_write() stands before the access and ram_end_write() after it. */
int ram_iov(const struct ram *r, u64 gpa, u64 len, struct iovec *iov, unsigned *n, unsigned max);
void ram_begin_write(struct ram *r, u64 gpa, u64 len);
void ram_end_write(struct ram *r, u64 gpa, u64 len);

/* Begins (with all pages clean) or ends tracking. vCPUs and devices stand still. */
int ram_track(struct ram *r, bool on);
/* Notes that a page was, or is about to be, written. Cheap when nothing is tracked. Any thread. */
void ram_mark(struct ram *r, u64 gpa, u64 len);
static inline u64 ram_run_words(const struct ram_run *run)         /* of a bitmap of its pages */
{
    return ((run->size >> PAGE_SHIFT) + 63) / 64;
}
/* Notes the pages of bits in run number i. */
void ram_mark_bits(struct ram *r, unsigned i, const u64 *bits);
/* Adds run number i's noted pages to bits and forgets them. */
void ram_take_dirty(struct ram *r, unsigned i, u64 *bits);
