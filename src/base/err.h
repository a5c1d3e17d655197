/*
 * The host's errors: a negative errno with a message for the user.
 *
 * `return err(-EIO, "disk %s: cannot read: %s; check the file", path, strerror(errno))` records the message for this thread and returns
 * the code; callers propagate the code and unwind; only ctl/ prints err_last(). A message names the file or option, says what
 * is wrong, and what to do. Guest errors never come here.
 */
#pragma once

#include "base/types.h"

int err(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The message of this thread's last err(), or "" . Valid until the next err() of this thread. */
const char *err_last(void);

/* Messages while a VM runs (a disk that fails, a guest that misbehaves). The sink, set by ctl/, may be called from any thread. */
enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };
struct log {
    void (*sink)(void *arg, enum log_level level, const char *msg);
    void *arg;
};
void log_msg(const struct log *log, enum log_level level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
