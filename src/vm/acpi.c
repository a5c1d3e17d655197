/*
 * The ACPI tables (ACPI specification 6.4; section numbers below are its). See acpi.h.
 *
 * All tables are built in one buffer that mirrors ACPI_BASE.., then written to the guest. For firmware the buffer begins at
 * 0, and the places of pointers are noted for it, in the form that SeaBIOS's src/fw/romfile_loader.h describes. The DSDT is the little that
 * an operating system cannot find out by itself: power-off, the PCI windows and interrupt routing, and the ISA devices.
 * Left out: processors as devices (the MADT lists them), sleep states but S5, GPE methods, thermal and battery devices.
 */
#include "vm/acpi.h"

#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "vm/aml.h"

#define PACKED __attribute__((packed))
#define OEM_ID "DOPPEL"
#define OEM_TABLE_ID "DOPPELPC"
#define CREATOR "DPPL"

struct rsdp {                                                      /* 5.2.5.3 */
    char signature[8];
    u8 checksum;
    char oem_id[6];
    u8 revision;
    u32 rsdt;
    u32 length;
    u64 xsdt;
    u8 extended_checksum;
    u8 reserved[3];
} PACKED;

struct table_head {                                                /* 5.2.6 */
    char signature[4];
    u32 length;
    u8 revision, checksum;
    char oem_id[6], oem_table_id[8];
    u32 oem_revision;
    char creator_id[4];
    u32 creator_revision;
} PACKED;

struct gas {                                                       /* generic address structure, 5.2.3.2 */
    u8 space, width, offset, access;
    u64 address;
} PACKED;
enum { GAS_IO = 1 };
enum { ACCESS_BYTE = 1, ACCESS_WORD, ACCESS_DWORD };

struct fadt {                                                      /* 5.2.9 */
    struct table_head head;
    u32 facs, dsdt;
    u8 reserved0, pm_profile;
    u16 sci_int;
    u32 smi_cmd;
    u8 acpi_enable, acpi_disable, s4bios_req, pstate_cnt;
    u32 pm1a_evt, pm1b_evt, pm1a_cnt, pm1b_cnt, pm2_cnt, pm_tmr, gpe0, gpe1;
    u8 pm1_evt_len, pm1_cnt_len, pm2_cnt_len, pm_tmr_len, gpe0_len, gpe1_len, gpe1_base, cst_cnt;
    u16 p_lvl2_lat, p_lvl3_lat, flush_size, flush_stride;
    u8 duty_offset, duty_width, day_alarm, mon_alarm, century;
    u16 boot_arch;
    u8 reserved1;
    u32 flags;
    struct gas reset_reg;
    u8 reset_value;
    u16 arm_boot_arch;
    u8 minor_version;
    u64 x_facs, x_dsdt;
    struct gas x_pm1a_evt, x_pm1b_evt, x_pm1a_cnt, x_pm1b_cnt, x_pm2_cnt, x_pm_tmr, x_gpe0, x_gpe1;
    struct gas sleep_control, sleep_status;
    u64 hypervisor;
} PACKED;
_Static_assert(sizeof(struct fadt) == 276, "FADT of revision 6");
enum { FADT_WBINVD = 1 << 0, FADT_PROC_C1 = 1 << 2, FADT_SLP_BUTTON = 1 << 5, FADT_FIX_RTC = 1 << 6 };
enum { FADT_TMR_VAL_EXT = 1 << 8, FADT_RESET_REG_SUP = 1 << 10 };
enum { BOOT_LEGACY_DEVICES = 1 << 0, BOOT_8042 = 1 << 1, BOOT_NO_VGA = 1 << 2, BOOT_NO_RTC = 1 << 5 };

struct facs {                                                      /* 5.2.10 */
    char signature[4];
    u32 length, hardware_signature, waking_vector, global_lock, flags;
    u64 x_waking_vector;
    u8 version, reserved[31];
} PACKED;
_Static_assert(sizeof(struct facs) == 64, "FACS");

#define FIXUPS_MAX 32

/* The area ACPI_BASE .. ACPI_BASE + ACPI_SIZE, or the firmware's file of tables. */
struct area {
    struct aml out;
    u32 base;                                                      /* of buf, for pointers */
    bool firmware;                                                 /* it adds its base to pointers, and makes checksums */
    struct { u32 at, size; } pointer[FIXUPS_MAX];
    struct { u32 at, size; } table[FIXUPS_MAX];
    unsigned pointers, tables;
    u8 buf[ACPI_SIZE];
};

static u8 checksum(const void *p, u32 n)
{
    u8 sum = 0;
    for (u32 i = 0; i < n; i++)
        sum += ((const u8 *)p)[i];
    return (u8)-sum;
}

static u32 area_gpa(const struct area *ar)
{
    return ar->base + ar->out.pos;
}

/* A pointer of that size into the area stands at gpa. */
static void area_pointer(struct area *ar, u32 gpa, u32 size)
{
    bug_on(ar->pointers == FIXUPS_MAX);
    ar->pointer[ar->pointers].at = gpa - ar->base;
    ar->pointer[ar->pointers++].size = size;
}

static void area_align(struct area *ar, u32 align)
{
    while (ar->out.pos % align && !ar->out.full)
        aml_u8(&ar->out, 0);
}

static struct table_head head_of(const char *signature, u8 revision)
{
    struct table_head h = { .revision = revision, .oem_revision = 1, .creator_revision = 1 };

    memcpy(h.signature, signature, sizeof h.signature);
    memcpy(h.oem_id, OEM_ID, sizeof h.oem_id);
    memcpy(h.oem_table_id, OEM_TABLE_ID, sizeof h.oem_table_id);
    memcpy(h.creator_id, CREATOR, sizeof h.creator_id);
    return h;
}

/* Tables that grow while they are written: begin, content, end with length and checksum. */
static u32 table_begin(struct area *ar, const char *signature, u8 revision)
{
    area_align(ar, 16);
    u32 gpa = area_gpa(ar);
    struct table_head h = head_of(signature, revision);
    aml_bytes(&ar->out, &h, sizeof h);
    return gpa;
}

static void table_end(struct area *ar, u32 gpa)
{
    struct table_head h;
    u8 *p = ar->buf + (gpa - ar->base);

    if (ar->out.full)
        return;
    memcpy(&h, p, sizeof h);
    h.length = area_gpa(ar) - gpa;
    memcpy(p, &h, sizeof h);
    bug_on(ar->tables == FIXUPS_MAX);
    ar->table[ar->tables].at = gpa - ar->base;
    ar->table[ar->tables++].size = h.length;
    if (ar->firmware)
        return;
    h.checksum = checksum(p, h.length);
    memcpy(p, &h, sizeof h);
}

/* ---- DSDT (5.2.11.1) ---- */

static void device_begin(struct aml *a, const char *name, const char *hid)
{
    aml_device(a, name);
    aml_name(a, "_HID");
    if (!strncmp(hid, "PNP", 3))
        aml_eisaid(a, hid);
    else
        aml_string(a, hid);
}

/* An ISA device with up to two port ranges; irq 0 is none, but for the timer. */
static void isa_device(struct aml *a, const char *name, const char *hid, u16 port, u8 len, u16 port2, int irq)
{
    device_begin(a, name, hid);
    aml_name(a, "_CRS");
    aml_resources(a);
    if (port)
        aml_res_io(a, port, len);
    if (port2)
        aml_res_io(a, port2, 1);
    if (irq >= 0)
        aml_res_irq(a, (u8)irq);
    aml_resources_end(a);
    aml_end(a);
}

/* _PRT (6.2.13): address, pin, source 0, global system interrupt. */
static void routing(struct aml *a, const char *name, const u32 gsi[4])
{
    aml_name(a, name);
    aml_package(a, 32 * 4);
    for (u32 slot = 0; slot < 32; slot++)
        for (u32 pin = 0; pin < 4; pin++) {
            aml_package(a, 4);
            aml_int(a, slot << 16 | 0xffff);
            aml_int(a, pin);
            aml_int(a, 0);
            aml_int(a, gsi[(slot + pin) % 4]);
            aml_end(a);
        }
    aml_end(a);
}

static void host_bridge(struct aml *a, const struct acpi_config *c)
{
    const u32 isa[4] = { c->pci_irq[0], c->pci_irq[1], c->pci_irq[2], c->pci_irq[3] };

    device_begin(a, "PCI0", "PNP0A03");
    aml_name(a, "_UID");
    aml_int(a, 0);
    aml_name(a, "_BBN");
    aml_int(a, 0);
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_res_bus(a, 0, (u16)(c->buses - 1));
    aml_res_io(a, 0xcf8, 8);
    for (unsigned i = 0; i < ARRAY_SIZE(c->pci_io); i++)
        if (c->pci_io[i].size)
            aml_res_io_window(a, (u16)c->pci_io[i].base, (u32)c->pci_io[i].size);
    for (unsigned i = 0; i < ARRAY_SIZE(c->pci_mem32); i++)
        if (c->pci_mem32[i].size)
            aml_res_mem32_window(a, (u32)c->pci_mem32[i].base, (u32)c->pci_mem32[i].size);
    if (c->pci_mem64.size)
        aml_res_mem64_window(a, c->pci_mem64.base, c->pci_mem64.size);
    aml_resources_end(a);
    /* \_PIC(1) tells that the system uses the I/O APIC (5.8.1); before that, interrupts go to the i8259. */
    routing(a, "PRTA", c->pci_gsi);
    if (isa[0])
        routing(a, "PRTP", isa);
    aml_method(a, "_PRT", 0);
    if (isa[0]) {
        aml_if(a, "\\PICF");
        aml_return(a, "PRTA");
        aml_end(a);
        aml_return(a, "PRTP");
    } else {
        aml_return(a, "PRTA");
    }
    aml_end(a);
    aml_end(a);
}

static void isa_devices(struct aml *a, const struct acpi_config *c)
{
    for (unsigned i = 0; i < ARRAY_SIZE(c->serial); i++) {
        char name[5] = { 'C', 'O', 'M', (char)('1' + i), 0 };
        if (!c->serial[i].port)
            continue;
        device_begin(a, name, "PNP0501");
        aml_name(a, "_UID");
        aml_int(a, i + 1);
        aml_name(a, "_CRS");
        aml_resources(a);
        aml_res_io(a, c->serial[i].port, 8);
        aml_res_irq(a, c->serial[i].irq);
        aml_resources_end(a);
        aml_end(a);
    }
    if (c->rtc)
        isa_device(a, "RTC", "PNP0B00", 0x70, 2, 0, 8);
    if (c->pit)
        isa_device(a, "TIMR", "PNP0100", 0x40, 4, 0, 0);
    if (c->i8042) {
        isa_device(a, "KBD", "PNP0303", 0x60, 1, 0x64, 1);
        isa_device(a, "MOU", "PNP0F13", 0, 0, 0, 12);
    }
    if (c->fw_cfg_port)
        isa_device(a, "FWCF", "QEMU0002", c->fw_cfg_port, 12, 0, -1);
    if (c->pvpanic_port)
        isa_device(a, "PEVT", "QEMU0001", c->pvpanic_port, 1, 0, -1);
}

/* What belongs to the board and to no device: operating systems keep their hands off it, and trust ECAM only if it is
 * listed here. */
static void board_resources(struct aml *a, const struct acpi_config *c)
{
    device_begin(a, "MRES", "PNP0C02");
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_res_io(a, c->pm1_evt, 4);
    aml_res_io(a, c->pm1_cnt, 2);
    aml_res_io(a, c->pm_timer, 4);
    if (c->gpe0_len)
        aml_res_io(a, c->gpe0, c->gpe0_len);
    if (c->ecam_base && c->ecam_base < 4 * GiB)
        aml_res_memory(a, (u32)c->ecam_base, c->buses << 20);
    aml_resources_end(a);
    aml_end(a);
}

static u32 write_dsdt(struct area *ar, const struct acpi_config *c)
{
    struct aml *a = &ar->out;
    u32 gpa = table_begin(ar, "DSDT", 2);

    aml_name(a, "\\_S5");
    aml_package(a, 4);
    aml_int(a, c->s5_typ);
    aml_int(a, c->s5_typ);
    aml_int(a, 0);
    aml_int(a, 0);
    aml_end(a);
    aml_name(a, "\\PICF");
    aml_int(a, 0);
    aml_method(a, "\\_PIC", 1);
    aml_store_arg0(a, "\\PICF");
    aml_end(a);
    aml_scope(a, "\\_SB");
    host_bridge(a, c);
    isa_devices(a, c);
    board_resources(a, c);
    aml_end(a);
    table_end(ar, gpa);
    return gpa;
}

/* ---- FADT, FACS ---- */

static u32 write_facs(struct area *ar)
{
    struct facs f = { .signature = { 'F', 'A', 'C', 'S' }, .length = sizeof f, .version = 2 };

    area_align(ar, 64);
    u32 gpa = area_gpa(ar);
    aml_bytes(&ar->out, &f, sizeof f);
    return gpa;
}

static struct gas io_gas(u16 port, unsigned bits, u8 access)
{
    return port ? (struct gas){ .space = GAS_IO, .width = (u8)bits, .access = access, .address = port }
                : (struct gas){ 0 };
}

static u32 write_fadt(struct area *ar, const struct acpi_config *c, u32 facs, u32 dsdt)
{
    struct fadt f = {
        .facs = facs,
        .dsdt = dsdt,
        .pm_profile = 1, /* desktop */
        .sci_int = c->sci_irq,
        .smi_cmd = c->smi_cmd,
        .acpi_enable = c->acpi_enable,
        .acpi_disable = c->acpi_disable,
        .pm1a_evt = c->pm1_evt,
        .pm1a_cnt = c->pm1_cnt,
        .pm_tmr = c->pm_timer,
        .gpe0 = c->gpe0_len ? c->gpe0 : 0,
        .pm1_evt_len = 4,
        .pm1_cnt_len = 2,
        .pm_tmr_len = 4,
        .gpe0_len = c->gpe0_len,
        .p_lvl2_lat = 0xffff, /* no C2, no C3 */
        .p_lvl3_lat = 0xffff,
        .century = c->rtc_century,
        .boot_arch =
            BOOT_LEGACY_DEVICES | (c->i8042 ? BOOT_8042 : 0) | (c->vga ? 0 : BOOT_NO_VGA) | (c->rtc ? 0 : BOOT_NO_RTC),
        .flags = FADT_WBINVD | FADT_PROC_C1 | FADT_SLP_BUTTON | FADT_FIX_RTC |
                 (c->pm_timer_32bit ? FADT_TMR_VAL_EXT : 0) | (c->reset_port ? FADT_RESET_REG_SUP : 0),
        .reset_reg = io_gas(c->reset_port, 8, ACCESS_BYTE),
        .reset_value = c->reset_value,
        .minor_version = 4,
        .x_dsdt = dsdt,
        .x_pm1a_evt = io_gas(c->pm1_evt, 32, ACCESS_WORD),
        .x_pm1a_cnt = io_gas(c->pm1_cnt, 16, ACCESS_WORD),
        .x_pm_tmr = io_gas(c->pm_timer, 32, ACCESS_DWORD),
        .x_gpe0 = io_gas(c->gpe0_len ? c->gpe0 : 0, c->gpe0_len * 8u, ACCESS_BYTE),
    };
    u32 gpa = table_begin(ar, "FACP", 6);

    area_pointer(ar, gpa + offsetof(struct fadt, facs), 4);
    area_pointer(ar, gpa + offsetof(struct fadt, dsdt), 4);
    area_pointer(ar, gpa + offsetof(struct fadt, x_dsdt), 8);
    aml_bytes(&ar->out, (u8 *)&f + sizeof f.head, sizeof f - sizeof f.head);
    table_end(ar, gpa);
    return gpa;
}

/* ---- MADT (5.2.12), MCFG (PCI firmware specification 3.x, 4.1.2) ---- */

enum { MADT_LAPIC = 0, MADT_IOAPIC = 1, MADT_OVERRIDE = 2, MADT_LAPIC_NMI = 4, MADT_X2APIC = 9, MADT_X2APIC_NMI = 10 };
enum { INTI_HIGH = 1, INTI_EDGE = 1 << 2, INTI_LEVEL = 3 << 2 };   /* MPS INTI flags, 5.2.12.5 */
#define XAPIC_ID_MAX 254

static void madt_cpu(struct aml *a, u32 id)
{
    if (id <= XAPIC_ID_MAX) {
        aml_u8(a, MADT_LAPIC);
        aml_u8(a, 8);
        aml_u8(a, (u8)id);                                         /* processor UID */
        aml_u8(a, (u8)id);
        aml_u32(a, 1);                                             /* enabled */
    } else {
        aml_u8(a, MADT_X2APIC);
        aml_u8(a, 16);
        aml_u16(a, 0);
        aml_u32(a, id);
        aml_u32(a, 1);
        aml_u32(a, id);
    }
}

static void madt_override(struct aml *a, u8 irq, u32 gsi, u16 flags)
{
    aml_u8(a, MADT_OVERRIDE);
    aml_u8(a, 10);
    aml_u8(a, 0);                                                  /* ISA */
    aml_u8(a, irq);
    aml_u32(a, gsi);
    aml_u16(a, flags);
}

static u32 write_madt(struct area *ar, const struct acpi_config *c)
{
    struct aml *a = &ar->out;
    u32 gpa = table_begin(ar, "APIC", 5);

    aml_u32(a, c->lapic_base);
    aml_u32(a, 1);                                                 /* PCAT_COMPAT: there is an i8259 pair too */
    for (u32 id = 0; id < c->vcpus; id++)
        madt_cpu(a, id);
    aml_u8(a, MADT_IOAPIC);
    aml_u8(a, 12);
    aml_u8(a, c->ioapic_id);
    aml_u8(a, 0);
    aml_u32(a, c->ioapic_base);
    aml_u32(a, 0);                                                 /* first GSI */
    madt_override(a, 0, 2, 0);
    madt_override(a, c->sci_irq, c->sci_irq, INTI_HIGH | INTI_LEVEL);
    aml_u8(a, MADT_LAPIC_NMI);
    aml_u8(a, 6);
    aml_u8(a, 0xff);                                               /* all processors */
    aml_u16(a, INTI_HIGH | INTI_EDGE);
    aml_u8(a, 1);                                                  /* LINT1 */
    if (c->vcpus > XAPIC_ID_MAX + 1) {
        aml_u8(a, MADT_X2APIC_NMI);
        aml_u8(a, 12);
        aml_u16(a, INTI_HIGH | INTI_EDGE);
        aml_u32(a, UINT32_MAX);
        aml_u32(a, 1);                                             /* LINT1, 3 bytes reserved */
    }
    table_end(ar, gpa);
    return gpa;
}

static u32 write_mcfg(struct area *ar, const struct acpi_config *c)
{
    struct aml *a = &ar->out;
    u32 gpa = table_begin(ar, "MCFG", 1);

    aml_u64(a, 0);
    aml_u64(a, c->ecam_base);
    aml_u16(a, 0);                                                 /* segment */
    aml_u8(a, 0);
    aml_u8(a, (u8)(c->buses - 1));
    aml_u32(a, 0);
    table_end(ar, gpa);
    return gpa;
}

/* IA-PC HPET specification 1.0a, 3.2.4. */
static u32 write_hpet(struct area *ar, const struct acpi_config *c)
{
    struct gas base = { .width = 64, .address = c->hpet_base };
    struct aml *a = &ar->out;
    u32 gpa = table_begin(ar, "HPET", 1);

    aml_u32(a, c->hpet_id);
    aml_bytes(a, &base, sizeof base);
    aml_u8(a, 0);                                                  /* number */
    aml_u16(a, 128);                                               /* least ticks in periodic mode without losing interrupts */
    aml_u8(a, 0);
    table_end(ar, gpa);
    return gpa;
}

/* ---- the roots ---- */

static struct rsdp rsdp_of(u32 rsdt, u32 xsdt)
{
    struct rsdp r = { .revision = 2, .rsdt = rsdt, .length = sizeof r, .xsdt = xsdt };

    memcpy(r.signature, "RSD PTR ", sizeof r.signature);
    memcpy(r.oem_id, OEM_ID, sizeof r.oem_id);
    return r;
}

static u32 write_list(struct area *ar, const char *signature, const u32 *table, u32 tables, u32 size)
{
    u32 gpa = table_begin(ar, signature, 1);

    for (u32 i = 0; i < tables; i++) {
        u64 entry = table[i];

        area_pointer(ar, area_gpa(ar), size);
        aml_bytes(&ar->out, &entry, size);
    }
    table_end(ar, gpa);
    return gpa;
}

/* All tables but the RSDP, which is returned without checksums. */
static struct rsdp write_tables(struct area *ar, const struct acpi_config *c)
{
    u32 table[4], tables = 0, facs = write_facs(ar), dsdt = write_dsdt(ar, c), rsdt;

    table[tables++] = write_fadt(ar, c, facs, dsdt);
    table[tables++] = write_madt(ar, c);
    if (c->ecam_base)
        table[tables++] = write_mcfg(ar, c);
    if (c->hpet_base)
        table[tables++] = write_hpet(ar, c);
    rsdt = write_list(ar, "RSDT", table, tables, 4);
    return rsdp_of(rsdt, write_list(ar, "XSDT", table, tables, 8));
}

static int area_new(u32 base, struct area **out)
{
    struct area *ar = calloc(1, sizeof *ar);

    if (!ar)
        return err(-ENOMEM, "out of memory for ACPI tables");
    aml_init(&ar->out, ar->buf, sizeof ar->buf);
    ar->base = base;
    *out = ar;
    return 0;
}

static int no_room(const struct acpi_config *c)
{
    return err(-ENOSPC, "the ACPI tables of %u vCPUs do not fit into %u KiB; use fewer --cpus", c->vcpus, ACPI_SIZE / 1024);
}

int acpi_write(struct ram *ram, const struct acpi_config *c, u64 *rsdp_gpa)
{
    struct area *ar = NULL;
    struct rsdp rsdp;
    int rc = area_new(ACPI_BASE, &ar);

    if (rc)
        return rc;
    ar->out.pos = sizeof rsdp;
    rsdp = write_tables(ar, c);
    rsdp.checksum = checksum(&rsdp, offsetof(struct rsdp, length)); /* the part that ACPI 1.0 knows */
    rsdp.extended_checksum = checksum(&rsdp, sizeof rsdp);
    memcpy(ar->buf, &rsdp, sizeof rsdp);
    if (ar->out.full)
        rc = no_room(c);
    else if (ram_write(ram, ACPI_BASE, ar->buf, ar->out.pos))
        rc = err(-EFAULT, "no memory at 0x%x for the ACPI tables; use a larger --memory", ACPI_BASE);
    *rsdp_gpa = ACPI_BASE;
    free(ar);
    return rc;
}

/* ---- for firmware ---- */

#define TABLES_FILE "etc/acpi/tables"
#define RSDP_FILE   "etc/acpi/rsdp"
#define LOADER_FILE "etc/table-loader"
#define LOADER_MAX  (2 + FIXUPS_MAX + 2 + FIXUPS_MAX + 2)

enum { LOADER_ALLOCATE = 1, LOADER_ADD_POINTER = 2, LOADER_ADD_CHECKSUM = 3 };
enum { ZONE_HIGH = 1, ZONE_FSEG = 2 };                             /* anywhere below 4 GiB; where the RSDP is looked for */

struct loader_entry {                                              /* little endian */
    u32 command;
    union {
        struct { char file[56]; u32 align; u8 zone; } PACKED allocate;
        struct { char dest[56], src[56]; u32 offset; u8 size; } PACKED pointer;
        struct { char file[56]; u32 offset, start, length; } PACKED checksum;
        u8 pad[124];
    };
} PACKED;
_Static_assert(sizeof(struct loader_entry) == 128, "romfile_loader.h");

struct loader {
    struct loader_entry entry[LOADER_MAX];
    unsigned n;
};

static struct loader_entry *command(struct loader *l, u32 what)
{
    bug_on(l->n == LOADER_MAX);
    l->entry[l->n].command = what;
    return &l->entry[l->n++];
}

static void allocate(struct loader *l, const char *file, u32 align, u8 zone)
{
    struct loader_entry *e = command(l, LOADER_ALLOCATE);

    strcpy(e->allocate.file, file);
    e->allocate.align = align;
    e->allocate.zone = zone;
}

static void pointer(struct loader *l, const char *dest, u32 offset, u32 size)
{
    struct loader_entry *e = command(l, LOADER_ADD_POINTER);

    strcpy(e->pointer.dest, dest);
    strcpy(e->pointer.src, TABLES_FILE);
    e->pointer.offset = offset;
    e->pointer.size = (u8)size;
}

static void sum(struct loader *l, const char *file, u32 offset, u32 start, u32 length)
{
    struct loader_entry *e = command(l, LOADER_ADD_CHECKSUM);

    strcpy(e->checksum.file, file);
    e->checksum.offset = offset;
    e->checksum.start = start;
    e->checksum.length = length;
}

/* Pointers first: checksums cover them. */
static void write_loader(struct loader *l, const struct area *ar)
{
    allocate(l, TABLES_FILE, 64, ZONE_HIGH);                       /* the FACS is aligned so */
    allocate(l, RSDP_FILE, 16, ZONE_FSEG);
    for (unsigned i = 0; i < ar->pointers; i++)
        pointer(l, TABLES_FILE, ar->pointer[i].at, ar->pointer[i].size);
    pointer(l, RSDP_FILE, offsetof(struct rsdp, rsdt), 4);
    pointer(l, RSDP_FILE, offsetof(struct rsdp, xsdt), 8);
    for (unsigned i = 0; i < ar->tables; i++)
        sum(l, TABLES_FILE, ar->table[i].at + offsetof(struct table_head, checksum), ar->table[i].at, ar->table[i].size);
    sum(l, RSDP_FILE, offsetof(struct rsdp, checksum), 0, offsetof(struct rsdp, length));
    sum(l, RSDP_FILE, offsetof(struct rsdp, extended_checksum), 0, sizeof(struct rsdp));
}

int acpi_export(const struct acpi_config *c, int (*add)(void *arg, const char *name, const void *p, u32 len), void *arg)
{
    struct loader *l = calloc(1, sizeof *l);
    struct area *ar = NULL;
    struct rsdp rsdp;
    int rc = l ? area_new(0, &ar) : err(-ENOMEM, "out of memory for ACPI tables");

    if (rc)
        goto out;
    ar->firmware = true;
    rsdp = write_tables(ar, c);
    write_loader(l, ar);
    rc = ar->out.full ? no_room(c) : add(arg, TABLES_FILE, ar->buf, ar->out.pos);
    if (rc == 0)
        rc = add(arg, RSDP_FILE, &rsdp, sizeof rsdp);
    if (rc == 0)
        rc = add(arg, LOADER_FILE, l->entry, (u32)(l->n * sizeof *l->entry));
out:
    free(ar);
    free(l);
    return rc;
}
