/*
 * The control socket of a running VM: the monitor's commands, as lines. What a command says is sent back, and after the client has ended its
 * sending (shutdown(2)) and everything is answered, the connection is closed: so a program sends a line and reads to the end.
 *
 * The socket is open to its owner only (back/listen.h). On the loop's thread.
 */
#pragma once

#include "base/err.h"
#include "base/loop.h"

struct control;

struct control_config {
    const char *path;
    struct loop *loop;
    const struct log *log;
    bool (*line)(void *arg, char *line, FILE *out);                /* carries it out; false: the connection ends */
    void *arg;
};

int control_new(const struct control_config *config, struct control **out); /* 0, or a negative errno with err() */
void control_free(struct control *c);                              /* NULL is fine */
