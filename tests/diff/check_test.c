/*
 * --check (cpu/bt/check.h): a program without a difference passes; a translator that makes a mistake of each kind, at one instruction of a longer block, is found out, and the
 * instruction is named. The mistakes are made here, behind the translator's back; one that does not come again is none.
 */
#include <string.h>

#include "cpu/bt/check.h"
#include "cpu/interp/fp.h"
#include "insn.h"

#define AT(n) (CODE_VA + (n))

/* A loop of 3 rounds, its instructions at known places. */
static const u8 text[] = {
    /* 00 */ 0xb9, 3, 0, 0, 0,                                     /* mov ecx, 3 */
    /* 05 */ 0x48, 0x8d, 0x1d, 0xf4, 0x2f, 0, 0,                   /* lea rbx, [rip + 2ff4h]: PAGE_DATA0 */
    /* 0c */ 0x01, 0xc8,                                           /* again: add eax, ecx */
    /* 0e */ 0x48, 0x89, 0x03,                                     /* mov [rbx], rax */
    /* 11 */ 0x66, 0x0f, 0xfe, 0xc1,                               /* paddd xmm0, xmm1 */
    /* 15 */ 0x48, 0x83, 0xc3, 0x08,                               /* add rbx, 8 */
    /* 19 */ 0xff, 0xc9,                                           /* dec ecx */
    /* 1b */ 0x75, 0xef,                                           /* jnz again */
    /* 1d */ 0x50, 0x58,                                           /* push rax; pop rax */
    /* 1f */ 0x31, 0xc9,                                           /* xor ecx, ecx */
    /* 21 */ 0xf7, 0xf1,                                           /* div ecx */
};

static struct {
    const char *name;
    u64 at;                                                        /* behind this instruction */
    unsigned times;                                                /* so often */
    void (*spoil)(struct icpu *c);
} mistake;
static char said[65536];
static unsigned line, failed;

static void to_report(void *arg UNUSED, enum log_level level UNUSED, const char *msg)
{
    size_t n = strlen(said);
    snprintf(said + n, sizeof said - n, "%s\n", msg);
}
static const struct log log = {.sink = to_report};

static void ok(bool good, const char *fmt, const char *what)
{
    printf("%sok %u - ", good ? "" : "not ", ++line);
    printf(fmt, what);
    putchar('\n');
    if (good)
        return;
    failed++;
    for (char *l = strtok(said, "\n"); l; l = strtok(NULL, "\n"))
        printf("# %s\n", l);
}

/* In place of bt_run_single(): what ran holds the instruction if the block began at or before it and was left behind it. */
static void spoiled_run(struct icpu *c)
{
    u64 begin = c->rip, insns = c->v->insns;
    bt_run_single(c);
    if (!mistake.spoil || !mistake.times || begin > mistake.at || c->v->insns == insns)
        return;
    if (c->rip > mistake.at && c->rip < CODE_VA + sizeof text ? true : begin <= mistake.at && (c->rip < begin || c->rip > CODE_VA + sizeof text)) {
        mistake.times--;
        mistake.spoil(c);
    }
}

static void spoil_register(struct icpu *c) { c->r[R9] ^= 1; }
static void spoil_rip(struct icpu *c) { c->rip ^= 0x10000; }
static void spoil_flag(struct icpu *c) { c->fl ^= FL_CF; }
static void spoil_if(struct icpu *c) { c->flags ^= FLAG_IF; }
static void spoil_count(struct icpu *c) { c->v->insns += 3; }
static void spoil_cr2(struct icpu *c) { c->x->cr2 ^= 8; }
static void spoil_vector(struct icpu *c) { icpu_fp(c)->v[0][5] ^= 0x40; }
static void spoil_x87(struct icpu *c) { icpu_fp(c)->x87.fcw ^= 0x400; }
static void spoil_mxcsr(struct icpu *c) { icpu_fp(c)->mxcsr ^= 0x8000; }
static void spoil_memory(struct icpu *c)
{
    u64 gpa = 0x100000 + PAGE_DATA0 * PAGE_SIZE;
    *ram_hva(c->v->m->ram, gpa) ^= 1;
}
static void spoil_frame(struct icpu *c)
{
    u64 gpa = c->r[RSP] & 0xfffff;                                 /* of the fault's frame: the saved RIP */
    *ram_hva(c->v->m->ram, gpa) ^= 1;
}

static bool run(struct guest **g, const u8 *pattern, u64 checked[2])
{
    struct guest_config config = {.engine = &bt_engine, .log = &log, .writable_code = true, .tools.check = true};
    static struct outcome out;
    struct icase i = {.in.rip = CODE_VA, .in.rflags = FLAG_1, .in.v.mxcsr = 0x1f80, .in.v.fcw = 0x37f, .text = text, .text_len = sizeof text};
    said[0] = 0;
    i.in.gpr[RSP] = PAGE_VA(PAGE_STACK1);
    if (guest_open(&config, g))
        return false;
    struct icpu *c = guest_vcpu(*g)->engine_data;
    c->bt.check->run = spoiled_run;
    bool done = guest_run(*g, &i, pattern, &out) == 0;
    checked[0] = c->v->count[COUNT_CHECK_INSNS];
    checked[1] = c->v->count[COUNT_CHECK_RETRIED] + c->v->count[COUNT_CHECK_EARLY];
    guest_close(*g);
    return done && out.vector == 0;
}

int main(void)
{
    static const struct {
        const char *name;
        u64 at;
        void (*spoil)(struct icpu *c);
        const char *says;
    } mistakes[] = {
        {"a register", AT(0x0e), spoil_register, "r9 "},
        {"a register, at a block's first instruction", AT(0), spoil_register, "r9 "},
        {"RIP", AT(0x1b), spoil_rip, "rip "},
        {"a flag", AT(0x0c), spoil_flag, "CF"},
        {"IF", AT(0x15), spoil_if, "IF"},
        {"the number of instructions", AT(0x19), spoil_count, "instructions completed"},
        {"CR2", AT(0x0e), spoil_cr2, "cr2"},
        {"a vector", AT(0x11), spoil_vector, "xmm0 byte 5"},
        {"MXCSR", AT(0x11), spoil_mxcsr, "XSAVE image"},
        {"x87's control word", AT(0x11), spoil_x87, "XSAVE image"},
        {"memory", AT(0x0e), spoil_memory, "memory at guest-physical 0x103000"},
        {"a fault's frame", AT(0x21), spoil_frame, "memory at guest-physical"},
    };
    static u8 pattern[PAGES * PAGE_SIZE];
    struct guest *g;
    u64 checked[2];
    char arrow[64];
    gen_pattern(1, pattern);
    ok(run(&g, pattern, checked) && !said[0], "%s", "no difference, nothing said");
    ok(checked[0] >= 23, "%s", "all instructions were compared");
    for (unsigned n = 0; n < ARRAY_SIZE(mistakes); n++) {
        mistake.spoil = mistakes[n].spoil;
        mistake.at = mistakes[n].at;
        mistake.times = ~0u;
        bool stopped = !run(&g, pattern, checked);
        snprintf(arrow, sizeof arrow, "-> %016llx", (unsigned long long)mistakes[n].at);
        ok(stopped && strstr(said, mistakes[n].says) && strstr(err_last(), "--check"), "a mistake in %s is found", mistakes[n].name);
        ok(strstr(said, arrow), "and its instruction: %s", mistakes[n].name);
    }
    mistake.spoil = spoil_register;
    mistake.at = AT(0x0e);
    mistake.times = 1;
    ok(run(&g, pattern, checked) && !said[0] && checked[1] >= 1, "%s", "a difference that does not come again is none");
    printf("1..%u\n", line);
    return failed != 0;
}
