/* Random programs (prog.h). Encodings: Intel SDM vol. 2. */
#include "prog.h"

#include <string.h>

/* What of a case a program needs. */
struct entry {
    u8 code[16], len;
    u8 disp_at;                                                    /* RIP-relative: where the displacement is; 0: none */
    bool std, undefined;                                           /* DF as the case has it; flags are undefined afterwards */
    bool masked;                                                   /* stores by a mask: where that is 0, a page may be dirty or not */
    u16 address, read;                                             /* registers of addresses (and of whatever makes one), and others that are read */
    u64 target;                                                    /* of RIP-relative operands */
    u64 gpr[16];
};

struct catalogue {
    struct entry *e;
    unsigned n, room;
};

/* ---- the catalogue ---- */
static bool left_out(const ZydisDecodedInstruction *z)
{
    switch (z->meta.category) {
    case ZYDIS_CATEGORY_XSAVE: case ZYDIS_CATEGORY_XSAVEOPT: case ZYDIS_CATEGORY_AVX2GATHER: case ZYDIS_CATEGORY_GATHER: case ZYDIS_CATEGORY_SCATTER:
    case ZYDIS_CATEGORY_INTERRUPT: case ZYDIS_CATEGORY_SEGOP: case ZYDIS_CATEGORY_SYSTEM: case ZYDIS_CATEGORY_UFMA:
        return true;
    default:
        break;
    }
    switch (z->mnemonic) {
    case ZYDIS_MNEMONIC_LDMXCSR: case ZYDIS_MNEMONIC_VLDMXCSR: case ZYDIS_MNEMONIC_FLDCW: case ZYDIS_MNEMONIC_FLDENV: case ZYDIS_MNEMONIC_FRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64: case ZYDIS_MNEMONIC_POPF: case ZYDIS_MNEMONIC_POPFD: case ZYDIS_MNEMONIC_POPFQ:
    case ZYDIS_MNEMONIC_PUSHF: case ZYDIS_MNEMONIC_PUSHFD: case ZYDIS_MNEMONIC_PUSHFQ: /* of memory that nobody has chosen; of flags that the host sees otherwise */
    case ZYDIS_MNEMONIC_UD0: case ZYDIS_MNEMONIC_UD1: case ZYDIS_MNEMONIC_UD2:
    case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE:
        return true;
    default:
        return z->meta.branch_type != ZYDIS_BRANCH_TYPE_NONE;
    }
}

static u16 gpr_bit(ZydisRegister reg)
{
    if (ZydisRegisterGetClass(reg) == ZYDIS_REGCLASS_GPR8) {
        unsigned n = reg - ZYDIS_REGISTER_AL;
        return (u16)BIT(n < 8 ? n & 3 : n - 4);
    }
    ZydisRegister wide = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);
    return ZydisRegisterGetClass(wide) == ZYDIS_REGCLASS_GPR64 ? (u16)BIT(wide - ZYDIS_REGISTER_RAX) : 0;
}

/* The registers that have to have the case's own values. False: that is not enough. */
static bool addresses(const struct icase *i, struct entry *e)
{
    const ZydisDecodedInstruction *z = &i->z;
    for (unsigned n = 0; n < z->operand_count; n++) {
        const ZydisDecodedOperand *o = &i->o[n];
        if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && o->actions & ZYDIS_OPERAND_ACTION_MASK_READ)
            e->read |= gpr_bit(o->reg.value);
        if (o->type != ZYDIS_OPERAND_TYPE_MEMORY)
            continue;
        if (o->mem.segment == ZYDIS_REGISTER_FS || o->mem.segment == ZYDIS_REGISTER_GS || o->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
            return false;
        if (o->mem.base == ZYDIS_REGISTER_EIP)
            return false;
        if (o->mem.base == ZYDIS_REGISTER_RIP) {
            e->disp_at = z->raw.disp.offset;
            e->target = i->in.rip + z->length + (u64)z->raw.disp.value;
        } else if (o->mem.base) {
            e->address |= gpr_bit(o->mem.base);
        }
        if (o->mem.index)
            e->address |= gpr_bit(o->mem.index);
    }
    bool string = z->meta.category == ZYDIS_CATEGORY_STRINGOP, far_bit = z->meta.category == ZYDIS_CATEGORY_BITBYTE && i->o[1].type == ZYDIS_OPERAND_TYPE_REGISTER;
    bool divides = z->mnemonic == ZYDIS_MNEMONIC_DIV || z->mnemonic == ZYDIS_MNEMONIC_IDIV;
    if (string || far_bit || divides)
        e->address |= e->read;
    if (string)
        e->address |= BIT(RCX);
    return true;
}

static bool stores_by_mask(const struct icase *i)
{
    switch (i->z.mnemonic) {
    case ZYDIS_MNEMONIC_VMASKMOVPS: case ZYDIS_MNEMONIC_VMASKMOVPD: case ZYDIS_MNEMONIC_VPMASKMOVD: case ZYDIS_MNEMONIC_VPMASKMOVQ:
    case ZYDIS_MNEMONIC_MASKMOVQ: case ZYDIS_MNEMONIC_MASKMOVDQU: case ZYDIS_MNEMONIC_VMASKMOVDQU:
        return true;
    default:
        return i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX && i->o[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
    }
}

static void catalogue_add(struct catalogue *c, const struct icase *i)
{
    struct entry e = { .len = (u8)i->len, .std = i->in.rflags & FLAG_DF };
    bool fine = !strcmp(i->what, "register") || !strcmp(i->what, "aligned") || !strcmp(i->what, "misaligned") || !strcmp(i->what, "crossing");
    if (i->compat || !fine || left_out(&i->z) || c->n == c->room || !addresses(i, &e))
        return;
    memcpy(e.code, i->code, i->len);
    memcpy(e.gpr, i->in.gpr, sizeof e.gpr);
    e.masked = stores_by_mask(i);
    e.undefined = i->z.cpu_flags && i->z.cpu_flags->undefined;
    c->e[c->n++] = e;
}

struct catalogue *catalogue_open(u64 seed, const struct xlayout *l, const u8 *pattern)
{
    struct catalogue *c = calloc(1, sizeof *c);
    struct gen *g = gen_open(seed, l, pattern);
    static struct icase i;
    if (c) {
        c->room = 120000;
        c->e = calloc(c->room, sizeof *c->e);
    }
    if (!c || !c->e || !g)
        return NULL;
    gen_rounds(g, 2);
    while (gen_next(g, &i))
        catalogue_add(c, &i);
    gen_close(g);
    return c;
}

void catalogue_close(struct catalogue *c)
{
    free(c->e);
    free(c);
}

unsigned catalogue_size(const struct catalogue *c)
{
    return c->n;
}

/* ---- making one ---- */
static struct piece *add(struct prog *p, unsigned kind, unsigned id, u32 value)
{
    struct piece *q = &p->piece[p->pieces++];
    *q = (struct piece){ .kind = (u8)kind, .id = (u8)id, .value = value };
    return q;
}

static void add_insn(const struct catalogue *c, struct rng *r, struct prog *p)
{
    struct piece *q = add(p, PIECE_INSN, 0, one_in(r, 3) ? (u32)rnd(r) : 0);
    do
        q->insn = rnd_below(r, c->n);
    while (p->kernel && c->e[q->insn].masked);                     /* a kernel sees dirty bits */
}

/* What a kernel does. */
enum system { SYS_CLI, SYS_STI, SYS_POPF, SYS_SWAPGS, SYS_CR3, SYS_INVLPG, SYS_INVPCID, SYS_WRMSR, SYS_BASES, SYS_CR2, SYS_CR_READ, SYS_CR0_WP, SYS_CR4_PGE, SYS_IRET,
              SYS_INT, SYS_USER_IRET, SYS_USER_SYSRET, SYS_STAC, SYS_PTE_W, SYS_PTE_AD, SYSTEMS };

/* n pieces of code without structure. */
static void add_plain(const struct catalogue *c, struct rng *r, struct prog *p, unsigned n)
{
    for (; n > 0 && p->pieces < PROG_PIECES - 8; n--) {
        if (p->kernel && one_in(r, 3)) {
            add(p, PIECE_SYSTEM, rnd_below(r, SYSTEMS), (u32)rnd(r));
            continue;
        }
        switch (rnd_below(r, 24)) {
        case 0: add(p, PIECE_FLAGS, 0, (u32)rnd(r)); break;
        case 1: add(p, PIECE_DUMP, 0, (u32)rnd(r)); break;
        case 2: case 3: add(p, PIECE_SKIP, rnd_below(r, 16), 1 + rnd_below(r, 4)); break;
        case 4: add(p, PIECE_TABLE, rnd_below(r, 16), (u32)rnd(r)); break;
        case 5: case 6: add(p, PIECE_STACK, rnd_below(r, 16), (u32)rnd(r)); break;
        case 7: add(p, PIECE_PATCH, rnd_below(r, 3), (u32)rnd(r)); break;
        default: add_insn(c, r, p); break;
        }
    }
}

static void add_body(const struct catalogue *c, struct rng *r, struct prog *p, unsigned depth, unsigned *ids, unsigned funcs)
{
    unsigned parts = 1 + rnd_below(r, 3);
    while (parts-- > 0 && p->pieces < PROG_PIECES - 16) {
        add_plain(c, r, p, 1 + rnd_below(r, 6));
        if (funcs && one_in(r, 2))
            add(p, PIECE_CALL, rnd_below(r, funcs), rnd_below(r, 3));
        if (depth < 2 && one_in(r, 2)) {
            unsigned id = (*ids)++;
            add(p, PIECE_LOOP, id, 2 + rnd_below(r, depth ? 5 : 20));
            add_body(c, r, p, depth + 1, ids, funcs);
            add(p, PIECE_END, id, 0);
        }
    }
}

void prog_make(const struct catalogue *c, const struct xlayout *l, u64 seed, unsigned number, struct prog *p)
{
    struct rng r = { (seed * 0x9e3779b97f4a7c15 + number + 1) * 0xbf58476d1ce4e5b9 | 1 };
    unsigned funcs = rnd_below(&r, 3), ids = funcs;
    for (unsigned i = 0; i < 8; i++)
        rnd(&r);
    p->pieces = 0;
    for (unsigned i = 0; i < 16; i++)
        p->in.gpr[i] = value_integer(&r);
    p->in.rip = CODE_VA;
    p->in.rflags = FLAG_1 | FLAG_IF | (rnd(&r) & FLAGS_ARITH);
    p->in.fs_base = p->in.gs_base = 0;
    value_vectors(&r, l, &p->in.v);
    p->in.v.mxcsr = 0x1f80 | (u32)(rnd(&r) & 0xe040);
    p->in.v.fcw = (u16)(0x37f | (rnd(&r) & 0xc00));
    p->in.v.fsw &= 0x7f00 & ~0x80;
    for (unsigned f = 0; f < funcs; f++) {                         /* a function calls those before it only */
        add(p, PIECE_FUNC, f, 0);
        add_body(c, &r, p, 1, &ids, f);
        add(p, PIECE_END, f, 0);
    }
    while (p->pieces < PROG_PIECES - 24 && !one_in(&r, 4))
        add_body(c, &r, p, 0, &ids, funcs);
    add(p, PIECE_DUMP, 0, 0);
    if (one_in(&r, 4))
        add(p, PIECE_FAULT, rnd_below(&r, 3), (u32)rnd(&r));
}

void prog_remove(struct prog *p, unsigned first, unsigned n)
{
    memmove(p->piece + first, p->piece + first + n, (p->pieces - first - n) * sizeof *p->piece);
    p->pieces -= n;
}

/* ---- bytes ---- */
struct as {
    struct prog *p;
    unsigned n;
    bool full;
    u16 func[256], loop[256];                                      /* where they begin, plus 1 */
    u16 end_jump[256];                                             /* displacement of the jump over a function, plus 1 */
    u16 patched[8];                                                /* immediates of instructions that may be patched */
    unsigned patches;
};

static void put(struct as *a, const void *b, unsigned n)
{
    if (a->n + n > PROG_BYTES - 16) {                              /* int3s stay behind it */
        a->full = true;
        return;
    }
    memcpy(a->p->text + a->n, b, n);
    a->n += n;
}
#define PUT(a, ...) put(a, (const u8[]){__VA_ARGS__}, sizeof((const u8[]){__VA_ARGS__}))

static void put32(struct as *a, u32 v)
{
    put(a, &v, 4);
}

static void put_va(struct as *a, u64 v)
{
    put(a, &v, 8);
}

static void put_mov(struct as *a, unsigned reg, u64 v)
{
    PUT(a, 0x48 | reg >> 3, 0xb8 | (reg & 7));
    put(a, &v, 8);
}

/* A RIP-relative displacement to va, behind which `behind` bytes of the instruction follow. */
static void put_rel(struct as *a, u64 va, unsigned behind)
{
    put32(a, (u32)(va - (CODE_VA + a->n + 4 + behind)));
}

#define CTL(n) (PAGE_VA(PAGE_CTL) + 8 * (n))
enum { CTL_LOOPS = 0, CTL_RSP = 64, CTL_JUMP = 128, CTL_TABLE = 136, CTL_FLAGS = 160, CTL_DUMP = 256 };
#define STACK_VA (PAGE_VA(PAGE_STACK1) + 1024)

static void patch32(struct as *a, unsigned at, u32 v)
{
    if (!a->full)
        memcpy(a->p->text + at, &v, 4);
}

static void put_insn(struct as *a, const struct entry *e, u32 extra)
{
    u16 set = e->address | (u16)(e->read & extra);
    for (unsigned r = 0; r < 16; r++)
        if (set & BIT(r))
            put_mov(a, r, e->gpr[r]);
    PUT(a, e->std ? 0xfd : 0xfc);
    unsigned at = a->n;
    put(a, e->code, e->len);
    if (e->disp_at)
        patch32(a, at + e->disp_at, (u32)(e->target - (CODE_VA + at + e->len)));
    if (e->std)
        PUT(a, 0xfc);
    if (e->undefined) {
        PUT(a, 0x3d);                                              /* cmp eax, imm32 */
        put32(a, extra);
    }
}

static void put_stack(struct as *a, unsigned reg, u32 v)
{
    put_mov(a, RSP, STACK_VA - (v & 0x78));
    for (unsigned i = 0; i < 1 + (v >> 8 & 3); i++) {
        unsigned r = (reg + i) & 15;
        switch (v >> (10 + 3 * i) & 7) {
        case 0: PUT(a, 0x68); put32(a, v); break;                  /* push imm32 */
        case 1: PUT(a, 0x6a, v); break;
        case 2: PUT(a, 0x66, 0x40 | r >> 3, 0x50 | (r & 7)); break; /* push r16 */
        case 3: PUT(a, 0xff, 0x35); put_rel(a, CTL(CTL_DUMP + r), 0); break;
        case 4: PUT(a, 0x8f, 0x05); put_rel(a, CTL(CTL_DUMP + r), 0); break;
        case 5: PUT(a, 0x40 | r >> 3, 0x58 | (r & 7)); if (r == RSP) put_mov(a, RSP, STACK_VA); break;
        default: PUT(a, 0x40 | r >> 3, 0x50 | (r & 7)); break;
        }
    }
    PUT(a, 0x40 | reg >> 3, 0x58 | (reg & 7));                     /* pop reg */
    if (reg == RSP)
        put_mov(a, RSP, STACK_VA);
}

static void put_flags(struct as *a, u32 v)
{
    put_mov(a, RSP, STACK_VA);
    PUT(a, 0x9c, 0x66, 0x81, 0x24, 0x24, 0xd5, 0x08);              /* pushfq; and word [rsp], 0x8d5 */
    PUT(a, 0x8f, 0x05);
    put_rel(a, CTL(CTL_FLAGS + v % 64), 0);
    PUT(a, 0x3d);
    put32(a, v);
}

static void put_dump(struct as *a, u32 v)
{
    for (unsigned r = 0; r < 16; r++) {
        PUT(a, 0x48 | (r >> 3) << 2, 0x89, 0x05 | (r & 7) << 3);
        put_rel(a, CTL(CTL_DUMP + 16 * (v % 16) + r), 0);
    }
}

static void put_call(struct as *a, unsigned id, u32 way)
{
    if (!a->func[id])
        return;
    u64 f = CODE_VA + a->func[id] - 1;
    put_mov(a, RSP, STACK_VA - 256 * (id + 1));
    if (way == 0) {
        PUT(a, 0xe8);
        put_rel(a, f, 0);
    } else {
        put_mov(a, RAX, f);
        if (way == 1) {
            PUT(a, 0xff, 0xd0);
        } else {
            PUT(a, 0x48, 0x89, 0x05);
            put_rel(a, CTL(CTL_JUMP), 0);
            PUT(a, 0xff, 0x15);
            put_rel(a, CTL(CTL_JUMP), 0);
        }
    }
}

static void put_func(struct as *a, unsigned id)
{
    PUT(a, 0xe9);
    put32(a, 0);
    a->end_jump[id] = (u16)(a->n - 4 + 1);
    a->func[id] = (u16)(a->n + 1);
    PUT(a, 0x48, 0x89, 0x25);                                      /* mov [rip + d], rsp */
    put_rel(a, CTL(CTL_RSP + id), 0);
}

static void put_end(struct as *a, unsigned id)
{
    if (a->func[id] && a->end_jump[id]) {
        PUT(a, 0x48, 0x8b, 0x25);
        put_rel(a, CTL(CTL_RSP + id), 0);
        PUT(a, 0xc3);
        patch32(a, a->end_jump[id] - 1u, (u32)(a->n - (a->end_jump[id] - 1u + 4)));
        a->end_jump[id] = 0;
    } else if (a->loop[id]) {
        PUT(a, 0xff, 0x0d);                                        /* dec dword [] */
        put_rel(a, CTL(CTL_LOOPS + id % 64), 0);
        PUT(a, 0x0f, 0x85);
        put32(a, (u32)(a->loop[id] - 1 - (a->n + 4)));
        a->loop[id] = 0;
    }
}

static void put_loop(struct as *a, unsigned id, u32 times)
{
    PUT(a, 0xc7, 0x05);                                            /* mov dword [], imm32 */
    put_rel(a, CTL(CTL_LOOPS + id % 64), 4);
    put32(a, times);
    a->loop[id] = (u16)(a->n + 1);
}

/* A jump by table has four entries; those behind the program's end lead to its int3s. */
static void put_table(struct as *a, unsigned reg, u32 v, u16 table[4])
{
    unsigned t = reg == RSP ? RBX : reg;
    for (unsigned i = 0; i < 4; i++) {
        put_mov(a, RAX, CODE_VA);
        table[i] = (u16)(a->n - 8);
        PUT(a, 0x48, 0x89, 0x05);
        put_rel(a, CTL(CTL_TABLE + i), 0);
    }
    put_mov(a, RDX, CTL(CTL_TABLE));
    PUT(a, 0x48 | (t >> 3) << 2, 0x89, 0xc0 | (t & 7) << 3);       /* mov rax, reg */
    PUT(a, 0x83, 0xe0, 0x03);                                      /* and eax, 3 */
    if (v & 1)
        PUT(a, 0xff, 0x24, 0xc2);                                  /* jmp [rdx + rax * 8] */
    else
        PUT(a, 0x48, 0x8b, 0x04, 0xc2, 0xff, 0xe0);                /* mov rax, [rdx + rax * 8]; jmp rax */
}

static void put_patched(struct as *a, u32 v)
{
    PUT(a, 0x05);                                                  /* add eax, imm32 */
    put32(a, v);
    a->patched[a->patches++ % 8] = (u16)(a->n - 4);
}

static void put_patch(struct as *a, unsigned where, u32 v)
{
    unsigned ahead = 10, n;
    if (where == 0) {
        put_patched(a, v);
        n = a->patched[v % MIN(a->patches, 8u)];
        PUT(a, v & 16 ? 0xc6 : 0x80, v & 16 ? 0x05 : 0x35);        /* mov, or xor, byte [], imm8 */
        put_rel(a, CODE_VA + n + (v >> 5 & 3), 1);
        PUT(a, v >> 8);
    } else {
        if (where == 1)
            ahead += 1 + (v >> 3 & 7);
        PUT(a, 0xc7, 0x05);                                        /* mov dword [], imm32: of the instruction behind this one, or a bit further */
        put_rel(a, CODE_VA + a->n + 8 + 1 + (ahead - 10), 4);
        put32(a, v * 2654435761u);
        for (unsigned i = 10; i < ahead; i++)
            PUT(a, 0x90);
        put_patched(a, v);
    }
}

static void put_fault(struct as *a, unsigned how, u32 v)
{
    if (how == 0)
        PUT(a, 0x31, 0xc9, 0x48, 0xf7, 0xf1);                      /* xor ecx, ecx; div rcx */
    else if (how == 1) {
        put_mov(a, RDI, PAGE_VA(PAGE_GAP1) + (v & 0xff8));
        PUT(a, 0x48, 0x87, 0x07);                                  /* xchg [rdi], rax */
    } else
        PUT(a, 0x0f, 0x0b);
}

/* ---- a kernel's pieces ---- */
#define CR3_NOFLUSH 63u
#define USER_RSP (PAGE_VA(PAGE_UDATA) + 2048)

static void put_flags_value(struct as *a, u32 v)                   /* push imm32: flags that a program may have at any time */
{
    PUT(a, 0x68);
    put32(a, FLAG_1 | (v & (FLAGS_ARITH | FLAG_IF | FLAG_AC | FLAG_ID)));
}

/* Where user code comes back to is behind what follows: patched by put_back(). */
static unsigned put_way_back(struct as *a)
{
    put_mov(a, RAX, 0);
    PUT(a, 0x48, 0xa3);                                            /* mov [abs], rax */
    u64 where = GUEST_BACK_VA;
    put(a, &where, 8);
    return a->n - 18;
}

static void put_back(struct as *a, unsigned at)
{
    u64 va = CODE_VA + a->n;
    if (!a->full)
        memcpy(a->p->text + at, &va, 8);
    put_mov(a, RSP, STACK_VA);
}

static void put_user(struct as *a, bool sysret, u32 v)
{
    unsigned back = put_way_back(a);
    u64 rip = PAGE_VA(PAGE_UCODE) + GUEST_STUB_BYTES * (v % GUEST_STUBS);
    if (sysret) {
        put_mov(a, RSP, USER_RSP);
        put_mov(a, RCX, rip);
        put_mov(a, R11, FLAG_1 | FLAG_IF | (v & FLAGS_ARITH));
        PUT(a, 0xfa, 0x48, 0x0f, 0x07);                            /* cli: no interrupt with the user's stack; sysretq */
    } else {
        put_mov(a, RSP, STACK_VA);
        PUT(a, 0x6a, 0x2b, 0x68);                                  /* push SS, RSP, RFLAGS, CS, RIP */
        put32(a, (u32)USER_RSP);
        put_flags_value(a, (v | FLAG_IF) & ~FLAG_AC);
        PUT(a, 0x6a, 0x33, 0x68);
        put32(a, (u32)rip);
        PUT(a, 0x48, 0xcf);
    }
    put_back(a, back);
}

static void put_iret(struct as *a, u32 v)
{
    put_mov(a, RSP, STACK_VA);
    PUT(a, 0x6a, 0x18, 0x68);
    put32(a, (u32)STACK_VA);
    put_flags_value(a, v);
    PUT(a, 0x6a, 0x10, 0x48, 0x8d, 0x05, 3, 0, 0, 0, 0x50, 0x48, 0xcf); /* push CS; lea rax, [rip + 3]; push rax; iretq */
}

/* Bits of a page's table entry, exchanged or read. */
static void put_pte(struct as *a, bool ad, u32 v)
{
    static const u8 pages[] = {PAGE_DATA0, PAGE_DATA1, PAGE_DATA2, PAGE_DATA3};
    unsigned p = pages[v & 3];
    put_mov(a, RDI, GUEST_PTE_VA(p));
    if (!ad)
        PUT(a, 0x48, 0x0f, 0xba, 0x3f, 1);                         /* btc qword [rdi], 1 */
    else if (v & 4)
        PUT(a, 0x48, 0x0f, 0xba, 0x37, 6);                         /* btr qword [rdi], 6: D */
    else
        PUT(a, 0x8b, 0x07, 0x83, 0xe0, 0x40);                      /* mov eax, [rdi]; and eax, D */
    put_mov(a, RDI, PAGE_VA(p) + (v >> 8 & 0xfff));
    PUT(a, 0x0f, 0x01, 0x3f);                                      /* invlpg [rdi] */
}

static void put_cr3(struct as *a, u32 v)
{
    PUT(a, 0x0f, 0x20, 0xd8);                                      /* mov rax, cr3 */
    if (v & 1)
        PUT(a, 0x48, 0x0f, 0xba, 0xe8, CR3_NOFLUSH);               /* bts rax, 63: #GP without PCIDE */
    PUT(a, 0x0f, 0x22, 0xd8);
}

static void put_bases(struct as *a, u32 v)
{
    put_mov(a, RAX, PAGE_VA(PAGE_DATA0) + (v >> 8 & 0x7f8));
    PUT(a, 0xf3, 0x48, 0x0f, 0xae, v & 1 ? 0xd8 : 0xd0);           /* wrgsbase, wrfsbase rax */
    PUT(a, v & 1 ? 0x65 : 0x64, 0x48, 0x8b, 0x1c, 0x25, 8, 0, 0, 0); /* mov rbx, gs:[8] */
    PUT(a, 0xf3, 0x48, 0x0f, 0xae, v & 2 ? 0xc9 : 0xc1);           /* rdgsbase, rdfsbase rcx */
}

static void put_wrmsr(struct as *a, u32 v)
{
    PUT(a, 0xb9);
    put32(a, 0xc0000100 + v % 3);                                  /* bases of FS, GS, the other GS */
    put_mov(a, RAX, v);
    PUT(a, 0x31, 0xd2, 0x0f, 0x30, 0x0f, 0x32);                    /* xor edx, edx; wrmsr; rdmsr */
}

static void put_invpcid(struct as *a, u32 v)
{
    put_mov(a, RDI, CTL(CTL_JUMP));
    PUT(a, 0x31, 0xc0, 0x48, 0x89, 0x07);                          /* xor eax, eax; mov [rdi], rax: PCID 0 */
    put_mov(a, RAX, PAGE_VA(v >> 8 & 15));
    PUT(a, 0x48, 0x89, 0x47, 0x08, 0xb8);
    put32(a, v & 3);
    PUT(a, 0x66, 0x0f, 0x38, 0x82, 0x07);
}

static void put_system(struct as *a, unsigned what, u32 v)
{
    static const u8 reads[] = {0xc0, 0xd0, 0xd8, 0xe0};            /* of CR0, CR2, CR3, CR4 into RAX */
    switch ((enum system)what) {
    case SYS_CLI: PUT(a, 0xfa); break;
    case SYS_STI: PUT(a, 0xfb); break;
    case SYS_POPF: put_mov(a, RSP, STACK_VA); put_flags_value(a, v); PUT(a, 0x9d); break;
    case SYS_SWAPGS: PUT(a, 0x0f, 0x01, 0xf8); break;
    case SYS_CR3: put_cr3(a, v); break;
    case SYS_INVLPG: put_mov(a, RDI, PAGE_VA(v % PAGES)); PUT(a, 0x0f, 0x01, 0x3f); break;
    case SYS_INVPCID: put_invpcid(a, v); break;
    case SYS_WRMSR: put_wrmsr(a, v); break;
    case SYS_BASES: put_bases(a, v); break;
    case SYS_CR2: put_mov(a, RCX, v); PUT(a, 0x0f, 0x22, 0xd1, 0x0f, 0x20, 0xd2); break;
    case SYS_CR_READ: PUT(a, 0x0f, 0x20, reads[v & 3]); break;
    case SYS_CR0_WP: PUT(a, 0x0f, 0x20, 0xc0, 0x48, 0x0f, 0xba, 0xf8, 16, 0x0f, 0x22, 0xc0); break; /* mov rax, cr0; btc rax, 16; mov cr0, rax */
    case SYS_CR4_PGE: PUT(a, 0x0f, 0x20, 0xe0, 0x48, 0x0f, 0xba, 0xf8, 7, 0x0f, 0x22, 0xe0); break;
    case SYS_IRET: put_iret(a, v); break;
    case SYS_INT: PUT(a, 0xcd, GUEST_INTR); break;
    case SYS_USER_IRET: put_user(a, false, v); break;
    case SYS_USER_SYSRET: put_user(a, true, v); break;
    case SYS_STAC: PUT(a, 0x0f, 0x01, v & 1 ? 0xcb : 0xca, 0x48, 0xa1); put_va(a, USER_RSP); break; /* stac, clac; mov rax, [abs] */
    case SYS_PTE_W: put_pte(a, false, v); break;
    default: put_pte(a, true, v); break;
    }
}

bool prog_assemble(const struct catalogue *c, struct prog *p)
{
    static struct as a;
    static u16 skip[PROG_PIECES], table[PROG_PIECES][4];
    a = (struct as){ .p = p };
    memset(p->text, 0xcc, sizeof p->text);
    for (unsigned i = 0; i < p->pieces; i++) {
        struct piece *q = &p->piece[i];
        q->at = (u16)a.n;
        switch (q->kind) {
        case PIECE_INSN: put_insn(&a, &c->e[q->insn], q->value); break;
        case PIECE_LOOP: put_loop(&a, q->id, q->value); break;
        case PIECE_FUNC: put_func(&a, q->id); break;
        case PIECE_END: put_end(&a, q->id); break;
        case PIECE_CALL: put_call(&a, q->id, q->value); break;
        case PIECE_SKIP: PUT(&a, 0x0f, 0x80 | q->id); put32(&a, 0); skip[i] = (u16)(a.n - 4); break;
        case PIECE_TABLE: put_table(&a, q->id, q->value, table[i]); break;
        case PIECE_STACK: put_stack(&a, q->id, q->value); break;
        case PIECE_FLAGS: put_flags(&a, q->value); break;
        case PIECE_DUMP: put_dump(&a, q->value); break;
        case PIECE_PATCH: put_patch(&a, q->id, q->value); break;
        case PIECE_SYSTEM: put_system(&a, q->id, q->value); break;
        default: put_fault(&a, q->id, q->value); break;
        }
        q->len = (u16)(a.n - q->at);
    }
    p->bytes = a.n;
    for (unsigned i = 0; i < p->pieces && !a.full; i++) {          /* jumps ahead: never out of a loop or function, or into one */
        const struct piece *q = &p->piece[i];
        unsigned to = i + 1, n = q->kind == PIECE_SKIP ? q->value : q->kind == PIECE_TABLE ? 3 : 0;
        u16 *t = table[i];
        if (q->kind == PIECE_TABLE)
            for (unsigned k = 0; k < 4; k++) {
                u64 va = CODE_VA + (to < p->pieces ? p->piece[to].at : a.n);
                memcpy(p->text + t[k], &va, 8);
                if (to < p->pieces && p->piece[to].kind != PIECE_LOOP && p->piece[to].kind != PIECE_FUNC && p->piece[to].kind != PIECE_END)
                    to++;
            }
        if (q->kind != PIECE_SKIP)
            continue;
        for (; n > 0 && to < p->pieces && p->piece[to].kind != PIECE_LOOP && p->piece[to].kind != PIECE_FUNC && p->piece[to].kind != PIECE_END; n--)
            to++;
        patch32(&a, skip[i], (u32)((to < p->pieces ? p->piece[to].at : a.n) - (skip[i] + 4u)));
    }
    return !a.full;
}

int prog_piece_at(const struct prog *p, u64 offset)
{
    for (unsigned i = 0; i < p->pieces; i++)
        if (offset >= p->piece[i].at && offset < (u64)p->piece[i].at + p->piece[i].len)
            return (int)i;
    return -1;
}

void prog_print(const struct prog *p)
{
    ZydisDecoder d;
    ZydisFormatter f;
    ZydisDecoderInit(&d, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
    for (unsigned off = 0; off < p->bytes;) {
        ZydisDecodedInstruction z;
        ZydisDecodedOperand o[ZYDIS_MAX_OPERAND_COUNT];
        char text[128] = "(undefined)", hex[31] = "";
        unsigned n = 1;
        if (!ZYAN_FAILED(ZydisDecoderDecodeFull(&d, p->text + off, p->bytes - off, &z, o))) {
            n = z.length;
            ZydisFormatterFormatInstruction(&f, &z, o, z.operand_count_visible, text, sizeof text, CODE_VA + off, NULL);
        }
        for (unsigned i = 0; i < n && i < 15; i++)
            snprintf(hex + 2 * i, 3, "%02x", p->text[off + i]);
        printf("#   %llx  %-30s %s\n", CODE_VA + off, hex, text);
        off += n;
    }
}
