/*
 * Decoder and interpreter: whatever bytes a guest executes, in whatever mode and with whatever registers, the monitor stays whole. Differences from the
 * processor are tests/insn's and tests/sys's subject; here only the sanitizers and bug_on() judge.
 *
 * Input: byte 0 the mode, byte 1 control bits, bytes 2..33 eight 4-byte seeds of registers, then code, placed so that it may cross a page. Data pages, tables
 * and code share 2 MiB, so that programs overwrite their own tables and themselves. Programs that loop are ended by a timer.
 */
#include <signal.h>
#include <string.h>
#include <sys/time.h>

#include "base/clock.h"
#include "base/loop.h"
#include "cpu/cpuid.h"
#include "cpu/engine.h"

#define RAM_SIZE (2 * MiB)
#define CODE  0x20ff0u
#define STACK 0x30000u
#define PML4  0x1000u
#define GDT   0x8000u
#define IDT   0x9000u
#define TSS   0xc000u
#define BUDGET_US 3000

struct fixture {
    struct machine m;
    struct vcpu v;
    struct ram ram;
};

static struct fixture *current;                                    /* for the signal handler */

static int none(void *chip)
{
    (void)chip;
    return -1;
}
static int read_zero(void *chip, u32 msr, u64 *val)
{
    (void)chip;
    *val = msr == 0x1b ? 0xfee00900 : 0;
    return 0;
}
static int write_any(void *chip, u32 msr, u64 val)
{
    (void)chip, (void)msr, (void)val;
    return 0;
}
static u8 tpr(void *chip)
{
    (void)chip;
    return 0;
}
static void set_tpr(void *chip, u8 v)
{
    (void)chip, (void)v;
}
static void init(void *chip)
{
    (void)chip;
}
static const struct intc_ops intc = {
    .peek = none, .ack = none, .msr_read = read_zero, .msr_write = write_any, .tpr_get = tpr, .tpr_set = set_tpr, .init = init
};

static void out_of_time(int sig)
{
    (void)sig;
    atomic_fetch_or(&current->v.events, VCPU_EV_KICK);
}

static struct fixture *fixture(void)
{
    struct fixture *f = aligned_alloc(64, ALIGN_UP(sizeof *f, 64));
    struct loop *loop;

    memset(f, 0, sizeof *f);
    f->m = (struct machine){ .ram = &f->ram, .engine = &interp_engine, .vcpus = 1, .split_lock = PTHREAD_MUTEX_INITIALIZER };
    if (ram_init(&f->ram) || ram_add(&f->ram, 0, RAM_SIZE) || bus_new(NULL, &f->m.mmio) || bus_new(NULL, &f->m.pio) ||
        loop_new(&loop) || clock_new(loop, &f->m.clock) || cpuid_policy_new(1, clock_tsc_khz(f->m.clock), &f->m.cpuid))
        abort();
    f->v.m = &f->m;
    f->v.mmio = f->m.mmio;
    f->v.intc.ops = &intc;
    if (interp_engine.machine_open(&f->m) || interp_engine.vcpu_open(&f->v))
        abort();
    signal(SIGALRM, out_of_time);
    return f;
}

static void put64(struct fixture *f, u64 gpa, u64 v)
{
    memcpy(ram_hva(&f->ram, gpa), &v, 8);
}

static struct x86_seg segment(u16 sel, u16 attr)
{
    return (struct x86_seg){ .limit = attr & SEG_G ? 0xffffffff : 0xffff, .sel = sel, .attr = attr };
}

/* Identity map of the RAM by one 2 MiB page, a GDT with every kind of descriptor, an IDT whose gates are all good. */
static void tables(struct fixture *f, bool wide)
{
    memset(ram_hva(&f->ram, 0), 0, 0x10000);
    put64(f, PML4, 0x2007);
    put64(f, 0x2000, 0x3007);
    put64(f, 0x3000, 0x87);
    put64(f, 0x3008, 0x4007);                                      /* the second 2 MiB by small pages, some read-only or absent */
    for (unsigned i = 0; i < 512; i++)
        put64(f, 0x4000 + 8 * i, (i * PAGE_SIZE) | (i & 7));
    put64(f, GDT + 0x08, wide ? 0x00af9b000000ffff : 0x00cf9b000000ffff);
    put64(f, GDT + 0x10, 0x00cf93000000ffff);
    put64(f, GDT + 0x18, 0x00cff3000000ffff);
    put64(f, GDT + 0x20, wide ? 0x00affb000000ffff : 0x00cffb000000ffff);
    put64(f, GDT + 0x28, 0x00008b0000000067 | (u64)TSS << 16);
    put64(f, GDT + 0x38, 0x00cf9b000000ffff);
    put64(f, GDT + 0x40, 0x0000920000000fff | 0x30000ull << 16);
    put64(f, GDT + 0x48, 0x0000ec0000080000 | CODE);               /* a call gate */
    for (unsigned i = 0; i < 64; i++) {
        put64(f, IDT + (wide ? 16 : 8) * i, (CODE & 0xffff) | 0x08 << 16 | 0xee00ull << 32 | (u64)(CODE >> 16) << 48);
        if (wide)
            put64(f, IDT + 16 * i + 8, 0);
    }
    put64(f, TSS + 4, STACK - 0x1000);
}

static void enter(struct fixture *f, unsigned mode, u8 control)
{
    struct x86 *x = &f->v.x;
    bool wide = mode >= 4, user = control & 1;

    x86_reset(x, true);
    tables(f, wide);
    x->rip = CODE;
    x->gpr[RSP] = STACK;
    x->gdtr = (struct x86_table){ GDT, 0xff };
    x->idtr = (struct x86_table){ mode ? IDT : 0, 0x3ff };
    x->tr = (struct x86_seg){ .base = TSS, .limit = 0x67, .sel = 0x28, .attr = 0x8b };
    if (mode == 0 || mode == 3) {                                  /* real mode, virtual-8086 */
        for (unsigned i = 0; i < SEGS; i++)
            x->seg[i] = (struct x86_seg){ .base = 0x20000, .limit = 0xffff, .sel = 0x2000, .attr = mode ? 0xf3 : 0x93 };
        x->rip = CODE - 0x20000;
        x->gpr[RSP] = 0xff00;
    } else {
        for (unsigned i = 0; i < SEGS; i++)
            x->seg[i] = segment(user ? 0x1b : 0x10, user ? 0xcf3 : 0xc93);
        x->seg[SEG_CS] = mode == 4 ? segment(user ? 0x23 : 0x08, user ? 0xafb : 0xa9b) : segment(user ? 0x23 : 0x38, user ? 0xcfb : 0xc9b);
        if (mode == 1)
            x->seg[SEG_CS].attr &= (u16)~SEG_DB;
    }
    if (mode) {
        x->cr0 = CR0_PE | CR0_NE | CR0_ET | (control & 2 ? CR0_WP : 0) | (control & 4 ? CR0_AM : 0);
        x->cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | (control & 8 ? CR4_SMEP | CR4_SMAP : 0) | (control & 16 ? CR4_UMIP | CR4_VME : 0);
        x->xcr0 = 7;
    }
    if (wide) {
        x->cr0 |= CR0_PG;
        x->cr3 = PML4;
        x->cr4 |= CR4_PAE | CR4_PGE | CR4_FSGSBASE;
        x->efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
    }
    x->rflags = FLAG_1 | (control & 32 ? FLAG_TF : 0) | (control & 64 ? FLAG_IOPL : 0) | (mode == 3 ? FLAG_VM : 0) | (control & 128 ? FLAG_AC : 0);
    x->activity = X86_RUNNING;
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t size);
int LLVMFuzzerTestOneInput(const u8 *data, size_t size)
{
    static const u8 reg[] = { RAX, RCX, RDX, RBX, RBP, RSI, RDI, R8 };
    const struct itimerval budget = { .it_value.tv_usec = BUDGET_US }, off = { 0 };
    struct fixture *f;
    enum run_exit why;

    if (size < 36 || size > 4096)
        return 0;
    if (!current)
        current = fixture();
    f = current;
    enter(f, data[0] % 6, data[1]);
    for (unsigned i = 0; i < 8; i++) {
        u32 seed;

        memcpy(&seed, data + 2 + 4 * i, 4);
        f->v.x.gpr[reg[i]] = seed & 1 ? (u64)(s64)(s32)seed : seed % RAM_SIZE;
    }
    memset(ram_hva(&f->ram, CODE & PAGE_MASK), 0xf4, 3 * PAGE_SIZE);
    memcpy(ram_range(&f->ram, CODE, size - 34), data + 34, size - 34);
    atomic_store(&f->v.events, 0);
    interp_engine.set(&f->v, &f->v.x);
    setitimer(ITIMER_REAL, &budget, NULL);
    why = interp_engine.run(&f->v);
    setitimer(ITIMER_REAL, &off, NULL);
    if (why == RUN_FAILED)
        abort();
    return 0;
}
