/* dev/i8259: register scripts after the data sheet (Intel 231468; names in quotes are its sections). */
#include "dev/chip.h"
#include "dev/i8259.h"

static struct bench bench;
static struct i8259 *pic;
static struct wire intr;

#define M0 0x20
#define M1 0x21
#define S0 0xa0
#define S1 0xa1

static void init(u8 icw4)
{
    out8(&bench, M0, 0x11);
    out8(&bench, M1, 0x20);
    out8(&bench, M1, 0x04);
    out8(&bench, M1, icw4);
    out8(&bench, S0, 0x11);
    out8(&bench, S1, 0x70); /* low bits of ICW2 are not the program's */
    out8(&bench, S1, 0x02);
    out8(&bench, S1, icw4);
}

static int setup(void **state UNUSED)
{
    bench_open(&bench);
    intr = (struct wire){ 0 };
    if (i8259_new(bench.pio, wire_line(&intr), &pic))
        return -1;
    init(0x01);
    return 0;
}

static int teardown(void **state UNUSED)
{
    chip_free(pic);
    bench_close(&bench);
    return 0;
}

static void irq(int n, int level)
{
    struct irq_line l = i8259_irq(pic, n);

    irq_set(&l, level);
}

static void pulse(int n)
{
    irq(n, 0);
    irq(n, 1);
}

static u8 isr(u16 port)
{
    out8(&bench, port, 0x0b);
    return in8(&bench, port);
}

static u8 irr(u16 port)
{
    out8(&bench, port, 0x0a);
    return in8(&bench, port);
}

static void a_request_is_acknowledged_and_ended(void **state UNUSED)
{
    irq(3, 1);
    assert_true(i8259_pending(pic));
    assert_int_equal(intr.level, 1);
    assert_int_equal(irr(M0), 0x08);
    assert_int_equal(i8259_peek(pic), 0x23);
    assert_int_equal(i8259_ack(pic), 0x23);
    assert_int_equal(isr(M0), 0x08);
    assert_int_equal(irr(M0), 0); /* the edge is used up, though the line is still high */
    assert_int_equal(intr.level, 0);
    assert_int_equal(i8259_peek(pic), -1);
    out8(&bench, M0, 0x20);
    assert_int_equal(isr(M0), 0);
    assert_int_equal(intr.level, 0);
    pulse(3);
    assert_int_equal(intr.level, 1);
}

/* "Fully nested mode": IR0 is highest; what is in service holds up its own level and lower ones only. */
static void higher_priorities_interrupt_lower_ones(void **state UNUSED)
{
    irq(4, 1);
    assert_int_equal(i8259_ack(pic), 0x24);
    irq(5, 1);
    assert_int_equal(intr.level, 0);
    irq(1, 1);
    assert_int_equal(i8259_ack(pic), 0x21);
    assert_int_equal(isr(M0), 0x12);
    out8(&bench, M0, 0x20); /* non-specific EOI ends the highest: IR1 */
    assert_int_equal(isr(M0), 0x10);
    assert_int_equal(intr.level, 0);
    out8(&bench, M0, 0x20);
    assert_int_equal(i8259_ack(pic), 0x25);
}

static void masked_requests_wait(void **state UNUSED)
{
    out8(&bench, M1, 0x08);
    assert_int_equal(in8(&bench, M1), 0x08);
    irq(3, 1);
    assert_int_equal(intr.level, 0);
    assert_int_equal(irr(M0), 0x08); /* the IRR is before the mask */
    out8(&bench, M1, 0x00);
    assert_int_equal(intr.level, 1);
    assert_int_equal(i8259_ack(pic), 0x23);
}

/* "Interrupt sequence", "cascade mode": IR2 leads to the slave, and both need an EOI. */
static void the_slave_answers_through_the_master(void **state UNUSED)
{
    irq(12, 1);
    assert_int_equal(irr(M0), 0x04);
    assert_int_equal(i8259_peek(pic), 0x74);
    assert_int_equal(i8259_ack(pic), 0x74);
    assert_int_equal(isr(M0), 0x04);
    assert_int_equal(isr(S0), 0x10);
    irq(8, 1); /* higher in the slave, but the master's IR2 is in service */
    assert_int_equal(intr.level, 0);
    out8(&bench, M0, 0x20);
    assert_int_equal(i8259_ack(pic), 0x70);
    out8(&bench, M0, 0x20);
    out8(&bench, S0, 0x20);
    assert_int_equal(isr(S0), 0x10);
    out8(&bench, S0, 0x64); /* specific EOI of the slave's IR4 */
    assert_int_equal(isr(S0), 0);
}

/* "Special fully nested mode": the slave's higher levels come through while a lower one is in service. */
static void special_fully_nested_lets_the_slave_through(void **state UNUSED)
{
    init(0x11);
    irq(12, 1);
    i8259_ack(pic);
    irq(13, 1);
    assert_int_equal(intr.level, 0);
    irq(8, 1);
    assert_int_equal(i8259_ack(pic), 0x70);
}

/* The line falls before INTA: IR7's vector, and no bit in the ISR ("Interrupt sequence", note on IR7). */
static void a_withdrawn_request_is_spurious(void **state UNUSED)
{
    irq(3, 1);
    irq(3, 0);
    assert_int_equal(intr.level, 0);
    assert_int_equal(i8259_ack(pic), 0x27);
    assert_int_equal(isr(M0), 0);
}

/* The same by a mask that is set between request and INTA; the request itself stays in the IRR. */
static void masked_between_request_and_ack_is_spurious(void **state UNUSED)
{
    irq(3, 1);
    out8(&bench, M1, 0xff);
    assert_int_equal(i8259_ack(pic), 0x27);
    assert_int_equal(isr(M0), 0);
    assert_int_equal(irr(M0), 0x08);
}

/* ELCR: 0x4d0 and 0x4d1; IRQ 0, 1, 2, 8, 13 cannot be made level-triggered. */
static void levels_stay_requested(void **state UNUSED)
{
    out8(&bench, 0x4d0, 0xff);
    out8(&bench, 0x4d1, 0xff);
    assert_int_equal(bus_read(bench.pio, 0x4d0, 2), 0xdef8);
    out8(&bench, 0x4d0, 0x00);
    out8(&bench, 0x4d1, 0x08);
    irq(11, 1);
    assert_int_equal(i8259_ack(pic), 0x73);
    out8(&bench, S0, 0x20);
    out8(&bench, M0, 0x20);
    assert_int_equal(intr.level, 1); /* still asserted: again */
    assert_int_equal(i8259_ack(pic), 0x73);
    irq(11, 0);
    out8(&bench, S0, 0x20);
    out8(&bench, M0, 0x20);
    assert_int_equal(intr.level, 0);
}

/* "Automatic rotation", OCW2 "rotate on non-specific EOI": the served level becomes the lowest. */
static void rotation_on_eoi(void **state UNUSED)
{
    irq(3, 1);
    i8259_ack(pic);
    out8(&bench, M0, 0xa0);
    irq(4, 1);
    pulse(3);
    irq(0, 1);
    assert_int_equal(i8259_ack(pic), 0x24); /* 4 is highest now: 4 5 6 7 0 1 2 3 */
    out8(&bench, M0, 0x20);
    assert_int_equal(i8259_ack(pic), 0x20);
    out8(&bench, M0, 0x20);
    assert_int_equal(i8259_ack(pic), 0x23);
}

static void priority_can_be_set(void **state UNUSED)
{
    out8(&bench, M0, 0xc5); /* IR5 lowest, IR6 highest */
    irq(0, 1);
    irq(6, 1);
    assert_int_equal(i8259_ack(pic), 0x26);
    assert_int_equal(intr.level, 0); /* IR0 is below IR6 now */
    out8(&bench, M0, 0xe6); /* rotate on specific EOI: IR6 lowest */
    pulse(6);
    irq(7, 1);
    assert_int_equal(i8259_ack(pic), 0x27);
}

/* "Special mask mode": a masked level in service does not hold up lower ones, and a non-specific EOI passes over it. */
static void special_mask_opens_lower_levels(void **state UNUSED)
{
    irq(3, 1);
    i8259_ack(pic);
    irq(5, 1);
    assert_int_equal(intr.level, 0);
    out8(&bench, M1, 0x08);
    out8(&bench, M0, 0x68);
    assert_int_equal(i8259_ack(pic), 0x25);
    out8(&bench, M0, 0x20);
    assert_int_equal(isr(M0), 0x08);
    out8(&bench, M0, 0x48); /* mode off: IR3 counts again */
    pulse(5);
    assert_int_equal(intr.level, 0);
}

/* "Automatic end of interrupt": no bit in the ISR; further requests make INTR rise again. */
static void automatic_eoi(void **state UNUSED)
{
    unsigned rises;

    init(0x03);
    irq(3, 1);
    irq(5, 1);
    rises = intr.rises;
    assert_int_equal(i8259_ack(pic), 0x23);
    assert_int_equal(isr(M0), 0);
    assert_int_equal(intr.level, 1);
    assert_int_equal(intr.rises, rises + 1);
    assert_int_equal(i8259_ack(pic), 0x25);
    assert_int_equal(intr.level, 0);
    out8(&bench, M0, 0x80); /* rotate in automatic EOI */
    pulse(3);
    i8259_ack(pic);
    pulse(3);
    pulse(4);
    assert_int_equal(i8259_ack(pic), 0x24);
}

/* "Poll command": the next read is an INTA; bit 7 says whether there was a request. */
static void polling_acknowledges(void **state UNUSED)
{
    out8(&bench, M0, 0x0c);
    assert_int_equal(in8(&bench, M0) & 0x80, 0);
    irq(6, 1);
    out8(&bench, M0, 0x0c);
    assert_int_equal(in8(&bench, M0), 0x86);
    assert_int_equal(isr(M0), 0x40);
    assert_int_equal(intr.level, 0);
    assert_int_equal(in8(&bench, M1), 0); /* polls are for one read only */
}

/* ICW1 "clears": edges before it are forgotten, the mask is open, a line that stays high needs a new edge. */
static void initialization_forgets_edges(void **state UNUSED)
{
    irq(3, 1);
    out8(&bench, M1, 0xff);
    init(0x01);
    assert_int_equal(in8(&bench, M1), 0);
    assert_int_equal(irr(M0), 0);
    assert_int_equal(intr.level, 0);
    pulse(3);
    assert_int_equal(i8259_ack(pic), 0x23);
}

/* ICW1 without IC4: three words only, and ICW4's functions are off. */
static void icw4_is_optional(void **state UNUSED)
{
    init(0x03);
    out8(&bench, M0, 0x10);
    out8(&bench, M1, 0x40);
    out8(&bench, M1, 0x04);
    out8(&bench, M1, 0x55); /* the mask already */
    assert_int_equal(in8(&bench, M1), 0x55);
    irq(3, 1);
    assert_int_equal(i8259_ack(pic), 0x43);
    assert_int_equal(isr(M0), 0x08);
}

static void its_state_can_be_moved(void **state UNUSED)
{
    struct bench other;
    struct i8259 *copy;
    struct wire w = { 0 };

    out8(&bench, 0x4d1, 0x08);
    irq(11, 1);
    irq(4, 1);
    i8259_ack(pic); /* IR2 before IR4 */
    out8(&bench, M1, 0x02);
    bench_open(&other);
    assert_int_equal(i8259_new(other.pio, wire_line(&w), &copy), 0);
    chip_transplant(pic, copy);
    out8(&other, S0, 0x20);
    out8(&other, M0, 0x20);
    assert_int_equal(i8259_ack(copy), 0x73);
    assert_int_equal(in8(&other, M1), 0x02);
    chip_free(copy);
    bench_close(&other);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_request_is_acknowledged_and_ended), T(higher_priorities_interrupt_lower_ones), T(masked_requests_wait),
        T(the_slave_answers_through_the_master), T(special_fully_nested_lets_the_slave_through), T(a_withdrawn_request_is_spurious),
        T(masked_between_request_and_ack_is_spurious), T(levels_stay_requested), T(rotation_on_eoi), T(priority_can_be_set),
        T(special_mask_opens_lower_levels), T(automatic_eoi), T(polling_acknowledges), T(initialization_forgets_edges), T(icw4_is_optional),
        T(its_state_can_be_moved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
