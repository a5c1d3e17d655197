/*
 * What privileged instructions cost, in cycles of the TSC: lines "# NAME CYCLES", the least of some runs of a loop, without the loop's own. A check is only that each
 * of them is done: DESIGN.md has the table, which depends on the machine; nobody compares times here.
 */
#include "sys.h"

#define LOOPS 200
#define RUNS 7

static u64 now(void)
{
    u32 lo, hi;
    asm volatile("lfence; rdtsc" : "=a"(lo), "=d"(hi));
    return (u64)hi << 32 | lo;
}

/* One macro per loop: the instructions, their inputs; all general registers but RBX, R12 to R15 may be changed. */
#define TIME(code, ...)                                                                                                                                           \
    ({                                                                                                                                                            \
        u64 best = ~0ull;                                                                                                                                         \
        for (u32 run = 0; run < RUNS; run++) {                                                                                                                    \
            u64 t = now();                                                                                                                                        \
            for (u64 n = LOOPS; n; n--)                                                                                                                           \
                asm volatile(code ::__VA_ARGS__ : "rax", "rcx", "rdx", "rdi", "rsi", "r8", "r9", "r10", "r11", "memory", "cc");                                   \
            t = now() - t;                                                                                                                                        \
            best = t < best ? t : best;                                                                                                                           \
        }                                                                                                                                                         \
        best;                                                                                                                                                     \
    })
#define COST(name, code, ...) note("%s %u", name, (u32)((TIME(code, ##__VA_ARGS__) - empty) / LOOPS))

static u8 area[4096] __attribute__((aligned(64)));
static u64 inv[2] __attribute__((aligned(16))) = {0, VA_TEST};

static void flags_and_stack(u64 empty)
{
    COST("cli-sti", "cli; sti; nop; cli", "r"(0ul));
    COST("pushfq-popfq", "pushfq; popfq", "r"(0ul));
    COST("iretq", "movq %%rsp, %%rax; pushq $0x10; pushq %%rax; pushfq; pushq $8; leaq 1f(%%rip), %%rcx; pushq %%rcx; iretq; 1:", "r"(0ul));
    COST("int-iretq", "int $0x44", "r"(0ul));
}

static void bases(u64 empty)
{
    COST("swapgs", "swapgs; swapgs", "r"(0ul));
    COST("rdmsr-gs-base", "movl $0xc0000101, %%ecx; rdmsr", "r"(0ul));
    COST("wrmsr-kernel-gs-base", "movl $0xc0000102, %%ecx; xorl %%eax, %%eax; xorl %%edx, %%edx; wrmsr", "r"(0ul));
    if (cpuid(7, 0).b & 1) {
        write_cr4(read_cr4() | CR4_FSGSBASE);
        COST("wrfsbase-rdfsbase", "xorl %%eax, %%eax; wrfsbase %%rax; rdfsbase %%rax", "r"(0ul));
    }
}

static void translation(u64 empty)
{
    ulong cr3 = read_cr3();
    COST("mov-cr3", "movq %0, %%cr3", "r"(cr3));
    COST("invlpg", "invlpg (%0)", "r"(VA_TEST));
    if (cpuid(7, 0).b & BIT(10))
        COST("invpcid", "xorl %%eax, %%eax; invpcid (%0), %%rax", "r"(inv));
    COST("mov-from-cr3", "movq %%cr3, %%rax", "r"(0ul));
}

static void others(u64 empty)
{
    COST("out", "outb %%al, $0xe0", "r"(0ul));
    COST("in", "inb $0xe0, %%al", "r"(0ul));
    COST("rdtsc", "rdtsc", "r"(0ul));
    COST("cpuid", "pushq %%rbx; xorl %%eax, %%eax; cpuid; popq %%rbx", "r"(0ul));
    if (cpuid(1, 0).c & BIT(26) && cpuid(0xd, 1).a & 8) {
        write_cr4(read_cr4() | CR4_OSXSAVE | CR4_OSFXSR);
        asm volatile("xsetbv" ::"a"(3 | (cpuid(0xd, 0).a & 4)), "d"(0), "c"(0));
        COST("xsaves-xrstors", "movl $7, %%eax; xorl %%edx, %%edx; xsaves64 (%0); xrstors64 (%0)", "r"(area));
    }
}

static void system_calls(u64 empty)
{
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    wrmsr(MSR_STAR, (u64)(UCS64 - 16) << 48 | (u64)KCS << 32);
    wrmsr(MSR_SFMASK, 0x47fd5);
    extern char cost_entry[];
    wrmsr(MSR_LSTAR, (ulong)cost_entry);
    u64 best = ~0ull;
    for (u32 run = 0; run < RUNS; run++) {
        u64 t = now();
        asm volatile(USER("movl $" STR(LOOPS) ", %%ebx; 1: syscall; decl %%ebx; jnz 1b")::: "rax", "rcx", "rbx", "rdx", "r11", "memory", "cc");
        t = now() - t;
        best = t < best ? t : best;
    }
    eq_trap(VEC_DONE, NONE);
    note("syscall-sysret %u", (u32)((best - empty) / LOOPS));
}
asm("cost_entry: sysretq");

int main(void)
{
    extern char cost_iret[];
    asm("jmp 1f; cost_iret: iretq; 1:");
    idt_set(0x44, KCS, cost_iret, D_P | TYPE_INT, 0);
    test("cost: each of the instructions is done");
    u64 empty = TIME("", "r"(0ul));
    flags_and_stack(empty);
    bases(empty);
    translation(empty);
    others(empty);
    system_calls(empty);
    done();
}
