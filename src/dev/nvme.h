/*
 * NVM Express controller with one namespace (NVM Express 1.4), on PCI. A struct nvme begins with its struct device.
 */
#pragma once

#include "back/block.h"
#include "io/device.h"
#include "io/pci.h"
#include "mem/ram.h"

#define NVME_QUEUES_MAX 16

struct nvme;

struct nvme_config {
    struct ram *ram;
    const struct log *log;
    struct pci_bus *pci;
    unsigned slot;
    struct irq_line intx;
    u8 gsi;
    const char *serial;                                            /* up to 20 characters */
    unsigned number;                                               /* what tells this disk's identifiers from others */
    unsigned queues;                                               /* pairs, 1 to NVME_QUEUES_MAX */
};

/* block: the host end, owned by the device from here on (closed with it), also when an error is returned. */
int nvme_new(const struct nvme_config *c, struct block *block, struct nvme **out);
/* As virtio_blk_resize(). */
int nvme_resize(struct nvme *n, u64 size);
struct block_counts nvme_counts(struct nvme *n);
