/*
 * Large TCP segments for the guest, from back ends that know of no segmentation offload but would make segments of up to 64 KiB, if only the guest's MSS were so large.
 *
 * It is made so: the MSS option of the guest's SYN is raised, if its driver takes large segments and its MSS is that of its MTU (no tunnel lies behind it). What then comes and is
 * larger than the MTU is passed on with the size of the segments that the guest would have had, as a card does that joins segments (virtio 1.2, 5.1.6.4), or is cut into
 * them here, for a driver that does not take that. Packets that are not TCP and too large are cut into fragments. Their senders are on this host: their checksums are believed.
 *
 * On the card's thread.
 */
#pragma once

#include "back/net.h"

/* A frame of the guest's, its checksum done: if it is a SYN, it now says mss, which is larger than the MTU's. */
void net_raise_mss(const struct net *n, u8 *frame, size_t len, u16 mss);
/* Is a frame for the guest too large for its MTU? */
bool net_is_large(const struct net *n, size_t len);
/* Then it goes this way. fragment_id: for fragments of IPv6; part: room for what is made (NET_FRAME_MAX bytes). */
void net_deliver_large(struct net *n, const u8 *frame, size_t len, u32 fragment_id, u8 *part);
