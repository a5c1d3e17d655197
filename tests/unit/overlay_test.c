/*
 * Overlays: what they show against a model, what is left of them when the program is killed or the host crashes at a bad moment, and every way in which file or
 * base can be wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "back/block.h"

#define SECTORS 3001u                                              /* the last cluster is not whole */
#define SIZE (SECTORS * 512u)
#define MAP 8192u
#define CLUSTER 65536u

static char dir[] = "/tmp/doppel-overlay-XXXXXX";
static char base[64], over[64], copy[64];

/* In place of the C library's: the host's errors, and its bad moments. */
static atomic_int sync_error, write_error;                         /* of the next call */
static void (*_Atomic at_header)(void);                            /* before a header is written */

int fdatasync(int fd)
{
    int e = atomic_exchange(&sync_error, 0);

    errno = e;
    return e ? -1 : (int)syscall(SYS_fdatasync, fd);
}

static unsigned folders_synced;

int fsync(int fd)
{
    struct stat st;

    folders_synced += fstat(fd, &st) == 0 && S_ISDIR(st.st_mode);
    return (int)syscall(SYS_fsync, fd);
}

ssize_t pwrite(int fd, const void *buf, size_t len, off_t at)
{
    void (*hook)(void) = len == 4096 && at < (off_t)MAP ? atomic_exchange(&at_header, NULL) : NULL;
    int e = atomic_exchange(&write_error, 0);

    if (hook)
        hook();
    errno = e;
    return e ? -1 : (ssize_t)syscall(SYS_pwrite64, fd, buf, len, at);
}

static void put_file(const char *path, const void *buf, size_t len)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);

    assert_true(fd >= 0 && write(fd, buf, len) == (ssize_t)len);
    close(fd);
}

static void copy_file(const char *from, const char *to)
{
    char cmd[200];

    snprintf(cmd, sizeof(cmd), "cp --sparse=always %s %s", from, to);
    assert_int_equal(system(cmd), 0);
}

/* Sector s of version v. Version 0 is the base's. */
static void fill(u32 *sector, u32 s, u32 v)
{
    for (unsigned i = 0; i < 128; i++)
        sector[i] = v == ~0u ? 0 : s * 2654435761u ^ v << 8 ^ i;
}

static void make_base(void)
{
    static u32 all[SECTORS][128];

    for (u32 s = 0; s < SECTORS; s++)
        fill(all[s], s, 0);
    put_file(base, all, sizeof(all));
}

static int setup(void **state UNUSED)
{
    if (!mkdtemp(dir))
        return -1;
    snprintf(base, sizeof(base), "%s/base", dir);
    snprintf(over, sizeof(over), "%s/over", dir);
    snprintf(copy, sizeof(copy), "%s/copy", dir);
    return 0;
}

static int fresh(void **state UNUSED)
{
    unlink(over);
    unlink(copy);
    make_base();
    return 0;
}

static int teardown(void **state UNUSED)
{
    char cmd[100];

    snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
    return system(cmd);
}

static int open_at(const char *overlay, bool readonly, struct block **b)
{
    return block_open(&(struct block_config){ .path = base, .overlay = overlay, .readonly = readonly }, b);
}

static struct block *opened(const char *overlay)
{
    struct block *b;

    assert_int_equal(open_at(overlay, false, &b), 0);
    return b;
}

static void refused(const char *overlay, int error, const char *word)
{
    struct block *b;

    assert_int_equal(open_at(overlay, false, &b), error);
    if (!strstr(err_last(), word))
        fail_msg("\"%s\" lacks \"%s\"", err_last(), word);
}

static int rw(struct block *b, enum block_op op, u32 sector, void *buf, u32 sectors)
{
    struct iovec iov = { buf, sectors * 512ull };

    return block_wait(b, &(struct block_req){ .op = op, .offset = sector * 512ull, .iov = &iov, .iovs = 1 });
}

static int range(struct block *b, enum block_op op, u32 sector, u32 sectors)
{
    return block_wait(b, &(struct block_req){ .op = op, .offset = sector * 512ull, .len = sectors * 512ull });
}

static int put_version(struct block *b, u32 sector, u32 sectors, u32 v)
{
    static u32 buf[SECTORS][128];

    for (u32 i = 0; i < sectors; i++)
        fill(buf[i], sector + i, v);
    return rw(b, BLOCK_WRITE, sector, buf, sectors);
}

static void flush(struct block *b)
{
    assert_int_equal(block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH }), 0);
}

/* Which version a sector has: that of v[] or of older[], if that is not NULL. ~1: neither. */
static void check_all(struct block *b, const u32 *v, const u32 *older)
{
    static u32 buf[SECTORS][128], want[128];

    assert_int_equal(rw(b, BLOCK_READ, 0, buf, SECTORS), 0);
    for (u32 s = 0; s < SECTORS; s++) {
        fill(want, s, v[s]);
        if (!memcmp(buf[s], want, 512))
            continue;
        if (older)
            fill(want, s, older[s]);
        if (memcmp(buf[s], want, 512))
            fail_msg("sector %u has %08x, not version %u", s, buf[s][0], v[s]);
    }
}

/* Random operations against a model, reopened now and then; afterwards the base is as it was. */
static void test_model(void **state UNUSED)
{
    static u32 v[SECTORS];
    struct block *b = opened(over);
    unsigned seed = 1;

    memset(v, 0, sizeof(v));
    for (u32 n = 1; n < 1500; n++) {
        u32 len = (u32)rand_r(&seed) % (rand_r(&seed) % 4 ? 20 : 500) + 1, at = (u32)rand_r(&seed) % (SECTORS - len);
        int what = rand_r(&seed) % 12;

        if (what < 8) {
            assert_int_equal(put_version(b, at, len, n), 0);
            for (u32 i = 0; i < len; i++)
                v[at + i] = n;
        } else if (what < 10) {
            assert_int_equal(range(b, BLOCK_ZEROES, at, len), 0);
            for (u32 i = 0; i < len; i++)
                v[at + i] = ~0u;
        } else if (what == 10) {
            flush(b);
        } else if (n % 10 == 0) {
            check_all(b, v, NULL);
            flush(b);
            assert_true(block_close(b));
            b = opened(over);
        }
        if (n % 100 == 0)
            check_all(b, v, NULL);
    }
    flush(b);
    assert_true(block_close(b));
    b = opened(over);
    check_all(b, v, NULL);
    assert_true(block_close(b));
    memset(v, 0, sizeof(v));
    assert_int_equal(block_open(&(struct block_config){ .path = base, .readonly = true }, &b), 0);
    check_all(b, v, NULL);
    assert_true(block_close(b));
}

static void test_temporary(void **state UNUSED)
{
    static u32 v[SECTORS];
    struct block *b;

    memset(v, 0, sizeof(v));
    b = opened("");
    assert_int_equal(put_version(b, 100, 1000, 5), 0);
    assert_int_equal(range(b, BLOCK_DISCARD, 0, SECTORS), 0);
    assert_int_equal(put_version(b, 0, SECTORS, 6), 0);
    for (u32 i = 0; i < SECTORS; i++)
        v[i] = 6;
    flush(b);
    check_all(b, v, NULL);
    assert_true(block_close(b));
    memset(v, 0, sizeof(v));
    b = opened("");
    check_all(b, v, NULL);
    assert_true(block_close(b));
}

/* Space comes back: writing and discarding again and again does not make the file longer for ever. */
static void test_space(void **state UNUSED)
{
    struct block *b = opened(over);
    struct stat st;

    for (unsigned i = 1; i < 20; i++) {
        assert_int_equal(put_version(b, 0, SECTORS, i), 0);
        assert_int_equal(range(b, BLOCK_DISCARD, 0, SECTORS), 0);
        flush(b);
    }
    assert_int_equal(stat(over, &st), 0);
    assert_true((u64)st.st_blocks * 512 < SIZE);
    assert_int_equal(put_version(b, 0, SECTORS, 1), 0);
    flush(b);
    assert_int_equal(stat(over, &st), 0);
    assert_true((u64)st.st_blocks * 512 < 2 * SIZE);
    assert_true(block_close(b));
}

/* What a killed program had flushed is there; of the rest, any version from the flushed one on. */
static void test_killed(void **state UNUSED)
{
    struct shared { u32 now[SECTORS], flushed[SECTORS]; } *m;
    unsigned seed = 7;

    m = mmap(NULL, sizeof(*m), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(m != MAP_FAILED);
    for (unsigned round = 0; round < 12; round++) {
        pid_t pid = fork();
        struct block *b;

        if (!pid) {
            if (open_at(over, false, &b) < 0)
                _exit(1);
            for (u32 n = 1;; n++) {
                u32 len = (u32)rand_r(&seed) % 150 + 1, at = (u32)rand_r(&seed) % (SECTORS - len), v = round << 16 | n;

                for (u32 i = 0; i < len; i++)
                    m->now[at + i] = v;
                if (put_version(b, at, len, v))
                    _exit(1);
                if (n % 7)
                    continue;
                if (block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH }))
                    _exit(1);
                memcpy(m->flushed, m->now, sizeof(m->now));
            }
        }
        usleep(20000 + (unsigned)rand_r(&seed) % 60000);
        assert_int_equal(kill(pid, SIGKILL), 0);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        b = opened(over);
        /* A sector in two writes since the flush may have the first of them: look at the version that it says itself. */
        for (u32 s = 0; s < SECTORS; s++) {
            u32 buf[128], want[128], found;

            assert_int_equal(rw(b, BLOCK_READ, s, buf, 1), 0);
            found = (buf[0] ^ s * 2654435761u) >> 8;
            fill(want, s, found);
            assert_memory_equal(buf, want, 512);
            if (found < (m->flushed[s] & 0xffffff) || found > (m->now[s] & 0xffffff))
                fail_msg("sector %u has version %x; %x was flushed, %x is the last", s, found, m->flushed[s], m->now[s]);
            m->now[s] = m->flushed[s] = found;
        }
        assert_true(block_close(b));
        seed += round;
    }
    munmap(m, sizeof(*m));
}

static void splice_file(const char *from, const char *to, off_t at, size_t len)
{
    u8 *buf = malloc(len);
    int in = open(from, O_RDONLY), out = open(to, O_RDWR);

    assert_true(in >= 0 && out >= 0 && buf);
    assert_int_equal(pread(in, buf, len, at), len);
    assert_int_equal(pwrite(out, buf, len, at), len);
    close(in);
    close(out);
    free(buf);
}

/* A crash of the host in the middle of a flush: pages are on the disk and the header is not, or half of it. */
static void test_crash_in_flush(void **state UNUSED)
{
    static u32 v1[SECTORS], v2[SECTORS];
    struct block *b = opened(over);
    char after[80];

    memset(v1, 0, sizeof(v1));
    assert_int_equal(put_version(b, 0, 1000, 1), 0);
    flush(b);
    for (u32 i = 0; i < 1000; i++)
        v1[i] = 1;
    copy_file(over, copy);                                         /* before */
    memcpy(v2, v1, sizeof(v1));
    assert_int_equal(put_version(b, 1500, 1000, 2), 0);
    for (u32 i = 1500; i < 2500; i++)
        v2[i] = 2;
    flush(b);
    assert_true(block_close(b));
    snprintf(after, sizeof(after), "%s.after", copy);
    copy_file(over, after);
    for (unsigned torn = 0; torn < 4; torn++) {                    /* 0: no header of the flush; 1 to 3: a part of it */
        copy_file(after, over);
        for (unsigned i = 0; i < 2; i++)                           /* both copies as before, but for the first bytes of each */
            splice_file(copy, over, i * 4096 + torn * 1000, 4096 - torn * 1000);
        b = opened(over);
        check_all(b, v1, NULL);
        assert_int_equal(put_version(b, 2600, 100, 3), 0);         /* and what was left behind does not count later */
        flush(b);
        assert_true(block_close(b));
        b = opened(over);
        for (u32 i = 2600; i < 2700; i++)
            v1[i] = 3;
        check_all(b, v1, NULL);
        for (u32 i = 2600; i < 2700; i++)
            v1[i] = 0;
        assert_true(block_close(b));
    }
    copy_file(after, over);
    b = opened(over);
    check_all(b, v2, NULL);
    assert_true(block_close(b));
    unlink(after);
}

/* Pages of a flush that did not end, in a part of the map that later flushes do not touch: they never count. */
static void test_crash_leftovers(void **state UNUSED)
{
    static const u32 far = 100 * MiB / 512;                        /* in the map's second page */
    u32 buf[128], want[128];
    struct block *b;

    assert_int_equal(truncate(base, 200 * MiB), 0);
    b = opened(over);
    assert_int_equal(put_version(b, 0, 10, 1), 0);
    flush(b);
    copy_file(over, copy);
    assert_int_equal(put_version(b, far, 10, 2), 0);
    flush(b);
    assert_true(block_close(b));
    splice_file(copy, over, 0, 8192);                              /* the header did not get there */
    for (u32 v = 3; v < 6; v++) {
        b = opened(over);
        assert_int_equal(put_version(b, 0, 10, v), 0);
        flush(b);
        assert_true(block_close(b));
    }
    b = opened(over);
    assert_int_equal(rw(b, BLOCK_READ, far, buf, 1), 0);
    memset(want, 0, sizeof(want));
    assert_memory_equal(buf, want, 512);
    assert_int_equal(rw(b, BLOCK_READ, 9, buf, 1), 0);
    fill(want, 9, 5);
    assert_memory_equal(buf, want, 512);
    assert_true(block_close(b));
}

static void flip(const char *path, off_t at)
{
    int fd = open(path, O_RDWR);
    u8 c;

    assert_int_equal(pread(fd, &c, 1, at), 1);
    c ^= 0x10;
    assert_int_equal(pwrite(fd, &c, 1, at), 1);
    close(fd);
}

static void test_damage(void **state UNUSED)
{
    struct block *b = opened(over);
    int fd;

    assert_int_equal(put_version(b, 0, 1000, 1), 0);
    flush(b);
    flush(b);
    assert_int_equal(put_version(b, 1000, 1000, 1), 0);
    flush(b);
    assert_true(block_close(b));
    copy_file(over, copy);
    for (off_t at = MAP; at < MAP + 8192; at += 509) {             /* the only page of the map, both slots; the older one does not matter */
        flip(over, at);
        if (open_at(over, false, &b) == 0)
            assert_true(block_close(b));
        else
            assert_non_null(strstr(err_last(), "damaged"));
        copy_file(copy, over);
    }
    flip(over, MAP + 100);
    flip(over, MAP + 4096 + 100);
    refused(over, -EINVAL, "damaged");
    copy_file(copy, over);
    flip(over, 100);
    flip(over, 4196);
    refused(over, -EINVAL, "damaged");
    copy_file(copy, over);
    assert_int_equal(truncate(over, 100000), 0);
    refused(over, -EINVAL, "damaged");
    copy_file(copy, over);
    struct stat st;
    assert_int_equal(stat(over, &st), 0);
    assert_int_equal(truncate(over, st.st_size - 2 * CLUSTER), 0);
    refused(over, -EINVAL, "damaged");
    put_file(over, "something else", 14);
    refused(over, -EINVAL, "no overlay");
    fd = open(over, O_RDWR | O_TRUNC);                             /* an empty one is new, and one whose making was interrupted */
    assert_int_equal(ftruncate(fd, 100000), 0);
    close(fd);
    assert_int_equal(open_at(over, false, &b), 0);
    assert_true(block_close(b));
    refused(dir, -EINVAL, "directory");
    refused("/nowhere/at/all", -ENOENT, "cannot make it");
}

static void test_base_changed(void **state UNUSED)
{
    struct timespec when[2];
    struct block *b = opened(over);
    struct stat st;

    assert_int_equal(put_version(b, 0, 10, 1), 0);
    flush(b);
    assert_true(block_close(b));
    assert_int_equal(stat(base, &st), 0);
    when[0] = st.st_atim;
    when[1] = st.st_mtim;
    flip(base, SIZE / 2);
    assert_int_equal(utimensat(AT_FDCWD, base, when, 0), 0);
    if (open_at(over, false, &b) == 0)                             /* between two samples: nobody can see that */
        assert_true(block_close(b));
    flip(base, SIZE / 2);
    flip(base, 1000);
    assert_int_equal(utimensat(AT_FDCWD, base, when, 0), 0);
    refused(over, -ESTALE, "contents");
    flip(base, 1000);
    refused(over, -ESTALE, "time");
    assert_int_equal(utimensat(AT_FDCWD, base, when, 0), 0);
    b = opened(over);
    assert_true(block_close(b));
    assert_int_equal(truncate(base, SIZE + 512), 0);
    refused(over, -ESTALE, "size");
}

static void test_locks(void **state UNUSED)
{
    struct block *b = opened(over), *other;

    assert_int_equal(open_at(over, false, &other), -EBUSY);
    assert_int_equal(open_at(over, true, &other), -EBUSY);
    assert_int_equal(block_open(&(struct block_config){ .path = base }, &other), -EBUSY); /* nobody writes to the base meanwhile */
    assert_int_equal(open_at(copy, false, &other), 0);             /* but many overlays may share it */
    assert_true(block_close(other));
    assert_int_equal(put_version(b, 0, 10, 1), 0);
    flush(b);
    assert_true(block_close(b));
    assert_int_equal(open_at(over, true, &b), 0);
    assert_int_equal(open_at(over, true, &other), 0);
    assert_int_equal(put_version(b, 0, 10, 1), -EROFS);
    assert_true(block_close(b));
    assert_true(block_close(other));
}

static void test_grow(void **state UNUSED)
{
    static u32 v[SECTORS];
    struct block *b = opened(over);
    u8 buf[512];

    memset(v, 0, sizeof(v));
    assert_int_equal(block_grow(b, 10 * MiB), 0);
    assert_int_equal(rw(b, BLOCK_READ, 10 * MiB / 512 - 1, buf, 1), 0);
    for (unsigned i = 0; i < 512; i++)
        assert_int_equal(buf[i], 0);
    memset(buf, 0x77, sizeof(buf));
    assert_int_equal(rw(b, BLOCK_WRITE, SECTORS, buf, 1), 0);      /* in the base's last cluster, behind its end */
    flush(b);
    assert_int_equal(block_grow(b, 1024 * GiB), -EFBIG);
    assert_true(block_close(b));
    b = opened(over);
    assert_int_equal(block_size(b), 10 * MiB);
    check_all(b, v, NULL);
    assert_int_equal(rw(b, BLOCK_READ, SECTORS, buf, 1), 0);
    assert_int_equal(buf[511], 0x77);
    assert_true(block_close(b));
}

/* Many at once, in the same clusters. */
struct job {
    struct block_req req;
    struct iovec iov;
    u32 buf[4][128];
};

static atomic_uint pending;

static void job_done(struct block_req *r)
{
    bug_on(r->result < 0);
    pending--;
}

static void test_parallel(void **state UNUSED)
{
    enum { JOBS = 700 };
    static struct job job[JOBS];
    static u32 v[SECTORS];
    struct block *b = opened(over);

    memset(v, 0, sizeof(v));
    for (unsigned round = 1; round < 4; round++) {
        pending = JOBS;
        for (u32 i = 0; i < JOBS; i++) {
            for (u32 k = 0; k < 4; k++) {
                fill(job[i].buf[k], i * 4 + k, round);
                v[i * 4 + k] = round;
            }
            job[i].iov = (struct iovec){ job[i].buf, sizeof(job[i].buf) };
            job[i].req = (struct block_req){ .op = BLOCK_WRITE, .offset = i * 2048, .iov = &job[i].iov, .iovs = 1, .done = job_done };
            if (block_submit(b, &job[i].req))
                job_done(&job[i].req);
            if (i % 100 == 50)
                flush(b);
        }
        while (pending)
            usleep(1000);
        check_all(b, v, NULL);
        assert_int_equal(range(b, BLOCK_ZEROES, 0, 1000), 0);
    }
    assert_true(block_close(b));
}

/*
 * No room: what a write could not do it does when there is room. But when fdatasync(2) says so, pages were dropped from the host's memory, and no later flush may
 * say that they are there; nor is there anything to wait for.
 */
static void nobody(void *arg UNUSED)
{
}

static void test_full(void **state UNUSED)
{
    static const int no_room[] = { ENOSPC, EDQUOT };
    static u32 v[SECTORS];
    struct block *b = opened(over);

    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(put_version(b, i * 1000, 200, i + 1), 0);
        atomic_store(&write_error, no_room[i]);
        assert_int_equal(block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH }), -no_room[i]);
        flush(b);
    }
    block_hold_full(b, nobody, NULL);                              /* who cannot wait for room says so */
    assert_int_equal(put_version(b, 2000, 200, 3), 0);
    atomic_store(&write_error, ENOSPC);
    assert_int_equal(block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH, .never_held = true }), -ENOSPC);
    assert_int_equal(block_held(b), 0);
    flush(b);
    assert_true(block_close(b));
    for (u32 i = 0; i < SECTORS; i++)
        v[i] = i >= 2000 && i < 2200 ? 3 : i % 1000 < 200 && i < 2000 ? i / 1000 + 1 : 0;
    b = opened(over);
    check_all(b, v, NULL);
    assert_true(block_close(b));
    for (unsigned i = 0; i < 2; i++) {
        b = opened(over);
        assert_int_equal(put_version(b, 500, 100, i + 3), 0);
        atomic_store(&sync_error, no_room[i]);
        assert_int_equal(block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH }), -EIO);
        assert_int_equal(block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH }), -EIO);
        assert_true(block_close(b));
    }
    b = opened(over);
    check_all(b, v, NULL);
    assert_true(block_close(b));
}

/* Growing while a flush writes the header: what is on the disk then is whole. */
static struct block *growing;
static pthread_t grower;

static void *grow(void *arg UNUSED)
{
    return (void *)(intptr_t)block_grow(growing, 10 * MiB);
}

/* A crash before the grower's own header, which is the next one. */
static void copy_now(void)
{
    copy_file(over, copy);
}

static void grow_now(void)
{
    atomic_store(&at_header, copy_now);
    assert_int_equal(pthread_create(&grower, NULL, grow, NULL), 0);
    usleep(200000);                                                /* for it to do what it does without waiting for the flush */
}

static void test_grow_in_flush(void **state UNUSED)
{
    static u32 v[SECTORS];
    struct block *b = growing = opened(over);
    void *result;

    assert_int_equal(put_version(b, 0, SECTORS, 1), 0);
    for (u32 i = 0; i < SECTORS; i++)
        v[i] = 1;
    atomic_store(&at_header, grow_now);
    assert_int_equal(block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH }), 0);
    assert_int_equal(pthread_join(grower, &result), 0);
    assert_null(result);
    assert_null(atomic_load(&at_header));
    assert_true(block_close(b));
    b = opened(over);
    assert_int_equal(block_size(b), 10 * MiB);
    assert_true(block_close(b));
    copy_file(copy, over);
    b = opened(over);
    check_all(b, v, NULL);
    assert_true(block_close(b));
}

/* A new file's name is on the disk before anything is flushed to it. */
static void test_name(void **state UNUSED)
{
    folders_synced = 0;
    assert_true(block_close(opened(over)));
    assert_int_equal(folders_synced, 1);
    assert_true(block_close(opened(over)));
    assert_int_equal(folders_synced, 1);
}

/* A file that is no overlay, and begins as some disks do: with nothing. It is left as it was. */
static void test_not_blank(void **state UNUSED)
{
    static u8 disk[256 * KiB], was[sizeof(disk)];
    int fd;

    memset(disk + 128 * KiB, 0x42, 128 * KiB);
    put_file(over, disk, sizeof(disk));
    refused(over, -EINVAL, "is no overlay of doppel");
    fd = open(over, O_RDONLY);
    assert_int_equal(read(fd, was, sizeof(was)), sizeof(was));
    close(fd);
    assert_memory_equal(disk, was, sizeof(was));
}

#define T(name) cmocka_unit_test_setup(name, fresh)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_model), T(test_temporary), T(test_space), T(test_killed), T(test_crash_in_flush), T(test_crash_leftovers), T(test_damage), T(test_base_changed), T(test_locks),
        T(test_grow), T(test_parallel), T(test_full), T(test_grow_in_flush), T(test_not_blank), T(test_name),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
