/*
 * bt: the engine. Its run loop is the interpreter's (boundary, interrupts, single-stepping); only blocks run otherwise, here.
 *
 * Locking: none, as in interp. An event reaches running code through icpu.bt.stop: whoever raises it sets vcpu.events first and stop afterwards; bt_run() clears stop first and
 * looks at the events afterwards, so none is lost. Backward jumps and look-ups poll it.
 */
#define _GNU_SOURCE
#include "cpu/bt/bt.h"

#include <asm/prctl.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/err.h"
#include "cpu/bt/emit.h"
#include "cpu/bt/fpstate.h"
#include "cpu/interp/tlb.h"

#define JUMP_BYTES (sizeof(struct bt_jump) << BT_JUMP_BITS)

static void reset(struct icpu *c, struct bt *t)
{
    t->used = t->first;
    t->flushes = c->code->flushes;
    memset(t->jump, 0, JUMP_BYTES);                                /* tag 0 is never a valid one */
}

/*
 * Relative branches are translated without a look at whether their target is canonical: no code where 2 GiB and an instruction further on it might not be.
 * Position independence makes this a question for each entry, not for the translation.
 */
static bool room_around(u64 la)
{
    return tlb_canonical(la + 2 * GiB + PAGE_SIZE) && tlb_canonical(la - 2 * GiB - PAGE_SIZE);
}

static bool translatable(const struct block *b)
{
    return b->gpa != BLOCK_DEAD && b->gpa2 == BLOCK_DEAD;
}

/* ---- jump targets ---- */
static struct bt_jump *jump_slot(struct bt *t, u64 la)
{
    return &t->jump[(la ^ la >> BT_JUMP_BITS) & ((1u << BT_JUMP_BITS) - 1)];
}

/* Pages with jump targets, by hash: others can be dropped from the TLB without a consequence here. */
static u64 *page_bits(struct bt *t, u64 la, u64 *bit)
{
    u64 h = (la >> PAGE_SHIFT ^ la >> 28) & (BT_PAGE_BITS - 1);
    *bit = BIT(h & 63);
    return &t->page[h >> 6];
}

/* Supervisor code outlives MOV CR3, so it is noted only where it is global. */
static void jump_note(struct icpu *c, struct bt *t, const u8 *code)
{
    u64 la = c->rip, bit;
    if (c->cpl != 3) {
        enum tlb_view_id view = tlb_system_view(c);
        u32 error;
        if (!tlb_lookup(c, view, la, MMU_EXEC, &error) || !c->tlb->view[view].page[la >> PAGE_SHIFT & (TLB_SIZE - 1)].global)
            return;
    }
    *jump_slot(t, la) = (struct bt_jump){ la, c->bt.tag, code, 0 };
    u64 *w = page_bits(t, la, &bit);
    *w |= bit;
}

static void flushed(struct icpu *c, enum tlb_flush what, u64 la)
{
    struct bt *t = c->bt.bt;
    u64 bit;
    c->bt.generation[1]++;
    if (what == FLUSH_NONGLOBAL)
        return;
    if (what == FLUSH_PAGE && !(*page_bits(t, la, &bit) & bit)) {
        c->bt.generation[1]--;
        return;
    }
    c->bt.generation[0]++;
    memset(t->page, 0, sizeof t->page);
}

/* Where it is known that this address leads to this code, the interpreter's tables need not be asked: the code looks at the guest's bytes itself. */
static const u8 *jump_find(struct icpu *c, struct bt *t)
{
    const struct bt_jump *j = jump_slot(t, c->rip);
    return j->la == c->rip && j->tag == c->bt.tag ? j->code : NULL;
}

static enum vcpu_counted exit_counted(int r)
{
    switch (r) {
    case BT_EXIT_RIP: return COUNT_EXIT_INDIRECT;
    case BT_EXIT_DIRECT: return COUNT_EXIT_DIRECT;
    case BT_EXIT_STALE: return COUNT_EXIT_STALE;
    case OP_FAULT: case OP_TRAP: case OP_SHUTDOWN: return COUNT_EXIT_FAULT;
    case OP_HALT: return COUNT_EXIT_HALT;
    case OP_NEAR: return COUNT_EXIT_BRANCH;
    case OP_RESTART: return COUNT_EXIT_EVENT;
    default: return COUNT_EXIT_BOUNDARY;
    }
}

/* Translated code from c->rip on. True: the next block may follow at once. */
static bool run_code(struct icpu *c, struct bt *t, const u8 *code, u32 *patch)
{
    if (*patch) {
        aim(t->rw + *patch, t->rw + (code - t->rx));
        vcpu_count(c->v, COUNT_CODE_LINKED);
        *patch = 0;
    }
    c->bt.page = c->rip & PAGE_MASK;
    enum vcpu_where was = vcpu_where(c->v, WHERE_TRANSLATED);
    int r = t->enter(code);
    vcpu_where(c->v, was);
    vcpu_count(c->v, exit_counted(r));
    c->v->insns += c->bt.insns;
    c->bt.insns = 0;
    if (r == BT_EXIT_DIRECT) {
        c->rip = c->bt.page + c->bt.exit_offset;
        *patch = c->bt.exit_patch;
        return true;
    }
    if (r == BT_EXIT_STALE)
        jump_slot(t, c->rip)->tag = 0;
    if (r >= OP_NEAR)
        return true;
    icpu_end(c, c->bt.op, r);
    return false;
}

/* The block is interpreted a few times before it is worth a translation. */
static void consider(struct icpu *c, struct bt *t, struct block *b)
{
    bool full = false;
    if (b->code || b->runs >= t->runs || ++b->runs < t->runs || !translatable(b))
        return;
    enum vcpu_where was = vcpu_where(c->v, WHERE_TRANSLATE);
    bool done = bt_translate(c, t, b, &full);
    vcpu_where(c->v, was);
    if (!done && full) {
        code_flush_later(c);
        c->tlb->generation++;                                      /* so that the next look-up takes the long way */
        code_retag(c);
        b->runs = 0;
    }
}

static void bt_run(struct icpu *c)
{
    struct bt *t = c->bt.bt;
    u32 patch = 0;                                                 /* the direct jump by which translated code was just left: its displacement, 0: none */
    bool go_on;
    if (c->mode != IMODE_LONG64 || c->v->m->debug.points || c->v->m->debug.watches) {
        enum vcpu_where was = vcpu_where(c->v, WHERE_INTERP);
        icpu_run_blocks(c);
        vcpu_where(c->v, was);
        return;
    }
    do {
        atomic_store_explicit(&c->bt.stop, 0, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
        if (unlikely(atomic_load(&c->v->events)) && !c->bt.single)
            return;
        const u8 *code = c->bt.single ? NULL : jump_find(c, t);
        if (code && !patch) {
            go_on = run_code(c, t, code, &patch);
            continue;
        }
        struct block *b = code_find(c);
        if (unlikely(!b)) {
            icpu_fetch_failed(c);
            return;
        }
        if (unlikely(t->flushes != c->code->flushes)) {
            reset(c, t);
            patch = 0;
        }
        consider(c, t, b);
        if (b->code && room_around(c->rip)) {
            if (!c->bt.single)
                jump_note(c, t, b->code);
            go_on = run_code(c, t, b->code, &patch);
        } else {
            patch = 0;
            vcpu_count(c->v, COUNT_CODE_INTERPRETED);
            enum vcpu_where was = vcpu_where(c->v, WHERE_INTERP);
            go_on = icpu_run_block(c, b);
            vcpu_where(c->v, was);
        }
    } while (go_on && !c->bt.single);
}

int bt_run_op(struct icpu *c, const struct op *op, struct block *b)
{
    c->block = b;
    c->r[REG_RIP] = c->bt.page | (b->gpa & ~PAGE_MASK);
    enum vcpu_where was = vcpu_where(c->v, WHERE_HANDLER);
    int r = op->fn(c, op);
    vcpu_where(c->v, was);
    if (r == OP_NEXT && likely(b->op[0].fn != b->op[b->n].fn)) {
        vcpu_count(c->v, COUNT_HANDLERS);
        return OP_NEXT;
    }
    c->bt.insns += (u64)(op - b->op);
    if (r == OP_NEXT) {                                            /* this block has been written to */
        vcpu_count(c->v, COUNT_EXIT_REWRITTEN);
        c->bt.insns++;
        c->rip = op_next_rip(c, op);
        return OP_FALL;
    }
    c->bt.insns += r == OP_NEAR;
    c->bt.op = op;
    return r;
}

void bt_forget(struct icpu *c, struct block *b)
{
    struct bt *t = c->bt.bt;
    struct emit e = { t->rw + ((u8 *)b->code - t->rx), NULL, false };
    e.end = e.p + 16;
    jump_to(&e, e.p - BT_STALE_BYTES);
    b->code = NULL;
}

/* ---- the engine ---- */
static void kick(struct vcpu *v)
{
    struct icpu *c = v->engine_data;
    if (c)
        atomic_store(&c->bt.stop, 1);
}

static enum run_exit run(struct vcpu *v)
{
    syscall(SYS_arch_prctl, ARCH_SET_GS, v->engine_data);
    return interp_engine.run(v);
}

static void vcpu_close(struct vcpu *v)
{
    struct icpu *c = v->engine_data;
    if (c && c->bt.bt) {
        bt_arena_close(c->bt.bt);
        if (c->bt.bt->jump)
            munmap(c->bt.bt->jump, JUMP_BYTES);
        free(c->bt.bt);
    }
    interp_engine.vcpu_close(v);
}

static int vcpu_open(struct vcpu *v)
{
    int e = interp_engine.vcpu_open(v);
    if (e < 0)
        return e;
    struct icpu *c = v->engine_data;
    struct bt *t = calloc(1, sizeof *t);
    c->bt.bt = t;
    c->bt.self = c;
    c->bt.count = v->m->tools.insns;
    bt_fp_open(c);
    if (t) {
        t->runs = v->m->tools.translate_at_once ? 1 : BT_RUNS;
        t->jump = mmap(NULL, JUMP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (t->jump == MAP_FAILED)
            t->jump = NULL;
    }
    e = t && t->jump ? bt_arena_open(c, t) : err(-ENOMEM, "vCPU %u: out of host memory", v->id);
    if (e < 0) {
        vcpu_close(v);
        return e;
    }
    c->bt.jump = t->jump;
    c->bt.run = bt_run;
    c->bt.forget = bt_forget;
    c->bt.flushed = flushed;
    c->bt.generation[0] = c->bt.generation[1] = 1;
    reset(c, t);
    return 0;
}

static int machine_open(struct machine *m)
{
    return interp_engine.machine_open(m);
}

static void machine_close(struct machine *m)
{
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

const struct engine bt_engine = {
    .name = "bt",
    .machine_open = machine_open,
    .machine_close = machine_close,
    .vcpu_open = vcpu_open,
    .vcpu_close = vcpu_close,
    .run = run,
    .debug_points = DEBUG_POINTS_MAX,
    .kick = kick,
    .get = get,
    .set = set,
};
