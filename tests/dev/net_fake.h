/*
 * A network back end for tests: what the card sends is kept, what the test injects is delivered, and it can say "not now". All of its own is under its lock.
 */
#pragma once

#include <pthread.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "back/net.h"

#define FAKE_FRAMES 256

struct fake_frame {
    struct virtio_net_hdr hdr;
    unsigned queue;
    size_t len;
    u8 data[NET_FRAME_MAX];
};

struct net_fake {
    struct net net;
    pthread_mutex_t lock;
    struct fake_frame sent[FAKE_FRAMES], in[FAKE_FRAMES];
    unsigned sents, ins, taken;                                    /* taken: of in[], delivered */
    bool refuse, hold;                                             /* send() says "not now"; send() does not come back */
    bool holding;
    unsigned offloads;
};

static inline bool fake_send(struct net *n, const struct net_frame *f)
{
    struct net_fake *k = container_of(n, struct net_fake, net);
    struct fake_frame *s;

    pthread_mutex_lock(&k->lock);
    while (k->hold) {
        k->holding = true;
        pthread_mutex_unlock(&k->lock);
        usleep(100);
        pthread_mutex_lock(&k->lock);
    }
    k->holding = false;
    if (k->refuse) {
        pthread_mutex_unlock(&k->lock);
        return false;
    }
    s = &k->sent[k->sents % FAKE_FRAMES];
    s->hdr = f->hdr;
    s->queue = f->queue;
    s->len = net_copy(f, 0, s->data, sizeof(s->data));
    bug_on(s->len != f->len);
    k->sents++;
    pthread_mutex_unlock(&k->lock);
    return true;
}

static inline void fake_prepare(struct net *n, struct net_poll *p)
{
    struct net_fake *k = container_of(n, struct net_fake, net);

    pthread_mutex_lock(&k->lock);
    if (k->taken < k->ins && !net_full(n))
        net_poll_timeout(p, 0);
    pthread_mutex_unlock(&k->lock);
}

static inline void fake_serve(struct net *n, struct net_poll *p UNUSED)
{
    struct net_fake *k = container_of(n, struct net_fake, net);

    while (!net_full(n)) {
        struct fake_frame *s;
        struct iovec iov[2];

        pthread_mutex_lock(&k->lock);
        s = k->taken < k->ins ? &k->in[k->taken++ % FAKE_FRAMES] : NULL;
        pthread_mutex_unlock(&k->lock);
        if (!s)
            return;
        iov[0] = (struct iovec){ s->data, MIN(s->len, (size_t)50) };
        iov[1] = (struct iovec){ s->data + iov[0].iov_len, s->len - iov[0].iov_len };
        net_deliver(n, &(struct net_frame){ .hdr = s->hdr, .iov = iov, .iovs = 2, .len = s->len, .queue = s->queue });
    }
}

static inline void fake_guest_takes(struct net *n, unsigned offloads)
{
    struct net_fake *k = container_of(n, struct net_fake, net);

    pthread_mutex_lock(&k->lock);
    k->offloads = offloads;
    pthread_mutex_unlock(&k->lock);
}

static inline void fake_close(struct net *n)
{
    struct net_fake *k = container_of(n, struct net_fake, net);

    pthread_mutex_destroy(&k->lock);
    free(k);
}

/* takes: NET_*, of what the guest may leave undone. */
static inline struct net_fake *fake_new(unsigned takes)
{
    static const struct net_ops ops[2] = {
        { .kind = "fake", .send = fake_send, .prepare = fake_prepare, .serve = fake_serve, .guest_takes = fake_guest_takes, .close = fake_close },
        { .kind = "fake", .send = fake_send, .prepare = fake_prepare, .serve = fake_serve, .guest_takes = fake_guest_takes, .close = fake_close,
          .takes = NET_CSUM | NET_TSO4 | NET_TSO6 },
    };
    struct net_fake *k = calloc(1, sizeof(*k));

    bug_on(!k);
    net_init(&k->net, &ops[takes != 0], &(struct net_config){ 0 }, "fake");
    pthread_mutex_init(&k->lock, NULL);
    return k;
}

static inline void fake_inject(struct net_fake *k, const struct virtio_net_hdr *hdr, unsigned queue, const void *data, size_t len)
{
    struct fake_frame *s;

    pthread_mutex_lock(&k->lock);
    bug_on(k->ins - k->taken == FAKE_FRAMES);
    s = &k->in[k->ins % FAKE_FRAMES];
    s->hdr = hdr ? *hdr : (struct virtio_net_hdr){ 0 };
    s->queue = queue;
    s->len = len;
    memcpy(s->data, data, len);
    k->ins++;
    pthread_mutex_unlock(&k->lock);
    net_kick(&k->net);
}

static inline unsigned fake_sents(struct net_fake *k)
{
    unsigned n;

    pthread_mutex_lock(&k->lock);
    n = k->sents;
    pthread_mutex_unlock(&k->lock);
    return n;
}

/* Waits until n frames were sent in all; false after many seconds. */
static inline bool fake_wait(struct net_fake *k, unsigned n)
{
    for (unsigned i = 0; i < 200000 && fake_sents(k) < n; i++)
        usleep(100);
    return fake_sents(k) >= n;
}
