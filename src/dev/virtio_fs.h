/*
 * virtio file system device (virtio 1.2, 5.11): a folder of the host, served by a virtiofsd that is started for it.
 */
#pragma once

#include "base/clock.h"
#include "base/loop.h"
#include "io/virtio.h"

#define VIRTIO_FS_TAG_MAX 36

struct virtio_fs;

/* tag: 1 to VIRTIO_FS_TAG_MAX bytes. 0, or a negative errno with err(): virtiofsd is not there or does not start. */
int virtio_fs_new(struct ram *ram, const struct log *log, struct loop *loop, struct clock *clock, const char *folder, const char *tag, bool readonly,
                  struct virtio_fs **out);
