/*
 * Memory that a kernel hands out, shares, copies, moves and takes back, seen from processes. Several of them run side by side, each under a timer whose handler uses vector
 * registers and the stack. Every word is known: what differs is told with the words about it, and ends the job. A job's last word is the sum of all it has read.
 *
 *   pages     fresh memory is zero, whether it is read or written first; fork, each side's writes, MADV_DONTNEED, mremap. Finds a shadow or TLB entry that outlives its page
 *             table's: the zero page behind a written one, a parent's page behind its child's copy, a frame that has another owner now.
 *   strings   wide strings on the heap, by libc's own loops over two places at once. Finds a wrong base or a wrong mask in loops that are translated as a whole.
 *   copies    64 KiB through 2 to 8 vector registers of each width into pages that are not there yet, or shared after a fork: each store may fault in the middle, and the
 *             kernel, and other processes, use the registers until it is done again. x87: with a pending use of it before.
 *   programs  copies of this program that are written, started, and removed: frames are data, then code, then data. Each looks at its own .data, .bss, heap, stack, environment.
 *
 *   pages ROUNDS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
#include <wchar.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define ODD 0x9e3779b97f4a7c15ull

static const char *job;
static uint64_t sum;

static uint64_t next(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

static void fail(const char *what, const void *at, uint64_t got, uint64_t want)
{
    const uint64_t *line = (const uint64_t *)((uintptr_t)at & ~63ul);

    printf("%s: %s, process %d at %p: %#lx, expected %#lx\n  the words there:", job, what, getpid(), at, (unsigned long)got, (unsigned long)want);
    for (unsigned i = 0; at && i < 8; i++)
        printf(" %016lx", (unsigned long)line[i]);
    puts("");
    fflush(stdout);
    _exit(1);
}

/* Memory of n words holds a series that begins at seed; index 0 is the first word of the whole. */
static void put(uint64_t *p, size_t from, size_t n, uint64_t seed)
{
    for (size_t i = from; i < from + n; i++)
        p[i] = seed + i * ODD;
}
static void holds(const char *what, const uint64_t *p, size_t from, size_t n, uint64_t seed)
{
    for (size_t i = from; i < from + n; i++) {
        if (p[i] != seed + i * ODD)
            fail(what, p + i, p[i], seed + i * ODD);
        sum += p[i];
    }
}
static void zero(const char *what, const uint64_t *p, size_t from, size_t n)
{
    for (size_t i = from; i < from + n; i++)
        if (p[i])
            fail(what, p + i, p[i], 0);
}

static void *map(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED)
        fail("mmap", NULL, (uint64_t)errno, 0);
    return p;
}
static pid_t begin_child(void)
{
    pid_t child;

    fflush(stdout);
    child = fork();
    if (child < 0)
        fail("fork", NULL, (uint64_t)errno, 0);
    return child;
}
static void end_child(pid_t child)
{
    int status;

    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            fail("waitpid", NULL, (uint64_t)errno, 0);
    if (status)
        fail("the child's status", NULL, (uint64_t)status, 0);
}

static volatile sig_atomic_t signals;
static void on_alarm(int sig)
{
    char bytes[256];

    (void)sig;
    signals++;
    memset(bytes, signals, sizeof bytes);
    asm volatile("pcmpeqd %%xmm0, %%xmm0; movdqa %%xmm0, %%xmm5; movdqa %%xmm0, %%xmm15" ::"r"(bytes) : "xmm0", "xmm5", "xmm15", "memory");
}
static void tick(long us)
{
    struct sigaction act = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
    struct itimerval every = { { 0, us }, { 0, us } };

    sigaction(SIGALRM, &act, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
}

static void pages_child(uint64_t *p, size_t pages, uint64_t seed, uint64_t s)
{
    holds("the child's view", p, 0, pages * WORDS, seed);
    for (size_t i = 0; i < pages; i++) {
        if (next(&s) & 1) {
            put(p, i * WORDS, WORDS, seed + 1);
            holds("the child's own", p, i * WORDS, WORDS, seed + 1);
        } else {
            holds("the child's view, later", p, i * WORDS, WORDS, seed);
        }
    }
    _exit(0);
}
static void pages_round(uint64_t *s)
{
    size_t pages = 1 + next(s) % 200, half = pages / 2;
    uint64_t seed = next(s), *p = map(pages * PAGE);

    for (size_t i = 0; i < pages; i++) {
        unsigned way = next(s) & 7;

        if (way == 0)
            zero("read first", p, i * WORDS, WORDS);
        if (way < 4) {
            p[i * WORDS + next(s) % WORDS] = 0;
            zero("written first", p, i * WORDS, WORDS);
        }
        if (way == 7)
            zero("fresh", p, i * WORDS, WORDS);
        put(p, i * WORDS, WORDS, seed);
    }
    holds("own", p, 0, pages * WORDS, seed);
    if (next(s) % 4 == 0) {
        pid_t child = begin_child();

        if (!child)
            pages_child(p, pages, seed, *s);
        for (size_t i = 0; i < pages; i += 1 + next(s) % 3) {
            holds("the parent's", p, i * WORDS, WORDS, seed);
            put(p, i * WORDS, WORDS, seed);
        }
        end_child(child);
        holds("after the child", p, 0, pages * WORDS, seed);
    }
    if (next(s) % 4 == 0) {
        madvise(p + half * WORDS, (pages - half) * PAGE, MADV_DONTNEED);
        zero("given back", p, half * WORDS, (pages - half) * WORDS);
        holds("beside what was given back", p, 0, half * WORDS, seed);
        put(p, half * WORDS, (pages - half) * WORDS, seed);
    }
    if (next(s) % 4 == 0) {
        uint64_t *q = mremap(p, pages * PAGE, 2 * pages * PAGE, MREMAP_MAYMOVE);

        if (q == MAP_FAILED)
            fail("mremap", NULL, (uint64_t)errno, 0);
        holds("moved", q, 0, pages * WORDS, seed);
        zero("grown", q, pages * WORDS, pages * WORDS);
        munmap(q, 2 * pages * PAGE);
        return;
    }
    munmap(p, pages * PAGE);
}

static void strings_round(uint64_t *s)
{
    enum { N = 40, MOST = 2000 };
    wchar_t *w[N];
    size_t length[N];
    char text[MOST + 1];

    for (unsigned i = 0; i < N; i++) {
        length[i] = next(s) % MOST;
        for (size_t j = 0; j < length[i]; j++)
            text[j] = (char)('a' + (i + j * 7) % 26);
        text[length[i]] = 0;
        w[i] = malloc((length[i] + 1) * sizeof *w[i]);
        if (mbstowcs(w[i], text, length[i] + 1) != length[i])
            fail("mbstowcs", w[i], wcslen(w[i]), length[i]);
    }
    for (unsigned i = 0; i < N; i++) {
        wchar_t *c = malloc((2 * length[i] + 2) * sizeof *c);

        wcscpy(c, w[i]);
        c[length[i]] = L'/';
        wcscpy(c + length[i] + 1, w[i]);
        if (wcslen(c) != 2 * length[i] + 1 || wcslen(w[i]) != length[i])
            fail("wcslen", c, wcslen(c), 2 * length[i] + 1);
        for (size_t j = 0; j < length[i]; j++) {
            wchar_t want = (wchar_t)('a' + (i + j * 7) % 26);

            if (c[j] != want || c[length[i] + 1 + j] != want)
                fail("wcscpy", c + j, (uint64_t)c[j], (uint64_t)want);
            sum += (uint64_t)c[j] * j;
        }
        memcpy(c, w[i], (length[i] + 1) * sizeof *c);
        if (wcscmp(c, w[i]) || wmemcmp(c, w[i], length[i] + 1))
            fail("wcscmp", c, 1, 0);
        free(c);
    }
    for (unsigned i = 0; i < N; i++)
        free(w[i]);
}

/* n bytes, a multiple of 256, by 4 XMM, 8 YMM or 4 ZMM registers. */
static void copy(char *to, const char *from, size_t n, unsigned width)
{
    if (width == 64)
        for (size_t i = 0; i < n; i += 256)
            asm volatile("vmovdqu64 (%0), %%zmm0; vmovdqu64 64(%0), %%zmm1; vmovdqu64 128(%0), %%zmm16; vmovdqu64 192(%0), %%zmm31\n"
                         "vmovdqu64 %%zmm0, (%1); vmovdqu64 %%zmm1, 64(%1); vmovdqu64 %%zmm16, 128(%1); vmovdqu64 %%zmm31, 192(%1)"
                         ::"r"(from + i), "r"(to + i) : "memory", "xmm0", "xmm1");
    else if (width == 32)
        for (size_t i = 0; i < n; i += 256)
            asm volatile("vmovdqu (%0), %%ymm0; vmovdqu 32(%0), %%ymm1; vmovdqu 64(%0), %%ymm2; vmovdqu 96(%0), %%ymm3\n"
                         "vmovdqu 128(%0), %%ymm4; vmovdqu 160(%0), %%ymm5; vmovdqu 192(%0), %%ymm6; vmovdqu 224(%0), %%ymm15\n"
                         "vmovdqu %%ymm0, (%1); vmovdqu %%ymm1, 32(%1); vmovdqu %%ymm2, 64(%1); vmovdqu %%ymm3, 96(%1)\n"
                         "vmovdqu %%ymm4, 128(%1); vmovdqu %%ymm5, 160(%1); vmovdqu %%ymm6, 192(%1); vmovdqu %%ymm15, 224(%1)"
                         ::"r"(from + i), "r"(to + i) : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm15");
    else
        for (size_t i = 0; i < n; i += 64)
            asm volatile("movdqu (%0), %%xmm0; movdqu 16(%0), %%xmm1; movdqu 32(%0), %%xmm8; movdqu 48(%0), %%xmm15\n"
                         "movdqu %%xmm0, (%1); movdqu %%xmm1, 16(%1); movdqu %%xmm8, 32(%1); movdqu %%xmm15, 48(%1)"
                         ::"r"(from + i), "r"(to + i) : "memory", "xmm0", "xmm1", "xmm8", "xmm15");
    if (width > 16)
        asm volatile("vzeroupper");
}
static void copies_round(uint64_t *s, bool x87)
{
    enum { BYTES = 65536, N = BYTES / 8 };
    static uint64_t from[N] __attribute__((aligned(64)));
    uint64_t seed = next(s), *to, *p = map(BYTES + PAGE), pick = next(s);
    volatile long double number = (long double)(seed & 0xffffff);
    unsigned width = pick % 3 == 0 && __builtin_cpu_supports("avx512f") ? 64 : pick & 1 && __builtin_cpu_supports("avx") ? 32 : 16;

    if (x87)
        number = number * 3 + 1;
    put(from, 0, N, seed);
    to = p + next(s) % 64;
    copy((char *)to, (char *)from, BYTES, width);
    holds("copied", to, 0, N, seed);
    if (next(s) % 8 == 0) {
        pid_t child = begin_child();

        put(from, 0, N, child ? seed + 5 : ~seed);
        copy((char *)to, (char *)from, BYTES, width);
        holds(child ? "copied by the parent" : "copied by the child", to, 0, N, child ? seed + 5 : ~seed);
        if (!child)
            _exit(0);
        end_child(child);
    }
    if (x87 && number != (long double)(seed & 0xffffff) * 3 + 1)
        fail("x87", NULL, (uint64_t)number, (seed & 0xffffff) * 3 + 1);
    munmap(p, BYTES + PAGE);
}

/* What a program finds when it starts: "pages brief SEED". */
static uint64_t bss[8192], data[4096] = { 1, 2, 3 };
static int brief(const char *word)
{
    uint64_t seed = strtoull(word, NULL, 10), *heap = sbrk(0x20000);
    unsigned char stack[60000];
    pid_t child;

    job = "a program";
    heap = (uint64_t *)(((uintptr_t)heap + 15) & ~15ul);
    if (!getenv("SEED") || strcmp(getenv("SEED"), word))
        fail("its environment", NULL, 1, 0);
    zero("its .bss", bss, 0, 8192);
    if (data[0] != 1 || data[1] != 2 || data[2] != 3)
        fail("its .data", data, data[0], 1);
    zero("its .data", data, 3, 4093);
    zero("its heap", heap, 0, 0x3ffe);
    put(heap, 0, 0x3ffe, seed);
    put(bss, 0, 8192, seed + 1);
    put(data, 0, 4096, seed + 2);
    memset(stack, 3, sizeof stack);
    asm volatile("" ::"r"(stack) : "memory");
    child = begin_child();
    if (!child) {
        holds("its child's .bss", bss, 0, 8192, seed + 1);
        put(bss, 0, 8192, seed + 6);
        holds("its child's own .bss", bss, 0, 8192, seed + 6);
        holds("its child's .data", data, 0, 4096, seed + 2);
        _exit(0);
    }
    holds("its heap", heap, 0, 0x3ffe, seed);
    put(heap, 0, 0x3ffe, seed + 3);
    holds("its .bss", bss, 0, 8192, seed + 1);
    holds("its .data", data, 0, 4096, seed + 2);
    end_child(child);
    holds("its .bss after its child", bss, 0, 8192, seed + 1);
    holds("its heap after its child", heap, 0, 0x3ffe, seed + 3);
    for (size_t i = 0; i < sizeof stack; i++)
        if (stack[i] != 3)
            fail("its stack", stack + i, stack[i], 3);
    return 0;
}
static void programs_round(uint64_t *s, unsigned round)
{
    static char buffer[65536];
    char name[64], word[32], environment[40];
    int in = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), out;
    ssize_t n;

    snprintf(name, sizeof name, "/tmp/pages.%d.%u", getpid(), round % 4);
    out = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
    while ((n = read(in, buffer, sizeof buffer)) > 0)
        if (write(out, buffer, (size_t)n) != n)
            fail("write", NULL, (uint64_t)errno, 0);
    close(in);
    close(out);
    for (unsigned i = 0; i < 4; i++) {
        pid_t child;

        snprintf(word, sizeof word, "%lu", (unsigned long)next(s));
        snprintf(environment, sizeof environment, "SEED=%s", word);
        child = begin_child();
        if (!child) {
            execle(name, name, "brief", word, NULL, (char *[]){ environment, NULL });
            _exit(98);
        }
        end_child(child);
        sum += *s;
    }
    unlink(name);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        unsigned per_round;
    } jobs[] = { { "pages", 3 }, { "pages", 3 }, { "strings", 2 }, { "copies", 4 }, { "copies and x87", 4 }, { "programs", 1 } };
    enum { N = sizeof jobs / sizeof *jobs };
    unsigned rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 10, bad = 0;
    uint64_t *sums = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t child[N];

    if (argc > 2)
        return brief(argv[2]);
    if (sums == MAP_FAILED || !rounds)
        return 64;
    for (unsigned k = 0; k < N; k++) {
        uint64_t s = 88172645463325252ull + k * ODD;

        job = jobs[k].name;
        child[k] = begin_child();
        if (child[k])
            continue;
        tick(700 + k * 411);
        for (unsigned i = 0; i < rounds * jobs[k].per_round; i++) {
            switch (jobs[k].name[0]) {
            case 'p': jobs[k].name[1] == 'a' ? pages_round(&s) : programs_round(&s, i); break;
            case 's': strings_round(&s); break;
            case 'c': copies_round(&s, jobs[k].name[6]); break;
            }
        }
        sums[k] = sum;
        fflush(stdout);
        _exit(0);
    }
    for (unsigned k = 0; k < N; k++) {
        int status;

        if (waitpid(child[k], &status, 0) < 0 || status)
            bad++, printf("%s: status %#x\n", jobs[k].name, (unsigned)status);
        else
            printf("%s: %016lx\n", jobs[k].name, (unsigned long)sums[k]);
    }
    return bad != 0;
}
