/* base/loop: posted work in order and from other threads, watches that are deleted while their events are on their way, stopping. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/loop.h"

static struct loop *loop;
static char order[64];

static int setup(void **state UNUSED)
{
    order[0] = 0;
    return loop_new(&loop);
}

static int teardown(void **state UNUSED)
{
    loop_free(loop);
    return 0;
}

static void note(void *arg)
{
    strcat(order, arg);
}

static void stop(void *arg UNUSED)
{
    loop_stop(loop);
}

static void posts_run_in_order(void **state UNUSED)
{
    loop_post(loop, note, "a");
    loop_post(loop, note, "b");
    loop_post(loop, note, "c");
    loop_post(loop, stop, NULL);
    assert_int_equal(loop_run(loop), 0);
    assert_string_equal(order, "abc");
}

static char x[] = "x", y[] = "y";

static void take_back_y(void *arg UNUSED)
{
    loop_unpost(loop, note, y);
}

/* Neither what waits for the next round, nor what this round has not come to. */
static void what_is_taken_back_does_not_run(void **state UNUSED)
{
    loop_post(loop, note, x);
    loop_unpost(loop, note, x);
    loop_post(loop, note, "a");
    loop_post(loop, take_back_y, NULL);
    loop_post(loop, note, y);
    loop_post(loop, note, "b");
    loop_post(loop, stop, NULL);
    loop_run(loop);
    assert_string_equal(order, "ab");
}

static void post_twice_and_stop(void *arg UNUSED)
{
    strcat(order, "1");
    loop_post(loop, note, "3");
    loop_post(loop, stop, NULL);
    strcat(order, "2");
}

static void a_post_may_post(void **state UNUSED)
{
    loop_post(loop, post_twice_and_stop, NULL);
    loop_run(loop);
    assert_string_equal(order, "123");
}

static unsigned counted;

static void count(void *arg UNUSED)
{
    counted++;
}

static void *poster(void *arg UNUSED)
{
    for (int i = 0; i < 10000; i++)
        loop_post(loop, count, NULL);
    return NULL;
}

static void *poster_and_stop(void *arg)
{
    pthread_t t[4];

    for (int i = 0; i < 4; i++)
        pthread_create(&t[i], NULL, poster, arg);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    loop_post(loop, stop, NULL);
    return NULL;
}

static void no_post_of_other_threads_is_lost(void **state UNUSED)
{
    pthread_t t;

    counted = 0;
    pthread_create(&t, NULL, poster_and_stop, NULL);
    loop_run(loop);
    pthread_join(t, NULL);
    assert_int_equal(counted, 40000);
}

static void a_stop_before_the_run_counts_once(void **state UNUSED)
{
    loop_stop(loop);
    assert_int_equal(loop_run(loop), 0);
    loop_post(loop, note, "x"); /* the loop can be run again */
    loop_post(loop, stop, NULL);
    loop_run(loop);
    assert_string_equal(order, "x");
}

/* ---- watches ---- */

static struct loop_fd watch[2];
static int pipes[2][2], calls;

/* Both pipes are readable; whichever comes first deletes the other, whose event is in the same batch already. */
static void delete_other(void *arg, u32 events)
{
    int other = arg == &watch[0];

    assert_true(events & EPOLLIN);
    calls++;
    loop_fd_del(&watch[other]);
    loop_stop(loop);
}

static void a_deleted_watch_is_not_called_any_more(void **state UNUSED)
{
    calls = 0;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pipe(pipes[i]), 0);
        assert_int_equal(write(pipes[i][1], "x", 1), 1);
        assert_int_equal(loop_fd_add(loop, &watch[i], pipes[i][0], EPOLLIN, delete_other, &watch[i]), 0);
    }
    loop_run(loop);
    assert_int_equal(calls, 1);
    for (int i = 0; i < 2; i++) {
        loop_fd_del(&watch[i]); /* harmless for the one that is gone */
        close(pipes[i][0]);
        close(pipes[i][1]);
    }
}

static u32 seen;

static void note_events(void *arg UNUSED, u32 events)
{
    seen = events;
    loop_stop(loop);
}

static void events_can_be_changed(void **state UNUSED)
{
    int p[2];

    assert_int_equal(pipe(p), 0);
    assert_int_equal(loop_fd_add(loop, &watch[0], p[1], 0, note_events, NULL), 0);
    loop_fd_mod(&watch[0], EPOLLOUT);
    loop_run(loop);
    assert_int_equal(seen, EPOLLOUT);
    loop_fd_del(&watch[0]);
    close(p[0]);
    close(p[1]);
}

static void a_bad_fd_is_an_error(void **state UNUSED)
{
    assert_true(loop_fd_add(loop, &watch[0], -1, EPOLLIN, note_events, NULL) < 0);
    loop_fd_del(&watch[0]);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(posts_run_in_order), T(what_is_taken_back_does_not_run),
        T(a_post_may_post),
        T(no_post_of_other_threads_is_lost),
        T(a_stop_before_the_run_counts_once),
        T(a_deleted_watch_is_not_called_any_more),
        T(events_can_be_changed),
        T(a_bad_fd_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
