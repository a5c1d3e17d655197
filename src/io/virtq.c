/*
 * Virtqueues (see virtq.h; virtio 1.2, 2.7 "Split Virtqueues", 2.8 "Packed Virtqueues").
 *
 * The driver may write to rings and descriptors at any time, so every index and every descriptor is loaded once, into a local copy, and checked there.
 * Indices of rings are naturally aligned and so never cross a page: they are accessed atomically in place. Wider fields are copied.
 *
 * Ordering, against a driver on another processor:
 *   - the available index is loaded with acquire, before the entries that it announces;
 *   - the used index is stored with release, after the entries and after the data (2.7.13, 2.7.8.2);
 *   - likewise a packed descriptor's flags, before the rest of it, and after all else of what is given back with it;
 *   - a full fence stands between our store (used index, or our wish for notifications) and the load that decides whether the driver saw it.
 */
#include "io/virtq.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <string.h>

#include "base/err.h"

#define AVAIL_FLAGS 0
#define AVAIL_IDX 2
#define AVAIL_RING 4
#define USED_FLAGS 0
#define USED_IDX 2
#define USED_RING 4
#define EVENT_OFF_WRAP 0                                           /* 2.8.14: of either event suppression area */
#define EVENT_FLAGS 2
#define EVENT_SIZE 4
#define PACKED_FLAGS 14                                            /* of a packed descriptor */
#define PACKED_AVAIL BIT(VRING_PACKED_DESC_F_AVAIL)
#define PACKED_USED BIT(VRING_PACKED_DESC_F_USED)

struct desc {
    u64 addr;
    u32 len;
    u16 flags, next;
};
_Static_assert(sizeof(struct desc) == 16, "as in 2.7.5");

struct packed_desc {
    u64 addr;
    u32 len;
    u16 id, flags;
};
_Static_assert(sizeof(struct packed_desc) == 16 && offsetof(struct packed_desc, flags) == PACKED_FLAGS, "as in 2.8.13");

void virtq_init(struct virtq *q, struct ram *ram, u16 size_max)
{
    bug_on(!size_max || size_max > VIRTQ_SIZE_MAX || (size_max & (size_max - 1)));
    *q = (struct virtq){ .ram = ram, .size_max = size_max, .size = size_max, .avail_wrap = true, .used_wrap = true };
}

void virtq_reset(struct virtq *q)
{
    u16 vector = q->vector;

    virtq_init(q, q->ram, q->size_max);
    q->vector = vector;
}

static u64 avail_size(const struct virtq *q)
{
    return AVAIL_RING + 2ull * q->size + 2;
}

static u64 used_size(const struct virtq *q)
{
    return USED_RING + 8ull * q->size + 2;
}

static bool areas_valid(const struct virtq *q)
{
    if (q->packed)
        return q->size && q->size <= q->size_max && !(q->desc % 16) && !(q->avail % 4) && !(q->used % 4) &&
               q->avail_idx < q->size && q->used_idx < q->size && ram_has(q->ram, q->desc, sizeof(struct packed_desc) * q->size) &&
               ram_has(q->ram, q->avail, EVENT_SIZE) && ram_has(q->ram, q->used, EVENT_SIZE);
    return q->size && q->size <= q->size_max && !(q->size & (q->size - 1)) &&
           !(q->desc % 16) && !(q->avail % 2) && !(q->used % 4) &&
           ram_has(q->ram, q->desc, sizeof(struct desc) * q->size) && ram_has(q->ram, q->avail, avail_size(q)) &&
           ram_has(q->ram, q->used, used_size(q));
}

void virtq_enable(struct virtq *q)
{
    q->enabled = true;
    q->broken = !areas_valid(q);
}

void virtq_state(struct virtq *q, struct stream *s)
{
    stream_u16(s, &q->size);
    stream_u64(s, &q->desc);
    stream_u64(s, &q->avail);
    stream_u64(s, &q->used);
    stream_bool(s, &q->enabled);
    stream_bool(s, &q->broken);
    stream_bool(s, &q->event_idx);
    stream_bool(s, &q->indirect);
    stream_u16(s, &q->avail_idx);
    stream_u16(s, &q->used_idx);
    stream_bool(s, &q->packed);
    stream_bool(s, &q->avail_wrap);
    stream_bool(s, &q->used_wrap);
    stream_u16(s, &q->unsignalled);
    stream_u16(s, &q->vector);
    if (s->load && !s->error && q->enabled && !q->broken && !areas_valid(q))
        stream_bad(s, "a virtqueue lies outside of memory");
}

/* --- fields of the rings --- */

/* gpa is even: one that is no RAM (any more: runs may become absent) reads as 0 and swallows stores, and the queue breaks. */
static u16 load16(struct virtq *q, u64 gpa, int order)
{
    u16 *p = (u16 *)(void *)ram_hva(q->ram, gpa);

    if (unlikely(!p)) {
        q->broken = true;
        return 0;
    }
    return order == __ATOMIC_ACQUIRE ? __atomic_load_n(p, __ATOMIC_ACQUIRE) : __atomic_load_n(p, __ATOMIC_RELAXED);
}

static void store16(struct virtq *q, u64 gpa, u16 val)
{
    u16 *p;

    ram_begin_write(q->ram, gpa, 2);
    p = (u16 *)(void *)ram_hva(q->ram, gpa);
    if (likely(p))
        __atomic_store_n(p, val, __ATOMIC_RELEASE);
    else
        q->broken = true;
    ram_end_write(q->ram, gpa, 2);
}

static u64 used_event(const struct virtq *q)
{
    return q->avail + AVAIL_RING + 2ull * q->size;
}

static u64 avail_event(const struct virtq *q)
{
    return q->used + USED_RING + 8ull * q->size;
}

/* --- chains --- */

static bool grow(void **array, unsigned *cap, unsigned need, unsigned max, size_t item)
{
    unsigned n = *cap ? *cap : 16;
    void *p;

    if (need <= *cap)
        return true;
    if (need > max)
        return false;
    while (n < need)
        n *= 2;
    p = realloc(*array, n * item);
    if (!p)
        return false;
    *array = p;
    *cap = n;
    return true;
}

/* Appends the host pieces of one descriptor's buffer. A run of RAM is one piece at most, so more space is seldom needed. */
static bool add_pieces(struct virtq *q, struct virtq_chain *c, const struct desc *d, unsigned *n)
{
    unsigned want = *n + 4, before = *n;
    int r;

    for (;;) {
        if (!grow((void **)&c->iov, &c->iov_cap, MIN(want, VIRTQ_PIECES_MAX), VIRTQ_PIECES_MAX, sizeof(*c->iov)))
            return false;
        *n = before;
        r = ram_iov(q->ram, d->addr, d->len, c->iov, n, c->iov_cap);
        if (r != -E2BIG)
            return r == 0;
        if (c->iov_cap >= VIRTQ_PIECES_MAX)
            return false;
        want = c->iov_cap * 2;
    }
}

/* One buffer: non-empty, in RAM, and all readable ones come before the writable ones (2.7.4.2). pieces counts those of both halves. */
static bool add_buffer(struct virtq *q, struct virtq_chain *c, const struct desc *d, unsigned *pieces)
{
    bool writable = d->flags & VRING_DESC_F_WRITE;

    if (!d->len || c->out_total + c->in_total + d->len > UINT32_MAX || (!writable && c->in_total))
        return false;
    if (!add_pieces(q, c, d, pieces))
        return false;
    if (!grow((void **)&c->part, &c->part_cap, c->parts + 1, VIRTQ_PARTS_MAX, sizeof(*c->part)))
        return false;
    c->part[c->parts++] = (struct virtq_part){ .gpa = d->addr, .len = d->len, .writable = writable };
    if (writable) {
        c->in_total += d->len;
    } else {
        c->out_total += d->len;
        c->outs = *pieces;
    }
    return true;
}

static bool table_valid(const struct virtq *q, const struct desc *d)
{
    return q->indirect && !(d->flags & VRING_DESC_F_NEXT) && d->len && !(d->len % sizeof(*d)) &&
           d->len / sizeof(*d) <= VIRTQ_DESCS_MAX && ram_has(q->ram, d->addr, d->len);
}

/*
 * Walks the chain. table is where `next` indexes now: the ring's descriptor area or, after a descriptor that says so, an indirect table, which is the
 * end of the chain (2.7.5.3: no next beside it, no second table inside). Each descriptor of a table of n can be used once, so the budget ends every loop.
 */
static bool walk_split(struct virtq *q, struct virtq_chain *c, unsigned *pieces)
{
    u64 table = q->desc;
    unsigned entries = q->size, at = c->head, budget = q->size;
    bool inside = false;
    struct desc d;

    for (;;) {
        if (at >= entries || !budget-- || ram_read(q->ram, table + at * sizeof(d), &d, sizeof(d)) < 0)
            return false;
        if (d.flags & VRING_DESC_F_INDIRECT) {
            if (inside || !table_valid(q, &d))
                return false;
            inside = true;
            table = d.addr;
            entries = budget = d.len / sizeof(d);
            at = 0;
            continue;
        }
        if (!add_buffer(q, c, &d, pieces))
            return false;
        if (!(d.flags & VRING_DESC_F_NEXT))
            return true;
        at = d.next;
    }
}

static bool read_packed(struct virtq *q, u64 gpa, struct desc *d)
{
    struct packed_desc p;

    if (ram_read(q->ram, gpa, &p, sizeof(p)) < 0)
        return false;
    *d = (struct desc){ .addr = p.addr, .len = p.len, .flags = p.flags, .next = p.id };
    return true;
}

/* 2.8.7: all of a table is one chain, in order. */
static bool walk_table(struct virtq *q, struct virtq_chain *c, const struct desc *table, unsigned *pieces)
{
    struct desc d;

    for (unsigned i = 0; i < table->len / sizeof(d); i++)
        if (!read_packed(q, table->addr + i * sizeof(d), &d) || (d.flags & VRING_DESC_F_INDIRECT) || !add_buffer(q, c, &d, pieces))
            return false;
    return true;
}

/* A chain lies in the ring in order; its ID stands in the last descriptor (2.8.6). */
static bool walk_packed(struct virtq *q, struct virtq_chain *c, unsigned *pieces)
{
    unsigned at = q->avail_idx;
    struct desc d;

    do {
        if (c->entries == q->size || !read_packed(q, q->desc + at * sizeof(d), &d))
            return false;
        c->entries++;
        at = at + 1 == q->size ? 0 : at + 1;
        if (!(d.flags & VRING_DESC_F_INDIRECT) ? !add_buffer(q, c, &d, pieces) : !table_valid(q, &d) || !walk_table(q, c, &d, pieces))
            return false;
    } while (d.flags & VRING_DESC_F_NEXT);
    c->head = d.next;
    return true;
}

static void chain_begin(struct virtq_chain *c, u16 head)
{
    c->head = head;
    c->entries = 0;
    c->outs = c->ins = c->parts = 0;
    c->out_len = c->in_len = c->out_total = c->in_total = 0;
}

/* Shows what was found to the device. */
static void chain_complete(struct virtq *q, struct virtq_chain *c, unsigned pieces)
{
    c->out = c->iov;
    c->in = c->iov + c->outs;
    c->ins = pieces - c->outs;
    c->out_len = c->out_total;
    c->in_len = c->in_total;
    for (unsigned i = 0; i < c->parts; i++)
        if (c->part[i].writable)
            ram_begin_write(q->ram, c->part[i].gpa, c->part[i].len);
}

/* A packed ring's place, n entries further; n is at most the ring's size. */
static void advance(const struct virtq *q, u16 *idx, bool *wrap, unsigned n)
{
    unsigned at = *idx + n;

    if (at >= q->size) {
        at -= q->size;
        *wrap = !*wrap;
    }
    *idx = (u16)at;
}

void virtq_chain_state(struct virtq *q, struct virtq_chain *c, struct stream *s)
{
    u16 parts = (u16)c->parts;
    unsigned pieces = 0;
    bool good;

    if (s->load)
        chain_begin(c, 0);
    stream_u16(s, &c->head);
    stream_u16(s, &c->entries);
    stream_u16(s, &parts);
    good = q->enabled && !q->broken && parts && (q->packed ? c->entries && c->entries <= q->size : !c->entries && c->head < q->size);
    for (unsigned i = 0; i < parts && good && !s->error; i++) {
        struct virtq_part p = s->load ? (struct virtq_part){ 0 } : c->part[i];
        struct desc d;

        stream_u64(s, &p.gpa);
        stream_u32(s, &p.len);
        stream_bool(s, &p.writable);
        d = (struct desc){ .addr = p.gpa, .len = p.len, .flags = p.writable ? VRING_DESC_F_WRITE : 0 };
        if (s->load && !s->error)
            good = add_buffer(q, c, &d, &pieces);
    }
    if (!s->load)
        return;
    if (!good)
        stream_bad(s, "a chain of a virtqueue makes no sense");
    if (s->error)
        c->parts = 0;
    else
        chain_complete(q, c, pieces);
}

static bool packed_available(const struct virtq *q, u16 flags)
{
    return !(flags & PACKED_AVAIL) != q->avail_wrap && !(flags & PACKED_USED) == q->avail_wrap;
}

static u64 packed_flags_at(const struct virtq *q, unsigned idx)
{
    return q->desc + sizeof(struct packed_desc) * idx + PACKED_FLAGS;
}

/* 1: a chain is there, and c->head is its head if the ring is split. */
static int find_next(struct virtq *q, struct virtq_chain *c)
{
    u16 waiting;

    chain_begin(c, 0);
    if (q->packed)
        return packed_available(q, load16(q, packed_flags_at(q, q->avail_idx), __ATOMIC_ACQUIRE));
    waiting = (u16)(load16(q, q->avail + AVAIL_IDX, __ATOMIC_ACQUIRE) - q->avail_idx);
    if (waiting > q->size)
        return -EPROTO;
    if (waiting)
        c->head = load16(q, q->avail + AVAIL_RING + 2ull * (q->avail_idx & (q->size - 1)), __ATOMIC_RELAXED);
    return waiting > 0;
}

int virtq_pop(struct virtq *q, struct virtq_chain *c)
{
    unsigned pieces = 0;
    int r;

    if (q->broken)
        return -EPROTO;
    if (!q->enabled)
        return 0;
    r = find_next(q, c);
    if (r == 0 && !q->broken)
        return 0;
    if (r < 0 || q->broken || !(q->packed ? walk_packed(q, c, &pieces) : walk_split(q, c, &pieces))) {
        q->broken = true;
        c->parts = 0;
        return -EPROTO;
    }
    chain_complete(q, c, pieces);
    if (q->packed)
        advance(q, &q->avail_idx, &q->avail_wrap, c->entries);
    else
        q->avail_idx++;
    return 1;
}

static void end_writes(struct virtq *q, struct virtq_chain *c)
{
    for (unsigned i = 0; i < c->parts; i++)
        if (c->part[i].writable)
            ram_end_write(q->ram, c->part[i].gpa, c->part[i].len);
    c->parts = 0;
}

/* Writes the used element that stands n behind the used index, which does not move. */
static void put_used(struct virtq *q, struct virtq_chain *c, u32 len, unsigned n)
{
    struct vring_used_elem e = { .id = c->head, .len = len };
    u64 at = q->used + USED_RING + sizeof(e) * ((u16)(q->used_idx + n) & (q->size - 1));

    end_writes(q, c);
    if (q->enabled && !q->broken && ram_write(q->ram, at, &e, sizeof(e)) < 0)
        q->broken = true;
}

/* All of a packed used descriptor but its flags, which say that it is one. */
static void put_packed(struct virtq *q, struct virtq_chain *c, u32 len, unsigned idx)
{
    u64 at = q->desc + sizeof(struct packed_desc) * idx + offsetof(struct packed_desc, len);

    end_writes(q, c);
    if (ram_write(q->ram, at, &(struct { u32 len; u16 id; }){ len, c->head }, 6) < 0)
        q->broken = true;
}

static u16 packed_used_flags(bool wrap, u32 len)
{
    return (u16)((wrap ? PACKED_AVAIL | PACKED_USED : 0) | (len ? VRING_DESC_F_WRITE : 0));
}

/* The driver looks at the first of them: its flags come last (2.8.6). */
static void push_packed(struct virtq *q, struct virtq_chain *c, const u32 *len, unsigned n)
{
    u16 first = q->used_idx;
    bool wrap = q->used_wrap;

    for (unsigned i = 0; i < n; i++) {
        if (!q->enabled || q->broken) {
            end_writes(q, &c[i]);
            continue;
        }
        put_packed(q, &c[i], len[i], q->used_idx);
        if (i)
            store16(q, packed_flags_at(q, q->used_idx), packed_used_flags(q->used_wrap, len[i]));
        advance(q, &q->used_idx, &q->used_wrap, c[i].entries);
        q->unsignalled = (u16)(q->unsignalled + c[i].entries);
    }
    if (n && q->enabled && !q->broken)
        store16(q, packed_flags_at(q, first), packed_used_flags(wrap, len[0]));
}

void virtq_push_all(struct virtq *q, struct virtq_chain *c, const u32 *len, unsigned n)
{
    if (q->packed) {
        push_packed(q, c, len, n);
        return;
    }
    for (unsigned i = 0; i < n; i++)
        put_used(q, &c[i], len[i], i);
    if (!q->enabled || q->broken)
        return;
    q->used_idx = (u16)(q->used_idx + n);
    q->unsignalled = (u16)(q->unsignalled + n);
    store16(q, q->used + USED_IDX, q->used_idx);
}

void virtq_push(struct virtq *q, struct virtq_chain *c, u32 len)
{
    virtq_push_all(q, c, &len, 1);
}

void virtq_drop(struct virtq *q, struct virtq_chain *c)
{
    end_writes(q, c);
}

void virtq_unpop(struct virtq *q, struct virtq_chain *c)
{
    end_writes(q, c);
    if (q->packed && c->entries > q->avail_idx)
        q->avail_wrap = !q->avail_wrap;
    if (q->packed)
        q->avail_idx = (u16)(q->avail_idx + (c->entries > q->avail_idx ? q->size : 0) - c->entries);
    else
        q->avail_idx--;
}

void virtq_chain_free(struct virtq_chain *c)
{
    free(c->iov);
    free(c->part);
    *c = (struct virtq_chain){ 0 };
}

/* --- notifications, both ways (2.7.7, 2.7.10) --- */

bool virtq_empty(struct virtq *q)
{
    if (!q->enabled || q->broken)
        return true;
    if (q->packed)
        return !packed_available(q, load16(q, packed_flags_at(q, q->avail_idx), __ATOMIC_ACQUIRE));
    return load16(q, q->avail + AVAIL_IDX, __ATOMIC_ACQUIRE) == q->avail_idx;
}

/* 2.8.10: the driver's wish; an offset of a place in the ring, before or behind its end. */
static bool packed_wants(struct virtq *q, u16 filled)
{
    u16 flags = load16(q, q->avail + EVENT_FLAGS, __ATOMIC_ACQUIRE), event;

    if (flags != VRING_PACKED_EVENT_FLAG_DESC || !q->event_idx)
        return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
    event = load16(q, q->avail + EVENT_OFF_WRAP, __ATOMIC_RELAXED);
    if (event >> VRING_PACKED_EVENT_F_WRAP_CTR == q->used_wrap)
        event &= (u16)~BIT(VRING_PACKED_EVENT_F_WRAP_CTR);
    else
        event = (u16)((event & ~BIT(VRING_PACKED_EVENT_F_WRAP_CTR)) - q->size);
    return vring_need_event(event, q->used_idx, (u16)(q->used_idx - filled));
}

bool virtq_wants_interrupt(struct virtq *q)
{
    u16 filled = q->unsignalled;

    if (!q->enabled || q->broken || !filled)
        return false;
    q->unsignalled = 0;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (q->packed)
        return packed_wants(q, filled);
    if (!q->event_idx)
        return !(load16(q, q->avail + AVAIL_FLAGS, __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
    return vring_need_event(load16(q, used_event(q), __ATOMIC_RELAXED), q->used_idx, (u16)(q->used_idx - filled));
}

/* With event indices there is nothing to switch off: an index in the past is not reached again. */
void virtq_ignore(struct virtq *q)
{
    if (!q->enabled || q->broken)
        return;
    if (q->packed)
        store16(q, q->used + EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_DISABLE);
    else if (!q->event_idx)
        store16(q, q->used + USED_FLAGS, VRING_USED_F_NO_NOTIFY);
}

bool virtq_listen(struct virtq *q)
{
    if (!q->enabled || q->broken)
        return false;
    if (q->packed && q->event_idx)
        store16(q, q->used + EVENT_OFF_WRAP, (u16)(q->avail_idx | (unsigned)q->avail_wrap << VRING_PACKED_EVENT_F_WRAP_CTR));
    if (q->packed)
        store16(q, q->used + EVENT_FLAGS, q->event_idx ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE);
    else if (q->event_idx)
        store16(q, avail_event(q), q->avail_idx);
    else
        store16(q, q->used + USED_FLAGS, 0);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return !virtq_empty(q);
}

/* --- bytes of a chain --- */

static void consume(struct iovec **iov, unsigned *n, u64 *left, u64 len)
{
    bug_on(len > *left);
    *left -= len;
    while (len) {
        u64 step = MIN(len, (u64)(*iov)->iov_len);

        (*iov)->iov_base = (u8 *)(*iov)->iov_base + step;
        (*iov)->iov_len -= step;
        len -= step;
        if (!(*iov)->iov_len) {
            (*iov)++;
            (*n)--;
        }
    }
}

void virtq_skip_out(struct virtq_chain *c, u64 len)
{
    consume(&c->out, &c->outs, &c->out_len, len);
}

void virtq_skip_in(struct virtq_chain *c, u64 len)
{
    consume(&c->in, &c->ins, &c->in_len, len);
}

size_t virtq_read(struct virtq_chain *c, void *buf, size_t len)
{
    size_t done = 0;

    while (done < len && c->outs) {
        size_t step = MIN(len - done, c->out->iov_len);

        memcpy((u8 *)buf + done, c->out->iov_base, step);
        virtq_skip_out(c, step);
        done += step;
    }
    return done;
}

size_t virtq_write(struct virtq_chain *c, const void *buf, size_t len)
{
    size_t done = 0;

    while (done < len && c->ins) {
        size_t step = MIN(len - done, c->in->iov_len);

        memcpy(c->in->iov_base, (const u8 *)buf + done, step);
        virtq_skip_in(c, step);
        done += step;
    }
    return done;
}

u8 *virtq_take_last_in(struct virtq_chain *c)
{
    struct iovec *last;

    if (!c->ins)
        return NULL;
    last = &c->in[c->ins - 1];
    last->iov_len--;
    c->in_len--;
    if (!last->iov_len)
        c->ins--;
    return (u8 *)last->iov_base + last->iov_len;
}
