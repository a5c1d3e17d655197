/*
 * interp: the engine itself. The loop, the boundary between instructions, single-stepping, faults, state in and out.
 *
 * Blocks run one after the other until an event bit is set or a result other than "near branch" or "end of block" comes back; only then are interrupts,
 * pending traps and the step conditions looked at, in the order of SDM vol. 3A table 6-2. Whatever can change those conditions (POPF, STI, IRET,
 * MOV DR, ...) gives such a result.
 *
 * Locking: none; all of it runs on the vCPU's thread. vcpu.events is the only thing that others write.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "cpu/bt/codepage.h"
#include "cpu/interp/code.h"
#include "cpu/interp/fp.h"
#include "cpu/interp/sys.h"
#include "cpu/interp/tlb.h"
#include "cpu/msr.h"
#include "cpu/pv.h"

/* Pages of icpu.c's own: what the engine needs beyond the instructions' view of the processor. */
struct interp {
    struct icpu c;
    struct x86 seen;                                               /* address translation of v->x when run() returned: who changed it since? */
    bool fresh;                                                    /* v->x was replaced: nothing cached is to be trusted */
    bool forget;                                                   /* another guest begins: nothing cached is of use */
    u64 debug_generation;                                          /* of the debugger's lists that caches were made with */
};

/* ---- faults ---- */
int fault_raise(struct icpu *c, unsigned vector)
{
    c->fault = (struct fault){ .vector = (u8)vector };
    return OP_FAULT;
}

int fault_raise_error(struct icpu *c, unsigned vector, u32 error)
{
    c->fault = (struct fault){ .vector = (u8)vector, .has_error = true, .error = error };
    return OP_FAULT;
}

int fault_page(struct icpu *c, u64 la, u32 error)
{
    c->fault = (struct fault){ .vector = VEC_PF, .has_error = true, .error = error, .cr2 = la };
    return OP_FAULT;
}

/* ---- mode and state ---- */
static enum imode mode_of(const struct x86 *x, u32 flags)
{
    u16 cs = x->seg[SEG_CS].attr;
    if (!(x->cr0 & CR0_PE))
        return IMODE_REAL16;
    if (x->efer & EFER_LMA)
        return cs & SEG_L ? IMODE_LONG64 : cs & SEG_DB ? IMODE_COMPAT32 : IMODE_COMPAT16;
    if (flags & FLAG_VM)
        return IMODE_V86;
    return cs & SEG_DB ? IMODE_PROT32 : IMODE_PROT16;
}

void icpu_mode(struct icpu *c)
{
    const struct x86 *x = c->x;
    c->mode = (u8)mode_of(x, c->flags);
    c->cpl = c->mode == IMODE_REAL16 ? 0 : c->mode == IMODE_V86 ? 3 : (u8)x86_cpl(x);
    if (c->mode == IMODE_LONG64) {
        c->stack_size = 8;
        c->rip_mask = c->rip_limit = ~0ull;
        c->cs_base = 0;
    } else {
        c->stack_size = x->seg[SEG_SS].attr & SEG_DB ? 4 : 2;
        c->rip_mask = 0xffffffff;
        c->rip_limit = x->seg[SEG_CS].limit;
        c->cs_base = x->seg[SEG_CS].base;
    }
    tlb_views(c);
}

/* Did somebody outside (INIT, a monitor, a snapshot) change what translations depend on? Rights bits are tlb_views()' affair. */
static bool translation_changed(const struct x86 *a, const struct x86 *b)
{
    return a->cr3 != b->cr3 || a->dr7 != b->dr7 || memcmp(a->pdpte, b->pdpte, sizeof a->pdpte) || memcmp(a->dr, b->dr, sizeof a->dr);
}

void icpu_load(struct icpu *c)
{
    struct interp *in = container_of(c, struct interp, c);
    const struct x86 *x = c->x;
    memcpy(c->r, x->gpr, sizeof x->gpr);
    c->r[REG_ZERO] = 0;
    c->rip = x->rip;
    icpu_set_rflags(c, x->rflags);
    c->db_pending = 0;
    fp_load(c);
    u64 debug = c->v->m->debug.generation;
    if (in->fresh || in->debug_generation != debug || translation_changed(x, &in->seen)) {
        in->fresh = false;
        in->debug_generation = debug;
        tlb_flush_all(c);
        tlb_watchpoints(c);
    }
    icpu_mode(c);
}

void icpu_store(struct icpu *c)
{
    struct interp *in = container_of(c, struct interp, c);
    struct x86 *x = c->x;
    memcpy(x->gpr, c->r, sizeof x->gpr);
    x->rip = c->rip;
    x->rflags = icpu_rflags(c);
    fp_store(c);
    in->seen.cr3 = x->cr3;
    in->seen.dr7 = x->dr7;
    memcpy(in->seen.pdpte, x->pdpte, sizeof x->pdpte);
    memcpy(in->seen.dr, x->dr, sizeof x->dr);
}

/* ---- what an op's result means ---- */
static void shutdown(struct icpu *c)
{
    c->x->activity = X86_SHUTDOWN;
}

static int deliver(struct icpu *c)
{
    int r = deliver_fault(c);
    if (r == OP_SHUTDOWN)
        shutdown(c);
    return r;
}

/* Everything but OP_NEAR and OP_FALL. Returns OP_NEXT when an instruction was completed, OP_FAULT when it was not. */
static int finish(struct icpu *c, const struct op *op, int r)
{
    switch (r) {
    case OP_NEXT:
    case OP_END:
        c->rip = op_next_rip(c, op) & c->rip_mask;
        break;
    case OP_JUMP:
        break;
    case OP_HALT:
        c->rip = op_next_rip(c, op) & c->rip_mask;
        c->x->activity = X86_HALTED;
        vcpu_count(c->v, COUNT_HLT);
        break;
    case OP_TRAP:
        c->v->insns++;
        c->db_pending = 0;
        deliver(c);
        return OP_FAULT;
    case OP_FAULT:
        c->rip = op_rip(c, op) & c->rip_mask;
        c->db_pending = 0;
        deliver(c);
        return OP_FAULT;
    case OP_SHUTDOWN:
        shutdown(c);
        return OP_FAULT;
    default:                                                       /* OP_RESTART */
        c->rip = op_rip(c, op) & c->rip_mask;
        return OP_FAULT;
    }
    c->v->insns++;
    return OP_NEXT;
}

/* A fault of the fetch, or a breakpoint of the debugger's: c->rip is the instruction that is not run. */
static void fetch_failed(struct icpu *c)
{
    c->db_pending = 0;
    if (c->v->debug.stop)
        return;
    deliver(c);
}

static void debug_trap(struct icpu *c, u64 dr6)
{
    c->db_pending = 0;
    debug_raise(c, dr6);
    deliver(c);
}

/* ---- the fast loop ---- */
void icpu_end(struct icpu *c, const struct op *op, int r)
{
    if (finish(c, op, r) == OP_NEXT && unlikely(c->db_pending))
        debug_trap(c, c->db_pending);                              /* a task switch with the T flag, an I/O breakpoint */
}

void icpu_fetch_failed(struct icpu *c)
{
    fetch_failed(c);
}

static inline __attribute__((always_inline)) bool run_block(struct icpu *c, struct block *b)
{
    const struct op *op = b->op;
    int r;
    c->block = b;
    c->r[REG_RIP] = c->rip;
    if (unlikely(b->fp))
        icpu_claim(c);
    while ((r = op->fn(c, op)) == OP_NEXT)
        op++;
    c->v->insns += (u64)(op - b->op) + (r == OP_NEAR);
    if (likely(r >= OP_NEAR))
        return true;
    icpu_end(c, op, r);
    return false;
}

bool icpu_run_block(struct icpu *c, struct block *b)
{
    return run_block(c, b);
}

void icpu_run_blocks(struct icpu *c)
{
    struct vcpu *v = c->v;
    struct block *b;
    do {
        b = code_find(c);
        if (unlikely(!b)) {
            fetch_failed(c);
            return;
        }
    } while (run_block(c, b) && likely(!atomic_load_explicit(&v->events, memory_order_relaxed)));
}

/* ---- one instruction at a time ---- */
#define DR6_BS BIT(14)

static u64 breakpoints_at(const struct icpu *c, u64 la)
{
    u64 hit = 0;
    for (unsigned i = 0; i < 4; i++)
        if (c->x->dr7 >> (2 * i) & 3 && !(c->x->dr7 >> (16 + 4 * i) & 15) && c->x->dr[i] == la)
            hit |= BIT(i);
    return hit;
}

static void trace_insn(const struct icpu *c, const struct block *b)
{
    char hex[2 * 15 + 1] = "";
    for (unsigned i = 0; i < b->op[0].len && i < 15; i++)
        snprintf(hex + 2 * i, 3, "%02x", b->bytes[i]);
    trace_line(c->v->m->trace, TRACE_INSN, (int)c->v->id, "%04x:%llx %s rax=%llx rcx=%llx rdx=%llx rbx=%llx rsp=%llx rbp=%llx rsi=%llx rdi=%llx fl=%llx",
               c->x->seg[SEG_CS].sel, (unsigned long long)c->rip, hex, (unsigned long long)c->r[RAX], (unsigned long long)c->r[RCX],
               (unsigned long long)c->r[RDX], (unsigned long long)c->r[RBX], (unsigned long long)c->r[RSP], (unsigned long long)c->r[RBP],
               (unsigned long long)c->r[RSI], (unsigned long long)c->r[RDI], (unsigned long long)icpu_rflags(c));
}

/*
 * Does a single-step trap follow the instruction that has just run? TF counts as it was before, with two exceptions: software interrupts clear it on
 * their way and are not followed by a trap (SDM vol. 3B 17.3.1.4); SYSCALL and SYSRET look at what they have loaded.
 */
static bool single_steps(const struct icpu *c, const struct block *b, bool tf_before)
{
    unsigned len = b->op[0].len;
    const u8 *end = b->bytes + len;
    if (len >= 2 && end[-2] == 0x0f && (end[-1] == 0x05 || end[-1] == 0x07))
        return c->flags & FLAG_TF;
    bool software_interrupt = end[-1] == 0xcc || end[-1] == 0xce || end[-1] == 0xf1 || (len >= 2 && end[-2] == 0xcd);
    return tf_before && !software_interrupt;
}

/* Somebody wants to see every iteration of a repeated instruction. */
static bool wants_iterations(const struct icpu *c)
{
    const struct vcpu_debug *d = &c->v->debug;
    return c->flags & FLAG_TF || c->x->dr7 & 0xff || d->step || d->pass || trace_on(c->v->m->trace, TRACE_INSN);
}

/* RF, which IRET sets behind each fault, and the shadow are over when the next instruction is. */
static bool wants_step(const struct icpu *c)
{
    return c->flags & FLAG_RF || c->x->shadow || wants_iterations(c);
}

/* RF only holds back breakpoints at the next instruction; where there are none, that instruction is like any other. */
bool icpu_steps(struct icpu *c)
{
    if (unlikely(c->flags & FLAG_RF) && !c->x->shadow && !wants_iterations(c))
        c->flags &= ~FLAG_RF;
    return wants_step(c);
}

static int step_insn(struct icpu *c)
{
    bool tf = c->flags & FLAG_TF, rf = c->flags & FLAG_RF, iterations = wants_iterations(c);
    u64 traps = rf || c->ss_shadow ? 0 : breakpoints_at(c, (c->cs_base + c->rip) & c->rip_mask);
    if (traps) {
        debug_trap(c, traps);
        return OP_FAULT;
    }
    struct block *b = code_find(c);
    if (!b) {
        fetch_failed(c);
        return OP_FAULT;
    }
    if (trace_on(c->v->m->trace, TRACE_INSN))
        trace_insn(c, b);
    c->ss_shadow = c->x->shadow = false;                           /* it covers this instruction only; the instruction may set it again */
    c->flags &= ~FLAG_RF;
    c->block = b;
    c->r[REG_RIP] = c->rip;
    c->step = iterations;
    if (b->fp)
        icpu_claim(c);
    int r = b->op[0].fn(c, &b->op[0]);
    c->step = false;
    if (r == OP_NEAR)
        c->v->insns++;
    else if (r == OP_FALL)
        return r;
    else if (finish(c, &b->op[0], r) != OP_NEXT && r != OP_RESTART)
        return r;
    if (r == OP_RESTART && rf)
        c->flags |= FLAG_RF;
    /* MOV SS and POP SS hold debug traps back until after the next instruction (SDM vol. 3A 6.8.3); STI, opcode 0xfb, does not. */
    c->ss_shadow = c->x->shadow && b->bytes[b->op[0].len - 1] != 0xfb;
    if (c->ss_shadow)
        return r;
    traps = c->db_pending | (single_steps(c, b, tf) ? DR6_BS : 0);
    if (traps)
        debug_trap(c, traps);
    return r;
}

/* The debugger's step is over when the instruction is, or the fault that it raised is on its way. */
static void step(struct icpu *c)
{
    struct vcpu_debug *d = &c->v->debug;
    if (step_insn(c) != OP_RESTART)
        d->pass = false;
    if (d->step && !d->stop)
        d->stop = DEBUG_STEPPED;
}

/* ---- between instructions ---- */
static void take_events(struct icpu *c, u32 events)
{
    struct vcpu *v = c->v;
    atomic_fetch_and(&v->events, ~(events & ~(u32)VCPU_EV_OUTSIDE)); /* before the chips are asked, so that no later signal is lost */
    if (events & VCPU_EV_CLOCK)
        pvclock_update(v, c->x);
    if (events & VCPU_EV_NMI)
        c->x->nmi_pending = true;
    if (events & VCPU_EV_UNHALT)
        c->x->kvm_unhalted = true;
    if (events & VCPU_EV_INTR)
        c->irq_wait = true;
    if (events & VCPU_EV_CODE)
        codepage_serve(c);
    if (unlikely(c->codepage->revisits))
        codepage_revisit(c);
}

static void take_interrupt(struct icpu *c)
{
    codepage_leave(c);
    icpu_claim(c);
    int vector = c->v->intc.ops->ack(c->v->intc.chip);
    codepage_enter(c);
    if (vector < 0) {
        c->irq_wait = false;
        return;
    }
    c->x->activity = X86_RUNNING;
    vcpu_count(c->v, COUNT_INTERRUPT);
    pv_tick(c->v, c->x);
    if (deliver_interrupt(c, (unsigned)vector) == OP_SHUTDOWN)
        shutdown(c);
}

/* During a debugger's step; but what ends a HLT is an interrupt. */
static bool debug_holds_interrupts(const struct icpu *c)
{
    return unlikely(c->v->debug.step || c->v->debug.pass) && c->x->activity == X86_RUNNING;
}

/* Takes what is pending. Returns whether the next instruction may run; otherwise *exit says why not. */
static bool boundary(struct icpu *c, enum run_exit *exit)
{
    struct x86 *x = c->x;
    u32 events = atomic_load_explicit(&c->v->events, memory_order_acquire);
    if (unlikely(x->activity == X86_SHUTDOWN)) {
        *exit = RUN_SHUTDOWN;
        return false;
    }
    if (events)
        take_events(c, events);
    if (events & VCPU_EV_OUTSIDE) {
        *exit = RUN_OUTSIDE;
        return false;
    }
    if (x->activity != X86_WAIT_SIPI && !x->shadow && !debug_holds_interrupts(c)) {
        if (x->nmi_pending && !x->nmi_blocked) {
            x->nmi_pending = false;
            x->activity = X86_RUNNING;
            if (deliver_nmi(c) == OP_SHUTDOWN)
                shutdown(c);
        } else if (c->irq_wait && c->flags & FLAG_IF) {
            take_interrupt(c);
        }
    }
    if (unlikely(x->kvm_unhalted) && x->activity == X86_HALTED) {
        x->kvm_unhalted = false;
        x->activity = X86_RUNNING;
    }
    if (x->activity == X86_RUNNING)
        return true;
    *exit = x->activity == X86_SHUTDOWN ? RUN_SHUTDOWN : RUN_HALTED;
    return false;
}

bool icpu_quiet(const struct icpu *c)
{
    const struct x86 *x = c->x;
    return !atomic_load_explicit(&c->v->events, memory_order_relaxed) && x->activity == X86_RUNNING && !c->irq_wait && !x->nmi_pending && !x->kvm_unhalted &&
           !c->v->debug.stop && !wants_step(c);
}

static enum run_exit debug_stopped(struct vcpu *v)
{
    v->debug.step = v->debug.pass = false;
    return RUN_DEBUG;
}

/* For reset(), which is another thread's: caches are the vCPU's own. */
static void forget(struct icpu *c)
{
    struct interp *in = container_of(c, struct interp, c);
    in->forget = false;
    in->fresh = true;
    code_forget(c);
    if (c->bt.forget_all)
        c->bt.forget_all(c);
}

static enum run_exit run(struct vcpu *v)
{
    struct icpu *c = v->engine_data;
    enum run_exit exit = RUN_DEBUG;
    tlb_check_epoch(c);
    if (unlikely(container_of(c, struct interp, c)->forget))
        forget(c);
    if (pv_enter(v, c->x))
        container_of(c, struct interp, c)->fresh = true;
    codepage_enter(c);
    icpu_load(c);
    vcpu_where(v, c->bt.bt ? WHERE_BOUNDARY : WHERE_INTERP);
    c->irq_wait = true;
    while (likely(!v->debug.stop) && boundary(c, &exit)) {
        if (unlikely(v->debug.stop))                               /* an interrupt's frame met a watchpoint */
            break;
        if (unlikely(icpu_steps(c)))
            step(c);
        else if (unlikely(v->m->debug.points || v->m->debug.watches))
            icpu_run_blocks(c);                                    /* translations know nothing of them */
        else
            c->bt.run(c);
        if (unlikely(c->bt.failed)) {
            exit = RUN_FAILED;
            break;
        }
    }
    icpu_store(c);
    codepage_leave(c);
    pv_leave(v, c->x);
    return unlikely(v->debug.stop) && exit != RUN_SHUTDOWN ? debug_stopped(v) : exit;
}

/* ---- the engine ---- */
static void vcpu_close(struct vcpu *v)
{
    struct icpu *c = v->engine_data;
    if (!c)
        return;
    fp_close(c);
    code_close(c);
    codepage_vcpu_close(c);
    tlb_close(c);
    munmap(container_of(c, struct interp, c), sizeof(struct interp));
    v->engine_data = NULL;
}

/*
 * Zeroed memory, at less than 2 GiB from `near` if there is room: translated code then reaches what is there by a displacement from here. It is large, and
 * used in part.
 */
static void *map_near(const void *near, size_t n)
{
    void *p;
    for (s64 step = 256 * MiB; step < 1536 * (s64)MiB; step = step > 0 ? -step : 64 * (s64)MiB - step) {
        void *there = (void *)(((uintptr_t)near + (uintptr_t)step) & PAGE_MASK);
        p = mmap(there, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (p == there)
            return p;
        if (p != MAP_FAILED)                                       /* an old kernel, which takes it for a hint */
            munmap(p, n);
    }
    p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static int vcpu_open(struct vcpu *v)
{
    struct interp *in = map_near(v, sizeof *in);
    if (!in)
        return err(-ENOMEM, "vCPU %u: out of host memory", v->id);
    in->fresh = true;
    in->c.v = v;
    in->c.x = &v->x;
    in->c.bt.run = icpu_run_blocks;
    v->engine_data = &in->c;
    int e = tlb_open(&in->c);
    if (!e)
        e = codepage_vcpu_open(&in->c);
    if (!e)
        e = code_open(&in->c);
    if (!e)
        e = fp_open(&in->c);
    if (e)
        vcpu_close(v);
    return e;
}

static int get(struct vcpu *v, struct x86 *x)
{
    *x = v->x;
    return 0;
}

static int set(struct vcpu *v, const struct x86 *x)
{
    struct icpu *c = v->engine_data;
    v->x = *x;
    container_of(c, struct interp, c)->fresh = true;
    return 0;
}

static void reset(struct vcpu *v)
{
    struct icpu *c = v->engine_data;
    container_of(c, struct interp, c)->forget = true;
}

/* The block's, since single instructions do not say where they are. */
static u64 sample(const struct vcpu *v, u64 pc UNUSED, bool *direct)
{
    const struct icpu *c = v->engine_data;
    *direct = false;
    return c->rip;
}

const struct engine interp_engine = {
    .name = "interp",
    .machine_open = codepages_open,
    .machine_close = codepages_close,
    .vcpu_open = vcpu_open,
    .vcpu_close = vcpu_close,
    .run = run,
    .get = get,
    .set = set,
    .reset = reset,
    .sample = sample,
    .counts_insns = true,
    .debug_points = DEBUG_POINTS_MAX,
};
