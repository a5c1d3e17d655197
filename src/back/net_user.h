/*
 * User-mode networking: a network with a router, a DHCP and a DNS server, made by libslirp out of plain sockets of the user who runs doppel.
 *
 * Card n's network is 10.0.(2+n).0/24 and fec0:0:0:n::/64. In it, the router and host is .2 (connections to it reach the host's loopback, unless restricted), DNS
 * is at .3 (the host's resolver), and the guest gets .15 by DHCP; by IPv6, the address that router advertisements and its MAC address make.
 */
#pragma once

#include <netinet/in.h>

#include "back/net.h"

#define NET_PUBLISH_MAX 64

/* A port of the host whose connections or datagrams go to a port of the guest. */
struct net_publish {
    struct in6_addr addr6;                                         /* with v6 */
    struct in_addr addr4;
    bool v6, udp;
    u16 host, guest;
};

/* Restricted: nothing but DHCP, and what is published. Errors, with err(), name the port that is in use or not allowed. */
int net_user_new(const struct net_config *c, bool restricted, const struct net_publish *publish, unsigned publishes, struct net **out);
