/* Looking before sleeping (see spin.h). */
#define _GNU_SOURCE
#include "base/spin.h"

#include <sched.h>
#include <time.h>

#define ENOUGH 8u                                                  /* short waits before it looks, */
#define MOST 32u                                                   /* and how many are remembered */
#define LOST_NS 100000u                                            /* nothing that it does itself takes so long, nor do the kernel's workers for a request; */
#define LOST_TIMES 64u                                             /* after it has lost the processor, so many times as long it does not look */
#define VAIN 8u                                                    /* what looking in vain takes away: one in so many waits at most, then */

u64 spin_clock(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000u + (u64)t.tv_nsec;
}

bool spin_pays(const struct spin *s)
{
    return s->credit >= ENOUGH && (!s->not_before || spin_clock() >= s->not_before);
}

/*
 * It offers its processor to others all the while. If somebody takes it, the host is busy: a thread that sleeps is let in as soon as it is woken up, one that looks has to
 * wait for its turn. So looking may cost a small part of the time at most.
 */
bool spin_look(struct spin *s, bool (*come)(void *arg), void *arg)
{
    u64 now = spin_clock(), end = now + SPIN_NS, before;
    bool has_come;
    u64 lost = 0;

    do {
        for (unsigned i = 0; !(has_come = come(arg)) && i < 16; i++)
            __builtin_ia32_pause();
        if (has_come)
            break;
        sched_yield();
        before = now;
        now = spin_clock();
        lost = now - before;
    } while (lost < LOST_NS && now < end);
    if (has_come) {
        s->credit = MIN(s->credit + 1, MOST);
        return true;
    }
    if (lost >= LOST_NS)
        s->not_before = now + LOST_TIMES * lost;
    else
        s->credit -= MIN(s->credit, VAIN);
    return come(arg);
}

void spin_slept(struct spin *s, u64 ns)
{
    if (ns < SPIN_NS)
        s->credit = MIN(s->credit + 1, MOST);
    else
        s->credit -= MIN(s->credit, 1u);
}
