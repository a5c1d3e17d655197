/*
 * The two directions of a descriptor that doppel did not make: standard streams, files, FIFOs, sockets.
 *
 * Such a descriptor is often shared with other processes (a terminal with the shell, a pipe with its other writers),
 * and O_NONBLOCK is a property of what they share. So a terminal or pipe is opened once more through /proc/self/fd,
 * which gives a description of our own; a socket is used with MSG_DONTWAIT; a regular file never waits. Where opening
 * again is refused (another user's terminal) the descriptor is polled before each small access.
 *
 * Locking: fdin_ready, fdout_write, fdout_wake, fdout_pending from any thread; the rest, and all callbacks, on the
 * loop's thread (or before it runs) with no lock held. end(), drained() and broken() may detach or close their own fdin
 * or fdout; data() and room() may not.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "base/loop.h"
#include "base/types.h"

enum fd_kind { FD_FILE, FD_OWN, FD_SOCKET, FD_POLLED };

/* A descriptor ready for use without waiting. */
struct fd_end {
    int fd;                                                        /* -1: none */
    enum fd_kind kind;
    bool ours;                                                     /* fd was opened here and is closed with it */
};

/* Wakes the loop for one object; unlike loop_post() nothing is left behind when the object goes. */
struct fd_waker {
    int fd;
    struct loop_fd watch;
};

struct fdin_ops {
    size_t (*room)(void *arg);                                     /* how much data() would take now */
    void (*data)(void *arg, const u8 *buf, size_t len);            /* 0 < len <= room() */
    void (*end)(void *arg, int error);                             /* end of file (0) or an errno; now detached */
};

struct fdin {
    const struct fdin_ops *ops;
    void *arg;
    struct loop *loop;
    struct fd_end end;
    struct fd_waker waker;
    struct loop_fd watch;
    atomic_bool waiting;                                           /* there was no room: fdin_ready() must wake us */
};

int fdin_open(struct fdin *in, struct loop *loop, const struct fdin_ops *ops, void *arg);
/* fd stays the caller's; nothing is called before the loop runs */
int fdin_attach(struct fdin *in, int fd);
void fdin_detach(struct fdin *in);
void fdin_ready(struct fdin *in);                                  /* room() may have grown */
void fdin_close(struct fdin *in);                                  /* harmless when not open (all zero) */

struct fdout_ops {
    /* after a short fdout_write(): there is room again */
    void (*room)(void *arg);
    /* all that was taken is written; may be NULL; may come without need */
    void (*drained)(void *arg);
    /* an errno: nobody can read it any more; now detached */
    void (*broken)(void *arg, int error);
    /* there is output while detached (it may attach); may be NULL */
    void (*wanted)(void *arg);
};

/* Output through a bounded buffer. While it is detached, the buffer keeps the last bytes written for whoever comes. */
struct fdout {
    const struct fdout_ops *ops;
    void *arg;
    struct loop *loop;
    struct fd_end end;
    struct fd_waker waker;
    struct loop_fd watch;
    pthread_mutex_t lock;                                          /* of what follows; the last in the lock order */
    u8 *buf;
    size_t cap, head, len;                                         /* len bytes from head on, wrapping */
    bool attached;
    /* while detached: keep the last bytes, else drop all */
    bool keep;
    bool was_short;
    bool woken;                                                    /* a flush is certain to come */
    bool armed;                                                    /* the loop's thread: EPOLLOUT is awaited */
};

int fdout_open(struct fdout *out, struct loop *loop, size_t cap, bool keep, const struct fdout_ops *ops, void *arg);
int fdout_attach(struct fdout *out, int fd);                       /* fd stays the caller's */
void fdout_detach(struct fdout *out);
size_t fdout_write(struct fdout *out, const u8 *buf, size_t len);  /* how much was taken */
/* any thread: drained() comes even if nothing new is to be written */
void fdout_wake(struct fdout *out);
size_t fdout_pending(struct fdout *out);                           /* bytes not yet written; 0 when detached */
void fdout_close(struct fdout *out);                               /* harmless when not open (all zero) */
