/* Threads of back ends (see thread.h). */
#define _GNU_SOURCE
#include "base/thread.h"

#include <signal.h>

#include "base/types.h"

#define STACK (1 * MiB)               /* of address space: libslirp has 64 KiB on it for each packet that it sends, and may send one while it sends another */

int thread_start(pthread_t *t, void *(*fn)(void *arg), void *arg)
{
    pthread_attr_t attr;
    sigset_t mask;
    int e;

    sigfillset(&mask);
    sigdelset(&mask, SIGSEGV);
    sigdelset(&mask, SIGBUS);
    sigdelset(&mask, SIGFPE);
    sigdelset(&mask, SIGILL);
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK);
    pthread_attr_setsigmask_np(&attr, &mask);
    e = pthread_create(t, &attr, fn, arg);
    pthread_attr_destroy(&attr);
    return e;
}
