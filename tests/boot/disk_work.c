/*
 * Work for a disk, done in the guest (and, for what needs no guest, on the host):
 *
 *   disk_work verify DEV SECONDS   random writes, reads, zeroes and discards by four threads, compared with a model; then all of it read once more
 *   disk_work journal DEV          records one after another, for ever; prints "flushed N" when what there is up to record N is flushed
 *   disk_work check DEV N          is everything there that a journal had flushed when it said "flushed N"?
 *   disk_work bench DEV MS [ROW]   rows of so many milliseconds each, or one: "disk: NAME VALUE", operations or MiB a second; for bench/disk
 *   disk_work direct DEV MS [ROW]  the same past the page cache: a file is not measured there
 *   disk_work fill DEV             writes and flushes the whole disk; prints what the host thinks of it
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define SECTOR 512u
#define THREADS 4
#define REGION (4u << 20)                                          /* of one thread */
#define SECTORS (REGION / SECTOR)
#define LONGEST 256u                                               /* sectors in one operation */
#define RECORD 4096u
#define RECORDS 1021u
#define ZERO UINT32_MAX
#define UNKNOWN (UINT32_MAX - 1)

static int fd;
static double until;
static uint64_t operations[THREADS];

static void die(const char *what)
{
    printf("%s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void *buffer(size_t len)
{
    void *p = aligned_alloc(4096, len);

    if (!p)
        die("memory");
    return p;
}

/* --- verify --- */

struct region {
    unsigned n, seed;
    uint32_t version[SECTORS];
    uint32_t (*buf)[SECTOR / 4];
};

static void fill(const struct region *r, uint32_t *sector, unsigned s, uint32_t version)
{
    for (unsigned i = 0; i < SECTOR / 4; i++)
        sector[i] = version == ZERO ? 0 : (s + r->n * SECTORS) * 2654435761u ^ version * 40503u ^ i;
}

static off_t place(const struct region *r, unsigned s)
{
    return ((off_t)r->n * SECTORS + s) * SECTOR;
}

static void compare(struct region *r, unsigned at, unsigned len)
{
    uint32_t want[SECTOR / 4];

    if (pread(fd, r->buf, len * SECTOR, place(r, at)) != (ssize_t)(len * SECTOR))
        die("reading");
    for (unsigned i = 0; i < len; i++) {
        if (r->version[at + i] == UNKNOWN)
            continue;
        fill(r, want, at + i, r->version[at + i]);
        if (!memcmp(want, r->buf[i], SECTOR))
            continue;
        printf("sector %u is not as it was written (version %u, first word %08x)\n", r->n * SECTORS + at + i, r->version[at + i], r->buf[i][0]);
        exit(1);
    }
}

static void set(struct region *r, unsigned at, unsigned len, uint32_t version)
{
    for (unsigned i = 0; i < len; i++)
        r->version[at + i] = version;
}

static void *work(void *arg)
{
    struct region *r = arg;

    set(r, 0, SECTORS, UNKNOWN);
    for (uint32_t v = 1; now() < until; v++) {
        unsigned longest = rand_r(&r->seed) % 3 ? 16 : LONGEST, len = (unsigned)rand_r(&r->seed) % longest + 1, at = (unsigned)rand_r(&r->seed) % (SECTORS - len);
        uint64_t range[2] = { (uint64_t)place(r, at), len * SECTOR };
        int what = rand_r(&r->seed) % 20;

        if (what < 10) {
            for (unsigned i = 0; i < len; i++)
                fill(r, r->buf[i], at + i, v);
            if (pwrite(fd, r->buf, len * SECTOR, place(r, at)) != (ssize_t)(len * SECTOR))
                die("writing");
            set(r, at, len, v);
        } else if (what < 17) {
            compare(r, at, len);
        } else if (what == 17) {
            if (ioctl(fd, BLKZEROOUT, range) < 0)
                die("writing zeroes");
            set(r, at, len, ZERO);
        } else if (what == 18) {
            if (ioctl(fd, BLKDISCARD, range) < 0 && errno != EOPNOTSUPP)
                die("discarding");
            set(r, at, len, UNKNOWN);
        } else if (v % 8 == 0 && fdatasync(fd) < 0) {
            die("flushing");
        }
        operations[r->n]++;
    }
    for (unsigned at = 0; at < SECTORS; at += LONGEST)
        compare(r, at, LONGEST);
    return NULL;
}

static int verify(const char *seconds)
{
    pthread_t thread[THREADS];
    uint64_t sum = 0;

    until = now() + atof(seconds);
    for (unsigned i = 0; i < THREADS; i++) {
        struct region *r = calloc(1, sizeof(*r));

        if (!r)
            die("memory");
        *r = (struct region){ .n = i, .seed = i + 1, .buf = buffer(LONGEST * SECTOR) };
        if (pthread_create(&thread[i], NULL, work, r))
            die("thread");
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(thread[i], NULL);
        sum += operations[i];
    }
    printf("verified%s\n", sum > 20 ? "" : " next to nothing");
    return 0;
}

/* --- journal --- */

struct record {
    uint64_t number, sum;
    uint64_t word[RECORD / 8 - 2];
};

static uint64_t checksum(const struct record *r)
{
    uint64_t sum = r->number * 0x9e3779b97f4a7c15u + 1;

    for (unsigned i = 0; i < RECORD / 8 - 2; i++)
        sum = (sum ^ r->word[i]) * 0x100000001b3u;
    return sum;
}

static void journal(void)
{
    struct record *r = buffer(RECORD);

    for (uint64_t n = 1;; n++) {
        r->number = n;
        for (unsigned i = 0; i < RECORD / 8 - 2; i++)
            r->word[i] = n * 31 + i;
        r->sum = checksum(r);
        if (pwrite(fd, r, RECORD, (off_t)(n % RECORDS * RECORD)) != RECORD)
            die("writing");
        if (n % 10)
            continue;
        if (fdatasync(fd) < 0)
            die("flushing");
        printf("flushed %llu\n", (unsigned long long)n);
        fflush(stdout);
    }
}

static int check(const char *last)
{
    uint64_t flushed = strtoull(last, NULL, 10);
    struct record *r = buffer(RECORD);

    for (uint64_t n = flushed > RECORDS ? flushed - RECORDS + 1 : 1; n <= flushed; n++) {
        if (pread(fd, r, RECORD, (off_t)(n % RECORDS * RECORD)) != RECORD)
            die("reading");
        if (r->sum != checksum(r) || r->number < n || r->number % RECORDS != n % RECORDS) {
            printf("record %llu is lost: %llu is there, %s\n", (unsigned long long)n, (unsigned long long)r->number, r->sum == checksum(r) ? "whole" : "damaged");
            return 1;
        }
    }
    printf("all there\n");
    return 0;
}

/* --- bench --- */

static const struct row {
    const char *name;
    size_t len;
    unsigned depth;
    char write, random, flush;
} rows[] = {
    { "read-4k-1", 4096, 1, 0, 1, 0 }, { "read-4k-32", 4096, 32, 0, 1, 0 }, { "write-4k-1", 4096, 1, 1, 1, 0 }, { "write-4k-32", 4096, 32, 1, 1, 0 },
    { "read-1m-seq", 1 << 20, 1, 0, 0, 0 }, { "read-1m-random", 1 << 20, 1, 0, 1, 0 }, { "write-1m-seq", 1 << 20, 1, 1, 0, 0 }, { "fsync-4k", 4096, 1, 1, 1, 1 },
};

struct lane {
    pthread_t thread;
    const struct row *row;
    unsigned seed;
    off_t size;
    uint64_t done;
};

static void *drive(void *arg)
{
    struct lane *l = arg;
    const struct row *w = l->row;
    uint64_t slots = (uint64_t)l->size / w->len, at = l->seed * slots / 32;
    char *buf = buffer(w->len);

    memset(buf, 0x33, w->len);
    while (now() < until) {
        off_t off = (off_t)(at % slots * w->len);
        ssize_t n = w->write ? pwrite(fd, buf, w->len, off) : pread(fd, buf, w->len, off);

        if (n != (ssize_t)w->len || (w->flush && fdatasync(fd) < 0))
            die(w->name);
        at = w->random ? (uint64_t)rand_r(&l->seed) * 2654435761u >> 7 : at + 1;
        l->done++;
    }
    free(buf);
    return NULL;
}

static int bench(const char *ms, const char *only)
{
    off_t size = lseek(fd, 0, SEEK_END);

    for (const struct row *w = rows; w < rows + sizeof(rows) / sizeof(*rows); w++) {
        struct lane lane[32];
        uint64_t sum = 0;
        double from = now(), s;

        if (only && strcmp(only, w->name))
            continue;
        until = from + atof(ms) / 1000;
        for (unsigned i = 0; i < w->depth; i++) {
            lane[i] = (struct lane){ .row = w, .seed = i + 1, .size = size };
            if (pthread_create(&lane[i].thread, NULL, drive, &lane[i]))
                die("thread");
        }
        for (unsigned i = 0; i < w->depth; i++) {
            pthread_join(lane[i].thread, NULL);
            sum += lane[i].done;
        }
        s = now() - from;
        printf("disk: %s %.1f\n", w->name, (double)sum * (w->len > 4096 ? (double)w->len / (1 << 20) : 1) / s);
        fflush(stdout);
    }
    return 0;
}

static int fill_disk(void)
{
    off_t size = lseek(fd, 0, SEEK_END);
    size_t len = 65536;
    char *buf = buffer(len);

    memset(buf, 0x5a, len);
    for (off_t at = 0; at < size; at += (off_t)len)
        if (pwrite(fd, buf, len, at) != (ssize_t)len) {
            printf("writing: %s\n", strerror(errno));
            return 1;
        }
    if (fdatasync(fd) < 0)
        die("flushing");
    printf("filled\n");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 64;
    /* bench: a file on the host is measured in the page cache, which is where a guest's disk is, too. */
    fd = open(argv[2], (strcmp(argv[1], "check") ? O_RDWR : O_RDONLY) | (strcmp(argv[1], "bench") || !strncmp(argv[2], "/dev/", 5) ? O_DIRECT : 0));
    if (fd < 0)
        die(argv[2]);
    if (!strcmp(argv[1], "verify") && argc == 4)
        return verify(argv[3]);
    if (!strcmp(argv[1], "journal"))
        journal();
    if ((!strcmp(argv[1], "bench") || !strcmp(argv[1], "direct")) && (argc == 4 || argc == 5))
        return bench(argv[3], argv[4]);
    if (!strcmp(argv[1], "check") && argc == 4)
        return check(argv[3]);
    return strcmp(argv[1], "fill") ? 64 : fill_disk();
}
