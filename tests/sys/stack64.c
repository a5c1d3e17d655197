/*
 * Runs of PUSH and POP, with RET behind them, in 64-bit code: at every place around the end of a page, where the page behind it is absent, read-only or another
 * one, so often that a translator does them its own way. A fault in the middle leaves what was done before it, and nothing of the rest. SDM vol. 2 PUSH, POP, RET.
 */
#include "sys.h"

#define TIMES 12
#define WORDS 8
#define EDGE (VA_TEST + 4096)

struct regs {
    ulong a, c, d, si, di, r8, r14, r15;
};
static struct regs in, out;
static volatile ulong saved_sp, sp_after;

/* Eight pushes at sp; what RSP is behind them. The instructions may fault: TRY goes on at its end with trap filled in. */
static __attribute__((noinline)) void pushes(ulong sp)
{
    asm volatile("pushq %%rbp; pushq %%rbx; pushq %%r12; pushq %%r13; movq %%rsp, saved_sp;" TRY(
        "movq %0, %%rbx; movq in, %%rax; movq in+8, %%rcx; movq in+16, %%rdx; movq in+24, %%rsi; movq in+32, %%rdi; movq in+40, %%r8; movq in+48, %%r14;"
        "movq in+56, %%r15; movq %%rbx, %%rsp; stc;"
        "pushq %%rax; pushq %%rcx; pushq %%rdx; pushq %%rsi; pushq $-5; pushq %%r8; pushq %%r14; pushq %%r15;"
        "movq %%rsp, sp_after; movq saved_sp, %%rsp") "movq saved_sp, %%rsp; popq %%r13; popq %%r12; popq %%rbx; popq %%rbp"
        ::"r"(sp) : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r14", "r15", "memory", "cc");
}

static __attribute__((noinline)) void pops(ulong sp)
{
    asm volatile("pushq %%rbp; pushq %%rbx; pushq %%r12; pushq %%r13; movq %%rsp, saved_sp;" TRY(
        "movq %0, %%rsp; stc; popq %%rax; popq %%rcx; popq %%rdx; popq %%rsi; popq %%rdi; popq %%r8; popq %%r14; popq %%r15;"
        "movq %%rsp, sp_after; movq saved_sp, %%rsp;"
        "movq %%rax, out; movq %%rcx, out+8; movq %%rdx, out+16; movq %%rsi, out+24; movq %%rdi, out+32; movq %%r8, out+40; movq %%r14, out+48;"
        "movq %%r15, out+56") "movq saved_sp, %%rsp; popq %%r13; popq %%r12; popq %%rbx; popq %%rbp"
        ::"r"(sp) : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r14", "r15", "memory", "cc");
}

/* POP, POP, RET with the frame at sp; RAX and RCX as popped. */
static __attribute__((noinline)) void pops_and_ret(ulong sp)
{
    asm volatile("pushq %%rbp; pushq %%rbx; movq %%rsp, saved_sp;" TRY(
        "leaq 9981f(%%rip), %%rdx; movq %0, %%rbx; movq %%rdx, 16(%%rbx); movq %%rbx, %%rsp; popq %%rcx; popq %%rax; ret $16; ud2\n"
        "9981: movq %%rsp, sp_after; movq saved_sp, %%rsp; movq %%rax, out; movq %%rcx, out+8") "movq saved_sp, %%rsp; popq %%rbx; popq %%rbp"
        ::"r"(sp) : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "memory", "cc");
}

static ulong *word(ulong va) { return (ulong *)va; }

static void fill(ulong n)
{
    ulong *w = &in.a;
    for (u32 i = 0; i < WORDS; i++)
        w[i] = 0x1000 * n + i + 1;
    in.di = (ulong)-5;                                             /* what is pushed as an immediate */
}

static void around_the_edge(void)
{
    test("stack: pushes and pops at every place around the end of a page");
    map(VA_TEST, page_new(), 3);
    map(EDGE, page_new(), 3);
    for (u32 i = 0; i < 4 * 80; i++) {
        ulong sp = EDGE - 8 + i % 80, *w = &in.a;
        bool same = true;
        fill(i);
        pushes(sp);
        eq_trap(NONE, NONE);
        eq("RSP", sp_after, sp - 64);
        for (u32 k = 0; k < WORDS; k++)
            same &= *word(sp - 8 - 8 * k) == w[k];
        must("what was pushed", same);
        for (u32 k = 0; k < WORDS; k++)
            *word(sp - 64 + 8 * k) = w[k];
        pops(sp - 64);
        eq_trap(NONE, NONE);
        eq("RSP", sp_after, sp);
        must("what was popped", !memcmp(&in, &out, sizeof in));
    }
    test("stack: POP, POP, RET at every place around the end of a page");
    for (u32 i = 0; i < 4 * 40; i++) {
        ulong sp = EDGE - 32 + i % 40;
        *word(sp) = 0x77000 + i;
        *word(sp + 8) = 0x88000 + i;
        pops_and_ret(sp);
        eq_trap(NONE, NONE);
        eq("RCX", out.c, 0x77000 + i);
        eq("RAX", out.a, 0x88000 + i);
        eq("RSP", sp_after, sp + 24 + 16);
    }
}

/* n words are pushed down to the end of the upper page; the lower one refuses the next. */
static void fault_while_pushing(u32 n, u32 error)
{
    ulong sp = EDGE + 8 * n, *w = &in.a;
    fill(n);
    for (u32 k = 0; k < n; k++)
        *word(EDGE + 8 * k) = 0;
    pushes(sp);
    eq_trap(PF, error);
    eq("CR2", trap.cr2, EDGE - 8);
    eq("RSP at the fault", trap.sp, EDGE);
    must("CF is kept", trap.flags & F_CF);
    for (u32 k = 0; k < n; k++)
        eq("what was pushed before it", *word(sp - 8 - 8 * k), w[k]);
}

static void faults(void)
{
    test("stack: pushes into a page that is absent: #PF at the one that meets it, RSP there");
    map(VA_TEST, 0, 0);
    for (u32 i = 0; i < 4 * 7; i++)
        fault_while_pushing(i % 7 + 1, PF_W);
    test("stack: the same, a page that is read-only; other places in between");
    map(VA_TEST, page_new(), 1);
    write_cr0(read_cr0() | CR0_WP);
    for (u32 i = 0; i < 4 * 7; i++) {
        fault_while_pushing(i % 7 + 1, PF_W | PF_P);
        pushes(EDGE + 512);
        eq_trap(NONE, NONE);
    }
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
    test("stack: pops from a page that is absent: what was popped before is there");
    map(VA_TEST, page_new(), 3);
    map(EDGE, 0, 0);
    for (u32 i = 0; i < 4 * 7; i++) {
        u32 n = i % 7 + 1;
        pops(EDGE - 8 * n);
        eq_trap(PF, 0);
        eq("CR2", trap.cr2, EDGE);
        eq("RSP at the fault", trap.sp, EDGE);
        must("CF is kept", trap.flags & F_CF);
    }
    test("stack: another page at the same place counts after INVLPG");
    for (u32 i = 0; i < 2 * TIMES; i++) {
        ulong *w = &in.a;
        map(EDGE, page_new(), 3); /* and INVLPG */
        must("a new page is empty", !*word(EDGE));
        fill(i);
        pushes(EDGE + 64);
        for (u32 k = 0; k < WORDS; k++)
            eq("what was pushed", *word(EDGE + 56 - 8 * k), w[k]);
    }
    map(VA_TEST, 0, 0);
    map(EDGE, 0, 0);
}

int main(void)
{
    static u8 own_stack[4096] __attribute__((aligned(16)));
    extern char trap_entry[];
    around_the_edge();
    tss.ist[0] = (ulong)own_stack + sizeof own_stack; /* the current one is what faults */
    idt_set(PF, KCS, trap_entry + PF * 16, D_P | TYPE_INT, 1);
    faults();
    done();
}
