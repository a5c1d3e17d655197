/*
 * `doppel run --root FOLDER`: the folder is shared read-only under a tag that the default guest's init knows (guest/protocol.h), by what this host and
 * the guest's kernel have.
 */
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "back/virtiofsd.h"
#include "ctl/run_state.h"

#define TAG "doppel-root"

/* Whether the guest's manifest says that it can mount that kind. One without a manifest is taken to have virtiofs. */
static bool guest_mounts(const struct guest *g, const char *kind)
{
    char path[PATH_MAX + 16], line[256];
    bool found = !strcmp(kind, "virtiofs");
    snprintf(path, sizeof(path), "%s/manifest", g->dir);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof(line), f))
        if (!strncmp(line, "shares=", 7))
            found = strstr(line, kind) != NULL;
    if (f)
        fclose(f);
    return found;
}

/* Where we are, as the guest's command sees it. */
static int find_directory(struct run *run, const char *folder)
{
    char top[PATH_MAX], here[PATH_MAX];
    size_t len;
    if (!realpath(folder, top))
        return err(-errno, "--root %s: %s; name a folder of this host", folder, strerror(errno));
    if (!getcwd(here, sizeof(here)))
        strcpy(here, "/");
    len = strcmp(top, "/") ? strlen(top) : 0;
    bool below = !strncmp(here, top, len) && (here[len] == '/' || !here[len]);
    run->root_dir = strdup(below && here[len] ? here + len : "/");
    return run->root_dir ? 0 : err(-ENOMEM, "no memory");
}

int run_root_open(struct run *run)
{
    struct run_options *o = &run->options;
    if (!o->root)
        return 0;
    struct vm_share *s = &o->share[o->shares++];
    *s = (struct vm_share){.path = o->root, .tag = TAG, .readonly = true, .virtiofs = virtiofsd_installed() || !guest_mounts(&run->guest, "9p")};
    run->root_kind = s->virtiofs ? "virtiofs" : "9p";
    if (!guest_mounts(&run->guest, run->root_kind))
        return err(-ENOENT, "--root: the default guest in %s was built before there was this option; build it again: guest/build %s", run->guest.dir, run->guest.dir);
    return find_directory(run, o->root);
}
