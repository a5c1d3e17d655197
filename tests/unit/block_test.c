/* Disk images: requests against a real file, the lock, and every kind of file that is no disk. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "back/block.h"
#include "base/err.h"

static char dir[64] = "/tmp/doppel-block-XXXXXX";

static enum block_io how;

/* In place of the C library's, for back ends that call it: the host's errors. */
static atomic_int sync_error;                                      /* of the next call, */
static atomic_int sync_error_us;                                   /* which takes so long */

int fdatasync(int fd)
{
    int e = atomic_exchange(&sync_error, 0);

    if (e)
        usleep((useconds_t)atomic_load(&sync_error_us));
    errno = e;
    return e ? -1 : (int)syscall(SYS_fdatasync, fd);
}

static int open_disk(const char *name, bool readonly, struct block **b)
{
    return block_open(&(struct block_config){ .path = name, .readonly = readonly, .io = how }, b);
}

static char *path(const char *name)
{
    static char buf[2][128];
    static int i;

    snprintf(buf[i ^= 1], sizeof(buf[0]), "%s/%s", dir, name);
    return buf[i];
}

static void make(const char *name, off_t size)
{
    int fd = open(path(name), O_RDWR | O_CREAT | O_TRUNC, 0600);

    assert_true(fd >= 0 && ftruncate(fd, size) == 0);
    close(fd);
}

static int setup(void **state)
{
    (void)state;
    return !mkdtemp(dir);
}

static int teardown(void **state)
{
    char cmd[256];

    (void)state;
    snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
    return system(cmd);
}

/* A request and its end. */
struct job {
    struct block_req req;
    struct iovec iov[8];
    pthread_mutex_t lock;
    pthread_cond_t done;
    bool finished;
};

static void job_done(struct block_req *r)
{
    struct job *j = container_of(r, struct job, req);

    pthread_mutex_lock(&j->lock);
    j->finished = true;
    pthread_cond_signal(&j->done);
    pthread_mutex_unlock(&j->lock);
}

static void job_start(struct job *j, struct block *b, enum block_op op, u64 offset, const struct iovec *iov, unsigned iovs)
{
    memset(j, 0, sizeof(*j));
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->done, NULL);
    if (iovs)
        memcpy(j->iov, iov, iovs * sizeof(*iov));
    j->req = (struct block_req){ .op = op, .offset = offset, .iov = j->iov, .iovs = iovs, .done = job_done };
    if (block_submit(b, &j->req))
        job_done(&j->req);
}

static int job_wait(struct job *j)
{
    pthread_mutex_lock(&j->lock);
    while (!j->finished)
        pthread_cond_wait(&j->done, &j->lock);
    pthread_mutex_unlock(&j->lock);
    return j->req.result;
}

static int io(struct block *b, enum block_op op, u64 offset, void *buf, size_t len)
{
    struct job j;

    job_start(&j, b, op, offset, &(struct iovec){ buf, len }, op == BLOCK_FLUSH ? 0 : 1);
    return job_wait(&j);
}

static int range(struct block *b, enum block_op op, u64 offset, u64 len, bool unmap)
{
    struct job j = { .lock = PTHREAD_MUTEX_INITIALIZER, .done = PTHREAD_COND_INITIALIZER };

    j.req = (struct block_req){ .op = op, .offset = offset, .len = len, .unmap = unmap, .done = job_done };
    if (block_submit(b, &j.req))
        job_done(&j.req);
    return job_wait(&j);
}

static u64 allocated(const char *name)
{
    struct stat st;

    assert_int_equal(stat(path(name), &st), 0);
    return (u64)st.st_blocks * 512;
}

static void test_discard_and_zeroes(void **state)
{
    static u8 out[3 * MiB], in[3 * MiB];
    struct block *b;

    (void)state;
    make("disk", 4 * MiB);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    for (unsigned unmap = 0; unmap < 2; unmap++) {
        memset(out, 0xa5, sizeof(out));
        assert_int_equal(io(b, BLOCK_WRITE, 512, out, sizeof(out)), 0);
        assert_int_equal(range(b, BLOCK_ZEROES, 1024, 2 * MiB + 512, unmap), 0);
        memset(out + 512, 0, 2 * MiB + 512);
        assert_int_equal(io(b, BLOCK_READ, 512, in, sizeof(in)), 0);
        assert_memory_equal(in, out, sizeof(in));
        assert_int_equal(range(b, BLOCK_ZEROES, 4 * MiB - 512, 1024, unmap), -EINVAL);
    }
    assert_int_equal(range(b, BLOCK_DISCARD, 0, 4 * MiB, false), 0);
    assert_true(allocated("disk") < 1 * MiB);
    assert_int_equal(range(b, BLOCK_DISCARD, 4 * MiB, 512, false), -EINVAL);
    assert_int_equal(range(b, BLOCK_DISCARD, ~0ull - 511, 1024, false), -EINVAL);
    assert_int_equal(range(b, BLOCK_DISCARD, 512, ~0ull, false), -EINVAL);
    assert_int_equal(range(b, BLOCK_DISCARD, 4 * MiB, 0, false), 0);
    assert_int_equal(range(b, BLOCK_NOP, 0, 0, false), 0);
    block_close(b);
    assert_int_equal(open_disk(path("disk"), true, &b), 0);
    assert_int_equal(range(b, BLOCK_DISCARD, 0, 512, false), -EROFS);
    assert_int_equal(range(b, BLOCK_ZEROES, 0, 512, true), -EROFS);
    block_close(b);
}

/* What the page cache has is answered by block_submit() itself, if that is wanted. */
static void test_at_once(void **state)
{
    struct block *b;
    u8 buf[4096] = { 7 };
    struct iovec iov = { buf, sizeof(buf) };
    struct block_req r = { .op = BLOCK_READ, .iov = &iov, .iovs = 1, .at_once = true, .done = job_done };

    (void)state;
    make("disk", 64 * KiB);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    assert_int_equal(io(b, BLOCK_WRITE, 0, buf, sizeof(buf)), 0);
    buf[0] = 0;
    assert_true(block_submit(b, &r));
    assert_int_equal(r.result, 0);
    assert_int_equal(buf[0], 7);
    block_close(b);
}

static void test_grow(void **state)
{
    struct block *b;
    u8 buf[512];

    (void)state;
    make("disk", 4096);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    assert_int_equal(block_grow(b, 2048), -EINVAL);
    assert_int_equal(block_grow(b, 8192 + 1), -EINVAL);
    assert_int_equal(block_grow(b, 8192), 0);
    assert_int_equal(block_size(b), 8192);
    assert_int_equal(io(b, BLOCK_READ, 4096, buf, 512), 0);
    block_close(b);
    assert_int_equal(open_disk(path("disk"), true, &b), 0);
    assert_int_equal(block_grow(b, 16384), -EROFS);
    block_close(b);
}

/* A host that does not permit io_uring (here by a filter of system calls): threads do it, unless somebody insists. */
static void test_no_uring(void **state)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = { ARRAY_SIZE(code), code };
    int status;
    pid_t pid;

    (void)state;
    make("disk", 64 * KiB);
    pid = fork();
    if (!pid) {
        struct block_config c = { .path = path("disk") };
        u8 buf[512] = { 3 };
        struct block *b;
        int bad = 0;

        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) < 0)
            _exit(77);
        if (block_open(&c, &b) < 0)
            _exit(9);
        bad |= !strstr(block_kind(b), "threads");
        bad |= (io(b, BLOCK_WRITE, 0, buf, sizeof(buf)) != 0) << 1;
        block_close(b);
        c.io = BLOCK_IO_URING;
        bad |= (block_open(&c, &b) >= 0 || !strstr(err_last(), "does not permit io_uring")) << 2;
        _exit(bad);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) {
        puts("# skip: no filters of system calls here");
        skip();
    }
    assert_int_equal(WEXITSTATUS(status), 0);
}

static atomic_uint told;

static void full(void *arg)
{
    (void)arg;
    told++;
}

/* The host is full: requests wait, and succeed when there is room; or they fail when they are told to. /dev/full's kind of error, by a small tmpfs. */
static void test_hold_full(void **state)
{
    static u8 buf[256 * KiB];
    struct job j;
    struct block *b;
    char fs[128], cmd[300];
    int fd;

    (void)state;
    snprintf(fs, sizeof(fs), "%s/full", dir);
    assert_int_equal(mkdir(fs, 0700), 0);
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || mount("none", fs, "tmpfs", 0, "size=512k") < 0) {
        puts("# skip: only root can mount a small file system");
        skip();
    }
    snprintf(cmd, sizeof(cmd), "dd if=/dev/zero of=%s/ballast bs=4k count=112 2>/dev/null", fs);
    assert_int_equal(system(cmd), 0);
    make("full/disk", 1 * MiB);
    assert_int_equal(open_disk(path("full/disk"), false, &b), 0);
    assert_int_equal(io(b, BLOCK_WRITE, 0, buf, sizeof(buf)), -ENOSPC);
    told = 0;
    block_hold_full(b, full, NULL);
    memset(buf, 0x5a, sizeof(buf));
    job_start(&j, b, BLOCK_WRITE, 0, &(struct iovec){ buf, sizeof(buf) }, 1);
    for (unsigned i = 0; i < 5000 && !block_held(b); i++)
        usleep(1000);
    assert_int_equal(block_held(b), 1);
    assert_true(told == 1 && !j.finished);
    block_retry(b);
    for (unsigned i = 0; i < 5000 && !block_held(b); i++)
        usleep(1000);
    assert_true(told == 2 && !j.finished);
    snprintf(cmd, sizeof(cmd), "%s/ballast", fs);
    assert_int_equal(unlink(cmd), 0);
    block_retry(b);
    assert_int_equal(job_wait(&j), 0);
    memset(buf, 0, sizeof(buf));
    assert_int_equal(io(b, BLOCK_READ, 0, buf, sizeof(buf)), 0);
    for (unsigned i = 0; i < sizeof(buf); i++)
        assert_int_equal(buf[i], 0x5a);
    fd = open(cmd, O_WRONLY | O_CREAT, 0600);
    while (write(fd, buf, 4096) > 0)
        ;
    close(fd);
    job_start(&j, b, BLOCK_WRITE, 512 * KiB, &(struct iovec){ buf, sizeof(buf) }, 1);
    for (unsigned i = 0; i < 5000 && !block_held(b); i++)
        usleep(1000);
    assert_true(block_close(b));                                   /* which answers what waits */
    assert_int_equal(job_wait(&j), -ENOSPC);
    assert_int_equal(umount(fs), 0);
}

static void test_read_write(void **state)
{
    struct block *b;
    u8 out[3000], in[3000];
    struct job j;

    (void)state;
    make("disk", 1 * MiB);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    assert_int_equal(block_size(b), 1 * MiB);
    for (unsigned i = 0; i < sizeof(out); i++)
        out[i] = (u8)(i * 7);
    /* scattered out, empty pieces among them; in by one piece */
    job_start(&j, b, BLOCK_WRITE, 1024, (struct iovec[]){ { NULL, 0 }, { out, 1 }, { out + 1, 2000 }, { out, 0 }, { out + 2001, 999 } }, 5);
    assert_int_equal(job_wait(&j), 0);
    assert_int_equal(io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
    assert_int_equal(io(b, BLOCK_READ, 1024, in, sizeof(in)), 0);
    assert_memory_equal(in, out, sizeof(in));
    block_close(b);
    assert_int_equal(open_disk(path("disk"), true, &b), 0);
    memset(in, 0, sizeof(in));
    assert_int_equal(io(b, BLOCK_READ, 1024, in, sizeof(in)), 0);
    assert_memory_equal(in, out, sizeof(in));
    assert_int_equal(io(b, BLOCK_WRITE, 0, out, 512), -EROFS);
    assert_int_equal(io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
    block_close(b);
}

static void test_bounds(void **state)
{
    struct block *b;
    u8 buf[1024];
    struct job j;

    (void)state;
    make("disk", 4096);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    assert_int_equal(io(b, BLOCK_READ, 3072, buf, 1024), 0);
    assert_int_equal(io(b, BLOCK_READ, 3584, buf, 1024), -EINVAL);
    assert_int_equal(io(b, BLOCK_WRITE, 4096, buf, 512), -EINVAL);
    assert_int_equal(io(b, BLOCK_READ, ~0ull - 511, buf, 512), -EINVAL);
    assert_int_equal(io(b, BLOCK_READ, 4096, buf, 0), 0);
    job_start(&j, b, BLOCK_WRITE, 3072, (struct iovec[]){ { buf, 512 }, { buf, 512 }, { buf, 512 } }, 3); /* only the last piece is outside */
    assert_int_equal(job_wait(&j), -EINVAL);
    block_close(b);
}

/* A file of 1000 bytes is a disk of two sectors; the second ends in zeroes. */
static void test_odd_size(void **state)
{
    struct block *b;
    u8 buf[1024];
    int fd;

    (void)state;
    make("odd", 1000);
    fd = open(path("odd"), O_WRONLY);
    memset(buf, 0x11, sizeof(buf));
    assert_int_equal(write(fd, buf, 1000), 1000);
    close(fd);
    assert_int_equal(open_disk(path("odd"), false, &b), 0);
    assert_int_equal(block_size(b), 1024);
    memset(buf, 0xff, sizeof(buf));
    assert_int_equal(io(b, BLOCK_READ, 0, buf, 1024), 0);
    assert_int_equal(buf[999], 0x11);
    for (unsigned i = 1000; i < 1024; i++)
        assert_int_equal(buf[i], 0);
    buf[1023] = 0x77;
    assert_int_equal(io(b, BLOCK_WRITE, 512, buf + 512, 512), 0);
    assert_int_equal(io(b, BLOCK_READ, 512, buf, 512), 0);
    assert_int_equal(buf[511], 0x77);
    block_close(b);
}

/* Somebody cuts the file short while we use it: an error, not zeroes. And when it grows, a refresh tells. */
static void test_size_changes(void **state)
{
    struct block *b;
    u8 buf[512];

    (void)state;
    make("disk", 8192);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    assert_int_equal(truncate(path("disk"), 1024), 0);
    assert_int_equal(io(b, BLOCK_READ, 4096, buf, 512), -EIO);
    assert_int_equal(truncate(path("disk"), 16384), 0);
    assert_int_equal(io(b, BLOCK_READ, 8192, buf, 512), -EINVAL);
    assert_int_equal(block_refresh(b), 0);
    assert_int_equal(block_size(b), 16384);
    assert_int_equal(io(b, BLOCK_READ, 8192, buf, 512), 0);
    block_close(b);
}

/* More pieces than one system call takes. */
static void test_many_pieces(void **state)
{
    enum { PIECES = 3000 };
    static struct iovec iov[PIECES];
    static u8 out[PIECES * 2], in[PIECES * 2];
    struct block *b;
    struct job j;

    (void)state;
    make("disk", 1 * MiB);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    for (unsigned i = 0; i < PIECES; i++) {
        iov[i] = (struct iovec){ out + 2 * i, 2 };
        out[2 * i] = (u8)i;
        out[2 * i + 1] = (u8)(i >> 8);
    }
    job_start(&j, b, BLOCK_FLUSH, 0, NULL, 0);
    assert_int_equal(job_wait(&j), 0);
    j.finished = false;
    j.req = (struct block_req){ .op = BLOCK_WRITE, .offset = 512, .iov = iov, .iovs = PIECES, .done = job_done };
    if (block_submit(b, &j.req))
        job_done(&j.req);
    assert_int_equal(job_wait(&j), 0);
    assert_int_equal(io(b, BLOCK_READ, 512, in, sizeof(in)), 0);
    assert_memory_equal(in, out, sizeof(in));
    block_close(b);
}

/* Many at once, and a close that comes before they are done. */
static void test_close_waits(void **state)
{
    enum { JOBS = 200 };
    static struct job job[JOBS];
    static u8 buf[JOBS][4096];
    struct block *b;

    (void)state;
    make("disk", JOBS * 4096);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    for (unsigned i = 0; i < JOBS; i++) {
        memset(buf[i], (int)i + 1, sizeof(buf[i]));
        job_start(&job[i], b, BLOCK_WRITE, i * 4096, &(struct iovec){ buf[i], 4096 }, 1);
    }
    block_close(b);
    for (unsigned i = 0; i < JOBS; i++)
        assert_true(job[i].finished && job[i].req.result == 0);
    assert_int_equal(open_disk(path("disk"), true, &b), 0);
    for (unsigned i = 0; i < JOBS; i++) {
        u8 in[4096];

        assert_int_equal(io(b, BLOCK_READ, i * 4096, in, 4096), 0);
        assert_memory_equal(in, buf[i], 4096);
    }
    block_close(b);
}

static void test_lock(void **state)
{
    struct block *a, *b;

    (void)state;
    make("disk", 4096);
    assert_int_equal(open_disk(path("disk"), false, &a), 0);
    assert_int_equal(open_disk(path("disk"), false, &b), -EBUSY);
    assert_non_null(strstr(err_last(), "in use"));
    assert_non_null(strstr(err_last(), path("disk")));
    assert_int_equal(open_disk(path("disk"), true, &b), -EBUSY);
    block_close(a);
    assert_int_equal(open_disk(path("disk"), true, &a), 0);
    assert_int_equal(open_disk(path("disk"), true, &b), 0);
    block_close(b);
    assert_int_equal(open_disk(path("disk"), false, &b), -EBUSY);
    block_close(a);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    block_close(b);
}

static void refused(const char *name, bool readonly, int code, const char *reason)
{
    struct block *b = NULL;

    assert_int_equal(open_disk(name, readonly, &b), code);
    assert_null(b);
    if (!strstr(err_last(), name) || !strstr(err_last(), reason))
        fail_msg("\"%s\" does not tell of %s: %s", err_last(), name, reason);
}

static void test_no_disks(void **state)
{
    (void)state;
    refused(path("missing"), false, -ENOENT, "truncate");
    refused(dir, false, -EINVAL, "a directory");
    refused(dir, true, -EINVAL, "a directory");
    make("empty", 0);
    refused(path("empty"), false, -EINVAL, "is empty");
    assert_int_equal(mkfifo(path("fifo"), 0600), 0);
    refused(path("fifo"), false, -EINVAL, "a pipe");
    refused(path("fifo"), true, -EINVAL, "a pipe");
    refused("/dev/zero", true, -EINVAL, "a character device");
    assert_int_equal(symlink("loop", path("loop")), 0);
    refused(path("loop"), true, -ELOOP, "symbolic links");
    refused("", true, -ENOENT, "no such file");
}

/* As an ordinary user, since root may read everything. */
static void test_permissions(void **state)
{
    pid_t pid;
    int status;

    (void)state;
    make("disk", 4096);
    assert_int_equal(chmod(path("disk"), 0444), 0);
    assert_int_equal(chmod(dir, 0755), 0);
    pid = fork();
    if (!pid) {
        struct block *b;
        int bad = 0;

        if (!getuid() && setuid(65534) < 0)
            _exit(9);
        bad |= open_disk(path("disk"), false, &b) != -EACCES || !strstr(err_last(), ",readonly");
        bad |= (open_disk(path("disk"), true, &b) != 0) << 1;
        _exit(bad);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(chmod(path("disk"), 0), 0);
    pid = fork();
    if (!pid) {
        struct block *b;

        if (!getuid() && setuid(65534) < 0)
            _exit(9);
        _exit(open_disk(path("disk"), true, &b) != -EACCES || !strstr(err_last(), "permissions"));
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* Written through, and past the page cache: the same disk, to any sector and from any buffer; and what cannot be. */
static void test_cache(void **state)
{
    static u8 model[256 * 1024], buf[64 * 1024 + 512], whole[sizeof(model)];
    struct block_config c = { .path = path("cached"), .io = how };
    struct block *b;

    (void)state;
    for (c.cache = BLOCK_CACHE_THROUGH; c.cache <= BLOCK_CACHE_NONE; c.cache++) {
        unsigned seed = c.cache;

        make("cached", sizeof(model));
        memset(model, 0, sizeof(model));
        if (block_open(&c, &b) < 0) {                              /* this file system has no such thing */
            assert_int_equal(c.cache, BLOCK_CACHE_NONE);
            assert_non_null(strstr(err_last(), "cache=none"));
            continue;
        }
        assert_non_null(strstr(block_kind(b), c.cache == BLOCK_CACHE_NONE ? "direct" : "written through"));
        for (unsigned i = 0; i < 400; i++) {
            size_t len = ((size_t)rand_r(&seed) % 128 + 1) * 512, at = (size_t)rand_r(&seed) % ((sizeof(model) - len) / 512 + 1) * 512;
            u8 *data = buf + (rand_r(&seed) % 2 ? 0 : (size_t)rand_r(&seed) % 512);

            switch (rand_r(&seed) % 5) {
            case 0:
            case 1:
                memset(data, (int)i, len);
                memcpy(model + at, data, len);
                assert_int_equal(io(b, BLOCK_WRITE, at, data, len), 0);
                break;
            case 2:
                memset(model + at, 0, len);
                assert_int_equal(range(b, BLOCK_ZEROES, at, len, i % 2), 0);
                break;
            case 3:
                assert_int_equal(io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
                break;
            default:
                assert_int_equal(io(b, BLOCK_READ, at, data, len), 0);
                assert_memory_equal(data, model + at, len);
            }
        }
        for (size_t at = 0; at < sizeof(whole); at += 64 * 1024)
            assert_int_equal(io(b, BLOCK_READ, at, whole + at, 64 * 1024), 0);
        assert_memory_equal(whole, model, sizeof(model));
        assert_true(block_close(b));
        make("odd", 100 * 1024 + 100);
        c.path = path("odd");
        if (c.cache == BLOCK_CACHE_NONE) {
            assert_int_equal(block_open(&c, &b), -EINVAL);
            assert_non_null(strstr(err_last(), "no multiple"));
        }
        c.path = path("cached");
        c.overlay = "";
        assert_int_equal(block_open(&c, &b), -EINVAL);
        assert_non_null(strstr(err_last(), "cache="));
        c.overlay = NULL;
    }
    c = (struct block_config){ .path = "nbd://127.0.0.1:1/", .cache = BLOCK_CACHE_NONE };
    assert_int_equal(block_open(&c, &b), -EINVAL);
}

/* The host has no more room (here by a limit on file sizes): the request's result says so, and nobody is killed by SIGXFSZ. */
static void test_full(void **state)
{
    pid_t pid;
    int status;

    (void)state;
    make("disk", 64 * KiB);
    pid = fork();
    if (!pid) {
        struct rlimit limit = { 8192, 8192 };
        struct block *b;
        u8 buf[4096] = { 1 };
        int bad = 0;

        if (open_disk(path("disk"), false, &b) < 0)
            _exit(9);
        setrlimit(RLIMIT_FSIZE, &limit);
        bad |= io(b, BLOCK_WRITE, 0, buf, sizeof(buf)) != 0;
        bad |= (io(b, BLOCK_WRITE, 32768, buf, sizeof(buf)) != -EFBIG) << 1;
        bad |= (io(b, BLOCK_READ, 32768, buf, sizeof(buf)) != 0) << 2;
        block_close(b);
        _exit(bad);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

/* A ring calls the C library's fdatasync() only if the kernel's was quick for a while. The error must have been taken. */
static int flush_with_error(struct block *b, int error)
{
    int r = 0;

    atomic_store(&sync_error, error);
    for (unsigned i = 0; r == 0 && i < 20000 && atomic_load(&sync_error); i++)
        r = io(b, BLOCK_FLUSH, 0, NULL, 0);
    assert_int_equal(atomic_load(&sync_error), 0);
    return r;
}

/* What fdatasync(2) could not write is lost, for want of room, too: it is an error, nothing waits for room, and no later flush says that all is well. */
static void test_sync_error(void **state)
{
    static const int error[] = { EIO, ENOSPC, EDQUOT };
    struct block *b;

    (void)state;
    make("disk", 64 * KiB);
    for (unsigned i = 0; i < ARRAY_SIZE(error); i++) {
        u8 buf[512] = { 1 };

        assert_int_equal(open_disk(path("disk"), false, &b), 0);
        block_hold_full(b, full, NULL);
        told = 0;
        assert_int_equal(io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
        assert_int_equal(io(b, BLOCK_WRITE, 0, buf, sizeof(buf)), 0);
        assert_int_equal(flush_with_error(b, error[i]), -EIO);
        assert_int_equal(io(b, BLOCK_FLUSH, 0, NULL, 0), -EIO);
        assert_int_equal(told, 0);
        assert_int_equal(io(b, BLOCK_READ, 0, buf, sizeof(buf)), 0);
        assert_true(block_close(b));
    }
}

/* The kernel tells one fdatasync(2) of an error, not one beside it or after it: that must not be answered first. */
static void test_sync_error_beside(void **state)
{
    struct job job[4];
    struct block *b;
    u8 buf[512] = { 1 };

    (void)state;
    make("disk", 64 * KiB);
    assert_int_equal(open_disk(path("disk"), false, &b), 0);
    assert_int_equal(io(b, BLOCK_WRITE, 0, buf, sizeof(buf)), 0);
    atomic_store(&sync_error_us, 50000);
    atomic_store(&sync_error, EIO);
    for (unsigned i = 0; i < ARRAY_SIZE(job); i++)
        job_start(&job[i], b, BLOCK_FLUSH, 0, NULL, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(job); i++)
        assert_int_equal(job_wait(&job[i]), -EIO);
    atomic_store(&sync_error_us, 0);
    assert_true(block_close(b));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_read_write), cmocka_unit_test(test_bounds), cmocka_unit_test(test_odd_size), cmocka_unit_test(test_size_changes),
        cmocka_unit_test(test_many_pieces), cmocka_unit_test(test_close_waits), cmocka_unit_test(test_lock), cmocka_unit_test(test_no_disks),
        cmocka_unit_test(test_permissions), cmocka_unit_test(test_full), cmocka_unit_test(test_discard_and_zeroes), cmocka_unit_test(test_at_once),
        cmocka_unit_test(test_grow), cmocka_unit_test(test_hold_full), cmocka_unit_test(test_no_uring), cmocka_unit_test(test_cache),
    };
    static const struct CMUnitTest errors[] = { cmocka_unit_test(test_sync_error) };
    static const struct CMUnitTest of_threads[] = { cmocka_unit_test(test_sync_error_beside) }; /* by io_uring it is the kernel's call */
    static const char *const name[] = { [BLOCK_IO_URING] = "io_uring", [BLOCK_IO_THREADS] = "threads" };
    struct block *b;
    int failed = 0;

    for (how = BLOCK_IO_THREADS; how >= BLOCK_IO_URING; how--) {
        strcpy(dir, "/tmp/doppel-block-XXXXXX");
        if (how == BLOCK_IO_URING && open_disk("/proc/self/exe", true, &b) < 0) {
            printf("1..1\nok 1 - io_uring # SKIP %s\n", err_last());
            continue;
        }
        if (how == BLOCK_IO_URING)
            block_close(b);
        failed += cmocka_run_group_tests_name(name[how], tests, setup, teardown);
        strcpy(dir, "/dev/shm/doppel-block-XXXXXX");               /* whose fdatasync() is quick everywhere */
        failed += cmocka_run_group_tests_name(how == BLOCK_IO_URING ? "io_uring, errors of fdatasync" : "threads, errors of fdatasync", errors, setup, teardown);
        strcpy(dir, "/tmp/doppel-block-XXXXXX");
        if (how == BLOCK_IO_THREADS)
            failed += cmocka_run_group_tests_name("threads, fdatasync", of_threads, setup, teardown);
    }
    return failed;
}
