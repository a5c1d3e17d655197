/*
 * What kinds of block back ends have in common, for those alone: each begins with a struct block (block_file.c, ...); block.c is in front of all.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "back/block.h"

#define BLOCK_CLOSE_SECONDS 5                                      /* how long a close waits for a host that does not answer */

struct block_ops {
    /* r lies in the disk and may be what it is. True: answered at once (only if r->at_once). Else block_done() is called later. */
    bool (*submit)(struct block *b, struct block_req *r);
    bool (*try)(struct block *b, struct block_req *r);             /* optional: of a read, what needs no waiting; true: all of it */
    u64 (*time_ns)(struct block *b);                               /* optional: when the contents changed last */
    int (*size)(struct block *b, u64 *size);                       /* asks the host; err() */
    int (*grow)(struct block *b, u64 size);                        /* optional; err() */
    bool (*abandon)(struct block *b);                              /* optional: as block_abandon() */
    bool (*close)(struct block *b);                                /* as block_close(), and frees b if true */
};

struct block {
    const struct block_ops *ops;
    const char *kind;
    char *path;
    bool readonly;
    _Atomic u64 size;
    pthread_mutex_t lock;                                          /* of what follows; a leaf */
    struct block_req *held, **held_last;
    unsigned held_count;
    bool closing;                                                  /* nothing is held any more */
    void (*full)(void *arg);
    void *full_arg;
    void (*told_held)(void *arg);                                  /* set before any request, and never again */
    void *told_held_arg;
};

/* For constructors. -ENOMEM with err(). */
int block_init(struct block *b, const struct block_ops *ops, const char *kind, const char *path, bool readonly);
void block_destroy(struct block *b);                               /* of the common part */
/* Answers r (result is set), or holds it. On a thread of the back end, with no lock held. */
void block_done(struct block *b, struct block_req *r);

int block_file_open(const struct block_config *c, struct block **out);
bool block_nbd_is(const char *path);
int block_nbd_open(const struct block_config *c, struct block **out);
/* What is written to base goes to c->overlay; base is the overlay's from here on, also when an error is returned. */
int block_overlay_open(const struct block_config *c, struct block *base, struct block **out);
u64 block_time_ns(struct block *b);                                /* 0: nobody knows */
/* The descriptor of an image file or block device, locked; a negative errno with err(). */
int block_file_fd(const char *path, bool readonly, int flags);     /* flags: of open(2), more of them */
int block_file_lock(int fd, const char *path, bool readonly);

/* Helpers for requests. */
void block_consume(struct block_req *r, size_t len);               /* len bytes of a read or write are done */
int block_sync_error(int e);                                       /* of fdatasync(2): what the guest is to see */
void block_gather(const struct block_req *r, u8 *buf, size_t len); /* the next len bytes of a write; of a read: */
void block_scatter(const struct block_req *r, const u8 *buf, size_t len);

/* --- threads --- */

/* What tells that threads have ended, for who waits only for a while. */
struct block_end {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned running;
};
void block_end_init(struct block_end *e);
void block_end_destroy(struct block_end *e);
void block_end_leave(struct block_end *e);                         /* the last thing a thread does */
bool block_end_wait(struct block_end *e);                          /* true: all have left; false after BLOCK_CLOSE_SECONDS */

/* A few threads that serve requests one by one: serve() may wait. */
#define BLOCK_WORKERS 4
struct block_pool {
    struct block *b;
    int (*serve)(struct block *b, struct block_req *r);
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct block_req *first, **last;                               /* waiting, in order of submission */
    unsigned idle;
    bool closing;
    pthread_t worker[BLOCK_WORKERS];
    unsigned workers;
    struct block_end end;
};
int block_pool_open(struct block_pool *p, struct block *b, int (*serve)(struct block *b, struct block_req *r));
void block_pool_submit(struct block_pool *p, struct block_req *r);
bool block_pool_close(struct block_pool *p);                       /* as block_close(); p may be all zero */

/* --- direct access --- */

/* See block_direct.c. align 0: there is none. */
struct block_direct {
    unsigned align, mem_align;                                     /* bytes, of offsets and lengths and of buffers */
    pthread_mutex_t turn, lock;
    pthread_cond_t changed;
    unsigned shared, want_alone;                                   /* who changes something; who waits to be alone, or is */
};
int block_direct_init(struct block_direct *d, int fd, const char *path); /* err() */
void block_direct_destroy(struct block_direct *d);
bool block_direct_fits(const struct block_direct *d, const struct block_req *r);
bool block_direct_enter(struct block_direct *d);                   /* for what changes something and fits; false: a worker is to do it */
void block_direct_leave(struct block_direct *d);
/* On a worker thread; plain() does what fits. The result. */
int block_direct_serve(struct block_direct *d, int fd, struct block_req *r, struct block *b, int (*plain)(struct block *b, struct block_req *r));

/* --- io_uring --- */

/*
 * One step of a request, in terms of system calls; the same for io_uring and for threads, so that the results are looked at in one place
 * (block_file.c).
 */
struct block_step {
    enum { STEP_READV, STEP_WRITEV, STEP_WRITE, STEP_FALLOCATE, STEP_FDATASYNC, STEP_NOP } call;
    u64 offset, len;
    const struct iovec *iov;
    unsigned iovs;
    const void *buf;
    int mode;
    bool waits;                                                    /* it takes as long as the storage does */
};
struct block_ring_ops {
    void (*step)(struct block *b, struct block_req *r, struct block_step *s);
    bool (*result)(struct block *b, struct block_req *r, int res); /* of that step; true: r is done with */
};
struct block_ring;
int block_ring_open(struct block *b, int fd, const struct block_ring_ops *ops, struct block_ring **out); /* a negative errno, without err() */
void block_ring_submit(struct block_ring *g, struct block_req *r);
bool block_ring_close(struct block_ring *g);                       /* as block_close(); NULL is fine */
