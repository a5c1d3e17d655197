/*
 * ELF kernels (vmlinux, unikernels, test programs) by PVH: the "x86/HVM direct boot ABI" of Xen's docs/misc/pvh.pandoc,
 * structures as in xen/arch-x86/hvm/start_info.h. The note XEN_ELFNOTE_PHYS32_ENTRY gives the entry: 32-bit protected
 * mode, paging off, EBX = hvm_start_info.
 *
 * Segments go to their physical addresses. Nothing in the file is trusted: each number is checked before it is an
 * address, a length or a count.
 * Multiboot kernels are ELF files as well: boot_elf.h is what both ways share. Left out: relocation entries.
 */
#include <elf.h>
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "vm/boot_elf.h"

#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define NOTES_MAX (1 * MiB)
#define SEGMENTS_MAX 256

/* Version 1. */
#define HVM_START_MAGIC 0x336ec578
struct hvm_start_info {
    u32 magic, version, flags, nr_modules;
    u64 modlist_paddr, cmdline_paddr, rsdp_paddr;
    u64 memmap_paddr;
    u32 memmap_entries, reserved;
};
struct hvm_modlist_entry {
    u64 paddr, size, cmdline_paddr, reserved;
};
struct hvm_memmap_table_entry {
    u64 addr, size;
    u32 type, reserved;
};

int boot_elf_bad(const struct boot_elf *e, const char *what)
{
    return err(-EINVAL, "kernel %s: %s; get it again, or take another one", e->l->kernel.path, what);
}

int boot_elf_open(struct boot_load *l, struct boot_elf *e)
{
    const struct boot_file *f = &l->kernel;
    union { Elf64_Ehdr e64; Elf32_Ehdr e32; u8 ident[EI_NIDENT]; } h;
    unsigned machine, type, phentsize;
    int rc = 0;

    *e = (struct boot_elf){ .l = l, .start = UINT64_MAX };
    memset(&h, 0, sizeof h);
    if (f->size < EI_NIDENT)
        return BOOT_OTHER;
    rc = boot_file_read(f, 0, &h, MIN(f->size, sizeof h));
    if (rc)
        return rc;
    if (memcmp(h.ident, ELFMAG, SELFMAG))
        return BOOT_OTHER;
    e->is64 = h.ident[EI_CLASS] == ELFCLASS64;
    if (f->size < (e->is64 ? sizeof h.e64 : sizeof h.e32))
        return boot_elf_bad(e, "is a truncated ELF file");
    machine = e->is64 ? h.e64.e_machine : h.e32.e_machine;
    type = e->is64 ? h.e64.e_type : h.e32.e_type;
    phentsize = e->is64 ? h.e64.e_phentsize : h.e32.e_phentsize;
    e->phoff = e->is64 ? h.e64.e_phoff : h.e32.e_phoff;
    e->phnum = e->is64 ? h.e64.e_phnum : h.e32.e_phnum;
    e->entry = e->is64 ? h.e64.e_entry : h.e32.e_entry;
    e->shoff = e->is64 ? h.e64.e_shoff : h.e32.e_shoff;
    e->shnum = e->is64 ? h.e64.e_shnum : h.e32.e_shnum;
    e->shentsize = e->is64 ? h.e64.e_shentsize : h.e32.e_shentsize;
    e->shstrndx = e->is64 ? h.e64.e_shstrndx : h.e32.e_shstrndx;
    if (h.ident[EI_DATA] != ELFDATA2LSB || (machine != EM_X86_64 && machine != EM_386))
        return err(-ENOEXEC, "kernel %s: is an ELF file for another processor (machine %u); doppel runs x86 kernels",
                   f->path, machine);
    if (type != ET_EXEC && type != ET_DYN)
        return err(-ENOEXEC, "kernel %s: is an ELF file, but not an executable (type %u); take vmlinux or bzImage",
                   f->path, type);
    if (phentsize != (e->is64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr)) || !e->phnum || e->phnum > SEGMENTS_MAX)
        return boot_elf_bad(e, "is an ELF file without usable program headers");
    return 0;
}

int boot_elf_phdr(const struct boot_elf *e, unsigned i, Elf64_Phdr *p)
{
    Elf32_Phdr p32;
    u64 size = e->is64 ? sizeof *p : sizeof p32;
    int rc;

    if (e->phoff > e->l->kernel.size)
        return boot_elf_bad(e, "is truncated: its program headers are missing");
    rc = boot_file_read(&e->l->kernel, e->phoff + i * size, e->is64 ? (void *)p : (void *)&p32, size);
    if (!rc && !e->is64)
        *p = (Elf64_Phdr){ .p_type = p32.p_type,
                           .p_flags = p32.p_flags,
                           .p_offset = p32.p_offset,
                           .p_vaddr = p32.p_vaddr,
                           .p_paddr = p32.p_paddr,
                           .p_filesz = p32.p_filesz,
                           .p_memsz = p32.p_memsz,
                           .p_align = p32.p_align };
    return rc;
}

/* The rest of a segment is zero also when memory is not fresh (reset), or when segments overlap. */
int boot_zero(struct boot_load *l, u64 gpa, u64 len)
{
    static const u8 none[64 * KiB];
    int rc = 0;

    for (u64 n; len && !rc; gpa += n, len -= n) {
        n = MIN(len, sizeof none);
        rc = boot_write(l, gpa, none, n);
    }
    return rc;
}

int boot_room(const struct boot_load *l, u64 gpa, u64 len)
{
    if (gpa < BOOT_LOW_END)
        return err(-EINVAL,
                   "kernel %s: wants to be at 0x%llx; addresses below 0x%x hold what the boot loader hands over: "
                   "link it higher",
                   l->kernel.path, (unsigned long long)gpa, BOOT_LOW_END);
    if (!range_in(gpa, len, BOOT_RAM_TOP) || !e820_usable(l->config->map, gpa, len))
        return err(-ENOMEM, "kernel %s: wants %llu MiB at %llu MiB, where the guest has no memory; use a larger --memory", l->kernel.path,
                   (unsigned long long)(len >> 20) + 1, (unsigned long long)(gpa >> 20));
    return 0;
}

static int load_segment(struct boot_elf *e, const Elf64_Phdr *p)
{
    struct boot_load *l = e->l;
    u64 gpa = p->p_paddr + e->shift;
    int rc;

    if (!p->p_memsz)
        return 0;
    if (p->p_filesz > p->p_memsz)
        return boot_elf_bad(e, "has a segment that is larger in the file than in memory");
    rc = boot_room(l, gpa, p->p_memsz);
    if (!rc)
        rc = boot_file_copy(&l->kernel, p->p_offset, l->ram, gpa, p->p_filesz);
    if (!rc)
        rc = boot_zero(l, gpa + p->p_filesz, p->p_memsz - p->p_filesz);
    return rc;
}

int boot_elf_range(struct boot_elf *e)
{
    Elf64_Phdr p;
    int rc = 0;

    for (unsigned i = 0; i < e->phnum && !rc; i++) {
        rc = boot_elf_phdr(e, i, &p);
        if (rc || p.p_type != PT_LOAD || !p.p_memsz)
            continue;
        if (!range_in(p.p_paddr, p.p_memsz, 4 * GiB))
            return boot_room(e->l, p.p_paddr, p.p_memsz);
        e->start = MIN(e->start, p.p_paddr);
        e->end = MAX(e->end, p.p_paddr + p.p_memsz);
        /* The entry is a virtual address; paging is off. */
        if (!e->entry_gpa && e->entry - p.p_vaddr < p.p_memsz)
            e->entry_gpa = e->entry - p.p_vaddr + p.p_paddr;
    }
    if (!rc && !e->end)
        return boot_elf_bad(e, "is an ELF file without anything to load");
    if (!e->entry_gpa)
        e->entry_gpa = e->entry;
    return rc;
}

int boot_elf_segments(struct boot_elf *e)
{
    Elf64_Phdr p;
    int rc = 0;

    for (unsigned i = 0; i < e->phnum && !rc; i++) {
        rc = boot_elf_phdr(e, i, &p);
        if (!rc && p.p_type == PT_LOAD)
            rc = load_segment(e, &p);
    }
    return rc;
}

/* Looks for the entry in one PT_NOTE. Names and descriptors are padded to 4 bytes, in segments of alignment 8 to 8. */
static int read_notes(const struct boot_elf *e, const Elf64_Phdr *p, u64 *entry)
{
    const u64 align = p->p_align == 8 ? 8 : 4;
    u64 pos = 0;

    if (p->p_filesz > NOTES_MAX || p->p_offset > e->l->kernel.size)
        return boot_elf_bad(e, "is an ELF file whose notes make no sense");
    while (!*entry && p->p_filesz - pos >= sizeof(Elf64_Nhdr)) {
        Elf64_Nhdr n;
        u64 value = 0;
        char name[4];
        int rc = boot_file_read(&e->l->kernel, p->p_offset + pos, &n, sizeof n);
        if (rc)
            return rc;
        u64 desc = ALIGN_UP(sizeof n + n.n_namesz, align), next = ALIGN_UP(desc + n.n_descsz, align);
        if (n.n_type == XEN_ELFNOTE_PHYS32_ENTRY && n.n_namesz == sizeof name && (n.n_descsz == 4 || n.n_descsz == 8)) {
            rc = boot_file_read(&e->l->kernel, p->p_offset + pos + sizeof n, name, sizeof name);
            if (!rc)
                rc = boot_file_read(&e->l->kernel, p->p_offset + pos + desc, &value, n.n_descsz);
            if (rc)
                return rc;
            if (!memcmp(name, "Xen", sizeof name))
                *entry = value;
        }
        if (next > p->p_filesz - pos)
            break;
        pos += next;
    }
    return 0;
}

static int write_start_info(struct boot_elf *e, u64 initrd)
{
    struct boot_load *l = e->l;
    const struct e820 *map = l->config->map;
    struct hvm_modlist_entry module = { .paddr = initrd, .size = l->initrd.size };
    struct hvm_memmap_table_entry range[E820_MAX];
    struct hvm_start_info info = {
        .magic = HVM_START_MAGIC,
        .version = 1,
        .nr_modules = initrd ? 1 : 0,
        .modlist_paddr = initrd ? BOOT_INFO2 : 0,
        .cmdline_paddr = BOOT_CMDLINE,
        .rsdp_paddr = l->config->rsdp_gpa,
        .memmap_paddr = BOOT_INFO2 + sizeof module,
        .memmap_entries = map->n,
    };
    int rc;

    for (unsigned i = 0; i < map->n; i++)
        range[i] = (struct hvm_memmap_table_entry){ map->entry[i].base, map->entry[i].size, map->entry[i].type, 0 };
    rc = boot_write(l, BOOT_INFO, &info, sizeof info);
    if (!rc)
        rc = boot_write(l, BOOT_INFO2, &module, sizeof module);
    if (!rc)
        rc = boot_write(l, BOOT_INFO2 + sizeof module, range, map->n * sizeof *range);
    return rc;
}

int boot_elf(struct boot_load *l)
{
    struct boot_elf e;
    Elf64_Phdr p;
    u64 initrd, entry = 0;
    int rc = boot_elf_open(l, &e);

    for (unsigned i = 0; i < e.phnum && !rc; i++) {
        rc = boot_elf_phdr(&e, i, &p);
        if (!rc && p.p_type == PT_NOTE)
            rc = read_notes(&e, &p, &entry);
    }
    if (!rc && (!entry || entry > UINT32_MAX))
        rc = err(-ENOEXEC, "kernel %s: is an ELF file without a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY) or multiboot "
                 "header; build it with CONFIG_PVH, or take bzImage", l->kernel.path);
    if (!rc)
        rc = boot_elf_range(&e);
    if (!rc)
        rc = boot_elf_segments(&e);
    if (!rc)
        rc = boot_cmdline(l, BOOT_CMDLINE_MAX);
    if (!rc)
        rc = boot_initrd(l, MAX(e.end, MiB), BOOT_RAM_TOP, &initrd);
    if (!rc)
        rc = write_start_info(&e, initrd);
    if (!rc)
        rc = boot_enter32(l, entry);
    if (!rc)
        l->bsp->gpr[RBX] = BOOT_INFO;
    return rc;
}
