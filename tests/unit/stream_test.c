/* base/stream: what is saved is loaded; bad input is an error that sticks and changes nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/err.h"
#include "base/stream.h"

struct thing {
    u8 a;
    u16 b;
    u32 c;
    u64 d;
    bool e;
    char f[5];
};

static void thing_state(struct thing *t, struct stream *s)
{
    stream_section(s, "thing", 2);
    stream_u8(s, &t->a);
    stream_u16(s, &t->b);
    stream_u32(s, &t->c);
    stream_u64(s, &t->d);
    stream_bool(s, &t->e);
    stream_bytes(s, t->f, sizeof(t->f));
}

static const struct thing example = { 0x11, 0x2233, 0x44556677, 0x8899aabbccddeeff, true, "text" };

static void save(struct stream *s, struct thing t)
{
    stream_save_init(s);
    thing_state(&t, s);
    assert_int_equal(s->error, 0);
}

static void what_is_saved_is_loaded(void **state UNUSED)
{
    struct stream s, l;
    struct thing t = { 0 };

    save(&s, example);
    stream_load_init(&l, s.buf, s.len);
    thing_state(&t, &l);
    assert_int_equal(l.error, 0);
    assert_int_equal(l.pos, l.len);
    assert_true(t.a == example.a && t.b == example.b && t.c == example.c && t.d == example.d && t.e == example.e && !strcmp(t.f, example.f));
    stream_free(&l);
    stream_free(&s);
}

static void numbers_are_little_endian_and_packed(void **state UNUSED)
{
    static const u8 want[] = { 5, 't', 'h', 'i', 'n', 'g', 2, 0, 0, 0, 0x11, 0x33, 0x22, 0x77, 0x66, 0x55, 0x44 };
    struct stream s;

    save(&s, example);
    assert_memory_equal(s.buf, want, sizeof(want));
    assert_int_equal(s.len, sizeof(want) + 8 + 1 + 5);
    stream_free(&s);
}

/* Every possible truncation: an error, and no variable beyond the cut is touched. */
static void a_truncated_stream_is_an_error(void **state UNUSED)
{
    struct stream s, l;

    save(&s, example);
    for (size_t cut = 0; cut < s.len; cut++) {
        struct thing t = { .f = "keep" };

        stream_load_init(&l, s.buf, cut);
        thing_state(&t, &l);
        assert_true(l.error < 0);
        assert_string_equal(t.f, "keep");
        assert_true(strlen(err_last()) > 0);
    }
    stream_free(&s);
}

static void names_and_versions_are_checked(void **state UNUSED)
{
    struct stream s, l;
    u32 v;

    save(&s, example);
    stream_load_init(&l, s.buf, s.len);
    assert_int_equal(stream_section(&l, "other", 2), 0);
    assert_true(l.error < 0);

    stream_load_init(&l, s.buf, s.len); /* saved by a newer program */
    assert_int_equal(stream_section(&l, "thing", 1), 0);
    assert_true(l.error < 0);

    stream_load_init(&l, s.buf, s.len); /* saved by an older one: the caller learns the version */
    v = stream_section(&l, "thing", 3);
    assert_int_equal(v, 2);
    assert_int_equal(l.error, 0);

    s.buf[0] = 200; /* a length beyond any name */
    stream_load_init(&l, s.buf, s.len);
    assert_int_equal(stream_section(&l, "thing", 2), 0);
    stream_free(&s);
}

static void a_bad_truth_value_is_an_error(void **state UNUSED)
{
    u8 byte = 2;
    bool v = true;
    struct stream l;

    stream_load_init(&l, &byte, 1);
    stream_bool(&l, &v);
    assert_true(l.error < 0);
    assert_true(v);
}

static void the_first_error_sticks(void **state UNUSED)
{
    u8 bytes[8] = { 1, 2, 3 }, v = 9;
    struct stream l;

    stream_load_init(&l, bytes, sizeof(bytes));
    stream_bad(&l, "this makes no sense");
    stream_u8(&l, &v);
    assert_int_equal(v, 9);
    assert_int_equal(l.pos, 0);
    assert_non_null(strstr(err_last(), "this makes no sense"));
}

static void big_states_grow_the_buffer(void **state UNUSED)
{
    struct stream s;
    u64 sum = 0;

    stream_save_init(&s);
    for (u64 i = 0; i < 100000; i++)
        stream_u64(&s, &i);
    assert_int_equal(s.len, 800000);
    for (u64 i = 0; i < 100000; i++)
        sum += ((u64 *)s.buf)[i];
    assert_int_equal(sum, 99999ull * 100000 / 2);
    stream_free(&s);
}

static void digests_differ_when_states_do(void **state UNUSED)
{
    struct stream a, b, c;
    struct thing other = example;

    other.d ^= 1;
    save(&a, example);
    save(&b, example);
    save(&c, other);
    assert_true(stream_digest(&a) == stream_digest(&b));
    assert_true(stream_digest(&a) != stream_digest(&c));
    stream_free(&a);
    stream_free(&b);
    stream_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_saved_is_loaded),       cmocka_unit_test(numbers_are_little_endian_and_packed),
        cmocka_unit_test(a_truncated_stream_is_an_error), cmocka_unit_test(names_and_versions_are_checked),
        cmocka_unit_test(a_bad_truth_value_is_an_error),  cmocka_unit_test(the_first_error_sticks),
        cmocka_unit_test(big_states_grow_the_buffer),     cmocka_unit_test(digests_differ_when_states_do),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
