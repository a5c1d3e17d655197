/*
 * The MP table (vm/mptable) read as an operating system does: found by signature, checksums, entries counted by
 * kind.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "base/err.h"
#include "vm/mptable.h"

static const struct acpi_config config = {
    .lapic_base = 0xfee00000, .ioapic_base = 0xfec00000, .sci_irq = 9, .pci_gsi = { 16, 17, 18, 19 },
};

static u8 area[MPTABLE_SIZE];

static void write_table(unsigned vcpus)
{
    struct acpi_config c = config;
    struct ram ram;

    c.vcpus = vcpus;
    c.ioapic_id = (u8)vcpus;
    assert_int_equal(ram_init(&ram), 0);
    assert_int_equal(ram_add(&ram, MPTABLE_BASE, MPTABLE_SIZE), 0);
    assert_int_equal(mptable_write(&ram, &c), 0);
    assert_int_equal(ram_read(&ram, MPTABLE_BASE, area, sizeof area), 0);
    ram_close(&ram);
}

static u32 get(u32 at, unsigned n)
{
    u32 v = 0;

    memcpy(&v, area + at, n);
    return v;
}

static u8 sum(u32 at, u32 n)
{
    u8 s = 0;

    while (n--)
        s += area[at + n];
    return s;
}

static void check(unsigned vcpus)
{
    static const u32 length[] = { 20, 8, 8, 8, 8 };
    unsigned count[5] = { 0 }, entries = 0, bsps = 0;
    u32 table, at, end;

    write_table(vcpus);
    assert_memory_equal(area, "_MP_", 4);
    assert_int_equal(sum(0, 16), 0);
    table = get(4, 4) - MPTABLE_BASE;
    assert_memory_equal(area + table, "PCMP", 4);
    end = table + get(table + 4, 2);
    assert_int_equal(sum(table, end - table), 0);
    assert_int_equal(get(table + 36, 4), 0xfee00000);
    for (at = table + 44; at < end; at += length[area[at]]) {
        assert_true(area[at] < 5);
        if (area[at] == 0) {
            assert_int_equal(area[at + 1], count[0]);
            bsps += (area[at + 3] & 2) != 0;
        }
        if (area[at] == 3) {
            assert_int_equal(area[at + 6], vcpus);                 /* the I/O APIC's ID */
            assert_true(area[at + 7] < 24);
            if (area[at + 4] == 0)
                assert_int_equal(area[at + 7], 16 + ((area[at + 5] >> 2) + (area[at + 5] & 3)) % 4);
            else if (area[at + 5] == 9)
                assert_int_equal(get(at + 2, 2), 0xd);
            else if (area[at + 5] == 0)
                assert_int_equal(area[at + 7], 2);
        }
        count[area[at]]++;
        entries++;
    }
    assert_int_equal(at, end);
    assert_int_equal(entries, get(table + 34, 2));
    assert_int_equal(count[0], vcpus);
    assert_int_equal(bsps, 1);
    assert_int_equal(count[1], 2);
    assert_int_equal(count[2], 1);
    assert_int_equal(count[3], 15 + 32 * 4);
    assert_int_equal(count[4], 2);
}

static void test_processors(void **state)
{
    (void)state;
    check(1);
    check(2);
    check(64);
}

static void test_no_memory(void **state)
{
    struct ram ram;
    (void)state;

    assert_int_equal(ram_init(&ram), 0);
    assert_true(mptable_write(&ram, &config) < 0);
    assert_non_null(strstr(err_last(), "--memory"));
    ram_close(&ram);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_processors), cmocka_unit_test(test_no_memory) };
    return cmocka_run_group_tests_name("mptable", tests, NULL, NULL);
}
