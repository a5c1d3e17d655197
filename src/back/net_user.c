/*
 * libslirp as a back end (see net_user.h).
 *
 * All of slirp runs on the card's thread. Its descriptors are waited for only while the guest takes what comes: so a guest that does not read
 * makes the host's senders wait.
 *
 * Large segments. To slirp: a TCP segment of up to 64 KiB is an IP packet like any other to it. To the guest: slirp believes in an MTU of 64 KiB, and heeds the MSS option of the guest's
 * SYN where connections come from outside: see net_large.h.
 *
 * Fragments of the guest's are put together here (net_fragments.h): slirp sees whole packets only.
 *
 * Left out: what slirp has beyond networking (TFTP, SMB, guest commands).
 */
#include "back/net_user.h"

#include <arpa/inet.h>
#include <errno.h>
#include <slirp/libslirp.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "back/net_fragments.h"
#include "back/net_large.h"
#include "back/net_offload.h"

#define LARGE_MSS (16 * 1448)                                      /* several of them fit the 128 KiB and the window that slirp has for a connection */
#define TCP 6
#define UDP 17

struct timer_of_slirp {
    struct timer_of_slirp *next;
    SlirpTimerCb fn;
    void *arg;
    s64 at_ms;                                                     /* -1: not set */
};

struct net_user {
    struct net net;
    Slirp *slirp;
    struct timer_of_slirp *timers;
    struct net_fragments *fragments;
    struct net_poll *poll;                                         /* of the round */
    bool asked;                                                    /* slirp's descriptors are in it */
    bool restricted;
    u8 network;                                                    /* 10.0.network.0 */
    u32 fragment_id;
    const struct net_publish *publish;
    unsigned publishes;
    u8 whole[NET_FRAME_MAX], part[NET_FRAME_MAX];
};

static struct net_user *user_of(struct net *n)
{
    return container_of(n, struct net_user, net);
}

static u16 get16(const u8 *p)
{
    return (u16)(p[0] << 8 | p[1]);
}

/* --- to the guest --- */

static ssize_t from_slirp(const void *buf, size_t len, void *arg)
{
    struct net_user *u = arg;
    struct iovec iov = { (void *)buf, len };
    struct net_frame f = { .iov = &iov, .iovs = 1, .len = len, .queue = NET_ANY_QUEUE };
    struct net_packet p;

    if (net_is_large(&u->net, len)) {
        net_deliver_large(&u->net, buf, len, u->fragment_id++, u->part);
        return (ssize_t)len;
    }
    if (net_parse(buf, len, &p) && (atomic_load(&u->net.guest) & NET_CSUM) && (p.protocol == TCP || p.protocol == UDP))
        f.hdr.flags = VIRTIO_NET_HDR_F_DATA_VALID;                 /* slirp has just made it */
    net_deliver(&u->net, &f);
    return (ssize_t)len;
}

/* --- from the guest --- */

static s64 now_ns(void *arg UNUSED)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (s64)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Of IPv4, as slirp takes it for one: all flags but "don't fragment" count. It does not know VLANs, nor fragments of IPv6. */
static bool is_fragment(const u8 *frame, size_t len)
{
    return len >= NET_HEADER + 20 && get16(frame + 12) == 0x0800 && (get16(frame + 20) & 0xbfff);
}

static bool user_send(struct net *n, const struct net_frame *f)
{
    struct net_user *u = user_of(n);
    struct net_packet p;
    u8 *frame = u->whole;
    size_t len = f->len;

    net_copy(f, 0, frame, len);                                    /* guest memory may change; slirp reads more than once */
    if (is_fragment(frame, len)) {
        len = net_parse(frame, len, &p) && !p.v6 ? net_fragments_add(u->fragments, (u64)now_ns(u) / 1000000, frame, &p, &frame) : 0;
        if (!len)
            return true;
    }
    net_raise_mss(n, frame, len, LARGE_MSS);
    slirp_input(u->slirp, frame, (int)len);
    return true;
}

/* --- slirp's callbacks --- */

static void *timer_make(SlirpTimerCb fn, void *fn_arg, void *arg)
{
    struct net_user *u = arg;
    struct timer_of_slirp *t = malloc(sizeof(*t));

    bug_on(!t);                                                    /* slirp cannot be told, and asks once, when it starts */
    *t = (struct timer_of_slirp){ .next = u->timers, .fn = fn, .arg = fn_arg, .at_ms = -1 };
    u->timers = t;
    return t;
}

static void timer_end(void *timer, void *arg)
{
    struct net_user *u = arg;

    for (struct timer_of_slirp **t = &u->timers; *t; t = &(*t)->next)
        if (*t == timer) {
            *t = (*t)->next;
            break;
        }
    free(timer);
}

static void timer_set(void *timer, s64 at_ms, void *arg UNUSED)
{
    ((struct timer_of_slirp *)timer)->at_ms = at_ms;
}

static void guest_error(const char *msg, void *arg)
{
    struct net_user *u = arg;

    log_msg(u->net.log, LOG_DEBUG, "network %s: %s", u->net.name, msg);
}

static void ignore_fd(int fd UNUSED, void *arg UNUSED)
{
}

static void ignore(void *arg UNUSED)
{
}

static const SlirpCb callbacks = {
    .send_packet = from_slirp, .guest_error = guest_error, .clock_get_ns = now_ns, .timer_new = timer_make, .timer_free = timer_end,
    .timer_mod = timer_set, .register_poll_fd = ignore_fd, .unregister_poll_fd = ignore_fd, .notify = ignore,
};

/* --- waiting --- */

static const struct { int slirp; short poll; } events[] = {
    { SLIRP_POLL_IN, POLLIN }, { SLIRP_POLL_OUT, POLLOUT }, { SLIRP_POLL_PRI, POLLPRI }, { SLIRP_POLL_ERR, POLLERR }, { SLIRP_POLL_HUP, POLLHUP },
};

static int add_poll(int fd, int want, void *arg)
{
    short e = 0;

    for (unsigned i = 0; i < ARRAY_SIZE(events); i++)
        if (want & events[i].slirp)
            e |= events[i].poll;
    return (int)net_poll_add(((struct net_user *)arg)->poll, fd, e);
}

static int get_revents(int i, void *arg)
{
    const struct net_poll *p = ((struct net_user *)arg)->poll;
    int got = 0;

    for (unsigned k = 0; i >= 0 && k < ARRAY_SIZE(events); k++)
        if (p->fd[i].revents & events[k].poll)
            got |= events[k].slirp;
    return got;
}

static void user_prepare(struct net *n, struct net_poll *p)
{
    struct net_user *u = user_of(n);
    u32 timeout = UINT32_MAX;
    s64 now = now_ns(u) / 1000000;

    u->poll = p;
    u->asked = !net_full(n);
    if (!u->asked)
        return;
    slirp_pollfds_fill(u->slirp, &timeout, add_poll, u);
    if (timeout < INT32_MAX)
        net_poll_timeout(p, (int)timeout);
    for (const struct timer_of_slirp *t = u->timers; t; t = t->next)
        if (t->at_ms >= 0)
            net_poll_timeout(p, t->at_ms > now ? (int)MIN(t->at_ms - now, 60000) : 0);
}

static void run_timers(struct net_user *u)
{
    s64 now = now_ns(u) / 1000000;

    for (struct timer_of_slirp *t = u->timers, *next; t; t = next) {
        next = t->next;
        if (t->at_ms < 0 || t->at_ms > now)
            continue;
        t->at_ms = -1;
        t->fn(t->arg);
    }
}

static void user_serve(struct net *n, struct net_poll *p UNUSED)
{
    struct net_user *u = user_of(n);

    if (!u->asked)
        return;
    run_timers(u);
    slirp_pollfds_poll(u->slirp, 0, get_revents, u);
}

/* --- building --- */

static void publish_name(const struct net_publish *p, char *text, size_t size)
{
    char addr[INET6_ADDRSTRLEN];

    inet_ntop(p->v6 ? AF_INET6 : AF_INET, p->v6 ? (const void *)&p->addr6 : &p->addr4, addr, sizeof(addr));
    snprintf(text, size, "%s%s%s:%u:%u%s", p->v6 ? "[" : "", addr, p->v6 ? "]" : "", p->host, p->guest, p->udp ? "/udp" : "");
}

static int publish_failed(const struct net_publish *p, int e)
{
    char name[80];

    publish_name(p, name, sizeof(name));
    switch (e) {
    case EADDRINUSE:
        return err(-e, "--publish %s: port %u of the host is in use; choose another, or stop who uses it", name, p->host);
    case EACCES: case EPERM:
        return err(-e, "--publish %s: port %u of the host is not for ordinary users; choose one from 1024 on", name, p->host);
    case EADDRNOTAVAIL:
        return err(-e, "--publish %s: the host does not have this address; leave it out, or give one of the host's", name);
    default:
        return err(e ? -e : -EIO, "--publish %s: cannot listen there: %s", name, e ? strerror(e) : "no reason is known");
    }
}

static socklen_t socket_address(const struct net_publish *p, struct sockaddr_storage *s)
{
    memset(s, 0, sizeof(*s));
    if (p->v6) {
        *(struct sockaddr_in6 *)s = (struct sockaddr_in6){ .sin6_family = AF_INET6, .sin6_addr = p->addr6, .sin6_port = htons(p->host) };
        return sizeof(struct sockaddr_in6);
    }
    *(struct sockaddr_in *)s = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr = p->addr4, .sin_port = htons(p->host) };
    return sizeof(struct sockaddr_in);
}

/* slirp's sockets share the ports of datagrams with whoever shares, too: two machines would both seem to have it. */
static int check_port(const struct net_publish *p)
{
    struct sockaddr_storage s;
    socklen_t len = socket_address(p, &s);
    int fd = socket(p->v6 ? AF_INET6 : AF_INET, (p->udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0), one = 1, e = 0;

    if (fd < 0)
        return errno;
    if (!p->udp)
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)); /* connections that have ended do not count */
    if (p->v6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof(one));
    if (bind(fd, (struct sockaddr *)&s, len) < 0)
        e = errno;
    close(fd);
    return e;
}

static int publish_one(struct net_user *u, const struct net_publish *p, struct in_addr guest4, struct in6_addr guest6)
{
    struct sockaddr_storage host;
    socklen_t len = socket_address(p, &host);
    struct sockaddr_in to4 = { .sin_family = AF_INET, .sin_addr = guest4, .sin_port = htons(p->guest) };
    struct sockaddr_in6 to6 = { .sin6_family = AF_INET6, .sin6_addr = guest6, .sin6_port = htons(p->guest) };
    int e = check_port(p);

    if (e)
        return publish_failed(p, e);
    errno = 0;
    if (slirp_add_hostxfwd(u->slirp, (struct sockaddr *)&host, len, p->v6 ? (struct sockaddr *)&to6 : (struct sockaddr *)&to4,
                           p->v6 ? sizeof(to6) : sizeof(to4), (p->udp ? SLIRP_HOSTFWD_UDP : 0) | (p->v6 ? SLIRP_HOSTFWD_V6ONLY : 0)) < 0)
        return publish_failed(p, errno);
    return 0;
}

static struct in6_addr prefix(unsigned index, const u8 host[8])
{
    struct in6_addr a = { .s6_addr = { 0xfe, 0xc0, 0, 0, 0, 0, (u8)(index >> 8), (u8)index } };

    memcpy(a.s6_addr + 8, host, 8);
    return a;
}

static struct in_addr in_network(const struct net_user *u, u8 host)
{
    return (struct in_addr){ htonl(10u << 24 | (u32)u->network << 8 | host) };
}

static int start_slirp(struct net_user *u, const struct net_config *c)
{
    /* RFC 4291, appendix A: the interface's part of the address */
    const u8 eui[8] = { c->mac[0] ^ 2, c->mac[1], c->mac[2], 0xff, 0xfe, c->mac[3], c->mac[4], c->mac[5] };
    SlirpConfig cfg = {
        .version = 4, .restricted = u->restricted, .disable_host_loopback = u->restricted,
        .in_enabled = true, .vnetwork = in_network(u, 0), .vnetmask = { htonl(0xffffff00) }, .vhost = in_network(u, 2),
        .vdhcp_start = in_network(u, 15), .vnameserver = in_network(u, 3),
        .in6_enabled = true, .vprefix_addr6 = prefix(c->index, (u8[8]){ 0 }), .vprefix_len = 64, .vhost6 = prefix(c->index, (u8[8]){ [7] = 2 }),
        .vnameserver6 = prefix(c->index, (u8[8]){ [7] = 3 }), .if_mtu = NET_MTU_MAX, .if_mru = NET_MTU_MAX,
    };
    int r = 0;

    u->slirp = slirp_new(&cfg, &callbacks, u);
    if (!u->slirp)
        return err(-EIO, "network %s: libslirp %s does not start", u->net.name, slirp_version_string());
    for (unsigned i = 0; r == 0 && i < u->publishes; i++)
        r = publish_one(u, &u->publish[i], cfg.vdhcp_start, prefix(c->index, eui));
    return r;
}

static void user_info(struct net *n, FILE *f)
{
    struct net_user *u = user_of(n);
    char name[80];

    fprintf(f, " 10.0.%u.0/24%s", u->network, u->restricted ? ", restricted" : "");
    for (unsigned i = 0; i < u->publishes; i++) {
        publish_name(&u->publish[i], name, sizeof(name));
        fprintf(f, ", publishes %s", name);
    }
}

static void user_close(struct net *n)
{
    struct net_user *u = user_of(n);

    if (u->slirp)
        slirp_cleanup(u->slirp);
    while (u->timers)
        timer_end(u->timers, u);
    net_fragments_free(u->fragments);
    free(u);
}

static const struct net_ops user_ops = {
    .kind = "user", .large = NET_FRAME_MAX, .send = user_send, .prepare = user_prepare, .serve = user_serve, .info = user_info, .close = user_close,
};

int net_user_new(const struct net_config *c, bool restricted, const struct net_publish *publish, unsigned publishes, struct net **out)
{
    struct net_user *u = calloc(1, sizeof(*u));
    int r;

    if (!u)
        return err(-ENOMEM, "network user: out of memory");
    net_init(&u->net, &user_ops, c, "user");
    u->restricted = restricted;
    u->network = (u8)(2 + c->index);
    u->publish = publish;
    u->publishes = publishes;
    u->fragments = net_fragments_new();
    r = u->fragments ? start_slirp(u, c) : err(-ENOMEM, "network user: out of memory");
    if (r < 0) {
        user_close(&u->net);
        return r;
    }
    *out = &u->net;
    return 0;
}
