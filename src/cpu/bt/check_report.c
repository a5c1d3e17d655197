/* What is told of a difference between translator and interp (check.h): where it begins, the block, both states. */
#include <errno.h>
#include <stdarg.h>
#include <string.h>

#include "base/err.h"
#include "cpu/bt/check.h"
#include "cpu/interp/tlb.h"

#define X86_PLAIN offsetof(struct x86, xsave)
#define BYTES_SHOWN 64

static void say(const struct icpu *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(const struct icpu *c, const char *fmt, ...)
{
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    log_msg(c->v->m->log, LOG_ERROR, "check: %s", line);
}

/* ---- where it begins ---- */
/* From now on blocks of at most n instructions, and nothing of what is cached. */
static void limit_blocks(struct icpu *c, unsigned n)
{
    c->code->limit = (u8)n;
    code_flush_later(c);
}

/* The first of n instructions after which the states differ, or n: none alone. The states are then those after it, memory is the translator's. */
static unsigned find_first(struct icpu *c, struct check *k, unsigned n)
{
    for (unsigned i = 1; i <= n; i++) {
        check_restore(c, k);
        limit_blocks(c, i);
        if (!check_compare(c, k))
            return i - 1;
    }
    return n;
}

/* ---- the block ---- */
static void say_block(const struct icpu *c, const struct check *k, unsigned bad)
{
    ZydisFormatter f;
    unsigned i = 0;
    ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
    for (unsigned off = 0; off < k->len; i++) {
        ZydisDecodedInstruction z;
        ZydisDecodedOperand o[ZYDIS_MAX_OPERAND_COUNT];
        char text[128] = "(undefined)", hex[2 * 15 + 1] = "";
        unsigned n = k->len - off;
        if (!ZYAN_FAILED(ZydisDecoderDecodeFull(&c->code->decoder[c->mode], k->bytes + off, n, &z, o))) {
            n = z.length;
            ZydisFormatterFormatInstruction(&f, &z, o, z.operand_count_visible, text, sizeof text, k->before.rip + off, NULL);
        }
        for (unsigned j = 0; j < MIN(n, 15u); j++)
            snprintf(hex + 2 * j, 3, "%02x", k->bytes[off + j]);
        say(c, "%s %016llx  %-30s %s", i == bad ? "->" : "  ", (unsigned long long)(k->before.rip + off), hex, text);
        off += n;
    }
}

/* ---- states ---- */
static char *print_x86(struct x86 *x, const struct check_state *s)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    memcpy(x, &s->x, sizeof *x);
    memcpy(x->gpr, s->r, sizeof s->r);
    x->rip = s->rip;
    x->rflags = s->rflags;
    if (!f)
        return NULL;
    x86_print(x, f);
    fclose(f);
    return text;
}

/* Lines of a and b that differ; all of a where b is NULL. */
static void say_lines(const struct icpu *c, char *a, char *b)
{
    char *save_a = NULL, *save_b = NULL;
    char *la = a ? strtok_r(a, "\n", &save_a) : NULL, *lb = b ? strtok_r(b, "\n", &save_b) : NULL;
    while (la) {
        if (!b)
            say(c, "  %s", la);
        else if (lb && strcmp(la, lb))
            say(c, "  interp: %s", la), say(c, "  bt:     %s", lb);
        la = strtok_r(NULL, "\n", &save_a);
        lb = lb ? strtok_r(NULL, "\n", &save_b) : NULL;
    }
}

static void say_registers(const struct icpu *c, const struct check_state *s, const struct check_state *other)
{
    struct x86 *x = aligned_alloc(64, ALIGN_UP(sizeof *x, 64));
    if (!x)
        return;
    char *a = print_x86(x, s), *b = other ? print_x86(x, other) : NULL;
    say_lines(c, a, b);
    free(a);
    free(b);
    free(x);
}

static void say_before(const struct icpu *c, const struct check *k)
{
    say(c, "before the block:");
    say_registers(c, &k->before, NULL);
}

/* Differences that no line shows: offsets in struct x86, and parts of the XSAVE image (SDM vol. 1 13.4). */
static void say_offsets(const struct icpu *c, const struct check *k)
{
    const u8 *a = (const u8 *)&k->interp.x, *b = (const u8 *)&k->bt.x;
    size_t n = X86_PLAIN + (k->fp ? k->xsave_bytes : 0);
    unsigned shown = 0;
    if (k->interp.insns != k->bt.insns)
        say(c, "  instructions completed: interp %llu, bt %llu", (unsigned long long)(k->interp.insns - k->before.insns),
            (unsigned long long)(k->bt.insns - k->before.insns));
    for (size_t i = 0; i < n && shown < BYTES_SHOWN; i++) {
        if (a[i] == b[i])
            continue;
        size_t x = i - X86_PLAIN;
        if (i < X86_PLAIN)
            say(c, "  struct x86 +0x%zx: interp %02x, bt %02x", i, a[i], b[i]);
        else if (x >= 160 && x < 416)
            say(c, "  xmm%zu byte %zu: interp %02x, bt %02x", (x - 160) / 16, x % 16, a[i], b[i]);
        else
            say(c, "  XSAVE image +0x%zx: interp %02x, bt %02x", x, a[i], b[i]);
        shown++;
    }
}

static u64 gpa_of(const struct ram *r, const u8 *host)
{
    for (unsigned i = 0; i < r->runs; i++)
        if (r->run[i].hva && host >= r->run[i].hva && host < r->run[i].hva + r->run[i].size)
            return r->run[i].gpa + (u64)(host - r->run[i].hva);
    return ~0ull;
}

static void say_memory(const struct icpu *c, const struct check *k)
{
    unsigned shown = 0;
    for (unsigned i = 0; i < k->last->pages; i++)
        for (unsigned j = 0; j < PAGE_SIZE && shown < BYTES_SHOWN; j++)
            if (k->page[i].host[j] != k->page[i].want[j]) {
                say(c, "  memory at guest-physical 0x%llx: interp %02x, bt %02x", (unsigned long long)gpa_of(c->v->m->ram, k->page[i].host) + j,
                    k->page[i].want[j], k->page[i].host[j]);
                shown++;
            }
}

static void say_differences(const struct icpu *c, const struct check *k)
{
    say_registers(c, &k->interp, &k->bt);
    say_offsets(c, k);
    say_memory(c, k);
}

void check_report(struct icpu *c, struct check *k)
{
    say(c, "vCPU %u: interp and bt differ after %llu blocks and %llu instructions, at 0x%llx:", c->v->id,
        (unsigned long long)c->v->count[COUNT_CHECK_BLOCKS], (unsigned long long)k->before.insns, (unsigned long long)k->before.rip);
    say(c, "after the block:");
    say_differences(c, k);
    check_restore(c, k);
    struct block *b = code_find(c);
    unsigned n = b ? b->n : 1, first = find_first(c, k, n);
    if (first < n) {
        say(c, "after the first instruction that differs (->):");
        say_differences(c, k);
    } else {
        say(c, "shorter parts of the block do not differ");
    }
    say_block(c, k, first);
    say_before(c, k);
    err(-EIO, "--check: interp and bt differ at 0x%llx (the lines above tell how)", (unsigned long long)k->before.rip);
    c->bt.failed = true;
}
