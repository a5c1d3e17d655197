/*
 * bt: the engine. Its run loop is the interpreter's (boundary, interrupts, single-stepping); only blocks run otherwise, here.
 *
 * Locking: none, as in interp. Events: whoever raises one sets vcpu.events, then icpu.bt.stop, and sends a signal if icpu.bt.inside says that translated code may
 * be running; bt_run() clears stop, sets inside, and looks at the events afterwards, so none is lost. Loops look themselves (emit_branch.c, poll()), by two loads that
 * cost next to nothing; whoever raises an event waits a few microseconds for that, since a signal takes longer, and only then sends one: translated code
 * is left where the signal finds it (fault.c). Handlers of the interpreter's that are called from it are followed by a look at stop.
 */
#define _GNU_SOURCE
#include "cpu/bt/bt.h"

#include <asm/prctl.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

#include "base/err.h"
#include "cpu/bt/check.h"
#include "cpu/bt/codepage.h"
#include "cpu/bt/fpstate.h"
#include "cpu/bt/handled.h"
#include "cpu/bt/shadow.h"
#include "cpu/bt/signal.h"
#include "cpu/bt/tr.h"
#include "cpu/cpuid.h"
#include "cpu/interp/ops.h"
#include "cpu/stats.h"

/* Supervisor code has one score for all address spaces; where it reaches user pages, theirs counts. */
static void ways_set(struct icpu *c)
{
    bool possible = shadow_possible(c), super = possible && shadow_pays(c, SHADOW_CONTEXTS), space = possible && shadow_pays(c, c->tlb->context);
    c->bt.way[VIEW_SUPER] = super;
    c->bt.way[VIEW_SUPER_OPEN] = c->x->cr4 & CR4_SMAP ? space : super;
    c->bt.way[VIEW_USER] = space;
}

unsigned bt_key(struct icpu *c)
{
    enum tlb_view_id view = c->tlb->cur;
    if (!c->bt.bt->choose)
        return shadow_possible(c) ? view | KEY_SHADOW : view;
    ways_set(c);
    return c->bt.way[view] ? view | KEY_SHADOW : view;
}

#define ANSWER_CYCLES 10000                                        /* a few us: what a signal costs */
#define ACCOUNT_CYCLES BIT(20)
#define CALM_CYCLES BIT(23)                                        /* whoever runs so long and changes no mapping had better use the shadow */

void bt_account(struct icpu *c, unsigned context)
{
    struct bt *t = c->bt.bt;
    u64 now = __rdtsc(), space = c->x->cr3 & ~0xfffull;
    const u64 *count = c->v->count;
    u64 misses = count[COUNT_TLB_WALK_READ] + count[COUNT_TLB_WALK_WRITE];
    u64 troubles = count[COUNT_TRAP_PF] + count[COUNT_TLB_FLUSH_ALL] + count[COUNT_TLB_FLUSH_PAGE] + count[COUNT_TLB_FLUSH_NONGLOBAL];
    shadow_ran(c, context, now - t->since, misses - t->misses, troubles - t->troubles);
    t->calm = troubles == t->troubles ? t->calm + (now - t->since) : 0;
    t->troubles = troubles;
    if (t->calm > CALM_CYCLES)
        shadow_calm(c, context);
    t->since = now;
    t->misses = misses;
    context = c->tlb->context;
    if (t->space[context] != space) {
        t->space[context] = space;
        shadow_started(c, context);
    }
    ways_set(c);
}

void bt_rebias(struct icpu *c, unsigned key)
{
    u64 d = key & KEY_SHADOW ? c->bt.delta[key & 3][c->r[RSP] >> 39 & 511] : 0;
    c->bt.bias = d;
    c->bt.nbias = 0 - d;
}

/* So many misses of the software TLB are reason enough to look whether the shadow would have been spared them. True: it is the shadow's turn. */
#define MISSES_LOOK 512u

static bool missed_much(struct icpu *c, const struct tb *tb)
{
    const struct bt *t = c->bt.bt;
    const u64 *count = c->v->count;
    if (!t->choose || tb->key & KEY_SHADOW || count[COUNT_TLB_WALK_READ] + count[COUNT_TLB_WALK_WRITE] - t->misses < MISSES_LOOK)
        return false;
    bt_account(c, c->tlb->context);
    return bt_key(c) & KEY_SHADOW;
}

/* ---- handlers of the interpreter's ---- */
static int op_done(struct icpu *c, struct tb *tb, const struct op *op, int r, bool turn)
{
    if (r != OP_NEXT) {
        c->bt.op = op;
        c->bt.insns += (u64)(op - tb->b->op) + (r == OP_NEAR);
        return r;
    }
    c->rip = op_next_rip(c, op);
    if (unlikely(tb->dead || tb->b->op[0].fn == tb->b->op[tb->b->n].fn)) { /* this block has been written to */
        vcpu_left(c->v, COUNT_EXIT_REWRITTEN);
        c->bt.insns += (u64)(op - tb->b->op) + 1;
        return BT_EXIT_RIP;
    }
    if (unlikely((tb->key & 3u) != c->tlb->cur || turn)) {         /* STAC, CLAC: what follows sees memory otherwise */
        c->bt.insns += (u64)(op - tb->b->op) + 1;
        return BT_EXIT_RIP;
    }
    bt_rebias(c, tb->key);
    bt_fp_enter(c);
    c->bt.done = (u32)(op - tb->b->op) + 1;
    return OP_NEXT;
}

static enum vcpu_counted exit_counted(int r)
{
    switch (r) {
    case BT_EXIT_RIP: case BT_EXIT_STOP: return COUNT_EXIT_EVENT;
    case BT_EXIT_MISS: return COUNT_EXIT_INDIRECT;
    case BT_EXIT_LINK: return COUNT_EXIT_DIRECT;
    case BT_EXIT_OP: return COUNT_EXIT_ACCESS;
    case OP_FAULT: case OP_TRAP: case OP_SHUTDOWN: return COUNT_EXIT_FAULT;
    case OP_HALT: return COUNT_EXIT_HALT;
    case OP_NEAR: return COUNT_EXIT_BRANCH;
    case OP_RESTART: return COUNT_EXIT_EVENT;
    default: return COUNT_EXIT_BOUNDARY;
    }
}

static int run_op(struct icpu *c, u32 site)
{
    struct tb *tb = &c->bt.bt->tb[site >> 8];
    const struct op *op = &tb->b->op[site & 0xff];
    c->block = tb->b;
    c->r[REG_RIP] = tb->la;
    vcpu_left(c->v, COUNT_HANDLERS);
    if (unlikely(c->bt.bt->handled))
        handled_count(c, c->bt.bt->handled, tb, op);
    enum vcpu_where was = vcpu_where(c->v, WHERE_HANDLER);
    bt_fp_leave(c);
    if (op->flags & OPF_FP)
        icpu_claim(c);
    int r = op->fn(c, op);
    vcpu_where(c->v, was);
    return op_done(c, tb, op, r, unlikely(missed_much(c, tb)));
}

static bool usable(const struct icpu *c)
{
    return c->mode == IMODE_LONG64 && (c->cpl == 0 || c->cpl == 3) && c->view != c->tlb->none.e && !c->v->m->debug.points && !c->v->m->debug.watches && !c->tlb->watch;
}

/* May translated code follow at c->rip, without a look at what lies between instructions? vcpu.events are told by icpu.bt.stop. */
static bool goes_on(struct icpu *c)
{
    const struct x86 *x = c->x;
    return usable(c) && !(c->irq_wait && c->flags & FLAG_IF) && !x->nmi_pending && !c->db_pending && x->activity == X86_RUNNING && !c->v->debug.stop &&
           !c->code->flush_wanted && tlb_canonical(c->rip) && !icpu_steps(c);
}

/* What translations take for granted. */
static void fixed_follow(struct icpu *c)
{
    const struct x86 *x = c->x;
    struct bt *t = c->bt.bt;
    struct bt_fixed now = { x->efer & EFER_SCE, x->star, x->lstar, x->sfmask, x->cr4 & (CR4_SMAP | CR4_TSD | CR4_FSGSBASE) };
    c->bt.tsc_bias = clock_tsc_bias(c->v->m->clock) + (u64)x->tsc_adjust;
    if (likely(!memcmp(&now, &t->fixed, sizeof now)))
        return;
    t->fixed = now;
    bt_invalidate(c, 0, ~0ull);
}

/* After an op that jumped, faulted or may have changed mode, privilege or translation: translated code is found again by the jump table. */
static int carry_on(struct icpu *c, int r)
{
    switch (r) {
    case OP_END: case OP_JUMP: case OP_FAULT: case OP_TRAP:
        vcpu_left(c->v, exit_counted(r));
        icpu_end(c, c->bt.op, r);
        break;
    case OP_NEAR:
        vcpu_left(c->v, exit_counted(r));
        break;
    default:
        return r;
    }
    if (!goes_on(c))
        return BT_EXIT_END;
    if (r == OP_END)
        fixed_follow(c);
    if (unlikely(c->bt.expected) && c->cpl == 3)
        shadow_expected(c);
    unsigned key = bt_key(c);
    bt_rebias(c, key);
    bt_fp_begin(c);
    c->bt.resume = c->bt.jump[key][c->rip & JUMP_MASK];
    c->bt.done = 0;
    return OP_NEXT;
}

int bt_run_op(struct icpu *c, u32 site)
{
    int r = run_op(c, site);
    return likely(r == OP_NEXT) || c->bt.single ? r : carry_on(c, r);
}

int bt_run_light(struct icpu *c, u32 site, int (*fn)(struct icpu *c, const struct op *op))
{
    struct tb *tb = &c->bt.bt->tb[site >> 8];
    const struct op *op = &tb->b->op[site & 0xff];
    c->block = tb->b;                                              /* it may call op's handler */
    c->r[REG_RIP] = tb->la;
    vcpu_left(c->v, COUNT_HANDLERS);
    bt_fp_leave(c);
    int r = op_done(c, tb, op, fn(c, op), false);
    return likely(r == OP_NEXT) || c->bt.single ? r : carry_on(c, r);
}

/* ---- translations ---- */
void bt_forget(struct icpu *c, struct block *b)
{
    struct bt *t = c->bt.bt;
    if (t->flushes != c->code->flushes)
        return;                                                    /* everything is forgotten anyway, and b's memory is another's */
    while (b->translations)
        tb_kill(c, t, &t->tb[b->translations]);
}

/* icpu.bt.moved. */
static void moved(struct icpu *c, struct block *b)
{
    struct bt *t = c->bt.bt;
    if (b) {
        for (u32 n = b->translations; n; n = t->tb[n].block_next)
            t->tb[n].b = b;
        return;
    }
    for (u32 n = 1; n < t->tbs; n++)
        if (t->tb[n].dead)
            t->tb[n].b = c->code->nothing;
}

/* icpu.bt.forget_all. */
static void forget_all(struct icpu *c)
{
    struct bt *t = c->bt.bt;
    bt_unplant(t);
    tb_forget(c, t);
    if (c->bt.shadow)
        shadow_reset(c);
}

static struct tb *translate(struct icpu *c, struct bt *t, struct block *b, u32 page, bool indirect)
{
    bool full, user = c->cpl == 3;
    u32 page2 = 0;
    if (b->gpa == BLOCK_DEAD || !page)
        return NULL;
    if (b->gpa2 != BLOCK_DEAD) {
        page2 = tb_page(c, t, c->rip + PAGE_SIZE, user);
        if (!page2)
            return NULL;
    }
    enum code_page how = page2 ? CODE_COMPARE : codepage_use(c, b->gpa, b->len);  /* a crossing instruction is found by its first page only: it compares */
    if (how == CODE_WAIT)
        return NULL;
    if (how == CODE_OK && memcmp(b->bytes, ram_hva(c->v->m->ram, b->gpa), b->len))
        return NULL;                                               /* written since it was decoded, before the page was ours */
    if (how == CODE_OK && b->cut) {
        code_drop(c, b);                                           /* shorter than it need be now */
        return NULL;
    }
    enum vcpu_where was = vcpu_where(c->v, WHERE_TRANSLATE);
    u64 begin = __rdtsc(), copied = c->v->count[COUNT_CODE_COPIED];
    struct tb *tb = bt_translate(c, t, b, page, page2, how == CODE_COMPARE, indirect, &full);
    if (c->v->count[COUNT_CODE_COPIED] != copied) {
        t->copy_cycles += __rdtsc() - begin;
    } else {
        t->cycles += __rdtsc() - begin;
        t->insns += tb ? tb->n : 0;
    }
    vcpu_where(c->v, was);
    if (full) {
        code_flush_later(c);
        b->runs = 0;
    }
    return tb;
}

/* Where in a translation to go on when op has been done; what it expects in S0 is put there. NULL: nowhere in it. */
static const u8 *code_behind(struct icpu *c, const struct bt *t, const struct tb *tb, unsigned op)
{
    const struct tb_mark *m = &t->mark[tb->mark];
    for (unsigned i = 0; i < tb->marks && !tb->second; i++)
        if (m[i].op == op + 1 && !(m[i].flags & MARK_COLD) && (m[i].flags & MARK_RUN) != MARK_RUN) {
            unsigned kept = m[i].flags >> MARK_KEPT;
            if (kept)
                c->bt.kept = c->bt.delta[tb->key & 3][c->r[kept - 1] >> 39 & 511];
            return t->rx + (tb->start + m[i].off - t->rw);
        }
    return NULL;
}

/* An indirect branch has led nowhere: where that is not even canonical, the branch itself faults, as if it had not been. */
static bool missed(struct icpu *c, struct bt *t)
{
    if (likely(tlb_canonical(c->rip)))
        return false;
    const struct tb *tb = &t->tb[c->bt.site >> 8];
    const struct op *op = &tb->b->op[c->bt.site & 0xff];
    struct decoded d;
    if (ZYAN_FAILED(ZydisDecoderDecodeFull(&c->code->decoder[IMODE_LONG64], tb->b->bytes + op->off, op->len, &d.insn, d.opnd)))
        return false;
    if (d.insn.mnemonic == ZYDIS_MNEMONIC_SYSRET)
        return false;                                              /* has been done; the fetch faults */
    if (d.insn.mnemonic == ZYDIS_MNEMONIC_RET)
        c->r[RSP] -= 8 + op->imm;
    else if (d.insn.mnemonic == ZYDIS_MNEMONIC_CALL)
        c->r[RSP] += 8;
    c->r[REG_RIP] = tb->la;
    c->v->insns -= c->bt.count;
    icpu_end(c, op, fault_gp(c, 0));
    return true;
}

static const u8 *rx(const struct bt *t, const u8 *p)
{
    return t->rx + (p - t->rw);
}

static u64 exit_rip(const struct icpu *c, const struct bt *t, int r)
{
    return r == BT_EXIT_LINK ? t->link[c->bt.exit_link].target : r >= BT_EXIT_RIP ? c->rip : op_rip(c, c->bt.op);
}

/* Runs translated code from here on until it is left; what it was left with is dealt with as far as that is possible here. True: the next block may follow. */
static bool run_code(struct icpu *c, struct bt *t, const u8 *code, unsigned key, u32 *link, bool *indirect)
{
    int r;
    bt_fp_begin(c);
    c->bt.done = 0;
    do {
        bt_rebias(c, key);
        enum vcpu_where was = vcpu_where(c->v, WHERE_TRANSLATED);
        r = t->enter(code);
        bt_fp_leave(c);
        vcpu_where(c->v, was);
        code_retag(c);                                             /* translated code changes privilege without */
        if (r != BT_EXIT_END) {                                    /* counted by its handler's result */
            vcpu_left(c->v, exit_counted(r));
            trace(c->v->m->trace, TRACE_EXITS, (int)c->v->id, "%s, rip 0x%llx cpl %u", vcpu_count_name(exit_counted(r)), (unsigned long long)exit_rip(c, t, r), c->cpl);
        }
        if (r == BT_EXIT_STOP) {
            c->bt.insns += c->bt.done;
            r = BT_EXIT_RIP;
        }
        if (r == BT_EXIT_OP) {
            struct tb *tb = &t->tb[c->bt.exit_site >> 8];
            unsigned op = c->bt.exit_site & 0xff;
            r = run_op(c, c->bt.exit_site);
            bool next = r == OP_NEXT;
            if (next) {
                code = code_behind(c, t, tb, op);
                key = tb->key;                                     /* a handler before it may have gone on with another one */
            }
            if ((r == OP_NEXT || r == OP_NEAR) && !tb->dead && (c->bt.exit_slow || (c->bt.exit_gate && !c->live.x87))) {
                tb->b->slow |= (u32)BIT(op);                       /* CALL and RET as well: each would be a signal again */
                tb_kill(c, t, tb);
                r = BT_EXIT_RIP;
            }
            if (next && (r != OP_NEXT || !code || c->bt.single))
                c->bt.insns += op + 1;                             /* else the way out further on counts them */
        }
    } while (r == OP_NEXT && code && !c->bt.single);
    *indirect = false;
    c->v->insns += c->bt.insns;
    c->bt.insns = 0;
    switch (r) {
    case BT_EXIT_LINK:
        *link = c->bt.exit_link;
        c->rip = t->link[*link].target;
        return true;
    case BT_EXIT_MISS:
        *indirect = true;
        return !missed(c, t);
    case BT_EXIT_END:
        return false;
    case BT_EXIT_RIP:
        if (unlikely(c->bt.exit_stale)) {
            struct block *b = t->tb[c->bt.exit_stale].b;
            vcpu_left(c->v, COUNT_EXIT_STALE);
            while (b->translations)
                tb_kill(c, t, &t->tb[b->translations]);
            c->bt.exit_stale = 0;
        }
        return true;
    case OP_NEXT:
    case OP_NEAR:
    case OP_FALL:
        return true;
    default:
        icpu_end(c, c->bt.op, r);
        return icpu_quiet(c);
    }
}

/* The translation at c->rip, made if it is worth it; everything may be forgotten first, *link too. NULL: *b is to be interpreted; both NULL: the fetch has failed. */
static struct tb *find(struct icpu *c, struct bt *t, bool indirect, u32 *link, struct block **b)
{
    u32 page = tb_page(c, t, c->rip, c->cpl == 3);
    struct tb *tb = page ? tb_find(t, c->rip, page, bt_key(c)) : NULL;
    *b = NULL;
    if (unlikely(tb && tb->page2 && tb_page(c, t, c->rip + PAGE_SIZE, c->cpl == 3) != tb->page2)) {
        tb_kill(c, t, tb);                                         /* a crossing instruction: its second page is another now, or gone */
        tb = NULL;
    }
    if (likely(tb && t->flushes == c->code->flushes && !c->code->flush_wanted))
        return tb;
    *b = code_find(c);
    if (!*b)
        return NULL;
    if (unlikely(t->flushes != c->code->flushes)) {
        tb_reset(c, t);
        *link = 0;
        page = tb_page(c, t, c->rip, c->cpl == 3);
    }
    if ((*b)->runs < t->runs && ++(*b)->runs < t->runs)
        return NULL;
    return translate(c, t, *b, page, indirect);
}

static void bt_run(struct icpu *c)
{
    struct bt *t = c->bt.bt;
    u32 link = 0;                                                  /* by which translated code was just left */
    bool go_on = true, indirect = false;                           /* by an indirect branch */
    if (!usable(c)) {
        enum vcpu_where was = vcpu_where(c->v, WHERE_INTERP);
        icpu_run_blocks(c);
        vcpu_where(c->v, was);
        return;
    }
    if (t->choose && __rdtsc() - t->since > ACCOUNT_CYCLES)
        bt_account(c, c->tlb->context);
    fixed_follow(c);
    atomic_store_explicit(&c->bt.inside, 1, memory_order_relaxed);
    do {
        struct block *b;
        atomic_store_explicit(&c->bt.stop, 0, memory_order_relaxed);
        bt_poll_open(c);
        atomic_thread_fence(memory_order_seq_cst);
        if (unlikely(t->plants))
            bt_unplant(t);
        if (unlikely(t->again)) {
            t->again = false;
            bt_signal_again(false);
        }
        if (unlikely(atomic_load(&c->v->events)) && !c->bt.single)
            break;
        if (unlikely(c->bt.expected) && c->cpl == 3)
            shadow_expected(c);
        struct tb *tb = find(c, t, indirect, &link, &b);
        if (tb) {
            if (link && !c->bt.single)
                tb_link(c, t, link, tb);
            if (indirect && !c->bt.single)
                tb_jump_note(c, t, tb);
            link = 0;
            go_on = run_code(c, t, rx(t, tb->start + tb->code_off), tb->key, &link, &indirect);
        } else if (b) {
            link = 0;
            indirect = false;
            vcpu_count(c->v, COUNT_CODE_INTERPRETED);
            enum vcpu_where was = vcpu_where(c->v, WHERE_INTERP);
            go_on = icpu_run_block(c, b);
            vcpu_where(c->v, was);
        } else {
            icpu_fetch_failed(c);
            break;
        }
    } while (go_on && !c->bt.single && usable(c));
    if (c->bt.single)
        icpu_claim(c);
    atomic_store_explicit(&c->bt.inside, 0, memory_order_relaxed);
}

void bt_run_single(struct icpu *c)
{
    c->bt.single = true;
    bt_run(c);
    c->bt.single = false;
    icpu_claim(c);
}

static void run_checked(struct icpu *c)
{
    check_run(c);
}

/* ---- the engine ---- */
/*
 * Does the vCPU see by itself that there are events? Loops do within two microseconds, and so does C code that is on its way to translated code; a signal costs both
 * sides more than that. Not where this thread has taken the vCPU's processor. poll is opened by whoever has left translated code for events, or is about to look at them.
 */
static bool answers(const struct icpu *c)
{
    u64 since = __rdtsc();
    if (c->v->m->tools.signals || bt_signal_same_cpu(atomic_load(&c->bt.bt->cpu)))
        return false;
    do {
        if (atomic_load(&c->bt.poll) != BT_POLL_CLOSED || !atomic_load(&c->bt.inside))
            return true;
        __builtin_ia32_pause();
    } while (__rdtsc() - since < ANSWER_CYCLES);
    return false;
}

static void kick(struct vcpu *v)
{
    struct icpu *c = v->engine_data;
    if (!c)
        return;
    atomic_store(&c->bt.stop, 1);
    if (!v->m->tools.signals)
        atomic_store(&c->bt.poll, BT_POLL_CLOSED);
    if (atomic_load(&c->bt.inside) && !bt_signal_is_here(c) && !answers(c))
        bt_signal_kick(atomic_load(&c->bt.bt->thread));
}

static enum run_exit run(struct vcpu *v)
{
    struct icpu *c = v->engine_data;
    syscall(SYS_arch_prctl, ARCH_SET_GS, c);
    if (bt_signal_here(c) < 0)
        return RUN_FAILED;
    atomic_store(&c->bt.bt->cpu, bt_signal_cpu());
    atomic_store(&c->bt.bt->thread, bt_signal_thread());
    c->bt.bt->since = __rdtsc();
    enum run_exit r = interp_engine.run(v);
    bt_signal_here(NULL);
    atomic_store(&c->bt.bt->thread, 0);
    return r;
}

static void vcpu_close(struct vcpu *v)
{
    struct icpu *c = v->engine_data;
    if (c)
        check_close(c);
    if (c && c->bt.bt) {
        shadow_close(c);
        bt_arena_close(c->bt.bt);
        tb_close(c->bt.bt);
        handled_close(c->bt.bt->handled);
        free(c->bt.bt->tr);
        free(c->bt.bt);
        bt_signal_close();
    }
    interp_engine.vcpu_close(v);
}

static void constants(struct icpu *c, struct bt *t)
{
    s64 x = (s64)((uintptr_t)c->x - (uintptr_t)c);
    t->bmi2 = cpuid_host_has(CPU_BMI2);
    c->bt.self = c;
    bt_poll_open(c);
    c->bt.x_offset = x == (s32)x && x + (s64)sizeof *c->x == (s32)(x + (s64)sizeof *c->x) ? x : 0;
    c->bt.mask_df = FLAG_DF;
    for (unsigned i = 0; i < 3; i++)
        c->bt.mask_bit[i] = (16u << i) - 1;
    c->bt.mask_slot = 511ull << 39;
    c->bt.mask_jump = JUMP_MASK;
    c->bt.mask_target = BT_TARGETS - 1;
    c->bt.mask_return = RETURN_MASK;
    c->bt.pauses = BT_PAUSES;
    c->bt.mask_page = PAGE_MASK;
    c->bt.mask_tlb = (u64)(TLB_SIZE - 1) << PAGE_SHIFT;
    c->bt.mask_entry = (u64)(TLB_SIZE - 1) << 5;
    _Static_assert(sizeof(struct tlb_entry) == 32, "mask_entry shifts by 5");
    for (unsigned i = 0; i < 256; i++) {
        c->bt.without_if[i] = (u8)(i & ~(FLAG_IF >> 8));
        c->bt.without_ac[i] = (u8)(i & ~(FLAG_AC >> 16));
    }
}

static int vcpu_open(struct vcpu *v)
{
    int e = interp_engine.vcpu_open(v);
    if (e < 0)
        return e;
    struct icpu *c = v->engine_data;
    struct bt *t = calloc(1, sizeof *t);
    if (!t) {
        interp_engine.vcpu_close(v);
        return err(-ENOMEM, "vCPU %u: out of host memory", v->id);
    }
    c->bt.bt = t;
    t->tr = calloc(1, sizeof *t->tr);
    t->runs = v->m->tools.translate_at_once || v->m->tools.check ? 1 : BT_RUNS;
    c->bt.count = v->m->tools.insns || v->m->tools.check;
    t->handled = v->m->tools.handlers ? handled_open() : NULL;
    bt_signal_open();
    bt_fp_open(c);
    constants(c, t);
    e = t->tr ? bt_arena_open(c, t) : err(-ENOMEM, "vCPU %u: out of host memory", v->id);
    if (!e)
        e = tb_open(c, t);
    if (e < 0) {
        vcpu_close(v);
        return e;
    }
    c->bt.run = bt_run;
    c->bt.forget = bt_forget;
    c->bt.forget_all = forget_all;
    if (!v->m->tools.check)                                        /* which holds on to blocks */
        c->bt.moved = moved;
    c->bt.flushed = bt_flushed;
    c->bt.context_changed = bt_context_changed;
    if (t->bmi2 && v->m->tools.mmu != MACHINE_MMU_SOFTTLB && shadow_open(c, codepage_is_code) < 0)
        trace(v->m->trace, TRACE_EXITS, (int)v->id, "%s: the software TLB is used instead", err_last());
    t->choose = c->bt.shadow && v->m->tools.mmu == MACHINE_MMU_AUTO;
    if (c->bt.shadow)
        c->bt.protect = shadow_protect;
    c->bt.invalidate = bt_invalidate;
    if (!v->m->tools.check)
        return 0;
    c->bt.run = run_checked;
    e = check_open(c);
    if (e < 0)
        vcpu_close(v);
    return e;
}

static int machine_open(struct machine *m)
{
    int e = interp_engine.machine_open(m);
    if (e < 0 || !m->tools.check)
        return e;
    e = check_gate_open(m);
    if (e < 0)
        interp_engine.machine_close(m);
    return e;
}

static void machine_close(struct machine *m)
{
    check_gate_close(m);
    interp_engine.machine_close(m);
}

static int get(struct vcpu *v, struct x86 *x)
{
    return interp_engine.get(v, x);
}

static int set(struct vcpu *v, const struct x86 *x)
{
    return interp_engine.set(v, x);
}

static void reset(struct vcpu *v)
{
    interp_engine.reset(v);
}

/* What translations have cost. */
static void cost_report(const struct vcpu *v, const struct bt *t, struct stats *s)
{
    u64 khz = clock_tsc_khz(v->m->clock), made = v->count[COUNT_CODE_TRANSLATED], copied = v->count[COUNT_CODE_COPIED];
    stats_group(s, "translating");
    stats_u64(s, "us", t->cycles * 1000 / khz);
    stats_u64(s, "ns-per-block", made ? t->cycles / made * 1000000 / khz : 0);
    stats_u64(s, "cycles-per-instruction", t->insns ? t->cycles / t->insns : 0);
    stats_u64(s, "ns-per-copy", copied ? t->copy_cycles / copied * 1000000 / khz : 0);
    stats_group_end(s);
}

/* What it holds now. */
static void cache_report(const struct bt *t, struct stats *s)
{
    stats_group(s, "cache");
    stats_u64(s, "translations", t->tbs - 1 - t->dead);
    stats_u64(s, "dead", t->dead);
    stats_u64(s, "pages", t->pages - 1);
    stats_u64(s, "links", t->links - 1);
    stats_u64(s, "kib", (t->used - t->first + t->cold - BT_ARENA_BYTES / 2) / KiB);
    stats_u64(s, "percent-full", MAX(t->used, t->cold - BT_ARENA_BYTES / 2) * 100 / (BT_ARENA_BYTES / 2));
    stats_group_end(s);
}

static void stats(const struct vcpu *v, struct stats *s)
{
    const struct icpu *c = v->engine_data;
    cache_report(c->bt.bt, s);
    cost_report(v, c->bt.bt, s);
    shadow_report(c, s);
    handled_report(c->bt.bt->handled, s);
}

/* In code of ours the guest's instruction is one of the block that a handler or interp began last, or the next that will be looked up. */
static u64 sample(const struct vcpu *v, u64 pc, bool *direct)
{
    const struct icpu *c = v->engine_data;
    struct bt *t = c->bt.bt;
    const u8 *p = (const u8 *)(uintptr_t)pc;
    struct tb *tb = tb_at(t, p);
    *direct = tb;
    if (tb)
        return tb_rip(t, tb, p);
    switch (atomic_load_explicit(&v->where, memory_order_relaxed)) {
    case WHERE_BOUNDARY: case WHERE_FIND: case WHERE_DECODE: case WHERE_TRANSLATE: return c->rip;
    default: return c->r[REG_RIP];
    }
}

const struct engine bt_engine = {
    .name = "bt",
    .machine_open = machine_open,
    .machine_close = machine_close,
    .vcpu_open = vcpu_open,
    .vcpu_close = vcpu_close,
    .run = run,
    .debug_points = DEBUG_POINTS_MAX,
    .kick = kick,
    .sample = sample,
    .stats = stats,
    .get = get,
    .set = set,
    .reset = reset,
};
