/*
 * bt, the binary translator: 64-bit guest code becomes host code, block by block; everything else is the interpreter's (cpu/interp), whose vCPU, decoder, TLB
 * and handlers this engine shares.
 *
 * A translation belongs to a `struct block` of the interpreter's code cache and begins by comparing the guest's bytes with those it was made from, so it is right
 * for the same reason as an interpreted block is: nobody has to tell it of writes, whoever made them. A block that the interpreter forgets has its
 * translation's first instruction overwritten by one that leaves. Translations are position-independent: of RIP they know the low 12 bits, the
 * rest is icpu.bt.page, so a page that is mapped at several addresses is translated once.
 *
 * Host registers in translated code:
 *     rax rcx rdx rbx rbp rsi rdi r8 r9 r10 r12 r13    the guest's
 *     r11                                              the guest's RSP; its R11, R14, R15 are in icpu.r[]
 *     r14 r15                                          scratch
 *     rsp                                              the host's own
 *     GS base                                          struct icpu of this vCPU (the host's x86-64 ABI leaves GS to programs)
 * Arithmetic flags are in the host's RFLAGS where an instruction has just made them, and in icpu.fl at every way in and out.
 *
 * Memory operands go through the interpreter's TLB inline; what misses calls the instruction's handler for the whole instruction, as do instructions that have
 * no emitter. Translated code therefore never faults: faults are raised by handlers, which find the complete state in struct icpu.
 *
 * All of it belongs to the vCPU's thread, except icpu.bt.stop, which whoever raises an event sets.
 */
#pragma once

#include "cpu/interp/code.h"
#include "cpu/interp/interp.h"

#define BT_ARENA_BYTES (64 * MiB)
#define BT_BLOCK_BYTES (24 * KiB)                                  /* the most that one block may become */
#define BT_STALE_BYTES 32                                          /* in front of each translation stands what leaves it when it is not right any more */
#define BT_JUMP_BITS 14
#define BT_PAGE_BITS 65536u
#define BT_RUNS 6                                                  /* interpreted so often before it is translated */

/* What translated code was left with, besides an op's result. */
enum { BT_EXIT_RIP = OP_FALL, BT_EXIT_DIRECT = OP_FALL + 1, BT_EXIT_STALE };

/* Where indirect branches and those into other pages look first: linear address and icpu.code_tag to translation. */
struct bt_jump {
    u64 la, tag;
    const u8 *code;
    u64 unused;
};

struct bt {
    u8 *rw, *rx;                                                   /* the arena, twice */
    size_t used, first;                                            /* bytes; first: behind the common routines */
    unsigned runs;                                                 /* BT_RUNS, or 1 */
    u64 flushes;                                                   /* icode.flushes when it was emptied last */
    struct bt_jump *jump;
    u64 page[BT_PAGE_BITS / 64];                                   /* pages with jump targets */
    int (*enter)(const u8 *code);                                  /* runs translated code until it is left: result of an op, or BT_EXIT_* */
    u32 handler, leave_rip, leave_stale, leave_direct, find;                    /* offsets of common routines */
};

int bt_arena_open(struct icpu *c, struct bt *t);                   /* maps the arena, generates the common routines */
void bt_arena_close(struct bt *t);
/* Translates b; false when it has to be interpreted for ever, or the arena is full (then *full). */
bool bt_translate(struct icpu *c, struct bt *t, struct block *b, bool *full);
/* Runs op's handler; called by translated code. The result, OP_NEXT: go on behind it. */
int bt_run_op(struct icpu *c, const struct op *op, struct block *b);
/* Makes b's translation leave at once. */
void bt_forget(struct icpu *c, struct block *b);
