/*
 * The rows of `make bench`: small pieces of work, timed by one static program that runs on the host and in guests.
 *
 * A row is set up, run with growing counts until a run lasts long enough, and tells the median time per unit of a few
 * such runs.
 * Every run gives a result that is known beforehand, so that nothing can be left out by a compiler or done wrong by an
 * engine: a wrong result is reported instead of a time. Each row runs in a process (and process group) of its own, so
 * it takes nothing down when it is done, when it fails or when it is killed at the time limit.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a row is given; one per process. */
struct bench {
    const char *self;                                              /* this program, for exec */
    const char *data;                                              /* folder of the rows that start programs */
    int cpu[2];                                                    /* processors to be pinned to; -1: there is none */
    char skip[200];                                                /* set by a setup that returns NULL: why */
};

struct row {
    const char *name;                                              /* as given on the command line and in results */
    const char *what;                                              /* for the table */
    const char *unit;                                              /* what the time is per */
    double per_run;                                                /* units per count */
    uint64_t at_least;                                             /* counts in the first run; 0: 1 */
    void *(*setup)(struct bench *b);                               /* the row's own state, or NULL: skip */
    uint64_t (*run)(void *state, uint64_t count);                  /* the timed part */
    uint64_t (*expect)(void *state, uint64_t count);               /* what it must return; NULL: 0, no failure */
};

extern const struct row rows_cpu[], rows_mem[], rows_sys[], rows_prog[]; /* each ends with an empty name */

/* Gives up: the row is reported as failed. For a setup or a run whose system calls fail. */
void die(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
/* Memory of that size, zeroed or not yet touched; never NULL. */
void *must_map(size_t size, int flags);
/* The caller runs on one processor from now on; false if that cannot be. */
bool pin(int cpu);

/* For functions that must stay functions. With keep() inside, calls are not merged or dropped either. */
#if __has_attribute(noipa)
#define KEEP __attribute__((noinline, noipa))
#else
#define KEEP __attribute__((noinline))
#endif
static inline void keep(void)
{
    __asm__ volatile("");
}

/* splitmix64: the same pseudo-random numbers everywhere. */
static inline uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Writes the data of rows_prog into a folder: a text, and a tree of files. */
void make_data(const char *dir);
