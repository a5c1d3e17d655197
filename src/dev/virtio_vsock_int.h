/*
 * What the vsock device's files have in common, for those alone: queues, packets from the guest, save and load are virtio_vsock.c's, where states and locking are told; the table of
 * connections, their descriptors and packets to the guest virtio_vsock_conn.c's; credit and streams virtio_vsock_data.c's; messages virtio_vsock_seq.c's.
 *
 * All of it with the device's lock held, on the loop's thread; but for vsock_guest_data(), see send_at_once().
 */
#pragma once

#include <linux/virtio_vsock.h>

#include "dev/virtio_vsock.h"

#define VSOCK_RX 0
#define VSOCK_TX 1
#define VSOCK_EVENTS 2
#define VSOCK_CONNS_MAX 1024
#define VSOCK_BUCKETS 256
#define VSOCK_BUF_ALLOC (256 * KiB)
#define VSOCK_EMPTY_MAX 4096u                                      /* messages without bytes that wait for the host */
#define VSOCK_RING ((u32)VSOCK_BUF_ALLOC + VSOCK_EMPTY_MAX)        /* bytes of a connection that wait for the host, and empty messages */
#define VSOCK_TELL_AFTER (64 * KiB)                                /* forwarded bytes that the guest has not been told of */
#define VSOCK_PIECE_MAX (64 * KiB)
#define VSOCK_RESETS_MAX 64
#define VSOCK_SHUT_BOTH (VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND)

enum vsock_conn_state { CALLED_BY_HOST, CALLED_BY_GUEST, OPEN, CLOSING, DRAINING };
/* In the order in which they are said. */
enum vsock_say { SAY_REQUEST = 1, SAY_RESPONSE = 2, SAY_ASK_CREDIT = 4, SAY_CREDIT = 8, SAY_SHUTDOWN = 16, SAY_RST = 32 };

struct vsock_address {
    u32 cid, port, guest_port;                                     /* the other side's, and the guest's port */
};

/* Bits for a ring's bytes. */
struct vsock_ends {
    u64 end[VSOCK_RING / 64];                                      /* the last of a message */
    u64 eor[VSOCK_RING / 64];                                      /* which had VIRTIO_VSOCK_SEQ_EOR */
    u64 empty[VSOCK_RING / 64];                                    /* no data: an empty message */
};

struct vsock_conn {
    struct virtio_vsock *v;
    struct vsock_conn *hash_next, *prev, *next;
    struct vsock_address at;
    enum vsock_conn_state state;
    bool seq, marked;                                              /* messages; with a mark before each of the host's */
    u8 say;
    int fd;                                                        /* -1: closed */
    struct loop_fd watch;
    u32 watched;                                                   /* events, while watch.loop */
    /* to the guest */
    u32 guest_alloc, guest_fwd, sent;                              /* as in its last packet; modulo 2^32 */
    bool asked;                                                    /* for credit, since it was last given */
    bool stuck;                                                    /* no credit, or no buffer in the ring */
    bool host_ended, host_gone;                                    /* the host's side sends no more; is not there any more */
    u8 shut;                                                       /* VIRTIO_VSOCK_SHUTDOWN_* that the guest was or is to be told */
    u8 *message;                                                   /* taken from the host, and not all with the guest: message[message_at, message_len) */
    u32 message_at, message_len, message_flags;                    /* the last: of its last packet */
    /* from the guest */
    u8 *buf;                                                       /* a ring of VSOCK_RING bytes, once it is needed */
    u32 head, len;
    struct vsock_ends *ends;                                       /* of messages */
    u32 whole, empty;                                              /* messages with their ends in it, and those of them that are no bytes */
    u32 forwarded, told;                                           /* bytes that the host has taken; as the guest knows */
    u8 guest_shut;
    bool answers;                                                  /* the host has sent something since the guest has */
    bool late;                                                     /* the loop is to call vsock_rewatch() */
    bool write_ended;                                              /* the end of the guest's data was passed on, or nobody wants it */
};

struct virtio_vsock {
    struct virtio virtio;
    struct virtio_vsock_config config;
    struct loop *loop;
    struct vsock_host *host;
    bool posted;
    bool starved;                                                  /* something waits for a buffer of the guest's */
    bool say_lost;                                                 /* TRANSPORT_RESET is to be said */
    bool late;                                                     /* there are connections that are */
    u64 instance, events;                                          /* which device this is, and how often its state has changed */
    struct virtio_vsock_counts counts;
    struct virtq_chain tx, rx;
    struct vsock_conn *bucket[VSOCK_BUCKETS];
    struct vsock_conn *first, *last;                               /* all */
    unsigned conns;
    u32 next_port;
    struct { struct vsock_address at; u16 type; } reset[VSOCK_RESETS_MAX]; /* answers to packets without a connection */
    unsigned reset_head, resets;
    u8 piece[VSOCK_PIECE_MAX];
};

static inline void vsock_lock(struct virtio_vsock *v)
{
    pthread_mutex_lock(&v->virtio.device.lock);
}

static inline void vsock_unlock(struct virtio_vsock *v)
{
    pthread_mutex_unlock(&v->virtio.device.lock);
}

/* virtio_vsock.c */
void vsock_post(struct virtio_vsock *v);                           /* any thread: the loop is to look at the queues, and what is to be said */

/* virtio_vsock_conn.c */
struct vsock_conn *vsock_conn_find(struct virtio_vsock *v, const struct vsock_address *at);
/* NULL: too many, or no memory. fd is the connection's from now on, also then. */
struct vsock_conn *vsock_conn_new(struct virtio_vsock *v, const struct vsock_address *at, int fd, enum vsock_conn_state state, enum vsock_kind kind);
void vsock_conn_unhash(struct vsock_conn *c);                      /* the guest may use its address anew */
void vsock_conn_requeue(struct vsock_conn *c);                     /* behind all others */
void vsock_conn_free(struct vsock_conn *c);
void vsock_say(struct vsock_conn *c, u8 what);
/* The end, from our side: the guest gets RST as soon as it has a buffer for it. */
void vsock_finish(struct vsock_conn *c);
void vsock_tell_shut(struct vsock_conn *c, u8 flags);              /* what the guest is told of the directions that have ended */
bool vsock_wants_read(const struct vsock_conn *c);
void vsock_rewatch(struct vsock_conn *c);                          /* after all that may change what is awaited of the descriptor */
bool vsock_pop_or_listen(struct virtio_vsock *v, unsigned n, struct virtq_chain *c);
/* A buffer for a header and so many bytes at least, in v->rx. False: there is none now. */
bool vsock_take_buffer(struct virtio_vsock *v, u32 len);
void vsock_put_packet(struct vsock_conn *c, u16 op, u32 flags, const void *data, u32 len); /* into that buffer */
bool vsock_say_one(struct vsock_conn *c, u8 what);                 /* false: the guest has no buffers left */
bool vsock_say_all(struct virtio_vsock *v);
void vsock_incoming(void *arg, int fd, u32 cid, u32 from, u32 to, enum vsock_kind kind); /* of struct vsock_host_ops; takes the lock */

/* virtio_vsock_data.c */
u32 vsock_credit(const struct vsock_conn *c);                      /* bytes that the guest has room for */
bool vsock_may_go_on(const struct vsock_conn *c);                  /* has it credit, or does it need none? */
void vsock_forget(struct vsock_conn *c);                           /* what waits for the host */
/* Room and a buffer: how many bytes go into the latter. 0: there is none now. */
u32 vsock_take_room(struct vsock_conn *c);
void vsock_host_ends(struct vsock_conn *c, ssize_t n);
void vsock_to_guest(struct vsock_conn *c);
void vsock_feed_stuck(struct virtio_vsock *v);                     /* the guest has new buffers */
void vsock_host_deaf(struct vsock_conn *c);
void vsock_check_ends(struct vsock_conn *c);                       /* may free c, if it is DRAINING; so may flush */
void vsock_forward(struct vsock_conn *c, u32 n);                   /* the host has taken n bytes more */
void vsock_flush(struct vsock_conn *c);
/* Behind what waits already. There is room: that was checked. False: no memory. */
bool vsock_keep(struct vsock_conn *c, struct virtq_chain *chain, u32 len);
void vsock_guest_data(struct vsock_conn *c, struct virtq_chain *chain, u32 len, u32 flags);

/* virtio_vsock_seq.c */
bool vsock_read_message(struct vsock_conn *c);                     /* a packet of a message; false: nothing more to be done now */
void vsock_flush_messages(struct vsock_conn *c);
void vsock_guest_message(struct vsock_conn *c, struct virtq_chain *chain, u32 len, u32 flags);
