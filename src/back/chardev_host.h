/*
 * Character devices on this host: standard streams, a file or FIFO, a Unix socket, and a memory that keeps the end of
 * what was said.
 *
 * All are made and freed on the loop's thread (or before it runs). log may be NULL: then a broken output is not spoken
 * of. name is for messages.
 */
#pragma once

#include "back/chardev.h"
#include "base/err.h"
#include "base/loop.h"

#define CHARDEV_BUFFER (64 * KiB)

/*
 * Input from descriptor in, output to descriptor out; -1: no such direction. They stay the caller's, except that an
 * ended direction is replaced by /dev/null where it is a standard stream (so that its other side sees the end while
 * doppel still runs).
 */
int chardev_fd_new(struct loop *loop, int in, int out, const char *name, const struct log *log, struct chardev **c);
/* That the reader of the output goes away is nothing to speak of (a command's pipe). */
void chardev_fd_may_close(struct chardev *c);
/* The errno for which output was lost, but that of a reader who has gone; 0: none was. NULL is fine. */
int chardev_fd_lost(struct chardev *c);
void chardev_fd_end_input(struct chardev *c);                      /* reads no more */

/* Output to a file, made or emptied; a FIFO without a reader keeps the last bytes for the next one. Errors of opening:
 * err(). */
int chardev_file_new(struct loop *loop, const char *path, const struct log *log, struct chardev **c);

/*
 * Listens at path (mode 0600) and serves one client at a time; the next waits for its turn. Of what is said while no
 * client is there, the last 64 KiB are kept for the next one. A socket file that nobody listens at is replaced; any
 * other file is an error. The file is removed by chardev_free().
 */
int chardev_unix_new(struct loop *loop, const char *path, const struct log *log, struct chardev **c);

/* Keeps the last cap bytes of output in memory and gives no input. */
int chardev_tail_new(size_t cap, struct chardev **c);
/* Copies the last lines (at most max_lines, and at most size bytes) and returns their length. */
size_t chardev_tail_get(struct chardev *c, u8 *buf, size_t size, unsigned max_lines);

/* Frees any character device; what is not written by then is lost. NULL is fine. */
void chardev_free(struct chardev *c);
