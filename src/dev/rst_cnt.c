/*
 * Reset control register (Intel PCH data sheets, "RST_CNT", I/O address 0xcf9): bit 1 chooses what kind of reset, bit 2 causes it on its rising edge, bit 3
 * asks for a power cycle. Every kind is the same machine reset here. Locking: device.lock; the hook is called under it.
 */
#include "dev/rst_cnt.h"

#include <errno.h>

#include "base/err.h"

#define RST_CPU 0x04
#define RST_WRITABLE 0x0e

struct rst_cnt {
    struct device device;
    struct machine_hook hook;
    u8 val;
};

static u64 port_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    return ((struct rst_cnt *)dev)->val;
}

static void port_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct rst_cnt *p = dev;
    bool rising = (val & RST_CPU) && !(p->val & RST_CPU);

    p->val = val & RST_WRITABLE;
    if (rising)
        machine_tell(&p->hook, MACHINE_RESET);
}

static void rst_cnt_reset(struct device *d)
{
    struct rst_cnt *p = (struct rst_cnt *)d;

    pthread_mutex_lock(&d->lock);
    p->val = 0;
    pthread_mutex_unlock(&d->lock);
}

static void rst_cnt_state(struct device *d, struct stream *s)
{
    struct rst_cnt *p = (struct rst_cnt *)d;

    stream_section(s, "rst_cnt", 1);
    stream_u8(s, &p->val);
    if (s->load)
        p->val &= RST_WRITABLE;
}

static void rst_cnt_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops rst_cnt_ops = {
    .name = "rst_cnt",
    .reset = rst_cnt_reset,
    .state = rst_cnt_state,
    .free = rst_cnt_free,
};

int rst_cnt_new(struct bus *pio, struct machine_hook hook, struct rst_cnt **out)
{
    struct rst_cnt *p = calloc(1, sizeof(*p));
    int r;

    if (!p)
        return err(-ENOMEM, "rst_cnt: out of memory");
    device_init(&p->device, &rst_cnt_ops);
    p->hook = hook;

    struct region region = {
        .base = RST_CNT_PORT, .size = 1, .min = 1, .max = 1, .read = port_read, .write = port_write, .dev = p, .lock = &p->device.lock,
        .name = "reset control", .overlay = true,
    };
    r = bus_add(pio, &region);
    if (r < 0) {
        rst_cnt_free(&p->device);
        return r;
    }
    *out = p;
    return 0;
}
