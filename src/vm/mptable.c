/*
 * The MP configuration table (MultiProcessor Specification 1.4, chapter 4) and the floating pointer to it (4.1). See
 * mptable.h. Processors are listed by the same APIC IDs as in the MADT; bus 0 is PCI, bus 1 ISA.
 */
#include "vm/mptable.h"

#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "cpu/cpuid.h"

#define PACKED __attribute__((packed))
#define PCI_SLOTS 32u

struct floating {
    char signature[4];
    u32 table;
    u8 length, revision, checksum, features[5];
} PACKED;

struct head {                                                      /* 4.2 */
    char signature[4];
    u16 length;
    u8 revision, checksum;
    char oem[8], product[12];
    u32 oem_table;
    u16 oem_size, entries;
    u32 lapic;
    u16 extended_length;
    u8 extended_checksum, reserved;
} PACKED;
_Static_assert(sizeof(struct floating) == 16 && sizeof(struct head) == 44, "as in chapter 4");

struct cpu_entry {                                                 /* 4.3.1 */
    u8 type, apic, version, flags;
    u32 signature, features, reserved[2];
} PACKED;
struct bus_entry {                                                 /* 4.3.2 */
    u8 type, id;
    char name[6];
} PACKED;
struct ioapic_entry {                                              /* 4.3.3 */
    u8 type, id, version, flags;
    u32 base;
} PACKED;
struct int_entry {                                                 /* 4.3.4, 4.3.5 */
    u8 type, kind;
    u16 flags;
    u8 bus, irq, apic, input;
} PACKED;
enum { ENTRY_CPU, ENTRY_BUS, ENTRY_IOAPIC, ENTRY_INT, ENTRY_LOCAL };
enum { INT_INT, INT_NMI, INT_SMI, INT_EXTINT };
enum { BUS_PCI, BUS_ISA };
#define ACTIVE_HIGH_LEVEL 0xd
#define ALL_LAPICS 0xff

struct table {
    struct head head;
    u8 buf[MPTABLE_SIZE - sizeof(struct head) - sizeof(struct floating)];
};

static u8 sum(const void *p, u32 n)
{
    u8 s = 0;

    for (u32 i = 0; i < n; i++)
        s += ((const u8 *)p)[i];
    return s;
}

static void add(struct table *t, const void *entry, u16 len)
{
    u32 at = t->head.length - (u32)sizeof t->head;

    bug_on(len > sizeof t->buf - at);
    memcpy(t->buf + at, entry, len);
    t->head.length = (u16)(t->head.length + len);
    t->head.entries++;
}

static void add_interrupt(struct table *t, u8 type, u8 kind, u16 flags, u8 bus, u8 irq, u8 apic, u8 input)
{
    struct int_entry e = { type, kind, flags, bus, irq, apic, input };

    add(t, &e, sizeof e);
}

static void add_cpus(struct table *t, const struct acpi_config *c)
{
    const struct cpuid_regs *leaf = cpuid_host(1, 0);

    for (u32 id = 0; id < c->vcpus && id < 255; id++) {
        struct cpu_entry e = { .type = ENTRY_CPU, .apic = (u8)id, .version = 0x14, .flags = id ? 1 : 3, .signature = leaf->eax,
                               .features = leaf->edx };
        add(t, &e, sizeof e);
    }
}

static void add_interrupts(struct table *t, const struct acpi_config *c)
{
    for (u8 irq = 0; irq < 16; irq++)
        if (irq != 2)
            add_interrupt(t, ENTRY_INT, INT_INT, irq == c->sci_irq ? ACTIVE_HIGH_LEVEL : 0, BUS_ISA, irq, c->ioapic_id,
                          irq ? irq : 2);
    for (u8 slot = 0; slot < PCI_SLOTS; slot++)
        for (u8 pin = 0; pin < 4; pin++)
            add_interrupt(t, ENTRY_INT, INT_INT, 0, BUS_PCI, (u8)(slot << 2 | pin), c->ioapic_id,
                          (u8)c->pci_gsi[(slot + pin) % 4]);
    add_interrupt(t, ENTRY_LOCAL, INT_EXTINT, 0, BUS_ISA, 0, ALL_LAPICS, 0);
    add_interrupt(t, ENTRY_LOCAL, INT_NMI, 0, BUS_ISA, 0, ALL_LAPICS, 1);
}

int mptable_write(struct ram *ram, const struct acpi_config *c)
{
    struct bus_entry pci = { ENTRY_BUS, BUS_PCI, "PCI   " }, isa = { ENTRY_BUS, BUS_ISA, "ISA   " };
    struct ioapic_entry ioapic = { ENTRY_IOAPIC, c->ioapic_id, 0x11, 1, c->ioapic_base };
    struct floating f = { .table = MPTABLE_BASE + sizeof f, .length = 1, .revision = 4 };
    struct table *t = calloc(1, sizeof *t);
    int rc = 0;

    if (!t)
        return err(-ENOMEM, "out of memory for the MP table");
    memcpy(t->head.signature, "PCMP", 4);
    memcpy(t->head.oem, "DOPPEL  ", 8);
    memcpy(t->head.product, "PC          ", 12);
    t->head.length = sizeof t->head;
    t->head.revision = 4;
    t->head.lapic = c->lapic_base;
    add_cpus(t, c);
    add(t, &pci, sizeof pci);
    add(t, &isa, sizeof isa);
    add(t, &ioapic, sizeof ioapic);
    add_interrupts(t, c);
    t->head.checksum = (u8)-sum(t, t->head.length);
    memcpy(f.signature, "_MP_", 4);
    f.checksum = (u8)-sum(&f, sizeof f);
    if (ram_write(ram, MPTABLE_BASE, &f, sizeof f) || ram_write(ram, MPTABLE_BASE + sizeof f, t, t->head.length))
        rc = err(-EFAULT, "no memory at 0x%x for the MP table; use a larger --memory", MPTABLE_BASE);
    free(t);
    return rc;
}
