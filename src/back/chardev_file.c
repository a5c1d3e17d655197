/*
 * Console output to a file, a FIFO or a device (chardev_host.h). No input.
 *
 * A FIFO can be opened for writing only while somebody reads it (fifo(7)): until then, and again after the reader has
 * gone, the last bytes are kept, and each time the guest says something we look whether a reader has come. Any other
 * output that fails (a full disk) is told once and then dropped.
 *
 * Locking: as fdio.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "back/chardev_host.h"
#include "back/fdio.h"

struct chardev_file {
    struct chardev c;
    struct fdout out;
    char *path;
    const struct log *log;
    int fd;                                                        /* -1: a FIFO without a reader, or broken */
};

static void file_room(void *arg)
{
    struct chardev_file *f = arg;
    chardev_front_writable(&f->c);
}

static void file_close(struct chardev_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    f->fd = -1;
}

static void file_broken(void *arg, int error)
{
    struct chardev_file *f = arg;
    file_close(f);
    /* The reader of a FIFO has gone: file_wanted() looks for the next. */
    if (!f->out.keep)
        log_msg(f->log, LOG_ERROR, "console %s: cannot write: %s; the guest runs on, what it says is dropped", f->path,
                strerror(error));
    f->c.opened = false;
    chardev_front_event(&f->c, CHARDEV_BROKEN);
    chardev_front_writable(&f->c);
    chardev_tell_drained(&f->c);
}

static void file_drained(void *arg)
{
    struct chardev_file *f = arg;
    chardev_tell_drained(&f->c);
}

static int file_open(const char *path, int flags)
{
    return open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC | flags, 0666);
}

/* Only for a FIFO (kept output): has a reader come? ENXIO: none yet. */
static void file_wanted(void *arg)
{
    struct chardev_file *f = arg;
    if (!f->out.keep)
        return;
    f->fd = file_open(f->path, 0);
    if (f->fd < 0)
        return;
    if (fdout_attach(&f->out, f->fd) < 0) {
        file_close(f);
        return;
    }
    f->c.opened = true;
    chardev_front_event(&f->c, CHARDEV_OPENED);
}

static const struct fdout_ops file_out_ops = {
    .room = file_room, .drained = file_drained, .broken = file_broken, .wanted = file_wanted,
};

static size_t chardev_file_write(struct chardev *c, const u8 *buf, size_t len)
{
    return fdout_write(&container_of(c, struct chardev_file, c)->out, buf, len);
}

static void chardev_file_rx_ready(struct chardev *c UNUSED)
{
}

static size_t chardev_file_pending(struct chardev *c)
{
    return fdout_pending(&container_of(c, struct chardev_file, c)->out);
}

static void chardev_file_free(struct chardev *c)
{
    struct chardev_file *f = container_of(c, struct chardev_file, c);
    fdout_close(&f->out);
    file_close(f);
    free(f->path);
    free(f);
}

static const struct chardev_ops chardev_file_ops = {
    .write = chardev_file_write, .rx_ready = chardev_file_rx_ready, .pending = chardev_file_pending,
    .free = chardev_file_free,
};

/* Opens path; *fifo tells its kind. A FIFO without a reader gives -1 and no error. */
static int file_open_first(const char *path, bool *fifo, int *fd)
{
    struct stat st;
    *fifo = stat(path, &st) == 0 && S_ISFIFO(st.st_mode);
    *fd = file_open(path, *fifo ? 0 : O_CREAT | O_TRUNC);
    if (*fd >= 0 || (*fifo && errno == ENXIO))
        return 0;
    return err(-errno, "console %s: cannot open it for writing: %s; name a file that you may write", path,
               strerror(errno));
}

int chardev_file_new(struct loop *loop, const char *path, const struct log *log, struct chardev **c)
{
    bool fifo;
    int fd;
    int r = file_open_first(path, &fifo, &fd);
    if (r < 0)
        return r;
    struct chardev_file *f = calloc(1, sizeof(*f));
    if (!f) {
        if (fd >= 0)
            close(fd);
        return err(-ENOMEM, "console %s: no memory", path);
    }
    *f = (struct chardev_file){.c = {.ops = &chardev_file_ops, .opened = fd >= 0}, .path = strdup(path), .log = log,
                               .fd = fd};
    r = f->path ? fdout_open(&f->out, loop, CHARDEV_BUFFER, fifo, &file_out_ops, f) : err(-ENOMEM, "no memory");
    if (r == 0 && fd >= 0)
        r = fdout_attach(&f->out, fd);
    if (r < 0) {
        chardev_file_free(&f->c);
        return err(r, "console %s: %s", path, err_last());
    }
    *c = &f->c;
    return 0;
}
