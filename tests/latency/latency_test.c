/*
 * latency_test [--engine NAME] [--mmu NAME] [--signals] [--samples N] [--print] [--stress N [--only KIND]]: how long an interrupt takes, from vcpu_raise() on one thread of the host to the first instruction of the guest's
 * handler, while the guest is in a tight loop: median and 99.9th percentile, for each kind of loop.
 *
 * The guest reads its TSC in the handler, which is the host's and a bias. Between two interrupts there is a pause of random length, so that they do not come in step with
 * anything. --signals: loops do not look by themselves. --print: "NAME MEDIAN_NS P999_NS" a line, the last one of all loops together, for bench/run. Else TAP: every interrupt comes, and mostly long before anything but the kick could have
 * brought it; the figures are comments, since on a host with other work to do they are the scheduler's.
 * --stress: instead, N kicks at each of many kinds of code, at random nanoseconds, once with loops that look by themselves and once by signals alone: each is answered, and none
 * had to be sent twice (cpu/bt/signal.c, bt_signal_again()).
 *
 * The machine: one vCPU, 2 MiB, no devices but an interrupt controller that has one vector.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#undef REG_RIP                                                     /* of <ucontext.h>; interp.h has its own */
#include "base/loop.h"
#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/interp/interp.h"
#include "cpu/vcpu.h"

#define RAM_BYTES (2 * MiB)
#define SUPER 0xffff800000000000ull                                /* all RAM, for the supervisor */
#define USER 0x110000000ull                                        /* GPA_USER's page, twice, for CPL 3 */
#define VECTOR 0x40
#define MEDIAN_MAX_NS 20000000ull
#define GIVE_UP_S 60
enum { GPA_PML4 = 0x1000, GPA_PDPT = 0x2000, GPA_PD = 0x3000, GPA_PT = 0x4000, GPA_PDPT_SUPER = 0x5000, GPA_PD_SUPER = 0x6000, GPA_GDT = 0x7000, GPA_TSS = 0x7800, GPA_IDT = 0x8000, GPA_HANDLER = 0x9000, GPA_FAULT = 0x9800,
       GPA_SEEN = 0xa000, GPA_STACK_TOP = 0xc000, GPA_CODE = 0x10000, GPA_USER = 0x20000, GPA_DATA = 0x100000 };

static const struct loop_kind {
    const char *name;
    bool user;
    u8 code[48];
} kinds[] = {
    {"jump", false, {0xeb, 0xfe}},                                 /* jmp $ */
    {"user-jump", true, {0xeb, 0xfe}},
    {"count", false, {0x48, 0xff, 0xc8, 0x75, 0xfb, 0xeb, 0xf9}},  /* dec rax; jnz; jmp */
    {"memory", false, {0x48, 0x8b, 0x07, 0x48, 0x83, 0xc0, 0x03, 0x48, 0x89, 0x07, 0xeb, 0xf4}}, /* mov rax, [rdi]; add rax, 3; mov [rdi], rax; jmp */
    {"call", false, {0xe8, 0x02, 0, 0, 0, 0xeb, 0xf9, 0xc3}},      /* call f; jmp; f: ret */
    {"pause", false, {0xf3, 0x90, 0xeb, 0xfc}},
    {"copy", false, {0x48, 0x89, 0xf7, 0x48, 0x81, 0xc7, 0, 0, 4, 0, 0xb9, 0, 0, 3, 0, 0x56, 0xf3, 0xa4, 0x5e, 0xeb, 0xeb}},
                                                                   /* lea rdi, [rsi + 256 KiB]; mov ecx, 192 KiB; push rsi; rep movsb; pop rsi; jmp */
};

/* Whatever else a kick may find: --stress. */
static const struct loop_kind more[] = {
    {"x87", false, {0xdb, 0xe3, 0xd9, 0xee, 0xdd, 0xd8, 0xeb, 0xf8}}, /* fninit; fldz; fstp st0; jmp: interp's stubs have a handler of signals, too */
    {"indirect", false, {0x48, 0x8d, 0x05, 4, 0, 0, 0, 0xff, 0xd0, 0xeb, 0xf5, 0xc3}}, /* lea rax, [rip + 4]; call rax; jmp; ret */
    {"recursion", false, {0xb9, 100, 0, 0, 0, 0xe8, 2, 0, 0, 0, 0xeb, 0xf4, 0xff, 0xc9, 0x74, 5, 0xe8, 0xf7, 0xff, 0xff, 0xff, 0xc3}},
                                                                   /* mov ecx, 100; call f; jmp; f: dec ecx; jz 1f; call f; 1: ret */
    {"same-page-twice", true, {0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0x48, 0x35, 0, 0x10, 0, 0, 0xff, 0xe0}}, /* lea rax, [rip - 7]; xor rax, 4096; jmp rax: a copy of a translation */
    {"page-fault", false, {0x48, 0x8b, 0x87, 0, 0, 0, 0x10, 0xeb, 0xf7}}, /* mov rax, [rdi + 256 MiB]; jmp */
    {"self-modifying", false, {0xff, 0x05, 1, 0, 0, 0, 0xb8, 0, 0, 0, 0, 0xeb, 0xf3}}, /* inc dword [rip + 1]; mov eax, 0; jmp */
    {"handler", false, {0x31, 0xc0, 0x0f, 0xa2, 0xeb, 0xfa}},      /* xor eax, eax; cpuid; jmp */
    {"cli-sti", false, {0xfa, 0x90, 0xfb, 0x90, 0xeb, 0xfa}},
    {"pushf-popf", false, {0x9c, 0x9d, 0xeb, 0xfc}},
    {"push-pop", false, {0x50, 0x5b, 0xeb, 0xfc}},
    {"vector", false, {0x0f, 0x58, 0xc1, 0xeb, 0xfb}},             /* addps xmm0, xmm1; jmp */
    {"loop", false, {0xb9, 0xe8, 3, 0, 0, 0xe2, 0xfe, 0xeb, 0xf7}}, /* mov ecx, 1000; loop $; jmp */
    {"lock", false, {0xf0, 0xff, 0x07, 0xeb, 0xfb}},               /* lock inc dword [rdi]; jmp */
    {"fill", false, {0x57, 0xb9, 0, 0, 1, 0, 0xf3, 0xaa, 0x5f, 0xeb, 0xf5}}, /* push rdi; mov ecx, 65536; rep stosb; pop rdi; jmp */
    {"cr3", false, {0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0xeb, 0xf8}}, /* mov rax, cr3; mov cr3, rax; jmp */
};

static struct {
    const struct engine *engine;
    struct loop *loop;
    struct machine m;
    struct ram ram;
    struct vcpu *vcpu[1];
    _Atomic int pending;
    _Atomic bool failed;
} g;

/* ---- the interrupt controller ---- */
static int ack(void *intc UNUSED)
{
    return atomic_exchange(&g.pending, -1);
}
static int peek(void *intc UNUSED)
{
    return atomic_load(&g.pending);
}
static int no_msr_read(void *intc UNUSED, u32 msr UNUSED, u64 *val UNUSED) { return -1; }
static int no_msr_write(void *intc UNUSED, u32 msr UNUSED, u64 val UNUSED) { return -1; }
static u8 no_tpr(void *intc UNUSED) { return 0; }
static void set_tpr(void *intc UNUSED, u8 cr8 UNUSED) {}
static void no_init(void *intc UNUSED) {}
static const struct intc_ops intc = {
    .peek = peek, .ack = ack, .msr_read = no_msr_read, .msr_write = no_msr_write, .tpr_get = no_tpr, .tpr_set = set_tpr, .init = no_init,
};

/* ---- the guest ---- */
static void put64(u64 gpa, u64 v)
{
    bug_on(ram_write(&g.ram, gpa, &v, 8));
}

static void put_gate(unsigned vector, u64 handler)
{
    put64(GPA_IDT + 16 * vector, (handler & 0xffff) | 0x10ull << 16 | 0x8e00ull << 32 | (handler >> 16 & 0xffff) << 48);
    put64(GPA_IDT + 16 * vector + 8, handler >> 32);
}

static void build(void)
{
    static const u8 handler[] = {                                  /* push rax; push rdx; rdtsc; shl rdx, 32; or rax, rdx; mov [abs], rax; pop; pop; iretq */
        0x50, 0x52, 0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0x48, 0xa3, 0, 0, 0, 0, 0, 0, 0, 0, 0x5a, 0x58, 0x48, 0xcf,
    };
    static const u8 skip[] = {0x48, 0x83, 0xc4, 8, 0x48, 0x83, 4, 0x24, 7, 0x48, 0xcf}; /* of a page fault: add rsp, 8; add qword [rsp], 7; iretq */
    u64 seen = SUPER + GPA_SEEN;
    put64(GPA_PML4, GPA_PDPT | 7);
    put64(GPA_PML4 + 8 * 256, GPA_PDPT_SUPER | 3);
    put64(GPA_PDPT_SUPER, GPA_PD_SUPER | 3);
    put64(GPA_PD_SUPER, 0x83);
    put64(GPA_PDPT + 8 * (USER >> 30), GPA_PD | 7);
    put64(GPA_PD + 8 * (USER >> 21 & 511), GPA_PT | 7);
    put64(GPA_PT, GPA_USER | 0x67);
    put64(GPA_PT + 8, GPA_USER | 0x67);
    put64(GPA_GDT + 0x10, 0x00af9b000000ffff);
    put64(GPA_GDT + 0x18, 0x00cf93000000ffff);
    put64(GPA_GDT + 0x28, 0x00cff3000000ffff);
    put64(GPA_GDT + 0x30, 0x00affb000000ffff);
    put64(GPA_TSS + 4, SUPER + GPA_STACK_TOP);
    put_gate(VECTOR, SUPER + GPA_HANDLER);
    put_gate(VEC_PF, SUPER + GPA_FAULT);
    bug_on(ram_write(&g.ram, GPA_HANDLER, handler, sizeof handler));
    bug_on(ram_write(&g.ram, GPA_FAULT, skip, sizeof skip));
    bug_on(ram_write(&g.ram, GPA_HANDLER + 13, &seen, 8));
}

static void state(const struct loop_kind *k, struct x86 *x)
{
    x86_reset(x, true);
    x->cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    x->cr3 = GPA_PML4;
    x->cr4 = (CR4_PAE | CR4_PGE | CR4_OSFXSR) & cpuid_cr4_mask(g.m.cpuid);
    x->efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    x->gdtr = (struct x86_table){SUPER + GPA_GDT, 127};
    x->idtr = (struct x86_table){SUPER + GPA_IDT, 4095};
    x->tr = (struct x86_seg){.base = SUPER + GPA_TSS, .limit = 103, .sel = 0x40, .attr = 0x8b};
    x->ldtr = (struct x86_seg){.attr = 0};
    for (unsigned s = 0; s < SEGS; s++)
        x->seg[s] = (struct x86_seg){.limit = 0xffffffff, .sel = k->user ? 0x2b : 0x18, .attr = k->user ? 0xcf3 : 0xc93};
    x->seg[SEG_CS] = (struct x86_seg){.limit = 0xffffffff, .sel = k->user ? 0x33 : 0x10, .attr = k->user ? 0xafb : 0xa9b};
    x->rip = k->user ? USER : SUPER + GPA_CODE;
    x->rflags = FLAG_1 | FLAG_IF;
    x->gpr[RSP] = SUPER + GPA_STACK_TOP - 512;
    x->gpr[RDI] = x->gpr[RSI] = SUPER + GPA_DATA;
}

static void on_stopped(void *arg UNUSED, struct vcpu *v, int why UNUSED, const char *message)
{
    printf("# vCPU %u stopped: %s\n", v->id, message);
    atomic_store(&g.failed, true);
}

static int open_machine(void)
{
    struct vcpu_hooks hooks = {.stopped = on_stopped};
    struct machine *m = &g.m;
    pthread_mutex_init(&m->split_lock, NULL);
    if (loop_new(&g.loop) || clock_new(g.loop, &m->clock) || ram_init(&g.ram) || ram_add(&g.ram, 0, RAM_BYTES) ||
        cpuid_policy_new(1, clock_tsc_khz(m->clock), &m->cpuid) || bus_new(NULL, &m->pio) || bus_new(NULL, &m->mmio))
        return -1;
    m->ram = &g.ram;
    m->engine = g.engine;
    m->vcpu = g.vcpu;
    m->tools.translate_at_once = true;
    if (g.engine->cpuid_limit)
        g.engine->cpuid_limit(m->cpuid);
    build();
    atomic_store(&g.pending, -1);
    if (g.engine->machine_open(m) || vcpu_new(m, 0, &hooks, &g.vcpu[0]))
        return -1;
    m->vcpus = 1;
    g.vcpu[0]->intc = (struct intc){.ops = &intc};
    return vcpu_start(g.vcpu[0]);
}

static void close_machine(void)
{
    struct machine *m = &g.m;
    vcpu_free(g.vcpu[0]);
    g.engine->machine_close(m);
    bus_free(m->mmio);
    bus_free(m->pio);
    cpuid_policy_free(m->cpuid);
    ram_close(&g.ram);
    clock_free(m->clock);
    loop_free(g.loop);
}

/* ---- measuring ---- */
static u64 seen(void)
{
    return *(volatile u64 *)(void *)ram_hva(&g.ram, GPA_SEEN);
}

static void pause_us(unsigned us)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000l * us}, NULL);
}

/* One interrupt: nanoseconds, or ~0: it does not come. */
static u64 once(void)
{
    u64 before = seen(), t, begin = __rdtsc(), khz = clock_tsc_khz(g.m.clock);
    atomic_store(&g.pending, VECTOR);
    t = __rdtsc();
    vcpu_raise(g.vcpu[0], VCPU_EV_INTR);
    while (seen() == before) {
        if (__rdtsc() - begin > khz * 1000 * GIVE_UP_S || atomic_load(&g.failed))
            return ~0ull;
        pause_us(20);
    }
    u64 there = seen() - clock_tsc_bias(g.m.clock);
    return (s64)(there - t) < 0 ? 0 : (there - t) * 1000000 / khz;
}

static int by_value(const void *a, const void *b)
{
    u64 x = *(const u64 *)a, y = *(const u64 *)b;
    return x < y ? -1 : x > y;
}

/*
 * One kick at any moment, to the nanosecond, with as little pause as possible; false: no answer. This thread does not sleep: that takes longer than all the rest.
 */
static bool kick_once(unsigned *random, u64 *cycles)
{
    u64 before = seen(), begin = __rdtsc(), khz = clock_tsc_khz(g.m.clock);
    *random = *random * 1664525 + 1013904223;
    while (__rdtsc() - begin < (*random >> 12) % 20000)
        ;
    begin = __rdtsc();
    atomic_store(&g.pending, VECTOR);
    vcpu_raise(g.vcpu[0], VCPU_EV_INTR);
    while (seen() == before) {
        u64 now = __rdtsc() - begin;
        if (now > khz * 1000 * GIVE_UP_S || atomic_load(&g.failed))
            return false;
        if (now > khz / 10)
            pause_us(100);                                         /* others have its processor */
    }
    *cycles = seen() - clock_tsc_bias(g.m.clock) - begin;
    return true;
}

/* Sorts them. */
static void figures(u64 *ns, unsigned n, u64 *median, u64 *p999)
{
    qsort(ns, n, sizeof *ns, by_value);
    *median = ns[n / 2];
    *p999 = ns[(u64)n * 999 / 1000];
}

static void start(const struct loop_kind *k)
{
    static struct x86 x;
    vcpus_hold(&g.m);
    bug_on(ram_write(&g.ram, k->user ? GPA_USER : GPA_CODE, k->code, sizeof k->code));
    state(k, &x);
    bug_on(vcpu_set(g.vcpu[0], &x));
    vcpus_release(&g.m);
    pause_us(5000);
}

/* False: an interrupt got lost. */
static bool measure(const struct loop_kind *k, unsigned samples, u64 *ns)
{
    unsigned random = 1;
    bool fine = true;
    start(k);
    for (unsigned i = 0; i < 10 && fine; i++)                      /* until all is translated */
        fine = once() != ~0ull;
    for (unsigned i = 0; i < samples && fine; i++) {
        random = random * 1664525 + 1013904223;
        pause_us(50 + (random >> 20) % 400);
        ns[i] = once();
        fine = ns[i] != ~0ull;
    }
    return fine;
}

/* Since it was asked last. */
static u64 count(enum vcpu_counted what)
{
    static u64 was[COUNTS];
    u64 now = g.vcpu[0]->count[what], n = now - was[what];
    was[what] = now;
    return n;
}

/* The vCPU's thread, which inherits it, and this one have a processor each, as on an idle host; else they may share one for long. */
static void on_processor(unsigned n)
{
    cpu_set_t may, set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof may, &may))
        return;
    for (unsigned i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &may) && n-- == 0) {
            CPU_SET(i, &set);
            sched_setaffinity(0, sizeof set, &set);
        }
}

static void dump(void)
{
    const struct vcpu *v = g.vcpu[0];
    const struct icpu *c = v->engine_data;
    printf("# no answer: events %x, %s, stop %u, poll %llx, inside %u, rip %llx\n", atomic_load(&v->events), vcpu_where_name(atomic_load(&v->where)), atomic_load(&c->bt.stop),
           (unsigned long long)atomic_load(&c->bt.poll), atomic_load(&c->bt.inside), (unsigned long long)c->rip);
    for (unsigned n = 0; n < COUNTS; n++)
        if (vcpu_count_group(n) == GROUP_EXITS)
            printf("# %s %llu\n", vcpu_count_name(n), (unsigned long long)v->count[n]);
}

/* Whether each of so many kicks is answered, and none had to come twice. The worst time is the scheduler's. */
static bool stress_loop(const struct loop_kind *k, unsigned kicks, bool signals, unsigned number)
{
    static unsigned random = 1;
    u64 worst = 0, sum = 0, t = 0, khz = clock_tsc_khz(g.m.clock);
    bool fine = true;
    g.m.tools.signals = signals;
    start(k);
    for (unsigned i = 0; i < kicks && fine; i++) {
        fine = kick_once(&random, &t);
        worst = MAX(worst, t);
        sum += t;
    }
    if (!fine)
        dump();
    u64 again = count(COUNT_KICKS_AGAIN);
    printf("%sok %u - %s%s: %u kicks are answered\n", fine && !again ? "" : "not ", number, k->name, signals ? ", by signals" : "", kicks);
    printf("# mean %.1f us, worst %.1f us; seen by the loop: %llu, signals: %llu, steps: %llu, again: %llu\n", (double)sum * 1e3 / (double)khz / kicks, (double)worst * 1e3 / (double)khz,
           (unsigned long long)count(COUNT_POLLED), (unsigned long long)count(COUNT_KICKS), (unsigned long long)count(COUNT_KICK_STEPS), (unsigned long long)again);
    fflush(stdout);
    if (!fine)
        _exit(1);                                                  /* the vCPU's thread would not end */
    return !again;
}

static unsigned stress(unsigned kicks, const char *only)
{
    unsigned failed = 0, n = 0;
    for (unsigned signals = 0; signals < 2; signals++)
        for (unsigned i = 0; i < ARRAY_SIZE(kinds) + ARRAY_SIZE(more); i++) {
            const struct loop_kind *k = i < ARRAY_SIZE(kinds) ? &kinds[i] : &more[i - ARRAY_SIZE(kinds)];
            if (!only || !strcmp(only, k->name))
                failed += !stress_loop(k, kicks, signals, ++n);
        }
    struct sigaction sa;
    bool masked = !sigaction(SIGSEGV, NULL, &sa) && sigismember(&sa.sa_mask, SIGURG) == 1;
    printf("%sok %u - no kick comes while a fault is looked at\n1..%u\n", masked ? "" : "not ", n + 1, n + 1);
    return failed + !masked;
}

static bool mmu_of(const char *name, enum machine_mmu *mmu)
{
    static const char *const names[] = {[MACHINE_MMU_AUTO] = "auto", [MACHINE_MMU_SHADOW] = "shadow", [MACHINE_MMU_SOFTTLB] = "softtlb"};
    for (unsigned n = 0; n < ARRAY_SIZE(names); n++)
        if (!strcmp(name, names[n])) {
            *mmu = (enum machine_mmu)n;
            return true;
        }
    return false;
}

int main(int argc, char **argv)
{
    unsigned samples = 300, kicks = 0, failed = 0;
    bool print = false;
    const char *only = NULL;
    g.engine = &bt_engine;
    for (int n = 1; n < argc; n++) {
        if (!strcmp(argv[n], "--print"))
            print = true;
        else if (!strcmp(argv[n], "--signals"))
            g.m.tools.signals = true;
        else if (!strcmp(argv[n], "--engine") && n + 1 < argc && engine_find(argv[n + 1]))
            g.engine = engine_find(argv[++n]);
        else if (!strcmp(argv[n], "--mmu") && n + 1 < argc && mmu_of(argv[n + 1], &g.m.tools.mmu))
            n++;
        else if (!strcmp(argv[n], "--samples") && n + 1 < argc && atoi(argv[n + 1]) > 0 && atoi(argv[n + 1]) <= 1000000)
            samples = (unsigned)atoi(argv[++n]);
        else if (!strcmp(argv[n], "--stress") && n + 1 < argc && atoi(argv[n + 1]) > 0)
            kicks = (unsigned)atoi(argv[++n]);
        else if (!strcmp(argv[n], "--only") && n + 1 < argc)
            only = argv[++n];
        else {
            fprintf(stderr, "usage: latency_test [--engine NAME] [--mmu auto|shadow|softtlb] [--signals] [--samples N] [--print] [--stress N [--only KIND]]\n");
            return 64;
        }
    }
    u64 *ns = calloc(samples * ARRAY_SIZE(kinds), sizeof *ns), median, p999;
    cpu_set_t may;
    sched_getaffinity(0, sizeof may, &may);
    on_processor(0);
    bool opened = ns && !open_machine();
    sched_setaffinity(0, sizeof may, &may);
    on_processor(1);
    if (!opened) {
        printf("Bail out! %s\n", ns ? err_last() : "no memory");
        return 1;
    }
    if (kicks)
        failed = stress(kicks, only);
    for (unsigned k = 0; k < ARRAY_SIZE(kinds) && !kicks; k++) {
        bool fine = measure(&kinds[k], samples, ns + k * samples);
        figures(ns + k * samples, samples, &median, &p999);
        if (print)
            printf(fine ? "%s %llu %llu\n" : "%s failed\n", kinds[k].name, (unsigned long long)median, (unsigned long long)p999);
        else
            printf("%sok %u - interrupts reach a loop: %s\n# median %.1f us, 99.9 %% %.1f us; seen by the loop: %llu, signals: %llu, steps: %llu\n", fine && median <= MEDIAN_MAX_NS ? "" : "not ",
                   k + 1, kinds[k].name, (double)median / 1e3, (double)p999 / 1e3, (unsigned long long)count(COUNT_POLLED), (unsigned long long)count(COUNT_KICKS),
                   (unsigned long long)count(COUNT_KICK_STEPS));
        fflush(stdout);
        failed += !fine || (!print && median > MEDIAN_MAX_NS);
    }
    figures(ns, samples * ARRAY_SIZE(kinds), &median, &p999);
    if (print && !failed && !kicks)
        printf("all %llu %llu\n", (unsigned long long)median, (unsigned long long)p999);
    else if (!print && !kicks)
        printf("1..%zu\n", ARRAY_SIZE(kinds));
    free(ns);
    close_machine();
    return failed != 0;
}
