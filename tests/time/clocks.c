/*
 * Clocks of a guest and its host side by side. One program for both: the host's part starts the guest's, by the command that stands behind it, on a terminal.
 *
 *   clocks drift SECONDS COMMAND...     asks the guest for its clocks at the beginning and at the end, and says by how many millionths each differs from the host's
 *   clocks pause SECONDS COMMAND...     pauses the guest at the monitor's prompt for SECONDS, and says what its clocks and timers did before, over it, and after
 *   clocks guest                        in the guest: answers lines on standard input
 *
 * Each answer has a number and the time of the host before the question and behind the answer. Of many questions the one with the shortest way counts: how long that was is
 * the uncertainty of the result. Figures go to standard output as NAME=VALUE.
 *
 * The guest's answer to "NUMBER" is "@NUMBER MONOTONIC RAW REALTIME TSC GAP BACK EXPIRED LOC": nanoseconds and cycles; since the start, the longest time between two looks at
 * the clock by a thread that looks each millisecond, how often a clock went back, expirations of a timer of 10 ms, and interrupts of the local APICs' timers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define MS 1000000ll
#define SEC 1000000000ll
#define PERIOD_NS (10 * MS)

typedef long long s64;

static s64 now(clockid_t id)
{
    struct timespec ts;
    clock_gettime(id, &ts);
    return ts.tv_sec * SEC + ts.tv_nsec;
}

static void nap(s64 ns)
{
    nanosleep(&(struct timespec){ns / SEC, ns % SEC}, NULL);
}

/* ---- the guest ---- */
static _Atomic s64 gap, back, expired;

static void *watcher(void *arg)
{
    static const clockid_t ids[] = {CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_BOOTTIME};
    s64 last[3] = {now(ids[0]), now(ids[1]), now(ids[2])};
    (void)arg;
    for (;;) {
        for (int i = 0; i < 3; i++) {
            s64 t = now(ids[i]);
            if (t < last[i])
                back++;
            if (!i && t - last[i] > gap)
                gap = t - last[i];
            last[i] = t;
        }
        nap(MS);
    }
    return NULL;
}

static void *ticker(void *arg)
{
    struct itimerspec it = {{0, PERIOD_NS}, {0, PERIOD_NS}};
    uint64_t n;
    int fd = timerfd_create(CLOCK_MONOTONIC, 0);
    timerfd_settime(fd, 0, &it, NULL);
    while (read(fd, &n, sizeof(n)) == sizeof(n))
        expired += (s64)n;
    return arg;
}

static s64 local_timer(void)
{
    char line[4096], *p;
    s64 sum = 0;
    FILE *f = fopen("/proc/interrupts", "r");
    while (f && fgets(line, sizeof(line), f))
        if ((p = strstr(line, "LOC:")))
            for (p += 4;;) {
                char *end;
                s64 n = strtoll(p, &end, 10);
                if (end == p)
                    break;
                sum += n;
                p = end;
            }
    if (f)
        fclose(f);
    return sum;
}

static int guest(void)
{
    pthread_t t;
    char line[64];
    struct termios raw;
    if (!tcgetattr(0, &raw)) {
        cfmakeraw(&raw);
        tcsetattr(0, TCSANOW, &raw);
    }
    pthread_create(&t, NULL, watcher, NULL);
    pthread_create(&t, NULL, ticker, NULL);
    printf("@ready\n");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin)) {
        if (*line == 'q')
            break;
        s64 mono = now(CLOCK_MONOTONIC), raw_ns = now(CLOCK_MONOTONIC_RAW), real = now(CLOCK_REALTIME);
        unsigned long long tsc = __rdtsc();
        printf("@%d %lld %lld %lld %llu %lld %lld %lld %lld\n", atoi(line), mono, raw_ns, real, tsc, (s64)gap, (s64)back, (s64)expired, local_timer());
        fflush(stdout);
    }
    return 0;
}

/* ---- the host ---- */
struct answer {
    s64 mono, raw, real, tsc, gap, back, expired, loc;             /* the guest's */
    s64 host_mono, host_raw, host_real, host_tsc, width;           /* in the middle of the way there and back, which took width ns */
};

static int terminal;
static pid_t child;
static char buffer[1 << 16];
static size_t have;

static void fail(const char *what)
{
    fprintf(stderr, "clocks: %s; last from the guest: %.*s\n", what, (int)(have > 300 ? 300 : have), buffer);
    if (child > 0)
        kill(child, SIGKILL);
    exit(1);
}

static void say(const char *text)
{
    if (write(terminal, text, strlen(text)) != (ssize_t)strlen(text))
        fail("cannot write to the terminal");
}

/* The rest of the first line that begins with prefix within the time; what comes before it is dropped. */
static bool hear(const char *prefix, char *line, size_t size, s64 ns)
{
    s64 end = now(CLOCK_MONOTONIC) + ns;
    for (;;) {
        char *p, *nl;
        buffer[have] = 0;
        while ((p = memmem(buffer, have, prefix, strlen(prefix))) && (nl = memchr(p, '\n', (size_t)(buffer + have - p)))) {
            snprintf(line, size, "%.*s", (int)(nl - p - (long)strlen(prefix)), p + strlen(prefix));
            have -= (size_t)(nl + 1 - buffer);
            memmove(buffer, nl + 1, have);
            return true;
        }
        s64 left = end - now(CLOCK_MONOTONIC);
        if (left <= 0)
            return false;
        struct pollfd fd = {terminal, POLLIN, 0};
        if (poll(&fd, 1, (int)(left / MS) + 1) <= 0)
            continue;
        if (have > sizeof(buffer) / 2) {                           /* noise */
            memmove(buffer, buffer + have - 1024, 1024);
            have = 1024;
        }
        ssize_t n = read(terminal, buffer + have, sizeof(buffer) - 1 - have);
        if (n <= 0)
            fail("the guest is gone");
        have += (size_t)n;
    }
}

static bool ask(struct answer *a, int number, s64 ns)
{
    char text[32], line[256];
    s64 mono = now(CLOCK_MONOTONIC), raw = now(CLOCK_MONOTONIC_RAW), real = now(CLOCK_REALTIME), tsc = (s64)__rdtsc();
    snprintf(text, sizeof(text), "%d\n", number);
    say(text);
    snprintf(text, sizeof(text), "@%d ", number);
    if (!hear(text, line, sizeof(line), ns))
        return false;
    a->width = now(CLOCK_MONOTONIC) - mono;
    a->host_mono = mono + a->width / 2;
    a->host_raw = raw + (now(CLOCK_MONOTONIC_RAW) - raw) / 2;
    a->host_real = real + (now(CLOCK_REALTIME) - real) / 2;
    a->host_tsc = tsc + ((s64)__rdtsc() - tsc) / 2;
    return sscanf(line, "%lld %lld %lld %lld %lld %lld %lld %lld", &a->mono, &a->raw, &a->real, &a->tsc, &a->gap, &a->back, &a->expired, &a->loc) == 8;
}

/* The best of many. */
static struct answer ask_well(int tries)
{
    static int number;
    struct answer best = {.width = INT64_MAX}, a;
    while (tries--) {
        if (!ask(&a, ++number, 60 * SEC))
            fail("no answer within a minute");
        if (a.width < best.width)
            best = a;
        nap(3 * MS);
    }
    return best;
}

static void start(char **command)
{
    char line[256];
    int slave;
    struct winsize size = {.ws_row = 25, .ws_col = 200};
    terminal = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (terminal < 0 || grantpt(terminal) || unlockpt(terminal) || ioctl(terminal, TIOCSWINSZ, &size))
        fail("no terminal");
    child = fork();
    if (!child) {
        setsid();
        slave = open(ptsname(terminal), O_RDWR);
        ioctl(slave, TIOCSCTTY, 0);
        dup2(slave, 0);
        dup2(slave, 1);
        dup2(slave, 2);
        execvp(command[0], command);
        _exit(127);
    }
    if (!hear("@ready", line, sizeof(line), 300 * SEC))
        fail("the guest does not come up");
}

static int finish(void)
{
    int status;
    say("q\n");
    for (int i = 0; i < 600; i++) {
        struct pollfd fd = {terminal, POLLIN, 0};
        if (poll(&fd, 1, 100) > 0 && read(terminal, buffer, sizeof(buffer)) <= 0)
            nap(100 * MS);
        if (waitpid(child, &status, WNOHANG) == child)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    }
    fail("the guest does not end");
    return 1;
}

static double ppm(s64 guest, s64 host)
{
    return (double)(guest - host) / (double)host * 1e6;
}

static int drift(s64 seconds)
{
    struct answer a = ask_well(60), b;
    nap(seconds * SEC);
    b = ask_well(60);
    s64 host = b.host_mono - a.host_mono;
    printf("seconds=%.3f\n", (double)host / 1e9);
    printf("uncertain_ppm=%.2f\n", (double)(a.width + b.width) / 2 / (double)host * 1e6);
    printf("way_us=%.1f\n", (double)b.width / 1e3);
    printf("monotonic_ppm=%.2f\n", ppm(b.mono - a.mono, host));
    printf("raw_ppm=%.2f\n", ppm(b.raw - a.raw, b.host_raw - a.host_raw));
    printf("realtime_ppm=%.2f\n", ppm(b.real - a.real, b.host_real - a.host_real));
    printf("tsc_ppm=%.2f\n", ppm(b.tsc - a.tsc, b.host_tsc - a.host_tsc));
    printf("host_slew_ppm=%.2f\n", ppm(host, b.host_raw - a.host_raw));
    printf("realtime_off_ms=%.1f\n", (double)(b.real - b.host_real) / 1e6);
    printf("back=%lld\n", b.back);
    printf("gap_ms=%.1f\n", (double)b.gap / 1e6);
    printf("expired=%lld\nperiods=%lld\n", b.expired - a.expired, (b.mono - a.mono) / PERIOD_NS);
    return finish();
}

static int pause_and_resume(s64 seconds)
{
    struct answer a = ask_well(20), b, c, d, none;
    nap(3 * SEC);
    b = ask_well(20);
    say("\1c");
    nap(300 * MS);
    say("pause\r");
    nap(500 * MS);
    s64 from = now(CLOCK_MONOTONIC);
    say("\1c");
    nap(200 * MS);
    printf("answers_while_paused=%d\n", ask(&none, 1000000, seconds * SEC));
    say("\1c");
    nap(200 * MS);
    s64 pause = now(CLOCK_MONOTONIC) - from;
    say("resume\r");
    nap(200 * MS);
    say("\1c");
    if (!ask(&c, 1000001, 60 * SEC))
        fail("no answer after resume");
    nap(3 * SEC);
    d = ask_well(20);
    printf("pause_seconds=%.3f\n", (double)pause / 1e9);
    printf("hidden_seconds=%.3f\n", (double)((d.host_mono - b.host_mono) - (d.mono - b.mono)) / 1e9);
    printf("tsc_hidden_share=%.3f\n", (double)((d.host_tsc - b.host_tsc) - (d.tsc - b.tsc)) * (double)(d.host_mono - b.host_mono) / (double)(d.host_tsc - b.host_tsc) /
                                          (double)((d.host_mono - b.host_mono) - (d.mono - b.mono)));
    printf("back=%lld\n", d.back);
    printf("gap_ms=%.1f\n", (double)d.gap / 1e6);
    printf("expired=%lld\nperiods=%lld\n", d.expired - a.expired, (d.mono - a.mono) / PERIOD_NS);
    printf("loc_per_second_before=%.0f\n", (double)(b.loc - a.loc) / ((double)(b.mono - a.mono) / 1e9));
    printf("loc_over_pause=%lld\nloc_expected=%.0f\n", c.loc - b.loc, (double)(b.loc - a.loc) / (double)(b.mono - a.mono) * (double)(c.mono - b.mono));
    printf("loc_per_second_after=%.0f\n", (double)(d.loc - c.loc) / ((double)(d.mono - c.mono) / 1e9));
    printf("realtime_off_ms=%.1f\n", (double)(d.real - d.host_real) / 1e6);
    return finish();
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "guest"))
        return guest();
    if (argc < 4 || (strcmp(argv[1], "drift") && strcmp(argv[1], "pause"))) {
        fprintf(stderr, "usage: clocks drift|pause SECONDS COMMAND... | clocks guest\n");
        return 64;
    }
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOLBF, 0);
    start(argv + 3);
    return !strcmp(argv[1], "drift") ? drift(atoll(argv[2])) : pause_and_resume(atoll(argv[2]));
}
