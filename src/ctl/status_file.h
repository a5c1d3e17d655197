/*
 * --status-file: how a run ended, for programs. Lines "key=value":
 *
 *   status=N     doppel's exit status
 *   end=WORD     exited (the command), poweroff, reset, quit, panic, triple-fault, debug-exit, host-error, usage
 *   failed=WORD  whose fault it is: none, command (a status other than 0), guest, host, user (quit, usage)
 *   reason=TEXT  to the end of the line
 *
 * The file appears whole, by rename(2), when the run has ended; one left from before is removed at the start. A device
 * or FIFO is written as it is.
 */
#pragma once

#include "base/types.h"

struct status {
    int status;
    const char *end, *failed, *reason;
};

/* can it be written at all? 0 or negative errno with err() */
int status_file_prepare(const char *path);
int status_file_write(const char *path, const struct status *s);
