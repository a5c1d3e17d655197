/*
 * The same code and data at many places a GiB apart, where programs' libraries and stacks live, and the monitor's own: each place is also some host address. Code that is copied there finds the end of a string, calls, and reads by RIP; libc's string functions and loops over two and three places at once
 * run on the data. Finds accesses that leave their window: by a wrong base they would read or write host memory.
 *
 *   places STEP                     each STEPth of 1024 places; places that are taken are left out
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <wchar.h>

/* Bytes from RDI's to the first zero word of 32 bits, plus 5 by a call and 7 + 11 by words behind the code. */
extern const char code_begin[], code_end[];
asm(".pushsection .text; .globl code_begin, code_end; code_begin:\n"
    "push %rbx; mov %rdi, %rbx; xor %eax, %eax\n"
    "1: cmpl $0, (%rdi,%rax); lea 4(%rax), %rax; jne 1b; sub $4, %rax; shr $2, %rax\n"
    "call 2f; lea 3f(%rip), %rdx; add (%rdx), %rax; mov 3f+8(%rip), %rcx; add %rcx, %rax; pop %rbx; ret\n"
    "2: add $5, %rax; ret; .balign 8; 3: .quad 7, 11\n"
    "code_end: .popsection");

/* Loops over several bases, with a way back in their midst: as compilers make them for scans that skip. */
static uint64_t __attribute__((noinline)) merge(uint32_t *to, const uint32_t *a, const uint32_t *b, size_t n)
{
    uint64_t h = 0;

    for (size_t i = 0, j = 0, k = 0; k < 2 * n; k++) {
        asm volatile("" ::: "memory");
        if (j < n && (i == n || b[j] < a[i])) {
            to[k] = b[j++];
            continue;
        }
        to[k] = a[i++];
        h = h * 31 + to[k];
    }
    return h;
}

static int at_place(uint64_t at)
{
    char *code = mmap((void *)at, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    wchar_t *s = mmap((void *)(at + 0x100000), 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0), *d = s + 4096;
    uint32_t *u = (uint32_t *)s;
    uint64_t want = 0, got;

    if (code != (char *)at || s != (wchar_t *)(at + 0x100000))
        return 0;
    memcpy(code, code_begin, (size_t)(code_end - code_begin));
    for (unsigned round = 0; round < 100; round++) {
        size_t n = 3 + round * 7 % 1000;

        for (size_t i = 0; i < n; i++)
            s[i] = (wchar_t)('a' + i % 26);
        s[n] = 0;
        got = ((uint64_t (*)(const wchar_t *))(uintptr_t)code)(s);
        if (got != n + 23)
            return printf("at %#lx: its code gives %lu, expected %zu\n", (unsigned long)at, (unsigned long)got, n + 23);
        wcscpy(d, s);
        if (wcslen(s) != n || wcslen(d) != n || wcscmp(d, s))
            return printf("at %#lx: wcslen %zu and %zu, expected %zu\n", (unsigned long)at, wcslen(s), wcslen(d), n);
        memcpy(d, s, 4 * n + 4);
        if (memcmp(d, s, 4 * n + 4))
            return printf("at %#lx: memcpy\n", (unsigned long)at);
        memset(d, 0, 8000);
        for (unsigned i = 0; i < 2000; i++)
            if (d[i])
                return printf("at %#lx: memset\n", (unsigned long)at);
    }
    for (unsigned i = 0; i < 1000; i++)
        u[i] = 2 * i, u[2000 + i] = 2 * i + 1, want = want * 31 + 2 * i;
    got = merge(u + 4000, u, u + 2000, 1000);
    for (unsigned i = 0; i < 2000 && got == want; i++)
        if (u[4000 + i] != i)
            got = ~want;
    if (got != want)
        return printf("at %#lx: merged %#lx, expected %#lx\n", (unsigned long)at, (unsigned long)got, (unsigned long)want);
    munmap(code, 8192);
    munmap(s, 65536);
    return 0;
}

int main(int argc, char **argv)
{
    unsigned step = argc > 1 ? (unsigned)atoi(argv[1]) : 8, bad = 0;

    if (!step)
        return 64;
    for (unsigned i = 0; i < 1024; i += step) {
        uint64_t at = (uint64_t)(0x7f00 + i / 4) << 32 | (uint64_t)(i % 4) << 30 | 0x12345000;
        int status;
        pid_t child;

        fflush(stdout);
        child = fork();
        if (!child) {
            status = at_place(at) != 0;
            fflush(stdout);
            _exit(status);
        }
        if (waitpid(child, &status, 0) < 0 || status)
            bad++, printf("at %#lx: status %#x\n", (unsigned long)at, (unsigned)status);
    }
    printf("each of 1024 places, in steps of %u: %s\n", step, bad ? "wrong" : "well");
    return bad != 0;
}
