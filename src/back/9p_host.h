/* The parts of the 9P server, for those alone: 9p.c (messages, fids, threads), 9p_names.c (names and attributes), 9p_files.c (contents). */
#pragma once

#include <pthread.h>
#include <sys/stat.h>

#include "back/9p.h"
#include "back/block_host.h"

#define P9_NAME_MAX 255
#define P9_MSIZE_MAX (1 * MiB)
#define P9_MSIZE_MIN 4096
#define P9_MESSAGE_MAX 16384                                       /* of all but the data of a write */
#define P9_REPLY_MAX (64 * KiB)                                    /* of all but the data of a read */
#define P9_FIDS_MAX 262144
#define P9_BUCKETS 16384
#define P9_PATHS_MIN 64                                            /* descriptors that fids may have, whatever the limit says */
#define P9_WORKERS 4
#define P9_XATTR_MAX (64 * KiB)                                    /* as Linux's XATTR_SIZE_MAX */
#define P9_HEAD 7
#define P9_NO_FID 0xffffffffu

struct p9_qid {
    u8 type;
    u32 version;
    u64 path;
};
enum { P9_QID_DIR = 0x80, P9_QID_SYMLINK = 0x02, P9_QID_FILE = 0x00 };

enum p9_fid_kind { P9_FID_PATH, P9_FID_OPEN, P9_FID_XATTR_GET, P9_FID_XATTR_SET };

/*
 * A name of the guest's for a file. Its lock is taken by who uses it: for writing by what changes the fid, for reading by all else. Nobody who holds
 * one for writing waits for another.
 */
struct p9_fid {
    u32 id, refs;                                                  /* under the server's lock */
    struct p9_fid *next;
    pthread_rwlock_t lock;
    enum p9_fid_kind kind;
    int path;                                                      /* O_PATH; -1: parked */
    char *parked;                                                  /* where the file was, from the root on; ino: which it was */
    ino_t ino;
    bool recent;                                                   /* used since park() last looked; under the server's lock */
    int io;                                                        /* P9_FID_OPEN: opened */
    mode_t type;                                                   /* S_IFMT */
    dev_t dev;
    bool sealed;                                                   /* the host kernel's own: looks empty */
    u32 uid;                                                       /* who attached */
    struct p9_locks *locks;
    char *xattr;                                                   /* name, for P9_FID_XATTR_SET */
    u8 *value;
    u32 value_len, value_have;
    u32 xattr_flags;
};

struct p9 {
    char *folder;
    bool readonly, owners, privileged;
    u32 uid, gid;                                                  /* doppel's, on the host */
    int root;                                                      /* O_PATH */
    dev_t dev;
    ino_t ino;
    pthread_mutex_t lock;                                          /* of all that follows; a leaf */
    u32 msize;                                                     /* 0: no session yet */
    struct p9_fid *bucket[P9_BUCKETS];
    unsigned fids;
    unsigned paths, paths_max;                                     /* descriptors that fids have, and are to have */
    unsigned hand;                                                 /* the bucket where park() goes on */
    struct p9_owner *owner;                                        /* of locks (9p_files.c) */
    struct p9_request *first, **last;                              /* waiting */
    u64 seq;                                                       /* requests taken */
    unsigned idle;
    bool closing;
    pthread_cond_t more, ended;                                    /* requests; a request has been answered */
    struct p9_worker *worker;
    unsigned workers;
    struct block_end end;
};

/* A message in work. */
struct p9_call {
    struct p9 *s;
    struct p9_request *req;
    u64 seq;
    u32 msize;
    const u8 *at;                                                  /* what is left of the message */
    u32 left;
    bool bad;                                                      /* it was too short */
    u8 *reply;                                                     /* P9_REPLY_MAX bytes */
    u32 len;
    u32 room;                                                      /* for the whole reply */
    u32 data;                                                      /* bytes that were put behind reply[] by the operation itself */
    u8 *spare;                                                     /* P9_REPLY_MAX bytes more, for the operation */
};

/* --- messages (9p.c) --- */

u8 p9_get8(struct p9_call *c);
u16 p9_get16(struct p9_call *c);
u32 p9_get32(struct p9_call *c);
u64 p9_get64(struct p9_call *c);
/* A string of up to size - 1 bytes without NUL; -EINVAL, -ENAMETOOLONG. */
int p9_get_string(struct p9_call *c, char *buf, size_t size);
/* One component of a path, none of "", ".", ".."; -EINVAL, -ENAMETOOLONG, -ENOENT. buf has P9_NAME_MAX + 1 bytes. */
int p9_get_name(struct p9_call *c, char *buf);
void p9_put8(struct p9_call *c, u8 v);
void p9_put16(struct p9_call *c, u16 v);
void p9_put32(struct p9_call *c, u32 v);
void p9_put64(struct p9_call *c, u64 v);
void p9_put_string(struct p9_call *c, const char *s, size_t len);
void p9_put_qid(struct p9_call *c, const struct p9_qid *q);
/* The first len bytes of pieces, which are consumed; false: there are too few. And the same the other way. */
bool p9_take(struct iovec **iov, unsigned *n, void *buf, size_t len);
size_t p9_give(struct iovec **iov, unsigned *n, const void *buf, size_t len);
/* Pieces [skip, skip + len) of iov: at most max of them into to; their number, and *len what they hold. */
unsigned p9_cut(const struct iovec *iov, unsigned n, u64 skip, struct iovec *to, unsigned max, u64 *len);

/* --- fids (9p.c) --- */

/* Locked, for writing if it is to be changed; -EBADF. */
int p9_fid_get(struct p9_call *c, u32 id, bool change, struct p9_fid **out);
void p9_fid_put(struct p9 *s, struct p9_fid *f);
/* One more, which owns path from here on, also after an error; -EBADF (id in use), -EMFILE, -ENOMEM. */
int p9_fid_new(struct p9 *s, u32 id, int path, const struct p9_fid *like, struct p9_fid **out);
int p9_fid_clunk(struct p9 *s, u32 id);
/* Closes f->path, and finds the same file again; f is locked for writing. -ENOENT: it has no name; -ESTALE: not there any more. */
int p9_park(struct p9 *s, struct p9_fid *f);
int p9_unpark(struct p9 *s, struct p9_fid *f);
void p9_fid_qid(const struct p9 *s, const struct stat *st, struct p9_qid *q);

/* "/proc/self/fd/N", through which an O_PATH descriptor can be used as a name. */
struct p9_proc { char name[32]; };
const char *p9_proc(struct p9_proc *p, int fd);

u32 p9_to_guest_uid(const struct p9 *s, u32 uid);
u32 p9_to_guest_gid(const struct p9 *s, u32 gid);
u32 p9_to_host_uid(const struct p9 *s, u32 uid);
u32 p9_to_host_gid(const struct p9 *s, u32 gid);
/* A file that the guest has made in the folder dir: whose it is. Returns it (O_PATH) with its status. A negative errno. */
int p9_made(struct p9_call *c, const struct p9_fid *dir, const char *name, u32 gid, struct stat *st);

/* --- operations: 0 or a negative errno; the reply is in the call --- */

int p9_op_attach(struct p9_call *c);
int p9_op_walk(struct p9_call *c);
int p9_op_statfs(struct p9_call *c);
int p9_op_getattr(struct p9_call *c);
int p9_op_setattr(struct p9_call *c);
int p9_op_symlink(struct p9_call *c);
int p9_op_mknod(struct p9_call *c);
int p9_op_mkdir(struct p9_call *c);
int p9_op_link(struct p9_call *c);
int p9_op_readlink(struct p9_call *c);
int p9_op_rename(struct p9_call *c);
int p9_op_renameat(struct p9_call *c);
int p9_op_unlinkat(struct p9_call *c);
int p9_op_remove(struct p9_call *c);

int p9_op_lopen(struct p9_call *c);
int p9_op_lcreate(struct p9_call *c);
int p9_op_read(struct p9_call *c);
int p9_op_write(struct p9_call *c);
int p9_op_readdir(struct p9_call *c);
int p9_op_fsync(struct p9_call *c);
int p9_op_lock(struct p9_call *c);
int p9_op_getlock(struct p9_call *c);
int p9_op_xattrwalk(struct p9_call *c);
int p9_op_xattrcreate(struct p9_call *c);
int p9_xattr_commit(struct p9 *s, struct p9_fid *f);               /* at the end of a fid of kind P9_FID_XATTR_SET */
void p9_locks_drop(struct p9 *s, struct p9_fid *f);                /* under the server's lock */
