/* 32-bit protected mode: descriptor tables, the task-state segment, and the C half of the catcher. */
#include "sys.h"

#define POOL 0x200000ul /* pages for tests: physical memory up to 16 MiB */
#define POOL_END 0x1000000ul

static u64 idt[256] __attribute__((aligned(16)));
struct tss32 tss;
struct table_reg idt_reg = {sizeof(idt) - 1, (ulong)idt};
extern char trap_entry[];

void idt_set(unsigned vector, u16 sel, const void *handler, u32 access, u8 ist)
{
    idt[vector] = gate(sel, (u32)(ulong)handler, access, ist);
}

void idt_default(unsigned vector)
{
    idt_set(vector, KCS, trap_entry + vector * 16, D_P | D_DPL(vector == VEC_DONE ? 3 : 0) | TYPE_INT, 0);
}

void tss_limit(u32 limit)
{
    gdt[TSS_SEL / 8] = descriptor((u32)&tss, limit, D_P | TYPE_TSS);
    asm volatile("ltr %w0" ::"r"(TSS_SEL));
}

void arch_init(void)
{
    for (unsigned i = 0; i < 256; i++)
        idt_default(i);
    lidt(&idt_reg);
    tss.esp0 = (ulong)ring0_stack_end;
    tss.ss0 = KDS;
    tss.iomap = __builtin_offsetof(struct tss32, io);
    memset(tss.io, 0xff, sizeof(tss.io));
    tss_limit(sizeof(tss) - 1);
    asm volatile("lldt %w0; mov %1, %%ds; mov %1, %%es; mov %0, %%fs; mov %0, %%gs" ::"r"(0), "r"(UDS));
}

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

u64 page_new(void) { return (ulong)pages_new(1); }

unsigned phys_bits(void) { return cpuid(0x80000000, 0).a >= 0x80000008 ? cpuid(0x80000008, 0).a & 0xff : 36; }

/* ---- the catcher ---- */
struct frame {
    ulong edi, esi, ebp, esp, ebx, edx, ecx, eax; /* PUSHA */
    ulong gs, fs, es, ds;
    ulong vector, error, eip, cs, eflags, old_esp, old_ss, v_es, v_ds, v_fs, v_gs;
};
static ulong regs[8];

/* GPRs in the processor's numbering, for hooks, and back. */
static void regs_out(const struct frame *f)
{
    const ulong r[8] = {f->eax, f->ecx, f->edx, f->ebx, f->esp, f->ebp, f->esi, f->edi};
    memcpy(regs, r, sizeof(r));
}

static void regs_in(struct frame *f)
{
    f->eax = regs[0], f->ecx = regs[1], f->edx = regs[2], f->ebx = regs[3], f->ebp = regs[5], f->esi = regs[6],
    f->edi = regs[7];
}

int trap_catch(struct frame *f)
{
    bool v86 = f->eflags & F_VM, outer = v86 || (f->cs & 3);

    trap.vector = f->vector;
    trap.count++;
    trap.error = f->error;
    trap.ip = f->eip;
    trap.cs = f->cs;
    trap.flags = f->eflags;
    trap.sp = outer ? f->old_esp : (ulong)&f->old_esp;
    trap.ss = outer ? f->old_ss : 0;
    trap.cr2 = read_cr2();
    trap.dr6 = read_dr6();
    trap.handler_sp = (ulong)(f->error == NONE ? &f->eip : &f->error);
    trap.ds = f->ds, trap.es = f->es, trap.fs = f->fs, trap.gs = f->gs;
    if (v86) {
        trap.v86_es = f->v_es, trap.v86_ds = f->v_ds, trap.v86_fs = f->v_fs, trap.v86_gs = f->v_gs;
        if (f->vector == GP && f->error == 0 && *(u8 *)((f->cs << 4) + (f->eip & 0xffff)) == 0xf4)
            trap.vector = VEC_DONE, trap.error = NONE;
    }
    trap_gpr = regs;
    regs_out(f);
    if (trap_hook && trap_hook()) {
        regs_in(f);
        f->eip = trap.ip;
        f->eflags = trap.flags;
        return 0;
    }
    if (!trap_fix)
        trap_unexpected();
    return 1;
}

/* ---- code made at run time ---- */
static u8 exec_code[4096] __attribute__((aligned(4096)));
u8 exec_data[1024] __attribute__((aligned(64)));
void exec_call(ulong ip, void *data, ulong user);

void exec(const void *code, unsigned n, bool user)
{
    memcpy(exec_code, code, n);
    exec_code[n] = 0xc3;
    exec_call(exec_ip(user), exec_data, user);
    if (trap.vector == VEC_DONE)
        trap.vector = NONE;
}

ulong exec_ip(bool user)
{
    (void)user;
    return (ulong)exec_code;
}
