/*
 * The kernel's eBPF compiler on a guest: random programs, compiled and run by the kernel, give what a small interpreter
 * here gives. They come and go by the hundred, so that pages of kernel code are written, run, freed and used again.
 * Then a program at the tracepoint of system calls counts them.
 *
 *   bpf PROGRAMS SEED
 */
#include <errno.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define INSNS 256
#define REGS 10

static uint64_t state;
static char log_text[65536];

static uint64_t rnd(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static int bpf(int cmd, union bpf_attr *a)
{
    return (int)syscall(SYS_bpf, cmd, a, sizeof *a);
}

/* ---- programs ---- */

struct program {
    struct bpf_insn insn[INSNS];
    int n;
};

static void put(struct program *p, uint8_t code, int dst, int src, int off, int32_t imm)
{
    p->insn[p->n++] = (struct bpf_insn){ code, (uint8_t)(dst & 15), (uint8_t)(src & 15), (int16_t)off, imm };
}

static void put_imm64(struct program *p, int dst, uint64_t v)
{
    put(p, BPF_LD | BPF_DW | BPF_IMM, dst, 0, 0, (int32_t)v);
    put(p, 0, 0, 0, 0, (int32_t)(v >> 32));
}

static int32_t some_imm(int op, int bits)
{
    if (op == BPF_LSH || op == BPF_RSH || op == BPF_ARSH)
        return (int32_t)(rnd() % (unsigned)bits);
    if (op == BPF_DIV || op == BPF_MOD)
        return (int32_t)rnd() | 1;
    return rnd() % 4 ? (int32_t)rnd() : (int32_t)(rnd() % 256) - 128;
}

static void generate(struct program *p)
{
    static const int ops[] = { BPF_ADD, BPF_SUB, BPF_MUL, BPF_DIV, BPF_OR, BPF_AND, BPF_LSH, BPF_RSH, BPF_NEG, BPF_MOD,
                               BPF_XOR, BPF_MOV, BPF_ARSH };
    static const int jumps[] = { BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET, BPF_JNE, BPF_JSGT, BPF_JSGE, BPF_JLT, BPF_JLE,
                                 BPF_JSLT, BPF_JSLE };

    p->n = 0;
    for (int r = 0; r < REGS; r++)
        put_imm64(p, r, rnd());
    while (p->n < INSNS - 40) {
        int dst = (int)(rnd() % REGS), src = (int)(rnd() % REGS), wide = rnd() % 2, reg = rnd() % 2;
        int class = wide ? BPF_ALU64 : BPF_ALU;

        if (rnd() % 8 == 0) {                       /* a jump over the next one */
            int op = jumps[rnd() % (sizeof jumps / sizeof *jumps)];
            put(p, (uint8_t)((wide ? BPF_JMP : BPF_JMP32) | op | (reg ? BPF_X : BPF_K)), dst, reg ? src : 0, 1, reg ? 0 : (int32_t)rnd());
            put(p, BPF_ALU64 | BPF_ADD | BPF_K, dst, 0, 0, 12345);
        } else if (rnd() % 16 == 0) {
            static const int width[] = { 16, 32, 64 };
            put(p, BPF_ALU | BPF_END | (rnd() % 2 ? BPF_TO_BE : BPF_TO_LE), dst, 0, 0, width[rnd() % 3]);
        } else {
            int op = ops[rnd() % (sizeof ops / sizeof *ops)];
            if (op == BPF_NEG)
                put(p, (uint8_t)(class | BPF_NEG), dst, 0, 0, 0);
            else
                put(p, (uint8_t)(class | op | (reg ? BPF_X : BPF_K)), dst, reg ? src : 0, 0, reg ? 0 : some_imm(op, wide ? 64 : 32));
        }
    }
    for (int r = 1; r < REGS; r++)
        put(p, BPF_ALU64 | BPF_XOR | BPF_X, 0, r, 0, 0);
    put(p, BPF_ALU64 | BPF_MOV | BPF_X, 1, 0, 0, 0);
    put(p, BPF_ALU64 | BPF_RSH | BPF_K, 1, 0, 0, 32);
    put(p, BPF_ALU64 | BPF_XOR | BPF_X, 0, 1, 0, 0);
    put(p, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
}

/* ---- what they mean (Documentation/bpf/instruction-set.rst) ---- */

static uint64_t alu(int op, uint64_t a, uint64_t b, int wide)
{
    unsigned mask = wide ? 63 : 31;

    if (!wide)
        a = (uint32_t)a, b = (uint32_t)b;
    switch (op) {
    case BPF_ADD: a += b; break;
    case BPF_SUB: a -= b; break;
    case BPF_MUL: a *= b; break;
    case BPF_DIV: a = b ? a / b : 0; break;
    case BPF_OR: a |= b; break;
    case BPF_AND: a &= b; break;
    case BPF_LSH: a <<= b & mask; break;
    case BPF_RSH: a >>= b & mask; break;
    case BPF_NEG: a = -a; break;
    case BPF_MOD: a = b ? a % b : a; break;
    case BPF_XOR: a ^= b; break;
    case BPF_MOV: a = b; break;
    case BPF_ARSH: a = wide ? (uint64_t)((int64_t)a >> (b & 63)) : (uint64_t)((int32_t)a >> (b & 31)); break;
    }
    return wide ? a : (uint32_t)a;
}

static int taken(int op, uint64_t a, uint64_t b, int wide)
{
    int64_t sa = wide ? (int64_t)a : (int32_t)a, sb = wide ? (int64_t)b : (int32_t)b;

    if (!wide)
        a = (uint32_t)a, b = (uint32_t)b;
    switch (op) {
    case BPF_JEQ: return a == b;
    case BPF_JGT: return a > b;
    case BPF_JGE: return a >= b;
    case BPF_JSET: return (a & b) != 0;
    case BPF_JNE: return a != b;
    case BPF_JSGT: return sa > sb;
    case BPF_JSGE: return sa >= sb;
    case BPF_JLT: return a < b;
    case BPF_JLE: return a <= b;
    case BPF_JSLT: return sa < sb;
    case BPF_JSLE: return sa <= sb;
    }
    return 0;
}

static uint64_t swap(uint64_t v, int bits, int big)
{
    uint64_t m = bits == 64 ? ~0ull : (1ull << bits) - 1;

    if (big)
        v = __builtin_bswap64(v) >> (64 - bits);
    return v & m;
}

static uint32_t meaning(const struct program *p)
{
    uint64_t r[REGS] = { 0 };

    for (int pc = 0;; pc++) {
        const struct bpf_insn *i = &p->insn[pc];
        int class = i->code & 7, op = i->code & 0xf0, wide = class == BPF_ALU64 || class == BPF_JMP;
        uint64_t b = i->code & BPF_X ? r[i->src_reg] : (uint64_t)(int64_t)i->imm;

        if (i->code == (BPF_JMP | BPF_EXIT))
            return (uint32_t)r[0];
        if (i->code == (BPF_LD | BPF_DW | BPF_IMM)) {
            r[i->dst_reg] = (uint32_t)i->imm | (uint64_t)(uint32_t)i[1].imm << 32;
            pc++;
        } else if (class == BPF_JMP || class == BPF_JMP32) {
            if (taken(op, r[i->dst_reg], b, wide))
                pc += i->off;
        } else if (op == BPF_END) {
            r[i->dst_reg] = swap(r[i->dst_reg], i->imm, i->code & BPF_TO_BE);
        } else {
            r[i->dst_reg] = alu(op, r[i->dst_reg], b, wide);
        }
    }
}

static int load(const struct program *p, enum bpf_prog_type type)
{
    union bpf_attr a;

    memset(&a, 0, sizeof a);
    a.prog_type = type;
    a.insns = (uintptr_t)p->insn;
    a.insn_cnt = (uint32_t)p->n;
    a.license = (uintptr_t) "GPL";
    a.log_buf = (uintptr_t)log_text;
    a.log_size = sizeof log_text;
    a.log_level = 1;
    return bpf(BPF_PROG_LOAD, &a);
}

static int run_one(unsigned number)
{
    static uint8_t packet[64];
    static int keep[16] = { 0 };
    struct program p;
    union bpf_attr a;
    uint32_t want;
    int fd;

    generate(&p);
    want = meaning(&p);
    fd = load(&p, BPF_PROG_TYPE_SOCKET_FILTER);
    if (fd < 0) {
        printf("program %u is refused: %s\n%.2000s\n", number, strerror(errno), log_text);
        return 1;
    }
    for (int times = 0; times < 3; times++) {
        memset(&a, 0, sizeof a);
        a.test.prog_fd = (uint32_t)fd;
        a.test.data_in = (uintptr_t)packet;
        a.test.data_size_in = sizeof packet;
        a.test.repeat = 1u << times * 3;
        if (bpf(BPF_PROG_TEST_RUN, &a)) {
            printf("program %u does not run: %s\n", number, strerror(errno));
            return 1;
        }
        if (a.test.retval != want) {
            printf("program %u: %#x, expected %#x\n", number, a.test.retval, want);
            return 1;
        }
    }
    if (keep[number % 16])                          /* they end in another order than they began */
        close(keep[number % 16]);
    keep[number % 16] = fd;
    return 0;
}

static int count_calls(void)
{
    struct program p = { .n = 0 };
    union bpf_attr a;
    uint32_t key = 0;
    uint64_t value = 0;
    int map, prog, link;

    memset(&a, 0, sizeof a);
    a.map_type = BPF_MAP_TYPE_ARRAY;
    a.key_size = 4;
    a.value_size = 8;
    a.max_entries = 1;
    map = bpf(BPF_MAP_CREATE, &a);
    if (map < 0)
        return perror("map"), 1;
    put(&p, BPF_ALU64 | BPF_MOV | BPF_X, 6, 1, 0, 0);
    put(&p, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_get_current_pid_tgid);
    put(&p, BPF_ALU64 | BPF_RSH | BPF_K, 0, 0, 0, 32);
    put(&p, BPF_JMP | BPF_JNE | BPF_K, 0, 0, 10, getpid());
    put(&p, BPF_LDX | BPF_MEM | BPF_DW, 7, 6, 8, 0); /* arguments: registers, number */
    put(&p, BPF_JMP | BPF_JNE | BPF_K, 7, 0, 8, SYS_getppid);
    put(&p, BPF_ST | BPF_MEM | BPF_W, 10, 0, -4, 0);
    put(&p, BPF_ALU64 | BPF_MOV | BPF_X, 2, 10, 0, 0);
    put(&p, BPF_ALU64 | BPF_ADD | BPF_K, 2, 0, 0, -4);
    put(&p, BPF_LD | BPF_DW | BPF_IMM, 1, BPF_PSEUDO_MAP_FD, 0, map);
    put(&p, 0, 0, 0, 0, 0);
    put(&p, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_map_lookup_elem);
    put(&p, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1, 0);
    put(&p, BPF_JMP | BPF_JA, 0, 0, 2, 0);
    put(&p, BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0);
    put(&p, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
    put(&p, BPF_ALU64 | BPF_MOV | BPF_K, 1, 0, 0, 1);
    put(&p, BPF_STX | BPF_ATOMIC | BPF_DW, 0, 1, 0, BPF_ADD);
    put(&p, BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0);
    put(&p, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
    prog = load(&p, BPF_PROG_TYPE_RAW_TRACEPOINT);
    if (prog < 0)
        return printf("tracepoint program: %s\n%.2000s\n", strerror(errno), log_text), 1;
    memset(&a, 0, sizeof a);
    a.raw_tracepoint.name = (uintptr_t) "sys_enter";
    a.raw_tracepoint.prog_fd = (uint32_t)prog;
    link = bpf(BPF_RAW_TRACEPOINT_OPEN, &a);
    if (link < 0)
        return perror("raw tracepoint"), 1;
    for (int i = 0; i < 1000; i++)
        syscall(SYS_getppid);
    close(link);
    memset(&a, 0, sizeof a);
    a.map_fd = (uint32_t)map;
    a.key = (uintptr_t)&key;
    a.value = (uintptr_t)&value;
    if (bpf(BPF_MAP_LOOKUP_ELEM, &a))
        return perror("look-up"), 1;
    printf("counted %lu calls\n", (unsigned long)value);
    return value != 1000;
}

int main(int argc, char **argv)
{
    unsigned programs = argc > 1 ? (unsigned)atoi(argv[1]) : 100, i;

    state = (argc > 2 ? strtoull(argv[2], NULL, 0) : 1) * 0x9e3779b97f4a7c15 | 1;
    for (i = 0; i < programs; i++)
        if (run_one(i))
            return 1;
    printf("%u programs\n", programs);
    return count_calls();
}
