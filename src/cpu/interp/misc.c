/* Small integer instructions that belong to no family: NOPs and hints, fences, cache line flushes, BOUND, RDRAND, RDSEED, UDn (SDM vol. 2). */
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"

static int op_nop(struct icpu *c, const struct op *op)
{
    (void)c;
    (void)op;
    return OP_NEXT;
}

int bind_nop(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    bool reg_form = d->insn.attributes & ZYDIS_ATTRIB_HAS_MODRM && !(op->flags & OPF_MEM);
    if (d->insn.mnemonic == ZYDIS_MNEMONIC_PAUSE && op->flags & OPF_REX && d->insn.raw.rex.B)
        return bind_xchg_acc(c, d, op, arg);                       /* F3 before XCHG R8, rAX means nothing */
    if (d->insn.opcode_map == ZYDIS_OPCODE_MAP_0F && d->insn.opcode == 0x0d && reg_form && guest_is_amd(c))
        return BIND_UD;                                            /* PREFETCH of a register: a NOP to Intel only */
    op->fn = op_nop;
    return BIND_OK;
}

/* Guest loads and stores are host loads and stores in program order, so LFENCE has nothing to add; SFENCE orders the host's non-temporal stores as well. */
static int op_sfence(struct icpu *c, const struct op *op)
{
    (void)c;
    (void)op;
    asm volatile("sfence" : : : "memory");
    return OP_NEXT;
}

static int op_mfence(struct icpu *c, const struct op *op)
{
    (void)c;
    (void)op;
    atomic_thread_fence(memory_order_seq_cst);
    return OP_NEXT;
}

int bind_fence(struct icpu *c, const struct decoded *d, struct op *op, unsigned full)
{
    (void)c;
    op->fn = full ? op_mfence : d->insn.mnemonic == ZYDIS_MNEMONIC_SFENCE ? op_sfence : op_nop;
    return BIND_OK;
}

/* Caches are coherent with everything in this machine; the instruction still faults as a load would. */
static int op_clflush(struct icpu *c, const struct op *op)
{
    u64 la;
    if (mem_linear(c, op, 1, MMU_READ, &la))
        return OP_FAULT;
    return lin_probe(c, la, 1, MMU_READ);
}

int bind_clflush(struct icpu *c, const struct decoded *d, struct op *op, unsigned feature)
{
    (void)d;
    if (feature && !cpuid_has(c->v->m->cpuid, feature))
        return BIND_UD;
    op->fn = op_clflush;
    return BIND_OK;
}

int op_too_long(struct icpu *c, const struct op *op)
{
    (void)op;
    return fault_gp(c, 0);
}

int op_ud(struct icpu *c, const struct op *op)
{
    (void)op;
    return fault_ud(c);
}

int bind_ud(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)d;
    (void)op;
    (void)arg;
    return BIND_UD;
}

/* BOUND: signed index against a pair of bounds; #BR. */
static int op_bound(struct icpu *c, const struct op *op)
{
    unsigned n = op->size, shift = 64 - 8 * n;
    u64 la, lower, upper;
    if (mem_linear(c, op, 2 * n, MMU_READ, &la) || lin_load(c, la, n, &lower) || lin_load(c, (u32)(la + n), n, &upper))
        return OP_FAULT;
    s64 i = (s64)(c->r[op->reg] << shift) >> shift;
    if (i < (s64)(lower << shift) >> shift || i > (s64)(upper << shift) >> shift)
        return fault_raise(c, VEC_BR);
    return OP_NEXT;
}

int bind_bound(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg)
{
    (void)c;
    (void)arg;
    op->size = (u8)(d->opnd[0].size / 8);
    op->reg = op_gpr(d->opnd[0].reg.value);
    op->fn = op_bound;
    return BIND_OK;
}

/* RDRAND, RDSEED: the host's. CF says whether there was a number; the other flags become 0. */
static int op_random(struct icpu *c, const struct op *op)
{
    u64 v;
    u8 ok;
    if (op->aux)
        asm volatile("rdseed %[v]\n\tsetc %[ok]" : [v] "=r"(v), [ok] "=q"(ok) : : "cc");
    else
        asm volatile("rdrand %[v]\n\tsetc %[ok]" : [v] "=r"(v), [ok] "=q"(ok) : : "cc");
    set_reg(c, op->rm, op->size, ok ? v : 0);
    c->fl = ok ? FL_CF : 0;
    return OP_NEXT;
}

int bind_random(struct icpu *c, const struct decoded *d, struct op *op, unsigned seed)
{
    if (!cpuid_has(c->v->m->cpuid, seed ? CPU_RDSEED : CPU_RDRAND))
        return BIND_UD;
    op_form(d, op);
    op->aux = seed;
    op->fn = op_random;
    return BIND_OK;
}
