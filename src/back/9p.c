/*
 * The 9P2000.L server: messages, fids, threads (see 9p.h). The protocol is that of Linux's Documentation/filesystems/9p.rst and its client: 9P2000
 * (Plan 9's manual, section 5) with Linux's calls and error numbers in place of its own.
 *
 *   a message   size[4] type[1] tag[2] and what the type says; little-endian; strings are len[2] and bytes
 *   a fid       the client's number for a file: here a descriptor that only names it (O_PATH), and once it is opened a second one
 *
 * Left out: authentication (the device belongs to the guest), the calls of 9P2000 and 9P2000.u that Linux's have replaced.
 *
 * A message lies in memory that the guest can change: it is copied first, except the data of reads and writes, which nobody interprets.
 *
 * Descriptors are few: when fids have more than paths_max, those that were not used for long are *parked*: where the file is now is noted, and the
 * descriptor closed. Whoever uses the fid again looks there, and for nothing but the same file.
 *
 * Threads: requests are taken in the order of their submission by P9_WORKERS threads. A flush waits until the request that it names has been
 * answered; that was taken before, and waits for an even older one at most, so somebody always goes on. The threads have a umask of their own, 0:
 * modes are the guest's affair.
 */
#define _GNU_SOURCE
#include "back/9p_host.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/thread.h"

enum {
    RLERROR = 7, TSTATFS = 8, TLOPEN = 12, TLCREATE = 14, TSYMLINK = 16, TMKNOD = 18, TRENAME = 20, TREADLINK = 22, TGETATTR = 24, TSETATTR = 26,
    TXATTRWALK = 30, TXATTRCREATE = 32, TREADDIR = 40, TFSYNC = 50, TLOCK = 52, TGETLOCK = 54, TLINK = 70, TMKDIR = 72, TRENAMEAT = 74,
    TUNLINKAT = 76, TVERSION = 100, TAUTH = 102, TATTACH = 104, TFLUSH = 108, TWALK = 110, TREAD = 116, TWRITE = 118, TCLUNK = 120, TREMOVE = 122,
    TYPES = 128
};
#define VERSION "9P2000.L"
#define PARK_BUCKETS 1024                                          /* looked at in one turn */
#define PARK_AT_ONCE 4
#define WRITE_HEAD (P9_HEAD + 16)                                  /* of Twrite, before its data */

struct p9_worker {
    struct p9 *s;
    pthread_t thread;
    bool busy;                                                     /* under the server's lock, like the next two: with what */
    u16 tag;
    u64 seq;
    u8 message[P9_MESSAGE_MAX], reply[P9_REPLY_MAX], spare[P9_REPLY_MAX];
};

/* --- pieces of memory --- */

bool p9_take(struct iovec **iov, unsigned *n, void *buf, size_t len)
{
    u8 *to = buf;

    while (len && *n) {
        struct iovec *v = *iov;
        size_t part = MIN(len, v->iov_len);

        memcpy(to, v->iov_base, part);
        to += part;
        len -= part;
        v->iov_base = (u8 *)v->iov_base + part;
        v->iov_len -= part;
        if (!v->iov_len) {
            ++*iov;
            --*n;
        }
    }
    return !len;
}

size_t p9_give(struct iovec **iov, unsigned *n, const void *buf, size_t len)
{
    const u8 *from = buf;
    size_t given = 0;

    while (given < len && *n) {
        struct iovec *v = *iov;
        size_t part = MIN(len - given, v->iov_len);

        memcpy(v->iov_base, from + given, part);
        given += part;
        v->iov_base = (u8 *)v->iov_base + part;
        v->iov_len -= part;
        if (!v->iov_len) {
            ++*iov;
            --*n;
        }
    }
    return given;
}

unsigned p9_cut(const struct iovec *iov, unsigned n, u64 skip, struct iovec *to, unsigned max, u64 *len)
{
    u64 want = *len;
    unsigned used = 0;

    *len = 0;
    for (; n && used < max && *len < want; iov++, n--) {
        u64 part;

        if (skip >= iov->iov_len) {
            skip -= iov->iov_len;
            continue;
        }
        part = MIN(iov->iov_len - skip, want - *len);
        to[used++] = (struct iovec){ (u8 *)iov->iov_base + skip, part };
        *len += part;
        skip = 0;
    }
    return used;
}

static u64 total(const struct iovec *iov, unsigned n)
{
    u64 len = 0;

    for (; n; n--)
        len += (iov++)->iov_len;
    return len;
}

/* --- fields --- */

static const u8 *get(struct p9_call *c, u32 len)
{
    static const u8 zero[8];
    const u8 *p = c->at;

    if (c->bad || c->left < len) {
        c->bad = true;
        return zero;
    }
    c->at += len;
    c->left -= len;
    return p;
}

u8 p9_get8(struct p9_call *c)
{
    return *get(c, 1);
}

u16 p9_get16(struct p9_call *c)
{
    u16 v;

    memcpy(&v, get(c, sizeof(v)), sizeof(v));
    return v;
}

u32 p9_get32(struct p9_call *c)
{
    u32 v;

    memcpy(&v, get(c, sizeof(v)), sizeof(v));
    return v;
}

u64 p9_get64(struct p9_call *c)
{
    u64 v;

    memcpy(&v, get(c, sizeof(v)), sizeof(v));
    return v;
}

int p9_get_string(struct p9_call *c, char *buf, size_t size)
{
    u16 len = p9_get16(c);
    const u8 *p;

    *buf = 0;
    if (c->bad || len > c->left) {
        c->bad = true;
        return -EINVAL;
    }
    p = get(c, len);
    if (len >= size)
        return -ENAMETOOLONG;
    if (memchr(p, 0, len))
        return -EINVAL;
    memcpy(buf, p, len);
    buf[len] = 0;
    return 0;
}

int p9_get_name(struct p9_call *c, char *buf)
{
    int r = p9_get_string(c, buf, P9_NAME_MAX + 1);

    if (r < 0)
        return r;
    if (strchr(buf, '/') || !*buf || !strcmp(buf, ".") || !strcmp(buf, ".."))
        return *buf ? -EINVAL : -ENOENT;
    return 0;
}

static void put(struct p9_call *c, const void *p, u32 len)
{
    bug_on(len > P9_REPLY_MAX - c->len);
    memcpy(c->reply + c->len, p, len);
    c->len += len;
}

void p9_put8(struct p9_call *c, u8 v)
{
    put(c, &v, sizeof(v));
}

void p9_put16(struct p9_call *c, u16 v)
{
    put(c, &v, sizeof(v));
}

void p9_put32(struct p9_call *c, u32 v)
{
    put(c, &v, sizeof(v));
}

void p9_put64(struct p9_call *c, u64 v)
{
    put(c, &v, sizeof(v));
}

void p9_put_string(struct p9_call *c, const char *s, size_t len)
{
    p9_put16(c, (u16)len);
    put(c, s, (u16)len);
}

void p9_put_qid(struct p9_call *c, const struct p9_qid *q)
{
    p9_put8(c, q->type);
    p9_put32(c, q->version);
    p9_put64(c, q->path);
}

/* --- fids --- */

static struct p9_fid **fid_place(struct p9 *s, u32 id)
{
    struct p9_fid **p = &s->bucket[id % P9_BUCKETS];

    while (*p && (*p)->id != id)
        p = &(*p)->next;
    return p;
}

static void fid_free(struct p9_fid *f)
{
    if (f->path >= 0)
        close(f->path);
    if (f->io >= 0)
        close(f->io);
    free(f->parked);
    free(f->xattr);
    free(f->value);
    pthread_rwlock_destroy(&f->lock);
    free(f);
}

static void fid_drop(struct p9 *s, struct p9_fid *f)
{
    bool last;

    pthread_mutex_lock(&s->lock);
    last = !--f->refs;
    if (last) {
        p9_locks_drop(s, f);
        s->paths -= f->path >= 0;
    }
    pthread_mutex_unlock(&s->lock);
    if (last)
        fid_free(f);
}

static void count_path(struct p9 *s, int change)
{
    pthread_mutex_lock(&s->lock);
    s->paths += (unsigned)change;
    pthread_mutex_unlock(&s->lock);
}

/* The next fid that nobody uses, and nobody has used since the last time round; one reference is the caller's. Under the lock. */
static struct p9_fid *next_victim(struct p9 *s)
{
    for (unsigned tried = 0; tried < PARK_BUCKETS; tried++) {
        struct p9_fid *f = s->bucket[s->hand % P9_BUCKETS];

        for (; f; f = f->next) {
            if (f->kind == P9_FID_PATH && f->path >= 0 && f->refs == 1 && !f->recent) {
                f->refs++;
                f->recent = true;                                  /* if it cannot be parked, others come first */
                return f;
            }
            f->recent = false;
        }
        s->hand++;
    }
    return NULL;
}

/* Too many descriptors: the files of some fids are known by name for a while. */
static void park_some(struct p9 *s)
{
    for (unsigned i = 0; i < PARK_AT_ONCE; i++) {
        struct p9_fid *f = NULL;
        int r = -EBUSY;

        pthread_mutex_lock(&s->lock);
        if (s->paths > s->paths_max)
            f = next_victim(s);
        pthread_mutex_unlock(&s->lock);
        if (!f)
            return;
        if (pthread_rwlock_trywrlock(&f->lock) == 0) {
            if (f->kind == P9_FID_PATH && f->path >= 0)
                r = p9_park(s, f);
            pthread_rwlock_unlock(&f->lock);
        }
        if (r == 0)
            count_path(s, -1);
        fid_drop(s, f);
    }
}

/* Locks f, which has its descriptor then. */
static int fid_lock(struct p9 *s, struct p9_fid *f, bool change)
{
    for (;;) {
        int r;

        if (change)
            pthread_rwlock_wrlock(&f->lock);
        else
            pthread_rwlock_rdlock(&f->lock);
        if (f->path >= 0)
            return 0;
        if (!change) {
            pthread_rwlock_unlock(&f->lock);
            pthread_rwlock_wrlock(&f->lock);
        }
        r = f->path < 0 ? p9_unpark(s, f) : 1;
        if (r < 0) {
            pthread_rwlock_unlock(&f->lock);
            return r;
        }
        if (r == 0)
            count_path(s, 1);                                      /* else somebody else was faster */
        park_some(s);                                              /* not f, which we have a reference to */
        if (change)
            return 0;
        pthread_rwlock_unlock(&f->lock);
    }
}

int p9_fid_get(struct p9_call *c, u32 id, bool change, struct p9_fid **out)
{
    struct p9_fid *f;
    int r;

    *out = NULL;
    if (c->bad)
        return -EINVAL;
    pthread_mutex_lock(&c->s->lock);
    f = *fid_place(c->s, id);
    if (f) {
        f->refs++;
        f->recent = true;
    }
    pthread_mutex_unlock(&c->s->lock);
    if (!f)
        return -EBADF;
    r = fid_lock(c->s, f, change);
    if (r < 0) {
        fid_drop(c->s, f);
        return r;
    }
    *out = f;
    return 0;
}

void p9_fid_put(struct p9 *s, struct p9_fid *f)
{
    if (!f)
        return;
    pthread_rwlock_unlock(&f->lock);
    fid_drop(s, f);
}

int p9_fid_new(struct p9 *s, u32 id, int path, const struct p9_fid *like, struct p9_fid **out)
{
    struct p9_fid *f = calloc(1, sizeof(*f)), **place;
    int r = 0;

    if (!f) {
        close(path);
        return -ENOMEM;
    }
    f->id = id;
    f->refs = 1;
    f->path = path;
    f->io = -1;
    if (like) {
        f->type = like->type;
        f->dev = like->dev;
        f->sealed = like->sealed;
        f->uid = like->uid;
    }
    pthread_rwlock_init(&f->lock, NULL);
    if (out)
        pthread_rwlock_wrlock(&f->lock);                           /* before it can be found: s->lock is taken with a fid's held, never the other way round */
    pthread_mutex_lock(&s->lock);
    place = fid_place(s, id);
    if (*place || id == P9_NO_FID)
        r = -EBADF;
    else if (s->fids == P9_FIDS_MAX)
        r = -EMFILE;
    if (r == 0) {
        *place = f;
        s->fids++;
        s->paths++;
        if (out) {
            *out = f;
            f->refs++;
        }
    }
    pthread_mutex_unlock(&s->lock);
    if (r < 0 && out)
        pthread_rwlock_unlock(&f->lock);
    if (r < 0)
        fid_free(f);
    else
        park_some(s);
    return r;
}

/* Takes it out of the table; what uses it still may go on. */
static struct p9_fid *fid_take(struct p9 *s, u32 id)
{
    struct p9_fid **place, *f;

    pthread_mutex_lock(&s->lock);
    place = fid_place(s, id);
    f = *place;
    if (f) {
        *place = f->next;
        f->next = NULL;
        s->fids--;
    }
    pthread_mutex_unlock(&s->lock);
    return f;
}

int p9_fid_clunk(struct p9 *s, u32 id)
{
    struct p9_fid *f = fid_take(s, id);
    int r = 0;

    if (!f)
        return -EBADF;
    if (f->kind == P9_FID_XATTR_SET) {
        pthread_rwlock_rdlock(&f->lock);
        r = p9_xattr_commit(s, f);
        pthread_rwlock_unlock(&f->lock);
    }
    fid_drop(s, f);
    return r;
}

void p9_forget(struct p9 *s)
{
    for (unsigned i = 0; i < P9_BUCKETS; i++)
        for (;;) {
            struct p9_fid *f;

            pthread_mutex_lock(&s->lock);
            f = s->bucket[i];
            if (f) {
                s->bucket[i] = f->next;
                s->fids--;
            }
            pthread_mutex_unlock(&s->lock);
            if (!f)
                break;
            fid_drop(s, f);
        }
    pthread_mutex_lock(&s->lock);
    s->msize = 0;
    pthread_mutex_unlock(&s->lock);
}

unsigned p9_fids(struct p9 *s)
{
    unsigned n;

    pthread_mutex_lock(&s->lock);
    n = s->fids;
    pthread_mutex_unlock(&s->lock);
    return n;
}

/* --- the session --- */

static int op_version(struct p9_call *c)
{
    u32 msize = p9_get32(c);
    char version[32];
    bool known = p9_get_string(c, version, sizeof(version)) == 0 && !strcmp(version, VERSION);

    if (c->bad)
        return -EINVAL;
    if (msize < P9_MSIZE_MIN)
        return -EMSGSIZE;
    p9_forget(c->s);
    msize = MIN(msize, (u32)P9_MSIZE_MAX);
    pthread_mutex_lock(&c->s->lock);
    c->s->msize = known ? msize : 0;
    pthread_mutex_unlock(&c->s->lock);
    p9_put32(c, msize);
    if (known)
        p9_put_string(c, VERSION, strlen(VERSION));
    else
        p9_put_string(c, "unknown", strlen("unknown"));
    return 0;
}

static int op_auth(struct p9_call *c UNUSED)
{
    return -EOPNOTSUPP;
}

static bool older(const struct p9 *s, u16 tag, u64 seq)
{
    for (unsigned i = 0; i < P9_WORKERS; i++)
        if (s->worker[i].busy && s->worker[i].tag == tag && s->worker[i].seq < seq)
            return true;
    return false;
}

static int op_flush(struct p9_call *c)
{
    u16 tag = p9_get16(c);
    struct p9 *s = c->s;

    if (c->bad)
        return -EINVAL;
    pthread_mutex_lock(&s->lock);
    while (older(s, tag, c->seq))
        pthread_cond_wait(&s->ended, &s->lock);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

static int op_clunk(struct p9_call *c)
{
    u32 id = p9_get32(c);

    return c->bad ? -EINVAL : p9_fid_clunk(c->s, id);
}

/* --- messages --- */

static const struct op {
    int (*fn)(struct p9_call *c);
    bool writes;                                                   /* refused where the folder is read-only */
} ops[TYPES] = {
    [TSTATFS] = { p9_op_statfs, false }, [TLOPEN] = { p9_op_lopen, false }, [TLCREATE] = { p9_op_lcreate, true },
    [TSYMLINK] = { p9_op_symlink, true }, [TMKNOD] = { p9_op_mknod, true }, [TRENAME] = { p9_op_rename, true },
    [TREADLINK] = { p9_op_readlink, false }, [TGETATTR] = { p9_op_getattr, false }, [TSETATTR] = { p9_op_setattr, true },
    [TXATTRWALK] = { p9_op_xattrwalk, false }, [TXATTRCREATE] = { p9_op_xattrcreate, true },
    [TREADDIR] = { p9_op_readdir, false }, [TFSYNC] = { p9_op_fsync, false }, [TLOCK] = { p9_op_lock, false },
    [TGETLOCK] = { p9_op_getlock, false }, [TLINK] = { p9_op_link, true }, [TMKDIR] = { p9_op_mkdir, true },
    [TRENAMEAT] = { p9_op_renameat, true }, [TUNLINKAT] = { p9_op_unlinkat, true }, [TVERSION] = { op_version, false },
    [TAUTH] = { op_auth, false }, [TATTACH] = { p9_op_attach, false }, [TFLUSH] = { op_flush, false },
    [TWALK] = { p9_op_walk, false }, [TREAD] = { p9_op_read, false }, [TWRITE] = { p9_op_write, false },
    [TCLUNK] = { op_clunk, false }, [TREMOVE] = { p9_op_remove, true },
};

struct head {
    u32 size;
    u8 type;
    u16 tag;
} __attribute__((packed));

/* What has come, without the data of a write. A negative errno: it cannot be understood. */
static int receive(struct p9_call *c, u8 *message, const struct head *h, u64 there)
{
    u32 len = h->size - P9_HEAD;

    if (h->size < P9_HEAD || h->size > there)
        return -EINVAL;
    if (h->type == TWRITE)
        len = MIN(len, WRITE_HEAD - P9_HEAD);
    else if (len > P9_MESSAGE_MAX)
        return -EMSGSIZE;
    p9_take(&c->req->out, &c->req->outs, message, len);
    c->at = message;
    c->left = len;
    return 0;
}

static int carry_out(struct p9_call *c, const struct head *h)
{
    const struct op *op = h->type < TYPES ? &ops[h->type] : NULL;
    int r;

    if (!op || !op->fn)
        return -EOPNOTSUPP;
    if (!c->msize && h->type != TVERSION)
        return -EPROTO;                                            /* there is no session */
    if (h->size > (c->msize ? c->msize : P9_MSIZE_MIN))
        return -EMSGSIZE;
    if (op->writes && c->s->readonly)
        return -EROFS;
    r = op->fn(c);
    return r == 0 && (u64)c->len + c->data > c->room ? -EMSGSIZE : r;
}

static void serve(struct p9_worker *w, struct p9_request *r)
{
    u64 there = total(r->out, r->outs), room = total(r->in, r->ins);
    struct p9_call c = { .s = w->s, .req = r, .seq = w->seq, .reply = w->reply, .spare = w->spare, .len = P9_HEAD };
    struct head h;
    int e;

    r->reply = 0;
    if (!p9_take(&r->out, &r->outs, &h, sizeof(h)) || room < P9_HEAD + 4)
        return;
    pthread_mutex_lock(&w->s->lock);
    c.msize = w->s->msize;
    pthread_mutex_unlock(&w->s->lock);
    c.room = (u32)MIN(room, (u64)(c.msize ? c.msize : P9_MSIZE_MIN));
    e = receive(&c, w->message, &h, there);
    if (e == 0)
        e = carry_out(&c, &h);
    if (e < 0) {
        c.len = P9_HEAD;
        c.data = 0;
        p9_put32(&c, (u32)-e);
    }
    h.size = c.len + c.data;
    h.type = e < 0 ? RLERROR : (u8)(h.type + 1);
    memcpy(c.reply, &h, sizeof(h));
    p9_give(&r->in, &r->ins, c.reply, c.len);
    r->reply = h.size;
}

void p9_serve(struct p9 *s, struct p9_request *r)
{
    struct p9_worker *w = malloc(sizeof(*w));

    r->reply = 0;
    if (!w)
        return;
    w->s = s;
    w->seq = 0;                                                    /* nothing is older */
    serve(w, r);
    free(w);
}

/* --- threads --- */

static u16 peek_tag(const struct p9_request *r)
{
    struct iovec copy[P9_HEAD], *iov = copy;
    unsigned n = MIN(r->outs, (unsigned)P9_HEAD);
    struct head h = { .tag = 0 };

    memcpy(copy, r->out, n * sizeof(*copy));
    p9_take(&iov, &n, &h, sizeof(h));
    return h.tag;
}

static struct p9_request *next_request(struct p9_worker *w)
{
    struct p9 *s = w->s;
    struct p9_request *r;

    s->idle++;
    while (!s->first && !s->closing)
        pthread_cond_wait(&s->more, &s->lock);
    s->idle--;
    r = s->first;
    if (!r)
        return NULL;
    s->first = r->next;
    if (!s->first)
        s->last = &s->first;
    w->busy = true;
    w->tag = peek_tag(r);
    w->seq = s->seq++;
    return r;
}

static void *work(void *arg)
{
    struct p9_worker *w = arg;
    struct p9 *s = w->s;
    struct p9_request *r;

    if (unshare(CLONE_FS) == 0)
        umask(0);
    pthread_mutex_lock(&s->lock);
    while ((r = next_request(w))) {
        pthread_mutex_unlock(&s->lock);
        serve(w, r);
        r->done(r);
        pthread_mutex_lock(&s->lock);
        w->busy = false;
        pthread_cond_broadcast(&s->ended);
    }
    pthread_mutex_unlock(&s->lock);
    block_end_leave(&s->end);
    return NULL;
}

void p9_submit(struct p9 *s, struct p9_request *r)
{
    bool wake;

    r->next = NULL;
    pthread_mutex_lock(&s->lock);
    *s->last = r;
    s->last = &r->next;
    wake = s->idle;
    pthread_mutex_unlock(&s->lock);
    if (wake)
        pthread_cond_signal(&s->more);
}

static int start_workers(struct p9 *s)
{
    int e = 0;

    s->worker = calloc(P9_WORKERS, sizeof(*s->worker));
    if (!s->worker)
        return err(-ENOMEM, "--share %s: out of memory", s->folder);
    while (s->workers < P9_WORKERS && !e) {
        s->worker[s->workers].s = s;
        s->end.running++;
        e = thread_start(&s->worker[s->workers].thread, work, &s->worker[s->workers]);
        if (e)
            s->end.running--;
        else
            s->workers++;
    }
    return s->workers ? 0 : err(-e, "--share %s: cannot start a thread: %s; raise the limit on processes (ulimit -u)", s->folder, strerror(e));
}

/* --- opening --- */

/* Each file that the guest knows costs a descriptor: what the host permits is used. */
static void raise_limit(struct p9 *s)
{
    struct rlimit l;

    s->paths_max = P9_PATHS_MIN;
    if (getrlimit(RLIMIT_NOFILE, &l) < 0)
        return;
    if (l.rlim_cur < l.rlim_max) {
        l.rlim_cur = l.rlim_max;
        setrlimit(RLIMIT_NOFILE, &l);
    }
    s->paths_max = (unsigned)MAX((u64)P9_PATHS_MIN, MIN((u64)l.rlim_cur / 8, (u64)P9_FIDS_MAX)); /* others need some, too */
}

static int open_root(struct p9 *s)
{
    struct stat st;

    s->root = open(s->folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (s->root < 0 && errno == ENOENT)
        return err(-ENOENT, "--share %s: there is no such folder; create it (mkdir), or correct the name", s->folder);
    if (s->root < 0 || fstat(s->root, &st) < 0)
        return err(-errno, "--share %s: cannot use it: %s; name a folder of this host", s->folder, strerror(errno));
    if (faccessat(s->root, ".", R_OK | X_OK, AT_EACCESS) < 0)
        return err(-errno, "--share %s: cannot read it: %s; change its permissions", s->folder, strerror(errno));
    if (access("/proc/self/fd", X_OK) < 0)
        return err(-errno, "--share %s: this needs /proc: %s; mount it", s->folder, strerror(errno));
    s->dev = st.st_dev;
    s->ino = st.st_ino;
    return 0;
}

int p9_open(const struct p9_config *config, struct p9 **out)
{
    struct p9 *s = calloc(1, sizeof(*s));
    int r;

    if (!s || !(s->folder = strdup(config->path))) {
        free(s);
        return err(-ENOMEM, "--share %s: out of memory", config->path);
    }
    s->readonly = config->readonly;
    s->uid = geteuid();
    s->gid = getegid();
    s->privileged = !s->uid;
    s->owners = config->owners || s->privileged;
    s->root = -1;
    s->last = &s->first;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->more, NULL);
    pthread_cond_init(&s->ended, NULL);
    block_end_init(&s->end);
    raise_limit(s);
    r = open_root(s);
    if (r == 0)
        r = start_workers(s);
    if (r < 0) {
        p9_close(s);
        return r;
    }
    *out = s;
    return 0;
}

bool p9_close(struct p9 *s)
{
    if (!s)
        return true;
    pthread_mutex_lock(&s->lock);
    s->closing = true;
    pthread_cond_broadcast(&s->more);
    pthread_mutex_unlock(&s->lock);
    if (!block_end_wait(&s->end))
        return false;
    for (unsigned i = 0; i < s->workers; i++)
        pthread_join(s->worker[i].thread, NULL);
    p9_forget(s);
    if (s->root >= 0)
        close(s->root);
    block_end_destroy(&s->end);
    pthread_cond_destroy(&s->ended);
    pthread_cond_destroy(&s->more);
    pthread_mutex_destroy(&s->lock);
    free(s->worker);
    free(s->folder);
    free(s);
    return true;
}

const char *p9_path(const struct p9 *s)
{
    return s->folder;
}
