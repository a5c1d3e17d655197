/*
 * POPF and IRETQ in 64-bit code, each so often that a translator does it its own way: every flag, frames at the ends of pages, what faults and leaves all as it
 * was, descriptors that change in between. SDM vol. 2 POPF, IRET; vol. 3A 6.14. What comes once of them is in trans64.c, irq64.c and debug64.c.
 */
#include "sys.h"

#define TIMES 12
#define ARITH (F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF)

static __attribute__((noinline)) ulong popf(ulong flags)
{
    ulong back;
    asm volatile("pushq %1; popfq; pushfq; popq %0; pushq $2; popfq" : "=r"(back) : "r"(flags) : "memory", "cc");
    return back;
}

static void popf_flags(void)
{
    static const ulong others[] = {0, F_DF, F_IF, F_AC, F_ID, F_NT, F_IOPL, F_DF | F_IF | F_ID | F_AC | F_NT | F_IOPL};
    test("popf: every combination of arithmetic flags, with each of the others");
    for (ulong i = 0; i < 64 * ARRAY_SIZE(others); i++) {
        ulong a = i & 63, f = others[i / 64];
        f |= (a & 1) | (a & 2) << 1 | (a & 4) << 2 | (a & 8) << 3 | (a & 16) << 3 | (a & 32) << 6;
        eq("flags", popf(f), f | F_1);
    }
    test("popf: RF, VM, VIF, VIP and bits that are reserved change nothing");
    for (u32 i = 0; i < TIMES; i++)
        eq("flags", popf(F_RF | F_VM | F_VIF | F_VIP | 0xffffffff00008028 | F_CF), F_1 | F_CF);
    test("popf: IF and IOPL stay at CPL 3");
    for (u32 i = 0; i < TIMES; i++) {
        ulong back = 0;
        asm volatile(USER("pushq $0x3ad7; popfq; pushfq; popq %%rbx; pushq $2; popfq") : "=b"(back)::"memory", "cc");
        eq("flags", back, 0x8d7);
    }
}

/* At RSP = sp: what POPF gives, and RSP behind it. */
static __attribute__((noinline)) ulong popf_at(ulong sp, ulong *after)
{
    ulong flags;
    asm volatile("movq %%rsp, %%rbx; xorl %%eax, %%eax; movq %2, %%rsp; stc\n"
                 "9971: popfq\n"
                 "9972: movq %%rsp, %1; movq %%rbx, %%rsp; pushfq; popq %0; pushq $2; popfq"
                 : "=&r"(flags), "=&r"(*after)
                 : "r"(sp)
                 : "rax", "rbx", "memory", "cc");
    return flags;
}

static void popf_memory(void)
{
    u8 *const edge = (u8 *)VA_TEST + 4096;
    ulong after;
    test("popf: the operand at the end of a page, across two pages");
    map(VA_TEST, page_new(), 3);
    map(VA_TEST + 4096, page_new(), 3);
    for (u32 at = 0; at < 3 * 16; at++) {
        u8 *p = edge - 16 + at % 16;
        ulong f = F_1 | (at & 1 ? F_CF | F_OF : F_ZF | F_DF);
        memcpy(p, &f, 8);
        eq("flags", popf_at((ulong)p, &after), f);
        eq("RSP", after, (ulong)p + 8);
    }
    test("popf: a page that is absent: #PF; flags and RSP are as before");
    map(VA_TEST + 4096, 0, 0);
    for (u32 i = 0; i < TIMES; i++) {
        ulong sp = (ulong)edge - 4;
        asm volatile("movq %%rsp, %%rbx;" TRY("movq %0, %%rsp; stc; popfq") "movq %%rbx, %%rsp" ::"r"(sp) : "rbx", "memory", "cc");
        eq_trap(PF, 0);
        eq("CR2", trap.cr2, (ulong)edge);
        must("CF as before", trap.flags & F_CF);
        eq("RSP as before", trap.sp, sp);
    }
    map(VA_TEST, 0, 0);
}

/* IRETQ to the same privilege by a frame at `frame`: the flags and RSP that it gives. */
static __attribute__((noinline)) ulong iretq_at(ulong *frame, ulong flags, ulong *after)
{
    ulong back;
    frame[1] = KCS;
    frame[2] = flags;
    frame[3] = 0x7000;
    frame[4] = KDS;
    asm volatile("movq %%rsp, %%rbx; leaq 9973f(%%rip), %0; movq %0, (%2); movq %2, %%rsp; iretq\n"
                 "9973: movq %%rsp, %1; movq %%rbx, %%rsp; pushfq; popq %0; pushq $2; popfq"
                 : "=&r"(back), "=&r"(*after)
                 : "r"(frame)
                 : "rbx", "memory", "cc");
    return back;
}

static void iretq_frames(void)
{
    static const ulong patterns[] = {F_1, F_1 | F_CF | F_ZF, F_1 | F_OF | F_SF | F_DF, F_1 | F_AC | F_PF, F_1 | F_ID | F_AF, F_1 | F_IOPL, F_1 | ARITH};
    u8 *const edge = (u8 *)VA_TEST + 4096;
    ulong after;
    test("iretq: flags, RSP; frames across two pages");
    map(VA_TEST, page_new(), 3);
    map(VA_TEST + 4096, page_new(), 3);
    for (u32 i = 0; i < 6 * TIMES; i++) {
        ulong f = patterns[i % ARRAY_SIZE(patterns)];
        ulong *frame = (ulong *)(edge - 48 + i % 12 * 4);
        eq("flags", iretq_at(frame, f, &after), f);
        eq("RSP", after, 0x7000);
    }
    test("iretq: RF lasts for one instruction, NT of the image comes");
    for (u32 i = 0; i < TIMES; i++) {
        eq("flags", iretq_at((ulong *)VA_TEST, F_1 | F_RF, &after), F_1);
        eq("flags", iretq_at((ulong *)VA_TEST, F_1 | F_NT, &after), F_1 | F_NT);
    }
    test("iretq: where the second page is absent: #PF, all as before");
    map(VA_TEST + 4096, 0, 0);
    for (u32 i = 0; i < TIMES; i++) {
        ulong *frame = (ulong *)(edge - 8 - i % 4 * 8);
        if (i % 4 >= 1)
            frame[1] = KCS;
        asm volatile("movq %%rsp, %%rbx;" TRY("movq %0, %%rsp; stc; iretq") "movq %%rbx, %%rsp" ::"r"(frame) : "rbx", "memory", "cc");
        eq_trap(PF, 0);
        eq("CR2", trap.cr2, (ulong)edge);
        eq("RSP", trap.sp, (ulong)frame);
        must("CF", trap.flags & F_CF);
    }
    map(VA_TEST, 0, 0);
}

static void iretq_faults(void)
{
    u64 cs = gdt[KCS / 8];
    ulong after;
    test("iretq: an address that is not canonical: #GP(0)");
    for (u32 i = 0; i < TIMES; i++) {
        asm volatile(TRY("pushq $0x10; pushq $0x7000; pushq $2; pushq $8; pushq %0; iretq")::"r"(BIT(47)) : "memory", "cc");
        eq_trap(GP, 0);
    }
    test("iretq: a descriptor that becomes another in between counts");
    static ulong frame[5];
    gdt[T0 / 8] = cs;
    for (u32 i = 0; i < 3 * TIMES; i++) {
        gdt[T0 / 8] = i % 3 == 2 ? cs & ~BIT(47) : cs; /* not present */
        asm volatile(TRY("pushq $0x10; leaq 8(%%rsp), %%rax; pushq %%rax; pushq $2; pushq %0; leaq 1f(%%rip), %%rax; pushq %%rax; iretq; 1:")::"i"(T0)
                     : "rax", "memory", "cc");
        if (i % 3 == 2)
            eq_trap(NP, T0);
        else
            eq_trap(NONE, NONE);
        iretq_at(frame, F_1, &after); /* CS is the usual one again */
    }
}

int main(void)
{
    popf_flags();
    popf_memory();
    iretq_frames();
    iretq_faults();
    done();
}
