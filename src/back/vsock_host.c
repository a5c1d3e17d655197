/*
 * Addresses of vsock on this host (vsock_host.h): unix(7). The words of the handshake are those that Firecracker uses ("FROM" and "MARKED" are ours).
 *
 * A client that has connected and not yet said whom it wants is a `knock`. There are KNOCKS_MAX of them; then the eldest is turned away,
 * so that silent clients cost nobody else the service. Of what a client sends no more is read than its first line.
 */
#define _GNU_SOURCE
#include "back/vsock_host.h"

#include <ctype.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "back/listen.h"

#define KNOCKS_MAX 64
#define LINE_MAX_BYTES 64                                          /* of the handshake, with its newline */
#define PATH_LEN 256                                               /* what is cut there is too long for an address as well */

struct knock {
    struct vsock_host *h;
    int fd;                                                        /* -1: free */
    bool seq;
    u64 age;
    struct loop_fd watch;
};

/* Where clients come in: for streams, for messages. */
struct door {
    struct vsock_host *h;
    struct listener listener;
    struct loop_fd watch;
    bool seq;
};

struct vsock_host {
    struct vsock_host_config config;
    struct loop *loop;
    struct door door[2];
    const struct vsock_host_ops *ops;
    void *arg;
    u64 knocked;
    bool complained;
    struct knock knock[KNOCKS_MAX];
};

/* --- lines --- */

/*
 * Takes the first line from the socket, without its newline: its length; 0: it is not complete; -errno: it never will be. A message is a line, or it is nonsense. (A larger one
 * comes as much longer than it is, by MSG_TRUNC.)
 */
static int take_line(int fd, char line[LINE_MAX_BYTES], bool seq)
{
    ssize_t n = recv(fd, line, LINE_MAX_BYTES, MSG_PEEK | MSG_DONTWAIT | (seq ? MSG_TRUNC : 0));
    char *end = n > 0 ? memchr(line, '\n', (size_t)MIN(n, LINE_MAX_BYTES)) : NULL;

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (n == 0)
        return -ECONNRESET;
    if (seq && (n > LINE_MAX_BYTES || end != line + n - 1))
        return -EPROTO;
    if (!end)
        return n == LINE_MAX_BYTES ? -EPROTO : 0;
    n = recv(fd, line, (size_t)(end - line) + 1, MSG_DONTWAIT);
    if (n != end - line + 1)
        return -EPROTO;
    *end = '\0';
    return end == line ? -EPROTO : (int)(end - line);
}

/* A decimal number of 32 bits at *p, which is advanced behind it. */
static bool take_number(const char **p, u32 *v)
{
    u64 n = 0;
    const char *at = *p;

    for (; isdigit((unsigned char)*at) && at - *p < 10; at++)
        n = 10 * n + (u64)(*at - '0');
    if (at == *p || isdigit((unsigned char)*at) || n > UINT32_MAX)
        return false;
    *p = at;
    *v = (u32)n;
    return true;
}

static bool take_word(const char **p, const char *word)
{
    size_t len = strlen(word);

    if (strncmp(*p, word, len))
        return false;
    *p += len;
    return true;
}

/* "CONNECT PORT" or "CONNECT PORT FROM CID:PORT", and for messages " MARKED" behind that; a carriage return at the end is nothing (telnet). */
static bool parse_connect(const char *p, u32 *cid, u32 *from, u32 *to, enum vsock_kind *kind)
{
    *cid = VSOCK_CID_HOST;
    *from = 0;
    if (!take_word(&p, "CONNECT ") || !take_number(&p, to))
        return false;
    if (take_word(&p, " FROM ") &&
        (!take_number(&p, cid) || !take_word(&p, ":") || !take_number(&p, from) || *cid < VSOCK_CID_FIRST || *cid > VSOCK_CID_MAX))
        return false;
    if (*kind == VSOCK_MESSAGES && take_word(&p, " MARKED"))
        *kind = VSOCK_MARKED;
    take_word(&p, "\r");
    return !*p;
}

/* --- clients --- */

static void knock_forget(struct knock *k)
{
    loop_fd_del(&k->watch);
    k->fd = -1;
}

static void knock_refuse(struct knock *k)
{
    int fd = k->fd;

    knock_forget(k);
    close(fd);
    vsock_host_closed(k->h);
}

static void knock_speaks(void *arg, u32 events UNUSED)
{
    struct knock *k = arg;
    struct vsock_host *h = k->h;
    char line[LINE_MAX_BYTES];
    enum vsock_kind kind = k->seq ? VSOCK_MESSAGES : VSOCK_STREAM;
    u32 cid, from, to;
    int n = take_line(k->fd, line, k->seq), fd = k->fd;

    if (n == 0)
        return;
    if (n < 0 || !parse_connect(line, &cid, &from, &to, &kind) || !h->ops) {
        knock_refuse(k);
        return;
    }
    knock_forget(k);
    h->ops->incoming(h->arg, fd, cid, from, to, kind);
}

/* A free place, or that of the eldest. */
static struct knock *knock_place(struct vsock_host *h)
{
    struct knock *place = h->knock;

    for (struct knock *k = h->knock; k < h->knock + KNOCKS_MAX; k++) {
        if (k->fd < 0)
            return k;
        if (k->age < place->age)
            place = k;
    }
    knock_refuse(place);
    return place;
}

static void client_arrived(void *arg, u32 events UNUSED)
{
    struct door *d = arg;
    struct vsock_host *h = d->h;
    int fd = listener_accept(&d->listener);
    struct knock *k;

    if (fd < 0) {
        if (errno == EAGAIN || errno == ECONNABORTED || errno == EINTR)
            return;
        if (!h->complained)
            log_msg(h->config.log, LOG_WARN, "vsock unix:%s: cannot take a client: %s; it waits until another has gone", d->listener.address.sun_path,
                    strerror(errno));
        h->complained = true;
        loop_fd_del(&d->watch);                                    /* it would be reported again and again */
        return;
    }
    k = knock_place(h);
    k->fd = fd;
    k->seq = d->seq;
    k->age = ++h->knocked;
    if (loop_fd_add(h->loop, &k->watch, fd, EPOLLIN, knock_speaks, k) < 0) {
        k->fd = -1;
        close(fd);
    }
}

static int open_doors(struct vsock_host *h)
{
    int r = 0;

    for (struct door *d = h->door; d < h->door + ARRAY_SIZE(h->door) && r == 0; d++)
        if (!d->watch.loop)
            r = loop_fd_add(h->loop, &d->watch, d->listener.fd, EPOLLIN, client_arrived, d);
    return r;
}

void vsock_host_closed(struct vsock_host *h)
{
    if (h->ops)
        open_doors(h);
}

int vsock_host_accepted(int fd, u32 port)
{
    char line[32];
    int len = snprintf(line, sizeof(line), "OK %u\n", port);

    return send(fd, line, (size_t)len, MSG_DONTWAIT | MSG_NOSIGNAL) == len ? 0 : -EPIPE;
}

/* --- calls --- */

static int connect_to(const char *path, enum vsock_kind kind)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd, error;

    if ((size_t)snprintf(address.sun_path, sizeof(address.sun_path), "%s", path) >= sizeof(address.sun_path))
        return -ECONNREFUSED;
    fd = socket(AF_UNIX, (kind == VSOCK_STREAM ? SOCK_STREAM : SOCK_SEQPACKET) | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
        return fd;
    error = -errno;
    close(fd);
    return error;
}

/* A program of the host's. */
static int call_program(struct vsock_host *h, u32 to, enum vsock_kind *kind)
{
    char path[PATH_LEN];
    int fd = -ENOENT;

    if (*kind == VSOCK_MESSAGES) {
        snprintf(path, sizeof(path), "%s_%u" VSOCK_MARKED_SUFFIX, h->config.path, to);
        fd = connect_to(path, VSOCK_MARKED);
    }
    if (fd >= 0) {
        *kind = VSOCK_MARKED;
        return fd;
    }
    snprintf(path, sizeof(path), "%s_%u", h->config.path, to);
    return connect_to(path, *kind);
}

static int call_guest(struct vsock_host *h, u32 cid, u32 from, u32 to, enum vsock_kind *kind)
{
    char path[PATH_LEN], line[LINE_MAX_BYTES];
    int fd, len;

    if (!h->config.peers || cid < VSOCK_CID_FIRST || cid > VSOCK_CID_MAX || cid == h->config.cid)
        return -ECONNREFUSED;
    if (*kind == VSOCK_MESSAGES)
        *kind = VSOCK_MARKED;
    snprintf(path, sizeof(path), "%s/" VSOCK_PEER_NAME "/" VSOCK_SOCKET_NAME "%s", h->config.peers, cid, *kind == VSOCK_STREAM ? "" : VSOCK_SEQ_SUFFIX);
    fd = connect_to(path, *kind);
    if (fd < 0)
        return fd;
    len = snprintf(line, sizeof(line), "CONNECT %u FROM %u:%u%s\n", to, h->config.cid, from, *kind == VSOCK_MARKED ? " MARKED" : "");
    if (send(fd, line, (size_t)len, MSG_DONTWAIT | MSG_NOSIGNAL) == len)
        return fd;
    close(fd);
    return -EPIPE;
}

int vsock_host_call(struct vsock_host *h, u32 cid, u32 from, u32 to, enum vsock_kind *kind)
{
    return cid == VSOCK_CID_HOST ? call_program(h, to, kind) : call_guest(h, cid, from, to, kind);
}

int vsock_host_answer(int fd, bool seq)
{
    char line[LINE_MAX_BYTES];
    int n = take_line(fd, line, seq);

    if (n <= 0)
        return n;
    return strncmp(line, "OK ", 3) ? -EPROTO : 1;
}

/* --- life --- */

u32 vsock_host_cid(const struct vsock_host *h)
{
    return h->config.cid;
}

int vsock_host_serve(struct vsock_host *h, const struct vsock_host_ops *ops, void *arg)
{
    h->ops = ops;
    h->arg = arg;
    if (ops)
        return open_doors(h);
    for (struct door *d = h->door; d < h->door + ARRAY_SIZE(h->door); d++)
        loop_fd_del(&d->watch);
    for (struct knock *k = h->knock; k < h->knock + KNOCKS_MAX; k++)
        if (k->fd >= 0)
            knock_refuse(k);
    return 0;
}

static int door_make(struct door *d)
{
    char path[sizeof(d->listener.address.sun_path) + 1];
    int n = snprintf(path, sizeof(path), "%s%s", d->h->config.path, d->seq ? VSOCK_SEQ_SUFFIX : ""), r;

    if ((size_t)n >= sizeof(path) - 1)
        return err(-ENAMETOOLONG, "vsock unix:%s: the path is too long; use one of %zu bytes at most", d->h->config.path, sizeof(path) - 2 - strlen(VSOCK_SEQ_SUFFIX));
    r = listener_unix(&d->listener, "vsock", path, d->seq ? SOCK_SEQPACKET : SOCK_STREAM);
    if (r == 0 && listen(d->listener.fd, KNOCKS_MAX) < 0)          /* more than one client at a time */
        r = err(-errno, "vsock unix:%s: cannot listen: %s", path, strerror(errno));
    return r;
}

int vsock_host_new(struct loop *loop, const struct vsock_host_config *config, struct vsock_host **out)
{
    struct vsock_host *h = calloc(1, sizeof(*h));
    int r = 0;

    if (!h)
        return err(-ENOMEM, "vsock: out of memory");
    h->config = *config;
    h->loop = loop;
    for (struct knock *k = h->knock; k < h->knock + KNOCKS_MAX; k++)
        *k = (struct knock){ .h = h, .fd = -1 };
    for (unsigned i = 0; i < ARRAY_SIZE(h->door); i++)
        h->door[i] = (struct door){ .h = h, .listener.fd = -1, .seq = i };
    for (struct door *d = h->door; d < h->door + ARRAY_SIZE(h->door) && r == 0; d++)
        r = door_make(d);
    if (r < 0) {
        vsock_host_free(h);
        return r;
    }
    *out = h;
    return 0;
}

void vsock_host_free(struct vsock_host *h)
{
    if (!h)
        return;
    vsock_host_serve(h, NULL, NULL);
    for (struct door *d = h->door; d < h->door + ARRAY_SIZE(h->door); d++)
        listener_close(&d->listener);
    free(h);
}
