/*
 * What a network card's driver may leave to the card, done in software, for back ends that cannot: filling in the checksum of TCP or UDP, and cutting a
 * large TCP segment into those that fit (virtio 1.2, 5.1.6.2); and for what goes to the guest, fragments of IP.
 *
 * All headers come from the guest or from the network: nothing in them is believed. Pure functions.
 */
#pragma once

#include "back/net.h"

/* Is what hdr says about this frame possible? It names offsets that lie in the frame, a known kind of segment, a size that is not 0. */
bool net_header_valid(const struct virtio_net_hdr *h, size_t len);

/* What stands at the beginning of an Ethernet frame. Offsets from the frame's start. */
struct net_packet {
    u16 type;                                                      /* EtherType behind VLAN tags */
    u8 protocol;                                                   /* of IP; 0: no IP, or a fragment that is not the first */
    bool v6, fragment;                                             /* fragment: also the first one */
    size_t ip, l4, end;                                            /* IP header, what follows it, end of the IP packet; 0: none */
};
/* False: it is no whole IP packet. p->type is set in any case. */
bool net_parse(const u8 *frame, size_t len, struct net_packet *p);
/* The checksum of TCP or UDP that belongs into the packet, as it stands in memory. */
u16 net_l4_checksum(const u8 *frame, const struct net_packet *p);
/* The pseudo-header's part of it alone, for who takes the rest as left undone. */
u16 net_pseudo_checksum(const u8 *frame, const struct net_packet *p);
/* Internet checksum (RFC 1071) over bytes, continued from sum; net_fold() ends it. */
u64 net_sum(const void *buf, size_t len, u64 sum);
u16 net_fold(u64 sum);

/* Fills in the checksum that hdr asks for. frame has len bytes; hdr is valid for them. */
void net_finish_checksum(u8 *frame, size_t len, const struct virtio_net_hdr *h);

/*
 * Cuts a TCP segment into frames of at most gso_size bytes of data, with all checksums, each made in out (NET_FRAME_MAX bytes), and hands them on.
 * False: this is no TCP segment.
 */
bool net_segment(const u8 *frame, size_t len, unsigned gso_size, u8 *out, void (*emit)(void *arg, const u8 *frame, size_t len), void *arg);

/* Cuts an IP packet into fragments (RFC 791, RFC 8200 4.5) that fit mtu. False: this is no IP packet, or it may not be cut. id: for IPv6. */
bool net_fragment(const u8 *frame, size_t len, unsigned mtu, u32 id, u8 *out, void (*emit)(void *arg, const u8 *frame, size_t len), void *arg);
