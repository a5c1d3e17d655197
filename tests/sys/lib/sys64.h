/* 64-bit part of the library: included by sys.h. */
#pragma once

#define USER_OFF 0x10000000ul /* the first 2 MiB once more, for CPL 3 */
#define UPTR(p) ((void *)((ulong)(p) + USER_OFF))

/* Runs the instructions; a fault ends them. Inside asm volatile(TRY("...") : outputs : inputs : clobbers). Operands in
 * registers or globals only. */
#define TRY(insns)                                                                                                     \
    "movl $-1, trap\n\tmovl $0, trap+4\n\tmovq %%rsp, trap_sp\n\tmovq $9991f, trap_fix\n\t" insns "\n9991:\tmovq $0, " \
                                                                                                  "trap_fix\n\tmovq "  \
                                                                                                  "trap_sp, %%rsp\n\t"

/* The same at CPL 3 in 64-bit code on the user stack; labels inside are supervisor addresses. Ends with vector 0x80
 * when nothing faults. */
#define USER(insns) USER_AS("0x2b", insns "\n\tint $0x80\n")
/* At CPL 3 in 32-bit code. */
#define USER32(insns) USER_AS("0x1b", ".code32\n\t" insns "\n\tint $0x80\n\t.code64\n")
#define USER_AS(cs, insns)                                                                                             \
    "movl $-1, trap\n\tmovl $0, trap+4\n\tmovq %%rsp, trap_sp\n\tmovq $9991f, trap_fix\n\t"                            \
    "pushq $0x23\n\tpushq $user_stack_end + 0x10000000\n\tpushq user_flags\n\tpushq $" cs "\n\t"                       \
    "pushq $9990f + 0x10000000\n\tiretq\n9990:\t" insns "\n9991:\tmovq $0, trap_fix\n\tmovq trap_sp, %%rsp\n\t"
/* In 32-bit code at CPL 0 (compatibility mode), and back. Stack and code are below 4 GiB. */
#define COMPAT0(insns)                                                                                                 \
    TRY("pushq $0x38\n\tpushq $9992f\n\tlretq\n9992:\t.code32\n\t" insns "\n\tljmp $8, $9993f\n\t.code64\n9993:\t")

struct __attribute__((packed)) tss64 {
    u32 reserved0;
    u64 rsp[3];
    u64 reserved1;
    u64 ist[7];
    u64 reserved2;
    u16 reserved3, iomap;
    u8 io[8193];
};
extern struct tss64 tss;
void tss_limit(u32 limit); /* of the descriptor; reloads TR */

/* ---- paging ---- */
#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_PWT 8ull
#define PTE_PCD 16ull
#define PTE_A 32ull
#define PTE_D 64ull
#define PTE_PS 128ull
#define PTE_G 256ull
#define PTE_NX BIT(63)
#define PTE_ADDR 0x000ffffffffff000ull
#define PTE_PKEY(k) ((u64)(k) << 59)

/* The entry for va at level 1 (4 KiB), 2 (2 MiB), 3 (1 GiB), 4, in the tables that root points to; makes those above
 * it, P W U. */
volatile u64 *pte_at(u64 root, ulong va, int level);
volatile u64 *pte(ulong va, int level); /* in the current tables */
void map(ulong va, u64 pa, u64 bits);   /* 4 KiB, and INVLPG */
u64 page_new(void);                     /* a zeroed physical page, mapped one to one */
void *pages_new(unsigned n);            /* contiguous */
static inline void invlpg(const volatile void *p) { asm volatile("invlpg (%0)" ::"r"(p) : "memory"); }

unsigned phys_bits(void);
#define VA_TEST 0x40000000ul /* free address space for tests: from 1 GiB on */
