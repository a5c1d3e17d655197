/* Boots the system on a disk: the initramfs hands over (root=DEVICE on the kernel's command line). */
#pragma once

#include <stdbool.h>

/* Becomes program (the system's init) with device as root. Returns, after a message, only if that cannot be. */
int root_boot(const char *device, bool writable, const char *program);
