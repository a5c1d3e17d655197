/*
 * virtio over PCI (virtio 1.2, 4.1): registers in a memory BAR, MSI-X with INTx as a fallback. Transitional devices have the
 * legacy registers in an I/O BAR, too, and the identity by which old drivers find them.
 */
#pragma once

#include "io/pci.h"
#include "io/virtio.h"

/* Makes v device 0..31 of the bus; transitional where such devices exist and it is asked for. intx, gsi: as for pci_wire_intx().
 * The transport belongs to v from here on. 0, or a negative errno with err(). */
int virtio_pci_attach(struct pci_bus *pci, unsigned device, struct irq_line intx, u8 gsi, bool transitional, struct virtio *v);
