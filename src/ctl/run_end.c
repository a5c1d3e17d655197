/*
 * How a run ended: the exit status, whose fault it was, and what is said about it. The table of statuses is in run.h
 * and, for users, in help.c.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <time.h>

#include "back/chardev_host.h"
#include "ctl/run.h"
#include "ctl/run_state.h"

#define LAST_LINES 48
#define LAST_BYTES 8192

u64 run_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

/* With a command the serial line is not shown; when the guest fails, its end is what people need. */
static void show_last_lines(struct run *run)
{
    u8 text[LAST_BYTES];
    size_t n = run->serial_tail ? chardev_tail_get(run->serial_tail, text, sizeof(text), LAST_LINES) : 0;
    if (!n)
        return;
    message_error("the guest's last messages:");
    for (size_t i = 0; i < n; i++)
        if (text[i] == '\n' || (text[i] >= 0x20 && text[i] != 0x7f))
            fputc(text[i], run->stderr_stream);
    if (text[n - 1] != '\n')
        fputc('\n', run->stderr_stream);
    fflush(run->stderr_stream);
}

/* A panic before the driver of pvpanic is there looks like a reset (with panic=-1) to all but a reader. */
static bool console_tells_panic(const struct run *run)
{
    static const char words[] = "Kernel panic - not syncing";
    u8 text[LAST_BYTES];
    size_t n = run->serial_tail ? chardev_tail_get(run->serial_tail, text, sizeof(text), LAST_LINES) : 0;
    return memmem(text, n, words, sizeof(words) - 1);
}

static void show_processor(struct run *run)
{
    if (!run->shutdown_x86)
        return;
    message_error("vCPU %u shut down in this state:", run->shutdown_vcpu);
    x86_print(run->shutdown_x86, run->stderr_stream);
    fflush(run->stderr_stream);
}

static void guest_failed(struct run *run, struct status *s, int status, const char *end, const char *reason)
{
    *s = (struct status){.status = status, .end = end, .failed = "guest", .reason = reason};
    message_error("%s", reason);
    show_last_lines(run);
}

/* Asked to end by a signal or a person, and no status came of it. */
static void ended_by_request(struct run *run, struct status *s)
{
    bool command = run->options.command != NULL;
    *s = (struct status){.end = "quit", .failed = "user"};
    if (run->quit_signal) {
        s->status = 128 + run->quit_signal;
        s->reason = command ? "ended by a signal before the command had ended" : "ended by a signal";
    } else {
        s->status = command ? EXIT_HOST_ERROR : 0;
        s->reason = command ? "the user quit before the command had ended" : "the user quit";
    }
    if (command)
        message(&run->messages, LOG_WARN, "%s", s->reason);
}

/* A command whose output the host did not take has not succeeded, even if it believes so. It was told when it happened. */
static void check_outputs(struct run *run, struct status *s)
{
    if (s->status == 0 && (chardev_fd_lost(run->out) || chardev_fd_lost(run->err)))
        *s = (struct status){.status = EXIT_HOST_ERROR, .end = s->end, .failed = "host",
                             .reason = "the host could not write the command's output"};
}

/* The guest ended in an orderly way: with a command, all depends on whether its status came. */
static void ended_in_order(struct run *run, struct status *s)
{
    bool reset = run->end == VM_END_RESET;
    int status;
    *s = (struct status){.end = reset ? "reset" : "poweroff", .failed = "none"};
    s->reason = reset ? "the guest reset itself" : "the guest powered off";
    if (!run->options.command)
        return;
    if (command_has_status(run->command, &status)) {
        *s = (struct status){.status = status, .end = "exited", .failed = status ? "command" : "none",
                             .reason = command_reason(run->command)};
        check_outputs(run, s);
    } else if (run->quit_signal || run->terms) {
        if (!run->quit_signal)
            run->quit_signal = SIGTERM;
        ended_by_request(run, s);
    } else if (reset && console_tells_panic(run)) {
        guest_failed(run, s, EXIT_GUEST_PANIC, "panic", "the guest's kernel panicked before it could tell by pvpanic, and reset");
    } else {
        guest_failed(run, s, EXIT_HOST_ERROR, s->end, reset ? "the guest reset itself before the command had ended"
                                                            : "the guest powered off before the command had ended");
    }
}

void run_end(struct run *run, struct status *s)
{
    const char *failure = command_failure(run->command);
    if (failure && run->end == VM_END_QUIT) {
        guest_failed(run, s, EXIT_HOST_ERROR, "quit", failure);
        return;
    }
    switch (run->end) {
    case VM_END_POWEROFF: case VM_END_RESET:
        ended_in_order(run, s);
        break;
    case VM_END_DEBUG_EXIT:
        *s = (struct status){.status = (int)((run->exit_value << 1 | 1) & 0xff), .end = "debug-exit", .failed = "none",
                             .reason = "the guest wrote to the debug exit port"};
        break;
    case VM_END_QUIT:
        ended_by_request(run, s);
        break;
    case VM_END_RESET_LOOP:
        guest_failed(run, s, EXIT_HOST_ERROR, "reset", "the guest reset itself three times, each time within a second of its start; "
                     "a kernel that panics so early says why on its console: name one with --console");
        break;
    case VM_END_PANIC:
        guest_failed(run, s, EXIT_GUEST_PANIC, "panic", "the guest's kernel panicked");
        break;
    case VM_END_TRIPLE_FAULT:
        show_processor(run);
        guest_failed(run, s, EXIT_TRIPLE_FAULT, "triple-fault", "the guest's processor shut down after a triple fault");
        break;
    case VM_END_HOST_ERROR:
        *s = (struct status){.status = EXIT_HOST_ERROR, .end = "host-error", .failed = "host",
                             .reason = run->host_error};
        message_error("%s", run->host_error);
        show_last_lines(run);
        break;
    }
}
