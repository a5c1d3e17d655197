/*
 * A library for LD_PRELOAD: /dev/kvm that refuses. By environment:
 *
 *   KVM_REFUSE_NR=N      each ioctl of KVM's whose number (_IOC_NR) is N fails with EIO
 *   KVM_REFUSE_CAP=N     KVM_CHECK_EXTENSION says that there is no capability N
 *   KVM_REFUSE_OPEN=N    the Nth open of /dev/kvm, and all behind it, find no such file
 *   KVM_REFUSE_LOG=FILE  a line for each ioctl of KVM's, "nr N", and each capability that is asked for, "cap N"
 *
 * Threads: any; the count of opens is atomic.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static long wish(const char *name)
{
    const char *s = getenv(name);

    return s && *s ? strtol(s, NULL, 0) : -1;
}

static void note(const char *what, unsigned long n)
{
    const char *path = getenv("KVM_REFUSE_LOG");
    char line[64];
    int fd, len = snprintf(line, sizeof line, "%s %lu\n", what, n);

    if (!path || !*path || (fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600)) < 0)
        return;
    if (write(fd, line, (size_t)len) != len)
        abort();
    close(fd);
}

int ioctl(int fd, unsigned long request, ...)
{
    static int (*real)(int, unsigned long, ...);
    va_list ap;
    void *arg;

    va_start(ap, request);
    arg = va_arg(ap, void *);
    va_end(ap);
    if (!real)
        real = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    if (_IOC_TYPE(request) != KVMIO)
        return real(fd, request, arg);
    note("nr", _IOC_NR(request));
    if (request == KVM_CHECK_EXTENSION) {
        note("cap", (unsigned long)arg);
        if (wish("KVM_REFUSE_CAP") == (long)arg)
            return 0;
    }
    if (wish("KVM_REFUSE_NR") == (long)_IOC_NR(request)) {
        errno = EIO;
        return -1;
    }
    return real(fd, request, arg);
}

int open(const char *path, int flags, ...)
{
    static int (*real)(const char *, int, ...);
    static atomic_int opens;
    va_list ap;
    int mode;

    va_start(ap, flags);
    mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(ap, int) : 0;
    va_end(ap);
    if (!real)
        real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
    if (!strcmp(path, "/dev/kvm") && wish("KVM_REFUSE_OPEN") > 0 &&
        atomic_fetch_add(&opens, 1) + 1 >= (int)wish("KVM_REFUSE_OPEN")) {
        errno = ENOENT;
        return -1;
    }
    return real(path, flags, mode);
}
