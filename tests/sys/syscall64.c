/*
 * SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS: SDM vol. 2B and vol. 3A 5.8.7, 5.8.8; APM3 on the same. Where the two
 * differ, the vendor of CPUID leaf 0 decides.
 */
#include "sys.h"

/* Where LSTAR, CSTAR, SYSENTER_EIP lead: keeps what the instruction left, and goes on behind TRY or USER with vector
 * ENTERED. */
#define ENTERED 0x100
extern char entry_l[], entry_c[], entry_s[];
static volatile ulong e_sp, e_cx, e_r11, e_flags, e_where;
static volatile u16 e_cs, e_ss;
asm("entry_l: movq $1, e_where; jmp 1f\n"
    "entry_c: movq $2, e_where; jmp 1f\n"
    "entry_s: movq $3, e_where\n"
    "1: movq %rsp, e_sp; movq %rcx, e_cx; movq %r11, e_r11; movq $ring0_stack_end, %rsp; pushfq; popq e_flags; movw "
    "%cs, e_cs; movw %ss, e_ss\n"
    "movl $" STR(0x100) ", trap; movq trap_sp, %rsp; pushq $2; popfq; jmp *trap_fix");

#define KEPT "rcx", "r11", "memory", "cc"

static void setup(void)
{
    wrmsr(MSR_STAR, (u64)UCS32 << 48 | (u64)KCS << 32 | 0x12345678);
    wrmsr(MSR_LSTAR, (ulong)entry_l);
    wrmsr(MSR_CSTAR, (ulong)entry_c);
    wrmsr(MSR_SFMASK, 0);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
}

static void syscall_64(void)
{
    ulong next, flags = F_1 | F_CF | F_AC | F_DF | F_ID | F_IF | F_NT | (3 << 12);

    test("syscall: #UD while EFER.SCE = 0, at any CPL; SYSRET too");
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~(u64)EFER_SCE);
    asm volatile(USER("syscall")::: KEPT);
    eq_trap(UD, NONE);
    asm volatile(TRY("syscall")::: KEPT);
    eq_trap(UD, NONE);
    asm volatile(TRY("sysretq")::: KEPT);
    eq_trap(UD, NONE);
    setup();

    test("syscall: from CPL 3: RIP, CS, SS, RCX, R11, RSP");
    user_flags = flags;
    asm volatile(USER("leaq 9970f(%%rip), %0; xorl %%r11d, %%r11d; syscall; 9970:") : "=&r"(next)::KEPT);
    user_flags = F_1;
    eq_trap(ENTERED, (u32)trap.error);
    eq("entered by LSTAR", e_where, 1);
    eq("RCX", e_cx, next);
    eq("RSP", e_sp, (ulong)user_stack_end + USER_OFF);
    eq("CS", e_cs, KCS);
    eq("SS", e_ss, KCS + 8);
    eq("R11", e_r11 & ~(ulong)(F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF), flags & ~(ulong)F_CF);
    eq("flags with SFMASK = 0", e_flags & (F_AC | F_DF | F_ID | F_IF | F_NT | F_IOPL),
       flags & (F_AC | F_DF | F_ID | F_IF | F_NT | F_IOPL));

    test("syscall: SFMASK clears flags, R11 keeps them");
    wrmsr(MSR_SFMASK, F_AC | F_DF | F_IF | F_NT | F_IOPL | F_TF);
    user_flags = flags;
    asm volatile(USER("syscall")::: KEPT);
    user_flags = F_1;
    eq("flags", e_flags & (F_AC | F_DF | F_ID | F_IF | F_NT | F_IOPL | F_TF), F_ID);
    eq("R11", e_r11 & (F_AC | F_DF | F_ID | F_IF | F_NT | F_IOPL), flags & (F_AC | F_DF | F_ID | F_IF | F_NT | F_IOPL));

    test("syscall: the low bits of STAR's selector are not the CPL");
    wrmsr(MSR_STAR, (u64)UCS32 << 48 | (u64)(KCS | 3) << 32);
    asm volatile(USER("syscall")::: KEPT);
    eq("CS", e_cs, KCS);
    eq("SS", e_ss, KCS + 8);
    setup();

    test("syscall: at CPL 0 it works as well");
    asm volatile(TRY("syscall")::: KEPT);
    eq("vector", trap.vector, ENTERED);
    eq("CS", e_cs, KCS);

    test("syscall: from compatibility mode: Intel #UD, AMD by CSTAR");
    asm volatile(USER32("syscall")::: KEPT);
    if (cpu_amd()) {
        eq("vector", trap.vector, ENTERED);
        eq("entered by CSTAR", e_where, 2);
        eq("CS", e_cs, KCS);
    } else {
        eq_trap(UD, NONE);
    }
}

/* SYSRET is tried from CPL 0; what follows runs at CPL 3 and ends by INT 80h. */
static void sysret_64(void)
{
    ulong r11 = F_1 | F_CF | F_AC | F_DF | F_ID | F_NT | F_IF | F_IOPL, got, ss, cs;

    test("sysret: #GP(0) at CPL 3");
    asm volatile(USER("sysretq")::: KEPT);
    eq_trap(GP, 0);
    asm volatile(USER("sysretl")::: KEPT);
    eq_trap(GP, 0);

    test("sysret: to 64-bit code: RIP, CS, SS, flags from R11, RSP stays");
    asm volatile(TRY("movq %%rsp, %%rdi; movq $9970f + 0x10000000, %%rcx; movq %3, %%r11; movq $user_stack_end + "
                     "0x10000000, %%rsp; sysretq;"
                     "9970: pushfq; popq %0; movl %%ss, %k1; movl %%cs, %k2; int $0x80")
                 : "=&r"(got), "=&r"(ss), "=&r"(cs)
                 : "r"(r11)
                 : "rdi", KEPT);
    eq_trap(VEC_DONE, NONE);
    eq("flags", got, r11);
    eq("CS", cs, UCS64);
    eq("SS", ss, UDS);
    eq("CS pushed by the next interrupt", trap.cs, UCS64);
    eq("SS pushed by the next interrupt", trap.ss, UDS);
    eq("RSP", trap.sp, (ulong)user_stack_end + USER_OFF);

    test("sysret: RF, VM and reserved bits of R11 are not loaded");
    asm volatile(TRY("movq $9970f + 0x10000000, %%rcx; movq %1, %%r11; movq $user_stack_end + 0x10000000, %%rsp; "
                     "sysretq;"
                     "9970: int $0x80")
                 :
                 : "r"(0ul), "r"(0xffffffffffull & ~(ulong)(F_TF | F_VIP | F_VIF))
                 : KEPT);
    eq_trap(VEC_DONE, NONE);
    eq("flags", trap.flags, 0x3c7fd7 & ~(ulong)(F_TF | F_VIP | F_VIF));

    test("sysret: to 32-bit code: EIP from ECX, CS, SS");
    asm volatile(TRY("movabs $0x1234567800000000 + 9970f + 0x10000000, %%rcx; movl $2, %%r11d; movq $user_stack_end + "
                     "0x10000000, %%rsp; sysretl;"
                     ".code32; 9970: movl %%ss, %%eax; movl %%cs, %%edx; int $0x80; .code64")
                 : "=&a"(ss), "=&d"(cs)::KEPT);
    eq_trap(VEC_DONE, NONE);
    eq("CS", cs, UCS32);
    eq("SS", ss, UDS);

    test("sysret: RCX not canonical: Intel #GP(0) at CPL 0 (SDM 2B); AMD #GP at the target at CPL 3");
    asm volatile(TRY("movq %0, %%rcx; movl $2, %%r11d; movq $user_stack_end + 0x10000000, %%rsp; sysretq")::"r"(
                     0x0000800000000000ul)
                 : KEPT);
    eq_trap(GP, 0);
    eq("CPL of the fault", trap.cs & 3, cpu_amd() ? 3 : 0);
    if (cpu_amd())
        eq("RIP", trap.ip, 0x0000800000000000);

    test("sysret: there and back a thousand times");
    ulong n = 1000;
    wrmsr(MSR_LSTAR, 0);
    asm volatile("movq $9972f, %%rax; movl $0xc0000082, %%ecx; xorl %%edx, %%edx; wrmsr\n\t" TRY("movq $9971f + "
                                                                                                 "0x10000000, %%rcx; "
                                                                                                 "movl $2, %%r11d; "
                                                                                                 "movq $user_stack_end "
                                                                                                 "+ 0x10000000, %%rsp; "
                                                                                                 "sysretq\n\t"
                                                                                                 "9971: syscall; decq "
                                                                                                 "%0; jnz 9971b; int "
                                                                                                 "$0x80; 9972: sysretq")
                 : "+r"(n)::"rax", "rdx", KEPT);
    eq_trap(VEC_DONE, NONE);
    eq("left", n, 0);
    setup();
}

static void sysenter_64(void)
{
    ulong sp = (ulong)ring0_stack_end - 64;

    wrmsr(MSR_SYSENTER_CS, KCS);
    wrmsr(MSR_SYSENTER_ESP, sp);
    wrmsr(MSR_SYSENTER_EIP, (ulong)entry_s);
    test("sysenter: MSRs keep 64 bits of ESP and EIP, and #GP for a non-canonical one on Intel (SDM 2B WRMSR)");
    eq("CS", rdmsr(MSR_SYSENTER_CS), KCS);
    eq("ESP", rdmsr(MSR_SYSENTER_ESP), sp);
    eq("EIP", rdmsr(MSR_SYSENTER_EIP), (ulong)entry_s);
    for (int wide = 0; wide < 2; wide++) {
        test("sysenter: from %s code: Intel enters at CPL 0, AMD #UD in long mode (APM3)",
             wide ? "64-bit" : "compatibility");
        user_flags = F_1 | F_IF;
        if (wide)
            asm volatile(USER("sysenter")::: KEPT);
        else
            asm volatile(USER32("sysenter")::: KEPT);
        user_flags = F_1;
        if (cpu_amd()) {
            eq_trap(UD, NONE);
            continue;
        }
        eq("vector", trap.vector, ENTERED);
        eq("by SYSENTER_EIP", e_where, 3);
        eq("CS", e_cs, KCS);
        eq("SS", e_ss, KCS + 8);
        eq("RSP", e_sp, sp);
        eq("IF", e_flags & F_IF, 0);
    }
    test("sysenter: SYSENTER_CS null: #GP(0) (AMD: #UD)");
    wrmsr(MSR_SYSENTER_CS, 0);
    asm volatile(USER("sysenter")::: KEPT);
    eq_trap(cpu_amd() ? UD : GP, cpu_amd() ? NONE : 0);
    asm volatile(TRY("sysexitq")::: KEPT);
    eq_trap(cpu_amd() ? UD : GP, cpu_amd() ? NONE : 0);
    wrmsr(MSR_SYSENTER_CS, KCS);

    test("sysexit: #GP(0) at CPL 3 (AMD: #UD)");
    asm volatile(USER("sysexitq")::: KEPT);
    eq_trap(cpu_amd() ? UD : GP, cpu_amd() ? NONE : 0);
    test("sysexit: to 64-bit code (AMD: #UD)");
    ulong cs = 0, ss = 0;
    asm volatile(TRY("movq $9970f + 0x10000000, %%rdx; movq $user_stack_end + 0x10000000, %%rcx; sysexitq; 9970: movl "
                     "%%cs, %k0; movl %%ss, %k1; int $0x80")
                 : "=&r"(cs), "=&r"(ss)::"rdx", KEPT);
    if (cpu_amd()) {
        eq_trap(UD, NONE);
    } else {
        eq_trap(VEC_DONE, NONE);
        eq("CS", cs, KCS + 32 + 3);
        eq("SS", ss, KCS + 40 + 3);
        eq("RSP", trap.sp, (ulong)user_stack_end + USER_OFF);
    }
    test("sysexit: to 32-bit code (AMD: #UD)");
    asm volatile(TRY("movq $9970f + 0x10000000, %%rdx; movq $user_stack_end + 0x10000000, %%rcx; sysexitl; .code32; "
                     "9970: movl %%cs, %%eax; movl %%ss, %%edx; int $0x80; .code64")
                 : "=&a"(cs), "=&d"(ss)::KEPT);
    if (cpu_amd()) {
        eq_trap(UD, NONE);
    } else {
        eq_trap(VEC_DONE, NONE);
        eq("CS", cs, KCS + 16 + 3);
        eq("SS", ss, KCS + 24 + 3);
    }
    test("sysexit: RIP or RSP not canonical: #GP(0) (AMD: #UD)");
    asm volatile(TRY("sysexitq")::"d"(0x0000800000000000ul), "c"(0x1000ul) : "r11", "memory");
    eq_trap(cpu_amd() ? UD : GP, cpu_amd() ? NONE : 0);
    asm volatile(TRY("sysexitq")::"c"(0x0000800000000000ul), "d"(0x1000ul) : "r11", "memory");
    eq_trap(cpu_amd() ? UD : GP, cpu_amd() ? NONE : 0);
}

static void swapgs(void)
{
    test("swapgs: exchanges GS.base and KERNEL_GS_BASE");
    wrmsr(MSR_GS_BASE, 0x1111000);
    wrmsr(MSR_KERNEL_GS_BASE, 0xffff800000002000);
    asm volatile(TRY("swapgs")::: "memory");
    eq_trap(NONE, NONE);
    eq("GS", rdmsr(MSR_GS_BASE), 0xffff800000002000);
    eq("KERNEL_GS", rdmsr(MSR_KERNEL_GS_BASE), 0x1111000);
    test("swapgs: accesses use the new base at once");
    static u64 a = 0xa, b = 0xb;
    ulong x, y;
    wrmsr(MSR_GS_BASE, (ulong)&a);
    wrmsr(MSR_KERNEL_GS_BASE, (ulong)&b);
    asm volatile("movq %%gs:0, %0; swapgs; movq %%gs:0, %1" : "=&r"(x), "=&r"(y)::"memory");
    eq("before", x, 0xa);
    eq("after", y, 0xb);
    test("swapgs: #GP(0) at CPL 3, #UD in compatibility mode");
    asm volatile(USER("swapgs")::: "memory");
    eq_trap(GP, 0);
    asm volatile(COMPAT0(".byte 0x0f, 0x01, 0xf8")::: "memory");
    eq_trap(UD, NONE);
    wrmsr(MSR_GS_BASE, 0);
    wrmsr(MSR_KERNEL_GS_BASE, 0);
}

int main(void)
{
    syscall_64();
    sysret_64();
    sysenter_64();
    swapgs();
    done();
}
