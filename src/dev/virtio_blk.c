/*
 * virtio block device (see virtio_blk.h; virtio 1.2, 5.2): read, write, flush, discard, write zeroes, identification; several queues, read-only disks,
 * a cache that can be switched off, changes of size.
 *
 * The life of a request: process() takes the chain from the ring under the device's lock, checks it and hands its pieces of guest memory to
 * back/block. What lies in the host's page cache comes back at once, and is answered before the vCPU goes on; for all else blk_done(), on a thread of
 * the back end, takes the lock, goes on with the request's next piece (a discard has several, a write without write-back cache is followed by a
 * flush), or answers in the used ring and interrupts.
 *
 * All queues are served under the one lock: they spare the guest's processors its locks, and have interrupts of their own.
 *
 * Left out: secure erase, lifetime, zones. Requests of these kinds are answered with UNSUPP.
 *
 * A reset by the driver is complete when the last request in flight has come back (its answer is dropped); so the host never writes into memory that the
 * driver may use for something else. What is in flight at a save (the host is slow) is saved as chains and submitted again after the load: reads
 * and writes may be done twice. The board loads interrupt controllers before disks, as these answers may interrupt at once.
 */
#include "dev/virtio_blk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <string.h>
#include <time.h>

#include "base/err.h"

#define QUEUE_SIZE 256
#define SEG_MAX (QUEUE_SIZE - 2)                                   /* beside header and status */
#define RANGES_MAX 64                                              /* of one discard */
#define RANGE_SECTORS_MAX (1u << 22)                               /* 2 GiB */
#define PHYSICAL_EXP 3                                             /* 4 KiB: what is written as a whole by the host's page cache */
#define QUIESCE_SECONDS 5

struct request {
    struct virtio_blk *blk;
    unsigned queue;
    struct virtq_chain chain;
    struct block_req io;
    bool ranges;                                                   /* the rest of chain.out is ranges to come */
    u8 *status;                                                    /* in guest memory: the chain's last byte */
    bool busy;
    struct request *next_free;
};

struct blk_queue {
    struct request request[QUEUE_SIZE];
    struct request *free;
    struct block_req again;                                        /* process() has had enough for once, and wants to be called again */
    bool again_sent;
    struct virtio_blk *blk;
};

struct virtio_blk {
    struct virtio virtio;
    struct block *block;
    char serial[VIRTIO_BLK_SERIAL_MAX];
    struct virtio_blk_config config;
    struct blk_queue *queue;
    unsigned queues;
    unsigned in_flight;                                            /* at the host */
    u64 room;                                                      /* what is left of BLOCK_AT_ONCE_MAX */
    pthread_cond_t idle;                                           /* a request has come back or is held, or the flush of quiesce has ended */
    bool gone;                                                     /* freed but for what the host may still answer */
    bool dirty;                                                    /* written since the last flush */
    struct block_counts counts;
    int logged;                                                    /* the last host error that was logged */
    struct block_req flush;                                        /* of quiesce */
    bool flushing;
};

/* --- requests --- */

/*
 * Answers. The used length says how many bytes were written from the chain's beginning at least (2.7.8.2): all when the request succeeded; when it failed
 * only the status, which lies at the end, so 0 unless it is alone.
 */
static void answer(struct request *r, u8 status)
{
    u64 len = status == VIRTIO_BLK_S_OK ? r->chain.in_total : r->chain.in_total == 1;

    *r->status = status;
    virtq_push(&r->blk->virtio.queue[r->queue], &r->chain, (u32)len);
}

static void release(struct request *r)
{
    struct blk_queue *q = &r->blk->queue[r->queue];

    r->busy = false;
    r->next_free = q->free;
    q->free = r;
}

static void host_error(struct virtio_blk *b, const struct block_req *io, int e)
{
    if (b->logged == e)
        return;
    b->logged = e;
    log_msg(b->virtio.log, LOG_ERROR, "disk %s: %s failed: %s%s", block_path(b->block), block_verb(io->op), strerror(-e), io->never_held ? "" : "; the guest sees an I/O error");
}

static bool write_back(const struct virtio_blk *b)
{
    return virtio_has(&b->virtio, VIRTIO_BLK_F_CONFIG_WCE) ? b->config.wce : virtio_has(&b->virtio, VIRTIO_BLK_F_FLUSH);
}

static void blk_done(struct block_req *io);

static int prepare(struct request *r, enum block_op op, u64 sector, u64 len)
{
    struct virtio_blk *b = r->blk;

    if (len % BLOCK_SECTOR || !range_in(sector, len / BLOCK_SECTOR, block_size(b->block) / BLOCK_SECTOR))
        return VIRTIO_BLK_S_IOERR;
    r->io = (struct block_req){ .op = op, .offset = sector * BLOCK_SECTOR, .len = len, .done = blk_done };
    return VIRTIO_BLK_S_OK;
}

/* The next range of a discard or of writing zeroes (5.2.6.2). */
static int next_range(struct request *r, enum block_op op)
{
    struct virtio_blk_discard_write_zeroes range;
    u32 flags, sectors;
    int status;

    virtq_read(&r->chain, &range, sizeof(range));
    flags = range.flags;
    sectors = range.num_sectors;
    if (flags & ~(op == BLOCK_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0u))
        return VIRTIO_BLK_S_UNSUPP;
    if (sectors > RANGE_SECTORS_MAX)
        return VIRTIO_BLK_S_IOERR;
    status = prepare(r, op, range.sector, (u64)sectors * BLOCK_SECTOR);
    r->io.unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    return status;
}

static int first_range(struct request *r, enum block_op op)
{
    u64 len = r->chain.out_len;

    if (block_readonly(r->blk->block))
        return VIRTIO_BLK_S_IOERR;
    if (!len || len % sizeof(struct virtio_blk_discard_write_zeroes) || len / sizeof(struct virtio_blk_discard_write_zeroes) > RANGES_MAX)
        return VIRTIO_BLK_S_IOERR;
    r->ranges = true;
    return next_range(r, op);
}

static int transfer(struct request *r, enum block_op op, u64 sector)
{
    struct virtq_chain *c = &r->chain;
    bool out = op == BLOCK_WRITE;
    int status;

    if (out && block_readonly(r->blk->block))
        return VIRTIO_BLK_S_IOERR;
    status = prepare(r, op, sector, out ? c->out_len : c->in_len);
    r->io.iov = out ? c->out : c->in;
    r->io.iovs = out ? c->outs : c->ins;
    return status;
}

/* What to do behind what has just ended: true when there is more, in r->io; else *status is the answer. */
static bool next_io(struct request *r, int *status)
{
    struct virtio_blk *b = r->blk;
    struct block_req *io = &r->io;

    *status = io->result == 0 ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
    if (io->op != BLOCK_FLUSH && io->op != BLOCK_READ)
        b->dirty = true;
    if (io->result < 0) {
        host_error(b, io, io->result);
        return false;
    }
    if (b->virtio.resetting || io->op == BLOCK_READ || io->op == BLOCK_FLUSH)
        return false;
    if (r->ranges && r->chain.out_len) {
        *status = next_range(r, io->op);
        return *status == VIRTIO_BLK_S_OK;
    }
    if (write_back(b) || io->op == BLOCK_DISCARD)
        return false;
    *io = (struct block_req){ .op = BLOCK_FLUSH, .done = blk_done };
    return true;
}

/* Has the host do r->io and what follows, as far as that goes without waiting. False: blk_done() will be called. */
static bool run(struct request *r, bool at_once, int *status)
{
    struct virtio_blk *b = r->blk;

    do {
        u64 len = block_req_len(&r->io);

        if (r->io.op == BLOCK_FLUSH)
            b->dirty = false;
        r->io.at_once = at_once && len <= b->room;
        if (!block_submit(b->block, &r->io))
            return false;
        b->room -= MIN(len, b->room);
    } while (next_io(r, status));
    return true;
}

static void get_id(struct request *r)
{
    virtq_write(&r->chain, r->blk->serial, sizeof(r->blk->serial));
    if (r->chain.in_len)
        r->chain.in_total = sizeof(r->blk->serial);                /* a longer buffer stays as it is behind the serial number */
    answer(r, VIRTIO_BLK_S_OK);
}

/* False when the request is done with: answered, or the driver made no sense. */
static bool start(struct request *r, bool at_once)
{
    struct virtio_blk *b = r->blk;
    struct virtq_chain *c = &r->chain;
    struct virtio_blk_outhdr head;
    int status = VIRTIO_BLK_S_UNSUPP;

    r->ranges = false;
    r->status = virtq_take_last_in(c);
    if (virtq_read(c, &head, sizeof(head)) < sizeof(head) || !r->status) {
        virtq_drop(&b->virtio.queue[r->queue], c);
        virtio_break(&b->virtio, "a disk request without header or status");
        return false;
    }
    switch (head.type) {
    case VIRTIO_BLK_T_IN: status = transfer(r, BLOCK_READ, head.sector); break;
    case VIRTIO_BLK_T_OUT: status = transfer(r, BLOCK_WRITE, head.sector); break;
    case VIRTIO_BLK_T_FLUSH: status = prepare(r, BLOCK_FLUSH, 0, 0); break;
    case VIRTIO_BLK_T_DISCARD: status = first_range(r, BLOCK_DISCARD); break;
    case VIRTIO_BLK_T_WRITE_ZEROES: status = first_range(r, BLOCK_ZEROES); break;
    case VIRTIO_BLK_T_GET_ID:
        get_id(r);
        return false;
    }
    if (status == VIRTIO_BLK_S_OK && !run(r, at_once, &status)) {
        b->in_flight++;
        return true;
    }
    answer(r, (u8)status);
    return false;
}

/*
 * Takes chains as long as there are requests for them; what stays in the ring is taken when one comes back. A guest whose other processors
 * bring requests that are answered at once could keep this one here for ever (see rng_kick()): another thread goes on then.
 */
static void process(struct virtio_blk *b, unsigned n)
{
    struct virtio *v = &b->virtio;
    struct virtq *q = &v->queue[n];
    struct blk_queue *bq = &b->queue[n];
    struct request *r;
    unsigned budget = 4u * q->size;

    b->room = BLOCK_AT_ONCE_MAX;
    while (virtio_running(v)) {
        virtq_ignore(q);
        while (budget && (r = bq->free) && virtio_pop(v, n, &r->chain)) {
            budget--;
            bq->free = r->next_free;
            r->busy = true;
            b->counts.requests++;
            if (!start(r, true)) {
                b->counts.at_once++;
                release(r);
            }
        }
        if (!bq->free || !virtq_listen(q) || !budget)
            break;
    }
    if (!budget && bq->free && !bq->again_sent && virtio_running(v)) {
        bq->again_sent = true;
        b->in_flight++;
        if (block_submit(b->block, &bq->again))
            bug_on(true);
    }
    virtio_interrupt(v, n);
}

static void came_back(struct virtio_blk *b, unsigned n)
{
    b->in_flight--;
    if (!b->virtio.resetting)
        process(b, n);
    if (!b->in_flight)
        virtio_stopped(&b->virtio);
    pthread_cond_broadcast(&b->idle);
}

static void blk_again(struct block_req *io)
{
    struct blk_queue *q = container_of(io, struct blk_queue, again);
    struct virtio_blk *b = q->blk;

    pthread_mutex_lock(&b->virtio.device.lock);
    q->again_sent = false;
    if (!b->gone)
        came_back(b, (unsigned)(q - b->queue));
    pthread_mutex_unlock(&b->virtio.device.lock);
}

static void blk_done(struct block_req *io)
{
    struct request *r = container_of(io, struct request, io);
    struct virtio_blk *b = r->blk;
    struct virtio *v = &b->virtio;
    int status;

    pthread_mutex_lock(&v->device.lock);
    if (!b->gone && (!next_io(r, &status) || run(r, false, &status))) {
        if (v->resetting)
            virtq_drop(&v->queue[r->queue], &r->chain);
        else
            answer(r, (u8)status);
        release(r);
        came_back(b, r->queue);
    }
    pthread_mutex_unlock(&v->device.lock);
}

static struct timespec quiesce_end(void)
{
    struct timespec end;

    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += QUIESCE_SECONDS;
    return end;
}

static void blk_kick(struct virtio *v, unsigned n)
{
    struct virtio_blk *b = container_of(v, struct virtio_blk, virtio);

    b->counts.notifications++;
    process(b, n);
}

/* Only the cache's switch can be written (5.2.5). What was written before it is switched off is flushed with the next write. */
static void blk_config_write(struct virtio *v, unsigned off, const void *val, unsigned len)
{
    struct virtio_blk *b = container_of(v, struct virtio_blk, virtio);

    if (virtio_has(v, VIRTIO_BLK_F_CONFIG_WCE) && off == offsetof(struct virtio_blk_config, wce) && len == 1)
        b->config.wce = *(const u8 *)val & 1;
}

/* Requests that are held for a full host do not come back by themselves. */
static bool only_held(struct virtio_blk *b)
{
    return b->in_flight <= block_held(b->block);
}

static void fail_held(struct virtio_blk *b)
{
    pthread_mutex_unlock(&b->virtio.device.lock);
    block_fail_held(b->block);
    pthread_mutex_lock(&b->virtio.device.lock);
}

/* While the device is being reset: what is in flight ends, within QUIESCE_SECONDS; what is held, or comes to be, fails. */
static void end_requests(struct virtio_blk *b)
{
    struct timespec end = quiesce_end();
    int r = 0;

    while (b->virtio.resetting && b->in_flight && r == 0)
        if (block_held(b->block))
            fail_held(b);
        else
            r = pthread_cond_timedwait(&b->idle, &b->virtio.device.lock, &end);
}

static void blk_held(void *arg)
{
    struct virtio_blk *b = arg;

    pthread_mutex_lock(&b->virtio.device.lock);
    pthread_cond_broadcast(&b->idle);
    pthread_mutex_unlock(&b->virtio.device.lock);
}

/* A legacy driver uses its buffers for something else at once: it waits in the store that resets, as long as quiesce would. */
static bool blk_stop(struct virtio *v)
{
    struct virtio_blk *b = container_of(v, struct virtio_blk, virtio);

    if (v->legacy)
        end_requests(b);
    else if (b->in_flight && block_held(b->block))
        fail_held(b);
    return v->resetting && !b->in_flight;
}

/* --- size --- */

static void set_config(struct virtio_blk *b)
{
    b->config.capacity = block_size(b->block) / BLOCK_SECTOR;
    b->config.seg_max = SEG_MAX;
    b->config.blk_size = BLOCK_SECTOR;
    b->config.physical_block_exp = PHYSICAL_EXP;
    b->config.min_io_size = 1u << PHYSICAL_EXP;
    b->config.num_queues = (u16)b->queues;
    b->config.max_discard_sectors = b->config.max_write_zeroes_sectors = RANGE_SECTORS_MAX;
    b->config.max_discard_seg = b->config.max_write_zeroes_seg = RANGES_MAX;
    b->config.discard_sector_alignment = 1u << PHYSICAL_EXP;
    b->config.write_zeroes_may_unmap = 1;
}

int virtio_blk_resize(struct virtio_blk *b, u64 size)
{
    int r = size ? block_grow(b->block, size) : block_refresh(b->block);

    if (r < 0)
        return r;
    pthread_mutex_lock(&b->virtio.device.lock);
    set_config(b);
    virtio_config_changed(&b->virtio);
    pthread_mutex_unlock(&b->virtio.device.lock);
    return 0;
}

struct block_counts virtio_blk_counts(struct virtio_blk *b)
{
    struct block_counts c;

    pthread_mutex_lock(&b->virtio.device.lock);
    c = b->counts;
    pthread_mutex_unlock(&b->virtio.device.lock);
    return c;
}

/* --- device --- */

/* What is in flight writes into guest memory, which is about to be cleared: it is waited for. Who calls sees it if that did not end. */
static void blk_reset(struct device *d)
{
    struct virtio_blk *b = container_of(d, struct virtio_blk, virtio.device);

    pthread_mutex_lock(&d->lock);
    b->virtio.resetting = true;
    end_requests(b);
    if (b->in_flight && block_abandon(b->block))
        end_requests(b);
    d->stuck = b->in_flight;
    if (!d->stuck) {
        virtio_device_reset(&b->virtio);
        b->config.wce = 1;
    }
    pthread_mutex_unlock(&d->lock);
}

static void flush_done(struct block_req *io)
{
    struct virtio_blk *b = container_of(io, struct virtio_blk, flush);

    pthread_mutex_lock(&b->virtio.device.lock);
    b->flushing = false;
    if (io->result < 0 && !b->gone) {
        b->dirty = true;
        host_error(b, io, io->result);
    }
    pthread_cond_broadcast(&b->idle);
    pthread_mutex_unlock(&b->virtio.device.lock);
}

/* Finishes what is in flight and brings what was written to the host's storage, as far as that goes within QUIESCE_SECONDS. */
static void blk_quiesce(struct device *d)
{
    struct virtio_blk *b = container_of(d, struct virtio_blk, virtio.device);
    struct timespec end = quiesce_end();
    int r = 0;

    pthread_mutex_lock(&d->lock);
    while (!only_held(b) && r == 0)
        r = pthread_cond_timedwait(&b->idle, &d->lock, &end);
    if (b->dirty && r == 0 && !b->flushing) {
        b->dirty = false;
        b->flush = (struct block_req){ .op = BLOCK_FLUSH, .never_held = true, .done = flush_done };
        b->flushing = !block_submit(b->block, &b->flush);
    }
    while (b->flushing && r == 0)
        r = pthread_cond_timedwait(&b->idle, &d->lock, &end);
    pthread_mutex_unlock(&d->lock);
    if (r == ETIMEDOUT)
        log_msg(b->virtio.log, LOG_WARN, "disk %s: the host has not answered for %d seconds", block_path(b->block), QUIESCE_SECONDS);
}

static u16 busy(const struct blk_queue *q)
{
    u16 n = 0;

    for (unsigned i = 0; i < QUEUE_SIZE; i++)
        n = (u16)(n + q->request[i].busy);
    return n;
}

static void load_in_flight(struct virtio_blk *b, struct stream *s, unsigned n, u16 count)
{
    struct virtq *q = &b->virtio.queue[n];

    if (s->error)
        return;
    if (count > QUEUE_SIZE || busy(&b->queue[n])) {
        stream_bad(s, "a disk has too many requests in flight");
        return;
    }
    while (count--) {
        struct request *r = b->queue[n].free;

        virtq_chain_state(q, &r->chain, s);
        if (s->error)
            return;
        b->queue[n].free = r->next_free;
        r->busy = true;
        if (!start(r, false))
            release(r);
    }
    virtio_interrupt(&b->virtio, n);
}

static void blk_state(struct device *d, struct stream *s)
{
    struct virtio_blk *b = container_of(d, struct virtio_blk, virtio.device);

    if (!stream_section(s, "virtio_blk", 2))
        return;
    virtio_state(&b->virtio, s);
    stream_u8(s, &b->config.wce);
    b->config.wce &= 1;
    for (unsigned n = 0; n < b->queues; n++) {
        u16 count = b->virtio.resetting || b->virtio.queue[n].broken ? 0 : busy(&b->queue[n]);

        stream_u16(s, &count);
        if (s->load)
            load_in_flight(b, s, n, count);
        for (unsigned i = 0; !s->load && count && i < QUEUE_SIZE; i++)
            if (b->queue[n].request[i].busy)
                virtq_chain_state(&b->virtio.queue[n], &b->queue[n].request[i].chain, s);
    }
}

static void blk_destroy(struct virtio_blk *b)
{
    for (unsigned n = 0; b->queue && n < b->queues; n++)
        for (unsigned i = 0; i < QUEUE_SIZE; i++)
            virtq_chain_free(&b->queue[n].request[i].chain);
    free(b->queue);
    free(b);
}

/* A host that does not answer may write into the buffers for ever: they stay. */
static void blk_free(struct device *d)
{
    struct virtio_blk *b = container_of(d, struct virtio_blk, virtio.device);

    if (!block_close(b->block)) {
        pthread_mutex_lock(&d->lock);
        b->gone = true;
        b->virtio.ram->pinned = true;
        pthread_mutex_unlock(&d->lock);
        return;
    }
    virtio_destroy(&b->virtio);
    pthread_cond_destroy(&b->idle);
    blk_destroy(b);
}

static const struct device_ops device_ops = {
    .name = "virtio_blk", .reset = blk_reset, .quiesce = blk_quiesce, .state = blk_state, .free = blk_free
};
static const struct virtio_ops virtio_ops = { .kick = blk_kick, .stop = blk_stop, .config_write = blk_config_write };

static int init_virtio(struct virtio_blk *b, struct ram *ram, const struct log *log)
{
    u64 features = BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_FLUSH) | BIT(VIRTIO_BLK_F_TOPOLOGY) |
                   BIT(VIRTIO_BLK_F_CONFIG_WCE);
    u16 size[VIRTIO_BLK_QUEUES_MAX];

    if (block_readonly(b->block))
        features |= BIT(VIRTIO_BLK_F_RO);
    else
        features |= BIT(VIRTIO_BLK_F_DISCARD) | BIT(VIRTIO_BLK_F_WRITE_ZEROES);
    if (b->queues > 1)
        features |= BIT(VIRTIO_BLK_F_MQ);
    for (unsigned n = 0; n < b->queues; n++)
        size[n] = QUEUE_SIZE;
    return virtio_init(&b->virtio, &device_ops, &virtio_ops, VIRTIO_ID_BLOCK, ram, log, features, &b->config,
                       offsetof(struct virtio_blk_config, unused1) + sizeof(b->config.unused1), size, b->queues);
}

static void init_queues(struct virtio_blk *b)
{
    for (unsigned n = 0; n < b->queues; n++) {
        b->queue[n].blk = b;
        b->queue[n].again = (struct block_req){ .op = BLOCK_NOP, .done = blk_again };
        for (unsigned i = 0; i < QUEUE_SIZE; i++) {
            b->queue[n].request[i].blk = b;
            b->queue[n].request[i].queue = n;
            release(&b->queue[n].request[i]);
        }
    }
}

int virtio_blk_new(struct ram *ram, const struct log *log, struct block *block, const char *serial, unsigned queues, struct virtio_blk **out)
{
    struct virtio_blk *b = calloc(1, sizeof(*b));
    pthread_condattr_t attr;
    int r = -ENOMEM;

    bug_on(!queues || queues > VIRTIO_BLK_QUEUES_MAX);
    if (b) {
        b->block = block;
        b->queues = queues;
        b->config.wce = 1;
        b->queue = calloc(queues, sizeof(*b->queue));
        if (b->queue)
            r = init_virtio(b, ram, log);
    }
    if (r < 0) {
        block_close(block);
        if (b)
            blk_destroy(b);
        return err(r, "virtio_blk: out of memory");
    }
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&b->idle, &attr);
    pthread_condattr_destroy(&attr);
    memcpy(b->serial, serial, strnlen(serial, sizeof(b->serial)));
    init_queues(b);
    set_config(b);
    block_tell_held(block, blk_held, b);
    *out = b;
    return 0;
}
