/*
 * virtio sockets (see virtio_vsock.h; virtio 1.2, 5.10): streams and, if the driver has asked for them, messages (SEQPACKET). A connection is a file descriptor and two
 * counts of bytes.
 *
 * Queues: 0 to the guest, 1 from the guest, 2 events. The vCPU that notifies posts service() to the loop; packets, descriptors and their
 * readiness are all seen to there.
 *
 *   CALLED_BY_HOST   a client has named a port of the guest: REQUEST was or is to be sent         -> OPEN by RESPONSE
 *   CALLED_BY_GUEST  the guest has called another guest, whose answer is awaited                   -> OPEN by "OK"
 *   OPEN             data both ways, until each side has said that it sends (receives) no more
 *   CLOSING          the descriptor is closed; RST is still to be said
 *   DRAINING         the guest knows it no more; what it had sent is still on its way to the host
 *
 * Credit (5.10.6.3): towards the guest no more is read from the descriptor than the guest has announced room for. From the guest at most
 * BUF_ALLOC bytes wait for the host's reader; a guest that sends more than that breaks the rules, and its connection is reset.
 *
 * Messages (5.10.6.6.2). From the guest: packets up to the one with VIRTIO_VSOCK_SEQ_EOM wait in the same ring of bytes, whose `ends` has a bit for each byte that ends a message,
 * so that the least messages cost no more memory than the largest; each goes to the host by one send(). To the guest: one message is taken from the socket at a time, whole, and goes in as
 * many packets as the guest's buffers and credit make it. One that is larger than all the room that a side has announced can never be whole there: the connection is reset. Empty
 * messages are left out, since a Unix socket shows one as its end, and so is VIRTIO_VSOCK_SEQ_EOR, which it does not carry.
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
#define _GNU_SOURCE
#include "dev/virtio_vsock.h"

#include <errno.h>
#include <linux/virtio_vsock.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#define VIRTIO_VSOCK_F_STREAM 0                                    /* 5.10.3; not in the Linux header */
#define RX 0
#define TX 1
#define EVENTS 2
#define QUEUE_SIZE 256
#define EVENT_QUEUE_SIZE 16
#define CONNS_MAX 1024
#define BUCKETS 256
#define BUF_ALLOC (256 * KiB)
#define TELL_AFTER (64 * KiB)                                      /* forwarded bytes that the guest has not been told of */
#define PIECE_MAX (64 * KiB)
#define CHAINS_PER_TURN 256                                        /* from the guest, before the loop sees to others */
#define READS_PER_TURN 32                                          /* of one connection */
#define RESETS_MAX 64
#define HOST_PORT_FIRST 0x40000000u                                /* ports that clients of the host seem to have */
#define SHUT_BOTH (VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND)

enum conn_state { CALLED_BY_HOST, CALLED_BY_GUEST, OPEN, CLOSING, DRAINING };
/* In the order in which they are said. */
enum say { SAY_REQUEST = 1, SAY_RESPONSE = 2, SAY_ASK_CREDIT = 4, SAY_CREDIT = 8, SAY_SHUTDOWN = 16, SAY_RST = 32 };

struct address {
    u32 cid, port, guest_port;                                     /* the other side's, and the guest's port */
};

struct conn {
    struct virtio_vsock *v;
    struct conn *hash_next, *prev, *next;
    struct address at;
    enum conn_state state;
    bool seq;                                                      /* messages */
    u8 say;
    int fd;                                                        /* -1: closed */
    struct loop_fd watch;
    u32 watched;                                                   /* events, while watch.loop */
    /* to the guest */
    u32 guest_alloc, guest_fwd, sent;                              /* as in its last packet; modulo 2^32 */
    bool asked;                                                    /* for credit, since it was last given */
    bool stuck;                                                    /* no credit, or no buffer in the ring */
    bool host_ended, host_gone;                                    /* the host's side sends no more; is not there any more */
    u8 shut;                                                       /* VIRTIO_VSOCK_SHUTDOWN_* that the guest was or is to be told */
    u8 *message;                                                   /* taken from the host, and not all with the guest: message[message_at, message_len) */
    u32 message_at, message_len;
    /* from the guest */
    u8 *buf;                                                       /* a ring of BUF_ALLOC bytes, once it is needed */
    u32 head, len;
    u64 *ends;                                                     /* of messages: bits for its bytes */
    u32 whole;                                                     /* messages, so many bits */
    u32 forwarded, told;                                           /* bytes that the host has taken; as the guest knows */
    u8 guest_shut;
    bool write_ended;                                              /* the end of the guest's data was passed on, or nobody wants it */
};

struct virtio_vsock {
    struct virtio virtio;
    struct virtio_vsock_config config;
    struct loop *loop;
    struct vsock_host *host;
    bool posted;
    bool starved;                                                  /* something waits for a buffer of the guest's */
    bool say_lost;                                                 /* TRANSPORT_RESET is to be said */
    u64 instance, events;                                          /* which device this is, and how often its state has changed */
    struct virtio_vsock_counts counts;
    struct virtq_chain tx, rx;
    struct conn *bucket[BUCKETS];
    struct conn *first, *last;                                     /* all */
    unsigned conns;
    u32 next_port;
    struct { struct address at; u16 type; } reset[RESETS_MAX];     /* answers to packets without a connection */
    unsigned reset_head, resets;
    u8 piece[PIECE_MAX];
};

static void service(struct virtio_vsock *v);

static void lock(struct virtio_vsock *v)
{
    pthread_mutex_lock(&v->virtio.device.lock);
}

static void unlock(struct virtio_vsock *v)
{
    pthread_mutex_unlock(&v->virtio.device.lock);
}

static void run_service(void *arg)
{
    struct virtio_vsock *v = arg;

    lock(v);
    v->posted = false;
    service(v);
    unlock(v);
}

/* Under the lock, any thread. */
static void post(struct virtio_vsock *v)
{
    if (v->posted)
        return;
    v->posted = true;
    loop_post(v->loop, run_service, v);
}

/* --- connections --- */

static struct conn **bucket_of(struct virtio_vsock *v, const struct address *at)
{
    return &v->bucket[(at->port * 31u + at->guest_port * 7u + at->cid) % BUCKETS];
}

static struct conn *find(struct virtio_vsock *v, const struct address *at)
{
    struct conn *c = *bucket_of(v, at);

    while (c && memcmp(&c->at, at, sizeof(*at)))
        c = c->hash_next;
    return c;
}

static void list_add(struct conn *c)
{
    struct virtio_vsock *v = c->v;

    c->prev = v->last;
    c->next = NULL;
    *(v->last ? &v->last->next : &v->first) = c;
    v->last = c;
}

static void list_del(struct conn *c)
{
    struct virtio_vsock *v = c->v;

    *(c->prev ? &c->prev->next : &v->first) = c->next;
    *(c->next ? &c->next->prev : &v->last) = c->prev;
}

/* NULL: too many, or no memory. fd is the connection's from now on, also then. */
static struct conn *conn_new(struct virtio_vsock *v, const struct address *at, int fd, enum conn_state state, bool seq)
{
    struct conn *c = v->conns < CONNS_MAX ? calloc(1, sizeof(*c)) : NULL;

    if (!c) {
        close(fd);
        vsock_host_closed(v->host);
        return NULL;
    }
    *c = (struct conn){ .v = v, .at = *at, .fd = fd, .state = state, .seq = seq, .hash_next = *bucket_of(v, at) };
    *bucket_of(v, at) = c;
    list_add(c);
    v->conns++;
    if (seq)                                                       /* a message goes at once, or not at all (unix(7)) */
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &(int){ BUF_ALLOC }, sizeof(int));
    return c;
}

static void unhash(struct conn *c)
{
    struct conn **p = bucket_of(c->v, &c->at);

    while (*p && *p != c)
        p = &(*p)->hash_next;
    if (*p)
        *p = c->hash_next;
}

static void close_fd(struct conn *c)
{
    loop_fd_del(&c->watch);
    if (c->fd < 0)
        return;
    close(c->fd);
    c->fd = -1;
    vsock_host_closed(c->v->host);
}

static void conn_free(struct conn *c)
{
    close_fd(c);
    unhash(c);
    list_del(c);
    c->v->conns--;
    free(c->buf);
    free(c->ends);
    free(c->message);
    free(c);
}

static void say(struct conn *c, u8 what)
{
    c->say |= what;
    post(c->v);
}

/* The end, from our side: the guest gets RST as soon as it has a buffer for it. */
static void finish(struct conn *c)
{
    close_fd(c);
    c->state = CLOSING;
    c->len = c->whole = 0;
    c->say = 0;
    say(c, SAY_RST);
}

/* What the guest is told of the directions that have ended. */
static void tell_shut(struct conn *c, u8 flags)
{
    if ((c->shut | flags) == c->shut)
        return;
    c->shut |= flags;
    say(c, SAY_SHUTDOWN);
}

/* --- what is awaited of the descriptor --- */

static void on_fd(void *arg, u32 events);

static bool wants_read(const struct conn *c)
{
    return !c->host_ended && !(c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV) && !c->stuck;
}

/* Hang-ups are reported whether they are asked for or not: while nobody could act on one, the descriptor is not watched at all. */
static void rewatch(struct conn *c)
{
    u32 want = 0;
    bool on = true;

    switch (c->state) {
    case CALLED_BY_HOST: break;
    case CALLED_BY_GUEST: want = EPOLLIN | EPOLLET; break;         /* a part of a line does not wake us up again */
    case OPEN:
        want = (wants_read(c) ? EPOLLIN : 0) | ((c->seq ? c->whole : c->len) ? EPOLLOUT : 0);
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
        finish(c);
}

/* --- packets to the guest --- */

static bool pop_or_listen(struct virtio_vsock *v, unsigned n, struct virtq_chain *c)
{
    while (virtio_running(&v->virtio)) {
        if (virtio_pop(&v->virtio, n, c))
            return true;
        if (!virtq_listen(&v->virtio.queue[n]))
            break;
    }
    return false;
}

/* A buffer for a header and so many bytes at least. False: there is none now. */
static bool take_buffer(struct virtio_vsock *v, u32 len)
{
    if (!pop_or_listen(v, RX, &v->rx)) {
        v->starved = true;
        return false;
    }
    if (v->rx.in_len >= sizeof(struct virtio_vsock_hdr) + len)
        return true;
    virtq_drop(&v->virtio.queue[RX], &v->rx);
    virtio_break(&v->virtio, "a buffer for packets is too small");
    return false;
}

/* Into the buffer that take_buffer() has found. */
static void put_packet(struct virtio_vsock *v, const struct address *at, u16 type, const struct conn *c, u16 op, u32 flags, const void *data, u32 len)
{
    struct virtio_vsock_hdr h = {
        .src_cid = at->cid, .dst_cid = v->config.guest_cid, .src_port = at->port, .dst_port = at->guest_port, .len = len,
        .type = type, .op = op, .flags = flags,
        .buf_alloc = c ? BUF_ALLOC : 0, .fwd_cnt = c ? c->forwarded : 0,
    };

    virtq_write(&v->rx, &h, sizeof(h));
    if (len)
        virtq_write(&v->rx, data, len);
    virtq_push(&v->virtio.queue[RX], &v->rx, (u32)sizeof(h) + len);
    v->events++;
    v->counts.received++;
}

static void put_conn_packet(struct conn *c, u16 op, u32 flags, const void *data, u32 len)
{
    put_packet(c->v, &c->at, c->seq ? VIRTIO_VSOCK_TYPE_SEQPACKET : VIRTIO_VSOCK_TYPE_STREAM, c, op, flags, data, len);
    c->told = c->forwarded;
}

static bool say_one(struct conn *c, u8 what)
{
    static const struct { u8 say; u16 op; } ops[] = {
        { SAY_REQUEST, VIRTIO_VSOCK_OP_REQUEST }, { SAY_RESPONSE, VIRTIO_VSOCK_OP_RESPONSE },
        { SAY_ASK_CREDIT, VIRTIO_VSOCK_OP_CREDIT_REQUEST }, { SAY_CREDIT, VIRTIO_VSOCK_OP_CREDIT_UPDATE },
        { SAY_SHUTDOWN, VIRTIO_VSOCK_OP_SHUTDOWN }, { SAY_RST, VIRTIO_VSOCK_OP_RST },
    };
    unsigned i = 0;

    while (ops[i].say != what)
        i++;
    if (!take_buffer(c->v, 0))
        return false;
    put_conn_packet(c, ops[i].op, what == SAY_SHUTDOWN ? c->shut : 0, NULL, 0);
    c->say &= (u8)~what;
    return true;
}

/* False: the guest has no buffers left. */
static bool say_all(struct virtio_vsock *v)
{
    struct conn *c, *next;

    for (; v->resets; v->resets--, v->reset_head = (v->reset_head + 1) % RESETS_MAX) {
        if (!take_buffer(v, 0))
            return false;
        put_packet(v, &v->reset[v->reset_head].at, v->reset[v->reset_head].type, NULL, VIRTIO_VSOCK_OP_RST, 0, NULL, 0);
    }
    for (c = v->first; c; c = next) {
        next = c->next;
        while (c->say)
            if (!say_one(c, c->say & -c->say))
                return false;
        if (c->state == CLOSING)
            conn_free(c);
    }
    return true;
}

static u32 credit(const struct conn *c)
{
    u32 unread = c->sent - c->guest_fwd;

    return unread >= c->guest_alloc ? 0 : c->guest_alloc - unread;
}

/* The host's side sends no more: at its end, or by an error, which the guest learns as a reset. */
static void host_ends(struct conn *c, ssize_t n)
{
    if (n < 0) {
        finish(c);
        return;
    }
    c->host_ended = true;
    tell_shut(c, c->host_gone ? SHUT_BOTH : VIRTIO_VSOCK_SHUTDOWN_SEND);
}

/* Room and a buffer: how many bytes go into the latter. 0: there is none now. */
static u32 take_room(struct conn *c)
{
    struct virtio_vsock *v = c->v;
    u32 room = credit(c);

    if (!room && !c->asked) {
        c->asked = true;
        say(c, SAY_ASK_CREDIT);
    }
    c->stuck = !room || !take_buffer(v, 1);
    return c->stuck ? 0 : (u32)MIN(MIN((u64)room, v->rx.in_len - sizeof(struct virtio_vsock_hdr)), (u64)PIECE_MAX);
}

/* An empty message looks like the end: but then the other side has not closed, or there is more. */
static bool at_end(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLRDHUP };
    int more = 0;

    return poll(&p, 1, 0) == 1 && (ioctl(fd, FIONREAD, &more) < 0 || !more);
}

/* The next message of the host's. False: there is none now. */
static bool take_message(struct conn *c)
{
    ssize_t n = recv(c->fd, NULL, 0, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n < 0 || (n == 0 && at_end(c->fd))) {
        host_ends(c, n);
        return false;
    }
    if (n > 0 && ((u64)n > BUF_ALLOC || (u64)n > c->guest_alloc || !(c->message = malloc((size_t)n)))) {
        finish(c);
        return false;
    }
    c->message_at = 0;
    c->message_len = (u32)n;
    if (recv(c->fd, c->message, (size_t)n, MSG_DONTWAIT) == n)
        return true;
    finish(c);                                                     /* cannot be: nobody else reads there */
    return false;
}

static void drop_message(struct conn *c)
{
    free(c->message);
    c->message = NULL;
}

/* A packet of a message, or all that there is. False: nothing more to be done now. */
static bool read_message(struct conn *c)
{
    u32 n, left;

    if (!c->message && !take_message(c))
        return false;
    if (!c->message)
        return true;                                               /* an empty one */
    n = take_room(c);
    if (!n)
        return false;
    left = c->message_len - c->message_at;
    n = MIN(n, left);
    put_conn_packet(c, VIRTIO_VSOCK_OP_RW, n == left ? VIRTIO_VSOCK_SEQ_EOM : 0, c->message + c->message_at, n);
    c->sent += n;
    c->message_at += n;
    if (n == left)
        drop_message(c);
    return true;
}

/* One buffer full. False: nothing more to be done now. */
static bool read_once(struct conn *c)
{
    struct virtio_vsock *v = c->v;
    u32 want = take_room(c);
    ssize_t n;

    if (!want)
        return false;
    n = recv(c->fd, v->piece, want, MSG_DONTWAIT);
    if (n <= 0) {
        virtq_unpop(&v->virtio.queue[RX], &v->rx);
        if (n == 0 || (errno != EAGAIN && errno != EINTR))
            host_ends(c, n);
        return false;
    }
    put_conn_packet(c, VIRTIO_VSOCK_OP_RW, 0, v->piece, (u32)n);
    c->sent += (u32)n;
    return (u32)n == want;
}

static void to_guest(struct conn *c)
{
    if ((c->say & SAY_RESPONSE) && !say_one(c, SAY_RESPONSE)) {    /* comes before data */
        c->stuck = true;
        return;
    }
    /* A message that has begun goes on to its end, or until there is no room: nothing of the descriptor's would bring us back to it. */
    for (unsigned i = 0; (i < READS_PER_TURN || c->message) && c->state == OPEN && wants_read(c); i++)
        if (c->seq ? !read_message(c) : !read_once(c))
            break;
}

/* The guest has new buffers. Who is served goes to the end of the list, so that it is not always the same. */
static void feed_stuck(struct virtio_vsock *v)
{
    struct conn *c = v->first;

    v->starved = false;
    for (unsigned n = v->conns; n && c && !v->starved; n--) {
        struct conn *next = c->next;

        if (c->state == OPEN && c->stuck && credit(c)) {
            c->stuck = false;
            to_guest(c);
            rewatch(c);
            list_del(c);
            list_add(c);
        }
        c = next;
    }
}

/* --- data from the guest --- */

/* Nobody on the host reads any more. What still comes is counted and dropped. */
static void host_deaf(struct conn *c)
{
    c->forwarded += c->len;
    c->len = c->whole = 0;
    c->write_ended = true;
    tell_shut(c, VIRTIO_VSOCK_SHUTDOWN_RCV);
}

/* All that the guest has sent is with the host: now its wish to end can be passed on. */
static void check_ends(struct conn *c)
{
    if (c->seq && !c->whole && (c->state == DRAINING || (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND)))
        c->len = 0;                                                /* a message that never gets its end */
    if (c->len)
        return;
    if (c->state == DRAINING) {
        conn_free(c);
        return;
    }
    if (c->guest_shut == SHUT_BOTH) {
        finish(c);
    } else if ((c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND) && !c->write_ended) {
        c->write_ended = true;
        shutdown(c->fd, SHUT_WR);
    }
}

static void forward(struct conn *c, u32 n)
{
    c->forwarded += n;
    c->v->events++;
    if (c->state == OPEN && c->forwarded - c->told >= TELL_AFTER)
        say(c, SAY_CREDIT);
}

/* --- messages from the guest --- */

/* The length of the first whole message in the ring; 0: there is none. */
static u32 first_message(const struct conn *c)
{
    if (!c->whole)
        return 0;
    for (u32 i = 0; i < c->len;) {
        u32 at = (c->head + i) % (u32)BUF_ALLOC, bit = at % 64;
        u64 word = c->ends[at / 64] >> bit;

        if (word)
            return i + (u32)__builtin_ctzll(word) + 1;             /* bits behind len are not set */
        i += 64 - bit;
    }
    return 0;
}

/* The last byte in the ring ends a message. (It may do so already: an empty one follows.) */
static void end_message(struct conn *c)
{
    u32 at = (c->head + c->len - 1) % (u32)BUF_ALLOC;
    u64 bit = 1ull << at % 64;

    c->whole += !(c->ends[at / 64] & bit);
    c->ends[at / 64] |= bit;
}

/* The first message, of n bytes, is with the host. */
static void sent_message(struct conn *c, u32 n)
{
    u32 at = (c->head + n - 1) % (u32)BUF_ALLOC;

    c->ends[at / 64] &= ~(1ull << at % 64);
    c->whole--;
    c->head = (c->head + n) % (u32)BUF_ALLOC;
    c->len -= n;
    forward(c, n);
}

/* May free c. */
static void flush_messages(struct conn *c)
{
    u32 n;

    while ((n = first_message(c))) {
        u32 straight = MIN(n, (u32)BUF_ALLOC - c->head);
        struct iovec iov[2] = { { c->buf + c->head, straight }, { c->buf, n - straight } };
        struct msghdr m = { .msg_iov = iov, .msg_iovlen = n > straight ? 2 : 1 };
        ssize_t r = sendmsg(c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (r < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (r < 0 && errno == EMSGSIZE) {                          /* the host allows less for a socket than for us */
            finish(c);
            return;
        }
        if (r < 0) {
            host_deaf(c);
            break;
        }
        sent_message(c, n);
    }
    check_ends(c);
}

/* May free c. */
static void flush(struct conn *c)
{
    if (c->seq) {
        flush_messages(c);
        return;
    }
    while (c->len) {
        ssize_t n = send(c->fd, c->buf + c->head, MIN((u64)c->len, BUF_ALLOC - c->head), MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (n < 0) {
            host_deaf(c);
            break;
        }
        c->head = (u32)((c->head + (u32)n) % BUF_ALLOC);
        c->len -= (u32)n;
        forward(c, (u32)n);
    }
    check_ends(c);
}

/* Behind what waits already. There is room: that was checked. */
static bool keep(struct conn *c, struct virtq_chain *chain, u32 len)
{
    if (!c->buf)
        c->buf = malloc(BUF_ALLOC);
    if (c->seq && !c->ends)
        c->ends = calloc(BUF_ALLOC / 64, sizeof(*c->ends));
    if (!c->buf || (c->seq && !c->ends))
        return false;
    while (len) {
        u32 at = (u32)((c->head + c->len) % BUF_ALLOC);
        u32 n = (u32)virtq_read(chain, c->buf + at, MIN((u64)len, BUF_ALLOC - at));

        c->len += n;
        len -= n;
    }
    return true;
}

/* Straight from the guest's memory: how much the host took. */
static u32 send_pieces(struct conn *c, struct virtq_chain *chain, u32 len)
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
        host_deaf(c);
    if (n <= 0)
        return 0;
    virtq_skip_out(chain, (u64)n);
    forward(c, (u32)n);
    return (u32)n;
}

/* True: as much as the guest may send has come without an end of a message. */
static bool endless(const struct conn *c)
{
    return c->len == BUF_ALLOC && !c->whole;
}

static void guest_message(struct conn *c, struct virtq_chain *chain, u32 len, bool end)
{
    if (c->write_ended) {
        forward(c, len);
        return;
    }
    if (len && !keep(c, chain, len)) {
        finish(c);
        return;
    }
    if (end && c->len) {                                           /* else it is an empty one */
        end_message(c);
        flush_messages(c);
    }
    if (c->state != OPEN)
        return;
    if (endless(c))
        finish(c);
    else if (c->len >= TELL_AFTER && c->told != c->forwarded)      /* the rest of a large one may need all the room */
        say(c, SAY_CREDIT);
}

static void guest_data(struct conn *c, struct virtq_chain *chain, u32 len, u32 flags)
{
    if (c->state != OPEN || (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND) || len > BUF_ALLOC - c->len) {
        finish(c);
        return;
    }
    if (c->seq) {
        guest_message(c, chain, len, flags & VIRTIO_VSOCK_SEQ_EOM);
        return;
    }
    if (len && !c->len && !c->write_ended)
        len -= send_pieces(c, chain, len);
    if (c->write_ended)
        forward(c, len);
    else if (len && !keep(c, chain, len))
        finish(c);
}

/* --- packets from the guest --- */

/* Of a type that there is, as the driver knows it. */
static bool known_type(const struct virtio_vsock *v, u16 type)
{
    return type == VIRTIO_VSOCK_TYPE_STREAM || (type == VIRTIO_VSOCK_TYPE_SEQPACKET && virtio_has(&v->virtio, VIRTIO_VSOCK_F_SEQPACKET));
}

static void answer_reset(struct virtio_vsock *v, const struct address *at, u16 type)
{
    unsigned i = (v->reset_head + v->resets) % RESETS_MAX;

    bug_on(v->resets == RESETS_MAX);
    v->reset[i].at = *at;
    v->reset[i].type = known_type(v, type) ? type : VIRTIO_VSOCK_TYPE_STREAM;
    v->resets++;
}

static void guest_calls(struct virtio_vsock *v, const struct address *at, const struct virtio_vsock_hdr *h)
{
    bool seq = h->type == VIRTIO_VSOCK_TYPE_SEQPACKET;
    int fd = v->conns < CONNS_MAX ? vsock_host_call(v->host, at->cid, at->guest_port, at->port, seq) : -EMFILE;
    struct conn *c = fd >= 0 ? conn_new(v, at, fd, at->cid == VSOCK_CID_HOST ? OPEN : CALLED_BY_GUEST, seq) : NULL;

    if (!c) {
        answer_reset(v, at, h->type);
        return;
    }
    c->guest_alloc = h->buf_alloc;
    c->guest_fwd = h->fwd_cnt;
    if (c->state == OPEN)
        say(c, SAY_RESPONSE);
    rewatch(c);
}

static void guest_accepts(struct conn *c)
{
    if (c->state != CALLED_BY_HOST || vsock_host_accepted(c->fd, c->at.port) < 0) {
        finish(c);
        return;
    }
    c->state = OPEN;
}

/* What it had sent still belongs to the host, if it had said that it was all. */
static void guest_resets(struct conn *c)
{
    if (c->state != OPEN || !c->len || !(c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND)) {
        conn_free(c);
        return;
    }
    unhash(c);
    c->state = DRAINING;
    c->say = 0;
    rewatch(c);
}

static void guest_shuts(struct conn *c, u32 flags)
{
    if (c->state != OPEN) {
        finish(c);
        return;
    }
    c->guest_shut |= flags & SHUT_BOTH;
    check_ends(c);
}

static void conn_packet(struct conn *c, const struct virtio_vsock_hdr *h, struct virtq_chain *chain)
{
    c->guest_alloc = h->buf_alloc;
    c->guest_fwd = h->fwd_cnt;
    c->asked &= !credit(c);
    switch (h->op) {
    case VIRTIO_VSOCK_OP_RESPONSE: guest_accepts(c); break;
    case VIRTIO_VSOCK_OP_SHUTDOWN: guest_shuts(c, h->flags); break;
    case VIRTIO_VSOCK_OP_RW: guest_data(c, chain, h->len, h->flags); break;
    case VIRTIO_VSOCK_OP_CREDIT_UPDATE: break;
    case VIRTIO_VSOCK_OP_CREDIT_REQUEST: say(c, SAY_CREDIT); break;
    case VIRTIO_VSOCK_OP_RST: guest_resets(c); return;
    default: finish(c);                                            /* a second REQUEST, or nothing that there is */
    }
    if (c->state == OPEN && c->stuck && credit(c)) {
        c->stuck = false;
        to_guest(c);
    }
    rewatch(c);
}

static void packet(struct virtio_vsock *v, struct virtq_chain *chain)
{
    struct virtio_vsock_hdr h;

    if (virtq_read(chain, &h, sizeof(h)) != sizeof(h) || (h.op == VIRTIO_VSOCK_OP_RW && h.len > chain->out_len)) {
        virtio_break(&v->virtio, "a packet is shorter than it says");
        return;
    }
    struct address at = { .cid = (u32)h.dst_cid, .port = h.dst_port, .guest_port = h.src_port };
    struct conn *c = find(v, &at);

    v->events++;
    if (h.src_cid != v->config.guest_cid || h.dst_cid > UINT32_MAX)
        return;                                                    /* 5.10.6.4.2: not its address; nobody to answer to */
    if (c && c->state == CLOSING) {                                /* RST is on its way already */
        if (h.op == VIRTIO_VSOCK_OP_RST)
            conn_free(c);
    } else if (c && h.type != (c->seq ? VIRTIO_VSOCK_TYPE_SEQPACKET : VIRTIO_VSOCK_TYPE_STREAM)) {
        finish(c);
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
    struct virtq *q = &v->virtio.queue[TX];
    unsigned budget = CHAINS_PER_TURN;

    while (virtio_running(&v->virtio)) {
        virtq_ignore(q);
        while (budget && v->resets < RESETS_MAX && virtio_pop(&v->virtio, TX, &v->tx)) {
            budget--;
            v->counts.sent++;
            packet(v, &v->tx);
            virtq_push(q, &v->tx, 0);
        }
        if (v->resets == RESETS_MAX && !say_all(v))
            break;                                                 /* until the guest has buffers: it notifies us of them */
        if (!budget) {
            post(v);
            break;
        }
        if (!virtq_listen(q))
            break;
    }
    virtio_interrupt(&v->virtio, TX);
}

/* --- the host's side --- */

static void open_event(struct conn *c, u32 events)
{
    c->host_gone |= (events & (EPOLLHUP | EPOLLERR)) != 0;
    if (events & (EPOLLOUT | EPOLLERR))
        flush(c);
    if (c->state == OPEN && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        to_guest(c);
    if (c->state == OPEN && c->host_gone && (c->host_ended || (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV)))
        tell_shut(c, SHUT_BOTH);
}

static void answer_event(struct conn *c, u32 events)
{
    int r = vsock_host_answer(c->fd, c->seq);

    if (r < 0 || (r == 0 && (events & (EPOLLHUP | EPOLLERR)))) {
        finish(c);
    } else if (r > 0) {
        c->state = OPEN;
        say(c, SAY_RESPONSE);
    }
}

static void on_fd(void *arg, u32 events)
{
    struct conn *c = arg;
    struct virtio_vsock *v = c->v;

    lock(v);
    v->events++;
    if (c->state == DRAINING) {
        flush(c);                                                  /* frees it at its end */
    } else {
        if (c->state == OPEN)
            open_event(c, events);
        else if (c->state == CALLED_BY_GUEST)
            answer_event(c, events);
        else if (events & (EPOLLHUP | EPOLLERR))
            finish(c);                                             /* the client did not wait for the guest */
        rewatch(c);
    }
    virtio_interrupt(&v->virtio, RX);
    unlock(v);
}

/* A port that the guest has no connection with: clients of the host have none of their own. */
static u32 free_port(struct virtio_vsock *v, u32 guest_port)
{
    struct address at = { .cid = VSOCK_CID_HOST, .guest_port = guest_port };

    do {
        v->next_port = MAX(v->next_port + 1, HOST_PORT_FIRST);
        at.port = v->next_port;
    } while (find(v, &at));
    return at.port;
}

static void on_incoming(void *arg, int fd, u32 cid, u32 from, u32 to, bool seq)
{
    struct virtio_vsock *v = arg;
    struct conn *c = NULL;

    lock(v);
    struct address at = { .cid = cid, .port = cid == VSOCK_CID_HOST ? free_port(v, to) : from, .guest_port = to };

    if (virtio_running(&v->virtio) && (!seq || virtio_has(&v->virtio, VIRTIO_VSOCK_F_SEQPACKET)) && !find(v, &at)) {
        c = conn_new(v, &at, fd, CALLED_BY_HOST, seq);
    } else {
        close(fd);
        vsock_host_closed(v->host);
    }
    if (c) {
        say(c, SAY_REQUEST);
        rewatch(c);
    }
    unlock(v);
}

/* --- the device --- */

/* Nothing is left that the guest knows of. What it had sent still goes to the host. */
static void drop_all(struct virtio_vsock *v)
{
    struct conn *c, *next;

    v->resets = 0;
    v->events++;
    for (c = v->first; c; c = next) {
        next = c->next;
        if (c->state == DRAINING)
            continue;
        if (c->state == OPEN && c->len) {
            unhash(c);
            c->state = DRAINING;
            c->say = 0;
            rewatch(c);
        } else {
            conn_free(c);
        }
    }
}

static void say_lost(struct virtio_vsock *v)
{
    struct virtio_vsock_event e = { .id = VIRTIO_VSOCK_EVENT_TRANSPORT_RESET };

    if (!v->say_lost || !pop_or_listen(v, EVENTS, &v->rx))
        return;
    v->say_lost = false;
    virtq_push(&v->virtio.queue[EVENTS], &v->rx, (u32)virtq_write(&v->rx, &e, sizeof(e)));
    virtio_interrupt(&v->virtio, EVENTS);
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
    from_guest(v);
    if (say_all(v) && v->starved)
        feed_stuck(v);
    virtio_interrupt(&v->virtio, RX);
}

static void vsock_kick(struct virtio *virtio, unsigned n UNUSED)
{
    struct virtio_vsock *v = container_of(virtio, struct virtio_vsock, virtio);

    v->counts.notifications++;
    post(v);
}

/* Connections are the loop's. */
static bool vsock_stop(struct virtio *v)
{
    if (!(v->status & VIRTIO_CONFIG_S_DRIVER_OK))
        return true;                                               /* it was never used */
    post(container_of(v, struct virtio_vsock, virtio));
    return false;
}

static void vsock_reset(struct device *d)
{
    struct virtio_vsock *v = container_of(d, struct virtio_vsock, virtio.device);

    lock(v);
    drop_all(v);
    v->say_lost = v->starved = false;
    virtio_device_reset(&v->virtio);
    unlock(v);
}

/* On the loop's thread: what the guest has sent goes to the host. */
static void vsock_quiesce(struct device *d)
{
    struct virtio_vsock *v = container_of(d, struct virtio_vsock, virtio.device);

    lock(v);
    service(v);
    unlock(v);
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
    post(v);
}

static void vsock_free(struct device *d)
{
    struct virtio_vsock *v = container_of(d, struct virtio_vsock, virtio.device);

    loop_unpost(v->loop, run_service, v);
    vsock_host_serve(v->host, NULL, NULL);
    while (v->first)
        conn_free(v->first);
    virtio_destroy(&v->virtio);
    virtq_chain_free(&v->tx);
    virtq_chain_free(&v->rx);
    free(v);
}

static const struct device_ops device_ops = {
    .name = "virtio_vsock", .reset = vsock_reset, .quiesce = vsock_quiesce, .state = vsock_state, .free = vsock_free
};
static const struct virtio_ops virtio_ops = { .kick = vsock_kick, .stop = vsock_stop };
static const struct vsock_host_ops host_ops = { .incoming = on_incoming };

struct virtio_vsock_counts virtio_vsock_counts(struct virtio_vsock *v)
{
    struct virtio_vsock_counts c;

    lock(v);
    c = v->counts;
    unlock(v);
    return c;
}

unsigned virtio_vsock_conns(struct virtio_vsock *v)
{
    unsigned n;

    lock(v);
    n = v->conns;
    unlock(v);
    return n;
}

int virtio_vsock_new(struct ram *ram, const struct log *log, struct loop *loop, struct vsock_host *host, struct virtio_vsock **out)
{
    static const u16 size[] = { [RX] = QUEUE_SIZE, [TX] = QUEUE_SIZE, [EVENTS] = EVENT_QUEUE_SIZE };
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
