/*
 * Fuzzing of overlay files: a good one is changed by the input, and opened; what opens is read and written. Checksums are made right again if the input
 * says so, else nothing behind them would ever be reached.
 *
 *   byte 0: bit 0 header's checksums, bit 1 the map's, bit 2 the sum over the map, bit 3 cut the file; then changes of 4 bytes: place (2, in words), value (2)
 */
#define _GNU_SOURCE
#include "back/block.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define SIZE (300 * KiB)
#define META (4 * 4096u)                                           /* headers, and the first page of the map */
#define COPY (256 * KiB)

static char base[] = "/tmp/doppel-fuzz-base-XXXXXX", over[] = "/tmp/doppel-fuzz-over-XXXXXX";
static u8 *good, *bad;
static size_t good_len;

static u32 crc32c(const u8 *p, size_t len)
{
    u32 crc = ~0u;

    for (; len; p++, len--) {
        crc ^= *p;
        for (unsigned i = 0; i < 8; i++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
    }
    return ~crc;
}

static void seal(u8 *page)
{
    u32 crc = crc32c(page, 4092);

    memcpy(page + 4092, &crc, 4);
}

/* As block_overlay.c has it, for page 0. */
static void seal_sum(void)
{
    u64 best = 0, sum = 0, generation;
    u32 crc;

    for (unsigned i = 0; i < 2; i++) {
        memcpy(&generation, bad + 8192 + i * 4096 + 8, 8);
        memcpy(&crc, bad + 8192 + i * 4096 + 4092, 4);
        if (generation > best) {
            best = generation;
            sum = 0x9e3779b97f4a7c15ull ^ generation * 0xbf58476d1ce4e5b9ull ^ crc;
            sum ^= sum >> 29;
        }
    }
    for (unsigned i = 0; i < 2; i++)
        memcpy(bad + i * 4096 + 64, &sum, 8);
}

static int rw(struct block *b, enum block_op op, u64 at, void *buf, size_t len)
{
    struct iovec iov = { buf, len };

    return block_wait(b, &(struct block_req){ .op = op, .offset = at, .iov = &iov, .iovs = 1, .len = len });
}

static void make_good(void)
{
    static u8 buf[200 * KiB];
    struct block *b;
    int fd = mkstemp(base), out = mkstemp(over);

    bug_on(fd < 0 || out < 0 || ftruncate(fd, SIZE) < 0);
    close(fd);
    bug_on(block_open(&(struct block_config){ .path = base, .overlay = over }, &b) < 0);
    memset(buf, 7, sizeof(buf));
    bug_on(rw(b, BLOCK_WRITE, 512, buf, sizeof(buf)) < 0 || block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH }) < 0);
    bug_on(rw(b, BLOCK_ZEROES, 64 * KiB, buf, 64 * KiB) < 0 || block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH }) < 0);
    bug_on(!block_close(b));
    good_len = (size_t)lseek(out, 0, SEEK_END);
    good = malloc(META);
    bad = malloc(META);
    bug_on(!good || !bad || pread(out, good, META, 0) != META);
    close(out);
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    static u8 buf[SIZE];
    struct block *b;
    int fd;

    if (len < 1)
        return 0;
    if (!good)
        make_good();
    memcpy(bad, good, META);
    for (size_t i = 1; i + 4 <= len; i += 4) {
        unsigned at = (data[i] | data[i + 1] << 8) * 2u % META;

        memcpy(bad + at, data + i + 2, 2);
    }
    for (unsigned i = 2; (data[0] & 2) && i < 4; i++)
        seal(bad + i * 4096);
    if (data[0] & 4)
        seal_sum();
    for (unsigned i = 0; (data[0] & 1) && i < 2; i++)
        seal(bad + i * 4096);
    fd = open(over, O_RDWR);
    bug_on(fd < 0 || pwrite(fd, bad, META, 0) != META || ftruncate(fd, (off_t)(data[0] & 8 ? good_len / 2 : good_len)) < 0);
    close(fd);
    if (block_open(&(struct block_config){ .path = base, .overlay = over }, &b) == 0) {
        u64 size = MIN(block_size(b), sizeof(buf));

        rw(b, BLOCK_READ, 0, buf, size);
        rw(b, BLOCK_WRITE, 1024, buf, MIN(size, 100 * KiB) / 1024 * 512);
        rw(b, BLOCK_DISCARD, 0, NULL, 0);
        block_wait(b, &(struct block_req){ .op = BLOCK_DISCARD, .len = size });
        block_wait(b, &(struct block_req){ .op = BLOCK_FLUSH });
        bug_on(!block_close(b));
    }
    return 0;
}
