/*
 * The stream protocol of passt (see net_passt.h; also that of QEMU's `-netdev stream`). It has no offloads, but frames of up to 64 KiB, so large segments go to passt whole, with
 * their checksums done, and come from it, since it heeds the guest's MSS (net_large.h).
 *
 * What the socket takes only in part is kept and goes first when there is room; until then nothing more is sent.
 *
 * When the other side goes away, or says what is no frame, the card's link goes down, and passt is called again and again, at growing intervals: RETRY_FIRST_MS, doubled up to
 * RETRY_MAX_MS, until somebody listens at the socket. Then the link is up again. Intervals start anew when a frame comes over a connection that is RETRY_MAX_MS old; then the
 * next loss is worth a message, too: who takes calls and hangs up soon is told of once. A call does not wait (connect(2): a Unix socket is connected at once, or its backlog is full: EAGAIN).
 */
#define _GNU_SOURCE
#include "back/net_passt.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "back/net_large.h"

#define LENGTH 4
#define FRAME_MAX 65535u                                           /* passt drops longer ones */
#define LARGE_MSS (44 * 1448)                                      /* with its headers not longer than FRAME_MAX */
#define READ_SIZE (256 * KiB)
#define RETRY_FIRST_MS 100
#define RETRY_MAX_MS 5000

struct net_passt {
    struct net net;
    struct sockaddr_un address;
    int fd;                                                        /* -1: nobody is there */
    u64 called_at;                                                 /* these are the host's monotonic clock, milliseconds */
    u64 retry_at, retry_ms;                                        /* when to call again, and the wait before the call after the next loss */
    unsigned poll;                                                 /* index of the round; 0: not asked for */
    size_t unsent, sent;                                           /* out[sent, unsent) is to go first */
    size_t have;                                                   /* in[0, have) is read, and no whole frame yet */
    u32 fragment_id;
    u8 out[LENGTH + FRAME_MAX], in[READ_SIZE], part[NET_FRAME_MAX];
};

static struct net_passt *passt_of(struct net *n)
{
    return container_of(n, struct net_passt, net);
}

static u64 now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000 + (u64)t.tv_nsec / 1000000;
}

static void call_later(struct net_passt *p)
{
    p->retry_at = now_ms() + p->retry_ms;
    p->retry_ms = MIN(2 * p->retry_ms, (u64)RETRY_MAX_MS);
}

static void died(struct net_passt *p, int e)
{
    if (p->retry_ms == RETRY_FIRST_MS)
        log_msg(p->net.log, LOG_ERROR, "network %s: it has gone%s%s; the guest's card has no link until it is back", p->net.name, e ? ": " : "", e ? strerror(e) : "");
    close(p->fd);
    p->fd = -1;
    p->unsent = p->sent = p->have = 0;
    call_later(p);
    net_lost(&p->net);
}

/* 0, or a negative errno. */
static int call(struct net_passt *p)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), e;

    if (fd >= 0 && connect(fd, (struct sockaddr *)&p->address, sizeof(p->address)) == 0) {
        p->fd = fd;
        p->called_at = now_ms();
        return 0;
    }
    e = errno;
    if (fd >= 0)
        close(fd);
    return -e;
}

static void call_again(struct net_passt *p)
{
    if (call(p) < 0) {
        call_later(p);
        return;
    }
    log_msg(p->net.log, LOG_INFO, "network %s: it is back", p->net.name);
    net_found(&p->net);
}

/* True: nothing is left over. */
static bool send_rest(struct net_passt *p)
{
    while (p->sent < p->unsent) {
        ssize_t n = send(p->fd, p->out + p->sent, p->unsent - p->sent, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            died(p, errno);
        if (n < 0)
            return p->fd < 0;
        p->sent += (size_t)n;
    }
    p->sent = p->unsent = 0;
    return true;
}

static bool passt_send(struct net *n, const struct net_frame *f)
{
    struct net_passt *p = passt_of(n);
    u32 len;

    if (p->fd < 0 || f->len > FRAME_MAX)
        return true;
    if (!send_rest(p))
        return false;
    if (p->fd < 0)
        return true;
    len = htonl((u32)f->len);
    memcpy(p->out, &len, LENGTH);
    net_copy(f, 0, p->out + LENGTH, f->len);
    net_raise_mss(n, p->out + LENGTH, f->len, LARGE_MSS);
    p->unsent = LENGTH + f->len;
    send_rest(p);
    return true;
}

/* Hands on the whole frames of in[]. */
static void take_frames(struct net_passt *p)
{
    size_t at = 0;

    while (p->have - at >= LENGTH) {
        struct iovec iov;
        u32 len;

        memcpy(&len, p->in + at, LENGTH);
        len = ntohl(len);
        if (len < NET_HEADER || len > NET_FRAME_MAX) {
            died(p, EPROTO);
            return;
        }
        if (p->have - at - LENGTH < len)
            break;
        iov = (struct iovec){ p->in + at + LENGTH, len };
        if (net_is_large(&p->net, len))
            net_deliver_large(&p->net, iov.iov_base, len, p->fragment_id++, p->part);
        else
            net_deliver(&p->net, &(struct net_frame){ .iov = &iov, .iovs = 1, .len = len, .queue = NET_ANY_QUEUE });
        at += LENGTH + len;
    }
    memmove(p->in, p->in + at, p->have - at);
    p->have -= at;
}

static void read_frames(struct net_passt *p)
{
    ssize_t n = recv(p->fd, p->in + p->have, READ_SIZE - p->have, MSG_DONTWAIT);

    if (n > 0) {
        p->have += (size_t)n;
        if (p->retry_ms != RETRY_FIRST_MS && now_ms() - p->called_at >= RETRY_MAX_MS)
            p->retry_ms = RETRY_FIRST_MS;
        take_frames(p);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        died(p, n ? errno : 0);
    }
}

static void passt_prepare(struct net *n, struct net_poll *w)
{
    struct net_passt *p = passt_of(n);
    short events = (short)((net_full(n) ? 0 : POLLIN) | (p->unsent ? POLLOUT : 0));
    u64 now;

    p->poll = events && p->fd >= 0 ? net_poll_add(w, p->fd, events) : 0;
    if (p->fd >= 0)
        return;
    now = now_ms();
    net_poll_timeout(w, p->retry_at > now ? (int)(p->retry_at - now) : 0);
}

static void passt_serve(struct net *n, struct net_poll *w)
{
    struct net_passt *p = passt_of(n);
    short got = p->poll ? w->fd[p->poll].revents : 0;

    if ((got & POLLOUT) && send_rest(p))
        net_kick(n);
    if ((got & ~POLLOUT) && p->fd >= 0)
        read_frames(p);
    else if (!got && p->fd < 0 && now_ms() >= p->retry_at)
        call_again(p);
}

static void passt_close(struct net *n)
{
    struct net_passt *p = passt_of(n);

    if (p->fd >= 0)
        close(p->fd);
    free(p);
}

static const struct net_ops passt_ops = {
    .kind = "passt", .large = FRAME_MAX, .send = passt_send, .prepare = passt_prepare, .serve = passt_serve, .close = passt_close,
};

static int connect_failed(const char *path, int e)
{
    switch (e) {
    case ENOENT:
        return err(-e, "network passt %s: there is no such socket; start it before: passt --socket %s", path, path);
    case ECONNREFUSED:
        return err(-e, "network passt %s: nobody listens there; start it before: passt --socket %s", path, path);
    case EACCES: case EPERM:
        return err(-e, "network passt %s: the socket may not be opened: %s; it belongs to another user", path, strerror(e));
    default:
        return err(-e, "network passt %s: cannot connect: %s; name passt's socket", path, strerror(e));
    }
}

int net_passt_new(const struct net_config *c, const char *path, struct net **out)
{
    struct net_passt *p;
    char label[80];
    int r;

    if (strlen(path) >= sizeof(p->address.sun_path))
        return err(-ENAMETOOLONG, "network passt %.200s: a socket's path has at most %zu characters", path, sizeof(p->address.sun_path) - 1);
    p = calloc(1, sizeof(*p));
    if (!p)
        return err(-ENOMEM, "network passt %s: out of memory", path);
    snprintf(label, sizeof(label), "passt %.70s", path);
    net_init(&p->net, &passt_ops, c, label);
    p->fd = -1;
    p->retry_ms = RETRY_FIRST_MS;
    p->address.sun_family = AF_UNIX;
    strcpy(p->address.sun_path, path);
    r = call(p);
    if (r < 0) {
        passt_close(&p->net);
        return connect_failed(path, -r);
    }
    *out = &p->net;
    return 0;
}
