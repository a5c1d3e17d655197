/*
 * Debug exit port (QEMU's hw/misc "isa-debug-exit"; there is no other specification): four ports, of which a write of
 * 1, 2 or 4 bytes ends the machine. What becomes of the value is the receiver's affair. Reads give 0. It has no state.
 * Locking: device.lock; the hook is called under it.
 */
#include "dev/debug_exit.h"

#include <errno.h>

#include "base/err.h"

struct debug_exit {
    struct device device;
    struct machine_hook hook;
};

static u64 port_read(void *dev UNUSED, u64 off UNUSED, unsigned size UNUSED)
{
    return 0;
}

static void port_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct debug_exit *p = dev;

    if (p->hook.exit)
        p->hook.exit(p->hook.arg, (u32)val);
}

static void debug_exit_reset(struct device *d UNUSED)
{
}

static void debug_exit_state(struct device *d UNUSED, struct stream *s)
{
    stream_section(s, "debug_exit", 1);
}

static void debug_exit_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops debug_exit_ops = {
    .name = "debug_exit",
    .reset = debug_exit_reset,
    .state = debug_exit_state,
    .free = debug_exit_free,
};

int debug_exit_new(struct bus *pio, u16 port, struct machine_hook hook, struct debug_exit **out)
{
    struct debug_exit *p = calloc(1, sizeof(*p));
    int r;

    if (!p)
        return err(-ENOMEM, "debug exit port: out of memory");
    device_init(&p->device, &debug_exit_ops);
    p->hook = hook;

    struct region region = {
        .base = port, .size = 4, .min = 1, .max = 4, .read = port_read, .write = port_write, .dev = p, .lock = &p->device.lock, .name = "debug exit",
    };
    r = bus_add(pio, &region);
    if (r < 0) {
        debug_exit_free(&p->device);
        return r;
    }
    *out = p;
    return 0;
}
