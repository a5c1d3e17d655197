/*
 * Detached runs (detach.h). The VM's process is made before there is any thread, and leads a session of its own. Its standard error is a pipe to the
 * one that waits, which passes it on: so what goes wrong at the start is told where the command was given. Later nobody reads it any more.
 */
#define _GNU_SOURCE
#include "ctl/detach.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ctl/agent.h"
#include "ctl/run.h"
#include "ctl/vms.h"

#define RETRY_MS 50
#define START_SECONDS 600                                          /* until its machine is there: the default guest may have to be built */

static void become_vm(int report)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    setsid();
    signal(SIGPIPE, SIG_IGN);
    if (null >= 0) {
        dup2(null, STDIN_FILENO);
        dup2(null, STDOUT_FILENO);
    }
    dup2(report, STDERR_FILENO);
    close(report);
    if (null > STDERR_FILENO)
        close(null);
}

/* What the VM's process says, passed on; waits a moment for it. *fd is -1 after its end. */
static void pass_on(int *fd, int wait_ms)
{
    char buf[4096];
    struct pollfd p = {.fd = *fd, .events = POLLIN};
    ssize_t n = poll(&p, 1, wait_ms) > 0 ? read(*fd, buf, sizeof(buf)) : -1;
    if (n > 0 && write(STDERR_FILENO, buf, (size_t)n) < 0)
        return;
    if (n == 0) {
        close(*fd);
        *fd = -1;
    }
}

/* Has it come so far? exec works; or, where that is not waited for, the machine is there. */
static bool is_ready(const struct run *run)
{
    char answer[1024];
    if (!run->options.detach_seconds)
        return vms_ask(&run->instance, "status\n", answer, sizeof(answer), 1000, NULL) == 0 && strstr(answer, "state=");
    int fd = agent_try(&run->instance);
    if (fd < 0)
        return false;
    close(fd);
    return true;
}

static int ended(const struct run *run, int status, int *report)
{
    while (*report >= 0)
        pass_on(report, -1);
    message_error("%s: the VM ended before %s", run->instance.name, run->options.detach_seconds ? "doppel exec worked in it" : "it had begun");
    return WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : EXIT_HOST_ERROR;
}

static int wait_ready(struct run *run, pid_t pid, int report)
{
    u64 limit = run->options.detach_seconds ? run->options.detach_seconds : START_SECONDS, from = run_now_ns();
    int status, r = EXIT_HOST_ERROR;
    bool ready = false;
    do {
        if (waitpid(pid, &status, WNOHANG) == pid)
            return ended(run, status, &report);
        pass_on(&report, RETRY_MS);
        ready = is_ready(run);
    } while (!ready && run_now_ns() - from < limit * 1000000000);
    if (ready) {
        printf("%s\n", run->instance.name);
        r = fflush(stdout) == 0 ? 0 : EXIT_HOST_ERROR;
    } else {
        message_error("%s: runs for %llu s now, and doppel exec does not work in it yet; it goes on (doppel kill %s ends it)", run->instance.name,
                      (unsigned long long)limit, run->instance.name);
    }
    while (report >= 0 && poll(&(struct pollfd){.fd = report, .events = POLLIN}, 1, 0) > 0)
        pass_on(&report, 0);
    if (report >= 0)
        close(report);
    return r;
}

int detach(struct run *run)
{
    int report[2], r;
    if (pipe2(report, O_CLOEXEC) < 0) {
        message_error("--detach: %s", strerror(errno));
        return EXIT_HOST_ERROR;
    }
    pid_t pid = fork();
    if (pid == 0) {
        close(report[0]);
        become_vm(report[1]);
        return -1;
    }
    close(report[1]);
    close(run->instance.lock_fd);                                  /* the name is the other's, and free when that one ends */
    run->instance.lock_fd = -1;
    if (pid < 0) {
        message_error("--detach: cannot make a process: %s", strerror(errno));
        close(report[0]);
        r = EXIT_HOST_ERROR;
    } else {
        r = wait_ready(run, pid, report[0]);
    }
    instance_close(&run->instance);
    return r;
}
