/*
 * The code cache: look-up, decoding of blocks, self-modification. Model and invariants: code.h. Fetch rules: SDM vol. 3A 5.3 (CS limit), 4.6.1
 * (rights), 6.15 (#PF on a fetch reports the first byte that faults).
 *
 * Bytes are copied out of guest memory before they are decoded, so what was decoded is what later comparisons see, whoever writes meanwhile.
 */
#include "cpu/interp/code.h"

#include <errno.h>
#include <sys/mman.h>

#include "base/err.h"
#include "cpu/bt/codepage.h"
#include "cpu/interp/fp.h"
#include "cpu/interp/tlb.h"

#define ARENA_BYTES (128 * MiB)            /* of address space: memory is used as blocks are made */
#define SWEEP_BYTES (6 * MiB)              /* so much is made at least before it is swept again */
#define HASH_BITS 17
#define PAGE_HASH_BITS 12
#define BLOCK_MAX (sizeof(struct block) + BLOCK_BYTES + (BLOCK_OPS + 1) * sizeof(struct op))
#define INSN_MAX 15u

/* ---- memory ---- */
static void *map_zero(size_t n)
{
    void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static void unmap(void *p, size_t n)
{
    if (p)
        munmap(p, n);
}

static u64 ram_pages(const struct icpu *c)
{
    const struct ram *r = c->v->m->ram;
    return r->runs ? (r->run[r->runs - 1].gpa + r->run[r->runs - 1].size) >> PAGE_SHIFT : 0;
}

static void jump_clear(struct icode *k)
{
    memset(k->jump, 0, sizeof k->jump);                            /* tag 0 is never a valid one: generations begin at 1 */
}

int code_open(struct icpu *c)
{
    struct icode *k = map_zero(sizeof *k);
    if (!k)
        return err(-ENOMEM, "vCPU %u: no memory for its code cache", c->v->id);
    c->code = k;
    k->hash = map_zero(sizeof *k->hash << HASH_BITS);
    k->page_hash = map_zero(sizeof *k->page_hash << PAGE_HASH_BITS);
    k->arena = map_zero(ARENA_BYTES);
    k->uncached = map_zero(BLOCK_MAX);
    k->nothing = map_zero(BLOCK_MAX);
    if (!k->hash || !k->page_hash || !k->arena || !k->uncached || !k->nothing) {
        code_close(c);
        return err(-ENOMEM, "vCPU %u: no memory for its code cache", c->v->id);
    }
    k->limit = BLOCK_OPS;
    k->sweep_at = 2 * SWEEP_BYTES;
    k->nothing->op = (struct op *)(void *)k->nothing->bytes;
    decode_init(c);
    return code_ram_changed(c);
}

void code_close(struct icpu *c)
{
    struct icode *k = c->code;
    if (!k)
        return;
    unmap(k->hash, sizeof *k->hash << HASH_BITS);
    unmap(k->page_hash, sizeof *k->page_hash << PAGE_HASH_BITS);
    unmap(k->arena, ARENA_BYTES);
    unmap(k->uncached, BLOCK_MAX);
    unmap(k->nothing, BLOCK_MAX);
    unmap(k->page_state, k->pages);
    unmap(k, sizeof *k);
    c->code = NULL;
}

static void code_flush(struct icpu *c)
{
    struct icode *k = c->code;
    memset(k->hash, 0, sizeof *k->hash << HASH_BITS);
    memset(k->page_hash, 0, sizeof *k->page_hash << PAGE_HASH_BITS);
    if (k->page_state)
        madvise(k->page_state, k->pages, MADV_DONTNEED);
    jump_clear(k);
    k->used = 0;
    k->sweep_at = 2 * SWEEP_BYTES;
    k->flushes++;
    k->flush_wanted = false;
    vcpu_count(c->v, COUNT_CODE_FLUSH);
    c->block = NULL;
    fp_flush_stubs(c);
    trace(c->v->m->trace, TRACE_EXITS, (int)c->v->id, "code cache flushed");
}

void code_forget(struct icpu *c)
{
    code_flush(c);
    madvise(c->code->arena, ARENA_BYTES, MADV_DONTNEED);
}

void code_flush_later(struct icpu *c)
{
    c->code->flush_wanted = true;
    jump_clear(c->code);                                           /* so that the next look-up takes the long way */
}

int code_ram_changed(struct icpu *c)
{
    struct icode *k = c->code;
    unmap(k->page_state, k->pages);
    k->pages = ram_pages(c);
    k->page_state = NULL;
    k->flush_wanted = true;
    if (!k->pages)
        return 0;
    k->page_state = map_zero(k->pages);
    if (!k->page_state) {
        k->pages = 0;
        return err(-ENOMEM, "vCPU %u: no memory for its code cache", c->v->id);
    }
    return 0;
}

void code_retag(struct icpu *c)
{
    u64 mode = (u64)c->mode << 1 | (c->cpl == 3);
    const struct tlb *t = c->tlb;
    c->code_tag = (c->cpl == 3 || t->local ? t->ctx[t->context].generation : t->super_generation) << 8 | mode;
}

/* ---- blocks in the tables ---- */
static struct block **hash_bucket(struct icode *k, u64 gpa)
{
    return &k->hash[(gpa ^ gpa >> HASH_BITS) & ((1u << HASH_BITS) - 1)];
}

static struct block **page_bucket(struct icode *k, u64 gpa)
{
    gpa >>= PAGE_SHIFT;
    return &k->page_hash[(gpa ^ gpa >> PAGE_HASH_BITS) & ((1u << PAGE_HASH_BITS) - 1)];
}

static void unlink_hash(struct icode *k, struct block *b)
{
    for (struct block **p = hash_bucket(k, b->gpa); *p; p = &(*p)->hash_next)
        if (*p == b) {
            *p = b->hash_next;
            return;
        }
}

static void unlink_page(struct icode *k, struct block *b)
{
    for (struct block **p = page_bucket(k, b->gpa); *p; p = &(*p)->page_next)
        if (*p == b) {
            *p = b->page_next;
            return;
        }
}

static void block_dead(struct icpu *c, struct block *b)
{
    b->gpa = BLOCK_DEAD;
    if (b->translations)
        c->bt.forget(c, b);
}

/* Takes b out of the tables; the jump cache does not find dead ones. b's memory stays until the next flush: it may be running. */
static void block_kill(struct icpu *c, struct block *b)
{
    unlink_hash(c->code, b);
    unlink_page(c->code, b);
    block_dead(c, b);
}

static int op_leave(struct icpu *c, const struct op *op)
{
    c->rip = op_rip(c, op) & c->rip_mask;
    return OP_FALL;
}

static void page_mark(struct icpu *c, u64 gpa)
{
    u64 page = gpa >> PAGE_SHIFT;
    if (page >= c->code->pages || c->code->page_state[page])
        return;
    c->code->page_state[page] = 1;
    tlb_code_page(c, gpa);
}

static void block_insert(struct icpu *c, struct block *b)
{
    struct icode *k = c->code;
    struct block **bucket = hash_bucket(k, b->gpa), **page = page_bucket(k, b->gpa);
    vcpu_count(c->v, COUNT_CODE_DECODED);
    vcpu_count_add(c->v, COUNT_CODE_INSNS, b->n);
    b->hash_next = *bucket;
    *bucket = b;
    b->page_next = *page;
    *page = b;
    if (!b->cut && b->n > 1)                                       /* else no instruction can change what follows it in its block */
        page_mark(c, b->gpa);
}

/* ---- stores into code ---- */
static bool block_overlaps(const struct block *b, u64 gpa, unsigned n)
{
    return gpa < b->gpa + b->first && b->gpa < gpa + n;
}

/* The rest of the running block is left before its next instruction. */
static void block_abandon(struct icpu *c, struct block *b)
{
    for (unsigned i = 0; i < b->n; i++)
        b->op[i].fn = op_leave;
    if (b->gpa != BLOCK_DEAD)
        block_kill(c, b);
}

void code_leave(struct icpu *c)
{
    if (c->block)
        block_abandon(c, c->block);
}

void code_drop(struct icpu *c, struct block *b)
{
    if (b->gpa != BLOCK_DEAD)
        block_kill(c, b);
}

static void page_forget(struct icpu *c, u64 gpa)
{
    struct icode *k = c->code;
    struct block **p = page_bucket(k, gpa);
    while (*p) {
        struct block *b = *p;
        if (b->gpa >> PAGE_SHIFT != gpa >> PAGE_SHIFT) {
            p = &b->page_next;
            continue;
        }
        *p = b->page_next;
        unlink_hash(k, b);
        block_dead(c, b);
    }
    k->page_state[gpa >> PAGE_SHIFT] = 0;
}

void code_written(struct icpu *c, u64 gpa, unsigned n, bool forget)
{
    struct icode *k = c->code;
    struct block *b = c->block;
    if (!code_in_page(k, gpa))
        return;
    if (b && b->gpa != BLOCK_DEAD && block_overlaps(b, gpa, n))
        block_abandon(c, b);
    if (!forget)
        return;
    /* Data that shares its page with code, or code that is being written: stores become fast. What runs now in this page must be left, for
     * nobody would tell it of further stores. */
    if (b && (b->gpa ^ gpa) < PAGE_SIZE)
        block_abandon(c, b);
    page_forget(c, gpa);
}

/* ---- the debugger's breakpoints: a block never has one behind its first instruction, and is not in the jump cache if it begins with one ---- */
static bool point_at(const struct icpu *c, u64 la)
{
    return unlikely(c->v->m->debug.points) && debug_point_at(&c->v->m->debug, la);
}

static bool point_within(const struct icpu *c, const struct block *b, u64 la)
{
    for (unsigned i = 1; unlikely(c->v->m->debug.points) && i < b->n; i++)
        if (point_at(c, la + b->op[i].off))
            return true;
    return false;
}

static bool point_stops(struct icpu *c, u64 la)
{
    if (likely(!point_at(c, la)) || c->v->debug.pass)
        return false;
    c->v->debug.stop = DEBUG_POINT;
    return true;
}

/* ---- decoding ---- */
static unsigned padded(unsigned len)
{
    return (len + 15) & ~15u;
}

/* Makes a block at b of the n ops in k->ops and their len bytes. */
static void block_make(struct icpu *c, struct block *b, u64 gpa, const u8 *bytes, unsigned len, unsigned n)
{
    struct icode *k = c->code;
    k->ops[n] = (struct op){ .fn = op_leave, .off = (u8)len };
    *b = (struct block){ .gpa = gpa, .gpa2 = BLOCK_DEAD, .len = (u8)len, .n = (u8)n, .mode = c->mode, .first = (u8)len };
    b->op = (struct op *)(void *)(b->bytes + padded(len));
    for (unsigned i = 0; i < n; i++)
        b->fp |= (k->ops[i].flags & OPF_FP) != 0;
    memset(b->bytes, 0, padded(len));
    memcpy(b->bytes, bytes, len);
    memcpy(b->op, k->ops, (n + 1) * sizeof *b->op);
}

static size_t block_size(const struct block *b)
{
    return ALIGN_UP((size_t)((const u8 *)(b->op + b->n + 1) - (const u8 *)b), 64);
}

/* Has it been translated, or run more than once since the last sweep? */
static bool block_stays(struct block *b)
{
    b->runs /= 2;
    return b->gpa != BLOCK_DEAD && (b->translations || b->runs);
}

static void block_move(struct icpu *c, struct block *to, struct block *from, size_t size)
{
    struct block **bucket = hash_bucket(c->code, from->gpa), **page = page_bucket(c->code, from->gpa);
    memmove(to, from, size);
    to->op = (struct op *)(void *)(to->bytes + padded(to->len));
    to->hash_next = *bucket;
    to->page_next = *page;
    *bucket = *page = to;
    if (to->translations)
        c->bt.moved(c, to);
}

/* Most code runs once. What nothing has been made of goes, the rest moves together; nobody but the tables and translations points to a block here. */
static void code_sweep(struct icpu *c)
{
    struct icode *k = c->code;
    size_t used = 0, size;
    memset(k->hash, 0, sizeof *k->hash << HASH_BITS);
    memset(k->page_hash, 0, sizeof *k->page_hash << PAGE_HASH_BITS);
    jump_clear(k);
    for (size_t at = 0; at < k->used; at += size) {
        struct block *b = (struct block *)(void *)(k->arena + at);
        size = block_size(b);
        if (!block_stays(b))
            continue;
        block_move(c, (struct block *)(void *)(k->arena + used), b, size);
        used += size;
    }
    c->bt.moved(c, NULL);
    k->used = used;
    k->sweep_at = used + MAX(SWEEP_BYTES, used / 2);
    vcpu_count(c->v, COUNT_CODE_SWEEP);
}

/* Room for a block; what is cached may be dropped for it, and the stubs of ops that have been decoded already with it: so it comes before decoding. */
static struct block *arena_alloc(struct icpu *c)
{
    struct icode *k = c->code;
    if (ARENA_BYTES - k->used < BLOCK_MAX || fp_full(c))
        code_flush(c);
    else if (k->used >= k->sweep_at && c->bt.moved)
        code_sweep(c);
    return (struct block *)(void *)(k->arena + k->used);
}

static void arena_commit(struct icode *k, const struct block *b)
{
    k->used += block_size(b);
}

/* How many bytes of code may still be fetched before CS ends. At least 1: the caller has looked. */
static u64 limit_room(const struct icpu *c, u64 rip)
{
    u64 room = c->rip_limit - rip;
    return room == ~0ull ? room : room + 1;
}

/* Only so much as the length of a block depends on it: without prefixes. */
static bool is_conditional(const u8 *bytes)
{
    return (bytes[0] & 0xf0) == 0x70 || (bytes[0] == 0x0f && (bytes[1] & 0xf0) == 0x80);
}

/* Straight-line code in one page, n bytes of it; returns the number of instructions, 0 when the first one does not end here. */
static unsigned decode_run(struct icpu *c, const u8 *bytes, unsigned room, bool volatile_page, unsigned *len)
{
    enum vcpu_where was = vcpu_where(c->v, WHERE_DECODE);
    unsigned n = 0, most = BLOCK_BYTES;
    u64 la = c->cs_base + c->rip;
    *len = 0;
    while (n < c->code->limit && *len + (n ? INSN_MAX : 0) <= most) {
        if (n && point_at(c, (la + *len) & c->rip_mask))
            break;
        struct op *op = &c->code->ops[n];
        int r = decode_one(c, bytes + *len, room - *len, *len, op);
        if (r == DECODE_MORE)
            break;
        bool alone = unlikely(c->code->alone) && c->code->alone(c, bytes + *len, op->len);
        if (alone && n)
            break;
        n++;
        if (is_conditional(bytes + *len))
            most = BLOCK_BRANCHED;
        *len += op->len;
        if (r == BIND_LAST || alone || (volatile_page && op->flags & OPF_STORES))
            break;
    }
    vcpu_where(c->v, was);
    return n;
}

static struct block *decode_block(struct icpu *c, u64 gpa, const u8 *host)
{
    u8 bytes[BLOCK_BYTES + INSN_MAX];
    struct block *b = arena_alloc(c);
    unsigned in_page = PAGE_SIZE - (gpa & ~PAGE_MASK), room = MIN(in_page, (unsigned)sizeof bytes), len;
    room = (unsigned)MIN(room, limit_room(c, c->rip));
    memcpy(bytes, host, room);
    bool volatile_page = codepage_state(c, gpa) == PAGE_VOLATILE;
    unsigned n = decode_run(c, bytes, room, volatile_page, &len);
    if (!n)
        return NULL;
    block_make(c, b, gpa, bytes, len, n);
    b->cut = volatile_page;
    b->chunks = in_page >= padded(len) ? (u8)(padded(len) / 16) : 0;
    arena_commit(c->code, b);
    block_insert(c, b);
    return b;
}

/* ---- instructions that cross into the next page ---- */
struct fetch {
    u64 la, gpa;
    const u8 *host;                                                /* NULL: no RAM */
};

static enum tlb_view_id code_view(const struct icpu *c)
{
    return c->cpl == 3 ? VIEW_USER : tlb_system_view(c);
}

static int fetch_page(struct icpu *c, u64 la, struct fetch *f)
{
    u32 error;
    enum tlb_view_id view = code_view(c);
    struct tlb_entry *e = tlb_lookup(c, view, la, MMU_EXEC, &error);
    if (!e)
        return fault_page(c, la, error);
    f->la = la;
    f->gpa = tlb_gpa(c, view, la);
    f->host = e->tag[MMU_EXEC] & TLB_MMIO ? NULL : (const u8 *)(uintptr_t)(la + e->addend);
    return 0;
}

static u64 next_page(const struct icpu *c, u64 la)
{
    return ((la & PAGE_MASK) + PAGE_SIZE) & c->rip_mask;
}

/* Code that is not in RAM, or not wholly: byte by byte, since devices see what is fetched. Not cached. */
static struct block *decode_uncached(struct icpu *c, struct fetch f)
{
    struct block *b = c->code->uncached;
    u8 bytes[INSN_MAX];
    u64 room = MIN(limit_room(c, c->rip), (u64)INSN_MAX), val;
    if (fp_full(c))
        code_flush(c);
    for (unsigned n = 0, in_page = 0; n < room; in_page++) {
        if (in_page == PAGE_SIZE - (f.la & ~PAGE_MASK)) {
            if (fetch_page(c, next_page(c, f.la), &f))
                return NULL;
            in_page = 0;
        }
        if (f.host) {
            val = f.host[in_page];
        } else {
            codepage_leave(c);
            vcpu_mmio(c->v, f.gpa + in_page, 1, false, &val);
            codepage_enter(c);
        }
        bytes[n++] = (u8)val;
        if (decode_one(c, bytes, n, 0, &c->code->ops[0]) == DECODE_MORE)
            continue;
        block_make(c, b, BLOCK_DEAD, bytes, c->code->ops[0].len, 1);
        return b;
    }
    fault_gp(c, 0);                                                /* at CS's limit */
    return NULL;
}

static bool crossing_matches(const struct block *b, const struct fetch *f1, const struct fetch *f2)
{
    return f2->host && b->gpa2 == f2->gpa && !memcmp(b->bytes, f1->host, b->first) && !memcmp(b->bytes + b->first, f2->host, b->len - b->first);
}

static struct block *decode_crossing(struct icpu *c, const struct fetch *f1)
{
    u8 bytes[INSN_MAX];
    struct fetch f2;
    unsigned first = PAGE_SIZE - (f1->gpa & ~PAGE_MASK);
    u64 room = limit_room(c, c->rip);
    if (room <= first) {
        fault_gp(c, 0);
        return NULL;
    }
    if (fetch_page(c, next_page(c, f1->la), &f2))
        return NULL;
    if (!f2.host)
        return decode_uncached(c, *f1);
    struct block *b = arena_alloc(c);
    unsigned n = (unsigned)MIN(room, INSN_MAX);
    memcpy(bytes, f1->host, first);
    memcpy(bytes + first, f2.host, n - first);
    if (decode_one(c, bytes, n, 0, &c->code->ops[0]) == DECODE_MORE) {
        fault_gp(c, 0);                                            /* CS ends within the instruction */
        return NULL;
    }
    unsigned len = c->code->ops[0].len;
    block_make(c, b, f1->gpa, bytes, len, 1);
    b->gpa2 = len > first ? f2.gpa : BLOCK_DEAD;
    b->first = (u8)MIN(len, first);
    arena_commit(c->code, b);
    block_insert(c, b);
    return b;
}

/* ---- look-up ---- */
/* A cached block for this place, still right; wrong ones are dropped. *crossing: it may not enter the jump cache. */
static struct block *hash_find(struct icpu *c, const struct fetch *f)
{
    struct block *next;
    for (struct block *b = *hash_bucket(c->code, f->gpa); b; b = next) {
        struct fetch f2;
        next = b->hash_next;
        if (b->gpa != f->gpa || b->mode != c->mode)
            continue;
        if (c->rip + b->len - 1 > c->rip_limit)
            continue;                                              /* CS ends within the block: another one, cut there, is made */
        if (point_within(c, b, f->la))
            continue;
        if (b->gpa2 == BLOCK_DEAD) {
            if (block_matches(b, f->host))
                return b;
        } else if (!memcmp(b->bytes, f->host, b->first)) {
            if (fetch_page(c, next_page(c, f->la), &f2))
                return NULL;
            if (crossing_matches(b, f, &f2))
                return b;
        }
        block_kill(c, b);
    }
    return NULL;
}

static struct block *find_slow(struct icpu *c, u64 la)
{
    struct fetch f;
    c->block = NULL;
    if (unlikely(c->code->flush_wanted))
        code_flush(c);
    if (unlikely(c->rip > c->rip_limit || !tlb_canonical(la))) {
        fault_gp(c, 0);
        return NULL;
    }
    if (fetch_page(c, la, &f) || point_stops(c, la))
        return NULL;
    if (!f.host)
        return decode_uncached(c, f);
    c->fault.vector = 0xff;
    struct block *b = hash_find(c, &f);
    if (!b) {
        if (c->fault.vector != 0xff)
            return NULL;                                           /* the second page of a crossing instruction is not there */
        b = decode_block(c, f.gpa, f.host);
        if (!b)
            b = decode_crossing(c, &f);
    }
    if (b && b->gpa != BLOCK_DEAD && b->gpa2 == BLOCK_DEAD && !point_at(c, la)) {
        tlb_note_code(c, code_view(c), la);
        *code_jump_slot(c->code, la) = (struct jump_entry){ la, c->code_tag, b, f.host };
    }
    return b;
}

struct block *code_find_slow(struct icpu *c, u64 la)
{
    enum vcpu_where was = vcpu_where(c->v, WHERE_FIND);
    struct block *b = find_slow(c, la);
    vcpu_where(c->v, was);
    return b;
}
