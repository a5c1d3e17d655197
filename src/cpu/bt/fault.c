/*
 * What a signal in translated code means.
 *
 * Faults: translated code faults where the guest's instruction does (a division, a vector instruction) or where an access has to be looked at (a page that the
 * shadow does not hold, a device). The shadow is filled on the spot; everything else goes back to the beginning of the guest's instruction, whose handler of
 * the interpreter's then runs (bt.c, BT_EXIT_OP) and raises what is to be raised.
 *
 * Kicks: an event for a vCPU in translated code arrives as a signal. At an instruction's beginning the state is the guest's, and the code is left. Elsewhere
 * the host's trap flag leads on, instruction by instruction, to the next such place, or out of translated code, where icpu.bt.stop is looked at.
 *
 * Runs in signal handlers, synchronous ones (translated code holds no lock and is in no library), but for kicks, which only look and set flags.
 */
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

/* The guest's state off the host's registers, at op's beginning, and the way out of translated code with a result. */
static void leave(struct icpu *c, struct bt *t, const struct tb *tb, unsigned op, struct bt_trap *s, int result)
{
    for (unsigned g = 0; g < 14; g++)
        c->r[g] = s->r[g];
    c->r[RSP] = s->r[RSP] + c->bt.nbias;
    c->fl = (u32)((s->flags & 0xd5) << 8) | ((s->flags >> 11) & 1);
    c->rip = tb->la + tb->b->op[op].off;                           /* the op behind the last one has the block's length here */
    c->bt.exit_site = (u32)(tb - t->tb) << 8 | op;
    s->r[RAX] = (u64)result;
    s->r[RSP] = c->bt.host_rsp;
    s->pc = (u64)(uintptr_t)(t->rx + t->leave_signal);
    s->flags &= ~(u64)(TRAP_FLAG | FLAG_DF);
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
    leave(c, t, tb, m->op, s, BT_EXIT_OP);
    c->bt.exit_memory = s->what == TRAP_MEMORY;
    t->slow_ops++;
    return true;
}

static bool kick(struct icpu *c, struct bt *t, struct bt_trap *s)
{
    const u8 *pc = (const u8 *)(uintptr_t)s->pc;
    atomic_store(&c->bt.stop, 1);
    if (pc < t->rx || pc >= t->rx + t->used) {
        s->flags &= ~(u64)TRAP_FLAG;                               /* C looks at stop before it comes back */
        return true;
    }
    struct tb *tb = tb_at(t, pc);
    if (tb) {
        const struct tb_mark *m = mark_at(t, tb, pc);
        if (!(m->flags & MARK_COLD) && pc == t->rx + (tb->start + m->off - t->rw)) {
            t->signals++;
            leave(c, t, tb, m->op, s, BT_EXIT_RIP);
            c->bt.insns += m->op;
            return true;
        }
        if (m->flags & MARK_POLLS) {
            s->flags &= ~(u64)TRAP_FLAG;
            return true;
        }
    }
    t->steps++;
    s->flags |= TRAP_FLAG;
    return true;
}

bool bt_trap(struct icpu *c, struct bt_trap *s)
{
    struct bt *t = c->bt.bt;
    if (s->what == TRAP_KICK || (s->what == TRAP_STEP && atomic_load(&c->bt.inside)))
        return kick(c, t, s);
    if (s->what == TRAP_STEP)
        return false;
    return fault(c, t, s);
}
