/*
 * Guest-physical memory: the table of runs. Each run is a memfd of its own, mapped whole; where it lies in the host is nobody's business
 * but this file's. Locking: none; the table changes only while all vCPUs and devices stand still.
 */
#define _GNU_SOURCE
#include "mem/ram.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/err.h"

int ram_init(struct ram *r)
{
    memset(r, 0, sizeof *r);
    return 0;
}

static void run_close(struct ram_run *run)
{
    free(run->dirty);
    if (run->hva)
        munmap(run->hva, run->size);
    if (run->fd >= 0)
        close(run->fd);
}

void ram_close(struct ram *r)
{
    for (unsigned i = 0; i < r->runs && !r->pinned; i++)
        run_close(&r->run[i]);
    free(r->run);
    memset(r, 0, sizeof *r);
}

static int run_open(struct ram_run *run)
{
    run->fd = memfd_create("doppel-ram", MFD_CLOEXEC);
    if (run->fd < 0)
        return err(-errno, "guest memory: memfd_create: %s", strerror(errno));
    if (ftruncate(run->fd, (off_t)run->size) < 0) {
        int e = errno;
        close(run->fd);
        return err(-e, "guest memory: cannot reserve %llu MiB: %s; choose a smaller --memory",
                   (unsigned long long)(run->size / MiB), strerror(e));
    }
    void *p = mmap(NULL, run->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, run->fd, 0);
    if (p == MAP_FAILED) {
        int e = errno;
        close(run->fd);
        return err(-e, "guest memory: cannot map %llu MiB: %s; choose a smaller --memory",
                   (unsigned long long)(run->size / MiB), strerror(e));
    }
    madvise(p, run->size, MADV_HUGEPAGE);                          /* a hint: where shared memory has no huge pages it fails */
    run->hva = p;
    run->state = RAM_SHARED;
    return 0;
}

static int run_track(struct ram_run *run)
{
    run->dirty = calloc(ram_run_words(run), sizeof *run->dirty);
    return run->dirty ? 0 : err(-ENOMEM, "guest memory: out of host memory for what was written");
}

/* The index of the first run that ends beyond gpa. */
static unsigned run_index(const struct ram *r, u64 gpa)
{
    unsigned lo = 0, hi = r->runs;
    while (lo < hi) {
        unsigned mid = (lo + hi) / 2;
        if (gpa - r->run[mid].gpa < r->run[mid].size || gpa < r->run[mid].gpa)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}

int ram_add(struct ram *r, u64 gpa, u64 size)
{
    if (!size || (gpa | size) & ~PAGE_MASK || gpa + size < gpa)
        return err(-EINVAL, "guest memory: bad range 0x%llx + 0x%llx", (unsigned long long)gpa, (unsigned long long)size);
    unsigned i = run_index(r, gpa);
    if (i < r->runs && r->run[i].gpa < gpa + size)
        return err(-EINVAL, "guest memory: range at 0x%llx overlaps another", (unsigned long long)gpa);
    struct ram_run run = { .gpa = gpa, .size = size };
    struct ram_run *table = realloc(r->run, (r->runs + 1) * sizeof *table);
    if (!table)
        return err(-ENOMEM, "guest memory: out of host memory");
    r->run = table;
    int e = run_open(&run);
    if (!e && r->tracked && (e = run_track(&run)))
        run_close(&run);
    if (e)
        return e;
    memmove(&table[i + 1], &table[i], (r->runs - i) * sizeof *table);
    table[i] = run;
    r->runs++;
    r->size += size;
    r->epoch++;
    return 0;
}

void ram_clear(struct ram *r)
{
    for (unsigned i = 0; i < r->runs; i++) {
        struct ram_run *run = &r->run[i];
        if (run->state == RAM_ABSENT)
            continue;
        if (fallocate(run->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)run->offset, (off_t)run->size) < 0)
            memset(run->hva, 0, run->size);
        ram_mark(r, run->gpa, run->size);
    }
    r->epoch++;                                                    /* nobody was told of writes */
}

const struct ram_run *ram_run_at(const struct ram *r, u64 gpa)
{
    /* Nearly always one of the first two: below and above the PCI hole. */
    for (unsigned i = 0; i < r->runs && i < 2; i++)
        if (gpa - r->run[i].gpa < r->run[i].size)
            return r->run[i].hva ? &r->run[i] : NULL;
    if (r->runs <= 2)
        return NULL;
    unsigned i = run_index(r, gpa);
    return i < r->runs && gpa >= r->run[i].gpa && r->run[i].hva ? &r->run[i] : NULL;
}

u8 *ram_hva(const struct ram *r, u64 gpa)
{
    const struct ram_run *run = ram_run_at(r, gpa);
    return run ? run->hva + (gpa - run->gpa) : NULL;
}

/* Host address of gpa and, in *n, how many of len bytes are there without a break. */
static u8 *ram_piece(const struct ram *r, u64 gpa, u64 len, u64 *n)
{
    const struct ram_run *run = ram_run_at(r, gpa);
    if (!run)
        return NULL;
    *n = MIN(len, run->size - (gpa - run->gpa));
    return run->hva + (gpa - run->gpa);
}

u8 *ram_range(const struct ram *r, u64 gpa, u64 len)
{
    u64 n;
    u8 *start = ram_piece(r, gpa, len, &n);
    if (!start)
        return NULL;
    for (u64 done = n; done < len; done += n) {
        u8 *p = gpa + done < gpa ? NULL : ram_piece(r, gpa + done, len - done, &n);
        if (p != start + done)
            return NULL;
    }
    return start;
}

bool ram_has(const struct ram *r, u64 gpa, u64 len)
{
    u64 n;
    for (u64 done = 0; done < len; done += n)
        if (gpa + done < gpa || !ram_piece(r, gpa + done, len - done, &n))
            return false;
    return true;
}

int ram_read(const struct ram *r, u64 gpa, void *buf, u64 len)
{
    if (!ram_has(r, gpa, len))
        return -EFAULT;
    u64 n = 0;
    for (u64 done = 0; done < len; done += n) {
        const u8 *p = ram_piece(r, gpa + done, len - done, &n);
        memcpy((u8 *)buf + done, p, n);
    }
    return 0;
}

int ram_write(struct ram *r, u64 gpa, const void *buf, u64 len)
{
    if (!ram_has(r, gpa, len))
        return -EFAULT;
    ram_begin_write(r, gpa, len);
    u64 n = 0;
    for (u64 done = 0; done < len; done += n) {
        u8 *p = ram_piece(r, gpa + done, len - done, &n);
        memcpy(p, (const u8 *)buf + done, n);
    }
    ram_end_write(r, gpa, len);
    return 0;
}

int ram_iov(const struct ram *r, u64 gpa, u64 len, struct iovec *iov, unsigned *n, unsigned max)
{
    unsigned i = *n;
    u64 piece;
    for (u64 done = 0; done < len; done += piece) {
        u8 *p = gpa + done < gpa ? NULL : ram_piece(r, gpa + done, len - done, &piece);
        if (!p)
            return -EFAULT;
        if (i == max)
            return -E2BIG;
        iov[i++] = (struct iovec){ p, piece };
    }
    *n = i;
    return 0;
}

void ram_begin_write(struct ram *r, u64 gpa, u64 len)
{
    if (r->on_begin_write)
        r->on_begin_write(r->on_write_arg, gpa, len);
}

void ram_end_write(struct ram *r, u64 gpa, u64 len)
{
    if (r->on_end_write)
        r->on_end_write(r->on_write_arg, gpa, len);
    ram_mark(r, gpa, len);
}

/* ---- which pages were written ---- */
int ram_track(struct ram *r, bool on)
{
    int e = 0;
    for (unsigned i = 0; i < r->runs; i++) {
        free(r->run[i].dirty);
        r->run[i].dirty = NULL;
        if (on && !e)
            e = run_track(&r->run[i]);
    }
    r->tracked = on && !e;
    r->clean_epoch++;
    return e;
}

static void mark_pages(struct ram_run *run, u64 first, u64 last)
{
    for (u64 page = first; page <= last; page++)
        if (!(atomic_load_explicit(&run->dirty[page / 64], memory_order_relaxed) & BIT(page % 64)))
            atomic_fetch_or(&run->dirty[page / 64], BIT(page % 64));
}

void ram_mark(struct ram *r, u64 gpa, u64 len)
{
    if (likely(!r->tracked) || !len)
        return;
    for (unsigned i = run_index(r, gpa); i < r->runs; i++) {
        struct ram_run *run = &r->run[i];
        u64 first = gpa > run->gpa ? gpa - run->gpa : 0;
        if (run->gpa > gpa && run->gpa - gpa >= len)
            break;
        u64 last = MIN(gpa + (len - 1) - run->gpa, run->size - 1);
        if (run->dirty)
            mark_pages(run, first >> PAGE_SHIFT, last >> PAGE_SHIFT);
    }
}

void ram_mark_bits(struct ram *r, unsigned i, const u64 *bits)
{
    struct ram_run *run = &r->run[i];
    for (u64 n = 0; run->dirty && n < ram_run_words(run); n++)
        if (bits[n])
            atomic_fetch_or(&run->dirty[n], bits[n]);
}

void ram_take_dirty(struct ram *r, unsigned i, u64 *bits)
{
    struct ram_run *run = &r->run[i];
    for (u64 n = 0; run->dirty && n < ram_run_words(run); n++)
        if (atomic_load_explicit(&run->dirty[n], memory_order_relaxed))
            bits[n] |= atomic_exchange(&run->dirty[n], 0);
    r->clean_epoch++;
}
