/*
 * Signals to the process, turned into callbacks on the loop's thread.
 *
 * Signals have no argument: like the terminal, their pipe is per process. SIGTERM is counted apart, since two that come
 * in quick succession must not become one. SIGPIPE and SIGXFSZ are ignored: writes report those errors.
 */
#pragma once

#include "base/loop.h"

/* SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGTSTP, SIGCONT, SIGWINCH and SIGALRM from now on call fn on the loop's thread. */
int signals_open(struct loop *loop, void (*fn)(void *arg, int signo), void *arg);
void signals_close(void);

/*
 * The process must have ended in so many seconds, or it is ended. For when the loop itself may hang. Async-signal-safe.
 */
void signals_deadline(unsigned seconds);
/* The calling process stops as by SIGTSTP's default action, and goes on with SIGCONT. */
void signals_stop_self(void);
