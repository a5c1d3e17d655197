/*
 * The default guest: a directory with vmlinuz, initrd and cmdline, made from Debian's packages by guest/build.
 *
 * Looked for in $DOPPEL_GUEST (and then nowhere else), beside the program (build/guest), in share/doppel of the place
 * where the program is installed, and in the user's cache ($XDG_CACHE_HOME/doppel/guest or ~/.cache/doppel/guest).
 * Where there is none, guest/build makes it.
 */
#pragma once

#include <limits.h>

#include "base/types.h"

struct guest {
    char dir[PATH_MAX], kernel[PATH_MAX], initrd[PATH_MAX];
    char cmdline[2048];
};

/* 0; -ENOENT when there is none anywhere, another negative errno when one is damaged; with err(). */
int guest_find(struct guest *g);
/* Whether its kernel mounts shared folders of that kind (9p, virtiofs); its manifest tells. One without a manifest is taken to have virtiofs. */
bool guest_mounts(const struct guest *g, const char *kind);
/*
 * The same, and makes it if need be, which takes a minute and the network. What the build script says goes to standard
 * error, unless quiet.
 */
int guest_find_or_build(struct guest *g, bool quiet);
/* The same with Debian's standard kernel, which has 9p: "guest-standard" in the same places. With DOPPEL_GUEST set there is no other: -EINVAL. */
int guest_find_or_build_standard(struct guest *g, bool quiet);

/* A path seen from the folder that the program is in. 0 or a negative errno with err(). */
int guest_program_path(char out[PATH_MAX], const char *name);
/* For doctor: the script that would be run and where its result would go. 0, or -ENOENT with err(). */
int guest_build_paths(char script[PATH_MAX], char dir[PATH_MAX]);
