/*
 * Runs a piece of code with every general register as the test wants it, RSP and flags included, at CPL 0 or 3, and shows
 * every register as it was when the piece ended: by a fault, or by `int $0x80` (trap.vector is VEC_DONE then). Exceptions
 * arrive on stacks of their own (IST), so that RSP may be anything. 64-bit programs.
 */
#pragma once

#include "sys.h"

struct run {
    ulong gpr[16]; /* AX CX DX BX SP BP SI DI R8..R15 */
    ulong ip, flags;
};
static struct run run_in, run_out;
static u8 run_xmm[16]; /* XMM0 at the end */
static u8 run_ist[8192] __attribute__((aligned(16)));

void run_enter(const struct run *in, ulong cs, ulong ss);
asm(".text\n"
    "run_enter:\n\t"
    "pushq %rbx\n\tpushq %rbp\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
    "movl $-1, trap\n\tmovl $0, trap + 4\n\t"
    "movq %rsp, trap_sp\n\tmovq $1f, trap_fix\n\t"
    "pushq %rdx\n\tpushq 32(%rdi)\n\tpushq 136(%rdi)\n\tpushq %rsi\n\tpushq 128(%rdi)\n\t"
    "movq (%rdi), %rax\n\tmovq 8(%rdi), %rcx\n\tmovq 16(%rdi), %rdx\n\tmovq 24(%rdi), %rbx\n\t"
    "movq 40(%rdi), %rbp\n\tmovq 48(%rdi), %rsi\n\tmovq 64(%rdi), %r8\n\tmovq 72(%rdi), %r9\n\t"
    "movq 80(%rdi), %r10\n\tmovq 88(%rdi), %r11\n\tmovq 96(%rdi), %r12\n\tmovq 104(%rdi), %r13\n\t"
    "movq 112(%rdi), %r14\n\tmovq 120(%rdi), %r15\n\tmovq 56(%rdi), %rdi\n\t"
    "iretq\n"
    "1:\tmovq $0, trap_fix\n\t"
    "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbp\n\tpopq %rbx\n\t"
    "ret\n");

static bool run_note(void)
{
    for (unsigned i = 0; i < 16; i++)
        run_out.gpr[i] = trap_gpr[i];
    run_out.gpr[4] = trap.sp;
    run_out.ip = trap.ip;
    run_out.flags = trap.flags;
    asm volatile("movdqu %%xmm0, %0" : "=m"(run_xmm));
    return false;
}

/* Once: exceptions on their own stack. */
static void run_init(void)
{
    write_cr4(read_cr4() | CR4_OSFXSR);
    tss.ist[0] = (ulong)run_ist + sizeof run_ist;
    for (unsigned i = 0; i < 32; i++)
        idt_set(i, KCS, trap_entry + i * 16, D_P | TYPE_INT, 1);
    idt_set(VEC_DONE, KCS, trap_entry + VEC_DONE * 16, D_P | D_DPL(3) | TYPE_INT, 1);
}

/* Runs run_in, whose ip is a supervisor address of the program (in its first 2 MiB) if it is to run there. */
static void run_at(ulong ip, bool user)
{
    run_in.ip = ip;
    trap_hook = run_note;
    run_enter(&run_in, user ? UCS64 : KCS, user ? UDS : KDS);
    trap_hook = NULL;
}
