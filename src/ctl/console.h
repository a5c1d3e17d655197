/*
 * Between a terminal (or standard input and output) and the guest: the Ctrl-A key, the monitor's prompt, and what was
 * typed ahead.
 *
 * It is a character device to the guest's serial line (or to a command's streams), and the front end of the descriptors
 * behind it. While the prompt is open, the guest's output waits, up to 256 KiB and then in the guest, so that the two
 * never mix.
 *
 * Threads: as chardev.h says for the guest's side; everything else on the loop's thread. The console's lock stands
 * between the device's and the back end's.
 */
#pragma once

#include "back/chardev.h"
#include "base/loop.h"

struct console_ops {
    void (*quit)(void *arg);                                       /* Ctrl-A X */
    /* a line typed at the prompt; false closes the prompt */
    bool (*line)(void *arg, char *line, FILE *out);
};

/*
 * lower stays the caller's and must outlive the console. terminal: somebody types there, so there is echo, and Ctrl-A
 * works even when the guest reads nothing.
 */
int console_new(struct loop *loop, struct chardev *lower, bool terminal, const struct console_ops *ops, void *arg,
                struct chardev **out);
void console_close_prompt(struct chardev *console);                /* harmless when it is not open */
