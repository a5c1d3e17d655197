/*
 * The options of `doppel run` about the network: --net and --publish.
 */
#pragma once

#include "vm/vm.h"

struct net_options {
    struct vm_net net[VM_NETS_MAX];
    unsigned nets;
    bool given, none;                                              /* --net; --net none */
    struct net_publish publish[NET_PUBLISH_MAX];
    unsigned publishes;
};

/* Each takes a value of its option, which is cut up. 0, or -EINVAL with err(). */
int net_option(struct net_options *o, char *value);
int publish_option(struct net_options *o, char *value);
/* When all options are there: the default, and what contradicts each other. */
int net_options_end(struct net_options *o);
/* Whether a command in the guest waits for the network: somebody asked for it, and an address is certain to come. */
bool net_options_wait(const struct net_options *o);
