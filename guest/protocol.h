/*
 * What doppel and the default guest's init say to each other. Both sides include this file.
 *
 * Kernel parameters (read by init from /proc/cmdline; NAME=VALUE without a dot reaches its environment by way of the
 * kernel):
 *   doppel.run=1             command mode: wait for the port doppel.ctl and run what it says; else a shell
 *   doppel.root=TYPE         the shell or command runs in the file system of TYPE (virtiofs, 9p) with tag doppel-root, below an overlay
 *                            that takes what is written; by default in the command's working directory there, else /root
 *   root=DEVICE              without doppel.run=1: the system on that disk takes over (its init=, else /sbin/init); with it, the command
 *                            runs there
 *   doppel.net=wait          a command is run when the network cards have their addresses, or after 6 s without
 *   doppel.net=off           drivers of network cards are loaded, and no more is done about them
 *   doppel.rows=N, .cols=N   size of the terminal behind the serial console, where known
 *   TERM=NAME                its kind
 *
 * Ports of the virtio console, found by name (/sys/class/virtio-ports/X/name). Each is open on the host's side from the
 * start. Init opens doppel.ctl when it listens to the power button already: what was pressed before, the host presses
 * again then. The host sends on a port only after the guest has opened it (Linux discards what comes earlier) and never
 * closes one.
 *   doppel.ctl      messages in both directions, as below; may be there in shell mode too (WINSIZE: the console)
 *   doppel.stdin    bytes to the command
 *   doppel.stdout, doppel.stderr     bytes from it; with RUN_TTY all output is on doppel.stdout
 *
 * Ports are not ordered among each other, so every end of a stream is told on doppel.ctl with the count of bytes that
 * belong to it: the receiver takes exactly as many from the port, however late they come. EXITED is sent when the
 * command has ended and its counts are known, maybe before the last bytes of output. When the host has taken all of
 * them from the ports (it may discard them), it answers DONE: only then is nothing left in a queue that would be lost
 * with the guest, which syncs, unmounts and switches the machine off.
 *
 *   guest                                    host
 *   READY                          ------>
 *                                  <------   RUN
 *                                  <------   WINSIZE, SIGNAL, TIME, STDIN_EOF, STDOUT_CLOSED, STDERR_CLOSED   as they happen
 *   STDOUT_EOF, STDERR_EOF, STDIN_CLOSED ->  as they happen
 *   EXITED                         ------>
 *                                  <------   DONE
 *   (power off)
 *
 * A message is struct msg_head and len bytes of payload. All integers are little-endian, all structs without padding.
 * Unknown types are skipped. A message longer than MSG_MAX, or one that does not parse, is an error of the sender: the
 * guest reports EXITED with EXIT_PROTOCOL; the host treats it as a failure of the guest (the guest is not trusted).
 */
#pragma once

#include <stdint.h>

#define PROTOCOL_VERSION 1
#define MSG_MAX (2u << 20)                                         /* bytes of payload; in practice RUN's arguments */

#define PORT_CTL    "doppel.ctl"
#define PORT_STDIN  "doppel.stdin"
#define PORT_STDOUT "doppel.stdout"
#define PORT_STDERR "doppel.stderr"

struct msg_head {
    uint32_t type;                                                 /* enum msg_type */
    uint32_t len;                                                  /* bytes that follow */
};

enum msg_type {
    /* host to guest */
    MSG_RUN = 1,           /* struct msg_run and strings; once */
    MSG_STDIN_EOF = 2,     /* struct msg_count: standard input ends after so many bytes */
    MSG_STDOUT_CLOSED = 3, /* nobody reads standard output any more: the command gets SIGPIPE */
    MSG_STDERR_CLOSED = 4,
    MSG_WINSIZE = 5,       /* struct msg_winsize */
    MSG_SIGNAL = 6,        /* struct msg_signal: to the command's process group */
    MSG_DONE = 7,          /* all output that EXITED counts has arrived; the last message */
    MSG_TIME = 8,          /* struct msg_time: the guest stood still, and its clock is behind; at any time */
    /* guest to host */
    MSG_READY = 64,        /* struct msg_ready: RUN is awaited */
    MSG_STDOUT_EOF = 65,   /* struct msg_count: standard output ended after so many bytes, the command may still run */
    MSG_STDERR_EOF = 66,
    MSG_STDIN_CLOSED = 67, /* no payload: the command reads no more input; what still comes is discarded */
    MSG_EXITED = 68,       /* struct msg_exited; the last message */
};

#define RUN_TTY 1u                          /* run it on a pseudo-terminal: one terminal for input, output and errors */
#define RUN_STDIN_CLOSED 2u                     /* the caller has no standard input, output, error at all: /dev/null, */
#define RUN_STDOUT_CLOSED 4u                                       /* or for outputs a pipe that nobody reads */
#define RUN_STDERR_CLOSED 8u

struct msg_run {
    uint32_t flags;                                                /* RUN_* */
    uint16_t rows, cols;                                           /* with RUN_TTY; 0: not known */
    uint32_t argc, envc;                                           /* argc >= 1 */
    /* Then 1 + argc + envc strings, each with its NUL, nothing behind: working directory ("": the default, /root),
     * arguments, NAME=VALUE added to the command's environment (TERM, ...). */
};
struct msg_count {
    uint64_t bytes;                                                /* since the start */
};
struct msg_winsize {
    uint16_t rows, cols;
};
struct msg_signal {
    uint32_t signal;                                               /* Linux x86-64 numbers, 1..64 */
};
struct msg_time {
    uint64_t ns;                                                   /* since 1970, UTC */
};
struct msg_ready {
    uint32_t version;                                              /* PROTOCOL_VERSION */
};
struct msg_exited {
    uint32_t how;                                                  /* enum exit_how */
    uint32_t code;                /* EXIT_STATUS: 0..255; EXIT_SIGNAL: its number; EXIT_EXEC, EXIT_PROTOCOL: an errno */
    uint64_t stdout_bytes, stderr_bytes;                           /* all that the host will get on these ports */
};
enum exit_how {
    EXIT_STATUS = 0,
    EXIT_SIGNAL = 1,
    EXIT_EXEC = 2,               /* could not be started: doppel exits with 127 for ENOENT, else with 126, as sh does */
    EXIT_PROTOCOL = 3,                                             /* the guest did not understand the host */
};
