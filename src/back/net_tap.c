/*
 * Tap devices (see net_tap.h; Linux, Documentation/networking/tuntap.rst, linux/if_tun.h).
 *
 * With IFF_VNET_HDR the kernel takes and gives frames with their struct virtio_net_hdr: checksums and large segments go through untouched. A descriptor of somebody
 * else's may be without; then the kernel gets finished frames of the MTU's size.
 *
 * The kernel chooses the queue of a flow by where the guest sent it last, as the device does (virtio 1.2, 5.1.6.5.5.1).
 */
#define _GNU_SOURCE
#include "back/net_tap.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "back/net_offload.h"

#define READ_BATCH 64                                              /* frames of one queue, before others have their turn */

struct net_tap {
    struct net net;
    int fd[NET_QUEUES_MAX];
    bool header;                                                   /* IFF_VNET_HDR */
    bool waiting[NET_QUEUES_MAX];                                  /* for room to write */
    bool dead;
    unsigned poll[NET_QUEUES_MAX];                                 /* indices of the round; 0: not asked for (that is the thread's own) */
    u8 frame[sizeof(struct virtio_net_hdr) + NET_FRAME_MAX], whole[NET_FRAME_MAX];
};

static struct net_tap *tap_of(struct net *n)
{
    return container_of(n, struct net_tap, net);
}

static void died(struct net_tap *t, int e)
{
    t->dead = true;
    log_msg(t->net.log, LOG_ERROR, "network %s: it has gone: %s; the guest's card has no link any more", t->net.name, strerror(e));
    net_lost(&t->net);
}

/* --- frames --- */

static bool tap_send(struct net *n, const struct net_frame *f)
{
    struct net_tap *t = tap_of(n);
    unsigned queue = f->queue < n->queues ? f->queue : 0, iovs = 0;
    struct iovec iov[64];
    ssize_t r;

    if (t->dead)
        return true;
    if (t->header)
        iov[iovs++] = (struct iovec){ (void *)&f->hdr, sizeof(f->hdr) };
    if (f->iovs + iovs <= ARRAY_SIZE(iov)) {
        memcpy(iov + iovs, f->iov, f->iovs * sizeof(*iov));
        iovs += f->iovs;
    } else {
        net_copy(f, 0, t->whole, f->len);
        iov[iovs++] = (struct iovec){ t->whole, f->len };
    }
    do {
        r = writev(t->fd[queue], iov, (int)iovs);
    } while (r < 0 && errno == EINTR);
    t->waiting[queue] = r < 0 && errno == EAGAIN;
    return !t->waiting[queue];                                     /* other errors: the interface is down, or the frame was none */
}

static bool read_one(struct net_tap *t, unsigned queue)
{
    size_t head = t->header ? sizeof(struct virtio_net_hdr) : 0;
    struct iovec iov = { t->frame + head, 0 };
    struct net_frame f = { .iov = &iov, .iovs = 1, .queue = t->net.queues > 1 ? queue : NET_ANY_QUEUE };
    ssize_t len = read(t->fd[queue], t->frame, head + NET_FRAME_MAX);

    if (len < 0 && errno != EAGAIN && errno != EINTR)
        died(t, errno);
    if (len < (ssize_t)head)
        return false;
    if (head)
        memcpy(&f.hdr, t->frame, head);
    iov.iov_len = f.len = (size_t)len - head;
    if (net_header_valid(&f.hdr, f.len))
        net_deliver(&t->net, &f);
    return true;
}

static void tap_prepare(struct net *n, struct net_poll *p)
{
    struct net_tap *t = tap_of(n);

    for (unsigned i = 0; i < n->queues; i++) {
        short events = (short)((net_full(n) ? 0 : POLLIN) | (t->waiting[i] ? POLLOUT : 0));

        t->poll[i] = events && !t->dead ? net_poll_add(p, t->fd[i], events) : 0;
    }
}

static void tap_serve(struct net *n, struct net_poll *p)
{
    struct net_tap *t = tap_of(n);

    for (unsigned i = 0; i < n->queues && !t->dead; i++) {
        short got = t->poll[i] ? p->fd[t->poll[i]].revents : 0;

        if (got & POLLOUT) {
            t->waiting[i] = false;
            net_kick(n);
        }
        if (got & ~POLLOUT)
            for (unsigned k = 0; k < READ_BATCH && !net_full(n) && read_one(t, i); k++)
                ;
    }
}

static void tap_guest_takes(struct net *n, unsigned offloads)
{
    struct net_tap *t = tap_of(n);
    unsigned flags = (offloads & NET_CSUM ? TUN_F_CSUM : 0) | (offloads & NET_TSO4 ? TUN_F_TSO4 : 0) | (offloads & NET_TSO6 ? TUN_F_TSO6 : 0);

    if (t->header && ioctl(t->fd[0], TUNSETOFFLOAD, (unsigned long)flags) < 0)
        log_msg(n->log, LOG_WARN, "network %s: the host does not take over checksums: %s", n->name, strerror(errno));
}

static void tap_close(struct net *n)
{
    struct net_tap *t = tap_of(n);

    for (unsigned i = 0; i < NET_QUEUES_MAX; i++)
        if (t->fd[i] >= 0)
            close(t->fd[i]);
    free(t);
}

#define TAP_OPS .kind = "tap", .send = tap_send, .prepare = tap_prepare, .serve = tap_serve, .guest_takes = tap_guest_takes, .close = tap_close
static const struct net_ops header_ops = { TAP_OPS, .takes = NET_CSUM | NET_TSO4 | NET_TSO6 };
static const struct net_ops plain_ops = { TAP_OPS };

/* --- opening --- */

static int new_tap(const struct net_config *c, const char *name, struct net_tap **out)
{
    struct net_tap *t = calloc(1, sizeof(*t));

    if (!t)
        return err(-ENOMEM, "network %s: out of memory", name);
    for (unsigned i = 0; i < NET_QUEUES_MAX; i++)
        t->fd[i] = -1;
    net_init(&t->net, &plain_ops, c, name);
    *out = t;
    return 0;
}

static int open_failed(const char *name, int e)
{
    switch (e) {
    case ENOENT: case ENXIO: case ENODEV:
        return err(-e, "network tap %s: this host has no /dev/net/tun; load the module tun, or use --net user", name);
    case EACCES:
        return err(-e, "network tap %s: /dev/net/tun may not be opened; ask root to allow that, or use --net user", name);
    case EPERM:
        return err(-e, "network tap %s: it is not yours; as root: ip tuntap add dev %s mode tap user $USER (or use --net user)", name, name);
    case EBUSY:
        return err(-e, "network tap %s: it is in use by another program; stop that, or name another", name);
    case EINVAL:
        return err(-e, "network tap %s: it is no tap device, or has one queue where several are wanted (or the other way round: multi_queue)", name);
    default:
        return err(-e, "network tap %s: cannot open it: %s", name, strerror(e));
    }
}

static int open_queue(struct net_tap *t, unsigned i, const char *name, unsigned queues)
{
    struct ifreq ifr = { .ifr_flags = (short)(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (queues > 1 ? IFF_MULTI_QUEUE : 0)) };

    t->fd[i] = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (t->fd[i] < 0)
        return open_failed(name, errno);
    snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
    return ioctl(t->fd[i], TUNSETIFF, &ifr) < 0 ? open_failed(name, errno) : 0;
}

static void take_mtu(struct net_tap *t, const char *name, const struct net_config *c)
{
    struct ifreq ifr = { 0 };
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
    if (!c->mtu && s >= 0 && ioctl(s, SIOCGIFMTU, &ifr) == 0 && ifr.ifr_mtu >= NET_MTU_MIN)
        t->net.mtu = (u16)MIN(ifr.ifr_mtu, NET_MTU_MAX);
    if (s >= 0)
        close(s);
}

/* Descriptors are there: how do they speak? */
static int begin(struct net_tap *t, const struct net_config *c)
{
    int size = sizeof(struct virtio_net_hdr);
    struct ifreq ifr = { 0 };

    for (unsigned i = 0; i < t->net.queues; i++) {
        if (ioctl(t->fd[i], TUNGETIFF, &ifr) < 0 || !(ifr.ifr_flags & IFF_TAP) || !(ifr.ifr_flags & IFF_NO_PI))
            return err(-EINVAL, "network %s: the descriptor is no tap device, or one with packet information (open it with IFF_TAP | IFF_NO_PI)", t->net.name);
        if (i && t->header != !!(ifr.ifr_flags & IFF_VNET_HDR))
            return err(-EINVAL, "network %s: its queues were opened in different ways; use IFF_VNET_HDR for all", t->net.name);
        t->header = ifr.ifr_flags & IFF_VNET_HDR;
        if (t->header && ioctl(t->fd[i], TUNSETVNETHDRSZ, &size) < 0)
            return err(-errno, "network %s: %s", t->net.name, strerror(errno));
    }
    if (t->header)
        t->net.ops = &header_ops;
    take_mtu(t, ifr.ifr_name, c);
    snprintf(t->net.name, sizeof(t->net.name), "tap %.16s", ifr.ifr_name);
    tap_guest_takes(&t->net, 0);
    return 0;
}

int net_tap_new(const struct net_config *c, const char *name, unsigned queues, struct net **out)
{
    struct net_tap *t;
    char label[64];
    int r;

    if (strlen(name) >= IFNAMSIZ)
        return err(-EINVAL, "network tap %.100s: interfaces have names of at most %d characters", name, IFNAMSIZ - 1);
    snprintf(label, sizeof(label), "tap %s", name);
    r = new_tap(c, label, &t);
    if (r < 0)
        return r;
    t->net.queues = queues;
    for (unsigned i = 0; r == 0 && i < queues; i++)
        r = open_queue(t, i, name, queues);
    if (r == 0)
        r = begin(t, c);
    if (r < 0)
        tap_close(&t->net);
    else
        *out = &t->net;
    return r;
}

int net_tap_fd_new(const struct net_config *c, const int *fd, unsigned fds, struct net **out)
{
    struct net_tap *t;
    char label[64];
    int r;

    snprintf(label, sizeof(label), "fd=%d", fd[0]);
    r = new_tap(c, label, &t);
    if (r < 0)
        return r;
    t->net.queues = fds;
    for (unsigned i = 0; r == 0 && i < fds; i++) {
        t->fd[i] = fcntl(fd[i], F_DUPFD_CLOEXEC, 3);
        if (t->fd[i] < 0 || fcntl(t->fd[i], F_SETFL, fcntl(t->fd[i], F_GETFL) | O_NONBLOCK) < 0)
            r = err(-errno, "--net fd=%d: %s; give the number of an open descriptor of a tap device", fd[i], strerror(errno));
    }
    if (r == 0)
        r = begin(t, c);
    if (r < 0)
        tap_close(&t->net);
    else
        *out = &t->net;
    return r;
}
