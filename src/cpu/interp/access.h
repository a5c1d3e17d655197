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

#define OP_ACCESS(T)                                                                                  \
    /* 0 or OP_FAULT */                                                                               \
    static inline int op_load_##T(struct icpu *c, const struct op *op, T *val)                        \
    {                                                                                                 \
        u8 *p = op_hit(c, op, sizeof(T), MMU_READ);                                                   \
        if (likely(p)) {                                                                              \
            *val = host_load_##T(p);                                                                  \
            return 0;                                                                                 \
        }                                                                                             \
        u64 v = 0;                                                                                    \
        int r = mem_load(c, op, sizeof(T), &v);                                                       \
        *val = (T)v;                                                                                  \
        return r;                                                                                     \
    }                                                                                                 \
    static inline int op_store_##T(struct icpu *c, const struct op *op, T val)                        \
    {                                                                                                 \
        u8 *p = op_hit(c, op, sizeof(T), MMU_WRITE);                                                  \
        if (likely(p)) {                                                                              \
            host_store_##T(p, val);                                                                   \
            return 0;                                                                                 \
        }                                                                                             \
        return mem_store(c, op, sizeof(T), val);                                                      \
    }
OP_ACCESS(u8)
OP_ACCESS(u16)
OP_ACCESS(u32)
OP_ACCESS(u64)
#undef OP_ACCESS

/*
 * Read-modify-write without LOCK: rmw_begin() gives the old value, and a place for rmw_end() to put the new one: the host address, or
 * the linear address when the access is not a plain one. All faults that the store could raise are raised by rmw_begin().
 */
struct rmw {
    u8 *host;
    u64 la;
};
int rmw_begin_slow(struct icpu *c, const struct op *op, unsigned size, struct rmw *w, u64 *old);

#define RMW_ACCESS(T)                                                                                 \
    static inline int rmw_begin_##T(struct icpu *c, const struct op *op, struct rmw *w, T *old)       \
    {                                                                                                 \
        w->host = op_hit(c, op, sizeof(T), MMU_WRITE);                                                \
        if (likely(w->host)) {                                                                        \
            *old = host_load_##T(w->host);                                                            \
            return 0;                                                                                 \
        }                                                                                             \
        u64 v = 0;                                                                                    \
        int r = rmw_begin_slow(c, op, sizeof(T), w, &v);                                              \
        *old = (T)v;                                                                                  \
        return r;                                                                                     \
    }                                                                                                 \
    static inline int rmw_end_##T(struct icpu *c, const struct rmw *w, T val)                         \
    {                                                                                                 \
        if (likely(w->host)) {                                                                        \
            host_store_##T(w->host, val);                                                             \
            return 0;                                                                                 \
        }                                                                                             \
        return lin_store(c, w->la, sizeof(T), val);                                                   \
    }
RMW_ACCESS(u8)
RMW_ACCESS(u16)
RMW_ACCESS(u32)
RMW_ACCESS(u64)
#undef RMW_ACCESS

/* The host address for a locked operation within one page of RAM, code pages included (the cache is told), or NULL: then the split lock is to be
 * taken. No fault is raised. */
void *lock_host(struct icpu *c, u64 la, unsigned n);
