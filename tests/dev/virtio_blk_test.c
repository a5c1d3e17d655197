/* The disk as its driver sees it: requests of all kinds against an image file, malformed ones, resets with requests in flight, save and load. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <linux/virtio_blk.h>

#include "dev/virtio_blk.h"
#include "disk_guest.h"

#define DEV 4
#define SECTORS 2048u
#define HEAD 0x200000ull
#define STATUS 0x210000ull
#define DATA 0x220000ull
#define ALL (BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC) | BIT(VIRTIO_BLK_F_FLUSH))

static struct virtio_blk *blk;
static struct vdev d;

static void open_disk(bool readonly)
{
    guest_new(&g);
    assert_int_equal(virtio_blk_new(&g.ram, NULL, open_image(readonly), "serial-0123456789abcdef", 2, &blk), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 20, false, (struct virtio *)blk), 0);
    vdev_find(&d, &g, DEV);
}

static int setup(void **state UNUSED)
{
    write_image(SECTORS);
    open_disk(false);
    assert_true(vdev_start(&d, &g, DEV, ALL, 64));
    return 0;
}

static int setup_packed(void **state)
{
    setup(state);
    vdev_set_status(&d, 0);
    g.heap = GUEST_HEAP;
    assert_true(vdev_start(&d, &g, DEV, ALL | BIT(VIRTIO_F_RING_PACKED), 64));
    return 0;
}

static int teardown(void **state UNUSED)
{
    device_free(blk);
    guest_free(&g);
    return 0;
}

static void put_head(u64 at, u32 type, u64 sector)
{
    struct virtio_blk_outhdr h = { .type = type, .sector = sector };

    put(&g, at, &h, sizeof(h));
    put(&g, STATUS, "\xee", 1);
}

static u8 status(void)
{
    u8 s;

    get(&g, STATUS, &s, 1);
    return s;
}

/* One request with one data buffer, or none; its status, and the used length. */
static u8 request(u32 type, u64 sector, u64 data, u32 len, bool write, u32 *used_len)
{
    struct buf b[3] = { { HEAD, 16, false }, { data, len, write }, { STATUS, 1, true } };
    u32 id, used;

    put_head(HEAD, type, sector);
    if (!len)
        b[1] = b[2];
    gq_add(&d.q[0], b, len ? 3 : 2);
    vdev_kick(&d, 0);
    assert_true(vdev_wait(&d, 0, &id, &used));
    if (used_len)
        *used_len = used;
    return status();
}

static void test_config(void **state UNUSED)
{
    assert_int_equal(ecam_read(&g, DEV, PCI_DEVICE_ID, 2), 0x1042);
    assert_int_equal(bus_read(g.mmio, d.config, 8), SECTORS);
    assert_int_equal(bus_read(g.mmio, d.config + offsetof(struct virtio_blk_config, blk_size), 4), 512);
    assert_true(vdev_features(&d) & BIT(VIRTIO_BLK_F_FLUSH));
    assert_false(vdev_features(&d) & BIT(VIRTIO_BLK_F_RO));
    assert_true(bus_read(g.mmio, d.config + offsetof(struct virtio_blk_config, seg_max), 4) > 64);
}

static void test_read(void **state UNUSED)
{
    u32 len;

    assert_int_equal(request(VIRTIO_BLK_T_IN, 5, DATA, 4096, true, &len), VIRTIO_BLK_S_OK);
    assert_int_equal(len, 4097);
    for (unsigned i = 0; i < 1024; i++)
        assert_int_equal(word_at(DATA + 4 * i), (5 + i / 128) << 8 | i % 128);
    assert_int_equal(g.msi[1], 1);
}

static void test_write_and_read(void **state UNUSED)
{
    u8 out[1024], in[1024];
    u32 len;
    int fd;

    for (unsigned i = 0; i < sizeof(out); i++)
        out[i] = (u8)(i * 3);
    put(&g, DATA, out, sizeof(out));
    assert_int_equal(request(VIRTIO_BLK_T_OUT, 100, DATA, 1024, false, &len), VIRTIO_BLK_S_OK);
    assert_int_equal(len, 1);
    assert_int_equal(request(VIRTIO_BLK_T_FLUSH, 0, 0, 0, false, &len), VIRTIO_BLK_S_OK);
    fd = open(image, O_RDONLY);
    assert_int_equal(pread(fd, in, sizeof(in), 100 * 512), sizeof(in));
    close(fd);
    assert_memory_equal(in, out, sizeof(in));
    assert_int_equal(request(VIRTIO_BLK_T_IN, 102, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
    assert_int_equal(word_at(DATA), 102 << 8);                     /* the sector behind is as it was */
}

static void test_out_of_disk(void **state UNUSED)
{
    static const struct { u64 sector; u32 len; } bad[] = {
        { SECTORS, 512 }, { SECTORS - 1, 1024 }, { ~0ull, 512 }, { ~0ull / 512, 512 }, { 1ull << 55, 512 }, { 0, 511 }, { 0, 513 }
    };
    u32 len;

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_int_equal(request(VIRTIO_BLK_T_IN, bad[i].sector, DATA, bad[i].len, true, &len), VIRTIO_BLK_S_IOERR);
        assert_int_equal(len, 0);
        assert_int_equal(request(VIRTIO_BLK_T_OUT, bad[i].sector, DATA, bad[i].len, false, &len), VIRTIO_BLK_S_IOERR);
    }
    assert_int_equal(request(VIRTIO_BLK_T_IN, SECTORS - 1, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
}

static void test_unsupported(void **state UNUSED)
{
    assert_int_equal(request(VIRTIO_BLK_T_SECURE_ERASE, 0, DATA, 16, false, NULL), VIRTIO_BLK_S_UNSUPP);
    assert_int_equal(request(0xdeadbeef, 0, DATA, 16, true, NULL), VIRTIO_BLK_S_UNSUPP);
    assert_int_equal(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
}

static u8 ranges(u32 type, const struct virtio_blk_discard_write_zeroes *r, unsigned n)
{
    put(&g, DATA, r, n * sizeof(*r));
    return request(type, 0, DATA, n * (u32)sizeof(*r), false, NULL);
}

static void test_discard_and_zeroes(void **state UNUSED)
{
    static const struct virtio_blk_discard_write_zeroes good[] = { { 10, 2, 0 }, { 20, 1, 1 }, { 0, 0, 0 }, { SECTORS - 1, 1, 0 } };
    static const struct { struct virtio_blk_discard_write_zeroes r; u32 type; u8 status; } bad[] = {
        { { 10, 1, 1 }, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_S_UNSUPP }, { { 10, 1, 2 }, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_S_UNSUPP },
        { { SECTORS, 1, 0 }, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_S_IOERR }, { { ~0ull, 1, 0 }, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_S_IOERR },
        { { 1, SECTORS, 0 }, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_S_IOERR }, { { 0, ~0u, 0 }, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_S_IOERR },
    };
    struct virtio_blk_discard_write_zeroes many[65] = { { 10, 1, 0 } };

    assert_true(vdev_features(&d) & BIT(VIRTIO_BLK_F_DISCARD));
    assert_true(vdev_features(&d) & BIT(VIRTIO_BLK_F_WRITE_ZEROES));
    assert_int_equal(ranges(VIRTIO_BLK_T_WRITE_ZEROES, good, ARRAY_SIZE(good)), VIRTIO_BLK_S_OK);
    for (u64 s = 9; s < 22; s++) {
        assert_int_equal(request(VIRTIO_BLK_T_IN, s, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
        assert_int_equal(word_at(DATA + 508), s == 10 || s == 11 || s == 20 ? 0 : s << 8 | 127);
    }
    assert_int_equal(ranges(VIRTIO_BLK_T_DISCARD, good + 2, 2), VIRTIO_BLK_S_OK);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_int_equal(ranges(bad[i].type, &bad[i].r, 1), bad[i].status);
    assert_int_equal(ranges(VIRTIO_BLK_T_DISCARD, many, 64), VIRTIO_BLK_S_OK);
    assert_int_equal(ranges(VIRTIO_BLK_T_DISCARD, many, 65), VIRTIO_BLK_S_IOERR);
    assert_int_equal(request(VIRTIO_BLK_T_DISCARD, 0, DATA, 15, false, NULL), VIRTIO_BLK_S_IOERR);
    assert_int_equal(request(VIRTIO_BLK_T_DISCARD, 0, 0, 0, false, NULL), VIRTIO_BLK_S_IOERR);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 1, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
    assert_int_equal(word_at(DATA), 1 << 8);
}

/* The second queue has an interrupt of its own, and both work at once. */
static void test_queues(void **state UNUSED)
{
    u32 id, len;

    vdev_set_status(&d, 0);
    assert_true(vdev_start(&d, &g, DEV, ALL | BIT(VIRTIO_BLK_F_MQ), 64));
    assert_int_equal(bus_read(g.mmio, d.config + offsetof(struct virtio_blk_config, num_queues), 2), 2);
    assert_int_equal(common_get(&d, COMMON(num_queues), 2), 2);
    for (unsigned n = 0; n < 2; n++) {
        put_head(HEAD + 32 * n, VIRTIO_BLK_T_IN, 40 + n);
        gq_add(&d.q[n], (struct buf[]){ { HEAD + 32 * n, 16, false }, { DATA + 512 * n, 512, true }, { STATUS, 1, true } }, 3);
    }
    g.msi[1] = g.msi[2] = 0;
    vdev_kick(&d, 1);
    assert_true(vdev_wait(&d, 1, &id, &len));
    assert_false(gq_used(&d.q[0], &id, &len));
    assert_true(g.msi[2] == 1 && g.msi[1] == 0);
    assert_int_equal(word_at(DATA + 512), 41 << 8);
    vdev_kick(&d, 0);
    assert_true(vdev_wait(&d, 0, &id, &len));
    assert_int_equal(word_at(DATA), 40 << 8);
}

/* The cache's switch: only where it is negotiated, and one bit of it. */
static void test_cache_switch(void **state UNUSED)
{
    u64 wce = d.config + offsetof(struct virtio_blk_config, wce);

    assert_int_equal(bus_read(g.mmio, wce, 1), 1);
    bus_write(g.mmio, wce, 0, 1);
    assert_int_equal(bus_read(g.mmio, wce, 1), 1);
    vdev_set_status(&d, 0);
    assert_true(vdev_start(&d, &g, DEV, ALL | BIT(VIRTIO_BLK_F_CONFIG_WCE), 64));
    bus_write(g.mmio, wce, 0xfe, 1);
    assert_int_equal(bus_read(g.mmio, wce, 1), 0);
    assert_int_equal(request(VIRTIO_BLK_T_OUT, 7, DATA, 512, false, NULL), VIRTIO_BLK_S_OK);
    bus_write(g.mmio, d.config, 0xff, 1);
    assert_int_equal(bus_read(g.mmio, d.config, 8), SECTORS);
}

static void test_get_id(void **state UNUSED)
{
    char id[32] = "";
    u32 len;

    assert_int_equal(request(VIRTIO_BLK_T_GET_ID, 0, DATA, 20, true, &len), VIRTIO_BLK_S_OK);
    get(&g, DATA, id, 20);
    assert_string_equal(id, "serial-0123456789abc");
    assert_int_equal(len, 21);
    assert_int_equal(request(VIRTIO_BLK_T_GET_ID, 0, DATA, 5, true, &len), VIRTIO_BLK_S_OK);
    assert_int_equal(request(VIRTIO_BLK_T_GET_ID, 0, DATA, 200, true, &len), VIRTIO_BLK_S_OK);
    assert_int_equal(len, 20);
}

static void test_readonly(void **state UNUSED)
{
    device_free(blk);
    guest_free(&g);
    open_disk(true);
    assert_true(vdev_features(&d) & BIT(VIRTIO_BLK_F_RO));
    assert_true(vdev_start(&d, &g, DEV, ALL, 64));
    assert_int_equal(request(VIRTIO_BLK_T_OUT, 0, DATA, 512, false, NULL), VIRTIO_BLK_S_IOERR);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 3, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
    assert_int_equal(word_at(DATA), 3 << 8);
}

/* Header and status need not be buffers of their own (2.7.4: no layout is to be assumed). */
static void test_any_layout(void **state UNUSED)
{
    u32 id, len;

    put_head(HEAD, VIRTIO_BLK_T_IN, 9);
    gq_add(&d.q[0], (struct buf[]){ { HEAD, 3, false }, { HEAD + 3, 13, false }, { DATA, 100, true }, { DATA + 100, 413, true } }, 4);
    vdev_kick(&d, 0);
    assert_true(vdev_wait(&d, 0, &id, &len));
    assert_int_equal(len, 513);
    assert_int_equal(word_at(DATA + 4), 9 << 8 | 1);
    assert_int_equal(word_at(DATA + 508), 9 << 8 | 127);
    assert_int_equal(word_at(DATA + 512) & 0xff, VIRTIO_BLK_S_OK);
}

static void broken(const struct buf *b, unsigned n)
{
    u32 id, len;

    assert_true(vdev_start(&d, &g, DEV, ALL, 64));
    put_head(HEAD, VIRTIO_BLK_T_IN, 0);
    gq_add(&d.q[0], b, n);
    vdev_kick(&d, 0);
    assert_true(vdev_status(&d) & VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_false(gq_used(&d.q[0], &id, &len));
    vdev_set_status(&d, 0);
    assert_int_equal(vdev_status(&d), 0);
}

static void test_malformed(void **state UNUSED)
{
    vdev_set_status(&d, 0);
    broken((struct buf[]){ { HEAD, 16, false } }, 1);              /* no place for the status */
    broken((struct buf[]){ { HEAD, 15, false }, { STATUS, 1, true } }, 2);
    broken((struct buf[]){ { STATUS, 1, true } }, 1);
    broken((struct buf[]){ { HEAD, 16, false }, { GUEST_RAM, 512, true }, { STATUS, 1, true } }, 3);
    assert_true(vdev_start(&d, &g, DEV, ALL, 64));
    assert_int_equal(request(VIRTIO_BLK_T_IN, 3, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
}

/* The ring stays full for a while; every answer is for the right request. In a packed ring chains need no place of their own. */
static void test_many(void **state UNUSED)
{
    unsigned sent = 0, seen = 0, each = d.packed ? 1 : 3;
    u64 at[64] = { 0 };

    while (seen < 2000) {
        u32 id, len;

        while (sent < 2000 && sent - seen < 21) {
            unsigned slot;

            if (!d.packed && d.q[0].next_desc % 64 == 63)
                d.q[0].next_desc++;
            slot = d.q[0].next_desc % 64 / each;
            if (at[slot])
                break;                                             /* its descriptors are in use */
            at[slot] = 1 + sent * 7 % SECTORS;
            put_head(HEAD + 32 * slot, VIRTIO_BLK_T_IN, at[slot] - 1);
            gq_add(&d.q[0], (struct buf[]){ { HEAD + 32 * slot, 16, false }, { DATA + 512 * slot, 512, true }, { STATUS + slot, 1, true } }, 3);
            sent++;
        }
        vdev_kick(&d, 0);
        assert_true(vdev_wait(&d, 0, &id, &len));
        assert_int_equal(len, 513);
        assert_true(id < 64 && at[id / each]);
        assert_int_equal(word_at(DATA + 512 * (id / each)), (at[id / each] - 1) << 8);
        at[id / each] = 0;
        seen++;
    }
}

/* One notification has a vCPU's thread copy BLOCK_AT_ONCE_MAX bytes: what goes beyond is another thread's, whatever the page cache holds. */
static void test_at_once(void **state UNUSED)
{
    const unsigned n = 5;
    u32 id, len;

    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, DATA, BLOCK_AT_ONCE_MAX, true, NULL), VIRTIO_BLK_S_OK);
    if (!virtio_blk_counts(blk).at_once) {
        print_message("# skip: /tmp's file system has no RWF_NOWAIT\n");
        skip();
    }
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
    assert_int_equal(virtio_blk_counts(blk).at_once, 2);
    for (unsigned i = 0; i < n; i++) {
        put_head(HEAD + 32 * i, VIRTIO_BLK_T_IN, 1024 * (i % 2));
        gq_add(&d.q[0], (struct buf[]){ { HEAD + 32 * i, 16, false }, { DATA + i * BLOCK_AT_ONCE_MAX / 2, BLOCK_AT_ONCE_MAX / 2, true }, { STATUS + i, 1, true } }, 3);
    }
    vdev_kick(&d, 0);
    for (unsigned i = 0; i < n; i++)
        assert_true(vdev_wait(&d, 0, &id, &len));
    for (unsigned i = 0; i < n; i++)
        assert_int_equal(word_at(DATA + i * BLOCK_AT_ONCE_MAX / 2), (i % 2 * 1024) << 8);
    assert_in_range(virtio_blk_counts(blk).at_once, 4, n + 1);       /* a request that comes back lets the thread it comes on go on */
}

/* A driver that makes available more than the ring can hold at once, by reusing descriptors: the device takes no more than it has room for. */
static void test_flood(void **state UNUSED)
{
    put_head(HEAD, VIRTIO_BLK_T_IN, 0);
    gq_add(&d.q[0], (struct buf[]){ { HEAD, 16, false }, { DATA, 64 * KiB, true }, { STATUS, 1, true } }, 3);
    for (unsigned i = 0; i < 3000; i++) {
        gq_offer(&d.q[0], 0);
        if (i % 50 == 0)
            vdev_kick(&d, 0);
    }
    ((struct device *)blk)->ops->quiesce((struct device *)blk);
    vdev_set_status(&d, 0);
    for (unsigned i = 0; i < 20000 && vdev_status(&d); i++)
        usleep(100);
    assert_int_equal(vdev_status(&d), 0);
}

/* After status reads 0, no request of before writes into memory any more. */
static void test_reset_in_flight(void **state UNUSED)
{
    u32 id, len;

    for (unsigned round = 0; round < 50; round++) {
        for (unsigned i = 0; i < 16; i++) {
            put_head(HEAD + 32 * i, VIRTIO_BLK_T_IN, 0);
            gq_add(&d.q[0], (struct buf[]){ { HEAD + 32 * i, 16, false }, { DATA + i * 64 * KiB, 64 * KiB, true }, { STATUS, 1, true } }, 3);
        }
        vdev_kick(&d, 0);
        vdev_set_status(&d, 0);
        for (unsigned i = 0; i < 20000 && vdev_status(&d); i++)
            usleep(100);
        assert_int_equal(vdev_status(&d), 0);
        for (unsigned i = 0; i < 16; i++)
            put(&g, DATA + i * 64 * KiB + 4, "\xaa\xaa\xaa\xaa", 4);
        g.heap = GUEST_HEAP;
        assert_true(vdev_start(&d, &g, DEV, ALL, 64));
        usleep(200);
        for (unsigned i = 0; i < 16; i++)
            assert_int_equal(word_at(DATA + i * 64 * KiB + 4), 0xaaaaaaaa);
        assert_false(gq_used(&d.q[0], &id, &len));
    }
    assert_int_equal(request(VIRTIO_BLK_T_IN, 3, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
}

static void test_power_on_reset_in_flight(void **state UNUSED)
{
    put_head(HEAD, VIRTIO_BLK_T_IN, 0);
    for (unsigned i = 0; i < 16; i++)
        gq_add(&d.q[0], (struct buf[]){ { HEAD, 16, false }, { DATA + i * 64 * KiB, 64 * KiB, true }, { STATUS, 1, true } }, 3);
    vdev_kick(&d, 0);
    ((struct device *)blk)->ops->reset((struct device *)blk);
    ram_clear(&g.ram);
    usleep(1000);
    for (unsigned i = 0; i < 16; i++)
        assert_int_equal(word_at(DATA + i * 64 * KiB + 4), 0);
    g.heap = GUEST_HEAP;
    assert_true(vdev_start(&d, &g, DEV, ALL, 64));
    assert_int_equal(request(VIRTIO_BLK_T_IN, 3, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
}

static void test_resize(void **state UNUSED)
{
    u8 generation = (u8)common_get(&d, COMMON(config_generation), 1);

    assert_int_equal(request(VIRTIO_BLK_T_IN, SECTORS, DATA, 512, true, NULL), VIRTIO_BLK_S_IOERR);
    assert_int_equal(truncate(image, (SECTORS + 8) * 512), 0);
    assert_int_equal(virtio_blk_resize(blk, 0), 0);
    assert_int_equal(g.msi[0], 1);
    assert_int_not_equal(common_get(&d, COMMON(config_generation), 1), generation);
    assert_int_equal(bus_read(g.mmio, d.config, 8), SECTORS + 8);
    assert_int_equal(request(VIRTIO_BLK_T_IN, SECTORS, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
}

/* The host fails: the guest gets an I/O error, the log one line. */
static void test_host_error(void **state UNUSED)
{
    assert_int_equal(truncate(image, 512), 0);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 100, DATA, 512, true, NULL), VIRTIO_BLK_S_IOERR);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 0, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
}

static struct block *open_disk_of_host(const struct log *log)
{
    struct block *b = open_host();

    device_free(blk);
    guest_free(&g);
    guest_new(&g);
    assert_int_equal(virtio_blk_new(&g.ram, log, b, "x", 1, &blk), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 20, false, (struct virtio *)blk), 0);
    vdev_find(&d, &g, DEV);
    assert_true(vdev_start(&d, &g, DEV, ALL, 64));
    return b;
}

static void ask(void)
{
    put_head(HEAD, VIRTIO_BLK_T_OUT, 0);
    gq_add(&d.q[0], (struct buf[]){ { HEAD, 16, false }, { DATA, 512, false }, { STATUS, 1, true } }, 3);
    vdev_kick(&d, 0);
}

/* A host that does not answer: what waits for it does so for a while only, and what it answers in the end does no harm. */
static void test_host_hangs(void **state UNUSED)
{
    struct block *b = open_disk_of_host(NULL);
    struct device *dev = (struct device *)blk;

    ask();
    assert_non_null(asked);
    vdev_set_status(&d, 0);
    assert_int_not_equal(vdev_status(&d), 0);                      /* the driver sees that it has to wait */
    dev->ops->reset(dev);
    assert_true(dev->stuck);
    asked->result = -EIO;
    block_done(b, asked);
    dev->ops->reset(dev);
    assert_false(dev->stuck);
    assert_int_equal(vdev_status(&d), 0);
    assert_int_equal(status(), 0xee);                              /* nothing was written */
}

/* The host comes to be full while the device waits: the request is held then, and the wait has an end; it is answered when there is room, or fails by a reset. */
static void test_full(void **state UNUSED)
{
    unsigned warnings = 0;
    struct log log = { count_warnings, &warnings };
    struct block *b = open_disk_of_host(&log);
    struct device *dev = (struct device *)blk;

    block_hold_full(b, nobody, NULL);
    ask();
    full_meanwhile(b, dev, dev->ops->quiesce, &warnings);
    assert_int_equal(block_held(b), 1);
    assert_int_equal(status(), 0xee);
    block_retry(b);
    asked->result = 0;
    block_done(b, asked);
    assert_int_equal(status(), VIRTIO_BLK_S_OK);
    ask();
    full_meanwhile(b, dev, dev->ops->reset, &warnings);
    assert_false(dev->stuck);
    assert_int_equal(block_held(b), 0);
}

static void test_state(void **state UNUSED)
{
    struct device *dev = (struct device *)blk;
    struct stream s, l;

    assert_int_equal(request(VIRTIO_BLK_T_IN, 3, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
    dev->ops->quiesce(dev);
    stream_save_init(&s);
    dev->ops->state(dev, &s);
    assert_int_equal(s.error, 0);
    dev->ops->reset(dev);
    device_load(dev, &l, s.buf, s.len);
    assert_int_equal(l.error, 0);
    assert_int_equal(l.pos, l.len);
    assert_int_equal(request(VIRTIO_BLK_T_IN, 4, DATA, 512, true, NULL), VIRTIO_BLK_S_OK);
    assert_int_equal(word_at(DATA), 4 << 8);
    /* One in flight, as a slow host would leave it: its chain, and the counts of both queues. It is done after the load. */
    put_head(HEAD, VIRTIO_BLK_T_IN, 77);
    s.len -= 4;
    s.buf = realloc(s.buf, s.len + 100);
    u16 count = 1, parts = 3, head = 60, entries = d.packed ? 3 : 0;
    static struct { u64 gpa; u32 len; bool write; } part[] = { { HEAD, 16, false }, { DATA, 512, true }, { STATUS, 1, true } };
    struct stream more;
    u32 id, len;

    stream_save_init(&more);
    stream_u16(&more, &count);
    stream_u16(&more, &head);
    stream_u16(&more, &entries);
    stream_u16(&more, &parts);
    for (unsigned i = 0; i < 3; i++) {
        stream_u64(&more, &part[i].gpa);
        stream_u32(&more, &part[i].len);
        stream_bool(&more, &part[i].write);
    }
    stream_u16(&more, &(u16){ 0 });
    for (unsigned bad = 0; bad < 2; bad++) {
        memcpy(s.buf + s.len, more.buf, more.len);
        if (bad)
            memset(s.buf + s.len + 8, 0xff, 8);                    /* its header lies nowhere */
        dev->ops->reset(dev);
        if (!d.packed) {
            put(&g, d.q[0].used + 2, (u16[]){ 1 }, 2);             /* memory as it was at the save */
            d.q[0].used_seen = 1;
        } else {
            put(&g, d.q[0].desc + 3 * 16, (u8[16]){ 0 }, 16);
            d.q[0].used_seen = 3;
            d.q[0].entries[60] = 3;
        }
        device_load(dev, &l, s.buf, s.len + more.len);
        assert_int_equal(l.error != 0, bad);
        if (bad)
            continue;
        assert_true(vdev_wait(&d, 0, &id, &len));
        assert_int_equal(id, 60);
        assert_int_equal(word_at(DATA), 77 << 8);
    }
    stream_free(&more);
    stream_free(&s);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
#define P(name) { #name " (packed)", name, setup_packed, teardown, NULL }

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_config), T(test_read), T(test_write_and_read), T(test_out_of_disk), T(test_unsupported), T(test_discard_and_zeroes), T(test_queues), T(test_cache_switch), T(test_get_id), T(test_readonly),
        T(test_any_layout), T(test_malformed), T(test_many), T(test_at_once), T(test_flood), T(test_reset_in_flight), T(test_power_on_reset_in_flight),
        T(test_resize), T(test_host_error), T(test_host_hangs), T(test_full), T(test_state),
        P(test_read), P(test_write_and_read), P(test_out_of_disk), P(test_discard_and_zeroes), P(test_get_id), P(test_any_layout),
        P(test_many), P(test_power_on_reset_in_flight), P(test_state),
    };

    return cmocka_run_group_tests(tests, make_image, remove_image);
}
