/*
 * The part of a virtio device that is the same for all (see virtio.h; virtio 1.2 chapter 2 and 3.1).
 *
 * A reset may take time: status keeps its old value until the requests in flight have been answered by the host, since after it reads 0 the driver may
 * use the memory for something else (2.1.2, 2.4). Everything else that the driver writes meanwhile is ignored.
 *
 * Left out: in-order use, resets of single queues, notification data.
 */
#include "io/virtio.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <string.h>

#define COMMON_FEATURES (BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_INDIRECT_DESC) | BIT(VIRTIO_RING_F_EVENT_IDX) | \
                         BIT(VIRTIO_F_RING_PACKED))
#define LEGACY_FEATURES BIT(VIRTIO_F_ANY_LAYOUT)                   /* 6.3: chains need not look as legacy devices wanted them */
#define LEGACY_ALIGN 4096u                                         /* 2.7.2, 4.1.5.1.3.1 */
#define DRIVER_STATUS                                                                                                       \
    (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK |         \
     VIRTIO_CONFIG_S_FAILED)

int virtio_init(struct virtio *v, const struct device_ops *dops, const struct virtio_ops *ops, u16 type, struct ram *ram, const struct log *log,
                u64 features, void *config, unsigned config_len, const u16 *queue_size, unsigned queues)
{
    bug_on(!queues || queues > VIRTIO_QUEUES_MAX);
    *v = (struct virtio){ .ops = ops, .type = type, .ram = ram, .log = log, .offered = features | COMMON_FEATURES, .config = config,
                          .config_len = config_len, .queues = queues };
    v->queue = calloc(queues, sizeof(*v->queue));
    if (!v->queue)
        return err(-ENOMEM, "%s: out of memory", dops->name);
    for (unsigned n = 0; n < queues; n++)
        virtq_init(&v->queue[n], ram, queue_size[n]);
    device_init(&v->device, dops);
    return 0;
}

void virtio_destroy(struct virtio *v)
{
    if (v->transport)
        v->transport_ops->free(v->transport);
    free(v->queue);
    pthread_mutex_destroy(&v->device.lock);
}

static void forget(struct virtio *v)
{
    v->status = 0;
    v->accepted = 0;
    v->resetting = false;
    v->legacy = false;
    for (unsigned n = 0; n < v->queues; n++)
        virtq_reset(&v->queue[n]);
}

void virtio_device_reset(struct virtio *v)
{
    forget(v);
    v->config_generation = 0;
    if (v->transport)
        v->transport_ops->power_on(v->transport);
}

void virtio_stopped(struct virtio *v)
{
    if (!v->resetting)
        return;
    forget(v);
    if (v->transport)
        v->transport_ops->reset_done(v->transport);
}

bool virtio_running(const struct virtio *v)
{
    return (v->legacy || (v->status & VIRTIO_CONFIG_S_DRIVER_OK)) && !(v->status & (VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED)) &&
           !v->resetting && (!v->transport || v->transport_ops->may_dma(v->transport));
}

void virtio_break(struct virtio *v, const char *why)
{
    if (v->status & VIRTIO_CONFIG_S_NEEDS_RESET)
        return;
    v->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    if (!v->complained)
        log_msg(v->log, LOG_WARN, "%s: %s; the device waits for a reset by the guest's driver", v->device.ops->name, why);
    v->complained = true;
    if ((v->status & VIRTIO_CONFIG_S_DRIVER_OK) && !v->resetting && v->transport)
        v->transport_ops->config_changed(v->transport);
}

bool virtio_pop(struct virtio *v, unsigned n, struct virtq_chain *c)
{
    int r;

    if (!virtio_running(v))
        return false;
    r = virtq_pop(&v->queue[n], c);
    if (r < 0)
        virtio_break(v, "the guest's driver has made a virtqueue that breaks the rules");
    return r > 0;
}

bool virtio_interrupt(struct virtio *v, unsigned n)
{
    bool wanted = virtq_wants_interrupt(&v->queue[n]);

    if (wanted && v->transport)
        v->transport_ops->interrupt(v->transport, &v->queue[n]);
    if (v->queue[n].broken)
        virtio_break(v, "a virtqueue lies outside of memory");
    return wanted;
}

void virtio_config_changed(struct virtio *v)
{
    v->config_generation++;
    if ((v->status & VIRTIO_CONFIG_S_DRIVER_OK) && !v->resetting && v->transport)
        v->transport_ops->config_changed(v->transport);
}

u8 virtio_status(const struct virtio *v)
{
    return v->status;
}

static void set_queue_features(struct virtio *v)
{
    for (unsigned n = 0; n < v->queues; n++) {
        v->queue[n].event_idx = virtio_has(v, VIRTIO_RING_F_EVENT_IDX);
        v->queue[n].indirect = virtio_has(v, VIRTIO_RING_F_INDIRECT_DESC);
        v->queue[n].packed = virtio_has(v, VIRTIO_F_RING_PACKED);
    }
}

void virtio_set_status(struct virtio *v, u8 status)
{
    u8 added = status & DRIVER_STATUS & ~v->status;

    if (v->resetting)
        return;
    if (!status) {
        v->resetting = true;
        if (!v->ops->stop || v->ops->stop(v))
            virtio_stopped(v);
        return;
    }
    if ((added & VIRTIO_CONFIG_S_FEATURES_OK) &&
        (v->legacy || (v->accepted & ~v->offered) || !virtio_has(v, VIRTIO_F_VERSION_1)))
        added &= (u8)~VIRTIO_CONFIG_S_FEATURES_OK;                 /* 2.2.2: the driver reads it back as refused */
    if (!v->legacy && !((v->status | added) & VIRTIO_CONFIG_S_FEATURES_OK))
        added &= (u8)~VIRTIO_CONFIG_S_DRIVER_OK;
    v->status |= added;
    if (added & VIRTIO_CONFIG_S_FEATURES_OK)
        set_queue_features(v);                                     /* before queues are enabled: they look at what they are made of */
    if (added & VIRTIO_CONFIG_S_DRIVER_OK) {
        set_queue_features(v);
        if (v->ops->start)
            v->ops->start(v);
        virtio_kick_all(v);                                        /* chains may have been made available before DRIVER_OK */
    }
}

void virtio_accept(struct virtio *v, unsigned word, u32 bits)
{
    if (word > 1 || v->resetting || v->legacy || (v->status & VIRTIO_CONFIG_S_FEATURES_OK))
        return;
    if (word)
        v->accepted = (u32)v->accepted | (u64)bits << 32;
    else
        v->accepted = (v->accepted & ~0xffffffffull) | bits;
}

/* --- legacy drivers --- */

/* A modern driver that has negotiated stays one until it is reset. */
static bool legacy_use(struct virtio *v)
{
    if (v->resetting)
        return false;
    if (!(v->status & VIRTIO_CONFIG_S_FEATURES_OK))
        v->legacy = true;
    return v->legacy;
}

void virtio_legacy_set_status(struct virtio *v, u8 status)
{
    if (!status && !v->resetting)
        v->legacy = true;                                          /* whose reset ends at once, whoever came before */
    else
        legacy_use(v);
    virtio_set_status(v, status);
}

u32 virtio_legacy_features(const struct virtio *v)
{
    return (u32)(v->offered | LEGACY_FEATURES);
}

/* Some use the device before they say what they understand (3.1.2), so it counts at once. What was not offered is not taken. */
void virtio_legacy_accept(struct virtio *v, u32 bits)
{
    if (!legacy_use(v) || (v->status & VIRTIO_CONFIG_S_DRIVER_OK))
        return;
    v->accepted = bits & virtio_legacy_features(v);
    set_queue_features(v);
}

/*
 * Drivers give a queue back when they have reset the device, or have not begun to use it (other interrupts are tried). A single
 * queue that is in use cannot be stopped by itself: then all of the device is reset.
 */
void virtio_legacy_queue(struct virtio *v, struct virtq *q, u64 gpa)
{
    if (!legacy_use(v) || q->enabled == (gpa != 0))
        return;
    if (!gpa && (v->status & VIRTIO_CONFIG_S_DRIVER_OK)) {
        virtio_legacy_set_status(v, 0);
        return;
    }
    virtq_reset(q);
    set_queue_features(v);
    if (!gpa)
        return;
    q->desc = gpa;
    q->avail = gpa + sizeof(struct vring_desc) * q->size;
    q->used = ALIGN_UP(q->avail + sizeof(u16) * (3 + q->size), LEGACY_ALIGN);
    virtq_enable(q);
    if (q->broken)
        virtio_break(v, "a virtqueue lies outside of memory");
}

void virtio_kick(struct virtio *v, unsigned n)
{
    if (n < v->queues && v->queue[n].enabled && virtio_running(v))
        v->ops->kick(v, n);
}

void virtio_kick_all(struct virtio *v)
{
    for (unsigned n = 0; n < v->queues; n++)
        virtio_kick(v, n);
}

void virtio_config_read(struct virtio *v, u64 off, void *buf, unsigned len)
{
    memset(buf, 0, len);
    if (off < v->config_len)
        memcpy(buf, (u8 *)v->config + off, MIN(len, v->config_len - off));
}

void virtio_config_write(struct virtio *v, u64 off, const void *buf, unsigned len)
{
    if (v->ops->config_write && !v->resetting && range_in(off, len, v->config_len))
        v->ops->config_write(v, (unsigned)off, buf, len);
}

void virtio_state(struct virtio *v, struct stream *s)
{
    if (!stream_section(s, "virtio", 3))
        return;
    stream_u64(s, &v->accepted);
    stream_u8(s, &v->status);
    stream_bool(s, &v->legacy);
    stream_bool(s, &v->resetting);
    stream_u8(s, &v->config_generation);
    for (unsigned n = 0; n < v->queues; n++)
        virtq_state(&v->queue[n], s);
    if (s->load && !s->error && ((v->status & VIRTIO_CONFIG_S_FEATURES_OK) && (v->accepted & ~v->offered)))
        stream_bad(s, "a virtio driver uses features that the device does not have");
    if (s->load && !s->error && v->legacy &&
        ((v->status & VIRTIO_CONFIG_S_FEATURES_OK) || (v->accepted & ~(u64)virtio_legacy_features(v))))
        stream_bad(s, "a legacy virtio driver has negotiated as a modern one");
    if (s->load && !s->error)
        set_queue_features(v);
    if (v->transport)
        v->transport_ops->state(v->transport, s);
    /* What was in flight when a reset began is forgotten: it ends here. */
    if (s->load && !s->error && v->resetting)
        virtio_stopped(v);
}
