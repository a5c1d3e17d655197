/*
 * What all ways to boot share: files, the command line, the initrd, and the processor's state at a kernel's entry. See
 * boot.h.
 *
 * There is no firmware, so what firmware would have set up stands here too: the memory type ranges (SDM vol. 3A 12.11),
 * a GDT, page tables.
 */
#include "vm/boot.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/err.h"

#define CHUNK (64 * KiB)

/* Selectors as the Linux boot protocol wants them (__BOOT_CS, __BOOT_DS); their descriptors are slots 2 and 3 of the
 * GDT. */
#define BOOT_CS 0x10
#define BOOT_DS 0x18
#define ATTR_CODE32 (SEG_G | SEG_DB | SEG_P | SEG_S | 0xb)
#define ATTR_CODE64 (SEG_G | SEG_L | SEG_P | SEG_S | 0xb)
#define ATTR_DATA   (SEG_G | SEG_DB | SEG_P | SEG_S | 0x3)
#define ATTR_TSS    (SEG_P | 0xb)

int boot_file_open(struct boot_file *f, const char *what, const char *path)
{
    struct stat st;

    *f = (struct boot_file){ .path = path, .what = what, .fd = -1 };
    f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK); /* a FIFO without a writer must not hold us up */
    if (f->fd < 0)
        return err(-errno, "%s %s: %s; check the name and its permissions", what, path, strerror(errno));
    int rc = 0;
    if (fstat(f->fd, &st))
        rc = err(-errno, "%s %s: %s", what, path, strerror(errno));
    else if (S_ISDIR(st.st_mode))
        rc = err(-EISDIR, "%s %s: is a directory; name the file in it", what, path);
    else if (!S_ISREG(st.st_mode))
        rc = err(-EINVAL, "%s %s: is not a regular file; copy it to one first", what, path);
    else if (!st.st_size)
        rc = err(-EINVAL, "%s %s: is empty; is it the right file?", what, path);
    f->size = rc ? 0 : (u64)st.st_size;
    if (rc)
        boot_file_close(f);
    return rc;
}

void boot_file_close(struct boot_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    f->fd = -1;
}

int boot_file_read(const struct boot_file *f, u64 offset, void *buf, u64 len)
{
    if (!range_in(offset, len, f->size))
        return err(-EIO, "%s %s: is truncated or damaged: it refers to bytes behind its end; get it again", f->what,
                   f->path);
    if (f->fd < 0) {
        memcpy(buf, f->bytes + offset, len);
        return 0;
    }
    for (u64 done = 0; done < len;) {
        ssize_t n = pread(f->fd, (u8 *)buf + done, len - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return err(-errno, "%s %s: cannot read: %s", f->what, f->path, strerror(errno));
        if (!n)
            return err(-EIO, "%s %s: became shorter while it was read; try again", f->what, f->path);
        done += (u64)n;
    }
    return 0;
}

int boot_file_copy(const struct boot_file *f, u64 offset, struct ram *ram, u64 gpa, u64 len)
{
    u8 buf[CHUNK];

    if (!ram_has(ram, gpa, len))
        return err(-ENOMEM, "%s %s: does not fit into the guest's memory at 0x%llx; use a larger --memory", f->what,
                   f->path, (unsigned long long)gpa);
    for (u64 done = 0; done < len;) {
        u64 n = MIN(len - done, sizeof buf);
        int rc = boot_file_read(f, offset + done, buf, n);
        if (rc)
            return rc;
        if (ram_write(ram, gpa + done, buf, n))
            return err(-ENOMEM, "%s %s: does not fit into the guest's memory", f->what, f->path);
        done += n;
    }
    return 0;
}

int boot_write(struct boot_load *l, u64 gpa, const void *p, u64 len)
{
    if (ram_write(l->ram, gpa, p, len))
        return err(-ENOMEM, "the guest's memory has no room for boot data at 0x%llx; use a larger --memory",
                   (unsigned long long)gpa);
    return 0;
}

int boot_cmdline(struct boot_load *l, u64 max)
{
    const char *s = l->config->cmdline ? l->config->cmdline : "";
    u64 len = strlen(s) + 1;

    max = MIN(max, BOOT_CMDLINE_MAX);
    if (len > max)
        return err(-E2BIG, "the kernel parameters are %llu bytes long; %s takes %llu; shorten --append",
                   (unsigned long long)len - 1, l->kernel.path, (unsigned long long)max - 1);
    return boot_write(l, BOOT_CMDLINE, s, len);
}

int boot_initrd(struct boot_load *l, u64 floor, u64 limit, u64 *gpa)
{
    const struct boot_file *f = &l->initrd;

    *gpa = 0;
    if (!f->path)
        return 0;
    limit = MIN(limit, BOOT_RAM_TOP);
    *gpa = e820_place(l->config->map, floor, limit, f->size, PAGE_SIZE, true);
    if (!*gpa || f->size > UINT32_MAX)
        return err(-ENOMEM,
                   "initrd %s: %llu MiB do not fit beside the kernel into the guest's memory below %llu MiB; use a "
                   "larger --memory or a smaller initrd",
                   f->path, (unsigned long long)(f->size >> 20) + 1, (unsigned long long)(limit >> 20));
    return boot_file_copy(f, 0, l->ram, *gpa, f->size);
}

/* ---- the processor ---- */

void boot_mtrrs(const struct boot_config *config, struct x86 *x)
{
    const u64 wb = 0x0606060606060606ull, hole = 4 * GiB - BOOT_RAM_TOP;

    for (unsigned i = 0; i < ARRAY_SIZE(x->mtrr_fixed); i++)
        x->mtrr_fixed[i] = i == 2 ? 0 : wb;                        /* 2: 0xa0000..0xbffff */
    x->mtrr_def_type = 0xc06;                                      /* enabled, fixed ranges too, default write-back */
    if (config->phys_bits > 32 && config->phys_bits <= 52) {
        x->mtrr_base[0] = BOOT_RAM_TOP;
        x->mtrr_mask[0] = (BIT(config->phys_bits) - hole) | BIT(11);
    }
}

static struct x86_seg segment(u16 sel, u16 attr)
{
    return (struct x86_seg){ .sel = sel, .limit = 0xffffffff, .attr = attr };
}

/* The eight bytes of a flat descriptor (SDM vol. 3A 3.4.5). */
static u64 descriptor(u16 attr)
{
    return 0x000f00000000ffffull | (u64)(attr & 0xff) << 40 | (u64)(attr >> 8) << 52;
}

static int enter(struct boot_load *l, u64 rip, u16 code)
{
    struct x86 *x = l->bsp;
    u64 gdt[4] = { 0, 0, descriptor(code), descriptor(ATTR_DATA) };

    x86_reset(x, true);
    boot_mtrrs(l->config, x);
    x->rip = rip;
    x->rflags = FLAG_1;
    x->gpr[RDX] = 0;
    x->gpr[RSP] = BOOT_STACK;
    x->seg[SEG_CS] = segment(BOOT_CS, code);
    for (int i = 0; i < SEGS; i++)
        if (i != SEG_CS)
            x->seg[i] = segment(BOOT_DS, ATTR_DATA);
    x->tr = (struct x86_seg){ .limit = 0x67, .attr = ATTR_TSS };
    x->gdtr = (struct x86_table){ .base = BOOT_GDT, .limit = sizeof gdt - 1 };
    x->cr0 = CR0_PE | CR0_ET | CR0_NE;
    return boot_write(l, BOOT_GDT, gdt, sizeof gdt);
}

int boot_enter32(struct boot_load *l, u64 rip)
{
    return enter(l, rip, ATTR_CODE32);
}

int boot_enter64(struct boot_load *l, u64 rip)
{
    enum { LEAF = 0x83, TABLE = 0x03 };                            /* present, writable; the leaf is a large page */
    const u32 pdpt = BOOT_PAGE_TABLES + PAGE_SIZE, pd = pdpt + PAGE_SIZE;
    u64 table[512] = { pdpt | TABLE };
    int rc = enter(l, rip, ATTR_CODE64);

    if (!rc)
        rc = boot_write(l, BOOT_PAGE_TABLES, table, sizeof table);
    for (u64 i = 0; i < 512; i++)
        table[i] = i < 4 ? (pd + i * PAGE_SIZE) | TABLE : 0;
    if (!rc)
        rc = boot_write(l, pdpt, table, sizeof table);
    for (u64 n = 0; n < 4 && !rc; n++) {
        for (u64 i = 0; i < 512; i++)
            table[i] = (n * GiB + i * 2 * MiB) | LEAF;
        rc = boot_write(l, pd + n * PAGE_SIZE, table, sizeof table);
    }
    l->bsp->cr3 = BOOT_PAGE_TABLES;
    l->bsp->cr4 = CR4_PAE;
    l->bsp->efer = EFER_LME | EFER_LMA;
    l->bsp->cr0 |= CR0_PG;
    return rc;
}

/* ---- which way ---- */

/* Nothing that boots here: what is it then? The user may have taken the wrong file. */
static int unknown_kernel(struct boot_load *l)
{
    static const struct { u16 offset, len; const char *magic, *what; } kind[] = {
        { 56, 4, "ARM\x64", "is a kernel for arm64; doppel runs x86 kernels: take one for amd64" },
        { 48, 5, "RISCV", "is a kernel for RISC-V; doppel runs x86 kernels: take one for amd64" },
        { 0, 2, "\x1f\x8b", "is compressed (gzip); unpack it first" },
        { 0, 4, "\x28\xb5\x2f\xfd", "is compressed (zstd); unpack it first" },
        { 0, 5, "\xfd" "7zXZ", "is compressed (xz); unpack it first" },
        { 0, 6, "070701", "is an initramfs (cpio); it goes to --initrd" },
        { 0, 2, "MZ", "is an EFI program, not a Linux bzImage; take vmlinuz as the distribution installs it in /boot" },
        { 0, 2, "PK", "is an archive; unpack it first" },
        { 32769, 5, "CD001", "is a CD image; it can be a --disk, not a --kernel" },
    };
    const struct boot_file *f = &l->kernel;
    u8 found[8];

    for (unsigned i = 0; i < ARRAY_SIZE(kind); i++)
        if (range_in(kind[i].offset, kind[i].len, f->size) && !boot_file_read(f, kind[i].offset, found, kind[i].len) &&
            !memcmp(found, kind[i].magic, kind[i].len))
            return err(-ENOEXEC, "kernel %s: %s", f->path, kind[i].what);
    return err(-ENOEXEC,
               "kernel %s: is neither a Linux kernel (bzImage), nor a multiboot kernel, nor an ELF file with a PVH "
               "entry, nor a boot sector; is it the right file, and whole?", f->path);
}

int boot_place(struct boot_load *l)
{
    int rc = boot_linux(l);

    if (rc == BOOT_OTHER)
        rc = boot_multiboot(l);
    if (rc == BOOT_OTHER)
        rc = boot_elf(l);
    if (rc == BOOT_OTHER)
        rc = boot_sector(l);
    if (rc == BOOT_OTHER)
        rc = unknown_kernel(l);
    return rc;
}

int boot_load(struct ram *ram, const struct boot_config *config, struct x86 *bsp)
{
    struct boot_load l = { .ram = ram, .config = config, .bsp = bsp, .kernel.fd = -1, .initrd.fd = -1, .firmware.fd = -1 };
    int rc = 0;

    if (config->firmware) {
        rc = boot_file_open(&l.firmware, "firmware", config->firmware);
        if (!rc)
            rc = boot_firmware(&l);
        boot_file_close(&l.firmware);
        return rc;
    }
    rc = boot_file_open(&l.kernel, "kernel", config->kernel);
    if (!rc && config->initrd)
        rc = boot_file_open(&l.initrd, "initrd", config->initrd);
    if (!rc)
        rc = boot_place(&l);
    boot_file_close(&l.kernel);
    boot_file_close(&l.initrd);
    return rc;
}
