/*
 * What a real PC would run first: firmware images, and boot sectors without firmware.
 *
 * A firmware image ends at 4 GiB; its last 256 KiB are seen below 1 MiB as well, and the processor starts at the reset
 * vector as after power-on (SDM vol. 3A 10.1.4). Both places are RAM here, filled anew at each reset: firmware that
 * shadows itself finds nothing to unlock, and what writes to its ROM changes it until the next reset.
 *
 * A boot sector (0x55 0xaa at its end) is loaded at 0x7c00 and entered in real mode, as a BIOS would, but there is no
 * BIOS: interrupt vectors lead nowhere. Since it cannot read what follows, the whole file is loaded behind it.
 */
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "vm/boot.h"

#define SECTOR         512u
#define SECTOR_GPA     0x7c00u
#define DRIVE_FIRST    0x80
#define LOW_ROM        (256 * KiB)
#define ATTR_REAL      (SEG_P | SEG_S | 0x3)

int boot_firmware_size(const char *path, u64 *size)
{
    struct boot_file f;
    int rc = boot_file_open(&f, "firmware", path);

    if (rc)
        return rc;
    *size = f.size;
    boot_file_close(&f);
    if (*size % BOOT_FIRMWARE_STEP || *size > BOOT_FIRMWARE_MAX)
        return err(-EINVAL,
                   "firmware %s: has %llu bytes; an image is a whole number of %llu KiB and up to %llu MiB long: is "
                   "it the right file?",
                   path, (unsigned long long)*size, BOOT_FIRMWARE_STEP / KiB, BOOT_FIRMWARE_MAX / MiB);
    return 0;
}

int boot_firmware(struct boot_load *l)
{
    const struct boot_file *f = &l->firmware;
    u64 low = MIN(f->size, LOW_ROM);
    int rc = boot_file_copy(f, 0, l->ram, 4 * GiB - f->size, f->size);

    if (!rc)
        rc = boot_file_copy(f, f->size - low, l->ram, MiB - low, low);
    x86_reset(l->bsp, true);
    return rc;
}

int boot_sector(struct boot_load *l)
{
    const struct boot_file *f = &l->kernel;
    struct x86 *x = l->bsp;
    u8 mark[2], first[2];
    int rc;

    if (f->size < SECTOR || f->size % SECTOR)
        return BOOT_OTHER;
    rc = boot_file_read(f, SECTOR - sizeof mark, mark, sizeof mark);
    if (!rc)
        rc = boot_file_read(f, 0, first, sizeof first);
    if (rc)
        return rc;
    /* "MZ": the beginning of a Linux kernel or EFI program, which has the mark as well. */
    if (mark[0] != 0x55 || mark[1] != 0xaa || (first[0] == 'M' && first[1] == 'Z'))
        return BOOT_OTHER;
    if (!e820_usable(l->config->map, SECTOR_GPA, f->size))
        return err(-EFBIG,
                   "kernel %s: is a disk image with a boot sector, too large to be loaded whole, and there is no "
                   "BIOS that would load the rest; give a kernel, or --firmware FILE with the image as --disk", f->path);
    rc = boot_file_copy(f, 0, l->ram, SECTOR_GPA, f->size);
    x86_reset(x, true);
    x->cr0 = CR0_ET;                                               /* caches on */
    x->gpr[RDX] = DRIVE_FIRST;
    x->gpr[RSP] = SECTOR_GPA;
    for (unsigned i = 0; i < SEGS; i++)
        x->seg[i] = (struct x86_seg){ .limit = 0xffff, .attr = ATTR_REAL };
    x->seg[SEG_CS].attr |= 0x8;
    x->rip = SECTOR_GPA;
    return rc;
}
