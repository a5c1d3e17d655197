/*
 * Statistics of vCPUs, as text for people or as JSON: counters (count.def), where the time went (sample.h), and what an engine knows besides.
 *
 * Any thread, also while the guest runs: figures are then of slightly different moments. What vCPUs' threads count are single words, which are read
 * as they are.
 */
#pragma once

#include "cpu/machine.h"

struct sampler;

/* Output in groups of named values. Names are words of ours: nothing in them is escaped. */
struct stats {
    FILE *f;
    bool json;
    bool more;                                                     /* in this group, something stands before */
    unsigned column;
};

void stats_open(struct stats *s, FILE *f, bool json);              /* f is borrowed */
void stats_close(struct stats *s);
void stats_group(struct stats *s, const char *name);               /* groups do not nest */
void stats_group_end(struct stats *s);
void stats_u64(struct stats *s, const char *name, u64 v);          /* text leaves zeros out */
void stats_real(struct stats *s, const char *name, double v, const char *unit); /* JSON: name-unit; unit may be "%" ("percent") */
/* The vCPUs of a list, one after the other; id is the first value of each. */
void stats_vcpus(struct stats *s);
void stats_vcpu(struct stats *s, const struct vcpu *v, const struct sampler *sampler); /* sampler: NULL, nobody samples */
void stats_vcpus_end(struct stats *s);
