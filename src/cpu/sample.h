/*
 * Looks at what vCPUs are doing, many times a second, from a thread of its own.
 *
 * For statistics it reads what each publishes in vcpu.where; the vCPUs notice nothing of it. For a profile it also interrupts those that run by a signal, whose handler
 * notes where the vCPU's thread was in the monitor, and the guest's RIP as the engine knows it.
 *
 * Locking: the sampler's thread alone writes counters, a vCPU's thread alone (in the handler) its tables of addresses; counters may be read by anybody at any time, tables
 * once the vCPUs are held.
 */
#pragma once

#include "cpu/machine.h"

#define SAMPLE_HZ 997                                              /* prime: not in step with the guest's timers */

struct sampler;

/* After the vCPUs' threads have been started; 0 or a negative errno with err(). */
int sampler_new(struct machine *m, bool profile, struct sampler **out);
void sampler_free(struct sampler *s);                              /* NULL is fine; before the vCPUs are freed */
u64 sampler_hits(const struct sampler *s, unsigned vcpu, enum vcpu_where w);
/* Why translated code had been left (of GROUP_EXITS) where it was about to be gone on with. */
u64 sampler_left(const struct sampler *s, unsigned vcpu, enum vcpu_counted why);
/* With a profile: in how many samples of a vCPU that ran it was there, and the guest's RIP was one of the upper half's (the kernel's), or of the lower. */
u64 sampler_ran(const struct sampler *s, unsigned vcpu, enum vcpu_where w, bool kernel);

/* An address that was met: guest RIPs, and addresses in the monitor's own code. */
enum sampled { SAMPLED_GUEST, SAMPLED_MONITOR, SAMPLED };
struct sampled_address {
    u64 addr;
    u32 n;                                                         /* how often */
    u32 direct;                                                    /* SAMPLED_GUEST: of these, how often the guest's own code ran */
};
/* Entry n of a vCPU's table, or NULL behind the last. Entries that were not met have n == 0. */
const struct sampled_address *sampler_address(const struct sampler *s, unsigned vcpu, enum sampled what, unsigned n);
u64 sampler_lost(const struct sampler *s);                         /* samples that found their table full */
