/*
 * ACPI tables (ACPI specification 6.4): what the board is, told to the guest. RSDP, XSDT, FADT, FACS, DSDT, MADT, MCFG.
 *
 * The board fills struct acpi_config; every address and interrupt number comes from there. The tables lie in the BIOS
 * area, where old systems look for them, in RAM that the e820 map reserves. Called while vCPUs stand still, again at
 * each reset. Firmware that has that area for itself takes them as files of fw_cfg and puts them where it likes.
 */
#pragma once

#include "base/types.h"
#include "mem/ram.h"

#define ACPI_BASE 0xe0000u                                         /* RSDP first; RAM must be there */
#define ACPI_SIZE 0x10000u

struct acpi_window {
    u64 base, size;                                                /* size 0: none */
};

struct acpi_serial {
    u16 port;                                                      /* 8 ports; 0: none */
    u8 irq;
};

struct acpi_config {
    unsigned vcpus;                                                /* APIC IDs are 0..vcpus-1 */
    u32 lapic_base;                                                /* 0xfee00000 */
    u32 ioapic_base;                                               /* 0xfec00000, GSIs from 0 */
    u8 ioapic_id;
    /* fixed hardware (chapter 4.8) */
    u8 sci_irq;                                                    /* 9: level, active high */
    u16 pm1_evt;                                                   /* 4 ports: status, enable */
    u16 pm1_cnt;                                                   /* 2 ports */
    u16 pm_timer;                                                  /* 4 ports */
    bool pm_timer_32bit;
    u16 gpe0;                                                      /* gpe0_len ports: status, enable */
    u8 gpe0_len;                                                   /* even; 0: none */
    u16 smi_cmd;                                         /* 0: always in ACPI mode; else ports of the enable commands */
    u8 acpi_enable, acpi_disable;
    u8 s5_typ;                                                     /* SLP_TYP of power-off */
    u16 reset_port;                                                /* 0xcf9 */
    u8 reset_value;                                                /* 6 */
    u8 rtc_century;                                                /* CMOS index, 0x32; 0: none */
    bool i8042, vga;
    /* PCI */
    u64 ecam_base;                                                 /* 0: no MCFG */
    unsigned buses;                                                /* 1..256: buses behind the host bridge */
    struct acpi_window pci_io[2];                                  /* without 0xcf8..0xcff */
    struct acpi_window pci_mem32[2], pci_mem64;
    u32 pci_gsi[4];                                /* INTA..D of device 0; the pin of device d, INTx p is (d + p) % 4 */
    u8 pci_irq[4];                                                 /* the same in i8259 mode; 0: no routing then */
    /* legacy devices */
    struct acpi_serial serial[2];
    u16 pvpanic_port;                                              /* 0x505; 0: none */
    u32 hpet_base, hpet_id;                                        /* base 0: none; id: its capabilities, bits 31..0 */
    u16 fw_cfg_port;                                               /* 12 ports; 0: none */
    bool rtc, pit;
};

/* Writes the tables, returns where the RSDP is. 0, or -ENOSPC/-EFAULT with err(). */
int acpi_write(struct ram *ram, const struct acpi_config *c, u64 *rsdp_gpa);

/*
 * The same tables for firmware: three files, given to add() with their names, two of tables whose pointers count from the
 * beginning of the file that they point into, and one of commands that say how to place and join them. 0, or what add()
 * said, or -ENOSPC with err().
 */
int acpi_export(const struct acpi_config *c, int (*add)(void *arg, const char *name, const void *p, u32 len), void *arg);
