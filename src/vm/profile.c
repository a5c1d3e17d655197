/*
 * The profile's text (profile.h). Kernel addresses are told by function, the rest by page: user programs have no names here, and the same page of two of them is
 * one line.
 */
#include "vm/profile.h"

#include <errno.h>
#include <string.h>

#include "base/symbols.h"
#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/vcpu.h"
#include "mem/mmu.h"
#include "vm/kallsyms.h"

#define KERNEL_BYTES (128 * MiB)                                   /* of linear memory around the kernel's code that are looked through */
#define KERNEL_LOW 0xffffffff80000000ull
#define KERNEL_HIGH 0xffffffffc0000000ull                          /* modules begin there (Documentation/arch/x86/x86_64/mm.rst) */
#define LINES_MAX 100u

struct line {
    char name[64];
    u64 n, direct;
};
struct lines {
    struct line *line;
    size_t n, room;
    u64 all, direct;
};

/* ---- the guest's kernel ---- */
/* An address in its code, or 0: from a sample, or where a vCPU is. */
static u64 kernel_code(const struct machine *m, const struct sampler *s)
{
    const struct sampled_address *e;
    for (unsigned i = 0; i < m->vcpus; i++)
        for (unsigned n = 0; (e = sampler_address(s, i, SAMPLED_GUEST, n)); n++)
            if (e->n && e->addr >= KERNEL_LOW && e->addr < KERNEL_HIGH)
                return e->addr;
    return 0;
}

static long kernel_symbols(struct machine *m, u64 code, struct symbols *names)
{
    struct x86 *x = aligned_alloc(64, ALIGN_UP(sizeof *x, 64));
    u8 *buf = calloc(1, KERNEL_BYTES);
    u64 base = MAX(code & ~(2 * MiB - 1), KERNEL_LOW + KERNEL_BYTES / 4) - KERNEL_BYTES / 4, gpa;
    long n = 0;
    if (x && buf && !vcpu_get(m->vcpu[0], x)) {
        struct mmu_ctx ctx = { .cr0 = x->cr0, .cr3 = x->cr3, .cr4 = x->cr4, .efer = x->efer, .phys_bits = (u8)cpuid_phys_bits(m->cpuid) };
        for (u64 off = 0; off < KERNEL_BYTES; off += PAGE_SIZE)
            if (!mmu_peek(m->ram, &ctx, base + off, &gpa))
                ram_read(m->ram, gpa, buf + off, PAGE_SIZE);
        n = kallsyms_find(names, buf, KERNEL_BYTES);
    }
    free(buf);
    free(x);
    return n;
}

/* ---- lines ---- */
static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct line *)a)->name, ((const struct line *)b)->name);
}

static int by_count(const void *a, const void *b)
{
    const struct line *x = a, *y = b;
    return x->n != y->n ? (x->n < y->n ? 1 : -1) : strcmp(x->name, y->name);
}

static void line_add(struct lines *l, const char *name, u64 n, u64 direct)
{
    if (l->n == l->room) {
        struct line *more = realloc(l->line, (2 * l->room + 1024) * sizeof *more);
        if (!more)
            return;
        l->line = more;
        l->room = 2 * l->room + 1024;
    }
    l->line[l->n] = (struct line){ .n = n, .direct = direct };
    snprintf(l->line[l->n++].name, sizeof l->line[0].name, "%s", name);
    l->all += n;
    l->direct += direct;
}

/* Lines of the same name become one. */
static void lines_join(struct lines *l)
{
    size_t kept = 0;
    if (l->n)
        qsort(l->line, l->n, sizeof *l->line, by_name);
    for (size_t i = 0; i < l->n; i++) {
        if (kept && !strcmp(l->line[kept - 1].name, l->line[i].name)) {
            l->line[kept - 1].n += l->line[i].n;
            l->line[kept - 1].direct += l->line[i].direct;
        } else {
            l->line[kept++] = l->line[i];
        }
    }
    l->n = kept;
    if (l->n)
        qsort(l->line, l->n, sizeof *l->line, by_count);
}

static void guest_name(struct symbols *kernel, u64 addr, char name[64])
{
    u64 off;
    const char *symbol = addr >= KERNEL_LOW ? symbols_find(kernel, addr, &off) : NULL;
    if (symbol && off < MiB)
        snprintf(name, 64, "%.60s", symbol);
    else
        snprintf(name, 64, "%s page 0x%llx", addr >> 63 ? "kernel" : "user", (unsigned long long)(addr & PAGE_MASK));
}

static void monitor_name(struct symbols *self, u64 addr, char name[64])
{
    u64 off;
    const char *symbol = symbols_find(self, addr, &off);
    snprintf(name, 64, "%.60s", symbol && (off < MiB || *symbol == '[') ? symbol : "(no name)");
}

static void collect(const struct machine *m, const struct sampler *s, enum sampled what, struct symbols *names, struct lines *l)
{
    const struct sampled_address *e;
    char name[64];
    for (unsigned i = 0; i < m->vcpus; i++)
        for (unsigned n = 0; (e = sampler_address(s, i, what, n)); n++) {
            if (!e->n)
                continue;
            (what == SAMPLED_GUEST ? guest_name : monitor_name)(names, e->addr, name);
            line_add(l, name, e->n, e->direct);
        }
    lines_join(l);
}

/* ---- text ---- */
static double percent(u64 part, u64 all)
{
    return all ? (double)part * 100 / (double)all : 0;
}

static void print_where(const struct machine *m, const struct sampler *s, FILE *f)
{
    u64 hits[WHERES] = { 0 }, ran[WHERES][2] = { { 0 } }, all = 0;
    for (unsigned i = 0; i < m->vcpus; i++)
        for (unsigned w = 0; w < WHERES; w++) {
            hits[w] += sampler_hits(s, i, w);
            all += sampler_hits(s, i, w);
            ran[w][0] += sampler_ran(s, i, w, false);
            ran[w][1] += sampler_ran(s, i, w, true);
        }
    fprintf(f, "\nWhere the time went, of %llu samples; and how much of that for the guest's kernel:\n", (unsigned long long)all);
    for (unsigned w = 0; w < WHERES; w++) {
        if (!hits[w])
            continue;
        fprintf(f, "%6.2f %%  %8llu  ", percent(hits[w], all), (unsigned long long)hits[w]);
        if (ran[w][0] + ran[w][1])
            fprintf(f, "%3.0f %%  %s\n", percent(ran[w][1], ran[w][0] + ran[w][1]), vcpu_where_name(w));
        else
            fprintf(f, "       %s\n", vcpu_where_name(w));
    }
}

static void print_guest(const struct lines *l, FILE *f)
{
    fprintf(f, "\nThe guest's code, of %llu samples that ran", (unsigned long long)l->all);
    fputs(l->direct ? "; and how much of that was its own code (the rest is the monitor's work for it):\n" : ":\n", f);
    for (size_t i = 0; i < MIN(l->n, (size_t)LINES_MAX); i++) {
        fprintf(f, "%6.2f %%  %8llu  ", percent(l->line[i].n, l->all), (unsigned long long)l->line[i].n);
        if (l->direct)
            fprintf(f, "%3.0f %%  ", percent(l->line[i].direct, l->line[i].n));
        fprintf(f, "%s\n", l->line[i].name);
    }
}

static void print_monitor(const struct lines *l, u64 all, FILE *f)
{
    fprintf(f, "\nThe monitor's own code, of the same samples (time in the host's kernel counts where it was entered):\n");
    for (size_t i = 0; i < MIN(l->n, (size_t)LINES_MAX); i++)
        fprintf(f, "%6.2f %%  %8llu  %s\n", percent(l->line[i].n, all), (unsigned long long)l->line[i].n, l->line[i].name);
}

int profile_print(struct machine *m, const struct sampler *s, const char *map, FILE *f)
{
    struct symbols kernel = { 0 }, self = { 0 };
    struct lines guest = { 0 }, monitor = { 0 };
    u64 code = kernel_code(m, s);
    long n = 0;
    if (map && symbols_elf(&kernel, map, 0) < 0)
        n = symbols_map(&kernel, map);
    else if (!map && code)
        kernel_symbols(m, code, &kernel);
    if (n < 0) {
        symbols_free(&kernel);
        return err(-EIO, "--profile: cannot read the symbols in %s: %s", map, strerror((int)-n));
    }
    symbols_self(&self);
    collect(m, s, SAMPLED_GUEST, &kernel, &guest);
    collect(m, s, SAMPLED_MONITOR, &self, &monitor);
    fprintf(f, "doppel profile: engine %s, %u vCPU%s, %.3f s of guest time, %d samples a second; %zu symbols of the guest's kernel\n", m->engine->name, m->vcpus,
            m->vcpus == 1 ? "" : "s", (double)clock_ns(m->clock) / 1e9, SAMPLE_HZ, kernel.n);
    if (sampler_lost(s))
        fprintf(f, "%llu samples had no room\n", (unsigned long long)sampler_lost(s));
    print_where(m, s, f);
    print_guest(&guest, f);
    print_monitor(&monitor, guest.all, f);
    fflush(f);
    free(guest.line);
    free(monitor.line);
    symbols_free(&kernel);
    symbols_free(&self);
    return 0;
}
