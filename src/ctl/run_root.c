/*
 * `doppel run --root FOLDER`: the folder is shared read-only under a tag that the default guest's init knows (guest/protocol.h), by what this host and
 * the guest's kernel have: virtio-fs where virtiofsd can run, else 9p, for which the guest may have to be the one with Debian's standard kernel.
 */
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "back/virtiofsd.h"
#include "ctl/run_state.h"

#define TAG "doppel-root"

/* Where we are, as the guest's command sees it. */
static int find_directory(struct run *run, const char *folder)
{
    char top[PATH_MAX], here[PATH_MAX];
    struct stat st;
    size_t len;
    if (!realpath(folder, top) || stat(top, &st) < 0)
        return err(-errno, "--root %s: %s; name a folder of this host", folder, strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return err(-ENOTDIR, "--root %s: it is no folder; name one of this host", folder);
    if (!getcwd(here, sizeof(here)))
        strcpy(here, "/");
    len = strcmp(top, "/") ? strlen(top) : 0;
    bool below = !strncmp(here, top, len) && (here[len] == '/' || !here[len]);
    run->root_dir = strdup(below && here[len] ? here + len : "/");
    return run->root_dir ? 0 : err(-ENOMEM, "no memory");
}

/* virtiofsd cannot run here, which why says. A kernel and an initrd of the user's are taken to have 9p. */
static int choose_9p(struct run *run, const char *why)
{
    const struct run_options *o = &run->options;
    char reason[400];
    run->root_kind = "9p";
    if (o->kernel || o->initrd || guest_mounts(&run->guest, "9p"))
        return 0;
    snprintf(reason, sizeof(reason), "%s", why);
    message(&run->messages, LOG_INFO, "--root: %s; so it is shared by 9p, with Debian's standard kernel", reason);
    int r = guest_find_or_build_standard(&run->guest, o->quiet);
    return r < 0 ? err(r, "--root: by virtio-fs: %s; by 9p: %.400s", reason, err_last()) : 0;
}

static int choose_kind(struct run *run)
{
    if (virtiofsd_usable(run->options.root, true) < 0)
        return choose_9p(run, err_last());
    run->root_kind = "virtiofs";
    if (!run->options.initrd && !guest_mounts(&run->guest, "virtiofs"))
        return err(-ENOENT, "--root: the default guest in %s was built before there was this option; build it again: guest/build %s", run->guest.dir, run->guest.dir);
    return 0;
}

int run_root_open(struct run *run)
{
    struct run_options *o = &run->options;
    if (!o->root)
        return 0;
    int r = find_directory(run, o->root);
    if (r == 0)
        r = choose_kind(run);
    if (r < 0)
        return r;
    o->share[o->shares++] = (struct vm_share){.path = o->root, .tag = TAG, .readonly = true, .virtiofs = !strcmp(run->root_kind, "virtiofs")};
    return 0;
}
