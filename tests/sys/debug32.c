/*
 * Debug exceptions where 32-bit and virtual-8086 code differ from debug64: POP SS, POPF and IRET that set TF, software
 * interrupts, breakpoints by segment base, V86. SDM vol. 3A chapter 17, 6.8.3.
 */
#include "sys.h"

static ulong step_ip[64], step_flags[64];
static volatile unsigned steps;
static bool keep_going(void)
{
    if (trap.vector != DB)
        return false;
    if (steps < 64) {
        step_ip[steps] = trap.ip;
        step_flags[steps] = trap.flags;
    }
    write_dr6(0xffff0ff0);
    return ++steps < 60;
}

static u8 step_code[256] __attribute__((aligned(64)));
static int at[64];

/* As in debug64: the code runs with TF, set by POPF before and cleared by POPF behind it. */
static unsigned stepped(const u8 *code, unsigned n, bool user)
{
    static const u8 head[] = {0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d},
                    tail[] = {0x9c, 0x81, 0x24, 0x24, 0xff, 0xfe, 0xff, 0xff, 0x9d, 0xc3};
    ulong base = (ulong)step_code;

    memcpy(step_code, head, sizeof(head));
    memcpy(step_code + sizeof(head), code, n);
    memcpy(step_code + sizeof(head) + n, tail, sizeof(tail));
    steps = 0;
    trap_hook = keep_going;
    write_dr6(0xffff0ff0);
    if (user)
        asm volatile(USER("call *%0")::"r"(base) : "eax", "ecx", "edx", "memory", "cc");
    else
        asm volatile(TRY("call *%0")::"r"(base) : "eax", "ecx", "edx", "memory", "cc");
    trap_hook = NULL;
    for (unsigned i = 0; i < steps && i < 64; i++)
        at[i] = (int)(step_ip[i] - base) - (int)sizeof(head);
    return steps;
}
#define STEP(user, ...) stepped((const u8[]){__VA_ARGS__}, sizeof((const u8[]){__VA_ARGS__}), user)

static void single_step(void)
{
    for (int user = 0; user < 2; user++) {
        test("step: every instruction, at CPL %d", user * 3);
        eq("steps", STEP(user, 0x90, 0x40, 0x48), 6);
        eq("1st", at[0], 1);
        eq("2nd", at[1], 2);
        eq("3rd", at[2], 3);
        test("step: POP SS holds the #DB back over the next instruction, at CPL %d", user * 3);
        STEP(user, 0x16, 0x17, 0x90, 0x90); /* push %ss; pop %ss; nop; nop */
        eq("behind PUSH", at[0], 1);
        eq("behind the NOP", at[1], 3);
        eq("behind the next", at[2], 4);
        test("step: POP DS does not, at CPL %d", user * 3);
        STEP(user, 0x1e, 0x1f, 0x90);
        eq("behind POP DS", at[1], 2);
        eq("behind NOP", at[2], 3);
        test("step: POPF that clears TF: one more #DB, behind it, at CPL %d", user * 3);
        eq("steps", STEP(user, 0x90), 4);
    }
    test("step: INT3 is delivered with TF clear; no #DB behind it before its handler returns");
    extern char plain_iret[];
    asm("jmp 1f; plain_iret: nop; iretl; 1:");
    idt_set(BP, KCS, plain_iret, D_P | TYPE_INT, 0);
    STEP(false, 0xcc, 0x90);
    eq("first", at[0], 2);
    idt_default(BP);
    test("step: a fault's frame keeps TF, its handler runs without");
    trap_hook = NULL;
    asm volatile(TRY("pushl $0x102; popfl; ud2")::: "memory", "cc");
    eq_trap(UD, NONE);
    eq("TF saved", trap.flags & F_TF, F_TF);
    test("step: IRET to CPL 3 with TF: #DB behind the first instruction there");
    write_dr6(0xffff0ff0);
    user_flags = F_1 | F_TF;
    ulong ip;
    asm volatile("movl $9971f, %0\n\t" USER("nop; 9971: nop") : "=&r"(ip)::"memory");
    user_flags = F_1;
    eq_trap(DB, NONE);
    eq("EIP", trap.ip, ip);
    eq("BS", trap.dr6 & 0xe00f, 0x4000);
    test("step: LOOP to itself");
    eq("steps", STEP(false, 0xb9, 3, 0, 0, 0, 0xe2, 0xfe), 1 + 3 + 3);
}

static void v86(void)
{
    u8 *code = (u8 *)0x88000;

    test("step: virtual-8086 mode: #DB behind each instruction, VM in the saved flags");
    memcpy(code, (const u8[]){0x90, 0x40, 0x40, 0xf4}, 4);
    steps = 0;
    trap_hook = keep_going;
    user_flags = F_1 | F_TF;
    asm volatile(V86("ljmpw $0x8800, $0")::: "eax", "memory");
    user_flags = F_1;
    trap_hook = NULL;
    eq("last vector", trap.vector, VEC_DONE);
    eq("steps", steps, 4); /* LJMP, NOP, INC, INC; HLT faults */
    eq("behind LJMP", step_ip[0], 0);
    eq("behind NOP", step_ip[1], 1);
    must("VM", step_flags[0] & F_VM);
    test("breakpoint: in virtual-8086 mode, by linear address");
    write_dr6(0xffff0ff0);
    write_dr0(0x88001);
    write_dr7(0x402);
    asm volatile(V86("ljmpw $0x8800, $0")::: "eax", "memory");
    eq_trap(DB, NONE);
    eq("IP", trap.ip, 1);
    eq("B0", trap.dr6 & 0xe00f, 1);
    write_dr7(0x400);
    write_dr6(0xffff0ff0);
}

static void breakpoints(void)
{
    static u8 data[64] __attribute__((aligned(64)));

    test("breakpoint: data through a segment with a base: the linear address counts");
    gdt[T0 / 8] = descriptor((u32)data - 0x100, 0xfff, D_P | D_DATA | D_W | D_DB);
    write_dr0((u32)data + 4);
    write_dr7(0x400 | 2 | 1 << 16 | 3 << 18); /* G0, write, 4 bytes */
    asm volatile(TRY("movw %w0, %%fs; movb $1, %%fs:0x105; nop")::"r"(T0) : "memory");
    eq_trap(DB, NONE);
    eq("B0", trap.dr6 & 0xe00f, 1);
    asm volatile(TRY("movb $1, %%ds:0x104; nop")::: "memory");
    eq("another linear address", trap.vector, NONE);
    write_dr7(0x400);
    write_dr6(0xffff0ff0);
    test("breakpoint: MOV SS from a watched address: the #DB is held back over the next instruction");
    *(u16 *)(data + 4) = KDS;
    write_dr7(0x400 | 2 | 3 << 16 | 3 << 18);
    ulong ip;
    asm volatile("movl $9971f, %0\n\t" TRY("movw (%1), %%ss; nop; 9971: nop") : "=&r"(ip) : "r"(data + 4) : "memory");
    eq_trap(DB, NONE);
    eq("EIP", trap.ip, ip);
    write_dr7(0x400);
    write_dr6(0xffff0ff0);
    test("breakpoint: execution in a code segment with a base");
    static const u8 code[] = {0x90, 0x90, 0xcb};
    gdt[T0 / 8] = descriptor((u32)code, 15, D_P | D_CODE | D_R | D_DB);
    write_dr0((u32)code + 1);
    write_dr7(0x402);
    asm volatile(TRY("lcall $0x60, $0")::: "memory");
    eq_trap(DB, NONE);
    eq("EIP", trap.ip, 1);
    write_dr7(0x400);
    write_dr6(0xffff0ff0);
}

int main(void)
{
    single_step();
    v86();
    breakpoints();
    done();
}
