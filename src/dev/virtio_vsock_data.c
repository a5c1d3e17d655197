/*
 * vsock's data (see virtio_vsock.c): credit both ways (virtio 1.2, 5.10.6.3), and streams.
 */
#include <errno.h>
#include <sys/socket.h>

#include "dev/virtio_vsock_int.h"

#define READS_PER_TURN 32                                          /* of one connection */

/* --- credit, and data to the guest --- */

u32 vsock_credit(const struct vsock_conn *c)
{
    u32 unread = c->sent - c->guest_fwd;

    return unread >= c->guest_alloc ? 0 : c->guest_alloc - unread;
}

bool vsock_may_go_on(const struct vsock_conn *c)
{
    return vsock_credit(c) || (c->message && c->message_at == c->message_len);
}

/* The host's side sends no more: at its end, or by an error, which the guest learns as a reset. */
void vsock_host_ends(struct vsock_conn *c, ssize_t n)
{
    if (n < 0) {
        vsock_finish(c);
        return;
    }
    c->host_ended = true;
    vsock_tell_shut(c, c->host_gone ? VSOCK_SHUT_BOTH : VIRTIO_VSOCK_SHUTDOWN_SEND);
}

u32 vsock_take_room(struct vsock_conn *c)
{
    struct virtio_vsock *v = c->v;
    u32 room = vsock_credit(c);

    if (!room && !c->asked) {
        c->asked = true;
        vsock_say(c, SAY_ASK_CREDIT);
    }
    c->stuck = !room || !vsock_take_buffer(v, 1);
    return c->stuck ? 0 : (u32)MIN(MIN((u64)room, v->rx.in_len - sizeof(struct virtio_vsock_hdr)), (u64)VSOCK_PIECE_MAX);
}

/* One buffer full. False: nothing more to be done now. */
static bool read_once(struct vsock_conn *c)
{
    struct virtio_vsock *v = c->v;
    u32 want = vsock_take_room(c);
    ssize_t n;

    if (!want)
        return false;
    n = recv(c->fd, v->piece, want, MSG_DONTWAIT);
    if (n <= 0) {
        virtq_unpop(&v->virtio.queue[VSOCK_RX], &v->rx);
        if (n == 0 || (errno != EAGAIN && errno != EINTR))
            vsock_host_ends(c, n);
        return false;
    }
    vsock_put_packet(c, VIRTIO_VSOCK_OP_RW, 0, v->piece, (u32)n);
    c->sent += (u32)n;
    c->answers = true;
    return (u32)n == want;
}

void vsock_to_guest(struct vsock_conn *c)
{
    if ((c->say & SAY_RESPONSE) && !vsock_say_one(c, SAY_RESPONSE)) { /* comes before data */
        c->stuck = true;
        return;
    }
    /* A message that has begun goes on to its end, or until there is no room: nothing of the descriptor's would bring us back to it. */
    for (unsigned i = 0; (i < READS_PER_TURN || c->message) && c->state == OPEN && vsock_wants_read(c); i++)
        if (c->seq ? !vsock_read_message(c) : !read_once(c))
            break;
}

/* The guest has new buffers. Who is served goes to the end of the list, so that it is not always the same. */
void vsock_feed_stuck(struct virtio_vsock *v)
{
    struct vsock_conn *c = v->first;

    v->starved = false;
    for (unsigned n = v->conns; n && c && !v->starved; n--) {
        struct vsock_conn *next = c->next;

        if (c->state == OPEN && c->stuck && vsock_may_go_on(c)) {
            c->stuck = false;
            vsock_to_guest(c);
            vsock_rewatch(c);
            vsock_conn_requeue(c);
        }
        c = next;
    }
}

/* --- data from the guest --- */

void vsock_forget(struct vsock_conn *c)
{
    c->len = c->whole = c->empty = 0;
}

/* Nobody on the host reads any more. What still comes is counted and dropped. */
void vsock_host_deaf(struct vsock_conn *c)
{
    c->forwarded += c->len - c->empty;
    vsock_forget(c);
    c->write_ended = true;
    vsock_tell_shut(c, VIRTIO_VSOCK_SHUTDOWN_RCV);
}

/* All that the guest has sent is with the host: now its wish to end can be passed on. */
void vsock_check_ends(struct vsock_conn *c)
{
    if (c->seq && !c->whole && (c->state == DRAINING || (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND)))
        c->len = 0;                                                /* a message that never gets its end */
    if (c->len)
        return;
    if (c->state == DRAINING) {
        vsock_conn_free(c);
        return;
    }
    if (c->guest_shut == VSOCK_SHUT_BOTH) {
        vsock_finish(c);
    } else if ((c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND) && !c->write_ended) {
        c->write_ended = true;
        shutdown(c->fd, SHUT_WR);
    }
}

void vsock_forward(struct vsock_conn *c, u32 n)
{
    c->forwarded += n;
    c->v->events++;
    if (c->state == OPEN && c->forwarded - c->told >= VSOCK_TELL_AFTER)
        vsock_say(c, SAY_CREDIT);
}

void vsock_flush(struct vsock_conn *c)
{
    if (c->seq) {
        vsock_flush_messages(c);
        return;
    }
    while (c->len) {
        ssize_t n = send(c->fd, c->buf + c->head, MIN(c->len, VSOCK_RING - c->head), MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (n < 0) {
            vsock_host_deaf(c);
            break;
        }
        c->head = (c->head + (u32)n) % VSOCK_RING;
        c->len -= (u32)n;
        vsock_forward(c, (u32)n);
    }
    vsock_check_ends(c);
}

bool vsock_keep(struct vsock_conn *c, struct virtq_chain *chain, u32 len)
{
    if (!c->buf)
        c->buf = malloc(VSOCK_RING);
    if (c->seq && !c->ends)
        c->ends = calloc(1, sizeof(*c->ends));
    if (!c->buf || (c->seq && !c->ends))
        return false;
    while (len) {
        u32 at = (c->head + c->len) % VSOCK_RING;
        u32 n = (u32)virtq_read(chain, c->buf + at, MIN(len, VSOCK_RING - at));

        c->len += n;
        len -= n;
    }
    return true;
}

/* Straight from the guest's memory: how much the host took. */
static u32 send_pieces(struct vsock_conn *c, struct virtq_chain *chain, u32 len)
{
    struct iovec iov[64];
    struct msghdr m = { .msg_iov = iov };
    u32 sum = 0;

    for (; m.msg_iovlen < ARRAY_SIZE(iov) && m.msg_iovlen < chain->outs && sum < len; m.msg_iovlen++) {
        iov[m.msg_iovlen] = chain->out[m.msg_iovlen];
        iov[m.msg_iovlen].iov_len = MIN(iov[m.msg_iovlen].iov_len, (size_t)(len - sum));
        sum += (u32)iov[m.msg_iovlen].iov_len;
    }
    ssize_t n = sendmsg(c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);

    if (n < 0 && errno != EAGAIN && errno != EINTR)
        vsock_host_deaf(c);
    if (n <= 0)
        return 0;
    virtq_skip_out(chain, (u64)n);
    vsock_forward(c, (u32)n);
    return (u32)n;
}

void vsock_guest_data(struct vsock_conn *c, struct virtq_chain *chain, u32 len, u32 flags)
{
    if (c->state != OPEN || (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND) || len > VSOCK_BUF_ALLOC - (c->len - c->empty)) {
        vsock_finish(c);
        return;
    }
    if (c->seq) {
        vsock_guest_message(c, chain, len, flags);
        return;
    }
    if (len && !c->len && !c->write_ended)
        len -= send_pieces(c, chain, len);
    if (c->write_ended)
        vsock_forward(c, len);
    else if (len && !vsock_keep(c, chain, len))
        vsock_finish(c);
}
