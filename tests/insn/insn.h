/*
 * insn: the same instruction, natively on this processor and on an engine; everything that the guest can see must be the same.
 *
 * A case is one instruction with an initial state. Both sides have the same pages at the same addresses, with an int3 behind the instruction and wherever it may
 * jump to, so every case ends in an exception: #BP when all went well, else the instruction's own fault.
 */
#pragma once

#include <Zydis/Zydis.h>

#include "cpu/engine.h"
#include "cpu/x86.h"

/* The pages that both sides have. */
#define REGION 0x10000000ull
enum { PAGE_CODE0, PAGE_CODE1, PAGE_GAP0, PAGE_DATA0, PAGE_DATA1, PAGE_GAP1, PAGE_DATA2, PAGE_RO, PAGE_DATA3, PAGE_GAP2, PAGE_STACK0, PAGE_STACK1,
       PAGE_GAP3, PAGE_CTL, PAGE_UCODE, PAGE_UDATA, PAGES };          /* the last three are tests/diff's */
#define PAGE_VA(n) (REGION + PAGE_SIZE * (n))
#define CODE_VA PAGE_VA(PAGE_CODE0)
enum page_kind { KIND_NONE, KIND_CODE, KIND_RW, KIND_RO };
static inline enum page_kind page_kind(unsigned n)
{
    switch (n) {
    case PAGE_CODE0: case PAGE_CODE1: return KIND_CODE;
    case PAGE_GAP0: case PAGE_GAP1: case PAGE_GAP2: case PAGE_GAP3: case PAGE_UCODE: return KIND_NONE;
    case PAGE_RO: return KIND_RO;
    default: return KIND_RW;
    }
}

struct vectors {
    u8 zmm[32][64];
    u64 k[8];
    u32 mxcsr;
    u16 fcw, fsw, fop;
    u8 ftw;
    u64 fip, fdp;
    u8 st[8][10];
};

struct state {
    u64 gpr[16], rip, rflags, fs_base, gs_base;
    struct vectors v;
};

struct outcome {
    struct state s;
    unsigned vector;
    u64 error, cr2;
    u8 mem[PAGES][PAGE_SIZE];                                      /* pages of KIND_RW */
};

struct icase {
    unsigned number;
    u8 code[16];
    unsigned len;
    const u8 *text;                                                /* a program of text_len bytes instead, at CODE_VA, or NULL (tests/diff) */
    unsigned text_len;
    bool compat;                                                   /* 32-bit code */
    struct state in;
    u64 patch_va[4];                                               /* quadwords of memory that differ from the common pattern; 0: none */
    u64 patch[4];
    u8 *image;                                                     /* an XSAVE image of 1024 bytes for patch_va[0], or NULL */
    const char *what;                                              /* of the access: "plain", "crossing", "unmapped", ... */
    ZydisDecodedInstruction z;
    ZydisDecodedOperand o[ZYDIS_MAX_OPERAND_COUNT];
};

/* Offsets in the host's standard XSAVE format; 0: the host lacks the component. */
struct xlayout {
    u32 avx, opmask, zmm_hi, hi16;
    u64 xcr0;
    u32 mxcsr_mask;
};
void xlayout_host(struct xlayout *l);
/* Between struct vectors and an XSAVE image in standard format with 64-bit pointers. */
void vectors_put(const struct vectors *v, const struct xlayout *l, u8 *image);
void vectors_get(struct vectors *v, const struct xlayout *l, const u8 *image);

/* native.c. Returns 0, or -1 with a reason why this host cannot. */
int native_open(const struct xlayout *l, bool writable_code, const char **why);
void native_run(const struct icase *i, const u8 *pattern, struct outcome *out);

/* guest.c: any number of them, each on a thread of the caller's. */
struct guest;
struct guest_config {
    const struct engine *engine;
    struct machine_tools tools;
    const struct log *log;
    bool writable_code;                                            /* and what becomes of it is part of the outcome */
    bool kernel;                                                   /* the program runs at CPL 0: below */
};
int guest_open(const struct guest_config *config, struct guest **out);
int guest_warm_up(struct guest *g, const u8 *pattern);             /* before native_open() */
int guest_run(struct guest *g, const struct icase *i, const u8 *pattern, struct outcome *out);
void guest_stop(struct guest *g);                                  /* guest_run() returns -1 soon; a signal handler may call it */
void guest_interrupt(struct guest *g);                             /* any thread: vector GUEST_INTR soon, if IF allows it */
u64 guest_interrupts(struct guest *g);                             /* that it has handled */
struct vcpu *guest_vcpu(struct guest *g);
void guest_close(struct guest *g);

/*
 * A guest whose program is its kernel. The test's pages are the supervisor's; PAGE_UCODE (execute only) and PAGE_UDATA are the user's, SMEP, SMAP, PGE, PCIDE and
 * FSGSBASE are on where they exist, and page tables are as new before each run. The handler of GUEST_INTR changes nothing that can be seen; user code comes back by
 * SYSCALL or INT GUEST_BACK, to where GUEST_BACK_VA says.
 */
#define GUEST_INTR 0x40u
#define GUEST_BACK 0x80u
#define GUEST_BACK_VA (PAGE_VA(PAGE_CTL) + 8 * 144)
#define GUEST_PTE_VA(p) (0xffff800000004000ull + 8 * (p))          /* of page p, where the supervisor can change it */
#define GUEST_STUBS 4u                                             /* pieces of user code, each this far from the one before */
#define GUEST_STUB_BYTES 64u

/* compare.c: notes what differs (a: native) as lines of a report; an empty report: nothing does. */
void differ_begin(void);
void differ(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
const char *differ_report(void);
void compare_registers(const struct state *a, const struct state *b, u64 undefined);
void compare_vectors(const struct vectors *a, const struct vectors *b);
void compare_memory(const struct outcome *a, const struct outcome *b);
/*
 * An outcome that differs from the processor's is compared with up to so many more runs of it, and has to be one of them, whole. A host that switches threads
 * in between loses x87's pointers where x87 is in its initial configuration otherwise (the processor counts FIP and FDP not to that), so not all runs are alike.
 */
#define NATIVE_TRIES 3u

/* gen.c: cases that differ in mnemonic, form, size, prefixes and addresses; the same list for the same seed. pattern: what memory holds before each case. */
struct gen;
struct gen *gen_open(u64 seed, const struct xlayout *l, const u8 *pattern);
void gen_rounds(struct gen *g, unsigned n);                        /* passes over all opcodes, instead of many: fewer cases sooner */
/* The next case, or false after the last. */
bool gen_next(struct gen *g, struct icase *i);
void gen_close(struct gen *g);
void gen_pattern(u64 seed, u8 *pattern);                           /* PAGES pages */

/* Why a mnemonic is not tested, or NULL. */
const char *gen_excluded(const ZydisDecodedInstruction *z);
/* "r32,m32,imm": the visible operands. */
void gen_form(const struct icase *i, char *buf, size_t n);

/* A small generator of random numbers (xorshift64*). */
struct rng {
    u64 s;
};
static inline u64 rnd(struct rng *r)
{
    r->s ^= r->s >> 12;
    r->s ^= r->s << 25;
    r->s ^= r->s >> 27;
    return r->s * 0x2545f4914f6cdd1dull;
}
static inline unsigned rnd_below(struct rng *r, unsigned n)
{
    return (unsigned)((rnd(r) >> 32) % n);
}
static inline bool one_in(struct rng *r, unsigned n)
{
    return rnd_below(r, n) == 0;
}

/* values.c: registers and memory with the values that matter */
u64 value_integer(struct rng *r);
void value_fill(struct rng *r, u8 *p, size_t n);                   /* vector contents: random bits, single and double floats, small integers */
void value_vectors(struct rng *r, const struct xlayout *l, struct vectors *v);
