/*
 * The bus between local APICs (Intel SDM vol. 3A 11.6.2, 11.11): who is meant by a destination, IPIs, MSIs, I/O APIC
 * messages, the i8259's wire.
 *
 * Messages arrive at once, so there is no arbitration and no retry: what a software-disabled local APIC does not accept
 * is lost.
 *
 * Locking: the list of local APICs changes only while the machine is built or taken down. Each receiver's own lock is
 * taken in turn, never two at a time.
 */
#include <errno.h>

#include "base/err.h"
#include "dev/lapic_int.h"

#define MSI_LOGICAL 0x4u               /* address bit 2 */
#define MSI_ASSERT 0x4000u             /* data */
#define MSI_LEVEL 0x8000u

static bool matches(const struct lapic *l, const struct apic_msg *m)
{
    u32 ldr = l->ldr;

    if (m->dest == (m->wide ? UINT32_MAX : 0xff))
        return true;
    if (!m->logical)
        return m->dest == l->id;
    if (lapic_x2apic(l)) { /* 11.12.10: cluster in the high half, member bits in the low half */
        ldr = lapic_x2apic_ldr(l);
        return m->dest >> 16 == ldr >> 16 && (m->dest & ldr & 0xffff);
    }
    if (m->dest > 0xff)
        return false;
    ldr >>= 24;
    if (l->dfr >> 28 == 0xf) /* 11.6.2.2: flat model, else cluster */
        return m->dest & ldr;
    return m->dest >> 4 == ldr >> 4 && (m->dest & ldr & 0xf);
}

/*
 * Lowest priority: of those that would accept, the one with the lowest processor priority; among equals, where the
 * vector points to, so that the vectors spread and each keeps its processor (and its caches).
 */
static void send_lowest(struct lapic_bus *lb, const struct apic_msg *m, const struct lapic *except)
{
    struct lapic *best = NULL;
    unsigned best_ppr = 256;

    for (unsigned i = 0; i < lb->n; i++) {
        struct lapic *l = lb->lapic[(i + m->vector) % lb->n];

        pthread_mutex_lock(&l->device.lock);
        if (l != except && lapic_hw_enabled(l) && (l->svr & SVR_ENABLE) && matches(l, m) && lapic_ppr(l) < best_ppr) {
            best_ppr = lapic_ppr(l);
            best = l;
        }
        pthread_mutex_unlock(&l->device.lock);
    }
    if (!best)
        return;
    pthread_mutex_lock(&best->device.lock);
    lapic_accept(best, APIC_FIXED, m->vector, m->level);
    pthread_mutex_unlock(&best->device.lock);
}

void lapic_bus_send_except(struct lapic_bus *lb, const struct apic_msg *m, const struct lapic *except)
{
    if (m->mode == APIC_LOWEST) {
        send_lowest(lb, m, except);
        return;
    }
    for (unsigned i = 0; i < lb->n; i++) {
        struct lapic *l = lb->lapic[i];

        if (l == except)
            continue;
        pthread_mutex_lock(&l->device.lock);
        if (matches(l, m))
            lapic_accept(l, m->mode, m->vector, m->level);
        pthread_mutex_unlock(&l->device.lock);
    }
}

void lapic_bus_send(struct lapic_bus *lb, const struct apic_msg *m)
{
    lapic_bus_send_except(lb, m, NULL);
}

/* 11.11: 0xfee, destination, redirection hint (bit 3, which changes nothing here), destination mode (bit 2). */
static void msi_send(void *arg, u64 addr, u32 data)
{
    struct lapic_bus *lb = arg;
    struct apic_msg m = {
        .dest = (u32)(addr >> 12) & 0xff, .vector = (u8)data, .mode = (data >> 8) & 7, .logical = addr & MSI_LOGICAL,
        .level = data & MSI_LEVEL,
    };

    if (addr >> 20 != 0xfee || (m.level && !(data & MSI_ASSERT)))
        return;
    if (lb->elsewhere.ops)
        lb->elsewhere.ops->msi(lb->elsewhere.arg, addr, data);
    else
        lapic_bus_send_except(lb, &m, NULL);
}

/* ---- life, wires ---- */

int lapic_bus_new(const struct lapic_config *cfg, struct lapic_bus **out)
{
    struct lapic_bus *lb = calloc(1, sizeof(*lb));

    if (!lb)
        return err(-ENOMEM, "lapic: out of memory");
    bug_on(cfg->phys_bits < 32 || cfg->phys_bits > 52);
    lb->cfg = *cfg;
    *out = lb;
    return 0;
}

void lapic_bus_attach(struct lapic_bus *lb, struct irqchip elsewhere)
{
    lb->elsewhere = elsewhere;
}

void lapic_bus_free(struct lapic_bus *lb)
{
    if (!lb)
        return;
    free(lb->lapic);
    free(lb);
}

int lapic_bus_add(struct lapic_bus *lb, struct lapic *l)
{
    struct lapic **grown = realloc(lb->lapic, (lb->n + 1) * sizeof(*grown));

    if (!grown)
        return err(-ENOMEM, "lapic: out of memory");
    lb->lapic = grown;
    lb->lapic[lb->n++] = l;
    return 0;
}

void lapic_bus_remove(struct lapic_bus *lb, struct lapic *l)
{
    for (unsigned i = 0; i < lb->n; i++)
        if (lb->lapic[i] == l) {
            lb->lapic[i] = lb->lapic[--lb->n];
            return;
        }
}

/* INTR of the i8259 is wired to LINT0 of every local APIC. */
static void pic_line_set(void *chip, int n UNUSED, int level)
{
    struct lapic_bus *lb = chip;

    if (lb->elsewhere.ops)
        return;
    for (unsigned i = 0; i < lb->n; i++) {
        pthread_mutex_lock(&lb->lapic[i]->device.lock);
        lapic_lint_set(lb->lapic[i], 0, level);
        pthread_mutex_unlock(&lb->lapic[i]->device.lock);
    }
}

struct irq_line lapic_bus_pic_line(struct lapic_bus *lb)
{
    return (struct irq_line){ pic_line_set, lb, 0 };
}

void lapic_bus_set_pic(struct lapic_bus *lb, struct i8259 *pic)
{
    lb->pic = pic;
}

struct msi_sink lapic_bus_msi(struct lapic_bus *lb)
{
    return (struct msi_sink){ msi_send, lb };
}

void lapic_bus_set_eoi_sink(struct lapic_bus *lb, struct apic_eoi_sink sink)
{
    lb->eoi_sink = sink;
}
