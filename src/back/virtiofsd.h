/*
 * virtiofsd, the file server of virtio-fs, as a process of doppel's: started with a connected vhost-user socket, in namespaces of its own.
 *
 * It sees nothing but the shared folder. For an ordinary user it is root in a user namespace that knows this one user: files of the user's are root's
 * there, those of all others nobody's. File systems that are views of the host's kernel (/proc, /sys, ...) are covered by empty folders.
 */
#pragma once

#include <sys/types.h>

#include "base/err.h"
#include "base/types.h"

struct virtiofsd {
    pid_t pid;                                                     /* 0: does not run */
    int log;                                                       /* what it has said */
    pid_t server;                                                  /* the process in its sandbox; 0: not looked for yet */
};

/*
 * Whether it could serve this folder: it is installed, and this host permits its namespaces, which is tried. 0, or a negative errno with err(), which says
 * why and gives no advice.
 */
int virtiofsd_usable(const char *folder, bool readonly);
/*
 * The socket, or a negative errno with err(): it is not installed, the host permits no user namespaces, the folder cannot be used. That it has started
 * does not mean that it will answer: virtiofsd_words() then says more.
 */
int virtiofsd_start(struct virtiofsd *d, const char *folder, bool readonly);
/* The last line that it has said, or "". */
void virtiofsd_words(const struct virtiofsd *d, char *buf, size_t size);
/* How many descriptors it may have, half a million at the most; 0: that is not known. */
u64 virtiofsd_descriptors(const struct virtiofsd *d);
/* How many it has now; 0: this host does not say that. */
u64 virtiofsd_open_descriptors(struct virtiofsd *d);
/* Ends it, a second after its socket was closed at the latest. Harmless when it does not run (all zero). */
void virtiofsd_stop(struct virtiofsd *d);
