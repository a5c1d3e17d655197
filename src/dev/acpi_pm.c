/*
 * ACPI fixed hardware (ACPI 6.4): PM1a event block (4.8.3.1), PM1a control block (4.8.3.2), power-management timer (4.8.3.3), GPE0 block (4.8.4.1).
 *
 * The machine is in ACPI mode from the start (no SMI_CMD), so SCI_EN reads 1. The only sleep state is S5, which is power-off; WAK_STS is never set.
 * The timer is computed from the clock; a host timer runs only while its interrupt is enabled and not pending (every 600 s).
 *
 * The event, control and GPE blocks take bytes: "write one to clear" must not meet bits that the guest did not write.
 *
 * Locking: device.lock; the interrupt controllers' and the clock's are taken under it.
 */
#include "dev/acpi_pm.h"

#include <errno.h>

#include "base/err.h"

#define TMR_STS 0x0001
#define GBL_STS 0x0020
#define PWRBTN_STS 0x0100
#define PM1_EN_MASK 0x0721             /* RTC, sleep button, power button, global, timer */
#define PM1_STS_MASK 0x8731

#define CNT_SCI_EN 0x0001
#define CNT_BM_RLD 0x0002
#define CNT_SLP_TYP(v) (((v) >> 10) & 7)
#define CNT_SLP_EN 0x2000
#define CNT_KEPT 0x1c02                /* SLP_TYP, BM_RLD; GBL_RLS and SLP_EN are write-only */

struct acpi_pm {
    struct device device;
    struct clock *clock;
    struct irq_line sci;
    struct machine_hook hook;
    struct timer timer;
    u16 sts, en, cnt;
    u64 gpe_sts, gpe_en;
    u64 seen_ns;                                                   /* TMR_STS accounts for all carries up to here */
};

static u64 pm_ticks(u64 ns)
{
    return (u64)((u128)ns * ACPI_PM_TIMER_HZ / 1000000000);
}

static void update_sci(struct acpi_pm *pm)
{
    irq_set(&pm->sci, (pm->sts & pm->en & PM1_EN_MASK) || (pm->gpe_sts & pm->gpe_en));
}

/* TMR_STS: set whenever the most significant bit of the counter changes (4.8.2.1). */
static void catch_up(struct acpi_pm *pm)
{
    u64 ns = clock_ns(pm->clock);

    if (pm_ticks(ns) >> 31 != pm_ticks(pm->seen_ns) >> 31)
        pm->sts |= TMR_STS;
    pm->seen_ns = ns;
}

static void arm(struct acpi_pm *pm)
{
    u64 next = (pm_ticks(pm->seen_ns) >> 31) + 1;

    if ((pm->en & TMR_STS) && !(pm->sts & TMR_STS))
        timer_arm(&pm->timer, (u64)((((u128)next << 31) * 1000000000 + ACPI_PM_TIMER_HZ - 1) / ACPI_PM_TIMER_HZ));
    else
        timer_disarm(&pm->timer);
}

static void timer_fired(void *arg)
{
    struct acpi_pm *pm = arg;

    pthread_mutex_lock(&pm->device.lock);
    catch_up(pm);
    update_sci(pm);
    arm(pm);
    pthread_mutex_unlock(&pm->device.lock);
}

/* ---- registers: byte `off` of a register, counted from its low end ---- */

static u64 byte_of(u64 reg, u64 off)
{
    return reg >> (8 * off) & 0xff;
}

static u64 with_byte(u64 reg, u64 off, u64 val)
{
    return (reg & ~(0xffull << (8 * off))) | (val & 0xff) << (8 * off);
}

static u64 evt_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct acpi_pm *pm = dev;

    catch_up(pm);
    return off < 2 ? byte_of(pm->sts, off) : byte_of(pm->en, off - 2);
}

static void evt_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct acpi_pm *pm = dev;

    catch_up(pm);
    if (off < 2)
        pm->sts &= ~((val & 0xff) << (8 * off));
    else
        pm->en = with_byte(pm->en, off - 2, val) & PM1_EN_MASK;
    update_sci(pm);
    arm(pm);
}

static u64 cnt_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct acpi_pm *pm = dev;

    return byte_of(pm->cnt | CNT_SCI_EN, off);
}

static void cnt_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct acpi_pm *pm = dev;
    u64 cnt = with_byte(pm->cnt, off, val);

    pm->cnt = cnt & CNT_KEPT;
    if ((cnt & CNT_SLP_EN) && CNT_SLP_TYP(cnt) == ACPI_SLP_TYP_S5)
        machine_tell(&pm->hook, MACHINE_POWEROFF);
}

static u64 tmr_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    struct acpi_pm *pm = dev;

    return (u32)pm_ticks(clock_ns(pm->clock));
}

static void tmr_write(void *dev UNUSED, u64 off UNUSED, u64 val UNUSED, unsigned size UNUSED)
{
    /* read-only */
}

static u64 gpe_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct acpi_pm *pm = dev;

    return off < 8 ? byte_of(pm->gpe_sts, off) : byte_of(pm->gpe_en, off - 8);
}

static void gpe_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct acpi_pm *pm = dev;

    if (off < 8)
        pm->gpe_sts &= ~((val & 0xff) << (8 * off));
    else
        pm->gpe_en = with_byte(pm->gpe_en, off - 8, val);
    update_sci(pm);
}

/* ---- events from outside ---- */

void acpi_pm_power_button(struct acpi_pm *pm)
{
    pthread_mutex_lock(&pm->device.lock);
    pm->sts |= PWRBTN_STS;
    update_sci(pm);
    pthread_mutex_unlock(&pm->device.lock);
}

void acpi_pm_gpe(struct acpi_pm *pm, unsigned n)
{
    bug_on(n >= 64);
    pthread_mutex_lock(&pm->device.lock);
    pm->gpe_sts |= BIT(n);
    update_sci(pm);
    pthread_mutex_unlock(&pm->device.lock);
}

/* ---- device ---- */

static void acpi_pm_reset(struct device *d)
{
    struct acpi_pm *pm = (struct acpi_pm *)d;

    pthread_mutex_lock(&d->lock);
    pm->sts = pm->en = pm->cnt = 0;
    pm->gpe_sts = pm->gpe_en = 0;
    pm->seen_ns = clock_ns(pm->clock);
    update_sci(pm);
    arm(pm);
    pthread_mutex_unlock(&d->lock);
}

static void acpi_pm_state(struct device *d, struct stream *s)
{
    struct acpi_pm *pm = (struct acpi_pm *)d;

    stream_section(s, "acpi_pm", 1);
    stream_u16(s, &pm->sts);
    stream_u16(s, &pm->en);
    stream_u16(s, &pm->cnt);
    stream_u64(s, &pm->gpe_sts);
    stream_u64(s, &pm->gpe_en);
    stream_u64(s, &pm->seen_ns);
    if (!s->load)
        return;
    pm->sts &= PM1_STS_MASK;
    pm->en &= PM1_EN_MASK;
    pm->cnt &= CNT_KEPT;
    pm->seen_ns = MIN(pm->seen_ns, clock_ns(pm->clock));
    arm(pm);
}

static void acpi_pm_free(struct device *d)
{
    struct acpi_pm *pm = (struct acpi_pm *)d;

    timer_disarm(&pm->timer);
    pthread_mutex_destroy(&d->lock);
    free(pm);
}

static const struct device_ops acpi_pm_ops = {
    .name = "acpi_pm",
    .reset = acpi_pm_reset,
    .state = acpi_pm_state,
    .free = acpi_pm_free,
};

int acpi_pm_new(struct bus *pio, u16 base, struct clock *clock, struct irq_line sci, struct machine_hook hook, struct acpi_pm **out)
{
    struct acpi_pm *pm = calloc(1, sizeof(*pm));

    if (!pm)
        return err(-ENOMEM, "acpi_pm: out of memory");
    device_init(&pm->device, &acpi_pm_ops);
    pm->clock = clock;
    pm->sci = sci;
    pm->hook = hook;
    pm->seen_ns = clock_ns(clock);
    timer_init(&pm->timer, clock, timer_fired, pm);

    struct region regions[] = {
        { .base = base + ACPI_PM_EVT, .size = ACPI_PM_EVT_LEN, .min = 1, .max = 1, .read = evt_read, .write = evt_write, .name = "PM1a event" },
        { .base = base + ACPI_PM_CNT, .size = ACPI_PM_CNT_LEN, .min = 1, .max = 1, .read = cnt_read, .write = cnt_write, .name = "PM1a control" },
        { .base = base + ACPI_PM_TMR, .size = ACPI_PM_TMR_LEN, .min = 4, .max = 4, .read = tmr_read, .write = tmr_write, .name = "PM timer" },
        { .base = base + ACPI_PM_GPE0, .size = ACPI_PM_GPE0_LEN, .min = 1, .max = 1, .read = gpe_read, .write = gpe_write, .name = "GPE0" },
    };
    for (size_t i = 0; i < ARRAY_SIZE(regions); i++) {
        regions[i].dev = pm;
        regions[i].lock = &pm->device.lock;
        int r = bus_add(pio, &regions[i]);
        if (r < 0) {
            acpi_pm_free(&pm->device);
            return r;
        }
    }
    *out = pm;
    return 0;
}
