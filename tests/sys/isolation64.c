/*
 * No address is worth more than what the page tables say of it. Instructions of every kind, at CPL 0 and 3, with every
 * register as base and index, read, write, push, pop and jump to addresses of every class: not canonical, not mapped in
 * each of the 512 slots, mapped for others, and where the monitor's own code, data, stacks and caches are in its address
 * space (the runner tells them by a port; elsewhere there are none). What comes of it is exactly the architecture's
 * fault, and not a byte or a flag is different afterwards. Then the guest maps pages of its own at the monitor's
 * addresses, which work like any. SDM vol. 1 3.3.7.1 (canonical addresses), vol. 3A 6.15 (#PF, #SS, #GP), 4.6.
 */
#include "run64.h"

#define PORT_MAPS 0xec /* a 32-bit write of a physical address has the monitor's ranges written there */
#define MAPS_MAX 2000
static volatile struct { u64 count, range[MAPS_MAX][2]; } maps __attribute__((aligned(4096)));

#define KEPT 16384 /* bytes of code at most that stay what they are */
static u8 code[32768] __attribute__((aligned(4096)));
static unsigned code_at, code_kept;
static u8 *page; /* 4096 bytes of ours, which tests map somewhere */
static const u8 pattern[16] = {0x5a, 0xa5, 0x3c, 0xc3, 0x96, 0x69, 0x78, 0x87, 0xe1, 0x1e, 0xd2, 0x2d, 0xb4, 0x4b, 0x0f, 0xf0};
static u64 state = 0x243f6a8885a308d3;

static u64 rnd(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static bool canonical(u64 a) { return (u64)((s64)(a << 16) >> 16) == a; }

/* ---- instructions with a memory operand ---- */

enum kind { READ, WRITE, NOTHING, JUMP }; /* WRITE: also what reads first */
#define W 1    /* REX.W */
#define LOCK 2
#define V128 4 /* VEX, with vvvv = XMM1 where it is a source */
#define V256 8
#define VSIB 16
#define BIG 32 /* more than 64 bytes: CR2 may be any of them */
#define CPL0 64
static const struct op {
    const char *name;
    u8 prefix, map, opcode, reg, imm, kind, flags;
} ops[] = {
    {"MOV load", 0, 0, 0x8b, 0, 0, READ, W},
    {"MOV load 32", 0, 0, 0x8b, 0, 0, READ, 0},
    {"MOV load 16", 0x66, 0, 0x8b, 0, 0, READ, 0},
    {"MOV load 8", 0, 0, 0x8a, 0, 0, READ, 0},
    {"MOV store", 0, 0, 0x89, 0, 0, WRITE, W},
    {"MOV store 32", 0, 0, 0x89, 1, 0, WRITE, 0},
    {"MOV store 8", 0, 0, 0x88, 2, 0, WRITE, 0},
    {"MOV store imm", 0, 0, 0xc7, 0, 4, WRITE, W},
    {"MOVZX 8", 0, 1, 0xb6, 0, 0, READ, W},
    {"MOVZX 16", 0, 1, 0xb7, 0, 0, READ, 0},
    {"MOVSX 8", 0, 1, 0xbe, 0, 0, READ, W},
    {"MOVSXD", 0, 0, 0x63, 0, 0, READ, W},
    {"MOVBE load", 0, 2, 0xf0, 0, 0, READ, W},
    {"MOVNTI", 0, 1, 0xc3, 0, 0, WRITE, W},
    {"ADD to register", 0, 0, 0x03, 0, 0, READ, W},
    {"ADD to memory", 0, 0, 0x01, 0, 0, WRITE, W},
    {"ADC to memory", 0, 0, 0x11, 0, 0, WRITE, 0},
    {"SUB imm", 0, 0, 0x83, 5, 1, WRITE, W},
    {"XOR imm", 0, 0, 0x81, 6, 4, WRITE, 0},
    {"CMP", 0, 0, 0x39, 0, 0, READ, W},
    {"CMP imm", 0, 0, 0x80, 7, 1, READ, 0},
    {"TEST", 0, 0, 0x85, 0, 0, READ, W},
    {"INC", 0, 0, 0xff, 0, 0, WRITE, W},
    {"LOCK DEC", 0, 0, 0xff, 1, 0, WRITE, W | LOCK},
    {"NOT", 0, 0, 0xf7, 2, 0, WRITE, W},
    {"NEG", 0, 0, 0xf6, 3, 0, WRITE, 0},
    {"MUL", 0, 0, 0xf7, 4, 0, READ, W},
    {"DIV", 0, 0, 0xf7, 6, 0, READ, W},
    {"IDIV", 0, 0, 0xf7, 7, 0, READ, 0},
    {"IMUL", 0, 1, 0xaf, 0, 0, READ, W},
    {"IMUL imm", 0, 0, 0x69, 0, 4, READ, 0},
    {"SHL", 0, 0, 0xc1, 4, 1, WRITE, W},
    {"ROR by 1", 0, 0, 0xd1, 1, 0, WRITE, 0},
    {"SHLD", 0, 1, 0xa4, 0, 1, WRITE, W},
    {"BT imm", 0, 1, 0xba, 4, 1, READ, W},
    {"LOCK BTS imm", 0, 1, 0xba, 5, 1, WRITE, W | LOCK},
    {"BSF", 0, 1, 0xbc, 0, 0, READ, W},
    {"POPCNT", 0xf3, 1, 0xb8, 0, 0, READ, W},
    {"CMOVZ", 0, 1, 0x44, 0, 0, READ, W},
    {"CMOVNZ", 0, 1, 0x45, 0, 0, READ, W},
    {"SETZ", 0, 1, 0x94, 0, 0, WRITE, 0},
    {"XCHG", 0, 0, 0x87, 0, 0, WRITE, W},
    {"LOCK XADD", 0, 1, 0xc1, 0, 0, WRITE, W | LOCK},
    {"CMPXCHG", 0, 1, 0xb1, 2, 0, WRITE, W},
    {"CMPXCHG8B", 0, 1, 0xc7, 1, 0, WRITE, 0},
    {"CMPXCHG16B", 0, 1, 0xc7, 1, 0, WRITE, W | LOCK},
    {"LEA", 0, 0, 0x8d, 0, 0, NOTHING, W},
    {"NOP of memory", 0, 1, 0x1f, 0, 0, NOTHING, 0},
    {"PREFETCHT0", 0, 1, 0x18, 1, 0, NOTHING, 0},
    {"CLFLUSH", 0, 1, 0xae, 7, 0, READ, 0},
    {"JMP through memory", 0, 0, 0xff, 4, 0, READ, 0},
    {"LAR", 0, 1, 0x02, 0, 0, READ, 0},
    {"VERR", 0, 1, 0x00, 4, 0, READ, 0},
    {"STR", 0, 1, 0x00, 1, 0, WRITE, 0},
    {"SGDT", 0, 1, 0x01, 0, 0, WRITE, 0},
    {"LGDT", 0, 1, 0x01, 2, 0, READ, CPL0},
    {"LIDT", 0, 1, 0x01, 3, 0, READ, CPL0},
    {"INVLPG", 0, 1, 0x01, 7, 0, NOTHING, CPL0},
    {"MOV from segment", 0, 0, 0x8c, 0, 0, WRITE, 0},
    {"MOV to FS", 0, 0, 0x8e, 4, 0, READ, 0},
    {"CRC32", 0xf2, 2, 0xf1, 0, 0, READ, W},
    {"FLD m64", 0, 0, 0xdd, 0, 0, READ, 0},
    {"FILD m16", 0, 0, 0xdf, 0, 0, READ, 0},
    {"FSTP m80", 0, 0, 0xdb, 7, 0, WRITE, 0},
    {"FADD m32", 0, 0, 0xd8, 0, 0, READ, 0},
    {"FNSTCW", 0, 0, 0xd9, 7, 0, WRITE, 0},
    {"FLDCW", 0, 0, 0xd9, 5, 0, READ, 0},
    {"FNSTENV", 0, 0, 0xd9, 6, 0, WRITE, BIG},
    {"FNSAVE", 0, 0, 0xdd, 6, 0, WRITE, BIG},
    {"FXSAVE", 0, 1, 0xae, 0, 0, WRITE, BIG},
    {"FXRSTOR", 0, 1, 0xae, 1, 0, READ, BIG},
    {"STMXCSR", 0, 1, 0xae, 3, 0, WRITE, 0},
    {"LDMXCSR", 0, 1, 0xae, 2, 0, READ, 0},
    {"MOVDQU load", 0xf3, 1, 0x6f, 0, 0, READ, 0},
    {"MOVDQA load", 0x66, 1, 0x6f, 0, 0, READ, 0},
    {"MOVDQU store", 0xf3, 1, 0x7f, 0, 0, WRITE, 0},
    {"MOVAPS store", 0, 1, 0x29, 0, 0, WRITE, 0},
    {"MOVNTDQ", 0x66, 1, 0xe7, 0, 0, WRITE, 0},
    {"MOVSD load", 0xf2, 1, 0x10, 0, 0, READ, 0},
    {"MOVSS store", 0xf3, 1, 0x11, 0, 0, WRITE, 0},
    {"MOVHPD load", 0x66, 1, 0x16, 0, 0, READ, 0},
    {"MOVQ load", 0xf3, 1, 0x7e, 0, 0, READ, 0},
    {"PADDD", 0x66, 1, 0xfe, 0, 0, READ, 0},
    {"PSHUFB", 0x66, 2, 0x00, 0, 0, READ, 0},
    {"CVTSI2SD", 0xf2, 1, 0x2a, 0, 0, READ, W},
    {"UCOMISD", 0x66, 1, 0x2e, 0, 0, READ, 0},
    {"PINSRD", 0x66, 3, 0x22, 0, 1, READ, 0},
    {"PEXTRQ", 0x66, 3, 0x16, 0, 1, WRITE, W},
    {"MOVQ of MMX", 0, 1, 0x6f, 0, 0, READ, 0},
    {"VMOVDQU load", 0xf3, 1, 0x6f, 0, 0, READ, V256},
    {"VMOVDQU store", 0xf3, 1, 0x7f, 0, 0, WRITE, V256},
    {"VADDPS", 0, 1, 0x58, 0, 0, READ, V256},
    {"VBROADCASTSS", 0x66, 2, 0x18, 0, 0, READ, V128},
    {"VMASKMOVPS load", 0x66, 2, 0x2c, 0, 0, READ, V128},
    {"VMASKMOVPS store", 0x66, 2, 0x2e, 0, 0, WRITE, V128},
    {"VPGATHERDD", 0x66, 2, 0x90, 0, 0, READ, V128 | VSIB},
    {"ANDN", 0, 2, 0xf2, 0, 0, READ, V128 | W},
    {"SHLX", 0x66, 2, 0xf7, 0, 0, READ, V128 | W},
};

struct where { /* base + index * 2^scale + disp */
    int base, index;
    unsigned scale;
    int disp;
    u8 segment; /* a prefix, or 0 */
    bool short32; /* 67h */
};

static bool avx;

static unsigned put_operand(u8 *p, unsigned reg, const struct where *w, bool vsib)
{
    u8 *start = p;
    unsigned index = vsib ? 2 : w->index < 0 ? 4 : (unsigned)w->index & 7; /* VSIB: XMM2, which is 0 */

    *p++ = 0x84 | (reg & 7) << 3;
    *p++ = (u8)(w->scale << 6 | index << 3 | (w->base & 7));
    memcpy(p, &w->disp, 4);
    return (unsigned)(p + 4 - start);
}

/* Puts the instruction, and an end behind it. Returns its address. */
static ulong put(const struct op *o, const struct where *w)
{
    bool vex = o->flags & (V128 | V256), vsib = o->flags & VSIB;
    unsigned r = o->reg >> 3 & 1, b = w->base >> 3 & 1, x = vsib || w->index < 0 ? 0 : w->index >> 3 & 1;
    u8 *p, *start;

    code_at += -code_at & 15;
    if (code_at + 64 > sizeof code)
        code_at = code_kept + (-code_kept & 15);
    p = start = code + code_at;
    if (w->segment)
        *p++ = w->segment;
    if (w->short32)
        *p++ = 0x67;
    if (o->flags & LOCK)
        *p++ = 0xf0;
    if (vex) {
        static const u8 pp[] = {[0x66] = 1, [0xf2] = 3, [0xf3] = 2};

        bool source = o->opcode == 0x58 || o->opcode == 0x2c || o->opcode == 0x2e || vsib || o->opcode == 0xf2 || o->opcode == 0xf7;
        *p++ = 0xc4;
        *p++ = (u8)((r ? 0 : 0x80) | (x ? 0 : 0x40) | (b ? 0 : 0x20) | o->map);
        *p++ = (u8)((o->flags & W ? 0x80 : 0) | (source ? 15 - 1 : 15) << 3 | (o->flags & V256 ? 4 : 0) | pp[o->prefix]);
    } else {
        if (o->prefix)
            *p++ = o->prefix;
        *p++ = (u8)(0x40 | (o->flags & W ? 8 : 0) | r << 2 | x << 1 | b);
        if (o->map)
            *p++ = 0x0f;
        if (o->map == 2)
            *p++ = 0x38;
        if (o->map == 3)
            *p++ = 0x3a;
    }
    *p++ = o->opcode;
    p += put_operand(p, o->reg, w, vsib);
    for (unsigned i = 0; i < o->imm; i++)
        *p++ = i ? 0 : 1;
    *p++ = 0xcd;
    *p++ = VEC_DONE;
    code_at = (unsigned)(p - code);
    return (ulong)start;
}

static ulong put_bytes(const u8 *bytes, unsigned n)
{
    u8 *start;

    code_at += -code_at & 15;
    if (code_at + n + 2 > sizeof code)
        code_at = code_kept + (-code_kept & 15);
    start = code + code_at;
    memcpy(start, bytes, n);
    start[n] = 0xcd;
    start[n + 1] = VEC_DONE;
    code_at += n + 2;
    return (ulong)start;
}

/* ---- one attempt, and what must come of it ---- */

static const char *what;
static u64 where_now;
static unsigned complaints, attempts;

static void complain(const char *name, const char *about, u64 got, u64 want, bool user)
{
    if (got == want)
        return;
    if (complaints++ > 3) {
        if (complaints == 5)
            must("more like this", false);
        return;
    }
    note("%s: %s at CPL %d, address %x:%x: %s: %x:%x, expected %x:%x", what, name, user ? 3 : 0, (u32)(where_now >> 32), (u32)where_now, about,
         (u32)(got >> 32), (u32)got, (u32)(want >> 32), (u32)want);
    eq(about, got, want);
}

static void registers(void)
{
    static const u8 ones[16] = {[0 ... 15] = 0xff};

    for (unsigned i = 0; i < 16; i++)
        run_in.gpr[i] = 0x1111111111111111ull * i + 0x0123456789abcdef;
    run_in.flags = F_1 | (rnd() & (F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF));
    asm volatile("movdqu %0, %%xmm0\n\tmovdqu %1, %%xmm1\n\tpxor %%xmm2, %%xmm2\n\tfninit" ::"m"(pattern), "m"(ones));
}

/* All registers, flags and XMM0 as they were. */
static void unchanged(const char *name, bool user)
{
    for (unsigned i = 0; i < 16; i++)
        complain(name, "a register", run_out.gpr[i], run_in.gpr[i], user);
    complain(name, "flags", run_out.flags & 0xcd5, run_in.flags & 0xcd5, user);
    complain(name, "XMM0", memcmp(run_xmm, pattern, 16), 0, user);
}

enum mapped { ABSENT, FOR_KERNEL, READ_ONLY };

static void fault_must_be(const char *name, u64 a, enum kind kind, bool user, bool stack, enum mapped mapped, bool big)
{
    where_now = a;
    attempts++;
    if (!canonical(a)) {
        complain(name, "vector", trap.vector, stack ? SS : GP, user);
        complain(name, "error code", (u32)trap.error, 0, user);
        return;
    }
    complain(name, "vector", trap.vector, PF, user);
    complain(name, "error code", (u32)trap.error,
             (mapped == ABSENT ? 0 : PF_P) | (kind == WRITE ? PF_W : 0) | (user ? PF_U : 0) | (kind == JUMP ? PF_I : 0), user);
    complain(name, "CR2", big ? trap.cr2 & -4096ul : trap.cr2, big ? a & -4096ul : a, user);
}

static bool usable(const struct op *o, bool user) { return !(user && o->flags & CPL0) && (avx || !(o->flags & (V128 | V256))); }

/* The operand's registers get values that make the address. */
static void point(struct where *w, u64 a, const struct op *o)
{
    u64 offset = w->disp;

    if (w->index >= 0 && !(o->flags & VSIB)) {
        run_in.gpr[w->index] = rnd() % 4 ? rnd() : (u64)1 << (63 - rnd() % 8);
        offset += run_in.gpr[w->index] << w->scale;
    }
    run_in.gpr[w->base] = a - offset;
}

static struct where some_where(void)
{
    struct where w = {.base = (int)(rnd() % 16), .index = (int)(rnd() % 17) - 1, .scale = (unsigned)(rnd() % 4)};

    if (w.index == 4 || w.index == w.base)
        w.index = -1;
    w.disp = rnd() % 4 == 0 ? 0 : rnd() % 2 ? (int)rnd() : (int)(rnd() % 256) - 128;
    return w;
}

/* Most attempts run code that has run before, with other addresses: a translator is to have translated it. */
#define VARIANTS 3
static struct where known_where[ARRAY_SIZE(ops)][VARIANTS];
static ulong known_code[ARRAY_SIZE(ops)][VARIANTS];

static void attempt(const struct op *o, u64 a, bool user, enum mapped mapped)
{
    struct where w = some_where();
    unsigned n = (unsigned)(o - ops), v = (unsigned)(rnd() % (VARIANTS + 1));
    ulong ip;

    if (!usable(o, user))
        return;
    if (v < VARIANTS && known_code[n][v])
        w = known_where[n][v];
    registers();
    point(&w, a, o);
    ip = v < VARIANTS && known_code[n][v] ? known_code[n][v] : put(o, &w);
    if (v < VARIANTS && !known_code[n][v] && code_at <= KEPT) {
        known_code[n][v] = ip;
        known_where[n][v] = w;
        code_kept = code_at;
    }
    ip += user ? USER_OFF : 0;
    run_at(ip, user);
    if (o->kind == NOTHING) {
        where_now = a;
        complain(o->name, "vector", trap.vector, VEC_DONE, user);
        return;
    }
    if (mapped == READ_ONLY && o->kind == READ)
        return;
    fault_must_be(o->name, a, o->kind, user, w.base == 4 || w.base == 5, mapped, o->flags & BIG);
    complain(o->name, "RIP", trap.ip, ip, user);
    unchanged(o->name, user);
}

/* ---- instructions whose addresses are implied ---- */

enum reg { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
static const struct implied {
    const char *name;
    u8 n, b[8];
    u8 reg; /* that has the address, less `less` */
    int less;
    u8 kind;
    bool stack;
} implied[] = {
    {"PUSH", 1, {0x50}, RSP, -8, WRITE, true},
    {"PUSH imm", 2, {0x6a, 1}, RSP, -8, WRITE, true},
    {"PUSHF", 1, {0x9c}, RSP, -8, WRITE, true},
    {"PUSH 16", 2, {0x66, 0x50}, RSP, -2, WRITE, true},
    {"POP", 1, {0x58}, RSP, 0, READ, true},
    {"POPF", 1, {0x9d}, RSP, 0, READ, true},
    {"POP R15", 2, {0x41, 0x5f}, RSP, 0, READ, true},
    {"CALL", 5, {0xe8, 0, 0, 0, 0}, RSP, -8, WRITE, true},
    {"RET", 1, {0xc3}, RSP, 0, READ, true},
    {"RET imm", 3, {0xc2, 8, 0}, RSP, 0, READ, true},
    {"IRETQ", 2, {0x48, 0xcf}, RSP, 0, READ, true},
    {"LRETQ", 2, {0x48, 0xcb}, RSP, 0, READ, true},
    {"LEAVE", 1, {0xc9}, RBP, 0, READ, true},
    {"ENTER", 4, {0xc8, 16, 0, 0}, RSP, -8, WRITE, true},
    {"LODSQ", 2, {0x48, 0xad}, RSI, 0, READ, false},
    {"REP LODSB", 2, {0xf3, 0xac}, RSI, 0, READ, false},
    {"STOSB", 1, {0xaa}, RDI, 0, WRITE, false},
    {"REP STOSQ", 3, {0xf3, 0x48, 0xab}, RDI, 0, WRITE, false},
    {"SCASB", 1, {0xae}, RDI, 0, READ, false},
    {"REPNE SCASQ", 3, {0xf2, 0x48, 0xaf}, RDI, 0, READ, false},
    {"MOVSB from", 1, {0xa4}, RSI, 0, READ, false},
    {"REP MOVSQ from", 3, {0xf3, 0x48, 0xa5}, RSI, 0, READ, false},
    {"REP MOVSB to", 2, {0xf3, 0xa4}, RDI, 0, WRITE, false},
    {"MOVSQ to", 2, {0x48, 0xa5}, RDI, 0, WRITE, false},
    {"CMPSB", 1, {0xa6}, RSI, 0, READ, false},
    {"REPE CMPSQ", 3, {0xf3, 0x48, 0xa7}, RSI, 0, READ, false},
    {"MASKMOVDQU", 4, {0x66, 0x0f, 0xf7, 0xc1}, RDI, 0, WRITE, false},
    {"BT by register", 4, {0x48, 0x0f, 0xa3, 0x13}, RBX, 0, READ, false}, /* bt rdx, [rbx] */
};

static ulong implied_code[ARRAY_SIZE(implied)];

static void attempt_implied(const struct implied *m, u64 a, bool user, enum mapped mapped)
{
    static u8 fine[64] __attribute__((aligned(64)));
    ulong ip, other = (ulong)fine + (user ? USER_OFF : 0);

    registers();
    if (m->reg == RSI)
        run_in.gpr[RDI] = other;
    if (m->reg == RDI)
        run_in.gpr[RSI] = other;
    run_in.gpr[RDX] = 5;
    run_in.gpr[RCX] = 3;
    run_in.gpr[m->reg] = a - m->less;
    if (!implied_code[m - implied] && code_at <= KEPT) {
        implied_code[m - implied] = put_bytes(m->b, m->n);
        code_kept = code_at;
    }
    ip = rnd() % 4 && implied_code[m - implied] ? implied_code[m - implied] : put_bytes(m->b, m->n);
    ip += user ? USER_OFF : 0;
    run_at(ip, user);
    if (mapped == READ_ONLY && m->kind == READ)
        return;
    fault_must_be(m->name, a, m->kind, user, m->stack, mapped, false);
    complain(m->name, "RIP", trap.ip, ip, user);
    unchanged(m->name, user);
}

/* JMP, CALL and RET to an address. The processor may find out before or after it has jumped, if it is not canonical. */
static void attempt_jump(u64 a, bool user, enum mapped mapped)
{
    static u64 target[8] __attribute__((aligned(64)));
    ulong stack = (ulong)(user ? UPTR(&target[4]) : &target[4]);
    static const u8 jmp[] = {0xff, 0xe0}, call[] = {0xff, 0xd0}, ret[] = {0xc3}, by_memory[] = {0xff, 0x23};

    for (unsigned i = 0; i < 4; i++) {
        registers();
        run_in.gpr[RAX] = a;
        run_in.gpr[RBX] = stack;
        run_in.gpr[RSP] = stack;
        target[4] = a;
        run_at((i == 0   ? put_bytes(jmp, 2)
                : i == 1 ? put_bytes(call, 2)
                : i == 2 ? put_bytes(ret, 1)
                         : put_bytes(by_memory, 2)) +
                   (user ? USER_OFF : 0),
               user);
        where_now = a;
        attempts++;
        if (!canonical(a)) {
            complain("jump", "vector", trap.vector, GP, user);
            complain("jump", "error code", (u32)trap.error, 0, user);
        } else {
            fault_must_be("jump", a, JUMP, user, false, mapped, false);
            complain("jump", "RIP", trap.ip, a, user);
        }
        complain("jump", "a register", run_out.gpr[RAX], a, user);
    }
}

static unsigned turn;
/* Some of the instructions, each time others; or all. */
static void attempts_at(u64 a, unsigned n, enum mapped mapped)
{
    for (int user = 0; user < 2; user++) {
        if (n) {
            for (unsigned i = 0; i < n; i++)
                attempt(&ops[turn++ % ARRAY_SIZE(ops)], a, user, mapped);
            attempt_implied(&implied[turn++ % ARRAY_SIZE(implied)], a, user, mapped);
            attempt_implied(&implied[turn++ % ARRAY_SIZE(implied)], a, user, mapped);
        } else {
            for (unsigned i = 0; i < ARRAY_SIZE(ops); i++)
                attempt(&ops[i], a, user, mapped);
            for (unsigned i = 0; i < ARRAY_SIZE(implied); i++)
                attempt_implied(&implied[i], a, user, mapped);
        }
        attempt_jump(a, user, mapped);
    }
}

static void begin(const char *name)
{
    test("isolation: %s", name);
    what = name;
    complaints = 0;
}

/* ---- classes of addresses ---- */

static void not_canonical(void)
{
    static const u64 a[] = {BIT(47), BIT(47) + 64, BIT(48), BIT(48) + 0x8000, BIT(55), BIT(56), BIT(62) + 64, BIT(63), BIT(63) + BIT(46),
                            ~BIT(47) - 63, 0xffff7fffffffffc0, 0xffff000000000000, 0xfffe800000000000, 0x7fffffffffffffc0, 0xdead000000000000,
                            0x00ff800000001000, 0xffefffffffffffc0};

    begin("addresses that are not canonical");
    for (unsigned i = 0; i < ARRAY_SIZE(a); i++)
        attempts_at(a[i], i < 4 ? 0 : 8, ABSENT);
}

static void each_slot(void)
{
    begin("each of the 512 slots, at its edges and inside");
    for (u64 slot = 0; slot < 512; slot++) {
        u64 base = (u64)((s64)(slot << 55) >> 16);

        attempts_at(base + (slot ? 0 : BIT(30)), 3, ABSENT);
        attempts_at(base + BIT(31) + (rnd() & (BIT(38) - 64)), 3, ABSENT);
        attempts_at(base + BIT(39) - 64, 3, ABSENT);
    }
}

static void kernel_and_user(void)
{
    begin("pages that are there, but for others");
    map(VA_TEST, (u64)page, PTE_P | PTE_W);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++)
        attempt(&ops[i], VA_TEST + 64, true, FOR_KERNEL);
    for (unsigned i = 0; i < ARRAY_SIZE(implied); i++)
        attempt_implied(&implied[i], VA_TEST + 64, true, FOR_KERNEL);
    attempt_jump(VA_TEST + 64, true, FOR_KERNEL);
    begin("calls and jumps to address 0: no page of CPL 3's, a page of CPL 0's");
    static const u8 jump[] = {0xff, 0xe0};
    u8 *zero = NULL;
    asm("" : "+r"(zero));
    for (unsigned i = 0; i < 20; i++) {
        attempt_jump(0, true, FOR_KERNEL);
        attempt(&ops[i], 0, true, FOR_KERNEL);
        zero[0] = 0xcd, zero[1] = VEC_DONE;
        registers();
        run_in.gpr[RAX] = 0;
        run_at(put_bytes(jump, 2), false);
        complain("jump to 0", "vector", trap.vector, VEC_DONE, false);
        complain("jump to 0", "RIP", trap.ip, 2, false);
    }
    begin("pages that may not be written");
    write_cr0(read_cr0() | CR0_WP);
    map(VA_TEST, (u64)page, PTE_P | PTE_U);
    for (int user = 0; user < 2; user++) {
        for (unsigned i = 0; i < ARRAY_SIZE(ops); i++)
            if (ops[i].kind == WRITE)
                attempt(&ops[i], VA_TEST + 64, user, READ_ONLY);
        for (unsigned i = 0; i < ARRAY_SIZE(implied); i++)
            if (implied[i].kind == WRITE)
                attempt_implied(&implied[i], VA_TEST + 64, user, READ_ONLY);
    }
    write_cr0(read_cr0() & ~(ulong)CR0_WP);
    map(VA_TEST, 0, 0);
}

/* Base, index and displacement may wrap around any number of times on their way to an address that is good. */
static void wrapped(void)
{
    static const struct op load = {"MOV load", 0, 0, 0x8b, 0, 0, READ, W}, store = {"MOV store", 0, 0, 0x89, 0, 0, WRITE, W};
    static const u8 segments[] = {0, 0x64, 0x65};

    begin("sums that wrap around to a good address, every base and index");
    asm volatile("mov %0, %%fs\n\tmov %0, %%gs" ::"r"(0));
    map(VA_TEST, (u64)page, PTE_P | PTE_W | PTE_U);
    for (unsigned i = 0; i < 4000; i++) {
        struct where w = some_where();
        unsigned at = (unsigned)(rnd() % 511) * 8;
        bool user = rnd() % 2, write = rnd() % 3 == 0;
        u64 want = rnd(), a = VA_TEST + at, base = 0;
        struct op o = write ? store : load;

        o.reg = (u8)(rnd() % 16);
        if (o.reg == 4)
            o.reg = 3;
        registers();
        w.segment = segments[rnd() % 3];
        if (w.segment) {
            base = (u64)((s64)(rnd() << 16) >> 16);
            a -= base;
        }
        if (i % 8 == 7) {
            w.short32 = true;
            w.segment = 0;
            a += base;
        }
        if (write && (o.reg == w.base || o.reg == w.index))
            continue;
        point(&w, a, &o);
        if (w.short32) /* whatever the upper halves are */
            run_in.gpr[w.base] ^= rnd() << 32;
        if (write)
            run_in.gpr[o.reg] = want;
        else
            *(volatile u64 *)(page + at) = want;
        if (w.segment)
            wrmsr(w.segment == 0x64 ? MSR_FS_BASE : MSR_GS_BASE, base);
        where_now = a;
        run_at(put(&o, &w) + (user ? USER_OFF : 0), user);
        attempts++;
        complain(o.name, "vector", trap.vector, VEC_DONE, user);
        complain(o.name, "value", write ? *(volatile u64 *)(page + at) : run_out.gpr[o.reg], want, user);
        if (!write)
            run_out.gpr[o.reg] = run_in.gpr[o.reg];
        unchanged(o.name, user);
    }
    wrmsr(MSR_FS_BASE, 0);
    wrmsr(MSR_GS_BASE, 0);
    map(VA_TEST, 0, 0);
    begin("registers at the end of one slot, displacements into the next");
    for (unsigned i = 0; i < 600; i++) {
        u64 slot = i % 2 ? rnd() % 512 : (u64[]){0, 1, 127, 254, 255, 256, 257, 511}[rnd() % 8], edge = (u64)((s64)(slot << 55) >> 16) + BIT(39);
        struct where w = {.base = (int)(rnd() % 16), .index = -1};
        bool user = rnd() % 2;
        const struct op *o = &ops[rnd() % 14];
        s64 near = (s64)(rnd() % BIT(31)) - (s64)BIT(30);
        u64 a;

        w.disp = (int)rnd();
        registers();
        run_in.gpr[w.base] = edge + (u64)near;
        a = run_in.gpr[w.base] + (u64)(s64)w.disp;
        a &= ~7ull;
        run_in.gpr[w.base] = a - (u64)(s64)w.disp;
        if (a < BIT(30) || o->kind == NOTHING)
            continue; /* the program itself is there */
        run_at(put(o, &w) + (user ? USER_OFF : 0), user);
        fault_must_be(o->name, a, o->kind, user, w.base == 4 || w.base == 5, ABSENT, false);
        unchanged(o->name, user);
    }
}

/* ---- the monitor's addresses ---- */

static unsigned read_maps(void)
{
    maps.count = 0;
    outl(PORT_MAPS, (u32)(ulong)&maps);
    return (unsigned)(maps.count < MAPS_MAX ? maps.count : MAPS_MAX);
}

static void monitors(void)
{
    unsigned n = read_maps();

    begin("where the monitor itself is: the same faults as anywhere");
    if (!n) {
        skip("nobody tells where that is");
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        u64 start = maps.range[i][0], end = maps.range[i][1];

        if (start < BIT(30))
            continue;
        attempts_at(start, 2, ABSENT);
        attempts_at(start + (rnd() % (end - start) & ~63ull), 3, ABSENT);
        attempts_at(end - 64, 2, ABSENT);
        attempts_at(end, 1, ABSENT); /* a guard, or the next one */
    }
    begin("where the monitor is now, after all that");
    n = read_maps();
    for (unsigned i = 0; i < n; i++)
        if (maps.range[i][0] >= BIT(30))
            attempts_at(maps.range[i][0] + 64, 2, ABSENT);
}

/* One page at a time, in tables that are used again. */
static u64 tables[3];
static void map_only(u64 va, u64 pa, u64 bits)
{
    static u64 last;
    u64 *root = (u64 *)(read_cr3() & PTE_ADDR);

    if (!tables[0])
        for (unsigned i = 0; i < 3; i++)
            tables[i] = page_new();
    root[last >> 39 & 511] = (last >> 39 & 511) ? 0 : root[0];
    for (unsigned i = 0; i < 3; i++)
        memset((void *)tables[i], 0, 4096);
    last = va;
    if (va >> 39 & 511) {
        root[va >> 39 & 511] = tables[0] | 7;
        ((u64 *)tables[0])[va >> 30 & 511] = tables[1] | 7;
        ((u64 *)tables[1])[va >> 21 & 511] = tables[2] | 7;
        ((u64 *)tables[2])[va >> 12 & 511] = pa | bits;
    }
    write_cr3(read_cr3());
}

/* A page of the guest's at that address: reads, writes, stack, strings, code. */
static void own_page(u64 va)
{
    static const struct op load = {"MOV load", 0, 0, 0x8b, 0, 0, READ, W}, store = {"MOV store", 0, 0, 0x89, 0, 0, WRITE, W};
    static const u8 push_pop[] = {0x50, 0x5a, 0xe8, 0, 0, 0, 0, 0x59}; /* push %rax; pop %rdx; call; pop %rcx */
    static const u8 answer[] = {0x48, 0xc7, 0xc0, 0x2a, 0, 0, 0, 0xcd, VEC_DONE};
    static const u8 movs[] = {0xf3, 0xa4};

    va &= -4096ull;
    for (int user = 0; user < 2; user++) {
        u64 v = rnd(), off = user ? USER_OFF : 0;
        struct where w = some_where();

        where_now = va;
        map_only(va, (u64)page, PTE_P | PTE_W | (user ? PTE_U : 0));
        *(volatile u64 *)(page + 128) = v;
        registers();
        point(&w, va + 128, &load);
        run_at(put(&load, &w) + off, user);
        complain("MOV load", "vector", trap.vector, VEC_DONE, user);
        complain("MOV load", "value", run_out.gpr[RAX], v, user);
        registers();
        do
            w = some_where();
        while (w.base == 0 || w.index == 0);
        point(&w, va + 256, &store);
        run_in.gpr[RAX] = ~v;
        run_at(put(&store, &w) + off, user);
        complain("MOV store", "value", *(volatile u64 *)(page + 256), ~v, user);
        registers();
        run_in.gpr[RSP] = va + 1024;
        run_in.gpr[RAX] = v ^ 1;
        ulong ip = put_bytes(push_pop, sizeof push_pop) + off;
        run_at(ip, user);
        complain("PUSH, POP", "value", run_out.gpr[RDX], v ^ 1, user);
        complain("CALL", "return address", run_out.gpr[RCX], ip + 7, user);
        complain("PUSH, POP, CALL", "RSP", run_out.gpr[RSP], va + 1024, user);
        complain("CALL", "the page", *(volatile u64 *)(page + 1016), ip + 7, user);
        registers();
        for (unsigned i = 0; i < 64; i++)
            page[512 + i] = (u8)(v >> (i & 56)) + i;
        run_in.gpr[RSI] = va + 512;
        run_in.gpr[RDI] = va + 640;
        run_in.gpr[RCX] = 64;
        run_at(put_bytes(movs, 2) + off, user);
        complain("REP MOVSB", "RCX", run_out.gpr[RCX], 0, user);
        complain("REP MOVSB", "bytes", memcmp(page + 512, page + 640, 64), 0, user);
        memcpy(page + 2048, answer, sizeof answer);
        registers();
        run_at(va + 2048, user);
        complain("code", "vector", trap.vector, VEC_DONE, user);
        complain("code", "value", run_out.gpr[RAX], 0x2a, user);
        complain("code", "RIP", trap.ip, va + 2048 + 9, user);
        /* Over its end: what is there is the monitor's, or nobody's. */
        struct where plain = {.base = 3, .index = -1};
        registers();
        run_in.gpr[3] = va + 4092;
        run_at(put(&load, &plain) + off, user);
        fault_must_be("MOV load over the end", va + 4096, READ, user, false, ABSENT, false);
        unchanged("MOV load over the end", user);
        memset(page + 4088, 0x77, 8);
        registers();
        run_in.gpr[3] = va + 4092;
        run_at(put(&store, &plain) + off, user);
        fault_must_be("MOV store over the end", va + 4096, WRITE, user, false, ABSENT, false);
        complain("MOV store over the end", "its first half", *(volatile u64 *)(page + 4088), 0x7777777777777777, user);
        if (!user)
            attempts_at(va + 4096 + 64, 1, ABSENT);
        else {
            map_only(va, (u64)page, PTE_P | PTE_W);
            attempt(&ops[turn++ % 9], va + 64, true, FOR_KERNEL);
        }
    }
    map_only(0, 0, 0);
}

static void own_pages(void)
{
    unsigned n = read_maps(), done = 0;

    begin("pages of the guest's own at the monitor's addresses");
    for (unsigned i = 0; i < n && done < 400; i++) {
        u64 start = maps.range[i][0], end = maps.range[i][1];

        if (!(start >> 39 & 511))
            continue;
        own_page(start);
        own_page(start + rnd() % (end - start));
        done += 2;
    }
    if (!n)
        skip("nobody tells where that is");
    begin("and at the edges of slots");
    for (u64 slot = 1; slot < 512; slot += 1 + rnd() % 8) {
        u64 base = (u64)((s64)(slot << 55) >> 16);

        if (slot != 255 && slot != 511)
            own_page(base + BIT(39) - 8192);
        own_page(base);
    }
}

int main(void)
{
    u64 xcr0 = 0;

    run_init();
    if (cpuid(1, 0).c & 1 << 28) {
        struct cpuid id = cpuid(0xd, 0);

        xcr0 = id.a & 7;
        write_cr4(read_cr4() | CR4_OSXSAVE);
        asm volatile("xsetbv" ::"c"(0), "a"((u32)xcr0), "d"(0));
        avx = (xcr0 & 4) && (cpuid(7, 0).b & 0x128) == 0x128;
    }
    page = pages_new(1);
    not_canonical();
    each_slot();
    kernel_and_user();
    wrapped();
    monitors();
    own_pages();
    note("%u attempts", attempts);
    done();
}
