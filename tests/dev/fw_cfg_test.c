/*
 * Firmware configuration (dev/fw_cfg) after QEMU's docs/specs/fw_cfg: items, directory, DMA with every kind of bad
 * request.
 */
#include "dev/chip.h"

#include <endian.h>
#include <stdlib.h>
#include <unistd.h>

#include "dev/fw_cfg.h"

#define MEMORY MiB
#define BLOCK 0x1000u
#define DATA  0x2000u

static struct bench bench;
static struct ram ram;
static struct fw_cfg *fw;

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    assert_int_equal(ram_init(&ram), 0);
    assert_int_equal(ram_add(&ram, 0, MEMORY), 0);
    return fw_cfg_new(bench.pio, &ram, &fw);
}

static int teardown(void **state UNUSED)
{
    chip_free(fw);
    ram_close(&ram);
    bench_close(&bench);
    return 0;
}

static void choose(u16 key)
{
    bus_write(bench.pio, FW_CFG_PORT, key, 2);
}

static u32 next(unsigned n)
{
    u32 v = 0;

    for (unsigned i = 0; i < n; i++)
        v |= (u32)in8(&bench, FW_CFG_PORT + 1) << (8 * i);
    return v;
}

static u32 dma(u32 control, u32 length, u64 address)
{
    struct { u32 control, length; u64 address; } d = { htobe32(control), htobe32(length), htobe64(address) };
    u32 result;

    assert_int_equal(ram_write(&ram, BLOCK, &d, sizeof d), 0);
    bus_write(bench.pio, FW_CFG_PORT + 4, 0, 4);
    bus_write(bench.pio, FW_CFG_PORT + 8, htobe32(BLOCK), 4);
    assert_int_equal(ram_read(&ram, BLOCK, &result, sizeof result), 0);
    return be32toh(result);
}

static void items(void **state UNUSED)
{
    choose(0);
    assert_int_equal(next(4), 0x554d4551);                         /* "QEMU" */
    assert_int_equal(next(4), 0);                                  /* behind the end */
    choose(1);
    assert_int_equal(next(4), 3);
    assert_int_equal(fw_cfg_int(fw, FW_CFG_NB_CPUS, 7, 2), 0);
    choose(FW_CFG_NB_CPUS);
    assert_int_equal(next(4), 7);
    choose(FW_CFG_NB_CPUS | 0x4000);                               /* once a write */
    assert_int_equal(next(2), 7);
    choose(0x8000);                                                /* an architecture's own: none, not item 0 */
    assert_int_equal(next(4), 0);
    choose(0x1234);
    assert_int_equal(next(4), 0);
    choose(0);
    chip_reset(fw);
    assert_int_equal(next(1), 'Q');
    assert_int_equal(be32toh((u32)bus_read(bench.pio, FW_CFG_PORT + 4, 4)), 0x51454d55);
    assert_int_equal(be32toh((u32)bus_read(bench.pio, FW_CFG_PORT + 8, 4)), 0x20434647);
}

static void directory(void **state UNUSED)
{
    static const char *const names[] = { "etc/b", "etc/a", "opt/c" };
    char name[56];

    choose(0x19);
    assert_int_equal(next(4), 0);
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(fw_cfg_file(fw, names[i], names[i], (u32)i + 3), 0);
    choose(0x19);
    assert_int_equal(be32toh(next(4)), 3);
    for (unsigned i = 0; i < 3; i++) {                             /* by name; keys as they were added */
        static const unsigned order[] = { 1, 0, 2 };

        assert_int_equal(be32toh(next(4)), order[i] + 3);
        assert_int_equal(be16toh((u16)next(2)), 0x20 + order[i]);
        assert_int_equal(next(2), 0);
        for (unsigned n = 0; n < sizeof name; n++)
            name[n] = (char)next(1);
        assert_string_equal(name, names[order[i]]);
    }
    choose(0x21);
    assert_int_equal(next(4), 0x2f637465);
}

static void by_dma(void **state UNUSED)
{
    u8 big[10000], got[10000];

    for (unsigned i = 0; i < sizeof big; i++)
        big[i] = (u8)(i * 7 + (i >> 8));
    assert_int_equal(fw_cfg_file(fw, "etc/big", big, sizeof big), 0);
    assert_int_equal(dma(0x20u << 16 | 8 | 2, sizeof big, DATA), 0);
    assert_int_equal(ram_read(&ram, DATA, got, sizeof got), 0);
    assert_memory_equal(got, big, sizeof big);
    assert_int_equal(dma(0x20u << 16 | 8 | 4, 5000, 0), 0);        /* skip, then read over the end */
    memset(got, 0xff, sizeof got);
    assert_int_equal(ram_write(&ram, DATA, got, sizeof got), 0);
    assert_int_equal(dma(2, 6000, DATA), 0);
    assert_int_equal(ram_read(&ram, DATA, got, sizeof got), 0);
    assert_memory_equal(got, big + 5000, 5000);
    assert_int_equal(got[5000], 0);
    assert_int_equal(got[5999], 0);
    assert_int_equal(got[6000], 0xff);
    /* no memory there, too long, a write; the request itself outside of memory */
    assert_int_equal(dma(0x20u << 16 | 8 | 2, 16, MEMORY - 8), 1);
    assert_int_equal(dma(0x20u << 16 | 8 | 2, ~0u, 0), 1);
    assert_int_equal(dma(0x20u << 16 | 8 | 2, 16, ~0ull - 4), 1);
    assert_int_equal(dma(0x20u << 16 | 8 | 16, 16, DATA), 1);
    assert_int_equal(dma(8 | 4, ~0u, 0), 0);
    assert_int_equal(dma(4, ~0u, 0), 0);
    assert_int_equal(next(1), 0);
    bus_write(bench.pio, FW_CFG_PORT + 4, ~0u, 4);
    bus_write(bench.pio, FW_CFG_PORT + 8, ~0u, 4);
}

static void host_files(void **state UNUSED)
{
    char path[] = "/tmp/doppel-fw-XXXXXX";
    int fd = mkstemp(path);

    assert_int_equal(write(fd, "0123456789", 10), 10);
    assert_int_equal(fw_cfg_host_file(fw, FW_CFG_KERNEL_DATA, fd, 4, 6), 0);
    close(fd);
    choose(FW_CFG_KERNEL_DATA);
    assert_int_equal(next(4), 0x37363534);
    assert_int_equal(truncate(path, 5), 0);                        /* what has gone reads as zero */
    assert_int_equal(next(2), 0);
    unlink(path);
}

static void state_moves(void **state UNUSED)
{
    struct fw_cfg *to;

    choose(0);
    next(2);
    assert_int_equal(fw_cfg_new(bench.mmio, &ram, &to), 0);
    chip_transplant(fw, to);
    assert_int_equal(bus_read(bench.mmio, FW_CFG_PORT + 1, 1), 'M');
    chip_free(to);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = { T(items), T(directory), T(by_dma), T(host_files), T(state_moves) };
    return cmocka_run_group_tests_name("fw_cfg", tests, NULL, NULL);
}
