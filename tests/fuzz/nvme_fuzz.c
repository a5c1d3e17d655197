/*
 * Fuzzing of the NVMe controller: the input is a hostile driver's program. It may do everything by single register accesses and stores to memory, or take a step
 * that a driver takes (enable, make queues, a command that is nearly right, doorbells) with parameters of its own.
 *
 *   steps of 12 bytes: what, a, n (2), value (4), more (4)
 */
#include "../dev/virtio_guest.h"
#include "dev/nvme.h"
#include "state.h"

#include <fcntl.h>

#define DEV 4
#define ASQ 0x10000ull
#define ACQ 0x12000ull
#define IOSQ 0x14000ull
#define IOCQ 0x16000ull
#define SHADOW 0x18000ull
#define DATA 0x20000ull
#define N 16u

struct cmd {
    u8 opcode, flags;
    u16 cid;
    u32 nsid;
    u64 unused, metadata, prp1, prp2;
    u32 dw[6];
};

static struct guest g;
static struct nvme *nvme;
static unsigned tail[3];

static u64 bar(void)
{
    return bar_address(&g, DEV, 0);
}

static void set(unsigned off, u32 val)
{
    bus_write(g.mmio, bar() + off, val, 4);
}

static void build(void)
{
    char image[] = "/tmp/doppel-fuzz-XXXXXX";
    int fd = mkstemp(image);
    struct nvme_config c;
    struct block *b;

    bug_on(fd < 0 || ftruncate(fd, 1 * MiB) < 0);
    close(fd);
    guest_new(&g);
    bug_on(block_open(&(struct block_config){ .path = image, .io = BLOCK_IO_THREADS }, &b) < 0);
    unlink(image);
    c = (struct nvme_config){ .ram = &g.ram, .pci = g.pci, .slot = DEV, .intx = guest_line(&g), .gsi = 10, .serial = "fuzz", .queues = 2 };
    bug_on(nvme_new(&c, b, &nvme) < 0);
}

static void submit(unsigned q, const struct cmd *c)
{
    static const u64 at[] = { ASQ, IOSQ, IOSQ + 0x1000 };

    put(&g, at[q] + 64 * tail[q], c, sizeof(*c));
    tail[q] = (tail[q] + 1) % N;
    set(0x1000 + 8 * q, tail[q]);
}

static void start(void)
{
    ecam_write(&g, DEV, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    set(0x14, 0);
    set(0x24, (N - 1) << 16 | (N - 1));
    set(0x28, (u32)ASQ);
    set(0x2c, 0);
    set(0x30, (u32)ACQ);
    set(0x34, 0);
    set(0x14, 4 << 20 | 6 << 16 | 1);
    memset(tail, 0, sizeof(tail));
    for (u32 q = 1; q < 3; q++) {
        submit(0, &(struct cmd){ .opcode = 5, .prp1 = IOCQ + (q - 1) * 0x1000, .dw = { (N - 1) << 16 | q, q << 16 | 3 } });
        submit(0, &(struct cmd){ .opcode = 1, .prp1 = IOSQ + (q - 1) * 0x1000, .dw = { (N - 1) << 16 | q, q << 16 | 1 } });
    }
}

static void step(const u8 *a)
{
    struct cmd c = { 0 };
    unsigned n = a[2] | a[3] << 8;
    u64 val;
    u32 v, w;

    memcpy(&v, a + 4, 4);
    memcpy(&w, a + 8, 4);
    val = v;
    switch (a[0] % 11) {
    case 0: bus_access(g.mmio, bar() + n % 0x40, 1u << (a[1] & 3), a[1] & 4, &val); break;
    case 1: set(0x1000 + n % 8 * 4, v % 20); break;
    case 2: ecam_write(&g, DEV, n % 256, v, 1u << a[1] % 3); break;
    case 3: put(&g, n * 4ull, &v, 4); break;
    case 4: start(); break;
    case 5:                                                        /* nearly right I/O */
        c = (struct cmd){ .opcode = a[1] % 10, .cid = (u16)n, .nsid = 1, .prp1 = DATA + (v & 0x3ffc), .prp2 = DATA + (v >> 12 & 0xffff8),
                          .dw = { w % 2100, a[1] == 77, w >> 16 & 0x7ff, 0, 0, 0 } };
        if (c.opcode == 9)
            c.dw[1] = 4;
        submit(1 + (n & 1), &c);
        break;
    case 6:                                                        /* admin */
        c = (struct cmd){ .opcode = a[1] % 15, .nsid = n & 1, .prp1 = DATA + (n & 0xfff0), .prp2 = DATA + 0x8000, .dw = { v, w, 0, 0, 0, 0 } };
        if (c.opcode == 14) {                                      /* doorbells in memory; now and then over a queue */
            c.opcode = 0x7c;
            c.prp1 = a[2] & 7 ? SHADOW : IOCQ;
            c.prp2 = a[2] & 56 ? SHADOW + 0x1000 : SHADOW;
        }
        submit(0, &c);
        break;
    case 7:                                                        /* anything */
        memcpy(&c, a + 1, 11);
        memcpy((u8 *)&c + 24, a + 2, 10);
        memcpy((u8 *)&c + 40, a, 12);
        submit(n % 3, &c);
        break;
    case 8: state_save_and_load((struct device *)nvme, v, true); break;
    case 9:                                                        /* a list of pages for what comes */
        for (unsigned i = 0; i < 16; i++) {
            val = DATA + (u64)((v >> i & 15) << 12);
            put(&g, DATA + (n & 0xffff8) + 8 * i, &val, 8);
        }
        break;
    case 10:
        v %= 20;
        put(&g, SHADOW + n % 16 * 4, &v, 4);
        if (a[1] & 1)
            set(0x1000 + n % 8 * 4, v);
        break;
    }
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    struct device *d;

    if (!nvme)
        build();
    d = (struct device *)nvme;
    start();
    for (; len >= 12; data += 12, len -= 12)
        step(data);
    d->ops->quiesce(d);
    d->ops->reset(d);
    bug_on(d->stuck);
    memset(g.ram.run[0].hva, 0, 1536 * KiB);
    return 0;
}
