/*
 * What the parts of process 1 share: init.c (start, devices, shell, agent, end, the loop), command.c (the command and its streams), root.c (file systems
 * that are not the initramfs).
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"

#define CHUNK 65536
#define BUTTONS_MAX 8

/* One direction of a stream: what came from src waits in buf until dst takes it. */
struct pump {
    int src, dst;                                                  /* -1: closed */
    bool port_src;                                      /* a port gives 0 while the host has not connected it: no end */
    bool until_empty;                                              /* src ends where nothing is left in it */
    bool eof;                                                     /* src has ended; buf may still hold its last bytes */
    bool broken;                                                   /* nobody reads dst: discard */
    uint64_t limit;                                                /* src ends after so many bytes */
    uint64_t taken, given;                                         /* bytes from src, to dst */
    size_t have, done;                                             /* buf[done, have) waits */
    uint8_t buf[CHUNK];
};

struct ctl {
    int fd;                                                        /* port doppel.ctl, -1: none (yet) */
    uint8_t *in, *out;
    size_t in_len, in_cap, out_len, out_cap;
};

enum command_state { CMD_NONE, CMD_WAITING, CMD_RUNNING, CMD_DRAINING, CMD_SENT };
enum { OUT, ERR };

struct command {
    enum command_state state;
    pid_t pid;
    bool told_ready;                                               /* READY is sent */
    int port[3];                                                   /* stdin, stdout, stderr */
    int master, slave;                                             /* of the terminal, with RUN_TTY; else -1 */
    struct pump in, out[2];
    bool stdin_ended;                                              /* the command was given the end of its input */
    bool stdin_told, eof_told[2];                                  /* STDIN_CLOSED, STDOUT_EOF, STDERR_EOF are sent */
    struct msg_exited exited;
};

struct init {
    int signals, uevents;
    int button[BUTTONS_MAX];
    char button_name[BUTTONS_MAX][32];
    unsigned buttons;
    char console[64];                                              /* "/dev/ttyS0" */
    pid_t network;                                                 /* brings network cards up; 0: has done so */
    bool wait_network;                                             /* the command is not run before */
    pid_t shell;                                                   /* 0: none */
    int64_t shell_at;                                              /* not before, in now_ms() */
    pid_t agent;                                                   /* 0: none */
    int64_t agent_at;                                              /* as shell_at */
    int how;                                                       /* RB_*: the machine is to end so; 0: not */
    int64_t kill_at;                                               /* what still runs then is killed; 0: no haste */
    int kill_with;                                                 /* the command, by this signal */
    bool stopping;                                                 /* all processes were told to end */
    bool other_root;                                               /* shell and command run below ROOT */
    int root_error;                                                /* why they cannot, an errno */
    bool port_down;                                             /* the host has not connected a port: look again soon */
    struct ctl ctl;
    struct command cmd;
};


/* init.c */
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int64_t now_ms(void);
void close_fd(int *fd);
void read_line(const char *path, char *buf, size_t size);
/* The value of NAME=VALUE on the kernel's command line. */
bool parameter(const char *name, char *value, size_t size);
bool has_word(const char *wanted);
void load_modules(const char *list);
void stop_all(struct init *s);
void set_winsize(const char *tty, int fd, unsigned rows, unsigned cols);
void child_defaults(void);                                         /* in a child: as a process of its own begins */

/* command.c */
void command_init(struct init *s);
/* Opens the ports that are there by now; READY goes out with the last one. */
void command_find_ports(struct init *s);
void command_ready(struct init *s);
void command_read(struct init *s);                                 /* what the host says */
/* Moves the command's streams, and tells the host where they end. */
void command_step(struct init *s);
void command_ended(struct init *s, enum exit_how how, uint32_t code);
void ctl_flush(struct ctl *c);
bool pump_idle(const struct pump *p);
