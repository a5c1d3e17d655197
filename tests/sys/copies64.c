/*
 * One frame of code at many linear addresses, in turn, at CPL 3: all that an instruction can learn of its own address is the one that it was fetched from. A translator may
 * make one translation of another (cpu/bt/clone.c). SDM vol. 3A 4.10, vol. 1 3.5.1 (RIP-relative), vol. 2 CALL, SYSCALL.
 *
 * Each address has a data frame of its own behind the code. What the code did is looked at after each call; and the code is changed in between.
 */
#include "sys.h"

#define PAGES 4u                             /* code, data of the address's own, code, nothing */
#define ROUNDS 14u
#define HOLE 0x3000ul

struct seen {
    u64 start, id, ret, next_page, sum, loop, cases, after_syscall, imm, x87[4];
};

struct data {
    u64 id, count, function, far;
};

extern u8 copied[], copied_far[], copied_imm[], copied_fault[], copied_x87[], copied_end[], copied_sysret[];
asm(".pushsection .text\n"
    ".balign 4096\n"
    "copied: lea copied(%rip), %rax\n"
    "mov %rax, 0(%rdi)\n"
    "mov copied+0x1000(%rip), %rax\n" /* data.id */
    "mov %rax, 8(%rdi)\n"
    "incq copied+0x1008(%rip)\n"
    "call 1f\n"
    "1: pop %rax\n"
    "lea copied - 1b(%rax), %rax\n"
    "mov %rax, 16(%rdi)\n"
    "call *copied+0x1010(%rip)\n" /* data.function */
    "mov %rax, 24(%rdi)\n"
    "xor %edx, %edx\n"
    "mov $5, %ecx\n"
    "2: add copied+0x1000(%rip), %rdx\n"
    "call 5f\n"
    "dec %ecx\n"
    "jnz 2b\n"
    "mov %rdx, 40(%rdi)\n"
    "xor %edx, %edx\n"
    "mov $3, %ecx\n"
    "3: dec %ecx\n"
    "lea 4f(%rip), %r8\n"
    "movslq (%r8,%rcx,4), %rax\n"
    "add %r8, %rax\n"
    "jmp *%rax\n"
    "4: .long 6f - 4b, 7f - 4b, 8f - 4b\n"
    "8: add $0x100, %edx\n"
    "jmp 3b\n"
    "7: add $0x20, %edx\n"
    "jmp 3b\n"
    "5: ret\n"
    "6: add $3, %edx\n"
    "mov %rdx, 48(%rdi)\n"
    "push %rdi\n"
    "syscall\n"
    "9: pop %rdi\n"
    "lea copied - 9b(%rcx), %rcx\n"
    "mov %rcx, 56(%rdi)\n"
    "copied_imm: mov $0x11223344, %eax\n"
    "mov %rax, 64(%rdi)\n"
    "fninit\n"
    "copied_x87: fld1\n"
    "fnstenv 72(%rdi)\n"
    "fninit\n"
    "mov copied+0x1018(%rip), %rax\n" /* data.far */
    "jmp *%rax\n"
    "copied_fault: nop\n"
    "mov copied+0x3000(%rip), %rax\n"
    "ret\n"
    "copied_end: .balign 4096\n"
    ".fill 4096, 1, 0xcc\n"          /* data */
    "copied_far: lea copied_far(%rip), %rax\n"
    "lea copied - copied_far(%rax), %rax\n"
    "ret\n"
    "10: jmp 11f\n"
    ".globl copied_out\n"
    "copied_out: mov copied+0x1008(%rip), %rax\n"
    "mov %rax, 32(%rdi)\n"
    "call 10b\n"
    "11: pop %rax\n"
    "ret\n"
    ".balign 4096\n"
    "copied_sysret: sysretq\n"
    ".popsection\n");
extern u8 copied_out[];

static const ulong base[] = { 0x40000000, 0x123456000, 0x555555554000, 0x56789abcd000, 0x7f0123456000, 0x7ffffff00000, 0x1fffffc000, 0x100000000 };
#define BASES (sizeof base / sizeof base[0])
static u64 code, far, data[BASES];
static struct seen seen;

static void prepare(void)
{
    code = page_new();
    far = page_new();
    memcpy((void *)code, copied, 4096);
    memcpy((void *)far, copied_far, 4096);
    for (unsigned i = 0; i < BASES; i++) {
        struct data *d = (void *)(data[i] = page_new());
        d->id = 0x1000 + i;
        d->function = base[i] + (ulong)(copied_far - copied);
        d->far = base[i] + (ulong)(copied_out - copied);
        map(base[i], code, 5);
        map(base[i] + 0x1000, data[i], 7);
        map(base[i] + 0x2000, far, 5);
    }
}

static void call_at(ulong va)
{
    asm volatile(USER("call *%%rbx")::"b"(va), "D"(UPTR(&seen)) : "rax", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "memory", "cc");
}

static void look(unsigned i, u32 imm, u64 count)
{
    ulong fip = (ulong)(u32)(base[i] + (ulong)(copied_x87 - copied));

    memset(&seen, 0, sizeof seen);
    call_at(base[i]);
    eq("vector", trap.vector, 0x80);
    eq("LEA", seen.start, base[i]);
    eq("load", seen.id, 0x1000 + i);
    eq("return address", seen.ret, base[i]);
    eq("another page's", seen.next_page, base[i]);
    eq("counted in its own data", seen.sum, count);
    eq("loop", seen.loop, 5 * (0x1000 + i));
    eq("table of jumps", seen.cases, 0x123);
    eq("SYSCALL's RCX", seen.after_syscall, base[i]);
    eq("immediate", seen.imm, imm);
    must("x87's instruction pointer", !(u32)(seen.x87[1] >> 32) || (u32)(seen.x87[1] >> 32) == fip);
}

/* trap.ip and CR2 of a fault in it. */
static void fault(unsigned i)
{
    ulong at = base[i] + (ulong)(copied_fault - copied);
    call_at(at);
    eq("vector", trap.vector, 14);
    eq("RIP", trap.ip, at + 1);
    eq("CR2", trap.cr2, base[i] + HOLE);
}

int main(void)
{
    u32 imm = 0x11223344;
    u64 count = 0;

    prepare();
    wrmsr(MSR_STAR, (u64)UCS32 << 48 | (u64)KCS << 32);
    wrmsr(MSR_LSTAR, (ulong)copied_sysret);
    wrmsr(MSR_SFMASK, F_AC | F_DF | F_IF | F_NT | F_IOPL | F_TF | F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    for (unsigned round = 0; round < 4; round++) {
        test("copies: %d addresses in turn, the code changed %d times", (int)BASES, (int)round);
        for (unsigned k = 0; k < ROUNDS; k++) {
            count++;
            for (unsigned i = 0; i < BASES; i++) {
                look((i * 3 + round) % BASES, imm, count);
                fault((i * 3 + round) % BASES);
            }
        }
        imm += 0x01010101;
        *(volatile u32 *)(code + (ulong)(copied_imm - copied) + 1) = imm;
    }
    test("copies: an address's pages exchanged for another's data");
    for (unsigned i = 0; i < BASES; i++)
        map(base[i] + 0x1000, data[i ^ 1], 7);
    for (unsigned i = 0; i < BASES; i++) {
        call_at(base[i]);
        eq("load", seen.id, 0x1000 + (i ^ 1));
        eq("LEA", seen.start, base[i]);
    }
    done();
}
