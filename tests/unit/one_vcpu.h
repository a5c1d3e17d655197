/*
 * For tests of the interpreter's parts: a machine of one vCPU, without a thread, interrupts or devices; tests call what they test on it by hand. A test's
 * fixture has the three structs; RAM is the test's, and filled before the vCPU is opened.
 */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "io/bus.h"

static inline int no_interrupt(void *chip UNUSED)
{
    return -1;
}
static const struct intc_ops no_interrupts = { .peek = no_interrupt, .ack = no_interrupt };

/* Zeroed, and aligned as a vCPU has to be. */
static inline void *fixture_new(size_t size)
{
    void *f = aligned_alloc(64, ALIGN_UP(size, 64));
    assert_non_null(f);
    return memset(f, 0, size);
}

static inline void ram_make(struct ram *ram, u64 size)
{
    assert_int_equal(ram_init(ram), 0);
    assert_int_equal(ram_add(ram, 0, size), 0);
}

static inline struct icpu *one_vcpu_open(struct machine *m, struct vcpu *v, struct ram *ram)
{
    *m = (struct machine){ .ram = ram, .engine = &interp_engine, .vcpus = 1, .split_lock = PTHREAD_MUTEX_INITIALIZER };
    assert_int_equal(bus_new(NULL, &m->mmio), 0);
    assert_int_equal(bus_new(NULL, &m->pio), 0);
    assert_int_equal(cpuid_policy_new(1, 1000000, &m->cpuid), 0);
    v->m = m;
    v->mmio = m->mmio;
    v->intc.ops = &no_interrupts;
    assert_int_equal(interp_engine.machine_open(m), 0);
    assert_int_equal(interp_engine.vcpu_open(v), 0);
    return v->engine_data;
}

static inline void one_vcpu_close(struct machine *m, struct vcpu *v, struct ram *ram)
{
    interp_engine.vcpu_close(v);
    interp_engine.machine_close(m);
    cpuid_policy_free(m->cpuid);
    bus_free(m->mmio);
    bus_free(m->pio);
    ram_close(ram);
}
