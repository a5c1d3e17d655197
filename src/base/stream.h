/*
 * One stream for save, load and digest of state: the same function of a device runs in all directions.
 *
 * stream_u32(s, &v) writes v when saving and overwrites it when loading. The first error sticks; later calls do nothing (loads leave
 * the variable alone). What was loaded is untrusted: the device checks ranges itself and calls stream_bad(). Little endian, fixed widths.
 * Not thread-safe.
 */
#pragma once

#include "base/types.h"

struct stream {
    bool load;
    int error;                                                     /* 0 or negative errno, sticky */
    u8 *buf;
    size_t len, cap, pos;                                          /* saving: len bytes are used; loading: pos of len are read */
};

void stream_save_init(struct stream *s);
void stream_load_init(struct stream *s, const u8 *buf, size_t len); /* borrows buf */
void stream_free(struct stream *s);

void stream_u8(struct stream *s, u8 *v);
void stream_u16(struct stream *s, u16 *v);
void stream_u32(struct stream *s, u32 *v);
void stream_u64(struct stream *s, u64 *v);
void stream_bool(struct stream *s, bool *v);
void stream_bytes(struct stream *s, void *p, size_t n);

/* Begins a named section of a version; loading checks name and version <= max, and returns the version found (0 after an error). */
u32 stream_section(struct stream *s, const char *name, u32 version);
void stream_bad(struct stream *s, const char *what);               /* loaded data makes no sense: sets the sticky error */
u64 stream_digest(const struct stream *s);                         /* of a saved stream */
