/*
 * MOVS STOS LODS CMPS SCAS with and without REP (SDM vol. 2; vol. 1 7.3.9).
 *
 * A repeated instruction works on as many elements as lie in one page of plain RAM at a time, with the host's own repeated instruction on host
 * addresses: overlapping operands come out as on the processor. Everything else (backwards, page crossing, devices, code, watchpoints,
 * single-step) goes element by element. Registers always show what is done, so a fault or an interrupt in between resumes where it stopped.
 */
#include "cpu/interp/fp.h"
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"

#define SLICE 4096u                                                /* elements between two looks at the vCPU's events */

static bool repeated(const struct op *op)
{
    return op->flags & (OPF_REP | OPF_REPNE);
}

static bool compares(unsigned kind)
{
    return kind == ZYDIS_MNEMONIC_CMPSB || kind == ZYDIS_MNEMONIC_SCASB;
}

static void advance(struct icpu *c, const struct op *op, unsigned reg, u64 elements)
{
    u64 bytes = elements * op->size;
    set_reg(c, reg, op->asize, c->r[reg] + (c->flags & FLAG_DF ? -bytes : bytes));
}

static u32 compare_flags(u64 a, u64 b, unsigned size)
{
    unsigned shift = 64 - 8 * size;                                /* the operands' tops at bit 63: the same CF, ZF, SF, OF; not PF, AF */
    u32 f = 0, low = 0;
    a <<= shift;
    b <<= shift;
    asm("cmpq %[b], %[a]\n\t" ASM_FLAGS_OUT : "+&a"(f) : [a] "r"(a), [b] "r"(b) : "cc");
    a >>= shift;
    b >>= shift;
    asm("cmpb %b[b], %b[a]\n\tlahf" : "+&a"(low) : [a] "q"(a), [b] "q"(b) : "cc");
    return (f & ~(FL_PF | FL_AF)) | (low & (FL_PF | FL_AF));
}

/* ---- one element ---- */
static int source_load(struct icpu *c, const struct op *op, u64 *v)
{
    u64 la;
    return seg_linear(c, op->seg, get_reg(c, RSI, op->asize), op->size, MMU_READ, &la) ? OP_FAULT : lin_load(c, la, op->size, v);
}

static int dest_load(struct icpu *c, const struct op *op, u64 *v)
{
    u64 la;
    return seg_linear(c, SEG_ES, get_reg(c, RDI, op->asize), op->size, MMU_READ, &la) ? OP_FAULT : lin_load(c, la, op->size, v);
}

static int dest_store(struct icpu *c, const struct op *op, u64 v)
{
    u64 la;
    return seg_linear(c, SEG_ES, get_reg(c, RDI, op->asize), op->size, MMU_WRITE, &la) ? OP_FAULT : lin_store(c, la, op->size, v);
}

static int one_element(struct icpu *c, const struct op *op)
{
    u64 a, b;
    switch (op->aux) {
    case ZYDIS_MNEMONIC_MOVSB:
        if (source_load(c, op, &a) || dest_store(c, op, a))
            return OP_FAULT;
        advance(c, op, RSI, 1);
        advance(c, op, RDI, 1);
        break;
    case ZYDIS_MNEMONIC_STOSB:
        if (dest_store(c, op, get_reg(c, RAX, op->size)))
            return OP_FAULT;
        advance(c, op, RDI, 1);
        break;
    case ZYDIS_MNEMONIC_LODSB:
        if (source_load(c, op, &a))
            return OP_FAULT;
        set_reg(c, RAX, op->size, a);
        advance(c, op, RSI, 1);
        break;
    case ZYDIS_MNEMONIC_CMPSB:
        if (source_load(c, op, &a) || dest_load(c, op, &b))
            return OP_FAULT;
        c->fl = compare_flags(a, b, op->size);
        advance(c, op, RSI, 1);
        advance(c, op, RDI, 1);
        break;
    default:                                                       /* SCAS */
        if (dest_load(c, op, &b))
            return OP_FAULT;
        c->fl = compare_flags(get_reg(c, RAX, op->size), b, op->size);
        advance(c, op, RDI, 1);
        break;
    }
    return OP_NEXT;
}

/* ---- many elements ---- */
#define HOST_REPEAT(prefix, name, size)                                                               \
    switch (size) {                                                                                   \
    case 1: asm volatile(prefix #name "b" REPEAT_OPERANDS); break;                                    \
    case 2: asm volatile(prefix #name "w" REPEAT_OPERANDS); break;                                    \
    case 4: asm volatile(prefix #name "l" REPEAT_OPERANDS); break;                                    \
    default: asm volatile(prefix #name "q" REPEAT_OPERANDS); break;                                   \
    }

static void host_movs(u8 *d, const u8 *s, u64 n, unsigned size)
{
#define REPEAT_OPERANDS : "+S"(s), "+D"(d), "+c"(n) : : "memory"
    HOST_REPEAT("rep ", movs, size)
#undef REPEAT_OPERANDS
}

static void host_stos(u8 *d, u64 a, u64 n, unsigned size)
{
#define REPEAT_OPERANDS : "+D"(d), "+c"(n) : "a"(a) : "memory"
    HOST_REPEAT("rep ", stos, size)
#undef REPEAT_OPERANDS
}

/* Comparisons return how many elements were compared (n > 0), with the flags of the last one. */
#define COMPARE_OUT "\n\tmovl $0, %%eax\n\t" ASM_FLAGS_OUT
static u64 host_cmps(const u8 *s, const u8 *d, u64 n, unsigned size, bool while_equal, u32 *fl)
{
    u64 left = n;
    u32 f;
#define REPEAT_OPERANDS COMPARE_OUT : "+S"(s), "+D"(d), "+c"(left), "=a"(f) : : "memory", "cc"
    if (while_equal) {
        HOST_REPEAT("repe ", cmps, size)
    } else {
        HOST_REPEAT("repne ", cmps, size)
    }
#undef REPEAT_OPERANDS
    *fl = f;
    return n - left;
}

static u64 host_scas(u64 a, const u8 *d, u64 n, unsigned size, bool while_equal, u32 *fl)
{
    u64 left = n;
#define REPEAT_OPERANDS COMPARE_OUT : "+a"(a), "+D"(d), "+c"(left) : : "memory", "cc"
    if (while_equal) {
        HOST_REPEAT("repe ", scas, size)
    } else {
        HOST_REPEAT("repne ", scas, size)
    }
#undef REPEAT_OPERANDS
    *fl = (u32)a;
    return n - left;
}

/* The host address of a string operand, and in *n (elements) no more than lie in its page, its segment and below the address's wrap. NULL: not this way. */
static u8 *run_of(struct icpu *c, const struct op *op, unsigned seg, unsigned reg, enum mmu_access access, u64 *n)
{
    u64 off = get_reg(c, reg, op->asize), la;
    if (op->asize < 8)
        *n = MIN(*n, (BIT(8 * op->asize) - off) / op->size);
    if (!*n || seg_linear(c, seg, off, op->size, access, &la))
        return NULL;
    *n = MIN(*n, (PAGE_SIZE - (la & ~PAGE_MASK)) / op->size);
    if (!*n || (c->mode != IMODE_LONG64 && seg_linear(c, seg, off, (unsigned)(*n * op->size), access, &la)))
        return NULL;
    return lin_host(c, la, (unsigned)(*n * op->size), access);
}

/* Does up to n elements at once; returns how many, 0 when this way is not open. *done: the repetition has ended by a comparison. */
static u64 many_elements(struct icpu *c, const struct op *op, u64 n, bool *done)
{
    bool while_equal = !(op->flags & OPF_REPNE);
    unsigned kind = op->aux;
    u8 *s = NULL, *d = NULL;
    u32 fl = c->fl;
    if (c->flags & FLAG_DF || kind == ZYDIS_MNEMONIC_LODSB)
        return 0;
    if (kind == ZYDIS_MNEMONIC_MOVSB || kind == ZYDIS_MNEMONIC_CMPSB) {
        s = run_of(c, op, op->seg, RSI, MMU_READ, &n);
        if (!s)
            return 0;
    }
    d = run_of(c, op, SEG_ES, RDI, compares(kind) ? MMU_READ : MMU_WRITE, &n);
    if (!d)
        return 0;
    switch (kind) {
    case ZYDIS_MNEMONIC_MOVSB: host_movs(d, s, n, op->size); break;
    case ZYDIS_MNEMONIC_STOSB: host_stos(d, c->r[RAX], n, op->size); break;
    case ZYDIS_MNEMONIC_CMPSB: n = host_cmps(s, d, n, op->size, while_equal, &fl); break;
    default: n = host_scas(c->r[RAX], d, n, op->size, while_equal, &fl); break;
    }
    c->fl = fl;
    *done = compares(kind) && !(fl & FL_ZF) == while_equal;
    if (s)
        advance(c, op, RSI, n);
    advance(c, op, RDI, n);
    return n;
}

static int op_rep(struct icpu *c, const struct op *op)
{
    u64 count = get_reg(c, RCX, op->asize), slice = 0;
    u32 fl = c->fl;
    while (count) {
        bool done = false;
        u64 n = c->step ? 0 : many_elements(c, op, MIN(count, SLICE), &done);
        if (!n) {
            if (one_element(c, op)) {
                if (!guest_is_amd(c))
                    c->fl = fl;                                    /* SDM vol. 2 REP; AMD leaves those of the last comparison */
                return OP_FAULT;
            }
            n = 1;
            done = compares(op->aux) && !(c->fl & FL_ZF) == !(op->flags & OPF_REPNE);
        }
        count -= n;
        set_reg(c, RCX, op->asize, count);
        if (done)
            break;
        slice += n;
        bool event = slice >= SLICE && atomic_load_explicit(&c->v->events, memory_order_relaxed) && !c->log;
        if (count && (c->step || event))
            return OP_RESTART;
    }
    return OP_NEXT;
}

int bind_string(struct icpu *c, const struct decoded *d, struct op *op, unsigned kind)
{
    if (d->insn.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT)            /* MOVSD, CMPSD of SSE2 */
        return fp_bind(c, d, op, 0);
    op->aux = kind;
    op->fn = repeated(op) ? op_rep : one_element;
    return BIND_OK;
}
