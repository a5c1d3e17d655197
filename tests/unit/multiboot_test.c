/*
 * Multiboot images, boot sectors and firmware: made by hand, good ones and each kind of bad one. Bad ones must give an error
 * that names the file; the good ones are also booted whole by tests/boot/multiboot.sh.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/err.h"
#include "vm/boot.h"

#define MEMORY (64 * MiB)
#define LOAD   0x200000u

struct world {
    struct ram ram;
    struct e820 map;
    struct x86 bsp;
    struct boot_config config;
};

static const struct e820_entry reserved[] = { { 0x9f000, 0x1000, E820_RESERVED }, { 0xe0000, 0x20000, E820_RESERVED } };

static int setup(void **state)
{
    struct world *w = calloc(1, sizeof *w);

    assert_non_null(w);
    assert_int_equal(ram_init(&w->ram), 0);
    assert_int_equal(ram_add(&w->ram, 0, 0xa0000), 0);
    assert_int_equal(ram_add(&w->ram, 0xc0000, MEMORY - 0xc0000), 0);
    assert_int_equal(e820_build(&w->map, &w->ram, reserved, ARRAY_SIZE(reserved)), 0);
    w->config = (struct boot_config){ .kernel = "K", .cmdline = "a b", .map = &w->map, .rsdp_gpa = 0xe0000 };
    *state = w;
    return 0;
}

static int teardown(void **state)
{
    struct world *w = *state;

    ram_close(&w->ram);
    free(w);
    return 0;
}

static struct boot_file bytes(const char *path, const void *p, u64 size)
{
    return (struct boot_file){ .path = path, .what = "kernel", .fd = -1, .bytes = p, .size = size };
}

static int place(struct world *w, const void *kernel, u64 size)
{
    struct boot_load l = { .ram = &w->ram, .config = &w->config, .bsp = &w->bsp, .kernel = bytes("K", kernel, size) };

    return boot_place(&l);
}

static u32 peek(struct world *w, u64 gpa)
{
    u32 v = 0;

    assert_int_equal(ram_read(&w->ram, gpa, &v, sizeof v), 0);
    return v;
}

static void assert_refused(int rc, const char *word)
{
    assert_true(rc < 0);
    if (!strstr(err_last(), word))
        fail_msg("\"%s\" has no \"%s\"", err_last(), word);
}

/* ---- version 1 ---- */

struct image1 {
    u8 before[64];
    u32 magic, flags, checksum, header_addr, load_addr, load_end, bss_end, entry, graphics[4];
    u8 code[256];
};

static struct image1 make1(void)
{
    struct image1 i = { .magic = 0x1badb002, .flags = 0x10003, .header_addr = LOAD + 64, .load_addr = LOAD, .load_end = LOAD + sizeof i,
                        .bss_end = LOAD + 0x5000, .entry = LOAD + offsetof(struct image1, code) };

    memset(i.code, 0x90, sizeof i.code);
    return i;
}

static int place1(struct world *w, struct image1 i)
{
    i.checksum = -(i.magic + i.flags);
    return place(w, &i, sizeof i);
}

static void test_one(void **state)
{
    struct world *w = *state;
    struct image1 i = make1();
    u8 junk[0x5000];

    memset(junk, 0xff, sizeof junk);
    assert_int_equal(ram_write(&w->ram, LOAD, junk, sizeof junk), 0);
    assert_int_equal(place1(w, i), 0);
    assert_int_equal(w->bsp.rip, i.entry);
    assert_int_equal(w->bsp.gpr[RAX], 0x2badb002);
    assert_int_equal(w->bsp.gpr[RBX], BOOT_INFO);
    assert_int_equal(w->bsp.cr0 & (CR0_PE | CR0_PG), CR0_PE);
    assert_int_equal(w->bsp.rflags & FLAG_IF, 0);
    assert_int_equal(peek(w, i.entry), 0x90909090);
    assert_int_equal(peek(w, LOAD + sizeof i), 0);                 /* BSS */
    assert_int_equal(peek(w, LOAD + 0x4ffc), 0);
    assert_int_equal(peek(w, BOOT_INFO) & 0x245, 0x245);           /* memory, command line, map, name */
    assert_int_equal(peek(w, BOOT_INFO) & 8, 0);                   /* no modules */
    assert_int_equal(peek(w, BOOT_INFO + 4), 636);
    assert_int_equal(peek(w, BOOT_INFO + 8), (MEMORY - MiB) / KiB);
    assert_int_equal(peek(w, peek(w, BOOT_INFO + 16)), 0x622061);  /* "a b" */
    /* to the end of the file, and no BSS */
    i.load_end = i.bss_end = 0;
    assert_int_equal(place1(w, i), 0);
    /* from the header on */
    i.load_addr = i.header_addr;
    assert_int_equal(place1(w, i), 0);
    assert_int_equal(peek(w, i.header_addr), 0x1badb002);
}

static void test_one_bad(void **state)
{
    struct world *w = *state;
    struct image1 i = make1();

    i.checksum = -(i.magic + i.flags);
    for (u64 n = 0; n < sizeof i; n++)
        assert_refused(place(w, &i, n), "K");
#define BAD(change, word)                                                                             \
    do {                                                                                              \
        i = make1();                                                                                  \
        change;                                                                                       \
        assert_refused(place1(w, i), word);                                                           \
    } while (0)
    BAD(i.flags |= 0x10, "features");
    BAD(i.flags = 3, "ELF");
    BAD(i.load_addr = i.header_addr + 4, "contradict");
    BAD(i.load_addr = i.header_addr - 65, "contradict");
    BAD(i.load_addr = ~0u, "contradict");
    BAD(i.load_end = ~0u, "file holds");
    BAD(i.load_end = LOAD, "file holds");
    BAD(i.load_end = LOAD - 1, "file holds");
    BAD(i.bss_end = LOAD + 8, "BSS");
    BAD(i.bss_end = LOAD - 8, "BSS");
    BAD(i.bss_end = ~0u, "--memory");
    BAD((i.header_addr = 64, i.load_addr = 0, i.load_end = sizeof i, i.bss_end = 0), "link it higher");
    BAD((i.header_addr = 0xfffff040, i.load_addr = 0xfffff000, i.load_end = i.bss_end = 0), "--memory");
#undef BAD
}

static void test_module(void **state)
{
    struct world *w = *state;
    struct image1 i = make1();
    static u8 module[10000];
    struct boot_load l = { .ram = &w->ram, .config = &w->config, .bsp = &w->bsp, .kernel = bytes("K", &i, sizeof i),
                           .initrd = bytes("dir/mod", module, sizeof module) };
    u32 at;

    i.checksum = -(i.magic + i.flags);
    memset(module, 0x5a, sizeof module);
    assert_int_equal(boot_place(&l), 0);
    assert_int_equal(peek(w, BOOT_INFO) & 8, 8);
    assert_int_equal(peek(w, BOOT_INFO + 20), 1);
    at = peek(w, BOOT_INFO + 24);
    assert_int_equal(peek(w, at) % PAGE_SIZE, 0);
    assert_true(peek(w, at) >= LOAD + 0x5000);
    assert_int_equal(peek(w, at + 4) - peek(w, at), sizeof module);
    assert_int_equal(peek(w, peek(w, at)), 0x5a5a5a5a);
    assert_int_equal(peek(w, peek(w, at + 8)), 0x2f726964);        /* "dir/" */
    l.initrd.size = MEMORY;
    assert_refused(boot_place(&l), "dir/mod");
}

/* ---- version 2 ---- */

struct image2 {
    u32 magic, arch, length, checksum;
    u16 type1, flags1;
    u32 size1, header_addr, load_addr, load_end, bss_end;
    u16 type2, flags2;
    u32 size2, entry, pad2;
    u16 type3, flags3;
    u32 size3, low, high, align, how;
    u16 type4, flags4;
    u32 size4;
    u8 code[64];
};

static struct image2 make2(void)
{
    return (struct image2){ .magic = 0xe85250d6, .length = offsetof(struct image2, code), .type1 = 2, .size1 = 24, .header_addr = LOAD,
                            .load_addr = LOAD, .type2 = 3, .size2 = 12, .entry = LOAD + offsetof(struct image2, code), .type3 = 10,
                            .size3 = 24, .low = MiB, .high = 0x3fffffff, .align = 4096, .size4 = 8 };
}

static int place2(struct world *w, struct image2 i)
{
    i.checksum = -(i.magic + i.arch + i.length);
    return place(w, &i, sizeof i);
}

static u32 find_tag(struct world *w, u32 type)
{
    u32 end = BOOT_INFO + peek(w, BOOT_INFO), at = BOOT_INFO + 8;

    while (at < end && peek(w, at) != type)
        at += (u32)ALIGN_UP(peek(w, at + 4), 8);
    return at < end ? at : 0;
}

static void test_two(void **state)
{
    struct world *w = *state;
    struct image2 i = make2();

    assert_int_equal(place2(w, i), 0);
    assert_int_equal(w->bsp.gpr[RAX], 0x36d76289);
    assert_int_equal(w->bsp.gpr[RBX], BOOT_INFO);
    assert_int_equal(w->bsp.rip, i.entry);
    assert_int_equal(peek(w, find_tag(w, 1) + 8), 0x622061);
    assert_int_equal(peek(w, find_tag(w, 21) + 8), LOAD);
    assert_int_equal(peek(w, find_tag(w, 6) + 8), 24);
    assert_int_equal(find_tag(w, 3), 0);
    assert_int_equal(find_tag(w, 0) + 8, BOOT_INFO + peek(w, BOOT_INFO));
    i.how = 2;                                                     /* as high as may be */
    assert_int_equal(place2(w, i), 0);
    assert_true(w->bsp.rip > MEMORY - 2 * PAGE_SIZE);
    assert_int_equal(peek(w, find_tag(w, 21) + 8) % PAGE_SIZE, 0);
    assert_int_equal(w->bsp.rip - peek(w, find_tag(w, 21) + 8), offsetof(struct image2, code));
    i.how = 1;
    assert_int_equal(place2(w, i), 0);
    assert_int_equal(peek(w, find_tag(w, 21) + 8), MiB);
    i = make2();
    i.low = LOAD + MiB;                                            /* not where it is linked */
    assert_int_equal(place2(w, i), 0);
    assert_int_equal(peek(w, find_tag(w, 21) + 8), LOAD + MiB);
}

static void test_two_bad(void **state)
{
    struct world *w = *state;
    struct image2 i = make2();

    i.checksum = -(i.magic + i.arch + i.length);
    for (u64 n = 0; n < sizeof i - sizeof i.code; n++)
        assert_refused(place(w, &i, n), "K");
#define BAD(change, word)                                                                             \
    do {                                                                                              \
        i = make2();                                                                                  \
        change;                                                                                       \
        assert_refused(place2(w, i), word);                                                           \
    } while (0)
    BAD(i.type3 = 99, "unknown");
    BAD(i.size3 = 0, "size");
    BAD(i.size3 = ~0u, "size");
    BAD(i.size1 = 16, "short");
    BAD(i.size2 = 8, "short");
    BAD(i.length = 16, "end");
    BAD(i.type4 = 4, "short");
    BAD((i.type3 = 1, i.low = 1000), "requires");
    BAD((i.type2 = 99, i.flags2 = 1), "entry");
    BAD(i.align = 3, "power of two");
    BAD(i.align = 1u << 31, "--memory");
    BAD(i.high = 0, "--memory");
    BAD((i.low = ~0u, i.high = ~0u), "--memory");
    BAD((i.load_end = ~0u), "file holds");
#undef BAD
}

/* ---- boot sectors, firmware ---- */

static void test_sector(void **state)
{
    struct world *w = *state;
    static u8 disk[4 * MiB];

    memset(disk, 0xf4, 1024);
    disk[510] = 0x55;
    disk[511] = 0xaa;
    assert_int_equal(place(w, disk, 1024), 0);
    assert_int_equal(w->bsp.rip, 0x7c00);
    assert_int_equal(w->bsp.seg[SEG_CS].base, 0);
    assert_int_equal(w->bsp.gpr[RDX], 0x80);
    assert_int_equal(w->bsp.cr0 & CR0_PE, 0);
    assert_int_equal(peek(w, 0x7ffc), 0xf4f4f4f4);
    assert_refused(place(w, disk, 1023), "boot sector");
    assert_refused(place(w, disk, sizeof disk), "--firmware");
    disk[511] = 0xab;
    assert_refused(place(w, disk, 1024), "boot sector");
}

static void test_firmware(void **state)
{
    struct world *w = *state;
    char path[] = "/tmp/doppel-firmware-XXXXXX";
    int fd = mkstemp(path);
    u64 size = 0;
    u32 word = 0x12345678;

    w->config.firmware = path;
    assert_refused(boot_firmware_size(path, &size), path);         /* empty */
    for (off_t n = 1; n < (off_t)(256 * KiB); n += 4093) {
        assert_int_equal(ftruncate(fd, n), 0);
        assert_refused(boot_firmware_size(path, &size), "64 KiB");
    }
    assert_int_equal(ftruncate(fd, 32 * MiB), 0);
    assert_refused(boot_firmware_size(path, &size), "16 MiB");
    assert_int_equal(ftruncate(fd, 256 * KiB), 0);
    assert_int_equal(boot_firmware_size(path, &size), 0);
    assert_int_equal(size, 256 * KiB);
    assert_int_equal(pwrite(fd, &word, 4, 128 * KiB), 4);
    assert_int_equal(pwrite(fd, &word, 4, 256 * KiB - 16), 4);
    assert_refused(boot_load(&w->ram, &w->config, &w->bsp), path);  /* no memory there */
    assert_int_equal(ram_add(&w->ram, 4 * GiB - size, size), 0);
    assert_int_equal(boot_load(&w->ram, &w->config, &w->bsp), 0);
    assert_int_equal(peek(w, 0xfffffff0), word);
    assert_int_equal(peek(w, 0xffff0), word);
    assert_int_equal(peek(w, 0xe0000), word);
    assert_int_equal(w->bsp.seg[SEG_CS].base, 0xffff0000);
    assert_int_equal(w->bsp.rip, 0xfff0);
    close(fd);
    unlink(path);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_one), TEST(test_one_bad), TEST(test_module), TEST(test_two), TEST(test_two_bad), TEST(test_sector),
        TEST(test_firmware),
    };
    return cmocka_run_group_tests_name("multiboot", tests, NULL, NULL);
}
