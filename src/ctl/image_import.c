/*
 * Images from files: a disk with a boot sector boots by firmware, and a bare file system by the default guest's kernel, whose initrd lends it modules
 * (guest/root.c). Holes stay holes.
 *
 * What a file is is read from its first bytes: the partition table of a PC (0x55 0xaa at 510), ext2 to ext4 (the superblock at 1024), XFS ("XFSB"). The file
 * is not trusted: nothing in it reaches a length or a loop but as what is compared.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/err.h"
#include "ctl/guest.h"
#include "ctl/image.h"
#include "ctl/instance.h"
#include "ctl/progress.h"

#define HEAD 4096
#define PIECE (1u << 20)
#define COPY_MAX (64u << 20)                                       /* between two looks at the progress */

struct import {
    const char *file;
    int in, out;
    s64 size;
    u8 head[HEAD];
    bool firmware;
    struct progress progress;
};

static u64 le(const u8 *p, unsigned bytes)
{
    u64 v = 0;
    while (bytes--)
        v = v << 8 | p[bytes];
    return v;
}

static u64 be(const u8 *p, unsigned bytes)
{
    u64 v = 0;
    for (unsigned i = 0; i < bytes; i++)
        v = v << 8 | p[i];
    return v;
}

static bool begins(const struct import *m, const char *magic, size_t len)
{
    return !memcmp(m->head, magic, len);
}

static const char raw_remedy[] = "make a raw disk of it: qemu-img convert -O raw";

/* Formats of other monitors' disks, and of overlays. */
static const struct image_format disk_format[] = {
    {"QFI\xfb", 4, "a qcow2 image", raw_remedy},
    {"KDMV", 4, "a VMDK image", raw_remedy},
    {"vhdxfile", 8, "a VHDX image", raw_remedy},
    {"doppelOV", 8, "an overlay of doppel's", "its disk is --disk BASE,overlay=FILE"},
};

const struct image_format *image_format_of(const char *file)
{
    char head[8];
    int fd = open(file, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : pread(fd, head, sizeof(head), 0);
    if (fd >= 0)
        close(fd);
    for (unsigned i = 0; n == sizeof(head) && i < ARRAY_SIZE(disk_format); i++)
        if (!memcmp(head, disk_format[i].magic, disk_format[i].len))
            return &disk_format[i];
    return NULL;
}

/* Formats that are known not to be disks as they are. */
static int refuse_others(const struct import *m)
{
    static const struct image_format packed[] = {
        {"\xfd" "7zXZ", 5, "compressed", "unxz"},
        {"\x1f\x8b", 2, "compressed", "gunzip"},
        {"\x28\xb5\x2f\xfd", 4, "compressed", "unzstd"},
        {"BZh", 3, "compressed", "bunzip2"},
        {"PK\3\4", 4, "a zip archive", "unzip"},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(disk_format); i++)
        if (begins(m, disk_format[i].magic, disk_format[i].len))
            return err(-EINVAL, "%s: is %s; %s", m->file, disk_format[i].kind, disk_format[i].remedy);
    for (unsigned i = 0; i < ARRAY_SIZE(packed); i++)
        if (begins(m, packed[i].magic, packed[i].len))
            return err(-EINVAL, "%s: is %s; make a raw disk of it first (%s)", m->file, packed[i].kind, packed[i].remedy);
    return 0;
}

/* The size that a file system says it has, compared with the file's. */
static int whole(const struct import *m, u64 blocks, unsigned shift, const char *kind)
{
    if (shift > 16 || blocks > (u64)INT64_MAX >> shift || !blocks)
        return err(-EINVAL, "%s: its %s file system is damaged", m->file, kind);
    if (blocks << shift > (u64)m->size)
        return err(-EINVAL, "%s: is cut off: its %s file system has %llu bytes, the file %lld", m->file, kind, (unsigned long long)(blocks << shift),
                   (long long)m->size);
    return 0;
}

static int recognize(struct import *m)
{
    const u8 *super = m->head + 1024;
    int r = refuse_others(m);
    if (r < 0)
        return r;
    if (le(super + 0x38, 2) == 0xef53) {
        u64 blocks = le(super + 4, 4) | (le(super + 0x60, 4) & 0x80 ? le(super + 0x150, 4) << 32 : 0);
        return le(super + 0x18, 4) > 6 ? whole(m, 0, 0, "ext") : whole(m, blocks, 10 + (unsigned)le(super + 0x18, 4), "ext");
    }
    if (begins(m, "XFSB", 4)) {
        u64 block = be(m->head + 4, 4);
        unsigned shift = (unsigned)__builtin_ctzll(block | BIT(17));
        return whole(m, block == BIT(shift) ? be(m->head + 8, 8) : 0, shift, "XFS");
    }
    m->firmware = m->head[510] == 0x55 && m->head[511] == 0xaa;
    return m->firmware ? 0 : err(-EINVAL, "%s: has neither a boot sector nor a file system that doppel knows (ext2 to ext4, XFS)", m->file);
}

static int open_file(struct import *m)
{
    struct stat st;
    m->in = open(m->file, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (m->in < 0)
        return err(-errno, "%s: cannot be opened: %s", m->file, strerror(errno));
    if (fstat(m->in, &st) < 0 || (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)))
        return err(-EINVAL, "%s: neither a file nor a block device", m->file);
    m->size = lseek(m->in, 0, SEEK_END);
    if (m->size < HEAD || pread(m->in, m->head, HEAD, 0) != HEAD)
        return err(-EINVAL, "%s: too small for a disk, or cannot be read", m->file);
    return recognize(m);
}

static int write_failed(int error)
{
    return err(-error, "the image cannot be written: %s", strerror(error));
}

/* One run of data, by the kernel where it can. */
static int copy_run(struct import *m, off_t at, off_t end, u8 *buf)
{
    off_t from = at, to = at;
    while (from < end) {
        ssize_t n = copy_file_range(m->in, &from, m->out, &to, MIN((size_t)(end - from), (size_t)COPY_MAX), 0);
        if (n <= 0) {
            n = pread(m->in, buf, MIN((size_t)(end - from), (size_t)PIECE), from);
            if (n <= 0)
                return err(-EIO, "%s: cannot be read: %s", m->file, n < 0 ? strerror(errno) : "it became shorter");
            ssize_t w = pwrite(m->out, buf, (size_t)n, to);
            if (w <= 0)
                return write_failed(w < 0 ? errno : ENOSPC);
            from += w;
            to += w;
        }
        progress_part(&m->progress, (u64)from, (u64)m->size);
    }
    return 0;
}

static int copy_disk(struct import *m)
{
    u8 *buf = malloc(PIECE);
    int r = 0;
    if (!buf)
        return err(-ENOMEM, "no memory");
    if (ioctl(m->out, FICLONE, m->in) < 0)
        for (off_t at = 0; r == 0 && at < m->size;) {
            off_t data = lseek(m->in, at, SEEK_DATA);
            if (data < 0 && errno == ENXIO)
                break;
            off_t end = data < 0 ? m->size : lseek(m->in, data, SEEK_HOLE);
            data = data < 0 ? at : data;
            end = end <= data ? m->size : end;
            r = copy_run(m, data, end, buf);
            at = end;
        }
    free(buf);
    /* Disks are whole sectors. */
    return r < 0 || ftruncate(m->out, (m->size + 511) / 512 * 512) == 0 ? r : write_failed(errno);
}

static int copy_small(const struct image *i, const char *from, const char *name)
{
    u8 buf[65536];
    ssize_t n = -1;
    int in = open(from, O_RDONLY | O_CLOEXEC), out = openat(i->fd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    int error = in < 0 || out < 0 ? errno : 0;
    while (!error && (n = read(in, buf, sizeof(buf))) != 0) {
        ssize_t w = n < 0 ? -1 : write(out, buf, (size_t)n);
        if (w != n)
            error = w < 0 ? errno : ENOSPC;                        /* a part was written: the disk is full */
    }
    if (in >= 0)
        close(in);
    if (out >= 0 && close(out) < 0 && !error)
        error = errno;
    return error ? err(-error, "%s: cannot be copied into the image: %s", from, strerror(error)) : 0;
}

/* The default guest's, as it is today: the image does not change when that does. */
static int add_kernel(struct image *i)
{
    static const char cmdline[] = "console=ttyS0 root=/dev/vda rw loglevel=4 panic=-1 cryptomgr.notests=1\n";
    struct guest *g = calloc(1, sizeof(*g));
    int r = g ? guest_find_or_build(g, true) : err(-ENOMEM, "no memory");
    if (r == 0)
        r = copy_small(i, g->kernel, "vmlinuz");
    if (r == 0)
        r = copy_small(i, g->initrd, "initrd");
    free(g);
    int fd = r < 0 ? -1 : openat(i->fd, "cmdline", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    ssize_t w = fd < 0 ? -1 : write(fd, cmdline, sizeof(cmdline) - 1);
    if (r == 0 && w != sizeof(cmdline) - 1)
        r = write_failed(w < 0 ? errno : ENOSPC);
    if (fd >= 0)
        close(fd);
    return r;
}

static int fill(struct import *m, struct image *i)
{
    progress_phase(&m->progress, "copying the disk");
    m->out = openat(i->fd, "root.img", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    int r = m->out < 0 ? write_failed(errno) : copy_disk(m);
    if (m->out >= 0)
        close(m->out);
    i->info.firmware = m->firmware;
    i->info.commands = !m->firmware;
    const char *slash = strrchr(m->file, '/');
    snprintf(i->info.from, sizeof(i->info.from), "%s", slash ? slash + 1 : m->file);
    if (r == 0 && !m->firmware)
        r = add_kernel(i);
    if (r == 0)
        progress_phase(&m->progress, "computing the digest");
    return r < 0 ? r : image_commit(i);
}

/* "debian-12.raw": debian-12. */
static int name_after(const char *file, char out[INSTANCE_NAME_MAX + 1])
{
    const char *base = strrchr(file, '/');
    base = base ? base + 1 : file;
    const char *dot = strrchr(base, '.');
    int len = (int)(dot && dot > base ? (size_t)(dot - base) : strlen(base));
    if (len > INSTANCE_NAME_MAX || snprintf(out, INSTANCE_NAME_MAX + 1, "%.*s", len, base) < 1 || !instance_name_valid(out))
        return err(-EINVAL, "%.200s: an image cannot be called after it; write doppel image import FILE NAME", file);
    return 0;
}

int image_import(const char *file, const char *name)
{
    char own[INSTANCE_NAME_MAX + 1];
    struct import *m = calloc(1, sizeof(*m));
    struct image i = {.fd = -1};
    if (!m)
        return err(-ENOMEM, "no memory");
    *m = (struct import){.file = file, .in = -1, .out = -1};
    int r = name ? 0 : name_after(file, own);
    if (r == 0)
        r = open_file(m);
    if (r == 0)
        r = image_begin(&i, name ? name : own);
    if (r == 0) {
        progress_begin(&m->progress);
        r = fill(m, &i);
        progress_end(&m->progress);
        if (r < 0)
            image_abandon(&i);
    }
    if (m->in >= 0)
        close(m->in);
    free(m);
    return r;
}
