/*
 * The protocol of a gdb remote stub (GDB manual, appendix E "GDB Remote Serial Protocol"), all-stop mode, one client:
 * bytes in, bytes out, and vm/debug.h for what they mean. gdb.c has the sockets.
 *
 * The client is not trusted: packets are at most GDB_PACKET_MAX bytes, a longer one is answered by an error; what is
 * malformed is answered by an error or ignored, and changes nothing. On the loop's thread.
 *
 * Processors are threads, numbered from 1. Addresses are linear; after Qqemu.PhyMemMode:1 (which QEMU's stub has too,
 * "maintenance packet Qqemu.PhyMemMode:1") or "monitor phys on" memory is read and written by physical address.
 */
#pragma once

#include "vm/debug.h"

#define GDB_PACKET_MAX 0x4000

struct gdb_stub;

struct gdb_ops {
    void (*send)(void *arg, const u8 *buf, size_t n);
    void (*drop)(void *arg);                                       /* disconnect, once all is sent; not from within */
    void (*kill)(void *arg);                                       /* the user wants the guest to end */
    void (*monitor)(void *arg, char *line, FILE *out);             /* "monitor LINE", which may be cut up */
};

/* bits32: present an i386 processor. d stays the caller's; its stopped callback is to call gdb_stub_stopped(). */
int gdb_stub_new(struct vm_debug *d, bool bits32, const struct gdb_ops *ops, void *arg, struct gdb_stub **out);
void gdb_stub_free(struct gdb_stub *s);

void gdb_stub_connect(struct gdb_stub *s);                         /* the guest stands still afterwards */
void gdb_stub_disconnect(struct gdb_stub *s);                      /* it goes on, with nothing of the debugger left in it */
void gdb_stub_receive(struct gdb_stub *s, const u8 *buf, size_t n);
void gdb_stub_stopped(struct gdb_stub *s);
void gdb_stub_ended(struct gdb_stub *s, int status);               /* the guest has ended */
