/*
 * Exceptions in 64-bit code: vectors, error codes, saved RIP and flags, delivery through the IDT, double faults. SDM
 * vol. 3A chapter 6.
 */
#include "sys.h"

static void divide(void)
{
    u32 a = 7, d = 3;

    test("except: #DE by zero: fault, nothing changed, RF = 1 in the saved flags (SDM 3A 6.15, 17.3.1.1)");
    asm volatile(TRY("9985: div %2") : "+a"(a), "+d"(d) : "r"(0) : "cc");
    eq_trap(DE, NONE);
    eq("EAX", a, 7);
    eq("EDX", d, 3);
    eq("RF", trap.flags & F_RF, F_RF);
    test("except: #DE when the quotient does not fit");
    asm volatile(TRY("div %2") : "+a"(a), "+d"(d) : "r"(3) : "cc");
    eq_trap(DE, NONE);
    test("except: #DE of IDIV: most negative number by -1");
    a = 0x80000000, d = 0xffffffff;
    asm volatile(TRY("idiv %2") : "+a"(a), "+d"(d) : "r"(-1) : "cc");
    eq_trap(DE, NONE);
    test("except: #DE saves the address of the instruction");
    EXEC(false, 0x90, 0x90, 0xf7, 0xf1);
    eq_trap(DE, NONE);
    eq("RIP", trap.ip, exec_ip(false) + 2);
    eq("CS", trap.cs, KCS);
}

static void software(void)
{
    test("except: INT3 is a trap: RIP behind it, RF = 0");
    EXEC(false, 0x90, 0xcc);
    eq_trap(BP, NONE);
    eq("RIP", trap.ip, exec_ip(false) + 2);
    eq("RF", trap.flags & F_RF, 0);
    test("except: INT 3 in two bytes");
    EXEC(false, 0xcd, 3);
    eq_trap(BP, NONE);
    eq("RIP", trap.ip, exec_ip(false) + 2);
    test("except: INT3 at CPL 3 through a gate of DPL 0: #GP(3 * 8 + 2) at the instruction (SDM 3A 6.12.1.2)");
    EXEC(true, 0x90, 0xcc);
    eq_trap(GP, 3 * 8 + 2);
    eq("RIP", trap.ip, exec_ip(true) + 1);
    test("except: INT n at CPL 3 through a gate of DPL 0: #GP(n * 8 + 2)");
    EXEC(true, 0xcd, 0x44);
    eq_trap(GP, 0x44 * 8 + 2);
    eq("RIP", trap.ip, exec_ip(true));
    test("except: INT n to an exception's vector pushes no error code");
    for (unsigned v = 8; v < 18; v++) {
        EXEC(false, 0xcd, v);
        eq_trap(v, NONE);
    }
    test("except: a software interrupt from CPL 3 through a gate of DPL 3");
    EXEC(true, 0xcd, 0x80);
    eq_trap(NONE, NONE);
    eq("vectors seen", trap.count, 1);
    test("except: ICEBP (F1) is #DB, whatever the gate's DPL; RIP behind it");
    EXEC(true, 0xf1);
    eq_trap(DB, NONE);
    eq("RIP", trap.ip, exec_ip(true) + 1);
    test("except: INTO is #UD in 64-bit code");
    EXEC(false, 0xce);
    eq_trap(UD, NONE);
}

static bool seen_flags(void)
{
    ulong f;
    asm volatile("pushf; pop %0" : "=r"(f));
    trap.v86_es = f; /* a place to keep it */
    return false;
}

static void delivery(void)
{
    ulong f = F_1 | F_CF | F_AC | F_DF | F_NT | F_ID;

    trap_hook = seen_flags;
    test("except: interrupt gate: IF, TF, NT, RF clear in the handler, other flags stay (SDM 3A 6.12.1.3)");
    asm volatile(TRY("push %0; popf; ud2")::"r"(f | F_IF) : "cc");
    eq_trap(UD, NONE);
    eq("saved flags", trap.flags, f | F_IF | F_RF);
    eq("handler's IF NT RF TF", trap.v86_es & (F_IF | F_NT | F_RF | F_TF), 0);
    eq("handler's AC ID", trap.v86_es & (F_AC | F_ID), F_AC | F_ID);
    test("except: trap gate: IF stays");
    extern char trap_entry[];
    idt_set(UD, KCS, trap_entry + UD * 16, D_P | TYPE_TRAP, 0);
    asm volatile(TRY("push %0; popf; ud2")::"r"(f | F_IF) : "cc");
    eq_trap(UD, NONE);
    eq("handler's IF", trap.v86_es & F_IF, F_IF);
    eq("handler's NT", trap.v86_es & F_NT, 0);
    idt_default(UD);
    trap_hook = NULL;
    asm volatile("cld");

    test("except: RSP is aligned to 16 before the frame is pushed (SDM 3A 6.14.2)");
    for (unsigned i = 0; i < 16; i++) {
        ulong sp = 0;
        asm volatile(TRY("mov %%rsp, %0; sub $256, %0; and $-16, %0; add %1, %0; mov %0, %%rsp; ud2")
                     : "=&r"(sp)
                     : "r"((ulong)i)
                     : "memory", "cc");
        eq("vector", trap.vector, UD);
        eq("saved RSP", trap.sp, sp);
        eq("frame", trap.handler_sp, (sp & ~15ul) - 40);
        eq("SS", trap.ss, KDS);
    }
    test("except: from CPL 3: stack of the TSS, saved SS:RSP of the user");
    asm volatile(USER("mov %%rsp, %%rax; ud2")::: "rax", "memory");
    eq_trap(UD, NONE);
    eq("CS", trap.cs, UCS64);
    eq("SS", trap.ss, UDS);
    eq("RSP", trap.sp, (ulong)user_stack_end + USER_OFF);
    eq("frame", trap.handler_sp, (ulong)ring0_stack_end - 40);
    test("except: from CPL 3: the new SS is null (SDM 3A 6.14.3)");
    trap_hook = NULL;
    asm volatile(USER("int $0x80")::: "memory");
    eq_trap(VEC_DONE, NONE);
    test("except: IST: the stack is switched also at CPL 0, and aligned");
    static u8 ist_stack[1024] __attribute__((aligned(16)));
    tss.ist[2] = (ulong)ist_stack + 1016; /* not aligned */
    idt_set(UD, KCS, trap_entry + UD * 16, D_P | TYPE_INT, 3);
    asm volatile(TRY("ud2")::: "memory");
    eq_trap(UD, NONE);
    eq("frame", trap.handler_sp, (ulong)ist_stack + 1008 - 40);
    idt_default(UD);
    test("except: IST: also for CPL 3");
    idt_set(VEC_DONE, KCS, trap_entry + VEC_DONE * 16, D_P | D_DPL(3) | TYPE_INT, 3);
    asm volatile(USER("nop")::: "memory");
    eq_trap(VEC_DONE, NONE);
    eq("frame", trap.handler_sp, (ulong)ist_stack + 1008 - 40);
    idt_default(VEC_DONE);
}

/* The checks of a gate, in the order of the SDM's INT n pseudo-code (vol. 2A). */
static void gates(void)
{
    extern char trap_entry[];
    char *e = trap_entry + 0x44 * 16;
    struct table_reg shorter = idt_reg;

    test("except: gate not present: #NP(n * 8 + 2)");
    idt_set(0x44, KCS, e, TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(NP, 0x44 * 8 + 2);
    test("except: gate not present for an exception: EXT = 1");
    idt_set(UD, KCS, e, TYPE_INT, 0);
    EXEC(false, 0x0f, 0x0b);
    eq_trap(NP, UD * 8 + 3);
    idt_default(UD);
    test("except: gate of a type that is none in long mode: #GP(n * 8 + 2)");
    for (unsigned t = 0; t < 16; t++) {
        if (t == TYPE_INT || t == TYPE_TRAP)
            continue;
        idt_set(0x44, KCS, e, D_P | t, 0);
        EXEC(false, 0xcd, 0x44);
        eq_trap(GP, 0x44 * 8 + 2);
    }
    test("except: the type is checked before P, and DPL before P");
    idt_set(0x44, KCS, e, TYPE_TASK, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, 0x44 * 8 + 2);
    idt_set(0x44, KCS, e, TYPE_INT, 0);
    EXEC(true, 0xcd, 0x44);
    eq_trap(GP, 0x44 * 8 + 2);
    test("except: vector beyond the IDT's limit: #GP(n * 8 + 2)");
    shorter.limit = 0x44 * 16 + 14;
    idt_default(0x44);
    lidt(&shorter);
    EXEC(false, 0xcd, 0x44);
    ulong first = trap.error;
    shorter.limit++;
    lidt(&shorter);
    EXEC(false, 0xcd, 0x44);
    lidt(&idt_reg);
    eq_trap(0x44, NONE);
    eq("error code", first, 0x44 * 8 + 2);
    test("except: gate's selector null: #GP(0)");
    idt_set(0x44, 0, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, 0);
    test("except: gate's selector null for an exception: #GP(EXT)");
    idt_set(UD, 3, e, D_P | TYPE_INT, 0);
    EXEC(false, 0x0f, 0x0b);
    eq_trap(GP, 1);
    idt_default(UD);
    test("except: gate's selector beyond the GDT's limit: #GP(selector)");
    idt_set(0x44, 0x1000, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, 0x1000);
    test("except: gate's selector in the null LDT: #GP(selector with TI)");
    idt_set(0x44, 0xc, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, 0xc);
    test("except: gate to a data segment: #GP(selector)");
    idt_set(0x44, KDS, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, KDS);
    test("except: gate to a 32-bit code segment: #GP(selector)");
    idt_set(0x44, KCS32, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, KCS32);
    test("except: gate to code with L and D: #GP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_R | D_L | D_DB | D_G);
    idt_set(0x44, T0, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, T0);
    test("except: gate to less privileged code: #GP(selector)");
    idt_set(0x44, UCS64, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, UCS64 & ~3);
    test("except: gate to absent code: #NP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_CODE | D_R | D_L | D_G);
    idt_set(0x44, T0, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(NP, T0);
    test("except: the selector's RPL in the gate counts for nothing");
    idt_set(0x44, KCS | 3, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(0x44, NONE);
    test("except: gate to conforming code: CPL stays");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_CONF | D_R | D_L | D_G);
    idt_set(0x44, T0, (char *)exec_ip(true) + 16, D_P | D_DPL(3) | TYPE_INT, 0);
    /* the handler, at CPL 3: fetch CS into R8, end the test */
    static const u8 code[] = {0xcd, 0x44, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90,
                              0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x8c, 0xc8, 0x0f, 0x0b};
    exec(code, sizeof(code), true);
    eq_trap(UD, NONE);
    eq("CS in the handler", trap.cs, T0 | 3);
    eq("SS in the handler", trap.ss, UDS);
    test("except: gate's offset not canonical: #GP(0)");
    idt_set(0x44, KCS, (void *)0x0000800000000000, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(GP, 0);
    idt_default(0x44);
    test("except: the accessed bit of the handler's code segment is set");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_R | D_L | D_G);
    idt_set(0x44, T0, e, D_P | TYPE_INT, 0);
    EXEC(false, 0xcd, 0x44);
    eq_trap(0x44, NONE);
    eq("A", gdt[T0 / 8] >> 40 & 1, 1);
    idt_default(0x44);
}

static void stacks(void)
{
    u64 keep = tss.rsp[0];

    test("except: RSP0 not canonical: #SS(0) on the way to a handler on IST");
    extern char trap_entry[];
    static u8 ist_stack[1024] __attribute__((aligned(16)));
    tss.ist[0] = (ulong)ist_stack + sizeof(ist_stack);
    idt_set(SS, KCS, trap_entry + SS * 16, D_P | TYPE_INT, 1);
    idt_set(TS, KCS, trap_entry + TS * 16, D_P | TYPE_INT, 1);
    idt_set(DF, KCS, trap_entry + DF * 16, D_P | TYPE_INT, 1);
    idt_set(PF, KCS, trap_entry + PF * 16, D_P | TYPE_INT, 1);
    tss.rsp[0] = 0x0000800000000000;
    EXEC(true, 0xcd, 0x80);
    eq_trap(SS, 0);
    eq("CPL of the source", trap.cs & 3, 3);
    test("except: the same for an exception: EXT = 1");
    EXEC(true, 0x0f, 0x0b);
    eq_trap(SS, 1);
    tss.rsp[0] = keep;
    test("except: IST beyond the TSS's limit: #TS(TSS selector)");
    idt_set(0x44, KCS, trap_entry + 0x44 * 16, D_P | TYPE_INT, 7);
    tss_limit(36 + 7 * 8 - 2);
    EXEC(false, 0xcd, 0x44);
    eq_trap(TS, TSS_SEL);
    tss_limit(sizeof(tss) - 1);
    idt_default(0x44);
    idt_default(SS), idt_default(TS), idt_default(DF), idt_default(PF);
}

int main(void)
{
    divide();
    software();
    delivery();
    gates();
    stacks();
    done();
}
