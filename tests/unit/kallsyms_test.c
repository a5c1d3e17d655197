/* vm/kallsyms: tables as Linux lays them out, before 6.4 and since; tables that do not fit together; base/symbols: lists, ELF files, look-up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>
#include <cmocka.h>

#include "vm/kallsyms.h"

#define BASE 0xffffffff9a000000ull
#define COUNT 3000u
#define AT 0x5000u                                                 /* where the tables begin in the buffer */

static u8 *buf;
static const size_t len = 4 * MiB;
static size_t at;

static void align(unsigned n)
{
    at = ALIGN_UP(at, (size_t)n);
}

static void put(const void *p, size_t n)
{
    assert_true(at + n <= len);
    memcpy(buf + at, p, n);
    at += n;
}

static void put32(u32 v) { put(&v, 4); }

/* Token 1 is "do_", 2 "sys_", printable ones are themselves, the rest nobody uses. */
static void token(unsigned i, char text[8])
{
    if (i == 1 || i == 2)
        strcpy(text, i == 1 ? "do_" : "sys_");
    else if (i > ' ' && i < 127)
        snprintf(text, 8, "%c", i);
    else
        snprintf(text, 8, "?%02x", i);
}

static void put_tokens(void)
{
    u16 index[256];
    char text[8];
    align(8);
    size_t begin = at;
    for (unsigned i = 0; i < 256; i++) {
        index[i] = (u16)(at - begin);
        token(i, text);
        put(text, strlen(text) + 1);
    }
    align(8);
    put(index, sizeof index);
}

/* Type and name; token 1 stands for "do_". Number 700 has a name that needs two bytes of length. */
static unsigned name_of(unsigned i, u8 out[400])
{
    unsigned n = 0;
    out[n++] = i % 7 == 3 ? 'D' : i % 2 ? 't' : 'T';
    out[n++] = 1;
    n += (unsigned)snprintf((char *)out + n, 300, "function_%u", i);
    for (unsigned k = 0; i == 700 && k < 200; k++)
        out[n++] = 'x';
    return n;
}

static void put_names(size_t markers[COUNT / 256 + 1])
{
    u8 name[400];
    align(8);
    put32(COUNT);
    align(8);
    size_t begin = at;
    for (unsigned i = 0; i < COUNT; i++) {
        unsigned n = name_of(i, name);
        u8 length[2] = {(u8)(n < 128 ? n : (n & 0x7f) | 0x80), (u8)(n >> 7)};
        if (i % 256 == 0)
            markers[i / 256] = at - begin;
        put(length, n < 128 ? 1 : 2);
        put(name, n);
    }
    align(8);
    for (unsigned i = 0; i <= (COUNT - 1) / 256; i++)
        put32((u32)markers[i]);
}

/* up: CONFIG_KALLSYMS_ABSOLUTE_PERCPU is not set. Else the first 10 are absolute. */
static u64 address_of(unsigned i, bool up)
{
    return !up && i < 10 ? 0x1000 + i : BASE + 64 * i + 0x10;
}

static void put_offsets(bool up)
{
    u64 base = BASE;
    align(8);
    for (unsigned i = 0; i < COUNT; i++) {
        u64 a = address_of(i, up);
        put32(up ? (u32)(a - BASE) : a < BASE ? (u32)a : (u32)(BASE - 1 - a));
    }
    align(8);
    put(&base, 8);
}

static void make(bool since64, bool up)
{
    size_t markers[COUNT / 256 + 1];
    memset(buf, 0, len);
    for (size_t i = 64; i < AT - 64; i++)
        buf[i] = (u8)(i * 37 | 1);                                 /* something else before them */
    at = AT;
    if (!since64)
        put_offsets(up);
    put_names(markers);
    put_tokens();
    if (since64)
        put_offsets(up);
}

static void finds_all(bool since64, bool up)
{
    struct symbols s = {0};
    char want[400];
    u8 name[400];
    u64 off;
    make(since64, up);
    assert_true(kallsyms_find(&s, buf, len) > COUNT * 3 / 4);
    for (unsigned i = 10; i < COUNT; i++) {
        unsigned n = name_of(i, name);
        if (name[0] == 'D')
            continue;
        snprintf(want, sizeof want, "do_%.*s", (int)n - 2, (char *)name + 2);
        assert_string_equal(symbols_find(&s, address_of(i, up) + 5, &off), want);
        assert_int_equal(off, 5);
    }
    symbols_free(&s);
}

static void before_linux_6_4(void **state UNUSED) { finds_all(false, false); }
static void since_linux_6_4(void **state UNUSED) { finds_all(true, false); }
static void offsets_that_count_up(void **state UNUSED) { finds_all(true, true); finds_all(false, true); }

static void nothing_there(void **state UNUSED)
{
    struct symbols s = {0};
    memset(buf, 0, len);
    assert_int_equal(kallsyms_find(&s, buf, len), 0);
    for (size_t i = 0; i < len; i++)
        buf[i] = (u8)(i * 2654435761u >> 13);
    assert_int_equal(kallsyms_find(&s, buf, len), 0);
    assert_int_equal(kallsyms_find(&s, buf, 0), 0);
    symbols_free(&s);
}

/* Whatever is written over them, and wherever the memory ends: no access outside (the sanitizers look), and mostly no symbols. */
static void tables_that_are_broken(void **state UNUSED)
{
    struct symbols s = {0};
    u32 r = 1;
    for (unsigned n = 0; n < 300; n++) {
        make(n & 1, n & 2);
        size_t end = at;
        for (unsigned k = 0; k < 1 + n % 50; k++) {
            r = r * 1664525 + 1013904223;
            buf[AT + (r >> 8) % (end - AT)] = (u8)r;
        }
        u8 *exact = malloc(end - n % 8 * 100);                     /* so that reads behind it are seen */
        memcpy(exact, buf, end - n % 8 * 100);
        kallsyms_find(&s, exact, end - n % 8 * 100);
        free(exact);
    }
    symbols_free(&s);
}

static void lists(void **state UNUSED)
{
    char path[] = "/tmp/symbols-test.XXXXXX";
    struct symbols s = {0};
    u64 off;
    int fd = mkstemp(path);
    static const char text[] = "ffffffff81000100 T second\nffffffff81000000 T first\nffffffff81000080 D data\nnonsense\n0000000000000000 A absolute\n";
    assert_true(fd >= 0 && write(fd, text, sizeof text - 1) == sizeof text - 1);
    close(fd);
    assert_int_equal(symbols_map(&s, path), 2);
    unlink(path);
    assert_string_equal(symbols_find(&s, 0xffffffff810000ff, &off), "first");
    assert_int_equal(off, 0xff);
    assert_string_equal(symbols_find(&s, 0xffffffff81000100, &off), "second");
    assert_null(symbols_find(&s, 0xffffffff80ffffff, &off));
    assert_true(symbols_map(&s, "/nonexistent/map") < 0);
    assert_true(symbols_elf(&s, "/dev/null", 0) < 0);
    symbols_free(&s);
    assert_null(symbols_find(&s, 1, &off));
    symbols_free(&s);
}

static void this_program(void **state UNUSED)
{
    struct symbols s = {0};
    u64 off;
    symbols_self(&s);
    assert_string_equal(symbols_find(&s, (u64)(uintptr_t)kallsyms_find + 1, &off), "kallsyms_find");
    assert_int_equal(off, 1);
    assert_non_null(symbols_find(&s, (u64)(uintptr_t)getpid, &off)); /* a library's */
    assert_string_equal(symbols_find(&s, getauxval(AT_SYSINFO_EHDR), &off), "[vdso]");
    assert_null(symbols_find(&s, (u64)(uintptr_t)&s, &off));       /* no code */
    symbols_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(before_linux_6_4),
        cmocka_unit_test(since_linux_6_4),
        cmocka_unit_test(offsets_that_count_up),
        cmocka_unit_test(nothing_there),
        cmocka_unit_test(tables_that_are_broken),
        cmocka_unit_test(lists),
        cmocka_unit_test(this_program),
    };
    buf = malloc(len);
    int r = cmocka_run_group_tests_name("kallsyms", tests, NULL, NULL);
    free(buf);
    return r;
}
