/*
 * Disk images by a few worker threads that call preadv, pwritev and fdatasync (see block.h).
 *
 * The image is raw. A file whose size is no multiple of a sector gets a last sector that is filled up with zeroes on reading, and that
 * a write extends the file to. Left out: image formats, io_uring, discard.
 *
 * Errors of the host come back as the request's result. Locking: one mutex around the queue, a leaf; done() is called without it.
 * Lock of the file: a whole-file open-file-description lock (fcntl(2)), exclusive for writers. It also keeps out the same image given twice in one
 * process, and QEMU. File systems that have no locks go without.
 */
#define _GNU_SOURCE
#include "back/block.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/err.h"

#define WORKERS 4
#define WORKER_STACK (256 * KiB)

struct block {
    char *path;
    int fd;
    bool readonly;
    _Atomic u64 size;
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct block_req *first, **last;                               /* waiting, in order of submission */
    bool closing;
    pthread_t worker[WORKERS];
    unsigned workers;
};

/* --- requests --- */

static void consume(struct block_req *r, size_t len)
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

/* Behind the end of a file there is at most the rest of its last sector, or the file has been cut short under us. */
static int fill_last_sector(struct block_req *r)
{
    u64 left = 0;

    for (unsigned i = 0; i < r->iovs; i++)
        left += r->iov[i].iov_len;
    if (left >= BLOCK_SECTOR)
        return -EIO;
    for (; r->iovs; r->iov++, r->iovs--)
        memset(r->iov->iov_base, 0, r->iov->iov_len);
    return 0;
}

static int transfer(struct block *b, struct block_req *r)
{
    consume(r, 0);                                                 /* empty pieces at the front */
    while (r->iovs) {
        int n = (int)MIN(r->iovs, (unsigned)IOV_MAX);
        ssize_t len = r->op == BLOCK_READ ? preadv(b->fd, r->iov, n, (off_t)r->offset) : pwritev(b->fd, r->iov, n, (off_t)r->offset);

        if (len < 0 && errno == EINTR)
            continue;
        if (len < 0)
            return -errno;
        if (len == 0)
            return r->op == BLOCK_READ ? fill_last_sector(r) : -EIO;
        consume(r, (size_t)len);
    }
    return 0;
}

static bool in_disk(const struct block *b, const struct block_req *r)
{
    u64 size = b->size, at = r->offset;

    for (unsigned i = 0; i < r->iovs; i++) {
        if (!range_in(at, r->iov[i].iov_len, size))
            return false;
        at += r->iov[i].iov_len;
    }
    return at <= size;
}

static int serve(struct block *b, struct block_req *r)
{
    switch (r->op) {
    case BLOCK_READ:
        return in_disk(b, r) ? transfer(b, r) : -EINVAL;
    case BLOCK_WRITE:
        return b->readonly ? -EROFS : in_disk(b, r) ? transfer(b, r) : -EINVAL;
    case BLOCK_FLUSH:
        return b->readonly || fdatasync(b->fd) == 0 ? 0 : -errno;
    }
    return -EINVAL;
}

static void *work(void *arg)
{
    struct block *b = arg;
    struct block_req *r;

    pthread_mutex_lock(&b->lock);
    for (;;) {
        while (!b->first && !b->closing)
            pthread_cond_wait(&b->more, &b->lock);
        r = b->first;
        if (!r)
            break;
        b->first = r->next;
        if (!b->first)
            b->last = &b->first;
        pthread_mutex_unlock(&b->lock);
        r->result = serve(b, r);
        r->done(r);
        pthread_mutex_lock(&b->lock);
    }
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

void block_submit(struct block *b, struct block_req *r)
{
    r->next = NULL;
    pthread_mutex_lock(&b->lock);
    *b->last = r;
    b->last = &r->next;
    pthread_mutex_unlock(&b->lock);
    pthread_cond_signal(&b->more);
}

/* --- opening --- */

static int open_error(const char *path, bool readonly, int e)
{
    switch (e) {
    case ENOENT:
        return err(-e, "disk %s: there is no such file; create it, for example with: truncate -s 1G %s", path, path);
    case EACCES:
    case EPERM:
        return err(-e, "disk %s: %s; change its permissions%s", path, strerror(e), readonly ? "" : ", or append ,readonly if it may only be read");
    case EROFS:
        return err(-e, "disk %s: it lies on a read-only file system; append ,readonly", path);
    default:
        return err(-e, "disk %s: cannot open it: %s; name an image file or a block device", path, strerror(e));
    }
}

static int check_kind(const char *path, mode_t mode)
{
    if (S_ISREG(mode) || S_ISBLK(mode))
        return 0;
    return err(-EINVAL, "disk %s: it is %s; name an image file or a block device", path,
               S_ISDIR(mode) ? "a directory" : S_ISFIFO(mode) ? "a pipe" : S_ISSOCK(mode) ? "a socket" : "a character device");
}

/* stat() first: opening a pipe or a device can block or have effects. The second look is at what was really opened. */
static int open_file(struct block *b)
{
    struct stat st;
    int r;

    if (stat(b->path, &st) < 0)
        return open_error(b->path, b->readonly, errno);
    r = check_kind(b->path, st.st_mode);
    if (r < 0)
        return r;
    b->fd = open(b->path, (b->readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (b->fd < 0 || fstat(b->fd, &st) < 0)
        return open_error(b->path, b->readonly, errno);
    return check_kind(b->path, st.st_mode);
}

static int lock_file(struct block *b)
{
    struct flock fl = { .l_type = b->readonly ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET };

    if (fcntl(b->fd, F_OFD_SETLK, &fl) == 0 || (errno != EAGAIN && errno != EACCES))
        return 0;
    return err(-EBUSY, "disk %s: it is in use by another virtual machine or program; stop that, or append ,readonly wherever it is used", b->path);
}

int block_refresh(struct block *b)
{
    struct stat st;
    u64 size;

    if (fstat(b->fd, &st) < 0 || (S_ISBLK(st.st_mode) && ioctl(b->fd, BLKGETSIZE64, &size) < 0))
        return err(-errno, "disk %s: cannot find out its size: %s; check the file", b->path, strerror(errno));
    if (!S_ISBLK(st.st_mode))
        size = (u64)st.st_size;
    if (!size)
        return err(-EINVAL, "disk %s: it is empty; give it a size, for example with: truncate -s 1G %s", b->path, b->path);
    b->size = ALIGN_UP(size, BLOCK_SECTOR);
    return 0;
}

/* Signals are the main thread's, except for those that a thread brings about itself. */
static int start_workers(struct block *b)
{
    pthread_attr_t attr;
    sigset_t mask;
    int e = 0;

    sigfillset(&mask);
    sigdelset(&mask, SIGSEGV);
    sigdelset(&mask, SIGBUS);
    sigdelset(&mask, SIGFPE);
    sigdelset(&mask, SIGILL);
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, WORKER_STACK);
    pthread_attr_setsigmask_np(&attr, &mask);
    while (b->workers < WORKERS && !e) {
        e = pthread_create(&b->worker[b->workers], &attr, work, b);
        if (!e)
            b->workers++;
    }
    pthread_attr_destroy(&attr);
    if (!b->workers)
        return err(-e, "disk %s: cannot start a thread: %s; raise the limit on processes (ulimit -u)", b->path, strerror(e));
    return 0;
}

int block_open(const char *path, bool readonly, struct block **out)
{
    struct block *b = calloc(1, sizeof(*b));
    int r;

    if (!b)
        return err(-ENOMEM, "disk %s: out of memory", path);
    b->fd = -1;
    b->readonly = readonly;
    b->last = &b->first;
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->more, NULL);
    b->path = strdup(path);
    r = b->path ? open_file(b) : err(-ENOMEM, "disk %s: out of memory", path);
    if (r == 0)
        r = block_refresh(b);
    if (r == 0)
        r = lock_file(b);
    if (r == 0)
        r = start_workers(b);
    if (r < 0) {
        block_close(b);
        return r;
    }
    *out = b;
    return 0;
}

void block_close(struct block *b)
{
    if (!b)
        return;
    pthread_mutex_lock(&b->lock);
    b->closing = true;
    pthread_mutex_unlock(&b->lock);
    pthread_cond_broadcast(&b->more);
    for (unsigned i = 0; i < b->workers; i++)
        pthread_join(b->worker[i], NULL);
    if (b->fd >= 0)
        close(b->fd);
    pthread_cond_destroy(&b->more);
    pthread_mutex_destroy(&b->lock);
    free(b->path);
    free(b);
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
