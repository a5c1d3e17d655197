/*
 * POST code port, DMA page registers beside it, and the delay port 0xed: sixteen and one bytes that remember what was written.
 * Guests write them to pass a microsecond (an ISA bus cycle); there is no DMA controller. Locking: device.lock.
 */
#include "dev/port80.h"

#include <errno.h>

#include "base/err.h"

struct port80 {
    struct device device;
    u8 page[16], delay;
};

static u64 page_read(void *dev, u64 off, unsigned size UNUSED)
{
    return ((struct port80 *)dev)->page[off];
}

static void page_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    ((struct port80 *)dev)->page[off] = (u8)val;
}

static u64 delay_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    return ((struct port80 *)dev)->delay;
}

static void delay_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    ((struct port80 *)dev)->delay = (u8)val;
}

static void port80_reset(struct device *d)
{
    struct port80 *p = (struct port80 *)d;

    pthread_mutex_lock(&d->lock);
    for (size_t i = 0; i < sizeof(p->page); i++)
        p->page[i] = 0;
    p->delay = 0;
    pthread_mutex_unlock(&d->lock);
}

static void port80_state(struct device *d, struct stream *s)
{
    struct port80 *p = (struct port80 *)d;

    stream_section(s, "port80", 1);
    stream_bytes(s, p->page, sizeof(p->page));
    stream_u8(s, &p->delay);
}

static void port80_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops port80_ops = {
    .name = "port80",
    .reset = port80_reset,
    .state = port80_state,
    .free = port80_free,
};

int port80_new(struct bus *pio, struct port80 **out)
{
    struct port80 *p = calloc(1, sizeof(*p));
    int r;

    if (!p)
        return err(-ENOMEM, "port80: out of memory");
    device_init(&p->device, &port80_ops);

    struct region page = {
        .base = 0x80, .size = 16, .min = 1, .max = 1, .read = page_read, .write = page_write, .dev = p, .lock = &p->device.lock, .name = "port 0x80",
    };
    struct region delay = {
        .base = 0xed, .size = 1, .min = 1, .max = 1, .read = delay_read, .write = delay_write, .dev = p, .lock = &p->device.lock, .name = "port 0xed",
    };
    r = bus_add(pio, &page);
    if (r >= 0)
        r = bus_add(pio, &delay);
    if (r < 0) {
        port80_free(&p->device);
        return r;
    }
    *out = p;
    return 0;
}
