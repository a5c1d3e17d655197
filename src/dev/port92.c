/*
 * System control port A (IBM PS/2 technical reference): bit 0 resets the processor on its rising edge, bit 1 is the alternate A20 gate.
 *
 * A20 is always open on this board: the gate's bit can be written and read, and masks nothing. Locking: device.lock; the hook is called under it.
 */
#include "dev/port92.h"

#include <errno.h>

#include "base/err.h"

#define FAST_RESET 0x01
#define A20_GATE 0x02

struct port92 {
    struct device device;
    struct machine_hook hook;
    u8 val;
};

static u64 port_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    return ((struct port92 *)dev)->val;
}

static void port_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct port92 *p = dev;
    bool rising = (val & FAST_RESET) && !(p->val & FAST_RESET);

    p->val = val & (FAST_RESET | A20_GATE);
    if (rising)
        machine_tell(&p->hook, MACHINE_RESET);
}

static void port92_reset(struct device *d)
{
    struct port92 *p = (struct port92 *)d;

    pthread_mutex_lock(&d->lock);
    p->val = A20_GATE;
    pthread_mutex_unlock(&d->lock);
}

static void port92_state(struct device *d, struct stream *s)
{
    struct port92 *p = (struct port92 *)d;

    stream_section(s, "port92", 1);
    stream_u8(s, &p->val);
    if (s->load)
        p->val &= FAST_RESET | A20_GATE;
}

static void port92_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops port92_ops = {
    .name = "port92",
    .reset = port92_reset,
    .state = port92_state,
    .free = port92_free,
};

int port92_new(struct bus *pio, struct machine_hook hook, struct port92 **out)
{
    struct port92 *p = calloc(1, sizeof(*p));
    int r;

    if (!p)
        return err(-ENOMEM, "port92: out of memory");
    device_init(&p->device, &port92_ops);
    p->hook = hook;
    p->val = A20_GATE;

    struct region region = {
        .base = 0x92, .size = 1, .min = 1, .max = 1, .read = port_read, .write = port_write, .dev = p, .lock = &p->device.lock, .name = "port 0x92",
    };
    r = bus_add(pio, &region);
    if (r < 0) {
        port92_free(&p->device);
        return r;
    }
    *out = p;
    return 0;
}
