/* Help texts for people at a terminal, and the same words as a man page in man(7)'s macros (help.h). */
#include "ctl/help.h"

#include <ctype.h>
#include <string.h>

#include "ctl/monitor.h"
#include "ctl/options.h"
#include "ctl/run_options.h"

#define COLUMNS 80
#define TERM_COLUMN 14

static const struct help_row exit_rows[] = {
    {"0", "The guest powered off, or reset itself with --no-reboot, or Ctrl-A X ended it."},
    {"N",
     "With a COMMAND: its exit status; 128+N after signal N; 127 when it was not found, 126 when it could not be run."},
    {"1",
     "An error of the host, told on standard error (also when it could not write what a successful COMMAND said); or "
     "the guest ended without the COMMAND's status, or reset itself three times within a second of its start."},
    {"64", "Wrong options."},
    {"70", "The guest's kernel panicked."},
    {"71", "The guest's processor shut down (triple fault); its state is printed."},
    {"128+N", "doppel was ended by signal N (two SIGTERM: 143) before the guest had powered off."},
};
static const struct help_row key_rows[] = {
    {"Ctrl-A X", "Quits: the guest's power is cut."},
    {"Ctrl-A C", "Opens and closes the monitor prompt. The guest's output waits meanwhile."},
    {"Ctrl-A A", "Sends Ctrl-A to the guest; so does Ctrl-A Ctrl-A."},
    {"Ctrl-A H", "Lists these keys."},
};
static const struct help_row file_rows[] = {
    {"DOPPEL_GUEST",
     "(environment) The directory of the default guest, with vmlinuz, initrd and cmdline; nothing else is looked at "
     "then."},
    {"guest/", "Beside the program, or in PREFIX/share/doppel: the default guest that came with it."},
    {"~/.cache/doppel", "(or $XDG_CACHE_HOME/doppel) Where the default guest is built if there is none."},
    {"DOPPEL_VIRTIOFSD", "(environment) The virtiofsd for --share ...,fs=virtiofs and --root; else it is looked for where Debian has it. \"none\": there is none, and --root takes 9p."},
    {"DOPPEL_IMAGES", "(environment) Where images are; else $XDG_DATA_HOME/doppel/images, or ~/.local/share/doppel/images."},
    {"$XDG_RUNTIME_DIR/doppel", "(or /tmp/doppel-UID) A folder for each VM that runs, by its name, with the sockets control (the monitor's "
     "commands, as lines) and vsock. For its owner only."},
    {"TERM", "(environment) Passed on to the guest's shell, and to a COMMAND on a terminal."},
};
static const struct help_row example_rows[] = {
    {"doppel run", "A shell in the default guest."},
    {"doppel run -- sh -c 'uname -r; exit 3'", "Prints the guest's kernel version, exits with 3."},
    {"doppel run --cpus 2 --memory 1G --disk disk.img,readonly", "Two processors, and a disk that is only read."},
    {"doppel image build debian; doppel run debian", "A Debian with systemd, from its packages to its login."},
    {"doppel run --root / -- make help", "A program of this host under the guest's kernel; what it writes is gone with the guest."},
    {"doppel run --kernel bzImage --initrd initrd.img --append 'console=ttyS0 quiet'", "A kernel of your own."},
    {"doppel run --console unix:/tmp/c & socat -,raw,echo=0 UNIX:/tmp/c",
     "A guest in the background, and its console."},
    {"doppel run --detach --name box; doppel exec -t box -- sh", "A guest in the background, and a shell in it."},
    {"doppel cp -r results box:/root; doppel kill box", "Files into it; and its end."},
    {"doppel run --trace exits,interrupts,file=trace.txt -- true", "What the guest made its processor do."},
};

static const struct help_section {
    const char *title;
    const struct help_row *row;
    unsigned rows;
} sections[] = {
    {"Exit status", exit_rows, ARRAY_SIZE(exit_rows)},
    {"Keys", key_rows, ARRAY_SIZE(key_rows)},
    {"Files and environment", file_rows, ARRAY_SIZE(file_rows)},
    {"Examples", example_rows, ARRAY_SIZE(example_rows)},
};

void help_fill(FILE *f, const char *text, unsigned indent, unsigned at)
{
    bool first = true;
    for (const char *p = text; *p;) {
        size_t len = strcspn(p, " ");
        if (!first && at + 1 + len > COLUMNS) {
            fprintf(f, "\n%*s", (int)indent, "");
            at = indent;
            first = true;
        }
        at += (unsigned)fprintf(f, "%s%.*s", first ? "" : " ", (int)len, p);
        first = false;
        p += len + strspn(p + len, " ");
    }
    fputc('\n', f);
}

/* "  term   text", or the text below where the term is long. */
static void row(FILE *f, const char *term, const char *text, unsigned column)
{
    unsigned at = (unsigned)fprintf(f, "  %s", term);
    if (!*text) {
        fputc('\n', f);
        return;
    }
    if (at + 2 > column) {
        fputc('\n', f);
        at = 0;
    }
    fprintf(f, "%*s", (int)(column - at), "");
    help_fill(f, text, column, column);
}

static void option_term(const struct option *o, char term[80])
{
    snprintf(term, 80, "--%s%s%s", o->name, o->arg && !option_optional(o) ? " " : "", o->arg ? o->arg : "");
}

static void monitor_term(const struct monitor_command *c, char term[80])
{
    snprintf(term, 80, "%s%s%s", c->name, *c->args ? " " : "", c->args);
}

void help_overview(FILE *f)
{
    char term[80];
    fputs("doppel: runs unmodified operating systems on any x86-64 Linux host\n\nUsage:\n", f);
    for (unsigned i = 0; i < cli_command_count; i++) {
        snprintf(term, sizeof(term), "doppel %s %s", cli_commands[i].name, cli_commands[i].synopsis);
        row(f, term, cli_commands[i].summary, 48);
    }
    row(f, "doppel --version | --help", "", 48);
    fputs("\n\"doppel run\" alone boots a small Debian system to a shell. \"doppel help run\" has\nthe options, exit "
          "statuses, keys and examples.\n", f);
}

void help_command(FILE *f, const struct command_row *c)
{
    char term[80];
    fprintf(f, "Usage: doppel %s%s%s\n", c->name, *c->synopsis ? " " : "", c->synopsis);
    for (unsigned i = 0; c->text[i]; i++) {
        fputc('\n', f);
        help_fill(f, c->text[i], 0, 0);
    }
    if (!c->option)
        return;
    fputs("\nOptions\n", f);
    for (unsigned i = 0; i < *c->options; i++) {
        option_term(&c->option[i], term);
        row(f, term, c->option[i].text, 6);
    }
    if (c->option != run_option_table)                             /* the rest is about guests that are started */
        return;
    for (size_t s = 0; s < ARRAY_SIZE(sections); s++) {
        fprintf(f, "\n%s\n", sections[s].title);
        bool examples = sections[s].row == example_rows;
        for (unsigned i = 0; i < sections[s].rows; i++)
            row(f, sections[s].row[i].term, sections[s].row[i].text, examples ? 6 : TERM_COLUMN + 6);
    }
    fputs("\nMonitor prompt\n", f);
    for (unsigned i = 0; i < monitor_command_count; i++) {
        monitor_term(&monitor_commands[i], term);
        row(f, term, monitor_commands[i].text, TERM_COLUMN + 20);
    }
}

/* --- man page --- */

/* Text that troff takes as it is: backslashes and dashes escaped, no control line by accident. */
static void man_text(FILE *f, const char *text)
{
    if (*text == '.' || *text == '\'')
        fputs("\\&", f);
    for (const char *p = text; *p; p++) {
        if (*p == '\\')
            fputs("\\e", f);
        else if (*p == '-')
            fputs("\\-", f);
        else if (*p == '\'')
            fputs("\\(aq", f);
        else if (*p == '~')
            fputs("\\(ti", f);
        else if (*p == '^')
            fputs("\\(ha", f);
        else
            fputc(*p, f);
    }
    fputc('\n', f);
}

static void man_row(FILE *f, const char *term, const char *text)
{
    fputs(".TP\n.B ", f);
    man_text(f, term);
    man_text(f, text);
}

static void man_title(FILE *f, const char *title)
{
    fputs(".SH ", f);
    for (const char *p = title; *p; p++)
        fputc(toupper((unsigned char)*p), f);
    fputc('\n', f);
}

static void man_commands(FILE *f)
{
    fputs(".SH SYNOPSIS\n", f);
    for (unsigned i = 0; i < cli_command_count; i++) {
        const struct command_row *c = &cli_commands[i];
        fprintf(f, "%s.B doppel %s\n", i ? ".br\n" : "", c->name);
        if (*c->synopsis)
            man_text(f, c->synopsis);
    }
    fputs(".br\n.B doppel\n\\-\\-version | \\-\\-help\n.SH DESCRIPTION\n", f);
    man_text(f, "doppel is a virtual machine monitor: it runs unmodified operating systems on any x86-64 Linux host, "
                "as an ordinary user, also where there is no "
                "/dev/kvm.");
    for (unsigned i = 0; i < cli_command_count; i++) {
        fprintf(f, ".SS doppel %s\n", cli_commands[i].name);
        for (unsigned t = 0; cli_commands[i].text[t]; t++) {
            if (t)
                fputs(".PP\n", f);
            man_text(f, cli_commands[i].text[t]);
        }
    }
}

void help_man_page(FILE *f)
{
    char term[80];
    fputs(".TH DOPPEL 1 \"\" \"doppel " DOPPEL_VERSION "\" \"User Commands\"\n", f);
    fputs(".SH NAME\ndoppel \\- run unmodified operating systems on any x86\\-64 Linux host\n", f);
    man_commands(f);
    for (unsigned i = 0; i < cli_command_count; i++) {
        const struct command_row *c = &cli_commands[i];
        if (!c->option)
            continue;
        fprintf(f, ".SH OPTIONS OF DOPPEL ");
        for (const char *p = c->name; *p; p++)
            fputc(toupper((unsigned char)*p), f);
        fputc('\n', f);
        for (unsigned o = 0; o < *c->options; o++) {
            option_term(&c->option[o], term);
            man_row(f, term, c->option[o].text);
        }
    }
    for (size_t s = 0; s < ARRAY_SIZE(sections); s++) {
        man_title(f, sections[s].title);
        for (unsigned i = 0; i < sections[s].rows; i++)
            man_row(f, sections[s].row[i].term, sections[s].row[i].text);
    }
    man_title(f, "Monitor prompt");
    for (unsigned i = 0; i < monitor_command_count; i++) {
        monitor_term(&monitor_commands[i], term);
        man_row(f, term, monitor_commands[i].text);
    }
}
