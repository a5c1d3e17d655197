/*
 * Memory that is no RAM: a device's registers by every kind of access, code fetched from them, addresses where nobody
 * answers. The runner's machine has 4 KiB at FD000000h that keep what is written; another machine is noticed.
 * SDM vol. 3A 8.1 (locked accesses), vol. 1 3.3; what nobody drives reads as ones, as on a PC.
 */
#include "sys.h"

#define DEV 0xfd000000ul
#define VA  (VA_TEST + 0x200000)

static volatile u8 *const dev = (u8 *)VA;
static u8 *ram;                               /* the page in front of the device's, and the one behind */

static bool store(void)
{
    *(volatile u32 *)dev = 0x12345678;
    return *(volatile u32 *)dev == 0x12345678;
}

static void accesses(void)
{
    u64 v;

    test("mmio: 1, 2, 4, 8 bytes, aligned or not");
    *(volatile u64 *)dev = 0x8877665544332211;
    eq("1", dev[2], 0x33);
    eq("2", *(volatile u16 *)(dev + 3), 0x5544);
    eq("4", *(volatile u32 *)(dev + 1), 0x55443322);
    eq("8", *(volatile u64 *)dev, 0x8877665544332211);
    *(volatile u16 *)(dev + 3) = 0xabcd;
    eq("after a write of 2", *(volatile u64 *)dev, 0x887766abcd332211);
    test("mmio: an access that begins in RAM and ends in the device, and the other way round");
    memset(ram, 0x11, 4096);
    memset(ram + 4096, 0x22, 4096);
    *(volatile u32 *)dev = 0x99999999;
    asm volatile(TRY("movq -3(%1), %0") : "=r"(v) : "r"(dev) : "memory");
    eq("read", v, 0xab99999999111111);
    asm volatile(TRY("movq %0, -3(%1)")::"r"(0x0807060504030201), "r"(dev) : "memory");
    eq("RAM", *(u32 *)(ram + 4092), 0x03020111);
    eq("device", *(volatile u32 *)dev, 0x07060504);
    asm volatile(TRY("movq %0, 0xffc(%1)")::"r"(0x0807060504030201), "r"(dev) : "memory");
    eq("end of the device", *(volatile u32 *)(dev + 0xffc), 0x04030201);
    eq("RAM behind", *(u32 *)(ram + 4096), 0x08070605);
    test("mmio: read-modify-write, locked and not; XCHG, CMPXCHG, XADD, BTS");
    *(volatile u32 *)(dev + 16) = 5;
    asm volatile(TRY("addl $3, 16(%0)")::"r"(dev) : "memory", "cc");
    eq("ADD", *(volatile u32 *)(dev + 16), 8);
    asm volatile(TRY("lock addl $3, 16(%0)")::"r"(dev) : "memory", "cc");
    eq("LOCK ADD", *(volatile u32 *)(dev + 16), 11);
    v = 1;
    asm volatile(TRY("xchgl %k0, 16(%1)") : "+r"(v) : "r"(dev) : "memory");
    eq("XCHG", v, 11);
    v = 1;
    asm volatile(TRY("lock cmpxchgl %2, 16(%1)") : "+a"(v) : "r"(dev), "r"(0x77) : "memory", "cc");
    eq("CMPXCHG", *(volatile u32 *)(dev + 16), 0x77);
    v = 1;
    asm volatile(TRY("lock xaddl %k0, 16(%1)") : "+r"(v) : "r"(dev) : "memory", "cc");
    eq("XADD", *(volatile u32 *)(dev + 16), 0x78);
    asm volatile(TRY("lock btsl $31, 16(%0)")::"r"(dev) : "memory", "cc");
    eq("BTS", *(volatile u32 *)(dev + 16), 0x80000078);
    test("mmio: PUSH, POP, CALL, RET with the stack in the device");
    asm volatile(TRY("leaq 0x800(%1), %%rsp; pushq $0x1234; call 9970f; jmp 9971f; 9970: ret; 9971: popq %0")
                 : "=&r"(v)
                 : "r"(dev)
                 : "memory");
    eq_trap(NONE, NONE);
    eq("value", v, 0x1234);
    test("mmio: REP MOVS and STOS into, out of and inside of the device");
    for (int i = 0; i < 64; i++)
        ram[i] = i;
    memcpy((u8 *)dev + 0x100, ram, 64);
    eq("in", *(volatile u64 *)(dev + 0x100 + 40), 0x2f2e2d2c2b2a2928);
    memcpy((u8 *)dev + 0x203, (u8 *)dev + 0x100, 61);
    eq("inside", *(volatile u32 *)(dev + 0x203 + 20), 0x17161514);
    memset(ram, 0, 64);
    memcpy(ram, (u8 *)dev + 0x100, 64);
    eq("out", *(u64 *)(ram + 40), 0x2f2e2d2c2b2a2928);
    memset((u8 *)dev + 0x300, 0x5a, 100);
    eq("set", *(volatile u64 *)(dev + 0x300 + 92), 0x5a5a5a5a5a5a5a5a);
    test("mmio: SSE loads and stores");
    ulong cr4 = read_cr4();
    write_cr4(cr4 | CR4_OSFXSR);
    asm volatile(TRY("movdqu 0x100(%0), %%xmm0; movdqu %%xmm0, 0x401(%0)")::"r"(dev) : "memory");
    eq_trap(NONE, NONE);
    eq("low", *(volatile u64 *)(dev + 0x401), 0x0706050403020100);
    eq("high", *(volatile u64 *)(dev + 0x409), 0x0f0e0d0c0b0a0908);
    write_cr4(cr4);
}

static void fetch(void)
{
    ulong v = 0;

    test("mmio: code in the device: executed, changed, executed again");
    memcpy((u8 *)dev + 0x500, (const u8[]){0xb8, 1, 0, 0, 0, 0xc3}, 6);
    asm volatile(TRY("call *%1") : "=a"(v) : "r"(dev + 0x500) : "memory");
    eq_trap(NONE, NONE);
    eq("first", v, 1);
    dev[0x501] = 2;
    asm volatile(TRY("call *%1") : "=a"(v) : "r"(dev + 0x500) : "memory");
    eq("second", v, 2);
}

static void nobody(void)
{
    u64 v = 0;

    test("mmio: where nobody is: reads give ones, writes vanish");
    map(VA + 0x10000, 0xfc000000, PTE_P | PTE_W);
    asm volatile(TRY("movq 0x10008(%1), %0; movq $0, 0x10008(%1); andq 0x10008(%1), %0")
                 : "=&r"(v)
                 : "r"(dev)
                 : "memory", "cc");
    eq_trap(NONE, NONE);
    eq("value", v, ~0ul);
    test("mmio: page tables where nobody is: entries read as ones: reserved bits");
    *pte(VA_TEST + 0x40000000, 3) = 0xfc000000 | 7;
    asm volatile(TRY("movb (%0), %%al")::"r"(VA_TEST + 0x40000000) : "rax", "memory");
    eq_trap(PF, PF_P | PF_RSVD);
    *pte(VA_TEST + 0x40000000, 3) = 0;
    write_cr3(read_cr3());
}

int main(void)
{
    ram = pages_new(2);
    map(VA - 0x1000, (u64)ram, PTE_P | PTE_W);
    map(VA, DEV, PTE_P | PTE_W | PTE_PCD | PTE_PWT);
    map(VA + 0x1000, (u64)ram + 4096, PTE_P | PTE_W);
    if (store()) {
        accesses();
        fetch();
    } else {
        note("no store at FD000000h: its accesses are not tested");
    }
    nobody();
    done();
}
