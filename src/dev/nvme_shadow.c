/*
 * NVMe: doorbells in memory (NVM Express 1.4, 5.7 and 7.13; see nvme.c), which spare a virtual machine exits.
 *
 * The driver gives two pages, laid out as the doorbell registers are. In the first it writes each doorbell's value; it writes the register, too, only if that passes the value
 * that we wrote into the second (EventIdx). So:
 *
 * - A submission queue's tail is looked at whenever all that was known of is fetched. Then its EventIdx is the tail, and the tail is looked at once more: who changed it before it could
 *   see that is found, who changes it later rings.
 * - A completion queue's head is looked at when there is no place left. Nobody needs to know it before, so its EventIdx is a value that is not passed, unless commands wait for a
 *   place, or INTx needs to be told that completions were taken.
 * - The admin queues' doorbells are always rung: drivers do not write them into memory, though they should.
 *
 * What the driver writes there is checked as what it writes to registers, and read once.
 */
#include "dev/nvme_int.h"

#define NEVER 0xffffu                                              /* only passed where a queue begins anew */

static u64 place(unsigned id, bool cq)
{
    return (2 * id + cq) * sizeof(u32);
}

/* Without side effects if it makes no sense. */
static u32 look(const struct nvme *n, unsigned id, bool cq, u32 otherwise)
{
    u32 *p = (u32 *)(void *)ram_range(n->config.ram, n->shadow + place(id, cq), sizeof(u32));

    return p ? __atomic_load_n(p, __ATOMIC_ACQUIRE) : otherwise;
}

static void store(struct nvme *n, u64 gpa, u32 val)
{
    u32 *p = (u32 *)(void *)ram_range(n->config.ram, gpa, sizeof(u32));

    if (!p)
        return;
    ram_begin_write(n->config.ram, gpa, sizeof(u32));
    __atomic_store_n(p, val, __ATOMIC_RELEASE);
    ram_end_write(n->config.ram, gpa, sizeof(u32));
}

static void set_event(struct nvme *n, unsigned id, bool cq, u32 *known, u32 val)
{
    if (*known == val + 1)
        return;
    *known = val + 1;
    store(n, n->event + place(id, cq), val);
}

int nvme_shadow_config(struct nvme *n, const struct nvme_command *c)
{
    if (((c->prp[0] | c->prp[1]) & ~PAGE_MASK) || !ram_has(n->config.ram, c->prp[0], PAGE_SIZE) || !ram_has(n->config.ram, c->prp[1], PAGE_SIZE))
        return SC_INVALID_FIELD;
    n->shadow = c->prp[0];
    n->event = c->prp[1];
    n->shadowed = true;
    for (unsigned i = 0; i <= n->config.queues; i++)
        n->sq[i].event = n->cq[i].event = 0;
    return SC_SUCCESS;
}

void nvme_shadow_created(struct nvme *n, unsigned id, bool cq)
{
    if (n->shadowed)
        store(n, n->shadow + place(id, cq), 0);
}

void nvme_take_tail(struct nvme *n, unsigned id)
{
    struct nvme_sq *q = &n->sq[id];
    u32 tail;

    if (!n->shadowed || !id)
        return;
    tail = look(n, id, false, q->tail);
    if (tail < q->entries)
        q->tail = (u16)tail;
}

void nvme_take_head(struct nvme *n, unsigned id)
{
    struct nvme_cq *q = &n->cq[id];

    if (n->shadowed && id)
        nvme_set_head(q, look(n, id, true, q->head));
}

/* Commands wait in queues that complete to this one. */
static bool waited_for(const struct nvme *n, unsigned cq)
{
    for (unsigned i = 1; i <= n->config.queues; i++)
        if (n->sq[i].exists && n->sq[i].cq == cq && n->sq[i].head != n->sq[i].tail && !nvme_has_place(&n->cq[cq]))
            return true;
    return false;
}

bool nvme_listen(struct nvme *n)
{
    bool again = false;

    if (!n->shadowed)
        return false;
    for (unsigned i = 0; i <= n->config.queues; i++) {
        struct nvme_sq *sq = &n->sq[i];
        struct nvme_cq *cq = &n->cq[i];
        bool told = cq->exists && (!i || !pci_msix_enabled(&n->fn) || waited_for(n, i));

        if (cq->exists)
            set_event(n, i, true, &cq->event, told ? cq->head : NEVER);
        if (sq->exists)
            set_event(n, i, false, &sq->event, sq->tail);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);                       /* EventIdx before the second look: the driver does it the other way round */
    for (unsigned i = 1; i <= n->config.queues; i++) {
        u16 tail = n->sq[i].tail, head = n->cq[i].head;

        if (n->sq[i].exists)
            nvme_take_tail(n, i);
        if (n->cq[i].exists && n->cq[i].event != NEVER + 1)
            nvme_take_head(n, i);
        again |= n->sq[i].tail != tail || n->cq[i].head != head;
    }
    return again;
}
