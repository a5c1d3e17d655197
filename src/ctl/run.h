/* `doppel run`: one virtual machine in the foreground, from its options to its exit status. */
#pragma once

/* Exit statuses besides the command's own (sysexits.h for 64). */
enum {
    EXIT_HOST_ERROR = 1,
    EXIT_USAGE = 64,
    EXIT_GUEST_PANIC = 70,
    EXIT_TRIPLE_FAULT = 71,
};

/* Boots imported disks that have a boot sector. */
#define RUN_FIRMWARE "/usr/share/seabios/bios-256k.bin"

int run_main(int argc, char **argv);                               /* the words behind "run" */
