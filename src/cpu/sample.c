/*
 * The sampler (sample.h). The signal carries the vCPU's slot; the next one is sent when the last has been taken, so at most one is on its way, and sampler_free() can
 * wait for it. Signal disposition is per process: the handler knows nothing but the slot, and stays installed.
 */
#define _GNU_SOURCE
#include "cpu/sample.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

#include "cpu/engine.h"
#include "cpu/vcpu.h"

#define TABLE_BITS 16
#define TABLE_SIZE (1u << TABLE_BITS)
#define PROBES 64u

struct slot {
    struct sampler *sampler;
    struct vcpu *v;
    u64 hits[WHERES], left[COUNTS], ran[WHERES][2];                              /* ran: by whether it was the kernel */
    _Atomic u32 sent, taken;
    u64 lost;
    struct sampled_address *table[SAMPLED];                        /* by hash; NULL without a profile */
};

struct sampler {
    struct machine *m;
    pthread_t thread;
    _Atomic bool quit;
    unsigned slots;
    struct slot slot[];
};

/* ---- on the vCPU's thread, in a signal handler ---- */
static void note(struct slot *s, enum sampled what, u64 addr, bool direct)
{
    u32 h = (u32)((addr * 0x9e3779b97f4a7c15) >> (64 - TABLE_BITS));
    for (unsigned i = 0; i < PROBES; i++) {
        struct sampled_address *e = &s->table[what][(h + i) & (TABLE_SIZE - 1)];
        if (e->n && e->addr != addr)
            continue;
        e->addr = addr;
        e->n++;
        e->direct += direct;
        return;
    }
    s->lost++;
}

static void on_signal(int sig UNUSED, siginfo_t *si, void *ucontext)
{
    const greg_t *g = ((ucontext_t *)ucontext)->uc_mcontext.gregs;
    struct slot *s = si->si_value.sival_ptr;
    u64 pc = (u64)g[REG_RIP];
    bool direct = false;
    if (si->si_code != SI_QUEUE)                                   /* from elsewhere */
        return;
    enum vcpu_where w = atomic_load_explicit(&s->v->where, memory_order_relaxed);
    if (w != WHERE_HELD && s->v->m->engine->sample) {              /* held: another engine may be on its way */
        u64 rip = s->v->m->engine->sample(s->v, pc, &direct);
        note(s, SAMPLED_GUEST, rip, direct);
        s->ran[w][rip >> 63]++;
    }
    if (!direct)
        note(s, SAMPLED_MONITOR, pc, false);
    atomic_fetch_add(&s->taken, 1);
}

/* ---- the sampler's thread ---- */
static void look(struct slot *s)
{
    enum vcpu_where w = atomic_load_explicit(&s->v->where, memory_order_relaxed);
    s->hits[w]++;
    if (w != WHERE_HELD && w != WHERE_HALTED && w != WHERE_TRANSLATED && w != WHERE_GUEST && w != WHERE_SHADOW)
        s->left[atomic_load_explicit(&s->v->left, memory_order_relaxed)]++;
    if (!s->table[0] || w == WHERE_HELD || w == WHERE_HALTED)
        return;
    if (atomic_load(&s->sent) == atomic_load(&s->taken) && !vcpu_interrupt(s->v, SAMPLE_SIGNAL, s))
        atomic_fetch_add(&s->sent, 1);
}

static void *sampler_main(void *arg)
{
    struct sampler *s = arg;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    while (!atomic_load_explicit(&s->quit, memory_order_relaxed)) {
        t.tv_nsec += 1000000000 / SAMPLE_HZ;
        if (t.tv_nsec >= 1000000000) {
            t.tv_nsec -= 1000000000;
            t.tv_sec++;
        }
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
            ;
        for (unsigned i = 0; i < s->slots; i++)
            look(&s->slot[i]);
    }
    return NULL;
}

/* ---- life ---- */
static void sampler_release(struct sampler *s)
{
    for (unsigned i = 0; i < s->slots; i++)
        for (unsigned k = 0; k < SAMPLED; k++)
            free(s->slot[i].table[k]);
    free(s);
}

static int tables_new(struct sampler *s)
{
    struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
    for (unsigned i = 0; i < s->slots; i++)
        for (unsigned k = 0; k < SAMPLED; k++)
            if (!(s->slot[i].table[k] = calloc(TABLE_SIZE, sizeof *s->slot[i].table[k])))
                return -ENOMEM;
    sigfillset(&sa.sa_mask);
    sigaction(SAMPLE_SIGNAL, &sa, NULL);
    return 0;
}

int sampler_new(struct machine *m, bool profile, struct sampler **out)
{
    struct sampler *s = calloc(1, sizeof *s + m->vcpus * sizeof s->slot[0]);
    sigset_t all, old;
    int r;
    if (!s)
        return err(-ENOMEM, "no memory for statistics");
    s->m = m;
    s->slots = m->vcpus;
    for (unsigned i = 0; i < m->vcpus; i++) {
        s->slot[i].sampler = s;
        s->slot[i].v = m->vcpu[i];
    }
    if (profile && tables_new(s)) {
        sampler_release(s);
        return err(-ENOMEM, "no memory for a profile");
    }
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    r = pthread_create(&s->thread, NULL, sampler_main, s);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r) {
        sampler_release(s);
        return err(-r, "cannot start a thread for statistics: %s; raise the limit on processes (ulimit -u)", strerror(r));
    }
    pthread_setname_np(s->thread, "sampler");
    *out = s;
    return 0;
}

/* A signal that is on its way is taken soon: vCPU threads do not block it. */
static void wait_taken(const struct slot *s)
{
    const struct timespec ms = { .tv_nsec = 1000000 };
    while (atomic_load(&s->sent) != atomic_load(&s->taken))
        nanosleep(&ms, NULL);
}

void sampler_free(struct sampler *s)
{
    if (!s)
        return;
    atomic_store(&s->quit, true);
    pthread_join(s->thread, NULL);
    for (unsigned i = 0; i < s->slots; i++)
        wait_taken(&s->slot[i]);
    sampler_release(s);
}

u64 sampler_hits(const struct sampler *s, unsigned vcpu, enum vcpu_where w)
{
    return *(volatile const u64 *)&s->slot[vcpu].hits[w];
}

u64 sampler_left(const struct sampler *s, unsigned vcpu, enum vcpu_counted why)
{
    return *(volatile const u64 *)&s->slot[vcpu].left[why];
}

u64 sampler_ran(const struct sampler *s, unsigned vcpu, enum vcpu_where w, bool kernel)
{
    return s->slot[vcpu].ran[w][kernel];
}

const struct sampled_address *sampler_address(const struct sampler *s, unsigned vcpu, enum sampled what, unsigned n)
{
    return n < TABLE_SIZE && s->slot[vcpu].table[what] ? &s->slot[vcpu].table[what][n] : NULL;
}

u64 sampler_lost(const struct sampler *s)
{
    u64 n = 0;
    for (unsigned i = 0; i < s->slots; i++)
        n += s->slot[i].lost;
    return n;
}
