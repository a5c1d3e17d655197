/* Captures (back/capture.h) into pipes, whose readers are slow or leave, and into what cannot be written. What is in them tests/boot/net.sh reads back by tshark. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "back/capture.h"

#define FRAME 60000
#define FRAMES 100

static char dir[64], path[96], said[512];
static const u8 mac[6] = { 2, 0, 0, 0, 0, 1 };

static void note(void *arg UNUSED, enum log_level level, const char *msg)
{
    if (level == LOG_ERROR)
        snprintf(said + strlen(said), sizeof(said) - strlen(said), "%s\n", msg);
}
static const struct log log_said = { .sink = note };

static int setup(void **state UNUSED)
{
    said[0] = '\0';
    strcpy(dir, "/tmp/doppel-capture-XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof(path), "%s/pipe", dir);
    return mkfifo(path, 0600);
}

static int teardown(void **state UNUSED)
{
    unlink(path);
    return rmdir(dir);
}

static void send_frames(struct capture *c, unsigned n)
{
    static u8 frame[FRAME];
    for (unsigned i = 0; i < n; i++) {
        struct iovec iov = { frame, sizeof(frame) };
        capture_frame(c, 0, CAPTURE_TO_GUEST, &iov, 1, sizeof(frame));
    }
}

/* In pieces, with rests between them, to the end. */
static void *slow_reader(void *arg)
{
    static u8 buf[200000];
    int fd = *(int *)arg;
    size_t *all = malloc(sizeof(*all));
    ssize_t n;
    *all = 0;
    do {
        usleep(10000);
        n = read(fd, buf, sizeof(buf));
        *all += n > 0 ? (size_t)n : 0;
    } while (n > 0);
    return all;
}

/* More than any pipe holds: the network waits, and nothing is missing. */
static void slow(void **state UNUSED)
{
    struct capture *c;
    pthread_t thread;
    unsigned id;
    void *all;
    int fd = open(path, O_RDONLY | O_NONBLOCK);

    assert_true(fd >= 0);
    assert_int_equal(capture_open(path, &log_said, &c), 0);
    assert_int_equal(fcntl(fd, F_SETFL, 0), 0);
    assert_int_equal(capture_interface(c, "net0", mac, &id), 0);
    assert_int_equal(pthread_create(&thread, NULL, slow_reader, &fd), 0);
    send_frames(c, FRAMES);
    capture_close(c);
    pthread_join(thread, &all);
    assert_string_equal(said, "");
    assert_true(*(size_t *)all > FRAMES * FRAME);
    free(all);
    close(fd);
}

/* Into the pipe, which the descriptor given back is the reader of. */
static int open_with_reader(struct capture **c)
{
    unsigned id;
    int fd = open(path, O_RDONLY | O_NONBLOCK);

    assert_true(fd >= 0);
    assert_int_equal(capture_open(path, &log_said, c), 0);
    assert_int_equal(capture_interface(*c, "net0", mac, &id), 0);
    return fd;
}

/* A reader that takes nothing costs a second, once. */
static void stopped(void **state UNUSED)
{
    struct capture *c;
    int fd = open_with_reader(&c);

    send_frames(c, FRAMES);
    assert_non_null(strstr(said, "who reads the pipe is too slow; it ends here, the network goes on"));
    said[0] = '\0';
    send_frames(c, FRAMES);
    capture_close(c);
    assert_string_equal(said, "");
    close(fd);
}

static void left(void **state UNUSED)
{
    struct capture *c;
    int fd = open_with_reader(&c);

    close(fd);
    send_frames(c, FRAMES);
    assert_non_null(strstr(said, "Broken pipe; it ends here"));
    capture_close(c);
    assert_int_equal(capture_open(path, &log_said, &c), -ENXIO);
    assert_non_null(strstr(err_last(), "nobody reads this pipe"));
}

/* An error at the beginning is who opens it told, and nobody else. */
static void full(void **state UNUSED)
{
    struct capture *c;
    unsigned id;

    assert_int_equal(capture_open("/dev/full", &log_said, &c), 0);
    assert_int_equal(capture_interface(c, "net0", mac, &id), -EIO);
    assert_non_null(strstr(err_last(), "--capture /dev/full: cannot write it: No space left on device"));
    capture_close(c);
    assert_string_equal(said, "");
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(slow, setup, teardown),
        cmocka_unit_test_setup_teardown(stopped, setup, teardown),
        cmocka_unit_test_setup_teardown(left, setup, teardown),
        cmocka_unit_test_setup_teardown(full, setup, teardown),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
