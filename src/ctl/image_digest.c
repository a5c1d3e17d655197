/*
 * The digest of an image's disk (image_store.h): an image is mostly holes, so zeroes are left out, and what is not zero is told where it lies. The
 * sums are made by coreutils' sha256sum.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/err.h"
#include "ctl/image_store.h"

#define PIECE (1u << 20)
#define HEX 64

struct summer {
    pid_t pid;
    int in, out;
};

static int start(struct summer *s)
{
    int to[2], from[2];
    if (pipe2(to, O_CLOEXEC) < 0)
        return err(-errno, "cannot make a pipe: %s", strerror(errno));
    if (pipe2(from, O_CLOEXEC) < 0) {
        close(to[0]);
        close(to[1]);
        return err(-EMFILE, "cannot make a pipe");
    }
    s->pid = fork();
    if (s->pid == 0) {
        dup2(to[0], STDIN_FILENO);
        dup2(from[1], STDOUT_FILENO);
        execlp("sha256sum", "sha256sum", (char *)NULL);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    s->in = to[1];
    s->out = from[0];
    if (s->pid < 0) {
        close(s->in);
        close(s->out);
        return err(-errno, "cannot start sha256sum: %s", strerror(errno));
    }
    return 0;
}

static bool put(const struct summer *s, const void *buf, size_t len)
{
    while (len) {
        ssize_t n = write(s->in, buf, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        buf = (const u8 *)buf + n;
        len -= (size_t)n;
    }
    return true;
}

static int finish(struct summer *s, char out[IMAGE_DIGEST_MAX])
{
    char hex[HEX + 1] = "";
    size_t have = 0;
    ssize_t n;
    int status;
    close(s->in);
    while (have < HEX && (n = read(s->out, hex + have, HEX - have)) > 0)
        have += (size_t)n;
    close(s->out);
    while (waitpid(s->pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (have != HEX || strspn(hex, "0123456789abcdef") != HEX)
        return err(-EIO, "sha256sum failed; is it installed (package coreutils)?");
    snprintf(out, IMAGE_DIGEST_MAX, "sha256:%s", hex);
    return 0;
}

static bool all_zero(const u8 *buf, size_t len)
{
    return !buf[0] && !memcmp(buf, buf + 1, len - 1);
}

/* The next piece at or behind offset that may have data; -1: none. */
static s64 next_piece(int fd, s64 offset)
{
    off_t data = lseek(fd, offset, SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? -1 : offset;                       /* a file system that does not know */
    return MAX((s64)data / PIECE * PIECE, offset);
}

static int sum_all(const struct summer *s, int fd, s64 size, u8 *buf)
{
    char number[32];
    for (s64 at = 0; at < size && (at = next_piece(fd, at)) >= 0 && at < size; at += PIECE) {
        size_t len = (size_t)MIN((s64)PIECE, size - at);
        ssize_t n = pread(fd, buf, len, at);
        if (n != (ssize_t)len)
            return -EIO;
        int digits = snprintf(number, sizeof(number), "%lld\n", (long long)(at / PIECE));
        if (!all_zero(buf, len) && (!put(s, number, (size_t)digits) || !put(s, buf, len)))
            return -EPIPE;
    }
    return 0;
}

int image_digest(const struct image *i, char out[IMAGE_DIGEST_MAX])
{
    struct summer s = {.in = -1, .out = -1};
    struct stat st;
    int fd = openat(i->fd, "root.img", O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    u8 *buf = malloc(PIECE);
    int r = -ENOMEM;
    if (fd < 0 || fstat(fd, &st) < 0 || !buf) {
        r = err(-EIO, "image %s: its disk cannot be read", i->name);
    } else if ((r = start(&s)) == 0) {
        int summed = sum_all(&s, fd, st.st_size, buf);
        r = finish(&s, out);
        if (r == 0 && summed < 0)
            r = err(summed, "image %s: its disk cannot be read", i->name);
    }
    if (fd >= 0)
        close(fd);
    free(buf);
    return r;
}
