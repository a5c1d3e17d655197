/*
 * The server below a gdb stub (gdb.h). While a client is there the next one waits in the socket's backlog. A client
 * that goes away without a word leaves the guest running.
 *
 * Input is not read while much output waits for the client: who sends without reading is held up, and no more.
 */
#include "ctl/gdb.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "back/fdio.h"
#include "back/listen.h"
#include "ctl/gdb_stub.h"

#define OUT_BYTES (256 * KiB)
#define OUT_MUCH (64 * KiB)
#define IN_BYTES 1024                                              /* at a time */

struct gdb {
    struct gdb_config config;
    struct vm_debug *debug;
    struct gdb_stub *stub;
    struct listener listener;
    struct loop_fd watch;
    int client[2];                                                 /* the same socket, for reading and for writing; -1: none */
    struct fdin in;
    struct fdout out;
    bool dropping;                                                 /* the client goes when all is written to it */
    bool ended;                                                    /* the guest has: nobody waits for the client any more */
};

static void client_arrived(void *arg, u32 events);

static void listen_again(struct gdb *g)
{
    if (!g->watch.loop && loop_fd_add(g->config.loop, &g->watch, g->listener.fd, EPOLLIN, client_arrived, g) < 0)
        log_msg(g->config.log, LOG_ERROR, "--gdb: takes no more clients: %s", err_last());
}

static void client_close(struct gdb *g)
{
    fdin_detach(&g->in);
    fdout_detach(&g->out);
    for (unsigned i = 0; i < ARRAY_SIZE(g->client); i++) {
        if (g->client[i] >= 0)
            close(g->client[i]);
        g->client[i] = -1;
    }
}

static void client_gone(struct gdb *g)
{
    client_close(g);
    gdb_stub_disconnect(g->stub);
    listen_again(g);
}

static void drop_now(void *arg)
{
    struct gdb *g = arg;
    if (g->dropping && fdout_pending(&g->out) == 0) {
        g->dropping = false;
        client_gone(g);
    }
}

static size_t in_room(void *arg)
{
    return fdout_pending(&((struct gdb *)arg)->out) > OUT_MUCH ? 0 : IN_BYTES;
}

static void in_data(void *arg, const u8 *buf, size_t len)
{
    gdb_stub_receive(((struct gdb *)arg)->stub, buf, len);
}

static void in_end(void *arg, int error UNUSED)
{
    client_gone(arg);
}

static void out_room(void *arg)
{
    fdin_ready(&((struct gdb *)arg)->in);
}

static void out_drained(void *arg)
{
    struct gdb *g = arg;
    fdin_ready(&g->in);
    if (g->dropping)
        loop_post(g->config.loop, drop_now, g);
}

static void out_broken(void *arg, int error UNUSED)
{
    client_gone(arg);
}

static const struct fdin_ops in_ops = {.room = in_room, .data = in_data, .end = in_end};
static const struct fdout_ops out_ops = {.room = out_room, .drained = out_drained, .broken = out_broken};

static void client_arrived(void *arg, u32 events UNUSED)
{
    struct gdb *g = arg;
    g->client[0] = listener_accept(&g->listener);
    if (g->client[0] < 0)
        return;
    g->client[1] = dup(g->client[0]);
    g->dropping = false;
    if (g->client[1] < 0 || fdin_attach(&g->in, g->client[0]) < 0) {
        client_close(g);
        return;
    }
    loop_fd_del(&g->watch);
    gdb_stub_connect(g->stub);
    if (fdout_attach(&g->out, g->client[1]) < 0)
        client_gone(g);
}

/* ---- what the stub asks for ---- */

static void stub_send(void *arg, const u8 *buf, size_t n)
{
    struct gdb *g = arg;
    if (!g->ended)
        fdout_write(&g->out, buf, n);
    else if (g->client[1] >= 0 && fdout_pending(&g->out) == 0 && send(g->client[1], buf, n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        return;                                                    /* it will see the end of the connection */
}

static void stub_drop(void *arg)
{
    struct gdb *g = arg;
    g->dropping = true;
    loop_post(g->config.loop, drop_now, g);
}

static void stub_kill(void *arg)
{
    vm_quit(((struct gdb *)arg)->config.vm);
}

static void stub_monitor(void *arg, char *line, FILE *out)
{
    static const char *const gdbs[] = {"pause", "resume", "quit"};
    struct gdb *g = arg;
    const char *word = line + strspn(line, " ");
    size_t n = strcspn(word, " ");
    for (size_t i = 0; i < ARRAY_SIZE(gdbs); i++)
        if (strlen(gdbs[i]) == n && !strncmp(word, gdbs[i], n)) {
            fprintf(out, "%s: gdb's own commands do that: interrupt, continue, detach, kill\n", gdbs[i]);
            return;
        }
    monitor_line(g->config.monitor, line, out);
    if (!strncmp(word, "help", n) && n)
        fprintf(out, "  %-26s %s\n", "phys on|off", "gdb's addresses are physical, or linear again");
}

static const struct gdb_ops stub_ops = {.send = stub_send, .drop = stub_drop, .kill = stub_kill, .monitor = stub_monitor};

static void on_stopped(void *arg)
{
    gdb_stub_stopped(((struct gdb *)arg)->stub);
}

/* ---- life ---- */

static int start(struct gdb *g)
{
    const struct gdb_config *c = &g->config;
    int r = c->path ? listener_unix(&g->listener, "--gdb", c->path, SOCK_STREAM) : listener_tcp(&g->listener, "--gdb", c->port);
    if (r == 0)
        r = fdin_open(&g->in, c->loop, &in_ops, g);
    if (r == 0)
        r = fdout_open(&g->out, c->loop, OUT_BYTES, false, &out_ops, g);
    if (r == 0)
        r = vm_debug_open(c->vm, c->loop, on_stopped, g, &g->debug);
    if (r == 0)
        r = gdb_stub_new(g->debug, c->bits32, &stub_ops, g, &g->stub);
    if (r == 0)
        r = loop_fd_add(c->loop, &g->watch, g->listener.fd, EPOLLIN, client_arrived, g);
    return r;
}

int gdb_new(const struct gdb_config *config, struct gdb **out)
{
    struct gdb *g = calloc(1, sizeof(*g));
    if (!g)
        return err(-ENOMEM, "--gdb: no memory");
    *g = (struct gdb){.config = *config, .listener.fd = -1, .client = {-1, -1}};
    int r = start(g);
    if (r < 0) {
        gdb_free(g);
        return r;
    }
    *out = g;
    return 0;
}

void gdb_vm_ended(struct gdb *g, int status)
{
    if (!g)
        return;
    g->ended = true;
    gdb_stub_ended(g->stub, status);
}

void gdb_free(struct gdb *g)
{
    if (!g)
        return;
    loop_unpost(g->config.loop, drop_now, g);
    loop_fd_del(&g->watch);
    if (g->in.ops && g->out.ops)
        client_close(g);
    gdb_stub_free(g->stub);
    vm_debug_close(g->debug);
    fdin_close(&g->in);
    fdout_close(&g->out);
    listener_close(&g->listener);
    free(g);
}
