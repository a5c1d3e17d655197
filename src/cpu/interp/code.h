/*
 * The code cache: decoded blocks, one cache per vCPU.
 *
 * A block is a run of instructions from one page: up to BLOCK_OPS of them in up to BLOCK_BYTES, ending after a jump, call, return, or instruction
 * that changes how the next ones are to be read. Conditional branches do not end it: taken, they leave it. With one in it it is no longer than
 * BLOCK_BRANCHED, since what lies behind is less likely to be reached, and may be in a block of its own as well. A block is found by
 *   1. the jump cache: linear address and code_tag (translation generation, mode, privilege) to block and host address of its bytes;
 *   2. a hash of guest-physical address and mode, after a translation for execution;
 *   3. decoding.
 * In every case its bytes are compared with memory before it runs, so nobody has to tell the cache of writes, with one exception: a store by this vCPU into
 * the block that is running. Pages with cached code have no fast write tag in the TLB, the slow path calls code_written(), and that
 * makes the rest of a running block leave it (its ops are overwritten) and forgets it. A page that is written often loses its blocks,
 * and its stores are fast again; if it goes on so, it becomes volatile (cpu/bt/codepage.h): its blocks end behind each instruction that
 * stores, so that there is no rest to be left.
 *
 * An instruction that crosses into the next page is a block of its own with two host addresses, never in the jump cache. Code outside RAM is
 * decoded each time it runs. Memory for blocks comes from an arena; when that is full everything is dropped (code_flush), between blocks only. Under a
 * translator what has not become a translation by the time that some megabytes have been decoded is dropped (code_sweep), likewise between blocks.
 */
#pragma once

#include <string.h>

#include "cpu/interp/interp.h"

#define BLOCK_OPS 32
#define BLOCK_BYTES 176
#define BLOCK_BRANCHED 64

/* Entering a block touches as few cache lines as possible: header and up to 16 bytes of code are one line, the ops follow. */
struct block {
    u64 gpa;                           /* of the first byte; BLOCK_DEAD when it must not be found any more */
    u64 gpa2;                          /* page of the second part of a crossing instruction, else BLOCK_DEAD */
    struct block *hash_next, *page_next;
    u32 translations;                  /* cpu/bt's, a list; 0: none */
    u32 slow;                          /* bit n: op n has met a device or the like; a translator calls its handler at once */
    u32 runs;                          /* how often it was interpreted where a translator counts */
    struct op *op;                     /* n, and one more that leaves the block */
    u8 len, n;                         /* bytes, instructions */
    u8 chunks;                         /* comparison in 16-byte steps; 0: too close to the page's end for that */
    u8 kind;                           /* check.c's; 0: not looked at yet */
    u8 mode, first;                    /* first: bytes in the first page (== len unless crossing) */
    bool cut;                          /* made while its page was volatile: only its last instruction stores */
    bool fp;                           /* an op has OPF_FP */
    u8 bytes[] __attribute__((aligned(16)));                       /* as decoded, zeroed up to the next 16 */
};
#define BLOCK_DEAD (~0ull)

struct jump_entry {
    u64 la, tag;
    struct block *block;
    const u8 *host;
};
#define JUMP_BITS 12

struct icode {
    struct jump_entry jump[1u << JUMP_BITS];
    struct block **hash, **page_hash;
    u8 *arena;
    size_t used, sweep_at;             /* bytes; from the latter on what has not been translated is dropped */
    u8 *page_state;                    /* per page of RAM: 1: blocks of several instructions are cached from it */
    u64 pages;
    bool flush_wanted;
    u8 limit;                          /* instructions in a block: BLOCK_OPS, or fewer (check.c) */
    bool (*alone)(const struct icpu *c, const u8 *bytes, unsigned len); /* is this instruction to be a block of its own? NULL: none is */
    u64 flushes;                       /* how often everything was dropped */
    ZydisDecoder decoder[IMODE_LONG64 + 1];
    struct block *uncached;            /* for one instruction that is not in RAM */
    struct block *nothing;             /* whose translations are dead and it is gone itself; its ops are zero */
    struct op ops[BLOCK_OPS + 1];      /* of the block that is being decoded */
};

int code_open(struct icpu *c);
void code_close(struct icpu *c);
/* Everything but the jump cache. NULL with c->fault raised (the fetch's #PF or #GP), or with v->debug.stop set (a breakpoint of the debugger's). */
struct block *code_find_slow(struct icpu *c, u64 la);
/* Everything is dropped before the next block is looked up; for whoever runs out of memory that blocks refer to (fp.c's stubs). */
void code_flush_later(struct icpu *c);
/* Everything is dropped at once, between blocks, and its memory is the host's again. */
void code_forget(struct icpu *c);
/* A store of this vCPU. forget: the page counts as data from now on (codepage_store_begin()). */
void code_written(struct icpu *c, u64 gpa, unsigned n, bool forget);
/* Forgets a block that could be a better one. */
void code_drop(struct icpu *c, struct block *b);
/* What runs now leaves its block before the next instruction. */
void code_leave(struct icpu *c);
/* The RAM table has changed. */
int code_ram_changed(struct icpu *c);
/* Recomputes code_tag; after changes of mode, privilege or translation. */
void code_retag(struct icpu *c);

static inline bool code_in_page(const struct icode *k, u64 gpa)
{
    return gpa >> PAGE_SHIFT < k->pages && k->page_state[gpa >> PAGE_SHIFT];
}

static inline struct jump_entry *code_jump_slot(struct icode *k, u64 la)
{
    return &k->jump[(la ^ la >> JUMP_BITS) & ((1u << JUMP_BITS) - 1)];
}

/*
 * Are the block's bytes still those in memory? host: of its first byte. Not for crossing blocks. General registers only: the guest's vectors may be in the
 * others.
 */
static inline bool block_matches(const struct block *b, const u8 *host)
{
    if (unlikely(!b->chunks))
        return !memcmp(b->bytes, host, b->len);
    u64 diff = 0, have, want;
    unsigned last = (b->len - 1u) & ~7u, odd = 64 - 8 * (b->len - last);
    for (unsigned i = 0; i < last; i += 8) {
        memcpy(&have, host + i, 8);
        memcpy(&want, b->bytes + i, 8);
        diff |= have ^ want;
    }
    memcpy(&have, host + last, 8);
    memcpy(&want, b->bytes + last, 8);
    return !(diff | (have ^ want) << odd);
}

/* The block at c->rip, ready to run, or NULL as code_find_slow() says. */
static inline struct block *code_find(struct icpu *c)
{
    u64 la = (c->cs_base + c->rip) & c->rip_mask;
    struct jump_entry *j = code_jump_slot(c->code, la);
    if (likely(j->la == la && j->tag == c->code_tag && c->rip + j->block->len - 1 <= c->rip_limit && j->block->gpa != BLOCK_DEAD &&
               block_matches(j->block, j->host)))
        return j->block;
    return code_find_slow(c, la);
}

/*
 * decode.c: one instruction. n bytes are there. Fills *op (off is the caller's) and returns BIND_OK or BIND_LAST, or DECODE_MORE when the instruction
 * needs more bytes than there are. What does not decode becomes an op that raises #UD or #GP.
 */
enum { DECODE_MORE = -2 };
void decode_init(struct icpu *c);
int decode_one(struct icpu *c, const u8 *bytes, unsigned n, unsigned off, struct op *op);
/* Register operand: its number 0..15, and *high for AH..BH. */
unsigned decode_gpr(ZydisRegister reg, bool *high);

/* insn_table.c */
struct insn {
    bind_fn bind;
    u32 arg;
};
const struct insn *insn_row(ZydisMnemonic m);                      /* bind is NULL where no row exists */
