/*
 * back/vhost_user: the front end beside a process that is a thread here, on the other end of a socket pair. What it answers well, wrongly, in part, or not at
 * all; and what it does to the rings that it shares: nothing but an error and an end may come of it.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cmocka.h>

#include <linux/virtio_ring.h>

#include "back/vhost_user.h"

#define GET_FEATURES 1
#define SET_MEM_TABLE 5
#define SET_VRING_CALL 13
#define GET_PROTOCOL_FEATURES 15
#define GOOD_FEATURES (1ull << 32 | 1ull << 30)
#define REPLY_ACK 8
#define REPLY 4u
#define NEED_REPLY 8u
#define STEPS (6 + 2 * 6)                                          /* messages of a whole beginning with two queues */
#define USED_OFFSET 32768
#define RING_BYTES (2 * 65536)

enum trick { NONE, WRONG_REQUEST, NO_REPLY_FLAG, WRONG_SIZE, HALF, CLOSE, REFUSE, NO_FEATURES, NOISE };

struct peer {
    int sock;
    int at;                                                        /* which message the trick is for */
    enum trick trick;
    unsigned seed;
    int messages;
    int rings, call[2];
    u8 *mem;
};
struct message {
    u32 request, flags, size;
    u8 payload[512];
} __attribute__((packed));

static struct loop *loop;
static unsigned gone, used;

/* With the descriptors of SET_MEM_TABLE (the last is the rings') and SET_VRING_CALL. */
static bool next_message(struct peer *p, struct message *m)
{
    char control[CMSG_SPACE(sizeof(int) * 16)] __attribute__((aligned(8)));
    struct iovec iov = {m, 12};
    struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    if (recvmsg(p->sock, &h, MSG_WAITALL) != 12 || m->size > sizeof(m->payload) || (m->size && recv(p->sock, m->payload, m->size, MSG_WAITALL) != (ssize_t)m->size))
        return false;
    struct cmsghdr *c = CMSG_FIRSTHDR(&h);
    unsigned n = c ? (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
    for (unsigned i = 0; i < n; i++) {
        int fd;
        memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
        if (m->request == SET_MEM_TABLE && i + 1 == n)
            p->rings = fd;
        else if (m->request == SET_VRING_CALL && m->payload[0] < 2)
            p->call[m->payload[0]] = fd;
        else
            close(fd);
    }
    return true;
}

static void answer(struct peer *p, const struct message *m, u64 value)
{
    struct message a = {.request = m->request, .flags = 1 | REPLY, .size = 8};
    size_t len = 20;
    memcpy(a.payload, &value, 8);
    if (p->messages == p->at)
        switch (p->trick) {
        case WRONG_REQUEST: a.request = 77; break;
        case NO_REPLY_FLAG: a.flags = 1; break;
        case WRONG_SIZE: a.size = 0xffffffff; break;
        case HALF: len = 7; break;
        case CLOSE: len = 0; break;
        case REFUSE: case NO_FEATURES:
            memset(a.payload, p->trick == REFUSE ? 0xff : 0, 8);
            break;
        case NOISE:
            for (u8 *b = (u8 *)&a; b < (u8 *)&a + 20; b++)
                *b = (u8)rand_r(&p->seed);
            break;
        case NONE: break;
        }
    if (len && send(p->sock, &a, len, MSG_NOSIGNAL) < 0)
        return;
    if (len < 20)
        shutdown(p->sock, SHUT_RDWR);
}

static void *peer_main(void *arg)
{
    struct peer *p = arg;
    struct message m;
    while (next_message(p, &m)) {
        if (m.request == GET_FEATURES || m.request == GET_PROTOCOL_FEATURES)
            answer(p, &m, m.request == GET_FEATURES ? GOOD_FEATURES : REPLY_ACK);
        else if (m.flags & NEED_REPLY)
            answer(p, &m, 0);
        p->messages++;
    }
    return NULL;
}

static void on_gone(void *arg UNUSED)
{
    gone++;
    loop_stop(loop);
}

static void on_used(void *arg UNUSED, unsigned queue UNUSED)
{
    used++;
    loop_stop(loop);
}

static const struct vhost_user_ops ops = {.used = on_used, .gone = on_gone};

/* The peer's thread has ended when this is back with an error; else when the connection is closed. */
static int begin(struct peer *p, pthread_t *thread, struct vhost_user **v)
{
    int s[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
    p->sock = s[1];
    p->rings = p->call[0] = p->call[1] = -1;
    assert_int_equal(pthread_create(thread, NULL, peer_main, p), 0);
    return vhost_user_new(s[0], loop, NULL, 0, 2, &ops, NULL, v);
}

static void end(struct peer *p, pthread_t thread, struct vhost_user *v)
{
    vhost_user_free(v);
    shutdown(p->sock, SHUT_RDWR);
    pthread_join(thread, NULL);
    close(p->sock);
    if (p->mem)
        munmap(p->mem, RING_BYTES);
    for (int *fd = (int[]){p->rings, p->call[0], p->call[1], -2}; *fd != -2; fd++)
        if (*fd >= 0)
            close(*fd);
}

static int setup(void **state UNUSED)
{
    gone = used = 0;
    return loop_new(&loop);
}

static int teardown(void **state UNUSED)
{
    loop_free(loop);
    return 0;
}

static void wrong_answers_end_the_beginning(void **state UNUSED)
{
    static const struct { int at; enum trick trick; } cases[] = {
        {0, WRONG_REQUEST}, {0, NO_REPLY_FLAG}, {0, WRONG_SIZE}, {0, HALF}, {0, CLOSE}, {0, NO_FEATURES}, {1, WRONG_REQUEST}, {1, HALF}, {1, CLOSE},
        {3, REFUSE}, {3, WRONG_SIZE}, {4, REFUSE}, {5, REFUSE}, {5, CLOSE}, {5, HALF}, {8, REFUSE}, {11, WRONG_REQUEST}, {STEPS - 1, REFUSE}, {STEPS - 1, CLOSE},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        struct peer p = {.at = cases[i].at, .trick = cases[i].trick};
        struct vhost_user *v = NULL;
        pthread_t thread;
        int r = begin(&p, &thread, &v);
        if (r >= 0)
            fail_msg("case %u: accepted", i);
        assert_non_null(strstr(err_last(), "vhost-user"));
        end(&p, thread, v);
    }
}

/* What is right by chance goes on to the end. */
static void noise(void **state UNUSED)
{
    for (unsigned seed = 0; seed < 400; seed++) {
        struct peer p = {.at = (int)(seed % STEPS), .trick = NOISE, .seed = seed};
        struct vhost_user *v = NULL;
        pthread_t thread;
        int r = begin(&p, &thread, &v);
        assert_true(r < 0 || v);
        end(&p, thread, v);
    }
}

static struct vhost_user *good(struct peer *p, pthread_t *thread)
{
    struct vhost_user *v = NULL;
    assert_int_equal(begin(p, thread, &v), 0);
    assert_true(p->rings >= 0 && p->call[1] >= 0);
    p->mem = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, p->rings, 0);
    assert_ptr_not_equal(p->mem, MAP_FAILED);
    return v;
}

static struct vring_used *used_ring(const struct peer *p, unsigned queue)
{
    return (struct vring_used *)(p->mem + queue * 65536 + USED_OFFSET);
}

static void put_used(struct peer *p, unsigned queue, u32 id, u32 len)
{
    struct vring_used *u = used_ring(p, queue);
    u->ring[u->idx % VHOST_USER_RING] = (struct vring_used_elem){id, len};
    __atomic_store_n(&u->idx, (u16)(u->idx + 1), __ATOMIC_RELEASE);
    eventfd_write(p->call[queue], 1);
}

static const struct vhost_part parts[] = {{0x1000, 40, false}, {0x2000, 0, false}, {0x3000, 16, true}, {0x4000, 4096, true}};

static void requests_come_back(void **state UNUSED)
{
    struct peer p = {.at = -1};
    pthread_t thread;
    struct vhost_user *v = good(&p, &thread);
    int token[2];
    u32 len;
    assert_true(vhost_user_add(v, 1, parts, 4, &token[0]));
    assert_true(vhost_user_add(v, 1, parts, 1, &token[1]));
    const struct vring_desc *d = (const struct vring_desc *)(p.mem + 65536);
    assert_int_equal(d[0].len, 40);
    assert_int_equal(d[d[0].next].len, 16);                        /* that of no length is left out */
    vhost_user_kick(v, 1);
    assert_null(vhost_user_take(v, 1, &len));
    put_used(&p, 1, 3, 7);                                         /* the second one begins behind three descriptors */
    assert_int_equal(loop_run(loop), 0);
    assert_int_equal(used, 1);
    assert_ptr_equal(vhost_user_take(v, 1, &len), &token[1]);
    assert_int_equal(len, 7);
    put_used(&p, 1, 0, 0xffffffff);                                /* its length is the caller's affair */
    assert_ptr_equal(vhost_user_take(v, 1, &len), &token[0]);
    assert_null(vhost_user_take(v, 1, &len));
    end(&p, thread, v);
}

static void a_ring_is_full_and_goes_on(void **state UNUSED)
{
    struct peer p = {.at = -1};
    pthread_t thread;
    struct vhost_user *v = good(&p, &thread);
    u32 len;
    int token;
    for (unsigned round = 0; round < 3; round++) {
        for (unsigned i = 0; i < VHOST_USER_RING; i++)
            assert_true(vhost_user_add(v, 0, parts, 1, &token));
        assert_false(vhost_user_add(v, 0, parts, 1, &token));
        for (unsigned i = 0; i < VHOST_USER_RING; i++) {
            put_used(&p, 0, (i * 7) % VHOST_USER_RING, 0);
            assert_ptr_equal(vhost_user_take(v, 0, &len), &token);
        }
    }
    end(&p, thread, v);
}

/* An answer to nothing, to what was answered, beyond the ring: it is gone from then on, and told once. */
static void nonsense_in_the_ring(void **state UNUSED)
{
    static const u32 ids[] = {5, VHOST_USER_RING, 0xffffffff, 0};
    for (unsigned i = 0; i < ARRAY_SIZE(ids); i++) {
        struct peer p = {.at = -1};
        pthread_t thread;
        struct vhost_user *v = good(&p, &thread);
        int token;
        u32 len;
        gone = 0;
        assert_true(vhost_user_add(v, 0, parts, 4, &token));
        if (ids[i] == 0) {                                         /* the same twice */
            put_used(&p, 0, 0, 1);
            assert_ptr_equal(vhost_user_take(v, 0, &len), &token);
        }
        put_used(&p, 0, ids[i], 1);
        while (!gone) {
            assert_null(vhost_user_take(v, 0, &len));
            assert_int_equal(loop_run(loop), 0);
        }
        assert_int_equal(gone, 1);
        assert_false(vhost_user_add(v, 0, parts, 1, &token));
        assert_null(vhost_user_take(v, 0, &len));
        end(&p, thread, v);
    }
}

/* All of the memory that it shares, overwritten again and again: nothing of ours is believed that lies there. */
static void rings_full_of_noise(void **state UNUSED)
{
    unsigned seed = 1;
    for (unsigned round = 0; round < 50; round++) {
        struct peer p = {.at = -1};
        pthread_t thread;
        struct vhost_user *v = good(&p, &thread);
        int token;
        u32 len;
        gone = 0;
        for (unsigned i = 0; i < 300 && !gone; i++) {
            u32 word = (u32)rand_r(&seed);
            size_t at = (size_t)rand_r(&seed) % (RING_BYTES / 4) * 4;
            if (i % 4)
                at = at % 16384 / 64 * 4 + USED_OFFSET;            /* mostly where answers are */
            memcpy(p.mem + at, &word, 4);
            vhost_user_add(v, 0, parts, 1 + i % 4, &token);
            vhost_user_kick(v, 0);
            void *t = vhost_user_take(v, 0, &len);
            assert_true(!t || t == &token);
        }
        end(&p, thread, v);
    }
}

static void it_goes_away(void **state UNUSED)
{
    struct peer p = {.at = -1};
    pthread_t thread;
    struct vhost_user *v = good(&p, &thread);
    int token;
    assert_true(vhost_user_add(v, 0, parts, 2, &token));
    shutdown(p.sock, SHUT_RDWR);
    assert_int_equal(loop_run(loop), 0);
    assert_int_equal(gone, 1);
    assert_false(vhost_user_add(v, 0, parts, 1, &token));
    end(&p, thread, v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(wrong_answers_end_the_beginning, setup, teardown), cmocka_unit_test_setup_teardown(noise, setup, teardown),
        cmocka_unit_test_setup_teardown(requests_come_back, setup, teardown), cmocka_unit_test_setup_teardown(a_ring_is_full_and_goes_on, setup, teardown),
        cmocka_unit_test_setup_teardown(nonsense_in_the_ring, setup, teardown), cmocka_unit_test_setup_teardown(rings_full_of_noise, setup, teardown),
        cmocka_unit_test_setup_teardown(it_goes_away, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
