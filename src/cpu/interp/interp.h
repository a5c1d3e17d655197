/*
 * interp, the reference engine: its internal interfaces. One instruction at a time, every mode.
 *
 * Guest code is decoded by Zydis into blocks of `struct op`, cached per vCPU by guest-physical address and mode, and compared with the bytes in memory each
 * time a block is entered: a cached block is right because its bytes are, whoever wrote them (this vCPU, another one, a device). A vCPU's own
 * stores into pages that hold cached code take the slow path and end the running block, so straight-line self-modification is exact too.
 *
 * Semantics come from the host: integer flags by running the same ALU instruction and LAHF/SETO, vector and x87 instructions by running the
 * guest's own instruction from a generated stub.
 *
 * An op's handler returns OP_NEXT or why the block is left. A handler that faults has changed no guest state that the fault must not show
 * (loads first, then stores, registers and flags last). No longjmp.
 *
 * Live state while running: icpu.r[], icpu.rip, icpu.fl, icpu.flags; everything else in icpu.v->x. icpu_store()/icpu_load() move the former to
 * and from v->x (at run()'s ends, for get/set and traces).
 */
#pragma once

#include <Zydis/Zydis.h>

#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/trap.h"
#include "mem/mmu.h"

struct icpu;
struct op;

enum {
    OP_NEXT = 0,      /* done; the next op of the block follows */
    OP_JUMP,          /* done; icpu.rip has been set to the next instruction's address */
    OP_END,           /* done; rip is the next instruction, but the block must be left (mode, TLB, IF or code may have changed) */
    OP_FAULT,         /* icpu.fault is to be delivered; rip is this instruction */
    OP_TRAP,          /* icpu.fault (#DB, #BP, #OF, INT n) was handled by the handler itself or is to be delivered with rip already advanced: icpu.rip is set */
    OP_RESTART,       /* not finished (REP with an event pending): same rip again; registers show the progress */
    OP_HALT,          /* done, rip advanced; the vCPU is halted */
    OP_SHUTDOWN,      /* triple fault */
    OP_NEAR,          /* as OP_JUMP, but nothing else than rip has changed (near branches): pending traps and IF need not be looked at */
    OP_FALL,          /* the block's end or a block overwritten while it ran: not an instruction; icpu.rip has been set */
};

typedef int (*op_fn)(struct icpu *c, const struct op *op);

/* Register numbers in op: 0..15 as in x86.h; byte registers 4..7 without REX mean AH, CH, DH, BH and are marked (OPF_HIGH_*). */
#define REG_ZERO 16   /* icpu.r[16] is always 0: "no base", "no index" */
#define REG_RIP  17   /* icpu.r[17] is the RIP of the block's first instruction: RIP-relative operands have disp = off + len + disp32 */

enum op_flag {
    OPF_LOCK = 1 << 0,
    OPF_REP = 1 << 1,        /* F3 */
    OPF_REPNE = 1 << 2,      /* F2 */
    OPF_HIGH_REG = 1 << 3,   /* op.reg is AH..BH (numbers 0..3) */
    OPF_HIGH_RM = 1 << 4,    /* op.rm likewise */
    OPF_MEM = 1 << 5,        /* there is a memory operand; ea fields are valid */
    OPF_FLAT = 1 << 6,       /* its linear address needs no segment base, no limit check and no 32/16-bit wrap (64-bit mode, ES CS SS DS) */
    OPF_REX = 1 << 7,
    OPF_STORES = 1 << 8,     /* it may write memory (decode_one(); not what faults and far transfers push) */
    OPF_FP = 1 << 9,         /* its handler uses vector or x87 registers or struct fp: icpu_claim() before it runs */
};

struct op {
    op_fn fn;
    s64 disp;                /* of the memory operand */
    u64 imm;                 /* sign-extended as the instruction wants it; far pointers: offset (selector in aux) */
    u8 len;                  /* bytes */
    u8 off;                  /* from the block's first byte */
    u8 size;                 /* operand size in bytes: 1, 2, 4, 8; for vectors 16, 32, 64 or the memory operand's size */
    u8 asize;                /* address size in bytes: 2, 4, 8 */
    u8 reg, rm;              /* ModRM register operand, and register r/m operand (or second register) */
    u8 base, index, scale;   /* scale is the shift 0..3 */
    u8 seg;                  /* segment of the memory operand, SEG_* */
    u16 flags;               /* op_flag */
    u32 aux;                 /* the family's own: selector, VEX.vvvv register, index into stubs, ... */
    void *ptr;               /* the family's own, e.g. a generated stub; belongs to the block's arena */
};

/* Decoder mode: part of a block's key. What makes the same bytes mean something else, or an op be bound to another handler. */
enum imode { IMODE_REAL16, IMODE_V86, IMODE_PROT16, IMODE_PROT32, IMODE_COMPAT16, IMODE_COMPAT32, IMODE_LONG64 };

struct fault {
    u8 vector;
    bool has_error, software;      /* software: INT n, INT3, INTO (DPL check; no error code; rip is the next instruction) */
    u32 error;
    u64 cr2;
};

struct tlb;                        /* tlb.h */
struct tlb_entry;
struct block;
struct store_log;
struct icode;                      /* block cache: code.h */
struct codepage_vcpu;              /* pages with code, machine-wide: cpu/bt/codepage.h */

#define PROTECT_ALL (~0ull)
/*
 * What was dropped: everything; of one context (TLB_EVERY: of each) what is not global; the page at la in one context, and in all of them where it is global; the
 * same, but la is or was in a large page, of up to 1 GiB, and all of that is meant.
 */
enum tlb_flush { FLUSH_ALL, FLUSH_NONGLOBAL, FLUSH_PAGE, FLUSH_LARGE };

/*
 * What a translator (cpu/bt) keeps beside the interpreter's state, where its generated code can address it. run replaces the fast loop; forget is told of a
 * block that may not be found any more and has translations.
 */
#define BT_ITLB_SIZE 8192u
#define BT_JUMPS 8192u
#define BT_RETURNS 2048u
#define BT_KEYS 8u
struct icpu_bt {
    struct icpu *self;
    u64 host_rsp;                  /* the host's stack while translated code runs */
    u64 bias, nbias;               /* host RSP minus guest RSP, and the negative of it */
    u64 tmp[8];
    u64 kept;                      /* S0 when translated code is entered: bt.h, MARK_KEPT */
    const u8 *resume;              /* where a handler call goes on */
    u64 mask_df, mask_bit[3];      /* for PEXT: of RFLAGS; number of a bit in 16, 32, 64 */
    u64 mask_slot, mask_jump;      /* for PEXT: bits 47..39 of an address; which bits of an address choose its place in jump[] */
    u64 mask_tlb, mask_entry, mask_page, mask_target, mask_return;
    struct bt_target *target[BT_KEYS]; /* where jump[] does not lead to the right place: a larger table by linear address */
    u32 exit_link, exit_site, exit_stale; /* by which link, instruction, translation the code was left */
    bool exit_slow;                /* exit_site: because of an access that is one for handlers */
    bool exit_gate;                /* exit_site: because of a gate (icpu.live) */
    u32 site;                      /* the indirect branch that was taken last */
    u64 *itlb_user;                /* user code's itlb, and see there */
    const struct op *op;           /* whose result generated code was left with */
    _Atomic u32 stop;              /* look at vcpu.events */
    _Atomic(u64) poll;             /* what branches backwards read through: a valid address, or BT_POLL_CLOSED while there are events (emit_branch.c) */
    _Atomic u32 inside;            /* in translated code: a kick needs a signal */
    void (*run)(struct icpu *c);
    void (*forget)(struct icpu *c, struct block *b);
    void (*forget_all)(struct icpu *c); /* all blocks have gone, as have the guest's memory and tables: the next is another guest; NULL: nobody asks */
    void (*moved)(struct icpu *c, struct block *b); /* b has another address now, and translations; NULL: those were all. Unset: blocks stay where they are */
    void (*flushed)(struct icpu *c, enum tlb_flush what, u64 la, unsigned context); /* translations have been dropped; NULL: nobody asks */
    void (*context_changed)(struct icpu *c, unsigned context);    /* tlb.context is another one; NULL: nobody asks */
    bool single;                   /* run() runs one translation and returns, whatever events there are, and links nothing: check.c */
    bool count;                    /* translated code counts the instructions that it completes in `insns`, which run() adds to vcpu.insns */
    u64 insns;
    u32 done;                      /* of the translation that was entered last, as far as it was completed before that: not counted in insns yet */
    u64 pauses;                    /* so many PAUSEs until this thread lets others run: emit_misc.c */
    u64 tsc_bias;                  /* the guest's TSC less the host's */
    u8 without_if[256], without_ac[256]; /* bytes 1 and 2 of RFLAGS without those bits: emit_sys.c */
    struct check *check;           /* NULL: engines are not compared */
    bool failed;                   /* they differ: err() says how */
    /* Ends all translations, comparing ones too, of bytes in [gpa, gpa + len) (0, ~0: all); whether any are left in the page. If the one that runs is hit, it
     * is left after its instruction. protect takes away the shadow's write rights to a page, or PROTECT_ALL. May be NULL. */
    bool (*invalidate)(struct icpu *c, u64 gpa, u64 len);
    void (*protect)(struct icpu *c, u64 gpa);
    struct bt *bt;
    struct shadow *shadow;         /* NULL: there is none */
    u64 delta_changes;             /* counts changes of delta */
    u64 expected;                  /* address of a page fault of the guest that shadow_expected() may make good; 0: none */
    u64 delta[3][512] __attribute__((aligned(64))); /* host less linear address, by view and PML4 slot: shadow.h */
    u64 way[3];                    /* --mmu auto: by view, is the shadow its way now, since it can be and pays? */
    s64 x_offset;                  /* from here to v->x, if that can be a displacement, else 0 */
    u64 itlb[BT_ITLB_SIZE];        /* supervisor code: linear page to cpage.secret */
    const u8 *jump[BT_KEYS][BT_JUMPS]; /* by key: where indirect branches go, checked there */
    const u8 *ret[BT_KEYS][BT_RETURNS]; /* where returns go, likewise; calls put it there */
};

/*
 * The guest's extended state may be in the host's registers instead of struct fp while a translator's code runs, and beyond: until somebody
 * wants it, or until code runs that uses such registers itself. cpu/bt/fpstate.h has the rules.
 */
enum { FP_GATE_SSE, FP_GATE_AVX, FP_GATE_AVX512, FP_GATE_X87, FP_GATES };
struct icpu_live {
    bool on, x87;                  /* vectors, masks and MXCSR are in the registers; x87's, too */
    u8 x87_loads;                  /* so many more loads bring x87's without being asked */
    u16 fop, fcs, fds;             /* of x87's pointers: those in the registers are the host's */
    u64 fip, fdp;
    u32 x87_uses;                  /* struct fp's when the state was loaded */
    u64 gate[FP_GATES];            /* an address that can be read where instructions of the class may run natively now, else one that cannot */
    void (*claim)(struct icpu *c); /* moves it to struct fp */
};

struct icpu {
    u64 r[18];                     /* 0..15 GPRs, REG_ZERO, REG_RIP */
    u64 rip;                       /* of the instruction that runs next, or that faults (handlers: op_rip()) */
    u32 fl;                        /* CF PF AF ZF SF as LAHF gives them in bits 8..15 (AH), OF in bit 0 (SETO AL) */
    u32 flags;                     /* the other RFLAGS bits (TF IF DF IOPL NT RF VM AC VIF VIP ID and bit 1) */
    u8 cpl;
    u8 mode;                       /* enum imode */
    u8 stack_size;                 /* 2, 4 or 8: from SS.B, or 8 in 64-bit mode */
    struct fault fault;
    u64 db_pending;                /* DR6 bits of data breakpoints met by this instruction (#DB after it) */
    struct vcpu *v;
    struct x86 *x;                 /* &v->x */
    struct tlb *tlb;
    struct tlb_entry *view;        /* data accesses of the current privilege look here first: tlb.h */
    struct icode *code;
    struct codepage_vcpu *codepage;
    u64 locked_gpa;                /* lock_host() to lock_done() */
    unsigned locked_n;
    struct block *block;           /* that runs now */
    u64 rip_mask;                  /* ~0 in 64-bit mode, else 0xffffffff */
    u64 rip_limit;                 /* ~0 in 64-bit mode, else CS.limit */
    u64 cs_base;                   /* 0 in 64-bit mode */
    u64 code_tag;                  /* generation of translations, mode and privilege: what a jump cache entry must match (code.h) */
    u32 pkru;                      /* the register; who changes it calls tlb_views() */
    bool step;                     /* one instruction at a time: repeated string instructions return OP_RESTART after each iteration */
    bool ss_shadow;                /* single-stepping: the shadow is that of MOV SS or POP SS, which holds back debug exceptions, too */
    bool irq_wait;                 /* the local APIC had an interrupt when IF or the shadow forbade it: look again */
    struct store_log *log;         /* NULL: stores are not noted; who changes it calls tlb_views() */
    void *fp;                      /* fp.c's: stub buffer, bounce buffer */
    struct icpu_live live;
    struct icpu_bt bt;
};

static inline void icpu_claim(struct icpu *c)
{
    if (unlikely(c->live.on))
        c->live.claim(c);
}

/* ---- flags ---- */
#define FL_CF 0x100u
#define FL_PF 0x400u
#define FL_AF 0x1000u
#define FL_ZF 0x4000u
#define FL_SF 0x8000u
#define FL_OF 0x1u
static inline u64 icpu_rflags(const struct icpu *c)                /* RFLAGS as the guest sees it */
{
    return c->flags | ((c->fl >> 8) & 0xd5) | ((c->fl & 1) << 11) | FLAG_1;
}
static inline void icpu_set_rflags(struct icpu *c, u64 f)          /* all bits, unfiltered */
{
    c->fl = (u32)((f & 0xd5) << 8) | ((f >> 11) & 1);
    c->flags = (u32)(f & ~(u64)FLAGS_ARITH) | FLAG_1;
}
static inline u64 op_rip(const struct icpu *c, const struct op *op) /* this instruction's own RIP */
{
    return c->r[REG_RIP] + op->off;
}
static inline u64 op_next_rip(const struct icpu *c, const struct op *op) /* the next one's, not yet cut to the mode's width */
{
    return c->r[REG_RIP] + op->off + op->len;
}

/* ---- raising faults: each returns OP_FAULT ---- */
int fault_raise(struct icpu *c, unsigned vector);                  /* no error code */
int fault_raise_error(struct icpu *c, unsigned vector, u32 error);
int fault_page(struct icpu *c, u64 la, u32 error);
#define fault_gp(c, e) fault_raise_error(c, VEC_GP, e)
#define fault_ud(c) fault_raise(c, VEC_UD)

/* ---- memory: access.c. Results 0 (OP_NEXT) or OP_FAULT. ---- */
/* The linear address of op's memory operand for an access of n bytes: effective address, segment checks (#GP/#SS), canonical check. */
int mem_linear(struct icpu *c, const struct op *op, unsigned n, enum mmu_access access, u64 *la);
/* The same for seg:off given directly (string instructions, stack): off must be cut to the address size already. */
int seg_linear(struct icpu *c, unsigned seg, u64 off, unsigned n, enum mmu_access access, u64 *la);
/* Loads and stores at a linear address with the current privilege, any alignment, page crossing included; sizes 1, 2, 4, 8. #AC when armed. */
int lin_load(struct icpu *c, u64 la, unsigned size, u64 *val);
int lin_store(struct icpu *c, u64 la, unsigned size, u64 val);
/* Any length up to a page; a store that would fault on its second page changes nothing. */
int lin_load_bytes(struct icpu *c, u64 la, void *buf, unsigned n);
int lin_store_bytes(struct icpu *c, u64 la, const void *buf, unsigned n);
/* Raises what an access would raise, without making it. */
int lin_probe(struct icpu *c, u64 la, unsigned n, enum mmu_access access);
/* The host address for a direct access of n bytes inside one page of plain RAM (rights checked, A/D set, no code and no watchpoint in it when written), else
 * NULL with no fault raised: the caller then uses the functions above. Valid until the op ends. */
void *lin_host(struct icpu *c, u64 la, unsigned n, enum mmu_access access);
/* Operand helpers: op's memory operand of op->size or of an explicit size. */
int mem_load(struct icpu *c, const struct op *op, unsigned size, u64 *val);
int mem_store(struct icpu *c, const struct op *op, unsigned size, u64 val);
/* Read-modify-write with the LOCK semantics of the processor when OPF_LOCK is set: XCHG and CMPXCHG families build on it. */
int mem_cmpxchg(struct icpu *c, u64 la, unsigned size, u64 expected, u64 desired, u64 *old);
/* Implicit supervisor accesses to GDT, LDT, IDT, TSS (SDM vol. 3A 4.6.1). */
int sys_load(struct icpu *c, u64 la, unsigned size, u64 *val);
int sys_store(struct icpu *c, u64 la, unsigned size, u64 val);
int sys_probe(struct icpu *c, u64 la, unsigned n, enum mmu_access access);
/* Push and pop of size bytes through SS with the stack's address size; RSP changes only when the access succeeded. */
int stack_push(struct icpu *c, unsigned size, u64 val);
int stack_pop(struct icpu *c, unsigned size, u64 *val);
/* Reads the stack without moving RSP: the value at RSP + off. And moves RSP by delta with the stack's width. */
int stack_peek(struct icpu *c, unsigned off, unsigned size, u64 *val);
void stack_move(struct icpu *c, s64 delta);

/* ---- translations: tlb.c; called after the change ---- */
void tlb_flush_all(struct icpu *c);                                /* global ones too */
void tlb_flush_nonglobal(struct icpu *c);                          /* of the current PCID */
void tlb_cr3(struct icpu *c, bool keep);                           /* MOV CR3; keep: bit 63 with PCIDs */
void tlb_flush_page(struct icpu *c, u64 la);                       /* INVLPG: also global ones, all views */
void tlb_flush_pcid_page(struct icpu *c, u64 pcid, u64 la);        /* INVPCID, types 0, 1 and 3; 2 is tlb_flush_all() */
void tlb_flush_pcid(struct icpu *c, u64 pcid);
void tlb_flush_pcids(struct icpu *c);
void tlb_views(struct icpu *c);                                    /* CPL, CR0, CR4, EFER, AC or PKRU changed: select or drop views as needed */

/* ---- state changes ---- */
void icpu_load(struct icpu *c);                                    /* v->x to the live copies; recomputes mode, cpl, stack size, TLB view */
void icpu_store(struct icpu *c);                                   /* the live copies to v->x */
void icpu_mode(struct icpu *c);                                    /* recomputes mode, cpl, stack_size, TLB view after segments or CR0/EFER/VM changed */

/* ---- the loop, for a translator: interp.c ---- */
/* What comes after an op that returned r, neither OP_NEAR nor OP_FALL: the result's work, and the trap that it left pending. */
void icpu_end(struct icpu *c, const struct op *op, int r);
bool icpu_quiet(const struct icpu *c);                             /* nothing is to be looked at between two instructions here */
bool icpu_steps(struct icpu *c);                                   /* the next instruction runs by itself (TF, a debugger, ...); when no event is pending */
void icpu_fetch_failed(struct icpu *c);                            /* code_find() returned NULL */
void icpu_run_blocks(struct icpu *c);                              /* one after the other until something else has to be looked at */
bool icpu_run_block(struct icpu *c, struct block *b);              /* one, found by code_find(); true: the next may follow at once */

/* ---- traps: deliver.c ---- */
/* Delivers an exception, interrupt or INT n through the IDT (real mode: IVT; task gates too), with double and triple faults. c->rip is the address to save.
 * Returns OP_JUMP, or OP_SHUTDOWN. Ends with c->rip at the handler. */
int deliver_fault(struct icpu *c);                                 /* c->fault */
int deliver_interrupt(struct icpu *c, unsigned vector);            /* external; not NMI */
int deliver_nmi(struct icpu *c);
int deliver_software(struct icpu *c, unsigned vector);             /* INT n (with V86/VME and DPL rules); c->rip is the next instruction. OP_JUMP, OP_FAULT or OP_SHUTDOWN */

/* ---- segments: seg.c ---- */
int seg_load(struct icpu *c, unsigned seg, u16 sel);               /* MOV/POP/LDS.. to a data segment or SS; 0 or OP_FAULT */
void seg_load_real(struct icpu *c, unsigned seg, u16 sel);         /* real mode and virtual-8086: base = sel << 4, limit kept / 0xffff */
int task_switch(struct icpu *c, u16 tss_sel, int source, bool has_error, u32 error, u32 ext); /* task.c; source: TASK_JMP, TASK_CALL, TASK_IRET, TASK_GATE */
enum { TASK_JMP, TASK_CALL, TASK_IRET, TASK_GATE };

/* ---- extended state: fp.c, xsave.c ---- */
int fp_open(struct icpu *c);
void fp_close(struct icpu *c);
void fp_flush_stubs(struct icpu *c);                               /* the block cache is empty again: stubs may be reused */

/* ---- decoding ---- */
struct decoded {
    ZydisDecodedInstruction insn;
    ZydisDecodedOperand opnd[ZYDIS_MAX_OPERAND_COUNT];
    const u8 *bytes;                                               /* insn.length of them */
    u8 mode;                                                       /* enum imode */
};
/*
 * One row per mnemonic in insn_int.def, insn_sys.def, insn_fp.def: INSN(MNEMONIC, bind, arg). The decoder has filled op's common fields (len, off, size =
 * operand size, asize, ea fields, prefixes, reg/rm from ModRM, imm); bind chooses op->fn by operand form and size, and sets what else the handler needs. It
 * returns 0, or BIND_UD when this form does not exist here (#UD). BIND_LAST: the op ends its block.
 */
enum { BIND_OK = 0, BIND_LAST = 1, BIND_UD = -1 };
typedef int (*bind_fn)(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int op_ud(struct icpu *c, const struct op *op);                    /* the handler that raises #UD */
int op_too_long(struct icpu *c, const struct op *op);              /* #GP: more than 15 bytes */
