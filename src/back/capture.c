/*
 * pcapng (see capture.h). Blocks are little-endian, padded to 32 bits, and have their length at both ends.
 *
 * Frames go through a buffer of our own that is written when it is full and when FLUSH_NS have passed since the last time (looked at when a frame comes), and at the
 * end. What write(2) takes only in part is cut off again where the file can be cut, so that a reader finds whole blocks only.
 */
#define _GNU_SOURCE
#include "back/capture.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BUFFER (256 * KiB)
#define FRAME_MAX (128 * KiB)
#define FLUSH_NS 200000000ull
#define READER_MS 1000
#define PIPE_BYTES (1024 * 1024)

#define BLOCK_SECTION 0x0a0d0d0au
#define BLOCK_INTERFACE 1u
#define BLOCK_PACKET 6u
#define BYTE_ORDER_MAGIC 0x1a2b3c4du
#define LINKTYPE_ETHERNET 1

enum { OPT_END = 0, SHB_USERAPPL = 4, IF_NAME = 2, IF_MACADDR = 6, IF_TSRESOL = 9, EPB_FLAGS = 2 };
#define TSRESOL_NS 9                                               /* 10^-9 s */

struct capture {
    int fd;                                                        /* -1: it has ended */
    char *path;
    const struct log *log;
    pthread_mutex_t lock;
    unsigned interfaces;
    bool begun;                                                    /* with frames */
    int error;                                                     /* why it has ended */
    u64 flushed_ns;
    u64 written;                                                   /* bytes of whole blocks in the file */
    size_t len, begin;                                             /* of buf; begin: where the block being made begins */
    u8 buf[BUFFER];
};

static u64 host_ns(clockid_t id)
{
    struct timespec t;

    clock_gettime(id, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

static void fail(struct capture *c, int e)
{
    c->error = e;
    if (c->begun)                                                  /* else it is the error of who opens it */
        log_msg(c->log, LOG_ERROR, "capture %s: %s; it ends here, the network goes on", c->path, e == EAGAIN ? "who reads the pipe is too slow" : strerror(e));
    if (ftruncate(c->fd, (off_t)c->written) < 0)
        log_msg(c->log, LOG_DEBUG, "capture %s: its last packet may be cut off", c->path);
    close(c->fd);
    c->fd = -1;
}

/* A pipe's reader may be behind; the network waits for it, but not for long. */
static bool wait_reader(struct capture *c)
{
    struct pollfd p = { .fd = c->fd, .events = POLLOUT };
    int r;

    do
        r = poll(&p, 1, READER_MS);
    while (r < 0 && errno == EINTR);
    return r > 0;
}

static void flush(struct capture *c)
{
    size_t done = 0;

    while (c->fd >= 0 && done < c->len) {
        ssize_t n = write(c->fd, c->buf + done, c->len - done);

        if (n < 0 && (errno == EINTR || (errno == EAGAIN && wait_reader(c))))
            continue;
        if (n <= 0) {
            fail(c, n < 0 ? errno : ENOSPC);
            break;
        }
        done += (size_t)n;
    }
    if (c->fd >= 0)
        c->written += c->len;
    c->len = 0;
    c->flushed_ns = host_ns(CLOCK_MONOTONIC);
}

/* --- blocks --- */

static void put(struct capture *c, const void *p, size_t n)
{
    bug_on(n > BUFFER - c->len);
    if (n)                                                         /* an option without a value has no bytes to point at */
        memcpy(c->buf + c->len, p, n);
    c->len += n;
}

static void put16(struct capture *c, u16 v)
{
    put(c, &v, sizeof(v));
}

static void put32(struct capture *c, u32 v)
{
    put(c, &v, sizeof(v));
}

static void pad(struct capture *c)
{
    static const u8 zero[4];

    put(c, zero, -c->len & 3);
}

/* need: its length at most. */
static void block_begin(struct capture *c, u32 type, size_t need)
{
    if (need > BUFFER - c->len)
        flush(c);
    c->begin = c->len;
    put32(c, type);
    put32(c, 0);
}

static void block_end(struct capture *c)
{
    u32 total = (u32)(c->len + 4 - c->begin);

    put32(c, total);
    memcpy(c->buf + c->begin + 4, &total, sizeof(total));
}

static void option(struct capture *c, u16 code, const void *p, size_t len)
{
    put16(c, code);
    put16(c, (u16)len);
    put(c, p, len);
    pad(c);
}

static void section(struct capture *c)
{
    static const char program[] = "doppel";

    block_begin(c, BLOCK_SECTION, 128);
    put32(c, BYTE_ORDER_MAGIC);
    put16(c, 1);                                                   /* version 1.0 */
    put16(c, 0);
    put32(c, ~0u);                                                 /* length of the section: not known */
    put32(c, ~0u);
    option(c, SHB_USERAPPL, program, strlen(program));
    option(c, OPT_END, NULL, 0);
    block_end(c);
}

int capture_interface(struct capture *c, const char *name, const u8 mac[6], unsigned *id)
{
    u8 resolution = TSRESOL_NS;
    int r;

    pthread_mutex_lock(&c->lock);
    block_begin(c, BLOCK_INTERFACE, 512);
    put16(c, LINKTYPE_ETHERNET);
    put16(c, 0);
    put32(c, 0);                                                   /* no limit of length */
    option(c, IF_NAME, name, strnlen(name, 256));
    option(c, IF_MACADDR, mac, 6);
    option(c, IF_TSRESOL, &resolution, 1);
    option(c, OPT_END, NULL, 0);
    block_end(c);
    flush(c);
    *id = c->interfaces++;
    r = c->fd < 0 ? err(-EIO, "--capture %s: cannot write it: %s; free some space or name another file", c->path, strerror(c->error)) : 0;
    pthread_mutex_unlock(&c->lock);
    return r;
}

void capture_frame(struct capture *c, unsigned id, enum capture_direction d, const struct iovec *iov, unsigned iovs, size_t len)
{
    u64 now = host_ns(CLOCK_REALTIME);
    size_t left = MIN(len, FRAME_MAX);
    u32 flags = d;

    pthread_mutex_lock(&c->lock);
    if (c->fd < 0) {
        pthread_mutex_unlock(&c->lock);
        return;
    }
    c->begun = true;
    block_begin(c, BLOCK_PACKET, left + 64);
    put32(c, id);
    put32(c, (u32)(now >> 32));
    put32(c, (u32)now);
    put32(c, (u32)left);
    put32(c, (u32)len);
    for (unsigned i = 0; i < iovs && left; i++) {
        size_t n = MIN(left, iov[i].iov_len);

        put(c, iov[i].iov_base, n);
        left -= n;
    }
    pad(c);
    option(c, EPB_FLAGS, &flags, sizeof(flags));
    option(c, OPT_END, NULL, 0);
    block_end(c);
    if (host_ns(CLOCK_MONOTONIC) - c->flushed_ns > FLUSH_NS)
        flush(c);
    pthread_mutex_unlock(&c->lock);
}

/* --- opening --- */

static int open_file(struct capture *c)
{
    c->fd = open(c->path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0600);
    if (c->fd < 0 && errno == ENXIO)
        return err(-errno, "--capture %s: nobody reads this pipe; start its reader first", c->path);
    if (c->fd < 0)
        return err(-errno, "--capture %s: cannot open it: %s; name a file that can be written", c->path, strerror(errno));
    fcntl(c->fd, F_SETPIPE_SZ, PIPE_BYTES);                        /* as large as it may be; no pipe: nothing */
    return 0;
}

int capture_open(const char *path, const struct log *log, struct capture **out)
{
    struct capture *c = calloc(1, sizeof(*c));
    int r;

    if (!c)
        return err(-ENOMEM, "--capture %s: out of memory", path);
    c->fd = -1;
    c->log = log;
    pthread_mutex_init(&c->lock, NULL);
    c->path = strdup(path);
    r = c->path ? open_file(c) : err(-ENOMEM, "--capture %s: out of memory", path);
    if (r < 0) {
        capture_close(c);
        return r;
    }
    section(c);
    *out = c;
    return 0;
}

void capture_close(struct capture *c)
{
    if (!c)
        return;
    if (c->fd >= 0)
        flush(c);
    if (c->fd >= 0)
        close(c->fd);
    pthread_mutex_destroy(&c->lock);
    free(c->path);
    free(c);
}
