/*
 * NVM Express controller (see nvme.h; NVM Express Base Specification 1.4): admin and I/O queues, PRP lists, MSI-X and INTx, read, write, flush, write zeroes,
 * dataset management, asynchronous events (the disk has become larger), shutdown.
 *
 *   BAR 0, 16 KiB:  0x0000 registers (3.1)   0x1000 doorbells, 4 bytes apart
 *   BAR 4,  4 KiB:  MSI-X
 *
 * The life of a command: a doorbell says that submission queue entries are there; fetch() copies each one, as long as there is a request to hold it
 * and, reserved from the beginning, a place in the completion queue. PRPs become pieces of guest memory, the back end does the rest: what the host's
 * page cache has comes back at once, else nvme_done() completes it on a thread of the back end. Drivers of virtual machines have doorbells in memory, too
 * (nvme_shadow.c), and ring only when we sleep.
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
 * Files: registers, queues, save and load here; admin commands in nvme_admin.c; data, I/O commands and what comes back of them in nvme_io.c.
 *
 * Locking: all under the device's lock, which the bus takes around register handlers; the back end's threads take it themselves.
 */
#include "dev/nvme.h"

#include <errno.h>
#include <linux/pci_regs.h>
#include <time.h>

#include "base/err.h"
#include "dev/nvme_int.h"

#define BAR_REGISTERS 0
#define BAR_MSIX 4
#define BAR_SIZE (16 * KiB)
#define DOORBELLS 0x1000u
#define QUIESCE_SECONDS 5

/* 3.1: offsets of the registers */
enum { REG_CAP = 0, REG_VS = 8, REG_INTMS = 0xc, REG_INTMC = 0x10, REG_CC = 0x14, REG_CSTS = 0x1c, REG_AQA = 0x24, REG_ASQ = 0x28, REG_ACQ = 0x30,
       REG_END = 0x40 };
#define CAP_CQR BIT(16)
#define CAP_TO(half_seconds) ((u64)(half_seconds) << 24)
#define CAP_CSS_NVM BIT(37)
#define CC_EN BIT(0)
#define CC_CSS(cc) ((cc) >> 4 & 7)
#define CC_MPS(cc) ((cc) >> 7 & 15)
#define CC_AMS(cc) ((cc) >> 11 & 7)
#define CC_SHN(cc) ((cc) >> 14 & 3)
#define CC_WRITABLE 0x00fffff1u
#define CSTS_SHST(x) ((u32)(x) << 2)
enum { SHST_NONE, SHST_BUSY, SHST_COMPLETE };

static void fetch_all(struct nvme *n);

/* --- completions --- */

static void fatal(struct nvme *n, const char *why)
{
    if (!(n->csts & CSTS_CFS))
        log_msg(n->config.log, LOG_WARN, "nvme: %s; the controller waits for a reset by the guest's driver", why);
    n->csts |= CSTS_CFS;
}

/* 3.1.3: with INTx, any completion that the driver has not taken pulls the wire. */
static void update_intx(struct nvme *n)
{
    bool level = false;

    for (unsigned i = 0; i <= n->config.queues; i++)
        level |= n->cq[i].exists && n->cq[i].interrupts && n->cq[i].head != n->cq[i].tail;
    pci_intx(&n->fn, level && !(n->intms & 1));
}

/* After a batch of nvme_post(). */
static void interrupt(struct nvme *n)
{
    for (unsigned i = 0; i <= n->config.queues; i++) {
        struct nvme_cq *q = &n->cq[i];

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

void nvme_post(struct nvme *n, u16 sq, u16 cid, u32 dw0, int status)
{
    struct nvme_cq *q = &n->cq[n->sq[sq].cq];
    u64 at = q->gpa + q->tail * sizeof(struct nvme_completion);
    struct nvme_completion c = { .dw0 = dw0, .sq_head = n->sq[sq].head, .sq_id = sq, .cid = cid };
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

static void delete_sq(struct nvme *n, struct nvme_sq *q)
{
    u16 cid = q->delete_cid;

    *q = (struct nvme_sq){ 0 };
    n->cq[0].reserved--;
    n->sq[0].outstanding--;
    nvme_post(n, 0, cid, 0, SC_SUCCESS);
}

void nvme_release(struct nvme_request *r)
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

void nvme_complete(struct nvme_request *r, u32 dw0, int status)
{
    struct nvme *n = r->nvme;
    struct nvme_sq *q = &n->sq[r->sq];
    u16 sq = r->sq, cid = r->cmd.cid;

    nvme_release(r);
    if (n->stopping || !q->exists)
        return;
    n->cq[q->cq].reserved--;
    q->outstanding--;
    nvme_post(n, sq, cid, dw0, status);
    if (q->deleting && !q->outstanding)
        delete_sq(n, q);
}

/* --- queues --- */

/* True: it is done with. */
static bool start(struct nvme_request *r, bool at_once)
{
    bool admin = !r->sq;
    u32 dw0 = 0;
    int status;

    r->io = (struct block_req){ 0 };
    r->flush = false;
    r->ranges = r->ranged = 0;
    status = r->sq ? nvme_io_command(r, at_once) : nvme_admin_command(r, &dw0);
    if (status != LATER)
        nvme_complete(r, dw0, status);
    else if (!admin)
        r->nvme->in_flight++;
    return status != LATER;
}

static bool fetch(struct nvme *n, unsigned id)
{
    struct nvme_sq *q = &n->sq[id];
    struct nvme_request *r = n->free;

    if (!q->exists || q->deleting || !r)
        return false;
    if (q->head == q->tail)
        nvme_take_tail(n, id);
    if (q->head == q->tail)
        return false;
    if (!nvme_has_place(&n->cq[q->cq]))
        nvme_take_head(n, q->cq);
    if (!nvme_has_place(&n->cq[q->cq]))
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
    unsigned budget = 2 * NVME_ENTRIES_MAX;
    bool more = true;

    n->room = BLOCK_AT_ONCE_MAX;
    while (budget && nvme_running(n) && (more || nvme_listen(n))) {
        budget--;
        more = false;
        for (unsigned i = 0; i <= n->config.queues && nvme_running(n); i++)
            for (unsigned burst = 0; burst < 8 && budget && fetch(n, i); burst++) {
                budget--;
                more = true;
            }
    }
    if (!budget && !n->again_sent && nvme_running(n)) {
        n->again_sent = true;
        n->in_flight++;
        if (block_submit(n->block, &n->again))
            bug_on(true);
    }
    nvme_tell_events(n);
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
    n->shadowed = false;
    n->csts = 0;
    n->intms = 0;
    pci_intx(&n->fn, false);
}

void nvme_came_back(struct nvme *n)
{
    n->in_flight--;
    if (!n->stopping)
        fetch_all(n);
    else if (!n->in_flight)
        forget(n);
    pthread_cond_broadcast(&n->idle);
}

static void nvme_again(struct block_req *io)
{
    struct nvme *n = container_of(io, struct nvme, again);

    pthread_mutex_lock(&n->device.lock);
    n->again_sent = false;
    if (!n->gone)
        nvme_came_back(n);
    pthread_mutex_unlock(&n->device.lock);
}

static void flush_done(struct block_req *io)
{
    struct nvme *n = container_of(io, struct nvme, flush);

    pthread_mutex_lock(&n->device.lock);
    n->flushing = false;
    if (io->result < 0 && !n->gone) {
        n->dirty = true;
        nvme_host_error(n, io);
    }
    if ((n->csts & CSTS_SHST(3)) == CSTS_SHST(SHST_BUSY))
        n->csts = (n->csts & ~CSTS_SHST(3)) | CSTS_SHST(SHST_COMPLETE);
    pthread_cond_broadcast(&n->idle);
    pthread_mutex_unlock(&n->device.lock);
}

/* What is not under way already. Held: for a full host, as the guest's own; the guest waits for it. */
static void begin_flush(struct nvme *n, bool held)
{
    if (n->flushing)
        return;
    n->dirty = false;
    n->flush = (struct block_req){ .op = BLOCK_FLUSH, .never_held = !held, .done = flush_done };
    n->flushing = !block_submit(n->block, &n->flush);
}

static void shut_down(struct nvme *n)
{
    begin_flush(n, true);
    n->csts = (n->csts & ~CSTS_SHST(3)) | CSTS_SHST(n->flushing ? SHST_BUSY : SHST_COMPLETE);
}

/* --- registers --- */

static bool queue_fits(struct nvme *n, u64 gpa, u32 entries, size_t size)
{
    return entries >= 2 && !(gpa & ~PAGE_MASK) && ram_has(n->config.ram, gpa, entries * size);
}

static void enable(struct nvme *n)
{
    u32 sqs = (n->aqa & 0xfff) + 1, cqs = (n->aqa >> 16 & 0xfff) + 1;

    if (CC_CSS(n->cc) || CC_MPS(n->cc) || CC_AMS(n->cc) || !queue_fits(n, n->asq, sqs, sizeof(struct nvme_command)) ||
        !queue_fits(n, n->acq, cqs, sizeof(struct nvme_completion))) {
        fatal(n, "it was enabled with values that it does not support");
        return;
    }
    n->sq[0] = (struct nvme_sq){ .exists = true, .entries = sqs, .gpa = n->asq };
    n->cq[0] = (struct nvme_cq){ .exists = true, .interrupts = true, .phase = true, .entries = cqs, .gpa = n->acq };
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
        shut_down(n);
    } else if (!CC_SHN(val)) {
        n->csts &= ~CSTS_SHST(3);
    }
}

static void doorbell(struct nvme *n, unsigned index, u32 val)
{
    unsigned id = index / 2;

    if (id > n->config.queues || !nvme_running(n))
        return;
    n->counts.notifications++;
    if (index & 1) {
        if (!n->cq[id].exists)
            return;
        nvme_set_head(&n->cq[id], val);
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

    put64(reg + REG_CAP, (NVME_ENTRIES_MAX - 1) | CAP_CQR | CAP_TO(20) | CAP_CSS_NVM);
    put32(reg + REG_VS, NVME_VERSION);
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

static void nvme_held(void *arg)
{
    struct nvme *n = arg;

    pthread_mutex_lock(&n->device.lock);
    pthread_cond_broadcast(&n->idle);
    pthread_mutex_unlock(&n->device.lock);
}

/* Requests that are held for a full host do not come back by themselves; a shutdown's flush can be one. */
static bool only_held(struct nvme *n)
{
    return n->in_flight + n->flushing <= block_held(n->block);
}

/* While the controller is being reset: what is in flight ends, within QUIESCE_SECONDS; what is held, or comes to be, fails. */
static void end_requests(struct nvme *n)
{
    struct timespec end = quiesce_end();
    int r = 0;

    while ((n->in_flight || block_held(n->block)) && r == 0)
        if (block_held(n->block)) {
            pthread_mutex_unlock(&n->device.lock);
            block_fail_held(n->block);
            pthread_mutex_lock(&n->device.lock);
        } else {
            r = pthread_cond_timedwait(&n->idle, &n->device.lock, &end);
        }
}

static void nvme_reset(struct device *d)
{
    struct nvme *n = container_of(d, struct nvme, device);

    pthread_mutex_lock(&d->lock);
    n->stopping = true;
    end_requests(n);
    if (n->in_flight && block_abandon(n->block))
        end_requests(n);
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
    while (!only_held(n) && r == 0)
        r = pthread_cond_timedwait(&n->idle, &d->lock, &end);
    if (n->dirty && r == 0)
        begin_flush(n, false);
    while (!only_held(n) && r == 0)
        r = pthread_cond_timedwait(&n->idle, &d->lock, &end);
    pthread_mutex_unlock(&d->lock);
    if (r == ETIMEDOUT)
        log_msg(n->config.log, LOG_WARN, "disk %s: the host has not answered for %d seconds", block_path(n->block), QUIESCE_SECONDS);
}

static bool queue_valid(struct nvme *n, unsigned i)
{
    const struct nvme_sq *s = &n->sq[i];
    const struct nvme_cq *c = &n->cq[i];

    if (s->exists && (s->entries < 2 || s->entries > 4096 || s->head >= s->entries || s->tail >= s->entries || s->cq > n->config.queues ||
                      !n->cq[s->cq].exists || !ram_has(n->config.ram, s->gpa, s->entries * sizeof(struct nvme_command))))
        return false;
    return !c->exists || (c->entries >= 2 && c->entries <= 4096 && c->head < c->entries && c->tail < c->entries && c->vector <= n->config.queues &&
                          ram_has(n->config.ram, c->gpa, c->entries * sizeof(struct nvme_completion)));
}

static void queue_state(struct nvme *n, unsigned i, struct stream *s)
{
    struct nvme_sq *sq = &n->sq[i];
    struct nvme_cq *cq = &n->cq[i];

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
    struct nvme_command cmd;
    struct nvme_request *r = n->free;
    u16 sq = 0;

    stream_u16(s, &sq);
    stream_bytes(s, &cmd, sizeof(cmd));
    if (s->error)
        return;
    if (!r || !sq || sq > n->config.queues || !n->sq[sq].exists || !nvme_has_place(&n->cq[n->sq[sq].cq])) {
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

    for (unsigned i = 0; i < NVME_REQUESTS && !s->load && !n->stopping; i++)
        count = (u16)(count + n->request[i].busy);
    stream_u16(s, &count);
    if (s->load && !s->error && (count > NVME_REQUESTS || n->in_flight))
        stream_bad(s, "an NVMe disk has too many commands in flight");
    for (; s->load && count && !s->error; count--)
        load_request(n, s);
    for (unsigned i = 0; !s->load && count && i < NVME_REQUESTS; i++)
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

    if (!stream_section(s, "nvme", 2))
        return;
    if (s->load)
        forget(n);
    stream_u32(s, &cc);
    stream_u32(s, &n->csts);
    stream_u32(s, &n->aqa);
    stream_u32(s, &n->intms);
    stream_u64(s, &n->asq);
    stream_u64(s, &n->acq);
    stream_bool(s, &n->shadowed);
    stream_u64(s, &n->shadow);
    stream_u64(s, &n->event);
    stream_bool(s, &n->stopping);
    stream_bool(s, &n->changed);
    stream_bool(s, &n->changed_told);
    for (unsigned i = 0; i < FEATS; i++)
        stream_u32(s, &n->feature[i]);
    stream_u8(s, &events);
    for (unsigned i = 0; i < NVME_EVENTS_MAX; i++)
        stream_u16(s, &n->event_cid[i]);
    for (unsigned i = 0; i <= n->config.queues; i++)
        queue_state(n, i, s);
    pci_fn_state(&n->fn, s);
    if (s->load && !s->error) {
        n->cc = cc;
        n->events = events;
        n->master = pci_bus_master(&n->fn);
        if (events > NVME_EVENTS_MAX || ((n->csts & CSTS_RDY) && (!n->sq[0].exists || !n->cq[0].exists)))
            stream_bad(s, "an NVMe controller's state makes no sense");
        if (!s->error && n->shadowed && (!ram_has(n->config.ram, n->shadow, PAGE_SIZE) || !ram_has(n->config.ram, n->event, PAGE_SIZE) ||
                                         ((n->shadow | n->event) & ~PAGE_MASK)))
            stream_bad(s, "an NVMe controller's doorbells lie outside of memory");
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
    if (s->load && !s->error && (n->csts & CSTS_SHST(3)) == CSTS_SHST(SHST_BUSY))
        shut_down(n);
    if (s->load && !s->error)
        fetch_all(n);
}

static void destroy(struct nvme *n)
{
    for (unsigned i = 0; i < NVME_REQUESTS; i++) {
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
    nvme_tell_events(n);
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
    block_tell_held(block, nvme_held, n);
    for (unsigned i = 0; i < NVME_REQUESTS; i++) {
        n->request[i].nvme = n;
        nvme_release(&n->request[i]);
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
