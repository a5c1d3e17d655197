/*
 * ACPI fixed hardware (ACPI 6.4 section 4.8): PM1a event and control blocks, power-management timer, GPE0 block.
 *
 * There is no legacy mode: FADT.SMI_CMD is 0 and SCI_EN always 1. The reset register is 0xcf9 (rst_cnt.h).
 * A struct acpi_pm begins with its struct device.
 */
#pragma once

#include "base/clock.h"
#include "dev/hook.h"
#include "io/bus.h"
#include "io/device.h"
#include "io/irq.h"

/* Blocks, from the base; lengths in bytes, as the FADT states them. */
#define ACPI_PM_EVT 0x00           /* PM1a_EVT_BLK: status, enable */
#define ACPI_PM_EVT_LEN 4
#define ACPI_PM_CNT 0x04           /* PM1a_CNT_BLK */
#define ACPI_PM_CNT_LEN 2
#define ACPI_PM_TMR 0x08           /* PM_TMR_BLK: 32 bits (FADT flag TMR_VAL_EXT) */
#define ACPI_PM_TMR_LEN 4
#define ACPI_PM_GPE0 0x20          /* GPE0_BLK: 8 bytes status, 8 bytes enable: events 0..63 */
#define ACPI_PM_GPE0_LEN 16
#define ACPI_PM_SIZE 0x40

#define ACPI_PM_TIMER_HZ 3579545u
#define ACPI_SLP_TYP_S5 5          /* first element of \_S5 in the DSDT; other sleep states do not exist */

struct acpi_pm;

/* sci: level, active high at this output (the board's routing and the MADT override say how it reaches the chips). hook: MACHINE_POWEROFF. */
int acpi_pm_new(struct bus *pio, u16 base, struct clock *clock, struct irq_line sci, struct machine_hook hook, struct acpi_pm **out);
void acpi_pm_power_button(struct acpi_pm *pm);                     /* pressed and released. Any thread */
void acpi_pm_gpe(struct acpi_pm *pm, unsigned n);                  /* sets the status bit of general-purpose event n (0..63). Any thread */
