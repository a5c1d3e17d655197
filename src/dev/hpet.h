/*
 * High precision event timers (IA-PC HPET Specification 1.0a): a counter of 100 MHz and three comparators.
 *
 * A struct hpet begins with its struct device.
 */
#pragma once

#include "base/clock.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

#define HPET_BASE 0xfed00000u
#define HPET_SIZE 0x400u
/* bits 31..0 of the capabilities: also in the ACPI table. Legacy replacement is a capability. */
#define HPET_ID(legacy) (0x80862201u | (legacy) << 15)

struct hpet_config {
    struct clock *clock;
    /* the lines below exist: not so where the i8254 and its wires are an engine's own */
    bool legacy;
    /* where legacy replacement and the chips behind it go */
    struct irq_line irq0, irq8;
    struct irq_line pin[4];                                        /* I/O APIC inputs 20 to 23 */
};
#define HPET_FIRST_PIN 20

struct hpet;

int hpet_new(struct bus *mmio, const struct hpet_config *config, struct hpet **out);
/* The wires of the i8254 and of the RTC, which legacy replacement cuts. Any thread. */
struct irq_line hpet_i8254_line(struct hpet *h);
struct irq_line hpet_rtc_line(struct hpet *h);
