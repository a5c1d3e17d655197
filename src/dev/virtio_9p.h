/*
 * virtio 9P transport (device ID 9, of which virtio 1.2 has the number only; as linux/virtio_9p.h and its driver have it): a folder of the host as a file system of the guest.
 */
#pragma once

#include "back/9p.h"
#include "io/virtio.h"

#define VIRTIO_9P_TAG_MAX 64

struct virtio_9p;

/* Takes s, also when it fails. tag: the name by which the guest mounts it, 1 to VIRTIO_9P_TAG_MAX bytes. -ENOMEM with err(). */
int virtio_9p_new(struct ram *ram, const struct log *log, struct p9 *s, const char *tag, struct virtio_9p **out);
