/*
 * Pages with code (cpu/bt/codepage.h): the states of a page step by step on one thread, then vCPUs and a device as threads that claim, "translate" (copy
 * words), write fast and slow, and block on each other's locks. A copy that differs from memory while it may run is a failure. The second part is also
 * for -fsanitize=thread.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "cpu/bt/codepage.h"
#include "cpu/engine.h"

#define CPUS 3
#define PAGES 16u
#define COPIES 48u
#define HAMMER_NS 1500000000ull

struct copy {                          /* a translation: words as they were */
    u64 gpa;
    unsigned words;                    /* 0: none */
    u64 word[4];
};

struct cpu {
    struct vcpu v;
    struct copy copy[COPIES];
    bool fast[PAGES];                  /* it has a fast write to this page */
    unsigned protected_all, everything;
    u64 seed, ok, wait, compare, ran, stored;
    struct fixture *f;
};

struct fixture {
    struct ram ram;
    struct machine m;
    struct engine engine;
    struct vcpu *vcpus[CPUS];
    struct cpu *cpu[CPUS];
    pthread_mutex_t device;
    _Atomic bool stop;
    _Atomic u64 stale, kicks;
    u64 wrote;
};

static struct cpu *cpu_of(struct icpu *c)
{
    return container_of(c->v, struct cpu, v);
}

static struct icpu *icpu(struct fixture *f, unsigned i)
{
    return f->cpu[i]->v.engine_data;
}

/* ---- what a translator does ---- */

static bool invalidate(struct icpu *c, u64 gpa, u64 len)
{
    struct cpu *p = cpu_of(c);
    bool left = false;
    p->everything += len == ~0ull;
    for (unsigned i = 0; i < COPIES; i++) {
        struct copy *t = &p->copy[i];
        if (len == ~0ull || (t->words && t->gpa < gpa + len && gpa < t->gpa + 8 * t->words))
            t->words = 0;
        left = left || (t->words && t->gpa >> PAGE_SHIFT == gpa >> PAGE_SHIFT);
    }
    return left;
}

static void protect(struct icpu *c, u64 gpa)
{
    struct cpu *p = cpu_of(c);
    p->protected_all += gpa == PROTECT_ALL;
    for (unsigned i = 0; i < PAGES; i++)
        if (gpa == PROTECT_ALL || gpa == i * PAGE_SIZE)
            p->fast[i] = false;
}

static u64 load(struct fixture *f, u64 gpa)
{
    return __atomic_load_n((u64 *)(void *)ram_hva(&f->ram, gpa), __ATOMIC_RELAXED);
}

static void store(struct fixture *f, u64 gpa, u64 val)
{
    __atomic_store_n((u64 *)(void *)ram_hva(&f->ram, gpa), val, __ATOMIC_RELAXED);
}

static struct copy *translate(struct cpu *p, u64 gpa, unsigned words)
{
    struct copy *t = p->copy;
    while (t < p->copy + COPIES && t->words)
        t++;
    if (t == p->copy + COPIES)
        t = &p->copy[gpa / 8 % COPIES];
    *t = (struct copy){ .gpa = gpa, .words = words };
    for (unsigned i = 0; i < words; i++)
        t->word[i] = load(p->f, gpa + 8 * i);
    return t;
}

static void run_all(struct cpu *p)
{
    for (unsigned i = 0; i < COPIES; i++)
        for (unsigned j = 0; j < p->copy[i].words; j++) {
            p->ran++;
            if (load(p->f, p->copy[i].gpa + 8 * j) != p->copy[i].word[j])
                atomic_fetch_add(&p->f->stale, 1);
        }
}

static void kick(struct vcpu *v)
{
    atomic_fetch_add(&container_of(v, struct cpu, v)->f->kicks, 1);
}

/* ---- the machine ---- */
static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    f->engine = interp_engine;
    f->engine.kick = kick;
    pthread_mutex_init(&f->device, NULL);
    f->m = (struct machine){ .ram = &f->ram, .engine = &f->engine, .vcpus = CPUS, .vcpu = f->vcpus, .split_lock = PTHREAD_MUTEX_INITIALIZER };
    assert_int_equal(ram_init(&f->ram), 0);
    assert_int_equal(ram_add(&f->ram, 0, PAGES * PAGE_SIZE), 0);
    assert_int_equal(cpuid_policy_new(CPUS, 1000000, &f->m.cpuid), 0);
    assert_int_equal(f->engine.machine_open(&f->m), 0);
    for (unsigned i = 0; i < CPUS; i++) {
        struct cpu *p = f->cpu[i] = aligned_alloc(64, ALIGN_UP(sizeof *p, 64));
        memset(p, 0, sizeof *p);
        p->f = f;
        p->v.m = &f->m;
        p->v.id = i;
        p->seed = i + 1;
        f->vcpus[i] = &p->v;
        assert_int_equal(f->engine.vcpu_open(&p->v), 0);
        icpu(f, i)->bt.invalidate = invalidate;
        icpu(f, i)->bt.protect = protect;
    }
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < CPUS; i++) {
        f->engine.vcpu_close(&f->cpu[i]->v);
        free(f->cpu[i]);
    }
    f->engine.machine_close(&f->m);
    assert_null(f->ram.on_begin_write);
    cpuid_policy_free(f->m.cpuid);
    ram_close(&f->ram);
    free(f);
    return 0;
}

/* As if all that was written so often were long ago. */
static void forgive(struct fixture *f)
{
    for (unsigned i = 0; i < PAGES; i++) {
        _Atomic u64 *word = &codepage_at(f->m.engine_data, i * PAGE_SIZE)->word;
        u64 old = atomic_load(word), new;
        do
            new = (old & CODEPAGE_STATE) == PAGE_VOLATILE ? old & ~0xfffull : old & ~0xffcull;
        while (!atomic_compare_exchange_weak(word, &old, new));
    }
}

/* ---- step by step ---- */
/* Of anything in gpa's page. */
static enum code_page use(struct icpu *c, u64 gpa)
{
    return codepage_use(c, gpa & PAGE_MASK, PAGE_SIZE);
}

static void claims(void **state)
{
    struct fixture *f = *state;
    struct icpu *a = icpu(f, 0), *b = icpu(f, 1);
    codepage_enter(a);
    assert_false(codepage_is_code(a, 0x1000));
    assert_int_equal(use(a, 0x1008), CODE_OK);            /* nobody else is inside */
    assert_true(codepage_is_code(a, 0x1fff));
    assert_false(codepage_is_code(a, 0x2000));
    codepage_enter(b);
    f->cpu[1]->fast[2] = true;
    assert_int_equal(use(a, 0x2000), CODE_WAIT);
    assert_int_equal(f->kicks, 0);
    assert_int_equal(use(a, 0x2000), CODE_WAIT);          /* asked again: now b is made to look */
    assert_int_equal(use(a, 0x2000), CODE_WAIT);
    assert_int_equal(f->kicks, 1);
    assert_true(f->cpu[1]->v.events & VCPU_EV_CODE);
    assert_true(codepage_is_code(b, 0x2000));
    codepage_serve(b);
    assert_false(f->cpu[1]->fast[2]);
    assert_int_equal(use(a, 0x2000), CODE_OK);
    assert_int_equal(use(b, 0x2000), CODE_OK);
    f->cpu[1]->fast[3] = true;
    assert_int_equal(use(a, 0x3000), CODE_WAIT);
    codepage_leave(b);
    assert_int_equal(use(a, 0x3000), CODE_OK);            /* who is outside follows when it enters */
    assert_true(f->cpu[1]->fast[3]);
    codepage_enter(b);
    assert_false(f->cpu[1]->fast[3]);
    assert_int_equal(use(a, PAGES * PAGE_SIZE), CODE_COMPARE); /* no RAM */
    assert_false(codepage_is_code(a, PAGES * PAGE_SIZE));
}

static void own_stores(void **state)
{
    struct fixture *f = *state;
    struct icpu *a = icpu(f, 0);
    codepage_enter(a);
    assert_int_equal(use(a, 0x1000), CODE_OK);
    struct copy *t = translate(f->cpu[0], 0x1010, 2), *u = translate(f->cpu[0], 0x1100, 1);
    assert_false(codepage_store_begin(a, 0x1020, 8));              /* beside it */
    assert_int_equal(t->words, 2);
    assert_int_equal(use(a, 0x1000), CODE_WAIT);          /* it is being written */
    codepage_store_end(a, 0x1020, 8);
    assert_int_equal(use(a, 0x1000), CODE_OK);
    assert_false(codepage_store_begin(a, 0x101f, 1));
    codepage_store_end(a, 0x101f, 1);
    assert_int_equal(t->words, 0);
    assert_int_equal(u->words, 1);
    assert_true(codepage_is_code(a, 0x1000));
    assert_false(codepage_store_begin(a, 0x1104, 2));              /* the last one: the page is plain again */
    assert_int_equal(u->words, 0);
    assert_false(codepage_is_code(a, 0x1000));
    codepage_store_end(a, 0x1104, 2);
    assert_int_equal(use(a, 0x1000), CODE_OK);
}

/* Only stores to lines from which somebody has translated end anything or wait. */
static void lines(void **state)
{
    struct fixture *f = *state;
    struct icpu *a = icpu(f, 0), *b = icpu(f, 1);
    codepage_enter(b);
    assert_int_equal(codepage_use(b, 0x103f, 2), CODE_OK);
    assert_int_equal(codepage_use(b, 0x1fff, 1), CODE_OK);
    codepage_enter(a);
    static const struct { u64 gpa, n; } beside[] = { { 0x1080, 0xf40 }, { 0x1fbf, 1 }, { 0x1080, 1 } };
    for (unsigned i = 0; i < ARRAY_SIZE(beside); i++) {
        codepage_store_begin(a, beside[i].gpa, beside[i].n);
        codepage_store_end(a, beside[i].gpa, beside[i].n);
        assert_false(b->codepage->pending);
    }
    codepage_leave(a);
    static const struct { u64 gpa, n; } hit[] = { { 0x1000, 1 }, { 0x107f, 1 }, { 0x1fc0, 1 }, { 0x1080, 0xf80 }, { 0x1000, 0x1000 } };
    for (unsigned i = 0; i < ARRAY_SIZE(hit); i++) {
        codepage_leave(b);
        codepage_enter(a);
        codepage_store_begin(a, hit[i].gpa, hit[i].n);
        codepage_store_end(a, hit[i].gpa, hit[i].n);
        codepage_leave(a);
        assert_true(b->codepage->pending);
        codepage_enter(b);
        assert_false(b->codepage->pending);
        assert_int_equal(codepage_use(b, 0x103f, 2), CODE_OK);
        assert_int_equal(codepage_use(b, 0x1fff, 1), CODE_OK);
    }
}

static void outside_stores(void **state)
{
    struct fixture *f = *state;
    struct icpu *a = icpu(f, 0), *b = icpu(f, 1);
    u64 v = 1;
    codepage_enter(b);
    assert_int_equal(use(b, 0x1000), CODE_OK);
    struct copy *t = translate(f->cpu[1], 0x1ff8, 1), *u = translate(f->cpu[1], 0x1000, 1);
    codepage_leave(b);
    codepage_enter(a);
    codepage_store_begin(a, 0x1ffc, 4);                            /* b is outside: not waited for */
    codepage_store_end(a, 0x1ffc, 4);
    assert_int_equal(t->words, 1);
    codepage_enter(b);
    assert_int_equal(t->words, 0);
    assert_int_equal(u->words, 1);
    codepage_leave(b);
    assert_int_equal(ram_write(&f->ram, 0xffe, &v, 8), 0);         /* into two pages, from this thread, on which a is inside */
    codepage_enter(b);
    assert_int_equal(u->words, 0);
    assert_true(codepage_is_code(a, 0x1000));                      /* b was asleep when the page was written */
    codepage_leave(b);
    assert_int_equal(ram_write(&f->ram, 0x1500, &v, 8), 0);
    assert_false(codepage_is_code(a, 0x1000));

    assert_int_equal(use(a, 0x1000), CODE_OK);
    assert_int_equal(use(a, 0x2000), CODE_OK);
    t = translate(f->cpu[0], 0x1800, 1);
    ram_begin_write(&f->ram, 0x1800, 0x1000);                      /* a device's request, in flight */
    assert_int_equal(t->words, 0);
    assert_int_equal(use(a, 0x1000), CODE_WAIT);
    assert_int_equal(use(a, 0x2000), CODE_WAIT);
    ram_begin_write(&f->ram, 0x1900, 1);
    ram_end_write(&f->ram, 0x1800, 0x1000);
    assert_int_equal(use(a, 0x1000), CODE_WAIT);
    assert_int_equal(use(a, 0x2000), CODE_OK);
    ram_end_write(&f->ram, 0x1900, 1);
    assert_int_equal(use(a, 0x1000), CODE_OK);
    t = translate(f->cpu[0], 0x1800, 1);
    ram_end_write(&f->ram, 0x1000, PAGE_SIZE);                     /* one that began before there was this engine */
    assert_int_equal(t->words, 0);
    assert_int_equal(use(a, 0x1000), CODE_OK);
    ram_begin_write(&f->ram, 15 * PAGE_SIZE, ~0ull - 15 * PAGE_SIZE); /* beyond the RAM */
    ram_end_write(&f->ram, 15 * PAGE_SIZE, ~0ull - 15 * PAGE_SIZE);
    ram_begin_write(&f->ram, ~0ull, 1);
    ram_end_write(&f->ram, ~0ull, 1);
}

/* Stores beside a translation until the page is dropped; how many. */
static unsigned stores_until_data(struct icpu *a, u64 gpa)
{
    for (unsigned i = 1; i < 1000; i++) {
        bool data = codepage_store_begin(a, gpa, 1);
        codepage_store_end(a, gpa, 1);
        if (data)
            return i;
    }
    return 0;
}

static void written_over_and_over(void **state)
{
    struct fixture *f = *state;
    struct icpu *a = icpu(f, 0), *b = icpu(f, 1);
    struct timespec wait = { .tv_nsec = 300000000 };
    codepage_enter(b);
    codepage_leave(b);
    codepage_enter(a);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(use(a, 0x1000), CODE_OK);
        struct copy *t = translate(f->cpu[0], 0x1800, 1);
        assert_int_equal(stores_until_data(a, 0x1000), 32);
        assert_int_equal(t->words, 0);
        assert_false(codepage_is_code(a, 0x1000));
    }
    assert_int_equal(use(a, 0x1000), CODE_OK);
    translate(f->cpu[0], 0x1800, 1);
    assert_int_equal(stores_until_data(a, 0x1000), 32);
    assert_int_equal(codepage_state(a, 0x1000), PAGE_VOLATILE);
    assert_int_equal(use(a, 0x1000), CODE_COMPARE);
    assert_int_equal(stores_until_data(a, 0x1000), 1);
    struct copy *t = translate(f->cpu[0], 0x1800, 1);
    codepage_revisit(a);
    assert_int_equal(t->words, 1);
    nanosleep(&wait, NULL);                                        /* more than a tick of any processor's counter: 2^28 at 1 GHz and more */
    codepage_revisit(a);
    assert_int_equal(t->words, 0);
    assert_int_equal(use(a, 0x1000), CODE_OK);
    t = translate(f->cpu[0], 0x1800, 1);
    assert_int_equal(stores_until_data(a, 0x1000), 32);            /* at once volatile again, and for longer */
    assert_int_equal(use(a, 0x1000), CODE_COMPARE);
    /* Code that is made, run and overwritten, with nothing else in its page: the same end. */
    unsigned rounds = 0;
    while (use(a, 0x2000) == CODE_OK && rounds++ < 100) {
        translate(f->cpu[0], 0x2000, 1);
        codepage_store_begin(a, 0x2000, 1);
        codepage_store_end(a, 0x2000, 1);
    }
    assert_in_range(rounds, 8, 32);
    /* A sleeper's translations do not keep a page of data slow. */
    codepage_leave(a);
    codepage_enter(b);
    assert_int_equal(use(b, 0x3000), CODE_OK);
    translate(f->cpu[1], 0x3000, 1);
    codepage_leave(b);
    codepage_enter(a);
    assert_int_equal(stores_until_data(a, 0x3100), 32);
    assert_int_equal(codepage_state(a, 0x3000), PAGE_PLAIN);
}

static void falling_behind(void **state)
{
    struct fixture *f = *state;
    struct icpu *a = icpu(f, 0), *b = icpu(f, 1);
    codepage_enter(b);
    for (unsigned i = 0; i < PAGES; i++) {
        f->cpu[1]->fast[i] = true;
        assert_int_equal(use(b, i * PAGE_SIZE), CODE_OK);
        translate(f->cpu[1], i * PAGE_SIZE + 0x800, 1);
        translate(f->cpu[1], i * PAGE_SIZE + 0x900, 1);
    }
    codepage_leave(b);
    codepage_enter(a);
    unsigned before = f->cpu[1]->everything;
    for (unsigned i = 0; i < PAGES; i += 2) {                      /* few enough to be followed one by one */
        codepage_store_begin(a, i * PAGE_SIZE + 0x800, 1);
        codepage_store_end(a, i * PAGE_SIZE + 0x800, 1);
    }
    codepage_enter(b);
    assert_int_equal(f->cpu[1]->everything, before);
    for (unsigned i = 0; i < COPIES; i++)
        assert_false(f->cpu[1]->copy[i].words && f->cpu[1]->copy[i].gpa % 0x2000 == 0x800);
}

/* A page claimed and emptied n times, then claimed. */
static void claim_often(struct fixture *f, struct icpu *a, u64 gpa, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        assert_int_equal(use(a, gpa), CODE_OK);
        codepage_store_begin(a, gpa, 1);
        codepage_store_end(a, gpa, 1);
        assert_false(codepage_is_code(a, gpa));
        if (i % 2)
            forgive(f);
    }
    assert_int_equal(use(a, gpa), CODE_OK);
}

static void many_claims(void **state)
{
    static const struct { unsigned pages, times, all; } round[] = { { 3, 2, 0 }, { PAGES, 3, 0 }, { 1, CODEPAGE_CLAIMS + 10, 1 } };
    struct fixture *f = *state;
    struct icpu *a = icpu(f, 0), *b = icpu(f, 1);
    codepage_enter(a);
    for (unsigned r = 0; r < ARRAY_SIZE(round); r++) {
        codepage_enter(b);
        memset(f->cpu[1]->fast, 1, sizeof f->cpu[1]->fast);
        codepage_leave(b);
        f->cpu[1]->protected_all = 0;
        for (unsigned i = 0; i < round[r].pages; i++)
            claim_often(f, a, i * PAGE_SIZE, round[r].times);
        codepage_enter(b);
        assert_int_equal(f->cpu[1]->protected_all, round[r].all);
        for (unsigned i = 0; i < PAGES; i++)
            assert_int_equal(f->cpu[1]->fast[i], i >= round[r].pages && !round[r].all);
        codepage_leave(b);
        for (unsigned i = 0; i < PAGES; i++) {
            codepage_store_begin(a, i * PAGE_SIZE, PAGE_SIZE);
            codepage_store_end(a, i * PAGE_SIZE, PAGE_SIZE);
        }
        forgive(f);
    }
}

/* More requests than are kept: a RAM of more pages than that. */
static void everything(void **state)
{
    struct fixture *f = *state;
    struct icpu *a, *b;
    assert_int_equal(ram_add(&f->ram, GiB, 200 * PAGE_SIZE), 0);
    a = icpu(f, 0);
    b = icpu(f, 1);
    assert_int_equal(codepage_ram_changed(a), 0);
    assert_int_equal(codepage_ram_changed(b), 0);
    codepage_enter(b);
    for (unsigned i = 0; i < 200; i++)
        assert_int_equal(use(b, GiB + i * PAGE_SIZE), CODE_OK);
    translate(f->cpu[1], GiB, 1);
    codepage_leave(b);
    codepage_enter(a);
    unsigned before = f->cpu[1]->everything;
    ram_begin_write(&f->ram, GiB + PAGE_SIZE, 199 * PAGE_SIZE);    /* one range */
    ram_end_write(&f->ram, GiB + PAGE_SIZE, 199 * PAGE_SIZE);
    codepage_leave(a);
    codepage_enter(b);
    assert_int_equal(f->cpu[1]->everything, before);
    for (unsigned i = 0; i < 200; i++)
        assert_int_equal(use(b, GiB + i * PAGE_SIZE), CODE_OK);
    codepage_leave(b);
    for (unsigned i = 0; i < 200; i += 3) {
        ram_begin_write(&f->ram, GiB + i * PAGE_SIZE, 1);
        ram_end_write(&f->ram, GiB + i * PAGE_SIZE, 1);
    }
    codepage_enter(b);
    assert_int_equal(f->cpu[1]->everything, before + 1);
    assert_int_equal(f->cpu[1]->copy[0].words, 0);
    u64 epoch = f->ram.epoch;
    ram_clear(&f->ram);
    assert_true(f->ram.epoch != epoch);
}

/* ---- threads ---- */
static u64 rnd(u64 *seed, u64 n)
{
    *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
    return (*seed >> 33) % n;
}

static void slow_store(struct cpu *p, u64 gpa, u64 val)
{
    struct icpu *c = p->v.engine_data;
    bool code = codepage_is_code(c, gpa);
    if (code)
        codepage_store_begin(c, gpa, 8);
    store(p->f, gpa, val);
    if (code)
        codepage_store_end(c, gpa, 8);
    p->stored += code;
}

static void dma(struct fixture *f, u64 *seed)
{
    u64 len = 8 + 8 * rnd(seed, 1100), gpa = 8 * rnd(seed, (PAGES * PAGE_SIZE - len) / 8);
    ram_begin_write(&f->ram, gpa, len);
    for (u64 at = gpa; at < gpa + len; at += 8)
        store(f, at, rnd(seed, ~0ull));
    ram_end_write(&f->ram, gpa, len);
}

static void one_step(struct cpu *p)
{
    struct fixture *f = p->f;
    struct icpu *c = p->v.engine_data;
    unsigned page = (unsigned)rnd(&p->seed, PAGES), words = 1 + (unsigned)rnd(&p->seed, 4);
    u64 gpa = page * PAGE_SIZE + 8 * rnd(&p->seed, 512 - words);
    switch (rnd(&p->seed, 64)) {
    case 0:
        codepage_leave(c);
        pthread_mutex_lock(&f->device);
        if (!rnd(&p->seed, 4))
            dma(f, &p->seed);
        pthread_mutex_unlock(&f->device);
        codepage_enter(c);
        break;
    case 1:
        codepage_leave(c);
        pthread_mutex_lock(&f->m.split_lock);
        codepage_enter(c);
        slow_store(p, gpa, p->seed);
        pthread_mutex_unlock(&f->m.split_lock);
        break;
    case 2 ... 5: slow_store(p, gpa, p->seed); break;
    case 6 ... 25:
        switch (codepage_use(c, gpa, 8 * words)) {
        case CODE_OK: translate(p, gpa, words); p->ok++; break;
        case CODE_WAIT: p->wait++; break;
        case CODE_COMPARE: p->compare++; break;
        }
        break;
    case 26 ... 45:
        if (!p->fast[page] && !codepage_is_code(c, gpa))
            p->fast[page] = true;                                  /* a TLB entry is filled */
        if (p->fast[page])
            store(f, gpa, p->seed);
        break;
    default: run_all(p); break;
    }
}

static u64 now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

static void *vcpu_thread(void *arg)
{
    struct cpu *p = arg;
    struct icpu *c = p->v.engine_data;
    codepage_enter(c);
    while (!atomic_load_explicit(&p->f->stop, memory_order_relaxed)) {
        if (atomic_load(&p->v.events) & VCPU_EV_CODE) {
            atomic_fetch_and(&p->v.events, ~(u32)VCPU_EV_CODE);
            codepage_serve(c);
        }
        if (c->codepage->revisits)
            codepage_revisit(c);
        one_step(p);
    }
    codepage_leave(c);
    return NULL;
}

static void *device_thread(void *arg)
{
    struct fixture *f = arg;
    struct timespec pause = { .tv_nsec = 50000 };
    u64 seed = 99;
    while (!atomic_load_explicit(&f->stop, memory_order_relaxed)) {
        pthread_mutex_lock(&f->device);
        dma(f, &seed);
        pthread_mutex_unlock(&f->device);
        f->wrote++;
        nanosleep(&pause, NULL);
    }
    return NULL;
}

static void hammer(void **state)
{
    struct fixture *f = *state;
    struct timespec pause = { .tv_nsec = 1000000 };
    pthread_t thread[CPUS + 1];
    u64 end = now() + HAMMER_NS;
    alarm(60);                                                     /* a deadlock is a failure, too */
    for (unsigned i = 0; i < CPUS; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, vcpu_thread, f->cpu[i]), 0);
    assert_int_equal(pthread_create(&thread[CPUS], NULL, device_thread, f), 0);
    while (now() < end) {
        nanosleep(&pause, NULL);
        forgive(f);
    }
    atomic_store(&f->stop, true);
    for (unsigned i = 0; i <= CPUS; i++)
        pthread_join(thread[i], NULL);
    alarm(0);
    for (unsigned i = 0; i < CPUS; i++) {
        struct cpu *p = f->cpu[i];
        print_message("vCPU %u: ok %llu wait %llu compare %llu words run %llu slow stores %llu, waits for others %llu, drops %llu\n", i, (unsigned long long)p->ok,
                      (unsigned long long)p->wait, (unsigned long long)p->compare, (unsigned long long)p->ran, (unsigned long long)p->stored,
                      (unsigned long long)p->v.count[COUNT_CODE_WRITE_WAIT], (unsigned long long)p->v.count[COUNT_CODE_PAGE_DROPPED]);
        assert_true(p->ok > 100 && p->ran > 1000 && p->stored > 10);
    }
    print_message("writes of the device %llu, kicks %llu\n", (unsigned long long)f->wrote, (unsigned long long)f->kicks);
    assert_true(f->wrote > 10);
    assert_int_equal(f->stale, 0);
}

/* ---- what it costs: codepage_test --cost ---- */
#define COST_ROUNDS 200000u
static void cost(const char *what, u64 since, u64 n)
{
    printf("%-60s %8.1f ns\n", what, (double)(now() - since) / (double)n);
}

static void *follower(void *arg)
{
    struct cpu *p = arg;
    struct icpu *c = p->v.engine_data;
    codepage_enter(c);
    use(c, 0);
    translate(p, 0x800, 1);
    while (!atomic_load_explicit(&p->f->stop, memory_order_relaxed))
        if (atomic_load_explicit(&p->v.events, memory_order_relaxed)) {
            atomic_fetch_and(&p->v.events, ~(u32)VCPU_EV_CODE);
            codepage_serve(c);
        }
    codepage_leave(c);
    return NULL;
}

static void costs(struct fixture *f)
{
    struct icpu *a = icpu(f, 0);
    u64 t, claimed = 0, v = 0;
    pthread_t other;

    t = now();
    for (unsigned i = 0; i < COST_ROUNDS; i++) {
        codepage_enter(a);
        codepage_leave(a);
    }
    cost("enter and leave", t, COST_ROUNDS);
    codepage_enter(a);
    for (unsigned i = 0; i < COST_ROUNDS / 10; i++) {
        t = now();
        use(a, 0x1000);
        claimed += now() - t;
        codepage_store_begin(a, 0x1000, 1);
        codepage_store_end(a, 0x1000, 1);
        forgive(f);
    }
    printf("%-60s %8.1f ns\n", "claim, all others outside (with two looks at the clock)", (double)claimed / (COST_ROUNDS / 10));
    use(a, 0x1000);
    t = now();
    for (unsigned i = 0; i < COST_ROUNDS; i++)
        use(a, 0x1000);
    cost("use of a page that is code", t, COST_ROUNDS);
    t = now();
    for (unsigned i = 0; i < COST_ROUNDS; i++)
        ram_write(&f->ram, 0x2000, &v, 8);
    cost("ram_write() of 8 bytes, data", t, COST_ROUNDS);
    t = now();
    for (unsigned i = 0; i < COST_ROUNDS / 10; i++) {
        ram_begin_write(&f->ram, 0x2000, 8 * PAGE_SIZE);
        ram_end_write(&f->ram, 0x2000, 8 * PAGE_SIZE);
    }
    cost("begin and end of DMA, per page of data", t, COST_ROUNDS / 10 * 8);
    codepage_leave(a);
    assert_int_equal(pthread_create(&other, NULL, follower, f->cpu[1]), 0);
    while (!atomic_load(&codepage_at(f->m.engine_data, 0)->holders))
        ;
    codepage_enter(a);
    t = now();
    for (unsigned i = 0; i < COST_ROUNDS / 10; i++) {
        codepage_store_begin(a, 0, 1);
        codepage_store_end(a, 0, 1);
        if (i % 16 == 15)
            forgive(f);
    }
    cost("store beside another vCPU's code, which looks at once", t, COST_ROUNDS / 10);
    atomic_store(&f->stop, true);
    pthread_join(other, NULL);
    use(a, 0);
    translate(f->cpu[0], 0x900, 1);
    t = now();
    for (unsigned i = 0; i < COST_ROUNDS; i++) {
        codepage_store_begin(a, 0, 1);
        codepage_store_end(a, 0, 1);
        if (i % 16 == 15)
            forgive(f);
    }
    cost("store beside own code", t, COST_ROUNDS);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--cost")) {
        void *f;
        setup(&f);
        costs(f);
        return teardown(&f);
    }
    const struct CMUnitTest tests[] = {
        TEST(claims), TEST(own_stores), TEST(lines), TEST(outside_stores), TEST(written_over_and_over), TEST(falling_behind), TEST(many_claims), TEST(everything), TEST(hammer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
