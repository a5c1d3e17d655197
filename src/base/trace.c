/* --trace: names of the kinds, and the line. One fwrite() per line, so that stdio's lock keeps lines whole. */
#include "base/trace.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

#include "base/err.h"

static const struct {
    const char *name;
    u32 bit;
} kinds[] = {
    { "exits", TRACE_EXITS }, { "faults", TRACE_FAULTS }, { "interrupts", TRACE_IRQ }, { "msr", TRACE_MSR },
    { "pio", TRACE_PIO },     { "mmio", TRACE_MMIO },     { "cr3", TRACE_CR3 },        { "insn", TRACE_INSN },
};

static u32 kind_bit(const char *word, size_t len)
{
    u32 all = 0;

    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
        if (strlen(kinds[i].name) == len && !memcmp(kinds[i].name, word, len))
            return kinds[i].bit;
        all |= kinds[i].bit;
    }
    return len == 3 && !memcmp(word, "all", 3) ? all : 0;
}

int trace_parse(const char *list, u32 *mask)
{
    u32 m = 0;

    for (const char *word = list; *word;) {
        size_t len = strcspn(word, ",");
        u32 bit = kind_bit(word, len);

        if (!bit)
            return err(-EINVAL, "--trace: \"%.*s\" is no kind of event; choose from exits, faults, interrupts, msr, pio, mmio, cr3, insn, all",
                       (int)MIN(len, 64), word);
        m |= bit;
        word += len;
        if (*word == ',')
            word++;
    }
    *mask = m;
    return 0;
}

void trace_line(const struct trace *t, enum trace_kind kind, int vcpu, const char *fmt, ...)
{
    u64 ns = t->clock ? clock_ns(t->clock) : 0;
    const char *name = "?";
    char line[512], who[16] = "loop";
    va_list ap;
    int n, m;

    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++)
        if (kinds[i].bit == (u32)kind)
            name = kinds[i].name;
    if (vcpu >= 0)
        snprintf(who, sizeof(who), "cpu%d", vcpu);
    n = snprintf(line, sizeof(line), "%6llu.%09llu %-5s %-10s ", (unsigned long long)(ns / 1000000000), (unsigned long long)(ns % 1000000000), who, name);
    va_start(ap, fmt);
    m = vsnprintf(line + n, sizeof(line) - n, fmt, ap);
    va_end(ap);
    n = MIN(n + MAX(m, 0), (int)sizeof(line) - 2);
    line[n++] = '\n';
    fwrite(line, 1, n, t->file ? t->file : stderr);
}
