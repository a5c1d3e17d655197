/*
 * Character back ends: nothing lost, nothing reordered, back-pressure, ends, and outputs that fail. Each test runs a
 * loop of its own, with a fake front end, and gives up after some seconds: what must not hang is seen to hang.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

#include "back/chardev_host.h"

#define GIVE_UP_SECONDS 10

/* A front end that records, takes only so much, and stops the loop when its condition holds. */
struct front {
    struct loop *loop;
    struct chardev *dev;
    u8 got[1 << 21];
    size_t len, room;                                              /* received; how much may still be */
    unsigned writable, eof, broken, opened, drained, logged;
    enum log_level log_level;
    char log_text[256];
    struct loop_fd tick;
    int timer;
    unsigned ticks;
    bool (*until)(struct front *f);
};

static struct front *front;
static struct log front_log;

static void check(struct front *f)
{
    if (f->until && f->until(f))
        loop_stop(f->loop);
}

static size_t can_receive(void *arg)
{
    return ((struct front *)arg)->room;
}

static void receive(void *arg, const u8 *buf, size_t len)
{
    struct front *f = arg;
    assert_true(len <= f->room);
    assert_true(f->len + len <= sizeof(f->got));
    memcpy(f->got + f->len, buf, len);
    f->len += len;
    f->room -= len;
    check(f);
}

static void writable(void *arg)
{
    struct front *f = arg;
    f->writable++;
    check(f);
}

static void event(void *arg, enum chardev_event what)
{
    struct front *f = arg;
    f->eof += what == CHARDEV_EOF;
    f->broken += what == CHARDEV_BROKEN;
    f->opened += what == CHARDEV_OPENED;
    check(f);
}

static void drained(void *arg)
{
    struct front *f = arg;
    f->drained++;
    check(f);
}

static void sink(void *arg, enum log_level level, const char *msg)
{
    struct front *f = arg;
    f->logged++;
    f->log_level = level;
    snprintf(f->log_text, sizeof(f->log_text), "%s", msg);
}

static const struct chardev_front_ops front_ops = {
    .can_receive = can_receive, .receive = receive, .writable = writable, .event = event,
};

/* Every 10 ms the condition is looked at; after GIVE_UP_SECONDS the test has failed. */
static void tick(void *arg, u32 events UNUSED)
{
    struct front *f = arg;
    u64 n;
    if (read(f->timer, &n, sizeof(n)) == sizeof(n))
        f->ticks += (unsigned)n;
    if (f->ticks > GIVE_UP_SECONDS * 100)
        loop_stop(f->loop);
    check(f);
}

static int setup(void **state UNUSED)
{
    signal(SIGPIPE, SIG_IGN);
    front = calloc(1, sizeof(*front));
    front->room = sizeof(front->got);
    front_log = (struct log){.sink = sink, .arg = front};
    if (loop_new(&front->loop) < 0)
        return -1;
    front->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct itimerspec every = {.it_interval.tv_nsec = 10000000, .it_value.tv_nsec = 10000000};
    timerfd_settime(front->timer, 0, &every, NULL);
    return loop_fd_add(front->loop, &front->tick, front->timer, EPOLLIN, tick, front);
}

static int teardown(void **state UNUSED)
{
    chardev_free(front->dev);
    loop_fd_del(&front->tick);
    close(front->timer);
    loop_free(front->loop);
    free(front);
    return 0;
}

static void connect_front(void)
{
    chardev_connect(front->dev, &front_ops, front);
    chardev_on_drained(front->dev, drained, front);
}

/* Runs until the condition holds; false when it did not in time. */
static bool run(bool (*until)(struct front *f))
{
    front->until = until;
    front->ticks = 0;
    assert_int_equal(loop_run(front->loop), 0);
    front->until = NULL;
    return until(front);
}

static bool some_ticks(struct front *f)
{
    return f->ticks >= 10;
}

static bool at_eof(struct front *f)
{
    return f->eof > 0;
}

static bool is_broken(struct front *f)
{
    return f->broken > 0;
}

static bool is_opened(struct front *f)
{
    return f->opened > 0;
}

static bool is_drained(struct front *f)
{
    return f->drained > 0 && chardev_pending(f->dev) == 0;
}

static u8 pattern(size_t i)
{
    return (u8)(i * 7 + (i >> 8) * 13 + (i >> 16));
}

static void is_pattern(const u8 *p, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (p[i] != pattern(i))
            fail_msg("byte %zu is %u, not %u", i, p[i], pattern(i));
}

/* --- input --- */

static void fill_pipe(int fd, size_t len)
{
    u8 *p = malloc(len);
    for (size_t i = 0; i < len; i++)
        p[i] = pattern(i);
    assert_int_equal(write(fd, p, len), len);
    free(p);
}

static void pipe_to_its_end(void **state UNUSED)
{
    int p[2];
    assert_int_equal(pipe(p), 0);
    fill_pipe(p[1], 50000);
    /* before the back end opens it: the end must be seen all the same */
    close(p[1]);
    assert_int_equal(chardev_fd_new(front->loop, p[0], -1, "t", &front_log, &front->dev), 0);
    connect_front();
    assert_true(run(at_eof));
    assert_int_equal(front->len, 50000);
    is_pattern(front->got, front->len);
    assert_int_equal(front->eof, 1);
    close(p[0]);
}

/* Only as much is read as the front end takes; the rest stays in the pipe. */
static void input_waits_for_room(void **state UNUSED)
{
    int p[2];
    assert_int_equal(pipe(p), 0);
    fill_pipe(p[1], 3000);
    front->room = 1000;
    assert_int_equal(chardev_fd_new(front->loop, p[0], -1, "t", &front_log, &front->dev), 0);
    connect_front();
    assert_true(run(some_ticks));
    assert_int_equal(front->len, 1000);
    struct pollfd poll_in = {.fd = p[0], .events = POLLIN};
    assert_int_equal(poll(&poll_in, 1, 0), 1);
    front->room = 5000;
    chardev_rx_ready(front->dev);
    close(p[1]);
    assert_true(run(at_eof));
    assert_int_equal(front->len, 3000);
    is_pattern(front->got, front->len);
    close(p[0]);
}

/* A hung-up pipe without room must not make the loop spin: hardly any processor time goes by. */
static void no_spinning(void **state UNUSED)
{
    int p[2];
    struct timespec before, after;
    assert_int_equal(pipe(p), 0);
    fill_pipe(p[1], 100);
    close(p[1]);
    front->room = 50;
    assert_int_equal(chardev_fd_new(front->loop, p[0], -1, "t", &front_log, &front->dev), 0);
    connect_front();
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    assert_true(run(some_ticks));
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    assert_true((after.tv_sec - before.tv_sec) * 1000000000LL + after.tv_nsec - before.tv_nsec < 50000000);
    assert_int_equal(front->eof, 0);
    close(p[0]);
}

static void regular_file(void **state UNUSED)
{
    FILE *f = tmpfile();
    for (size_t i = 0; i < 1500000; i++)
        fputc(pattern(i), f);
    fflush(f);
    lseek(fileno(f), 0, SEEK_SET);
    front->room = 70000;
    assert_int_equal(chardev_fd_new(front->loop, fileno(f), -1, "t", &front_log, &front->dev), 0);
    connect_front();
    assert_true(run(some_ticks));
    assert_int_equal(front->len, 70000);
    front->room = sizeof(front->got) - front->len;
    chardev_rx_ready(front->dev);
    assert_true(run(at_eof));
    assert_int_equal(front->len, 1500000);
    is_pattern(front->got, front->len);
    fclose(f);
}

static void dev_null(void **state UNUSED)
{
    int fd = open("/dev/null", O_RDONLY);
    assert_int_equal(chardev_fd_new(front->loop, fd, -1, "t", &front_log, &front->dev), 0);
    connect_front();
    assert_true(run(at_eof));
    assert_int_equal(front->logged, 0);
    close(fd);
}

/* A FIFO whose writer was gone before it was opened for reading: poll(2) never tells. */
static void fifo_to_its_end(void **state UNUSED)
{
    char dir[] = "/tmp/doppel-chardev-XXXXXX", path[64];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/f", dir);
    assert_int_equal(mkfifo(path, 0600), 0);
    int r = open(path, O_RDONLY | O_NONBLOCK), w = open(path, O_WRONLY);
    fcntl(r, F_SETFL, 0);
    close(w);
    assert_int_equal(chardev_fd_new(front->loop, r, -1, "t", &front_log, &front->dev), 0);
    connect_front();
    assert_true(run(at_eof));
    close(r);
    unlink(path);
    rmdir(dir);
}

/* --- output --- */

/* Writes the pattern as a guest would: what is not taken is offered again when there is room. */
static size_t offered, to_offer;
static void offer(void)
{
    u8 buf[4096];
    while (offered < to_offer) {
        size_t n = MIN(sizeof(buf), to_offer - offered);
        for (size_t i = 0; i < n; i++)
            buf[i] = pattern(offered + i);
        size_t taken = chardev_write(front->dev, buf, n);
        offered += taken;
        if (taken < n)
            return;
    }
}

static int reading;
static u8 read_back[1 << 21];
static size_t read_len;

/* A slow reader: one small read for each tick or call. */
static bool all_read_back(struct front *f UNUSED)
{
    offer();
    ssize_t n = read(reading, read_back + read_len, MIN(sizeof(read_back) - read_len, 40000));
    read_len += n > 0 ? (size_t)n : 0;
    return read_len == to_offer && offered == to_offer;
}

static void read_slowly(int fd, size_t len)
{
    reading = fd;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    offered = read_len = 0;
    to_offer = len;
    offer();
    assert_true(run(all_read_back));
    is_pattern(read_back, read_len);
}

static void slow_pipe(void **state UNUSED)
{
    int p[2];
    assert_int_equal(pipe(p), 0);
    assert_int_equal(chardev_fd_new(front->loop, -1, p[1], "t", &front_log, &front->dev), 0);
    connect_front();
    read_slowly(p[0], 1000000);
    assert_true(front->writable > 0);
    assert_int_equal(fcntl(p[1], F_GETFL) & O_NONBLOCK, 0);         /* others share it */
    close(p[0]);
    close(p[1]);
}

static void slow_socket(void **state UNUSED)
{
    int s[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, s), 0);
    assert_int_equal(chardev_fd_new(front->loop, -1, s[1], "t", &front_log, &front->dev), 0);
    connect_front();
    read_slowly(s[0], 1000000);
    close(s[0]);
    close(s[1]);
}

/* While nobody reads, write() takes what fits and then nothing; it never waits. */
static void full_pipe_takes_nothing(void **state UNUSED)
{
    int p[2];
    u8 buf[1000] = {0};
    size_t total = 0, n = 1;
    assert_int_equal(pipe(p), 0);
    assert_int_equal(chardev_fd_new(front->loop, -1, p[1], "t", &front_log, &front->dev), 0);
    connect_front();
    for (unsigned turn = 0; turn < 3; turn++) {
        while ((n = chardev_write(front->dev, buf, sizeof(buf))) > 0)
            total += n;
        assert_true(run(some_ticks));
    }
    assert_true(total >= CHARDEV_BUFFER && total < 4 * CHARDEV_BUFFER);
    assert_true(chardev_pending(front->dev) > 0);
    close(p[0]);
    close(p[1]);
}

/* The reader goes: noticed even if nothing is written, said once, and from then on everything is taken. */
static void closed_pipe(void **state UNUSED)
{
    int p[2];
    assert_int_equal(pipe(p), 0);
    assert_int_equal(chardev_fd_new(front->loop, -1, p[1], "t", &front_log, &front->dev), 0);
    connect_front();
    assert_true(run(some_ticks));
    assert_int_equal(front->broken, 0);
    close(p[0]);
    assert_true(run(is_broken));
    for (unsigned i = 0; i < 100; i++)
        assert_int_equal(chardev_write(front->dev, read_back, 10000), 10000);
    assert_true(run(some_ticks));
    assert_int_equal(front->broken, 1);
    assert_int_equal(front->logged, 1);
    assert_int_equal(chardev_pending(front->dev), 0);
    close(p[1]);
}

static void command_may_close(void **state UNUSED)
{
    int p[2];
    assert_int_equal(pipe(p), 0);
    assert_int_equal(chardev_fd_new(front->loop, -1, p[1], "t", &front_log, &front->dev), 0);
    chardev_fd_may_close(front->dev);
    connect_front();
    close(p[0]);
    assert_true(run(is_broken));
    assert_int_equal(front->logged, 0);
    close(p[1]);
}

static void full_disk(void **state UNUSED)
{
    int fd = open("/dev/full", O_WRONLY);
    assert_int_equal(chardev_fd_new(front->loop, -1, fd, "standard output", &front_log, &front->dev), 0);
    chardev_fd_may_close(front->dev);
    connect_front();
    chardev_write(front->dev, (const u8 *)"x", 1);
    assert_true(run(is_broken));
    assert_int_equal(front->logged, 1);
    assert_int_equal(front->log_level, LOG_ERROR);
    assert_non_null(strstr(front->log_text, "standard output"));
    assert_non_null(strstr(front->log_text, "No space left"));
    close(fd);
}

/* --- files --- */

static void output_file(void **state UNUSED)
{
    char path[] = "/tmp/doppel-chardev-XXXXXX", text[32];
    int fd = mkstemp(path);
    assert_int_equal(write(fd, "what was there before", 21), 21);
    assert_int_equal(chardev_file_new(front->loop, path, &front_log, &front->dev), 0);
    connect_front();
    chardev_write(front->dev, (const u8 *)"abc", 3);
    assert_true(run(is_drained));
    assert_int_equal(pread(fd, text, sizeof(text), 0), 3);
    assert_memory_equal(text, "abc", 3);
    close(fd);
    unlink(path);
}

static void unwritable_file(void **state UNUSED)
{
    assert_int_equal(chardev_file_new(front->loop, "/nonexistent/x", &front_log, &front->dev), -ENOENT);
    assert_non_null(strstr(err_last(), "/nonexistent/x"));
    assert_int_equal(chardev_file_new(front->loop, "/tmp", &front_log, &front->dev), -EISDIR);
    assert_null(front->dev);
}

static void file_on_full_disk(void **state UNUSED)
{
    assert_int_equal(chardev_file_new(front->loop, "/dev/full", &front_log, &front->dev), 0);
    connect_front();
    for (unsigned i = 0; i < 5; i++) {
        assert_int_equal(chardev_write(front->dev, read_back, 70000), i ? 70000 : CHARDEV_BUFFER);
        assert_true(run(some_ticks));
    }
    assert_int_equal(front->broken, 1);
    assert_int_equal(front->logged, 1);
}

/* Nobody reads it at first: neither opening nor writing waits, and the first reader finds the last bytes. */
static void output_fifo(void **state UNUSED)
{
    char dir[] = "/tmp/doppel-chardev-XXXXXX", path[64], text[100];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/f", dir);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(chardev_file_new(front->loop, path, &front_log, &front->dev), 0);
    connect_front();
    assert_int_equal(chardev_write(front->dev, (const u8 *)"early ", 6), 6);
    assert_true(run(some_ticks));
    int r = open(path, O_RDONLY | O_NONBLOCK);
    chardev_write(front->dev, (const u8 *)"late", 4);
    assert_true(run(is_opened));
    front->drained = 0;
    assert_true(run(some_ticks));
    assert_int_equal(read(r, text, sizeof(text)), 10);
    assert_memory_equal(text, "early late", 10);
    close(r);
    assert_true(run(is_broken));
    assert_int_equal(front->logged, 0);                            /* readers of a FIFO come and go */
    assert_int_equal(chardev_write(front->dev, read_back, 200000), 200000);
    front->opened = 0;
    r = open(path, O_RDONLY | O_NONBLOCK);
    chardev_write(front->dev, (const u8 *)"z", 1);
    assert_true(run(is_opened));
    close(r);
    unlink(path);
    rmdir(dir);
}

/* --- Unix socket --- */

static char socket_dir[64], socket_path[100];

static void open_socket(void)
{
    snprintf(socket_dir, sizeof(socket_dir), "/tmp/doppel-chardev-XXXXXX");
    assert_non_null(mkdtemp(socket_dir));
    snprintf(socket_path, sizeof(socket_path), "%s/s", socket_dir);
    assert_int_equal(chardev_unix_new(front->loop, socket_path, &front_log, &front->dev), 0);
    connect_front();
}

static int client(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof(a.sun_path), "%s", socket_path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    return fd;
}

static bool got_three(struct front *f)
{
    return f->len >= 3;
}

static void socket_client(void **state UNUSED)
{
    struct stat st;
    char text[100];
    open_socket();
    assert_int_equal(lstat(socket_path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_false(front->dev->opened);
    assert_int_equal(chardev_write(front->dev, (const u8 *)"boot ", 5), 5);
    int c = client();
    assert_true(run(is_opened));
    assert_true(front->dev->opened);
    chardev_write(front->dev, (const u8 *)"login:", 6);
    assert_int_equal(write(c, "abc", 3), 3);
    assert_true(run(got_three));
    assert_true(run(some_ticks));
    assert_int_equal(read(c, text, sizeof(text)), 11);
    assert_memory_equal(text, "boot login:", 11);
    assert_memory_equal(front->got, "abc", 3);
    close(c);
    assert_true(run(is_broken));
    chardev_free(front->dev);
    front->dev = NULL;
    assert_int_equal(lstat(socket_path, &st), -1);                 /* removed */
    rmdir(socket_dir);
}

/* The second client waits until the first has gone, and then is served. */
static void socket_takes_turns(void **state UNUSED)
{
    char text[100];
    open_socket();
    int a = client();
    assert_true(run(is_opened));
    int b = client();
    chardev_write(front->dev, (const u8 *)"for a", 5);
    assert_true(run(some_ticks));
    assert_int_equal(recv(b, text, sizeof(text), MSG_DONTWAIT), -1);
    assert_int_equal(errno, EAGAIN);
    assert_int_equal(read(a, text, sizeof(text)), 5);
    front->opened = 0;
    close(a);
    assert_true(run(is_opened));
    chardev_write(front->dev, (const u8 *)"for b", 5);
    assert_true(run(some_ticks));
    assert_int_equal(read(b, text, sizeof(text)), 5);
    assert_memory_equal(text, "for b", 5);
    close(b);
    assert_true(run(some_ticks));
    chardev_free(front->dev);
    front->dev = NULL;
    rmdir(socket_dir);
}

/* A client that has ended its sending still gets output. */
static void socket_half_closed(void **state UNUSED)
{
    char text[100];
    open_socket();
    int c = client();
    assert_true(run(is_opened));
    shutdown(c, SHUT_WR);
    assert_true(run(at_eof));
    assert_int_equal(front->broken, 0);
    chardev_write(front->dev, (const u8 *)"still", 5);
    assert_true(run(some_ticks));
    assert_int_equal(read(c, text, sizeof(text)), 5);
    close(c);
    assert_true(run(is_broken));
    chardev_free(front->dev);
    front->dev = NULL;
    rmdir(socket_dir);
}

/* A client that reads nothing and goes: no signal, no waiting, and the next one is served. */
static void socket_client_dies(void **state UNUSED)
{
    open_socket();
    int c = client();
    assert_true(run(is_opened));
    while (chardev_write(front->dev, read_back, 10000) == 10000)
        assert_true(run(some_ticks));
    close(c);
    assert_true(run(is_broken));
    front->opened = 0;
    c = client();
    assert_true(run(is_opened));
    close(c);
    assert_true(run(some_ticks));
    chardev_free(front->dev);
    front->dev = NULL;
    rmdir(socket_dir);
}

static void socket_paths(void **state UNUSED)
{
    char dir[] = "/tmp/doppel-chardev-XXXXXX", path[200];
    struct chardev *second = NULL;
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/s", dir);
    assert_int_equal(chardev_unix_new(front->loop, path, &front_log, &front->dev), 0);
    assert_int_equal(chardev_unix_new(front->loop, path, &front_log, &second), -EADDRINUSE);
    assert_non_null(strstr(err_last(), path));
    chardev_free(front->dev);
    front->dev = NULL;

    /* Left over from a process that was killed. */
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof(a.sun_path), "%.100s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    close(fd);
    assert_int_equal(chardev_unix_new(front->loop, path, &front_log, &front->dev), 0);
    chardev_free(front->dev);
    front->dev = NULL;

    /* Somebody's file. */
    close(open(path, O_CREAT | O_WRONLY, 0600));
    assert_int_equal(chardev_unix_new(front->loop, path, &front_log, &second), -EEXIST);
    assert_int_equal(access(path, F_OK), 0);
    unlink(path);
    rmdir(dir);
    assert_int_equal(chardev_unix_new(front->loop, "/nonexistent/s", &front_log, &second), -ENOENT);
    memset(path, 'x', sizeof(path) - 1);
    path[sizeof(path) - 1] = '\0';
    assert_int_equal(chardev_unix_new(front->loop, path, &front_log, &second), -ENAMETOOLONG);
}

/* --- tail --- */

static size_t tail(u8 *buf, size_t size, unsigned lines)
{
    return chardev_tail_get(front->dev, buf, size, lines);
}

static void keeps_the_last(void **state UNUSED)
{
    u8 buf[64];
    assert_int_equal(chardev_tail_new(16, &front->dev), 0);
    assert_int_equal(tail(buf, sizeof(buf), 5), 0);
    chardev_write(front->dev, (const u8 *)"one\ntwo\nthree\n", 14);
    assert_int_equal(tail(buf, sizeof(buf), 5), 14);
    assert_int_equal(tail(buf, sizeof(buf), 1), 6);
    assert_memory_equal(buf, "three\n", 6);
    assert_int_equal(tail(buf, 4, 5), 4);
    assert_memory_equal(buf, "ree\n", 4);
    chardev_write(front->dev, (const u8 *)"four", 4);               /* 18 bytes of 16 */
    assert_int_equal(tail(buf, sizeof(buf), 99), 16);
    assert_memory_equal(buf, "e\ntwo\nthree\nfour", 16);
    assert_int_equal(tail(buf, sizeof(buf), 2), 10);
    assert_memory_equal(buf, "three\nfour", 10);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(pipe_to_its_end), TEST(input_waits_for_room), TEST(no_spinning), TEST(regular_file), TEST(dev_null),
        TEST(fifo_to_its_end), TEST(slow_pipe), TEST(slow_socket), TEST(full_pipe_takes_nothing), TEST(closed_pipe),
        TEST(command_may_close), TEST(full_disk), TEST(output_file), TEST(unwritable_file), TEST(file_on_full_disk),
        TEST(output_fifo), TEST(socket_client), TEST(socket_takes_turns), TEST(socket_half_closed),
        TEST(socket_client_dies), TEST(socket_paths), TEST(keeps_the_last),
    };
    return cmocka_run_group_tests_name("chardev", tests, NULL, NULL);
}
