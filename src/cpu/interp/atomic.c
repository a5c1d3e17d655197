/*
 * XCHG XADD CMPXCHG CMPXCHG8B CMPXCHG16B (SDM vol. 2).
 *
 * XCHG with memory is always locked; the others with a LOCK prefix. The locked forms are built on the host's compare-and-exchange on guest memory,
 * retried until it takes; across pages and in devices the machine's split lock stands in (access.c).
 */
#include "cpu/interp/ops.h"

/* ---- XCHG ---- */
#define XCHG(T, unused)                                                                               \
    static int xchg_rr_##T(struct icpu *c, const struct op *op)                                       \
    {                                                                                                 \
        T a = get_##T(c, op->rm), b = get_##T(c, op->reg);                                            \
        set_##T(c, op->rm, b);                                                                        \
        set_##T(c, op->reg, a);                                                                       \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int xchg_mr_##T(struct icpu *c, const struct op *op)                                       \
    {                                                                                                 \
        T v = get_##T(c, op->reg);                                                                    \
        u64 la;                                                                                       \
        if (unlikely(mem_linear(c, op, sizeof(T), MMU_WRITE, &la)))                                   \
            return OP_FAULT;                                                                          \
        void *m = lock_host(c, la, sizeof(T));                                                        \
        if (unlikely(!m))                                                                             \
            return xchg_split(c, op, la);                                                             \
        asm volatile("xchg" ASM_##T " %[v], %[m]" : [v] "+r"(v), [m] "+m"(*(any_##T *)m) : : "memory"); \
        lock_done(c);                                                                                 \
        set_##T(c, op->reg, v);                                                                       \
        return OP_NEXT;                                                                               \
    }

static int xchg_split(struct icpu *c, const struct op *op, u64 la)
{
    u64 v = op->size == 1 ? get_u8(c, op->reg) : c->r[op->reg], old;
    if (lin_probe(c, la, op->size, MMU_WRITE))
        return OP_FAULT;
    split_lock(c);
    int r = lin_load(c, la, op->size, &old);
    if (!r)
        r = lin_store(c, la, op->size, v);
    split_unlock(c);
    if (r)
        return OP_FAULT;
    if (op->size == 1)
        set_u8(c, op->reg, (u8)old);
    else
        set_reg(c, op->reg, op->size, old);
    return OP_NEXT;
}
FOR_SIZES(XCHG, 0)

#define ROW(name) { name##_u8, name##_u16, name##_u32, name##_u64 }

int bind_xchg(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn table[2][4] = { ROW(xchg_rr), ROW(xchg_mr) };
    (void)c;
    (void)arg;
    enum form form = op_form(d, op);                               /* Zydis may name the register first */
    bool mem = form == FORM_MR || form == FORM_RM;
    if (op->flags & OPF_LOCK && !mem)
        return BIND_UD;
    op->fn = table[mem][size_index(op->size)];
    return BIND_OK;
}

int bind_xchg_acc(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op->rm = R8;
    op->reg = RAX;
    op->size = (u8)(d->insn.operand_width / 8);
    op->fn = op->size == 8 ? xchg_rr_u64 : op->size == 4 ? xchg_rr_u32 : xchg_rr_u16;
    return BIND_OK;
}

/* ---- XADD ---- */
#define XADD(T, unused)                                                                               \
    static inline T add_flags_##T(T a, T b, u32 *flags)                                               \
    {                                                                                                 \
        u32 f = 0;                                                                                    \
        asm("add" ASM_##T " %[b], %[a]\n\t" ASM_FLAGS_OUT : [a] "+r"(a), "+&a"(f) : [b] "r"(b) : "cc"); \
        *flags = f;                                                                                   \
        return a;                                                                                     \
    }                                                                                                 \
    static int xadd_rr_##T(struct icpu *c, const struct op *op)                                       \
    {                                                                                                 \
        u32 fl;                                                                                       \
        T a = get_##T(c, op->rm), sum = add_flags_##T(a, get_##T(c, op->reg), &fl);                   \
        set_##T(c, op->reg, a);                                                                       \
        set_##T(c, op->rm, sum);                                                                      \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int xadd_plain_##T(struct icpu *c, const struct op *op)                                    \
    {                                                                                                 \
        struct rmw w;                                                                                 \
        u32 fl;                                                                                       \
        T a;                                                                                          \
        if (rmw_begin_##T(c, op, &w, &a, true))                                                       \
            return OP_FAULT;                                                                          \
        if (rmw_end_##T(c, &w, add_flags_##T(a, get_##T(c, op->reg), &fl), true))                     \
            return OP_FAULT;                                                                          \
        set_##T(c, op->reg, a);                                                                       \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int xadd_mr_##T(struct icpu *c, const struct op *op)                                       \
    {                                                                                                 \
        T v = get_##T(c, op->reg);                                                                    \
        u32 fl = 0;                                                                                   \
        u64 la;                                                                                       \
        if (!(op->flags & OPF_LOCK))                                                                  \
            return xadd_plain_##T(c, op);                                                             \
        if (unlikely(mem_linear(c, op, sizeof(T), MMU_WRITE, &la)))                                   \
            return OP_FAULT;                                                                          \
        void *m = lock_host(c, la, sizeof(T));                                                        \
        if (unlikely(!m)) {                                                                           \
            split_lock(c);                                                                            \
            int r = xadd_plain_##T(c, op);                                                            \
            split_unlock(c);                                                                          \
            return r;                                                                                 \
        }                                                                                             \
        asm volatile("lock xadd" ASM_##T " %[v], %[m]\n\t" ASM_FLAGS_OUT                              \
                     : [v] "+r"(v), [m] "+m"(*(any_##T *)m), "+&a"(fl) : : "cc", "memory");           \
        lock_done(c);                                                                                 \
        set_##T(c, op->reg, v);                                                                       \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }
FOR_SIZES(XADD, 0)

int bind_xadd(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn table[2][4] = { ROW(xadd_rr), ROW(xadd_mr) };
    (void)c;
    (void)arg;
    bool mem = op_form(d, op) == FORM_MR;
    if (op->flags & OPF_LOCK && !mem)
        return BIND_UD;
    op->fn = table[mem][size_index(op->size)];
    return BIND_OK;
}

/* ---- CMPXCHG ---- */
#define CMPXCHG(T, unused)                                                                            \
    static inline u32 cmp_flags_##T(T a, T b)                                                         \
    {                                                                                                 \
        u32 f = 0;                                                                                    \
        asm("cmp" ASM_##T " %[b], %[a]\n\t" ASM_FLAGS_OUT : "+&a"(f) : [a] "r"(a), [b] "r"(b) : "cc"); \
        return f;                                                                                     \
    }                                                                                                 \
    static int cmpxchg_rr_##T(struct icpu *c, const struct op *op)                                    \
    {                                                                                                 \
        T acc = get_##T(c, RAX), old = get_##T(c, op->rm), v = get_##T(c, op->reg);                   \
        c->fl = cmp_flags_##T(acc, old);                                                              \
        if (acc == old)                                                                               \
            set_##T(c, op->rm, v);                                                                    \
        else                                                                                          \
            set_##T(c, RAX, old);                                                                     \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int cmpxchg_mr_##T(struct icpu *c, const struct op *op)                                    \
    {                                                                                                 \
        T acc = get_##T(c, RAX), v = get_##T(c, op->reg);                                             \
        u64 old, la;                                                                                  \
        if (unlikely(mem_linear(c, op, sizeof(T), MMU_WRITE, &la)))                                   \
            return OP_FAULT;                                                                          \
        if (unlikely(mem_cmpxchg(c, la, sizeof(T), acc, v, &old)))                                    \
            return OP_FAULT;                                                                          \
        c->fl = cmp_flags_##T(acc, (T)old);                                                           \
        if (acc != (T)old)                                                                            \
            set_##T(c, RAX, (T)old);                                                                  \
        return OP_NEXT;                                                                               \
    }
/* RAX is byte register 0 and register 0 alike. Without LOCK the memory form is atomic all the same, which no program can hold against it. */
FOR_SIZES(CMPXCHG, 0)

int bind_cmpxchg(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn table[2][4] = { ROW(cmpxchg_rr), ROW(cmpxchg_mr) };
    (void)c;
    (void)arg;
    bool mem = op_form(d, op) == FORM_MR;
    if (op->flags & OPF_LOCK && !mem)
        return BIND_UD;
    op->fn = table[mem][size_index(op->size)];
    return BIND_OK;
}

/* ---- CMPXCHG8B, CMPXCHG16B ---- */
static void pair_result(struct icpu *c, bool equal)
{
    c->fl = equal ? c->fl | FL_ZF : c->fl & ~FL_ZF;
}

static int op_cmpxchg8b(struct icpu *c, const struct op *op)
{
    u64 expected = (u64)(u32)c->r[RDX] << 32 | (u32)c->r[RAX], desired = (u64)(u32)c->r[RCX] << 32 | (u32)c->r[RBX], old, la;
    if (mem_linear(c, op, 8, MMU_WRITE, &la) || mem_cmpxchg(c, la, 8, expected, desired, &old))
        return OP_FAULT;
    if (old != expected) {
        c->r[RAX] = (u32)old;
        c->r[RDX] = old >> 32;
    }
    pair_result(c, old == expected);
    return OP_NEXT;
}

static bool host_cmpxchg16b(void *m, u64 *lo, u64 *hi, u64 new_lo, u64 new_hi)
{
    u8 equal;
    asm volatile("lock cmpxchg16b %[m]\n\tsetz %[equal]"
                 : [m] "+m"(*(u8(*)[16])m), "+a"(*lo), "+d"(*hi), [equal] "=q"(equal) : "b"(new_lo), "c"(new_hi) : "cc", "memory");
    return equal;
}

static int cmpxchg16b_split(struct icpu *c, u64 la, u64 old[2], bool *equal)
{
    u64 desired[2] = { c->r[RBX], c->r[RCX] };
    if (lin_probe(c, la, 16, MMU_WRITE))
        return OP_FAULT;
    split_lock(c);
    int r = lin_load_bytes(c, la, old, 16);
    *equal = old[0] == c->r[RAX] && old[1] == c->r[RDX];
    if (!r)
        r = lin_store_bytes(c, la, *equal ? desired : old, 16);
    split_unlock(c);
    return r;
}

static int op_cmpxchg16b(struct icpu *c, const struct op *op)
{
    u64 la, old[2] = { c->r[RAX], c->r[RDX] };
    bool equal;
    if (mem_linear(c, op, 16, MMU_WRITE, &la))                     /* misalignment comes before a bad address */
        return op_ea(c, op) & 15 ? fault_gp(c, 0) : OP_FAULT;
    if (la & 15)
        return fault_gp(c, 0);
    void *m = lock_host(c, la, 16);
    if (likely(m)) {
        equal = host_cmpxchg16b(m, &old[0], &old[1], c->r[RBX], c->r[RCX]);
        lock_done(c);
    } else if (cmpxchg16b_split(c, la, old, &equal)) {
        return OP_FAULT;
    }
    if (!equal) {
        c->r[RAX] = old[0];
        c->r[RDX] = old[1];
    }
    pair_result(c, equal);
    return OP_NEXT;
}

int bind_cmpxchg_pair(struct icpu *c, const struct decoded *d, struct op *op, unsigned size)
{
    (void)d;
    if (!(op->flags & OPF_MEM) || (size == 16 && !cpuid_has(c->v->m->cpuid, CPU_CX16)))
        return BIND_UD;
    op->fn = size == 16 ? op_cmpxchg16b : op_cmpxchg8b;
    return BIND_OK;
}
