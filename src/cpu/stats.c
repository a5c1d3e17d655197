/* Statistics of vCPUs (stats.h). No state, no locks. */
#include "cpu/stats.h"

#include <string.h>

#include "cpu/engine.h"
#include "cpu/sample.h"

#define COLUMNS 118
#define NAME_WIDTH 10

void stats_open(struct stats *s, FILE *f, bool json)
{
    *s = (struct stats){ .f = f, .json = json };
    if (json)
        fputc('{', f);
}

void stats_close(struct stats *s)
{
    fputs(s->json ? "}\n" : "", s->f);
    fflush(s->f);
}

static void comma(struct stats *s)
{
    if (s->json && s->more)
        fputc(',', s->f);
    s->more = true;
}

void stats_group(struct stats *s, const char *name)
{
    if (s->json) {
        comma(s);
        fprintf(s->f, "\"%s\":{", name);
    } else {
        s->column = (unsigned)fprintf(s->f, "  %-*s", NAME_WIDTH, name);
    }
    s->more = false;
}

void stats_group_end(struct stats *s)
{
    if (s->json)
        fputc('}', s->f);
    else
        fputs(s->more ? "\n" : " -\n", s->f);
    s->more = true;
}

/* "  name value", after a line break if need be. */
static void text(struct stats *s, const char *name, const char *value)
{
    unsigned width = (unsigned)(strlen(name) + strlen(value)) + 3;
    if (s->more)
        fputc(',', s->f);
    if (s->column + width > COLUMNS)
        s->column = (unsigned)fprintf(s->f, "\n  %*s", NAME_WIDTH, "") - 1;
    s->column += (unsigned)fprintf(s->f, " %s %s", name, value) + 1;
    s->more = true;
}

void stats_u64(struct stats *s, const char *name, u64 v)
{
    char value[32];
    if (s->json) {
        comma(s);
        fprintf(s->f, "\"%s\":%llu", name, (unsigned long long)v);
    } else if (v) {
        snprintf(value, sizeof value, "%llu", (unsigned long long)v);
        text(s, name, value);
    }
}

void stats_real(struct stats *s, const char *name, double v, const char *unit)
{
    char value[48];
    if (s->json) {
        comma(s);
        fprintf(s->f, "\"%s-%s\":%.3f", name, strcmp(unit, "%") ? unit : "percent", v);
    } else if (v >= 0.05) {
        snprintf(value, sizeof value, "%.1f %s", v, unit);
        text(s, name, value);
    }
}

void stats_vcpus(struct stats *s)
{
    if (!s->json)
        return;
    comma(s);
    fputs("\"vcpus\":[", s->f);
    s->more = false;
}

void stats_vcpus_end(struct stats *s)
{
    if (s->json)
        fputc(']', s->f);
    s->more = true;
}

static u64 read_once(const u64 *p)
{
    return *(volatile const u64 *)p;
}

static void counters(struct stats *s, const struct vcpu *v)
{
    static const char *const name[GROUPS] = {
        [GROUP_HANDLED] = "handled", [GROUP_TRAPS] = "traps", [GROUP_MEMORY] = "memory", [GROUP_CODE] = "code", [GROUP_EXITS] = "exits",
        [GROUP_CHECK] = "check",
    };
    for (unsigned g = 0; g < GROUPS; g++) {
        stats_group(s, name[g]);
        for (unsigned i = 0; i < COUNTS; i++)
            if (vcpu_count_group(i) == g)
                stats_u64(s, vcpu_count_name(i), read_once(&v->count[i]));
        stats_group_end(s);
    }
}

static void times(struct stats *s, const struct vcpu *v, const struct sampler *sampler)
{
    u64 all = 0, hits[WHERES];
    for (unsigned w = 0; w < WHERES; w++)
        all += hits[w] = sampler_hits(sampler, v->id, w);
    stats_group(s, "time");
    stats_u64(s, "samples", all);
    for (unsigned w = 0; w < WHERES && all; w++)
        stats_real(s, vcpu_where_name(w), (double)hits[w] * 100 / (double)all, "%");
    stats_group_end(s);
    stats_group(s, "exit-time");
    for (unsigned i = 0; i < COUNTS && all; i++)
        if (vcpu_count_group(i) == GROUP_EXITS && i != COUNT_POLLED && i != COUNT_KICKS && i != COUNT_KICKS_AGAIN && i != COUNT_KICK_STEPS)
            stats_real(s, vcpu_count_name(i), (double)sampler_left(sampler, v->id, i) * 100 / (double)all, "%");
    stats_group_end(s);
}

void stats_vcpu(struct stats *s, const struct vcpu *v, const struct sampler *sampler)
{
    bool counted = v->m->tools.insns || v->m->engine->counts_insns;
    if (s->json) {
        comma(s);
        fprintf(s->f, "{\"id\":%u", v->id);
    } else {
        fprintf(s->f, "vcpu %u:%s\n", v->id, counted ? "" : " (instructions are counted with --stats or --verbose only)");
    }
    s->more = true;
    if (counted && s->json)
        stats_u64(s, "instructions", read_once(&v->insns));
    else if (counted)
        fprintf(s->f, "  %-*s %llu\n", NAME_WIDTH, "retired", (unsigned long long)read_once(&v->insns));
    counters(s, v);
    if (sampler)
        times(s, v, sampler);
    if (v->m->engine->stats)
        v->m->engine->stats(v, s);
    if (s->json)
        fputc('}', s->f);
    s->more = true;
}
