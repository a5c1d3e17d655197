/*
 * The two ends of what network tests send, on the host and in the guest (static, for that reason).
 *
 *   netpeer listen ADDR PORT send|recv|flood|drain|echo BYTES    serves one TCP connection
 *   netpeer connect ADDR PORT send|recv|flood|drain|rr BYTES     the other end; rr: BYTES requests of one byte, each answered
 *   netpeer udp-echo ADDR PORT                       returns datagrams, until one of one byte comes
 *   netpeer udp-ask ADDR PORT COUNT SIZE             sends such, and the byte; counts the right answers
 *   netpeer dns ADDR NAME A AAAA                     answers questions for NAME, at port 53, for ever
 *   netpeer bind ADDR PORT tcp|udp                   takes the port and keeps it until it is killed
 *   netpeer data BYTES                               prints what "send" would send
 *   netpeer tap NAME vnet|plain QUEUES -- COMMAND    opens a tap device as descriptors 10, 11, ... and becomes the command
 *   netpeer passt SOCKET MODE                        plays passt: answers nothing ("mute"), hangs up after a frame ("quit"), sends nonsense ("liar")
 *
 * Data are pseudo-random words that the other end knows, so every byte is compared; but flood and drain only count, for measurements. Who listens prints "listening" when it does. The last line says what came:
 * "BYTES bytes, SECONDS s", or "wrong at OFFSET". A status other than 0 tells that something was not as it should be.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 65536

static void die(const char *what)
{
    printf("%s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* The words from offset on, which is a multiple of 8. */
static void fill(uint64_t *buf, size_t bytes, uint64_t offset)
{
    for (size_t i = 0; i < (bytes + 7) / 8; i++)
        buf[i] = mix(offset / 8 + i);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static socklen_t address(const char *addr, const char *port, struct sockaddr_storage *s)
{
    struct sockaddr_in *a4 = (void *)s;
    struct sockaddr_in6 *a6 = (void *)s;
    char name[128], *zone;

    memset(s, 0, sizeof *s);
    snprintf(name, sizeof name, "%s", addr);
    zone = strchr(name, '%');
    if (zone) {
        *zone = 0;
        a6->sin6_scope_id = if_nametoindex(zone + 1);
    }
    if (inet_pton(AF_INET, name, &a4->sin_addr) == 1) {
        a4->sin_family = AF_INET;
        a4->sin_port = htons(atoi(port));
        return sizeof *a4;
    }
    if (inet_pton(AF_INET6, name, &a6->sin6_addr) != 1)
        die(addr);
    a6->sin6_family = AF_INET6;
    a6->sin6_port = htons(atoi(port));
    return sizeof *a6;
}

static int open_socket(const char *addr, const char *port, int type, int listening)
{
    struct sockaddr_storage s;
    socklen_t len = address(addr, port, &s);
    int one = 1, fd = socket(s.ss_family, type, 0);

    if (fd < 0)
        die("socket");
    if (s.ss_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    if (!listening) {
        if (connect(fd, (void *)&s, len))
            die("connect");
        return fd;
    }
    if (type == SOCK_STREAM)
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (void *)&s, len) || (type == SOCK_STREAM && listen(fd, 8)))
        die("bind");
    printf("listening\n");
    fflush(stdout);
    return fd;
}

/* --- TCP --- */

static void send_all(int fd, uint64_t bytes, int fresh)
{
    static uint64_t buf[CHUNK / 8];

    for (uint64_t done = 0; done < bytes;) {
        size_t want = bytes - done < CHUNK ? bytes - done : CHUNK, at = 0;

        if (fresh || !done)
            fill(buf, want, done);
        while (at < want) {
            ssize_t n = write(fd, (char *)buf + at, want - at);
            if (n < 0)
                die("write");
            at += n;
        }
        done += want;
    }
    shutdown(fd, SHUT_WR);
}

static void recv_all(int fd, uint64_t bytes, double start, int compare)
{
    static uint64_t buf[CHUNK / 8], right[CHUNK / 8 + 2];
    uint64_t done = 0;
    ssize_t n;

    while ((n = read(fd, buf, CHUNK)) > 0) {
        if (compare)
            fill(right, n + 16, done & ~7ull);
        if (compare && memcmp(buf, (char *)right + (done & 7), n)) {
            printf("wrong at %llu\n", (unsigned long long)done);
            exit(1);
        }
        done += n;
    }
    if (n < 0)
        die("read");
    printf("%llu bytes, %.3f s\n", (unsigned long long)done, now() - start);
    if (done != bytes)
        exit(1);
}

static void echo(int fd)
{
    char buf[CHUNK];
    ssize_t n;

    while ((n = read(fd, buf, sizeof buf)) > 0)
        if (write(fd, buf, n) != n)
            die("write");
}

static void request_response(int fd, uint64_t count, double start)
{
    char c;

    for (uint64_t i = 0; i < count; i++) {
        c = (char)i;
        if (write(fd, &c, 1) != 1 || read(fd, &c, 1) != 1 || c != (char)i)
            die("request");
    }
    printf("%llu requests, %.3f s\n", (unsigned long long)count, now() - start);
}

static int tcp(int fd, const char *what, uint64_t bytes)
{
    int one = 1;
    double start = now();
    char c;

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!strcmp(what, "send") || !strcmp(what, "flood")) {
        send_all(fd, bytes, *what == 's');
        if (read(fd, &c, 1) != 0)                                  /* the other end has read all, and closes */
            die("end");
        printf("%llu bytes, %.3f s\n", (unsigned long long)bytes, now() - start);
    } else if (!strcmp(what, "recv") || !strcmp(what, "drain")) {
        recv_all(fd, bytes, start, *what == 'r');
    } else if (!strcmp(what, "rr")) {
        request_response(fd, bytes, start);
    } else {
        echo(fd);
    }
    return 0;
}

/* --- UDP --- */

static int udp_echo(int fd)
{
    struct sockaddr_storage from;
    char buf[65536];

    for (;;) {
        socklen_t len = sizeof from;
        ssize_t n = recvfrom(fd, buf, sizeof buf, 0, (void *)&from, &len);

        if (n < 0)
            die("recv");
        sendto(fd, buf, n, 0, (void *)&from, len);
        if (n == 1)
            return 0;
    }
}

/* Datagrams may be lost; each is asked for again. */
static int udp_ask(int fd, unsigned count, size_t size)
{
    static uint64_t buf[8192], got[8192];
    struct timeval wait = { .tv_usec = 500000 };
    unsigned right = 0;

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    for (unsigned i = 0; i < count; i++) {
        fill(buf, size, 8ull * i);
        for (unsigned tries = 0; tries < 20; tries++) {
            send(fd, buf, size, 0);
            if (recv(fd, got, sizeof got, 0) == (ssize_t)size && !memcmp(buf, got, size)) {
                right++;
                break;
            }
        }
    }
    send(fd, "", 1, 0);
    printf("%u of %u\n", right, count);
    return right != count;
}

/* One question with one answer (RFC 1035), for a name without surprises. */
static void dns(int fd, const char *name, const char *a, const char *aaaa)
{
    uint8_t buf[1500], *p;
    struct sockaddr_storage from;

    for (;;) {
        socklen_t len = sizeof from;
        ssize_t n = recvfrom(fd, buf, 512, 0, (void *)&from, &len);
        char asked[256] = "";
        int type, size;

        if (n < 17)
            continue;
        for (p = buf + 12; *p && p + *p < buf + n && strlen(asked) + *p < 250; p += *p + 1)
            sprintf(asked + strlen(asked), "%s%.*s", *asked ? "." : "", *p, p + 1);
        type = p[1] << 8 | p[2];
        p += 5;
        buf[2] = 0x85, buf[3] = 0x80;
        memset(buf + 6, 0, 6);
        size = type == 1 ? 4 : 16;
        if (strcasecmp(asked, name) || (type != 1 && type != 28)) {
            buf[3] |= strcasecmp(asked, name) ? 3 : 0;
        } else {
            buf[7] = 1;
            memcpy(p, (uint8_t[]){ 0xc0, 12, 0, type, 0, 1, 0, 0, 0, 60, 0, size }, 12);
            inet_pton(type == 1 ? AF_INET : AF_INET6, type == 1 ? a : aaaa, p + 12);
            p += 12 + size;
        }
        sendto(fd, buf, p - buf, 0, (void *)&from, len);
    }
}

/* --- others --- */

static int tap(char **argv)
{
    int queues = atoi(argv[2]);

    for (int i = 0; i < queues; i++) {
        struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI | (!strcmp(argv[1], "vnet") ? IFF_VNET_HDR : 0) | (queues > 1 ? IFF_MULTI_QUEUE : 0) };
        int fd = open("/dev/net/tun", O_RDWR);

        snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "%s", argv[0]);
        if (fd < 0 || ioctl(fd, TUNSETIFF, &ifr) || dup2(fd, 10 + i) < 0)
            die("tap");
        close(fd);
    }
    execvp(argv[4], argv + 4);
    die(argv[4]);
    return 1;
}

static int passt(const char *path, const char *mode)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int s = socket(AF_UNIX, SOCK_STREAM, 0), fd;
    static char buf[CHUNK];

    snprintf(a.sun_path, sizeof a.sun_path, "%s", path);
    unlink(path);
    if (bind(s, (void *)&a, sizeof a) || listen(s, 1))
        die(path);
    printf("listening\n");
    fflush(stdout);
    fd = accept(s, NULL, NULL);
    if (!strcmp(mode, "liar"))
        (void)!write(fd, "\xff\xff\xff\xff junk", 9);
    while (read(fd, buf, sizeof buf) > 0)
        if (!strcmp(mode, "quit"))
            break;
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";

    alarm(400);                                                    /* whoever waits for one that has died does so for some minutes only */
    if (argc == 6 && !strcmp(what, "listen"))
        return tcp(accept(open_socket(argv[2], argv[3], SOCK_STREAM, 1), NULL, NULL), argv[4], strtoull(argv[5], NULL, 10));
    if (argc == 6 && !strcmp(what, "connect"))
        return tcp(open_socket(argv[2], argv[3], SOCK_STREAM, 0), argv[4], strtoull(argv[5], NULL, 10));
    if (argc == 4 && !strcmp(what, "udp-echo"))
        return udp_echo(open_socket(argv[2], argv[3], SOCK_DGRAM, 1));
    if (argc == 6 && !strcmp(what, "udp-ask"))
        return udp_ask(open_socket(argv[2], argv[3], SOCK_DGRAM, 0), atoi(argv[4]), atoi(argv[5]));
    if (argc == 6 && !strcmp(what, "dns"))
        dns(open_socket(argv[2], "53", SOCK_DGRAM, 1), argv[3], argv[4], argv[5]);
    if (argc == 5 && !strcmp(what, "bind")) {
        open_socket(argv[2], argv[3], !strcmp(argv[4], "udp") ? SOCK_DGRAM : SOCK_STREAM, 1);
        pause();
    }
    if (argc == 3 && !strcmp(what, "data")) {
        static uint64_t word;

        for (uint64_t at = 0, bytes = strtoull(argv[2], NULL, 10); at < bytes; at += 8) {
            fill(&word, 8, at);
            fwrite(&word, 1, bytes - at < 8 ? bytes - at : 8, stdout);
        }
        return fflush(stdout) != 0;
    }
    if (argc > 6 && !strcmp(what, "tap"))
        return tap(argv + 2);
    if (argc == 4 && !strcmp(what, "passt"))
        return passt(argv[2], argv[3]);
    fprintf(stderr, "netpeer: see the head of its source\n");
    return 64;
}
