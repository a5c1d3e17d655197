/*
 * doppel's side, interp or bt: a machine of one processor and 2 MiB, with the test's pages at their addresses, user code at CPL 3, and an IDT whose 256 handlers are HLT:
 * which of them halted tells the vector, its stack frame the rest. Supervisor structures are in the upper half, where the test's accesses do not come.
 * With guest_config.kernel the program is the supervisor's (insn.h); its faults have a stack of their own then (IST), interrupts another one.
 */
#include <string.h>

#include "base/clock.h"
#include "base/loop.h"
#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/interp/code.h"
#include "cpu/interp/fp.h"
#include "cpu/trap.h"
#include "insn.h"

#define RAM_BYTES (2 * MiB)
#define SUPER 0xffff800000000000ull                                /* maps all RAM for the supervisor */
enum { GPA_PML4 = 0x1000, GPA_PDPT_LOW = 0x2000, GPA_PD_LOW = 0x3000, GPA_PT_LOW = 0x4000, GPA_PDPT_HIGH = 0x5000, GPA_PD_HIGH = 0x6000,
       GPA_GDT = 0x7000, GPA_TSS = 0x7800, GPA_IDT = 0x8000, GPA_HANDLERS = 0x9000, GPA_STACK_TOP = 0xc000, GPA_BACK = 0xd000, GPA_INTR = 0xd040,
       GPA_COUNT = 0xd800, GPA_INTR_TOP = 0xf000, GPA_BACK_TOP = 0x10000, GPA_REGION = 0x100000 };

struct guest {
    struct xlayout layout;
    const struct engine *engine;
    struct loop *loop;
    struct machine m;
    struct ram ram;
    struct vcpu *vcpu[1];
    struct x86 base, x;
    u8 before[PAGES][PAGE_SIZE];
    bool writable_code, kernel;
    _Atomic int pending;                                           /* vector of an interrupt, or -1 */
    u64 last_rip;                                                  /* of the case before: its bytes are to be cleared away */
};

static int peek(void *intc)
{
    return atomic_load(&((struct guest *)intc)->pending);
}

static int ack(void *intc)
{
    return atomic_exchange(&((struct guest *)intc)->pending, -1);
}

static int no_msr_read(void *intc, u32 msr, u64 *val)
{
    (void)intc, (void)msr, (void)val;
    return -1;
}

static int no_msr_write(void *intc, u32 msr, u64 val)
{
    (void)intc, (void)msr, (void)val;
    return -1;
}

static u8 no_tpr(void *intc)
{
    (void)intc;
    return 0;
}

static void set_tpr(void *intc, u8 cr8)
{
    (void)intc, (void)cr8;
}

static const struct intc_ops intc = {
    .peek = peek, .ack = ack, .msr_read = no_msr_read, .msr_write = no_msr_write, .tpr_get = no_tpr, .tpr_set = set_tpr,
};

static void put64(struct guest *g, u64 gpa, u64 v)
{
    bug_on(ram_write(&g->ram, gpa, &v, 8));
}

static u64 get64(struct guest *g, u64 gpa)
{
    u64 v;

    bug_on(ram_read(&g->ram, gpa, &v, 8));
    return v;
}

/* Without A and D at first; one page is global. */
static u64 kernel_pte(unsigned p)
{
    u64 pte = (GPA_REGION + p * PAGE_SIZE) | 1;
    if (p == PAGE_UCODE)
        return pte | 4;
    switch (page_kind(p)) {
    case KIND_NONE: return 0;
    case KIND_CODE: return pte | 2;
    case KIND_RW: return pte | BIT(63) | (p == PAGE_UDATA ? 6 : p == PAGE_DATA3 ? 0x102 : 2);
    default: return pte | BIT(63);
    }
}

static void build_paging(struct guest *g)
{
    u64 nx = BIT(63);

    put64(g, GPA_PML4, GPA_PDPT_LOW | 7);
    put64(g, GPA_PML4 + 8 * 256, GPA_PDPT_HIGH | 3);
    put64(g, GPA_PDPT_LOW, GPA_PD_LOW | 7);
    put64(g, GPA_PD_LOW + 8 * (REGION >> 21), GPA_PT_LOW | 7);
    put64(g, GPA_PDPT_HIGH, GPA_PD_HIGH | 3);
    put64(g, GPA_PD_HIGH, 0x83);
    for (unsigned p = 0; p < PAGES; p++) {
        u64 pte = (GPA_REGION + p * PAGE_SIZE) | 0x65;             /* present, user, accessed, dirty */

        if (g->kernel) {
            put64(g, GPA_PT_LOW + 8 * p, kernel_pte(p));
            continue;
        }
        switch (page_kind(p)) {
        case KIND_NONE: continue;
        case KIND_CODE: pte |= g->writable_code ? 2 : 0; break;
        case KIND_RW: pte |= 2 | nx; break;
        case KIND_RO: pte |= nx; break;
        }
        put64(g, GPA_PT_LOW + 8 * p, pte);
    }
}

static void kernel_gate(struct guest *g, unsigned v, u64 h)
{
    u64 ist = v == GUEST_BACK ? 0 : v == GUEST_INTR ? 2 : 1, dpl = v == GUEST_BACK ? 3 : 0;
    if (v == GUEST_BACK || v == GUEST_INTR)
        h = SUPER + (v == GUEST_BACK ? GPA_BACK : GPA_INTR);
    put64(g, GPA_IDT + 16 * v, (h & 0xffff) | 0x10ull << 16 | (0x8e00 | dpl << 13 | ist) << 32 | (h >> 16 & 0xffff) << 48);
}

static void kernel_code(struct guest *g)
{
    static const u8 intr[] = {0x50, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0x48, 0xff, 0x00, 0x58, 0x48, 0xcf}; /* push rax; mov rax, count; inc qword [rax]; pop; iretq */
    u8 back[7] = {0xff, 0x24, 0x25};                               /* jmp [abs] */
    u32 where = (u32)GUEST_BACK_VA;
    u64 count = SUPER + GPA_COUNT;
    memcpy(back + 3, &where, 4);
    bug_on(ram_write(&g->ram, GPA_BACK, back, sizeof back));
    bug_on(ram_write(&g->ram, GPA_INTR, intr, sizeof intr));
    bug_on(ram_write(&g->ram, GPA_INTR + 3, &count, 8));
}

/* What runs in user mode: each piece ends by a way back. */
static void user_code(struct guest *g)
{
    static const u8 stub[GUEST_STUBS][24] = {
        {0x48, 0x01, 0xd8, 0x50, 0x5b, 0x0f, 0x05},                /* add rax, rbx; push rax; pop rbx; syscall */
        {0x9c, 0x5a, 0x48, 0x29, 0xca, 0x9c, 0x58, 0xcd, GUEST_BACK}, /* pushfq; pop rdx; sub rdx, rcx; pushfq; pop rax; int */
        {0x66, 0x0f, 0xef, 0xc1, 0xff, 0xc1, 0x75, 0x02, 0xff, 0xc2, 0x53, 0x0f, 0x05}, /* pxor xmm0, xmm1; inc ecx; jnz over; inc edx; over: push rbx; syscall */
        {0xb9, 5, 0, 0, 0, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xfa, 0xcd, GUEST_BACK}, /* mov ecx, 5; again: add eax, ecx; dec ecx; jnz again; int */
    };
    u8 page[GUEST_STUBS * GUEST_STUB_BYTES];
    memset(page, 0xcc, sizeof page);
    for (unsigned k = 0; k < GUEST_STUBS; k++)
        memcpy(page + k * GUEST_STUB_BYTES, stub[k], sizeof stub[k]);
    bug_on(ram_write(&g->ram, GPA_REGION + PAGE_UCODE * PAGE_SIZE, page, sizeof page));
}

static void build_tables(struct guest *g)
{
    put64(g, GPA_GDT + 0x08, 0x00af9b000000ffff);                     /* kernel code, as Linux has them from 0x10 on */
    put64(g, GPA_GDT + 0x10, 0x00af9b000000ffff);
    put64(g, GPA_GDT + 0x18, 0x00cf93000000ffff);
    put64(g, GPA_GDT + 0x20, 0x00cffb000000ffff);                     /* 0x23: 32-bit user code */
    put64(g, GPA_GDT + 0x28, 0x00cff3000000ffff);                     /* 0x2b: user data */
    put64(g, GPA_GDT + 0x30, 0x00affb000000ffff);                     /* 0x33: 64-bit user code */
    put64(g, GPA_TSS + 4, SUPER + GPA_STACK_TOP);
    put64(g, GPA_TSS + 96, 0xffffull << 48);                          /* no I/O bitmap */
    if (g->kernel) {
        put64(g, GPA_TSS + 4, SUPER + GPA_BACK_TOP);
        put64(g, GPA_TSS + 36, SUPER + GPA_STACK_TOP);
        put64(g, GPA_TSS + 44, SUPER + GPA_INTR_TOP);
    }
    for (unsigned v = 0; v < 256; v++) {
        u64 h = SUPER + GPA_HANDLERS + 16 * v;
        u64 dpl = v == VEC_BP || v == VEC_OF ? 3 : 0;

        put64(g, GPA_IDT + 16 * v, (h & 0xffff) | 0x10ull << 16 | (0x8e00 | dpl << 13) << 32 | (h >> 16 & 0xffff) << 48);
        put64(g, GPA_IDT + 16 * v + 8, h >> 32);
        put64(g, GPA_HANDLERS + 16 * v, 0xf4);
        if (g->kernel)
            kernel_gate(g, v, h);
    }
    if (g->kernel)
        kernel_code(g);
}

static void build_state(struct guest *g)
{
    struct x86 *x = &g->base;

    x86_reset(x, true);
    x->cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    x->cr3 = GPA_PML4;
    x->cr4 = (CR4_PAE | CR4_PGE | CR4_MCE | CR4_DE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE | CR4_OSXSAVE) & cpuid_cr4_mask(g->m.cpuid);
    x->xcr0 = cpuid_xcr0_mask(g->m.cpuid) & ~XSTATE_PKRU;
    x->efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    x->gdtr = (struct x86_table){SUPER + GPA_GDT, 127};
    x->idtr = (struct x86_table){SUPER + GPA_IDT, 4095};
    x->tr = (struct x86_seg){.base = SUPER + GPA_TSS, .limit = 103, .sel = 0x40, .attr = 0x8b};
    x->ldtr = (struct x86_seg){.attr = 0};
    for (unsigned s = 0; s < SEGS; s++)
        x->seg[s] = (struct x86_seg){.limit = 0xffffffff, .sel = 0x2b, .attr = 0xcf3};
    x->seg[SEG_FS].sel = x->seg[SEG_GS].sel = 0;
    x->seg[SEG_FS].attr = x->seg[SEG_GS].attr = 0;                  /* null selectors: only 64-bit code may use them */
    if (!g->kernel)
        return;
    x->cr4 |= (CR4_SMEP | CR4_SMAP | CR4_PCIDE | CR4_TSD) & cpuid_cr4_mask(g->m.cpuid);
    x->star = 0x0023001000000000;
    x->lstar = SUPER + GPA_BACK;
    x->sfmask = FLAGS_ARITH | FLAG_TF | FLAG_IF | FLAG_DF | FLAG_AC | FLAG_NT;
    x->seg[SEG_SS].sel = 0x18;
    x->seg[SEG_SS].attr = 0xc93;
}

int guest_open(const struct guest_config *config, struct guest **out)
{
    struct guest *g = aligned_alloc(64, ALIGN_UP(sizeof *g, 64));
    struct vcpu *v = aligned_alloc(64, ALIGN_UP(sizeof *v, 64));

    if (!g || !v)
        return -1;
    memset(g, 0, sizeof *g);
    memset(v, 0, sizeof *v);
    g->engine = config->engine;
    g->writable_code = config->writable_code;
    g->kernel = config->kernel;
    atomic_store(&g->pending, -1);
    if (loop_new(&g->loop) || clock_new(g->loop, &g->m.clock) || ram_init(&g->ram) || ram_add(&g->ram, 0, RAM_BYTES) ||
        cpuid_policy_new(1, clock_tsc_khz(g->m.clock), &g->m.cpuid) || bus_new(NULL, &g->m.pio) || bus_new(NULL, &g->m.mmio))
        return -1;
    pthread_mutex_init(&g->m.split_lock, NULL);
    xlayout_host(&g->layout);
    g->m.ram = &g->ram;
    g->m.engine = g->engine;
    g->m.tools = config->tools;
    g->m.log = config->log;
    g->m.vcpus = 1;
    g->m.vcpu = g->vcpu;
    g->vcpu[0] = v;
    v->m = &g->m;
    v->intc = (struct intc){.ops = &intc, .chip = g};
    if (bus_new(g->m.mmio, &v->mmio))
        return -1;
    if (g->engine->cpuid_limit)
        g->engine->cpuid_limit(g->m.cpuid);
    build_paging(g);
    build_tables(g);
    build_state(g);
    *out = g;
    return g->engine->machine_open(&g->m) || g->engine->vcpu_open(v);
}

/* The engine installs its signal handlers when it first runs: let that be now, so that the native side's come after. */
int guest_warm_up(struct guest *g, const u8 *pattern)
{
    static const struct icase nothing = {.in.rip = CODE_VA, .in.rflags = FLAG_1, .in.v.mxcsr = 0x1f80};
    static struct outcome out;

    return guest_run(g, &nothing, pattern, &out);
}

void guest_stop(struct guest *g)
{
    atomic_fetch_or(&g->vcpu[0]->events, VCPU_EV_KICK);
    if (g->engine->kick)
        g->engine->kick(g->vcpu[0]);
}

void guest_interrupt(struct guest *g)
{
    if (g->kernel)
        atomic_store(&g->pending, GUEST_INTR);
    atomic_fetch_or(&g->vcpu[0]->events, VCPU_EV_INTR);
    if (g->engine->kick)
        g->engine->kick(g->vcpu[0]);
}

u64 guest_interrupts(struct guest *g)
{
    return get64(g, GPA_COUNT);
}

struct vcpu *guest_vcpu(struct guest *g)
{
    return g->vcpu[0];
}

void guest_close(struct guest *g)
{
    g->engine->vcpu_close(g->vcpu[0]);
    g->engine->machine_close(&g->m);
    bus_free(g->vcpu[0]->mmio);
    free(g->vcpu[0]);
    bus_free(g->m.mmio);
    bus_free(g->m.pio);
    cpuid_policy_free(g->m.cpuid);
    ram_close(&g->ram);
    clock_free(g->m.clock);
    loop_free(g->loop);
    free(g);
}

static void region_write(struct guest *g, u64 va, const void *p, size_t n)
{
    bug_on(ram_write(&g->ram, GPA_REGION + (va - REGION), p, n));
}

static void load_memory(struct guest *g, const struct icase *i, const u8 *pattern)
{
    static const u8 cc[16] = {0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc};
    u8 *ro = ram_hva(&g->ram, GPA_REGION + PAGE_RO * PAGE_SIZE);
    u64 room = CODE_VA + 2 * PAGE_SIZE - i->in.rip;

    for (unsigned p = 0; p < PAGES; p++) {
        if (page_kind(p) == KIND_RW)
            memcpy(ram_hva(&g->ram, GPA_REGION + p * PAGE_SIZE), pattern + p * PAGE_SIZE, PAGE_SIZE);
    }
    if (!g->last_rip || i->text) {
        memset(ram_range(&g->ram, GPA_REGION, 2 * PAGE_SIZE), 0xcc, 2 * PAGE_SIZE);
        memcpy(ro, pattern + PAGE_RO * PAGE_SIZE, PAGE_SIZE);
    } else {
        region_write(g, g->last_rip, cc, MIN(16ull, CODE_VA + 2 * PAGE_SIZE - g->last_rip));
    }
    g->last_rip = i->text ? 0 : i->in.rip;
    if (i->text)
        region_write(g, CODE_VA, i->text, i->text_len);
    else
        region_write(g, i->in.rip, i->code, MIN((u64)i->len, room));
    if (g->kernel) {
        build_paging(g);
        user_code(g);
    }
    for (unsigned p = 0; p < ARRAY_SIZE(i->patch_va); p++) {
        if (i->patch_va[p])
            region_write(g, i->patch_va[p], &i->patch[p], 8);
    }
    if (i->image)
        region_write(g, i->patch_va[0], i->image, 1024);
}

static void load_state(struct guest *g, const struct icase *i, struct x86 *x)
{
    *x = g->base;
    atomic_store(&g->pending, -1);
    memcpy(x->gpr, i->in.gpr, sizeof x->gpr);
    x->rip = i->in.rip;
    x->rflags = i->in.rflags;
    x->seg[SEG_CS].sel = g->kernel ? 0x10 : i->compat ? 0x23 : 0x33;
    x->seg[SEG_CS].attr = g->kernel ? 0xa9b : i->compat ? 0xcfb : 0xafb;
    x->seg[SEG_FS].base = i->in.fs_base;
    x->seg[SEG_GS].base = i->in.gs_base;
    vectors_put(&i->in.v, &g->layout, x->xsave);
}

/* What has changed memory must be known to do so: OPF_STORES ends blocks in pages that are written over and over (cpu/bt/codepage.h). */
static int known_to_store(struct guest *g, const struct icase *i)
{
    struct icpu *c = g->vcpu[0]->engine_data;
    u8 mode = c->mode;
    struct op op;

    if (fp_full(c)) {
        code_flush_later(c);                                       /* the next one, then */
        return 0;
    }
    c->mode = i->compat ? IMODE_COMPAT32 : IMODE_LONG64;
    int r = decode_one(c, i->code, i->len, 0, &op);
    c->mode = mode;
    if (r != DECODE_MORE && op.flags & OPF_STORES)
        return 0;
    fprintf(stderr, "# case %u changed memory, and its op has no OPF_STORES\n", i->number);
    return -1;
}

int guest_run(struct guest *g, const struct icase *i, const u8 *pattern, struct outcome *out)
{
    struct x86 *x = &g->x;
    struct vcpu *v = g->vcpu[0];
    bool stored = false;
    unsigned words;
    u64 sp;

    load_memory(g, i, pattern);
    load_state(g, i, x);
    for (unsigned p = 0; p < PAGES; p++) {
        if (page_kind(p) == KIND_RW)
            memcpy(g->before[p], ram_hva(&g->ram, GPA_REGION + p * PAGE_SIZE), PAGE_SIZE);
    }
    if (g->engine->set(v, x) || g->engine->run(v) != RUN_HALTED || g->engine->get(v, x))
        return -1;
    out->vector = (unsigned)((x->rip - 1 - SUPER - GPA_HANDLERS) / 16);
    sp = x->gpr[RSP] - SUPER;
    words = (unsigned)(GPA_STACK_TOP - sp) / 8;
    if (out->vector > 255 || (words != 5 && words != 6))
        return -1;
    out->error = words == 6 ? get64(g, sp) : 0;
    sp += 8 * (words - 5);
    memcpy(out->s.gpr, x->gpr, sizeof x->gpr);
    out->s.rip = get64(g, sp);
    out->s.rflags = get64(g, sp + 16);
    out->s.gpr[RSP] = get64(g, sp + 24);
    out->cr2 = x->cr2;
    out->s.fs_base = x->seg[SEG_FS].base;
    out->s.gs_base = x->seg[SEG_GS].base;
    vectors_get(&out->s.v, &g->layout, x->xsave);
    for (unsigned p = 0; p < PAGES; p++) {
        if (page_kind(p) != KIND_RW && !(g->writable_code && page_kind(p) == KIND_CODE))
            continue;
        memcpy(out->mem[p], ram_hva(&g->ram, GPA_REGION + p * PAGE_SIZE), PAGE_SIZE);
        stored = stored || (page_kind(p) == KIND_RW && memcmp(out->mem[p], g->before[p], PAGE_SIZE));
    }
    return stored && !i->text ? known_to_store(g, i) : 0;
}
