/*
 * The front end of vhost-user: a device whose requests another process carries out, in the guest's memory.
 *
 * That process never sees the guest's rings. It gets rings of our own, whose descriptors are those that doppel's ring reader has checked; so doppel
 * stays in the path: what a request writes is known before and after (engines that hold translations of that memory rely on it), every kind of ring
 * and driver is served, and when the process dies each request is still ours to answer.
 *
 * The process is trusted with the guest's memory and nothing else: what it says is checked.
 *
 * Threads: new and free on the loop's thread (or before it runs); vhost_user_add(), _kick() and _take() under the caller's lock; callbacks on the
 * loop's thread, without one.
 */
#pragma once

#include "base/err.h"
#include "base/loop.h"

#define VHOST_USER_RING 1024                                       /* descriptors, of each queue */
#define VHOST_USER_QUEUES_MAX 4
#define VHOST_USER_REGIONS_MAX 7

struct vhost_user;

struct vhost_region {
    u64 gpa, size;
    int fd;
    u64 offset;
    void *hva;
};
struct vhost_part {
    u64 gpa;
    u32 len;
    bool writable;
};
struct vhost_user_ops {
    void (*used)(void *arg, unsigned queue);                       /* vhost_user_take() has something */
    void (*gone)(void *arg);                                       /* the process has gone, or talks nonsense: nothing will come any more. Once. */
};

/* Takes the connected socket, also when it fails. -EPROTO or another negative errno, with err(). */
int vhost_user_new(int sock, struct loop *loop, const struct vhost_region *region, unsigned regions, unsigned queues, const struct vhost_user_ops *ops,
                   void *arg, struct vhost_user **out);
void vhost_user_free(struct vhost_user *v);                        /* NULL is fine */

/* Parts that are to be read stand before those that are to be written. False: no room now, or it is gone. token is not NULL. */
bool vhost_user_add(struct vhost_user *v, unsigned queue, const struct vhost_part *part, unsigned parts, void *token);
/* Memory of our own that a part may lie in, in place of the guest's: its address for both sides. slot: 0 to VHOST_USER_SLOTS - 1 of each queue. */
#define VHOST_USER_SLOTS 256
#define VHOST_USER_SLOT_BYTES 64
u8 *vhost_user_slot(struct vhost_user *v, unsigned queue, unsigned slot, u64 *gpa);
void vhost_user_kick(struct vhost_user *v, unsigned queue);
/* The next request that was answered, with the bytes written. NULL: none now. */
void *vhost_user_take(struct vhost_user *v, unsigned queue, u32 *len);
/* Waits until something may have been answered, or the process has gone; for who holds the loop's thread. */
void vhost_user_wait(struct vhost_user *v, int ms);
