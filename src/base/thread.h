/*
 * Threads of back ends: small stacks, and no signals, which are the main thread's, but those that a thread brings about itself (SIGSEGV, SIGBUS, SIGFPE, SIGILL).
 */
#pragma once

#include <pthread.h>

/* A positive errno, as pthread_create(). */
int thread_start(pthread_t *t, void *(*fn)(void *arg), void *arg);
