/*
 * Requests of a block back end by io_uring (see block_host.h).
 *
 * One thread owns the ring: it waits in io_uring_enter(2) for completions, and for an eventfd that says that there are new requests, which it takes all at once.
 * (Threads that submit themselves would have their requests cancelled when they end, and be interrupted for each completion.) What the kernel
 * cannot do without waiting it hands to threads of its own. Writes into the page cache are always among that for most file systems, although they
 * hardly ever wait: up to the longest that guests usually make, the ring's thread makes them itself. That spares two changes of threads, and nothing runs in turn that did
 * not before: writes to a file exclude each other in the kernel.
 *
 * Flushes: one fdatasync(2) at a time, for all that have asked when it begins. (Of two at the same time only one is told of an error, and the other might be answered
 * first.) The thread makes it itself if the last ones were short and nothing else is going on.
 *
 * Locking: a mutex around the list of new requests, a leaf.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <liburing.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "back/block_host.h"
#include "base/spin.h"
#include "base/thread.h"

#define ENTRIES 256
#define DIRECT_MAX (1 * MiB)
#define QUICK_NS 500000u                                           /* a flush that took less, */
#define QUICK_SYNCS 8u                                             /* and after how many of them the thread makes them itself */

struct block_ring {
    struct block *b;
    const struct block_ring_ops *ops;
    int fd, event;
    struct io_uring ring;
    pthread_t thread;
    struct block_end end;
    pthread_mutex_t lock;
    struct block_req *first, **last;                               /* new requests */
    bool woken;                                                    /* the event is on its way already */
    bool closing;
    _Atomic bool news;                                             /* new requests, or closing: to look at without the lock */
    /* the thread's own */
    struct spin spin[2];                                           /* waiting for requests; for the kernel */
    struct block_req *ready, **ready_last;                         /* for which there was no room in the ring, in order */
    struct block_req *syncing;                                     /* whom the fdatasync(2) in the ring answers */
    struct block_req *syncs, **syncs_last;                         /* whom the next one will */
    u64 sync_since;
    unsigned quick_syncs;                                          /* that were so, one after the other */
    unsigned in_flight;
    bool armed;
    u64 events;
};

static void prepare(struct block_ring *g, struct io_uring_sqe *q, const struct block_step *s)
{
    switch (s->call) {
    case STEP_READV: io_uring_prep_readv(q, g->fd, s->iov, s->iovs, s->offset); break;
    case STEP_WRITEV: io_uring_prep_writev(q, g->fd, s->iov, s->iovs, s->offset); break;
    case STEP_WRITE: io_uring_prep_write(q, g->fd, s->buf, (unsigned)s->len, s->offset); break;
    case STEP_FALLOCATE: io_uring_prep_fallocate(q, g->fd, s->mode, (off_t)s->offset, (off_t)s->len); break;
    case STEP_FDATASYNC: break;                                    /* flush() */
    case STEP_NOP: io_uring_prep_nop(q); break;
    }
}

static void add(struct block_req ***last, struct block_req *r)
{
    r->next = NULL;
    **last = r;
    *last = &r->next;
}

/* After a step: the next one, if there is one, has to wait for its turn. */
static void stepped(struct block_ring *g, struct block_req *r, int res)
{
    if (g->ops->result(g->b, r, res))
        block_done(g->b, r);
    else
        add(&g->ready_last, r);
}

static void all_stepped(struct block_ring *g, struct block_req *r, int res)
{
    struct block_req *next;

    for (; r; r = next) {
        next = r->next;
        stepped(g, r, res);
    }
}

static struct io_uring_sqe *room(struct block_ring *g)
{
    return g->in_flight < ENTRIES ? io_uring_get_sqe(&g->ring) : NULL;
}

/* False: the ring is full. */
static bool push(struct block_ring *g, struct block_req *r)
{
    struct io_uring_sqe *q;
    struct block_step s;

    g->ops->step(g->b, r, &s);
    if (s.call == STEP_WRITEV && !s.waits && block_req_len(r) <= DIRECT_MAX) {
        ssize_t n = pwritev(g->fd, s.iov, (int)s.iovs, (off_t)s.offset);

        stepped(g, r, n < 0 ? -errno : (int)n);
        return true;
    }
    if (s.call == STEP_FDATASYNC) {
        add(&g->syncs_last, r);
        return true;
    }
    q = room(g);
    if (!q)
        return false;
    prepare(g, q, &s);
    io_uring_sqe_set_data(q, r);
    g->in_flight++;
    return true;
}

static void synced(struct block_ring *g)
{
    g->quick_syncs = spin_clock() - g->sync_since < QUICK_NS ? MIN(g->quick_syncs + 1, QUICK_SYNCS) : 0;
}

/* While the thread waits for the storage, so does all that is new: hence only if flushes are short. */
static int sync_here(struct block_ring *g)
{
    int res;

    g->sync_since = spin_clock();
    res = fdatasync(g->fd) < 0 ? -errno : 0;
    synced(g);
    return res;
}

static void flush(struct block_ring *g)
{
    bool here = !g->in_flight && g->quick_syncs >= QUICK_SYNCS;
    struct block_req *all = g->syncs;
    struct io_uring_sqe *q = here || !all || g->syncing ? NULL : room(g);

    if (!all || g->syncing || !(here || q))
        return;
    g->syncs = NULL;
    g->syncs_last = &g->syncs;
    if (here) {
        all_stepped(g, all, sync_here(g));
        return;
    }
    io_uring_prep_fsync(q, g->fd, IORING_FSYNC_DATASYNC);
    io_uring_sqe_set_data(q, all);
    g->syncing = all;
    g->sync_since = spin_clock();
    g->in_flight++;
}

/* False when there is nothing to wait for any more. */
static bool take_new(struct block_ring *g)
{
    struct block_req *r, *next;
    bool closing, full = false;

    pthread_mutex_lock(&g->lock);
    g->woken = false;
    g->news = false;
    closing = g->closing;
    if (g->first) {
        *g->ready_last = g->first;
        g->ready_last = g->last;
        g->first = NULL;
        g->last = &g->first;
    }
    pthread_mutex_unlock(&g->lock);
    r = g->ready;
    g->ready = NULL;
    g->ready_last = &g->ready;
    for (; r; r = next) {
        next = r->next;
        if (full || !push(g, r)) {
            full = true;
            add(&g->ready_last, r);
        }
    }
    flush(g);
    return !closing || g->ready || g->syncs || g->in_flight;
}

static void arm(struct block_ring *g)
{
    struct io_uring_sqe *q = g->armed ? NULL : io_uring_get_sqe(&g->ring);

    if (!q)
        return;
    io_uring_prep_read(q, g->event, &g->events, sizeof(g->events), 0);
    io_uring_sqe_set_data(q, NULL);
    g->armed = true;
}

static void reap(struct block_ring *g)
{
    struct io_uring_cqe *c;

    while (io_uring_peek_cqe(&g->ring, &c) == 0) {
        struct block_req *r = io_uring_cqe_get_data(c);
        int res = c->res;

        io_uring_cqe_seen(&g->ring, c);
        if (!r) {
            g->armed = false;
            continue;
        }
        g->in_flight--;
        if (r == g->syncing) {
            g->syncing = NULL;
            synced(g);
            all_stepped(g, r, res);
        } else {
            stepped(g, r, res);
        }
    }
}

/*
 * In user mode it would not learn of a completion sooner than asleep: the kernel posts it in this thread's context, for which it interrupts the thread. It does so at once
 * in a system call.
 */
static bool come(void *arg)
{
    struct block_ring *g = arg;

    if (g->in_flight)
        io_uring_get_events(&g->ring);
    return atomic_load_explicit(&g->news, memory_order_acquire) || io_uring_cq_ready(&g->ring);
}

/* Nobody needs to wake the thread up while it looks out by itself. */
static bool look(struct block_ring *g, struct spin *s)
{
    bool found;

    if (!spin_pays(s) || io_uring_submit(&g->ring) < 0)
        return false;
    pthread_mutex_lock(&g->lock);
    g->woken = true;
    pthread_mutex_unlock(&g->lock);
    found = spin_look(s, come, g);
    pthread_mutex_lock(&g->lock);
    g->woken = false;
    found |= g->news;
    pthread_mutex_unlock(&g->lock);
    return found;
}

static void wait_more(struct block_ring *g)
{
    bool nothing = !(g->ready || (g->syncs && !g->syncing)) || g->in_flight >= ENTRIES;
    struct spin *s = &g->spin[g->in_flight > 0];
    u64 since;

    if (nothing && look(g, s))
        return;
    since = spin_clock();
    if (io_uring_submit_and_wait(&g->ring, nothing) < 0)
        usleep(1000);                                              /* the kernel is short of memory: what is in flight will end */
    if (nothing)
        spin_slept(s, spin_clock() - since);
}

static void *serve(void *arg)
{
    struct block_ring *g = arg;

    for (;;) {
        arm(g);
        if (!take_new(g))
            break;
        wait_more(g);
        reap(g);
    }
    io_uring_queue_exit(&g->ring);
    block_end_leave(&g->end);
    return NULL;
}

static void wake(struct block_ring *g)
{
    ssize_t n;

    do
        n = write(g->event, &(u64){ 1 }, sizeof(u64));
    while (n < 0 && errno == EINTR);
}

void block_ring_submit(struct block_ring *g, struct block_req *r)
{
    bool woken;

    r->next = NULL;
    pthread_mutex_lock(&g->lock);
    *g->last = r;
    g->last = &r->next;
    woken = g->woken;
    g->woken = true;
    g->news = true;
    pthread_mutex_unlock(&g->lock);
    if (!woken)
        wake(g);
}

static void ring_free(struct block_ring *g)
{
    if (g->event >= 0)
        close(g->event);
    pthread_mutex_destroy(&g->lock);
    block_end_destroy(&g->end);
    free(g);
}

/* All that is used here is there since Linux 5.6 (2020). */
static bool has_all(struct io_uring *ring)
{
    static const int op[] = { IORING_OP_NOP, IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_FALLOCATE };
    struct io_uring_probe *p = io_uring_get_probe_ring(ring);
    bool all = p;

    for (unsigned i = 0; p && i < ARRAY_SIZE(op); i++)
        all &= io_uring_opcode_supported(p, op[i]) != 0;
    io_uring_free_probe(p);
    return all;
}

int block_ring_open(struct block *b, int fd, const struct block_ring_ops *ops, struct block_ring **out)
{
    struct block_ring *g = calloc(1, sizeof(*g));
    int r;

    if (!g)
        return -ENOMEM;
    *g = (struct block_ring){ .b = b, .fd = fd, .ops = ops, .last = &g->first, .ready_last = &g->ready, .syncs_last = &g->syncs };
    pthread_mutex_init(&g->lock, NULL);
    block_end_init(&g->end);
    g->event = eventfd(0, EFD_CLOEXEC);
    r = g->event < 0 ? -errno : io_uring_queue_init(ENTRIES * 2, &g->ring, 0);
    if (r == 0) {
        r = has_all(&g->ring) ? 0 : -ENOSYS;
        g->end.running = 1;
        if (r == 0)
            r = -thread_start(&g->thread, serve, g);
        if (r < 0)
            io_uring_queue_exit(&g->ring);
    }
    if (r < 0) {
        ring_free(g);
        return r;
    }
    *out = g;
    return 0;
}

bool block_ring_close(struct block_ring *g)
{
    bool ended;

    if (!g)
        return true;
    pthread_mutex_lock(&g->lock);
    g->closing = true;
    g->news = true;
    pthread_mutex_unlock(&g->lock);
    wake(g);
    ended = block_end_wait(&g->end);
    if (!ended) {
        pthread_detach(g->thread);
        return false;
    }
    pthread_join(g->thread, NULL);
    ring_free(g);
    return true;
}
