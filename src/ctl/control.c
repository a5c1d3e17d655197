/*
 * The control socket (control.h): a few clients at once; more wait in the backlog.
 *
 * A client that sends and does not read is not read from: what waits for it stays what one read's commands have said. One that says nothing
 * keeps its place; that is its owner's own affair, and CLIENTS_MAX the limit.
 */
#define _GNU_SOURCE
#include "ctl/control.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "back/listen.h"

#define CLIENTS_MAX 16
#define LINE_BYTES 4096

struct client {
    struct control *c;
    int fd;                                                        /* -1: free */
    struct loop_fd watch;
    char in[LINE_BYTES];
    size_t in_len;
    char *out;                                                     /* NULL: nothing waits */
    size_t out_len, out_done;
    bool ended;                                                    /* nothing more comes */
};

struct control {
    struct control_config config;
    struct listener listener;
    struct loop_fd watch;
    struct client client[CLIENTS_MAX];
};

static void client_arrived(void *arg, u32 events);

static void listen_again(struct control *c)
{
    if (!c->watch.loop && loop_fd_add(c->config.loop, &c->watch, c->listener.fd, EPOLLIN, client_arrived, c) < 0)
        log_msg(c->config.log, LOG_ERROR, "control socket: takes no more clients: %s", err_last());
}

static void client_close(struct client *k)
{
    loop_fd_del(&k->watch);
    close(k->fd);
    free(k->out);
    k->fd = -1;
    k->out = NULL;
    k->in_len = 0;
    k->ended = false;
}

static void client_gone(struct client *k)
{
    client_close(k);
    listen_again(k->c);
}

/* False: the client is gone. */
static bool flush_out(struct client *k)
{
    while (k->out && k->out_done < k->out_len) {
        ssize_t n = send(k->fd, k->out + k->out_done, k->out_len - k->out_done, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (n < 0) {
            client_gone(k);
            return false;
        }
        k->out_done += (size_t)n;
    }
    if (k->out && k->out_done == k->out_len) {
        free(k->out);
        k->out = NULL;
    }
    if (!k->out && k->ended) {
        client_gone(k);
        return false;
    }
    loop_fd_mod(&k->watch, k->out ? EPOLLOUT : EPOLLIN);
    return true;
}

/* Every whole line of what has come; the rest stays. */
static void run_lines(struct client *k, FILE *out)
{
    char *line = k->in, *end;

    while (!k->ended && (end = memchr(line, '\n', k->in_len - (size_t)(line - k->in)))) {
        *end = '\0';
        if (end > line && end[-1] == '\r')
            end[-1] = '\0';
        k->ended = !k->c->config.line(k->c->config.arg, line, out);
        line = end + 1;
    }
    k->in_len -= (size_t)(line - k->in);
    memmove(k->in, line, k->in_len);
    if (k->in_len == sizeof(k->in)) {
        fprintf(out, "the line is too long; %d bytes are the most\n", LINE_BYTES - 1);
        k->ended = true;
    }
}

static void take_lines(struct client *k)
{
    FILE *out = open_memstream(&k->out, &k->out_len);

    k->out_done = 0;
    if (!out) {
        client_gone(k);
        return;
    }
    run_lines(k, out);
    fclose(out);
    flush_out(k);
}

static void client_event(void *arg, u32 events UNUSED)
{
    struct client *k = arg;
    ssize_t n;

    if (k->out) {
        flush_out(k);
        return;
    }
    n = recv(k->fd, k->in + k->in_len, sizeof(k->in) - k->in_len, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        client_gone(k);                                            /* all it asked has been answered */
        return;
    }
    k->in_len += (size_t)n;
    take_lines(k);
}

static struct client *free_place(struct control *c)
{
    for (struct client *k = c->client; k < c->client + CLIENTS_MAX; k++)
        if (k->fd < 0)
            return k;
    return NULL;
}

static void client_arrived(void *arg, u32 events UNUSED)
{
    struct control *c = arg;
    struct client *k = free_place(c);
    int fd = k ? listener_accept(&c->listener) : -1;

    if (fd < 0) {
        if (!k || (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR))
            loop_fd_del(&c->watch);                                /* until one of them has gone */
        return;
    }
    k->fd = fd;
    if (loop_fd_add(c->config.loop, &k->watch, fd, EPOLLIN, client_event, k) < 0)
        client_close(k);
}

int control_new(const struct control_config *config, struct control **out)
{
    struct control *c = calloc(1, sizeof(*c));
    int r;

    if (!c)
        return err(-ENOMEM, "no memory for the control socket");
    c->config = *config;
    for (struct client *k = c->client; k < c->client + CLIENTS_MAX; k++)
        *k = (struct client){ .c = c, .fd = -1 };
    r = listener_unix(&c->listener, "control socket", config->path, SOCK_STREAM);
    if (r == 0 && (listen(c->listener.fd, CLIENTS_MAX) < 0 ||
                   loop_fd_add(config->loop, &c->watch, c->listener.fd, EPOLLIN, client_arrived, c) < 0)) {
        r = err(-EIO, "control socket %s: cannot listen", config->path);
        listener_close(&c->listener);
    }
    if (r < 0) {
        free(c);
        return r;
    }
    *out = c;
    return 0;
}

void control_free(struct control *c)
{
    if (!c)
        return;
    loop_fd_del(&c->watch);
    for (struct client *k = c->client; k < c->client + CLIENTS_MAX; k++)
        if (k->fd >= 0)
            client_close(k);
    listener_close(&c->listener);
    free(c);
}
