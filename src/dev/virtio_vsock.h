/*
 * virtio socket device (virtio 1.2, 5.10): connections, of bytes or of messages, between programs of the guest and programs of the host, or other guests.
 *
 * Ends on the host are Unix sockets, which back/vsock_host.h finds. Everything is done on the loop's thread, but for the guest's part in a dialogue.
 */
#pragma once

#include "back/vsock_host.h"
#include "io/virtio.h"

struct virtio_vsock;

/* host is borrowed, and is served until the device is freed. */
int virtio_vsock_new(struct ram *ram, const struct log *log, struct loop *loop, struct vsock_host *host, struct virtio_vsock **out);
struct virtio_vsock_counts {
    u64 sent, received;                                            /* packets, by the guest */
    u64 notifications;                                             /* by the driver */
};
struct virtio_vsock_counts virtio_vsock_counts(struct virtio_vsock *v);
/* Connections that exist now. */
unsigned virtio_vsock_conns(struct virtio_vsock *v);
