/*
 * The event loop: epoll for file descriptors, an eventfd for posted work and for stopping.
 *
 * It looks before it sleeps (spin.h).
 *
 * Locking: `lock` guards the list of posted work and is never held around a callback. Watches belong to the loop's thread.
 */
#include "base/loop.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/err.h"
#include "base/spin.h"

#define BATCH 32

struct post {
    void (*fn)(void *arg);
    void *arg;
};

struct posts {
    struct post *item;
    size_t n, cap;
};

struct loop {
    int epoll, wake;
    atomic_bool stop;
    pthread_mutex_t lock;
    struct posts posted;                                           /* under lock */
    struct posts running;                                          /* the loop's thread: what it took from `posted` */
    struct epoll_event batch[BATCH];                               /* what epoll_wait() gave; a deleted watch's entries are cleared */
    int batch_n;
    struct spin spin;                                              /* the loop's thread */
};

static bool come(void *arg)
{
    struct loop *l = arg;

    l->batch_n = epoll_wait(l->epoll, l->batch, BATCH, 0);
    return l->batch_n != 0;
}

/* As epoll_wait(2). Frames, and what virtiofsd and programs of the host answer, mostly follow soon on what went before: it looks for them before it sleeps. */
static int next_batch(struct loop *l)
{
    u64 since;
    int n;

    if (spin_pays(&l->spin) && spin_look(&l->spin, come, l))
        return l->batch_n;
    since = spin_clock();
    n = epoll_wait(l->epoll, l->batch, BATCH, -1);
    spin_slept(&l->spin, spin_clock() - since);
    return n;
}

int loop_new(struct loop **out)
{
    struct loop *l = calloc(1, sizeof(*l));
    int e;

    if (!l)
        return err(-ENOMEM, "event loop: out of memory");
    l->epoll = epoll_create1(EPOLL_CLOEXEC);
    l->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&l->lock, NULL);
    struct epoll_event ev = { .events = EPOLLIN, .data.ptr = NULL }; /* NULL: the loop's own */
    if (l->epoll < 0 || l->wake < 0 || epoll_ctl(l->epoll, EPOLL_CTL_ADD, l->wake, &ev) < 0) {
        e = -errno;
        loop_free(l);
        return err(e, "event loop: %s; raise the limit of open files (ulimit -n)", strerror(-e));
    }
    *out = l;
    return 0;
}

void loop_free(struct loop *l)
{
    if (!l)
        return;
    if (l->epoll >= 0)
        close(l->epoll);
    if (l->wake >= 0)
        close(l->wake);
    pthread_mutex_destroy(&l->lock);
    free(l->posted.item);
    free(l->running.item);
    free(l);
}

/* Async-signal-safe. The eventfd's counter cannot overflow before the loop has read it once, so a failing write means that a wake-up is on its way anyway. */
static void wake(struct loop *l)
{
    int saved_errno = errno;
    u64 one = 1;
    ssize_t r UNUSED = write(l->wake, &one, sizeof(one));

    errno = saved_errno;
}

void loop_stop(struct loop *l)
{
    atomic_store(&l->stop, true);
    wake(l);
}

void loop_post(struct loop *l, void (*fn)(void *arg), void *arg)
{
    bool first;

    pthread_mutex_lock(&l->lock);
    if (l->posted.n == l->posted.cap) {
        size_t cap = l->posted.cap ? 2 * l->posted.cap : 64;
        struct post *item = realloc(l->posted.item, cap * sizeof(*item));

        bug_on(!item); /* posting cannot fail, and nothing sensible is left to do when a few KiB are not to be had */
        l->posted.item = item;
        l->posted.cap = cap;
    }
    first = l->posted.n == 0;
    l->posted.item[l->posted.n++] = (struct post){ fn, arg };
    pthread_mutex_unlock(&l->lock);
    if (first)
        wake(l);
}

/* Runs what has been posted so far. What the callbacks post has its turn in the next round, so fds are not starved. */
static void run_posted(struct loop *l)
{
    struct posts idle = l->running;

    pthread_mutex_lock(&l->lock);
    l->running = l->posted;
    l->posted = idle;
    pthread_mutex_unlock(&l->lock);

    for (size_t i = 0; i < l->running.n; i++)
        if (l->running.item[i].fn)
            l->running.item[i].fn(l->running.item[i].arg);
    l->running.n = 0;
}

static void unpost(struct posts *p, void (*fn)(void *arg), void *arg)
{
    for (size_t i = 0; i < p->n; i++)
        if (p->item[i].fn == fn && p->item[i].arg == arg)
            p->item[i].fn = NULL;
}

void loop_unpost(struct loop *l, void (*fn)(void *arg), void *arg)
{
    pthread_mutex_lock(&l->lock);
    unpost(&l->posted, fn, arg);
    pthread_mutex_unlock(&l->lock);
    unpost(&l->running, fn, arg);
}

int loop_run(struct loop *l)
{
    while (!atomic_load(&l->stop)) {
        int n = next_batch(l);

        if (n < 0) {
            if (errno == EINTR)
                continue;
            return err(-errno, "event loop: waiting failed: %s", strerror(errno));
        }
        l->batch_n = n;
        for (int i = 0; i < n; i++) {
            struct loop_fd *w = l->batch[i].data.ptr;
            u64 count;

            if (w)
                w->fn(w->arg, l->batch[i].events);
            else if (l->batch[i].events && read(l->wake, &count, sizeof(count)) == sizeof(count))
                run_posted(l);
        }
        l->batch_n = 0;
    }
    atomic_store(&l->stop, false);
    return 0;
}

int loop_fd_add(struct loop *l, struct loop_fd *w, int fd, u32 events, void (*fn)(void *arg, u32 events), void *arg)
{
    struct epoll_event ev = { .events = events, .data.ptr = w };

    *w = (struct loop_fd){ .fd = fd, .fn = fn, .arg = arg };
    if (epoll_ctl(l->epoll, EPOLL_CTL_ADD, fd, &ev) < 0)
        return err(-errno, "event loop: cannot watch file descriptor %d: %s", fd, strerror(errno));
    w->loop = l;
    return 0;
}

void loop_fd_mod(struct loop_fd *w, u32 events)
{
    struct epoll_event ev = { .events = events, .data.ptr = w };

    bug_on(!w->loop);
    bug_on(epoll_ctl(w->loop->epoll, EPOLL_CTL_MOD, w->fd, &ev) < 0);
}

void loop_fd_del(struct loop_fd *w)
{
    struct loop *l = w->loop;

    if (!l)
        return;
    epoll_ctl(l->epoll, EPOLL_CTL_DEL, w->fd, NULL);
    w->loop = NULL;
    /* Its events may be in the batch that is being worked through; the entry becomes a wake-up without events. */
    for (int i = 0; i < l->batch_n; i++)
        if (l->batch[i].data.ptr == w)
            l->batch[i] = (struct epoll_event){ 0 };
}
