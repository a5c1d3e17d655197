/*
 * Which pages of RAM hold code, for all vCPUs of a machine: translations without a comparison of their bytes are right because nobody can write to
 * their page before they are gone. Model, protocol and why nothing deadlocks: codepage.c.
 *
 * Words used here. A vCPU is *inside* while its thread may hold rights that it has looked up: a fast write entry of its TLB or shadow in use, a host
 * address of guest memory, a translation that runs. It is *outside* in everything that may block: devices and interrupt chips, the machine's split
 * lock, HLT, a pause. A *claim* makes a page code.
 */
#pragma once

#include "cpu/interp/interp.h"

enum code_page {
    CODE_OK,          /* nobody has a fast write to the page: translate, without a comparison */
    CODE_WAIT,        /* not yet, or it is being written at the moment: interpret on, ask again */
    CODE_COMPARE,     /* written over and over (or no RAM): translations compare their bytes first and end behind each op that stores (OPF_STORES) */
};

enum codepage_state { PAGE_PLAIN, PAGE_CLAIMED, PAGE_CODE, PAGE_VOLATILE };
#define CODEPAGE_STATE 3ull            /* the state's bits in codepage.word */

struct codepage {
    _Atomic u64 word;                  /* state and what decides about it: codepage.c */
    _Atomic u64 holders;               /* vCPUs that may have translations of this page, by number; each sets and clears its own bit */
    _Atomic u64 lines;                 /* which 64ths of the page these may be made from; bits stay until the page is data */
};

struct codepage_table {
    u64 pages;
    struct codepage_table *older;
    struct codepage page[];
};

#define CODEPAGE_VCPUS 64
#define CODEPAGE_REQUESTS 32           /* that a vCPU may be behind with; more: it drops everything */
#define CODEPAGE_CLAIMS 4096           /* likewise: all its fast writes */
#define CODEPAGE_REVISITS 32           /* pages with comparing translations that a vCPU tries again later */

struct codepage_range {
    u64 gpa, len;
};

/* A vCPU as the others see it. */
struct codepage_vcpu {
    struct codepages *all;
    struct icpu *c;
    u64 bit;                                                       /* in codepage.holders */
    _Atomic bool inside;
    _Atomic bool pending;                                          /* request[] or everything */
    _Atomic u64 thread;                                            /* pthread_self() of whoever is inside */
    _Atomic u64 served;                                            /* claims up to this one have been followed */
    _Atomic u64 done;                                              /* requests up to this one likewise */
    pthread_mutex_t lock;                                          /* leaf: what follows */
    u64 posted;                                                    /* requests so far */
    unsigned requests;
    bool everything;
    struct codepage_range request[CODEPAGE_REQUESTS];
    /* the vCPU's own */
    unsigned revisits;
    struct { u64 gpa, when; } revisit[CODEPAGE_REVISITS];
} __attribute__((aligned(64)));

struct codepages {
    struct machine *m;
    struct codepage_table *_Atomic table;
    u64 epoch;                                                     /* of the RAM table that it was made for */
    pthread_mutex_t lock;                                          /* leaf: claims, and making of a new table */
    _Atomic u64 head;                                              /* claims so far; the page of claim n is in claim[(n - 1) % CODEPAGE_CLAIMS] */
    _Atomic u64 claim[CODEPAGE_CLAIMS];
    _Atomic u32 waiters, change;                                   /* who waits for a vCPU, and the futex that they wait on */
    struct codepage_vcpu vcpu[CODEPAGE_VCPUS];
};

/* Engines call these from their own open and close functions; the first sets the RAM's hooks. */
int codepages_open(struct machine *m);
void codepages_close(struct machine *m);
int codepage_vcpu_open(struct icpu *c);
void codepage_vcpu_close(struct icpu *c);
int codepage_ram_changed(struct icpu *c);                          /* the RAM's epoch is a new one; the vCPU drops its translations itself */

/* ---- on the vCPU's thread ---- */
/* Inside from here on: what others have asked for meanwhile is done first. Never blocks. */
void codepage_enter(struct icpu *c);
/* Outside: before anything that may wait for another thread. */
void codepage_leave(struct icpu *c);
/* Between blocks, when VCPU_EV_CODE was set. */
void codepage_serve(struct icpu *c);
/* Now and then, between blocks, if there are any: comparing translations of pages that have been volatile for long enough are dropped. */
void codepage_revisit(struct icpu *c);
/* May n bytes of code at gpa, in one page, be translated, and how? To be asked before they are read; inside; never blocks. Between CODE_OK and the
 * moment when bt.invalidate() would find the translation there must be no codepage_serve(), _enter() or _store_begin(). */
enum code_page codepage_use(struct icpu *c, u64 gpa, u64 n);
/*
 * A store of this vCPU to [gpa, gpa + n), within one page that is code (or from which this vCPU has cached blocks) stands between these two; inside.
 * Translations that it hits are gone when the first returns, on all vCPUs. True: the page counts as data from now on, whatever is cached of it
 * should be forgotten.
 */
bool codepage_store_begin(struct icpu *c, u64 gpa, u64 n);
void codepage_store_end(struct icpu *c, u64 gpa, u64 n);

static inline struct codepage *codepage_at(struct codepages *all, u64 gpa)
{
    struct codepage_table *t = atomic_load_explicit(&all->table, memory_order_acquire);
    return gpa >> PAGE_SHIFT < t->pages ? &t->page[gpa >> PAGE_SHIFT] : NULL;
}

static inline enum codepage_state codepage_state(const struct icpu *c, u64 gpa)
{
    struct codepage *p = codepage_at(c->codepage->all, gpa);
    return p ? (enum codepage_state)(atomic_load_explicit(&p->word, memory_order_acquire) & CODEPAGE_STATE) : PAGE_PLAIN;
}

/* No fast writes to this page. What the answer allows to an inside vCPU holds until it is outside or serves. */
static inline bool codepage_is_code(const struct icpu *c, u64 gpa)
{
    enum codepage_state s = codepage_state(c, gpa);
    return s == PAGE_CODE || s == PAGE_CLAIMED;
}
