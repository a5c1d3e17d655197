/*
 * System instructions that kernels execute all the time, inline: the interrupt flag, PUSHF, POPF, SWAPGS, STAC and CLAC, SYSCALL and SYSRET, time, segment bases,
 * reads of control registers. Intel SDM vol. 2. What is not here is done by interp's handlers; bt.c goes on behind them without much ado.
 *
 * Supervisor code that is translated runs at CPL 0 (bt.c, usable()); in a user view, what is privileged is left to the handler, which raises what is to be raised.
 * State that hardly ever changes (struct bt_fixed) is a constant here; translations end when it changes.
 *
 * RFLAGS but the arithmetic ones are in icpu.flags. Single bits of it are changed by byte and table, since AND and OR would change the arithmetic flags in the
 * host's register. Changes of privilege also change icpu.cpl, icpu.view and tlb.cur, as tlb_views() would; icpu.code_tag follows when
 * translated code is left.
 */
#include "cpu/bt/tr.h"
#include "cpu/interp/sys.h"
#include "cpu/msr.h"

#define SYSRET_STAYS (FLAG_TF | FLAG_AC)                           /* flags of R11 that the handler is needed for */

/* ---- fields ---- */
static size_t x_off(const struct tr *t, size_t field)
{
    return (size_t)t->c->bt.x_offset + field;
}
#define X_OFF(t, field) x_off(t, offsetof(struct x86, field))
#define BASE_OF(number) (offsetof(struct x86, seg) + (number) * sizeof(struct x86_seg) + offsetof(struct x86_seg, base))

static bool supervisor(const struct tr *t)
{
    return t->view != VIEW_USER;
}

/* movzx reg, byte [gs:off] */
static void load_byte(struct emit *e, unsigned reg, size_t off)
{
    PUT(e, 0x65, 0x40 | (reg >> 3 & 1) << 2, 0x0f, 0xb6, (reg & 7) << 3 | 4, 0x25);
    put32(e, (u32)off);
}

static void store_byte(struct emit *e, unsigned reg, size_t off)
{
    op_gs(e, false, 0x88, reg, off);
}

static void store_byte_imm(struct emit *e, unsigned v, size_t off)
{
    op_gs(e, false, 0xc6, 0, off);
    put8(e, v);
}

/* ---- bits of icpu.flags ---- */
/* S0 = byte n of icpu.flags without the bit that the table leaves out. */
static void load_flags_byte(struct tr *t, unsigned n, size_t table)
{
    t->kept = NO_REG;
    load_byte(&t->e, S0, OFF(flags) + n);
    put8(&t->e, 0x65);
    op_mem(&t->e, false, 0x8a, S0, S0, NO_REG, 0, (s32)table);     /* mov r14b, [gs:r14 + table] */
}

static bool emit_cli(struct tr *t)
{
    if (!supervisor(t))
        return false;
    load_flags_byte(t, 1, OFF(bt.without_if));
    store_byte(&t->e, S0, OFF(flags) + 1);
    return true;
}

/* Ends in the handler where reg, a scratch register, is not 0. */
static void handler_unless_zero(struct tr *t, unsigned reg)
{
    struct cold *k = tr_cold(t, jump_unless_zero(&t->e, reg), COLD_HANDLER);
    k->swapped = true;
    k->reg = reg;
}

/*
 * Where an interrupt waits, the handler ends the block. Otherwise what follows is as it was, but that nothing may come between STI and the next
 * instruction: that one is no place for a kick to leave (MARK_SHADOW), and has to be in this block.
 */
static bool emit_sti(struct tr *t)
{
    if (!supervisor(t) || t->i + 1 == t->b->n)
        return false;
    t->kept = NO_REG;
    load_byte(&t->e, S0, OFF(irq_wait));
    handler_unless_zero(t, S0);
    load_flags_byte(t, 1, OFF(bt.without_if));
    lea(&t->e, S0, S0, FLAG_IF >> 8);
    store_byte(&t->e, S0, OFF(flags) + 1);
    t->shadowed = t->i + 1;
    return true;
}

/* S1 = RFLAGS as PUSHF and SYSCALL save it (RF and VM are 0 in translated code). */
static void flags_image(struct tr *t)
{
    struct emit *e = &t->e;
    t->kept = NO_REG;
    mov_rr(e, S0, RAX);
    PUT(e, 0x9f, 0x0f, 0x90, 0xc0);                                /* lahf; seto al */
    PUT(e, 0x44, 0x0f, 0xb6, 0xf8, 0x0f, 0xb6, 0xc4);              /* movzx r15d, al; movzx eax, ah */
    for (unsigned i = 0; i < 3; i++)
        op_mem(e, false, X_LEA, S1, NO_REG, S1, 3, 0);             /* * 8 */
    op_mem(e, false, X_LEA, RAX, RAX, S1, 2, -2);                  /* + OF << 11 - bit 1, which LAHF always sets */
    op_gs(e, false, X_LOAD, S1, OFF(flags));
    op_mem(e, true, X_LEA, S1, S1, RAX, 0, 0);
    mov_rr(e, RAX, S0);
}

static bool emit_pushf(struct tr *t, const struct op *op)
{
    if (op->size != 8)
        return false;
    flags_image(t);
    return tr_push(t, S1);
}

/* Arithmetic flags = those of the image in reg, R11 or S1. Uses S0. */
static void put_arithmetic(struct emit *e, unsigned reg)
{
    mov_rr(e, S0, RAX);
    op_rr(e, false, X_STORE, reg, RAX);
    PUT(e, 0xc1, 0xe0, 8);                                         /* shl eax, 8: AH = SF ZF AF PF CF */
    PUT(e, 0x41, 0x0f, 0xba, 0xe0 | (reg & 7), 11, 0x0f, 0x92, 0xc0); /* bt r11d or r15d, 11; setc al */
    PUT(e, 0x04, 0x7f, 0x9e);                                      /* add al, 0x7f; sahf */
    mov_rr(e, RAX, S0);
}

/*
 * What changes but IF, DF and arithmetic flags is the handler's, and so is IF = 1 while an interrupt waits, which is taken at once. The handler needs no flags:
 * they are all loaded.
 */
static bool emit_popf(struct tr *t, const struct op *op)
{
    static const struct ea top = { RSP, REG_ZERO, 0, SEG_SS, 0 };
    const u32 here = FLAG_IF | FLAG_DF;
    struct emit *e = &t->e;
    struct place p;
    unsigned s;
    if (!supervisor(t) || op->size != 8 || !tr_mem(t, &top, 8, MMU_READ, TR_NO_SCRATCH, &p, &s))
        return false;
    op_mem(e, true, X_LOAD, S1, p.base, p.index, p.scale, p.disp);
    t->kept = NO_REG;
    load_byte(e, S0, OFF(irq_wait));
    PUT(e, 0x45, 0x85, 0xf6);                                      /* test r14d, r14d */
    tr_cold(t, jump_if(e, CC_NZ), COLD_HANDLER);
    op_rr(e, false, X_STORE, S1, S0);
    op_gs(e, false, 0x33, S0, OFF(flags));                         /* xor r14d, [flags] */
    PUT(e, 0x41, 0xf7, 0xc0 | (S0 & 7));                           /* test r14d, imm */
    put32(e, FLAG_TF | FLAG_IOPL | FLAG_NT | FLAG_AC | FLAG_ID);
    tr_cold(t, jump_if(e, CC_NZ), COLD_HANDLER);
    alu_imm(e, false, 4, S0, (s32)here);
    op_gs(e, false, 0x31, S0, OFF(flags));                         /* xor [flags], r14d */
    put_arithmetic(e, S1);
    tr_rsp_move(t, 8);
    return true;
}

/* ---- views ---- */
/* What follows runs in another view, as tlb_views() would have it. Flags are kept; uses S0 and S1. */
static void view_set(struct tr *t, unsigned view)
{
    struct emit *e = &t->e;
    t->kept = NO_REG;
    op_gs(e, true, X_LOAD, S1, OFF(tlb));
    op_mem(e, true, X_LOAD, S0, S1, NO_REG, 0, (s32)(offsetof(struct tlb, view) + view * sizeof(struct tlb_view *)));
    _Static_assert(offsetof(struct tlb_view, e) == 0, "the view is where its entries are");
    op_gs(e, true, X_STORE, S0, OFF(view));
    op_mem(e, false, 0xc7, 0, S1, NO_REG, 0, offsetof(struct tlb, cur));
    put32(e, view);
}

static void clear_word(struct emit *e, size_t off)
{
    op_gs(e, true, 0xc7, 0, off);
    put32(e, 0);
}

/* RSP's bias is that of the view, and of the way to memory, in which it goes on; there to the target, or where RCX says. */
static void go_on(struct tr *t, unsigned view, bool shadow, bool rcx, u64 target)
{
    bool was = t->shadow;
    if (was || shadow)
        tr_rsp_get(t, S1);
    t->view = view;
    t->shadow = shadow;
    if (shadow) {
        tr_rsp_set(t, S1);
    } else if (was) {
        clear_word(&t->e, OFF(bt.bias));
        clear_word(&t->e, OFF(bt.nbias));
        tr_rsp_set(t, S1);
    }
    if (rcx) {
        mov_rr(&t->e, S1, RCX);
        tr_exit_indirect(t);
    } else {
        tr_exit(t, target);
    }
}

/* Ends the block in another view: with --mmu auto by the way to memory that is this view's now (bt_key()), which need not be the one that was the former's. */
static void leave_view(struct tr *t, unsigned view, bool rcx, u64 target)
{
    struct emit *e = &t->e;
    unsigned from = t->view;
    bool was = t->shadow;
    view_set(t, view);
    if (!t->t->choose) {
        go_on(t, view, was, rcx, target);
        return;
    }
    op_gs(e, true, X_LOAD, S0, OFF(bt.way[0]) + view * sizeof t->c->bt.way[0]);
    u8 *shadow = jump_unless_zero(e, S0);
    go_on(t, view, false, rcx, target);
    if (!e->overflow)
        aim(shadow, e->p);
    t->view = from;
    t->shadow = was;
    tr_mark(t, t->i, MARK_COLD);
    put_swap_rcx(e, S0);
    go_on(t, view, true, rcx, target);
    t->shadow = was;
}

static unsigned closed_view(const struct tr *t)                    /* with AC = 0 */
{
    return t->t->fixed.cr4 & CR4_SMAP ? VIEW_SUPER : VIEW_SUPER_OPEN;
}

static bool emit_stac(struct tr *t, const struct op *op, bool *last)
{
    unsigned view = op->aux ? VIEW_SUPER_OPEN : closed_view(t);
    if (!supervisor(t))
        return false;
    load_flags_byte(t, 2, OFF(bt.without_ac));
    if (op->aux)
        lea(&t->e, S0, S0, FLAG_AC >> 16);
    store_byte(&t->e, S0, OFF(flags) + 2);
    if (view == t->view)
        return true;
    leave_view(t, view, false, t->tb->la + op->off + op->len);
    *last = true;
    return true;
}

/* ---- SYSCALL, SYSRET ---- */
static void segment_set(struct tr *t, unsigned seg, u16 sel, u16 attr)
{
    struct emit *e = &t->e;
    size_t off = x_off(t, offsetof(struct x86, seg) + seg * sizeof(struct x86_seg));
    _Static_assert(offsetof(struct x86_seg, limit) == 8 && offsetof(struct x86_seg, sel) == 12 && offsetof(struct x86_seg, attr) == 14, "one store for all three");
    op_gs(e, true, 0xc7, 0, off + offsetof(struct x86_seg, base));
    put32(e, 0);
    mov_imm64(e, S0, 0xffffffffull | (u64)sel << 32 | (u64)attr << 48);
    op_gs(e, true, X_STORE, S0, off + offsetof(struct x86_seg, limit));
}

/* As Linux sets them: all arithmetic flags, IF and TF are cleared, and AC if it matters. */
static bool syscall_usual(const struct tr *t)
{
    const struct bt_fixed *f = &t->t->fixed;
    u64 cleared = FLAGS_ARITH | FLAG_IF | FLAG_TF | (f->cr4 & CR4_SMAP ? FLAG_AC : 0);
    return f->efer & EFER_SCE && (f->sfmask & cleared) == cleared && t->c->bt.x_offset && tlb_canonical(f->lstar);
}

static bool emit_syscall(struct tr *t, const struct op *op, bool *last)
{
    struct emit *e = &t->e;
    const struct bt_fixed *f = &t->t->fixed;
    u16 cs = f->star >> 32 & 0xfffc;
    unsigned view = closed_view(t);
    if (supervisor(t) || !syscall_usual(t))
        return false;
    flags_image(t);
    mov_rr(e, R11, S1);
    tr_linear(t, RCX, t->tb->la + op->off + op->len);
    alu_imm(e, false, 4, S1, (s32)(~(u32)f->sfmask & ~(u32)FLAGS_ARITH));
    alu_imm(e, false, 1, S1, FLAG_1);
    op_gs(e, false, X_STORE, S1, OFF(flags));
    segment_set(t, SEG_CS, cs, SEG_FLAT_CODE64);
    segment_set(t, SEG_SS, cs + 8, SEG_FLAT_DATA);
    store_byte_imm(e, 0, OFF(cpl));
    mov_imm64(e, S0, 1);
    alu_imm(e, false, 0, S0, 0);                                   /* add: result 1, so all flags are 0 */
    leave_view(t, view, false, f->lstar);
    *last = true;
    return true;
}

/* Leaves for the handler where the address in reg is not canonical. Uses S0 and S1; BMI2. */
static void handler_unless_canonical(struct tr *t, unsigned reg)
{
    struct emit *e = &t->e;
    mov_imm64(e, S1, 16);
    put_shift_x(e, SHLX, S0, reg, S1);
    put_shift_x(e, SARX, S0, S0, S1);
    mov_rr(e, S1, reg);
    PUT(e, 0x49, 0xf7, 0xd0 | (S1 & 7));                           /* not r15 */
    op_mem(e, true, X_LEA, S0, S0, S1, 0, 1);
    handler_unless_zero(t, S0);
}

static bool emit_sysret(struct tr *t, const struct op *op, bool *last)
{
    struct emit *e = &t->e;
    bool amd = guest_is_amd(t->c);
    u16 base = (u16)(t->t->fixed.star >> 48);
    if (!supervisor(t) || op->size != 8 || !(t->t->fixed.efer & EFER_SCE) || !t->c->bt.x_offset || !t->t->bmi2)
        return false;
    t->kept = NO_REG;
    if (!amd)
        handler_unless_canonical(t, RCX);
    load_byte(e, S0, OFF(irq_wait));
    handler_unless_zero(t, S0);
    PUT(e, 0x41, 0xf7, 0xc0 | (R11 & 7));                          /* test r11d, imm; the handler needs the flags no more */
    put32(e, SYSRET_STAYS);
    tr_cold(t, jump_if(e, CC_NZ), COLD_HANDLER);
    op_rr(e, false, X_STORE, R11, S1);
    alu_imm(e, false, 4, S1, (s32)(SYSRET_FLAGS & ~FLAGS_ARITH));
    alu_imm(e, false, 1, S1, FLAG_1);
    op_gs(e, false, X_STORE, S1, OFF(flags));
    segment_set(t, SEG_CS, (u16)(base + 16) | 3, SEG_FLAT_CODE64 | SEG_FLAT_DPL3);
    segment_set(t, SEG_SS, amd ? (u16)(base + 8) : (u16)(base + 8) | 3, SEG_FLAT_DATA | SEG_FLAT_DPL3);
    store_byte_imm(e, 3, OFF(cpl));
    put_arithmetic(e, R11);
    leave_view(t, VIEW_USER, true, 0);
    *last = true;
    return true;
}

/* ---- segment bases ---- */
static bool emit_swapgs(struct tr *t)
{
    struct emit *e = &t->e;
    if (!supervisor(t) || !t->c->bt.x_offset)
        return false;
    t->kept = NO_REG;
    op_gs(e, true, X_LOAD, S0, x_off(t, BASE_OF(SEG_GS)));
    op_gs(e, true, X_LOAD, S1, X_OFF(t, kernel_gs_base));
    op_gs(e, true, X_STORE, S0, X_OFF(t, kernel_gs_base));
    op_gs(e, true, X_STORE, S1, x_off(t, BASE_OF(SEG_GS)));
    return true;
}

/* The destination of a register that is read: 32-bit operands clear the upper half. */
static void put_result(struct tr *t, unsigned g, unsigned size, size_t off)
{
    unsigned host = tr_resident(g) ? g : S1;
    op_gs(&t->e, size == 8, X_LOAD, host, off);
    if (host == S1)
        tr_write(t, g, S1);
}

static bool emit_rdbase(struct tr *t, const struct op *op)
{
    if (!(t->t->fixed.cr4 & CR4_FSGSBASE) || !t->c->bt.x_offset)
        return false;
    t->kept = NO_REG;
    put_result(t, op->rm, op->size, x_off(t, BASE_OF(op->aux)));
    return true;
}

static bool emit_wrbase(struct tr *t, const struct op *op)
{
    struct emit *e = &t->e;
    if (!(t->t->fixed.cr4 & CR4_FSGSBASE) || !t->c->bt.x_offset || (op->size == 8 && !t->t->bmi2) || op->rm >= 14 || op->rm == RSP)
        return false;
    t->kept = NO_REG;
    if (op->size == 8)
        handler_unless_canonical(t, op->rm);
    op_rr(e, op->size == 8, X_STORE, op->rm, S1);
    op_gs(e, true, X_STORE, S1, x_off(t, BASE_OF(op->aux)));
    return true;
}

/* By light functions, as an MSR: what interp does to other MSRs takes the vectors out of the registers. NULL: interp's. */
static u64 *msr_base(struct icpu *c)
{
    if (c->cpl || trace_on(c->v->m->trace, TRACE_MSR))
        return NULL;
    switch ((u32)c->r[RCX]) {
    case MSR_FS_BASE: return &c->x->seg[SEG_FS].base;
    case MSR_GS_BASE: return &c->x->seg[SEG_GS].base;
    case MSR_KERNEL_GS_BASE: return &c->x->kernel_gs_base;
    default: return NULL;
    }
}

static int light_rdmsr(struct icpu *c, const struct op *op)
{
    const u64 *base = msr_base(c);
    if (!base)
        return op->fn(c, op);
    vcpu_count(c->v, COUNT_MSR);
    c->r[RAX] = (u32)*base;
    c->r[RDX] = *base >> 32;
    return OP_NEXT;
}

static int light_wrmsr(struct icpu *c, const struct op *op)
{
    u64 *base = msr_base(c), v = c->r[RDX] << 32 | (u32)c->r[RAX];
    if (!base || !tlb_canonical(v))
        return op->fn(c, op);
    vcpu_count(c->v, COUNT_MSR);
    *base = v;
    return OP_NEXT;
}

static bool emit_msr(struct tr *t, bool write)
{
    if (!supervisor(t))
        return false;
    t->kept = NO_REG;
    tr_call_light(t, write ? light_wrmsr : light_rdmsr);
    return true;
}

/* ---- time ---- */
static bool emit_rdtsc(struct tr *t, const struct op *op, bool with_aux)
{
    struct emit *e = &t->e;
    (void)op;
    if ((!supervisor(t) && t->t->fixed.cr4 & CR4_TSD) || !t->t->bmi2 || !t->c->bt.x_offset ||
        (with_aux && !cpuid_has(t->c->v->m->cpuid, CPU_RDTSCP)))
        return false;
    t->kept = NO_REG;
    if (with_aux)
        PUT(e, 0x0f, 0xae, 0xe8);                                  /* lfence */
    PUT(e, 0x0f, 0x31);                                            /* rdtsc */
    put_rorx64(e, S0, RDX, 32);
    op_mem(e, true, X_LEA, S0, S0, RAX, 0, 0);
    op_gs(e, true, X_LOAD, S1, OFF(bt.tsc_bias));
    op_mem(e, true, X_LEA, S0, S0, S1, 0, 0);
    op_rr(e, false, X_STORE, S0, RAX);
    put_rorx64(e, RDX, S0, 32);
    op_rr(e, false, X_STORE, RDX, RDX);
    if (with_aux)
        op_gs(e, false, X_LOAD, RCX, X_OFF(t, tsc_aux));
    return true;
}

static bool emit_rdpid(struct tr *t, const struct op *op)
{
    if (!t->c->bt.x_offset)
        return false;
    t->kept = NO_REG;
    put_result(t, op->rm, 4, X_OFF(t, tsc_aux));
    return true;
}

/* ---- control registers ---- */
static bool emit_mov_cr(struct tr *t, const struct op *op)
{
    static const u16 place[5] = { [0] = offsetof(struct x86, cr0), [2] = offsetof(struct x86, cr2), [3] = offsetof(struct x86, cr3),
                                  [4] = offsetof(struct x86, cr4) };
    const ZydisDecodedOperand *o = &tr_item(t)->d.opnd[0];
    bool to = ZydisRegisterGetClass(o->reg.value) == ZYDIS_REGCLASS_CONTROL;
    if (!supervisor(t) || !t->c->bt.x_offset || op->reg > 4 || !place[op->reg])
        return false;
    t->kept = NO_REG;
    if (!to) {
        put_result(t, op->rm, 8, x_off(t, place[op->reg]));
        return true;
    }
    if (op->reg != 2)
        return false;
    op_gs(&t->e, true, X_STORE, tr_read(t, op->rm, S1), x_off(t, place[2]));
    return true;
}

bool tr_system(struct tr *t, const struct op *op, bool *last)
{
    const struct decoded *d = &tr_item(t)->d;
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_CLI: return emit_cli(t);
    case ZYDIS_MNEMONIC_STI: return emit_sti(t);
    case ZYDIS_MNEMONIC_PUSHFQ: return emit_pushf(t, op);
    case ZYDIS_MNEMONIC_POPFQ: return emit_popf(t, op);
    case ZYDIS_MNEMONIC_STAC: case ZYDIS_MNEMONIC_CLAC: return emit_stac(t, op, last);
    case ZYDIS_MNEMONIC_SYSCALL: return emit_syscall(t, op, last);
    case ZYDIS_MNEMONIC_SYSRET: return emit_sysret(t, op, last);
    case ZYDIS_MNEMONIC_SWAPGS: return emit_swapgs(t);
    case ZYDIS_MNEMONIC_RDFSBASE: case ZYDIS_MNEMONIC_RDGSBASE: return emit_rdbase(t, op);
    case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE: return emit_wrbase(t, op);
    case ZYDIS_MNEMONIC_RDMSR: return emit_msr(t, false);
    case ZYDIS_MNEMONIC_WRMSR: return emit_msr(t, true);
    case ZYDIS_MNEMONIC_RDTSC: return emit_rdtsc(t, op, false);
    case ZYDIS_MNEMONIC_RDTSCP: return emit_rdtsc(t, op, true);
    case ZYDIS_MNEMONIC_RDPID: return emit_rdpid(t, op);
    case ZYDIS_MNEMONIC_MOV: return d->insn.opcode_map == ZYDIS_OPCODE_MAP_0F && (d->insn.opcode & ~2) == 0x20 && emit_mov_cr(t, op);
    default: return false;
    }
}
