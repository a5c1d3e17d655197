/*
 * insn_test [--engine NAME [--softtlb]] [--seed N] [--case N] [--every N] [--mnemonic NAME] [--show] [--native]: compares generated
 * instructions on this processor and on an engine, interp or bt.
 *
 * One TAP line for each mnemonic, then the coverage by operand form, and what is not tested with the reason. A failing case is printed with its
 * number; --case N runs it alone, --show prints its whole state.
 *
 * Compared: registers, RIP, flags (defined ones), vectors, masks, MXCSR, x87 state with its pointers, memory, and the fault with its error code and address.
 */
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "cpu/cpuid.h"
#include "cpu/trap.h"
#include "insn.h"

#define FORMS_MAX 20000
#define REPORT_PER_MNEMONIC 3

static struct {
    u64 seed;
    long only_case;
    unsigned every;
    const char *mnemonic;
    bool show, native_only, softtlb, masked;
    const struct engine *engine;
} opt = {.seed = 1, .only_case = -1, .every = 1, .engine = &interp_engine};
static struct guest *guest;

struct tally {
    unsigned cases, failed, faults;
};
static struct tally tally[ZYDIS_MNEMONIC_MAX_VALUE + 1];
static struct form {
    ZydisMnemonic m;
    char name[60];
    unsigned cases;
} forms[FORMS_MAX];
static unsigned form_count, form_bucket[1u << 16];
static struct {
    unsigned cases, failed, undefined, beyond;
} total;
static const struct icase *running;

/* ---- what differs ---- */

static u64 undefined_flags(const struct icase *i)
{
    return i->z.cpu_flags ? i->z.cpu_flags->undefined : 0;
}

/* State images: which of their bytes is accessed first is up to the processor. */
static bool block_access(const struct icase *i)
{
    switch (i->z.mnemonic) {
    case ZYDIS_MNEMONIC_FNSTENV: case ZYDIS_MNEMONIC_FLDENV: case ZYDIS_MNEMONIC_FNSAVE: case ZYDIS_MNEMONIC_FRSTOR:
    case ZYDIS_MNEMONIC_FXSAVE: case ZYDIS_MNEMONIC_FXSAVE64: case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64:
        return true;
    default:
        return i->z.meta.category == ZYDIS_CATEGORY_XSAVE;
    }
}

static void compare_fault(const struct icase *i, const struct outcome *a, const struct outcome *b)
{
    u64 ea = a->error, eb = b->error, apart = a->cr2 > b->cr2 ? a->cr2 - b->cr2 : b->cr2 - a->cr2;

    if (a->vector != b->vector)
        differ("#   fault native %s engine %s\n", trap_name(a->vector), trap_name(b->vector));
    if (a->vector != b->vector)
        return;
    if (a->vector == VEC_PF) {
        if (apart && !(block_access(i) && apart < PAGE_SIZE))
            differ("#   cr2 native %llx engine %llx\n", (unsigned long long)a->cr2, (unsigned long long)b->cr2);
        if (a->cr2 >> 47)                                          /* Linux hides whether a kernel page is present */
            ea &= ~1ull, eb &= ~1ull;
    }
    if (trap_has_error(a->vector) && ea != eb)
        differ("#   error native %llx engine %llx\n", (unsigned long long)ea, (unsigned long long)eb);
}

/* A gather that faults: whether what lies above the destination's elements is cleared already is up to the processor. */
static void forgive_gather(const struct icase *i, const struct outcome *a, struct outcome *b)
{
    bool gather = i->z.meta.category == ZYDIS_CATEGORY_AVX2GATHER || i->z.meta.category == ZYDIS_CATEGORY_GATHER;
    unsigned r = (u8)ZydisRegisterGetId(i->o[0].reg.value) & 31, n = MIN(i->z.avx.vector_length / 8u, 64u);

    if (gather && a->vector != VEC_BP)
        memcpy(b->s.v.zmm[r] + n, a->s.v.zmm[r] + n, 64 - n);
}

static bool compare(const struct icase *i, const struct outcome *a, struct outcome *b)
{
    u64 undefined = undefined_flags(i);

    differ_begin();
    compare_fault(i, a, b);
    if ((a->s.rflags ^ b->s.rflags) & undefined)
        total.undefined++;
    compare_registers(&a->s, &b->s, undefined);
    forgive_gather(i, a, b);
    compare_vectors(&a->s.v, &b->s.v);
    compare_memory(a, b);
    return !*differ_report();
}

/* ---- reports ---- */

static unsigned long long word(const u8 *p)
{
    unsigned long long v;

    memcpy(&v, p, 8);
    return v;
}

static void describe(const struct icase *i)
{
    ZydisFormatter f;
    char text[128];

    ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
    ZydisFormatterFormatInstruction(&f, &i->z, i->o, i->z.operand_count_visible, text, sizeof text, i->in.rip, NULL);
    printf("# case %u%s: %s (", i->number, i->compat ? " (32-bit)" : "", text);
    for (unsigned n = 0; n < i->len; n++)
        printf("%02x", i->code[n]);
    printf(") at %llx, memory %s\n", (unsigned long long)i->in.rip, i->what);
}

static void show(const struct icase *i)
{
    static const char *const name[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};

    for (unsigned r = 0; r < 16; r++)
        printf("#   %-3s %016llx%s", name[r], (unsigned long long)i->in.gpr[r], r % 4 == 3 ? "\n" : "  ");
    printf("#   rflags %llx fs %llx gs %llx mxcsr %x fcw %x fsw %x ftw %x\n", (unsigned long long)i->in.rflags, (unsigned long long)i->in.fs_base,
           (unsigned long long)i->in.gs_base, i->in.v.mxcsr, i->in.v.fcw, i->in.v.fsw, i->in.v.ftw);
    for (unsigned r = 0; r < 32; r++) {
        printf("#   zmm%-2u", r);
        for (unsigned w = 8; w-- > 0;)
            printf(" %016llx", word(i->in.v.zmm[r] + 8 * w));
        printf("\n");
    }
    for (unsigned r = 0; r < 8; r++)
        printf("#   st%u %02x%02x:%016llx  k%u %016llx\n", r, i->in.v.st[r][9], i->in.v.st[r][8], word(i->in.v.st[r]), r,
               (unsigned long long)i->in.v.k[r]);
}

static void cover(const struct icase *i)
{
    struct form f = {.m = i->z.mnemonic};
    u32 h = (u32)f.m * 2654435761u;

    gen_form(i, f.name, sizeof f.name);
    for (const char *c = f.name; *c; c++)
        h = (h ^ (u8)*c) * 16777619u;
    for (h ^= h >> 16;; h++) {
        unsigned *slot = &form_bucket[h & 0xffff];

        if (!*slot) {
            if (form_count == FORMS_MAX - 1)
                return;
            *slot = ++form_count;
            forms[*slot] = f;
        }
        if (forms[*slot].m == f.m && !strcmp(forms[*slot].name, f.name)) {
            forms[*slot].cases++;
            return;
        }
    }
}

static int by_mnemonic(const void *a, const void *b)
{
    const struct form *x = a, *y = b;

    return x->m != y->m ? (x->m < y->m ? -1 : 1) : strcmp(x->name, y->name);
}

static void print_coverage(void)
{
    qsort(forms + 1, form_count, sizeof forms[0], by_mnemonic);
    printf("# coverage: mnemonic: operand form (bits) x cases\n");
    for (unsigned n = 1; n <= form_count;) {
        ZydisMnemonic m = forms[n].m;

        printf("# %s:", ZydisMnemonicGetString(m));
        for (; n <= form_count && forms[n].m == m; n++)
            printf(" %s x%u%s", forms[n].name[0] ? forms[n].name : "-", forms[n].cases, n < form_count && forms[n + 1].m == m ? ";" : "");
        printf("\n");
    }
}

/* Mnemonics of Zydis that no case has. */
static void print_untested(void)
{
    printf("# not tested:");
    for (unsigned m = 1; m <= ZYDIS_MNEMONIC_MAX_VALUE; m++) {
        ZydisDecodedInstruction z = {.mnemonic = (ZydisMnemonic)m};
        const char *why = gen_excluded(&z);

        if (tally[m].cases == 0 && why)
            printf(" %s (%s);", ZydisMnemonicGetString((ZydisMnemonic)m), why);
    }
    printf("\n# not tested, because privileged (sys tests), hidden by the CPUID policy, of other processors, or segment loads:");
    for (unsigned m = 1; m <= ZYDIS_MNEMONIC_MAX_VALUE; m++) {
        ZydisDecodedInstruction z = {.mnemonic = (ZydisMnemonic)m};

        if (tally[m].cases == 0 && !gen_excluded(&z))
            printf(" %s", ZydisMnemonicGetString((ZydisMnemonic)m));
    }
    printf("\n");
}

static void on_alarm(int sig)
{
    (void)sig;
    printf("Bail out! case %u does not end\n", running ? running->number : 0);
    fflush(stdout);
    _exit(1);
}

/*
 * What bt does otherwise, and knows (emit_branch.c): a call whose target turns out not to be canonical has pushed its return address. Nobody can rely on
 * what lies below RSP.
 */
static void forgive(const struct icase *i, const struct outcome *a, struct outcome *b)
{
    u64 at = i->in.gpr[RSP] - 8 - REGION;

    if (opt.engine != &bt_engine || i->z.mnemonic != ZYDIS_MNEMONIC_CALL || a->vector != VEC_GP || at > PAGES * PAGE_SIZE - 8)
        return;
    for (u64 n = at; n < at + 8; n++)
        b->mem[n / PAGE_SIZE][n % PAGE_SIZE] = a->mem[n / PAGE_SIZE][n % PAGE_SIZE];
}

/*
 * With DOPPEL_HOST_MASK the guest's processor is less than this one: what it does not have is #UD there alone, and it need not save the same components. (Masks of
 * registers, such as avx, are not for this test: those that the guest does not have change here, too.)
 */
static bool beyond_mask(const struct icase *i, const struct outcome *a, const struct outcome *b)
{
    return opt.masked && ((b->vector == VEC_UD && a->vector != VEC_UD) || i->z.meta.category == ZYDIS_CATEGORY_XSAVE ||
                          i->z.meta.category == ZYDIS_CATEGORY_XSAVEOPT || i->z.mnemonic == ZYDIS_MNEMONIC_XGETBV);
}

static void run_case(struct icase *i, const u8 *pattern)
{
    static struct outcome a, b;
    struct tally *t = &tally[i->z.mnemonic];
    bool ok;

    running = i;
    if (opt.show) {
        describe(i);
        show(i);
        fflush(stdout);
    }
    alarm(30);
    native_run(i, pattern, &a);
    if (opt.native_only)
        ok = true;
    else if (guest_run(guest, i, pattern, &b)) {
        differ_begin();
        differ("#   the engine did not end in an exception\n");
        ok = false;
    } else {
        forgive(i, &a, &b);
        if (beyond_mask(i, &a, &b)) {
            total.beyond++;
            return;
        }
        ok = compare(i, &a, &b);
        for (unsigned n = 0; !ok && n < NATIVE_TRIES; n++) {
            native_run(i, pattern, &a);
            forgive(i, &a, &b);
            ok = compare(i, &a, &b);
        }
    }
    t->cases++;
    total.cases++;
    t->faults += a.vector != VEC_BP;
    cover(i);
    if (ok)
        return;
    total.failed++;
    if (t->failed++ < REPORT_PER_MNEMONIC || opt.mnemonic || opt.only_case >= 0) {
        describe(i);
        fputs(differ_report(), stdout);
    }
}

static bool chosen(const struct icase *i)
{
    return (opt.only_case < 0 || (unsigned)opt.only_case == i->number) && i->number % opt.every == 0 &&
           (!opt.mnemonic || !strcasecmp(opt.mnemonic, ZydisMnemonicGetString(i->z.mnemonic)));
}

static int options(int argc, char **argv)
{
    for (int n = 1; n < argc; n++) {
        if (!strcmp(argv[n], "--seed") && n + 1 < argc)
            opt.seed = strtoull(argv[++n], NULL, 0);
        else if (!strcmp(argv[n], "--case") && n + 1 < argc)
            opt.only_case = strtol(argv[++n], NULL, 0);
        else if (!strcmp(argv[n], "--every") && n + 1 < argc && strtoul(argv[n + 1], NULL, 0))
            opt.every = (unsigned)strtoul(argv[++n], NULL, 0);
        else if (!strcmp(argv[n], "--mnemonic") && n + 1 < argc)
            opt.mnemonic = argv[++n];
        else if (!strcmp(argv[n], "--engine") && n + 1 < argc && engine_find(argv[n + 1]))
            opt.engine = engine_find(argv[++n]);
        else if (!strcmp(argv[n], "--softtlb"))
            opt.softtlb = true;
        else if (!strcmp(argv[n], "--show"))
            opt.show = true;
        else if (!strcmp(argv[n], "--native"))
            opt.native_only = true;
        else {
            fprintf(stderr, "usage: insn_test [--engine NAME [--softtlb]] [--seed N] [--case N] [--every N] [--mnemonic NAME] [--show] [--native]\n");
            return -1;
        }
    }
    return 0;
}

static int host_mask(void)
{
    const char *mask = getenv("DOPPEL_HOST_MASK");

    opt.masked = mask && *mask;
    return mask ? cpuid_host_mask(mask) : 0;
}

int main(int argc, char **argv)
{
    static u8 pattern[PAGES * PAGE_SIZE];
    static struct icase i;
    struct xlayout layout;
    const char *why = NULL;
    struct gen *g;
    unsigned line = 0, wanted;

    if (options(argc, argv) || host_mask())
        return 64;
    wanted = (opt.masked ? 15000 : 20000) / opt.every;
    xlayout_host(&layout);
    gen_pattern(opt.seed, pattern);
    struct guest_config config = {.engine = opt.engine, .tools.translate_at_once = true};
    config.tools.mmu = opt.softtlb ? MACHINE_MMU_SOFTTLB : MACHINE_MMU_SHADOW;
    if (guest_open(&config, &guest) || guest_warm_up(guest, pattern)) {
        printf("Bail out! cannot make the guest\n");
        return 1;
    }
    if (native_open(&layout, false, &why)) {
        printf("1..1\nok 1 - insn # SKIP %s\n", why);
        return 0;
    }
    signal(SIGALRM, on_alarm);
    g = gen_open(opt.seed, &layout, pattern);
    bug_on(!g);
    while (gen_next(g, &i)) {
        if (chosen(&i))
            run_case(&i, pattern);
    }
    gen_close(g);
    alarm(0);
    for (unsigned m = 0; m <= ZYDIS_MNEMONIC_MAX_VALUE; m++) {
        if (tally[m].cases)
            printf("%s %u - %s (%u cases, %u of them fault)%s\n", tally[m].failed ? "not ok" : "ok", ++line, ZydisMnemonicGetString((ZydisMnemonic)m),
                   tally[m].cases, tally[m].faults, tally[m].failed ? " FAILED" : "");
    }
    if (opt.only_case < 0 && !opt.mnemonic) {
        print_coverage();
        print_untested();
        printf("%s %u - at least %u cases\n", total.cases >= wanted ? "ok" : "not ok", ++line, wanted);
    }
    if (opt.masked)
        printf("# %u cases are beyond the masked processor\n", total.beyond);
    printf("1..%u\n# %u mnemonics, %u operand forms, %u cases, %u failed; in %u an undefined flag differs\n", line, line, form_count, total.cases,
           total.failed, total.undefined);
    guest_close(guest);
    return total.failed || (opt.only_case < 0 && !opt.mnemonic && total.cases < wanted);
}
