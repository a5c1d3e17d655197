/*
 * Segmentation in 32-bit protected mode: limits, types, privilege, null selectors, the accessed bit, stack sizes. SDM
 * vol. 3A 3.4, chapter 5.
 */
#include "sys.h"

enum { RD1, RD2, RD4, WR1, WR2, WR4, KINDS };
static const u8 size_of[KINDS] = {1, 2, 4, 1, 2, 4};
static const char *const kind_name[KINDS] = {"read 1", "read 2", "read 4", "write 1", "write 2", "write 4"};

static void fs_access(u16 sel, u32 off, int kind, bool user)
{
#define DO(insn)                                                                                                       \
    do {                                                                                                               \
        if (user)                                                                                                      \
            asm volatile(USER("movw %w0, %%fs; " insn)::"r"(sel), "r"(off) : "eax", "memory");                         \
        else                                                                                                           \
            asm volatile(TRY("movw %w0, %%fs; " insn)::"r"(sel), "r"(off) : "eax", "memory");                          \
    } while (0)
    switch (kind) {
    case RD1: DO("movb %%fs:(%1), %%al"); break;
    case RD2: DO("movw %%fs:(%1), %%ax"); break;
    case RD4: DO("movl %%fs:(%1), %%eax"); break;
    case WR1: DO("movb $0, %%fs:(%1)"); break;
    case WR2: DO("movw $0, %%fs:(%1)"); break;
    case WR4: DO("movl $0, %%fs:(%1)"); break;
    }
    if (trap.vector == VEC_DONE)
        trap.vector = NONE;
    asm volatile("movw %w0, %%fs" ::"r"(0));
}

static void expect(u16 sel, u32 off, int kind, bool bad)
{
    fs_access(sel, off, kind, false);
    if (trap.vector == (bad ? GP : NONE) && (!bad || trap.error == 0))
        return;
    must(kind_name[kind], false);
    eq("offset", 0, off);
    eq("vector", trap.vector, bad ? GP : NONE);
}

/* All accesses around the edge of a segment whose valid offsets are low..high (inclusive). */
static void edges(const char *name, u32 base, u32 field, u32 type, u32 low, u32 high)
{
    test("limits: %s", name);
    gdt[T0 / 8] = descriptor(base, field, D_P | type);
    for (int kind = 0; kind < KINDS; kind++) {
        u32 n = size_of[kind];
        for (u32 d = 0; d < 6; d++) {
            u32 at[2] = {high - 3 + d, low - 3 + d};
            for (int i = 0; i < 2; i++) {
                u32 o = at[i];
                if (o + n - 1 < o)
                    continue; /* wraps: either way is allowed (SDM 3A 5.3) */
                if (!i && low == 0 && high == 0xffffffff)
                    continue;
                expect(T0, o, kind, o < low || o + n - 1 > high);
            }
        }
    }
}

static u8 area[16384] __attribute__((aligned(4096)));

static void limits(void)
{
    u32 b = (u32)area;

    edges("expand-up, bytes", b, 0x123, D_DATA | D_W | D_DB, 0, 0x123);
    edges("expand-up, limit 0", b, 0, D_DATA | D_W | D_DB, 0, 0);
    edges("expand-up, D = 0: the same", b, 0x123, D_DATA | D_W, 0, 0x123);
    edges("expand-up, limit of 64 KiB - 1", b, 0xffff, D_DATA | D_W | D_DB, 0, 0xffff);
    edges("expand-up, pages: the low 12 bits of the limit are ones", b, 1, D_DATA | D_W | D_DB | D_G, 0, 0x1fff);
    edges("expand-up, pages, limit field 0", b, 0, D_DATA | D_W | D_DB | D_G, 0, 0xfff);
    edges("expand-down, 16-bit: above the limit up to FFFFh", b - 0x8000, 0x8fff, D_DATA | D_W | D_DOWN, 0x9000,
          0xffff);
    edges("expand-down, limit FFFFh of 16 bits: nothing", b, 0xffff, D_DATA | D_W | D_DOWN, 0x10000, 0xffff);
    edges("expand-down, 32-bit: above the limit up to FFFFFFFFh", b + 0x2000, 0xfffef,
          D_DATA | D_W | D_DOWN | D_DB | D_G, 0xffff0000, 0xffffffff);
    edges("expand-down, 32-bit, bytes", b - 0x8000, 0x8fff, D_DATA | D_W | D_DOWN | D_DB, 0x9000, 0xffffffff);
    test("limits: base plus offset wraps at 4 GiB");
    gdt[T0 / 8] = descriptor(b + 0x1000, 0xfffff, D_P | D_DATA | D_W | D_DB | D_G);
    *(u32 *)(area + 0x234) = 0x76543210;
    u32 v;
    asm volatile(TRY("movw %w1, %%fs; movl %%fs:(%2), %0") : "=&r"(v) : "r"(T0), "r"(0xfffff234));
    eq_trap(NONE, NONE);
    eq("value", v, 0x76543210);
    test("limits: 16-bit addresses wrap at 64 KiB within the segment");
    gdt[T0 / 8] = descriptor(b, 0xffff, D_P | D_DATA | D_W);
    asm volatile(TRY("movw %w1, %%fs; addr16 movl %%fs:-8(%%bx,%%si), %0")
                 : "=&r"(v)
                 : "r"(T0), "b"(0x1234f23c), "S"(0xabcd1000));
    eq_trap(NONE, NONE);
    eq("value", v, 0x76543210);
    asm volatile("movw %w0, %%fs" ::"r"(0));
    test("limits: a changed descriptor counts from the next load on");
    gdt[T0 / 8] = descriptor(b, 0xffff, D_P | D_DATA | D_W | D_DB);
    asm volatile("movw %w0, %%fs" ::"r"(T0));
    gdt[T0 / 8] = 0;
    asm volatile(TRY("movl %%fs:0x234, %0") : "=r"(v));
    eq_trap(NONE, NONE);
    eq("value", v, 0x76543210);
    asm volatile("movw %w0, %%fs" ::"r"(0));
}

static void types(void)
{
    u32 b = (u32)area;

    test("types: null selector: loading is good, using is #GP(0), for each RPL");
    for (u16 rpl = 0; rpl < 4; rpl++) {
        asm volatile(TRY("movw %w0, %%fs")::"r"(rpl));
        eq_trap(NONE, NONE);
        expect(rpl, 0, RD1, true);
    }
    test("types: read-only data cannot be written");
    gdt[T0 / 8] = descriptor(b, 0xfff, D_P | D_DATA | D_DB);
    expect(T0, 0, RD4, false);
    expect(T0, 0, WR4, true);
    test("types: readable code can be read, not written");
    gdt[T0 / 8] = descriptor(b, 0xfff, D_P | D_CODE | D_R | D_DB);
    expect(T0, 0, RD4, false);
    expect(T0, 0, WR4, true);
    expect(T0, 0x1000, RD1, true);
    test("types: execute-only code cannot be loaded: #GP(selector)");
    gdt[T0 / 8] = descriptor(b, 0xfff, D_P | D_CODE | D_DB);
    asm volatile(TRY("movw %w0, %%fs")::"r"(T0));
    eq_trap(GP, T0);
    test("types: system descriptors cannot be loaded: #GP(selector)");
    for (u32 t = 0; t < 16; t++) {
        gdt[T0 / 8] = descriptor(b, 0xfff, D_P | t);
        asm volatile(TRY("movw %w0, %%fs")::"r"(T0));
        eq_trap(GP, T0);
    }
    test("types: execute-only code cannot be read through CS: #GP(0)");
    static u8 code[] __attribute__((aligned(16))) = {0x2e, 0xa1, 0, 0, 0, 0, 0xcb}; /* movl %cs:0, %eax; lret */
    gdt[T0 / 8] = descriptor((u32)code, sizeof(code) - 1, D_P | D_CODE | D_DB);
    asm volatile(TRY("lcall $" STR(0x60) ", $0")::: "eax", "memory");
    eq_trap(GP, 0);
    eq("CS", trap.cs, T0);
    gdt[T0 / 8] = descriptor((u32)code, sizeof(code) - 1, D_P | D_CODE | D_R | D_DB);
    asm volatile(TRY("lcall $" STR(0x60) ", $0")::: "eax", "memory");
    eq_trap(NONE, NONE);
    test("types: not present: #NP(selector), after type and privilege");
    gdt[T0 / 8] = descriptor(b, 0xfff, D_DATA | D_W | D_DB);
    asm volatile(TRY("movw %w0, %%fs")::"r"(T0));
    eq_trap(NP, T0);
    asm volatile(TRY("movw %w0, %%fs")::"r"(T0 | 3));
    eq_trap(GP, T0);
    gdt[T0 / 8] = descriptor(b, 0xfff, D_CODE | D_DB);
    asm volatile(TRY("movw %w0, %%fs")::"r"(T0));
    eq_trap(GP, T0);
    test("types: beyond the GDT's limit, in a null LDT: #GP(selector without RPL)");
    asm volatile(TRY("movw %w0, %%fs")::"r"(GDT_SLOTS * 8 + 3));
    eq_trap(GP, GDT_SLOTS * 8);
    asm volatile(TRY("movw %w0, %%fs")::"r"(0x17));
    eq_trap(GP, 0x14);
    test("types: the last byte of the descriptor must be inside the limit");
    struct table_reg r = {T0 + 7, (u32)gdt};
    gdt[T0 / 8] = descriptor(b, 0xfff, D_P | D_DATA | D_W | D_DB);
    lgdt(&r);
    asm volatile(TRY("movw %w0, %%fs")::"r"(T0));
    eq_trap(NONE, NONE);
    r.limit--;
    lgdt(&r);
    asm volatile(TRY("movw %w0, %%fs")::"r"(T0));
    eq_trap(GP, T0);
    lgdt(&gdt_reg);
}

/* SDM 3A 5.5 to 5.7: DPL >= max(CPL, RPL), for conforming code anything. */
static void privilege(void)
{
    for (int user = 0; user < 2; user++)
        for (u32 dpl = 0; dpl < 4; dpl++) {
            test("privilege: loading DS-like segments of DPL %d at CPL %d with each RPL", dpl, user * 3);
            for (u16 rpl = 0; rpl < 4; rpl++) {
                u16 sel = T0 | rpl;
                u32 need = user ? 3 : rpl;
                for (int type = 0; type < 3; type++) {
                    u32 acc = type == 0 ? D_DATA | D_W : type == 1 ? D_CODE | D_R : D_CODE | D_R | D_CONF;
                    bool good = type == 2 || dpl >= need;
                    gdt[T0 / 8] = descriptor((u32)area, 0xfff, D_P | D_DPL(dpl) | D_DB | acc);
                    fs_access(sel, 0, RD4, user);
                    eq_trap(good ? NONE : GP, good ? NONE : T0);
                    eq("accessed", gdt[T0 / 8] >> 40 & 1, good);
                }
            }
        }
    for (int user = 0; user < 2; user++) {
        test("privilege: SS at CPL %d: RPL and DPL must be CPL, type writable data", user * 3);
        for (u32 dpl = 0; dpl < 4; dpl++)
            for (u16 rpl = 0; rpl < 4; rpl++)
                for (int type = 0; type < 3; type++) {
                    u32 acc = type == 0 ? D_DATA | D_W : type == 1 ? D_DATA : D_CODE | D_R;
                    bool good = type == 0 && dpl == (u32)user * 3 && rpl == user * 3;
                    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(dpl) | D_DB | D_G | acc);
                    if (user)
                        asm volatile(USER("movw %w0, %%ss")::"r"(T0 | rpl));
                    else
                        asm volatile(TRY("movw %w0, %%ss; movw %w1, %%ss")::"r"(T0 | rpl), "r"(KDS));
                    eq_trap(good ? user ? VEC_DONE : NONE : GP, good ? NONE : T0);
                }
    }
    test("privilege: SS null #GP(0), not present #SS(selector)");
    asm volatile(TRY("movw %w0, %%ss")::"r"(0));
    eq_trap(GP, 0);
    asm volatile(USER("movw %w0, %%ss")::"r"(3));
    eq_trap(GP, 0);
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_DATA | D_W | D_DB | D_G);
    asm volatile(TRY("movw %w0, %%ss")::"r"(T0));
    eq_trap(SS, T0);
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_DATA | D_DB | D_G);
    asm volatile(TRY("movw %w0, %%ss")::"r"(T0));
    eq_trap(GP, T0);
}

/* At CPL 3, so that the catcher has a good stack whatever SS is. */
static void stacks(void)
{
    u32 b = (u32)area, sp;

    gdt[T0 / 8] = descriptor(b, 0xfff, D_P | D_DPL(3) | D_DATA | D_W | D_DB);
    test("stack: an access beyond the limit: #SS(0), ESP as it was");
    asm volatile(USER("movw %w0, %%ss; movl $0x1002, %%esp; pushl %%eax")::"r"(T0 | 3) : "memory");
    eq_trap(SS, 0);
    eq("ESP", trap.sp, 0x1002);
    asm volatile(USER("movw %w0, %%ss; movl $0xffd, %%esp; popl %%eax")::"r"(T0 | 3) : "memory", "eax");
    eq_trap(SS, 0);
    eq("ESP", trap.sp, 0xffd);
    asm volatile(USER("movw %w0, %%ss; movl $0x1000, %%esp; pushl %%eax; popl %%eax; pushw %%ax; popw %%ax; movl "
                      "%%ebp, %%edx; movl $0xffd, %%ebp; movl (%%ebp), %%ecx") "movl %%edx, %%ebp" ::"r"(T0 | 3)
                 : "memory", "eax", "ecx", "edx");
    eq_trap(SS, 0);
    eq("ESP", trap.sp, 0x1000);
    test("stack: PUSH at ESP = 0 wraps and is beyond the limit");
    asm volatile(USER("movw %w0, %%ss; xorl %%esp, %%esp; pushl %%eax")::"r"(T0 | 3) : "memory");
    eq_trap(SS, 0);
    eq("ESP", trap.sp, 0);
    test("stack: CALL that cannot push does not branch");
    asm volatile(USER("movw %w0, %%ss; xorl %%esp, %%esp; call 9970f; 9970: nop")::"r"(T0 | 3) : "memory");
    eq_trap(SS, 0);
    eq("ESP", trap.sp, 0);
    test("stack: PUSHA that does not fit writes nothing of ESP; POPA neither");
    asm volatile(USER("movw %w0, %%ss; movl $0x1004, %%esp; pushal")::"r"(T0 | 3) : "memory");
    eq_trap(SS, 0);
    eq("ESP", trap.sp, 0x1004);
    test("stack: with B = 0 PUSH and POP use SP; the upper half of ESP stays, and SP wraps at 64 KiB");
    gdt[T0 / 8] = descriptor(b - 0xf000, 0xffff, D_P | D_DPL(3) | D_DATA | D_W);
    asm volatile(USER("movw %w1, %%ss; movl $0x12340000, %%esp; pushl $0x55aa1234; movl %%esp, %0; popl %%ecx")
                 : "=&r"(sp)
                 : "r"(T0 | 3)
                 : "memory", "ecx");
    eq("ESP after PUSH", sp, 0x1234fffc);
    eq_trap(VEC_DONE, NONE);
    eq("ESP after POP", trap.sp, 0x12340000);
    eq("memory", *(u32 *)(area + 0xffc), 0x55aa1234);
    test("stack: ENTER and LEAVE with B = 0 use BP and SP");
    asm volatile(USER("movl %%ebp, %%edx; movw %w1, %%ss; movl $0x1234fff0, %%esp; movl $0x5678fff8, %%ebp; enterl "
                      "$16, $0; movl %%esp, %0; movl %%ebp, %%ecx; leave; movl %%edx, %%ebp; int $0x80")
                 : "=&a"(sp)
                 : "r"(T0 | 3)
                 : "memory", "ecx", "edx");
    eq_trap(VEC_DONE, NONE);
    eq("ESP inside", sp, 0x1234ffdc);
    eq("ESP after", trap.sp, 0x1234fff0);
    test("stack: expand-down");
    gdt[T0 / 8] = descriptor(b - 0x10000, 0xefff, D_P | D_DPL(3) | D_DATA | D_W | D_DOWN | D_DB);
    asm volatile(USER("movw %w0, %%ss; movl $0xf004, %%esp; pushl $1; pushl $2")::"r"(T0 | 3) : "memory");
    eq_trap(SS, 0);
    eq("ESP", trap.sp, 0xf000);
    test("stack: PUSH of a segment register moves ESP by the operand size");
    asm volatile(USER("movl %%esp, %0; pushl %%ds; subl %%esp, %0; popl %%ecx") : "=&r"(sp)::"ecx", "memory");
    eq("bytes", sp, 4);
    asm volatile(USER("movl %%esp, %0; pushw %%ds; subl %%esp, %0; popw %%cx") : "=&r"(sp)::"ecx", "memory");
    eq("bytes with 66h", sp, 2);
}

static void code_limits(void)
{
    static u8 code[32] __attribute__((aligned(16)));
    u64 keep = gdt[T0 / 8];

    /* code of CPL 3 in a segment of 16 bytes; the catcher has its own stack */
#define RUN16(...)                                                                                                     \
    do {                                                                                                               \
        static const u8 bytes[] = {__VA_ARGS__};                                                                       \
        memset(code, 0x90, sizeof(code));                                                                              \
        memcpy(code, bytes, sizeof(bytes));                                                                            \
        gdt[T0 / 8] = descriptor((u32)code, 15, D_P | D_DPL(3) | D_CODE | D_R | D_DB);                                 \
        asm volatile(TRY("pushl $0x23; pushl $user_stack_end; pushl $2; pushl %0; pushl $0; iretl")::"r"(T0 | 3)       \
                     : "memory");                                                                                      \
    } while (0)
    test("code limit: running off the end: #GP(0) with EIP behind the limit");
    code[16] = 0x0f, code[17] = 0x0b;
    RUN16(0x90);
    eq_trap(GP, 0);
    eq("EIP", trap.ip, 16);
    test("code limit: an instruction that straddles the limit: #GP(0) at its beginning");
    RUN16(0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xb8, 1, 2);
    eq_trap(GP, 0);
    eq("EIP", trap.ip, 13);
    test("code limit: JMP, CALL, Jcc beyond the limit: #GP(0) at the branch");
    RUN16(0xeb, 0x20);
    eq_trap(GP, 0);
    eq("EIP of JMP", trap.ip, 0);
    RUN16(0x90, 0xe8, 0x20, 0, 0, 0);
    eq_trap(GP, 0);
    eq("EIP of CALL", trap.ip, 1);
    eq("ESP", trap.sp, (u32)user_stack_end);
    RUN16(0x31, 0xc0, 0x74, 0x20);
    eq_trap(GP, 0);
    eq("EIP of JZ", trap.ip, 2);
    RUN16(0x68, 0x20, 0, 0, 0, 0xc3);
    eq_trap(GP, 0);
    eq("EIP of RET", trap.ip, 5);
    eq("ESP of RET", trap.sp, (u32)user_stack_end - 4);
    test("code limit: a branch not taken does not count");
    RUN16(0x31, 0xc0, 0x75, 0x20, 0xcd, 0x80);
    eq_trap(VEC_DONE, NONE);
    test("code limit: JMP to the last byte");
    RUN16(0xeb, 0x0d, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xf4);
    eq_trap(GP, 0);
    eq("EIP of HLT", trap.ip, 15);
    test("code limit: a branch with 16-bit operand size cuts EIP");
    RUN16(0x66, 0xe9, 0xf0, 0x7f);
    eq_trap(GP, 0);
    RUN16(0xb8, 0x0a, 0, 1, 0, 0x66, 0xff, 0xe0, 0x90, 0x90, 0xcd, 0x80);
    eq_trap(VEC_DONE, NONE);
    gdt[T0 / 8] = keep;
}

static void code16(void)
{
    u32 v;

    test("16-bit code: operand and address size are 16 bits, prefixes turn them");
    static const u8 bytes[] = {
        0xb8, 0x34, 0x12, 0x66, 0xb9, 0x78, 0x56,
        0x34, 0x12, 0x67, 0x8b, 0x13, 0x66, 0xcb}; /* mov $1234h, %ax; mov $12345678h, %ecx; mov (%ebx), %dx; lretl */
    static u16 word = 0xbeef;
    u32 c, d;
    gdt[T0 / 8] = descriptor((u32)bytes, sizeof(bytes) - 1, D_P | D_CODE | D_R);
    asm volatile(TRY("lcall $0x60, $0")
                 : "=a"(v), "=c"(c), "=d"(d)
                 : "0"(0xffffffff), "1"(0xffffffff), "2"(0xffffffff), "b"(&word)
                 : "memory");
    eq_trap(NONE, NONE);
    eq("EAX", v, 0xffff1234);
    eq("ECX", c, 0x12345678);
    eq("EDX", d, 0xffffbeef);
}

static void far_loads(void)
{
    static struct __attribute__((packed)) {
        u32 off;
        u16 sel;
    } p = {0x12345678, 0};
    u32 v, sel;

    test("far pointers: LFS, LES load register and segment; a fault loads neither");
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_P | D_DPL(3) | D_DATA | D_W | D_DB | D_G);
    p.sel = T0;
    asm volatile(TRY("lfs %2, %0; movl %%fs, %1") : "=&r"(v), "=&r"(sel) : "m"(p));
    eq_trap(NONE, NONE);
    eq("offset", v, 0x12345678);
    eq("selector", sel, T0);
    p.sel = 0x1ff8;
    v = 7;
    asm volatile(TRY("lfs %2, %0") "movl %%fs, %1" : "+&r"(v), "=&r"(sel) : "m"(p));
    eq_trap(GP, 0x1ff8);
    eq("offset", v, 7);
    test("far pointers: LSS");
    p.sel = KDS;
    p.off = 0x5000;
    asm volatile(TRY("movl %%esp, %0; lss %2, %%esp; movl %%esp, %1; movl %0, %%esp") : "=&r"(v), "=&r"(sel) : "m"(p));
    eq_trap(NONE, NONE);
    eq("ESP", sel, 0x5000);
    test("far pointers: LSS, LFS, LGS by a register: #UD");
    EXEC(false, 0x0f, 0xb4, 0xe0);
    eq_trap(UD, NONE);
    EXEC(false, 0x0f, 0xb5, 0xe0);
    eq_trap(UD, NONE);
    EXEC(false, 0x0f, 0xb2, 0xe0);
    eq_trap(UD, NONE);
    asm volatile("movw %w0, %%fs" ::"r"(0));
}

int main(void)
{
    limits();
    types();
    privilege();
    stacks();
    code_limits();
    code16();
    far_loads();
    done();
}
