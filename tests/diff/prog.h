/*
 * Random programs for a bare machine: what they are made of, and how they become bytes.
 *
 * A program is a list of pieces; pieces can be taken out of it, and what is left is a program. An instruction comes from the list of tests/insn, with
 * moves before it that give its address registers the values it was made for; everything else flows from piece to piece. Loops count in a page of their own (PAGE_CTL), so
 * programs end whatever the instructions in between do, unless one of them faults or strikes that page.
 *
 * Same seed and number, same program. No state but what is passed.
 */
#pragma once

#include "insn.h"

#define PROG_PIECES 96
#define PROG_BYTES (2 * PAGE_SIZE)

enum piece_kind {
    PIECE_INSN,       /* case: index in the catalogue; value: which of its registers are set (bits), besides those of addresses */
    PIECE_LOOP,       /* begins a loop that id's PIECE_END ends; value: how often it runs */
    PIECE_FUNC,       /* begins a function, likewise; jumped over */
    PIECE_END,
    PIECE_CALL,       /* of function id, if it is there; value: 0 direct, 1 by register, 2 by memory */
    PIECE_SKIP,       /* conditional jump over as many pieces as value says, condition id */
    PIECE_TABLE,      /* jump by a table to one of the next 4 pieces, by register id */
    PIECE_STACK,      /* pushes and pops; value chooses */
    PIECE_FLAGS,      /* flags to memory, all defined */
    PIECE_DUMP,       /* registers to memory */
    PIECE_PATCH,      /* writes into the program: an immediate of the patched instruction behind it (id 0), ahead (id 1), or of the next instruction (id 2) */
    PIECE_SYSTEM,     /* what only a kernel may do: id chooses, value has its operands */
    PIECE_FAULT,      /* a division by zero, an access of nothing, or an invalid instruction: the end */
};

struct piece {
    u8 kind, id;
    u32 value, insn;
    u16 at, len;                                                   /* in the program, when it has been assembled */
};

struct prog {
    struct state in;
    bool kernel;
    unsigned pieces, bytes;
    struct piece piece[PROG_PIECES];
    u8 text[PROG_BYTES];
};

/* Instructions that programs are made of. */
struct catalogue;
struct catalogue *catalogue_open(u64 seed, const struct xlayout *l, const u8 *pattern); /* NULL: no memory */
void catalogue_close(struct catalogue *c);
unsigned catalogue_size(const struct catalogue *c);

/* With p->kernel a program for a guest_config.kernel. */
void prog_make(const struct catalogue *c, const struct xlayout *l, u64 seed, unsigned number, struct prog *p);
/* Makes text of pieces; false: it does not fit. */
bool prog_assemble(const struct catalogue *c, struct prog *p);
void prog_remove(struct prog *p, unsigned first, unsigned n);
/* The piece at this offset of the text, or -1. */
int prog_piece_at(const struct prog *p, u64 offset);
void prog_print(const struct prog *p);                             /* disassembly, as comments of TAP */
