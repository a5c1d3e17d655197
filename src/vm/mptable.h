/*
 * The Intel MultiProcessor Specification 1.4 table: processors, the I/O APIC and its inputs, for systems without an
 * ACPI interpreter. It says the same as the ACPI tables, from the same struct acpi_config. Called while vCPUs stand
 * still.
 */
#pragma once

#include "vm/acpi.h"

#define MPTABLE_BASE 0xf0000u                                      /* 0xf0000..0xfffff is where it is looked for (4.) */
#define MPTABLE_SIZE 0x10000u

/* 0, or -EFAULT, -ENOMEM with err(). */
int mptable_write(struct ram *ram, const struct acpi_config *c);
