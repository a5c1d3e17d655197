/*
 * engine_test [--engine NAME]: what every engine owes to a debugger (cpu/debug.h) and to whoever asks which pages were
 * written (cpu/engine.h), on a machine with nothing but RAM and an exit port. Prints TAP.
 *
 * Two guests, both put where they run: one in real mode writes to the segments of a list; one in 64-bit mode, as
 * supervisor and as user, takes breakpoints and steps. A check that waits for a stop gives up after some seconds, and the next
 * begins anew.
 *
 * Threads: main, which holds the vCPU and looks; the vCPU's.
 */
#include <errno.h>
#include <getopt.h>
#include <string.h>
#include <time.h>

#include "base/err.h"
#include "base/loop.h"
#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/vcpu.h"
#include "dev/lapic.h"
#include "io/device.h"

#define LOW_SIZE 0xa0000u
#define HIGH_BASE 0x100000u
#define HIGH_SIZE MiB
#define LIST 0x7000u
#define CODE 0x8000u
#define DATA 0x6000u
#define STACK 0x5000u
#define USER 0x10000u
#define PAGE_TABLES 0x20000u
#define IDT 0x30000u
#define GDT 0x31000u
#define PORT_EXIT 0xf4
#define WAIT_S 4

extern const u8 dirty_code[], dirty_end[], debug_code[], debug_end[];
extern const u8 at_add[], at_store[], at_load[], at_pushf[], at_pop[], at_dr7[], at_int3[], at_last[], at_after[], at_halt[], at_cr8[], at_writes[],
    at_handler[];
__asm__(".pushsection .rodata\n"
        ".code16\n"
        "dirty_code: xor %ax, %ax; mov %ax, %ds; mov $0x7000, %si\n"
        "1: lodsw; test %ax, %ax; jz 2f; mov %ax, %es; mov %al, %es:0x10; jmp 1b\n"
        "2: outb %al, $0xf4; jmp dirty_code\n"
        "dirty_end:\n"
        ".code64\n"
        "debug_code: nop\n"
        "at_add: add $1, %rbx\n"
        "at_store: mov %rbx, 0x6000\n"
        "at_load: mov 0x6008, %rdx\n"
        "at_pushf: pushfq\n"
        "at_pop: pop %rax\n"
        "at_last: nop\n"
        "jmp debug_code\n"
        "at_dr7: mov %dr7, %rcx\n"
        "at_int3: int3\n"
        "at_after: jmp at_after\n"
        "at_halt: cli; hlt; outb %al, $0xf4; 1: jmp 1b\n"
        "at_cr8: mov $5, %eax; mov %rax, %cr8; xor %eax, %eax; mov %cr8, %rax; outb %al, $0xf4; 1: jmp 1b\n"
        "at_writes: mov $200, %ecx; 1: mov %rcx, 0x6000; push %rcx; pop %rax; loop 1b; outb %al, $0xf4; jmp at_writes\n"
        "at_handler: add $1, %rsi; iretq\n"
        "debug_end:\n"
        ".popsection");
#define AT(label) (CODE + (u64)(label - debug_code))

enum event { EV_NONE, EV_EXIT, EV_STOP, EV_DEAD };

struct test {
    const struct engine *engine;
    struct machine m;
    struct ram ram;
    struct loop *loop;
    struct lapic_bus *lapics;
    struct lapic *lapic;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum event event;
    unsigned checks, failed;
};

static void check(struct test *t, bool ok, const char *name)
{
    printf("%sok %u - %s\n", ok ? "" : "not ", ++t->checks, name);
    t->failed += !ok;
    fflush(stdout);
}

/* ---- the machine ---- */

static void happened(struct test *t, enum event e)
{
    vcpus_freeze(&t->m);
    pthread_mutex_lock(&t->lock);
    if (t->event == EV_NONE)
        t->event = e;
    pthread_cond_signal(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

static void on_dead(void *arg, struct vcpu *v UNUSED, int why UNUSED, const char *message)
{
    printf("# the vCPU stopped: %s\n", message);
    happened(arg, EV_DEAD);
}

static void on_debug(void *arg, struct vcpu *v UNUSED) { happened(arg, EV_STOP); }

static void exit_write(void *dev, u64 off UNUSED, u64 val UNUSED, unsigned size UNUSED) { happened(dev, EV_EXIT); }

static u64 exit_read(void *dev UNUSED, u64 off UNUSED, unsigned size UNUSED) { return 0; }

static int machine_cpu(struct test *t)
{
    struct machine *m = &t->m;
    struct vcpu_hooks hooks = { .stopped = on_dead, .arg = t };
    struct lapic_config lc = { .clock = m->clock, .phys_bits = cpuid_phys_bits(m->cpuid) };
    int r = lapic_bus_new(&lc, &t->lapics);

    if (r == 0)
        lapic_bus_attach(t->lapics, (struct irqchip){ m->engine->irqchip, m });
    if (r == 0)
        r = m->engine->machine_open(m);
    m->vcpu = calloc(1, sizeof *m->vcpu);
    if (r == 0)
        r = m->vcpu ? vcpu_new(m, 0, &hooks, &m->vcpu[0]) : -ENOMEM;
    if (r < 0)
        return r;
    m->vcpus = 1;
    r = lapic_new(t->lapics, m->vcpu[0]->mmio, 0, true, vcpu_port(m->vcpu[0]), &t->lapic);
    if (r < 0)
        return r;
    ((struct device *)t->lapic)->ops->reset((struct device *)t->lapic);
    m->vcpu[0]->intc = lapic_intc(t->lapic);
    return vcpu_start(m->vcpu[0]);
}

static int machine_open(struct test *t)
{
    const struct region port = { .base = PORT_EXIT, .size = 1, .min = 1, .max = 1, .read = exit_read,
                                 .write = exit_write, .dev = t, .name = "exit" };
    struct machine *m = &t->m;
    int r;

    m->engine = t->engine;
    m->ram = &t->ram;
    m->debug.stopped = on_debug;
    m->debug.arg = t;
    pthread_mutex_init(&m->split_lock, NULL);
    if ((r = loop_new(&t->loop)) < 0 || (r = clock_new(t->loop, &m->clock)) < 0 ||
        (r = cpuid_policy_new(1, clock_tsc_khz(m->clock), &m->cpuid)) < 0)
        return r;
    if (m->engine->cpuid_limit)
        m->engine->cpuid_limit(m->cpuid);
    if ((r = ram_init(&t->ram)) < 0 || (r = ram_add(&t->ram, 0, LOW_SIZE)) < 0 ||
        (r = ram_add(&t->ram, HIGH_BASE, HIGH_SIZE)) < 0 || (r = bus_new(NULL, &m->pio)) < 0 ||
        (r = bus_new(NULL, &m->mmio)) < 0 || (r = bus_add(m->pio, &port)) < 0)
        return r;
    return machine_cpu(t);
}

/* As vm_pause() and vm_resume() do. */
static void pause_guest(struct test *t)
{
    vcpus_hold(&t->m);
    if (t->m.engine->time_stop)
        t->m.engine->time_stop(&t->m);
}

static enum event go(struct test *t)
{
    struct timespec until;
    enum event e;

    t->event = EV_NONE;
    t->m.vcpu[0]->debug.stop = DEBUG_NONE;
    if (t->m.engine->time_start)
        t->m.engine->time_start(&t->m);
    vcpus_release(&t->m);
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_S;
    pthread_mutex_lock(&t->lock);
    while (t->event == EV_NONE && pthread_cond_timedwait(&t->changed, &t->lock, &until) == 0)
        ;
    e = t->event;
    pthread_mutex_unlock(&t->lock);
    pause_guest(t);
    return e;
}

/* ---- which pages were written ---- */

static void set_dirty_guest(struct test *t)
{
    struct x86 x;

    x86_reset(&x, true);
    x.seg[SEG_CS].sel = 0;
    x.seg[SEG_CS].base = 0;
    x.rip = CODE;
    ram_write(&t->ram, CODE, dirty_code, (u64)(dirty_end - dirty_code));
    vcpu_set(t->m.vcpu[0], &x);
}

/* The guest writes to the segments of a list that ends with 0; the list is written by us. */
static bool write_pages(struct test *t, const u16 *list)
{
    unsigned n = 0;

    while (list[n++])
        ;
    ram_write(&t->ram, LIST, list, n * sizeof *list);
    return go(t) == EV_EXIT;
}

/* Are these, ascending, ~0 behind the last, the pages of both runs (of the second from HIGH_BASE on) and no others? Of but, a page's number, and three behind it nothing is asked. */
static bool written(struct test *t, u64 but, const u64 *pages)
{
    bool same = true;

    for (unsigned i = 0; i < t->ram.runs; i++) {
        const struct ram_run *run = &t->ram.run[i];
        u64 *bits = calloc(ram_run_words(run), sizeof *bits);

        if (!bits || machine_dirty(&t->m, i, bits) < 0) {
            printf("# %s\n", err_last());
            free(bits);
            return false;
        }
        for (u64 p = 0; p < run->size >> PAGE_SHIFT; p++) {
            u64 page = (run->gpa >> PAGE_SHIFT) + p;
            bool is = bits[p / 64] >> p % 64 & 1, wanted = *pages == page;

            pages += wanted;
            if (page >= but && page - but < 4)
                continue;
            if (is != wanted)
                printf("# page 0x%llx: %s\n", (unsigned long long)page, is ? "should be clean" : "should be dirty");
            same = same && is == wanted;
        }
        free(bits);
    }
    return same && *pages == ~0ull;
}
#define NO_PAGE (~0ull)
#define WRITTEN(t, ...) WRITTEN_BUT(t, NO_PAGE, __VA_ARGS__)
#define WRITTEN_BUT(t, but, ...) written(t, but, (const u64[]){ __VA_ARGS__ __VA_OPT__(,) ~0ull })
#define WRITE(t, ...) write_pages(t, (const u16[]){ __VA_ARGS__, 0 })

static void check_dirty(struct test *t)
{
    set_dirty_guest(t);
    check(t, WRITE(t, 0x2000, 0x4000), "dirty: the guest runs");
    check(t, machine_track(&t->m, true) == 0 && WRITTEN(t), "dirty: what was written before counts for nothing");
    check(t, WRITE(t, 0x2000, 0x3000, 0x5550) && WRITTEN(t, 7, 0x20, 0x30, 0x55),
          "dirty: the guest's pages, the monitor's, and no others");
    check(t, WRITTEN(t), "dirty: what was fetched is clean");
    check(t, WRITE(t, 0x2000, 0x3000, 0xffff) && WRITTEN(t, 7, 0x20, 0x30, 0x100),
          "dirty: the same pages once more, and one of the second run");
    check(t, WRITE(t, 0x2fff) && WRITE(t, 0x6000) && WRITTEN(t, 7, 0x30, 0x60), "dirty: two runs of the guest add up");
    check(t, WRITE(t, 0x2000) && machine_track(&t->m, false) == 0 && WRITE(t, 0x3000) && WRITTEN(t),
          "dirty: not tracked, nothing is noted");
    check(t, machine_track(&t->m, true) == 0 && WRITTEN(t), "dirty: tracked again, all is clean");
    check(t, WRITE(t, 0x6000) && WRITTEN(t, 7, 0x60), "dirty: and written pages are noted again");
    machine_track(&t->m, false);
}

/* ---- a debugger ---- */

static void put64(struct test *t, u64 gpa, u64 val) { ram_write(&t->ram, gpa, &val, sizeof val); }

/* Identity for the first 2 MiB, in pages of 4 KiB, all open for user code, too. */
static void set_tables(struct test *t)
{
    put64(t, PAGE_TABLES, (PAGE_TABLES + 0x1000) | 7);
    put64(t, PAGE_TABLES + 0x1000, (PAGE_TABLES + 0x2000) | 7);
    put64(t, PAGE_TABLES + 0x2000, (PAGE_TABLES + 0x3000) | 7);
    for (u64 i = 0; i < 512; i++)
        put64(t, PAGE_TABLES + 0x3000 + i * 8, i << PAGE_SHIFT | 7);
    /* code 8, data 16; the gates of #DB and INT3 */
    put64(t, GDT + 8, 0x00209b0000000000ull);
    put64(t, GDT + 16, 0x0000930000000000ull);
    for (u64 vector = 1; vector <= 3; vector += 2)
        put64(t, IDT + vector * 16, (AT(at_handler) & 0xffff) | 8ull << 16 | 0x8eull << 40);
}

static struct x86_seg flat(u16 sel, u16 attr)
{
    return (struct x86_seg){ .limit = UINT32_MAX, .sel = sel, .attr = attr };
}

static void debug_state(struct x86 *x, bool user)
{
    x86_reset(x, true);
    x->seg[SEG_CS] = user ? flat(0x2b, 0xafb) : flat(8, 0xa9b);
    for (unsigned i = 0; i < SEGS; i++)
        if (i != SEG_CS)
            x->seg[i] = user ? flat(0x23, 0xcf3) : flat(16, 0xc93);
    x->cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG;
    x->cr3 = PAGE_TABLES;
    x->cr4 = CR4_PAE;
    x->efer = EFER_SCE | EFER_LME | EFER_LMA;
    x->gdtr = (struct x86_table){ GDT, 0xff };
    x->idtr = (struct x86_table){ IDT, 0xfff };
    x->rip = CODE;
    memset(x->gpr, 0, sizeof x->gpr);
    x->gpr[RSP] = STACK;
}

/* Nobody's wishes, and the guest at its beginning. */
static void begin(struct test *t, bool user)
{
    struct debug *d = &t->m.debug;
    struct x86 x;

    d->points = d->watches = 0;
    d->generation++;
    d->attached = true;
    t->m.vcpu[0]->debug = (struct vcpu_debug){ .stop = DEBUG_NONE };
    ram_write(&t->ram, CODE, debug_code, (u64)(debug_end - debug_code));
    put64(t, DATA, 0);
    debug_state(&x, user);
    vcpu_set(t->m.vcpu[0], &x);
}

static bool point(struct test *t, u64 la)
{
    debug_add_point(&t->m.debug, la);
    return !t->engine->debug_check || t->engine->debug_check(&t->m) == 0;
}

static int watch(struct test *t, u64 la, u64 len, u8 access)
{
    struct debug_watch w = { .la = la, .len = len, .access = access };
    int r = debug_add_watch(&t->m.debug, &w);

    return r == 0 && t->engine->debug_check ? t->engine->debug_check(&t->m) : r;
}

/* Goes on; true if it stops for this reason with RIP there. Goes on from a breakpoint as a debugger does. */
static bool stops(struct test *t, enum debug_stop why, u64 rip, struct x86 *x)
{
    struct vcpu_debug *d = &t->m.vcpu[0]->debug;
    enum event e;

    d->pass = d->stop == DEBUG_POINT;
    d->step = why == DEBUG_STEPPED;
    e = go(t);
    vcpu_get(t->m.vcpu[0], x);
    if (e == EV_STOP && d->stop == why && x->rip == rip)
        return true;
    printf("# event %d, stop %d at 0x%llx; wanted stop %d at 0x%llx\n", (int)e, (int)d->stop,
           (unsigned long long)x->rip, (int)why, (unsigned long long)rip);
    return false;
}

static bool code_is_whole(struct test *t)
{
    u8 now[128];
    u64 n = (u64)(debug_end - debug_code);

    return n <= sizeof now && ram_read(&t->ram, CODE, now, n) == 0 && !memcmp(now, debug_code, n);
}

static void set_rip(struct test *t, u64 rip, u64 flags)
{
    struct x86 x;

    vcpu_get(t->m.vcpu[0], &x);
    x.rip = rip;
    x.rflags = flags;
    vcpu_set(t->m.vcpu[0], &x);
}

static void check_steps(struct test *t)
{
    struct x86 x;
    u64 image = 0;

    begin(t, false);
    check(t, stops(t, DEBUG_STEPPED, AT(at_add), &x) && stops(t, DEBUG_STEPPED, AT(at_store), &x) && x.gpr[RBX] == 1,
          "step: one instruction, then the next");
    check(t, stops(t, DEBUG_STEPPED, AT(at_load), &x) && stops(t, DEBUG_STEPPED, AT(at_pushf), &x) &&
          !(x.rflags & FLAG_TF), "step: memory; TF is not seen");
    check(t, stops(t, DEBUG_STEPPED, AT(at_pop), &x) && ram_read(&t->ram, STACK - 8, &image, 8) == 0 &&
          image & FLAG_1 && !(image & FLAG_TF), "step: PUSHF's image has no TF");
    begin(t, false);
    set_rip(t, AT(at_pushf), FLAG_1 | FLAG_TF);
    check(t, stops(t, DEBUG_STEPPED, AT(at_handler), &x) || x.rip == AT(at_pop),
          "step: TF of the guest's own: its trap is under way, or its handler begins");
    debug_add_point(&t->m.debug, AT(at_handler));
    check(t, (x.rip == AT(at_handler) || stops(t, DEBUG_POINT, AT(at_handler), &x)) &&
          ram_read(&t->ram, x.gpr[RSP] + 16, &image, 8) == 0 && image & FLAG_TF, "step: and the trap is the guest's");
}

/* User code makes a system call; the step ends at its target. */
static void check_syscall(struct test *t)
{
    static const u8 syscall[] = { 0x0f, 0x05, 0x90 };
    struct x86 x;

    begin(t, true);
    ram_write(&t->ram, USER, syscall, sizeof syscall);
    debug_state(&x, true);
    x.star = 0x1bull << 48 | 8ull << 32;
    x.lstar = AT(at_add);
    x.sfmask = FLAG_TF | FLAG_IF;
    x.rip = USER;
    vcpu_set(t->m.vcpu[0], &x);
    check(t, stops(t, DEBUG_STEPPED, AT(at_add), &x) && x86_cpl(&x) == 0 && x.gpr[RCX] == USER + 2 &&
          !(x.gpr[R11] & FLAG_TF), "step: SYSCALL: its target; R11 has no TF");
}

static void check_points(struct test *t, bool user)
{
    struct x86 x;

    begin(t, user);
    check(t, point(t, AT(at_add)) && stops(t, DEBUG_POINT, AT(at_add), &x) && x.gpr[RBX] == 0,
          user ? "breakpoint: user: before the instruction" : "breakpoint: before the instruction");
    check(t, stops(t, DEBUG_POINT, AT(at_add), &x) && x.gpr[RBX] == 1 && stops(t, DEBUG_POINT, AT(at_add), &x) &&
          x.gpr[RBX] == 2, user ? "breakpoint: user: met again" : "breakpoint: goes on from it, and meets it again");
    check(t, stops(t, DEBUG_STEPPED, AT(at_store), &x) && x.gpr[RBX] == 3,
          user ? "breakpoint: user: a step from it" : "breakpoint: a step from it");
}

/* Our breakpoint is in a register; DR7 as the guest reads it is not ours. INT3 that is not ours is the guest's. */
static void check_own(struct test *t)
{
    struct x86 x;

    begin(t, false);
    set_rip(t, AT(at_dr7), FLAG_1);
    check(t, point(t, AT(at_int3)) && stops(t, DEBUG_POINT, AT(at_int3), &x) && x.gpr[RCX] == 0x400,
          "breakpoint: the guest's DR7 is its own");
    begin(t, false);
    set_rip(t, AT(at_dr7), FLAG_1);
    for (u64 i = 0; i < 4; i++)
        point(t, 0x40000000 + i * PAGE_SIZE);
    check(t, point(t, AT(at_after)) && stops(t, DEBUG_POINT, AT(at_after), &x) && x.gpr[RSI] == 1,
          "breakpoint: the guest's own INT3 is the guest's");
}

static void check_many_points(struct test *t, bool user)
{
    const u64 at[] = { AT(at_add), AT(at_store), AT(at_load), AT(at_pushf), AT(at_pop), AT(at_last) };
    bool all = true, whole = true, room = true;
    struct x86 x;

    begin(t, user);
    for (unsigned i = 0; i < ARRAY_SIZE(at); i++)
        room = room && point(t, at[i]);
    for (unsigned round = 0; all && round < 2; round++)
        for (unsigned i = 0; all && i < ARRAY_SIZE(at); i++) {
            all = stops(t, DEBUG_POINT, at[i], &x);
            whole = whole && code_is_whole(t);
        }
    check(t, room && all && x.gpr[RBX] == 2,
          user ? "breakpoint: user: six, each met twice" : "breakpoint: six, each met twice");
    check(t, whole, user ? "breakpoint: user: memory is as it was while the guest stands still"
                         : "breakpoint: memory is as it was while the guest stands still");
}

static void check_watches(struct test *t, bool user)
{
    struct vcpu_debug *d = &t->m.vcpu[0]->debug;
    struct x86 x;
    u64 val = 0;

    begin(t, user);
    check(t, watch(t, DATA, 8, DEBUG_WRITE) == 0 && stops(t, DEBUG_WATCHED, AT(at_load), &x) && d->stop_la == DATA &&
          d->stop_access == DEBUG_WRITE && ram_read(&t->ram, DATA, &val, 8) == 0 && val == 1,
          user ? "watchpoint: user: behind the store" : "watchpoint: behind the store");
    begin(t, user);
    check(t, watch(t, DATA + 8, 8, DEBUG_WRITE) == 0 && watch(t, DATA + 9, 2, DEBUG_READ | DEBUG_WRITE) == 0 &&
          stops(t, DEBUG_WATCHED, AT(at_pushf), &x) && d->stop_la == DATA + 9,
          user ? "watchpoint: user: a load, by some of its bytes" : "watchpoint: a load, by some of its bytes");
}

static u8 tpr(struct test *t)
{
    const struct irqchip_ops *chips = t->engine->irqchip;
    struct lapic_regs r = { 0 };

    if (!chips)
        return (u8)(t->m.vcpu[0]->intc.ops->tpr_get(t->m.vcpu[0]->intc.chip) << 4);
    return chips->lapic_get(&t->m, 0, &r) == 0 ? (u8)r.tpr : 0xff;
}

/* What is not in every engine's registers: CR8 is the local APIC's, a kick of KVM's interface may come before its HLT. */
static void check_state(struct test *t)
{
    struct x86 x;

    begin(t, false);
    t->m.debug.attached = false;
    set_rip(t, AT(at_cr8), FLAG_1);
    check(t, go(t) == EV_EXIT && vcpu_get(t->m.vcpu[0], &x) == 0 && x.gpr[RAX] == 5 && tpr(t) == 0x50,
          "state: CR8 is the local APIC's TPR");
    vcpu_set(t->m.vcpu[0], &x);
    check(t, tpr(t) == 0x50, "state: set() leaves it alone");
    set_rip(t, AT(at_halt), FLAG_1);
    vcpu_get(t->m.vcpu[0], &x);
    x.kvm_unhalted = true;
    vcpu_set(t->m.vcpu[0], &x);
    check(t, go(t) == EV_EXIT, "state: a kick that came before its HLT ends it");
    set_rip(t, AT(at_halt), FLAG_1);
    check(t, go(t) == EV_NONE, "state: and only that one");
}

/*
 * With paging, in a loop. The first time, A and D bits are set in the tables. With nested paging a processor's walk through the guest's tables counts as
 * writing to them, whether it changes a bit or not (APM vol. 2 15.25.5; SDM vol. 3C, accessed and dirty flags for EPT): KVM may tell them.
 */
static void check_dirty64(struct test *t)
{
    u64 tables = !strcmp(t->engine->name, "kvm") ? PAGE_TABLES >> PAGE_SHIFT : NO_PAGE;

    begin(t, false);
    t->m.debug.attached = false;
    set_rip(t, AT(at_writes), FLAG_1);
    check(t, go(t) == EV_EXIT && machine_track(&t->m, true) == 0 && go(t) == EV_EXIT && WRITTEN_BUT(t, tables, 4, 6),
          "dirty: 64-bit code: its data and its stack");
    check(t, go(t) == EV_EXIT && WRITTEN_BUT(t, tables, 4, 6) && WRITTEN(t), "dirty: 64-bit code: once more, after a fetch");
    put64(t, PAGE_TABLES + 0x3000 + 6 * 8, 6 << PAGE_SHIFT | 7);
    check(t, WRITTEN(t, 0x23), "dirty: a page-table entry that we have changed");
    machine_track(&t->m, false);
}

/* Engines that have a limit say so. */
static void check_limits(struct test *t)
{
    bool limited = t->engine->debug_check != NULL, room = true;

    begin(t, false);
    for (u64 i = 0; i < 4; i++)
        room = room && point(t, 0x40000000 + i * PAGE_SIZE);
    check(t, room, "limits: four breakpoints that are not mapped");
    check(t, point(t, 0x40004000) == !limited, "limits: a fifth, where the engine has registers for four");
    debug_del_point(&t->m.debug, 0x40004000);
    check(t, point(t, AT(at_add)), "limits: one that is mapped needs none");
    begin(t, false);
    check(t, watch(t, DATA, 8, DEBUG_READ) == (limited ? -EOPNOTSUPP : 0), "limits: watching reads alone");
    begin(t, false);
    check(t, watch(t, DATA + 1, 15, DEBUG_WRITE) == 0, "limits: a range of four pieces");
    check(t, watch(t, DATA + 64, 1, DEBUG_WRITE) == (limited ? -ENOSPC : 0), "limits: and one more");
}

static int run(struct test *t)
{
    int r = machine_open(t);

    if (r < 0) {
        printf("Bail out! %s\n", err_last());
        return 1;
    }
    vcpus_hold(&t->m);
    check_dirty(t);
    set_tables(t);
    check_steps(t);
    for (unsigned user = 0; user < 2; user++) {
        check_points(t, user);
        check_many_points(t, user);
        check_watches(t, user);
    }
    check_own(t);
    check_syscall(t);
    check_dirty64(t);
    check_limits(t);
    check_state(t);
    printf("1..%u\n", t->checks);
    vcpu_free(t->m.vcpu[0]);
    ((struct device *)t->lapic)->ops->free((struct device *)t->lapic);
    lapic_bus_free(t->lapics);
    t->m.engine->machine_close(&t->m);
    free(t->m.vcpu);
    bus_free(t->m.pio);
    bus_free(t->m.mmio);
    cpuid_policy_free(t->m.cpuid);
    clock_free(t->m.clock);
    loop_free(t->loop);
    ram_close(&t->ram);
    return t->failed != 0;
}

int main(int argc, char **argv)
{
    static struct test t = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

    t.engine = engine_find(argc == 3 && !strcmp(argv[1], "--engine") ? argv[2] : "interp");
    if (!t.engine || argc == 2 || argc > 3) {
        fprintf(stderr, "usage: engine_test [--engine NAME]\n");
        return 64;
    }
    return run(&t);
}
