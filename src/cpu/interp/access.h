/*
 * The short way of a memory operand: effective address, TLB hit, one host load or store of the operand's exact size. Inlined into handlers;
 * whatever is out of the ordinary is done by access.c, which repeats the whole access.
 *
 * Guest loads and stores are volatile accesses of their size at any alignment: never torn within a cache line, never reordered by the compiler; the
 * host's memory order is then the guest's.
 */
#pragma once

#include "cpu/interp/tlb.h"

typedef u16 __attribute__((aligned(1), may_alias)) any_u16;
typedef u32 __attribute__((aligned(1), may_alias)) any_u32;
typedef u64 __attribute__((aligned(1), may_alias)) any_u64;
typedef u8 any_u8;

#define HOST_ACCESS(T)                                                                                \
    static inline T host_load_##T(const void *p)                                                      \
    {                                                                                                 \
        return *(const volatile any_##T *)p;                                                          \
    }                                                                                                 \
    static inline void host_store_##T(void *p, T v)                                                   \
    {                                                                                                 \
        *(volatile any_##T *)p = v;                                                                   \
    }
HOST_ACCESS(u8)
HOST_ACCESS(u16)
HOST_ACCESS(u32)
HOST_ACCESS(u64)
#undef HOST_ACCESS

/* NULL: not in the TLB, crosses the page, or wants a closer look. */
static inline u8 *tlb_hit(const struct icpu *c, u64 la, unsigned n, enum mmu_access access)
{
    const struct tlb_entry *e = tlb_slot(c->view, la);
    return likely(e->tag[access] == ((la + n - 1) & PAGE_MASK)) ? (u8 *)(uintptr_t)(la + e->addend) : NULL;
}

/* Of OPF_FLAT operands; others go through mem_linear(). */
static inline u64 op_ea(const struct icpu *c, const struct op *op)
{
    return c->r[op->base] + (c->r[op->index] << op->scale) + (u64)op->disp;
}

static inline u8 *op_hit(const struct icpu *c, const struct op *op, unsigned n, enum mmu_access access)
{
    return likely(op->flags & OPF_FLAT) ? tlb_hit(c, op_ea(c, op), n, access) : NULL;
}

/*
 * A handler with a memory operand is written once, as NAME_body(c, op, slow), and made twice by MEM_HANDLER(NAME): the short way (slow is false) gives up with
 * OP_MISS when an access is not plain, before anything has changed, and ends in a jump to the cold NAME_slow, which begins again and does
 * all accesses by access.c's functions. So the short way makes no calls and needs no stack frame.
 */
#define OP_MISS (-1)
#define BODY static inline __attribute__((always_inline)) int
#define MEM_HANDLER(name) MEM_HANDLER_(name)
#define MEM_HANDLER_(name)                                                                            \
    static __attribute__((noinline, cold)) int name##_slow(struct icpu *c, const struct op *op)       \
    {                                                                                                 \
        return name##_body(c, op, true);                                                              \
    }                                                                                                 \
    static int name(struct icpu *c, const struct op *op)                                              \
    {                                                                                                 \
        int r = name##_body(c, op, false);                                                            \
        return unlikely(r == OP_MISS) ? name##_slow(c, op) : r;                                       \
    }

/* 0, OP_FAULT or OP_MISS */
#define OP_LOAD(T)                                                                                    \
    BODY op_load_##T(struct icpu *c, const struct op *op, T *val, bool slow)                          \
    {                                                                                                 \
        if (!slow) {                                                                                  \
            u8 *p = op_hit(c, op, sizeof(T), MMU_READ);                                               \
            if (unlikely(!p))                                                                         \
                return OP_MISS;                                                                       \
            *val = host_load_##T(p);                                                                  \
            return 0;                                                                                 \
        }                                                                                             \
        u64 v = 0;                                                                                    \
        int r = mem_load(c, op, sizeof(T), &v);                                                       \
        *val = (T)v;                                                                                  \
        return r;                                                                                     \
    }
OP_LOAD(u8)
OP_LOAD(u16)
OP_LOAD(u32)
OP_LOAD(u64)
#undef OP_LOAD

/* The last thing that a handler does: 0 or OP_FAULT. */
#define OP_STORE(T)                                                                                   \
    static inline int op_store_##T(struct icpu *c, const struct op *op, T val)                        \
    {                                                                                                 \
        u8 *p = op_hit(c, op, sizeof(T), MMU_WRITE);                                                  \
        if (unlikely(!p))                                                                             \
            return mem_store(c, op, sizeof(T), val);                                                  \
        host_store_##T(p, val);                                                                       \
        return 0;                                                                                     \
    }
OP_STORE(u8)
OP_STORE(u16)
OP_STORE(u32)
OP_STORE(u64)
#undef OP_STORE

/*
 * Read-modify-write without LOCK: rmw_begin() gives the old value, and a place for rmw_end() to put the new one. All faults that the store could raise are
 * raised by rmw_begin().
 */
struct rmw {
    u8 *host;                                                      /* the short way's */
    u64 la;                                                        /* the slow one's */
};
int rmw_begin_slow(struct icpu *c, const struct op *op, unsigned size, struct rmw *w, u64 *old);

#define RMW_ACCESS(T)                                                                                 \
    BODY rmw_begin_##T(struct icpu *c, const struct op *op, struct rmw *w, T *old, bool slow)         \
    {                                                                                                 \
        if (!slow) {                                                                                  \
            w->host = op_hit(c, op, sizeof(T), MMU_WRITE);                                            \
            if (unlikely(!w->host))                                                                   \
                return OP_MISS;                                                                       \
            *old = host_load_##T(w->host);                                                            \
            return 0;                                                                                 \
        }                                                                                             \
        u64 v = 0;                                                                                    \
        int r = rmw_begin_slow(c, op, sizeof(T), w, &v);                                              \
        *old = (T)v;                                                                                  \
        return r;                                                                                     \
    }                                                                                                 \
    BODY rmw_end_##T(struct icpu *c, const struct rmw *w, T val, bool slow)                           \
    {                                                                                                 \
        if (slow)                                                                                     \
            return lin_store(c, w->la, sizeof(T), val);                                               \
        host_store_##T(w->host, val);                                                                 \
        return 0;                                                                                     \
    }
RMW_ACCESS(u8)
RMW_ACCESS(u16)
RMW_ACCESS(u32)
RMW_ACCESS(u64)
#undef RMW_ACCESS

/* The host address for a locked operation within one page of RAM, code pages included (their code is gone), or NULL: then the split lock is to be
 * taken. No fault is raised. After the operation: lock_done(). */
void *lock_host(struct icpu *c, u64 la, unsigned n);
void lock_done_code(struct icpu *c);
static inline void lock_done(struct icpu *c)
{
    if (unlikely(c->locked_n))
        lock_done_code(c);
}
void split_lock(struct icpu *c);
void split_unlock(struct icpu *c);
