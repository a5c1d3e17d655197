/*
 * For tests of cpu/bt/shadow: a vCPU with page tables built by hand in a small RAM whose frames carry their number; host addresses are probed with a handler
 * for SIGSEGV in place, as translated code would meet them.
 */
#pragma once

#include <signal.h>
#include <stdio.h>

#include "one_vcpu.h"
#include "cpu/bt/shadow_map.h"

#define RAM_SIZE (16 * MiB)
#define HIGH (32 * MiB)              /* a second run; between them is nothing: devices */
#define HIGH_SIZE (6 * MiB)
#define HOLE (RAM_SIZE + 5 * PAGE_SIZE)
#define DATA (4 * MiB)               /* frames that tests map; tables are below */
enum { P = 1, W = 2, U = 4, A = 32, D = 64, PS = 128, G = 256 };
#define NX BIT(63)
#define USER 0x00005555aa400000ull   /* slot 170, at a boundary of 2 MiB */
#define KERNEL 0xffff888000400000ull /* slot 273 */
#define TEXT 0xffffffff81000000ull   /* slot 511 */
#define KEEP_OUT 0xdead              /* what probe() returns for "not reachable" */

struct fixture {
    struct machine m;
    struct vcpu v;
    struct ram ram;
    struct icpu *c;
    bool armed;                      /* our handler of signals is in place, not cmocka's */
    u64 next;                        /* free frame for tables */
    u8 code[(HIGH + HIGH_SIZE) / PAGE_SIZE];
};

static inline u64 *entry_at(struct fixture *f, u64 gpa)
{
    return (u64 *)(void *)ram_hva(&f->ram, gpa);
}

static inline u64 new_table(struct fixture *f)
{
    u64 t = f->next;
    f->next += PAGE_SIZE;
    assert_true(f->next <= DATA);
    memset(entry_at(f, t), 0, PAGE_SIZE);
    return t;
}

/* Guest-physical address of the entry for la at a level, below root; tables in between are made with all rights. */
static inline u64 slot_of(struct fixture *f, u64 root, u64 la, unsigned level)
{
    u64 table = root;
    for (unsigned l = 4; l > level; l--) {
        u64 *e = entry_at(f, table + (la >> (12 + 9 * (l - 1)) & 511) * 8);
        if (!(*e & P))
            *e = new_table(f) | P | W | U | A;
        table = *e & PTE_ADDR;
    }
    return table + (la >> (12 + 9 * (level - 1)) & 511) * 8;
}

static inline void put(struct fixture *f, u64 la, unsigned level, u64 e)
{
    *entry_at(f, slot_of(f, f->v.x.cr3, la, level)) = e;
}

static inline u64 get(struct fixture *f, u64 la, unsigned level)
{
    return *entry_at(f, slot_of(f, f->v.x.cr3, la, level));
}

/* ---- probing ---- */
static sigjmp_buf landing;

static inline void landed(int sig)
{
    siglongjmp(landing, sig);
}

static inline void arm(struct fixture *f)
{
    struct sigaction sa = { .sa_handler = landed, .sa_flags = SA_NODEFER };
    if (f->armed)
        return;
    f->armed = true;
    sigaction(SIGSEGV, &sa, NULL);
    sigaction(SIGBUS, &sa, NULL);
}

/* The 8 bytes at la's page beginning + 8 (the frame's stamp), or KEEP_OUT. A write stores back what is there. */
static inline u64 probe_at(struct fixture *f, enum tlb_view_id view, u64 la, bool write)
{
    u64 host = la + f->c->bt.delta[view][la >> 39 & 511], val;
    arm(f);
    if (sigsetjmp(landing, 1))
        return KEEP_OUT;
    if (write)
        asm volatile("xor %0, %0; lock xadd %0, (%1)" : "=&r"(val) : "r"(host) : "memory", "cc");
    else
        asm volatile("mov (%1), %0" : "=r"(val) : "r"(host) : "memory");
    return val;
}

static inline u64 probe(struct fixture *f, enum tlb_view_id view, u64 la, bool write)
{
    return probe_at(f, view, (la & PAGE_MASK) + 8, write);
}

static inline u64 stamp(u64 gpa)
{
    return 0x57a3000000000000ull | gpa >> PAGE_SHIFT;
}

/* As translated code does it: tries, fills, tries again. The stamp, or one of these. */
enum { FAULTED = 1, SLOW = 2 };
static inline u64 reach(struct fixture *f, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error)
{
    u32 unused;
    for (unsigned tries = 0; tries < 4; tries++) {
        u64 val = probe(f, view, la, access == MMU_WRITE);
        if (val != KEEP_OUT)
            return val;
        enum shadow_result r = shadow_fill(f->c, view, la, access, error ? error : &unused);
        if (r != SHADOW_FILLED)
            return r == SHADOW_FAULT ? FAULTED : SLOW;
    }
    fail_msg("0x%llx: filled, and still not there", (unsigned long long)la);
    return 0;
}

static inline u64 reads(struct fixture *f, enum tlb_view_id view, u64 la)
{
    return reach(f, view, la, MMU_READ, NULL);
}

static inline u64 writes(struct fixture *f, enum tlb_view_id view, u64 la)
{
    return reach(f, view, la, MMU_WRITE, NULL);
}

/* ---- fixture ---- */
static inline bool is_code(const struct icpu *c, u64 gpa)
{
    return container_of(c->v, struct fixture, v)->code[gpa >> PAGE_SHIFT];
}

static inline struct shadow_stats stats(struct fixture *f)
{
    struct shadow_stats st;
    shadow_stats(f->c, &st);
    return st;
}

static inline void context(struct fixture *f, u64 cr3, unsigned ctx)
{
    f->v.x.cr3 = cr3;
    shadow_context(f->c, ctx);
}

static inline int setup(void **state)
{
    struct fixture *f = fixture_new(sizeof *f);
    ram_make(&f->ram, RAM_SIZE);
    assert_int_equal(ram_add(&f->ram, HIGH, HIGH_SIZE), 0);
    f->c = one_vcpu_open(&f->m, &f->v, &f->ram);
    for (unsigned i = 0; i < f->ram.runs; i++)
        for (u64 gpa = f->ram.run[i].gpa; gpa < f->ram.run[i].gpa + f->ram.run[i].size; gpa += PAGE_SIZE)
            *entry_at(f, gpa + 8) = stamp(gpa);
    f->next = 0x1000;
    struct x86 *x = &f->v.x;
    x86_reset(x, true);
    x->cr0 = CR0_PE | CR0_PG | CR0_WP;
    x->cr4 = CR4_PAE | CR4_PGE | CR4_SMAP | CR4_SMEP;
    x->efer = EFER_LME | EFER_LMA | EFER_NXE;
    x->cr3 = new_table(f);
    assert_int_equal(shadow_open(f->c, is_code), 0);
    *state = f;
    return 0;
}

static inline int teardown(void **state)
{
    struct fixture *f = *state;
    shadow_close(f->c);
    one_vcpu_close(&f->m, &f->v, &f->ram);
    free(f);
    return 0;
}

/* In the windows, as the host counts. */
static inline unsigned host_mappings(struct fixture *f)
{
    unsigned n = 0;
    char line[512];
    FILE *maps = fopen("/proc/self/maps", "re");
    assert_non_null(maps);
    while (fgets(line, sizeof line, maps)) {
        unsigned long long from, to;
        assert_int_equal(sscanf(line, "%llx-%llx", &from, &to), 2);
        for (unsigned i = 0; i < SHADOW_WINDOWS; i++) {
            const struct shadow_window *w = &f->c->bt.shadow->window[i];
            if (w->taken && from >= w->reserved && from < w->base + BIT(39) && strstr(line, "doppel-ram"))
                n++;
        }
    }
    fclose(maps);
    return n;
}
