/*
 * The terminal in raw mode, given back as it was on every way out: exit(), signals that end the process, crashes.
 *
 * One per process, as there is one controlling terminal: signal and exit handlers get no argument, so its state is the
 * one mutable thing at file scope. Threads: terminal_restore() from any, also in a signal handler; the rest from the
 * loop's thread.
 */
#pragma once

#include "base/types.h"

/*
 * Remembers how the terminal behind fd is set and arranges for its being given back. 0, or -ENOTTY (no err()): then the
 * rest does nothing.
 */
int terminal_open(int fd);
/* again after a stop: the shell may have changed it */
void terminal_raw(void);
void terminal_restore(void);
bool terminal_is_raw(void);                                        /* lines must end in "\r\n" then; any thread */
/* The window's size; false when it is not known. */
bool terminal_size(int fd, u16 *cols, u16 *rows);

/* Restores the terminal and ends the process at once with this status. Async-signal-safe. */
_Noreturn void terminal_die(int status);
