/*
 * vsock's connections (see virtio_vsock.c): the table of them, what is awaited of their descriptors, what is to be said on them, packets to the guest, and clients of the host.
 */
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "dev/virtio_vsock_int.h"

#define HOST_PORT_FIRST 0x40000000u                                /* ports that clients of the host seem to have */

/* --- connections --- */

static struct vsock_conn **bucket_of(struct virtio_vsock *v, const struct vsock_address *at)
{
    return &v->bucket[(at->port * 31u + at->guest_port * 7u + at->cid) % VSOCK_BUCKETS];
}

struct vsock_conn *vsock_conn_find(struct virtio_vsock *v, const struct vsock_address *at)
{
    struct vsock_conn *c = *bucket_of(v, at);

    while (c && memcmp(&c->at, at, sizeof(*at)))
        c = c->hash_next;
    return c;
}

static void list_add(struct vsock_conn *c)
{
    struct virtio_vsock *v = c->v;

    c->prev = v->last;
    c->next = NULL;
    *(v->last ? &v->last->next : &v->first) = c;
    v->last = c;
}

static void list_del(struct vsock_conn *c)
{
    struct virtio_vsock *v = c->v;

    *(c->prev ? &c->prev->next : &v->first) = c->next;
    *(c->next ? &c->next->prev : &v->last) = c->prev;
}

void vsock_conn_requeue(struct vsock_conn *c)
{
    list_del(c);
    list_add(c);
}

struct vsock_conn *vsock_conn_new(struct virtio_vsock *v, const struct vsock_address *at, int fd, enum vsock_conn_state state, enum vsock_kind kind)
{
    struct vsock_conn *c = v->conns < VSOCK_CONNS_MAX ? calloc(1, sizeof(*c)) : NULL;

    if (!c) {
        close(fd);
        vsock_host_closed(v->host);
        return NULL;
    }
    *c = (struct vsock_conn){ .v = v, .at = *at, .fd = fd, .state = state, .answers = true, .seq = kind != VSOCK_STREAM, .marked = kind == VSOCK_MARKED, .hash_next = *bucket_of(v, at) };
    *bucket_of(v, at) = c;
    list_add(c);
    v->conns++;
    if (c->seq) {
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &(int){ VSOCK_BUF_ALLOC }, sizeof(int)); /* a message goes at once, or not at all (unix(7)) */
        setsockopt(fd, SOL_SOCKET, SO_TIMESTAMP, &(int){ 1 }, sizeof(int)); /* tells an empty one from the end */
    }
    return c;
}

void vsock_conn_unhash(struct vsock_conn *c)
{
    struct vsock_conn **p = bucket_of(c->v, &c->at);

    while (*p && *p != c)
        p = &(*p)->hash_next;
    if (*p)
        *p = c->hash_next;
}

static void close_fd(struct vsock_conn *c)
{
    loop_fd_del(&c->watch);
    if (c->fd < 0)
        return;
    close(c->fd);
    c->fd = -1;
    vsock_host_closed(c->v->host);
}

void vsock_conn_free(struct vsock_conn *c)
{
    close_fd(c);
    vsock_conn_unhash(c);
    list_del(c);
    c->v->conns--;
    free(c->buf);
    free(c->ends);
    free(c->message);
    free(c);
}

void vsock_say(struct vsock_conn *c, u8 what)
{
    c->say |= what;
    vsock_post(c->v);
}

void vsock_finish(struct vsock_conn *c)
{
    close_fd(c);
    c->state = CLOSING;
    vsock_forget(c);
    c->say = 0;
    vsock_say(c, SAY_RST);
}

void vsock_tell_shut(struct vsock_conn *c, u8 flags)
{
    if ((c->shut | flags) == c->shut)
        return;
    c->shut |= flags;
    vsock_say(c, SAY_SHUTDOWN);
}

/* --- what is awaited of the descriptor --- */

static void on_fd(void *arg, u32 events);

bool vsock_wants_read(const struct vsock_conn *c)
{
    return !c->host_ended && !(c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV) && !c->stuck;
}

/* Hang-ups are reported whether they are asked for or not: while nobody could act on one, the descriptor is not watched at all. */
void vsock_rewatch(struct vsock_conn *c)
{
    u32 want = 0;
    bool on = true;

    switch (c->state) {
    case CALLED_BY_HOST: break;
    case CALLED_BY_GUEST: want = EPOLLIN | EPOLLET; break;         /* a part of a line does not wake us up again */
    case OPEN:
        want = (vsock_wants_read(c) ? EPOLLIN : 0) | ((c->seq ? c->whole : c->len) ? EPOLLOUT : 0);
        on = want || (!c->host_gone && (c->host_ended || (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV)));
        break;
    case CLOSING: on = false; break;
    case DRAINING: want = EPOLLOUT; break;
    }
    if (c->fd < 0 || (c->watch.loop && on && want == c->watched))
        return;
    c->watched = want;
    if (!on)
        loop_fd_del(&c->watch);
    else if (c->watch.loop)
        loop_fd_mod(&c->watch, want);
    else if (loop_fd_add(c->v->loop, &c->watch, c->fd, want, on_fd, c) < 0)
        vsock_finish(c);
}

/* --- packets to the guest --- */

bool vsock_pop_or_listen(struct virtio_vsock *v, unsigned n, struct virtq_chain *c)
{
    while (virtio_running(&v->virtio)) {
        if (virtio_pop(&v->virtio, n, c))
            return true;
        if (!virtq_listen(&v->virtio.queue[n]))
            break;
    }
    return false;
}

bool vsock_take_buffer(struct virtio_vsock *v, u32 len)
{
    if (!vsock_pop_or_listen(v, VSOCK_RX, &v->rx)) {
        v->starved = true;
        return false;
    }
    if (v->rx.in_len >= sizeof(struct virtio_vsock_hdr) + len)
        return true;
    virtq_drop(&v->virtio.queue[VSOCK_RX], &v->rx);
    virtio_break(&v->virtio, "a buffer for packets is too small");
    return false;
}

/* c NULL: there is no connection. */
static void put_packet_at(struct virtio_vsock *v, const struct vsock_address *at, u16 type, const struct vsock_conn *c, u16 op, u32 flags, const void *data, u32 len)
{
    struct virtio_vsock_hdr h = {
        .src_cid = at->cid, .dst_cid = v->config.guest_cid, .src_port = at->port, .dst_port = at->guest_port, .len = len,
        .type = type, .op = op, .flags = flags,
        .buf_alloc = c ? VSOCK_BUF_ALLOC : 0, .fwd_cnt = c ? c->forwarded : 0,
    };

    virtq_write(&v->rx, &h, sizeof(h));
    if (len)
        virtq_write(&v->rx, data, len);
    virtq_push(&v->virtio.queue[VSOCK_RX], &v->rx, (u32)sizeof(h) + len);
    v->events++;
    v->counts.received++;
}

void vsock_put_packet(struct vsock_conn *c, u16 op, u32 flags, const void *data, u32 len)
{
    put_packet_at(c->v, &c->at, c->seq ? VIRTIO_VSOCK_TYPE_SEQPACKET : VIRTIO_VSOCK_TYPE_STREAM, c, op, flags, data, len);
    c->told = c->forwarded;
}

bool vsock_say_one(struct vsock_conn *c, u8 what)
{
    static const struct { u8 say; u16 op; } ops[] = {
        { SAY_REQUEST, VIRTIO_VSOCK_OP_REQUEST }, { SAY_RESPONSE, VIRTIO_VSOCK_OP_RESPONSE },
        { SAY_ASK_CREDIT, VIRTIO_VSOCK_OP_CREDIT_REQUEST }, { SAY_CREDIT, VIRTIO_VSOCK_OP_CREDIT_UPDATE },
        { SAY_SHUTDOWN, VIRTIO_VSOCK_OP_SHUTDOWN }, { SAY_RST, VIRTIO_VSOCK_OP_RST },
    };
    unsigned i = 0;

    while (ops[i].say != what)
        i++;
    if (!vsock_take_buffer(c->v, 0))
        return false;
    vsock_put_packet(c, ops[i].op, what == SAY_SHUTDOWN ? c->shut : 0, NULL, 0);
    c->say &= (u8)~what;
    return true;
}

bool vsock_say_all(struct virtio_vsock *v)
{
    struct vsock_conn *c, *next;

    for (; v->resets; v->resets--, v->reset_head = (v->reset_head + 1) % VSOCK_RESETS_MAX) {
        if (!vsock_take_buffer(v, 0))
            return false;
        put_packet_at(v, &v->reset[v->reset_head].at, v->reset[v->reset_head].type, NULL, VIRTIO_VSOCK_OP_RST, 0, NULL, 0);
    }
    for (c = v->first; c; c = next) {
        next = c->next;
        while (c->say)
            if (!vsock_say_one(c, c->say & -c->say))
                return false;
        if (c->state == CLOSING)
            vsock_conn_free(c);
    }
    return true;
}

/* --- the host's side --- */

static void open_event(struct vsock_conn *c, u32 events)
{
    c->host_gone |= (events & (EPOLLHUP | EPOLLERR)) != 0;
    if (events & (EPOLLOUT | EPOLLERR))
        vsock_flush(c);
    if (c->state == OPEN && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        vsock_to_guest(c);
    if (c->state == OPEN && c->host_gone && (c->host_ended || (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV)))
        vsock_tell_shut(c, VSOCK_SHUT_BOTH);
}

static void answer_event(struct vsock_conn *c, u32 events)
{
    int r = vsock_host_answer(c->fd, c->seq);

    if (r < 0 || (r == 0 && (events & (EPOLLHUP | EPOLLERR)))) {
        vsock_finish(c);
    } else if (r > 0) {
        c->state = OPEN;
        vsock_say(c, SAY_RESPONSE);
    }
}

static void on_fd(void *arg, u32 events)
{
    struct vsock_conn *c = arg;
    struct virtio_vsock *v = c->v;

    vsock_lock(v);
    v->events++;
    if (c->state == DRAINING) {
        vsock_flush(c);                                            /* frees it at its end */
    } else {
        if (c->state == OPEN)
            open_event(c, events);
        else if (c->state == CALLED_BY_GUEST)
            answer_event(c, events);
        else if (events & (EPOLLHUP | EPOLLERR))
            vsock_finish(c);                                       /* the client did not wait for the guest */
        vsock_rewatch(c);
    }
    virtio_interrupt(&v->virtio, VSOCK_RX);
    vsock_unlock(v);
}

/* A port that the guest has no connection with: clients of the host have none of their own. */
static u32 free_port(struct virtio_vsock *v, u32 guest_port)
{
    struct vsock_address at = { .cid = VSOCK_CID_HOST, .guest_port = guest_port };

    do {
        v->next_port = MAX(v->next_port + 1, HOST_PORT_FIRST);
        at.port = v->next_port;
    } while (vsock_conn_find(v, &at));
    return at.port;
}

void vsock_incoming(void *arg, int fd, u32 cid, u32 from, u32 to, enum vsock_kind kind)
{
    struct virtio_vsock *v = arg;
    struct vsock_conn *c = NULL;

    vsock_lock(v);
    struct vsock_address at = { .cid = cid, .port = cid == VSOCK_CID_HOST ? free_port(v, to) : from, .guest_port = to };

    if (virtio_running(&v->virtio) && (kind == VSOCK_STREAM || virtio_has(&v->virtio, VIRTIO_VSOCK_F_SEQPACKET)) && !vsock_conn_find(v, &at)) {
        c = vsock_conn_new(v, &at, fd, CALLED_BY_HOST, kind);
    } else {
        close(fd);
        vsock_host_closed(v->host);
    }
    if (c) {
        vsock_say(c, SAY_REQUEST);
        vsock_rewatch(c);
    }
    vsock_unlock(v);
}
