/*
 * What doppel exec and cp say to the agent in a guest, over one vsock connection for each. Both sides include this file; messages, limits and
 * ends are those of guest/protocol.h where they are the same.
 *
 *   agent                                    doppel
 *   HELLO                          ------>
 *                                  <------   EXEC | PUT | GET
 *   exec:
 *                                  <------   STDIN, STDIN_EOF, WINSIZE, SIGNAL, STDOUT_CLOSED, STDERR_CLOSED   as they happen
 *   STDOUT, STDERR, STDIN_TAKEN, STDIN_CLOSED -> as they happen
 *   EXITED | ERROR                 ------>   the last message: all output stands before it
 *   cp:
 *   a tree (back/tree.h) one way, struct tree_result the other; or ERROR and no tree: GET is answered by OK first, PUT as well
 *
 * A message is struct msg_head and len bytes. Of standard input at most AGENT_WINDOW bytes are on their way: those that the command has taken are
 * told by STDIN_TAKEN. So a command that does not read holds up nothing but its input. Unknown types are skipped; a message that is too long or
 * does not parse ends the connection. When doppel goes away, the command gets SIGHUP.
 *
 * The agent listens at AGENT_PORT, which only root of the guest can take, and speaks with the host (CID 2) only.
 */
#pragma once

#include "../guest/protocol.h"

#define AGENT_PORT 1019u
#define AGENT_VERSION 1u
#define AGENT_DATA_MAX 65536u                                      /* bytes of payload, but of EXEC (MSG_MAX) */
#define AGENT_WINDOW 262144u

enum agent_type {
    /* to the guest */
    AGENT_EXEC = 128,      /* struct msg_run and strings, each with its NUL: working directory ("": the user's), user ("": root), arguments,
                            * NAME=VALUE added to the environment */
    AGENT_PUT = 129,       /* a path: a tree is to be written there */
    AGENT_GET = 130,       /* struct agent_get and a path: that tree is to be sent */
    AGENT_STDIN = 131,     /* bytes */
    AGENT_STDIN_EOF = 132,
    /* to the host */
    AGENT_HELLO = 192,     /* struct msg_ready with AGENT_VERSION */
    AGENT_STDOUT = 193,    /* bytes */
    AGENT_STDERR = 194,
    AGENT_STDIN_TAKEN = 195,   /* struct msg_count: so many more */
    AGENT_ERROR = 196,     /* text: it could not be done */
    AGENT_OK = 197,        /* the tree begins */
};

struct agent_get {
    uint32_t recursive;                                            /* folders too */
};
