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
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "back/chardev_host.h"
#include "back/fdio.h"

struct chardev_unix {
    struct chardev c;
    struct loop *loop;
    const struct log *log;
    struct sockaddr_un address;
    struct stat made;                                              /* the socket file that is ours to remove */
    int listener;
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
    return u->watch.loop ? 0 : loop_fd_add(u->loop, &u->watch, u->listener, EPOLLIN, client_arrived, u);
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
        log_msg(u->log, LOG_ERROR, "console unix:%s: takes no more clients: %s", u->address.sun_path, err_last());
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
    u->client[0] = accept4(u->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
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

/* The file may have been replaced by somebody else's by now. */
static void socket_file_remove(const struct chardev_unix *u)
{
    struct stat st;
    if (u->made.st_ino && lstat(u->address.sun_path, &st) == 0 && st.st_ino == u->made.st_ino &&
        st.st_dev == u->made.st_dev)
        unlink(u->address.sun_path);
}

static void chardev_unix_free(struct chardev *c)
{
    struct chardev_unix *u = unix_of(c);
    loop_fd_del(&u->watch);
    if (u->out.ops && u->in.ops)
        client_close(u);
    fdin_close(&u->in);
    fdout_close(&u->out);
    if (u->listener >= 0)
        close(u->listener);
    socket_file_remove(u);
    free(u);
}

static const struct chardev_ops chardev_unix_ops = {
    .write = chardev_unix_write, .rx_ready = chardev_unix_rx_ready, .pending = chardev_unix_pending,
    .free = chardev_unix_free,
};

/* Makes way at the path: a socket that refuses is left over from a process that ended without removing it. */
static int stale_socket_remove(const struct sockaddr_un *address)
{
    const char *path = address->sun_path;
    struct stat st;
    if (lstat(path, &st) < 0)
        /* bind() will say what is wrong, if it is not just absent */
        return 0;
    if (!S_ISSOCK(st.st_mode))
        return err(-EEXIST, "console unix:%s: there is a file that is no socket; remove it or choose another path",
                   path);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe < 0)
        return err(-errno, "console unix:%s: cannot make a socket: %s", path, strerror(errno));
    int r = connect(probe, (const struct sockaddr *)address, sizeof(*address));
    int error = errno;
    close(probe);
    if (r == 0 || error != ECONNREFUSED)
        return err(-EADDRINUSE, "console unix:%s: another process listens there; end it or choose another path", path);
    if (unlink(path) < 0)
        return err(-errno, "console unix:%s: cannot remove the socket that was left there: %s", path, strerror(errno));
    return 0;
}

static int unix_listen(struct chardev_unix *u, const char *path)
{
    if (!*path || strlen(path) >= sizeof(u->address.sun_path))
        return err(-ENAMETOOLONG, "console unix:%s: the path must have 1 to %zu bytes; use a shorter one", path,
                   sizeof(u->address.sun_path) - 1);
    u->address.sun_family = AF_UNIX;
    memcpy(u->address.sun_path, path, strlen(path));
    int r = stale_socket_remove(&u->address);
    if (r < 0)
        return r;
    u->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (u->listener < 0)
        return err(-errno, "console unix:%s: cannot make a socket: %s", path, strerror(errno));
    /*
     * bind() gives the new file the socket inode's permissions less the umask (unix(7)), so that it is never open to
     * others, not even for a moment.
     */
    if (fchmod(u->listener, 0600) < 0 || bind(u->listener, (struct sockaddr *)&u->address, sizeof(u->address)) < 0)
        return err(-errno, "console unix:%s: cannot listen: %s; choose a path in a directory that you may write", path,
                   strerror(errno));
    if (lstat(path, &u->made) < 0 || listen(u->listener, 1) < 0)
        return err(-errno, "console unix:%s: cannot listen: %s", path, strerror(errno));
    return 0;
}

int chardev_unix_new(struct loop *loop, const char *path, const struct log *log, struct chardev **c)
{
    struct chardev_unix *u = calloc(1, sizeof(*u));
    if (!u)
        return err(-ENOMEM, "console unix:%s: no memory", path);
    *u = (struct chardev_unix){.c.ops = &chardev_unix_ops, .loop = loop, .log = log, .listener = -1,
                               .client = {-1, -1}};
    int r = fdin_open(&u->in, loop, &unix_in_ops, u);
    if (r == 0)
        r = fdout_open(&u->out, loop, CHARDEV_BUFFER, true, &unix_out_ops, u);
    if (r == 0)
        r = unix_listen(u, path);
    if (r == 0)
        r = listener_watch(u);
    if (r < 0) {
        chardev_unix_free(&u->c);
        return r;
    }
    *c = &u->c;
    return 0;
}
