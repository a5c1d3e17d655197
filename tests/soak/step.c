/*
 * A program to be looked at by a debugger: no C library, no start-up code that depends on the processor, so that every
 * step of it is the same on any machine. gdb counts and compares its steps (cases.sh: case_gdb).
 */
typedef unsigned long u64;

static volatile u64 watched;
static u64 table[16];

__attribute__((noinline)) static u64 leaf(u64 a, u64 b)
{
    u64 r;

    __asm__ volatile("mov %1, %0\n\t"
                     "pushfq\n\t"
                     "popq %%rcx\n\t"                               /* TF of a step must not be seen in a copy that counts */
                     "rol $7, %0\n\t"
                     "xor %2, %0\n\t"
                     "mov %0, %%rcx\n\t"
                     "and $15, %%ecx\n\t"
                     : "=&r"(r) : "r"(a), "r"(b) : "rcx", "cc");
    return r;
}

__attribute__((noinline)) static void strings(void)
{
    static char from[64] = "a step of a repeated string instruction is one repetition", to[64];
    void *d = to;
    const void *s = from;
    u64 n = 20;

    __asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
    for (int i = 0; i < 16; i++)
        table[i] += (u64)to[i];
}

__attribute__((noinline)) void work(void)
{
    u64 x = 1;

    for (int i = 0; i < 12; i++) {
        x = leaf(x, (u64)i * 0x9e3779b97f4a7c15);
        table[x & 15] ^= x;
        if (i % 4 == 3)
            watched = x;
    }
    strings();
    __asm__ volatile("syscall" : : "a"(102) : "rcx", "r11", "memory"); /* getuid, 0: a step over a system call */
    __asm__ volatile("pxor %%xmm0, %%xmm0\n\tpcmpeqd %%xmm1, %%xmm1\n\tpaddq %%xmm1, %%xmm0\n\tmovq %%xmm0, %0" : "=r"(x));
    watched = x;
}

/* On a stack of its own: where the kernel's is depends on what it puts there. */
__attribute__((noreturn, used)) static void begin(void)
{
    u64 sum = 0;

    work();
    for (int i = 0; i < 16; i++)
        sum ^= table[i];
    __asm__ volatile("syscall" : : "a"(231), "D"(sum & 127) : "rcx", "r11", "memory");
    __builtin_unreachable();
}
static char stack[4096] __attribute__((aligned(16), used));
__asm__(".globl _start\n_start: lea stack + 4088(%rip), %rsp\n\tjmp begin");
