/* The status file (status_file.h). */
#include "ctl/status_file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/err.h"

static int cannot(const char *path, int error)
{
    return err(-error, "--status-file %s: cannot write it: %s; name a file in a directory that you may write", path,
               strerror(error));
}

static bool replaceable(const char *path)
{
    struct stat st;
    return lstat(path, &st) < 0 || S_ISREG(st.st_mode);
}

static int temporary_name(const char *path, char name[PATH_MAX])
{
    int n = snprintf(name, PATH_MAX, "%s.%ld~", path, (long)getpid());
    return n < 0 || n >= PATH_MAX ? cannot(path, ENAMETOOLONG) : 0;
}

/*
 * Opens what will be written: the temporary file, or the device itself (a FIFO without a reader does not hold us up).
 */
static int open_for_writing(const char *path, char name[PATH_MAX], bool *replace)
{
    int r = temporary_name(path, name);
    if (r < 0)
        return r;
    *replace = replaceable(path);
    int fd = *replace ? open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644)
                      : open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    return fd < 0 ? cannot(path, errno) : fd;
}

int status_file_prepare(const char *path)
{
    char name[PATH_MAX];
    bool replace;
    int fd = open_for_writing(path, name, &replace);
    if (fd == -ENXIO && !replace)
        return 0;                                                  /* a FIFO; its reader may still come */
    if (fd < 0)
        return fd;
    close(fd);
    if (replace) {
        unlink(name);
        unlink(path);
    }
    return 0;
}

static size_t format(const struct status *s, char *text, size_t size)
{
    int n = snprintf(text, size, "status=%d\nend=%s\nfailed=%s\nreason=", s->status, s->end, s->failed);
    size_t used = MIN((size_t)MAX(n, 0), size - 2);
    for (const char *p = s->reason; *p && used < size - 2; p++)
        text[used++] = (unsigned char)*p < 0x20 ? ' ' : *p;
    text[used++] = '\n';
    return used;
}

int status_file_write(const char *path, const struct status *s)
{
    char name[PATH_MAX], text[2048];
    bool replace;
    size_t len = format(s, text, sizeof(text));
    int fd = open_for_writing(path, name, &replace);
    if (fd < 0)
        return fd;
    ssize_t n = write(fd, text, len);
    int error = n < 0 ? errno : ENOSPC;
    if (close(fd) < 0 && n == (ssize_t)len) {
        error = errno;
        n = -1;
    }
    if (n == (ssize_t)len && (!replace || rename(name, path) == 0))
        return 0;
    if (n == (ssize_t)len)
        error = errno;
    if (replace)
        unlink(name);
    return cannot(path, error);
}
