/*
 * How many names of files a FUSE guest holds, and how it is brought to hold fewer (linux/fuse.h; FUSE protocol 7.x).
 *
 * A file server keeps a descriptor for each file that its guest has looked up, until the guest forgets it. Linux does so when it needs memory, which may be
 * never; but a virtio-fs file whose name was said to be valid for no time at all is forgotten as soon as nobody uses it. So beyond a bound the answers say
 * that, and a guest can go through any number of files; it costs a look-up for each use of a name.
 *
 * What is counted are look-ups that were answered and not yet forgotten: as many as the files, or more. All of it is in the guest's memory, and a guest that
 * changes it there deceives itself only. No locking: the caller's.
 */
#pragma once

#include <sys/uio.h>

#include "base/types.h"

struct fuse_names {
    u64 known;
    u64 bound;                                                     /* 0: none */
};

/* The request, when the file server gets it; and with the answer, before the guest does. */
void fuse_names_request(struct fuse_names *n, const struct iovec *out, unsigned outs);
void fuse_names_answer(struct fuse_names *n, const struct iovec *out, unsigned outs, const struct iovec *in, unsigned ins);

/* Bytes of a request or answer that lies in pieces; false when it has not that many. */
bool fuse_peek(const struct iovec *piece, unsigned pieces, size_t at, void *buf, size_t len);
