/*
 * `doppel run` from the outside, on a machine without a processor (fake_vm.h): exit statuses, messages, streams,
 * signals, terminals. Each run is a child process; one that does not end in time is killed, and its test fails.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "ctl/cli.h"
#include "fake_vm.h"

#define GIVE_UP_MS 15000

static char guest_dir[64], scratch[64];

struct child {
    pid_t pid;
    /* our ends; with a terminal in and out are its master, err is -1 */
    int in, out, err;
    int slave;
    char text[2][400000];                                          /* what came: standard output, standard error */
    size_t len[2];
    int status;                                                    /* as waitpid() gives it; -1: still there */
    bool left_raw;                                                 /* the terminal, after the end */
};
static struct child child;

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* Words at blanks; argv[0] is the program's name. */
static _Noreturn void child_main(const char *line)
{
    static char words[4096];
    char *argv[64] = {"doppel"};
    int argc = 1;
    for (int signo = 1; signo < NSIG; signo++)
        signal(signo, SIG_DFL);                                    /* not cmocka's */
    snprintf(words, sizeof(words), "%s", line);
    for (char *w = strtok(words, " "); w; w = strtok(NULL, " "))
        argv[argc++] = w;
    exit(cli_main(argc, argv));
}

static void pass(int from, int to)
{
    if (from != to) {
        dup2(from, to);
        close(from);
    }
}

/* in: a descriptor, or -1 for a pipe whose end is child.in, or -2 for none at all. out likewise. */
static void start(const char *line, int in, int out)
{
    int p_in[2], p_out[2], p_err[2];
    memset(&child, 0, sizeof(child));
    child.in = child.out = child.slave = child.status = -1;
    bug_on(pipe2(p_in, O_CLOEXEC) || pipe2(p_out, O_CLOEXEC) || pipe2(p_err, O_CLOEXEC));
    child.pid = fork();
    if (!child.pid) {
        pass(in >= 0 ? in : p_in[0], 0);
        pass(out >= 0 ? out : p_out[1], 1);
        pass(p_err[1], 2);
        close(p_in[1]);
        close(p_out[0]);
        close(p_err[0]);
        if (in == -2)
            close(0);
        if (out == -2)
            close(1);
        child_main(line);
    }
    close(p_in[0]);
    close(p_out[1]);
    close(p_err[1]);
    child.in = p_in[1];
    child.out = p_out[0];
    child.err = p_err[0];
}

static void start_on_terminal_as(bool background, const char *line)
{
    struct winsize size = {.ws_col = 90, .ws_row = 30};
    memset(&child, 0, sizeof(child));
    child.status = child.err = -1;
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    bug_on(master < 0 || grantpt(master) || unlockpt(master));
    ioctl(master, TIOCSWINSZ, &size);
    child.slave = open(ptsname(master), O_RDWR | O_NOCTTY | O_CLOEXEC);
    child.pid = fork();
    if (!child.pid) {
        setsid();
        ioctl(child.slave, TIOCSCTTY, 0);
        for (int fd = 0; fd < 3; fd++)
            dup2(child.slave, fd);
        close(master);
        setenv("TERM", "test-term", 1);
        if (background && fork()) {
            int status;
            wait(&status);
            _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 255);
        }
        if (background)
            setpgid(0, 0);
        child_main(line);
    }
    child.in = child.out = master;
}

static void start_on_terminal(const char *line)
{
    start_on_terminal_as(false, line);
}

/* Takes what has come within so many milliseconds; false when both streams have ended. */
static bool take(int ms)
{
    struct pollfd p[2] = {{.fd = child.out, .events = POLLIN}, {.fd = child.err, .events = POLLIN}};
    if (child.out < 0 && child.err < 0)
        return false;
    poll(p, 2, ms);
    for (unsigned i = 0; i < 2; i++) {
        if (!p[i].revents)
            continue;
        ssize_t n = read(p[i].fd, child.text[i] + child.len[i], sizeof(child.text[i]) - 1 - child.len[i]);
        if (n > 0) {
            child.len[i] += (size_t)n;
        } else if (!i) {
            child.out = -1;                                        /* a terminal's master is closed in finish() */
        } else {
            child.err = -1;
        }
    }
    return true;
}

/* Waits until s is in the output. */
static void expect(unsigned stream, const char *s)
{
    double end = now_ms() + GIVE_UP_MS;
    while (!memmem(child.text[stream], child.len[stream], s, strlen(s))) {
        if (now_ms() > end || !take(50))
            fail_msg("\"%s\" did not come; output \"%s\", errors \"%s\"", s, child.text[0], child.text[1]);
    }
}

static bool reaped(void)
{
    return child.status != -1 || waitpid(child.pid, &child.status, WNOHANG) == child.pid;
}

static bool is_raw(void)
{
    struct termios t;
    assert_int_equal(tcgetattr(child.slave, &t), 0);
    return !(t.c_lflag & (ICANON | ECHO | ISIG));
}

/* Waits for the end, taking all output. */
static int finish(void)
{
    double end = now_ms() + GIVE_UP_MS;
    while (!reaped() && now_ms() < end)
        if (!take(20))
            usleep(5000);
    if (!reaped()) {
        kill(child.pid, SIGKILL);
        waitpid(child.pid, &child.status, 0);
        fail_msg("did not end; output \"%s\", errors \"%s\"", child.text[0], child.text[1]);
    }
    while (child.slave < 0 && take(100))
        ;
    take(0);
    child.left_raw = child.slave >= 0 && is_raw();
    if (child.in >= 0)
        close(child.in);
    if (child.slave >= 0)
        close(child.slave);
    return WIFEXITED(child.status) ? WEXITSTATUS(child.status) : -WTERMSIG(child.status);
}

static int null_in(void)
{
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

/* A run without input, to its end. */
static int run(const char *line)
{
    int in = null_in();
    start(line, in, -1);
    close(in);
    return finish();
}

static unsigned lines(const char *s)
{
    unsigned n = 0;
    for (; *s; s++)
        n += *s == '\n';
    return n;
}

static void has(const char *s, const char *what)
{
    if (!strstr(s, what))
        fail_msg("\"%s\" is not in \"%s\"", what, s);
}

static char status_text[1024];
static const char *status_file(void)
{
    char path[128];
    snprintf(path, sizeof(path), "%s/status", scratch);
    FILE *f = fopen(path, "r");
    if (!f)
        return "";
    size_t n = fread(status_text, 1, sizeof(status_text) - 1, f);
    status_text[n] = '\0';
    fclose(f);
    unlink(path);
    return status_text;
}

static const char *with_status_file(const char *line)
{
    static char text[1024];
    snprintf(text, sizeof(text), "run --status-file %s/status %s", scratch, line);
    return text;
}

/* --- ends --- */

static void powers_off(void **state UNUSED)
{
    assert_int_equal(run(with_status_file("--kernel poweroff")), 0);
    assert_memory_equal(child.text[1], "engine: ", 8);             /* which one depends on the host */
    assert_int_equal(lines(child.text[1]), 1);
    assert_string_equal(status_file(), "status=0\nend=poweroff\nfailed=none\nreason=the guest powered off\n");
}

static void quiet_and_explicit_engine(void **state UNUSED)
{
    assert_int_equal(run("run --quiet --kernel poweroff"), 0);
    assert_string_equal(child.text[1], "");
    assert_int_equal(run("run --engine interp --kernel poweroff"), 0);
    assert_string_equal(child.text[1], "");
    assert_int_equal(run("run --verbose --kernel poweroff"), 0);
    has(child.text[1], "million instructions");
}

static void statistics(void **state UNUSED)
{
    char line[1024], text[64] = "";
    assert_int_equal(run("run --quiet --stats --kernel poweroff"), 0);
    assert_string_equal(child.text[1], "figures of things\n");
    snprintf(line, sizeof(line), "run --quiet --stats=json,file=%s/stats --kernel panic", scratch);
    assert_int_equal(run(line), 70);
    assert_null(strstr(child.text[1], "{}"));
    snprintf(line, sizeof(line), "%s/stats", scratch);
    FILE *f = fopen(line, "r");
    assert_non_null(f);
    assert_non_null(fgets(text, sizeof(text), f));
    fclose(f);
    unlink(line);
    assert_string_equal(text, "{}\n");
    snprintf(line, sizeof(line), "run --quiet --profile %s/profile,symbols=map --kernel poweroff", scratch);
    assert_int_equal(run(line), 0);
    snprintf(line, sizeof(line), "%s/profile", scratch);
    f = fopen(line, "r");
    assert_non_null(f);
    assert_non_null(fgets(text, sizeof(text), f));
    fclose(f);
    unlink(line);
    assert_string_equal(text, "profile by map\n");
    assert_int_equal(run("run --quiet --stats=json,file=/dev/full --kernel poweroff"), 0);
    has(child.text[1], "--stats /dev/full: it could not be written whole: No space left");
    assert_int_equal(run("run --kernel poweroff --profile /nonexistent/x"), 1);
    has(child.text[1], "--profile: cannot write /nonexistent/x");
    assert_int_equal(run("run --quiet --check --kernel poweroff"), 0);
    assert_string_equal(child.text[1], "");
    assert_int_equal(run("run --check --kernel poweroff"), 0);
    has(child.text[1], "42 instructions in 42 blocks ran on both engines");
    assert_int_equal(run("run --kernel poweroff --stats=file=/nonexistent/x"), 1);
    has(child.text[1], "--stats: cannot write /nonexistent/x");
}

static void guest_failures(void **state UNUSED)
{
    assert_int_equal(run(with_status_file("--kernel panic")), 70);
    has(child.text[1], "panicked");
    has(status_file(), "status=70\nend=panic\nfailed=guest\n");
    assert_int_equal(run(with_status_file("--kernel triple")), 71);
    has(child.text[1], "triple fault");
    assert_int_equal(run(with_status_file("--kernel reset-loop")), 1);
    has(child.text[1], "reset itself three times");
    has(status_file(), "status=1\nend=reset\nfailed=guest\n");
    assert_int_equal(run(with_status_file("--kernel triple")), 71);
    has(child.text[1], "triple fault");
    has(child.text[1], "vCPU 0");
    assert_true(lines(child.text[1]) > 5);                         /* the processor's state */
    has(status_file(), "status=71\nend=triple-fault\nfailed=guest\n");
    assert_int_equal(run(with_status_file("--no-reboot --kernel reset")), 0);
    has(status_file(), "status=0\nend=reset\nfailed=none\n");
}

/* Disks of other monitors are raw disks with strange contents: told, not guessed. */
static void strange_disks(void **state UNUSED)
{
    static const struct { char head[9]; const char *said; } disk[] = {
        {"QFI\xfb\0\0\0\3", "it looks like a qcow2 image, and is given to the guest as it is; make a raw disk of it: qemu-img"},
        {"KDMV\1\0\0\0", "a VMDK image"}, {"vhdxfile", "a VHDX image"}, {"doppelOV", "an overlay of doppel's"},
        {"\x1f\x8b\0\0\0\0\0\0", NULL},
    };
    char path[96], line[160];
    for (unsigned i = 0; i < ARRAY_SIZE(disk); i++) {
        snprintf(path, sizeof(path), "%s/disk", scratch);
        FILE *f = fopen(path, "w");
        assert_non_null(f);
        assert_int_equal(fwrite(disk[i].head, 1, 8, f), 8);
        fclose(f);
        snprintf(line, sizeof(line), "run --disk %s --kernel poweroff", path);
        assert_int_equal(run(line), 0);
        if (disk[i].said)
            has(child.text[1], disk[i].said);
        else
            assert_null(strstr(child.text[1], "looks like"));
    }
}

static void host_failures(void **state UNUSED)
{
    assert_int_equal(run(with_status_file("--kernel hosterror")), 1);
    has(child.text[1], "doppel: disk vda: cannot read");
    has(status_file(), "status=1\nend=host-error\nfailed=host\nreason=disk vda");
    assert_int_equal(run(with_status_file("--kernel bad")), 1);
    has(child.text[1], "doppel: kernel bad:");
    assert_true(lines(child.text[1]) <= 4);
    has(status_file(), "failed=host\n");
    assert_int_equal(run("run --kernel poweroff --status-file /nonexistent/x"), 1);
    has(child.text[1], "--status-file /nonexistent/x");
    assert_int_equal(lines(child.text[1]), 1);
    assert_int_equal(run("run --kernel poweroff --console /nonexistent/x"), 1);
    has(child.text[1], "/nonexistent/x");
    assert_int_equal(run("run --kernel poweroff --trace exits,file=/nonexistent/x"), 1);
    has(child.text[1], "--trace: cannot write /nonexistent/x");
    assert_true(lines(child.text[1]) <= 4);
}

static void usage(void **state UNUSED)
{
    assert_int_equal(run(with_status_file("--cpus none")), 64);
    has(child.text[1], "doppel: --cpus none: ");
    assert_true(lines(child.text[1]) <= 4);
    has(status_file(), "status=64\nend=usage\nfailed=user\nreason=--cpus none");
    char late[160];
    snprintf(late, sizeof(late), "run --cpus none --status-file=%s/status", scratch);
    assert_int_equal(run(late), 64);
    has(status_file(), "status=64\nend=usage\n");
    assert_int_equal(run("ran"), 64);
    assert_int_equal(run(""), 64);
    assert_int_equal(run("doctor now"), 64);
    assert_int_equal(run("--version"), 0);
    has(child.text[0], "doppel ");
}

static void doctor_ends_well(void **state UNUSED)
{
    double before = now_ms();
    assert_int_equal(run("doctor"), 0);
    assert_true(now_ms() - before < 10000);
    has(child.text[0], "auto takes");
    has(child.text[0], "image build");
    char *path = strdup(getenv("PATH"));
    setenv("PATH", "/nonexistent", 1);
    setenv("DOPPEL_VIRTIOFSD", "/nonexistent", 1);
    assert_int_equal(run("doctor"), 0);
    setenv("PATH", path, 1);
    unsetenv("DOPPEL_VIRTIOFSD");
    free(path);
    has(child.text[0], "virtiofsd is not installed");
    has(child.text[0], "\"doppel image build\" lacks: mmdebstrap");
    has(child.text[0], "apt-get install mmdebstrap");
}

static void missing_guest(void **state UNUSED)
{
    setenv("DOPPEL_GUEST", "/nonexistent", 1);
    assert_int_equal(run("run"), 1);
    setenv("DOPPEL_GUEST", guest_dir, 1);
    has(child.text[1], "DOPPEL_GUEST");
    has(child.text[1], "/nonexistent");
    assert_true(lines(child.text[1]) <= 4);
}

static void command_line_of_the_kernel(void **state UNUSED)
{
    assert_int_equal(run("run --quiet --trace exits --append extra=1 -- exit 0"), 0);
    has(child.text[1], "\"console=ttyS0 base doppel.run=1 extra=1\"");
    assert_int_equal(run("run --quiet --trace exits --kernel poweroff"), 0);
    has(child.text[1], "\"console=ttyS0\"");
    assert_int_equal(run("run --quiet --trace exits --append only=1 --kernel poweroff"), 0);
    has(child.text[1], "\"only=1\"");
}

/* --- the console --- */

static void all_output_comes_out(void **state UNUSED)
{
    assert_int_equal(run("run --kernel talk"), 0);
    assert_int_equal(child.len[0], 300000);
    for (size_t i = 0; i < child.len[0]; i++)
        assert_int_equal((u8)child.text[0][i], fake_pattern(i));
}

static void closed_output_harms_nobody(void **state UNUSED)
{
    start("run --kernel talk", -1, -1);
    close(child.out);
    child.out = -1;
    assert_int_equal(finish(), 0);
    has(child.text[1], "doppel: console: cannot write");
    assert_int_equal(lines(child.text[1]), 2);                     /* engine, and this once */
    int in = null_in();
    start("run --kernel talk", in, -2);
    assert_int_equal(finish(), 0);
    has(child.text[1], "standard output is closed");
    int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    start("run --kernel talk", in, full);
    assert_int_equal(finish(), 0);
    has(child.text[1], "No space left");
    assert_int_equal(lines(child.text[1]), 2);
    close(full);
    close(in);
}

static void end_of_input_does_not_end_the_guest(void **state UNUSED)
{
    start("run --kernel shell", -1, -1);
    expect(0, "ready$");
    assert_int_equal(write(child.in, "x", 1), 1);
    expect(0, "<78>");
    close(child.in);
    child.in = -1;
    expect(0, "<eof>");
    usleep(200000);
    assert_false(reaped());
    kill(child.pid, SIGTERM);
    assert_int_equal(finish(), 0);
    start("run --kernel shell", -2, -1);
    expect(0, "ready$");
    usleep(200000);
    assert_false(reaped());
    kill(child.pid, SIGTERM);
    assert_int_equal(finish(), 0);
}

static void console_file(void **state UNUSED)
{
    char line[256], path[128], text[16] = "";
    snprintf(path, sizeof(path), "%s/console", scratch);
    snprintf(line, sizeof(line), "run --console %s --kernel talk", path);
    assert_int_equal(run(line), 0);
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_size, 300000);
    assert_int_equal(child.len[0], 0);
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(run(line), 0);                                /* nobody reads it: the guest does not wait */
    unlink(path);
    assert_int_equal(run("run --console /dev/full --kernel talk"), 0);
    assert_int_equal(lines(child.text[1]), 2);
    assert_int_equal(run("run --console none --kernel talk"), 0);
    assert_string_equal(text, "");
}

/* --- signals --- */

static void first_sigterm_is_the_power_button(void **state UNUSED)
{
    start("run --kernel shell", -1, -1);
    expect(0, "ready$");
    kill(child.pid, SIGTERM);
    assert_int_equal(finish(), 0);
}

/* A guest that is not the default one does not tell when it listens: the button is pressed again. */
static void power_button_again(void **state UNUSED)
{
    start("run --kernel sleepy", -1, -1);
    expect(0, "ready$");
    kill(child.pid, SIGTERM);
    usleep(500000);
    assert_false(reaped());
    assert_int_equal(finish(), 0);
}

static void second_sigterm_ends(void **state UNUSED)
{
    start(with_status_file("--kernel deaf"), -1, -1);
    expect(0, "ready$");
    kill(child.pid, SIGTERM);
    usleep(200000);
    assert_false(reaped());
    double before = now_ms();
    kill(child.pid, SIGTERM);
    assert_int_equal(finish(), 128 + SIGTERM);
    assert_true(now_ms() - before < 2000);
    has(status_file(), "status=143\nend=quit\nfailed=user\n");
}

/* timeout(1) signals its process and then its group: one sender, at once, is one. Two senders are two. */
static void two_sigterms_at_once(void **state UNUSED)
{
    start("run --kernel deaf", -1, -1);
    expect(0, "ready$");
    kill(child.pid, SIGTERM);
    usleep(1000);
    kill(child.pid, SIGTERM);
    usleep(300000);
    assert_false(reaped());
    for (int i = 0; i < 500 && !reaped(); i++) {                  /* more than two: the kernel may merge some */
        pid_t sender = fork();
        if (sender == 0)
            _exit(kill(child.pid, SIGTERM));
        waitpid(sender, NULL, 0);
        usleep(1000);
    }
    int end = finish();
    assert_true(end == 128 + SIGTERM || end == -SIGTERM);          /* a shell says 143 of both: one came when it no longer caught them */
}

static void other_signals(void **state UNUSED)
{
    start("run --kernel shell", -1, -1);
    expect(0, "ready$");
    kill(child.pid, SIGINT);
    assert_int_equal(finish(), 0);
    start("run --kernel deaf", -1, -1);
    expect(0, "ready$");
    kill(child.pid, SIGQUIT);
    assert_int_equal(finish(), 128 + SIGQUIT);
    start("run --kernel shell", -1, -1);
    expect(0, "ready$");
    kill(child.pid, SIGHUP);
    assert_int_equal(finish(), 0);
}

/* Output that nobody takes: the guest has ended, but its last words wait; a signal ends that too. */
static void sigterm_while_output_waits(void **state UNUSED)
{
    start("run -- burst", -1, -1);
    usleep(500000);
    assert_false(reaped());
    kill(child.pid, SIGTERM);
    usleep(300000);
    kill(child.pid, SIGTERM);
    double end = now_ms() + 10000;
    while (!reaped() && now_ms() < end)
        usleep(10000);
    assert_true(reaped());
    finish();
}

/* --- a command --- */

static void exit_statuses(void **state UNUSED)
{
    assert_int_equal(run(with_status_file("-- exit 0")), 0);
    has(status_file(), "status=0\nend=exited\nfailed=none\n");
    assert_int_equal(run(with_status_file("-- exit 3")), 3);
    has(status_file(), "status=3\nend=exited\nfailed=command\n");
    assert_int_equal(run("run -- exit 255"), 255);
    assert_int_equal(run("run -- killed 9"), 137);
    assert_int_equal(run("run -- exec 2"), 127);
    has(child.text[1], "No such file");
    assert_int_equal(run("run -- exec 13"), 126);
}

static void separate_outputs(void **state UNUSED)
{
    assert_int_equal(run("run --quiet -- print out err"), 3);
    assert_string_equal(child.text[0], "out");
    assert_string_equal(child.text[1], "err");
}

static void everything_arrives(void **state UNUSED)
{
    assert_int_equal(run("run -- burst"), 0);
    assert_int_equal(child.len[0], 300000);
    for (size_t i = 0; i < child.len[0]; i++)
        assert_int_equal((u8)child.text[0][i], fake_pattern(i));
    /* Also when the guest goes without a word while its ring is full. */
    assert_int_equal(run("run -- burstdie"), 1);
    assert_int_equal(child.len[0], 300000);
}

/* Binary, both ways, through a channel that takes 1000 bytes at a time. */
static void input_to_output(void **state UNUSED)
{
    char path[128];
    snprintf(path, sizeof(path), "%s/input", scratch);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    static u8 data[350001];
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (u8)(i * 31 + (i >> 8));
    assert_int_equal(write(fd, data, sizeof(data)), sizeof(data));
    lseek(fd, 0, SEEK_SET);
    start("run -- cat", fd, -1);
    assert_int_equal(finish(), 0);
    assert_int_equal(child.len[0], sizeof(data));
    assert_memory_equal(child.text[0], data, sizeof(data));
    close(fd);
    unlink(path);
    start("run -- cat", -1, -1);
    assert_int_equal(write(child.in, "a\0\x01\xff", 4), 4);
    close(child.in);
    child.in = -1;
    assert_int_equal(finish(), 0);
    assert_int_equal(child.len[0], 4);
    assert_memory_equal(child.text[0], "a\0\x01\xff", 4);
}

static void closed_streams(void **state UNUSED)
{
    start("run -- yes", -1, -1);
    expect(0, "abc");
    close(child.out);
    child.out = -1;
    assert_int_equal(finish(), 128 + SIGPIPE);
    assert_null(strstr(child.text[1], "cannot write"));
    start("run --quiet -- flags", -2, -1);
    assert_int_equal(finish(), 0);
    assert_string_equal(child.text[0], "flags=2 size=0x0  argc=1\n");
    int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    start("run -- yes", -1, full);
    assert_int_equal(finish(), 128 + SIGPIPE);
    has(child.text[1], "standard output: cannot write: No space left");
    start(with_status_file("-- flags"), -1, full);
    assert_int_equal(finish(), 1);                                 /* the command itself ended with 0 */
    has(status_file(), "status=1\nend=exited\nfailed=host\n");
    close(full);
}

/* The command closes its output, and runs on: whoever reads it sees the end now. */
static void ends_are_passed_on(void **state UNUSED)
{
    start("run -- endout", -1, -1);
    expect(0, "end");
    while (child.out >= 0 && take(1000))
        ;
    assert_int_equal(child.out, -1);
    assert_false(reaped());
    kill(child.pid, SIGINT);
    assert_int_equal(finish(), 128 + SIGINT);
    start("run -- noinput", -1, -1);
    for (unsigned i = 0; i < 500 && write(child.in, "x", 1) == 1; i++)
        usleep(10000);
    assert_int_equal(write(child.in, "x", 1), -1);                 /* EPIPE: nobody reads any more */
    kill(child.pid, SIGQUIT);
    finish();
}

static void signals_to_the_command(void **state UNUSED)
{
    start("run --verbose -- sleep", -1, -1);
    expect(1, "the command starts");
    kill(child.pid, SIGINT);
    assert_int_equal(finish(), 128 + SIGINT);
    start("run --verbose -- sleep", -1, -1);
    expect(1, "the command starts");
    kill(child.pid, SIGTERM);                                      /* the power button: the guest ends its commands */
    assert_int_equal(finish(), 128 + SIGTERM);
}

static void guest_fails_under_a_command(void **state UNUSED)
{
    assert_int_equal(run(with_status_file("-- panic")), 70);
    has(child.text[1], "Kernel panic - not syncing: test");
    has(status_file(), "end=panic\nfailed=guest\n");
    assert_string_equal(child.text[0], "");
    assert_int_equal(run(with_status_file("-- early-panic")), 70); /* without pvpanic */
    has(child.text[1], "Kernel panic - not syncing: early");
    has(status_file(), "status=70\nend=panic\nfailed=guest\n");
    assert_int_equal(run("run -- die"), 1);
    has(child.text[1], "powered off before");
    assert_int_equal(run("run -- reboot"), 1);
    has(child.text[1], "reset itself before");
    assert_int_equal(run("run -- kexec"), 1);
    has(child.text[1], "another kernel before the command had ended");
    assert_int_equal(run("run -- nonsense"), 1);
    has(child.text[1], "nonsense");
    assert_int_equal(run("run -- nostatus"), 1);
}

/* --- a terminal --- */

static void type(const char *keys)
{
    assert_int_equal(write(child.in, keys, strlen(keys)), strlen(keys));
}

static void ctrl_a_x(void **state UNUSED)
{
    start_on_terminal("run --kernel shell");
    expect(0, "ready$");
    assert_true(is_raw());
    type("a\x03\x01" "a");
    expect(0, "<61><03><01>");
    type("\x01x");
    assert_int_equal(finish(), 0);
    assert_false(child.left_raw);
}

/* Ends it as told, and looks at the terminal afterwards. */
static void is_restored_after(int signo, int expected)
{
    if (signo)
        kill(child.pid, signo);
    assert_int_equal(finish(), expected);
    assert_false(child.left_raw);
}

static void restored_on_every_exit(void **state UNUSED)
{
    static const struct {
        const char *guest;
        int signo, expected;
    } ways[] = {
        {"shell", SIGTERM, 0}, {"deaf", SIGQUIT, 128 + SIGQUIT}, {"shell", SIGHUP, 0}, {"deaf", SIGSEGV, -SIGSEGV},
        {"deaf", SIGABRT, -SIGABRT},
        {"deaf", SIGFPE, -SIGFPE},
    };
    for (size_t i = 0; i < ARRAY_SIZE(ways); i++) {
        char line[64];
        snprintf(line, sizeof(line), "run --kernel %s", ways[i].guest);
        start_on_terminal(line);
        expect(0, "ready$");
        assert_true(is_raw());
        is_restored_after(ways[i].signo, ways[i].expected);
    }
    start_on_terminal("run --kernel panic");
    is_restored_after(0, 70);
}

/* A sanitizer turns some crashes into exits of its own: any end but success will do, if the terminal is right. */
static void restored_after_crashes(void **state UNUSED)
{
    static const char *const guests[] = {"segv", "abort"};
    for (size_t i = 0; i < ARRAY_SIZE(guests); i++) {
        char line[64];
        snprintf(line, sizeof(line), "run --kernel %s", guests[i]);
        start_on_terminal(line);
        assert_int_not_equal(finish(), 0);
        assert_false(child.left_raw);
    }
}

static void works_while_the_guest_hangs(void **state UNUSED)
{
    start_on_terminal("run --kernel hung");
    expect(0, "ready$");
    for (unsigned i = 0; i < 40; i++) {
        char keys[1001];
        memset(keys, 'k', 1000);
        keys[1000] = '\0';
        type(keys);
        take(10);
    }
    type("\x01x");
    assert_int_equal(finish(), 0);
}

static void stop_and_continue(void **state UNUSED)
{
    start_on_terminal("run --kernel shell");
    expect(0, "ready$");
    kill(child.pid, SIGTSTP);
    int status;
    assert_int_equal(waitpid(child.pid, &status, WUNTRACED), child.pid);
    assert_true(WIFSTOPPED(status));
    assert_false(is_raw());
    kill(child.pid, SIGCONT);
    for (unsigned i = 0; i < 200 && !is_raw(); i++)
        usleep(10000);
    assert_true(is_raw());
    type("b");
    expect(0, "<62>");
    type("q");
    assert_int_equal(finish(), 0);
}

static void window_size(void **state UNUSED)
{
    struct winsize size = {.ws_col = 100, .ws_row = 40};
    start_on_terminal("run --kernel shell");
    expect(0, "<90x30>");
    ioctl(child.in, TIOCSWINSZ, &size);
    expect(0, "<100x40>");
    type("\x01x");
    assert_int_equal(finish(), 0);
    start_on_terminal("run -- flags");
    expect(0, "flags=1 size=90x30 TERM=test-term argc=1");
    assert_int_equal(finish(), 0);
}

static void command_on_a_terminal(void **state UNUSED)
{
    start_on_terminal("run -- cat");
    for (unsigned i = 0; i < 500 && !is_raw(); i++)
        usleep(10000);
    type("z");
    expect(0, "z");
    type("q");
    assert_int_equal(finish(), 5);
}

/*
 * As under timeout(1) in a shell: a job of its own, not the terminal's foreground. It must neither stop nor touch the
 * terminal.
 */
static void command_in_the_background(void **state UNUSED)
{
    start_on_terminal_as(true, "run --quiet -- flags");
    expect(0, "flags=2 size=0x0");
    assert_false(is_raw());
    assert_int_equal(finish(), 0);
}

/* --- the monitor --- */

static void monitor_prompt(void **state UNUSED)
{
    start_on_terminal("run --kernel shell");
    expect(0, "ready$");
    type("\x01" "c");
    expect(0, "(doppel) ");
    type("info\r");
    expect(0, "state: running");
    type("paus\x7f\x7f\x7f\x7fpause\r");
    expect(0, "paused");
    type("infos\r");
    expect(0, "did you mean info");
    type("info\r");
    expect(0, "state: paused");
    type("resume\r");
    expect(0, "running");
    type("help\r");
    expect(0, "power button");
    type("stats\r");
    expect(0, "figures of things");
    type("stats json\r");
    expect(0, "{}");
    type("stats yaml\r");
    expect(0, "no such form");
    type("trace bogus\r");
    expect(0, "\"bogus\"");
    type("resize x\r");
    expect(0, "say resize DISK");
    type("resize 1\r");
    expect(0, "there is no disk 1");
    type("link 0 sideways\r");
    expect(0, "say link N up");
    type("link 1 down\r");
    expect(0, "there is no network card 1");
    type("reset\r");
    expect(0, "reset; running");
    assert_null(memmem(child.text[0], child.len[0], "<reset>", 7)); /* the guest's output waits */
    type("\r");
    expect(0, "<time>");                                           /* of "resume" */
    expect(0, "<reset>");
    type("c");
    expect(0, "<63>");
    type("\x01" "c");
    type("quit\r");
    assert_int_equal(finish(), 0);
}

static void monitor_power(void **state UNUSED)
{
    start_on_terminal("run --kernel shell");
    expect(0, "ready$");
    type("\x01" "cpause\rpower\rresume\r");
    assert_int_equal(finish(), 0);
}

static void keys_from_a_pipe(void **state UNUSED)
{
    start("run --kernel shell", -1, -1);
    expect(0, "ready$");
    type("\x01" "cinfo\n\n");
    expect(0, "state: running");
    type("\x01h");
    expect(0, "Ctrl-A then");
    type("\x01x");
    assert_int_equal(finish(), 0);
}

/* --- */

static void make_file(const char *name, const char *text)
{
    char path[128];
    snprintf(path, sizeof(path), "%s/%s", guest_dir, name);
    FILE *f = fopen(path, "w");
    fputs(text, f);
    fclose(f);
}

static int group_setup(void **state UNUSED)
{
    snprintf(guest_dir, sizeof(guest_dir), "/tmp/doppel-run-XXXXXX");
    snprintf(scratch, sizeof(scratch), "/tmp/doppel-run-XXXXXX");
    if (!mkdtemp(guest_dir) || !mkdtemp(scratch))
        return -1;
    make_file("vmlinuz", "");
    make_file("initrd", "");
    make_file("cmdline", "console=ttyS0 base\n");
    setenv("DOPPEL_GUEST", guest_dir, 1);
    signal(SIGPIPE, SIG_IGN);
    return 0;
}

static int group_teardown(void **state UNUSED)
{
    static const char *const names[] = {"vmlinuz", "initrd", "cmdline"};
    char path[128];
    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        snprintf(path, sizeof(path), "%s/%s", guest_dir, names[i]);
        unlink(path);
    }
    rmdir(guest_dir);
    rmdir(scratch);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(powers_off), cmocka_unit_test(quiet_and_explicit_engine), cmocka_unit_test(statistics), cmocka_unit_test(guest_failures),
        cmocka_unit_test(strange_disks), cmocka_unit_test(host_failures), cmocka_unit_test(usage), cmocka_unit_test(doctor_ends_well),
        cmocka_unit_test(missing_guest), cmocka_unit_test(command_line_of_the_kernel),
        cmocka_unit_test(all_output_comes_out), cmocka_unit_test(closed_output_harms_nobody),
        cmocka_unit_test(end_of_input_does_not_end_the_guest), cmocka_unit_test(console_file),
        cmocka_unit_test(first_sigterm_is_the_power_button), cmocka_unit_test(second_sigterm_ends),
        cmocka_unit_test(power_button_again),
        cmocka_unit_test(two_sigterms_at_once), cmocka_unit_test(other_signals),
        cmocka_unit_test(sigterm_while_output_waits), cmocka_unit_test(exit_statuses),
        cmocka_unit_test(separate_outputs), cmocka_unit_test(everything_arrives), cmocka_unit_test(input_to_output),
        cmocka_unit_test(closed_streams), cmocka_unit_test(ends_are_passed_on),
        cmocka_unit_test(signals_to_the_command), cmocka_unit_test(guest_fails_under_a_command),
        cmocka_unit_test(ctrl_a_x), cmocka_unit_test(restored_on_every_exit), cmocka_unit_test(restored_after_crashes),
        cmocka_unit_test(works_while_the_guest_hangs), cmocka_unit_test(stop_and_continue),
        cmocka_unit_test(window_size), cmocka_unit_test(command_on_a_terminal),
        cmocka_unit_test(command_in_the_background), cmocka_unit_test(monitor_prompt), cmocka_unit_test(monitor_power),
        cmocka_unit_test(keys_from_a_pipe),
    };
    return cmocka_run_group_tests_name("run", tests, group_setup, group_teardown);
}
