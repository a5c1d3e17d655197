/*
 * Interrupts: shadows of STI and MOV SS, HLT, priorities, REP, CPL 3, NMI and its blocking. SDM vol.
 * 3A 6.3, 6.7, 6.8, 6.9, 11.8; vol. 2 STI, HLT. Their source is the local APIC's own interprocessor interrupt.
 */
#include "apic.h"

#define V1 0x41
#define V2 0x52

static volatile ulong irq_ip[8], irq_flags, irq_cx;
static volatile u32 irq_vector[8];
static volatile unsigned irqs;
static bool x2apic;

static bool take(void)
{
    if (trap.vector != V1 && trap.vector != V2)
        return false;
    if (irqs < 8) {
        irq_ip[irqs] = trap.ip;
        irq_vector[irqs] = trap.vector;
    }
    irqs++;
    irq_flags = trap.flags;
    irq_cx = trap_gpr[1];
    if (x2apic)
        wrmsr(0x80b, 0);
    else
        apic_write(APIC_EOI, 0);
    return true;
}

static void pend(u32 vector)
{
    irqs = 0;
    apic_write(APIC_ICR, vector | ICR_ASSERT | ICR_SELF);
    for (int i = 0; i < 1000 && !(apic_read(APIC_IRR + (vector >> 5) * 16) >> (vector & 31) & 1); i++)
        ;
}

/* Runs the instructions with V1 pending and IF clear; ip gets the address of label 9970 in them. */
#define PENDING(ip, insns)                                                                                             \
    do {                                                                                                               \
        pend(V1);                                                                                                      \
        asm volatile(TRY("leaq 9970f(%%rip), %0\n\t" insns "\n\tnop; cli") : "=&r"(ip)::"rax", "rcx", "memory", "cc"); \
    } while (0)

static void shadows(void)
{
    ulong ip;

    test("irq: with IF = 0 an interrupt waits; POPF that sets IF takes it at once");
    PENDING(ip, "nop; pushq $0x202; popfq; 9970: nop");
    eq_trap(V1, NONE);
    eq("taken", irqs, 1);
    eq("RIP", irq_ip[0], ip);
    eq("IF saved", irq_flags & F_IF, F_IF);
    test("irq: STI: taken behind the instruction that follows it (SDM 2B STI)");
    PENDING(ip, "sti; nop; 9970: nop");
    eq("taken", irqs, 1);
    eq("RIP", irq_ip[0], ip);
    test("irq: STI, CLI: not taken");
    PENDING(ip, "sti; cli; nop; 9970: nop");
    eq("taken between", irqs, 0);
    PENDING(ip, "sti; nop; 9970: nop");
    test("irq: STI, STI: the second gives no new shadow");
    PENDING(ip, "sti; sti; 9970: nop; nop");
    eq("RIP", irq_ip[0], ip);
    test("irq: STI, HLT: HLT is executed and ended by the interrupt; RIP behind it");
    PENDING(ip, "sti; hlt; 9970: nop");
    eq("taken", irqs, 1);
    eq("RIP", irq_ip[0], ip);
    test("irq: IRET that sets IF takes it at its target");
    pend(V1);
    asm volatile(TRY("leaq 9970f(%%rip), %0; movq %%rsp, %%rax; pushq $0x10; pushq %%rax; pushq $0x202; pushq $8; "
                     "pushq %0; iretq; 9970: nop; cli")
                 : "=&r"(ip)::"rax", "memory", "cc");
    eq("RIP", irq_ip[0], ip);
    test("irq: IRET to CPL 3: taken before its first instruction, on the TSS's stack");
    pend(V1);
    user_flags = F_1 | F_IF;
    asm volatile(USER("9970: nop")::: "memory");
    user_flags = F_1;
    eq("last vector", trap.vector, VEC_DONE);
    eq("taken", irqs, 1);
    test("irq: SYSRET that sets IF");
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    wrmsr(MSR_STAR, (u64)UCS32 << 48 | (u64)KCS << 32);
    pend(V1);
    asm volatile(TRY("movq $9970f + 0x10000000, %%rcx; movl $0x202, %%r11d; movq $user_stack_end + 0x10000000, %%rsp; "
                     "sysretq; 9970: nop; int $0x80")::
                     : "rcx", "r11", "memory");
    eq("taken", irqs, 1);
    eq("at CPL 3", irq_ip[0] >= USER_OFF, 1);
}

static void priorities(void)
{
    ulong ip;

    test("irq: the higher vector first");
    irqs = 0;
    apic_write(APIC_ICR, V1 | ICR_ASSERT | ICR_SELF);
    apic_write(APIC_ICR, V2 | ICR_ASSERT | ICR_SELF);
    asm volatile("sti; nop; nop; cli");
    eq("taken", irqs, 2);
    eq("first", irq_vector[0], V2);
    eq("second", irq_vector[1], V1);
    test("irq: CR8 holds back classes up to its own (SDM 3A 11.8.6)");
    asm volatile("movq %0, %%cr8" ::"r"(4ul));
    eq("TPR", apic_read(APIC_TPR), 0x40);
    PENDING(ip, "sti; nop; 9970: nop");
    eq("taken", irqs, 0);
    irqs = 0;
    asm volatile(TRY("sti; nop; leaq 9970f(%%rip), %0; movq %1, %%cr8; 9970: nop; cli")
                 : "=&r"(ip)
                 : "r"(3ul)
                 : "memory");
    eq("taken", irqs, 1);
    eq("RIP: behind MOV CR8", irq_ip[0], ip);
    asm volatile("movq %0, %%cr8" ::"r"(0ul));
    test("irq: a gate that is absent: #NP with EXT and IDT");
    trap_hook = NULL;
    idt_set(V1, KCS, trap_entry, TYPE_INT, 0);
    pend(V1);
    asm volatile(TRY("sti; nop; nop; cli")::: "memory");
    eq_trap(NP, V1 * 8 + 3);
    idt_default(V1);
    apic_write(APIC_EOI, 0);
    trap_hook = take;
}

static void repeats(void)
{
    static u8 big[65536];
    ulong ip, c, d;
    bool partial = false, good = true;

    test("irq: REP STOS is interrupted between iterations, with RIP at it and RCX what is left, and resumed");
    apic_write(APIC_TIMER_DIV, 0xb);
    apic_write(APIC_LVT_TIMER, V1);
    for (int n = 0; n < 400 && !partial; n++) {
        memset(big, 0, sizeof(big));
        irqs = 0;
        c = sizeof(big), d = (ulong)big;
        apic_write(APIC_TIMER_INIT, 1000 + n * 100);
        asm volatile("sti; leaq 9970f(%%rip), %0; 9970: rep stosb; cli"
                     : "=&r"(ip), "+c"(c), "+D"(d)
                     : "a"(1)
                     : "memory");
        apic_write(APIC_TIMER_INIT, 0);
        if (irqs && irq_ip[0] == ip && irq_cx && irq_cx < sizeof(big))
            partial = true;
        for (unsigned i = 0; i < sizeof(big); i += 997)
            good &= big[i] == 1;
        good &= c == 0 && d == (ulong)big + sizeof(big);
        asm volatile("sti; nop; nop; cli");
    }
    must("complete", good);
    if (!partial && good)
        note("no interrupt was seen inside of REP STOS");
    test("irq: the timer ends HLT, and it counts");
    irqs = 0;
    apic_write(APIC_TIMER_INIT, 2000000);
    asm volatile("sti; hlt; cli");
    eq("taken", irqs, 1);
    test("irq: HLT with IF = 1 goes to sleep again after each interrupt's IRET goes behind it");
    irqs = 0;
    apic_write(APIC_LVT_TIMER, V1 | 1 << 17); /* periodic */
    apic_write(APIC_TIMER_INIT, 500000);
    for (int i = 0; i < 5; i++)
        asm volatile("sti; hlt; cli");
    apic_write(APIC_TIMER_INIT, 0);
    apic_write(APIC_LVT_TIMER, 1 << 16);
    asm volatile("sti; nop; nop; cli");
    must("at least five", irqs >= 5);
}

/* ---- NMI ---- */
static volatile unsigned nmis, nmi_depth, nmi_depth_max, nmi_mode;
static bool on_nmi(void)
{
    if (trap.vector == UD) { /* provoked in the NMI handler: its IRET ends the blocking */
        trap.ip += 2;
        return true;
    }
    if (trap.vector != NMI)
        return take();
    ulong ip = trap.ip, flags = trap.flags; /* a second trap replaces the record */
    nmis++;
    if (++nmi_depth > nmi_depth_max)
        nmi_depth_max = nmi_depth;
    if (nmis == 1) {
        ipi(0, ICR_NMI | ICR_ASSERT);
        for (volatile int i = 0; i < 1000; i++)
            ;
        if (nmi_mode == 1)
            asm volatile("ud2");
        for (volatile int i = 0; i < 1000; i++)
            ;
        trap.ip = ip;
        trap.flags = flags;
    }
    nmi_depth--;
    return true;
}

static void nmi(void)
{
    trap_hook = on_nmi;
    idt_set(NMI, KCS, trap_entry + NMI * 16, D_P | TYPE_INT, 0);
    test("nmi: taken with IF = 0");
    nmis = 1, nmi_depth = nmi_depth_max = 0;
    ipi(0, ICR_NMI | ICR_ASSERT);
    for (volatile int i = 0; i < 1000; i++)
        ;
    eq("taken", nmis, 2);
    test("nmi: another one waits until IRET (SDM 3A 6.7.1)");
    nmis = nmi_depth = nmi_depth_max = nmi_mode = 0;
    ipi(0, ICR_NMI | ICR_ASSERT);
    for (volatile int i = 0; i < 1000; i++)
        ;
    eq("taken", nmis, 2);
    eq("depth", nmi_depth_max, 1);
    test("nmi: any IRET ends the blocking, also that of an exception inside of the handler");
    nmis = nmi_depth = nmi_depth_max = 0;
    nmi_mode = 1;
    ipi(0, ICR_NMI | ICR_ASSERT);
    for (volatile int i = 0; i < 1000; i++)
        ;
    eq("taken", nmis, 2);
    eq("depth", nmi_depth_max, 2);
    trap_hook = take;
}

/* SDM 3A 11.5.4.1: the timer in TSC-deadline mode; 11.12: x2APIC mode. */
static void modes(void)
{
    test("apic: TSC-deadline timer: fires when the TSC reaches IA32_TSC_DEADLINE, which then reads 0");
    if (!(cpuid(1, 0).c & BIT(24))) {
        skip("no TSC deadline");
    } else {
        u32 a, d;
        irqs = 0;
        apic_write(APIC_LVT_TIMER, V1 | 2 << 17);
        asm volatile("mfence; rdtsc" : "=a"(a), "=d"(d));
        wrmsr(0x6e0, ((u64)d << 32 | a) + 3000000);
        must("armed", rdmsr(0x6e0) != 0);
        asm volatile("sti; hlt; cli");
        eq("taken", irqs, 1);
        eq("deadline", rdmsr(0x6e0), 0);
        wrmsr(0x6e0, 1); /* in the past: at once */
        irqs = 0;
        for (volatile int i = 0; i < 100000000 && !irqs; i++)
            asm volatile("sti; nop; cli");
        eq("a deadline in the past", irqs, 1);
        apic_write(APIC_LVT_TIMER, 1 << 16);
    }
    test("apic: x2APIC mode: registers are MSRs, self-IPI register, reserved ones #GP(0)");
    if (!(cpuid(1, 0).c & BIT(21))) {
        skip("no x2APIC");
        return;
    }
    u64 base = rdmsr(0x1b);
    asm volatile(TRY("rdmsr")::"c"(0x802) : "rax", "rdx");
    eq_trap(GP, 0); /* not in xAPIC mode */
    wrmsr(0x1b, base | BIT(10));
    eq("APIC ID", rdmsr(0x802), 0);
    x2apic = true;
    irqs = 0;
    wrmsr(0x83f, V1);
    asm volatile("sti; nop; nop; cli");
    eq("self-IPI", irqs, 1);
    irqs = 0;
    wrmsr(0x830, V2 | ICR_SELF);
    asm volatile("sti; nop; nop; cli");
    eq("ICR", irqs, 1);
    asm volatile(TRY("wrmsr")::"c"(0x802), "a"(1), "d"(0));
    eq_trap(GP, 0); /* the ID is read-only */
    asm volatile(TRY("rdmsr")::"c"(0x831) : "rax", "rdx");
    eq_trap(GP, 0); /* there is no ICR high */
    asm volatile(TRY("rdmsr")::"c"(0x80b) : "rax", "rdx");
    eq_trap(GP, 0); /* EOI is write-only */
    asm volatile(TRY("wrmsr")::"c"(0x80b), "a"(1), "d"(0));
    eq_trap(GP, 0); /* and takes 0 only */
    test("apic: from x2APIC mode back to xAPIC mode: #GP(0); by way of disabled: good (SDM 3A 11.12.5)");
    asm volatile(TRY("wrmsr")::"c"(0x1b), "a"((u32)base), "d"((u32)(base >> 32)));
    eq_trap(GP, 0);
    wrmsr(0x1b, base & ~(u64)0xc00);
    eq("CPUID's APIC bit is off", cpuid(1, 0).d & BIT(9), 0);
    asm volatile(TRY("wrmsr")::"c"(0x1b), "a"((u32)base | 0x400), "d"((u32)(base >> 32)));
    eq_trap(GP, 0); /* disabled to x2APIC is no step */
    wrmsr(0x1b, base);
    x2apic = false;
    eq("CPUID's APIC bit", cpuid(1, 0).d & BIT(9), BIT(9));
    apic_enable();
    pend(V1);
    asm volatile("sti; nop; nop; cli");
    eq("works again", irqs, 1);
}

int main(void)
{
    apic_map();
    apic_enable();
    trap_hook = take;
    test("irq: the local APIC answers");
    must("enabled", apic_read(APIC_SVR) == 0x1ff);
    shadows();
    priorities();
    repeats();
    nmi();
    modes();
    done();
}
