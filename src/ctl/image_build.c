/*
 * Images from Debian's packages: image/build does it, this watches it.
 *
 * The script and all that it starts are a process group of their own, told to end (SIGTERM) when doppel is, however that ends; and they inherit the lock of
 * the new image's folder, so that nobody takes it for stale while one of them still writes there.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/err.h"
#include "ctl/guest.h"
#include "ctl/image.h"
#include "ctl/progress.h"

#define GRACE_MS 5000                                              /* from SIGTERM to SIGKILL */
#define ARGS_MAX 16
#define LOCK_FD 64                                                 /* where the script has the lock */

struct build {
    pid_t pid;
    int out, signals;
    int signo;                                                     /* who ended it; 0: nobody */
    struct progress progress;
    char line[1024];
    size_t len;
};

static int find_script(char out[PATH_MAX])
{
    if (guest_program_path(out, "../image/build") == 0 && access(out, X_OK) == 0)
        return 0;
    if (guest_program_path(out, "../share/doppel/image-build") == 0 && access(out, X_OK) == 0)
        return 0;
    return err(-ENOENT, "the script that builds images is not to be found (../image/build, ../share/doppel/image-build, seen from the program); "
                        "install doppel whole");
}

/*
 * Of all that is open only the lock goes on, out of the way: apt passes descriptors to a shell (dash) that knows numbers of one digit only, and whoever starts doppel
 * (make, flock, an editor) may have left us some.
 */
static void keep_only(int lock)
{
    int kept = fcntl(lock, F_DUPFD, LOCK_FD);
    if (kept < 0)
        kept = lock;
    if (kept > STDERR_FILENO + 1)
        close_range(STDERR_FILENO + 1, (unsigned)kept - 1, 0);
    close_range((unsigned)kept + 1, ~0u, 0);
}

/* In the child. */
static _Noreturn void run_script(char **argv, int out, int lock, pid_t parent)
{
    sigset_t none;
    int null = open("/dev/null", O_RDONLY);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent)
        _exit(1);
    dup2(null, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(out, STDERR_FILENO);
    keep_only(lock);
    execv(argv[0], argv);
    _exit(127);
}

static int start(struct build *b, char **argv, int lock)
{
    int out[2];
    sigset_t set;
    pid_t self = getpid();
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    b->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (b->signals < 0 || pipe2(out, O_CLOEXEC) < 0)
        return err(-errno, "cannot watch the build: %s", strerror(errno));
    b->pid = fork();
    if (b->pid == 0)
        run_script(argv, out[1], lock, self);
    int error = errno;
    close(out[1]);
    b->out = out[0];
    if (b->pid < 0)
        return err(-error, "cannot start %s: %s", argv[0], strerror(error));
    setpgid(b->pid, b->pid);                                       /* whoever comes first */
    return 0;
}

/* "phase TEXT", "part N OF", or a message. */
static void on_line(struct build *b, const char *line)
{
    unsigned long long done, of;
    if (!strncmp(line, "phase ", 6))
        progress_phase(&b->progress, line + 6);
    else if (sscanf(line, "part %llu %llu", &done, &of) == 2)
        progress_part(&b->progress, done, of);
    else if (*line)
        progress_text(&b->progress, line);
}

/* False: the script and its children have ended. */
static bool read_out(struct build *b)
{
    char buf[4096];
    ssize_t n = read(b->out, buf, sizeof(buf));
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return true;
    for (ssize_t i = 0; i < n; i++)
        if (buf[i] == '\n' || b->len == sizeof(b->line) - 1) {
            b->line[b->len] = '\0';
            b->len = 0;
            on_line(b, b->line);
        } else {
            b->line[b->len++] = buf[i] ? buf[i] : '?';
        }
    return n > 0;
}

static void on_signal(struct build *b)
{
    struct signalfd_siginfo info;
    if (read(b->signals, &info, sizeof(info)) != sizeof(info))
        return;
    kill(-b->pid, b->signo ? SIGKILL : SIGTERM);
    b->signo = (int)info.ssi_signo;
}

static int watch(struct build *b)
{
    int status;
    for (bool more = true; more;) {
        struct pollfd p[] = {{.fd = b->out, .events = POLLIN}, {.fd = b->signals, .events = POLLIN}};
        int n = poll(p, ARRAY_SIZE(p), b->signo ? GRACE_MS : -1);
        if (n == 0)
            kill(-b->pid, SIGKILL);
        if (n > 0 && p[1].revents)
            on_signal(b);
        if (n > 0 && p[0].revents)
            more = read_out(b);
        else if (n == 0)
            more = false;
    }
    while (waitpid(b->pid, &status, 0) < 0)
        if (errno != EINTR)
            return err(-errno, "cannot wait for the build: %s", strerror(errno));
    if (b->signo)
        return b->signo;
    kill(-b->pid, SIGKILL);                                        /* what it may have left */
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        return err(-EIO, "the image could not be built; the reason stands above");
    return 0;
}

/* What the script found out: lines of key=value. */
static int read_meta(struct image *i)
{
    char path[PATH_MAX], line[512];
    int r = image_path(i, "meta", path);
    FILE *f = r < 0 ? NULL : fopen(path, "re");
    if (!f)
        return r < 0 ? r : err(-EIO, "%s: cannot be read: %s", path, strerror(errno));
    while (fgets(line, sizeof(line), f)) {
        char *value = strchr(line, '=');
        line[strcspn(line, "\n")] = '\0';
        if (!value)
            continue;
        *value++ = '\0';
        if (!strcmp(line, "suite"))
            snprintf(i->info.suite, sizeof(i->info.suite), "%s", value);
        else if (!strcmp(line, "kernel"))
            snprintf(i->info.kernel, sizeof(i->info.kernel), "%s", value);
        else if (!strcmp(line, "packages"))
            i->info.packages = strtoull(value, NULL, 10);
    }
    fclose(f);
    unlink(path);
    return 0;
}

static int make(struct image *i, const char *suite, const struct image_options *o)
{
    char script[PATH_MAX], size[24];
    char *argv[ARGS_MAX] = {script};
    unsigned n = 1;
    struct build b = {.out = -1, .signals = -1};
    const struct { const char *option, *value; } args[] = {
        {"--name", i->name}, {"--suite", suite}, {"--packages", o->packages}, {"--mirror", o->mirror}, {"--kernel", o->kernel},
        {"--size", o->size ? size : NULL},
    };
    int r = find_script(script);
    if (r < 0)
        return r;
    snprintf(size, sizeof(size), "%llu", (unsigned long long)o->size);
    for (unsigned a = 0; a < ARRAY_SIZE(args); a++)
        if (args[a].value) {
            argv[n++] = (char *)args[a].option;
            argv[n++] = (char *)args[a].value;
        }
    argv[n++] = i->dir;
    progress_begin(&b.progress);
    r = start(&b, argv, i->fd);
    if (r == 0)
        r = watch(&b);
    if (r == 0)
        progress_phase(&b.progress, "computing the digest");
    if (r == 0)
        r = read_meta(i);
    snprintf(i->info.wanted, sizeof(i->info.wanted), "%s", o->packages ? o->packages : "");
    i->info.commands = true;
    if (r == 0)
        r = image_commit(i);
    progress_end(&b.progress);
    if (b.out >= 0)
        close(b.out);
    if (b.signals >= 0)
        close(b.signals);
    return r;
}

int image_build(const char *name, const char *suite, const struct image_options *o)
{
    struct image i;
    int r = image_begin(&i, name);
    if (r < 0)
        return r;
    r = make(&i, suite, o);
    if (r != 0)
        image_abandon(&i);
    return r;
}
