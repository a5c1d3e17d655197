/*
 * Delivery of exceptions, interrupts and software interrupts in all modes (SDM vol. 2 INT n; vol. 3A chapter 6, 21.3).
 *
 * The order of checks is that of the manual's pseudo-code. A fault met on the way is combined with the event being
 * delivered (trap_combine): it is delivered instead, becomes a double fault, or shuts the processor down. c->rip is the
 * address to save; handlers of instructions that are traps have moved it to the next one.
 */
#include "cpu/interp/sys.h"

#define DR7_GD 0x2000u
#define DEBUGCTL_BTF 2u
#define MAX_CHAIN 64 /* tasks that fault when they are entered, by task gates; hardware would go on for ever */
#define EVENT_FLAGS_CLEARED (FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM)

struct event {
    u8 vector;
    bool software;         /* INT n, INT3, INTO: the gate's DPL counts, and errors have EXT = 0 */
    bool has_error;
    u32 error;
    u64 flags;             /* the image to save */
};

static u32 ext_of(const struct event *e)
{
    return e->software ? 0 : 1;
}

static int gate_fault(struct icpu *c, unsigned vector, const struct event *e)
{
    return fault_raise_error(c, vector, e->vector * 8u | 2 | ext_of(e));
}

/* ---- real mode, and software interrupts that virtual-8086 mode handles like it ---- */

static int deliver_ivt(struct icpu *c, const struct event *e)
{
    struct stack s;
    u64 entry;
    const struct x86_table *ivt = &c->x->idtr;
    if (!range_in(e->vector * 4u, 4, (u64)ivt->limit + 1))
        return gate_fault(c, VEC_GP, e);
    if (sys_load(c, (u32)(ivt->base + e->vector * 4u), 4, &entry))
        return OP_FAULT;
    stack_current(c, &s);
    if (stack_room(c, &s, 6) || stack_put(c, &s, 2, (u16)e->flags) || stack_put(c, &s, 2, c->x->seg[SEG_CS].sel) ||
        stack_put(c, &s, 2, (u16)c->rip))
        return OP_FAULT;
    stack_commit(c, &s);
    seg_load_real(c, SEG_CS, (u16)(entry >> 16));
    c->rip = (u16)entry;
    flags_write(c, 0, FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF);
    icpu_mode(c);
    return OP_JUMP;
}

/* ---- frames ---- */

struct frame {
    unsigned size;         /* of its entries: 2, 4, 8 */
    struct stack s;
    struct desc code;
    struct x86_seg cs;
    u64 rip;
    bool new_ss;
    bool from_v86;
};

static int push_segments_of_v86(struct icpu *c, struct frame *f)
{
    static const u8 order[] = {SEG_GS, SEG_FS, SEG_DS, SEG_ES};
    for (unsigned i = 0; i < ARRAY_SIZE(order); i++)
        if (stack_put(c, &f->s, f->size, c->x->seg[order[i]].sel))
            return OP_FAULT;
    return 0;
}

static int push_frame(struct icpu *c, const struct event *e, struct frame *f)
{
    if (f->from_v86 && push_segments_of_v86(c, f))
        return OP_FAULT;
    if ((f->new_ss || f->size == 8) &&
        (stack_put(c, &f->s, f->size, c->x->seg[SEG_SS].sel) || stack_put(c, &f->s, f->size, c->r[RSP])))
        return OP_FAULT;
    if (stack_put(c, &f->s, f->size, e->flags) || stack_put(c, &f->s, f->size, c->x->seg[SEG_CS].sel) ||
        stack_put(c, &f->s, f->size, c->rip))
        return OP_FAULT;
    return e->has_error ? stack_put(c, &f->s, f->size, e->error) : 0;
}

static unsigned frame_bytes(const struct event *e, const struct frame *f)
{
    unsigned n = 3 + (f->new_ss || f->size == 8 ? 2 : 0) + (f->from_v86 ? 4 : 0) + (e->has_error ? 1 : 0);
    return n * f->size;
}

static void drop_segments_of_v86(struct icpu *c)
{
    seg_set_null(&c->x->seg[SEG_ES], 0);
    seg_set_null(&c->x->seg[SEG_DS], 0);
    seg_set_null(&c->x->seg[SEG_FS], 0);
    seg_set_null(&c->x->seg[SEG_GS], 0);
}

static int enter_handler(struct icpu *c, const struct event *e, struct frame *f, bool interrupt_gate)
{
    if (stack_room(c, &f->s, frame_bytes(e, f)))
        return OP_FAULT;
    if (!code_rip_ok(c, &f->cs, f->rip))
        return fault_gp(c, ext_of(e));
    if (push_frame(c, e, f) || desc_set_accessed(c, &f->code))
        return OP_FAULT;
    c->x->seg[SEG_CS] = f->cs;
    c->x->seg[SEG_CS].attr |= TYPE_ACCESSED;
    if (f->new_ss)
        c->x->seg[SEG_SS] = f->s.ss;
    if (f->from_v86)
        drop_segments_of_v86(c);
    stack_commit(c, &f->s);
    c->rip = f->rip;
    flags_write(c, 0, EVENT_FLAGS_CLEARED | (interrupt_gate ? FLAG_IF : 0));
    icpu_mode(c);
    return OP_JUMP;
}

/* ---- through an interrupt or trap gate ---- */

/* The stack of a legacy-mode frame. */
static int frame_stack(struct icpu *c, const struct event *e, unsigned cpl, struct frame *f)
{
    struct x86_seg ss;
    u64 rsp;
    u16 sel;
    f->new_ss = cpl < c->cpl;
    if (!f->new_ss) {
        stack_current(c, &f->s);
        f->s.error = ext_of(e);
        return 0;
    }
    if (tss_stack(c, cpl, ext_of(e), &sel, &rsp) || stack_seg_read(c, sel, cpl, VEC_TS, ext_of(e), &ss))
        return OP_FAULT;
    stack_init(c, &f->s, &ss, rsp, cpl, false, (sel & ~3u) | ext_of(e));
    return 0;
}

/* In long mode the frame is aligned to 16 bytes, and the gate may name one of seven stacks for itself. */
static int frame_stack64(struct icpu *c, const struct event *e, unsigned cpl, unsigned ist, struct frame *f)
{
    struct x86_seg ss = c->x->seg[SEG_SS];
    u64 rsp = c->r[RSP];
    f->new_ss = cpl < c->cpl;
    if (f->new_ss)
        seg_null_ss(&ss, cpl);
    if ((f->new_ss || ist) && tss_stack64(c, cpl, ist, ext_of(e), &rsp))
        return OP_FAULT;
    if (!is_canonical(rsp))
        return fault_raise_error(c, VEC_SS, ext_of(e));
    stack_init(c, &f->s, &ss, rsp & ~15ull, cpl, true, ext_of(e));
    return 0;
}

static int read_handler_code(struct icpu *c, const struct event *e, u16 sel, struct frame *f)
{
    u32 ext = ext_of(e);
    if (sel_null(sel))
        return fault_gp(c, ext);
    if (desc_read(c, sel, VEC_GP, ext, &f->code))
        return OP_FAULT;
    bool long_code = (desc_attr(&f->code) & (SEG_L | SEG_DB)) == SEG_L;
    if (!desc_is_code(&f->code) || desc_dpl(&f->code) > c->cpl || (in_long_mode(c) && !long_code))
        return segment_fault(c, VEC_GP, sel, ext);
    return desc_p(&f->code) ? 0 : segment_fault(c, VEC_NP, sel, ext);
}

static int deliver_gate(struct icpu *c, const struct event *e, const struct desc *gate)
{
    struct frame f = {.from_v86 = in_v86(c)};
    u16 sel = gate_sel(gate);
    unsigned type = desc_type(gate);
    bool lma = in_long_mode(c), interrupt_gate = type == DESC_INT || type == DESC_INT16;
    f.size = lma ? 8 : type & 8 ? 4 : 2;
    f.rip = gate_offset(gate);
    if (f.size < 8)
        f.rip &= f.size == 4 ? 0xffffffff : 0xffff;
    if (read_handler_code(c, e, sel, &f))
        return OP_FAULT;
    unsigned cpl = desc_is_conforming(&f.code) ? c->cpl : desc_dpl(&f.code);
    if (f.from_v86 && cpl != 0)            /* virtual-8086 mode is left for ring 0 only */
        return segment_fault(c, VEC_GP, sel, ext_of(e));
    if (lma ? frame_stack64(c, e, cpl, gate->lo >> 32 & 7, &f) : frame_stack(c, e, cpl, &f))
        return OP_FAULT;
    desc_to_seg(&f.code, (u16)((sel & ~3) | cpl), &f.cs);
    return enter_handler(c, e, &f, interrupt_gate);
}

/* An event whose gate is a task gate. The error code goes onto the new task's stack. */
static int deliver_task(struct icpu *c, const struct event *e, const struct desc *gate)
{
    icpu_set_rflags(c, e->flags);          /* the old task's TSS gets the image, RF included */
    return task_gate(c, gate_sel(gate), TASK_GATE, e->has_error, e->error, ext_of(e));
}

static bool gate_type_ok(const struct icpu *c, const struct desc *gate)
{
    if (desc_s(gate))
        return false;
    switch (desc_type(gate)) {
    case DESC_INT: case DESC_TRAP:
        return true;
    case DESC_INT16: case DESC_TRAP16: case DESC_TASK:
        return !in_long_mode(c);
    default:
        return false;
    }
}

static int deliver_idt(struct icpu *c, const struct event *e)
{
    struct desc gate = {0};
    unsigned size = in_long_mode(c) ? 16 : 8;
    if (!range_in(e->vector * size, size, (u64)c->x->idtr.limit + 1))
        return gate_fault(c, VEC_GP, e);
    gate.la = c->x->idtr.base + e->vector * size;
    if (size == 8)
        gate.la = (u32)gate.la;
    if (sys_load(c, gate.la, 8, &gate.lo) || (size == 16 && sys_load(c, gate.la + 8, 8, &gate.hi)))
        return OP_FAULT;
    if (!gate_type_ok(c, &gate) || (e->software && desc_dpl(&gate) < c->cpl))
        return gate_fault(c, VEC_GP, e);
    if (!desc_p(&gate))
        return gate_fault(c, VEC_NP, e);
    return desc_type(&gate) == DESC_TASK ? deliver_task(c, e, &gate) : deliver_gate(c, e, &gate);
}

static int deliver_event(struct icpu *c, const struct event *e)
{
    c->x->shadow = false;
    if (e->vector == VEC_DB && !e->software) {
        c->x->dr7 &= ~(u64)DR7_GD;         /* the handler may use the debug registers */
        c->x->debugctl &= ~(u64)DEBUGCTL_BTF;
    }
    enum vcpu_where was = vcpu_where(c->v, WHERE_DELIVER);
    int r = in_real(c) ? deliver_ivt(c, e) : deliver_idt(c, e);
    vcpu_where(c->v, was);
    return r;
}

/* ---- what happens, and what comes of faults on the way ---- */

static enum vcpu_counted counted(const struct fault *f)
{
    return f->software ? COUNT_TRAP_SOFTWARE : f->vector == VEC_PF ? COUNT_TRAP_PF : f->vector == VEC_NM ? COUNT_TRAP_NM : COUNT_TRAP_OTHER;
}

static void note_event(struct icpu *c, const struct fault *f)
{
    struct vcpu *v = c->v;
    vcpu_count(v, counted(f));
    unsigned long long rip = c->rip;
    if (!trace_on(v->m->trace, TRACE_FAULTS))
        return;
    if (f->vector == VEC_PF)
        trace(v->m->trace, TRACE_FAULTS, (int)v->id, "#PF error 0x%x at 0x%llx, cs:rip %04x:0x%llx cpl %u", f->error,
              (unsigned long long)f->cr2, c->x->seg[SEG_CS].sel, rip, c->cpl);
    else if (f->has_error)
        trace(v->m->trace, TRACE_FAULTS, (int)v->id, "%s error 0x%x, cs:rip %04x:0x%llx cpl %u", trap_name(f->vector),
              f->error, c->x->seg[SEG_CS].sel, rip, c->cpl);
    else
        trace(v->m->trace, TRACE_FAULTS, (int)v->id, "%s, cs:rip %04x:0x%llx cpl %u", trap_name(f->vector),
              c->x->seg[SEG_CS].sel, rip, c->cpl);
}

/* SDM vol. 3A 18.3.1.1: fault-class exceptions save RF set. #DB sets it in c->flags itself where it must (debug.c). */
static bool saves_rf(unsigned vector)
{
    return vector != VEC_DB && vector != VEC_BP && vector != VEC_OF && vector != VEC_DF && vector != VEC_MC &&
           vector != VEC_NMI;
}

/*
 * c->fault has been raised by an instruction, or while an event was delivered whose vector is `first` (benign ones:
 * VEC_NMI). What is to be delivered next goes to c->fault; false: nothing, the processor shuts down.
 */
static bool combine(struct icpu *c, unsigned first)
{
    if (c->fault.vector == VEC_PF)
        c->x->cr2 = c->fault.cr2;
    switch (trap_combine(first, c->fault.vector)) {
    case TRAP_SERIAL:
        return true;
    case TRAP_DOUBLE:
        note_event(c, &c->fault);
        c->fault = (struct fault){.vector = VEC_DF, .has_error = true};
        return true;
    case TRAP_TRIPLE:
        break;
    }
    trace(c->v->m->trace, TRACE_FAULTS, (int)c->v->id, "triple fault: %s while %s was delivered",
          trap_name(c->fault.vector), trap_name(first));
    return false;
}

int deliver_fault(struct icpu *c)
{
    for (unsigned chain = 0; chain < MAX_CHAIN; chain++) {
        struct fault f = c->fault;
        u64 flags = icpu_rflags(c);
        struct event e = {.vector = f.vector, .has_error = f.has_error && !in_real(c), .error = f.error};
        e.flags = saves_rf(f.vector) ? flags | FLAG_RF : flags;
        if (f.vector == VEC_PF)
            c->x->cr2 = f.cr2;
        note_event(c, &f);
        int r = deliver_event(c, &e);
        if (r == OP_JUMP)
            return r;
        if (r == OP_FAULT && !combine(c, f.vector))
            return OP_SHUTDOWN;
    }
    trace(c->v->m->trace, TRACE_FAULTS, (int)c->v->id,
          "shutdown: every task that handles the exception of the one before it fails, too");
    return OP_SHUTDOWN;
}

/* An event that is no exception: nothing that goes wrong with it makes a double fault by itself. */
static int deliver_benign(struct icpu *c, unsigned vector)
{
    struct event e = {.vector = (u8)vector, .flags = icpu_rflags(c)};
    return deliver_event(c, &e) == OP_JUMP ? OP_JUMP : deliver_fault(c);
}

int deliver_interrupt(struct icpu *c, unsigned vector)
{
    trace(c->v->m->trace, TRACE_IRQ, (int)c->v->id, "interrupt 0x%02x at %04x:0x%llx cpl %u", vector,
          c->x->seg[SEG_CS].sel, (unsigned long long)c->rip, c->cpl);
    return deliver_benign(c, vector);
}

int deliver_nmi(struct icpu *c)
{
    trace(c->v->m->trace, TRACE_IRQ, (int)c->v->id, "NMI at %04x:0x%llx cpl %u", c->x->seg[SEG_CS].sel,
          (unsigned long long)c->rip, c->cpl);
    c->x->nmi_blocked = true;
    return deliver_benign(c, VEC_NMI);
}

int deliver_exception_insn(struct icpu *c, unsigned vector, bool software)
{
    struct event e = {.vector = (u8)vector, .software = software, .flags = icpu_rflags(c) & ~(u64)FLAG_RF};
    struct fault f = {.vector = (u8)vector, .software = software};
    note_event(c, &f);
    int r = deliver_event(c, &e);
    return r == OP_TRAP ? deliver_fault(c) : r;
}

/* ---- INT n in virtual-8086 mode (SDM vol. 3A 21.3.3, table 21-2) ---- */

/* Does the TSS's interrupt redirection bitmap leave this vector to the mode itself? */
static int redirected(struct icpu *c, unsigned vector, bool *yes)
{
    const struct x86_seg *tr = &c->x->tr;
    u64 base, byte;
    if (!range_in(0x66, 2, (u64)tr->limit + 1))
        return fault_gp(c, 0);
    if (sys_load(c, (u32)(tr->base + 0x66), 2, &base))
        return OP_FAULT;
    u32 off = (u32)base - 32 + vector / 8;
    if (base < 32 || !range_in(off, 1, (u64)tr->limit + 1))
        return fault_gp(c, 0);
    if (sys_load(c, (u32)(tr->base + off), 1, &byte))
        return OP_FAULT;
    *yes = !(byte >> vector % 8 & 1);
    return 0;
}

static int deliver_v86_redirected(struct icpu *c, unsigned vector)
{
    struct stack s;
    u64 entry, image = icpu_rflags(c), cleared = FLAG_TF | FLAG_RF;
    if (cpu_iopl(c) < 3) {                 /* the virtual interrupt flag takes the place of IF */
        image = (image & ~(u64)FLAG_IF) | FLAG_IOPL | (image & FLAG_VIF ? FLAG_IF : 0);
        cleared |= FLAG_VIF;
    } else {
        cleared |= FLAG_IF;
    }
    stack_current(c, &s);
    if (lin_load(c, vector * 4, 4, &entry) || stack_room(c, &s, 6))
        return OP_FAULT;
    if (stack_put(c, &s, 2, (u16)image) || stack_put(c, &s, 2, c->x->seg[SEG_CS].sel) ||
        stack_put(c, &s, 2, (u16)c->rip))
        return OP_FAULT;
    stack_commit(c, &s);
    seg_load_real(c, SEG_CS, (u16)(entry >> 16));
    c->rip = (u16)entry;
    flags_write(c, 0, cleared);
    icpu_mode(c);
    return OP_JUMP;
}

int deliver_software(struct icpu *c, unsigned vector)
{
    struct event e = {.vector = (u8)vector, .software = true, .flags = icpu_rflags(c) & ~(u64)FLAG_RF};
    if (in_v86(c)) {
        bool redirect = false;
        if (c->x->cr4 & CR4_VME && redirected(c, vector, &redirect))
            return OP_FAULT;
        if (redirect)
            return deliver_v86_redirected(c, vector);
        if (cpu_iopl(c) < 3)
            return fault_gp(c, 0);
    }
    vcpu_count(c->v, COUNT_TRAP_SOFTWARE);
    int r = deliver_event(c, &e);
    return r == OP_TRAP ? deliver_fault(c) : r;
}
