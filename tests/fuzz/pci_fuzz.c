/*
 * Fuzzing of PCI configuration space: the input is a series of accesses by ports, ECAM and BARs to a bus with every kind of BAR and capability. Afterwards
 * what identifies the functions is unchanged, no BAR decodes outside of its window, and a reset brings all back.
 *
 *   each access, 8 bytes: what, device, offset (2), value (4)
 */
#include "../dev/virtio_guest.h"
#include "dev/virtio_rng.h"

#define DEVICES 3                      /* host bridge, probe, virtio */

static struct guest g;
static struct device probe_device;
static struct pci_fn probe;
static struct virtio_rng *rng;

static u64 probe_read(struct pci_fn *f UNUSED, unsigned bar UNUSED, u64 off UNUSED, unsigned size UNUSED)
{
    return 0;
}

static void probe_write(struct pci_fn *f, unsigned bar, u64 off, u64 val, unsigned size)
{
    bug_on(off + size > f->bar[bar].size);
    if (bar == 0)
        pci_msix_signal(f, (unsigned)val);
    else if (bar == 1)
        pci_msi_signal(f, (unsigned)val);
    else
        pci_intx(f, val & 1);
}

static void build(void)
{
    static const struct device_ops probe_device_ops = { .name = "probe" };
    static const struct pci_fn_ops ops = { .bar_read = probe_read, .bar_write = probe_write };
    static const struct pci_id id = { .vendor = 0x1234, .device = 0x5678 };

    guest_new(&g);
    device_init(&probe_device, &probe_device_ops);
    bug_on(pci_add(g.pci, &probe, 1, &id, &ops, &probe_device.lock) < 0);
    pci_wire_intx(&probe, guest_line(&g), 9);
    bug_on(pci_bar(&probe, 0, PCI_BAR_IO, 32, "io") < 0 || pci_bar(&probe, 1, PCI_BAR_MEM32, 4096, "mem") < 0 ||
           pci_bar(&probe, 2, PCI_BAR_MEM64, 4 * MiB, "mem64") < 0 || pci_msix(&probe, 4, 33, "msix") < 0);
    pci_msi(&probe, 8);
    bug_on(virtio_rng_new(&g.ram, NULL, &rng) < 0 || virtio_pci_attach(g.pci, 2, guest_line(&g), 10, true, (struct virtio *)rng) < 0);
}

static void do_access(const u8 *a)
{
    unsigned device = a[1] % (DEVICES + 1), off = a[2] | a[3] << 8, size = 1u << (a[0] >> 4) % 4;
    u64 val;
    u32 v;

    memcpy(&v, a + 4, 4);
    val = v;
    switch (a[0] & 7) {
    case 0: ecam_write(&g, device, off % 4096, v, size); break;
    case 1: ecam_read(&g, device, off % 4096, size); break;
    case 2: bus_write(g.pio, PCI_HOST_PORT_ADDRESS, v, size); break;
    case 3: bus_access(g.pio, PCI_HOST_PORT_DATA + off % 4, size, off & 4, &val); break;
    case 4: bus_access(g.mmio, GUEST_MEM + (off | (u64)device << 16), size, a[0] & 8, &val); break;
    case 5: bus_access(g.mmio, GUEST_MEM64 + off * 64, size, a[0] & 8, &val); break;
    case 6: bus_access(g.pio, 0xc000 + off % 0x1000, size, a[0] & 8, &val); break;
    case 7: bus_access(g.mmio, bar_address(&g, device, a[0] >> 6) + off, size, a[0] & 8, &val); break;
    }
}

static void check(void)
{
    bug_on(ecam_read(&g, 0, 0, 4) != 0x00081b36 || ecam_read(&g, 1, 0, 4) != 0x56781234 || ecam_read(&g, 2, 0, 4) != 0x10051af4);
    for (unsigned n = 0; n < PCI_BARS; n++) {
        const struct pci_bar *bar = &probe.bar[n];

        if (bar->kind != PCI_BAR_NONE && bar->kind != PCI_BAR_IO && bar->mapped)
            bug_on(bar->mapped_at < GUEST_MEM || (bar->mapped_at >= GUEST_MEM + 1 * MiB && bar->mapped_at < GUEST_MEM64) ||
                   bar->mapped_at >= GUEST_MEM64 + 16 * MiB);
    }
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    struct device *host, *dev;

    if (!rng)
        build();
    for (; len >= 8; data += 8, len -= 8)
        do_access(data);
    check();
    host = (struct device *)g.host;
    dev = (struct device *)rng;
    host->ops->reset(host);
    dev->ops->reset(dev);
    pci_fn_reset(&probe);
    bug_on(ecam_read(&g, 1, PCI_BASE_ADDRESS_1, 4) != GUEST_MEM || !probe.bar[1].mapped || g.intx);
    return 0;
}
