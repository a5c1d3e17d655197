/*
 * Disk images in files, and block devices (see block.h), raw.
 *
 * A request is a sequence of steps, system calls mostly; step() says what the next one is, result() looks at what came of it. io_uring carries them
 * out (block_ring.c), or worker threads where it is not permitted. What lies in the host's page cache is read in block_submit() itself,
 * since waking a thread for it costs more than the copy.
 *
 * A file whose size is no multiple of a sector gets a last sector that is filled up with zeroes on reading, and that a write extends the file to.
 * Discard and zeroes are fallocate(2); where the file system has no such thing, the first is nothing at all and the second writes zeroes.
 * The page cache is used unless the user says otherwise: so the guest's alignment is no affair of the host's, and much is answered at once. The price is that both
 * memories may hold the same. cache=none is O_DIRECT (block_direct.c), cache=writethrough O_DSYNC.
 *
 * Lock of the file: a whole-file open-file-description lock (fcntl(2)), exclusive for writers. It also keeps out the same image given twice in one
 * process, and QEMU. File systems that have no locks go without.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "back/block_host.h"

#define ZERO_SIZE (1 * MiB)

struct block_file {
    struct block b;
    int fd;
    const void *zero;                                              /* ZERO_SIZE bytes; the kernel's page of zeroes, again and again */
    atomic_bool no_punch, no_zero_range, no_nowait;                /* what the file system turned out not to have */
    atomic_bool unsynced;                                          /* an fdatasync(2) failed */
    pthread_mutex_t syncing;                                       /* threads make one at a time, as the ring does: of two only one is told of an error */
    bool through;                                                  /* O_DSYNC: a write waits for the storage */
    struct block_direct direct;
    struct block_ring *ring;                                       /* NULL: the threads do it */
    struct block_pool pool;                                        /* with direct access also beside the ring */
};

/* What request.step says of requests that are fallocate(2) in several ways. SYNC: and are to be on stable storage. */
enum { STEP_FIRST, STEP_ZERO_RANGE, STEP_PUNCH, STEP_ZEROES, STEP_SYNC };

/* --- steps --- */

static void fallocate_step(struct block_file *f, struct block_req *r, struct block_step *s)
{
    bool punch = !f->no_punch, range = !f->no_zero_range && r->op == BLOCK_ZEROES;

    *s = (struct block_step){ .call = STEP_FALLOCATE, .offset = r->offset, .len = r->len };
    if (range && !(punch && r->unmap)) {
        r->step = STEP_ZERO_RANGE;
        s->mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    } else if (punch) {
        r->step = STEP_PUNCH;
        s->mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    } else {
        r->step = STEP_ZEROES;
        s->call = r->op == BLOCK_ZEROES ? STEP_WRITE : STEP_NOP;
        s->buf = f->zero;
        s->len = MIN(r->len, ZERO_SIZE);
    }
}

static void file_step(struct block *b, struct block_req *r, struct block_step *s)
{
    struct block_file *f = container_of(b, struct block_file, b);

    if (r->step == STEP_SYNC) {
        *s = (struct block_step){ .call = STEP_FDATASYNC };
        return;
    }
    switch (r->op) {
    case BLOCK_READ:
    case BLOCK_WRITE:
        block_consume(r, 0);                                       /* empty pieces at the front */
        *s = (struct block_step){ .call = r->op == BLOCK_READ ? STEP_READV : STEP_WRITEV, .offset = r->offset, .iov = r->iov,
                                  .iovs = MIN(r->iovs, (unsigned)IOV_MAX), .waits = f->through || f->direct.align };
        break;
    case BLOCK_DISCARD:
    case BLOCK_ZEROES:
        fallocate_step(f, r, s);
        break;
    case BLOCK_FLUSH:
        *s = (struct block_step){ .call = STEP_FDATASYNC };
        break;
    case BLOCK_NOP:
        *s = (struct block_step){ .call = STEP_NOP };
        break;
    }
}

/* Behind the end of a file there is at most the rest of its last sector, or the file has been cut short under us. */
static int fill_last_sector(struct block_req *r)
{
    if (block_req_len(r) >= BLOCK_SECTOR)
        return -EIO;
    for (; r->iovs; r->iov++, r->iovs--)
        memset(r->iov->iov_base, 0, r->iov->iov_len);
    return 0;
}

static bool transferred(struct block_req *r, int res)
{
    if (res == 0) {
        r->result = r->op == BLOCK_READ ? fill_last_sector(r) : -EIO;
        return true;
    }
    block_consume(r, (size_t)res);
    return !r->iovs;
}

static bool no_such_call(struct block_file *f, const struct block_req *r)
{
    switch (r->step) {
    case STEP_ZERO_RANGE: f->no_zero_range = true; return true;
    case STEP_PUNCH: f->no_punch = true; return true;
    default: return false;
    }
}

/* What fdatasync(2) could not write is not there for the next one, nor for one at the same time: after an error no flush succeeds any more. */
static int synced(struct block_file *f, int res)
{
    if (res < 0)
        f->unsynced = true;
    return res < 0 ? block_sync_error(res) : f->unsynced ? -EIO : 0;
}

/* True: it is done with. */
static bool stepped(struct block_file *f, struct block_req *r, int res)
{
    if (res == -EINTR || res == -EAGAIN)
        return false;
    if ((res == -EOPNOTSUPP || res == -ENOSYS) && no_such_call(f, r))
        return false;
    if (r->step == STEP_SYNC || r->op == BLOCK_FLUSH) {
        r->result = synced(f, res);
        return true;
    }
    if (res < 0) {
        r->result = res;
        return true;
    }
    if (r->op == BLOCK_READ || r->op == BLOCK_WRITE)
        return transferred(r, res);
    if (r->op == BLOCK_ZEROES && r->step == STEP_ZEROES) {
        r->offset += (u64)res;
        r->len -= (u64)res;
        if (!res)
            r->result = -EIO;
        if (!res || r->len)
            return !res;
    }
    if (r->op == BLOCK_ZEROES && f->through)
        r->step = STEP_SYNC;
    return r->step != STEP_SYNC;
}

static bool file_result(struct block *b, struct block_req *r, int res)
{
    struct block_file *f = container_of(b, struct block_file, b);
    bool done = stepped(f, r, res);

    if (done && r->gated)
        block_direct_leave(&f->direct);
    return done;
}

static int sync_alone(struct block_file *f)
{
    int r;

    pthread_mutex_lock(&f->syncing);
    r = fdatasync(f->fd) < 0 ? -errno : 0;
    if (r < 0)
        f->unsynced = true;
    pthread_mutex_unlock(&f->syncing);
    return r;
}

static int do_step(struct block_file *f, const struct block_step *s)
{
    ssize_t n = 0;

    switch (s->call) {
    case STEP_READV: n = preadv(f->fd, s->iov, (int)s->iovs, (off_t)s->offset); break;
    case STEP_WRITEV: n = pwritev(f->fd, s->iov, (int)s->iovs, (off_t)s->offset); break;
    case STEP_WRITE: n = pwrite(f->fd, s->buf, s->len, (off_t)s->offset); break;
    case STEP_FALLOCATE: n = fallocate(f->fd, s->mode, (off_t)s->offset, (off_t)s->len); break;
    case STEP_FDATASYNC: return sync_alone(f);
    case STEP_NOP: break;
    }
    return n < 0 ? -errno : (int)n;
}

static int serve_plain(struct block *b, struct block_req *r)
{
    struct block_file *f = container_of(b, struct block_file, b);
    struct block_step s;

    r->result = 0;
    do
        file_step(b, r, &s);
    while (!file_result(b, r, do_step(f, &s)));
    return r->result;
}

/* On a worker thread. */
static int serve(struct block *b, struct block_req *r)
{
    struct block_file *f = container_of(b, struct block_file, b);

    return f->direct.align ? block_direct_serve(&f->direct, f->fd, r, b, serve_plain) : serve_plain(b, r);
}

/* What is in the page cache. A part of it is progress, too: the rest goes the long way. */
static bool file_try(struct block *b, struct block_req *r)
{
    struct block_file *f = container_of(b, struct block_file, b);
    ssize_t n;

    if (f->no_nowait || f->direct.align || r->iovs > IOV_MAX)
        return false;
    n = preadv2(f->fd, r->iov, (int)r->iovs, (off_t)r->offset, RWF_NOWAIT);
    if (n < 0 && (errno == EOPNOTSUPP || errno == EINVAL))
        f->no_nowait = true;
    if (n <= 0)
        return false;
    block_consume(r, (size_t)n);
    return !r->iovs;
}

/* With direct access the ring takes what fits, and enters the gate for what changes something. */
static bool for_ring(struct block_file *f, struct block_req *r)
{
    bool changes = r->op == BLOCK_WRITE || r->op == BLOCK_ZEROES || r->op == BLOCK_DISCARD;

    r->gated = false;
    if (!f->ring || !f->direct.align)
        return f->ring;
    if (!block_direct_fits(&f->direct, r) || (changes && !block_direct_enter(&f->direct)))
        return false;
    r->gated = changes;
    return true;
}

static bool file_submit(struct block *b, struct block_req *r)
{
    struct block_file *f = container_of(b, struct block_file, b);

    if (r->at_once && r->op == BLOCK_READ && file_try(b, r))
        return true;
    if (for_ring(f, r))
        block_ring_submit(f->ring, r);
    else
        block_pool_submit(&f->pool, r);
    return false;
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
int block_file_fd(const char *path, bool readonly, int flags)
{
    struct stat st;
    int r, fd;

    if (stat(path, &st) < 0)
        return open_error(path, readonly, errno);
    r = check_kind(path, st.st_mode);
    if (r < 0)
        return r;
    fd = open(path, (readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | flags);
    if (fd < 0 && errno == EINVAL && (flags & O_DIRECT))
        return err(-EINVAL, "disk %s: its file system has no direct access (O_DIRECT); leave cache=none out", path);
    if (fd < 0)
        return open_error(path, readonly, errno);
    fcntl(fd, F_SETFL, flags & O_DIRECT);                          /* O_NONBLOCK has io_uring give up where it should wait; O_DSYNC is not touched by it */
    r = fstat(fd, &st) < 0 ? open_error(path, readonly, errno) : check_kind(path, st.st_mode);
    if (r == 0)
        r = block_file_lock(fd, path, readonly);
    if (r < 0)
        close(fd);
    return r < 0 ? r : fd;
}

int block_file_lock(int fd, const char *path, bool readonly)
{
    struct flock fl = { .l_type = readonly ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET };

    if (fcntl(fd, F_OFD_SETLK, &fl) == 0 || (errno != EAGAIN && errno != EACCES))
        return 0;
    return err(-EBUSY, "disk %s: it is in use by another virtual machine or program; stop that, or append ,readonly wherever it is used", path);
}

/* The last block must be there: past the page cache there is nobody to fill it up. */
static int check_size(struct block_file *f, u64 size)
{
    if (!f->direct.align || size % f->direct.align == 0)
        return 0;
    return err(-EINVAL, "disk %s: %llu bytes are no multiple of %u, which cache=none needs; give it another size (truncate), or leave cache=none out", f->b.path,
               (unsigned long long)size, f->direct.align);
}

static int file_size(struct block *b, u64 *size)
{
    struct block_file *f = container_of(b, struct block_file, b);
    struct stat st;

    if (fstat(f->fd, &st) < 0 || (S_ISBLK(st.st_mode) && ioctl(f->fd, BLKGETSIZE64, size) < 0))
        return err(-errno, "disk %s: cannot find out its size: %s; check the file", b->path, strerror(errno));
    if (!S_ISBLK(st.st_mode))
        *size = (u64)st.st_size;
    return check_size(f, *size);
}

static u64 file_time_ns(struct block *b)
{
    struct stat st;

    if (fstat(container_of(b, struct block_file, b)->fd, &st) < 0 || !S_ISREG(st.st_mode))
        return 0;
    return (u64)st.st_mtim.tv_sec * 1000000000 + (u64)st.st_mtim.tv_nsec;
}

static int file_grow(struct block *b, u64 size)
{
    struct block_file *f = container_of(b, struct block_file, b);
    struct stat st;
    int r = check_size(f, size);

    if (r < 0)
        return r;

    if (fstat(f->fd, &st) == 0 && !S_ISREG(st.st_mode))
        return err(-EINVAL, "disk %s: it is a block device, whose size the host says; make it larger there", b->path);
    if (ftruncate(f->fd, (off_t)size) < 0)
        return err(-errno, "disk %s: cannot make it larger: %s", b->path, strerror(errno));
    return 0;
}

static void file_free(struct block_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    block_direct_destroy(&f->direct);
    pthread_mutex_destroy(&f->syncing);
    if (f->zero)
        munmap((void *)f->zero, ZERO_SIZE);
    block_destroy(&f->b);
    free(f);
}

/* Both ways may be there: the threads only until the ring is known not to work. */
static bool file_close(struct block *b)
{
    struct block_file *f = container_of(b, struct block_file, b);
    bool ended = block_ring_close(f->ring);

    ended &= block_pool_close(&f->pool);
    if (ended)
        file_free(f);
    return ended;
}

static const struct block_ops file_ops = { .submit = file_submit, .try = file_try, .time_ns = file_time_ns, .size = file_size, .grow = file_grow, .close = file_close };
static const struct block_ring_ops ring_ops = { .step = file_step, .result = file_result };

static int start(struct block_file *f, enum block_io io)
{
    int r = io == BLOCK_IO_THREADS ? -ENOSYS : block_ring_open(&f->b, f->fd, &ring_ops, &f->ring);

    if (r == 0)
        f->b.kind = f->direct.align ? "raw, direct, io_uring" : f->through ? "raw, written through, io_uring" : "raw, io_uring";
    if (r == 0 && !f->direct.align)
        return 0;
    if (r < 0 && io == BLOCK_IO_URING)
        return err(r, "disk %s: this host does not permit io_uring: %s; leave io=uring out", f->b.path, strerror(-r));
    return block_pool_open(&f->pool, &f->b, serve);
}

int block_file_open(const struct block_config *c, struct block **out)
{
    struct block_file *f = calloc(1, sizeof(*f));
    bool direct = c->cache == BLOCK_CACHE_NONE;
    int r;

    if (!f)
        return err(-ENOMEM, "disk %s: out of memory", c->path);
    f->fd = -1;
    pthread_mutex_init(&f->syncing, NULL);
    f->through = c->cache == BLOCK_CACHE_THROUGH;
    r = block_init(&f->b, &file_ops, direct ? "raw, direct, threads" : f->through ? "raw, written through, threads" : "raw, threads", c->path, c->readonly);
    if (r == 0) {
        f->zero = mmap(NULL, ZERO_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (f->zero == MAP_FAILED) {
            f->zero = NULL;
            r = err(-ENOMEM, "disk %s: out of memory", c->path);
        }
    }
    if (r == 0)
        r = f->fd = block_file_fd(c->path, c->readonly, direct ? O_DIRECT : f->through ? O_DSYNC : 0);
    if (r >= 0 && direct)
        r = block_direct_init(&f->direct, f->fd, c->path);
    if (r >= 0)
        r = start(f, c->io);
    if (r < 0) {
        file_free(f);
        return r;
    }
    *out = &f->b;
    return 0;
}
