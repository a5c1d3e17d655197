/*
 * What all virtio devices share (virtio 1.2 chapter 2): status, features, configuration space, queues, reset; for modern
 * drivers, and for legacy ones where the transport has their interface.
 *
 * A device struct begins with `struct virtio virtio;`, which begins with `struct device device;`. Its constructor calls virtio_init(); the board
 * then gives it a transport (virtio_pci_attach). The device is one entry of the board's list: the transport's state, reset and end go with it.
 *
 *   status:  0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK      by the driver, in steps; bits are never taken back but by reset
 *            any -> NEEDS_RESET      by virtio_break(): a queue or a request made no sense, nothing is processed until reset
 *            any -> FAILED           by the driver
 *            write of 0 -> (still the old value while requests are in flight) -> 0
 *
 * A legacy driver (3.1.2 and the notes on legacy interfaces throughout) knows nothing of FEATURES_OK, may use a queue before
 * DRIVER_OK, and does not wait for the end of a reset. It is told from a modern one by the registers that it uses.
 *
 * Threads: all under device.lock, which the transport's register handlers hold already; worker threads take it themselves.
 */
#pragma once

#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

#include "base/err.h"
#include "io/device.h"
#include "io/virtq.h"

#define VIRTIO_QUEUES_MAX 64
#define VIRTIO_NO_VECTOR 0xffff

struct virtio;
struct virtio_ops {
    /* The driver has set DRIVER_OK: features are final, the enabled queues may be used. Optional. */
    void (*start)(struct virtio *v);
    /* The driver has put chains into queue n (or has just become ready). Only while virtio_running(). */
    void (*kick)(struct virtio *v, unsigned n);
    /* A reset begins: take nothing more from the queues, drop what is held. Returns true if nothing is in flight; else the device calls
     * virtio_stopped() when that is so. A legacy driver does not look whether that has happened: while v->legacy, stop() is to
     * come back with nothing in flight; it may wait for the host's storage, for a bounded time and with the device's lock
     * released, but for no other thread. Optional (always true). */
    bool (*stop)(struct virtio *v);
    /* The driver has written bytes [off, off + len) of config[]. Optional: without it the space is read-only. */
    void (*config_write)(struct virtio *v, unsigned off, const void *val, unsigned len);
};

/* How the device reaches its driver; under the device's lock. */
struct virtio_transport_ops {
    void (*interrupt)(void *t, struct virtq *q);
    void (*config_changed)(void *t);
    bool (*may_dma)(void *t);                                      /* bus mastership */
    void (*reset_done)(void *t);                                   /* a driver's reset is complete: forget vectors, ISR */
    void (*power_on)(void *t);                                     /* back to how it was built */
    void (*state)(void *t, struct stream *s);
    void (*free)(void *t);
};

struct virtio {
    struct device device;
    const struct virtio_ops *ops;
    u16 type;                                                      /* VIRTIO_ID_... */
    struct ram *ram;
    const struct log *log;
    u64 offered, accepted;                                         /* features */
    u8 status;
    bool legacy;                                                   /* since the last reset, the legacy registers are used */
    bool resetting;                                                /* 0 was written to status, requests are still in flight */
    bool complained;                                               /* one message about a bad driver is enough */
    u8 config_generation;
    void *config;                                                  /* device-specific configuration, in the device's struct */
    unsigned config_len;
    struct virtq *queue;
    unsigned queues;
    const struct virtio_transport_ops *transport_ops;
    void *transport;
};

/* For devices */

/* features: beside VERSION_1, INDIRECT_DESC, EVENT_IDX and RING_PACKED, which all have. queue_size[n]: powers of two up to VIRTQ_SIZE_MAX. -ENOMEM with err(). */
int virtio_init(struct virtio *v, const struct device_ops *dops, const struct virtio_ops *ops, u16 type, struct ram *ram, const struct log *log,
                u64 features, void *config, unsigned config_len, const u16 *queue_size, unsigned queues);
void virtio_destroy(struct virtio *v);                             /* frees transport and queues, not v */
void virtio_device_reset(struct virtio *v);                        /* power-on; the device has nothing in flight any more */
void virtio_state(struct virtio *v, struct stream *s);             /* begins the section "virtio": status, queues, transport */

static inline bool virtio_has(const struct virtio *v, unsigned feature)
{
    return v->accepted >> feature & 1;
}
bool virtio_running(const struct virtio *v);                       /* may queues be used now? */
void virtio_break(struct virtio *v, const char *why);              /* the driver made no sense: NEEDS_RESET, log once */
/* virtq_pop() that turns a broken ring into virtio_break(): true when there is a chain. */
bool virtio_pop(struct virtio *v, unsigned n, struct virtq_chain *c);
bool virtio_interrupt(struct virtio *v, unsigned n);               /* after a batch of pushes: interrupts if the driver wants it; did it? */
void virtio_config_changed(struct virtio *v);                      /* config[] has new values */
void virtio_stopped(struct virtio *v);                             /* completes a reset whose stop() returned false */

/* For transports */

u8 virtio_status(const struct virtio *v);
void virtio_set_status(struct virtio *v, u8 status);
void virtio_accept(struct virtio *v, unsigned word, u32 bits);     /* driver features, 32 at a time */
/* The same as a legacy driver does it; there are 32 features. */
void virtio_legacy_set_status(struct virtio *v, u8 status);
u32 virtio_legacy_features(const struct virtio *v);
void virtio_legacy_accept(struct virtio *v, u32 bits);
void virtio_legacy_queue(struct virtio *v, struct virtq *q, u64 gpa);  /* rings from gpa on as in 2.7.2; 0: none any more */
void virtio_kick(struct virtio *v, unsigned n);
void virtio_kick_all(struct virtio *v);
void virtio_config_read(struct virtio *v, u64 off, void *buf, unsigned len);
void virtio_config_write(struct virtio *v, u64 off, const void *buf, unsigned len);
