/*
 * Operands whose base lies in another PML4 slot (512 GiB) than what they address: by a displacement, by an index, by steps of the base. A translator may look at the base
 * alone (cpu/bt/shadow.h). SDM vol. 1 3.7.5: the address is the sum; vol. 3A 4.5.
 */
#include "sys.h"

#define EDGE 0x8000000000ul                  /* between two slots that both have pages here */
#define LONELY 0x18000000000ul               /* the one below has none */
#define ROUNDS 20u
#define AT(va) (0x7700000000000000ull + (va)) /* what stands at each 8 bytes */

static u64 seen[8], eight = 8, minus = (u64)-0x20000000000l;
static const u8 bytes[] = {0, 1, 2, 255};

static void fill(ulong va)
{
    for (ulong p = va; p < va + 0x1000; p += 8)
        *(volatile u64 *)p = AT(p);
}

/* The same at CPL 0 and 3. */
#define BOTH(what, insns, ...)                                                                                         \
    static void what(ulong rbx, ulong rcx)                                                                             \
    {                                                                                                                  \
        asm volatile(TRY(insns)::"b"(rbx), "c"(rcx), "D"(seen) : "rax", "rdx", "rsi", "r8", "r9", "memory", "cc");     \
    }                                                                                                                  \
    static void what##_user(ulong rbx, ulong rcx)                                                                      \
    {                                                                                                                  \
        asm volatile(USER(insns)::"b"(rbx), "c"(rcx), "D"(UPTR(seen)) : "rax", "rdx", "rsi", "r8", "r9", "memory", "cc"); \
    }

BOTH(displaced, "movq 16(%%rbx), %%rax; movq %%rax, (%%rdi); movq -8(%%rbx), %%rax; movq %%rax, 8(%%rdi); movq (%%rbx), %%rax; movq %%rax, 16(%%rdi)")
BOTH(indexed, "movzbl (%%rcx), %%eax; movq (%%rbx,%%rax,8), %%rdx; movq %%rdx, (%%rdi); movzbl (%%rcx), %%eax; andl $0xfe, %%eax; addq %%rax, 8(%%rbx,%%rax,8); "
              "movq 8(%%rbx,%%rax,8), %%rdx; movq %%rdx, 8(%%rdi); subq %%rax, 8(%%rbx,%%rax,8); xorl %%esi, %%esi; cmpb $2, (%%rcx); setae %%sil; "
              "movq (%%rbx,%%rsi,8), %%rdx; movq %%rdx, 16(%%rdi)")
BOTH(stepped, "movq (%%rbx), %%rax; movq %%rax, (%%rdi); addq $8, %%rbx; movq (%%rbx), %%rax; addq $8, %%rbx; movq (%%rbx), %%rdx; movq %%rax, 8(%%rdi); "
              "movq %%rdx, 16(%%rdi); subq $24, %%rbx; movq (%%rbx), %%rax; movq %%rax, 24(%%rdi)")
BOTH(large, "andq $-16, %%rcx; movq (%%rbx,%%rcx), %%rax; movq %%rax, (%%rdi); movl $3, %%edx; movw %%cx, %%dx; movb $0, %%dl; movq (%%rbx,%%rcx), %%rax; movq %%rax, 8(%%rdi); "
            "movl $0xffffffff, %%edx; xorb %%dl, %%dl; movl %%edx, %%edx; shrl $4, %%edx; leaq (%%rbx,%%rcx), %%rsi; subq %%rdx, %%rsi; movq (%%rsi,%%rdx), %%rax; movq %%rax, 16(%%rdi)")

typedef void fn(ulong rbx, ulong rcx);

static void ends(void) { eq("vector", trap.vector == 0x80 ? NONE : trap.vector, NONE); }

static void round_of(fn *displace, fn *index, fn *step, fn *big, bool user)
{
    for (ulong rbx = EDGE - 32; rbx <= EDGE + 16; rbx += 8) {
        displace(rbx, 0);
        ends();
        eq("16(%rbx)", seen[0], AT(rbx + 16));
        eq("-8(%rbx)", seen[1], AT(rbx - 8));
        eq("(%rbx)", seen[2], AT(rbx));
        step(rbx, 0);
        ends();
        eq("before a step", seen[0], AT(rbx));
        eq("behind it", seen[1], AT(rbx + 8));
        eq("behind another", seen[2], AT(rbx + 16));
        eq("and back", seen[3], AT(rbx - 8));
        big(rbx + 0x20000000000ul, minus);
        ends();
        for (unsigned i = 0; i < 3; i++)
            eq("an index that is not small", seen[i], AT(rbx));
        for (unsigned i = 0; i < sizeof bytes; i++) {
            index(rbx, (ulong)(user ? UPTR(&bytes[i]) : &bytes[i]));
            ends();
            eq("index from a byte", seen[0], AT(rbx + bytes[i] * 8ul));
            eq("masked index, added to", seen[1], AT(rbx + 8 + (bytes[i] & 0xfeul) * 8) + (bytes[i] & 0xfe));
            eq("index of a condition", seen[2], AT(rbx + (bytes[i] >= 2) * 8ul));
        }
    }
}

/* RCX, which look-ups may borrow, changed between accesses that hit and ones that miss. */
static void borrowed(void)
{
    ulong a = EDGE - 0x2000, rax, rcx, rdx, r8;

    test("slots: RCX is its own between accesses, whatever they come to");
    for (unsigned k = 0; k < 4 * ROUNDS; k++) {
        if (k & 1)
            write_cr3(read_cr3());
        else if (k & 2)
            invlpg((void *)(a + 0x1000 * (k >> 2 & 3)));
        rcx = 0x1111111111110000 + k;
        asm volatile("movq (%4), %%rax; incq %%rcx; movq 0x1000(%4), %%rdx; addq %%rcx, %%rax; movq 0x2000(%4), %%r8; movb $7, %%cl; pushq %%rcx; addq 0x3000(%4), %%r8\n"
                     "popq %%rdx; addq %%rcx, %%rax; xchgq %%rcx, %%rdx; addq (%4), %%rcx; addq %%rdx, 0x1008(%4); subq %%rdx, 0x1008(%4)"
                     : "=&a"(rax), "+c"(rcx), "=&d"(rdx), "=&r"(r8) : "r"(a) : "r8", "memory", "cc");
        eq("RAX", rax, AT(a) + 0x1111111111110001 + k + 0x1111111111110007);
        eq("RCX", rcx, 0x1111111111110007 + AT(a));
        eq("RDX", rdx, 0x1111111111110007);
        eq("a sum in memory", *(volatile u64 *)(a + 0x1008), AT(a + 0x1008));
    }
}

int main(void)
{
    for (ulong va = EDGE - 0x2000; va < EDGE + 0x2000; va += 0x1000) {
        map(va, page_new(), 7);
        fill(va);
    }
    map(LONELY, page_new(), 7);
    fill(LONELY);
    test("slots: bases beside the edge of two, CPL 0");
    for (unsigned k = 0; k < ROUNDS; k++)
        round_of(displaced, indexed, stepped, large, false);
    test("slots: likewise, CPL 3");
    for (unsigned k = 0; k < ROUNDS; k++)
        round_of(displaced_user, indexed_user, stepped_user, large_user, true);
    borrowed();
    test("slots: a base in one where nothing is mapped");
    for (unsigned k = 0; k < ROUNDS; k++) {
        ulong rbx = LONELY - 8;
        asm volatile(TRY("movq 16(%%rbx), %%rax; movq %%rax, (%%rdi); addq %%rcx, %%rbx; movq (%%rbx), %%rax; movq %%rax, 8(%%rdi)")
                     : "+b"(rbx) : "c"(eight), "D"(seen) : "rax", "memory", "cc");
        ends();
        eq("16(%rbx)", seen[0], AT(LONELY + 8));
        eq("stepped", seen[1], AT(LONELY));
        asm volatile(TRY("movq -16(%%rbx), %%rax")::"b"(LONELY + 8) : "rax", "memory", "cc");
        eq("vector", trap.vector, 14);
        eq("CR2", trap.cr2, LONELY - 8);
    }
    done();
}
