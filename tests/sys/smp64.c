/*
 * A second processor: INIT and SIPI, locked operations, memory order, code and page tables changed by the other one,
 * IPIs. SDM vol. 3A 8.1, 8.2, 8.4, 11.6.
 */
#include "smp.h"

static volatile u32 ap_id, ap_job, ap_done, ap_starts;
static volatile u32 arg;

enum {
    JOB_NONE,
    JOB_ADD,
    JOB_INC,
    JOB_XADD,
    JOB_CMPXCHG,
    JOB_XCHG_LOCK,
    JOB_SPLIT,
    JOB_BTS,
    JOB_CX16,
    JOB_MESSAGE,
    JOB_DEKKER,
    JOB_CODE,
    JOB_READ,
    JOB_HALT,
    JOB_HALT_CLI,
    JOB_LOOP,
    JOBS
};
#define ROUNDS 20000

static volatile u64 counter __attribute__((aligned(64))), plain;
static volatile u32 lock_word;
static u8 split_mem[128] __attribute__((aligned(64)));
static u64 pair[2] __attribute__((aligned(16)));
static volatile u32 box __attribute__((aligned(64))), full __attribute__((aligned(64)));
static volatile u32 dx __attribute__((aligned(64))), dy __attribute__((aligned(64))), seen_x, seen_y, go[2], bad;
static volatile u32 ap_irqs;
static volatile u64 ap_value;

static void count(int job)
{
    for (u32 i = 0; i < ROUNDS; i++) {
        u64 a, b;
        switch (job) {
        case JOB_ADD: asm volatile("lock addq $1, %0" : "+m"(counter)::"cc"); break;
        case JOB_INC: asm volatile("lock incq %0" : "+m"(counter)::"cc"); break;
        case JOB_XADD:
            a = 1;
            asm volatile("lock xaddq %1, %0" : "+m"(counter), "+r"(a)::"cc");
            break;
        case JOB_CMPXCHG:
            do {
                a = b = counter;
                asm volatile("lock cmpxchgq %2, %0" : "+m"(counter), "+a"(a) : "r"(b + 1) : "cc");
            } while (a != b);
            break;
        case JOB_XCHG_LOCK: {
            u32 l = 1;
            for (;;) {
                asm volatile("xchgl %0, %1" : "+r"(l), "+m"(lock_word)::"memory");
                if (!l)
                    break;
                pause();
            }
            plain++;
            asm volatile("" ::: "memory");
            lock_word = 0;
            break;
        }
        case JOB_SPLIT: asm volatile("lock addq $1, (%0)" ::"r"(split_mem + 60) : "memory", "cc"); break;
        case JOB_BTS:
            while (({
                u8 c;
                asm volatile("lock btsl $7, %1; setc %0" : "=q"(c), "+m"(lock_word)::"cc");
                c;
            }))
                pause();
            plain++;
            asm volatile("lock btrl $7, %0" : "+m"(lock_word)::"cc", "memory");
            break;
        case JOB_CX16: {
            u8 ok;
            do {
                u64 lo = pair[0], hi = pair[1], l2 = lo, h2 = hi;
                asm volatile("lock cmpxchg16b %1; setz %0"
                             : "=q"(ok), "+m"(pair), "+a"(l2), "+d"(h2)
                             : "b"(lo + 1), "c"(hi + 3)
                             : "cc", "memory");
            } while (!ok);
            break;
        }
        }
    }
}

static bool ap_hook(void);

/* The second processor's life: jobs. It takes no traps, except the interrupt that it counts. */
void ap_main(void)
{
    map(APIC_BASE, APIC_BASE, PTE_P | PTE_W | PTE_PCD | PTE_PWT);
    apic_enable();
    ap_id = apic_read(APIC_ID) >> 24;
    ap_starts++;
    ap_state = 1;
    for (;;) {
        while (ap_job == JOB_NONE)
            pause();
        int job = ap_job;
        switch (job) {
        case JOB_MESSAGE:
            for (u32 i = 1; i <= ROUNDS; i++) {
                while (full != i)
                    pause();
                if (box != i * 3)
                    bad++;
                full = 0x80000000 | i;
            }
            break;
        case JOB_DEKKER:
            for (u32 i = 1; i <= ROUNDS; i++) {
                go[1] = i;
                while ((go[0] & 0x7fffffff) != i)
                    pause();
                dy = i;
                asm volatile("mfence" ::: "memory");
                seen_x = dx;
                asm volatile("" ::: "memory");
                go[1] = i | 0x80000000;
                while (go[0] != (i | 0x80000000) && go[0] != i + 1)
                    pause();
            }
            break;
        case JOB_CODE: {
            u64 v;
            do
                asm volatile("call *%1" : "=a"(v) : "r"(VA_TEST) : "memory");
            while ((u32)v != arg);
            ap_value = v;
            break;
        }
        case JOB_READ: ap_value = *(volatile u32 *)VA_TEST; break;
        case JOB_HALT: asm volatile("sti; hlt; cli"); break;
        case JOB_HALT_CLI: asm volatile("cli; hlt"); break;
        case JOB_LOOP:
            for (;;)
                ap_value++;
        default: count(job);
        }
        ap_job = JOB_NONE;
        ap_done = job;
    }
}

static void job(u32 n)
{
    ap_done = JOB_NONE;
    ap_job = n;
}

static bool finished(u32 n) { return wait_for(&ap_done, n); }

static void start(void)
{
    test("smp: INIT, SIPI: the second processor starts at VV00:0000 in real mode (SDM 3A 8.4.4)");
    must("started", start_ap());
    eq("APIC ID", ap_id, AP);
    eq("CS", ap_cs, TRAMPOLINE >> 4);
    eq("IP", ap_ip, 0);
    test("smp: a SIPI to a running processor is ignored");
    ipi(AP, ICR_SIPI | ICR_ASSERT | TRAMPOLINE >> 12);
    for (int i = 0; i < 100000; i++)
        pause();
    eq("starts", ap_starts, 1);
    job(JOB_INC);
    must("works", finished(JOB_INC));
}

static void locked(void)
{
    static const char *const name[] = {
        [JOB_ADD] = "ADD", [JOB_INC] = "INC", [JOB_XADD] = "XADD", [JOB_CMPXCHG] = "CMPXCHG"};

    for (u32 j = JOB_ADD; j <= JOB_CMPXCHG; j++) {
        test("smp: LOCK %s from two processors loses nothing", name[j]);
        counter = 0;
        job(j);
        count(j);
        must("finished", finished(j));
        eq("sum", counter, 2 * ROUNDS);
    }
    test("smp: XCHG as a lock");
    plain = 0;
    job(JOB_XCHG_LOCK);
    count(JOB_XCHG_LOCK);
    must("finished", finished(JOB_XCHG_LOCK));
    eq("sum", plain, 2 * ROUNDS);
    test("smp: LOCK BTS and BTR as a lock");
    plain = 0;
    job(JOB_BTS);
    count(JOB_BTS);
    must("finished", finished(JOB_BTS));
    eq("sum", plain, 2 * ROUNDS);
    test("smp: LOCK ADD over a cache line's end");
    job(JOB_SPLIT);
    count(JOB_SPLIT);
    must("finished", finished(JOB_SPLIT));
    eq("sum", *(u64 *)(split_mem + 60), 2 * ROUNDS);
    test("smp: LOCK CMPXCHG16B");
    if (!(cpuid(1, 0).c & BIT(13))) {
        skip("no CMPXCHG16B");
    } else {
        pair[0] = pair[1] = 0;
        job(JOB_CX16);
        count(JOB_CX16);
        must("finished", finished(JOB_CX16));
        eq("low", pair[0], 2 * ROUNDS);
        eq("high", pair[1], 6 * ROUNDS);
    }
}

static void order(void)
{
    test("smp: stores are seen in program order (SDM 3A 8.2.3.2)");
    full = bad = 0;
    job(JOB_MESSAGE);
    for (u32 i = 1; i <= ROUNDS; i++) {
        box = i * 3;
        full = i;
        if (!wait_for(&full, 0x80000000 | i))
            break;
    }
    must("finished", finished(JOB_MESSAGE));
    eq("wrong", bad, 0);
    test("smp: MFENCE: of two processors that store and then load, one at least sees the other's store");
    u32 both_missed = 0;
    go[0] = go[1] = 0;
    job(JOB_DEKKER);
    for (u32 i = 1; i <= ROUNDS; i++) {
        go[0] = i;
        while ((go[1] & 0x7fffffff) != i)
            pause();
        dx = i;
        asm volatile("mfence" ::: "memory");
        seen_y = dy;
        while (go[1] != (i | 0x80000000))
            pause();
        if (seen_x != i && seen_y != i)
            both_missed++;
        go[0] = i | 0x80000000;
    }
    must("finished", finished(JOB_DEKKER));
    eq("both missed", both_missed, 0);
}

static void cross(void)
{
    u8 *code = pages_new(1), *other = pages_new(1);

    test("smp: code that the other processor executes is changed (SDM 3A 8.1.3)");
    memcpy(code, (const u8[]){0xb8, 1, 0, 0, 0, 0xc3}, 6);
    map(VA_TEST, (u64)code, 3);
    for (u32 i = 2; i < 50; i++) {
        arg = i;
        job(JOB_CODE);
        for (int k = 0; k < 200; k++)
            pause();
        code[1] = i;
        must("finished", finished(JOB_CODE));
        eq("value", ap_value, i);
    }
    test("smp: a page table changed, and the other processor told by an IPI whose handler uses INVLPG");
    *(u32 *)code = 0x1111;
    *(u32 *)other = 0x2222;
    job(JOB_READ);
    must("finished", finished(JOB_READ));
    eq("before", ap_value, 0x1111);
    trap_hook = ap_hook;
    for (u32 i = 0; i < 20; i++) {
        *pte(VA_TEST, 1) = (u64)(i & 1 ? code : other) | 3;
        ap_irqs = 0;
        job(JOB_HALT);
        for (int k = 0; k < 1000; k++)
            pause();
        ipi(AP, 0x61 | ICR_ASSERT);
        must("interrupted", wait_for(&ap_irqs, 1));
        must("woken from HLT", finished(JOB_HALT));
        job(JOB_READ);
        must("finished", finished(JOB_READ));
        eq("after", ap_value, i & 1 ? 0x1111 : 0x2222);
    }
    invlpg((void *)VA_TEST);
}

static bool ap_hook(void)
{
    if (trap.vector == 0x61) {
        invlpg((void *)VA_TEST);
        ap_irqs++;
        apic_write(APIC_EOI, 0);
        return true;
    }
    if (trap.vector == NMI) {
        ap_irqs++;
        return true;
    }
    return false;
}

/* An NMI that comes before the HLT does not end it, so they are sent until one has. */
static bool nmi_wakes(void)
{
    for (int n = 0; n < 1000; n++) {
        ipi(AP, ICR_NMI | ICR_ASSERT);
        for (int i = 0; i < 100000 && ap_done != JOB_HALT_CLI; i++)
            pause();
        if (ap_done == JOB_HALT_CLI)
            return true;
    }
    return false;
}

static void signals(void)
{
    test("smp: an NMI ends the other processor's HLT with IF = 0");
    ap_irqs = 0;
    trap_hook = ap_hook;
    job(JOB_HALT_CLI);
    for (int i = 0; i < 100000; i++)
        pause();
    eq("asleep", ap_done, JOB_NONE);
    must("woken", nmi_wakes());
    must("NMIs", ap_irqs >= 1);
    test("smp: a fixed interrupt does not end HLT with IF = 0, and is pending afterwards");
    ap_irqs = 0;
    job(JOB_HALT_CLI);
    for (int i = 0; i < 10000; i++)
        pause();
    ipi(AP, 0x61 | ICR_ASSERT);
    for (int i = 0; i < 100000; i++)
        pause();
    eq("asleep", ap_done, JOB_NONE);
    eq("interrupts", ap_irqs, 0);
    must("woken by NMI", nmi_wakes());
    job(JOB_HALT);
    must("the pending interrupt ends the next HLT", finished(JOB_HALT));
    test("smp: INIT stops a processor whatever it does, SIPI starts it again");
    job(JOB_LOOP);
    for (int i = 0; i < 10000; i++)
        pause();
    u64 v = ap_value;
    for (u32 i = 0; i < 400000000 && ap_value == v; i++)
        pause();
    must("runs", ap_value != v);
    ap_job = JOB_NONE;
    must("started", start_ap());
    eq("starts", ap_starts, 2);
    job(JOB_INC);
    must("works", finished(JOB_INC));
    test("smp: broadcast to all but itself");
    ap_irqs = 0;
    job(JOB_HALT);
    for (int i = 0; i < 10000; i++)
        pause();
    apic_write(APIC_ICR, 0x61 | ICR_ASSERT | 3 << 18);
    must("woken", finished(JOB_HALT));
    eq("interrupts", ap_irqs, 1);
}

/* PAUSE is all that a processor does for a while: an emulator may do something else meanwhile, of which nothing is to be seen. */
static void pauses(void)
{
    ulong carried, rcx = 0x1122334455667788, r14 = 0x99aabbccddeeff00, r15 = ~0ul, flags;

    test("smp: 3000 PAUSEs change no register and no flag");
    asm volatile("movq %3, %%r14; movq %4, %%r15; xorl %%eax, %%eax; movl $3000, %%edx\n"
                 "1: stc; pause; adcq $0, %%rax; stc; pause; decl %%edx; jnz 1b\n"
                 "pushfq; popq %1; movq %%r14, %3; movq %%r15, %4"
                 : "=&a"(carried), "=&r"(flags), "+c"(rcx), "+r"(r14), "+r"(r15)::"rdx", "r14", "r15", "cc");
    eq("carries", carried, 3000);
    eq("flags", flags & (F_CF | F_PF | F_ZF | F_SF | F_OF), F_CF | F_PF | F_ZF);
    eq("RCX", rcx, 0x1122334455667788);
    eq("R14", r14, 0x99aabbccddeeff00);
    eq("R15", r15, ~0ul);
}

int main(void)
{
    apic_map();
    apic_enable();
    start();
    locked();
    order();
    cross();
    signals();
    pauses();
    done();
}
