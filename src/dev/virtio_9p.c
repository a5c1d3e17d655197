/*
 * virtio 9P transport (see virtio_9p.h): one queue; a chain is a message (readable) and the room for its answer (writable). What messages say is
 * back/9p's affair, on whose threads they are carried out; answers come back in any order.
 *
 * A reset by the driver is complete when the last request in flight has come back; what the guest had open is closed then.
 *
 * A saved state has no open files: descriptors of the host cannot be saved. What it is loaded into answers all that the guest had open, and its whole
 * mount, with errors, except where it is the very device that was saved (a change of engines). What is in flight at a save (the host is slow) is saved as chains and
 * carried out again after the load.
 *
 * Locking: the device's lock; nothing is called with it held that waits for the host.
 */
#include "dev/virtio_9p.h"

#include <errno.h>
#include <linux/virtio_9p.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#define QUEUE_SIZE 128
#define WAIT_SECONDS 5

struct request {
    struct virtio_9p *dev;
    struct virtq_chain chain;
    struct p9_request p9;
    bool busy;
    struct request *next_free;
};

struct virtio_9p {
    struct virtio virtio;
    struct p9 *server;
    struct {
        u16 tag_len;
        char tag[VIRTIO_9P_TAG_MAX];
    } __attribute__((packed)) config;
    struct request request[QUEUE_SIZE];
    struct request *free;
    unsigned in_flight;
    pthread_cond_t idle;                                           /* in_flight has become 0 */
    bool gone;                                                     /* freed but for what the host may still answer */
    u64 instance;                                                  /* which device this is */
};

static void lock(struct virtio_9p *p)
{
    pthread_mutex_lock(&p->virtio.device.lock);
}

static void unlock(struct virtio_9p *p)
{
    pthread_mutex_unlock(&p->virtio.device.lock);
}

static void release(struct request *r)
{
    r->busy = false;
    r->next_free = r->dev->free;
    r->dev->free = r;
}

static void start(struct request *r)
{
    r->p9.out = r->chain.out;
    r->p9.outs = r->chain.outs;
    r->p9.in = r->chain.in;
    r->p9.ins = r->chain.ins;
    r->busy = true;
    r->dev->in_flight++;
    p9_submit(r->dev->server, &r->p9);
}

/* Each chain taken is in flight until the server's threads have answered it, so this ends when there are no more requests. */
static void process(struct virtio_9p *p)
{
    struct virtio *v = &p->virtio;
    struct virtq *q = &v->queue[0];
    struct request *r;

    while (virtio_running(v)) {
        virtq_ignore(q);
        while ((r = p->free) && virtio_pop(v, 0, &r->chain)) {
            p->free = r->next_free;
            start(r);
        }
        if (!p->free || !virtq_listen(q))
            break;
    }
}

/* The driver is gone: so is what it had open. */
static void stopped(struct virtio_9p *p)
{
    p9_forget(p->server);
    virtio_stopped(&p->virtio);
}

static void done(struct p9_request *p9)
{
    struct request *r = container_of(p9, struct request, p9);
    struct virtio_9p *p = r->dev;
    struct virtio *v = &p->virtio;
    struct virtq *q = &v->queue[0];

    lock(p);
    if (!p->gone) {
        if (v->resetting || q->broken || !p9->reply)
            virtq_drop(q, &r->chain);
        else
            virtq_push(q, &r->chain, p9->reply);
        if (!v->resetting && !p9->reply)
            virtio_break(v, "a 9P message without a head, or without room for its answer");
        release(r);
        p->in_flight--;
        if (!v->resetting) {
            process(p);
            virtio_interrupt(v, 0);
        }
        if (!p->in_flight) {
            if (v->resetting)
                stopped(p);
            pthread_cond_broadcast(&p->idle);
        }
    }
    unlock(p);
}

static void on_kick(struct virtio *v, unsigned n UNUSED)
{
    process(container_of(v, struct virtio_9p, virtio));
}

/* Waits, for a bounded time, with the lock held. */
static void wait_idle(struct virtio_9p *p)
{
    struct timespec end;
    int r = 0;

    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += WAIT_SECONDS;
    while (p->in_flight && r == 0)
        r = pthread_cond_timedwait(&p->idle, &p->virtio.device.lock, &end);
}

/* A legacy driver uses its buffers for something else at once. */
static bool on_stop(struct virtio *v)
{
    struct virtio_9p *p = container_of(v, struct virtio_9p, virtio);

    if (v->legacy)
        wait_idle(p);
    if (p->in_flight || !v->resetting)
        return false;
    p9_forget(p->server);
    return true;
}

/* --- device --- */

static void p9_dev_reset(struct device *d)
{
    struct virtio_9p *p = container_of(d, struct virtio_9p, virtio.device);

    lock(p);
    p->virtio.resetting = true;
    wait_idle(p);
    d->stuck = p->in_flight;
    if (!d->stuck) {
        p9_forget(p->server);
        virtio_device_reset(&p->virtio);
    }
    unlock(p);
}

static void p9_dev_quiesce(struct device *d)
{
    struct virtio_9p *p = container_of(d, struct virtio_9p, virtio.device);

    lock(p);
    wait_idle(p);
    if (p->in_flight)
        log_msg(p->virtio.log, LOG_WARN, "share %s: the host has not answered for %d seconds", p9_path(p->server), WAIT_SECONDS);
    unlock(p);
}

static void load_in_flight(struct virtio_9p *p, struct stream *s, u16 count)
{
    if (count > QUEUE_SIZE || p->in_flight) {
        stream_bad(s, "a shared folder has too many requests in flight");
        return;
    }
    while (count-- && !s->error) {
        struct request *r = p->free;

        virtq_chain_state(&p->virtio.queue[0], &r->chain, s);
        if (s->error)
            return;
        p->free = r->next_free;
        start(r);
    }
}

static void p9_dev_state(struct device *d, struct stream *s)
{
    struct virtio_9p *p = container_of(d, struct virtio_9p, virtio.device);
    u64 instance = p->instance;
    u16 count = p->virtio.resetting || p->virtio.queue[0].broken ? 0 : (u16)p->in_flight;

    if (!stream_section(s, "virtio_9p", 1))
        return;
    virtio_state(&p->virtio, s);
    stream_u64(s, &instance);
    stream_u16(s, &count);
    if (!s->load) {
        for (unsigned i = 0; count && i < QUEUE_SIZE; i++)
            if (p->request[i].busy)
                virtq_chain_state(&p->virtio.queue[0], &p->request[i].chain, s);
    } else if (!s->error) {
        if (instance != p->instance)
            p9_forget(p->server);
        load_in_flight(p, s, count);
    }
}

static void p9_dev_destroy(struct virtio_9p *p)
{
    for (unsigned i = 0; i < QUEUE_SIZE; i++)
        virtq_chain_free(&p->request[i].chain);
    free(p);
}

/* A host that does not answer may write into the buffers for ever: they stay. */
static void p9_dev_free(struct device *d)
{
    struct virtio_9p *p = container_of(d, struct virtio_9p, virtio.device);

    if (!p9_close(p->server)) {
        lock(p);
        p->gone = true;
        p->virtio.ram->pinned = true;
        unlock(p);
        return;
    }
    virtio_destroy(&p->virtio);
    pthread_cond_destroy(&p->idle);
    p9_dev_destroy(p);
}

static const struct device_ops device_ops = {
    .name = "virtio_9p", .reset = p9_dev_reset, .quiesce = p9_dev_quiesce, .state = p9_dev_state, .free = p9_dev_free
};
static const struct virtio_ops virtio_ops = { .kick = on_kick, .stop = on_stop };

static int init(struct virtio_9p *p, struct ram *ram, const struct log *log)
{
    u16 size[1] = { QUEUE_SIZE };

    if (getrandom(&p->instance, sizeof(p->instance), 0) != sizeof(p->instance))
        return err(-EIO, "virtio_9p: no random number to be had");
    return virtio_init(&p->virtio, &device_ops, &virtio_ops, VIRTIO_ID_9P, ram, log, BIT(VIRTIO_9P_MOUNT_TAG), &p->config,
                       sizeof(p->config.tag_len) + p->config.tag_len, size, 1);
}

int virtio_9p_new(struct ram *ram, const struct log *log, struct p9 *server, const char *tag, struct virtio_9p **out)
{
    struct virtio_9p *p = calloc(1, sizeof(*p));
    pthread_condattr_t attr;
    int r = -ENOMEM;

    if (p) {
        p->server = server;
        p->config.tag_len = (u16)strnlen(tag, sizeof(p->config.tag));
        memcpy(p->config.tag, tag, p->config.tag_len);
        r = init(p, ram, log);
    }
    if (r < 0) {
        p9_close(server);
        free(p);
        return r == -ENOMEM ? err(r, "virtio_9p: out of memory") : r;
    }
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&p->idle, &attr);
    pthread_condattr_destroy(&attr);
    for (unsigned i = QUEUE_SIZE; i--;) {
        p->request[i].dev = p;
        p->request[i].p9.done = done;
        release(&p->request[i]);
    }
    *out = p;
    return 0;
}
