/*
 * Options of the command line: one table per command, which parsing, `doppel help` and the man page all read.
 *
 * An option is `--name VALUE` or `--name=VALUE`; `--` ends them. Nothing is abbreviated, and an option that is not
 * marked `many` may be given once.
 */
#pragma once

#include "base/types.h"

/*
 * A row of the table; set() gets the command's own struct, and returns 0 or -EINVAL with err(). Flags have no arg and
 * get NULL. An arg in brackets, "[=...]", may be left out (NULL, too) and stands behind "=" only.
 */
struct option {
    /* name without the dashes; text: sentences for help and man page */
    const char *name, *arg, *text;
    bool many;
    int (*set)(void *target, const char *value);
};

static inline bool option_optional(const struct option *o)
{
    return o->arg && o->arg[0] == '[';
}

#define OPTIONS_MAX 64                                             /* rows of a table */

/*
 * Parses argv[0..argc), which ends with NULL, setting target. *rest is what stands behind a `--`, or NULL when there is
 * none; any other argument that is no option is an error. 0, or -EINVAL with err() that names the option, the reason
 * and the remedy.
 */
int options_parse(const struct option *table, unsigned rows, void *target, int argc, char **argv, char ***rest);

/*
 * The same for commands that take words beside options: those are moved to the beginning of argv, and *words is how many there are; NULL ends
 * them, if there are any. `-x` is the option there whose name begins with x.
 */
int options_parse_words(const struct option *table, unsigned rows, void *target, int argc, char **argv, int *words, char ***rest);

int options_parse_plain_words(const struct option *table, unsigned rows, void *target, int argc, char **argv, int *words, char ***rest); /* without `-x` */

/* The name among n that word was probably meant to be, or NULL. name(i) gives them. */
const char *options_guess(const char *word, const char *(*name)(const void *table, unsigned i), const void *table,
                          unsigned n);

/* "512M" and the like: a number with K, M, G or T (1024 each), at most 2^63. 0 or -EINVAL without err(). */
int parse_size(const char *s, u64 *bytes);
int parse_unsigned(const char *s, u64 *v);                         /* decimal digits only; 0 or -EINVAL */

/*
 * "LIST[,file=FILE]": of --trace and the monitor's trace. *file is what stands behind, or NULL. List is cut off in
 * place. 0, or -EINVAL with err().
 */
int parse_trace(char *spec, u32 *mask, const char **file);
