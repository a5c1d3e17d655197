/*
 * Hardware task switches: JMP, CALL, IRET, task gates, interrupts; busy bits, NT, back links; what fails before and
 * what fails in the new task. SDM vol. 3A chapter 7.
 */
#include "sys.h"

#define T2 T0          /* the other task */
#define GATE2 (T0 + 8) /* a task gate to it */
#define T16 (T0 + 16)  /* a 16-bit task */
#define SPARE (T0 + 24)
#define LDT (T0 + 32)
#define FT (T0 + 64) /* fault tasks: one per vector of `caught` */

static struct tss32 t2;
static u8 t2_stack[2048] __attribute__((aligned(16)));
static u64 ldt[4];

/* The other task's code: looks around, then returns by IRET, or by JMP to the first task. Runs again from behind the
 * switch when switched to again. */
static volatile u32 seen_eax, seen_ebx, seen_flags, seen_cr0, seen_runs, seen_esp, seen_ldt;
static volatile u16 seen_tr, seen_fs;
static volatile u32 leave_by_jmp;
extern char t2_entry[], t2_ud[];
asm("t2_entry: movl %eax, seen_eax; movl %ebx, seen_ebx; movl %esp, seen_esp; pushfl; popl seen_flags; movl %cr0, "
    "%eax; movl %eax, seen_cr0; str %eax; movw %ax, seen_tr\n"
    "movw %fs, seen_fs; sldt %eax; movl %eax, seen_ldt; incl seen_runs; cmpl $0, leave_by_jmp; jne 1f; iretl; jmp "
    "t2_entry\n"
    "1: ljmp $0x50, $0; jmp t2_entry\n"
    "t2_ud: ud2");

static void t2_init(const void *entry)
{
    memset(&t2, 0, 104);
    t2.esp = (u32)t2_stack + sizeof(t2_stack);
    t2.ss = KDS, t2.cs = KCS, t2.ds = t2.es = UDS;
    t2.eip = (u32)entry;
    t2.eflags = F_1;
    t2.eax = 0xa1a1a1a1, t2.ebx = 0xb2b2b2b2;
    t2.iomap = 104;
    t2.link = 0xdead;
    gdt[T2 / 8] = descriptor((u32)&t2, 103, D_P | D_DPL(3) | TYPE_TSS);
    gdt[GATE2 / 8] = gate(T2, 0, D_P | D_DPL(3) | TYPE_TASK, 0);
    gdt[LDT / 8] = descriptor((u32)ldt, sizeof(ldt) - 1, D_P | TYPE_LDT);
    ldt[1] = descriptor(0, 0xfffff, D_P | D_DATA | D_W | D_DB | D_G);
    leave_by_jmp = 0;
    tss_limit(sizeof(tss) - 1);
    asm volatile("clts");
}

static u32 type_of(u16 sel) { return gdt[sel / 8] >> 40 & 15; }

static u16 str(void)
{
    u16 v;
    asm volatile("str %0" : "=r"(v));
    return v;
}

static void switches(void)
{
    u32 v, f, ret;

    t2_init(t2_entry);
    test("task: CALL to a TSS: registers from it, CS:EIP, TR, CR0.TS, NT and back link set, both busy (SDM 3A 7.3)");
    asm volatile(TRY("movl $0x12345678, %%ecx; movl $9970f, %1; stc; lcall $0x60, $0x11111111; 9970: pushfl; popl %2; "
                     "movl %%ecx, %0")
                 : "=&r"(v), "=&r"(ret), "=&r"(f)::"ecx", "memory");
    eq_trap(NONE, NONE);
    eq("runs", seen_runs, 1);
    eq("EAX", seen_eax, 0xa1a1a1a1);
    eq("EBX", seen_ebx, 0xb2b2b2b2);
    eq("ESP", seen_esp, (u32)t2_stack + sizeof(t2_stack));
    eq("flags inside", seen_flags, F_1 | F_NT);
    eq("TS", seen_cr0 & CR0_TS, CR0_TS);
    eq("TR inside", seen_tr, T2);
    eq("link", t2.link & 0xffff, TSS_SEL);
    eq("saved EIP", tss.eip, ret);
    eq("saved ECX", tss.ecx, 0x12345678);
    eq("saved CS", tss.cs & 0xffff, KCS);
    eq("saved SS", tss.ss & 0xffff, KDS);
    eq("saved flags", tss.eflags & (F_CF | F_NT), F_CF);
    test("task: IRET goes back by the link: registers and flags restored, NT clear in the left task's image, it is not "
         "busy");
    eq("ECX", v, 0x12345678);
    eq("flags", f & (F_CF | F_NT), F_CF);
    eq("TR", str(), TSS_SEL);
    eq("left task's type", type_of(T2), TYPE_TSS);
    eq("own type", type_of(TSS_SEL), TYPE_TSS_BUSY);
    eq("NT in the left image", t2.eflags & F_NT, 0);
    test("task: the next CALL goes on behind the IRET");
    asm volatile(TRY("lcall $0x60, $0")::: "memory");
    eq_trap(NONE, NONE);
    eq("runs", seen_runs, 2);
    asm volatile("clts");

    test("task: JMP to a TSS: no link, no NT, the left task is not busy");
    t2_init(t2_entry);
    seen_runs = 0;
    leave_by_jmp = 1;
    asm volatile(TRY("ljmp $0x60, $0; 9970:")::: "memory");
    eq_trap(NONE, NONE);
    eq("runs", seen_runs, 1);
    eq("flags inside", seen_flags & F_NT, 0);
    eq("link", t2.link, 0xdead);
    eq("left task's type", type_of(T2), TYPE_TSS);
    eq("own type", type_of(TSS_SEL), TYPE_TSS_BUSY);
    test("task: through a task gate by CALL and JMP");
    asm volatile(TRY("ljmp $0x68, $0")::: "memory");
    eq_trap(NONE, NONE);
    eq("runs", seen_runs, 2);
    t2_init(t2_entry);
    asm volatile(TRY("lcall $0x68, $0")::: "memory");
    eq_trap(NONE, NONE);
    eq("runs", seen_runs, 3);
    test("task: from CPL 3 by CALL, and back to CPL 3");
    t2_init(t2_entry);
    asm volatile(USER("lcall $0x63, $0; movl %%cs, %0") : "=r"(v)::"memory");
    eq_trap(VEC_DONE, NONE);
    eq("runs", seen_runs, 4);
    eq("CS", v, UCS32);
    test("task: from CPL 3 through a task gate");
    t2_init(t2_entry);
    gdt[T2 / 8] = descriptor((u32)&t2, 103, D_P | TYPE_TSS); /* the gate's DPL counts, not the TSS's */
    asm volatile(USER("lcall $0x6b, $0; movl %%cs, %0") : "=r"(v)::"memory");
    eq_trap(VEC_DONE, NONE);
    eq("runs", seen_runs, 5);
    test("task: INT through a task gate in the IDT, and back by IRET");
    t2_init(t2_entry);
    idt_set(0x44, T2, NULL, D_P | D_DPL(3) | TYPE_TASK, 0);
    asm volatile(USER("int $0x44; movl $5, %0") : "=r"(v)::"memory");
    eq_trap(VEC_DONE, NONE);
    eq("after", v, 5);
    eq("runs", seen_runs, 6);
    eq("NT inside", seen_flags & F_NT, F_NT);
    test("task: INT3 through a task gate");
    t2_init(t2_entry);
    idt_set(BP, T2, NULL, D_P | D_DPL(3) | TYPE_TASK, 0);
    asm volatile(USER("int3")::: "memory");
    eq_trap(VEC_DONE, NONE);
    eq("runs", seen_runs, 7);
    idt_default(BP);
    idt_default(0x44);
    test("task: the new task's segments, LDT included, come from its TSS");
    t2_init(t2_entry);
    t2.ldt = LDT;
    t2.fs = 0xc;
    asm volatile(TRY("lcall $0x60, $0")::: "memory");
    eq_trap(NONE, NONE);
    eq("FS", seen_fs, 0xc);
    eq("LDT", seen_ldt & 0xffff, LDT);
    u16 l;
    asm volatile("sldt %0" : "=r"(l));
    eq("LDT after", l, 0);
    test("task: a task gate's exception with an error code: pushed on the new task's stack");
    t2_init(t2_entry);
    idt_set(GP, T2, NULL, D_P | TYPE_TASK, 0);
    leave_by_jmp = 0;
    extern char t2_err[];
    asm("jmp 1f; t2_err: popl seen_ebx; movl $9, seen_eax; addl $7, tss + 32; iretl; 1:"); /* behind MOV %ax, %fs and
                                                                                              its prefix; tss.eip */
    t2.eip = (u32)t2_err;
    asm volatile(TRY("movl $0x1ff8, %%eax; .byte 0x64, 0x64, 0x64, 0x64, 0x64, 0x8e, 0xe0")::: "eax", "memory");
    eq_trap(NONE, NONE);
    eq("error code", seen_ebx, 0x1ff8);
    eq("handler ran", seen_eax, 9);
    idt_default(GP);
    asm volatile("clts");
}

static void refused(void)
{
    test("task: selector null, beyond the limit, in the LDT: #GP");
    t2_init(t2_entry);
    asm volatile(TRY("lcall $0, $0")::: "memory");
    eq_trap(GP, 0);
    gdt[GATE2 / 8] = gate(0, 0, D_P | TYPE_TASK, 0);
    asm volatile(TRY("lcall $0x68, $0")::: "memory");
    eq("vector", trap.vector, GP);
    gdt[GATE2 / 8] = gate(T2 | 4, 0, D_P | TYPE_TASK, 0);
    asm volatile(TRY("lcall $0x68, $0")::: "memory");
    eq("vector", trap.vector, GP);
    eq("error code", trap.error, T2 | 4);
    gdt[GATE2 / 8] = gate(0x1ff8, 0, D_P | TYPE_TASK, 0);
    asm volatile(TRY("lcall $0x68, $0")::: "memory");
    eq_trap(GP, 0x1ff8);
    test("task: TSS busy: #GP(selector), by CALL, JMP and gate");
    gdt[T2 / 8] = descriptor((u32)&t2, 103, D_P | TYPE_TSS_BUSY);
    asm volatile(TRY("lcall $0x60, $0")::: "memory");
    eq_trap(GP, T2);
    asm volatile(TRY("ljmp $0x60, $0")::: "memory");
    eq_trap(GP, T2);
    gdt[GATE2 / 8] = gate(T2, 0, D_P | TYPE_TASK, 0);
    asm volatile(TRY("lcall $0x68, $0")::: "memory");
    eq_trap(GP, T2);
    test("task: a task cannot call itself: it is busy");
    asm volatile(TRY("lcall $0x50, $0")::: "memory");
    eq_trap(GP, TSS_SEL);
    test("task: TSS not present: #NP(selector); gate not present: #NP(gate)");
    gdt[T2 / 8] = descriptor((u32)&t2, 103, TYPE_TSS);
    asm volatile(TRY("lcall $0x60, $0")::: "memory");
    eq_trap(NP, T2);
    gdt[GATE2 / 8] = gate(T2, 0, TYPE_TASK, 0);
    asm volatile(TRY("lcall $0x68, $0")::: "memory");
    eq_trap(NP, GATE2);
    test("task: limit below 103: #TS(selector); below 43 for 16 bits");
    gdt[T2 / 8] = descriptor((u32)&t2, 102, D_P | TYPE_TSS);
    asm volatile(TRY("lcall $0x60, $0")::: "memory");
    eq_trap(TS, T2);
    gdt[T2 / 8] = descriptor((u32)&t2, 42, D_P | TYPE_TSS16);
    asm volatile(TRY("lcall $0x60, $0")::: "memory");
    eq_trap(TS, T2);
    test("task: DPL below CPL or RPL: #GP(selector)");
    gdt[T2 / 8] = descriptor((u32)&t2, 103, D_P | TYPE_TSS);
    asm volatile(USER("lcall $0x60, $0")::: "memory");
    eq_trap(GP, T2);
    asm volatile(TRY("lcall $0x63, $0")::: "memory");
    eq_trap(GP, T2);
    gdt[GATE2 / 8] = gate(T2, 0, D_P | TYPE_TASK, 0);
    asm volatile(USER("lcall $0x68, $0")::: "memory");
    eq_trap(GP, GATE2);
    test("task: an INT gate to a TSS that is busy: #GP(selector), absent #NP(selector)");
    gdt[T2 / 8] = descriptor((u32)&t2, 103, D_P | TYPE_TSS_BUSY);
    idt_set(0x44, T2, NULL, D_P | TYPE_TASK, 0);
    asm volatile(TRY("int $0x44")::: "memory");
    eq_trap(GP, T2);
    gdt[T2 / 8] = descriptor((u32)&t2, 103, TYPE_TSS);
    asm volatile(TRY("int $0x44")::: "memory");
    eq_trap(NP, T2);
    idt_default(0x44);
    test("task: IRET with NT: the link must be a busy TSS: #TS(link)");
    t2_init(t2_entry);
    tss.link = T2;
    asm volatile(TRY("pushl $0x4002; popfl; iretl")::: "memory", "cc");
    eq_trap(TS, T2);
    tss.link = KDS;
    asm volatile(TRY("pushl $0x4002; popfl; iretl")::: "memory", "cc");
    eq_trap(TS, KDS);
    tss.link = T2 | 4;
    asm volatile(TRY("pushl $0x4002; popfl; iretl")::: "memory", "cc");
    eq_trap(TS, T2 | 4);
    gdt[T2 / 8] = descriptor((u32)&t2, 103, TYPE_TSS_BUSY);
    tss.link = T2;
    asm volatile(TRY("pushl $0x4002; popfl; iretl")::: "memory", "cc");
    eq_trap(NP, T2);
    eq("nothing was switched: TR", str(), TSS_SEL);
    eq("TS", read_cr0() & CR0_TS, 0);
}

/* Faults that are met when the new task is already the current one are handled by tasks of their own, as the manual
 * advises (7.3: "exception handlers ... should be tasks"). */
static const u8 caught[] = {TS, NP, SS, GP, PF};
static struct tss32 ft[ARRAY_SIZE(caught)];
static u8 ft_stack[ARRAY_SIZE(caught)][512] __attribute__((aligned(16)));
static volatile u32 ft_vector, ft_error, ft_link;
extern char ft_entry[];
asm("ft_entry: popl ft_error; movl %ebx, ft_vector; movl %ebp, %ebx; jmp ft_leave\n"
    "ft_leave: movl (%ecx), %eax; movl %eax, ft_link; movl %edx, %ebp; movl trap_sp, %esp; pushl $2; popfl; jmp "
    "*trap_fix");

static void ft_arm(void)
{
    for (unsigned i = 0; i < ARRAY_SIZE(caught); i++) {
        memset(&ft[i], 0, 104);
        ft[i].esp = (u32)ft_stack[i] + 512;
        ft[i].ss = KDS, ft[i].cs = KCS, ft[i].ds = ft[i].es = UDS;
        ft[i].eip = (u32)ft_entry;
        ft[i].eflags = F_1;
        ft[i].ebx = caught[i];
        ft[i].ecx = (u32)&ft[i].link;
        ft[i].edx = (u32)__builtin_frame_address(0);
        ft[i].iomap = 104;
        gdt[FT / 8 + i] = descriptor((u32)&ft[i], 103, D_P | TYPE_TSS);
        idt_set(caught[i], FT + 8 * i, NULL, D_P | TYPE_TASK, 0);
    }
    ft_vector = NONE;
}

static void ft_disarm(void)
{
    for (unsigned i = 0; i < ARRAY_SIZE(caught); i++)
        idt_default(caught[i]);
    tss_limit(sizeof(tss) - 1);
    asm volatile("clts; movw %w0, %%fs; movw %w0, %%gs; movw %w1, %%ds; movw %w1, %%es; lldt %w0" ::"r"(0), "r"(UDS));
}

/* The switch to t2 as it stands; must end in vector (error) taken in the context of T2. Registers of this function are
 * the fault task's on the way back. */
static __attribute__((noinline)) void fails(const char *what, u32 vector, u32 error)
{
    test("task: in the new task: %s", what);
    ft_arm();
    for (unsigned i = 0; i < ARRAY_SIZE(caught); i++)
        asm volatile("movl %%ebp, %0" : "=m"(ft[i].edx));
    asm volatile(TRY("lcall $0x60, $0")::: "eax", "ebx", "ecx", "edx", "esi", "edi", "memory", "cc");
    ft_disarm();
    eq("vector", ft_vector, vector);
    eq("error code", ft_error, error);
    eq("the task that faulted", ft_link & 0xffff, T2);
    eq("its link", t2.link & 0xffff, TSS_SEL);
    t2_init(t2_entry);
}

/* A switch whose registers are the new task's when it comes back, EBP included. */
static u32 lost_eax;
#define LOST(insns)                                                                                                    \
    asm volatile("pushl %%ebp\n\t" TRY(insns) "popl %%ebp"                                                             \
                 : "=a"(lost_eax)::"ebx", "ecx", "edx", "esi", "edi", "memory", "cc")

static void in_new_task(void)
{
    t2_init(t2_entry);
    t2.ldt = 0x1ff8;
    fails("LDT beyond the GDT: #TS(LDT)", TS, 0x1ff8);
    t2.ldt = KDS;
    fails("LDT that is none: #TS(LDT)", TS, KDS);
    gdt[LDT / 8] = descriptor((u32)ldt, sizeof(ldt) - 1, TYPE_LDT);
    t2.ldt = LDT;
    fails("LDT not present: #TS(LDT)", TS, LDT);
    t2.cs = 0;
    fails("CS null: #TS(0)", TS, 0);
    t2.cs = UDS;
    fails("CS that is data: #TS(CS)", TS, UDS & ~3);
    t2.cs = KCS | 3;
    fails("CS of DPL other than RPL: #TS(CS)", TS, KCS);
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_CODE | D_R | D_DB | D_G);
    t2.cs = SPARE;
    fails("CS not present: #NP(CS)", NP, SPARE);
    t2.ss = 0;
    fails("SS null: #TS(0)", TS, 0);
    t2.ss = KCS;
    fails("SS that is code: #TS(SS)", TS, KCS);
    t2.ss = UDS;
    fails("SS of another privilege: #TS(SS)", TS, UDS & ~3);
    gdt[SPARE / 8] = descriptor(0, 0xfffff, D_DATA | D_W | D_DB | D_G);
    t2.ss = SPARE;
    fails("SS not present: #SS(SS)", SS, SPARE);
    t2.ds = 0x1ff8;
    fails("DS beyond the GDT: #TS(DS)", TS, 0x1ff8);
    t2.es = SPARE;
    fails("ES not present: #NP(ES)", NP, SPARE);
    t2.fs = KDS | 3;
    fails("FS of too little privilege: #TS(FS)", TS, KDS);
    t2.gs = TSS_SEL;
    fails("GS that is a system descriptor: #TS(GS)", TS, TSS_SEL);
    gdt[SPARE / 8] = descriptor(0, 15, D_P | D_CODE | D_R | D_DB);
    t2.cs = SPARE;
    t2.eip = 16;
    fails("EIP beyond the limit of CS: #GP(0)", GP, 0);

    test("task: a fault of the new task's first instruction is its own");
    t2_init(t2_ud);
    LOST("lcall $0x60, $0");
    eq_trap(UD, NONE);
    eq("EIP", trap.ip, (u32)t2_ud);
    eq("NT saved", trap.flags & F_NT, F_NT);
    eq("TR", str(), T2);
    t2_init(t2_entry);
    test("task: T = 1: #DB with DR6.BT before the first instruction (SDM 3A 17.3.1.5)");
    t2.trap = 1;
    write_dr6(0);
    LOST("lcall $0x60, $0");
    eq_trap(DB, NONE);
    eq("DR6.BT", trap.dr6 & 0xf00f, 0x8000);
    eq("EIP", trap.ip, (u32)t2_entry);
    write_dr6(0);
    t2_init(t2_entry);
    test("task: DR7's local enables are cleared by a switch, the global ones stay");
    write_dr0(0x12345678);
    write_dr7(0x403 | 0x100 | 0x200);
    LOST("lcall $0x60, $0");
    eq_trap(NONE, NONE);
    eq("DR7", read_dr7() & 0xff, 2);
    write_dr7(0x400);
    t2_init(t2_entry);
}

/* SDM 3A 7.6 */
static struct __attribute__((packed)) tss16 {
    u16 link, sp0, ss0, sp1, ss1, sp2, ss2, ip, flags, ax, cx, dx, bx, sp, bp, si, di, es, cs, ss, ds, ldt;
} t16;
static volatile u32 s16_eax, s16_esp;
extern char t16_entry[];
asm("t16_entry: movl %eax, s16_eax; movl %esp, s16_esp; movw %fs, seen_fs; iretl");

static void task16(void)
{
    u32 v;

    test("task: 16-bit TSS: words, upper halves FFFFh, FS and GS null, and back");
    gdt[T16 / 8] = descriptor((u32)&t16, 43, D_P | TYPE_TSS16);
    t16 = (struct tss16){
        .ip = (u32)t16_entry, .flags = F_1, .ax = 0x1234, .cs = KCS, .ss = KDS, .ds = UDS, .es = UDS, .sp = 0x7000};
    if ((u32)t16_entry > 0xffff) {
        skip("the program is too large");
        return;
    }
    asm volatile("movw %w0, %%fs" ::"r"(UDS));
    asm volatile(TRY("movl $0xabcd5678, %%ecx; lcall $0x70, $0; movl %%ecx, %0") : "=r"(v)::"ecx", "memory");
    eq_trap(NONE, NONE);
    eq("AX", s16_eax & 0xffff, 0x1234);
    eq("SP", s16_esp & 0xffff, 0x7000);
    eq("FS", seen_fs, 0);
    eq("link", t16.link, TSS_SEL);
    eq("ECX after", v, 0xabcd5678);
    eq("type after", type_of(T16), TYPE_TSS16);
    u16 fs;
    asm volatile("movw %%fs, %0; movw %w1, %%fs" : "=&r"(fs) : "r"(0));
    eq("FS after", fs, UDS);
    asm volatile("clts");
}

/* SDM 3A 20.2.5: VM in the TSS's EFLAGS starts the task in virtual-8086 mode. */
static void task_v86(void)
{
    static const u8 code[] = {0xb8, 0x22, 0x11, 0x0f, 0x0b}; /* mov $1122h, %ax; ud2 */

    test("task: a TSS with VM set starts in virtual-8086 mode");
    t2_init(NULL);
    t2.eflags = F_1 | F_VM;
    t2.cs = t2.ss = t2.ds = t2.es = V86_SEG;
    t2.eip = 0, t2.esp = 0xf000;
    t2.ss0 = KDS, t2.esp0 = (u32)ring0_stack_end;
    memcpy((void *)0x90000, code, sizeof(code));
    LOST("lcall $0x60, $0; nop");
    eq_trap(UD, NONE);
    eq("AX", lost_eax & 0xffff, 0x1122);
    eq("CS", trap.cs, V86_SEG);
    eq("VM, NT", trap.flags & (F_VM | F_NT), F_VM | F_NT);
    eq("DS", trap.v86_ds, V86_SEG);
    t2_init(t2_entry);
}

int main(void)
{
    switches();
    refused();
    in_new_task();
    task16();
    task_v86();
    done();
}
