/* The sampler (sample.h). */
#define _GNU_SOURCE
#include "cpu/sample.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

struct sampler {
    struct machine *m;
    pthread_t thread;
    _Atomic bool quit;
    u64 (*hits)[WHERES];                                           /* of each vCPU */
};

static void look(struct sampler *s)
{
    for (unsigned i = 0; i < s->m->vcpus; i++)
        s->hits[i][atomic_load_explicit(&s->m->vcpu[i]->where, memory_order_relaxed)]++;
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
        look(s);
    }
    return NULL;
}

int sampler_new(struct machine *m, struct sampler **out)
{
    struct sampler *s = calloc(1, sizeof *s);
    sigset_t all, old;
    int r;
    if (s)
        s->hits = calloc(m->vcpus, sizeof *s->hits);
    if (!s || !s->hits) {
        free(s);
        return err(-ENOMEM, "no memory for statistics");
    }
    s->m = m;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    r = pthread_create(&s->thread, NULL, sampler_main, s);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r) {
        free(s->hits);
        free(s);
        return err(-r, "cannot start a thread for statistics: %s; raise the limit on processes (ulimit -u)", strerror(r));
    }
    pthread_setname_np(s->thread, "sampler");
    *out = s;
    return 0;
}

void sampler_free(struct sampler *s)
{
    if (!s)
        return;
    atomic_store(&s->quit, true);
    pthread_join(s->thread, NULL);
    free(s->hits);
    free(s);
}

u64 sampler_hits(const struct sampler *s, unsigned vcpu, enum vcpu_where w)
{
    return *(volatile const u64 *)&s->hits[vcpu][w];
}
