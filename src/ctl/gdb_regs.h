/*
 * The guest's registers as gdb numbers and names them: the target description (GDB manual, appendix G: "Target
 * Descriptions"; G.5.x i386 features) and the way of each register into and out of struct x86. On the loop's thread.
 *
 * Standard features, as far as this guest has them: core, sse, segments, avx, avx512, pkeys. One of our own,
 * org.doppel.x86.system: cr0 cr2 cr3 cr4 cr8 efer.
 */
#pragma once

#include "cpu/x86.h"
#include "vm/debug.h"

#define GDB_REGS_MAX 176
#define GDB_REG_BYTES_MAX 32

struct gdb_reg {
    char name[10];
    u8 bytes, kind, n;                                             /* kind: gdb_regs.c's */
};

struct gdb_regs {
    struct gdb_reg reg[GDB_REGS_MAX];
    unsigned n;
    u32 ymm, opmask, zmm, hi16, pkru;                              /* places in x86.xsave; 0: not in this guest */
    char *xml;
    size_t xml_len;
    unsigned rip, rsp, rbp;                                        /* their numbers */
};

/* bits32: an i386 instead of an x86-64 processor. 0 or -ENOMEM with err(). */
int gdb_regs_init(struct gdb_regs *r, const struct vm_debug *d, bool bits32);
void gdb_regs_free(struct gdb_regs *r);

/* out has room for GDB_REG_BYTES_MAX. */
void gdb_reg_get(const struct gdb_regs *r, unsigned i, const struct x86 *x, u8 cr8, u8 *out);
/* Changes *x. -EPERM for registers that cannot be written, -EINVAL for values that no processor could hold. */
int gdb_reg_set(const struct gdb_regs *r, unsigned i, struct x86 *x, const u8 *in);
