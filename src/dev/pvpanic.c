/*
 * pvpanic, the panic notification port (QEMU docs/specs/pvpanic): a read gives the events that are understood, a write reports some.
 * It has no state. Locking: device.lock; the hook is called under it.
 */
#include "dev/pvpanic.h"

#include <errno.h>

#include "base/err.h"

#define PVPANIC_PANICKED 0x01
#define PVPANIC_CRASH_LOADED 0x02

struct pvpanic {
    struct device device;
    struct machine_hook hook;
};

static u64 port_read(void *dev UNUSED, u64 off UNUSED, unsigned size UNUSED)
{
    return PVPANIC_PANICKED | PVPANIC_CRASH_LOADED;
}

static void port_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct pvpanic *p = dev;

    if (val & PVPANIC_PANICKED)
        machine_tell(&p->hook, MACHINE_PANICKED);
    else if (val & PVPANIC_CRASH_LOADED)
        machine_tell(&p->hook, MACHINE_CRASH_LOADED);
}

static void pvpanic_reset(struct device *d UNUSED)
{
}

static void pvpanic_state(struct device *d UNUSED, struct stream *s)
{
    stream_section(s, "pvpanic", 1);
}

static void pvpanic_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops pvpanic_ops = {
    .name = "pvpanic",
    .reset = pvpanic_reset,
    .state = pvpanic_state,
    .free = pvpanic_free,
};

int pvpanic_new(struct bus *pio, u16 port, struct machine_hook hook, struct pvpanic **out)
{
    struct pvpanic *p = calloc(1, sizeof(*p));
    int r;

    if (!p)
        return err(-ENOMEM, "pvpanic: out of memory");
    device_init(&p->device, &pvpanic_ops);
    p->hook = hook;

    struct region region = {
        .base = port, .size = 1, .min = 1, .max = 1, .read = port_read, .write = port_write, .dev = p, .lock = &p->device.lock, .name = "pvpanic",
    };
    r = bus_add(pio, &region);
    if (r < 0) {
        pvpanic_free(&p->device);
        return r;
    }
    *out = p;
    return 0;
}
