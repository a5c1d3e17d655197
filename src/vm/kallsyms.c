/*
 * The tables of kallsyms.h. Names are compressed: each is a length and so many token numbers; a token is a string; the first character of the whole is the symbol's
 * type.
 *
 *     num_syms (4 bytes, aligned to 8), names      next to each other in all versions
 *     token_table, token_index                     256 strings, and where each begins, 16 bits each
 *     offsets, relative_base                       before num_syms up to Linux 6.3, behind token_index since 6.4
 *
 * First the token table is found: the tokens of the ten digits stand for themselves. Then the names: only where num_syms of them are followed by the table of
 * markers, which repeats where every 256th begins.
 */
#define _GNU_SOURCE
#include "vm/kallsyms.h"

#include <string.h>

#define NAMES_MAX (16 * MiB)
#define SYMBOLS_MIN 1000u
#define SYMBOLS_MAX 4000000u
#define NAME_MAX_BYTES 512
#define TOKENS 256
#define EFFORT 500000000ull

struct tables {
    const u8 *buf;
    size_t len;
    size_t token_table, token_index, after_index, names;           /* offsets */
    u32 count;
    size_t offsets;
    u64 effort;                                                    /* left: memory made to be searched for ever is not */
};

/* False: enough was done. */
static bool effort(struct tables *t)
{
    return t->effort && t->effort--;
}

static u32 get32(const struct tables *t, size_t at)
{
    u32 v = 0;
    if (at <= t->len && t->len - at >= 4)
        memcpy(&v, t->buf + at, 4);
    return v;
}

static u64 get64(const struct tables *t, size_t at)
{
    return get32(t, at) | (u64)get32(t, at + 4) << 32;
}

static unsigned index_of(const struct tables *t, unsigned token)
{
    return get32(t, t->token_index + 2 * token) & 0xffff;
}

/* ---- tokens ---- */
/* Does a table of 256 strings with its index begin here? */
static bool tokens_here(struct tables *t, size_t begin)
{
    size_t at = begin;
    unsigned where[TOKENS];
    for (unsigned i = 0; i < TOKENS; i++) {
        const u8 *end = at < t->len ? memchr(t->buf + at, 0, MIN(t->len - at, (size_t)NAME_MAX_BYTES)) : NULL;
        if (!end || end == t->buf + at)
            return false;
        where[i] = (unsigned)(at - begin);
        at = (size_t)(end - t->buf) + 1;
    }
    t->token_table = begin;
    t->token_index = ALIGN_UP(at, 8);
    t->after_index = t->token_index + 2 * TOKENS;
    if (t->after_index > t->len)
        return false;
    for (unsigned i = 0; i < TOKENS; i++)
        if (index_of(t, i) != where[i])
            return false;
    return true;
}

/* From the digits' tokens back to the first one's beginning, 48 tokens before. */
static bool tokens_find(struct tables *t)
{
    static const char digits[] = "0\0001\0002\0003\0004\0005\0006\0007\0008\0009";
    const u8 *p = t->buf, *end = t->buf + t->len, *hit;
    while ((hit = memmem(p, (size_t)(end - p), digits, sizeof digits))) {
        size_t at = (size_t)(hit - t->buf);
        unsigned strings = 0;
        for (size_t i = at; i > 0 && at - i < 48 * NAME_MAX_BYTES && strings <= '0' && effort(t); i--) {
            if (strings == '0' && !(i & 7) && tokens_here(t, i))
                return true;
            strings += !t->buf[i - 1];                             /* the end of the token before */
        }
        p = hit + 1;
    }
    return false;
}

/* ---- names ---- */
/* The length of the name at *at, which moves behind it; 0: it makes no sense. */
static unsigned name_length(const struct tables *t, size_t *at)
{
    unsigned n = *at < t->len ? t->buf[(*at)++] : 0;
    if (n & 0x80 && *at < t->len)                                  /* since 6.1: two bytes */
        n = (n & 0x7f) | (unsigned)t->buf[(*at)++] << 7;
    return n <= NAME_MAX_BYTES ? n : 0;
}

/* Are these count names, and the markers behind them? */
static bool names_here(struct tables *t, size_t begin, u32 count)
{
    size_t at = begin, second = 0;
    for (u32 i = 0; i < count; i++) {
        if (i == 256)
            second = at - begin;
        unsigned n = name_length(t, &at);
        if (!n || at > t->len || n > t->len - at || at - begin > NAMES_MAX || !effort(t))
            return false;
        at += n;
    }
    at = ALIGN_UP(at, 8);
    return get32(t, at) == 0 && get32(t, at + 4) == second;
}

static bool names_find(struct tables *t)
{
    size_t low = t->token_table > NAMES_MAX ? (t->token_table - NAMES_MAX) & ~(size_t)7 : 0;
    for (size_t at = low; at + 8 < t->token_table; at += 8) {
        u32 count = get32(t, at);
        if (count < SYMBOLS_MIN || count > SYMBOLS_MAX)
            continue;
        /* 4 bytes, or 8 with padding, then the names */
        for (unsigned skip = 4; skip <= 8; skip += 4)
            if (names_here(t, at + skip, count) && (skip == 8 ? get32(t, at + 4) == 0 : true)) {
                t->names = at + skip;
                t->count = count;
                return true;
            }
    }
    return false;
}

/* ---- addresses ---- */
static bool kernel_address(u64 a)
{
    return a >= 0xffffffff80000000;
}

/* Negative offsets count down from the base, others are absolute: per-processor symbols (CONFIG_KALLSYMS_ABSOLUTE_PERCPU). Without it all count up. */
static u64 address(const struct tables *t, u64 base, u32 i, bool up)
{
    s32 off = (s32)get32(t, t->offsets + 4 * (size_t)i);
    return up ? base + (u32)off : off < 0 ? base - 1 - (u64)(s64)off : (u32)off;
}

/* Function addresses are mostly ascending in the table (it is sorted), and in the kernel's range. */
static bool offsets_fit(const struct tables *t, u64 base, bool up)
{
    u64 last = 0;
    u32 good = 0, n = MIN(t->count, 4096u), first = t->count / 2 > n ? t->count / 2 - n : 0;
    for (u32 i = first; i < first + n && i < t->count; i++) {
        u64 a = address(t, base, i, up);
        good += kernel_address(a) && a >= last;
        last = a;
    }
    return good > n - n / 16;
}

static bool offsets_find(struct tables *t, size_t num_syms_at, u64 *base, bool *up)
{
    size_t bytes = ALIGN_UP(4 * (size_t)t->count, 8);
    const size_t places[2][2] = {                                  /* offsets, relative_base */
        { num_syms_at - 8 - bytes, num_syms_at - 8 },
        { ALIGN_UP(t->after_index, 8), ALIGN_UP(t->after_index, 8) + bytes },
    };
    for (unsigned i = 0; i < 2; i++) {
        if ((i == 0 && num_syms_at < 8 + bytes) || places[i][1] > t->len - 8 || t->len < 8)
            continue;
        t->offsets = places[i][0];
        *base = get64(t, places[i][1]);
        if (!kernel_address(*base))
            continue;
        for (unsigned way = 0; way < 2; way++)
            if (offsets_fit(t, *base, way)) {
                *up = way;
                return true;
            }
    }
    return false;
}

/* ---- all of them ---- */
static void expand(const struct tables *t, size_t at, unsigned n, char name[NAME_MAX_BYTES + 1])
{
    unsigned used = 0;
    for (unsigned i = 0; i < n; i++)
        for (size_t c = t->token_table + index_of(t, t->buf[at + i]); c < t->len && t->buf[c] && used < NAME_MAX_BYTES; c++)
            name[used++] = (char)(t->buf[c] >= 0x21 && t->buf[c] < 0x7f ? t->buf[c] : '?');
    name[used] = 0;
}

long kallsyms_find(struct symbols *s, const u8 *buf, size_t len)
{
    struct tables t = { .buf = buf, .len = len, .effort = EFFORT };
    char name[NAME_MAX_BYTES + 1];
    u64 base;
    bool up;
    long added = 0;
    if (!tokens_find(&t) || !names_find(&t) || !offsets_find(&t, (t.names - 4) & ~(size_t)7, &base, &up))
        return 0;
    size_t at = t.names;
    for (u32 i = 0; i < t.count; i++) {
        unsigned n = name_length(&t, &at);
        expand(&t, at, n, name);
        at += n;
        u64 a = address(&t, base, i, up);
        if (name[0] && strchr("tTwW", name[0]) && kernel_address(a) && !symbols_add(s, a, name + 1))
            added++;
    }
    return added;
}
