/*
 * National PC16550D UART (data sheet; section numbers are its own), with the character back end of back/chardev.h as its line.
 *
 * Time on the line is not modelled: what is transmitted goes to the back end at once, so the transmitter is empty again before the guest looks, and input
 * arrives as fast as the FIFO has room. When the back end takes nothing, bytes stay in the FIFO and THRE stays low until it does: the guest's driver
 * waits as for a slow line, no vCPU does, and nothing is lost that the guest sent by the rules. The receiver's time-out does run, by the programmed baud rate.
 *
 * The peer honours hardware flow control: it sends only while RTS is on. So what was typed (or piped in) before the guest's driver opened the line is still
 * there when it does, and is not cleared away with the FIFO that every driver resets then.
 *
 * The interrupt output is gated by OUT2, as PC boards wire it. Carrier (DCD) and DSR follow the back end's peer; CTS is always there.
 * Left out: the effect of word length, parity and stop bits on data; DMA mode; baud rates on the line.
 *
 * Locking: device.lock; back-end calls and the interrupt controllers' locks are taken under it. Back-end callbacks take it themselves.
 */
#include "dev/ns16550.h"

#include <errno.h>
#include <string.h>

#include "base/err.h"

#define FIFO 16

enum { RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR };

#define IER_RDA 0x01
#define IER_THRE 0x02
#define IER_LINE 0x04
#define IER_MODEM 0x08

/* table IV: identification, by priority */
#define IIR_NONE 0x01
#define IIR_LINE 0x06
#define IIR_RDA 0x04
#define IIR_TIMEOUT 0x0c
#define IIR_THRE 0x02
#define IIR_MODEM 0x00
#define IIR_FIFO 0xc0

#define FCR_ENABLE 0x01
#define FCR_CLEAR_RX 0x02
#define FCR_CLEAR_TX 0x04
#define FCR_KEPT 0xc9

#define LCR_BREAK 0x40
#define LCR_DLAB 0x80

#define MCR_RTS  0x02
#define MCR_OUT2 0x08
#define MCR_LOOP 0x10

#define LSR_DR 0x01
#define LSR_OE 0x02
#define LSR_ERRORS 0x1e
#define LSR_BI 0x10
#define LSR_THRE 0x20
#define LSR_TEMT 0x40
#define LSR_FIFO_ERROR 0x80

#define MSR_CTS 0x10
#define MSR_DSR 0x20
#define MSR_RI 0x40
#define MSR_DCD 0x80

struct fifo {
    u8 byte[FIFO];
    u8 error[FIFO];                                                /* receiver: LSR_BI and the like that came with the byte */
    u8 head, n;
};

struct ns16550 {
    struct device device;
    struct clock *clock;
    struct irq_line irq;
    struct chardev *back;
    struct timer timeout;                                          /* of the receiver's FIFO */
    u64 timeout_ns;                                                /* when it is due; UINT64_MAX: not armed */

    u8 ier, fcr, lcr, mcr, msr, scr;
    u16 divisor;
    struct fifo rx, tx;
    bool overrun;                                                  /* LSR.OE */
    bool thre_pending;                                             /* the transmitter-empty interrupt: gone when IIR has named it */
    bool timed_out;
};

/* ---- FIFOs ---- */

static unsigned fifo_size(const struct ns16550 *u)
{
    return u->fcr & FCR_ENABLE ? FIFO : 1;
}

static void fifo_push(struct fifo *f, u8 byte, u8 error)
{
    unsigned at = (f->head + f->n) % FIFO;

    f->byte[at] = byte;
    f->error[at] = error;
    f->n++;
}

static u8 fifo_pop(struct fifo *f)
{
    u8 byte = f->byte[f->head];

    f->head = (f->head + 1) % FIFO;
    f->n--;
    return byte;
}

static unsigned rx_trigger(const struct ns16550 *u)
{
    static const u8 level[4] = { 1, 4, 8, 14 };

    return u->fcr & FCR_ENABLE ? level[u->fcr >> 6] : 1;
}

/* ---- interrupts ---- */

static u8 line_status(const struct ns16550 *u)
{
    u8 v = (u8)((u->rx.n ? LSR_DR | u->rx.error[u->rx.head] : 0) | (u->overrun ? LSR_OE : 0) | (u->tx.n ? 0 : LSR_THRE | LSR_TEMT));

    for (unsigned i = 0; (u->fcr & FCR_ENABLE) && i < u->rx.n; i++)
        if (u->rx.error[(u->rx.head + i) % FIFO])
            v |= LSR_FIFO_ERROR;
    return v;
}

static u8 identify(const struct ns16550 *u)
{
    if ((u->ier & IER_LINE) && (line_status(u) & LSR_ERRORS))
        return IIR_LINE;
    if ((u->ier & IER_RDA) && u->rx.n >= rx_trigger(u))
        return IIR_RDA;
    if ((u->ier & IER_RDA) && u->rx.n && u->timed_out)
        return IIR_TIMEOUT;
    if ((u->ier & IER_THRE) && u->thre_pending)
        return IIR_THRE;
    if ((u->ier & IER_MODEM) && (u->msr & 0x0f))
        return IIR_MODEM;
    return IIR_NONE;
}

static void update_irq(struct ns16550 *u)
{
    irq_set(&u->irq, identify(u) != IIR_NONE && (u->mcr & MCR_OUT2));
}

/* ---- receiver ---- */

/* Four characters' time without a byte moving either way makes the time-out interrupt, if there are bytes below the trigger level. */
static void restart_timeout(struct ns16550 *u)
{
    u64 bits = 1 + 5 + (u->lcr & 3) + (u->lcr & 4 ? 2 : 1) + (u->lcr & 8 ? 1 : 0), divisor = u->divisor ? u->divisor : 1;

    u->timed_out = false;
    u->timeout_ns = UINT64_MAX;
    if ((u->fcr & FCR_ENABLE) && u->rx.n && u->rx.n < rx_trigger(u)) {
        u->timeout_ns = clock_ns(u->clock) + 4 * bits * divisor * 16 * 1000000000 / 1843200;
        timer_arm(&u->timeout, u->timeout_ns);
    } else {
        timer_disarm(&u->timeout);
    }
}

static void timeout_fired(void *arg)
{
    struct ns16550 *u = arg;

    pthread_mutex_lock(&u->device.lock);
    if (clock_ns(u->clock) >= u->timeout_ns) { /* else it was armed again or disarmed while this call was on its way */
        u->timed_out = true;
        u->timeout_ns = UINT64_MAX;
        update_irq(u);
    }
    pthread_mutex_unlock(&u->device.lock);
}

static void rx_push(struct ns16550 *u, u8 byte, u8 error)
{
    if (u->rx.n < fifo_size(u)) {
        fifo_push(&u->rx, byte, error);
    } else { /* 8.3: without FIFO the old byte is overwritten, with FIFO the new one is lost */
        u->overrun = true;
        if (!(u->fcr & FCR_ENABLE)) {
            u->rx.n = 0;
            fifo_push(&u->rx, byte, error);
        }
    }
    restart_timeout(u);
}

static void rx_clear(struct ns16550 *u)
{
    u->rx.n = 0;
    restart_timeout(u);
    chardev_rx_ready(u->back);
}

static u8 rx_pop(struct ns16550 *u)
{
    u8 byte = u->rx.byte[u->rx.head]; /* empty: the last one again */

    if (!u->rx.n)
        return byte;
    fifo_pop(&u->rx);
    restart_timeout(u);
    if (!u->rx.n)
        chardev_rx_ready(u->back);
    return byte;
}

static size_t can_receive(void *front)
{
    struct ns16550 *u = front;
    size_t room;

    pthread_mutex_lock(&u->device.lock);
    room = u->mcr & MCR_LOOP || !(u->mcr & MCR_RTS) ? 0 : fifo_size(u) - u->rx.n;
    pthread_mutex_unlock(&u->device.lock);
    return room;
}

static void receive(void *front, const u8 *buf, size_t len)
{
    struct ns16550 *u = front;

    pthread_mutex_lock(&u->device.lock);
    for (size_t i = 0; i < len; i++) /* the guest may have made the FIFO smaller in between: an overrun, as on the line */
        rx_push(u, buf[i], 0);
    update_irq(u);
    pthread_mutex_unlock(&u->device.lock);
}

/* ---- transmitter ---- */

/* Sends what the back end takes. The FIFO running empty is what THRE and its interrupt stand for. */
static void drain(struct ns16550 *u)
{
    while (u->tx.n) {
        if (chardev_write(u->back, &u->tx.byte[u->tx.head], 1) == 0)
            return;
        fifo_pop(&u->tx);
    }
    u->thre_pending = true;
}

static void transmit(struct ns16550 *u, u8 byte)
{
    u->thre_pending = false;
    if (u->mcr & MCR_LOOP) {
        rx_push(u, byte, 0);
        u->thre_pending = true;
        return;
    }
    if (u->tx.n < fifo_size(u))
        fifo_push(&u->tx, byte, 0);
    else if (!(u->fcr & FCR_ENABLE))
        u->tx.byte[u->tx.head] = byte; /* written without waiting for THRE: the holding register is overwritten; a full FIFO drops it */
    drain(u);
}

static void writable(void *front)
{
    struct ns16550 *u = front;

    pthread_mutex_lock(&u->device.lock);
    if (u->tx.n)
        drain(u);
    update_irq(u);
    pthread_mutex_unlock(&u->device.lock);
}

/* ---- modem lines, 8.7 and 8.8 ---- */

static void set_modem(struct ns16550 *u)
{
    u8 lines, old = u->msr & 0xf0, changed;

    if (u->mcr & MCR_LOOP) /* DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD */
        lines = (u8)((u->mcr & 1) << 5 | (u->mcr & 2) << 3 | (u->mcr & 4) << 4 | (u->mcr & 8) << 4);
    else
        lines = u->back ? MSR_CTS | (u->back->opened ? MSR_DSR | MSR_DCD : 0) : 0;
    changed = lines ^ old;
    if (lines & MSR_RI)
        changed &= ~MSR_RI; /* TERI: only the trailing edge counts */
    u->msr = (u8)(lines | (u->msr & 0x0f) | changed >> 4);
}

static void back_event(void *front, enum chardev_event what)
{
    struct ns16550 *u = front;

    if (what != CHARDEV_OPENED && what != CHARDEV_BROKEN)
        return; /* a serial line has no end of file and no window */
    pthread_mutex_lock(&u->device.lock);
    set_modem(u);
    if (u->tx.n)
        drain(u);
    update_irq(u);
    pthread_mutex_unlock(&u->device.lock);
}

static const struct chardev_front_ops front_ops = {
    .can_receive = can_receive,
    .receive = receive,
    .writable = writable,
    .event = back_event,
};

/* ---- registers ---- */

static void fcr_write(struct ns16550 *u, u8 val)
{
    bool toggled = (val ^ u->fcr) & FCR_ENABLE;

    if (!(val & FCR_ENABLE)) /* 8.5: the other bits are programmed only together with bit 0 */
        val = 0;
    u->fcr = val & FCR_KEPT;
    if (toggled || (val & FCR_CLEAR_TX)) {
        if (u->tx.n)
            u->thre_pending = true;
        u->tx.n = 0;
    }
    if (toggled || (val & FCR_CLEAR_RX))
        rx_clear(u);
    else
        restart_timeout(u);
}

static u8 iir_read(struct ns16550 *u)
{
    u8 id = identify(u);

    if (id == IIR_THRE)
        u->thre_pending = false;
    return id | (u->fcr & FCR_ENABLE ? IIR_FIFO : 0);
}

static u8 lsr_read(struct ns16550 *u)
{
    u8 v = line_status(u);

    u->overrun = false; /* the read clears the error bits that it shows */
    u->rx.error[u->rx.head] = 0;
    return v;
}

static void mcr_write(struct ns16550 *u, u8 val)
{
    bool was_loop = u->mcr & MCR_LOOP, was_rts = u->mcr & MCR_RTS;

    u->mcr = val & 0x1f;
    set_modem(u);
    if (!(val & MCR_LOOP) && (val & MCR_RTS) && (was_loop || !was_rts))
        chardev_rx_ready(u->back);
}

static void lcr_write(struct ns16550 *u, u8 val)
{
    bool break_begins = (val & LCR_BREAK) && !(u->lcr & LCR_BREAK);

    u->lcr = val;
    if (break_begins && (u->mcr & MCR_LOOP))
        rx_push(u, 0, LSR_BI);
}

static u64 uart_read(void *dev, u64 off, unsigned size UNUSED)
{
    struct ns16550 *u = dev;
    bool dlab = u->lcr & LCR_DLAB;
    u8 val = 0xff;

    switch (off) {
    case RBR_THR: val = dlab ? (u8)u->divisor : rx_pop(u); break;
    case IER: val = dlab ? (u8)(u->divisor >> 8) : u->ier; break;
    case IIR_FCR: val = iir_read(u); break;
    case LCR: val = u->lcr; break;
    case MCR: val = u->mcr; break;
    case LSR: val = lsr_read(u); break;
    case MSR:
        val = u->msr;
        u->msr &= 0xf0;
        break;
    case SCR: val = u->scr; break;
    }
    update_irq(u);
    return val;
}

static void uart_write(void *dev, u64 off, u64 val64, unsigned size UNUSED)
{
    struct ns16550 *u = dev;
    bool dlab = u->lcr & LCR_DLAB;
    u8 val = (u8)val64, risen;

    switch (off) {
    case RBR_THR:
        if (dlab)
            u->divisor = (u16)((u->divisor & 0xff00) | val);
        else
            transmit(u, val);
        break;
    case IER:
        if (dlab) {
            u->divisor = (u16)((u->divisor & 0xff) | val << 8);
            break;
        }
        risen = val & ~u->ier;
        u->ier = val & 0x0f;
        if ((risen & IER_THRE) && !u->tx.n)
            u->thre_pending = true; /* enabling it with an empty transmitter interrupts at once */
        break;
    case IIR_FCR: fcr_write(u, val); break;
    case LCR: lcr_write(u, val); break;
    case MCR: mcr_write(u, val); break;
    case SCR: u->scr = val; break;
    }
    update_irq(u);
}

/* ---- device ---- */

/* Table III: the divisor latch and the scratch register survive a reset; the peer's lines are what they are, with no delta. */
static void ns16550_reset(struct device *d)
{
    struct ns16550 *u = (struct ns16550 *)d;

    pthread_mutex_lock(&d->lock);
    u->ier = u->fcr = u->lcr = u->mcr = 0;
    u->tx = u->rx = (struct fifo){ 0 };
    u->overrun = u->thre_pending = false;
    rx_clear(u);
    set_modem(u);
    u->msr &= 0xf0;
    update_irq(u);
    pthread_mutex_unlock(&d->lock);
}

static void fifo_state(struct fifo *f, struct stream *s)
{
    stream_bytes(s, f->byte, sizeof(f->byte));
    stream_bytes(s, f->error, sizeof(f->error));
    stream_u8(s, &f->head);
    stream_u8(s, &f->n);
    if (s->load && (f->head >= FIFO || f->n > FIFO)) {
        stream_bad(s, "ns16550: impossible FIFO");
        *f = (struct fifo){ 0 };
    }
}

static void ns16550_state(struct device *d, struct stream *s)
{
    struct ns16550 *u = (struct ns16550 *)d;

    stream_section(s, "ns16550", 1);
    stream_u8(s, &u->ier);
    stream_u8(s, &u->fcr);
    stream_u8(s, &u->lcr);
    stream_u8(s, &u->mcr);
    stream_u8(s, &u->msr);
    stream_u8(s, &u->scr);
    stream_u16(s, &u->divisor);
    fifo_state(&u->rx, s);
    fifo_state(&u->tx, s);
    stream_bool(s, &u->overrun);
    stream_bool(s, &u->thre_pending);
    stream_bool(s, &u->timed_out);
    if (!s->load)
        return;
    u->fcr &= FCR_KEPT;
    u->rx.n = (u8)MIN(u->rx.n, fifo_size(u));
    u->tx.n = (u8)MIN(u->tx.n, fifo_size(u));
    if (!u->timed_out)
        restart_timeout(u);
    set_modem(u); /* the peer may be another one */
    if (u->tx.n)
        drain(u);
    chardev_rx_ready(u->back);
}

static void ns16550_free(struct device *d)
{
    struct ns16550 *u = (struct ns16550 *)d;

    timer_disarm(&u->timeout);
    chardev_connect(u->back, NULL, NULL);
    pthread_mutex_destroy(&d->lock);
    free(u);
}

static const struct device_ops ns16550_ops = {
    .name = "ns16550",
    .reset = ns16550_reset,
    .state = ns16550_state,
    .free = ns16550_free,
};

int ns16550_new(struct bus *pio, u16 base, const char *name, struct clock *clock, struct irq_line irq, struct chardev *back, struct ns16550 **out)
{
    struct ns16550 *u = calloc(1, sizeof(*u));
    int r;

    if (!u)
        return err(-ENOMEM, "ns16550: out of memory");
    device_init(&u->device, &ns16550_ops);
    u->clock = clock;
    u->irq = irq;
    u->back = back;
    u->timeout_ns = UINT64_MAX;
    u->divisor = 1; /* undefined after power-up; any but 0 will do */
    timer_init(&u->timeout, clock, timeout_fired, u);

    struct region region = {
        .base = base, .size = 8, .min = 1, .max = 1, .read = uart_read, .write = uart_write, .dev = u, .lock = &u->device.lock, .name = name,
    };
    r = bus_add(pio, &region);
    if (r < 0) {
        ns16550_free(&u->device);
        return r;
    }
    set_modem(u);
    u->msr &= 0xf0;
    chardev_connect(back, &front_ops, u);
    *out = u;
    return 0;
}
