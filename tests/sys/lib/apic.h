/* The local APIC by its registers (SDM vol. 3A chapter 11): what tests of interrupts and of several processors need.
 * 64-bit programs. */
#pragma once

#include "sys.h"

#define APIC_BASE 0xfee00000ul
static inline u32 apic_read(u32 reg) { return *(volatile u32 *)(APIC_BASE + reg); }
static inline void apic_write(u32 reg, u32 v) { *(volatile u32 *)(APIC_BASE + reg) = v; }
enum {
    APIC_ID = 0x20,
    APIC_TPR = 0x80,
    APIC_PPR = 0xa0,
    APIC_EOI = 0xb0,
    APIC_SVR = 0xf0,
    APIC_ISR = 0x100,
    APIC_IRR = 0x200,
    APIC_ICR = 0x300,
    APIC_ICR_HIGH = 0x310,
    APIC_LVT_TIMER = 0x320,
    APIC_TIMER_INIT = 0x380,
    APIC_TIMER_NOW = 0x390,
    APIC_TIMER_DIV = 0x3e0
};
#define ICR_NMI (4u << 8)
#define ICR_INIT (5u << 8)
#define ICR_SIPI (6u << 8)
#define ICR_ASSERT (1u << 14)
#define ICR_SELF (1u << 18)

static inline void apic_map(void) { map(APIC_BASE, APIC_BASE, PTE_P | PTE_W | PTE_PCD | PTE_PWT); }
static inline void apic_enable(void) { apic_write(APIC_SVR, 0x1ff); }
static inline void ipi(u32 dest, u32 low)
{
    apic_write(APIC_ICR_HIGH, dest << 24);
    apic_write(APIC_ICR, low);
    while (apic_read(APIC_ICR) & 1u << 12)
        ;
}
