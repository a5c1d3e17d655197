/* ACPI tables: every table is found from the RSDP, sums to zero and says what the board said; ACPICA's disassembler
 * reads all of the AML. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/err.h"
#include "vm/acpi.h"

static struct ram ram;
static const struct acpi_config board = {
    .vcpus = 3,
    .lapic_base = 0xfee00000,
    .ioapic_base = 0xfec00000,
    .ioapic_id = 7,
    .sci_irq = 9,
    .pm1_evt = 0x600,
    .pm1_cnt = 0x604,
    .pm_timer = 0x608,
    .pm_timer_32bit = true,
    .gpe0 = 0x620,
    .gpe0_len = 16,
    .s5_typ = 5,
    .reset_port = 0xcf9,
    .reset_value = 6,
    .rtc_century = 0x32,
    .i8042 = true,
    .ecam_base = 0xe0000000,
    .buses = 1,
    .pci_io = { { 0xc000, 0x4000 } },
    .pci_mem32 = { { 0xc0000000, 0x20000000 }, { 0xe0100000, 0x1eb00000 } },
    .pci_mem64 = { 0x8000000000, 0x4000000000 },
    .pci_gsi = { 16, 17, 18, 19 },
    .pci_irq = { 10, 11, 10, 11 },
    .serial = { { 0x3f8, 4 }, { 0x2f8, 3 } },
    .pvpanic_port = 0x505,
    .rtc = true,
    .pit = true,
};

static int setup(void **state)
{
    (void)state;
    return ram_init(&ram) || ram_add(&ram, 0, 0xa0000) || ram_add(&ram, 0xc0000, 0x140000);
}

static int teardown(void **state)
{
    (void)state;
    ram_close(&ram);
    return 0;
}

static u64 peek(u64 gpa, unsigned size)
{
    u64 v = 0;
    assert_int_equal(ram_read(&ram, gpa, &v, size), 0);
    return v;
}

static u8 sum(u64 gpa, u64 len)
{
    u8 s = 0;
    for (u64 i = 0; i < len; i++)
        s += (u8)peek(gpa + i, 1);
    return s;
}

/* The table with that signature by way of the XSDT, checked; 0 if there is none. */
static u64 table(u64 rsdp, const char *signature)
{
    u64 xsdt = peek(rsdp + 24, 8), found = 0;

    assert_int_equal(sum(xsdt, peek(xsdt + 4, 4)), 0);
    for (u64 at = xsdt + 36; at < xsdt + peek(xsdt + 4, 4); at += 8) {
        u64 gpa = peek(at, 8);
        u32 have = (u32)peek(gpa, 4);
        assert_in_range(gpa, ACPI_BASE, ACPI_BASE + ACPI_SIZE - 36);
        assert_int_equal(sum(gpa, peek(gpa + 4, 4)), 0);
        if (!memcmp(&have, signature, 4))
            found = gpa;
    }
    return found;
}

static void test_roots(void **state)
{
    u64 rsdp = 0;
    (void)state;

    assert_int_equal(acpi_write(&ram, &board, &rsdp), 0);
    assert_int_equal(rsdp, 0xe0000);
    assert_int_equal(peek(rsdp, 8), 0x2052545020445352); /* "RSD PTR " */
    assert_int_equal(sum(rsdp, 20), 0);
    assert_int_equal(sum(rsdp, 36), 0);
    assert_int_not_equal(table(rsdp, "FACP"), 0);
    assert_int_not_equal(table(rsdp, "APIC"), 0);
    assert_int_not_equal(table(rsdp, "MCFG"), 0);
    u64 rsdt = peek(rsdp + 16, 4), xsdt = peek(rsdp + 24, 8);
    assert_int_equal(sum(rsdt, peek(rsdt + 4, 4)), 0);
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(peek(rsdt + 36 + 4 * i, 4), peek(xsdt + 36 + 8 * i, 8));
}

/* Offsets: ACPI 6.4 table 5.9. */
static void test_fadt(void **state)
{
    u64 rsdp, f;
    (void)state;

    assert_int_equal(acpi_write(&ram, &board, &rsdp), 0);
    f = table(rsdp, "FACP");
    assert_int_equal(peek(f + 4, 4), 276);
    assert_int_equal(peek(f + 36, 4) % 64, 0);           /* FACS is aligned */
    assert_int_equal(peek(peek(f + 36, 4), 4), 0x53434146);
    assert_int_equal(peek(f + 40, 4), peek(f + 140, 8)); /* DSDT, X_DSDT */
    u64 dsdt = peek(f + 40, 4);
    assert_int_equal(peek(dsdt, 4), 0x54445344);
    assert_int_equal(sum(dsdt, peek(dsdt + 4, 4)), 0);
    assert_int_equal(peek(f + 46, 2), 9);                /* SCI_INT */
    assert_int_equal(peek(f + 56, 4), 0x600);            /* PM1a_EVT_BLK */
    assert_int_equal(peek(f + 64, 4), 0x604);
    assert_int_equal(peek(f + 76, 4), 0x608);
    assert_int_equal(peek(f + 80, 4), 0x620);
    assert_int_equal(peek(f + 92, 1), 16);               /* GPE0_BLK_LEN */
    assert_int_equal(peek(f + 108, 1), 0x32);            /* CENTURY */
    assert_int_equal(peek(f + 109, 2), 1 | 2 | 4);       /* legacy devices, 8042, no VGA */
    u32 flags = (u32)peek(f + 112, 4);
    assert_int_equal(flags & (1 << 4), 0);               /* the power button is fixed hardware */
    assert_int_equal(flags & (1 << 20), 0);              /* not hardware-reduced */
    assert_true(flags & (1 << 10) && flags & (1 << 8));  /* reset register, 32-bit timer */
    assert_int_equal(peek(f + 116, 1), 1);               /* RESET_REG: I/O space */
    assert_int_equal(peek(f + 120, 8), 0xcf9);
    assert_int_equal(peek(f + 128, 1), 6);
    assert_int_equal(peek(f + 152, 8), 0x600);           /* X_PM1a_EVT_BLK */
}

static unsigned madt_count(u64 madt, unsigned type)
{
    unsigned n = 0;
    u64 at = madt + 44, end = madt + peek(madt + 4, 4);

    while (at < end) {
        n += peek(at, 1) == type;
        assert_true(peek(at + 1, 1) >= 2);
        at += peek(at + 1, 1);
    }
    assert_int_equal(at, end);
    return n;
}

static void test_madt(void **state)
{
    struct acpi_config many = board;
    u64 rsdp, m;
    (void)state;

    assert_int_equal(acpi_write(&ram, &board, &rsdp), 0);
    m = table(rsdp, "APIC");
    assert_int_equal(peek(m + 36, 4), 0xfee00000);
    assert_int_equal(madt_count(m, 0), 3);
    assert_int_equal(madt_count(m, 1), 1);
    assert_int_equal(madt_count(m, 2), 2);
    assert_int_equal(madt_count(m, 4), 1);
    assert_int_equal(madt_count(m, 9), 0);
    u64 io = m + 44 + 3 * 8;
    assert_int_equal(peek(io + 2, 1), 7);
    assert_int_equal(peek(io + 4, 4), 0xfec00000);
    assert_int_equal(peek(io + 12 + 3, 1), 0);          /* IRQ 0 is on input 2 */
    assert_int_equal(peek(io + 12 + 4, 4), 2);
    assert_int_equal(peek(io + 22 + 3, 1), 9);          /* the SCI: level, active high */
    assert_int_equal(peek(io + 22 + 8, 2), 0xd);

    many.vcpus = 300;                                   /* IDs from 255 up need x2APIC entries */
    assert_int_equal(acpi_write(&ram, &many, &rsdp), 0);
    m = table(rsdp, "APIC");
    assert_int_equal(madt_count(m, 0), 255);
    assert_int_equal(madt_count(m, 9), 45);
    assert_int_equal(madt_count(m, 10), 1);

    many.vcpus = 100000;
    assert_int_equal(acpi_write(&ram, &many, &rsdp), -ENOSPC);
    assert_non_null(strstr(err_last(), "--cpus"));
}

static void test_mcfg(void **state)
{
    struct acpi_config none = board;
    u64 rsdp, m;
    (void)state;

    assert_int_equal(acpi_write(&ram, &board, &rsdp), 0);
    m = table(rsdp, "MCFG");
    assert_int_equal(peek(m + 44, 8), 0xe0000000);
    assert_int_equal(peek(m + 55, 1), 0);
    none.ecam_base = 0;
    assert_int_equal(acpi_write(&ram, &none, &rsdp), 0);
    assert_int_equal(table(rsdp, "MCFG"), 0);
}

/* Firmware's part: files by name, commands of 128 bytes carried out one after the other (SeaBIOS's src/fw/romfile_loader.c). */
struct file {
    char name[56];
    u8 data[65536];
    u32 len;
    u64 gpa;
};
static struct file file[3];
static unsigned files;

static int add_file(void *arg, const char *name, const void *p, u32 len)
{
    struct file *f = &file[files++];

    assert_true(arg == &files && files <= 3 && len <= sizeof f->data);
    strcpy(f->name, name);
    memcpy(f->data, p, len);
    f->len = len;
    f->gpa = 0;
    return 0;
}

static struct file *named(const char *name)
{
    for (unsigned i = 0; i < files; i++)
        if (!strcmp(file[i].name, name))
            return &file[i];
    fail_msg("no file %s", name);
    return NULL;
}

static u32 le32(const u8 *p)
{
    u32 v;
    memcpy(&v, p, 4);
    return v;
}

static void carry_out(const u8 *e)
{
    struct file *f = named((const char *)e + 4), *src;
    u32 offset = le32(e + 60);
    u64 v = 0;

    switch (le32(e)) {
    case 1:
        f->gpa = e[64] == 2 ? ACPI_BASE : ACPI_BASE + 0x3340;
        assert_int_equal(f->gpa % offset, 0);
        break;
    case 2:
        src = named((const char *)e + 60);
        offset = le32(e + 116);
        assert_true(src->gpa && offset + e[120] <= f->len);
        memcpy(&v, f->data + offset, e[120]);
        assert_in_range(v, 0, src->len - 36);
        v += src->gpa;
        memcpy(f->data + offset, &v, e[120]);
        break;
    case 3:
        assert_true(le32(e + 64) + le32(e + 68) <= f->len && offset < f->len);
        assert_int_equal(f->data[offset], 0);                      /* some loaders count it, some do not */
        for (u32 i = 0; i < le32(e + 68); i++)
            v += f->data[le32(e + 64) + i];
        f->data[offset] = (u8)-v;
        break;
    default:
        fail_msg("command %u", le32(e));
    }
}

/* After the firmware has placed and joined them, they are the tables that the monitor writes itself. */
static void test_export(void **state)
{
    static const char *const tables[] = { "FACP", "APIC", "MCFG" };
    u64 own, rsdp, at, facs, dsdt;
    struct acpi_config many = board;
    (void)state;

    files = 0;
    assert_int_equal(acpi_export(&board, add_file, &files), 0);
    assert_int_equal(files, 3);
    for (u32 i = 0; i < named("etc/table-loader")->len; i += 128)
        carry_out(named("etc/table-loader")->data + i);
    u32 len[3];
    assert_int_equal(acpi_write(&ram, &board, &own), 0);
    for (unsigned i = 0; i < 3; i++)
        len[i] = (u32)peek(table(own, tables[i]) + 4, 4);
    for (unsigned i = 0; i < files; i++)
        if (file[i].gpa)
            assert_int_equal(ram_write(&ram, file[i].gpa, file[i].data, file[i].len), 0);
    rsdp = named("etc/acpi/rsdp")->gpa;
    assert_int_equal(rsdp, ACPI_BASE);
    assert_int_equal(sum(rsdp, 20), 0);
    assert_int_equal(sum(rsdp, 36), 0);
    assert_int_equal(sum(peek(rsdp + 16, 4), peek(peek(rsdp + 16, 4) + 4, 4)), 0);
    for (unsigned i = 0; i < 3; i++) {
        at = table(rsdp, tables[i]);
        assert_true(at >= ACPI_BASE + 0x3340);
        assert_int_equal(peek(at + 4, 4), len[i]);
    }
    at = table(rsdp, "FACP");
    facs = peek(at + 36, 4);
    dsdt = peek(at + 40, 4);
    assert_int_equal(peek(facs, 4), 0x53434146);
    assert_int_equal(facs % 64, 0);
    assert_int_equal(peek(at + 140, 8), dsdt);
    assert_int_equal(peek(dsdt, 4), 0x54445344);
    assert_int_equal(sum(dsdt, peek(dsdt + 4, 4)), 0);
    many.vcpus = 8000;
    assert_int_equal(acpi_export(&many, add_file, &files), -ENOSPC);
}

static void test_no_memory(void **state)
{
    struct ram small;
    u64 rsdp;
    (void)state;

    assert_int_equal(ram_init(&small) || ram_add(&small, 0, 0xa0000), 0);
    assert_int_equal(acpi_write(&small, &board, &rsdp), -EFAULT);
    ram_close(&small);
}

/* ACPICA's own disassembler, then its compiler on what came out: no errors, and the objects that systems look for. */
static void test_disassembler(void **state)
{
    static const char *const want[] = {
        "Name (\\_S5, Package (0x04)",
        "Device (PCI0)",
        "EisaId (\"PNP0A03\")",
        "Method (_PRT, 0",
        "Method (\\_PIC, 1",
        "EisaId (\"PNP0501\")",
        "EisaId (\"PNP0B00\")",
        "EisaId (\"PNP0303\")",
        "\"QEMU0001\"",
        "WordIO (ResourceProducer",
        "DWordMemory (ResourceProducer",
        "QWordMemory (ResourceProducer",
        "0x0505",
        "0x0013FFFF",
    };
    char dir[] = "/tmp/doppel-acpi-XXXXXX", cmd[256], text[400000];
    u8 aml[32768];
    u64 rsdp, dsdt, len;
    (void)state;

    if (system("command -v iasl >/dev/null 2>&1")) {
        print_message("# skip: iasl is not installed (package acpica-tools)\n");
        skip();
    }
    assert_int_equal(acpi_write(&ram, &board, &rsdp), 0);
    dsdt = peek(table(rsdp, "FACP") + 40, 4);
    len = peek(dsdt + 4, 4);
    assert_in_range(len, 36, sizeof aml);
    assert_int_equal(ram_read(&ram, dsdt, aml, len), 0);
    assert_non_null(mkdtemp(dir));
    snprintf(cmd, sizeof cmd, "%s/dsdt.dat", dir);
    FILE *f = fopen(cmd, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(aml, 1, len, f), len);
    fclose(f);
    snprintf(cmd, sizeof cmd,
             "cd %s && iasl -d dsdt.dat >log 2>&1 && iasl -p again dsdt.dsl >>log 2>&1 && ! grep -q 'Error ' log", dir);
    assert_int_equal(system(cmd), 0);
    snprintf(cmd, sizeof cmd, "%s/dsdt.dsl", dir);
    f = fopen(cmd, "r");
    assert_non_null(f);
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    for (unsigned i = 0; i < ARRAY_SIZE(want); i++)
        if (!strstr(text, want[i]))
            fail_msg("the DSDT has no %s", want[i]);
    snprintf(cmd, sizeof cmd, "rm -r %s", dir);
    assert_int_equal(system(cmd), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_roots, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fadt, setup, teardown),
        cmocka_unit_test_setup_teardown(test_madt, setup, teardown),
        cmocka_unit_test_setup_teardown(test_mcfg, setup, teardown),
        cmocka_unit_test_setup_teardown(test_export, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(test_disassembler, setup, teardown),
    };
    return cmocka_run_group_tests_name("acpi", tests, NULL, NULL);
}
