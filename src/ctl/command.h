/*
 * `doppel run -- COMMAND`: the host's side of guest/protocol.h, between the caller's standard streams and the named
 * ports of the virtio console.
 *
 * Without a command (a shell on the serial console) it only tells the guest the window's size.
 *
 * All on the loop's thread. The guest is not trusted: whatever it sends, buffers stay bounded, and nonsense ends the
 * run with a message.
 */
#pragma once

#include "back/chardev.h"
#include "base/err.h"
#include "vm/vm.h"

struct command;

struct command_config {
    char **argv;                                                   /* NULL: no command */
    /* with tty in and out are one and err is NULL; else made by chardev_fd_new(), or NULL: closed from the start */
    struct chardev *in, *out, *err;
    bool tty;
    /* the command's closing of standard output is passed on */
    bool stdout_ends;
    const char *dir;                                               /* working directory in the guest; NULL: its default */
    const char *term;                                              /* $TERM for a tty; may be NULL */
    u16 cols, rows;                                                /* 0: not known */
    const struct log *log;
    void (*started)(void *arg);                                    /* the guest has been told to run it */
    /* the command has ended: the guest powers itself off now */
    void (*done)(void *arg);
    /* the guest's init is there: what was pressed before, it has not seen */
    void (*ready)(void *arg);
    /* the guest does not keep to the protocol: command_failure() */
    void (*failed)(void *arg);
    void *arg;
};

int command_new(const struct command_config *config, struct command **out);
void command_free(struct command *c);                              /* NULL is fine */

/* For vm_config.port; afterwards command_attach() gets their device ends, before vm_start(). */
const struct vm_port *command_ports(struct command *c, unsigned *n);
void command_attach(struct command *c, struct vm *vm);

void command_resize(struct command *c, u16 cols, u16 rows);
/* The guest stood still for a while: its init sets its clock, if it has come so far. */
void command_time(struct command *c);
/* Passes a signal to the command; false when there is none that runs (yet, or any more). */
bool command_signal(struct command *c, int signo);

/*
 * The guest has ended: takes what is left in its ports. Afterwards command_drained() says whether the outputs have
 * taken everything.
 */
void command_vm_ended(struct command *c);
bool command_drained(const struct command *c);

bool command_has_status(const struct command *c, int *status);     /* as an exit status: 0..255, 128 + n, 126, 127 */
const char *command_reason(const struct command *c);               /* one line on how the command ended */
const char *command_failure(const struct command *c);              /* or NULL */
