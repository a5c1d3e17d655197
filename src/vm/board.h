/*
 * The board: a PC with local APICs, I/O APIC, the classic chips, one PCI bus and virtio devices. board.c holds every
 * address and interrupt.
 *
 * The board owns RAM's layout, the buses and the devices. It knows nothing of threads or life cycles: struct vm does.
 */
#pragma once

#include "cpu/machine.h"
#include "dev/hook.h"
#include "vm/acpi.h"
#include "vm/e820.h"
#include "vm/vm.h"

struct board;

/* Builds RAM and devices for config, and fills m->ram, m->pio, m->mmio. m->clock, m->trace and m->log are set already.
   hook: reset, power-off, panic. */
int board_new(const struct vm_config *config, struct machine *m, struct machine_hook hook, struct board **out);
/* Gives each vCPU (m->vcpu[], made in between) its local APIC, and the chips their wires to them. */
int board_connect_cpus(struct board *b);
/* the interrupt chips are the engine's, if it has some, else ours; a reset or a load follows */
void board_attach_chips(struct board *b);
/* devices, then buses and RAM; vCPUs are still there and are freed afterwards; NULL is fine */
void board_free(struct board *b);

/* every device to its power-on state; vCPUs stand still. -EIO with err(): a device still waits for the host */
int board_reset(struct board *b);
void board_quiesce(struct board *b);                               /* I/O in flight is finished; vCPUs stand still */
void board_state(struct board *b, struct stream *s);               /* all devices' state, in the order of the table */
int board_tables(struct board *b, u64 *rsdp_gpa);                  /* ACPI and MP tables, where there is no firmware */
void board_retry_disks(struct board *b);                           /* what the host had no room for */
unsigned board_waiting(struct board *b);                           /* requests of disks that wait for room on the host */
int board_resize_disk(struct board *b, unsigned n, u64 size);      /* 0: as large as the host has it; err() */
const struct e820 *board_map(const struct board *b);
void board_power_button(struct board *b);
struct vport *board_port(struct board *b, unsigned n);
void board_info_disks(struct board *b, FILE *f);
void board_info(struct board *b, FILE *f);                         /* one line per device */
struct stats;
void board_stats(struct board *b, struct stats *s);                /* a group for each network card */
int board_set_link(struct board *b, unsigned n, bool up);
