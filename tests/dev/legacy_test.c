/* The small chips: dev/i8042, rst_cnt, port92, port80, pvpanic, debug_exit, debugcon, vga_mem. */
#include "dev/chip.h"
#include "dev/debug_exit.h"
#include "dev/debugcon.h"
#include "dev/i8042.h"
#include "dev/port80.h"
#include "dev/port92.h"
#include "dev/pvpanic.h"
#include "dev/rst_cnt.h"
#include "dev/vga_mem.h"

static struct bench bench;
static struct i8042 *kbc;
static struct wire irq1, irq12;
static unsigned told[MACHINE_CRASH_LOADED + 1];

static void tell(void *arg UNUSED, enum machine_event what)
{
    told[what]++;
}

static const struct machine_hook hook = { .fn = tell };

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    irq1 = irq12 = (struct wire){ 0 };
    memset(told, 0, sizeof(told));
    return i8042_new(bench.pio, wire_line(&irq1), wire_line(&irq12), hook, &kbc);
}

static int teardown(void **state UNUSED)
{
    chip_free(kbc);
    bench_close(&bench);
    return 0;
}

/* ---- i8042 ---- */

#define OBF 0x01
#define AUX 0x20

static u8 status(void)
{
    return in8(&bench, 0x64);
}

static void command(u8 val)
{
    out8(&bench, 0x64, val);
}

static void data(u8 val)
{
    out8(&bench, 0x60, val);
}

/* Reads what is there, as "fa ab 83"; mouse bytes have an m before them. */
static const char *answers(void)
{
    static char text[256];

    text[0] = 0;
    for (int i = 0; i < 40 && (status() & OBF); i++) {
        size_t n = strlen(text);
        bool aux = status() & AUX;

        snprintf(text + n, sizeof(text) - n, "%s%s%02x", n ? " " : "", aux ? "m" : "", in8(&bench, 0x60));
    }
    return text;
}

static const char *ask(u8 cmd)
{
    command(cmd);
    return answers();
}

static const char *ask_keyboard(u8 val)
{
    data(val);
    return answers();
}

static const char *ask_mouse(u8 val)
{
    command(0xd4);
    data(val);
    return answers();
}

static void the_controller_answers(void **state UNUSED)
{
    assert_int_equal(status() & OBF, 0);
    assert_string_equal(ask(0xaa), "55");
    assert_int_equal(status() & 0x04, 0x04);
    assert_string_equal(ask(0xab), "00");
    assert_string_equal(ask(0xa9), "00");
    command(0x60);
    data(0x47);
    assert_string_equal(ask(0x20), "47");
    command(0xa7);
    assert_string_equal(ask(0x20), "67");
    command(0xad);
    assert_string_equal(ask(0x20), "77");
    command(0xa8);
    command(0xae);
    assert_string_equal(ask(0x20), "47");
    command(0x7f); /* the controller's RAM has 32 bytes */
    data(0x12);
    assert_string_equal(ask(0x3f), "12");
    assert_string_equal(ask(0xd0), "03");
    command(0xd2);
    data(0x99);
    assert_string_equal(answers(), "99");
    command(0xd3);
    data(0x98);
    assert_string_equal(answers(), "m98");
}

static void the_keyboard_answers(void **state UNUSED)
{
    command(0x60);
    data(0x00); /* no translation */
    assert_string_equal(ask_keyboard(0xff), "fa aa");
    assert_string_equal(ask_keyboard(0xf2), "fa ab 83");
    assert_string_equal(ask_keyboard(0xee), "ee");
    assert_string_equal(ask_keyboard(0xed), "fa");
    assert_string_equal(ask_keyboard(0x07), "fa");
    assert_string_equal(ask_keyboard(0xf0), "fa");
    assert_string_equal(ask_keyboard(0x00), "fa 02");
    assert_string_equal(ask_keyboard(0xf0), "fa");
    assert_string_equal(ask_keyboard(0x01), "fa");
    assert_string_equal(ask_keyboard(0xf0), "fa");
    assert_string_equal(ask_keyboard(0x00), "fa 01");
    assert_string_equal(ask_keyboard(0xf4), "fa");
    assert_string_equal(ask_keyboard(0x00), "fe"); /* no command */
    assert_string_equal(ask_keyboard(0xed), "fa");
    assert_string_equal(ask_keyboard(0xf4), "fa"); /* a command in a parameter's place is one */
    assert_string_equal(ask_keyboard(0x02), "fe");
    command(0x60);
    data(0x40);
    assert_string_equal(ask_keyboard(0xf2), "fa ab 41"); /* translated */
}

static void the_mouse_answers(void **state UNUSED)
{
    assert_string_equal(ask_mouse(0xff), "mfa maa m00");
    assert_string_equal(ask_mouse(0xf2), "mfa m00");
    assert_string_equal(ask_mouse(0xe9), "mfa m00 m02 m64");
    assert_string_equal(ask_mouse(0xe8), "mfa");
    assert_string_equal(ask_mouse(0x03), "mfa");
    assert_string_equal(ask_mouse(0xf3), "mfa");
    assert_string_equal(ask_mouse(0xc8), "mfa");
    assert_string_equal(ask_mouse(0xf4), "mfa");
    assert_string_equal(ask_mouse(0xe9), "mfa m20 m03 mc8");
    assert_string_equal(ask_mouse(0xe1), "mfe");
    assert_string_equal(ask_mouse(0xee), "mfa");
    assert_string_equal(ask_mouse(0x77), "m77"); /* wrap mode */
    assert_string_equal(ask_mouse(0xec), "mfa");
    assert_string_equal(ask_mouse(0xf6), "mfa");
    assert_string_equal(ask_mouse(0xe9), "mfa m00 m02 m64");
}

/* Each byte interrupts, on its own line, if the command byte says so. */
static void bytes_interrupt(void **state UNUSED)
{
    ask_keyboard(0xf2);
    assert_int_equal(irq1.rises + irq12.rises, 0);
    command(0x60);
    data(0x43);
    data(0xf2);
    assert_int_equal(irq1.level, 1);
    answers();
    assert_int_equal(irq1.rises, 3);
    assert_int_equal(irq1.level, 0);
    ask_mouse(0xf2);
    assert_int_equal(irq12.rises, 2);
    assert_int_equal(irq1.rises, 3);
    data(0xf2);
    command(0x60);
    data(0x00);
    assert_int_equal(irq1.level, 0);
    command(0x60);
    data(0x01);
    assert_int_equal(irq1.level, 1);
}

static void unread_answers_are_bounded(void **state UNUSED)
{
    for (int i = 0; i < 1000; i++)
        data(0xf2);
    assert_true(strlen(answers()) > 0);
    assert_int_equal(status() & OBF, 0);
    assert_string_equal(ask(0xaa), "55");
}

static void the_controller_resets_the_machine(void **state UNUSED)
{
    command(0xff); /* pulses nothing */
    command(0xd1);
    data(0x03);
    assert_int_equal(told[MACHINE_RESET], 0);
    command(0xfe);
    assert_int_equal(told[MACHINE_RESET], 1);
    command(0xd1);
    data(0x02);
    assert_int_equal(told[MACHINE_RESET], 2);
}

static void its_state_can_be_moved(void **state UNUSED)
{
    struct i8042 *copy;
    struct wire w[2] = { 0 };

    data(0xf2);
    command(0xd4);
    assert_int_equal(i8042_new(bench.mmio, wire_line(&w[0]), wire_line(&w[1]), hook, &copy), 0);
    chip_transplant(kbc, copy);
    bus_write(bench.mmio, 0x60, 0xf2, 1); /* the mouse's, as the command before said */
    assert_int_equal(bus_read(bench.mmio, 0x60, 1), 0xfa);
    assert_int_equal(bus_read(bench.mmio, 0x60, 1), 0xab);
    assert_int_equal(bus_read(bench.mmio, 0x60, 1), 0x41);
    assert_int_equal(bus_read(bench.mmio, 0x64, 1) & 0x21, 0x21);
    chip_free(copy);
}

/* ---- resets ---- */

static void reset_control_register(void **state UNUSED)
{
    struct rst_cnt *r;

    assert_int_equal(rst_cnt_new(bench.pio, hook, &r), 0);
    out8(&bench, 0xcf9, 0x02);
    assert_int_equal(told[MACHINE_RESET], 0);
    assert_int_equal(in8(&bench, 0xcf9), 0x02);
    out8(&bench, 0xcf9, RST_CNT_FULL);
    assert_int_equal(told[MACHINE_RESET], 1);
    out8(&bench, 0xcf9, RST_CNT_FULL); /* no edge */
    assert_int_equal(told[MACHINE_RESET], 1);
    chip_reset(r);
    out8(&bench, 0xcf9, 0x0e);
    assert_int_equal(told[MACHINE_RESET], 2);
    chip_free(r);
}

static void fast_reset(void **state UNUSED)
{
    struct port92 *p;

    assert_int_equal(port92_new(bench.pio, hook, &p), 0);
    assert_int_equal(in8(&bench, 0x92), 0x02);
    out8(&bench, 0x92, 0x00);
    assert_int_equal(in8(&bench, 0x92), 0x00);
    assert_int_equal(told[MACHINE_RESET], 0);
    out8(&bench, 0x92, 0x03);
    assert_int_equal(told[MACHINE_RESET], 1);
    out8(&bench, 0x92, 0x03);
    assert_int_equal(told[MACHINE_RESET], 1);
    chip_free(p);
}

/* ---- the rest ---- */

static void delay_ports(void **state UNUSED)
{
    struct port80 *p;

    assert_int_equal(port80_new(bench.pio, &p), 0);
    out8(&bench, 0x80, 0x12);
    out8(&bench, 0x8f, 0x34);
    out8(&bench, 0xed, 0x56);
    assert_int_equal(in8(&bench, 0x80), 0x12);
    assert_int_equal(in8(&bench, 0x8f), 0x34);
    assert_int_equal(in8(&bench, 0xed), 0x56);
    chip_reset(p);
    assert_int_equal(in8(&bench, 0x80), 0);
    chip_free(p);
}

static void panics_are_told(void **state UNUSED)
{
    struct pvpanic *p;

    assert_int_equal(pvpanic_new(bench.pio, PVPANIC_PORT, hook, &p), 0);
    assert_int_equal(in8(&bench, PVPANIC_PORT), 3);
    out8(&bench, PVPANIC_PORT, 0);
    assert_int_equal(told[MACHINE_PANICKED] + told[MACHINE_CRASH_LOADED], 0);
    out8(&bench, PVPANIC_PORT, 2);
    assert_int_equal(told[MACHINE_CRASH_LOADED], 1);
    out8(&bench, PVPANIC_PORT, 1);
    assert_int_equal(told[MACHINE_PANICKED], 1);
    chip_free(p);
}

static void video(void **state UNUSED)
{
    struct vga_mem *v, *copy;
    struct bus *pio2, *mmio2;
    unsigned retrace = 0;

    assert_int_equal(vga_mem_new(bench.pio, bench.mmio, bench.clock, &v), 0);
    for (u64 a = 0xa0000; a < 0xc0000; a += 0x1ff8)
        bus_write(bench.mmio, a, a * 0x10001, 8);
    for (u64 a = 0xa0000; a < 0xc0000; a += 0x1ff8)
        assert_true(bus_read(bench.mmio, a, 8) == a * 0x10001);
    bus_write(bench.mmio, 0xbfffd, 0x44332211, 4); /* over its end */
    assert_int_equal(bus_read(bench.mmio, 0xbfffe, 2), 0x3322);
    assert_int_equal(bus_read(bench.mmio, 0xc0000, 1), 0xff);

    out8(&bench, 0x3d4, 0x0f);
    out8(&bench, 0x3d5, 0x5a);
    assert_int_equal(in8(&bench, 0x3d5), 0x5a); /* the classic probe: cursor position low */
    assert_int_equal(in8(&bench, 0x3b5), 0x5a);
    in8(&bench, 0x3da);
    out8(&bench, 0x3c0, 0x10);
    out8(&bench, 0x3c0, 0x0c);
    assert_int_equal(in8(&bench, 0x3c1), 0x0c);
    out8(&bench, 0x3c8, 255); /* the palette wraps */
    for (int i = 0; i < 6; i++)
        out8(&bench, 0x3c9, (u8)i);
    out8(&bench, 0x3c7, 0);
    assert_int_equal(in8(&bench, 0x3c9), 3);
    for (int i = 0; i < 1000; i++) {
        retrace += (in8(&bench, 0x3da) & 8) != 0;
        bench_pass(&bench, 100 * US);
    }
    assert_in_range(retrace, 50, 80); /* a sixteenth of the time */

    assert_int_equal(bus_new(NULL, &pio2), 0);
    assert_int_equal(bus_new(NULL, &mmio2), 0);
    assert_int_equal(vga_mem_new(pio2, mmio2, bench.clock, &copy), 0);
    chip_transplant(v, copy);
    assert_int_equal(bus_read(mmio2, 0xbfffe, 2), 0x3322);
    chip_reset(v);
    assert_int_equal(bus_read(bench.mmio, 0xbfffe, 2), 0);
    chip_free(copy);
    bus_free(pio2);
    bus_free(mmio2);
    chip_free(v);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

/* ---- debug_exit, debugcon ---- */

static void take_exit(void *arg, unsigned value)
{
    *(unsigned *)arg = value;
}

static void debug_exit_tells_the_value(void **state UNUSED)
{
    unsigned value = 0;
    struct debug_exit *p;

    struct machine_hook h = { .exit = take_exit, .arg = &value };

    assert_int_equal(debug_exit_new(bench.pio, DEBUG_EXIT_PORT, h, &p), 0);
    out8(&bench, DEBUG_EXIT_PORT, 0x12);
    assert_int_equal(value, 0x12);
    bus_write(bench.pio, DEBUG_EXIT_PORT, 0x3456, 2);
    assert_int_equal(value, 0x3456);
    bus_write(bench.pio, DEBUG_EXIT_PORT, 0x89abcdef, 4);
    assert_int_equal(value, 0x89abcdef);
    assert_int_equal(in8(&bench, DEBUG_EXIT_PORT), 0);
    chip_free(p);
    assert_int_equal(debug_exit_new(bench.mmio, DEBUG_EXIT_PORT, (struct machine_hook){ 0 }, &p), 0);
    bus_write(bench.mmio, DEBUG_EXIT_PORT, 1, 1);                               /* nobody listens */
    chip_free(p);
}

/* A host end with room for so many bytes. */
struct sink {
    struct chardev c;
    char text[16];
    size_t len, room;
};

static size_t sink_write(struct chardev *c, const u8 *buf, size_t len)
{
    struct sink *s = (struct sink *)c;

    len = MIN(len, s->room - s->len);
    memcpy(s->text + s->len, buf, len);
    s->len += len;
    return len;
}

static void count_message(void *arg, enum log_level level UNUSED, const char *msg UNUSED)
{
    ++*(unsigned *)arg;
}

static void debug_console_writes_or_loses(void **state UNUSED)
{
    static const struct chardev_ops ops = { .write = sink_write };
    struct sink s = { .c.ops = &ops, .room = 2 };
    unsigned messages = 0;
    struct log log = { count_message, &messages };
    struct debugcon *p;

    assert_int_equal(debugcon_new(bench.pio, DEBUGCON_PORT, &s.c, &log, &p), 0);
    assert_int_equal(in8(&bench, DEBUGCON_PORT), 0xe9);
    for (const char *t = "abcd"; *t; t++)
        out8(&bench, DEBUGCON_PORT, (u8)*t);                        /* c waits in vain, d not at all */
    assert_int_equal(messages, 1);
    s.room = 3;
    out8(&bench, DEBUGCON_PORT, 'e');
    assert_string_equal(s.text, "abe");
    chip_free(p);
    assert_int_equal(debugcon_new(bench.mmio, DEBUGCON_PORT, NULL, &log, &p), 0);
    bus_write(bench.mmio, DEBUGCON_PORT, 'x', 1);
    chip_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(the_controller_answers), T(the_keyboard_answers), T(the_mouse_answers), T(bytes_interrupt), T(unread_answers_are_bounded),
        T(the_controller_resets_the_machine), T(its_state_can_be_moved), T(reset_control_register), T(fast_reset), T(delay_ports), T(panics_are_told), T(debug_exit_tells_the_value), T(debug_console_writes_or_loses),
        T(video),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
