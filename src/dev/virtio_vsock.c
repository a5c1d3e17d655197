/*
 * virtio sockets (see virtio_vsock.h; virtio 1.2, 5.10): streams and, if the driver has asked for them, messages (SEQPACKET). A connection is a file descriptor and two
 * counts of bytes.
 *
 * Queues: 0 to the guest, 1 from the guest, 2 events. The vCPU that notifies posts service() to the loop; packets, descriptors and their
 * readiness are all seen to there; but for send_at_once(), which spares a dialogue the way over the loop.
 *
 *   CALLED_BY_HOST   a client has named a port of the guest: REQUEST was or is to be sent         -> OPEN by RESPONSE
 *   CALLED_BY_GUEST  the guest has called another guest, whose answer is awaited                   -> OPEN by "OK"
 *   OPEN             data both ways, until each side has said that it sends (receives) no more
 *   CLOSING          the descriptor is closed; RST is still to be said
 *   DRAINING         the guest knows it no more; what it had sent is still on its way to the host
 *
 * Credit (5.10.6.3): towards the guest no more is read from the descriptor than the guest has announced room for. From the guest at most
 * VSOCK_BUF_ALLOC bytes wait for the host's reader; a guest that sends more than that breaks the rules, and its connection is reset.
 *
 * Messages (5.10.6.6.2): see virtio_vsock_seq.c.
 *
 * What is to be said on a connection is a set of bits, so it cannot grow. Answers to packets that belong to no connection wait in a small
 * ring; while that is full, and the guest offers no buffers, nothing is taken from it (5.10.6.1.1).
 *
 * A saved state has no connections: what it is loaded into tells its guest that all are lost (5.10.6.7), except where it is the very
 * device that was saved, and nothing has happened since (a change of engines).
 *
 * Left out: legacy drivers (there are none).
 *
 * Locking: the device's lock guards everything. Nothing here waits while it is held: descriptors do not block.
 */
#include <errno.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "dev/virtio_vsock_int.h"

#define VIRTIO_VSOCK_F_STREAM 0                                    /* 5.10.3; not in the Linux header */
#define QUEUE_SIZE 256
#define EVENT_QUEUE_SIZE 16
#define CHAINS_PER_TURN 256                                        /* from the guest, before the loop sees to others */
#define AT_ONCE_PACKETS 8
#define AT_ONCE_MAX 4096                                           /* bytes: less than a wake-up costs */

static void service(struct virtio_vsock *v);

static void run_service(void *arg)
{
    struct virtio_vsock *v = arg;

    vsock_lock(v);
    v->posted = false;
    service(v);
    vsock_unlock(v);
}

/* Under the lock, any thread. */
void vsock_post(struct virtio_vsock *v)
{
    if (v->posted)
        return;
    v->posted = true;
    loop_post(v->loop, run_service, v);
}

/* --- packets from the guest --- */

/* Of a type that there is, as the driver knows it. */
static bool known_type(const struct virtio_vsock *v, u16 type)
{
    return type == VIRTIO_VSOCK_TYPE_STREAM || (type == VIRTIO_VSOCK_TYPE_SEQPACKET && virtio_has(&v->virtio, VIRTIO_VSOCK_F_SEQPACKET));
}

static void answer_reset(struct virtio_vsock *v, const struct vsock_address *at, u16 type)
{
    unsigned i = (v->reset_head + v->resets) % VSOCK_RESETS_MAX;

    bug_on(v->resets == VSOCK_RESETS_MAX);
    v->reset[i].at = *at;
    v->reset[i].type = known_type(v, type) ? type : VIRTIO_VSOCK_TYPE_STREAM;
    v->resets++;
}

static void guest_calls(struct virtio_vsock *v, const struct vsock_address *at, const struct virtio_vsock_hdr *h)
{
    enum vsock_kind kind = h->type == VIRTIO_VSOCK_TYPE_SEQPACKET ? VSOCK_MESSAGES : VSOCK_STREAM;
    int fd = v->conns < VSOCK_CONNS_MAX ? vsock_host_call(v->host, at->cid, at->guest_port, at->port, &kind) : -EMFILE;
    struct vsock_conn *c = fd >= 0 ? vsock_conn_new(v, at, fd, at->cid == VSOCK_CID_HOST ? OPEN : CALLED_BY_GUEST, kind) : NULL;

    if (!c) {
        answer_reset(v, at, h->type);
        return;
    }
    c->guest_alloc = h->buf_alloc;
    c->guest_fwd = h->fwd_cnt;
    if (c->state == OPEN)
        vsock_say(c, SAY_RESPONSE);
    vsock_rewatch(c);
}

static void guest_accepts(struct vsock_conn *c)
{
    if (c->state != CALLED_BY_HOST || vsock_host_accepted(c->fd, c->at.port) < 0) {
        vsock_finish(c);
        return;
    }
    c->state = OPEN;
}

/* What it had sent still belongs to the host, if it had said that it was all. */
static void guest_resets(struct vsock_conn *c)
{
    if (c->state != OPEN || !c->len || !(c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND)) {
        vsock_conn_free(c);
        return;
    }
    vsock_conn_unhash(c);
    c->state = DRAINING;
    c->say = 0;
    vsock_rewatch(c);
}

static void guest_shuts(struct vsock_conn *c, u32 flags)
{
    if (c->state != OPEN) {
        vsock_finish(c);
        return;
    }
    c->guest_shut |= flags & VSOCK_SHUT_BOTH;
    vsock_check_ends(c);
}

static void take_credit(struct vsock_conn *c, const struct virtio_vsock_hdr *h)
{
    c->guest_alloc = h->buf_alloc;
    c->guest_fwd = h->fwd_cnt;
    c->asked &= !vsock_credit(c);
}

static void conn_packet(struct vsock_conn *c, const struct virtio_vsock_hdr *h, struct virtq_chain *chain)
{
    take_credit(c, h);
    switch (h->op) {
    case VIRTIO_VSOCK_OP_RESPONSE: guest_accepts(c); break;
    case VIRTIO_VSOCK_OP_SHUTDOWN: guest_shuts(c, h->flags); break;
    case VIRTIO_VSOCK_OP_RW: vsock_guest_data(c, chain, h->len, h->flags); break;
    case VIRTIO_VSOCK_OP_CREDIT_UPDATE: break;
    case VIRTIO_VSOCK_OP_CREDIT_REQUEST: vsock_say(c, SAY_CREDIT); break;
    case VIRTIO_VSOCK_OP_RST: guest_resets(c); return;
    default: vsock_finish(c);                                      /* a second REQUEST, or nothing that there is */
    }
    if (c->state == OPEN && c->stuck && vsock_may_go_on(c)) {
        c->stuck = false;
        vsock_to_guest(c);
    }
    vsock_rewatch(c);
}

static void packet(struct virtio_vsock *v, struct virtq_chain *chain)
{
    struct virtio_vsock_hdr h;

    if (virtq_read(chain, &h, sizeof(h)) != sizeof(h) || (h.op == VIRTIO_VSOCK_OP_RW && h.len > chain->out_len)) {
        virtio_break(&v->virtio, "a packet is shorter than it says");
        return;
    }
    struct vsock_address at = { .cid = (u32)h.dst_cid, .port = h.dst_port, .guest_port = h.src_port };
    struct vsock_conn *c = vsock_conn_find(v, &at);

    v->events++;
    if (h.src_cid != v->config.guest_cid || h.dst_cid > UINT32_MAX)
        return;                                                    /* 5.10.6.4.2: not its address; nobody to answer to */
    if (c && c->state == CLOSING) {                                /* RST is on its way already */
        if (h.op == VIRTIO_VSOCK_OP_RST)
            vsock_conn_free(c);
    } else if (c && h.type != (c->seq ? VIRTIO_VSOCK_TYPE_SEQPACKET : VIRTIO_VSOCK_TYPE_STREAM)) {
        vsock_finish(c);
    } else if (c) {
        conn_packet(c, &h, chain);
    } else if (h.op == VIRTIO_VSOCK_OP_REQUEST && known_type(v, h.type)) {
        guest_calls(v, &at, &h);
    } else if (h.op != VIRTIO_VSOCK_OP_RST) {
        answer_reset(v, &at, h.type);
    }
}

static void from_guest(struct virtio_vsock *v)
{
    struct virtq *q = &v->virtio.queue[VSOCK_TX];
    unsigned budget = CHAINS_PER_TURN;

    while (virtio_running(&v->virtio)) {
        virtq_ignore(q);
        while (budget && v->resets < VSOCK_RESETS_MAX && virtio_pop(&v->virtio, VSOCK_TX, &v->tx)) {
            budget--;
            v->counts.sent++;
            packet(v, &v->tx);
            virtq_push(q, &v->tx, 0);
        }
        if (v->resets == VSOCK_RESETS_MAX && !vsock_say_all(v))
            break;                                                 /* until the guest has buffers: it notifies us of them */
        if (!budget) {
            vsock_post(v);
            break;
        }
        if (!virtq_listen(q))
            break;
    }
    virtio_interrupt(&v->virtio, VSOCK_TX);
}

/* --- on a vCPU's thread --- */

/*
 * For an open connection: credit that nothing waits for, or the first data, and not much of it, since the host has sent some. So the descriptor may be left as it is, which is the
 * loop's. More data would hold the vCPU up, and goes better by the loop, whose batches take fewer exits.
 */
static bool simple(const struct virtio_vsock *v, const struct vsock_conn *c, const struct virtio_vsock_hdr *h, const struct virtq_chain *chain)
{
    if (!c || c->state != OPEN || c->seq || c->stuck || h->type != VIRTIO_VSOCK_TYPE_STREAM || h->src_cid != v->config.guest_cid || h->dst_cid > UINT32_MAX)
        return false;
    return h->op == VIRTIO_VSOCK_OP_CREDIT_UPDATE ||
           (h->op == VIRTIO_VSOCK_OP_RW && h->len <= MIN(chain->out_len, (u64)AT_ONCE_MAX) && c->answers && !c->len && !c->write_ended &&
            !(c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND));
}

/* False: the packet waits as it did. */
static bool packet_at_once(struct virtio_vsock *v)
{
    struct virtio_vsock_hdr h = { 0 };
    struct vsock_address at;
    struct vsock_conn *c;

    virtq_read(&v->tx, &h, sizeof(h));
    at = (struct vsock_address){ .cid = (u32)h.dst_cid, .port = h.dst_port, .guest_port = h.src_port };
    c = vsock_conn_find(v, &at);
    if (!simple(v, c, &h, &v->tx) || !vsock_keep(c, &v->tx, 0)) {  /* there is memory for what does not go out */
        virtq_unpop(&v->virtio.queue[VSOCK_TX], &v->tx);
        return false;
    }
    v->events++;
    v->counts.sent++;
    take_credit(c, &h);
    if (h.op == VIRTIO_VSOCK_OP_RW) {
        c->answers = false;
        vsock_guest_data(c, &v->tx, h.len, h.flags);
        c->late = c->len;
        v->late |= c->late;
    }
    virtq_push(&v->virtio.queue[VSOCK_TX], &v->tx, 0);
    return true;
}

/*
 * In a dialogue, a guest that answers spares waking up the loop's thread, and then a vCPU, which may have halted, by the interrupt of the loop's. (Linux tells of credit whenever
 * a program has read all that there was.) False: the loop is to look.
 */
static bool send_at_once(struct virtio_vsock *v)
{
    unsigned sent = 0;

    if (v->posted)
        return false;
    while (sent < AT_ONCE_PACKETS && virtio_pop(&v->virtio, VSOCK_TX, &v->tx) && packet_at_once(v))
        sent++;
    if (sent)
        virtio_interrupt(&v->virtio, VSOCK_TX);
    return virtio_running(&v->virtio) && !virtq_listen(&v->virtio.queue[VSOCK_TX]) && !v->late;
}

static void rewatch_late(struct virtio_vsock *v)
{
    for (struct vsock_conn *c = v->late ? v->first : NULL, *next; c; c = next) {
        next = c->next;
        if (c->late)
            vsock_rewatch(c);
        c->late = false;
    }
    v->late = false;
}

/* --- the device --- */

/* Nothing is left that the guest knows of. What it had sent still goes to the host. */
static void drop_all(struct virtio_vsock *v)
{
    struct vsock_conn *c, *next;

    v->resets = 0;
    v->events++;
    for (c = v->first; c; c = next) {
        next = c->next;
        if (c->state == DRAINING)
            continue;
        if (c->state == OPEN && c->len) {
            vsock_conn_unhash(c);
            c->state = DRAINING;
            c->say = 0;
            vsock_rewatch(c);
        } else {
            vsock_conn_free(c);
        }
    }
}

static void say_lost(struct virtio_vsock *v)
{
    struct virtio_vsock_event e = { .id = VIRTIO_VSOCK_EVENT_TRANSPORT_RESET };

    if (!v->say_lost || !vsock_pop_or_listen(v, VSOCK_EVENTS, &v->rx))
        return;
    v->say_lost = false;
    virtq_push(&v->virtio.queue[VSOCK_EVENTS], &v->rx, (u32)virtq_write(&v->rx, &e, sizeof(e)));
    virtio_interrupt(&v->virtio, VSOCK_EVENTS);
}

/* With the lock held, on the loop's thread. */
static void service(struct virtio_vsock *v)
{
    if (v->virtio.resetting) {
        drop_all(v);
        virtio_stopped(&v->virtio);
        return;
    }
    if (!virtio_running(&v->virtio))
        return;
    say_lost(v);
    rewatch_late(v);
    from_guest(v);
    if (vsock_say_all(v) && v->starved)
        vsock_feed_stuck(v);
    virtio_interrupt(&v->virtio, VSOCK_RX);
}

static void vsock_kick(struct virtio *virtio, unsigned n)
{
    struct virtio_vsock *v = container_of(virtio, struct virtio_vsock, virtio);

    v->counts.notifications++;
    if (n == VSOCK_TX ? !send_at_once(v) : n != VSOCK_RX || v->starved)
        vsock_post(v);
}

/* Connections are the loop's. */
static bool vsock_stop(struct virtio *v)
{
    if (!(v->status & VIRTIO_CONFIG_S_DRIVER_OK))
        return true;                                               /* it was never used */
    vsock_post(container_of(v, struct virtio_vsock, virtio));
    return false;
}

static void vsock_reset(struct device *d)
{
    struct virtio_vsock *v = container_of(d, struct virtio_vsock, virtio.device);

    vsock_lock(v);
    drop_all(v);
    v->say_lost = v->starved = false;
    virtio_device_reset(&v->virtio);
    vsock_unlock(v);
}

/* On the loop's thread: what the guest has sent goes to the host. */
static void vsock_quiesce(struct device *d)
{
    struct virtio_vsock *v = container_of(d, struct virtio_vsock, virtio.device);

    vsock_lock(v);
    service(v);
    vsock_unlock(v);
}

static void vsock_state(struct device *d, struct stream *s)
{
    struct virtio_vsock *v = container_of(d, struct virtio_vsock, virtio.device);
    u64 instance = v->instance, events = v->events;

    if (!stream_section(s, "virtio_vsock", 1))
        return;
    stream_u64(s, &instance);
    stream_u64(s, &events);
    stream_bool(s, &v->say_lost);
    virtio_state(&v->virtio, s);
    if (!s->load || s->error || (instance == v->instance && events == v->events))
        return;
    drop_all(v);
    v->say_lost = true;
    vsock_post(v);
}

static void vsock_free(struct device *d)
{
    struct virtio_vsock *v = container_of(d, struct virtio_vsock, virtio.device);

    loop_unpost(v->loop, run_service, v);
    vsock_host_serve(v->host, NULL, NULL);
    while (v->first)
        vsock_conn_free(v->first);
    virtio_destroy(&v->virtio);
    virtq_chain_free(&v->tx);
    virtq_chain_free(&v->rx);
    free(v);
}

static const struct device_ops device_ops = {
    .name = "virtio_vsock", .reset = vsock_reset, .quiesce = vsock_quiesce, .state = vsock_state, .free = vsock_free
};
static const struct virtio_ops virtio_ops = { .kick = vsock_kick, .stop = vsock_stop };
static const struct vsock_host_ops host_ops = { .incoming = vsock_incoming };

struct virtio_vsock_counts virtio_vsock_counts(struct virtio_vsock *v)
{
    struct virtio_vsock_counts c;

    vsock_lock(v);
    c = v->counts;
    vsock_unlock(v);
    return c;
}

unsigned virtio_vsock_conns(struct virtio_vsock *v)
{
    unsigned n;

    vsock_lock(v);
    n = v->conns;
    vsock_unlock(v);
    return n;
}

int virtio_vsock_new(struct ram *ram, const struct log *log, struct loop *loop, struct vsock_host *host, struct virtio_vsock **out)
{
    static const u16 size[] = { [VSOCK_RX] = QUEUE_SIZE, [VSOCK_TX] = QUEUE_SIZE, [VSOCK_EVENTS] = EVENT_QUEUE_SIZE };
    struct virtio_vsock *v = calloc(1, sizeof(*v));
    int r = -ENOMEM;

    if (v)
        r = virtio_init(&v->virtio, &device_ops, &virtio_ops, VIRTIO_ID_VSOCK, ram, log, BIT(VIRTIO_VSOCK_F_STREAM) | BIT(VIRTIO_VSOCK_F_SEQPACKET), &v->config,
                        sizeof(v->config), size, ARRAY_SIZE(size));
    if (r < 0) {
        free(v);
        return err(r, "virtio_vsock: out of memory");
    }
    v->loop = loop;
    v->host = host;
    v->config.guest_cid = vsock_host_cid(host);
    r = getrandom(&v->instance, sizeof(v->instance), 0) == sizeof(v->instance) ? 0 : err(-EIO, "virtio_vsock: no random number to be had");
    if (r == 0)
        r = vsock_host_serve(host, &host_ops, v);
    if (r < 0) {
        vsock_free(&v->virtio.device);
        return r;
    }
    *out = v;
    return 0;
}
