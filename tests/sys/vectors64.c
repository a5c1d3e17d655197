/*
 * Extended state is the program's own, whatever comes between two of its instructions: exceptions, interrupts, devices, other privilege, instructions that
 * an engine takes long for. SDM vol. 1 chapters 8 to 15; what may run when: vol. 3A 2.5, 13.1, table 2-2. And string instructions, of which interrupts come in the
 * middle: vol. 2 REP. Everything runs many times, so that engines which translate have done so.
 */
#include "apic.h"

#define ROUNDS 24
#define TIMER 0x61
#define HOLE (VA_TEST + 0x100000)

struct image {
    u8 v[32][64];
    u64 k[8];
    u8 fx[512]; /* x87, MXCSR */
} __attribute__((aligned(64)));

static struct image want, got;
static u64 features; /* of XCR0 */
static u8 *bytes;

#define ROWS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
#define HIGH_ROWS(M) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23) M(24) M(25) M(26) M(27) M(28) M(29) M(30) M(31)
#define MASKS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define XMM_IN(n) "movups 64*" #n "(%0), %%xmm" #n "\n\t"
#define XMM_OUT(n) "movups %%xmm" #n ", 64*" #n "(%0)\n\t"
#define YMM_IN(n) "vmovups 64*" #n "(%0), %%ymm" #n "\n\t"
#define YMM_OUT(n) "vmovups %%ymm" #n ", 64*" #n "(%0)\n\t"
#define ZMM_IN(n) "vmovups 64*" #n "(%0), %%zmm" #n "\n\t"
#define ZMM_OUT(n) "vmovups %%zmm" #n ", 64*" #n "(%0)\n\t"
#define MASK_IN(n) "kmovw 2048+8*" #n "(%0), %%k" #n "\n\t"
#define MASK_OUT(n) "kmovw %%k" #n ", 2048+8*" #n "(%0)\n\t"

/* FXRSTOR loads XMM registers, too, so it comes first. */
static void load(const struct image *i)
{
    asm volatile("fxrstorq %0" ::"m"(i->fx));
    if (features & 0xe0)
        asm volatile(ROWS(ZMM_IN) HIGH_ROWS(ZMM_IN) MASKS(MASK_IN)::"r"(i) : "memory");
    else if (features & 4)
        asm volatile(ROWS(YMM_IN)::"r"(i) : "memory");
    else
        asm volatile(ROWS(XMM_IN)::"r"(i) : "memory");
}

static void store(struct image *i)
{
    memset(i, 0, sizeof *i);
    if (features & 0xe0)
        asm volatile(ROWS(ZMM_OUT) HIGH_ROWS(ZMM_OUT) MASKS(MASK_OUT)::"r"(i) : "memory");
    else if (features & 4)
        asm volatile(ROWS(YMM_OUT)::"r"(i) : "memory");
    else
        asm volatile(ROWS(XMM_OUT)::"r"(i) : "memory");
    asm volatile("fxsaveq %0" : "=m"(i->fx));
}

static u64 random(void)
{
    static u64 x = 1;
    x ^= x << 13;
    x ^= x >> 7;
    return x ^= x << 17;
}

/* use: components that are not all zero. Values of the registers that FXSAVE also shows are compared in v. */
static void fill(struct image *i, u64 use)
{
    unsigned bytes_of = features & 0xe0 ? 64 : features & 4 ? 32 : 16;
    memset(i, 0, sizeof *i);
    for (unsigned r = 0; r < (features & 0xe0 ? 32u : 16u); r++)
        for (unsigned b = 0; b < bytes_of; b++)
            if (use & (r >= 16 ? 0x80 : b < 16 ? 2 : b < 32 ? 4 : 0x40))
                i->v[r][b] = (u8)random();
    for (unsigned r = 0; r < 8 && features & 0xe0; r++)
        i->k[r] = use & 0x20 ? (u16)random() : 0;
    *(u16 *)i->fx = use & 1 ? 0xc7f : 0x37f;
    *(u16 *)(i->fx + 2) = use & 1 ? 0x4120 | 5 << 11 : 0;
    i->fx[4] = use & 1 ? 0xe0 : 0;
    *(u32 *)(i->fx + 24) = use & 2 ? 0x9fc0 : 0x1f80;
    for (unsigned r = 0; r < 3 && use & 1; r++) {
        *(u64 *)(i->fx + 32 + 16 * r) = BIT(63) | random();
        *(u16 *)(i->fx + 40 + 16 * r) = (u16)random() & 0xbfff;
    }
}

static bool same(const struct image *a, const struct image *b)
{
    return !memcmp(a->v, b->v, sizeof a->v) && !memcmp(a->k, b->k, sizeof a->k) && !memcmp(a->fx, b->fx, 5) && !memcmp(a->fx + 24, b->fx + 24, 4) &&
           !memcmp(a->fx + 32, b->fx + 32, 48);
}

/* ---- what comes in between; none of it may touch the state ---- */
static volatile unsigned ticks;
static unsigned string_stops;
static ulong string_begin;                           /* RCX before the first iteration */

static bool tick(void)
{
    if (trap.vector != TIMER)
        return false;
    ticks++;
    if (trap_gpr[1] && trap_gpr[1] < string_begin)
        string_stops++;
    apic_write(APIC_EOI, 0);
    return true;
}

static void arm(u32 count)
{
    apic_write(APIC_TIMER_DIV, 0xb);
    apic_write(APIC_LVT_TIMER, TIMER);
    apic_write(APIC_TIMER_INIT, count);
}

static void nothing(void) {}
static void breakpoint(void) { asm volatile(TRY("int3")::); }
static void undefined(void) { asm volatile(TRY("ud2")::); }
static void divide(void) { asm volatile(TRY("divl %1") : "+a"((int){1}) : "r"(0) : "edx"); }
static void absent(void) { asm volatile(TRY("movb (%0), %%al")::"r"(HOLE) : "rax"); }
static void absent_vector(void) { asm volatile(TRY("movaps %%xmm3, (%0)")::"r"(HOLE) : "memory"); }
static void misaligned(void) { asm volatile(TRY("movaps %%xmm3, 1(%0)")::"r"(exec_data) : "memory"); }
static void port(void) { outb(0x80, inb(0x80)); }
static void device(void) { apic_read(APIC_TIMER_NOW); }
static void user(void) { asm volatile(USER("nop")::); }
static void identify(void) { cpuid(7, 0); }
static void msr(void) { wrmsr(MSR_KERNEL_GS_BASE, rdmsr(MSR_KERNEL_GS_BASE)); }
static void space(void) { write_cr3(read_cr3()); }
static void page(void) { invlpg(bytes); }
static void task_switched(void)
{
    write_cr0(read_cr0() | CR0_TS);
    asm volatile(TRY("addps %%xmm1, %%xmm1")::);
    asm volatile("clts");
}
static void sleep(void)
{
    unsigned was = ticks;
    arm(2000);
    while (ticks == was)
        asm volatile("sti; hlt; cli");
}
static void interrupted(void)
{
    unsigned was = ticks;
    arm(20000);
    asm volatile("sti");
    for (volatile unsigned n = 0; ticks == was; n++)
        ;
    asm volatile("cli");
}
static void strings(void) { asm volatile("rep stosb" : : "D"(bytes), "c"(5000ul), "a"(3) : "memory"); }
static void code(void)
{
    exec_data[0] = 0x90;
    EXEC(false, 0x90, 0x0f, 0x1f, 0x00);
}
static void packed(void) /* an interpreter of single instructions uses the registers for this one */
{
    asm volatile("fnstenv %0; fldenv %0" : "+m"(*(u8(*)[28])bytes));
}

static const struct {
    const char *what;
    void (*fn)(void);
} between[] = {
    {"nothing", nothing}, {"INT3", breakpoint}, {"UD2", undefined}, {"#DE", divide}, {"#PF", absent}, {"#PF of a vector store", absent_vector},
    {"#GP of a misaligned one", misaligned}, {"a port", port}, {"a device", device}, {"CPL 3", user}, {"CPUID", identify}, {"an MSR", msr},
    {"MOV CR3", space}, {"INVLPG", page}, {"CR0.TS and #NM", task_switched}, {"HLT and an interrupt", sleep}, {"an interrupt in a loop", interrupted},
    {"REP STOS", strings}, {"new code", code}, {"x87 environment", packed},
};

static void kept(void)
{
    static const u64 uses[] = {0, 2, 3, 6, 7, 0x22, 0x46, 0x82, 0xe7};
    for (unsigned n = 0; n < ARRAY_SIZE(between); n++) {
        test("vectors: kept over %s", between[n].what);
        for (unsigned round = 0; round < ROUNDS; round++) {
            u64 use = uses[round % ARRAY_SIZE(uses)] & (features | 3);
            fill(&want, use);
            load(&want);
            between[n].fn();
            store(&got);
            if (!same(&got, &want)) {
                eq("round that differs", round, NONE);
                break;
            }
        }
    }
    asm volatile("fninit");
    asm volatile("ldmxcsr %0" ::"m"((u32){0x1f80}));
}

/* ---- the same code with and without permission ---- */
static void sse(void) { asm volatile(TRY("addps %%xmm1, %%xmm1; addps %%xmm2, %%xmm2")::); }
static void avx(void) { asm volatile(TRY("vaddps %%ymm1, %%ymm1, %%ymm1; vaddps %%ymm2, %%ymm2, %%ymm2")::); }
static void avx512(void) { asm volatile(TRY("vpord %%zmm1, %%zmm1, %%zmm1; kmovw %%k1, %%k1")::); }
static void mmx(void) { asm volatile(TRY("paddb %%mm1, %%mm1; emms")::); }
static void x87(void) { asm volatile(TRY("fld1; fstp %%st(0)")::); }
static void wait(void) { asm volatile(TRY("fwait")::); }

static void set_xcr0(u64 v) { asm volatile("xsetbv" ::"c"(0), "a"((u32)v), "d"(0)); }

static void permitted(void)
{
    static const struct {
        const char *name;
        void (*fn)(void);
        u64 needs;
        u32 ts, em, fxsr, osxsave, xcr0_sse; /* exceptions with that bit the wrong way; NONE */
    } row[] = {
        {"SSE", sse, 0, NM, UD, UD, NONE, NONE}, {"AVX", avx, 4, NM, NONE, NONE, UD, UD}, {"AVX-512", avx512, 0xe0, NM, NONE, NONE, UD, UD},
        {"MMX", mmx, 0, NM, UD, NONE, NONE, NONE}, {"x87", x87, 0, NM, NM, NONE, NONE, NONE}, {"FWAIT", wait, 0, NM, NONE, NONE, NONE, NONE},
    };
    for (unsigned n = 0; n < ARRAY_SIZE(row); n++) {
        test("vectors: %s by CR0, CR4 and XCR0, the same code again and again", row[n].name);
        if (row[n].needs & ~features) {
            skip("not here");
            continue;
        }
        ulong cr0 = read_cr0() | CR0_MP, cr4 = read_cr4();
        for (unsigned round = 0; round < ROUNDS; round++) {
            write_cr0(cr0);
            row[n].fn();
            eq_trap(NONE, NONE);
            write_cr0(cr0 | CR0_TS);
            row[n].fn();
            eq_trap(row[n].ts, NONE);
            write_cr0(cr0 | CR0_EM);
            row[n].fn();
            eq_trap(row[n].em, NONE);
            write_cr0(cr0);
            write_cr4(cr4 & ~(ulong)CR4_OSFXSR);
            row[n].fn();
            eq_trap(row[n].fxsr, NONE);
            write_cr4(cr4 & ~(ulong)CR4_OSXSAVE);
            row[n].fn();
            eq_trap(row[n].osxsave, NONE);
            write_cr4(cr4);
            if (!(cr4 & CR4_OSXSAVE))                  /* a processor without XSAVE */
                continue;
            set_xcr0(1 | 2);
            row[n].fn();
            eq_trap(row[n].xcr0_sse, NONE);
            set_xcr0(features);
        }
    }
}

/* ---- exceptions of the arithmetic ---- */
static void arithmetic(void)
{
    static u32 control;
    test("vectors: unmasked SIMD exceptions are #XM at the instruction, with the flag set and the destination as it was");
    for (unsigned round = 0; round < ROUNDS; round++) {
        u64 a = 0x3ff0000000000000 + round, b;
        control = 0x1f80 & ~0x200u;
        asm volatile("ldmxcsr %0; movq %1, %%xmm4; pxor %%xmm5, %%xmm5" ::"m"(control), "r"(a));
        asm volatile(TRY("divsd %%xmm5, %%xmm4")::);
        eq_trap(XM, NONE);
        asm volatile("stmxcsr %0; movq %%xmm4, %1" : "=m"(control), "=r"(b));
        eq("MXCSR", control, (0x1f80 & ~0x200u) | 4);
        eq("destination", b, a);
        asm volatile("ldmxcsr %0" ::"m"((u32){0x1f80}));
    }
    test("vectors: LDMXCSR of reserved bits: #GP(0), and MXCSR as it was");
    for (unsigned round = 0; round < ROUNDS; round++) {
        asm volatile(TRY("ldmxcsr %0")::"m"((u32){0x80001f80}));
        eq_trap(GP, 0);
        asm volatile("stmxcsr %0" : "=m"(control));
        eq("MXCSR", control, 0x1f80);
    }
    test("vectors: an unmasked x87 exception is #MF at the next instruction that waits; FNSTENV tells which it was of");
    for (unsigned round = 0; round < ROUNDS; round++) {
        static u32 env[7];
        ulong ip;
        asm volatile("fninit; fldcw %0" ::"m"((u16){round & 1 ? 0x37f : 0x37f & ~4}));
        asm volatile(TRY("fldz; fld1; leaq 9970f(%%rip), %0; 9970: fdiv %%st(1), %%st; fwait") : "=&r"(ip));
        eq_trap(round & 1 ? NONE : MF, NONE);
        asm volatile("fnstenv %0; fninit" : "=m"(env));
        eq("ZE", env[1] & 0x84, round & 1 ? 4 : 0x84);
        eq("FIP", env[3], (u32)ip);
    }
    bool fdp = !(cpuid(7, 0).b >> 6 & 1); /* else of exceptions only */
    test("vectors: FIP and FDP of the last x87 instruction, however often it has run");
    for (unsigned round = 0; round < ROUNDS; round++) {
        static u32 env[7];
        static double d = 1.5;
        ulong ip;
        asm volatile("fninit; leaq 9970f(%%rip), %0; fld1; fstp %%st(0); 9970: fldl (%1); nop" : "=&r"(ip) : "r"(&d));
        if (round % 3 == 1)
            asm volatile(TRY("ud2")::);
        if (round % 3 == 2)
            device();
        asm volatile("fnstenv %0; fninit" : "=m"(env));
        eq("FIP", env[3], (u32)ip);
        eq("FDP", fdp ? env[5] : (u32)(ulong)&d, (u32)(ulong)&d);
    }
    asm volatile("emms");
}

/* ---- strings ---- */
static void copied(void)
{
    u8 *from = pages_new(256), *to = pages_new(256);
    for (unsigned n = 0; n < 256 * 4096; n++)
        from[n] = (u8)(n * 7 + (n >> 8));
    test("strings: a timer's interrupts come before, in and behind REP MOVSB, and it is right nevertheless");
    for (unsigned round = 0; round < 12; round++) {
        ulong c = 256 * 4096 - round, s = (ulong)from, d = (ulong)to;
        unsigned was = ticks;
        memset(to, 0, 64);
        arm(300 + round * 3500);
        asm volatile("sti; rep movsb; cli" : "+c"(c), "+S"(s), "+D"(d)::"memory");
        eq("RCX", c, 0);
        eq("RSI", s, (ulong)from + 256 * 4096 - round);
        eq("RDI", d, (ulong)to + 256 * 4096 - round);
        while (ticks == was)
            asm volatile("sti; nop; cli");
        if (memcmp(from, to, 256 * 4096 - round))
            eq("round whose copy is wrong", round, NONE);
    }
    /* So long that one comes in the middle even on a busy host. Behind STI all of it may be done before any is taken; --check takes none in a block. */
    test("strings: a timer's interrupts come in the middle of REP LODSB");
    string_stops = 0;
    for (unsigned round = 0; round < 200 && string_stops < 2; round++) {
        ulong c = 2 << 20, s = (ulong)from, a = 0;
        unsigned was = ticks;
        string_begin = c;
        arm(5000 + round * 5000);
        if (round & 1)
            asm volatile("sti; jmp 9970f; 9970: rep lodsb; cli" : "+c"(c), "+S"(s), "+a"(a)::"memory");
        else
            asm volatile("sti; rep lodsb; cli" : "+c"(c), "+S"(s), "+a"(a)::"memory");
        eq("RCX", c, 0);
        eq("RSI", s, (ulong)from + (2 << 20));
        eq("AL", a, *(u8 *)(s - 1));
        while (ticks == was)
            asm volatile("sti; nop; cli");
    }
    string_begin = 0;
    eq("stopped in the middle", string_stops, 2);
    test("strings: REP STOSQ into an absent page stops there, and goes on when it is present");
    for (unsigned round = 0; round < ROUNDS; round++) {
        ulong c = 1024, d = VA_TEST;
        map(VA_TEST, (u64)to, PTE_P | PTE_W);
        map(VA_TEST + 0x1000, 0, 0);
        asm volatile(TRY("rep stosq") : "+c"(c), "+D"(d) : "a"(round) : "memory");
        eq_trap(PF, PF_W);
        eq("CR2", trap.cr2, VA_TEST + 0x1000);
        eq("RCX", c, 512);
        eq("RDI", d, VA_TEST + 0x1000);
        map(VA_TEST + 0x1000, (u64)to + 0x3000, PTE_P | PTE_W);
        asm volatile(TRY("rep stosq") : "+c"(c), "+D"(d) : "a"(round) : "memory");
        eq_trap(NONE, NONE);
        eq("RCX", c, 0);
        eq("first", *(u64 *)(to + 0xff8), round);
        eq("last", *(u64 *)(to + 0x3ff8), round);
    }
    test("strings: backwards");
    for (unsigned round = 0; round < ROUNDS; round++) {
        ulong c = 5000, s = (ulong)from + 4999, d = (ulong)to + 5000 + round;
        asm volatile("std; rep movsb; cld" : "+c"(c), "+S"(s), "+D"(d)::"memory");
        eq("RDI", d, (ulong)to + round);
        must("copied", !memcmp(to + 1 + round, from, 5000));
    }
}

int main(void)
{
    write_cr4(read_cr4() | CR4_OSFXSR | CR4_OSXMMEXCPT);
    write_cr0((read_cr0() | CR0_MP | CR0_NE) & ~(ulong)(CR0_EM | CR0_TS));
    features = 3;
    if (cpuid(1, 0).c & BIT(26)) {
        write_cr4(read_cr4() | CR4_OSXSAVE);
        features = cpuid(0xd, 0).a & 0xe7;
        set_xcr0(features);
    }
    bytes = pages_new(2);
    map(HOLE, 0, 0);
    apic_map();
    apic_enable();
    trap_hook = tick;
    idt_set(TIMER, KCS, trap_entry + TIMER * 16, D_P | TYPE_INT, 0);
    kept();
    permitted();
    arithmetic();
    copied();
    done();
}
