/*
 * Hardware task switches, 32- and 16-bit TSS (SDM vol. 3A 7.2 to 7.4). Long mode has none.
 *
 * Up to the commit point a fault belongs to the old task and changes nothing; afterwards it is the new task's first
 * exception, with whatever segments were loaded by then: OP_TRAP. All reads of the new TSS and all writes of
 * descriptors are made before CR3 changes.
 */
#include "cpu/interp/sys.h"
#include "cpu/interp/tlb.h"

#define TSS_LINK 0
#define DR6_BT 0x8000u
#define DR7_LOCAL 0x155u                   /* L0..L3, LE */
#define FLAGS_VALID 0x3f7fd7u

/* Both layouts, SDM vol. 3A figures 7-2 and 7-10. */
struct layout {
    u8 size;                               /* of a register */
    u8 min_limit;
    u8 cr3, ip, flags, gpr, seg, ldt, trap;   /* 0: the layout has none */
    u8 segs;
};
static const struct layout tss32 = {4, 0x67, 0x1c, 0x20, 0x24, 0x28, 0x48, 0x60, 0x64, 6};
static const struct layout tss16 = {2, 0x2b, 0, 0x0e, 0x10, 0x12, 0x22, 0x2a, 0, 4};
static const u8 seg_order[SEGS] = {SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS};

struct task {
    struct desc d;
    const struct layout *l;
    u64 base;
    u64 gpr[8], ip, flags, cr3;
    u16 seg[SEGS], ldt;
    bool trap;
};

static const struct layout *layout_of(unsigned type)
{
    return type & 8 ? &tss32 : &tss16;
}

static int tss_get(struct icpu *c, const struct task *t, unsigned off, unsigned size, u64 *val)
{
    return sys_load(c, (u32)(t->base + off), size, val);
}

/* Reads all of the new task. */
static int task_read(struct icpu *c, struct task *t)
{
    const struct layout *l = t->l;
    u64 v = 0;
    if (l->cr3 && tss_get(c, t, l->cr3, 4, &t->cr3))
        return OP_FAULT;
    if (tss_get(c, t, l->ip, l->size, &t->ip) || tss_get(c, t, l->flags, l->size, &t->flags))
        return OP_FAULT;
    for (unsigned i = 0; i < 8; i++)
        if (tss_get(c, t, l->gpr + i * l->size, l->size, &t->gpr[i]))
            return OP_FAULT;
    for (unsigned i = 0; i < l->segs; i++) {
        if (tss_get(c, t, l->seg + i * l->size, 2, &v))
            return OP_FAULT;
        t->seg[seg_order[i]] = (u16)v;
    }
    if (tss_get(c, t, l->ldt, 2, &v))
        return OP_FAULT;
    t->ldt = (u16)v;
    if (l->trap) {
        if (tss_get(c, t, l->trap, 2, &v))
            return OP_FAULT;
        t->trap = v & 1;
    }
    return 0;
}

/* Writes the dynamic part of the old task: probed before, so that it does not fail half-way. */
static int task_save(struct icpu *c, u64 flags)
{
    const struct x86_seg *tr = &c->x->tr;
    const struct layout *l = layout_of(SEG_TYPE(tr->attr));
    const struct task t = {.base = tr->base};
    u32 first = (u32)(t.base + l->ip);
    if (tr->limit < l->min_limit)
        return segment_fault(c, VEC_TS, tr->sel, 0);
    if (sys_probe(c, first, l->ldt - l->ip, MMU_WRITE))
        return OP_FAULT;
    if (sys_store(c, first, l->size, c->rip) || sys_store(c, (u32)(t.base + l->flags), l->size, flags))
        return OP_FAULT;
    for (unsigned i = 0; i < 8; i++)
        if (sys_store(c, (u32)(t.base + l->gpr + i * l->size), l->size, c->r[i]))
            return OP_FAULT;
    for (unsigned i = 0; i < l->segs; i++)
        if (sys_store(c, (u32)(t.base + l->seg + i * l->size), 2, c->x->seg[seg_order[i]].sel))
            return OP_FAULT;
    return 0;
}

static int set_busy(struct icpu *c, u16 sel, bool busy)
{
    struct desc d;
    if (desc_read(c, sel, VEC_TS, 0, &d))
        return OP_FAULT;
    return desc_set_type(c, &d, busy ? desc_type(&d) | 2u : desc_type(&d) & ~2u);
}

/* The new TSS: available, or busy for a return. */
static int task_find(struct icpu *c, u16 sel, int source, u32 ext, struct task *t)
{
    unsigned vector = source == TASK_IRET ? VEC_TS : VEC_GP;
    if (sel & 4)
        return segment_fault(c, vector, sel, ext);
    if (desc_read(c, sel, vector, ext, &t->d))
        return OP_FAULT;
    unsigned type = desc_type(&t->d), want = source == TASK_IRET ? DESC_TSS16_BUSY : DESC_TSS16;
    if (desc_s(&t->d) || (type & ~8u) != want)
        return segment_fault(c, vector, sel, ext);
    if (!desc_p(&t->d))
        return segment_fault(c, VEC_NP, sel, ext);
    t->l = layout_of(type);
    t->base = (u32)desc_base(&t->d);
    if (desc_limit(&t->d) < t->l->min_limit)
        return segment_fault(c, VEC_TS, sel, ext);
    return 0;
}

/* ---- the new task's segments ---- */

static int load_ldt(struct icpu *c, u16 sel, u32 ext)
{
    struct desc d;
    seg_set_null(&c->x->ldtr, sel);
    if (sel_null(sel))
        return 0;
    if (sel & 4)
        return segment_fault(c, VEC_TS, sel, ext);
    if (desc_read(c, sel, VEC_TS, ext, &d))
        return OP_FAULT;
    if (desc_s(&d) || desc_type(&d) != DESC_LDT || !desc_p(&d))
        return segment_fault(c, VEC_TS, sel, ext);
    desc_to_seg(&d, sel, &c->x->ldtr);
    return 0;
}

static int load_code(struct icpu *c, u16 sel, u32 ext)
{
    struct desc d;
    unsigned rpl = sel & 3;
    if (sel_null(sel))
        return segment_fault(c, VEC_TS, sel, ext);
    if (desc_read(c, sel, VEC_TS, ext, &d))
        return OP_FAULT;
    bool match = desc_is_conforming(&d) ? desc_dpl(&d) <= rpl : desc_dpl(&d) == rpl;
    if (!desc_is_code(&d) || !match)
        return segment_fault(c, VEC_TS, sel, ext);
    if (!desc_p(&d))
        return segment_fault(c, VEC_NP, sel, ext);
    if (desc_set_accessed(c, &d))
        return OP_FAULT;
    desc_to_seg(&d, sel, &c->x->seg[SEG_CS]);
    return 0;
}

static int load_segments(struct icpu *c, const struct task *t, u32 ext)
{
    static const u8 data[] = {SEG_DS, SEG_ES, SEG_FS, SEG_GS};
    if (load_ldt(c, t->ldt, ext))
        return OP_FAULT;
    if (c->flags & FLAG_VM) {
        for (unsigned i = 0; i < SEGS; i++)
            seg_load_real(c, i, t->seg[i]);
        icpu_mode(c);
        return 0;
    }
    if (load_code(c, t->seg[SEG_CS], ext) ||
        stack_seg_read(c, t->seg[SEG_SS], t->seg[SEG_CS] & 3, VEC_TS, ext, &c->x->seg[SEG_SS]))
        return OP_FAULT;
    icpu_mode(c);
    for (unsigned i = 0; i < ARRAY_SIZE(data); i++)
        if (data_seg_load(c, data[i], t->seg[data[i]], VEC_TS, ext))
            return OP_FAULT;
    return 0;
}

/* The selectors are there at once, their descriptors not yet: what a fault now would save. */
static void enter_selectors(struct icpu *c, const struct task *t)
{
    for (unsigned i = 0; i < SEGS; i++)
        seg_set_null(&c->x->seg[i], t->seg[i]);
    c->x->seg[SEG_SS].attr = (u16)((t->seg[SEG_CS] & 3) << 5);
    if (c->flags & FLAG_VM)
        for (unsigned i = 0; i < SEGS; i++)
            seg_load_real(c, i, t->seg[i]);
    icpu_mode(c);
}

/* ---- the switch ---- */

static int push_error(struct icpu *c, const struct task *t, u32 error, u32 ext)
{
    struct stack s;
    stack_current(c, &s);
    s.error = ext;
    if (stack_put(c, &s, t->l->size, error))
        return OP_FAULT;
    stack_commit(c, &s);
    return 0;
}

static int enter_task(struct icpu *c, const struct task *t, bool has_error, u32 error, u32 ext)
{
    if (load_segments(c, t, ext))
        return OP_TRAP;
    if (has_error && push_error(c, t, error, ext))
        return OP_TRAP;
    if (c->rip > c->x->seg[SEG_CS].limit) {
        fault_gp(c, ext);
        return OP_TRAP;
    }
    if (t->trap) {
        debug_raise(c, DR6_BT);
        return OP_TRAP;
    }
    return OP_JUMP;
}

/* CR3 of the new task. A value that cannot be loaded is found before the switch. */
static int check_cr3(struct icpu *c, const struct task *t, u64 pdpte[4])
{
    bool pae = c->x->cr0 & CR0_PG && c->x->cr4 & CR4_PAE;
    if (t->l->cr3 && pae && !mmu_load_pdptes(c->v->m->ram, t->cr3, (u8)cpuid_phys_bits(c->v->m->cpuid), pdpte))
        return fault_gp(c, 0);
    return 0;
}

static void switch_cr3(struct icpu *c, const struct task *t, const u64 pdpte[4])
{
    if (!t->l->cr3 || !(c->x->cr0 & CR0_PG) || t->cr3 == c->x->cr3)
        return;
    trace(c->v->m->trace, TRACE_CR3, (int)c->v->id, "cr3 0x%llx -> 0x%llx by a task switch",
          (unsigned long long)c->x->cr3, (unsigned long long)t->cr3);
    c->x->cr3 = t->cr3;
    if (c->x->cr4 & CR4_PAE)
        for (unsigned i = 0; i < 4; i++)
            c->x->pdpte[i] = pdpte[i];
    tlb_flush_nonglobal(c);
}

static void load_registers(struct icpu *c, const struct task *t, u64 flags)
{
    for (unsigned i = 0; i < 8; i++)
        c->r[i] = t->gpr[i];
    c->rip = t->ip;
    flags_write(c, flags & FLAGS_VALID, FLAGS_VALID);
    icpu_claim(c);
    c->x->cr0 |= CR0_TS;
    c->x->dr7 &= ~(u64)DR7_LOCAL;
    tlb_watchpoints(c);
}

int task_switch(struct icpu *c, u16 tss_sel, int source, bool has_error, u32 error, u32 ext)
{
    struct task t = {0};
    u64 pdpte[4] = {0}, saved = icpu_rflags(c);
    bool nested = source == TASK_CALL || source == TASK_GATE;
    u16 old = c->x->tr.sel;
    if (task_find(c, tss_sel, source, ext, &t) || task_read(c, &t) || check_cr3(c, &t, pdpte))
        return OP_FAULT;
    if (nested && sys_probe(c, (u32)t.base + TSS_LINK, 2, MMU_WRITE))
        return OP_FAULT;
    if (source == TASK_IRET)
        saved &= ~(u64)FLAG_NT;
    if (task_save(c, saved) || (!nested && set_busy(c, old, false)))
        return OP_FAULT;
    if (nested && sys_store(c, (u32)t.base + TSS_LINK, 2, old))
        return OP_FAULT;
    if (source != TASK_IRET && desc_set_type(c, &t.d, desc_type(&t.d) | 2))
        return OP_FAULT;

    /* From here on it is the new task. */
    desc_to_seg(&t.d, tss_sel, &c->x->tr);
    c->x->tr.attr |= 2;
    c->x->shadow = false;
    switch_cr3(c, &t, pdpte);
    load_registers(c, &t, t.flags | (nested ? FLAG_NT : 0));
    enter_selectors(c, &t);
    return enter_task(c, &t, has_error, error, ext);
}
