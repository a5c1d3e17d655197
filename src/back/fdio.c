/*
 * Descriptors that other processes share, read and written without ever waiting: see fdio.h.
 *
 * All system calls on the descriptor are made on the loop's thread. Other threads only touch the output buffer under
 * its lock, and the wakers' eventfds.
 */
#define _GNU_SOURCE
#include "back/fdio.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/err.h"

#define CHUNK (32 * KiB)
#define CHUNKS_PER_TURN 16                                         /* then the loop looks at its other descriptors */
#define POLLED_CHUNK 512    /* a descriptor that polls writable takes at least this much (pipe(7): PIPE_BUF) */

static int fd_end_open(struct fd_end *e, int fd, bool write)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    *e = (struct fd_end){.fd = fd, .kind = FD_FILE};
    if (S_ISSOCK(st.st_mode)) {
        e->kind = FD_SOCKET;
    } else if (S_ISFIFO(st.st_mode) || (S_ISCHR(st.st_mode) && isatty(fd))) {
        char path[32];
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        int own = open(path, (write ? O_WRONLY : O_RDONLY) | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
        e->kind = own < 0 ? FD_POLLED : FD_OWN;
        e->ours = own >= 0;
        e->fd = own < 0 ? fd : own;
    }
    return 0;
}

static void fd_end_close(struct fd_end *e)
{
    if (e->ours)
        close(e->fd);
    *e = (struct fd_end){.fd = -1};
}

static bool would_wait(const struct fd_end *e, short events)
{
    struct pollfd p = {.fd = e->fd, .events = events};
    return e->kind == FD_POLLED && poll(&p, 1, 0) == 0;
}

/* As read(2) and write(2), but -errno for errors, and -EAGAIN where they would wait. */
static ssize_t fd_end_read(const struct fd_end *e, u8 *buf, size_t len)
{
    ssize_t n = -EAGAIN;
    if (would_wait(e, POLLIN))
        return n;
    do
        n = e->kind == FD_SOCKET ? recv(e->fd, buf, len, MSG_DONTWAIT) : read(e->fd, buf, len);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static ssize_t fd_end_write(const struct fd_end *e, const u8 *buf, size_t len)
{
    ssize_t n = -EAGAIN;
    if (would_wait(e, POLLOUT))
        return n;
    if (e->kind == FD_POLLED)
        len = MIN(len, POLLED_CHUNK);
    do
        n = e->kind == FD_SOCKET ? send(e->fd, buf, len, MSG_DONTWAIT | MSG_NOSIGNAL) : write(e->fd, buf, len);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static int waker_open(struct fd_waker *w, struct loop *loop, void (*fn)(void *arg, u32 events), void *arg)
{
    w->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (w->fd < 0)
        return err(-errno, "cannot make an event descriptor: %s; raise the limit of open files (ulimit -n)",
                   strerror(errno));
    int r = loop_fd_add(loop, &w->watch, w->fd, EPOLLIN, fn, arg);
    if (r < 0)
        close(w->fd);
    return r;
}

static void waker_wake(struct fd_waker *w)
{
    u64 one = 1;
    /* It fails only when the counter is full, and then the loop is awake already. */
    if (write(w->fd, &one, sizeof(one)) < 0)
        return;
}

static void waker_clear(struct fd_waker *w)
{
    u64 count;
    if (read(w->fd, &count, sizeof(count)) < 0)
        return;
}

static void waker_close(struct fd_waker *w)
{
    loop_fd_del(&w->watch);
    close(w->fd);
}

/* --- input --- */

static void fdin_event(void *arg, u32 events);

static void fdin_stop(struct fdin *in, int error)
{
    fdin_detach(in);
    in->ops->end(in->arg, error);
}

/* Waits for more. False: this kind of descriptor cannot be waited for, it is always ready. */
static bool fdin_watch(struct fdin *in)
{
    return in->watch.loop || loop_fd_add(in->loop, &in->watch, in->end.fd, EPOLLIN, fdin_event, in) == 0;
}

/* Asks for room; without any, arranges that fdin_ready() wakes us, and looks once more in case it came between. */
static size_t fdin_room(struct fdin *in)
{
    size_t room = in->ops->room(in->arg);
    if (room)
        return room;
    atomic_store(&in->waiting, true);
    room = in->ops->room(in->arg);
    if (room)
        atomic_store(&in->waiting, false);
    return room;
}

static void fdin_pump(struct fdin *in)
{
    u8 buf[CHUNK];
    for (unsigned i = 0; i < CHUNKS_PER_TURN; i++) {
        size_t room = fdin_room(in);
        if (!room) {
            /* Not watched without room: a hang-up cannot be masked and would spin. */
            loop_fd_del(&in->watch);
            return;
        }
        ssize_t n = fd_end_read(&in->end, buf, MIN(room, sizeof(buf)));
        if (n == -EAGAIN) {
            if (!fdin_watch(in))
                fdin_stop(in, EIO);
            return;
        }
        if (n <= 0) {
            fdin_stop(in, (int)-n);
            return;
        }
        in->ops->data(in->arg, buf, (size_t)n);
    }
    if (!fdin_watch(in))
        waker_wake(&in->waker);
}

static void fdin_event(void *arg, u32 events UNUSED)
{
    fdin_pump(arg);
}

static void fdin_woken(void *arg, u32 events UNUSED)
{
    struct fdin *in = arg;
    waker_clear(&in->waker);
    if (in->end.fd >= 0)
        fdin_pump(in);
}

int fdin_open(struct fdin *in, struct loop *loop, const struct fdin_ops *ops, void *arg)
{
    *in = (struct fdin){.loop = loop, .arg = arg, .end.fd = -1};
    int r = waker_open(&in->waker, loop, fdin_woken, in);
    if (r < 0)
        return r;
    in->ops = ops;
    return 0;
}

int fdin_attach(struct fdin *in, int fd)
{
    int r = fd_end_open(&in->end, fd, false);
    if (r < 0)
        return err(r, "cannot read descriptor %d: %s", fd, strerror(-r));
    /*
     * Reading comes before waiting: poll(2) does not tell of the end of a FIFO whose writers left before it was opened
     * here.
     */
    waker_wake(&in->waker);
    return 0;
}

void fdin_detach(struct fdin *in)
{
    loop_fd_del(&in->watch);
    fd_end_close(&in->end);
}

void fdin_ready(struct fdin *in)
{
    if (atomic_exchange(&in->waiting, false))
        waker_wake(&in->waker);
}

void fdin_close(struct fdin *in)
{
    if (!in->ops)
        return;
    fdin_detach(in);
    waker_close(&in->waker);
    in->ops = NULL;
}

/* --- output --- */

static void fdout_event(void *arg, u32 events);

static void fdout_break(struct fdout *out, int error)
{
    fdout_detach(out);
    out->ops->broken(out->arg, error);
}

/* Waits until the descriptor takes more, or (want false) only for its breaking. */
static int fdout_watch(struct fdout *out, bool want)
{
    u32 events = want ? EPOLLOUT : 0;
    if (!out->watch.loop) {
        int r = loop_fd_add(out->loop, &out->watch, out->end.fd, events, fdout_event, out);
        if (r < 0)
            return r;
    } else if (want != out->armed) {
        loop_fd_mod(&out->watch, events);
    }
    out->armed = want;
    return 0;
}

static size_t fdout_piece(struct fdout *out, const u8 **p)
{
    pthread_mutex_lock(&out->lock);
    size_t n = MIN(out->len, out->cap - out->head);
    *p = out->buf + out->head;
    if (!n)
        out->woken = false;
    pthread_mutex_unlock(&out->lock);
    return n;
}

/* n bytes are written. Returns whether somebody waits for room. */
static bool fdout_consume(struct fdout *out, size_t n)
{
    pthread_mutex_lock(&out->lock);
    out->head = (out->head + n) % out->cap;
    out->len -= n;
    bool was_short = out->was_short;
    out->was_short = false;
    pthread_mutex_unlock(&out->lock);
    return was_short;
}

/*
 * Writes what there is. Producers only append behind the piece that is being written, so it is read without the lock.
 * out->woken stays set until the buffer is seen empty: while a flush is certain to come, producers do not wake the loop
 * again.
 */
static void fdout_flush(struct fdout *out)
{
    const u8 *p;
    size_t n = 0;
    for (unsigned i = 0; i < CHUNKS_PER_TURN && (n = fdout_piece(out, &p)); i++) {
        ssize_t done = fd_end_write(&out->end, p, MIN(n, CHUNK));
        if (done == -EAGAIN) {
            int r = fdout_watch(out, true);
            if (r < 0)
                fdout_break(out, -r);
            return;
        }
        if (done < 0) {
            fdout_break(out, (int)-done);
            return;
        }
        if (fdout_consume(out, (size_t)done))
            out->ops->room(out->arg);
    }
    if (n) {
        waker_wake(&out->waker);
        return;
    }
    if (out->armed)
        fdout_watch(out, false);
    if (out->ops->drained && fdout_pending(out) == 0)
        out->ops->drained(out->arg);
}

static void fdout_event(void *arg, u32 events)
{
    struct fdout *out = arg;
    if (events & (EPOLLERR | EPOLLHUP))
        fdout_break(out, EPIPE);
    else
        fdout_flush(out);
}

static void fdout_woken(void *arg, u32 events UNUSED)
{
    struct fdout *out = arg;
    waker_clear(&out->waker);
    if (out->attached) {
        fdout_flush(out);
        return;
    }
    pthread_mutex_lock(&out->lock);
    out->woken = false;
    pthread_mutex_unlock(&out->lock);
    if (out->ops->wanted)
        out->ops->wanted(out->arg);
}

int fdout_open(struct fdout *out, struct loop *loop, size_t cap, bool keep, const struct fdout_ops *ops, void *arg)
{
    *out = (struct fdout){.loop = loop, .cap = cap, .keep = keep, .arg = arg, .end.fd = -1};
    out->buf = malloc(cap);
    if (!out->buf)
        return err(-ENOMEM, "no memory for a buffer of %zu bytes", cap);
    int r = waker_open(&out->waker, loop, fdout_woken, out);
    if (r < 0) {
        free(out->buf);
        return r;
    }
    pthread_mutex_init(&out->lock, NULL);
    out->ops = ops;
    return 0;
}

int fdout_attach(struct fdout *out, int fd)
{
    int r = fd_end_open(&out->end, fd, true);
    if (r < 0)
        return err(r, "cannot write descriptor %d: %s", fd, strerror(-r));
    pthread_mutex_lock(&out->lock);
    out->attached = true;
    out->woken = true;
    pthread_mutex_unlock(&out->lock);
    /* From now on a breaking is noticed even if nothing is written; -EPERM: a file, which does not break. */
    r = fdout_watch(out, false);
    if (r < 0 && r != -EPERM) {
        fdout_detach(out);
        return r;
    }
    waker_wake(&out->waker);
    return 0;
}

void fdout_detach(struct fdout *out)
{
    loop_fd_del(&out->watch);
    out->armed = false;
    fd_end_close(&out->end);
    pthread_mutex_lock(&out->lock);
    out->attached = false;
    out->woken = false;
    if (!out->keep)
        out->len = 0;
    pthread_mutex_unlock(&out->lock);
}

static void ring_append(struct fdout *out, const u8 *buf, size_t len)
{
    size_t tail = (out->head + out->len) % out->cap;
    size_t first = MIN(len, out->cap - tail);
    memcpy(out->buf + tail, buf, first);
    memcpy(out->buf, buf + first, len - first);
    out->len += len;
}

/* Detached: makes place by forgetting the oldest bytes. */
static void ring_replace(struct fdout *out, const u8 *buf, size_t len)
{
    if (len > out->cap) {
        buf += len - out->cap;
        len = out->cap;
    }
    size_t over = len > out->cap - out->len ? len - (out->cap - out->len) : 0;
    out->head = (out->head + over) % out->cap;
    out->len -= over;
    ring_append(out, buf, len);
}

size_t fdout_write(struct fdout *out, const u8 *buf, size_t len)
{
    size_t taken = len;
    bool wake = false;
    pthread_mutex_lock(&out->lock);
    if (out->attached) {
        taken = MIN(len, out->cap - out->len);
        ring_append(out, buf, taken);
        out->was_short |= taken < len;
        wake = !out->woken && out->len;
    } else if (out->keep) {
        ring_replace(out, buf, len);
        wake = !out->woken && out->ops->wanted;
    }
    out->woken |= wake;
    pthread_mutex_unlock(&out->lock);
    if (wake)
        waker_wake(&out->waker);
    return taken;
}

void fdout_wake(struct fdout *out)
{
    waker_wake(&out->waker);
}

size_t fdout_pending(struct fdout *out)
{
    pthread_mutex_lock(&out->lock);
    size_t n = out->attached ? out->len : 0;
    pthread_mutex_unlock(&out->lock);
    return n;
}

void fdout_close(struct fdout *out)
{
    if (!out->ops)
        return;
    fdout_detach(out);
    waker_close(&out->waker);
    pthread_mutex_destroy(&out->lock);
    free(out->buf);
    out->ops = NULL;
}
