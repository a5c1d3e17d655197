/*
 * virtio entropy device (virtio 1.2, 5.4). A struct virtio_rng begins with struct virtio (and so with its struct device).
 */
#pragma once

#include "io/virtio.h"

struct virtio_rng;

int virtio_rng_new(struct ram *ram, const struct log *log, struct virtio_rng **out);
