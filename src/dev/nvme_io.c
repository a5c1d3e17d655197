/*
 * NVMe: a command's data (PRPs), I/O commands, and what the back end answers (see nvme.c).
 *
 * next_io() says what follows on what has just ended (the next range of a deallocation, a flush behind a write that is to be on stable storage); run() has the back
 * end do it, as far as that goes without waiting; nvme_done() goes on from there.
 */
#include <errno.h>

#include "base/err.h"
#include "dev/nvme_int.h"

#define TRANSFER_MAX (PAGE_SIZE << NVME_MDTS)
#define PARTS_MAX ((1u << NVME_MDTS) + 1)

enum { IO_FLUSH, IO_WRITE, IO_READ, IO_ZEROES = 8, IO_DSM };
#define RW_FUA BIT(30)
#define ZEROES_DEAC BIT(25)
#define DSM_DEALLOCATE BIT(2)

/* --- data (4.3) --- */

static bool add_part(struct nvme_request *r, u64 gpa, u32 len)
{
    struct nvme_part *last = r->parts ? &r->part[r->parts - 1] : NULL;

    if (last && last->gpa + last->len == gpa) {
        last->len += len;
        return true;
    }
    if (r->parts == PARTS_MAX)
        return false;
    r->part[r->parts++] = (struct nvme_part){ gpa, len };
    return true;
}

static bool make_room(struct nvme_request *r)
{
    if (!r->part)
        r->part = malloc(PARTS_MAX * sizeof(*r->part));
    if (!r->iov)
        r->iov = malloc(2 * PARTS_MAX * sizeof(*r->iov));
    return r->part && r->iov;
}

/* A list goes on in another page when it ends with one: its last entry says where. The longest needs two such steps. */
static int walk_list(struct nvme_request *r, u64 list, u32 left)
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

static int map_data(struct nvme_request *r, u32 len, bool writable)
{
    const struct nvme_command *c = &r->cmd;
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

int nvme_copy_data(struct nvme_request *r, void *buf, u32 len, bool to_guest)
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

void nvme_host_error(struct nvme *n, const struct block_req *io)
{
    if (n->logged == io->result)
        return;
    n->logged = io->result;
    log_msg(n->config.log, LOG_ERROR, "disk %s: %s failed: %s%s", block_path(n->block), block_verb(io->op), strerror(-io->result),
            io->never_held ? "" : "; the guest sees an I/O error");
}

static int prepare(struct nvme_request *r, enum block_op op, u64 lba, u64 count)
{
    if (!range_in(lba, count, nvme_lbas(r->nvme)))
        return SC_LBA_RANGE;
    r->io.op = op;
    r->io.offset = lba << NVME_LBA_SHIFT;
    r->io.len = count << NVME_LBA_SHIFT;
    return SC_SUCCESS;
}

/* The next range of a deallocation; SUCCESS with nothing prepared when there is none. */
static int next_range(struct nvme_request *r, bool *more)
{
    const struct nvme_range *d = &r->range[r->ranged];

    *more = r->ranged < r->ranges;
    if (!*more)
        return SC_SUCCESS;
    r->ranged++;
    return prepare(r, BLOCK_DISCARD, d->lba, d->lbas);
}

/* What to do behind what has just ended: LATER when there is more, in r->io. */
static int next_io(struct nvme_request *r)
{
    struct nvme *n = r->nvme;
    struct block_req *io = &r->io;
    bool more = false;

    if (io->op != BLOCK_READ && io->op != BLOCK_FLUSH)
        n->dirty = true;
    if (io->result < 0) {
        nvme_host_error(n, io);
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
static int run(struct nvme_request *r, bool at_once)
{
    int status;

    do {
        u64 len = block_req_len(&r->io);

        if (r->io.op == BLOCK_FLUSH)
            r->nvme->dirty = false;
        r->io.at_once = at_once && len <= r->nvme->room;
        r->io.done = nvme_done;
        if (!block_submit(r->nvme->block, &r->io))
            return LATER;
        r->nvme->room -= MIN(len, r->nvme->room);
    } while ((status = next_io(r)) == LATER);
    return status;
}

static int dsm(struct nvme_request *r, bool *nothing)
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
    status = nvme_copy_data(r, r->range, count * (u32)sizeof(*r->range), false);
    for (u32 i = 0; status == SC_SUCCESS && i < count; i++)
        if (!range_in(r->range[i].lba, r->range[i].lbas, nvme_lbas(r->nvme)))
            status = SC_LBA_RANGE;
    r->ranges = count;
    return status == SC_SUCCESS ? next_range(r, &(bool){ false }) : status;
}

int nvme_io_command(struct nvme_request *r, bool at_once)
{
    const struct nvme_command *c = &r->cmd;
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
        if (count << NVME_LBA_SHIFT > TRANSFER_MAX)
            return SC_INVALID_FIELD;
        status = prepare(r, write ? BLOCK_WRITE : BLOCK_READ, lba, count);
        if (status == SC_SUCCESS)
            status = map_data(r, (u32)(count << NVME_LBA_SHIFT), !write);
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

/* --- answers of the back end --- */

static void nvme_done(struct block_req *io)
{
    struct nvme_request *r = container_of(io, struct nvme_request, io);
    struct nvme *n = r->nvme;

    pthread_mutex_lock(&n->device.lock);
    if (!n->gone) {
        int status = next_io(r);

        if (status == LATER)
            status = run(r, false);
        if (status != LATER) {
            nvme_complete(r, 0, status);
            nvme_came_back(n);
        }
    }
    pthread_mutex_unlock(&n->device.lock);
}
