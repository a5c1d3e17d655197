/*
 * Stacks that are not the current one yet: where calls through gates, events and returns write and read their frames,
 * and where the TSS says that inner stacks are (SDM vol. 3A 5.8.5, 7.2.1, 7.7).
 */
#include "cpu/interp/sys.h"

static u64 width_mask(const struct x86_seg *ss)
{
    return ss->attr & SEG_DB ? 0xffffffff : 0xffff;
}

void stack_current(const struct icpu *c, struct stack *s)
{
    *s = (struct stack){.ss = c->x->seg[SEG_SS], .rsp = c->r[RSP], .flat = in_64bit(c)};
    s->mask = s->flat ? ~0ull : width_mask(&s->ss);
}

void stack_init(const struct icpu *c, struct stack *s, const struct x86_seg *ss, u64 rsp, unsigned cpl, bool wide,
                u32 error)
{
    *s = (struct stack){.ss = *ss, .rsp = rsp, .flat = wide, .error = error};
    s->mask = wide ? ~0ull : width_mask(ss);
    s->super = cpl < 3 && c->cpl == 3;     /* else the current privilege has the same rights */
}

/* The linear address of size bytes at offset off of the stack, or OP_FAULT. */
static int stack_linear(struct icpu *c, const struct stack *s, u64 off, unsigned size, u64 *la)
{
    bool ok = s->flat ? is_canonical(off) && is_canonical(off + size - 1) : seg_in_limit(&s->ss, (u32)off, size);
    if (!ok)
        return fault_raise_error(c, VEC_SS, s->error);
    *la = s->flat ? off : (u32)(s->ss.base + off);
    return 0;
}

int stack_room(struct icpu *c, const struct stack *s, unsigned n)
{
    u64 la, sp = s->rsp & s->mask;
    if (sp < n)
        return 0;                          /* wraps: each push is checked by itself */
    return stack_linear(c, s, sp - n, n, &la);
}

void stack_skip(struct stack *s, s64 delta)
{
    u64 sp = (s->rsp + (u64)delta) & s->mask;
    s->rsp = s->mask == 0xffff ? (s->rsp & ~s->mask) | sp : sp;
}

int stack_put(struct icpu *c, struct stack *s, unsigned size, u64 val)
{
    u64 la;
    if (stack_linear(c, s, (s->rsp - size) & s->mask, size, &la))
        return OP_FAULT;
    if (s->super ? sys_store(c, la, size, val) : lin_store(c, la, size, val))
        return OP_FAULT;
    stack_skip(s, -(s64)size);
    return 0;
}

int stack_get(struct icpu *c, struct stack *s, unsigned size, u64 *val)
{
    u64 la;
    if (stack_linear(c, s, s->rsp & s->mask, size, &la))
        return OP_FAULT;
    if (s->super ? sys_load(c, la, size, val) : lin_load(c, la, size, val))
        return OP_FAULT;
    stack_skip(s, size);
    return 0;
}

void stack_commit(struct icpu *c, const struct stack *s)
{
    c->r[RSP] = s->rsp;
}

/* ---- stacks named by the TSS ---- */

static int tss_load(struct icpu *c, u32 off, unsigned size, u64 *val)
{
    u64 la = c->x->tr.base + off;
    return sys_load(c, in_long_mode(c) ? la : (u32)la, size, val);
}

int tss_stack(struct icpu *c, unsigned cpl, u32 ext, u16 *ss, u64 *rsp)
{
    const struct x86_seg *tr = &c->x->tr;
    bool wide = SEG_TYPE(tr->attr) & 8;    /* a 32-bit TSS */
    unsigned size = wide ? 4 : 2, off = wide ? cpl * 8 + 4 : cpl * 4 + 2;
    u64 sel;
    if (!range_in(off, size + 2, (u64)tr->limit + 1))
        return segment_fault(c, VEC_TS, tr->sel, ext);
    if (tss_load(c, off, size, rsp) || tss_load(c, off + size, 2, &sel))
        return OP_FAULT;
    *ss = (u16)sel;
    return 0;
}

int tss_stack64(struct icpu *c, unsigned cpl, unsigned ist, u32 ext, u64 *rsp)
{
    const struct x86_seg *tr = &c->x->tr;
    unsigned off = ist ? ist * 8 + 28 : cpl * 8 + 4;
    if (!range_in(off, 8, (u64)tr->limit + 1))
        return segment_fault(c, VEC_TS, tr->sel, ext);
    return tss_load(c, off, 8, rsp);
}
