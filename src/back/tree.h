/*
 * A tree of files as a stream of bytes, between two processes that do not trust each other: what doppel cp sends into a guest and gets out of it.
 * The agent in the guest is made of this file, too (so it includes nothing but libc).
 *
 *   record  struct tree_record, the name (one component of a path), and then
 *           TREE_FILE   pieces: u32 length and so many bytes; length 0 ends the file, TREE_LOST: the rest could not be read
 *           TREE_LINK   one piece: where it leads
 *           TREE_DIR    records, up to TREE_UP
 *   TREE_END, behind the one record of the outermost level
 *
 * The receiver answers with one struct tree_result, as soon as it has failed or when it has all; the sender stops when an answer comes early.
 *
 * Nothing outside the place given is touched: names are checked, and no link is followed. A file is written under a name that begins
 * with ".doppel-cp-", and gets its own when it is whole. Kept: modes, links, names. Not: owners, times. Blocks of zeroes become
 * holes. Devices, FIFOs and sockets are left out, which the result tells.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TREE_NAME_MAX 255
#define TREE_LINK_MAX 4095
#define TREE_PIECE_MAX 65536
#define TREE_DEPTH_MAX 200
#define TREE_LOST 0xffffffffu
#define TREE_TEXT_MAX 400

enum tree_kind { TREE_FILE = 1, TREE_LINK = 2, TREE_DIR = 3, TREE_UP = 4, TREE_END = 5 };

struct tree_record {
    uint32_t kind, mode, name_len;
};

struct tree_result {
    uint32_t failed;                                               /* 0: all is there, whole */
    char text[TREE_TEXT_MAX];                                      /* what went wrong first */
};

/* All of it, over a socket that blocks. False: the connection broke. */
bool tree_put(int fd, const void *buf, size_t len);
bool tree_get(int fd, void *buf, size_t len);

/*
 * Sends what lies at path; fd is a socket that blocks. Without recursive a folder is refused, and a link is followed. *own: what could not be read
 * here. 0: all was sent and *result came; -1: the connection broke.
 */
int tree_send(int fd, const char *path, bool recursive, struct tree_result *own, struct tree_result *result);
/*
 * Writes what comes to path: if that is a folder, into it, under name (NULL: the sender says it); else under the path's own name. Modes are masked.
 * Sends the result, also to *result. -1: the connection broke; nothing is left of a file that was not whole.
 */
int tree_receive(int fd, const char *path, const char *name, uint32_t mode_mask, struct tree_result *result);
/* The last component of path; false if that names nothing ("..", "/"). */
bool tree_last_name(const char *path, char name[TREE_NAME_MAX + 1]);
