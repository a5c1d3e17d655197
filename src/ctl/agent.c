/* The way to a guest's agent (agent.h): the VM's vsock socket (back/vsock_host.h), its handshake, the agent's HELLO. */
#define _GNU_SOURCE
#include "ctl/agent.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "back/tree.h"
#include "back/vsock_host.h"
#include "base/err.h"
#include "ctl/vms.h"

#define HELLO_SECONDS 10                                           /* for an agent that is there */
#define RETRY_MS 50

bool agent_send(int fd, u32 type, const void *payload, u32 len)
{
    struct msg_head head = {.type = type, .len = len};
    return tree_put(fd, &head, sizeof(head)) && tree_put(fd, payload, len);
}

bool agent_receive(int fd, struct msg_head *head, void *payload, u32 size)
{
    return tree_get(fd, head, sizeof(*head)) && head->len <= size && tree_get(fd, payload, head->len);
}

static void set_timeout(int fd, time_t seconds)
{
    struct timeval t = {.tv_sec = seconds};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof(t));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof(t));
}

/* "OK N\n", by single bytes: what is behind it belongs to the connection. */
static bool accepted(int fd)
{
    char line[32];
    size_t n = 0;
    while (n < sizeof(line) && tree_get(fd, line + n, 1))
        if (line[n++] == '\n')
            return n > 3 && !memcmp(line, "OK ", 3);
    return false;
}

static int greet(int fd)
{
    struct msg_head head;
    struct msg_ready hello;
    if (!agent_receive(fd, &head, &hello, sizeof(hello)))
        return -EAGAIN;                                            /* it went away, as at the guest's end */
    if (head.type != AGENT_HELLO || head.len != sizeof(hello))
        return err(-EPROTO, "what answers in the guest is no agent of doppel's");
    if (hello.version != AGENT_VERSION)
        return err(-EPROTO, "the guest's agent speaks version %u of the protocol, doppel speaks %u; build the guest again", hello.version,
                   AGENT_VERSION);
    return 0;
}

int agent_try(const struct instance *i)
{
    char line[32];
    int len = snprintf(line, sizeof(line), "CONNECT %u\n", AGENT_PORT), r = -EAGAIN;
    int fd = instance_connect(i, VSOCK_SOCKET_NAME);
    if (fd < 0)
        return -EAGAIN;
    set_timeout(fd, HELLO_SECONDS);
    if (send(fd, line, (size_t)len, MSG_NOSIGNAL) == len && accepted(fd))
        r = greet(fd);
    if (r < 0) {
        close(fd);
        return r;
    }
    set_timeout(fd, 0);
    return fd;
}

static u64 now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000 + (u64)t.tv_nsec / 1000000;
}

static bool paused(const struct instance *i)
{
    char answer[1024];
    return vms_ask(i, "status\n", answer, sizeof(answer), 1000, NULL) == 0 && strstr(answer, "\nstate=paused\n");
}

int agent_connect(const struct instance *i, unsigned wait_ms)
{
    u64 until = now_ms() + wait_ms;
    for (;;) {
        int fd = agent_try(i);
        if (fd != -EAGAIN)
            return fd;
        if (!instance_lives(i))
            return err(-ENOENT, "%s: the VM has ended", i->name);
        if (now_ms() >= until && paused(i))
            return err(-ETIMEDOUT, "%s: it is paused; doppel resume %s lets it go on", i->name, i->name);
        if (now_ms() >= until)
            return err(-ETIMEDOUT, "%s: no agent answers in the guest; does it still boot, or has its system no doppel-agent?", i->name);
        poll(NULL, 0, RETRY_MS);
    }
}
