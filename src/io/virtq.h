/*
 * The one ring reader: split and packed virtqueues (virtio 1.2, 2.7 and 2.8) with indirect descriptors and event index.
 *
 * virtq_pop() takes a descriptor chain from the ring, copies each descriptor once, checks it, and shows the device two lists of host pieces:
 * what it may read (out) and what it may write (in). Nothing else of doppel looks at descriptors, so nothing else needs to distrust them.
 * A ring that breaks the rules makes its queue `broken`; the device then asks the driver for a reset (virtio.h) and leaves the ring alone.
 *
 * From pop to push (or drop), the writable pieces stand between ram_begin_write() and ram_end_write().
 *
 * In a packed ring (2.8) `desc` is the ring, `avail` and `used` are the driver's and the device's event suppression; avail_idx and used_idx are places in
 * the ring, each with a wrap counter. Threads: under the device's lock.
 */
#pragma once

#include "base/stream.h"
#include "mem/ram.h"

#define VIRTQ_SIZE_MAX 1024
#define VIRTQ_DESCS_MAX 1024           /* in one chain, indirect ones included */
#define VIRTQ_PARTS_MAX (2 * VIRTQ_DESCS_MAX) /* a chain's own descriptors, and those of its table */
#define VIRTQ_PIECES_MAX 16384         /* host pieces of one chain */

struct virtq {
    struct ram *ram;
    u16 size_max;                                                  /* what the device offers */
    u16 size;                                                      /* what the driver chose: a power of two */
    u64 desc, avail, used;                                         /* gpa of the three areas */
    bool enabled;
    bool broken;                                                   /* until reset */
    bool event_idx, indirect, packed;                              /* negotiated */
    u16 avail_idx;                                                 /* next entry of the available ring to take */
    u16 used_idx;                                                  /* next entry of the used ring to fill */
    bool avail_wrap, used_wrap;                                    /* packed: of the two */
    u16 unsignalled;                                               /* entries filled since the last look whether to interrupt */
    u16 vector;                                                    /* the transport's: MSI-X vector */
};

struct virtq_part {
    u64 gpa;
    u32 len;
    bool writable;
};

/* Belongs to the device's request and is used again and again; all zero at first. Pieces and counts shrink as the device consumes them. */
struct virtq_chain {
    u16 head;                                                      /* what the driver knows it by: its first descriptor, or (packed) its ID */
    u16 entries;                                                   /* of a packed ring that it takes */
    struct iovec *out, *in;                                        /* host pieces left: readable, writable */
    unsigned outs, ins;
    u64 out_len, in_len;                                           /* bytes left in them */
    u64 out_total, in_total;                                       /* bytes in the whole chain */
    /* the reader's own */
    struct iovec *iov;
    unsigned iov_cap;
    struct virtq_part *part;                                       /* guest ranges of its descriptors */
    unsigned parts, part_cap;
};

void virtq_init(struct virtq *q, struct ram *ram, u16 size_max);
void virtq_reset(struct virtq *q);
/* The driver enables the queue: are the areas aligned and in RAM? Otherwise the queue is broken. */
void virtq_enable(struct virtq *q);
void virtq_state(struct virtq *q, struct stream *s);

/* Takes the next chain: 1, or 0 when the ring is empty, or -EPROTO when it is broken. Errors leave nothing to release. */
int virtq_pop(struct virtq *q, struct virtq_chain *c);
/* Saves a chain that was popped; or loads it, whole again. After an error of the stream there is none. */
void virtq_chain_state(struct virtq *q, struct virtq_chain *c, struct stream *s);
/* Gives the chain back; len bytes at least were written, from the beginning of its writable part. */
void virtq_push(struct virtq *q, struct virtq_chain *c, u32 len);
/* Gives n chains back, in the order in which they were taken, at one moment: the driver sees all of them or none. */
void virtq_push_all(struct virtq *q, struct virtq_chain *c, const u32 *len, unsigned n);
void virtq_drop(struct virtq *q, struct virtq_chain *c);           /* forgets it: the queue was reset */
/* Puts the chain just popped back: the next pop finds it again. */
void virtq_unpop(struct virtq *q, struct virtq_chain *c);
void virtq_chain_free(struct virtq_chain *c);

bool virtq_empty(struct virtq *q);                                 /* a hint: more may come at any time */
/* Whether the driver wants an interrupt for what was pushed since the last call. Once per batch. */
bool virtq_wants_interrupt(struct virtq *q);
/* Asks the driver not to, or again to, notify us. virtq_listen() returns true when chains came meanwhile: look again. */
void virtq_ignore(struct virtq *q);
bool virtq_listen(struct virtq *q);

/* Copy between the chain and a buffer, consuming the chain; the number of bytes copied (less than len at its end). */
size_t virtq_read(struct virtq_chain *c, void *buf, size_t len);
size_t virtq_write(struct virtq_chain *c, const void *buf, size_t len);
void virtq_skip_out(struct virtq_chain *c, u64 len);               /* consumes without copying; len <= out_len */
void virtq_skip_in(struct virtq_chain *c, u64 len);
u8 *virtq_take_last_in(struct virtq_chain *c);                     /* cuts off and returns the last writable byte; NULL if there is none */
