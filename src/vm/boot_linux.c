/*
 * Linux by its own boot protocol (the kernel's Documentation/arch/x86/boot.rst, versions 2.10 and up): the compressed
 * image is put where it wants to be, boot_params (the "zero page") filled in, and control passed to the 64-bit entry,
 * or to the 32-bit one of kernels that have no other.
 *
 * The kernel unpacks itself. Left out: zImage and kernels before 2.6.31 (protocol below 2.10), which have neither
 * init_size nor pref_address; the real-mode entry; EFI hand-over.
 */
#include <asm/bootparam.h>
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "vm/boot.h"

#define HEADER_OFFSET 0x1f1u                                 /* of struct setup_header in the file and in boot_params */
#define BOOT_FLAG 0xaa55
#define HDRS 0x53726448u                                           /* "HdrS" */
#define ENTRY64 0x200
#define LOADER_OTHER 0xff                                          /* type_of_loader: no assigned number */

struct image {
    struct setup_header h;
    u64 offset, size;                                              /* the protected-mode part in the file */
    u64 gpa, end;                                   /* in memory: until it has unpacked itself it needs all up to end */
};

static int damaged(const struct boot_load *l, const char *what)
{
    return err(-EINVAL, "kernel %s: is damaged: %s in its header makes no sense; get it again", l->kernel.path, what);
}

static int read_header(struct boot_load *l, struct image *im)
{
    const struct boot_file *f = &l->kernel;
    u64 room = sizeof im->h;

    memset(&im->h, 0, sizeof im->h);
    if (f->size < HEADER_OFFSET + offsetof(struct setup_header, realmode_swtch))
        return BOOT_OTHER;
    room = MIN(room, f->size - HEADER_OFFSET);
    int rc = boot_file_read(f, HEADER_OFFSET, &im->h, room);
    if (rc)
        return rc;
    if (im->h.boot_flag != BOOT_FLAG || im->h.header != HDRS)
        return BOOT_OTHER;
    /* The header's length is given by the jump over it (second byte); what lies behind belongs to something else. */
    u64 length = 0x202 + (im->h.jump >> 8) - HEADER_OFFSET;
    if (length < room)
        memset((u8 *)&im->h + length, 0, room - length);
    if (im->h.version < 0x20a || !(im->h.loadflags & LOADED_HIGH))
        return err(-ENOEXEC, "kernel %s: uses boot protocol %u.%02u; 2.10 (Linux 2.6.31) or later is needed", f->path,
                   im->h.version >> 8, im->h.version & 0xff);
    if (im->h.version < 0x20c)
        im->h.xloadflags = 0;

    im->offset = ((im->h.setup_sects ? im->h.setup_sects : 4u) + 1) * 512ull;
    im->size = im->h.syssize * 16ull;
    if (!im->size)
        return damaged(l, "its size");
    /* Units of 16 bytes: what is not Linux itself (memtest86+) does not always fill the last one. */
    if (im->offset < f->size && im->size > f->size - im->offset && im->size - (f->size - im->offset) < 16)
        im->size = f->size - im->offset;
    if (!range_in(im->offset, im->size, f->size))
        return err(-EIO, "kernel %s: is truncated: %llu of %llu bytes are there; get it again", f->path,
                   (unsigned long long)f->size, (unsigned long long)(im->offset + im->size));
    return 0;
}

/* Where it wants to be; or, if it can be moved, the lowest place above that is large enough. Not one below: the kernel
 * would unpack itself at pref_address all the same (compressed/head_64.S: LOAD_PHYSICAL_ADDR), over whatever is there. */
static int place_image(struct boot_load *l, struct image *im)
{
    const struct e820 *map = l->config->map;
    u64 need = MAX((u64)im->h.init_size, im->size), align = im->h.kernel_alignment;

    if (im->h.relocatable_kernel && (!align || align & (align - 1)))
        return damaged(l, "its alignment");
    im->gpa = im->h.pref_address;
    if (im->gpa < MiB || !range_in(im->gpa, need, BOOT_RAM_TOP) || !e820_usable(map, im->gpa, need))
        im->gpa = im->h.relocatable_kernel
            ? e820_place(map, MAX(MiB, im->h.pref_address), BOOT_RAM_TOP, need, align, false) : 0;
    if (!im->gpa)
        return err(-ENOMEM,
                   "kernel %s: needs %llu MiB of memory between %llu MiB and %llu MiB to unpack itself; use a larger --memory",
                   l->kernel.path, (unsigned long long)(need >> 20) + 1,
                   (unsigned long long)(MAX(MiB, im->h.pref_address) >> 20), BOOT_RAM_TOP / MiB);
    im->end = im->gpa + need;
    return boot_file_copy(&l->kernel, im->offset, l->ram, im->gpa, im->size);
}

static int write_params(struct boot_load *l, const struct image *im, u64 initrd)
{
    const struct e820 *map = l->config->map;
    struct boot_params p;

    memset(&p, 0, sizeof p);
    p.hdr = im->h;
    p.hdr.type_of_loader = LOADER_OTHER;
    p.hdr.code32_start = (u32)im->gpa;
    p.hdr.cmd_line_ptr = BOOT_CMDLINE;
    p.hdr.ramdisk_image = (u32)initrd;
    p.hdr.ramdisk_size = initrd ? (u32)l->initrd.size : 0;
    p.acpi_rsdp_addr = l->config->rsdp_gpa;
    _Static_assert(E820_MAX_ENTRIES_ZEROPAGE >= E820_MAX, "boot_params holds our map");
    p.e820_entries = (u8)map->n;
    for (unsigned i = 0; i < map->n; i++)
        p.e820_table[i] = (struct boot_e820_entry){ map->entry[i].base, map->entry[i].size, map->entry[i].type };
    _Static_assert(sizeof p == PAGE_SIZE, "boot_params is one page");
    return boot_write(l, BOOT_INFO, &p, sizeof p);
}

int boot_linux(struct boot_load *l)
{
    struct image im;
    u64 initrd;
    int rc = read_header(l, &im);

    if (!rc)
        rc = boot_cmdline(l, (u64)im.h.cmdline_size + 1);
    if (!rc)
        rc = place_image(l, &im);
    if (!rc)
        rc = boot_initrd(l, im.end, (u64)im.h.initrd_addr_max + 1, &initrd);
    if (!rc)
        rc = write_params(l, &im, initrd);
    if (rc)
        return rc;
    if (im.h.xloadflags & XLF_KERNEL_64)
        rc = boot_enter64(l, im.gpa + ENTRY64);
    else
        rc = boot_enter32(l, im.gpa);
    l->bsp->gpr[RSI] = BOOT_INFO;
    return rc;
}
