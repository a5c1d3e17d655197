/*
 * The host's side of a guest's vsock: which Unix socket stands for which address. dev/virtio_vsock.c speaks with the guest.
 *
 *   to the guest      a client connects to PATH and sends "CONNECT PORT\n"; when the guest has accepted, it reads "OK N\n", N being
 *                     the port that the guest sees it at; from then on the socket is the connection. If the guest refuses, it is closed.
 *   to the host       the guest connects to CID 2, port P: that is the Unix socket PATH_P, where the host's program listens
 *   to another guest  of the same user, by its CID: PEERS/.cid-N/vsock is the other doppel's PATH. "CONNECT PORT FROM CID:PORT\n" names
 *                     who calls, which is believed: the socket's file is open to its owner only.
 *
 * Sockets of messages (SOCK_SEQPACKET) are apart: they are called at PATH.seq (PEERS/.cid-N/vsock.seq), by a message for each of these lines, and a guest's call goes to
 * PATH_P as a SOCK_SEQPACKET; it is refused if that is a stream's. Each message of the guest's is one of that socket's, and the other way round. Empty ones pass: whoever
 * expects them has to tell them from the end, which recv() shows in the same way. MSG_EOR does not, as Unix sockets do not have it.
 *
 * For programs that want all of it there are marked messages: each has one byte before it, 1 (VSOCK_MARK_EOR) if it was sent with MSG_EOR, otherwise 0; so none is empty. A
 * client asks for them by "MARKED" behind what it says to PATH.seq ("CONNECT 5000 MARKED\n"); a guest's call goes to PATH_P.marked before PATH_P. Handshakes have no marks.
 * Between guests messages are marked.
 *
 * On the loop's thread (or before it runs). Callbacks come with no lock held.
 */
#pragma once

#include "base/err.h"
#include "base/loop.h"

#define VSOCK_CID_HOST 2u
#define VSOCK_CID_FIRST 3u                                         /* of guests */
#define VSOCK_CID_MAX 0xfffffffeu
#define VSOCK_PEER_NAME ".cid-%u"                                  /* in the folder of peers: a folder, or a link to one */
#define VSOCK_SOCKET_NAME "vsock"                                  /* in there */
#define VSOCK_SEQ_SUFFIX ".seq"                                    /* behind it, for messages */
#define VSOCK_MARKED_SUFFIX ".marked"                              /* behind PATH_P, for marked ones */
#define VSOCK_MARK_EOR 1

struct vsock_host;
enum vsock_kind { VSOCK_STREAM, VSOCK_MESSAGES, VSOCK_MARKED };

struct vsock_host_config {
    const char *path;                                              /* where clients connect; borrowed */
    const char *peers;                                             /* the folder with other guests; NULL: none can be reached; borrowed */
    u32 cid;                                                       /* this guest's */
    const struct log *log;
};

/* Somebody calls the guest's port `to`: a program (cid VSOCK_CID_HOST, port 0: any will do), or another guest. fd is the callee's now. */
struct vsock_host_ops {
    void (*incoming)(void *arg, int fd, u32 cid, u32 from, u32 to, enum vsock_kind kind);
};

/* Listens. 0, or a negative errno with err(). */
int vsock_host_new(struct loop *loop, const struct vsock_host_config *config, struct vsock_host **out);
void vsock_host_free(struct vsock_host *h);                        /* NULL is fine */
/* Begins to take clients. The device calls it; ops NULL: no more. */
int vsock_host_serve(struct vsock_host *h, const struct vsock_host_ops *ops, void *arg);
u32 vsock_host_cid(const struct vsock_host *h);

/*
 * The guest calls. A descriptor that does not block, or a negative errno (without err(): a guest that calls where nobody is is no fault of
 * the host's). With a cid other than VSOCK_CID_HOST the answer has to be awaited: vsock_host_answer().
 * Where VSOCK_MESSAGES are wanted, they may be marked: *kind says so then.
 */
int vsock_host_call(struct vsock_host *h, u32 cid, u32 from, u32 to, enum vsock_kind *kind);
/* Looks for "OK ...\n" at the beginning of what fd brings, and takes it: 1; 0: not there yet; negative errno: refused. */
int vsock_host_answer(int fd, bool seq);
/* Tells the client that the guest has accepted. 0 or negative errno. */
int vsock_host_accepted(int fd, u32 port);
/* A descriptor was closed: clients may be taken again, if there were too many. */
void vsock_host_closed(struct vsock_host *h);
