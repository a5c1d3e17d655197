/* What the three modes share: checks and their lines, descriptors, memory functions. */
#include "sys.h"

void arch_init(void);
void lib_init(void);
int main(void);

volatile struct trap trap;
volatile ulong trap_fix, trap_sp, user_flags = F_1;
bool (*trap_hook)(void);
ulong *trap_gpr;
bool quiet_cases;

void *memset(void *p, int c, ulong n)
{
    void *d = p;
    asm volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
    return p;
}

void *memcpy(void *d, const void *s, ulong n)
{
    void *to = d;
    asm volatile("rep movsb" : "+D"(to), "+S"(s), "+c"(n)::"memory");
    return d;
}

int memcmp(const void *a, const void *b, ulong n)
{
    const u8 *p = a, *q = b;
    for (; n; n--, p++, q++)
        if (*p != *q)
            return *p - *q;
    return 0;
}

/* ---- formatting: %s %d %u %x %c ---- */
struct text {
    unsigned len;
    char s[240];
};
static struct text name, why;
static bool open, skipped;

static void put(struct text *t, char c)
{
    if (t->len < sizeof(t->s) - 1)
        t->s[t->len++] = c;
}

static void put_str(struct text *t, const char *s)
{
    while (*s)
        put(t, *s++);
}

static void put_hex(struct text *t, u64 v)
{
    int shift = 60;

    put_str(t, "0x");
    while (shift > 0 && !(v >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put(t, "0123456789abcdef"[v >> shift & 15]);
}

static void put_dec(struct text *t, unsigned v)
{
    if (v >= 10)
        put_dec(t, v / 10);
    put(t, '0' + v % 10);
}

static void put_fmt(struct text *t, const char *fmt, __builtin_va_list ap)
{
    for (; *fmt; fmt++) {
        if (*fmt != '%') {
            put(t, *fmt);
            continue;
        }
        switch (*++fmt) {
        case 's': put_str(t, __builtin_va_arg(ap, const char *)); break;
        case 'x': put_hex(t, __builtin_va_arg(ap, unsigned)); break;
        case 'd':
        case 'u': put_dec(t, __builtin_va_arg(ap, unsigned)); break;
        case 'c': put(t, __builtin_va_arg(ap, int)); break;
        default: put(t, *fmt); break;
        }
    }
}

static void print(const char *s)
{
    while (*s)
        outb(0xe9, *s++);
}

/* ---- checks ---- */
static void close_check(void)
{
    if (!open)
        return;
    open = false;
    name.s[name.len] = why.s[why.len] = 0;
    if (quiet_cases)
        return;
    print(why.len && !skipped ? "not ok " : "ok ");
    print(name.s);
    if (why.len)
        print(skipped ? " # SKIP " : ": ");
    print(why.s);
    print("\n");
}

void test(const char *fmt, ...)
{
    __builtin_va_list ap;

    close_check();
    name.len = why.len = 0;
    open = true;
    skipped = false;
    __builtin_va_start(ap, fmt);
    put_fmt(&name, fmt, ap);
    __builtin_va_end(ap);
}

void eq(const char *what, u64 got, u64 want)
{
    if (got == want || skipped)
        return;
    if (why.len)
        put_str(&why, "; ");
    put_str(&why, what);
    put_str(&why, ": expected ");
    put_hex(&why, want);
    put_str(&why, ", got ");
    put_hex(&why, got);
}

void must(const char *what, bool cond) { eq(what, cond, true); }

void skip(const char *reason)
{
    skipped = true;
    why.len = 0;
    put_str(&why, reason);
}

void note(const char *fmt, ...)
{
    struct text t = {0, ""};
    __builtin_va_list ap;

    __builtin_va_start(ap, fmt);
    put_fmt(&t, fmt, ap);
    __builtin_va_end(ap);
    t.s[t.len] = 0;
    print("# ");
    print(t.s);
    print("\n");
}

void done(void)
{
    close_check();
    print("done\n");
    outb(0xf4, 0);
    for (;;)
        asm volatile("cli; hlt");
}

void expect_shutdown(const char *what)
{
    close_check();
    quiet_cases = false;
    print("shutdown ");
    print(what);
    print("\n");
}

unsigned run_case(void) { return *(volatile u32 *)0x500ul; }

void eq_trap(u32 vector, u32 error)
{
    eq("vector", trap.vector, vector);
    if (trap.vector == vector && vector != NONE)
        eq("error code", (u32)trap.error, error);
}

void trap_unexpected(void)
{
    close_check();
    test("no unexpected exception");
    eq("vector", trap.vector, NONE);
    eq("error", trap.error, NONE);
    eq("cs", trap.cs, 0);
    eq("ip", trap.ip, 0);
    eq("cr2", trap.cr2, 0);
    done();
}

bool cpu_amd(void)
{
    struct cpuid id = cpuid(0, 0);
    return (id.b == 0x68747541 && id.d == 0x69746e65 && id.c == 0x444d4163) ||
           (id.b == 0x6f677948 && id.d == 0x6e65476e && id.c == 0x656e6975);
}

#ifndef REAL_MODE
/* ---- descriptors, SDM vol. 3A 3.4.5, 3.5, 5.8.3, 6.11 ---- */
u64 gdt[GDT_SLOTS] __attribute__((aligned(16))) = {
    [KCS / 8] = sizeof(ulong) == 8 ? 0x00af9b000000ffff : 0x00cf9b000000ffff,
    [KDS / 8] = 0x00cf93000000ffff,
    [UCS32 / 8] = 0x00cffb000000ffff,
    [UDS / 8] = 0x00cff3000000ffff,
    [UCS64 / 8] = 0x00affb000000ffff,
    [UDS2 / 8] = 0x00cff3000000ffff,
    [KCS32 / 8] = 0x00cf9b000000ffff,
    [KCS16 / 8] = 0x000f9b000000ffff,
    [KDS16 / 8] = 0x000093000000ffff,
};
struct table_reg gdt_reg = {sizeof(gdt) - 1, (ulong)gdt};

u64 descriptor(u32 base, u32 limit, u32 access)
{
    return (limit & 0xffff) | (u64)(base & 0xffffff) << 16 | (u64)(access & 0xff) << 40 |
           (u64)(limit >> 16 & 15) << 48 | (u64)(access >> 8 & 15) << 52 | (u64)(base >> 24) << 56;
}

u64 gate(u16 sel, u32 offset, u32 access, u8 low)
{
    return (offset & 0xffff) | (u64)sel << 16 | (u64)low << 32 | (u64)(access & 0xff) << 40 | (u64)(offset >> 16) << 48;
}
#endif

void lib_init(void)
{
#ifndef REAL_MODE
    lgdt(&gdt_reg);
#endif
    arch_init();
    quiet_cases = run_case() > 0;
}
