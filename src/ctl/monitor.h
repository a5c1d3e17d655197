/* The monitor prompt's commands: one table, from which `help` and the man page are made too. On the loop's thread. */
#pragma once

#include "vm/vm.h"

struct monitor {
    struct vm *vm;
    FILE *trace_file;                                              /* opened by `trace`; NULL: as it was at the start */
    bool want_quit, want_shutdown;                                 /* `quit`, `shutdown` was said; the caller sees to it */
    void (*status)(void *arg, FILE *out);                          /* for `status`; may be NULL */
    void *arg;
};

/* Carries out a line (which is cut up); what it has to say goes to out. False: the prompt closes. */
bool monitor_line(struct monitor *m, char *line, FILE *out);
void monitor_close(struct monitor *m);                             /* after the VM has ended */

struct monitor_command {
    const char *name, *args, *text;
    bool (*run)(struct monitor *m, char *args, FILE *out);
};
extern const struct monitor_command monitor_commands[];
extern const unsigned monitor_command_count;
