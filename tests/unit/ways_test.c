/*
 * What the ways into a VM are made of, without a VM: names and their directory, the control socket, trees of files from somebody who means harm.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

#include "back/tree.h"
#include "ctl/control.h"
#include "ctl/instance.h"
#include "turns.h"

static char dir[64];

static int setup(void **state UNUSED)
{
    strcpy(dir, "/tmp/doppel-ways-XXXXXX");
    assert_non_null(mkdtemp(dir));
    setenv("XDG_RUNTIME_DIR", dir, 1);
    return 0;
}

static int teardown(void **state UNUSED)
{
    char command[256];

    snprintf(command, sizeof(command), "chmod -R u+rwx %s; rm -rf %s", dir, dir);
    assert_int_equal(system(command), 0);
    return 0;
}

static bool there(const char *name)
{
    char path[256];
    struct stat st;

    snprintf(path, sizeof(path), "%s/%s", dir, name);
    return lstat(path, &st) == 0;
}

/* --- names --- */

static void test_names(void **state UNUSED)
{
    static const char *const good[] = { "a", "vm1", "0", "A-b_c.d", "a.", "x--" };
    static const char *const bad[] = { "", ".", "..", "-a", "_a", ".a", "a/b", "a\nb", "a b", "a:b", "\xc3\xa4", "../x", "/a" };
    char longest[INSTANCE_NAME_MAX + 2];

    for (unsigned i = 0; i < ARRAY_SIZE(good); i++)
        assert_true(instance_name_valid(good[i]));
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_false(instance_name_valid(bad[i]));
    memset(longest, 'n', sizeof(longest));
    longest[INSTANCE_NAME_MAX] = '\0';
    assert_true(instance_name_valid(longest));
    longest[INSTANCE_NAME_MAX] = 'n';
    longest[INSTANCE_NAME_MAX + 1] = '\0';
    assert_false(instance_name_valid(longest));
}

static void test_claim(void **state UNUSED)
{
    struct instance a, b, c;
    char **names;

    assert_int_equal(instance_claim(&a, "a"), 0);
    assert_int_equal(a.cid, 3);
    assert_int_equal(instance_claim(&b, "a"), -EEXIST);
    assert_int_equal(instance_claim(&b, NULL), 0);
    assert_string_equal(b.name, "vm1");
    assert_int_equal(b.cid, 4);
    assert_int_equal(instance_claim(&c, NULL), 0);
    assert_string_equal(c.name, "vm2");
    assert_int_equal(instance_list(&names), 0);
    assert_string_equal(names[0], "a");
    assert_string_equal(names[1], "vm1");
    assert_string_equal(names[2], "vm2");
    assert_null(names[3]);
    instance_list_free(names);
    instance_release(&b);
    assert_false(there("doppel/vm1") || there("doppel/.cid-4"));
    assert_int_equal(instance_claim(&b, NULL), 0);
    assert_string_equal(b.name, "vm1");
    assert_int_equal(b.cid, 4);
    instance_release(&a);
    instance_release(&b);
    instance_release(&c);
    instance_release(&c);                                          /* once more: nothing */
    assert_int_equal(rmdir(strcat(strcpy((char[80]){ 0 }, dir), "/doppel")), 0);
}

/* One that was killed: its lock is gone, its files are not. What is not ours in its folder stays. */
static void test_dead(void **state UNUSED)
{
    struct instance a, b;
    char **names, path[128];
    int fd;

    assert_int_equal(instance_claim(&a, "a"), 0);
    assert_int_equal(symlinkat("/nowhere", a.dir_fd, "vsock"), 0);
    instance_close(&a);
    assert_int_equal(instance_open(&b, "a"), -ENOENT);
    assert_int_equal(instance_claim(&b, "b"), 0);
    assert_int_equal(b.cid, 3);                                    /* a's address is free */
    assert_int_equal(instance_claim(&a, "a"), 0);                  /* and so is its name */
    assert_int_equal(a.cid, 4);
    assert_false(there("doppel/a/vsock"));
    instance_close(&a);
    snprintf(path, sizeof(path), "%s/doppel/a/mine", dir);
    fd = open(path, O_CREAT | O_WRONLY, 0600);
    close(fd);
    assert_int_equal(instance_list(&names), 0);
    assert_string_equal(names[0], "b");
    assert_null(names[1]);
    instance_list_free(names);
    assert_true(there("doppel/a/mine"));
    assert_false(there("doppel/a/lock") || there("doppel/.cid-4"));
    instance_release(&b);
}

static void test_directory(void **state UNUSED)
{
    struct instance a;
    char path[128], other[128];

    snprintf(path, sizeof(path), "%s/doppel", dir);
    snprintf(other, sizeof(other), "%s/other", dir);
    assert_int_equal(mkdir(path, 0755), 0);
    assert_int_equal(chmod(path, 0755), 0);
    assert_int_equal(instance_claim(&a, "a"), -EACCES);            /* others may look */
    instance_release(&a);
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(mkdir(other, 0700), 0);
    assert_int_equal(symlink(other, path), 0);
    assert_true(instance_claim(&a, "a") < 0);                      /* it may be somebody else's some day */
    assert_int_equal(unlink(path), 0);
    assert_false(there("other/a"));
    int fd = open(path, O_CREAT | O_WRONLY, 0600);
    close(fd);
    assert_true(instance_claim(&a, "a") < 0);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0700), 0);
    snprintf(path, sizeof(path), "%s/doppel/a", dir);
    assert_int_equal(symlink(other, path), 0);                     /* a link in the place of a VM's folder */
    assert_true(instance_claim(&a, "a") < 0);
    assert_false(there("other/lock"));
    assert_int_equal(instance_open(&a, "a"), -ENOENT);
}

/* --- the control socket --- */

static struct loop *loop;
static char said[8192];

static bool on_line(void *arg UNUSED, char *line, FILE *out)
{
    snprintf(said + strlen(said), sizeof(said) - strlen(said), "[%s]", line);
    if (!strcmp(line, "much"))
        for (unsigned i = 0; i < 1 << 20; i++)
            fputc('x', out);
    else
        fprintf(out, "did %.20s\n", line);
    return strcmp(line, "quit");
}

static void turn(void)
{
    turns(loop, 6);
}

static int client(const char *path, const char *words)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(send(fd, words, strlen(words), 0), strlen(words));
    turn();
    return fd;
}

/* All that comes, until the other side has ended (true) or nothing more is there. */
static bool answer(int fd, size_t *len, char *text, size_t size)
{
    char buf[65536];
    ssize_t n;

    for (*len = 0; turn(), (n = recv(fd, buf, sizeof(buf), MSG_DONTWAIT)) > 0; *len += (size_t)n)
        if (*len + (size_t)n < size)
            memcpy(text + *len, buf, (size_t)n);
    if (*len < size)
        text[*len] = '\0';
    return n == 0;
}

static void test_control(void **state UNUSED)
{
    char path[128], text[256], lines[5000];
    struct control_config cfg = { .path = path, .line = on_line };
    struct control *c;
    struct stat st;
    int fd, many[40];
    size_t len;

    snprintf(path, sizeof(path), "%s/control", dir);
    assert_int_equal(loop_new(&loop), 0);
    cfg.loop = loop;
    assert_int_equal(control_new(&cfg, &c), 0);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    said[0] = '\0';
    fd = client(path, "one\ntw");
    assert_int_equal(send(fd, "o\r\nthree", 8, 0), 8);
    assert_false(answer(fd, &len, text, sizeof(text)));
    assert_string_equal(text, "did one\ndid two\n");
    shutdown(fd, SHUT_WR);
    assert_true(answer(fd, &len, text, sizeof(text)));             /* a line without its end is none */
    assert_string_equal(said, "[one][two]");
    close(fd);
    fd = client(path, "quit\nlost\n");
    assert_true(answer(fd, &len, text, sizeof(text)));
    assert_string_equal(text, "did quit\n");
    close(fd);
    memset(lines, 'a', sizeof(lines) - 1);
    lines[sizeof(lines) - 1] = '\0';
    fd = client(path, lines);
    answer(fd, &len, text, sizeof(text));
    assert_non_null(strstr(text, "too long"));
    close(fd);
    fd = client(path, "much\nafter\n");                            /* more than the socket takes */
    shutdown(fd, SHUT_WR);
    assert_true(answer(fd, &len, text, sizeof(text)));
    assert_int_equal(len, (1 << 20) + strlen("did after\n"));
    close(fd);
    fd = client(path, "much\n");                                   /* a reader that leaves */
    close(fd);
    turn();
    for (unsigned i = 0; i < 16; i++)
        many[i] = client(path, "");
    fd = client(path, "late\n");                                   /* has to wait for a place */
    assert_false(answer(fd, &len, text, sizeof(text)));
    assert_int_equal(len, 0);
    close(many[3]);
    assert_false(answer(fd, &len, text, sizeof(text)));
    assert_string_equal(text, "did late\n");
    for (unsigned i = 0; i < 16; i++)
        if (i != 3)
            close(many[i]);
    control_free(c);
    assert_true(answer(fd, &len, text, sizeof(text)));
    close(fd);
    assert_false(there("control"));
    loop_free(loop);
}

/* --- trees --- */

struct script {
    u8 bytes[16384];
    size_t len;
};

static void add(struct script *s, const void *p, size_t len)
{
    assert_true(s->len + len <= sizeof(s->bytes));
    memcpy(s->bytes + s->len, p, len);
    s->len += len;
}

static void record(struct script *s, u32 kind, u32 mode, const char *name)
{
    struct tree_record r = { .kind = kind, .mode = mode, .name_len = (u32)strlen(name) };

    add(s, &r, sizeof(r));
    add(s, name, r.name_len);
}

static void piece(struct script *s, const char *text)
{
    u32 len = (u32)strlen(text);

    add(s, &len, sizeof(len));
    add(s, text, len);
}

static int receive(struct script *s, const char *to, const char *name, struct tree_result *r)
{
    char path[128];
    int pair[2], ret;

    snprintf(path, sizeof(path), "%s/%s", dir, to);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    assert_int_equal(send(pair[1], s->bytes, s->len, 0), s->len);
    shutdown(pair[1], SHUT_WR);
    ret = tree_receive(pair[0], path, name, 0777, r);
    close(pair[0]);
    close(pair[1]);
    s->len = 0;
    return ret;
}

static void file(struct script *s, const char *name, const char *text)
{
    record(s, TREE_FILE, 04755, name);
    piece(s, text);
    piece(s, "");
}

static void test_tree(void **state UNUSED)
{
    struct script s = { .len = 0 };
    struct tree_result r;
    char path[128];
    struct stat st;

    snprintf(path, sizeof(path), "%s/in", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    file(&s, "f", "hello");
    record(&s, TREE_END, 0, "");
    assert_int_equal(receive(&s, "in", NULL, &r), 0);
    assert_int_equal(r.failed, 0);
    snprintf(path, sizeof(path), "%s/in/f", dir);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0755);                    /* no set-user-ID bit comes from a guest */
    assert_int_equal(st.st_size, 5);

    file(&s, ".bashrc", "evil");                                   /* what it is called is said here */
    record(&s, TREE_END, 0, "");
    assert_int_equal(receive(&s, "in", "wanted", &r), 0);
    assert_true(there("in/wanted"));
    assert_false(there("in/.bashrc"));
    file(&s, "one", "1");
    file(&s, "two", "2");                                          /* a second one at the outermost level */
    record(&s, TREE_END, 0, "");
    assert_int_equal(receive(&s, "in", "one", &r), -1);
    assert_false(there("in/two"));
}

static void block(struct script *s, u32 len, char c)
{
    char buf[8192];

    memset(buf, c, len);
    add(s, &len, sizeof(len));
    add(s, buf, len);
}

/* Zeroes take no room, wherever pieces begin and end, and nothing else is lost. */
static void test_tree_holes(void **state UNUSED)
{
    struct script s = { .len = 0 };
    struct tree_result r;
    char path[128], got[14200];
    struct stat st;

    snprintf(path, sizeof(path), "%s/in", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    record(&s, TREE_FILE, 0644, "f");
    block(&s, 100, 'a');
    block(&s, 8192, 0);
    block(&s, 1, 'b');
    block(&s, 5907, 0);                                            /* ends in a hole, in the middle of a block */
    piece(&s, "");
    record(&s, TREE_END, 0, "");
    assert_int_equal(receive(&s, "in", NULL, &r), 0);
    assert_int_equal(r.failed, 0);
    snprintf(path, sizeof(path), "%s/in/f", dir);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_size, sizeof(got));
    assert_true(st.st_blocks * 512 <= 2 * 4096);                   /* the blocks of 'a' and of 'b' */
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    assert_int_equal(fread(got, 1, sizeof(got), f), sizeof(got));
    fclose(f);
    for (unsigned i = 0; i < sizeof(got); i++)
        assert_int_equal(got[i], i < 100 ? 'a' : i == 8292 ? 'b' : 0);
}

static void test_tree_outside(void **state UNUSED)
{
    static const char *const names[] = { "..", ".", "a/b", "/etc", "", "../x" };
    struct script s = { .len = 0 };
    struct tree_result r;
    char path[128];

    snprintf(path, sizeof(path), "%s/in", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    snprintf(path, sizeof(path), "%s/out", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        record(&s, TREE_DIR, 0755, "d");
        file(&s, names[i], "x");
        assert_int_equal(receive(&s, "in", NULL, &r), -1);
    }
    record(&s, TREE_DIR, 0755, "d");                               /* a link, and then a folder of the same name */
    record(&s, TREE_LINK, 0, "l");
    piece(&s, path);
    record(&s, TREE_DIR, 0700, "l");
    file(&s, "f", "x");
    record(&s, TREE_UP, 0, "");
    record(&s, TREE_UP, 0, "");
    record(&s, TREE_END, 0, "");
    assert_int_equal(receive(&s, "in", NULL, &r), 0);
    assert_int_not_equal(r.failed, 0);
    assert_false(there("out/f"));
    record(&s, TREE_DIR, 0755, "d");                               /* a file through it replaces the link */
    file(&s, "l", "x");
    record(&s, TREE_UP, 0, "");
    record(&s, TREE_END, 0, "");
    assert_int_equal(receive(&s, "in", NULL, &r), 0);
    assert_true(there("out"));
    record(&s, TREE_UP, 0, "");                                    /* up from where it began */
    assert_int_equal(receive(&s, "in", NULL, &r), -1);
    for (unsigned i = 0; i < TREE_DEPTH_MAX + 2; i++)
        record(&s, TREE_DIR, 0755, "deep");
    assert_int_equal(receive(&s, "in", NULL, &r), -1);
}

/* What breaks off in a file leaves no file, whole or not. */
static void test_tree_broken(void **state UNUSED)
{
    struct script s = { .len = 0 };
    struct tree_result r;
    char path[128], command[160];
    u32 lost = TREE_LOST;

    snprintf(path, sizeof(path), "%s/in", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    record(&s, TREE_FILE, 0644, "f");
    piece(&s, "half");
    assert_int_equal(receive(&s, "in", NULL, &r), -1);
    record(&s, TREE_FILE, 0644, "f");
    piece(&s, "half");
    add(&s, &lost, sizeof(lost));
    record(&s, TREE_END, 0, "");
    assert_int_equal(receive(&s, "in", NULL, &r), 0);
    record(&s, TREE_FILE, 0644, "f");
    lost = TREE_PIECE_MAX + 1;
    add(&s, &lost, sizeof(lost));
    assert_int_equal(receive(&s, "in", NULL, &r), -1);
    snprintf(command, sizeof(command), "test -z \"$(ls -A %s)\"", path);
    assert_int_equal(system(command), 0);
    file(&s, "f", "x");
    record(&s, TREE_END, 0, "");
    assert_int_equal(receive(&s, "none/x", NULL, &r), 0);          /* nowhere to put it: told, and the rest taken and dropped */
    assert_int_not_equal(r.failed, 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_names, setup, teardown),
        cmocka_unit_test_setup_teardown(test_claim, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dead, setup, teardown),
        cmocka_unit_test_setup_teardown(test_directory, setup, teardown),
        cmocka_unit_test_setup_teardown(test_control, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tree, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tree_holes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tree_outside, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tree_broken, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
