/* What fuzz targets of devices do with their saved state: it may come back from a damaged or malicious file. */
#pragma once

#include "base/stream.h"
#include "io/device.h"

/* Saves the device and loads it again, as it is meanwhile or (reset) after a reset; val says whether and where a byte is another. */
static inline void state_save_and_load(struct device *d, u32 val, bool reset)
{
    struct stream s, l;

    pthread_mutex_lock(&d->lock);
    stream_save_init(&s);
    d->ops->state(d, &s);
    pthread_mutex_unlock(&d->lock);
    if (reset)
        d->ops->reset(d);
    if (s.len && (val & 1))
        s.buf[(val >> 1) % s.len] ^= (u8)(val >> 24);
    pthread_mutex_lock(&d->lock);
    stream_load_init(&l, s.buf, s.len);
    d->ops->state(d, &l);
    pthread_mutex_unlock(&d->lock);
    if (l.error)
        d->ops->reset(d);                                          /* as whoever loads does */
    stream_free(&s);
}
