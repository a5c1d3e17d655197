/*
 * doppel ps, kill, rm (vms.h): clients of the control sockets (control.h). A VM that does not answer (its process is stopped, say) holds nobody
 * up: every wait has an end.
 */
#define _GNU_SOURCE
#include "ctl/vms.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/err.h"
#include "ctl/message.h"
#include "ctl/run.h"

#define ANSWER_MS 2000
#define SHUTDOWN_MS 60000
#define QUIT_MS 5000                                               /* until a VM that does not end itself is killed */
#define ANSWER_BYTES 4096

static s64 now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (s64)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static bool wait_fd(int fd, short events, s64 until)
{
    struct pollfd p = { .fd = fd, .events = events };
    s64 left;

    do
        left = until - now_ms();
    while (poll(&p, 1, left > 0 ? (int)left : 0) < 0 && errno == EINTR);
    return p.revents;
}

static int read_answer(int fd, char *answer, size_t size, s64 until)
{
    size_t len = 0;
    ssize_t n;
    char rest[512];

    for (;;) {
        bool keep = len < size - 1;

        if (!wait_fd(fd, POLLIN, until))
            return -ETIMEDOUT;
        n = recv(fd, keep ? answer + len : rest, keep ? size - 1 - len : sizeof(rest), MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        if (n == 0)
            return 0;
        if (n > 0 && keep)
            len += (size_t)n;
        answer[len] = '\0';
    }
}

int vms_ask(const struct instance *i, const char *line, char *answer, size_t size, int timeout_ms, int *pid)
{
    struct ucred peer = { .pid = 0 };
    socklen_t len = sizeof(peer);
    int fd = instance_connect(i, "control"), r = 0;

    answer[0] = '\0';
    if (fd < 0)
        return fd;
    if (pid)
        *pid = getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0 ? peer.pid : 0;
    if (send(fd, line, strlen(line), MSG_NOSIGNAL) != (ssize_t)strlen(line) || shutdown(fd, SHUT_WR) < 0)
        r = -EPIPE;
    if (r == 0)
        r = read_answer(fd, answer, size, now_ms() + timeout_ms);
    close(fd);
    return r;
}

/* --- ps --- */

/* The value of "key=value" in lines; "?" where it is not told. */
static const char *field(const char *lines, const char *key, char *buf, size_t size)
{
    size_t len = strlen(key);

    snprintf(buf, size, "?");
    for (const char *p = lines; p && *p; p = strchr(p, '\n') ? strchr(p, '\n') + 1 : NULL)
        if (!strncmp(p, key, len) && p[len] == '=')
            snprintf(buf, size, "%.*s", (int)strcspn(p + len + 1, "\n"), p + len + 1);
    return buf;
}

static const char *memory(const char *bytes, char *buf, size_t size)
{
    u64 n;

    if (parse_unsigned(bytes, &n) < 0)
        snprintf(buf, size, "?");
    else if (n % GiB)
        snprintf(buf, size, "%lluM", (unsigned long long)(n / MiB));
    else
        snprintf(buf, size, "%lluG", (unsigned long long)(n / GiB));
    return buf;
}

static const char *duration(const char *seconds, char *buf, size_t size)
{
    u64 n;

    if (parse_unsigned(seconds, &n) < 0)
        snprintf(buf, size, "?");
    else
        snprintf(buf, size, "%llu:%02u:%02u", (unsigned long long)(n / 3600), (unsigned)(n / 60 % 60), (unsigned)(n % 60));
    return buf;
}

static void show(const char *name)
{
    char answer[ANSWER_BYTES] = "", v[9][96], own[16] = "?";
    struct instance i;
    int pid = 0, r;

    if (instance_open(&i, name) < 0)
        return;                                                    /* it has just ended */
    r = vms_ask(&i, "status\n", answer, sizeof(answer), ANSWER_MS, &pid);
    instance_close(&i);
    if (r < 0 && r != -ETIMEDOUT)
        answer[0] = '\0';                                          /* it is about to begin, or to end */
    if (pid)
        snprintf(own, sizeof(own), "%d", pid);
    field(answer, "ports", v[7], sizeof(v[7]));
    field(answer, "memory", v[2], sizeof(v[2]));
    field(answer, "uptime", v[4], sizeof(v[4]));
    field(answer, strstr(answer, "\nwaits=room") ? "waits" : "state", v[5], sizeof(v[5]));
    printf("%-16s %7s %-7s %4s %8s %-8s %9s %5s  %s\n", name, own, field(answer, "engine", v[0], sizeof(v[0])),
           field(answer, "cpus", v[1], sizeof(v[1])), memory(v[2], v[3], sizeof(v[3])), !strcmp(v[5], "room") ? "no-room" : v[5],
           duration(v[4], v[6], sizeof(v[6])), field(answer, "cid", v[8], sizeof(v[8])), strcmp(v[7], "?") ? v[7] : "-");
}

int ps_main(int argc, char **argv UNUSED)
{
    char **names;

    if (argc) {
        message_error("ps: takes no words");
        return EXIT_USAGE;
    }
    if (instance_list(&names) < 0) {
        message_error("%s", err_last());
        return EXIT_HOST_ERROR;
    }
    printf("%-16s %7s %-7s %4s %8s %-8s %9s %5s  %s\n", "NAME", "PID", "ENGINE", "CPUS", "MEMORY", "STATE", "UPTIME", "CID", "PORTS");
    for (char **n = names; *n; n++)
        show(*n);
    instance_list_free(names);
    if (fflush(stdout) == 0)
        return 0;
    message_error("standard output: cannot write: %s", strerror(errno));
    return EXIT_HOST_ERROR;
}

/* --- resume, kill, rm --- */

/* Whether the process ended within the time. */
static bool gone(int pidfd, int ms)
{
    return wait_fd(pidfd, POLLIN, now_ms() + ms);
}

static int end_in_order(struct instance *i)
{
    char answer[ANSWER_BYTES];
    int pid = 0, r = vms_ask(i, "shutdown\n", answer, sizeof(answer), ANSWER_MS, &pid), fd = -1;

    if (r == 0 && pid > 0)
        fd = pidfd_open(pid, 0);
    if (r < 0)
        return err(r, "%s: does not answer (%s); doppel kill --force %s ends it at once", i->name, strerror(-r), i->name);
    if (fd < 0 && errno == ESRCH)
        return 0;
    if (fd < 0)
        return err(-errno, "%s: cannot wait for its end: %s", i->name, strerror(errno));
    r = gone(fd, SHUTDOWN_MS) ? 0 : err(-ETIMEDOUT, "%s: was asked to shut down %d s ago, and still runs; doppel kill --force %s ends it at once",
                                        i->name, SHUTDOWN_MS / 1000, i->name);
    close(fd);
    return r;
}

/* By its own means, so that it leaves nothing behind; if it does not answer, by SIGKILL. */
static int end_at_once(struct instance *i)
{
    char answer[ANSWER_BYTES];
    int pid = 0, fd, r;

    r = vms_ask(i, "quit\n", answer, sizeof(answer), ANSWER_MS, &pid);
    fd = pid > 0 ? pidfd_open(pid, 0) : -1;
    if (fd < 0)
        return pid > 0 && errno == ESRCH ? 0 : err(-ESRCH, "%s: its process is not to be found: %s", i->name, strerror(r < 0 ? -r : ESRCH));
    if (!gone(fd, r < 0 ? 0 : QUIT_MS) && pidfd_send_signal(fd, SIGKILL, NULL, 0) < 0 && errno != ESRCH)
        r = err(-errno, "%s: cannot end process %d: %s", i->name, pid, strerror(errno));
    else
        r = gone(fd, QUIT_MS) ? 0 : err(-ETIMEDOUT, "%s: process %d does not end", i->name, pid);
    close(fd);
    return r;
}

static int set_force(void *target, const char *value UNUSED)
{
    *(bool *)target = true;
    return 0;
}

const struct option kill_option_table[] = {
    {"force", NULL, "Ends it at once: the guest's power is cut.", false, set_force},
};
const unsigned kill_option_rows = ARRAY_SIZE(kill_option_table);

static int usage(const char *command)
{
    message_error("%s; \"doppel help %s\" explains", err_last(), command);
    return EXIT_USAGE;
}

static int done(int r)
{
    char **names;

    if (r < 0)
        message_error("%s", err_last());
    if (instance_list(&names) == 0)                                /* removes what is left of it */
        instance_list_free(names);
    return r < 0 ? EXIT_HOST_ERROR : 0;
}

int resume_main(int argc, char **argv)
{
    char answer[ANSWER_BYTES];
    struct instance i;
    int r;

    if (argc != 1) {
        err(-EINVAL, argc ? "resume: more than one word" : "resume: the VM's name is missing");
        return usage("resume");
    }
    r = instance_open(&i, argv[0]);
    if (r == 0) {
        r = vms_ask(&i, "resume\n", answer, sizeof(answer), ANSWER_MS, NULL);
        if (r < 0)
            err(r, "%s: does not answer (%s)", i.name, strerror(-r));
        else if (strncmp(answer, "running", strlen("running")))
            r = err(-EBUSY, "%s: does not go on: it is %.*s", i.name, (int)strcspn(answer, "\n"), answer);
    }
    instance_close(&i);
    return done(r);
}

int kill_main(int argc, char **argv)
{
    struct instance i;
    bool force = false;
    char **rest;
    int words, r = options_parse_words(kill_option_table, kill_option_rows, &force, argc, argv, &words, &rest);

    if (r == 0 && (words != 1 || rest))
        r = err(-EINVAL, words ? "kill: more than one word" : "kill: the VM's name is missing");
    if (r < 0)
        return usage("kill");
    r = instance_open(&i, argv[0]);
    if (r == 0)
        r = force ? end_at_once(&i) : end_in_order(&i);
    instance_close(&i);
    return done(r);
}

int rm_main(int argc, char **argv)
{
    struct instance i;
    bool left;
    int r;

    if (argc != 1) {
        err(-EINVAL, argc ? "rm: more than one word" : "rm: the VM's name is missing");
        return usage("rm");
    }
    left = instance_left(argv[0]);
    r = instance_open(&i, argv[0]);
    if (r == 0)
        r = end_at_once(&i);
    else if (r == -ENOENT && left)
        r = 0;
    instance_close(&i);
    return done(r);
}
