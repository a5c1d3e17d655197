/* The comparison of the translator with interp (check.h). */
#include "cpu/bt/check.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "base/err.h"
#include "cpu/bt/codepage.h"
#include "cpu/interp/fp.h"
#include "cpu/interp/tlb.h"
#include "cpu/msr.h"

#define FP_EVERY 16
#define RETRIES 4
#define EARLY 100                                                  /* more than a block has accesses */
#define STALES 4
#define AGAIN 64                                                   /* some 20 us: vCPUs that wait for one another by turns come to their turns */
#define YIELDS 32
#define GATE_VCPU (1u << 31)
#define X86_PLAIN offsetof(struct x86, xsave)

enum { KIND_PLAIN = 1, KIND_FP, KIND_ONCE, KIND_MSR };

/* ---- who writes guest memory ---- */
static bool gate_mine(const struct check_gate *g)
{
    return atomic_load(&g->state) & GATE_VCPU && pthread_equal(atomic_load(&g->holder), pthread_self());
}

static void gate_begin_write(void *arg, u64 gpa, u64 len)
{
    struct check_gate *g = arg;
    u32 old = atomic_load(&g->state);
    if (g->begin_write)
        g->begin_write(g->arg, gpa, len);
    if (gate_mine(g))
        return;
    for (;;) {
        if (old & GATE_VCPU) {
            sched_yield();
            old = atomic_load(&g->state);
        } else if (atomic_compare_exchange_weak(&g->state, &old, old + 1)) {
            return;
        }
    }
}

static void gate_end_write(void *arg, u64 gpa, u64 len)
{
    struct check_gate *g = arg;
    if (!gate_mine(g))
        atomic_fetch_sub(&g->state, 1);
    if (g->end_write)
        g->end_write(g->arg, gpa, len);
}

static bool gate_try(struct check_gate *g)
{
    u32 none = 0;
    return atomic_load(&g->state) == 0 && atomic_compare_exchange_strong(&g->state, &none, GATE_VCPU);
}

static void gate_pause(unsigned times)
{
    if (times < YIELDS)
        sched_yield();
    else
        nanosleep(&(struct timespec){ .tv_nsec = 20000 }, NULL);
}

/*
 * True: others went first, and may have done anything meanwhile. Whoever was there last may come again at once, so often: a change of turns at each block would cost
 * a wake-up of the other thread at each block where the host has other work, too.
 */
static bool gate_enter(struct icpu *c, struct check *k)
{
    struct check_gate *g = k->gate;
    k->ticket = false;
    if (atomic_load(&g->last) != c || ++k->again > AGAIN || !gate_try(g)) {
        u32 ticket = atomic_fetch_add(&g->next, 1);
        bool waits = atomic_load(&g->serving) != ticket || !gate_try(g);
        k->ticket = true;
        k->again = 0;
        if (waits) {
            codepage_leave(c);
            for (unsigned n = 0; atomic_load(&g->serving) != ticket || !gate_try(g); n++)
                gate_pause(n);
            codepage_enter(c);
        }
        atomic_store(&g->holder, pthread_self());
        atomic_store(&g->last, c);
        return waits;
    }
    atomic_store(&g->holder, pthread_self());
    return false;
}

static void gate_leave(struct check *k)
{
    struct check_gate *g = k->gate;
    atomic_store(&g->holder, 0);
    atomic_store(&g->state, 0);
    if (k->ticket)
        atomic_fetch_add(&g->serving, 1);
}

int check_gate_open(struct machine *m)
{
    struct check_gate *g = calloc(1, sizeof *g);
    if (!g)
        return err(-ENOMEM, "--check: no memory");
    *g = (struct check_gate){ .begin_write = m->ram->on_begin_write, .end_write = m->ram->on_end_write, .arg = m->ram->on_write_arg };
    m->ram->on_begin_write = gate_begin_write;
    m->ram->on_end_write = gate_end_write;
    m->ram->on_write_arg = g;
    m->tools.gate = g;
    return 0;
}

void check_gate_close(struct machine *m)
{
    struct check_gate *g = m->tools.gate;
    if (!g)
        return;
    if (m->ram) {                                                  /* a board that is gone has taken it along */
        m->ram->on_begin_write = g->begin_write;
        m->ram->on_end_write = g->end_write;
        m->ram->on_write_arg = g->arg;
    }
    m->tools.gate = NULL;
    free(g);
}

/* ---- what an instruction is ---- */
static bool once(ZydisMnemonic m)
{
    switch (m) {
    case ZYDIS_MNEMONIC_IN: case ZYDIS_MNEMONIC_OUT: case ZYDIS_MNEMONIC_INSB: case ZYDIS_MNEMONIC_INSW: case ZYDIS_MNEMONIC_INSD:
    case ZYDIS_MNEMONIC_OUTSB: case ZYDIS_MNEMONIC_OUTSW: case ZYDIS_MNEMONIC_OUTSD:
    case ZYDIS_MNEMONIC_RDTSC: case ZYDIS_MNEMONIC_RDTSCP: case ZYDIS_MNEMONIC_RDPMC: case ZYDIS_MNEMONIC_RDRAND: case ZYDIS_MNEMONIC_RDSEED:
    case ZYDIS_MNEMONIC_HLT: case ZYDIS_MNEMONIC_MWAIT: case ZYDIS_MNEMONIC_MONITOR: case ZYDIS_MNEMONIC_CPUID: case ZYDIS_MNEMONIC_VMCALL:
    case ZYDIS_MNEMONIC_VMMCALL: case ZYDIS_MNEMONIC_INVLPG: case ZYDIS_MNEMONIC_INVPCID: case ZYDIS_MNEMONIC_INVD: case ZYDIS_MNEMONIC_WBINVD:
    case ZYDIS_MNEMONIC_XSETBV: case ZYDIS_MNEMONIC_WRPKRU: case ZYDIS_MNEMONIC_CLTS: case ZYDIS_MNEMONIC_LMSW: case ZYDIS_MNEMONIC_RSM:
        return true;
    default:
        return false;
    }
}

static bool special_register(const ZydisDecodedOperand *o)
{
    ZydisRegisterClass k = o->type == ZYDIS_OPERAND_TYPE_REGISTER ? ZydisRegisterGetClass(o->reg.value) : ZYDIS_REGCLASS_INVALID;
    return k == ZYDIS_REGCLASS_CONTROL || k == ZYDIS_REGCLASS_DEBUG;
}

/* Extensions that have nothing to do with extended state; what is not listed may. */
static bool general(ZydisISAExt e)
{
    switch (e) {
    case ZYDIS_ISA_EXT_BASE: case ZYDIS_ISA_EXT_LONGMODE: case ZYDIS_ISA_EXT_PAUSE: case ZYDIS_ISA_EXT_BMI1: case ZYDIS_ISA_EXT_BMI2:
    case ZYDIS_ISA_EXT_LZCNT: case ZYDIS_ISA_EXT_MOVBE: case ZYDIS_ISA_EXT_ADOX_ADCX: case ZYDIS_ISA_EXT_SMAP: case ZYDIS_ISA_EXT_CET:
    case ZYDIS_ISA_EXT_RDWRFSGS: case ZYDIS_ISA_EXT_RDPID: case ZYDIS_ISA_EXT_CLFSH: case ZYDIS_ISA_EXT_CLFLUSHOPT:
        return true;
    default:
        return false;
    }
}

static unsigned insn_kind(const struct icpu *c, const u8 *bytes, unsigned len)
{
    ZydisDecodedInstruction z;
    ZydisDecodedOperand o[ZYDIS_MAX_OPERAND_COUNT];
    if (ZYAN_FAILED(ZydisDecoderDecodeFull(&c->code->decoder[c->mode], bytes, len, &z, o)))
        return KIND_PLAIN;                                         /* an op that raises #UD */
    if (z.mnemonic == ZYDIS_MNEMONIC_RDMSR || z.mnemonic == ZYDIS_MNEMONIC_WRMSR)
        return KIND_MSR;
    if (once(z.mnemonic))
        return KIND_ONCE;
    for (unsigned i = 0; i < z.operand_count_visible; i++)
        if (special_register(&o[i]))
            return KIND_ONCE;
    return general(z.meta.isa_ext) ? KIND_PLAIN : KIND_FP;
}

static bool alone(const struct icpu *c, const u8 *bytes, unsigned len)
{
    return insn_kind(c, bytes, len) >= KIND_ONCE;
}

static unsigned block_kind(struct icpu *c, struct block *b)
{
    if (!b->kind) {
        b->kind = KIND_PLAIN;
        for (unsigned i = 0; i < b->n; i++)
            b->kind = (u8)MAX(b->kind, insn_kind(c, b->bytes + b->op[i].off, b->op[i].len));
    }
    if (b->kind != KIND_MSR)
        return b->kind;
    u32 msr = (u32)c->r[RCX];
    return msr >= MSR_FS_BASE && msr <= MSR_KERNEL_GS_BASE ? KIND_PLAIN : KIND_ONCE;
}

/* ---- states ---- */
static void state_take(struct icpu *c, const struct check *k, struct check_state *s)
{
    memcpy(s->r, c->r, sizeof s->r);
    s->rip = c->rip;
    s->rflags = icpu_rflags(c);
    s->insns = c->v->insns;
    s->pkru = c->pkru;
    memcpy(&s->x, c->x, X86_PLAIN);
    if (k->fp) {
        fp_store(c);
        memcpy(s->x.xsave, c->x->xsave, k->xsave_bytes);
    }
}

static void state_put(struct icpu *c, const struct check *k, const struct check_state *s)
{
    bool changed = memcmp(c->x, &s->x, X86_PLAIN) || (icpu_rflags(c) ^ s->rflags) & ~(u64)FLAGS_ARITH;
    memcpy(c->r, s->r, sizeof s->r);
    c->rip = s->rip;
    icpu_set_rflags(c, s->rflags);
    c->v->insns = s->insns;
    c->db_pending = 0;
    if (changed) {
        memcpy(c->x, &s->x, X86_PLAIN);
        icpu_mode(c);
    }
    if (k->fp) {
        memcpy(c->x->xsave, s->x.xsave, k->xsave_bytes);
        fp_load(c);
    }
}

/* Flags that the block's first n instructions leave undefined (SDM vol. 1 appendix A): each engine has its own way to make their results. */
static u64 undefined_flags(const struct icpu *c, const struct check *k, u64 n)
{
    u64 undefined = 0;
    for (unsigned off = 0; off < k->len && n--;) {
        ZydisDecodedInstruction z;
        ZydisDecodedOperand o[ZYDIS_MAX_OPERAND_COUNT];
        if (ZYAN_FAILED(ZydisDecoderDecodeFull(&c->code->decoder[IMODE_LONG64], k->bytes + off, k->len - off, &z, o)))
            break;
        off += z.length;
        if (!z.cpu_flags)
            continue;
        bool perhaps = z.meta.category == ZYDIS_CATEGORY_SHIFT || z.meta.category == ZYDIS_CATEGORY_ROTATE || z.meta.category == ZYDIS_CATEGORY_STRINGOP ||
                       z.mnemonic == ZYDIS_MNEMONIC_SHLD || z.mnemonic == ZYDIS_MNEMONIC_SHRD;
        if (!perhaps)                                              /* a count of 0 leaves all flags alone */
            undefined &= ~(u64)(z.cpu_flags->modified | z.cpu_flags->set_0 | z.cpu_flags->set_1);
        undefined |= z.cpu_flags->undefined;
    }
    return undefined & FLAGS_ARITH;
}

static bool flags_same(const struct icpu *c, const struct check *k)
{
    u64 differ = k->interp.rflags ^ k->bt.rflags;
    return likely(!differ) || !(differ & ~undefined_flags(c, k, k->interp.insns - k->before.insns));
}

static bool state_same(const struct icpu *c, const struct check *k)
{
    const struct check_state *a = &k->interp, *b = &k->bt;
    return !memcmp(a->r, b->r, sizeof a->r) && a->rip == b->rip && flags_same(c, k) && a->insns == b->insns && a->pkru == b->pkru &&
           !memcmp(&a->x, &b->x, X86_PLAIN) && (!k->fp || !memcmp(a->x.xsave, b->x.xsave, k->xsave_bytes));
}

void check_restore(struct icpu *c, struct check *k)
{
    state_put(c, k, &k->before);
    store_log_undo(&k->log);
}

/* ---- both engines ---- */
static void log_set(struct icpu *c, struct store_log *l)
{
    c->log = l;
    tlb_views(c);
}

/* Pages that interp wrote to, with what it made of them; memory is then as before. */
static void keep_pages(struct check *k)
{
    for (unsigned i = 0; i < k->last->pages; i++) {
        k->page[i].host = k->last->page[i];
        memcpy(k->page[i].want, k->last->page[i], PAGE_SIZE);
    }
    store_log_undo(k->last);
}

static bool pages_same(const struct check *k)
{
    for (unsigned i = 0; i < k->last->pages; i++)
        if (memcmp(k->page[i].host, k->page[i].want, PAGE_SIZE))
            return false;
    return true;
}

/* After an op that ends blocks the translator may go on all the same, with the next one: nothing has to be looked at in between. */
static bool goes_through(const struct icpu *c, u32 flags, unsigned cpl)
{
    return c->mode == IMODE_LONG64 && c->cpl == cpl && !((c->flags | flags) & (FLAG_TF | FLAG_RF)) && !c->db_pending && c->x->activity == X86_RUNNING;
}

/* The block's first k->most instructions on interp. */
static void run_ops(struct icpu *c, const struct check *k, struct block *b)
{
    const struct op *op = b->op, *end = b->op + MIN(k->most, (unsigned)b->n + 1);
    u32 flags = c->flags;
    u8 cpl = c->cpl;
    int r = OP_NEXT;
    c->block = b;
    c->r[REG_RIP] = c->rip;
    while (op < end && r == OP_NEXT) {
        if (op > b->op)
            c->x->shadow = c->ss_shadow = false;                   /* of the one before */
        r = op->fn(c, op);
        if (r == OP_END && op + 1 < b->op + b->n && goes_through(c, flags, cpl))
            r = OP_NEXT;
        op += r == OP_NEXT;
    }
    c->v->insns += (u64)(op - b->op) + (r == OP_NEAR);
    if (r == OP_NEXT)
        c->rip = op_rip(c, op) & c->rip_mask;
    else if (r < OP_NEAR)
        icpu_end(c, op, r);
}

/* interp's run of the block at c->rip. False: it may not run twice; nothing has happened. */
static bool run_interp(struct icpu *c, struct check *k)
{
    memcpy(k->count, c->v->count, sizeof k->count);                /* what interp does is not told */
    k->last = k->most > BLOCK_OPS ? &k->log : &k->part;            /* the translator's stores are among those of the whole block */
    store_log_begin(k->last);
    log_set(c, k->last);
    struct block *b = code_find(c);
    if (b)
        run_ops(c, k, b);
    else
        icpu_fetch_failed(c);
    log_set(c, NULL);
    memcpy(c->v->count, k->count, sizeof k->count);
    if (k->last->stop) {
        state_put(c, k, &k->before);
        store_log_undo(k->last);
        return false;
    }
    state_take(c, k, &k->interp);
    keep_pages(k);
    state_put(c, k, &k->before);
    return true;
}

/* The translator's: one translation; another one where the first was not right any more, and nothing has happened. */
static void run_bt(struct icpu *c, struct check *k)
{
    k->run(c);
    for (unsigned i = 0; i < STALES && c->v->insns == k->before.insns && c->rip == k->before.rip && k->interp.insns > k->before.insns; i++)
        k->run(c);
    state_take(c, k, &k->bt);
}

/* Both from the same state; false: the block may not run twice, nothing has happened. */
static bool run_both(struct icpu *c, struct check *k, bool *same)
{
    if (!run_interp(c, k))
        return false;
    run_bt(c, k);
    *same = state_same(c, k) && pages_same(k);
    return true;
}

/*
 * Has the translator left the block before its end? That is its right (an access that needs a handler, another view of memory, an event that a string
 * instruction has seen): then only as much is compared.
 */
static bool left_early(const struct check *k)
{
    u64 done = k->bt.insns - k->before.insns, all = k->interp.insns - k->before.insns;
    return done < all || (done == all && k->bt.rip - k->before.rip < k->len && k->bt.rip != k->interp.rip);
}

/* How much interp is to do the next time. */
static void choose_most(struct check *k)
{
    u64 done = k->bt.insns - k->before.insns;
    k->most = done && left_early(k) ? (unsigned)done : BLOCK_OPS + 1;
}

/* Again and again, until there is no difference or it stays. */
static bool run_repeatedly(struct icpu *c, struct check *k, bool *same)
{
    u32 events = 0;
    unsigned early = 0, other = 0;
    k->most = BLOCK_OPS + 1;
    for (;;) {
        bool whole = k->most > BLOCK_OPS;
        if (!run_both(c, k, same))
            return false;
        if (*same)
            break;
        if (left_early(k) || !whole ? early++ == EARLY : other++ == RETRIES)
            break;
        vcpu_count(c->v, left_early(k) ? COUNT_CHECK_EARLY : COUNT_CHECK_RETRIED);
        check_restore(c, k);
        choose_most(k);
        if (!k->fp) {                                              /* nothing has changed it since */
            k->fp = true;
            state_take(c, k, &k->before);
        }
        events |= atomic_exchange(&c->v->events, 0);               /* string instructions look at them */
    }
    if (events)
        atomic_fetch_or(&c->v->events, events);
    return true;
}

bool check_compare(struct icpu *c, struct check *k)
{
    bool same;
    return !run_repeatedly(c, k, &same) || same;
}

/* ---- the loop ---- */
/* Without comparison. True: the next block may follow at once. */
static bool run_once(struct icpu *c, struct block *b)
{
    vcpu_count(c->v, COUNT_CHECK_ONCE);
    return icpu_run_block(c, b);
}

/* True: the next block may follow at once. */
static bool check_block(struct icpu *c, struct check *k)
{
    struct block *b = code_find(c);
    if (!b) {
        icpu_fetch_failed(c);
        return false;
    }
    unsigned kind = block_kind(c, b);
    if (kind == KIND_ONCE || b->gpa == BLOCK_DEAD)
        return run_once(c, b);
    bool same = true, twice;
    k->fp = kind == KIND_FP || ++k->turn % FP_EVERY == 0;
    if (gate_enter(c, k))
        b = code_find(c);
    if (unlikely(!b)) {
        gate_leave(k);
        icpu_fetch_failed(c);
        return false;
    }
    k->len = b->len;
    memcpy(k->bytes, b->bytes, b->len);
    state_take(c, k, &k->before);
    twice = run_repeatedly(c, k, &same);
    if (!same)
        check_report(c, k);
    gate_leave(k);
    if (!twice) {
        b = code_find(c);
        if (b)
            return run_once(c, b);
        icpu_fetch_failed(c);
        return false;
    }
    vcpu_count(c->v, COUNT_CHECK_BLOCKS);
    vcpu_count_add(c->v, COUNT_CHECK_INSNS, k->bt.insns - k->before.insns);
    /* What interp's loop looks at between blocks is looked at after each of them. */
    return false;
}

void check_run(struct icpu *c)
{
    struct check *k = c->bt.check;
    if (c->mode != IMODE_LONG64 || c->v->m->debug.points || c->v->m->debug.watches) {
        icpu_run_blocks(c);
        return;
    }
    enum vcpu_where was = vcpu_where(c->v, WHERE_CHECK);
    check_block(c, k);
    vcpu_where(c->v, was);
}

int check_open(struct icpu *c)
{
    struct check *k = aligned_alloc(64, ALIGN_UP(sizeof *k, 64));
    if (!k)
        return err(-ENOMEM, "vCPU %u: no memory for --check", c->v->id);
    memset(k, 0, sizeof *k);
    k->run = bt_run_single;
    k->gate = c->v->m->tools.gate;
    k->xsave_bytes = fp_xsave_bytes(c);
    c->bt.check = k;
    c->code->alone = alone;
    return 0;
}

void check_close(struct icpu *c)
{
    free(c->bt.check);
    c->bt.check = NULL;
}
