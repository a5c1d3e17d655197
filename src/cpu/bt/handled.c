/*
 * Handlers called by translated code, by mnemonic: those of instructions without host code of their own ("handlers"), and those of instructions that have it
 * but touched what it cannot do: a page that the software TLB does not hold, a device, an exception ("handlers-missed").
 *
 * Owned by the vCPU's thread; statistics read single words.
 */
#include "cpu/bt/handled.h"

#include "cpu/stats.h"

#define MNEMONICS (ZYDIS_MNEMONIC_MAX_VALUE + 1u)
#define SEEN 4096u
#define ROWS 24

struct handled {
    u64 needed[MNEMONICS], missed[MNEMONICS];
    struct {
        const struct op *op;
        op_fn fn;                                                  /* the op's place may have become another's */
        u16 mnemonic;
    } seen[SEEN];
};

struct handled *handled_open(void)
{
    return calloc(1, sizeof(struct handled));
}

void handled_close(struct handled *h)
{
    free(h);
}

static u16 mnemonic_of(struct icpu *c, struct handled *h, const struct tb *tb, const struct op *op)
{
    unsigned n = ((uintptr_t)op / sizeof *op) % SEEN;
    ZydisDecodedInstruction z = { .mnemonic = ZYDIS_MNEMONIC_INVALID };
    if (h->seen[n].op == op && h->seen[n].fn == op->fn)
        return h->seen[n].mnemonic;
    ZydisDecoderDecodeInstruction(&c->code->decoder[IMODE_LONG64], NULL, tb->b->bytes + op->off, op->len, &z);
    h->seen[n].op = op;
    h->seen[n].fn = op->fn;
    h->seen[n].mnemonic = (u16)z.mnemonic;
    return (u16)z.mnemonic;
}

void handled_count(struct icpu *c, struct handled *h, const struct tb *tb, const struct op *op)
{
    u16 m = mnemonic_of(c, h, tb, op);
    if (tb->handled & BIT(op - tb->b->op))
        h->needed[m]++;
    else
        h->missed[m]++;
}

/* The most frequent ones; JSON has all. */
static void group(struct stats *s, const char *name, const u64 *count)
{
    u64 last = ~0ull;
    unsigned last_m = 0;
    stats_group(s, name);
    for (unsigned row = 0; row < (s->json ? MNEMONICS : ROWS); row++) {
        unsigned best = MNEMONICS;
        for (unsigned m = 0; m < MNEMONICS; m++) {
            bool below = count[m] < last || (count[m] == last && m > last_m);
            if (below && count[m] && (best == MNEMONICS || count[m] > count[best]))
                best = m;
        }
        if (best == MNEMONICS)
            break;
        last = count[best];
        last_m = best;
        stats_u64(s, ZydisMnemonicGetString((ZydisMnemonic)best), last);
    }
    stats_group_end(s);
}

void handled_report(const struct handled *h, struct stats *s)
{
    if (!h)
        return;
    group(s, "handlers", h->needed);
    group(s, "handlers-missed", h->missed);
}
