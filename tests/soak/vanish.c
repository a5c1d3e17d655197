/*
 * Pages that vanish and come again beneath those who use them: the kernel is told to swap them out, to merge those that are equal, to make huge pages of them, and
 * they are written by way of /proc/self/mem, in ranges that all threads of a process use. Each thread owns every Nth page, and looks at each word of it. Beside this, cases.sh has
 * the kernel move pages about (compaction) and merge and scan quickly. Finds translations of addresses that outlive a change which only other processors were told of.
 *
 *   vanish ROUNDS                   2 processes of 2 threads, 8 MiB each
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define ODD 0x9e3779b97f4a7c15ull
enum { PAGES = 2048, THREADS = 2, PROCESSES = 2 };

static uint64_t *area;
static uint64_t seeds[PAGES];                                      /* what the page begins with; 0: it is fresh */
static unsigned rounds = 20;
static uint64_t sums[THREADS];

static uint64_t next(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

static uint64_t word(unsigned page, unsigned i)
{
    return seeds[page] ? seeds[page] + i * ODD : 0;
}

static uint64_t look(unsigned page, const char *what)
{
    const uint64_t *p = area + (size_t)page * WORDS;
    uint64_t sum = 0;

    for (unsigned i = 0; i < WORDS; i++) {
        if (p[i] != word(page, i)) {
            printf("%s: page %u, word %u at %p of process %d: %016lx, expected %016lx\n", what, page, i, (const void *)(p + i), getpid(), (unsigned long)p[i], (unsigned long)word(page, i));
            fflush(stdout);
            _exit(1);
        }
        sum += p[i] ^ i;
    }
    return sum;
}

/* By itself, or by the kernel's own address for the same memory. Each third page has what many have. */
static void fill(unsigned page, uint64_t pick, int mem)
{
    uint64_t *p = area + (size_t)page * WORDS, other[WORDS];

    seeds[page] = pick % 3 ? pick | 1 : (pick >> 32 & 15) | 1;
    if (pick >> 40 & 3) {
        for (unsigned i = 0; i < WORDS; i++)
            p[i] = word(page, i);
        return;
    }
    for (unsigned i = 0; i < WORDS; i++)
        other[i] = word(page, i);
    if (pwrite(mem, other, PAGE, (off_t)(uintptr_t)p) != PAGE) {
        perror("/proc/self/mem");
        _exit(1);
    }
}

static void disturb(uint64_t pick)
{
    unsigned from = pick % PAGES, n = 1 + (pick >> 12) % 300;
    uint64_t *p = area + (size_t)from * WORDS;
    size_t bytes = (size_t)(from + n > PAGES ? PAGES - from : n) * PAGE;

    switch (pick >> 24 & 7) {
    case 0:
    case 1: madvise(p, bytes, MADV_PAGEOUT); break;
    case 2: madvise(p, bytes, MADV_COLD); break;
    case 3: madvise(p, bytes, MADV_MERGEABLE); break;
    case 4: madvise(p, bytes, MADV_UNMERGEABLE); break;
    case 5: madvise(p, bytes, MADV_HUGEPAGE); break;
    case 6: madvise(p, bytes, MADV_NOHUGEPAGE); break;
    case 7: madvise(area, (size_t)PAGES * PAGE, 25 /* MADV_COLLAPSE, where the kernel has it */); break;
    }
}

static void *thread(void *arg)
{
    unsigned me = (unsigned)(uintptr_t)arg;
    uint64_t s = 88172645463325252ull + me * ODD;
    int mem = open("/proc/self/mem", O_RDWR);

    for (unsigned round = 0; round < rounds; round++) {
        for (unsigned k = 0; k < 300; k++) {
            unsigned page = (unsigned)(next(&s) % (PAGES / THREADS)) * THREADS + me;

            sums[me] += look(page, "before");
            if (next(&s) & 1) {
                fill(page, next(&s), mem);
                sums[me] += look(page, "written");
            }
            if (k % 16 == 0)
                disturb(next(&s));
        }
        if (round % 4 == me) {                                     /* all that is there, in a process of its own */
            pid_t child = fork();
            int status = 0;

            if (!child) {
                for (unsigned page = me; page < PAGES; page += THREADS)
                    look(page, "the child's");
                _exit(0);
            }
            while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
                ;
            if (child < 0 || status) {
                printf("the child: status %#x\n", (unsigned)status);
                fflush(stdout);
                _exit(1);
            }
        }
    }
    for (unsigned page = me; page < PAGES; page += THREADS)
        sums[me] += look(page, "at the end");
    close(mem);
    return NULL;
}

int main(int argc, char **argv)
{
    unsigned bad = 0;
    pid_t child[PROCESSES];

    if (argc > 1)
        rounds = (unsigned)atoi(argv[1]);
    for (unsigned k = 0; k < PROCESSES; k++) {
        pthread_t t[THREADS];

        child[k] = fork();
        if (child[k])
            continue;
        area = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (area == MAP_FAILED)
            _exit(2);
        for (unsigned i = 0; i < THREADS; i++)
            pthread_create(&t[i], NULL, thread, (void *)(uintptr_t)i);
        for (unsigned i = 0; i < THREADS; i++)
            pthread_join(t[i], NULL);
        if (!k)
            for (unsigned i = 0; i < THREADS; i++)
                printf("thread %u: %016lx\n", i, (unsigned long)sums[i]);
        fflush(stdout);
        _exit(0);
    }
    for (unsigned k = 0; k < PROCESSES; k++) {
        int status;

        if (waitpid(child[k], &status, 0) < 0 || status)
            bad++, printf("process %u: status %#x\n", k, (unsigned)status);
    }
    return bad != 0;
}
