/* Options about the network (net_options.h). No state. */
#include "ctl/net_options.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>

#include "ctl/options.h"

/* --- --net KIND[,ATTRIBUTE...] --- */

static int hex(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static int parse_mac(const char *s, u8 mac[NET_MAC])
{
    for (unsigned i = 0; i < NET_MAC; i++, s += 3) {
        if (hex(s[0]) < 0 || hex(s[1]) < 0 || s[2] != (i + 1 < NET_MAC ? ':' : '\0'))
            return -EINVAL;
        mac[i] = (u8)(hex(s[0]) << 4 | hex(s[1]));
    }
    return mac[0] & 1 ? -EINVAL : 0;                               /* of a group, not of a card */
}

static int set_mac(struct vm_net *n, const char *value)
{
    if (parse_mac(value, n->mac) < 0)
        return err(-EINVAL, "--net: mac=%.50s: not the address of a card; give six bytes, for example mac=52:54:00:aa:bb:cc", value);
    n->has_mac = true;
    return 0;
}

static int set_mtu(struct vm_net *n, const char *value)
{
    u64 v;

    if (parse_unsigned(value, &v) < 0 || v < NET_MTU_MIN || v > NET_MTU_MAX)
        return err(-EINVAL, "--net: mtu=%.50s: not a number from %d to %d", value, NET_MTU_MIN, NET_MTU_MAX);
    n->mtu = (u16)v;
    return 0;
}

static int set_queues(struct vm_net *n, const char *value)
{
    u64 v;

    if (parse_unsigned(value, &v) < 0 || v < 1 || v > NET_QUEUES_MAX)
        return err(-EINVAL, "--net: queues=%.50s: not a number from 1 to %d", value, NET_QUEUES_MAX);
    n->queues = (unsigned)v;
    return 0;
}

static int set_restrict(struct vm_net *n, const char *value UNUSED)
{
    n->restricted = true;
    return 0;
}

static int set_offload(struct vm_net *n, const char *value)
{
    n->plain = !strcmp(value, "off");
    return n->plain || !strcmp(value, "on") ? 0 : err(-EINVAL, "--net: offload=%.50s: neither on nor off", value);
}

#define USER (1u << VM_NET_USER)
#define ALL (~0u)
static const struct attribute {
    const char *name;
    bool value;
    unsigned kinds;
    int (*set)(struct vm_net *n, const char *value);
} attributes[] = {
    { "restrict", false, USER, set_restrict }, { "mac", true, ALL, set_mac }, { "mtu", true, ALL, set_mtu }, { "queues", true, ALL, set_queues },
    { "offload", true, ALL, set_offload },
};

static int set_attribute(struct vm_net *n, char *word)
{
    size_t len = strcspn(word, "=");

    for (unsigned i = 0; i < ARRAY_SIZE(attributes); i++) {
        const struct attribute *a = &attributes[i];

        if (strlen(a->name) != len || memcmp(a->name, word, len) || !(a->kinds >> n->kind & 1))
            continue;
        if (a->value != (word[len] == '='))
            return err(-EINVAL, "--net: \"%s\" %s", a->name, a->value ? "needs a value behind \"=\"" : "takes no value");
        return a->set(n, word + len + 1);
    }
    return err(-EINVAL, "--net: \"%.50s\" is no attribute of this kind of network; there are mac=, mtu=, queues=, offload= and, for user, restrict", word);
}

/* "N[:N...]" */
static int set_fds(struct vm_net *n, char *list)
{
    char *save;
    u64 v;

    for (char *word = strtok_r(list, ":", &save); word; word = strtok_r(NULL, ":", &save)) {
        if (n->fds == NET_QUEUES_MAX || parse_unsigned(word, &v) < 0 || v > INT32_MAX)
            return err(-EINVAL, "--net fd=%.50s: not the numbers of up to %d open descriptors", word, NET_QUEUES_MAX);
        n->fd[n->fds++] = (int)v;
    }
    return n->fds ? 0 : err(-EINVAL, "--net fd=: the number of an open descriptor is missing");
}

static int set_kind(struct vm_net *n, char *kind)
{
    static const struct { const char *name; enum vm_net_kind kind; } named[] = { { "tap=", VM_NET_TAP }, { "passt=", VM_NET_PASST }, { "fd=", VM_NET_FD } };

    if (!strcmp(kind, "user")) {
        n->kind = VM_NET_USER;
        return 0;
    }
    for (unsigned i = 0; i < ARRAY_SIZE(named); i++) {
        size_t len = strlen(named[i].name);

        if (strncmp(kind, named[i].name, len))
            continue;
        n->kind = named[i].kind;
        n->name = kind + len;
        if (n->kind == VM_NET_FD)
            return set_fds(n, kind + len);
        return *n->name ? 0 : err(-EINVAL, "--net %s: the name is missing behind \"=\"", kind);
    }
    return err(-EINVAL, "--net %.100s: no such kind of network; choose user, tap=NAME, fd=N, passt=SOCKET or none", kind);
}

int net_option(struct net_options *o, char *value)
{
    struct vm_net *n = &o->net[o->nets];
    char *save, *word;
    int r;

    if (o->none || (o->given && !strcmp(value, "none")))
        return err(-EINVAL, "--net none: contradicts another --net; leave one out");
    o->given = true;
    o->none = !strcmp(value, "none");
    if (o->none)
        return 0;
    if (o->nets == VM_NETS_MAX)
        return err(-EINVAL, "--net %.100s: too many; a guest has up to %d network cards", value, VM_NETS_MAX);
    *n = (struct vm_net){ .kind = VM_NET_USER };
    word = strtok_r(value, ",", &save);
    r = word ? set_kind(n, word) : err(-EINVAL, "--net: the kind is missing; write for example --net user,restrict");
    while (r == 0 && (word = strtok_r(NULL, ",", &save)))
        r = set_attribute(n, word);
    if (r == 0)
        o->nets++;
    return r;
}

/* --- --publish [ADDR:]HOST:GUEST[/udp] --- */

static int bad_publish(const char *value, const char *why)
{
    return err(-EINVAL, "--publish %.100s: %s; write [ADDRESS:]HOST:GUEST[/udp], for example 8080:80, 0.0.0.0:2222:22 or [::1]:5353:53/udp", value, why);
}

static int parse_port(const char *s, u16 *port)
{
    u64 v;

    if (parse_unsigned(s, &v) < 0 || v < 1 || v > 65535)
        return -EINVAL;
    *port = (u16)v;
    return 0;
}

static int parse_address(char *s, struct net_publish *p)
{
    size_t len = strlen(s);

    if (*s == '[' && s[len - 1] == ']') {
        s[len - 1] = '\0';
        p->v6 = true;
        return inet_pton(AF_INET6, s + 1, &p->addr6) == 1 ? 0 : -EINVAL;
    }
    return inet_pton(AF_INET, s, &p->addr4) == 1 ? 0 : -EINVAL;
}

static char *cut_last(char *s, char at)
{
    char *p = strrchr(s, at);

    if (!p)
        return NULL;
    *p = '\0';
    return p + 1;
}

int publish_option(struct net_options *o, char *value)
{
    struct net_publish p = { .addr4 = { htonl(INADDR_LOOPBACK) } };
    char whole[128], *end, *host;

    snprintf(whole, sizeof(whole), "%s", value);
    if (o->publishes == NET_PUBLISH_MAX)
        return err(-EINVAL, "--publish %.100s: too many; up to %d ports are published", whole, NET_PUBLISH_MAX);
    end = cut_last(value, '/');
    if (end && strcmp(end, "udp") && strcmp(end, "tcp"))
        return bad_publish(whole, "behind \"/\" stands neither tcp nor udp");
    p.udp = end && !strcmp(end, "udp");
    end = cut_last(value, ':');
    if (!end || parse_port(end, &p.guest) < 0)
        return bad_publish(whole, "the guest's port is missing or not a number from 1 to 65535");
    host = cut_last(value, ':');
    if (parse_port(host ? host : value, &p.host) < 0)
        return bad_publish(whole, "the host's port is not a number from 1 to 65535");
    if (host && (!*value || parse_address(value, &p) < 0))
        return bad_publish(whole, "the host's address is none");
    o->publish[o->publishes++] = p;
    return 0;
}

int net_options_end(struct net_options *o)
{
    bool user = false;

    if (!o->given) {
        o->net[0] = (struct vm_net){ .kind = VM_NET_USER };
        o->nets = 1;
    }
    for (unsigned i = 0; i < o->nets; i++)
        user |= o->net[i].kind == VM_NET_USER;
    if (o->publishes && !user)
        return err(-EINVAL, "--publish: there is no user network whose guest could be reached so; add --net user, or leave it out");
    return 0;
}

bool net_options_wait(const struct net_options *o)
{
    bool sure = false;

    for (unsigned i = 0; i < o->nets; i++)
        sure |= o->net[i].kind == VM_NET_USER || o->net[i].kind == VM_NET_PASST;
    return sure && (o->given || o->publishes);
}
