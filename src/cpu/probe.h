/* Is this host's /dev/kvm real? Measured before `auto` takes it, and shown by doctor (engine_choice.h). */
#pragma once

#include "base/types.h"

enum probe_verdict {
    PROBE_REAL,         /* the guest's kernel code runs on the processor */
    PROBE_EMULATED,     /* it runs, but slowly: somebody carries it out instruction by instruction */
    PROBE_STUCK,        /* it did not come back in time */
    PROBE_UNUSABLE,     /* it is there and something does not work: error says what */
    PROBE_FORBIDDEN,    /* no permission */
    PROBE_ABSENT,       /* no /dev/kvm */
};

struct probe {
    enum probe_verdict verdict;
    unsigned times;       /* PROBE_REAL, PROBE_EMULATED: the host's speed by the guest's */
    char error[160];
};

/*
 * Real hardware needs 1 to 2, hardware that is emulated itself 2 to 20; who carries out instructions one by one,
 * thousands. The interpreter needs some 50.
 */
#define PROBE_TIMES_MAX 50u

/* Takes at most about 400 ms. Any thread. Tests put functions of their own in its place. */
void kvm_probe(struct probe *p);
