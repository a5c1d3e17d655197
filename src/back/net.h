/*
 * The host end of a network card: where its frames go, and where they come from.
 *
 * Each back end has a thread of its own, on which all of it happens: it takes what the guest has waiting (front's transmit()), waits for its
 * descriptors, and delivers what came. So nothing of the network runs on a vCPU's thread or delays the loop's timers, and a back end needs no locks.
 *
 * A frame comes with a struct virtio_net_hdr (virtio 1.2, 5.1.6: the same as on a tap) that says what is left to be done: a checksum to be filled in, a
 * TCP segment to be cut. A back end says what it takes in that way (net_ops.takes); the rest is done before it sees a frame, by net_offload.h.
 *
 * Flow control. To the host: send() says "not now", transmit() stops, and is called again when the back end is ready. To the guest: receive() says
 * "not now"; the frame waits, and the back end reads no more (net_full()) until the front end calls net_receive_ready().
 *
 * Threads: net_kick, net_receive_ready, net_guest_takes, net_set_link, net_counts from any; net_open and net_close by the owner; the rest on the card's thread.
 */
#pragma once

#include <linux/virtio_net.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/uio.h>

#include "base/err.h"
#include "base/types.h"

#define NET_MAC 6
#define NET_HEADER 14                                              /* of Ethernet: addresses and type */
#define NET_VLAN 4                                                 /* a VLAN's tag in it */
#define NET_MTU 1500
#define NET_MTU_MIN 68                                             /* RFC 791 */
#define NET_MTU_MAX 65520                                          /* an IP packet of that size still has room for its link's header in 64 KiB */
#define NET_FRAME_MAX (65535 + NET_HEADER + NET_VLAN)
#define NET_QUEUES_MAX 8
#define NET_ANY_QUEUE (~0u)

/* What can be left undone in a frame. */
enum { NET_CSUM = 1, NET_TSO4 = 2, NET_TSO6 = 4 };

struct net_frame {
    struct virtio_net_hdr hdr;                                     /* all zero: nothing is left to be done */
    const struct iovec *iov;                                       /* from the Ethernet header on; guest memory may change while it is read */
    unsigned iovs;
    size_t len;
    unsigned queue;                                                /* from the guest: of this pair; to it: NET_ANY_QUEUE, or as the back end says */
};

/* The card. All on the back end's thread, with no lock held. */
struct net_front_ops {
    void (*transmit)(void *front);                                 /* net_send() for all that waits, until there is no more or it returns false */
    bool (*receive)(void *front, const struct net_frame *f);       /* false: there is no room for it now */
    void (*received)(void *front);                                 /* after one or more frames: the guest may be told */
    void (*present)(void *front, bool there);                      /* the host's end has gone: no link any more; or is back */
};

struct net;
struct net_poll;
struct net_ops {
    const char *kind;
    unsigned takes;                                                /* NET_*: of frames from the guest */
    unsigned large;                                                /* takes TCP segments beyond the MTU, if their checksums are done, in frames so long; 0: none */
    /* Sends a frame, or drops it. False: not now; it comes again. */
    bool (*send)(struct net *n, const struct net_frame *f);
    void (*prepare)(struct net *n, struct net_poll *p);            /* what is to be waited for */
    void (*serve)(struct net *n, struct net_poll *p);              /* it has happened, or time is up */
    void (*guest_takes)(struct net *n, unsigned offloads);         /* NET_*: of frames to the guest; may be NULL */
    void (*info)(struct net *n, FILE *f);                          /* behind the kind, for people; any thread; may be NULL */
    void (*close)(struct net *n);                                  /* the thread has ended; frees n */
};

/* One round of waiting. */
struct net_poll {
    struct pollfd *fd;
    unsigned fds, cap;
    int timeout_ms;                                                /* -1: for ever */
};
/* Returns an index into p->fd. */
unsigned net_poll_add(struct net_poll *p, int fd, short events);
void net_poll_timeout(struct net_poll *p, int ms);                 /* not longer than that */

struct net_counts {
    u64 sent, sent_bytes, received, received_bytes;                /* by the guest */
    u64 sent_dropped, received_dropped;
};

struct capture;
struct net_thread;

/* A back end's struct begins with this. */
struct net {
    const struct net_ops *ops;
    const struct log *log;
    char name[96];                                                 /* for messages: "user", "tap tap0" */
    unsigned queues;                                               /* of the back end; 1 at least */
    u16 mtu;                                                       /* of the guest's side */
    atomic_uint guest;                                             /* NET_*: what the guest takes */
    atomic_bool link;                                              /* false: what comes is dropped, in both directions */
    struct net_thread *thread;
};

struct net_config {
    unsigned index;                                                /* of the card */
    u8 mac[NET_MAC];
    u16 mtu;                                                       /* 0: as the back end likes */
    const struct log *log;
};

/* --- for the card --- */

/* Begins: from now on front is called. capture may be NULL and is borrowed. After an error, with err(), n is as it was. */
int net_start(struct net *n, const struct net_front_ops *ops, void *front, struct capture *capture, unsigned capture_id);
void net_close(struct net *n);                                     /* NULL is fine */
void net_kick(struct net *n);                                      /* there is something to transmit */
void net_receive_ready(struct net *n);                             /* there is room again, or all that waits is to be tried again */
void net_guest_takes(struct net *n, unsigned offloads);
void net_set_link(struct net *n, bool up);
struct net_counts net_counts(const struct net *n);
/* In transmit(). False: not now; it will be called again. */
bool net_send(struct net *n, const struct net_frame *f);

/* --- for back ends --- */

void net_init(struct net *n, const struct net_ops *ops, const struct net_config *c, const char *name);
/* A frame for the guest. What it has no room for waits, up to a limit; then frames are dropped. */
void net_deliver(struct net *n, const struct net_frame *f);
bool net_full(const struct net *n);                                /* some wait: read no more */

/* The host's end has gone: no frame passes until net_found(), if that ever comes. What the user is told is the back end's affair. On the card's thread. */
void net_lost(struct net *n);
void net_found(struct net *n);

/* Bytes of a frame from off on; less than len at its end. */
size_t net_copy(const struct net_frame *f, size_t off, void *buf, size_t len);
