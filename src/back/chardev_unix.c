/*
 * A console on a Unix stream socket (unix(7)): one client at a time, who may go and come again (chardev_host.h).
 *
 * A client that has only ended its sending (shutdown(2), `nc -N`) still gets output; it is gone when the socket hangs
 * up or a write fails. The listening socket is not watched while a client is there, so the next one waits in the
 * backlog.
 *
 * Locking: as fdio.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "back/chardev_host.h"
#include "back/fdio.h"
#include "back/listen.h"

struct chardev_unix {
    struct chardev c;
    struct loop *loop;
    const struct log *log;
    struct listener listener;
    struct loop_fd watch;
    /* the same socket, for reading and for writing: one watch per descriptor; -1: none */
    int client[2];
    struct fdin in;
    struct fdout out;
};

static struct chardev_unix *unix_of(struct chardev *c)
{
    return container_of(c, struct chardev_unix, c);
}

static void client_arrived(void *arg, u32 events);

static int listener_watch(struct chardev_unix *u)
{
    return u->watch.loop ? 0 : loop_fd_add(u->loop, &u->watch, u->listener.fd, EPOLLIN, client_arrived, u);
}

static void client_close(struct chardev_unix *u)
{
    fdin_detach(&u->in);
    fdout_detach(&u->out);
    for (unsigned i = 0; i < ARRAY_SIZE(u->client); i++) {
        if (u->client[i] >= 0)
            close(u->client[i]);
        u->client[i] = -1;
    }
}

static void client_gone(struct chardev_unix *u)
{
    client_close(u);
    u->c.opened = false;
    chardev_front_event(&u->c, CHARDEV_BROKEN);
    chardev_front_writable(&u->c);
    chardev_tell_drained(&u->c);
    if (listener_watch(u) < 0)
        log_msg(u->log, LOG_ERROR, "console unix:%s: takes no more clients: %s", u->listener.address.sun_path, err_last());
}

static size_t unix_room(void *arg)
{
    return chardev_front_room(&((struct chardev_unix *)arg)->c);
}

static void unix_data(void *arg, const u8 *buf, size_t len)
{
    chardev_front_receive(&((struct chardev_unix *)arg)->c, buf, len);
}

static void unix_end(void *arg, int error)
{
    struct chardev_unix *u = arg;
    chardev_front_event(&u->c, CHARDEV_EOF);
    if (error)
        client_gone(u);
}

static void unix_writable(void *arg)
{
    chardev_front_writable(&((struct chardev_unix *)arg)->c);
}

static void unix_drained(void *arg)
{
    chardev_tell_drained(&((struct chardev_unix *)arg)->c);
}

static void unix_broken(void *arg, int error UNUSED)
{
    client_gone(arg);
}

static const struct fdin_ops unix_in_ops = {.room = unix_room, .data = unix_data, .end = unix_end};
static const struct fdout_ops unix_out_ops = {.room = unix_writable, .drained = unix_drained, .broken = unix_broken};

static void client_arrived(void *arg, u32 events UNUSED)
{
    struct chardev_unix *u = arg;
    u->client[0] = listener_accept(&u->listener);
    if (u->client[0] < 0)
        return;
    u->client[1] = dup(u->client[0]);
    if (u->client[1] < 0 || fdin_attach(&u->in, u->client[0]) < 0) {
        client_close(u);
        return;
    }
    loop_fd_del(&u->watch);
    u->c.opened = true;
    chardev_front_event(&u->c, CHARDEV_OPENED);
    if (fdout_attach(&u->out, u->client[1]) < 0)
        client_gone(u);
}

static size_t chardev_unix_write(struct chardev *c, const u8 *buf, size_t len)
{
    return fdout_write(&unix_of(c)->out, buf, len);
}

static void chardev_unix_rx_ready(struct chardev *c)
{
    fdin_ready(&unix_of(c)->in);
}

static size_t chardev_unix_pending(struct chardev *c)
{
    return fdout_pending(&unix_of(c)->out);
}

static void chardev_unix_free(struct chardev *c)
{
    struct chardev_unix *u = unix_of(c);
    loop_fd_del(&u->watch);
    if (u->out.ops && u->in.ops)
        client_close(u);
    fdin_close(&u->in);
    fdout_close(&u->out);
    listener_close(&u->listener);
    free(u);
}

static const struct chardev_ops chardev_unix_ops = {
    .write = chardev_unix_write, .rx_ready = chardev_unix_rx_ready, .pending = chardev_unix_pending,
    .free = chardev_unix_free,
};

int chardev_unix_new(struct loop *loop, const char *path, const struct log *log, struct chardev **c)
{
    struct chardev_unix *u = calloc(1, sizeof(*u));
    if (!u)
        return err(-ENOMEM, "console unix:%s: no memory", path);
    *u = (struct chardev_unix){.c.ops = &chardev_unix_ops, .loop = loop, .log = log, .listener.fd = -1,
                               .client = {-1, -1}};
    int r = fdin_open(&u->in, loop, &unix_in_ops, u);
    if (r == 0)
        r = fdout_open(&u->out, loop, CHARDEV_BUFFER, true, &unix_out_ops, u);
    if (r == 0)
        r = listener_unix(&u->listener, "console", path, SOCK_STREAM);
    if (r == 0)
        r = listener_watch(u);
    if (r < 0) {
        chardev_unix_free(&u->c);
        return r;
    }
    *c = &u->c;
    return 0;
}
