/*
 * Translations in their tables: look-up, pages, links, and how they end. What a translation is: bt.h.
 *
 * The itlb: a small direct-mapped table from linear page to the id of a (linear page, guest-physical page) pair, one for supervisor code and one for user code
 * in each context of the TLB's.
 * A translation is entered from outside its page only while its page stands there, so flushing the TLB means clearing entries here, and nothing else. What stands there
 * is not the id but a number that the guest cannot know: so a translation checks "is this the target that was meant" and "is the page still mapped" by one
 * comparison of their sum, for which no other target can be found.
 *
 * A translation that dies has its ways in overwritten by jumps that leave; its memory stays until everything is forgotten. Everything is the vCPU's thread's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "base/codemem.h"
#include "base/err.h"
#include "cpu/bt/shadow.h"
#include "cpu/bt/tr.h"

static void *zeroed(size_t n)
{
    void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static void drop(void *p, size_t n)
{
    if (p)
        munmap(p, n);
}

#define TARGET_BYTES (BT_KEYS * BT_TARGETS * sizeof(struct bt_target))
#define TABLES(M)                                                                                     \
    M(tb, BT_TBS * sizeof *t->tb) M(link, BT_LINKS * sizeof *t->link) M(mark, BT_MARKS * sizeof *t->mark) M(page, BT_PAGES * sizeof *t->page) M(way, BT_WAYS * sizeof *t->way)     \
    M(hash, BT_HASH * sizeof *t->hash) M(frame, BT_HASH * sizeof *t->frame) M(page_hash, BT_HASH * sizeof *t->page_hash)                   \
    M(returns, BT_RETURN_HASH * sizeof *t->returns) M(reloc, BT_RELOCS * sizeof *t->reloc)                                                          \
    M(target, TARGET_BYTES) M(itlb_user, TLB_CONTEXTS * sizeof *t->itlb_user) M(itlb, ITLB_USER(TLB_CONTEXTS) * sizeof *t->itlb)

int tb_open(struct icpu *c, struct bt *t)
{
    bool ok = true;
#define M(field, size) ok = (t->field = zeroed(size)) && ok;
    TABLES(M)
#undef M
    if (!ok)
        return err(-ENOMEM, "vCPU %u: no memory for the translator's tables", c->v->id);
    for (unsigned k = 0; k < BT_KEYS; k++)
        c->bt.target[k] = t->target + k * BT_TARGETS;
    c->bt.itlb_user = t->itlb_user[c->tlb->context];
    if (getrandom(t->key, sizeof t->key, 0) != (ssize_t)sizeof t->key)
        return err(-EIO, "vCPU %u: no random numbers (getrandom): %s", c->v->id, strerror(errno));
    tb_reset(c, t);
    return 0;
}

void tb_close(struct bt *t)
{
#define M(field, size) drop(t->field, size);
    TABLES(M)
#undef M
}

/* ---- the itlb ---- */
static u64 *itlb_secrets(struct icpu *c, struct bt *t, unsigned which)
{
    return which == ITLB_SUPER ? c->bt.itlb : t->itlb_user[which - 1];
}

static void itlb_put(struct bt *t, struct itlb *l, u64 *secrets, u32 slot, u32 id)
{
    if (!l->id[slot]) {
        if (l->n < BT_ITLB_SIZE)
            l->filled[l->n] = (u16)slot;
        l->n += l->n <= BT_ITLB_SIZE;
    }
    l->id[slot] = id;
    secrets[slot] = t->page[id].secret;
}

static void itlb_drop(struct icpu *c, struct bt *t, unsigned which, u32 slot)
{
    if (t->itlb[which].id[slot])
        itlb_secrets(c, t, which)[slot] = t->itlb[which].id[slot] = 0;
}

static void itlb_clear(struct icpu *c, struct bt *t, unsigned which)
{
    struct itlb *l = &t->itlb[which];
    if (l->n > BT_ITLB_SIZE)
        for (u32 i = 0; i < BT_ITLB_SIZE; i++)
            itlb_drop(c, t, which, i);
    else
        for (unsigned i = 0; i < l->n; i++)
            itlb_drop(c, t, which, l->filled[i]);
    l->n = 0;
}

static void itlb_clear_all(struct icpu *c, struct bt *t)
{
    t->itlb_private = false;
    for (unsigned i = 0; i < ITLB_USER(TLB_CONTEXTS); i++)
        itlb_clear(c, t, i);
}

static void give_back(void *p, size_t n)
{
    madvise(p, n, MADV_DONTNEED);
}

static void jumps_clear(struct icpu *c, struct bt *t)
{
    for (unsigned k = 0; k < BT_KEYS; k++)
        for (unsigned i = 0; i < BT_JUMPS; i++)
            c->bt.jump[k][i] = t->rx + t->lookup[k];
    for (unsigned k = 0; k < BT_KEYS; k++)
        for (unsigned i = 0; i < BT_RETURNS; i++)
            c->bt.ret[k][i] = t->rx + t->lookup[k];
    give_back(t->target, TARGET_BYTES);
    for (unsigned k = 0; k < BT_KEYS; k++)                         /* an empty entry is no target; but in the first place 0 would be one */
        t->target[k * BT_TARGETS].la = 1;
}

void tb_reset(struct icpu *c, struct bt *t)
{
    give_back(t->hash, BT_HASH * sizeof *t->hash);
    give_back(t->frame, BT_HASH * sizeof *t->frame);
    give_back(t->page_hash, BT_HASH * sizeof *t->page_hash);
    give_back(t->returns, BT_RETURN_HASH * sizeof *t->returns);
    itlb_clear_all(c, t);
    jumps_clear(c, t);
    t->used = t->first;
    t->cold = BT_ARENA_BYTES / 2;
    t->tbs = t->links = t->marks = t->pages = t->relocs = 1;                   /* 0 is none */
    t->flushes = c->code->flushes;
    t->dead = t->ways = 0;
    c->bt.exit_stale = c->bt.site = 0;
}

void tb_forget(struct icpu *c, struct bt *t)
{
    size_t first = ALIGN_UP(t->first, PAGE_SIZE);
    tb_reset(c, t);
    codemem_forget(t->rw, t->rx, first, BT_ARENA_BYTES - first);
    give_back(t->tb, BT_TBS * sizeof *t->tb);
    give_back(t->link, BT_LINKS * sizeof *t->link);
    give_back(t->mark, BT_MARKS * sizeof *t->mark);
    give_back(t->page, BT_PAGES * sizeof *t->page);
    give_back(t->way, BT_WAYS * sizeof *t->way);
    give_back(t->reloc, BT_RELOCS * sizeof *t->reloc);
}

/* ---- pages ---- */
static u32 *page_bucket(struct bt *t, u64 la, u64 gpa)
{
    u64 h = la >> PAGE_SHIFT ^ gpa >> (PAGE_SHIFT - 3) ^ la >> 30;
    return &t->page_hash[(h ^ h >> 15) & (BT_HASH - 1)];
}

/* Never 0: that is an empty entry. */
static u64 secret(const struct bt *t, u64 n)
{
    n = (n ^ t->key[0]) * 0xff51afd7ed558ccdull;
    n = (n ^ n >> 33 ^ t->key[1]) * 0xc4ceb9fe1a85ec53ull;
    return (n ^ n >> 33) | 1;
}

static u32 page_id(struct bt *t, u64 la, u64 gpa)
{
    u32 *bucket = page_bucket(t, la, gpa);
    for (u32 id = *bucket; id; id = t->page[id].next)
        if (t->page[id].la == la && t->page[id].gpa == gpa)
            return id;
    if (t->pages == BT_PAGES)
        return 0;
    u32 id = t->pages++;
    t->page[id] = (struct cpage){ .la = la, .gpa = gpa, .secret = secret(t, id), .next = *bucket };
    *bucket = id;
    return id;
}

u32 tb_page(struct icpu *c, struct bt *t, u64 la, bool user)
{
    struct itlb *l = &t->itlb[user ? ITLB_USER(c->tlb->context) : ITLB_SUPER];
    u32 slot = la >> PAGE_SHIFT & (BT_ITLB_SIZE - 1), id = l->id[slot], error;
    la &= PAGE_MASK;
    if (likely(id && t->page[id].la == la))
        return id;
    if (!tlb_canonical(la))
        return 0;
    enum tlb_view_id view = user ? VIEW_USER : tlb_system_view(c);
    struct tlb_entry *e = tlb_lookup(c, view, la, MMU_EXEC, &error);
    if (!e || e->tag[MMU_EXEC] & TLB_MMIO)
        return 0;
    id = page_id(t, la, tlb_gpa(c, view, la));
    if (id) {
        itlb_put(t, l, user ? c->bt.itlb_user : c->bt.itlb, slot, id);
        if (!user && !(c->tlb->view[view]->page[la >> PAGE_SHIFT & (TLB_SIZE - 1)] & TLB_GLOBAL))
            t->itlb_private = true;
    }
    return id;
}

static void itlb_private_clear(struct icpu *c, struct bt *t)
{
    if (t->itlb_private)
        itlb_clear(c, t, ITLB_SUPER);
    t->itlb_private = false;
}

/* The shadow knows itself what is large. */
static void flushed_shadow(struct icpu *c, enum tlb_flush what, u64 la, unsigned context)
{
    if (what == FLUSH_ALL)
        shadow_flush(c, FLUSH_ALL, 0, 0);
    else if (what != FLUSH_NONGLOBAL && context != c->tlb->context)
        shadow_flush_in(c, la, context);
    else if (what != FLUSH_NONGLOBAL)
        shadow_flush(c, FLUSH_PAGE, la, context);
    else if (context != TLB_EVERY)
        shadow_flush(c, FLUSH_NONGLOBAL, 0, context);
    else
        for (unsigned i = 0; i < TLB_CONTEXTS; i++)
            shadow_flush(c, FLUSH_NONGLOBAL, 0, i);
}

void bt_flushed(struct icpu *c, enum tlb_flush what, u64 la, unsigned context)
{
    struct bt *t = c->bt.bt;
    if (c->bt.shadow)
        flushed_shadow(c, what, la, context);
    switch (what) {
    case FLUSH_PAGE:
        for (unsigned i = 0; i < ITLB_USER(TLB_CONTEXTS); i++)     /* it may be global */
            itlb_drop(c, t, i, la >> PAGE_SHIFT & (BT_ITLB_SIZE - 1));
        break;
    case FLUSH_NONGLOBAL:
        for (unsigned i = 0; i < TLB_CONTEXTS; i++)
            if (i == context || context == TLB_EVERY)
                itlb_clear(c, t, ITLB_USER(i));
        if (context == c->tlb->context || context == TLB_EVERY)
            itlb_private_clear(c, t);
        break;
    default:
        itlb_clear_all(c, t);
    }
}

void bt_context_changed(struct icpu *c, unsigned context)
{
    struct bt *t = c->bt.bt;
    for (unsigned k = 0; k < BT_KEYS; k++)
        c->bt.target[k] = t->target + k * BT_TARGETS;
    c->bt.itlb_user = t->itlb_user[context];
    itlb_private_clear(c, t);
    if (t->choose)
        bt_account(c, t->context);
    t->context = context;
    if (c->bt.shadow) {
        shadow_context(c, context);
        bt_key(c);                                                 /* which may have found another address space there */
    }
}

/* ---- translations ---- */
static u32 *tb_bucket(struct bt *t, u64 la)
{
    return &t->hash[(la ^ la >> 15) & (BT_HASH - 1)];
}

static u32 *frame_bucket(struct bt *t, u64 gpa)
{
    u64 frame = gpa >> PAGE_SHIFT;
    return &t->frame[(frame ^ frame >> 15) & (BT_HASH - 1)];
}

struct tb *tb_find(struct bt *t, u64 la, u32 page, unsigned key)
{
    for (u32 i = *tb_bucket(t, la); i; i = t->tb[i].hash_next) {
        struct tb *tb = &t->tb[i];
        if (tb->la == la && tb->page == page && tb->key == key)
            return tb;
    }
    return NULL;
}

void tb_insert(struct bt *t, struct tb *tb)
{
    u32 n = (u32)(tb - t->tb), *hash = tb_bucket(t, tb->la), *frame = frame_bucket(t, tb->gpa);
    tb->hash_next = *hash;
    *hash = n;
    tb->frame_next = *frame;
    *frame = n;
    tb->block_next = tb->b->translations;
    tb->b->translations = n;
}

struct tb *tb_at(struct bt *t, const u8 *pc)
{
    if (pc < t->rx + t->first || pc >= t->rx + t->used)
        return NULL;
    u32 lo = 1, hi = t->tbs;                                       /* ascending by start */
    const u8 *p = t->rw + (pc - t->rx);
    while (hi - lo > 1) {
        u32 mid = lo + (hi - lo) / 2;
        if (t->tb[mid].start <= p)
            lo = mid;
        else
            hi = mid;
    }
    return lo < t->tbs && p >= t->tb[lo].start && p < t->tb[lo].start + t->tb[lo].size ? &t->tb[lo] : NULL;
}

/* ---- links ---- */
void tb_link(struct icpu *c, struct bt *t, u32 n, struct tb *to)
{
    struct link *l = &t->link[n];
    const struct tb *from = &t->tb[l->from];
    if (l->linked || from->dead || l->key != to->key || l->target != to->la)
        return;
    bool near = from->page == to->page && !to->page2 && !from->page2;
    if (!near)
        bt_page_entry(c, t, to);
    if (!near && !to->page_entry)
        return;
    aim(l->place, near ? to->start + to->code_off : to->page_entry);
    l->linked = true;
    l->next = to->links_in;
    to->links_in = n;
    vcpu_count(c->v, COUNT_CODE_LINKED);
}

/* ---- returns: a call puts the entry of its return into icpu.bt.ret, so that the return's jump leads there at once ---- */
static u32 *return_bucket(struct bt *t, u64 la)
{
    return &t->returns[(la ^ la >> 15) & (BT_RETURN_HASH - 1)];
}

static void return_link(struct bt *t, u32 n, struct tb *to)
{
    struct link *l = &t->link[n];
    aim(l->place, to->entry);
    l->linked = true;
    l->next = to->links_in;
    to->links_in = n;
}

/* In the call's page: else it may be another page by then, and the entry would be the wrong one each time. */
static bool returns_to(const struct bt *t, const struct link *l, const struct tb *to)
{
    const struct tb *from = &t->tb[l->from];
    return l->target == to->la && l->key == to->key && from->page == to->page && !from->page2 && !to->page2;
}

static void return_wait(struct bt *t, u32 n)
{
    u32 *bucket = return_bucket(t, t->link[n].target);
    t->link[n].next = *bucket;
    *bucket = n;
}

void tb_return(struct bt *t, u32 n)
{
    const struct link *l = &t->link[n];
    struct tb *to = tb_find(t, l->target, t->tb[l->from].page, l->key);
    if (to && to->entry && returns_to(t, l, to))
        return_link(t, n, to);
    else
        return_wait(t, n);
}

/* to has an entry now. */
static void returns_link(struct bt *t, struct tb *to)
{
    u32 *p = return_bucket(t, to->la), n;
    while ((n = *p)) {
        struct link *l = &t->link[n];
        bool dead = t->tb[l->from].dead;
        if (!dead && !returns_to(t, l, to)) {
            p = &l->next;
            continue;
        }
        *p = l->next;
        if (!dead)
            return_link(t, n, to);
    }
}

static void unlink_in(struct bt *t, struct tb *tb)
{
    u32 next;
    for (u32 n = tb->links_in; n; n = next) {
        struct link *l = &t->link[n];
        next = l->next;
        aim(l->place, l->stub);
        l->linked = false;
        if (l->ret && !t->tb[l->from].dead)
            return_wait(t, n);
    }
    tb->links_in = 0;
}

static struct bt_target *target_of(struct icpu *c, const struct tb *tb)
{
    return &c->bt.target[tb->key][tb->la & (BT_TARGETS - 1)];
}

void tb_jump_note(struct icpu *c, struct bt *t, struct tb *tb)
{
    bt_entry(c, t, tb);
    if (!tb->entry)
        return;
    const u8 *entry = t->rx + (tb->entry - t->rw);
    c->bt.jump[tb->key][tb->la & JUMP_MASK] = entry;
    *target_of(c, tb) = (struct bt_target){ tb->la, entry };
    returns_link(t, tb);
}

static void list_remove(struct bt *t, u32 *head, struct tb *tb, size_t next)
{
    u32 n = (u32)(tb - t->tb);
    for (u32 *p = head; *p; p = (u32 *)(void *)((u8 *)&t->tb[*p] + next))
        if (*p == n) {
            *p = *(u32 *)(void *)((u8 *)tb + next);
            return;
        }
}

/* Whoever still comes, by icpu.bt.jump or from C, leaves: the first instruction of the entry and the page check become a jump. */
void tb_kill(struct icpu *c, struct bt *t, struct tb *tb)
{
    if (tb->dead)
        return;
    tb->dead = true;
    t->dead++;
    unlink_in(t, tb);
    list_remove(t, tb_bucket(t, tb->la), tb, offsetof(struct tb, hash_next));
    list_remove(t, frame_bucket(t, tb->gpa), tb, offsetof(struct tb, frame_next));
    list_remove(t, &tb->b->translations, tb, offsetof(struct tb, block_next));
    if (!tb->entry)
        return;
    struct emit e = { tb->entry, tb->entry + 32, false };
    const u8 **jump = &c->bt.jump[tb->key][tb->la & JUMP_MASK];
    if (*jump == t->rx + (tb->entry - t->rw))
        *jump = t->rx + t->lookup[tb->key];
    struct bt_target *target = target_of(c, tb);
    if (target->la == tb->la)
        *target = (struct bt_target){ 0, t->rx + t->miss };
    jump_to(&e, t->rw + t->miss);
}

bool bt_invalidate(struct icpu *c, u64 gpa, u64 len)
{
    struct bt *t = c->bt.bt;
    bool left = false;
    if (len == ~0ull) {
        for (u32 i = 1; i < t->tbs; i++)
            tb_kill(c, t, &t->tb[i]);
        return false;
    }
    for (u64 page = gpa & PAGE_MASK; page < gpa + len; page += PAGE_SIZE) {
        u32 next;
        for (u32 i = *frame_bucket(t, page); i; i = next) {
            struct tb *tb = &t->tb[i];
            next = tb->frame_next;
            if ((tb->gpa & PAGE_MASK) != page)
                continue;
            if (tb->gpa < gpa + len && gpa < tb->gpa + tb->b->len)
                tb_kill(c, t, tb);
            else
                left = left || page == (gpa & PAGE_MASK);
        }
    }
    return left;
}
