/* Checksums, segments and fragments in software (see net_offload.h). */
#include "back/net_offload.h"

#include <endian.h>
#include <string.h>

#define ETH_IPV4 0x0800
#define ETH_VLAN 0x8100
#define ETH_QINQ 0x88a8
#define ETH_IPV6 0x86dd
#define TCP 6
#define UDP 17
#define TCP_HEADER 20
#define TCP_CSUM 16                                                /* offsets of the checksum's field */
#define UDP_CSUM 6
#define IPV6_FRAGMENT 44
#define TCP_FIN 0x01
#define TCP_PSH 0x08
#define TCP_CWR 0x80
#define IPV4_DF 0x4000
#define IPV4_MF 0x2000
#define IPV4_OFFSET 0x1fff

static u16 get16(const u8 *p)
{
    return (u16)(p[0] << 8 | p[1]);
}

static void put16(u8 *p, u16 v)
{
    p[0] = (u8)(v >> 8);
    p[1] = (u8)v;
}

static u32 get32(const u8 *p)
{
    return (u32)get16(p) << 16 | get16(p + 2);
}

static void put32(u8 *p, u32 v)
{
    put16(p, (u16)(v >> 16));
    put16(p + 2, (u16)v);
}

/* --- checksums --- */

/* In the host's byte order all along: RFC 1071, 2 (B). Only the last call may be for an odd length. */
u64 net_sum(const void *buf, size_t len, u64 sum)
{
    const u8 *p = buf;
    u64 v;
    u32 w;

    for (; len >= 8; p += 8, len -= 8) {
        memcpy(&v, p, 8);
        sum += v;
        sum += sum < v;
    }
    if (len >= 4) {
        memcpy(&w, p, 4);
        sum += w;
        sum += sum < w;
        p += 4;
        len -= 4;
    }
    w = 0;
    memcpy(&w, p, len);
    sum += w;
    return sum + (sum < w);
}

/* The value that belongs into the packet, as memory holds it. */
u16 net_fold(u64 sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (u16)~sum;
}

static u64 pseudo_sum(const u8 *frame, const struct net_packet *p)
{
    size_t len = p->end - p->l4;
    u64 sum = htobe16(p->protocol);

    sum += htobe32((u32)len);
    return p->v6 ? net_sum(frame + p->ip + 8, 32, sum) : net_sum(frame + p->ip + 12, 8, sum);
}

u16 net_pseudo_checksum(const u8 *frame, const struct net_packet *p)
{
    return (u16)~net_fold(pseudo_sum(frame, p));
}

u16 net_l4_checksum(const u8 *frame, const struct net_packet *p)
{
    u64 sum = pseudo_sum(frame, p);
    size_t at = p->l4 + (p->protocol == TCP ? TCP_CSUM : UDP_CSUM), head = at - p->l4;
    u16 c;

    sum = net_sum(frame + p->l4, head, sum);
    c = net_fold(net_sum(frame + at + 2, p->end - at - 2, sum));
    return c || p->protocol != UDP ? c : 0xffff;                   /* RFC 768: 0 says that there is none */
}

static void ipv4_checksum(u8 *ip, size_t header)
{
    u16 c;

    memset(ip + 10, 0, 2);
    c = net_fold(net_sum(ip, header, 0));
    memcpy(ip + 10, &c, 2);
}

/* --- what is in a frame --- */

bool net_header_valid(const struct virtio_net_hdr *h, size_t len)
{
    if ((h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && ((size_t)h->csum_start + h->csum_offset + 2 > len || h->csum_start < NET_HEADER))
        return false;
    switch (h->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_NONE:
        return h->gso_type == VIRTIO_NET_HDR_GSO_NONE;
    case VIRTIO_NET_HDR_GSO_TCPV4: case VIRTIO_NET_HDR_GSO_TCPV6:
        return h->gso_size && (h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM);
    default:
        return false;
    }
}

static bool parse_v4(const u8 *frame, size_t len, struct net_packet *p)
{
    const u8 *ip = frame + p->ip;
    size_t header, total;
    u16 fragment;

    if (len - p->ip < 20 || ip[0] >> 4 != 4)
        return false;
    header = (size_t)(ip[0] & 15) * 4;
    total = get16(ip + 2);
    if (header < 20 || total < header || total > len - p->ip)
        return false;
    fragment = get16(ip + 6);
    p->l4 = p->ip + header;
    p->end = p->ip + total;
    p->fragment = fragment & (IPV4_MF | IPV4_OFFSET);
    p->protocol = fragment & IPV4_OFFSET ? 0 : ip[9];
    return true;
}

/* Without extension headers: with them there is no TCP or UDP to be seen, and nothing is lost but an offload that no driver asks for. */
static bool parse_v6(const u8 *frame, size_t len, struct net_packet *p)
{
    const u8 *ip = frame + p->ip;
    size_t payload;

    if (len - p->ip < 40 || ip[0] >> 4 != 6)
        return false;
    payload = get16(ip + 4);
    if (payload > len - p->ip - 40)
        return false;
    p->l4 = p->ip + 40;
    p->end = p->l4 + payload;
    p->fragment = ip[6] == IPV6_FRAGMENT;
    p->protocol = p->fragment ? 0 : ip[6];
    return true;
}

bool net_parse(const u8 *frame, size_t len, struct net_packet *p)
{
    size_t at = NET_HEADER;
    bool ok;

    *p = (struct net_packet){ 0 };
    if (len < NET_HEADER)
        return false;
    p->type = get16(frame + at - 2);
    while ((p->type == ETH_VLAN || p->type == ETH_QINQ) && len - at >= NET_VLAN && at < NET_HEADER + 2 * NET_VLAN) {
        at += NET_VLAN;
        p->type = get16(frame + at - 2);
    }
    p->ip = at;
    p->v6 = p->type == ETH_IPV6;
    ok = p->v6 ? parse_v6(frame, len, p) : p->type == ETH_IPV4 && parse_v4(frame, len, p);
    if (!ok)
        *p = (struct net_packet){ .type = p->type };
    else if ((p->protocol == TCP && p->end - p->l4 < TCP_HEADER) || (p->protocol == UDP && p->end - p->l4 < 8))
        p->protocol = 0;
    return ok;
}

void net_finish_checksum(u8 *frame, size_t len, const struct virtio_net_hdr *h)
{
    u16 c;

    if (!(h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
        return;
    /* The field holds the pseudo-header's sum. Which protocol it is does not matter: a sum of 0 may be said as 0xffff in each of them. */
    c = net_fold(net_sum(frame + h->csum_start, len - h->csum_start, 0));
    if (!c)
        c = 0xffff;
    memcpy(frame + h->csum_start + h->csum_offset, &c, 2);
}

/* --- segments of TCP --- */

static void set_length(u8 *frame, struct net_packet *p, size_t end)
{
    p->end = end;
    if (p->v6)
        put16(frame + p->ip + 4, (u16)(end - p->ip - 40));
    else
        put16(frame + p->ip + 2, (u16)(end - p->ip));
}

bool net_segment(const u8 *frame, size_t len, unsigned gso_size, u8 *out, void (*emit)(void *arg, const u8 *frame, size_t len), void *arg)
{
    struct net_packet p;
    size_t data, at;
    u16 id, c;

    if (!gso_size || !net_parse(frame, len, &p) || p.protocol != TCP || p.fragment)
        return false;
    data = p.l4 + (size_t)(frame[p.l4 + 12] >> 4) * 4;
    if (data < p.l4 + TCP_HEADER || data > p.end)
        return false;
    id = get16(frame + p.ip + 4);
    len = p.end;
    at = data;
    do {
        size_t n = MIN(len - at, (size_t)gso_size);
        struct net_packet o = p;

        memcpy(out, frame, data);
        memcpy(out + data, frame + at, n);
        set_length(out, &o, data + n);
        put32(out + o.l4 + 4, get32(frame + p.l4 + 4) + (u32)(at - data));
        if (at + n < len)
            out[o.l4 + 13] &= (u8)~(TCP_FIN | TCP_PSH);
        if (at > data)
            out[o.l4 + 13] &= (u8)~TCP_CWR;
        c = net_l4_checksum(out, &o);
        memcpy(out + o.l4 + TCP_CSUM, &c, 2);
        if (!o.v6) {
            put16(out + o.ip + 4, id++);
            ipv4_checksum(out + o.ip, o.l4 - o.ip);
        }
        emit(arg, out, o.end);
        at += n;
    } while (at < len);
    return true;
}

/* --- fragments of IP --- */

static bool fragment_v4(const u8 *frame, const struct net_packet *p, unsigned mtu, u8 *out, void (*emit)(void *, const u8 *, size_t), void *arg)
{
    size_t header = p->l4 - p->ip, room, data = p->end - p->l4;
    u16 field = get16(frame + p->ip + 6);

    if ((field & IPV4_DF) || mtu < header + 8)
        return false;
    room = (mtu - header) & ~(size_t)7;
    for (size_t at = 0; at < data; at += room) {
        size_t n = MIN(room, data - at);
        struct net_packet o = *p;
        u16 more = at + n < data || (field & IPV4_MF) ? IPV4_MF : 0;

        memcpy(out, frame, p->l4);
        memcpy(out + p->l4, frame + p->l4 + at, n);
        set_length(out, &o, p->l4 + n);
        put16(out + p->ip + 6, (u16)(more | ((field & IPV4_OFFSET) + at / 8)));
        ipv4_checksum(out + p->ip, header);
        emit(arg, out, o.end);
    }
    return true;
}

static bool fragment_v6(const u8 *frame, const struct net_packet *p, unsigned mtu, u32 id, u8 *out, void (*emit)(void *, const u8 *, size_t), void *arg)
{
    size_t room, data = p->end - p->l4;

    if (p->fragment || mtu < 40 + 8 + 8)
        return false;
    room = (mtu - 48) & ~7u;
    for (size_t at = 0; at < data; at += room) {
        size_t n = MIN(room, data - at);
        u8 *head = out + p->l4;

        memcpy(out, frame, p->l4);
        out[p->ip + 6] = IPV6_FRAGMENT;
        put16(out + p->ip + 4, (u16)(8 + n));
        head[0] = frame[p->ip + 6];
        head[1] = 0;
        put16(head + 2, (u16)(at | (at + n < data)));
        put32(head + 4, id);
        memcpy(head + 8, frame + p->l4 + at, n);
        emit(arg, out, p->l4 + 8 + n);
    }
    return true;
}

bool net_fragment(const u8 *frame, size_t len, unsigned mtu, u32 id, u8 *out, void (*emit)(void *arg, const u8 *frame, size_t len), void *arg)
{
    struct net_packet p;

    if (!net_parse(frame, len, &p) || p.end == p.l4)
        return false;
    return p.v6 ? fragment_v6(frame, &p, mtu, id, out, emit, arg) : fragment_v4(frame, &p, mtu, out, emit, arg);
}
