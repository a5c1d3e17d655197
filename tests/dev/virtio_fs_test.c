/*
 * The file system device (virtio_fs.c) with a virtiofsd that has few descriptors: a guest whose FORGETs come late gets its answers all the same, one that has all descriptors
 * in use gets an error. What requests do is tests/boot/share.sh's affair.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <errno.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "back/virtiofsd.h"
#include "dev/virtio_fs.h"
#include "virtio_guest.h"

#define DEV 4
#define QUEUE 256
#define DESCRIPTORS 100u
#define FILES 200u
#define OUT 0x400000ull                                            /* requests, of 128 bytes each */
#define FORGETS 0x440000ull
#define IN 0x500000ull                                             /* answers, of 256 */

struct answer {
    struct fuse_out_header head;
    struct fuse_entry_out entry;
};

static struct guest g;
static struct loop *loop;
static struct clock *guest_clock;
static struct virtio_fs *dev;
static struct vdev d;
static pthread_t thread;
static bool usable, up;
static char folder[] = "/tmp/doppel-fs-XXXXXX";
static unsigned request_of[2 * QUEUE], forgets;                    /* by its first descriptor */

static void *run(void *arg UNUSED)
{
    loop_run(loop);
    return NULL;
}

/* As an ordinary user, whom nobody gives more descriptors. */
static int make_folder(void **state UNUSED)
{
    struct rlimit l = { DESCRIPTORS, DESCRIPTORS };
    bool ordinary = geteuid() != 0 || (setgid(65534) == 0 && setuid(65534) == 0);
    char path[64];
    FILE *f;

    prctl(PR_SET_DUMPABLE, 1);                                     /* so that its user namespace can be told who it is */
    if (!mkdtemp(folder) || setrlimit(RLIMIT_NOFILE, &l) < 0)
        return -1;
    for (unsigned i = 0; i < FILES; i++) {
        snprintf(path, sizeof(path), "%s/%u", folder, i);
        f = fopen(path, "w");
        if (!f)
            return -1;
        fclose(f);
    }
    if (!ordinary)
        err(-EPERM, "root cannot become nobody here");
    else if (access("/proc/thread-self/children", R_OK) < 0)
        err(-errno, "the kernel does not tell whose child a process is");
    else
        usable = virtiofsd_usable(folder, false) == 0;
    return 0;
}

static int remove_folder(void **state UNUSED)
{
    char path[64];

    for (unsigned i = 0; i < FILES; i++) {
        snprintf(path, sizeof(path), "%s/%u", folder, i);
        unlink(path);
    }
    return rmdir(folder);
}

static void offer(unsigned i, u32 opcode, const void *body, u32 len)
{
    struct fuse_in_header h = { .len = (u32)sizeof(h) + len, .opcode = opcode, .unique = i + 1, .nodeid = FUSE_ROOT_ID };
    u64 at = OUT + i * 128;

    put(&g, at, &h, sizeof(h));
    put(&g, at + sizeof(h), body, len);
    request_of[gq_add(&d.q[1], (struct buf[]){ { at, h.len, false }, { IN + i * 256, 256, true } }, 2)] = i;
}

/* The next answer; a busy machine may take its time. */
static struct answer answered(unsigned *i)
{
    struct answer a;
    u32 id = 0, len;
    bool come = false;

    for (unsigned tries = 0; tries < 30 && !come; tries++)
        come = vdev_wait(&d, 1, &id, &len);
    assert_true(come);
    *i = request_of[id];
    get(&g, IN + *i * 256, &a, sizeof(a));
    assert_int_equal(a.head.unique, *i + 1);
    return a;
}

static void look_up(unsigned i)
{
    char name[8];

    snprintf(name, sizeof(name), "%u", i % FILES);
    offer(i, FUSE_LOOKUP, name, (u32)strlen(name) + 1);
}

static void forget(u64 nodeid)
{
    struct {
        struct fuse_in_header head;
        struct fuse_forget_in body;
    } r = { { .len = sizeof(r), .opcode = FUSE_FORGET, .nodeid = nodeid }, { 1 } };
    u64 at = FORGETS + forgets++ * 128;

    put(&g, at, &r, sizeof(r));
    gq_add(&d.q[0], (struct buf[]){ { at, sizeof(r), false } }, 1);
}

static int setup(void **state UNUSED)
{
    struct fuse_init_in init = { .major = 7, .minor = 31, .max_readahead = 65536 };
    unsigned i;

    up = false;
    if (!usable)
        return 0;
    guest_new(&g);
    forgets = 0;
    assert_int_equal(loop_new(&loop), 0);
    assert_int_equal(clock_new(loop, &guest_clock), 0);
    assert_int_equal(virtio_fs_new(&g.ram, NULL, loop, guest_clock, folder, "tag", false, &dev), 0);
    assert_int_equal(virtio_pci_attach(g.pci, DEV, guest_line(&g), 26, true, (struct virtio *)dev), 0);
    assert_int_equal(pthread_create(&thread, NULL, run, NULL), 0);
    assert_true(vdev_start(&d, &g, DEV, BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX), QUEUE));
    up = true;
    offer(0, FUSE_INIT, &init, sizeof(init));
    vdev_kick(&d, 1);
    assert_int_equal(answered(&i).head.error, 0);
    return 0;
}

static int teardown(void **state UNUSED)
{
    if (!up)
        return 0;
    loop_stop(loop);
    pthread_join(thread, NULL);
    device_free(dev);
    clock_free(guest_clock);
    loop_free(loop);
    guest_free(&g);
    return 0;
}

static void need_virtiofsd(void)
{
    if (usable)
        return;
    print_message("skipped: %s\n", err_last());
    skip();
}

/* A processor puts FORGETs into the ring and does not come to notify of them; the other goes on. */
static void test_not_notified(void **state UNUSED)
{
    struct answer a;
    unsigned i;

    need_virtiofsd();
    for (unsigned n = 1; n < FILES; n++) {
        look_up(n);
        vdev_kick(&d, 1);
        a = answered(&i);
        assert_int_equal(a.head.error, 0);
        assert_int_equal(i, n);
        forget(a.entry.nodeid);
    }
}

/* FORGETs that come later than all requests. Time stands still, so none is given up. */
static void test_late(void **state UNUSED)
{
    u64 known[QUEUE];
    unsigned i, have = 0;
    struct answer a;

    need_virtiofsd();
    clock_pause(guest_clock);
    for (unsigned n = 1; n <= QUEUE / 2 - 8; n++)
        look_up(n);
    vdev_kick(&d, 1);
    for (unsigned n = 1; n <= QUEUE / 2 - 8; n++) {
        a = answered(&i);
        assert_int_equal(a.head.error, 0);
        known[have++] = a.entry.nodeid;
        if (n < DESCRIPTORS / 2)
            continue;
        while (have)
            forget(known[--have]);
        vdev_kick(&d, 0);
    }
    clock_resume(guest_clock);
}

/* Nothing is forgotten: an error, after a while, then at once, until there are descriptors again. */
static void test_exhausted(void **state UNUSED)
{
    u64 known[QUEUE];
    unsigned i, n, have = 0, errors = 0;
    struct answer a;

    need_virtiofsd();
    for (n = 1; n <= QUEUE / 2 - 8; n++)
        look_up(n);
    vdev_kick(&d, 1);
    while (--n) {
        a = answered(&i);
        if (a.head.error == 0) {
            known[have++] = a.entry.nodeid;
        } else {
            assert_int_equal(a.head.error, -EMFILE);
            errors++;
        }
    }
    assert_in_range(have, DESCRIPTORS / 2, DESCRIPTORS - 1);
    assert_int_not_equal(errors, 0);
    clock_pause(guest_clock);                                      /* nothing is waited for */
    look_up(QUEUE / 2);
    vdev_kick(&d, 1);
    assert_int_equal(answered(&i).head.error, -EMFILE);
    while (have)
        forget(known[--have]);
    vdev_kick(&d, 0);
    do {
        look_up(QUEUE / 2 + 1);
        vdev_kick(&d, 1);
        a = answered(&i);
    } while (a.head.error == -EMFILE);                             /* virtiofsd works at the queues side by side */
    assert_int_equal(a.head.error, 0);
    clock_resume(guest_clock);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = { T(test_not_notified), T(test_late), T(test_exhausted) };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
