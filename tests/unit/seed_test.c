/* The seed disk: its file system's fields, the script that is made of a cloud-config and how it quotes, what is refused. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/err.h"
#include "ctl/seed.h"

#define SECTOR 2048

static char warned[512];

static void warn(void *arg UNUSED, const char *message)
{
    snprintf(warned, sizeof(warned), "%s", message);
}

static int seed(const void *text, size_t len)
{
    char path[] = "/tmp/doppel-seed-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0 && write(fd, text, len) == (ssize_t)len);
    close(fd);
    warned[0] = '\0';
    int r = seed_open(path, "vm1", warn, NULL);
    unlink(path);
    return r;
}

static int seed_text(const char *text)
{
    return seed(text, strlen(text));
}

/* The whole disk, and where in it a file is: by its Rock Ridge name. */
static u8 *disk;
static size_t disk_len;

static void load(int fd)
{
    struct stat st;
    assert_true(fd >= 0 && fstat(fd, &st) == 0);
    free(disk);
    disk_len = (size_t)st.st_size;
    disk = malloc(disk_len + 1);
    assert_non_null(disk);
    assert_int_equal(pread(fd, disk, disk_len, 0), disk_len);
    disk[disk_len] = '\0';
    close(fd);
}

static u32 le32(const u8 *p)
{
    return p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24;
}

static char *file(const char *name)
{
    const u8 *p = disk + 20 * SECTOR, *end = p + SECTOR;
    for (; p < end && *p; p += *p)
        if (memmem(p, *p, name, strlen(name))) {
            u32 sector = le32(p + 2), len = le32(p + 10);
            assert_true((u64)sector * SECTOR + len <= disk_len);
            return strndup((char *)disk + sector * SECTOR, len);
        }
    return NULL;
}

static void file_system(void **state UNUSED)
{
    load(seed_text("#cloud-config\nhostname: box\n"));
    assert_int_equal(disk_len % SECTOR, 0);
    assert_memory_equal(disk + 16 * SECTOR, "\1CD001\1", 7);
    assert_memory_equal(disk + 16 * SECTOR + 40, "CIDATA    ", 10);
    assert_int_equal(le32(disk + 16 * SECTOR + 80), disk_len / SECTOR);
    assert_int_equal(le32(disk + 16 * SECTOR + 156 + 2), 20);
    assert_memory_equal(disk + 17 * SECTOR, "\377CD001\1", 7);
    char *user = file("user-data"), *meta = file("meta-data");
    assert_string_equal(user, "#cloud-config\nhostname: box\n");
    assert_non_null(strstr(meta, "\nlocal-hostname: box\n"));
    free(user);
    free(meta);
}

/* Everything that a shell could take for its own stays text. */
static void quoting(void **state UNUSED)
{
    load(seed_text("#cloud-config\nruncmd:\n  - [echo, \"it's $(id) `id` \\\"q\\\" \\\\ \\n;&|\"]\n  - echo 'a b' >x\n"));
    char *script = file("doppel.sh");
    assert_non_null(strstr(script, "run 'echo' 'it'\\''s $(id) `id` \"q\" \\ \n;&|'\n"));
    assert_non_null(strstr(script, "run sh -c 'echo '\\''a b'\\'' >x'\n"));
    assert_non_null(strstr(script, "printf '%s\\n' 'vm1' >/etc/hostname"));
    free(script);
}

static void users(void **state UNUSED)
{
    load(seed_text("#cloud-config\nssh_authorized_keys: [K0]\nusers:\n- default\n- {name: ann, groups: 'adm, sudo', ssh_authorized_keys: [K1, K2], passwd: h, lock_passwd: false}\n"
                   "- name: bob\n  groups: [adm, users]\n  sudo: ['ALL=(ALL) ALL']\n  passwd: h\nchpasswd: {expire: false}\n"));
    char *script = file("doppel.sh");
    assert_non_null(strstr(script, "add_user 'ann' '/bin/bash' '' '' 'adm,sudo'\n"));
    assert_non_null(strstr(script, "set_password 'ann' 'h' ''\n"));
    assert_non_null(strstr(script, "add_key 'ann' 'K1'\nadd_key 'ann' 'K2'\n"));
    assert_non_null(strstr(script, "add_user 'bob' '/bin/bash' '' '' 'adm,users'\n"));
    assert_non_null(strstr(script, "set_password 'bob' 'h' '!'\n"));
    assert_non_null(strstr(script, "add_sudo 'bob' 'ALL=(ALL) ALL'\n"));
    assert_non_null(strstr(script, "add_key 'root' 'K0'\n"));
    assert_non_null(strstr(warned, "chpasswd"));
    free(script);
}

static void scripts(void **state UNUSED)
{
    load(seed_text("#!/bin/sh\necho hello\n"));
    char *script = file("doppel.sh");
    assert_string_equal(script, "#!/bin/sh\necho hello\n");
    free(script);
}

static void identity(void **state UNUSED)
{
    load(seed_text("#cloud-config\nhostname: a\n"));
    char *a = file("meta-data");
    load(seed_text("#cloud-config\nhostname: b\n"));
    char *b = file("meta-data");
    load(seed_text("#cloud-config\nhostname: a\n"));
    char *again = file("meta-data");
    assert_string_not_equal(a, b);
    assert_string_equal(a, again);
    free(a);
    free(b);
    free(again);
}

static void refused(void **state UNUSED)
{
    static const char *const bad[] = {
        "", "hostname: x\n", "#cloud-config", "#cloud-configx\na: b\n", "#cloud-config\n", "#cloud-config\n- a\n", "#cloud-config\na: [\n",
        "#cloud-config\nhostname: 'a b'\n", "#cloud-config\nhostname: ''\n", "#cloud-config\nusers: [{gecos: x}]\n",
        "#cloud-config\nusers: [{name: 'a;b'}]\n", "#cloud-config\nusers: ['-x']\n", "#cloud-config\nwrite_files: [{path: etc/x}]\n",
        "#cloud-config\nwrite_files: [{path: /x, encoding: b64}]\n", "#cloud-config\nruncmd: [{a: b}]\n", "#cloud-config\nruncmd: [[]]\n",
        "#cloud-config\nruncmd: [[a, [b]]]\n", "#cloud-config\nhostname: \"a\\nb\"\n",
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        if (seed_text(bad[i]) >= 0)
            fail_msg("accepted: %s", bad[i]);
        assert_non_null(strstr(err_last(), "--cloud-init"));
    }
    assert_true(seed_open("/nonexistent/x", "vm1", warn, NULL) < 0);
    assert_true(seed_open("/tmp", "vm1", warn, NULL) < 0);
    static char large[600 << 10];
    memset(large, '#', sizeof(large));
    assert_true(seed(large, sizeof(large)) < 0);
    assert_true(seed("#cloud-config\n\0\0\xff\xfe", 18) < 0);
}

/* Nesting and aliases cost what the parser's own limits allow, and no more. */
static void deep(void **state UNUSED)
{
    static char text[64 << 10] = "#cloud-config\nruncmd: ";
    size_t n = strlen(text);
    memset(text + n, '[', sizeof(text) - n - 1);
    assert_true(seed(text, sizeof(text) - 1) < 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(file_system), cmocka_unit_test(quoting), cmocka_unit_test(users), cmocka_unit_test(scripts), cmocka_unit_test(identity),
        cmocka_unit_test(refused), cmocka_unit_test(deep),
    };
    int r = cmocka_run_group_tests(tests, NULL, NULL);
    free(disk);
    return r;
}
