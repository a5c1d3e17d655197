/*
 * NVM Express controller (see nvme.h; NVM Express Base Specification 1.4): admin and I/O queues, PRP lists, MSI-X and INTx, read, write, flush, write zeroes,
 * dataset management, asynchronous events (the disk has become larger), shutdown.
 *
 *   BAR 0, 16 KiB:  0x0000 registers (3.1)   0x1000 doorbells, 4 bytes apart
 *   BAR 4,  4 KiB:  MSI-X
 *
 * The life of a command: a doorbell says that submission queue entries are there; fetch() copies each one, as long as there is a request to hold it
 * and, reserved from the beginning, a place in the completion queue. PRPs become pieces of guest memory, the back end does the rest: what the host's
 * page cache has comes back at once, else nvme_done() completes it on a thread of the back end.
 *
 * The driver may change queues and lists at any time: all is copied once and checked there. Queues outside of memory are fatal (CSTS.CFS); other nonsense is
 * answered with the specification's status.
 *
 * A reset of the controller (CC.EN = 0) is complete, as CSTS.RDY tells, when the last command in flight has come back. What is in flight at a save is saved as
 * commands, and done again after the load.
 *
 * Left out: SGLs, metadata, end-to-end protection, compare, fused commands, firmware, format, several namespaces, namespaces' management, power states, boot
 * partitions, memory buffers. Abort aborts nothing, as is allowed (5.1).
 *
 * Locking: all under the device's lock, which the bus takes around register handlers; the back end's threads take it themselves.
 */
#include "dev/nvme.h"

#include <errno.h>
#include <linux/pci_regs.h>
#include <string.h>
#include <time.h>

#include "base/err.h"

#define BAR_REGISTERS 0
#define BAR_MSIX 4
#define BAR_SIZE (16 * KiB)
#define DOORBELLS 0x1000u

#define ENTRIES_MAX 1024u                                          /* CAP.MQES */
#define REQUESTS 256
#define EVENTS_MAX 4                                               /* asynchronous event requests that wait */
#define MDTS 8                                                     /* 2^8 pages */
#define TRANSFER_MAX (PAGE_SIZE << MDTS)
#define PARTS_MAX ((1u << MDTS) + 1)
#define RANGES_MAX 256
#define QUIESCE_SECONDS 5
#define LBA_SHIFT 9

/* 3.1: offsets of the registers */
enum { REG_CAP = 0, REG_VS = 8, REG_INTMS = 0xc, REG_INTMC = 0x10, REG_CC = 0x14, REG_CSTS = 0x1c, REG_AQA = 0x24, REG_ASQ = 0x28, REG_ACQ = 0x30,
       REG_END = 0x40 };
#define VERSION_1_4 0x00010400u
#define CAP_CQR BIT(16)
#define CAP_TO(half_seconds) ((u64)(half_seconds) << 24)
#define CAP_CSS_NVM BIT(37)
#define CC_EN BIT(0)
#define CC_CSS(cc) ((cc) >> 4 & 7)
#define CC_MPS(cc) ((cc) >> 7 & 15)
#define CC_AMS(cc) ((cc) >> 11 & 7)
#define CC_SHN(cc) ((cc) >> 14 & 3)
#define CC_IOSQES(cc) ((cc) >> 16 & 15)
#define CC_IOCQES(cc) ((cc) >> 20 & 15)
#define CC_WRITABLE 0x00fffff1u
#define CSTS_RDY BIT(0)
#define CSTS_CFS BIT(1)
#define CSTS_SHST(x) ((u32)(x) << 2)
enum { SHST_NONE, SHST_BUSY, SHST_COMPLETE };

/* Status: type << 8 | code (4.6.1). */
enum {
    SC_SUCCESS = 0, SC_INVALID_OPCODE = 1, SC_INVALID_FIELD = 2, SC_DATA_TRANSFER = 4, SC_INTERNAL = 6, SC_INVALID_NS = 0xb, SC_PRP_OFFSET = 0x13,
    SC_WRITE_PROTECTED = 0x20, SC_LBA_RANGE = 0x80,
    SC_CQ_INVALID = 0x100, SC_QUEUE_ID = 0x101, SC_QUEUE_SIZE = 0x102, SC_EVENT_LIMIT = 0x105, SC_INTERRUPT_VECTOR = 0x108, SC_LOG_PAGE = 0x109,
    SC_QUEUE_DELETION = 0x10c, SC_NOT_SAVEABLE = 0x10d, SC_NOT_CHANGEABLE = 0x10e,
    SC_WRITE_FAULT = 0x280, SC_READ_ERROR = 0x281,
    LATER = -1,                                                    /* ours: it is not done with */
};

enum { ADMIN_DELETE_SQ, ADMIN_CREATE_SQ, ADMIN_LOG, ADMIN_DELETE_CQ = 4, ADMIN_CREATE_CQ, ADMIN_IDENTIFY, ADMIN_ABORT = 8, ADMIN_SET_FEATURES, ADMIN_GET_FEATURES,
       ADMIN_EVENT = 0xc };
enum { IO_FLUSH, IO_WRITE, IO_READ, IO_ZEROES = 8, IO_DSM };
enum { FEAT_ARBITRATION = 1, FEAT_POWER, FEAT_TEMPERATURE = 4, FEAT_ERROR_RECOVERY, FEAT_WRITE_CACHE, FEAT_QUEUES, FEAT_COALESCING, FEAT_VECTOR, FEAT_ATOMICITY,
       FEAT_EVENTS, FEATS };
enum { LOG_PAGE_ERRORS = 1, LOG_PAGE_HEALTH, LOG_PAGE_FIRMWARE, LOG_PAGE_CHANGED };

#define EVENT_NAMESPACE BIT(8)                                     /* of the events' configuration */
#define EVENT_NAMESPACE_CHANGED (2u | 0u << 8 | LOG_PAGE_CHANGED << 16) /* notice, namespace attribute changed, its log page */
#define RW_FUA BIT(30)
#define ZEROES_DEAC BIT(25)
#define DSM_DEALLOCATE BIT(2)

struct command {
    u8 opcode, flags;
    u16 cid;
    u32 nsid;
    u64 unused, metadata;
    u64 prp[2];
    u32 cdw[6];                                                    /* 10 to 15 */
};
_Static_assert(sizeof(struct command) == 64, "as in 4.2");

struct completion {
    u32 dw0, dw1;
    u16 sq_head, sq_id, cid, status;
};
_Static_assert(sizeof(struct completion) == 16, "as in 4.6");

struct dsm_range {
    u32 attributes, lbas;
    u64 lba;
};

struct sq {
    bool exists, deleting;
    u16 cq;
    u16 head, tail;
    u32 entries;
    u64 gpa;
    u16 delete_cid;                                                /* of the command that waits for the last of its commands */
    unsigned outstanding;
};

struct cq {
    bool exists, interrupts, phase, posted;
    u16 vector;
    u16 head, tail;
    u32 entries;
    u64 gpa;
    unsigned reserved;                                             /* places for commands that were fetched */
};

struct part {
    u64 gpa;
    u32 len;
};

struct request {
    struct nvme *nvme;
    struct request *next_free;
    bool busy;
    u16 sq;
    struct command cmd;
    struct block_req io;
    bool flush;                                                    /* what was written is to be flushed */
    struct dsm_range *range;
    unsigned ranges, ranged;                                       /* how many, and how many are done */
    struct part *part;                                             /* of guest memory, writable ones between ram_begin_write() and ram_end_write() */
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
    bool master, stopping, gone, dirty, flushing;
    u32 feature[FEATS];
    u8 vector_flags[NVME_QUEUES_MAX + 1];
    struct sq sq[NVME_QUEUES_MAX + 1];
    struct cq cq[NVME_QUEUES_MAX + 1];
    struct request request[REQUESTS];
    struct request *free;
    unsigned in_flight;                                            /* at the host */
    pthread_cond_t idle;
    u16 event_cid[EVENTS_MAX];
    unsigned events;
    bool changed, changed_told;                                    /* the namespace: and whether the driver was told since it has looked */
    int logged;
    struct block_counts counts;
    struct block_req again;
    bool again_sent;
    struct block_req flush;                                        /* of quiesce and shutdown */
};

static void fetch_all(struct nvme *n);
static void came_back(struct nvme *n);

/* --- completions --- */

static void fatal(struct nvme *n, const char *why)
{
    if (!(n->csts & CSTS_CFS))
        log_msg(n->config.log, LOG_WARN, "nvme: %s; the controller waits for a reset by the guest's driver", why);
    n->csts |= CSTS_CFS;
}

static bool running(const struct nvme *n)
{
    return (n->csts & CSTS_RDY) && !(n->csts & CSTS_CFS) && !n->stopping && pci_bus_master(&n->fn);
}

static unsigned used(const struct cq *q)
{
    return (q->tail + q->entries - q->head) % q->entries;
}

static bool has_place(const struct cq *q)
{
    return used(q) + q->reserved + 1 < q->entries;
}

/* 3.1.3: with INTx, any completion that the driver has not taken pulls the wire. */
static void update_intx(struct nvme *n)
{
    bool level = false;

    for (unsigned i = 0; i <= n->config.queues; i++)
        level |= n->cq[i].exists && n->cq[i].interrupts && n->cq[i].head != n->cq[i].tail;
    pci_intx(&n->fn, level && !(n->intms & 1));
}

/* After a batch of post(). */
static void interrupt(struct nvme *n)
{
    for (unsigned i = 0; i <= n->config.queues; i++) {
        struct cq *q = &n->cq[i];

        if (q->posted && q->interrupts)
            pci_msix_signal(&n->fn, q->vector);
        q->posted = false;
    }
    update_intx(n);
}

/* Ones that will not go better a second time say so (DNR). */
static u16 status_field(int status)
{
    bool retry = status == SC_WRITE_FAULT || status == SC_READ_ERROR || status == SC_SUCCESS;

    return (u16)((unsigned)status | (retry ? 0 : 1u << 14));
}

static void post(struct nvme *n, u16 sq, u16 cid, u32 dw0, int status)
{
    struct cq *q = &n->cq[n->sq[sq].cq];
    u64 at = q->gpa + q->tail * sizeof(struct completion);
    struct completion c = { .dw0 = dw0, .sq_head = n->sq[sq].head, .sq_id = sq, .cid = cid };
    u16 *last;

    ram_begin_write(n->config.ram, at, sizeof(c));
    last = (u16 *)(void *)ram_range(n->config.ram, at, sizeof(c));
    if (last) {                                                    /* the phase bit comes last */
        memcpy(last, &c, sizeof(c) - 2);
        __atomic_store_n(last + 7, (u16)(status_field(status) << 1 | q->phase), __ATOMIC_RELEASE);
    }
    ram_end_write(n->config.ram, at, sizeof(c));
    if (!last)
        fatal(n, "a completion queue lies outside of memory");
    if (++q->tail == q->entries) {
        q->tail = 0;
        q->phase = !q->phase;
    }
    q->posted = true;
}

static void delete_sq(struct nvme *n, struct sq *q)
{
    u16 cid = q->delete_cid;

    *q = (struct sq){ 0 };
    n->cq[0].reserved--;
    n->sq[0].outstanding--;
    post(n, 0, cid, 0, SC_SUCCESS);
}

static void release(struct request *r)
{
    for (unsigned i = 0; r->writable && i < r->parts; i++)
        ram_end_write(r->nvme->config.ram, r->part[i].gpa, r->part[i].len);
    free(r->range);
    r->range = NULL;
    r->parts = 0;
    r->writable = r->busy = false;
    r->next_free = r->nvme->free;
    r->nvme->free = r;
}

static void complete(struct request *r, u32 dw0, int status)
{
    struct nvme *n = r->nvme;
    struct sq *q = &n->sq[r->sq];
    u16 sq = r->sq, cid = r->cmd.cid;

    release(r);
    if (n->stopping || !q->exists)
        return;
    n->cq[q->cq].reserved--;
    q->outstanding--;
    post(n, sq, cid, dw0, status);
    if (q->deleting && !q->outstanding)
        delete_sq(n, q);
}

/* --- data (4.3) --- */

static bool add_part(struct request *r, u64 gpa, u32 len)
{
    struct part *last = r->parts ? &r->part[r->parts - 1] : NULL;

    if (last && last->gpa + last->len == gpa) {
        last->len += len;
        return true;
    }
    if (r->parts == PARTS_MAX)
        return false;
    r->part[r->parts++] = (struct part){ gpa, len };
    return true;
}

static bool make_room(struct request *r)
{
    if (!r->part)
        r->part = malloc(PARTS_MAX * sizeof(*r->part));
    if (!r->iov)
        r->iov = malloc(2 * PARTS_MAX * sizeof(*r->iov));
    return r->part && r->iov;
}

/* A list goes on in another page when it ends with one: its last entry says where. The longest needs two such steps. */
static int walk_list(struct request *r, u64 list, u32 left)
{
    unsigned steps = 0;
    u64 entry[64];

    while (left) {
        unsigned in_page = (unsigned)((PAGE_SIZE - (list & ~PAGE_MASK)) / sizeof(*entry));
        unsigned pages = (unsigned)((left + PAGE_SIZE - 1) / PAGE_SIZE), count = MIN(MIN(in_page, (unsigned)ARRAY_SIZE(entry)), pages);

        if (list & 7)
            return SC_PRP_OFFSET;
        if (ram_read(r->nvme->config.ram, list, entry, count * sizeof(*entry)) < 0)
            return SC_DATA_TRANSFER;
        for (unsigned i = 0; i < count; i++) {
            u32 len = (u32)MIN(left, PAGE_SIZE);

            if (entry[i] & ~PAGE_MASK)
                return SC_PRP_OFFSET;
            if (i + 1 == in_page && left > PAGE_SIZE) {
                if (++steps > 2)
                    return SC_PRP_OFFSET;
                list = entry[i];
                break;
            }
            if (!add_part(r, entry[i], len))
                return SC_INTERNAL;
            left -= len;
            list += sizeof(*entry);
        }
    }
    return SC_SUCCESS;
}

static int map_data(struct request *r, u32 len, bool writable)
{
    const struct command *c = &r->cmd;
    u32 first = (u32)MIN(len, PAGE_SIZE - (c->prp[0] & ~PAGE_MASK));
    unsigned iovs = 0;
    int status = SC_SUCCESS;

    if (c->prp[0] & 3)
        return SC_PRP_OFFSET;
    if (!make_room(r))
        return SC_INTERNAL;
    add_part(r, c->prp[0], first);
    len -= first;
    if (len && len <= PAGE_SIZE)
        status = c->prp[1] & ~PAGE_MASK ? SC_PRP_OFFSET : add_part(r, c->prp[1], len) ? SC_SUCCESS : SC_INTERNAL;
    else if (len)
        status = walk_list(r, c->prp[1], len);
    for (unsigned i = 0; status == SC_SUCCESS && i < r->parts; i++)
        if (ram_iov(r->nvme->config.ram, r->part[i].gpa, r->part[i].len, r->iov, &iovs, 2 * PARTS_MAX) < 0)
            status = SC_DATA_TRANSFER;
    if (status != SC_SUCCESS) {
        r->parts = 0;
        return status;
    }
    r->writable = writable;
    for (unsigned i = 0; writable && i < r->parts; i++)
        ram_begin_write(r->nvme->config.ram, r->part[i].gpa, r->part[i].len);
    r->io.iov = r->iov;
    r->io.iovs = iovs;
    return SC_SUCCESS;
}

/* Copies between a buffer and the command's data, of which there are len bytes. */
static int copy_data(struct request *r, void *buf, u32 len, bool to_guest)
{
    int status = len ? map_data(r, len, to_guest) : SC_SUCCESS;

    for (unsigned i = 0; status == SC_SUCCESS && len && i < r->io.iovs; i++) {
        memcpy(to_guest ? r->iov[i].iov_base : buf, to_guest ? buf : r->iov[i].iov_base, r->iov[i].iov_len);
        buf = (u8 *)buf + r->iov[i].iov_len;
    }
    return status;
}

/* --- I/O commands (6) --- */

static void nvme_done(struct block_req *io);

static u64 lbas(const struct nvme *n)
{
    return block_size(n->block) >> LBA_SHIFT;
}

static void host_error(struct nvme *n, const struct block_req *io)
{
    if (n->logged == io->result)
        return;
    n->logged = io->result;
    log_msg(n->config.log, LOG_ERROR, "disk %s: %s failed: %s; the guest sees an I/O error", block_path(n->block), block_verb(io->op), strerror(-io->result));
}

static int prepare(struct request *r, enum block_op op, u64 lba, u64 count)
{
    if (!range_in(lba, count, lbas(r->nvme)))
        return SC_LBA_RANGE;
    r->io.op = op;
    r->io.offset = lba << LBA_SHIFT;
    r->io.len = count << LBA_SHIFT;
    return SC_SUCCESS;
}

/* The next range of a deallocation; SUCCESS with nothing prepared when there is none. */
static int next_range(struct request *r, bool *more)
{
    const struct dsm_range *d = &r->range[r->ranged];

    *more = r->ranged < r->ranges;
    if (!*more)
        return SC_SUCCESS;
    r->ranged++;
    return prepare(r, BLOCK_DISCARD, d->lba, d->lbas);
}

/* What to do behind what has just ended: LATER when there is more, in r->io. */
static int next_io(struct request *r)
{
    struct nvme *n = r->nvme;
    struct block_req *io = &r->io;
    bool more = false;

    if (io->op != BLOCK_READ && io->op != BLOCK_FLUSH)
        n->dirty = true;
    if (io->result < 0) {
        host_error(n, io);
        return io->op == BLOCK_READ ? SC_READ_ERROR : SC_WRITE_FAULT;
    }
    if (r->ranges && !n->stopping) {
        int status = next_range(r, &more);

        return more && status == SC_SUCCESS ? LATER : status;
    }
    if (!r->flush || n->stopping)
        return SC_SUCCESS;
    r->flush = false;
    io->op = BLOCK_FLUSH;
    return LATER;
}

/* Has the host do r->io and what follows. LATER: nvme_done() will be called. */
static int run(struct request *r, bool at_once)
{
    int status;

    do {
        if (r->io.op == BLOCK_FLUSH)
            r->nvme->dirty = false;
        r->io.at_once = at_once;
        r->io.done = nvme_done;
        if (!block_submit(r->nvme->block, &r->io))
            return LATER;
    } while ((status = next_io(r)) == LATER);
    return status;
}

static int dsm(struct request *r, bool *nothing)
{
    u32 count = (r->cmd.cdw[0] & 0xff) + 1;
    int status;

    *nothing = !(r->cmd.cdw[1] & DSM_DEALLOCATE);
    if (*nothing)
        return SC_SUCCESS;
    if (block_readonly(r->nvme->block))
        return SC_WRITE_PROTECTED;
    r->range = malloc(count * sizeof(*r->range));
    if (!r->range)
        return SC_INTERNAL;
    status = copy_data(r, r->range, count * (u32)sizeof(*r->range), false);
    for (u32 i = 0; status == SC_SUCCESS && i < count; i++)
        if (!range_in(r->range[i].lba, r->range[i].lbas, lbas(r->nvme)))
            status = SC_LBA_RANGE;
    r->ranges = count;
    return status == SC_SUCCESS ? next_range(r, &(bool){ false }) : status;
}

static int io_command(struct request *r, bool at_once)
{
    const struct command *c = &r->cmd;
    struct nvme *n = r->nvme;
    u64 lba = c->cdw[0] | (u64)c->cdw[1] << 32, count = (c->cdw[2] & 0xffff) + 1;
    bool write = c->opcode == IO_WRITE || c->opcode == IO_ZEROES, nothing = false;
    int status = SC_SUCCESS;

    if (c->flags)
        return SC_INVALID_FIELD;                                   /* fused, or by SGL */
    if (c->nsid != 1 && !(c->opcode == IO_FLUSH && c->nsid == ~0u))
        return SC_INVALID_NS;
    if (write && block_readonly(n->block))
        return SC_WRITE_PROTECTED;
    r->flush = write && (!n->feature[FEAT_WRITE_CACHE] || (c->cdw[2] & RW_FUA));
    switch (c->opcode) {
    case IO_FLUSH:
        r->io.op = BLOCK_FLUSH;
        break;
    case IO_READ:
    case IO_WRITE:
        if (count << LBA_SHIFT > TRANSFER_MAX)
            return SC_INVALID_FIELD;
        status = prepare(r, write ? BLOCK_WRITE : BLOCK_READ, lba, count);
        if (status == SC_SUCCESS)
            status = map_data(r, (u32)(count << LBA_SHIFT), !write);
        break;
    case IO_ZEROES:
        status = prepare(r, BLOCK_ZEROES, lba, count);
        r->io.unmap = c->cdw[2] & ZEROES_DEAC;
        break;
    case IO_DSM:
        status = dsm(r, &nothing);
        break;
    default:
        return SC_INVALID_OPCODE;
    }
    return status != SC_SUCCESS || nothing ? status : run(r, at_once);
}

/* --- admin commands (5) --- */

static void put16(u8 *p, u16 v)
{
    memcpy(p, &v, sizeof(v));
}

static void put32(u8 *p, u32 v)
{
    memcpy(p, &v, sizeof(v));
}

static void put64(u8 *p, u64 v)
{
    memcpy(p, &v, sizeof(v));
}

static void put_text(u8 *p, const char *s, size_t len)
{
    memset(p, ' ', len);
    memcpy(p, s, strnlen(s, len));
}

/* Figure 247; what is not said is zero. */
static void identify_controller(const struct nvme *n, u8 *p)
{
    put16(p + 0, 0x1af4);
    put16(p + 2, 0x1af4);
    put_text(p + 4, n->serial, 20);
    put_text(p + 24, "doppel disk", 40);
    put_text(p + 64, DOPPEL_VERSION, 8);
    p[77] = MDTS;
    put32(p + 80, VERSION_1_4);
    put32(p + 92, EVENT_NAMESPACE);
    p[111] = 1;                                                    /* an I/O controller */
    p[258] = 3;                                                    /* Abort commands at a time, less one */
    p[259] = EVENTS_MAX - 1;
    p[260] = 1 << 1 | 1;                                           /* one firmware slot, read-only */
    put16(p + 266, 343);                                           /* kelvin: warning */
    put16(p + 268, 373);                                           /* critical */
    p[512] = 6 << 4 | 6;
    p[513] = 4 << 4 | 4;
    put32(p + 516, 1);                                             /* namespaces */
    put16(p + 520, BIT(2) | BIT(3));                               /* dataset management, write zeroes */
    p[525] = 1;                                                    /* a volatile write cache */
    snprintf((char *)p + 768, 256, "nqn.2026-11.doppel:disk:%u:%.20s", n->config.number, n->serial);
    put16(p + 2048, 100);                                          /* power state 0: 1 W */
}

static void namespace_guid(const struct nvme *n, u8 guid[16])
{
    memcpy(guid, "doppel--nvme", 12);
    put32(guid + 12, n->config.number + 1);
}

/* Figure 245. */
static void identify_namespace(const struct nvme *n, u8 *p)
{
    put64(p + 0, lbas(n));
    put64(p + 8, lbas(n));
    put64(p + 16, lbas(n));
    p[24] = BIT(4);                                                /* the next fields are valid: written best by 4 KiB */
    put16(p + 64, 7);
    put16(p + 66, 7);
    put16(p + 68, 7);
    put16(p + 70, 7);
    put16(p + 72, 7);
    p[99] = block_readonly(n->block);
    namespace_guid(n, p + 104);
    p[130] = LBA_SHIFT;
}

static int identify(struct request *r)
{
    const struct command *c = &r->cmd;
    u8 page[PAGE_SIZE] = { 0 };

    switch (c->cdw[0] & 0xff) {
    case 0:
        if (c->nsid != 1 && c->nsid != ~0u)
            return SC_INVALID_NS;
        identify_namespace(r->nvme, page);
        break;
    case 1:
        identify_controller(r->nvme, page);
        break;
    case 2:
        if (c->nsid >= ~1u)
            return SC_INVALID_NS;
        if (!c->nsid)
            put32(page, 1);
        break;
    case 3:
        if (c->nsid != 1)
            return SC_INVALID_NS;
        page[0] = 2;                                               /* NGUID */
        page[1] = 16;
        namespace_guid(r->nvme, page + 4);
        break;
    default:
        return SC_INVALID_FIELD;
    }
    return copy_data(r, page, sizeof(page), true);
}

static int get_log(struct request *r)
{
    const struct command *c = &r->cmd;
    struct nvme *n = r->nvme;
    u64 len = ((u64)(c->cdw[0] >> 16 | (c->cdw[1] & 0xffff) << 16) + 1) * 4, off = c->cdw[2] | (u64)c->cdw[3] << 32;
    u8 page[PAGE_SIZE] = { 0 };
    u32 size;

    switch (c->cdw[0] & 0xff) {
    case LOG_PAGE_ERRORS:
        size = 64;
        break;
    case LOG_PAGE_HEALTH:
        size = 512;
        put16(page + 1, 300);                                      /* kelvin */
        page[3] = 100;                                             /* spare, percent */
        page[4] = 10;
        break;
    case LOG_PAGE_FIRMWARE:
        size = 512;
        page[0] = 1;
        put_text(page + 8, DOPPEL_VERSION, 8);
        break;
    case LOG_PAGE_CHANGED:
        size = PAGE_SIZE;
        put32(page, n->changed);
        if (!(c->cdw[0] & BIT(15)))                                /* retain asynchronous event */
            n->changed = n->changed_told = false;
        break;
    default:
        return SC_LOG_PAGE;
    }
    if (off & 3 || off > size)
        return SC_INVALID_FIELD;
    return copy_data(r, page + off, (u32)MIN(len, size - off), true);
}

static int create_cq(struct nvme *n, const struct command *c)
{
    u32 id = c->cdw[0] & 0xffff, entries = (c->cdw[0] >> 16) + 1, vector = c->cdw[1] >> 16;

    if (!id || id > n->config.queues || n->cq[id].exists)
        return SC_QUEUE_ID;
    if (entries < 2 || entries > ENTRIES_MAX)
        return SC_QUEUE_SIZE;
    if (!(c->cdw[1] & 1) || (c->prp[0] & ~PAGE_MASK) || CC_IOCQES(n->cc) != 4)
        return SC_INVALID_FIELD;
    if (vector > n->config.queues)
        return SC_INTERRUPT_VECTOR;
    if (!ram_has(n->config.ram, c->prp[0], entries * sizeof(struct completion)))
        return SC_DATA_TRANSFER;
    n->cq[id] = (struct cq){ .exists = true, .interrupts = c->cdw[1] & 2, .phase = true, .vector = (u16)vector, .entries = entries, .gpa = c->prp[0] };
    return SC_SUCCESS;
}

static int create_sq(struct nvme *n, const struct command *c)
{
    u32 id = c->cdw[0] & 0xffff, entries = (c->cdw[0] >> 16) + 1, cq = c->cdw[1] >> 16;

    if (!id || id > n->config.queues || n->sq[id].exists)
        return SC_QUEUE_ID;
    if (!cq || cq > n->config.queues || !n->cq[cq].exists)
        return SC_CQ_INVALID;
    if (entries < 2 || entries > ENTRIES_MAX)
        return SC_QUEUE_SIZE;
    if (!(c->cdw[1] & 1) || (c->prp[0] & ~PAGE_MASK) || CC_IOSQES(n->cc) != 6)
        return SC_INVALID_FIELD;
    if (!ram_has(n->config.ram, c->prp[0], entries * sizeof(struct command)))
        return SC_DATA_TRANSFER;
    n->sq[id] = (struct sq){ .exists = true, .cq = (u16)cq, .entries = entries, .gpa = c->prp[0] };
    return SC_SUCCESS;
}

static int delete_cq(struct nvme *n, u32 id)
{
    if (!id || id > n->config.queues || !n->cq[id].exists)
        return SC_QUEUE_ID;
    for (unsigned i = 1; i <= n->config.queues; i++)
        if (n->sq[i].exists && n->sq[i].cq == id)
            return SC_QUEUE_DELETION;
    n->cq[id] = (struct cq){ 0 };
    return SC_SUCCESS;
}

/* The command's place in the queue stays reserved until the last command has come back. */
static int begin_delete_sq(struct request *r, u32 id)
{
    struct nvme *n = r->nvme;
    struct sq *q = id <= n->config.queues ? &n->sq[id] : NULL;

    if (!id || !q || !q->exists || q->deleting)
        return SC_QUEUE_ID;
    if (!q->outstanding) {
        *q = (struct sq){ 0 };
        return SC_SUCCESS;
    }
    q->deleting = true;
    q->delete_cid = r->cmd.cid;
    release(r);
    return LATER;
}

static int feature(struct request *r, bool set, u32 *dw0)
{
    struct nvme *n = r->nvme;
    const struct command *c = &r->cmd;
    u32 id = c->cdw[0] & 0xff, val = c->cdw[1], limit = n->config.queues - 1;
    unsigned select = c->cdw[0] >> 8 & 7;

    if (id >= FEATS || !id || id == 3)
        return SC_INVALID_FIELD;
    if (set && (c->cdw[0] & BIT(31)))
        return SC_NOT_SAVEABLE;
    if (!set) {
        *dw0 = id == FEAT_VECTOR ? MIN(val & 0xffff, n->config.queues) : n->feature[id];
        if (select == 3)
            *dw0 = BIT(2);                                         /* capabilities: changeable */
        return SC_SUCCESS;
    }
    switch (id) {
    case FEAT_QUEUES:
        if ((val & 0xffff) == 0xffff || val >> 16 == 0xffff)
            return SC_INVALID_FIELD;
        *dw0 = limit | limit << 16;
        return SC_SUCCESS;
    case FEAT_WRITE_CACHE:
        n->feature[id] = val & 1;
        return SC_SUCCESS;
    case FEAT_POWER:
        return val & 31 ? SC_INVALID_FIELD : SC_SUCCESS;
    case FEAT_EVENTS:
        n->feature[id] = val & (EVENT_NAMESPACE | 0xff);
        return SC_SUCCESS;
    default:
        n->feature[id] = val;
        return SC_SUCCESS;
    }
}

static void tell_events(struct nvme *n)
{
    if (!n->changed || n->changed_told || !n->events || !(n->feature[FEAT_EVENTS] & EVENT_NAMESPACE) || !running(n) || !has_place(&n->cq[0]))
        return;
    n->changed_told = true;
    post(n, 0, n->event_cid[--n->events], EVENT_NAMESPACE_CHANGED, SC_SUCCESS);
}

static int wait_event(struct request *r)
{
    struct nvme *n = r->nvme;

    if (n->events == EVENTS_MAX)
        return SC_EVENT_LIMIT;
    n->event_cid[n->events++] = r->cmd.cid;
    n->cq[0].reserved--;                                           /* it may wait for ever: it takes its place when it is there */
    n->sq[0].outstanding--;
    release(r);
    return LATER;
}

static int admin_command(struct request *r, u32 *dw0)
{
    const struct command *c = &r->cmd;
    struct nvme *n = r->nvme;

    if (c->flags)
        return SC_INVALID_FIELD;
    switch (c->opcode) {
    case ADMIN_DELETE_SQ: return begin_delete_sq(r, c->cdw[0] & 0xffff);
    case ADMIN_CREATE_SQ: return create_sq(n, c);
    case ADMIN_LOG: return get_log(r);
    case ADMIN_DELETE_CQ: return delete_cq(n, c->cdw[0] & 0xffff);
    case ADMIN_CREATE_CQ: return create_cq(n, c);
    case ADMIN_IDENTIFY: return identify(r);
    case ADMIN_ABORT: *dw0 = 1; return SC_SUCCESS;
    case ADMIN_SET_FEATURES: return feature(r, true, dw0);
    case ADMIN_GET_FEATURES: return feature(r, false, dw0);
    case ADMIN_EVENT: return wait_event(r);
    default: return SC_INVALID_OPCODE;
    }
}

/* --- queues --- */

/* True: it is done with. */
static bool start(struct request *r, bool at_once)
{
    bool admin = !r->sq;
    u32 dw0 = 0;
    int status;

    r->io = (struct block_req){ 0 };
    r->flush = false;
    r->ranges = r->ranged = 0;
    status = r->sq ? io_command(r, at_once) : admin_command(r, &dw0);
    if (status != LATER)
        complete(r, dw0, status);
    else if (!admin)
        r->nvme->in_flight++;
    return status != LATER;
}

static bool fetch(struct nvme *n, unsigned id)
{
    struct sq *q = &n->sq[id];
    struct request *r = n->free;

    if (!q->exists || q->deleting || q->head == q->tail || !r || !has_place(&n->cq[q->cq]))
        return false;
    if (ram_read(n->config.ram, q->gpa + q->head * sizeof(r->cmd), &r->cmd, sizeof(r->cmd)) < 0) {
        fatal(n, "a submission queue lies outside of memory");
        return false;
    }
    q->head = (u16)((q->head + 1) % q->entries);
    q->outstanding++;
    n->cq[q->cq].reserved++;
    n->free = r->next_free;
    r->busy = true;
    r->sq = (u16)id;
    n->counts.requests += id != 0;
    n->counts.at_once += start(r, true) && id;
    return true;
}

/* Round robin. As virtio-blk does, it goes on on another thread when the guest has more than enough for this one. */
static void fetch_all(struct nvme *n)
{
    unsigned budget = 2 * ENTRIES_MAX;
    bool more = true;

    while (more && budget && running(n)) {
        more = false;
        for (unsigned i = 0; i <= n->config.queues && running(n); i++)
            for (unsigned burst = 0; burst < 8 && budget && fetch(n, i); burst++) {
                budget--;
                more = true;
            }
    }
    if (!budget && !n->again_sent && running(n)) {
        n->again_sent = true;
        n->in_flight++;
        if (block_submit(n->block, &n->again))
            bug_on(true);
    }
    tell_events(n);
    interrupt(n);
}

/* Everything that a driver has made of the controller is gone. */
static void forget(struct nvme *n)
{
    memset(n->sq, 0, sizeof(n->sq));
    memset(n->cq, 0, sizeof(n->cq));
    memset(n->feature, 0, sizeof(n->feature));
    n->feature[FEAT_WRITE_CACHE] = 1;
    n->feature[FEAT_QUEUES] = (n->config.queues - 1) * 0x10001u;
    n->feature[FEAT_TEMPERATURE] = 343;
    n->events = 0;
    n->changed_told = false;
    n->stopping = false;
    n->csts = 0;
    n->intms = 0;
    pci_intx(&n->fn, false);
}

static void came_back(struct nvme *n)
{
    n->in_flight--;
    if (!n->stopping)
        fetch_all(n);
    if (n->in_flight)
        return;
    if (n->stopping)
        forget(n);
    pthread_cond_broadcast(&n->idle);
}

static void nvme_done(struct block_req *io)
{
    struct request *r = container_of(io, struct request, io);
    struct nvme *n = r->nvme;

    pthread_mutex_lock(&n->device.lock);
    if (!n->gone) {
        int status = next_io(r);

        if (status == LATER)
            status = run(r, false);
        if (status != LATER) {
            complete(r, 0, status);
            came_back(n);
        }
    }
    pthread_mutex_unlock(&n->device.lock);
}

static void nvme_again(struct block_req *io)
{
    struct nvme *n = container_of(io, struct nvme, again);

    pthread_mutex_lock(&n->device.lock);
    n->again_sent = false;
    if (!n->gone)
        came_back(n);
    pthread_mutex_unlock(&n->device.lock);
}

static void flush_done(struct block_req *io)
{
    struct nvme *n = container_of(io, struct nvme, flush);

    pthread_mutex_lock(&n->device.lock);
    n->flushing = false;
    if (io->result < 0 && !n->gone)
        host_error(n, io);
    if ((n->csts & CSTS_SHST(3)) == CSTS_SHST(SHST_BUSY))
        n->csts = (n->csts & ~CSTS_SHST(3)) | CSTS_SHST(SHST_COMPLETE);
    pthread_cond_broadcast(&n->idle);
    pthread_mutex_unlock(&n->device.lock);
}

/* What is not under way already. */
static void begin_flush(struct nvme *n)
{
    if (n->flushing)
        return;
    n->dirty = false;
    n->flush = (struct block_req){ .op = BLOCK_FLUSH, .done = flush_done };
    n->flushing = !block_submit(n->block, &n->flush);
}

/* --- registers --- */

static bool queue_fits(struct nvme *n, u64 gpa, u32 entries, size_t size)
{
    return entries >= 2 && !(gpa & ~PAGE_MASK) && ram_has(n->config.ram, gpa, entries * size);
}

static void enable(struct nvme *n)
{
    u32 sqs = (n->aqa & 0xfff) + 1, cqs = (n->aqa >> 16 & 0xfff) + 1;

    if (CC_CSS(n->cc) || CC_MPS(n->cc) || CC_AMS(n->cc) || !queue_fits(n, n->asq, sqs, sizeof(struct command)) ||
        !queue_fits(n, n->acq, cqs, sizeof(struct completion))) {
        fatal(n, "it was enabled with values that it does not support");
        return;
    }
    n->sq[0] = (struct sq){ .exists = true, .entries = sqs, .gpa = n->asq };
    n->cq[0] = (struct cq){ .exists = true, .interrupts = true, .phase = true, .entries = cqs, .gpa = n->acq };
    n->csts = CSTS_RDY;
}

static void disable(struct nvme *n)
{
    n->stopping = true;
    if (!n->in_flight)
        forget(n);
}

static void write_cc(struct nvme *n, u32 val)
{
    bool was = n->cc & CC_EN, is = val & CC_EN, shut = CC_SHN(val) && !CC_SHN(n->cc);

    if (n->stopping)
        return;                                                    /* 3.1.5: not before RDY is 0 */
    n->cc = val & CC_WRITABLE;
    if (is && !was)
        enable(n);
    if (!is && was)
        disable(n);
    if (shut) {                                                    /* 7.6.2 */
        begin_flush(n);
        n->csts = (n->csts & ~CSTS_SHST(3)) | CSTS_SHST(n->flushing ? SHST_BUSY : SHST_COMPLETE);
    } else if (!CC_SHN(val)) {
        n->csts &= ~CSTS_SHST(3);
    }
}

static void doorbell(struct nvme *n, unsigned index, u32 val)
{
    unsigned id = index / 2;

    if (id > n->config.queues || !running(n))
        return;
    n->counts.notifications++;
    if (index & 1) {
        struct cq *q = &n->cq[id];

        /* Only over what is there: else places would be taken that are reserved. */
        if (!q->exists || val >= q->entries || (val + q->entries - q->head) % q->entries > used(q))
            return;
        q->head = (u16)val;
    } else {
        if (!n->sq[id].exists || val >= n->sq[id].entries)
            return;
        n->sq[id].tail = (u16)val;
    }
    fetch_all(n);
}

static u64 registers_read(struct pci_fn *f, unsigned bar UNUSED, u64 off, unsigned size)
{
    struct nvme *n = container_of(f, struct nvme, fn);
    u8 reg[REG_END] = { 0 };
    u64 val = 0;

    put64(reg + REG_CAP, (ENTRIES_MAX - 1) | CAP_CQR | CAP_TO(20) | CAP_CSS_NVM);
    put32(reg + REG_VS, VERSION_1_4);
    put32(reg + REG_INTMS, n->intms);
    put32(reg + REG_INTMC, n->intms);
    put32(reg + REG_CC, n->cc);
    put32(reg + REG_CSTS, n->csts);
    put32(reg + REG_AQA, n->aqa);
    put64(reg + REG_ASQ, n->asq);
    put64(reg + REG_ACQ, n->acq);
    if (range_in(off, size, sizeof(reg)))
        memcpy(&val, reg + off, size);
    return val;
}

static void set_half(u64 *reg, bool high, u32 val)
{
    *reg = high ? (u32)*reg | (u64)val << 32 : (*reg & ~0xffffffffull) | val;
}

static void write32(struct nvme *n, u64 off, u32 val)
{
    switch (off) {
    case REG_INTMS: n->intms |= val; update_intx(n); break;
    case REG_INTMC: n->intms &= ~val; update_intx(n); break;
    case REG_CC: write_cc(n, val); break;
    case REG_AQA: n->aqa = val & 0x0fff0fff; break;
    case REG_ASQ:
    case REG_ASQ + 4: set_half(&n->asq, off != REG_ASQ, val); n->asq &= PAGE_MASK; break;
    case REG_ACQ:
    case REG_ACQ + 4: set_half(&n->acq, off != REG_ACQ, val); n->acq &= PAGE_MASK; break;
    }
    if (off >= DOORBELLS && !(off & 3))
        doorbell(n, (unsigned)(off - DOORBELLS) / 4, val);
}

/* 3.1: accesses have 4 or 8 bytes; others are ignored. */
static void registers_write(struct pci_fn *f, unsigned bar UNUSED, u64 off, u64 val, unsigned size)
{
    struct nvme *n = container_of(f, struct nvme, fn);

    if (size < 4 || (off & 3))
        return;
    write32(n, off, (u32)val);
    if (size == 8)
        write32(n, off + 4, (u32)(val >> 32));
}

static void config_write(struct pci_fn *f, unsigned off UNUSED, unsigned size UNUSED)
{
    struct nvme *n = container_of(f, struct nvme, fn);
    bool was = n->master;

    n->master = pci_bus_master(f);
    if (n->master && !was)
        fetch_all(n);
}

/* --- device --- */

static struct timespec quiesce_end(void)
{
    struct timespec end;

    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += QUIESCE_SECONDS;
    return end;
}

static void nvme_reset(struct device *d)
{
    struct nvme *n = container_of(d, struct nvme, device);
    struct timespec end = quiesce_end();
    int r = 0;

    pthread_mutex_lock(&d->lock);
    n->stopping = true;
    pthread_mutex_unlock(&d->lock);
    block_fail_held(n->block);
    pthread_mutex_lock(&d->lock);
    while (n->in_flight && r == 0)
        r = pthread_cond_timedwait(&n->idle, &d->lock, &end);
    if (n->in_flight && block_abandon(n->block)) {
        end = quiesce_end();
        for (r = 0; n->in_flight && r == 0;)
            r = pthread_cond_timedwait(&n->idle, &d->lock, &end);
    }
    d->stuck = n->in_flight;
    if (!d->stuck) {
        forget(n);
        n->cc = n->aqa = 0;
        n->asq = n->acq = 0;
        n->master = n->changed = false;
        pci_fn_reset(&n->fn);
    }
    pthread_mutex_unlock(&d->lock);
}

static void nvme_quiesce(struct device *d)
{
    struct nvme *n = container_of(d, struct nvme, device);
    struct timespec end = quiesce_end();
    int r = 0;

    pthread_mutex_lock(&d->lock);
    while (n->in_flight > block_held(n->block) && r == 0)
        r = pthread_cond_timedwait(&n->idle, &d->lock, &end);
    if (n->dirty && r == 0)
        begin_flush(n);
    while (n->flushing && r == 0)
        r = pthread_cond_timedwait(&n->idle, &d->lock, &end);
    pthread_mutex_unlock(&d->lock);
    if (r == ETIMEDOUT)
        log_msg(n->config.log, LOG_WARN, "disk %s: the host has not answered for %d seconds", block_path(n->block), QUIESCE_SECONDS);
}

static bool queue_valid(struct nvme *n, unsigned i)
{
    const struct sq *s = &n->sq[i];
    const struct cq *c = &n->cq[i];

    if (s->exists && (s->entries < 2 || s->entries > 4096 || s->head >= s->entries || s->tail >= s->entries || s->cq > n->config.queues ||
                      !n->cq[s->cq].exists || !ram_has(n->config.ram, s->gpa, s->entries * sizeof(struct command))))
        return false;
    return !c->exists || (c->entries >= 2 && c->entries <= 4096 && c->head < c->entries && c->tail < c->entries && c->vector <= n->config.queues &&
                          ram_has(n->config.ram, c->gpa, c->entries * sizeof(struct completion)));
}

static void queue_state(struct nvme *n, unsigned i, struct stream *s)
{
    struct sq *sq = &n->sq[i];
    struct cq *cq = &n->cq[i];

    stream_bool(s, &sq->exists);
    stream_bool(s, &sq->deleting);
    stream_u16(s, &sq->cq);
    stream_u16(s, &sq->head);
    stream_u16(s, &sq->tail);
    stream_u32(s, &sq->entries);
    stream_u64(s, &sq->gpa);
    stream_u16(s, &sq->delete_cid);
    stream_bool(s, &cq->exists);
    stream_bool(s, &cq->interrupts);
    stream_bool(s, &cq->phase);
    stream_u16(s, &cq->vector);
    stream_u16(s, &cq->head);
    stream_u16(s, &cq->tail);
    stream_u32(s, &cq->entries);
    stream_u64(s, &cq->gpa);
}

/* A command that was in flight: again from its beginning. */
static void load_request(struct nvme *n, struct stream *s)
{
    struct command cmd;
    struct request *r = n->free;
    u16 sq = 0;

    stream_u16(s, &sq);
    stream_bytes(s, &cmd, sizeof(cmd));
    if (s->error)
        return;
    if (!r || !sq || sq > n->config.queues || !n->sq[sq].exists || !has_place(&n->cq[n->sq[sq].cq])) {
        stream_bad(s, "an NVMe command in flight makes no sense");
        return;
    }
    n->free = r->next_free;
    r->busy = true;
    r->sq = sq;
    r->cmd = cmd;
    n->sq[sq].outstanding++;
    n->cq[n->sq[sq].cq].reserved++;
    start(r, false);
}

static void in_flight_state(struct nvme *n, struct stream *s)
{
    u16 count = 0;

    for (unsigned i = 0; i < REQUESTS && !s->load && !n->stopping; i++)
        count = (u16)(count + n->request[i].busy);
    stream_u16(s, &count);
    if (s->load && !s->error && (count > REQUESTS || n->in_flight))
        stream_bad(s, "an NVMe disk has too many commands in flight");
    for (; s->load && count && !s->error; count--)
        load_request(n, s);
    for (unsigned i = 0; !s->load && count && i < REQUESTS; i++)
        if (n->request[i].busy) {
            stream_u16(s, &n->request[i].sq);
            stream_bytes(s, &n->request[i].cmd, sizeof(n->request[i].cmd));
        }
    for (unsigned i = 1; s->load && !s->error && i <= n->config.queues; i++)
        if (n->sq[i].deleting && !n->sq[i].outstanding) {
            n->cq[0].reserved++;
            n->sq[0].outstanding++;
            delete_sq(n, &n->sq[i]);
        } else if (n->sq[i].deleting) {
            n->cq[0].reserved++;
            n->sq[0].outstanding++;
        }
}

static void nvme_state(struct device *d, struct stream *s)
{
    struct nvme *n = container_of(d, struct nvme, device);
    u8 events = (u8)n->events;
    u32 cc = n->cc;

    if (!stream_section(s, "nvme", 1))
        return;
    if (s->load)
        forget(n);
    stream_u32(s, &cc);
    stream_u32(s, &n->csts);
    stream_u32(s, &n->aqa);
    stream_u32(s, &n->intms);
    stream_u64(s, &n->asq);
    stream_u64(s, &n->acq);
    stream_bool(s, &n->stopping);
    stream_bool(s, &n->changed);
    stream_bool(s, &n->changed_told);
    for (unsigned i = 0; i < FEATS; i++)
        stream_u32(s, &n->feature[i]);
    stream_u8(s, &events);
    for (unsigned i = 0; i < EVENTS_MAX; i++)
        stream_u16(s, &n->event_cid[i]);
    for (unsigned i = 0; i <= n->config.queues; i++)
        queue_state(n, i, s);
    pci_fn_state(&n->fn, s);
    if (s->load && !s->error) {
        n->cc = cc;
        n->events = events;
        n->master = pci_bus_master(&n->fn);
        if (events > EVENTS_MAX || ((n->csts & CSTS_RDY) && (!n->sq[0].exists || !n->cq[0].exists)))
            stream_bad(s, "an NVMe controller's state makes no sense");
        for (unsigned i = 0; i <= n->config.queues; i++)
            if (!s->error && !queue_valid(n, i))
                stream_bad(s, "a queue of an NVMe controller makes no sense");
    }
    if (s->load && s->error) {
        forget(n);
        return;
    }
    in_flight_state(n, s);
    if (s->load && n->stopping && !n->in_flight)
        forget(n);
    if (s->load && !s->error)
        fetch_all(n);
}

static void destroy(struct nvme *n)
{
    for (unsigned i = 0; i < REQUESTS; i++) {
        free(n->request[i].range);
        free(n->request[i].part);
        free(n->request[i].iov);
    }
    pthread_cond_destroy(&n->idle);
    pthread_mutex_destroy(&n->device.lock);
    free(n);
}

/* As blk_free(): memory that the host may still write into stays. */
static void nvme_free(struct device *d)
{
    struct nvme *n = container_of(d, struct nvme, device);

    if (!block_close(n->block)) {
        pthread_mutex_lock(&d->lock);
        n->gone = true;
        n->config.ram->pinned = true;
        pthread_mutex_unlock(&d->lock);
        pci_remove(&n->fn);
        return;
    }
    pci_remove(&n->fn);
    destroy(n);
}

static const struct device_ops device_ops = { .name = "nvme", .reset = nvme_reset, .quiesce = nvme_quiesce, .state = nvme_state, .free = nvme_free };
static const struct pci_fn_ops fn_ops = { .bar_read = registers_read, .bar_write = registers_write, .config_write = config_write };

int nvme_resize(struct nvme *n, u64 size)
{
    int r = size ? block_grow(n->block, size) : block_refresh(n->block);

    if (r < 0)
        return r;
    pthread_mutex_lock(&n->device.lock);
    n->changed = true;
    tell_events(n);
    interrupt(n);
    pthread_mutex_unlock(&n->device.lock);
    return 0;
}

struct block_counts nvme_counts(struct nvme *n)
{
    struct block_counts c;

    pthread_mutex_lock(&n->device.lock);
    c = n->counts;
    pthread_mutex_unlock(&n->device.lock);
    return c;
}

static int attach(struct nvme *n)
{
    static const struct pci_id id = { .vendor = 0x1af4, .device = 0x10f0, .subsystem_vendor = 0x1af4, .subsystem = 0x1100, .class_code = 0x010802,
                                      .revision = 1 };
    int r = pci_add(n->config.pci, &n->fn, n->config.slot, &id, &fn_ops, &n->device.lock);

    if (r < 0)
        return r;
    pci_wire_intx(&n->fn, n->config.intx, n->config.gsi);
    r = pci_bar(&n->fn, BAR_REGISTERS, PCI_BAR_MEM64, BAR_SIZE, "nvme");
    if (r == 0)
        r = pci_msix(&n->fn, BAR_MSIX, n->config.queues + 1, "nvme");
    if (r < 0)
        pci_remove(&n->fn);
    return r;
}

int nvme_new(const struct nvme_config *c, struct block *block, struct nvme **out)
{
    struct nvme *n = calloc(1, sizeof(*n));
    pthread_condattr_t attr;
    int r;

    bug_on(!c->queues || c->queues > NVME_QUEUES_MAX);
    if (!n) {
        block_close(block);
        return err(-ENOMEM, "nvme: out of memory");
    }
    n->config = *c;
    n->block = block;
    device_init(&n->device, &device_ops);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&n->idle, &attr);
    pthread_condattr_destroy(&attr);
    memcpy(n->serial, c->serial, strnlen(c->serial, sizeof(n->serial)));
    n->again = (struct block_req){ .op = BLOCK_NOP, .done = nvme_again };
    for (unsigned i = 0; i < REQUESTS; i++) {
        n->request[i].nvme = n;
        release(&n->request[i]);
    }
    r = attach(n);
    if (r < 0) {
        block_close(block);
        destroy(n);
        return r;
    }
    forget(n);
    *out = n;
    return 0;
}
