/*
 * Real mode: addresses and their limits, the interrupt vector table, what does not exist there, the way to protected
 * mode and back, unreal mode. SDM vol. 3A 20.1, 10.9.
 */
#include "sys.h"

static void addresses(void)
{
    u32 v, w;

    test("real: linear address = selector * 16 + offset; 1 MiB is not the end");
    asm volatile(TRY("movw $0x9123, %%ax; movw %%ax, %%fs; movl $0xcafe4567, %%fs:0x10; movw $0x9000, %%ax; movw %%ax, "
                     "%%gs; movl %%gs:0x1240, %0")
                 : "=r"(v)::"eax", "memory");
    eq_trap(NONE, NONE);
    eq("value", v, 0xcafe4567);
    asm volatile(TRY("movw $0xffff, %%ax; movw %%ax, %%fs; movl $0x12345678, %%fs:0xfff0; movl $0, %0; movw $0xfff0, "
                     "%%ax; movw %%ax, %%gs; movl %%gs:0x00e0, %0")
                 : "=&r"(w)::"eax", "memory");
    eq_trap(NONE, NONE);
    must("no wrap at 1 MiB (A20 is open)", w != 0x12345678);
    test("real: an access that ends beyond FFFFh: #GP, by SS #SS (vectors 13 and 12)");
    asm volatile(TRY("movw 0xffff, %%ax")::: "eax");
    eq_trap(GP, NONE);
    asm volatile(TRY("movl 0xfffd, %%eax")::: "eax");
    eq_trap(GP, NONE);
    asm volatile(TRY("movl 0xfffc, %%eax; movb 0xffff, %%al")::: "eax");
    eq_trap(NONE, NONE);
    asm volatile(TRY("movl %%ebp, %%ecx; movw $0xffff, %%bp; movw (%%bp), %%ax; movl %%ecx, %%ebp") "movl %%ecx, "
                                                                                                    "%%ebp" ::
                                                                                                        : "eax", "ecx");
    eq_trap(SS, NONE);
    test("real: an offset of more than 16 bits: #GP");
    asm volatile(TRY("movl $0x10000, %%ebx; addr32 movb (%%ebx), %%al")::: "eax", "ebx");
    eq_trap(GP, NONE);
    test("real: 16-bit addresses wrap before the limit is looked at");
    asm volatile(TRY("movw $0x9000, %%ax; movw %%ax, %%fs; movl $0x11223344, %%fs:0x20; movw $0xfff0, %%bx; movw "
                     "$0x30, %%si; movl %%fs:(%%bx,%%si), %0")
                 : "=r"(v)::"eax", "ebx", "esi", "memory");
    eq_trap(NONE, NONE);
    eq("value", v, 0x11223344);
    test("real: running over FFFFh: #GP");
    asm volatile("movw $0x9000, %%ax; movw %%ax, %%fs; movb $0x90, %%fs:0xffff; movb $0xf, %%fs:0; movb $0xb, %%fs:1" ::
                     : "eax", "memory");
    asm volatile(TRY("ljmpw $0x9000, $0xffff")::: "memory");
    eq_trap(GP, NONE);
    eq("CS", trap.cs, 0x9000);
    test("real: the stack wraps between words, not within one");
    asm volatile(TRY("movl %%esp, %%ecx; movw %%ss, %%dx; movw $0x9000, %%ax; movw %%ax, %%ss; xorl %%esp, %%esp; "
                     "pushw $0x5678; movl %%esp, %0; popw %%ax; movw %%dx, %%ss; movl %%ecx, %%esp")
                 : "=&r"(v)::"eax", "ecx", "edx", "memory");
    eq_trap(NONE, NONE);
    eq("SP", v & 0xffff, 0xfffe);
    test("real: writes to CS's segment are allowed, and any selector can be loaded");
    asm volatile(TRY("movw $0xdead, %%ax; movw %%ax, %%fs; movw %%fs, %%cx; movb $0x55, %%cs:exec_room")
                 : "=c"(v)
                 : "0"(0)
                 : "eax", "memory");
    eq_trap(NONE, NONE);
    eq("FS", v, 0xdead);
}

u8 exec_room[16];

static void interrupts(void)
{
    u32 f, ip;

    test("real: INT n by the table at 0: FLAGS, CS, IP pushed; IF and TF clear (SDM 3A 20.1.4)");
    asm volatile(TRY("pushl $0x203; popfl; movl $9970f, %0; int $0x44; 9970:") : "=&r"(ip)::"memory", "cc");
    eq("vector", trap.vector, 0x44);
    eq("IP", trap.ip, ip);
    eq("CS", trap.cs, 0);
    eq("flags", trap.flags, 0x203);
    test("real: a handler in assembly and its IRET");
    extern char real_handler[];
    asm("jmp 1f; real_handler: pushfw; popw %bx; iretw; 1:");
    ivt_set(0x44, real_handler);
    asm volatile(TRY("pushl $0x203; popfl; int $0x44; pushfl; popl %0") : "=r"(f)::"ebx", "memory", "cc");
    eq_trap(NONE, NONE);
    eq("flags restored", f & 0x203, 0x203);
    asm volatile(TRY("pushl $0x203; popfl; movl $0, %%ebx; int $0x44; cli") : "=b"(f)::"memory", "cc");
    eq("flags inside", f & 0x203, 3);
    ivt_default(0x44);
    test("real: INT3, INTO, #DE, #UD, #BR, ICEBP");
    asm volatile(TRY("int3")::: "memory");
    eq_trap(BP, NONE);
    asm volatile(TRY("movb $0x7f, %%al; incb %%al; into")::: "eax", "cc");
    eq_trap(OF, NONE);
    asm volatile(TRY("movl $9970f, %0; xorw %%cx, %%cx; 9970: divw %%cx") : "=&b"(ip)::"eax", "ecx", "edx", "cc");
    eq_trap(DE, NONE);
    eq("IP of the fault", trap.ip, ip);
    asm volatile(TRY("ud2")::: "memory");
    eq_trap(UD, NONE);
    static short pair[2] = {1, 5};
    asm volatile(TRY("movw $6, %%ax; boundw %%ax, (%%bx)")::"b"(pair) : "eax");
    eq_trap(BR, NONE);
    asm volatile(TRY(".byte 0xf1")::: "memory");
    eq_trap(DB, NONE);
    test("real: a vector beyond the IDT limit: #GP; if that is beyond too, vector 8");
    struct table_reg r = {0x3ff, 0};
    r.limit = 14 * 4 - 1;
    lidt(&r);
    asm volatile(TRY("int $0x44")::: "memory");
    eq_trap(GP, NONE);
    r.limit = 9 * 4 - 1;
    lidt(&r);
    asm volatile(TRY("int $0x44")::: "memory");
    eq("#GP beyond the limit", trap.vector, DF);
    test("real: the table is where LIDT says");
    static u32 table[16] __attribute__((aligned(4)));
    table[5] = ((volatile u32 *)0)[0x33];
    r.limit = sizeof(table) - 1;
    r.base = (u32)table;
    lidt(&r);
    asm volatile(TRY("int $5")::: "memory");
    r.limit = 0x3ff;
    r.base = 0;
    lidt(&r);
    eq_trap(0x33, NONE);
    test("real: single-step");
    trap_hook = NULL;
    asm volatile(TRY("pushl $0x102; popfl; 9970: nop; nop")::: "memory", "cc");
    eq_trap(DB, NONE);
    eq("TF saved", trap.flags & F_TF, F_TF);
    test("real: STI, POPF, IRET and HLT ask for no privilege; IOPL and NT can be set");
    asm volatile(TRY("pushl $0x7002; popfl; pushfl; popl %0; pushl $2; popfl") : "=r"(f)::"memory", "cc");
    eq("flags", f, 0x7002);
}

static void absent(void)
{
    static const struct {
        const char *name;
        u8 n, b[6];
    } op[] = {
        {"LLDT", 3, {0x0f, 0x00, 0xd0}}, {"LTR", 3, {0x0f, 0x00, 0xd8}},        {"SLDT", 3, {0x0f, 0x00, 0xc0}},
        {"STR", 3, {0x0f, 0x00, 0xc8}},  {"VERR", 3, {0x0f, 0x00, 0xe0}},       {"VERW", 3, {0x0f, 0x00, 0xe8}},
        {"LAR", 3, {0x0f, 0x02, 0xc0}},  {"LSL", 3, {0x0f, 0x03, 0xc0}},        {"ARPL", 2, {0x63, 0xc0}},
        {"SYSRET", 2, {0x0f, 0x07}},     {"VZEROUPPER", 3, {0xc5, 0xf8, 0x77}}, {"LOCK NOP", 2, {0xf0, 0x90}},
    };
    static u8 code[16];
    for (unsigned i = 0; i < ARRAY_SIZE(op); i++) {
        test("real: %s is #UD", op[i].name);
        memcpy(code, op[i].b, op[i].n);
        code[op[i].n] = 0xc3;
        asm volatile(TRY("callw *%0")::"r"((u16)(u32)code) : "eax", "ecx", "edx", "memory", "cc");
        eq_trap(UD, NONE);
        eq("IP", trap.ip, (u32)code);
    }
    test("real: SYSENTER and SYSEXIT are #GP");
    asm volatile(TRY("sysenter")::: "memory");
    eq_trap(GP, NONE);
    asm volatile(TRY("sysexit")::: "memory");
    eq_trap(GP, NONE);
    test("real: SGDT, SIDT, LGDT, LIDT, SMSW, LMSW, MOV CR work");
    static struct __attribute__((packed)) {
        u16 limit;
        u32 base;
        u16 behind;
    } r = {0x123, 0x89abcdef, 0xaaaa}, s = {0, 0, 0xbbbb};
    asm volatile(TRY("lgdtw %1; sgdtl %0") : "=m"(s) : "m"(r));
    eq_trap(NONE, NONE);
    eq("LGDT with 16-bit operands takes 24 bits of base", s.base, 0x00abcdef);
    eq("limit", s.limit, 0x123);
    eq("behind", s.behind, 0xbbbb);
    asm volatile(TRY("lgdtl %1; sgdtl %0") : "=m"(s) : "m"(r));
    eq("32 bits", s.base, 0x89abcdef);
    u32 v;
    asm volatile(TRY("smsw %w0") : "=r"(v) : "0"(0));
    eq("SMSW: PE", v & 1, 0);
    asm volatile(TRY("movl %%cr0, %0") : "=r"(v));
    eq_trap(NONE, NONE);
    eq("PE", v & 1, 0);
}

/* Protected mode for a moment: descriptor caches survive the return to real mode. */
static u64 gdt16[] __attribute__((aligned(8))) = {
    0, 0x00cf92000000ffff /* flat data */, 0x00009a000000ffff /* 16-bit code */, 0x000092000000ffff /* 64 KiB data */};

static void unreal(void)
{
    u32 v;
    struct table_reg g = {sizeof(gdt16) - 1, (u32)gdt16};

    lgdt(&g);
    test("unreal: a limit of 4 GiB loaded in protected mode stays in real mode, with the old base until the next load");
    *(volatile u32 *)0x500 = *(volatile u32 *)0x500;
    asm volatile(TRY("cli; movl %%cr0, %%eax; orb $1, %%al; movl %%eax, %%cr0; ljmpw $0x10, $9970f; 9970: movw $8, "
                     "%%bx; movw %%bx, %%fs; andb $0xfe, %%al; movl %%eax, %%cr0; ljmpw $0, $9971f; 9971:"
                     "movl $0x200000, %%ebx; movl $0x600df00d, %%fs:(%%ebx); movl %%fs:(%%ebx), %0")
                 : "=r"(v)::"eax", "ebx", "memory");
    eq_trap(NONE, NONE);
    eq("value at 2 MiB", v, 0x600df00d);
    test("unreal: a load in real mode sets base and selector, and keeps the limit");
    asm volatile(TRY("movw $0x1000, %%ax; movw %%ax, %%fs; movl $0x1f0000, %%ebx; movl %%fs:(%%ebx), %0")
                 : "=r"(v)::"eax", "ebx", "memory");
    eq_trap(NONE, NONE);
    eq("value", v, 0x600df00d);
    test("unreal: back to 64 KiB by a load in protected mode");
    asm volatile(TRY("cli; movl %%cr0, %%eax; orb $1, %%al; movl %%eax, %%cr0; ljmpw $0x10, $9970f; 9970: movw $0x18, "
                     "%%bx; movw %%bx, %%fs; andb $0xfe, %%al; movl %%eax, %%cr0; ljmpw $0, $9971f; 9971:"
                     "movl $0x10000, %%ebx; movb %%fs:(%%ebx), %%al")::
                     : "eax", "ebx", "memory");
    eq_trap(GP, NONE);
    asm volatile("xorw %%ax, %%ax; movw %%ax, %%fs" ::: "eax");
    test("unreal: protected mode before the far jump still runs 16-bit code; CPL is 0");
    asm volatile(TRY("cli; movl %%cr0, %%eax; orb $1, %%al; movl %%eax, %%cr0; nop; movw $0x1234, %%cx; smsw %%bx; "
                     "andb $0xfe, %%al; movl %%eax, %%cr0; nop")
                 : "=b"(v)::"eax", "ecx", "memory");
    eq_trap(NONE, NONE);
    eq("PE", v & 1, 1);
    test("real: MOV CR0 with PG and without PE: #GP; LMSW cannot clear PE");
    asm volatile(TRY("movl %%cr0, %%eax; orl $0x80000000, %%eax; movl %%eax, %%cr0")::: "eax");
    eq_trap(GP, NONE);
}

static void transfers(void)
{
    u32 v, w;

    test("real: far CALL and RET, far JMP with 16 and 32-bit operands");
    asm volatile(TRY("movw $0, %%ax; lcallw $0, $9970f; jmp 9971f; 9970: movw %%sp, %%bx; movw (%%bx), %%cx; movw "
                     "2(%%bx), %%dx; lretw; 9971: subw $9971f, %%cx; 9971:")
                 : "=c"(v), "=d"(w)::"eax", "ebx", "memory", "cc");
    eq_trap(NONE, NONE);
    eq("CS pushed", w & 0xffff, 0);
    asm volatile(TRY("lcalll $0, $9970f; jmp 9971f; 9970: movl %%esp, %%ebx; movl 4(%%ebx), %%edx; lretl; 9971:")
                 : "=d"(w)::"ebx", "memory");
    eq("CS pushed as 32 bits", w & 0xffff, 0);
    asm volatile(TRY("ljmpw $0x100, $9970f - 0x1000; 9970: movw %%cs, %%ax; ljmpw $0, $9971f; 9971:")
                 : "=a"(v)
                 : "0"(0)
                 : "memory");
    eq("CS", v, 0x100);
    test("real: a far jump to an offset above FFFFh: #GP");
    asm volatile(TRY("ljmpl $0, $0x12345")::: "memory");
    eq_trap(GP, NONE);
    test("real: LDS, LES, LSS, LFS, LGS");
    static u32 ptr = 0x12345678;
    asm volatile(TRY("lfsw %2, %%ax; movw %%fs, %%cx") : "=a"(v), "=c"(w) : "m"(ptr), "0"(0), "1"(0));
    eq("offset", v, 0x5678);
    eq("selector", w, 0x1234);
}

int main(void)
{
    addresses();
    interrupts();
    absent();
    transfers();
    unreal();
    switch (run_case()) {
    case 0:
        expect_shutdown("real: an exception with an IDT of limit 0 shuts down");
        static struct table_reg none;
        asm volatile("lidtl %0; int3" ::"m"(none));
        break;
    }
    done();
}
