/* Long mode: descriptor tables, the task-state segment, page tables, and the C half of the catcher. */
#include "sys.h"

#define POOL 0x200000ul /* pages for tests: physical memory up to 16 MiB */
#define POOL_END 0x1000000ul

struct idt_gate {
    u64 lo, hi;
};
static struct idt_gate idt[256] __attribute__((aligned(16)));
struct tss64 tss;
struct table_reg idt_reg = {sizeof(idt) - 1, (ulong)idt};
extern char trap_entry[];

void idt_set(unsigned vector, u16 sel, const void *handler, u32 access, u8 ist)
{
    idt[vector].lo = gate(sel, (u32)(ulong)handler, access, ist);
    idt[vector].hi = (ulong)handler >> 32;
}

void idt_default(unsigned vector)
{
    idt_set(vector, KCS, trap_entry + vector * 16, D_P | D_DPL(vector == VEC_DONE ? 3 : 0) | TYPE_INT, 0);
}

void tss_limit(u32 limit)
{
    gdt[TSS_SEL / 8] = descriptor((u32)(ulong)&tss, limit, D_P | TYPE_TSS);
    gdt[TSS_SEL / 8 + 1] = (ulong)&tss >> 32;
    asm volatile("ltr %w0" ::"r"(TSS_SEL));
}

void arch_init(void)
{
    for (unsigned i = 0; i < 256; i++)
        idt_default(i);
    lidt(&idt_reg);
    tss.rsp[0] = (ulong)ring0_stack_end;
    tss.iomap = sizeof(tss) - sizeof(tss.io);
    memset(tss.io, 0xff, sizeof(tss.io));
    tss_limit(sizeof(tss) - 1);
    asm volatile("lldt %w0" ::"r"(0));
}

/* ---- paging ---- */
static ulong pool = POOL;

void *pages_new(unsigned n)
{
    void *p = (void *)pool;

    pool += n * 4096ul;
    if (pool > POOL_END) {
        test("memory for page tables");
        must("enough", false);
        done();
    }
    memset(p, 0, n * 4096ul);
    return p;
}

u64 page_new(void) { return (u64)pages_new(1); }

volatile u64 *pte_at(u64 root, ulong va, int level)
{
    u64 *table = (u64 *)(root & PTE_ADDR);

    for (int l = 4;; l--) {
        u64 *e = &table[va >> (12 + 9 * (l - 1)) & 511];
        if (l == level)
            return e;
        if (!(*e & PTE_P))
            *e = page_new() | PTE_P | PTE_W | PTE_U;
        table = (u64 *)(*e & PTE_ADDR);
    }
}

volatile u64 *pte(ulong va, int level) { return pte_at(read_cr3(), va, level); }

void map(ulong va, u64 pa, u64 bits)
{
    *pte(va, 1) = pa | bits;
    invlpg((void *)va);
}

unsigned phys_bits(void) { return cpuid(0x80000000, 0).a >= 0x80000008 ? cpuid(0x80000008, 0).a & 0xff : 36; }

/* ---- the catcher ---- */
struct frame {
    ulong gpr[16];
    ulong vector, word[]; /* [error,] RIP, CS, RFLAGS, RSP, SS */
};

int trap_catch(struct frame *f)
{
    int has_error = ((ulong)&f->word[0] & 15) == 0;
    ulong *w = f->word + has_error;
    u16 ds, es, fs, gs;

    asm volatile("mov %%ds, %0\n\tmov %%es, %1\n\tmov %%fs, %2\n\tmov %%gs, %3"
                 : "=r"(ds), "=r"(es), "=r"(fs), "=r"(gs));
    trap.vector = f->vector;
    trap.count++;
    trap.error = has_error ? f->word[0] : NONE;
    trap.ip = w[0];
    trap.cs = w[1];
    trap.flags = w[2];
    trap.sp = w[3];
    trap.ss = w[4];
    trap.cr2 = read_cr2();
    trap.dr6 = read_dr6();
    trap.handler_sp = (ulong)&f->word[0];
    trap.ds = ds, trap.es = es, trap.fs = fs, trap.gs = gs;
    trap_gpr = f->gpr;
    if (trap_hook && trap_hook()) {
        w[0] = trap.ip;
        w[2] = trap.flags;
        return has_error;
    }
    if (!trap_fix)
        trap_unexpected();
    w[0] = trap_fix;
    w[1] = KCS;
    w[2] = F_1;
    w[3] = trap_sp;
    w[4] = KDS;
    return has_error;
}

/* ---- code made at run time ---- */
static u8 exec_code[4096] __attribute__((aligned(4096)));
u8 exec_data[1024] __attribute__((aligned(64)));

void exec_call(ulong ip, void *data, bool user);

void exec(const void *code, unsigned n, bool user)
{
    memcpy(exec_code, code, n);
    exec_code[n] = 0xc3;
    exec_call(exec_ip(user), user ? UPTR(exec_data) : exec_data, user);
    if (trap.vector == VEC_DONE)
        trap.vector = NONE;
}

ulong exec_ip(bool user) { return (ulong)exec_code + (user ? USER_OFF : 0); }
