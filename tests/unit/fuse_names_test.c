/* dev/fuse_names: look-ups are counted and forgotten; beyond the bound names are valid for no time; requests and answers in pieces, cut off, and of a guest that lies. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <linux/fuse.h>
#include <cmocka.h>

#include "dev/fuse_names.h"

#define UNUSED __attribute__((unused))
#define ENTRY_AT sizeof(struct fuse_out_header)

/* A request or an answer, in pieces of so many bytes. */
struct message {
    u8 byte[8192];
    size_t len;
    struct iovec piece[8192];
    unsigned pieces;
};
static struct message out, in;

static void add(struct message *m, const void *p, size_t len)
{
    assert_true(m->len + len <= sizeof(m->byte));
    if (len)
        memcpy(m->byte + m->len, p, len);
    m->len += len;
}

static void cut(struct message *m, size_t bytes)
{
    m->pieces = 0;
    for (size_t at = 0; at < m->len; at += bytes)
        m->piece[m->pieces++] = (struct iovec){ m->byte + at, MIN(bytes, m->len - at) };
}

static void ask(u32 opcode, const void *body, size_t len)
{
    struct fuse_in_header head = { .len = (u32)(sizeof(head) + len), .opcode = opcode };

    out.len = 0;
    add(&out, &head, sizeof(head));
    add(&out, body, len);
    cut(&out, 7);
}

static const struct fuse_entry_out valid_entry = { .nodeid = 5, .entry_valid = 1, .attr_valid = 1, .entry_valid_nsec = 9, .attr = { .ino = 77 } };

static void answer(int error, const void *body, size_t len)
{
    struct fuse_out_header head = { .len = (u32)(sizeof(head) + len), .error = error };

    in.len = 0;
    add(&in, &head, sizeof(head));
    add(&in, body, len);
    cut(&in, 13);
}

static void exchange(struct fuse_names *n, u32 opcode, int error, const struct fuse_entry_out *e)
{
    ask(opcode, "name", 5);
    answer(error, e, e ? sizeof(*e) : 0);
    fuse_names_request(n, out.piece, out.pieces);
    fuse_names_answer(n, out.piece, out.pieces, in.piece, in.pieces);
}

static struct fuse_entry_out seen(size_t at)
{
    struct fuse_entry_out e;

    memcpy(&e, in.byte + at, sizeof(e));
    return e;
}

static void forget(struct fuse_names *n, u64 lookups)
{
    struct fuse_forget_in f = { lookups };

    ask(FUSE_FORGET, &f, sizeof(f));
    fuse_names_request(n, out.piece, out.pieces);
}

static void counted(void **state UNUSED)
{
    static const u32 naming[] = { FUSE_LOOKUP, FUSE_SYMLINK, FUSE_MKNOD, FUSE_MKDIR, FUSE_LINK, FUSE_CREATE };
    struct fuse_names n = { 0 };
    struct fuse_entry_out none = { .entry_valid = 1 };

    for (unsigned i = 0; i < ARRAY_SIZE(naming); i++)
        exchange(&n, naming[i], 0, &valid_entry);
    assert_int_equal(n.known, ARRAY_SIZE(naming));
    exchange(&n, FUSE_GETATTR, 0, &valid_entry);
    exchange(&n, FUSE_LOOKUP, -2, &valid_entry);
    exchange(&n, FUSE_LOOKUP, 0, NULL);
    exchange(&n, FUSE_LOOKUP, 0, &none);
    assert_int_equal(n.known, ARRAY_SIZE(naming));
    forget(&n, 2);
    assert_int_equal(n.known, ARRAY_SIZE(naming) - 2);
    forget(&n, ~0ull);                                             /* a guest that lies */
    assert_int_equal(n.known, 0);
}

static void forgotten_together(void **state UNUSED)
{
    struct fuse_names n = { .known = 100 };
    struct {
        struct fuse_batch_forget_in head;
        struct fuse_forget_one one[3];
    } batch = { .head = { .count = 3 }, .one = { { 1, 10 }, { 2, 20 }, { 3, 30 } } };

    ask(FUSE_BATCH_FORGET, &batch, sizeof(batch));
    fuse_names_request(&n, out.piece, out.pieces);
    assert_int_equal(n.known, 40);
    batch.head.count = 0xffffffff;                                 /* more than there are */
    batch.one[2].nlookup = 1;
    ask(FUSE_BATCH_FORGET, &batch, sizeof(batch));
    fuse_names_request(&n, out.piece, out.pieces);
    assert_int_equal(n.known, 9);
}

static void bounded(void **state UNUSED)
{
    struct fuse_names n = { .bound = 2 };

    for (int i = 0; i < 2; i++) {
        exchange(&n, FUSE_LOOKUP, 0, &valid_entry);
        assert_int_equal(seen(ENTRY_AT).entry_valid, 1);
    }
    exchange(&n, FUSE_LOOKUP, 0, &valid_entry);
    assert_int_equal(seen(ENTRY_AT).entry_valid, 0);
    assert_int_equal(seen(ENTRY_AT).entry_valid_nsec, 0);
    assert_int_equal(seen(ENTRY_AT).nodeid, 5);                    /* all else stays */
    assert_int_equal(seen(ENTRY_AT).attr_valid, 1);
    assert_int_equal(seen(ENTRY_AT).attr.ino, 77);
    forget(&n, 3);
    exchange(&n, FUSE_LOOKUP, 0, &valid_entry);
    assert_int_equal(seen(ENTRY_AT).entry_valid, 1);
}

static void lists(void **state UNUSED)
{
    static const char *const name[] = { ".", "..", "a", "a longer name than eight bytes", "c" };
    struct fuse_names n = { .bound = 1 };
    u8 body[2048] = { 0 };
    size_t len = 0, at[ARRAY_SIZE(name)];

    for (unsigned i = 0; i < ARRAY_SIZE(name); i++) {
        struct fuse_direntplus d = { .entry_out = valid_entry, .dirent = { .namelen = (u32)strlen(name[i]) } };

        if (i < 2)
            d.entry_out.nodeid = 0;
        at[i] = ENTRY_AT + len;
        memcpy(body + len, &d, FUSE_NAME_OFFSET_DIRENTPLUS);
        memcpy(body + len + FUSE_NAME_OFFSET_DIRENTPLUS, name[i], strlen(name[i]));
        len += FUSE_DIRENTPLUS_SIZE(&d);
    }
    ask(FUSE_READDIRPLUS, NULL, 0);
    answer(0, body, len);
    fuse_names_answer(&n, out.piece, out.pieces, in.piece, in.pieces);
    assert_int_equal(n.known, 3);
    for (unsigned i = 0; i < ARRAY_SIZE(name); i++)
        assert_int_equal(seen(at[i]).entry_valid, i < 3);
    /* Cut off at each length, and a name that says to be endless: nothing beyond is looked at. */
    for (size_t cut_at = 0; cut_at < len; cut_at++) {
        answer(0, body, cut_at);
        fuse_names_answer(&n, out.piece, out.pieces, in.piece, in.pieces);
    }
    memset(body + offsetof(struct fuse_direntplus, dirent.namelen), 0xff, 4);
    answer(0, body, len);
    n.known = 0;
    fuse_names_answer(&n, out.piece, out.pieces, in.piece, in.pieces);
    assert_int_equal(n.known, 0);                                  /* the first was "." */
}

static void cut_off(void **state UNUSED)
{
    struct fuse_names n = { 0 };

    for (size_t len = 0; len < ENTRY_AT + sizeof(valid_entry); len++) {
        ask(FUSE_LOOKUP, "x", 2);
        answer(0, &valid_entry, sizeof(valid_entry));
        in.len = len;                                              /* it says more */
        cut(&in, 1000);
        fuse_names_answer(&n, out.piece, out.pieces, in.piece, in.pieces);
        out.len = MIN(len, sizeof(struct fuse_in_header) - 1);
        cut(&out, 1);
        fuse_names_request(&n, out.piece, out.pieces);
        fuse_names_answer(&n, out.piece, out.pieces, in.piece, in.pieces);
    }
    assert_int_equal(n.known, 0);
    fuse_names_request(&n, NULL, 0);
    fuse_names_answer(&n, NULL, 0, NULL, 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(counted), cmocka_unit_test(forgotten_together), cmocka_unit_test(bounded), cmocka_unit_test(lists), cmocka_unit_test(cut_off),
    };

    return cmocka_run_group_tests_name("fuse_names", tests, NULL, NULL);
}
