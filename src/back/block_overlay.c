/*
 * Copy-on-write: what the guest writes goes to an overlay file, the base is never touched (see block.h; DESIGN.md "Overlays" says why it is so).
 *
 * The file, all little endian:
 *
 *     0, 4096       two copies of the header, written in turn; the valid one of the highest generation counts
 *     8192          the map: for each of its pages two slots of 4 KiB, written in turn
 *     data_offset   clusters of 64 KiB
 *
 * A page of the map has an entry for each cluster of the disk: 0 the base's contents, 1 zeroes, n + 2 cluster n of the file. It carries the generation that wrote it and a
 * CRC-32C. What counts is, for each page, the slot of the highest generation that is not above the header's; the header has a sum over
 * all of these. So a flush is: pages to the slots that do not count; fdatasync, which also covers the clusters that they name; header; fdatasync. Whatever a crash
 * leaves is the state of the last flush (with later writes to clusters that were there), and everything else is damage, which is told.
 *
 * What is in use follows from the map, so clusters that a crash left behind are found at the next open. A cluster that becomes free is used again only after the
 * flush that made it so: until then the file on the disk still names it.
 *
 * The header knows the base by its size, time of last change, and a checksum of samples; a base that is another one is refused.
 * A temporary overlay (no name) has the same form in a file without a name; flushing it does nothing.
 *
 * Threads: requests are served by a few workers, cluster by cluster; what the page cache has is read in submit. Locking: `lock` guards map, lists and
 * `busy`, a leaf; a worker has its cluster entered in `busy`, for itself if it changes the map's entry; `flushing` makes flushes follow each other, and is
 * taken before `lock`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "back/block_host.h"

#define CLUSTER_BITS 16
#define CLUSTER BIT(CLUSTER_BITS)
#define PAGE 4096u
#define MAP_OFFSET (2 * PAGE)
#define ENTRIES 1018u
#define ROOM_TO_GROW (256 * GiB)
#define CLUSTERS_MAX ((u64)UINT32_MAX - 2)
#define PIECES 64
#define SAMPLES 16

enum { ENTRY_BASE, ENTRY_ZERO, ENTRY_FIRST };

struct header {
    char magic[8];
    u32 version, cluster_bits;
    u64 generation, size;
    u64 base_size, base_time_ns;
    u32 base_sum, map_pages;
    u64 data_offset, map_sum;
    char base[1024];                                               /* its path, for people */
    u8 unused[PAGE - 72 - 1024 - 4];
    u32 crc;                                                       /* of all before */
};
_Static_assert(sizeof(struct header) == PAGE, "one page");

struct map_page {
    u32 magic, index;
    u64 generation;
    u32 unused;
    u32 entry[ENTRIES];
    u32 crc;
};
_Static_assert(sizeof(struct map_page) == PAGE, "one page");

static const char header_magic[8] = "doppelOV";
#define MAP_MAGIC 0x50414d44u                                      /* DMAP */

struct page_state {
    u64 generation;                                                /* 0: the page was never written */
    u32 crc;
    u8 slot;                                                       /* which one counts */
    bool dirty;
};

struct clusters {
    u32 *n;
    size_t count, cap;
};

struct overlay {
    struct block b;
    struct block *base;
    int fd;
    bool temporary;
    struct header header;
    unsigned header_slot;                                          /* the copy that counts */
    u32 *map;                                                      /* header.map_pages * ENTRIES */
    struct page_state *page;
    struct block_pool pool;

    pthread_mutex_t lock;
    pthread_cond_t unbusy;
    struct busy {
        u64 cluster;
        unsigned users;                                            /* 0: not in use */
        bool alone;
    } busy[BLOCK_WORKERS];
    u64 end;                                                       /* clusters in the file */
    struct clusters free;                                          /* may be used */
    struct clusters freed;                                         /* since the last flush */
    bool header_dirty;

    pthread_mutex_t flushing;
    int failed;                                                    /* why there is no flush any more */
};

/* --- checksums --- */

/* CRC-32C (Castagnoli), four bits at a time. */
static u32 crc32c(u32 crc, const void *buf, size_t len)
{
    static const u32 table[16] = {
        0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
        0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
    };

    crc = ~crc;
    for (const u8 *p = buf; len; p++, len--) {
        crc = table[(crc ^ *p) & 15] ^ crc >> 4;
        crc = table[(crc ^ *p >> 4) & 15] ^ crc >> 4;
    }
    return ~crc;
}

static u64 page_sum(u32 index, const struct page_state *p)
{
    u64 x = ((u64)index + 1) * 0x9e3779b97f4a7c15ull ^ p->generation * 0xbf58476d1ce4e5b9ull ^ p->crc;

    return p->generation ? x ^ x >> 29 : 0;
}

/* --- the file --- */

static int read_all(int fd, void *buf, size_t len, u64 at)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = pread(fd, (u8 *)buf + done, len - done, (off_t)(at + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0) {                                              /* sparse to the end */
            memset((u8 *)buf + done, 0, len - done);
            break;
        }
        done += (size_t)n;
    }
    return 0;
}

static int write_all(int fd, const void *buf, size_t len, u64 at)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = pwrite(fd, (const u8 *)buf + done, len - done, (off_t)(at + done));

        if (n < 0 && errno != EINTR)
            return -errno;
        done += n < 0 ? 0 : (size_t)n;
    }
    return 0;
}

static int sync_file(int fd)
{
    return fdatasync(fd) < 0 ? block_sync_error(-errno) : 0;
}

static u64 slot_at(u64 page, unsigned slot)
{
    return MAP_OFFSET + (page * 2 + slot) * PAGE;
}

static u64 data_at(const struct overlay *o, u32 entry)
{
    return o->header.data_offset + ((u64)(entry - ENTRY_FIRST) << CLUSTER_BITS);
}

static bool put_cluster(struct clusters *c, u32 n)
{
    if (c->count == c->cap) {
        size_t cap = c->cap ? c->cap * 2 : 64;
        u32 *p = realloc(c->n, cap * sizeof(*p));

        if (!p)
            return false;                                          /* it is found again at the next open */
        c->n = p;
        c->cap = cap;
    }
    c->n[c->count++] = n;
    return true;
}

/* --- flush --- */

static int write_header(struct overlay *o)
{
    unsigned slot = !o->header_slot;
    int r;

    o->header.crc = crc32c(0, &o->header, offsetof(struct header, crc));
    r = write_all(o->fd, &o->header, sizeof(o->header), slot * PAGE);
    if (r == 0)
        r = sync_file(o->fd);
    if (r == 0)
        o->header_slot = slot;
    return r;
}

/* A copy of what is dirty, as it is to be written; the entries that it holds have their clusters' contents in the file already. */
static struct map_page *take_dirty(struct overlay *o, unsigned *n)
{
    struct map_page *copy;
    unsigned count = 0;

    for (u32 i = 0; i < o->header.map_pages; i++)
        count += o->page[i].dirty;
    *n = count;
    copy = malloc(MAX(count, 1u) * sizeof(*copy));
    for (u32 i = 0; copy && count && i < o->header.map_pages; i++) {
        struct map_page *p = copy + *n - count;

        if (!o->page[i].dirty)
            continue;
        *p = (struct map_page){ .magic = MAP_MAGIC, .index = i, .generation = o->header.generation + 1 };
        memcpy(p->entry, o->map + (u64)i * ENTRIES, sizeof(p->entry));
        p->crc = crc32c(0, p, offsetof(struct map_page, crc));
        o->page[i].dirty = false;
        count--;
    }
    return copy;
}

static int write_pages(struct overlay *o, const struct map_page *p, unsigned n)
{
    int r = 0;

    for (unsigned i = 0; r == 0 && i < n; i++) {
        const struct page_state *s = &o->page[p[i].index];

        r = write_all(o->fd, &p[i], sizeof(p[i]), slot_at(p[i].index, s->generation ? !s->slot : 0));
    }
    return r < 0 ? r : sync_file(o->fd);
}

/* The pages are on the disk: the header makes them count. */
static int commit(struct overlay *o, const struct map_page *p, unsigned n)
{
    u64 sum = o->header.map_sum;
    int r;

    for (unsigned i = 0; i < n; i++) {
        struct page_state new = { .generation = p[i].generation, .crc = p[i].crc };

        sum += page_sum(p[i].index, &new) - page_sum(p[i].index, &o->page[p[i].index]);
    }
    o->header.generation++;
    o->header.map_sum = sum;
    r = write_header(o);
    if (r < 0)
        return r;
    for (unsigned i = 0; i < n; i++) {
        struct page_state *s = &o->page[p[i].index];

        s->slot = s->generation ? !s->slot : 0;
        s->generation = p[i].generation;
        s->crc = p[i].crc;
    }
    return 0;
}

/*
 * A header that may or may not be on the disk cannot be followed by another of the same generation, and what fdatasync() could not write is not there
 * for the next one: after such errors there is no flush any more. A page of the map for which there was no room is written by the next flush.
 */
static int flush(struct overlay *o)
{
    struct clusters freed;
    struct map_page *p;
    bool header;
    unsigned n;
    int r;

    pthread_mutex_lock(&o->flushing);
    pthread_mutex_lock(&o->lock);
    p = take_dirty(o, &n);
    freed = o->freed;
    o->freed = (struct clusters){ 0 };
    header = o->header_dirty;
    o->header_dirty = false;
    pthread_mutex_unlock(&o->lock);
    r = !p ? -ENOMEM : o->failed;
    if (r == 0) {
        r = write_pages(o, p, n);
        if (r < 0 && r != -ENOSPC && r != -EDQUOT)
            o->failed = r;
    }
    if (r == 0 && (n || header))
        r = o->failed = commit(o, p, n);
    pthread_mutex_lock(&o->lock);
    for (unsigned i = 0; p && r < 0 && i < n; i++)
        o->page[p[i].index].dirty = true;
    o->header_dirty |= r < 0 && header;
    for (size_t i = 0; i < freed.count; i++)
        put_cluster(r < 0 ? &o->freed : &o->free, freed.n[i]);
    pthread_mutex_unlock(&o->lock);
    pthread_mutex_unlock(&o->flushing);
    free(freed.n);
    free(p);
    return r;
}

/* --- clusters --- */

static u32 *entry_of(struct overlay *o, u64 cluster)
{
    return &o->map[cluster];
}

/* All under the lock. */
static struct busy *find_busy(struct overlay *o, u64 cluster)
{
    for (unsigned i = 0; i < BLOCK_WORKERS; i++)
        if (o->busy[i].users && o->busy[i].cluster == cluster)
            return &o->busy[i];
    return NULL;
}

static struct busy *enter(struct overlay *o, u64 cluster, bool alone)
{
    struct busy *b;

    while ((b = find_busy(o, cluster)) && (alone || b->alone))
        pthread_cond_wait(&o->unbusy, &o->lock);
    for (unsigned i = 0; !b && i < BLOCK_WORKERS; i++)
        if (!o->busy[i].users)
            b = &o->busy[i];
    b->cluster = cluster;
    b->alone = alone;
    b->users++;
    return b;
}

static void leave(struct overlay *o, struct busy *b)
{
    b->users--;
    pthread_cond_broadcast(&o->unbusy);
}

static void set_entry(struct overlay *o, u64 cluster, u32 to)
{
    u32 *e = entry_of(o, cluster), was = *e;

    if (was == to)
        return;
    *e = to;
    o->page[cluster / ENTRIES].dirty = true;
    if (was >= ENTRY_FIRST)
        put_cluster(o->temporary ? &o->free : &o->freed, was - ENTRY_FIRST);
}

static int allocate(struct overlay *o, u32 *n)
{
    int r = 0;

    pthread_mutex_lock(&o->lock);
    if (o->free.count)
        *n = o->free.n[--o->free.count];
    else if (o->end < CLUSTERS_MAX)
        *n = (u32)o->end++;
    else
        r = -ENOSPC;
    pthread_mutex_unlock(&o->lock);
    return r;
}

static int read_base(struct overlay *o, u64 at, const struct iovec *iov, unsigned iovs, size_t len)
{
    u64 size = o->header.base_size, have = at < size ? MIN(len, ALIGN_UP(size, BLOCK_SECTOR) - at) : 0;
    struct iovec part[PIECES];
    struct block_req r = { .op = BLOCK_READ, .offset = at, .iov = part };
    size_t skip = have;

    for (unsigned i = 0; i < iovs && have; i++) {
        part[i] = iov[i];
        part[i].iov_len = MIN(part[i].iov_len, have);
        have -= part[i].iov_len;
        r.iovs++;
    }
    for (unsigned i = 0; i < iovs; i++) {                          /* what lies behind the base's end */
        size_t step = MIN(skip, iov[i].iov_len);

        memset((u8 *)iov[i].iov_base + step, 0, iov[i].iov_len - step);
        skip -= step;
    }
    return r.iovs ? block_wait(o->base, &r) : 0;
}

/* The first pieces of r, up to len bytes; their length. */
static size_t head_of(const struct block_req *r, size_t len, struct iovec *part, unsigned *n)
{
    size_t sum = 0;

    for (*n = 0; *n < MIN(r->iovs, (unsigned)PIECES) && sum < len; ++*n) {
        part[*n] = r->iov[*n];
        part[*n].iov_len = MIN(part[*n].iov_len, len - sum);
        sum += part[*n].iov_len;
    }
    return sum;
}

/* One system call's worth; what it did not do is done by the next. */
static ssize_t in_place(struct overlay *o, const struct block_req *r, u64 at, const struct iovec *iov, unsigned n, int flags)
{
    ssize_t done;

    do
        done = r->op == BLOCK_WRITE ? pwritev2(o->fd, iov, (int)n, (off_t)at, flags) : preadv2(o->fd, iov, (int)n, (off_t)at, flags);
    while (done < 0 && errno == EINTR);
    return done < 0 ? -errno : done == 0 ? -EIO : done;
}

/* A cluster that gets one of its own: the new contents in the midst of the old ones. iov NULL: len zeroes. */
static int copy_up(struct overlay *o, u64 cluster, u64 off, const struct iovec *iov, unsigned n, size_t len)
{
    u64 at = cluster << CLUSTER_BITS;
    u32 old, new;
    u8 *buf = malloc(CLUSTER);
    int r = buf ? allocate(o, &new) : -ENOMEM;

    if (r < 0) {
        free(buf);
        return r;
    }
    pthread_mutex_lock(&o->lock);
    old = *entry_of(o, cluster);
    pthread_mutex_unlock(&o->lock);
    if (old == ENTRY_BASE && len < CLUSTER)
        r = read_base(o, at, &(struct iovec){ buf, CLUSTER }, 1, CLUSTER);
    else
        memset(buf, 0, CLUSTER);
    for (unsigned i = 0; i < n; i++) {
        memcpy(buf + off, iov[i].iov_base, iov[i].iov_len);
        off += iov[i].iov_len;
    }
    if (!iov)
        memset(buf + off, 0, len);
    if (r == 0)
        r = write_all(o->fd, buf, CLUSTER, data_at(o, new + ENTRY_FIRST));
    pthread_mutex_lock(&o->lock);
    if (r == 0)
        set_entry(o, cluster, new + ENTRY_FIRST);
    else
        put_cluster(&o->free, new);
    pthread_mutex_unlock(&o->lock);
    free(buf);
    return r;
}

/* --- requests, on a worker --- */

static int transfer_piece(struct overlay *o, struct block_req *r)
{
    u64 cluster = r->offset >> CLUSTER_BITS, off = r->offset & (CLUSTER - 1);
    bool write = r->op == BLOCK_WRITE;
    struct iovec part[PIECES];
    struct busy *busy;
    unsigned n;
    ssize_t done;
    size_t len;
    u32 entry;

    len = head_of(r, CLUSTER - off, part, &n);
    pthread_mutex_lock(&o->lock);
    busy = enter(o, cluster, write && *entry_of(o, cluster) < ENTRY_FIRST);
    entry = *entry_of(o, cluster);
    if (write && entry < ENTRY_FIRST && !busy->alone) {            /* it was discarded while we waited */
        leave(o, busy);
        busy = NULL;
    }
    pthread_mutex_unlock(&o->lock);
    if (!busy)
        return 0;
    if (entry >= ENTRY_FIRST)
        done = in_place(o, r, data_at(o, entry) + off, part, n, 0);
    else if (write)
        done = copy_up(o, cluster, off, part, n, len);
    else if (entry == ENTRY_BASE)
        done = read_base(o, r->offset, part, n, len);
    else
        done = 0;
    if (entry == ENTRY_ZERO && !write)
        for (unsigned i = 0; i < n; i++)
            memset(part[i].iov_base, 0, part[i].iov_len);
    pthread_mutex_lock(&o->lock);
    leave(o, busy);
    pthread_mutex_unlock(&o->lock);
    if (done >= 0)
        block_consume(r, entry >= ENTRY_FIRST ? (size_t)done : len);
    return done < 0 ? (int)done : 0;
}

/* Of a discard, or of zeroes. A whole cluster needs no space; the pieces at both ends are written, or left. */
static int clear_piece(struct overlay *o, struct block_req *r)
{
    u64 cluster = r->offset >> CLUSTER_BITS, off = r->offset & (CLUSTER - 1), len = MIN(r->len, CLUSTER - off);
    bool whole = len == CLUSTER || (off == 0 && r->offset + len == o->b.size);
    struct busy *busy;
    u32 entry;
    int res = 0;

    pthread_mutex_lock(&o->lock);
    busy = enter(o, cluster, true);
    entry = *entry_of(o, cluster);
    pthread_mutex_unlock(&o->lock);
    if (whole && entry >= ENTRY_FIRST)
        fallocate(o->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)data_at(o, entry), CLUSTER);
    else if (!whole && r->op == BLOCK_ZEROES && entry == ENTRY_BASE)
        res = copy_up(o, cluster, off, NULL, 0, len);
    else if (!whole && r->op == BLOCK_ZEROES && entry >= ENTRY_FIRST) {
        static const u8 zero[CLUSTER];

        res = write_all(o->fd, zero, len, data_at(o, entry) + off);
    }
    pthread_mutex_lock(&o->lock);
    if (whole)
        set_entry(o, cluster, ENTRY_ZERO);                         /* last: the file's cluster may be another one's now */
    leave(o, busy);
    pthread_mutex_unlock(&o->lock);
    if (res == 0) {
        r->offset += len;
        r->len -= len;
    }
    return res;
}

static int serve(struct block *b, struct block_req *r)
{
    struct overlay *o = container_of(b, struct overlay, b);
    int res = 0;

    switch (r->op) {
    case BLOCK_READ:
    case BLOCK_WRITE:
        block_consume(r, 0);
        while (res == 0 && r->iovs)
            res = transfer_piece(o, r);
        return res;
    case BLOCK_DISCARD:
    case BLOCK_ZEROES:
        while (res == 0 && r->len)
            res = clear_piece(o, r);
        return res;
    case BLOCK_FLUSH:
        return o->temporary ? 0 : flush(o);
    case BLOCK_NOP:
        break;
    }
    return 0;
}

/* --- requests, at once --- */

/* True: progress was made. The lock keeps the entry from changing meanwhile. */
static bool try_piece(struct overlay *o, struct block_req *r)
{
    u64 cluster = r->offset >> CLUSTER_BITS, off = r->offset & (CLUSTER - 1);
    struct iovec part[PIECES];
    struct busy *busy;
    ssize_t done = -EAGAIN;
    size_t len;
    unsigned n;
    u32 entry;

    len = head_of(r, CLUSTER - off, part, &n);
    pthread_mutex_lock(&o->lock);
    entry = *entry_of(o, cluster);
    busy = find_busy(o, cluster);
    if (!(busy && busy->alone) && entry >= ENTRY_FIRST) {
        done = in_place(o, r, data_at(o, entry) + off, part, n, RWF_NOWAIT);
    } else if (entry == ENTRY_ZERO) {
        for (unsigned i = 0; i < n; i++)
            memset(part[i].iov_base, 0, part[i].iov_len);
        done = (ssize_t)len;
    }
    pthread_mutex_unlock(&o->lock);
    if (entry == ENTRY_BASE && o->base->ops->try && r->offset + len <= o->header.base_size) {
        struct block_req base = { .op = BLOCK_READ, .offset = r->offset, .iov = part, .iovs = n };

        if (o->base->ops->try(o->base, &base) || base.offset != r->offset)
            done = (ssize_t)(base.offset - r->offset);
    }
    if (done > 0)
        block_consume(r, (size_t)done);
    return done > 0;
}

static bool overlay_submit(struct block *b, struct block_req *r)
{
    struct overlay *o = container_of(b, struct overlay, b);

    if (r->at_once && r->op == BLOCK_READ) {
        block_consume(r, 0);
        while (r->iovs && try_piece(o, r))
            ;
        if (!r->iovs)
            return true;
    }
    block_pool_submit(&o->pool, r);
    return false;
}

/* --- opening --- */

static int overlay_size(struct block *b, u64 *size)
{
    *size = container_of(b, struct overlay, b)->header.size;
    return 0;
}

/* Not while a flush writes the header. */
static void set_size(struct overlay *o, u64 size)
{
    pthread_mutex_lock(&o->flushing);
    pthread_mutex_lock(&o->lock);
    o->header.size = size;
    o->header_dirty = true;
    pthread_mutex_unlock(&o->lock);
    pthread_mutex_unlock(&o->flushing);
}

static int overlay_grow(struct block *b, u64 size)
{
    struct overlay *o = container_of(b, struct overlay, b);
    u64 most = (u64)o->header.map_pages * ENTRIES << CLUSTER_BITS;
    u64 was = o->header.size;
    int r = 0;

    if (size > most)
        return err(-EFBIG, "disk %s: its overlay has room for %llu bytes at most; make a new one of a larger base", b->path, (unsigned long long)most);
    set_size(o, size);
    if (!o->temporary)
        r = flush(o);
    if (r < 0)
        set_size(o, was);
    return r < 0 ? err(r, "disk %s: cannot write its overlay: %s", b->path, strerror(-r)) : 0;
}

static void overlay_free(struct overlay *o)
{
    if (o->map)
        munmap(o->map, (u64)o->header.map_pages * ENTRIES * sizeof(*o->map));
    if (o->fd >= 0)
        close(o->fd);
    free(o->page);
    free(o->free.n);
    free(o->freed.n);
    pthread_cond_destroy(&o->unbusy);
    pthread_mutex_destroy(&o->lock);
    pthread_mutex_destroy(&o->flushing);
    block_destroy(&o->b);
    free(o);
}

static bool overlay_close(struct block *b)
{
    struct overlay *o = container_of(b, struct overlay, b);

    if (!block_pool_close(&o->pool) || !block_close(o->base))
        return false;
    overlay_free(o);
    return true;
}

/* Workers wait for the base, if for anything. */
static bool overlay_abandon(struct block *b)
{
    return block_abandon(container_of(b, struct overlay, b)->base);
}

static const struct block_ops overlay_ops = { .submit = overlay_submit, .size = overlay_size, .grow = overlay_grow, .abandon = overlay_abandon, .close = overlay_close };

/* Of places all over the base: what two images that differ are likely to differ in. */
static int sample_base(struct overlay *o, u32 *sum)
{
    u64 size = block_size(o->base), step = ALIGN_DOWN(size / SAMPLES, BLOCK_SECTOR);
    u8 *buf = malloc(CLUSTER);
    int r = buf ? 0 : -ENOMEM;

    *sum = 0;
    for (unsigned i = 0; r == 0 && i <= SAMPLES; i++) {
        u64 at = i < SAMPLES ? i * step : size - MIN(size, CLUSTER), len = MIN(size - at, i && i < SAMPLES ? PAGE : CLUSTER);
        struct iovec iov = { buf, len };

        r = block_wait(o->base, &(struct block_req){ .op = BLOCK_READ, .offset = at, .iov = &iov, .iovs = 1 });
        *sum = crc32c(*sum, buf, len);
    }
    free(buf);
    return r < 0 ? err(r, "disk %s: cannot read it: %s", o->base->path, strerror(-r)) : 0;
}

static int file_error(const struct overlay *o, const char *path, int e)
{
    return err(e, "overlay %s of disk %s: %s", *path ? path : "(temporary)", o->base->path, strerror(-e));
}

static int make_map(struct overlay *o)
{
    void *p = mmap(NULL, (u64)o->header.map_pages * ENTRIES * sizeof(*o->map), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p != MAP_FAILED)
        o->map = p;
    o->page = calloc(o->header.map_pages, sizeof(*o->page));
    return o->map && o->page ? 0 : err(-ENOMEM, "disk %s: out of memory", o->base->path);
}

static int create(struct overlay *o, const char *path)
{
    u64 size = block_size(o->base), clusters = (MAX(2 * size, size + ROOM_TO_GROW) + CLUSTER - 1) >> CLUSTER_BITS;
    struct header *h = &o->header;
    int r;

    if (clusters > CLUSTERS_MAX)
        clusters = (size + CLUSTER - 1) >> CLUSTER_BITS;
    if (clusters > CLUSTERS_MAX)
        return err(-EFBIG, "disk %s: too large for an overlay", o->base->path);
    *h = (struct header){ .version = 1, .cluster_bits = CLUSTER_BITS, .size = size, .base_size = size, .generation = 1,
                          .base_time_ns = block_time_ns(o->base), .map_pages = (u32)((clusters + ENTRIES - 1) / ENTRIES) };
    memcpy(h->magic, header_magic, sizeof(h->magic));
    h->data_offset = ALIGN_UP(slot_at(h->map_pages, 0), CLUSTER);
    snprintf(h->base, sizeof(h->base), "%s", o->base->path);
    r = o->temporary ? 0 : sample_base(o, &h->base_sum);
    if (r == 0)
        r = make_map(o);
    if (r < 0 || o->temporary)
        return r;
    r = ftruncate(o->fd, (off_t)h->data_offset) < 0 ? -errno : write_header(o);
    if (r == 0)
        r = write_header(o);                                       /* both have their place now */
    return r < 0 ? file_error(o, path, r) : 0;
}

static bool header_valid(const struct header *h)
{
    return !memcmp(h->magic, header_magic, sizeof(h->magic)) && h->crc == crc32c(0, h, offsetof(struct header, crc));
}

static int damaged(const char *path, const char *what)
{
    return err(-EINVAL, "overlay %s: it is damaged: %s; take another copy of it, or make a new one", path, what);
}

static int read_header(struct overlay *o, const char *path)
{
    struct header *copy = malloc(2 * sizeof(*copy)), *h = NULL;
    int r = copy ? read_all(o->fd, copy, 2 * sizeof(*copy), 0) : -ENOMEM;

    for (unsigned i = 0; r == 0 && i < 2; i++)
        if (header_valid(&copy[i]) && (!h || copy[i].generation > h->generation)) {
            h = &copy[i];
            o->header_slot = i;
        }
    if (r < 0)
        r = file_error(o, path, r);
    else if (!h)
        r = memcmp(copy[0].magic, header_magic, 8) && memcmp(copy[1].magic, header_magic, 8)
            ? err(-EINVAL, "overlay %s: it is no overlay of doppel's; name one, or a file that is not there yet", path) : damaged(path, "its header");
    else if (h->version != 1 || h->cluster_bits != CLUSTER_BITS)
        r = err(-EINVAL, "overlay %s: its version, %u, is none that this doppel knows", path, h->version);
    else
        o->header = *h;
    free(copy);
    return r;
}

static int check_header(struct overlay *o, const char *path)
{
    const struct header *h = &o->header;
    struct stat st;

    if (!h->size || h->size % BLOCK_SECTOR || !h->map_pages || (u64)h->map_pages * ENTRIES > CLUSTERS_MAX + ENTRIES ||
        h->size > ((u64)h->map_pages * ENTRIES << CLUSTER_BITS) || h->base_size > h->size || !h->generation ||
        h->data_offset != ALIGN_UP(slot_at(h->map_pages, 0), CLUSTER) || !memchr(h->base, 0, sizeof(h->base)))
        return damaged(path, "its header");
    if (fstat(o->fd, &st) < 0)
        return file_error(o, path, -errno);
    if ((u64)st.st_size < h->data_offset)
        return damaged(path, "it is cut short");
    return 0;
}

static int check_base(struct overlay *o, const char *path)
{
    static const char remedy[] = "what the overlay does not have would come from another disk; bring the base back as it was, or make a new overlay";
    const struct header *h = &o->header;
    u32 sum;
    int r;

    if (h->base_size != block_size(o->base))
        return err(-ESTALE, "overlay %s: its base %s has another size now (%llu bytes, it was %llu): %s", path, o->base->path,
                   (unsigned long long)block_size(o->base), (unsigned long long)h->base_size, remedy);
    r = sample_base(o, &sum);
    if (r < 0)
        return r;
    if (sum != h->base_sum)
        return err(-ESTALE, "overlay %s: its base %s has other contents than when it was made (of %s): %s", path, o->base->path, h->base, remedy);
    if (h->base_time_ns != block_time_ns(o->base))
        return err(-ESTALE, "overlay %s: its base %s was written or copied since it was made (its time of change is another one): %s", path, o->base->path, remedy);
    return 0;
}

static bool page_valid(const struct map_page *p, u32 index)
{
    return p->magic == MAP_MAGIC && p->index == index && p->generation && p->crc == crc32c(0, p, offsetof(struct map_page, crc));
}

/* Both slots of a page. Those above the header's generation are of a flush that did not end: they must not count later. */
static int read_page(struct overlay *o, u32 index)
{
    static const struct map_page nothing;
    struct map_page *p = malloc(2 * sizeof(*p));
    struct page_state *s = &o->page[index];
    int r = p ? read_all(o->fd, p, 2 * sizeof(*p), slot_at(index, 0)) : -ENOMEM;

    for (unsigned i = 0; r == 0 && i < 2; i++) {
        if (page_valid(&p[i], index) && p[i].generation <= o->header.generation) {
            if (p[i].generation > s->generation) {
                *s = (struct page_state){ .generation = p[i].generation, .crc = p[i].crc, .slot = (u8)i };
                memcpy(o->map + (u64)index * ENTRIES, p[i].entry, sizeof(p[i].entry));
            }
        } else if (!o->b.readonly && memcmp(&p[i], &nothing, sizeof(nothing))) {
            r = write_all(o->fd, &nothing, sizeof(nothing), slot_at(index, i));
        }
    }
    free(p);
    return r;
}

static int read_map(struct overlay *o, const char *path)
{
    u64 sum = 0, end = slot_at(o->header.map_pages, 0);
    int r = 0;

    for (off_t at = MAP_OFFSET; r == 0 && (at = lseek(o->fd, at, SEEK_DATA)) >= 0 && (u64)at < end;) {
        u32 index = (u32)(((u64)at - MAP_OFFSET) / (2 * PAGE));

        r = read_page(o, index);
        at = (off_t)slot_at(index + 1, 0);
    }
    if (r < 0)
        return file_error(o, path, r);
    for (u32 i = 0; i < o->header.map_pages; i++)
        sum += page_sum(i, &o->page[i]);
    return sum == o->header.map_sum ? 0 : damaged(path, "its map");
}

/* Which clusters of the file are in use, and so which are not. */
static int find_free(struct overlay *o, const char *path)
{
    u64 disk = (o->header.size + CLUSTER - 1) >> CLUSTER_BITS, all = (u64)o->header.map_pages * ENTRIES;
    struct stat st;
    u64 *used;
    int r = 0;

    if (fstat(o->fd, &st) < 0)
        return file_error(o, path, -errno);
    o->end = ((u64)st.st_size - o->header.data_offset + CLUSTER - 1) >> CLUSTER_BITS;
    o->end = MIN(o->end, CLUSTERS_MAX);
    used = calloc(o->end / 64 + 1, sizeof(*used));
    if (!used)
        return err(-ENOMEM, "disk %s: out of memory", o->base->path);
    for (u32 page = 0; r == 0 && page < o->header.map_pages; page++)
        for (u64 c = (u64)page * ENTRIES; r == 0 && o->page[page].generation && c < ((u64)page + 1) * ENTRIES && c < all; c++) {
            u32 e = o->map[c], n = e - ENTRY_FIRST;

            if (e < ENTRY_FIRST && (!e || c < disk))
                continue;
            if (e < ENTRY_FIRST || c >= disk || n >= o->end || (used[n / 64] & BIT(n % 64)) ||
                data_at(o, e) + CLUSTER > ALIGN_UP((u64)st.st_size, PAGE))
                r = damaged(path, "its map names clusters that are not there, or one twice");
            else
                used[n / 64] |= BIT(n % 64);
        }
    for (u64 n = 0; r == 0 && n < o->end; n++)
        if (!(used[n / 64] & BIT(n % 64)) && !put_cluster(&o->free, (u32)n))
            r = err(-ENOMEM, "disk %s: out of memory", o->base->path);
    free(used);
    return r;
}

static int load(struct overlay *o, const char *path)
{
    int r = read_header(o, path);

    if (r == 0)
        r = check_header(o, path);
    if (r == 0)
        r = check_base(o, path);
    if (r == 0)
        r = make_map(o);
    if (r == 0)
        r = read_map(o, path);
    return r < 0 ? r : find_free(o, path);
}

/* Without a name, where there is room for much: not in /tmp, which is often memory. */
static int open_temporary(struct overlay *o)
{
    const char *dir = getenv("TMPDIR");

    dir = dir && *dir ? dir : "/var/tmp";
    o->fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (o->fd < 0)
        return err(-errno, "disk %s: cannot make a temporary overlay in %s: %s; set TMPDIR to another folder, or name a file: overlay=FILE", o->base->path, dir,
                   strerror(errno));
    return create(o, "");
}

/* As it is made, or as it is when that was interrupted: without any contents. A disk may well begin with zeroes. */
static bool blank(const struct overlay *o)
{
    struct stat st;

    return fstat(o->fd, &st) == 0 && S_ISREG(st.st_mode) && lseek(o->fd, 0, SEEK_DATA) < 0 && errno == ENXIO;
}

/* What is flushed to a new file is lost if a crash leaves nobody who knows its name. Some file systems cannot do this, and do not need it. */
static int sync_folder(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *folder = slash ? strndup(path, (size_t)(slash - path) + 1) : strdup(".");
    int fd = folder ? open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1, r = 0;

    if (fd >= 0 && fsync(fd) < 0 && errno != EINVAL && errno != EROFS)
        r = err(-errno, "overlay %s: cannot make it: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    free(folder);
    return r;
}

static int open_named(struct overlay *o, const char *path)
{
    int r = 0;

    if (!o->b.readonly) {
        o->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (o->fd < 0 && errno != EEXIST)
            return err(-errno, "overlay %s: cannot make it: %s", path, strerror(errno));
        if (o->fd >= 0) {
            close(o->fd);
            o->fd = -1;
            r = sync_folder(path);
        }
        if (r < 0)
            return r;
    }
    o->fd = r = block_file_fd(path, o->b.readonly, 0);
    if (r == -EBUSY)
        return err(r, "overlay %s: it is in use by another virtual machine or program; stop that, or take another overlay (of an image: another --keep)", path);
    if (r < 0)
        return r;
    return o->b.readonly || !blank(o) ? load(o, path) : create(o, path);
}

int block_overlay_open(const struct block_config *c, struct block *base, struct block **out)
{
    struct overlay *o = calloc(1, sizeof(*o));
    int r;

    if (!o) {
        block_close(base);
        return err(-ENOMEM, "disk %s: out of memory", c->path);
    }
    o->fd = -1;
    o->base = base;
    o->temporary = !*c->overlay;
    pthread_mutex_init(&o->lock, NULL);
    pthread_mutex_init(&o->flushing, NULL);
    pthread_cond_init(&o->unbusy, NULL);
    r = block_init(&o->b, &overlay_ops, o->temporary ? "temporary overlay" : "overlay", o->temporary ? c->path : c->overlay, c->readonly);
    if (r == 0)
        r = o->temporary ? open_temporary(o) : open_named(o, c->overlay);
    if (r == 0)
        r = block_pool_open(&o->pool, &o->b, serve);
    if (r < 0) {
        overlay_free(o);
        block_close(base);
        return r;
    }
    *out = &o->b;
    return 0;
}
