/*
 * Instructions that fault in the middle and must be restartable: strings, stack, locked operations. SDM vol. 1 7.3.9,
 * vol. 2 (the instructions), vol. 3A 6.6, 8.1.
 */
#include "sys.h"

static u8 *mem;                 /* two pages, at VA; the one behind is absent */
#define VA (VA_TEST + 0x200000) /* nothing is mapped below */
static u8 *const at = (u8 *)VA;
#define HOLE ((u8 *)VA + 0x2000)

static void strings(void)
{
    ulong c, d, s;

    test("string: REP STOSB into an absent page: done up to it, RCX and RDI say so, RIP at the instruction");
    c = 100, d = (ulong)HOLE - 40;
    asm volatile(TRY("rep stosb") : "+c"(c), "+D"(d) : "a"(0x5a) : "memory");
    eq_trap(PF, PF_W);
    eq("CR2", trap.cr2, (ulong)HOLE);
    eq("RCX", c, 60);
    eq("RDI", d, (ulong)HOLE);
    eq("last byte", HOLE[-1], 0x5a);
    test("string: REP STOSQ with an element over the boundary: nothing of it is written");
    c = 10, d = (ulong)HOLE - 20;
    asm volatile(TRY("rep stosq") : "+c"(c), "+D"(d) : "a"(0x1111111111111111) : "memory");
    eq_trap(PF, PF_W);
    eq("CR2", trap.cr2, (ulong)HOLE);
    eq("RCX", c, 8);
    eq("RDI", d, (ulong)HOLE - 4);
    eq("below", *(u32 *)(HOLE - 4), 0x5a5a5a5a);
    test("string: REP MOVSB, source or destination absent");
    c = 100, s = (ulong)HOLE - 10, d = (ulong)at;
    asm volatile(TRY("rep movsb") : "+c"(c), "+D"(d), "+S"(s)::"memory");
    eq_trap(PF, 0);
    eq("RCX", c, 90);
    eq("RSI", s, (ulong)HOLE);
    eq("RDI", d, (ulong)at + 10);
    c = 100, d = (ulong)HOLE - 10, s = (ulong)at;
    asm volatile(TRY("rep movsl") : "+c"(c), "+D"(d), "+S"(s)::"memory");
    eq_trap(PF, PF_W);
    eq("RCX", c, 98);
    eq("RSI", s, (ulong)at + 8);
    eq("RDI", d, (ulong)HOLE - 2);
    test("string: backwards into an absent page");
    c = 100, d = (ulong)at + 19, s = (ulong)at + 0x1000;
    asm volatile(TRY("std; rep movsb") : "+c"(c), "+D"(d), "+S"(s)::"memory", "cc");
    eq_trap(PF, PF_W);
    eq("RCX", c, 80);
    eq("RDI", d, (ulong)at - 1);
    eq("RSI", s, (ulong)at + 0x1000 - 20);
    test("string: RCX = 0 touches nothing");
    asm volatile(TRY("rep movsb; rep stosq; repe cmpsb; repne scasb; rep lodsb")
                 : "+D"(d), "+S"(s)
                 : "c"(0ul)
                 : "rax", "memory", "cc");
    eq_trap(NONE, NONE);
    test("string: REP MOVSB overlapping forwards repeats the pattern");
    for (int i = 0; i < 300; i++)
        at[i] = i;
    memcpy(at + 3, at, 200);
    int bad = 0;
    for (int i = 0; i < 203; i++)
        bad += at[i] != i % 3;
    eq("wrong bytes", bad, 0);
    eq("the byte behind", at[203], 203);
    test("string: REP MOVSQ overlapping by less than an element");
    for (int i = 0; i < 300; i++)
        at[i] = i;
    c = 10, d = (ulong)at + 4, s = (ulong)at;
    asm volatile("rep movsq" : "+c"(c), "+D"(d), "+S"(s)::"memory");
    eq("bytes 4 to 7", *(u32 *)(at + 4), 0x03020100);
    eq("bytes 8 to 11", *(u32 *)(at + 8), 0x07060504);
    eq("bytes 12 to 15", *(u32 *)(at + 12), 0x07060504);
    eq("bytes 16 to 19", *(u32 *)(at + 16), 0x0f0e0d0c);
    eq("bytes 24 to 27", *(u32 *)(at + 24), 0x17161514);
    test("string: REPE CMPSB, REPNE SCASB stop at the first difference, at the first match, with its flags");
    memset(at, 7, 200);
    memset(at + 500, 7, 200);
    at[550] = 8;
    ulong f;
    c = 200, s = (ulong)at, d = (ulong)at + 500;
    asm volatile("repe cmpsb; pushfq; popq %3" : "+c"(c), "+S"(s), "+D"(d), "=r"(f)::"memory", "cc");
    eq("RCX", c, 149);
    eq("RSI", s, (ulong)at + 51);
    eq("flags", f & (F_CF | F_ZF | F_SF), F_CF | F_SF);
    c = 200, d = (ulong)at + 500;
    asm volatile("repne scasb; pushfq; popq %2" : "+c"(c), "+D"(d), "=r"(f) : "a"(8) : "memory", "cc");
    eq("RCX", c, 149);
    eq("RDI", d, (ulong)at + 551);
    eq("ZF", f & F_ZF, F_ZF);
    test("string: CMPS that faults in the middle: RCX and pointers at the element");
    c = 100, s = (ulong)HOLE - 5, d = (ulong)HOLE - 5 - 1024;
    memcpy((void *)d, (void *)s, 5);
    asm volatile(TRY("repe cmpsb") : "+c"(c), "+S"(s), "+D"(d)::"memory", "cc");
    eq_trap(PF, 0);
    eq("RCX", c, 95);
    eq("RSI", s, (ulong)HOLE);
    test("string: 32-bit addresses: ECX and EDI count, upper halves are cleared");
    c = 0xffffffff00000004, d = 0xffffffff00000000 | (u32)(ulong)at;
    asm volatile(TRY("addr32 rep stosb") : "+c"(c), "+D"(d) : "a"(3) : "memory");
    eq_trap(NONE, NONE);
    eq("RCX", c, 0);
    eq("RDI", d, (u32)(ulong)at + 4);
    test("string: segment overrides: FS for the source");
    wrmsr(MSR_FS_BASE, VA);
    at[0x77] = 0x99;
    s = 0x77;
    asm volatile("movb $0, %%al; fs lodsb" : "=a"(f), "+S"(s)::"memory");
    eq("AL", f & 0xff, 0x99);
    wrmsr(MSR_FS_BASE, 0);
    test("string: many pages");
    u8 *big = pages_new(64);
    memset(big, 0x42, 64 * 4096);
    c = 64 * 4096, d = (ulong)big;
    asm volatile("repe scasb; pushfq; popq %2" : "+c"(c), "+D"(d), "=r"(f) : "a"(0x42) : "memory", "cc");
    eq("RCX", c, 0);
    eq("ZF", f & F_ZF, F_ZF);
}

static void stack(void)
{
    ulong sp = (ulong)HOLE, v;

    test("stack: PUSH, CALL, ENTER, PUSHF into an absent page: RSP, RBP as before");
    map(VA + 0x2000, 0, 0);
    sp = VA + 0x3000;
    tss.ist[0] = (ulong)ring0_stack_end;
    idt_set(PF, KCS, trap_entry + PF * 16, D_P | TYPE_INT, 1);
    asm volatile(TRY("movq %0, %%rsp; pushq %%rax")::"r"(sp) : "memory");
    eq_trap(PF, PF_W);
    eq("RSP after PUSH", trap.sp, sp);
    eq("CR2", trap.cr2, sp - 8);
    asm volatile(TRY("movq %0, %%rsp; call 9970f; 9970:")::"r"(sp) : "memory");
    eq("RSP after CALL", trap.sp, sp);
    asm volatile(TRY("movq %0, %%rsp; pushfq")::"r"(sp) : "memory");
    eq("RSP after PUSHF", trap.sp, sp);
    asm volatile("movq %%rbp, %%rdx\n\t" TRY("movq %1, %%rsp; movq $0x1234, %%rbp; enterq $32, $0") "xchgq %%rdx, %%rbp"
                 : "=&d"(v)
                 : "r"(sp)
                 : "memory");
    eq_trap(PF, PF_W);
    eq("RSP after ENTER", trap.sp, sp);
    eq("RBP after ENTER", v, 0x1234);
    test("stack: ENTER whose new RSP lies in an absent page faults (SDM 2A ENTER: #PF if a write with the final RSP "
         "would)");
    map(VA + 0x3000, (u64)mem, 3);
    asm volatile("movq %%rbp, %%rdx\n\t" TRY("movq %1, %%rsp; movq $0x1234, %%rbp; enterq $0x1000, $0") "xchgq %%rdx, "
                                                                                                        "%%rbp"
                 : "=&d"(v)
                 : "r"(VA + 0x3800)
                 : "memory");
    eq_trap(PF, PF_W);
    eq("RBP", v, 0x1234);
    map(VA + 0x3000, 0, 0);
    test("stack: POP, RET, LEAVE from an absent page");
    asm volatile(TRY("movq %0, %%rsp; popq %%rax")::"r"(sp - 8) : "rax", "memory");
    eq_trap(PF, 0);
    eq("RSP after POP", trap.sp, sp - 8);
    asm volatile(TRY("movq %0, %%rsp; ret")::"r"(sp - 8) : "memory");
    eq("RSP after RET", trap.sp, sp - 8);
    asm volatile("movq %%rbp, %%rdx\n\t" TRY("movq %1, %%rbp; movq %1, %%rsp; subq $64, %%rsp; leave") "xchgq %%rdx, "
                                                                                                       "%%rbp"
                 : "=&d"(v)
                 : "r"(sp - 8)
                 : "memory");
    eq_trap(PF, 0);
    eq("RSP after LEAVE", trap.sp, sp - 72);
    eq("RBP after LEAVE", v, sp - 8);
    test("stack: POP into absent memory leaves RSP; PUSH from absent memory too");
    asm volatile(TRY("pushq $5; movq %%rsp, %0; popq (%1)") : "=&r"(v) : "r"(HOLE) : "memory");
    eq_trap(PF, PF_W);
    eq("RSP", trap.sp, v);
    asm volatile(TRY("movq %%rsp, %0; pushq (%1)") : "=&r"(v) : "r"(HOLE) : "memory");
    eq_trap(PF, 0);
    eq("RSP", trap.sp, v);
    test("stack: CALL through absent memory leaves RSP");
    asm volatile(TRY("movq %%rsp, %0; call *(%1)") : "=&r"(v) : "r"(HOLE) : "memory");
    eq_trap(PF, 0);
    eq("RSP", trap.sp, v);
    test("stack: IRETQ whose frame runs into an absent page leaves RSP");
    map(VA + 0x3000, (u64)mem, 3);
    map(VA + 0x4000, 0, 0);
    asm volatile(TRY("movq %0, %%rsp; iretq")::"r"(VA + 0x4000 - 16) : "memory");
    eq_trap(PF, 0);
    eq("RSP", trap.sp, VA + 0x4000 - 16);
    idt_default(PF);
    test("stack: PUSH RSP pushes the old value; POP RSP loads; POP (RSP) addresses with the new one");
    ulong a, b;
    asm volatile("movq %%rsp, %0; pushq %%rsp; popq %1" : "=&r"(a), "=&r"(b)::"memory");
    eq("PUSH RSP", b, a);
    asm volatile("movq %%rsp, %%rdx; pushq $0x1111; pushq $0x2222; popq (%%rsp); popq %0; movq %%rdx, %%rsp"
                 : "=&r"(a)::"rdx", "memory");
    eq("POP (RSP)", a, 0x2222);
    test("stack: non-canonical: #SS(0) by RSP and RBP, #GP(0) with FS or another base (SDM 1 3.3.7.1)");
    tss.ist[0] = (ulong)ring0_stack_end;
    idt_set(SS, KCS, trap_entry + SS * 16, D_P | TYPE_INT, 1);
    idt_set(GP, KCS, trap_entry + GP * 16, D_P | TYPE_INT, 1);
    ulong bad = 0x0000800000000000;
    asm volatile(TRY("movq %0, %%rsp; pushq %%rax")::"r"(bad + 8) : "memory");
    eq_trap(SS, 0);
    eq("RSP", trap.sp, bad + 8);
    asm volatile(TRY("movq %0, %%rsp; popq %%rax")::"r"(bad) : "memory");
    eq_trap(SS, 0);
    asm volatile("movq %%rbp, %%rdx\n\t" TRY("movq %0, %%rbp; movq (%%rbp), %%rax") "movq %%rdx, %%rbp" ::"r"(bad)
                 : "rax", "rdx", "memory");
    eq_trap(SS, 0);
    asm volatile("movq %%rbp, %%rdx\n\t" TRY("movq %0, %%rbp; movq %%fs:(%%rbp), %%rax") "movq %%rdx, %%rbp" ::"r"(bad)
                 : "rax", "rdx", "memory");
    eq_trap(GP, 0);
    asm volatile(TRY("movq (%0), %%rax")::"r"(bad) : "rax");
    eq_trap(GP, 0);
    asm volatile(TRY("movq -4(%0), %%rax")::"r"(bad) : "rax");
    eq("an access that ends beyond: vector", trap.vector, GP);
    idt_default(SS), idt_default(GP);
}

static void locked(void)
{
    static u64 q[3] __attribute__((aligned(16)));
    ulong a, d;

    test("CMPXCHG16B: equal: stores RCX:RBX, ZF = 1; not equal: loads RDX:RAX, ZF = 0");
    if (!(cpuid(1, 0).c & BIT(13))) {
        skip("no CMPXCHG16B");
    } else {
        u8 z;
        q[0] = 1, q[1] = 2;
        a = 1, d = 2;
        asm volatile(TRY("lock cmpxchg16b (%3); setz %b2")
                     : "+a"(a), "+d"(d), "=&r"(z)
                     : "r"(q), "b"(3ul), "c"(4ul)
                     : "memory", "cc");
        eq_trap(NONE, NONE);
        eq("ZF", z, 1);
        eq("low", q[0], 3);
        eq("high", q[1], 4);
        asm volatile(TRY("cmpxchg16b (%3); setz %b2")
                     : "+a"(a), "+d"(d), "=&r"(z)
                     : "r"(q), "b"(5ul), "c"(6ul)
                     : "memory", "cc");
        eq("ZF", z, 0);
        eq("RAX", a, 3);
        eq("RDX", d, 4);
        eq("low", q[0], 3);
        test("CMPXCHG16B: not aligned to 16: #GP(0), at CPL 3 as well");
        asm volatile(TRY("lock cmpxchg16b 8(%0)")::"r"(q), "b"(0ul), "c"(0ul), "a"(0ul), "d"(0ul) : "memory", "cc");
        eq_trap(GP, 0);
        asm volatile(USER("cmpxchg16b 8(%0)")::"r"(UPTR(q)), "b"(0ul), "c"(0ul), "a"(0ul), "d"(0ul) : "memory", "cc");
        eq_trap(GP, 0);
    }
    test("CMPXCHG8B: over a page boundary, locked");
    u64 *p = (u64 *)(at + 0xffc);
    *p = 0x0000000200000001;
    a = 1, d = 2;
    asm volatile(TRY("lock cmpxchg8b (%2)") : "+a"(a), "+d"(d) : "r"(p), "b"(7ul), "c"(8ul) : "memory", "cc");
    eq_trap(NONE, NONE);
    eq("value", *p, 0x0000000800000007);
    test("locked operations over a page boundary");
    asm volatile(TRY("lock addq %0, (%1)")::"r"(0x100000000ul), "r"(p) : "memory", "cc");
    eq("ADD", *p, 0x0000000900000007);
    a = 5;
    asm volatile(TRY("xchgq %0, (%1)") : "+r"(a) : "r"(p) : "memory");
    eq("XCHG", a, 0x0000000900000007);
    a = 2;
    asm volatile(TRY("lock xaddq %0, (%1)") : "+r"(a) : "r"(p) : "memory", "cc");
    eq("XADD", *p, 7);
    asm volatile(TRY("lock btsq $63, (%0)")::"r"(p) : "memory", "cc");
    eq("BTS", *p, BIT(63) | 7);
    test("locked operation whose second page is absent: nothing is changed");
    p = (u64 *)(HOLE - 4);
    map((ulong)HOLE, 0, 0);
    *(u32 *)(HOLE - 4) = 0x33333333;
    asm volatile(TRY("lock addq $1, (%0)")::"r"(p) : "memory", "cc");
    eq_trap(PF, PF_W);
    eq("CR2", trap.cr2, (ulong)HOLE);
    eq("memory", *(u32 *)(HOLE - 4), 0x33333333);
    test("BT of memory with a register reaches beyond the operand, before it too");
    memset(at, 0, 4096);
    at[100 + 125] = 1;
    u8 c;
    asm volatile("btq %2, (%1); setc %0" : "=r"(c) : "r"(at + 100), "r"(1000ul) : "cc", "memory");
    eq("bit 1000", c, 1);
    asm volatile("btsq %1, (%0)" ::"r"(at + 100), "r"(-8l) : "cc", "memory");
    eq("bit -8", at[99], 1);
}

/* SDM 3A 6.15 interrupt 17 */
static void alignment(void)
{
    ulong v;
    u8 *u = UPTR(exec_data);

    test("#AC: at CPL 3 with CR0.AM and AC: error code 0");
    write_cr0(read_cr0() | CR0_AM);
    user_flags = F_1 | F_AC;
    asm volatile(USER("movl 1(%1), %k0") : "=r"(v) : "r"(u) : "memory");
    eq_trap(AC, 0);
    test("#AC: 2 by 2, 8 by 8; one byte never; aligned never");
    asm volatile(USER("movw 1(%1), %w0") : "=r"(v) : "r"(u) : "memory");
    eq_trap(AC, 0);
    asm volatile(USER("movq 4(%1), %0") : "=r"(v) : "r"(u) : "memory");
    eq_trap(AC, 0);
    asm volatile(USER("movb 1(%1), %b0; movw 2(%1), %w0; movl 4(%1), %k0; movq 8(%1), %0")
                 : "=&r"(v)
                 : "r"(u)
                 : "memory");
    eq_trap(VEC_DONE, NONE);
    test("#AC: stores, read-modify-writes, PUSH");
    asm volatile(USER("movl %k0, 2(%1)")::"r"(0), "r"(u) : "memory");
    eq_trap(AC, 0);
    asm volatile(USER("addl $1, 2(%0)")::"r"(u) : "memory", "cc");
    eq_trap(AC, 0);
    asm volatile(USER("decq %%rsp; pushq %%rax")::: "memory", "cc");
    eq_trap(AC, 0);
    test("#AC: not at CPL 0, not without AM, not without AC");
    asm volatile(TRY("pushq %2; popfq; movl 1(%1), %k0; pushq $2; popfq")
                 : "=r"(v)
                 : "r"(exec_data), "r"((ulong)(F_1 | F_AC))
                 : "memory", "cc");
    eq_trap(NONE, NONE);
    user_flags = F_1;
    asm volatile(USER("movl 1(%1), %k0") : "=r"(v) : "r"(u) : "memory");
    eq_trap(VEC_DONE, NONE);
    write_cr0(read_cr0() & ~(ulong)CR0_AM);
    user_flags = F_1 | F_AC;
    asm volatile(USER("movl 1(%1), %k0") : "=r"(v) : "r"(u) : "memory");
    eq_trap(VEC_DONE, NONE);
    user_flags = F_1;
}

int main(void)
{
    mem = pages_new(2);
    map(VA, (u64)mem, 3);
    map(VA + 0x1000, (u64)mem + 0x1000, 3);
    map(VA + 0x2000, 0, 0);
    strings();
    stack();
    locked();
    alignment();
    done();
}
