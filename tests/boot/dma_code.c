/*
 * Code that a disk puts where code ran before: O_DIRECT reads (DMA by the device, past the page cache) into memory that is executed, alone, beside code that
 * another thread runs, and into the function that it runs.
 *
 *   dma_code --image >FILE      the disk: page n holds functions that return n and n + 1000000 (the second at its middle)
 *   dma_code DISK ROUNDS        in the guest
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define PAGES 256u                                                 /* of the disk */
#define WINDOW 8u                                                  /* of memory */

typedef uint32_t (*function)(void);

static uint8_t *window;
static int disk;
static atomic_uint stop, calls, bad;

static void put(uint8_t *at, uint32_t v)
{
    at[0] = 0xb8;
    memcpy(at + 1, &v, 4);
    at[5] = 0xc3;
}

static int image(void)
{
    static uint8_t page[PAGE];

    for (unsigned i = 0; i < PAGES; i++) {
        memset(page, 0xcc, sizeof page);
        put(page, i);
        put(page + PAGE / 2, i + 1000000);
        if (fwrite(page, sizeof page, 1, stdout) != 1)
            return 1;
    }
    return 0;
}

static uint32_t call(unsigned page, unsigned off)
{
    return ((function)(void *)(window + page * PAGE + off))();
}

static void read_pages(unsigned to, unsigned from, unsigned n)
{
    if (pread(disk, window + to * PAGE, n * PAGE, (off_t)from * PAGE) != (ssize_t)(n * PAGE)) {
        printf("read: %s\n", strerror(errno));
        exit(1);
    }
}

static void check(const char *what, uint32_t got, uint32_t want)
{
    if (got != want) {
        printf("%s: %u, expected %u\n", what, got, want);
        exit(1);
    }
}

/* Calls what is in the last page of the window: whatever is there came whole from the disk. */
static void *runner(void *arg)
{
    unsigned a, b, c, d;

    (void)arg;
    while (!atomic_load(&stop)) {
        uint32_t v = call(WINDOW - 1, 0);
        if (v >= PAGES)
            atomic_fetch_add(&bad, 1);
        atomic_fetch_add(&calls, 1);
    }
    __cpuid(0, a, b, c, d);
    return (void *)(uintptr_t)call(WINDOW - 1, 0);
}

static void wait_calls(void)
{
    unsigned before = atomic_load(&calls);

    while (atomic_load(&calls) - before < 3)
        usleep(100);
}

int main(int argc, char **argv)
{
    pthread_t thread;
    void *last;

    if (argc == 2 && !strcmp(argv[1], "--image"))
        return image();
    if (argc != 3 || (disk = open(argv[1], O_RDONLY | O_DIRECT)) < 0) {
        printf("usage: dma_code DISK ROUNDS: %s\n", strerror(errno));
        return 1;
    }
    unsigned rounds = (unsigned)atoi(argv[2]);
    window = mmap(NULL, WINDOW * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (window == MAP_FAILED)
        return 1;
    for (unsigned i = 0; i < rounds; i++) {
        unsigned n = 1 + i % (WINDOW - 1), to = i % (WINDOW - n), from = i * 7 % (PAGES - WINDOW);
        read_pages(to, from, n);
        for (unsigned k = 0; k < 4 * n; k++) {
            check("first half", call(to + k % n, 0), from + k % n);
            check("second half", call(to + k % n, PAGE / 2), from + k % n + 1000000);
        }
    }
    read_pages(WINDOW - 1, 0, 1);
    if (pthread_create(&thread, NULL, runner, NULL))
        return 1;
    for (unsigned i = 0; i < rounds; i++) {
        wait_calls();
        read_pages(WINDOW - 1, i % PAGES, 1);
        read_pages(0, i % (PAGES - WINDOW), WINDOW - 1);
        check("beside", call(3, 0), i % (PAGES - WINDOW) + 3);
    }
    atomic_store(&stop, 1);
    pthread_join(thread, &last);
    check("last", (uint32_t)(uintptr_t)last, (rounds - 1) % PAGES);
    check("torn functions", bad, 0);
    printf("ok\n");
    return 0;
}
