/*
 * A VGA without a picture (IBM VGA technical reference, for the register addresses): 128 KiB of video memory as plain bytes, and registers that keep what is written, so
 * that code which probes for a display, waits for a retrace or clears the screen goes on.
 *
 * Input status 1 counts frames of 60 Hz with 1/16 of vertical retrace by the guest's clock. Left out: planes, latches, write modes, fonts, the DAC's
 * palette (its data reads back from a flat array): video memory is linear whatever the registers say.
 *
 * Locking: device.lock.
 */
#include "dev/vga_mem.h"

#include <errno.h>
#include <string.h>

#include "base/err.h"

#define VIDEO_BASE 0xa0000
#define VIDEO_SIZE 0x20000
#define PORT_BASE 0x3b0
#define PORTS 0x30
#define FRAME_NS 16666667u
#define STATUS_RETRACE 0x08
#define STATUS_BLANK 0x01

/* A group of registers behind an index port. */
struct indexed {
    u8 index, reg[256];
};

struct vga_mem {
    struct device device;
    struct clock *clock;
    u8 misc, pel_mask;
    bool attr_data;                                                /* 0x3c0: the next write is data, not an index */
    struct indexed attr, seq, gfx, crtc;
    u8 dac[768];
    u16 dac_read, dac_write;
    u8 *mem;
};

/* ---- memory ---- */

static u64 mem_read(void *dev, u64 off, unsigned size)
{
    u64 val = 0;

    memcpy(&val, ((struct vga_mem *)dev)->mem + off, size);
    return val;
}

static void mem_write(void *dev, u64 off, u64 val, unsigned size)
{
    memcpy(((struct vga_mem *)dev)->mem + off, &val, size);
}

/* ---- registers ---- */

static u8 input_status(const struct vga_mem *v)
{
    u64 in_frame = clock_ns(v->clock) % FRAME_NS;

    if (in_frame > FRAME_NS - FRAME_NS / 16)
        return STATUS_RETRACE | STATUS_BLANK;
    return in_frame / 1000 % 32 < 6 ? STATUS_BLANK : 0; /* a line of 32 us with its horizontal blank */
}

static u64 port_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct vga_mem *v = dev;
    u8 val;

    switch (off + PORT_BASE) {
    case 0x3c0: return v->attr.index;
    case 0x3c1: return v->attr.reg[v->attr.index & 31];
    case 0x3c4: return v->seq.index;
    case 0x3c5: return v->seq.reg[v->seq.index];
    case 0x3c6: return v->pel_mask;
    case 0x3c8: return v->dac_write / 3;
    case 0x3c9:
        val = v->dac[v->dac_read];
        v->dac_read = (u16)((v->dac_read + 1u) % sizeof(v->dac));
        return val;
    case 0x3c2: return 0x10; /* input status 0: a display senses the signal */
    case 0x3cc: return v->misc;
    case 0x3ce: return v->gfx.index;
    case 0x3cf: return v->gfx.reg[v->gfx.index];
    case 0x3b4:
    case 0x3d4: return v->crtc.index;
    case 0x3b5:
    case 0x3d5: return v->crtc.reg[v->crtc.index];
    case 0x3ba:
    case 0x3da:
        v->attr_data = false;
        return input_status(v);
    }
    return 0xff;
}

static void port_write(void *dev, u64 off, u64 val64, unsigned size UNUSED)
{
    struct vga_mem *v = dev;
    u8 val = (u8)val64;

    switch (off + PORT_BASE) {
    case 0x3c0:
        if (v->attr_data)
            v->attr.reg[v->attr.index & 31] = val;
        else
            v->attr.index = val & 0x3f;
        v->attr_data = !v->attr_data;
        break;
    case 0x3c2: v->misc = val; break;
    case 0x3c4: v->seq.index = val; break;
    case 0x3c5: v->seq.reg[v->seq.index] = val; break;
    case 0x3c6: v->pel_mask = val; break;
    case 0x3c7: v->dac_read = (u16)(val * 3); break;
    case 0x3c8: v->dac_write = (u16)(val * 3); break;
    case 0x3c9:
        v->dac[v->dac_write] = val & 0x3f;
        v->dac_write = (u16)((v->dac_write + 1u) % sizeof(v->dac));
        break;
    case 0x3ce: v->gfx.index = val; break;
    case 0x3cf: v->gfx.reg[v->gfx.index] = val; break;
    case 0x3b4:
    case 0x3d4: v->crtc.index = val; break;
    case 0x3b5:
    case 0x3d5: v->crtc.reg[v->crtc.index] = val; break;
    }
}

/* ---- device ---- */

static void clear(struct vga_mem *v)
{
    memset(v->mem, 0, VIDEO_SIZE);
    memset(&v->attr, 0, sizeof(v->attr));
    memset(&v->seq, 0, sizeof(v->seq));
    memset(&v->gfx, 0, sizeof(v->gfx));
    memset(&v->crtc, 0, sizeof(v->crtc));
    memset(v->dac, 0, sizeof(v->dac));
    v->misc = 0x67; /* colour addresses (0x3dX), memory enabled: as text mode 3 has it */
    v->pel_mask = 0xff;
    v->attr_data = false;
    v->dac_read = v->dac_write = 0;
}

static void vga_mem_reset(struct device *d)
{
    pthread_mutex_lock(&d->lock);
    clear((struct vga_mem *)d);
    pthread_mutex_unlock(&d->lock);
}

static void indexed_state(struct indexed *x, struct stream *s)
{
    stream_u8(s, &x->index);
    stream_bytes(s, x->reg, sizeof(x->reg));
}

static void vga_mem_state(struct device *d, struct stream *s)
{
    struct vga_mem *v = (struct vga_mem *)d;

    stream_section(s, "vga_mem", 1);
    stream_u8(s, &v->misc);
    stream_u8(s, &v->pel_mask);
    stream_bool(s, &v->attr_data);
    indexed_state(&v->attr, s);
    indexed_state(&v->seq, s);
    indexed_state(&v->gfx, s);
    indexed_state(&v->crtc, s);
    stream_bytes(s, v->dac, sizeof(v->dac));
    stream_u16(s, &v->dac_read);
    stream_u16(s, &v->dac_write);
    stream_bytes(s, v->mem, VIDEO_SIZE);
    if (s->load && (v->dac_read >= sizeof(v->dac) || v->dac_write >= sizeof(v->dac))) {
        stream_bad(s, "vga_mem: impossible palette index");
        v->dac_read = v->dac_write = 0;
    }
}

static void vga_mem_free(struct device *d)
{
    struct vga_mem *v = (struct vga_mem *)d;

    pthread_mutex_destroy(&d->lock);
    free(v->mem);
    free(v);
}

static const struct device_ops vga_mem_ops = {
    .name = "vga_mem",
    .reset = vga_mem_reset,
    .state = vga_mem_state,
    .free = vga_mem_free,
};

int vga_mem_new(struct bus *pio, struct bus *mmio, struct clock *clock, struct vga_mem **out)
{
    struct vga_mem *v = calloc(1, sizeof(*v));
    int r;

    if (!v)
        return err(-ENOMEM, "vga_mem: out of memory");
    device_init(&v->device, &vga_mem_ops);
    v->clock = clock;
    v->mem = malloc(VIDEO_SIZE);
    if (!v->mem) {
        vga_mem_free(&v->device);
        return err(-ENOMEM, "vga_mem: out of memory");
    }
    clear(v);

    struct region mem = {
        .base = VIDEO_BASE, .size = VIDEO_SIZE, .min = 1, .max = 8, .read = mem_read, .write = mem_write, .dev = v, .lock = &v->device.lock,
        .name = "video memory",
    };
    struct region ports = {
        .base = PORT_BASE, .size = PORTS, .min = 1, .max = 1, .read = port_read, .write = port_write, .dev = v, .lock = &v->device.lock,
        .name = "vga",
    };
    r = bus_add(mmio, &mem);
    if (r >= 0)
        r = bus_add(pio, &ports);
    if (r < 0) {
        vga_mem_free(&v->device);
        return r;
    }
    *out = v;
    return 0;
}
