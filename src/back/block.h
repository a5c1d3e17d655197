/*
 * The host end of a disk: an image file, a block device, and what else block_open() knows, behind one interface.
 *
 * Requests are asynchronous: block_submit() never waits for the host's storage. What can be answered without waiting (from the host's page cache)
 * may be answered at once, if the caller can do with that; everything else is answered by done(), once, on a thread of the back end, in any order.
 *
 * An image is locked against a second writer (and a writer against readers) for as long as it is open.
 *
 * A host without room for what the guest writes (ENOSPC, EDQUOT): with block_hold_full() the request is kept instead of failing, somebody is told, and
 * block_retry() tries again what was kept.
 */
#pragma once

#include <sys/uio.h>

#include "base/err.h"
#include "base/types.h"

#define BLOCK_SECTOR 512u

struct block;

enum block_op {
    BLOCK_READ,
    BLOCK_WRITE,
    BLOCK_FLUSH,                                                   /* all that was answered before is on stable storage after it */
    BLOCK_DISCARD,                                                 /* a hint: the contents are not needed any more */
    BLOCK_ZEROES,
    BLOCK_NOP,                                                     /* nothing, but done() on another thread */
};

/* The caller's, untouched by it between submit and done(). */
struct block_req {
    enum block_op op;
    u64 offset;                                                    /* bytes */
    struct iovec *iov;                                             /* of reads and writes; its entries are consumed */
    unsigned iovs;
    u64 len;                                                       /* of discard and zeroes; consumed */
    bool unmap;                                                    /* of zeroes: the space may be given back */
    bool at_once;                                                  /* block_submit() may answer by itself */
    bool never_held;                                               /* no room is an error of this one, whatever block_hold_full() says */
    void (*done)(struct block_req *r);                             /* any thread; result is set; it may submit again */
    int result;                                                    /* 0 or a negative errno: -EIO, -ENOSPC, ... */
    struct block_req *next;                                        /* the back end's own, like the rest */
    u8 step;
    bool gated;
};

/* For devices: the bytes that a vCPU's thread copies by requests answered at once, for one notification. More would keep interrupts waiting. */
#define BLOCK_AT_ONCE_MAX (1 * MiB)

/* What a device counts of its requests. */
struct block_counts {
    u64 requests, at_once, notifications;                          /* at once: without another thread */
};

enum block_io { BLOCK_IO_AUTO, BLOCK_IO_URING, BLOCK_IO_THREADS };
/* BACK: the host's page cache; THROUGH: the same, but a write is answered when it is on stable storage; NONE: past it (O_DIRECT). */
enum block_cache { BLOCK_CACHE_BACK, BLOCK_CACHE_THROUGH, BLOCK_CACHE_NONE };

struct block_config {
    const char *path;
    bool readonly;
    const char *overlay;                                           /* NULL: none; "": a temporary one; else its file, which is made if it is not there */
    enum block_io io;                                              /* how files are accessed; AUTO: what the host permits */
    enum block_cache cache;                                        /* of files and block devices that have no overlay */
};

u64 block_req_len(const struct block_req *r);                      /* bytes that are left of it */
/* 0, or a negative errno with err() naming the file, the reason and the remedy: missing, unreadable, empty, a directory, in use, ... */
int block_open(const struct block_config *c, struct block **out);
/*
 * Waits for the requests that are in flight, for a bounded time; held ones fail. False: the host did not answer; what belongs to those requests (and
 * the memory that they read into) must stay for ever, as b itself does. NULL is fine.
 */
bool block_close(struct block *b);

/*
 * Gives up what the host has not answered: requests fail, now and ever after. False: this kind of back end cannot do that, since the host's kernel may
 * still write into the callers' memory.
 */
bool block_abandon(struct block *b);

u64 block_size(const struct block *b);                             /* bytes, rounded up to whole sectors; what lies behind the file's end reads as zeroes */
bool block_readonly(const struct block *b);
const char *block_path(const struct block *b);
const char *block_kind(const struct block *b);                     /* how it is accessed, for people: "file, io_uring" */
const char *block_verb(enum block_op op);                          /* "reading" */
int block_refresh(struct block *b);                                /* asks the host for the size again; 0 or a negative errno with err() */
int block_grow(struct block *b, u64 size);                         /* makes it larger, and refreshes; likewise */

/*
 * Any thread. True: r->result is the answer already, and done() will not be called; false: done() will be. A request that does not lie in the
 * disk, or writes to a read-only one, is answered with an error.
 */
bool block_submit(struct block *b, struct block_req *r);
/* Submits and waits; for threads that may. The result. */
int block_wait(struct block *b, struct block_req *r);

/* full() is called on any thread when a request is kept that was not before; NULL: such requests fail (the beginning). */
void block_hold_full(struct block *b, void (*full)(void *arg), void *arg);
/* held() is called on any thread when block_held() has risen: for the device, which may be waiting for what does not come back by itself. Before any request. */
void block_tell_held(struct block *b, void (*held)(void *arg), void *arg);
unsigned block_held(struct block *b);                              /* requests that are kept */
void block_retry(struct block *b);
void block_fail_held(struct block *b);                             /* they are answered with their error now */
