/*
 * The front end of vhost-user (see vhost_user.h; the protocol is QEMU's docs/interop/vhost-user.rst): memory table, split rings (virtio 1.2, 2.7), kick
 * and call by eventfd. Of what can be negotiated only REPLY_ACK is used.
 *
 * The rings lie in a memfd, which the process maps as one more region of the guest's memory, far above all RAM. Which descriptors are free and
 * whose they are is noted in our own memory alone.
 */
#define _GNU_SOURCE
#include "back/vhost_user.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define QUEUE_BYTES (64 * KiB)
#define AVAIL_OFFSET (16 * KiB)
#define USED_OFFSET (32 * KiB)
#define SLOTS_OFFSET (48 * KiB)
#define RINGS_GPA (1ull << 51)
#define ANSWER_SECONDS 20
#define F_PROTOCOL_FEATURES 30
#define PROTOCOL_REPLY_ACK 3
#define FLAG_VERSION 1u
#define FLAG_REPLY 4u
#define FLAG_NEED_REPLY 8u
#define NO_DESC 0xffffu

enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9, SET_VRING_BASE = 10, SET_VRING_KICK = 12,
    SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18
};

struct message {
    u32 request, flags, size;
    union {
        u64 value;
        struct { u32 index, num; } state;
        struct { u32 index, flags; u64 desc, used, avail, log; } addr;
        struct { u32 regions, padding; struct { u64 gpa, size, user, offset; } region[VHOST_USER_REGIONS_MAX + 1]; } memory;
    };
} __attribute__((packed));
#define HEAD offsetof(struct message, value)

struct ring {
    struct vhost_user *v;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    u16 used_seen;
    u16 free, frees;                                               /* a list by next[] */
    u16 next[VHOST_USER_RING];
    void *token[VHOST_USER_RING];                                  /* of the chain that begins here */
    int kick, call;
    struct loop_fd watch;
};

struct vhost_user {
    int sock;
    struct loop *loop;
    struct loop_fd watch;
    const struct vhost_user_ops *ops;
    void *arg;
    u8 *mem;
    int memfd;
    bool acks, gone;
    unsigned queues;
    struct ring ring[VHOST_USER_QUEUES_MAX];
};

/* --- messages --- */

static int bad(const char *what)
{
    return err(-EPROTO, "vhost-user: %s", what);
}

static int send_message(struct vhost_user *v, struct message *m, u32 size, const int *fd, unsigned fds)
{
    char control[CMSG_SPACE(sizeof(int) * (VHOST_USER_REGIONS_MAX + 1))] __attribute__((aligned(8))) = { 0 };
    struct iovec iov = { m, HEAD + size };
    struct msghdr h = { .msg_iov = &iov, .msg_iovlen = 1 };

    m->flags |= FLAG_VERSION;
    m->size = size;
    if (fds) {
        struct cmsghdr *c = (struct cmsghdr *)control;

        h.msg_control = control;
        h.msg_controllen = CMSG_SPACE(sizeof(int) * fds);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * fds);
        memcpy(CMSG_DATA(c), fd, sizeof(int) * fds);
    }
    return sendmsg(v->sock, &h, MSG_NOSIGNAL) == (ssize_t)iov.iov_len ? 0 : bad("the connection broke");
}

static int receive_value(struct vhost_user *v, u32 request, u64 *value)
{
    struct message m = { 0 };
    size_t want = HEAD + sizeof(m.value);

    if (recv(v->sock, &m, want, MSG_WAITALL) != (ssize_t)want)
        return bad("no answer");
    if (m.request != request || !(m.flags & FLAG_REPLY) || m.size != sizeof(m.value))
        return bad("an answer that makes no sense");
    *value = m.value;
    return 0;
}

static int ask(struct vhost_user *v, u32 request, u64 *value)
{
    struct message m = { .request = request };
    int r = send_message(v, &m, 0, NULL, 0);

    return r < 0 ? r : receive_value(v, request, value);
}

/* Waits until it is done, where the other side can tell. */
static int tell(struct vhost_user *v, struct message *m, u32 size, const int *fd, unsigned fds)
{
    u64 result = 0;
    int r;

    m->flags = v->acks ? FLAG_NEED_REPLY : 0;
    r = send_message(v, m, size, fd, fds);
    if (r == 0 && v->acks)
        r = receive_value(v, m->request, &result);
    return r == 0 && result ? bad("a step was refused") : r;
}

static int tell_value(struct vhost_user *v, u32 request, u64 value)
{
    struct message m = { .request = request, .value = value };

    return tell(v, &m, sizeof(m.value), NULL, 0);
}

static int negotiate(struct vhost_user *v)
{
    u64 features, protocol;
    struct message owner = { .request = SET_OWNER };
    int r = ask(v, GET_FEATURES, &features);

    if (r < 0)
        return r;
    if (!(features & BIT(VIRTIO_F_VERSION_1)) || !(features & BIT(F_PROTOCOL_FEATURES)))
        return bad("it knows no virtio 1.0");
    r = ask(v, GET_PROTOCOL_FEATURES, &protocol);
    if (r == 0)
        r = tell_value(v, SET_PROTOCOL_FEATURES, protocol & BIT(PROTOCOL_REPLY_ACK));
    if (r < 0)
        return r;
    v->acks = protocol & BIT(PROTOCOL_REPLY_ACK);
    r = tell(v, &owner, 0, NULL, 0);
    return r < 0 ? r : tell_value(v, SET_FEATURES, BIT(VIRTIO_F_VERSION_1) | BIT(F_PROTOCOL_FEATURES));
}

static int give_memory(struct vhost_user *v, const struct vhost_region *region, unsigned regions)
{
    struct message m = { .request = SET_MEM_TABLE };
    int fd[VHOST_USER_REGIONS_MAX + 1];

    bug_on(regions > VHOST_USER_REGIONS_MAX);
    for (unsigned i = 0; i <= regions; i++) {
        struct vhost_region g = { RINGS_GPA, v->queues * QUEUE_BYTES, v->memfd, 0, v->mem };

        if (i < regions)
            g = region[i];
        m.memory.region[i].gpa = g.gpa;
        m.memory.region[i].size = g.size;
        m.memory.region[i].user = (u64)(uintptr_t)g.hva;
        m.memory.region[i].offset = g.offset;
        fd[i] = g.fd;
    }
    m.memory.regions = regions + 1;
    return tell(v, &m, 8 + (regions + 1) * (u32)sizeof(m.memory.region[0]), fd, regions + 1);
}

static int start_queue(struct vhost_user *v, u32 n)
{
    struct ring *g = &v->ring[n];
    struct message num = { .request = SET_VRING_NUM, .state = { n, VHOST_USER_RING } }, base = { .request = SET_VRING_BASE, .state = { n, 0 } },
                   addr = { .request = SET_VRING_ADDR,
                            .addr = { n, 0, (u64)(uintptr_t)g->desc, (u64)(uintptr_t)g->used, (u64)(uintptr_t)g->avail, 0 } },
                   kick = { .request = SET_VRING_KICK, .value = n }, call = { .request = SET_VRING_CALL, .value = n },
                   enable = { .request = SET_VRING_ENABLE, .state = { n, 1 } };
    int r = tell(v, &num, sizeof(num.state), NULL, 0);

    if (r == 0)
        r = tell(v, &base, sizeof(base.state), NULL, 0);
    if (r == 0)
        r = tell(v, &addr, sizeof(addr.addr), NULL, 0);
    if (r == 0)
        r = tell(v, &call, sizeof(call.value), &g->call, 1);
    if (r == 0)
        r = tell(v, &kick, sizeof(kick.value), &g->kick, 1);
    return r < 0 ? r : tell(v, &enable, sizeof(enable.state), NULL, 0);
}

/* --- rings --- */

bool vhost_user_add(struct vhost_user *v, unsigned queue, const struct vhost_part *part, unsigned parts, void *token)
{
    struct ring *g = &v->ring[queue];
    u16 head = g->free, last = NO_DESC, at = head;

    if (v->gone || parts > g->frees)
        return false;
    for (unsigned i = 0; i < parts; i++) {
        if (!part[i].len)
            continue;                                              /* some take offence at nothing */
        last = at;
        g->desc[at] = (struct vring_desc){ .addr = part[i].gpa, .len = part[i].len, .next = g->next[at],
                                           .flags = (u16)(VRING_DESC_F_NEXT | (part[i].writable ? VRING_DESC_F_WRITE : 0)) };
        at = g->next[at];
        g->frees--;
    }
    if (last == NO_DESC)
        return false;
    g->desc[last].flags &= (u16)~VRING_DESC_F_NEXT;
    g->next[last] = NO_DESC;
    g->free = at;
    g->token[head] = token;
    g->avail->ring[g->avail->idx % VHOST_USER_RING] = head;
    __atomic_store_n(&g->avail->idx, (u16)(g->avail->idx + 1), __ATOMIC_RELEASE);
    return true;
}

_Static_assert(USED_OFFSET + sizeof(struct vring_used_elem) * VHOST_USER_RING + 8 <= SLOTS_OFFSET &&
               SLOTS_OFFSET + VHOST_USER_SLOTS * VHOST_USER_SLOT_BYTES <= QUEUE_BYTES, "a queue's memory");

u8 *vhost_user_slot(struct vhost_user *v, unsigned queue, unsigned slot, u64 *gpa)
{
    u64 at = queue * QUEUE_BYTES + SLOTS_OFFSET + slot * (u64)VHOST_USER_SLOT_BYTES;

    bug_on(queue >= v->queues || slot >= VHOST_USER_SLOTS);
    *gpa = RINGS_GPA + at;
    return v->mem + at;
}

void vhost_user_kick(struct vhost_user *v, unsigned queue)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!v->gone && !(__atomic_load_n(&v->ring[queue].used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY))
        eventfd_write(v->ring[queue].kick, 1);
}

static void is_gone(void *arg)
{
    struct vhost_user *v = arg;

    loop_fd_del(&v->watch);
    if (v->gone)
        return;
    v->gone = true;
    v->ops->gone(v->arg);
}

void *vhost_user_take(struct vhost_user *v, unsigned queue, u32 *len)
{
    struct ring *g = &v->ring[queue];
    struct vring_used_elem e;
    void *token;
    u16 at;

    if (v->gone || __atomic_load_n(&g->used->idx, __ATOMIC_ACQUIRE) == g->used_seen)
        return NULL;
    e.id = __atomic_load_n(&g->used->ring[g->used_seen % VHOST_USER_RING].id, __ATOMIC_RELAXED);    /* once: the process may write there at any time */
    e.len = __atomic_load_n(&g->used->ring[g->used_seen % VHOST_USER_RING].len, __ATOMIC_RELAXED);
    if (e.id >= VHOST_USER_RING || !g->token[e.id]) {
        loop_post(v->loop, is_gone, v);                            /* nonsense; the caller holds its lock */
        return NULL;
    }
    g->used_seen++;
    token = g->token[e.id];
    g->token[e.id] = NULL;
    for (at = (u16)e.id; g->next[at] != NO_DESC; at = g->next[at])
        g->frees++;
    g->frees++;
    g->next[at] = g->free;
    g->free = (u16)e.id;
    *len = e.len;
    return token;
}

static void on_call(void *arg, u32 events UNUSED)
{
    struct ring *g = arg;
    eventfd_t n;

    eventfd_read(g->call, &n);
    if (!g->v->gone)
        g->v->ops->used(g->v->arg, (unsigned)(g - g->v->ring));
}

void vhost_user_wait(struct vhost_user *v, int ms)
{
    struct pollfd p[VHOST_USER_QUEUES_MAX + 1];

    for (unsigned i = 0; i < v->queues; i++)
        p[i] = (struct pollfd){ .fd = v->ring[i].call, .events = POLLIN };
    p[v->queues] = (struct pollfd){ .fd = v->sock, .events = POLLIN };
    poll(p, v->queues + 1, ms);
}

/* It has nothing to tell us: this is its end. */
static void on_socket(void *arg, u32 events UNUSED)
{
    is_gone(arg);
}

/* --- opening --- */

static int open_ring(struct vhost_user *v, unsigned n)
{
    struct ring *g = &v->ring[n];
    u8 *mem = v->mem + n * QUEUE_BYTES;

    g->v = v;
    g->desc = (struct vring_desc *)mem;
    g->avail = (struct vring_avail *)(mem + AVAIL_OFFSET);
    g->used = (struct vring_used *)(mem + USED_OFFSET);
    g->frees = VHOST_USER_RING;
    for (unsigned i = 0; i < VHOST_USER_RING; i++)
        g->next[i] = i + 1 < VHOST_USER_RING ? (u16)(i + 1) : NO_DESC;
    g->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    g->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (g->kick < 0 || g->call < 0)
        return err(-errno, "vhost-user: eventfd: %s", strerror(errno));
    return loop_fd_add(v->loop, &g->watch, g->call, EPOLLIN, on_call, g);
}

static int open_rings(struct vhost_user *v)
{
    int r = 0;

    v->memfd = memfd_create("doppel-rings", MFD_CLOEXEC);
    if (v->memfd < 0 || ftruncate(v->memfd, (off_t)(v->queues * QUEUE_BYTES)) < 0)
        return err(-errno, "vhost-user: memfd: %s", strerror(errno));
    v->mem = mmap(NULL, v->queues * QUEUE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, v->memfd, 0);
    if (v->mem == MAP_FAILED) {
        v->mem = NULL;
        return err(-ENOMEM, "vhost-user: out of memory");
    }
    for (unsigned i = 0; r == 0 && i < v->queues; i++)
        r = open_ring(v, i);
    return r;
}

int vhost_user_new(int sock, struct loop *loop, const struct vhost_region *region, unsigned regions, unsigned queues, const struct vhost_user_ops *ops,
                   void *arg, struct vhost_user **out)
{
    struct vhost_user *v = calloc(1, sizeof(*v));
    struct timeval limit = { .tv_sec = ANSWER_SECONDS };
    int r;

    bug_on(queues > VHOST_USER_QUEUES_MAX);
    if (!v) {
        close(sock);
        return err(-ENOMEM, "vhost-user: out of memory");
    }
    v->sock = sock;
    v->loop = loop;
    v->ops = ops;
    v->arg = arg;
    v->memfd = -1;
    v->queues = queues;
    for (unsigned i = 0; i < queues; i++)
        v->ring[i].kick = v->ring[i].call = -1;
    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    r = open_rings(v);
    if (r == 0)
        r = negotiate(v);
    if (r == 0)
        r = give_memory(v, region, regions);
    for (unsigned i = 0; r == 0 && i < queues; i++)
        r = start_queue(v, i);
    if (r == 0)
        r = loop_fd_add(loop, &v->watch, sock, EPOLLIN | EPOLLRDHUP, on_socket, v);
    if (r < 0) {
        vhost_user_free(v);
        return r;
    }
    *out = v;
    return 0;
}

void vhost_user_free(struct vhost_user *v)
{
    if (!v)
        return;
    loop_unpost(v->loop, is_gone, v);
    loop_fd_del(&v->watch);
    for (unsigned i = 0; i < v->queues; i++) {
        loop_fd_del(&v->ring[i].watch);
        if (v->ring[i].kick >= 0)
            close(v->ring[i].kick);
        if (v->ring[i].call >= 0)
            close(v->ring[i].call);
    }
    close(v->sock);
    if (v->mem)
        munmap(v->mem, v->queues * QUEUE_BYTES);
    if (v->memfd >= 0)
        close(v->memfd);
    free(v);
}
