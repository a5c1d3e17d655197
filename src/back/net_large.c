/* Large segments (see net_large.h). */
#include "back/net_large.h"

#include <string.h>

#include "back/net_offload.h"

#define HEADERS_MAX 256
#define TCP 6
#define TCP_HEADER 20
#define TCP_CSUM 16
#define TCP_SYN 0x02
#define TCP_OPT_NOP 1
#define TCP_OPT_MSS 2

/* --- from the guest --- */

void net_raise_mss(const struct net *n, u8 *frame, size_t len, u16 mss)
{
    unsigned guest = atomic_load(&n->guest);
    struct net_packet p;
    size_t at, end;
    u16 c;

    if (!net_parse(frame, len, &p) || p.protocol != TCP || !(frame[p.l4 + 13] & TCP_SYN) || !(guest & (p.v6 ? NET_TSO6 : NET_TSO4)))
        return;
    end = MIN(p.end, p.l4 + (size_t)(frame[p.l4 + 12] >> 4) * 4);
    for (at = p.l4 + TCP_HEADER; at + 4 <= end && frame[at] && frame[at] != TCP_OPT_MSS;) {
        if (frame[at] == TCP_OPT_NOP)
            at++;
        else if (frame[at + 1] >= 2)
            at += frame[at + 1];
        else
            return;
    }
    if (at + 4 > end || frame[at] != TCP_OPT_MSS || (unsigned)(frame[at + 2] << 8 | frame[at + 3]) != n->mtu - (p.v6 ? 60u : 40u) || mss <= n->mtu)
        return;
    frame[at + 2] = (u8)(mss >> 8);
    frame[at + 3] = (u8)mss;
    c = net_l4_checksum(frame, &p);
    memcpy(frame + p.l4 + TCP_CSUM, &c, 2);
}

/* --- to the guest --- */

bool net_is_large(const struct net *n, size_t len)
{
    return len > (size_t)n->mtu + NET_HEADER;
}

static void deliver_part(void *arg, const u8 *frame, size_t len)
{
    struct iovec iov = { (u8 *)frame, len };

    net_deliver(arg, &(struct net_frame){ .iov = &iov, .iovs = 1, .len = len, .queue = NET_ANY_QUEUE });
}

/* A TCP segment; false: it is none. */
static bool deliver_segment(struct net *n, const u8 *frame, size_t len, const struct net_packet *p, u8 *part)
{
    struct virtio_net_hdr h = { .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_offset = TCP_CSUM, .csum_start = (u16)p->l4 };
    size_t tcp = p->protocol == TCP ? (size_t)(frame[p->l4 + 12] >> 4) * 4 : 0, heads = p->l4 + tcp, all = heads - p->ip;
    u8 head[HEADERS_MAX];
    struct iovec iov[2] = { { head, heads }, { (u8 *)frame + heads, len - heads } };
    u16 c;

    if (p->protocol != TCP || tcp < TCP_HEADER || heads > sizeof(head) || heads > len || all >= n->mtu)
        return false;
    if (!(atomic_load(&n->guest) & (p->v6 ? NET_TSO6 : NET_TSO4)))
        return net_segment(frame, len, n->mtu - (unsigned)all, part, deliver_part, n);
    h.gso_type = p->v6 ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4;
    h.gso_size = (u16)(n->mtu - all);
    h.hdr_len = (u16)heads;
    c = net_pseudo_checksum(frame, p);
    memcpy(head, frame, heads);                                    /* the rest stays where it is */
    memcpy(head + p->l4 + TCP_CSUM, &c, 2);
    net_deliver(n, &(struct net_frame){ .hdr = h, .iov = iov, .iovs = len > heads ? 2 : 1, .len = len, .queue = NET_ANY_QUEUE });
    return true;
}

void net_deliver_large(struct net *n, const u8 *frame, size_t len, u32 fragment_id, u8 *part)
{
    struct net_packet p;

    if (!net_parse(frame, len, &p))
        return;
    if (p.end - p.ip <= n->mtu)
        deliver_part(n, frame, len);                               /* only its link's header is longer */
    else if (!deliver_segment(n, frame, len, &p, part))
        net_fragment(frame, len, n->mtu, fragment_id, part, deliver_part, n);
}
