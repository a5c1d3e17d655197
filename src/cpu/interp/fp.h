/*
 * Extended state in interp: x87, MMX, SSE, AVX, AVX-512, and the XSAVE family (Intel SDM vol. 1 chapters 8 to 15).
 *
 * Arithmetic is never modelled: a stub, generated once per distinct instruction, loads from `struct fp` the registers that the instruction reads, executes the
 * guest's own instruction with its memory operand redirected to a host address, and stores what it wrote. Only control and state instructions are C.
 *
 * The guest's vector registers live here as flat 64-byte rows, not in XSAVE's split layout; fp_load() and fp_store() convert from and to x86.xsave when
 * the interpreter is entered and left. Rows take a tenth of XSAVE's and XRSTOR's time, also where a translator moves the state to and from the processor's
 * registers (cpu/bt/fpstate.c). All of it belongs to the vCPU's thread.
 *
 *     fp.c        binding, #UD/#NM/#XM rules, handlers of MMX/SSE/AVX instructions
 *     fp_stub.c   the stub generator, its code arena, the signal handler for faults inside stubs
 *     fp_mask.c   accesses by elements: masked loads and stores, compress and expand, gather and scatter, MASKMOVDQU
 *     fp_x87.c    x87, EMMS
 *     xsave.c     FXSAVE and XSAVE families, MXCSR, XCR0, PKRU; fp_load, fp_store
 */
#pragma once

#include "cpu/interp/interp.h"

/* ---- for the core ---- */

/* Binds any instruction of these extensions that has no row in the table; BIND_UD for what it does not know or the guest's CPUID does not show. */
int fp_bind(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);

/* Nearly no room for further stubs: the block cache must be emptied (which calls fp_flush_stubs) before the next block is decoded. */
bool fp_full(const struct icpu *c);

/* x86.xsave to the live registers and back: icpu_load() and icpu_store() call these. */
void fp_load(struct icpu *c);
void fp_store(struct icpu *c);
size_t fp_xsave_bytes(const struct icpu *c);                       /* how much of x86.xsave they use */

/* Binds of rows in insn_fp.def, and their arguments. */
enum { X87_NINIT, X87_NCLEX, X87_NSTCW, X87_LDCW, X87_NSTSW, X87_NSTENV, X87_LDENV, X87_NSAVE, X87_RSTOR, X87_WAIT, X87_NONE, X87_EMMS };
enum {
    XS_FXSAVE, XS_FXSAVE64, XS_FXRSTOR, XS_FXRSTOR64, XS_XSAVE, XS_XSAVE64, XS_XSAVEOPT, XS_XSAVEOPT64, XS_XSAVEC, XS_XSAVEC64, XS_XSAVES, XS_XSAVES64,
    XS_XRSTOR, XS_XRSTOR64, XS_XRSTORS, XS_XRSTORS64, XS_LDMXCSR, XS_VLDMXCSR, XS_STMXCSR, XS_VSTMXCSR, XS_XGETBV, XS_XSETBV, XS_RDPKRU, XS_WRPKRU,
};
int fp_bind_x87_control(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int fp_bind_xsave(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int fp_bind_vzero(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int fp_bind_maskmov(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);

/* ---- inside fp*.c and xsave.c ---- */

#define FP_ARENA_BYTES (2 * MiB)
#define FP_INSNS 16384u
#define FP_BUCKETS 4096u
#define FP_KEY_MAX 24
#define MXCSR_RESET 0x1f80u
#define MXCSR_MM 0x20000u                                          /* AMD: misaligned SSE operands allowed */
#define FSW_ES 0x80u
#define FSW_B 0x8000u
#define FSW_TOP(fsw) ((fsw) >> 11 & 7u)

/* FXSAVE's image (SDM vol. 1 table 10-2), as much of it as x87 and MMX use. */
struct fp_legacy {
    u16 fcw, fsw;
    u8 ftw, rsvd;                                                  /* abridged: bit n set means that physical register n is not empty */
    u16 fop;
    u64 fip, fdp;
    u32 mxcsr, mxcsr_mask;
    struct {
        u64 mant;
        u16 exp, pad[3];
    } st[8];                                                       /* relative to TOP, not physical */
    u8 xmm[256], unused[96];
} __attribute__((aligned(64)));

enum { XS_X87, XS_SSE, XS_AVX, XS_OPMASK = 5, XS_ZMM_HI256, XS_HI16_ZMM, XS_PKRU = 9, XS_COMPONENTS };

#define FP_TRACKED (XSTATE_AVX | XSTATE_AVX512)                    /* in fp.in_use; SSE counts as in use always */
#define FP_NATIVE (XSTATE_SSE | FP_TRACKED)                        /* what a translator keeps in the processor's registers */

#define FSW_EXCEPTIONS 0x3fu
/* FSW.ES and FSW.B follow from the flags and masks. */
static inline void fp_x87_summary(struct fp_legacy *l)
{
    l->fsw &= (u16) ~(FSW_ES | FSW_B);
    if (l->fsw & ~l->fcw & FSW_EXCEPTIONS)
        l->fsw |= FSW_ES | FSW_B;
}

/* How an op's memory operand is reached when it is not one plain run of bytes. */
enum fp_mask_kind {
    FP_PLAIN,
    FP_MASK_K,         /* EVEX {k}: elements by mask register; a broadcast element counts when any of its copies does */
    FP_MASK_PACKED,    /* compress and expand: as many elements as mask bits, without gaps */
    FP_MASK_V,         /* VMASKMOV, VPMASKMOV: sign bits of a vector register */
};

enum fp_class { FP_SSE, FP_AVX, FP_AVX512, FP_MMX, FP_X87 };

struct fp;

/* A stub and what its handlers must know: shared by all ops whose instructions differ only in the memory operand's address. */
struct fp_insn {
    /* Returns 0, or vector | MXCSR << 32 when the instruction faulted. */
    u64 (*code)(struct fp *f, struct icpu *c, void *mem);
    struct fp_insn *next;                                          /* in its hash bucket */
    u16 bytes;                                                     /* of the memory operand; 0: none */
    bool writes;                                                   /* the memory operand is written, else read */
    bool merges;                                                   /* parts that a mask excludes are written with what they were */
    u8 cls;                                                        /* enum fp_class */
    bool xmm;                                                      /* MMX class: has an XMM operand too, so CR4.OSFXSR counts */
    u8 align;                                                      /* #GP unless the memory operand is aligned to this; 1: any */
    u8 unit;                                                       /* #AC, when armed, unless it is aligned to this */
    u8 kind;                                                       /* enum fp_mask_kind */
    u8 esize;                                                      /* bytes of an element, where masked */
    u8 elements;                                                   /* of the vector that the mask governs; more than in memory when broadcast */
    u8 mask;                                                       /* mask register, or vector register with FP_MASK_V */
    u8 key_len;
    u8 key[FP_KEY_MAX];                                            /* class, guest GPRs, the instruction with its memory operand as [M] */
};

struct fp {
    u8 v[32][64] __attribute__((aligned(64)));
    u64 k[8];
    u32 mxcsr, host_mxcsr;
    u64 in_use;                                                    /* of FP_TRACKED: components that may be other than all zero in v and k */
    struct fp_legacy x87;                                          /* mxcsr and xmm in it are not the guest's */
    u8 bounce[64 + 192] __attribute__((aligned(64)));              /* memory operands that lie across pages, in devices, in code */
    u32 x87_uses;                                                  /* how often x87 or MMX was used here: a translator may want it in the registers */
    u16 fcs, fds;                                                  /* selectors that belong to x87.fip and x87.fdp (32-bit formats) */

    /* facts about host and guest, fixed at fp_open() */
    bool avx, avx512, avx512bw;
    bool xinuse;                                                   /* XGETBV with ECX = 1 tells which components the processor has in use */
    bool fop_on_error, fdp_on_error, no_selectors;                 /* x87 pointers, see fp_x87.c */
    bool save_on_error;                                            /* FXSAVE and XSAVE store x87 pointers as zero unless an error is pending (AMD) */
    u32 mxcsr_mask;
    u32 xs_size[XS_COMPONENTS], xs_off[XS_COMPONENTS];             /* components of the standard XSAVE format; size 0: absent */
    u32 xs_align64;                                                /* bit n: component n is aligned to 64 in the compacted format */
    u64 xcr0_mask;                                                 /* bits that XSETBV may set */
    bool xsavec, xgetbv1, xsaves, pku;
    bool native;                                                   /* the host's XSAVEC and XRSTOR do the same to FP_NATIVE: cpu/bt/xstate.c */
    u8 image[X86_XSAVE_MAX] __attribute__((aligned(64)));          /* theirs */
    bool isa[ZYDIS_ISA_SET_MAX_VALUE + 1];                         /* instruction sets that the guest's CPUID shows */

    /* stubs */
    u8 *arena_rw;                                                  /* the same pages twice: writable here, executable there */
    u8 *arena_rx;
    size_t arena_used, arena_first;                                /* the first stub stands behind the common fault exit */
    struct fp_insn *insn;                                          /* FP_INSNS of them */
    unsigned insns;
    struct fp_insn *hash[FP_BUCKETS];
};

/* All use of what the guest's instructions change goes through here: what a translator has left in the registers comes first. */
static inline struct fp *icpu_fp(const struct icpu *c)
{
    icpu_claim((struct icpu *)c);
    return c->fp;
}

/* The offset part of op's memory operand, cut to the address size. */
static inline u64 fp_ea(const struct icpu *c, const struct op *op)
{
    u64 ea = c->r[op->base] + (c->r[op->index] << op->scale) + (u64)op->disp;

    return op->asize == 8 ? ea : op->asize == 4 ? (u32)ea : (u16)ea;
}

/* The rules by which an instruction of a class is #UD, #NM or (x87, MMX) #MF now: 0 or OP_FAULT. */
int fp_deny(struct icpu *c, enum fp_class cls);
static inline int fp_check_sse(struct icpu *c)
{
    const struct x86 *x = c->x;

    if (unlikely((x->cr0 & (CR0_EM | CR0_TS)) | (~x->cr4 & CR4_OSFXSR)))
        return fp_deny(c, FP_SSE);
    return 0;
}
static inline int fp_check_avx(struct icpu *c, u64 xcr0)
{
    const struct x86 *x = c->x;

    if (unlikely((x->cr0 & CR0_TS) | (~x->cr4 & CR4_OSXSAVE) | (~x->xcr0 & xcr0)))
        return fp_deny(c, xcr0 & XSTATE_AVX512 ? FP_AVX512 : FP_AVX);
    icpu_fp(c)->in_use |= xcr0 & ~XSTATE_SSE;
    return 0;
}
#define XCR0_AVX (XSTATE_SSE | XSTATE_AVX)
#define XCR0_AVX512 (XCR0_AVX | XSTATE_AVX512)
static inline int fp_check(struct icpu *c, enum fp_class cls)
{
    return cls == FP_SSE ? fp_check_sse(c) : cls == FP_AVX ? fp_check_avx(c, XCR0_AVX) : cls == FP_AVX512 ? fp_check_avx(c, XCR0_AVX512) : fp_deny(c, cls);
}

/* Alignment checking is in force (SDM vol. 3A 6.15 interrupt 17). The fast view then never matches, so only slow paths ask. */
static inline bool fp_ac_armed(const struct icpu *c)
{
    return (c->flags & FLAG_AC) && c->cpl == 3 && (c->x->cr0 & CR0_AM);
}

/* What comes of a stub's nonzero result: OP_FAULT. */
int fp_stub_fault(struct icpu *c, u64 result);

/* fp_stub.c */
int fp_stub_open(struct fp *f);
void fp_stub_close(struct fp *f);
void fp_stub_reset(struct fp *f);
struct fp_insn *fp_stub_make(struct fp *f, const struct decoded *d, enum fp_class cls);
void fp_stub_here(const struct fp *f);                             /* this thread runs f's stubs from now on: its faults in them are the guest's */

/* fp_mask.c: handler of ops with a masked memory operand, and the binder of gathers and scatters */
unsigned fp_offset_in_line(const struct icpu *c, const struct op *op); /* the operand's linear address modulo 64, whether it may be accessed or not */
int fp_op_masked(struct icpu *c, const struct op *op);
int fp_bind_vsib(struct icpu *c, const struct decoded *d, struct op *op);

/* fp_x87.c */
int fp_bind_x87(struct icpu *c, const struct decoded *d, struct op *op);
/* MMX instructions address registers by number: makes TOP zero and all registers valid, as each of them does. */
void fp_mmx_enter(struct fp *f);
void fp_mmx_undo(struct fp *f, u16 fsw, u8 ftw);                   /* the instruction has faulted: what TOP and the tags were before */
void fp_x87_init(struct fp *f);                                    /* as FNINIT; registers keep their contents */

/* xsave.c */
void fp_xsave_open(struct icpu *c, struct fp *f);
