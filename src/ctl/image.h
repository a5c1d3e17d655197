/*
 * doppel image: makes, imports, lists and removes images (image_store.h). Given the words behind its name; returns the exit status.
 */
#pragma once

#include "ctl/image_store.h"
#include "ctl/options.h"

extern const struct option image_option_table[];
extern const unsigned image_option_rows;

struct image_options {
    const char *packages, *mirror, *kernel;                        /* NULL: not given */
    u64 size;                                                      /* 0: not given */
    bool check, json;
};

int image_main(int argc, char **argv);

/* image_build.c: the image of that name from Debian's packages; suite "": the host's. 0, a negative errno with err(), or the signal that ended it. */
int image_build(const char *name, const char *suite, const struct image_options *o);
/* image_import.c: from a file with a disk; name NULL: after the file's. */
int image_import(const char *file, const char *name);

struct image_format {
    const char *magic;                                             /* what a file of it begins with */
    unsigned len;
    const char *kind, *remedy;
};
/* What file is if it holds a disk in another form than raw, as far as its first bytes tell; NULL: raw, or it cannot be read. */
const struct image_format *image_format_of(const char *file);
