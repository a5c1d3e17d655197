/*
 * The user's images, by name: a folder for each in the store.
 *
 *   STORE         $DOPPEL_IMAGES, else $XDG_DATA_HOME/doppel/images, else ~/.local/share/doppel/images
 *   STORE/NAME    root.img     the disk, read-only: what a VM writes goes to an overlay (back/block.h)
 *                 vmlinuz, initrd, cmdline    of images that boot without firmware
 *                 image.json   what is known of it (struct image_info)
 *                 kept/VM      overlays that are kept (--keep)
 *   STORE/.new-NAME, .old-*    one that is being made, or removed
 *
 * Folders are locked (flock): shared by VMs that use an image, exclusively by whoever makes or removes it, whose children may hold the lock, too. An
 * image appears by a rename when it is whole and on the disk. What is left of a doppel that was killed has a lock that nobody holds, and is removed by the
 * next one that enters the store. A name is an instance's (instance.h).
 */
#pragma once

#include <limits.h>

#include "base/types.h"

#define IMAGE_DIGEST_MAX 80

struct image_info {
    char suite[32], kernel[64], digest[IMAGE_DIGEST_MAX];          /* "": none, unknown */
    char created[32];                                              /* 2024-01-31T12:00:00Z */
    char from[256];                                                /* of an imported one: the file's name */
    char wanted[1024];                                             /* --packages */
    bool firmware;                                                 /* boots from its boot sector; else by our kernel */
    bool commands;                                                 /* its initrd runs commands in it */
    u64 size;                                                      /* of the disk, bytes */
    s64 changed_ns;                                                /* root.img's time of last change */
    u64 packages;
};

struct image {
    char name[64], dir[PATH_MAX], store[PATH_MAX];
    int fd;                                                        /* of dir, with the lock; -1: not open */
    struct image_info info;
};

/* A path below dir into out. 0, or -ENAMETOOLONG with err(). */
int image_path(const struct image *i, const char *name, char out[PATH_MAX]);

/* For a VM, which shares it: 0; -ENOENT with err() when there is none; -EBUSY; -EBADMSG: damaged. */
int image_open(struct image *i, const char *name);
void image_close(struct image *i);

/* A folder for a new image; -EEXIST, -EBUSY (somebody else makes it), all with err(). The descriptor fd is inherited by programs that are started. */
int image_begin(struct image *i, const char *name);
int image_commit(struct image *i);                                 /* writes info, and makes it appear */
void image_abandon(struct image *i);

int image_remove(const char *name);                                /* -EBUSY: a VM uses it */
/* Removes the kept overlay of that name. */
int image_remove_kept(const char *name, const char *kept);
/* Path of the kept overlay, whose folder is made. */
int image_kept_path(const struct image *i, const char *kept, char out[PATH_MAX]);

/* Names of images, sorted, ended with NULL. 0 or a negative errno with err(). */
int image_list(char ***names);
/* Of kept overlays. */
int image_kept_list(const struct image *i, char ***names);
void image_list_free(char **names);

/* The disk's SHA-256 ("sha256:..."), of every MiB that is not all zeroes, with its number before it. */
int image_digest(const struct image *i, char out[IMAGE_DIGEST_MAX]);
