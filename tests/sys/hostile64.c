/*
 * A guest that means harm to a translator, with what it must get: the architecture's answers, however often it asks. The
 * runner looks at the monitor's memory meanwhile (sys_runner.c).
 *
 * It fills caches of code for ever, jumps into the middle of instructions, runs random bytes at CPL 3, executes from a
 * device and from pages that vanish under it, has one frame at a quarter of a million addresses and pages in every slot,
 * changes code from another processor, changes address spaces, faults and steps without end, has its stack where it
 * should not be, and nests faults until the processor shuts down. SDM vol. 3A 6.15, 8.1.3, 11.6, 17.3.1.4; vol. 2A 2.3.11.
 */
#include "run64.h"
#include "smp.h"

#define DEV 0xfd000000ul /* the runner's 4 KiB of registers that keep what is written */
#define DEV_VA (VA_TEST + 0x200000)
#define SLOT_VA(slot) ((ulong)((s64)((u64)(slot) << 55) >> 16))

static u64 state = 0x13198a2e03707344;
static u64 rnd(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static ulong call(ulong at)
{
    ulong r = 0xbad;
    asm volatile(TRY("call *%1") : "=a"(r) : "r"(at) : "rcx", "rdx", "rsi", "rdi", "r8", "memory", "cc");
    return r;
}

/* mov $v, %eax; ret */
static void put_function(volatile u8 *p, u32 v)
{
    p[0] = 0xb8;
    memcpy((u8 *)p + 1, &v, 4);
    p[5] = 0xc3;
}

/* ---- more code than any cache holds ---- */

static void fill_the_cache(void)
{
    const unsigned size = 4 << 20, step = 32;
    u8 *area = (u8 *)0xc00000; /* behind the pool of pages */

    test("hostile: 131,072 functions, written and run, over and over");
    u32 bad = 0;
    for (unsigned round = 0; round < 2; round++) {
        for (unsigned i = 0; i < size / step; i++)
            put_function(area + i * step, i * 3 + round);
        for (unsigned i = 0; i < size / step; i++)
            bad += call((ulong)area + i * step) != i * 3 + round;
        for (unsigned i = 0; i < 20000; i++) {
            unsigned k = (unsigned)(rnd() % (size / step));
            bad += call((ulong)area + k * step) != k * 3 + round;
        }
    }
    eq("wrong answers", bad, 0);
    test("hostile: one function rewritten and run 60,000 times");
    for (u32 i = 0; i < 60000; i++) {
        put_function(area + 64, i);
        bad += call((ulong)area + 64) != i;
    }
    eq("wrong answers", bad, 0);
    test("hostile: one block of 4 MiB without a branch");
    memset(area, 0x90, size);
    for (unsigned i = 0; i + 64 < size; i += 4096) /* inc %eax at the beginning of every page */
        area[i] = 0xff, area[i + 1] = 0xc0;
    area[size - 1] = 0xc3;
    ulong r = 0;
    for (int i = 0; i < 2; i++)
        asm volatile(TRY("call *%1") : "+a"(r) : "r"(area) : "memory", "cc");
    eq("pages passed", r, 2 * (size / 4096));
    test("hostile: a chain of 200,000 jumps, each to another page");
    unsigned pages = size / 4096;
    for (unsigned i = 0; i < 200; i++)
        for (unsigned p = 0; p < pages; p++) { /* jmp rel32 from place i of page p to place i of page p + 1 */
            unsigned from = p * 4096 + i * 16, to = p + 1 < pages ? from + 4096 : (i + 1) * 16;
            int rel = (int)(to - (from + 5));
            area[from] = 0xe9;
            memcpy(area + from + 1, &rel, 4);
        }
    put_function(area + 200 * 16, 0x77);
    for (int i = 0; i < 3; i++)
        eq("end", call((ulong)area), 0x77);
}

/* ---- into the middle ---- */

static void middles(void)
{
    static u8 code[512] __attribute__((aligned(64)));
    /* mov imm64 to a register, whose bytes are: mov $2, %al; jmp to the next one's. */
    static const u8 outer[] = {0x48, 0xb9, 0x04, 0x01, 0xeb, 0x09, 0x90, 0x90, 0x90, 0x90, 0x04, 0x10, 0x90};

    test("hostile: jumps into the middle of instructions, both readings in turn");
    for (unsigned i = 0; i < 16; i++)
        memcpy(code + i * 13, outer, 13); /* movabs $..., %rcx; add $16, %al; nop */
    code[16 * 13] = code[16 * 13 + 1] = code[16 * 13 + 2] = code[16 * 13 + 3] = 0x90;
    code[16 * 13 + 4] = 0xc3;
    for (unsigned round = 0; round < 300; round++) {
        for (unsigned i = 0; i < 16; i++) {
            ulong r = 0;
            asm volatile(TRY("call *%1") : "+a"(r) : "r"(code + i * 13) : "rcx", "memory", "cc");
            eq("outer", r & 0xff, 16 * (16 - i) & 0xff);
            r = 0; /* inner: add $1, %al; jmp +9 to the next one's add $1 */
            asm volatile(TRY("call *%1") : "+a"(r) : "r"(code + i * 13 + 2) : "rcx", "memory", "cc");
            eq("inner", r & 0xff, 16 - i);
        }
    }
    test("hostile: an instruction read at each of its bytes");
    static const u8 onion[] = {0x66, 0x2e, 0x48, 0x05, 0x05, 0x05, 0x05, 0x05, 0x05, 0x05, 0x05, 0x05, 0xc3, 0xc3, 0xc3, 0xc3, 0xc3};
    memcpy(code, onion, sizeof onion);
    for (unsigned round = 0; round < 200; round++)
        for (unsigned i = 2; i < 9; i++) {
            ulong r = 0, w = i == 2 ? 0x05050505 : 0;
            asm volatile(TRY("call *%1") : "+a"(r) : "r"(code + i) : "memory", "cc");
            /* 48 05 imm32 once, then 05 imm32 as long as they last */
            u8 *p = code + i;
            if (i == 2)
                p += 6;
            while (*p == 5) {
                u32 imm;
                memcpy(&imm, p + 1, 4);
                w = (u32)((u32)w + imm);
                p += 5;
            }
            eq("sum", (u32)r, (u32)w);
        }
}

/* ---- random bytes ---- */

static u8 *sandbox; /* a page that CPL 3 may write and execute, at VA_TEST, and nothing else in its address space */

static bool on_tick(void)
{
    run_note();
    if (trap.vector == 0x41)
        apic_write(APIC_EOI, 0);
    return false;
}

static void random_code(void)
{
    u64 *root = pages_new(1), *pdpt = pages_new(1), old = read_cr3();
    u32 seen[33] = {0}, ends = 0;
    static const u8 seeds[][6] = {{0x0f, 0x05}, {0xcd, 0x80}, {0xf3, 0xa4}, {0xf3, 0xab}, {0xeb, 0xfe}, {0xe8, 0, 0, 0, 0}, {0xff, 0xe0},
                                  {0x48, 0x8b, 0x07}, {0x48, 0x89, 0x07}, {0x9d}, {0x66, 0x90}, {0x0f, 0x0b}, {0xe2, 0xfe}, {0xf7, 0xf0},
                                  {0x0f, 0xae, 0xf8}, {0x0f, 0xc7, 0x0f}, {0xc5, 0xfc, 0x58, 0x07}, {0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc0},
                                  {0x0f, 0x01, 0xf8}, {0x8e, 0xd8}, {0x48, 0xcf}, {0xc9}, {0x0f, 0x00, 0xd8}, {0xf1}, {0xcc}, {0x6c}};

    test("hostile: random bytes at CPL 3 in an address space of their own");
    /* The program itself for the supervisor; one page for the user. */
    pdpt[0] = (*pte(0, 3) & ~(u64)PTE_U) | PTE_P;
    u64 *pd = pages_new(1), *pt = pages_new(1);
    memcpy(pd, (void *)(pdpt[0] & PTE_ADDR), 4096);
    for (unsigned i = 0; i < 512; i++)
        pd[i] &= ~(u64)PTE_U;
    pdpt[0] = (u64)pd | 7;
    u64 *user_pd = pages_new(1);
    pdpt[1] = (u64)user_pd | 7;
    user_pd[0] = (u64)pt | 7;
    pt[0] = (u64)sandbox | 7;
    /* the local APIC, for the tick that ends endless loops */
    u64 *high = pages_new(1), *apic_pt = pages_new(1);
    pdpt[3] = (u64)high | 3;
    high[APIC_BASE >> 21 & 511] = (u64)apic_pt | 3;
    apic_pt[APIC_BASE >> 12 & 511] = APIC_BASE | 3 | PTE_PCD;
    root[0] = (u64)pdpt | 7;
    idt_set(0x41, KCS, trap_entry + 0x41 * 16, D_P | TYPE_INT, 1);
    write_cr3((u64)root);
    apic_write(APIC_TIMER_DIV, 3);
    apic_write(APIC_LVT_TIMER, 0x41);
    for (unsigned i = 0; i < 4000; i++) {
        if (i % 3 == 0)
            for (unsigned k = 0; k < 4096; k++)
                sandbox[k] = (u8)(rnd() >> 32);
        for (unsigned k = 0; k < 40; k++) {
            const u8 *s = seeds[rnd() % ARRAY_SIZE(seeds)];
            memcpy(sandbox + rnd() % 4090, s, 6);
        }
        for (unsigned k = 0; k < 16; k++)
            run_in.gpr[k] = rnd() % 3 ? VA_TEST + rnd() % 4096 : rnd();
        run_in.gpr[1] &= 0xffff; /* RCX: loops that end */
        run_in.flags = F_1 | F_IF | (rnd() & (F_CF | F_ZF | F_SF | F_OF | F_DF)) | (i % 16 == 0 ? F_TF : 0);
        apic_write(APIC_TIMER_INIT, 400000); /* a few hundred microseconds */
        run_in.ip = VA_TEST + rnd() % 4096;
        trap_hook = on_tick;
        run_enter(&run_in, UCS64, UDS);
        trap_hook = NULL;
        apic_write(APIC_TIMER_INIT, 0);
        seen[trap.vector < 32 ? trap.vector : 32]++;
        ends++;
        if (!(trap.cs & 3))
            eq("an exception of the supervisor's own", trap.ip, 0);
    }
    write_cr3(old);
    idt_default(0x41);
    eq("runs", ends, 4000);
    must("#PF, #GP, #UD among their ends", seen[PF] && seen[GP] && seen[UD]);
    note("ends: %u #PF, %u #GP, %u #UD, %u #DB", seen[PF], seen[GP], seen[UD], seen[DB]);
    note("%u #DE, %u #BP, %u others", seen[DE], seen[BP], seen[32]);
}

/* ---- code in a device, code that vanishes ---- */

static bool device(void)
{
    map(DEV_VA, DEV, PTE_P | PTE_W | PTE_U | PTE_PCD);
    *(volatile u32 *)DEV_VA = 0x12345678;
    return *(volatile u32 *)DEV_VA == 0x12345678;
}

static void code_in_device(void)
{
    /* mov $1000, %ecx; xor %eax, %eax; add %ecx, %eax; push %rax; pop %rdx; dec %ecx; jnz; ret */
    static const u8 loop[] = {0xb9, 0xe8, 3, 0, 0, 0x31, 0xc0, 0x01, 0xc8, 0x50, 0x5a, 0xff, 0xc9, 0x75, 0xf8, 0xc3};

    test("hostile: a loop in a device's registers, which is changed while it is used");
    if (!device()) {
        skip("no such device");
        return;
    }
    memcpy((u8 *)DEV_VA + 0x300, loop, sizeof loop);
    for (unsigned i = 1; i < 8; i++) {
        *(volatile u32 *)(DEV_VA + 0x301) = i * 100;
        eq("sum", call(DEV_VA + 0x300), i * 100 * (i * 100 + 1) / 2);
        eq_trap(NONE, NONE);
    }
    test("hostile: from RAM into the device and back, over the page boundary");
    u8 *ram = pages_new(1);
    map(DEV_VA - 0x1000, (u64)ram, PTE_P | PTE_W);
    static const u8 straddle[] = {0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0xc3};
    for (unsigned before = 1; before < 11; before++) {
        for (unsigned i = 0; i < sizeof straddle; i++)
            *(volatile u8 *)(DEV_VA - before + i) = straddle[i];
        eq("value", call(DEV_VA - before), 0x0807060504030201);
    }
    test("hostile: code at CPL 3 in the device, its stack there too");
    static const u8 user[] = {0x68, 0x34, 0x12, 0, 0, 0xe8, 1, 0, 0, 0, 0xf4, 0x58, 0x5b, 0xcd, VEC_DONE}; /* push; call +1; pop; pop; int */
    for (unsigned i = 0; i < sizeof user; i++)
        *(volatile u8 *)(DEV_VA + 0x600 + i) = user[i];
    for (unsigned i = 0; i < 50; i++) {
        run_in.flags = F_1;
        run_in.gpr[4] = DEV_VA + 0xf00;
        run_at(DEV_VA + 0x600, true);
        eq("vector", trap.vector, VEC_DONE);
        eq("return address", run_out.gpr[0], DEV_VA + 0x60a);
        eq("pushed", run_out.gpr[3], 0x1234);
        eq("RSP", run_out.gpr[4], DEV_VA + 0xf00);
    }
    test("hostile: exceptions with their stack in the device");
    ulong keep = tss.ist[0], got;
    idt_set(UD, KCS, trap_entry + UD * 16, D_P | TYPE_INT, 2);
    tss.ist[1] = DEV_VA + 0x1000;
    for (unsigned i = 0; i < 50; i++) {
        asm volatile(TRY("mov $5, %%ebx; ud2") : "=b"(got)::"memory");
        eq_trap(UD, NONE);
        must("there", trap.handler_sp >= DEV_VA && trap.handler_sp < DEV_VA + 0x1000);
        eq("RBX", got, 5);
    }
    tss.ist[0] = keep;
    idt_set(UD, KCS, trap_entry + UD * 16, D_P | TYPE_INT, 1);
    map(DEV_VA - 0x1000, 0, 0);
}

static void vanishing(void)
{
    u8 *frame = pages_new(2);
    volatile u64 *entry = pte(VA_TEST, 1);
    ulong r;

    /* A processor need not keep a translation (SDM 3A 4.10.2): the instruction that makes it forget may be gone already. */
    test("hostile: code that unmaps its own page: the next instruction is not there");
    /* movq $0, (%rdi); invlpg (%rsi); mov $1, %eax; ret */
    static const u8 own[] = {0x48, 0xc7, 0x07, 0, 0, 0, 0, 0x0f, 0x01, 0x3e, 0xb8, 1, 0, 0, 0, 0xc3};
    memcpy(frame + 0x80, own, sizeof own);
    for (unsigned i = 0; i < 300; i++) {
        map(VA_TEST, (u64)frame, PTE_P | PTE_W);
        asm volatile(TRY("call *%1") : "=a"(r) : "r"(VA_TEST + 0x80), "D"(entry), "S"(VA_TEST), "0"(0x55ul) : "memory");
        eq_trap(PF, PF_I);
        must("RIP is behind INVLPG, or at it", trap.ip == VA_TEST + 0x8a || trap.ip == VA_TEST + 0x87);
        eq("CR2", trap.cr2, trap.ip);
        eq("RAX", r, 0x55);
    }
    test("hostile: the same by MOV CR3, and by an NX bit");
    /* mov %rdx, (%rdi); mov %rbx, %cr3; mov $1, %eax; ret */
    static const u8 by_cr3[] = {0x48, 0x89, 0x17, 0x0f, 0x22, 0xdb, 0xb8, 1, 0, 0, 0, 0xc3};
    memcpy(frame + 0x80, by_cr3, sizeof by_cr3);
    for (unsigned i = 0; i < 300; i++) {
        map(VA_TEST, (u64)frame, PTE_P | PTE_W);
        asm volatile(TRY("call *%1")
                     : "=a"(r)
                     : "r"(VA_TEST + 0x80), "D"(entry), "b"(read_cr3()), "d"(i & 1 ? 0 : (u64)frame | PTE_P | PTE_W | PTE_NX), "0"(0x55ul)
                     : "memory");
        eq_trap(PF, i & 1 ? PF_I : PF_I | PF_P);
        must("RIP is behind MOV CR3, or at it", trap.ip == VA_TEST + 0x86 || trap.ip == VA_TEST + 0x83);
        eq("RAX", r, 0x55);
    }
    test("hostile: a page that vanishes in the middle of a hot loop of many blocks");
    /* L: inc %eax; cmp $500, %eax; jne M; movq $0, (%rdi); invlpg (%rsi); M: call F; jmp L; F (next page): ret */
    static const u8 hot[] = {0xff, 0xc0, 0x3d, 0xf4, 1, 0, 0, 0x75, 0x0a, 0x48, 0xc7, 0x07, 0, 0, 0, 0, 0x0f, 0x01, 0x3e};
    memcpy(frame + 0x100, hot, sizeof hot);
    frame[0x113] = 0xe8, frame[0x118] = 0xeb, frame[0x119] = (u8)(0x100 - 0x11a);
    int rel = 0x1000 - 0x118;
    memcpy(frame + 0x114, &rel, 4);
    frame[0x1000] = 0xc3;
    for (unsigned i = 0; i < 50; i++) {
        map(VA_TEST, (u64)frame, PTE_P | PTE_W);
        map(VA_TEST + 0x1000, (u64)frame + 0x1000, PTE_P | PTE_W);
        asm volatile(TRY("call *%1") : "=a"(r) : "r"(VA_TEST + 0x100), "D"(pte(VA_TEST + 0x1000, 1)), "S"(VA_TEST + 0x1000), "0"(0ul) : "memory", "cc");
        eq_trap(PF, PF_I);
        eq("RIP", trap.ip, VA_TEST + 0x1000);
        eq("rounds", r, 500);
    }
    map(VA_TEST, 0, 0);
    map(VA_TEST + 0x1000, 0, 0);
}

/* ---- addresses ---- */

static void aliases(void)
{
    u8 *frame = pages_new(1);
    u64 *pd = pages_new(1), *pt = pages_new(1);
    u32 bad = 0;

    test("hostile: one frame of code at a quarter of a million addresses");
    for (unsigned i = 0; i < 512; i++)
        pd[i] = (u64)pt | 7, pt[i] = (u64)frame | 7;
    *pte(VA_TEST * 2, 3) = (u64)pd | 7;
    write_cr3(read_cr3());
    for (unsigned i = 0; i < 6000; i++) {
        ulong a = VA_TEST * 2 + (rnd() % 262144) * 4096, b = VA_TEST * 2 + (rnd() % 262144) * 4096;

        if (i % 16 == 0) /* changed through one, seen through all */
            put_function((u8 *)a + 0x40, i);
        bad += call(b + 0x40) != i / 16 * 16;
        bad += call(a + 0x40) != i / 16 * 16;
    }
    eq("wrong answers", bad, 0);
    test("hostile: and read, written and pushed to through all of them in turn");
    for (unsigned i = 0; i < 80000; i++) {
        ulong a = VA_TEST * 2 + (ulong)i * 3 % 262144 * 4096;
        *(volatile u32 *)(a + 0x800) = i;
        bad += *(volatile u32 *)(frame + 0x800) != i;
    }
    eq("wrong answers", bad, 0);
    test("hostile: thousands of frames at addresses without order");
    for (unsigned i = 0; i < 512; i++)
        pt[i] = ((u64)(i * 197 % 512) * 4096 + 0xc00000) | 7;
    write_cr3(read_cr3());
    for (unsigned i = 0; i < 60000; i++) {
        ulong n = rnd() % 262144, a = VA_TEST * 2 + n * 4096 + 0x10;
        volatile u32 *direct = (u32 *)(0xc00000ul + n % 512 * 197 % 512 * 4096 + 0x10);
        *direct = i;
        bad += *(volatile u32 *)a != i;
        *(volatile u32 *)a = ~i;
        bad += *direct != ~i;
    }
    eq("wrong answers", bad, 0);
    *pte(VA_TEST * 2, 3) = 0;
    write_cr3(read_cr3());
    test("hostile: pages in all 512 slots, again and again");
    u64 *root = (u64 *)(read_cr3() & PTE_ADDR), pdpt = page_new();
    pd = pages_new(1);
    ((u64 *)pdpt)[511] = (u64)pd | 7;
    pd[511] = (u64)pt | 7;
    for (unsigned i = 0; i < 512; i++)
        pt[i] = (u64)frame | 7;
    for (unsigned i = 1; i < 512; i++)
        root[i] = pdpt | 7;
    write_cr3(read_cr3());
    for (unsigned i = 0; i < 20000; i++) {
        ulong a = SLOT_VA(1 + (i < 4000 ? i % 511 : rnd() % 511)) + BIT(39) - 4096;
        *(volatile u32 *)(a + 0x900) = i;
        bad += *(volatile u32 *)(frame + 0x900) != i;
        if (i % 8 == 0)
            bad += call(a + 0x40) != 5984;
    }
    eq("wrong answers", bad, 0);
    for (unsigned i = 1; i < 512; i++)
        root[i] = 0;
    write_cr3(read_cr3());
}

static void address_spaces(void)
{
    enum { SPACES = 700 };
    static u64 roots[SPACES];
    u64 old = read_cr3(), *first = (u64 *)(old & PTE_ADDR), cr4 = read_cr4();
    u32 bad = 0;
    bool pcid = cpuid(1, 0).c & 1 << 17;

    test("hostile: 700 address spaces, in no order, each with a page and code of its own");
    for (unsigned i = 0; i < SPACES; i++) {
        u64 *root;
        if (i % 16 == 0) { /* 16 to a frame's worth of tables: only the last level differs */
            root = pages_new(1);
            memcpy(root, first, 4096);
            root[200] = (u64)pages_new(1) | 7;
            ((u64 *)(root[200] & PTE_ADDR))[0] = (u64)pages_new(1) | 7;
            ((u64 *)(((u64 *)(root[200] & PTE_ADDR))[0] & PTE_ADDR))[0] = (u64)pages_new(1) | 7;
        } else {
            root = (u64 *)roots[i - 1];
        }
        roots[i] = (u64)root;
    }
    for (unsigned pass = 0; pass < 2; pass++) {
        if (pass && !pcid)
            break;
        if (pass)
            write_cr4(cr4 | CR4_PCIDE);
        for (unsigned i = 0; i < 8000; i++) {
            unsigned n = (unsigned)(rnd() % SPACES);
            u64 *root = (u64 *)roots[n];
            u64 *pt = (u64 *)(((u64 *)(((u64 *)(root[200] & PTE_ADDR))[0] & PTE_ADDR))[0] & PTE_ADDR);
            u8 *frame = (u8 *)(0xd00000 + (ulong)(n / 16) * 4096);

            pt[0] = (u64)frame | 7;
            write_cr3((u64)root | (pass ? n / 16 + 1 : 0));
            ulong a = SLOT_VA(200);
            if (i % 4 == 0)
                put_function((u8 *)a + 0x20, i), *(u32 *)(frame + 0x400) = i;
            else if (*(u32 *)(frame + 0x400))
                bad += call(a + 0x20) != *(volatile u32 *)(a + 0x400);
        }
        write_cr3(old);
        for (unsigned i = 0; i < SPACES / 16 + 1; i++)
            *(u32 *)(0xd00000 + (ulong)i * 4096 + 0x400) = 0;
    }
    write_cr4(cr4);
    eq("wrong answers", bad, 0);
}

/* ---- another processor ---- */

static volatile u32 ap_stop, ap_rounds;
static u8 *shared; /* a page of code */
void ap_main(void)
{
    ap_state = 1;
    for (u32 i = 0; !ap_stop; i++) {
        *(volatile u32 *)(shared + 4) = i; /* the immediate of what the other one runs, aligned: old or new */
        shared[0x200 + (i & 0x1ff)] = (u8)i; /* and data beside it */
        ap_rounds = i;
    }
    ap_state = 2;
    for (;;)
        asm volatile("cli; hlt");
}

static void other_processor(void)
{
    test("hostile: another processor writes into the code that runs here, without end");
    if (!(apic_read(APIC_SVR) & 0xff) && !apic_read(APIC_SVR)) {
        skip("no local APIC");
        return;
    }
    shared = pages_new(1);
    shared[3] = 0xb8, shared[8] = 0xc3;
    ap_stop = 0;
    if (!start_ap()) {
        skip("there is no second processor");
        return;
    }
    u32 last = 0, bad = 0, changes = 0;
    for (u32 i = 0; i < 100000; i++) {
        u32 v = (u32)call((ulong)shared + 3);
        if (v < last)
            bad++;
        changes += v != last;
        last = v;
        if (i % 64 == 0) /* both write the page */
            shared[0x100] = (u8)i;
    }
    for (u64 i = 0; i < 2000000000 && changes < 3; i++) { /* on a busy host the other one may not have run yet */
        u32 v = (u32)call((ulong)shared + 3);
        changes += v != last;
        bad += v < last;
        last = v;
    }
    ap_stop = 1;
    wait_for(&ap_state, 2);
    cpuid(0, 0);
    eq("values that went back", bad, 0);
    must("changes seen", changes >= 3);
    eq("the last value", (u32)call((ulong)shared + 3), *(volatile u32 *)(shared + 4));
    eq("of its last round", *(volatile u32 *)(shared + 4), ap_rounds);
    note("%u changes seen", changes);
}

/* ---- faults and steps without end ---- */

static u32 steps;
static bool count_step(void)
{
    steps += trap.vector == DB;
    return trap.vector == DB;
}

static bool skip_ud(void)
{
    if (trap.vector != UD)
        return false;
    trap.ip += 2;
    steps++;
    return true;
}

static void without_end(void)
{
    u64 n = 0;

    test("hostile: 100,000 invalid instructions, divisions by zero, page faults");
    steps = 0;
    trap_hook = skip_ud;
    asm volatile(TRY("mov $100000, %%ecx\n1: ud2; dec %%ecx; jnz 1b")::: "rcx", "memory", "cc");
    trap_hook = NULL;
    eq("#UD", steps, 100000);
    for (unsigned i = 0; i < 20000; i++) {
        asm volatile(TRY("xorl %%edx, %%edx; divl %%edx")::"a"(i) : "rdx", "cc");
        n += trap.vector == DE;
        asm volatile(TRY("movb (%0), %%al")::"r"(VA_TEST * 3 + rnd() % BIT(38)) : "rax", "memory");
        n += trap.vector == PF;
        asm volatile(TRY("movb %%al, (%0)")::"r"(BIT(50) + i) : "memory");
        n += trap.vector == GP;
    }
    eq("#DE, #PF, #GP", n, 60000);
    test("hostile: TF over code that has run without it");
    static const u8 code[] = {0xb9, 0xe8, 3, 0, 0, 0x31, 0xc0, 0x01, 0xc8, 0x50, 0x5a, 0xe8, 0, 0, 0, 0, 0x5a, 0xff, 0xc9, 0x75, 0xf2, 0xcd, VEC_DONE};
    static u8 place[64] __attribute__((aligned(64)));
    memcpy(place, code, sizeof code); /* mov, xor; add, push, pop, call 0, pop, dec, jnz: 2 + 7 * 1000 */
    for (unsigned round = 0; round < 4; round++)
        for (int user = 0; user < 2; user++) {
            bool step = round % 2;
            steps = 0;
            run_in.gpr[4] = (ulong)user_stack_end + (user ? USER_OFF : 0);
            run_in.flags = F_1 | (step ? F_TF : 0);
            run_in.ip = (ulong)place + (user ? USER_OFF : 0);
            trap_hook = count_step;
            run_enter(&run_in, user ? UCS64 : KCS, user ? UDS : KDS);
            trap_hook = NULL;
            eq("vector", trap.vector, VEC_DONE);
            eq("RIP", trap.ip, (ulong)place + (user ? USER_OFF : 0) + sizeof code);
            eq("steps", steps, step ? 7002 : 0);
        }
    test("hostile: 30,000 interrupts that it sends to itself, in a hot loop");
    idt_set(0x42, KCS, trap_entry + 0x42 * 16, D_P | TYPE_INT, 1);
    steps = 0;
    trap_hook = NULL;
    for (unsigned i = 0; i < 30000; i++) {
        asm volatile(TRY("movl $0x40042, (%0); sti; nop; nop; cli") ::"r"(APIC_BASE + APIC_ICR) : "memory");
        steps += trap.vector == 0x42;
        apic_write(APIC_EOI, 0);
    }
    idt_default(0x42);
    eq("arrived", steps, 30000);
}

/* ---- until it shuts down ---- */

static void endings(void)
{
    struct table_reg r;
    u8 *frame = pages_new(1);

    switch (run_case()) {
    case 0:
        expect_shutdown("hostile: a page-fault handler that faults, down its stack into a guard page");
        map(VA_TEST + 0x10000, (u64)frame, PTE_P | PTE_W); /* nothing is below */
        frame[0] = 0x8a, frame[1] = 0x00;                  /* mov (%rax), %al: RAX points nowhere */
        idt_set(PF, KCS, frame, D_P | TYPE_INT, 0);
        idt_set(DF, KCS, frame, D_P | TYPE_INT, 0);
        asm volatile("mov %0, %%rsp; jmp *%1" ::"r"(VA_TEST + 0x11000), "r"(frame), "a"(VA_TEST * 3));
        break;
    case 1:
        expect_shutdown("hostile: the IDT in a page that the handler unmaps");
        map(VA_TEST, (u64)frame, PTE_P | PTE_W);
        memcpy(frame, (void *)idt_reg.base, 4096);
        r = (struct table_reg){4095, VA_TEST};
        lidt(&r);
        asm volatile(TRY("ud2")::: "memory");
        map(VA_TEST, 0, 0);
        asm volatile("ud2");
        break;
    case 2:
        expect_shutdown("hostile: page tables that map nothing, not even the next instruction");
        asm volatile("mov %0, %%cr3; nop; nop" ::"r"(frame));
        break;
    case 3:
        expect_shutdown("hostile: every vector's handler is an invalid instruction without a stack");
        frame[0] = 0x0f, frame[1] = 0x0b;
        for (unsigned i = 0; i < 32; i++)
            idt_set(i, KCS, frame, D_P | TYPE_INT, 0);
        asm volatile("mov %0, %%rsp; ud2" ::"r"(BIT(47)));
        break;
    case 4:
        expect_shutdown("hostile: the IDT where nobody is, and an interrupt");
        map(VA_TEST, 0xfc000000, PTE_P | PTE_W);
        r = (struct table_reg){4095, VA_TEST};
        lidt(&r);
        asm volatile("ud2");
        break;
    case 5:
        expect_shutdown("hostile: a translated loop whose stack creeps out of its slot");
        map(VA_TEST, (u64)frame, PTE_P | PTE_W);
        for (unsigned i = 0; i < 32; i++)
            idt_set(i, KCS, frame, TYPE_INT, 0);
        asm volatile("mov %0, %%rsp\n1: sub $0x1000, %%rsp; cmp $0, %%rsp; jne 1b; sub $0x40000000, %%rsp\n"
                     "2: add $-0x7ffff000, %%rsp; inc %%eax; cmp $300000, %%eax; jne 2b; push %%rax" ::"r"(0x1000000ul),
                     "a"(0));
        break;
    default: return;
    }
    for (;;)
        ;
}

int main(void)
{
    if (run_case() == 0) {
        apic_map();
        apic_enable();
        run_init();
        sandbox = pages_new(1);
        middles();
        vanishing();
        code_in_device();
        without_end();
        address_spaces();
        aliases();
        random_code();
        other_processor();
        fill_the_cache();
        for (unsigned i = 0; i < 32; i++)
            idt_default(i);
    }
    endings();
    done();
}
