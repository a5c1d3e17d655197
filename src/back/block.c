/*
 * What stands in front of every block back end (block.h): bounds, read-only disks, requests that are kept while the host is full, and threads.
 *
 * Locking: block.lock guards the list of held requests, a leaf; done(), held() and full() are called without it.
 */
#define _GNU_SOURCE
#include "back/block.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "back/block_host.h"
#include "base/thread.h"

/* --- requests --- */

void block_consume(struct block_req *r, size_t len)
{
    r->offset += len;
    while (r->iovs && len >= r->iov->iov_len) {
        len -= r->iov->iov_len;
        r->iov++;
        r->iovs--;
    }
    if (r->iovs) {
        r->iov->iov_base = (u8 *)r->iov->iov_base + len;
        r->iov->iov_len -= len;
    }
}

u64 block_req_len(const struct block_req *r)
{
    u64 len = 0;

    if (r->op == BLOCK_DISCARD || r->op == BLOCK_ZEROES)
        return r->len;
    for (unsigned i = 0; i < r->iovs; i++)
        len += r->iov[i].iov_len;
    return len;
}

/* No room, said here, is no reason to wait for some: what was to be written is dropped from the host's memory already. */
int block_sync_error(int e)
{
    return e == -ENOSPC || e == -EDQUOT ? -EIO : e;
}

void block_gather(const struct block_req *r, u8 *buf, size_t len)
{
    for (unsigned i = 0; len; i++) {
        size_t step = MIN(len, r->iov[i].iov_len);

        memcpy(buf, r->iov[i].iov_base, step);
        buf += step;
        len -= step;
    }
}

void block_scatter(const struct block_req *r, const u8 *buf, size_t len)
{
    for (unsigned i = 0; len; i++) {
        size_t step = MIN(len, r->iov[i].iov_len);

        memcpy(r->iov[i].iov_base, buf, step);
        buf += step;
        len -= step;
    }
}

static bool in_disk(const struct block *b, const struct block_req *r)
{
    u64 size = b->size, at = r->offset;

    if (r->op == BLOCK_FLUSH || r->op == BLOCK_NOP)
        return true;
    if (r->op == BLOCK_DISCARD || r->op == BLOCK_ZEROES)
        return range_in(at, r->len, size);
    for (unsigned i = 0; i < r->iovs; i++) {
        if (!range_in(at, r->iov[i].iov_len, size))
            return false;
        at += r->iov[i].iov_len;
    }
    return at <= size;
}

static bool changes(const struct block_req *r)
{
    return r->op == BLOCK_WRITE || r->op == BLOCK_DISCARD || r->op == BLOCK_ZEROES;
}

static bool nothing_to_do(const struct block *b, const struct block_req *r)
{
    return r->op == BLOCK_FLUSH ? b->readonly : r->op != BLOCK_NOP && !block_req_len(r);
}

bool block_submit(struct block *b, struct block_req *r)
{
    r->next = NULL;
    r->step = 0;
    r->result = 0;
    if (b->readonly && changes(r))
        r->result = -EROFS;
    else if (!in_disk(b, r))
        r->result = -EINVAL;
    else if (!nothing_to_do(b, r))
        return b->ops->submit(b, r);
    return true;
}

static bool is_full(const struct block_req *r)
{
    return (r->result == -ENOSPC || r->result == -EDQUOT) && (changes(r) || r->op == BLOCK_FLUSH);
}

/* Before anybody else can see that it is held: a retry may come at any time after that. */
static bool hold(struct block *b, struct block_req *r)
{
    void (*full)(void *arg) = NULL;
    void *arg = NULL;
    bool held = false;

    pthread_mutex_lock(&b->lock);
    if (b->full && !b->closing) {
        held = true;
        full = b->full;
        arg = b->full_arg;
        r->next = NULL;
        *b->held_last = r;
        b->held_last = &r->next;
        b->held_count++;
    }
    pthread_mutex_unlock(&b->lock);
    if (held && b->told_held)
        b->told_held(b->told_held_arg);
    if (full)
        full(arg);
    return held;
}

void block_done(struct block *b, struct block_req *r)
{
    if (unlikely(r->result < 0) && is_full(r) && !r->never_held && hold(b, r))
        return;
    r->done(r);
}

struct waited {
    struct block_req r;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool finished;
};

static void waited_done(struct block_req *r)
{
    struct waited *w = container_of(r, struct waited, r);

    pthread_mutex_lock(&w->lock);
    w->finished = true;
    pthread_cond_signal(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

int block_wait(struct block *b, struct block_req *r)
{
    struct waited w = { .r = *r, .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

    w.r.done = waited_done;
    w.r.at_once = true;
    if (!block_submit(b, &w.r)) {
        pthread_mutex_lock(&w.lock);
        while (!w.finished)
            pthread_cond_wait(&w.changed, &w.lock);
        pthread_mutex_unlock(&w.lock);
    }
    pthread_cond_destroy(&w.changed);
    pthread_mutex_destroy(&w.lock);
    return w.r.result;
}

/* --- requests that are held --- */

void block_hold_full(struct block *b, void (*full)(void *arg), void *arg)
{
    pthread_mutex_lock(&b->lock);
    b->full = full;
    b->full_arg = arg;
    pthread_mutex_unlock(&b->lock);
}

void block_tell_held(struct block *b, void (*held)(void *arg), void *arg)
{
    b->told_held = held;
    b->told_held_arg = arg;
}

unsigned block_held(struct block *b)
{
    unsigned n;

    pthread_mutex_lock(&b->lock);
    n = b->held_count;
    pthread_mutex_unlock(&b->lock);
    return n;
}

static struct block_req *take_held(struct block *b)
{
    struct block_req *first;

    pthread_mutex_lock(&b->lock);
    first = b->held;
    b->held = NULL;
    b->held_last = &b->held;
    b->held_count = 0;
    pthread_mutex_unlock(&b->lock);
    return first;
}

void block_retry(struct block *b)
{
    for (struct block_req *r = take_held(b), *next; r; r = next) {
        next = r->next;
        r->at_once = false;
        if (block_submit(b, r))
            block_done(b, r);
    }
}

void block_fail_held(struct block *b)
{
    for (struct block_req *r = take_held(b), *next; r; r = next) {
        next = r->next;
        r->done(r);
    }
}

/* --- threads --- */

void block_end_init(struct block_end *e)
{
    pthread_condattr_t attr;

    e->running = 0;
    pthread_mutex_init(&e->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&e->changed, &attr);
    pthread_condattr_destroy(&attr);
}

void block_end_destroy(struct block_end *e)
{
    pthread_cond_destroy(&e->changed);
    pthread_mutex_destroy(&e->lock);
}

void block_end_leave(struct block_end *e)
{
    pthread_mutex_lock(&e->lock);
    e->running--;
    pthread_cond_broadcast(&e->changed);
    pthread_mutex_unlock(&e->lock);
}

bool block_end_wait(struct block_end *e)
{
    struct timespec end;
    int r = 0;

    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += BLOCK_CLOSE_SECONDS;
    pthread_mutex_lock(&e->lock);
    while (e->running && r == 0)
        r = pthread_cond_timedwait(&e->changed, &e->lock, &end);
    pthread_mutex_unlock(&e->lock);
    return r == 0;
}

static void *work(void *arg)
{
    struct block_pool *p = arg;
    struct block_req *r;

    pthread_mutex_lock(&p->lock);
    for (;;) {
        p->idle++;
        while (!p->first && !p->closing)
            pthread_cond_wait(&p->more, &p->lock);
        p->idle--;
        r = p->first;
        if (!r)
            break;
        p->first = r->next;
        if (!p->first)
            p->last = &p->first;
        pthread_mutex_unlock(&p->lock);
        r->result = r->op == BLOCK_NOP ? 0 : p->serve(p->b, r);
        block_done(p->b, r);
        pthread_mutex_lock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    block_end_leave(&p->end);
    return NULL;
}

int block_pool_open(struct block_pool *p, struct block *b, int (*serve)(struct block *b, struct block_req *r))
{
    int e = 0;

    *p = (struct block_pool){ .b = b, .serve = serve, .last = &p->first };
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->more, NULL);
    block_end_init(&p->end);
    while (p->workers < BLOCK_WORKERS && !e) {
        p->end.running++;
        e = thread_start(&p->worker[p->workers], work, p);
        if (e)
            p->end.running--;
        else
            p->workers++;
    }
    if (p->workers)
        return 0;
    block_pool_close(p);
    return err(-e, "disk %s: cannot start a thread: %s; raise the limit on processes (ulimit -u)", b->path, strerror(e));
}

void block_pool_submit(struct block_pool *p, struct block_req *r)
{
    bool wake;

    r->next = NULL;
    pthread_mutex_lock(&p->lock);
    *p->last = r;
    p->last = &r->next;
    wake = p->idle;
    pthread_mutex_unlock(&p->lock);
    if (wake)
        pthread_cond_signal(&p->more);
}

bool block_pool_close(struct block_pool *p)
{
    bool ended;

    if (!p->serve)
        return true;
    pthread_mutex_lock(&p->lock);
    p->closing = true;
    pthread_mutex_unlock(&p->lock);
    pthread_cond_broadcast(&p->more);
    ended = block_end_wait(&p->end);
    for (unsigned i = 0; i < p->workers; i++)
        if (ended)
            pthread_join(p->worker[i], NULL);
        else
            pthread_detach(p->worker[i]);
    if (!ended)
        return false;
    pthread_cond_destroy(&p->more);
    pthread_mutex_destroy(&p->lock);
    block_end_destroy(&p->end);
    p->serve = NULL;
    return true;
}

/* --- a back end --- */

int block_init(struct block *b, const struct block_ops *ops, const char *kind, const char *path, bool readonly)
{
    b->ops = ops;
    b->kind = kind;
    b->readonly = readonly;
    b->held_last = &b->held;
    pthread_mutex_init(&b->lock, NULL);
    b->path = strdup(path);
    return b->path ? 0 : err(-ENOMEM, "disk %s: out of memory", path);
}

void block_destroy(struct block *b)
{
    pthread_mutex_destroy(&b->lock);
    free(b->path);
}

int block_open(const struct block_config *c, struct block **out)
{
    struct block_config base = *c;
    struct block *b;
    int r;

    if (c->cache != BLOCK_CACHE_BACK && (c->overlay || block_nbd_is(c->path)))
        return err(-EINVAL, "disk %s: cache= is for image files and block devices without an overlay; leave it out", c->path);
    base.readonly |= c->overlay != NULL;
    r = block_nbd_is(c->path) ? block_nbd_open(&base, &b) : block_file_open(&base, &b);
    if (r < 0)
        return r;
    r = block_refresh(b);
    if (r == 0 && c->overlay) {
        r = block_overlay_open(c, b, &b);
        if (r < 0)
            return r;
        r = block_refresh(b);
    }
    if (r < 0)
        block_close(b);
    else
        *out = b;
    return r;
}

bool block_close(struct block *b)
{
    if (!b)
        return true;
    pthread_mutex_lock(&b->lock);
    b->closing = true;
    pthread_mutex_unlock(&b->lock);
    block_fail_held(b);
    return b->ops->close(b);
}

bool block_abandon(struct block *b)
{
    return b->ops->abandon && b->ops->abandon(b);
}

int block_refresh(struct block *b)
{
    u64 size;
    int r = b->ops->size(b, &size);

    if (r < 0)
        return r;
    if (!size)
        return err(-EINVAL, "disk %s: it is empty; give it a size, for example with: truncate -s 1G %s", b->path, b->path);
    if (size > INT64_MAX - BLOCK_SECTOR)
        return err(-EFBIG, "disk %s: no disk is as large as %llu bytes; check the file", b->path, (unsigned long long)size);
    b->size = ALIGN_UP(size, BLOCK_SECTOR);
    return 0;
}

int block_grow(struct block *b, u64 size)
{
    int r;

    if (b->readonly)
        return err(-EROFS, "disk %s: it is read-only", b->path);
    if (size % BLOCK_SECTOR || size < b->size)
        return err(-EINVAL, "disk %s: a disk only grows, by whole sectors of 512 bytes; it has %llu bytes now", b->path, (unsigned long long)b->size);
    if (!b->ops->grow)
        return err(-EOPNOTSUPP, "disk %s: only disks in image files can be made larger from here", b->path);
    r = b->ops->grow(b, size);
    return r < 0 ? r : block_refresh(b);
}

u64 block_time_ns(struct block *b)
{
    return b->ops->time_ns ? b->ops->time_ns(b) : 0;
}

u64 block_size(const struct block *b)
{
    return b->size;
}

bool block_readonly(const struct block *b)
{
    return b->readonly;
}

const char *block_path(const struct block *b)
{
    return b->path;
}

const char *block_kind(const struct block *b)
{
    return b->kind;
}

const char *block_verb(enum block_op op)
{
    static const char *const verb[] = { [BLOCK_READ] = "reading", [BLOCK_WRITE] = "writing", [BLOCK_FLUSH] = "flushing",
                                        [BLOCK_DISCARD] = "discarding", [BLOCK_ZEROES] = "writing zeroes", [BLOCK_NOP] = "waiting" };

    return verb[op];
}
