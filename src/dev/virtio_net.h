/*
 * virtio network card (virtio 1.2, 5.1) in front of a back end (back/net.h).
 */
#pragma once

#include "back/net.h"
#include "base/clock.h"
#include "io/virtio.h"

struct virtio_net;
struct capture;

struct virtio_net_settings {
    u8 mac[NET_MAC];
    u16 mtu;                                                       /* told to the guest; 0: nothing is said about it */
    bool plain;                                                    /* without offloads and merged buffers */
    unsigned pairs;                                                /* of queues; 1 to NET_QUEUES_MAX */
    struct capture *capture;                                       /* borrowed; may be NULL */
    unsigned capture_id;
};

struct virtio_net_counts {
    struct net_counts frames;
    u64 notifications, interrupts;                                 /* from and to the driver, of queues with frames */
    u64 filtered;                                                  /* not for this card */
};

/* Takes net over, also after an error. */
int virtio_net_new(struct ram *ram, const struct log *log, struct clock *clock, struct net *net, const struct virtio_net_settings *s, struct virtio_net **out);
void virtio_net_set_link(struct virtio_net *n, bool up);           /* as if the cable were pulled or put back */
bool virtio_net_link(struct virtio_net *n);
struct virtio_net_counts virtio_net_counts(struct virtio_net *n);
void virtio_net_info(struct virtio_net *n, FILE *f);               /* a line for people, without its end */
