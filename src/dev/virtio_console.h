/*
 * virtio console with several ports (virtio 1.2, 5.3). A struct virtio_console begins with struct virtio (and so with its struct device).
 *
 * A port is a pair of byte streams between the guest (/dev/virtio-ports/NAME, or /dev/hvcN for a console port) and the host. Nothing is
 * lost and nothing is reordered. Back-pressure goes both ways: what guest_data() does not take stays in the guest's ring, so that the
 * writing process in the guest waits (its vCPU does not); what vport_send() does not take stays with the caller until room() is called.
 *
 * Threads: the vport_* functions are called on the loop's thread. The callbacks come on the loop's thread with no lock held, and may call
 * any vport_* function. Both keep working after the vCPUs have stopped, until the device is freed: a guest that writes and powers off at once
 * leaves its last bytes in the ring, and they are still delivered.
 */
#pragma once

#include "base/loop.h"
#include "io/virtio.h"

#define VIRTIO_CONSOLE_PORTS_MAX 16

struct virtio_console;
struct vport;

struct vport_ops {
    /* The guest wrote len > 0 bytes; returns how many were taken. After fewer than len no more come until vport_resume(). */
    size_t (*guest_data)(void *arg, const void *data, size_t len);
    /* A process of the guest has opened or closed the port (or the guest was reset: closed). May be NULL. */
    void (*guest_open)(void *arg, bool open);
    /* After a vport_send() that took less than it was given: the guest can take more now. May be NULL. */
    void (*room)(void *arg);
};

struct vport_config {
    const char *name;                                              /* as in /sys/class/virtio-ports/X/name; borrowed; NULL: none */
    bool console;                                                  /* the guest makes it a hvc console */
    const struct vport_ops *ops;                                   /* NULL: the host's side is closed, data of the guest vanishes */
    void *arg;
};

/* Host sides are open from the start. ports: 1..VIRTIO_CONSOLE_PORTS_MAX. */
int virtio_console_new(struct ram *ram, const struct log *log, struct loop *loop, const struct vport_config *port, unsigned ports,
                       struct virtio_console **out);
struct vport *virtio_console_port(struct virtio_console *c, unsigned n);

/* Gives bytes to the guest; returns how many were taken. None before the guest has opened the port, as drivers discard what comes earlier. */
size_t vport_send(struct vport *p, const void *data, size_t len);
void vport_resume(struct vport *p);                                /* guest_data() can take more; it may be called from inside */
/* The host's side is open or closed: the guest then reads end of file, and its writes fail. A close that is followed at once by an open may not be seen. */
void vport_set_open(struct vport *p, bool open);
bool vport_guest_open(const struct vport *p);
void vport_resize(struct vport *p, u16 cols, u16 rows);            /* of a console port */
