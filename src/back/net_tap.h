/*
 * A tap device as a network's host end: the guest's card is connected to a network interface of the host, whose network the host's administrator arranges.
 */
#pragma once

#include "back/net.h"

/*
 * By name: made if need be, which takes CAP_NET_ADMIN; one that is there and belongs to the user takes nothing. With queues > 1 it is one of several queues.
 * 0, or a negative errno with err().
 */
int net_tap_new(const struct net_config *c, const char *name, unsigned queues, struct net **out);
/* By open descriptors of its queues, which stay the caller's. */
int net_tap_fd_new(const struct net_config *c, const int *fd, unsigned fds, struct net **out);
