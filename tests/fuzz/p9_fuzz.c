/*
 * Fuzzing of the shared folder: a hostile 9P client behind a virtio queue. The input is a list of messages: type, length, how the chain is made, and
 * the body, whose leading fids are made small ones so that they are often right. The folder has a few files and a way out (links); when an input is
 * done, nothing may lie beside it.
 *
 *   byte 0: bit 0: a session is begun first; then messages: type, length of the body, chain, body
 *   chain: bits 0 to 2: room for the answer (0, 7, 11, 100, 4096, ...); bit 3: body in two pieces; bit 4: the size field is wrong; bit 5: not waited for
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <sys/stat.h>

#include "../dev/virtio_guest.h"
#include "dev/virtio_9p.h"

#define DEV 3
#define OUT (GUEST_RAM / 2)
#define IN (OUT + 1 * MiB)

static struct guest g;
static struct virtio_9p *dev;
static struct vdev d;
static char base[64], folder[80];

static int remove_one(const char *path, const struct stat *st UNUSED, int kind UNUSED, struct FTW *at)
{
    return at->level ? remove(path) : 0;
}

static void fill(void)
{
    int fd;

    bug_on(chmod(folder, 0755) < 0);
    nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    fd = open(folder, O_PATH | O_DIRECTORY);
    bug_on(fd < 0 || mkdirat(fd, "d", 0755) < 0 || symlinkat("..", fd, "l") < 0 || mkfifoat(fd, "p", 0644) < 0);
    close(openat(fd, "f", O_CREAT | O_RDWR, 0644));
    close(fd);
}

static void clean(void)
{
    nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    rmdir(folder);
    rmdir(base);
}

static void build(void)
{
    struct p9_config c = { .path = folder };
    struct p9 *s;

    strcpy(base, "/tmp/doppel-fuzz-XXXXXX");
    bug_on(!mkdtemp(base));
    snprintf(folder, sizeof(folder), "%s/s", base);
    bug_on(mkdir(folder, 0755) < 0);
    atexit(clean);
    guest_new(&g);
    bug_on(p9_open(&c, &s) < 0 || virtio_9p_new(&g.ram, NULL, s, "fuzz", &dev) < 0);
    bug_on(virtio_pci_attach(g.pci, DEV, guest_line(&g), 10, true, (struct virtio *)dev) < 0);
}

static void quiesce(void)
{
    struct device *p = (struct device *)dev;

    p->ops->quiesce(p);
}

static void message(u8 type, const u8 *body, u32 len, u8 chain)
{
    static const u32 rooms[] = { 4096, 11, 7, 0, 100, 8192, 65536, 300 };
    static unsigned turn;
    u32 size = 7 + len, id, used, room = rooms[chain & 7];
    u64 at = OUT + turn++ % 16 * 0x2000ull;
    u8 head[7];
    struct buf b[4];
    unsigned n = 0;

    if (chain & 16)
        size ^= 1u << (len % 32);
    memcpy(head, &size, 4);
    head[4] = type;
    head[5] = (u8)turn;
    head[6] = 0;
    put(&g, at, head, 7);
    put(&g, at + 7, body, len);
    b[n++] = (struct buf){ at, chain & 8 ? 5 : 7 + len, false };
    if (chain & 8)
        b[n++] = (struct buf){ at + 5, 2 + len, false };
    if (room)
        b[n++] = (struct buf){ IN + turn % 8 * 0x10000ull, room, true };
    gq_add(&d.q[0], b, n);
    vdev_kick(&d, 0);
    if (!(chain & 32))
        quiesce();
    while (gq_used(&d.q[0], &id, &used))
        bug_on(used > 65536);
}

static void session(void)
{
    static const u8 version[] = "\0\0\1\0\10\0" "9P2000.L", attach[] = "\0\0\0\0\xff\xff\xff\xff\1\0u\0\0\0\0\0\0";

    message(100, version, sizeof(version) - 1, 0);
    message(104, attach, sizeof(attach) - 1, 0);
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    u8 body[256];
    struct dirent *e;
    unsigned beside = 0;
    DIR *dir;

    if (!dev)
        build();
    fill();
    g.heap = GUEST_HEAP;
    bug_on(!vdev_start(&d, &g, DEV, BIT(VIRTIO_F_VERSION_1), 64));
    if (len && (*data & 1))
        session();
    for (len -= len > 0, data++; len >= 3;) {
        u32 n = MIN((u32)data[1], (u32)len - 3);

        memcpy(body, data + 3, n);
        for (u32 i = 0; i < n && i < 8; i++)
            body[i] &= i % 4 ? 0 : 7;
        message(data[0], body, n, data[2]);
        data += 3 + n;
        len -= 3 + n;
    }
    quiesce();
    ((struct device *)dev)->ops->reset((struct device *)dev);
    bug_on(((struct virtio *)dev)->status);
    memset(g.ram.run[0].hva, 0, 768 * KiB);
    dir = opendir(base);
    while (dir && (e = readdir(dir)))
        beside += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
    bug_on(!dir || beside != 1);
    closedir(dir);
    return 0;
}
