/*
 * Debug exceptions: single-step, breakpoints, DR6 and DR7, RF, interrupt shadows of MOV SS. SDM vol. 3A chapter 17.
 */
#include "sys.h"

/* Records every #DB and goes on; stops single-stepping at `steps_max`. */
static ulong step_ip[64], step_dr6[64], step_flags[64];
static volatile unsigned steps;
static bool keep_going(void)
{
    if (trap.vector != DB)
        return false;
    if (steps < ARRAY_SIZE(step_ip)) {
        step_ip[steps] = trap.ip;
        step_dr6[steps] = trap.dr6;
        step_flags[steps] = trap.flags;
    }
    if (++steps > 60)
        return false;
    write_dr6(0xffff0ff0);
    return true;
}

/* Runs code with TF set by POPF before its first byte, up to a CLI-free end: POPF of flags without TF comes last.
 * Returns the number of #DB, their addresses relative to the code's start in at[]. */
static int at[64];
static u8 step_code[256] __attribute__((aligned(64)));
static unsigned stepped(const u8 *code, unsigned n, bool user)
{
    ulong base = (ulong)step_code + (user ? USER_OFF : 0);

    /* pushfq; orl $0x100, (%rsp); popfq; CODE; pushfq; andl $~0x100, (%rsp); popfq; ret */
    static const u8 head[] = {0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d},
                    tail[] = {0x9c, 0x81, 0x24, 0x24, 0xff, 0xfe, 0xff, 0xff, 0x9d, 0xc3};
    memcpy(step_code, head, sizeof(head));
    memcpy(step_code + sizeof(head), code, n);
    memcpy(step_code + sizeof(head) + n, tail, sizeof(tail));
    steps = 0;
    trap_hook = keep_going;
    write_dr6(0xffff0ff0);
    if (user)
        asm volatile(USER("call *%0")::"r"(base) : "rax", "rcx", "rdx", "rsi", "rdi", "memory", "cc");
    else
        asm volatile(TRY("call *%0")::"r"(base) : "rax", "rcx", "rdx", "rsi", "rdi", "memory", "cc");
    trap_hook = NULL;
    unsigned m = steps < 64 ? steps : 64;
    for (unsigned i = 0; i < m; i++)
        at[i] = (int)(step_ip[i] - base) - (int)sizeof(head);
    return steps;
}
#define STEP(user, ...) stepped((const u8[]){__VA_ARGS__}, sizeof((const u8[]){__VA_ARGS__}), user)

/* The stepped code is followed by PUSHFQ (1 byte), ANDL (7), POPFQ (1): after POPF has cleared TF there is no #DB any
 * more? There is one after each instruction that began with TF set. */
static void single_step(void)
{
    for (int user = 0; user < 2; user++) {
        test("step: #DB after each instruction that begins with TF set, DR6.BS, at CPL %d (SDM 3A 17.3.1.4)", user * 3);
        unsigned n = STEP(user, 0x90, 0x90, 0x89, 0xc0);
        eq("steps", n, 6); /* nop, nop, mov, pushf, and, popf (which clears it) */
        eq("1st", at[0], 1);
        eq("2nd", at[1], 2);
        eq("3rd", at[2], 4);
        eq("4th: behind PUSHF", at[3], 5);
        eq("5th: behind AND", at[4], 12);
        eq("6th: behind POPF", at[5], 13);
        eq("DR6", step_dr6[0] & 0xe00f, 0x4000);
    }
    test("step: the instruction that sets TF is not followed by a #DB");
    eq("first", at[0], 1);
    test("step: TF is clear in the handler, set in the saved flags");
    STEP(false, 0x90);
    eq("saved TF", step_flags[0] & F_TF, F_TF);
    eq("saved TF behind POPF", trap.flags & F_TF, 0);
    test("step: jumps, taken or not");
    eq("steps", STEP(false, 0x31, 0xc0, 0x74, 0x01, 0x90, 0x75, 0x01, 0x90), 7);
    eq("behind XOR", at[0], 2);
    eq("behind JZ", at[1], 5);
    eq("behind JNZ", at[2], 7);
    test("step: REP steps once per iteration (SDM 2B REP; 17.3.1.4)");
    unsigned n = STEP(false, 0x48, 0x8d, 0x7c, 0x24, 0xc0, 0xb9, 3, 0, 0, 0, 0xf3,
                      0xaa); /* lea -64(%rsp), %rdi; mov $3, %ecx; rep stosb */
    eq("steps", n, 2 + 3 + 3);
    eq("behind MOV", at[1], 10);
    eq("1st iteration", at[2], 10);
    eq("2nd iteration", at[3], 10);
    eq("3rd iteration", at[4], 12);
    test("step: MOV SS and POP SS hold the #DB back over the next instruction (SDM 3A 6.8.3)");
    n = STEP(false, 0x8c, 0xd0, 0x8e, 0xd0, 0x90, 0x90); /* mov %ss, %eax; mov %eax, %ss; nop; nop */
    eq("steps", n, 6);
    eq("behind MOV from SS", at[0], 2);
    eq("behind the NOP", at[1], 5);
    eq("behind the next", at[2], 6);
    test("step: STI does not hold it back");
    n = STEP(false, 0xfb, 0x90, 0xfa);
    eq("behind STI", at[0], 1);
    eq("behind NOP", at[1], 2);
    test("step: INT n clears TF: no #DB in its handler, none behind INT when the handler returns to TF");
    extern char plain_iret[];
    asm("jmp 1f; plain_iret: nop; iretq; 1:");
    idt_set(0x44, KCS, plain_iret, D_P | TYPE_INT, 0);
    n = STEP(false, 0xcd, 0x44, 0x90);
    eq("behind the NOP that follows", at[0], 3);
    idt_default(0x44);
    test("step: SYSCALL with TF in SFMASK: no step inside; SYSRET that loads TF: #DB before the next user instruction "
         "ends");
    extern char sysret_at_once[];
    asm("jmp 1f; sysret_at_once: nop; sysretq; 1:");
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    wrmsr(MSR_STAR, (u64)UCS32 << 48 | (u64)KCS << 32);
    wrmsr(MSR_LSTAR, (ulong)sysret_at_once);
    wrmsr(MSR_SFMASK, F_TF | F_IF);
    n = STEP(true, 0x0f, 0x05, 0x90, 0x90);
    must("not inside", at[0] > 0);
    must("behind SYSRET or behind the NOP", at[0] == 2 || at[0] == 3);
    test("step: an instruction that faults raises no #DB; IRET with TF does behind the next instruction");
    extern char set_tf_iret[];
    asm("jmp 1f; set_tf_iret: pushq $0x10; leaq 8(%rsp), %rax; pushq %rax; pushq $0x102; pushq $8; pushq $2f; iretq; "
        "2: nop; nop; pushfq; andl $~0x100, (%rsp); popfq; ret; 1:");
    steps = 0;
    trap_hook = keep_going;
    asm volatile(TRY("call set_tf_iret")::: "rax", "memory", "cc");
    trap_hook = NULL;
    eq("steps", steps, 5);
    must("first behind the NOP",
         step_ip[0] > (ulong)set_tf_iret && *(u8 *)(step_ip[0] - 1) == 0x90 && *(u8 *)step_ip[0] == 0x90);
}

static u8 hits[64] __attribute__((aligned(64)));

/* DR7 for breakpoint n: type 0 execute, 1 write, 2 I/O, 3 read or write; len 0 1, 1 2, 3 4, 2 8 bytes */
static ulong dr7(int n, int type, int len)
{
    return 0x400 | 2ul << (2 * n) | (ulong)type << (16 + 4 * n) | (ulong)len << (18 + 4 * n);
}

static bool db(const char *what, ulong bits)
{
    eq(what, trap.vector, DB);
    eq("DR6", trap.dr6 & 0xe00f, bits);
    write_dr6(0xffff0ff0);
    return true;
}

static void data_breakpoints(void)
{
    static const int len_code[9] = {[1] = 0, [2] = 1, [4] = 3, [8] = 2};
    ulong end;

    for (int size = 1; size <= 8; size *= 2) {
        test("breakpoint: %d bytes, written: hit by every write that overlaps, and by no read (SDM 3A 17.2.5)", size);
        write_dr0((ulong)hits + 16);
        write_dr7(dr7(0, 1, len_code[size]));
        for (int off = 8; off < 32; off++) {
            asm volatile(TRY("movb $1, (%0); nop")::"r"(hits + off) : "memory");
            eq("1 byte", trap.vector == DB, off >= 16 && off < 16 + size);
            asm volatile(TRY("movl $1, (%0); nop")::"r"(hits + off) : "memory");
            eq("4 bytes", trap.vector == DB, off + 3 >= 16 && off < 16 + size);
            asm volatile(TRY("movb (%0), %%al; nop")::"r"(hits + off) : "rax", "memory");
            eq("read", trap.vector, NONE);
        }
        test("breakpoint: %d bytes, read or written", size);
        write_dr7(dr7(0, 3, len_code[size]));
        for (int off = 8; off < 32; off++) {
            asm volatile(TRY("movb (%0), %%al; nop")::"r"(hits + off) : "rax", "memory");
            eq("read", trap.vector == DB, off >= 16 && off < 16 + size);
            asm volatile(TRY("movw $1, (%0); nop")::"r"(hits + off) : "rax", "memory");
            eq("write", trap.vector == DB, off + 1 >= 16 && off < 16 + size);
        }
        write_dr7(0x400);
    }
    test("breakpoint: a data breakpoint is a trap: the store is done, RIP is behind it, RF = 0");
    write_dr1((ulong)hits + 16);
    write_dr6(0xffff0ff0);
    write_dr7(dr7(1, 1, 3));
    *(volatile u32 *)(hits + 32) = 0;
    asm volatile("leaq 9970f(%%rip), %0\n\t" TRY("movl $0x1234, (%1); 9970: nop")
                 : "=&r"(end)
                 : "r"(hits + 16)
                 : "memory");
    db("vector", 2);
    eq("RIP", trap.ip, end);
    eq("memory", *(u32 *)(hits + 16), 0x1234);
    test("breakpoint: the address's low bits are ignored by the length's alignment");
    write_dr1((ulong)hits + 18);
    asm volatile(TRY("movb $1, (%0); nop")::"r"(hits + 16) : "memory");
    db("vector", 2);
    write_dr7(0x400);
    test("breakpoint: two at once are both reported; one not enabled is not needed");
    write_dr0((ulong)hits + 16);
    write_dr2((ulong)hits + 16);
    write_dr7(dr7(0, 1, 0) | dr7(2, 1, 0));
    asm volatile(TRY("movb $1, (%0); nop")::"r"(hits + 16) : "memory");
    db("vector", 5);
    test("breakpoint: locally enabled (L) as well");
    write_dr7((dr7(0, 1, 0) & ~2ul) | 1);
    asm volatile(TRY("movb $1, (%0); nop")::"r"(hits + 16) : "memory");
    eq("vector", trap.vector, DB);
    write_dr6(0xffff0ff0);
    test("breakpoint: not enabled: nothing");
    write_dr7(dr7(0, 1, 0) & ~3ul);
    asm volatile(TRY("movb $1, (%0); nop")::"r"(hits + 16) : "memory");
    eq("vector", trap.vector, NONE);
    test("breakpoint: at CPL 3 as well; addresses are linear");
    write_dr0((ulong)hits + 16 + USER_OFF);
    write_dr7(dr7(0, 1, 0));
    asm volatile(USER("movb $1, (%0)")::"r"((ulong)hits + 16 + USER_OFF) : "memory");
    db("vector", 1);
    asm volatile(TRY("movb $1, (%0)")::"r"((ulong)hits + 16) : "memory");
    eq("by the other alias", trap.vector, NONE);
    test("breakpoint: REP STOS stops behind the iteration that hits");
    ulong left = 8, di = (ulong)hits + 12;
    write_dr0((ulong)hits + 16);
    asm volatile(TRY("rep stosb") : "+c"(left), "+D"(di) : "a"(0) : "memory");
    eq("vector", trap.vector, DB);
    write_dr6(0xffff0ff0);
    must("not before the hit", di > (ulong)hits + 16);
    eq("RCX and RDI agree", left, (ulong)hits + 20 - di);
    test("breakpoint: a read-modify-write, PUSH, CALL, XCHG hit");
    asm volatile(TRY("addb $1, (%0); nop")::"r"(hits + 16) : "memory", "cc");
    db("ADD", 1);
    asm volatile(TRY("movb $0, %%al; xchgb %%al, (%0); nop")::"r"(hits + 16) : "memory", "rax");
    db("XCHG", 1);
    asm volatile(TRY("leaq 8(%0), %%rsp; pushq $0; nop")::"r"(hits + 16) : "memory");
    db("PUSH", 1);
    write_dr7(0x400);
}

static void code_breakpoints(void)
{
    ulong where = exec_ip(false) + 1;

    test("breakpoint: execution: a fault before the instruction, RIP at it");
    write_dr6(0xffff0ff0);
    write_dr3(where);
    write_dr7(dr7(3, 0, 0));
    EXEC(false, 0x90, 0xff, 0xc0, 0x90);
    db("vector", 8);
    eq("RIP", trap.ip, where);
    test("breakpoint: IRET with RF set executes the instruction once");
    asm("jmp 1f; rf_iret: pushq $0x10; leaq 8(%rsp), %rcx; pushq %rcx; pushq $0x10002; pushq $8; pushq %rdx; iretq; "
        "1:");
    ulong eax = 1;
    static const u8 inc[] = {0x90, 0xff, 0xc0, 0x90};
    write_dr7(0x400);
    exec(inc, sizeof(inc), false);
    write_dr7(dr7(3, 0, 0));
    asm volatile(TRY("movl $5, %%eax; movq %1, %%rdx; call rf_iret")
                 : "=&a"(eax)
                 : "r"(where)
                 : "rcx", "rdx", "memory", "cc");
    eq("vector", trap.vector, NONE);
    eq("EAX", eax, 6);
    test("breakpoint: RF counts for one instruction only");
    asm volatile(TRY("movl $5, %%eax; movq %1, %%rdx; call rf_iret")
                 : "=&a"(eax)
                 : "r"(where - 1)
                 : "rcx", "rdx", "memory", "cc");
    db("vector", 8);
    test("breakpoint: in the middle of an instruction: no hit");
    write_dr3(exec_ip(false) + 2);
    EXEC(false, 0x90, 0xb8, 1, 2, 3, 4);
    eq("vector", trap.vector, NONE);
    test("breakpoint: on the first byte of a prefix");
    write_dr3(exec_ip(false) + 1);
    EXEC(false, 0x90, 0x66, 0x90);
    db("vector", 8);
    test("breakpoint: a length other than 1 for execution is not useful; reads of the address do not hit");
    asm volatile(TRY("movb (%0), %%al; nop")::"r"(exec_ip(false) + 1) : "rax", "memory");
    eq("vector", trap.vector, NONE);
    test("breakpoint: code and data at once: the code breakpoint comes before the instruction");
    write_dr0((ulong)exec_data);
    write_dr7(dr7(3, 0, 0) | dr7(0, 1, 0));
    EXEC(false, 0x90, 0xc6, 0x07, 0x01, 0x90);
    db("vector", 8);
    eq("RIP", trap.ip, exec_ip(false) + 1);
    write_dr7(0x400);
    test("breakpoint: after MOV SS, on the next instruction: held back");
    write_dr3(exec_ip(false) + 4);
    write_dr7(dr7(3, 0, 0));
    EXEC(false, 0x8c, 0xd0, 0x8e, 0xd0, 0x90, 0x90);
    eq("vector", trap.vector, NONE);
    write_dr7(0x400);
    write_dr6(0xffff0ff0);
}

static void registers(void)
{
    test("debug registers: GD: any MOV DR is #DB with DR6.BD, and GD is clear in the handler (SDM 3A 17.2.4)");
    write_dr6(0xffff0ff0);
    asm volatile(TRY("movq %0, %%dr7; movq %%dr0, %%rax")::"r"(0x2400ul) : "rax");
    db("vector", 0x2000);
    eq("GD", read_dr7() & 0x2000, 0);
    write_dr7(0x400);
    test("debug registers: MOV DR at CPL 3 is #GP(0), also with GD");
    asm volatile(USER("movq %%dr7, %%rax")::: "rax");
    eq_trap(GP, 0);
    test("debug registers: DR7 reads bit 10 as 1, bits 11, 12, 14, 15 as 0; upper halves must be 0: #GP(0)");
    write_dr7(0);
    eq("DR7", read_dr7(), 0x400);
    asm volatile(TRY("movq %0, %%dr7")::"r"(BIT(32)));
    eq_trap(GP, 0);
    asm volatile(TRY("movq %0, %%dr6")::"r"(BIT(32)));
    eq_trap(GP, 0);
    write_dr7(0x400);
    test("debug registers: DR6's fixed bits");
    write_dr6(0);
    eq("DR6", read_dr6() & 0x1ff0 & ~0x800ul, 0x7f0 & 0x1ff0);
    write_dr6(0xffff0ff0);
    test("debug registers: DR4, DR5 are DR6, DR7 with CR4.DE = 0, #UD with DE = 1");
    ulong v;
    write_dr7(0x400);
    asm volatile(TRY("movq %%db5, %0") : "=r"(v));
    eq_trap(NONE, NONE);
    eq("DR5", v, 0x400);
    write_cr4(read_cr4() | CR4_DE);
    asm volatile(TRY("movq %%db5, %0") : "=r"(v));
    eq_trap(UD, NONE);
    asm volatile(TRY("movq %0, %%db4")::"r"(0ul));
    eq_trap(UD, NONE);
    test("debug registers: DR0 to DR3 keep 64 bits");
    write_dr2(0xffff800012345678);
    eq("DR2", read_dr2(), 0xffff800012345678);
    test("breakpoint: I/O, with CR4.DE (SDM 3A 17.2.4)");
    write_dr1(0xe2);
    write_dr6(0xffff0ff0);
    write_dr7(dr7(1, 2, 0));
    asm volatile(TRY("inb $0xe2, %%al; nop")::: "rax");
    db("IN", 2);
    asm volatile(TRY("outb %%al, $0xe2; nop")::: "rax");
    db("OUT", 2);
    asm volatile(TRY("inb $0xe3, %%al; nop")::: "rax");
    eq("another port", trap.vector, NONE);
    asm volatile(TRY("inl $0xe0, %%eax; nop")::: "rax");
    db("a wider access", 2);
    write_dr7(0x400);
    write_cr4(read_cr4() & ~(ulong)CR4_DE);
    test("debug registers: DR6.BD, BS, B0 to B3 are set, not cleared, by the processor");
    write_dr6(0xffff0ff1);
    EXEC(false, 0xf1);
    eq("vector", trap.vector, DB);
    eq("B0", trap.dr6 & 1, 1);
    eq("BS", trap.dr6 & 0x4000, 0);
    write_dr6(0xffff0ff0);
}

int main(void)
{
    single_step();
    data_breakpoints();
    code_breakpoints();
    registers();
    done();
}
