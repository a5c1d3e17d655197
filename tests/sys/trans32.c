/*
 * Control transfers of 32-bit protected mode: interrupt gates of both sizes, stack switches and their checks, call
 * gates with parameters, far RET and IRET between privilege levels, rings 1 and 2, shutdown. SDM vol. 3A 5.8, 6.12;
 * vol. 2 INT n, CALL, RET, IRET.
 */
#include "sys.h"

#define CS1 (T0 + 0x40) /* code and data of DPL 1 and 2 */
#define DS1 (T0 + 0x48)
#define CS2 (T0 + 0x50)
#define DS2 (T0 + 0x58)
#define GATE T0
#define SPARE (T0 + 8)

extern char land[];
static volatile u32 l_esp, l_cs, l_ss, l_flags, l_stack[16];
#define LANDED 0x101
/* Where gates lead: keeps ESP and the first words of the stack, and goes on behind TRY or USER; at any CPL. */
asm("land: movl %esp, l_esp; pushl %eax; pushl %ecx; movl $12, %ecx; 1: movl 4(%esp,%ecx,4), %eax; movl %eax, "
    "l_stack-4(,%ecx,4); decl %ecx; jnz 1b; popl %ecx; popl %eax\n"
    "pushfl; popl l_flags; movw %cs, l_cs; movw %ss, l_ss; int $0x81");

static void rings(void)
{
    gdt[CS1 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(1) | D_CODE | D_R | D_DB | D_G);
    gdt[DS1 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(1) | D_DATA | D_W | D_DB | D_G);
    gdt[CS2 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(2) | D_CODE | D_R | D_DB | D_G);
    gdt[DS2 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(2) | D_DATA | D_W | D_DB | D_G);
    idt_set(0x81, KCS, trap_entry + 0x81 * 16, D_P | D_DPL(3) | TYPE_INT, 0);
    tss.esp1 = (u32)ring0_stack_end - 4096, tss.ss1 = DS1 | 1;
    tss.esp2 = (u32)ring0_stack_end - 6144, tss.ss2 = DS2 | 2;
}

static void gates(void)
{
    test("int: 32-bit gate from CPL 3: SS, ESP, EFLAGS, CS, EIP on the TSS's stack");
    idt_set(0x44, KCS, land, D_P | D_DPL(3) | TYPE_INT, 0);
    user_flags = F_1 | F_IF | F_CF;
    asm volatile(USER("int $0x44; 9971:")::: "memory");
    user_flags = F_1;
    eq("vector", trap.vector, 0x81);
    eq("CS", l_cs, KCS);
    eq("SS", l_ss, KDS);
    eq("ESP", l_esp, (u32)ring0_stack_end - 20);
    eq("saved CS", l_stack[1] & 0xffff, UCS32);
    eq("saved EFLAGS", l_stack[2], F_1 | F_IF | F_CF);
    eq("saved ESP", l_stack[3], (u32)user_stack_end);
    eq("saved SS", l_stack[4] & 0xffff, UDS);
    eq("IF inside", l_flags & F_IF, 0);
    test("int: 32-bit trap gate leaves IF");
    idt_set(0x44, KCS, land, D_P | D_DPL(3) | TYPE_TRAP, 0);
    user_flags = F_1 | F_IF;
    asm volatile(USER("int $0x44")::: "memory");
    user_flags = F_1;
    eq("IF inside", l_flags & F_IF, F_IF);
    test("int: at CPL 0: EFLAGS, CS, EIP only, on the same stack");
    u32 sp;
    asm volatile(TRY("movl %%esp, %0; int $0x44") : "=&r"(sp)::"memory");
    eq("ESP", l_esp, sp - 12);
    eq("saved CS", l_stack[1] & 0xffff, KCS);
    test("int: 16-bit gate: words on the stack, offset of 16 bits");
    if ((u32)land <= 0xffff) {
        for (int trap_gate = 0; trap_gate < 2; trap_gate++) {
            idt_set(0x44, KCS, land, D_P | D_DPL(3) | (trap_gate ? TYPE_TRAP16 : TYPE_INT16), 0);
            user_flags = F_1 | F_IF;
            asm volatile(USER("int $0x44")::: "memory");
            user_flags = F_1;
            eq("vector", trap.vector, 0x81);
            eq("ESP", l_esp, (u32)ring0_stack_end - 10);
            eq("saved CS", l_stack[0] >> 16, UCS32);
            eq("saved FLAGS", l_stack[1] & 0xffff, F_1 | F_IF);
            eq("saved SP", l_stack[1] >> 16, (u32)user_stack_end & 0xffff);
            eq("saved SS", l_stack[2] & 0xffff, UDS);
            eq("IF inside", l_flags & F_IF, trap_gate ? F_IF : 0);
        }
    } else {
        skip("the program is too large");
    }
    test("int: an error code goes on top, of the gate's size");
    idt_set(GP, KCS, land, D_P | TYPE_INT, 0);
    asm volatile(USER("movw %w0, %%ds")::"r"(KDS) : "memory");
    idt_default(GP);
    eq("vector", trap.vector, 0x81);
    eq("ESP", l_esp, (u32)ring0_stack_end - 24);
    eq("error code", l_stack[0], KDS);
    test("int: to conforming code: CPL and stack stay");
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_CONF | D_R | D_DB | D_G);
    idt_set(0x44, SPARE, land, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER("int $0x44")::: "memory");
    eq("vector", trap.vector, 0x81);
    eq("CS", l_cs, SPARE | 3);
    eq("ESP", l_esp, (u32)user_stack_end - 12);
    test("int: to ring 1 from ring 3");
    idt_set(0x44, CS1, land, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER("int $0x44")::: "memory");
    eq("vector", trap.vector, 0x81);
    eq("CS", l_cs, CS1 | 1);
    eq("SS", l_ss, DS1 | 1);
    eq("ESP", l_esp, tss.esp1 - 20);
    test("int: to ring 1 from ring 0: #GP(selector)");
    asm volatile(TRY("int $0x44")::: "memory");
    eq_trap(GP, CS1);
    test("int: gate not present #NP, wrong type #GP, null selector #GP(0), data #GP, absent code #NP");
    idt_set(0x44, KCS, land, D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER("int $0x44")::: "memory");
    eq_trap(NP, 0x44 * 8 + 2);
    for (u32 t = 0; t < 16; t++) {
        if (t == TYPE_INT || t == TYPE_TRAP || t == TYPE_INT16 || t == TYPE_TRAP16 || t == TYPE_TASK)
            continue;
        idt_set(0x44, KCS, land, D_P | D_DPL(3) | t, 0);
        asm volatile(USER("int $0x44")::: "memory");
        eq_trap(GP, 0x44 * 8 + 2);
    }
    idt_set(0x44, 0, land, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER("int $0x44")::: "memory");
    eq_trap(GP, 0);
    idt_set(0x44, KDS, land, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER("int $0x44")::: "memory");
    eq_trap(GP, KDS);
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_CODE | D_R | D_DB | D_G);
    idt_set(0x44, SPARE, land, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER("int $0x44")::: "memory");
    eq_trap(NP, SPARE);
    test("int: gate's offset beyond the code segment's limit: #GP(0)");
    gdt[SPARE / 8] = descriptor(0, 0x7fff, D_P | D_CODE | D_R | D_DB);
    idt_set(0x44, SPARE, land, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER("int $0x44")::: "memory");
    eq_trap(GP, 0);
    idt_default(0x44);
}

/* The stack that the TSS names for ring 1 is bad: found at the INT, so the fault is delivered to ring 0 by the good
 * stack (SDM 3A 6.12.1, INT n). */
static void bad_stacks(void)
{
    u32 ss1 = tss.ss1, esp1 = tss.esp1;

    idt_set(0x44, CS1, land, D_P | D_DPL(3) | TYPE_INT, 0);
#define BAD(name, sel, v, e)                                                                                           \
    do {                                                                                                               \
        test("stack switch: " name);                                                                                   \
        tss.ss1 = (sel);                                                                                               \
        asm volatile(USER("int $0x44")::: "memory");                                                                   \
        eq_trap(v, e);                                                                                                 \
        tss.ss1 = ss1;                                                                                                 \
    } while (0)
    BAD("SS null: #TS(SS)", 0, TS, 0);
    BAD("SS beyond the limit: #TS(SS)", 0x1ff9, TS, 0x1ff8);
    BAD("SS's RPL is not the new CPL: #TS(SS)", DS1, TS, DS1);
    BAD("SS's DPL is not the new CPL: #TS(SS)", KDS | 1, TS, KDS);
    BAD("SS that is code: #TS(SS)", CS1 | 1, TS, CS1);
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_P | D_DPL(1) | D_DATA | D_DB | D_G);
    BAD("SS read-only: #TS(SS)", SPARE | 1, TS, SPARE);
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_DPL(1) | D_DATA | D_W | D_DB | D_G);
    BAD("SS not present: #SS(SS)", SPARE | 1, SS, SPARE);
    gdt[SPARE / 8] = descriptor(0, 0x0fff, D_P | D_DPL(1) | D_DATA | D_W | D_DB);
    tss.esp1 = 0x2000;
    BAD("no room on the new stack: #SS(SS)", SPARE | 1, SS, SPARE);
    tss.esp1 = esp1;
    test("stack switch: the slot is beyond the TSS's limit: #TS(TSS)");
    tss_limit(0x10); /* ESP0, SS0 inside, SS1 not whole */
    asm volatile(USER("int $0x44")::: "memory");
    eq_trap(TS, TSS_SEL);
    tss_limit(sizeof(tss) - 1);
    idt_default(0x44);
}

static void call_gates(void)
{
    static struct __attribute__((packed)) {
        u32 off;
        u16 sel;
    } p = {0, GATE | 3};

    for (unsigned n = 0; n < 4; n++) {
        test("call gate: from ring 3 to ring 0 with %d parameters (SDM 3A 5.8.5)", n * 2);
        gdt[GATE / 8] = gate(KCS, (u32)land, D_P | D_DPL(3) | TYPE_CALL, n * 2);
        asm volatile(USER("pushl $0x66; pushl $0x55; pushl $0x44; pushl $0x33; pushl $0x22; pushl $0x11; lcall *(%0); "
                          "9971:")::"r"(&p)
                     : "memory");
        eq("vector", trap.vector, 0x81);
        eq("CS", l_cs, KCS);
        eq("ESP", l_esp, (u32)ring0_stack_end - 16 - 8 * n);
        eq("saved CS", l_stack[1] & 0xffff, UCS32);
        for (unsigned i = 0; i < n * 2; i++)
            eq("parameter", l_stack[2 + i], 0x11 * (i + 1));
        eq("saved ESP", l_stack[2 + n * 2], (u32)user_stack_end - 24);
        eq("saved SS", l_stack[3 + n * 2] & 0xffff, UDS);
    }
    test("call gate: RET n of the callee releases both stacks");
    extern char gate_ret[];
    asm("jmp 1f; gate_ret: movl 8(%esp), %eax; lretl $8; 1:");
    gdt[GATE / 8] = gate(KCS, (u32)gate_ret, D_P | D_DPL(3) | TYPE_CALL, 2);
    u32 v, sp;
    asm volatile(USER("pushl $0x77; pushl $0x88; lcall *(%2); movl %%esp, %1")
                 : "=&a"(v), "=&c"(sp)
                 : "r"(&p)
                 : "memory");
    eq_trap(VEC_DONE, NONE);
    eq("first parameter", v, 0x88);
    eq("ESP", sp, (u32)user_stack_end);
    test("call gate: 16-bit gate: words copied");
    if ((u32)land <= 0xffff) {
        gdt[GATE / 8] = gate(KCS, (u32)land, D_P | D_DPL(3) | TYPE_CALL16, 2);
        asm volatile(USER("pushw $0x2222; pushw $0x1111; lcall *(%0)")::"r"(&p) : "memory");
        eq("vector", trap.vector, 0x81);
        eq("ESP", l_esp, (u32)ring0_stack_end - 12);
        eq("saved CS", l_stack[0] >> 16, UCS32);
        eq("parameters", l_stack[1], 0x22221111);
        eq("saved SS", l_stack[2] >> 16, UDS);
    } else {
        skip("the program is too large");
    }
    test("call gate: same privilege: no parameters are copied, the stack stays");
    gdt[GATE / 8] = gate(KCS, (u32)land, D_P | TYPE_CALL, 4);
    p.sel = GATE;
    asm volatile(TRY("movl %%esp, %0; lcall *(%1)") : "=&c"(sp) : "r"(&p) : "memory");
    eq("vector", trap.vector, 0x81);
    eq("ESP", l_esp, sp - 8);
    test("call gate: JMP at the same privilege pushes nothing");
    asm volatile(TRY("movl %%esp, %0; ljmp *(%1)") : "=&c"(sp) : "r"(&p) : "memory");
    eq("ESP", l_esp, sp);
    test("call gate: DPL below CPL or RPL: #GP(gate); absent #NP(gate); null target #GP(0); target not code "
         "#GP(selector)");
    p.sel = GATE | 3;
    asm volatile(USER("lcall *(%0)")::"r"(&p) : "memory");
    eq_trap(GP, GATE);
    gdt[GATE / 8] = gate(KCS, (u32)land, D_DPL(3) | TYPE_CALL, 0);
    asm volatile(USER("lcall *(%0)")::"r"(&p) : "memory");
    eq_trap(NP, GATE);
    gdt[GATE / 8] = gate(0, (u32)land, D_P | D_DPL(3) | TYPE_CALL, 0);
    asm volatile(USER("lcall *(%0)")::"r"(&p) : "memory");
    eq_trap(GP, 0);
    gdt[GATE / 8] = gate(KDS, (u32)land, D_P | D_DPL(3) | TYPE_CALL, 0);
    asm volatile(USER("lcall *(%0)")::"r"(&p) : "memory");
    eq_trap(GP, KDS);
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_CODE | D_R | D_DB | D_G);
    gdt[GATE / 8] = gate(SPARE, (u32)land, D_P | D_DPL(3) | TYPE_CALL, 0);
    asm volatile(USER("lcall *(%0)")::"r"(&p) : "memory");
    eq_trap(NP, SPARE);
    test("call gate: JMP to more privilege: #GP(selector)");
    gdt[GATE / 8] = gate(KCS, (u32)land, D_P | D_DPL(3) | TYPE_CALL, 0);
    asm volatile(USER("ljmp *(%0)")::"r"(&p) : "memory");
    eq_trap(GP, KCS);
    test("call gate: to less privilege: #GP(selector)");
    gdt[GATE / 8] = gate(UCS32, (u32)land, D_P | D_DPL(3) | TYPE_CALL, 0);
    p.sel = GATE;
    asm volatile(TRY("lcall *(%0)")::"r"(&p) : "memory");
    eq_trap(GP, UCS32 & ~3);
    test("call gate: offset beyond the limit: #GP(0)");
    gdt[SPARE / 8] = descriptor(0, 0x7fff, D_P | D_CODE | D_R | D_DB);
    gdt[GATE / 8] = gate(SPARE, (u32)land, D_P | D_DPL(3) | TYPE_CALL, 0);
    p.sel = GATE | 3;
    asm volatile(USER("lcall *(%0)")::"r"(&p) : "memory");
    eq_trap(GP, 0);
    test("call gate: the new stack is bad: #TS(SS)");
    u32 ss1 = tss.ss1;
    gdt[GATE / 8] = gate(CS1, (u32)land, D_P | D_DPL(3) | TYPE_CALL, 0);
    tss.ss1 = KDS | 1;
    asm volatile(USER("lcall *(%0)")::"r"(&p) : "memory");
    eq_trap(TS, KDS);
    tss.ss1 = ss1;
    asm volatile(USER("lcall *(%0)")::"r"(&p) : "memory");
    eq("ring 1", l_cs, CS1 | 1);
}

static void returns(void)
{
    test("IRET: from ring 0 to rings 1, 2, 3");
    static const u16 cs[] = {CS1 | 1, CS2 | 2, UCS32}, ss[] = {DS1 | 1, DS2 | 2, UDS};
    for (int i = 0; i < 3; i++) {
        asm volatile(TRY("pushl %1; pushl $user_stack_end; pushl $2; pushl %0; pushl $land; iretl")::"r"((u32)cs[i]),
                     "r"((u32)ss[i])
                     : "memory");
        eq("vector", trap.vector, 0x81);
        eq("CS", l_cs, cs[i]);
        eq("SS", l_ss, ss[i]);
    }
    test("IRET: ring 3 cannot return to ring 2: #GP(selector)");
    asm volatile(USER("pushl %1; pushl $user_stack_end; pushl $2; pushl %0; pushl $land; iretl")::"r"(CS2 | 2),
                 "r"(DS2 | 2)
                 : "memory");
    eq_trap(GP, CS2);
    test("IRET: EIP beyond the limit: #GP(0); CS null #GP(0)");
    gdt[SPARE / 8] = descriptor(0, 0x7fff, D_P | D_DPL(3) | D_CODE | D_R | D_DB);
    asm volatile(TRY("pushl $0x23; pushl $user_stack_end; pushl $2; pushl %0; pushl $land; iretl")::"r"(SPARE | 3)
                 : "memory");
    eq_trap(GP, 0);
    asm volatile(TRY("pushl $0x23; pushl $user_stack_end; pushl $2; pushl $3; pushl $land; iretl")::: "memory");
    eq_trap(GP, 0);
    test("IRET: SS null #GP(0), RPL or DPL not CPL #GP(SS), absent #SS(SS)");
    asm volatile(TRY("pushl $0; pushl $user_stack_end; pushl $2; pushl $0x1b; pushl $land; iretl")::: "memory");
    eq_trap(GP, 0);
    asm volatile(TRY("pushl $0x20; pushl $user_stack_end; pushl $2; pushl $0x1b; pushl $land; iretl")::: "memory");
    eq_trap(GP, UDS & ~3);
    asm volatile(TRY("pushl $0x13; pushl $user_stack_end; pushl $2; pushl $0x1b; pushl $land; iretl")::: "memory");
    eq_trap(GP, KDS);
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_DPL(3) | D_DATA | D_W | D_DB | D_G);
    asm volatile(TRY("pushl %0; pushl $user_stack_end; pushl $2; pushl $0x1b; pushl $land; iretl")::"r"(SPARE | 3)
                 : "memory");
    eq_trap(SS, SPARE);
    test("IRET: to a 16-bit stack segment: SP is loaded, the frame is popped by the old stack's size");
    gdt[SPARE / 8] = descriptor((u32)user_stack_end - 0x10000, 0xffff, D_P | D_DPL(3) | D_DATA | D_W);
    asm volatile(TRY("pushl %0; pushl $0x1000; pushl $2; pushl $0x1b; pushl $9970f; iretl; 9970: pushl %%eax; movl "
                     "%%esp, %%ecx; int $0x80")::"r"(SPARE | 3)
                 : "ecx", "memory");
    eq_trap(VEC_DONE, NONE);
    eq("SP", trap.sp & 0xffff, 0xffc);
    test("IRETW: 16-bit frame");
    asm volatile(TRY("pushw $0x0203; pushw $8; movl $9970f, %%eax; pushw %%ax; iretw; 9970: pushfl; popl %%eax")::
                     : "eax", "memory", "cc");
    eq_trap(NONE, NONE);
    test("far RET: to ring 3 with an immediate; data segments that ring 3 may not use become null");
    asm volatile("movw %w0, %%fs; movw %w0, %%gs" ::"r"(KDS));
    asm volatile(TRY("pushl $0x23; pushl $user_stack_end - 32; pushl $0; pushl $0; pushl $0x1b; pushl $land; lretl "
                     "$8")::
                     : "memory");
    eq("vector", trap.vector, 0x81);
    eq("CS", l_cs, UCS32);
    eq("ESP", l_esp, (u32)user_stack_end - 32 + 8);
    eq("FS", trap.fs, 0);
    eq("GS", trap.gs, 0);
    eq("DS stays", trap.ds, UDS);
    test("far RET: checks: RPL below CPL, null, data, absent");
    asm volatile(USER("pushl $8; pushl $land; lretl")::: "memory");
    eq_trap(GP, 8);
    asm volatile(TRY("pushl $0; pushl $land; lretl")::: "memory");
    eq_trap(GP, 0);
    asm volatile(TRY("pushl $0x10; pushl $land; lretl")::: "memory");
    eq_trap(GP, KDS);
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_CODE | D_R | D_DB | D_G);
    asm volatile(TRY("pushl %0; pushl $land; lretl")::"r"(SPARE) : "memory");
    eq_trap(NP, SPARE);
    test("conforming code: a far JMP from ring 3 to DPL 0 keeps CPL 3");
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_CONF | D_R | D_DB | D_G);
    asm volatile(USER("ljmp %0, $land")::"i"(SPARE) : "memory");
    eq("vector", trap.vector, 0x81);
    eq("CS", l_cs, SPARE | 3);
    test("SYSENTER: CS null #GP(0); enters at CPL 0 with flat segments, IF clear (SDM 2B)");
    wrmsr(MSR_SYSENTER_CS, 0);
    asm volatile(USER("sysenter")::: "ecx", "edx", "memory");
    eq_trap(GP, 0);
    wrmsr(MSR_SYSENTER_CS, KCS);
    wrmsr(MSR_SYSENTER_ESP, (u32)ring0_stack_end - 32);
    wrmsr(MSR_SYSENTER_EIP, (u32)land);
    user_flags = F_1 | F_IF;
    asm volatile(USER("sysenter")::: "ecx", "edx", "memory");
    user_flags = F_1;
    eq("vector", trap.vector, 0x81);
    eq("CS", l_cs, KCS);
    eq("SS", l_ss, KCS + 8);
    eq("ESP", l_esp, (u32)ring0_stack_end - 32);
    eq("IF", l_flags & F_IF, 0);
    test("SYSEXIT: to CPL 3, CS + 16 and + 24; #GP(0) at CPL 3");
    asm volatile(TRY("movl $land, %%edx; movl $user_stack_end - 64, %%ecx; sysexit")::: "ecx", "edx", "memory");
    eq("vector", trap.vector, 0x81);
    eq("CS", l_cs, UCS32);
    eq("SS", l_ss, UDS);
    eq("ESP", l_esp, (u32)user_stack_end - 64);
    asm volatile(USER("sysexit")::: "memory");
    eq_trap(GP, 0);
}

/* 32-bit code only: SDM 3A 6.15, vol. 2. */
static void exceptions(void)
{
    test("#BR: BOUND");
    static int pair[2] = {-5, 5};
    asm volatile(TRY("boundl %0, (%1)")::"r"(5), "r"(pair));
    eq_trap(NONE, NONE);
    asm volatile(TRY("boundl %0, (%1)")::"r"(-6), "r"(pair));
    eq_trap(BR, NONE);
    asm volatile(TRY("boundl %0, (%1)")::"r"(6), "r"(pair));
    eq_trap(BR, NONE);
    test("#OF: INTO is a trap, and asks for the gate's DPL");
    asm volatile(TRY("movb $0x7f, %%al; incb %%al; into; 9971:")::: "eax", "cc");
    eq_trap(OF, NONE);
    asm volatile(TRY("xorl %%eax, %%eax; into")::: "eax", "cc");
    eq_trap(NONE, NONE);
    asm volatile(USER("movb $0x7f, %%al; incb %%al; into")::: "eax", "cc");
    eq_trap(GP, OF * 8 + 2);
    test("#DE: AAM with 0, DIV");
    EXEC(false, 0xd4, 0);
    eq_trap(DE, NONE);
    test("#UD: SYSCALL without EFER.SCE, MOV CR8, RDFSBASE, SWAPGS in 32-bit code");
    EXEC(false, 0x0f, 0x05);
    eq_trap(UD, NONE);
    EXEC(false, 0x0f, 0x01, 0xf8);
    eq_trap(UD, NONE);
    EXEC(false, 0xf3, 0x0f, 0xae, 0xc0);
    eq_trap(UD, NONE);
    test("INT n to an exception's vector pushes no error code");
    idt_set(GP, KCS, land, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER("int $13")::: "memory");
    idt_default(GP);
    eq("ESP", l_esp, (u32)ring0_stack_end - 20);
}

int main(void)
{
    static struct table_reg none;

    rings();
    gates();
    bad_stacks();
    call_gates();
    returns();
    exceptions();
    test("int: 16-bit gates: the offset's upper half does not count");
    idt_set(0x44, KCS, (void *)((u32)land | 0x12340000), D_P | D_DPL(3) | TYPE_INT16, 0);
    asm volatile(USER("int $0x44")::: "memory");
    eq("vector", trap.vector, 0x81);
    idt_default(0x44);
    switch (run_case()) {
    case 0:
        expect_shutdown("shutdown: 32-bit: an exception with an IDT of limit 0");
        lidt(&none);
        asm volatile("ud2");
        break;
    case 1:
        expect_shutdown("shutdown: 32-bit: ring 0's stack is absent for #SS too");
        tss.ss0 = 0;
        asm volatile(USER("ud2")::: "memory");
        break;
    }
    done();
}
