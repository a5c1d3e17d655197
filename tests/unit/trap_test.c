/* trap.c against SDM vol. 3A tables 6-1 and 6-5. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cpu/trap.h"

static void names(void **state)
{
    (void)state;
    assert_string_equal(trap_name(VEC_DE), "#DE");
    assert_string_equal(trap_name(VEC_PF), "#PF");
    assert_string_equal(trap_name(VEC_CP), "#CP");
    assert_string_equal(trap_name(15), "vector 0x0f");
    assert_string_equal(trap_name(22), "vector 0x16");
    assert_string_equal(trap_name(0x20), "vector 0x20");
    assert_string_equal(trap_name(0xff), "vector 0xff");
    assert_non_null(trap_name(256));
}

static void error_codes(void **state)
{
    (void)state;
    static const unsigned with[] = {VEC_DF, VEC_TS, VEC_NP, VEC_SS, VEC_GP, VEC_PF, VEC_AC, VEC_CP};
    for (unsigned v = 0; v < 256; v++) {
        bool expected = false;
        for (unsigned i = 0; i < ARRAY_SIZE(with); i++)
            expected |= with[i] == v;
        assert_int_equal(trap_has_error(v), expected);
    }
}

static void contributory_pairs(void **state)
{
    (void)state;
    static const unsigned contributory[] = {VEC_DE, VEC_TS, VEC_NP, VEC_SS, VEC_GP};
    for (unsigned i = 0; i < ARRAY_SIZE(contributory); i++) {
        for (unsigned j = 0; j < ARRAY_SIZE(contributory); j++)
            assert_int_equal(trap_combine(contributory[i], contributory[j]), TRAP_DOUBLE);
        assert_int_equal(trap_combine(contributory[i], VEC_PF), TRAP_SERIAL);
        assert_int_equal(trap_combine(VEC_PF, contributory[i]), TRAP_DOUBLE);
        assert_int_equal(trap_combine(VEC_DF, contributory[i]), TRAP_TRIPLE);
        assert_int_equal(trap_combine(VEC_UD, contributory[i]), TRAP_SERIAL);
        assert_int_equal(trap_combine(contributory[i], VEC_UD), TRAP_SERIAL);
    }
}

static void page_fault_pairs(void **state)
{
    (void)state;
    assert_int_equal(trap_combine(VEC_PF, VEC_PF), TRAP_DOUBLE);
    assert_int_equal(trap_combine(VEC_DF, VEC_PF), TRAP_TRIPLE);
    assert_int_equal(trap_combine(VEC_PF, VEC_DB), TRAP_SERIAL);
    assert_int_equal(trap_combine(VEC_DF, VEC_DB), TRAP_SERIAL);
    assert_int_equal(trap_combine(VEC_NMI, VEC_PF), TRAP_SERIAL);
    assert_int_equal(trap_combine(0x80, VEC_GP), TRAP_SERIAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names),
        cmocka_unit_test(error_codes),
        cmocka_unit_test(contributory_pairs),
        cmocka_unit_test(page_fault_pairs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
