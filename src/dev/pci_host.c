/*
 * PCI host bridge (see pci_host.h). Function 0:0.0 identifies the bridge and has no registers of its own.
 *
 * Left out: bytes and words at 0xcf8..0xcfb are not configuration accesses and go nowhere (0xcf9 is rst_cnt's, an overlay).
 *
 * Locking: the device's lock guards the address register only and is not held during the configuration access, which takes the lock of the
 * function that it reaches (its own one among them). Two vCPUs that use 0xcf8 and 0xcfc at once mix up their addresses, as on hardware.
 */
#include "dev/pci_host.h"

#include <errno.h>

#include "base/err.h"

#define ADDRESS_ENABLE 0x80000000u
#define ADDRESS_MASK (ADDRESS_ENABLE | 0xfffffcu)

/* "Generic PCIe host bridge" of the vendor whose ids virtual machines share. */
static const struct pci_id host_id = { .vendor = 0x1b36, .device = 0x0008, .subsystem_vendor = 0x1af4, .subsystem = 0x1100, .class_code = 0x060000 };

struct pci_host {
    struct device device;
    struct pci_bus *pci;
    struct pci_fn fn;
    u32 address;
};

static u64 address_read(void *dev, u64 off, unsigned size)
{
    struct pci_host *h = dev;
    u64 val = ~0ull;

    if (off == 0 && size == 4) {
        pthread_mutex_lock(&h->device.lock);
        val = h->address;
        pthread_mutex_unlock(&h->device.lock);
    }
    return val;
}

static void address_write(void *dev, u64 off, u64 val, unsigned size)
{
    struct pci_host *h = dev;

    if (off != 0 || size != 4)
        return;
    pthread_mutex_lock(&h->device.lock);
    h->address = (u32)val & ADDRESS_MASK;
    pthread_mutex_unlock(&h->device.lock);
}

static u64 data_read(void *dev, u64 off, unsigned size)
{
    struct pci_host *h = dev;
    u32 address = (u32)address_read(dev, 0, 4);

    if (!(address & ADDRESS_ENABLE))
        return ~0ull;
    return pci_config_read(h->pci, address >> 8 & 0xffff, (address & 0xfc) + (u32)off, size);
}

static void data_write(void *dev, u64 off, u64 val, unsigned size)
{
    struct pci_host *h = dev;
    u32 address = (u32)address_read(dev, 0, 4);

    if (address & ADDRESS_ENABLE)
        pci_config_write(h->pci, address >> 8 & 0xffff, (address & 0xfc) + (u32)off, (u32)val, size);
}

/* Bus, device, function, and 4 KiB of registers each; conventional functions have the first 256 bytes. */
static u64 ecam_read(void *dev, u64 off, unsigned size)
{
    struct pci_host *h = dev;

    return pci_config_read(h->pci, (unsigned)(off >> 12), off & 0xfff, size);
}

static void ecam_write(void *dev, u64 off, u64 val, unsigned size)
{
    struct pci_host *h = dev;

    pci_config_write(h->pci, (unsigned)(off >> 12), off & 0xfff, (u32)val, size);
}

static void host_reset(struct device *d)
{
    struct pci_host *h = container_of(d, struct pci_host, device);

    pthread_mutex_lock(&d->lock);
    h->address = 0;
    pci_fn_reset(&h->fn);
    pthread_mutex_unlock(&d->lock);
}

static void host_state(struct device *d, struct stream *s)
{
    struct pci_host *h = container_of(d, struct pci_host, device);

    if (!stream_section(s, "pci_host", 1))
        return;
    stream_u32(s, &h->address);
    h->address &= ADDRESS_MASK;
    pci_fn_state(&h->fn, s);
}

static void host_free(struct device *d)
{
    struct pci_host *h = container_of(d, struct pci_host, device);

    pci_remove(&h->fn);
    pthread_mutex_destroy(&d->lock);
    free(h);
}

static const struct device_ops host_ops = { .name = "pci_host", .reset = host_reset, .state = host_state, .free = host_free };

int pci_host_new(struct pci_bus *pci, struct bus *pio, struct bus *mmio, u64 ecam_base, unsigned ecam_buses, struct pci_host **out)
{
    struct pci_host *h = calloc(1, sizeof(*h));
    struct region address = { .base = PCI_HOST_PORT_ADDRESS, .size = 4, .min = 1, .max = 4, .read = address_read, .write = address_write,
                              .dev = h, .name = "pci-address" };
    struct region data = { .base = PCI_HOST_PORT_DATA, .size = 4, .min = 1, .max = 4, .read = data_read, .write = data_write, .dev = h,
                           .name = "pci-data" };
    struct region ecam = { .base = ecam_base, .size = ecam_buses * PCI_ECAM_BUS_SIZE, .min = 1, .max = 4, .read = ecam_read,
                           .write = ecam_write, .dev = h, .name = "pci-ecam" };
    int r;

    if (!h)
        return err(-ENOMEM, "PCI host bridge: out of memory");
    bug_on(ecam_buses > 256 || ecam_base % PCI_ECAM_BUS_SIZE);
    device_init(&h->device, &host_ops);
    h->pci = pci;
    r = pci_add(pci, &h->fn, 0, &host_id, NULL, &h->device.lock);
    if (r < 0)
        goto out;
    r = bus_add(pio, &address);
    if (r >= 0)
        r = bus_add(pio, &data);
    if (r >= 0 && ecam_buses)
        r = bus_add(mmio, &ecam);
    if (r < 0)
        goto out;
    *out = h;
    return 0;
out:
    host_free(&h->device);
    return r;
}
