/*
 * What a chip tells the machine beyond interrupts: reset, power-off, a panic of the guest, its own end.
 *
 * Called on the thread of the access with the chip's lock held: the receiver only records the event and wakes whoever acts on it.
 */
#pragma once

enum machine_event {
    MACHINE_RESET,         /* i8042 pulse, port 0x92, 0xcf9 */
    MACHINE_POWEROFF,      /* ACPI S5 */
    MACHINE_PANICKED,      /* pvpanic bit 0 */
    MACHINE_CRASH_LOADED,  /* pvpanic bit 1: the guest runs its crash kernel now */
    MACHINE_DISK_FULL,     /* the host has no room for what a disk is to store; no chip's lock is held */
};

struct machine_hook {
    void (*fn)(void *arg, enum machine_event what);
    void *arg;
    void (*exit)(void *arg, unsigned value);                       /* debug_exit: ended by the guest; NULL: ignored */
};
static inline void machine_tell(const struct machine_hook *h, enum machine_event what)
{
    if (h->fn)
        h->fn(h->arg, what);
}
