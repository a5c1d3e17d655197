/*
 * Access past the page cache (back/block_direct.c) with blocks of 4 KiB, whatever this host's are: several threads, each with sectors of its own that lie in
 * the same blocks as the others', write, zero, discard and read through a "kernel" that takes whole blocks only. Nobody's sectors are lost.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cmocka.h>

#include "back/block_host.h"

#define ALIGN 4096u
#define THREADS 4u
#define SECTORS 512u                                               /* all of the disk's */
#define ROUNDS 3000u

static struct block_direct direct;
static int fd;
static _Atomic unsigned whole, misfits;

static int all(ssize_t n, size_t len)
{
    return n == (ssize_t)len ? 0 : -EIO;
}

/* What the kernel would do; what does not fit is the mistake that is looked for. */
static int plain(struct block *b UNUSED, struct block_req *r)
{
    static const u8 zero[SECTORS * BLOCK_SECTOR];
    u64 len = block_req_len(r);

    whole++;
    misfits += !block_direct_fits(&direct, r);
    misfits += r->op != BLOCK_FLUSH && ((r->offset | len) & (ALIGN - 1));
    switch (r->op) {
    case BLOCK_READ: return all(preadv(fd, r->iov, (int)r->iovs, (off_t)r->offset), len);
    case BLOCK_WRITE: return all(pwritev(fd, r->iov, (int)r->iovs, (off_t)r->offset), len);
    case BLOCK_ZEROES:
    case BLOCK_DISCARD: return all(pwrite(fd, zero, len, (off_t)r->offset), len);
    default: return 0;
    }
}

/* As block_file.c: what fits and finds the gate open is done at once, the rest by a worker. */
static int submit(struct block_req *r)
{
    int e;

    if (r->op == BLOCK_READ || !block_direct_fits(&direct, r) || !block_direct_enter(&direct))
        return block_direct_serve(&direct, fd, r, NULL, plain);
    e = plain(NULL, r);
    block_direct_leave(&direct);
    return e;
}

struct lane {
    pthread_t thread;
    unsigned n, seed, bad;
    u32 version[SECTORS];
};

static void fill(u32 *sector, unsigned s, u32 version)
{
    for (unsigned i = 0; i < BLOCK_SECTOR / 4; i++)
        sector[i] = version ? s << 20 ^ version << 8 ^ i : 0;
}

/* Sectors whose number modulo THREADS is ours; lane 0 has the last quarter of the disk for itself, too, in one piece. */
static void *drive(void *arg)
{
    static const enum block_op ops[] = { BLOCK_WRITE, BLOCK_WRITE, BLOCK_READ, BLOCK_ZEROES, BLOCK_FLUSH };
    struct lane *l = arg;
    u32 *buf = aligned_alloc(ALIGN, 17 * ALIGN), want[BLOCK_SECTOR / 4];

    for (u32 v = 1; v <= ROUNDS; v++) {
        enum block_op op = ops[(unsigned)rand_r(&l->seed) % ARRAY_SIZE(ops)];
        bool big = l->n == 0 && rand_r(&l->seed) % 2;
        unsigned at = big ? SECTORS * 3 / 4 + (unsigned)rand_r(&l->seed) % 64 : (unsigned)rand_r(&l->seed) % (SECTORS * 3 / 4 / THREADS) * THREADS + l->n;
        unsigned count = big ? (unsigned)rand_r(&l->seed) % 64 + 1 : 1;
        u8 *data = (u8 *)buf + (rand_r(&l->seed) % 2 ? 0 : 512);
        struct iovec iov = { data, count * BLOCK_SECTOR };
        struct block_req r = { .op = op, .offset = (u64)at * BLOCK_SECTOR, .len = (u64)count * BLOCK_SECTOR, .iov = &iov, .iovs = 1 };

        for (unsigned i = 0; op == BLOCK_WRITE && i < count; i++) {
            l->version[at + i] = v;
            fill((u32 *)(void *)(data + i * BLOCK_SECTOR), at + i, v);
        }
        for (unsigned i = 0; op == BLOCK_ZEROES && i < count; i++)
            l->version[at + i] = 0;
        l->bad += submit(&r) != 0;
        for (unsigned i = 0; op == BLOCK_READ && i < count; i++) {
            fill(want, at + i, l->version[at + i]);
            l->bad += memcmp(want, data + i * BLOCK_SECTOR, BLOCK_SECTOR) != 0;
        }
    }
    free(buf);
    return NULL;
}

static void test_shared_blocks(void **state UNUSED)
{
    struct lane *lane = calloc(THREADS, sizeof(*lane));
    u32 want[BLOCK_SECTOR / 4], got[BLOCK_SECTOR / 4];

    for (unsigned i = 0; i < THREADS; i++) {
        lane[i].n = i;
        lane[i].seed = i + 1;
        assert_int_equal(pthread_create(&lane[i].thread, NULL, drive, &lane[i]), 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(lane[i].thread, NULL);
        assert_int_equal(lane[i].bad, 0);
    }
    for (unsigned s = 0; s < SECTORS; s++) {
        fill(want, s, lane[s < SECTORS * 3 / 4 ? s % THREADS : 0].version[s]);
        assert_int_equal(pread(fd, got, sizeof(got), s * BLOCK_SECTOR), sizeof(got));
        assert_memory_equal(got, want, sizeof(got));
    }
    assert_int_equal(misfits, 0);
    assert_true(whole > 0);
    free(lane);
}

/* A discard is a hint for whole blocks; what lies around them stays. */
static void test_discard(void **state UNUSED)
{
    static u8 data[8 * ALIGN], got[8 * ALIGN];
    static const struct { u32 at, len, from, to; } cases[] = {
        { 0, 8 * ALIGN, 0, 8 * ALIGN }, { 512, 2 * ALIGN, ALIGN, 2 * ALIGN }, { 512, ALIGN, 0, 0 }, { ALIGN - 512, 1024, 0, 0 }, { ALIGN, ALIGN + 512, ALIGN, 2 * ALIGN },
    };

    memset(data, 0x77, sizeof(data));
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        struct block_req r = { .op = BLOCK_DISCARD, .offset = cases[i].at, .len = cases[i].len };

        assert_int_equal(pwrite(fd, data, sizeof(data), 0), sizeof(data));
        assert_int_equal(submit(&r), 0);
        assert_int_equal(pread(fd, got, sizeof(got), 0), sizeof(got));
        for (unsigned k = 0; k < sizeof(got); k++)
            assert_int_equal(got[k], k >= cases[i].from && k < cases[i].to ? 0 : 0x77);
    }
}

/* The file has been cut short under us: an error, for reads and for writes that need what is not there. */
static void test_cut_short(void **state UNUSED)
{
    u8 buf[1024];
    struct iovec iov = { buf, sizeof(buf) };
    struct block_req r = { .op = BLOCK_READ, .offset = SECTORS * BLOCK_SECTOR - 1024, .iov = &iov, .iovs = 1 };

    assert_int_equal(ftruncate(fd, ALIGN), 0);
    assert_int_equal(submit(&r), -EIO);
    iov = (struct iovec){ buf, sizeof(buf) };
    r = (struct block_req){ .op = BLOCK_WRITE, .offset = SECTORS * BLOCK_SECTOR - 1024, .iov = &iov, .iovs = 1 };
    assert_int_equal(submit(&r), -EIO);
    assert_int_equal(ftruncate(fd, SECTORS * BLOCK_SECTOR), 0);
}

static int open_file(void **state UNUSED)
{
    char name[] = "/tmp/doppel-direct-XXXXXX";

    fd = mkstemp(name);
    if (fd < 0 || unlink(name) < 0 || ftruncate(fd, SECTORS * BLOCK_SECTOR) < 0 || block_direct_init(&direct, fd, "test") < 0)
        return -1;
    direct.align = direct.mem_align = ALIGN;
    return 0;
}

static int close_file(void **state UNUSED)
{
    block_direct_destroy(&direct);
    return close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_shared_blocks), cmocka_unit_test(test_discard), cmocka_unit_test(test_cut_short) };

    return cmocka_run_group_tests(tests, open_file, close_file);
}
