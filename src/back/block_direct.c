/*
 * Files and block devices past the host's page cache (O_DIRECT; cache=none), for block_file.c: what requests must look like for it, and what is done with those
 * that do not.
 *
 * The kernel wants offsets, lengths and buffers at multiples of what statx(2) says (a sector, or a block of the file system). The guest sees sectors of 512 bytes
 * and may put buffers anywhere. So requests that do not fit go through a buffer of ours, on a worker thread: reads read more than was asked for; writes whose ends lie
 * within a block read that block before. The latter must be alone: whoever writes to another part of the same block at that time would lose it. (A buffered
 * descriptor for them would be shorter, but then the page cache and the disk take turns at being right.)
 *
 * The gate: requests that change something enter it shared, those that rewrite blocks alone. Only worker threads wait at it; while somebody wants to be alone,
 * block_file.c sends all that changes something to workers.
 *
 * Locking: block_direct.turn is held by who is alone, and by others while they enter; it is taken by worker threads only, before block_direct.lock, a leaf.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "back/block_host.h"

#define PIECE (1 * MiB)
#define ALIGN_MAX (64 * KiB)
#define ALIGN_UNKNOWN 4096u                                        /* where the kernel does not say it */

int block_direct_init(struct block_direct *d, int fd, const char *path)
{
    unsigned align = ALIGN_UNKNOWN, mem_align = ALIGN_UNKNOWN;
    struct statx st = { 0 };
    int sector;

    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) == 0 && (st.stx_mask & STATX_DIOALIGN)) {
        align = st.stx_dio_offset_align;
        mem_align = st.stx_dio_mem_align;
    } else if (ioctl(fd, BLKSSZGET, &sector) == 0 && sector > 0) {
        align = mem_align = (unsigned)sector;
    }
    if (!align || !mem_align || align > ALIGN_MAX || mem_align > ALIGN_MAX || (align & (align - 1)) || (mem_align & (mem_align - 1)))
        return err(-EINVAL, "disk %s: its file system has no direct access (O_DIRECT); leave cache=none out", path);
    d->align = MAX(align, BLOCK_SECTOR);
    d->mem_align = mem_align;
    pthread_mutex_init(&d->turn, NULL);
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->changed, NULL);
    return 0;
}

void block_direct_destroy(struct block_direct *d)
{
    if (!d->align)
        return;
    pthread_cond_destroy(&d->changed);
    pthread_mutex_destroy(&d->lock);
    pthread_mutex_destroy(&d->turn);
}

/* Of what is asked for on the disk, whatever the buffers are like. */
static bool whole_blocks(const struct block_direct *d, const struct block_req *r)
{
    return !((r->offset | block_req_len(r)) & (d->align - 1));
}

bool block_direct_fits(const struct block_direct *d, const struct block_req *r)
{
    uintptr_t bases = 0, lengths = 0;

    if (r->op == BLOCK_FLUSH || r->op == BLOCK_NOP)
        return true;
    for (unsigned i = 0; (r->op == BLOCK_READ || r->op == BLOCK_WRITE) && i < r->iovs; i++) {
        bases |= (uintptr_t)r->iov[i].iov_base;
        lengths |= r->iov[i].iov_len;
    }
    /* Pieces of whole blocks: the kernel may stop behind any of them. */
    return !(bases & (d->mem_align - 1)) && !(lengths & (MAX(d->align, d->mem_align) - 1)) && whole_blocks(d, r);
}

/* --- the gate --- */

bool block_direct_enter(struct block_direct *d)
{
    bool open;

    pthread_mutex_lock(&d->lock);
    open = !d->want_alone;
    d->shared += open;
    pthread_mutex_unlock(&d->lock);
    return open;
}

void block_direct_leave(struct block_direct *d)
{
    pthread_mutex_lock(&d->lock);
    if (!--d->shared)
        pthread_cond_broadcast(&d->changed);
    pthread_mutex_unlock(&d->lock);
}

static void wait_shared(struct block_direct *d)
{
    pthread_mutex_lock(&d->turn);
    pthread_mutex_lock(&d->lock);
    d->shared++;
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_unlock(&d->turn);
}

static void wait_alone(struct block_direct *d)
{
    pthread_mutex_lock(&d->lock);
    d->want_alone++;
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_lock(&d->turn);
    pthread_mutex_lock(&d->lock);
    while (d->shared)
        pthread_cond_wait(&d->changed, &d->lock);
    pthread_mutex_unlock(&d->lock);
}

static void leave_alone(struct block_direct *d)
{
    pthread_mutex_lock(&d->lock);
    d->want_alone--;
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_unlock(&d->turn);
}

/* --- requests that do not fit --- */

/* All of it, or a negative errno; what is not there (the file has been cut short) is -EIO. */
static int transfer(int fd, bool write, u8 *buf, size_t len, u64 at)
{
    while (len) {
        ssize_t n = write ? pwrite(fd, buf, len, (off_t)at) : pread(fd, buf, len, (off_t)at);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        buf += n;
        len -= (size_t)n;
        at += (u64)n;
    }
    return 0;
}

/* len bytes at `at`, from r's pieces (NULL: zeroes), with what lies around them in their blocks; buf has room for both. */
static int rewrite(const struct block_direct *d, int fd, const struct block_req *r, u8 *buf, u64 at, size_t len)
{
    u64 from = at & ~((u64)d->align - 1), to = ALIGN_UP(at + len, (u64)d->align), last = to - d->align;
    int e = 0;

    if (from < at)
        e = transfer(fd, false, buf, d->align, from);
    if (e == 0 && at + len < to && (last > from || from == at))
        e = transfer(fd, false, buf + (last - from), d->align, last);
    if (e < 0)
        return e;
    if (r)
        block_gather(r, buf + (at - from), len);
    else
        memset(buf + (at - from), 0, len);
    return transfer(fd, true, buf, to - from, from);
}

static int bounce(const struct block_direct *d, int fd, struct block_req *r)
{
    u64 left = block_req_len(r);
    u8 *buf = aligned_alloc(ALIGN_MAX, ALIGN_UP(MIN(left, PIECE), ALIGN_MAX) + 2 * ALIGN_MAX);
    int e = buf ? 0 : -ENOMEM;

    while (e == 0 && (left = block_req_len(r))) {
        u64 from = r->offset & ~((u64)d->align - 1);
        size_t len = MIN(left, PIECE);

        if (r->op == BLOCK_READ) {
            e = transfer(fd, false, buf, ALIGN_UP(r->offset + len, (u64)d->align) - from, from);
            if (e == 0)
                block_scatter(r, buf + (r->offset - from), len);
        } else {
            e = rewrite(d, fd, r, buf, r->offset, len);
        }
        if (e == 0)
            block_consume(r, len);
    }
    free(buf);
    return e;
}

/* Zeroes up to the first block and from the last one on; r has the blocks between, then. */
static int zero_ends(const struct block_direct *d, int fd, struct block_req *r)
{
    u64 head = MIN(ALIGN_UP(r->offset, (u64)d->align) - r->offset, r->len), tail;
    u8 *buf = aligned_alloc(ALIGN_MAX, ALIGN_MAX);
    int e = buf ? 0 : -ENOMEM;

    if (e == 0 && head) {
        e = rewrite(d, fd, NULL, buf, r->offset, head);
        if (e == 0) {
            r->offset += head;
            r->len -= head;
        }
    }
    tail = r->len & (d->align - 1);
    if (e == 0 && tail) {
        e = rewrite(d, fd, NULL, buf, r->offset + r->len - tail, tail);
        if (e == 0)
            r->len -= tail;
    }
    free(buf);
    return e;
}

/* A hint: only whole blocks. */
static void shrink(const struct block_direct *d, struct block_req *r)
{
    u64 from = ALIGN_UP(r->offset, (u64)d->align), to = (r->offset + r->len) & ~((u64)d->align - 1);

    r->offset = from;
    r->len = to > from ? to - from : 0;
}

static int serve_change(struct block_direct *d, int fd, struct block_req *r, struct block *b, int (*plain)(struct block *b, struct block_req *r))
{
    int e = 0;

    if (r->op == BLOCK_WRITE)
        return block_direct_fits(d, r) ? plain(b, r) : bounce(d, fd, r);
    if (r->op == BLOCK_DISCARD)
        shrink(d, r);
    else if (!whole_blocks(d, r))
        e = zero_ends(d, fd, r);
    return e < 0 || !r->len ? e : plain(b, r);
}

int block_direct_serve(struct block_direct *d, int fd, struct block_req *r, struct block *b, int (*plain)(struct block *b, struct block_req *r))
{
    int e;

    if (r->op == BLOCK_READ)
        return block_direct_fits(d, r) ? plain(b, r) : bounce(d, fd, r);
    if (r->op == BLOCK_FLUSH || r->op == BLOCK_NOP)
        return plain(b, r);
    if (whole_blocks(d, r)) {
        wait_shared(d);
        e = serve_change(d, fd, r, b, plain);
        block_direct_leave(d);
    } else {
        wait_alone(d);
        e = serve_change(d, fd, r, b, plain);
        leave_alone(d);
    }
    return e;
}
