/* Help texts and the man page, both made from cli_commands, the option tables, and the sections below. */
#pragma once

#include "ctl/cli.h"

/* A section of terms and what they mean: exit statuses, keys, files. */
struct help_row {
    const char *term, *text;
};

void help_overview(FILE *f);                                       /* doppel --help */
void help_command(FILE *f, const struct command_row *c);           /* doppel help COMMAND */
void help_man_page(FILE *f);                                       /* doppel --man */

/*
 * Words filled into lines of 80 columns, each beginning with indent blanks; the first line is at column `at` already.
 */
void help_fill(FILE *f, const char *text, unsigned indent, unsigned at);
