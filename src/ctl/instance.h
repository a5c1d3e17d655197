/*
 * The running VMs of a user, by name: a folder for each in a private directory.
 *
 *   BASE          $XDG_RUNTIME_DIR/doppel, if XDG_RUNTIME_DIR is a directory of the user's; else /tmp/doppel-UID. Mode 0700, the user's;
 *                 anything else is refused, since whoever owns it could put sockets of his own there.
 *   BASE/NAME     lock      locked (flock) by the doppel whose VM it is, for as long as it lives: however it ends, its name is free then
 *                 control   the control socket (control.h)
 *                 vsock     the socket of its vsock (back/vsock_host.h), or a link to it; vsock_N: where the host's programs listen
 *   BASE/.cid-N   link to NAME: whose vsock address that is
 *
 * What a doppel leaves behind that was killed is removed by the next one that looks. Changes are made while BASE is locked. A name is 1 to
 * 63 letters, digits, "_", "." or "-", and begins with a letter or digit: it is a word on a command line and a file's name.
 */
#pragma once

#include <limits.h>

#include "base/types.h"

#define INSTANCE_NAME_MAX 63

struct instance {
    char name[INSTANCE_NAME_MAX + 1];
    char base[PATH_MAX], dir[PATH_MAX];
    int base_fd, dir_fd, lock_fd;                                  /* -1: none */
    u32 cid;                                                       /* its vsock address; only of a claimed one */
};

bool instance_name_valid(const char *name);

/*
 * Takes name (NULL: one that is free, "vm1" or so) and a CID for this process. 0, or a negative errno with err(); -EEXIST: the name is in
 * use. Then nothing needs to be released.
 */
int instance_claim(struct instance *i, const char *name);
void instance_release(struct instance *i);                         /* removes its folder; harmless when nothing was claimed (all zero) */

/* Opens one that runs. 0; -ENOENT with err() when none of that name does. instance_close() afterwards. */
int instance_open(struct instance *i, const char *name);
void instance_close(struct instance *i);
bool instance_lives(const struct instance *i);                     /* still? Of an opened one */

/* Is there a folder of that name, whoever lives there or not? */
bool instance_left(const char *name);

/* The names of those that run, sorted, ended with NULL; what dead ones left is removed. 0 or negative errno with err(). */
int instance_list(char ***names);
void instance_list_free(char **names);
/* Connects to a socket in its folder: a descriptor, or a negative errno without err(). */
int instance_connect(const struct instance *i, const char *socket_name);
