/*
 * vsock's messages (see virtio_vsock.c; virtio 1.2, 5.10.6.6.2).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "dev/virtio_vsock_int.h"

/* --- to the guest --- */

/* An empty message looks like the end: but then the other side has not closed, or there is more. */
static bool at_end(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLRDHUP };
    int more = 0;

    return poll(&p, 1, 0) == 1 && (ioctl(fd, FIONREAD, &more) < 0 || !more);
}

/* The next message of the host's. False: there is none now. */
static bool take_message(struct vsock_conn *c)
{
    ssize_t n = recv(c->fd, NULL, 0, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n < 0 || (n == 0 && at_end(c->fd))) {
        vsock_host_ends(c, n);
        return false;
    }
    if (n > 0 && ((u64)n > VSOCK_BUF_ALLOC || (u64)n > c->guest_alloc || !(c->message = malloc((size_t)n)))) {
        vsock_finish(c);
        return false;
    }
    c->message_at = 0;
    c->message_len = (u32)n;
    if (recv(c->fd, c->message, (size_t)n, MSG_DONTWAIT) == n)
        return true;
    vsock_finish(c);                                               /* cannot be: nobody else reads there */
    return false;
}

static void drop_message(struct vsock_conn *c)
{
    free(c->message);
    c->message = NULL;
}

bool vsock_read_message(struct vsock_conn *c)
{
    u32 n, left;

    if (!c->message && !take_message(c))
        return false;
    if (!c->message)
        return true;                                               /* an empty one */
    n = vsock_take_room(c);
    if (!n)
        return false;
    left = c->message_len - c->message_at;
    n = MIN(n, left);
    vsock_put_packet(c, VIRTIO_VSOCK_OP_RW, n == left ? VIRTIO_VSOCK_SEQ_EOM : 0, c->message + c->message_at, n);
    c->sent += n;
    c->message_at += n;
    if (n == left)
        drop_message(c);
    return true;
}

/* --- from the guest --- */

/* The length of the first whole message in the ring; 0: there is none. */
static u32 first_message(const struct vsock_conn *c)
{
    if (!c->whole)
        return 0;
    for (u32 i = 0; i < c->len;) {
        u32 at = (c->head + i) % (u32)VSOCK_BUF_ALLOC, bit = at % 64;
        u64 word = c->ends[at / 64] >> bit;

        if (word)
            return i + (u32)__builtin_ctzll(word) + 1;             /* bits behind len are not set */
        i += 64 - bit;
    }
    return 0;
}

/* The last byte in the ring ends a message. (It may do so already: an empty one follows.) */
static void end_message(struct vsock_conn *c)
{
    u32 at = (c->head + c->len - 1) % (u32)VSOCK_BUF_ALLOC;
    u64 bit = 1ull << at % 64;

    c->whole += !(c->ends[at / 64] & bit);
    c->ends[at / 64] |= bit;
}

/* The first message, of n bytes, is with the host. */
static void sent_message(struct vsock_conn *c, u32 n)
{
    u32 at = (c->head + n - 1) % (u32)VSOCK_BUF_ALLOC;

    c->ends[at / 64] &= ~(1ull << at % 64);
    c->whole--;
    c->head = (c->head + n) % (u32)VSOCK_BUF_ALLOC;
    c->len -= n;
    vsock_forward(c, n);
}

void vsock_flush_messages(struct vsock_conn *c)
{
    u32 n;

    while ((n = first_message(c))) {
        u32 straight = MIN(n, (u32)VSOCK_BUF_ALLOC - c->head);
        struct iovec iov[2] = { { c->buf + c->head, straight }, { c->buf, n - straight } };
        struct msghdr m = { .msg_iov = iov, .msg_iovlen = n > straight ? 2 : 1 };
        ssize_t r = sendmsg(c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);

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
        sent_message(c, n);
    }
    vsock_check_ends(c);
}

/* As much as the guest may send has come without an end of a message. */
static bool endless(const struct vsock_conn *c)
{
    return c->len == VSOCK_BUF_ALLOC && !c->whole;
}

void vsock_guest_message(struct vsock_conn *c, struct virtq_chain *chain, u32 len, bool end)
{
    if (c->write_ended) {
        vsock_forward(c, len);
        return;
    }
    if (len && !vsock_keep(c, chain, len)) {
        vsock_finish(c);
        return;
    }
    if (end && c->len) {                                           /* else it is an empty one */
        end_message(c);
        vsock_flush_messages(c);
    }
    if (c->state != OPEN)
        return;
    if (endless(c))
        vsock_finish(c);
    else if (c->len >= VSOCK_TELL_AFTER && c->told != c->forwarded) /* the rest of a large one may need all the room */
        vsock_say(c, SAY_CREDIT);
}
