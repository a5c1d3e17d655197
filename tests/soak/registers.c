/*
 * All of a process's extended state while others use theirs: ZMM0 to 31 and K0 to 7, or YMM, or XMM as the processor has them, MXCSR and x87. Each process has values of its own in
 * all registers, and computes, calls the kernel, touches fresh pages (each of them a fault in the middle), is interrupted by signals whose handler overwrites what it can, and
 * looks at all registers again. Finds state that the monitor saves too late or too early: one process's register in another, an upper half that a shorter instruction of the
 * kernel's or the monitor's cleared, mask registers, rounding control.
 *
 *   registers ROUNDS                two processes that compute without end, with x87 and without, beside programs that start, look, and end; and one that forks between
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096

static __attribute__((aligned(64))) uint64_t in[32][8], out[32][8], mask_in[8], mask_out[8];
static unsigned registers, words;                                  /* what is looked at: 16 or 32 registers of 2, 4 or 8 words */
static bool x87, wrong;

static uint64_t next(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

static void differs(const char *what, unsigned i, unsigned j, uint64_t got, uint64_t want)
{
    static unsigned told;

    wrong = true;
    if (told++ < 8)
        printf("%s%u.%u of process %d: %016lx, expected %016lx\n", what, i, j, getpid(), (unsigned long)got, (unsigned long)want);
}

#define TIMES16(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
#define UPPER16(M) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23) M(24) M(25) M(26) M(27) M(28) M(29) M(30) M(31)
#define TIMES8(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define LOAD_ZMM(n) "vmovdqu64 64*" #n "(%[in]), %%zmm" #n "\n"
#define STORE_ZMM(n) "vmovdqu64 %%zmm" #n ", 64*" #n "(%[out])\n"
#define LOAD_YMM(n) "vmovdqu 64*" #n "(%[in]), %%ymm" #n "\n"
#define STORE_YMM(n) "vmovdqu %%ymm" #n ", 64*" #n "(%[out])\n"
#define LOAD_XMM(n) "movdqu 64*" #n "(%[in]), %%xmm" #n "\n"
#define STORE_XMM(n) "movdqu %%xmm" #n ", 64*" #n "(%[out])\n"
#define LOAD_K(n) "kmovq 8*" #n "(%[kin]), %%k" #n "\n"
#define STORE_K(n) "kmovq %%k" #n ", 8*" #n "(%[kout])\n"
/* A system call if there is one to make; a loop, and a byte in each of some pages, each followed by the loop; the call again. */
#define BETWEEN \
    "mov %[call], %%rax; test %%rax, %%rax; jz 1f; syscall\n" \
    "1: mov %[loops], %%rcx; 2: dec %%rcx; jg 2b; test %[pages], %[pages]; jz 3f\n" \
    "movb $1, (%[page]); add $4096, %[page]; dec %[pages]; jmp 1b\n" \
    "3: mov %[call], %%rax; test %%rax, %%rax; jz 4f; syscall\n4:\n"
#define OPERANDS \
    : [page] "+r"(page), [pages] "+r"(pages), "=&a"(result) \
    : [in] "r"(in), [out] "r"(out), [kin] "r"(mask_in), [kout] "r"(mask_out), [call] "r"(call), [loops] "r"(loops) \
    : "rcx", "r11", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

/* Each register has the tag, its number and the word's. */
static void look(uint64_t tag, long call, long loops, char *page, long pages, unsigned mxcsr)
{
    const unsigned initial = 0x1f80;
    unsigned now;
    uint64_t result;
    long double number = (long double)(tag & 0xffffff), after = number;

    for (unsigned i = 0; i < 32; i++)
        for (unsigned j = 0; j < 8; j++)
            in[i][j] = tag << 16 | i << 8 | j;
    for (unsigned i = 0; i < 8; i++)
        mask_in[i] = tag << 16 | 0x8000 | i;
    memset(out, 0, sizeof out);
    asm volatile("ldmxcsr %0" ::"m"(mxcsr));
    if (x87)
        asm volatile("fldt %0" ::"m"(number));
    if (words == 8)
        asm volatile(TIMES16(LOAD_ZMM) UPPER16(LOAD_ZMM) TIMES8(LOAD_K) BETWEEN TIMES16(STORE_ZMM) UPPER16(STORE_ZMM) TIMES8(STORE_K) "vzeroupper\n" OPERANDS);
    else if (words == 4)
        asm volatile(TIMES16(LOAD_YMM) BETWEEN TIMES16(STORE_YMM) "vzeroupper\n" OPERANDS);
    else
        asm volatile(TIMES16(LOAD_XMM) BETWEEN TIMES16(STORE_XMM) OPERANDS);
    if (x87)
        asm volatile("fstpt %0" : "=m"(after));
    asm volatile("stmxcsr %0; ldmxcsr %1" : "=m"(now) : "m"(initial));
    if (now != mxcsr)
        differs("MXCSR", 0, 0, now, mxcsr);
    if (after != number)
        differs("x87", 0, 0, (uint64_t)after, tag & 0xffffff);
    for (unsigned i = 0; i < registers; i++)
        for (unsigned j = 0; j < words; j++)
            if (in[i][j] != out[i][j])
                differs("register ", i, j, out[i][j], in[i][j]);
    for (unsigned i = 0; words == 8 && i < 8; i++)
        if (mask_in[i] != mask_out[i])
            differs("K", i, 0, mask_out[i], mask_in[i]);
}

/* The widest state, or, by chance, less of it: then the kernel and the monitor may take the rest for unused. */
static void choose(uint64_t pick)
{
    words = __builtin_cpu_supports("avx512bw") && pick % 3 == 0 ? 8 : __builtin_cpu_supports("avx") && pick % 3 < 2 ? 4 : 2;
    registers = words == 8 ? 32 : 16;
}

static void on_alarm(int sig)
{
    (void)sig;
    asm volatile("pcmpeqd %%xmm0, %%xmm0; movdqa %%xmm0, %%xmm5; movdqa %%xmm0, %%xmm15" ::: "xmm0", "xmm5", "xmm15");
    if (words == 8)
        asm volatile("vpternlogd $255, %%zmm7, %%zmm7, %%zmm7; vmovdqa64 %%zmm7, %%zmm31; kxorw %%k1, %%k1, %%k1" ::: "xmm7");
}
static void tick(long us)
{
    struct sigaction act = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
    struct itimerval every = { { 0, us }, { 0, us } };

    sigaction(SIGALRM, &act, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
}

/* All kinds of looks; some without system calls, with every rounding, and with children that come between. */
static int looks(unsigned n, uint64_t s, bool children)
{
    static const long calls[] = { 0, 39 /* getpid */, 24 /* sched_yield */ };

    for (unsigned i = 0; i < n && !wrong; i++) {
        uint64_t pick = next(&s);
        char *fresh = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (fresh == MAP_FAILED)
            return 2;
        choose(pick >> 8);
        look((uint64_t)getpid() << 8 | (i & 255), calls[pick % 3], (long)(pick >> 20 & 0x3fff), fresh, (long)(pick >> 16 & 15), 0x1f80 | (unsigned)(pick & 3) << 13);
        munmap(fresh, 16 * PAGE);
        if (children && i % 16 == 0) {
            pid_t child = fork();
            int status;

            if (!child)
                _exit(0);
            while (waitpid(child, &status, 0) < 0 && errno == EINTR)
                ;
        }
    }
    return wrong;
}

static pid_t begin(const char *what, const char *n)
{
    pid_t child;

    fflush(stdout);
    child = fork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl("/proc/self/exe", "registers", n, what, NULL);
        _exit(98);
    }
    return child;
}

int main(int argc, char **argv)
{
    unsigned n = argc > 1 ? (unsigned)atoi(argv[1]) : 20, bad = 0;
    const char *what = argc > 2 ? argv[2] : "";
    pid_t others[4], child;
    int status;

    if (!strcmp(what, "x87") || !strcmp(what, "no-x87")) {         /* compute without end */
        x87 = !strcmp(what, "x87");
        return looks(-1u, (uint64_t)getpid() * 77777, false);
    }
    if (!strcmp(what, "start"))
        return looks(6, (uint64_t)getpid() * 99991, false);
    if (!strcmp(what, "signals") || !strcmp(what, "signals-x87")) {
        tick(500);
        x87 = what[7];
        return looks(n * 20, 88172645463325252ull, true);
    }
    others[0] = begin("x87", "0");
    others[1] = begin("no-x87", "0");
    others[2] = begin("signals", argv[1]);
    others[3] = begin("signals-x87", argv[1]);
    for (unsigned i = 0; i < n && !bad; i++) {
        child = begin("start", "0");
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
        if (status)
            bad++, printf("start %u: status %#x\n", i, (unsigned)status);
    }
    for (unsigned k = 4; k-- > 0;) {
        if (k < 2)
            kill(others[k], SIGTERM);
        while (waitpid(others[k], &status, 0) < 0 && errno == EINTR)
            ;
        if (status != (k < 2 ? SIGTERM : 0))
            bad++, printf("process %u: status %#x\n", k, (unsigned)status);
    }
    printf("%u starts: %s\n", n, bad ? "wrong" : "all registers kept");
    return bad != 0;
}
