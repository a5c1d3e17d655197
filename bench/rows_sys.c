/*
 * Rows of the bench that are the kernel's work: system calls, faults, mappings, processes, signals, switches. Rows with
 * partners start them in setup; they are in the row's process group and die with it.
 */
#define _GNU_SOURCE
#include "rows.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define MIB (1ul << 20)
#define CHILD_STATUS 7

/* ---- system calls ---- */

static uint64_t run_getppid(void *state, uint64_t count)
{
    uint64_t wrong = 0;
    long parent = syscall(SYS_getppid);
    (void)state;
    for (uint64_t i = 0; i < count * 100; i++)
        wrong += syscall(SYS_getppid) != parent;
    return wrong;
}

static void *setup_zero(struct bench *b)
{
    int *fd = must_map(sizeof *fd, MAP_PRIVATE);
    (void)b;
    *fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    if (*fd < 0)
        die("/dev/zero: %s", strerror(errno));
    return fd;
}
static uint64_t run_zero(void *state, uint64_t count)
{
    int fd = *(int *)state;
    uint64_t wrong = 0;

    for (uint64_t i = 0; i < count * 100; i++) {
        char c = 1;
        wrong += read(fd, &c, 1) != 1 || c;
    }
    return wrong;
}

/* ---- memory ---- */

#define FAULT_PAGES 1024

static void *setup_fault(struct bench *b)
{
    void *p = must_map(FAULT_PAGES * PAGE, MAP_PRIVATE);
    (void)b;
    madvise(p, FAULT_PAGES * PAGE, MADV_NOHUGEPAGE);
    return p;
}
static uint64_t run_fault(void *state, uint64_t count)
{
    volatile uint8_t *p = state;
    uint64_t wrong = 0;

    while (count--) {
        if (madvise(state, FAULT_PAGES * PAGE, MADV_DONTNEED))
            die("madvise: %s", strerror(errno));
        for (unsigned i = 0; i < FAULT_PAGES; i++) {
            wrong += p[i * PAGE]++;
            wrong += p[i * PAGE] != 1;
        }
    }
    return wrong;
}
static uint64_t run_mmap(void *state, uint64_t count)
{
    uint64_t wrong = 0;
    (void)state;
    while (count--) {
        volatile uint8_t *p = must_map(MIB, MAP_PRIVATE);
        for (size_t i = 0; i < MIB; i += PAGE)
            wrong += p[i]++;
        wrong += munmap((void *)p, MIB) != 0;
    }
    return wrong;
}

/* ---- processes ---- */

static uint64_t run_fork(void *state, uint64_t count)
{
    uint64_t wrong = 0;
    (void)state;
    while (count--) {
        int status;
        pid_t pid = fork();
        if (pid < 0)
            die("fork: %s", strerror(errno));
        if (pid == 0)
            _exit(CHILD_STATUS);
        wrong += waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != CHILD_STATUS;
    }
    return wrong;
}
static void *setup_fork64(struct bench *b)
{
    uint8_t *p = must_map(64 * MIB, MAP_PRIVATE);
    (void)b;
    madvise(p, 64 * MIB, MADV_NOHUGEPAGE);
    for (size_t i = 0; i < 64 * MIB; i += PAGE)
        p[i] = 1;
    return p;
}
static void *setup_exec(struct bench *b)
{
    return (void *)b->self;
}
static KEEP bool exec_once(const char *self)
{
    char *const argv[] = { (char *)"rows", (char *)"--exit", NULL }, *const envp[] = { NULL };
    int status;
    pid_t pid = vfork();

    if (pid < 0)
        die("vfork: %s", strerror(errno));
    if (pid == 0) {
        execve(self, argv, envp);
        _exit(127);
    }
    return waitpid(pid, &status, 0) == pid && status == 0;
}
static uint64_t run_exec(void *state, uint64_t count)
{
    uint64_t wrong = 0;

    while (count--)
        wrong += !exec_once(state);
    return wrong;
}

/* ---- round trips ---- */

struct pair {
    int to[2], from[2];                                            /* pipes */
    uint32_t *turn;                                                /* futex: 0 ours, 1 the partner's */
};

static long futex(uint32_t *word, int op, uint32_t value)
{
    return syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}
static void wait_turn(uint32_t *turn, uint32_t mine)
{
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine)
        futex(turn, FUTEX_WAIT, !mine);
}
static void pass_turn(uint32_t *turn, uint32_t to)
{
    __atomic_store_n(turn, to, __ATOMIC_RELEASE);
    futex(turn, FUTEX_WAKE, 1);
}
static void partner(struct pair *p, bool pipes)
{
    uint8_t c;

    for (;;) {
        if (!pipes) {
            wait_turn(p->turn, 1);
            pass_turn(p->turn, 0);
        } else {
            if (read(p->to[0], &c, 1) != 1)
                _exit(1);
            c++;
            if (write(p->from[1], &c, 1) != 1)
                _exit(1);
        }
    }
}
static void *setup_pair(struct bench *b, bool pipes, bool two)
{
    struct pair *p = must_map(sizeof *p, MAP_PRIVATE);
    pid_t pid;

    if (two && b->cpu[1] < 0) {
        strcpy(b->skip, "there is only one processor");
        return NULL;
    }
    p->turn = must_map(PAGE, MAP_SHARED);
    if (pipe(p->to) || pipe(p->from) || (pid = fork()) < 0)
        die("pipe, fork: %s", strerror(errno));
    if (!pin(b->cpu[two && pid == 0]) && two)
        die("sched_setaffinity: %s", strerror(errno));             /* a kernel without SMP: nothing to do */
    if (pid == 0)
        partner(p, pipes);
    return p;
}
static void *setup_pipe1(struct bench *b)
{
    return setup_pair(b, true, false);
}
static void *setup_pipe2(struct bench *b)
{
    return setup_pair(b, true, true);
}
static void *setup_futex1(struct bench *b)
{
    return setup_pair(b, false, false);
}
static void *setup_futex2(struct bench *b)
{
    return setup_pair(b, false, true);
}
static uint64_t run_pipe(void *state, uint64_t count)
{
    struct pair *p = state;
    uint64_t wrong = 0;

    for (uint64_t i = 0; i < count * 10; i++) {
        uint8_t c = i;
        if (write(p->to[1], &c, 1) != 1 || read(p->from[0], &c, 1) != 1)
            die("pipe: %s", strerror(errno));
        wrong += c != (uint8_t)(i + 1);
    }
    return wrong;
}
static uint64_t run_futex(void *state, uint64_t count)
{
    struct pair *p = state;

    for (uint64_t i = 0; i < count * 10; i++) {
        pass_turn(p->turn, 1);
        wait_turn(p->turn, 0);
    }
    return 0;
}

/* ---- signals ---- */

static volatile sig_atomic_t signals;

static void on_signal(int sig)
{
    (void)sig;
    signals = signals + 1;
}
static void *setup_signal(struct bench *b)
{
    struct sigaction act = { .sa_handler = on_signal };
    if (sigaction(SIGUSR1, &act, NULL))
        die("sigaction: %s", strerror(errno));
    return b;
}
static uint64_t run_signal(void *state, uint64_t count)
{
    uint32_t before = signals;
    pid_t pid = getpid();
    (void)state;
    for (uint64_t i = 0; i < count * 10; i++)
        kill(pid, SIGUSR1);
    return (uint32_t)signals - before;
}
static uint64_t expect_signal(void *state, uint64_t count)
{
    (void)state;
    return (uint32_t)(count * 10);
}

/* ---- switches among 8 processes ---- */

#define RING 8

struct ring {
    int fds[RING][2];                                              /* process i reads from pipe i */
};

static void *setup_ring(struct bench *b)
{
    struct ring *r = must_map(sizeof *r, MAP_PRIVATE);

    pin(b->cpu[0]);
    for (int i = 0; i < RING; i++)
        if (pipe(r->fds[i]))
            die("pipe: %s", strerror(errno));
    for (int i = 1; i < RING; i++) {
        pid_t pid = fork();
        if (pid < 0)
            die("fork: %s", strerror(errno));
        while (pid == 0) {
            uint8_t c;
            if (read(r->fds[i][0], &c, 1) != 1)
                _exit(1);
            c++;
            if (write(r->fds[(i + 1) % RING][1], &c, 1) != 1)
                _exit(1);
        }
    }
    return r;
}
static uint64_t run_ring(void *state, uint64_t count)
{
    struct ring *r = state;
    uint64_t wrong = 0;

    for (uint64_t i = 0; i < count; i++) {
        uint8_t c = i;
        if (write(r->fds[1][1], &c, 1) != 1 || read(r->fds[0][0], &c, 1) != 1)
            die("pipe: %s", strerror(errno));
        wrong += c != (uint8_t)(i + RING - 1);
    }
    return wrong;
}

const struct row rows_sys[] = {
    { "getppid", "getppid", "call", 100, 0, NULL, run_getppid, NULL },
    { "zero", "read of 1 byte from /dev/zero", "call", 100, 0, setup_zero, run_zero, NULL },
    { "fault", "minor fault", "fault", FAULT_PAGES, 0, setup_fault, run_fault, NULL },
    { "mmap", "mmap, touch and munmap of 1 MiB", "MiB", 1, 0, NULL, run_mmap, NULL },
    { "fork", "fork, exit, wait, small process", "process", 1, 0, NULL, run_fork, NULL },
    { "fork-64M", "fork, exit, wait, 64 MiB process", "process", 1, 0, setup_fork64, run_fork, NULL },
    { "exec", "vfork and exec", "process", 1, 0, setup_exec, run_exec, NULL },
    { "pipe-1", "pipe round trip, one CPU", "trip", 10, 0, setup_pipe1, run_pipe, NULL },
    { "pipe-2", "pipe round trip, two CPUs", "trip", 10, 0, setup_pipe2, run_pipe, NULL },
    { "futex-1", "futex round trip, one CPU", "trip", 10, 0, setup_futex1, run_futex, NULL },
    { "futex-2", "futex round trip, two CPUs", "trip", 10, 0, setup_futex2, run_futex, NULL },
    { "signal", "signal delivery", "signal", 10, 0, setup_signal, run_signal, expect_signal },
    { "switch-8", "switches among 8 processes", "switch", RING, 0, setup_ring, run_ring, NULL },
    { 0 },
};
