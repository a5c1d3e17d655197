/* Listening sockets (listen.h): unix(7), tcp(7). */
#define _GNU_SOURCE
#include "back/listen.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/err.h"

/* The file may have been replaced by somebody else's by now. */
static void socket_file_remove(const struct listener *l)
{
    struct stat st;
    if (l->made.st_ino && lstat(l->address.sun_path, &st) == 0 && st.st_ino == l->made.st_ino &&
        st.st_dev == l->made.st_dev)
        unlink(l->address.sun_path);
}

void listener_close(struct listener *l)
{
    if (l->fd < 0)
        return;
    close(l->fd);
    l->fd = -1;
    socket_file_remove(l);
}

/* Makes way at the path: a socket that refuses is left over from a process that ended without removing it (one of another type says so: EPROTOTYPE). */
static int stale_socket_remove(const char *label, const struct sockaddr_un *address)
{
    const char *path = address->sun_path;
    struct stat st;
    if (lstat(path, &st) < 0)
        /* bind() will say what is wrong, if it is not just absent */
        return 0;
    if (!S_ISSOCK(st.st_mode))
        return err(-EEXIST, "%s unix:%s: there is a file that is no socket; remove it or choose another path", label,
                   path);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe < 0)
        return err(-errno, "%s unix:%s: cannot make a socket: %s", label, path, strerror(errno));
    int r = connect(probe, (const struct sockaddr *)address, sizeof(*address));
    int error = errno;
    close(probe);
    if (r == 0 || error != ECONNREFUSED)
        return err(-EADDRINUSE, "%s unix:%s: another process listens there; end it or choose another path", label,
                   path);
    if (unlink(path) < 0)
        return err(-errno, "%s unix:%s: cannot remove the socket that was left there: %s", label, path,
                   strerror(errno));
    return 0;
}

static int unix_listen(struct listener *l, const char *label, int type)
{
    const char *path = l->address.sun_path;
    int r = stale_socket_remove(label, &l->address);
    if (r < 0)
        return r;
    l->fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (l->fd < 0)
        return err(-errno, "%s unix:%s: cannot make a socket: %s", label, path, strerror(errno));
    /*
     * bind() gives the new file the socket inode's permissions less the umask (unix(7)), so that it is never open to
     * others, not even for a moment.
     */
    if (fchmod(l->fd, 0600) < 0 || bind(l->fd, (struct sockaddr *)&l->address, sizeof(l->address)) < 0)
        return err(-errno, "%s unix:%s: cannot listen: %s; choose a path in a directory that you may write", label,
                   path, strerror(errno));
    if (lstat(path, &l->made) < 0 || listen(l->fd, 1) < 0)
        return err(-errno, "%s unix:%s: cannot listen: %s", label, path, strerror(errno));
    return 0;
}

int listener_unix(struct listener *l, const char *label, const char *path, int type)
{
    *l = (struct listener){.fd = -1, .address.sun_family = AF_UNIX};
    if (!*path || strlen(path) >= sizeof(l->address.sun_path))
        return err(-ENAMETOOLONG, "%s unix:%s: the path must have 1 to %zu bytes; use a shorter one", label, path,
                   sizeof(l->address.sun_path) - 1);
    memcpy(l->address.sun_path, path, strlen(path));
    int r = unix_listen(l, label, type);
    if (r < 0)
        listener_close(l);
    return r;
}

int listener_tcp(struct listener *l, const char *label, u16 port)
{
    const struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    int one = 1, r = 0;
    *l = (struct listener){.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    if (l->fd < 0)
        return err(-errno, "%s %u: cannot make a socket: %s", label, port, strerror(errno));
    if (setsockopt(l->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) < 0 ||
        bind(l->fd, (const struct sockaddr *)&address, sizeof(address)) < 0 || listen(l->fd, 1) < 0)
        r = err(-errno, "%s %u: cannot listen on 127.0.0.1: %s; choose another port", label, port, strerror(errno));
    if (r < 0)
        listener_close(l);
    return r;
}

int listener_accept(const struct listener *l)
{
    int one = 1, fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* refused by a Unix socket, which has no delay */
    return fd;
}
