/*
 * virtio block device (virtio 1.2, 5.2). A struct virtio_blk begins with struct virtio (and so with its struct device).
 */
#pragma once

#include "back/block.h"
#include "io/virtio.h"

#define VIRTIO_BLK_SERIAL_MAX 20
#define VIRTIO_BLK_QUEUES_MAX 16

struct virtio_blk;

/* block: the host end, owned by the device from here on (closed with it), also when an error is returned. serial: up to 20 characters, what
 * /sys/block/vda/serial shows. queues: 1 to VIRTIO_BLK_QUEUES_MAX. log: for host errors of the disk. */
int virtio_blk_new(struct ram *ram, const struct log *log, struct block *block, const char *serial, unsigned queues, struct virtio_blk **out);
/* Makes the disk size bytes large, or (0) takes the size that it has on the host by now; tells the driver. Any thread. 0, or a negative errno with
 * err(). */
int virtio_blk_resize(struct virtio_blk *b, u64 size);
struct block_counts virtio_blk_counts(struct virtio_blk *b);       /* any thread */
