/*
 * Booting: images made here by hand, good ones and each kind of bad one. Bad ones must give an error that names the
 * file and leave a process that is unharmed (this runs under ASan and UBSan); good ones must leave memory and processor
 * as the protocols say.
 */
#include <asm/bootparam.h>
#include <elf.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/err.h"
#include "vm/boot.h"

#define MEMORY (64 * MiB)

struct world {
    struct ram ram;
    struct e820 map;
    struct x86 bsp;
    struct boot_config config;
};

static const struct e820_entry reserved[] = { { 0x9f000, 0x1000, E820_RESERVED }, { 0xe0000, 0x20000, E820_RESERVED } };

static struct world *world_of(u64 memory)
{
    struct world *w = calloc(1, sizeof *w);

    assert_non_null(w);
    assert_int_equal(ram_init(&w->ram), 0);
    assert_int_equal(ram_add(&w->ram, 0, 0xa0000), 0);
    assert_int_equal(ram_add(&w->ram, 0xc0000, memory - 0xc0000), 0);
    assert_int_equal(e820_build(&w->map, &w->ram, reserved, ARRAY_SIZE(reserved)), 0);
    w->config = (struct boot_config){
        .kernel = "K", .cmdline = "console=ttyS0", .map = &w->map, .rsdp_gpa = 0xe0000, .phys_bits = 40
    };
    return w;
}

static int setup(void **state)
{
    *state = world_of(MEMORY);
    return 0;
}

static int teardown(void **state)
{
    struct world *w = *state;
    ram_close(&w->ram);
    free(w);
    return 0;
}

static struct boot_file bytes(const char *what, const void *p, u64 size)
{
    return (struct boot_file){ .path = *what == 'k' ? "K" : "I", .what = what, .fd = -1, .bytes = p, .size = size };
}

static int place(struct world *w, const void *kernel, u64 size, const void *initrd, u64 initrd_size)
{
    struct boot_load l = {
        .ram = &w->ram, .config = &w->config, .bsp = &w->bsp, .kernel = bytes("kernel", kernel, size)
    };
    if (initrd)
        l.initrd = bytes("initrd", initrd, initrd_size);
    return boot_place(&l);
}

static u64 peek(struct world *w, u64 gpa, unsigned size)
{
    u64 v = 0;
    assert_int_equal(ram_read(&w->ram, gpa, &v, size), 0);
    return v;
}

/* An error, and one that tells the user what to do: it names the file and has a word of remedy after a semicolon or a
 * colon. */
static void assert_refused(int rc, const char *word)
{
    if (rc >= 0)
        fail_msg("accepted what should give \"%s\"", word);
    if (!strstr(err_last(), word))
        fail_msg("the message has no \"%s\": %s", word, err_last());
    assert_true(strlen(err_last()) < 400);
}

/* ---- e820 ---- */

static void test_e820(void **state)
{
    struct world *w = *state;
    const struct e820_entry want[] = { { 0, 0x9f000, E820_RAM },
                                       { 0x9f000, 0x1000, E820_RESERVED },
                                       { 0xc0000, 0x20000, E820_RAM },
                                       { 0xe0000, 0x20000, E820_RESERVED },
                                       { MiB, MEMORY - MiB, E820_RAM } };

    assert_int_equal(w->map.n, ARRAY_SIZE(want));
    for (unsigned i = 0; i < ARRAY_SIZE(want); i++) {
        assert_int_equal(w->map.entry[i].base, want[i].base);
        assert_int_equal(w->map.entry[i].size, want[i].size);
        assert_int_equal(w->map.entry[i].type, want[i].type);
    }
    assert_int_equal(e820_place(&w->map, MiB, 4 * GiB, 4096, 4096, true), MEMORY - 4096);
    assert_int_equal(e820_place(&w->map, MiB, 4 * GiB, 5000, 4096, true), MEMORY - 8192);
    assert_int_equal(e820_place(&w->map, MiB + 1, 4 * GiB, 4096, 2 * MiB, false), 2 * MiB);
    assert_int_equal(e820_place(&w->map, MiB, 4 * GiB, MEMORY - MiB, 4096, true), MiB);
    assert_int_equal(e820_place(&w->map, MiB, 4 * GiB, MEMORY - MiB + 1, 4096, true), 0);
    assert_int_equal(e820_place(&w->map, MiB, 4 * GiB, ~0ull, 4096, true), 0);
    assert_int_equal(e820_place(&w->map, 0xd0000, 0xd1000, 4096, 4096, true), 0xd0000);
    assert_true(e820_usable(&w->map, 0, 0x9f000));
    assert_false(e820_usable(&w->map, 0, 0x9f001));
    assert_false(e820_usable(&w->map, MEMORY - 1, 2));
    assert_false(e820_usable(&w->map, ~0ull, 2));
}

static void test_e820_reserved_splits(void **state)
{
    struct world *w = *state;
    const struct e820_entry hole[] = { { 32 * MiB, MiB, E820_RESERVED },
                                       { 0xe0000000, MiB, E820_RESERVED },
                                       { 0, 0x1000, E820_NVS } };
    struct e820_entry many[E820_MAX];

    assert_int_equal(e820_build(&w->map, &w->ram, hole, 3), 0);
    assert_int_equal(w->map.entry[0].type, E820_NVS);
    assert_int_equal(w->map.n, 6);
    assert_true(e820_usable(&w->map, 0x1000, 0x1000));
    assert_false(e820_usable(&w->map, 31 * MiB, 2 * MiB));
    assert_int_equal(w->map.entry[5].base, 0xe0000000); /* listed where there is no RAM, too */
    for (unsigned i = 0; i < E820_MAX; i++)
        many[i] = (struct e820_entry){ 2 * MiB + i * 8192, 4096, E820_RESERVED };
    assert_int_equal(e820_build(&w->map, &w->ram, many, E820_MAX), -E2BIG);
}

/* ---- bzImage ---- */

#define SETUP_SECTS 1
#define PAYLOAD 0x4000

struct bz {
    u8 file[(SETUP_SECTS + 1) * 512 + PAYLOAD];
};

static struct setup_header *header(struct bz *b)
{
    return (struct setup_header *)(b->file + 0x1f1);
}

static struct bz *make_bz(void)
{
    struct bz *b = test_calloc(1, sizeof *b);
    struct setup_header h = { .setup_sects = SETUP_SECTS,
                              .syssize = PAYLOAD / 16,
                              .boot_flag = 0xaa55,
                              .jump = 0x66eb,
                              .header = 0x53726448,
                              .version = 0x20f,
                              .loadflags = LOADED_HIGH,
                              .initrd_addr_max = 0x7fffffff,
                              .kernel_alignment = 0x200000,
                              .relocatable_kernel = 1,
                              .min_alignment = 21,
                              .xloadflags = XLF_KERNEL_64,
                              .cmdline_size = 2047,
                              .pref_address = 0x1000000,
                              .init_size = 0x800000 };

    memcpy(b->file, "MZ", 2);
    memcpy(header(b), &h, sizeof h);
    for (unsigned i = 0; i < PAYLOAD; i++)
        b->file[sizeof b->file - PAYLOAD + i] = (u8)(i * 7);
    return b;
}

static void test_bzimage64(void **state)
{
    struct world *w = *state;
    struct bz *b = make_bz();
    char initrd[5000] = "the initrd";
    struct boot_params *p = test_calloc(1, sizeof *p);

    assert_int_equal(place(w, b, sizeof *b, initrd, sizeof initrd), 0);
    assert_int_equal(peek(w, 0x1000000, 8), *(u64 *)(b->file + 1024));
    assert_int_equal(peek(w, 0x1000000 + PAYLOAD - 1, 1), b->file[sizeof b->file - 1]);
    assert_int_equal(peek(w, 0x1000000 + PAYLOAD, 8), 0);

    const struct x86 *x = &w->bsp;
    assert_int_equal(x->rip, 0x1000200);
    assert_int_equal(x->gpr[RSI], BOOT_INFO);
    assert_int_equal(x->rflags, 2);
    assert_int_equal(x->cr0 & (CR0_PE | CR0_PG), CR0_PE | CR0_PG);
    assert_int_equal(x->cr4 & CR4_PAE, CR4_PAE);
    assert_int_equal(x->efer & (EFER_LME | EFER_LMA), EFER_LME | EFER_LMA);
    assert_int_equal(x->seg[SEG_CS].sel, 0x10);
    assert_true(x->seg[SEG_CS].attr & SEG_L && !(x->seg[SEG_CS].attr & SEG_DB));
    assert_int_equal(x->seg[SEG_SS].sel, 0x18);
    assert_int_equal(x->mtrr_mask[0], ((1ull << 40) - GiB) | 0x800);
    /* The identity map, walked by hand to 1 GiB + 2 MiB. */
    u64 pml4e = peek(w, x->cr3, 8), pdpte = peek(w, (pml4e & PAGE_MASK) + 8, 8),
        pde = peek(w, (pdpte & PAGE_MASK) + 8, 8);
    assert_int_equal(pml4e & pdpte & 3, 3);
    assert_int_equal(pde, (GiB + 2 * MiB) | 0x83);
    /* The GDT describes what the registers hold (SDM vol. 3A 3.4.5). */
    assert_int_equal(peek(w, x->gdtr.base + 0x10, 8), 0x00af9b000000ffff);
    assert_int_equal(peek(w, x->gdtr.base + 0x18, 8), 0x00cf93000000ffff);
    assert_int_equal(x->gdtr.limit, 0x1f);

    assert_int_equal(ram_read(&w->ram, BOOT_INFO, p, sizeof *p), 0);
    assert_int_equal(p->hdr.type_of_loader, 0xff);
    assert_int_equal(p->hdr.code32_start, 0x1000000);
    assert_int_equal(p->hdr.ramdisk_size, sizeof initrd);
    assert_int_equal(p->hdr.ramdisk_image, MEMORY - 8192);
    assert_int_equal(peek(w, p->hdr.ramdisk_image, 8), *(u64 *)initrd);
    assert_int_equal(p->acpi_rsdp_addr, 0xe0000);
    assert_int_equal(p->e820_entries, w->map.n);
    assert_int_equal(p->e820_table[4].addr, MiB);
    assert_int_equal(p->e820_table[4].type, E820_RAM);
    char line[32];
    assert_int_equal(ram_read(&w->ram, p->hdr.cmd_line_ptr, line, sizeof line), 0);
    assert_string_equal(line, "console=ttyS0");
    test_free(p);
    test_free(b);
}

/* Headers say how long they are; the bytes behind are code and must not reach boot_params. */
static void test_bzimage_short_header(void **state)
{
    struct world *w = *state;
    struct bz *b = make_bz();

    header(b)->jump = 0x62eb;                  /* ends at 0x264: init_size is in, handover_offset is not */
    header(b)->handover_offset = 0x12345678;
    assert_int_equal(place(w, b, sizeof *b, NULL, 0), 0);
    assert_int_equal(peek(w, BOOT_INFO + 0x264, 4), 0);
    assert_int_equal(peek(w, BOOT_INFO + 0x260, 4), 0x800000);
    assert_int_equal(peek(w, BOOT_INFO + 0x218, 8), 0); /* no initrd */
    test_free(b);
}

static void test_bzimage32(void **state)
{
    struct world *w = *state;
    struct bz *b = make_bz();

    header(b)->xloadflags = 0;
    assert_int_equal(place(w, b, sizeof *b, NULL, 0), 0);
    assert_int_equal(w->bsp.rip, 0x1000000);
    assert_int_equal(w->bsp.cr0 & (CR0_PE | CR0_PG), CR0_PE);
    assert_int_equal(w->bsp.efer, 0);
    assert_true(w->bsp.seg[SEG_CS].attr & SEG_DB && !(w->bsp.seg[SEG_CS].attr & SEG_L));
    assert_int_equal(w->bsp.gpr[RSI], BOOT_INFO);
    assert_int_equal(w->bsp.gpr[RBX] | w->bsp.gpr[RBP] | w->bsp.gpr[RDI], 0);

    header(b)->version = 0x20a;                /* xloadflags did not exist then: what stands there is something else */
    header(b)->xloadflags = XLF_KERNEL_64;
    assert_int_equal(place(w, b, sizeof *b, NULL, 0), 0);
    assert_int_equal(w->bsp.rip, 0x1000000);
    test_free(b);
}

/* Without room where it wants to be it does not boot, also if it can be moved: below, it would unpack itself over the
 * end of memory. */
static void test_bzimage_small_memory(void **state)
{
    struct world *w = world_of(20 * MiB);
    struct bz *b = make_bz();
    (void)state;

    assert_refused(place(w, b, sizeof *b, NULL, 0), "9 MiB of memory between 16 MiB and");
    header(b)->relocatable_kernel = 0;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "--memory");
    header(b)->relocatable_kernel = 1;
    header(b)->init_size = 4 * MiB;
    assert_int_equal(place(w, b, sizeof *b, NULL, 0), 0);
    assert_int_equal(w->bsp.rip, 0x1000200);
    header(b)->pref_address = 0;
    assert_int_equal(place(w, b, sizeof *b, NULL, 0), 0);
    assert_int_equal(w->bsp.rip, 0x200200);
    header(b)->pref_address = 0x1000000;
    header(b)->init_size = 32 * MiB;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "--memory");
    header(b)->init_size = 0xffffffff;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "--memory");
    teardown((void **)&w);
    test_free(b);
}

static void test_bzimage_bad(void **state)
{
    struct world *w = *state;
    struct bz *b = make_bz();
    u8 random[4096];

    for (u64 n = 0; n < sizeof *b - 15; n += n < 1200 ? 1 : 97)   /* every shorter file; the last 16 bytes are one unit */
        assert_refused(place(w, b, n, NULL, 0), "K");
    header(b)->kernel_alignment = 0;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "alignment");
    header(b)->kernel_alignment = 0x300000;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "alignment");
    header(b)->kernel_alignment = 0x80000000;
    header(b)->pref_address = ~0ull;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "--memory");
    test_free(b);
    b = make_bz();
    header(b)->version = 0x209;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "2.09");
    test_free(b);
    b = make_bz();
    header(b)->syssize = 0;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "size");
    header(b)->syssize = 0xffffffff;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "truncated");
    header(b)->setup_sects = 255;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "truncated");
    test_free(b);
    srand(1);
    for (unsigned i = 0; i < sizeof random; i++)
        random[i] = (u8)rand();
    assert_refused(place(w, random, sizeof random, NULL, 0), "neither");
}

static void test_cmdline(void **state)
{
    struct world *w = *state;
    struct bz *b = make_bz();
    char line[2050];

    memset(line, 'x', sizeof line);
    w->config.cmdline = line;
    line[2047] = 0;                            /* cmdline_size is without the NUL */
    assert_int_equal(place(w, b, sizeof *b, NULL, 0), 0);
    assert_int_equal(peek(w, BOOT_CMDLINE + 2046, 2), 'x');
    line[2047] = 'x';
    line[2048] = 0;
    assert_refused(place(w, b, sizeof *b, NULL, 0), "--append");
    w->config.cmdline = NULL;
    assert_int_equal(place(w, b, sizeof *b, NULL, 0), 0);
    assert_int_equal(peek(w, BOOT_CMDLINE, 1), 0);
    test_free(b);
}

static void test_initrd(void **state)
{
    struct world *w = *state;
    struct bz *b = make_bz();
    u64 room = MEMORY - 0x1800000;             /* above the kernel's init_size */
    u8 *big = calloc(1, room + 1);

    header(b)->initrd_addr_max = 0x3000000 - 1;
    assert_int_equal(place(w, b, sizeof *b, "abc", 3), 0);
    assert_int_equal(peek(w, BOOT_INFO + 0x218, 4), 0x3000000 - 4096);
    header(b)->initrd_addr_max = 0x7fffffff;
    assert_int_equal(place(w, b, sizeof *b, big, room), 0);
    assert_int_equal(peek(w, BOOT_INFO + 0x218, 4), 0x1800000);
    assert_refused(place(w, b, sizeof *b, big, room + 1), "--memory");
    assert_non_null(strstr(err_last(), "initrd I"));
    header(b)->initrd_addr_max = 0;
    assert_refused(place(w, b, sizeof *b, "abc", 3), "--memory");
    free(big);
    test_free(b);
}

/* ---- ELF ---- */

struct elf64 {
    Elf64_Ehdr h;
    Elf64_Phdr p[2];
    struct { Elf64_Nhdr n; char name[4]; u64 value; } note;
    u8 code[4096];
};

static struct elf64 *make_elf(void)
{
    struct elf64 *e = test_calloc(1, sizeof *e);

    e->h = (Elf64_Ehdr){ .e_type = ET_EXEC,
                         .e_machine = EM_X86_64,
                         .e_phoff = offsetof(struct elf64, p),
                         .e_phentsize = sizeof(Elf64_Phdr),
                         .e_phnum = 2 };
    memcpy(e->h.e_ident, ELFMAG, SELFMAG);
    e->h.e_ident[EI_CLASS] = ELFCLASS64;
    e->h.e_ident[EI_DATA] = ELFDATA2LSB;
    e->p[0] = (Elf64_Phdr){ .p_type = PT_LOAD,
                            .p_offset = offsetof(struct elf64, code),
                            .p_vaddr = 0xffffffff80200000,
                            .p_paddr = 0x200000,
                            .p_filesz = sizeof e->code,
                            .p_memsz = 3 * sizeof e->code };
    e->p[1] = (Elf64_Phdr){
        .p_type = PT_NOTE, .p_offset = offsetof(struct elf64, note), .p_filesz = sizeof e->note, .p_align = 4
    };
    e->note.n = (Elf64_Nhdr){ .n_namesz = 4, .n_descsz = 8, .n_type = 18 };
    memcpy(e->note.name, "Xen", 4);
    e->note.value = 0x200010;
    memset(e->code, 0xcc, sizeof e->code);
    return e;
}

static void test_elf(void **state)
{
    struct world *w = *state;
    struct elf64 *e = make_elf();
    u64 junk = ~0ull;

    assert_int_equal(ram_write(&w->ram, 0x202ff0, &junk, 8), 0); /* from before a reset: bss must be zero again */
    assert_int_equal(place(w, e, sizeof *e, "initrd", 6), 0);
    assert_int_equal(peek(w, 0x200000, 8), 0xcccccccccccccccc);
    assert_int_equal(peek(w, 0x202ff0, 8), 0);
    assert_int_equal(w->bsp.rip, 0x200010);
    assert_int_equal(w->bsp.gpr[RBX], BOOT_INFO);
    assert_int_equal(w->bsp.cr0 & (CR0_PE | CR0_PG), CR0_PE);
    assert_int_equal(w->bsp.rflags, 2);
    assert_int_equal(peek(w, BOOT_INFO, 4), 0x336ec578);
    assert_int_equal(peek(w, BOOT_INFO + 4, 4), 1);
    assert_int_equal(peek(w, BOOT_INFO + 12, 4), 1);
    u64 module = peek(w, BOOT_INFO + 16, 8);
    assert_int_equal(peek(w, peek(w, module, 8), 6), 0x647274696e69);
    assert_int_equal(peek(w, module + 8, 8), 6);
    assert_int_equal(peek(w, peek(w, BOOT_INFO + 24, 8), 7), 0x656c6f736e6f63); /* "console" */
    assert_int_equal(peek(w, BOOT_INFO + 32, 8), 0xe0000);
    assert_int_equal(peek(w, BOOT_INFO + 48, 4), w->map.n);
    assert_int_equal(peek(w, peek(w, BOOT_INFO + 40, 8) + 4 * 24, 8), MiB);

    e->note.n.n_descsz = 4;                    /* as 32-bit notes have it */
    assert_int_equal(place(w, e, sizeof *e, NULL, 0), 0);
    assert_int_equal(w->bsp.rip, 0x200010);
    assert_int_equal(peek(w, BOOT_INFO + 12, 4), 0);
    test_free(e);
}

static void test_elf32(void **state)
{
    struct world *w = *state;
    struct {
        Elf32_Ehdr h;
        Elf32_Phdr p[2];
        struct { Elf32_Nhdr n; char name[4]; u32 value; } note;
        u8 code[16];
    } e = {
        .h = { .e_type = ET_EXEC,
               .e_machine = EM_386,
               .e_phoff = sizeof(Elf32_Ehdr),
               .e_phentsize = sizeof(Elf32_Phdr),
               .e_phnum = 2 },
        .note = { { 4, 4, 18 }, "Xen", 0x100004 },
        .code = "0123456789abcde",
    };

    memcpy(e.h.e_ident, ELFMAG "\x01\x01", 6);
    e.p[0] = (Elf32_Phdr){ .p_type = PT_NOTE, .p_offset = (u32)((u8 *)&e.note - (u8 *)&e), .p_filesz = sizeof e.note };
    e.p[1] = (Elf32_Phdr){
        .p_type = PT_LOAD, .p_offset = (u32)(e.code - (u8 *)&e), .p_paddr = 0x100000, .p_filesz = 16, .p_memsz = 16
    };
    assert_int_equal(place(w, &e, sizeof e, NULL, 0), 0);
    assert_int_equal(w->bsp.rip, 0x100004);
    assert_int_equal(peek(w, 0x100000, 4), 0x33323130);
}

/* One field of a good ELF file is spoiled at a time. */
static void test_elf_bad(void **state)
{
    struct world *w = *state;
    struct elf64 *e;

    e = make_elf();
    for (u64 n = 0; n < sizeof *e; n += n < 300 ? 1 : 61)
        assert_refused(place(w, e, n, NULL, 0), "K");
    test_free(e);
#define BAD(change, word)                                                                             \
    do {                                                                                              \
        e = make_elf();                                                                               \
        change;                                                                                       \
        assert_refused(place(w, e, sizeof *e, NULL, 0), word);                                        \
        test_free(e);                                                                                 \
    } while (0)
    BAD(e->h.e_machine = EM_AARCH64, "another processor");
    BAD(e->h.e_ident[EI_DATA] = ELFDATA2MSB, "another processor");
    BAD(e->h.e_type = ET_REL, "executable");
    BAD(e->h.e_phnum = 0, "program headers");
    BAD(e->h.e_phnum = 65535, "program headers");
    BAD(e->h.e_phentsize = 1, "program headers");
    BAD(e->h.e_phoff = ~0ull - 10, "truncated");
    BAD(e->h.e_phoff = sizeof *e - 4, "truncated");
    BAD(e->p[0].p_filesz = ~0ull, "larger in the file");
    BAD((e->p[0].p_memsz = ~0ull), "--memory");
    BAD((e->p[0].p_memsz = MEMORY), "--memory");
    BAD(e->p[0].p_paddr = ~0ull - 4096, "--memory");
    BAD(e->p[0].p_paddr = 0xa0000, "--memory");
    BAD(e->p[0].p_paddr = BOOT_GDT, "link it higher");
    BAD(e->p[0].p_offset = ~0ull - 100, "truncated");
    BAD((e->p[0].p_filesz = 8 * MiB, e->p[0].p_memsz = 8 * MiB), "truncated");
    BAD(e->note.name[0] = 'x', "PVH");
    BAD(e->note.n.n_type = 17, "PVH");
    BAD(e->note.value = 0x100000000, "PVH");
    BAD(e->note.n.n_descsz = ~0u, "PVH");
    BAD(e->note.n.n_namesz = ~0u, "PVH");
    BAD(e->p[1].p_filesz = ~0ull, "notes");
    BAD(e->p[1].p_offset = ~0ull, "notes");
#undef BAD
}

/* ---- files ---- */

static void test_wrong_kind(void **state)
{
    static const struct {
        unsigned at;
        const char *magic, *word;
    } kind[] = {
        { 56, "ARM\x64", "arm64" },        { 48, "RISCV", "RISC-V" },   { 0, "\x1f\x8b", "gzip" },
        { 0, "\x28\xb5\x2f\xfd", "zstd" }, { 0, "070701", "--initrd" }, { 0, "MZ", "EFI" },
    };
    struct world *w = *state;

    for (unsigned i = 0; i < ARRAY_SIZE(kind); i++) {
        u8 file[2048] = { 0 };
        memcpy(file + kind[i].at, kind[i].magic, strlen(kind[i].magic));
        assert_refused(place(w, file, sizeof file, NULL, 0), kind[i].word);
    }
}

static void test_files(void **state)
{
    struct world *w = *state;
    char dir[] = "/tmp/doppel-boot-XXXXXX", path[64], fifo[64];
    struct timespec from, to;

    clock_gettime(CLOCK_MONOTONIC, &from);
    assert_non_null(mkdtemp(dir));
    w->config.kernel = dir;
    assert_refused(boot_load(&w->ram, &w->config, &w->bsp), "directory");
    snprintf(path, sizeof path, "%s/k", dir);
    w->config.kernel = path;
    assert_refused(boot_load(&w->ram, &w->config, &w->bsp), path);
    fclose(fopen(path, "w"));
    assert_refused(boot_load(&w->ram, &w->config, &w->bsp), "empty");
    struct bz *b = make_bz();
    FILE *f = fopen(path, "w");
    assert_int_equal(fwrite(b, sizeof *b, 1, f), 1);
    fclose(f);
    assert_int_equal(boot_load(&w->ram, &w->config, &w->bsp), 0);
    assert_int_equal(w->bsp.rip, 0x1000200);
    snprintf(fifo, sizeof fifo, "%s/f", dir);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    w->config.initrd = fifo;
    assert_refused(boot_load(&w->ram, &w->config, &w->bsp), "regular");
    w->config.initrd = "/dev/zero";
    assert_refused(boot_load(&w->ram, &w->config, &w->bsp), "initrd /dev/zero");
    if (geteuid()) {
        chmod(path, 0);
        w->config.initrd = NULL;
        assert_refused(boot_load(&w->ram, &w->config, &w->bsp), "ermission");
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    assert_true(to.tv_sec - from.tv_sec <= 2);
    unlink(path);
    unlink(fifo);
    rmdir(dir);
    test_free(b);
}

/* A file that is truncated in the middle of its life. */
static void test_shrinking(void **state)
{
    char path[] = "/tmp/doppel-boot-XXXXXX";
    struct boot_file f;
    u8 buf[100];
    int fd = mkstemp(path);
    (void)state;

    assert_int_equal(ftruncate(fd, 100), 0);
    assert_int_equal(boot_file_open(&f, "kernel", path), 0);
    assert_int_equal(ftruncate(fd, 50), 0);
    assert_int_equal(boot_file_read(&f, 0, buf, 50), 0);
    assert_refused(boot_file_read(&f, 0, buf, 100), "shorter");
    assert_refused(boot_file_read(&f, 99, buf, 2), "truncated");
    boot_file_close(&f);
    close(fd);
    unlink(path);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_e820),        TEST(test_e820_reserved_splits),
        TEST(test_bzimage64),   TEST(test_bzimage_short_header),
        TEST(test_bzimage32),   TEST(test_bzimage_small_memory),
        TEST(test_bzimage_bad), TEST(test_cmdline),
        TEST(test_initrd),      TEST(test_elf),
        TEST(test_elf32),       TEST(test_elf_bad),
        TEST(test_wrong_kind),  TEST(test_files),
        TEST(test_shrinking),
    };
    return cmocka_run_group_tests_name("boot", tests, NULL, NULL);
}
