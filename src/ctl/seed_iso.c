/*
 * A file system for the seed disk: ISO 9660 (ECMA-119), one folder, with names by Rock Ridge (SUSP 1.12: SP; RRIP: PX, NM).
 * Left out: other folders, dates, names for Joliet.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "ctl/seed.h"

#define SECTOR 2048u
#define FIRST_FREE 21u                                             /* 16: volume; 17: end; 18, 19: path tables; 20: the folder */
#define PATH_TABLE_LEN 10u
#define DIRECTORY 20u

static void put16(u8 *p, u32 v)
{
    p[0] = (u8)v;
    p[1] = (u8)(v >> 8);
}

static void put16_both(u8 *p, u32 v)
{
    put16(p, v);
    p[2] = (u8)(v >> 8);
    p[3] = (u8)v;
}

static void put32_le(u8 *p, u32 v)
{
    put16(p, v);
    put16(p + 2, v >> 16);
}

static void put32_be(u8 *p, u32 v)
{
    for (unsigned i = 0; i < 4; i++)
        p[i] = (u8)(v >> (24 - 8 * i));
}

static void put32_both(u8 *p, u32 v)
{
    put32_le(p, v);
    put32_be(p + 4, v);
}

static void put_text(u8 *p, size_t size, const char *text)
{
    memset(p, ' ', size);
    memcpy(p, text, MIN(strlen(text), size));
}

/* PX: mode, links, user, group. */
static size_t put_mode(u8 *p, u32 mode, u32 links)
{
    memcpy(p, "PX\x24\1", 4);
    put32_both(p + 4, mode);
    put32_both(p + 12, links);
    put32_both(p + 20, 0);
    put32_both(p + 28, 0);
    return 36;
}

/* A record of the folder (ECMA-119, 9.1); name NULL: no NM. Returns its length. */
static size_t put_record(u8 *p, const char *id, size_t id_len, u32 sector, u32 len, bool folder, bool first, const char *name)
{
    size_t at = 33 + id_len + !(id_len & 1);
    put32_both(p + 2, sector);
    put32_both(p + 10, len);
    p[25] = folder ? 2 : 0;
    put16_both(p + 28, 1);
    p[32] = (u8)id_len;
    memcpy(p + 33, id, id_len);
    if (first) {
        memcpy(p + at, "SP\7\1\xbe\xef\0", 7);
        at += 7;
    }
    at += put_mode(p + at, folder ? 040555 : 0100444, folder ? 2 : 1);
    if (name) {
        memcpy(p + at, "NM", 2);
        p[at + 2] = (u8)(5 + strlen(name));
        p[at + 3] = 1;
        p[at + 4] = 0;
        memcpy(p + at + 5, name, strlen(name));
        at += 5 + strlen(name);
    }
    at += at & 1;
    p[0] = (u8)at;
    return at;
}

static void put_volume(u8 *p, u32 sectors)
{
    memcpy(p, "\1CD001\1", 7);
    put_text(p + 8, 32, "LINUX");
    put_text(p + 40, 32, "CIDATA");
    put32_both(p + 80, sectors);
    put16_both(p + 120, 1);
    put16_both(p + 124, 1);
    put16_both(p + 128, SECTOR);
    put32_both(p + 132, PATH_TABLE_LEN);
    put32_le(p + 140, 18);
    put32_be(p + 148, 19);
    put_record(p + 156, "", 1, DIRECTORY, SECTOR, true, false, NULL);
    p[156] = 34;                                                   /* without what is behind its name */
    memset(p + 190, ' ', 813 - 190);
    for (unsigned i = 0; i < 4; i++)
        memcpy(p + 813 + 17 * i, "0000000000000000", 17);
    p[881] = 1;
}

static int put_at(int fd, const void *buf, size_t len, u64 offset)
{
    while (len) {
        ssize_t n = pwrite(fd, buf, len, (off_t)offset);
        if (n <= 0 && errno != EINTR)
            return -errno;
        if (n > 0) {
            buf = (const u8 *)buf + n;
            len -= (size_t)n;
            offset += (u64)n;
        }
    }
    return 0;
}

int seed_iso_write(int fd, const struct seed_file *file, unsigned files)
{
    u8 head[(FIRST_FREE - 16) * SECTOR] = {0}, *folder = head + 4 * SECTOR;
    u32 sector = FIRST_FREE;
    size_t at = put_record(folder, "", 1, DIRECTORY, SECTOR, true, true, NULL);
    int r = 0;
    bug_on(files > SEED_FILES_MAX);                                /* whose records fill less than a sector */
    at += put_record(folder + at, "\1", 1, DIRECTORY, SECTOR, true, false, NULL);
    for (unsigned i = 0; i < files && r == 0; i++) {
        at += put_record(folder + at, file[i].iso_name, strlen(file[i].iso_name), sector, (u32)file[i].len, false, false, file[i].name);
        r = put_at(fd, file[i].data, file[i].len, (u64)sector * SECTOR);
        sector += (u32)((file[i].len + SECTOR - 1) / SECTOR);
    }
    put_volume(head, sector);
    memcpy(head + SECTOR, "\377CD001\1", 7);
    memcpy(head + 2 * SECTOR, "\1\0\x14\0\0\0\1\0\0\0", PATH_TABLE_LEN);
    memcpy(head + 3 * SECTOR, "\1\0\0\0\0\x14\0\1\0\0", PATH_TABLE_LEN);
    if (r == 0)
        r = put_at(fd, head, sizeof(head), 16 * SECTOR);
    return r < 0 || ftruncate(fd, (off_t)(u64)sector * SECTOR) == 0 ? r : -errno;
}
