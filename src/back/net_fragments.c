/*
 * Fragments of IPv4 (see net_fragments.h).
 *
 * A packet that is not whole has a slot; the data lie where they belong, and a bit for each 8 bytes says which are there. There are SLOTS of them: an older one makes way for a new
 * one, and those older than AGE_MS are forgotten, so what a guest begins and never ends costs nothing more.
 */
#include "back/net_fragments.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS 16
#define AGE_MS 30000                                               /* RFC 1122, 3.3.2: 60 to 120 s for a host; the way from a guest is short */
#define DATA_MAX 65535u
#define HEADER_MAX (NET_HEADER + 60)
#define UNIT 8                                                     /* of offsets */
#define KEY 11                                                     /* addresses, identification, protocol */

struct slot {
    bool used;
    u64 born_ms;
    u8 key[KEY];
    u32 have, total, end;                                          /* bytes that are there; of the packet, 0: not known yet; behind the last that is there */
    size_t header_len;                                             /* with Ethernet's; 0: the first fragment has not come */
    u8 header[HEADER_MAX];
    u64 there[(DATA_MAX / UNIT + 64) / 64];
    u8 buf[HEADER_MAX + DATA_MAX];                                 /* the header is put before the data at the end */
};

struct net_fragments {
    struct slot slot[SLOTS];
};

struct net_fragments *net_fragments_new(void)
{
    return calloc(1, sizeof(struct net_fragments));
}

void net_fragments_free(struct net_fragments *r)
{
    free(r);
}

static struct slot *slot_of(struct net_fragments *r, u64 now_ms, const u8 key[KEY])
{
    struct slot *place = NULL;

    for (struct slot *s = r->slot; s < r->slot + SLOTS; s++) {
        if (s->used && now_ms - s->born_ms > AGE_MS)
            s->used = false;
        if (s->used && !memcmp(s->key, key, KEY))
            return s;
        if (!place || (place->used && (!s->used || s->born_ms < place->born_ms)))
            place = s;
    }
    memset(place, 0, offsetof(struct slot, buf));
    place->used = true;
    place->born_ms = now_ms;
    memcpy(place->key, key, KEY);
    return place;
}

/* Marks them; false: some are there already. */
static bool mark(struct slot *s, u32 off, u32 len)
{
    for (u32 i = off / UNIT; i < (off + len + UNIT - 1) / UNIT; i++) {
        if (s->there[i / 64] >> i % 64 & 1)
            return false;
        s->there[i / 64] |= 1ull << i % 64;
    }
    return true;
}

/* False: it contradicts what has come before. */
static bool put(struct slot *s, const u8 *data, u32 off, u32 len, bool more)
{
    if (!more && ((s->total && s->total != off + len) || s->end > off + len))
        return false;
    if ((s->total && off + len > s->total) || !mark(s, off, len))
        return false;
    if (!more)
        s->total = off + len;
    s->end = MAX(s->end, off + len);
    s->have += len;
    memcpy(s->buf + HEADER_MAX + off, data, len);
    return true;
}

static size_t finish(struct slot *s, u8 **whole)
{
    u8 *frame = s->buf + HEADER_MAX - s->header_len, *ip = frame + NET_HEADER;
    size_t header = s->header_len - NET_HEADER, len = header + s->total;
    u16 sum;

    s->used = false;
    if (len > DATA_MAX)
        return 0;
    memcpy(frame, s->header, s->header_len);
    ip[2] = (u8)(len >> 8);
    ip[3] = (u8)len;
    memset(ip + 6, 0, 2);
    memset(ip + 10, 0, 2);
    sum = net_fold(net_sum(ip, header, 0));
    memcpy(ip + 10, &sum, 2);
    *whole = frame;
    return NET_HEADER + len;
}

size_t net_fragments_add(struct net_fragments *r, u64 now_ms, const u8 *frame, const struct net_packet *p, u8 **whole)
{
    const u8 *ip = frame + p->ip;
    u32 field = (u32)(ip[6] << 8 | ip[7]), off = (field & 0x1fff) * UNIT, len = (u32)(p->end - p->l4);
    bool more = field & 0x2000;
    u8 key[KEY];
    struct slot *s;

    if (p->ip != NET_HEADER || net_fold(net_sum(ip, p->l4 - p->ip, 0)) || !len || (more && len % UNIT) || off + len > DATA_MAX)
        return 0;
    memcpy(key, ip + 12, 8);
    memcpy(key + 8, ip + 4, 2);
    key[10] = ip[9];
    s = slot_of(r, now_ms, key);
    if (!put(s, frame + p->l4, off, len, more)) {
        s->used = false;
        return 0;
    }
    if (!off) {
        s->header_len = p->l4;
        memcpy(s->header, frame, p->l4);
    }
    return s->total && s->have == s->total ? finish(s, whole) : 0;
}
