/*
 * diff_test [--kernel] [--seed N] [--first N] [--count N] [--seconds N] [--show] [--engine NAME]: random programs (prog.h) on this processor, on bt with each way to reach memory, and on
 * interp; what they leave in registers, flags, vectors and memory must be the same. Each runs twice, the second time with what the first has left in the caches.
 * In some configurations events that come to nothing reach the vCPU all the time, so that translated code is left and entered again wherever it happens to be.
 *
 * --kernel: the programs run at CPL 0 and do what kernels do (prog.c, enum system), user code included. They are compared with what interp makes of them
 * undisturbed; the events are interrupts then, whose handler changes nothing that can be seen. Reports say native all the same.
 *
 * A program that differs is made as small as possible and printed with its number; then it runs block by block beside interp (--check), which tells the
 * first instruction that differs, if it is one that does. --first N --count 1 --show makes one again.
 */
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "cpu/trap.h"
#include "prog.h"

#define FRESH_EVERY 16                                             /* programs; then engines begin with empty caches */
#define ROUNDS 2
#define FAULTS_MAX 60
#define SMALLER_SECONDS 15

static struct {
    u64 seed;
    unsigned first, count, seconds;
    bool show, kernel;
    const struct engine *engine;                                   /* NULL: all */
} opt = {.seed = 1, .count = 1000};

static const struct config {
    const char *name;
    const struct engine *engine;
    enum machine_mmu mmu;
    bool at_once, kicked;
    unsigned every;                                                /* runs every so many programs */
} configs[] = {
    {"bt, shadow", &bt_engine, MACHINE_MMU_SHADOW, true, false, 1},
    {"bt, software TLB", &bt_engine, MACHINE_MMU_SOFTTLB, true, false, 2},
    {"bt, after interpretation", &bt_engine, MACHINE_MMU_AUTO, false, false, 4},
    {"bt, shadow, with events", &bt_engine, MACHINE_MMU_SHADOW, true, true, 2},
    {"bt, software TLB, with events", &bt_engine, MACHINE_MMU_SOFTTLB, true, true, 4},
    {"interp", &interp_engine, MACHINE_MMU_AUTO, false, false, 8},
};

static struct tally {
    unsigned programs, failed;
    u64 kicks, steps, interrupts;
} tally[ARRAY_SIZE(configs)];
static struct guest *guest[ARRAY_SIZE(configs)];
static u8 pattern[PAGES * PAGE_SIZE];
static struct catalogue *catalogue;
static struct xlayout layout;
static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct guest *guest;                                           /* that is to get events; NULL: none at present */
    bool quit;
} kicker = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
static struct {
    struct guest *guest;                                           /* that runs */
    unsigned number;
    bool smaller;                                                  /* a program is being made small: what then does not end is no use */
} now;

static void on_alarm(int sig UNUSED)
{
    if (now.guest) {
        guest_stop(now.guest);
        return;
    }
    printf("Bail out! program %u does not end on the processor itself\n", now.number);
    fflush(stdout);
    _exit(1);
}

static struct guest *open_guest(const struct config *c, bool check, const struct log *log)
{
    struct guest_config g = {.engine = c->engine, .writable_code = true, .kernel = opt.kernel, .log = log};
    struct guest *out;
    g.tools.mmu = c->mmu;
    g.tools.translate_at_once = c->at_once;
    g.tools.check = check;
    if (guest_open(&g, &out) || guest_warm_up(out, pattern))
        return NULL;
    return out;
}

static void close_guest(unsigned k)
{
    if (!guest[k])
        return;
    tally[k].kicks += guest_vcpu(guest[k])->count[COUNT_KICKS];
    tally[k].steps += guest_vcpu(guest[k])->count[COUNT_KICK_STEPS];
    tally[k].interrupts += guest_interrupts(guest[k]);
    guest_close(guest[k]);
    guest[k] = NULL;
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* ---- one program ---- */
static void icase_of(const struct prog *p, struct icase *i)
{
    *i = (struct icase){.number = now.number, .in = p->in, .text = p->text, .text_len = PROG_BYTES, .what = "program"};
}

static void run_native(const struct prog *p, struct outcome *out)
{
    static struct icase i;
    icase_of(p, &i);
    alarm(60);
    native_run(&i, pattern, out);
    alarm(0);
}

static void *kicker_main(void *arg)
{
    struct rng r = {opt.seed | 1};
    prctl(PR_SET_TIMERSLACK, 1);
    pthread_mutex_lock(&kicker.lock);
    while (!kicker.quit) {
        while (!kicker.guest && !kicker.quit)
            pthread_cond_wait(&kicker.changed, &kicker.lock);
        if (kicker.guest)
            guest_interrupt(kicker.guest);
        pthread_mutex_unlock(&kicker.lock);
        nanosleep(&(struct timespec){.tv_nsec = 1 + rnd_below(&r, 20000)}, NULL);
        pthread_mutex_lock(&kicker.lock);
    }
    pthread_mutex_unlock(&kicker.lock);
    return arg;
}

static void kick(struct guest *g)
{
    pthread_mutex_lock(&kicker.lock);
    kicker.guest = g;
    pthread_cond_signal(&kicker.changed);
    pthread_mutex_unlock(&kicker.lock);
}

/* False: it does not end. */
static bool run_guest(struct guest *g, const struct prog *p, bool kicked, struct outcome *out)
{
    static struct icase i;
    icase_of(p, &i);
    now.guest = g;
    alarm(now.smaller ? 2 : 60);
    if (kicked)
        kick(g);
    int r = guest_run(g, &i, pattern, out);
    if (kicked)
        kick(NULL);
    alarm(0);
    now.guest = NULL;
    return r == 0;
}

static bool same(const struct outcome *a, const struct outcome *b)
{
    differ_begin();
    if (a->vector != b->vector)
        differ("#   ends by native %s engine %s\n", trap_name(a->vector), trap_name(b->vector));
    else if (a->vector == VEC_PF && (a->cr2 ^ b->cr2) >= PAGE_SIZE)
        differ("#   cr2 native %llx engine %llx\n", (unsigned long long)a->cr2, (unsigned long long)b->cr2);
    compare_registers(&a->s, &b->s, 0);
    compare_vectors(&a->s.v, &b->s.v);
    compare_memory(a, b);
    for (unsigned k = 0; k < 2; k++)
        for (unsigned n = 0, shown = 0; n < PAGE_SIZE && shown < 4; n++)
            if (a->mem[PAGE_CODE0 + k][n] != b->mem[PAGE_CODE0 + k][n]) {
                differ("#   code at %llx native %02x engine %02x\n", PAGE_VA(PAGE_CODE0 + k) + n, a->mem[PAGE_CODE0 + k][n], b->mem[PAGE_CODE0 + k][n]);
                shown++;
            }
    return !*differ_report();
}

/* What is right: the processor's, or of a kernel the interpreter's. False: the program does not end. */
static bool run_right(const struct prog *p, struct outcome *out)
{
    static const struct config interp = {"interp", &interp_engine, MACHINE_MMU_AUTO, false, false, 1};
    static struct guest *g;
    if (!opt.kernel) {
        run_native(p, out);
        return true;
    }
    if (!g)
        g = open_guest(&interp, false, NULL);
    bug_on(!g);
    if (run_guest(g, p, false, out))
        return true;
    guest_close(g);
    g = NULL;
    return false;
}

/* What is right need not be the same each time (insn.h: NATIVE_TRIES): whether the outcome is that of a further run. */
static bool same_as_another(const struct prog *p, const struct outcome *out)
{
    static struct outcome native;
    for (unsigned n = 0; n < NATIVE_TRIES; n++)
        if (run_right(p, &native) && same(&native, out))
            return true;
    return false;
}

/* True: no difference in any round. The report tells of the first. */
static bool agrees(const struct config *c, struct guest **g, const struct prog *p, const struct outcome *native)
{
    static struct outcome out;
    for (unsigned n = 0; n < ROUNDS; n++) {
        if (!run_guest(*g, p, c->kicked, &out)) {
            differ_begin();
            differ("#   %s does not end it\n", c->name);
            guest_close(*g);
            *g = open_guest(c, false, NULL);
            return false;
        }
        if (!same(native, &out) && !same_as_another(p, &out))
            return false;
    }
    return true;
}

/* Takes out what faults, mostly; so programs become long. False: it does not end, and is no program. */
static bool make_program(unsigned number, struct prog *p, struct outcome *native)
{
    struct rng r = {(opt.seed ^ number) * 0x9e3779b97f4a7c15 | 1};
    prog_make(catalogue, &layout, opt.seed, number, p);
    for (unsigned n = 0; n < FAULTS_MAX; n++) {
        while (!prog_assemble(catalogue, p))
            prog_remove(p, p->pieces - 1, 1);
        if (!run_right(p, native))
            return false;
        int at = native->vector == VEC_BP ? -1 : prog_piece_at(p, native->s.rip - CODE_VA);
        if (at < 0 || p->piece[at].kind == PIECE_FAULT || one_in(&r, 24))
            return true;
        prog_remove(p, (unsigned)at, 1);
    }
    prog_assemble(catalogue, p);
    return run_right(p, native);
}

/* ---- a program that differs ---- */
static bool differs_still(const struct config *c, struct prog *p, unsigned first, unsigned n)
{
    static struct prog q;
    static struct outcome native;
    struct guest *g = open_guest(c, false, NULL);
    bool differs = false;
    q = *p;
    prog_remove(&q, first, n);
    if (g && prog_assemble(catalogue, &q)) {
        differs = run_right(&q, &native) && !agrees(c, &g, &q, &native);
        if (differs)
            *p = q;
    }
    if (g)
        guest_close(g);
    return differs;
}

static void minimize(const struct config *c, struct prog *p)
{
    double end = now_s() + SMALLER_SECONDS;
    now.smaller = true;
    for (unsigned n = p->pieces / 2; n > 0; n /= 2)
        for (unsigned first = 0; first + n <= p->pieces && now_s() < end;)
            if (!differs_still(c, p, first, n))
                first += n;
    now.smaller = false;
}

static void print_check(void *arg UNUSED, enum log_level level UNUSED, const char *msg)
{
    printf("# %s\n", msg);
}

static void check_again(const struct config *c, const struct prog *p)
{
    static const struct log log = {.sink = print_check};
    static struct outcome out;
    struct guest *g = open_guest(c, true, &log);
    if (!g)
        return;
    printf("# block by block:\n");
    if (run_guest(g, p, false, &out))
        printf("# no block differs by itself\n");
    guest_close(g);
}

static void report(const struct config *c, struct prog *p)
{
    static struct outcome native;
    unsigned pieces = p->pieces;
    printf("# %s: program %u of seed %llu differs:\n%s", c->name, now.number, (unsigned long long)opt.seed, differ_report());
    fflush(stdout);
    bool again = differs_still(c, p, 0, 0);
    if (again)
        minimize(c, p);
    prog_assemble(catalogue, p);
    run_right(p, &native);
    printf("# %s; %u of %u pieces are enough:\n", again ? "again from empty caches" : "not from empty caches, or not each time", p->pieces, pieces);
    prog_print(p);
    fflush(stdout);
    struct guest *g = open_guest(c, false, NULL);
    if (g) {
        agrees(c, &g, p, &native);
        guest_close(g);
    }
    fputs(differ_report(), stdout);
    if (c->engine == &bt_engine)
        check_again(c, p);
    fflush(stdout);
}

static void run_program(unsigned number)
{
    static struct prog p;
    static struct outcome native;
    now.number = number;
    p.kernel = opt.kernel;
    if (!make_program(number, &p, &native)) {
        printf("# program %u does not end\n", number);
        return;
    }
    if (opt.show) {
        printf("# program %u ends by %s at %llx\n", number, trap_name(native.vector), (unsigned long long)native.s.rip);
        prog_print(&p);
    }
    for (unsigned k = 0; k < ARRAY_SIZE(configs); k++) {
        const struct config *c = &configs[k];
        if ((opt.engine && opt.engine != c->engine) || (number % c->every && opt.count > 1))
            continue;
        if (!guest[k] || number % (FRESH_EVERY * c->every) == 0) {
            close_guest(k);
            guest[k] = open_guest(c, false, NULL);
            bug_on(!guest[k]);
        }
        tally[k].programs++;
        if (agrees(c, &guest[k], &p, &native))
            continue;
        if (tally[k].failed++ == 0) {
            struct prog q = p;
            report(c, &q);
        }
    }
}

/* ---- all of them ---- */
static int options(int argc, char **argv)
{
    for (int n = 1; n < argc; n++) {
        const char *v = n + 1 < argc ? argv[n + 1] : NULL;
        if (!strcmp(argv[n], "--show"))
            opt.show = true;
        else if (!strcmp(argv[n], "--kernel"))
            opt.kernel = true;
        else if (!v)
            return -1;
        else if (!strcmp(argv[n], "--seed"))
            opt.seed = strtoull(argv[++n], NULL, 0);
        else if (!strcmp(argv[n], "--first"))
            opt.first = (unsigned)strtoul(argv[++n], NULL, 0);
        else if (!strcmp(argv[n], "--count"))
            opt.count = (unsigned)strtoul(argv[++n], NULL, 0);
        else if (!strcmp(argv[n], "--seconds"))
            opt.seconds = (unsigned)strtoul(argv[++n], NULL, 0);
        else if (!strcmp(argv[n], "--engine") && engine_find(v))
            opt.engine = engine_find(argv[++n]);
        else
            return -1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    const char *why;
    unsigned failed = 0, done = 0;
    if (options(argc, argv)) {
        fprintf(stderr, "usage: diff_test [--kernel] [--seed N] [--first N] [--count N] [--seconds N] [--show] [--engine NAME]\n");
        return 64;
    }
    xlayout_host(&layout);
    gen_pattern(1, pattern);
    for (unsigned k = 0; k < ARRAY_SIZE(configs); k++)             /* before the native side's signal handlers */
        guest[k] = open_guest(&configs[k], false, NULL);
    if (!opt.kernel && native_open(&layout, true, &why)) {
        printf("1..1\nok 1 - diff # SKIP %s\n", why);
        return 0;
    }
    struct sigaction sa = {.sa_handler = on_alarm, .sa_flags = SA_ONSTACK | SA_RESTART}; /* the stack may be a guest's */
    sigaction(SIGALRM, &sa, NULL);
    catalogue = catalogue_open(1, &layout, pattern);
    bug_on(!catalogue);
    pthread_t thread;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);                        /* the alarm is for the thread that runs programs */
    bug_on(pthread_create(&thread, NULL, kicker_main, NULL));
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    double end = now_s() + opt.seconds;
    for (unsigned n = opt.first; opt.seconds ? now_s() < end : n < opt.first + opt.count; n++, done++)
        run_program(n);
    pthread_mutex_lock(&kicker.lock);
    kicker.quit = true;
    pthread_cond_signal(&kicker.changed);
    pthread_mutex_unlock(&kicker.lock);
    pthread_join(thread, NULL);
    printf("1..%zu\n", ARRAY_SIZE(configs));
    for (unsigned k = 0; k < ARRAY_SIZE(configs); k++) {
        printf("%sok %u - %s: %u programs%s\n", tally[k].failed ? "not " : "", k + 1, configs[k].name, tally[k].programs,
               !tally[k].failed ? "" : opt.kernel ? " differ from interp undisturbed" : " differ from the processor");
        if (tally[k].failed)
            printf("# %u of them differ\n", tally[k].failed);
        close_guest(k);
        if (configs[k].kicked)
            printf("# %llu events found translated code running, %llu steps to where it could be left; %llu interrupts\n",
                   (unsigned long long)tally[k].kicks, (unsigned long long)tally[k].steps, (unsigned long long)tally[k].interrupts);
        failed += tally[k].failed;
    }
    printf("# %u programs of seed %llu, of %u instructions\n", done, (unsigned long long)opt.seed, catalogue_size(catalogue));
    catalogue_close(catalogue);
    return failed != 0;
}
