/*
 * Code that is made while others run it, in the ways of compilers at run time. Each step's result is known.
 *
 *   own      every thread writes functions into pages of its own and calls them at once, over and over
 *   alias    the same by a second, writable mapping of the same memory
 *   cross    one thread rewrites a function, others call it after a handshake with a serializing instruction
 *   reuse    pages are code, then data, then unmapped, then other code at the same address
 *   signal   code that is rewritten from a signal handler which interrupted it
 *
 *   jit ROUNDS [THREADS]
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

typedef uint64_t (*function)(uint64_t);

static unsigned rounds = 2000, threads = 2;

static uint64_t next(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

static void serialize(void)
{
    unsigned a, b, c, d;

    __cpuid(0, a, b, c, d);
}

static void fail(const char *what, uint64_t got, uint64_t want)
{
    printf("%s: %#lx, expected %#lx\n", what, (unsigned long)got, (unsigned long)want);
    exit(1);
}

/* Writes a function of n steps on RAX = RDI at p, and tells what it gives for x. At most 16 + 10 n bytes. */
static uint64_t emit(uint8_t *p, unsigned n, uint64_t seed, uint64_t x)
{
    static const uint8_t start[] = { 0x48, 0x89, 0xf8 };           /* mov rax, rdi */

    memcpy(p, start, sizeof start);
    p += sizeof start;
    while (n--) {
        uint32_t imm = (uint32_t)next(&seed) & 0x7fffffff;

        *p++ = 0x48;
        switch (next(&seed) % 5) {
        case 0: *p++ = 0x05; x += imm; break;                      /* add rax, imm32 */
        case 1: *p++ = 0x35; x ^= imm; break;                      /* xor rax, imm32 */
        case 2: *p++ = 0x69; *p++ = 0xc0; x *= imm; break;         /* imul rax, rax, imm32 */
        case 3: *p++ = 0x2d; x -= imm; break;                      /* sub rax, imm32 */
        case 4:                                                    /* rol rax, imm8; and a jump over nothing */
            *p++ = 0xc1;
            *p++ = 0xc0;
            *p++ = (uint8_t)(imm & 63);
            x = imm & 63 ? x << (imm & 63) | x >> (64 - (imm & 63)) : x;
            *p++ = 0xeb;
            *p++ = 0;
            continue;
        }
        memcpy(p, &imm, 4);
        p += 4;
    }
    *p = 0xc3;
    return x;
}

static void *pages(size_t bytes, int prot)
{
    void *p = mmap(NULL, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED)
        perror("mmap"), exit(1);
    return p;
}

static void *own(void *arg)
{
    uint64_t s = 88172645463325252ull + (uintptr_t)arg;
    uint8_t *p = pages(65536, PROT_READ | PROT_WRITE | PROT_EXEC);

    for (unsigned i = 0; i < rounds; i++) {
        uint8_t *at = p + next(&s) % 65000;
        uint64_t x = next(&s), want = emit(at, (unsigned)(next(&s) % 20), next(&s), x);

        for (unsigned k = 0; k < i % 5 + 1; k++)
            if (((function)at)(x) != want)
                fail("own", ((function)at)(x), want);
    }
    munmap(p, 65536);
    return NULL;
}

static void *alias(void *arg)
{
    uint64_t s = 1234567 + (uintptr_t)arg;
    int fd = memfd_create("jit", 0);
    uint8_t *code, *data;

    if (fd < 0 || ftruncate(fd, 65536))
        perror("memfd"), exit(1);
    code = mmap(NULL, 65536, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    data = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    for (unsigned i = 0; i < rounds; i++) {
        size_t at = next(&s) % 65000;
        uint64_t x = next(&s), want = emit(data + at, (unsigned)(next(&s) % 20), next(&s), x);

        serialize();
        if (((function)(code + at))(x) != want)
            fail("alias", ((function)(code + at))(x), want);
    }
    munmap(code, 65536);
    munmap(data, 65536);
    close(fd);
    return NULL;
}

/* version: even: runners may call; odd: the writer is at it. */
static uint8_t *shared;
static _Atomic uint64_t version, expected;
static _Atomic unsigned inside;
static atomic_bool stop;

static void *runner(void *arg)
{
    uint64_t calls = 0;

    (void)arg;
    while (!stop) {
        uint64_t v, got;

        atomic_fetch_add(&inside, 1);
        v = version;
        if (v & 1) {
            atomic_fetch_sub(&inside, 1);
            usleep(0);
            continue;
        }
        serialize();
        got = ((function)shared)(v);
        if (got != expected)
            fail("cross", got, expected);
        calls++;
        atomic_fetch_sub(&inside, 1);
    }
    return (void *)(uintptr_t)calls;
}

static void cross(void)
{
    pthread_t t[16];
    uint64_t s = 42, calls = 0;

    shared = pages(4096, PROT_READ | PROT_WRITE | PROT_EXEC);
    expected = emit(shared, 5, 1, 0);
    for (unsigned i = 0; i < threads; i++)
        pthread_create(&t[i], NULL, runner, NULL);
    for (unsigned i = 0; i < rounds; i++) {
        version++;
        while (inside)
            usleep(0);
        expected = emit(shared, (unsigned)(next(&s) % 20), next(&s), version + 1);
        version++;
        if (i % 16 == 0)
            usleep(50);
    }
    stop = true;
    for (unsigned i = 0; i < threads; i++) {
        void *r;
        pthread_join(t[i], &r);
        calls += (uintptr_t)r;
    }
    if (!calls)
        fail("cross: calls", 0, 1);
    munmap(shared, 4096);
}

static void reuse(void)
{
    uint64_t s = 77;
    uint8_t *where = pages(3 * 4096, PROT_NONE);

    for (unsigned i = 0; i < rounds / 4; i++) {
        uint8_t *p = mmap(where, 3 * 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        size_t at = 4096 - 40 + next(&s) % 80;                     /* around a page boundary */
        uint64_t x = next(&s), want = emit(p + at, 10, next(&s), x);

        if (((function)(p + at))(x) != want)
            fail("reuse: first", ((function)(p + at))(x), want);
        memset(p, (int)i, 3 * 4096);
        if (p[at] != (uint8_t)i)
            fail("reuse: data", p[at], (uint8_t)i);
        want = emit(p + at, 12, next(&s), x);
        mprotect(p, 3 * 4096, PROT_READ | PROT_EXEC);
        if (((function)(p + at))(x) != want)
            fail("reuse: second", ((function)(p + at))(x), want);
        munmap(p, 3 * 4096);
    }
}

/* mov eax, 1; jmp to itself: until the handler changes the jump into one to RET. */
static uint8_t *loop_code;
static void on_alarm(int sig)
{
    (void)sig;
    loop_code[6] = 0;
}
static void from_signal(void)
{
    static const uint8_t text[] = { 0xb8, 1, 0, 0, 0, 0xeb, 0xfe, 0xc3 };
    struct sigaction act = { .sa_handler = on_alarm };

    loop_code = pages(4096, PROT_READ | PROT_WRITE | PROT_EXEC);
    sigaction(SIGALRM, &act, NULL);
    for (unsigned i = 0; i < 20; i++) {
        struct itimerval soon = { .it_value.tv_usec = 1000 };
        uint64_t got;

        memcpy(loop_code, text, sizeof text);
        setitimer(ITIMER_REAL, &soon, NULL);
        got = ((function)loop_code)(0);
        if (got != 1)
            fail("signal", got, 1);
    }
}

static void on_threads(void *(*f)(void *))
{
    pthread_t t[16];

    for (unsigned i = 0; i < threads; i++)
        pthread_create(&t[i], NULL, f, (void *)(uintptr_t)(i + 1));
    for (unsigned i = 0; i < threads; i++)
        pthread_join(t[i], NULL);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        rounds = (unsigned)atoi(argv[1]);
    if (argc > 2)
        threads = (unsigned)atoi(argv[2]);
    if (threads < 1 || threads > 16)
        return 64;
    on_threads(own);
    puts("own");
    on_threads(alias);
    puts("alias");
    cross();
    puts("cross");
    reuse();
    puts("reuse");
    from_signal();
    puts("signal");
    return 0;
}
