/* 32-bit part of the library: included by sys.h. DS and ES hold UDS, SS KDS, FS and GS nothing; the catcher sets them
 * so again. */
#pragma once

#define USER_OFF 0ul
#define UPTR(p) ((void *)(p))

#define TRY_BEGIN "movl $-1, trap\n\tmovl $0, trap+4\n\tmovl %%esp, trap_sp\n\tmovl $9991f, trap_fix\n\t"
#define TRY_END "\n9991:\tmovl $0, %%ss:trap_fix\n\tmovl %%ss:trap_sp, %%esp\n\t"
/* Runs the instructions; a fault ends them. Inside asm volatile(TRY("...") : outputs : inputs : clobbers). */
#define TRY(insns) TRY_BEGIN insns TRY_END
/* The same at CPL 3. Ends with vector 0x80 when nothing faults. */
#define USER(insns)                                                                                                    \
    TRY_BEGIN "pushl $0x23\n\tpushl $user_stack_end\n\tpushl user_flags\n\tpushl $0x1b\n\tpushl $9990f\n\tiretl\n"     \
              "9990:\t" insns "\n\tint $0x80" TRY_END
/*
 * In virtual-8086 mode: CS = 800h (the program's image), DS, ES, FS, GS, SS = V86_SEG, SP = F000h. Registers carry
 * over. Ends with vector 0x80 by HLT, which is #GP there. Only for programs whose code is within 64 KiB of 8000h.
 */
#define V86_SEG 0x9000
#define V86_MEM ((u8 *)0x90000)
#define V86_END "\n\thlt\n\t"
#define V86(insns)                                                                                                     \
    TRY_BEGIN "pushl $0x9000\n\tpushl $0x9000\n\tpushl $0x9000\n\tpushl $0x9000\n\tpushl $0x9000\n\tpushl $0xf000\n\t" \
              "pushl user_flags\n\torl $0x20000, (%%esp)\n\tpushl $0x800\n\tpushl $9990f - 0x8000\n\tiretl\n"          \
              ".code16\n9990:\t" insns V86_END ".code32" TRY_END

struct tss32 {
    u32 link, esp0, ss0, esp1, ss1, esp2, ss2, cr3, eip, eflags, eax, ecx, edx, ebx, esp, ebp, esi, edi, es, cs, ss, ds,
        fs, gs, ldt;
    u16 trap, iomap;
    u8 redirect[32]; /* of software interrupts in virtual-8086 mode, just below the I/O map (SDM 3A 20.3.3) */
    u8 io[8193];
};
extern struct tss32 tss;
void tss_limit(u32 limit); /* of the descriptor; reloads TR */

u64 page_new(void); /* a zeroed page of physical memory, from 2 MiB on */
void *pages_new(unsigned n);
static inline void invlpg(const volatile void *p) { asm volatile("invlpg (%0)" ::"r"(p) : "memory"); }
unsigned phys_bits(void);
