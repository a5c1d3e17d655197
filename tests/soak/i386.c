/*
 * A 32-bit program without a C library, which does what 32-bit code alone can do: system calls by INT 80h, segments of
 * its own in the LDT and through set_thread_area, far calls into 64-bit code and back, instructions that 64-bit code has
 * not, signals. Prints one line for each, the same on every machine.
 */
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

static int sys(u32 n, u32 a, u32 b, u32 c)
{
    int r;

    __asm__ volatile("int $0x80" : "=a"(r) : "0"(n), "b"(a), "c"(b), "d"(c) : "memory");
    return r;
}

static void print(const char *name, u32 v)
{
    char s[80];
    u32 n = 0;

    while (*name)
        s[n++] = *name++;
    s[n++] = ' ';
    for (int shift = 28; shift >= 0; shift -= 4)
        s[n++] = "0123456789abcdef"[v >> shift & 15];
    s[n++] = '\n';
    sys(4, 1, (u32)s, n);
}

struct user_desc {
    u32 entry, base, limit, flags;                                 /* flags: 32-bit, contents, read-only, pages, absent, usable */
};

static u32 island[64];

static void segments(void)
{
    struct user_desc ldt = { 3, (u32)island, sizeof island - 1, 1 | 1 << 6 }, tls = { ~0u, (u32)island, 0xfffff, 1 | 1 << 4 | 1 << 6 };
    u32 v, r;

    for (u32 i = 0; i < 64; i++)
        island[i] = i * 0x01010101u;
    r = (u32)sys(123, 1, (u32)&ldt, sizeof ldt);                   /* modify_ldt */
    print("modify_ldt", r);
    if (r == 0) {
        __asm__ volatile("mov %1, %%fs\n\tmov %%fs:40, %0\n\tmov %2, %%fs" : "=&r"(v) : "r"(3 << 3 | 7), "r"(0));
        print("ldt", v);
        __asm__ volatile("mov %1, %%es\n\tmov $20, %%edi\n\tmov $5, %%ecx\n\tmov $0x5a, %%al\n\trep stosb\n\tmov %2, %%es\n\tmov $0, %0"
                         : "=&r"(v) : "r"(3 << 3 | 7), "r"(0x2b) : "edi", "ecx", "eax", "memory");
        print("stos", island[5] ^ island[6]);
        __asm__ volatile("mov %2, %%eax\n\tlsl %%eax, %0\n\tlar %%eax, %1" : "=&r"(r), "=&r"(v) : "r"(3 << 3 | 7) : "eax");
        print("lsl", r);
        print("lar", v & 0xffff00);
    }
    r = (u32)sys(243, (u32)&tls, 0, 0);                            /* set_thread_area */
    print("set_thread_area", r);
    if (r == 0) {
        __asm__ volatile("mov %1, %%gs\n\tmov %%gs:16, %0" : "=r"(v) : "r"(tls.entry << 3 | 3));
        print("tls", v);
    }
}

/* The user's 64-bit code segment of Linux is 33h, the 32-bit one 23h. */
static void far_calls(void)
{
    u32 lo, hi;

    __asm__ volatile("lcall $0x33, $1f\n\t"
                     "jmp 2f\n"
                     "1:\t.code64\n\t"
                     "movabsq $0x123456789abcdef0, %%rax\n\t"
                     "imulq $3, %%rax, %%rax\n\t"
                     "movq %%rax, %%rdx\n\t"
                     "shrq $32, %%rdx\n\t"
                     "lretl\n\t"
                     ".code32\n"
                     "2:" : "=a"(lo), "=d"(hi) : : "memory", "cc");
    print("far low", lo);
    print("far high", hi);
}

static void old_instructions(void)
{
    u32 a = 0x79, f, bounds[2] = { 1, 9 };

    __asm__ volatile("mov $0x79, %%al\n\tadd $0x35, %%al\n\tdaa" : "=a"(a) : "0"(0u) : "cc");
    print("daa", a & 0xff);
    __asm__ volatile("mov $0x0205, %%eax\n\tsub $6, %%al\n\taas\n\taad\n\taam" : "=a"(a) : : "cc");
    print("aas aad aam", a & 0xffff);
    __asm__ volatile("pusha\n\tmov $77, %%eax\n\tmov %%eax, 28(%%esp)\n\tpopa" : "=a"(a));
    print("pusha popa", a);
    __asm__ volatile("mov $5, %%eax\n\tbound %%eax, %1\n\tmov %%eax, %0" : "=r"(a) : "m"(bounds) : "eax");
    print("bound", a);
    __asm__ volatile("stc\n\t.byte 0xd6\n\tpushf\n\tpop %1" : "=a"(a), "=r"(f) : "0"(0u) : "cc"); /* SALC */
    print("salc", a & 0xff);
    __asm__ volatile("push %%ebp\n\tmov %%esp, %%ebp\n\tenter $16, $2\n\tmov %%ebp, %0\n\tsub %%esp, %0\n\tleave\n\tpop %%ebp" : "=&r"(a));
    print("enter", a);
    __asm__ volatile(".code32\n\tmov $0x1234, %%cx\n\tjcxz 1f\n\tinc %%ecx\n1:\tmovzwl %%cx, %0" : "=r"(a) : : "ecx", "cc");
    print("jcxz", a);
}

/* sin, cos and the like are the same on one host; sums of squares are the same everywhere. */
static void x87(void)
{
    double s = 0;
    union { double d; u32 w[2]; } u;

    for (int i = 1; i < 1000; i++) {
        double x = i * 0.001, r;
        __asm__ volatile("fsqrt" : "=t"(r) : "0"(x));
        s += r / (1 + x);
    }
    u.d = s;
    print("x87 low", u.w[0]);
    print("x87 high", u.w[1]);
}

static volatile u32 seen, seen_ip;
struct context { u32 gs, fs, es, ds, di, si, bp, sp, bx, dx, cx, ax, trap, err, ip, cs, flags; };
static void handler(u32 number, struct context c)
{
    seen = number << 8 | c.trap;
    seen_ip = c.ip;
    c.ip += 2;
    __asm__ volatile("" : : "m"(c) : "memory");                    /* it is the frame itself: sigreturn takes it */
}

static void signals(void)
{
    struct { void *handler; u32 flags; void *restorer; u64 mask; } act = { handler, 0, 0, 0 };
    u32 at, r;

    __asm__ volatile("mov $1f, %0\n\tjmp 2f\n1:\tpop %%eax\n\tmov $119, %%eax\n\tint $0x80\n2:" : "=r"(at) : : "eax");
    act.flags = 0x04000000;                                        /* SA_RESTORER */
    act.restorer = (void *)at;
    for (u32 sig = 4; sig <= 11; sig += 7)                         /* the size of the mask is a fourth argument */
        __asm__ volatile("int $0x80" : "=a"(r) : "0"(174), "b"(sig), "c"(&act), "d"(0), "S"(8) : "memory");
    print("rt_sigaction", r);
    __asm__ volatile("ud2");
    print("ud2", seen);
    __asm__ volatile("xor %%eax, %%eax\n\tmov (%%eax), %%eax" : : : "eax", "cc");
    print("null", seen);
}

__attribute__((noreturn)) void _start(void)
{
    u32 sp;

    __asm__ volatile("mov %%esp, %0" : "=r"(sp));
    print("stack", sp > 0x10000 ? 1 : 0);
    segments();
    far_calls();
    old_instructions();
    x87();
    signals();
    sys(252, 0, 0, 0);
    __builtin_unreachable();
}
