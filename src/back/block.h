/*
 * The host end of a disk: an image file or a block device.
 *
 * Requests are asynchronous: block_submit() never blocks; done() is called once, on a worker thread, in any order. The image is locked against
 * a second writer (and a writer against readers) for as long as it is open.
 */
#pragma once

#include <sys/uio.h>

#include "base/types.h"

#define BLOCK_SECTOR 512u

struct block;

enum block_op { BLOCK_READ, BLOCK_WRITE, BLOCK_FLUSH };

/* The caller's, untouched by it between submit and done(). */
struct block_req {
    enum block_op op;
    u64 offset;                                                    /* bytes */
    struct iovec *iov;                                             /* its entries are consumed */
    unsigned iovs;
    void (*done)(struct block_req *r);                             /* any thread; result is set; it may submit again */
    int result;                                                    /* 0 or a negative errno: -EIO, -ENOSPC, ... */
    struct block_req *next;
};

/* Opens path. 0, or a negative errno with err() naming the file, the reason and the remedy: missing, unreadable, empty, a directory, in use, ... */
int block_open(const char *path, bool readonly, struct block **out);
/* Waits for the requests that are in flight. NULL is fine. */
void block_close(struct block *b);

u64 block_size(const struct block *b);                             /* bytes, rounded up to whole sectors; what lies behind the file's end reads as zeroes */
bool block_readonly(const struct block *b);
const char *block_path(const struct block *b);
int block_refresh(struct block *b);                                /* asks the host for the size again; 0 or a negative errno with err() */

/* Any thread. A request that does not lie in the disk, or writes to a read-only one, is answered with an error as well. */
void block_submit(struct block *b, struct block_req *r);
