/*
 * Rows of the bench that start programs: the same files on the host and in guests (bench/image packs the host's). They
 * work in the data folder, which is in memory everywhere, and what they wrote is compared with what the host wrote when
 * the image was made, or with a known number of lines.
 */
#define _GNU_SOURCE
#include "rows.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define TEXT_BYTES (4u << 20)
#define TREE_DIRS 20
#define TREE_FILES 25                                              /* in each */
#define TREE_BYTES 4096
#define NEEDLE_EVERY 10
#define NEEDLE "needle in a haystack"
#define STARTS 200
#define STRING_(x) #x
#define STRING(x) STRING_(x)

struct program {
    const char *argv[10];                                          /* ends with NULL */
    const char *out;                                               /* file that it writes */
    bool redirect;                                                 /* by way of standard output */
    const char *want;                                              /* file with the same content */
    unsigned lines;                                                /* or, without: lines in out */
};

static const struct program zstd = {
    { "zstd", "-q", "-f", "-3", "--single-thread", "text", "-o", "out/text.zst" },
    "out/text.zst", false, "text.zst", 0 };
static const struct program sha256 = { { "sha256sum", "text" }, "out/text.sha256", true, "text.sha256", 0 };
static const struct program gcc = {
    { "gcc", "-O2", "-c", "compiled.c", "-o", "out/compiled.o" }, "out/compiled.o", false, "compiled.o", 0 };
static const struct program shell = {
    { "./busybox", "sh", "-c", "i=0; while [ $i -lt " STRING(STARTS) " ]; do ./busybox echo $i; i=$((i+1)); done" },
    "out/shell", true, NULL, STARTS };
static const struct program find = {
    { "./busybox", "find", "tree", "-name", "*7.c" }, "out/find", true, NULL, TREE_DIRS *TREE_FILES / 10 };
static const struct program grep = {
    { "./busybox", "grep", "-r", NEEDLE, "tree" }, "out/grep", true, NULL, TREE_DIRS *TREE_FILES / NEEDLE_EVERY };

static bool on_path(const char *name)
{
    char path[4096], file[4200], *save, *dir;

    if (strchr(name, '/'))
        return !access(name, X_OK);
    snprintf(path, sizeof path, "%s", getenv("PATH") ? getenv("PATH") : "");
    for (dir = strtok_r(path, ":", &save); dir; dir = strtok_r(NULL, ":", &save)) {
        snprintf(file, sizeof file, "%s/%s", dir, name);
        if (!access(file, X_OK))
            return true;
    }
    return false;
}

static void *setup_program(struct bench *b, const struct program *p)
{
    char cwd[4096];

    if (!*b->data || chdir(b->data)) {
        snprintf(b->skip, sizeof b->skip, *b->data ? "no folder %s" : "no --data", b->data);
        return NULL;
    }
    if (!on_path(p->argv[0]) || (p->want && access(p->want, R_OK))) {
        snprintf(b->skip, sizeof b->skip, "%s was not there when the data were made", p->argv[0]);
        return NULL;
    }
    mkdir("out", 0755);
    snprintf(cwd, sizeof cwd, "%s/out", b->data);
    setenv("TMPDIR", cwd, 1);                                      /* for gcc: in memory, too */
    return (void *)p;
}
static void *setup_zstd(struct bench *b)
{
    return setup_program(b, &zstd);
}
static void *setup_sha256(struct bench *b)
{
    return setup_program(b, &sha256);
}
static void *setup_gcc(struct bench *b)
{
    return setup_program(b, &gcc);
}
static void *setup_shell(struct bench *b)
{
    return setup_program(b, &shell);
}
static void *setup_find(struct bench *b)
{
    return setup_program(b, &find);
}
static void *setup_grep(struct bench *b)
{
    return setup_program(b, &grep);
}

static void exec_program(const struct program *p)
{
    int fd = open(p->redirect ? p->out : "/dev/null", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

    if (fd >= 0 && dup2(fd, 1) == 1)
        execvp(p->argv[0], (char *const *)p->argv);
    _exit(127);
}
static KEEP int run_once(const struct program *p)
{
    int status;
    pid_t pid = vfork();

    if (pid < 0)
        die("vfork: %s", strerror(errno));
    if (pid == 0)
        exec_program(p);
    return waitpid(pid, &status, 0) == pid ? status : -1;
}
static uint64_t run_program(void *state, uint64_t count)
{
    const struct program *p = state;

    while (count--) {
        int status = run_once(p);
        if (status)
            die("%s ended with wait status %#x", p->argv[0], status);
    }
    return 0;
}

static FILE *must_open(const char *path, const char *mode)
{
    FILE *f = fopen(path, mode);
    if (!f)
        die("%s: %s", path, strerror(errno));
    return f;
}
static uint64_t expect_program(void *state, uint64_t count)
{
    const struct program *p = state;
    FILE *out = must_open(p->out, "re"), *want = p->want ? must_open(p->want, "re") : NULL;
    unsigned lines = 0;
    int a, b;

    (void)count;
    do {
        a = getc(out);
        b = want ? getc(want) : a;
        lines += a == '\n';
    } while (a == b && a != EOF);
    if (a != b)
        die("%s is not %s", p->out, p->want);
    if (!want && lines != p->lines)
        die("%s has %u lines instead of %u", p->out, lines, p->lines);
    fclose(out);
    if (want)
        fclose(want);
    return 0;
}

/* ---- data ---- */

/* Words that are more or less frequent: it compresses as text does. */
static void write_text(FILE *f, size_t bytes, uint64_t *seed)
{
    size_t column = 0;

    while (bytes--) {
        uint64_t x = mix((*seed)++);
        unsigned word = (x & 1023) * (x >> 10 & 1023) >> 10;       /* small ones more often */
        char buf[16];
        size_t n = snprintf(buf, sizeof buf, "%c%c%s%u", 'a' + word % 26, 'a' + word / 26 % 26,
                            word & 1 ? "ing" : "er", word % 7);
        n = n < bytes ? n : bytes;
        fwrite(buf, 1, n, f);
        bytes -= n;
        column += n + 1;
        putc(column > 70 ? '\n' : ' ', f);
        column = column > 70 ? 0 : column;
    }
}

void make_data(const char *dir)
{
    char path[4096];
    uint64_t seed = 1;
    FILE *f;

    snprintf(path, sizeof path, "%s/text", dir);
    f = must_open(path, "we");
    write_text(f, TEXT_BYTES, &seed);
    fclose(f);
    snprintf(path, sizeof path, "%s/tree", dir);
    mkdir(path, 0755);
    for (unsigned i = 0; i < TREE_DIRS * TREE_FILES; i++) {
        snprintf(path, sizeof path, "%s/tree/d%u", dir, i / TREE_FILES);
        mkdir(path, 0755);
        snprintf(path, sizeof path, "%s/tree/d%u/f%u.c", dir, i / TREE_FILES, i);
        f = must_open(path, "we");
        write_text(f, TREE_BYTES, &seed);
        fprintf(f, "\n%s\n", i % NEEDLE_EVERY == 3 ? NEEDLE : "hay");
        fclose(f);
    }
}

const struct row rows_prog[] = {
    { "zstd", "zstd -3, 4 MiB", "run", 1, 0, setup_zstd, run_program, expect_program },
    { "sha256", "sha256sum, 4 MiB", "run", 1, 0, setup_sha256, run_program, expect_program },
    { "gcc", "gcc -O2 -c of a C file", "run", 1, 0, setup_gcc, run_program, expect_program },
    { "shell", "shell loop starting 200 processes", "run", 1, 0, setup_shell, run_program, expect_program },
    { "find", "find over 500 files in memory", "run", 1, 0, setup_find, run_program, expect_program },
    { "grep", "grep over 500 files in memory", "run", 1, 0, setup_grep, run_program, expect_program },
    { 0 },
};
