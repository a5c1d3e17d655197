/* Save, load and digest of state: bytes in a buffer that grows, or bytes read from one that is borrowed. */
#include "base/stream.h"

#include <errno.h>
#include <string.h>

#include "base/err.h"

#define NAME_MAX_LEN 63

void stream_save_init(struct stream *s)
{
    *s = (struct stream){ 0 };
}

void stream_load_init(struct stream *s, const u8 *buf, size_t len)
{
    *s = (struct stream){ .load = true, .buf = (u8 *)buf, .len = len }; /* never written to while loading */
}

void stream_free(struct stream *s)
{
    if (!s->load)
        free(s->buf);
    *s = (struct stream){ 0 };
}

static bool reserve(struct stream *s, size_t n)
{
    size_t cap = s->cap ? s->cap : 4096;
    u8 *buf;

    if (n <= s->cap - s->len)
        return true;
    while (cap - s->len < n) {
        if (cap > SIZE_MAX / 2)
            goto fail;
        cap *= 2;
    }
    buf = realloc(s->buf, cap);
    if (!buf)
        goto fail;
    s->buf = buf;
    s->cap = cap;
    return true;
fail:
    s->error = err(-ENOMEM, "saving the state: out of memory");
    return false;
}

void stream_bytes(struct stream *s, void *p, size_t n)
{
    if (s->error || !n)
        return;
    if (s->load) {
        if (n > s->len - s->pos) {
            s->error = err(-EINVAL, "saved state: it ends too early");
            return;
        }
        memcpy(p, s->buf + s->pos, n);
        s->pos += n;
    } else if (reserve(s, n)) {
        memcpy(s->buf + s->len, p, n);
        s->len += n;
    }
}

/* The host is x86-64: memory order is the stream's order. */
void stream_u8(struct stream *s, u8 *v)
{
    stream_bytes(s, v, sizeof(*v));
}

void stream_u16(struct stream *s, u16 *v)
{
    stream_bytes(s, v, sizeof(*v));
}

void stream_u32(struct stream *s, u32 *v)
{
    stream_bytes(s, v, sizeof(*v));
}

void stream_u64(struct stream *s, u64 *v)
{
    stream_bytes(s, v, sizeof(*v));
}

void stream_bool(struct stream *s, bool *v)
{
    u8 byte = *v;

    stream_u8(s, &byte);
    if (s->error)
        return;
    if (byte > 1)
        stream_bad(s, "a truth value is neither 0 nor 1");
    else
        *v = byte;
}

/* A section's head: length of the name, name, version. */
u32 stream_section(struct stream *s, const char *name, u32 version)
{
    u8 want = (u8)strlen(name), len = want;
    char found[NAME_MAX_LEN + 1] = "";
    u32 v = version;

    bug_on(strlen(name) > NAME_MAX_LEN);
    if (s->load) {
        stream_u8(s, &len);
        if (!s->error && len > NAME_MAX_LEN)
            stream_bad(s, "a section's name is too long");
        stream_bytes(s, found, len);
        if (!s->error && (len != want || memcmp(found, name, want)))
            s->error = err(-EINVAL, "saved state: section \"%s\" expected; it was saved by another machine or is damaged", name);
    } else {
        stream_u8(s, &len);
        stream_bytes(s, (void *)name, want);
    }
    stream_u32(s, &v);
    if (!s->error && (v == 0 || v > version))
        s->error = err(-EINVAL, "saved state: section \"%s\" has version %u, this program reads up to %u; use a newer one", name, v, version);
    return s->error ? 0 : v;
}

void stream_bad(struct stream *s, const char *what)
{
    if (!s->error)
        s->error = err(-EINVAL, "saved state: %s", what);
}

/* FNV-1a, 64 bits: to compare states, not to protect them. */
u64 stream_digest(const struct stream *s)
{
    u64 h = 0xcbf29ce484222325;

    for (size_t i = 0; i < s->len; i++)
        h = (h ^ s->buf[i]) * 0x100000001b3;
    return h;
}
