/* Network cards (see nic.h). No state. */
#include "vm/nic.h"

#include <errno.h>
#include <string.h>

#include "back/net_passt.h"
#include "back/net_tap.h"
#include "cpu/stats.h"

/* FNV-1a. */
static u32 hash(u32 h, const char *s)
{
    for (; *s; s++)
        h = (h ^ (u8)*s) * 0x01000193u;
    return h;
}

/*
 * The same for the same machine in each run. A network of the guest's own meets no other cards: the addresses that QEMU gives its cards, too. On a tap device others may be near,
 * of this host or of others: made of the tap's name, which the host has once, and of what tells hosts apart.
 */
static void default_mac(const struct vm_net *n, unsigned i, u8 mac[NET_MAC])
{
    char id[64] = "", number[16];
    FILE *f;
    u32 h;

    memcpy(mac, (u8[]){ 0x52, 0x54, 0x00, 0x12, 0x34, (u8)(0x56 + i) }, NET_MAC);
    if (n->kind != VM_NET_TAP && n->kind != VM_NET_FD)
        return;
    f = fopen("/etc/machine-id", "re");
    if (f && !fgets(id, sizeof(id), f))
        id[0] = '\0';
    if (f)
        fclose(f);
    snprintf(number, sizeof(number), "%u", i);
    h = hash(hash(0x811c9dc5u, id), n->kind == VM_NET_TAP ? n->name : number);
    mac[3] = (u8)(h >> 16);
    mac[4] = (u8)(h >> 8);
    mac[5] = (u8)h;
}

static bool first_user(const struct vm_config *c, unsigned i)
{
    for (unsigned k = 0; k < i; k++)
        if (c->net[k].kind == VM_NET_USER)
            return false;
    return c->net[i].kind == VM_NET_USER;
}

static int open_back_end(const struct vm_config *c, unsigned i, const u8 *mac, struct net **out)
{
    const struct vm_net *n = &c->net[i];
    struct net_config config = { .index = i, .mtu = n->mtu, .log = c->log };

    memcpy(config.mac, mac, NET_MAC);
    switch (n->kind) {
    case VM_NET_USER:
        return net_user_new(&config, n->restricted, c->publish, first_user(c, i) ? c->publishes : 0, out);
    case VM_NET_TAP:
        return net_tap_new(&config, n->name, MAX(n->queues, 1u), out);
    case VM_NET_FD:
        return net_tap_fd_new(&config, n->fd, n->fds, out);
    case VM_NET_PASST:
        return net_passt_new(&config, n->name, out);
    }
    return err(-EINVAL, "network %u: of no known kind", i);
}

int nic_new(const struct vm_config *c, unsigned i, struct ram *ram, struct clock *clock, struct capture *capture, struct virtio_net **out)
{
    const struct vm_net *n = &c->net[i];
    struct virtio_net_settings s = { .mtu = n->mtu, .plain = n->plain, .capture = capture };
    struct net *net;
    char name[16];
    int r;

    if (n->has_mac)
        memcpy(s.mac, n->mac, NET_MAC);
    else
        default_mac(n, i, s.mac);
    r = open_back_end(c, i, s.mac, &net);
    if (r < 0)
        return r;
    if (!s.mtu && net->mtu != NET_MTU)
        s.mtu = net->mtu;
    s.pairs = n->queues ? n->queues : MAX(net->queues, MIN(c->vcpus, (unsigned)NET_QUEUES_MAX));
    snprintf(name, sizeof(name), "net%u", i);
    if (capture)
        r = capture_interface(capture, name, s.mac, &s.capture_id);
    if (r < 0) {
        net_close(net);
        return r;
    }
    return virtio_net_new(ram, c->log, clock, net, &s, out);
}

void nic_stats(struct virtio_net *n, unsigned i, struct stats *s)
{
    struct virtio_net_counts c = virtio_net_counts(n);
    char name[16];

    snprintf(name, sizeof(name), "net%u", i);
    stats_group(s, name);
    stats_u64(s, "sent", c.frames.sent);
    stats_u64(s, "sent-bytes", c.frames.sent_bytes);
    stats_u64(s, "sent-dropped", c.frames.sent_dropped);
    stats_u64(s, "received", c.frames.received);
    stats_u64(s, "received-bytes", c.frames.received_bytes);
    stats_u64(s, "received-dropped", c.frames.received_dropped);
    stats_u64(s, "filtered", c.filtered);
    stats_u64(s, "notifications", c.notifications);
    stats_u64(s, "interrupts", c.interrupts);
    stats_group_end(s);
}
