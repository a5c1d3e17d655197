/*
 * The thread of a network back end (net.h): a loop around poll(2), since the descriptors of user-mode networking change with every round.
 *
 * A wake-up costs a system call only when the thread sleeps: it says so before it looks at the requests for the last time, and whoever makes a request looks at
 * that behind it. `request` and `sleeping` are sequentially consistent for that reason. All else in struct net_thread belongs to the thread,
 * but for the counters, single words that others read.
 */
#define _GNU_SOURCE
#include "back/net.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "back/capture.h"
#include "back/net_offload.h"
#include "base/thread.h"

#define WAITING_FRAMES 1024                                        /* for the guest, at most */
#define WAITING_BYTES (4 * MiB)

enum { REQUEST_TRANSMIT = 1, REQUEST_RECEIVE = 2, REQUEST_OFFLOADS = 4, REQUEST_END = 8 };

struct waiting {
    struct waiting *next;
    struct net_frame frame;
    struct iovec iov;
    u8 data[];
};

struct net_thread {
    struct net *net;
    const struct net_front_ops *front_ops;
    void *front;
    struct capture *capture;
    unsigned capture_id;
    pthread_t thread;
    int wake;
    atomic_uint request;
    atomic_bool sleeping;
    struct net_poll poll;
    struct waiting *first, **last;
    unsigned frames;
    size_t bytes;
    bool received;                                                 /* the front end took frames since it was last told */
    const void *refused;                                           /* the frame that the back end would not take the last time: recorded already */
    struct net_counts counts;
    u8 whole[NET_FRAME_MAX], part[NET_FRAME_MAX];                  /* a frame in one piece, and what is made of it */
};

static void add(u64 *counter, u64 n)
{
    __atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

size_t net_copy(const struct net_frame *f, size_t off, void *buf, size_t len)
{
    size_t done = 0;

    for (unsigned i = 0; i < f->iovs && done < len; i++) {
        size_t n = f->iov[i].iov_len, skip = MIN(off, n);

        off -= skip;
        n = MIN(n - skip, len - done);
        memcpy((u8 *)buf + done, (u8 *)f->iov[i].iov_base + skip, n);
        done += n;
    }
    return done;
}

/* --- requests, from any thread --- */

static void request(struct net *n, unsigned what)
{
    struct net_thread *t = n->thread;
    u64 one = 1;

    atomic_fetch_or(&t->request, what);
    if (atomic_load(&t->sleeping) && atomic_exchange(&t->sleeping, false)) {
        ssize_t r UNUSED = write(t->wake, &one, sizeof(one));      /* cannot overflow: read before the next one */
    }
}

void net_kick(struct net *n)
{
    request(n, REQUEST_TRANSMIT);
}

void net_receive_ready(struct net *n)
{
    request(n, REQUEST_RECEIVE);
}

void net_guest_takes(struct net *n, unsigned offloads)
{
    atomic_store(&n->guest, offloads);
    request(n, REQUEST_OFFLOADS);
}

void net_set_link(struct net *n, bool up)
{
    atomic_store(&n->link, up);
}

struct net_counts net_counts(const struct net *n)
{
    struct net_counts c = { 0 };
    const u64 *from = (const u64 *)&n->thread->counts;

    for (unsigned i = 0; i < sizeof(c) / sizeof(u64); i++)
        ((u64 *)&c)[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    return c;
}

/* --- to the host --- */

static void record(struct net_thread *t, const struct net_frame *f, enum capture_direction direction)
{
    if (t->capture)
        capture_frame(t->capture, t->capture_id, direction, f->iov, f->iovs, f->len);
}

static void send_part(void *arg, const u8 *frame, size_t len)
{
    struct net *n = arg;
    struct iovec iov = { (u8 *)frame, len };

    n->ops->send(n, &(struct net_frame){ .iov = &iov, .iovs = 1, .len = len });  /* not now: lost, as any frame may be */
}

/* What the back end does not take is done here, on a copy. */
static bool send_finished(struct net *n, const struct net_frame *f)
{
    struct net_thread *t = n->thread;
    struct iovec iov = { t->whole, f->len };
    struct net_frame done = { .iov = &iov, .iovs = 1, .len = f->len, .queue = f->queue };
    bool segment = f->hdr.gso_type != VIRTIO_NET_HDR_GSO_NONE;

    net_copy(f, 0, t->whole, f->len);
    if (segment && f->len > n->ops->large) {
        if (!net_segment(t->whole, f->len, f->hdr.gso_size, t->part, send_part, n))
            add(&t->counts.sent_dropped, 1);
        return true;
    }
    net_finish_checksum(t->whole, f->len, &f->hdr);
    return n->ops->send(n, &done);
}

static unsigned left_undone(const struct virtio_net_hdr *h)
{
    switch (h->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_TCPV4: return NET_CSUM | NET_TSO4;
    case VIRTIO_NET_HDR_GSO_TCPV6: return NET_CSUM | NET_TSO6;
    default: return h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM ? NET_CSUM : 0;
    }
}

bool net_send(struct net *n, const struct net_frame *f)
{
    struct net_thread *t = n->thread;
    bool sent = true;

    if (f->len < NET_HEADER || f->len > NET_FRAME_MAX || !net_header_valid(&f->hdr, f->len) || !atomic_load(&n->link)) {
        add(&t->counts.sent_dropped, 1);
        return true;
    }
    if (t->refused != f->iov->iov_base)
        record(t, f, CAPTURE_FROM_GUEST);                          /* before what it brings about */
    if (left_undone(&f->hdr) & ~n->ops->takes)
        sent = send_finished(n, f);
    else
        sent = n->ops->send(n, f);
    t->refused = sent ? NULL : f->iov->iov_base;
    if (sent) {
        add(&t->counts.sent, 1);
        add(&t->counts.sent_bytes, f->len);
    }
    return sent;
}

/* --- to the guest --- */

bool net_full(const struct net *n)
{
    return n->thread->first;
}

static bool hand_over(struct net_thread *t, const struct net_frame *f)
{
    if (!t->front_ops->receive(t->front, f))
        return false;
    t->received = true;
    return true;
}

static bool keep(struct net_thread *t, const struct net_frame *f)
{
    struct waiting *w;

    if (t->frames == WAITING_FRAMES || t->bytes + f->len > WAITING_BYTES || !(w = malloc(sizeof(*w) + f->len)))
        return false;
    *w = (struct waiting){ .frame = *f };
    w->iov = (struct iovec){ w->data, f->len };
    w->frame.iov = &w->iov;
    w->frame.iovs = 1;
    net_copy(f, 0, w->data, f->len);
    *t->last = w;
    t->last = &w->next;
    t->frames++;
    t->bytes += f->len;
    return true;
}

void net_deliver(struct net *n, const struct net_frame *f)
{
    struct net_thread *t = n->thread;

    if (!t)
        return;                                                    /* before it starts, or when it has ended */
    if (f->len < NET_HEADER || f->len > NET_FRAME_MAX || !atomic_load(&n->link)) {
        add(&t->counts.received_dropped, 1);
        return;
    }
    record(t, f, CAPTURE_TO_GUEST);
    if ((t->first || !hand_over(t, f)) && !keep(t, f)) {
        add(&t->counts.received_dropped, 1);
        return;
    }
    add(&t->counts.received, 1);
    add(&t->counts.received_bytes, f->len);
}

void net_lost(struct net *n)
{
    if (n->thread)
        n->thread->front_ops->present(n->thread->front, false);
}

void net_found(struct net *n)
{
    if (n->thread)
        n->thread->front_ops->present(n->thread->front, true);
}

static void drop_first(struct net_thread *t)
{
    struct waiting *w = t->first;

    t->first = w->next;
    if (!t->first)
        t->last = &t->first;
    t->frames--;
    t->bytes -= w->frame.len;
    free(w);
}

static void deliver_waiting(struct net_thread *t)
{
    while (t->first && hand_over(t, &t->first->frame))
        drop_first(t);
}

/* --- the thread --- */

unsigned net_poll_add(struct net_poll *p, int fd, short events)
{
    if (p->fds == p->cap) {
        unsigned cap = p->cap ? 2 * p->cap : 32;
        struct pollfd *more = realloc(p->fd, cap * sizeof(*more));

        bug_on(!more);                                             /* a few KiB: nothing sensible is left to do without */
        p->fd = more;
        p->cap = cap;
    }
    p->fd[p->fds] = (struct pollfd){ .fd = fd, .events = events };
    return p->fds++;
}

void net_poll_timeout(struct net_poll *p, int ms)
{
    if (p->timeout_ms < 0 || ms < p->timeout_ms)
        p->timeout_ms = ms;
}

static void tell_received(struct net_thread *t)
{
    if (t->received)
        t->front_ops->received(t->front);
    t->received = false;
}

static void wait_for(struct net_thread *t)
{
    struct net_poll *p = &t->poll;
    u64 count;

    atomic_store(&t->sleeping, true);
    if (atomic_load(&t->request)) {
        p->timeout_ms = 0;
        atomic_store(&t->sleeping, false);
    }
    while (poll(p->fd, p->fds, p->timeout_ms) < 0)
        for (unsigned i = 0; i < p->fds; i++)                      /* EINTR and ENOMEM alike: nothing has happened, look again */
            p->fd[i].revents = 0;
    atomic_store(&t->sleeping, false);
    if (p->fd[0].revents & POLLIN) {
        ssize_t r UNUSED = read(t->wake, &count, sizeof(count));
    }
}

static void *work(void *arg)
{
    struct net_thread *t = arg;
    struct net *n = t->net;
    unsigned what;

    while (!((what = atomic_exchange(&t->request, 0)) & REQUEST_END)) {
        if ((what & REQUEST_OFFLOADS) && n->ops->guest_takes)
            n->ops->guest_takes(n, atomic_load(&n->guest));
        if (what & REQUEST_TRANSMIT)
            t->front_ops->transmit(t->front);
        if (what & (REQUEST_RECEIVE | REQUEST_OFFLOADS))
            deliver_waiting(t);
        tell_received(t);
        t->poll.fds = 0;
        t->poll.timeout_ms = -1;
        net_poll_add(&t->poll, t->wake, POLLIN);
        n->ops->prepare(n, &t->poll);
        wait_for(t);
        n->ops->serve(n, &t->poll);
        tell_received(t);
    }
    return NULL;
}

static int start_thread(struct net_thread *t)
{
    int e = thread_start(&t->thread, work, t);

    if (e)
        return err(-e, "network %s: cannot start a thread: %s; raise the limit on processes (ulimit -u)", t->net->name, strerror(e));
    return 0;
}

static void free_thread(struct net_thread *t)
{
    while (t->first)
        drop_first(t);
    if (t->wake >= 0)
        close(t->wake);
    free(t->poll.fd);
    free(t);
}

int net_start(struct net *n, const struct net_front_ops *ops, void *front, struct capture *capture, unsigned capture_id)
{
    struct net_thread *t = calloc(1, sizeof(*t));
    int r = 0;

    if (!t)
        return err(-ENOMEM, "network %s: out of memory", n->name);
    *t = (struct net_thread){ .net = n, .front_ops = ops, .front = front, .capture = capture, .capture_id = capture_id };
    t->last = &t->first;
    t->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    n->thread = t;
    if (t->wake < 0)
        r = err(-errno, "network %s: %s; raise the limit of open files (ulimit -n)", n->name, strerror(errno));
    if (r == 0)
        r = start_thread(t);
    if (r < 0) {
        free_thread(t);
        n->thread = NULL;
    }
    return r;
}

void net_close(struct net *n)
{
    if (!n)
        return;
    if (n->thread) {
        request(n, REQUEST_END);
        pthread_join(n->thread->thread, NULL);
        free_thread(n->thread);
        n->thread = NULL;
    }
    n->ops->close(n);
}

void net_init(struct net *n, const struct net_ops *ops, const struct net_config *c, const char *name)
{
    *n = (struct net){ .ops = ops, .log = c->log, .queues = 1, .mtu = c->mtu ? c->mtu : NET_MTU };
    snprintf(n->name, sizeof(n->name), "%s", name);
    atomic_init(&n->link, true);
}
