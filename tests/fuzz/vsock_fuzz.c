/*
 * Fuzzing of the ways into a guest. The first byte says which:
 *
 *   0  the vsock device behind PCI, between a hostile driver (packets with fields of the input's choice, bad chains, resets, tampered state) and
 *      programs of the host that connect, send, read and leave: steps of 8 bytes
 *   1  what a guest's agent says to doppel exec
 *   2  what doppel says to the agent
 *   3  a tree of files for the receiver: nothing may appear outside its folder
 *   4  the request of doppel exec as the agent cuts it up
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/virtio_vsock.h>
#include <setjmp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "../dev/virtio_guest.h"
#include "../turns.h"
#include "back/tree.h"
#include "dev/virtio_vsock.h"
#include "state.h"

static jmp_buf out_of_session;

/* The programs' own functions, without what they do to processes and streams. */
static _Noreturn void fuzz_exit(int status UNUSED)
{
    longjmp(out_of_session, 1);
}
static int fuzz_kill(int pid UNUSED, int signo UNUSED)
{
    return 0;
}

#define exit fuzz_exit
#define kill fuzz_kill
#define put agent_put
#define get agent_get_bytes
#define main agent_main
#define message agent_message
#include "../../agent/agent.c"
#undef message
#undef main
#undef get
#undef put
#undef kill
#undef exit
#undef GROUPS_MAX
#define open_signals exec_open_signals
#define request exec_request
#define set_wait exec_set_wait
#define join exec_join
#define exited exec_exited
#define guest doppel_guest
#include "../../src/ctl/exec.c"
#undef guest

#define DEV 1
#define CLIENTS 4
#define RX 0
#define TX 1
#define AREA (GUEST_RAM / 2)

static struct guest g;
static struct loop *loop;
static struct vsock_host *host;
static struct virtio_vsock *vsock;
static struct vdev drv;
static char dir[64], path[96], inside[96];
static int client[CLIENTS] = { -1, -1, -1, -1 }, listener = -1, seq_listener = -1;
static unsigned starts;

static void turn(void)
{
    turns(loop, 3);
}

static void set_up(void)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };

    strcpy(dir, "/tmp/doppel-fuzz-XXXXXX");
    bug_on(!mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/s", dir);
    snprintf(inside, sizeof(inside), "%s/in", dir);
    snprintf(a.sun_path, sizeof(a.sun_path), "%s_1", path);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    bug_on(bind(listener, (struct sockaddr *)&a, sizeof(a)) < 0 || listen(listener, 16) < 0 || mkdir(inside, 0700) < 0);
    snprintf(a.sun_path, sizeof(a.sun_path), "%s_2", path);
    seq_listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    bug_on(bind(seq_listener, (struct sockaddr *)&a, sizeof(a)) < 0 || listen(seq_listener, 16) < 0);
    struct vsock_host_config cfg = { .path = path, .peers = dir, .cid = 3 };

    guest_new(&g);
    bug_on(loop_new(&loop) < 0 || vsock_host_new(loop, &cfg, &host) < 0 || virtio_vsock_new(&g.ram, NULL, loop, host, &vsock) < 0 ||
           virtio_pci_attach(g.pci, DEV, guest_line(&g), 10, true, (struct virtio *)vsock) < 0);
}

/* --- the device --- */

static void start_driver(u32 val)
{
    if (starts++ >= 4)
        return;
    vdev_find(&drv, &g, DEV);
    if (common_get(&drv, COMMON(num_queues), 2) <= 8)
        vdev_start(&drv, &g, DEV, BIT(VIRTIO_F_VERSION_1) | (vdev_features(&drv) & ~((u64)(val & 3) << VIRTIO_RING_F_INDIRECT_DESC)), 16);
}

static void packet(unsigned n, u32 val)
{
    static const u64 cids[] = { 2, 2, 2, 3, 9, 1, 1ull << 32 | 2, 0 };
    struct virtio_vsock_hdr h = {
        .src_cid = n >> 13 == 7 ? 5 : 3, .dst_cid = cids[n >> 4 & 7], .src_port = 1000 + (n >> 7 & 3), .op = n & 15,
        .dst_port = n & 0x200 ? 1 + (n >> 10 & 1) : 0x40000000u + (n >> 10 & 3), .type = (n >> 10 & 1) ^ (n >> 12 == 15) ? 2 : 1,
        .len = (n & 15) == VIRTIO_VSOCK_OP_RW ? val & 0xffff : 0, .flags = val >> 16 & 3, .buf_alloc = val >> 20 << 8, .fwd_cnt = val >> 24,
    };
    u64 at = AREA + (n & 7) * 0x20000ull;

    if (!drv.q[TX].size)
        return;
    put(&g, at, &h, sizeof(h));
    gq_add(&drv.q[TX], (struct buf[]){ { at, sizeof(h), false }, { at + 64, MAX(h.len - (val >> 31), 1u), val >> 30 == 2 } }, h.len ? 2 : 1);
    vdev_kick(&drv, TX);
}

static void host_program(unsigned n, u32 val)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    static char data[70000];
    int *fd = &client[n % CLIENTS];

    switch (n >> 2 & 7) {
    case 0: case 1:
        if (*fd >= 0)
            close(*fd);
        *fd = n & 4 ? accept4(n & 32 ? seq_listener : listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
                    : socket(AF_UNIX, (n & 32 ? SOCK_SEQPACKET : SOCK_STREAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        snprintf(a.sun_path, sizeof(a.sun_path), "%s%s", path, n & 32 ? ".seq" : "");
        if (!(n & 4) && connect(*fd, (struct sockaddr *)&a, sizeof(a)) == 0)
            dprintf(*fd, "CONNECT %u%s%s\n", 1000 + (val >> 1 & 3), val & 1 ? "" : " FROM 9:5", n & 32 && val & 8 ? " MARKED" : "");
        break;
    case 2: case 3:
        if (*fd >= 0)
            send(*fd, data, val % sizeof(data), MSG_DONTWAIT | MSG_NOSIGNAL);
        break;
    case 4: case 5:
        if (*fd >= 0)
            recv(*fd, data, val % sizeof(data), MSG_DONTWAIT);
        break;
    case 6:
        if (*fd >= 0)
            shutdown(*fd, (int)(val % 3));
        break;
    default:
        if (*fd >= 0)
            close(*fd);
        *fd = -1;
    }
}

static void step(const u8 *a)
{
    unsigned n = a[2] | a[3] << 8;
    u32 v;

    memcpy(&v, a + 4, 4);
    switch (a[0] % 12) {
    case 0: case 1: case 2: case 3: packet(n, v); break;
    case 4: case 5: host_program(n, v); break;
    case 6:
        if (drv.q[RX].size) {
            for (unsigned i = 0; i <= (n & 7); i++)
                gq_add(&drv.q[n & 0x100 ? 2 : RX], (struct buf[]){ { AREA + 0x200000 + (n + i) % 64 * 0x1000, n & 8 ? v % 200 : 4096, !(n & 0x80) } }, 1);
            vdev_kick(&drv, RX);
        }
        break;
    case 7: case 8: turn(); break;
    case 9: start_driver(v); break;
    case 10: n & 1 ? state_save_and_load((struct device *)vsock, v, false) : put(&g, n * 4, &v, 4); break;
    case 11: bus_write(g.mmio, bar_address(&g, DEV, 4) + n % 0x4000, v, 1u << (a[1] & 1)); break;
    }
}

static void fuzz_device(const u8 *data, size_t len)
{
    struct device *d = (struct device *)vsock;

    g.heap = GUEST_HEAP;
    starts = 0;
    memset(&drv, 0, sizeof(drv));
    start_driver(0);
    for (; len >= 8; data += 8, len -= 8)
        step(data);
    turn();
    d->ops->quiesce(d);
    d->ops->reset(d);
    for (unsigned i = 0; i < CLIENTS; i++)
        if (client[i] >= 0) {
            close(client[i]);
            client[i] = -1;
        }
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0 || (fd = accept4(seq_listener, NULL, NULL, SOCK_CLOEXEC)) >= 0;)
        close(fd);
    turn();
    turn();
    bug_on(virtio_vsock_conns(vsock));
    memset(g.ram.run[0].hva, 0, 768 * KiB);
}

/* --- the protocols --- */

static void feed_socket(int pair[2], const u8 *data, size_t len)
{
    bug_on(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0);
    if (len && send(pair[1], data, MIN(len, (size_t)65536), MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        return;
    shutdown(pair[1], SHUT_WR);
}

static void fuzz_exec(const u8 *data, size_t len)
{
    static struct exec e;
    static char word[] = "word", *words[] = { word, NULL };
    int pair[2];

    feed_socket(pair, data, len);
    e = (struct exec){ .conn = pair[0], .signals = -1, .window = AGENT_WINDOW, .out = -1, .status = -1, .name = "n", .options = { .command = words } };
    while (e.status < 0 && !e.broken) {
        from_agent(&e);
        while (e.out >= 0) {
            bug_on(e.written > e.payload_len || e.payload_len > AGENT_DATA_MAX || (e.out != 1 && e.out != 2));
            e.written = e.payload_len;                             /* as if it had been written */
            e.out = -1;
            e.payload_len = 0;
        }
        bug_on(e.window > AGENT_WINDOW);
    }
    bug_on(e.status > 255);
    close(pair[0]);
    close(pair[1]);
}

static void fuzz_agent(const u8 *data, size_t len)
{
    static struct session *s;
    static u8 *input;
    int pair[2], in[2];

    if (!s) {
        s = calloc(1, sizeof(*s));
        input = malloc(AGENT_WINDOW);
    }
    feed_socket(pair, data, len);
    bug_on(pipe2(in, O_CLOEXEC | O_NONBLOCK) < 0);
    memset(s, 0, sizeof(*s));
    s->conn = pair[0];
    s->input = input;
    s->pid = 1 << 30;
    s->fd[IN] = in[1];
    s->fd[OUT] = s->fd[ERR] = -1;
    s->tty = len & 1;
    if (!setjmp(out_of_session))
        for (;;) {
            from_host(s);
            bug_on(s->input_len > AGENT_WINDOW || s->input_head >= AGENT_WINDOW);
        }
    close(s->fd[IN]);
    close(in[0]);
    close(pair[0]);
    close(pair[1]);
}

static int remove_one(const char *name, const struct stat *st UNUSED, int type UNUSED, struct FTW *f UNUSED)
{
    return chmod(name, 0700) < 0 && 0 ? -1 : remove(name);
}

static int unlock_one(const char *name, const struct stat *st UNUSED, int type, struct FTW *f UNUSED)
{
    return type == FTW_SL ? 0 : chmod(name, 0700) & 0;
}

static void fuzz_tree(const u8 *data, size_t len)
{
    struct tree_result r;
    struct stat st;
    int pair[2], count = 0;

    feed_socket(pair, data, len);
    tree_receive(pair[0], inside, len & 1 ? "name" : NULL, 0777, &r);
    close(pair[0]);
    close(pair[1]);
    nftw(inside, unlock_one, 16, FTW_PHYS);
    nftw(inside, remove_one, 16, FTW_PHYS | FTW_DEPTH);
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));)
        count++;
    closedir(d);
    bug_on(count > 6 + (stat(inside, &st) == 0));                  /* ., .., s, s.seq, s_1, s_2 */
    mkdir(inside, 0700);
}

static void fuzz_request(const u8 *data, size_t len)
{
    struct msg_run run;
    char *copy;

    if (len < sizeof(run))
        return;
    memcpy(&run, data, sizeof(run));
    copy = malloc(len);
    memcpy(copy, data, len);
    u64 strings = 2ull + run.argc + run.envc;
    char **list = run.argc && strings <= len - sizeof(run) ? calloc(strings + 2, sizeof(*list)) : NULL;
    if (list && cut(copy + sizeof(run), copy + len, strings, 1ull + run.argc, list)) {
        unsigned n = 0;
        bug_on(!list[0] || !list[1]);
        for (char **w = list + 2; *w; w++)
            n += strlen(*w) < len;
        bug_on(n != run.argc);
        for (char **w = list + run.argc + 3; *w; w++)
            n++;
        bug_on(n != run.argc + run.envc);
    }
    free(list);
    free(copy);
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    if (!vsock)
        set_up();
    if (!len)
        return 0;
    switch (*data % 8) {
    case 1: fuzz_exec(data + 1, len - 1); break;
    case 2: fuzz_agent(data + 1, len - 1); break;
    case 3: fuzz_tree(data + 1, len - 1); break;
    case 4: fuzz_request(data + 1, len - 1); break;
    default: fuzz_device(data + 1, len - 1);
    }
    return 0;
}
