/* Real mode: the interrupt vector table and the C half of the catcher. */
#include "sys.h"

extern u32 fix_regs[8];
static ulong regs[8];

void ivt_set(unsigned vector, const void *handler) { ((volatile u32 *)0)[vector] = (u32)handler; }

void ivt_default(unsigned vector) { ivt_set(vector, trap_entry + 8 * vector); }

void arch_init(void)
{
    for (unsigned i = 0; i < 256; i++)
        ivt_default(i);
}

struct __attribute__((packed)) frame {
    u32 edi, esi, ebp, esp, ebx, edx, ecx, eax;
    u16 gs, fs, es, ds, vector, ip, cs, flags;
};

int trap_catch(struct frame *f, u32 ss)
{
    trap.vector = f->vector;
    trap.count++;
    trap.error = NONE;
    trap.ip = f->ip, trap.cs = f->cs, trap.flags = f->flags;
    trap.sp = f->esp + 4 * 2 + 2 + 6; /* PUSHA, the segments and the vector are below */
    trap.ss = ss;
    trap.ds = f->ds, trap.es = f->es, trap.fs = f->fs, trap.gs = f->gs;
    memcpy(fix_regs, f, sizeof(fix_regs));
    regs[0] = f->eax, regs[1] = f->ecx, regs[2] = f->edx, regs[3] = f->ebx, regs[5] = f->ebp, regs[6] = f->esi,
    regs[7] = f->edi;
    trap_gpr = regs;
    if (trap_hook && trap_hook()) {
        f->ip = trap.ip;
        f->flags = trap.flags;
        return 0;
    }
    if (!trap_fix)
        trap_unexpected();
    return 1;
}
