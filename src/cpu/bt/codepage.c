/*
 * Self- and cross-modifying code (SDM vol. 3A 8.1.3, 11.6): the protocol by which translations go before the bytes change that they were made of.
 * Words and interface: codepage.h.
 *
 * A page of RAM is
 *     PLAIN      data; vCPUs may have fast writes to it
 *     CLAIMED    a vCPU wants to translate from it: new fast writes are not made, old ones are being given up
 *     CODE       every vCPU has given them up: translations need no comparison. A store takes the slow path and ends them first
 *     VOLATILE   written over and over: translations compare their bytes, stores are fast. After a while it is tried as code again
 *
 * *Claims.* A claim is numbered, and its page put into a ring (claim[]). A vCPU follows claims at a point where it holds no right in a register: when it
 * enters, and between blocks. `served` says how far it has come. The claim holds when every vCPU has followed it or was seen outside after the
 * claim: who enters later follows first. (The claimer stores the claim, then loads `inside`; the other one stores `inside`, then loads `head`; both
 * sequentially consistent, so one of them sees the other.) Nobody waits for that; the claimer interprets on and asks again.
 *
 * *Stores.* Who writes (a vCPU's slow path, a device, the monitor by ram_write()) adds itself to the word's writers; while there are any, nobody is
 * allowed to translate from the page. Then it looks whether anybody holds anything there: a vCPU notes itself and the lines that it translates from, and looks
 * at the word once more before it does, so that again one of the two sees the other. If so, each holder is sent a request to end translations of the
 * range; those that are inside are kicked and waited for. Then the bytes are stored, and the writer takes itself off. So at no time does a translation run whose bytes in memory are others.
 * That is stronger than the manual asks of cross-modifying code, and all that it asks of self-modifying code and DMA. A write's end without its beginning
 * (the engine was changed in between) does both at once: the device says only afterwards that its data is there.
 *
 * *What decides.* A store to a page with code scores 1, one that took the page's last translation scores 8 (it will be made and claimed again); at 32
 * the page is dropped: all its translations go, it is plain. The fourth time within seconds it becomes volatile, for 0.1 s at first and twice as
 * long each time it turns out to be so again.
 *
 * *No deadlock.* Waited for are only vCPUs that are inside. These take leaf locks only (here, clock, trace), never one under which somebody else may
 * wait in store_begin() or ram_begin_write(): before devices, interrupt chips and the split lock they leave. So a writer may hold any of those locks.
 * A vCPU that waits as a writer serves requests meanwhile, so two that write each other's code both get on; a writer outside (a handler of its own vCPU
 * that does DMA) is not waited for. A vCPU that serves never waits. Claims wait for nobody.
 *
 * A vCPU that is behind by more claims than the ring holds gives up all fast writes, one with too many requests all translations: memory is bounded.
 */
#define _GNU_SOURCE
#include "cpu/bt/codepage.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/err.h"
#include "cpu/interp/tlb.h"

/* The word: state 0..1, score 2..7, level 8..11, low bits of the claim's number 12..27, time of the last drop 28..39, writers 40..63. */
#define SCORE_SHIFT 2
#define SCORE_MASK 0x3full
#define LEVEL_SHIFT 8
#define LEVEL_MASK 0xfull
#define CLAIM_SHIFT 12
#define CLAIM_MASK 0xffffull
#define WHEN_SHIFT 28
#define WHEN_MASK 0xfffull
#define WRITER BIT(40)
#define WRITERS (~0ull << 40)

#define SCORE_EMPTIED 8u
#define SCORE_DROP 32u
#define LEVEL_VOLATILE 4u              /* from this level on a drop makes the page volatile, for 2^(level - 4) ticks */
#define LEVEL_MAX 10u
#define CALM 32u                       /* ticks, times a volatile page's, after which its past is forgotten */
#define CLAIMS_FEW 16u                 /* more at once: all fast writes of the TLB are given up rather than looked for one by one */
#define SPINS 200

static u64 field(u64 w, unsigned shift, u64 mask)
{
    return w >> shift & mask;
}

static u64 with(u64 w, unsigned shift, u64 mask, u64 val)
{
    return (w & ~(mask << shift)) | (val & mask) << shift;
}

static u64 ticks(void)                                             /* of about 0.1 s */
{
    return __builtin_ia32_rdtsc() >> 28;
}

static u64 ticks_since(u64 w)
{
    return (ticks() - field(w, WHEN_SHIFT, WHEN_MASK)) & WHEN_MASK;
}

static bool is_code(u64 w)
{
    return (w & CODEPAGE_STATE) == PAGE_CODE || (w & CODEPAGE_STATE) == PAGE_CLAIMED;
}

static u64 volatile_ticks(u64 w)
{
    u64 level = field(w, LEVEL_SHIFT, LEVEL_MASK);
    return level > LEVEL_VOLATILE ? BIT(level - LEVEL_VOLATILE) : 1;
}

/* ---- waiting, and waking who waits ---- */
static void wake(struct codepages *all)
{
    if (likely(!atomic_load(&all->waiters)))                       /* what is to be seen has been stored by then: both sequentially consistent */
        return;
    atomic_fetch_add(&all->change, 1);
    syscall(SYS_futex, &all->change, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* ---- a vCPU follows the others ---- */
/* Returns whether translations of gpa's page are left. */
static bool invalidate(struct icpu *c, u64 gpa, u64 len)
{
    return c->bt.invalidate && c->bt.invalidate(c, gpa, len);
}

static void invalidate_page(struct icpu *c, struct codepage *p, u64 gpa, u64 len)
{
    if (!(atomic_load(&p->holders) & c->codepage->bit))
        return;
    if (!invalidate(c, gpa, len))
        atomic_fetch_and(&p->holders, ~c->codepage->bit);
}

/* Pieces of [gpa, gpa + len) by page: for (u64 at = gpa, n; (n = piece(at, gpa + len)); at += n) */
static u64 piece(u64 at, u64 end)
{
    return MIN(end - at, PAGE_SIZE - (at & ~PAGE_MASK));
}

static void invalidate_range(struct icpu *c, u64 gpa, u64 len)
{
    for (u64 at = gpa, n; (n = piece(at, gpa + len)); at += n) {
        struct codepage *p = codepage_at(c->codepage->all, at);
        if (p)
            invalidate_page(c, p, at, n);
    }
}

static void protect(struct icpu *c, u64 gpa, bool tlb)
{
    if (tlb)
        tlb_code_page(c, gpa);
    if (c->bt.protect)
        c->bt.protect(c, gpa);
}

static void serve_claims(struct icpu *c)
{
    struct codepage_vcpu *v = c->codepage;
    struct codepages *all = v->all;
    u64 head = atomic_load(&all->head), served = atomic_load_explicit(&v->served, memory_order_relaxed);
    if (head == served)
        return;
    bool few = head - served <= CLAIMS_FEW, kept = head - served < CODEPAGE_CLAIMS;
    for (u64 n = served; kept && n < head; n++)
        protect(c, atomic_load_explicit(&all->claim[n % CODEPAGE_CLAIMS], memory_order_relaxed), few);
    if (!kept || atomic_load(&all->head) - served >= CODEPAGE_CLAIMS) /* a slot was used again before it was read */
        protect(c, PROTECT_ALL, true);
    else if (!few)
        tlb_code_page(c, PROTECT_ALL);
    atomic_store(&v->served, head);
}

static void serve_requests(struct icpu *c)
{
    struct codepage_vcpu *v = c->codepage;
    struct codepage_range range[CODEPAGE_REQUESTS];
    while (atomic_load(&v->pending)) {
        pthread_mutex_lock(&v->lock);
        unsigned n = v->requests;
        bool everything = v->everything;
        u64 posted = v->posted;
        memcpy(range, v->request, n * sizeof *range);
        v->requests = 0;
        v->everything = false;
        atomic_store(&v->pending, false);
        pthread_mutex_unlock(&v->lock);
        if (everything)
            invalidate(c, 0, ~0ull);
        for (unsigned i = 0; i < n && !everything; i++)
            invalidate_range(c, range[i].gpa, range[i].len);
        atomic_store(&v->done, posted);
        wake(v->all);
    }
}

/* Volatile pages whose time is over: the translations that compare go, so that better ones are made. */
void codepage_revisit(struct icpu *c)
{
    struct codepage_vcpu *v = c->codepage;
    u64 now = ticks();
    for (unsigned i = 0; i < v->revisits;) {
        if (v->revisit[i].when > now) {
            i++;
            continue;
        }
        u64 gpa = v->revisit[i].gpa;
        v->revisit[i] = v->revisit[--v->revisits];
        invalidate(c, gpa, PAGE_SIZE);
    }
}

static void revisit_later(struct codepage_vcpu *v, u64 gpa, u64 after)
{
    unsigned i = 0;
    while (i < v->revisits && v->revisit[i].gpa != gpa)
        i++;
    if (i == v->revisits && v->revisits < CODEPAGE_REVISITS) {
        v->revisit[i].gpa = gpa;
        v->revisit[i].when = ticks() + after;
        v->revisits++;
    }
}

void codepage_serve(struct icpu *c)
{
    serve_claims(c);
    serve_requests(c);
}

void codepage_enter(struct icpu *c)
{
    struct codepage_vcpu *v = c->codepage;
    atomic_store_explicit(&v->thread, (u64)pthread_self(), memory_order_relaxed);
    atomic_store(&v->inside, true);
    serve_claims(c);
    serve_requests(c);
}

void codepage_leave(struct icpu *c)
{
    atomic_store(&c->codepage->inside, false);
    wake(c->codepage->all);
}

/* ---- requests ---- */
/* Makes a vCPU that is inside look soon. Its first look after the event bit finds what was stored before. */
static void kick(struct codepage_vcpu *v)
{
    struct vcpu *cpu = v->c->v;
    if (!(atomic_fetch_or(&cpu->events, VCPU_EV_CODE) & VCPU_EV_CODE) && cpu->m->engine->kick)
        cpu->m->engine->kick(cpu);
}

static bool join(struct codepage_range *r, u64 gpa, u64 len)
{
    u64 start = MIN(r->gpa, gpa), end = MAX(r->gpa + r->len, gpa + len);
    bool touch = gpa <= r->gpa + r->len && r->gpa <= gpa + len;
    if (!touch && (start & PAGE_MASK) != ((end - 1) & PAGE_MASK))
        return false;
    *r = (struct codepage_range){ start, end - start };
    return true;
}

/* Returns the request's number, to be compared with `done`. */
static u64 post(struct codepage_vcpu *v, u64 gpa, u64 len)
{
    unsigned i = 0;
    pthread_mutex_lock(&v->lock);
    while (i < v->requests && !join(&v->request[i], gpa, len))
        i++;
    if (i < v->requests)
        ;                                                          /* an old one is wider now */
    else if (i < CODEPAGE_REQUESTS)
        v->request[v->requests++] = (struct codepage_range){ gpa, len };
    else
        v->everything = true;
    u64 number = ++v->posted;
    atomic_store(&v->pending, true);
    pthread_mutex_unlock(&v->lock);
    if (atomic_load(&v->inside))
        kick(v);
    wake(v->all);                                                  /* it may wait itself */
    return number;
}

/* ---- stores ---- */
struct write {
    struct codepages *all;
    struct icpu *self;                 /* the vCPU inside on this thread; NULL: none */
    u64 wait;                          /* vCPUs that have been sent something */
    u64 number[CODEPAGE_VCPUS];
};

static struct icpu *inside_here(struct codepages *all)
{
    u64 me = (u64)pthread_self();
    for (unsigned i = 0; i < CODEPAGE_VCPUS; i++) {
        struct codepage_vcpu *v = &all->vcpu[i];
        if (v->c && atomic_load_explicit(&v->thread, memory_order_relaxed) == me && atomic_load_explicit(&v->inside, memory_order_relaxed))
            return v->c;
    }
    return NULL;
}

/* The 64ths of a page that n bytes from gpa on lie in. */
static u64 lines_of(u64 gpa, u64 n)
{
    unsigned first = gpa >> 6 & 63, last = (gpa + n - 1) >> 6 & 63;
    return ~0ull >> (63 - (last - first)) << first;
}

static void end_translations(struct write *w, struct codepage *p, u64 gpa, u64 len)
{
    if (!(atomic_load(&p->lines) & lines_of(gpa, len)))
        return;
    u64 others = atomic_load(&p->holders);
    if (w->self) {
        invalidate_page(w->self, p, gpa, len);
        others &= ~w->self->codepage->bit;
    }
    for (; others; others &= others - 1) {
        unsigned i = (unsigned)__builtin_ctzll(others);
        w->number[i] = post(&w->all->vcpu[i], gpa, len);
        w->wait |= BIT(i);
    }
}

/* Takes those off w->wait that have done what they were sent, or are outside and will do it first when they enter. */
static bool all_done(struct write *w)
{
    for (u64 left = w->wait; left; left &= left - 1) {
        unsigned i = (unsigned)__builtin_ctzll(left);
        struct codepage_vcpu *v = &w->all->vcpu[i];
        if (!atomic_load(&v->inside) || atomic_load(&v->done) >= w->number[i])
            w->wait &= ~BIT(i);
    }
    return !w->wait;
}

static void wait_done(struct write *w)
{
    struct codepages *all = w->all;
    for (unsigned i = 0; i < SPINS; i++) {
        if (all_done(w))
            return;
        if (w->self)
            serve_requests(w->self);
        __builtin_ia32_pause();
    }
    atomic_fetch_add(&all->waiters, 1);
    for (;;) {
        u32 seen = atomic_load(&all->change);
        if (w->self)
            serve_requests(w->self);
        if (all_done(w))
            break;
        syscall(SYS_futex, &all->change, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    }
    atomic_fetch_sub(&all->waiters, 1);
}

/* Adds to the page's score. True: it is to be dropped. */
static bool scored(struct codepage *p, u64 add)
{
    u64 old = atomic_load(&p->word), new;
    bool drop;
    do {
        u64 score = field(old, SCORE_SHIFT, SCORE_MASK) + add, level = field(old, LEVEL_SHIFT, LEVEL_MASK);
        drop = score >= SCORE_DROP;
        if (drop && ticks_since(old) > CALM * volatile_ticks(old))
            level = 0;
        new = with(old, SCORE_SHIFT, SCORE_MASK, drop ? 0 : score);
        if (drop) {
            new = with(new, LEVEL_SHIFT, LEVEL_MASK, MIN(level + 1, LEVEL_MAX));
            new = with(new, WHEN_SHIFT, WHEN_MASK, ticks());
        }
    } while (!atomic_compare_exchange_weak(&p->word, &old, new));
    return drop;
}

/* The page's translations are gone, and there is at least one writer: data from now on, of which kind says its level. */
static void becomes_data(struct codepage *p)
{
    u64 old = atomic_load(&p->word), new;
    atomic_store(&p->lines, 0);
    do {
        bool often = field(old, LEVEL_SHIFT, LEVEL_MASK) >= LEVEL_VOLATILE;
        new = with(old, 0, CODEPAGE_STATE, often ? PAGE_VOLATILE : PAGE_PLAIN);
    } while (!atomic_compare_exchange_weak(&p->word, &old, new));
}

/* What remains of a store's beginning when everybody has done what was asked: whether the page stays code. */
static bool settle(struct codepage *p, bool dropped)
{
    bool emptied = !dropped && !atomic_load(&p->holders);
    if (emptied)
        scored(p, SCORE_EMPTIED);
    if (emptied || dropped)
        becomes_data(p);
    return emptied || dropped;
}

bool codepage_store_begin(struct icpu *c, u64 gpa, u64 n)
{
    struct codepages *all = c->codepage->all;
    struct codepage *p = codepage_at(all, gpa);
    struct write w = { .all = all, .self = c };
    if (!p)
        return false;
    u64 word = atomic_fetch_add(&p->word, WRITER);
    if ((word & CODEPAGE_STATE) == PAGE_VOLATILE)
        return true;
    bool drop = scored(p, 1);
    vcpu_count(c->v, COUNT_CODE_WRITE);
    if (drop)
        vcpu_count(c->v, COUNT_CODE_PAGE_DROPPED);
    if (!is_code(word)) {                                          /* the vCPU's own blocks only */
        if (drop)
            becomes_data(p);
        return drop;
    }
    if (drop) {
        end_translations(&w, p, gpa & PAGE_MASK, PAGE_SIZE);
    } else {
        end_translations(&w, p, gpa, n);
    }
    if (w.wait) {
        vcpu_count(c->v, COUNT_CODE_WRITE_WAIT);
        wait_done(&w);
    }
    return settle(p, drop) && drop;
}

/* Returns false when there was no writer to take off. */
static bool writer_off(struct codepage *p)
{
    u64 old = atomic_load(&p->word);
    do {
        if (!(old & WRITERS))
            return false;
    } while (!atomic_compare_exchange_weak(&p->word, &old, old - WRITER));
    return true;
}

void codepage_store_end(struct icpu *c, u64 gpa, u64 n)
{
    struct codepage *p = codepage_at(c->codepage->all, gpa);
    (void)n;
    if (p)
        writer_off(p);
}

/* ---- writes by devices and the monitor: any thread ---- */
/* The part of [gpa, gpa + len) that the table knows. */
static u64 known(const struct codepages *all, u64 gpa, u64 len)
{
    u64 size = atomic_load_explicit(&all->table, memory_order_acquire)->pages << PAGE_SHIFT;
    return gpa < size ? MIN(len, size - gpa) : 0;
}

/* The range has its marks of a writer; what has been translated from it goes. */
static void pages_written(struct codepages *all, u64 gpa, u64 len)
{
    struct write w = { .all = all };
    bool looked = false, any = false;
    for (u64 at = gpa, n; (n = piece(at, gpa + len)); at += n) {
        struct codepage *p = codepage_at(all, at);
        if (!is_code(atomic_load(&p->word)))
            continue;
        any = true;
        if (!looked)
            w.self = inside_here(all);
        looked = true;
        end_translations(&w, p, at, n);
    }
    if (!any)
        return;
    wait_done(&w);
    for (u64 at = gpa, n; (n = piece(at, gpa + len)); at += n) {
        struct codepage *p = codepage_at(all, at);
        if (is_code(atomic_load(&p->word)))
            settle(p, n == PAGE_SIZE);
    }
}

static void on_begin_write(void *arg, u64 gpa, u64 len)
{
    struct codepages *all = arg;
    len = known(all, gpa, len);
    for (u64 at = gpa, n; (n = piece(at, gpa + len)); at += n)
        atomic_fetch_add(&codepage_at(all, at)->word, WRITER);
    pages_written(all, gpa, len);
}

static void on_end_write(void *arg, u64 gpa, u64 len)
{
    struct codepages *all = arg;
    len = known(all, gpa, len);
    for (u64 at = gpa, n; (n = piece(at, gpa + len)); at += n)
        if (unlikely(!writer_off(codepage_at(all, at)))) {
            atomic_fetch_add(&codepage_at(all, at)->word, WRITER);
            pages_written(all, at, n);
            writer_off(codepage_at(all, at));
        }
}

/* ---- claims ---- */
/* With all->lock held: nobody else's claim is half made. */
static void claim(struct icpu *c, struct codepage *p, u64 gpa)
{
    struct codepages *all = c->codepage->all;
    u64 head = atomic_load(&all->head), old = atomic_load(&p->word), new;
    do {
        if ((old & CODEPAGE_STATE) != PAGE_PLAIN || old & WRITERS)
            return;
        new = with(old, 0, CODEPAGE_STATE, PAGE_CLAIMED);
        new = with(new, CLAIM_SHIFT, CLAIM_MASK, head + 1);
    } while (!atomic_compare_exchange_weak(&p->word, &old, new));
    atomic_store_explicit(&all->claim[head % CODEPAGE_CLAIMS], gpa & PAGE_MASK, memory_order_relaxed);
    atomic_store(&all->head, head + 1);
    vcpu_count(c->v, COUNT_CODE_CLAIM);
}

/* Has everybody followed? Who has not, and was looked at before, is made to. With all->lock held. */
static bool followed(struct icpu *c, u64 word, bool hurry)
{
    struct codepages *all = c->codepage->all;
    u64 head = atomic_load(&all->head);
    u64 number = head - ((head - field(word, CLAIM_SHIFT, CLAIM_MASK)) & CLAIM_MASK);
    bool yes = true;
    for (unsigned i = 0; i < CODEPAGE_VCPUS; i++) {
        struct codepage_vcpu *v = &all->vcpu[i];
        if (!v->c || v->c == c || !atomic_load(&v->inside) || atomic_load(&v->served) >= number)
            continue;
        yes = false;
        if (hurry)
            kick(v);
    }
    return yes;
}

/* Moves a page that is no code yet towards it. */
static void advance(struct icpu *c, struct codepage *p, u64 gpa)
{
    struct codepages *all = c->codepage->all;
    pthread_mutex_lock(&all->lock);
    u64 w = atomic_load(&p->word);
    bool fresh = (w & CODEPAGE_STATE) == PAGE_PLAIN;
    if (fresh) {
        claim(c, p, gpa);
        w = atomic_load(&p->word);
    }
    while ((w & CODEPAGE_STATE) == PAGE_CLAIMED && followed(c, w, !fresh))
        if (atomic_compare_exchange_weak(&p->word, &w, with(w, 0, CODEPAGE_STATE, PAGE_CODE)))
            break;
    pthread_mutex_unlock(&all->lock);
    serve_claims(c);                                               /* its own fast writes go before it makes the next store */
}

/* A volatile page: is its time over? Then it is plain, which takes nothing from anybody. */
static bool still_volatile(struct icpu *c, struct codepage *p, u64 gpa, u64 w)
{
    u64 period = volatile_ticks(w), since = ticks_since(w);
    if (since < period) {
        revisit_later(c->codepage, gpa & PAGE_MASK, period - since);
        return true;
    }
    atomic_compare_exchange_strong(&p->word, &w, with(w, 0, CODEPAGE_STATE, PAGE_PLAIN));
    return false;
}

static bool allowed(const struct codepage *p)
{
    u64 w = atomic_load(&p->word);
    return (w & CODEPAGE_STATE) == PAGE_CODE && !(w & WRITERS);
}

static void note(_Atomic u64 *word, u64 bits)
{
    if (bits & ~atomic_load(word))
        atomic_fetch_or(word, bits);
}

enum code_page codepage_use(struct icpu *c, u64 gpa, u64 n)
{
    struct codepage_vcpu *v = c->codepage;
    struct codepage *p = codepage_at(v->all, gpa);
    if (!p || !ram_hva(c->v->m->ram, gpa))
        return CODE_COMPARE;
    u64 w = atomic_load(&p->word);
    if ((w & CODEPAGE_STATE) == PAGE_VOLATILE && still_volatile(c, p, gpa, w))
        return CODE_COMPARE;
    if ((w & CODEPAGE_STATE) != PAGE_CODE && !(w & WRITERS))
        advance(c, p, gpa);
    if (allowed(p)) {
        note(&p->holders, v->bit);
        note(&p->lines, lines_of(gpa, n));
        if (allowed(p))
            return CODE_OK;
    }
    vcpu_count(c->v, COUNT_CODE_WAIT);
    return CODE_WAIT;
}

/* ---- making and ending ---- */
static u64 ram_pages(const struct ram *r)
{
    return r->runs ? (r->run[r->runs - 1].gpa + r->run[r->runs - 1].size) >> PAGE_SHIFT : 0;
}

static size_t table_bytes(u64 pages)
{
    return sizeof(struct codepage_table) + pages * sizeof(struct codepage);
}

/* With all->lock held. The old table stays until the end: a device's thread may be looking at it. */
static int table_make(struct codepages *all)
{
    struct codepage_table *old = atomic_load(&all->table), *t;
    u64 pages = ram_pages(all->m->ram);
    if (old && old->pages == pages)
        return 0;
    t = mmap(NULL, table_bytes(pages), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (t == MAP_FAILED)
        return err(-ENOMEM, "no memory for the table of pages with code");
    t->pages = pages;
    t->older = old;
    for (u64 i = 0; old && i < MIN(pages, old->pages); i++) {
        u64 writers = atomic_load(&old->page[i].word) & WRITERS;
        if (writers)
            atomic_store(&t->page[i].word, writers);
    }
    atomic_store(&all->table, t);
    return 0;
}

int codepage_ram_changed(struct icpu *c)
{
    struct codepages *all = c->codepage->all;
    int e = 0;
    pthread_mutex_lock(&all->lock);
    if (all->epoch != all->m->ram->epoch) {
        e = table_make(all);
        if (!e)
            all->epoch = all->m->ram->epoch;
    }
    pthread_mutex_unlock(&all->lock);
    if (c->bt.invalidate)
        c->bt.invalidate(c, 0, ~0ull);
    return e;
}

int codepages_open(struct machine *m)
{
    struct codepages *all = aligned_alloc(64, sizeof *all);
    if (!all)
        return err(-ENOMEM, "no memory for the table of pages with code");
    memset(all, 0, sizeof *all);
    all->m = m;
    pthread_mutex_init(&all->lock, NULL);
    for (unsigned i = 0; i < CODEPAGE_VCPUS; i++)
        pthread_mutex_init(&all->vcpu[i].lock, NULL);
    int e = table_make(all);
    if (e) {
        free(all);
        return e;
    }
    all->epoch = m->ram->epoch;
    m->engine_data = all;
    m->ram->on_write_arg = all;
    m->ram->on_begin_write = on_begin_write;
    m->ram->on_end_write = on_end_write;
    return 0;
}

void codepages_close(struct machine *m)
{
    struct codepages *all = m->engine_data;
    if (!all)
        return;
    if (m->ram && m->ram->on_write_arg == all) {                      /* another engine may be open already, or the board be gone */
        m->ram->on_begin_write = m->ram->on_end_write = NULL;
        m->ram->on_write_arg = NULL;
    }
    for (struct codepage_table *t = atomic_load(&all->table), *older; t; t = older) {
        older = t->older;
        munmap(t, table_bytes(t->pages));
    }
    for (unsigned i = 0; i < CODEPAGE_VCPUS; i++)
        pthread_mutex_destroy(&all->vcpu[i].lock);
    pthread_mutex_destroy(&all->lock);
    free(all);
    m->engine_data = NULL;
}

int codepage_vcpu_open(struct icpu *c)
{
    struct codepages *all = c->v->m->engine_data;
    bug_on(c->v->id >= CODEPAGE_VCPUS);
    struct codepage_vcpu *v = &all->vcpu[c->v->id];
    v->all = all;
    v->bit = BIT(c->v->id);
    v->c = c;
    c->codepage = v;
    return codepage_ram_changed(c);
}

void codepage_vcpu_close(struct icpu *c)
{
    if (!c->codepage)
        return;
    atomic_store(&c->codepage->inside, false);
    c->codepage->c = NULL;
    c->codepage = NULL;
}
