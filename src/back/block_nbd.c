/*
 * Network disks (see block.h): the NBD protocol, by libnbd: nbd://, nbds:// and over Unix sockets (nbd+unix:///EXPORT?socket=PATH).
 *
 * libnbd is loaded when it is needed: it brings twenty libraries (TLS, XML) along, which every start of doppel would pay for.
 *
 * One thread has the connection: it takes new requests from a list when an eventfd says so, cuts each into commands of at most 1 MiB, and answers
 * when the last has come back. Data goes through buffers of our own, so that a server that does not answer any more can be given up at any time: what it sends
 * later meets nobody.
 *
 * A connection that is cut is not made again: whether the server still has what it had acknowledged but not flushed cannot be known, and a later flush that
 * succeeds would say so. All requests fail from then on, and the guest sees I/O errors.
 *
 * Locking: a mutex around the list of new requests and the wishes of others, a leaf.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <libnbd.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "back/block_host.h"
#include "base/thread.h"

#define CONNECT_SECONDS 15
#define COMMANDS_MAX 64
#define PIECE_MAX (1 * MiB)
#define RANGE_MAX (64 * MiB)

#define FUNCTIONS(F)                                                                                                    \
    F(create) F(close) F(get_error) F(get_errno) F(set_uri_allow_local_file) F(set_tls_certificates) F(aio_connect_uri) F(poll) F(aio_is_connecting) \
    F(aio_is_ready) F(aio_is_dead) F(aio_is_closed) F(get_size) F(is_read_only) F(can_flush) F(can_trim) F(can_zero) F(get_block_size) F(aio_get_fd) F(aio_get_direction) F(aio_notify_read) \
    F(aio_notify_write) F(aio_pread) F(aio_pwrite) F(aio_flush) F(aio_trim) F(aio_zero)

struct libnbd {
    void *handle;
#define POINTER(name) __typeof__(nbd_##name) *name;
    FUNCTIONS(POINTER)
#undef POINTER
};

struct nbd;

/* A request that is under way: one command at a time. */
struct job {
    struct nbd *n;
    struct block_req *r;
    u8 *buf;
    size_t len;                                                    /* of the command */
    bool sent, answered;
    int result;
};

struct nbd {
    struct block b;
    struct libnbd lib;
    struct nbd_handle *h;
    s64 size;
    bool can_flush, can_trim, can_zero;
    int event;
    pthread_t thread;
    bool thread_runs;
    struct block_end end;
    pthread_mutex_t lock;
    struct block_req *first, **last;
    bool closing, abandoned;
    /* the thread's own */
    struct job job[COMMANDS_MAX];
    unsigned jobs;
    bool dead;
};

/* --- commands --- */

static int answered(void *arg, int *error)
{
    struct job *j = arg;

    j->answered = true;
    j->result = *error ? -*error : 0;
    return 1;
}

static bool make_buffer(struct job *j)
{
    if (!j->buf)
        j->buf = malloc(MIN(block_req_len(j->r), PIECE_MAX));
    return j->buf;
}

/* The server's cookie, 0: nothing is to be sent, -1: it could not be. */
static s64 send_command(struct nbd *n, struct job *j)
{
    nbd_completion_callback done = { .callback = answered, .user_data = j };
    struct block_req *r = j->r;
    u64 left = block_req_len(r);

    switch (r->op) {
    case BLOCK_READ:
    case BLOCK_WRITE:
        j->len = MIN(left, PIECE_MAX);
        if (!make_buffer(j))
            return -1;
        if (r->op == BLOCK_READ)
            return n->lib.aio_pread(n->h, j->buf, j->len, r->offset, done, 0);
        block_gather(r, j->buf, j->len);
        return n->lib.aio_pwrite(n->h, j->buf, j->len, r->offset, done, 0);
    case BLOCK_FLUSH:
        return n->can_flush ? n->lib.aio_flush(n->h, done, 0) : 0;
    case BLOCK_DISCARD:
        j->len = MIN(left, RANGE_MAX);
        return n->can_trim ? n->lib.aio_trim(n->h, j->len, r->offset, done, 0) : 0;
    case BLOCK_ZEROES:
        j->len = MIN(left, n->can_zero ? RANGE_MAX : PIECE_MAX);
        if (n->can_zero)
            return n->lib.aio_zero(n->h, j->len, r->offset, done, r->unmap ? 0 : LIBNBD_CMD_FLAG_NO_HOLE);
        if (!make_buffer(j))
            return -1;
        memset(j->buf, 0, j->len);
        return n->lib.aio_pwrite(n->h, j->buf, j->len, r->offset, done, 0);
    case BLOCK_NOP:
        break;
    }
    return 0;
}

static void end_job(struct nbd *n, struct job *j, int result)
{
    struct block_req *r = j->r;

    free(j->buf);
    *j = (struct job){ 0 };
    n->jobs--;
    r->result = result;
    block_done(&n->b, r);
}

/* Sends what comes next of the request, or ends it. */
static void go_on(struct nbd *n, struct job *j)
{
    s64 cookie;

    j->answered = false;
    j->result = 0;
    j->sent = false;
    if (n->dead && j->r->op != BLOCK_NOP) {
        end_job(n, j, -EIO);
        return;
    }
    cookie = send_command(n, j);
    if (cookie < 0)
        end_job(n, j, -EIO);
    else if (cookie == 0)
        end_job(n, j, 0);
    else
        j->sent = true;
}

static void command_done(struct nbd *n, struct job *j)
{
    struct block_req *r = j->r;

    if (j->result < 0) {
        end_job(n, j, n->dead || j->result == -ENOTCONN ? -EIO : r->op == BLOCK_FLUSH ? block_sync_error(j->result) : j->result);
        return;
    }
    switch (r->op) {
    case BLOCK_READ:
        block_scatter(r, j->buf, j->len);
        block_consume(r, j->len);
        break;
    case BLOCK_WRITE:
        block_consume(r, j->len);
        break;
    case BLOCK_DISCARD:
    case BLOCK_ZEROES:
        r->offset += j->len;
        r->len -= j->len;
        break;
    default:
        end_job(n, j, 0);
        return;
    }
    if (block_req_len(r))
        go_on(n, j);
    else
        end_job(n, j, 0);
}

/* --- the thread --- */

static struct block_req *next_request(struct nbd *n)
{
    struct block_req *r;

    pthread_mutex_lock(&n->lock);
    r = n->first;
    if (r)
        n->first = r->next;
    if (!n->first)
        n->last = &n->first;
    pthread_mutex_unlock(&n->lock);
    return r;
}

static void begin_jobs(struct nbd *n)
{
    struct block_req *r;

    while (n->jobs < COMMANDS_MAX && (r = next_request(n))) {
        struct job *j = n->job;

        while (j->r)
            j++;
        *j = (struct job){ .n = n, .r = r };
        n->jobs++;
        go_on(n, j);
    }
}

static void end_jobs(struct nbd *n)
{
    for (struct job *j = n->job; j < n->job + COMMANDS_MAX; j++)
        if (j->r && j->answered)
            command_done(n, j);
}

/* What will not be answered any more. The connection goes first: it knows the buffers. */
static void give_up(struct nbd *n)
{
    if (!n->dead)
        n->lib.close(n->h);
    n->h = NULL;
    n->dead = true;
    for (struct job *j = n->job; j < n->job + COMMANDS_MAX; j++)
        if (j->r)
            end_job(n, j, -EIO);
}

static void wait_events(struct nbd *n, bool hurry)
{
    struct pollfd fd[2] = { { .fd = n->event, .events = POLLIN }, { .fd = -1 } };
    unsigned direction;
    u64 count;

    if (!n->dead) {
        direction = n->lib.aio_get_direction(n->h);
        fd[1].fd = n->lib.aio_get_fd(n->h);
        fd[1].events = (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) | (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0));
    }
    if (poll(fd, 2, hurry ? 100 : -1) <= 0)
        return;
    if (fd[0].revents && read(n->event, &count, sizeof(count)) < 0)
        return;
    if (n->dead)
        return;
    if (fd[1].revents & (POLLIN | POLLHUP | POLLERR))
        n->lib.aio_notify_read(n->h);
    else if (fd[1].revents & POLLOUT)
        n->lib.aio_notify_write(n->h);
}

static void *serve(void *arg)
{
    struct nbd *n = arg;
    struct timespec now, end = { 0 };

    for (;;) {
        bool closing, abandoned, empty;

        begin_jobs(n);
        pthread_mutex_lock(&n->lock);
        closing = n->closing;
        abandoned = n->abandoned;
        empty = !n->first;
        pthread_mutex_unlock(&n->lock);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (closing && !end.tv_sec)
            end.tv_sec = now.tv_sec + BLOCK_CLOSE_SECONDS - 2;     /* sooner than who waits for us gives up */
        if (abandoned || (closing && now.tv_sec >= end.tv_sec))
            give_up(n);
        else if (!n->dead && (n->lib.aio_is_dead(n->h) || n->lib.aio_is_closed(n->h)))
            give_up(n);
        if (closing && !n->jobs && empty)
            break;
        wait_events(n, closing);
        end_jobs(n);
    }
    block_end_leave(&n->end);
    return NULL;
}

static void wake(struct nbd *n)
{
    ssize_t r UNUSED = write(n->event, &(u64){ 1 }, sizeof(u64));
}

static bool nbd_submit(struct block *b, struct block_req *r)
{
    struct nbd *n = container_of(b, struct nbd, b);

    r->next = NULL;
    pthread_mutex_lock(&n->lock);
    *n->last = r;
    n->last = &r->next;
    pthread_mutex_unlock(&n->lock);
    wake(n);
    return false;
}

static bool nbd_abandon(struct block *b)
{
    struct nbd *n = container_of(b, struct nbd, b);

    pthread_mutex_lock(&n->lock);
    n->abandoned = true;
    pthread_mutex_unlock(&n->lock);
    wake(n);
    return true;
}

/* --- opening --- */

static int load_library(struct nbd *n)
{
    n->lib.handle = dlopen("libnbd.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!n->lib.handle)
        return err(-ENOSYS, "disk %s: network disks need libnbd (package libnbd0): %s", n->b.path, dlerror());
#define LOOK_UP(name)                                                                                                   \
    n->lib.name = (__typeof__(nbd_##name) *)dlsym(n->lib.handle, "nbd_" #name);                                          \
    if (!n->lib.name)                                                                                                   \
        return err(-ENOSYS, "disk %s: the libnbd that is installed has no nbd_" #name "; doppel needs 1.14 or later", n->b.path);
    FUNCTIONS(LOOK_UP)
#undef LOOK_UP
    return 0;
}

static int lib_error(struct nbd *n, const char *what)
{
    int e = n->lib.get_errno();
    const char *why = n->lib.get_error();

    return err(e ? -e : -EIO, "disk %s: %s: %s", n->b.path, what, why ? why : "unknown");
}

/* The parameter at p, up to the next one, with %XX undone; "" if it does not fit. */
static void parameter_value(const char *p, char *value, size_t size)
{
    size_t len = 0;

    while (*p && *p != '&' && *p != ';' && *p != '#') {
        char hex[3] = "";

        if (len == size - 1) {
            len = 0;
            break;
        }
        if (*p == '%' && isxdigit((unsigned char)p[1]) && isxdigit((unsigned char)p[2])) {
            memcpy(hex, p + 1, 2);
            value[len++] = (char)strtoul(hex, NULL, 16);
            p += 3;
        } else {
            value[len++] = *p++;
        }
    }
    value[len] = '\0';
}

/* The folder's CA is what libnbd knows the server by, or there is none. */
static int use_folder(struct nbd *n, const char *folder, bool *found)
{
    char ca[PATH_MAX + 16];

    snprintf(ca, sizeof(ca), "%s/ca-cert.pem", folder);
    *found = access(ca, R_OK) == 0;
    if (*found && n->lib.set_tls_certificates(n->h, folder) < 0)
        return lib_error(n, "cannot connect");
    return 0;
}

/* Where libnbd looks, too. */
static int use_usual_folder(struct nbd *n)
{
    static const char *const below_home[] = { ".pki/libnbd", ".config/pki/libnbd" };
    const char *home = getenv("HOME");
    char folder[PATH_MAX];
    bool found = false;
    int r = 0;

    if (geteuid() == 0)
        r = use_folder(n, "/etc/pki/libnbd", &found);
    for (unsigned i = 0; geteuid() != 0 && home && r == 0 && !found && i < ARRAY_SIZE(below_home); i++) {
        snprintf(folder, sizeof(folder), "%s/%s", home, below_home[i]);
        r = use_folder(n, folder, &found);
    }
    if (r == 0 && !found)
        r = err(-EINVAL, "disk %s: there is nothing to know the server by; put the ca-cert.pem of its CA into %s, or into a folder that you name: ?tls-certificates=FOLDER",
                n->b.path, geteuid() == 0 ? "/etc/pki/libnbd" : "~/.config/pki/libnbd");
    return r;
}

/*
 * TLS is worth something only if the server is the one that was meant. libnbd (1.14; CVE-2024-7383) takes whatever certificate a server has where it finds no
 * CA's in the folder that it was given or in the usual ones, and always over Unix sockets, where there is no name to compare. So that is looked at before.
 * A key that both know (tls-psk-file) needs none of it.
 */
static int know_server(struct nbd *n)
{
    static const char folder_key[] = "tls-certificates=", psk_key[] = "tls-psk-file=";
    const char *p = strchr(n->b.path, '?');
    char folder[PATH_MAX];
    bool named = false, found;

    if (strncasecmp(n->b.path, "nbds", 4))
        return 0;
    for (const char *q = p; q; q = strpbrk(q + 1, "&;"))
        if (!strncasecmp(q + 1, psk_key, strlen(psk_key)))
            return 0;
    if (strncasecmp(n->b.path, "nbds://", 7))
        return err(-EINVAL, "disk %s: over such a socket no certificate is checked; use nbd+unix://, or a key: ?tls-psk-file=FILE", n->b.path);
    for (; p; p = strpbrk(p + 1, "&;")) {
        if (strncasecmp(p + 1, folder_key, strlen(folder_key)))
            continue;
        parameter_value(p + 1 + strlen(folder_key), folder, sizeof(folder));
        int r = use_folder(n, folder, &found);
        if (r < 0)
            return r;
        if (!found)
            return err(-EINVAL, "disk %s: %.200s/ca-cert.pem cannot be read: that is the certificate of the server's CA, by which it is known", n->b.path, folder);
        named = true;
    }
    return named ? 0 : use_usual_folder(n);
}

static int connect_server(struct nbd *n)
{
    struct timespec now, end;
    int r;

    n->h = n->lib.create();
    if (!n->h || n->lib.set_uri_allow_local_file(n->h, true) < 0)
        return lib_error(n, "cannot connect");
    r = know_server(n);
    if (r < 0)
        return r;
    if (n->lib.aio_connect_uri(n->h, n->b.path) < 0)
        return lib_error(n, "cannot connect");
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += CONNECT_SECONDS;
    while (!n->lib.aio_is_ready(n->h)) {
        if (n->lib.aio_is_dead(n->h) || n->lib.aio_is_closed(n->h))
            return lib_error(n, "cannot connect");
        r = n->lib.poll(n->h, 500);
        if (r < 0)
            return lib_error(n, "cannot connect");
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec >= end.tv_sec)
            return err(-ETIMEDOUT, "disk %s: the server has not answered for %d seconds", n->b.path, CONNECT_SECONDS);
    }
    return 0;
}

static int ask_server(struct nbd *n)
{
    s64 least = n->lib.get_block_size(n->h, LIBNBD_SIZE_MINIMUM);

    if (!n->b.readonly && n->lib.is_read_only(n->h) != 0)
        return err(-EROFS, "disk %s: the server offers it for reading only; append ,readonly", n->b.path);
    if (least > (s64)BLOCK_SECTOR)
        return err(-EINVAL, "disk %s: the server wants requests of at least %lld bytes; have it offer smaller ones", n->b.path, (long long)least);
    n->can_flush = n->lib.can_flush(n->h) == 1;
    n->can_trim = n->lib.can_trim(n->h) == 1;
    n->can_zero = n->lib.can_zero(n->h) == 1;
    return 0;
}

static int nbd_size(struct block *b, u64 *size)
{
    struct nbd *n = container_of(b, struct nbd, b);
    *size = (u64)n->size;
    return 0;
}

static void nbd_free(struct nbd *n)
{
    if (n->h)
        n->lib.close(n->h);
    if (n->event >= 0)
        close(n->event);
    pthread_mutex_destroy(&n->lock);
    block_end_destroy(&n->end);
    block_destroy(&n->b);
    free(n);                                                       /* the library stays: what it has begun on this thread ends with it */
}

static bool nbd_close_block(struct block *b)
{
    struct nbd *n = container_of(b, struct nbd, b);

    if (n->thread_runs) {
        pthread_mutex_lock(&n->lock);
        n->closing = true;
        pthread_mutex_unlock(&n->lock);
        wake(n);
        if (!block_end_wait(&n->end)) {
            pthread_detach(n->thread);
            return false;
        }
        pthread_join(n->thread, NULL);
    }
    nbd_free(n);
    return true;
}

static const struct block_ops nbd_ops = { .submit = nbd_submit, .size = nbd_size, .abandon = nbd_abandon, .close = nbd_close_block };

bool block_nbd_is(const char *path)
{
    static const char *const scheme[] = { "nbd://", "nbds://", "nbd+unix://", "nbds+unix://" };

    for (unsigned i = 0; i < ARRAY_SIZE(scheme); i++)
        if (!strncmp(path, scheme[i], strlen(scheme[i])))
            return true;
    return false;
}

int block_nbd_open(const struct block_config *c, struct block **out)
{
    struct nbd *n = calloc(1, sizeof(*n));
    int r;

    if (!n)
        return err(-ENOMEM, "disk %s: out of memory", c->path);
    n->last = &n->first;
    n->event = -1;
    pthread_mutex_init(&n->lock, NULL);
    block_end_init(&n->end);
    r = block_init(&n->b, &nbd_ops, "nbd", c->path, c->readonly);
    if (r == 0)
        r = load_library(n);
    if (r == 0)
        r = connect_server(n);
    if (r == 0)
        r = ask_server(n);
    if (r == 0) {
        n->size = n->lib.get_size(n->h);
        if (n->size < 0)
            r = lib_error(n, "cannot find out its size");
    }
    if (r == 0) {
        n->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        n->end.running = 1;
        r = n->event < 0 ? -errno : -thread_start(&n->thread, serve, n);
        n->thread_runs = r == 0;
        if (r < 0)
            err(r, "disk %s: cannot start a thread: %s; raise the limits (ulimit -u, ulimit -n)", c->path, strerror(-r));
    }
    if (r < 0) {
        nbd_free(n);
        return r;
    }
    *out = &n->b;
    return 0;
}
