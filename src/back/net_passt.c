/*
 * The stream protocol of passt (see net_passt.h; also that of QEMU's `-netdev stream`). It has no offloads, but frames of up to 64 KiB, so large segments go to passt whole, with
 * their checksums done.
 *
 * What the socket takes only in part is kept and goes first when there is room; until then nothing more is sent. When the other side goes away, or says what is no
 * frame, the card's link goes down, for good.
 */
#define _GNU_SOURCE
#include "back/net_passt.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LENGTH 4
#define FRAME_MAX 65535u                                           /* passt drops longer ones */
#define PIECES_MAX 62
#define READ_SIZE (256 * KiB)

struct net_passt {
    struct net net;
    int fd;
    bool dead;
    unsigned poll;                                                 /* index of the round; 0: not asked for */
    size_t unsent, sent;                                           /* out[sent, unsent) is to go first */
    size_t have;                                                   /* in[0, have) is read, and no whole frame yet */
    u8 out[LENGTH + FRAME_MAX], in[READ_SIZE];
};

static struct net_passt *passt_of(struct net *n)
{
    return container_of(n, struct net_passt, net);
}

static void died(struct net_passt *p, int e)
{
    p->dead = true;
    p->unsent = p->sent = 0;
    net_lost(&p->net, e);
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
            return p->dead;
        p->sent += (size_t)n;
    }
    p->sent = p->unsent = 0;
    return true;
}

static bool passt_send(struct net *n, const struct net_frame *f)
{
    struct net_passt *p = passt_of(n);
    u32 len;

    if (p->dead || f->len > FRAME_MAX)
        return true;
    if (!send_rest(p))
        return false;
    if (p->dead)
        return true;
    len = htonl((u32)f->len);
    memcpy(p->out, &len, LENGTH);
    net_copy(f, 0, p->out + LENGTH, f->len);
    p->unsent = LENGTH + f->len;
    send_rest(p);
    return true;
}

/* Hands on the whole frames of in[]. */
static void take_frames(struct net_passt *p)
{
    size_t at = 0;

    while (p->have - at >= LENGTH && !p->dead) {
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
        take_frames(p);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        died(p, n ? errno : 0);
    }
}

static void passt_prepare(struct net *n, struct net_poll *w)
{
    struct net_passt *p = passt_of(n);
    short events = (short)((net_full(n) ? 0 : POLLIN) | (p->unsent ? POLLOUT : 0));

    p->poll = events && !p->dead ? net_poll_add(w, p->fd, events) : 0;
}

static void passt_serve(struct net *n, struct net_poll *w)
{
    struct net_passt *p = passt_of(n);
    short got = p->poll ? w->fd[p->poll].revents : 0;

    if ((got & POLLOUT) && send_rest(p))
        net_kick(n);
    if ((got & ~POLLOUT) && !p->dead)
        read_frames(p);
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
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    struct net_passt *p;
    char label[80];

    if (strlen(path) >= sizeof(a.sun_path))
        return err(-ENAMETOOLONG, "network passt %.200s: a socket's path has at most %zu characters", path, sizeof(a.sun_path) - 1);
    p = calloc(1, sizeof(*p));
    if (!p)
        return err(-ENOMEM, "network passt %s: out of memory", path);
    snprintf(label, sizeof(label), "passt %.70s", path);
    net_init(&p->net, &passt_ops, c, label);
    strcpy(a.sun_path, path);
    p->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (p->fd < 0 || connect(p->fd, (struct sockaddr *)&a, sizeof(a)) < 0) {
        int r = connect_failed(path, errno);

        passt_close(&p->net);
        return r;
    }
    *out = &p->net;
    return 0;
}
