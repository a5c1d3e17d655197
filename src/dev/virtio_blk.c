/*
 * virtio block device (see virtio_blk.h; virtio 1.2, 5.2): read, write, flush, identification; read-only disks; changes of size.
 *
 * The life of a request: blk_kick() takes the chain from the ring under the device's lock, checks it and hands its pieces of guest memory to a
 * worker of back/block; the vCPU goes on. blk_done(), on the worker's thread, takes the lock, answers in the used ring and interrupts.
 * Requests that need no disk are answered at once.
 *
 * Left out so far: discard, write zeroes, several queues, the cache switch (CONFIG_WCE). Requests of these kinds are answered with UNSUPP.
 *
 * A reset by the driver is complete when the last request in flight has come back (its answer is dropped); so the host never writes into memory that the
 * driver may use for something else. What is in flight at a save (the host is slow) is saved as the chains' heads and submitted again after the load: reads
 * and writes may be done twice. The board loads interrupt controllers before disks, as these answers may interrupt at once.
 */
#include "dev/virtio_blk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <string.h>
#include <time.h>

#include "base/err.h"

#define QUEUE 0
#define QUEUE_SIZE 256
#define SEG_MAX (QUEUE_SIZE - 2)                                   /* beside header and status */
#define QUIESCE_SECONDS 5

struct request {
    struct virtio_blk *blk;
    struct virtq_chain chain;
    struct block_req io;
    u8 *status;                                                    /* in guest memory: the chain's last byte */
    bool busy;
    struct request *next_free;
};

struct virtio_blk {
    struct virtio virtio;
    struct block *block;
    char serial[VIRTIO_BLK_SERIAL_MAX];
    struct virtio_blk_config config;
    struct request request[QUEUE_SIZE];
    struct request *free;
    unsigned in_flight;                                            /* at the host */
    pthread_cond_t idle;                                           /* in_flight has become 0, or the flush of quiesce has ended */
    bool dirty;                                                    /* written since the last flush */
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
    struct virtio_blk *b = r->blk;
    u64 len = status == VIRTIO_BLK_S_OK ? r->chain.in_total : r->chain.in_total == 1;

    *r->status = status;
    virtq_push(&b->virtio.queue[QUEUE], &r->chain, (u32)len);
}

static void release(struct request *r)
{
    r->busy = false;
    r->next_free = r->blk->free;
    r->blk->free = r;
}

static void host_error(struct virtio_blk *b, const struct block_req *io, int e)
{
    static const char *const verb[] = { [BLOCK_READ] = "reading", [BLOCK_WRITE] = "writing", [BLOCK_FLUSH] = "flushing" };

    if (b->logged == e)
        return;
    b->logged = e;
    log_msg(b->virtio.log, LOG_ERROR, "disk %s: %s failed: %s; the guest sees an I/O error", block_path(b->block), verb[io->op], strerror(-e));
}

/* Takes chains as long as there are requests for them; what stays in the ring is taken when one comes back. */
static void process(struct virtio_blk *b);

/* For a driver that cannot ask for a flush, a write has ended when it is in the host's storage (5.2.6.2). */
static void blk_done(struct block_req *io)
{
    struct request *r = container_of(io, struct request, io);
    struct virtio_blk *b = r->blk;
    struct virtio *v = &b->virtio;

    pthread_mutex_lock(&v->device.lock);
    if (io->result < 0)
        host_error(b, io, io->result);
    if (io->op == BLOCK_WRITE)
        b->dirty = true;
    if (io->op == BLOCK_WRITE && io->result == 0 && !virtio_has(v, VIRTIO_BLK_F_FLUSH) && !v->resetting) {
        b->dirty = false;
        *io = (struct block_req){ .op = BLOCK_FLUSH, .done = blk_done };
        block_submit(b->block, io);
        pthread_mutex_unlock(&v->device.lock);
        return;
    }
    if (v->resetting)
        virtq_drop(&v->queue[QUEUE], &r->chain);
    else
        answer(r, io->result == 0 ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR);
    release(r);
    b->in_flight--;
    if (!v->resetting)
        process(b);
    if (!b->in_flight) {
        virtio_stopped(v);
        pthread_cond_broadcast(&b->idle);
    }
    pthread_mutex_unlock(&v->device.lock);
}

/* Hands the request to the host; with the sector out of the disk, or half a sector, it is answered at once. False: answered. */
static bool submit(struct request *r, enum block_op op, u64 sector, struct iovec *iov, unsigned iovs, u64 len)
{
    struct virtio_blk *b = r->blk;
    u64 sectors = block_size(b->block) / BLOCK_SECTOR;

    if (op != BLOCK_FLUSH && (len % BLOCK_SECTOR || !range_in(sector, len / BLOCK_SECTOR, sectors))) {
        answer(r, VIRTIO_BLK_S_IOERR);
        return false;
    }
    r->io = (struct block_req){ .op = op, .offset = sector * BLOCK_SECTOR, .iov = iov, .iovs = iovs, .done = blk_done };
    if (op == BLOCK_FLUSH)
        b->dirty = false;
    b->in_flight++;
    block_submit(b->block, &r->io);
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
static bool start(struct request *r)
{
    struct virtio_blk *b = r->blk;
    struct virtq_chain *c = &r->chain;
    struct virtio_blk_outhdr head;

    r->status = virtq_take_last_in(c);
    if (virtq_read(c, &head, sizeof(head)) < sizeof(head) || !r->status) {
        virtq_drop(&b->virtio.queue[QUEUE], c);
        virtio_break(&b->virtio, "a disk request without header or status");
        return false;
    }
    switch (head.type) {
    case VIRTIO_BLK_T_IN:
        return submit(r, BLOCK_READ, head.sector, c->in, c->ins, c->in_len);
    case VIRTIO_BLK_T_OUT:
        if (!block_readonly(b->block))
            return submit(r, BLOCK_WRITE, head.sector, c->out, c->outs, c->out_len);
        answer(r, VIRTIO_BLK_S_IOERR);
        return false;
    case VIRTIO_BLK_T_FLUSH:
        return submit(r, BLOCK_FLUSH, 0, NULL, 0, 0);
    case VIRTIO_BLK_T_GET_ID:
        get_id(r);
        return false;
    default:
        answer(r, VIRTIO_BLK_S_UNSUPP);
        return false;
    }
}

static void process(struct virtio_blk *b)
{
    struct virtio *v = &b->virtio;
    struct virtq *q = &v->queue[QUEUE];
    struct request *r;
    unsigned budget = 4u * q->size;                                /* see rng_kick(): requests that are answered at once could go on for ever */

    while (virtio_running(v)) {
        virtq_ignore(q);
        while (budget && (r = b->free) && virtio_pop(v, QUEUE, &r->chain)) {
            budget--;
            b->free = r->next_free;
            r->busy = true;
            if (!start(r))
                release(r);
        }
        if (!b->free || !virtq_listen(q) || !budget)
            break;
    }
    virtio_interrupt(v, QUEUE);
}

static struct timespec quiesce_end(void)
{
    struct timespec end;

    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += QUIESCE_SECONDS;
    return end;
}

static void blk_kick(struct virtio *v, unsigned n UNUSED)
{
    process(container_of(v, struct virtio_blk, virtio));
}

/* A legacy driver uses its buffers for something else at once: it waits in the store that resets, as long as quiesce would. */
static bool blk_stop(struct virtio *v)
{
    struct virtio_blk *b = container_of(v, struct virtio_blk, virtio);
    struct timespec end = quiesce_end();
    int r = 0;

    while (v->legacy && v->resetting && b->in_flight && r == 0)
        r = pthread_cond_timedwait(&b->idle, &v->device.lock, &end);
    return !b->in_flight;
}

/* --- size --- */

static void set_config(struct virtio_blk *b)
{
    b->config.capacity = block_size(b->block) / BLOCK_SECTOR;
    b->config.seg_max = SEG_MAX;
    b->config.blk_size = BLOCK_SECTOR;
}

int virtio_blk_resize(struct virtio_blk *b)
{
    int r = block_refresh(b->block);

    if (r < 0)
        return r;
    pthread_mutex_lock(&b->virtio.device.lock);
    set_config(b);
    virtio_config_changed(&b->virtio);
    pthread_mutex_unlock(&b->virtio.device.lock);
    return 0;
}

/* --- device --- */

/* What is in flight writes into guest memory, which is about to be cleared: it is waited for. */
static void blk_reset(struct device *d)
{
    struct virtio_blk *b = container_of(d, struct virtio_blk, virtio.device);

    pthread_mutex_lock(&d->lock);
    b->virtio.resetting = true;
    while (b->in_flight)
        pthread_cond_wait(&b->idle, &d->lock);
    virtio_device_reset(&b->virtio);
    pthread_mutex_unlock(&d->lock);
}

static void flush_done(struct block_req *io)
{
    struct virtio_blk *b = container_of(io, struct virtio_blk, flush);

    pthread_mutex_lock(&b->virtio.device.lock);
    b->flushing = false;
    if (io->result < 0)
        host_error(b, io, io->result);
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
    while (b->in_flight && r == 0)
        r = pthread_cond_timedwait(&b->idle, &d->lock, &end);
    if (b->dirty && !b->in_flight && !b->flushing) {
        b->dirty = false;
        b->flushing = true;
        b->flush = (struct block_req){ .op = BLOCK_FLUSH, .done = flush_done };
        block_submit(b->block, &b->flush);
    }
    while (b->flushing && r == 0)
        r = pthread_cond_timedwait(&b->idle, &d->lock, &end);
    pthread_mutex_unlock(&d->lock);
    if (r == ETIMEDOUT)
        log_msg(b->virtio.log, LOG_WARN, "disk %s: the host has not answered for %d seconds", block_path(b->block), QUIESCE_SECONDS);
}

static void load_in_flight(struct virtio_blk *b, struct stream *s, u16 n)
{
    struct virtq *q = &b->virtio.queue[QUEUE];

    if (s->error)
        return;
    if (n > QUEUE_SIZE || b->in_flight) {
        stream_bad(s, "a disk has too many requests in flight");
        return;
    }
    while (n--) {
        struct request *r = b->free;
        u16 head = 0;

        stream_u16(s, &head);
        if (s->error)
            return;
        if (virtq_take(q, head, &r->chain) < 0) {
            stream_bad(s, "a disk request in flight makes no sense");
            return;
        }
        b->free = r->next_free;
        r->busy = true;
        if (!start(r))
            release(r);
    }
    virtio_interrupt(&b->virtio, QUEUE);
}

static void blk_state(struct device *d, struct stream *s)
{
    struct virtio_blk *b = container_of(d, struct virtio_blk, virtio.device);
    u16 n = b->virtio.resetting ? 0 : (u16)b->in_flight;

    if (!stream_section(s, "virtio_blk", 1))
        return;
    virtio_state(&b->virtio, s);
    stream_u16(s, &n);
    if (s->load) {
        load_in_flight(b, s, n);
        return;
    }
    for (struct request *r = b->request; n && r < b->request + QUEUE_SIZE; r++)
        if (r->busy)
            stream_u16(s, &r->chain.head);
}

static void blk_free(struct device *d)
{
    struct virtio_blk *b = container_of(d, struct virtio_blk, virtio.device);

    block_close(b->block);                                         /* waits: no worker comes back after this */
    virtio_destroy(&b->virtio);
    for (unsigned i = 0; i < QUEUE_SIZE; i++)
        virtq_chain_free(&b->request[i].chain);
    pthread_cond_destroy(&b->idle);
    free(b);
}

static const struct device_ops device_ops = {
    .name = "virtio_blk", .reset = blk_reset, .quiesce = blk_quiesce, .state = blk_state, .free = blk_free
};
static const struct virtio_ops virtio_ops = { .kick = blk_kick, .stop = blk_stop };

int virtio_blk_new(struct ram *ram, const struct log *log, struct block *block, const char *serial, struct virtio_blk **out)
{
    struct virtio_blk *b = calloc(1, sizeof(*b));
    u64 features = BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_FLUSH);
    pthread_condattr_t attr;
    int r = -ENOMEM;

    if (block_readonly(block))
        features |= BIT(VIRTIO_BLK_F_RO);
    if (b)
        r = virtio_init(&b->virtio, &device_ops, &virtio_ops, VIRTIO_ID_BLOCK, ram, log, features, &b->config,
                        offsetof(struct virtio_blk_config, physical_block_exp), (u16[]){ QUEUE_SIZE }, 1);
    if (r < 0) {
        block_close(block);
        free(b);
        return err(r, "virtio_blk: out of memory");
    }
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&b->idle, &attr);
    pthread_condattr_destroy(&attr);
    b->block = block;
    memcpy(b->serial, serial, strnlen(serial, sizeof(b->serial)));
    for (unsigned i = 0; i < QUEUE_SIZE; i++) {
        b->request[i].blk = b;
        release(&b->request[i]);
    }
    set_config(b);
    *out = b;
    return 0;
}
