/*
 * The sensitive instructions of x86 that do not trap at CPL 3 (Robin and Irvine 2000): they show or depend on
 * privileged state, so a virtual machine monitor that runs guest code at another privilege than the guest believes must
 * find them by other means. Each check holds at CPL 0 and at CPL 3 what the SDM's vol. 2 says of the instruction.
 * Included by sensitive32.c and sensitive64.c.
 */
#include "sys.h"

#ifdef __x86_64__
#define BITS "64-bit"
#define UCS UCS64
#define IRET "iretq"
#define RETF "lretq"
#define PUSHF_ "pushfq"
#define POPF_ "popfq"
#else
#define BITS "32-bit"
#define UCS UCS32
#define IRET "iretl"
#define RETF "lretl"
#define PUSHF_ "pushfl"
#define POPF_ "popfl"
#endif

#define NAME(s) test("sensitive: %s (" BITS ")", s)

static u8 out0[16] __attribute__((aligned(16))), out3[16] __attribute__((aligned(16)));
#define TBL (2 + sizeof(ulong))

static void tables(void)
{
    struct table_reg r;

    NAME("sgdt");
    memset(out0, 0xee, 16), memset(out3, 0xee, 16);
    asm volatile(TRY("sgdt (%0)")::"r"(out0) : "memory");
    eq_trap(NONE, NONE);
    asm volatile(USER("sgdt (%0)")::"r"(UPTR(out3)) : "memory");
    eq_trap(VEC_DONE, NONE);
    memcpy(&r, out0, TBL);
    eq("base at CPL 0", r.base, gdt_reg.base);
    eq("limit at CPL 0", r.limit, gdt_reg.limit);
    memcpy(&r, out3, TBL);
    eq("base at CPL 3", r.base, gdt_reg.base);
    eq("limit at CPL 3", r.limit, gdt_reg.limit);
    eq("bytes written", out3[TBL], 0xee);

    NAME("sidt");
    memset(out0, 0xee, 16), memset(out3, 0xee, 16);
    asm volatile(TRY("sidt (%0)")::"r"(out0) : "memory");
    eq_trap(NONE, NONE);
    asm volatile(USER("sidt (%0)")::"r"(UPTR(out3)) : "memory");
    eq_trap(VEC_DONE, NONE);
    memcpy(&r, out0, TBL);
    eq("base at CPL 0", r.base, idt_reg.base);
    eq("limit at CPL 0", r.limit, idt_reg.limit);
    memcpy(&r, out3, TBL);
    eq("base at CPL 3", r.base, idt_reg.base);
    eq("limit at CPL 3", r.limit, idt_reg.limit);
    eq("bytes written", out3[TBL], 0xee);
}

/* The instruction with a register and a memory operand, at both privileges: low 16 bits must be want. */
#define SELECTOR_INSN(insn, want)                                                                                      \
    do {                                                                                                               \
        ulong v = 0;                                                                                                   \
        asm volatile(TRY(insn " %0") : "=r"(v));                                                                       \
        eq_trap(NONE, NONE);                                                                                           \
        eq("at CPL 0", v & 0xffff, want);                                                                              \
        asm volatile(USER(insn " %0") : "=r"(v));                                                                      \
        eq_trap(VEC_DONE, NONE);                                                                                       \
        eq("at CPL 3", v & 0xffff, want);                                                                              \
        memset(out3, 0xee, 16);                                                                                        \
        asm volatile(USER(insn " (%0)")::"r"(UPTR(out3)) : "memory");                                                  \
        eq("in memory", *(u16 *)out3, want);                                                                           \
        eq("bytes written", out3[2], 0xee);                                                                            \
        asm volatile(TRY(insn " %w0") : "=r"(v) : "0"(~0ul));                                                          \
        eq("16 bits of a register", v, (~0ul & ~0xfffful) | ((want)&0xffff));                                          \
    } while (0)

static void selectors(void)
{
    static u64 ldt[2];

    gdt[T0 / 8] = descriptor((u32)(ulong)ldt, sizeof(ldt) - 1, D_P | TYPE_LDT);
    gdt[T0 / 8 + 1] = 0;
    asm volatile("lldt %w0" ::"r"(T0));
    NAME("sldt");
    SELECTOR_INSN("sldt", T0);
    asm volatile("lldt %w0" ::"r"(0));
    SELECTOR_INSN("sldt", 0);
    NAME("str");
    SELECTOR_INSN("str", TSS_SEL);
    NAME("smsw");
    SELECTOR_INSN("smsw", (read_cr0() & 0xffff));
    write_cr0(read_cr0() | CR0_TS);
    SELECTOR_INSN("smsw", (read_cr0() & 0xffff));
    write_cr0(read_cr0() & ~(ulong)CR0_TS);
}

static void flags(void)
{
    ulong v;

    NAME("pushf");
    asm volatile(TRY(PUSHF_ "; pop %0") : "=r"(v)::"memory");
    eq("at CPL 0", v & (F_IF | F_IOPL), 0);
    for (ulong iopl = 0; iopl < 4; iopl++) {
        user_flags = F_1 | F_IF | iopl << 12;
        asm volatile(USER(PUSHF_ "; pop %0") : "=r"(v)::"memory");
        eq_trap(VEC_DONE, NONE);
        eq("the true IF and IOPL at CPL 3", v & (F_IF | F_IOPL), F_IF | iopl << 12);
    }
    NAME("popf");
    asm volatile(TRY("push %1; " POPF_ "; " PUSHF_ "; pop %0; push $2; " POPF_)
                 : "=&r"(v)
                 : "r"((ulong)(F_1 | F_IF | F_IOPL))
                 : "memory", "cc");
    eq_trap(NONE, NONE);
    eq("at CPL 0 IF and IOPL change", v & (F_IF | F_IOPL), F_IF | F_IOPL);
    user_flags = F_1;
    asm volatile(USER("push %0; " POPF_)::"r"((ulong)(F_1 | F_IF | F_IOPL | F_CF)) : "memory", "cc");
    eq_trap(VEC_DONE, NONE);
    eq("at CPL 3 they do not, and nothing is said", trap.flags & (F_IF | F_IOPL | F_CF), F_CF);
    user_flags = F_1 | F_IF;
    asm volatile(USER("push %0; " POPF_)::"r"((ulong)F_1) : "memory", "cc");
    eq_trap(VEC_DONE, NONE);
    eq("IF cannot be cleared either", trap.flags & F_IF, F_IF);
    user_flags = F_1 | F_IOPL;
    asm volatile(USER("push %0; " POPF_)::"r"((ulong)(F_1 | F_IF)) : "memory", "cc");
    eq("with IOPL 3 IF changes, IOPL does not", trap.flags & (F_IF | F_IOPL), F_IF | F_IOPL);
    user_flags = F_1;
}

/* LAR, LSL, VERR, VERW give ZF and, the first two, a value. */
#define PROBE(insn, user, sel, value)                                                                                  \
    ({                                                                                                                 \
        u8 zf;                                                                                                         \
        ulong v_ = 0xbad, s_ = (sel);                                                                                  \
        if (user)                                                                                                      \
            asm volatile(USER(insn " %k2, %k1; setz %0") : "=q"(zf), "+r"(v_) : "r"(s_) : "cc");                       \
        else                                                                                                           \
            asm volatile(TRY(insn " %k2, %k1; setz %0") : "=q"(zf), "+r"(v_) : "r"(s_) : "cc");                        \
        eq_trap((user) ? VEC_DONE : NONE, NONE);                                                                       \
        value = v_;                                                                                                    \
        zf;                                                                                                            \
    })
#define VERIFY(insn, user, sel)                                                                                        \
    ({                                                                                                                 \
        u8 zf;                                                                                                         \
        ulong s_ = (sel);                                                                                              \
        if (user)                                                                                                      \
            asm volatile(USER(insn " %w1; setz %0") : "=q"(zf) : "r"(s_) : "cc");                                      \
        else                                                                                                           \
            asm volatile(TRY(insn " %w1; setz %0") : "=q"(zf) : "r"(s_) : "cc");                                       \
        eq_trap((user) ? VEC_DONE : NONE, NONE);                                                                       \
        zf;                                                                                                            \
    })

static bool system_type_good(u32 type, bool lsl)
{
    if (sizeof(ulong) == 8)
        return type == TYPE_LDT || type == TYPE_TSS || type == TYPE_TSS_BUSY || (type == TYPE_CALL && !lsl);
    return type == TYPE_LDT || type == TYPE_TSS || type == TYPE_TSS_BUSY || type == TYPE_TSS16 ||
           type == TYPE_TSS16_BUSY || (!lsl && (type == TYPE_CALL || type == TYPE_CALL16 || type == TYPE_TASK));
}

static void probes(void)
{
    ulong v;

    /* LAR: SDM 2A; LSL: SDM 2A; VERR, VERW: SDM 2B */
    NAME("lar");
    eq("code at CPL 0: ZF", PROBE("lar", false, KCS, v), 1);
    eq("access bytes", v & 0xf0ff00, (u32)(gdt[KCS / 8] >> 32) & 0xf0ff00);
    eq("data of DPL 0 at CPL 3: ZF", PROBE("lar", true, KDS, v), 0);
    eq("nothing loaded", v, 0xbad);
    eq("data of DPL 3 at CPL 3: ZF", PROBE("lar", true, UDS, v), 1);
    eq("RPL counts at CPL 0", PROBE("lar", false, KDS | 3, v), 0);
    eq("null", PROBE("lar", false, 0, v), 0);
    eq("beyond the limit", PROBE("lar", false, 0x1ff8, v), 0);
    NAME("lsl");
    eq("scaled by G", PROBE("lsl", false, KDS, v), 1);
    eq("limit", v, 0xffffffff);
    gdt[T0 / 8] = descriptor(0, 0x12345, D_P | D_DPL(3) | D_DATA | D_W | D_DB);
    eq("in bytes", PROBE("lsl", true, T0 | 3, v), 1);
    eq("limit", v, 0x12345);
    gdt[T0 / 8] = descriptor(0, 0x12345, D_P | D_DPL(3) | D_DATA | D_W | D_DB | D_G);
    eq("in pages", PROBE("lsl", true, T0 | 3, v), 1);
    eq("limit", v, 0x12345fff);
    eq("of DPL 0 at CPL 3: ZF", PROBE("lsl", true, KDS, v), 0);
    eq("nothing loaded", v, 0xbad);
    eq("null", PROBE("lsl", false, 3, v), 0);
    NAME("verr");
    eq("data at CPL 0", VERIFY("verr", false, KDS), 1);
    eq("data of DPL 0 at CPL 3", VERIFY("verr", true, KDS), 0);
    eq("data of DPL 3 at CPL 3", VERIFY("verr", true, UDS), 1);
    eq("execute-only code", (gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_DB), VERIFY("verr", false, T0)), 0);
    eq("conforming code of DPL 0 at CPL 3",
       (gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_CODE | D_R | D_CONF | D_DB), VERIFY("verr", true, T0 | 3)), 1);
    eq("a system descriptor", VERIFY("verr", false, TSS_SEL), 0);
    eq("null", VERIFY("verr", false, 0), 0);
    NAME("verw");
    eq("data at CPL 0", VERIFY("verw", false, KDS), 1);
    eq("data of DPL 0 at CPL 3", VERIFY("verw", true, KDS), 0);
    eq("data of DPL 3 at CPL 3", VERIFY("verw", true, UDS), 1);
    eq("read-only data", (gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_DATA | D_DB), VERIFY("verw", false, T0)), 0);
    eq("code", VERIFY("verw", false, KCS), 0);

    for (u32 type = 0; type < 16; type++) {
        test("sensitive: lar and lsl of system type %d (" BITS ")", type);
        gdt[T0 / 8] = descriptor(0, 0x4321, D_P | type);
        gdt[T0 / 8 + 1] = 0;
        eq("LAR", PROBE("lar", false, T0, v), system_type_good(type, false));
        eq("LSL", PROBE("lsl", false, T0, v), system_type_good(type, true));
        eq("at CPL 3", PROBE("lar", true, T0, v), 0);
    }
}

extern char land_user[], land_kernel[];
asm("land_user: int $0x80\n"
#ifdef __x86_64__
    "land_kernel: movq trap_sp, %rsp; movl $0x101, trap; jmp *trap_fix\n");
#define SP "%%rsp"
#else
    "land_kernel: movl trap_sp, %esp; movl $0x101, trap; jmp *trap_fix\n");
#define SP "%%esp"
#endif
#define LANDED 0x101

static void segments(void)
{
    ulong v;

#ifdef __x86_64__
    NAME("push"); /* of segment registers only FS and GS are left (SDM 2B PUSH) */
    asm volatile(TRY("mov %1, %%fs; pushq %%fs; pop %0") : "=r"(v) : "r"(UDS));
    eq("at CPL 0", v, UDS);
    asm volatile(USER("pushq %%fs; pop %0") : "=r"(v));
    eq("at CPL 3", v, UDS);
    EXEC(true, 0x0e);
    eq_trap(UD, NONE);
    asm volatile("mov %0, %%fs" ::"r"(0));
    NAME("pop");
    asm volatile(TRY("push %0; popq %%fs; mov %1, %%fs")::"r"((ulong)KDS), "r"(0));
    eq_trap(NONE, NONE);
    asm volatile(USER("push %0; popq %%fs")::"r"((ulong)KDS));
    eq_trap(GP, KDS);
    asm volatile(USER("push %0; popq %%fs")::"r"((ulong)UDS));
    eq_trap(VEC_DONE, NONE);
#else
    NAME("push");
    asm volatile(TRY("pushl %%cs; pop %0") : "=r"(v));
    eq("CS at CPL 0", v & 0xffff, KCS);
    asm volatile(USER("pushl %%cs; pop %0") : "=r"(v));
    eq("CS at CPL 3 shows it", v & 0xffff, UCS);
    asm volatile(USER("pushl %%ss; pop %0") : "=r"(v));
    eq("SS at CPL 3 shows it", v & 0xffff, UDS);
    NAME("pop");
    asm volatile(TRY("push %0; popl %%fs; movw %w1, %%fs")::"r"((ulong)KDS), "r"(0));
    eq_trap(NONE, NONE);
    asm volatile(USER("push %0; popl %%fs")::"r"((ulong)KDS));
    eq_trap(GP, KDS);
    asm volatile(USER("push %0; popl %%ss")::"r"((ulong)KDS));
    eq_trap(GP, KDS);
    asm volatile(USER("push %0; popl %%ds")::"r"((ulong)UDS));
    eq_trap(VEC_DONE, NONE);
#endif
    NAME("mov");
    asm volatile(TRY("mov %%cs, %0") : "=r"(v) : "0"(0ul));
    eq("CS at CPL 0", v, KCS);
    asm volatile(USER("mov %%cs, %0") : "=r"(v) : "0"(0ul));
    eq("CS at CPL 3 shows it", v, UCS);
    asm volatile(USER("mov %%ss, %0") : "=r"(v) : "0"(0ul));
    eq("SS at CPL 3 shows it", v, UDS);
    asm volatile(USER("mov %0, %%es")::"r"(KDS));
    eq_trap(GP, KDS);
    asm volatile(USER("mov %0, %%ss")::"r"(KDS));
    eq_trap(GP, KDS);
}

static struct __attribute__((packed)) {
    u32 off;
    u16 sel;
} far_ptr;

static void transfers(void)
{
    u64 *g = &gdt[T0 / 8];

    g[0] = gate(KCS, (u32)(ulong)land_kernel, D_P | D_DPL(3) | TYPE_CALL, 0);
    g[1] = 0;
    NAME("call");
    far_ptr.off = (u32)(ulong)land_kernel;
    far_ptr.sel = KCS;
    asm volatile(TRY("lcall *(%0)")::"r"(&far_ptr) : "memory");
    eq("at CPL 0 to code of DPL 0", trap.vector, LANDED);
    asm volatile(USER("lcall *(%0)")::"r"(UPTR(&far_ptr)) : "memory");
    eq_trap(GP, KCS);
    far_ptr.sel = T0 | 3;
    asm volatile(USER("lcall *(%0)")::"r"(UPTR(&far_ptr)) : "memory");
    eq("at CPL 3 through a gate", trap.vector, LANDED);
    far_ptr.sel = UCS;
    asm volatile(TRY("lcall *(%0)")::"r"(&far_ptr) : "memory");
    eq_trap(GP, UCS & ~3);
    NAME("jmp");
    far_ptr.sel = KCS;
    asm volatile(TRY("ljmp *(%0)")::"r"(&far_ptr) : "memory");
    eq("at CPL 0 to code of DPL 0", trap.vector, LANDED);
    asm volatile(USER("ljmp *(%0)")::"r"(UPTR(&far_ptr)) : "memory");
    eq_trap(GP, KCS);
    far_ptr.sel = T0 | 3;
    asm volatile(USER("ljmp *(%0)")::"r"(UPTR(&far_ptr)) : "memory");
    eq_trap(GP, KCS);
    far_ptr.sel = UCS;
    far_ptr.off = (u32)(ulong)UPTR(land_user);
    asm volatile(USER("ljmp *(%0)")::"r"(UPTR(&far_ptr)) : "memory");
    eq_trap(VEC_DONE, NONE);
    asm volatile(TRY("ljmp *(%0)")::"r"(&far_ptr) : "memory");
    eq_trap(GP, UCS & ~3);
    NAME("int n");
    EXEC(false, 0xcd, 0x44);
    eq_trap(0x44, NONE);
    EXEC(true, 0xcd, 0x44);
    eq_trap(GP, 0x44 * 8 + 2);
    idt_set(0x44, KCS, trap_entry + 0x44 * 16, D_P | D_DPL(3) | TYPE_INT, 0);
    EXEC(true, 0xcd, 0x44);
    eq_trap(0x44, NONE);
    eq("CS saved", trap.cs, UCS);
    idt_default(0x44);
    NAME("ret");
    asm volatile(TRY("push %0; push %1; push %2; push %3; " RETF)::"r"((ulong)UDS), "r"((ulong)UPTR(user_stack_end)),
                 "r"((ulong)UCS), "r"((ulong)UPTR(land_user))
                 : "memory");
    eq_trap(VEC_DONE, NONE);
    eq("CS", trap.cs, UCS);
    asm volatile(USER("push %0; push %1; " RETF)::"r"((ulong)KCS), "r"((ulong)land_kernel) : "memory");
    eq_trap(GP, KCS);
    asm volatile(USER("push %0; push %1; " RETF)::"r"((ulong)UCS), "r"((ulong)UPTR(land_user)) : "memory");
    eq_trap(VEC_DONE, NONE);
    asm volatile(TRY("push %0; push %1; " RETF)::"r"((ulong)KCS), "r"((ulong)land_kernel) : "memory");
    eq("at CPL 0 to CPL 0", trap.vector, LANDED);
    asm volatile(USER("pushf; push %0; push %1; " IRET)::"r"((ulong)KCS), "r"((ulong)land_kernel) : "memory");
    eq_trap(GP, KCS);
}

int main(void)
{
    tables();
    selectors();
    flags();
    probes();
    segments();
    transfers();
#ifndef __x86_64__
    /* ARPL compares RPLs and nothing else: no secret in it, but a relative (SDM 2A) */
    u32 d;
    u8 zf;
    test("arpl: raises the RPL of the destination to the source's, ZF says whether (32-bit)");
    asm volatile(TRY("arpl %w2, %w0; setz %1") : "=r"(d), "=q"(zf) : "r"(3), "0"(0x60) : "cc");
    eq("selector", d & 0xffff, 0x63);
    eq("ZF", zf, 1);
    asm volatile(USER("arpl %w2, %w0; setz %1") : "=r"(d), "=q"(zf) : "r"(1), "0"(0x63) : "cc");
    eq("selector", d & 0xffff, 0x63);
    eq("ZF", zf, 0);
#endif
    done();
}
