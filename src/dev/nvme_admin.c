/*
 * NVMe: admin commands (NVM Express 1.4, 5): queues are created and deleted, identification, log pages, features, asynchronous events (see nvme.c).
 */
#include <stdio.h>

#include "dev/nvme_int.h"

enum { ADMIN_DELETE_SQ, ADMIN_CREATE_SQ, ADMIN_LOG, ADMIN_DELETE_CQ = 4, ADMIN_CREATE_CQ, ADMIN_IDENTIFY, ADMIN_ABORT = 8, ADMIN_SET_FEATURES, ADMIN_GET_FEATURES,
       ADMIN_EVENT = 0xc, ADMIN_DOORBELLS = 0x7c };
enum { LOG_PAGE_ERRORS = 1, LOG_PAGE_HEALTH, LOG_PAGE_FIRMWARE, LOG_PAGE_CHANGED };


#define EVENT_NAMESPACE BIT(8)                                     /* of the events' configuration */
#define EVENT_NAMESPACE_CHANGED (2u | 0u << 8 | LOG_PAGE_CHANGED << 16) /* notice, namespace attribute changed, its log page */

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
    p[77] = NVME_MDTS;
    put32(p + 80, NVME_VERSION);
    put32(p + 92, EVENT_NAMESPACE);
    p[111] = 1;                                                    /* an I/O controller */
    put16(p + 256, BIT(8));                                        /* doorbells in memory */
    p[258] = 3;                                                    /* Abort commands at a time, less one */
    p[259] = NVME_EVENTS_MAX - 1;
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
    put64(p + 0, nvme_lbas(n));
    put64(p + 8, nvme_lbas(n));
    put64(p + 16, nvme_lbas(n));
    p[24] = BIT(4);                                                /* the next fields are valid: written best by 4 KiB */
    put16(p + 64, 7);
    put16(p + 66, 7);
    put16(p + 68, 7);
    put16(p + 70, 7);
    put16(p + 72, 7);
    p[99] = block_readonly(n->block);
    namespace_guid(n, p + 104);
    p[130] = NVME_LBA_SHIFT;
}

static int identify(struct nvme_request *r)
{
    const struct nvme_command *c = &r->cmd;
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
    return nvme_copy_data(r, page, sizeof(page), true);
}

static int get_log(struct nvme_request *r)
{
    const struct nvme_command *c = &r->cmd;
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
    return nvme_copy_data(r, page + off, (u32)MIN(len, size - off), true);
}

static int create_cq(struct nvme *n, const struct nvme_command *c)
{
    u32 id = c->cdw[0] & 0xffff, entries = (c->cdw[0] >> 16) + 1, vector = c->cdw[1] >> 16;

    if (!id || id > n->config.queues || n->cq[id].exists)
        return SC_QUEUE_ID;
    if (entries < 2 || entries > NVME_ENTRIES_MAX)
        return SC_QUEUE_SIZE;
    if (!(c->cdw[1] & 1) || (c->prp[0] & ~PAGE_MASK) || CC_IOCQES(n->cc) != 4)
        return SC_INVALID_FIELD;
    if (vector > n->config.queues)
        return SC_INTERRUPT_VECTOR;
    if (!ram_has(n->config.ram, c->prp[0], entries * sizeof(struct nvme_completion)))
        return SC_DATA_TRANSFER;
    n->cq[id] = (struct nvme_cq){ .exists = true, .interrupts = c->cdw[1] & 2, .phase = true, .vector = (u16)vector, .entries = entries, .gpa = c->prp[0] };
    nvme_shadow_created(n, id, true);
    return SC_SUCCESS;
}

static int create_sq(struct nvme *n, const struct nvme_command *c)
{
    u32 id = c->cdw[0] & 0xffff, entries = (c->cdw[0] >> 16) + 1, cq = c->cdw[1] >> 16;

    if (!id || id > n->config.queues || n->sq[id].exists)
        return SC_QUEUE_ID;
    if (!cq || cq > n->config.queues || !n->cq[cq].exists)
        return SC_CQ_INVALID;
    if (entries < 2 || entries > NVME_ENTRIES_MAX)
        return SC_QUEUE_SIZE;
    if (!(c->cdw[1] & 1) || (c->prp[0] & ~PAGE_MASK) || CC_IOSQES(n->cc) != 6)
        return SC_INVALID_FIELD;
    if (!ram_has(n->config.ram, c->prp[0], entries * sizeof(struct nvme_command)))
        return SC_DATA_TRANSFER;
    n->sq[id] = (struct nvme_sq){ .exists = true, .cq = (u16)cq, .entries = entries, .gpa = c->prp[0] };
    nvme_shadow_created(n, id, false);
    return SC_SUCCESS;
}

static int delete_cq(struct nvme *n, u32 id)
{
    if (!id || id > n->config.queues || !n->cq[id].exists)
        return SC_QUEUE_ID;
    for (unsigned i = 1; i <= n->config.queues; i++)
        if (n->sq[i].exists && n->sq[i].cq == id)
            return SC_QUEUE_DELETION;
    n->cq[id] = (struct nvme_cq){ 0 };
    return SC_SUCCESS;
}

/* The command's place in the queue stays reserved until the last command has come back. */
static int begin_delete_sq(struct nvme_request *r, u32 id)
{
    struct nvme *n = r->nvme;
    struct nvme_sq *q = id <= n->config.queues ? &n->sq[id] : NULL;

    if (!id || !q || !q->exists || q->deleting)
        return SC_QUEUE_ID;
    if (!q->outstanding) {
        *q = (struct nvme_sq){ 0 };
        return SC_SUCCESS;
    }
    q->deleting = true;
    q->delete_cid = r->cmd.cid;
    nvme_release(r);
    return LATER;
}

static int feature(struct nvme_request *r, bool set, u32 *dw0)
{
    struct nvme *n = r->nvme;
    const struct nvme_command *c = &r->cmd;
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

void nvme_tell_events(struct nvme *n)
{
    if (!n->changed || n->changed_told || !n->events || !(n->feature[FEAT_EVENTS] & EVENT_NAMESPACE) || !nvme_running(n) || !nvme_has_place(&n->cq[0]))
        return;
    n->changed_told = true;
    nvme_post(n, 0, n->event_cid[--n->events], EVENT_NAMESPACE_CHANGED, SC_SUCCESS);
}

static int wait_event(struct nvme_request *r)
{
    struct nvme *n = r->nvme;

    if (n->events == NVME_EVENTS_MAX)
        return SC_EVENT_LIMIT;
    n->event_cid[n->events++] = r->cmd.cid;
    n->cq[0].reserved--;                                           /* it may wait for ever: it takes its place when it is there */
    n->sq[0].outstanding--;
    nvme_release(r);
    return LATER;
}

int nvme_admin_command(struct nvme_request *r, u32 *dw0)
{
    const struct nvme_command *c = &r->cmd;
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
    case ADMIN_DOORBELLS: return nvme_shadow_config(n, c);
    default: return SC_INVALID_OPCODE;
    }
}
