/*
 * doppel run IMAGE: its disk below an overlay, before the disks of the command line, and its kernel (image_store.h), or another one. The image stays locked
 * for as long as it is used. With a command, the initrd's init stays process 1 and runs that in the image's root (guest/root.c). And the disk of
 * --cloud-init, behind all others.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "ctl/run.h"
#include "ctl/run_state.h"
#include "ctl/seed.h"

static int read_cmdline(struct run_image *m)
{
    char path[PATH_MAX];
    int r = image_path(&m->image, "cmdline", path);
    FILE *f = r < 0 ? NULL : fopen(path, "re");
    if (!f)
        return r < 0 ? r : err(-EINVAL, "image %s: its cmdline cannot be read: %s; build it again", m->image.name, strerror(errno));
    size_t n = fread(m->cmdline, 1, sizeof(m->cmdline) - 1, f);
    fclose(f);
    m->cmdline[n] = '\0';
    if (strlen(m->cmdline) != n)
        return err(-EINVAL, "image %s: its cmdline is damaged; build it again", m->image.name);
    m->cmdline[strcspn(m->cmdline, "\n")] = '\0';
    return 0;
}

static int check_command(const struct run_image *m)
{
    if (m->image.info.firmware)
        return err(-EINVAL, "image %s: boots by firmware, and its own system starts programs; run it without a command and log in, or, if it "
                            "has doppel's agent, start it by doppel run %s --detach and use doppel exec", m->image.name, m->image.name);
    return m->image.info.commands ? 0 : err(-EINVAL, "image %s: was made by a doppel that could not run commands in images; make it again", m->image.name);
}

/* The one of the command line. */
static int other_kernel(struct run_image *m, const struct run_options *o)
{
    int r = 0;
    snprintf(m->kernel, sizeof(m->kernel), "%s", o->kernel);
    if (o->initrd)
        snprintf(m->initrd, sizeof(m->initrd), "%s", o->initrd);
    else if (!m->image.info.firmware)
        r = image_path(&m->image, "initrd", m->initrd);
    return r < 0 || m->image.info.firmware ? r : read_cmdline(m);
}

static int find_boot(struct run_image *m, const struct run_options *o)
{
    int r = o->command ? check_command(m) : 0;
    if (r < 0 || o->kernel)
        return r < 0 ? r : other_kernel(m, o);
    if (m->image.info.firmware) {
        if (access(RUN_FIRMWARE, R_OK) < 0)
            return err(-ENOENT, "image %s: boots by firmware, and there is no " RUN_FIRMWARE "; install the package seabios, or say doppel run --firmware FILE "
                                "--disk %s/root.img,overlay", m->image.name, m->image.dir);
        snprintf(m->firmware, sizeof(m->firmware), RUN_FIRMWARE);
        return 0;
    }
    r = image_path(&m->image, "vmlinuz", m->kernel);
    if (r == 0)
        r = image_path(&m->image, "initrd", m->initrd);
    return r < 0 ? r : read_cmdline(m);
}

static int add_disk(struct run *run, struct run_image *m)
{
    struct run_options *o = &run->options;
    int r = image_path(&m->image, "root.img", m->disk);
    if (r == 0 && o->keep)
        r = image_kept_path(&m->image, o->keep, m->kept);
    if (r == 0 && o->disks == VM_DISKS_MAX)
        r = err(-EINVAL, "image %s: its disk is one too many; a guest has up to %d", m->image.name, VM_DISKS_MAX);
    if (r < 0)
        return r;
    memmove(o->disk + 1, o->disk, o->disks++ * sizeof(*o->disk));
    o->disk[0] = (struct vm_disk){.block = {.path = m->disk, .overlay = m->kept}};
    return 0;
}

int run_image_open(struct run *run)
{
    struct run_image *m = calloc(1, sizeof(*m));
    if (!m)
        return err(-ENOMEM, "no memory");
    m->image.fd = -1;
    run->image = m;
    int r = image_open(&m->image, run->options.image);
    if (r == -ENOENT)
        return err(r, "there is no image \"%s\" (\"doppel image list\" lists yours, \"doppel image build debian %s\" makes one; a command for the guest "
                      "stands behind \"--\")", run->options.image, run->options.image);
    if (r == 0)
        r = find_boot(m, &run->options);
    return r < 0 ? r : add_disk(run, m);
}

static void warn(void *arg, const char *text)
{
    message(arg, LOG_WARN, "%s", text);
}

int run_seed_open(struct run *run)
{
    struct run_options *o = &run->options;
    if (!o->seed)
        return 0;
    if (o->disks == VM_DISKS_MAX)
        return err(-EINVAL, "--cloud-init: its disk is one too many; a guest has up to %d", VM_DISKS_MAX);
    run->seed_fd = seed_open(o->seed, run->instance.name[0] ? run->instance.name : "debian", warn, &run->messages);
    if (run->seed_fd < 0)
        return run->seed_fd;
    snprintf(run->seed_path, sizeof(run->seed_path), "/proc/self/fd/%d", run->seed_fd);
    o->disk[o->disks++] = (struct vm_disk){.block = {.path = run->seed_path, .readonly = true}};
    return 0;
}

void run_image_close(struct run *run)
{
    if (run->seed_fd >= 0)
        close(run->seed_fd);
    run->seed_fd = -1;
    if (run->image)
        image_close(&run->image->image);
    free(run->image);
    run->image = NULL;
}
