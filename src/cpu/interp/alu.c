/*
 * ADD OR ADC SBB AND SUB XOR CMP TEST, INC DEC NEG NOT, ADCX ADOX (SDM vol. 2). One handler per operation, size and operand form; the host's
 * instruction of the same name computes result and flags.
 *
 * With LOCK the host's locked instruction runs on the guest's memory itself; where it cannot (two pages, a device) the operation is
 * made under the machine's split lock.
 */
#include "cpu/interp/ops.h"

/* a = a OP b. CARRY: "" or ASM_CARRY_IN. flags: icpu.fl before and after. */
#define DEFINE_BINARY(T, name, insn, CARRY)                                                           \
    static inline T name##_##T(T a, T b, u32 *flags)                                                  \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        asm(CARRY insn ASM_##T " %[b], %[a]\n\t" ASM_FLAGS_OUT : [a] "+r"(a), "+&a"(f) : [b] "r"(b) : "cc"); \
        *flags = f;                                                                                   \
        return a;                                                                                     \
    }                                                                                                 \
    static inline void name##_locked##_##T(void *m, T b, u32 *flags)                                  \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        asm volatile(CARRY "lock " insn ASM_##T " %[b], %[m]\n\t" ASM_FLAGS_OUT                       \
                     : [m] "+m"(*(any_##T *)m), "+&a"(f) : [b] "r"(b) : "cc", "memory");              \
        *flags = f;                                                                                   \
    }

#define DEFINE_UNARY(T, name, insn, CARRY, OUT)                                                       \
    static inline T name##_##T(T a, u32 *flags)                                                       \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        asm(CARRY insn ASM_##T " %[a]\n\t" OUT : [a] "+r"(a), "+&a"(f) : : "cc");                     \
        *flags = f;                                                                                   \
        return a;                                                                                     \
    }                                                                                                 \
    static inline void name##_locked##_##T(void *m, u32 *flags)                                       \
    {                                                                                                 \
        u32 f = *flags;                                                                               \
        asm volatile(CARRY "lock " insn ASM_##T " %[m]\n\t" OUT : [m] "+m"(*(any_##T *)m), "+&a"(f) : : "cc", "memory"); \
        *flags = f;                                                                                   \
    }


/* ---- operand forms of a = a OP b ---- */
#define FORMS_BINARY(T, name, BEFORE)                                                                 \
    static int name##_rr##_##T(struct icpu *c, const struct op *op)                                   \
    {                                                                                                 \
        u32 fl = BEFORE;                                                                              \
        set_##T(c, op->rm, name##_##T(get_##T(c, op->rm), get_##T(c, op->reg), &fl));                 \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int name##_ri##_##T(struct icpu *c, const struct op *op)                                   \
    {                                                                                                 \
        u32 fl = BEFORE;                                                                              \
        set_##T(c, op->rm, name##_##T(get_##T(c, op->rm), (T)op->imm, &fl));                          \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_rm_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        u32 fl = BEFORE;                                                                              \
        T b;                                                                                          \
        int r = op_load_##T(c, op, &b, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        set_##T(c, op->reg, name##_##T(get_##T(c, op->reg), b, &fl));                                 \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_mem_##T(struct icpu *c, const struct op *op, T b, bool slow)                          \
    {                                                                                                 \
        u32 fl = BEFORE;                                                                              \
        struct rmw w;                                                                                 \
        T a;                                                                                          \
        int r = rmw_begin_##T(c, op, &w, &a, slow);                                                   \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        a = name##_##T(a, b, &fl);                                                                    \
        if (unlikely(rmw_end_##T(c, &w, a, slow)))                                                    \
            return OP_FAULT;                                                                          \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_mr_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        return name##_mem_##T(c, op, get_##T(c, op->reg), slow);                                      \
    }                                                                                                 \
    BODY name##_mi_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        return name##_mem_##T(c, op, (T)op->imm, slow);                                               \
    }                                                                                                 \
    MEM_HANDLER(name##_rm_##T)                                                                        \
    MEM_HANDLER(name##_mr_##T)                                                                        \
    MEM_HANDLER(name##_mi_##T)                                                                        \
    static int name##_lock##_##T(struct icpu *c, const struct op *op)                                 \
    {                                                                                                 \
        T b = op->aux == FORM_MI ? (T)op->imm : get_##T(c, op->reg);                                  \
        u32 fl = BEFORE;                                                                              \
        u64 la;                                                                                       \
        if (unlikely(mem_linear(c, op, sizeof(T), MMU_WRITE, &la)))                                   \
            return OP_FAULT;                                                                          \
        void *m = lock_host(c, la, sizeof(T));                                                        \
        if (unlikely(!m))                                                                             \
            return locked_slow(c, op, op->aux == FORM_MI ? name##_mi_##T##_slow : name##_mr_##T##_slow); \
        name##_locked##_##T(m, b, &fl);                                                               \
        lock_done(c);                                                                                 \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }

/* The unlocked operation under the split lock. */
static int locked_slow(struct icpu *c, const struct op *op, op_fn fn)
{
    split_lock(c);
    int r = fn(c, op);
    split_unlock(c);
    return r;
}

#define BINARY(T, name, insn, CARRY, BEFORE) DEFINE_BINARY(T, name, insn, CARRY) FORMS_BINARY(T, name, BEFORE)

FOR_SIZES(BINARY, add, "add", "", 0)
FOR_SIZES(BINARY, or, "or", "", 0)
FOR_SIZES(BINARY, adc, "adc", ASM_CARRY_IN, c->fl)
FOR_SIZES(BINARY, sbb, "sbb", ASM_CARRY_IN, c->fl)
FOR_SIZES(BINARY, and, "and", "", 0)
FOR_SIZES(BINARY, sub, "sub", "", 0)
FOR_SIZES(BINARY, xor, "xor", "", 0)

/* ---- CMP and TEST: no result ---- */
#define COMPARE(T, name, insn)                                                                        \
    static inline u32 name##_##T(T a, T b)                                                            \
    {                                                                                                 \
        u32 f = 0;                                                                                    \
        asm(insn ASM_##T " %[b], %[a]\n\t" ASM_FLAGS_OUT : "+&a"(f) : [a] "r"(a), [b] "r"(b) : "cc"); \
        return f;                                                                                     \
    }                                                                                                 \
    static int name##_rr##_##T(struct icpu *c, const struct op *op)                                   \
    {                                                                                                 \
        c->fl = name##_##T(get_##T(c, op->rm), get_##T(c, op->reg));                                  \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    static int name##_ri##_##T(struct icpu *c, const struct op *op)                                   \
    {                                                                                                 \
        c->fl = name##_##T(get_##T(c, op->rm), (T)op->imm);                                           \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_rm_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        T b;                                                                                          \
        int r = op_load_##T(c, op, &b, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        c->fl = name##_##T(get_##T(c, op->reg), b);                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(name##_rm_##T)                                                                        \
    BODY name##_mr_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        T a;                                                                                          \
        int r = op_load_##T(c, op, &a, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        c->fl = name##_##T(a, get_##T(c, op->reg));                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(name##_mr_##T)                                                                        \
    BODY name##_mi_##T##_body(struct icpu *c, const struct op *op, bool slow)                         \
    {                                                                                                 \
        T a;                                                                                          \
        int r = op_load_##T(c, op, &a, slow);                                                         \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        c->fl = name##_##T(a, (T)op->imm);                                                            \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(name##_mi_##T)
FOR_SIZES(COMPARE, cmp, "cmp")
FOR_SIZES(COMPARE, test, "test")

#define ROW(name, form) { name##_##form##_u8, name##_##form##_u16, name##_##form##_u32, name##_##form##_u64 }
#define ROWS(name) { [FORM_RR] = ROW(name, rr), [FORM_RI] = ROW(name, ri), [FORM_RM] = ROW(name, rm), [FORM_MR] = ROW(name, mr), [FORM_MI] = ROW(name, mi) }

int bind_alu(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn plain[ALU_OPS][FORMS][4] = {
        [ALU_ADD] = ROWS(add), [ALU_OR] = ROWS(or), [ALU_ADC] = ROWS(adc), [ALU_SBB] = ROWS(sbb), [ALU_AND] = ROWS(and),
        [ALU_SUB] = ROWS(sub), [ALU_XOR] = ROWS(xor), [ALU_CMP] = ROWS(cmp), [ALU_TEST] = ROWS(test),
    };
    static const op_fn locked[ALU_OPS][4] = {
        [ALU_ADD] = ROW(add, lock), [ALU_OR] = ROW(or, lock), [ALU_ADC] = ROW(adc, lock), [ALU_SBB] = ROW(sbb, lock),
        [ALU_AND] = ROW(and, lock), [ALU_SUB] = ROW(sub, lock), [ALU_XOR] = ROW(xor, lock),
    };
    (void)c;
    enum form form = op_form(d, op);
    if (form == FORM_NONE)
        return BIND_UD;
    unsigned size = size_index(op->size);
    op->fn = plain[arg][form][size];
    if (op->flags & OPF_LOCK) {
        if (form != FORM_MR && form != FORM_MI)
            return BIND_UD;
        op->aux = form;
        op->fn = locked[arg][size];
    }
    return op->fn ? BIND_OK : BIND_UD;
}

/* ---- one operand ---- */
#define FORMS_UNARY(T, name)                                                                          \
    static int name##_r##_##T(struct icpu *c, const struct op *op)                                    \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        set_##T(c, op->rm, name##_##T(get_##T(c, op->rm), &fl));                                      \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    BODY name##_m_##T##_body(struct icpu *c, const struct op *op, bool slow)                          \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        struct rmw w;                                                                                 \
        T a;                                                                                          \
        int r = rmw_begin_##T(c, op, &w, &a, slow);                                                   \
        if (unlikely(r))                                                                              \
            return r;                                                                                 \
        a = name##_##T(a, &fl);                                                                       \
        if (unlikely(rmw_end_##T(c, &w, a, slow)))                                                    \
            return OP_FAULT;                                                                          \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }                                                                                                 \
    MEM_HANDLER(name##_m_##T)                                                                         \
    static int name##_lock##_##T(struct icpu *c, const struct op *op)                                 \
    {                                                                                                 \
        u32 fl = c->fl;                                                                               \
        u64 la;                                                                                       \
        if (unlikely(mem_linear(c, op, sizeof(T), MMU_WRITE, &la)))                                   \
            return OP_FAULT;                                                                          \
        void *m = lock_host(c, la, sizeof(T));                                                        \
        if (unlikely(!m))                                                                             \
            return locked_slow(c, op, name##_m_##T##_slow);                                           \
        name##_locked##_##T(m, &fl);                                                                  \
        lock_done(c);                                                                                 \
        c->fl = fl;                                                                                   \
        return OP_NEXT;                                                                               \
    }

#define UNARY(T, name, insn, CARRY, OUT) DEFINE_UNARY(T, name, insn, CARRY, OUT) FORMS_UNARY(T, name)
FOR_SIZES(UNARY, inc, "inc", ASM_CARRY_IN, ASM_FLAGS_OUT)
FOR_SIZES(UNARY, dec, "dec", ASM_CARRY_IN, ASM_FLAGS_OUT)
FOR_SIZES(UNARY, neg, "neg", "", ASM_FLAGS_OUT)
FOR_SIZES(UNARY, not, "not", "", "")

int bind_unary(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    static const op_fn table[UNARY_OPS][3][4] = {
        [UNARY_INC] = { ROW(inc, r), ROW(inc, m), ROW(inc, lock) },
        [UNARY_DEC] = { ROW(dec, r), ROW(dec, m), ROW(dec, lock) },
        [UNARY_NEG] = { ROW(neg, r), ROW(neg, m), ROW(neg, lock) },
        [UNARY_NOT] = { ROW(not, r), ROW(not, m), ROW(not, lock) },
    };
    (void)c;
    bool mem = op_form(d, op) == FORM_M, lock = op->flags & OPF_LOCK;
    if (lock && !mem)
        return BIND_UD;
    op->fn = table[arg][lock ? 2 : mem][size_index(op->size)];
    return BIND_OK;
}

/* ---- ADCX, ADOX: one flag in and out (SDM vol. 2) ---- */
static u64 add_with(u64 a, u64 b, bool carry, unsigned size, bool *out)
{
    u128 sum = (u128)a + b + carry;
    *out = (u64)(sum >> (8 * size)) & 1;
    return (u64)sum;
}

static int adx(struct icpu *c, const struct op *op)
{
    u32 flag = op->aux ? FL_OF : FL_CF;
    u64 b = c->r[op->reg];
    bool out;
    if (op->flags & OPF_MEM) {
        if (mem_load(c, op, op->size, &b))
            return OP_FAULT;
    }
    u64 mask = op->size == 8 ? ~0ull : 0xffffffff;
    c->r[op->rm] = add_with(c->r[op->rm] & mask, b & mask, c->fl & flag, op->size, &out) & mask;
    c->fl = out ? c->fl | flag : c->fl & ~flag;
    return OP_NEXT;
}

int bind_adx(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    if (!cpuid_has(c->v->m->cpuid, CPU_ADX))
        return BIND_UD;
    op_form(d, op);
    op->aux = arg;
    op->fn = adx;
    return BIND_OK;
}
