/*
 * Virtual-8086 mode: addresses, sensitive instructions by IOPL, interrupts out of it, the VME extensions; and PVI. SDM
 * vol. 3A chapter 20.
 */
#include "sys.h"

#define IOPL(n) ((ulong)(n) << 12)

static void addresses(void)
{
    u32 v, w;

    test("v86: linear address = selector * 16 + offset");
    *(u32 *)(V86_MEM + 0x1234) = 0xcafe1234;
    asm volatile(V86("movw $0x9100, %%ax; movw %%ax, %%fs; movl %%fs:0x234, %%ecx; movw %%fs, %%dx")
                 : "=c"(v), "=d"(w)
                 : "1"(0)
                 : "eax");
    eq_trap(VEC_DONE, NONE);
    eq("value", v, 0xcafe1234);
    eq("selector", w, 0x9100);
    test("v86: segments reach 20 bits and 64 KiB beyond: no wrap at 1 MiB");
    *(u32 *)0x10ffe0 = 0x31415926;
    asm volatile(V86("movw $0xffff, %%ax; movw %%ax, %%fs; movl %%fs:0xfff0, %%ecx") : "=c"(v)::"eax");
    eq_trap(VEC_DONE, NONE);
    eq("value", v, 0x31415926);
    test("v86: the limit is 64 KiB: #GP(0), by SS #SS(0)");
    asm volatile(V86("movw 0xffff, %%ax")::: "eax");
    eq_trap(GP, 0);
    asm volatile(V86("movl $0x10000, %%ebx; addr32 movb (%%ebx), %%al")::: "eax", "ebx");
    eq_trap(GP, 0);
    asm volatile(
        V86("pushl %%ebp; movw $0xfffd, %%bp; movl (%%bp), %%eax") "movl %0, %%ebp" ::"r"(__builtin_frame_address(0))
        : "eax");
    eq_trap(SS, 0);
    asm volatile(V86("movw $1, %%sp; pushw %%ax")::: "memory");
    eq_trap(SS, 0);
    eq("SP", trap.sp & 0xffff, 1);
    test("v86: running over FFFFh: #GP(0)");
    *(u8 *)(V86_MEM + 0xffff) = 0x90;
    asm volatile(V86("ljmpw $0x9000, $0xffff")::: "memory");
    eq_trap(GP, 0);
    eq("CS", trap.cs, 0x9000);
    test("v86: registers have 32 bits with prefixes; stack is 16 bits");
    asm volatile(V86("movl $0x12345678, %%eax; movl %%esp, %%ecx; pushl %%eax; popl %%edx") : "=d"(v), "=c"(w)::"eax");
    eq("value", v, 0x12345678);
    eq("ESP", w, 0xf000);
    test("v86: a far jump and a segment load touch no descriptor table; any selector is good");
    asm volatile(V86("movw $0xffff, %%ax; movw %%ax, %%gs; movw %%gs, %%cx") : "=c"(v) : "0"(0) : "eax");
    eq_trap(VEC_DONE, NONE);
    eq("GS", v, 0xffff);
    eq("saved GS", trap.v86_gs, 0xffff);
}

static void frame(void)
{
    test("v86: an exception pushes GS, FS, DS, ES, SS, ESP, EFLAGS, CS, EIP on the stack of CPL 0, and clears the data "
         "segments (SDM 3A 20.3.1)");
    user_flags = F_1 | F_IF | F_CF;
    asm volatile(V86("movw $0x1111, %%ax; movw %%ax, %%es; movw $0x2222, %%ax; movw %%ax, %%fs; movw $0x3333, %%ax; "
                     "movw %%ax, %%gs; movw $0x4444, %%ax; movw %%ax, %%ds; ud2")::
                     : "eax");
    user_flags = F_1;
    eq_trap(UD, NONE);
    eq("ES", trap.v86_es, 0x1111);
    eq("FS", trap.v86_fs, 0x2222);
    eq("GS", trap.v86_gs, 0x3333);
    eq("DS", trap.v86_ds, 0x4444);
    eq("SS", trap.ss, V86_SEG);
    eq("ESP", trap.sp, 0xf000);
    eq("CS", trap.cs, 0x800);
    eq("EFLAGS", trap.flags & ~(ulong)F_RF, F_1 | F_IF | F_CF | F_VM);
    eq("handler's DS ES FS GS", trap.ds | trap.es | trap.fs | trap.gs, 0);
    eq("frame", trap.handler_sp, (u32)ring0_stack_end - 36);
    test("v86: an interrupt to a handler that is not at CPL 0: #GP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_CONF | D_R | D_DB | D_G);
    idt_set(0x44, T0, (void *)1, D_P | D_DPL(3) | TYPE_INT, 0);
    user_flags = F_1 | IOPL(3);
    asm volatile(V86("int $0x44")::: "memory");
    eq_trap(GP, T0);
    user_flags = F_1;
    idt_default(0x44);
    test("v86: IRET at CPL 0 with VM set enters; one at CPL 3 does not");
    asm volatile(USER("movl %%esp, %%eax; pushl $0x23; pushl %%eax; pushl $0x20002; pushl $0x1b; pushl $9970f; iretl; "
                      "9970:")::
                     : "eax", "memory");
    eq_trap(VEC_DONE, NONE);
    eq("VM", trap.flags & F_VM, 0);
}

static void sensitive(void)
{
    static const struct {
        const char *name;
        u8 len, code[4];
    } op[] = {
        {"CLI", 1, {0xfa}},         {"STI", 1, {0xfb}},          {"PUSHF", 1, {0x9c}},
        {"POPF", 1, {0x9d}},        {"PUSHFD", 2, {0x66, 0x9c}}, {"POPFD", 2, {0x66, 0x9d}},
        {"INT n", 2, {0xcd, 0x44}}, {"IRET", 1, {0xcf}},         {"IRETD", 2, {0x66, 0xcf}},
    };
    u8 *code = (u8 *)0x88000; /* V86 code at 8800h:0 */
    for (unsigned i = 0; i < ARRAY_SIZE(op); i++) {
        test("v86: %s with IOPL 0, 1, 2 and no VME: #GP(0)", op[i].name);
        for (int iopl = 0; iopl < 3; iopl++) {
            memcpy(code, op[i].code, op[i].len);
            code[op[i].len] = 0xf4;
            user_flags = F_1 | IOPL(iopl);
            asm volatile(V86("ljmpw $0x8800, $0")::: "memory");
            eq_trap(GP, 0);
            eq("IP", trap.ip, 0);
        }
    }
    user_flags = F_1 | IOPL(3);
    ulong v, w;
    test("v86: CLI, STI with IOPL 3 change IF");
    asm volatile(V86("sti; cli")::: "memory");
    eq_trap(VEC_DONE, NONE);
    eq("IF", trap.flags & F_IF, 0);
    asm volatile(V86("sti")::: "memory");
    eq("IF", trap.flags & F_IF, F_IF);
    test("v86: PUSHFD shows VM and RF as 0, POPF changes neither VM nor IOPL");
    asm volatile(V86("pushfl; popl %%ecx; pushl $0x200cd7; popfl; pushfl; popl %%edx")
                 : "=c"(v), "=d"(w)::"memory", "cc");
    eq_trap(VEC_DONE, NONE);
    eq("flags", v & ~(ulong)(F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF), F_1 | IOPL(3));
    eq("after POPF", w, 0x200cd7 | F_1 | IOPL(3));
    test("v86: IRET with IOPL 3 is as in real mode; IOPL and VM stay");
    asm volatile(V86("pushw $0x0203; pushw $0x800; pushw $9970f - 0x8000; iretw; 9970:")::: "memory");
    eq_trap(VEC_DONE, NONE);
    eq("flags", trap.flags & ~(ulong)F_RF, F_1 | F_CF | F_IF | IOPL(3) | F_VM);
    test("v86: INT n with IOPL 3 goes through the IDT; a gate of DPL below 3 is #GP(n * 8 + 2)");
    idt_set(0x44, KCS, (trap_entry + 0x44 * 16), D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(V86("9970: int $0x44")::: "memory");
    eq_trap(0x44, NONE);
    idt_default(0x44);
    asm volatile(V86("int $0x44")::: "memory");
    eq_trap(GP, 0x44 * 8 + 2);
    user_flags = F_1;
    test("v86: INT3 and INTO ask for no IOPL, but for the gate's DPL");
    asm volatile(V86("int3")::: "memory");
    eq_trap(GP, BP * 8 + 2);
    idt_set(BP, KCS, trap_entry + BP * 16, D_P | D_DPL(3) | TYPE_INT, 0);
    idt_set(OF, KCS, trap_entry + OF * 16, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(V86("int3")::: "memory");
    eq_trap(BP, NONE);
    asm volatile(V86("movb $0x7f, %%al; addb $1, %%al; into")::: "eax", "cc");
    eq_trap(OF, NONE);
    idt_default(BP);
    idt_default(OF);
}

static u32 v86_flags, v86_cs;

static void privileged(void)
{
    static const struct {
        const char *name;
        u8 len, code[6];
        u8 vector;
    } op[] = {
        {"HLT by a prefix", 2, {0x66, 0xf4}, GP},
        {"LGDT", 5, {0x0f, 0x01, 0x16, 0, 0}, GP},
        {"LIDT", 5, {0x0f, 0x01, 0x1e, 0, 0}, GP},
        {"LMSW", 3, {0x0f, 0x01, 0xf0}, GP},
        {"CLTS", 2, {0x0f, 0x06}, GP},
        {"MOV from CR0", 3, {0x0f, 0x20, 0xc0}, GP},
        {"MOV to CR0", 3, {0x0f, 0x22, 0xc0}, GP},
        {"MOV from DR7", 3, {0x0f, 0x21, 0xf8}, GP},
        {"MOV to DR7", 3, {0x0f, 0x23, 0xf8}, GP},
        {"INVLPG", 5, {0x0f, 0x01, 0x3e, 0, 0}, GP},
        {"INVD", 2, {0x0f, 0x08}, GP},
        {"WBINVD", 2, {0x0f, 0x09}, GP},
        {"RDMSR", 2, {0x0f, 0x32}, GP},
        {"WRMSR", 2, {0x0f, 0x30}, GP},
        {"LLDT", 3, {0x0f, 0x00, 0xd0}, UD},
        {"LTR", 3, {0x0f, 0x00, 0xd8}, UD},
        {"SLDT", 3, {0x0f, 0x00, 0xc0}, UD},
        {"STR", 3, {0x0f, 0x00, 0xc8}, UD},
        {"VERR", 3, {0x0f, 0x00, 0xe0}, UD},
        {"VERW", 3, {0x0f, 0x00, 0xe8}, UD},
        {"LAR", 3, {0x0f, 0x02, 0xc0}, UD},
        {"LSL", 3, {0x0f, 0x03, 0xc0}, UD},
        {"ARPL", 2, {0x63, 0xc0}, UD},
    };
    u8 *code = (u8 *)0x88000;
    for (unsigned i = 0; i < ARRAY_SIZE(op); i++) {
        test("v86: %s is #%s", op[i].name, op[i].vector == GP ? "GP(0)" : "UD");
        memcpy(code, op[i].code, op[i].len);
        code[op[i].len] = 0xf4;
        asm volatile(V86("ljmpw $0x8800, $0")::: "eax", "memory");
        eq_trap(op[i].vector, op[i].vector == GP ? 0 : NONE);
        eq("IP", trap.ip, 0);
    }
    test("v86: SGDT, SIDT, SMSW are no faults; with UMIP #GP(0)");
    asm volatile(V86("sgdt 0x100; sidt 0x110; smsw %%ax")::: "eax", "memory");
    eq_trap(VEC_DONE, NONE);
    eq("GDT's limit", *(u16 *)(V86_MEM + 0x100), gdt_reg.limit);
    if (cpuid(7, 0).c & BIT(2)) {
        write_cr4(read_cr4() | CR4_UMIP);
        asm volatile(V86("sgdt 0x100")::: "memory");
        eq_trap(GP, 0);
        asm volatile(V86("smsw %%ax")::: "eax", "memory");
        eq_trap(GP, 0);
        write_cr4(read_cr4() & ~(ulong)CR4_UMIP);
    }
    test("v86: VEX is #UD");
    memcpy(code, (const u8[]){0xc5, 0xf8, 0x77, 0xf4}, 4);
    asm volatile(V86("ljmpw $0x8800, $0")::: "memory");
    eq_trap(UD, NONE);
    test("v86: SYSENTER with SYSENTER_CS null is #GP(0), else it enters protected mode at CPL 0 (SDM 2B)");
    wrmsr(MSR_SYSENTER_CS, 0);
    asm volatile(V86("sysenter")::: "memory");
    eq_trap(GP, 0);
    wrmsr(MSR_SYSENTER_CS, KCS);
    wrmsr(MSR_SYSENTER_ESP, (ulong)ring0_stack_end);
    asm volatile("movl $9972f, %%eax; xorl %%edx, %%edx; movl $0x176, %%ecx; wrmsr\n\t" TRY(
                     "pushl $0x9000; pushl $0x9000; pushl $0x9000; pushl $0x9000; pushl $0x9000; pushl $0xf000; pushl "
                     "$0x20202; pushl $0x800; pushl $9970f - 0x8000; iretl\n"
                     ".code16\n9970: sysenter\n.code32\n9972: pushfl; popl %%eax; movl %%cs, %%ecx; movl $0x23, %%edx; "
                     "movl %%edx, %%ds; movl %%edx, %%es; xorl %%edx, %%edx; movl %%edx, %%fs; movl %%edx, %%gs")
                 : "=a"(v86_flags), "=c"(v86_cs)::"edx", "memory", "cc");
    eq_trap(NONE, NONE);
    eq("CS", v86_cs, KCS);
    eq("VM, IF", v86_flags & (F_VM | F_IF), 0);
    test("v86: ports are asked of the I/O map whatever the IOPL");
    for (int iopl = 0; iopl <= 3; iopl += 3) {
        user_flags = F_1 | IOPL(iopl);
        tss.io[0xe0 / 8] = 0xfe;
        asm volatile(V86("inb $0xe0, %%al")::: "eax");
        eq_trap(VEC_DONE, NONE);
        asm volatile(V86("inb $0xe1, %%al")::: "eax");
        eq_trap(GP, 0);
        tss.io[0xe0 / 8] = 0xff;
    }
    user_flags = F_1;
}

/* SDM 3A 20.3.3, 20.4; table 20-2 */
static void vme(void)
{
    ulong v, w;
    bool has = cpuid(1, 0).d & 2;
    u16 *ivt = (u16 *)0;

    test("vme: CLI and STI with IOPL 0 change VIF");
    if (!has) {
        skip("no VME");
        return;
    }
    write_cr4(read_cr4() | CR4_VME);
    asm volatile(V86("sti")::: "memory");
    eq_trap(VEC_DONE, NONE);
    eq("VIF, IF", trap.flags & (F_VIF | F_IF), F_VIF);
    user_flags = F_1 | F_VIF | F_IF;
    asm volatile(V86("cli")::: "memory");
    eq_trap(VEC_DONE, NONE);
    eq("VIF, IF", trap.flags & (F_VIF | F_IF), F_IF);
    test("vme: STI with VIP set: #GP(0)");
    user_flags = F_1 | F_VIP;
    asm volatile(V86("sti")::: "memory");
    eq_trap(GP, 0);
    test("vme: PUSHF shows VIF as IF and IOPL 3; POPF sets VIF");
    user_flags = F_1 | F_VIF;
    asm volatile(V86("pushfw; popw %%cx") : "=c"(v) : "0"(0) : "memory");
    eq_trap(VEC_DONE, NONE);
    eq("flags", v & 0xf202, F_1 | F_IF | IOPL(3));
    user_flags = F_1 | F_IF;
    asm volatile(V86("pushfw; popw %%cx") : "=c"(v) : "0"(0) : "memory");
    eq("flags", v & 0xf202, F_1 | IOPL(3));
    asm volatile(V86("pushw $0x0202; popfw")::: "memory", "cc");
    eq_trap(VEC_DONE, NONE);
    eq("VIF, IF, IOPL", trap.flags & (F_VIF | F_IF | F_IOPL), F_VIF | F_IF);
    user_flags = F_1 | F_VIF;
    asm volatile(V86("pushw $0x3002; popfw")::: "memory", "cc");
    eq("VIF, IF, IOPL", trap.flags & (F_VIF | F_IF | F_IOPL), 0);
    test("vme: POPF that sets TF, or IF while VIP: #GP(0)");
    asm volatile(V86("pushw $0x0102; popfw")::: "memory", "cc");
    eq_trap(GP, 0);
    user_flags = F_1 | F_VIP;
    asm volatile(V86("pushw $0x0202; popfw")::: "memory", "cc");
    eq_trap(GP, 0);
    asm volatile(V86("pushw $0x0002; popfw")::: "memory", "cc");
    eq_trap(VEC_DONE, NONE);
    test("vme: PUSHFD, POPFD, IRETD with IOPL 0 stay #GP(0)");
    user_flags = F_1;
    asm volatile(V86("pushfl")::: "memory");
    eq_trap(GP, 0);
    asm volatile(V86("popfl")::: "memory");
    eq_trap(GP, 0);
    asm volatile(V86("iretl")::: "memory");
    eq_trap(GP, 0);
    test("vme: IRET with IOPL 0 sets VIF");
    asm volatile(V86("pushw $0x0203; pushw $0x800; pushw $9970f - 0x8000; iretw; 9970:")::: "memory");
    eq_trap(VEC_DONE, NONE);
    eq("flags", trap.flags & ~(ulong)F_RF, F_1 | F_CF | F_VIF | F_VM);
    test("vme: IRET that sets IF while VIP, or TF: #GP(0)");
    user_flags = F_1 | F_VIP;
    asm volatile(V86("pushw $0x0203; pushw $0x800; pushw $9970f - 0x8000; iretw; 9970:")::: "memory");
    eq_trap(GP, 0);
    user_flags = F_1;
    asm volatile(V86("pushw $0x0102; pushw $0x800; pushw $9970f - 0x8000; iretw; 9970:")::: "memory");
    eq_trap(GP, 0);

    /* INT n by the redirection map: 0 = the guest's own table at 0 */
    memset(tss.redirect, 0xff, sizeof(tss.redirect));
    tss.redirect[0x44 / 8] &= ~(1 << (0x44 % 8));
    test("vme: INT n, redirected, IOPL 3: by the table at 0, IF and TF clear");
    user_flags = F_1 | IOPL(3) | F_IF | F_CF;
    asm volatile("movl $9970f - 0x8000, %%ecx; movw %%cx, %c2; movw $0x800, %c2 + 2\n\t" V86("int $0x44; 9970: popw "
                                                                                             "%%ax; popw %%cx; popw "
                                                                                             "%%dx")
                 : "=c"(v), "=d"(w)
                 : "i"(0x44 * 4)
                 : "eax", "memory");
    eq_trap(VEC_DONE, NONE);
    eq("pushed CS", v & 0xffff, 0x800);
    eq("pushed flags", w & 0xffff, F_1 | IOPL(3) | F_IF | F_CF);
    eq("flags inside", trap.flags & ~(ulong)F_RF, F_1 | IOPL(3) | F_CF | F_VM);
    test("vme: INT n, redirected, IOPL 0: pushes VIF as IF and IOPL 3, clears VIF, IF stays");
    user_flags = F_1 | F_IF | F_VIF;
    asm volatile("movl $9970f - 0x8000, %%ecx; movw %%cx, %c2; movw $0x800, %c2 + 2\n\t" V86("int $0x44; 9970: popw "
                                                                                             "%%ax; popw %%cx; popw "
                                                                                             "%%dx")
                 : "=c"(v), "=d"(w)
                 : "i"(0x44 * 4)
                 : "eax", "memory");
    eq_trap(VEC_DONE, NONE);
    eq("pushed flags", w & 0xffff, F_1 | IOPL(3) | F_IF);
    eq("flags inside", trap.flags & ~(ulong)F_RF, F_1 | F_IF | F_VM);
    test("vme: INT n, redirected, IOPL 0, VIF 0: pushes IF as 0");
    user_flags = F_1 | F_IF;
    asm volatile("movl $9970f - 0x8000, %%ecx; movw %%cx, %c2; movw $0x800, %c2 + 2\n\t" V86("int $0x44; 9970: popw "
                                                                                             "%%ax; popw %%cx; popw "
                                                                                             "%%dx")
                 : "=c"(v), "=d"(w)
                 : "i"(0x44 * 4)
                 : "eax", "memory");
    eq("pushed flags", w & 0xffff, F_1 | IOPL(3));
    (void)ivt;
    test("vme: INT n, not redirected: IOPL 0 #GP(0); IOPL 3 the IDT");
    user_flags = F_1;
    asm volatile(V86("int $0x45")::: "memory");
    eq_trap(GP, 0);
    user_flags = F_1 | IOPL(3);
    asm volatile(V86("int $0x45")::: "memory");
    eq_trap(GP, 0x45 * 8 + 2);
    idt_set(0x45, KCS, trap_entry + 0x45 * 16, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(V86("int $0x45")::: "memory");
    eq_trap(0x45, NONE);
    idt_default(0x45);
    user_flags = F_1;
    test("vme: INT3 is not redirected");
    tss.redirect[0] = 0;
    asm volatile(V86("int3")::: "memory");
    eq_trap(GP, BP * 8 + 2);
    test("vme: INT 3 in two bytes is");
    asm volatile("movl $9970f - 0x8000, %%ecx; movw %%cx, %c1; movw $0x800, %c1 + 2\n\t" V86(".byte 0xcd, 3; nop; "
                                                                                             "9970: movw $0x77, %%cx")
                 : "=c"(v)
                 : "i"(3 * 4)
                 : "memory");
    eq_trap(VEC_DONE, NONE);
    eq("by the table", v & 0xffff, 0x77);
    write_cr4(read_cr4() & ~(ulong)CR4_VME);

    /* SDM 3A 20.4 */
    test("pvi: CLI and STI at CPL 3 with IOPL 0 change VIF; STI with VIP is #GP(0)");
    write_cr4(read_cr4() | CR4_PVI);
    asm volatile(USER("sti")::: "memory");
    eq_trap(VEC_DONE, NONE);
    eq("VIF, IF", trap.flags & (F_VIF | F_IF), F_VIF);
    user_flags = F_1 | F_VIF | F_IF;
    asm volatile(USER("cli")::: "memory");
    eq("VIF, IF", trap.flags & (F_VIF | F_IF), F_IF);
    user_flags = F_1 | F_VIP;
    asm volatile(USER("sti")::: "memory");
    eq_trap(GP, 0);
    user_flags = F_1 | F_VIF;
    test("pvi: PUSHF and POPF do not change: no VIF in IF");
    asm volatile(USER("pushfl; popl %0") : "=r"(v)::"memory");
    eq("IF", v & F_IF, 0);
    asm volatile(USER("pushl $0x202; popfl")::: "memory", "cc");
    eq("VIF, IF", trap.flags & (F_VIF | F_IF), F_VIF);
    user_flags = F_1;
    write_cr4(read_cr4() & ~(ulong)CR4_PVI);
    asm volatile(USER("sti")::: "memory");
    eq_trap(GP, 0);
}

int main(void)
{
    addresses();
    frame();
    sensitive();
    privileged();
    vme();
    done();
}
