/*
 * The life of `doppel run`: options, engine, guest, machine, loop, and the way out.
 *
 * Ending has two halves: the machine stops (on_vm_ended), then what it said reaches the outside (check_finished), then
 * the loop stops. Only somebody who wants to quit at once does not wait for the second.
 */
#define _GNU_SOURCE
#include "ctl/run.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include "ctl/console.h"
#include "ctl/detach.h"
#include "ctl/engine_choice.h"
#include "ctl/gdb.h"
#include "ctl/image.h"
#include "ctl/run_state.h"
#include "ctl/signals.h"
#include "ctl/terminal.h"

#define HANGUP_SECONDS 20   /* for the guest to shut down when its terminal has gone */
#define PRESS_SECONDS 5     /* from one press of the power button to the next */
#define INTERRUPTS_MAX 3    /* a command that ignores so many SIGINTs is ended with the guest */

/* --- ending --- */

static void check_finished(void *arg)
{
    struct run *run = arg;
    if (run->ended && (run->quitting || (command_drained(run->command) && run_io_drained(run))))
        loop_stop(run->loop);
}

/* An output that drains lets its port go on (out_writable), which is posted work: look behind that. */
static void on_drained(void *arg)
{
    struct run *run = arg;
    if (run->ended)
        loop_post(run->loop, check_finished, run);
}

static int status_for_gdb(const struct vm_result *r)
{
    switch (r->end) {
    case VM_END_DEBUG_EXIT: return (int)(r->value << 1 | 1);
    case VM_END_PANIC: return EXIT_GUEST_PANIC;
    case VM_END_TRIPLE_FAULT: return EXIT_TRIPLE_FAULT;
    case VM_END_HOST_ERROR: return EXIT_HOST_ERROR;
    default: return 0;
    }
}

/* Posted behind whatever the devices had posted: the last output of the guest is on its way by now. */
static void on_vm_ended(void *arg, const struct vm_result *r)
{
    struct run *run = arg;
    run->ended = true;
    run->end = r->end;
    snprintf(run->host_error, sizeof(run->host_error), "%s", r->message);
    run->exit_value = r->value;
    run->shutdown_vcpu = r->vcpu;
    run->shutdown_x86 = r->x86;
    if (run->console)
        console_close_prompt(run->console);
    command_vm_ended(run->command);
    gdb_vm_ended(run->gdb, status_for_gdb(r));
    loop_post(run->loop, check_finished, run);
}

/* Ends now, and drops what is not written. signo: who wants it; 0: a person at the console. */
static void quit(struct run *run, int signo)
{
    if (signo)
        run->quit_signal = signo;
    run->quitting = true;
    if (run->ended)
        loop_stop(run->loop);
    else
        vm_quit(run->vm);
}

static void on_vm_resumed(void *arg)
{
    struct run *run = arg;
    if (run->vm)
        command_time(run->command);
}

static void on_command_started(void *arg)
{
    struct run *run = arg;
    message(&run->messages, LOG_INFO, "the command starts, %.2f s after the guest's power-on",
            (double)(run_now_ns() - run->running_ns) / 1e9);
}

static void on_command_done(void *arg)
{
    struct run *run = arg;
    message(&run->messages, LOG_INFO, "%s; the guest shuts down", command_reason(run->command));
}

static void on_command_failed(void *arg)
{
    struct run *run = arg;
    vm_quit(run->vm);
}

/* --- signals and keys --- */

/* Process 1 is ours: the default guest's, also when it runs a command in an image. */
static bool own_init(const struct run *run)
{
    return run->guest.dir[0] || (run->image && run->options.command);
}

static void press_power_button(struct run *run)
{
    vm_resume(run->vm);                                            /* a paused guest could not see it */
    vm_power_button(run->vm);
    run->pressed = true;
    if (!own_init(run))
        timer_arm(&run->press_again, clock_ns(vm_clock(run->vm)) + PRESS_SECONDS * 1000000000ull);
}

/*
 * A kernel that boots forgets what was pressed before its driver was there, and a system what came before somebody listened.
 * The default guest tells when that is so; with others, it is pressed again and again, as a person would.
 */
static void on_press_again(void *arg)
{
    struct run *run = arg;
    if (run->ended)
        return;
    vm_power_button(run->vm);
    timer_arm(&run->press_again, clock_ns(vm_clock(run->vm)) + PRESS_SECONDS * 1000000000ull);
}

static void on_guest_ready(void *arg)
{
    struct run *run = arg;
    if (run->pressed && !run->ended)
        vm_power_button(run->vm);
}

static void on_terminate(struct run *run, int signo, unsigned count)
{
    if (run->ended || count > 1) {
        quit(run, signo);
        return;
    }
    message(&run->messages, LOG_INFO, "%s: the power button was pressed; once more ends at once",
            signo == SIGTERM ? "SIGTERM" : "SIGINT");
    press_power_button(run);
}

/* A command gets it, as it would on the host. */
static void on_interrupt(struct run *run)
{
    run->ints++;
    if (!run->options.command)
        on_terminate(run, SIGINT, run->ints);
    else if (run->ended || run->ints > INTERRUPTS_MAX || !command_signal(run->command, SIGINT))
        quit(run, SIGINT);
}

/* Nobody sees the guest any more: it may shut down, but it does not stay for ever. */
static void on_hangup(struct run *run)
{
    run->quit_signal = SIGHUP;
    if (run->ended) {
        quit(run, SIGHUP);
        return;
    }
    signals_deadline(HANGUP_SECONDS);
    press_power_button(run);
}

static void on_stop(struct run *run)
{
    bool raw = terminal_is_raw(), running = vm_state(run->vm) == VM_RUNNING;
    if (running)
        vm_pause(run->vm);
    terminal_restore();
    signals_stop_self();
    if (raw)
        terminal_raw();
    if (running)
        vm_resume(run->vm);
    run_io_resize(run);
}

static void on_signal(void *arg, int signo)
{
    struct run *run = arg;
    switch (signo) {
    case SIGTERM:
        on_terminate(run, signo, ++run->terms);
        break;
    case SIGINT:
        on_interrupt(run);
        break;
    case SIGHUP:
        on_hangup(run);
        break;
    case SIGQUIT:
        quit(run, signo);
        break;
    case SIGALRM:
        quit(run, run->quit_signal ? run->quit_signal : SIGTERM);
        break;
    case SIGTSTP:
        on_stop(run);
        break;
    case SIGCONT:
        if (terminal_is_raw())
            terminal_raw();
        run_io_resize(run);
        break;
    case SIGWINCH:
        run_io_resize(run);
        break;
    }
}

static void on_quit_key(void *arg)
{
    if (terminal_is_raw() && isatty(STDERR_FILENO))
        fputs("\r\n", stderr);                                     /* what follows is not to stand behind the guest's prompt */
    quit(arg, 0);
}

static bool on_monitor_line(void *arg, char *line, FILE *out)
{
    struct run *run = arg;
    bool stay = monitor_line(&run->monitor, line, out);
    if (run->monitor.want_quit)
        quit(run, 0);
    if (run->monitor.want_shutdown && !run->ended)
        press_power_button(run);
    run->monitor.want_shutdown = false;
    return stay;
}

static const struct console_ops console_ops = {.quit = on_quit_key, .line = on_monitor_line};

/* --- beginning --- */

/* The promise of the command line is that with auto this is the first line. */
static const struct engine *choose_engine(struct run *run)
{
    const char *name = run->options.check ? "bt" : run->options.engine;
    char reason[128];
    if (strcmp(name, "auto"))
        return engine_find(name);
    const struct engine *e = engine_choose(reason, sizeof(reason));
    if (!run->options.quiet)
        fprintf(run->stderr_stream, "engine: %s (%s)\n", e->name, reason);
    return e;
}

static int append(char **text, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static int append(char **text, const char *fmt, ...)
{
    char *more, *joined;
    va_list ap;
    va_start(ap, fmt);
    int n = vasprintf(&more, fmt, ap);
    va_end(ap);
    if (n < 0)
        return err(-ENOMEM, "no memory for the kernel's command line");
    n = asprintf(&joined, "%s%s%s", *text ? *text : "", *text && **text && *more ? " " : "", more);
    free(more);
    if (n < 0)
        return err(-ENOMEM, "no memory for the kernel's command line");
    free(*text);
    *text = joined;
    return 0;
}

/* $TERM goes into the kernel's command line only if it is a plain word. */
static const char *terminal_kind(void)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-";
    const char *term = getenv("TERM");
    return term && *term && strlen(term) < 64 && !term[strspn(term, plain)] ? term : NULL;
}

/* For init of the default guest (guest/protocol.h). */
static int append_for_init(struct run *run)
{
    int r = 0;
    if (run->options.verbose)
        r = append(&run->cmdline, "loglevel=7");
    if (r == 0 && run->root_kind)
        r = append(&run->cmdline, "doppel.root=%s", run->root_kind);
    if (r == 0 && run->options.command && (net_options_wait(&run->options.net) || (run->image && run->options.net.nets)))
        r = append(&run->cmdline, "doppel.net=wait");
    if (r == 0 && run->options.command)
        return append(&run->cmdline, "doppel.run=1");
    if (r == 0 && run->tty && terminal_kind())
        r = append(&run->cmdline, "TERM=%s", terminal_kind());
    if (r == 0 && run->tty && run->console->cols)
        r = append(&run->cmdline, "doppel.cols=%u doppel.rows=%u", run->console->cols, run->console->rows);
    return r;
}

static int make_cmdline(struct run *run)
{
    const struct run_options *o = &run->options;
    const char *first = run->image ? run->image->cmdline : run->guest.dir[0] ? run->guest.cmdline : "";
    int r = append(&run->cmdline, "%s", *first || o->append ? first : "console=ttyS0");
    if (r == 0 && own_init(run))
        r = append_for_init(run);
    if (r == 0 && o->append)
        r = append(&run->cmdline, "%s", o->append);
    return r;
}

/* The default guest is needed for its kernel, or for the command line that its init understands. */
static int find_guest(struct run *run)
{
    const struct run_options *o = &run->options;
    if (o->image)
        return run_image_open(run);
    return (o->kernel || o->firmware) && !o->command ? 0 : guest_find_or_build(&run->guest, o->quiet);
}

static int open_trace(struct run *run)
{
    if (!run->options.trace_file)
        return 0;
    run->trace_file = message_open(run->options.trace_file, "--trace");
    return run->trace_file ? 0 : -EIO;
}

static int open_stats(struct run *run)
{
    const struct run_options *o = &run->options;
    if (o->stats_file && !(run->stats_file = message_open(o->stats_file, "--stats")))
        return -EIO;
    if (o->profile_file && !(run->profile_file = message_open(o->profile_file, "--profile")))
        return -EIO;
    return 0;
}

static int open_command(struct run *run)
{
    struct chardev *console = run->options.command ? run->console : NULL;
    struct command_config config = {
        .argv = run->options.command,
        .in = console ? console : run->in, .out = console ? console : run->out, .err = run->err,
        .tty = console != NULL, .stdout_ends = !console, .dir = run->root_dir, .term = terminal_kind(), .log = &run->log,
        .started = on_command_started, .done = on_command_done, .ready = on_guest_ready,
        .failed = on_command_failed, .arg = run,
    };
    if (run->console) {
        config.cols = run->console->cols;
        config.rows = run->console->rows;
    }
    return command_new(&config, &run->command);
}

/* What auto took fails: it does not give up for that. Other reasons of failure fail again. */
static int next_engine(struct run *run, struct vm_config *config)
{
    char why[400];
    snprintf(why, sizeof(why), "%s", err_last());
    config->engine = config->engine == &kvm_engine ? &bt_engine : &interp_engine;
    int r = vm_new(config, &run->vm);
    if (r == 0 && !run->options.quiet)
        fprintf(run->stderr_stream, "engine: %s (%s)\n", config->engine->name, why);
    return r;
}

static const char *or_null(const char *s)
{
    return *s ? s : NULL;
}

/* What is loaded: of the image, named on the command line, or the default guest's. */
static void choose_boot(const struct run *run, struct vm_config *config)
{
    const struct run_options *o = &run->options;
    bool guest = !o->kernel && !o->firmware;
    config->cmdline = run->cmdline;
    if (run->image) {
        config->kernel = or_null(run->image->kernel);
        config->initrd = or_null(run->image->initrd);
        config->firmware = or_null(run->image->firmware);
        return;
    }
    config->kernel = guest ? run->guest.kernel : o->kernel;
    config->initrd = o->initrd || !guest ? o->initrd : run->guest.initrd;
    config->firmware = o->firmware;
}

static int open_vm(struct run *run, const struct engine *engine)
{
    const struct run_options *o = &run->options;
    struct vm_config config = {
        .engine = engine, .vcpus = o->cpus, .memory_bytes = o->memory_bytes,
        .cpuid = o->cpuid, .disk = o->disk, .disks = o->disks, .share = o->share, .shares = o->shares, .serial = run->serial,
        .net = o->net.net, .nets = o->net.nets, .publish = o->net.publish, .publishes = o->net.publishes, .capture = o->capture,
        .vsock = run->vsock, .virtio_modern = o->virtio_modern, .virtio_split = o->virtio_split, .debug_exit = o->debug_exit, .start_paused = o->gdb_wait,
        .no_reboot = o->no_reboot || o->command,                   /* a command is not run twice */
        .trace = {.mask = o->trace_mask, .file = run->trace_file ? run->trace_file : run->stderr_stream},
        .tools = {.insns = o->stats || o->verbose, .handlers = o->stats, .check = o->check, .mmu = o->mmu, .profile = o->profile_file}, .sample = o->stats,
        .log = &run->log, .loop = run->loop, .ended = on_vm_ended, .ended_arg = run,
        .resumed = on_vm_resumed,
    };
    choose_boot(run, &config);
    config.port = command_ports(run->command, &config.ports);
    int r = vm_new(&config, &run->vm);
    while (r < 0 && config.engine != &interp_engine && !strcmp(o->engine, "auto") && !o->check)
        r = next_engine(run, &config);
    if (r < 0)
        return r;
    timer_init(&run->press_again, vm_clock(run->vm), on_press_again, run);
    command_attach(run->command, run->vm);
    run->monitor.vm = run->vm;
    run->monitor.status = run_ways_status;
    run->monitor.arg = run;
    return 0;
}

/*
 * A disk is what its file has, byte for byte: its format is never guessed from what a guest may have written there. So one that looks like another form
 * of disk is only told of.
 */
static void tell_formats(struct run *run)
{
    const struct run_options *o = &run->options;
    for (unsigned i = 0; i < o->disks; i++) {
        const struct image_format *f = image_format_of(o->disk[i].block.path);
        if (f)
            message(&run->messages, LOG_WARN, "disk %s: it looks like %s, and is given to the guest as it is; %s", o->disk[i].block.path, f->kind, f->remedy);
    }
}

static int open_gdb(struct run *run)
{
    const struct run_options *o = &run->options;
    struct gdb_config config = {
        .port = o->gdb_port, .path = o->gdb_path, .bits32 = o->gdb_i386, .vm = run->vm, .loop = run->loop,
        .log = &run->log, .monitor = &run->monitor,
    };
    if (!o->gdb_port && !o->gdb_path)
        return 0;
    int r = gdb_new(&config, &run->gdb);
    if (r == 0 && o->gdb_wait && o->gdb_path)
        message(&run->messages, LOG_WARN, "the guest waits for gdb: target remote %s", o->gdb_path);
    else if (r == 0 && o->gdb_wait)
        message(&run->messages, LOG_WARN, "the guest waits for gdb: target remote :%u", o->gdb_port);
    return r;
}

/* Everything up to the moment before the first instruction. */
static int prepare(struct run *run)
{
    const struct run_options *o = &run->options;
    run->stderr_stream = message_stream();
    if (!run->stderr_stream)
        return err(-ENOMEM, "no memory");
    int r = o->status_file ? status_file_prepare(o->status_file) : 0;
    if (r < 0)
        run->options.status_file = NULL;                           /* told once is enough */
    if (r == 0)
        r = run_ways_claim(run);                                   /* with --detach it has a name already */
    const struct engine *engine = r == 0 ? choose_engine(run) : NULL;
    if (r == 0)
        r = find_guest(run);
    if (r == 0)
        r = run_root_open(run);
    if (r == 0)
        r = run_seed_open(run);
    if (r == 0)
        r = open_trace(run);
    if (r == 0)
        r = open_stats(run);
    if (r == 0)
        r = loop_new(&run->loop);
    if (r == 0)
        r = run_io_open(run, &console_ops);
    /* Before the engine, whose handler of SIGSEGV is to see each fault first: most are the guest's. */
    if (r == 0 && run->tty)
        terminal_open(STDIN_FILENO);
    if (r == 0)
        r = run_ways_open(run, on_monitor_line);
    if (r == 0)
        r = open_command(run);
    if (r == 0)
        r = make_cmdline(run);
    if (r == 0)
        r = open_vm(run, engine);
    if (r == 0)
        tell_formats(run);
    if (r == 0)
        r = open_gdb(run);
    return r;
}

static int loop_and_machine(struct run *run)
{
    run->running_ns = run_now_ns();
    message(&run->messages, LOG_INFO, "the guest starts, %.2f s after doppel: %u vCPU, %llu MiB, kernel %s",
            (double)(run->running_ns - run->started_ns) / 1e9, run->options.cpus,
            (unsigned long long)(run->options.memory_bytes / MiB),
            run->image ? run->image->image.dir : run->options.kernel ? run->options.kernel
            : run->options.firmware ? run->options.firmware : run->guest.kernel);
    int r = signals_open(run->loop, on_signal, run);
    if (r < 0)
        return r;
    run_io_on_drained(run, on_drained, run);
    if (run->tty)
        terminal_raw();
    r = vm_start(run->vm);
    if (r == 0)
        r = loop_run(run->loop);
    return r;
}

static void say_speed(struct run *run)
{
    u64 ns = run_now_ns() - run->running_ns, insns = vm_insns(run->vm);
    message(&run->messages, LOG_INFO, "the guest ran for %.2f s: %llu million instructions, %.1f million a second",
            (double)ns / 1e9, (unsigned long long)(insns / 1000000), (double)insns / (double)MAX(ns, 1) * 1e3);
}

static void say_counts(struct run *run)
{
    char line[512];
    size_t len = 0;
    const char *name;
    u64 n;
    for (unsigned i = 0; len < sizeof(line) && (name = vm_count(run->vm, i, &n)); i++)
        len += (size_t)snprintf(line + len, sizeof(line) - len, "%s %s %llu", i ? "," : "", name,
                                (unsigned long long)n);
    message(&run->messages, LOG_INFO, "handled for the guest:%s", line);
}

static void say_checked(struct run *run)
{
    if (run->options.check)
        message(&run->messages, LOG_WARN, "check: %llu instructions in %llu blocks ran on both engines; %llu blocks only once",
                (unsigned long long)vm_counted(run->vm, COUNT_CHECK_INSNS),
                (unsigned long long)vm_counted(run->vm, COUNT_CHECK_BLOCKS),
                (unsigned long long)vm_counted(run->vm, COUNT_CHECK_ONCE));
}

static void say_stats(struct run *run)
{
    if (run->options.stats)
        vm_stats(run->vm, run->stats_file ? run->stats_file : run->stderr_stream, run->options.stats_json);
}

static void say_profile(struct run *run)
{
    if (run->profile_file && vm_profile(run->vm, run->options.profile_symbols, run->profile_file) < 0)
        message_error("%s", err_last());
}

/* A full disk shows when a file is closed, at the latest. */
static void close_output(FILE *f, const char *option, const char *path)
{
    bool bad = ferror(f);
    errno = 0;
    if (fclose(f) != 0 || bad)
        message_error("%s %s: it could not be written whole: %s", option, path, strerror(errno ? errno : EIO));
}

static void release(struct run *run)
{
    gdb_free(run->gdb);
    if (run->vm)
        timer_disarm(&run->press_again);
    vm_free(run->vm);
    run_ways_close(run);
    command_free(run->command);
    monitor_close(&run->monitor);
    run_io_close(run);
    if (run->loop) {
        signals_close();
        loop_free(run->loop);
    }
    if (run->trace_file)
        close_output(run->trace_file, "--trace", run->options.trace_file);
    if (run->stats_file)
        close_output(run->stats_file, "--stats", run->options.stats_file);
    if (run->profile_file)
        close_output(run->profile_file, "--profile", run->options.profile_file);
    if (run->stderr_stream)
        fclose(run->stderr_stream);
    run_image_close(run);
    free(run->cmdline);
    free(run->root_dir);
}

/* A host error before or while the machine ran; ctl/ is where err() becomes a message. */
static void host_error(struct status *s)
{
    message_error("%s", err_last());
    *s = (struct status){.status = EXIT_HOST_ERROR, .end = "host-error", .failed = "host", .reason = err_last()};
}

static int usage_error(struct status *s)
{
    message_error("%s", err_last());
    message_error("\"doppel help run\" lists the options");
    *s = (struct status){.status = EXIT_USAGE, .end = "usage", .failed = "user", .reason = err_last()};
    return EXIT_USAGE;
}

static int write_status(const struct run *run, const struct status *s)
{
    if (!run->options.status_file || status_file_write(run->options.status_file, s) == 0)
        return s->status;
    message_error("%s", err_last());
    return s->status ? s->status : EXIT_HOST_ERROR;
}

/* -1: this is the process that is to run the guest. */
static int run_detached(struct run *run)
{
    if (!run->options.detach)
        return -1;
    if (run_ways_claim(run) == 0)
        return detach(run);
    message_error("%s", err_last());
    return EXIT_HOST_ERROR;
}

static int run_guest(struct run *run)
{
    struct status s;
    run->messages = (struct message_config){.quiet = run->options.quiet, .verbose = run->options.verbose};
    run->log = (struct log){.sink = message_sink, .arg = &run->messages};
    run->started_ns = run_now_ns();
    int r = prepare(run);
    if (r == 0)
        r = loop_and_machine(run);
    terminal_restore();
    if (r < 0) {
        host_error(&s);
    } else {
        run_end(run, &s);
        say_speed(run);
        say_counts(run);
        say_checked(run);
        say_stats(run);
        say_profile(run);
    }
    int status = write_status(run, &s);
    release(run);
    return status;
}

int run_main(int argc, char **argv)
{
    u32 closed = run_reserve_streams();
    struct status s;
    struct run *run = calloc(1, sizeof(*run));
    int status;
    if (!run) {
        message_error("no memory");
        return EXIT_HOST_ERROR;
    }
    run->closed_streams = closed;
    run->seed_fd = -1;
    if (run_options_parse(&run->options, argc, argv) < 0) {
        status = usage_error(&s);
        write_status(run, &s);
    } else {
        status = run_detached(run);
        if (status < 0)
            status = run_guest(run);
    }
    free(run);
    return status;
}
