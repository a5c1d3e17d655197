/*
 * The 9P server, by messages: what a client may do, what it may not reach, what breaks the rules; and random operations beside the same system calls
 * in a twin folder. As an ordinary user, also when started by root.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <stdatomic.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "back/9p_host.h"
#include "p9_client.h"

#define NOBODY 65534

static char base[64], dir[80], twin[80];
static struct p9_client *c;
static struct p9 *server;
static int dirfd_;                                                 /* of dir */

static struct p9 *open_server(const char *path, bool readonly, bool owners)
{
    struct p9_config config = { .path = path, .readonly = readonly, .owners = owners };
    struct p9 *s;

    assert_int_equal(p9_open(&config, &s), 0);
    return s;
}

static int setup(void **state UNUSED)
{
    strcpy(base, "/tmp/doppel-p9-XXXXXX");
    assert_non_null(mkdtemp(base));
    snprintf(dir, sizeof(dir), "%s/shared", base);
    snprintf(twin, sizeof(twin), "%s/twin", base);
    assert_int_equal(mkdir(dir, 0755) | mkdir(twin, 0755), 0);
    dirfd_ = open(dir, O_RDONLY | O_DIRECTORY);
    c = calloc(1, sizeof(*c));
    server = open_server(dir, false, false);
    assert_int_equal(p9_start(c, server), 0);
    return 0;
}

static int teardown(void **state UNUSED)
{
    char command[256];

    assert_true(p9_close(server));
    free(c);
    close(dirfd_);
    snprintf(command, sizeof(command), "chmod -R u+rwx %s; rm -rf %s", base, base);
    assert_int_equal(system(command), 0);
    return 0;
}

static void host_file(const char *name, const char *text)
{
    int fd = openat(dirfd_, name, O_WRONLY | O_CREAT | O_TRUNC, 0644);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static u32 need(int id)
{
    if (id < 0)
        print_message("# %s\n", strerror(-id));
    assert_true(id >= 0);
    return (u32)id;
}

/* --- what a client may do --- */

static void test_session(void **state UNUSED)
{
    char version[32];

    assert_int_equal(p9_fids(server), 1);
    assert_int_equal(p9_call(c, TVERSION, "ws", 8192, "9P2000"), 0);
    assert_int_equal(p9_int(c, 4), 8192);
    p9_text(c, version, sizeof(version));
    assert_string_equal(version, "unknown");
    assert_int_equal(p9_fids(server), 0);
    assert_int_equal(p9_call(c, TATTACH, "wwssw", 1, ~0u, "u", "", 0), -EPROTO);
    assert_int_equal(p9_call(c, TVERSION, "ws", 100, "9P2000.L"), -EMSGSIZE);
    assert_int_equal(p9_call(c, TVERSION, "ws", 1u << 31, "9P2000.L"), 0);
    assert_int_equal(p9_int(c, 4), 1 << 20);
    assert_int_equal(p9_call(c, TATTACH, "wwssw", 1, ~0u, "u", "", 0), 0);
    assert_int_equal(p9_call(c, TATTACH, "wwssw", 1, ~0u, "u", "", 0), -EBADF);
    assert_int_equal(p9_call(c, TAUTH, "wssw", 9, "u", "", 0), -EOPNOTSUPP);
    assert_int_equal(p9_call(c, TFLUSH, "h", 7), 0);
    assert_int_equal(mkdirat(dirfd_, "sub", 0755), 0);
    assert_int_equal(p9_call(c, TATTACH, "wwssw", 2, ~0u, "u", "/sub", 0), 0);
    assert_int_equal(p9_call(c, TATTACH, "wwssw", 3, ~0u, "u", "/../..", 0), 0); /* stays at the top */
    assert_int_equal(p9_call(c, TWALK, "wwhs", 3, 4, 1, "sub"), 0);
    assert_int_equal(p9_call(c, TCLUNK, "w", 77), -EBADF);
}

static void test_files(void **state UNUSED)
{
    u32 id = need(p9_create_file(c, P9_ROOT, "f", O_RDWR, 0640));
    struct p9_attr a;
    struct stat st;
    char buf[64];

    assert_int_equal(p9_write_file(c, id, 0, "hello, world", 12), 12);
    assert_int_equal(p9_read_file(c, id, 7, buf, sizeof(buf)), 5);
    assert_memory_equal(buf, "world", 5);
    assert_int_equal(p9_write_file(c, id, 5ull << 32, "x", 1), 1); /* sparse, and beyond 32 bits */
    assert_int_equal(p9_getattr(c, id, &a), 0);
    assert_true(a.size == (5ull << 32) + 1);
    assert_int_equal(p9_call(c, TFSYNC, "ww", id, 0), 0);
    assert_int_equal(p9_setattr(c, id, 8, 0, 0, 0, 3), 0);
    assert_int_equal(p9_read_file(c, id, 0, buf, sizeof(buf)), 3);
    assert_int_equal(p9_setattr(c, id, 1, 0600, 0, 0, 0), 0);
    assert_int_equal(fstatat(dirfd_, "f", &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    /* Its name goes, and then it goes by another one. */
    assert_int_equal(p9_call(c, TRENAMEAT, "wsws", P9_ROOT, "f", P9_ROOT, "g"), 0);
    assert_int_equal(p9_call(c, TUNLINKAT, "wsw", P9_ROOT, "g", 0), 0);
    assert_int_equal(p9_write_file(c, id, 3, "lo", 2), 2);
    assert_int_equal(p9_setattr(c, id, 8, 0, 0, 0, 4), 0);
    assert_int_equal(p9_read_file(c, id, 0, buf, sizeof(buf)), 4);
    assert_memory_equal(buf, "hell", 4);
    assert_int_equal(p9_getattr(c, id, &a), 0);
    assert_int_equal(a.nlink, 0);
    assert_int_equal(p9_clunk(c, id), 0);
    assert_int_equal(p9_fids(server), 1);
}

static void test_open_flags(void **state UNUSED)
{
    char buf[16];
    u32 id;

    host_file("f", "one");
    id = need(p9_open_file(c, P9_ROOT, "f", O_WRONLY | O_APPEND));
    host_file("f", "other");
    assert_int_equal(p9_write_file(c, id, 0, "+", 1), 1);
    assert_int_equal(p9_read_file(c, id, 0, buf, 1), -EBADF);
    id = need(p9_open_file(c, P9_ROOT, "f", O_RDONLY));
    assert_int_equal(p9_read_file(c, id, 0, buf, sizeof(buf)), 6);
    assert_memory_equal(buf, "other+", 6);
    assert_int_equal(p9_write_file(c, id, 0, "x", 1), -EBADF);
    need(p9_open_file(c, P9_ROOT, "f", O_RDWR | O_TRUNC));
    assert_int_equal(p9_read_file(c, id, 0, buf, sizeof(buf)), 0);
    assert_int_equal(p9_create_file(c, P9_ROOT, "f", O_RDWR | O_EXCL, 0644), -EEXIST);
    need(p9_create_file(c, P9_ROOT, "f", O_RDWR, 0644));
    assert_int_equal(p9_call(c, TREAD, "wdw", id, ~0ull, 5), -EINVAL);
}

static void test_owners(void **state UNUSED)
{
    struct p9_client *other = calloc(1, sizeof(*other));
    struct p9 *plain = open_server(dir, false, true);
    struct p9_attr a;

    assert_int_equal(p9_getattr(c, P9_ROOT, &a), 0);
    assert_int_equal(a.uid, 0);
    assert_int_equal(a.gid, 0);
    host_file("f", "");
    u32 id = need(p9_walk(c, P9_ROOT, "f"));
    assert_int_equal(p9_setattr(c, id, 6, 0, 0, 0, 0), 0);         /* to the guest's root: to us */
    assert_int_equal(p9_setattr(c, id, 2, 0, NOBODY - 1, 0, 0), -EPERM);
    assert_int_equal(p9_start(other, plain), 0);
    assert_int_equal(p9_getattr(other, P9_ROOT, &a), 0);
    assert_int_equal(a.uid, geteuid());
    assert_true(p9_close(plain));
    free(other);
}

static void test_links(void **state UNUSED)
{
    struct p9_attr a;
    char to[64];
    u32 id;

    assert_int_equal(p9_call(c, TSYMLINK, "wssw", P9_ROOT, "l", "../../etc/passwd", 0), 0);
    id = need(p9_walk(c, P9_ROOT, "l"));
    assert_int_equal(p9_getattr(c, id, &a), 0);
    assert_true(S_ISLNK(a.mode));
    assert_int_equal(p9_call(c, TREADLINK, "w", id), 0);
    p9_text(c, to, sizeof(to));
    assert_string_equal(to, "../../etc/passwd");
    assert_int_equal(p9_call(c, TREADLINK, "w", P9_ROOT), -EINVAL);
    host_file("f", "x");
    u32 f = need(p9_walk(c, P9_ROOT, "f"));
    assert_int_equal(p9_call(c, TLINK, "wws", P9_ROOT, f, "f2"), 0);
    assert_int_equal(p9_call(c, TLINK, "wws", P9_ROOT, id, "l2"), 0); /* of the link itself */
    assert_int_equal(p9_getattr(c, f, &a), 0);
    assert_int_equal(a.nlink, 2);
    assert_int_equal(p9_getattr(c, id, &a), 0);
    assert_int_equal(a.nlink, 2);
}

/* Calls that name a file by its fid, as clients without the newer ones do. */
static void test_old_calls(void **state UNUSED)
{
    struct stat st;
    u32 d, f;

    assert_int_equal(p9_call(c, TMKDIR, "wsww", P9_ROOT, "d", 0755, 0), 0);
    d = need(p9_walk(c, P9_ROOT, "d"));
    host_file("f", "x");
    f = need(p9_walk(c, P9_ROOT, "f"));
    assert_int_equal(p9_call(c, TRENAME, "wws", f, d, "g"), 0);
    assert_int_equal(fstatat(dirfd_, "d/g", &st, 0), 0);
    assert_int_equal(renameat(dirfd_, "d/g", dirfd_, "h"), 0);     /* the host moves it: it is the same file */
    host_file("d/g", "another");
    assert_int_equal(p9_call(c, TREMOVE, "w", f), 0);
    assert_int_equal(fstatat(dirfd_, "h", &st, 0), -1);
    assert_int_equal(fstatat(dirfd_, "d/g", &st, 0), 0);
    assert_int_equal(p9_clunk(c, f), -EBADF);
    f = need(p9_walk(c, d, "g"));
    assert_int_equal(unlinkat(dirfd_, "d/g", 0), 0);
    assert_int_equal(p9_call(c, TREMOVE, "w", f), -ENOENT);
    assert_int_equal(p9_call(c, TREMOVE, "w", d), 0);
}

static void test_folder(void **state UNUSED)
{
    enum { FILES = 3000 };
    static u8 seen[FILES];
    u64 offset = 0;
    unsigned count = 0, calls = 0;
    char name[300];
    u32 id;

    memset(seen, 0, sizeof(seen));
    for (int i = 0; i < FILES; i++) {
        snprintf(name, sizeof(name), "%d\n%0*d", i, i % 200, 0);
        host_file(name, "");
    }
    id = need(p9_open_file(c, P9_ROOT, "", O_RDONLY));
    assert_int_equal(p9_call(c, TREADDIR, "wdw", id, (u64)0, 8), -ENOBUFS);
    for (;; calls++) {
        assert_int_equal(p9_call(c, TREADDIR, "wdw", id, offset, 500 + calls % 7 * 1000), 0);
        if (!p9_int(c, 4))
            break;
        while (c->at < c->reply) {
            p9_int(c, 5);
            p9_int(c, 8);
            offset = p9_int(c, 8);
            p9_int(c, 1);
            p9_text(c, name, sizeof(name));
            if (!strcmp(name, ".") || !strcmp(name, ".."))
                continue;
            assert_in_range(atoi(name), 0, FILES - 1);
            assert_int_equal(seen[atoi(name)]++, 0);
            assert_non_null(strchr(name, '\n'));
            count++;
        }
    }
    assert_int_equal(count, FILES);
    assert_true(calls > 20);
    /* And from the beginning. */
    assert_int_equal(p9_call(c, TREADDIR, "wdw", id, (u64)0, 4096), 0);
    assert_true(p9_int(c, 4) > 0);
    memset(name, 'n', 256);
    name[255] = 0;
    need(p9_create_file(c, P9_ROOT, name, O_RDWR, 0644));
    name[255] = 'n';
    name[256] = 0;
    assert_int_equal(p9_create_file(c, P9_ROOT, name, O_RDWR, 0644), -ENAMETOOLONG);
    assert_int_equal(p9_call(c, TUNLINKAT, "wsw", P9_ROOT, name, 0), -ENAMETOOLONG);
}

static void test_xattr(void **state UNUSED)
{
    char big[3000], buf[4096];
    u32 f, x;

    host_file("f", "x");
    f = need(p9_walk(c, P9_ROOT, "f"));
    x = need(p9_walk(c, f, ""));
    memset(big, 'v', sizeof(big));
    assert_int_equal(p9_call(c, TXATTRCREATE, "wsdw", x, "user.k", (u64)sizeof(big), 0), 0);
    assert_int_equal(p9_write_file(c, x, 0, big, 1000), 1000);
    assert_int_equal(p9_write_file(c, x, 2000, big, 1000), -ENOSPC);
    assert_int_equal(p9_write_file(c, x, 1000, big, 2000), 2000);
    assert_int_equal(p9_write_file(c, x, 3000, big, 1), -ENOSPC);
    int r = p9_clunk(c, x);
    if (r == -EOPNOTSUPP || r == -ENOSPC) {
        print_message("# skip: the host's /tmp has no extended attributes (so large)\n");
        skip();
    }
    assert_int_equal(r, 0);
    assert_int_equal(p9_call(c, TXATTRWALK, "wws", f, 50, "user.k"), 0);
    assert_int_equal(p9_int(c, 8), sizeof(big));
    assert_int_equal(p9_read_file(c, 50, 1, buf, sizeof(buf)), sizeof(big) - 1);
    assert_int_equal(p9_clunk(c, 50), 0);
    assert_int_equal(p9_call(c, TXATTRWALK, "wws", f, 50, ""), 0);
    assert_int_equal(p9_read_file(c, 50, 0, buf, sizeof(buf)), 7);
    assert_memory_equal(buf, "user.k", 7);
    assert_int_equal(p9_call(c, TXATTRWALK, "wws", f, 51, "security.capability"), -EOPNOTSUPP);
    assert_int_equal(p9_call(c, TXATTRCREATE, "wsdw", 50, "user.j", (u64)1, 0), -EINVAL);
    x = need(p9_walk(c, f, ""));
    assert_int_equal(p9_call(c, TXATTRCREATE, "wsdw", x, "trusted.k", (u64)1, 0), -EOPNOTSUPP);
    assert_int_equal(p9_call(c, TXATTRCREATE, "wsdw", x, "user.k", 1ull << 40, 0), -E2BIG);
    assert_int_equal(p9_call(c, TXATTRCREATE, "wsdw", x, "user.k", (u64)0, XATTR_REPLACE), 0);
    assert_int_equal(p9_clunk(c, x), 0);
    assert_int_equal(p9_call(c, TXATTRWALK, "wws", f, 51, "user.k"), -ENODATA);
}

static int lock_at(u32 id, u8 type, u64 start, u64 len, u32 proc)
{
    int r = p9_call(c, TLOCK, "wbwddws", id, type, 0, start, len, proc, "guest");

    return r < 0 ? r : (int)p9_int(c, 1);
}

static void test_locks(void **state UNUSED)
{
    struct flock fl = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 5, .l_len = 1 };
    u32 a, b, d;
    int fd;

    host_file("f", "0123456789");
    fd = openat(dirfd_, "f", O_RDWR);
    a = need(p9_open_file(c, P9_ROOT, "f", O_RDWR));
    b = need(p9_open_file(c, P9_ROOT, "f", O_RDWR));
    d = need(p9_open_file(c, P9_ROOT, "f", O_RDWR));
    assert_int_equal(lock_at(a, 1, 0, 10, 7), 0);
    assert_int_equal(lock_at(b, 1, 0, 10, 7), 0);                  /* the same program */
    assert_int_equal(lock_at(d, 0, 3, 1, 8), 1);
    assert_int_equal(fcntl(fd, F_OFD_SETLK, &fl), -1);
    assert_int_equal(p9_call(c, TGETLOCK, "wbddws", d, 1, (u64)0, (u64)0, 8, "guest"), 0);
    assert_int_equal(p9_int(c, 1), 1);
    assert_int_equal(lock_at(a, 2, 5, 1, 7), 0);
    assert_int_equal(fcntl(fd, F_OFD_SETLK, &fl), 0);
    assert_int_equal(lock_at(a, 1, 5, 1, 7), 1);
    assert_int_equal(lock_at(a, 1, ~0ull, 1, 7), -EINVAL);
    assert_int_equal(lock_at(a, 9, 0, 1, 7), -EINVAL);
    assert_int_equal(lock_at(P9_ROOT, 0, 0, 1, 7), -EBADF);
    assert_int_equal(p9_clunk(c, a), 0);
    assert_int_equal(lock_at(d, 1, 0, 1, 8), 1);                   /* b has it open still */
    assert_int_equal(p9_clunk(c, b), 0);
    assert_int_equal(lock_at(d, 1, 0, 1, 8), 0);
    close(fd);
}

/* --- what it may not reach --- */

static void test_outside(void **state UNUSED)
{
    static const char *const bad[] = { "a/b", "/etc", ".", "" };
    struct p9_attr root, a;
    char outside[100];
    struct stat st;
    u32 id, d;

    snprintf(outside, sizeof(outside), "%s/outside", base);
    assert_int_equal(mkdir(outside, 0755) | symlinkat("..", dirfd_, "up") | symlinkat(outside, dirfd_, "out"), 0);
    assert_int_equal(mkdirat(dirfd_, "d", 0755) | mkdirat(dirfd_, "d/e", 0755), 0);
    assert_int_equal(p9_getattr(c, P9_ROOT, &root), 0);
    id = need(p9_walk(c, P9_ROOT, ".."));
    assert_int_equal(p9_getattr(c, id, &a), 0);
    assert_true(a.ino == root.ino);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_true(p9_call(c, TWALK, "wwhs", P9_ROOT, 60, 1, bad[i]) < 0);
        assert_true(p9_create_file(c, P9_ROOT, bad[i], O_RDWR, 0644) < 0);
        assert_true(p9_call(c, TMKDIR, "wsww", P9_ROOT, bad[i], 0755, 0) < 0);
        assert_true(p9_call(c, TUNLINKAT, "wsw", P9_ROOT, bad[i], 0) < 0);
    }
    assert_true(p9_call(c, TMKDIR, "wsww", P9_ROOT, "..", 0755, 0) < 0);
    assert_true(p9_call(c, TRENAMEAT, "wsws", P9_ROOT, "d", P9_ROOT, "../d") < 0);
    /* A link is never a folder here. */
    assert_int_equal(p9_call(c, TWALK, "wwhss", P9_ROOT, 61, 2, "out", "x"), 0);
    assert_int_equal(p9_int(c, 2), 1);
    assert_int_equal(p9_clunk(c, 61), -EBADF);
    id = need(p9_walk(c, P9_ROOT, "out"));
    assert_int_equal(p9_call(c, TWALK, "wwhs", id, 62, 1, "x"), -ENOTDIR);
    assert_int_equal(p9_call(c, TMKDIR, "wsww", id, "x", 0755, 0), -ENOTDIR);
    assert_int_equal(p9_call(c, TLOPEN, "ww", id, O_RDONLY), -ELOOP);
    assert_int_equal(p9_create_file(c, P9_ROOT, "up", O_RDWR, 0644), -EEXIST);
    assert_int_equal(p9_setattr(c, id, 1, 0700, 0, 0, 0), -EOPNOTSUPP);
    assert_int_equal(stat(outside, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0755);
    /* The host moves a folder out that the guest is in. */
    d = need(p9_walk(c, P9_ROOT, "d"));
    id = need(p9_walk(c, d, "e"));
    strcat(outside, "/d");
    assert_int_equal(renameat(dirfd_, "d", AT_FDCWD, outside), 0);
    assert_int_equal(p9_call(c, TWALK, "wwhs", d, 63, 1, ".."), -ENOENT);
    assert_int_equal(p9_call(c, TWALK, "wwhss", id, 63, 2, "..", ".."), -ENOENT);
    assert_int_equal(p9_call(c, TREMOVE, "w", id), -ENOENT);
    strcat(outside, "/e");
    assert_int_equal(stat(outside, &st), 0);
}

static void test_special_files(void **state UNUSED)
{
    struct p9_attr a;
    u32 id;

    assert_int_equal(mkfifoat(dirfd_, "fifo", 0644), 0);
    id = need(p9_walk(c, P9_ROOT, "fifo"));
    assert_int_equal(p9_call(c, TLOPEN, "ww", id, O_RDONLY), -ENXIO);  /* would wait for a writer */
    assert_int_equal(p9_create_file(c, P9_ROOT, "fifo", O_RDWR, 0644), -EEXIST);
    assert_true(p9_setattr(c, id, 8, 0, 0, 0, 5) < 0);
    assert_int_equal(p9_call(c, TMKNOD, "wswwww", P9_ROOT, "null", S_IFCHR | 0666, 1, 3, 0), -EPERM);
    assert_int_equal(p9_call(c, TMKNOD, "wswwww", P9_ROOT, "disk", S_IFBLK | 0666, 8, 0, 0), -EPERM);
    assert_int_equal(p9_call(c, TMKNOD, "wswwww", P9_ROOT, "pipe", S_IFIFO | 0666, 0, 0, 0), 0);
    id = need(p9_walk(c, P9_ROOT, "pipe"));
    assert_int_equal(p9_getattr(c, id, &a), 0);
    assert_true(S_ISFIFO(a.mode));
    assert_int_equal(p9_call(c, TMKNOD, "wswwww", P9_ROOT, "sock", S_IFSOCK | 0666, 0, 0, 0), 0);
}

static void test_kernel_views(void **state UNUSED)
{
    struct p9_client *other = calloc(1, sizeof(*other));
    struct p9 *top = open_server("/", true, false);
    u32 id;

    assert_int_equal(p9_start(other, top), 0);
    id = need(p9_walk(other, P9_ROOT, "proc"));
    assert_int_equal(p9_call(other, TWALK, "wwhs", id, 50, 1, "self"), -ENOENT);
    assert_int_equal(p9_call(other, TWALK, "wwhs", id, 50, 1, ".."), 0);
    assert_int_equal(p9_call(other, TLOPEN, "ww", id, O_RDONLY), 0);
    assert_int_equal(p9_call(other, TREADDIR, "wdw", id, (u64)0, 4096), 0);
    assert_int_equal(p9_int(other, 4), 0);
    id = need(p9_walk(other, P9_ROOT, "dev"));
    u32 null = need(p9_walk(other, id, "null"));
    assert_int_equal(p9_call(other, TLOPEN, "ww", null, O_RDONLY), -ENXIO);
    assert_true(p9_close(top));
    free(other);
}

static void test_readonly(void **state UNUSED)
{
    struct p9_client *ro = calloc(1, sizeof(*ro));
    struct p9 *s = open_server(dir, true, false);
    char buf[8];
    u32 f;

    host_file("f", "text");
    assert_int_equal(p9_start(ro, s), 0);
    f = need(p9_open_file(ro, P9_ROOT, "f", O_RDONLY));
    assert_int_equal(p9_read_file(ro, f, 0, buf, 8), 4);
    assert_true(p9_write_file(ro, f, 0, "x", 1) < 0);
    assert_int_equal(p9_open_file(ro, P9_ROOT, "f", O_RDWR), -EROFS);
    assert_int_equal(p9_open_file(ro, P9_ROOT, "f", O_RDONLY | O_TRUNC), -EROFS);
    assert_int_equal(p9_create_file(ro, P9_ROOT, "g", O_RDONLY, 0644), -EROFS);
    f = need(p9_walk(ro, P9_ROOT, "f"));
    assert_int_equal(p9_setattr(ro, f, 8, 0, 0, 0, 0), -EROFS);
    assert_int_equal(p9_call(ro, TXATTRCREATE, "wsdw", f, "user.k", (u64)1, 0), -EROFS);
    assert_int_equal(p9_call(ro, TLINK, "wws", P9_ROOT, f, "g"), -EROFS);
    assert_int_equal(p9_call(ro, TUNLINKAT, "wsw", P9_ROOT, "f", 0), -EROFS);
    assert_int_equal(p9_call(ro, TRENAMEAT, "wsws", P9_ROOT, "f", P9_ROOT, "g"), -EROFS);
    assert_int_equal(p9_call(ro, TREMOVE, "w", f), -EROFS);
    assert_int_equal(p9_call(ro, TMKDIR, "wsww", P9_ROOT, "d", 0755, 0), -EROFS);
    assert_int_equal(p9_call(ro, TSYMLINK, "wssw", P9_ROOT, "l", "x", 0), -EROFS);
    assert_int_equal(p9_call(ro, TMKNOD, "wswwww", P9_ROOT, "p", S_IFIFO | 0666, 0, 0, 0), -EROFS);
    assert_int_equal(p9_setattr(ro, P9_ROOT, 1, 0700, 0, 0, 0), -EROFS);
    assert_true(p9_close(s));
    free(ro);
}

/* The host takes the folder away: the guest sees errors, and what it has open stays. */
static void test_vanished(void **state UNUSED)
{
    u32 f = need(p9_create_file(c, P9_ROOT, "f", O_RDWR, 0644));

    assert_int_equal(unlinkat(dirfd_, "f", 0) | rmdir(dir), 0);
    assert_int_equal(p9_write_file(c, f, 0, "x", 1), 1);
    assert_int_equal(p9_create_file(c, P9_ROOT, "g", O_RDWR, 0644), -ENOENT);
    assert_int_equal(p9_walk(c, P9_ROOT, "f"), -ENOENT);
    assert_int_equal(mkdir(dir, 0755), 0);
}

/* --- what breaks the rules --- */

static void raw(u32 size, u8 type, const void *body, u32 len)
{
    c->len = 0;
    p9_raw(c, &size, 4);
    p9_raw(c, &type, 1);
    p9_raw(c, "\x2a", 2);
    p9_raw(c, body, len);
    p9_send(c);
}

static void test_bad_messages(void **state UNUSED)
{
    static const u8 ones[64] = { [0 ... 63] = 0xff };
    u32 f;

    raw(7, 255, "", 0);
    assert_int_equal(c->in[4], RLERROR);
    raw(6, TWALK, "", 0);
    assert_int_equal(c->in[4], RLERROR);
    raw(~0u, TWALK, "", 0);
    assert_int_equal(c->in[4], RLERROR);
    for (unsigned type = 0; type < 256; type++)                    /* everything cut short, and full of ones */
        for (u32 len = 0; len < 40; len++) {
            if (type == TVERSION || type == TFLUSH)
                continue;
            raw(7 + len, (u8)type, ones, len);
            assert_int_equal(c->in[4], RLERROR);
            assert_int_equal(c->reply, 11);
        }
    c->len = 3;
    p9_send(c);
    assert_int_equal(c->reply, 0);
    c->room = 10;                                                  /* not even for an error */
    raw(11, TCLUNK, "\0\0\0", 4);
    assert_int_equal(c->reply, 0);
    c->room = 11;
    raw(11, TSTATFS, "\1\0\0", 4);
    assert_int_equal(c->in[4], RLERROR);
    c->room = P9_BUF;
    host_file("f", "0123456789");
    f = need(p9_open_file(c, P9_ROOT, "f", O_RDWR));
    c->room = 15;                                                  /* four bytes of data */
    assert_int_equal(p9_call(c, TREAD, "wdw", f, (u64)0, 10), 0);
    assert_int_equal(p9_int(c, 4), 4);
    c->room = P9_BUF;
    assert_int_equal(p9_call(c, TREAD, "wdw", f, (u64)0, ~0u), 0);
    assert_int_equal(p9_int(c, 4), 10);
    assert_int_equal(p9_call(c, TWRITE, "wdw", f, (u64)0, 5), -EINVAL);  /* without its data */
    assert_int_equal(p9_call(c, TWALK, "wwh", P9_ROOT, 70, 17), -EINVAL);
    assert_int_equal(p9_call(c, TWALK, "wwhs", f, 70, 1, "x"), -EINVAL);
    assert_int_equal(p9_call(c, TLOPEN, "ww", f, O_RDONLY), -EINVAL);
    assert_int_equal(p9_call(c, TREADDIR, "wdw", f, (u64)0, 4096), -EBADF);
    assert_int_equal(p9_call(c, TREAD, "wdw", P9_ROOT, (u64)0, 10), -EBADF);
}

/* --- several at once --- */

static struct wait { struct p9_request r; struct iovec out, in; u8 message[64], answer[4096]; atomic_int *left; } wait_[200];

static void on_done(struct p9_request *r)
{
    struct wait *w = container_of(r, struct wait, r);

    --*w->left;
}

static void test_threads(void **state UNUSED)
{
    atomic_int left = 0;
    u32 id = P9_ROOT;

    for (unsigned i = 0; i < ARRAY_SIZE(wait_); i++) {
        struct wait *w = &wait_[i];
        u32 size = i % 10 == 9 ? 9 : 11;
        u16 tag = (u16)i, old = (u16)(i - 1);

        memset(w, 0, sizeof(*w));
        memcpy(w->message, &size, 4);
        w->message[4] = size == 9 ? TFLUSH : TSTATFS;
        memcpy(w->message + 5, &tag, 2);
        memcpy(w->message + 7, size == 9 ? (void *)&old : (void *)&id, size - 7);
        w->out = (struct iovec){ w->message, size };
        w->in = (struct iovec){ w->answer, sizeof(w->answer) };
        w->r = (struct p9_request){ .out = &w->out, .outs = 1, .in = &w->in, .ins = 1, .done = on_done };
        w->left = &left;
        left++;
        p9_submit(server, &w->r);
    }
    for (int i = 0; left && i < 60000; i++)
        usleep(1000);
    assert_int_equal(left, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(wait_); i++)
        assert_int_equal(wait_[i].answer[4], wait_[i].message[4] + 1);
}

/* More files than descriptors: each is the same one whenever it is used again. */
static void test_few_descriptors(void **state UNUSED)
{
    enum { FILES = 600 };
    static u64 ino[FILES];
    struct rlimit old, few;
    struct p9_client *other = calloc(1, sizeof(*other));
    struct p9_attr a;
    char name[16];
    struct p9 *s;
    u32 d;

    assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
    few = (struct rlimit){ 256, old.rlim_max };
    assert_int_equal(mkdirat(dirfd_, "d", 0755), 0);
    s = open_server(dir, false, false);
    s->paths_max = 100;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    assert_int_equal(p9_start(other, s), 0);
    d = need(p9_walk(other, P9_ROOT, "d"));
    for (u32 i = 0; i < FILES; i++) {
        snprintf(name, sizeof(name), "d/%u", i);
        host_file(name, name);
        assert_int_equal(p9_call(other, TWALK, "wwhs", d, 1000 + i, 1, name + 2), 0);
        assert_int_equal(p9_getattr(other, 1000 + i, &a), 0);
        ino[i] = a.ino;
    }
    assert_int_equal(renameat(dirfd_, "d/0", dirfd_, "d/x"), 0);
    host_file("d/0", "another");
    for (u32 i = 1; i < FILES; i++) {
        assert_int_equal(p9_getattr(other, 1000 + i, &a), 0);
        assert_true(a.ino == ino[i]);
    }
    assert_int_equal(p9_getattr(other, 1000, &a), -ESTALE);
    for (u32 i = 0; i < FILES; i++)
        assert_int_equal(p9_clunk(other, 1000 + i), 0);
    assert_true(p9_close(s));
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
    free(other);
}

/* --- random operations, and the same by system calls --- */

#define NAMES 12
#define FILE_MAX 5000
static unsigned rng = 12345;

static unsigned rnd(unsigned n)
{
    rng = rng * 1664525u + 1013904223u;
    return (rng >> 8) % n;
}

static int e_(long r)
{
    return r < 0 ? -errno : (int)r;
}

static const char *name_of(unsigned n)
{
    static char name[4][8];
    static unsigned turn;

    turn = (turn + 1) % 4;
    snprintf(name[turn], sizeof(name[0]), "n%u", n);
    return name[turn];
}

static int by_host(int d, unsigned op, const char *a, const char *b, u32 x, u32 y, u8 *buf, struct p9_attr *attr)
{
    struct stat st;
    int fd = -1, r;

    switch (op) {
    case 0: return e_(mkdirat(d, a, 0755));
    case 1: return e_(unlinkat(d, a, 0));
    case 2: return e_(unlinkat(d, a, AT_REMOVEDIR));
    case 3: return e_(renameat(d, a, d, b));
    case 4: return e_(linkat(d, a, d, b, 0));
    case 5: return e_(symlinkat("nowhere", d, a));
    case 6: r = fd = openat(d, a, O_RDWR | O_CREAT | O_EXCL, 0640); break;
    case 7: r = fd = openat(d, a, O_RDWR | O_NOFOLLOW); r = r < 0 ? r : (int)pwrite(fd, buf, y, x); break;
    case 8: r = fd = openat(d, a, O_RDONLY | O_NOFOLLOW); r = r < 0 ? r : (int)pread(fd, buf, y, x); break;
    case 9: r = fd = openat(d, a, O_RDWR | O_NOFOLLOW); r = r < 0 ? r : ftruncate(fd, x); break;
    case 10: r = fd = openat(d, a, O_RDONLY | O_NOFOLLOW); r = r < 0 ? r : fchmod(fd, 0400 | (x & 0777)); break;
    default:
        r = fstatat(d, a, &st, AT_SYMLINK_NOFOLLOW);
        if (r == 0)
            *attr = (struct p9_attr){ .mode = st.st_mode, .nlink = st.st_nlink, .size = S_ISDIR(st.st_mode) ? 0 : (u64)st.st_size };
        break;
    }
    r = e_(r);
    if (fd >= 0)
        close(fd);
    return op == 6 && r > 0 ? 0 : r;
}

static int on_fid(int id, int (*fn)(u32 id, u32 x, u32 y, u8 *buf), u32 x, u32 y, u8 *buf)
{
    int r = id < 0 ? id : fn((u32)id, x, y, buf);

    if (id >= 0)
        p9_clunk(c, (u32)id);
    return r;
}

static int fn_none(u32 id UNUSED, u32 x UNUSED, u32 y UNUSED, u8 *buf UNUSED) { return 0; }
static int fn_write(u32 id, u32 x, u32 y, u8 *buf) { return p9_write_file(c, id, x, buf, y); }
static int fn_read(u32 id, u32 x, u32 y, u8 *buf) { return p9_read_file(c, id, x, buf, y); }
static int fn_size(u32 id, u32 x, u32 y UNUSED, u8 *buf UNUSED) { return p9_setattr(c, id, 8, 0, 0, 0, x); }
static int fn_mode(u32 id, u32 x, u32 y UNUSED, u8 *buf UNUSED) { return p9_setattr(c, id, 1, 0400 | (x & 0777), 0, 0, 0); }

static int by_9p(unsigned op, const char *a, const char *b, u32 x, u32 y, u8 *buf, struct p9_attr *attr)
{
    int id, r;

    switch (op) {
    case 0: return p9_call(c, TMKDIR, "wsww", P9_ROOT, a, 0755, 0);
    case 1: return p9_call(c, TUNLINKAT, "wsw", P9_ROOT, a, 0);
    case 2: return p9_call(c, TUNLINKAT, "wsw", P9_ROOT, a, 0x200);
    case 3: return p9_call(c, TRENAMEAT, "wsws", P9_ROOT, a, P9_ROOT, b);
    case 4:
        id = p9_walk(c, P9_ROOT, a);
        r = id < 0 ? id : p9_call(c, TLINK, "wws", P9_ROOT, id, b);
        if (id >= 0)
            p9_clunk(c, (u32)id);
        return r;
    case 5: return p9_call(c, TSYMLINK, "wssw", P9_ROOT, a, "nowhere", 0);
    case 6: return on_fid(p9_create_file(c, P9_ROOT, a, O_RDWR | O_EXCL, 0640), fn_none, x, y, buf);
    case 7: return on_fid(p9_open_file(c, P9_ROOT, a, O_RDWR), fn_write, x, y, buf);
    case 8: return on_fid(p9_open_file(c, P9_ROOT, a, O_RDONLY), fn_read, x, y, buf);
    case 9: return on_fid(p9_open_file(c, P9_ROOT, a, O_RDWR), fn_size, x, y, buf);
    case 10: return on_fid(p9_open_file(c, P9_ROOT, a, O_RDONLY), fn_mode, x, y, buf);
    default:
        id = p9_walk(c, P9_ROOT, a);
        r = id < 0 ? id : p9_getattr(c, (u32)id, attr);
        if (id >= 0)
            p9_clunk(c, (u32)id);
        if (r == 0 && S_ISDIR(attr->mode))
            attr->size = 0;
        return r;
    }
}

static void test_beside_host(void **state UNUSED)
{
    static u8 a_buf[FILE_MAX], b_buf[FILE_MAX];
    int d = open(twin, O_RDONLY | O_DIRECTORY);
    unsigned worked = 0, steps = getenv("SOAK_LONG") ? 1000000 : 20000;

    if (getenv("P9_SEED"))
        rng = (unsigned)atoi(getenv("P9_SEED"));
    umask(0);
    for (unsigned i = 0; i < steps; i++) {
        unsigned op = rnd(12);
        const char *a = name_of(rnd(NAMES)), *b = name_of(rnd(NAMES));
        u32 x = rnd(FILE_MAX), y = rnd(FILE_MAX - x) + 1;
        struct p9_attr at_host = { 0 }, at_9p = { 0 };
        int host, p9;

        for (u32 k = 0; k < y && op == 7; k++)
            a_buf[k] = b_buf[k] = (u8)rnd(256);
        if (rnd(8) == 0 && op == 9)
            x = 0;
        host = by_host(d, op, a, b, x, y, a_buf, &at_host);
        p9 = by_9p(op, a, b, x, y, b_buf, &at_9p);
        if (op == 7 || op == 8 || op == 9 || op == 10) {           /* the kind is looked at first, there by the open */
            if (host == -EISDIR && p9 < 0)
                p9 = host;
            if (p9 == -EBADF || p9 == -EISDIR)
                p9 = host < 0 ? host : p9;
        }
        if (host != p9)
            print_message("# step %u: op %u %s %s %u %u: host %d, 9p %d\n", i, op, a, b, x, y, host, p9);
        assert_int_equal(host, p9);
        worked += host >= 0;
        if (op == 8 && host > 0)
            assert_memory_equal(a_buf, b_buf, host);
        assert_int_equal(at_host.mode, at_9p.mode);
        assert_int_equal(at_host.nlink, at_9p.nlink);
        assert_int_equal(at_host.size, at_9p.size);
    }
    assert_true(worked > steps / 4);
    assert_int_equal(p9_fids(server), 1);
    close(d);
}

static int as_ordinary_user(void)
{
    if (geteuid())
        return 0;
    if (setgroups(0, NULL) < 0 || setresgid(NOBODY, NOBODY, NOBODY) < 0 || setresuid(NOBODY, NOBODY, NOBODY) < 0)
        return -1;
    return prctl(PR_SET_DUMPABLE, 1);
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
    static const struct CMUnitTest tests[] = {
        TEST(test_session), TEST(test_files), TEST(test_open_flags), TEST(test_owners), TEST(test_links), TEST(test_old_calls), TEST(test_folder),
        TEST(test_xattr), TEST(test_locks), TEST(test_outside), TEST(test_special_files), TEST(test_kernel_views), TEST(test_readonly),
        TEST(test_vanished), TEST(test_bad_messages), TEST(test_threads), TEST(test_few_descriptors), TEST(test_beside_host),
    };

    if (as_ordinary_user() < 0) {
        printf("Bail out! cannot become an ordinary user\n");
        return 1;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
