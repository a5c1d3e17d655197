/*
 * The parts of one run, shared by run.c (life cycle), run_io.c (who is connected to what) and run_end.c (how it ended).
 * On the loop's thread.
 */
#pragma once

#include "ctl/command.h"
#include "ctl/guest.h"
#include "ctl/image_store.h"
#include "ctl/instance.h"
#include "ctl/message.h"
#include "ctl/monitor.h"
#include "ctl/run_options.h"
#include "ctl/status_file.h"

/* Standard streams that were closed when doppel started: bits of 1 << descriptor. */
u32 run_reserve_streams(void);

struct run {
    struct run_options options;
    u32 closed_streams;
    struct message_config messages;
    struct log log;
    struct loop *loop;
    struct guest guest;                                            /* dir is "" when the default guest is not used */
    struct run_image *image;                                       /* NULL: none */
    int seed_fd;                                                   /* -1: none */
    char seed_path[32];
    char *cmdline;
    FILE *trace_file, *stderr_stream;                              /* trace_file: NULL without --trace FILE */
    FILE *stats_file, *profile_file;                               /* likewise */
    struct vm *vm;
    struct monitor monitor;
    struct command *command;
    struct gdb *gdb;                                               /* NULL without --gdb */

    /* run_root.c; NULL without --root */
    const char *root_kind;                                         /* of file system, by which the guest mounts it */
    char *root_dir;                                                /* the command's working directory */

    /* run_ways.c: ways in, from other processes */
    struct instance instance;                                      /* name[0] 0: it has no name */
    struct control *control;
    struct vsock_host *vsock;                                      /* NULL: the board has no vsock */
    char *vsock_path, *peers_path, *control_path;

    /* run_io.c */
    bool tty;                                                      /* a terminal is the console's (or the command's) */
    /* standard input and output as one, below `console` */
    struct chardev *streams;
    /* with Ctrl-A; NULL: standard input and output are no console */
    struct chardev *console;
    /* what COM1 is connected to: console, or one of the next two */
    struct chardev *serial;
    struct chardev *serial_file;                                   /* FILE, unix:PATH, or standard error */
    struct chardev *serial_tail;                                   /* the last lines, for when the guest fails */
    struct chardev *in, *out, *err;                                /* a command's, without a terminal */

    /* Why it ends */
    unsigned terms, ints;                                          /* SIGTERMs, SIGINTs so far */
    bool pressed;                                                  /* the power button was, by a signal */
    struct timer press_again;                                      /* for guests that do not tell when they listen */
    int quit_signal;                                               /* the signal that ended or is to end it; 0: none */
    bool quitting;                                                 /* at once: output is not waited for */
    bool ended;
    enum vm_end end;
    char host_error[512];
    u32 exit_value;                                                /* of the debug exit port */
    unsigned shutdown_vcpu;                                        /* of a triple fault */
    const struct x86 *shutdown_x86;                                /* the VM's */
    u64 started_ns, running_ns;                                    /* host's monotonic clock */
};

/* run_io.c: connects console and command according to the options; 0 or a negative errno with err(). */
struct console_ops;
int run_io_open(struct run *run, const struct console_ops *ops);
bool run_io_drained(const struct run *run);
void run_io_on_drained(struct run *run, void (*drained)(void *arg), void *arg);
void run_io_resize(struct run *run);
void run_io_close(struct run *run);

/*
 * run_ways.c: takes a name; then opens its control socket and its vsock's, before the VM is made. Without a name nobody asked for, none of it
 * is an error: a message is enough. 0 or a negative errno with err().
 */
int run_ways_claim(struct run *run);
int run_ways_open(struct run *run, bool (*line)(void *arg, char *line, FILE *out));
void run_ways_status(void *arg, FILE *out);                        /* for monitor.status */
void run_ways_close(struct run *run);

/*
 * run_image.c: the image that is booted. Opens it, puts its disk before the others and what boots it into run->image. 0 or a negative errno with err().
 */
struct run_image {
    struct image image;
    char disk[PATH_MAX], kept[PATH_MAX];
    char kernel[PATH_MAX], initrd[PATH_MAX];                       /* "": firmware boots it */
    char firmware[PATH_MAX];
    char cmdline[2048];
};
int run_image_open(struct run *run);
int run_seed_open(struct run *run);                                /* --cloud-init: a disk behind the others */
void run_image_close(struct run *run);

/* run_root.c: adds the shared folder that --root is, when the guest is known. 0 or a negative errno with err(). */
int run_root_open(struct run *run);

/* run_end.c: says what has to be said and fills in *s; reason lives as long as the run. */
void run_end(struct run *run, struct status *s);
u64 run_now_ns(void);
