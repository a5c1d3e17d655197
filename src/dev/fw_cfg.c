/*
 * Firmware configuration device (see fw_cfg.h; QEMU's docs/specs/fw_cfg, sections "Register Locations", "Firmware
 * Configuration Items", "Guest-side DMA Interface"). Items are read-only and do not change after the board was built.
 *
 * Left out: writes to items (nobody needs them since QEMU 2.4; a DMA write is answered with an error), and
 * architecture-local keys. What a host file no longer holds reads as zero, as bytes behind an item's end do.
 * Locking: device.lock.
 */
#include "dev/fw_cfg.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base/err.h"

#define KEY_SIGNATURE 0x00
#define KEY_ID        0x01
#define KEY_DIRECTORY 0x19
#define KEY_FILE      0x20
#define KEY_MASK      0xbfff                                       /* without the bit that once meant a write */
#define ITEMS_MAX     64
#define NAME_SIZE     56
#define ID_BITS       3u                                           /* traditional and DMA interface */
#define DMA_SIGNATURE 0x51454d5520434647ull                        /* "QEMU CFG" */
#define CHUNK         4096

enum { DMA_ERROR = 1, DMA_READ = 2, DMA_SKIP = 4, DMA_SELECT = 8, DMA_WRITE = 16 };

struct item {
    u16 key;
    char name[NAME_SIZE];                                          /* "": not in the directory */
    u8 *data;                                                      /* NULL: bytes of fd */
    int fd;
    u64 offset;
    u32 size;
};

struct directory_entry {
    u32 size;
    u16 key, reserved;
    char name[NAME_SIZE];
};

struct fw_cfg {
    struct device device;
    struct ram *ram;
    struct item item[ITEMS_MAX];
    unsigned items, files;
    u16 key;                                                       /* selected */
    u32 pos;
    u32 dma_high;                                                  /* as written, in the guest's order */
};

static const struct item *item_of(const struct fw_cfg *f, u16 key)
{
    for (unsigned i = 0; i < f->items; i++)
        if (f->item[i].key == key)
            return &f->item[i];
    return NULL;
}

static void select_key(struct fw_cfg *f, u16 key)
{
    f->key = key & KEY_MASK;
    f->pos = 0;
}

/* The next len bytes, len <= CHUNK; zero behind the end. */
static void take(struct fw_cfg *f, u8 *buf, u32 len)
{
    const struct item *it = item_of(f, f->key);
    u32 n = it && f->pos < it->size ? MIN(len, it->size - f->pos) : 0;

    memset(buf, 0, len);
    if (n && it->data)
        memcpy(buf, it->data + f->pos, n);
    else if (n && pread(it->fd, buf, n, (off_t)(it->offset + f->pos)) < 0)
        memset(buf, 0, n);
    f->pos = len > UINT32_MAX - f->pos ? UINT32_MAX : f->pos + len;
}

/* ---- selector and data ---- */

static u64 port_read(void *dev, u64 off, unsigned size)
{
    struct fw_cfg *f = dev;
    u8 byte = 0;

    if (off == 1 && size == 1)
        take(f, &byte, 1);
    return byte;
}

static void port_write(void *dev, u64 off, u64 val, unsigned size)
{
    if (off == 0 && size == 2)
        select_key(dev, (u16)val);
}

/* ---- DMA ---- */

static bool dma_copy(struct fw_cfg *f, u64 gpa, u32 len)
{
    u8 buf[CHUNK];

    if (!ram_has(f->ram, gpa, len))                                /* so len is no more than there is memory */
        return false;
    while (len) {
        u32 n = MIN(len, (u32)sizeof buf);

        take(f, buf, n);
        if (ram_write(f->ram, gpa, buf, n))
            return false;
        gpa += n;
        len -= n;
    }
    return true;
}

static void dma(struct fw_cfg *f, u64 gpa)
{
    struct { u32 control, length; u64 address; } d;
    u32 control, length, result = 0;

    if (ram_read(f->ram, gpa, &d, sizeof d))
        return;
    control = be32toh(d.control);
    length = be32toh(d.length);
    if (control & DMA_SELECT)
        select_key(f, (u16)(control >> 16));
    if (control & DMA_READ)
        result = !length || dma_copy(f, be64toh(d.address), length) ? 0 : DMA_ERROR;
    else if (control & DMA_WRITE)
        result = DMA_ERROR;
    else if (control & DMA_SKIP)
        f->pos = length > UINT32_MAX - f->pos ? UINT32_MAX : f->pos + length;
    result = htobe32(result);
    ram_write(f->ram, gpa, &result, sizeof result);
}

static u64 dma_read(void *dev UNUSED, u64 off, unsigned size UNUSED)
{
    return htobe32((u32)(off ? DMA_SIGNATURE : DMA_SIGNATURE >> 32));
}

/* The lower half, written last, starts it. */
static void dma_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct fw_cfg *f = dev;

    if (!off) {
        f->dma_high = (u32)val;
        return;
    }
    dma(f, (u64)be32toh(f->dma_high) << 32 | be32toh((u32)val));
    f->dma_high = 0;
}

/* ---- building ---- */

static int add(struct fw_cfg *f, u16 key, const void *p, u32 len, struct item **out)
{
    struct item *it = &f->item[f->items];

    if (f->items == ITEMS_MAX)
        return err(-ENOSPC, "firmware configuration: too many items");
    *it = (struct item){ .key = key, .fd = -1, .size = len };
    it->data = malloc(len + 1);
    if (!it->data)
        return err(-ENOMEM, "firmware configuration: out of memory");
    memcpy(it->data, p, len);
    f->items++;
    if (out)
        *out = it;
    return 0;
}

int fw_cfg_bytes(struct fw_cfg *f, enum fw_cfg_key key, const void *p, u32 len)
{
    return add(f, (u16)key, p, len, NULL);
}

int fw_cfg_int(struct fw_cfg *f, enum fw_cfg_key key, u64 value, unsigned len)
{
    value = htole64(value);
    return add(f, (u16)key, &value, len, NULL);
}

int fw_cfg_host_file(struct fw_cfg *f, enum fw_cfg_key key, int fd, u64 offset, u32 len)
{
    struct item *it = &f->item[f->items];

    if (f->items == ITEMS_MAX)
        return err(-ENOSPC, "firmware configuration: too many items");
    *it = (struct item){ .key = (u16)key, .fd = fcntl(fd, F_DUPFD_CLOEXEC, 0), .offset = offset, .size = len };
    if (it->fd < 0)
        return err(-errno, "firmware configuration: %s", strerror(errno));
    f->items++;
    return 0;
}

/* The directory (big endian) lists the files in the order of their names. */
static int make_directory(struct fw_cfg *f)
{
    struct { u32 count; struct directory_entry entry[ITEMS_MAX]; } dir = { .count = htobe32(f->files) };
    struct item *it = (struct item *)item_of(f, KEY_DIRECTORY);
    unsigned n = 0;

    for (unsigned i = 0; i < f->items; i++) {
        const struct item *file = &f->item[i];
        unsigned at = n;

        if (!file->name[0])
            continue;
        for (; at && strcmp(dir.entry[at - 1].name, file->name) > 0; at--)
            dir.entry[at] = dir.entry[at - 1];
        dir.entry[at] = (struct directory_entry){ .size = htobe32(file->size), .key = htobe16(file->key) };
        memcpy(dir.entry[at].name, file->name, NAME_SIZE);
        n++;
    }
    if (it) {
        free(it->data);
        *it = f->item[--f->items];
    }
    return add(f, KEY_DIRECTORY, &dir, (u32)(sizeof dir.count + n * sizeof *dir.entry), NULL);
}

int fw_cfg_file(struct fw_cfg *f, const char *name, const void *p, u32 len)
{
    struct item *it;
    int r;

    bug_on(strlen(name) >= NAME_SIZE);
    r = add(f, (u16)(KEY_FILE + f->files), p, len, &it);
    if (r < 0)
        return r;
    strcpy(it->name, name);
    f->files++;
    return make_directory(f);
}

/* ---- device ---- */

static void fw_cfg_reset(struct device *d)
{
    struct fw_cfg *f = (struct fw_cfg *)d;

    pthread_mutex_lock(&d->lock);
    select_key(f, KEY_SIGNATURE);
    f->dma_high = 0;
    pthread_mutex_unlock(&d->lock);
}

static void fw_cfg_state(struct device *d, struct stream *s)
{
    struct fw_cfg *f = (struct fw_cfg *)d;

    stream_section(s, "fw_cfg", 1);
    stream_u16(s, &f->key);
    stream_u32(s, &f->pos);
    stream_u32(s, &f->dma_high);
}

static void fw_cfg_free(struct device *d)
{
    struct fw_cfg *f = (struct fw_cfg *)d;

    for (unsigned i = 0; i < f->items; i++) {
        free(f->item[i].data);
        if (f->item[i].fd >= 0)
            close(f->item[i].fd);
    }
    pthread_mutex_destroy(&d->lock);
    free(f);
}

static const struct device_ops fw_cfg_ops = {
    .name = "fw_cfg",
    .reset = fw_cfg_reset,
    .state = fw_cfg_state,
    .free = fw_cfg_free,
};

int fw_cfg_new(struct bus *pio, struct ram *ram, struct fw_cfg **out)
{
    struct fw_cfg *f = calloc(1, sizeof(*f));
    u32 id = htole32(ID_BITS);
    int r;

    if (!f)
        return err(-ENOMEM, "firmware configuration: out of memory");
    device_init(&f->device, &fw_cfg_ops);
    f->ram = ram;

    struct region ports = {
        .base = FW_CFG_PORT, .size = 2, .min = 1, .max = 2, .read = port_read, .write = port_write, .dev = f,
        .lock = &f->device.lock, .name = "fw_cfg",
    };
    struct region dma_ports = {
        .base = FW_CFG_PORT + 4, .size = 8, .min = 4, .max = 4, .read = dma_read, .write = dma_write, .dev = f,
        .lock = &f->device.lock, .name = "fw_cfg DMA",
    };
    r = add(f, KEY_SIGNATURE, "QEMU", 4, NULL);
    if (r >= 0)
        r = add(f, KEY_ID, &id, sizeof id, NULL);
    if (r >= 0)
        r = make_directory(f);
    if (r >= 0)
        r = bus_add(pio, &ports);
    if (r >= 0)
        r = bus_add(pio, &dma_ports);
    if (r < 0) {
        fw_cfg_free(&f->device);
        return r;
    }
    *out = f;
    return 0;
}
