/*
 * The NVMe controller as its driver sees it: register script, admin commands, I/O with all forms of PRPs, and the ways in which a driver can be wrong.
 * Sections are of NVM Express 1.4.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "dev/nvme.h"
#include "disk_guest.h"

#define DEV 4
#define SECTORS 8192u
#define ASQ 0x100000ull
#define ACQ 0x110000ull
#define IOSQ 0x120000ull
#define IOCQ 0x130000ull
#define LIST 0x140000ull
#define DATA 0x200000ull
#define N 16u

struct cmd {
    u8 opcode, flags;
    u16 cid;
    u32 nsid;
    u64 unused, metadata, prp1, prp2;
    u32 dw10, dw11, dw12, dw13, dw14, dw15;
};

struct queue {
    u64 sq, cq;
    unsigned id, tail, head;
    u16 phase;
};

static struct nvme *nvme;
static u64 bar;
static struct queue admin, io;
static u32 dw0;

static u32 reg(unsigned off)
{
    return (u32)bus_read(g.mmio, bar + off, 4);
}

static void set(unsigned off, u32 val)
{
    bus_write(g.mmio, bar + off, val, 4);
}

static void msix_on(unsigned vectors)
{
    u64 table = bar_address(&g, DEV, 4);
    unsigned cap = ecam_read(&g, DEV, PCI_CAPABILITY_LIST, 1);

    for (unsigned v = 0; v < vectors; v++) {
        bus_write(g.mmio, table + 16 * v, 0xfee00000, 4);
        bus_write(g.mmio, table + 16 * v + 8, v, 4);
        bus_write(g.mmio, table + 16 * v + 12, 0, 4);
    }
    while (ecam_read(&g, DEV, cap, 1) != PCI_CAP_ID_MSIX)
        cap = ecam_read(&g, DEV, cap + 1, 1);
    ecam_write(&g, DEV, cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE, 2);
}

static void enable(void)
{
    static const u8 zero[4096];

    put(&g, ASQ, zero, sizeof(zero));
    put(&g, ACQ, zero, sizeof(zero));
    set(0x24, (N - 1) << 16 | (N - 1));
    set(0x28, (u32)ASQ);
    set(0x2c, 0);
    set(0x30, (u32)ACQ);
    set(0x34, 0);
    set(0x14, 4 << 20 | 6 << 16 | 1);
    admin = (struct queue){ .sq = ASQ, .cq = ACQ, .phase = 1 };
}

static void ring(struct queue *q)
{
    set(0x1000 + 8 * q->id, q->tail);
}

static void add(struct queue *q, struct cmd c)
{
    c.cid = (u16)(0x100 + q->tail);
    put(&g, q->sq + 64 * q->tail, &c, sizeof(c));
    q->tail = (q->tail + 1) % N;
}

/* The next completion's status, or -1 after five seconds. */
static int take(struct queue *q, u16 *cid)
{
    struct { u32 dw0, dw1; u16 head, id, cid, status; } c;

    for (unsigned i = 0; i < 50000; i++, usleep(100)) {
        u16 status = __atomic_load_n((u16 *)(void *)ram_hva(&g.ram, q->cq + 16 * q->head + 14), __ATOMIC_ACQUIRE);

        if ((status & 1) != q->phase)
            continue;
        get(&g, q->cq + 16 * q->head, &c, sizeof(c));
        q->head = (q->head + 1) % N;
        q->phase ^= q->head == 0;
        set(0x1004 + 8 * q->id, q->head);
        dw0 = c.dw0;
        if (cid)
            *cid = c.cid;
        return c.status >> 1 & 0x7ff;
    }
    return -1;
}

static bool nothing(const struct queue *q)
{
    u16 status;

    get(&g, q->cq + 16 * q->head + 14, &status, 2);
    return (status & 1) != q->phase;
}

static int do_cmd(struct queue *q, struct cmd c)
{
    add(q, c);
    ring(q);
    return take(q, NULL);
}

static int make_queues(void)
{
    static const u8 zero[4096];
    int r;

    put(&g, IOCQ, zero, sizeof(zero));
    r = do_cmd(&admin, (struct cmd){ .opcode = 5, .prp1 = IOCQ, .dw10 = (N - 1) << 16 | 1, .dw11 = 1 << 16 | 3 });
    if (r == 0)
        r = do_cmd(&admin, (struct cmd){ .opcode = 1, .prp1 = IOSQ, .dw10 = (N - 1) << 16 | 1, .dw11 = 1 << 16 | 1 });
    io = (struct queue){ .sq = IOSQ, .cq = IOCQ, .id = 1, .phase = 1 };
    return r;
}

static void open_disk_of(struct block *b, const struct log *log)
{
    struct nvme_config c;

    guest_new(&g);
    c = (struct nvme_config){ .ram = &g.ram, .log = log, .pci = g.pci, .slot = DEV, .intx = guest_line(&g), .gsi = 10, .serial = "serial", .number = 3, .queues = 2 };
    assert_int_equal(nvme_new(&c, b, &nvme), 0);
    bar = bar_address(&g, DEV, 0);
    ecam_write(&g, DEV, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
}

static void open_disk(bool readonly)
{
    open_disk_of(open_image(readonly), NULL);
}

static int setup(void **state UNUSED)
{
    write_image(SECTORS);
    open_disk(false);
    msix_on(3);
    enable();
    assert_int_equal(make_queues(), 0);
    return 0;
}

static int teardown(void **state UNUSED)
{
    device_free(nvme);
    guest_free(&g);
    return 0;
}

static struct cmd rw(u8 opcode, u64 lba, u32 sectors, u64 prp1, u64 prp2)
{
    return (struct cmd){ .opcode = opcode, .nsid = 1, .prp1 = prp1, .prp2 = prp2, .dw10 = (u32)lba, .dw11 = (u32)(lba >> 32), .dw12 = sectors - 1 };
}

/* 3.1 */
static void test_registers(void **state UNUSED)
{
    assert_int_equal(ecam_read(&g, DEV, PCI_CLASS_REVISION, 4) >> 8, 0x010802);
    assert_int_equal(reg(8), 0x10400);
    assert_int_equal(reg(0) & 0x1ffff, 0x103ff);
    assert_int_equal(reg(4) & 0xf, 0);
    assert_int_equal(reg(4) >> 5 & 1, 1);
    assert_int_equal(reg(0x1c), 1);
    set(0x1c, 0);
    set(0, 0);
    assert_int_equal(reg(0x1c), 1);
    set(0x14, 0);
    assert_int_equal(reg(0x1c), 0);
    set(0x28, 0xffffffff);
    assert_int_equal(reg(0x28), 0xfffff000);
    for (unsigned off = 0; off < 16384; off += 4)
        bus_read(g.mmio, bar + off, 4);
    bus_write(g.mmio, bar + 0x14, 1, 1);
    assert_int_equal(reg(0x14), 0);
}

/* 3.1.6: what it does not support when it is enabled is fatal; a reset mends it. */
static void test_bad_enable(void **state UNUSED)
{
    static const struct { unsigned off; u32 val; } bad[] = {
        { 0x24, 0 }, { 0x28, (u32)GUEST_RAM }, { 0x34, 1 }, { 0x14, 1 | 1 << 7 }, { 0x14, 1 | 1 << 4 }, { 0x14, 1 | 1 << 11 },
    };

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        set(0x14, 0);
        enable();
        assert_int_equal(reg(0x1c), 1);
        set(0x14, 0);
        set(bad[i].off, bad[i].val);
        if (bad[i].off != 0x14)
            set(0x14, 4 << 20 | 6 << 16 | 1);
        assert_int_equal(reg(0x1c) & 3, 2);
        set(0x1000, 5);
        set(0x14, 0);
        assert_int_equal(reg(0x1c), 0);
    }
}

/* 5.15 */
static void test_identify(void **state UNUSED)
{
    char text[41] = "";
    u64 size;

    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .prp1 = DATA, .dw10 = 1 }), 0);
    get(&g, DATA + 4, text, 20);
    assert_string_equal(text, "serial              ");
    assert_int_equal(word_at(DATA + 516), 1);
    assert_int_equal(word_at(DATA + 512) & 0xffff, 0x4466);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .nsid = 1, .prp1 = DATA + 2048, .prp2 = DATA + 8192, .dw10 = 0 }), 0);
    get(&g, DATA + 2048, &size, 8);
    assert_int_equal(size, SECTORS);
    assert_int_equal(word_at(DATA + 2048 + 128) >> 16 & 0xff, 9);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .prp1 = DATA, .dw10 = 2 }), 0);
    assert_int_equal(word_at(DATA), 1);
    assert_int_equal(word_at(DATA + 4), 0);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .nsid = 1, .prp1 = DATA, .dw10 = 3 }), 0);
    assert_int_equal(word_at(DATA) & 0xffff, 0x1002);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .nsid = 2, .prp1 = DATA, .dw10 = 0 }), 0xb);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .prp1 = DATA, .dw10 = 0x77 }), 2);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .prp1 = DATA + 1, .dw10 = 1 }), 0x13);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .prp1 = GUEST_RAM, .dw10 = 1 }), 4);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .flags = 0x40, .prp1 = DATA, .dw10 = 1 }), 2);
}

/* 5.21, 5.14, 5.1 */
static void test_admin(void **state UNUSED)
{
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 9, .dw10 = 7, .dw11 = 63 | 63 << 16 }), 0);
    assert_int_equal(dw0, 1 | 1 << 16);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0xa, .dw10 = 6 }), 0);
    assert_int_equal(dw0, 1);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 9, .dw10 = 6, .dw11 = 0 }), 0);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0xa, .dw10 = 6 }), 0);
    assert_int_equal(dw0, 0);
    assert_int_equal(do_cmd(&io, rw(1, 0, 1, DATA, 0)), 0);        /* written through */
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 9, .dw10 = 6 | 1u << 31 }), 0x10d);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 9, .dw10 = 0xff }), 2);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0xa, .dw10 = 0 }), 2);
    for (u32 page = 1; page <= 4; page++)
        assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 2, .prp1 = DATA, .dw10 = page | 127 << 16 }), 0);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 2, .prp1 = DATA, .dw10 = 1 | 0xffffu << 16, .dw11 = 0xffff }), 0); /* only what there is */
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 2, .prp1 = DATA, .dw10 = 9 | 127 << 16 }), 0x109);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 2, .prp1 = DATA, .dw10 = 2, .dw12 = ~0u, .dw13 = ~0u }), 2);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 8, .dw10 = 1 }), 0);
    assert_int_equal(dw0, 1);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0x99 }), 1);
}

/* 5.3 to 5.6 */
static void test_queues(void **state UNUSED)
{
    static const struct { struct cmd c; int status; } bad[] = {
        { { .opcode = 5, .prp1 = IOCQ, .dw10 = 15 << 16 | 1, .dw11 = 1 }, 0x101 },     /* it is there */
        { { .opcode = 5, .prp1 = IOCQ, .dw10 = 15 << 16 | 0, .dw11 = 1 }, 0x101 },
        { { .opcode = 5, .prp1 = IOCQ, .dw10 = 15 << 16 | 3, .dw11 = 1 }, 0x101 },
        { { .opcode = 5, .prp1 = IOCQ, .dw10 = 0xffffu << 16 | 2, .dw11 = 1 }, 0x102 },
        { { .opcode = 5, .prp1 = IOCQ, .dw10 = 0 << 16 | 2, .dw11 = 1 }, 0x102 },
        { { .opcode = 5, .prp1 = IOCQ, .dw10 = 15 << 16 | 2, .dw11 = 0 }, 2 },
        { { .opcode = 5, .prp1 = IOCQ, .dw10 = 15 << 16 | 2, .dw11 = 1 | 3 << 16 }, 0x108 },
        { { .opcode = 5, .prp1 = GUEST_RAM, .dw10 = 15 << 16 | 2, .dw11 = 1 }, 4 },
        { { .opcode = 1, .prp1 = IOSQ, .dw10 = 15 << 16 | 2, .dw11 = 1 | 2 << 16 }, 0x100 },
        { { .opcode = 1, .prp1 = IOSQ, .dw10 = 15 << 16 | 2, .dw11 = 1 }, 0x100 },
        { { .opcode = 1, .prp1 = IOSQ, .dw10 = 15 << 16 | 1, .dw11 = 1 | 1 << 16 }, 0x101 },
        { { .opcode = 4, .dw10 = 1 }, 0x10c }, { { .opcode = 4, .dw10 = 2 }, 0x101 }, { { .opcode = 4, .dw10 = 0 }, 0x101 },
        { { .opcode = 0, .dw10 = 2 }, 0x101 }, { { .opcode = 0, .dw10 = 0 }, 0x101 }, { { .opcode = 0, .dw10 = 0xffff }, 0x101 },
    };

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_int_equal(do_cmd(&admin, bad[i].c), bad[i].status);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0, .dw10 = 1 }), 0);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 4, .dw10 = 1 }), 0);
    set(0x1008, 3);                                                /* doorbells of what is not there */
    set(0x100c, 3);
    set(0x1000 + 8 * 60, 3);
    set(0x3ffc, 3);
    assert_int_equal(make_queues(), 0);
    set(0x1008, N);                                                /* beyond the queue */
    assert_true(nothing(&io));
    assert_int_equal(do_cmd(&io, rw(2, 7, 1, DATA, 0)), 0);
    assert_int_equal(word_at(DATA), 7 << 8);
}

/* 4.3: one page, two, a list, a list that goes on elsewhere; offsets in the first. */
static void test_prps(void **state UNUSED)
{
    static const struct { u32 sectors; u64 off; } form[] = { { 1, 0 }, { 8, 0 }, { 8, 512 }, { 16, 0 }, { 16, 4 }, { 17, 0 }, { 800, 0 }, { 2048, 1024 } };

    for (unsigned i = 0; i < ARRAY_SIZE(form); i++) {
        u32 len = form[i].sectors * 512, first = (u32)MIN(4096 - form[i].off, len), pages = (len - first + 4095) / 4096;
        u64 list = LIST + 4096 - 16, page = DATA + 4096;
        struct cmd c = rw(2, 100 + i, form[i].sectors, DATA + form[i].off, page);

        if (pages > 1) {                                           /* two entries in the list's first page */
            u64 more = LIST + 8192;

            c.prp2 = list;
            put(&g, list, &page, 8);
            page += 4096;
            put(&g, list + 8, pages == 2 ? &page : &more, 8);
            for (u32 k = 1; k < pages && pages > 2; k++, page += 4096)
                put(&g, more + 8 * (k - 1), &page, 8);
        }
        assert_int_equal(do_cmd(&io, c), 0);
        for (u32 s = 0; s < form[i].sectors; s++)
            assert_int_equal(word_at(DATA + form[i].off + s * 512), (100 + i + s) << 8);
    }
}

static void test_bad_prps(void **state UNUSED)
{
    u64 own = LIST + 4096 - 8;

    put(&g, own, &own, 8);                                         /* a list whose only entry says that it goes on at itself */
    assert_int_equal(do_cmd(&io, rw(2, 0, 800, DATA, own)), 0x13);
    assert_int_equal(do_cmd(&io, rw(2, 0, 800, DATA, LIST + 4)), 0x13);
    assert_int_equal(do_cmd(&io, rw(2, 0, 16, DATA, DATA + 4096 + 512)), 0x13);
    assert_int_equal(do_cmd(&io, rw(2, 0, 1, DATA + 2, 0)), 0x13);
    assert_int_equal(do_cmd(&io, rw(2, 0, 1, GUEST_RAM, 0)), 4);
    assert_int_equal(do_cmd(&io, rw(2, 0, 1, ~0xfffull, 0)), 4);
    assert_int_equal(do_cmd(&io, rw(2, 0, 800, DATA, GUEST_RAM)), 4);
    put(&g, LIST, (u64[]){ DATA + 8 }, 8);
    assert_int_equal(do_cmd(&io, rw(2, 0, 24, DATA, LIST)), 0x13);
    assert_int_equal(do_cmd(&io, rw(2, 0, 2049, DATA, LIST)), 2);  /* more than MDTS */
    assert_int_equal(do_cmd(&io, rw(2, 5, 1, DATA, 0)), 0);
}

static void test_io(void **state UNUSED)
{
    u8 out[1024], in[1024];
    struct cmd c;
    int fd;

    for (unsigned i = 0; i < sizeof(out); i++)
        out[i] = (u8)(i * 5);
    put(&g, DATA, out, sizeof(out));
    c = rw(1, 1000, 2, DATA, 0);
    c.dw12 |= 1u << 30;                                            /* FUA */
    assert_int_equal(do_cmd(&io, c), 0);
    fd = open(image, O_RDONLY);
    assert_int_equal(pread(fd, in, sizeof(in), 512000), sizeof(in));
    close(fd);
    assert_memory_equal(in, out, sizeof(in));
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 0, .nsid = 1 }), 0);
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 0, .nsid = ~0u }), 0);
    assert_true(g.msi[1] >= 3);
    c = rw(8, 1000, 1, 0, 0);
    assert_int_equal(do_cmd(&io, c), 0);
    c = rw(8, 1500, 1, 0, 0);
    c.dw12 |= 1 << 25;
    assert_int_equal(do_cmd(&io, c), 0);
    for (unsigned lba = 999; lba < 1002; lba++)
        assert_int_equal(do_cmd(&io, rw(2, lba, 1, DATA + (lba - 999) * 512, 0)), 0);
    assert_int_equal(word_at(DATA), 999 << 8);
    assert_int_equal(word_at(DATA + 512 + 4), 0);
    assert_int_equal(word_at(DATA + 1024) & 0xff, (u8)(512 * 5));
    static const struct { struct cmd c; int status; } bad[] = {
        { { .opcode = 2, .nsid = 1, .prp1 = DATA, .dw10 = SECTORS }, 0x80 }, { { .opcode = 2, .nsid = 1, .prp1 = DATA, .dw10 = SECTORS - 1, .dw12 = 1 }, 0x80 },
        { { .opcode = 1, .nsid = 1, .prp1 = DATA, .dw10 = ~0u, .dw11 = ~0u }, 0x80 }, { { .opcode = 8, .nsid = 1, .dw10 = SECTORS - 1, .dw12 = 0xffff }, 0x80 },
        { { .opcode = 2, .nsid = 0, .prp1 = DATA }, 0xb }, { { .opcode = 2, .nsid = 2, .prp1 = DATA }, 0xb }, { { .opcode = 2, .nsid = ~0u, .prp1 = DATA }, 0xb },
        { { .opcode = 5, .nsid = 1, .prp1 = DATA }, 1 }, { { .opcode = 2, .flags = 1, .nsid = 1, .prp1 = DATA }, 2 },
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_int_equal(do_cmd(&io, bad[i].c), bad[i].status);
}

/* 6.7 */
static void test_deallocate(void **state UNUSED)
{
    struct { u32 attributes, lbas; u64 lba; } r[256] = { { 0, 8, 16 }, { 0, 0, 5 }, { 0, 8, 4096 } };

    put(&g, DATA, r, sizeof(r));
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 9, .nsid = 1, .prp1 = DATA, .dw10 = 2, .dw11 = 4 }), 0);
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 9, .nsid = 1, .prp1 = DATA, .dw10 = 255, .dw11 = 4 }), 0);
    r[255].lba = SECTORS + 1;
    put(&g, DATA, r, sizeof(r));
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 9, .nsid = 1, .prp1 = DATA, .dw10 = 255, .dw11 = 4 }), 0x80);
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 9, .nsid = 1, .prp1 = DATA, .dw10 = 255, .dw11 = 0 }), 0); /* a mere hint */
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 9, .nsid = 1, .prp1 = GUEST_RAM, .dw10 = 255, .dw11 = 4 }), 4);
    assert_int_equal(do_cmd(&io, rw(2, 15, 1, DATA, 0)), 0);
    assert_int_equal(word_at(DATA), 15 << 8);
}

static void test_readonly(void **state)
{
    teardown(state);
    open_disk(true);
    msix_on(3);
    enable();
    assert_int_equal(make_queues(), 0);
    assert_int_equal(do_cmd(&io, rw(1, 0, 1, DATA, 0)), 0x20);
    assert_int_equal(do_cmd(&io, rw(8, 0, 1, 0, 0)), 0x20);
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 9, .nsid = 1, .prp1 = DATA, .dw11 = 4 }), 0x20);
    assert_int_equal(do_cmd(&io, rw(2, 3, 1, DATA, 0)), 0);
    assert_int_equal(do_cmd(&io, (struct cmd){ .opcode = 0, .nsid = 1 }), 0);
}

/* Without MSI-X: the wire is up while there is a completion that the driver has not taken, and not masked (3.1.3). */
static void test_intx(void **state)
{
    teardown(state);
    open_disk(false);
    enable();
    assert_int_equal(g.intx, 0);
    add(&admin, (struct cmd){ .opcode = 0xa, .dw10 = 6 });
    ring(&admin);
    assert_int_equal(g.intx, 1);
    set(0xc, 1);
    assert_int_equal(g.intx, 0);
    set(0x10, 1);
    assert_int_equal(g.intx, 1);
    assert_int_equal(take(&admin, NULL), 0);
    assert_int_equal(g.intx, 0);
}

/* The completion queue is never overrun: commands wait until there is a place. */
static void test_full_completion_queue(void **state UNUSED)
{
    u16 cid, seen = 0;

    for (unsigned i = 0; i < N - 1; i++)
        add(&io, rw(2, i, 1, DATA, 0));
    ring(&io);
    for (unsigned i = 0; i < 200; i++) {
        u16 head = 0, status;

        get(&g, io.cq + 16 * io.head + 14, &status, 2);
        usleep(status & 1 ? 0 : 100);
        (void)head;
    }
    for (unsigned i = 0; i < N - 1; i++) {
        assert_int_equal(take(&io, &cid), 0);
        seen |= (u16)(1u << (cid & 15));
    }
    assert_int_equal(seen, 0x7fff);
    assert_true(nothing(&io));
}

static void test_resize_event(void **state UNUSED)
{
    u16 cid;
    u64 size;

    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 9, .dw10 = 0xb, .dw11 = 0x100 }), 0);
    add(&admin, (struct cmd){ .opcode = 0xc });
    ring(&admin);
    assert_true(nothing(&admin));
    for (unsigned i = 0; i < 4; i++) {
        add(&admin, (struct cmd){ .opcode = 0xc });
        ring(&admin);
    }
    assert_int_equal(take(&admin, NULL), 0x105);                   /* one too many */
    assert_int_equal(nvme_resize(nvme, (SECTORS + 8) * 512), 0);
    assert_int_equal(take(&admin, &cid), 0);
    assert_int_equal(dw0, 0x00040002);
    assert_true(nothing(&admin));
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 2, .prp1 = DATA, .dw10 = 4 | 1023 << 16 }), 0);
    assert_int_equal(word_at(DATA), 1);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 6, .nsid = 1, .prp1 = DATA }), 0);
    get(&g, DATA, &size, 8);
    assert_int_equal(size, SECTORS + 8);
    assert_int_equal(do_cmd(&io, rw(2, SECTORS + 7, 1, DATA, 0)), 0);
}

/* After RDY has gone nothing of before is written any more; and it starts again. */
static void test_reset_in_flight(void **state UNUSED)
{
    for (unsigned round = 0; round < 30; round++) {
        for (unsigned i = 0; i < N - 1; i++)
            add(&io, rw(2, i, 8, DATA + i * 4096, 0));
        ring(&io);
        set(0x14, 0);
        for (unsigned i = 0; i < 50000 && reg(0x1c); i++)
            usleep(100);
        assert_int_equal(reg(0x1c), 0);
        for (unsigned i = 0; i < N - 1; i++)
            put(&g, DATA + i * 4096, "\xaa\xaa\xaa\xaa", 4);
        usleep(200);
        for (unsigned i = 0; i < N - 1; i++)
            assert_int_equal(word_at(DATA + i * 4096), 0xaaaaaaaa);
        enable();
        assert_int_equal(make_queues(), 0);
    }
    assert_int_equal(do_cmd(&io, rw(2, 9, 1, DATA, 0)), 0);
    assert_int_equal(word_at(DATA), 9 << 8);
}

/* 5.6: a queue with commands in flight ends when they have. */
static void test_delete_in_flight(void **state UNUSED)
{
    for (unsigned i = 0; i < N - 1; i++)
        add(&io, rw(1, i * 8, 8, DATA, 0));
    ring(&io);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0, .dw10 = 1 }), 0);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 4, .dw10 = 1 }), 0);
    assert_int_equal(make_queues(), 0);
    assert_int_equal(do_cmd(&io, rw(2, 9999999, 1, DATA, 0)), 0x80);
}

/* 7.6.2 */
static void test_shutdown(void **state UNUSED)
{
    assert_int_equal(do_cmd(&io, rw(1, 0, 1, DATA, 0)), 0);
    set(0x14, 4 << 20 | 6 << 16 | 1 << 14 | 1);
    for (unsigned i = 0; i < 50000 && (reg(0x1c) >> 2 & 3) != 2; i++)
        usleep(100);
    assert_int_equal(reg(0x1c), 2 << 2 | 1);
}

static struct block *open_disk_of_host(const struct log *log)
{
    struct block *b = open_host();

    device_free(nvme);
    guest_free(&g);
    open_disk_of(b, log);
    msix_on(3);
    enable();
    assert_int_equal(make_queues(), 0);
    return b;
}

static void answer(struct block *b, int result)
{
    asked->result = result;
    block_done(b, asked);
}

static void ask(void)
{
    add(&io, rw(1, 0, 1, DATA, 0));
    ring(&io);
}

/* The host comes to be full while the controller waits: a command is held then, and the wait has an end; so for the flush of a shutdown. */
static void test_full(void **state UNUSED)
{
    unsigned warnings = 0;
    struct log log = { count_warnings, &warnings };
    struct block *b = open_disk_of_host(&log);
    struct device *dev = (struct device *)nvme;
    struct stream s, l;

    block_hold_full(b, nobody, NULL);
    ask();
    full_meanwhile(b, dev, dev->ops->quiesce, &warnings);
    assert_int_equal(block_held(b), 1);
    assert_true(nothing(&io));
    block_retry(b);
    answer(b, 0);
    assert_int_equal(take(&io, NULL), 0);

    set(0x14, 4 << 20 | 6 << 16 | 1 << 14 | 1);
    assert_int_equal(asked->op, BLOCK_FLUSH);
    answer(b, -ENOSPC);
    dev->ops->quiesce(dev);
    stream_save_init(&s);
    dev->ops->state(dev, &s);
    assert_int_equal(s.error, 0);
    ask();                                                         /* the flush that is held is not to be taken for this one */
    full_meanwhile(b, dev, dev->ops->quiesce, &warnings);
    assert_int_equal(block_held(b), 2);

    block_retry(b);
    full_meanwhile(b, dev, dev->ops->reset, &warnings);
    assert_false(dev->stuck);
    assert_int_equal(block_held(b), 0);

    b = open_disk_of_host(&log);                                   /* a shutdown goes on where it is loaded */
    device_load((struct device *)nvme, &l, s.buf, s.len);
    stream_free(&s);
    assert_int_equal(l.error, 0);
    assert_int_equal(reg(0x1c), 1 << 2 | 1);
    assert_int_equal(asked->op, BLOCK_FLUSH);
    answer(b, 0);
    assert_int_equal(reg(0x1c), 2 << 2 | 1);
}

static void test_state(void **state UNUSED)
{
    struct device *dev = (struct device *)nvme;
    struct stream s, l;

    assert_int_equal(do_cmd(&io, rw(2, 3, 1, DATA, 0)), 0);
    dev->ops->quiesce(dev);
    stream_save_init(&s);
    dev->ops->state(dev, &s);
    assert_int_equal(s.error, 0);
    for (unsigned bad = 0; bad < s.len; bad += 7) {                /* a damaged file: an error, or a state of some kind */
        dev->ops->reset(dev);
        s.buf[bad] ^= 0x55;
        device_load(dev, &l, s.buf, s.len);
        s.buf[bad] ^= 0x55;
    }
    dev->ops->reset(dev);
    device_load(dev, &l, s.buf, s.len);
    assert_int_equal(l.error, 0);
    assert_int_equal(l.pos, l.len);
    assert_int_equal(do_cmd(&io, rw(2, 4, 1, DATA, 0)), 0);
    assert_int_equal(word_at(DATA), 4 << 8);
    stream_free(&s);
}

/* 5.7, 7.13: doorbells in memory. What is written there without ringing is seen while the controller is awake; when it sleeps, it says which value wakes it. */
#define SHADOW 0x150000ull
#define EVENT 0x151000ull

static u32 event(unsigned id, unsigned cq)
{
    return word_at(EVENT + 8 * id + 4 * cq);
}

static void shadow_set(unsigned id, unsigned cq, u32 val)
{
    put(&g, SHADOW + 8 * id + 4 * cq, &val, sizeof(val));
}

/* The next completion, whose doorbell is not rung. */
static int take_silently(void)
{
    u16 status;

    for (unsigned i = 0; nothing(&io); i++, usleep(100))
        if (i == 50000)
            return -1;
    get(&g, IOCQ + 16 * io.head + 14, &status, 2);
    io.head = (io.head + 1) % N;
    io.phase ^= io.head == 0;
    shadow_set(1, 1, io.head);
    return status >> 1 & 0x7ff;
}

static void test_shadow(void **state UNUSED)
{
    static const u64 bad[][2] = { { SHADOW + 8, EVENT }, { SHADOW, EVENT + 4 }, { GUEST_RAM, EVENT }, { SHADOW, ~0xfffull } };

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0x7c, .prp1 = bad[i][0], .prp2 = bad[i][1] }), 2);
    put(&g, SHADOW, (u8[4096]){ 0 }, 4096);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0x7c, .prp1 = SHADOW, .prp2 = EVENT }), 0);
    assert_int_equal(event(1, 0), 0);
    assert_int_equal(event(1, 1), 0xffff);
    assert_int_equal(event(0, 0), admin.tail);                     /* the admin queues are always rung */
    for (unsigned i = 0; i < 3; i++)                               /* one ring, three commands */
        add(&io, rw(2, 20 + i, 1, DATA + 512 * i, 0));
    shadow_set(1, 0, 3);
    set(0x1008, 1);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(take_silently(), 0);
        assert_int_equal(word_at(DATA + 512 * i), (20 + i) << 8);
    }
    for (unsigned i = 0; i < 1000 && event(1, 0) != 3; i++)
        usleep(1000);
    assert_int_equal(event(1, 0), 3);
    shadow_set(1, 0, N);                                           /* beyond the queue: no tail, and no head either */
    shadow_set(1, 1, N + 7);
    set(0x1008, 3);
    assert_true(nothing(&io));
    shadow_set(1, 1, io.head);
    /* The completion queue fills up, and nobody takes anything: then the head is wanted. */
    for (unsigned i = 0; i < N - 1; i++)
        add(&io, rw(2, i, 1, DATA, 0));
    shadow_set(1, 0, io.tail);
    ring(&io);
    for (unsigned i = 0; i < 1000 && event(1, 0) != io.tail; i++)
        usleep(1000);
    add(&io, rw(2, 99, 1, DATA + 4096, 0));
    shadow_set(1, 0, io.tail);
    ring(&io);
    for (unsigned i = 0; i < 1000 && event(1, 1) != 3; i++)
        usleep(1000);
    assert_int_equal(event(1, 1), 3);
    for (unsigned i = 0; i < N - 1; i++)
        assert_int_equal(take_silently(), 0);
    assert_true(nothing(&io));
    set(0x100c, io.head);
    assert_int_equal(take_silently(), 0);
    assert_int_equal(word_at(DATA + 4096), 99 << 8);
    assert_int_equal(event(1, 1), 0xffff);
    /* New queues begin at 0 again; a reset ends all of it. */
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 0, .dw10 = 1 }), 0);
    assert_int_equal(do_cmd(&admin, (struct cmd){ .opcode = 4, .dw10 = 1 }), 0);
    assert_int_equal(make_queues(), 0);
    assert_int_equal(word_at(SHADOW + 8), 0);
    shadow_set(1, 0, 1);
    assert_int_equal(do_cmd(&io, rw(2, 5, 1, DATA, 0)), 0);
    set(0x14, 0);
    enable();
    assert_int_equal(make_queues(), 0);
    shadow_set(1, 0, 9);
    assert_int_equal(do_cmd(&io, rw(2, 6, 1, DATA, 0)), 0);
    assert_true(nothing(&io));
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_registers), T(test_bad_enable), T(test_identify), T(test_admin), T(test_queues), T(test_prps), T(test_bad_prps), T(test_io),
        T(test_deallocate), T(test_readonly), T(test_intx), T(test_full_completion_queue), T(test_resize_event), T(test_reset_in_flight),
        T(test_delete_in_flight), T(test_shutdown), T(test_full), T(test_state), T(test_shadow),
    };

    return cmocka_run_group_tests(tests, make_image, remove_image);
}
