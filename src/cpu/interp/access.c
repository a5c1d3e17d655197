/*
 * Guest memory as instructions see it: segmentation (SDM vol. 3A 5.3, 5.7), canonical addresses, alignment checks, translation, page crossing,
 * devices, data breakpoints, stores into cached code, locked operations.
 *
 * Order of faults: segment, canonical, alignment, then the page faults of the lower and of the upper page. Nothing is written before all of them
 * have been looked for. Locking: m->split_lock for locked operations that the host cannot do in one instruction.
 */
#include "cpu/interp/access.h"

#include <string.h>

#include "cpu/bt/codepage.h"
#include "cpu/interp/code.h"
#include "cpu/interp/store_log.h"

/* ---- addresses ---- */
static u64 effective_address(const struct icpu *c, const struct op *op)
{
    u64 ea = op_ea(c, op);
    return op->asize == 8 ? ea : op->asize == 4 ? (u32)ea : (u16)ea;
}

int mem_linear(struct icpu *c, const struct op *op, unsigned n, enum mmu_access access, u64 *la)
{
    return seg_linear(c, op->seg, effective_address(c, op), n, access, la);
}

static int seg_fault(struct icpu *c, unsigned seg)
{
    return fault_raise_error(c, seg == SEG_SS ? VEC_SS : VEC_GP, 0);
}

static int linear64(struct icpu *c, unsigned seg, u64 off, unsigned n, u64 *la)
{
    *la = seg >= SEG_FS ? c->x->seg[seg].base + off : off;
    if (unlikely(!tlb_canonical(*la) || !tlb_canonical(*la + n - 1)))
        return seg_fault(c, seg);
    return 0;
}

/* Type checks, SDM vol. 3A 5.5: writes need a writable data segment, reads anything but execute-only code. */
static bool seg_allows(const struct x86_seg *s, enum mmu_access access)
{
    unsigned type = SEG_TYPE(s->attr);
    bool code = type & 8, rw = type & 2;
    return access == MMU_WRITE ? !code && rw : !code || rw;
}

int seg_linear(struct icpu *c, unsigned seg, u64 off, unsigned n, enum mmu_access access, u64 *la)
{
    if (c->mode == IMODE_LONG64)
        return linear64(c, seg, off, n, la);
    const struct x86_seg *s = &c->x->seg[seg];
    u64 last = off + n - 1;
    bool ok;
    if (unlikely(!(s->attr & 8) && s->attr & 4))                    /* expand-down data */
        ok = off > s->limit && last <= (s->attr & SEG_DB ? 0xffffffff : 0xffff);
    else
        ok = last <= s->limit;
    if (c->mode != IMODE_REAL16 && c->mode != IMODE_V86)
        ok = ok && s->attr & SEG_P && seg_allows(s, access);
    if (unlikely(!ok))
        return seg_fault(c, seg);
    *la = (u32)(s->base + off);
    return 0;
}

/* ---- translation ---- */
struct piece {                                                     /* a part of an access that lies in one page */
    u8 *host;                                                      /* NULL: a device */
    u64 gpa, la;
    unsigned n, slow;
};

/* Under a log (store_log.h) devices are not touched: this fault is nobody's, all is taken back. */
static int stopped(struct icpu *c)
{
    c->log->stop = true;
    return fault_gp(c, 0);
}

static int piece_get(struct icpu *c, enum tlb_view_id view, u64 la, unsigned n, enum mmu_access access, struct piece *p)
{
    u32 error;
    if (unlikely(!tlb_canonical(la)))
        return fault_gp(c, 0);
    struct tlb_entry *e = tlb_lookup(c, view, la, access, &error);
    if (unlikely(!e))
        return fault_page(c, la, error);
    p->la = la;
    p->n = n;
    p->slow = e->tag[access] & ~PAGE_MASK;
    if (unlikely(c->log) && p->slow & TLB_MMIO)
        return stopped(c);
    p->gpa = tlb_gpa(c, view, la);
    p->host = p->slow & TLB_MMIO ? NULL : (u8 *)(uintptr_t)(la + e->addend);
    return 0;
}

/* Linear addresses wrap at 4 GiB outside long mode. */
static u64 la_next(const struct icpu *c, u64 la, unsigned n)
{
    return c->x->efer & EFER_LMA ? la + n : (u32)(la + n);
}

/* One or two pieces (n is at most a page); *count of them. */
static int pieces_get(struct icpu *c, enum tlb_view_id view, u64 la, unsigned n, enum mmu_access access, struct piece p[2], unsigned *count)
{
    unsigned room = PAGE_SIZE - (la & ~PAGE_MASK), first = MIN(n, room);
    int r = piece_get(c, view, la, first, access, &p[0]);
    *count = 1;
    if (likely(!r) && unlikely(n > first)) {
        r = piece_get(c, view, la_next(c, la, first), n - first, access, &p[1]);
        *count = 2;
    }
    return r;
}

static void watch(struct icpu *c, const struct piece *p, bool write)
{
    if (unlikely(p->slow & TLB_WATCH))
        tlb_watch_check(c, p->la, p->n, write);
}

/* Devices see accesses of 1 to 8 bytes: longer ones in steps of 8. */
static void piece_mmio(struct icpu *c, const struct piece *p, u8 *buf, bool write)
{
    for (unsigned done = 0; done < p->n;) {
        unsigned step = MIN(p->n - done, 8u);
        u64 val = 0;
        if (write)
            memcpy(&val, buf + done, step);
        codepage_leave(c);
        vcpu_mmio(c->v, p->gpa + done, step, write, &val);
        codepage_enter(c);
        if (!write)
            memcpy(buf + done, &val, step);
        done += step;
    }
}

/* Copies of 1, 2, 4 and 8 bytes are single accesses. */
static void copy_in(void *buf, const void *host, unsigned n)
{
    switch (n) {
    case 1: *(u8 *)buf = host_load_u8(host); break;
    case 2: *(any_u16 *)buf = host_load_u16(host); break;
    case 4: *(any_u32 *)buf = host_load_u32(host); break;
    case 8: *(any_u64 *)buf = host_load_u64(host); break;
    default: memcpy(buf, host, n); break;
    }
}

static void copy_out(void *host, const void *buf, unsigned n)
{
    switch (n) {
    case 1: host_store_u8(host, *(const u8 *)buf); break;
    case 2: host_store_u16(host, *(const any_u16 *)buf); break;
    case 4: host_store_u32(host, *(const any_u32 *)buf); break;
    case 8: host_store_u64(host, *(const any_u64 *)buf); break;
    default: memcpy(host, buf, n); break;
    }
}

/* Of any kind: what is translated from it, and what this vCPU's blocks are made of. */
static bool holds_code(const struct icpu *c, u64 gpa)
{
    return codepage_is_code(c, gpa) || code_in_page(c->code, gpa);
}

/* The page may have lost its code in the meantime, or by this store: then its write tag matches again. */
static void retag(struct icpu *c, enum tlb_view_id view, const struct piece *p)
{
    if (!holds_code(c, p->gpa))
        tlb_slot(c->tlb->view[view]->e, p->la)->tag[MMU_WRITE] &= ~(u64)TLB_CODE;
}

/* To RAM. The TLB's word is not enough: the page may have become code since the look-up (another piece's device was waited for). */
static void piece_store(struct icpu *c, enum tlb_view_id view, const struct piece *p, const u8 *buf)
{
    if (unlikely(holds_code(c, p->gpa))) {
        bool forget = codepage_store_begin(c, p->gpa, p->n);
        copy_out(p->host, buf, p->n);
        codepage_store_end(c, p->gpa, p->n);
        code_written(c, p->gpa, p->n, forget);
    } else {
        copy_out(p->host, buf, p->n);
    }
    if (unlikely(p->slow & TLB_CODE))
        retag(c, view, p);
}

static int view_load(struct icpu *c, enum tlb_view_id view, u64 la, u8 *buf, unsigned n)
{
    struct piece p[2];
    unsigned count;
    if (pieces_get(c, view, la, n, MMU_READ, p, &count))
        return OP_FAULT;
    for (unsigned i = 0; i < count; buf += p[i++].n) {
        watch(c, &p[i], false);
        if (likely(p[i].host))
            copy_in(buf, p[i].host, p[i].n);
        else
            piece_mmio(c, &p[i], buf, false);
    }
    return 0;
}

static int view_store(struct icpu *c, enum tlb_view_id view, u64 la, const u8 *buf, unsigned n)
{
    struct piece p[2];
    unsigned count;
    if (pieces_get(c, view, la, n, MMU_WRITE, p, &count))
        return OP_FAULT;
    for (unsigned i = 0; i < count; buf += p[i++].n) {
        watch(c, &p[i], true);
        if (unlikely(c->log) && !store_log_note(c->log, p[i].host, p[i].n))
            return stopped(c);
        if (likely(p[i].host))
            piece_store(c, view, &p[i], buf);
        else
            piece_mmio(c, &p[i], (u8 *)buf, true);
    }
    return 0;
}

/* #AC for accesses of 2, 4 and 8 bytes (SDM vol. 3A 6.15 interrupt 17); armed: the fast view is the one that never matches. */
static bool misaligned(const struct icpu *c, u64 la, unsigned size)
{
    return unlikely(c->view == c->tlb->none.e) && la & (size - 1);
}

static u64 host_load(const void *p, unsigned size)
{
    switch (size) {
    case 1: return host_load_u8(p);
    case 2: return host_load_u16(p);
    case 4: return host_load_u32(p);
    default: return host_load_u64(p);
    }
}

static void host_store(void *p, unsigned size, u64 val)
{
    switch (size) {
    case 1: host_store_u8(p, (u8)val); break;
    case 2: host_store_u16(p, (u16)val); break;
    case 4: host_store_u32(p, (u32)val); break;
    default: host_store_u64(p, val); break;
    }
}

int lin_load(struct icpu *c, u64 la, unsigned size, u64 *val)
{
    const u8 *p = tlb_hit(c, la, size, MMU_READ);
    if (likely(p)) {
        *val = host_load(p, size);
        return 0;
    }
    if (misaligned(c, la, size))
        return fault_raise_error(c, VEC_AC, 0);
    *val = 0;
    return view_load(c, c->tlb->cur, la, (u8 *)val, size);
}

int lin_store(struct icpu *c, u64 la, unsigned size, u64 val)
{
    u8 *p = tlb_hit(c, la, size, MMU_WRITE);
    if (likely(p)) {
        host_store(p, size, val);
        return 0;
    }
    if (misaligned(c, la, size))
        return fault_raise_error(c, VEC_AC, 0);
    return view_store(c, c->tlb->cur, la, (const u8 *)&val, size);
}

int lin_load_bytes(struct icpu *c, u64 la, void *buf, unsigned n)
{
    return view_load(c, c->tlb->cur, la, buf, n);
}

int lin_store_bytes(struct icpu *c, u64 la, const void *buf, unsigned n)
{
    return view_store(c, c->tlb->cur, la, buf, n);
}

int lin_probe(struct icpu *c, u64 la, unsigned n, enum mmu_access access)
{
    struct piece p[2];
    unsigned count;
    if (n <= 8 && misaligned(c, la, n))
        return fault_raise_error(c, VEC_AC, 0);
    return pieces_get(c, c->tlb->cur, la, n, access, p, &count);
}

void *lin_host(struct icpu *c, u64 la, unsigned n, enum mmu_access access)
{
    u8 *p = tlb_hit(c, la, n, access);
    u32 error;
    if (likely(p))
        return p;
    if (c->view == c->tlb->none.e || (la & ~PAGE_MASK) + n > PAGE_SIZE || !tlb_canonical(la))
        return NULL;
    struct tlb_entry *e = tlb_lookup(c, c->tlb->cur, la, access, &error);
    if (!e || e->tag[access] != (la & PAGE_MASK))
        return NULL;
    p = (u8 *)(uintptr_t)(la + e->addend);
    return unlikely(c->log) && access == MMU_WRITE && !store_log_note(c->log, p, n) ? NULL : p;
}

/* ---- operands ---- */
int mem_load(struct icpu *c, const struct op *op, unsigned size, u64 *val)
{
    u64 la;
    if (mem_linear(c, op, size, MMU_READ, &la))
        return OP_FAULT;
    return lin_load(c, la, size, val);
}

int mem_store(struct icpu *c, const struct op *op, unsigned size, u64 val)
{
    u64 la;
    if (mem_linear(c, op, size, MMU_WRITE, &la))
        return OP_FAULT;
    return lin_store(c, la, size, val);
}

int rmw_begin_slow(struct icpu *c, const struct op *op, unsigned size, struct rmw *w, u64 *old)
{
    if (mem_linear(c, op, size, MMU_WRITE, &w->la))
        return OP_FAULT;
    if (misaligned(c, w->la, size))
        return fault_raise_error(c, VEC_AC, 0);
    if (lin_probe(c, w->la, size, MMU_WRITE))
        return OP_FAULT;
    return lin_load(c, w->la, size, old);
}

/* ---- locked operations ---- */
void *lock_host(struct icpu *c, u64 la, unsigned n)
{
    struct piece p;
    u32 error;
    u8 *hit = tlb_hit(c, la, n, MMU_WRITE);
    if (likely(hit))
        return hit;
    if (misaligned(c, la, n) || (la & ~PAGE_MASK) + n > PAGE_SIZE || !tlb_canonical(la))
        return NULL;
    if (!tlb_lookup(c, c->tlb->cur, la, MMU_WRITE, &error) || piece_get(c, c->tlb->cur, la, n, MMU_WRITE, &p) || !p.host)
        return NULL;
    watch(c, &p, true);
    if (unlikely(c->log) && !store_log_note(c->log, p.host, n))
        return NULL;
    if (holds_code(c, p.gpa)) {
        c->locked_gpa = p.gpa;
        c->locked_n = n;
        code_written(c, p.gpa, n, codepage_store_begin(c, p.gpa, n));
    }
    if (p.slow & TLB_CODE)
        retag(c, c->tlb->cur, &p);
    return p.host;
}

void lock_done_code(struct icpu *c)
{
    codepage_store_end(c, c->locked_gpa, c->locked_n);
    c->locked_n = 0;
}

void split_lock(struct icpu *c)
{
    codepage_leave(c);
    pthread_mutex_lock(&c->v->m->split_lock);
    codepage_enter(c);
}

void split_unlock(struct icpu *c)
{
    pthread_mutex_unlock(&c->v->m->split_lock);
}

static u64 host_cmpxchg(void *p, unsigned size, u64 expected, u64 desired)
{
    switch (size) {
    case 1: asm volatile("lock cmpxchgb %b2, %1" : "+a"(expected), "+m"(*(u8 *)p) : "q"(desired) : "memory", "cc"); break;
    case 2: asm volatile("lock cmpxchgw %w2, %1" : "+a"(expected), "+m"(*(any_u16 *)p) : "r"(desired) : "memory", "cc"); break;
    case 4: asm volatile("lock cmpxchgl %k2, %1" : "+a"(expected), "+m"(*(any_u32 *)p) : "r"(desired) : "memory", "cc"); break;
    default: asm volatile("lock cmpxchgq %q2, %1" : "+a"(expected), "+m"(*(any_u64 *)p) : "r"(desired) : "memory", "cc"); break;
    }
    return size == 8 ? expected : expected & (BIT(8 * size) - 1);
}

int mem_cmpxchg(struct icpu *c, u64 la, unsigned size, u64 expected, u64 desired, u64 *old)
{
    void *host = lock_host(c, la, size);
    if (likely(host)) {
        *old = host_cmpxchg(host, size, expected, desired);
        lock_done(c);
        return 0;
    }
    if (misaligned(c, la, size))
        return fault_raise_error(c, VEC_AC, 0);
    if (lin_probe(c, la, size, MMU_WRITE))
        return OP_FAULT;
    split_lock(c);
    int r = lin_load(c, la, size, old);
    if (!r)
        r = lin_store(c, la, size, *old == expected ? desired : *old);
    split_unlock(c);
    return r;
}

/* ---- implicit supervisor accesses ---- */
/* As tlb_hit(), in the system's view. */
static u8 *system_hit(const struct icpu *c, u64 la, unsigned n, enum mmu_access access)
{
    const struct tlb_entry *e = tlb_slot(c->tlb->view[tlb_system_view(c)]->e, la);
    return likely(e->tag[access] == ((la + n - 1) & PAGE_MASK) && !c->log) ? (u8 *)(uintptr_t)(la + e->addend) : NULL;
}

int sys_load(struct icpu *c, u64 la, unsigned size, u64 *val)
{
    const u8 *p = system_hit(c, la, size, MMU_READ);
    if (likely(p)) {
        *val = host_load(p, size);
        return 0;
    }
    *val = 0;
    return view_load(c, tlb_system_view(c), la, (u8 *)val, size);
}

int sys_store(struct icpu *c, u64 la, unsigned size, u64 val)
{
    u8 *p = system_hit(c, la, size, MMU_WRITE);
    if (likely(p)) {
        host_store(p, size, val);
        return 0;
    }
    return view_store(c, tlb_system_view(c), la, (const u8 *)&val, size);
}

int sys_probe(struct icpu *c, u64 la, unsigned n, enum mmu_access access)
{
    struct piece p[2];
    unsigned count;
    return pieces_get(c, tlb_system_view(c), la, n, access, p, &count);
}

/* ---- stack ---- */
static u64 stack_mask(const struct icpu *c)
{
    return c->stack_size == 8 ? ~0ull : c->stack_size == 4 ? 0xffffffff : 0xffff;
}

void stack_move(struct icpu *c, s64 delta)
{
    u64 mask = stack_mask(c), rsp = (c->r[RSP] + (u64)delta) & mask;
    c->r[RSP] = c->stack_size == 2 ? (c->r[RSP] & ~mask) | rsp : rsp;
}

int stack_push(struct icpu *c, unsigned size, u64 val)
{
    u64 la;
    if (seg_linear(c, SEG_SS, (c->r[RSP] - size) & stack_mask(c), size, MMU_WRITE, &la) || lin_store(c, la, size, val))
        return OP_FAULT;
    stack_move(c, -(s64)size);
    return 0;
}

int stack_peek(struct icpu *c, unsigned off, unsigned size, u64 *val)
{
    u64 la;
    if (seg_linear(c, SEG_SS, (c->r[RSP] + off) & stack_mask(c), size, MMU_READ, &la))
        return OP_FAULT;
    return lin_load(c, la, size, val);
}

int stack_pop(struct icpu *c, unsigned size, u64 *val)
{
    if (stack_peek(c, 0, size, val))
        return OP_FAULT;
    stack_move(c, size);
    return 0;
}
