/* Finding and making the default guest (guest.h). Used before any thread is started. */
#define _GNU_SOURCE
#include "ctl/guest.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/err.h"

#define PLACES 4
#define GUEST "guest"
#define GUEST_STANDARD "guest-standard"

/* The folder of the program's real file, symbolic links followed. */
static int program_dir(char dir[PATH_MAX])
{
    ssize_t n = readlink("/proc/self/exe", dir, PATH_MAX - 1);
    char *slash;
    if (n < 0)
        return err(-errno, "cannot tell where the program is: /proc/self/exe: %s; mount /proc", strerror(errno));
    dir[n] = '\0';
    slash = strrchr(dir, '/');
    if (!slash)
        return err(-ENOENT, "cannot tell where the program is: /proc/self/exe: %s", dir);
    slash[slash == dir ? 1 : 0] = '\0';
    return 0;
}

/* dir/name into out; false when that is too long. */
static bool join(char out[PATH_MAX], const char *dir, const char *name)
{
    int n = snprintf(out, PATH_MAX, "%s/%s", dir, name);
    return n > 0 && n < PATH_MAX;
}

static bool cache_dir(char out[PATH_MAX], const char *kind)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (cache && *cache == '/')
        return snprintf(out, PATH_MAX, "%s/doppel/%s", cache, kind) < PATH_MAX;
    return home && *home == '/' && snprintf(out, PATH_MAX, "%s/.cache/doppel/%s", home, kind) < PATH_MAX;
}

/* "guest", which an installation has in share/doppel itself, or "guest-standard". */
static unsigned places(char out[PLACES][PATH_MAX], const char *kind)
{
    static const char *const beside[] = {"", "../share/doppel/"};
    char program[PATH_MAX], name[64];
    unsigned n = 0;
    if (program_dir(program) == 0) {
        for (unsigned i = 0; i < ARRAY_SIZE(beside); i++) {
            snprintf(name, sizeof(name), "%s%s", beside[i], kind);
            n += join(out[n], program, name);
        }
        if (!strcmp(kind, GUEST))
            n += join(out[n], program, "../share/doppel");
    }
    return n + cache_dir(out[n], kind);
}

static int read_cmdline(struct guest *g)
{
    char path[PATH_MAX];
    FILE *f = join(path, g->dir, "cmdline") ? fopen(path, "re") : NULL;
    if (!f)
        return err(-errno, "default guest %s: cannot read its cmdline: %s; build it again", g->dir, strerror(errno));
    size_t n = fread(g->cmdline, 1, sizeof(g->cmdline), f);
    bool bad = ferror(f) || n == sizeof(g->cmdline) || memchr(g->cmdline, '\0', n);
    fclose(f);
    if (bad)
        return err(-EINVAL, "default guest %s: its cmdline is damaged; build it again", g->dir);
    g->cmdline[n] = '\0';
    g->cmdline[strcspn(g->cmdline, "\n")] = '\0';
    return 0;
}

/* -ENOENT: there is no guest. */
static int guest_open(struct guest *g, const char *dir)
{
    if (!realpath(dir, g->dir))
        return err(-ENOENT, "default guest %.200s: %s", dir, strerror(errno));
    if (!join(g->kernel, g->dir, "vmlinuz") || !join(g->initrd, g->dir, "initrd"))
        return err(-ENAMETOOLONG, "default guest %.200s...: the path is too long; use a shorter one", dir);
    if (access(g->kernel, F_OK) < 0 || access(g->initrd, F_OK) < 0)
        return err(-ENOENT, "default guest %s: vmlinuz or initrd is missing", dir);
    return read_cmdline(g);
}

static int find_kind(struct guest *g, const char *kind)
{
    char place[PLACES][PATH_MAX];
    unsigned n = places(place, kind);
    for (unsigned i = 0; i < n; i++) {
        int r = guest_open(g, place[i]);
        if (r != -ENOENT)
            return r;
    }
    return err(-ENOENT, "the default guest is not built yet");
}

int guest_find(struct guest *g)
{
    const char *chosen = getenv("DOPPEL_GUEST");
    if (chosen && *chosen) {
        int r = guest_open(g, chosen);
        if (r < 0)
            err(-EINVAL, "DOPPEL_GUEST: %s; make one with guest/build DIR, or unset DOPPEL_GUEST", err_last());
        return r < 0 ? -EINVAL : 0;
    }
    return find_kind(g, GUEST);
}

bool guest_mounts(const struct guest *g, const char *kind)
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

static int build_paths(const char *kind, char script[PATH_MAX], char dir[PATH_MAX])
{
    char program[PATH_MAX];
    int r = program_dir(program);
    if (r < 0)
        return r;
    if (join(script, program, "../guest/build") && access(script, X_OK) == 0 && access(program, W_OK) == 0 &&
        join(dir, program, kind))
        return 0;
    if (!join(script, program, "../share/doppel/guest-build") || access(script, X_OK) < 0)
        return err(-ENOENT, "the default guest is not built, and neither is its build script to be found "
                            "(../guest/build, ../share/doppel/guest-build, "
                   "seen from %s); install doppel whole, set DOPPEL_GUEST, or give --kernel", program);
    if (!cache_dir(dir, kind))
        return err(-ENOENT, "the default guest is not built, and there is no place for it; set HOME, XDG_CACHE_HOME or "
                            "DOPPEL_GUEST, or give --kernel");
    return 0;
}

int guest_build_paths(char script[PATH_MAX], char dir[PATH_MAX])
{
    return build_paths(GUEST, script, dir);
}

int guest_program_path(char out[PATH_MAX], const char *name)
{
    char program[PATH_MAX];
    int r = program_dir(program);
    if (r < 0)
        return r;
    return join(out, program, name) ? 0 : err(-ENAMETOOLONG, "%s: the path is too long", program);
}

/* In the child: nothing to read, and what it says is not the guest's output. */
static _Noreturn void run_script(const char *script, const char *kind, const char *dir, bool quiet)
{
    char *argv[8] = {(char *)script};
    unsigned n = 1;
    int null = open("/dev/null", O_RDONLY);
    dup2(null, STDIN_FILENO);
    dup2(STDERR_FILENO, STDOUT_FILENO);
    if (quiet)
        argv[n++] = "--quiet";
    if (!strcmp(kind, GUEST_STANDARD)) {
        argv[n++] = "--kernel";
        argv[n++] = "standard";
    }
    argv[n] = (char *)dir;
    execv(script, argv);
    _exit(127);
}

static int build(struct guest *g, const char *kind, bool quiet)
{
    char script[PATH_MAX], dir[PATH_MAX];
    int status, r = build_paths(kind, script, dir);
    if (r < 0)
        return r;
    pid_t child = fork();
    if (child < 0)
        return err(-errno, "cannot start %s: %s", script, strerror(errno));
    if (child == 0)
        run_script(script, kind, dir, quiet);
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return err(-errno, "cannot wait for %s: %s", script, strerror(errno));
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        return err(-EIO, "the default guest could not be built; run %s %s to see why, or give --kernel", script, dir);
    return guest_open(g, dir);
}

int guest_find_or_build(struct guest *g, bool quiet)
{
    int r = guest_find(g);
    return r == -ENOENT ? build(g, GUEST, quiet) : r;
}

int guest_find_or_build_standard(struct guest *g, bool quiet)
{
    const char *chosen = getenv("DOPPEL_GUEST");
    if (chosen && *chosen)
        return err(-EINVAL, "DOPPEL_GUEST names a guest whose kernel has no 9p; make one that has (guest/build --kernel standard DIR), or unset DOPPEL_GUEST");
    int r = find_kind(g, GUEST_STANDARD);
    if (r == 0 && !guest_mounts(g, "9p"))
        r = -ENOENT;                                               /* of an older doppel */
    return r == -ENOENT ? build(g, GUEST_STANDARD, quiet) : r;
}
