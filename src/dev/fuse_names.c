/* Names of files that a FUSE guest holds (fuse_names.h). */
#include "dev/fuse_names.h"

#include <linux/fuse.h>
#include <string.h>

#define FORGETS_MAX 4096u                                          /* that are looked at in one request; Linux sends them singly to virtio-fs */
#define LIST_MAX ((size_t)1 << 20)                                 /* the same, bytes of a list; Linux takes a page at a time, or 128 KiB */

/* From these bytes on, into buf, or from buf. */
static bool move(const struct iovec *piece, unsigned pieces, size_t at, void *buf, size_t len, bool poke)
{
    size_t done = 0;

    for (unsigned i = 0; i < pieces && done < len; i++) {
        u8 *p = piece[i].iov_base;
        size_t have = piece[i].iov_len, part;

        if (at >= have) {
            at -= have;
            continue;
        }
        part = MIN(len - done, have - at);
        if (poke)
            memcpy(p + at, (u8 *)buf + done, part);
        else
            memcpy((u8 *)buf + done, p + at, part);
        at = 0;
        done += part;
    }
    return done == len;
}

bool fuse_peek(const struct iovec *piece, unsigned pieces, size_t at, void *buf, size_t len)
{
    return move(piece, pieces, at, buf, len, false);
}

static void forget(struct fuse_names *n, u64 lookups)
{
    n->known -= MIN(n->known, lookups);
}

void fuse_names_request(struct fuse_names *n, const struct iovec *out, unsigned outs)
{
    struct fuse_in_header head;
    struct fuse_forget_in one;
    struct fuse_batch_forget_in batch;
    struct fuse_forget_one each;
    size_t at = sizeof(head);

    if (!fuse_peek(out, outs, 0, &head, sizeof(head)))
        return;
    if (head.opcode == FUSE_FORGET && fuse_peek(out, outs, at, &one, sizeof(one)))
        forget(n, one.nlookup);
    if (head.opcode != FUSE_BATCH_FORGET || !fuse_peek(out, outs, at, &batch, sizeof(batch)))
        return;
    at += sizeof(batch);
    for (u32 i = 0; i < MIN(batch.count, FORGETS_MAX) && fuse_peek(out, outs, at, &each, sizeof(each)); i++, at += sizeof(each))
        forget(n, each.nlookup);
}

static void entry(struct fuse_names *n, const struct iovec *in, unsigned ins, size_t at)
{
    struct fuse_entry_out e;

    if (!fuse_peek(in, ins, at, &e, sizeof(e)) || !e.nodeid)       /* 0: there is none, or "." or ".." */
        return;
    n->known++;
    if (!n->bound || n->known <= n->bound)
        return;
    e.entry_valid = 0;
    e.entry_valid_nsec = 0;
    move(in, ins, at, &e, offsetof(struct fuse_entry_out, attr), true);
}

static void list(struct fuse_names *n, const struct iovec *in, unsigned ins, size_t len)
{
    struct fuse_direntplus d;

    for (size_t at = sizeof(struct fuse_out_header); at < len && fuse_peek(in, ins, at, &d, FUSE_NAME_OFFSET_DIRENTPLUS);) {
        entry(n, in, ins, at);
        at += FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + (size_t)d.dirent.namelen);
    }
}

void fuse_names_answer(struct fuse_names *n, const struct iovec *out, unsigned outs, const struct iovec *in, unsigned ins)
{
    struct fuse_in_header asked;
    struct fuse_out_header head;

    if (!fuse_peek(out, outs, 0, &asked, sizeof(asked)) || !fuse_peek(in, ins, 0, &head, sizeof(head)) || head.error)
        return;
    switch (asked.opcode) {
    case FUSE_LOOKUP:
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_LINK:
    case FUSE_CREATE:
        if (head.len >= sizeof(head) + sizeof(struct fuse_entry_out))
            entry(n, in, ins, sizeof(head));
        break;
    case FUSE_READDIRPLUS:
        list(n, in, ins, MIN((size_t)head.len, LIST_MAX));
        break;
    }
}
