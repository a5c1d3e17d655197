/*
 * ELF kernels (vmlinux, unikernels, test programs) by PVH: the "x86/HVM direct boot ABI" of Xen's docs/misc/pvh.pandoc,
 * structures as in xen/arch-x86/hvm/start_info.h. The note XEN_ELFNOTE_PHYS32_ENTRY gives the entry: 32-bit protected
 * mode, paging off, EBX = hvm_start_info.
 *
 * Segments go to their physical addresses. Nothing in the file is trusted: each number is checked before it is an
 * address, a length or a count. Left out: section headers, relocation, symbol tables.
 */
#include <elf.h>
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "vm/boot.h"

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

struct elf {
    struct boot_load *l;
    bool is64;
    u64 phoff;
    unsigned phnum;
    u64 end;                                                       /* of the highest segment in memory */
    u64 entry;                                                     /* by the note; 0: none yet */
};

static int bad(const struct elf *e, const char *what)
{
    return err(-EINVAL, "kernel %s: %s; get it again, or take another one", e->l->kernel.path, what);
}

static int read_header(struct elf *e)
{
    const struct boot_file *f = &e->l->kernel;
    union { Elf64_Ehdr e64; Elf32_Ehdr e32; u8 ident[EI_NIDENT]; } h;
    unsigned machine, type, phentsize;
    int rc = 0;

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
        return bad(e, "is a truncated ELF file");
    machine = e->is64 ? h.e64.e_machine : h.e32.e_machine;
    type = e->is64 ? h.e64.e_type : h.e32.e_type;
    phentsize = e->is64 ? h.e64.e_phentsize : h.e32.e_phentsize;
    e->phoff = e->is64 ? h.e64.e_phoff : h.e32.e_phoff;
    e->phnum = e->is64 ? h.e64.e_phnum : h.e32.e_phnum;
    if (h.ident[EI_DATA] != ELFDATA2LSB || (machine != EM_X86_64 && machine != EM_386))
        return err(-ENOEXEC, "kernel %s: is an ELF file for another processor (machine %u); doppel runs x86 kernels",
                   f->path, machine);
    if (type != ET_EXEC && type != ET_DYN)
        return err(-ENOEXEC, "kernel %s: is an ELF file, but not an executable (type %u); take vmlinux or bzImage",
                   f->path, type);
    if (phentsize != (e->is64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr)) || !e->phnum || e->phnum > SEGMENTS_MAX)
        return bad(e, "is an ELF file without usable program headers");
    return 0;
}

static int read_phdr(const struct elf *e, unsigned i, Elf64_Phdr *p)
{
    Elf32_Phdr p32;
    u64 size = e->is64 ? sizeof *p : sizeof p32;
    int rc;

    if (e->phoff > e->l->kernel.size)
        return bad(e, "is truncated: its program headers are missing");
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
static int zero(struct boot_load *l, u64 gpa, u64 len)
{
    static const u8 none[64 * KiB];
    int rc = 0;

    for (u64 n; len && !rc; gpa += n, len -= n) {
        n = MIN(len, sizeof none);
        rc = boot_write(l, gpa, none, n);
    }
    return rc;
}

static int load_segment(struct elf *e, const Elf64_Phdr *p)
{
    struct boot_load *l = e->l;
    int rc;

    if (!p->p_memsz)
        return 0;
    if (p->p_filesz > p->p_memsz)
        return bad(e, "has a segment that is larger in the file than in memory");
    if (p->p_paddr < BOOT_LOW_END)
        return err(-EINVAL,
                   "kernel %s: wants to be at 0x%llx; addresses below 0x%x hold what the boot loader hands over: link "
                   "it higher",
                   l->kernel.path, (unsigned long long)p->p_paddr, BOOT_LOW_END);
    if (!range_in(p->p_paddr, p->p_memsz, BOOT_RAM_TOP) || !e820_usable(l->config->map, p->p_paddr, p->p_memsz))
        return err(-ENOMEM,
                   "kernel %s: wants 0x%llx bytes at 0x%llx, where the guest has no free memory; use a larger --memory "
                   "or link it elsewhere",
                   l->kernel.path, (unsigned long long)p->p_memsz, (unsigned long long)p->p_paddr);
    rc = boot_file_copy(&l->kernel, p->p_offset, l->ram, p->p_paddr, p->p_filesz);
    if (!rc)
        rc = zero(l, p->p_paddr + p->p_filesz, p->p_memsz - p->p_filesz);
    e->end = MAX(e->end, p->p_paddr + p->p_memsz);
    return rc;
}

/* Looks for the entry in one PT_NOTE. Names and descriptors are padded to 4 bytes, in segments of alignment 8 to 8. */
static int read_notes(struct elf *e, const Elf64_Phdr *p)
{
    const u64 align = p->p_align == 8 ? 8 : 4;
    u64 pos = 0;

    if (p->p_filesz > NOTES_MAX || p->p_offset > e->l->kernel.size)
        return bad(e, "is an ELF file whose notes make no sense");
    while (!e->entry && p->p_filesz - pos >= sizeof(Elf64_Nhdr)) {
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
                e->entry = value;
        }
        if (next > p->p_filesz - pos)
            break;
        pos += next;
    }
    return 0;
}

static int write_start_info(struct elf *e, u64 initrd)
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
    struct elf e = { .l = l };
    Elf64_Phdr p;
    u64 initrd;
    int rc = read_header(&e);

    for (unsigned i = 0; i < e.phnum && !rc; i++) {
        rc = read_phdr(&e, i, &p);
        if (!rc && p.p_type == PT_NOTE)
            rc = read_notes(&e, &p);
    }
    if (!rc && (!e.entry || e.entry > UINT32_MAX))
        rc = err(-ENOEXEC,
                 "kernel %s: is an ELF file without a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY); build it with "
                 "CONFIG_PVH, or take bzImage",
                 l->kernel.path);
    for (unsigned i = 0; i < e.phnum && !rc; i++) {
        rc = read_phdr(&e, i, &p);
        if (!rc && p.p_type == PT_LOAD)
            rc = load_segment(&e, &p);
    }
    if (!rc)
        rc = boot_cmdline(l, BOOT_CMDLINE_MAX);
    if (!rc)
        rc = boot_initrd(l, MAX(e.end, MiB), BOOT_RAM_TOP, &initrd);
    if (!rc)
        rc = write_start_info(&e, initrd);
    if (!rc)
        rc = boot_enter32(l, e.entry);
    if (!rc)
        l->bsp->gpr[RBX] = BOOT_INFO;
    return rc;
}
