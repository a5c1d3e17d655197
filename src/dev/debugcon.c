/*
 * Debug console port (see debugcon.h). A read gives 0xe9, by which guests find it.
 *
 * The port has no ready bit, so a guest cannot be told to wait: the vCPU that writes does, for a while, when the host
 * end is full. A host end that takes nothing for so long loses bytes, which is said once; after that nobody waits until
 * it takes some again.
 *
 * Locking: the handlers lock nothing, so that whoever waits holds no device up; the two flags are atomic.
 */
#include "dev/debugcon.h"

#include <errno.h>
#include <stdatomic.h>
#include <time.h>

#define WAIT_STEP_NS 1000000
#define WAIT_STEPS 250

struct debugcon {
    struct device device;
    struct chardev *out;
    const struct log *log;
    u16 port;
    atomic_bool stalled, complained;
};

static u64 port_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    return ((struct debugcon *)dev)->port & 0xff;
}

static void port_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct debugcon *p = dev;
    u8 byte = (u8)val;

    for (unsigned i = 0; !chardev_write(p->out, &byte, 1); i++) {
        struct timespec step = { .tv_nsec = WAIT_STEP_NS };

        if (i == WAIT_STEPS || atomic_load(&p->stalled)) {
            atomic_store(&p->stalled, true);
            if (!atomic_exchange(&p->complained, true))
                log_msg(p->log, LOG_WARN, "debug console: nobody reads the guest's output; some of it is lost");
            return;
        }
        nanosleep(&step, NULL);
    }
    atomic_store(&p->stalled, false);
}

static void debugcon_reset(struct device *d UNUSED)
{
}

static void debugcon_state(struct device *d UNUSED, struct stream *s)
{
    stream_section(s, "debugcon", 1);
}

static void debugcon_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops debugcon_ops = {
    .name = "debugcon",
    .reset = debugcon_reset,
    .state = debugcon_state,
    .free = debugcon_free,
};

int debugcon_new(struct bus *pio, u16 port, struct chardev *out, const struct log *log, struct debugcon **con)
{
    struct debugcon *p = calloc(1, sizeof(*p));
    int r;

    if (!p)
        return err(-ENOMEM, "debug console: out of memory");
    device_init(&p->device, &debugcon_ops);
    p->out = out;
    p->log = log;
    p->port = port;

    struct region region = { .base = port, .size = 1, .min = 1, .max = 1, .read = port_read, .write = port_write, .dev = p, .name = "debug console" };
    r = bus_add(pio, &region);
    if (r < 0) {
        debugcon_free(&p->device);
        return r;
    }
    *con = p;
    return 0;
}
