/*
 * The message of the last error, per thread; messages of a running VM.
 *
 * The thread-local buffer is the one exception to "everything hangs off a struct": like errno, it must outlive whatever failed.
 */
#include "base/err.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

#define ERR_MAX 1024

static _Thread_local char last[ERR_MAX];

int err(int code, const char *fmt, ...)
{
    char msg[ERR_MAX];
    int saved_errno = errno;
    va_list ap;

    bug_on(code >= 0);
    /* By way of a second buffer, since an argument may be err_last() itself: "kernel %s: %s". */
    va_start(ap, fmt);
    vsnprintf(msg, sizeof(msg), fmt, ap);
    va_end(ap);
    memcpy(last, msg, strlen(msg) + 1);
    errno = saved_errno;
    return code;
}

const char *err_last(void)
{
    return last;
}

void log_msg(const struct log *log, enum log_level level, const char *fmt, ...)
{
    char msg[ERR_MAX];
    va_list ap;

    if (!log || !log->sink)
        return;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof(msg), fmt, ap);
    va_end(ap);
    log->sink(log->arg, level, msg);
}
