/*
 * Lines on standard error (message.h). A line is one write(2), so that those of several threads and processes do not
 * mix.
 */
#define _GNU_SOURCE
#include "ctl/message.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include "ctl/terminal.h"

#define LINE_MAX_BYTES 2048

/* Nothing is left to be told when standard error itself fails. */
static void write_all(const char *p, size_t len)
{
    while (len) {
        ssize_t n = write(STDERR_FILENO, p, len);
        if (n < 0 && errno != EINTR)
            return;
        if (n > 0) {
            p += n;
            len -= (size_t)n;
        }
    }
}

static void say(const char *fmt, va_list ap)
{
    static const char prefix[] = "doppel: ";
    char line[LINE_MAX_BYTES];
    size_t n = sizeof(prefix) - 1, room = sizeof(line) - 2;
    memcpy(line, prefix, sizeof(prefix));
    int text = vsnprintf(line + n, room - n, fmt, ap);
    n += text < 0 ? 0 : strlen(line + n);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?';
    if (terminal_is_raw())
        line[n++] = '\r';
    line[n++] = '\n';
    write_all(line, n);
}

static bool wanted(const struct message_config *m, enum log_level level)
{
    switch (level) {
    case LOG_ERROR: return true;
    case LOG_WARN: return !m->quiet;
    case LOG_INFO: return m->verbose;
    case LOG_DEBUG: return false;
    }
    return true;
}

void message(const struct message_config *m, enum log_level level, const char *fmt, ...)
{
    va_list ap;
    if (!wanted(m, level))
        return;
    va_start(ap, fmt);
    say(fmt, ap);
    va_end(ap);
}

void message_error(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    say(fmt, ap);
    va_end(ap);
}

void message_sink(void *arg, enum log_level level, const char *msg)
{
    message(arg, level, "%s", msg);
}

static ssize_t stream_write(void *cookie UNUSED, const char *buf, size_t len)
{
    const char *p = buf, *end = buf + len;
    while (p < end) {
        const char *feed = memchr(p, '\n', (size_t)(end - p));
        const char *stop = feed ? feed : end;
        write_all(p, (size_t)(stop - p));
        if (feed)
            write_all(terminal_is_raw() ? "\r\n" : "\n", terminal_is_raw() ? 2 : 1);
        p = feed ? feed + 1 : end;
    }
    return (ssize_t)len;
}

FILE *message_stream(void)
{
    FILE *f = fopencookie(NULL, "w", (cookie_io_functions_t){.write = stream_write});
    if (f)
        setvbuf(f, NULL, _IOLBF, 1024);
    return f;
}

FILE *message_open(const char *path, const char *option)
{
    /* Without O_NONBLOCK a FIFO would hold us up until somebody reads it. */
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0666);
    FILE *f = NULL;
    if (fd >= 0 && fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK) == 0)
        f = fdopen(fd, "w");
    if (f)
        return f;
    err(-errno, "%s: cannot write %s: %s; name a file that you may write", option, path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return NULL;
}
