/*
 * The board: every address and every interrupt of the machine stands on this page.
 *
 *   physical memory                                           ports
 *   0x00000000  RAM                                           0x0020 0x00a0 0x04d0  i8259 pair, ELCR
 *   0x000a0000  legacy video memory                           0x0040 0x0061         i8254, speaker
 *   0x000c0000  RAM, reserved from 0xe0000 (ACPI tables)      0x0060 0x0064         i8042
 *   0x00100000  RAM up to 3 GiB                               0x0070 0x0071         mc146818
 *   0xc0000000  PCI memory window                             0x0080 0x0092 0x00ed  POST and delay ports, fast reset
 *                                                             0x00e9 0x00f4         debug console, debug exit
 *   0xe0000000  PCI configuration (ECAM), bus 0               0x02f8 0x03f8         ns16550 COM2, COM1
 *   0xfec00000  I/O APIC                                      0x03b0 to 0x03df      VGA registers
 *   0xfed00000  HPET
 *   0xfee00000  local APIC (each vCPU's own), MSI             0x0505 0x0510         pvpanic, firmware configuration
 *   below 4 GiB firmware, if any                              0x0600 to 0x063f      ACPI power management
 *   0x100000000 the rest of RAM
 *                                                             0x0cf8 0x0cfc 0x0cf9  PCI configuration, reset control
 *                                                             0xc000 to 0xffff      PCI I/O window
 *
 *   interrupts  0 i8254 (I/O APIC pin 2)   1 keyboard   3 COM2   4 COM1   8 mc146818   9 ACPI   12 mouse
 *               20 to 23 HPET, which also replaces i8254 and mc146818 at 0 and 8 if the guest wants so (not with KVM's PIT)
 *               16 to 19 PCI INTA to INTD on the I/O APIC; in i8259 mode 10 (INTA, INTC) and 11 (INTB, INTD)
 *
 * Locking: the wires have a lock of their own, taken after a device's and before a chip's.
 */
#include "vm/board.h"

#include <errno.h>
#include <string.h>

#include "cpu/cpuid.h"
#include "cpu/stats.h"
#include "cpu/vcpu.h"
#include "dev/acpi_pm.h"
#include "dev/debug_exit.h"
#include "dev/debugcon.h"
#include "dev/fw_cfg.h"
#include "dev/hpet.h"
#include "dev/i8042.h"
#include "dev/i8254.h"
#include "dev/i8259.h"
#include "dev/ioapic.h"
#include "dev/lapic.h"
#include "dev/mc146818.h"
#include "dev/ns16550.h"
#include "dev/nvme.h"
#include "dev/pci_host.h"
#include "dev/port80.h"
#include "dev/port92.h"
#include "dev/pvpanic.h"
#include "dev/rst_cnt.h"
#include "dev/vga_mem.h"
#include "dev/virtio_9p.h"
#include "dev/virtio_blk.h"
#include "dev/virtio_console.h"
#include "dev/virtio_fs.h"
#include "dev/virtio_net.h"
#include "dev/virtio_rng.h"
#include "dev/virtio_vsock.h"
#include "io/virtio_pci.h"
#include "vm/boot.h"
#include "vm/fw_items.h"
#include "vm/mptable.h"
#include "vm/nic.h"

#define RAM_LOW_TOP   0xc0000000ull    /* 3 GiB */
#define RAM_HIGH_BASE 0x100000000ull
#define VIDEO_BASE    0x000a0000ull
#define VIDEO_END     0x000c0000ull
#define EBDA_BASE     0x0009f000ull    /* reserved, as where an extended BIOS data area would be */
#define PCI_MEM_BASE  0xc0000000ull
#define PCI_MEM_SIZE  0x20000000ull
#define PCI_MEM_END   0xfec00000ull    /* firmware puts BARs behind the window, too, down from here */
#define ECAM_BASE     0xe0000000ull
#define ECAM_BUSES    1
#define PCI_MEM2_BASE (ECAM_BASE + ECAM_BUSES * PCI_ECAM_BUS_SIZE)
#define PCI_IO_BASE   0xc000u
#define PCI_IO_SIZE   0x4000u
#define ACPI_PM_BASE  0x600u
#define COM1_PORT     0x3f8u
#define COM2_PORT     0x2f8u

enum { IRQ_PIT = 0, IRQ_KEYBOARD = 1, IRQ_COM2 = 3, IRQ_COM1 = 4, IRQ_RTC = 8, IRQ_SCI = 9, IRQ_MOUSE = 12 };
static const u8 pci_gsi[4] = { 16, 17, 18, 19 };                   /* INTA..D on the I/O APIC */
static const u8 pci_isa[4] = { 10, 11, 10, 11 };                   /* the same on the i8259 pair */
#define ELCR 0x0e00                                                /* IRQ 9, 10, 11 are level-triggered */

enum { SLOT_HOST = 0, SLOT_CONSOLE = 1, SLOT_RNG = 2, SLOT_DISK = 3, SLOT_NET = 20, SLOT_VSOCK = 30 };
static const u8 slot_share[VM_SHARES_MAX] = { 19, 28, 29, 31 };

#define DEVICES_MAX (32 + VM_DISKS_MAX + VM_NETS_MAX + VM_SHARES_MAX + VM_VCPUS_MAX)

struct board {
    struct machine *m;
    struct ram ram;
    struct e820 map;
    const struct vm_config *config;

    struct device *device[DEVICES_MAX];                            /* in the order they are built and reset */
    unsigned devices;
    struct pci_bus *pci;
    struct lapic_bus *lapics;
    struct lapic *bsp;
    struct i8259 *pic;
    struct i8254 *pit;
    struct ioapic *ioapic;
    struct acpi_pm *pm;
    struct virtio_console *console;
    struct virtio_vsock *vsock;                                    /* NULL: none */
    struct virtio_net *nic[VM_NETS_MAX];
    unsigned nics;
    struct capture *capture;                                       /* NULL: there is none */
    struct { struct block *block; struct virtio_blk *virtio; struct nvme *nvme; } disk[VM_DISKS_MAX]; /* the block is its device's */
    struct machine_hook hook;

    pthread_mutex_t wire_lock;
    u32 wire[4];                                                   /* devices that pull INTA..D */
};

static void board_add(struct board *b, void *device)
{
    bug_on(b->devices == DEVICES_MAX);
    b->device[b->devices++] = device;
}

/* ---- wires ---- */

/* An ISA interrupt goes to both interrupt controllers; the guest unmasks one of them. */
static void isa_set(void *chip, int n, int level)
{
    struct board *b = chip;
    struct irq_line pic = i8259_irq(b->pic, n), io = ioapic_irq(b->ioapic, n == IRQ_PIT ? 2 : n);

    irq_set(&pic, level);
    irq_set(&io, level);
}

static struct irq_line isa_irq(struct board *b, int n)
{
    return (struct irq_line){ isa_set, b, n };
}

/* INTA# of PCI device n, swizzled: device d pulls wire d % 4, together with others. */
static void pci_wire_set(void *chip, int n, int level)
{
    struct board *b = chip;
    unsigned w = (unsigned)n % 4, other = (w + 2) % 4;
    struct irq_line io = ioapic_irq(b->ioapic, pci_gsi[w]), pic = i8259_irq(b->pic, pci_isa[w]);

    pthread_mutex_lock(&b->wire_lock);
    if (level)
        b->wire[w] |= 1u << n;
    else
        b->wire[w] &= ~(1u << n);
    irq_set(&io, b->wire[w] != 0);
    irq_set(&pic, (b->wire[w] | b->wire[other]) != 0);
    pthread_mutex_unlock(&b->wire_lock);
}

static int attach_virtio(struct board *b, unsigned slot, void *device)
{
    if (b->config->virtio_split)
        ((struct virtio *)device)->offered &= ~BIT(VIRTIO_F_RING_PACKED);
    board_add(b, device);
    return virtio_pci_attach(b->pci, slot, (struct irq_line){ pci_wire_set, b, (int)slot }, pci_isa[slot % 4],
                             !b->config->virtio_modern, device);
}

/* ---- memory ---- */

static int build_ram(struct board *b, u64 size, const char *firmware)
{
    struct e820_entry reserved[] = {
        { EBDA_BASE, VIDEO_BASE - EBDA_BASE, E820_RESERVED },
        { VIDEO_BASE, VIDEO_END - VIDEO_BASE, E820_RESERVED },
        { ACPI_BASE, MiB - ACPI_BASE, E820_RESERVED },              /* and the MP table */
        { ECAM_BASE, ECAM_BUSES * PCI_ECAM_BUS_SIZE, E820_RESERVED },
        { RAM_HIGH_BASE, 0, E820_RESERVED },                       /* firmware */
    };
    u64 low = MIN(size, RAM_LOW_TOP), rom = 0;
    int r = ram_init(&b->ram);

    if (r == 0 && firmware)
        r = boot_firmware_size(firmware, &rom);
    if (r == 0 && rom)
        r = ram_add(&b->ram, RAM_HIGH_BASE - rom, rom);
    reserved[ARRAY_SIZE(reserved) - 1].base -= rom;
    reserved[ARRAY_SIZE(reserved) - 1].size = rom;
    if (r == 0)
        r = ram_add(&b->ram, 0, VIDEO_BASE);
    if (r == 0)
        r = ram_add(&b->ram, VIDEO_END, low - VIDEO_END);
    if (r == 0 && size > low)
        r = ram_add(&b->ram, RAM_HIGH_BASE, size - low);
    if (r == 0)
        r = e820_build(&b->map, &b->ram, reserved, ARRAY_SIZE(reserved));
    return r;
}

/* ---- devices ---- */

/* Makes one device and puts it into the table; leaves build_* with the error otherwise. */
#define BUILD(var, call) \
    do { \
        int r_ = (call); \
        if (r_ < 0) \
            return r_; \
        board_add(b, var); \
    } while (0)

static int build_interrupts(struct board *b)
{
    const struct cpuid_policy *p = b->m->cpuid;
    struct lapic_config cfg = { .clock = b->m->clock, .phys_bits = cpuid_phys_bits(p),
                                .x2apic = cpuid_has(p, CPU_X2APIC), .tsc_deadline = cpuid_has(p, CPU_TSC_DEADLINE) };
    int r = lapic_bus_new(&cfg, &b->lapics);

    if (r < 0)
        return r;
    BUILD(b->pic, i8259_new(b->m->pio, lapic_bus_pic_line(b->lapics), &b->pic));
    lapic_bus_set_pic(b->lapics, b->pic);
    BUILD(b->ioapic, ioapic_new(b->m->mmio, IOAPIC_BASE, (u8)b->config->vcpus, b->lapics, &b->ioapic));
    return 0;
}

/* On every engine that the guest may come to: KVM's PIT has wires of its own, which the HPET cannot cut. */
static bool has_own_i8254(const struct board *b)
{
    const struct vm_config *c = b->config;

    return !c->engine->irqchip && !(c->also && c->also->irqchip);
}

static int build_hpet(struct board *b, struct hpet **out)
{
    struct hpet_config c = { .clock = b->m->clock, .legacy = has_own_i8254(b),
                             .irq0 = isa_irq(b, IRQ_PIT), .irq8 = isa_irq(b, IRQ_RTC) };

    for (int i = 0; i < (int)ARRAY_SIZE(c.pin); i++)
        c.pin[i] = ioapic_irq(b->ioapic, HPET_FIRST_PIN + i);
    BUILD(*out, hpet_new(b->m->mmio, &c, out));
    return 0;
}

static int build_legacy(struct board *b, struct machine_hook hook)
{
    struct bus *pio = b->m->pio;
    struct clock *clock = b->m->clock;
    u64 low = MIN(b->config->memory_bytes, RAM_LOW_TOP);
    struct hpet *hpet;
    struct mc146818 *rtc;
    struct ns16550 *com1, *com2;
    struct i8042 *kbc;
    struct port80 *p80;
    struct port92 *p92;
    struct pvpanic *panic;
    struct vga_mem *vga;

    int r = build_hpet(b, &hpet);
    if (r < 0)
        return r;
    BUILD(b->pit, i8254_new(pio, clock, hpet_i8254_line(hpet), &b->pit));
    BUILD(rtc, mc146818_new(pio, clock, hpet_rtc_line(hpet), low, b->config->memory_bytes - low, &rtc));
    BUILD(com1, ns16550_new(pio, COM1_PORT, "com1", clock, isa_irq(b, IRQ_COM1), b->config->serial, &com1));
    BUILD(com2, ns16550_new(pio, COM2_PORT, "com2", clock, isa_irq(b, IRQ_COM2), NULL, &com2));
    BUILD(kbc, i8042_new(pio, isa_irq(b, IRQ_KEYBOARD), isa_irq(b, IRQ_MOUSE), hook, &kbc));
    BUILD(p80, port80_new(pio, &p80));
    BUILD(p92, port92_new(pio, hook, &p92));
    BUILD(panic, pvpanic_new(pio, PVPANIC_PORT, hook, &panic));
    BUILD(vga, vga_mem_new(pio, b->m->mmio, clock, &vga));
    BUILD(b->pm, acpi_pm_new(pio, ACPI_PM_BASE, clock, isa_irq(b, IRQ_SCI), hook, &b->pm));
    return 0;
}

static int build_debug(struct board *b, struct machine_hook hook)
{
    struct debugcon *con;
    struct debug_exit *end;

    if (!b->config->debug_exit)
        return 0;
    BUILD(con, debugcon_new(b->m->pio, DEBUGCON_PORT, b->config->serial, b->config->log, &con));
    BUILD(end, debug_exit_new(b->m->pio, DEBUG_EXIT_PORT, hook, &end));
    return 0;
}

static struct acpi_config describe(const struct board *b)
{
    struct acpi_config c = {
        .vcpus = b->config->vcpus,
        .lapic_base = LAPIC_BASE,
        .ioapic_base = IOAPIC_BASE,
        .ioapic_id = (u8)b->config->vcpus,
        .sci_irq = IRQ_SCI,
        .pm1_evt = ACPI_PM_BASE + ACPI_PM_EVT,
        .pm1_cnt = ACPI_PM_BASE + ACPI_PM_CNT,
        .pm_timer = ACPI_PM_BASE + ACPI_PM_TMR,
        .pm_timer_32bit = true,
        .gpe0 = ACPI_PM_BASE + ACPI_PM_GPE0,
        .gpe0_len = ACPI_PM_GPE0_LEN,
        .s5_typ = ACPI_SLP_TYP_S5,
        .reset_port = RST_CNT_PORT,
        .reset_value = RST_CNT_FULL,
        .rtc_century = RTC_CENTURY,
        .i8042 = true,
        .vga = false,
        .ecam_base = ECAM_BASE,
        .buses = ECAM_BUSES,
        .pci_io = { { PCI_IO_BASE, PCI_IO_SIZE } },
        .pci_mem32 = { { PCI_MEM_BASE, PCI_MEM_SIZE }, { PCI_MEM2_BASE, PCI_MEM_END - PCI_MEM2_BASE } },
        .serial = { { COM1_PORT, IRQ_COM1 }, { COM2_PORT, IRQ_COM2 } },
        .hpet_base = HPET_BASE,
        .hpet_id = HPET_ID(has_own_i8254(b)),
        .pvpanic_port = PVPANIC_PORT,
        .fw_cfg_port = FW_CFG_PORT,
        .rtc = true,
        .pit = true,
    };

    for (unsigned i = 0; i < 4; i++) {
        c.pci_gsi[i] = pci_gsi[i];
        c.pci_irq[i] = pci_isa[i];
    }
    return c;
}

static int add_firmware_file(void *arg, const char *name, const void *p, u32 len)
{
    return fw_cfg_file(arg, name, p, len);
}

static int build_fw_cfg(struct board *b)
{
    struct fw_cfg *f;

    struct acpi_config c = describe(b);
    int r;

    BUILD(f, fw_cfg_new(b->m->pio, &b->ram, &f));
    r = fw_items_add(f, b->config, &b->map);
    return r < 0 || !b->config->firmware ? r : acpi_export(&c, add_firmware_file, f);
}

static int build_pci(struct board *b, struct machine_hook hook)
{
    struct pci_config cfg = { .pio = b->m->pio, .mmio = b->m->mmio, .msi = lapic_bus_msi(b->lapics),
        .io = { PCI_IO_BASE, PCI_IO_SIZE },
                              .mem = { PCI_MEM_BASE, PCI_MEM_END - PCI_MEM_BASE } };
    struct pci_host *host;
    struct rst_cnt *rst;
    int r = pci_bus_new(&cfg, &b->pci);

    if (r < 0)
        return r;
    BUILD(host, pci_host_new(b->pci, b->m->pio, b->m->mmio, ECAM_BASE, ECAM_BUSES, &host));
    BUILD(rst, rst_cnt_new(b->m->pio, hook, &rst));
    return 0;
}

static int build_console(struct board *b)
{
    struct vport_config port[VIRTIO_CONSOLE_PORTS_MAX] = { 0 };
    const struct vm_config *c = b->config;
    int r;

    if (c->ports == 0)
        return 0;
    bug_on(c->ports > VIRTIO_CONSOLE_PORTS_MAX);
    for (unsigned i = 0; i < c->ports; i++)
        port[i] = (struct vport_config){ .name = c->port[i].name, .ops = c->port[i].ops, .arg = c->port[i].arg };
    r = virtio_console_new(&b->ram, c->log, c->loop, port, c->ports, &b->console);
    return r < 0 ? r : attach_virtio(b, SLOT_CONSOLE, b->console);
}

static int build_vsock(struct board *b)
{
    const struct vm_config *c = b->config;
    int r;

    if (!c->vsock)
        return 0;
    r = virtio_vsock_new(&b->ram, c->log, c->loop, c->vsock, &b->vsock);
    return r < 0 ? r : attach_virtio(b, SLOT_VSOCK, b->vsock);
}

static int build_nics(struct board *b)
{
    const struct vm_config *c = b->config;
    int r = c->capture ? capture_open(c->capture, c->log, &b->capture) : 0;

    for (unsigned i = 0; r == 0 && i < c->nets; i++) {
        r = nic_new(c, i, &b->ram, b->m->clock, b->capture, &b->nic[i]);
        if (r == 0)
            r = attach_virtio(b, SLOT_NET + i, b->nic[b->nics++]);
    }
    return r;
}

/* On any thread. */
static void on_disk_full(void *arg)
{
    struct board *b = arg;

    machine_tell(&b->hook, MACHINE_DISK_FULL);
}

static int build_disk(struct board *b, unsigned i)
{
    const struct vm_disk *d = &b->config->disk[i];
    char serial[VIRTIO_BLK_SERIAL_MAX + 1];
    struct block *block;
    int r = block_open(&d->block, &block);

    if (r < 0)
        return r;
    if (!d->full_is_error)
        block_hold_full(block, on_disk_full, b);
    b->disk[i].block = block;
    if (d->serial)
        snprintf(serial, sizeof serial, "%s", d->serial);
    else
        snprintf(serial, sizeof serial, "disk%u", i);
    if (d->nvme) {
        struct nvme_config c = {
            .ram = &b->ram, .log = b->config->log, .pci = b->pci, .slot = SLOT_DISK + i, .intx = { pci_wire_set, b, (int)(SLOT_DISK + i) },
            .gsi = pci_isa[(SLOT_DISK + i) % 4], .serial = serial, .number = i, .queues = MIN(b->config->vcpus, NVME_QUEUES_MAX),
        };

        BUILD(b->disk[i].nvme, nvme_new(&c, block, &b->disk[i].nvme));
        return 0;
    }
    r = virtio_blk_new(&b->ram, b->config->log, block, serial, MIN(b->config->vcpus, VIRTIO_BLK_QUEUES_MAX), &b->disk[i].virtio);
    return r < 0 ? r : attach_virtio(b, SLOT_DISK + i, b->disk[i].virtio);
}

static int build_virtiofs(struct board *b, unsigned i)
{
    const struct vm_share *share = &b->config->share[i];
    struct virtio_fs *dev;
    int r = virtio_fs_new(&b->ram, b->config->log, b->config->loop, b->m->clock, share->path, share->tag, share->readonly, &dev);

    return r < 0 ? r : attach_virtio(b, slot_share[i], dev);
}

static int build_9p(struct board *b, unsigned i)
{
    const struct vm_share *share = &b->config->share[i];
    struct p9_config config = { .path = share->path, .readonly = share->readonly, .owners = share->owners };
    struct virtio_9p *dev;
    struct p9 *server;
    int r = p9_open(&config, &server);

    if (r == 0)
        r = virtio_9p_new(&b->ram, b->config->log, server, share->tag, &dev);
    return r < 0 ? r : attach_virtio(b, slot_share[i], dev);
}

static int build_virtio(struct board *b)
{
    const struct vm_config *c = b->config;
    struct virtio_rng *rng;
    int r = build_console(b);

    if (r == 0)
        r = virtio_rng_new(&b->ram, c->log, &rng);
    if (r == 0)
        r = attach_virtio(b, SLOT_RNG, rng);
    for (unsigned i = 0; r == 0 && i < c->disks; i++)
        r = build_disk(b, i);
    for (unsigned i = 0; r == 0 && i < c->shares; i++)
        r = c->share[i].virtiofs ? build_virtiofs(b, i) : build_9p(b, i);
    if (r == 0)
        r = build_vsock(b);
    return r < 0 ? r : build_nics(b);
}

int board_new(const struct vm_config *config, struct machine *m, struct machine_hook hook, struct board **out)
{
    struct board *b = calloc(1, sizeof *b);
    int r;

    if (!b)
        return err(-ENOMEM, "out of memory");
    b->config = config;
    b->m = m;
    b->hook = hook;
    pthread_mutex_init(&b->wire_lock, NULL);
    *out = b;                                                      /* freed by the caller, also when half built */
    r = build_ram(b, config->memory_bytes, config->firmware);
    m->ram = &b->ram;
    if (r == 0)
        r = bus_new(NULL, &m->pio);
    if (r == 0)
        r = bus_new(NULL, &m->mmio);
    if (r == 0)
        r = build_interrupts(b);
    if (r == 0)
        r = build_legacy(b, hook);
    if (r == 0)
        r = build_debug(b, hook);
    if (r == 0)
        r = build_fw_cfg(b);
    if (r == 0)
        r = build_pci(b, hook);
    if (r == 0)
        r = build_virtio(b);
    return r;
}

int board_connect_cpus(struct board *b)
{
    for (unsigned i = 0; i < b->m->vcpus; i++) {
        struct vcpu *v = b->m->vcpu[i];
        struct lapic *l;

        BUILD(l, lapic_new(b->lapics, v->mmio, v->id, i == 0, vcpu_port(v), &l));
        v->intc = lapic_intc(l);
        if (i == 0)
            b->bsp = l;
    }
    board_attach_chips(b);
    return 0;
}

void board_attach_chips(struct board *b)
{
    struct irqchip elsewhere = { b->m->engine->irqchip, b->m };

    i8259_attach(b->pic, elsewhere);
    i8254_attach(b->pit, elsewhere);
    ioapic_attach(b->ioapic, elsewhere);
    lapic_bus_attach(b->lapics, elsewhere);
}

void board_free(struct board *b)
{
    if (!b)
        return;
    while (b->devices) {
        struct device *d = b->device[--b->devices];

        d->ops->free(d);
    }
    capture_close(b->capture);
    if (b->lapics)
        lapic_bus_free(b->lapics);
    if (b->pci)
        pci_bus_free(b->pci);
    bus_free(b->m->mmio);
    bus_free(b->m->pio);
    ram_close(&b->ram);
    b->m->ram = NULL;
    pthread_mutex_destroy(&b->wire_lock);
    free(b);
}

/* ---- the whole board ---- */

int board_reset(struct board *b)
{
    for (unsigned i = 0; i < b->devices; i++) {
        struct device *d = b->device[i];

        d->ops->reset(d);
        if (d->stuck)
            return err(-EIO, "%s: the host does not answer a request that may still write into the guest's memory", d->ops->name);
    }
    /* What firmware would have left behind. */
    lapic_virtual_wire(b->bsp);
    i8259_set_elcr(b->pic, ELCR);
    return 0;
}

void board_retry_disks(struct board *b)
{
    for (unsigned i = 0; i < b->config->disks; i++)
        block_retry(b->disk[i].block);
}

unsigned board_waiting(struct board *b)
{
    unsigned n = 0;
    for (unsigned i = 0; i < b->config->disks; i++)
        n += block_held(b->disk[i].block);
    return n;
}

int board_resize_disk(struct board *b, unsigned n, u64 size)
{
    if (n >= b->config->disks)
        return err(-EINVAL, "there is no disk %u", n);
    return b->disk[n].nvme ? nvme_resize(b->disk[n].nvme, size) : virtio_blk_resize(b->disk[n].virtio, size);
}

void board_quiesce(struct board *b)
{
    for (unsigned i = 0; i < b->devices; i++)
        if (b->device[i]->ops->quiesce)
            b->device[i]->ops->quiesce(b->device[i]);
}

void board_state(struct board *b, struct stream *s)
{
    for (unsigned i = 0; i < b->devices; i++) {
        pthread_mutex_lock(&b->device[i]->lock);
        b->device[i]->ops->state(b->device[i], s);
        pthread_mutex_unlock(&b->device[i]->lock);
    }
}

int board_tables(struct board *b, u64 *rsdp_gpa)
{
    struct acpi_config c = describe(b);
    int r = acpi_write(&b->ram, &c, rsdp_gpa);
    return r < 0 ? r : mptable_write(&b->ram, &c);
}

const struct e820 *board_map(const struct board *b)
{
    return &b->map;
}

void board_power_button(struct board *b)
{
    acpi_pm_power_button(b->pm);
}

struct vport *board_port(struct board *b, unsigned n)
{
    return b->console && n < b->config->ports ? virtio_console_port(b->console, n) : NULL;
}

static void disk_info(struct board *b, unsigned i, FILE *f)
{
    struct block *d = b->disk[i].block;
    unsigned held = block_held(d);

    fprintf(f, "disk %u: %s, %s%s, %llu bytes", i, block_path(d), block_kind(d), block_readonly(d) ? ", read-only" : "", (unsigned long long)block_size(d));
    if (held)
        fprintf(f, ", %u requests wait for room on the host", held);
    fputc('\n', f);
}

void board_info_disks(struct board *b, FILE *f)
{
    for (unsigned i = 0; i < b->config->disks; i++)
        disk_info(b, i, f);
}

void board_info(struct board *b, FILE *f)
{
    fprintf(f, "devices:");
    for (unsigned i = 0; i < b->devices; i++)
        fprintf(f, " %s", b->device[i]->ops->name);
    fputc('\n', f);
    for (unsigned i = 0; i < b->ram.runs; i++)
        fprintf(f, "ram: 0x%llx to 0x%llx\n", (unsigned long long)b->ram.run[i].gpa,
                (unsigned long long)(b->ram.run[i].gpa + b->ram.run[i].size - 1));
    board_info_disks(b, f);
    for (unsigned i = 0; i < b->nics; i++) {
        fprintf(f, "net %u: ", i);
        virtio_net_info(b->nic[i], f);
        fputc('\n', f);
    }
}

static void disk_stats(const struct board *b, unsigned i, struct stats *s)
{
    struct block_counts c = b->disk[i].nvme ? nvme_counts(b->disk[i].nvme) : virtio_blk_counts(b->disk[i].virtio);
    char name[16];

    snprintf(name, sizeof(name), "disk%u", i);
    stats_group(s, name);
    stats_u64(s, "requests", c.requests);
    stats_u64(s, "at-once", c.at_once);
    stats_u64(s, "notifications", c.notifications);
    stats_group_end(s);
}

static void vsock_stats(struct virtio_vsock *v, struct stats *s)
{
    struct virtio_vsock_counts c = virtio_vsock_counts(v);

    stats_group(s, "vsock");
    stats_u64(s, "sent", c.sent);
    stats_u64(s, "received", c.received);
    stats_u64(s, "notifications", c.notifications);
    stats_group_end(s);
}

void board_stats(struct board *b, struct stats *s)
{
    for (unsigned i = 0; i < b->config->disks; i++)
        disk_stats(b, i, s);
    for (unsigned i = 0; i < b->nics; i++)
        nic_stats(b->nic[i], i, s);
    if (b->vsock)
        vsock_stats(b->vsock, s);
}

int board_set_link(struct board *b, unsigned n, bool up)
{
    if (n >= b->nics)
        return err(-ENOENT, "there is no network card %u", n);
    virtio_net_set_link(b->nic[n], up);
    return 0;
}
