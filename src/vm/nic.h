/*
 * The network cards of a machine: which back end each has, and its address.
 */
#pragma once

#include "back/capture.h"
#include "dev/virtio_net.h"
#include "vm/vm.h"

struct stats;

/* Card i of config. capture may be NULL. 0, or a negative errno with err(). */
int nic_new(const struct vm_config *config, unsigned i, struct ram *ram, struct clock *clock, struct capture *capture, struct virtio_net **out);
void nic_stats(struct virtio_net *n, unsigned i, struct stats *s);
