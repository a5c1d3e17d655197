/*
 * Loops of one block whose operands go through one or two stepping bases: over page and PML4 slot edges (512 GiB), into pages that are absent or become so, out of the
 * canonical range, with the loop's own code under a base, with extended state switched off. A translator may look at the bases in front of the loop only
 * (cpu/bt/loop.c), and each iteration has to come out as if it had not. SDM vol. 1 3.7.5; vol. 3A 4.5, 6.5, 8.1.3.
 */
#include "sys.h"

#define EDGE 0x8000000000ul                  /* between two slots that both have pages here */
#define EDGE2 0x18000000000ul                /* another one */
#define TOP 0x800000000000ul                 /* the first address that is not canonical; a page below it is mapped */
#define HOLE (VA_TEST + 0x204000)            /* absent, between pages that are there */
#define ROUNDS 12u                           /* so that it is translated, and linked */
#define AT(va) (0x7700000000000000ull + (va)) /* what stands at each 8 bytes */

static void pages(ulong va, ulong end, bool full)
{
    for (; va < end; va += 0x1000) {
        map(va, page_new(), 7);
        for (ulong p = va; full && p < va + 0x1000; p += 8)
            *(volatile u64 *)p = AT(p);
    }
}

/* Copies from RSI to RDI, RCX times; RDX counts. At CPL 0 and 3. */
#define COPY(what, step)                                                                                              \
    static void what(ulong *si, ulong *di, ulong n, ulong *count)                                                     \
    {                                                                                                                 \
        ulong c = n, d = 0;                                                                                           \
        asm volatile(TRY("1: movq (%%rsi), %%rax; " step " $8, %%rsi; incq %%rdx; movq %%rax, (%%rdi); " step " $8, %%rdi; decq %%rcx; jne 1b") \
                     : "+S"(*si), "+D"(*di), "+c"(c), "+d"(d)::"rax", "memory", "cc");                                \
        *count = d;                                                                                                   \
    }                                                                                                                 \
    static void what##_user(ulong *si, ulong *di, ulong n, ulong *count)                                              \
    {                                                                                                                 \
        ulong c = n, d = 0;                                                                                           \
        asm volatile(USER("1: movq (%%rsi), %%rax; " step " $8, %%rsi; incq %%rdx; movq %%rax, (%%rdi); " step " $8, %%rdi; decq %%rcx; jne 1b") \
                     : "+S"(*si), "+D"(*di), "+c"(c), "+d"(d)::"rax", "memory", "cc");                                \
        *count = d;                                                                                                   \
    }
COPY(up, "addq")
COPY(down, "subq")
typedef void copy_fn(ulong *si, ulong *di, ulong n, ulong *count);

static void copies(copy_fn *f, bool upwards, bool user)
{
    for (unsigned k = 0; k < ROUNDS; k++) {
        ulong n = 0x2800 / 8, skew = 8 * k, count, bad = 0;
        ulong si = (upwards ? EDGE - 0x1400 : EDGE + 0x1400) + skew, di = (upwards ? EDGE2 - 0x1000 : EDGE2 + 0x1800) - skew, s = si, d = di;
        f(&s, &d, n, &count);
        eq("vector", trap.vector, user ? VEC_DONE : NONE);
        eq("times", count, n);
        eq("source", s, upwards ? si + 8 * n : si - 8 * n);
        eq("destination", d, upwards ? di + 8 * n : di - 8 * n);
        for (ulong i = 0; i < n; i++)
            bad += *(volatile u64 *)(upwards ? di + 8 * i : di - 8 * i) != AT(upwards ? si + 8 * i : si - 8 * i);
        eq("wrong words", bad, 0);
    }
}

static void absent(copy_fn *f, bool user)
{
    u32 u = user ? PF_U : 0;
    for (unsigned k = 0; k < ROUNDS; k++) {
        ulong s = HOLE - 0x1800, d = EDGE2 - 0x1000, count;
        f(&s, &d, 0x800, &count);
        eq_trap(PF, u);
        eq("CR2 of a load", trap.cr2, HOLE);
        eq("source", s, HOLE);
        eq("destination", d, EDGE2 - 0x1000 + 0x1800);
        eq("times", count, 0x300);
        s = EDGE - 0x1000, d = HOLE - 0x1000;
        f(&s, &d, 0x800, &count);
        eq_trap(PF, u | PF_W);
        eq("CR2 of a store", trap.cr2, HOLE);
        eq("source", s, EDGE + 8);
        eq("destination", d, HOLE);
        eq("times", count, 0x201);
        eq("the last word", *(volatile u64 *)(HOLE - 8), AT(EDGE - 8));
        s = TOP - 0x800, d = EDGE2;
        f(&s, &d, 0x800, &count);
        eq_trap(GP, 0);
        eq("source", s, TOP);
        eq("times", count, 0x100);
        s = EDGE, d = TOP - 0x40;
        f(&s, &d, 0x800, &count);
        eq_trap(GP, 0);
        eq("destination", d, TOP);
        eq("times", count, 9);
    }
}

/* Large steps: the next page is the eighth. */
static void strides(void)
{
    test("loops: steps of 32 KiB over absent pages");
    for (unsigned k = 0; k < ROUNDS; k++) {
        ulong di = HOLE + 0x1000 + 0x18000, n = 100;
        asm volatile(TRY("1: addq (%%rdi), %%rax; subq $32768, %%rdi; decq %%rcx; jne 1b") : "+D"(di), "+c"(n)::"rax", "memory", "cc");
        eq_trap(PF, 0);
        eq("CR2", trap.cr2, di);
        eq("RDI", di, HOLE + 0x1000 + 0x18000 - 0x8000 * (100 - n));
        eq("the first that is absent", (*pte(di, 1) & 1) == 0 && (*pte(di + 0x8000, 1) & 1), n < 100);
    }
}

/* What has an operand and may not access it does not stop a base from going anywhere. */
static void no_access(void)
{
    test("loops: a base that only prefetches and NOPs go through, past everything, and then is used");
    for (unsigned k = 0; k < 3; k++) {
        ulong di = EDGE, si = EDGE - 0x1000, n = 200000, sum = 0;
        asm volatile(TRY("1: prefetcht0 (%%rdi); nopl (%%rdi); addq $32767, %%rdi; addq (%%rsi), %%rax; decq %%rcx; jne 1b; movq (%%rdi), %%rax")
                     : "+D"(di), "+c"(n), "+a"(sum) : "S"(si) : "memory", "cc");
        eq("how it ends", trap.vector, PF);
        eq("RDI", di, EDGE + 32767ul * 200000);
        eq("CR2", trap.cr2, di);
    }
}

static void masked(void)
{
    u32 a = 1, b, c = 0, d;
    test("loops: a base under masked loads of nothing");
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (!(c >> 28 & 1) || !(c >> 26 & 1)) {
        skip("no AVX");
        return;
    }
    write_cr4(read_cr4() | BIT(18));
    asm volatile("xsetbv" ::"c"(0), "a"(7), "d"(0));
    for (unsigned k = 0; k < 3; k++) {
        ulong di = EDGE, n = 200000;
        asm volatile(TRY("vpxor %%xmm1, %%xmm1, %%xmm1; 1: vmaskmovps (%%rdi), %%ymm1, %%ymm0; addq $32767, %%rdi; decq %%rcx; jne 1b; movq (%%rdi), %%rax")
                     : "+D"(di), "+c"(n)::"rax", "memory", "cc");
        eq("how it ends", trap.vector, PF);
        eq("CR2", trap.cr2, EDGE + 32767ul * 200000);
        eq("RDI", di, trap.cr2);
    }
}

static void vectors(void)
{
    ulong cr0 = read_cr0() & ~(ulong)(CR0_TS | CR0_EM);
    write_cr4(read_cr4() | BIT(9));
    test("loops: vectors from base to base, and #NM at the first of them once CR0.TS is set");
    for (unsigned k = 0; k < 3 * ROUNDS; k++) {
        bool off = k % 3 == 2;
        ulong si = EDGE - 0x800, di = EDGE2 - 0x400, n = 0x100, bad = 0, first = 0;
        write_cr0(off ? cr0 | CR0_TS : cr0);
        asm volatile(TRY("1: movups (%%rsi), %%xmm0; addq $16, %%rsi; movups %%xmm0, (%%rdi); addq $16, %%rdi; decq %%rcx; jne 1b")
                     : "+S"(si), "+D"(di), "+c"(n)::"memory", "cc");
        eq("vector", trap.vector, off ? NM : NONE);
        eq("left", n, off ? 0x100 : 0);
        eq("source", si, off ? EDGE - 0x800 : EDGE + 0x800);
        for (ulong i = 0; i < 0x1000; i += 8)
            bad += *(volatile u64 *)(EDGE2 - 0x400 + i) != AT(EDGE - 0x800 + i);
        eq("wrong words", bad, 0);
        si = EDGE - 0x100, n = 0x20;
        asm volatile(TRY("1: incq %%rax; addq $8, %%rsi; movq -8(%%rsi), %%xmm0; decq %%rcx; jne 1b") : "+S"(si), "+c"(n), "+a"(first)::"memory", "cc");
        eq("vector, with integers first", trap.vector, off ? NM : NONE);
        eq("RAX", first, off ? 1 : 0x20);
        eq("RSI", si, off ? EDGE - 0xf8 : EDGE);
        write_cr0(cr0);
    }
}

/* The step is an immediate in the loop; the store changes it from 64 to 32. */
static void own_code(void)
{
    static const u8 loop[] = {0x88, 0x07, 0x48, 0x83, 0xc7, 0x40, 0xff, 0xc9, 0x75, 0xf6, 0xc3}; /* mov %al, (%rdi); add $64, %rdi; dec %ecx; jne; ret */
    test("loops: a store into the loop itself counts from the next iteration on");
    for (unsigned k = 0; k < 3 * ROUNDS; k++) {
        u8 *code = (u8 *)HOLE + 0x1000 + 0x800;
        ulong di = (ulong)code + 5 - 64 * 16, n = 32;
        if (k % 4 == 3)                      /* without it, as often as it needs to be translated */
            di += 0x1000;
        memcpy(code, loop, sizeof loop);
        asm volatile("call *%2" : "+D"(di), "+c"(n) : "r"(code), "a"(32) : "memory", "cc");
        eq("RDI", di, k % 4 == 3 ? (ulong)code + 0x1000 + 5 + 64 * 16 : (ulong)code + 5 + 32 * 16);
        eq("the step", code[5], k % 4 == 3 ? 64 : 32);
    }
}

int main(void)
{
    pages(EDGE - 0x3000, EDGE + 0x3000, true);
    pages(EDGE2 - 0x3000, EDGE2 + 0x3000, false);
    pages(HOLE - 0x3000, HOLE, true);
    pages(HOLE + 0x1000, HOLE + 0x4000, true);
    map(HOLE, 0, 0);
    for (unsigned i = 1; i < 4; i++)
        map(HOLE + 0x1000 + 0x8000 * i, page_new(), 7);
    pages(TOP - 0x1000, TOP, true);
    test("loops: copies over the edges of two slots, CPL 0");
    copies(up, true, false);
    copies(down, false, false);
    test("loops: copies over the edges of two slots, CPL 3");
    copies(up_user, true, true);
    copies(down_user, false, true);
    test("loops: absent pages and the end of the canonical range under either base, CPL 0");
    absent(up, false);
    test("loops: absent pages and the end of the canonical range under either base, CPL 3");
    absent(up_user, true);
    strides();
    no_access();
    vectors();
    masked();
    own_code();
    done();
}
