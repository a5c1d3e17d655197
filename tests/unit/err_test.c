/* base/err: the last message per thread, composed messages, the log's sink. */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/err.h"

static void returns_the_code_and_keeps_the_message(void **state UNUSED)
{
    errno = ENOENT;
    assert_int_equal(err(-EIO, "disk %s: block %d", "a.img", 7), -EIO);
    assert_string_equal(err_last(), "disk a.img: block 7");
    assert_int_equal(errno, ENOENT);
}

/* Messages are composed of earlier ones: the source and the destination are then the same buffer. */
static void a_message_may_quote_the_last_one(void **state UNUSED)
{
    err(-EIO, "cannot read");
    err(-EIO, "kernel %s: %s", "k", err_last());
    assert_string_equal(err_last(), "kernel k: cannot read");
}

static void a_long_message_is_cut(void **state UNUSED)
{
    char big[5000];

    memset(big, 'x', sizeof(big) - 1);
    big[sizeof(big) - 1] = 0;
    err(-EINVAL, "%s", big);
    assert_int_equal(strlen(err_last()), 1023);
}

static void *other_thread(void *arg)
{
    *(char *)arg = err_last()[0];
    err(-EPERM, "other");
    return NULL;
}

static void threads_have_their_own(void **state UNUSED)
{
    pthread_t t;
    char first = 'x';

    err(-EIO, "mine");
    pthread_create(&t, NULL, other_thread, &first);
    pthread_join(t, NULL);
    assert_int_equal(first, 0);
    assert_string_equal(err_last(), "mine");
}

static char logged[64];
static enum log_level logged_level;

static void sink(void *arg, enum log_level level, const char *msg)
{
    snprintf(logged, sizeof(logged), "%s%s", (const char *)arg, msg);
    logged_level = level;
}

static void the_log_goes_to_its_sink(void **state UNUSED)
{
    struct log log = { sink, "> " };

    log_msg(&log, LOG_WARN, "disk %d", 3);
    assert_string_equal(logged, "> disk 3");
    assert_int_equal(logged_level, LOG_WARN);
    log_msg(NULL, LOG_ERROR, "nobody listens");
    log_msg(&(struct log){ 0 }, LOG_ERROR, "nobody listens");
    assert_string_equal(logged, "> disk 3");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(returns_the_code_and_keeps_the_message),
        cmocka_unit_test(a_message_may_quote_the_last_one),
        cmocka_unit_test(a_long_message_is_cut),
        cmocka_unit_test(threads_have_their_own),
        cmocka_unit_test(the_log_goes_to_its_sink),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
