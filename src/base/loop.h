/*
 * The event loop: one thread that waits for file descriptors, timers and posted work (epoll, eventfd).
 *
 * Thread rules: loop_run() on one thread; loop_post() and loop_stop() from any; fd functions from the loop's thread or before it runs.
 * Callbacks run on the loop's thread with no lock of the loop's held.
 */
#pragma once

#include "base/types.h"

struct loop;

int loop_new(struct loop **out);
void loop_free(struct loop *l);

/* Runs until loop_stop(). Returns 0, or a negative errno with err() set. */
int loop_run(struct loop *l);
void loop_stop(struct loop *l);                                    /* any thread, async-signal-safe */

/* Runs fn(arg) once on the loop's thread, in the order of posting. Any thread. */
void loop_post(struct loop *l, void (*fn)(void *arg), void *arg);
/* Takes back what was posted so and has not begun: arg can be freed then. On the loop's thread, or while the loop does not run. */
void loop_unpost(struct loop *l, void (*fn)(void *arg), void *arg);

/* Watches fd; events are EPOLLIN, EPOLLOUT, ... One watch per fd. */
struct loop_fd {
    int fd;
    void (*fn)(void *arg, u32 events);
    void *arg;
    struct loop *loop;                                             /* NULL while not added */
};
int loop_fd_add(struct loop *l, struct loop_fd *w, int fd, u32 events, void (*fn)(void *arg, u32 events), void *arg);
void loop_fd_mod(struct loop_fd *w, u32 events);
void loop_fd_del(struct loop_fd *w);                               /* harmless when not added */
