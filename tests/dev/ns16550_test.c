/* dev/ns16550: register scripts after the PC16550D data sheet, with a back end that the test can fill up. */
#include "dev/chip.h"
#include "dev/ns16550.h"

enum { RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR };
#define THR RBR
#define FCR IIR

struct fake {
    struct chardev c;
    char got[256];
    size_t n, room;
    unsigned ready;
};

static struct bench bench;
static struct ns16550 *uart;
static struct wire irq;
static struct fake fake;

static size_t fake_write(struct chardev *c, const u8 *buf, size_t len)
{
    struct fake *f = (struct fake *)c;

    len = MIN(len, f->room);
    memcpy(f->got + f->n, buf, len);
    f->n += len;
    f->room -= len;
    return len;
}

static void fake_ready(struct chardev *c)
{
    ((struct fake *)c)->ready++;
}

static const struct chardev_ops fake_ops = { .write = fake_write, .rx_ready = fake_ready };

static u8 rd(u8 reg)
{
    return in8(&bench, 0x3f8 + reg);
}

static void wr(u8 reg, u8 val)
{
    out8(&bench, 0x3f8 + reg, val);
}

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    irq = (struct wire){ 0 };
    fake = (struct fake){ .c = { .ops = &fake_ops, .opened = true }, .room = 200 };
    if (ns16550_new(bench.pio, 0x3f8, "com1", bench.clock, wire_line(&irq), &fake.c, &uart))
        return -1;
    wr(MCR, 0x0a); /* OUT2 opens the interrupt, RTS the peer's sending */
    return 0;
}

static int teardown(void **state UNUSED)
{
    chip_free(uart);
    bench_close(&bench);
    return 0;
}

static void enable_fifo(u8 trigger)
{
    wr(FCR, (u8)(trigger << 6 | 7));
}

static size_t send(const char *text)
{
    size_t n = MIN(strlen(text), chardev_front_room(&fake.c));

    chardev_front_receive(&fake.c, (const u8 *)text, n);
    return n;
}

static void reset_state(void **state UNUSED)
{
    chip_reset(uart);
    assert_int_equal(rd(IER), 0);
    assert_int_equal(rd(IIR), 0x01);
    assert_int_equal(rd(LCR), 0);
    assert_int_equal(rd(MCR), 0);
    assert_int_equal(rd(LSR), 0x60);
    assert_int_equal(rd(MSR), 0xb0); /* CTS, DSR, DCD, no deltas */
}

static void registers_keep_their_bits(void **state UNUSED)
{
    wr(SCR, 0xa5);
    assert_int_equal(rd(SCR), 0xa5);
    wr(IER, 0xff);
    assert_int_equal(rd(IER), 0x0f);
    wr(MCR, 0xff);
    assert_int_equal(rd(MCR), 0x1f);
    wr(LCR, 0x83);
    wr(0, 0x34);
    wr(1, 0x12);
    assert_int_equal(rd(0), 0x34);
    assert_int_equal(rd(1), 0x12);
    wr(LCR, 0x03);
    assert_int_equal(rd(IER), 0x0f); /* the divisor is another register */
    assert_int_equal(fake.n, 0);
    enable_fifo(0);
    assert_int_equal(rd(IIR) & 0xc0, 0xc0); /* a 16550A, not a 16550 */
}

static void output_goes_out_at_once(void **state UNUSED)
{
    for (const char *p = "hello"; *p; p++) {
        assert_int_equal(rd(LSR), 0x60);
        wr(THR, (u8)*p);
    }
    assert_memory_equal(fake.got, "hello", 5);
    assert_int_equal(fake.n, 5);
}

/* 8.6.1, table IV: the transmitter's interrupt comes when it is enabled empty, goes when IIR names it, comes again after the next byte. */
static void transmitter_interrupt(void **state UNUSED)
{
    wr(IER, 0x02);
    assert_int_equal(irq.level, 1);
    assert_int_equal(rd(IIR), 0x02);
    assert_int_equal(irq.level, 0);
    assert_int_equal(rd(IIR), 0x01);
    wr(THR, 'x');
    assert_int_equal(irq.level, 1);
    assert_int_equal(irq.rises, 2);
    wr(IER, 0x00);
    assert_int_equal(irq.level, 0);
    wr(IER, 0x02); /* never read from IIR: still pending */
    assert_int_equal(rd(IIR), 0x02);
}

/* A host side that takes nothing: THRE stays low, the FIFO fills, nothing is lost, and the interrupt comes when there is room. */
static void a_slow_host_holds_the_guest_up(void **state UNUSED)
{
    enable_fifo(0);
    fake.room = 3;
    wr(IER, 0x02);
    rd(IIR);
    for (int i = 0; i < 10; i++)
        wr(THR, (u8)('0' + i));
    assert_int_equal(fake.n, 3);
    assert_int_equal(rd(LSR) & 0x60, 0);
    rd(IIR);
    assert_int_equal(rd(IIR), 0xc1); /* no interrupt while it is not empty */
    fake.room = 4;
    chardev_front_writable(&fake.c);
    assert_int_equal(rd(LSR) & 0x60, 0);
    fake.room = 200;
    chardev_front_writable(&fake.c);
    assert_int_equal(rd(LSR) & 0x60, 0x60);
    assert_int_equal(rd(IIR), 0xc2);
    assert_memory_equal(fake.got, "0123456789", 10);
    assert_int_equal(fake.n, 10);
}

/* Writing on against THRE: sixteen bytes at most wait, as in the chip. */
static void an_overfull_fifo_drops(void **state UNUSED)
{
    enable_fifo(0);
    fake.room = 0;
    for (int i = 0; i < 40; i++)
        wr(THR, (u8)('A' + i));
    fake.room = 200;
    chardev_front_writable(&fake.c);
    assert_int_equal(fake.n, 16);
    assert_memory_equal(fake.got, "ABCDEFGHIJKLMNOP", 16);
    fake.room = 0;
    wr(THR, 'x');
    wr(FCR, 0x05); /* clears the transmitter's FIFO */
    fake.room = 200;
    chardev_front_writable(&fake.c);
    assert_int_equal(fake.n, 16);
    assert_int_equal(rd(LSR) & 0x20, 0x20);
}

static void input_without_fifo(void **state UNUSED)
{
    wr(IER, 0x01);
    assert_int_equal(chardev_front_room(&fake.c), 1);
    assert_int_equal(send("abc"), 1);
    assert_int_equal(chardev_front_room(&fake.c), 0);
    assert_int_equal(irq.level, 1);
    assert_int_equal(rd(IIR), 0x04);
    assert_int_equal(rd(LSR), 0x61);
    fake.ready = 0;
    assert_int_equal(rd(RBR), 'a');
    assert_int_equal(fake.ready, 1); /* the back end may send more */
    assert_int_equal(irq.level, 0);
    assert_int_equal(rd(LSR), 0x60);
}

/* 8.4: interrupt at the trigger level; back-pressure at sixteen. */
static void input_with_fifo(void **state UNUSED)
{
    static const u8 level[4] = { 1, 4, 8, 14 };

    wr(IER, 0x01);
    for (u8 t = 0; t < 4; t++) {
        enable_fifo(t);
        for (int i = 1; i <= 16; i++) {
            assert_int_equal(chardev_front_room(&fake.c), 17 - i);
            send("z");
            assert_int_equal(irq.level, i >= level[t]);
        }
        assert_int_equal(chardev_front_room(&fake.c), 0);
        assert_int_equal(rd(IIR), 0xc4);
        for (int i = 16; i >= 1; i--) {
            assert_int_equal(rd(LSR) & 1, 1);
            assert_int_equal(rd(RBR), 'z');
            assert_int_equal(irq.level, i - 1 >= level[t]);
        }
        assert_int_equal(rd(LSR) & 1, 0);
    }
}

/* 8.4, FIFO interrupt mode: bytes below the trigger level interrupt after four characters' time without traffic. */
static void input_time_out(void **state UNUSED)
{
    wr(LCR, 0x83);
    wr(0, 12); /* 9600 baud, 8N1: 4.2 ms for four characters */
    wr(1, 0);
    wr(LCR, 0x03);
    enable_fifo(2);
    wr(IER, 0x01);
    send("ab");
    bench_run(&bench, 3 * MS);
    assert_int_equal(irq.level, 0);
    send("c"); /* traffic starts it anew */
    bench_run(&bench, 3 * MS);
    assert_int_equal(irq.level, 0);
    bench_run(&bench, 2 * MS);
    assert_int_equal(irq.level, 1);
    assert_int_equal(rd(IIR), 0xcc);
    assert_int_equal(rd(RBR), 'a');
    assert_int_equal(irq.level, 0); /* a read starts it anew, too */
    bench_run(&bench, 5 * MS);
    assert_int_equal(rd(IIR), 0xcc);
    rd(RBR);
    rd(RBR);
    bench_run(&bench, 5 * MS);
    assert_int_equal(rd(IIR), 0xc1); /* nothing left to announce */
}

static void priorities_of_interrupts(void **state UNUSED)
{
    wr(MCR, 0x18); /* loopback, for errors and modem lines */
    rd(MSR);
    wr(IER, 0x0f);
    wr(MCR, 0x1a); /* RTS to CTS: a delta */
    wr(THR, 'a');
    wr(THR, 'b'); /* overrun */
    assert_int_equal(rd(IIR), 0x06);
    assert_int_equal(rd(LSR) & 0x0f, 0x03);
    assert_int_equal(rd(IIR), 0x04);
    assert_int_equal(rd(RBR), 'b'); /* 8.3: without FIFO the later byte overwrites */
    assert_int_equal(rd(IIR), 0x02);
    assert_int_equal(rd(IIR), 0x00);
    assert_int_equal(rd(MSR) & 0x1f, 0x11);
    assert_int_equal(rd(IIR), 0x01);
    assert_int_equal(irq.level, 0);
}

/* 8.7, bit 4: DTR, RTS, OUT1, OUT2 to DSR, CTS, RI, DCD; bytes to the receiver; nothing leaves. */
static void loopback(void **state UNUSED)
{
    static const u8 msr[16] = { 0x00, 0x20, 0x10, 0x30, 0x40, 0x60, 0x50, 0x70, 0x80, 0xa0, 0x90, 0xb0, 0xc0, 0xe0, 0xd0, 0xf0 };

    for (u8 i = 0; i < 16; i++) {
        wr(MCR, 0x10 | i);
        assert_int_equal(rd(MSR) & 0xf0, msr[i]);
    }
    wr(MCR, 0x14);
    rd(MSR);
    wr(MCR, 0x10);
    assert_int_equal(rd(MSR) & 0x0f, 0x04); /* TERI at the trailing edge of RI */
    wr(MCR, 0x14);
    assert_int_equal(rd(MSR) & 0x0f, 0x00); /* and not at the leading one */
    enable_fifo(0);
    for (int i = 0; i < 17; i++)
        wr(THR, (u8)i);
    assert_int_equal(chardev_front_room(&fake.c), 0);
    assert_int_equal(rd(LSR) & 0x02, 0x02); /* the seventeenth overruns */
    for (int i = 0; i < 16; i++)
        assert_int_equal(rd(RBR), i);
    wr(LCR, 0x43); /* break */
    assert_int_equal(rd(LSR) & 0x91, 0x91);
    assert_int_equal(rd(LSR) & 0x91, 0x01);
    assert_int_equal(rd(RBR), 0);
    assert_int_equal(fake.n, 0);
    wr(MCR, 0x08);
    assert_int_equal(rd(MSR) & 0xf0, 0xb0);
}

static void out2_gates_the_interrupt(void **state UNUSED)
{
    wr(IER, 0x01);
    send("a");
    assert_int_equal(irq.level, 1);
    wr(MCR, 0x00);
    assert_int_equal(irq.level, 0);
    assert_int_equal(rd(IIR), 0x04);
    wr(MCR, 0x08);
    assert_int_equal(irq.level, 1);
}

/* The peer keeps its bytes until the driver is ready, and is told when it is. */
static void rts_holds_input_back(void **state UNUSED)
{
    unsigned before;

    wr(MCR, 0x08);
    assert_int_equal(chardev_front_room(&fake.c), 0);
    before = fake.ready;
    wr(MCR, 0x0a);
    assert_int_equal(fake.ready, before + 1);
    assert_int_not_equal(chardev_front_room(&fake.c), 0);
    wr(MCR, 0x0a);
    assert_int_equal(fake.ready, before + 1);
}

static void a_peer_that_leaves_drops_the_carrier(void **state UNUSED)
{
    wr(IER, 0x08);
    rd(MSR);
    fake.c.opened = false;
    chardev_front_event(&fake.c, CHARDEV_BROKEN);
    assert_int_equal(irq.level, 1);
    assert_int_equal(rd(IIR), 0x00);
    assert_int_equal(rd(MSR), 0x1a); /* DCD and DSR have changed; CTS stays */
    assert_int_equal(irq.level, 0);
    fake.c.opened = true;
    chardev_front_event(&fake.c, CHARDEV_OPENED);
    assert_int_equal(rd(MSR), 0xba);
    chardev_front_event(&fake.c, CHARDEV_EOF);
    assert_int_equal(rd(MSR), 0xb0);
}

static void nothing_attached(void **state UNUSED)
{
    struct ns16550 *com2;
    struct wire w = { 0 };

    assert_int_equal(ns16550_new(bench.pio, 0x2f8, "com2", bench.clock, wire_line(&w), NULL, &com2), 0);
    assert_int_equal(in8(&bench, 0x2f8 + MSR), 0);
    for (int i = 0; i < 100; i++)
        out8(&bench, 0x2f8, 'x');
    assert_int_equal(in8(&bench, 0x2f8 + LSR), 0x60);
    chip_free(com2);
}

static void its_state_can_be_moved(void **state UNUSED)
{
    struct fake other_end = { .c = { .ops = &fake_ops, .opened = true }, .room = 200 };
    struct ns16550 *copy;
    struct wire w = { 0 };

    enable_fifo(1);
    wr(IER, 0x03);
    send("abc");
    fake.room = 0;
    wr(THR, 'x');
    wr(THR, 'y');
    assert_int_equal(ns16550_new(bench.mmio, 0x3f8, "com1", bench.clock, wire_line(&w), &other_end.c, &copy), 0);
    other_end.room = 0;
    chip_transplant(uart, copy);
    other_end.room = 200;
    chardev_front_writable(&other_end.c);
    assert_memory_equal(other_end.got, "xy", 2);
    assert_int_equal(bus_read(bench.mmio, 0x3f8, 1), 'a');
    assert_int_equal(bus_read(bench.mmio, 0x3f8 + IER, 1), 3);
    bench_run(&bench, SEC); /* the time-out came along */
    assert_int_equal(bus_read(bench.mmio, 0x3f8 + IIR, 1), 0xcc);
    chip_free(copy);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(reset_state), T(registers_keep_their_bits), T(output_goes_out_at_once), T(transmitter_interrupt), T(a_slow_host_holds_the_guest_up),
        T(an_overfull_fifo_drops), T(input_without_fifo), T(input_with_fifo), T(input_time_out), T(priorities_of_interrupts), T(loopback),
        T(out2_gates_the_interrupt), T(rts_holds_input_back), T(a_peer_that_leaves_drops_the_carrier), T(nothing_attached), T(its_state_can_be_moved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
