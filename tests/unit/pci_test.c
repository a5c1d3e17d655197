/* PCI as the guest sees it: both ways into configuration space, sizing and moving of BARs, capabilities, MSI, MSI-X, INTx. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "../dev/virtio_guest.h"

#define DEV 3
#define VECTORS 70

/* A function with every kind of BAR; reads of BAR n at off give n << 24 | off, writes are remembered. */
struct probe {
    struct device device;
    struct pci_fn fn;
    u64 wrote_off, wrote_val;
    unsigned wrote_bar, wrote_size;
};

static struct guest g;
static struct probe p;

static u64 probe_read(struct pci_fn *f UNUSED, unsigned bar, u64 off, unsigned size UNUSED)
{
    return (u64)bar << 24 | off;
}

static void probe_write(struct pci_fn *f, unsigned bar, u64 off, u64 val, unsigned size)
{
    struct probe *probe = container_of(f, struct probe, fn);

    probe->wrote_bar = bar;
    probe->wrote_off = off;
    probe->wrote_val = val;
    probe->wrote_size = size;
}

static const struct device_ops probe_ops = { .name = "probe" };
static const struct pci_fn_ops probe_fn_ops = { .bar_read = probe_read, .bar_write = probe_write };
static const struct pci_id probe_id = {
    .vendor = 0x1234, .device = 0x5678, .subsystem_vendor = 0x9abc, .subsystem = 0xdef0, .class_code = 0x020000, .revision = 7
};

static int setup(void **state UNUSED)
{
    guest_new(&g);
    memset(&p, 0, sizeof(p));
    device_init(&p.device, &probe_ops);
    assert_int_equal(pci_add(g.pci, &p.fn, DEV, &probe_id, &probe_fn_ops, &p.device.lock), 0);
    pci_wire_intx(&p.fn, guest_line(&g), 17);
    assert_int_equal(pci_bar(&p.fn, 0, PCI_BAR_IO, 32, "probe-io"), 0);
    assert_int_equal(pci_bar(&p.fn, 1, PCI_BAR_MEM32, 8192, "probe-mem"), 0);
    assert_int_equal(pci_bar(&p.fn, 2, PCI_BAR_MEM64, 4 * MiB, "probe-mem64"), 0); /* does not fit below 4 GiB */
    assert_int_equal(pci_msix(&p.fn, 4, VECTORS, "probe-msix"), 0);
    pci_msi(&p.fn, 4);
    return 0;
}

static int teardown(void **state UNUSED)
{
    pci_remove(&p.fn);
    guest_free(&g);
    return 0;
}

static u32 rd(unsigned off, unsigned size)
{
    return ecam_read(&g, DEV, off, size);
}

static void wr(unsigned off, u32 val, unsigned size)
{
    ecam_write(&g, DEV, off, val, size);
}

static u32 bar(unsigned n)
{
    return rd(PCI_BASE_ADDRESS_0 + 4 * n, 4);
}

static void address(u32 val)
{
    bus_write(g.pio, 0xcf8, val, 4);
}

static void test_identity(void **state UNUSED)
{
    assert_int_equal(rd(PCI_VENDOR_ID, 4), 0x56781234);
    assert_int_equal(rd(PCI_CLASS_REVISION, 4), 0x02000007);
    assert_int_equal(rd(PCI_SUBSYSTEM_VENDOR_ID, 4), 0xdef09abc);
    assert_int_equal(rd(PCI_INTERRUPT_PIN, 1), 1);
    assert_int_equal(rd(PCI_INTERRUPT_LINE, 1), 17);
    assert_int_equal(ecam_read(&g, 0, PCI_CLASS_DEVICE, 2), 0x0600); /* the host bridge */
}

static void test_mechanism_1(void **state UNUSED)
{
    address(0x80000000 | DEV << 11);
    assert_int_equal(bus_read(g.pio, 0xcf8, 4), 0x80000000 | DEV << 11);
    assert_int_equal(bus_read(g.pio, 0xcfc, 4), 0x56781234);
    assert_int_equal(bus_read(g.pio, 0xcfe, 2), 0x5678);
    assert_int_equal(bus_read(g.pio, 0xcfd, 1), 0x12);
    address(DEV << 11);                                            /* not enabled */
    assert_int_equal(bus_read(g.pio, 0xcfc, 4), 0xffffffff);
    address(0x80000000 | DEV << 11 | PCI_INTERRUPT_LINE);
    bus_write(g.pio, 0xcfc, 0x55, 1);
    assert_int_equal(rd(PCI_INTERRUPT_LINE, 1), 0x55);
    bus_write(g.pio, 0xcf9, 0xff, 1);                              /* a byte there is none of ours */
    assert_int_equal(bus_read(g.pio, 0xcf8, 4), 0x80000000 | DEV << 11 | PCI_INTERRUPT_LINE);
}

static void test_absent(void **state UNUSED)
{
    assert_int_equal(ecam_read(&g, 9, 0, 4), 0xffffffff);
    assert_int_equal(ecam_read(&g, 9, 0, 2), 0xffff);
    assert_int_equal(bus_read(g.mmio, GUEST_ECAM + (DEV << 15) + 0x1000, 4), 0xffffffff); /* function 1 */
    assert_int_equal(rd(0x100, 4), 0xffffffff);                    /* no extended space */
    address(0x80010000 | DEV << 11);                               /* bus 1 */
    assert_int_equal(bus_read(g.pio, 0xcfc, 4), 0xffffffff);
    ecam_write(&g, 9, 0, 0, 4);
}

static void test_slot_taken(void **state UNUSED)
{
    struct pci_fn other;

    assert_int_equal(pci_add(g.pci, &other, DEV, &probe_id, &probe_fn_ops, &p.device.lock), -EEXIST);
    assert_int_equal(pci_add(g.pci, &other, 32, &probe_id, &probe_fn_ops, &p.device.lock), -EINVAL);
}

/* After reset all BARs have addresses and decode, as firmware leaves them. */
static void test_assigned(void **state UNUSED)
{
    assert_int_equal(bar(0), 0xc000 | PCI_BASE_ADDRESS_SPACE_IO);
    assert_int_equal(bus_read(g.pio, 0xc005, 1), 5);
    assert_int_equal(bar(1), GUEST_MEM);
    assert_int_equal(bus_read(g.mmio, GUEST_MEM + 0x1ffc, 4), 0x01001ffc);
    assert_int_equal(bar(2), (u32)GUEST_MEM64 | PCI_BASE_ADDRESS_MEM_TYPE_64);
    assert_int_equal(bar(3), GUEST_MEM64 >> 32);
    assert_int_equal(bus_read(g.mmio, GUEST_MEM64 + 0x10, 4), 0x02000010);
    bus_write(g.mmio, GUEST_MEM + 6, 0xbeef, 2);
    assert_true(p.wrote_bar == 1 && p.wrote_off == 6 && p.wrote_val == 0xbeef && p.wrote_size == 2);
}

static void test_sizing(void **state UNUSED)
{
    static const u32 want[] = { 0xffffffe1, 0xffffe000, 0xffc00004, 0xffffffff, 0xfffff000, 0 };

    for (unsigned n = 0; n < PCI_BARS; n++) {
        u32 old = bar(n);

        wr(PCI_BASE_ADDRESS_0 + 4 * n, 0xffffffff, 4);
        assert_int_equal(bar(n), want[n]);
        wr(PCI_BASE_ADDRESS_0 + 4 * n, old, 4);
        assert_int_equal(bar(n), old);
    }
    assert_int_equal(bus_read(g.mmio, GUEST_MEM + 8, 4), 0x01000008);
    wr(PCI_ROM_ADDRESS, 0xffffffff, 4);
    assert_int_equal(rd(PCI_ROM_ADDRESS, 4), 0);
}

static void test_move(void **state UNUSED)
{
    wr(PCI_BASE_ADDRESS_1, GUEST_MEM + 0x80000, 4);
    assert_int_equal(bus_read(g.mmio, GUEST_MEM, 4), 0xffffffff);
    assert_int_equal(bus_read(g.mmio, GUEST_MEM + 0x80004, 4), 0x01000004);
    wr(PCI_COMMAND, 0, 2);
    assert_int_equal(bus_read(g.mmio, GUEST_MEM + 0x80004, 4), 0xffffffff);
    assert_int_equal(bus_read(g.pio, 0xc000, 4), 0xffffffff);
    wr(PCI_COMMAND, PCI_COMMAND_IO, 2);
    assert_int_equal(bus_read(g.pio, 0xc004, 4), 4);
    wr(PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MEMORY, 2);
    wr(PCI_BASE_ADDRESS_1 + 2, GUEST_MEM >> 16, 2);                /* in parts */
    wr(PCI_BASE_ADDRESS_1, 0, 2);
    assert_int_equal(bus_read(g.mmio, GUEST_MEM + 4, 4), 0x01000004);
}

/* A BAR cannot be laid over what is not behind the bridge. */
static void test_outside_window(void **state UNUSED)
{
    static const u32 bad[] = { 0xfee00000, 0, GUEST_MEM - 8192, GUEST_MEM + 1 * MiB, 0xfffff000 };

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        wr(PCI_BASE_ADDRESS_1, bad[i], 4);
        assert_int_equal(bus_read(g.mmio, bad[i] + 4, 4), 0xffffffff);
    }
    wr(PCI_BASE_ADDRESS_0, 0xcf8, 4);
    address(0x80000000);
    assert_int_equal(bus_read(g.pio, 0xcfc, 4), 0x00081b36);       /* still the bridge's */
    pci_fn_reset(&p.fn);
    assert_int_equal(bus_read(g.mmio, GUEST_MEM + 4, 4), 0x01000004);
}

/* Random writes change only what may change. */
static void test_write_masks(void **state UNUSED)
{
    u32 before[16];

    for (unsigned i = 0; i < 16; i++)
        before[i] = rd(4 * i, 4);
    for (unsigned off = 0; off < 256; off += 4) {
        wr(off, 0xffffffff, 4);
        wr(off, 0, 4);
        wr(off, 0xa5a5a5a5, 4);
    }
    assert_int_equal(rd(PCI_VENDOR_ID, 4), before[0]);
    assert_int_equal(rd(PCI_CLASS_REVISION, 4), before[2]);
    assert_int_equal(rd(PCI_SUBSYSTEM_VENDOR_ID, 4), before[11]);
    assert_int_equal(rd(PCI_CAPABILITY_LIST, 4), before[13]);
    assert_int_equal(rd(PCI_COMMAND, 2) & ~(PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY |
                                            PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE), 0);
    assert_int_equal(rd(PCI_STATUS, 2), before[1] >> 16);
    pci_fn_reset(&p.fn);
    for (unsigned i = 0; i < 16; i++)
        assert_int_equal(rd(4 * i, 4), before[i]);
}

static void test_capabilities(void **state UNUSED)
{
    unsigned first = rd(PCI_CAPABILITY_LIST, 1), second = rd(first + 1, 1);

    assert_int_equal(rd(PCI_STATUS, 2) & PCI_STATUS_CAP_LIST, PCI_STATUS_CAP_LIST);
    assert_int_equal(rd(first, 1), PCI_CAP_ID_MSIX);
    assert_int_equal(rd(first + PCI_MSIX_FLAGS, 2), VECTORS - 1);
    assert_int_equal(rd(first + PCI_MSIX_TABLE, 4), 4);
    assert_int_equal(rd(first + PCI_MSIX_PBA, 4), 4 | 0x800);
    assert_int_equal(rd(second, 1), PCI_CAP_ID_MSI);
    assert_int_equal(rd(second + 1, 1), 0);
    assert_int_equal(rd(second + PCI_MSI_FLAGS, 2), PCI_MSI_FLAGS_64BIT | PCI_MSI_FLAGS_MASKBIT | 2 << 1);
}

static void intx(bool level)
{
    pthread_mutex_lock(&p.device.lock);
    pci_intx(&p.fn, level);
    pthread_mutex_unlock(&p.device.lock);
}

static void test_intx(void **state UNUSED)
{
    intx(true);
    assert_int_equal(g.intx, 1);
    assert_true(rd(PCI_STATUS, 2) & PCI_STATUS_INTERRUPT);
    wr(PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, 2);
    assert_int_equal(g.intx, 0);
    assert_true(rd(PCI_STATUS, 2) & PCI_STATUS_INTERRUPT);         /* the request is there, only the pin is silent */
    wr(PCI_COMMAND, 0, 2);
    assert_int_equal(g.intx, 1);
    intx(false);
    assert_int_equal(g.intx, 0);
    assert_false(rd(PCI_STATUS, 2) & PCI_STATUS_INTERRUPT);
    intx(true);
    pci_fn_reset(&p.fn);
    assert_int_equal(g.intx, 0);
}

/* --- MSI-X --- */

static u64 table(unsigned vector)
{
    return (bar(4) & ~15u) + 16 * vector;
}

static u32 pending(unsigned vector)
{
    return bus_read(g.mmio, (bar(4) & ~15u) + 0x800 + vector / 32 * 4, 4) >> vector % 32 & 1;
}

static void msix_flags(u16 flags)
{
    wr(rd(PCI_CAPABILITY_LIST, 1) + PCI_MSIX_FLAGS, flags, 2);
}

static void msix_signal(unsigned vector)
{
    pthread_mutex_lock(&p.device.lock);
    pci_msix_signal(&p.fn, vector);
    pthread_mutex_unlock(&p.device.lock);
}

static void test_msix(void **state UNUSED)
{
    wr(PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    assert_int_equal(bus_read(g.mmio, table(VECTORS - 1) + 12, 4), 1); /* masked from the start */
    bus_write(g.mmio, table(65), 0xfee01003, 4);
    bus_write(g.mmio, table(65) + 4, 0x1, 4);
    bus_write(g.mmio, table(65) + 8, 65, 4);
    assert_int_equal(bus_read(g.mmio, table(65), 8), 0x1fee01000);
    msix_signal(65);
    assert_int_equal(pending(65), 0);                              /* MSI-X is off: nothing happens */
    msix_flags(PCI_MSIX_FLAGS_ENABLE);
    msix_signal(65);
    assert_int_equal(g.msi[65], 0);
    assert_int_equal(pending(65), 1);
    bus_write(g.mmio, table(65) + 12, 0, 4);
    assert_int_equal(g.msi[65], 1);
    assert_int_equal(pending(65), 0);
    msix_signal(65);
    assert_int_equal(g.msi[65], 2);
    msix_flags(PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL);
    msix_signal(65);
    msix_signal(65);
    assert_int_equal(pending(65), 1);
    msix_flags(PCI_MSIX_FLAGS_ENABLE);
    assert_int_equal(g.msi[65], 3);
    msix_signal(VECTORS);                                          /* there is no such vector */
    msix_signal(0xffff);
    assert_int_equal(g.msi_total, 3);
    pci_fn_reset(&p.fn);
    assert_int_equal(bus_read(g.mmio, table(65) + 12, 4), 1);
    assert_int_equal(bus_read(g.mmio, table(65), 8), 0);
}

static void test_msix_table_accesses(void **state UNUSED)
{
    bus_write(g.mmio, table(1) + 8, 0x12345678, 4);
    bus_write(g.mmio, table(1) + 8, 0xff, 1);                      /* only whole dwords are written */
    assert_int_equal(bus_read(g.mmio, table(1) + 8, 4), 0x12345678);
    assert_int_equal(bus_read(g.mmio, table(1) + 9, 1), 0x56);
    bus_write(g.mmio, table(1), 0x1122334455667788, 8);            /* or two at once */
    assert_int_equal(bus_read(g.mmio, table(1), 8), 0x1122334455667788);
    bus_write(g.mmio, table(1) + 12, 0xffffffff, 4);
    assert_int_equal(bus_read(g.mmio, table(1) + 12, 4), 1);
    bus_write(g.mmio, table(0) + 0x800, 0xffffffff, 4);
    assert_int_equal(pending(0), 0);
    for (unsigned off = VECTORS * 16; off < 0x800; off += 4) {
        bus_write(g.mmio, table(0) + off, ~0u, 4);
        assert_int_equal(bus_read(g.mmio, table(0) + off, 4), 0);
    }
    for (unsigned off = 0x810; off < 0x1000; off += 4)
        assert_int_equal(bus_read(g.mmio, table(0) + off, 4), 0);
}

/* Messages are memory writes: without bus mastership they wait. While MSI-X is on, the pin is silent. */
static void test_msix_needs_master(void **state UNUSED)
{
    msix_flags(PCI_MSIX_FLAGS_ENABLE);
    bus_write(g.mmio, table(0) + 12, 0, 4);
    intx(true);
    assert_int_equal(g.intx, 0);
    msix_signal(0);
    assert_int_equal(g.msi_total, 0);
    wr(PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    assert_int_equal(g.msi_total, 1);
    msix_flags(0);
    assert_int_equal(g.intx, 1);
}

/* --- MSI --- */

static unsigned msi_cap(void)
{
    return rd(rd(PCI_CAPABILITY_LIST, 1) + 1, 1);
}

static void msi_signal(unsigned vector)
{
    pthread_mutex_lock(&p.device.lock);
    pci_msi_signal(&p.fn, vector);
    pthread_mutex_unlock(&p.device.lock);
}

static void test_msi(void **state UNUSED)
{
    unsigned cap = msi_cap();

    wr(PCI_COMMAND, PCI_COMMAND_MASTER, 2);
    wr(cap + PCI_MSI_ADDRESS_LO, 0xfee00000, 4);
    wr(cap + PCI_MSI_DATA_64, 0x40, 2);
    msi_signal(0);
    assert_int_equal(g.msi_total, 0);
    wr(cap + PCI_MSI_FLAGS, PCI_MSI_FLAGS_ENABLE | 2 << 4, 2);     /* four messages */
    msi_signal(3);
    assert_int_equal(g.msi[0x43], 1);
    wr(cap + PCI_MSI_FLAGS, PCI_MSI_FLAGS_ENABLE | 1 << 4, 2);     /* two: vectors 1 and 3 share one */
    msi_signal(3);
    assert_int_equal(g.msi[0x41], 1);
    wr(cap + PCI_MSI_FLAGS, PCI_MSI_FLAGS_ENABLE | 7 << 4, 2);     /* reserved: no more than it has */
    msi_signal(2);
    assert_int_equal(g.msi[0x42], 1);
    wr(cap + PCI_MSI_MASK_64, 0xffffffff, 4);
    assert_int_equal(rd(cap + PCI_MSI_MASK_64, 4), 0xf);
    msi_signal(1);
    assert_int_equal(rd(cap + PCI_MSI_PENDING_64, 4), 2);
    assert_int_equal(g.msi[0x41], 1);
    wr(cap + PCI_MSI_MASK_64, 0xd, 4);
    assert_int_equal(rd(cap + PCI_MSI_PENDING_64, 4), 0);
    assert_int_equal(g.msi[0x41], 2);
    msi_signal(4);
    assert_int_equal(g.msi_total, 4);
}

static void test_state(void **state UNUSED)
{
    struct stream s, l;

    wr(PCI_BASE_ADDRESS_1, GUEST_MEM + 0x40000, 4);
    wr(PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    msix_flags(PCI_MSIX_FLAGS_ENABLE);
    bus_write(g.mmio, table(2) + 8, 2, 4);
    msix_signal(2);
    stream_save_init(&s);
    pci_fn_state(&p.fn, &s);
    assert_int_equal(s.error, 0);
    pci_fn_reset(&p.fn);
    assert_int_equal(pending(2), 0);
    s.buf[1 + 3 + 4] = 0xaa;                                       /* the vendor id: bytes that are fixed cannot be loaded */
    stream_load_init(&l, s.buf, s.len);
    pci_fn_state(&p.fn, &l);
    assert_int_equal(l.error, 0);
    assert_int_equal(rd(PCI_VENDOR_ID, 2), 0x1234);
    assert_int_equal(bus_read(g.mmio, GUEST_MEM + 0x40004, 4), 0x01000004);
    assert_int_equal(pending(2), 1);
    bus_write(g.mmio, table(2) + 12, 0, 4);
    wr(PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    assert_int_equal(g.msi[2], 1);
    stream_load_init(&l, s.buf, 100);                              /* cut short */
    pci_fn_state(&p.fn, &l);
    assert_int_not_equal(l.error, 0);
    stream_free(&s);
}

static void test_full_window(void **state UNUSED)
{
    struct probe other = { 0 };

    device_init(&other.device, &probe_ops);
    assert_int_equal(pci_add(g.pci, &other.fn, 5, &probe_id, &probe_fn_ops, &other.device.lock), 0);
    assert_int_equal(pci_bar(&other.fn, 0, PCI_BAR_MEM32, 2 * MiB, "big"), -ENOSPC);
    assert_int_equal(pci_bar(&other.fn, 0, PCI_BAR_IO, 8192, "big"), -ENOSPC);
    assert_non_null(strstr(err_last(), "no room for big"));
    assert_int_equal(pci_bar(&other.fn, 0, PCI_BAR_MEM32, 4096, "small"), 0);
    pci_remove(&other.fn);
    assert_int_equal(ecam_read(&g, 5, 0, 4), 0xffffffff);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_identity), T(test_mechanism_1), T(test_absent), T(test_slot_taken), T(test_assigned), T(test_sizing), T(test_move),
        T(test_outside_window), T(test_write_masks), T(test_capabilities), T(test_intx), T(test_msix), T(test_msix_table_accesses),
        T(test_msix_needs_master), T(test_msi), T(test_state), T(test_full_window),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
