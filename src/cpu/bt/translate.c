/*
 * One block of guest code to host code. Register conventions and the life of a translation: bt.h; encodings: Intel SDM vol. 2.
 *
 * Where the guest's arithmetic flags are is known at each point of a translation: in the host's RFLAGS, in icpu.fl, or in both. They are saved before anything that
 * may fault, so that a fault's frame shows them, and before inserted code destroys them.
 */
#include <string.h>

#include "cpu/bt/bt.h"
#include "cpu/bt/emit.h"
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"
#include "cpu/interp/tlb.h"

#define OFF(field) offsetof(struct icpu, field)
#define OFF_R(g) (OFF(r[0]) + 8u * (g))
enum { S0 = 14, S1 = 15 };                                         /* scratch: S1 holds addresses, S0 what comes and goes */
#define HOST_RSP 11u

enum kind { K_HELPER, K_PLAIN, K_NOTHING, K_LEA, K_JCC, K_JMP, K_CALL, K_RET, K_PUSH, K_POP, K_LEAVE };

struct item {
    struct decoded d;
    u8 kind;
    bool reads, writes;                                            /* arithmetic flags; what does not write all of them reads, too */
};

struct cold {
    u8 *from;                                                      /* the displacement that leads here */
    const u8 *back;                                                /* NULL: does not come back */
    const struct op *op;                                           /* whose handler is to run; NULL: a jump */
    u64 target;                                                    /* of the jump, from the page's start */
    unsigned insns;                                                /* completed when it is made */
    bool save, restore;                                            /* flags: first to icpu.fl; afterwards from there */
};

struct tr {
    struct emit e;
    struct icpu *c;
    struct bt *t;
    struct block *b;
    const u8 *entry;                                               /* in the writable mapping */
    unsigned offset;                                               /* of the block in its page */
    bool host, mem;                                                /* the flags are in RFLAGS; in icpu.fl */
    unsigned i;                                                    /* the op that is being translated */
    struct item item[BLOCK_OPS];
    struct cold cold[3 * BLOCK_OPS + 4];
    unsigned colds;
};

/* ---- registers ---- */
static bool resident(unsigned g)
{
    return g != 11 && g != 14 && g != 15;
}

static unsigned host_of(unsigned g)                                /* of a resident one */
{
    return g == RSP ? HOST_RSP : g;
}

/* ---- flags ---- */
static void put_flags_save(struct emit *e)                         /* uses S1 */
{
    op_rr(e, true, X_STORE, RAX, S1);
    PUT(e, 0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb7, 0xc0);              /* lahf; seto al; movzx eax, ax */
    op_gs(e, false, X_STORE, RAX, OFF(fl));
    op_rr(e, true, X_STORE, S1, RAX);
}

static void put_flags_restore(struct emit *e)                      /* uses S0 */
{
    op_rr(e, true, X_STORE, RAX, S0);
    op_gs(e, false, X_LOAD, RAX, OFF(fl));
    PUT(e, 0x04, 0x7f, 0x9e);                                      /* add al, 0x7f (overflows if bit 0 is set); sahf */
    op_rr(e, true, X_STORE, S0, RAX);
}

static void flags_save(struct tr *t)
{
    if (t->host && !t->mem) {
        put_flags_save(&t->e);
        t->mem = true;
    }
}

static void flags_want(struct tr *t)
{
    if (!t->host) {
        put_flags_restore(&t->e);
        t->host = true;
    }
}

/* Code that is about to be inserted destroys RFLAGS. */
static void flags_lose(struct tr *t)
{
    flags_save(t);
    t->host = false;
}

/* ---- ways out ---- */
static const u8 *routine(const struct tr *t, u32 off)
{
    return t->t->rw + off;
}

/* insns of this block have been completed where it is left here. Uses S0; destroys no flags. */
static void put_count(struct tr *t, unsigned insns)
{
    if (!t->c->bt.count)
        return;
    op_gs(&t->e, true, X_LOAD, S0, OFF(bt.insns));
    op_mem(&t->e, true, X_LEA, S0, S0, NO_REG, 0, (s32)insns);
    op_gs(&t->e, true, X_STORE, S0, OFF(bt.insns));
}

/* The flags are in icpu.fl. target: from the start of this code's page. */
static void put_exit(struct tr *t, u64 target, unsigned insns)
{
    struct emit *e = &t->e;
    put_count(t, insns);
    if (target < PAGE_SIZE) {
        u8 *stop = NULL;
        if (target <= t->offset + t->b->len) {                     /* backwards, perhaps a loop */
            op_gs(e, false, 0x83, 7, OFF(bt.stop));                /* cmp dword [stop], 0 */
            put8(e, 0);
            stop = jump_if(e, CC_NZ);
        }
        u8 *place = jump(e);
        if (e->overflow)
            return;
        aim(place, e->p);
        if (stop)
            aim(stop, e->p);
        op_gs(e, false, 0xc7, 0, OFF(bt.exit_offset));             /* mov dword [], imm */
        put32(e, (u32)target);
        op_gs(e, false, 0xc7, 0, OFF(bt.exit_patch));
        put32(e, (u32)(place - t->t->rw));
        jump_to(e, routine(t, t->t->leave_direct));
        return;
    }
    op_gs(e, true, X_LOAD, S1, OFF(bt.page));
    op_mem(e, true, X_LEA, S1, S1, NO_REG, 0, (s32)target);
    jump_to(e, routine(t, t->t->find));
}

static struct cold *cold_from(struct tr *t, u8 *from)
{
    bug_on(t->colds == ARRAY_SIZE(t->cold));
    struct cold *k = &t->cold[t->colds++];
    *k = (struct cold){ .from = from, .insns = t->i + 1 };
    return k;
}

static void put_handler_call(struct tr *t, const struct op *op)
{
    struct emit *e = &t->e;
    mov_imm64(e, S1, (u64)(uintptr_t)op);
    mov_imm64(e, S0, (u64)(uintptr_t)t->b);
    call_to(e, routine(t, t->t->handler));
}

static void put_cold(struct tr *t, const struct cold *k)
{
    struct emit *e = &t->e;
    if (e->overflow)
        return;
    aim(k->from, e->p);
    if (k->save)
        put_flags_save(e);
    if (!k->op) {
        put_exit(t, k->target, k->insns);
        return;
    }
    put_handler_call(t, k->op);
    if (k->restore)
        put_flags_restore(e);
    if (k->back)
        jump_to(e, k->back);
    else
        PUT(e, 0x0f, 0x0b);
}

static void put_helper(struct tr *t, const struct op *op)
{
    flags_save(t);
    put_handler_call(t, op);
    t->host = false;
    t->mem = true;
}

/* ---- memory operands ---- */
struct ea {
    unsigned base, index, scale;                                   /* guest registers, REG_ZERO, REG_RIP */
    unsigned seg;
    s32 disp;
};

static bool ea_of(const struct tr *t, const struct op *op, struct ea *m)
{
    s64 disp = op->disp + (op->base == REG_RIP ? t->offset : 0);
    *m = (struct ea){ op->base, op->index, op->scale, op->seg, (s32)disp };
    return disp == (s32)disp && op->asize == 8;
}

/* dst = linear address; tmp may be used. Neither is a guest register. */
static void put_ea(struct emit *e, unsigned dst, unsigned tmp, const struct ea *m)
{
    unsigned base = NO_REG, index = NO_REG;
    if (m->base == REG_RIP || (m->base != REG_ZERO && !resident(m->base))) {
        op_gs(e, true, X_LOAD, dst, m->base == REG_RIP ? OFF(bt.page) : OFF_R(m->base));
        base = dst;
    } else if (m->base != REG_ZERO) {
        base = host_of(m->base);
    }
    if (m->index != REG_ZERO && !resident(m->index)) {
        op_gs(e, true, X_LOAD, tmp, OFF_R(m->index));
        index = tmp;
    } else if (m->index != REG_ZERO) {
        index = host_of(m->index);
    }
    op_mem(e, true, X_LEA, dst, base, index, m->scale, m->disp);
    if (m->seg >= SEG_FS) {
        op_gs(e, true, X_LOAD, tmp, OFF(x));
        op_mem(e, true, X_ADD, dst, tmp, NO_REG, 0, (s32)(offsetof(struct x86, seg) + m->seg * sizeof(struct x86_seg) + offsetof(struct x86_seg, base)));
    }
}

/*
 * The look-up of n bytes at m. On a hit S1 holds what leads from linear to host address; on a miss op's handler runs instead, and
 * what follows resumes at the place that the caller gives the cold part. RFLAGS are lost.
 */
static struct cold *put_lookup(struct tr *t, const struct op *op, const struct ea *m, unsigned n, enum mmu_access access)
{
    struct emit *e = &t->e;
    put_ea(e, S1, S0, m);
    op_rr(e, true, X_STORE, S1, S0);
    PUT(e, 0x49, 0xc1, 0xee, PAGE_SHIFT - 5);                      /* shr r14: the entry's offset, 32 bytes each */
    _Static_assert(sizeof(struct tlb_entry) == 32, "shifted by 5");
    alu_imm(e, false, 4, S0, (s32)((TLB_SIZE - 1) << 5));
    op_gs(e, true, X_ADD, S0, OFF(view));
    if (n > 1)
        alu_imm(e, true, 0, S1, (s32)n - 1);
    alu_imm(e, true, 4, S1, -4096);
    op_mem(e, true, X_CMP, S1, S0, NO_REG, 0, (s32)(offsetof(struct tlb_entry, tag) + 8 * access));
    struct cold *k = cold_from(t, jump_if(e, CC_NZ));
    k->op = op;
    op_mem(e, true, X_LOAD, S1, S0, NO_REG, 0, offsetof(struct tlb_entry, addend));
    return k;
}

struct place {                                                     /* a host memory operand */
    unsigned base, index, scale;
    s32 disp;
};

/* After put_lookup(): the host address of m as an operand. Uses S0 perhaps; destroys RFLAGS perhaps. */
static struct place put_place(struct emit *e, const struct ea *m)
{
    bool simple = m->seg < SEG_FS && m->index == REG_ZERO && m->base < 16 && resident(m->base);
    if (simple)
        return (struct place){ host_of(m->base), S1, 0, m->disp };
    if (m->base == REG_RIP || (m->base != REG_ZERO && !resident(m->base)))
        op_gs(e, true, X_ADD, S1, m->base == REG_RIP ? OFF(bt.page) : OFF_R(m->base));
    else if (m->base != REG_ZERO)
        op_mem(e, true, X_LEA, S1, S1, host_of(m->base), 0, 0);
    if (m->seg >= SEG_FS) {
        op_gs(e, true, X_LOAD, S0, OFF(x));
        op_mem(e, true, X_ADD, S1, S0, NO_REG, 0, (s32)(offsetof(struct x86, seg) + m->seg * sizeof(struct x86_seg) + offsetof(struct x86_seg, base)));
    }
    if (m->index != REG_ZERO && !resident(m->index)) {
        op_gs(e, true, X_LOAD, S0, OFF_R(m->index));
        op_mem(e, true, X_LEA, S1, S1, S0, m->scale, 0);
    } else if (m->index != REG_ZERO) {
        return (struct place){ S1, host_of(m->index), m->scale, m->disp };
    }
    return (struct place){ S1, NO_REG, 0, m->disp };
}

/* ---- instructions that are copied, with other registers and another address ---- */
struct copy {
    const ZydisDecodedOperand *reg, *rm, *mem;                     /* ModRM.reg; ModRM.rm or the opcode's low bits; memory */
};

static struct copy copy_of(const struct decoded *d)
{
    struct copy k = { 0 };
    for (unsigned i = 0; i < d->insn.operand_count; i++) {
        const ZydisDecodedOperand *o = &d->opnd[i];
        if (o->type == ZYDIS_OPERAND_TYPE_MEMORY)
            k.mem = o;
        else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
            k.reg = o;
        else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM || o->encoding == ZYDIS_OPERAND_ENCODING_OPCODE))
            k.rm = o;
    }
    return k;
}

static unsigned operand_gpr(const ZydisDecodedOperand *o)
{
    bool high;
    unsigned n = decode_gpr(o->reg.value, &high);
    return high ? n + 4 : n;                                       /* as encoded without REX */
}

static bool is_high(const ZydisDecodedOperand *o)
{
    return o && o->reg.value >= ZYDIS_REGISTER_AH && o->reg.value <= ZYDIS_REGISTER_BH;
}

static bool needs_rex(const ZydisDecodedOperand *o)                /* SPL BPL SIL DIL */
{
    return o && o->reg.value >= ZYDIS_REGISTER_SPL && o->reg.value <= ZYDIS_REGISTER_DIL;
}

/* The host register for a guest operand: AH..BH are encoded as 4..7, and stay. */
static unsigned operand_host(const ZydisDecodedOperand *o, unsigned scratch)
{
    if (is_high(o))
        return operand_gpr(o);
    unsigned g = operand_gpr(o);
    return resident(g) ? host_of(g) : scratch;
}

static void put_copy(struct emit *e, const struct decoded *d, unsigned reg, unsigned rm, const struct place *m, bool rex_wanted)
{
    const ZydisDecodedInstruction *z = &d->insn;
    unsigned op = z->raw.prefix_count, modrm = z->raw.modrm.offset, imm = z->length, rex;
    for (unsigned i = 0; i < z->raw.prefix_count; i++) {
        u8 v = z->raw.prefixes[i].value;
        bool used = v == 0x66 ? z->raw.prefixes[i].type != ZYDIS_PREFIX_TYPE_IGNORED : z->raw.prefixes[i].type == ZYDIS_PREFIX_TYPE_MANDATORY;
        if ((v == 0x66 || v == 0xf2 || v == 0xf3) && used)
            put8(e, v);
    }
    if (z->attributes & ZYDIS_ATTRIB_HAS_LOCK)
        put8(e, 0xf0);
    for (unsigned i = 0; i < 2; i++)
        if (z->raw.imm[i].size && z->raw.imm[i].offset < imm)
            imm = z->raw.imm[i].offset;
    rex = z->raw.rex.W ? 8u : 0u;
    rex |= m ? rex_bits(reg, m->base, m->index) : rex_bits(reg, rm, NO_REG);
    if (rex || rex_wanted)
        put8(e, 0x40 | rex);
    if (!modrm) {
        for (; op < imm - 1u; op++)
            put8(e, d->bytes[op]);
        put8(e, (d->bytes[op] & ~7u) | (rm & 7));                  /* the register is in the opcode's low bits */
    } else {
        put_bytes(e, d->bytes + op, modrm - op);
        if (m)
            put_mem(e, reg, m->base, m->index, m->scale, m->disp);
        else
            put8(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
    }
    put_bytes(e, d->bytes + imm, z->length - imm);
}

/* Instructions without ModRM and without a register in the opcode: all their registers are implied ones. */
static bool implied_only(const struct decoded *d, const struct copy *k)
{
    return !d->insn.raw.modrm.offset && !k->rm;
}

static bool put_plain(struct tr *t, const struct item *it, const struct op *op)
{
    struct emit *e = &t->e;
    const struct decoded *d = &it->d;
    struct copy k = copy_of(d);
    struct cold *cold = NULL;
    struct place place;
    bool rex = needs_rex(k.reg) || needs_rex(k.rm), high = is_high(k.reg) || is_high(k.rm);
    unsigned reg = k.reg ? operand_host(k.reg, S0) : d->insn.raw.modrm.reg, rm = k.rm ? operand_host(k.rm, S1) : 0;
    bool load_reg = k.reg && !is_high(k.reg) && reg == S0, load_rm = k.rm && !is_high(k.rm) && rm == S1;
    struct ea ea;
    if (high && (k.mem || rex || reg >= 8 || rm >= 8 || d->insn.raw.rex.W))
        return false;
    if (k.mem && !ea_of(t, op, &ea))
        return false;
    if (k.mem) {
        bool write = k.mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
        flags_lose(t);
        cold = put_lookup(t, op, &ea, k.mem->size / 8, write ? MMU_WRITE : MMU_READ);
        place = put_place(e, &ea);
    }
    if (it->reads)
        flags_want(t);
    if (load_reg)
        op_gs(e, true, X_LOAD, S0, OFF_R(operand_gpr(k.reg)));
    if (load_rm)
        op_gs(e, true, X_LOAD, S1, OFF_R(operand_gpr(k.rm)));
    if (implied_only(d, &k)) {
        for (unsigned i = 0; i < d->insn.raw.prefix_count; i++)   /* CBW and its like, operations on the accumulator with an immediate */
            if (d->insn.raw.prefixes[i].value == 0x66 && d->insn.raw.prefixes[i].type != ZYDIS_PREFIX_TYPE_IGNORED) {
                put8(e, 0x66);
                break;
            }
        if (d->insn.raw.rex.W)
            put8(e, 0x48);
        put_bytes(e, d->bytes + d->insn.raw.prefix_count, d->insn.length - d->insn.raw.prefix_count);
    } else {
        put_copy(e, d, reg, rm, k.mem ? &place : NULL, rex);
    }
    if (load_reg && k.reg->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
        op_gs(e, true, X_STORE, S0, OFF_R(operand_gpr(k.reg)));
    if (load_rm && k.rm->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
        op_gs(e, true, X_STORE, S1, OFF_R(operand_gpr(k.rm)));
    if (it->writes) {
        t->host = true;
        t->mem = false;
    }
    if (cold) {
        cold->back = e->p;
        cold->restore = t->host;
    }
    return true;
}

static bool put_lea(struct tr *t, const struct item *it, const struct op *op)
{
    struct emit *e = &t->e;
    struct copy k = copy_of(&it->d);
    struct ea ea;
    if (!k.reg || !ea_of(t, op, &ea))
        return false;
    unsigned reg = operand_host(k.reg, S0);
    struct place p = { NO_REG, NO_REG, ea.scale, ea.disp };
    if (ea.base == REG_RIP || (ea.base != REG_ZERO && !resident(ea.base))) {
        op_gs(e, true, X_LOAD, S1, ea.base == REG_RIP ? OFF(bt.page) : OFF_R(ea.base));
        p.base = S1;
    } else if (ea.base != REG_ZERO) {
        p.base = host_of(ea.base);
    }
    if (ea.index != REG_ZERO && !resident(ea.index)) {
        op_gs(e, true, X_LOAD, S0, OFF_R(ea.index));
        p.index = S0;
    } else if (ea.index != REG_ZERO) {
        p.index = host_of(ea.index);
    }
    if (reg == S0 && it->d.insn.operand_width == 16) {             /* the rest of the register stays */
        if (p.index == S0)
            return false;
        op_gs(e, true, X_LOAD, S0, OFF_R(operand_gpr(k.reg)));
    }
    put_copy(e, &it->d, reg, 0, &p, false);
    if (reg == S0)
        op_gs(e, true, X_STORE, S0, OFF_R(operand_gpr(k.reg)));
    return true;
}

/* ---- the stack ---- */
static const struct ea below_rsp = { RSP, REG_ZERO, 0, SEG_SS, -8 }, at_rsp = { RSP, REG_ZERO, 0, SEG_SS, 0 };

static bool put_push(struct tr *t, const struct item *it, const struct op *op)
{
    struct emit *e = &t->e;
    const ZydisDecodedOperand *o = &it->d.opnd[0];
    if (op->size != 8 || o->type == ZYDIS_OPERAND_TYPE_MEMORY)
        return false;
    flags_lose(t);
    struct cold *cold = put_lookup(t, op, &below_rsp, 8, MMU_WRITE);
    if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        op_mem(e, true, 0xc7, 0, HOST_RSP, S1, 0, -8);
        put32(e, (u32)op->imm);
    } else {
        unsigned g = operand_gpr(o);
        if (!resident(g))
            op_gs(e, true, X_LOAD, S0, OFF_R(g));
        op_mem(e, true, X_STORE, resident(g) ? host_of(g) : S0, HOST_RSP, S1, 0, -8);
    }
    op_mem(e, true, X_LEA, HOST_RSP, HOST_RSP, NO_REG, 0, -8);
    cold->back = e->p;
    return true;
}

static bool put_pop(struct tr *t, const struct item *it, const struct op *op)
{
    struct emit *e = &t->e;
    const ZydisDecodedOperand *o = &it->d.opnd[0];
    if (op->size != 8 || o->type != ZYDIS_OPERAND_TYPE_REGISTER)
        return false;
    unsigned g = operand_gpr(o);
    flags_lose(t);
    struct cold *cold = put_lookup(t, op, &at_rsp, 8, MMU_READ);
    op_mem(e, true, X_LOAD, resident(g) ? host_of(g) : S0, HOST_RSP, S1, 0, 0);
    if (!resident(g))
        op_gs(e, true, X_STORE, S0, OFF_R(g));
    if (g != RSP)
        op_mem(e, true, X_LEA, HOST_RSP, HOST_RSP, NO_REG, 0, 8);
    cold->back = e->p;
    return true;
}

static bool put_leave_insn(struct tr *t, const struct op *op)
{
    static const struct ea at_rbp = { RBP, REG_ZERO, 0, SEG_SS, 0 };
    struct emit *e = &t->e;
    if (op->size != 8)
        return false;
    flags_lose(t);
    struct cold *cold = put_lookup(t, op, &at_rbp, 8, MMU_READ);
    op_mem(e, true, X_LEA, HOST_RSP, RBP, NO_REG, 0, 8);
    op_mem(e, true, X_LOAD, RBP, RBP, S1, 0, 0);
    cold->back = e->p;
    return true;
}

/* ---- branches ---- */
static void put_jcc(struct tr *t, unsigned cc, u64 target)
{
    flags_want(t);
    struct cold *k = cold_from(t, jump_if(&t->e, cc));
    k->target = target;
    k->save = !t->mem;
}

/* Leaves for op's handler when the target in S1 is not canonical. Uses S0. */
static void put_canonical(struct tr *t, const struct op *op)
{
    struct emit *e = &t->e;
    op_rr(e, true, X_STORE, S1, S0);
    PUT(e, 0x49, 0xc1, 0xe6, 16, 0x49, 0xc1, 0xfe, 16);            /* shl r14, 16; sar r14, 16 */
    op_rr(e, true, X_CMP, S0, S1);
    cold_from(t, jump_if(e, CC_NZ))->op = op;
}

/* The target of an indirect branch to S1. */
static bool put_target(struct tr *t, const struct item *it, const struct op *op)
{
    struct emit *e = &t->e;
    const ZydisDecodedOperand *o = &it->d.opnd[0];
    if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
        unsigned g = operand_gpr(o);
        if (g == RSP)
            return false;
        if (resident(g))
            op_rr(e, true, X_STORE, host_of(g), S1);
        else
            op_gs(e, true, X_LOAD, S1, OFF_R(g));
    } else {
        struct ea ea;
        if (o->type != ZYDIS_OPERAND_TYPE_MEMORY || o->size != 64 || !ea_of(t, op, &ea))
            return false;
        put_lookup(t, op, &ea, 8, MMU_READ);
        struct place p = put_place(e, &ea);
        op_mem(e, true, X_LOAD, S1, p.base, p.index, p.scale, p.disp);
    }
    put_canonical(t, op);
    return true;
}

static bool put_jmp(struct tr *t, const struct item *it, const struct op *op)
{
    flags_save(t);
    if (it->d.opnd[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        put_exit(t, t->offset + (u64)op->disp, t->i + 1);
        return true;
    }
    t->host = false;
    if (!put_target(t, it, op))
        return false;
    put_count(t, t->i + 1);
    jump_to(&t->e, routine(t, t->t->find));
    return true;
}

static bool put_call(struct tr *t, const struct item *it, const struct op *op)
{
    struct emit *e = &t->e;
    bool direct = it->d.opnd[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
    flags_save(t);
    t->host = false;
    if (!direct) {
        if (!put_target(t, it, op))
            return false;
        op_gs(e, true, X_STORE, S1, OFF(bt.tmp));
    }
    put_lookup(t, op, &below_rsp, 8, MMU_WRITE);
    op_gs(e, true, X_LOAD, S0, OFF(bt.page));
    op_mem(e, true, X_LEA, S0, S0, NO_REG, 0, (s32)(t->offset + op->off + op->len));
    op_mem(e, true, X_STORE, S0, HOST_RSP, S1, 0, -8);
    op_mem(e, true, X_LEA, HOST_RSP, HOST_RSP, NO_REG, 0, -8);
    if (direct) {
        put_exit(t, t->offset + (u64)op->disp, t->i + 1);
    } else {
        op_gs(e, true, X_LOAD, S1, OFF(bt.tmp));
        put_count(t, t->i + 1);
        jump_to(e, routine(t, t->t->find));
    }
    return true;
}

static bool put_ret(struct tr *t, const struct op *op)
{
    struct emit *e = &t->e;
    flags_save(t);
    t->host = false;
    put_lookup(t, op, &at_rsp, 8, MMU_READ);
    op_mem(e, true, X_LOAD, S1, HOST_RSP, S1, 0, 0);
    put_canonical(t, op);
    op_mem(e, true, X_LEA, HOST_RSP, HOST_RSP, NO_REG, 0, 8 + (s32)op->imm);
    put_count(t, t->i + 1);
    jump_to(e, routine(t, t->t->find));
    return true;
}

/* ---- what an instruction is ---- */
static enum kind plain_or_not(const struct decoded *d, const struct op *op)
{
    for (unsigned i = 0; i < d->insn.operand_count; i++) {
        const ZydisDecodedOperand *o = &d->opnd[i];
        bool hidden = o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN;
        if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
            unsigned n = o->size / 8;
            if (hidden || !(op->flags & OPF_MEM) || (n != 1 && n != 2 && n != 4 && n != 8))
                return K_HELPER;
        }
        if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
            ZydisRegisterClass c = ZydisRegisterGetClass(o->reg.value);
            bool gpr = c == ZYDIS_REGCLASS_GPR8 || c == ZYDIS_REGCLASS_GPR16 || c == ZYDIS_REGCLASS_GPR32 || c == ZYDIS_REGCLASS_GPR64;
            bool encoded = o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG || o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM ||
                           o->encoding == ZYDIS_OPERAND_ENCODING_OPCODE;
            if (!gpr && c != ZYDIS_REGCLASS_FLAGS)
                return K_HELPER;
            if (gpr && !encoded && operand_gpr(o) > 2 && !is_high(o))
                return K_HELPER;                                   /* implied ones: only RAX, RCX, RDX have their own numbers here */
        }
        if (o->type == ZYDIS_OPERAND_TYPE_POINTER)
            return K_HELPER;
    }
    return K_PLAIN;
}

/* Does the displacement still fit when it counts from the page's start? */
static bool near_enough(const struct op *op)
{
    return op->disp + (s64)PAGE_SIZE == (s32)(op->disp + (s64)PAGE_SIZE);
}

static enum kind kind_of(const struct decoded *d, const struct op *op)
{
    const ZydisDecodedInstruction *z = &d->insn;
    if (z->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || op->fn == op_ud || z->address_width != 64)
        return K_HELPER;
    switch (z->mnemonic) {
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        if (op->flags & OPF_MEM && d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER)
            return K_HELPER;                                       /* a bit string: the address depends on the register */
        return plain_or_not(d, op);
    case ZYDIS_MNEMONIC_MOV:
        if (z->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && z->opcode >= 0xa0 && z->opcode <= 0xa3)
            return K_HELPER;
        return plain_or_not(d, op);
    case ZYDIS_MNEMONIC_MOVZX: case ZYDIS_MNEMONIC_MOVSX: case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_ADC: case ZYDIS_MNEMONIC_SBB: case ZYDIS_MNEMONIC_AND: case ZYDIS_MNEMONIC_SUB:
    case ZYDIS_MNEMONIC_XOR: case ZYDIS_MNEMONIC_CMP: case ZYDIS_MNEMONIC_TEST: case ZYDIS_MNEMONIC_INC: case ZYDIS_MNEMONIC_DEC: case ZYDIS_MNEMONIC_NEG:
    case ZYDIS_MNEMONIC_NOT: case ZYDIS_MNEMONIC_ROL: case ZYDIS_MNEMONIC_ROR: case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR: case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR: case ZYDIS_MNEMONIC_SHLD: case ZYDIS_MNEMONIC_SHRD: case ZYDIS_MNEMONIC_MUL: case ZYDIS_MNEMONIC_IMUL:
    case ZYDIS_MNEMONIC_BSWAP: case ZYDIS_MNEMONIC_BSF: case ZYDIS_MNEMONIC_BSR: case ZYDIS_MNEMONIC_TZCNT: case ZYDIS_MNEMONIC_LZCNT:
    case ZYDIS_MNEMONIC_POPCNT: case ZYDIS_MNEMONIC_CBW: case ZYDIS_MNEMONIC_CWDE: case ZYDIS_MNEMONIC_CDQE: case ZYDIS_MNEMONIC_CWD:
    case ZYDIS_MNEMONIC_CDQ: case ZYDIS_MNEMONIC_CQO: case ZYDIS_MNEMONIC_XADD: case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_XCHG:
    case ZYDIS_MNEMONIC_CMOVO: case ZYDIS_MNEMONIC_CMOVNO: case ZYDIS_MNEMONIC_CMOVB: case ZYDIS_MNEMONIC_CMOVNB: case ZYDIS_MNEMONIC_CMOVZ:
    case ZYDIS_MNEMONIC_CMOVNZ: case ZYDIS_MNEMONIC_CMOVBE: case ZYDIS_MNEMONIC_CMOVNBE: case ZYDIS_MNEMONIC_CMOVS: case ZYDIS_MNEMONIC_CMOVNS:
    case ZYDIS_MNEMONIC_CMOVP: case ZYDIS_MNEMONIC_CMOVNP: case ZYDIS_MNEMONIC_CMOVL: case ZYDIS_MNEMONIC_CMOVNL: case ZYDIS_MNEMONIC_CMOVLE:
    case ZYDIS_MNEMONIC_CMOVNLE: case ZYDIS_MNEMONIC_SETO: case ZYDIS_MNEMONIC_SETNO: case ZYDIS_MNEMONIC_SETB: case ZYDIS_MNEMONIC_SETNB:
    case ZYDIS_MNEMONIC_SETZ: case ZYDIS_MNEMONIC_SETNZ: case ZYDIS_MNEMONIC_SETBE: case ZYDIS_MNEMONIC_SETNBE: case ZYDIS_MNEMONIC_SETS:
    case ZYDIS_MNEMONIC_SETNS: case ZYDIS_MNEMONIC_SETP: case ZYDIS_MNEMONIC_SETNP: case ZYDIS_MNEMONIC_SETL: case ZYDIS_MNEMONIC_SETNL:
    case ZYDIS_MNEMONIC_SETLE: case ZYDIS_MNEMONIC_SETNLE:
        return plain_or_not(d, op);
    case ZYDIS_MNEMONIC_NOP: case ZYDIS_MNEMONIC_ENDBR64: case ZYDIS_MNEMONIC_ENDBR32:
        return K_NOTHING;
    case ZYDIS_MNEMONIC_LEA:
        return K_LEA;
    case ZYDIS_MNEMONIC_JO: case ZYDIS_MNEMONIC_JNO: case ZYDIS_MNEMONIC_JB: case ZYDIS_MNEMONIC_JNB: case ZYDIS_MNEMONIC_JZ: case ZYDIS_MNEMONIC_JNZ:
    case ZYDIS_MNEMONIC_JBE: case ZYDIS_MNEMONIC_JNBE: case ZYDIS_MNEMONIC_JS: case ZYDIS_MNEMONIC_JNS: case ZYDIS_MNEMONIC_JP: case ZYDIS_MNEMONIC_JNP:
    case ZYDIS_MNEMONIC_JL: case ZYDIS_MNEMONIC_JNL: case ZYDIS_MNEMONIC_JLE: case ZYDIS_MNEMONIC_JNLE:
        return near_enough(op) ? K_JCC : K_HELPER;
    case ZYDIS_MNEMONIC_JMP:
        return sys_form(d) || !near_enough(op) ? K_HELPER : K_JMP;
    case ZYDIS_MNEMONIC_CALL:
        return sys_form(d) || !near_enough(op) ? K_HELPER : K_CALL;
    case ZYDIS_MNEMONIC_RET:
        return sys_form(d) ? K_HELPER : K_RET;
    case ZYDIS_MNEMONIC_PUSH:
        return sys_form(d) ? K_HELPER : K_PUSH;
    case ZYDIS_MNEMONIC_POP:
        return sys_form(d) ? K_HELPER : K_POP;
    case ZYDIS_MNEMONIC_LEAVE:
        return K_LEAVE;
    default:
        return K_HELPER;
    }
}

/* Shifts and rotates leave flags alone when their count is 0; all but full overwriting wants the old flags. */
static void flags_of(struct item *it)
{
    const ZydisDecodedInstruction *z = &it->d.insn;
    u32 tested = 0, written = 0;
    if (z->cpu_flags) {
        tested = z->cpu_flags->tested & FLAGS_ARITH;
        written = (z->cpu_flags->modified | z->cpu_flags->set_0 | z->cpu_flags->set_1 | z->cpu_flags->undefined) & FLAGS_ARITH;
    }
    bool shift = z->meta.category == ZYDIS_CATEGORY_SHIFT || z->meta.category == ZYDIS_CATEGORY_ROTATE || z->mnemonic == ZYDIS_MNEMONIC_SHLD ||
                 z->mnemonic == ZYDIS_MNEMONIC_SHRD;
    const ZydisDecodedOperand *count = &it->d.opnd[z->mnemonic == ZYDIS_MNEMONIC_SHLD || z->mnemonic == ZYDIS_MNEMONIC_SHRD ? 2 : 1];
    if (shift && (count->type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !(count->imm.value.u & 31)))
        tested |= written;
    it->writes = written;
    it->reads = tested || (written && written != FLAGS_ARITH);
}

static void analyse(struct tr *t)
{
    struct block *b = t->b;
    for (unsigned i = 0; i < b->n; i++) {
        struct item *it = &t->item[i];
        it->d.bytes = b->bytes + b->op[i].off;
        it->d.mode = IMODE_LONG64;
        if (ZYAN_FAILED(ZydisDecoderDecodeFull(&t->c->code->decoder[IMODE_LONG64], it->d.bytes, b->op[i].len, &it->d.insn, it->d.opnd)) ||
            it->d.insn.length != b->op[i].len) {
            it->kind = K_HELPER;
            continue;
        }
        it->kind = (u8)kind_of(&it->d, &b->op[i]);
        flags_of(it);
    }
}

/* ---- the block ---- */
/* Compares the guest's bytes, 8 at a time, with what they were. */
static void put_prologue(struct tr *t, const u8 *stale)
{
    struct emit *e = &t->e;
    const struct block *b = t->b;
    u64 host = (u64)(uintptr_t)ram_hva(t->c->v->m->ram, b->gpa);
    PUT(e, 0x49, 0xbf);                                            /* mov r15, imm64: 10 bytes, which bt_forget() overwrites */
    put64(e, host);
    unsigned i = 0;
    for (; i + 8 <= b->len; i += 8) {
        u64 v;
        memcpy(&v, b->bytes + i, 8);
        PUT(e, 0x49, 0xbe);
        put64(e, v);
        op_mem(e, true, X_CMP, S0, S1, NO_REG, 0, (s32)i);
        jump_if_to(e, CC_NZ, stale);
    }
    if (i + 4 <= b->len) {
        op_mem(e, false, 0x81, 7, S1, NO_REG, 0, (s32)i);
        put_bytes(e, b->bytes + i, 4);
        jump_if_to(e, CC_NZ, stale);
        i += 4;
    }
    if (i + 2 <= b->len) {
        put8(e, 0x66);
        op_mem(e, false, 0x81, 7, S1, NO_REG, 0, (s32)i);
        put_bytes(e, b->bytes + i, 2);
        jump_if_to(e, CC_NZ, stale);
        i += 2;
    }
    if (i < b->len) {
        op_mem(e, false, 0x80, 7, S1, NO_REG, 0, (s32)i);
        put8(e, b->bytes[i]);
        jump_if_to(e, CC_NZ, stale);
    }
}

/* True: the block does not go on behind it. */
static bool put_item(struct tr *t, const struct item *it, const struct op *op)
{
    bool done = true, last = false;
    switch (it->kind) {
    case K_PLAIN: done = put_plain(t, it, op); break;
    case K_NOTHING: break;
    case K_LEA: done = put_lea(t, it, op); break;
    case K_JCC: put_jcc(t, it->d.insn.opcode & 15, t->offset + (u64)op->disp); break;
    case K_JMP: done = last = put_jmp(t, it, op); break;
    case K_CALL: done = last = put_call(t, it, op); break;
    case K_RET: done = last = put_ret(t, op); break;
    case K_PUSH: done = put_push(t, it, op); break;
    case K_POP: done = put_pop(t, it, op); break;
    case K_LEAVE: done = put_leave_insn(t, op); break;
    default: done = false; break;
    }
    if (!done)
        put_helper(t, op);
    return last;
}

bool bt_translate(struct icpu *c, struct bt *bt, struct block *b, bool *full)
{
    struct tr t = { .c = c, .t = bt, .b = b, .mem = true, .offset = b->gpa & ~PAGE_MASK };
    *full = BT_ARENA_BYTES - bt->used < BT_BLOCK_BYTES;
    if (*full || !ram_hva(c->v->m->ram, b->gpa))
        return false;
    t.e = (struct emit){ bt->rw + bt->used, bt->rw + bt->used + BT_BLOCK_BYTES, false };
    struct emit *e = &t.e;
    const u8 *stale = e->p;
    op_gs(e, true, X_LOAD, S1, OFF(bt.page));
    op_mem(e, true, X_LEA, S1, S1, NO_REG, 0, (s32)t.offset);
    jump_to(e, bt->rw + bt->leave_stale);
    bug_on(e->p > stale + BT_STALE_BYTES);
    e->p = (u8 *)stale + BT_STALE_BYTES;
    const u8 *entry = e->p;
    analyse(&t);
    put_prologue(&t, stale);
    bool last = false;
    for (; t.i < b->n && !last; t.i += !last)
        last = put_item(&t, &t.item[t.i], &b->op[t.i]);
    if (!last) {
        flags_save(&t);
        put_exit(&t, t.offset + b->len, b->n);
    }
    for (unsigned i = 0; i < t.colds; i++)
        put_cold(&t, &t.cold[i]);
    bug_on(e->overflow);
    vcpu_count(c->v, COUNT_CODE_TRANSLATED);
    vcpu_count_add(c->v, COUNT_CODE_BYTES, (u64)(e->p - stale));
    bt->used = ALIGN_UP((u64)(e->p - bt->rw), 32);
    b->code = bt->rx + (entry - bt->rw);
    return true;
}
