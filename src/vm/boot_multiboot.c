/*
 * Multiboot kernels: Multiboot Specification 0.6.96 ("1") and Multiboot2 Specification 2.0 ("2"); section numbers below
 * are theirs. The header in the file's first 8 or 32 KiB says how to load it; the kernel is entered in 32-bit protected
 * mode, paging off, EAX = magic, EBX = the boot information. A file with headers of both kinds boots by version 2.
 *
 * ELF files of 32 and 64 bit are loaded by their segments; others (and those that ask for it) by the addresses in the
 * header. The initrd is the only module, its command line is its file's name. The boot information lies from BOOT_INFO
 * on, with everything that it points to but modules and symbols.
 *
 * Left out: a graphics mode (requests are accepted, and no frame buffer is told of), APM, VBE, EFI and network
 * information: there is none. Of an ELF file's sections only symbol and string tables are loaded besides its segments.
 */
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "vm/boot_elf.h"

#define MB1_MAGIC      0x1badb002u
#define MB1_SEARCH     (8 * KiB)
#define MB1_ENTRY      0x2badb002u
#define MB1_KNOWN      0x7u                                        /* of the flags that must be understood: 15..0 */
#define MB1_ADDRESSES  (1u << 16)

#define MB2_MAGIC      0xe85250d6u
#define MB2_SEARCH     (32 * KiB)
#define MB2_ENTRY      0x36d76289u
#define MB2_OPTIONAL   1
#define MB2_TAG_LAST   21                                          /* the highest type of boot information there is */

#define SECTIONS_MAX   512
#define LOADER_NAME    "doppel " DOPPEL_VERSION

struct mb1_header {                                                /* 3.1.1; what follows concerns graphics */
    u32 magic, flags, checksum;
    u32 header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr;
};
struct mb1_info {                                                  /* 3.3 */
    u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr;
    u32 syms_num, syms_size, syms_addr, syms_shndx;
    u32 mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name, apm_table;
    u32 vbe[7];
};
enum { MB1_HAS_MEMORY = 1 << 0, MB1_HAS_CMDLINE = 1 << 2, MB1_HAS_MODS = 1 << 3, MB1_HAS_ELF = 1 << 5, MB1_HAS_MMAP = 1 << 6,
       MB1_HAS_NAME = 1 << 9 };

struct mb2_header {                                                /* 3.1.1 */
    u32 magic, architecture, length, checksum;
};
struct mb2_tag {                                                   /* 3.1.3 */
    u16 type, flags;
    u32 size;
};
enum { MB2_H_END, MB2_H_REQUEST, MB2_H_ADDRESS, MB2_H_ENTRY, MB2_H_CONSOLE, MB2_H_FRAMEBUFFER, MB2_H_ALIGN, MB2_H_EFI_BS,
       MB2_H_EFI32, MB2_H_EFI64, MB2_H_RELOCATABLE };
enum { MB2_END, MB2_CMDLINE, MB2_NAME, MB2_MODULE, MB2_MEMORY, MB2_MMAP = 6, MB2_ELF = 9, MB2_RSDP_OLD = 14, MB2_RSDP_NEW,
       MB2_LOAD_BASE = 21 };

/* What either header says. */
struct multiboot {
    struct boot_load *l;
    u64 header;                                                    /* its offset in the file */
    bool addresses, has_entry, relocatable;
    u32 header_addr, load_addr, load_end, bss_end, entry;          /* addresses; then entry is set as well */
    /* relocatable: 3.1.12; how: 0 any, 1 lowest, 2 highest */
    u32 place_min, place_max, place_align, place_how;

    bool is_elf;
    struct boot_elf elf;
    u64 start, end;                                                /* of what was loaded */
    u64 entry_gpa;
    u64 module;                                                    /* 0: none */
    u8 *sections;                                                  /* ELF section headers, NULL: none */
};

/* The boot information as it will lie at BOOT_INFO. */
struct info {
    u32 len;
    bool full;
    u8 buf[BOOT_LOW_END - BOOT_INFO];
};

static u32 info_add(struct info *in, const void *p, u64 n, u32 align)
{
    u32 at = (u32)ALIGN_UP(in->len, align);

    if (at > sizeof in->buf || n > sizeof in->buf - at) {
        in->full = true;
        return 0;
    }
    memset(in->buf + in->len, 0, at - in->len);
    if (n)
        memcpy(in->buf + at, p, n);
    in->len = at + (u32)n;
    return at;
}

static u32 info_string(struct info *in, const char *s)
{
    return BOOT_INFO + info_add(in, s, strlen(s) + 1, 1);
}

static const char *cmdline_of(const struct multiboot *m)
{
    return m->l->config->cmdline ? m->l->config->cmdline : "";
}

/* KiB below 640 KiB, and from 1 MiB up to the first hole. */
static void basic_memory(const struct multiboot *m, u32 *lower, u32 *upper)
{
    const struct e820 *map = m->l->config->map;

    *lower = *upper = 0;
    for (unsigned i = 0; i < map->n; i++) {
        const struct e820_entry *e = &map->entry[i];
        u64 end = e->base + e->size;

        if (e->type != E820_RAM)
            continue;
        if (e->base == 0)
            *lower = (u32)(MIN(end, 640 * KiB) / KiB);
        if (e->base <= MiB && end > MiB)
            *upper = (u32)(MIN(end - MiB, 4 * GiB - MiB) / KiB);
    }
}

static int refuse(const struct multiboot *m, const char *what)
{
    return err(-ENOEXEC, "kernel %s: its multiboot header %s; ask its author, or take another kernel", m->l->kernel.path, what);
}

/* ---- symbols ---- */

struct section {
    u32 type;
    u64 addr, offset, size;
};

static struct section section_get(const struct multiboot *m, unsigned i)
{
    const u8 *p = m->sections + (u64)i * m->elf.shentsize;
    Elf64_Shdr s64;
    Elf32_Shdr s32;

    if (m->elf.is64) {
        memcpy(&s64, p, sizeof s64);
        return (struct section){ s64.sh_type, s64.sh_addr, s64.sh_offset, s64.sh_size };
    }
    memcpy(&s32, p, sizeof s32);
    return (struct section){ s32.sh_type, s32.sh_addr, s32.sh_offset, s32.sh_size };
}

static void section_set_addr(struct multiboot *m, unsigned i, u32 gpa)
{
    u8 *p = m->sections + (u64)i * m->elf.shentsize;
    u64 wide = gpa;

    if (m->elf.is64)
        memcpy(p + offsetof(Elf64_Shdr, sh_addr), &wide, sizeof wide);
    else
        memcpy(p + offsetof(Elf32_Shdr, sh_addr), &gpa, sizeof gpa);
}

/*
 * Section headers, and symbols behind the kernel. They are a convenience: what makes no sense or does not fit is
 * left out.
 */
static int load_sections(struct multiboot *m)
{
    const struct boot_elf *e = &m->elf;
    const struct boot_file *f = &m->l->kernel;
    u64 bytes = (u64)e->shnum * e->shentsize;

    if (!m->is_elf || !e->shnum || e->shnum > SECTIONS_MAX || !range_in(e->shoff, bytes, f->size) ||
        e->shentsize != (e->is64 ? sizeof(Elf64_Shdr) : sizeof(Elf32_Shdr)))
        return 0;
    m->sections = malloc(bytes);
    if (!m->sections)
        return err(-ENOMEM, "out of memory");
    int rc = boot_file_read(f, e->shoff, m->sections, bytes);
    for (unsigned i = 0; i < e->shnum && !rc; i++) {
        struct section s = section_get(m, i);

        if ((s.type != SHT_SYMTAB && s.type != SHT_STRTAB) || s.addr || !s.size || !range_in(s.offset, s.size, f->size))
            continue;
        u64 gpa = e820_place(m->l->config->map, MAX(m->end, MiB), BOOT_RAM_TOP, s.size, 16, false);
        if (!gpa)
            continue;
        rc = boot_file_copy(f, s.offset, m->l->ram, gpa, s.size);
        section_set_addr(m, i, (u32)gpa);
        m->end = gpa + s.size;
    }
    return rc;
}

/* ---- loading ---- */

/*
 * Where a relocatable image (2: 3.1.12) of [start, end) goes: as it asks; without a wish where it is linked, if
 * that is free.
 */
static int choose_place(struct multiboot *m, u64 start, u64 end, u64 *base)
{
    const struct e820 *map = m->l->config->map;
    u64 align = m->place_align ? m->place_align : 1, floor = MAX((u64)m->place_min, BOOT_LOW_END);
    u64 limit = MIN((u64)m->place_max + 1, BOOT_RAM_TOP);

    *base = start;
    if (!m->relocatable)
        return 0;
    if (align & (align - 1))
        return refuse(m, "has an alignment that is no power of two");
    if (m->place_how == 0 && start >= floor && end <= limit && !(start % align) && e820_usable(map, start, end - start))
        return 0;
    *base = e820_place(map, floor, limit, end - start, align, m->place_how == 2);
    if (!*base)
        return err(-ENOMEM,
                   "kernel %s: %llu MiB do not fit into the guest's memory where it wants to be; use a larger "
                   "--memory",
                   m->l->kernel.path, (unsigned long long)((end - start) >> 20) + 1);
    return 0;
}

static int load_elf(struct multiboot *m)
{
    struct boot_elf *e = &m->elf;
    u64 base;
    int rc = boot_elf_range(e);

    if (!rc)
        rc = choose_place(m, e->start, e->end, &base);
    if (rc)
        return rc;
    e->shift = base - e->start;
    m->start = base;
    m->end = e->end + e->shift;
    m->entry_gpa = (m->has_entry ? m->entry : e->entry_gpa) + e->shift;
    return boot_elf_segments(e);
}

/*
 * 1: 3.1.3, 2: 3.1.5. load_addr of all ones in version 2 means the file's beginning; ends of 0 mean the file's end,
 * and no BSS.
 */
static int load_addresses(struct multiboot *m)
{
    const struct boot_file *f = &m->l->kernel;
    u64 offset, size, memory, base;
    int rc;

    if (m->load_addr == UINT32_MAX)
        m->load_addr = (u32)(m->header_addr - m->header);
    if (m->header_addr < m->load_addr || m->header_addr - m->load_addr > m->header)
        return refuse(m, "has addresses that contradict each other");
    offset = m->header - (m->header_addr - m->load_addr);
    size = m->load_end ? (u64)m->load_end - m->load_addr : f->size - offset;
    if ((m->load_end && m->load_end < m->load_addr) || !range_in(offset, size, f->size) || !size)
        return refuse(m, "asks for more than the file holds");
    memory = m->bss_end ? (u64)m->bss_end - m->load_addr : size;
    if ((m->bss_end && m->bss_end < m->load_addr) || memory < size)
        return refuse(m, "has a BSS that ends before it begins");
    rc = choose_place(m, m->load_addr, m->load_addr + memory, &base);
    if (!rc)
        rc = boot_room(m->l, base, memory);
    if (!rc)
        rc = boot_file_copy(f, offset, m->l->ram, base, size);
    if (!rc)
        rc = boot_zero(m->l, base + size, memory - size);
    m->start = base;
    m->end = base + memory;
    m->entry_gpa = m->entry + (base - m->load_addr);
    return rc;
}

/* Right behind the kernel, page-aligned: small kernels map little more than themselves. */
static int load_module(struct multiboot *m)
{
    const struct boot_file *f = &m->l->initrd;

    if (!f->path)
        return 0;
    m->module = e820_place(m->l->config->map, MAX(m->end, MiB), BOOT_RAM_TOP, f->size, PAGE_SIZE, false);
    if (!m->module)
        return err(-ENOMEM,
                   "initrd %s: %llu MiB do not fit beside the kernel into the guest's memory; use a larger --memory "
                   "or a smaller initrd", f->path, (unsigned long long)(f->size >> 20) + 1);
    return boot_file_copy(f, 0, m->l->ram, m->module, f->size);
}

static int load(struct multiboot *m)
{
    int rc = boot_elf_open(m->l, &m->elf);

    m->is_elf = rc == 0;
    if (m->addresses)
        rc = load_addresses(m);
    else if (rc == BOOT_OTHER)
        rc = refuse(m, "has no addresses to load it at, and the file is no ELF file");
    else if (!rc)
        rc = load_elf(m);
    if (!rc)
        rc = load_sections(m);
    return rc ? rc : load_module(m);
}

static int enter(struct multiboot *m, const struct info *in, u32 magic)
{
    int rc;

    if (in->full)
        return err(-E2BIG,
                   "kernel %s: its parameters and section headers are longer than %u KiB together; shorten "
                   "--append, or strip it",
                   m->l->kernel.path, (unsigned)(sizeof in->buf / KiB));
    if (m->entry_gpa > UINT32_MAX)
        return refuse(m, "leads to an entry above 4 GiB");
    rc = boot_write(m->l, BOOT_INFO, in->buf, in->len);
    if (!rc)
        rc = boot_enter32(m->l, m->entry_gpa);
    m->l->bsp->gpr[RAX] = magic;
    m->l->bsp->gpr[RBX] = BOOT_INFO;
    return rc;
}

/* ---- version 1 ---- */

static int info1(struct multiboot *m, struct info *in)
{
    const struct e820 *map = m->l->config->map;
    struct mb1_info i = { .flags = MB1_HAS_MEMORY | MB1_HAS_CMDLINE | MB1_HAS_MMAP | MB1_HAS_NAME };
    struct { u32 start, end, string, reserved; } module = { .start = (u32)m->module };

    info_add(in, &i, sizeof i, 8);
    basic_memory(m, &i.mem_lower, &i.mem_upper);
    i.cmdline = info_string(in, cmdline_of(m));
    i.boot_loader_name = info_string(in, LOADER_NAME);
    if (m->module) {
        module.end = (u32)(m->module + m->l->initrd.size);
        module.string = info_string(in, m->l->initrd.path);
        i.mods_addr = BOOT_INFO + info_add(in, &module, sizeof module, 8);
        i.mods_count = 1;
        i.flags |= MB1_HAS_MODS;
    }
    i.mmap_addr = BOOT_INFO + info_add(in, NULL, 0, 8);
    for (unsigned n = 0; n < map->n; n++) {
        struct { u32 size; u64 base, length; u32 type; } __attribute__((packed)) entry = {
            20, map->entry[n].base, map->entry[n].size, map->entry[n].type };
        info_add(in, &entry, sizeof entry, 1);
    }
    i.mmap_length = map->n * 24;
    if (m->sections) {
        i.syms_num = m->elf.shnum;
        i.syms_size = m->elf.shentsize;
        i.syms_shndx = m->elf.shstrndx;
        i.syms_addr = BOOT_INFO + info_add(in, m->sections, (u64)m->elf.shnum * m->elf.shentsize, 8);
        i.flags |= MB1_HAS_ELF;
    }
    memcpy(in->buf, &i, sizeof i);
    return enter(m, in, MB1_ENTRY);
}

static int boot1(struct multiboot *m, const struct mb1_header *h, u64 room, struct info *in)
{
    int rc;

    if (h->flags & 0xffff & ~MB1_KNOWN)
        return refuse(m, "asks for features that doppel does not have");
    if (h->flags & MB1_ADDRESSES) {
        if (room < sizeof *h)
            return refuse(m, "is truncated");
        m->addresses = m->has_entry = true;
        m->header_addr = h->header_addr;
        m->load_addr = h->load_addr;
        m->load_end = h->load_end_addr;
        m->bss_end = h->bss_end_addr;
        m->entry = h->entry_addr;
        if (m->load_addr == UINT32_MAX)
            return refuse(m, "has addresses that contradict each other");
    }
    rc = load(m);
    return rc ? rc : info1(m, in);
}

/* ---- version 2 ---- */

static void tag_begin(struct info *in, u32 type)
{
    u32 head[2] = { type, 0 };

    info_add(in, head, sizeof head, 8);
}

/* start: the length before tag_begin(). The tag's size leaves out the padding that follows it. */
static void tag_end(struct info *in, u32 start)
{
    u32 at = (u32)ALIGN_UP(start, 8), size = in->len - at;

    if (!in->full)
        memcpy(in->buf + at + 4, &size, sizeof size);
}

static void tag(struct info *in, u32 type, const void *body, u64 len)
{
    u32 start = in->len;

    tag_begin(in, type);
    info_add(in, body, len, 1);
    tag_end(in, start);
}

static void tag_map(struct info *in, const struct e820 *map)
{
    const u32 head[2] = { 24, 0 };                                 /* size and version of an entry */
    u32 start = in->len;

    tag_begin(in, MB2_MMAP);
    info_add(in, head, sizeof head, 1);
    for (unsigned n = 0; n < map->n; n++) {
        struct { u64 base, length; u32 type, reserved; } entry = { map->entry[n].base, map->entry[n].size, map->entry[n].type, 0 };
        info_add(in, &entry, sizeof entry, 1);
    }
    tag_end(in, start);
}

static void tag_elf(struct info *in, const struct multiboot *m)
{
    const u32 head[3] = { m->elf.shnum, m->elf.shentsize, m->elf.shstrndx };
    u32 start = in->len;

    tag_begin(in, MB2_ELF);
    info_add(in, head, sizeof head, 1);
    info_add(in, m->sections, (u64)m->elf.shnum * m->elf.shentsize, 1);
    tag_end(in, start);
}

static void tag_module(struct info *in, const struct multiboot *m)
{
    const u32 range[2] = { (u32)m->module, (u32)(m->module + m->l->initrd.size) };
    u32 start = in->len;

    tag_begin(in, MB2_MODULE);
    info_add(in, range, sizeof range, 1);
    info_string(in, m->l->initrd.path);
    tag_end(in, start);
}

static int info2(struct multiboot *m, struct info *in)
{
    u32 head[2] = { 0, 0 }, memory[2], base = (u32)m->start;
    u8 rsdp[36];

    info_add(in, head, sizeof head, 8);
    tag(in, MB2_CMDLINE, cmdline_of(m), strlen(cmdline_of(m)) + 1);
    tag(in, MB2_NAME, LOADER_NAME, sizeof LOADER_NAME);
    if (m->module)
        tag_module(in, m);
    basic_memory(m, &memory[0], &memory[1]);
    tag(in, MB2_MEMORY, memory, sizeof memory);
    tag_map(in, m->l->config->map);
    if (m->sections)
        tag_elf(in, m);
    if (m->l->config->rsdp_gpa && ram_read(m->l->ram, m->l->config->rsdp_gpa, rsdp, sizeof rsdp) == 0) {
        tag(in, MB2_RSDP_OLD, rsdp, 20);
        tag(in, MB2_RSDP_NEW, rsdp, sizeof rsdp);
    }
    if (m->relocatable)
        tag(in, MB2_LOAD_BASE, &base, sizeof base);
    tag(in, MB2_END, NULL, 0);
    head[0] = in->len;
    memcpy(in->buf, head, sizeof head);
    return enter(m, in, MB2_ENTRY);
}

/* One tag of the header; body has len bytes. */
static int header_tag(struct multiboot *m, const struct mb2_tag *t, const u8 *body, u32 len)
{
    static const u8 least[] = { [MB2_H_ADDRESS] = 16, [MB2_H_ENTRY] = 4, [MB2_H_CONSOLE] = 4, [MB2_H_FRAMEBUFFER] = 12,
                                [MB2_H_EFI32] = 4, [MB2_H_EFI64] = 4, [MB2_H_RELOCATABLE] = 16 };
    u32 v[4] = { 0 };

    if (t->type < ARRAY_SIZE(least) && len < least[t->type])
        return refuse(m, "has a tag that is too short");
    memcpy(v, body, MIN(len, sizeof v));
    switch (t->type) {
    case MB2_H_REQUEST:
        for (u32 i = 0; i + 4 <= len && !(t->flags & MB2_OPTIONAL); i += 4) {
            memcpy(v, body + i, 4);
            if (v[0] > MB2_TAG_LAST)
                return refuse(m, "requires information that doppel does not know");
        }
        return 0;
    case MB2_H_ADDRESS:
        m->addresses = true;
        m->header_addr = v[0];
        m->load_addr = v[1];
        m->load_end = v[2];
        m->bss_end = v[3];
        return 0;
    case MB2_H_ENTRY:
        m->has_entry = true;
        m->entry = v[0];
        return 0;
    case MB2_H_RELOCATABLE:
        m->relocatable = true;
        m->place_min = v[0];
        m->place_max = v[1];
        m->place_align = v[2];
        m->place_how = v[3];
        return 0;
    case MB2_H_CONSOLE: case MB2_H_FRAMEBUFFER:                    /* wishes; there is no screen */
    case MB2_H_ALIGN:                                              /* modules are always page-aligned */
    case MB2_H_EFI_BS: case MB2_H_EFI32: case MB2_H_EFI64:         /* for loaders that run on EFI */
        return 0;
    default:
        return t->flags & MB2_OPTIONAL ? 0 : refuse(m, "has a required tag of an unknown kind");
    }
}

static int boot2(struct multiboot *m, const u8 *header, u32 length, struct info *in)
{
    struct mb2_tag t = { .type = UINT16_MAX };
    u64 pos = sizeof(struct mb2_header);
    int rc = 0;

    while (!rc) {
        if (!range_in(pos, sizeof t, length))
            return refuse(m, "has no end");
        memcpy(&t, header + pos, sizeof t);
        if (t.type == MB2_H_END)
            break;
        if (t.size < sizeof t || !range_in(pos, t.size, length))
            return refuse(m, "has a tag whose size makes no sense");
        rc = header_tag(m, &t, header + pos + sizeof t, t.size - (u32)sizeof t);
        pos += ALIGN_UP(t.size, 8);
    }
    if (!rc && m->addresses && !m->has_entry)
        return refuse(m, "has load addresses, but no entry address");
    if (!rc)
        rc = load(m);
    return rc ? rc : info2(m, in);
}

/* ---- finding the header ---- */

static int find(struct multiboot *m, const u8 *head, u64 size, struct info *in)
{
    struct mb2_header h2;
    struct mb1_header h1;

    for (u64 at = 0; at + sizeof h2 <= size; at += 8) {
        memcpy(&h2, head + at, sizeof h2);
        if (h2.magic != MB2_MAGIC || h2.architecture != 0 || h2.magic + h2.architecture + h2.length + h2.checksum ||
            !range_in(at, h2.length, size))
            continue;
        m->header = at;
        return boot2(m, head + at, h2.length, in);
    }
    size = MIN(size, MB1_SEARCH);
    for (u64 at = 0; at + 12 <= size; at += 4) {
        memset(&h1, 0, sizeof h1);
        memcpy(&h1, head + at, MIN(sizeof h1, size - at));
        if (h1.magic != MB1_MAGIC || h1.magic + h1.flags + h1.checksum)
            continue;
        m->header = at;
        return boot1(m, &h1, size - at, in);
    }
    return BOOT_OTHER;
}

int boot_multiboot(struct boot_load *l)
{
    u64 size = MIN(l->kernel.size, MB2_SEARCH);
    struct multiboot m = { .l = l };
    struct info *in = calloc(1, sizeof *in);
    u8 *head = malloc(MB2_SEARCH);
    int rc = in && head ? boot_file_read(&l->kernel, 0, head, size) : err(-ENOMEM, "out of memory");

    if (!rc)
        rc = find(&m, head, size, in);
    free(m.sections);
    free(head);
    free(in);
    return rc;
}
