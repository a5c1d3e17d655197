/* `doppel run --gdb`: the socket at which gdb's protocol is spoken (gdb_stub.h), one client at a time. On the loop's thread. */
#pragma once

#include "base/err.h"
#include "base/loop.h"
#include "ctl/monitor.h"

struct gdb;

struct gdb_config {
    u16 port;                                                      /* on 127.0.0.1, or */
    const char *path;                                              /* a Unix socket's; else NULL */
    bool bits32;
    struct vm *vm;
    struct loop *loop;
    const struct log *log;
    struct monitor *monitor;                                       /* its commands are gdb's "monitor", less pause, resume and quit */
};

int gdb_new(const struct gdb_config *config, struct gdb **out);
void gdb_vm_ended(struct gdb *g, int status);                      /* tells the client; NULL is fine, here and below */
void gdb_free(struct gdb *g);                                      /* before vm_free() */
