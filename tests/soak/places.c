/*
 * The same code and data at many places a GiB apart, where programs' libraries and stacks live, and the monitor's own: each place is also some host address. Code that is copied
 * there finds the end of a string, calls, and reads by RIP; libc's string functions and a loop over two places at once run on the data. Finds accesses that leave their window,
 * where the host has something.
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

/*
 * Copies n words but for those that are a mark, and tells how many these were: a loop over two places with a way back in its midst. The translator once lost the second place's base
 * on that way: it read the host's memory at the guest's address.
 */
static uint64_t skip(uint32_t *to, const uint32_t *from, size_t n, uint32_t mark)
{
    uint64_t skipped = 0;

    asm volatile("jmp 2f\n"
                 "1: inc %[skipped]; add $4, %[from]; dec %[n]; jz 3f\n"
                 "2: mov (%[from]), %%eax; cmp %[mark], %%eax; je 1b\n"
                 "mov %%eax, (%[to]); add $4, %[from]; add $4, %[to]; dec %[n]; jnz 2b\n"
                 "3:"
                 : [to] "+r"(to), [from] "+r"(from), [n] "+r"(n), [skipped] "+r"(skipped)
                 : [mark] "r"(mark)
                 : "rax", "memory", "cc");
    return skipped;
}

static int at_place(uint64_t at)
{
    char *code = mmap((void *)at, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    wchar_t *s = mmap((void *)(at + 0x100000), 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0), *d = s + 4096;
    uint32_t *u = (uint32_t *)s;
    uint64_t got;

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
    for (unsigned round = 0; round < 20; round++) {
        unsigned n = 0;

        for (unsigned i = 0; i < 4000; i++)
            u[i] = i % 7 == round % 7 ? 0xffffffff : i;
        got = skip(u + 4000, u, 4000, 0xffffffff);
        for (unsigned i = 0; i < 4000; i++)
            if (i % 7 != round % 7 && u[4000 + n++] != i)
                return printf("at %#lx: word %u is %u, expected %u\n", (unsigned long)at, i, u[4000 + n - 1], i);
        if (got != 4000 - n)
            return printf("at %#lx: %lu marks skipped, expected %u\n", (unsigned long)at, (unsigned long)got, 4000 - n);
    }
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
