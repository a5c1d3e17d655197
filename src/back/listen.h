/*
 * A socket that waits for clients: a Unix socket, of streams or of messages, whose file only its owner may open, or a TCP port on the
 * loopback address (which any user of this host may connect to). On one thread.
 */
#pragma once

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "base/types.h"

struct listener {
    int fd;                                                        /* -1: none; else non-blocking, listening */
    struct sockaddr_un address;                                    /* of a Unix socket */
    struct stat made;                                              /* its file, which is ours to remove */
};

/*
 * label, for messages: who listens. type: SOCK_STREAM or SOCK_SEQPACKET. A socket file that nobody listens to any more makes way. 0, or a negative errno
 * with err(); then it needs no closing.
 */
int listener_unix(struct listener *l, const char *label, const char *path, int type);
int listener_tcp(struct listener *l, const char *label, u16 port);
int listener_accept(const struct listener *l);                     /* a descriptor, or -1 */
void listener_close(struct listener *l);                           /* harmless when it is not open (fd -1) */
