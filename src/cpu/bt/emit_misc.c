/*
 * Integer instructions that are neither plain (emit_int.c) nor a family's: copied by tr_recoded(), or a few instructions of another kind.
 */
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/bt/codepage.h"
#include "cpu/bt/tr.h"
#include "cpu/interp/ops.h"

static const ZydisDecodedOperand *memory_of(const struct decoded *d)
{
    for (unsigned n = 0; n < d->insn.operand_count; n++) {
        if (d->opnd[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
            return &d->opnd[n];
    }
    return NULL;
}

static bool copied(struct tr *t, const struct op *op)
{
    const ZydisDecodedOperand *mem = memory_of(&tr_item(t)->d);
    bool write = mem && mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    return tr_recoded(t, op, mem ? mem->size / 8 : 0, write ? MMU_WRITE : MMU_READ);
}

/* A hint. With the software TLB a look-up would cost more than it can save. */
static bool prefetch(struct tr *t, const struct op *op)
{
    return !t->shadow || !(op->flags & OPF_MEM) || tr_recoded(t, op, 1, MMU_READ);
}

/* Caches are coherent with everything in this machine, but it faults as a load does. */
static bool flush_line(struct tr *t, const struct op *op)
{
    struct place p;
    struct ea ea;
    unsigned scratch;
    if (!tr_ea(t, op, &ea) || !tr_mem(t, &ea, 1, MMU_READ, TR_SCRATCH, &p, &scratch))
        return false;
    t->kept = scratch == S0 ? NO_REG : t->kept;
    op_mem(&t->e, false, 0x8a, scratch, p.base, p.index, p.scale, p.disp);
    return true;
}

/* RORX, VEX.LZ.F2.0F3A.W0 F0 /r ib, 32 bits */
static void put_rorx(struct emit *e, unsigned reg, unsigned by)
{
    PUT(e, 0xc4, (reg & 8 ? 0x43 : 0xe3), 0x7b, 0xf0, 0xc0 | (reg & 7) << 3 | (reg & 7), by);
}

static int let_others_run(struct icpu *c, const struct op *op)
{
    (void)op;
    c->bt.pauses = BT_PAUSES;
    codepage_leave(c);
    syscall(SYS_sched_yield);
    codepage_enter(c);
    return OP_NEXT;
}

/*
 * Who spins waits for another vCPU, and if the host has fewer processors free than the guest has vCPUs, that one may wait for this processor: Linux spins for more
 * than a millisecond before it halts. So after some PAUSEs the thread yields.
 */
static bool spin(struct tr *t, const struct op *op)
{
    struct emit *e = &t->e;
    if (!copied(t, op))
        return false;
    t->kept = NO_REG;
    op_gs(e, true, X_LOAD, S0, OFF(bt.pauses));
    lea(e, S0, S0, -1);
    op_gs(e, true, X_STORE, S0, OFF(bt.pauses));
    put_swap_rcx(e, S0);
    PUT(e, 0xe3, 0);                                               /* jrcxz, to where it yields */
    u8 *zero = e->p;
    put_swap_rcx(e, S0);
    u8 *on = jump(e);
    if (!e->overflow)
        zero[-1] = (u8)(e->p - zero);
    put_swap_rcx(e, S0);
    tr_call_light(t, let_others_run);
    if (!e->overflow)
        aim(on, e->p);
    return true;
}

/* CLD, STD: the guest's DF is bit 10 of icpu.flags only. It is rotated to the top, shifted out while its new value comes in, and rotated back. */
static bool direction(struct tr *t, unsigned df)
{
    struct emit *e = &t->e;
    if (!t->t->bmi2)
        return false;
    _Static_assert(FLAG_DF == 1u << 10, "rotated by 11");
    op_gs(e, false, X_LOAD, S1, OFF(flags));
    put_rorx(e, S1, 11);
    op_mem(e, false, X_LEA, S1, S1, S1, 0, (s32)df);
    put_rorx(e, S1, 22);
    op_gs(e, false, X_STORE, S1, OFF(flags));
    return true;
}

/* MOV from a segment register: to memory 16 bits, to a register 16 or, with zeroes above, all. */
static bool from_segment(struct tr *t, const struct op *op)
{
    const struct decoded *d = &tr_item(t)->d;
    struct emit *e = &t->e;
    struct place p;
    struct ea m;
    unsigned scratch;
    if (d->insn.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT || d->insn.opcode != 0x8c)
        return false;
    size_t off = offsetof(struct x86, seg) + (d->insn.raw.modrm.reg & 7) * sizeof(struct x86_seg) + offsetof(struct x86_seg, sel);
    if (op->flags & OPF_MEM) {
        if (!tr_ea(t, op, &m) || !tr_mem(t, &m, 2, MMU_WRITE, TR_SCRATCH, &p, &scratch))
            return false;
        t->kept = scratch == S0 ? NO_REG : t->kept;
        op_gs(e, true, X_LOAD, scratch, OFF(x));
        op_mem(e, false, X_LOAD, scratch, scratch, NO_REG, 0, (s32)off);
        put8(e, 0x66);
        op_mem(e, false, X_STORE, scratch, p.base, p.index, p.scale, p.disp);
        return true;
    }
    unsigned g = tr_gpr(&d->opnd[0]), host = tr_resident(g) ? g : S1;
    bool small = d->opnd[0].size == 16;
    if (small && host == S1)
        return false;
    op_gs(e, true, X_LOAD, S1, OFF(x));
    if (small)
        put8(e, 0x66);
    PUT(e, (host & 8 ? 0x45 : 0x41));                              /* movzx host, word [r15 + off]; or mov */
    if (small)
        put8(e, 0x8b);
    else
        PUT(e, 0x0f, 0xb7);
    put_mem(e, host, S1, NO_REG, 0, (s32)off);
    if (host == S1)
        tr_write(t, g, S1);
    return true;
}

bool tr_misc(struct tr *t, const struct op *op)
{
    const struct decoded *d = &tr_item(t)->d;
    if (d->insn.address_width != 64)
        return false;
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_ANDN: case ZYDIS_MNEMONIC_BEXTR: case ZYDIS_MNEMONIC_BZHI: case ZYDIS_MNEMONIC_PDEP: case ZYDIS_MNEMONIC_PEXT:
    case ZYDIS_MNEMONIC_BLSI: case ZYDIS_MNEMONIC_BLSMSK: case ZYDIS_MNEMONIC_BLSR: case ZYDIS_MNEMONIC_RORX: case ZYDIS_MNEMONIC_SARX:
    case ZYDIS_MNEMONIC_SHLX: case ZYDIS_MNEMONIC_SHRX: case ZYDIS_MNEMONIC_MULX:
    case ZYDIS_MNEMONIC_MOVBE: case ZYDIS_MNEMONIC_MOVNTI: case ZYDIS_MNEMONIC_CRC32: case ZYDIS_MNEMONIC_ADCX: case ZYDIS_MNEMONIC_ADOX:
    case ZYDIS_MNEMONIC_RDRAND: case ZYDIS_MNEMONIC_RDSEED:
    case ZYDIS_MNEMONIC_CMPXCHG8B: case ZYDIS_MNEMONIC_CMPXCHG16B:
    case ZYDIS_MNEMONIC_LFENCE: case ZYDIS_MNEMONIC_SFENCE: case ZYDIS_MNEMONIC_MFENCE:
        return copied(t, op);
    case ZYDIS_MNEMONIC_PAUSE:
        return spin(t, op);
    case ZYDIS_MNEMONIC_PREFETCH: case ZYDIS_MNEMONIC_PREFETCHNTA: case ZYDIS_MNEMONIC_PREFETCHT0: case ZYDIS_MNEMONIC_PREFETCHT1:
    case ZYDIS_MNEMONIC_PREFETCHT2: case ZYDIS_MNEMONIC_PREFETCHW: case ZYDIS_MNEMONIC_PREFETCHWT1:
        return prefetch(t, op);
    case ZYDIS_MNEMONIC_CLFLUSH: case ZYDIS_MNEMONIC_CLFLUSHOPT: case ZYDIS_MNEMONIC_CLWB:
        return flush_line(t, op);
    case ZYDIS_MNEMONIC_MOV:
        return from_segment(t, op);
    case ZYDIS_MNEMONIC_MOVSD: case ZYDIS_MNEMONIC_CMPSD:          /* of SSE2 have OPF_FP */
        return tr_string(t, op);
    case ZYDIS_MNEMONIC_CLD:
        return direction(t, 0);
    case ZYDIS_MNEMONIC_STD:
        return direction(t, 1);
    default:
        return false;
    }
}
