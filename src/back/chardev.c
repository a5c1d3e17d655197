/*
 * Character devices over descriptors of ours or of the caller's, and the one that only remembers (chardev_host.h).
 *
 * Locking: fdio has its own; the tail has one lock around its ring.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "back/chardev_host.h"
#include "back/fdio.h"

void chardev_free(struct chardev *c)
{
    if (c)
        c->ops->free(c);
}

/* --- descriptors --- */

struct chardev_fd {
    struct chardev c;
    struct fdin in;
    struct fdout out;
    int in_fd, out_fd;
    const char *name;
    const struct log *log;
    bool end_wanted;                                               /* the guest has ended its output; under out.lock */
    bool may_close;                                                /* EPIPE is not spoken of */
    int lost;                                                      /* chardev_fd_lost() */
};

static struct chardev_fd *fd_of(struct chardev *c)
{
    return container_of(c, struct chardev_fd, c);
}

/*
 * The other side sees the end of a standard stream when its last descriptor goes: ours is replaced, as its number must
 * not be given to another file. Standard error stays: doppel speaks there itself.
 */
static void standard_stream_end(int fd)
{
    if (fd != STDIN_FILENO && fd != STDOUT_FILENO)
        return;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0)
        return;
    dup2(null, fd);
    close(null);
}

static void fd_output_end(struct chardev_fd *f)
{
    fdout_detach(&f->out);
    standard_stream_end(f->out_fd);
}

static size_t fd_in_room(void *arg)
{
    struct chardev_fd *f = arg;
    return chardev_front_room(&f->c);
}

static void fd_in_data(void *arg, const u8 *buf, size_t len)
{
    struct chardev_fd *f = arg;
    chardev_front_receive(&f->c, buf, len);
}

static void fd_in_end(void *arg, int error)
{
    struct chardev_fd *f = arg;
    /* EIO: a terminal that has hung up, or whose job we are no more. */
    if (error && error != EIO)
        log_msg(f->log, LOG_WARN, "%s: cannot read: %s; the guest gets no more input", f->name, strerror(error));
    chardev_front_event(&f->c, CHARDEV_EOF);
}

static void fd_out_room(void *arg)
{
    struct chardev_fd *f = arg;
    chardev_front_writable(&f->c);
}

static void fd_out_drained(void *arg)
{
    struct chardev_fd *f = arg;
    pthread_mutex_lock(&f->out.lock);
    bool end = f->end_wanted;
    pthread_mutex_unlock(&f->out.lock);
    if (end)
        fd_output_end(f);
    chardev_tell_drained(&f->c);
}

static void fd_out_broken(void *arg, int error)
{
    struct chardev_fd *f = arg;
    if (error != EPIPE || !f->may_close)
        log_msg(f->log, LOG_ERROR, "%s: cannot write: %s; the guest runs on, what it says is dropped", f->name,
                strerror(error));
    if (error != EPIPE)
        f->lost = error;
    chardev_front_event(&f->c, CHARDEV_BROKEN);
    chardev_front_writable(&f->c);
    chardev_tell_drained(&f->c);
}

static const struct fdin_ops fd_in_ops = {.room = fd_in_room, .data = fd_in_data, .end = fd_in_end};
static const struct fdout_ops fd_out_ops = {.room = fd_out_room, .drained = fd_out_drained, .broken = fd_out_broken};

static size_t chardev_fd_write(struct chardev *c, const u8 *buf, size_t len)
{
    struct chardev_fd *f = fd_of(c);
    return f->out.ops ? fdout_write(&f->out, buf, len) : len;
}

static void chardev_fd_rx_ready(struct chardev *c)
{
    struct chardev_fd *f = fd_of(c);
    if (f->in.ops)
        fdin_ready(&f->in);
}

static void chardev_fd_end_output(struct chardev *c)
{
    struct chardev_fd *f = fd_of(c);
    if (!f->out.ops)
        return;
    pthread_mutex_lock(&f->out.lock);
    f->end_wanted = true;
    pthread_mutex_unlock(&f->out.lock);
    fdout_wake(&f->out);
}

static size_t chardev_fd_pending(struct chardev *c)
{
    struct chardev_fd *f = fd_of(c);
    return f->out.ops ? fdout_pending(&f->out) : 0;
}

static void chardev_fd_free(struct chardev *c)
{
    struct chardev_fd *f = fd_of(c);
    fdin_close(&f->in);
    fdout_close(&f->out);
    free(f);
}

static const struct chardev_ops chardev_fd_ops = {
    .write = chardev_fd_write, .rx_ready = chardev_fd_rx_ready, .end_output = chardev_fd_end_output,
    .pending = chardev_fd_pending, .free = chardev_fd_free,
};

int chardev_fd_new(struct loop *loop, int in, int out, const char *name, const struct log *log, struct chardev **c)
{
    struct chardev_fd *f = calloc(1, sizeof(*f));
    if (!f)
        return err(-ENOMEM, "%s: no memory", name);
    *f = (struct chardev_fd){.c = {.ops = &chardev_fd_ops, .opened = true}, .in_fd = in, .out_fd = out, .name = name,
                             .log = log};
    int r = 0;
    if (out >= 0)
        r = fdout_open(&f->out, loop, CHARDEV_BUFFER, false, &fd_out_ops, f);
    if (r == 0 && out >= 0)
        r = fdout_attach(&f->out, out);
    if (r == 0 && in >= 0)
        r = fdin_open(&f->in, loop, &fd_in_ops, f);
    if (r == 0 && in >= 0)
        r = fdin_attach(&f->in, in);
    if (r < 0) {
        chardev_fd_free(&f->c);
        return err(r, "%s: %s", name, err_last());
    }
    *c = &f->c;
    return 0;
}

void chardev_fd_may_close(struct chardev *c)
{
    fd_of(c)->may_close = true;
}

int chardev_fd_lost(struct chardev *c)
{
    return c ? fd_of(c)->lost : 0;
}

void chardev_fd_end_input(struct chardev *c)
{
    struct chardev_fd *f = fd_of(c);
    if (!f->in.ops)
        return;
    fdin_detach(&f->in);
    standard_stream_end(f->in_fd);
}

/* --- tail --- */

struct chardev_tail {
    struct chardev c;
    pthread_mutex_t lock;
    size_t cap, head, len;
    u8 buf[];
};

static size_t chardev_tail_write(struct chardev *c, const u8 *buf, size_t len)
{
    struct chardev_tail *t = container_of(c, struct chardev_tail, c);
    pthread_mutex_lock(&t->lock);
    for (size_t i = 0; i < len; i++) {
        t->buf[(t->head + t->len) % t->cap] = buf[i];
        if (t->len < t->cap)
            t->len++;
        else
            t->head = (t->head + 1) % t->cap;
    }
    pthread_mutex_unlock(&t->lock);
    return len;
}

static void chardev_tail_rx_ready(struct chardev *c UNUSED)
{
}

static void chardev_tail_free(struct chardev *c)
{
    struct chardev_tail *t = container_of(c, struct chardev_tail, c);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

static const struct chardev_ops chardev_tail_ops = {
    .write = chardev_tail_write, .rx_ready = chardev_tail_rx_ready, .free = chardev_tail_free,
};

int chardev_tail_new(size_t cap, struct chardev **c)
{
    bug_on(cap == 0);
    struct chardev_tail *t = calloc(1, sizeof(*t) + cap);
    if (!t)
        return err(-ENOMEM, "no memory for %zu bytes of the guest's messages", cap);
    t->c = (struct chardev){.ops = &chardev_tail_ops, .opened = true};
    t->cap = cap;
    pthread_mutex_init(&t->lock, NULL);
    *c = &t->c;
    return 0;
}

size_t chardev_tail_get(struct chardev *c, u8 *buf, size_t size, unsigned max_lines)
{
    struct chardev_tail *t = container_of(c, struct chardev_tail, c);
    pthread_mutex_lock(&t->lock);
    size_t n = 0;
    unsigned lines = 0;
    for (; n < MIN(t->len, size); n++) {
        u8 b = t->buf[(t->head + t->len - 1 - n) % t->cap];
        /* The line feed that ends the last line does not count. */
        if (b == '\n' && n > 0 && ++lines == max_lines)
            break;
    }
    for (size_t i = 0; i < n; i++)
        buf[i] = t->buf[(t->head + t->len - n + i) % t->cap];
    pthread_mutex_unlock(&t->lock);
    return n;
}
