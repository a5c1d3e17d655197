/*
 * A 9P client for tests: messages by a pattern. b, h, w, d: integers of 1, 2, 4, 8 bytes; s: a string; q: a qid (in answers: its path, u64 *).
 * Messages and answers lie in several pieces of memory, as a guest's do.
 */
#pragma once

#include <stdarg.h>
#include <string.h>

#include "back/9p.h"

enum {
    RLERROR = 7, TSTATFS = 8, TLOPEN = 12, TLCREATE = 14, TSYMLINK = 16, TMKNOD = 18, TRENAME = 20, TREADLINK = 22, TGETATTR = 24, TSETATTR = 26,
    TXATTRWALK = 30, TXATTRCREATE = 32, TREADDIR = 40, TFSYNC = 50, TLOCK = 52, TGETLOCK = 54, TLINK = 70, TMKDIR = 72, TRENAMEAT = 74,
    TUNLINKAT = 76, TVERSION = 100, TAUTH = 102, TATTACH = 104, TFLUSH = 108, TWALK = 110, TREAD = 116, TWRITE = 118, TCLUNK = 120, TREMOVE = 122,
};
#define P9_BUF (256 * KiB)
#define P9_ROOT 1u

struct p9_client {
    struct p9 *s;
    u8 out[P9_BUF], in[P9_BUF];
    u32 len, at, reply;
    u32 room;                                                      /* for the answer */
    u32 next_fid;
};

static inline void p9_raw(struct p9_client *c, const void *p, u32 len)
{
    bug_on(len > P9_BUF - c->len);
    memcpy(c->out + c->len, p, len);
    c->len += len;
}

static inline void p9_vpack(struct p9_client *c, const char *pattern, va_list ap)
{
    for (; *pattern; pattern++) {
        u64 v = *pattern == 'd' ? va_arg(ap, u64) : *pattern == 's' ? 0 : va_arg(ap, unsigned);

        if (*pattern == 's') {
            const char *s = va_arg(ap, const char *);
            u16 n = (u16)strlen(s);

            p9_raw(c, &n, 2);
            p9_raw(c, s, n);
        } else {
            p9_raw(c, &v, *pattern == 'b' ? 1 : *pattern == 'h' ? 2 : *pattern == 'w' ? 4 : 8);
        }
    }
}

/* Sends what lies in out[] as it is. */
static inline void p9_send(struct p9_client *c)
{
    struct iovec out[3] = { { c->out, MIN(c->len, 5u) }, { c->out + 5, c->len > 5 ? MIN(c->len - 5, 30u) : 0 }, { c->out + 35, c->len > 35 ? c->len - 35 : 0 } };
    struct iovec in[3] = { { c->in, MIN(c->room, 3u) }, { c->in + 3, c->room > 3 ? MIN(c->room - 3, 50u) : 0 }, { c->in + 53, c->room > 53 ? c->room - 53 : 0 } };
    struct p9_request r = { .out = out, .outs = 3, .in = in, .ins = 3 };

    p9_serve(c->s, &r);
    c->reply = r.reply;
    c->at = 7;
}

static inline void p9_head(struct p9_client *c, unsigned type, const char *pattern, va_list ap)
{
    static const u8 zero[7];

    c->len = 0;
    p9_raw(c, zero, 7);
    p9_vpack(c, pattern, ap);
    c->out[4] = (u8)type;
    c->out[5] = 42;
}

/* 0 or a negative errno, as the server says. */
static inline int p9_end(struct p9_client *c, unsigned type)
{
    u32 size, e;

    memcpy(c->out, &c->len, 4);
    p9_send(c);
    bug_on(c->reply < 7);
    memcpy(&size, c->in, 4);
    bug_on(size != c->reply || c->in[5] != 42);
    if (c->in[4] != RLERROR) {
        bug_on(c->in[4] != type + 1);
        return 0;
    }
    memcpy(&e, c->in + 7, 4);
    bug_on(size != 11 || !e || e > 4095);
    return -(int)e;
}

static inline int p9_call(struct p9_client *c, unsigned type, const char *pattern, ...)
{
    va_list ap;

    va_start(ap, pattern);
    p9_head(c, type, pattern, ap);
    va_end(ap);
    return p9_end(c, type);
}

static inline u64 p9_int(struct p9_client *c, unsigned size)
{
    u64 v = 0;

    bug_on(size > c->reply - c->at);
    memcpy(&v, c->in + c->at, size);
    c->at += size;
    return v;
}

static inline void p9_text(struct p9_client *c, char *buf, size_t size)
{
    u16 n = (u16)p9_int(c, 2);

    bug_on(n > c->reply - c->at || n >= size);
    memcpy(buf, c->in + c->at, n);
    buf[n] = 0;
    c->at += n;
}

static inline int p9_start(struct p9_client *c, struct p9 *s)
{
    int r;

    c->s = s;
    c->room = P9_BUF;
    c->next_fid = 100;
    r = p9_call(c, TVERSION, "ws", P9_BUF, "9P2000.L");
    return r < 0 ? r : p9_call(c, TATTACH, "wwssw", P9_ROOT, ~0u, "u", "", 0);
}

/* Walks one name; the new fid or a negative errno. "" clones. */
static inline int p9_walk(struct p9_client *c, u32 from, const char *name)
{
    u32 id = c->next_fid++;
    int r = *name ? p9_call(c, TWALK, "wwhs", from, id, 1, name) : p9_call(c, TWALK, "wwh", from, id, 0);

    return r < 0 ? r : (int)id;
}

static inline int p9_clunk(struct p9_client *c, u32 id)
{
    return p9_call(c, TCLUNK, "w", id);
}

/* A fid that is open; or a negative errno. */
static inline int p9_open_file(struct p9_client *c, u32 dir, const char *name, unsigned flags)
{
    int id = p9_walk(c, dir, name), r = id < 0 ? id : p9_call(c, TLOPEN, "ww", id, flags);

    if (r < 0 && id >= 0)
        p9_clunk(c, (u32)id);
    return r < 0 ? r : id;
}

static inline int p9_create_file(struct p9_client *c, u32 dir, const char *name, unsigned flags, unsigned mode)
{
    int id = p9_walk(c, dir, ""), r = id < 0 ? id : p9_call(c, TLCREATE, "wswww", id, name, flags, mode, 0);

    if (r < 0 && id >= 0)
        p9_clunk(c, (u32)id);
    return r < 0 ? r : id;
}

static inline int p9_write_file(struct p9_client *c, u32 id, u64 offset, const void *p, u32 len)
{
    va_list none;

    memset(&none, 0, sizeof(none));
    p9_head(c, TWRITE, "", none);
    p9_raw(c, &id, 4);
    p9_raw(c, &offset, 8);
    p9_raw(c, &len, 4);
    p9_raw(c, p, len);
    int r = p9_end(c, TWRITE);
    return r < 0 ? r : (int)p9_int(c, 4);
}

static inline int p9_read_file(struct p9_client *c, u32 id, u64 offset, void *p, u32 len)
{
    int r = p9_call(c, TREAD, "wdw", id, offset, len);
    u32 n;

    if (r < 0)
        return r;
    n = (u32)p9_int(c, 4);
    bug_on(n > len || n > c->reply - c->at);
    memcpy(p, c->in + c->at, n);
    return (int)n;
}

struct p9_attr {
    u32 mode, uid, gid;
    u64 nlink, size, ino;
};

static inline int p9_getattr(struct p9_client *c, u32 id, struct p9_attr *a)
{
    int r = p9_call(c, TGETATTR, "wd", id, (u64)0x7ff);

    if (r < 0)
        return r;
    p9_int(c, 8);
    p9_int(c, 5);
    a->ino = p9_int(c, 8);
    a->mode = (u32)p9_int(c, 4);
    a->uid = (u32)p9_int(c, 4);
    a->gid = (u32)p9_int(c, 4);
    a->nlink = p9_int(c, 8);
    p9_int(c, 8);
    a->size = p9_int(c, 8);
    return 0;
}

static inline int p9_setattr(struct p9_client *c, u32 id, u32 valid, u32 mode, u32 uid, u32 gid, u64 size)
{
    return p9_call(c, TSETATTR, "wwwwwddddd", id, valid, mode, uid, gid, size, (u64)0, (u64)0, (u64)0, (u64)0);
}
