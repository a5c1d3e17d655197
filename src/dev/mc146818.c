/*
 * Motorola MC146818A real-time clock with 128 bytes of CMOS RAM (data sheet; section names below are its own), as wired in a PC.
 *
 * The clock runs on the host's UTC plus an offset that changes when the guest sets the time. Nothing ticks: time registers, UIP and the three flags of
 * register C are computed when somebody looks; a timer runs only while an interrupt is enabled whose flag is not up already, so a guest that does not
 * read register C costs nothing. While the SET bit is on or the divider is held in reset the time stands still in the registers.
 *
 * The century is kept at RTC_CENTURY, in the same format as the year. The size bytes of CMOS RAM are those that PC firmware fills in (below).
 * Left out: daylight saving (DSE) and the square-wave pin: their bits can be written and do nothing. Bit 7 of port 0x70 (NMI mask) is kept:
 * nothing on this board raises NMI through it.
 *
 * Locking: device.lock; the interrupt controllers' and the clock's are taken under it.
 */
#include "dev/mc146818.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "base/err.h"

#define NS_PER_S 1000000000ull
#define SECONDS_MAX 9000000000ull                                  /* the year 2255: its nanoseconds fit into 63 bits */

enum { SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR, REG_A, REG_B, REG_C, REG_D };

#define A_UIP 0x80
#define A_RATE 0x0f
#define A_DIVIDER 0x70
#define B_SET 0x80
#define B_ENABLES 0x70                                             /* PIE, AIE, UIE: at the same places as PF, AF, UF in register C */
#define B_SQWE 0x08
#define B_BINARY 0x04
#define B_24H 0x02
#define B_UIE 0x10
#define C_IRQF 0x80
#define C_PF 0x40
#define C_AF 0x20
#define C_UF 0x10
#define D_VALID 0x80
#define HOURS_PM 0x80
#define ALARM_ANY 0xc0                                             /* both top bits: "don't care" */

/* "Update cycle": UIP rises 244 us before the update, which takes 1984 us with a 32.768 kHz crystal; the new time is there at its end. */
#define UIP_NS ((244 + 1984) * 1000ull)

struct mc146818 {
    struct device device;
    struct clock *clock;
    struct irq_line irq8;
    struct timer timer;
    u8 index;
    bool nmi_masked;
    u8 ram[128];                                                   /* time registers are in force here only while frozen() */
    s64 offset_ns;                                                 /* RTC time less the host's */
    u64 frozen_ns;                                                 /* RTC time when it was frozen */
    u64 seen_ns;                                                   /* RTC time up to which register C accounts for everything */
};

/* ---- time ---- */

static bool divider_reset(const struct mc146818 *r)                /* "Divider control": 11x */
{
    return (r->ram[REG_A] & 0x60) == 0x60;
}

static bool frozen(const struct mc146818 *r)
{
    return (r->ram[REG_B] & B_SET) || divider_reset(r);
}

static u64 rtc_ns(const struct mc146818 *r)                        /* since 1970 by the RTC's own calendar */
{
    return frozen(r) ? r->frozen_ns : clock_wall_ns() + (u64)r->offset_ns;
}

static u8 encode(const struct mc146818 *r, unsigned v)
{
    return (u8)(r->ram[REG_B] & B_BINARY ? v : v / 10 % 10 << 4 | v % 10);
}

static unsigned decode(const struct mc146818 *r, u8 v)
{
    return r->ram[REG_B] & B_BINARY ? v : (v >> 4) * 10u + (v & 15);
}

static u8 encode_hours(const struct mc146818 *r, unsigned h)
{
    if (r->ram[REG_B] & B_24H)
        return encode(r, h);
    return encode(r, h % 12 ? h % 12 : 12) | (h >= 12 ? HOURS_PM : 0);
}

static unsigned decode_hours(const struct mc146818 *r, u8 v)
{
    if (r->ram[REG_B] & B_24H)
        return decode(r, v);
    return decode(r, v & ~HOURS_PM) % 12 + (v & HOURS_PM ? 12 : 0);
}

/* The time registers as they read at ns. */
static void time_to_registers(struct mc146818 *r, u64 ns)
{
    time_t t = (time_t)(ns / NS_PER_S);
    struct tm tm;

    if (!gmtime_r(&t, &tm))
        memset(&tm, 0, sizeof(tm));
    r->ram[SECONDS] = encode(r, (unsigned)tm.tm_sec);
    r->ram[MINUTES] = encode(r, (unsigned)tm.tm_min);
    r->ram[HOURS] = encode_hours(r, (unsigned)tm.tm_hour);
    r->ram[WEEKDAY] = encode(r, (unsigned)tm.tm_wday + 1);
    r->ram[DAY] = encode(r, (unsigned)tm.tm_mday);
    r->ram[MONTH] = encode(r, (unsigned)tm.tm_mon + 1);
    r->ram[YEAR] = encode(r, (unsigned)tm.tm_year % 100);
    r->ram[RTC_CENTURY] = encode(r, (unsigned)(tm.tm_year + 1900) / 100);
}

/* The second that the registers name, within 1970..2255. Days and months out of range are carried over as timegm() does. */
static u64 registers_to_seconds(const struct mc146818 *r)
{
    struct tm tm = {
        .tm_sec = (int)decode(r, r->ram[SECONDS]),
        .tm_min = (int)decode(r, r->ram[MINUTES]),
        .tm_hour = (int)decode_hours(r, r->ram[HOURS]),
        .tm_mday = (int)decode(r, r->ram[DAY]),
        .tm_mon = (int)decode(r, r->ram[MONTH]) - 1,
        .tm_year = (int)(decode(r, r->ram[RTC_CENTURY]) * 100 + decode(r, r->ram[YEAR])) - 1900,
    };
    time_t t = timegm(&tm);

    return t < 0 ? 0 : MIN((u64)t, SECONDS_MAX - 1);
}

/* ---- flags of register C ---- */

static u64 periodic_ticks(const struct mc146818 *r)                /* of 32.768 kHz; 0: none ("Rate selection") */
{
    unsigned rate = r->ram[REG_A] & A_RATE;

    if (!rate || divider_reset(r))
        return 0;
    return 1ull << (rate <= 2 ? rate + 6 : rate - 1);
}

static u64 periods_at(u64 ns, u64 ticks)
{
    return (u64)((u128)ns * 32768 / NS_PER_S) / ticks;
}

static bool alarm_field(u8 want, u8 is)
{
    return (want & ALARM_ANY) == ALARM_ANY || want == is;
}

/* The first second after s at which the alarm matches, or 0: never. Steps over hours and minutes that do not match, so it takes at most some 150 steps. */
static u64 next_alarm(const struct mc146818 *r, u64 s)
{
    u64 end = s + 86400;

    for (s++; s <= end;) {
        unsigned day_s = (unsigned)(s % 86400);

        if (!alarm_field(r->ram[HOURS_ALARM], encode_hours(r, day_s / 3600)))
            s += 3600 - day_s % 3600;
        else if (!alarm_field(r->ram[MINUTES_ALARM], encode(r, day_s / 60 % 60)))
            s += 60 - day_s % 60;
        else if (!alarm_field(r->ram[SECONDS_ALARM], encode(r, day_s % 60)))
            s++;
        else
            return s;
    }
    return 0;
}

static void update_irq(struct mc146818 *r)
{
    bool irq = r->ram[REG_B] & r->ram[REG_C] & B_ENABLES;

    r->ram[REG_C] = (u8)((r->ram[REG_C] & ~C_IRQF) | (irq ? C_IRQF : 0));
    irq_set(&r->irq8, irq);
}

/* Raises the flags for all that has happened since last time. */
static void catch_up(struct mc146818 *r)
{
    u64 ns = rtc_ns(r), was = r->seen_ns, ticks = periodic_ticks(r), alarm;

    r->seen_ns = ns;
    if (ns <= was) /* frozen, or the host's clock was set back */
        return;
    if (ns / NS_PER_S != was / NS_PER_S) {
        r->ram[REG_C] |= C_UF;
        alarm = next_alarm(r, was / NS_PER_S);
        if (alarm && alarm <= ns / NS_PER_S)
            r->ram[REG_C] |= C_AF;
    }
    if (ticks && periods_at(ns, ticks) != periods_at(was, ticks))
        r->ram[REG_C] |= C_PF;
    update_irq(r);
}

/* Looks again at the next moment that brings an interrupt which is not up yet. */
static void arm(struct mc146818 *r)
{
    u8 wanted = r->ram[REG_B] & ~r->ram[REG_C] & B_ENABLES;
    u64 ns = r->seen_ns, ticks = periodic_ticks(r), next = UINT64_MAX, alarm;

    if (frozen(r))
        wanted = 0;
    if (wanted & C_UF)
        next = (ns / NS_PER_S + 1) * NS_PER_S;
    if ((wanted & C_AF) && (alarm = next_alarm(r, ns / NS_PER_S)))
        next = MIN(next, alarm * NS_PER_S);
    if ((wanted & C_PF) && ticks)
        next = MIN(next, (u64)(((u128)(periods_at(ns, ticks) + 1) * ticks * NS_PER_S + 32767) / 32768));
    if (next == UINT64_MAX)
        timer_disarm(&r->timer);
    else
        timer_arm(&r->timer, clock_ns(r->clock) + (next - ns));
}

static void timer_fired(void *arg)
{
    struct mc146818 *r = arg;

    pthread_mutex_lock(&r->device.lock);
    catch_up(r);
    arm(r);
    pthread_mutex_unlock(&r->device.lock);
}

/* ---- registers ---- */

/*
 * A time register has been written, or the format or the freeze changes: from here on the RTC shows the second that the registers name. The fraction
 * of the second belongs to the divider and goes on.
 */
static void set_time(struct mc146818 *r, u64 fraction_ns)
{
    u64 ns = registers_to_seconds(r) * NS_PER_S + fraction_ns;

    r->offset_ns = (s64)(ns - clock_wall_ns());
    r->frozen_ns = ns;
    r->seen_ns = ns;
}

/* A new value of register A or B. */
static void control_write(struct mc146818 *r, unsigned reg, u8 val)
{
    bool was_frozen = frozen(r), was_reset = divider_reset(r);
    u64 ns = rtc_ns(r), fraction = ns % NS_PER_S;

    if (!was_frozen)
        time_to_registers(r, ns); /* in the format that the guest has set so far */
    if (reg == REG_A)
        val = (u8)((val & ~A_UIP) | (r->ram[REG_A] & A_UIP));
    else if ((val & B_SET) && !(r->ram[REG_B] & B_SET))
        val &= ~B_UIE; /* "SET": clears UIE */
    r->ram[reg] = val;

    if (!was_frozen && frozen(r)) {
        r->frozen_ns = r->seen_ns = ns;
    } else if (was_frozen && !frozen(r)) {
        if (was_reset)
            fraction = NS_PER_S / 2; /* "Divider control": the first update comes half a second after */
        else
            fraction = clock_wall_ns() + (u64)r->offset_ns; /* the divider ran on */
        set_time(r, fraction % NS_PER_S);
    } else if (was_reset && !divider_reset(r)) { /* SET is still on */
        r->offset_ns = (s64)(r->frozen_ns - r->frozen_ns % NS_PER_S + NS_PER_S / 2 - clock_wall_ns());
    }
    update_irq(r);
}

static bool is_time(unsigned reg)
{
    return reg == SECONDS || reg == MINUTES || reg == HOURS || (reg >= WEEKDAY && reg <= YEAR) || reg == RTC_CENTURY;
}

static u8 register_read(struct mc146818 *r, unsigned reg)
{
    u64 ns = rtc_ns(r);
    u8 val;

    if (is_time(reg) && !frozen(r))
        time_to_registers(r, ns);
    switch (reg) {
    case REG_A:
        return (u8)((r->ram[REG_A] & ~A_UIP) | (!frozen(r) && ns % NS_PER_S >= NS_PER_S - UIP_NS ? A_UIP : 0));
    case REG_C: /* "Register C": a read clears it and lets go of IRQ */
        val = r->ram[REG_C];
        r->ram[REG_C] = 0;
        update_irq(r);
        return val;
    case REG_D:
        return D_VALID;
    }
    return r->ram[reg];
}

static void register_write(struct mc146818 *r, unsigned reg, u8 val)
{
    u64 ns;

    if (reg == REG_C || reg == REG_D)
        return;
    if (reg == REG_A || reg == REG_B) {
        control_write(r, reg, val);
    } else if (is_time(reg) && !frozen(r)) {
        ns = rtc_ns(r);
        time_to_registers(r, ns);
        r->ram[reg] = val;
        set_time(r, ns % NS_PER_S);
    } else {
        r->ram[reg] = val;
    }
}

static u64 port_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct mc146818 *r = dev;
    u8 val;

    if (off == 0)
        return 0xff; /* the index cannot be read back */
    catch_up(r);
    val = register_read(r, r->index);
    arm(r);
    return val;
}

static void port_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct mc146818 *r = dev;

    if (off == 0) {
        r->index = val & 0x7f;
        r->nmi_masked = val & 0x80;
        return;
    }
    catch_up(r);
    register_write(r, r->index, (u8)val);
    arm(r);
}

/* ---- device ---- */

static void put16(u8 *p, u64 v)
{
    v = MIN(v, 0xffff);
    p[0] = (u8)v;
    p[1] = (u8)(v >> 8);
}

/*
 * What firmware keeps in CMOS RAM for itself and for guests: base memory (KiB) at 0x15, memory above 1 MiB (KiB, capped) at 0x17 and 0x30, above
 * 16 MiB (64 KiB units) at 0x34, above 4 GiB (64 KiB units, three bytes) at 0x5b; checksum of 0x10..0x2d at 0x2e.
 */
static void fill_cmos(struct mc146818 *r, u64 below_4g, u64 above_4g)
{
    u64 high = MIN(above_4g / (64 * KiB), 0xffffff);
    unsigned sum = 0;

    put16(&r->ram[0x15], 640);
    put16(&r->ram[0x17], below_4g > MiB ? (below_4g - MiB) / KiB : 0);
    put16(&r->ram[0x30], below_4g > MiB ? (below_4g - MiB) / KiB : 0);
    put16(&r->ram[0x34], below_4g > 16 * MiB ? (below_4g - 16 * MiB) / (64 * KiB) : 0);
    for (int i = 0; i < 3; i++)
        r->ram[0x5b + i] = (u8)(high >> (8 * i));
    r->ram[0x14] = 0x06; /* equipment: coprocessor, PS/2 pointing device */
    for (int i = 0x10; i <= 0x2d; i++)
        sum += r->ram[i];
    r->ram[0x2e] = (u8)(sum >> 8); /* high byte first */
    r->ram[0x2f] = (u8)sum;
}

/* The RESET pin ("Power-on and reset considerations"): interrupts off, all else is kept by the battery. */
static void mc146818_reset(struct device *d)
{
    struct mc146818 *r = (struct mc146818 *)d;

    pthread_mutex_lock(&d->lock);
    r->ram[REG_B] &= ~(B_ENABLES | B_SQWE);
    r->ram[REG_C] = 0;
    r->index = 0;
    r->nmi_masked = false;
    update_irq(r);
    arm(r);
    pthread_mutex_unlock(&d->lock);
}

static void mc146818_state(struct device *d, struct stream *s)
{
    struct mc146818 *r = (struct mc146818 *)d;
    u64 offset = (u64)r->offset_ns;

    stream_section(s, "mc146818", 1);
    stream_u8(s, &r->index);
    stream_bool(s, &r->nmi_masked);
    stream_bytes(s, r->ram, sizeof(r->ram));
    stream_u64(s, &offset);
    stream_u64(s, &r->frozen_ns);
    stream_u64(s, &r->seen_ns);
    if (!s->load)
        return;
    r->offset_ns = (s64)offset;
    r->index &= 0x7f;
    if (rtc_ns(r) >= SECONDS_MAX * NS_PER_S || r->seen_ns >= SECONDS_MAX * NS_PER_S) {
        r->offset_ns = 0;
        r->frozen_ns = r->seen_ns = clock_wall_ns();
    }
    arm(r); /* the interrupt controllers restore the wire's level themselves */
}

static void mc146818_free(struct device *d)
{
    struct mc146818 *r = (struct mc146818 *)d;

    timer_disarm(&r->timer);
    pthread_mutex_destroy(&d->lock);
    free(r);
}

static const struct device_ops mc146818_ops = {
    .name = "mc146818",
    .reset = mc146818_reset,
    .state = mc146818_state,
    .free = mc146818_free,
};

int mc146818_new(struct bus *pio, struct clock *clock, struct irq_line irq8, u64 below_4g, u64 above_4g, struct mc146818 **out)
{
    struct mc146818 *r = calloc(1, sizeof(*r));
    int e;

    if (!r)
        return err(-ENOMEM, "mc146818: out of memory");
    device_init(&r->device, &mc146818_ops);
    r->clock = clock;
    r->irq8 = irq8;
    r->ram[REG_A] = 0x26; /* 32.768 kHz, 1024 Hz */
    r->ram[REG_B] = B_24H;
    r->seen_ns = clock_wall_ns();
    fill_cmos(r, below_4g, above_4g);
    timer_init(&r->timer, clock, timer_fired, r);

    struct region region = {
        .base = 0x70, .size = 2, .min = 1, .max = 1, .read = port_read, .write = port_write, .dev = r, .lock = &r->device.lock, .name = "mc146818",
    };
    e = bus_add(pio, &region);
    if (e < 0) {
        mc146818_free(&r->device);
        return e;
    }
    *out = r;
    return 0;
}
