/*
 * Guest time: offsets to the host's clocks, and a heap of timers behind one timerfd.
 *
 *   running: clock_ns  = CLOCK_MONOTONIC - ns_offset          paused: clock_ns  = ns_frozen
 *            clock_tsc = host TSC        - tsc_offset                 clock_tsc = tsc_frozen
 *
 * The two run side by side: CLOCK_MONOTONIC is slewed by NTP, the TSC is not. Conversions therefore start from a fresh pair of readings, so
 * that their error grows with the distance from now and not with the age of the machine.
 *
 * Locking: `lock` guards the heap, the timerfd's setting and changes of the offsets; it is the last in the lock order. Readers of the offsets
 * take none: `seq` is odd while they change, and readers try again (a sequence lock).
 *
 * The frequency of the TSC comes from, in this order: CPUID 0x15 where it names the crystal's frequency (SDM vol. 3B 19.7.3); the hypervisor's
 * timing leaf 0x40000010, kHz in EAX, when doppel's host is itself a guest; else a measurement against CLOCK_MONOTONIC (a few ppm; it takes 20 ms).
 */
#include "base/clock.h"

#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "base/err.h"

#define NS_PER_S 1000000000ull
#define NEVER UINT64_MAX

struct clock {
    struct loop *loop;
    struct loop_fd watch;                                          /* of the timerfd */
    u64 tsc_khz;

    _Atomic u32 seq;
    _Atomic bool paused;
    _Atomic u64 ns_offset, tsc_offset, ns_frozen, tsc_frozen;

    pthread_mutex_t lock;
    struct timer **heap;                                           /* heap[0] is the earliest */
    int n, cap;
    u64 programmed_ns;                                             /* what the timerfd is set to, NEVER when disarmed; at most heap[0]'s deadline */
};

static u64 host_ns(clockid_t id)
{
    struct timespec ts;

    clock_gettime(id, &ts);
    return (u64)ts.tv_sec * NS_PER_S + (u64)ts.tv_nsec;
}

u64 clock_wall_ns(void)
{
    return host_ns(CLOCK_REALTIME);
}

/* ---- the TSC's frequency ---- */

struct pair {
    u64 ns, tsc;
};

/* The host's clocks at one moment: of a few attempts the one that was least disturbed. */
static struct pair host_pair(int attempts)
{
    struct pair best = { 0 };
    u64 best_width = UINT64_MAX;

    while (attempts--) {
        u64 before = __rdtsc(), ns = host_ns(CLOCK_MONOTONIC), after = __rdtsc();

        if (after - before < best_width) {
            best_width = after - before;
            best = (struct pair){ ns, before + best_width / 2 };
        }
    }
    return best;
}

static u64 tsc_khz_measure(void)
{
    struct timespec nap = { .tv_nsec = 20 * 1000 * 1000 };
    struct pair a = host_pair(16), b;

    nanosleep(&nap, NULL); /* cut short by a signal it is less exact, not wrong, unless it was very short */
    do
        b = host_pair(16);
    while (b.ns - a.ns < 5 * 1000 * 1000);
    return (u64)((u128)(b.tsc - a.tsc) * 1000000 / (b.ns - a.ns));
}

static u64 tsc_khz_host(void)
{
    u32 a, b, c, d, max = __get_cpuid_max(0, NULL);

    if (max >= 0x15) {
        __cpuid_count(0x15, 0, a, b, c, d);
        if (a && b && c)
            return (u64)c * b / a / 1000;
    }
    __cpuid(1, a, b, c, d);
    if (c & (1u << 31)) { /* a hypervisor is present */
        __cpuid(0x40000000, max, b, c, d);
        if (max >= 0x40000010 && max < 0x40010000) {
            __cpuid(0x40000010, a, b, c, d);
            if (a)
                return a;
        }
    }
    return tsc_khz_measure();
}

/* ---- time ---- */

static struct pair now(const struct clock *c)
{
    struct pair p;
    u32 seq;

    do {
        while ((seq = atomic_load_explicit(&c->seq, memory_order_acquire)) & 1)
            ;
        if (atomic_load_explicit(&c->paused, memory_order_relaxed)) {
            p.ns = atomic_load_explicit(&c->ns_frozen, memory_order_relaxed);
            p.tsc = atomic_load_explicit(&c->tsc_frozen, memory_order_relaxed);
        } else {
            p.tsc = __rdtsc() - atomic_load_explicit(&c->tsc_offset, memory_order_relaxed);
            p.ns = host_ns(CLOCK_MONOTONIC) - atomic_load_explicit(&c->ns_offset, memory_order_relaxed);
        }
        atomic_thread_fence(memory_order_acquire);
    } while (atomic_load_explicit(&c->seq, memory_order_relaxed) != seq);
    return p;
}

u64 clock_ns(const struct clock *c)
{
    return now(c).ns;
}

u64 clock_tsc(const struct clock *c)
{
    u64 tsc;
    u32 seq;

    do {
        while ((seq = atomic_load_explicit(&c->seq, memory_order_acquire)) & 1)
            ;
        if (atomic_load_explicit(&c->paused, memory_order_relaxed))
            tsc = atomic_load_explicit(&c->tsc_frozen, memory_order_relaxed);
        else
            tsc = __rdtsc() - atomic_load_explicit(&c->tsc_offset, memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire);
    } while (atomic_load_explicit(&c->seq, memory_order_relaxed) != seq);
    return tsc;
}

u64 clock_tsc_bias(const struct clock *c)
{
    return -atomic_load_explicit(&c->tsc_offset, memory_order_relaxed);
}

u64 clock_tsc_khz(const struct clock *c)
{
    return c->tsc_khz;
}

/* from + distance * mul / div, with the distance signed (to - at), saturating at both ends of u64. */
static u64 project(u64 from, u64 to, u64 at, u64 mul, u64 div)
{
    u128 d;

    if (to >= at) {
        d = (u128)(to - at) * mul / div;
        return d > UINT64_MAX - from ? UINT64_MAX : from + (u64)d;
    }
    d = (u128)(at - to) * mul / div;
    return d > from ? 0 : from - (u64)d;
}

u64 clock_tsc_to_ns(const struct clock *c, u64 guest_tsc)
{
    struct pair p = now(c);

    return project(p.ns, guest_tsc, p.tsc, 1000000, c->tsc_khz);
}

u64 clock_ns_to_tsc(const struct clock *c, u64 ns)
{
    struct pair p = now(c);

    return project(p.tsc, ns, p.ns, c->tsc_khz, 1000000);
}

/* ---- the timerfd; under the lock ---- */

static void program(struct clock *c, u64 deadline_ns)
{
    struct itimerspec it = { 0 };

    if (deadline_ns != NEVER) {
        u64 host = atomic_load(&c->ns_offset);

        host = deadline_ns > (u64)INT64_MAX - host ? (u64)INT64_MAX : host + deadline_ns;
        it.it_value.tv_sec = (time_t)(host / NS_PER_S);
        it.it_value.tv_nsec = (long)(host % NS_PER_S);
        if (!host)
            it.it_value.tv_nsec = 1; /* all zero would disarm it */
    }
    bug_on(timerfd_settime(c->watch.fd, TFD_TIMER_ABSTIME, &it, NULL) < 0);
    c->programmed_ns = deadline_ns;
}

/*
 * A deadline that moves away leaves the timerfd as it is: it fires once too early, finds nothing due, and is set again. A guest that
 * re-arms its tick thousands of times a second then costs no system call each time.
 */
static void program_earlier(struct clock *c)
{
    if (c->n && !atomic_load(&c->paused) && c->heap[0]->deadline_ns < c->programmed_ns)
        program(c, c->heap[0]->deadline_ns);
}

/* ---- the heap; under the lock ---- */

static void heap_put(struct clock *c, int slot, struct timer *t)
{
    c->heap[slot] = t;
    t->slot = slot;
}

static void heap_sift(struct clock *c, int slot, struct timer *t)
{
    while (slot && c->heap[(slot - 1) / 2]->deadline_ns > t->deadline_ns) {
        heap_put(c, slot, c->heap[(slot - 1) / 2]);
        slot = (slot - 1) / 2;
    }
    for (;;) {
        int child = 2 * slot + 1;

        if (child >= c->n)
            break;
        if (child + 1 < c->n && c->heap[child + 1]->deadline_ns < c->heap[child]->deadline_ns)
            child++;
        if (c->heap[child]->deadline_ns >= t->deadline_ns)
            break;
        heap_put(c, slot, c->heap[child]);
        slot = child;
    }
    heap_put(c, slot, t);
}

static void heap_remove(struct clock *c, struct timer *t)
{
    int slot = t->slot;
    struct timer *filler = c->heap[--c->n];

    t->slot = -1;
    if (filler != t)
        heap_sift(c, slot, filler);
}

/* ---- timers ---- */

void timer_init(struct timer *t, struct clock *c, void (*fn)(void *arg), void *arg)
{
    *t = (struct timer){ .clock = c, .fn = fn, .arg = arg, .slot = -1 };
}

void timer_arm(struct timer *t, u64 deadline_ns)
{
    struct clock *c = t->clock;

    pthread_mutex_lock(&c->lock);
    t->deadline_ns = deadline_ns;
    if (t->slot < 0) {
        if (c->n == c->cap) {
            int cap = c->cap ? 2 * c->cap : 64;
            struct timer **heap = realloc(c->heap, (size_t)cap * sizeof(*heap));

            bug_on(!heap); /* bounded by the number of timers that exist: a few KiB */
            c->heap = heap;
            c->cap = cap;
        }
        t->slot = c->n++;
    }
    heap_sift(c, t->slot, t);
    program_earlier(c);
    pthread_mutex_unlock(&c->lock);
}

void timer_disarm(struct timer *t)
{
    struct clock *c = t->clock;

    pthread_mutex_lock(&c->lock);
    if (t->slot >= 0)
        heap_remove(c, t);
    pthread_mutex_unlock(&c->lock);
}

/*
 * The timerfd has fired. As many callbacks as there are timers at most: one that re-arms itself in the past must not keep the loop from its
 * other work; what is still due fires the timerfd again at once.
 */
static void fire(void *arg, u32 events UNUSED)
{
    struct clock *c = arg;
    u64 count, ns = clock_ns(c);
    ssize_t r UNUSED = read(c->watch.fd, &count, sizeof(count));

    pthread_mutex_lock(&c->lock);
    c->programmed_ns = NEVER;
    for (int budget = c->n; budget && c->n && !atomic_load(&c->paused) && c->heap[0]->deadline_ns <= ns; budget--) {
        struct timer *t = c->heap[0];
        void (*fn)(void *) = t->fn;
        void *fn_arg = t->arg;

        heap_remove(c, t);
        pthread_mutex_unlock(&c->lock);
        fn(fn_arg);
        pthread_mutex_lock(&c->lock);
    }
    program_earlier(c);
    pthread_mutex_unlock(&c->lock);
}

/* ---- life ---- */

int clock_new(struct loop *l, struct clock **out)
{
    struct clock *c = calloc(1, sizeof(*c));
    int fd, e;

    if (!c)
        return err(-ENOMEM, "clock: out of memory");
    fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0) {
        e = err(-errno, "clock: cannot make a timer: %s", strerror(errno));
        free(c);
        return e;
    }
    e = loop_fd_add(l, &c->watch, fd, EPOLLIN, fire, c);
    if (e) {
        close(fd);
        free(c);
        return e;
    }
    c->loop = l;
    c->programmed_ns = NEVER;
    pthread_mutex_init(&c->lock, NULL);
    c->tsc_khz = tsc_khz_host();

    struct pair zero = host_pair(4);
    atomic_init(&c->ns_offset, zero.ns);
    atomic_init(&c->tsc_offset, zero.tsc);
    *out = c;
    return 0;
}

void clock_free(struct clock *c)
{
    if (!c)
        return;
    loop_fd_del(&c->watch);
    close(c->watch.fd);
    pthread_mutex_destroy(&c->lock);
    free(c->heap);
    free(c);
}

static void change_begin(struct clock *c)
{
    atomic_store_explicit(&c->seq, atomic_load_explicit(&c->seq, memory_order_relaxed) + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
}

static void change_end(struct clock *c)
{
    atomic_store_explicit(&c->seq, atomic_load_explicit(&c->seq, memory_order_relaxed) + 1, memory_order_release);
}

void clock_pause(struct clock *c)
{
    pthread_mutex_lock(&c->lock);
    if (!atomic_load(&c->paused)) {
        struct pair p = host_pair(4);

        change_begin(c);
        atomic_store_explicit(&c->ns_frozen, p.ns - atomic_load(&c->ns_offset), memory_order_relaxed);
        atomic_store_explicit(&c->tsc_frozen, p.tsc - atomic_load(&c->tsc_offset), memory_order_relaxed);
        atomic_store_explicit(&c->paused, true, memory_order_relaxed);
        change_end(c);
        program(c, NEVER);
    }
    pthread_mutex_unlock(&c->lock);
}

void clock_resume(struct clock *c)
{
    pthread_mutex_lock(&c->lock);
    if (atomic_load(&c->paused)) {
        struct pair p = host_pair(4);

        change_begin(c);
        atomic_store_explicit(&c->ns_offset, p.ns - atomic_load(&c->ns_frozen), memory_order_relaxed);
        atomic_store_explicit(&c->tsc_offset, p.tsc - atomic_load(&c->tsc_frozen), memory_order_relaxed);
        atomic_store_explicit(&c->paused, false, memory_order_relaxed);
        change_end(c);
        program_earlier(c);
    }
    pthread_mutex_unlock(&c->lock);
}

void clock_state(struct clock *c, struct stream *s)
{
    u64 ns = atomic_load(&c->ns_frozen), tsc = atomic_load(&c->tsc_frozen);

    bug_on(!atomic_load(&c->paused));
    stream_section(s, "clock", 1);
    stream_u64(s, &ns);
    stream_u64(s, &tsc);
    if (s->load && !s->error && ns >= BIT(62))
        stream_bad(s, "the clock is past any machine's age");
    if (!s->load || s->error)
        return;
    pthread_mutex_lock(&c->lock);
    change_begin(c);
    atomic_store_explicit(&c->ns_frozen, ns, memory_order_relaxed);
    atomic_store_explicit(&c->tsc_frozen, tsc, memory_order_relaxed);
    change_end(c);
    pthread_mutex_unlock(&c->lock);
}
