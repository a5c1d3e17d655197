/*
 * PCI host bridge: device 0 of bus 0, and the two ways to configuration space: ports 0xcf8/0xcfc (PCI 3.0, 3.2.2.3.2, mechanism #1) and a
 * memory-mapped window (PCI Express ECAM, PCI Firmware Specification 3.0 chapter 4).
 *
 * A struct pci_host begins with its struct device.
 */
#pragma once

#include "io/device.h"
#include "io/pci.h"

#define PCI_HOST_PORT_ADDRESS 0xcf8
#define PCI_HOST_PORT_DATA 0xcfc
#define PCI_ECAM_BUS_SIZE (1 * MiB)

struct pci_host;

/* ecam_base: multiple of 1 MiB, for buses 0..ecam_buses-1 (1..256; ACPI's MCFG table names them). ecam_buses 0: no ECAM. */
int pci_host_new(struct pci_bus *pci, struct bus *pio, struct bus *mmio, u64 ecam_base, unsigned ecam_buses, struct pci_host **out);
