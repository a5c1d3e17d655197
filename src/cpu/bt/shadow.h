/*
 * The windowed shadow: guest memory as translated code reaches it through the host's MMU, without comparing or branching.
 *
 * Every PML4 slot of the guest (512 GiB of linear addresses) that is in use has a window of the same size in the monitor's address space, and
 *
 *     host address = linear address + icpu.bt.delta[view][bits 47..39 of the linear address]
 *
 * A slot that the view may not use has a delta which makes every address of it, canonical or not, one that the host's processor refuses; so has a non-canonical
 * address in a slot that is open. A window holds pages of one kind: a context's user pages (U=1, with the rights that CPL 3 has), or supervisor pages (U=0; in the
 * lower half those of one context). So whole slots are isolated by the address alone. Guards of more than 2 GiB at each side let one translated base register serve all its displacements.
 *
 *                    lower half                        upper half
 *     VIEW_SUPER     supervisor pages of the context   supervisor pages
 *     ..._OPEN       user pages, else supervisor pages supervisor pages
 *     VIEW_USER      user pages of the context         closed
 *
 * Whatever does not fit is not in a window but SHADOW_SLOW, and the interpreter's handler makes the access: devices, user pages in the upper half and
 * supervisor pages in a slot of the lower half that has user pages, writes with CR0.WP clear to what is read-only, pages with a protection key, writes to pages with translated code.
 *
 * The shadow is a TLB, not a copy of the page tables. Pages appear after a walk (shadow_fill), read-only until the leaf's D bit is set, with neighbours that a
 * TLB might hold as well: present and accessed leaves. It holds nothing longer than the processor's TLB may (SDM vol. 3A 4.10.4); a flush
 * does not drop what is held but compares it with the guest's tables, keeps what is as it was, and takes away the rest before it returns.
 * Contexts that are not current are compared when they become current. MOV CR3 compares the supervisor's pages that are not global.
 *
 * Bounds: windows per vCPU, regions of 2 MiB, tables of cells, host mappings (vm.max_map_count is one number for the whole process); what was not used for
 * longest is emptied.
 *
 * Costs on the machine of DESIGN.md's figures: see there. Owned by the vCPU's thread, without locks, except that shadow_stats() may be read by others, roughly.
 * Nothing here calls libc or uses vector registers, but shadow_open() and shadow_close(); shadow_fill() may run in a handler of SIGSEGV.
 */
#pragma once

#include "cpu/interp/tlb.h"

#define SHADOW_CONTEXTS 16u
#define SHADOW_SLOTS 512u

struct shadow;
struct stats;

enum shadow_result {
    SHADOW_FILLED,                                                 /* try again */
    SHADOW_FAULT,                                                  /* the guest's page fault, code in *error */
    SHADOW_SLOW,                                                   /* the interpreter's handler has to make this access */
};

/* All counts since the vCPU was opened. */
struct shadow_stats {
    u64 fills, pages, upgrades, slow, faults, expected;            /* results of shadow_fill(); pages mapped; pages made writable; fills without a fault */
    u64 flushes, page_flushes, switches, compared, dropped, downgraded, moved; /* compared: pages looked at; taken away; made read-only; with another frame */
    u64 protects, evictions, trims, refused, resets;                /* trims: of the window that was to be filled */
    u64 left, returns;                                             /* --mmu auto: address spaces that went to the software TLB since the shadow did not pay; that came (back) */
    u64 ahead, ahead_cycles;                                       /* pieces of 64 KiB that the host was had to map before anybody missed them */
    u64 fill_cycles, flush_cycles;                                 /* without these */
    u32 windows, regions, mapped, mappings;                        /* now: windows in use, regions, pages, host mappings at most */
};

/* What decides between the shadow and the software TLB for an address space. */
struct shadow_score {
    u64 run, cost, fills;                                          /* cycles that it ran, that the shadow cost it; pages that it had filled; decaying */
    u64 again;                                                     /* misses of the software TLB that the shadow would not have had, as far as can be told */
    u64 wait;                                                      /* cycles that it has to run on the software TLB before it is tried again */
    u64 spare;                                                     /* cycles that mapping ahead may cost it: a share of all that it ran */
    unsigned runs;                                                 /* long ones filled since it came to the shadow, as far as they matter */
    bool pays;
};

/* The delta of a slot that is not open. 0x4000c00000000000 is as far from canonical addresses as can be; bit 47 is set there, so that an address which
 * is itself non-canonical comes out as a non-canonical one or in the middle of the host kernel's half. */
static inline u64 shadow_slot_base(unsigned slot)
{
    return (u64)((s64)((u64)slot << 55) >> 16);
}
static inline u64 shadow_closed(unsigned slot)
{
    return 0x4000c00000000000ull - shadow_slot_base(slot);
}

/*
 * Makes the shadow of a vCPU and closes all slots. 0, or -ENOMEM with err() where the host gives no address space (RLIMIT_AS): use the software TLB then.
 * is_code: does the frame hold translated code, so that writes must be seen? codepage_is_code(); NULL: none does.
 */
int shadow_open(struct icpu *c, bool (*is_code)(const struct icpu *c, u64 gpa));
void shadow_close(struct icpu *c);

/* Are windows right for data accesses in the present state? To be asked again when mode, CR0, CR4, CPL, AC or breakpoints have changed (tlb_views()). */
bool shadow_possible(const struct icpu *c);

/*
 * Address space ctx is the current one; after MOV CR3, with the new CR3 in place, also when ctx stays the same. Like all functions below it may
 * change deltas; icpu.bt.delta_changes counts that: whoever keeps a delta (a biased stack pointer, a translated base) looks there.
 */
void shadow_context(struct icpu *c, unsigned ctx);

/* After a fault of the host at the address that the guest's la has in this view. */
enum shadow_result shadow_fill(struct icpu *c, enum tlb_view_id view, u64 la, enum mmu_access access, u32 *error);

/*
 * SHADOW_FAULT leaves the address in icpu.bt.expected (not 0) if pages are mostly used again: the guest's handler makes it accessible, and the instruction is
 * tried again. Whoever goes on in user code calls this if something stands there, which spares another fault of the host. It does what a processor may
 * do at any time: hold a translation whose A bit (and D bit, if it can write) is set already.
 */
void shadow_expected(struct icpu *c);

/* FLUSH_PAGE: la in the current context and all global pages. FLUSH_NONGLOBAL: ctx. FLUSH_ALL: everything, la and ctx do not matter. */
void shadow_flush(struct icpu *c, enum tlb_flush what, u64 la, unsigned ctx);
/* One page of a context that need not be the current one (INVPCID type 0). */
void shadow_flush_in(struct icpu *c, u64 la, unsigned ctx);

/* The frame holds translated code from now on: no mapping of this vCPU can write it. When it holds none any more, the next write that faults finds out.
 * PROTECT_ALL: no mapping at all can write, for now. It is icpu_bt.protect. */
void shadow_protect(struct icpu *c, u64 gpa);

void shadow_reset(struct icpu *c);                                 /* everything is dropped */

/* The guest's linear address behind a host address in a window that the view has open, guards included; false: not one of ours. */
bool shadow_guest(const struct icpu *c, enum tlb_view_id view, u64 host, u64 *la);

/*
 * Whether the shadow pays for a context (SHADOW_CONTEXTS: the supervisor). shadow_ran() is told now and then, at least when contexts are switched, that
 * ctx ran for so many cycles and had so many misses of the software TLB (0 while it is on the shadow) and so many page faults and flushes of the guest.
 * shadow_started(): another address space took the context over.
 */
void shadow_started(struct icpu *c, unsigned ctx);
void shadow_ran(struct icpu *c, unsigned ctx, u64 cycles, u64 misses, u64 troubles);
void shadow_calm(struct icpu *c, unsigned ctx);                    /* it changes no mappings these days: the shadow is worth another try */
bool shadow_pays(const struct icpu *c, unsigned ctx);

void shadow_stats(const struct icpu *c, struct shadow_stats *out);
void shadow_report(const struct icpu *c, struct stats *out);       /* the same for --stats (cpu/stats.h) */
