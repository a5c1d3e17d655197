/* Help and man page say all that the tables hold, fit a terminal, and are clean troff. */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "ctl/help.h"
#include "ctl/monitor.h"
#include "ctl/run_options.h"

static char text[65536];

static const char *gather(void (*print)(FILE *f))
{
    FILE *f = fmemopen(text, sizeof(text), "w");
    assert_non_null(f);
    print(f);
    fclose(f);
    return text;
}

static void run_help(FILE *f)
{
    help_command(f, &cli_commands[0]);
}

/* Does s hold what, wherever its lines are broken? */
static bool holds(const char *s, const char *what)
{
    for (; *s; s++) {
        const char *p = s, *w = what;
        while (*w && *p && (*p == *w || (*w == ' ' && *p == '\n'))) {
            w++;
            p++;
            while (w[-1] == ' ' && (*p == ' ' || *p == '\n'))
                p++;
        }
        if (!*w)
            return true;
    }
    return false;
}

static void mentions(const char *s, const char *what)
{
    if (!holds(s, what))
        fail_msg("\"%s\" is not mentioned", what);
}

static void fits_a_terminal(const char *s)
{
    for (const char *line = s; *line;) {
        size_t len = strcspn(line, "\n");
        if (len > 80)
            fail_msg("longer than 80 columns: %.*s", (int)len, line);
        if (len && line[len - 1] == ' ')
            fail_msg("blanks at the end: \"%.*s\"", (int)len, line);
        line += len + (line[len] == '\n');
    }
}

static void every_command_is_listed(void **state UNUSED)
{
    const char *s = gather(help_overview);
    for (unsigned i = 0; i < cli_command_count; i++)
        mentions(s, cli_commands[i].summary);
    fits_a_terminal(s);
}

static void every_option_is_explained(void **state UNUSED)
{
    const char *s = gather(run_help);
    for (unsigned i = 0; i < run_option_rows; i++) {
        char option[64];
        snprintf(option, sizeof(option), "--%s", run_option_table[i].name);
        mentions(s, option);
        assert_true(strlen(run_option_table[i].text) > 20);
    }
    for (unsigned i = 0; i < monitor_command_count; i++)
        mentions(s, monitor_commands[i].text);
    for (const char *const *status = (const char *const[]){"64", "70", "71", NULL}; *status; status++)
        mentions(s, *status);
    fits_a_terminal(s);
}

/* The engines that --engine offers in its help are those that exist. */
static void engines_are_listed(void **state UNUSED)
{
    char expected[128] = "auto|";
    for (const char *p = engine_names(); *p; p++)
        if (*p != ' ')
            strncat(expected, *p == ',' ? "|" : (char[]){*p, 0}, 1);
    assert_string_equal(run_option_table[0].arg, expected);
}

static void filling(void **state UNUSED)
{
    FILE *f = fmemopen(text, sizeof(text), "w");
    help_fill(f, "aaaa bbbb  cccc", 2, 73);
    help_fill(f, "", 2, 0);
    fclose(f);
    assert_string_equal(text, "aaaa\n  bbbb cccc\n\n");
}

static void man_page_says_all(void **state UNUSED)
{
    const char *s = gather(help_man_page);
    mentions(s, ".TH DOPPEL 1");
    mentions(s, "\\-\\-memory SIZE");
    mentions(s, "\\-\\-status\\-file FILE");
    for (unsigned i = 0; i < monitor_command_count; i++)
        mentions(s, monitor_commands[i].name);
    mentions(s, "EXIT STATUS");
}

static void man_page_is_clean(void **state UNUSED)
{
    char path[] = "/tmp/doppel-man-XXXXXX";
    int fd = mkstemp(path);
    FILE *f = fdopen(fd, "w");
    help_man_page(f);
    fclose(f);
    char command[128], out[512] = "";
    snprintf(command, sizeof(command), "command -v groff >/dev/null || { echo absent; exit; }; groff -man -Tutf8 -ww "
                                       "-z %s 2>&1", path);
    FILE *p = popen(command, "r");
    size_t n = fread(out, 1, sizeof(out) - 1, p);
    out[n] = '\0';
    pclose(p);
    unlink(path);
    if (!strcmp(out, "absent\n")) {
        print_message("# skip: groff is not installed\n");
        skip();
    }
    assert_string_equal(out, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_command_is_listed), cmocka_unit_test(every_option_is_explained),
        cmocka_unit_test(engines_are_listed), cmocka_unit_test(filling), cmocka_unit_test(man_page_says_all),
        cmocka_unit_test(man_page_is_clean),
    };
    return cmocka_run_group_tests_name("help", tests, NULL, NULL);
}
