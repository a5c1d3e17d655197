/* The program's commands: one table, from which dispatch, help texts and the man page are made. */
#pragma once

#include "base/types.h"

struct option;

struct command_row {
    const char *name, *synopsis, *summary;                         /* synopsis: what stands behind the name */
    const char *const *text;                                       /* paragraphs, ends with NULL */
    const struct option *option;                                   /* NULL: none */
    const unsigned *options;
    /* the words behind the name; returns the exit status */
    int (*main)(int argc, char **argv);
};

extern const struct command_row cli_commands[];
extern const unsigned cli_command_count;

int cli_main(int argc, char **argv);
