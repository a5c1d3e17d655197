/*
 * Memory operands: guest registers to a host address, by the shadow's windows or by the software TLB; and RSP, which is biased.
 *
 * Shadow (shadow.h): every PML4 slot that the view may use has a window in the host's address space where the slot's pages are mapped as the guest's page tables
 * have them. `PEXT` takes the slot from the address, a table gives what leads from linear to host address; a slot that is closed gives an address that is not
 * canonical. There is no compare: what may not be accessed is not mapped.
 *
 * Software TLB (interp/tlb.h): look-up inline; what misses is done by the instruction's handler, which fills the TLB. Runs of PUSH and POP: tr_run().
 *
 * Several operands by the same base register, unchanged in between, look its slot up once: the delta is kept in S0 (tr.kept), up to the block's end.
 *
 * A displacement below 1 MiB is left to the host instruction after its base alone has been translated: the windows have guard gaps of 2 GiB, and whoever hits
 * one gets the exact treatment by the handler. So is an index that is known to be below 64 Ki (tr.small), and the base may have moved by small steps since its slot
 * was looked up.
 */
#include "cpu/bt/tr.h"

#define SMALL_DISP (1 << 20)

/* ---- registers ---- */
void tr_rsp_get(struct tr *t, unsigned dst)
{
    struct emit *e = &t->e;
    if (!t->shadow) {
        lea(e, dst, RSP, 0);
        return;
    }
    op_gs(e, true, X_LOAD, dst, OFF(bt.nbias));
    op_mem(e, true, X_LEA, dst, RSP, dst, 0, 0);
}

void tr_rsp_set(struct tr *t, unsigned src)
{
    struct emit *e = &t->e;
    if (!t->shadow) {
        mov_rr(e, RSP, src);
        return;
    }
    unsigned d = src == S0 ? S1 : S0;
    t->kept = NO_REG;
    put_pext_gs(e, d, src, OFF(bt.mask_slot));
    op_gs_index(e, true, X_LOAD, d, d, OFF(bt.delta[0][0]) + t->view * 4096u);
    op_gs(e, true, X_STORE, d, OFF(bt.bias));
    op_mem(e, true, X_LEA, RSP, src, d, 0, 0);
    PUT(e, 0x49, 0xf7, 0xd0 | (d & 7));                            /* not d */
    lea(e, d, d, 1);
    op_gs(e, true, X_STORE, d, OFF(bt.nbias));
}

void tr_rsp_move(struct tr *t, s32 delta)
{
    lea(&t->e, RSP, RSP, delta);
}

void tr_load(struct tr *t, unsigned g, unsigned host)
{
    if (host == S0)
        t->kept = NO_REG;
    if (g == RSP)
        tr_rsp_get(t, host);
    else if (tr_resident(g))
        mov_rr(&t->e, host, g);
    else
        op_gs(&t->e, true, X_LOAD, host, OFF_R(g));
}

unsigned tr_read(struct tr *t, unsigned g, unsigned scratch)
{
    if (tr_resident(g))
        return g;
    tr_load(t, g, scratch);
    return scratch;
}

void tr_write(struct tr *t, unsigned g, unsigned scratch)
{
    if (g == RSP)
        tr_rsp_set(t, scratch);
    else
        op_gs(&t->e, true, X_STORE, scratch, OFF_R(g));
}

/* ---- addresses ---- */
bool tr_ea(const struct tr *t, const struct op *op, struct ea *m)
{
    *m = (struct ea){ op->base, op->index, op->scale, op->seg, op->disp };
    if (m->base == REG_RIP)
        m->disp += (s64)t->tb->la;
    else if (m->disp != (s32)m->disp)
        return false;
    return op->asize == 8 && op->flags & OPF_MEM;
}

static bool absolute(const struct ea *m)
{
    return (m->base == REG_RIP || m->base == REG_ZERO) && m->index == REG_ZERO;
}

static void put_absolute(struct tr *t, unsigned dst, const struct ea *m)
{
    if (m->base == REG_RIP)
        tr_linear(t, dst, (u64)m->disp);
    else
        mov_imm64(&t->e, dst, (u64)m->disp);
}

static void add_segment(struct tr *t, const struct ea *m, unsigned dst, unsigned tmp)
{
    struct emit *e = &t->e;
    size_t off = offsetof(struct x86, seg) + m->seg * sizeof(struct x86_seg) + offsetof(struct x86_seg, base);
    if (m->seg < SEG_FS)
        return;
    if (t->c->bt.x_offset) {
        op_gs(e, true, X_LOAD, tmp, (size_t)t->c->bt.x_offset + off);
    } else {
        op_gs(e, true, X_LOAD, tmp, OFF(x));
        op_mem(e, true, X_LOAD, tmp, tmp, NO_REG, 0, (s32)off);
    }
    op_mem(e, true, X_LEA, dst, dst, tmp, 0, 0);
}

void tr_address(struct tr *t, const struct ea *m, unsigned dst, bool linear)
{
    struct emit *e = &t->e;
    unsigned tmp = dst == S0 ? S1 : S0;
    if (dst == S0 || (m->index != REG_ZERO && !tr_resident(m->index)) || (linear && m->seg >= SEG_FS))
        t->kept = NO_REG;
    if (absolute(m)) {
        put_absolute(t, dst, m);
    } else {
        unsigned base = NO_REG, index = NO_REG;
        s32 disp = (s32)m->disp;
        if (m->base == REG_RIP) {                                  /* does not exist with an index, but would be right */
            put_absolute(t, dst, m);
            base = dst;
            disp = 0;
        } else if (m->base == REG_TMP) {
            op_gs(e, true, X_LOAD, dst, OFF(bt.tmp[TMP_ADDRESS]));
            base = dst;
        } else if (m->base != REG_ZERO) {
            base = tr_read(t, m->base, dst);
        }
        if (m->index != REG_ZERO)
            index = tr_read(t, m->index, tmp);
        op_mem(e, true, X_LEA, dst, base, index, m->scale, disp);
    }
    if (linear)
        add_segment(t, m, dst, tmp);
}

/* ---- the shadow ---- */
static void shadow_absolute(struct tr *t, const struct ea *m, struct place *p, unsigned want, unsigned *scratch)
{
    struct emit *e = &t->e;
    t->kept = NO_REG;
    op_gs(e, true, X_LOAD, S0, OFF(bt.delta[0][0]) + t->view * 4096u + ((u64)m->disp >> 39 & 511) * 8);
    const u8 *slot = e->p - 4;
    *scratch = S1;
    if (m->disp == (s32)m->disp) {
        *p = (struct place){ S0, NO_REG, 0, (s32)m->disp };
        if (m->base == REG_RIP)
            t->tb->copies = false;
        return;
    }
    put_absolute(t, S1, m);
    if (m->base == REG_RIP)
        tr_reloc(t, slot, RELOC_SLOT);
    if (want) {
        op_mem(e, true, X_LEA, S0, S0, S1, 0, 0);
        *p = (struct place){ S0, NO_REG, 0, 0 };
    } else {
        *p = (struct place){ S0, S1, 0, 0 };
    }
}

/* S0 = the delta of the slot that the guest's base register points to; S1 may be used. */
static void shadow_delta(struct tr *t, unsigned base)
{
    if (base == t->kept)
        return;
    put_pext_gs(&t->e, S0, tr_read(t, base, S1), OFF(bt.mask_slot));
    op_gs_index(&t->e, true, X_LOAD, S0, S0, OFF(bt.delta[0][0]) + t->view * 4096u);
    t->kept = tr_resident(base) ? base : NO_REG;
}

/* Base and an index that is so small that it leads no further than into a guard. */
static void shadow_indexed(struct tr *t, const struct ea *m, unsigned want, struct place *p, unsigned *scratch)
{
    struct emit *e = &t->e;
    if (m->base == RSP) {
        *p = (struct place){ RSP, m->index, m->scale, (s32)m->disp };
        *scratch = S0;
        return;
    }
    if (m->base == REG_ZERO) {                                     /* a table */
        op_gs(e, true, X_LOAD, S0, OFF(bt.delta[0][0]) + t->view * 4096u + ((u64)m->disp >> 39 & 511) * 8);
        t->kept = NO_REG;
        *p = (struct place){ S0, m->index, m->scale, (s32)m->disp };
        *scratch = S1;
        return;
    }
    shadow_delta(t, m->base);
    if (want) {
        op_mem(e, true, X_LEA, S0, S0, m->base, 0, 0);
        t->kept = NO_REG;
        *p = (struct place){ S0, m->index, m->scale, (s32)m->disp };
    } else {
        op_mem(e, true, X_LEA, S1, m->base, m->index, m->scale, (s32)m->disp);
        *p = (struct place){ S1, S0, 0, 0 };
    }
    *scratch = S1;
}

static bool shadow_mem(struct tr *t, const struct ea *m, unsigned want, struct place *p, unsigned *scratch)
{
    struct emit *e = &t->e;
    bool near = m->disp > -SMALL_DISP && m->disp < SMALL_DISP && m->seg < SEG_FS, small = near && m->index == REG_ZERO;
    size_t table = OFF(bt.delta[0][0]) + t->view * 4096u;
    if (tr_in_loop(t)) {                                           /* by one of its bases */
        bug_on(want || !small || (m->base != t->loop.base[0] && m->base != t->loop.base[1]));
        *p = (struct place){ m->base, m->base == t->loop.base[0] ? S0 : S1, 0, (s32)m->disp };
    } else if (m->seg < SEG_FS && m->index < 16 && t->small & BIT(m->index) && tr_resident(m->index) &&
        (m->base == REG_ZERO || (near && (m->base == RSP || (m->base < 16 && tr_resident(m->base)))))) {
        shadow_indexed(t, m, want, p, scratch);
    } else if (small && m->base == RSP) {
        *p = (struct place){ RSP, NO_REG, 0, (s32)m->disp };
        *scratch = S0;
    } else if (small && m->base == t->kept) {
        *p = (struct place){ m->base, S0, 0, (s32)m->disp };
        *scratch = S1;
    } else if (small && m->base < 16) {
        unsigned base = tr_read(t, m->base, S1);
        put_pext_gs(e, S0, base, OFF(bt.mask_slot));
        op_gs_index(e, true, X_LOAD, S0, S0, table);
        if (base == S1 && want) {
            op_mem(e, true, X_LEA, S0, S0, S1, 0, 0);
            *p = (struct place){ S0, NO_REG, 0, (s32)m->disp };
        } else {
            *p = (struct place){ base, S0, 0, (s32)m->disp };
        }
        t->kept = tr_resident(m->base) ? m->base : NO_REG;
        *scratch = S1;
    } else if (absolute(m) && m->seg < SEG_FS) {
        shadow_absolute(t, m, p, want, scratch);
    } else {
        tr_address(t, m, S1, true);
        t->kept = NO_REG;
        put_pext_gs(e, S0, S1, OFF(bt.mask_slot));
        op_gs_index(e, true, X_LOAD, S0, S0, table);
        if (want) {
            op_mem(e, true, X_LEA, S1, S1, S0, 0, 0);
            *p = (struct place){ S1, NO_REG, 0, 0 };
        } else {
            *p = (struct place){ S1, S0, 0, 0 };
        }
        *scratch = S0;
    }
    return true;
}

/* ---- the software TLB ---- */
static bool simple_base(const struct ea *m)
{
    return m->seg < SEG_FS && m->index == REG_ZERO && m->base < 16 && (tr_resident(m->base) || m->base == RSP);
}

static void to_cold(struct tr *t, u8 *from, unsigned reg, bool rcx_saved)
{
    struct cold *k = tr_cold(t, from, COLD_HANDLER);
    k->swapped = reg != NO_REG;
    k->reg = reg;
    k->rcx_saved = rcx_saved;
}

/* RORX rcx, [base + disp], PAGE_SHIFT: VEX.LZ.F2.0F3A.W1 F0 /r ib */
static void put_page_of_tag(struct emit *e, unsigned base, s32 disp)
{
    PUT(e, 0xc4, 0xc3 | (base & 8 ? 0 : 0x20), 0xfb, 0xf0);
    put_mem(e, RCX, base, NO_REG, 0, disp);
    put8(e, PAGE_SHIFT);
}

/*
 * With BMI2, without touching flags: the first byte's entry by PEXT, the last byte's page by another. RORX leaves 0 above the tag's page only if the access may be made
 * inline; then the two are compared by subtraction and JRCXZ. RCX lies in icpu.bt.tmp[0] meanwhile, so the address is computed while it is still there.
 */
static void softtlb_bmi2(struct tr *t, const struct ea *m, unsigned n, enum mmu_access access)
{
    struct emit *e = &t->e;
    _Static_assert(sizeof(struct tlb_entry) == 4 << 3, "scaled by 4, and by 8");
    tr_address(t, m, S1, true);
    put_pext_gs(e, S0, S1, OFF(bt.mask_tlb));
    if (n > 1)
        lea(e, S1, S1, (s32)n - 1);
    put_pext_gs(e, S1, S1, OFF(bt.mask_page));
    if (!t->rcx_saved)                                             /* else each look-up would wait for the one before it */
        op_gs(e, true, X_STORE, RCX, OFF(bt.tmp[0]));
    t->rcx_stored = true;
    op_gs(e, true, X_LOAD, RCX, OFF(view));
    op_mem(e, true, X_LEA, S0, NO_REG, S0, 2, 0);
    op_mem(e, true, X_LEA, S0, RCX, S0, 3, 0);
    put_page_of_tag(e, S0, (s32)(offsetof(struct tlb_entry, tag) + 8 * access));
    PUT(e, 0x48, 0xf7, 0xd1);                                      /* not rcx */
    op_mem(e, true, X_LEA, RCX, RCX, S1, 0, 1);
    PUT(e, 0xe3, 5);                                               /* jrcxz */
    to_cold(t, jump(e), NO_REG, true);
    op_gs(e, true, X_LOAD, RCX, OFF(bt.tmp[0]));
    op_mem(e, true, X_LOAD, S0, S0, NO_REG, 0, offsetof(struct tlb_entry, addend));
}

/* Without: flags lie in icpu.bt.tmp[1], the host's way. */
static void softtlb_plain(struct tr *t, const struct ea *m, unsigned n, enum mmu_access access)
{
    struct emit *e = &t->e;
    tr_address(t, m, S1, true);
    op_gs(e, true, X_STORE, RAX, OFF(bt.tmp[0]));
    PUT(e, 0x9f, 0x0f, 0x90, 0xc0);                                /* lahf; seto al */
    op_gs(e, true, X_STORE, RAX, OFF(bt.tmp[1]));
    mov_rr(e, S0, S1);
    PUT(e, 0x49, 0xc1, 0xee, PAGE_SHIFT - 5);                      /* shr r14: the entry's offset, 32 bytes each */
    _Static_assert(sizeof(struct tlb_entry) == 32, "shifted by 5");
    op_gs(e, true, 0x23, S0, OFF(bt.mask_entry));                  /* and r14, [] */
    op_gs(e, true, X_ADD, S0, OFF(view));
    if (n > 1)
        alu_imm(e, true, 0, S1, (s32)n - 1);
    alu_imm(e, true, 4, S1, -4096);
    op_mem(e, true, X_CMP, S1, S0, NO_REG, 0, (s32)(offsetof(struct tlb_entry, tag) + 8 * access));
    struct cold *k = tr_cold(t, jump_if(e, CC_NZ), COLD_HANDLER);
    k->arg = 1;                                                    /* flags and RAX are to be restored first */
    op_gs(e, true, X_LOAD, RAX, OFF(bt.tmp[1]));
    PUT(e, 0x04, 0x7f, 0x9e);                                      /* add al, 0x7f; sahf */
    op_gs(e, true, X_LOAD, RAX, OFF(bt.tmp[0]));
    op_mem(e, true, X_LOAD, S0, S0, NO_REG, 0, offsetof(struct tlb_entry, addend));
}

static bool softtlb_mem(struct tr *t, const struct ea *m, unsigned n, enum mmu_access access, unsigned want, struct place *p, unsigned *scratch)
{
    struct emit *e = &t->e;
    if (!absolute(m) && m->disp + (s64)n != (s32)(m->disp + (s64)n))
        return false;
    if (t->t->bmi2)
        softtlb_bmi2(t, m, n, access);
    else
        softtlb_plain(t, m, n, access);
    *scratch = S1;
    if (simple_base(m)) {
        *p = (struct place){ m->base, S0, 0, (s32)m->disp };
        return true;
    }
    op_gs(e, true, X_STORE, S0, OFF(bt.tmp[2]));
    tr_address(t, m, S1, true);
    op_gs(e, true, X_LOAD, S0, OFF(bt.tmp[2]));
    if (want) {
        op_mem(e, true, X_LEA, S0, S0, S1, 0, 0);
        *p = (struct place){ S0, NO_REG, 0, 0 };
    } else {
        *p = (struct place){ S1, S0, 0, 0 };
    }
    return true;
}

bool tr_mem(struct tr *t, const struct ea *m, unsigned n, enum mmu_access access, unsigned want, struct place *p, unsigned *scratch)
{
    return t->shadow ? shadow_mem(t, m, want, p, scratch) : softtlb_mem(t, m, n, access, want, p, scratch);
}
