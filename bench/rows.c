/*
 * Runs rows of the bench, and prints a line for each: what the table is made of.
 *
 *   rows [--ms N] [--limit SECONDS] [--data DIR] [ROW...]     no ROW: all
 *   rows --list                                               name, group, unit and description, separated by tabs
 *   rows --make-data DIR
 *
 * Lines on standard output (bench/run reads them, and tests do):
 *   bench: init                        as process 1: the first thing it does
 *   bench: start NS                    monotonic clock when the first row starts
 *   row NAME ok NS                     nanoseconds per unit, with a fraction
 *   row NAME skip WHY | row NAME limit SECONDS | row NAME failed WHY
 *   bench: end NS
 *
 * It is also process 1 of the bench's guests: then the arguments are the words of the kernel parameter bench=,
 * separated by commas, /proc, /dev and /tmp are mounted first, and the machine is powered off at the end.
 */
#define _GNU_SOURCE
#include "rows.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RUNS 5                                                     /* whose median counts */

static const struct row *const groups[] = { rows_cpu, rows_mem, rows_sys, rows_prog, NULL };
static const char *const group_names[] = { "computation", "memory", "kernel", "programs" };

struct config {
    uint64_t min_ns;                                               /* for the runs that count together, at least */
    unsigned limit;                                                /* seconds for a row, all in all */
    struct bench bench;
};

void die(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    printf("failed ");
    vprintf(fmt, ap);
    printf("\n");
    va_end(ap);
    fflush(stdout);
    _exit(1);
}

void *must_map(size_t size, int flags)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
    if (p == MAP_FAILED)
        die("mmap of %zu KiB: %s", size >> 10, strerror(errno));
    return p;
}

bool pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    if (cpu < 0)
        return false;
    CPU_SET(cpu, &set);
    return !sched_setaffinity(0, sizeof set, &set);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* ---- one row, in its own process ---- */

static uint64_t timed_run(const struct row *row, void *state, uint64_t count)
{
    uint64_t start = now_ns();
    uint64_t got = row->run(state, count);
    uint64_t ns = now_ns() - start;
    uint64_t want = row->expect ? row->expect(state, count) : 0;

    if (got != want)
        die("a run of %llu gave %#llx instead of %#llx", (unsigned long long)count, (unsigned long long)got,
            (unsigned long long)want);
    return ns ? ns : 1;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/*
 * Finds a count that takes long enough, and tells the median of several runs of it: on a busy machine some of them are
 * interrupted. What runs before, twice as long as they are to take, warms caches up, and lets a system that learns, learn
 * (an engine chooses by what it sees). The first run of all counts only if it was so long that a second one would reach
 * the limit; what takes longer than all the runs were to take is not repeated.
 */
static double measure(const struct row *row, const struct config *config, void *state)
{
    uint64_t count = row->at_least ? row->at_least : 1, enough = config->min_ns / RUNS, sum, took[RUNS];
    uint64_t ns = timed_run(row, state, count), before = ns;
    bool warm = ns > config->limit * 1000000000ull / 8;
    unsigned n;

    while (ns < enough || before < 2 * config->min_ns || !warm) {
        double grow = 1.2 * enough / ns;
        count *= grow > 16 ? 16 : grow > 1 ? grow + 0.5 : 1;
        before += ns = timed_run(row, state, count);
        warm = true;
    }
    took[0] = sum = ns;
    for (n = 1; n < RUNS && sum < config->min_ns; n++)
        sum += took[n] = timed_run(row, state, count);
    qsort(took, n, sizeof *took, compare);
    return (took[(n - 1) / 2] + took[n / 2]) / 2.0 / (count * row->per_run);
}

static void run_row(const struct row *row, struct config *config)
{
    void *state = row->setup ? row->setup(&config->bench) : config;

    if (!state)
        printf("skip %s\n", config->bench.skip);
    else
        printf("ok %.3f\n", measure(row, config, state));
    fflush(stdout);
}

/* ---- all rows ---- */

/* The child's one line, or what became of the child. */
static void wait_row(const struct row *row, const struct config *config, pid_t pid, int fd)
{
    struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
    char line[512];
    size_t have = 0;
    ssize_t n;
    uint64_t end = now_ns() + config->limit * 1000000000ull;
    int status;

    for (;;) {
        int64_t left = end - now_ns();
        if (left <= 0 || poll(&poll_fd, 1, left / 1000000 + 1) == 0) {
            snprintf(line, sizeof line, "limit %u", config->limit);
            have = strlen(line);
            break;
        }
        n = read(fd, line + have, sizeof line - 1 - have);
        if (n > 0)
            have += n;
        if (n <= 0 || memchr(line, '\n', have))
            break;
    }
    line[have] = 0;
    line[strcspn(line, "\n")] = 0;
    kill(-pid, SIGKILL);                                           /* with all that it started */
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (have)
        printf("row %s %s\n", row->name, line);
    else
        printf("row %s failed ended by signal %d, status %d\n", row->name, WIFSIGNALED(status) ? WTERMSIG(status) : 0,
               WIFEXITED(status) ? WEXITSTATUS(status) : 0);
    fflush(stdout);
}

static void start_row(const struct row *row, struct config *config)
{
    int fds[2];
    pid_t pid;

    if (pipe2(fds, O_CLOEXEC) || (pid = fork()) < 0) {
        printf("row %s failed %s\n", row->name, strerror(errno));
        return;
    }
    if (pid == 0) {
        setpgid(0, 0);
        dup2(fds[1], 1);
        close(fds[1]);
        run_row(row, config);
        _exit(0);
    }
    setpgid(pid, pid);                                             /* whoever is first */
    close(fds[1]);
    wait_row(row, config, pid, fds[0]);
    close(fds[0]);
}

static const struct row *find_row(const char *name)
{
    for (const struct row *const *g = groups; *g; g++)
        for (const struct row *r = *g; r->name; r++)
            if (!name || !strcmp(r->name, name))
                return r;
    return NULL;
}

static void run_all(struct config *config, char **names, int n)
{
    printf("bench: start %llu\n", (unsigned long long)now_ns());
    fflush(stdout);
    for (int i = 0; i < n; i++)
        start_row(find_row(names[i]), config);
    for (const struct row *const *g = groups; n == 0 && *g; g++)
        for (const struct row *r = *g; r->name; r++)
            start_row(r, config);
    printf("bench: end %llu\n", (unsigned long long)now_ns());
    fflush(stdout);
}

static void list(void)
{
    for (const struct row *const *g = groups; *g; g++)
        for (const struct row *r = *g; r->name; r++)
            printf("%s\t%s\t%s\t%s\n", r->name, group_names[g - groups], r->unit, r->what);
}

static void find_cpus(struct bench *b)
{
    cpu_set_t set;
    int found = 0;

    b->cpu[0] = b->cpu[1] = -1;
    if (!sched_getaffinity(0, sizeof set, &set))
        for (int i = 0; i < CPU_SETSIZE && found < 2; i++)
            if (CPU_ISSET(i, &set))
                b->cpu[found++] = i;
}

static int usage(const char *what)
{
    fprintf(stderr, "rows: %s\nusage: rows [--ms N] [--limit SECONDS] [--data DIR] [ROW...] | --list | "
                    "--make-data DIR\n", what);
    return 64;
}

static int command(char **arg, int n, const char *self)
{
    struct config config = { .min_ns = 50000000, .limit = 20, .bench = { .self = self, .data = "" } };
    int i = 0;

    for (; i < n && arg[i][0] == '-'; i += 2) {
        const char *value = i + 1 < n ? arg[i + 1] : "";
        if (!strcmp(arg[i], "--list"))
            return list(), 0;
        if (!strcmp(arg[i], "--exit"))                             /* what the rows with exec start */
            return 0;
        if (!strcmp(arg[i], "--make-data") && *value)
            return make_data(value), 0;
        if (!strcmp(arg[i], "--ms") && atoi(value) > 0)
            config.min_ns = atoi(value) * 1000000ull;
        else if (!strcmp(arg[i], "--limit") && atoi(value) > 0)
            config.limit = atoi(value);
        else if (!strcmp(arg[i], "--data") && *value)
            config.bench.data = value;
        else
            return usage(arg[i]);
    }
    for (int k = i; k < n; k++)
        if (!find_row(arg[k]))
            return usage(arg[k]);
    find_cpus(&config.bench);
    run_all(&config, arg + i, n - i);
    return 0;
}

/* ---- as process 1 of a guest ---- */

static void mount_one(const char *type, const char *dir)
{
    mkdir(dir, 0755);
    if (mount(type, dir, type, 0, NULL) && errno != EBUSY)
        printf("bench: cannot mount %s: %s\n", dir, strerror(errno));
}

static void open_console(void)
{
    int fd = open("/dev/console", O_RDWR);

    for (int i = 0; fd >= 0 && i < 3; i++)
        dup2(fd, i);
}

/* The words of bench= on the kernel's command line. */
static int kernel_words(char *line, size_t size, char **words, int max)
{
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC), n = 0;
    ssize_t len = fd < 0 ? 0 : read(fd, line, size - 1);
    char *save, *word;

    close(fd);
    line[len > 0 ? len : 0] = 0;
    line[strcspn(line, "\n")] = 0;
    for (word = strtok_r(line, " ", &save); word && strncmp(word, "bench=", 6); word = strtok_r(NULL, " ", &save))
        ;
    for (word = word ? strtok_r(word + 6, ",", &save) : NULL; word && n < max; word = strtok_r(NULL, ",", &save))
        words[n++] = word;
    return n;
}

static int as_init(void)
{
    static const struct { const char *path; mode_t mode; unsigned major, minor; } node[] = {
        { "/dev/console", 0600, 5, 1 }, { "/dev/null", 0666, 1, 3 }, { "/dev/zero", 0666, 1, 5 } };
    char line[8192], *words[100];
    int n;

    open_console();                                                /* the kernel's own initramfs has it, usually */
    printf("bench: init\n");
    fflush(stdout);
    mount_one("proc", "/proc");
    mount_one("devtmpfs", "/dev");
    for (size_t i = 0; i < sizeof node / sizeof *node; i++)        /* a kernel without devtmpfs */
        mknod(node[i].path, S_IFCHR | node[i].mode, makedev(node[i].major, node[i].minor));
    open_console();
    mount_one("tmpfs", "/tmp");
    setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin", 1);

    n = kernel_words(line, sizeof line, words, sizeof words / sizeof *words);
    if (n)                                                         /* none: only to boot */
        command(words, n, "/init");
    fflush(stdout);
    sync();
    reboot(RB_POWER_OFF);
    return 1;
}

int main(int argc, char **argv)
{
    if (getpid() == 1)
        return as_init();
    return command(argv + 1, argc - 1, "/proc/self/exe");
}
