/* The command line: sizes, options, what contradicts what, and that every error names option, reason and remedy. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include "base/err.h"
#include "base/trace.h"
#include "ctl/run_options.h"

/* A copy that may be cut up, as argv is. */
struct words {
    char text[32][128];
    char *argv[33];
    int argc;
};

static struct words split(const char *line)
{
    struct words w = {.argc = 0};
    while (*line) {
        size_t n = strcspn(line, " ");
        snprintf(w.text[w.argc], sizeof(w.text[0]), "%.*s", (int)n, line);
        w.argc++;
        line += n + strspn(line + n, " ");
    }
    return w;
}

static struct words words;
static int parse(struct run_options *o, const char *line)
{
    words = split(line);
    for (int i = 0; i < words.argc; i++)
        words.argv[i] = words.text[i];
    words.argv[words.argc] = NULL;
    return run_options_parse(o, words.argc, words.argv);
}

static void accepts(struct run_options *o, const char *line)
{
    int r = parse(o, line);
    if (r < 0)
        fail_msg("%s: %s", line, err_last());
}

/* Every message names the option and says what to do about it. */
static void rejects(const char *line, const char *expected)
{
    struct run_options o;
    if (parse(&o, line) == 0)
        fail_msg("accepted: %s", line);
    if (!strstr(err_last(), expected))
        fail_msg("%s: the message \"%s\" lacks \"%s\"", line, err_last(), expected);
    assert_null(strchr(err_last(), '\n'));
}

static void sizes(void **state UNUSED)
{
    static const struct {
        const char *text;
        int result;
        u64 bytes;
    } cases[] = {
        {"0", 0, 0}, {"4096", 0, 4096}, {"512M", 0, 512 * MiB}, {"512m", 0, 512 * MiB}, {"3G", 0, 3 * GiB},
        {"1K", 0, 1024}, {"1T", 0, 1024 * GiB}, {"8388608T", 0, BIT(63)}, {"8388609T", -EINVAL, 0},
        {"9223372036854775808", 0, BIT(63)}, {"9223372036854775809", -EINVAL, 0}, {"18446744073709551616", -EINVAL, 0},
        {"99999999999999999999999G", -EINVAL, 0}, {"", -EINVAL, 0}, {"M", -EINVAL, 0}, {"-1", -EINVAL, 0},
        {"+1", -EINVAL, 0}, {" 1", -EINVAL, 0}, {"1 M", -EINVAL, 0}, {"1MB", -EINVAL, 0}, {"0x10", -EINVAL, 0},
        {"1.5G", -EINVAL, 0}, {"1Q", -EINVAL, 0},
    };
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        u64 bytes = 0;
        int r = parse_size(cases[i].text, &bytes);
        if (r != cases[i].result || bytes != cases[i].bytes)
            fail_msg("\"%s\": %d, %llu", cases[i].text, r, (unsigned long long)bytes);
    }
}

static void defaults(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "");
    assert_string_equal(o.engine, "auto");
    assert_int_equal(o.cpus, 1);
    assert_int_equal(o.memory_bytes, 512 * MiB);
    assert_null(o.kernel);
    assert_null(o.command);
    assert_int_equal(o.disks, 0);
    assert_int_equal(o.console, CONSOLE_DEFAULT);
    assert_false(o.no_reboot || o.quiet || o.verbose || o.trace_mask);
}

static void all_options(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "--engine interp --cpus 4 --memory=64M --kernel k --initrd i --append a=b --console none --no-reboot "
                "--status-file s --verbose");
    assert_string_equal(o.engine, "interp");
    assert_int_equal(o.cpus, 4);
    assert_int_equal(o.memory_bytes, 64 * MiB);
    assert_string_equal(o.kernel, "k");
    assert_string_equal(o.initrd, "i");
    assert_string_equal(o.append, "a=b");
    assert_int_equal(o.console, CONSOLE_NONE);
    assert_string_equal(o.status_file, "s");
    assert_true(o.no_reboot && o.verbose);
}

static void networks(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "");
    assert_int_equal(o.net.nets, 1);
    assert_int_equal(o.net.net[0].kind, VM_NET_USER);
    assert_false(net_options_wait(&o.net));
    accepts(&o, "--net none");
    assert_int_equal(o.net.nets, 0);
    accepts(&o, "--net user,restrict,mac=02:00:00:aB:cd:ef,mtu=9000,queues=2,offload=off --net tap=t0 --net fd=3:4 --net passt=/x");
    assert_int_equal(o.net.nets, 4);
    assert_true(o.net.net[0].restricted && o.net.net[0].has_mac && o.net.net[0].mac[3] == 0xab);
    assert_int_equal(o.net.net[0].mtu, 9000);
    assert_int_equal(o.net.net[0].queues, 2);
    assert_true(o.net.net[0].plain && !o.net.net[1].plain);
    assert_string_equal(o.net.net[1].name, "t0");
    assert_true(o.net.net[2].fds == 2 && o.net.net[2].fd[1] == 4);
    assert_string_equal(o.net.net[3].name, "/x");
    assert_true(net_options_wait(&o.net));
    accepts(&o, "--net tap=t0");
    assert_false(net_options_wait(&o.net));
    accepts(&o, "--publish 8080:80 --publish 0.0.0.0:1:2/udp --publish [::1]:65535:1/tcp");
    assert_int_equal(o.net.publishes, 3);
    assert_true(o.net.publish[0].host == 8080 && o.net.publish[0].guest == 80 && o.net.publish[0].addr4.s_addr == htonl(0x7f000001));
    assert_true(o.net.publish[1].udp && !o.net.publish[1].addr4.s_addr);
    assert_true(o.net.publish[2].v6 && o.net.publish[2].addr6.s6_addr[15] == 1 && o.net.publish[2].host == 65535);
    assert_true(net_options_wait(&o.net));
    static const char *const bad[] = {
        "--net users", "--net user,mac=1", "--net user,mac=01:00:00:00:00:00", "--net user,mac=02:00:00:00:00:00:", "--net user,mac", "--net user,mtu=67",
        "--net user,mtu=65521", "--net user,queues=0", "--net user,offload=no", "--net user,queues=9", "--net tap=", "--net passt=", "--net fd=", "--net fd=x", "--net fd=-1", "--net ,",
        "--net user,restrict=1", "--net tap=t,restrict", "--net user --net none", "--net none --net user", "--publish 80", "--publish 0:80",
        "--publish 80:65536", "--publish 80:80/sctp", "--publish x:80:80", "--publish ::1:80:80", "--publish :80:80", "--publish []:80:80", "--publish 80:80 --net none",
        "--publish 80:80 --net tap=t", "--capture f --net none", "--publish 99999999999999999999:1",
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        rejects(bad[i], bad[i][2] == 'p' ? "--publish" : bad[i][2] == 'c' ? "--capture" : "--net");
}

static void disks(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "--disk a,b.img --disk c.img,readonly --disk=d,readonly,readonly");
    assert_int_equal(o.disks, 3);
    assert_string_equal(o.disk[0].block.path, "a,b.img");
    assert_false(o.disk[0].block.readonly);
    assert_string_equal(o.disk[1].block.path, "c.img");
    assert_true(o.disk[1].block.readonly);
    assert_string_equal(o.disk[2].block.path, "d");
    assert_true(o.disk[2].block.readonly);
    accepts(&o, "--disk a,io=threads,on-full=error --disk b,on-full=pause,readonly,io=uring");
    assert_string_equal(o.disk[0].block.path, "a");
    assert_true(o.disk[0].full_is_error && o.disk[0].block.io == BLOCK_IO_THREADS);
    assert_true(!o.disk[1].full_is_error && o.disk[1].block.readonly && o.disk[1].block.io == BLOCK_IO_URING);
    accepts(&o, "--disk a,cache=none --disk b,cache=writethrough --disk c,cache=writeback");
    assert_true(o.disk[0].block.cache == BLOCK_CACHE_NONE && o.disk[1].block.cache == BLOCK_CACHE_THROUGH && o.disk[2].block.cache == BLOCK_CACHE_BACK);
    rejects("--disk ,readonly", "--disk");
    rejects("--disk /dev/null,readwrite", "attribute");
    accepts(&o, "--disk a,serial=Work_1.2-b --disk b --disk c,serial=12345678901234567890,readonly");
    assert_string_equal(o.disk[0].serial, "Work_1.2-b");
    assert_null(o.disk[1].serial);
    assert_string_equal(o.disk[2].serial, "12345678901234567890");
    rejects("--disk /dev/null,serial=123456789012345678901", "1 to 20 letters");
    rejects("--disk /dev/null,serial=", "1 to 20 letters");
    rejects("--disk /dev/null,serial=a/b", "1 to 20 letters");
    rejects("--disk a,serial=x --disk b,serial=x", "another disk has serial=x");
    rejects("--disk /dev/null,bus=scsi", "virtio or nvme");            /* a value that is none: what it may be */
    rejects("--disk /dev/null,cache=unsafe", "writeback, writethrough or none");
    rejects("--disk /dev/null,on-full=stop", "pause or error");
    rejects("--disk /dev/null,io=aio", "uring or threads");
    rejects("--disk /dev/null,overlay=", "a file");
}

static void too_many_disks(void **state UNUSED)
{
    struct run_options o;
    char text[VM_DISKS_MAX + 1][32], *argv[VM_DISKS_MAX + 2];
    for (int i = 0; i <= VM_DISKS_MAX; i++) {
        snprintf(text[i], sizeof(text[i]), "--disk=d%d", i);
        argv[i] = text[i];
    }
    argv[VM_DISKS_MAX + 1] = NULL;
    assert_int_equal(run_options_parse(&o, VM_DISKS_MAX, argv), 0);
    assert_int_equal(o.disks, VM_DISKS_MAX);
    assert_true(run_options_parse(&o, VM_DISKS_MAX + 1, argv) < 0);
    assert_non_null(strstr(err_last(), "too many"));
}

static void consoles(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "--console stdio");
    assert_int_equal(o.console, CONSOLE_STDIO);
    accepts(&o, "--console unix:/tmp/x");
    assert_int_equal(o.console, CONSOLE_UNIX);
    assert_string_equal(o.console_path, "/tmp/x");
    accepts(&o, "--console ./stdio");
    assert_int_equal(o.console, CONSOLE_FILE);
    rejects("--console unix:", "path is missing");
}

static void traces(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "--trace exits,cr3");
    assert_int_equal(o.trace_mask, TRACE_EXITS | TRACE_CR3);
    assert_null(o.trace_file);
    accepts(&o, "--trace exits,msr,file=a,b");
    assert_int_equal(o.trace_mask, TRACE_EXITS | TRACE_MSR);
    assert_string_equal(o.trace_file, "a,b");
    rejects("--trace exit", "\"exit\"");
    rejects("--trace file=x", "no kind");
    rejects("--trace exits,file=", "file=");
    rejects("--trace ,", "--trace");
}

static void statistics(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "");
    assert_false(o.stats);
    accepts(&o, "--stats --cpus 2");                               /* what follows is not its value */
    assert_true(o.stats && !o.stats_json && !o.stats_file && o.cpus == 2);
    accepts(&o, "--stats=json");
    assert_true(o.stats && o.stats_json && !o.stats_file);
    accepts(&o, "--stats=text,file=a,b");
    assert_true(o.stats && !o.stats_json);
    assert_string_equal(o.stats_file, "a,b");
    accepts(&o, "--stats=json,file=j");
    assert_true(o.stats_json);
    assert_string_equal(o.stats_file, "j");
    accepts(&o, "--stats=file=json");
    assert_true(!o.stats_json);
    assert_string_equal(o.stats_file, "json");
    rejects("--stats=yaml", "neither text nor json");
    rejects("--stats=json,file=", "--stats=json,file=");
    rejects("--stats=json,x", "--stats=json,x");
    rejects("--stats=jso", "neither");
    rejects("--stats=", "empty");
}

static void profiles(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "--profile p");
    assert_string_equal(o.profile_file, "p");
    assert_null(o.profile_symbols);
    accepts(&o, "--profile=a,b,symbols=/boot/System.map");
    assert_string_equal(o.profile_file, "a,b");
    assert_string_equal(o.profile_symbols, "/boot/System.map");
    rejects("--profile p,symbols=", "missing");
    rejects("--profile ,symbols=m", "missing");
    rejects("--profile", "missing");
}

static void checks(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "--check");
    assert_true(o.check);
    accepts(&o, "--check --engine bt");
    rejects("--check --engine interp", "--engine interp");
    rejects("--check=1", "no value");
}

static void commands(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "--cpus 2 -- sh -c --cpus --");
    assert_string_equal(o.command[0], "sh");
    assert_string_equal(o.command[3], "--");
    assert_null(o.command[4]);
    accepts(&o, "--append -- --quiet");
    assert_string_equal(o.append, "--");
    assert_null(o.command);
    assert_true(o.quiet);
    rejects("--", "no command");
    rejects("--console stdio -- true", "--console stdio");
    rejects("--kernel k -- true", "--initrd");
    accepts(&o, "--kernel k --initrd i -- true");
    accepts(&o, "--console none -- true");
    rejects("./true", "\"--\"");
}

static void images(void **state UNUSED)
{
    struct run_options o;
    accepts(&o, "--quiet debian --memory 1G");
    assert_string_equal(o.image, "debian");
    assert_int_equal(o.memory_bytes, 1024 * MiB);
    assert_null(o.keep);
    accepts(&o, "debian --keep work");
    assert_string_equal(o.keep, "work");
    accepts(&o, "--memory 1G");
    assert_null(o.image);
    rejects("debian true", "\"--\"");
    rejects("../debian", "not the name of an image");
    accepts(&o, "debian -- true");
    accepts(&o, "debian --kernel k -- true");
    assert_string_equal(o.image, "debian");
    rejects("debian --initrd i", "--kernel");
    rejects("debian --firmware f", "--firmware");
    rejects("debian --detach -- true", "--detach");
    rejects("debian --root /", "--root");
    rejects("debian --keep a/b", "--keep");
    rejects("debian --keep ..", "--keep");
    rejects("--keep work", "image");
}

static void wrong_values(void **state UNUSED)
{
    rejects("--cpus 0", "1 to");
    rejects("--cpus 65", "1 to");
    rejects("--cpus two", "not a number");
    rejects("--cpus -1", "not a number");
    rejects("--cpus 18446744073709551617", "not a number");
    rejects("--memory 12Q", "not a size");
    rejects("--memory 512", "K, M or G");
    rejects("--memory 1K", "too small");
    rejects("--memory 0", "too small");
    rejects("--memory 4097K", "whole number");
    rejects("--memory 100000G", "too much");
    rejects("--memory 9999999999999999999G", "not a size");
    rejects("--engine warp", "interp");
    rejects("--engine", "missing");
    rejects("--kernel=", "empty");
    rejects("--quiet=1", "no value");
    rejects("--quiet --verbose", "contradict");
    rejects("--cpus 1 --cpus 2", "twice");
    rejects("--quiet --quiet", "twice");
}

static void unknown_options(void **state UNUSED)
{
    rejects("--memori 1G", "--memory?");
    rejects("--mem 1G", "--memory?");
    rejects("--cpu 1", "--cpus?");
    rejects("--noreboot", "--no-reboot?");
    rejects("--frobnicate", "no such option");
    rejects("-m 1G", "two dashes");
    rejects("uname -a", "a command for the guest stands behind");
    rejects("-", "\"-\"");
    rejects("--=1", "no such option");
    assert_null(strstr(err_last(), "mean"));
}

/* Hostile words: longer than any buffer that they may be copied into. */
static void long_words(void **state UNUSED)
{
    struct run_options o;
    static char word[70000];
    memset(word, 'x', sizeof(word) - 1);
    memcpy(word, "--", 2);
    char *argv[] = {word, NULL};
    assert_true(run_options_parse(&o, 1, argv) < 0);
    static char value[70000] = "--memory=";
    memset(value + 9, '9', sizeof(value) - 10);
    argv[0] = value;
    assert_true(run_options_parse(&o, 1, argv) < 0);
    memcpy(value, "--trace=9", 9);
    assert_true(run_options_parse(&o, 1, argv) < 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes), cmocka_unit_test(defaults), cmocka_unit_test(all_options),
        cmocka_unit_test(too_many_disks), cmocka_unit_test(consoles), cmocka_unit_test(traces), cmocka_unit_test(statistics), cmocka_unit_test(profiles), cmocka_unit_test(checks),
        cmocka_unit_test(commands), cmocka_unit_test(images), cmocka_unit_test(wrong_values), cmocka_unit_test(unknown_options),
        cmocka_unit_test(long_words), cmocka_unit_test(disks), cmocka_unit_test(networks),
    };
    return cmocka_run_group_tests_name("options", tests, NULL, NULL);
}
