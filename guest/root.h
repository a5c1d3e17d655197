/* Roots that are not the initramfs: a system on a disk that takes over, or one below which shell and command run. */
#pragma once

#include <stdbool.h>

struct init;

/* root=DEVICE: becomes program (the system's init) with device as root. Returns, after a message, only if that cannot be. */
int root_boot(const char *device, bool writable, const char *program);
/* What shell and command are to run below: the host's folder (doppel.root=TYPE), or the disk (root=DEVICE). Mounts it; notes in s whether it could. */
void root_find(struct init *s);
/* In a child: goes there. 0, or -1 with errno. */
int root_enter(const struct init *s);
