/*
 * What every device has: a name, a lock, a reset, and one state function for save, load and digest.
 *
 * A device struct begins with `struct device device;`. Constructors are DEV_new(buses, lines, ..., struct DEV **out), return 0 or
 * a negative errno with err(), and register their regions with &device.lock. board.c keeps the list.
 */
#pragma once

#include <pthread.h>

#include "base/stream.h"
#include "base/types.h"

struct device;
struct device_ops {
    const char *name;                                              /* chip, as in its file's name */
    void (*reset)(struct device *d);                               /* power-on state; vCPUs stand still; takes the lock itself */
    void (*quiesce)(struct device *d);                             /* finish or record I/O in flight; bounded in time; takes the lock itself; may be NULL */
    void (*state)(struct device *d, struct stream *s);             /* saves or loads; the caller holds the device's lock */
    void (*free)(struct device *d);
};
struct device {
    const struct device_ops *ops;
    pthread_mutex_t lock;                                          /* taken by the bus around region handlers */
    bool stuck;                                                    /* the last reset did not end: the host has not answered a request */
};

static inline void device_init(struct device *d, const struct device_ops *ops)
{
    d->ops = ops;
    pthread_mutex_init(&d->lock, NULL);
}
