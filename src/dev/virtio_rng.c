/*
 * virtio entropy device (virtio 1.2, 5.4): random bytes from the host's getrandom(2), which never runs dry.
 *
 * A request gets at most REQUEST_MAX bytes, so that a huge buffer does not keep the vCPU that notifies; the driver asks again (5.4.6).
 * Locking: the device's lock. There is no configuration space and nothing is ever in flight.
 */
#include "dev/virtio_rng.h"

#include <errno.h>
#include <sys/random.h>

#include "base/err.h"

#define QUEUE_SIZE 64
#define REQUEST_MAX (64 * KiB)

struct virtio_rng {
    struct virtio virtio;
    struct virtq_chain chain;
};

static u32 fill(struct virtq_chain *c)
{
    u32 done = 0;
    u8 buf[256];                                                   /* getrandom() fills so much without interruption */

    while (done < REQUEST_MAX && c->in_len) {
        size_t len = MIN(sizeof(buf), MIN(c->in_len, (u64)REQUEST_MAX - done));

        if (getrandom(buf, len, 0) != (ssize_t)len)
            break;
        done += (u32)virtq_write(c, buf, len);
    }
    return done;
}

static void rng_kick(struct virtio *v, unsigned n)
{
    struct virtio_rng *r = container_of(v, struct virtio_rng, virtio);
    struct virtq *q = &v->queue[n];
    /* A guest that refills the ring from another vCPU as fast as we empty it must not keep this one here for ever: what is over the budget
     * waits for the next notification. */
    unsigned budget = 4u * q->size;

    while (virtio_running(v)) {
        virtq_ignore(q);
        while (budget && virtio_pop(v, n, &r->chain)) {
            budget--;
            virtq_push(q, &r->chain, fill(&r->chain));
        }
        if (!virtq_listen(q) || !budget)
            break;
    }
    virtio_interrupt(v, n);
}

static void rng_reset(struct device *d)
{
    struct virtio *v = container_of(d, struct virtio, device);

    pthread_mutex_lock(&d->lock);
    virtio_device_reset(v);
    pthread_mutex_unlock(&d->lock);
}

static void rng_state(struct device *d, struct stream *s)
{
    virtio_state(container_of(d, struct virtio, device), s);
}

static void rng_free(struct device *d)
{
    struct virtio_rng *r = container_of(d, struct virtio_rng, virtio.device);

    virtio_destroy(&r->virtio);
    virtq_chain_free(&r->chain);
    free(r);
}

static const struct device_ops device_ops = { .name = "virtio_rng", .reset = rng_reset, .state = rng_state, .free = rng_free };
static const struct virtio_ops virtio_ops = { .kick = rng_kick };

int virtio_rng_new(struct ram *ram, const struct log *log, struct virtio_rng **out)
{
    struct virtio_rng *r = calloc(1, sizeof(*r));
    int e;

    if (!r)
        return err(-ENOMEM, "virtio_rng: out of memory");
    e = virtio_init(&r->virtio, &device_ops, &virtio_ops, VIRTIO_ID_RNG, ram, log, 0, NULL, 0, (u16[]){ QUEUE_SIZE }, 1);
    if (e < 0) {
        free(r);
        return e;
    }
    *out = r;
    return 0;
}
