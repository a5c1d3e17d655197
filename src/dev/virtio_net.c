/*
 * virtio network card (see virtio_net.h; virtio 1.2, 5.1): mergeable receive buffers, checksum and TCP segmentation offload in both directions, several queue pairs,
 * control queue (receive modes, addresses, VLANs, queue pairs, offloads), MTU, link state.
 *
 *   queue 2i       receiveq i
 *   queue 2i + 1   transmitq i
 *   queue 2N       controlq; N is 1 unless VIRTIO_NET_F_MQ is negotiated, then the greatest number of pairs (5.1.2)
 *
 * The life of a frame from the guest: net_kick() (the driver's notification, on a vCPU's thread) wakes the back end's thread, and asks for no more notifications.
 * There, transmit() takes chains from the ring under the device's lock, lets go of it, hands the frames to the back end, takes it again and gives the chains
 * back. While it does so (`busy`), a reset waits: the frames are read from guest memory as they are sent. Nothing takes longer there than a system call that does not wait.
 *
 * To the guest: receive(), on the same thread, copies a frame into buffers of the ring; a large one with the lock let go of, in the same way. If there are none, the frame waits in
 * back/net until the driver has made some available. The interrupt follows the last frame of a batch.
 *
 * Frames whose flow the guest has sent on some queue pair come back on it (5.1.6.5.5.1): `flow` remembers the pair by a hash of addresses and ports. It
 * follows the guest to another pair only when nothing has come for a while (FLOW_IDLE_NS): a driver works at its pairs side by side, and frames of one connection on two of them overtake
 * each other, which who sends them takes for loss. A back end with queues of its own decides itself.
 *
 * Left out: UDP segmentation, ECN, RSS and hash reports, notification coalescing, announcements (there is no migration yet).
 *
 * Standing still: after quiesce() nothing is put into guest memory or taken from it until guest time goes on (a timer on the guest's clock tells).
 */
#include "dev/virtio_net.h"

#include <errno.h>
#include <linux/virtio_net.h>
#include <string.h>

#include "back/net_offload.h"

#define QUEUE_SIZE 256
#define TX_BATCH 32
#define RX_CHAINS QUEUE_SIZE                                       /* buffers of one frame, at most */
#define FLOWS 256
#define FLOW_IDLE_NS 200000000u                                    /* by then a driver has long taken the frames of a ring, even an interpreted one */
#define MACS_MAX 64                                                /* of each kind, before all are let through (5.1.6.5.2 leaves it to the device) */
#define VLANS 4096
#define CTRL_BATCH 64
#define LARGE 4096                                                 /* bytes: copying more takes longer than to let go of a lock and take it again */

#define OFFLOADS_GUEST (BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4) | BIT(VIRTIO_NET_F_GUEST_TSO6))
#define OFFLOADS                                                                                                                   \
    (OFFLOADS_GUEST | BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4) | BIT(VIRTIO_NET_F_HOST_TSO6) |                          \
     BIT(VIRTIO_NET_F_MRG_RXBUF) | BIT(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS))
#define FEATURES                                                                                                                   \
    (BIT(VIRTIO_NET_F_MAC) | BIT(VIRTIO_NET_F_STATUS) | BIT(VIRTIO_NET_F_CTRL_VQ) | BIT(VIRTIO_NET_F_CTRL_RX) |                     \
     BIT(VIRTIO_NET_F_CTRL_RX_EXTRA) | BIT(VIRTIO_NET_F_CTRL_VLAN) | BIT(VIRTIO_NET_F_CTRL_MAC_ADDR))

/* Which frames the driver wants (5.1.6.5.1 to 5.1.6.5.3). */
struct filter {
    bool promisc, allmulti, alluni, nomulti, nouni, nobcast;
    bool uni_overflow, multi_overflow;
    u32 unis, multis;
    u8 uni[MACS_MAX][NET_MAC], multi[MACS_MAX][NET_MAC];
    u8 vlan[VLANS / 8];
};

struct sending {
    struct virtq_chain chain;
    struct net_frame frame;
    bool drop;                                                     /* its header makes no sense */
};

struct virtio_net {
    struct virtio virtio;
    struct net *net;
    struct virtio_net_config config;
    u8 mac[NET_MAC];                                               /* as built; the driver may change config.mac */
    unsigned pairs_max, pairs;                                     /* there are; in use */
    u64 offloads;                                                  /* BIT(VIRTIO_NET_F_GUEST_...), as the driver has them now */
    struct filter filter;
    u8 flow[FLOWS];
    u64 flow_free[FLOWS];                                          /* guest time from which on it may change its pair */
    unsigned rx_told;                                              /* bits of receiveqs whose driver is to be told */
    bool busy;                                                     /* the card's thread reads the frames in tx[], or fills the buffers in rx[] */
    bool held;                                                     /* until guest time goes on */
    pthread_cond_t idle;                                           /* not busy */
    struct timer go_on;
    struct sending tx[TX_BATCH];
    struct virtq_chain rx[RX_CHAINS], ctrl;
    bool plugged, present;                                         /* the cable, as the user has it; the host's end is there. Both: the link is up */
    u64 notifications, interrupts, filtered;
};

static struct virtio_net *of_virtio(struct virtio *v)
{
    return container_of(v, struct virtio_net, virtio);
}

static unsigned ctrl_queue(const struct virtio_net *n)
{
    return virtio_has(&n->virtio, VIRTIO_NET_F_MQ) ? 2 * n->pairs_max : 2;
}

/* 5.1.6.1: a legacy driver's header has no num_buffers unless it merges them. */
static size_t header_len(const struct virtio_net *n)
{
    return !n->virtio.legacy || virtio_has(&n->virtio, VIRTIO_NET_F_MRG_RXBUF) ? sizeof(struct virtio_net_hdr_mrg_rxbuf) : sizeof(struct virtio_net_hdr);
}

static void interrupt(struct virtio_net *n, unsigned queue)
{
    n->interrupts += virtio_interrupt(&n->virtio, queue);
}

/* --- flows --- */

/* The same for both directions of a flow. */
static unsigned flow_of(const struct net_frame *f)
{
    u8 head[NET_HEADER + 2 * NET_VLAN + 60 + 4];
    size_t len = net_copy(f, 0, head, sizeof(head)), at = NET_HEADER, addr, l4;
    u32 h = 0, w;
    bool v6;

    if (len >= NET_HEADER + NET_VLAN && head[12] == 0x81 && head[13] == 0)
        at += NET_VLAN;
    v6 = head[at - 2] == 0x86 && head[at - 1] == 0xdd;
    if (len < at + 40 || (!v6 && (head[at - 2] != 8 || head[at - 1])))
        return 0;
    addr = v6 ? at + 8 : at + 12;
    l4 = v6 ? at + 40 : at + (size_t)(head[at] & 15) * 4;
    for (size_t i = addr; i < (v6 ? at + 40 : at + 20); i += 4) {
        memcpy(&w, head + i, 4);
        h += w;
    }
    if (l4 + 4 <= len && (v6 || !((head[at + 6] & 0x3f) | head[at + 7])))
        h += (u32)(head[l4] << 8 | head[l4 + 1]) + (u32)(head[l4 + 2] << 8 | head[l4 + 3]);
    h *= 0x9e3779b1u;
    return h >> 24;
}

/* The guest sent on this pair. */
static void flow_on(struct virtio_net *n, unsigned flow, unsigned pair)
{
    if (n->flow[flow] != pair && clock_ns(n->go_on.clock) >= n->flow_free[flow])
        n->flow[flow] = (u8)pair;
}

/* The pair on which a frame comes. */
static unsigned pair_of(struct virtio_net *n, const struct net_frame *f)
{
    unsigned flow;

    if (n->pairs == 1)
        return 0;
    if (f->queue != NET_ANY_QUEUE)
        return f->queue % n->pairs;
    flow = flow_of(f);
    n->flow_free[flow] = clock_ns(n->go_on.clock) + FLOW_IDLE_NS;
    return n->flow[flow] % n->pairs;
}

/* --- from the guest --- */

/* False: the driver made no sense. */
static bool tx_take(struct virtio_net *n, struct sending *s, unsigned pair)
{
    struct virtio_net_hdr_mrg_rxbuf h = { 0 };
    size_t len = header_len(n);

    if (virtq_read(&s->chain, &h, len) < len || s->chain.in_total) {
        virtq_drop(&n->virtio.queue[2 * pair + 1], &s->chain);
        virtio_break(&n->virtio, "a network frame without header, or in memory that is to be written");
        return false;
    }
    s->frame = (struct net_frame){ .hdr = h.hdr, .iov = s->chain.out, .iovs = s->chain.outs, .len = s->chain.out_len, .queue = pair };
    s->drop = s->chain.out_len < NET_HEADER || s->chain.out_len > NET_FRAME_MAX || !net_header_valid(&h.hdr, s->chain.out_len);
    if (!s->drop && n->pairs > 1)
        flow_on(n, flow_of(&s->frame), pair);
    return true;
}

static unsigned tx_send(struct virtio_net *n, unsigned taken)
{
    unsigned sent = 0;

    while (sent < taken && (n->tx[sent].drop || net_send(n->net, &n->tx[sent].frame)))
        sent++;
    return sent;
}

/* A batch of one queue. Returns whether there may be more; with the lock held, which it lets go of in between. */
static bool tx_batch(struct virtio_net *n, unsigned pair)
{
    struct virtio *v = &n->virtio;
    struct virtq *q = &v->queue[2 * pair + 1];
    unsigned taken = 0, sent;

    while (!n->held && taken < TX_BATCH && virtio_pop(v, 2 * pair + 1, &n->tx[taken].chain) && tx_take(n, &n->tx[taken], pair))
        taken++;
    if (!taken)
        return false;
    n->busy = true;
    pthread_mutex_unlock(&v->device.lock);
    sent = tx_send(n, taken);
    pthread_mutex_lock(&v->device.lock);
    n->busy = false;
    pthread_cond_broadcast(&n->idle);
    if (v->resetting) {
        for (unsigned i = 0; i < taken; i++)
            virtq_drop(q, &n->tx[i].chain);
        virtio_stopped(v);
        return false;
    }
    for (unsigned i = 0; i < sent; i++)
        virtq_push(q, &n->tx[i].chain, 0);
    for (unsigned i = taken; i > sent; i--)
        virtq_unpop(q, &n->tx[i - 1].chain);
    if (sent)
        interrupt(n, 2 * pair + 1);
    return sent == taken;
}

/* One round over the queues; the next follows behind what else the thread has to do. */
static void transmit(void *front)
{
    struct virtio_net *n = front;
    struct virtio *v = &n->virtio;
    bool more = false;

    pthread_mutex_lock(&v->device.lock);
    for (unsigned pair = 0; pair < n->pairs && !n->held && virtio_running(v); pair++) {
        struct virtq *q = &v->queue[2 * pair + 1];
        unsigned rounds = QUEUE_SIZE / TX_BATCH;
        bool full;

        virtq_ignore(q);
        while ((full = tx_batch(n, pair)) && --rounds)
            ;
        if (full || (virtio_running(v) && !n->held && virtq_listen(q)))
            more = true;
    }
    pthread_mutex_unlock(&v->device.lock);
    if (more)
        net_kick(n->net);
}

/* --- to the guest --- */

static bool known(const u8 (*list)[NET_MAC], u32 count, const u8 *mac)
{
    for (u32 i = 0; i < count; i++)
        if (!memcmp(list[i], mac, NET_MAC))
            return true;
    return false;
}

static bool wanted(const struct virtio_net *n, const struct net_frame *f)
{
    static const u8 all[NET_MAC] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
    const struct filter *r = &n->filter;
    u8 head[NET_HEADER + NET_VLAN] = { 0 };
    unsigned vlan;

    net_copy(f, 0, head, sizeof(head));
    vlan = (unsigned)(head[14] << 8 | head[15]) & (VLANS - 1);
    if (virtio_has(&n->virtio, VIRTIO_NET_F_CTRL_VLAN) && head[12] == 0x81 && head[13] == 0 && !(r->vlan[vlan / 8] >> vlan % 8 & 1))
        return false;
    if (r->promisc)
        return true;
    if (!memcmp(head, all, NET_MAC))
        return !r->nobcast;
    if (head[0] & 1)
        return !r->nomulti && (r->allmulti || r->multi_overflow || known(r->multi, r->multis, head));
    return !r->nouni && (r->alluni || r->uni_overflow || !memcmp(head, n->config.mac, NET_MAC) || known(r->uni, r->unis, head));
}

/* What the driver does not understand is not given to it: a back end may have made it before it heard of the driver's wishes. */
static bool understood(const struct virtio_net *n, const struct virtio_net_hdr *h)
{
    switch (h->gso_type) {
    case VIRTIO_NET_HDR_GSO_NONE:
        return !(h->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) || (n->offloads & BIT(VIRTIO_NET_F_GUEST_CSUM));
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return n->offloads & BIT(VIRTIO_NET_F_GUEST_TSO4);
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return n->offloads & BIT(VIRTIO_NET_F_GUEST_TSO6);
    default:
        return false;
    }
}

/*
 * Takes buffers for len bytes: how many, 0 for too few, -1 when the frame does not fit at all. The driver is asked to tell of the next buffer while those that are there
 * are taken: an index that it has passed already would tell of nothing.
 */
static int rx_take(struct virtio_net *n, unsigned queue, u64 len)
{
    bool merge = virtio_has(&n->virtio, VIRTIO_NET_F_MRG_RXBUF);
    struct virtq *q = &n->virtio.queue[queue];
    unsigned max = MIN(merge ? RX_CHAINS : 1, (unsigned)q->size), taken = 0;
    u64 room = 0;

    while (taken < max && room < len) {
        if (!virtio_pop(&n->virtio, queue, &n->rx[taken])) {
            if (q->broken || !virtio_running(&n->virtio) || !virtq_listen(q))
                break;
            continue;
        }
        room += n->rx[taken].in_total;
        if (taken++ == 0 && room < header_len(n))
            break;                                                 /* 5.1.6.3.2: the header is not spread over buffers */
    }
    if (room >= len)
        return (int)taken;
    for (unsigned i = taken; i; i--)
        virtq_unpop(q, &n->rx[i - 1]);
    return taken == max || (taken && room < header_len(n)) ? -1 : 0;
}

static void rx_copy(struct virtio_net *n, const struct net_frame *f)
{
    unsigned c = 0;

    for (unsigned i = 0; i < f->iovs; i++) {
        const u8 *p = f->iov[i].iov_base;
        size_t left = f->iov[i].iov_len;

        while (left) {
            size_t done = virtq_write(&n->rx[c], p, left);

            p += done;
            left -= done;
            if (left)
                c++;
        }
    }
}

/* The same without the lock: a vCPU that notifies would have to sleep until it is done. False: the queues were reset meanwhile. */
static bool rx_copy_unlocked(struct virtio_net *n, struct virtq *q, unsigned taken, const struct net_frame *f)
{
    struct virtio *v = &n->virtio;
    bool sends = n->busy;                                          /* it is what the guest sends that has brought f about */

    n->busy = true;
    pthread_mutex_unlock(&v->device.lock);
    rx_copy(n, f);
    pthread_mutex_lock(&v->device.lock);
    n->busy = sends;
    if (!sends)
        pthread_cond_broadcast(&n->idle);
    if (!v->resetting)
        return true;
    for (unsigned i = 0; i < taken; i++)
        virtq_drop(q, &n->rx[i]);
    if (!sends)
        virtio_stopped(v);
    return false;
}

static void rx_fill(struct virtio_net *n, unsigned queue, unsigned taken, const struct net_frame *f)
{
    struct virtio_net_hdr_mrg_rxbuf h = { .hdr = f->hdr, .num_buffers = (u16)taken };
    u32 used[RX_CHAINS];

    if (!(n->offloads & BIT(VIRTIO_NET_F_GUEST_CSUM)))
        h.hdr.flags = 0;
    virtq_write(&n->rx[0], &h, header_len(n));
    if (f->len <= LARGE)
        rx_copy(n, f);
    else if (!rx_copy_unlocked(n, &n->virtio.queue[queue], taken, f))
        return;
    for (unsigned i = 0; i < taken; i++)
        used[i] = (u32)(n->rx[i].in_total - n->rx[i].in_len);
    virtq_push_all(&n->virtio.queue[queue], n->rx, used, taken);
    n->rx_told |= 1u << queue / 2;
}

/* False: not now. */
static bool rx_frame(struct virtio_net *n, const struct net_frame *f)
{
    unsigned queue = 2 * pair_of(n, f);
    struct virtq *q = &n->virtio.queue[queue];
    int taken;

    if (n->held)
        return false;
    if (!virtio_running(&n->virtio) || !q->enabled || !understood(n, &f->hdr))
        return true;
    if (!wanted(n, f)) {
        n->filtered++;
        return true;
    }
    virtq_ignore(q);
    taken = rx_take(n, queue, f->len + header_len(n));
    if (taken > 0)
        rx_fill(n, queue, (unsigned)taken, f);
    return taken || q->broken;
}

static bool receive(void *front, const struct net_frame *f)
{
    struct virtio_net *n = front;
    bool done;

    pthread_mutex_lock(&n->virtio.device.lock);
    done = rx_frame(n, f);
    pthread_mutex_unlock(&n->virtio.device.lock);
    return done;
}

static void received(void *front)
{
    struct virtio_net *n = front;

    pthread_mutex_lock(&n->virtio.device.lock);
    for (unsigned pair = 0; n->rx_told; pair++, n->rx_told >>= 1)
        if (n->rx_told & 1)
            interrupt(n, 2 * pair);
    pthread_mutex_unlock(&n->virtio.device.lock);
}

/* With the lock held. */
static void tell_link(struct virtio_net *n)
{
    bool up = n->plugged && n->present;

    n->config.status = up ? VIRTIO_NET_S_LINK_UP : 0;
    net_set_link(n->net, up);
    virtio_config_changed(&n->virtio);
}

static void present(void *front, bool there)
{
    struct virtio_net *n = front;

    pthread_mutex_lock(&n->virtio.device.lock);
    n->present = there;
    tell_link(n);
    pthread_mutex_unlock(&n->virtio.device.lock);
}

static const struct net_front_ops front_ops = { .transmit = transmit, .receive = receive, .received = received, .present = present };

/* --- control queue (5.1.6.5) --- */

static void tell_offloads(struct virtio_net *n)
{
    unsigned takes = 0;

    if (n->offloads & BIT(VIRTIO_NET_F_GUEST_CSUM))
        takes |= NET_CSUM | (n->offloads & BIT(VIRTIO_NET_F_GUEST_TSO4) ? NET_TSO4 : 0) | (n->offloads & BIT(VIRTIO_NET_F_GUEST_TSO6) ? NET_TSO6 : 0);
    net_guest_takes(n->net, takes);
}

static bool ctrl_rx(struct virtio_net *n, u8 cmd)
{
    struct filter *r = &n->filter;
    bool *mode[] = {
        [VIRTIO_NET_CTRL_RX_PROMISC] = &r->promisc, [VIRTIO_NET_CTRL_RX_ALLMULTI] = &r->allmulti, [VIRTIO_NET_CTRL_RX_ALLUNI] = &r->alluni,
        [VIRTIO_NET_CTRL_RX_NOMULTI] = &r->nomulti, [VIRTIO_NET_CTRL_RX_NOUNI] = &r->nouni, [VIRTIO_NET_CTRL_RX_NOBCAST] = &r->nobcast,
    };
    u8 on;

    if (cmd >= ARRAY_SIZE(mode) || virtq_read(&n->ctrl, &on, 1) < 1)
        return false;
    *mode[cmd] = on != 0;
    return true;
}

/* A list: its length, and so many addresses. More than there is room for: all are let through. */
static bool read_macs(struct virtq_chain *c, u8 (*list)[NET_MAC], u32 *count, bool *overflow)
{
    u32 entries;

    if (virtq_read(c, &entries, sizeof(entries)) < sizeof(entries) || (u64)entries * NET_MAC > c->out_len)
        return false;
    *count = MIN(entries, (u32)MACS_MAX);
    *overflow = entries > MACS_MAX;
    virtq_read(c, list, (size_t)*count * NET_MAC);
    virtq_skip_out(c, (u64)(entries - *count) * NET_MAC);
    return true;
}

static bool ctrl_mac(struct virtio_net *n, u8 cmd)
{
    struct filter *r = &n->filter, new = *r;
    u8 mac[NET_MAC];

    if (cmd == VIRTIO_NET_CTRL_MAC_ADDR_SET) {
        if (virtq_read(&n->ctrl, mac, NET_MAC) < NET_MAC)
            return false;
        memcpy(n->config.mac, mac, NET_MAC);
        return true;
    }
    if (cmd != VIRTIO_NET_CTRL_MAC_TABLE_SET || !read_macs(&n->ctrl, new.uni, &new.unis, &new.uni_overflow) ||
        !read_macs(&n->ctrl, new.multi, &new.multis, &new.multi_overflow))
        return false;
    *r = new;
    return true;
}

static bool ctrl_vlan(struct virtio_net *n, u8 cmd)
{
    u16 id;

    if (cmd > VIRTIO_NET_CTRL_VLAN_DEL || virtq_read(&n->ctrl, &id, sizeof(id)) < sizeof(id) || id >= VLANS)
        return false;
    if (cmd == VIRTIO_NET_CTRL_VLAN_ADD)
        n->filter.vlan[id / 8] |= (u8)(1 << id % 8);
    else
        n->filter.vlan[id / 8] &= (u8)~(1 << id % 8);
    return true;
}

static bool ctrl_pairs(struct virtio_net *n, u8 cmd)
{
    u16 pairs;

    if (cmd != VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET || !virtio_has(&n->virtio, VIRTIO_NET_F_MQ) || virtq_read(&n->ctrl, &pairs, sizeof(pairs)) < sizeof(pairs) ||
        pairs < VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN || pairs > n->pairs_max)
        return false;
    n->pairs = pairs;
    net_kick(n->net);
    net_receive_ready(n->net);
    return true;
}

static bool ctrl_offloads(struct virtio_net *n, u8 cmd)
{
    u64 offloads;

    if (cmd != VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET || virtq_read(&n->ctrl, &offloads, sizeof(offloads)) < sizeof(offloads) ||
        (offloads & ~(n->virtio.accepted & OFFLOADS_GUEST)))
        return false;
    n->offloads = offloads;
    tell_offloads(n);
    return true;
}

/* Commands need what they belong to negotiated. */
static bool ctrl_command(struct virtio_net *n)
{
    struct virtio_net_ctrl_hdr h;

    if (virtq_read(&n->ctrl, &h, sizeof(h)) < sizeof(h))
        return false;
    switch (h.class) {
    case VIRTIO_NET_CTRL_RX: return virtio_has(&n->virtio, VIRTIO_NET_F_CTRL_RX) && ctrl_rx(n, h.cmd);
    case VIRTIO_NET_CTRL_MAC: return ctrl_mac(n, h.cmd);
    case VIRTIO_NET_CTRL_VLAN: return virtio_has(&n->virtio, VIRTIO_NET_F_CTRL_VLAN) && ctrl_vlan(n, h.cmd);
    case VIRTIO_NET_CTRL_MQ: return ctrl_pairs(n, h.cmd);
    case VIRTIO_NET_CTRL_GUEST_OFFLOADS: return virtio_has(&n->virtio, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) && ctrl_offloads(n, h.cmd);
    default: return false;
    }
}

static void control(struct virtio_net *n, unsigned queue)
{
    struct virtio *v = &n->virtio;
    struct virtq *q = &v->queue[queue];
    unsigned budget = CTRL_BATCH * 4;                              /* see rng_kick(): a driver that never ends */

    while (virtio_running(v)) {
        virtq_ignore(q);
        while (budget && virtio_pop(v, queue, &n->ctrl)) {
            u8 *ack = virtq_take_last_in(&n->ctrl);

            budget--;
            if (!ack) {
                virtq_drop(q, &n->ctrl);
                virtio_break(v, "a network control request without a place for its answer");
                break;
            }
            *ack = ctrl_command(n) ? VIRTIO_NET_OK : VIRTIO_NET_ERR;
            virtq_push(q, &n->ctrl, n->ctrl.in_total == 1);
        }
        if (!virtio_running(v) || !virtq_listen(q) || !budget)
            break;
    }
    virtio_interrupt(v, queue);
}

/* --- virtio --- */

static void nic_kick(struct virtio *v, unsigned queue)
{
    struct virtio_net *n = of_virtio(v);

    if (queue == ctrl_queue(n)) {
        control(n, queue);
        return;
    }
    if (queue >= 2 * n->pairs_max)
        return;
    n->notifications++;
    virtq_ignore(&v->queue[queue]);
    if (queue & 1)
        net_kick(n->net);
    else
        net_receive_ready(n->net);
}

/* As a driver finds it that knows nothing of the control queue: all frames come through. */
static void defaults(struct virtio_net *n)
{
    n->filter = (struct filter){ .promisc = true };
    n->pairs = 1;
    n->offloads = 0;
    n->rx_told = 0;
    memset(n->flow, 0, sizeof(n->flow));
    memset(n->flow_free, 0, sizeof(n->flow_free));
    memcpy(n->config.mac, n->mac, NET_MAC);
}

static void nic_start(struct virtio *v)
{
    struct virtio_net *n = of_virtio(v);

    defaults(n);
    n->offloads = v->accepted & OFFLOADS_GUEST;
    tell_offloads(n);
}

/* The frames that are being sent end soon; a legacy driver waits for that (virtio.h). */
static bool nic_stop(struct virtio *v)
{
    struct virtio_net *n = of_virtio(v);

    while (v->legacy && n->busy)
        pthread_cond_wait(&n->idle, &v->device.lock);
    if (!n->busy)
        net_receive_ready(n->net);                                 /* what waits is dropped */
    return !n->busy;
}

/* A driver may write its address only without the control queue's command for it (5.1.4.3). */
static void nic_config_write(struct virtio *v, unsigned off, const void *val, unsigned len)
{
    struct virtio_net *n = of_virtio(v);

    if (v->legacy && !virtio_has(v, VIRTIO_NET_F_CTRL_MAC_ADDR) && range_in(off, len, NET_MAC))
        memcpy(n->config.mac + off, val, len);
}

static const struct virtio_ops virtio_ops = { .start = nic_start, .kick = nic_kick, .stop = nic_stop, .config_write = nic_config_write };

/* --- device --- */

static void wait_idle(struct virtio_net *n)
{
    while (n->busy)
        pthread_cond_wait(&n->idle, &n->virtio.device.lock);
}

static void nic_reset(struct device *d)
{
    struct virtio_net *n = container_of(d, struct virtio_net, virtio.device);

    pthread_mutex_lock(&d->lock);
    n->virtio.resetting = true;
    wait_idle(n);
    virtio_device_reset(&n->virtio);
    defaults(n);
    net_guest_takes(n->net, 0);
    pthread_mutex_unlock(&d->lock);
}

static void nic_quiesce(struct device *d)
{
    struct virtio_net *n = container_of(d, struct virtio_net, virtio.device);

    pthread_mutex_lock(&d->lock);
    n->held = true;
    wait_idle(n);
    pthread_mutex_unlock(&d->lock);
    timer_arm(&n->go_on, clock_ns(n->go_on.clock) + 1);
}

static void time_goes_on(void *arg)
{
    struct virtio_net *n = arg;

    pthread_mutex_lock(&n->virtio.device.lock);
    n->held = false;
    pthread_mutex_unlock(&n->virtio.device.lock);
    net_kick(n->net);
    net_receive_ready(n->net);
}

static void filter_state(struct filter *r, struct stream *s)
{
    stream_bool(s, &r->promisc);
    stream_bool(s, &r->allmulti);
    stream_bool(s, &r->alluni);
    stream_bool(s, &r->nomulti);
    stream_bool(s, &r->nouni);
    stream_bool(s, &r->nobcast);
    stream_bool(s, &r->uni_overflow);
    stream_bool(s, &r->multi_overflow);
    stream_u32(s, &r->unis);
    stream_u32(s, &r->multis);
    stream_bytes(s, r->uni, sizeof(r->uni));
    stream_bytes(s, r->multi, sizeof(r->multi));
    stream_bytes(s, r->vlan, sizeof(r->vlan));
    if (s->load && (r->unis > MACS_MAX || r->multis > MACS_MAX)) {
        r->unis = r->multis = 0;
        stream_bad(s, "a network card has too many addresses");
    }
}

static void nic_state(struct device *d, struct stream *s)
{
    struct virtio_net *n = container_of(d, struct virtio_net, virtio.device);
    u32 pairs = n->pairs;

    if (!stream_section(s, "virtio_net", 1))
        return;
    virtio_state(&n->virtio, s);
    stream_bytes(s, n->config.mac, NET_MAC);
    stream_u32(s, &pairs);
    stream_u64(s, &n->offloads);
    stream_bytes(s, n->flow, sizeof(n->flow));
    filter_state(&n->filter, s);
    if (!s->load)
        return;
    if (pairs < 1 || pairs > n->pairs_max || (n->offloads & ~(n->virtio.accepted & OFFLOADS_GUEST))) {
        stream_bad(s, "a network card's queues or offloads make no sense");
        n->offloads = 0;
        pairs = 1;
    }
    n->pairs = pairs;
    n->rx_told = 0;
    memset(n->flow_free, 0, sizeof(n->flow_free));
    tell_offloads(n);
    net_kick(n->net);
    net_receive_ready(n->net);
}

static void nic_free(struct device *d)
{
    struct virtio_net *n = container_of(d, struct virtio_net, virtio.device);

    timer_disarm(&n->go_on);
    net_close(n->net);                                             /* its thread has ended after this */
    virtio_destroy(&n->virtio);
    for (unsigned i = 0; i < TX_BATCH; i++)
        virtq_chain_free(&n->tx[i].chain);
    for (unsigned i = 0; i < RX_CHAINS; i++)
        virtq_chain_free(&n->rx[i]);
    virtq_chain_free(&n->ctrl);
    pthread_cond_destroy(&n->idle);
    free(n);
}

static const struct device_ops device_ops = {
    .name = "virtio_net", .reset = nic_reset, .quiesce = nic_quiesce, .state = nic_state, .free = nic_free
};

int virtio_net_new(struct ram *ram, const struct log *log, struct clock *clock, struct net *net, const struct virtio_net_settings *s, struct virtio_net **out)
{
    struct virtio_net *n = calloc(1, sizeof(*n));
    u64 features = FEATURES | (s->plain ? 0 : OFFLOADS) | (s->mtu ? BIT(VIRTIO_NET_F_MTU) : 0) | (s->pairs > 1 ? BIT(VIRTIO_NET_F_MQ) : 0);
    u16 size[2 * NET_QUEUES_MAX + 1];
    int r = -ENOMEM;

    bug_on(s->pairs < 1 || s->pairs > NET_QUEUES_MAX);
    for (unsigned i = 0; i < ARRAY_SIZE(size); i++)
        size[i] = QUEUE_SIZE;
    if (n)
        r = virtio_init(&n->virtio, &device_ops, &virtio_ops, VIRTIO_ID_NET, ram, log, features, &n->config,
                        offsetof(struct virtio_net_config, speed), size, 2 * s->pairs + 1);
    if (r < 0) {
        free(n);
        net_close(net);
        return err(r, "virtio_net: out of memory");
    }
    n->net = net;
    n->pairs_max = s->pairs;
    n->plugged = n->present = true;
    memcpy(n->mac, s->mac, NET_MAC);
    n->config = (struct virtio_net_config){ .status = VIRTIO_NET_S_LINK_UP, .max_virtqueue_pairs = (u16)s->pairs, .mtu = s->mtu };
    pthread_cond_init(&n->idle, NULL);
    timer_init(&n->go_on, clock, time_goes_on, n);
    defaults(n);
    r = net_start(net, &front_ops, n, s->capture, s->capture_id);
    if (r < 0) {
        nic_free(&n->virtio.device);
        return r;
    }
    *out = n;
    return 0;
}

void virtio_net_set_link(struct virtio_net *n, bool up)
{
    pthread_mutex_lock(&n->virtio.device.lock);
    n->plugged = up;
    tell_link(n);
    pthread_mutex_unlock(&n->virtio.device.lock);
}

bool virtio_net_link(struct virtio_net *n)
{
    return n->config.status & VIRTIO_NET_S_LINK_UP;
}

struct virtio_net_counts virtio_net_counts(struct virtio_net *n)
{
    struct virtio_net_counts c;

    pthread_mutex_lock(&n->virtio.device.lock);
    c = (struct virtio_net_counts){ .notifications = n->notifications, .interrupts = n->interrupts, .filtered = n->filtered };
    pthread_mutex_unlock(&n->virtio.device.lock);
    c.frames = net_counts(n->net);
    return c;
}

void virtio_net_info(struct virtio_net *n, FILE *f)
{
    const u8 *m = n->mac;

    fprintf(f, "%s, %02x:%02x:%02x:%02x:%02x:%02x, link %s", n->net->name, m[0], m[1], m[2], m[3], m[4], m[5], virtio_net_link(n) ? "up" : "down");
    if (n->net->ops->info)
        n->net->ops->info(n->net, f);
}
