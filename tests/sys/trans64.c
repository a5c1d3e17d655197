/*
 * Control transfers and segment loads of long mode: IRET, far JMP, CALL, RET, call gates, compatibility mode, LLDT,
 * LTR, MOV to segment registers. SDM vol. 2A/2B (the instructions' pseudo-code), vol. 3A 5.8, 5.14.
 */
#include "sys.h"

#define USP ((ulong)user_stack_end + USER_OFF)

/* IRETQ with a frame of five words. */
static void iretq(ulong ip, ulong cs, ulong flags, ulong sp, ulong ss)
{
    asm volatile(TRY("pushq %4; pushq %3; pushq %2; pushq %1; pushq %0; iretq")::"r"(ip), "r"(cs), "r"(flags), "r"(sp),
                 "r"(ss)
                 : "memory", "cc");
}

/* Code to return to: at CPL 3 ends the test by INT 80h; at CPL 0 jumps to the fix-up. */
extern char land_u[], land_u32[], land_k[];
static volatile ulong land_flags, land_sp;
static volatile u16 land_cs, land_ss;
asm("land_u: int $0x80\n"
    "land_k: movq %rsp, land_sp; movw %cs, land_cs; movw %ss, land_ss; movq trap_sp, %rsp; pushfq; popq land_flags; "
    "movl $0x101, trap; pushq $2; popfq; jmp *trap_fix\n"
    ".code32\nland_u32: int $0x80\n.code64");
#define LANDED 0x101

static void iret_selectors(void)
{
    ulong u = (ulong)UPTR(land_u), kip = (ulong)land_k;

    test("iret: NT = 1 in long mode: #GP(0)");
    asm volatile(TRY("pushfq; orl $0x4000, (%%rsp); popfq; iretq")::: "memory", "cc");
    eq_trap(GP, 0);
    test("iret: CS null: #GP(0)");
    iretq(u, 3, 2, USP, UDS);
    eq_trap(GP, 0);
    test("iret: CS beyond the limit: #GP(selector)");
    iretq(u, 0x1003, 2, USP, UDS);
    eq_trap(GP, 0x1000);
    test("iret: CS in the null LDT: #GP(selector)");
    iretq(u, 0xf, 2, USP, UDS);
    eq_trap(GP, 0xc);
    test("iret: CS is data: #GP(selector)");
    iretq(u, UDS, 2, USP, UDS);
    eq_trap(GP, UDS & ~3);
    test("iret: to more privilege: #GP(selector)");
    asm volatile(USER("pushq %1; pushq %%rsp; pushq $2; pushq %0; pushq $0x1000; iretq")::"r"((ulong)KCS),
                 "r"((ulong)KDS)
                 : "memory", "cc");
    eq_trap(GP, KCS);
    test("iret: DPL is not RPL: #GP(selector)");
    iretq(u, KCS | 3, 2, USP, UDS);
    eq_trap(GP, KCS);
    test("iret: CS with L and D: #GP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(3) | D_CODE | D_R | D_L | D_DB | D_G);
    iretq(u, T0 | 3, 2, USP, UDS);
    eq_trap(GP, T0);
    test("iret: CS not present: #NP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_DPL(3) | D_CODE | D_R | D_L | D_G);
    iretq(u, T0 | 3, 2, USP, UDS);
    eq_trap(NP, T0);
    test("iret: conforming code of DPL above RPL: #GP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(3) | D_CODE | D_CONF | D_R | D_L | D_G);
    iretq(kip, T0, 2, USP, KDS);
    eq_trap(GP, T0);
    test("iret: conforming code of DPL 0 at CPL 3");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_CONF | D_R | D_L | D_G);
    iretq(u, T0 | 3, 2, USP, UDS);
    eq_trap(VEC_DONE, NONE);
    eq("CS", trap.cs, T0 | 3);

    test("iret: SS null for CPL 3: #GP(0)");
    iretq(u, UCS64, 2, USP, 3);
    eq_trap(GP, 0);
    test("iret: SS null for CPL 3 in compatibility mode: #GP(0)");
    iretq((ulong)UPTR(land_u32), UCS32, 2, USP, 3);
    eq_trap(GP, 0);
    test("iret: SS null is good for 64-bit code at CPL 0");
    iretq(kip, KCS, 2, USP, 0);
    eq("vector", trap.vector, LANDED);
    eq("SS", land_ss, 0);
    eq("RSP", land_sp, USP);
    test("iret: SS null with RPL 3 at CPL 0: #GP(0) (RPL is not CPL)");
    iretq(kip, KCS, 2, USP, 3);
    eq_trap(GP, 0);
    test("iret: SS's RPL is not CS's: #GP(selector)");
    iretq(u, UCS64, 2, USP, UDS & ~3);
    eq_trap(GP, UDS & ~3);
    test("iret: SS is code: #GP(selector)");
    iretq(u, UCS64, 2, USP, UCS32);
    eq_trap(GP, UCS32 & ~3);
    test("iret: SS is read-only: #GP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(3) | D_DATA | D_DB | D_G);
    iretq(u, UCS64, 2, USP, T0 | 3);
    eq_trap(GP, T0);
    test("iret: SS's DPL is not the new CPL: #GP(selector)");
    iretq(u, UCS64, 2, USP, KDS | 3);
    eq_trap(GP, KDS);
    test("iret: SS not present: #SS(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_DPL(3) | D_DATA | D_W | D_DB | D_G);
    iretq(u, UCS64, 2, USP, T0 | 3);
    eq_trap(SS, T0);
    test("iret: RIP not canonical: #GP(0) at CPL 0");
    iretq(0x0000800000000000, UCS64, 2, USP, UDS);
    eq_trap(GP, 0);
    eq("CPL", trap.cs & 3, cpu_amd() ? trap.cs & 3 : 0);
    test("iret: a failed IRET leaves RSP and the frame");
    ulong before, ok;
    asm volatile(TRY("pushq $0x23; pushq $0x1000; pushq $2; pushq $0x1003; pushq $0; movq %%rsp, %0; iretq")
                 : "=&r"(before)::"memory");
    eq_trap(GP, 0x1000);
    eq("RSP", trap.sp, before);
    (void)ok;
}

static void iret_flags(void)
{
    ulong u = (ulong)UPTR(land_u), f;

    test("iret: from CPL 0 every flag is loaded");
    iretq(u, UCS64, F_1 | F_CF | F_IF | F_DF | F_OF | F_IOPL | F_NT | F_AC | F_ID, USP, UDS);
    eq_trap(VEC_DONE, NONE);
    eq("flags", trap.flags, F_1 | F_CF | F_IF | F_DF | F_OF | F_IOPL | F_NT | F_AC | F_ID);
    test("iret: reserved bits of the flags are not loaded");
    iretq(u, UCS64, 0xffffffffffc08028 | F_1, USP, UDS);
    eq_trap(VEC_DONE, NONE);
    eq("flags", trap.flags, F_1);
    for (int iopl = 0; iopl <= 3; iopl += 3) {
        test("iret: at CPL 3 with IOPL %d: IOPL stays, IF only with IOPL 3", iopl);
        user_flags = F_1 | (ulong)iopl << 12;
        asm volatile(
            USER("movq %%rsp, %%rax; pushq $0x23; pushq %%rax; pushq %0; pushq $0x2b; pushq $9971f + 0x10000000; "
                 "iretq; 9971:")::"r"((ulong)(F_1 | F_IF | ((ulong)(3 - iopl) << 12) | F_NT | F_AC))
            : "rax", "memory", "cc");
        user_flags = F_1;
        eq_trap(VEC_DONE, NONE);
        eq("flags", trap.flags, F_1 | F_NT | F_AC | (ulong)iopl << 12 | (iopl == 3 ? F_IF : 0));
    }
    test("iret: POPF at CPL 3 likewise");
    user_flags = F_1;
    asm volatile(USER("pushq %0; popfq")::"r"((ulong)(F_1 | F_IF | F_IOPL | F_ID | F_CF)) : "memory", "cc");
    eq_trap(VEC_DONE, NONE);
    eq("flags", trap.flags, F_1 | F_ID | F_CF);
    user_flags = F_1 | F_IOPL | F_IF;
    asm volatile(USER("pushq $2; popfq")::: "memory", "cc");
    eq("flags with IOPL 3", trap.flags, F_1 | F_IOPL);
    user_flags = F_1;
    test("iret: POPF does not change VM, VIP, VIF; clears RF; PUSHF shows RF and VM as 0");
    asm volatile(TRY("pushq %1; popfq; pushfq; popq %0; pushq $2; popfq")
                 : "=r"(f)
                 : "r"((ulong)(F_1 | F_RF | F_VM | F_VIP | F_VIF))
                 : "memory", "cc");
    eq_trap(NONE, NONE);
    eq("flags", f, F_1);
    test("iret: IRETD and IRETW in 64-bit code");
    asm volatile(TRY("subq $64, %%rsp; movl $land_k, (%%rsp); movl $8, 4(%%rsp); movl $0x200002, 8(%%rsp); movl "
                     "$0x1000, 12(%%rsp); movl $0x10, 16(%%rsp); iretl")::
                     : "memory", "cc");
    eq("vector", trap.vector, LANDED);
    eq("RSP", land_sp, 0x1000);
    must("ID", land_flags & F_ID);
    test("iret: to CPL 3 clears data segments that CPL 3 may not use (SDM 2A IRET)");
    asm volatile("mov %0, %%ds; mov %0, %%es; mov %1, %%fs; mov %0, %%gs" ::"r"(KDS), "r"(UDS));
    iretq(u, UCS64, 2, USP, UDS);
    eq("DS", trap.ds, 0);
    eq("ES", trap.es, 0);
    eq("FS", trap.fs, UDS);
    eq("GS", trap.gs, 0);
    asm volatile("mov %0, %%ds; mov %0, %%es; mov %1, %%fs; mov %1, %%gs" ::"r"(KDS), "r"(0));
    test("iret: to CPL 3 keeps conforming code in data segments");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_CONF | D_R | D_DB | D_G);
    asm volatile("mov %0, %%fs" ::"r"(T0));
    iretq(u, UCS64, 2, USP, UDS);
    eq("FS", trap.fs, T0);
    asm volatile("mov %0, %%fs" ::"r"(0));
    test("iret: to 32-bit code at CPL 3: the upper halves of RIP and RSP are not used");
    iretq((ulong)UPTR(land_u32), UCS32, 2, USP, UDS);
    eq_trap(VEC_DONE, NONE);
    eq("CS", trap.cs, UCS32);
}

static void far_selectors(void)
{
    static struct __attribute__((packed)) {
        u32 off;
        u16 sel;
    } p;

#define FAR(s, o, insn) (p.sel = (s), p.off = (u32)(ulong)(o), ({ asm volatile(TRY(insn " *%0")::"m"(p) : "memory"); }))
    for (int call = 0; call < 2; call++) {
        const char *n = call ? "CALL" : "JMP";
#define F(s, o)                                                                                                        \
    do {                                                                                                               \
        if (call)                                                                                                      \
            FAR(s, o, "lcall");                                                                                        \
        else                                                                                                           \
            FAR(s, o, "ljmp");                                                                                         \
    } while (0)
        test("far %s: null selector: #GP(0)", n);
        F(0, land_k);
        eq_trap(GP, 0);
        F(3, land_k);
        eq_trap(GP, 0);
        test("far %s: beyond the limit: #GP(selector)", n);
        F(0x1000, land_k);
        eq_trap(GP, 0x1000);
        test("far %s: to data: #GP(selector)", n);
        F(KDS, land_k);
        eq_trap(GP, KDS);
        test("far %s: RPL above CPL: #GP(selector)", n);
        F(KCS | 3, land_k);
        eq_trap(GP, KCS);
        test("far %s: to less privileged code: #GP(selector)", n);
        F(UCS64, land_k);
        eq_trap(GP, UCS64 & ~3);
        test("far %s: code with L and D: #GP(selector)", n);
        gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_R | D_L | D_DB | D_G);
        F(T0, land_k);
        eq_trap(GP, T0);
        test("far %s: not present: #NP(selector)", n);
        gdt[T0 / 8] = descriptor(0, 0xfffff, D_CODE | D_R | D_L | D_G);
        F(T0, land_k);
        eq_trap(NP, T0);
        test("far %s: to a TSS or task gate: #GP(selector) in long mode", n);
        gdt[T0 / 8] = descriptor(0, 0x67, D_P | TYPE_TSS);
        gdt[T0 / 8 + 1] = 0;
        F(T0, land_k);
        eq_trap(GP, T0);
        gdt[T0 / 8] = gate(TSS_SEL, 0, D_P | TYPE_TASK, 0);
        F(T0, land_k);
        eq_trap(GP, T0);
        test("far %s: to 64-bit code; the accessed bit is set", n);
        gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_R | D_L | D_G);
        F(T0, land_k);
        eq("vector", trap.vector, LANDED);
        eq("CS", land_cs, T0);
        eq("A", gdt[T0 / 8] >> 40 & 1, 1);
        test("far %s: to the 64-bit code of an LDT", n);
        static u64 ldt[4];
        ldt[1] = descriptor(0, 0xfffff, D_P | D_CODE | D_R | D_L | D_G);
        gdt[T0 / 8 + 2] = descriptor((u32)(ulong)ldt, sizeof(ldt) - 1, D_P | TYPE_LDT);
        gdt[T0 / 8 + 3] = 0;
        asm volatile("lldt %w0" ::"r"(T0 + 16));
        F(0xc, land_k);
        eq("vector", trap.vector, LANDED);
        eq("CS", land_cs, 0xc);
        asm volatile("lldt %w0" ::"r"(0));

        /* 16-byte call gates: SDM 3A 5.8.3.1 */
        u64 *g = &gdt[T0 / 8];
#define GATE(sel, off, acc) (g[0] = gate(sel, (u32)(off), acc, 0), g[1] = (u64)(off) >> 32)
        test("far %s: call gate at the same privilege", n);
        GATE(KCS, (ulong)land_k, D_P | TYPE_CALL);
        F(T0, 0x12345678);
        eq("vector", trap.vector, LANDED);
        eq("CS", land_cs, KCS);
        test("far %s: call gate not present: #NP(gate)", n);
        GATE(KCS, (ulong)land_k, TYPE_CALL);
        F(T0, 0);
        eq_trap(NP, T0);
        test("far %s: call gate of DPL below RPL: #GP(gate)", n);
        GATE(KCS, (ulong)land_k, D_P | TYPE_CALL);
        F(T0 | 3, 0);
        eq_trap(GP, T0);
        test("far %s: call gate to a null selector: #GP(0)", n);
        GATE(0, (ulong)land_k, D_P | TYPE_CALL);
        F(T0, 0);
        eq_trap(GP, 0);
        test("far %s: call gate to 32-bit code: #GP(selector)", n);
        GATE(KCS32, (ulong)land_k, D_P | TYPE_CALL);
        F(T0, 0);
        eq_trap(GP, KCS32);
        test("far %s: call gate to data: #GP(selector)", n);
        GATE(KDS, (ulong)land_k, D_P | TYPE_CALL);
        F(T0, 0);
        eq_trap(GP, KDS);
        test("far %s: call gate whose upper half has a type: #GP(gate)", n);
        GATE(KCS, (ulong)land_k, D_P | TYPE_CALL);
        g[1] |= (u64)TYPE_CALL << 40;
        F(T0, 0);
        eq_trap(GP, T0);
        test("far %s: call gate to an address that is not canonical: #GP(0)", n);
        GATE(KCS, 0x0000800000000000, D_P | TYPE_CALL);
        F(T0, 0);
        eq_trap(GP, 0);
        test("far %s: 16-bit call gate: #GP(gate) in long mode", n);
        GATE(KCS, (ulong)land_k, D_P | TYPE_CALL16);
        F(T0, 0);
        eq_trap(GP, T0);
    }
    test("far CALL pushes CS and RIP of the operand size; far RET pops them");
    ulong sp0, sp1;
    p.sel = KCS;
    asm volatile("movl $9970f, %2\n\t" TRY("movq %%rsp, %0; lcall *%2; movq %%rsp, %1; jmp 9972f; 9970: movl (%%rsp), "
                                           "%%eax; movl 4(%%rsp), %%edx; lretl; 9972:")
                 : "=&r"(sp0), "=&r"(sp1)
                 : "m"(p.off)
                 : "rax", "rdx", "memory");
    eq_trap(NONE, NONE);
    eq("RSP", sp1, sp0);
    test("far JMP, CALL: 9A and EA are #UD in 64-bit code");
    EXEC(false, 0xea, 0, 0, 0, 0, 8, 0);
    eq_trap(UD, NONE);
    EXEC(false, 0x9a, 0, 0, 0, 0, 8, 0);
    eq_trap(UD, NONE);
    test("far JMP by a register operand: #UD");
    EXEC(false, 0xff, 0xe8);
    eq_trap(UD, NONE);
}

static void privilege_gates(void)
{
    static struct __attribute__((packed)) {
        u32 off;
        u16 sel;
    } p;
    u64 *g = &gdt[T0 / 8];
    ulong uptr = (ulong)UPTR(&p);

    GATE(KCS, (ulong)land_k, D_P | D_DPL(3) | TYPE_CALL);
    p.sel = T0 | 3;
    test("call gate: from CPL 3 to CPL 0: stack of the TSS, frame of four quadwords, SS null (SDM 3A 5.8.5.1)");
    asm volatile(USER("lcall *(%0); 9974:")::"r"(uptr) : "memory");
    eq("vector", trap.vector, LANDED);
    eq("CS", land_cs, KCS);
    eq("SS", land_ss, 0);
    eq("RSP", land_sp, (ulong)ring0_stack_end - 32);
    ulong *f = (ulong *)land_sp;
    eq("saved CS", f[1], UCS64);
    eq("saved RSP", f[2], USP);
    eq("saved SS", f[3], UDS);
    test("call gate: far JMP to more privilege through a gate: #GP(selector)");
    asm volatile(USER("ljmp *(%0)")::"r"(uptr) : "memory");
    eq_trap(GP, KCS);
    test("call gate: of DPL 0 from CPL 3: #GP(gate)");
    GATE(KCS, (ulong)land_k, D_P | TYPE_CALL);
    asm volatile(USER("lcall *(%0)")::"r"(uptr) : "memory");
    eq_trap(GP, T0);
    test("call gate: to conforming code: CPL and stack stay");
    gdt[T0 / 8 + 2] = descriptor(0, 0xfffff, D_P | D_CODE | D_CONF | D_R | D_L | D_G);
    GATE(T0 + 16, (ulong)UPTR(land_u), D_P | D_DPL(3) | TYPE_CALL);
    asm volatile(USER("lcall *(%0)")::"r"(uptr) : "memory");
    eq_trap(VEC_DONE, NONE);
    eq("CS", trap.cs, (T0 + 16) | 3);
    eq("RSP", trap.sp, USP - 16);
    test("call gate: RSP0 not canonical: #SS (error code of the stack: 0)");
    static u8 ist_stack[1024] __attribute__((aligned(16)));
    extern char trap_entry[];
    ulong keep = tss.rsp[0];
    tss.ist[0] = (ulong)ist_stack + sizeof(ist_stack);
    idt_set(SS, KCS, trap_entry + SS * 16, D_P | TYPE_INT, 1);
    GATE(KCS, (ulong)land_k, D_P | D_DPL(3) | TYPE_CALL);
    tss.rsp[0] = 0x0000800000000000;
    asm volatile(USER("lcall *(%0)")::"r"(uptr) : "memory");
    eq_trap(SS, 0);
    tss.rsp[0] = keep;
    idt_default(SS);

    test("far RET: to CPL 3 pops RSP and SS, and an immediate from both stacks");
    asm volatile(
        TRY("pushq $0x23; pushq %0; pushq $0x1111; pushq $0x2b; pushq $land_u + 0x10000000; lretq $8")::"r"(USP - 64)
        : "memory");
    eq_trap(VEC_DONE, NONE);
    eq("CS", trap.cs, UCS64);
    eq("SS", trap.ss, UDS);
    eq("RSP", trap.sp, USP - 64 + 8);
    test("far RET: clears data segments that CPL 3 may not use");
    asm volatile("mov %0, %%ds; mov %0, %%es" ::"r"(KDS));
    asm volatile(TRY("pushq $0x23; pushq %0; pushq $0x2b; pushq $land_u + 0x10000000; lretq")::"r"(USP) : "memory");
    eq("DS", trap.ds, 0);
    asm volatile("mov %0, %%ds; mov %0, %%es" ::"r"(KDS));
#define LRET(ip, cs)                                                                                                   \
    asm volatile(TRY("pushq $0x23; pushq %2; pushq %1; pushq %0; lretq")::"r"((ulong)(ip)), "r"((ulong)(cs)), "r"(USP) \
                 : "memory")
    test("far RET: CS null #GP(0), beyond the limit, data, RPL below CPL, DPL not RPL: #GP(selector)");
    LRET(land_k, 0);
    eq_trap(GP, 0);
    LRET(land_k, 0x1000);
    eq_trap(GP, 0x1000);
    LRET(land_k, KDS);
    eq_trap(GP, KDS);
    LRET(land_k, KCS | 3);
    eq_trap(GP, KCS);
    asm volatile(USER("pushq $8; pushq $0x1000; lretq")::: "memory");
    eq_trap(GP, 8);
    test("far RET: RIP not canonical: #GP(0)");
    LRET(0x0000800000000000, KCS);
    eq_trap(GP, 0);
    test("far RET: not present: #NP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_CODE | D_R | D_L | D_G);
    LRET(land_k, T0);
    eq_trap(NP, T0);
}

static void near_transfers(void)
{
    ulong bad = 0x0000800000000000;

    test("near: JMP, CALL, RET to an address that is not canonical: #GP(0) at the instruction, RSP unchanged");
    ulong sp;
    asm volatile(TRY("movq %%rsp, %0; jmp *%1") : "=&r"(sp) : "r"(bad));
    eq_trap(GP, 0);
    must("RIP", trap.ip < 0x100000);
    asm volatile(TRY("movq %%rsp, %0; call *%1") : "=&r"(sp) : "r"(bad) : "memory");
    eq_trap(GP, 0);
    eq("RSP after CALL", trap.sp, sp);
    asm volatile(TRY("pushq %1; movq %%rsp, %0; ret") : "=&r"(sp) : "r"(bad) : "memory");
    eq_trap(GP, 0);
    eq("RSP after RET", trap.sp, sp);
}

static void loads(void)
{
    static u64 ldt[4];

    test("segments: MOV to CS is #UD");
    EXEC(false, 0x8e, 0xc8);
    eq_trap(UD, NONE);
    test("segments: numbers 6 and 7 are #UD");
    EXEC(false, 0x8e, 0xf0);
    eq_trap(UD, NONE);
    EXEC(false, 0x8c, 0xf8);
    eq_trap(UD, NONE);
    test("segments: SS null: good in 64-bit code at CPL 0 with RPL 0, #GP(0) at CPL 3");
    asm volatile(TRY("mov %0, %%ss; mov %1, %%ss")::"r"(0), "r"(KDS));
    eq_trap(NONE, NONE);
    asm volatile(TRY("mov %0, %%ss")::"r"(3));
    eq_trap(GP, 0);
    asm volatile(USER("mov %0, %%ss")::"r"(3));
    eq_trap(GP, 0);
    asm volatile(COMPAT0("movw %%ax, %%ss")::"a"(0));
    eq_trap(GP, 0);
    test("segments: SS with RPL or DPL other than CPL, code, read-only: #GP(selector); not present: #SS(selector)");
    asm volatile(TRY("mov %0, %%ss")::"r"(KDS | 3));
    eq_trap(GP, KDS);
    asm volatile(TRY("mov %0, %%ss")::"r"(UDS & ~3));
    eq_trap(GP, UDS & ~3);
    asm volatile(TRY("mov %0, %%ss")::"r"(KCS));
    eq_trap(GP, KCS);
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_DATA | D_DB | D_G);
    asm volatile(TRY("mov %0, %%ss")::"r"(T0));
    eq_trap(GP, T0);
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_DATA | D_W | D_DB | D_G);
    asm volatile(TRY("mov %0, %%ss")::"r"(T0));
    eq_trap(SS, T0);
    test("segments: DS: execute-only code or a system descriptor #GP(selector), not present #NP(selector), DPL below "
         "RPL #GP(selector)");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_DB | D_G);
    asm volatile(TRY("mov %0, %%ds")::"r"(T0));
    eq_trap(GP, T0);
    asm volatile(TRY("mov %0, %%ds")::"r"(TSS_SEL));
    eq_trap(GP, TSS_SEL);
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_DATA | D_W | D_DB | D_G);
    asm volatile(TRY("mov %0, %%ds")::"r"(T0));
    eq_trap(NP, T0);
    asm volatile(TRY("mov %0, %%ds")::"r"(KDS | 3));
    eq_trap(GP, KDS);
    asm volatile(USER("mov %0, %%ds")::"r"(KDS));
    eq_trap(GP, KDS);
    test("segments: the accessed bit is set by a load, not by one that fails");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_DATA | D_W | D_DB | D_G);
    asm volatile(TRY("mov %0, %%fs")::"r"(T0 | 3));
    eq_trap(GP, T0);
    eq("A", gdt[T0 / 8] >> 40 & 1, 0);
    asm volatile(TRY("mov %0, %%fs")::"r"(T0));
    eq_trap(NONE, NONE);
    eq("A", gdt[T0 / 8] >> 40 & 1, 1);
    test("segments: FS and GS bases come from the descriptor (32 bits), and from the MSRs (64 bits)");
    gdt[T0 / 8] = descriptor(0x89abcdef, 0xfffff, D_P | D_DATA | D_W | D_DB | D_G);
    asm volatile("mov %0, %%fs; mov %0, %%gs" ::"r"(T0));
    eq("FS", rdmsr(MSR_FS_BASE), 0x89abcdef);
    eq("GS", rdmsr(MSR_GS_BASE), 0x89abcdef);
    wrmsr(MSR_FS_BASE, 0xffffffff80000000);
    eq("FS", rdmsr(MSR_FS_BASE), 0xffffffff80000000);
    u16 sel;
    asm volatile("mov %%fs, %0" : "=r"(sel));
    eq("FS's selector", sel, T0);
    asm volatile("mov %0, %%fs; mov %0, %%gs" ::"r"(0));
    wrmsr(MSR_FS_BASE, 0);
    wrmsr(MSR_GS_BASE, 0);
    test("segments: bases and limits of CS, DS, ES, SS do not count in 64-bit code");
    gdt[T0 / 8] = descriptor(0x1000000, 0, D_P | D_DATA | D_W | D_DB);
    static u64 word = 0x1122334455667788;
    ulong v;
    asm volatile(TRY("mov %1, %%ds; movq (%2), %0; mov %3, %%ds") : "=&r"(v) : "r"(T0), "r"(&word), "r"(KDS));
    eq_trap(NONE, NONE);
    eq("value", v, word);
    test("segments: they do in compatibility mode");
    asm volatile(COMPAT0("movw %%cx, %%ds; movl (%%ebx), %%eax") : "=a"(v) : "c"(T0), "b"(&word));
    eq_trap(GP, 0);
    asm volatile("mov %0, %%ds" ::"r"(KDS));

    test("LLDT: null is good; data, beyond the limit #GP(selector); not present #NP(selector); TI set #GP; CPL 3 "
         "#GP(0)");
    asm volatile(TRY("lldt %w0")::"r"(0));
    eq_trap(NONE, NONE);
    asm volatile(TRY("lldt %w0")::"r"(KDS));
    eq_trap(GP, KDS);
    asm volatile(TRY("lldt %w0")::"r"(0x2000));
    eq_trap(GP, 0x2000);
    asm volatile(TRY("lldt %w0")::"r"(T0 | 4));
    eq_trap(GP, T0 | 4);
    gdt[T0 / 8] = descriptor((u32)(ulong)ldt, sizeof(ldt) - 1, TYPE_LDT);
    gdt[T0 / 8 + 1] = 0;
    asm volatile(TRY("lldt %w0")::"r"(T0));
    eq_trap(NP, T0);
    asm volatile(USER("lldt %w0")::"r"(T0));
    eq_trap(GP, 0);
    gdt[T0 / 8] |= (u64)D_P << 40;
    asm volatile(TRY("lldt %w0; sldt %w0") : "=r"(v) : "0"((ulong)T0));
    eq_trap(NONE, NONE);
    ldt[2] = descriptor(0x2000, 0xfffff, D_P | D_DATA | D_W | D_DB | D_G);
    asm volatile(TRY("mov %0, %%fs")::"r"(0x14));
    eq("base by the LDT", rdmsr(MSR_FS_BASE), 0x2000);
    asm volatile(TRY("mov %0, %%fs")::"r"(0x24));
    eq_trap(GP, 0x24);
    test("LLDT: a base that is not canonical: #GP(selector)");
    gdt[T0 / 8 + 1] = 0x8000;
    asm volatile(TRY("lldt %w0")::"r"(T0));
    eq("vector", trap.vector, GP);
    asm volatile("lldt %w0; mov %0, %%fs" ::"r"(0));

    test("LTR: null #GP(0); busy, of another type #GP(selector); not present #NP(selector); marks the TSS busy");
    asm volatile(TRY("ltr %w0")::"r"(0));
    eq_trap(GP, 0);
    tss_limit(sizeof(tss) - 1);
    asm volatile(TRY("ltr %w0")::"r"(TSS_SEL));
    eq_trap(GP, TSS_SEL);
    asm volatile(TRY("ltr %w0")::"r"(KDS));
    eq_trap(GP, KDS);
    gdt[T0 / 8] = gdt[TSS_SEL / 8] & ~((u64)(D_P | 2) << 40);
    gdt[T0 / 8 + 1] = gdt[TSS_SEL / 8 + 1];
    asm volatile(TRY("ltr %w0")::"r"(T0));
    eq_trap(NP, T0);
    gdt[T0 / 8] |= (u64)D_P << 40;
    asm volatile(USER("ltr %w0")::"r"(T0));
    eq_trap(GP, 0);
    eq("not busy yet", gdt[T0 / 8] >> 40 & 15, TYPE_TSS);
    asm volatile(TRY("ltr %w0")::"r"(T0));
    eq_trap(NONE, NONE);
    eq("busy", gdt[T0 / 8] >> 40 & 15, TYPE_TSS_BUSY);
    tss_limit(sizeof(tss) - 1);
    test("LTR: a 16-bit TSS is #GP(selector) in long mode");
    gdt[T0 / 8] = descriptor(0x1000, 0x67, D_P | TYPE_TSS16);
    asm volatile(TRY("ltr %w0")::"r"(T0));
    tss_limit(sizeof(tss) - 1);
    eq_trap(GP, T0);
}

static void compatibility(void)
{
    ulong v = 0, w = 0;

    asm volatile("mov %0, %%ds; mov %0, %%es" ::"r"(UDS)); /* data segments count again */

    test("compatibility: 32-bit code: REX prefixes are INC and DEC, addresses wrap at 4 GiB");
    asm volatile(COMPAT0(".byte 0x41, 0x48") : "=c"(v), "=a"(w) : "0"(5ul), "1"(7ul));
    eq_trap(NONE, NONE);
    eq("ECX", v, 6);
    eq("EAX", w, 6);
    static u32 word = 0x55667788;
    asm volatile(COMPAT0("movl 0x7fffffff(%%ebx,%%ecx), %%eax")
                 : "=a"(v)
                 : "b"((ulong)(u32)((u32)(ulong)&word + 1)), "c"(0x80000000ul));
    eq_trap(NONE, NONE);
    eq("value", v, word);
    test("compatibility: 64-bit-only instructions are #UD, 32-bit ones work");
    asm volatile(COMPAT0("xorl %%eax, %%eax; movl $0x19, %%eax; aaa") : "=a"(v));
    eq_trap(NONE, NONE);
    asm volatile(COMPAT0("pushl %%ss; popl %%eax") : "=a"(v));
    eq_trap(NONE, NONE);
    eq("SS", v, KDS);
    test("compatibility: 16-bit code segment");
    asm volatile(TRY("pushq $0x40; pushq $9970f - 0; lretq; .code16; 9970: movl %%esp, %%ecx; movw $0x1234, %%ax; "
                     "ljmpl $8, $9971f; .code64; 9971:")
                 : "=a"(v)
                 : "0"(0xffffffff0000fffful)
                 : "rcx", "memory");
    eq_trap(NONE, NONE);
    eq("AX", v & 0xffff, 0x1234);
    test("compatibility: an interrupt from 32-bit code saves CS and comes back to it");
    asm volatile(USER32("movl $0x11, %%eax; int3") : "=a"(v)::"memory");
    eq_trap(GP, 3 * 8 + 2);
    eq("CS", trap.cs, UCS32);
    test("compatibility: INTO works: #OF as a trap");
    extern char trap_entry[];
    idt_set(OF, KCS, trap_entry + OF * 16, D_P | D_DPL(3) | TYPE_INT, 0);
    asm volatile(USER32("movl $0x7fffffff, %%eax; addl $1, %%eax; into; nop") : "=a"(v)::"memory");
    eq_trap(OF, NONE);
    idt_default(OF);
    test("compatibility: BOUND: #BR");
    static u32 pair[2] = {2, 5};
    asm volatile(USER32("boundl %%eax, (%%edx)")::"a"(3), "d"((ulong)UPTR(pair)) : "memory");
    eq_trap(VEC_DONE, NONE);
    asm volatile(USER32("boundl %%eax, (%%edx)")::"a"(6), "d"((ulong)UPTR(pair)) : "memory");
    eq_trap(BR, NONE);
    test("compatibility: code segment limits count: #GP(0) at the fetch beyond");
    static u8 code[64] __attribute__((aligned(16))) = {0x90, 0x90, 0x90, 0x90, 0x0f, 0x0b};
    gdt[T0 / 8] = descriptor((u32)(ulong)code, 3, D_P | D_CODE | D_R | D_DB);
    asm volatile(TRY("pushq %0; pushq $0; lretq")::"r"((ulong)T0) : "memory");
    eq_trap(GP, 0);
    eq("EIP", trap.ip, 4);
    eq("CS", trap.cs, T0);
    test("compatibility: CALL pushes four bytes");
    asm volatile(COMPAT0("call 9970f; 9970: popl %%eax; subl $9970b, %%eax") : "=a"(v)::"memory", "cc");
    eq("offset", v, 0);
}

int main(void)
{
    iret_selectors();
    iret_flags();
    far_selectors();
    privilege_gates();
    near_transfers();
    loads();
    compatibility();
    done();
}
