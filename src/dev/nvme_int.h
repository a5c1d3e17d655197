/*
 * What the NVMe controller's files have in common, for those alone: registers, queues, save and load are nvme.c's, where the locking is told; admin commands
 * nvme_admin.c's; doorbells in memory nvme_shadow.c's; data, I/O commands and what comes back of them nvme_io.c's.
 */
#pragma once

#include <string.h>

#include "dev/nvme.h"

#define NVME_ENTRIES_MAX 1024u                                     /* CAP.MQES */
#define NVME_REQUESTS 256
#define NVME_EVENTS_MAX 4                                          /* asynchronous event requests that wait */
#define NVME_MDTS 8                                                /* 2^8 pages */
#define NVME_LBA_SHIFT 9
#define NVME_VERSION 0x00010400u

#define CC_IOSQES(cc) ((cc) >> 16 & 15)
#define CC_IOCQES(cc) ((cc) >> 20 & 15)
#define CSTS_RDY BIT(0)
#define CSTS_CFS BIT(1)

/* Status: type << 8 | code (4.6.1). */
enum {
    SC_SUCCESS = 0, SC_INVALID_OPCODE = 1, SC_INVALID_FIELD = 2, SC_DATA_TRANSFER = 4, SC_INTERNAL = 6, SC_INVALID_NS = 0xb, SC_PRP_OFFSET = 0x13,
    SC_WRITE_PROTECTED = 0x20, SC_LBA_RANGE = 0x80,
    SC_CQ_INVALID = 0x100, SC_QUEUE_ID = 0x101, SC_QUEUE_SIZE = 0x102, SC_EVENT_LIMIT = 0x105, SC_INTERRUPT_VECTOR = 0x108, SC_LOG_PAGE = 0x109,
    SC_QUEUE_DELETION = 0x10c, SC_NOT_SAVEABLE = 0x10d, SC_NOT_CHANGEABLE = 0x10e,
    SC_WRITE_FAULT = 0x280, SC_READ_ERROR = 0x281,
    LATER = -1,                                                    /* ours: it is not done with */
};

enum { FEAT_ARBITRATION = 1, FEAT_POWER, FEAT_TEMPERATURE = 4, FEAT_ERROR_RECOVERY, FEAT_WRITE_CACHE, FEAT_QUEUES, FEAT_COALESCING, FEAT_VECTOR, FEAT_ATOMICITY,
       FEAT_EVENTS, FEATS };

struct nvme_command {
    u8 opcode, flags;
    u16 cid;
    u32 nsid;
    u64 unused, metadata;
    u64 prp[2];
    u32 cdw[6];                                                    /* 10 to 15 */
};
_Static_assert(sizeof(struct nvme_command) == 64, "as in 4.2");

struct nvme_completion {
    u32 dw0, dw1;
    u16 sq_head, sq_id, cid, status;
};
_Static_assert(sizeof(struct nvme_completion) == 16, "as in 4.6");

struct nvme_range {
    u32 attributes, lbas;
    u64 lba;
};

struct nvme_sq {
    bool exists, deleting;
    u16 cq;
    u16 head, tail;
    u32 entries;
    u64 gpa;
    u16 delete_cid;                                                /* of the command that waits for the last of its commands */
    unsigned outstanding;
    u32 event;                                                     /* EventIdx as it was written last, and one; 0: not yet */
};

struct nvme_cq {
    bool exists, interrupts, phase, posted;
    u16 vector;
    u16 head, tail;
    u32 entries;
    u64 gpa;
    unsigned reserved;                                             /* places for commands that were fetched */
    u32 event;
};

struct nvme_part {
    u64 gpa;
    u32 len;
};

struct nvme_request {
    struct nvme *nvme;
    struct nvme_request *next_free;
    bool busy;
    u16 sq;
    struct nvme_command cmd;
    struct block_req io;
    bool flush;                                                    /* what was written is to be flushed */
    struct nvme_range *range;
    unsigned ranges, ranged;                                       /* how many, and how many are done */
    struct nvme_part *part;                                             /* of guest memory, writable ones between ram_begin_write() and ram_end_write() */
    unsigned parts;
    bool writable;
    struct iovec *iov;
};

struct nvme {
    struct device device;
    struct pci_fn fn;
    struct nvme_config config;
    struct block *block;
    char serial[20];
    u32 cc, csts, aqa, intms;
    u64 asq, acq;
    bool shadowed;                                                 /* doorbells are in memory: shadow, and event says which are to be rung */
    u64 shadow, event;
    bool master, stopping, gone, dirty, flushing;
    u32 feature[FEATS];
    struct nvme_sq sq[NVME_QUEUES_MAX + 1];
    struct nvme_cq cq[NVME_QUEUES_MAX + 1];
    struct nvme_request request[NVME_REQUESTS];
    struct nvme_request *free;
    unsigned in_flight;                                            /* at the host */
    u64 room;                                                      /* what is left of BLOCK_AT_ONCE_MAX */
    pthread_cond_t idle;                                           /* a request has come back or is held, or a flush has ended */
    u16 event_cid[NVME_EVENTS_MAX];
    unsigned events;
    bool changed, changed_told;                                    /* the namespace: and whether the driver was told since it has looked */
    int logged;
    struct block_counts counts;
    struct block_req again;
    bool again_sent;
    struct block_req flush;                                        /* of quiesce and shutdown */
};

static inline bool nvme_running(const struct nvme *n)
{
    return (n->csts & CSTS_RDY) && !(n->csts & CSTS_CFS) && !n->stopping && pci_bus_master(&n->fn);
}

static inline unsigned nvme_used(const struct nvme_cq *q)
{
    return (q->tail + q->entries - q->head) % q->entries;
}

static inline bool nvme_has_place(const struct nvme_cq *q)
{
    return nvme_used(q) + q->reserved + 1 < q->entries;
}

/* What the driver has taken; only over what is there: else places would be taken that are reserved. */
static inline void nvme_set_head(struct nvme_cq *q, u32 head)
{
    if (head < q->entries && (head + q->entries - q->head) % q->entries <= nvme_used(q))
        q->head = (u16)head;
}

static inline u64 nvme_lbas(const struct nvme *n)
{
    return block_size(n->block) >> NVME_LBA_SHIFT;
}

static inline void put16(u8 *p, u16 v)
{
    memcpy(p, &v, sizeof(v));
}

static inline void put32(u8 *p, u32 v)
{
    memcpy(p, &v, sizeof(v));
}

static inline void put64(u8 *p, u64 v)
{
    memcpy(p, &v, sizeof(v));
}

/* nvme.c */
void nvme_post(struct nvme *n, u16 sq, u16 cid, u32 dw0, int status);
void nvme_release(struct nvme_request *r);
void nvme_complete(struct nvme_request *r, u32 dw0, int status);
void nvme_came_back(struct nvme *n);                               /* a command that was at the host */

/* nvme_io.c, nvme_admin.c. The status; LATER: nvme_complete() will be called, or has no need to be. */
int nvme_io_command(struct nvme_request *r, bool at_once);
int nvme_admin_command(struct nvme_request *r, u32 *dw0);
int nvme_copy_data(struct nvme_request *r, void *buf, u32 len, bool to_guest); /* between a buffer and the command's data, of which there are len bytes */
void nvme_host_error(struct nvme *n, const struct block_req *io);
void nvme_tell_events(struct nvme *n);                             /* asynchronous ones that the driver waits for */

/* nvme_shadow.c; all but the first do nothing while doorbells are registers alone. */
int nvme_shadow_config(struct nvme *n, const struct nvme_command *c); /* the status */
void nvme_shadow_created(struct nvme *n, unsigned id, bool cq);
void nvme_take_tail(struct nvme *n, unsigned id);                  /* of a submission queue, from memory */
void nvme_take_head(struct nvme *n, unsigned id);                  /* of a completion queue */
bool nvme_listen(struct nvme *n);                                  /* who goes on rings; true: somebody did go on, look again */
