/* The console's multiplexer (console.h). */
#include "ctl/console.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "base/err.h"
#include "ctl/escape.h"
#include "ctl/line_edit.h"

#define HELD_MAX (256 * KiB)
#define TYPED_MAX 16384
#define TYPED_KEYS 64                                              /* so many are always looked at, for Ctrl-A */

static const char prompt[] = "(doppel) ";

struct queue {
    u8 *p;
    size_t head, len, cap;
};

struct console {
    struct chardev c;                                              /* to the guest */
    struct chardev *lower;
    struct loop *loop;
    const struct console_ops *ops;
    void *arg;
    bool terminal;
    struct escape escape;
    struct line_edit edit;
    u8 typed[TYPED_MAX];                                           /* for the guest, which has not taken it yet */
    size_t typed_head, typed_len;
    bool eof, eof_told;
    atomic_bool deliver_posted;

    pthread_mutex_t lock;                                          /* of the rest */
    bool prompting;
    struct queue mine, held;                                       /* the prompt's output; the guest's, behind it */
    bool guest_waits;                                              /* write() took less than all */
};

static struct console *console_of(struct chardev *c)
{
    return container_of(c, struct console, c);
}

static bool queue_add(struct queue *q, const u8 *buf, size_t len)
{
    if (!len)
        return true;
    if (q->head + q->len + len > q->cap && q->head) {
        memmove(q->p, q->p + q->head, q->len);
        q->head = 0;
    }
    if (q->len + len > q->cap) {
        size_t cap = MAX(2 * q->cap, q->len + len);
        u8 *p = realloc(q->p, cap);
        if (!p)
            return false;
        q->p = p;
        q->cap = cap;
    }
    memcpy(q->p + q->head + q->len, buf, len);
    q->len += len;
    return true;
}

/* Moves to the back end what it takes; true when all is gone. */
static bool queue_flush(struct queue *q, struct chardev *lower)
{
    size_t n = q->len ? chardev_write(lower, q->p + q->head, q->len) : 0;
    q->head += n;
    q->len -= n;
    if (!q->len)
        q->head = 0;
    return !q->len;
}

/* --- output --- */

static bool flush_locked(struct console *c)
{
    return queue_flush(&c->mine, c->lower) && !c->prompting && queue_flush(&c->held, c->lower);
}

static void flush(struct console *c)
{
    pthread_mutex_lock(&c->lock);
    bool wake = flush_locked(c) && c->guest_waits;
    if (wake)
        c->guest_waits = false;
    pthread_mutex_unlock(&c->lock);
    if (wake)
        chardev_front_writable(&c->c);
}

static size_t console_write(struct chardev *chardev, const u8 *buf, size_t len)
{
    struct console *c = console_of(chardev);
    size_t taken;
    pthread_mutex_lock(&c->lock);
    if (!c->prompting && !c->mine.len && !c->held.len) {
        taken = chardev_write(c->lower, buf, len);
    } else {
        taken = MIN(len, HELD_MAX - c->held.len);
        if (!queue_add(&c->held, buf, taken))
            taken = 0;
    }
    c->guest_waits |= taken < len;
    pthread_mutex_unlock(&c->lock);
    return taken;
}

/* Text of ours, with "\r\n" for a raw terminal. Without memory it is not shown. */
static void print(struct console *c, const char *text, size_t len)
{
    const u8 *p = (const u8 *)text, *end = p + len;
    pthread_mutex_lock(&c->lock);
    while (p < end) {
        const u8 *feed = memchr(p, '\n', (size_t)(end - p));
        const u8 *stop = feed ? feed : end;
        queue_add(&c->mine, p, (size_t)(stop - p));
        if (feed)
            queue_add(&c->mine, (const u8 *)"\r\n", 2);
        p = feed ? feed + 1 : end;
    }
    pthread_mutex_unlock(&c->lock);
    flush(c);
}

static void print_text(struct console *c, const char *text)
{
    print(c, text, strlen(text));
}

static void lower_writable(void *front)
{
    flush(front);
}

/* --- the prompt --- */

static void set_prompting(struct console *c, bool on)
{
    pthread_mutex_lock(&c->lock);
    c->prompting = on;
    pthread_mutex_unlock(&c->lock);
}

static void open_prompt(struct console *c)
{
    c->edit = (struct line_edit){.len = 0};
    set_prompting(c, true);
    print_text(c, "\nmonitor: \"help\" lists the commands; the guest's output waits until an empty line or Ctrl-A C\n");
    print_text(c, prompt);
}

void console_close_prompt(struct chardev *console)
{
    struct console *c = console_of(console);
    if (!c->prompting)
        return;
    print_text(c, "\n");
    set_prompting(c, false);
    flush(c);
}

/* Carries out a line; its output is gathered first, since it may be more than the back end takes at once. */
static void run_line(struct console *c)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    bool stay = false;
    if (!out) {
        print_text(c, "no memory\n");
    } else {
        stay = c->ops->line(c->arg, c->edit.text, out);
        fclose(out);
        print(c, text, len);
        free(text);
    }
    if (stay)
        print_text(c, prompt);
    else
        console_close_prompt(&c->c);
}

static void prompt_byte(struct console *c, u8 byte)
{
    char echo[LINE_EDIT_ECHO];
    unsigned n;
    enum line_event event = line_edit_byte(&c->edit, byte, echo, &n);
    if (c->terminal && n) {
        pthread_mutex_lock(&c->lock);
        queue_add(&c->mine, (const u8 *)echo, n);
        pthread_mutex_unlock(&c->lock);
        flush(c);
    }
    if (event == LINE_DONE && c->edit.len)
        run_line(c);
    else if (event != LINE_MORE)
        console_close_prompt(&c->c);
}

/* --- input --- */

/* Hands over what was typed ahead, as far as the guest takes it. */
static void deliver(struct console *c)
{
    while (c->typed_len) {
        size_t n = MIN(MIN(c->typed_len, TYPED_MAX - c->typed_head), chardev_front_room(&c->c));
        if (!n)
            return;
        chardev_front_receive(&c->c, c->typed + c->typed_head, n);
        c->typed_head = (c->typed_head + n) % TYPED_MAX;
        c->typed_len -= n;
    }
    if (c->eof && !c->eof_told) {
        c->eof_told = true;
        chardev_front_event(&c->c, CHARDEV_EOF);
    }
}

static void deliver_posted(void *arg)
{
    struct console *c = arg;
    atomic_store(&c->deliver_posted, false);
    deliver(c);
    chardev_rx_ready(c->lower);
}

static void console_rx_ready(struct chardev *chardev)
{
    struct console *c = console_of(chardev);
    if (!atomic_exchange(&c->deliver_posted, true))
        loop_post(c->loop, deliver_posted, c);
}

/* A terminal whose guest reads nothing for 16 KiB of typing gets a bell for each further key. */
static void type(struct console *c, u8 byte)
{
    if (c->typed_len < TYPED_MAX)
        c->typed[(c->typed_head + c->typed_len++) % TYPED_MAX] = byte;
    else
        print_text(c, "\a");
}

static void console_byte(struct console *c, u8 byte)
{
    u8 guest[2];
    unsigned n;
    switch (escape_byte(&c->escape, byte, guest, &n)) {
    case ESCAPE_NONE:
        break;
    case ESCAPE_QUIT:
        console_close_prompt(&c->c);
        c->ops->quit(c->arg);
        break;
    case ESCAPE_HELP:
        print_text(c, "\n");
        print_text(c, escape_help);
        print_text(c, c->prompting ? "\n(doppel) " : "\n");
        break;
    case ESCAPE_MONITOR:
        if (c->prompting)
            console_close_prompt(&c->c);
        else
            open_prompt(c);
        break;
    }
    for (unsigned i = 0; i < n; i++) {
        if (c->prompting)
            prompt_byte(c, guest[i]);
        else
            type(c, guest[i]);
    }
}

/* One place less than there is: a Ctrl-A that was held back comes on top. */
static size_t lower_can_receive(void *front)
{
    struct console *c = front;
    size_t room = TYPED_MAX - c->typed_len;
    room -= MIN(room, 1);
    return c->terminal ? MAX(room, TYPED_KEYS) : room;
}

static void lower_receive(void *front, const u8 *buf, size_t len)
{
    struct console *c = front;
    for (size_t i = 0; i < len; i++)
        console_byte(c, buf[i]);
    deliver(c);
}

static void lower_event(void *front, enum chardev_event what)
{
    struct console *c = front;
    if (what == CHARDEV_EOF) {
        console_close_prompt(&c->c);
        c->eof = true;
        deliver(c);
    } else {
        chardev_front_event(&c->c, what);
    }
}

static const struct chardev_front_ops lower_front_ops = {
    .can_receive = lower_can_receive, .receive = lower_receive, .writable = lower_writable, .event = lower_event,
};

static size_t console_pending(struct chardev *console)
{
    struct console *c = console_of(console);
    pthread_mutex_lock(&c->lock);
    size_t n = c->mine.len + c->held.len;
    pthread_mutex_unlock(&c->lock);
    return n + chardev_pending(c->lower);
}

static void lower_drained(void *arg)
{
    struct console *c = arg;
    chardev_tell_drained(&c->c);
}

static void console_free(struct chardev *chardev)
{
    struct console *c = console_of(chardev);
    c->lower->front_ops = NULL;
    c->lower->drained = NULL;
    pthread_mutex_destroy(&c->lock);
    free(c->mine.p);
    free(c->held.p);
    free(c);
}

static const struct chardev_ops console_chardev_ops = {
    .write = console_write, .rx_ready = console_rx_ready, .pending = console_pending, .free = console_free,
};

int console_new(struct loop *loop, struct chardev *lower, bool terminal, const struct console_ops *ops, void *arg,
                struct chardev **out)
{
    struct console *c = calloc(1, sizeof(*c));
    if (!c)
        return err(-ENOMEM, "console: no memory");
    c->c = (struct chardev){.ops = &console_chardev_ops, .opened = true, .cols = lower->cols, .rows = lower->rows};
    c->lower = lower;
    c->loop = loop;
    c->terminal = terminal;
    c->ops = ops;
    c->arg = arg;
    pthread_mutex_init(&c->lock, NULL);
    chardev_connect(lower, &lower_front_ops, c);
    chardev_on_drained(lower, lower_drained, c);
    *out = &c->c;
    return 0;
}
