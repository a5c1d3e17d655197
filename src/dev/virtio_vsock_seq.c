/*
 * vsock's messages (see virtio_vsock.c; virtio 1.2, 5.10.6.6.2).
 *
 * From the guest: packets up to the one with VIRTIO_VSOCK_SEQ_EOM wait in the connection's ring, which has bits beside its bytes: where a message ends, and whether that one had
 * VIRTIO_VSOCK_SEQ_EOR. So the least messages cost no more memory than the largest. An empty message takes a byte, which is no data and costs no credit; VSOCK_EMPTY_MAX of them may
 * wait, since the guest could send them for ever. Each message goes to the host by one send().
 *
 * To the guest: one message is taken from the socket at a time, whole, and goes in as many packets as the guest's buffers and credit make it.
 *
 * A message that is larger than all the room that a side has announced can never be whole there: the connection is reset.
 *
 * The host's socket carries what Unix sockets do: messages, empty ones too, but no MSG_EOR. Where it is "marked" (vsock_host.h) a byte before each message says that.
 *
 * An empty message is read as the end is, by 0 bytes; but every message comes with the time of its arrival (SO_TIMESTAMP), and the end without.
 */
#include <errno.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "dev/virtio_vsock_int.h"

/* --- to the guest --- */

/* Without a mark, or with the one that there is. */
static bool take_mark(struct vsock_conn *c)
{
    c->message_flags = VIRTIO_VSOCK_SEQ_EOM;
    c->message_at = c->marked;
    if (c->marked && c->message[0])
        c->message_flags |= VIRTIO_VSOCK_SEQ_EOR;
    return !c->marked || !(c->message[0] & ~VSOCK_MARK_EOR);
}

/* The next message of the host's. False: there is none now. */
static bool take_message(struct vsock_conn *c)
{
    u8 stamp[CMSG_SPACE(sizeof(struct timeval))];                  /* no larger: for descriptors that somebody sends there is to be no room */
    struct msghdr m = { .msg_control = stamp, .msg_controllen = sizeof(stamp) };
    ssize_t n = recvmsg(c->fd, &m, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n < 0 || (n == 0 && !m.msg_controllen)) {
        vsock_host_ends(c, n);
        return false;
    }
    if (n < c->marked || (u64)n - c->marked > MIN(VSOCK_BUF_ALLOC, (u64)c->guest_alloc) || !(c->message = malloc((size_t)n + 1))) {
        vsock_finish(c);
        return false;
    }
    c->message_len = (u32)n;
    if (recv(c->fd, c->message, (size_t)n, MSG_DONTWAIT) == n && take_mark(c)) /* nobody else reads there */
        return true;
    vsock_finish(c);
    return false;
}

static void drop_message(struct vsock_conn *c)
{
    free(c->message);
    c->message = NULL;
}

bool vsock_read_message(struct vsock_conn *c)
{
    u32 n = 0, left;

    if (!c->message && !take_message(c))
        return false;
    left = c->message_len - c->message_at;
    if (left)
        n = vsock_take_room(c);
    else
        c->stuck = !vsock_take_buffer(c->v, 0);                    /* what is empty needs no credit */
    if (c->stuck)
        return false;
    n = MIN(n, left);
    vsock_put_packet(c, VIRTIO_VSOCK_OP_RW, n == left ? c->message_flags : 0, c->message + c->message_at, n);
    c->sent += n;
    c->message_at += n;
    if (n == left)
        drop_message(c);
    return true;
}

/* --- from the guest --- */

static bool marked_at(const u64 *bits, u32 at)
{
    return bits[at / 64] >> at % 64 & 1;
}

static void mark_at(u64 *bits, u32 at, bool on)
{
    bits[at / 64] = (bits[at / 64] & ~(1ull << at % 64)) | (u64)on << at % 64;
}

/* The bytes of the first whole message in the ring; 0: there is none. */
static u32 first_message(const struct vsock_conn *c)
{
    if (!c->whole)
        return 0;
    for (u32 i = 0; i < c->len;) {
        u32 at = (c->head + i) % VSOCK_RING, bit = at % 64;
        u64 word = c->ends->end[at / 64] >> bit;

        if (word)
            return i + (u32)__builtin_ctzll(word) + 1;             /* bits behind len are not set */
        i += 64 - bit;
    }
    return 0;
}

/* What came since the last end is a message: maybe nothing did. False: too many of those wait. */
static bool end_message(struct vsock_conn *c, bool eor)
{
    u32 at = (c->head + c->len + VSOCK_RING - 1) % VSOCK_RING;

    if (!c->len || marked_at(c->ends->end, at)) {
        if (c->empty == VSOCK_EMPTY_MAX)
            return false;
        at = (at + 1) % VSOCK_RING;
        mark_at(c->ends->empty, at, true);
        c->empty++;
        c->len++;
    }
    mark_at(c->ends->end, at, true);
    mark_at(c->ends->eor, at, eor);
    c->whole++;
    return true;
}

/* The first message is with the host. It has n bytes in the ring, of which the last is `at`. */
static void sent_message(struct vsock_conn *c, u32 n, u32 at)
{
    bool empty = marked_at(c->ends->empty, at);

    mark_at(c->ends->end, at, false);
    mark_at(c->ends->empty, at, false);
    c->whole--;
    c->empty -= empty;
    c->head = (c->head + n) % VSOCK_RING;
    c->len -= n;
    vsock_forward(c, empty ? 0 : n);
}

/* As send(). */
static ssize_t send_message(struct vsock_conn *c, u32 n, u32 at)
{
    u8 mark = marked_at(c->ends->eor, at) ? VSOCK_MARK_EOR : 0;
    u32 straight = MIN(n, VSOCK_RING - c->head);
    struct iovec iov[3] = { { &mark, 1 }, { c->buf + c->head, straight }, { c->buf, n - straight } };
    struct msghdr m = { .msg_iov = iov + !c->marked, .msg_iovlen = c->marked };

    if (!marked_at(c->ends->empty, at))
        m.msg_iovlen += 2;
    return sendmsg(c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void vsock_flush_messages(struct vsock_conn *c)
{
    u32 n;

    while ((n = first_message(c))) {
        u32 at = (c->head + n - 1) % VSOCK_RING;
        ssize_t r = send_message(c, n, at);

        if (r < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (r < 0 && errno == EMSGSIZE) {                          /* the host allows less for a socket than for us */
            vsock_finish(c);
            return;
        }
        if (r < 0) {
            vsock_host_deaf(c);
            break;
        }
        sent_message(c, n, at);
    }
    vsock_check_ends(c);
}

/* As much as the guest may send has come without an end of a message. */
static bool endless(const struct vsock_conn *c)
{
    return c->len == VSOCK_BUF_ALLOC && !c->whole;
}

void vsock_guest_message(struct vsock_conn *c, struct virtq_chain *chain, u32 len, u32 flags)
{
    if (c->write_ended) {
        vsock_forward(c, len);
        return;
    }
    if (!vsock_keep(c, chain, len)) {
        vsock_finish(c);
        return;
    }
    if (flags & VIRTIO_VSOCK_SEQ_EOM) {
        if (!end_message(c, flags & VIRTIO_VSOCK_SEQ_EOR)) {
            vsock_finish(c);
            return;
        }
        vsock_flush_messages(c);
    }
    if (c->state != OPEN)
        return;
    if (endless(c))
        vsock_finish(c);
    else if (c->len >= VSOCK_TELL_AFTER && c->told != c->forwarded) /* the rest of a large one may need all the room */
        vsock_say(c, SAY_CREDIT);
}
