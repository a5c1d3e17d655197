/* Starting the second processor (SDM vol. 3A 8.4.4): it comes to ap_main() in long mode, with this one's tables and
 * interrupts off. 64-bit programs; include it once. */
#pragma once

#include "apic.h"

#define AP 1
#define TRAMPOLINE 0x6000ul

void ap_main(void);
static volatile u32 ap_state, ap_cs, ap_ip; /* ap_main() sets ap_state to 1 */
static u8 ap_stack[8192] __attribute__((aligned(16), used));

/* 16-bit code at 6000h, entered with CS = 600h, IP = 0; then as start.S. SP is 0 after INIT: the word at SS:FFFEh. */
extern char tramp[], tramp_end[];
asm(".code16\n"
    "tramp: cli; movw %cs, %ax; movw %ax, %ds; call 1f\n1: popw %bx; subw $(1b - tramp), %bx\n"
    "movw %cs, %cx; lgdtl (tramp_gdt - tramp)\n"
    "movl %cr0, %eax; orl $0x21, %eax; andl $0x9fffffff, %eax; movl %eax, %cr0; ljmpl $0x38, $tramp32\n"
    "tramp_gdt: .word 0x7ff; .long gdt\n"
    "tramp_end:\n"
    ".code32\n"
    "tramp32: movw $0x10, %ax; movw %ax, %ds; movw %ax, %es; movw %ax, %ss; movzwl %cx, %ecx; movl %ecx, ap_cs; movzwl "
    "%bx, %ebx; movl %ebx, ap_ip\n"
    "movl $0x20, %eax; movl %eax, %cr4; movl $0x100000, %eax; movl %eax, %cr3; movl $0xc0000080, %ecx; rdmsr; orl "
    "$0x900, %eax; wrmsr\n"
    "movl %cr0, %eax; orl $0x80000000, %eax; movl %eax, %cr0; ljmpl $8, $tramp64\n"
    ".code64\n"
    "tramp64: movl $ap_stack + 8192, %esp; xorl %ebp, %ebp; lidt idt_reg; call ap_main; 1: cli; hlt; jmp 1b\n");

static void pause(void) { asm volatile("pause" ::: "memory"); }

/* Waits for a condition, not for ever. */
static bool wait_for(volatile u32 *p, u32 v)
{
    for (u64 i = 0; i < 400000000 && *p != v; i++)
        pause();
    return *p == v;
}

static bool start_ap(void)
{
    ap_state = 0;
    memcpy((void *)TRAMPOLINE, tramp, tramp_end - tramp);
    ipi(AP, ICR_INIT | ICR_ASSERT);
    for (int i = 0; i < 10000; i++)
        pause();
    ipi(AP, ICR_SIPI | ICR_ASSERT | TRAMPOLINE >> 12);
    return wait_for(&ap_state, 1);
}
