/*
 * For tests of vsock, on the host and in guests: joins standard input and output to a connection, and times round trips.
 *
 *   stream listen PORT | call CID PORT           AF_VSOCK, in a guest
 *   stream unix-listen PATH | unix PATH [PORT]   a Unix socket; with PORT the handshake of doppel's vsock
 *   stream ... echo                              gives back what comes, until its end (listeners go on with the next one)
 *   stream ... ping COUNT BYTES                  so many round trips; prints the microseconds of one
 *   stream seq-...                               the same with messages (SOCK_SEQPACKET) instead of a stream
 *   stream marked-unix PATH PORT                 the same with marks (back/vsock_host.h); echo at a PATH_PORT.marked needs not know of them
 *   stream ... messages COUNT BYTES [eor]        sends so many, of up to so many bytes, four at a time; each has to come back as it was; prints the count;
 *                                                with eor every third has MSG_EOR, which has to come back, too
 *   stream ... pour BYTES | drink                sends so many bytes, reads to the end; prints MiB a second
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

static char buf[262144];
static int marked, seq;

static void die(const char *what)
{
    fprintf(stderr, "stream: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void put(int fd, const char *p, size_t len)
{
    while (len) {
        ssize_t n = write(fd, p, len);
        if (n < 0)
            die("write");
        p += n;
        len -= n;
    }
}

static int socket_at(const char *kind, char **argv, int *used)
{
    int type = seq ? SOCK_SEQPACKET : SOCK_STREAM;
    struct sockaddr_un u = { .sun_family = AF_UNIX };
    struct sockaddr_vm v = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
    int is_unix = strstr(kind, "unix") != NULL, listens = strstr(kind, "listen") != NULL;
    struct sockaddr *a = is_unix ? (struct sockaddr *)&u : (struct sockaddr *)&v;
    socklen_t len = is_unix ? sizeof u : sizeof v;
    int fd = socket(a->sa_family, type, 0);

    *used = 1;
    if (is_unix) {
        snprintf(u.sun_path, sizeof u.sun_path, "%s", argv[0]);
    } else if (listens) {
        v.svm_port = atoi(argv[0]);
    } else {
        v.svm_cid = atoi(argv[0]);
        v.svm_port = atoi(argv[1]);
        *used = 2;
    }
    if (fd < 0 || (listens ? bind(fd, a, len) || listen(fd, 64) : connect(fd, a, len)))
        die(kind);
    if (is_unix && !listens && argv[1] && argv[1][0] >= '0' && argv[1][0] <= '9') {
        dprintf(fd, "CONNECT %s%s\n", argv[1], marked ? " MARKED" : "");
        *used = 2;
        for (char c = 0; type == SOCK_STREAM && c != '\n';)
            if (read(fd, &c, 1) != 1)
                die("refused");
        if (type == SOCK_SEQPACKET && read(fd, buf, sizeof buf) < 4)
            die("refused");
    }
    return fd;
}

/* As recv() and send(); *eor: MSG_EOR, where a mark says it, by that. */
static ssize_t take(int fd, char *p, size_t size, int *eor)
{
    char mark = 0;
    struct iovec v[2] = { { &mark, 1 }, { p, size } };
    struct msghdr m = { .msg_iov = v + !marked, .msg_iovlen = 1 + marked };
    ssize_t n = recvmsg(fd, &m, 0);
    *eor = marked ? mark : (m.msg_flags & MSG_EOR) != 0;
    return n - marked;
}

static ssize_t give(int fd, char *p, size_t size, int eor)
{
    char mark = eor;
    struct iovec v[2] = { { &mark, 1 }, { p, size } };
    struct msghdr m = { .msg_iov = v + !marked, .msg_iovlen = 1 + marked };
    return sendmsg(fd, &m, !marked && eor ? MSG_EOR : 0) - marked;
}

static void echo(int fd)
{
    ssize_t n;
    int eor;
    while (seq && (n = take(fd, buf, sizeof buf, &eor)) > 0)
        if (give(fd, buf, n, eor) != n)
            die("send");
    while (!seq && (n = read(fd, buf, sizeof buf)) > 0)
        put(fd, buf, n);
    close(fd);
}

static void ping(int fd, int count, size_t bytes)
{
    double t = now();
    for (int i = 0; i < count; i++) {
        put(fd, buf, bytes);
        for (size_t done = 0; done < bytes;) {
            ssize_t n = read(fd, buf, bytes - done);
            if (n <= 0)
                die("ping");
            done += n;
        }
    }
    printf("%.1f\n", (now() - t) / count * 1e6);
}

static size_t message(int i, size_t most)
{
    size_t size = 1 + i * 2654435761u % most;

    for (size_t k = 0; k < size; k++)
        buf[k] = (char)(i * 31 + k * 7 + (k >> 8));
    return size;
}

static void messages(int fd, int count, size_t most, int eors)
{
    static char got[sizeof buf];
    int eor;

    for (int i = 0, back = 0; back < count;) {
        for (; i < count && i < back + 4; i++) {
            size_t size = message(i, most);
            if (give(fd, buf, size, eors && i % 3 == 2) != (ssize_t)size)
                die("send");
        }
        size_t size = message(back, most);
        ssize_t n = take(fd, got, sizeof got, &eor);
        if (n != (ssize_t)size || memcmp(got, buf, size) || eor != (eors && back % 3 == 2)) {
            printf("message %d of %zu bytes came as %zd, MSG_EOR %d\n", back, size, n, eor);
            exit(1);
        }
        back++;
    }
    printf("%d\n", count);
}

static void pour(int fd, unsigned long long bytes)
{
    double t = now();
    for (unsigned long long left = bytes; left;) {
        size_t n = left < 65536 ? left : 65536;
        put(fd, buf, n);
        left -= n;
    }
    shutdown(fd, SHUT_WR);
    while (read(fd, buf, sizeof buf) > 0)
        ;
    printf("%.1f\n", bytes / 1048576.0 / (now() - t));
}

static void drink(int fd)
{
    double t = 0;
    unsigned long long sum = 0;
    ssize_t n;
    while ((n = read(fd, buf, sizeof buf)) > 0) {
        t = t ? t : now();
        sum += n;
    }
    printf("%llu %.1f\n", sum, sum / 1048576.0 / (now() - t));
}

/* A process for each direction: neither waits for the other. */
static void join(int fd)
{
    ssize_t n;
    if (fork() == 0) {
        while ((n = read(0, buf, sizeof buf)) > 0)
            put(fd, buf, n);
        shutdown(fd, SHUT_WR);
        exit(n < 0);
    }
    while ((n = read(fd, buf, sizeof buf)) > 0)
        put(1, buf, n);
    if (n < 0)
        die("read");
    wait(NULL);
}

int main(int argc, char **argv)
{
    int used, fd, listens;

    signal(SIGPIPE, SIG_IGN);
    if (argc < 3)
        return 64;
    listens = strstr(argv[1], "listen") != NULL;
    marked = !strncmp(argv[1], "marked-", 7);
    seq = marked || !strncmp(argv[1], "seq-", 4);
    fd = socket_at(argv[1], argv + 2, &used);
    argv += 2 + used;
    do {
        int c = listens ? accept(fd, NULL, NULL) : fd;
        if (c < 0)
            die("accept");
        if (*argv && !strcmp(*argv, "echo")) {
            echo(c);
            continue;
        }
        if (!*argv)
            join(c);
        else if (!strcmp(*argv, "ping"))
            ping(c, atoi(argv[1]), atoi(argv[2]));
        else if (!strcmp(*argv, "messages"))
            messages(c, atoi(argv[1]), strtoul(argv[2], NULL, 10), argv[3] != NULL);
        else if (!strcmp(*argv, "pour"))
            pour(c, strtoull(argv[1], NULL, 10));
        else
            drink(c);
        break;
    } while (listens);
    return 0;
}
