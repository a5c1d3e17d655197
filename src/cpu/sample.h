/*
 * Looks at what vCPUs are doing, many times a second, from a thread of its own: what each publishes in vcpu.where. The vCPUs notice nothing of it.
 *
 * Locking: the sampler's thread alone writes its counters; anybody may read them.
 */
#pragma once

#include "cpu/machine.h"

#define SAMPLE_HZ 997                                              /* prime: not in step with the guest's timers */

struct sampler;

int sampler_new(struct machine *m, struct sampler **out);          /* after the vCPUs have been made; 0 or a negative errno with err() */
void sampler_free(struct sampler *s);                              /* NULL is fine; before the vCPUs are freed */
u64 sampler_hits(const struct sampler *s, unsigned vcpu, enum vcpu_where w);
