/* Looking before sleeping (see spin.h). */
#define _GNU_SOURCE
#include "base/spin.h"

#include <time.h>

#define ENOUGH 8u                                                  /* short waits before it looks, */
#define MOST 32u                                                   /* and how many are remembered */
#define VAIN 8u                                                    /* what looking in vain takes away: one in so many waits at most, then */

u64 spin_clock(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000u + (u64)t.tv_nsec;
}

bool spin_pays(const struct spin *s)
{
    return s->credit >= ENOUGH;
}

bool spin_look(struct spin *s, bool (*come)(void *arg), void *arg)
{
    u64 end = spin_clock() + SPIN_NS;

    do {
        for (unsigned i = 0; i < 16; i++) {
            if (come(arg)) {
                s->credit = MIN(s->credit + 1, MOST);
                return true;
            }
            __builtin_ia32_pause();
        }
    } while (spin_clock() < end);
    s->credit -= MIN(s->credit, VAIN);
    return false;
}

void spin_slept(struct spin *s, u64 ns)
{
    if (ns < SPIN_NS)
        s->credit = MIN(s->credit + 1, MOST);
    else
        s->credit -= MIN(s->credit, 1u);
}
