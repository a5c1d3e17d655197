/*
 * Who is connected to what in a run.
 *
 *   a shell:               COM1 <-> console (Ctrl-A, prompt) <-> standard input and output
 *   --console FILE, unix:  COM1 <-> that; standard input is not read
 *   --detach:              COM1 -> the tail in memory, or what --console says
 *   a command:             ports <-> standard input, output, error, each on its own; COM1 -> the tail in memory, or
 *   what --console and --verbose say with a terminal:       ports <-> console <-> terminal, and a pseudo-terminal in
 *   the guest
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "back/chardev_host.h"
#include "base/err.h"
#include "ctl/console.h"
#include "ctl/run_state.h"
#include "ctl/terminal.h"

#define TAIL_BYTES 16384

u32 run_reserve_streams(void)
{
    u32 closed = 0;
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        if (fcntl(fd, F_GETFD) >= 0)
            continue;
        closed |= 1u << fd;
        /* The lowest free number is fd itself. Without /dev/null there is nothing to be done about it. */
        if (open("/dev/null", O_RDWR) < 0)
            return closed;
    }
    return closed;
}

static bool is_open(const struct run *run, int fd)
{
    return !(run->closed_streams & (1u << fd));
}

/* Standard input and output as the one console, with Ctrl-A. */
static int open_console(struct run *run, const struct console_ops *ops)
{
    int in = is_open(run, STDIN_FILENO) ? STDIN_FILENO : -1;
    int out = is_open(run, STDOUT_FILENO) ? STDOUT_FILENO : -1;
    if (out < 0)
        message(&run->messages, LOG_WARN, "console: standard output is closed; what the guest says is dropped");
    int r = chardev_fd_new(run->loop, in, out, "console", &run->log, &run->streams);
    if (r < 0)
        return r;
    run->tty = in >= 0 && isatty(in);
    terminal_size(STDOUT_FILENO, &run->streams->cols, &run->streams->rows);
    return console_new(run->loop, run->streams, run->tty, ops, run, &run->console);
}

static int open_serial_path(struct run *run)
{
    const struct run_options *o = &run->options;
    int r = o->console == CONSOLE_UNIX ? chardev_unix_new(run->loop, o->console_path, &run->log, &run->serial_file)
                                       : chardev_file_new(run->loop, o->console_path, &run->log, &run->serial_file);
    run->serial = run->serial_file;
    return r;
}

static int open_serial(struct run *run, const struct console_ops *ops)
{
    const struct run_options *o = &run->options;
    int r = 0;
    switch (o->console) {
    case CONSOLE_FILE: case CONSOLE_UNIX:
        return open_serial_path(run);
    case CONSOLE_NONE:
        return 0;
    case CONSOLE_STDIO: case CONSOLE_DEFAULT:
        break;
    }
    if (!o->command && !o->detach) {
        r = open_console(run, ops);
        run->serial = run->console;
    } else if (o->verbose && !o->detach) {
        r = chardev_fd_new(run->loop, -1, STDERR_FILENO, "the guest's serial line", NULL, &run->serial_file);
        run->serial = run->serial_file;
    } else {
        r = chardev_tail_new(TAIL_BYTES, &run->serial_tail);
        run->serial = run->serial_tail;
    }
    return r;
}

static int open_stream(struct run *run, int in, int out, const char *name, struct chardev **c)
{
    if (!is_open(run, in >= 0 ? in : out))
        return 0;
    int r = chardev_fd_new(run->loop, in, out, name, &run->log, c);
    if (r == 0)
        chardev_fd_may_close(*c);
    return r;
}

/*
 * A terminal whose foreground job is another's must not be read or set: it would stop us (tcgetpgrp(3), SIGTTIN,
 * SIGTTOU).
 */
static bool in_background(int fd)
{
    pid_t foreground = tcgetpgrp(fd);
    return foreground >= 0 && foreground != getpgrp();
}

/*
 * The command's streams: a terminal if both input and output are one, as for any program that would then talk to a
 * person.
 */
static int open_streams(struct run *run, const struct console_ops *ops)
{
    bool background = isatty(STDIN_FILENO) && in_background(STDIN_FILENO);
    if (isatty(STDIN_FILENO) && isatty(STDOUT_FILENO) && !background)
        return open_console(run, ops);
    /*
     * "doppel run -- CMD &", or under timeout(1): most commands read nothing, so they get an empty input and run,
     * instead of stopping.
     */
    int r = background ? 0 : open_stream(run, STDIN_FILENO, -1, "standard input", &run->in);
    if (r == 0)
        r = open_stream(run, -1, STDOUT_FILENO, "standard output", &run->out);
    if (r == 0)
        r = open_stream(run, -1, STDERR_FILENO, "standard error", &run->err);
    return r;
}

int run_io_open(struct run *run, const struct console_ops *ops)
{
    int r = open_serial(run, ops);
    if (r == 0 && run->options.command)
        r = open_streams(run, ops);
    return r;
}

/* All outputs; NULL for those that are not there. console stands for streams too. */
static void outputs(const struct run *run, struct chardev *out[4])
{
    out[0] = run->console;
    out[1] = run->serial_file;
    out[2] = run->out;
    out[3] = run->err;
}

bool run_io_drained(const struct run *run)
{
    struct chardev *out[4];
    outputs(run, out);
    for (size_t i = 0; i < ARRAY_SIZE(out); i++)
        if (chardev_pending(out[i]))
            return false;
    return true;
}

void run_io_on_drained(struct run *run, void (*drained)(void *arg), void *arg)
{
    struct chardev *out[4];
    outputs(run, out);
    for (size_t i = 0; i < ARRAY_SIZE(out); i++)
        chardev_on_drained(out[i], drained, arg);
}

void run_io_resize(struct run *run)
{
    u16 cols, rows;
    if (!run->console || !terminal_size(STDOUT_FILENO, &cols, &rows))
        return;
    run->console->cols = cols;
    run->console->rows = rows;
    if (run->console == run->serial)
        chardev_front_event(run->console, CHARDEV_RESIZED);
    command_resize(run->command, cols, rows);
}

void run_io_close(struct run *run)
{
    chardev_free(run->console);
    chardev_free(run->streams);
    chardev_free(run->serial_file);
    chardev_free(run->serial_tail);
    chardev_free(run->in);
    chardev_free(run->out);
    chardev_free(run->err);
}
