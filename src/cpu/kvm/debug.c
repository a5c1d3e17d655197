/*
 * A debugger's wishes under KVM (Linux' Documentation/virt/kvm/api.rst: KVM_SET_GUEST_DEBUG; cpu/debug.h).
 *
 * Watchpoints and breakpoints take the processor's four debug registers (SDM vol. 3B 17.2), which the guest then sees as
 * it left them and which do not act for it. A watchpoint may take several, and cannot be for reads alone: the processor
 * has no such kind. Breakpoints for which no register is left are INT3 (CC) in guest memory, while the guest runs and
 * only then: whoever looks at a guest that stands still finds its own bytes. Such a breakpoint has to be mapped when the
 * guest goes on; one in the lower half is met in every address space that has its page. The guest and its disks can see
 * these bytes, so registers go first to what has no page yet, then to the lower half.
 *
 * A step is TF, which KVM sets and hides. What would show it, or lose it, is repaired: PUSHF's image, and SYSCALL, whose
 * step ends at its target by a register (if one is free) and whose R11 is cleared of it. The saved flags of an exception
 * in the middle of a step have it: the step ends when its handler has returned.
 *
 * Locking: the plan changes only while all vCPUs stand still; then each vCPU's thread looks at it. A byte that goes back
 * into memory behind a step is written by the vCPU's thread under kvm_machine.lock.
 */
#include "cpu/kvm/kvm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/err.h"
#include "mem/mmu.h"

#define INT3 0xcc
#define VEC_DB 1
#define VEC_BP 3
#define DR6_BD BIT(13)
#define DR6_BS BIT(14)
#define DR6_BT BIT(15)
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_CSTAR 0xc0000083
#define INSN_MAX 15

enum { DR_EXECUTE = 0, DR_WRITE = 1, DR_ACCESS = 3 };              /* DR7's R/W field */

/* ---- where things are ---- */

static bool canonical(u64 la)
{
    return (u64)((s64)(la << 16) >> 16) == la;
}

static void context_of(const struct vcpu *v, const struct x86 *x, struct mmu_ctx *ctx)
{
    *ctx = (struct mmu_ctx){ .cr0 = x->cr0, .cr3 = x->cr3, .cr4 = x->cr4, .efer = x->efer,
                             .phys_bits = (u8)cpuid_phys_bits(v->m->cpuid) };
    memcpy(ctx->pdpte, x->pdpte, sizeof ctx->pdpte);
}

static int paging_of(struct vcpu *v, struct mmu_ctx *ctx)
{
    struct x86 x;
    int r = kvm_look(v, &x);

    if (r == 0)
        context_of(v, &x, ctx);
    return r;
}

static u64 linear_rip(const struct x86 *x)
{
    bool code64 = x->efer & EFER_LMA && x->seg[SEG_CS].attr & SEG_L;

    return code64 ? x->rip : (u32)(x->seg[SEG_CS].base + x->rip);
}

/* In the present address space of a vCPU that stands still, or is the caller's. */
static bool translate(struct vcpu *v, const struct mmu_ctx *ctx, u64 la, u64 *gpa)
{
    if (!(ctx->efer & EFER_LMA))
        la = (u32)la;
    else if (!canonical(la))
        return false;
    return mmu_peek(v->m->ram, ctx, la, gpa) == 0 && ram_has(v->m->ram, *gpa, 1);
}

static bool copy_linear(struct vcpu *v, const struct mmu_ctx *ctx, u64 la, u8 *buf, size_t n, bool write)
{
    for (size_t i = 0; i < n; i++) {
        u64 gpa;

        if (!translate(v, ctx, la + i, &gpa))
            return false;
        if (write ? ram_write(v->m->ram, gpa, buf + i, 1) : ram_read(v->m->ram, gpa, buf + i, 1))
            return false;
    }
    return true;
}

/* ---- the plan ---- */

static unsigned length_code(unsigned len)                          /* DR7's LEN field */
{
    return len == 8 ? 2 : len - 1;
}

static int plan_register(struct kvm_plan *p, u64 la, unsigned len, unsigned type, int watch)
{
    if (p->registers == ARRAY_SIZE(p->reg))
        return -ENOSPC;
    p->reg[p->registers++] = (struct kvm_plan_register){ .la = la, .len = (u8)len, .type = (u8)type, .watch = watch };
    return 0;
}

/* A range is covered by pieces of 1, 2, 4 and 8 bytes, each aligned by its size. */
static int plan_watch(struct kvm_plan *p, const struct debug_watch *w, int index)
{
    u64 la = w->la, left = w->len;
    int r = 0;

    if (w->access == DEBUG_READ)
        return -EOPNOTSUPP;
    while (r == 0 && left) {
        unsigned len = 8;

        while (la & (len - 1) || len > left)
            len /= 2;
        r = plan_register(p, la, len, w->access & DEBUG_READ ? DR_ACCESS : DR_WRITE, index);
        la += len;
        left -= len;
    }
    return r;
}

/* The page of a breakpoint, in the first address space that has it. */
static bool find_page(const struct machine *m, const struct mmu_ctx *ctx, u64 la, u64 *gpa)
{
    for (unsigned i = 0; i < m->vcpus; i++)
        if (translate(m->vcpu[i], &ctx[i], la, gpa))
            return true;
    return false;
}

/* Who needs a register most goes first: no page, lower half, upper half. */
static int plan_points(struct kvm_plan *p, const struct machine *m, const struct mmu_ctx *ctx)
{
    int r = 0;

    for (unsigned need = 0; need < 3; need++)
        for (unsigned i = 0; r == 0 && i < m->debug.points; i++) {
            u64 la = m->debug.point[i], gpa = 0;
            unsigned class = !find_page(m, ctx, la, &gpa) ? 0 : la >> 63 ? 2 : 1;

            if (class != need || plan_register(p, la, 1, DR_EXECUTE, -1) == 0)
                continue;
            if (class == 0)
                r = -ENOSPC;
            else
                p->soft[p->softs++] = (struct kvm_plan_soft){ .la = la, .gpa = gpa };
        }
    return r;
}

static int plan(const struct machine *m, struct kvm_plan *p)
{
    struct mmu_ctx *ctx = calloc(m->vcpus, sizeof *ctx);
    int r = ctx ? 0 : -ENOMEM;

    p->registers = p->softs = 0;
    for (unsigned i = 0; r == 0 && i < m->debug.watches; i++)
        r = plan_watch(p, &m->debug.watch[i], (int)i);
    for (unsigned i = 0; r == 0 && i < m->vcpus; i++)
        r = paging_of(m->vcpu[i], &ctx[i]);
    if (r == 0)
        r = plan_points(p, m, ctx);
    free(ctx);
    return r;
}

int kvm_debug_check(const struct machine *m)
{
    struct kvm_plan *p = malloc(sizeof *p);
    int r = p ? plan(m, p) : -ENOMEM;

    free(p);
    return r;
}

static struct kvm_plan_soft *find_soft(struct kvm_plan *p, u64 la)
{
    for (unsigned i = 0; i < p->softs; i++)
        if (p->soft[i].la == la)
            return &p->soft[i];
    return NULL;
}

/* ---- bytes in guest memory ---- */

static void soft_in(struct machine *m, struct kvm_plan_soft *s)
{
    static const u8 int3 = INT3;

    if (!s->in && ram_read(m->ram, s->gpa, &s->old, 1) == 0 && ram_write(m->ram, s->gpa, &int3, 1) == 0)
        s->in = true;
}

/* The guest, or a device, may have written there: then that stays. */
static void soft_out(struct machine *m, struct kvm_plan_soft *s)
{
    u8 now;

    if (s->in && ram_read(m->ram, s->gpa, &now, 1) == 0 && now == INT3)
        ram_write(m->ram, s->gpa, &s->old, 1);
    s->in = false;
}

/* Who goes on from a breakpoint in memory takes that one step without it. */
static bool passed_over(struct machine *m, u64 la)
{
    struct x86 x;

    for (unsigned i = 0; i < m->vcpus; i++) {
        struct vcpu *v = m->vcpu[i];

        if (v->debug.pass && !v->debug.parked && kvm_look(v, &x) == 0 && linear_rip(&x) == la)
            return true;
    }
    return false;
}

void kvm_debug_start(struct machine *m)
{
    struct kvm_plan *p = &kvm_of(m)->plan;

    if (!m->debug.attached)
        return;
    if (plan(m, p) < 0)
        log_msg(m->log, LOG_WARN, "kvm: not all breakpoints can be heeded now: more than four are not mapped");
    for (unsigned i = 0; i < p->softs; i++)
        if (!passed_over(m, p->soft[i].la))
            soft_in(m, &p->soft[i]);
}

void kvm_debug_stop(struct machine *m)
{
    struct kvm_plan *p = &kvm_of(m)->plan;

    for (unsigned i = p->softs; i-- > 0;)
        soft_out(m, &p->soft[i]);
    p->registers = p->softs = 0;
}

/* ---- a vCPU ---- */

static int apply(struct vcpu *v, const struct kvm_guest_debug *g)
{
    if (ioctl(kvcpu_of(v)->fd, KVM_SET_GUEST_DEBUG, g) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_SET_GUEST_DEBUG: %s", v->id, strerror(errno));
    kvcpu_of(v)->debug = *g;
    kvcpu_of(v)->debug.control &= ~(u32)(KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP);
    return 0;
}

static void set_register(struct kvm_guest_debug *g, unsigned n, u64 la, unsigned len, unsigned type)
{
    g->control |= KVM_GUESTDBG_USE_HW_BP;
    g->arch.debugreg[n] = la;
    g->arch.debugreg[7] |= BIT(2 * n + 1) | (u64)(length_code(len) << 2 | type) << (16 + 4 * n);
}

static enum kvm_step_kind kind_of(struct vcpu *v, const struct x86 *x)
{
    bool code64 = x->efer & EFER_LMA && x->seg[SEG_CS].attr & SEG_L;
    struct mmu_ctx ctx;
    u8 b[INSN_MAX];
    unsigned n = 0, i = 0;

    context_of(v, x, &ctx);
    while (n < sizeof b && copy_linear(v, &ctx, linear_rip(x) + n, b + n, 1, false))
        n++;
    while (i < n && (b[i] == 0x66 || b[i] == 0x67 || b[i] == 0xf2 || b[i] == 0xf3 || b[i] == 0x64 || b[i] == 0x65 ||
           (b[i] & 0xe7) == 0x26 || (code64 && (b[i] & 0xf0) == 0x40)))
        i++;
    if (i < n && b[i] == 0x9c)
        return KVM_STEP_PUSHF;
    return i + 1 < n && b[i] == 0x0f && b[i + 1] == 0x05 && x->efer & EFER_SCE ? KVM_STEP_SYSCALL : KVM_STEP_OTHER;
}

static u64 syscall_target(struct vcpu *v, const struct x86 *x)
{
    bool code64 = x->efer & EFER_LMA && x->seg[SEG_CS].attr & SEG_L;
    u64 to = 0;

    kvm_msr_get_one(v, !(x->efer & EFER_LMA) ? MSR_STAR : code64 ? MSR_LSTAR : MSR_CSTAR, &to);
    return x->efer & EFER_LMA ? to : (u32)to;
}

static void begin_step(struct vcpu *v, const struct x86 *x, struct kvm_guest_debug *g)
{
    const struct kvm_plan *p = &kvm_of(v->m)->plan;
    struct kvm_step *s = &kvcpu_of(v)->step;

    s->active = true;
    s->kind = kind_of(v, x);
    s->own_tf = x->rflags & FLAG_TF;
    g->control |= KVM_GUESTDBG_SINGLESTEP | (kvm_of(v->m)->guest_debug & KVM_GUESTDBG_BLOCKIRQ);
    if (s->kind != KVM_STEP_SYSCALL)
        return;
    s->target = syscall_target(v, x);
    if (p->registers < ARRAY_SIZE(p->reg))
        set_register(g, p->registers, s->target, 1, DR_EXECUTE);
}

/*
 * What the processor is to heed, but for steps. Who goes on from a breakpoint takes one step without it: RF would do for
 * a register, but KVM does not look at RF where it emulates an instruction.
 */
static void wanted(const struct vcpu *v, struct kvm_guest_debug *g)
{
    const struct kvm_step *s = &kvcpu_of(v)->step;
    const struct kvm_plan *p = &kvm_of(v->m)->plan;

    *g = (struct kvm_guest_debug){ .control = KVM_GUESTDBG_ENABLE };
    if (p->softs)
        g->control |= KVM_GUESTDBG_USE_SW_BP;
    for (unsigned i = 0; i < p->registers; i++)
        if (!s->over || p->reg[i].type != DR_EXECUTE || p->reg[i].la != s->over_la)
            set_register(g, i, p->reg[i].la, p->reg[i].len, p->reg[i].type);
}

int kvm_debug_enter(struct vcpu *v)
{
    struct kvm_vcpu *c = kvcpu_of(v);
    struct kvm_guest_debug g = { 0 };
    struct x86 x;
    int r;

    c->step = (struct kvm_step){ 0 };
    if (v->m->debug.attached && (v->debug.pass || v->debug.step)) {
        if ((r = kvm_look(v, &x)) < 0)
            return r;
        c->step.over_la = linear_rip(&x);
        c->step.over = v->debug.pass && debug_point_at(&v->m->debug, c->step.over_la);
        v->debug.pass = c->step.over;
        wanted(v, &g);
        if (c->step.over || v->debug.step)
            begin_step(v, &x, &g);
    } else if (v->m->debug.attached) {
        wanted(v, &g);
    }
    /* a step begins where RIP is now: KVM looks when it is told */
    return c->step.active || memcmp(&g, &c->debug, sizeof g) ? apply(v, &g) : 0;
}

/* The step is over, or cut short: nothing of it may be seen. The guest's own TF comes back. */
static int end_step(struct vcpu *v)
{
    struct kvm_step s = kvcpu_of(v)->step;
    struct kvm_guest_debug g;
    struct mmu_ctx ctx;
    struct kvm_regs r;
    struct x86 x;
    u64 la;
    u8 b;

    kvcpu_of(v)->step = (struct kvm_step){ 0 };
    wanted(v, &g);
    if (kvm_look(v, &x) < 0 || apply(v, &g) < 0)
        return -EIO;
    context_of(v, &x, &ctx);
    la = x.seg[SEG_SS].base + (x.seg[SEG_SS].attr & SEG_DB ? (u32)x.gpr[RSP] : (u16)x.gpr[RSP]);
    if (x.efer & EFER_LMA && x.seg[SEG_CS].attr & SEG_L)
        la = x.gpr[RSP];
    if (s.kind == KVM_STEP_PUSHF && !s.own_tf && copy_linear(v, &ctx, la + 1, &b, 1, false)) {
        b &= (u8)~(FLAG_TF >> 8);
        copy_linear(v, &ctx, la + 1, &b, 1, true);
    }
    if (!s.own_tf && !(s.kind == KVM_STEP_SYSCALL && x.rip == s.target))
        return 0;
    if (ioctl(kvcpu_of(v)->fd, KVM_GET_REGS, &r) < 0)
        return err(-errno, "KVM_GET_REGS: %s", strerror(errno));
    if (s.own_tf)
        r.rflags |= FLAG_TF;
    else
        r.r11 &= ~(u64)FLAG_TF;
    if (ioctl(kvcpu_of(v)->fd, KVM_SET_REGS, &r) < 0)
        return err(-errno, "KVM_SET_REGS: %s", strerror(errno));
    return 0;
}

int kvm_debug_leave(struct vcpu *v)
{
    return kvcpu_of(v)->step.active ? end_step(v) : 0;
}

/* The guest's own exception. */
static int inject(struct vcpu *v, u64 dr6, u32 which)
{
    struct kvm_guest_debug g = kvcpu_of(v)->debug;
    struct kvm_debugregs d;

    if (which == KVM_GUESTDBG_INJECT_DB) {
        if (ioctl(kvcpu_of(v)->fd, KVM_GET_DEBUGREGS, &d) < 0)
            return err(-errno, "KVM_GET_DEBUGREGS: %s", strerror(errno));
        d.dr6 |= dr6;
        if (ioctl(kvcpu_of(v)->fd, KVM_SET_DEBUGREGS, &d) < 0)
            return err(-errno, "KVM_SET_DEBUGREGS: %s", strerror(errno));
    }
    g.control |= which | KVM_GUESTDBG_ENABLE;
    return apply(v, &g);
}

static void stop(struct vcpu *v, enum debug_stop why, const struct debug_watch *w)
{
    v->debug.stop = why;
    if (w) {
        v->debug.stop_la = w->la;
        v->debug.stop_access = w->access;
    }
}

/* Behind the step that passed a breakpoint in memory its byte goes in. */
static void passed(struct vcpu *v, u64 la)
{
    struct kvm_machine *k = kvm_of(v->m);
    struct kvm_plan_soft *s = find_soft(&k->plan, la);

    v->debug.pass = false;
    pthread_mutex_lock(&k->lock);
    if (s)
        soft_in(v->m, s);
    pthread_mutex_unlock(&k->lock);
}

static int on_debug_trap(struct vcpu *v, u64 dr6)
{
    const struct kvm_plan *p = &kvm_of(v->m)->plan;
    struct kvm_step s = kvcpu_of(v)->step;
    bool arrived = s.kind == KVM_STEP_SYSCALL && p->registers < ARRAY_SIZE(p->reg) && dr6 & BIT(p->registers);
    bool stepped = s.active && (dr6 & DR6_BS || arrived), ours = stepped;
    int r = stepped ? end_step(v) : 0;

    if (stepped && s.over)
        passed(v, s.over_la);
    if (stepped && v->debug.step)
        stop(v, DEBUG_STEPPED, NULL);
    for (unsigned i = 0; i < p->registers; i++)
        if (dr6 & BIT(i)) {
            int watch = p->reg[i].watch;

            ours = true;
            if (watch >= 0)
                stop(v, DEBUG_WATCHED, &v->m->debug.watch[watch]);
            else if (!v->debug.stop)
                stop(v, DEBUG_POINT, NULL);
        }
    if (r == 0 && (!ours || (stepped && s.own_tf && dr6 & DR6_BS)))
        r = inject(v, dr6 & (DR6_BS | DR6_BD | DR6_BT), KVM_GUESTDBG_INJECT_DB);
    return r;
}

/* KVM_EXIT_DEBUG: vcpu.debug.stop is set if the debugger is to look. */
int kvm_debug_exit(struct vcpu *v)
{
    const struct kvm_debug_exit_arch *d = &kvcpu_of(v)->run->debug.arch;

    if (d->exception == VEC_DB)
        return on_debug_trap(v, d->dr6);
    if (d->exception != VEC_BP)
        return err(-EIO, "KVM gave up: a debug exit for exception %u", d->exception);
    if (!find_soft(&kvm_of(v->m)->plan, d->pc))
        return inject(v, 0, KVM_GUESTDBG_INJECT_BP);
    stop(v, DEBUG_POINT, NULL);
    return 0;
}
