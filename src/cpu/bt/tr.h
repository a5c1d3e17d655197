/*
 * The translator's inside: one block on its way to host code, and what emitters have in common. Register conventions: bt.h.
 *
 * An emitter appends the host code of one guest instruction; false: it cannot (nothing may have been appended that matters: the driver rewinds) and the
 * instruction becomes a call of interp's handler. What it appends
 *   - leaves the arithmetic flags as the guest's instruction would, everything else with instructions that do not touch flags;
 *   - changes guest state (registers, RSP, memory) only behind its last instruction that can fault: a fault anywhere in it rolls back to its beginning
 *     and lets interp's handler do the instruction (and raise what is to be raised);
 *   - never pushes anything that the guest does not push;
 *   - comes to its end, or to one of the ways out below, or to C: kicks rely on that (fault.c);
 *   - may use S0 and S1. Where it changes S0 by itself it says so: t->kept = NO_REG.
 */
#pragma once

#include "cpu/bt/bt.h"
#include "cpu/bt/emit.h"

#define OFF(field) offsetof(struct icpu, field)
#define OFF_R(g) (OFF(r[0]) + 8u * (g))
/* icpu.bt.tmp: 0 RCX or RAX in a look-up, 1 its tag or flags, 2 its result, 3 a value on its way to the stack, 4 a branch's target, 5 a light function, 6 an address; 7 free */
enum { S0 = 14, S1 = 15 };                                         /* scratch host registers; the guest's are in icpu.r[] */

enum kind { K_HELPER, K_PLAIN, K_NOTHING, K_LEA, K_BRANCH, K_STACK, K_VECTOR, K_STRING, K_SYSTEM };
struct item {
    struct decoded d;
    u8 kind;                                                       /* enum kind */
};

/* A block that is a loop: loop.c. */
struct tr_loop {
    bool on;
    u8 branch;                                                     /* the op that closes it; the block ends there */
    u8 bases, base[2];                                             /* guest registers whose slots' deltas are in S0 and S1 */
    u8 *label;                                                     /* behind what looks them up */
};

struct cold {
    u8 *from;                                                      /* displacement of the jump that leads here */
    u8 op;                                                         /* whose it is */
    enum { COLD_HANDLER, COLD_LINK, COLD_OTHER } what;
    bool swapped;                                                  /* RCX and reg are exchanged at the jump */
    bool rcx_saved;                                                /* the guest's RCX is in icpu.bt.tmp[0] */
    unsigned reg;
    u32 link;                                                      /* COLD_LINK */
    void (*put)(struct tr *t, const struct cold *k);               /* COLD_OTHER */
    u64 arg;
};

/* Consecutive PUSHes or POPs whose accesses the software TLB has been asked for once: emit_branch.c. */
struct run {
    u8 *fail;                                                      /* displacement of the jump to where each is checked by itself */
    u8 *join;                                                      /* behind the last one; NULL: that ends the block */
    u8 first, last;                                                /* ops */
    bool rcx_saved;                                                /* at the first one */
};

struct tr {
    struct emit e;
    struct icpu *c;
    struct bt *t;
    struct tb *tb;
    struct block *b;
    unsigned view;                                                 /* enum tlb_view_id */
    bool shadow;                                                   /* memory operands go through the windows, else through the software TLB */
    unsigned i;                                                    /* the op that is being translated */
    unsigned kept;                                                 /* S0 holds the delta of this guest register's slot (shadow); NO_REG: it does not */
    bool rcx_saved, rcx_stored;                                    /* icpu.bt.tmp[0] holds the guest's RCX: before this op; and by it, from its last look-up on */
    u16 small;                                                     /* guest registers whose 64 bits are below 64 Ki here */
    u8 gates;                                                      /* of icpu.live that this block has looked at; a handler may close them */
    unsigned shadowed;                                             /* the op behind an STI, which no interrupt comes before; 0: none */
    bool ended;                                                    /* that was the last one: i is their number */
    bool relocate;                                                 /* what depends on addresses is noted, for copies */
    struct way_steps *steps;                                       /* of the way in that is being made */
    u8 *way;                                                       /* where it begins */
    struct tr_loop loop;
    struct item item[BLOCK_OPS];
    struct run run[BLOCK_OPS / 2];
    unsigned runs;
    struct cold cold[8 * BLOCK_OPS];
    unsigned colds;
    struct tb_mark mark[BLOCK_OPS + 8 * BLOCK_OPS];
    unsigned marks;
};

/* With which it goes on: that of the block, unless the last op leads to another view. */
static inline unsigned tr_key(const struct tr *t)
{
    return t->view | (t->shadow ? KEY_SHADOW : 0);
}

static inline const struct item *tr_item(const struct tr *t)
{
    return &t->item[t->i];
}

/* ---- loops: loop.c, and what it asks translate.c and emit_vec.c ---- */
void loop_plan(struct tr *t, bool compare);                        /* sets loop.on if the block is one */
void loop_begin(struct tr *t);                                     /* what stands before its first instruction */
static inline bool tr_in_loop(const struct tr *t)
{
    return t->loop.on && t->i <= t->loop.branch;
}
bool tr_conditional(const struct decoded *d);                      /* a conditional jump by flags */
bool tr_writes(const struct item *it, unsigned g);                 /* does it change guest register g? */
bool tr_small_step(const struct item *it, unsigned g);             /* by a small immediate, up or down */
void tr_gates(struct tr *t, const struct op *op);                  /* looks at those of a vector instruction. Uses S1 */

/* ---- relocations: clone.c. What depends on where the translation lies, or its guest code; noted for all that emitters append ---- */
enum reloc {
    RELOC_ADDRESS,                                                 /* 8 bytes: a linear address relative to the block's */
    RELOC_SLOT,                                                    /* 4 bytes: a displacement in a table by the slot of the address that was noted last */
    RELOC_SITE,                                                    /* 4 bytes: tb and op */
    RELOC_LINK,                                                    /* 4 bytes: a link's number */
    RELOC_JUMP,                                                    /* 4 bytes: relative to the byte behind them */
};
void tr_reloc(struct tr *t, const u8 *place, enum reloc what);
/* Host register = a linear address that moves with the block. */
void tr_linear(struct tr *t, unsigned reg, u64 la);
static inline bool clone_possible(unsigned key, u64 la)
{
    return (key & 3) == VIEW_USER && la >= 1ull << 32;
}
/* Another translation of the block that tb, whose tables are still empty, can be copied from; or NULL. */
const struct tb *clone_source(const struct bt *bt, const struct tb *tb);
void clone_code(struct tr *t, const struct tb *from);              /* instructions and their marks */
void clone_cold(struct tr *t, const struct tb *from);              /* cold code and links; then everything is put right */

/* ---- registers ---- */
static inline bool tr_resident(unsigned g)                         /* is the guest's register in the host's of that number? RSP is biased, so it is not */
{
    return g < 14 && g != RSP;
}
/* The host register that holds guest register g: its own, or scratch, loaded. Whole 64 bits. */
unsigned tr_read(struct tr *t, unsigned g, unsigned scratch);
/* Guest register g = scratch register (not resident ones). Uses both scratch registers when g is RSP. */
void tr_write(struct tr *t, unsigned g, unsigned scratch);
void tr_load(struct tr *t, unsigned g, unsigned host);             /* host register = guest register */

/* Number of a GPR operand as encoded without REX: AH..BH are 4..7 then. */
unsigned tr_gpr(const ZydisDecodedOperand *o);
bool tr_is_high(const ZydisDecodedOperand *o);                     /* AH..BH */
bool tr_needs_rex(const ZydisDecodedOperand *o);                   /* SPL BPL SIL DIL */

/* ---- memory operands: emit_mem.c ---- */
struct ea {
    unsigned base, index, scale, seg;                              /* guest registers, REG_ZERO; REG_RIP: disp is the linear address */
    s64 disp;
};
#define REG_TMP 18u                                                /* as a base: a linear address in icpu.bt.tmp[TMP_ADDRESS] */
#define TMP_ADDRESS 6
struct place {                                                     /* a host memory operand: base + index << scale + disp; NO_REG */
    unsigned base, index, scale;
    s32 disp;
};
enum { TR_NO_SCRATCH = 0, TR_SCRATCH = 1 };
/* op's explicit memory operand; false: 32-bit addressing and other forms that have no emitter. */
bool tr_ea(const struct tr *t, const struct op *op, struct ea *m);
/*
 * Makes m accessible: n bytes, for this access (a read-modify-write is a write). With TR_SCRATCH one scratch register is free afterwards: *scratch. Flags are
 * kept. What is not plain RAM open to this access ends in the handler of the current op.
 */
bool tr_mem(struct tr *t, const struct ea *m, unsigned n, enum mmu_access access, unsigned want, struct place *p, unsigned *scratch);
/* host register dst = effective (not yet segment's) or linear address of m; dst may be S0 or S1; uses the other. */
void tr_address(struct tr *t, const struct ea *m, unsigned dst, bool linear);

/* ---- RSP ---- */
bool tr_push(struct tr *t, unsigned value);                        /* S0 or S1; the other one may be used */
void tr_rsp_move(struct tr *t, s32 delta);                         /* small steps (up to 32 KiB) next to an access */
bool tr_rsp_step(struct tr *t, const struct op *op);               /* ADD and SUB of an immediate, if op is one */
bool tr_rsp_used(const struct tr *t);                              /* does an access by RSP follow in this block? */
void tr_rsp_get(struct tr *t, unsigned dst);                       /* dst = guest RSP */
void tr_rsp_set(struct tr *t, unsigned src);                       /* guest RSP = src; uses S0 and S1; src is kept unless it is one of them */

/* ---- copies with other registers and another address: emit_int.c ---- */
/* The instruction's own bytes with ModRM.reg = reg and ModRM.rm = rm, or memory operand m. Legacy encodings. */
void tr_copy(struct tr *t, const struct decoded *d, unsigned reg, unsigned rm, const struct place *m, bool rex_wanted);
bool tr_plain(struct tr *t, const struct op *op);                  /* integer instructions that are copied */

/* The same for all encodings: legacy, VEX, EVEX; registers that are RECODE_KEEP, vector ones among them, stay as they are. emit_vec.c. */
#define RECODE_KEEP 16u
struct recode {
    unsigned reg, rm, vvvv;                                        /* general registers instead of the encoded ones */
    const struct place *m;
};
void tr_recode(struct emit *e, const struct decoded *d, const struct recode *r);
/* The current instruction with its general registers wherever they are, and with its memory operand, n bytes, if n is not 0. */
bool tr_recoded(struct tr *t, const struct op *op, unsigned n, enum mmu_access access);

/* ---- ways out ---- */
/* Ends the block: continues at the linear address target, with tr_key(). */
void tr_exit(struct tr *t, u64 target);
void tr_exit_if(struct tr *t, unsigned cc, u64 target);            /* conditional; the block goes on */
void tr_count(struct tr *t);                                       /* the ops so far, this one included, are completed (if they are counted): before a way out of one's own */
void tr_exit_indirect(struct tr *t);                               /* target in S1, with tr_key() */
void tr_return(struct tr *t, u64 next);                            /* next has been pushed as a call's return address. Uses S0 */
/* Leaves the block for C with rip = target: boundary work is to be done (events, mode). */
void tr_exit_boundary(struct tr *t, u64 target);
void tr_handler(struct tr *t, const struct op *op);                /* interp's, for the current op */
/* Calls a light C function of cpu/bt: int fn(struct icpu *, const struct op *), with the registers spilled as for a handler; result as a handler's. */
struct cold *tr_cold(struct tr *t, u8 *from, int what);
void tr_mark(struct tr *t, unsigned op, unsigned flags);
void tr_call_light(struct tr *t, int (*fn)(struct icpu *c, const struct op *op));

/* Emitters of other files: true if done; *last: the block ends here. */
bool tr_branch(struct tr *t, const struct op *op, bool *last);     /* emit_branch.c */
bool tr_stack(struct tr *t, const struct op *op);                  /* push, pop, leave */
/* The ops from the current one on that are a run, and their place in one look-up; fewer than 2: none. Then each of them. */
unsigned tr_run(const struct tr *t, struct ea *m, enum mmu_access *access);
void tr_run_op(struct tr *t, const struct op *op, bool *last);
bool tr_vector(struct tr *t, const struct op *op);                 /* emit_vec.c: ops with OPF_FP */
bool tr_misc(struct tr *t, const struct op *op);                   /* emit_misc.c */
bool tr_string(struct tr *t, const struct op *op);                 /* emit_string.c */
bool tr_system(struct tr *t, const struct op *op, bool *last);     /* emit_sys.c */
