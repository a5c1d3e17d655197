/*
 * The guest's extended state in the host's registers: x87, MMX, XMM to ZMM, masks, MXCSR. Translated code runs the guest's vector instructions as they are, on
 * the registers that they name.
 *
 * The state goes into the registers before translated code runs (bt_fp_enter) and stays there for as long as possible: through handlers of integer
 * instructions, page walks, exceptions. Three things take it out again, to where interp keeps it (struct fp):
 *   - interp's handlers of vector instructions run (icpu_fp(), and icpu_claim() for ops with OPF_FP);
 *   - the monitor runs code that may use such registers itself: devices, libc, the decoder. Light objects, which are compiled with -mgeneral-regs-only
 *     (Makefile, LIGHT), call such functions through a gate that looks at bt_fp_here (heavy.c). tests/light checks both;
 *   - run() returns.
 * So the guest's MXCSR and x87 control word are never live in heavy code.
 *
 * A signal handler has the registers of its own, so it must not claim what the interrupted code had in them: bt_fp_signal() and bt_fp_signal_end() around
 * whatever it calls.
 *
 * May an instruction run natively? CR0.EM and TS, CR4.OSFXSR and OSXSAVE, XCR0 say so, for a class of instructions: icpu.live.gate, which translated code reads
 * before the first instruction of a class in a block. A closed gate is an address where nothing is; the fault leads to interp's handler, which raises what is
 * to be raised. Whoever changes these registers calls icpu_claim(). The gate of x87 and MMX is open while their registers are loaded (fpstate.c says when).
 *
 * A sanitizer's code uses vector registers anywhere, so there nothing is light: the state is taken out whenever translated code is left.
 */
#pragma once

#include "cpu/interp/interp.h"

#define FP_GATE_CLOSED 8                                           /* in the page at 0, which no process has */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FP_HEAVY_ONLY 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define FP_HEAVY_ONLY 1
#endif
#endif
#ifndef FP_HEAVY_ONLY
#define FP_HEAVY_ONLY 0
#endif

/* The vCPU whose guest's state is in this thread's registers; NULL: none. */
extern _Thread_local struct icpu *bt_fp_here;

void bt_fp_open(struct icpu *c);
void bt_fp_load(struct icpu *c);
void bt_fp_save(struct icpu *c);

/* Light functions (tr_call_light()) instead of interp's handlers, which they call where the case is not the usual one: xstate.c. */
int bt_xsave(struct icpu *c, const struct op *op);
int bt_xsaveopt(struct icpu *c, const struct op *op);
int bt_xsavec(struct icpu *c, const struct op *op);
int bt_xsaves(struct icpu *c, const struct op *op);
int bt_xrstor(struct icpu *c, const struct op *op);
int bt_xrstors(struct icpu *c, const struct op *op);
int bt_xgetbv(struct icpu *c, const struct op *op);
int bt_fwait(struct icpu *c, const struct op *op);

/* Before translated code is entered at a block's beginning: x87's part may stay behind. */
void bt_fp_begin(struct icpu *c);
/* Before a block goes on: what was in the registers is there again, since gates are looked at only once in a block. */
static inline void bt_fp_enter(struct icpu *c)
{
    if (unlikely(!c->live.on))
        bt_fp_load(c);
}
/* Translated code has been left for C code. */
static inline void bt_fp_leave(struct icpu *c)
{
    if (FP_HEAVY_ONLY)
        icpu_claim(c);
}

static inline struct icpu *bt_fp_signal(void)
{
    struct icpu *was = bt_fp_here;
    bt_fp_here = NULL;
    return was;
}
static inline void bt_fp_signal_end(struct icpu *was)
{
    bt_fp_here = was;
}
