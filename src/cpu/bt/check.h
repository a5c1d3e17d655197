/*
 * --check: a guest runs on the translator and on interp in lockstep, block by block.
 *
 * Each block runs twice from the same state: on interp, whose stores are noted and taken back (store_log.h), then as a translation, entered alone
 * (icpu_bt.single). Then registers, flags, the rest of struct x86 (faults delivered to the guest included, with their frames), the pages that interp wrote to,
 * and the number of instructions must be the same. Extended state is compared where a block uses it, and every FP_EVERY blocks. The guest goes on with the translator's state.
 *
 * Once only, on interp: instructions that read time or random numbers, change translation, reach devices or other processors (each is a block of its own
 * here); and blocks that turn out to access a device.
 *
 * A difference that does not come again is none: another processor of the machine, a device or the monitor has written what was read. So that this is rare, and so that nobody else's
 * store is taken back, one vCPU is in a block at a time, and none while a device writes (struct check_gate).
 *
 * This is no light code (fpstate.h): it is entered through a gate, and the translator hands extended state back before it returns here.
 *
 * Not compared: what translations do when they are linked; stores by translations to pages that interp did not write to.
 *
 * Locking: the gate is a leaf; between check_gate_enter() and check_gate_leave() nothing blocks and no other lock is taken but m->split_lock.
 */
#pragma once

#include "cpu/bt/bt.h"
#include "cpu/interp/store_log.h"

/* Writers of guest memory: one vCPU, or any number of devices. */
struct check_gate {
    _Atomic u32 state;                                             /* devices that write, or GATE_VCPU */
    _Atomic u32 next, serving;                                     /* vCPUs take turns */
    const struct icpu *_Atomic last;                               /* that had its turn */
    _Atomic pthread_t holder;                                      /* whose thread GATE_VCPU stands for: its page walks write, too */
    /* of the RAM table, before it was ours */
    void (*begin_write)(void *arg, u64 gpa, u64 len);
    void (*end_write)(void *arg, u64 gpa, u64 len);
    void *arg;
};
int check_gate_open(struct machine *m);                            /* 0 or a negative errno with err() */
void check_gate_close(struct machine *m);

struct check_state {
    u64 r[16], rip, rflags, insns, pkru;
    struct x86 x;                                                  /* what of it is live elsewhere counts there */
};

struct check {
    void (*run)(struct icpu *c);                                   /* bt_run_single() */
    struct check_gate *gate;
    unsigned again;                                                /* blocks since its turn began */
    bool ticket;                                                   /* it has taken a turn for this block */
    size_t xsave_bytes;
    unsigned turn;                                                 /* up to FP_EVERY */
    unsigned most;                                                 /* instructions that interp may do; more than BLOCK_OPS: the whole block */
    bool fp;                                                       /* extended state is compared this time */
    u8 bytes[BLOCK_BYTES + 16], len;                               /* of the block */
    struct check_state before, interp, bt;
    u64 count[COUNTS];
    struct store_log log, part;                                    /* of all of the block, and of the part of it that was compared last */
    struct store_log *last;                                        /* which of them interp's last run has filled */
    struct {
        u8 *host;
        u8 want[PAGE_SIZE];                                        /* as interp left it */
    } page[STORE_LOG_PAGES];
};

int check_open(struct icpu *c);                                    /* 0 or a negative errno with err() */
void check_close(struct icpu *c);
void check_run(struct icpu *c);                                    /* one block; for icpu_bt.run */
/* One comparison from the state k->before at its block; memory is as it was. True: no difference. Afterwards memory and registers are the translator's. */
bool check_compare(struct icpu *c, struct check *k);
void check_restore(struct icpu *c, struct check *k);               /* registers and memory as before the block */
/* Finds the first instruction that differs, tells the log, and err(). The block's state is in k->before. */
void check_report(struct icpu *c, struct check *k);
