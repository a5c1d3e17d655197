/*
 * Fuzzing of the ring reader: the input is the driver's memory. Whatever it says, the device sees pieces that lie in guest memory, whose lengths add
 * up, readable ones before writable ones, and no more chains than entries.
 *
 *   byte 0: bit 0 event index, bit 1 indirect descriptors, bit 2 packed, bits 7..4 how the device treats each chain; byte 1: log2 of the size;
 *   the rest: bytes from gpa 0 on (available ring at 0, descriptors at 0x40, used ring at 0x8000, an indirect table wherever a descriptor says)
 */
#include "../dev/virtio_guest.h"

#define DESC 0x40u
#define USED 0x8000u
#define MEMORY (1 * MiB)
#define INPUT_MAX 0x4000u

static bool in_ram(const struct ram *r, const struct iovec *v)
{
    for (unsigned i = 0; i < r->runs; i++) {
        const u8 *p = v->iov_base;

        if (p >= r->run[i].hva && range_in((u64)(p - r->run[i].hva), v->iov_len, r->run[i].size))
            return true;
    }
    return false;
}

static u64 check(const struct ram *r, const struct iovec *v, unsigned n)
{
    u64 sum = 0;

    for (unsigned i = 0; i < n; i++) {
        bug_on(!v[i].iov_len || !in_ram(r, &v[i]));
        sum += v[i].iov_len;
    }
    return sum;
}

static void use(struct virtq *q, struct virtq_chain *c, unsigned how)
{
    u8 buf[300];

    bug_on(check(q->ram, c->out, c->outs) != c->out_total || check(q->ram, c->in, c->ins) != c->in_total);
    bug_on(c->out_total + c->in_total > UINT32_MAX || !(c->out_total + c->in_total));
    if (how & 1)
        bug_on(virtq_read(c, buf, sizeof(buf)) != MIN(sizeof(buf), c->out_total));
    if (how & 2)
        bug_on(!virtq_take_last_in(c) != !c->in_total);
    if (how & 4)
        virtq_write(c, buf, how & 1 ? sizeof(buf) : 0);
    if (how & 8)
        virtq_skip_out(c, c->out_len / 2);
    bug_on(check(q->ram, c->out, c->outs) != c->out_len || check(q->ram, c->in, c->ins) != c->in_len);
    virtq_push(q, c, (u32)(c->in_total - c->in_len));
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    static struct ram ram;
    static struct virtq_chain c;
    struct virtq q;
    unsigned chains = 0;

    if (len < 2)
        return 0;
    if (!ram.runs)
        bug_on(ram_init(&ram) < 0 || ram_add(&ram, 0, MEMORY) < 0 || ram_add(&ram, MEMORY, PAGE_SIZE) < 0 || ram_add(&ram, 16 * MiB, PAGE_SIZE) < 0);
    memset(ram.run[0].hva, 0, INPUT_MAX);
    bug_on(ram_write(&ram, 0, data + 2, MIN(len - 2, INPUT_MAX)) < 0);
    virtq_init(&q, &ram, 64);
    q.size = (u16)(1 << data[1] % 5);
    q.desc = DESC;
    q.used = USED;
    q.packed = data[0] & 4;
    q.event_idx = data[0] & 1;
    q.indirect = data[0] & 2;
    virtq_enable(&q);
    while (virtq_pop(&q, &c) > 0 && chains++ < 2 * q.size) {
        bug_on(q.packed ? !c.entries || c.entries > q.size || q.avail_idx >= q.size : c.head >= q.size);
        use(&q, &c, data[0] >> 4);
        virtq_wants_interrupt(&q);
        virtq_listen(&q);
    }
    return 0;
}
