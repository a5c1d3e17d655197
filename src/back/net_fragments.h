/*
 * Puts fragments of IPv4 packets together (RFC 791, 3.2), for a back end whose own way to do that is not to be trusted with a guest's: that of libslirp 4.7 follows pointers that
 * fragments which overlap have overwritten.
 *
 * Fragments come from the guest: nothing in them is believed. Those that overlap, or contradict each other, end their packet, as RFC 5722 demands for IPv6. On one thread.
 */
#pragma once

#include "back/net_offload.h"

struct net_fragments;

/* NULL: no memory. */
struct net_fragments *net_fragments_new(void);
void net_fragments_free(struct net_fragments *r);                  /* NULL is fine */
/*
 * A frame with a fragment, as net_parse() has found it. The length of the frame that it completes, which then is at *whole until the next call; 0: none is complete. now_ms: any
 * clock that goes forward.
 */
size_t net_fragments_add(struct net_fragments *r, u64 now_ms, const u8 *frame, const struct net_packet *p, u8 **whole);
