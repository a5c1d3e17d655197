/*
 * Intel 8042 keyboard and PS/2 mouse controller (IBM PS/2 technical reference, "Keyboard and auxiliary device controller"), with a keyboard and a mouse
 * that nobody touches: they answer commands, and never send anything by themselves.
 *
 * Bytes for the guest wait in one queue and reach the output buffer one at a time; each raises its interrupt if the command byte allows it. Answers are
 * instant, so drivers find everything without time-outs. Pulsing output bit 0 (0xf0..0xff), or clearing it (0xd1), resets the machine.
 * A20 is always open on this board: output bit 1 can be written and read, and masks nothing.
 *
 * Locking: device.lock; the interrupt controllers' locks and the hook are taken under it.
 */
#include "dev/i8042.h"

#include <errno.h>
#include <string.h>

#include "base/err.h"

#define QUEUE 32

/* status, port 0x64 */
#define STS_OBF 0x01
#define STS_SYSTEM 0x04
#define STS_COMMAND 0x08               /* the last write went to 0x64 */
#define STS_UNLOCKED 0x10
#define STS_AUX 0x20                   /* the byte in the output buffer is the mouse's */

/* command byte, RAM address 0 */
#define CB_KBD_IRQ 0x01
#define CB_AUX_IRQ 0x02
#define CB_SYSTEM 0x04
#define CB_KBD_OFF 0x10
#define CB_AUX_OFF 0x20
#define CB_TRANSLATE 0x40

#define OUT_NO_RESET 0x01
#define OUT_A20 0x02

#define PS2_ACK 0xfa
#define PS2_RESEND 0xfe
#define PS2_TEST_PASSED 0xaa

enum { MOUSE_RATE_DEFAULT = 100, MOUSE_RESOLUTION_DEFAULT = 2 };

struct i8042 {
    struct device device;
    struct irq_line irq[2];                                        /* keyboard, mouse */
    struct machine_hook hook;

    u8 ram[32];                                                    /* the controller's; [0] is the command byte */
    u8 output_port;
    u8 command;                                                    /* of port 0x64 whose parameter is awaited; 0: none */
    bool last_was_command;

    u8 out, out_aux;                                               /* output buffer; aux is 0 or 1 */
    bool full;
    u8 queue[QUEUE], queue_aux[QUEUE];
    u8 head, n;

    u8 kbd_command, aux_command;                                   /* of the devices, whose parameter is awaited */
    u8 scan_set, mouse_status, mouse_resolution, mouse_rate;
    bool mouse_wrap;
};

/* ---- output buffer ---- */

static void update(struct i8042 *k)
{
    if (!k->full && k->n) {
        k->out = k->queue[k->head];
        k->out_aux = k->queue_aux[k->head];
        k->head = (k->head + 1) % QUEUE;
        k->n--;
        k->full = true;
    }
    irq_set(&k->irq[0], k->full && !k->out_aux && (k->ram[0] & CB_KBD_IRQ));
    irq_set(&k->irq[1], k->full && k->out_aux && (k->ram[0] & CB_AUX_IRQ));
}

/* A full queue drops what comes, as a keyboard does; it takes a guest that sends commands and reads no answers. */
static void put(struct i8042 *k, u8 byte, u8 aux)
{
    if (k->n == QUEUE)
        return;
    k->queue[(k->head + k->n) % QUEUE] = byte;
    k->queue_aux[(k->head + k->n) % QUEUE] = aux;
    k->n++;
}

/* The controller's translation from scan code set 2 to 1, as far as this keyboard's bytes are changed by it: in the second byte of its ID. */
static void put_keyboard(struct i8042 *k, u8 byte)
{
    put(k, (k->ram[0] & CB_TRANSLATE) && byte == 0x83 ? 0x41 : byte, 0);
}

/* ---- the keyboard ---- */

static void keyboard_parameter(struct i8042 *k, u8 command, u8 val)
{
    put_keyboard(k, PS2_ACK);
    if (command != 0xf0) /* 0xed: LEDs, 0xf3: typematic rate */
        return;
    if (val == 0)
        put_keyboard(k, k->scan_set);
    else if (val <= 3)
        k->scan_set = val;
}

static void keyboard_write(struct i8042 *k, u8 val)
{
    u8 command = k->kbd_command;

    k->kbd_command = 0;
    if (command && val < 0xed) {
        keyboard_parameter(k, command, val);
        return;
    }
    switch (val) {
    case 0xed:
    case 0xf0:
    case 0xf3:
        k->kbd_command = val;
        put_keyboard(k, PS2_ACK);
        break;
    case 0xee: /* echo */
        put_keyboard(k, 0xee);
        break;
    case 0xf2: /* identify: MF2 keyboard */
        put_keyboard(k, PS2_ACK);
        put_keyboard(k, 0xab);
        put_keyboard(k, 0x83);
        break;
    case 0xf4: /* enable, disable, defaults, key types: there are no keys */
    case 0xf5 ... 0xfd:
        put_keyboard(k, PS2_ACK);
        if (val == 0xf6)
            k->scan_set = 2;
        break;
    case 0xff: /* reset and self test */
        k->scan_set = 2;
        put_keyboard(k, PS2_ACK);
        put_keyboard(k, PS2_TEST_PASSED);
        break;
    default:
        put_keyboard(k, PS2_RESEND);
        break;
    }
}

/* ---- the mouse ---- */

static void mouse_defaults(struct i8042 *k)
{
    k->mouse_status = 0; /* stream mode, disabled, scaling 1:1 */
    k->mouse_resolution = MOUSE_RESOLUTION_DEFAULT;
    k->mouse_rate = MOUSE_RATE_DEFAULT;
}

static void mouse_command(struct i8042 *k, u8 val)
{
    static const u8 reports[] = { 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xeb, 0xec, 0xee, 0xf0, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xff };

    if (!memchr(reports, val, sizeof(reports))) {
        put(k, PS2_RESEND, 1);
        return;
    }
    put(k, PS2_ACK, 1);
    switch (val) {
    case 0xe6: k->mouse_status &= ~0x10; break;                    /* scaling 1:1 */
    case 0xe7: k->mouse_status |= 0x10; break;                     /* scaling 2:1 */
    case 0xe8:                                                     /* resolution */
    case 0xf3: k->aux_command = val; break;                        /* sample rate */
    case 0xe9:                                                     /* status request */
        put(k, k->mouse_status, 1);
        put(k, k->mouse_resolution, 1);
        put(k, k->mouse_rate, 1);
        break;
    case 0xea: k->mouse_status &= ~0x40; break;                    /* stream mode */
    case 0xeb:                                                     /* read data: nothing moved */
        put(k, 0x08, 1);
        put(k, 0, 1);
        put(k, 0, 1);
        break;
    case 0xec: k->mouse_wrap = false; break;
    case 0xee: k->mouse_wrap = true; break;
    case 0xf0: k->mouse_status |= 0x40; break;                     /* remote mode */
    case 0xf2: put(k, 0, 1); break;                                /* identify: standard PS/2 mouse */
    case 0xf4: k->mouse_status |= 0x20; break;                     /* enable */
    case 0xf5: k->mouse_status &= ~0x20; break;                    /* disable */
    case 0xf6: mouse_defaults(k); break;
    case 0xff:                                                     /* reset: self test passed, ID */
        mouse_defaults(k);
        put(k, PS2_TEST_PASSED, 1);
        put(k, 0, 1);
        break;
    }
}

static void mouse_write(struct i8042 *k, u8 val)
{
    u8 command = k->aux_command;

    k->aux_command = 0;
    if (command) {
        *(command == 0xe8 ? &k->mouse_resolution : &k->mouse_rate) = val;
        put(k, PS2_ACK, 1);
    } else if (k->mouse_wrap && val != 0xec && val != 0xff) {
        put(k, val, 1); /* wrap mode echoes */
    } else {
        if (val == 0xff)
            k->mouse_wrap = false;
        mouse_command(k, val);
    }
}

/* ---- the controller ---- */

static void set_output_port(struct i8042 *k, u8 val)
{
    k->output_port = val;
    if (!(val & OUT_NO_RESET))
        machine_tell(&k->hook, MACHINE_RESET);
}

static void controller_parameter(struct i8042 *k, u8 command, u8 val)
{
    switch (command) {
    case 0x60 ... 0x7f: k->ram[command & 31] = val; break;
    case 0xd1: set_output_port(k, val); break;
    case 0xd2: put(k, val, 0); break;                              /* as if the keyboard had sent it */
    case 0xd3: put(k, val, 1); break;                              /* as if the mouse had: drivers test the wiring with it */
    case 0xd4: mouse_write(k, val); break;
    }
}

static void controller_command(struct i8042 *k, u8 val)
{
    k->command = 0;
    switch (val) {
    case 0x20 ... 0x3f: put(k, k->ram[val & 31], 0); break;
    case 0x60 ... 0x7f:
    case 0xd1 ... 0xd4: k->command = val; break;                   /* a parameter follows */
    case 0xa4: put(k, 0xf1, 0); break;                             /* no password is installed */
    case 0xa7: k->ram[0] |= CB_AUX_OFF; break;
    case 0xa8: k->ram[0] &= ~CB_AUX_OFF; break;
    case 0xa9:                                                     /* interface tests: no error */
    case 0xab: put(k, 0x00, 0); break;
    case 0xaa:                                                     /* self test passed */
        k->ram[0] |= CB_SYSTEM;
        put(k, 0x55, 0);
        break;
    case 0xad: k->ram[0] |= CB_KBD_OFF; break;
    case 0xae: k->ram[0] &= ~CB_KBD_OFF; break;
    case 0xc0: put(k, 0x80, 0); break;                             /* input port: keyboard not locked */
    case 0xd0: put(k, k->output_port, 0); break;
    case 0xe0: put(k, 0x00, 0); break;                             /* test inputs: both clocks low */
    case 0xf0 ... 0xff:                                            /* pulse the output bits that are 0 here */
        if (!(val & OUT_NO_RESET))
            machine_tell(&k->hook, MACHINE_RESET);
        break;
    }
}

static u64 data_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    struct i8042 *k = dev;
    u8 val = k->out; /* with an empty buffer the last byte again */

    if (k->full) {
        k->full = false;
        irq_set(&k->irq[0], 0); /* so that the next byte makes an edge of its own */
        irq_set(&k->irq[1], 0);
    }
    update(k);
    return val;
}

static void data_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct i8042 *k = dev;
    u8 command = k->command;

    k->last_was_command = false;
    k->command = 0;
    if (command)
        controller_parameter(k, command, (u8)val);
    else
        keyboard_write(k, (u8)val);
    update(k);
}

static u64 status_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    struct i8042 *k = dev;

    return (u64)(STS_UNLOCKED | (k->full ? STS_OBF | (k->out_aux ? STS_AUX : 0) : 0) | (k->ram[0] & CB_SYSTEM ? STS_SYSTEM : 0) |
                 (k->last_was_command ? STS_COMMAND : 0));
}

static void command_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct i8042 *k = dev;

    k->last_was_command = true;
    controller_command(k, (u8)val);
    update(k);
}

/* ---- device ---- */

/* What firmware leaves: self test passed, keyboard translated, both interrupts off. */
static void power_on(struct i8042 *k)
{
    memset(k->ram, 0, sizeof(k->ram));
    k->ram[0] = CB_SYSTEM | CB_TRANSLATE;
    k->output_port = OUT_NO_RESET | OUT_A20;
    k->command = k->kbd_command = k->aux_command = 0;
    k->last_was_command = k->full = k->mouse_wrap = false;
    k->out = k->out_aux = k->head = k->n = 0;
    k->scan_set = 2;
    mouse_defaults(k);
}

static void i8042_reset(struct device *d)
{
    struct i8042 *k = (struct i8042 *)d;

    pthread_mutex_lock(&d->lock);
    power_on(k);
    update(k);
    pthread_mutex_unlock(&d->lock);
}

static void i8042_state(struct device *d, struct stream *s)
{
    struct i8042 *k = (struct i8042 *)d;

    stream_section(s, "i8042", 1);
    stream_bytes(s, k->ram, sizeof(k->ram));
    stream_u8(s, &k->output_port);
    stream_u8(s, &k->command);
    stream_bool(s, &k->last_was_command);
    stream_u8(s, &k->out);
    stream_u8(s, &k->out_aux);
    stream_bool(s, &k->full);
    stream_bytes(s, k->queue, sizeof(k->queue));
    stream_bytes(s, k->queue_aux, sizeof(k->queue_aux));
    stream_u8(s, &k->head);
    stream_u8(s, &k->n);
    stream_u8(s, &k->kbd_command);
    stream_u8(s, &k->aux_command);
    stream_u8(s, &k->scan_set);
    stream_u8(s, &k->mouse_status);
    stream_u8(s, &k->mouse_resolution);
    stream_u8(s, &k->mouse_rate);
    stream_bool(s, &k->mouse_wrap);
    if (s->load && (s->error || k->head >= QUEUE || k->n > QUEUE)) {
        stream_bad(s, "i8042: impossible queue");
        power_on(k);
    }
}

static void i8042_free(struct device *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static const struct device_ops i8042_ops = {
    .name = "i8042",
    .reset = i8042_reset,
    .state = i8042_state,
    .free = i8042_free,
};

int i8042_new(struct bus *pio, struct irq_line irq1, struct irq_line irq12, struct machine_hook hook, struct i8042 **out)
{
    struct i8042 *k = calloc(1, sizeof(*k));
    int r;

    if (!k)
        return err(-ENOMEM, "i8042: out of memory");
    device_init(&k->device, &i8042_ops);
    k->irq[0] = irq1;
    k->irq[1] = irq12;
    k->hook = hook;
    power_on(k);

    struct region data = {
        .base = 0x60, .size = 1, .min = 1, .max = 1, .read = data_read, .write = data_write, .dev = k, .lock = &k->device.lock, .name = "i8042 data",
    };
    struct region command = {
        .base = 0x64, .size = 1, .min = 1, .max = 1, .read = status_read, .write = command_write, .dev = k, .lock = &k->device.lock, .name = "i8042 command",
    };
    r = bus_add(pio, &data);
    if (r >= 0)
        r = bus_add(pio, &command);
    if (r < 0) {
        i8042_free(&k->device);
        return r;
    }
    *out = k;
    return 0;
}
