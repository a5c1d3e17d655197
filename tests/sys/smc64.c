/*
 * Code as data: self- and cross-modification, aliases, page ends, the 15-byte limit, fetch faults. SDM vol.
 * 3A 8.1.3, 11.6; vol. 2A 2.3.11; vol. 3A 6.15 (#PF).
 */
#include "sys.h"

/* Two pages of code at VA_TEST, their frames, and an alias of them. */
#define ALIAS (VA_TEST + 0x10000)
static u8 *frames;
static u8 *const code = (u8 *)VA_TEST;

static ulong call(const void *at)
{
    ulong r = 0xbad;
    asm volatile(TRY("call *%1") : "=a"(r) : "r"(at) : "rcx", "rdx", "rsi", "rdi", "r8", "memory", "cc");
    return r;
}

static void put(unsigned off, const void *bytes, unsigned n) { memcpy(frames + off, bytes, n); }
#define PUT(off, ...) put(off, (const u8[]){__VA_ARGS__}, sizeof((const u8[]){__VA_ARGS__}))

static void self(void)
{
    test("smc: code written, executed, written again, executed again");
    PUT(0, 0xb8, 1, 0, 0, 0, 0xc3); /* mov $1, %eax; ret */
    eq("first", call(code), 1);
    code[1] = 2;
    eq("second", call(code), 2);
    for (int i = 0; i < 50; i++) {
        code[1] = i;
        eq("again", call(code), i);
    }
    test("smc: the next instruction is changed by a store just before it");
    PUT(0, 0xb9, 1, 0, 0, 0, 0xc6, 0x05, 0x01, 0, 0, 0, 7, 0xb8, 1, 0, 0, 0,
        0xc3); /* mov $1, %ecx; movb $7, 1(%rip); mov $1, %eax; ret */
    eq("value", call(code), 7);
    test("smc: and in a loop, every time");
    /* xor %eax,%eax; mov $10,%ecx; L: addb $1, 3(%rip)(the imm of add); add $0, %eax [05 imm32]; loop L; ret */
    PUT(0, 0x31, 0xc0, 0xb9, 10, 0, 0, 0, 0x80, 0x05, 0x01, 0, 0, 0, 1, 0x05, 0, 0, 0, 0, 0xe2, 0xf2, 0xc3);
    eq("sum of 1..10", call(code), 55);
    test("smc: a jump turned into another one by the code it jumps from");
    /* mov $1,%eax; movb $5, 1(%rip) [imm8 of jmp]; jmp +0; mov $2,%eax (5 bytes); ret */
    PUT(0, 0xb8, 1, 0, 0, 0, 0xc6, 0x05, 0x01, 0, 0, 0, 5, 0xeb, 0, 0xb8, 2, 0, 0, 0, 0xc3);
    eq("value", call(code), 1);
    test("smc: through an alias of the page");
    PUT(0, 0xb8, 1, 0, 0, 0, 0xc3);
    eq("before", call(code), 1);
    ((volatile u8 *)ALIAS)[1] = 9;
    cpuid(0, 0);
    eq("after", call(code), 9);
    test("smc: by the code itself through an alias, then a jump");
    /* movb $6, (%rdi); cpuid-free jmp; mov $1,%eax; ret */
    PUT(0x100, 0xc6, 0x07, 6, 0xeb, 0, 0xb8, 1, 0, 0, 0, 0xc3);
    ulong r;
    asm volatile(TRY("call *%1") : "=a"(r) : "r"(code + 0x100), "D"(ALIAS + 0x106) : "memory");
    eq("value", r, 6);
    test("smc: an instruction over a page boundary, its second half changed");
    PUT(0xffd, 0xb8, 1, 2, 3, 4, 0xc3);
    eq("before", call(code + 0xffd), 0x04030201);
    code[0x1000] = 0x33;
    eq("after", call(code + 0xffd), 0x04330201);
    code[0xffe] = 0x44;
    eq("first half", call(code + 0xffd), 0x04330244);
    test("smc: a store that begins in a page without code and ends in one with it");
    PUT(0x1000, 0xb8, 1, 0, 0, 0, 0xc3);
    eq("before", call(code + 0x1000), 1);
    *(volatile u32 *)(code + 0xffe) = 0x77b89090;
    eq("after", call(code + 0x1000), 0x77);
    test("smc: by PUSH, by CALL's return address, by XCHG, by LOCK XADD, by REP MOVS and STOS");
    PUT(0x200, 0xb8, 1, 0, 0, 0, 0xc3, 0x90, 0x90);
    eq("before", call(code + 0x200), 1);
    asm volatile("movq %%rsp, %%rcx; leaq 8(%0), %%rsp; pushq %1; movq %%rcx, %%rsp" ::"r"(code + 0x200),
                 "r"(0x9090c300000012b8ul)
                 : "rcx", "memory");
    eq("PUSH", call(code + 0x200), 0x12);
    ulong x = 0x9090c300000013b8;
    asm volatile("xchgq %0, (%1)" : "+r"(x) : "r"(code + 0x200) : "memory");
    eq("XCHG", call(code + 0x200), 0x13);
    x = 0x100;
    asm volatile("lock xaddq %0, (%1)" : "+r"(x) : "r"(code + 0x200) : "memory", "cc");
    eq("XADD", call(code + 0x200), 0x14);
    memcpy(code + 0x200, (const u8[]){0xb8, 0x15, 0, 0, 0, 0xc3}, 6);
    eq("MOVS", call(code + 0x200), 0x15);
    memset(code + 0x201, 0, 4);
    eq("STOS", call(code + 0x200), 0);
    asm volatile("lock cmpxchgq %1, (%2)" ::"a"(0x9090c300000000b8), "r"(0x9090c300000017b8), "r"(code + 0x200)
                 : "memory", "cc");
    eq("CMPXCHG", call(code + 0x200), 0x17);
    test("smc: REP STOS that runs over the instruction itself and what follows it");
    /* rep stosb with rdi = address of the mov's immediate: rep stosb; mov $1, %eax -> 0x05050505; ret */
    PUT(0x300, 0xf3, 0xaa, 0xb8, 1, 1, 1, 1, 0xc3);
    asm volatile(TRY("call *%2") : "=a"(r) : "0"(5ul), "r"(code + 0x300), "D"(code + 0x303), "c"(4ul) : "memory");
    eq("value", r, 0x05050505);
    test("smc: an instruction made longer and shorter");
    PUT(0x400, 0x90, 0x90, 0x90, 0xb8, 3, 0, 0, 0, 0xc3);
    eq("before", call(code + 0x400), 3);
    PUT(0x400, 0xb8, 4, 0, 0, 0, 0xc3, 0, 0, 0);
    eq("after", call(code + 0x400), 4);
    test("smc: at CPL 3");
    u8 *u = UPTR(exec_data);
    memcpy(exec_data, (const u8[]){0xc6, 0x05, 1, 0, 0, 0, 8, 0xb8, 1, 0, 0, 0, 0xcd, 0x80}, 14);
    asm volatile(USER("jmp *%1") : "=a"(r) : "r"(u) : "memory");
    eq("value", r, 8);
}

/*
 * Every kind of store, each into the instruction that follows it: [the store] movabs $imm64, %rax; ret, with RDI = the
 * immediate. Whatever memory holds afterwards is what must have been executed. Often enough that a translator has made
 * something of it.
 */
#define SEEN 0x0101010101010101ull
static const struct storing {
    const char *name;
    u8 n, b[15];
    u64 rax; /* the value, or what is compared with */
} storing[] = {
    {"MOV byte", 2, {0x88, 0x07}, 0x12},
    {"MOV word", 3, {0x66, 0x89, 0x07}, 0x1234},
    {"MOV", 2, {0x89, 0x07}, 0x12345678},
    {"MOV quadword", 3, {0x48, 0x89, 0x07}, 0x123456789abcdef0},
    {"MOV immediate", 6, {0xc7, 0x07, 1, 2, 3, 4}, 0},
    {"MOV to an absolute address", 10, {0x48, 0xa3}, 0x1122334455667788}, /* the address is filled in */
    {"MOVNTI", 4, {0x48, 0x0f, 0xc3, 0x07}, 0x1122334455667788},
    {"MOVBE", 4, {0x0f, 0x38, 0xf1, 0x07}, 0x12345678},
    {"STOSQ", 2, {0x48, 0xab}, 0x1122334455667788},
    {"REP STOSB", 2, {0xf3, 0xaa}, 0x55},
    {"REP MOVSB", 2, {0xf3, 0xa4}, 0},
    {"MOVSQ", 2, {0x48, 0xa5}, 0},
    {"ADD", 2, {0x01, 0x07}, 7},
    {"LOCK ADD", 3, {0xf0, 0x01, 0x07}, 7},
    {"NOT", 3, {0x48, 0xf7, 0x17}, 0},
    {"NEG", 2, {0xf6, 0x1f}, 0},
    {"LOCK INC", 3, {0xf0, 0xff, 0x07}, 0},
    {"SHL", 2, {0xd1, 0x27}, 0},
    {"SETNZ", 3, {0x0f, 0x94, 0x07}, 0},
    {"BTS", 4, {0x0f, 0xba, 0x2f, 7}, 0},
    {"LOCK BTC", 6, {0xf0, 0x48, 0x0f, 0xba, 0x3f, 40}, 0},
    {"XCHG", 2, {0x87, 0x07}, 0x12345678},
    {"XADD", 3, {0x0f, 0xc1, 0x07}, 9},
    {"LOCK XADD", 4, {0xf0, 0x0f, 0xc1, 0x07}, 9},
    {"CMPXCHG", 4, {0x48, 0x0f, 0xb1, 0x0f}, SEEN},
    {"LOCK CMPXCHG", 5, {0xf0, 0x48, 0x0f, 0xb1, 0x0f}, SEEN},
    {"LOCK CMPXCHG8B", 4, {0xf0, 0x0f, 0xc7, 0x0f}, SEEN & 0xffffffff},
    {"PUSH", 11, {0x49, 0x89, 0xe0, 0x48, 0x8d, 0x67, 0x08, 0x53, 0x4c, 0x89, 0xc4}, 0},
    {"CALL", 15, {0x49, 0x89, 0xe0, 0x48, 0x8d, 0x67, 0x08, 0xe8, 0, 0, 0, 0, 0x4c, 0x89, 0xc4}, 0},
    {"POP", 4, {0x53, 0x8f, 0x07, 0x90}, 0},
    {"PUSHF", 11, {0x49, 0x89, 0xe0, 0x48, 0x8d, 0x67, 0x08, 0x9c, 0x4c, 0x89, 0xc4}, 0},
    {"MOVD", 4, {0x66, 0x0f, 0x7e, 0x07}, 0},
    {"MOVQ", 4, {0x66, 0x0f, 0xd6, 0x07}, 0},
    {"MOVHPS", 3, {0x0f, 0x17, 0x07}, 0},
    {"MOVUPS", 3, {0x0f, 0x11, 0x07}, 0},
    {"MOVDQU", 4, {0xf3, 0x0f, 0x7f, 0x07}, 0},
    {"MASKMOVDQU", 4, {0x66, 0x0f, 0xf7, 0xc0}, 0},
    {"PEXTRW", 6, {0x66, 0x0f, 0x3a, 0x15, 0x07, 0}, 0},
    {"STMXCSR", 3, {0x0f, 0xae, 0x1f}, 0},
    {"FSTP", 4, {0xd9, 0xe8, 0xdd, 0x1f}, 0},
    {"FNSTCW", 2, {0xd9, 0x3f}, 0},
    {"SMSW", 3, {0x0f, 0x01, 0x27}, 0},
    {"STR", 3, {0x0f, 0x00, 0x0f}, 0},
};

/* The code for a store at offset off of the frames; the immediate's offset. */
static unsigned put_storing(const struct storing *s, unsigned off)
{
    static const u8 tail[] = {0xc3, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90};
    unsigned n = off;

    memcpy(frames + n, s->b, s->n);
    n += s->n;
    memcpy(frames + n, (const u8[]){0x48, 0xb8}, 2);
    n += 2;
    memset(frames + n, 1, 8);
    memcpy(frames + n + 8, tail, sizeof(tail));
    return n;
}

static ulong call_storing(const struct storing *s, unsigned off, ulong target)
{
    static u64 xmm[2] __attribute__((aligned(16))), source;
    ulong r = s->rax, c = s->b[0] == 0xf3 && (s->b[1] | 1) != 0x0f ? 8 : 0x5566778811223344, d = SEEN >> 32, b = 0x99aabbccddeeff11;
    ulong di = target, si = (ulong)&source;

    xmm[0] = 0x8877665544332211;
    xmm[1] = 0x90909090909090c3; /* what is there already behind the immediate */
    source = 0x1020304050607080;
    asm volatile("movaps %0, %%xmm0" ::"m"(xmm));
    asm volatile(TRY("movq %%rsp, %%r9; call *%[at]")
                 : "+a"(r), "+c"(c), "+d"(d), "+D"(di), "+S"(si), "+b"(b)
                 : [at] "r"(code + off)
                 : "r8", "r9", "memory", "cc");
    return r;
}

static void stores(void)
{
    for (unsigned i = 0; i < ARRAY_SIZE(storing); i++) {
        const struct storing *s = &storing[i];
        bool movbe = s->b[0] == 0x0f && s->b[1] == 0x38;

        test("smc: into the next instruction, by %s", s->name);
        if (movbe && !(cpuid(1, 0).c & BIT(22))) {
            skip("no MOVBE");
            continue;
        }
        for (unsigned round = 0; round < 120; round++) {
            unsigned off = 0x400 + 64 * (round & 1), imm = put_storing(s, off);
            ulong target = (ulong)(round & 2 ? ALIAS : VA_TEST) + imm, r;

            if (s->b[1] == 0xa3)
                memcpy(frames + off + 2, &target, 8);
            r = call_storing(s, off, target);
            eq("executed what is there", r, *(u64 *)(frames + imm));
            must("written", r != SEEN);
        }
    }
}

static u64 tsc(void)
{
    u32 lo, hi;
    asm volatile("rdtsc" : "=a"(lo), "=d"(hi));
    return (u64)hi << 32 | lo;
}

static void loops(void)
{
    ulong r;

    test("smc: a loop whose body changes the loop's own first instruction");
    /* xor %edx,%edx; mov $1000,%ecx; L: mov $0,%eax; add %eax,%edx; incl L+1; dec %ecx; jnz L; mov %edx,%eax; ret */
    for (int i = 0; i < 20; i++) {
        PUT(0x600, 0x31, 0xd2, 0xb9, 0xe8, 3, 0, 0, 0xb8, 0, 0, 0, 0, 0x01, 0xc2, 0xff, 0x05, 0xf4, 0xff, 0xff, 0xff, 0xff, 0xc9,
            0x75, 0xef, 0x89, 0xd0, 0xc3);
        eq("sum of 0..999", call(code + 0x600), 499500);
    }
    test("smc: a counter in the page of the loop that counts");
    /* mov $100000,%ecx; L: incl counter(%rip); dec %ecx; jnz L; mov counter,%eax; ret */
    PUT(0x640, 0xb9, 0xa0, 0x86, 1, 0, 0xff, 0x05, 0x35, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf6, 0x8b, 0x05, 0x2b, 0, 0, 0, 0xc3);
    memset(frames + 0x680, 0, 4);
    u64 t = tsc();
    eq("count", call(code + 0x640), 100000);
    note("100000 stores beside the code: %u cycles each", (u32)((tsc() - t) / 100000));
    test("smc: the stack in the page of the code that uses it");
    /* mov %rsp,%r8; mov %rdi,%rsp; mov $20000,%ecx; xor %eax,%eax; L: call F; dec %ecx; jnz L; mov %r8,%rsp; ret; F: push %rcx; pop %rdx; add %edx,%eax;
     * ret */
    PUT(0x6c0, 0x49, 0x89, 0xe0, 0x48, 0x89, 0xfc, 0xb9, 0x20, 0x4e, 0, 0, 0x31, 0xc0, 0xe8, 8, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0x4c,
        0x89, 0xc4, 0xc3, 0x51, 0x5a, 0x01, 0xd0, 0xc3);
    t = tsc();
    asm volatile(TRY("call *%1") : "=a"(r) : "r"(code + 0x6c0), "D"(code + 0x800) : "rcx", "rdx", "r8", "memory", "cc");
    eq("sum", r, 200010000);
    note("20000 calls with the stack beside the code: %u cycles each", (u32)((tsc() - t) / 20000));
    test("smc: a page that is code and data by turns");
    for (u32 i = 0; i < 300; i++) {
        PUT(0x1000, 0xb8, i, i >> 8, 0, 0, 0xc3);
        eq("code", call(code + 0x1000), i);
        eq("code", call(code + 0x1000), i);
        memset(frames + 0x1000, i, 4096);
        for (unsigned k = 0; k < 4096; k += 512)
            eq("data", frames[0x1000 + k], (u8)i);
    }
    test("smc: 100000 times a function is written and called");
    t = tsc();
    for (u32 i = 0; i < 100000; i++) {
        *(volatile u32 *)(code + 0x901) = i;
        if (!i)
            code[0x900] = 0xb8, code[0x905] = 0xc3;
        asm volatile("call *%1" : "=a"(r) : "r"(code + 0x900) : "memory");
        if (r != i)
            break;
    }
    eq("last", r, 99999);
    note("100000 functions of one instruction, written and called: %u cycles each", (u32)((tsc() - t) / 100000));
    test("smc: 2000 times a page is filled with functions, and each called twice");
    t = tsc();
    for (u32 i = 0; i < 2000; i++) {
        u32 sum = 0;
        for (unsigned k = 0; k < 32; k++) {
            frames[0x1000 + 128 * k] = 0xb8;
            *(volatile u32 *)(frames + 0x1001 + 128 * k) = i + k;
            frames[0x1005 + 128 * k] = 0xc3;
        }
        for (unsigned k = 0; k < 64; k++) {
            asm volatile("call *%1" : "=a"(r) : "r"(code + 0x1000 + 128 * (k & 31)) : "memory");
            sum += r;
        }
        if (sum != 2 * (32 * i + 496))
            must("sum", false);
    }
    note("64000 functions, written and called twice: %u cycles each", (u32)((tsc() - t) / 64000));
}

static void mapping(void)
{
    u8 *other = pages_new(1);

    test("code: another page under the same address, after INVLPG");
    PUT(0, 0xb8, 1, 0, 0, 0, 0xc3);
    memcpy(other, (const u8[]){0xb8, 2, 0, 0, 0, 0xc3}, 6);
    for (int i = 0; i < 6; i++) {
        map(VA_TEST, (u64)(i & 1 ? other : frames), 3);
        eq("value", call(code), 1 + (i & 1));
    }
    map(VA_TEST, (u64)frames, 3);
    test("code: and by MOV CR3");
    PUT(0, 0xb8, 1, 0, 0, 0, 0xc3);
    eq("before", call(code), 1);
    *pte(VA_TEST, 1) = (u64)other | 3;
    write_cr3(read_cr3());
    eq("after", call(code), 2);
    map(VA_TEST, (u64)frames, 3);
    test("code: a block that continues in the next page, which is exchanged");
    memset(frames + 0xff0, 0x90, 16);
    PUT(0x1000, 0xb8, 5, 0, 0, 0, 0xc3);
    eq("before", call(code + 0xff0), 5);
    memcpy(other, (const u8[]){0xb8, 6, 0, 0, 0, 0xc3}, 6);
    map(VA_TEST + 0x1000, (u64)other, 3);
    eq("after", call(code + 0xff0), 6);
    test("code: an instruction over the boundary, its second page exchanged");
    PUT(0xffe, 0xb8, 7);
    memcpy(other, (const u8[]){0x11, 0, 0, 0xc3}, 4);
    eq("other", call(code + 0xffe), 0x1107);
    map(VA_TEST + 0x1000, (u64)frames + 0x1000, 3);
    PUT(0x1000, 0x22, 0, 0, 0xc3);
    eq("back", call(code + 0xffe), 0x2207);
}

static void fetch_faults(void)
{
    test("fetch: an absent page: error code I (NXE = 1), CR2 and RIP are the address");
    map(VA_TEST + 0x1000, 0, 0);
    call(code + 0x1000);
    eq_trap(PF, PF_I);
    eq("CR2", trap.cr2, VA_TEST + 0x1000);
    eq("RIP", trap.ip, VA_TEST + 0x1000);
    test("fetch: an instruction that runs into an absent page: CR2 is that page, RIP the instruction");
    PUT(0xffd, 0xb8, 1, 2);
    call(code + 0xffd);
    eq_trap(PF, PF_I);
    eq("CR2", trap.cr2, VA_TEST + 0x1000);
    eq("RIP", trap.ip, VA_TEST + 0xffd);
    test("fetch: what comes before it has been done");
    PUT(0xff8, 0xb8, 0x55, 0, 0, 0, 0xb8, 1, 2);
    ulong r;
    asm volatile(TRY("call *%1") : "=a"(r) : "r"(code + 0xff8) : "memory");
    eq_trap(PF, PF_I);
    eq("EAX", r, 0x55);
    eq("RIP", trap.ip, VA_TEST + 0xffd);
    test("fetch: an instruction that ends with the page does not touch the next");
    PUT(0xffa, 0xb8, 0x66, 0, 0, 0, 0xc3);
    eq("value", call(code + 0xffa), 0x66);
    eq_trap(NONE, NONE);
    test("fetch: falling off the end of the page");
    PUT(0xffb, 0xb8, 0x66, 0, 0, 0);
    call(code + 0xffb);
    eq_trap(PF, PF_I);
    eq("RIP", trap.ip, VA_TEST + 0x1000);
    test("fetch: a jump at the end of the page that is taken");
    PUT(0xff0, 0xb8, 0x77, 0, 0, 0, 0xc3);
    PUT(0xffe, 0xeb, 0xf0);
    eq("value", call(code + 0xffe), 0x77);
    test("fetch: the second page is NX: protection fault with I");
    map(VA_TEST + 0x1000, (u64)frames + 0x1000, 3 | PTE_NX);
    PUT(0xffd, 0xb8, 1, 2, 3, 4, 0xc3);
    call(code + 0xffd);
    eq_trap(PF, PF_I | PF_P);
    eq("CR2", trap.cr2, VA_TEST + 0x1000);
    test("fetch: the instruction is fetched whole before it faults otherwise: fetch fault before data fault");
    PUT(0xffc, 0x8a, 0x04, 0x25, 0x00); /* mov disp32, %al: the displacement reaches into the next page */
    call(code + 0xffc);
    eq_trap(PF, PF_I | PF_P);
    test("fetch: a page made executable again");
    map(VA_TEST + 0x1000, (u64)frames + 0x1000, 3);
    PUT(0xffd, 0xb8, 1, 2, 3, 4, 0xc3);
    eq("value", call(code + 0xffd), 0x04030201);
    test("fetch: A is set in the code's entries, D is not");
    *pte(VA_TEST, 1) &= ~(u64)(PTE_A | PTE_D);
    invlpg(code);
    call(code + 0xffd);
    eq("A and D", *pte(VA_TEST, 1) & (PTE_A | PTE_D), PTE_A);
}

static void length(void)
{
    test("length: 15 bytes are good, 16 are #GP(0) (SDM 2A 2.3.11)");
    memset(frames + 0x500, 0x66, 14);
    PUT(0x50e, 0x90, 0xc3);
    call(code + 0x500);
    eq_trap(NONE, NONE);
    memset(frames + 0x500, 0x66, 15);
    PUT(0x50f, 0x90, 0xc3);
    call(code + 0x500);
    eq_trap(GP, 0);
    eq("RIP", trap.ip, VA_TEST + 0x500);
    test("length: prefixes without end: #GP(0)");
    memset(frames + 0x500, 0x2e, 64);
    call(code + 0x500);
    eq_trap(GP, 0);
    test("length: 15 bytes with operands: 8 prefixes and a 7-byte instruction");
    memset(frames + 0x500, 0x3e, 8);
    PUT(0x508, 0x48, 0xc7, 0xc0, 0x44, 0, 0, 0, 0xc3); /* mov $0x44, %rax */
    eq("value", call(code + 0x500), 0x44);
    memset(frames + 0x500, 0x3e, 9);
    PUT(0x509, 0x48, 0xc7, 0xc0, 0x44, 0, 0, 0, 0xc3);
    call(code + 0x500);
    eq_trap(GP, 0);
    test("length: REX before another prefix is ignored");
    PUT(0x500, 0xb8, 0xff, 0xff, 0xff, 0xff, 0x48, 0x66, 0xff, 0xc0,
        0xc3); /* mov $-1, %eax; REX.W (lost) 66 inc -> incw */
    eq("value", call(code + 0x500), 0xffff0000);
}

static void undefined(void)
{
    static const struct {
        const char *name;
        u8 n, b[8];
    } op[] = {
        {"UD2", 2, {0x0f, 0x0b}},
        {"UD1", 3, {0x0f, 0xb9, 0xc0}},
        {"UD0", 3, {0x0f, 0xff, 0xc0}},
        {"PUSH ES", 1, {0x06}},
        {"PUSH CS", 1, {0x0e}},
        {"POP DS", 1, {0x1f}},
        {"DAA", 1, {0x27}},
        {"DAS", 1, {0x2f}},
        {"AAA", 1, {0x37}},
        {"AAS", 1, {0x3f}},
        {"PUSHA", 1, {0x60}},
        {"POPA", 1, {0x61}},
        {"82h", 3, {0x82, 0xc0, 1}},
        {"AAM", 2, {0xd4, 10}},
        {"AAD", 2, {0xd5, 10}},
        {"SALC", 1, {0xd6}},
        {"INTO", 1, {0xce}},
        {"LOCK MOV", 3, {0xf0, 0x89, 0x07}},
        {"LOCK NOP", 2, {0xf0, 0x90}},
        {"LOCK CMP", 3, {0xf0, 0x39, 0x07}},
        {"LOCK TEST", 3, {0xf0, 0x85, 0x07}},
        {"LOCK BT", 4, {0xf0, 0x0f, 0xa3, 0x07}},
        {"LOCK ADD of registers", 3, {0xf0, 0x01, 0xc0}},
        {"LOCK ADD to a register", 3, {0xf0, 0x03, 0x07}},
        {"LOCK INC of a register", 3, {0xf0, 0xff, 0xc0}},
        {"LOCK XCHG of registers", 3, {0xf0, 0x87, 0xc0}},
        {"LOCK PUSH", 3, {0xf0, 0xff, 0x37}},
        {"LOCK SHL", 3, {0xf0, 0xd1, 0x27}},
        {"LOCK IMUL", 4, {0xf0, 0x0f, 0xaf, 0x07}},
        {"LOCK MUL", 3, {0xf0, 0xf7, 0x27}},
        {"LOCK LEA", 3, {0xf0, 0x8d, 0x07}},
        {"LOCK MOVS", 2, {0xf0, 0xa4}},
        {"LOCK CPUID", 3, {0xf0, 0x0f, 0xa2}},
        {"LEA of a register", 2, {0x8d, 0xc0}},
        {"MOV to CS", 2, {0x8e, 0xc8}},
        {"FF /7", 2, {0xff, 0xf8}},
        {"FE /2", 2, {0xfe, 0xd0}},
        {"CMPXCHG8B of a register", 3, {0x0f, 0xc7, 0xc8}},
        {"MOVBE of registers", 4, {0x0f, 0x38, 0xf0, 0xc0}},
        {"C6 /1", 3, {0xc6, 0xc8, 0}},
        {"8F /1", 2, {0x8f, 0xc8 & 0x3f}},
        {"LES", 2, {0xc4, 0x07}},
        {"VEX with 66h before", 5, {0x66, 0xc5, 0xf8, 0x77, 0x90}},
        {"VEX with LOCK", 5, {0xf0, 0xc5, 0xf8, 0x77, 0x90}},
        {"VEX with REX", 5, {0x48, 0xc5, 0xf8, 0x77, 0x90}},
        {"RSM", 2, {0x0f, 0xaa}},
        {"MOV CR1", 3, {0x0f, 0x20, 0xc8}},
        {"MOV CR5", 3, {0x0f, 0x20, 0xe8}},
        {"0F 04", 2, {0x0f, 0x04}},
        {"0F 0A", 2, {0x0f, 0x0a}},
        {"0F 24", 3, {0x0f, 0x24, 0xc0}},
        {"LDS", 2, {0xc5, 0x07}},
        {"BOUND", 2, {0x62, 0x07}},
        {"9A", 1, {0x9a}},
        {"EA", 1, {0xea}},
        {"MONITOR at CPL 3", 3, {0x0f, 0x01, 0xc8}},
        {"SGDT of a register's group: 0F 01 /5", 3, {0x0f, 0x01, 0x2f}},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(op); i++) {
        test("#UD: %s", op[i].name);
        exec(op[i].b, op[i].n, true);
        eq_trap(UD, NONE);
        eq("RIP", trap.ip, exec_ip(true));
    }
    test("#UD: LOCK is good with these on memory: ADD ADC AND BTC BTR BTS CMPXCHG CMPXCHG8B DEC INC NEG NOT OR SBB SUB "
         "XOR XADD XCHG");
    static const struct {
        u8 n, b[6];
    } good[] = {{3, {0xf0, 0x01, 0x07}},          {3, {0xf0, 0x11, 0x07}},       {3, {0xf0, 0x21, 0x07}},
                {4, {0xf0, 0x0f, 0xbb, 0x07}},    {4, {0xf0, 0x0f, 0xb3, 0x07}}, {4, {0xf0, 0x0f, 0xab, 0x07}},
                {5, {0xf0, 0x0f, 0xba, 0x2f, 1}}, {4, {0xf0, 0x0f, 0xb1, 0x07}}, {4, {0xf0, 0x0f, 0xc7, 0x0f}},
                {3, {0xf0, 0xff, 0x0f}},          {3, {0xf0, 0xff, 0x07}},       {3, {0xf0, 0xf7, 0x1f}},
                {3, {0xf0, 0xf7, 0x17}},          {3, {0xf0, 0x09, 0x07}},       {3, {0xf0, 0x19, 0x07}},
                {3, {0xf0, 0x29, 0x07}},          {3, {0xf0, 0x31, 0x07}},       {4, {0xf0, 0x0f, 0xc1, 0x07}},
                {3, {0xf0, 0x87, 0x07}},          {4, {0xf0, 0x83, 0x07, 1}}};
    for (unsigned i = 0; i < ARRAY_SIZE(good); i++) {
        exec(good[i].b, good[i].n, true);
        eq_trap(NONE, NONE);
    }
}

int main(void)
{
    frames = pages_new(2);
    for (int i = 0; i < 2; i++) {
        map(VA_TEST + 0x1000 * i, (u64)frames + 0x1000 * i, 3);
        map(ALIAS + 0x1000 * i, (u64)frames + 0x1000 * i, 3);
    }
    write_cr4(read_cr4() | CR4_OSFXSR | CR4_OSXMMEXCPT);
    asm volatile("fninit");
    self();
    stores();
    loops();
    mapping();
    fetch_faults();
    length();
    undefined();
    done();
}
