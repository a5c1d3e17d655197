/*
 * A vCPU's thread (vcpu.h). The engine runs the guest; here it is decided when it runs: held, asleep in HLT, waiting for a start-up IPI.
 *
 * Locking: `events` and `asleep` are atomics (a futex on events wakes a sleeper); hold/held/quit are under the thread's lock. Whoever raises an event
 * stores it first and looks at `asleep` afterwards; the sleeper sets `asleep` first and looks at the events afterwards, so no wake-up is lost.
 */
#define _GNU_SOURCE
#include "cpu/vcpu.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/spin.h"
#include "cpu/engine.h"
#include "cpu/pv.h"

#define APIC_PAGE 0xfee00000u          /* where it is after reset; a guest that moves it is counted as using MMIO */

struct vcpu_thread {
    pthread_t thread;
    bool started;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool hold, held, quit;
    bool dead;                     /* shut down: stands still until it is given a new state */
    _Atomic bool asleep;
    struct spin spin;
    struct vcpu_hooks hooks;
};

static struct vcpu_thread *thread_of(struct vcpu *v)
{
    return v->thread;
}

void vcpu_raise(struct vcpu *v, u32 events)
{
    struct vcpu_thread *t = thread_of(v);

    atomic_fetch_or(&v->events, events);
    if (atomic_load(&t->asleep))
        syscall(SYS_futex, &v->events, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    else if (v->m->engine->kick)
        v->m->engine->kick(v);
}

void vcpu_signal(void *vcpu, enum cpu_signal what, u8 vector)
{
    struct vcpu *v = vcpu;

    switch (what) {
    case CPU_INTR: vcpu_raise(v, VCPU_EV_INTR); break;
    case CPU_NMI: vcpu_raise(v, VCPU_EV_NMI); break;
    case CPU_INIT: vcpu_raise(v, VCPU_EV_INIT); break;
    case CPU_SIPI:
        atomic_store(&v->sipi_vector, vector);
        vcpu_raise(v, VCPU_EV_SIPI);
        break;
    case CPU_SMI: break;           /* no system-management mode: the board has no firmware that would use it */
    }
}

struct cpu_port vcpu_port(struct vcpu *v)
{
    return (struct cpu_port){ .signal = vcpu_signal, .vcpu = v, .eoi_offer = pv_eoi_offer, .eoi_done = pv_eoi_done };
}

struct awaited {
    struct vcpu *v;
    u32 mask;
};

static bool come(void *arg)
{
    const struct awaited *a = arg;

    return atomic_load_explicit(&a->v->events, memory_order_acquire) & a->mask;
}

/* Sleeps until one of the events in mask is set. While it looks for them before, it is asleep to others: nobody is to kick it. */
static void wait_events(struct vcpu *v, u32 mask)
{
    struct vcpu_thread *t = thread_of(v);
    struct awaited a = { v, mask };
    u32 seen;

    enum vcpu_where was = vcpu_where(v, WHERE_HALTED);

    atomic_store(&t->asleep, true);
    if (!come(&a) && !(spin_pays(&t->spin) && spin_look(&t->spin, come, &a))) {
        u64 since = spin_clock();
        while (!((seen = atomic_load(&v->events)) & mask))
            syscall(SYS_futex, &v->events, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        spin_slept(&t->spin, spin_clock() - since);
    }
    atomic_store(&t->asleep, false);
    vcpu_where(v, was);
}

static void handle_init_sipi(struct vcpu *v)
{
    const struct engine *e = v->m->engine;
    u32 ev = atomic_fetch_and(&v->events, ~(u32)(VCPU_EV_INIT | VCPU_EV_SIPI));

    if (!(ev & (VCPU_EV_INIT | VCPU_EV_SIPI)))
        return;
    e->get(v, &v->x);
    if (ev & VCPU_EV_INIT) {
        x86_init(&v->x);
        v->x.activity = v->id ? X86_WAIT_SIPI : X86_RUNNING;
        if (v->intc.ops)
            v->intc.ops->init(v->intc.chip);
        atomic_fetch_and(&v->events, ~(u32)(VCPU_EV_NMI | VCPU_EV_UNHALT));
    }
    if ((ev & VCPU_EV_SIPI) && v->x.activity == X86_WAIT_SIPI)
        x86_sipi(&v->x, atomic_load(&v->sipi_vector));
    e->set(v, &v->x);
}

/* Stands still while held. False: the thread is to end. */
static bool obey_hold(struct vcpu *v)
{
    struct vcpu_thread *t = thread_of(v);
    bool go;

    vcpu_where(v, WHERE_HELD);
    pthread_mutex_lock(&t->lock);
    atomic_fetch_and(&v->events, ~(u32)VCPU_EV_KICK);
    while ((t->hold || t->dead || v->debug.parked) && !t->quit) {
        t->held = true;
        pthread_cond_broadcast(&t->changed);
        pthread_cond_wait(&t->changed, &t->lock);
    }
    t->held = false;
    go = !t->quit;
    pthread_mutex_unlock(&t->lock);
    vcpu_where(v, WHERE_BOUNDARY);
    return go;
}

static void report_stop(struct vcpu *v, enum run_exit why)
{
    struct vcpu_thread *t = thread_of(v);

    pthread_mutex_lock(&t->lock);
    t->dead = true;
    pthread_mutex_unlock(&t->lock);
    t->hooks.stopped(t->hooks.arg, v, why, why == RUN_FAILED ? err_last() : "");
}

/* A step within the range that is being stepped through goes on; all else is the debugger's. */
static void report_debug(struct vcpu *v)
{
    struct vcpu_debug *d = &v->debug;

    if (d->stop == DEBUG_STEPPED && d->range_end) {
        v->m->engine->get(v, &v->x);
        if (v->x.rip >= d->range_start && v->x.rip < d->range_end) {
            d->stop = DEBUG_NONE;
            d->step = true;
            return;
        }
    }
    v->m->debug.stopped(v->m->debug.arg, v);
}

static void *vcpu_main(void *arg)
{
    struct vcpu *v = arg;
    enum run_exit why;

    while (obey_hold(v)) {
        handle_init_sipi(v);
        if (v->x.activity == X86_WAIT_SIPI) {
            wait_events(v, VCPU_EV_OUTSIDE);
            continue;
        }
        why = v->m->engine->run(v);
        if (why == RUN_HALTED)
            /* With IF clear a pending interrupt does not end the HLT: only an NMI or the outside does. */
            wait_events(v, v->x.rflags & FLAG_IF ? ~0u : ~(u32)VCPU_EV_INTR);
        else if (why == RUN_DEBUG)
            report_debug(v);
        else if (why != RUN_OUTSIDE)
            report_stop(v, why);
    }
    return NULL;
}

int vcpu_new(struct machine *m, unsigned id, const struct vcpu_hooks *hooks, struct vcpu **out)
{
    struct vcpu *v;
    struct vcpu_thread *t;
    int r;

    v = aligned_alloc(64, ALIGN_UP(sizeof *v, 64));
    t = calloc(1, sizeof *t);
    if (!v || !t) {
        free(v);
        free(t);
        return err(-ENOMEM, "vCPU %u: out of memory", id);
    }
    memset(v, 0, sizeof *v);
    v->m = m;
    v->id = id;
    v->thread = t;
    t->hooks = *hooks;
    t->hold = true;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->changed, NULL);
    x86_reset(&v->x, id == 0);
    r = bus_new(m->mmio, &v->mmio);
    if (r == 0 && (r = m->engine->vcpu_open(v)) < 0)
        bus_free(v->mmio);
    if (r < 0) {
        free(t);
        free(v);
        return r;
    }
    *out = v;
    return 0;
}

int vcpu_start(struct vcpu *v)
{
    struct vcpu_thread *t = thread_of(v);
    sigset_t all, old;
    char name[16];
    int r;

    /* Signals for the process (terminal, SIGTERM) are the main thread's. */
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    sigdelset(&all, SIGABRT);
    if (v->m->tools.profile)
        sigdelset(&all, SAMPLE_SIGNAL);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    r = pthread_create(&t->thread, NULL, vcpu_main, v);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r)
        return err(-r, "vCPU %u: cannot start a thread: %s; raise the limit on processes (ulimit -u)", v->id, strerror(r));
    snprintf(name, sizeof name, "vcpu%u", v->id);
    pthread_setname_np(t->thread, name);
    t->started = true;
    return 0;
}

int vcpu_interrupt(struct vcpu *v, int signo, void *value)
{
    struct vcpu_thread *t = thread_of(v);

    return t->started ? pthread_sigqueue(t->thread, signo, (union sigval){ .sival_ptr = value }) : -1;
}

void vcpu_free(struct vcpu *v)
{
    struct vcpu_thread *t;

    if (!v)
        return;
    t = thread_of(v);
    if (t->started) {
        pthread_mutex_lock(&t->lock);
        t->quit = true;
        pthread_cond_broadcast(&t->changed);
        pthread_mutex_unlock(&t->lock);
        vcpu_raise(v, VCPU_EV_KICK);
        pthread_join(t->thread, NULL);
    }
    v->m->engine->vcpu_close(v);
    bus_free(v->mmio);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->changed);
    free(t);
    free(v);
}

void vcpus_freeze(struct machine *m)
{
    for (unsigned i = 0; i < m->vcpus; i++) {
        struct vcpu_thread *t = thread_of(m->vcpu[i]);

        pthread_mutex_lock(&t->lock);
        t->hold = true;
        pthread_mutex_unlock(&t->lock);
        vcpu_raise(m->vcpu[i], VCPU_EV_KICK);
    }
}

void vcpus_hold(struct machine *m)
{
    vcpus_freeze(m);
    for (unsigned i = 0; i < m->vcpus; i++) {
        struct vcpu_thread *t = thread_of(m->vcpu[i]);

        pthread_mutex_lock(&t->lock);
        while (t->started && !t->held)
            pthread_cond_wait(&t->changed, &t->lock);
        pthread_mutex_unlock(&t->lock);
    }
}

void vcpus_release(struct machine *m)
{
    for (unsigned i = 0; i < m->vcpus; i++) {
        struct vcpu_thread *t = thread_of(m->vcpu[i]);

        pthread_mutex_lock(&t->lock);
        t->hold = false;
        pthread_cond_broadcast(&t->changed);
        pthread_mutex_unlock(&t->lock);
    }
}

int vcpu_get(struct vcpu *v, struct x86 *x)
{
    return v->m->engine->get(v, x);
}

void vcpu_settle(struct vcpu *v)
{
    handle_init_sipi(v);
    if (!(atomic_fetch_and(&v->events, ~(u32)VCPU_EV_UNHALT) & VCPU_EV_UNHALT))
        return;
    v->m->engine->get(v, &v->x);
    v->x.kvm_unhalted = true;
    v->m->engine->set(v, &v->x);
}

int vcpu_set(struct vcpu *v, const struct x86 *x)
{
    struct vcpu_thread *t = thread_of(v);

    atomic_fetch_and(&v->events, (u32)VCPU_EV_KICK);
    pthread_mutex_lock(&t->lock);
    t->dead = false;
    pthread_mutex_unlock(&t->lock);
    return v->m->engine->set(v, x);
}

int vcpu_reset(struct vcpu *v, const struct x86 *x)
{
    if (v->m->engine->reset)
        v->m->engine->reset(v);
    return vcpu_set(v, x);
}

const char *vcpu_count_name(enum vcpu_counted what)
{
    static const char *const name[COUNTS] = {
#define COUNT(id, group, text) [COUNT_##id] = text,
#include "cpu/count.def"
#undef COUNT
    };

    return name[what];
}

enum count_group vcpu_count_group(enum vcpu_counted what)
{
    static const u8 group[COUNTS] = {
#define COUNT(id, in, text) [COUNT_##id] = GROUP_##in,
#include "cpu/count.def"
#undef COUNT
    };

    return group[what];
}

const char *vcpu_where_name(enum vcpu_where w)
{
    static const char *const name[WHERES] = {
        [WHERE_HELD] = "held", [WHERE_HALTED] = "halted", [WHERE_BOUNDARY] = "boundary", [WHERE_INTERP] = "interpreter",
        [WHERE_TRANSLATED] = "translated", [WHERE_GUEST] = "guest", [WHERE_HANDLER] = "handlers", [WHERE_FIND] = "look-up", [WHERE_DECODE] = "decoder",
        [WHERE_TRANSLATE] = "translator", [WHERE_WALK] = "page-walk", [WHERE_SHADOW] = "shadow", [WHERE_DELIVER] = "delivery",
        [WHERE_DEVICE] = "devices", [WHERE_CHECK] = "check",
    };

    return name[w];
}

/* SDM vol. 3A table 11-6. */
void vcpu_count_apic(struct vcpu *v, unsigned reg)
{
    switch (reg) {
    case 0x0b: vcpu_count(v, COUNT_APIC_EOI); break;
    case 0x30: case 0x31: case 0x3f: vcpu_count(v, COUNT_APIC_ICR); break;
    case 0x32: case 0x38: case 0x39: case 0x3e: vcpu_count(v, COUNT_APIC_TIMER); break;
    default: vcpu_count(v, COUNT_APIC_OTHER); break;
    }
}

void vcpu_pio(struct vcpu *v, u16 port, unsigned size, bool write, u64 *val)
{
    enum vcpu_where was = vcpu_where(v, WHERE_DEVICE);

    vcpu_count(v, COUNT_PIO);
    bus_access(v->m->pio, port, size, write, val);
    vcpu_where(v, was);
    trace(v->m->trace, TRACE_PIO, (int)v->id, "%s 0x%x %s 0x%llx (%u)", write ? "out" : "in", port, write ? "<-" : "->",
          (unsigned long long)*val, size);
}

void vcpu_mmio(struct vcpu *v, u64 gpa, unsigned size, bool write, u64 *val)
{
    enum vcpu_where was = vcpu_where(v, WHERE_DEVICE);

    if ((gpa & PAGE_MASK) == APIC_PAGE)
        vcpu_count_apic(v, (unsigned)(gpa - APIC_PAGE) >> 4);
    else
        vcpu_count(v, COUNT_MMIO);
    bus_access(v->mmio, gpa, size, write, val);
    vcpu_where(v, was);
    trace(v->m->trace, TRACE_MMIO, (int)v->id, "%s 0x%llx %s 0x%llx (%u)", write ? "write" : "read", (unsigned long long)gpa,
          write ? "<-" : "->", (unsigned long long)*val, size);
}
