/*
 * The choice of --engine auto (engine_choice.h): KVM where it is real, else the translator.
 */
#include "ctl/engine_choice.h"

const struct engine *engine_choose_by(void (*probe)(struct probe *), char *reason, size_t size)
{
    struct probe p;

    probe(&p);
    switch (p.verdict) {
    case PROBE_REAL:
        snprintf(reason, size, "/dev/kvm is real: guest kernel code runs at 1/%u of this host's speed or more", p.times);
        return &kvm_engine;
    case PROBE_EMULATED:
        snprintf(reason, size, "/dev/kvm is there but emulates guest kernel code: %u times slower than this host", p.times);
        break;
    case PROBE_STUCK:
        snprintf(reason, size, "/dev/kvm is there but a small loop of a guest does not end on it");
        break;
    case PROBE_UNUSABLE:
        snprintf(reason, size, "/dev/kvm does not work: %s", p.error);
        break;
    case PROBE_FORBIDDEN:
        snprintf(reason, size, "no permission to use /dev/kvm; doppel doctor says more");
        break;
    case PROBE_ABSENT:
        snprintf(reason, size, "no /dev/kvm on this host");
        break;
    }
    return &bt_engine;
}

const struct engine *engine_choose(char *reason, size_t size)
{
    return engine_choose_by(kvm_probe, reason, size);
}
