/*
 * Cross-modifying code: a processor executes what another one, or a device, writes. SDM vol. 3A 8.1.3 (with a handshake
 * and a serializing instruction; Linux's INT3 protocol), 11.6 (aliases); DMA by the runner's copier.
 */
#include "smp.h"

#define ROUNDS 3000
#define ALIAS (VA_TEST + 0x10000)

enum {
    JOB_NONE,
    JOB_HANDSHAKE,
    JOB_WATCH,
    JOB_POKED,
    JOB_BESIDE,
    JOB_MUTUAL,
    JOB_SHARED,
    JOB_RUN_UNTIL,
};
static volatile u32 ap_job, ap_done;
static volatile u32 turn __attribute__((aligned(64))), seen __attribute__((aligned(64)));
static volatile u32 stop __attribute__((aligned(64))), bad, traps, synced;
static volatile u64 calls __attribute__((aligned(64))), last;
static u8 *frames; /* two pages at VA_TEST, and at ALIAS */

static u32 call(ulong at)
{
    u32 r;
    asm volatile("call *%1" : "=a"(r) : "r"(at) : "rcx", "rdx", "rsi", "rdi", "r8", "memory", "cc");
    return r;
}

/* mov $v, %eax; ret, with the immediate at a multiple of 4: it is stored at once. */
static void put_function(u8 *at, u32 v)
{
    at[3] = 0xb8;
    *(volatile u32 *)(at + 4) = v;
    at[8] = 0xc3;
}
#define FUNCTION(page, n) ((ulong)(page) + 64 * (n) + 3)
#define IMM(page, n) (*(volatile u32 *)((page) + 64 * (n) + 4))

/* Values go up; another processor's may be old, but never go back (stores and fetches of one location are in order). */
static void check_rising(u32 v, u32 *before)
{
    if (v < *before)
        bad++;
    *before = v;
}

/* ---- the second processor ---- */
static void handshake(void)
{
    for (u32 i = 1; i <= ROUNDS; i++) {
        while (turn != i)
            pause();
        cpuid(0, 0); /* serializes */
        if (call(FUNCTION(VA_TEST, 0)) != i)
            bad++;
        seen = i;
    }
}

static void watch(void)
{
    u32 before = 0;
    while (!stop) {
        check_rising(call(FUNCTION(VA_TEST, 0)), &before);
        calls++;
    }
    cpuid(0, 0);
    last = call(FUNCTION(VA_TEST, 0));
}

/* The function's first five bytes are mov $1, %eax or mov $0x01010102, %eax by turns, or INT3 and part of them. */
static void poked(void)
{
    asm volatile("sti");
    while (!stop) {
        u32 v = call(VA_TEST + 0x100);
        if (v != 1 && v != 0x01010102 && v != 3)
            bad++;
        calls++;
    }
    asm volatile("cli");
}

static void beside(void)
{
    while (!stop)
        calls += call(VA_TEST + 0x200);
}

static void mutual(ulong mine, u8 *others)
{
    u32 before = 0;
    for (u32 i = 1; i <= ROUNDS; i++) {
        IMM(others, 0) = i;
        check_rising(call(mine), &before);
    }
}

static void shared(void)
{
    u32 before = 0;
    for (u32 i = 0; i < ROUNDS; i++) {
        asm volatile("lock addl $1, %0" : "+m"(IMM((u8 *)VA_TEST, 0)));
        check_rising(call(FUNCTION(VA_TEST, 0)), &before);
    }
}

static void run_until(void)
{
    u32 v;
    do
        v = call(FUNCTION(VA_TEST, 0));
    while (v != turn);
    last = v;
}

void ap_main(void)
{
    apic_map();
    apic_enable();
    ap_state = 1;
    for (;;) {
        while (ap_job == JOB_NONE)
            pause();
        u32 job = ap_job;
        switch (job) {
        case JOB_HANDSHAKE: handshake(); break;
        case JOB_WATCH: watch(); break;
        case JOB_POKED: poked(); break;
        case JOB_BESIDE: beside(); break;
        case JOB_MUTUAL: mutual(FUNCTION(VA_TEST, 0), frames + 0x1000); break;
        case JOB_SHARED: shared(); break;
        case JOB_RUN_UNTIL: run_until(); break;
        }
        ap_job = JOB_NONE;
        ap_done = job;
    }
}

static void job(u32 n)
{
    stop = bad = 0;
    calls = 0;
    ap_done = JOB_NONE;
    ap_job = n;
}

static void finish(u32 n)
{
    stop = 1;
    must("finished", wait_for(&ap_done, n));
    eq("wrong values", bad, 0);
}

static bool calls_again(void)
{
    u64 before = calls;
    for (u64 i = 0; i < 400000000 && calls == before; i++)
        pause();
    return calls != before;
}

/* ---- the first one ---- */
static void values(void)
{
    test("xmc: a function is changed, the other processor told, which serializes and calls it");
    put_function(frames, 0);
    turn = seen = 0;
    job(JOB_HANDSHAKE);
    for (u32 i = 1; i <= ROUNDS; i++) {
        IMM(frames, 0) = i;
        turn = i;
        if (!wait_for(&seen, i))
            break;
    }
    finish(JOB_HANDSHAKE);
    test("xmc: changed while the other processor calls it over and over");
    job(JOB_WATCH);
    for (u32 i = ROUNDS; i <= 3 * ROUNDS; i++) {
        IMM(frames, 0) = i;
        if (i % 64 == 0)
            must("it runs", calls_again());
    }
    finish(JOB_WATCH);
    eq("last", last, 3 * ROUNDS);
    test("xmc: and rarely, through an alias, so that the other processor's code is settled each time");
    job(JOB_WATCH);
    for (u32 i = 3 * ROUNDS; i < 3 * ROUNDS + 20; i++) {
        IMM((u8 *)ALIAS, 0) = i;
        for (int k = 0; k < 20; k++)
            must("it runs", calls_again());
    }
    finish(JOB_WATCH);
    eq("last", last, 3 * ROUNDS + 19);
    test("xmc: a loop without a branch out of its page ends when its code is changed");
    for (u32 i = 1; i < 100; i++) {
        /* 1: jmp 1b; ret, entered by run_until()'s call; the displacement becomes 0 */
        memcpy(frames, (const u8[]){0xcc, 0xcc, 0xcc, 0xb8, i, 0, 0, 0, 0xeb, 0xfe, 0xc3}, 11);
        turn = i;
        job(JOB_RUN_UNTIL);
        for (u32 k = 0; k < i * 20; k++)
            pause();
        frames[9] = 0;
        finish(JOB_RUN_UNTIL);
        eq("value", last, i);
    }
}

/* Linux's text_poke_bp(): INT3, all others serialize, the rest, serialize, the first byte, serialize. */
static bool poke_hook(void)
{
    if (trap.vector == BP) {
        traps++;
        trap.ip += 4;           /* as if the instruction were a no-operation; what it leaves in EAX is */
        trap_gpr[0] = 3;        /* neither value */
        return true;
    }
    if (trap.vector == 0x61) {
        cpuid(0, 0);
        synced++;
        apic_write(APIC_EOI, 0);
        return true;
    }
    return false;
}

static void sync(void)
{
    u32 before = synced;
    ipi(AP, 0x61 | ICR_ASSERT);
    must("the other one has serialized", wait_for(&synced, before + 1));
}

static void poke(void)
{
    static const u8 insn[2][5] = {{0xb8, 1, 0, 0, 0}, {0xb8, 2, 1, 1, 1}};
    volatile u8 *p = (volatile u8 *)ALIAS + 0x100;

    test("xmc: an instruction is replaced by way of INT3 while the other processor executes it");
    memcpy(frames + 0x100, insn[0], 5);
    frames[0x105] = 0xc3;
    trap_hook = poke_hook;
    traps = 0;
    job(JOB_POKED);
    must("it runs", calls_again());
    for (u32 i = 1; i <= 300 || (!traps && i < 100000); i++) {
        const u8 *new = insn[i & 1];
        p[0] = 0xcc;
        sync();
        if (i % 16 == 0)
            must("it runs", calls_again());
        for (u32 k = 1; k < 5; k++)
            p[k] = new[k];
        sync();
        p[0] = new[0];
        sync();
    }
    finish(JOB_POKED);
    must("INT3 was met", traps > 0);
    trap_hook = NULL;
}

static void neighbours(void)
{
    volatile u32 *data = (volatile u32 *)(frames + 0x300);

    test("xmc: data beside code that the other processor executes");
    memcpy(frames + 0x200, (const u8[]){0xb8, 1, 0, 0, 0, 0xc3}, 6);
    job(JOB_BESIDE);
    must("it runs", calls_again());
    for (u32 i = 0; i < 20 * ROUNDS; i++)
        data[i & 15]++;
    must("it runs", calls_again());
    finish(JOB_BESIDE);
    u32 sum = 0;
    for (u32 i = 0; i < 16; i++)
        sum += data[i];
    eq("sum", sum, 20 * ROUNDS);
    test("xmc: two processors, each changes what the other one executes");
    put_function(frames, 0);
    put_function(frames + 0x1000, 0);
    job(JOB_MUTUAL);
    mutual(FUNCTION(VA_TEST + 0x1000, 0), frames);
    finish(JOB_MUTUAL);
    eq("this one's", call(FUNCTION(VA_TEST + 0x1000, 0)), ROUNDS);
    eq("the other's", call(FUNCTION(VA_TEST, 0)), ROUNDS);
    test("xmc: both change the same instruction by LOCK ADD, and execute it");
    put_function(frames, 0);
    job(JOB_SHARED);
    shared();
    finish(JOB_SHARED);
    eq("sum", call(FUNCTION(VA_TEST, 0)), 2 * ROUNDS);
}

/* ---- the runner's copier: sys_runner.c; QEMU has none ---- */
#define PORT_COPY 0xa0
static bool copier(u32 to, u32 from, u32 n, u8 how)
{
    outl(PORT_COPY, to);
    outl(PORT_COPY + 4, from);
    outl(PORT_COPY + 8, n);
    outb(PORT_COPY + 12, how);
    for (u64 i = 0; i < 400000000; i++) {
        u8 state = inb(PORT_COPY + 12);
        if (state != 1)
            return state == 0;
        pause();
    }
    return false;
}

static void dma(void)
{
    static const char *const name[] = {[1] = "the processor's own thread", [2] = "a thread of its own"};
    u8 *new = pages_new(2);

    for (u8 how = 1; how <= 2; how++) {
        test("xmc: DMA into code that has been executed here (by %s)", name[how]);
        if (inb(PORT_COPY + 12) == 0xff) {
            skip("no copier");
            continue;
        }
        for (u32 i = 0; i < 200; i++) {
            u32 n = i & 1 ? 9 : 0x1000;
            put_function(new, i);
            put_function(new + 0x1000, i + 1);
            must("copied", copier((u32)(ulong)frames, (u32)(ulong)new, n, how));
            for (int k = 0; k < 3; k++)
                eq("value", call(FUNCTION(VA_TEST, 0)), i);
            must("copied", copier((u32)(ulong)frames + 0xff0, (u32)(ulong)new + 0xff0, 0x20, how)); /* into two pages */
            eq("value beyond", call(FUNCTION(VA_TEST + 0x1000, 0)), i + 1);
        }
        test("xmc: DMA into code that the other processor executes (by %s)", name[how]);
        put_function(frames, 0);
        job(JOB_WATCH);
        for (u32 i = 1; i < 200; i++) {
            put_function(new, i);
            must("copied", copier((u32)(ulong)frames, (u32)(ulong)new, 16, how));
            must("it runs", calls_again());
        }
        finish(JOB_WATCH);
        eq("last", last, 199);
    }
}

int main(void)
{
    frames = pages_new(2);
    for (int i = 0; i < 2; i++) {
        map(VA_TEST + 0x1000 * i, (u64)frames + 0x1000 * i, 3);
        map(ALIAS + 0x1000 * i, (u64)frames + 0x1000 * i, 3);
    }
    apic_map();
    apic_enable();
    test("xmc: the second processor starts");
    must("started", start_ap());
    values();
    poke();
    neighbours();
    dma();
    done();
}
