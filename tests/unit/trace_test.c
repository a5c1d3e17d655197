/* base/trace: the list on the command line, the form of a line, nothing when off. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/err.h"
#include "base/trace.h"

static void lists_are_parsed(void **state UNUSED)
{
    u32 m = 0;

    assert_int_equal(trace_parse("exits,faults,interrupts,msr,pio,mmio,cr3,insn", &m), 0);
    assert_int_equal(m, 0xff);
    assert_int_equal(trace_parse("all", &m), 0);
    assert_int_equal(m, 0xff);
    assert_int_equal(trace_parse("mmio,pio", &m), 0);
    assert_int_equal(m, TRACE_MMIO | TRACE_PIO);
    assert_int_equal(trace_parse("", &m), 0);
    assert_int_equal(m, 0);
}

static void bad_words_are_named_and_change_nothing(void **state UNUSED)
{
    static const char *const bad[] = { "pi", "pioo", "pio,,mmio", "pio,irq", "ALL", " pio" };
    u32 m = 42;

    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        assert_true(trace_parse(bad[i], &m) < 0);
    assert_int_equal(m, 42);
    trace_parse("pio,nonsense", &m);
    assert_non_null(strstr(err_last(), "nonsense"));
    assert_null(strstr(err_last(), "\"pio"));
}

static char *text;
static size_t text_len;

static unsigned arguments_taken;

static unsigned argument(void)
{
    return ++arguments_taken;
}

static void a_line_has_who_and_what(void **state UNUSED)
{
    struct trace t = { .mask = TRACE_PIO };
    const char *p;

    t.file = open_memstream(&text, &text_len);
    trace(&t, TRACE_PIO, 3, "out 0x%x <- 0x%x", 0x70, argument());
    trace(&t, TRACE_PIO, -1, "second");
    fclose(t.file);
    p = strstr(text, "cpu3");
    assert_non_null(p);
    assert_non_null(strstr(p, "pio"));
    assert_non_null(strstr(p, "out 0x70 <- 0x1\n"));
    assert_non_null(strstr(p, "loop"));
    assert_int_equal(text[text_len - 1], '\n');
    free(text);
}

static void off_is_silent_and_takes_no_arguments(void **state UNUSED)
{
    struct trace t = { .mask = TRACE_PIO }, *none = NULL;

    arguments_taken = 0;
    t.file = open_memstream(&text, &text_len);
    trace(&t, TRACE_MMIO, 0, "%u", argument());
    trace(none, TRACE_PIO, 0, "%u", argument());
    fclose(t.file);
    assert_int_equal(text_len, 0);
    assert_int_equal(arguments_taken, 0);
    free(text);
}

static void a_long_line_is_cut_and_still_a_line(void **state UNUSED)
{
    struct trace t = { .mask = TRACE_INSN };
    char big[2000];

    memset(big, 'y', sizeof(big) - 1);
    big[sizeof(big) - 1] = 0;
    t.file = open_memstream(&text, &text_len);
    trace(&t, TRACE_INSN, 0, "%s", big);
    fclose(t.file);
    assert_true(text_len < 600);
    assert_int_equal(text[text_len - 1], '\n');
    assert_int_equal(text[text_len - 2], 'y');
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lists_are_parsed),
        cmocka_unit_test(bad_words_are_named_and_change_nothing),
        cmocka_unit_test(a_line_has_who_and_what),
        cmocka_unit_test(off_is_silent_and_takes_no_arguments),
        cmocka_unit_test(a_long_line_is_cut_and_still_a_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
