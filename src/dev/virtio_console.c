/*
 * virtio console with several ports (see virtio_console.h; virtio 1.2, 5.3).
 *
 * Queues: 0 and 1 carry data of port 0 to and from the guest, 2 and 3 the control messages, then two for each further port (5.3.2). A driver without
 * VIRTIO_CONSOLE_F_MULTIPORT has port 0 only, and it is always open.
 *
 * The vCPU that notifies only notes which queue it was and posts service() to the loop. All work is done there: control messages, callbacks with the guest's
 * data straight from guest memory, and chains back to the guest. A port's chain that the host's side has taken in part is held (vport.tx) until
 * vport_resume(). Control messages to the guest are bits of what is still to be said, so no queue of them can grow.
 *
 * A reset by the driver ends on the loop too, after what the guest had already sent was offered to the host's side a last time: newer drivers reset their
 * devices at shutdown, while output is still in the ring. What the host's side does not take then is lost.
 *
 * Left out: emergency write, splitting of a received stream at message boundaries (it has none).
 *
 * Locking: the device's lock guards everything; it is released around callbacks. `epoch` tells a function that comes back from a callback that the device
 * was reset meanwhile; `serving` makes a driver's reset wait for service() to end.
 */
#include "dev/virtio_console.h"

#include <errno.h>
#include <linux/virtio_console.h>
#include <string.h>

#include "base/err.h"

#define CONTROL_RX 2
#define CONTROL_TX 3
#define DATA_QUEUE_SIZE 128
#define CONTROL_QUEUE_SIZE 64
#define PIECE_MAX (256 * KiB)                                      /* in one guest_data() */
#define BYTES_PER_TURN (1 * MiB)                                   /* of one port, before the loop sees to others */
#define BYTES_AT_RESET (64 * MiB)                                  /* more than a full ring of an honest driver */
#define CHAINS_PER_TURN (4 * DATA_QUEUE_SIZE)

/* What the guest has to be told of a port, in this order. */
enum say { SAY_ADD = 1, SAY_NAME = 2, SAY_CONSOLE = 4, SAY_OPEN = 8, SAY_SIZE = 16 };

struct vport {
    struct virtio_console *con;
    unsigned n;
    struct vport_config cfg;
    u8 say;                                                        /* enum say, still to be said */
    bool ready;                                                    /* the guest has answered ADD */
    bool host_open, guest_open;
    bool told_open;                                                /* the last guest_open() */
    bool stalled;                                                  /* guest_data() took less than it was given */
    bool want_room;                                                /* vport_send() took less than it was given */
    bool holding;
    struct virtq_chain tx;                                         /* from the guest: held while `holding` */
    struct virtq_chain rx;                                         /* to the guest */
    u16 cols, rows;
};

struct virtio_console {
    struct virtio virtio;
    struct loop *loop;
    bool posted;                                                   /* run_service is on its way */
    struct virtio_console_config config;
    bool serving;
    unsigned epoch;
    struct virtq_chain control;
    unsigned ports;
    struct vport port[VIRTIO_CONSOLE_PORTS_MAX];
};

/* 5.3.6.2; written in the order of the driver's struct in Linux, rows first. */
struct console_size {
    u16 rows, cols;
};

static unsigned rx_queue(const struct vport *p)
{
    return p->n ? 2 + 2 * p->n : 0;
}

static unsigned tx_queue(const struct vport *p)
{
    return rx_queue(p) + 1;
}

static void lock(struct virtio_console *con)
{
    pthread_mutex_lock(&con->virtio.device.lock);
}

static void unlock(struct virtio_console *con)
{
    pthread_mutex_unlock(&con->virtio.device.lock);
}

static void service(struct virtio_console *con);

static void run_service(void *arg)
{
    struct virtio_console *con = arg;

    lock(con);
    con->posted = false;
    service(con);
    unlock(con);
}

/* Under the lock, any thread. */
static void post(struct virtio_console *con)
{
    if (con->posted)
        return;
    con->posted = true;
    loop_post(con->loop, run_service, con);
}

static bool multiport(const struct virtio_console *con)
{
    return virtio_has(&con->virtio, VIRTIO_CONSOLE_F_MULTIPORT);
}

/* --- control messages --- */

static void control_message(struct virtio_console *con, const struct virtio_console_control *msg)
{
    struct vport *p = msg->id < con->ports ? &con->port[msg->id] : NULL;

    if (msg->event == VIRTIO_CONSOLE_DEVICE_READY && msg->value) {
        for (unsigned n = 0; n < con->ports; n++) {
            con->port[n].say = SAY_ADD;
            con->port[n].ready = false;
        }
        return;
    }
    if (!p)
        return;
    if (msg->event == VIRTIO_CONSOLE_PORT_READY) {
        p->ready = msg->value;
        p->say = 0;
        if (p->ready)
            p->say = (p->cfg.name ? SAY_NAME : 0) | (p->cfg.console ? SAY_CONSOLE : 0) | (p->host_open ? SAY_OPEN : 0) |
                     (p->cfg.console && p->cols ? SAY_SIZE : 0);
    } else if (msg->event == VIRTIO_CONSOLE_PORT_OPEN) {
        p->guest_open = msg->value;
    }
}

static void control_from_guest(struct virtio_console *con)
{
    struct virtio *v = &con->virtio;
    struct virtq *q = &v->queue[CONTROL_TX];
    unsigned budget = 4 * CONTROL_QUEUE_SIZE;

    while (virtio_running(v)) {
        virtq_ignore(q);
        while (budget && virtio_pop(v, CONTROL_TX, &con->control)) {
            struct virtio_console_control msg;

            budget--;
            if (virtq_read(&con->control, &msg, sizeof(msg)) == sizeof(msg))
                control_message(con, &msg);
            virtq_push(q, &con->control, 0);
        }
        if (!virtq_listen(q))
            break;
        if (!budget) {
            post(con);
            break;
        }
    }
    virtio_interrupt(v, CONTROL_TX);
}

static size_t compose(const struct vport *p, enum say what, u8 *buf, size_t size)
{
    struct virtio_console_control msg = { .id = p->n, .value = 1 };
    struct console_size window = { .rows = p->rows, .cols = p->cols };
    const void *more = NULL;
    size_t len = 0;

    switch (what) {
    case SAY_ADD: msg.event = VIRTIO_CONSOLE_PORT_ADD; break;
    case SAY_NAME:
        msg.event = VIRTIO_CONSOLE_PORT_NAME;
        more = p->cfg.name;
        len = strlen(p->cfg.name);
        break;
    case SAY_CONSOLE: msg.event = VIRTIO_CONSOLE_CONSOLE_PORT; break;
    case SAY_OPEN:
        msg.event = VIRTIO_CONSOLE_PORT_OPEN;
        msg.value = p->host_open;
        break;
    case SAY_SIZE:
        msg.event = VIRTIO_CONSOLE_RESIZE;
        more = &window;
        len = sizeof(window);
        break;
    }
    len = MIN(len, size - sizeof(msg));
    memcpy(buf, &msg, sizeof(msg));
    if (len)
        memcpy(buf + sizeof(msg), more, len);
    return sizeof(msg) + len;
}

/* A chain for the device to write into; asks for a notification when there is none. */
static bool pop_or_listen(struct virtio_console *con, unsigned n, struct virtq_chain *c)
{
    struct virtio *v = &con->virtio;

    while (virtio_running(v)) {
        if (virtio_pop(v, n, c))
            return true;
        if (!virtq_listen(&v->queue[n]))
            return false;
    }
    return false;
}

/* False: the guest has no buffer just now. */
static bool say(struct vport *p, enum say what)
{
    struct virtio_console *con = p->con;
    u8 buf[sizeof(struct virtio_console_control) + 256];
    size_t len = compose(p, what, buf, sizeof(buf));

    if (!pop_or_listen(con, CONTROL_RX, &con->control))
        return false;
    if (con->control.in_len < len) {
        virtq_drop(&con->virtio.queue[CONTROL_RX], &con->control);
        virtio_break(&con->virtio, "a buffer for control messages is too small");
        return false;
    }
    virtq_write(&con->control, buf, len);
    virtq_push(&con->virtio.queue[CONTROL_RX], &con->control, (u32)len);
    p->say &= (u8)~what;
    return true;
}

static void control_to_guest(struct virtio_console *con)
{
    bool room = true;

    if (!virtio_running(&con->virtio) || !multiport(con))
        return;
    for (struct vport *p = con->port; p < con->port + con->ports && room; p++)
        while (p->say && room)
            room = say(p, p->say & -p->say);
    virtio_interrupt(&con->virtio, CONTROL_RX);
}

/* --- data from the guest --- */

static void give_back(struct vport *p)
{
    virtq_push(&p->con->virtio.queue[tx_queue(p)], &p->tx, 0);
    p->holding = false;
}

/* A driver's reset waits for its last data, unless the driver made no sense before. */
static bool draining(const struct virtio *v)
{
    return v->resetting && (v->status & VIRTIO_CONFIG_S_DRIVER_OK) && !(v->status & (VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED)) &&
           (!v->transport || v->transport_ops->may_dma(v->transport));
}

static bool next_chain(struct vport *p)
{
    struct virtio *v = &p->con->virtio;
    struct virtq *q = &v->queue[tx_queue(p)];

    if (draining(v))                                               /* a ring that breaks now is forgotten soon */
        return p->holding = virtq_pop(q, &p->tx) > 0;
    while (!p->holding && virtio_running(v)) {
        virtq_ignore(q);
        p->holding = virtio_pop(v, tx_queue(p), &p->tx);
        if (!p->holding && !virtq_listen(q))
            return false;
    }
    return p->holding;
}

/* Hands one piece to the host's side. False: stop here (stalled, or the device was reset meanwhile). */
static bool hand_over(struct vport *p, u64 *bytes)
{
    struct virtio_console *con = p->con;
    const void *data = p->tx.out->iov_base;
    size_t len = MIN(p->tx.out->iov_len, PIECE_MAX), taken;
    unsigned epoch = con->epoch;

    p->stalled = true;                                             /* vport_resume() in the callback clears it */
    unlock(con);
    taken = p->cfg.ops->guest_data(p->cfg.arg, data, len);
    lock(con);
    bug_on(taken > len);
    if (taken == len)
        p->stalled = false;
    else if (!p->stalled)
        post(con);                                                 /* resumed at once: but others come first */
    if (epoch != con->epoch)
        return false;
    virtq_skip_out(&p->tx, taken);
    *bytes += taken;
    return taken == len;
}

static void data_from_guest(struct vport *p)
{
    struct virtio_console *con = p->con;
    unsigned chains = 0, epoch = con->epoch;
    u64 bytes = 0;

    while (!p->stalled && (p->holding || next_chain(p))) {
        if (!p->host_open)
            virtq_skip_out(&p->tx, p->tx.out_len);
        if (!p->tx.outs) {
            give_back(p);
            chains++;
        } else if (!hand_over(p, &bytes)) {
            break;
        }
        if (bytes >= (con->virtio.resetting ? BYTES_AT_RESET : BYTES_PER_TURN) || chains >= CHAINS_PER_TURN) {
            post(con);
            break;
        }
    }
    if (epoch == con->epoch)
        virtio_interrupt(&con->virtio, tx_queue(p));
}

void vport_resume(struct vport *p)
{
    lock(p->con);
    if (p->stalled) {
        p->stalled = false;
        post(p->con);
    }
    unlock(p->con);
}

/* --- data to the guest --- */

static bool can_send(const struct vport *p)
{
    return p->guest_open && virtio_running(&p->con->virtio);
}

size_t vport_send(struct vport *p, const void *data, size_t len)
{
    struct virtq *q = &p->con->virtio.queue[rx_queue(p)];
    size_t done = 0;

    lock(p->con);
    if (can_send(p)) {
        virtq_ignore(q);
        while (done < len && pop_or_listen(p->con, rx_queue(p), &p->rx)) {
            size_t n = virtq_write(&p->rx, (const u8 *)data + done, len - done);

            virtq_push(q, &p->rx, (u32)n);
            done += n;
        }
        virtio_interrupt(&p->con->virtio, rx_queue(p));
    }
    p->want_room = done < len;
    unlock(p->con);
    return done;
}

static void tell_room(struct vport *p)
{
    struct virtio_console *con = p->con;

    if (!p->want_room || !can_send(p) || !virtq_listen(&con->virtio.queue[rx_queue(p)]))
        return;
    p->want_room = false;
    if (!p->cfg.ops || !p->cfg.ops->room)
        return;
    unlock(con);
    p->cfg.ops->room(p->cfg.arg);
    lock(con);
}

/* --- states of ports --- */

static void tell_open(struct vport *p)
{
    struct virtio_console *con = p->con;
    bool open = p->guest_open;

    if (p->told_open == open)
        return;
    p->told_open = open;
    if (!p->cfg.ops || !p->cfg.ops->guest_open)
        return;
    unlock(con);
    p->cfg.ops->guest_open(p->cfg.arg, open);
    lock(con);
}

bool vport_guest_open(const struct vport *p)
{
    bool open;

    lock(p->con);
    open = p->guest_open;
    unlock(p->con);
    return open;
}

void vport_set_open(struct vport *p, bool open)
{
    lock(p->con);
    if (p->host_open != open && p->cfg.ops) {
        p->host_open = open;
        p->stalled = false;
        if (p->ready)
            p->say |= SAY_OPEN;
        post(p->con);
    }
    unlock(p->con);
}

void vport_resize(struct vport *p, u16 cols, u16 rows)
{
    struct virtio_console *con = p->con;

    lock(con);
    p->cols = cols;
    p->rows = rows;
    if (p->n == 0) {
        con->config.cols = cols;
        con->config.rows = rows;
        if (virtio_has(&con->virtio, VIRTIO_CONSOLE_F_SIZE) && !multiport(con))
            virtio_config_changed(&con->virtio);
    }
    if (p->ready && p->cfg.console)
        p->say |= SAY_SIZE;
    post(con);
    unlock(con);
}

/* --- the loop's part --- */

/* All that the driver's generation of the device left: held chains, what ports were told. */
static void forget_ports(struct virtio_console *con)
{
    con->epoch++;
    for (struct vport *p = con->port; p < con->port + con->ports; p++) {
        if (p->holding)
            virtq_drop(&con->virtio.queue[tx_queue(p)], &p->tx);
        p->holding = p->ready = p->guest_open = false;
        p->say = 0;
    }
}

/* With the lock held, which is released around callbacks. */
static void service(struct virtio_console *con)
{
    bool resetting;

    if (con->serving)
        return;
    con->serving = true;
    if (multiport(con)) {
        control_from_guest(con);
        control_to_guest(con);
    }
    do {
        resetting = con->virtio.resetting;
        for (struct vport *p = con->port; p < con->port + con->ports; p++) {
            tell_open(p);
            data_from_guest(p);
            tell_room(p);
        }
    } while (con->virtio.resetting && !resetting);                 /* it came during a callback: the last data of all ports */
    con->serving = false;
    if (con->virtio.resetting) {
        forget_ports(con);
        virtio_stopped(&con->virtio);
        post(con);                                                 /* tell_open() */
    }
}

static void console_kick(struct virtio *v, unsigned n UNUSED)
{
    post(container_of(v, struct virtio_console, virtio));
}

static void console_start(struct virtio *v)
{
    struct virtio_console *con = container_of(v, struct virtio_console, virtio);

    if (!multiport(con)) {
        con->port[0].guest_open = true;
        post(con);
    }
}

static bool console_stop(struct virtio *v)
{
    struct virtio_console *con = container_of(v, struct virtio_console, virtio);

    if (v->legacy) {                                               /* it does not wait: data that nobody has taken yet is lost */
        forget_ports(con);
        post(con);
        return true;
    }
    if (!con->serving && !(v->status & VIRTIO_CONFIG_S_DRIVER_OK))
        return true;                                               /* it was never used */
    post(con);
    return false;
}

/* --- device --- */

static void console_reset(struct device *d)
{
    struct virtio_console *con = container_of(d, struct virtio_console, virtio.device);

    pthread_mutex_lock(&d->lock);
    forget_ports(con);
    virtio_device_reset(&con->virtio);
    post(con);
    pthread_mutex_unlock(&d->lock);
}

/* On the loop's thread: what the guest has sent is offered once more. What the host's side does not take stays in the ring. */
static void console_quiesce(struct device *d)
{
    struct virtio_console *con = container_of(d, struct virtio_console, virtio.device);

    pthread_mutex_lock(&d->lock);
    service(con);
    pthread_mutex_unlock(&d->lock);
}

static void port_state(struct vport *p, struct stream *s)
{
    u64 taken = p->holding ? p->tx.out_total - p->tx.out_len : 0;

    stream_u8(s, &p->say);
    stream_bool(s, &p->ready);
    stream_bool(s, &p->guest_open);
    stream_bool(s, &p->holding);
    stream_u64(s, &taken);
    if (p->holding && !s->error)
        virtq_chain_state(&p->con->virtio.queue[tx_queue(p)], &p->tx, s);
    if (s->error)
        p->holding = false;
    if (!s->load || !p->holding)
        return;
    if (taken <= p->tx.out_len)
        virtq_skip_out(&p->tx, taken);
    else
        stream_bad(s, "a console port holds a chain that makes no sense");
}

static void console_state(struct device *d, struct stream *s)
{
    struct virtio_console *con = container_of(d, struct virtio_console, virtio.device);

    if (!stream_section(s, "virtio_console", 2))
        return;
    if (s->load)
        forget_ports(con);
    virtio_state(&con->virtio, s);
    for (struct vport *p = con->port; p < con->port + con->ports; p++) {
        port_state(p, s);
        p->say &= (p->cfg.name ? 31 : 31 & ~SAY_NAME);
        if (s->load && p->ready)
            p->say |= SAY_OPEN | (p->cfg.console && p->cols ? SAY_SIZE : 0);   /* the host's side is another one now */
    }
    if (s->load)
        post(con);
}

static void console_free(struct device *d)
{
    struct virtio_console *con = container_of(d, struct virtio_console, virtio.device);

    loop_unpost(con->loop, run_service, con);
    virtio_destroy(&con->virtio);
    virtq_chain_free(&con->control);
    for (struct vport *p = con->port; p < con->port + con->ports; p++) {
        virtq_chain_free(&p->tx);
        virtq_chain_free(&p->rx);
    }
    free(con);
}

static const struct device_ops device_ops = {
    .name = "virtio_console", .reset = console_reset, .quiesce = console_quiesce, .state = console_state, .free = console_free
};
static const struct virtio_ops virtio_ops = { .start = console_start, .kick = console_kick, .stop = console_stop };

struct vport *virtio_console_port(struct virtio_console *c, unsigned n)
{
    bug_on(n >= c->ports);
    return &c->port[n];
}

int virtio_console_new(struct ram *ram, const struct log *log, struct loop *loop, const struct vport_config *port, unsigned ports,
                       struct virtio_console **out)
{
    u16 size[2 * VIRTIO_CONSOLE_PORTS_MAX + 2];
    struct virtio_console *con = calloc(1, sizeof(*con));
    int r = -ENOMEM;

    bug_on(!ports || ports > VIRTIO_CONSOLE_PORTS_MAX);
    for (unsigned n = 0; n < ARRAY_SIZE(size); n++)
        size[n] = n == CONTROL_RX || n == CONTROL_TX ? CONTROL_QUEUE_SIZE : DATA_QUEUE_SIZE;
    if (con)
        r = virtio_init(&con->virtio, &device_ops, &virtio_ops, VIRTIO_ID_CONSOLE, ram, log,
                        BIT(VIRTIO_CONSOLE_F_SIZE) | BIT(VIRTIO_CONSOLE_F_MULTIPORT), &con->config, sizeof(con->config), size, 2 * ports + 2);
    if (r < 0) {
        free(con);
        return err(r, "virtio_console: out of memory");
    }
    con->loop = loop;
    con->config.max_nr_ports = ports;
    con->ports = ports;
    for (unsigned n = 0; n < ports; n++)
        con->port[n] = (struct vport){ .con = con, .n = n, .cfg = port[n], .host_open = port[n].ops };
    *out = con;
    return 0;
}
