/*
 * A character device: the host end of a serial line or of a console port (terminal, file, socket, pipe pair).
 *
 * The front end (a UART, a virtio console port) writes into it and is called back with input. Three promises:
 *
 *  - write() never blocks, so a slow host side never holds a vCPU. It takes what there is room for, perhaps nothing.
 *    The back end keeps a bounded buffer and empties it on the loop's thread.
 *  - Nothing is lost in silence: what write() did not take is still the front end's, which holds the guest up by its
 *    own means (a UART withholds THRE, a virtio port keeps the descriptor) until `writable` is called. Only when nobody
 *    can ever read it (CHARDEV_BROKEN) does write() take all and drop it.
 *  - Input has back-pressure: the back end asks can_receive() first and hands over at most that much; what the front
 *    end cannot take stays in the host's pipe or socket until chardev_rx_ready().
 *
 * Threads and locks: chardev_write(), chardev_rx_ready(), chardev_end_output() and chardev_pending() from any thread,
 * also with the front end's device lock held. Callbacks into the front end come on the loop's thread with no lock held
 * (the front end takes its own). A back end's lock comes after the device's.
 */
#pragma once

#include "base/types.h"

struct chardev;

enum chardev_event {
    /* a peer is there (again): both directions work. A back end that is open from the start does not say so. */
    CHARDEV_OPENED,
    CHARDEV_EOF,      /* the peer has ended its output: no input follows until CHARDEV_OPENED */
    CHARDEV_BROKEN,   /* the peer has gone or reads no more: output is dropped until CHARDEV_OPENED */
    CHARDEV_RESIZED,  /* chardev.cols and rows have new values */
};

/* What a front end offers. Any of them may be NULL; without can_receive nothing is received. */
struct chardev_front_ops {
    size_t (*can_receive)(void *front);                            /* how many bytes receive() would take now */
    void (*receive)(void *front, const u8 *buf, size_t len);       /* len <= what can_receive() just said */
    void (*writable)(void *front);                                 /* there is room again after a short write() */
    void (*event)(void *front, enum chardev_event what);
};

struct chardev_ops {
    size_t (*write)(struct chardev *c, const u8 *buf, size_t len); /* returns how much was taken, 0..len */
    void (*rx_ready)(struct chardev *c);                           /* can_receive() may have grown: go on reading */
    /* the guest has closed its side: pass the end on once all is written; may be NULL */
    void (*end_output)(struct chardev *c);
    /* bytes taken that are still on their way to the host; may be NULL: none */
    size_t (*pending)(struct chardev *c);
    void (*free)(struct chardev *c);
};

/* A back end's struct begins with this. */
struct chardev {
    const struct chardev_ops *ops;
    const struct chardev_front_ops *front_ops;                     /* NULL until chardev_connect() */
    void *front;
    bool opened;                                                   /* a peer is there; set by the back end */
    u16 cols, rows;                                                /* window of the terminal, 0 when unknown */
    /* pending() may have come to 0: for whoever ends the run; loop's thread; may be NULL */
    void (*drained)(void *arg);
    void *drained_arg;
};

/*
 * Joins the front end to its back end, once, before the loop runs. c may be NULL: then output vanishes and there is no
 * input.
 */
static inline void chardev_connect(struct chardev *c, const struct chardev_front_ops *ops, void *front)
{
    if (!c)
        return;
    c->front_ops = ops;
    c->front = front;
}

static inline size_t chardev_write(struct chardev *c, const u8 *buf, size_t len)
{
    return c ? c->ops->write(c, buf, len) : len;
}

static inline void chardev_rx_ready(struct chardev *c)
{
    if (c)
        c->ops->rx_ready(c);
}

static inline void chardev_end_output(struct chardev *c)
{
    if (c && c->ops->end_output)
        c->ops->end_output(c);
}

static inline size_t chardev_pending(struct chardev *c)
{
    return c && c->ops->pending ? c->ops->pending(c) : 0;
}

static inline void chardev_on_drained(struct chardev *c, void (*drained)(void *arg), void *arg)
{
    if (!c)
        return;
    c->drained = drained;
    c->drained_arg = arg;
}

/* For back ends: calls into the front end, harmless while there is none. On the loop's thread, with no lock held. */
static inline size_t chardev_front_room(struct chardev *c)
{
    return c->front_ops && c->front_ops->can_receive ? c->front_ops->can_receive(c->front) : 0;
}
static inline void chardev_front_receive(struct chardev *c, const u8 *buf, size_t len)
{
    if (len && c->front_ops && c->front_ops->receive)
        c->front_ops->receive(c->front, buf, len);
}
static inline void chardev_front_writable(struct chardev *c)
{
    if (c->front_ops && c->front_ops->writable)
        c->front_ops->writable(c->front);
}
static inline void chardev_front_event(struct chardev *c, enum chardev_event what)
{
    if (c->front_ops && c->front_ops->event)
        c->front_ops->event(c->front, what);
}
static inline void chardev_tell_drained(struct chardev *c)
{
    if (c->drained)
        c->drained(c->drained_arg);
}
