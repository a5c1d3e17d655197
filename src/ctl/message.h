/*
 * What doppel itself says on standard error: "doppel: ..." lines, whole, with "\r\n" while the terminal is raw.
 *
 * Text may hold names that a user or a guest chose: control characters become '?', so that a line stays one line and no
 * escape sequence reaches the terminal.
 */
#pragma once

#include "base/err.h"

struct message_config {
    bool quiet, verbose;
};

/* Errors and warnings always (warnings not with quiet), information only with verbose. Any thread. */
void message(const struct message_config *m, enum log_level level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
void message_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* The sink of a struct log; arg is the struct message_config. */
void message_sink(void *arg, enum log_level level, const char *msg);
/*
 * Lines of others (trace, CPU state), as they are but for "\r\n". The stream is standard error, or one that translates.
 * NULL: no memory.
 */
FILE *message_stream(void);
/*
 * Opens a file that lines are to be written to, made or emptied; a FIFO must have its reader. NULL with err(), which
 * names option and file.
 */
FILE *message_open(const char *path, const char *option);
