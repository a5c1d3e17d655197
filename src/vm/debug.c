/* The VM's side of a debugger (debug.h). Only on_stopped() runs on vCPU threads: it freezes all and posts the rest. */
#include "vm/debug.h"

#include <errno.h>
#include <string.h>

#include "cpu/cpuid.h"
#include "cpu/vcpu.h"
#include "mem/mmu.h"

struct vm_debug {
    struct vm *vm;
    struct machine *m;
    struct loop *loop;
    void (*stopped)(void *arg);
    void *arg;
    _Atomic bool posted;
    struct {
        bool taken;                                                /* its stop is the debugger's */
        u64 rip;                                                   /* where it stopped */
        enum vm_debug_action action;
        u64 start, end;
    } cpu[VM_VCPUS_MAX];
};

/* ---- stops ---- */

static bool untaken(const struct vm_debug *d, unsigned i)
{
    return d->m->vcpu[i]->debug.stop != DEBUG_NONE && !d->cpu[i].taken;
}

static bool anything_untaken(const struct vm_debug *d)
{
    for (unsigned i = 0; i < d->m->vcpus; i++)
        if (untaken(d, i))
            return true;
    return false;
}

static void service(void *arg)
{
    struct vm_debug *d = arg;

    atomic_store(&d->posted, false);
    if (vm_state(d->vm) == VM_ENDED || !d->m->debug.attached)
        return;
    vcpus_hold(d->m);
    if (!anything_untaken(d)) {                                    /* it was taken in the meantime */
        if (vm_state(d->vm) == VM_RUNNING)
            vcpus_release(d->m);
        return;
    }
    vm_pause(d->vm);
    d->stopped(d->arg);
}

static void on_stopped(void *arg, struct vcpu *v UNUSED)
{
    struct vm_debug *d = arg;

    vcpus_freeze(d->m);
    if (!atomic_exchange(&d->posted, true))
        loop_post(d->loop, service, d);
}

static u64 rip_of(struct vm_debug *d, unsigned cpu)
{
    struct x86 *x = aligned_alloc(64, ALIGN_UP(sizeof *x, 64));
    u64 rip = 0;

    if (x && vcpu_get(d->m->vcpu[cpu], x) == 0)
        rip = x->rip;
    free(x);
    return rip;
}

bool vm_debug_next_stop(struct vm_debug *d, struct vm_debug_stop *stop)
{
    for (unsigned i = 0; i < d->m->vcpus; i++) {
        const struct vcpu_debug *v = &d->m->vcpu[i]->debug;

        if (!untaken(d, i))
            continue;
        d->cpu[i].taken = true;
        d->cpu[i].rip = rip_of(d, i);
        *stop = (struct vm_debug_stop){ .cpu = i, .why = v->stop, .la = v->stop_la, .access = v->stop_access };
        return true;
    }
    return false;
}

/* ---- coming and going ---- */

int vm_debug_open(struct vm *vm, struct loop *loop, void (*stopped)(void *arg), void *arg, struct vm_debug **out)
{
    struct vm_debug *d = calloc(1, sizeof *d);

    if (!d)
        return err(-ENOMEM, "debugger: out of memory");
    *d = (struct vm_debug){ .vm = vm, .m = vm_machine(vm), .loop = loop, .stopped = stopped, .arg = arg };
    d->m->debug.stopped = on_stopped;
    d->m->debug.arg = d;
    *out = d;
    return 0;
}

void vm_debug_close(struct vm_debug *d)
{
    if (!d)
        return;
    vm_debug_detach(d);
    loop_unpost(d->loop, service, d);
    free(d);
}

void vm_debug_pause(struct vm_debug *d)
{
    vm_pause(d->vm);
}

bool vm_debug_running(const struct vm_debug *d)
{
    return vm_state(d->vm) == VM_RUNNING;
}

void vm_debug_attach(struct vm_debug *d)
{
    vm_pause(d->vm);
    d->m->debug.attached = true;
}

/* Forgets a processor's stop. One that has shut down ends the machine, as it would have without a debugger. */
static void forget_stop(struct vm_debug *d, unsigned i)
{
    struct vcpu_debug *v = &d->m->vcpu[i]->debug;

    if (v->stop == DEBUG_SHUTDOWN)
        vm_post_end(d->vm, VM_END_TRIPLE_FAULT);
    *v = (struct vcpu_debug){ .stop = DEBUG_NONE };
    d->cpu[i].taken = false;
}

void vm_debug_detach(struct vm_debug *d)
{
    struct debug *l = &d->m->debug;

    if (!l->attached)
        return;
    vm_pause(d->vm);
    l->attached = false;
    l->points = l->watches = 0;
    l->generation++;
    for (unsigned i = 0; i < d->m->vcpus; i++)
        forget_stop(d, i);
    vm_resume(d->vm);
}

void vm_debug_set_action(struct vm_debug *d, unsigned cpu, enum vm_debug_action a, u64 start, u64 end)
{
    d->cpu[cpu].action = a;
    d->cpu[cpu].start = start;
    d->cpu[cpu].end = end;
}

/* A stop that was not taken is told before anybody goes on; but a breakpoint will be met again, if it is still there. */
static bool untold(const struct vm_debug *d, unsigned i)
{
    return untaken(d, i) && d->m->vcpu[i]->debug.stop != DEBUG_POINT;
}

int vm_debug_go(struct vm_debug *d)
{
    for (unsigned i = 0; i < d->m->vcpus; i++)
        if (d->cpu[i].action == VM_DEBUG_STEP && !d->m->engine->debug_points)
            return -EOPNOTSUPP;
    for (unsigned i = 0; i < d->m->vcpus; i++)
        if (untold(d, i)) {
            if (!atomic_exchange(&d->posted, true))
                loop_post(d->loop, service, d);
            return 0;
        }
    for (unsigned i = 0; i < d->m->vcpus; i++) {
        struct vcpu_debug *v = &d->m->vcpu[i]->debug;
        enum vm_debug_action a = d->cpu[i].action;
        /* It goes on from the breakpoint that was reported. */
        bool pass = v->stop == DEBUG_POINT && d->cpu[i].taken && rip_of(d, i) == d->cpu[i].rip;

        forget_stop(d, i);
        v->parked = a == VM_DEBUG_STAY;
        v->step = a == VM_DEBUG_STEP;
        v->pass = pass && a != VM_DEBUG_STAY;
        v->range_start = d->cpu[i].start;
        v->range_end = d->cpu[i].end;
    }
    vm_resume(d->vm);
    return 0;
}

/* ---- state ---- */

unsigned vm_debug_cpus(const struct vm_debug *d)
{
    return d->m->vcpus;
}

u32 vm_debug_component(const struct vm_debug *d, unsigned n)
{
    struct cpuid_regs r;

    if (n < 2 || n > 63 || !(cpuid_xcr0_mask(d->m->cpuid) & BIT(n)))
        return 0;
    cpuid_get(d->m->cpuid, 0, &d->m->vcpu[0]->x, true, 0xd, n, &r);
    return r.eax && range_in(r.ebx, r.eax, X86_XSAVE_MAX) ? r.ebx : 0;
}

int vm_debug_get(struct vm_debug *d, unsigned cpu, struct x86 *x)
{
    return vcpu_get(d->m->vcpu[cpu], x);
}

/* Not vcpu_set(), which is for a new beginning: what is on its way to the processor stays on its way. */
int vm_debug_set(struct vm_debug *d, unsigned cpu, const struct x86 *x)
{
    return d->m->engine->set(d->m->vcpu[cpu], x);
}

u8 vm_debug_cr8(struct vm_debug *d, unsigned cpu)
{
    const struct intc *intc = &d->m->vcpu[cpu]->intc;
    const struct irqchip_ops *chips = d->m->engine->irqchip;
    struct lapic_regs r;

    if (chips)
        return chips->lapic_get(d->m, cpu, &r) == 0 ? r.tpr >> 4 & 15 : 0;
    return intc->ops ? intc->ops->tpr_get(intc->chip) : 0;
}

/* ---- memory ---- */

static bool canonical(u64 la)
{
    return (u64)((s64)(la << 16) >> 16) == la;
}

static void context_of(const struct vm_debug *d, const struct x86 *x, struct mmu_ctx *ctx)
{
    *ctx = (struct mmu_ctx){ .cr0 = x->cr0, .cr3 = x->cr3, .cr4 = x->cr4, .efer = x->efer,
                             .phys_bits = (u8)cpuid_phys_bits(d->m->cpuid) };
    memcpy(ctx->pdpte, x->pdpte, sizeof ctx->pdpte);
}

/* Page by page; each piece lies in one page of RAM. */
static size_t copy(struct vm_debug *d, const struct mmu_ctx *ctx, u64 addr, u8 *buf, size_t n, bool write)
{
    size_t done = 0;

    while (done < n) {
        u64 at = addr + done, gpa = at;
        size_t piece = MIN(n - done, PAGE_SIZE - (at & ~PAGE_MASK));

        if (ctx && ctx->efer & EFER_LMA ? !canonical(at) : false)
            break;
        if (ctx && !(ctx->efer & EFER_LMA))
            at = (u32)at;
        if (ctx && mmu_peek(d->m->ram, ctx, at, &gpa) < 0)
            break;
        if ((write ? ram_write(d->m->ram, gpa, buf + done, piece) : ram_read(d->m->ram, gpa, buf + done, piece)) < 0)
            break;
        done += piece;
    }
    return done;
}

static size_t access_memory(struct vm_debug *d, unsigned cpu, enum vm_debug_space space, u64 addr, u8 *buf, size_t n, bool write)
{
    struct mmu_ctx ctx;
    struct x86 *x;

    if (space == VM_DEBUG_PHYSICAL)
        return copy(d, NULL, addr, buf, n, write);
    x = aligned_alloc(64, ALIGN_UP(sizeof *x, 64));
    if (!x || vm_debug_get(d, cpu, x) < 0) {
        free(x);
        return 0;
    }
    context_of(d, x, &ctx);
    free(x);
    return copy(d, &ctx, addr, buf, n, write);
}

size_t vm_debug_read(struct vm_debug *d, unsigned cpu, enum vm_debug_space space, u64 addr, u8 *buf, size_t n)
{
    return access_memory(d, cpu, space, addr, buf, n, false);
}

size_t vm_debug_write(struct vm_debug *d, unsigned cpu, enum vm_debug_space space, u64 addr, const u8 *buf, size_t n)
{
    return access_memory(d, cpu, space, addr, (u8 *)buf, n, true);
}

/* ---- breakpoints and watchpoints ---- */

static bool room(const struct vm_debug *d)
{
    return d->m->debug.points + d->m->debug.watches < d->m->engine->debug_points;
}

static int check(const struct vm_debug *d)
{
    const struct engine *e = d->m->engine;

    return e->debug_check ? e->debug_check(d->m) : 0;
}

int vm_debug_add_point(struct vm_debug *d, u64 la)
{
    int r;

    if (debug_point_at(&d->m->debug, la))
        return 0;
    r = room(d) ? debug_add_point(&d->m->debug, la) : -ENOSPC;
    if (r == 0 && (r = check(d)) < 0)
        debug_del_point(&d->m->debug, la);
    return r;
}

void vm_debug_del_point(struct vm_debug *d, u64 la)
{
    debug_del_point(&d->m->debug, la);
}

int vm_debug_add_watch(struct vm_debug *d, const struct debug_watch *w)
{
    unsigned before = d->m->debug.watches;
    int r = room(d) ? debug_add_watch(&d->m->debug, w) : -ENOSPC;

    if (r == 0 && d->m->debug.watches > before && (r = check(d)) < 0)
        debug_del_watch(&d->m->debug, w);
    return r;
}

void vm_debug_del_watch(struct vm_debug *d, const struct debug_watch *w)
{
    debug_del_watch(&d->m->debug, w);
}
