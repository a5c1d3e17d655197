/*
 * A folder of the host, served by 9P2000.L: the file system protocol of Linux's 9p client.
 *
 * Requests are carried out on threads of the server's own, several at once: the host's storage may keep them waiting as long as it likes.
 *
 * What the guest can reach. Nothing outside the folder: a path is walked name by name from a descriptor, links are handed to the guest and never
 * followed here, and ".." ends at the folder itself. No device, FIFO or socket is ever opened, and no device node made. File systems that are
 * views of the host's kernel (/proc, /sys, ...) below the folder look empty. All else is as the host permits the user of doppel.
 *
 * Whose files. The host's permissions are those of doppel's user, whoever the guest's program is. By default this user's own files are shown to the
 * guest as root's (the default guest has no other user), and so those of the host's root, too; `owners` shows the host's numbers.
 */
#pragma once

#include <sys/uio.h>

#include "base/err.h"
#include "base/types.h"

struct p9;

struct p9_config {
    const char *path;
    bool readonly;
    bool owners;                                                   /* the host's user and group numbers, unchanged */
};

/* A message and the room for its answer, in pieces of memory that the guest may write to at any time; the caller's, untouched until done(). */
struct p9_request {
    struct iovec *out, *in;                                        /* message, room; entries are consumed */
    unsigned outs, ins;
    void (*done)(struct p9_request *r);                            /* any thread */
    u32 reply;                                                     /* bytes of the answer; 0: the message made no sense */
    struct p9_request *next;                                       /* the server's own */
};

/* 0, or a negative errno with err() naming the folder: missing, not a folder, not readable. */
int p9_open(const struct p9_config *c, struct p9 **out);
/* Waits for the requests in progress, for a bounded time. False: the host did not answer; s and the requests must stay for ever. NULL is fine. */
bool p9_close(struct p9 *s);
const char *p9_path(const struct p9 *s);

/* Any thread; done() will be called, on another one. */
void p9_submit(struct p9 *s, struct p9_request *r);
/* Carries it out here and now; for tests. */
void p9_serve(struct p9 *s, struct p9_request *r);
/* Forgets the client: what it had open is closed. Nothing is in progress. */
void p9_forget(struct p9 *s);
unsigned p9_fids(struct p9 *s);                                    /* that exist */
