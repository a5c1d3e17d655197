/*
 * Ports: IOPL and the I/O permission map, widths, INS and OUTS with REP and faults. SDM vol. 1 chapter 19; vol. 2 IN,
 * OUT, INS, OUTS. The machine's ports E0h..E7h keep what is written.
 */
#include "sys.h"

static void permission(void)
{
    for (int iopl = 0; iopl <= 3; iopl++) {
        test("io: CPL 3 with IOPL %d: the map is asked when CPL > IOPL", iopl);
        user_flags = F_1 | (ulong)iopl << 12;
        asm volatile(USER("inb $0xe0, %%al")::: "rax");
        eq_trap(iopl == 3 ? VEC_DONE : GP, iopl == 3 ? NONE : 0);
        asm volatile(USER("outb %%al, $0xe0")::: "rax");
        eq_trap(iopl == 3 ? VEC_DONE : GP, iopl == 3 ? NONE : 0);
    }
    user_flags = F_1;
    test("io: a clear bit lets one port through; a wider access needs all its bits");
    tss.io[0xe0 / 8] = 0xff & ~0x06; /* E1, E2 */
    asm volatile(USER("inb $0xe1, %%al; inb $0xe2, %%al")::: "rax");
    eq_trap(VEC_DONE, NONE);
    asm volatile(USER("inb $0xe0, %%al")::: "rax");
    eq_trap(GP, 0);
    asm volatile(USER("inw $0xe1, %%ax")::: "rax");
    eq_trap(VEC_DONE, NONE);
    asm volatile(USER("inw $0xe2, %%ax")::: "rax");
    eq_trap(GP, 0);
    asm volatile(USER("inl $0xe1, %%eax")::: "rax");
    eq_trap(GP, 0);
    tss.io[0xe0 / 8] = 0;
    asm volatile(USER("inl $0xe1, %%eax; outl %%eax, $0xe4")::: "rax");
    eq_trap(VEC_DONE, NONE);
    test("io: by DX; the last ports of the map");
    tss.io[8191] = 0x7f;
    asm volatile(USER("inb %%dx, %%al")::"d"(0xffff) : "rax");
    eq_trap(VEC_DONE, NONE);
    asm volatile(USER("inw %%dx, %%ax")::"d"(0xfffe) : "rax");
    eq_trap(GP, 0); /* bit of FFFEh is set */
    tss.io[8191] = 0xff;
    test("io: the map ends with the TSS's limit: ports beyond it are closed");
    u32 base = (u32)(tss.io - (u8 *)&tss);
    tss_limit(base + 0xe0 / 8 + 1); /* two bytes are read: the port's and the next */
    asm volatile(USER("inb $0xe0, %%al")::: "rax");
    eq_trap(VEC_DONE, NONE);
    tss_limit(base + 0xe0 / 8);
    asm volatile(USER("inb $0xe0, %%al")::: "rax");
    eq_trap(GP, 0);
    tss_limit(sizeof(tss) - 1);
    test("io: a map base beyond the limit: no map, all closed");
    u16 keep = tss.iomap;
    tss.iomap = 0xffff;
    asm volatile(USER("inb $0xe0, %%al")::: "rax");
    eq_trap(GP, 0);
    tss.iomap = keep;
    test("io: CPL 0 asks nothing");
    tss.io[0xe0 / 8] = 0xff;
    asm volatile(TRY("inb $0xe0, %%al")::: "rax");
    eq_trap(NONE, NONE);
}

static bool has_store(void)
{
    outb(0xe3, 0x5a);
    outb(0xe4, 0xa5);
    return inb(0xe3) == 0x5a && inb(0xe4) == 0xa5;
}

static void widths(void)
{
    ulong a = ~0ul;

    test("io: IN of 8, 16 bits keeps the rest of RAX, of 32 clears the upper half");
    outl(0xe0, 0x44332211);
    asm volatile("inb $0xe0, %%al" : "+a"(a));
    eq("8", a, 0xffffffffffffff11);
    asm volatile("inw $0xe0, %%ax" : "+a"(a));
    eq("16", a, 0xffffffffffff2211);
    asm volatile("inl $0xe0, %%eax" : "+a"(a));
    eq("32", a, 0x44332211);
    a = ~0ul;
    asm volatile(".byte 0x48, 0xe5, 0xe0" : "+a"(a)); /* REX.W: still 32 */
    eq("with REX.W", a, 0x44332211);
    test("io: at CPL 3 an IN or OUT that faults does nothing");
    outb(0xe0, 0x11);
    a = 0x22;
    asm volatile(USER("outb %%al, $0xe0") : "+a"(a));
    eq_trap(GP, 0);
    eq("port", inb(0xe0), 0x11);
    asm volatile(USER("inb $0xe0, %%al") : "+a"(a));
    eq("AL", a, 0x22);
    test("io: wide accesses are bytes at consecutive ports, also unaligned");
    outw(0xe1, 0xbeef);
    eq("E1", inb(0xe1), 0xef);
    eq("E2", inb(0xe2), 0xbe);
    eq("E0", inl(0xe0), 0x44beef11);
    test("io: a port that nobody has reads as ones");
    eq("8", inb(0xb7), 0xff);
    eq("16", inw(0xb6), 0xffff);
    eq("32", inl(0xb4), 0xffffffff);
}

static void strings(void)
{
    u8 *page = pages_new(1);
    ulong c, d, s;

    map(VA_TEST, (u64)page, 3);
    map(VA_TEST + 0x1000, 0, 0);
    test("io: REP OUTSB, REP INSB move RCX elements");
    memcpy(page, "abcdefgh", 8);
    c = 8, s = VA_TEST;
    asm volatile(TRY("rep outsb") : "+c"(c), "+S"(s) : "d"(0xe0) : "memory");
    eq_trap(NONE, NONE);
    eq("RCX", c, 0);
    eq("RSI", s, VA_TEST + 8);
    eq("port", inb(0xe0), 'h');
    c = 5, d = VA_TEST + 100;
    asm volatile(TRY("rep insb") : "+c"(c), "+D"(d) : "d"(0xe0) : "memory");
    eq_trap(NONE, NONE);
    eq("RDI", d, VA_TEST + 105);
    eq("memory", *(u32 *)(page + 101), 0x68686868);
    eq("behind", page[105], 0);
    test("io: REP INSL, OUTSW, and backwards");
    outl(0xe0, 0x87654321);
    c = 3, d = VA_TEST + 208;
    asm volatile(TRY("std; rep insl; cld") : "+c"(c), "+D"(d) : "d"(0xe0) : "memory", "cc");
    eq("RDI", d, VA_TEST + 196);
    eq("first", *(u32 *)(page + 200), 0x87654321);
    test("io: REP INSB into an absent page: RCX and RDI show what is done; the faulting element has not been read from "
         "the port");
    u8 before = inb(0xe8), after;
    c = 10, d = VA_TEST + 0x1000 - 4;
    asm volatile(TRY("rep insb") : "+c"(c), "+D"(d) : "d"(0xe0) : "memory");
    after = inb(0xe8);
    eq_trap(PF, PF_W);
    eq("RCX", c, 6);
    eq("RDI", d, VA_TEST + 0x1000);
    eq("reads", (u8)(after - before), 4);
    test("io: REP INSB and OUTSB of nothing, where the bitmap forbids the port: AMD faults all the same");
    tss.io[0xe0 / 8] = 0xff;
    c = 0, d = VA_TEST;
    asm volatile(USER("mov $0xe0, %%edx; rep insb") : "+c"(c), "+D"(d)::"rdx", "memory");
    eq_trap(cpu_amd() ? GP : NONE, cpu_amd() ? 0 : NONE);
    asm volatile(USER("mov $0xe0, %%edx; rep outsb") : "+c"(c), "+S"(d)::"rdx", "memory");
    eq_trap(cpu_amd() ? GP : NONE, cpu_amd() ? 0 : NONE);
    test("io: REP OUTSB from an absent page");
    before = inb(0xe8);
    c = 10, s = VA_TEST + 0x1000 - 3;
    asm volatile(TRY("rep outsb") : "+c"(c), "+S"(s) : "d"(0xe0) : "memory");
    after = inb(0xe8);
    eq_trap(PF, 0);
    eq("RCX", c, 7);
    eq("RSI", s, VA_TEST + 0x1000);
    eq("writes", (u8)(after - before), 3);
    test("io: OUTS with a segment override; 32-bit addresses");
    wrmsr(MSR_FS_BASE, VA_TEST);
    page[0x44] = 0x77;
    s = 0x44;
    asm volatile(TRY("fs outsb") : "+S"(s) : "d"(0xe0) : "memory");
    eq("port", inb(0xe0), 0x77);
    wrmsr(MSR_FS_BASE, 0);
    s = 0xffffffff00000000 | VA_TEST;
    asm volatile(TRY("addr32 outsb") : "+S"(s) : "d"(0xe0) : "memory");
    eq("RSI", s, VA_TEST + 1);
    test("io: at CPL 3 the permission comes before the memory");
    asm volatile(USER("outsb")::"S"(VA_TEST + 0x1000), "d"(0xe0) : "memory");
    eq_trap(GP, 0);
}

int main(void)
{
    permission();
    if (has_store()) {
        widths();
        strings();
    } else {
        note("no store at ports E0h to E7h: widths and strings are not tested");
    }
    done();
}
