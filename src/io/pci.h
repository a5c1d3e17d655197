/*
 * Conventional PCI (PCI Local Bus Specification 3.0): bus 0 with up to 32 single-function devices, seen from both sides.
 *
 * A function is a `struct pci_fn` inside its device. Its owner fills in identity, BARs and capabilities while the board is built, and then only
 * signals: pci_msix_signal(), pci_msi_signal(), pci_intx(). pci.c keeps the configuration space: writable bits, sizing of BARs, decode
 * enables (they move the BAR's region on its bus), MSI and MSI-X with masks and pending bits, INTx with its disable bit, bus mastership.
 *
 * There is no firmware: pci_bar() takes an address from the board's windows, and a reset restores it with memory and I/O decoding on, as
 * firmware would leave it. A BAR that the guest moves decodes only inside the windows, as behind a real host bridge; so no guest can lay a
 * BAR over an interrupt controller.
 *
 * Threads: functions are added before the vCPUs run. Everything else of a function happens under its owner's lock (pci_fn.lock), which
 * pci_config_access() and the BAR regions take by themselves.
 */
#pragma once

#include <pthread.h>

#include "base/stream.h"
#include "base/types.h"
#include "io/bus.h"
#include "io/irq.h"

#define PCI_CONFIG_SIZE 256
#define PCI_DEVICES 32
#define PCI_BARS 6
#define PCI_MSI_VECTORS_MAX 32
#define PCI_MSIX_VECTORS_MAX 128       /* the table fills the lower half of its 4 KiB BAR, the pending bits lie in the upper */
#define PCI_MSIX_BAR_SIZE 4096

struct pci_window {
    u64 base, size;                                                /* size 0: none */
};
struct pci_config {
    struct bus *pio, *mmio;
    struct msi_sink msi;
    struct pci_window io;                                          /* ports for I/O BARs */
    struct pci_window mem;                                         /* below 4 GiB */
    struct pci_window mem64;                                       /* anywhere; 64-bit BARs that do not fit below come here */
};
struct pci_bus;

int pci_bus_new(const struct pci_config *cfg, struct pci_bus **out);
void pci_bus_free(struct pci_bus *b);                              /* after its functions */

/* One configuration access of 1, 2 or 4 bytes inside a dword; bdf is bus << 8 | device << 3 | function. Reads of what is not there give ones. Any
 * thread, no device's lock held. */
u32 pci_config_read(struct pci_bus *b, unsigned bdf, unsigned off, unsigned size);
void pci_config_write(struct pci_bus *b, unsigned bdf, unsigned off, u32 val, unsigned size);

struct pci_fn;
struct pci_fn_ops {
    u64 (*bar_read)(struct pci_fn *f, unsigned bar, u64 off, unsigned size);
    void (*bar_write)(struct pci_fn *f, unsigned bar, u64 off, u64 val, unsigned size);
    /* Optional. Before bytes [off, off + size) of the configuration space are read, and after they were written (in cfg[], masks applied). */
    void (*config_read)(struct pci_fn *f, unsigned off, unsigned size);
    void (*config_write)(struct pci_fn *f, unsigned off, unsigned size);
};

struct pci_id {
    u16 vendor, device, subsystem_vendor, subsystem;
    u32 class_code;                                                /* 24 bits: base class, subclass, programming interface */
    u8 revision;
};

enum pci_bar_kind { PCI_BAR_NONE, PCI_BAR_IO, PCI_BAR_MEM32, PCI_BAR_MEM64 };
struct pci_bar {
    struct pci_fn *fn;
    enum pci_bar_kind kind;
    unsigned n;
    u64 size;                                                      /* a power of two */
    int region;                                                    /* handle on its bus */
    bool mapped;
    u64 mapped_at;
};

struct pci_msix_entry {
    u64 addr;
    u32 data, control;
};

struct pci_fn {
    struct pci_bus *bus;
    unsigned device;                                               /* 0..31 on bus 0 */
    const struct pci_fn_ops *ops;
    pthread_mutex_t *lock;                                         /* the owner's */
    u8 cfg[PCI_CONFIG_SIZE];
    u8 wmask[PCI_CONFIG_SIZE];                                     /* bits that the guest may write */
    u8 initial[PCI_CONFIG_SIZE];                                   /* cfg after reset */
    u8 cap_last, cap_end;                                          /* last capability, first free byte */
    struct pci_bar bar[PCI_BARS];

    struct irq_line intx;
    bool intx_level;                                               /* what the device wants; the line also obeys the disable bit */

    u8 msi_cap, msix_cap;                                          /* offset of the capability, 0: none */
    unsigned msi_vectors, msix_vectors, msix_bar;
    u32 msi_pending;
    struct pci_msix_entry msix[PCI_MSIX_VECTORS_MAX];
    u64 msix_pending[PCI_MSIX_VECTORS_MAX / 64];
};

/* While the board is built */

/* Puts f on the bus as device 0..31, function 0. intx is wired to INTA#; gsi is what the interrupt line register says. -EEXIST, -EINVAL with err(). */
int pci_add(struct pci_bus *b, struct pci_fn *f, unsigned device, const struct pci_id *id, const struct pci_fn_ops *ops, pthread_mutex_t *lock);
void pci_wire_intx(struct pci_fn *f, struct irq_line intx, u8 gsi);
/* A BAR of size bytes (a power of two; 16 or more for memory, 4 or more for I/O). -ENOSPC with err() when the window is full. */
int pci_bar(struct pci_fn *f, unsigned bar, enum pci_bar_kind kind, u64 size, const char *name);
/* Appends a capability of len bytes: id, next pointer, then body (len - 2 bytes). Returns its offset. wmask: writable bits of the body, or NULL. */
unsigned pci_capability(struct pci_fn *f, u8 id, const void *body, const void *wmask, unsigned len);
int pci_msix(struct pci_fn *f, unsigned bar, unsigned vectors, const char *name); /* with its own BAR; 1..PCI_MSIX_VECTORS_MAX */
void pci_msi(struct pci_fn *f, unsigned vectors);                  /* 1, 2, 4, .. 32; 64-bit, with per-vector masks */
void pci_remove(struct pci_fn *f);

/* Under the function's lock */

bool pci_bus_master(const struct pci_fn *f);                       /* may it read and write memory? */
bool pci_msix_enabled(const struct pci_fn *f);
bool pci_msi_enabled(const struct pci_fn *f);
void pci_msix_signal(struct pci_fn *f, unsigned vector);           /* sends, or sets the pending bit; nothing while MSI-X is off */
void pci_msi_signal(struct pci_fn *f, unsigned vector);            /* likewise */
void pci_intx(struct pci_fn *f, bool level);                       /* INTA#; the pin stays silent while MSI or MSI-X is on */
void pci_fn_reset(struct pci_fn *f);
void pci_fn_state(struct pci_fn *f, struct stream *s);
/* An access to a BAR as if from the bus, for devices that have a window of their own into their BARs. Checked against the BAR's size. */
u64 pci_bar_read(struct pci_fn *f, unsigned bar, u64 off, unsigned size);
void pci_bar_write(struct pci_fn *f, unsigned bar, u64 off, u64 val, unsigned size);
