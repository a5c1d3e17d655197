/*
 * passt as a network's host end: a process of its own that does user-mode networking, reached by a Unix stream socket (passt(1), --socket). Each frame has its length before
 * it, 32 bits, big-endian. When it goes away the card has no link, until a passt is at that socket again.
 */
#pragma once

#include "back/net.h"

/* Connects; path may be forgotten afterwards. 0, or a negative errno with err(). */
int net_passt_new(const struct net_config *c, const char *path, struct net **out);
