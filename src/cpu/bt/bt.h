/*
 * bt, the binary translator: 64-bit guest code becomes host code, block by block; everything else is the interpreter's (cpu/interp), whose vCPU, decoder, TLB
 * and handlers this engine shares.
 *
 * A translation (struct tb) belongs to one vCPU and is keyed by linear address, guest-physical address, and key: the view of memory that its operands use
 * (tlb.h) and the way in which they do (software TLB or shadow). It is made from an interpreter's block, whose ops it refers to.
 *
 * Host registers in translated code:
 *     rax .. r13     the guest's, but
 *     rsp            guest RSP + icpu.bt.bias
 *     r14 r15        scratch; the guest's are in icpu.r[]
 *     RFLAGS         the guest's arithmetic flags at every instruction boundary
 *     GS base        struct icpu of this vCPU (the host's x86-64 ABI leaves GS to programs)
 *
 * How one comes to a translation:
 *     entry          r15 holds the linear address that is meant: compared. In front of the code, or apart from it with a jump
 *     page entry     the linear page is looked up in icpu.bt.itlb: it must still be the page that the translation was made from
 *     code           the code itself
 * Branches within a page lead to code, to another page to its page entry, indirect ones to entry by way of icpu.bt.jump. So flushes only have to clear itlb.
 *
 * All of it belongs to the vCPU's thread, except icpu.bt.stop and inside (bt.c).
 */
#pragma once

#include "cpu/interp/code.h"
#include "cpu/interp/interp.h"
#include "cpu/interp/tlb.h"

#define BT_ARENA_BYTES (64 * MiB)                                  /* of address space; memory is used as it fills */
#define BT_BLOCK_BYTES (24 * KiB)                                  /* the most that one block may become */
#define BT_TBS 262144u
#define BT_LINKS 786432u
#define BT_MARKS 6291456u
#define BT_RELOCS 4194304u
#define BT_HASH 131072u
#define BT_PAGES 65536u
#define BT_RETURN_HASH 32768u
#define BT_WAYS (2 * BT_TBS)
#define BT_PLANTS 4u
#define BT_POLL_CLOSED 16                                           /* in the page at 0, which no process has; FP_GATE_CLOSED is another */
#define BT_PAUSES 256u                                             /* about 10 us */
#define BT_RUNS 6                                                  /* interpreted so often before it is translated */

enum { KEY_SHADOW = 4 };                                           /* key: enum tlb_view_id, and this */

/* What translated code was left with, besides an op's result. */
enum { BT_EXIT_RIP = 32, BT_EXIT_MISS, BT_EXIT_LINK, BT_EXIT_OP, BT_EXIT_END, BT_EXIT_STOP };

struct tr;
struct handled;
struct cold;

/* Where in a translation's code an instruction begins. */
struct tb_mark {
    u16 off;                                                       /* from tb->start */
    u8 op;
    u8 flags;
};
enum {
    MARK_COLD = 1,                                                 /* behind the block: not an instruction's beginning */
    MARK_STRING = 2,                                               /* a string instruction itself: RDI and RSI are the host's, S0 and S1 led there */
    MARK_SHADOW = 4,                                               /* the instruction behind STI: no interrupt comes before it */
    MARK_TARGET = MARK_COLD | 8,                                   /* all is done, S1 holds where it goes on: an indirect branch on its way */
    MARK_RUN = 31 << 3,                                            /* in a run of stack operations that were checked together: nobody comes back here */
    MARK_KEPT = 3,                                                 /* from this bit on: 1 + the guest register whose slot's delta is in S0 here, or 0 */
};

/*
 * A way into a translation: until its end nothing of the guest's changes but RIP, so a kick may leave it as well. Offsets from its beginning.
 */
struct way_steps {
    u8 changed;                                                    /* up to here S1 is the target; then that less this block's address and its page's secret */
    u8 known;                                                      /* from here on the target is this block */
    u8 saved;                                                      /* from here on S0 is the guest's RCX */
};
struct way {                                                       /* one that was not made with its translation */
    u32 at, len;                                                   /* in the arena */
    u32 tb;
    struct way_steps steps;
};

/* A linear page that is mapped to a guest-physical one and holds translated code. */
struct cpage {
    u64 la, gpa;
    u64 secret;                                                    /* what icpu.bt.itlb holds */
    u32 next;
};

/* What an itlb holds: indexes in bt.page; and which entries have been filled, if there are not too many. */
struct itlb {
    u32 id[BT_ITLB_SIZE];
    u16 filled[BT_ITLB_SIZE];
    unsigned n;
};
#define ITLB_SUPER 0u
#define ITLB_USER(context) (1u + (context))

struct tb {
    u64 la, gpa;
    u8 *start;                                                     /* all in the writable mapping */
    u8 *entry, *page_entry;                                        /* NULL: not needed so far (bt_entry(), bt_page_entry()) */
    u32 code_off, size;                                            /* from start to the code; bytes, without cold code */
    u32 page, page2;                                               /* cpage ids; page2: of a crossing instruction's second page, 0 none */
    u32 hash_next, frame_next, block_next;                         /* tb indexes; 0 ends a list */
    u32 links_in;                                                  /* links that lead here */
    u32 mark;                                                      /* first of marks in bt.mark */
    u16 marks;
    u8 key, n;
    /* For copies at other addresses (clone.c): */
    bool copies;                                                   /* it can be copied */
    u16 links, relocs;
    u32 link, reloc;                                               /* first of its links, of relocations in bt.reloc (copies share them) */
    u8 *cold;                                                      /* code for what rarely happens, without that of the ways in */
    u32 cold_size;
    u32 slow;                                                      /* b->slow when it was made */
    u32 handled;                                                   /* bit n: op n has no host code of its own */
    struct way_steps steps;                                        /* of an entry that stands before the code */
    bool dead;
    u8 second;                                                     /* a loop (loop.c): 1 + the guest register whose slot's delta is in S1 all the time; 0: none */
    struct block *b;
};

struct link {                                                      /* a direct way out of a translation, or what a call knows of its return */
    u64 target;                                                    /* linear address */
    u8 *place, *stub;                                              /* writable: the jump's displacement; where it leads when it is not linked */
    u32 next;                                                      /* in tb.links_in; a return's that is not linked: in bt.returns */
    u32 from;                                                      /* tb */
    u8 key;                                                        /* with which it goes on */
    bool linked;
    bool ret;                                                      /* place is that of an address which is put into icpu.bt.ret: an entry's */
};

/* State of the guest's that translations have in them as constants: when it changes, they end. */
struct bt_fixed {
    u64 efer, star, lstar, sfmask, cr4;
};

struct bt {
    u8 *rw, *rx;                                                   /* the arena, twice */
    size_t used, first;                                            /* bytes; first: behind the common routines */
    size_t cold;                                                   /* the upper half is for what rarely runs: used up to here */
    struct tr *tr;                                                 /* room for the block that is being translated */
    u64 flushes;                                                   /* icode.flushes when it was emptied last */
    u64 cycles, insns, copy_cycles;                                /* of time stamps, for translations that were made, and their instructions; for copies */
    struct tb *tb;
    struct link *link;
    struct tb_mark *mark;
    struct cpage *page;
    struct way *way;                                               /* ascending by at */
    u32 *reloc;
    u32 ways, tbs, links, marks, pages, relocs;                          /* used of each; index 0 is none */
    u32 *hash, *frame, *page_hash;                                 /* tbs by linear address, by guest-physical page; pages by both */
    u32 *returns;                                                  /* links: of calls whose return has no entry so far, by its address */
    u64 (*itlb_user)[BT_ITLB_SIZE];                                /* by context (tlb.h) what icpu.bt.itlb is for supervisor code */
    struct itlb *itlb;                                             /* what stands in them: the supervisor's, and the contexts' */
    u64 key[2];                                                    /* secrets are made of it */
    bool itlb_private;                                             /* the supervisor's may hold pages that are not global */
    int (*enter)(const u8 *code);                                  /* runs translated code until it is left: result of an op, or BT_EXIT_* */
    u32 op, light, leave_rip, leave_link, leave_signal, miss;      /* offsets of common routines */
    u32 lookup[BT_KEYS];                                           /* likewise: looks into icpu.bt.target, misses otherwise */
    struct bt_target *target;
    struct {
        u32 from, to;
    } restart[3];                                                  /* offsets in common routines: from the look at stop on, while everything is still in icpu */
    struct {
        u8 *at, byte;
    } plant[BT_PLANTS];                                            /* fault.c's breakpoints, writable; and what was there */
    unsigned plants;
    bool again;                                                    /* a kick is under way, and comes again if nothing comes of it */
    bool bmi2;
    struct bt_fixed fixed;
    struct handled *handled;                                       /* NULL: nobody asks */
    _Atomic int thread;                                            /* that runs it, for kicks */
    _Atomic(const volatile u32 *) cpu;                             /* on which processor it does, by the host's kernel; NULL: not known */
    unsigned runs;                                                 /* BT_RUNS, or 1 */
    /* --mmu auto */
    bool choose;
    u64 since, misses;                                             /* time stamp and misses of the software TLB when time was last accounted for */
    u64 space[TLB_CONTEXTS];                                       /* CR3 that each context had then */
    unsigned context;
    u64 troubles, calm;                                            /* guest page faults and flushes so far; cycles without one */
    u32 dead;                                                      /* of tbs */
};

#define JUMP_MASK (BT_JUMPS - 1ull)
#define RETURN_MASK (BT_RETURNS - 1ull)

/* The second table of indirect branches' targets, by address. */
#define BT_TARGETS 131072u
struct bt_target {
    u64 la;
    const u8 *entry;                                               /* 0: none */
};

/* ---- arena.c ---- */
int bt_arena_open(struct icpu *c, struct bt *t);                   /* maps the arena, generates the common routines */
void bt_arena_close(struct bt *t);

/* ---- tb.c: translations, pages, links ---- */
int tb_open(struct icpu *c, struct bt *t);
void tb_close(struct bt *t);
void tb_reset(struct icpu *c, struct bt *t);                       /* forgets everything */
void tb_forget(struct icpu *c, struct bt *t);                      /* the same, and its memory is the host's again */
/* The id of the page that holds c->rip, entered in the itlb; 0: not there, or not RAM. */
u32 tb_page(struct icpu *c, struct bt *t, u64 la, bool user);
struct tb *tb_find(struct bt *t, u64 la, u32 page, unsigned key);
struct tb *tb_at(struct bt *t, const u8 *pc);                      /* that holds this host address (executable mapping), or NULL */
void tb_insert(struct bt *t, struct tb *tb);
void tb_kill(struct icpu *c, struct bt *t, struct tb *tb);
void tb_link(struct icpu *c, struct bt *t, u32 link, struct tb *to);
void tb_return(struct bt *t, u32 link);                            /* links it, now or when its target has an entry */
void tb_jump_note(struct icpu *c, struct bt *t, struct tb *tb);    /* icpu.bt.jump leads here */
/* icpu.bt.invalidate: kills what was made from guest-physical [gpa, gpa + len) (0, ~0: all). This vCPU's thread. Whether any are left in gpa's page. */
bool bt_invalidate(struct icpu *c, u64 gpa, u64 len);
void bt_flushed(struct icpu *c, enum tlb_flush what, u64 la, unsigned context);
void bt_context_changed(struct icpu *c, unsigned context);
static inline struct tb *tb_of(struct bt *t, u32 index)
{
    return index ? &t->tb[index] : NULL;
}

/* ---- fault.c ---- */
void bt_unplant(struct bt *t);                                     /* takes its breakpoints out: before anything else is done to translations */
u64 tb_rip(const struct bt *t, const struct tb *tb, const u8 *pc); /* the guest's instruction that this host address belongs to */

/* ---- translate.c, clone.c ---- */
/* Translates b at c->rip, which indirect branches lead to if indirect is set; NULL when it has to be interpreted for ever, or when there is no room (then *full). */
struct tb *bt_translate(struct icpu *c, struct bt *t, struct block *b, u32 page, u32 page2, bool compare, bool indirect, bool *full);
void bt_entry(struct icpu *c, struct bt *t, struct tb *tb);          /* makes the ways in, where they are missing; there may be no room */
void bt_page_entry(struct icpu *c, struct bt *t, struct tb *tb);

/* ---- bt.c ---- */
static inline void bt_poll_open(struct icpu *c)
{
    atomic_store_explicit(&c->bt.poll, (u64)(uintptr_t)c, memory_order_relaxed);
}
/* Runs op's handler; called by translated code. site: tb index << 8 | op. The result, OP_NEXT: go on behind it. */
int bt_run_op(struct icpu *c, u32 site);
int bt_run_light(struct icpu *c, u32 site, int (*fn)(struct icpu *c, const struct op *op));
void bt_rebias(struct icpu *c, unsigned key);                      /* icpu.bt.bias for the guest's RSP */
unsigned bt_key(struct icpu *c);                                   /* the present one; brings icpu.bt.way up to date */
void bt_account(struct icpu *c, unsigned context);                 /* the time since the last call was this context's */
/* icpu_bt.single set for one run; extended state is in struct fp afterwards. */
void bt_run_single(struct icpu *c);
