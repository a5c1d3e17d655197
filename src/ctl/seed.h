/*
 * --cloud-init FILE: a small disk, labelled CIDATA, from which the guest configures itself when it boots (cloud-init's data source NoCloud). It holds
 * user-data (FILE), meta-data (an identity that changes with FILE, the host's name), and doppel.sh: the same for images without cloud-init, whose unit
 * doppel-seed runs it (image/doppel-seed).
 */
#pragma once

#include "base/types.h"

struct seed_file {
    const char *iso_name, *name;                                   /* "USERDATA.;1", "user-data" */
    const char *data;
    size_t len;
};

#define SEED_FILES_MAX 8

/*
 * A descriptor of the disk, in memory, for reading; name is the VM's, for a FILE that says none. Negative errno with err(): it cannot be read, is no
 * YAML, holds what it cannot. warn is called for what only cloud-init itself does.
 */
int seed_open(const char *path, const char *name, void (*warn)(void *arg, const char *message), void *arg);

/* seed_iso.c: writes a file system of ISO 9660 with Rock Ridge names to fd. 0 or a negative errno. */
int seed_iso_write(int fd, const struct seed_file *file, unsigned files);
