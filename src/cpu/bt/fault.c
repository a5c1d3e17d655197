/*
 * What a signal in translated code means.
 *
 * Faults: translated code faults where the guest's instruction does (a division, a vector instruction) or where an access has to be looked at (a page that the
 * shadow does not hold, a device). The shadow is filled on the spot; everything else goes back to the beginning of the guest's instruction, whose handler of
 * the interpreter's then runs (bt.c, BT_EXIT_OP) and raises what is to be raised.
 *
 * Events: a branch backwards faults while there are some, and the code is left at its beginning. Where none comes soon they arrive as a signal, a kick. At an instruction's beginning the state is the guest's, and the code is left; on the
 * way from one translation to another too, for there nothing but RIP is under way. Elsewhere breakpoints are put where the instruction ends: all else that it can
 * come to is C, which looks at icpu.bt.stop. Where that is not certain, the host's trap flag leads on, instruction by instruction, which
 * is slow in a virtual machine (13 us each, where a breakpoint takes 2).
 *
 * Runs in signal handlers, with all signals blocked but the sampler's: synchronous ones (translated code holds no lock and is in no library), but for kicks, which
 * look, set flags, and write to the vCPU's own translations only where those were interrupted.
 */
#include "cpu/bt/fpstate.h"
#include "cpu/bt/shadow.h"
#include "cpu/bt/signal.h"
#include "cpu/bt/tr.h"

#define TRAP_FLAG 0x100u

static const struct tb_mark *mark_at(const struct bt *t, const struct tb *tb, const u8 *pc)
{
    u32 off = (u32)(t->rw + (pc - t->rx) - tb->start), lo = 0, hi = tb->marks;
    const struct tb_mark *m = &t->mark[tb->mark];
    while (hi - lo > 1) {
        u32 mid = lo + (hi - lo) / 2;
        if (m[mid].off <= off)
            lo = mid;
        else
            hi = mid;
    }
    while (lo + 1 < tb->marks && m[lo + 1].off == m[lo].off)
        lo++;
    return &m[lo];
}

/* The guest's state off the host's registers, and the way out of translated code with a result. */
static void leave_to(struct icpu *c, struct bt *t, u64 rip, struct bt_trap *s, int result)
{
    for (unsigned g = 0; g < 14; g++)
        c->r[g] = s->r[g];
    c->r[RSP] = s->r[RSP] + c->bt.nbias;
    c->fl = (u32)((s->flags & 0xd5) << 8) | ((s->flags >> 11) & 1);
    c->rip = rip;
    s->r[RAX] = (u64)result;
    s->r[RSP] = c->bt.host_rsp;
    s->pc = (u64)(uintptr_t)(t->rx + t->leave_signal);
    s->flags &= ~(u64)(TRAP_FLAG | FLAG_DF);
}

/* At op's beginning. */
static void leave(struct icpu *c, struct bt *t, const struct tb *tb, unsigned op, struct bt_trap *s, int result)
{
    c->bt.exit_site = (u32)(tb - t->tb) << 8 | op;
    leave_to(c, t, tb->la + tb->b->op[op].off, s, result);         /* the op behind the last one has the block's length here */
}

/* ---- the shadow ---- */
static u64 guest_register(const struct icpu *c, const struct bt_trap *s, unsigned g)
{
    return g == RSP ? s->r[RSP] + c->bt.nbias : g < 14 ? s->r[g] : g < 16 ? c->r[g] : 0;
}

/* Linear address of op's explicit memory operand. */
static u64 operand(const struct icpu *c, const struct tb *tb, const struct op *op, const struct bt_trap *s)
{
    u64 base = op->base == REG_RIP ? tb->la : guest_register(c, s, op->base);
    u64 la = base + (guest_register(c, s, op->index) << op->scale) + (u64)op->disp;
    if (op->asize == 4)
        la = (u32)la;
    return op->seg >= SEG_FS ? la + c->x->seg[op->seg].base : la;
}

static bool closed(const struct icpu *c, unsigned view, u64 la)
{
    unsigned slot = la >> 39 & 511;
    return tlb_canonical(la) && c->bt.delta[view][slot] == shadow_closed(slot);
}

/*
 * The address that faulted. Where the slot is closed the host does not tell it: then it is the operand's, or what RSP or RBP point to. False: none
 * that the shadow could do something about.
 */
static bool faulting(const struct icpu *c, const struct tb *tb, unsigned view, const struct op *op, bool string, const struct bt_trap *s, u64 *la)
{
    if (s->has_address)
        return shadow_guest(c, view, s->address, la);
    if (op->flags & OPF_MEM) {
        *la = operand(c, tb, op, s);
        if (closed(c, view, *la))
            return true;
    }
    if (string) {
        *la = s->r[RDI];
        if (closed(c, view, *la))
            return true;
        *la = s->r[RSI];
        if (closed(c, view, *la))
            return true;
    }
    *la = guest_register(c, s, RSP);
    if (closed(c, view, *la))
        return true;
    *la = guest_register(c, s, RBP);
    return closed(c, view, *la);
}

static u64 kept_delta(const struct icpu *c, const struct tb *tb, const struct bt_trap *s, unsigned g)
{
    return c->bt.delta[tb->key & 3][guest_register(c, s, g) >> 39 & 511];
}

/* Has op's base stepped into another slot since S0 (S1) was made of it? Then the access went to its former window's guard; once that is another it does not again. */
static bool stepped_out(const struct icpu *c, const struct tb *tb, const struct tb_mark *m, const struct op *op, const struct bt_trap *s, u64 la)
{
    unsigned kept = m->flags >> MARK_KEPT, in = S0;
    if (tb->second && op->base == tb->second - 1u) {
        kept = tb->second;
        in = S1;
    }
    if (!kept || op->base != kept - 1 || !s->has_address)
        return false;
    u64 delta = kept_delta(c, tb, s, kept - 1);
    return s->r[in] != delta && s->address - la != delta && (guest_register(c, s, kept - 1) ^ la) >> 39 == 0;
}

/* True: go on at op's beginning. */
static bool filled(struct icpu *c, const struct tb *tb, const struct tb_mark *m, const struct op *op, bool string, struct bt_trap *s)
{
    enum mmu_access access = s->has_address && s->error & PF_W ? MMU_WRITE : MMU_READ;
    unsigned view = tb->key & 3;
    u64 la, changes = c->bt.delta_changes;
    u32 error;
    c->bt.exit_slow = false;
    if (!(tb->key & KEY_SHADOW) || !faulting(c, tb, view, op, string, s, &la))
        return false;
    if (unlikely(stepped_out(c, tb, m, op, s, la)))
        return true;
    enum shadow_result r = shadow_fill(c, view, la, access, &error);
    if (c->bt.delta_changes != changes) {                          /* windows have moved: RSP's perhaps */
        u64 rsp = s->r[RSP] + c->bt.nbias;
        c->bt.bias = c->bt.delta[view][rsp >> 39 & 511];
        c->bt.nbias = 0 - c->bt.bias;
        s->r[RSP] = rsp + c->bt.bias;
    }
    c->bt.exit_slow = r == SHADOW_SLOW;
    return r == SHADOW_FILLED;
}

static const u8 *host_of(const struct bt *t, const struct tb *tb, const struct tb_mark *m)
{
    return t->rx + (tb->start + m->off - t->rw);
}

/* A string instruction on host addresses has been stopped: what it has done is to be seen in the guest's. The mark of its beginning. */
static const struct tb_mark *string_stopped(struct bt_trap *s, const struct tb_mark *m)
{
    s->r[RDI] -= s->r[S0];
    s->r[RSI] -= s->r[S1];
    return m - 1;
}

u64 tb_rip(const struct bt *t, const struct tb *tb, const u8 *pc)
{
    unsigned op = mark_at(t, tb, pc)->op;
    return tb->la + tb->b->op[MIN(op, (unsigned)tb->n)].off;
}

static bool fault(struct icpu *c, struct bt *t, struct bt_trap *s)
{
    const u8 *pc = (const u8 *)(uintptr_t)s->pc;
    struct tb *tb = tb_at(t, pc);
    if (!tb)
        return false;
    const struct tb_mark *m = mark_at(t, tb, pc);
    if (m->flags & MARK_COLD || m->op >= tb->n)
        return false;
    if (s->what == TRAP_MEMORY && s->has_address && s->address == BT_POLL_CLOSED) {
        bt_unplant(t);
        bt_poll_open(c);                                           /* whoever has closed it need not send a signal any more; stop is still set */
        vcpu_count(c->v, COUNT_POLLED);
        leave(c, t, tb, m->op, s, BT_EXIT_RIP);
        c->bt.insns += m->op;
        return true;
    }
    bool string = m->flags & MARK_STRING;
    if (string)
        m = string_stopped(s, m);
    c->bt.exit_slow = false;
    c->bt.exit_gate = s->what == TRAP_MEMORY && s->has_address && s->address == FP_GATE_CLOSED;
    if (s->what == TRAP_MEMORY && !c->bt.exit_gate) {
        enum vcpu_where was = vcpu_where(c->v, WHERE_SHADOW);
        bool done = filled(c, tb, m, &tb->b->op[m->op], string, s);
        vcpu_where(c->v, was);
        if (done && unlikely(bt_key(c) != tb->key)) {              /* the shadow does not pay any more */
            leave(c, t, tb, m->op, s, BT_EXIT_RIP);
            c->bt.insns += m->op;
            return true;
        }
        if (done) {
            unsigned kept = m->flags >> MARK_KEPT;
            if (kept)
                s->r[S0] = kept_delta(c, tb, s, kept - 1);
            if (tb->second)
                s->r[S1] = kept_delta(c, tb, s, tb->second - 1u);
            s->pc = (u64)(uintptr_t)host_of(t, tb, m);
            return true;
        }
    }
    c->bt.exit_slow &= !string;                                    /* it may have been all of it but one page */
    leave(c, t, tb, m->op, s, BT_EXIT_OP);
    return true;
}

/* ---- kicks ---- */
void bt_unplant(struct bt *t)
{
    while (t->plants > 0) {
        t->plants--;
        *t->plant[t->plants].at = t->plant[t->plants].byte;
    }
}

static bool plant(struct bt *t, u8 *at)
{
    if (t->plants == BT_PLANTS)
        return false;
    t->plant[t->plants].at = at;
    t->plant[t->plants++].byte = *at;
    *at = 0xcc;                                                    /* int3 */
    return true;
}

static bool planted(const struct bt *t, const u8 *pc)
{
    for (unsigned i = 0; i < t->plants; i++)
        if (t->plant[i].at == t->rw + (pc - t->rx))
            return true;
    return false;
}

static bool kick_place(const struct tb_mark *m)
{
    return (m->flags & MARK_TARGET) == MARK_TARGET || !(m->flags & (MARK_COLD | MARK_SHADOW));
}

/* On a way in: nothing is under way. */
static void leave_way(struct icpu *c, struct bt *t, const struct tb *tb, const struct way_steps *w, u32 off, struct bt_trap *s)
{
    u64 rip = off < w->changed ? s->r[S1] : off < w->known ? s->r[S1] + tb->la + t->page[tb->page].secret : tb->la;
    if (off >= w->saved)
        s->r[RCX] = s->r[S0];
    leave_to(c, t, rip, s, BT_EXIT_MISS);
}

/* A direct way out begins at a jump: its link, or NULL. */
static const struct link *link_at(const struct bt *t, const struct tb *tb, const u8 *at)
{
    for (u32 i = tb->link; i < t->links && &t->tb[t->link[i].from] == tb; i++)
        if (!t->link[i].ret && t->link[i].place == at + 1 && *at == 0xe9)
            return &t->link[i];
    return NULL;
}

static bool in_run(const struct tb_mark *m)
{
    return (m->flags & MARK_RUN) == MARK_RUN;
}

/* From a look-up for a run of stack operations a jump may lead to where the first of them is done by itself. */
static bool plant_alone(struct bt *t, const struct tb *tb, const struct tb_mark *m, const struct tb_mark *end)
{
    if (m + 1 == end || !in_run(m + 1) || in_run(m))
        return true;
    for (const struct tb_mark *alone = m + 1; alone < end; alone++)
        if ((alone->op == m->op || alone->op == m->op + 1) && !in_run(alone) && kick_place(alone)) /* the first one may be behind STI */
            return plant(t, tb->start + alone->off);
    return true;
}

/*
 * Breakpoints wherever the guest's instruction ends at which the code is: the next one's beginning and direct ways out before that. All other ways lead
 * to C, which looks at stop. False: that is not certain.
 */
static bool plant_ahead(struct bt *t, const struct tb *tb, const struct tb_mark *m, const u8 *pc)
{
    const struct tb_mark *end = &t->mark[tb->mark] + tb->marks;
    u8 *from = t->rw + (pc - t->rx), *to = tb->start + tb->size;
    if (!plant_alone(t, tb, m, end))
        goto not;
    while (++m < end && (tb->start + m->off <= from || !kick_place(m)))
        ;
    if (m < end)
        to = tb->start + m->off;
    for (u32 i = tb->link; i < t->links && &t->tb[t->link[i].from] == tb; i++) {
        const struct link *l = &t->link[i];
        if (l->ret || l->place <= from || l->place > to)
            continue;
        if (l->place[-1] != 0xe9 || !plant(t, l->place - 1))       /* conditional ones are no place to leave */
            goto not;
    }
    for (unsigned op = m < end ? m->op : 0; m < end && m->op == op; m++) /* a branch may have more than one way out */
        if (kick_place(m) && !plant(t, tb->start + m->off))
            goto not;
    if (t->plants > 0)
        return true;
not:
    bt_unplant(t);
    return false;
}

/* In a translation. False: it cannot be left here, nor is it known where next. */
static bool kick_code(struct icpu *c, struct bt *t, const struct tb *tb, const u8 *pc, struct bt_trap *s)
{
    const struct tb_mark *m = mark_at(t, tb, pc);
    u32 off = (u32)(t->rw + (pc - t->rx) - tb->start);
    if (off < tb->code_off && tb->entry == tb->start) {
        leave_way(c, t, tb, &tb->steps, off, s);
        return true;
    }
    if ((m->flags & MARK_TARGET) == MARK_TARGET) {
        leave_to(c, t, s->r[S1], s, BT_EXIT_MISS);
        return true;
    }
    if (pc == host_of(t, tb, m) && kick_place(m)) {
        if (m->flags & MARK_STRING)
            m = string_stopped(s, m);
        leave(c, t, tb, m->op, s, BT_EXIT_RIP);
        c->bt.insns += m->op;
        return true;
    }
    const struct link *l = link_at(t, tb, t->rw + (pc - t->rx));
    if (l) {
        leave_to(c, t, l->target, s, BT_EXIT_RIP);
        return true;
    }
    s->flags &= ~(u64)TRAP_FLAG;
    return plant_ahead(t, tb, m, pc);
}

/* In code that rarely runs: where it is a way in, that is left. */
static bool kick_cold(struct icpu *c, struct bt *t, const u8 *pc, struct bt_trap *s)
{
    u32 at = (u32)(pc - t->rx), lo = 0, hi = t->ways;
    while (hi - lo > 1) {
        u32 mid = lo + (hi - lo) / 2;
        if (t->way[mid].at <= at)
            lo = mid;
        else
            hi = mid;
    }
    const struct way *w = &t->way[lo];
    if (lo == t->ways || at < w->at || at - w->at >= w->len + 5u)  /* a jump stands behind it */
        return false;
    leave_way(c, t, &t->tb[w->tb], &w->steps, at - w->at, s);
    return true;
}

/* In a common routine. They lead to C, but where they come from there: all is still in icpu then. */
static bool kick_routine(struct icpu *c, struct bt *t, const u8 *pc, struct bt_trap *s)
{
    u32 at = (u32)(pc - t->rx);
    if (at >= t->lookup[0] && at < t->leave_link)
        return false;
    s->flags &= ~(u64)TRAP_FLAG;
    for (unsigned i = 0; i < ARRAY_SIZE(t->restart); i++)
        if (at >= t->restart[i].from && at < t->restart[i].to) {
            s->r[RAX] = BT_EXIT_STOP;
            s->r[RSP] = c->bt.host_rsp;
            s->pc = (u64)(uintptr_t)(t->rx + t->leave_signal);
            s->flags &= ~(u64)FLAG_DF;
        }
    return true;
}

static bool in_arena(const struct bt *t, u64 pc)
{
    return pc - (u64)(uintptr_t)t->rx < BT_ARENA_BYTES;
}

static bool kick(struct icpu *c, struct bt *t, struct bt_trap *s)
{
    const u8 *pc = (const u8 *)(uintptr_t)s->pc;
    const struct tb *tb;
    bt_unplant(t);
    if (!atomic_load(&c->bt.stop)) {                               /* answered already: bt_run() has looked at the events since they were raised */
        s->flags &= ~(u64)TRAP_FLAG;
        return true;
    }
    if (!t->again) {
        t->again = true;
        bt_signal_again(true);
    }
    if (!in_arena(t, s->pc)) {
        s->flags &= ~(u64)TRAP_FLAG;                               /* C looks at stop before it comes back */
        return true;
    }
    if (!(pc < t->rx + t->first ? kick_routine(c, t, pc, s) : (tb = tb_at(t, pc)) ? kick_code(c, t, tb, pc, s) : kick_cold(c, t, pc, s))) {
        vcpu_count(c->v, COUNT_KICK_STEPS);
        s->flags |= TRAP_FLAG;
    }
    return true;
}

static bool trap(struct icpu *c, struct bt *t, struct bt_trap *s)
{
    const u8 *before = (const u8 *)(uintptr_t)(s->pc - 1);
    if (s->what == TRAP_KICK)
        vcpu_count(c->v, COUNT_KICKS);
    if (s->what == TRAP_AGAIN) {
        t->again = false;
        if (atomic_load(&c->bt.stop) && in_arena(t, s->pc))         /* C code may take that long */
            vcpu_count(c->v, COUNT_KICKS_AGAIN);
    }
    if (s->what == TRAP_STEP && planted(t, before))
        s->pc = (u64)(uintptr_t)before;
    if (s->what == TRAP_KICK || s->what == TRAP_AGAIN || (s->what == TRAP_STEP && atomic_load(&c->bt.inside)))
        return kick(c, t, s);
    if (s->what == TRAP_STEP || !fault(c, t, s))
        return false;
    /* Meanwhile this thread may have raised an event for itself, which sends no signal. */
    return atomic_load(&c->bt.stop) ? kick(c, t, s) : true;
}

bool bt_trap(struct icpu *c, struct bt_trap *s)
{
    struct icpu *live = bt_fp_signal();                            /* the interrupted code's registers are not this handler's */
    bool ours = trap(c, c->bt.bt, s);
    bt_fp_signal_end(live);
    return ours;
}
