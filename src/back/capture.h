/*
 * A record of what a machine's network cards send and receive, in a pcapng file (IETF draft-ietf-opsawg-pcapng) that Wireshark and tcpdump read.
 *
 * One section, an interface block for each card with its name and address, and for each frame an enhanced packet block with the host's time in
 * nanoseconds and the direction. Frames are recorded as they stand between card and back end: with checksums and segments that somebody else is to finish,
 * as a capture on a host's own interface shows them.
 *
 * When the file cannot be written any more (a full disk; a pipe whose reader takes nothing for a second, which the network waits for), the capture ends with a message, at the end of a whole block as far as that can be had; the network goes on.
 *
 * Threads: each card's own; the lock in here is a leaf.
 */
#pragma once

#include <sys/uio.h>

#include "base/err.h"
#include "base/types.h"

struct capture;
enum capture_direction { CAPTURE_TO_GUEST = 1, CAPTURE_FROM_GUEST = 2 }; /* inbound and outbound, as the card sees it (4.3.1, epb_flags) */

/* Makes or empties the file. A FIFO needs its reader first. 0, or a negative errno with err(). */
int capture_open(const char *path, const struct log *log, struct capture **out);
void capture_close(struct capture *c);                             /* NULL is fine; says so if the last of it could not be written */
/* Writes a card's interface block; *id is its number. */
int capture_interface(struct capture *c, const char *name, const u8 mac[6], unsigned *id);
void capture_frame(struct capture *c, unsigned id, enum capture_direction d, const struct iovec *iov, unsigned iovs, size_t len);
